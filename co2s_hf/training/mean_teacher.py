"""The objective of the recipe "balanced": a mean teacher whose students teach each other.

A mean teacher (arXiv 1703.01780; UniMatch V2, arXiv 2410.10777) is an exponential moving average of the model's
weights. Its predictions change slowly and are better than those of the model in training. Both of its students predict
the weak view. Their calibrated probabilities are fused per pixel, and the fused pseudo-labels train both students of
the model on the strong view: where one student is surer, the other one learns from it.
"""

import copy

import torch
from torch import nn

from ..data.views import Views, cutmix
from ..model.modeling_co2s import Co2SForSemanticSegmentation, fuse_logits
from .calibration import RunningCalibration
from .class_balance import ClassStatistics
from .objective import Co2SObjective, with_partners
from .pseudo_labels import Mean, PseudoLabels


FUSED = "fused"  # name of the running statistics of the fused predictions


class MeanTeacher(nn.Module):
    """An exponential moving average of a model's weights.

    Args:
        model: The model to follow. Its weights are copied.
        decay: Weight of the past in each update, 0 to 1. The first updates use less, so that the average does not
            depend on the first weights.
    """

    def __init__(self, model: Co2SForSemanticSegmentation, decay: float):
        super().__init__()
        self.decay = decay
        self.model = copy.deepcopy(model).requires_grad_(False)
        self.register_buffer("updates", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def update(self, model: Co2SForSemanticSegmentation):
        """Move the average towards the model's present weights."""
        self.updates += 1
        decay = torch.minimum(1 - 1 / (self.updates + 1), torch.tensor(self.decay, device=self.updates.device))
        for own, new in zip(self.model.parameters(), model.parameters(), strict=True):
            if new.requires_grad:
                own.lerp_(new, (1 - decay).to(own.dtype))


class TaughtObjective(Co2SObjective):
    """The losses with pseudo-labels of a mean teacher.

    The strong view has the weight that the three losses on unlabelled images have in the paper together.

    Args:
        model: A [`Co2SForSemanticSegmentation`], with or without adapters.
        options: Arguments of [`Co2SObjective`]. `balance.teacher_decay` is the decay of the mean teacher.
    """

    def __init__(self, model: Co2SForSemanticSegmentation, **options):
        super().__init__(model, **options)
        num_labels = model.config.num_labels
        self.teacher = MeanTeacher(model, self.balance.teacher_decay)
        self.calibration = RunningCalibration(num_labels, self.students, self.accelerator)
        self.statistics = nn.ModuleDict({FUSED: ClassStatistics(num_labels, self.balance)})

    def forward(self, views: Views, stability_weight: float = 0.0) -> dict[str, torch.Tensor]:
        """Update the mean teacher, then compute all losses, see [`Co2SObjective.forward`]."""
        self.teacher.update(self.model)
        return super().forward(views, stability_weight)

    def _labeled_only(self, views: Views) -> dict[str, dict[str, Mean]]:
        logits = self.model.student_logits(views.labeled, self.students)
        self.calibration.update({name: part.detach() for name, part in logits.items()}, views.labels)
        return {name: {"loss_supervised": self._supervised(logits[name], views)} for name in self.students}

    def _semi_supervised(self, views: Views) -> dict[str, dict[str, Mean]]:
        views = with_partners(views)
        own, other, threshold, shift = self._pseudo_labels(views)
        mixed = own.mixed_with(other, views.cutmix_boxes_1)
        strong = cutmix(views.strong_1, views.partner_strong_1, views.cutmix_boxes_1)
        logits = self.model.student_logits(torch.cat([views.labeled, strong]), self.students)
        means, labeled_logits = {}, {}
        for name in self.students:
            labeled_logits[name], on_strong = logits[name].split([len(views.labeled), len(strong)])
            means[name] = {
                "loss_supervised": self._supervised(labeled_logits[name], views),
                "loss_strong_1": mixed.loss(on_strong + shift, threshold, self.confidence_mode),
                **self._quality(own, threshold, views),
            }
        self.calibration.update({name: part.detach() for name, part in labeled_logits.items()}, views.labels)
        return means

    @torch.no_grad()
    def _pseudo_labels(
        self, views: Views
    ) -> tuple[PseudoLabels, PseudoLabels, float | torch.Tensor, float | torch.Tensor]:
        """Predict the weak views, and their partners, with the mean teacher.

        Returns:
            The fused pseudo-labels of the weak views and of their partners, the thresholds, the shift of the logits.
        """
        weak = views.weak if views.partner_order is not None else torch.cat([views.weak, views.partner_weak])
        fused = self._fused(self.teacher.model.student_logits(weak, self.students))
        own = fused[: len(views.weak)]
        partner = own[views.partner_order] if views.partner_order is not None else fused[len(views.weak) :]
        self._update_statistics({FUSED: own}, views.padding)
        threshold, shift = self._rules(FUSED)
        return (
            PseudoLabels.from_logits(own - shift, views.padding),
            PseudoLabels.from_logits(partner - shift, views.partner_padding),
            threshold,
            shift,
        )

    def _fused(self, logits: dict[str, torch.Tensor]) -> torch.Tensor:
        """Fuse the teacher's calibrated logits. A student that is far behind does not teach."""
        if len(self.students) == 1:
            return logits[self.students[0]].float()
        temperatures, may_teach = self.calibration.temperatures, self.calibration.may_teach
        clip, dinov3 = (logits[name].float() / temperatures[name] for name in ("clip", "dinov3"))
        fused = fuse_logits(clip, dinov3, self.balance.exchange)
        fused = torch.where(may_teach["clip"], fused, dinov3)
        return torch.where(may_teach["dinov3"], fused, clip)

    def _total(self, terms: dict[str, torch.Tensor], stability_weight: float) -> torch.Tensor:
        total = terms["loss_supervised"]
        if "loss_strong_1" in terms:
            weight = 2 * self.strong_weight + self.feature_dropout_weight
            total = total + weight * terms["loss_strong_1"]
        return 0.5 * total


__all__ = ["MeanTeacher", "TaughtObjective"]
