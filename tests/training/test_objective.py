import pytest
import torch
import torch.nn.functional as F
from helpers import load_parity, make_model, make_views

from co2s_hf import Co2SForSemanticSegmentation
from co2s_hf.data.views import Views
from co2s_hf.training.objective import (
    CONFIDENCE_MODES,
    LABELED_LOSSES,
    Co2SObjective,
    PseudoLabels,
    labeled_loss,
    stability_losses,
    stability_weight,
)


# (the authors' name, our name, factor: the authors' value is already multiplied by its weight)
TERMS = [
    ("loss_x", "loss_supervised", 1.0),
    ("loss_s1", "loss_strong_1", 1.0),
    ("loss_s2", "loss_strong_2", 1.0),
    ("loss_fp", "loss_feature_dropout", 1.0),
    ("loss_stability", "loss_stability", 0.5),
    ("total", "loss", 1.0),
]


def parity_views(batch):
    return Views(
        labeled=batch["image_x"],
        labels=batch["mask_x"],
        weak=batch["image_w"],
        strong_1=batch["image_s1"],
        strong_2=batch["image_s2"],
        padding=batch["ignore_mask"] == 255,
        cutmix_boxes_1=batch["cutmix_box1"] == 1,
        cutmix_boxes_2=batch["cutmix_box2"] == 1,
        partner_weak=batch["image_w_other"],
        partner_strong_1=batch["image_s1_other"],
        partner_strong_2=batch["image_s2_other"],
        partner_padding=batch["ignore_mask_other"] == 255,
    )


def gradients_by_authors_names(model):
    """Compute the gradient norms that the fixture has (in_proj and qkv are three parameters here)."""

    def norm(*parameters):
        return torch.stack([p.grad.norm() for p in parameters]).norm()

    norms = {}
    for name in ("clip", "dinov3"):
        student = getattr(model, name)
        decoder = student.decoder
        norms |= {
            f"{name}.decode_head.conv1.weight": norm(decoder.similarity_projection.weight),
            f"{name}.decode_head.aspp.project.0.weight": norm(decoder.spatial_pyramid.projection[0].weight),
            f"{name}.decode_head.layers.1.transformer.attn.attn.in_proj_weight": norm(
                decoder.semantic_layers[1].qkv.weight
            ),
            f"{name}.decode_head.up2.conv.3.weight": norm(decoder.upsampling_layers[1].refine[0].weight),
        }
    clip, dinov3 = model.clip, model.dinov3
    last = clip.encoder.layers[11].self_attn
    attention = dinov3.encoder.layers[11].attention
    return norms | {
        "clip.decode_head.text_proj.0.weight": norm(clip.decoder.guidance_projection[0].weight),
        "clip.backbone.layers.0.attn.attn.out_proj.weight": norm(clip.encoder.layers[0].self_attn.out_proj.weight),
        # Query and key of the last layer have no gradient in either implementation.
        "clip.backbone.layers.11.attn.attn.in_proj_weight": norm(last.v_proj.weight),
        "dinov3.text_provider.emb.weight": norm(dinov3.guidance.queries),
        "dinov3.backbone.blocks.0.attn.proj.weight": norm(dinov3.encoder.layers[0].attention.o_proj.weight),
        "dinov3.backbone.blocks.11.attn.qkv.weight": norm(
            attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight
        ),
    }


@pytest.mark.parametrize("mode", ["paper", "reference"])
def test_losses_and_gradients_are_the_authors(mode, converted_folder):
    fixture = load_parity("training_step")
    batch = {key.removeprefix("batch."): value for key, value in fixture.items() if key.startswith("batch.")}
    model = Co2SForSemanticSegmentation.from_pretrained(converted_folder).freeze_backbones().train()
    objective = Co2SObjective(model, threshold=0.55, feature_dropout=0.0, stability=mode, counts_padding=True)
    losses = objective(parity_views(batch), stability_weight(300, 1000))
    losses["loss"].backward()
    for student in ("clip", "dinov3"):
        for theirs, ours, factor in TERMS:
            expected = fixture[f"expected.{student}.{theirs}"]
            torch.testing.assert_close(factor * losses[f"{student}/{ours}"], expected, rtol=1e-5, atol=0, msg=ours)
    prefix = f"expected.{mode}.grad_norm."
    expected = {key.removeprefix(prefix): value for key, value in fixture.items() if key.startswith(prefix)}
    found = gradients_by_authors_names(model)
    assert found.keys() == expected.keys() and len(expected) == 14
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=0, msg=name)


def test_stability_weight_follows_the_authors_schedule():
    fixture = load_parity("stability_weight")
    for step, expected in zip(fixture["step"].tolist(), fixture["weight"].tolist()):
        assert stability_weight(step, 1000) == pytest.approx(expected, rel=1e-6, abs=1e-12)
    assert stability_weight(0, 3) == 0.5  # too short for a rise


def logits_of(*probabilities):
    """Make logits of one row of pixels with two classes; the first class has these probabilities."""
    p = torch.tensor(probabilities)
    return torch.stack([p, 1 - p]).log().view(1, 2, 1, -1).requires_grad_()


def value(mean):
    return mean.total / mean.count


def test_the_less_confident_student_learns():
    #                 both confident, CLIP more; a tie; only DINOv3 confident; neither
    clip = logits_of(0.99, 0.97, 0.60, 0.70)
    dinov3 = logits_of(0.96, 0.03, 0.98, 0.80)
    losses = stability_losses(clip, dinov3, threshold=0.95)
    torch.testing.assert_close(value(losses["clip"]), torch.tensor((0.94**2 + 0.38**2) / 2))
    torch.testing.assert_close(value(losses["dinov3"]), torch.tensor((0.03**2 + 0.94**2) / 2))
    value(losses["clip"]).backward()
    assert dinov3.grad is None and (clip.grad[0, 0, 0] != 0).tolist() == [False, True, True, False]


def test_reference_stability_has_the_same_value_and_no_gradient():
    clip, dinov3 = logits_of(0.6, 0.9), logits_of(0.97, 0.99)
    paper, reference = (stability_losses(clip, dinov3, 0.95, mode)["clip"].total for mode in ("paper", "reference"))
    assert torch.equal(paper, reference) and paper > 0
    assert paper.requires_grad and not reference.requires_grad


def test_padding_is_left_out_of_the_stability_loss():
    clip, dinov3 = logits_of(0.6, 0.7, 0.8), logits_of(0.97, 0.98, 0.99)
    padding = torch.tensor([[[False, True, False]]])
    without = stability_losses(clip, dinov3, 0.95, padding=padding)["clip"]
    torch.testing.assert_close(value(without), torch.tensor((0.37**2 + 0.19**2) / 2))
    counted = stability_losses(clip, dinov3, 0.95)["clip"]
    torch.testing.assert_close(value(counted), torch.tensor((0.37**2 + 0.28**2 + 0.19**2) / 3))
    padding = torch.zeros(3, 16, 16, dtype=torch.bool)
    padding[:, :, 8:] = True
    losses = {}
    for counts in (False, True):
        objective = Co2SObjective(make_model(), threshold=0.36, feature_dropout=0.0, counts_padding=counts)
        losses[counts] = objective(make_views(padding=padding), 0.5)
    with torch.no_grad():
        logits = make_model().student_logits(make_views().weak)
    for counts, expected in (
        (True, stability_losses(logits["clip"], logits["dinov3"], 0.36)["clip"]),
        (False, stability_losses(logits["clip"][..., :8], logits["dinov3"][..., :8], 0.36)["clip"]),
    ):
        torch.testing.assert_close(losses[counts]["clip/loss_stability"], value(expected), rtol=1e-4, atol=1e-6)
    assert not torch.isclose(losses[False]["clip/loss_stability"], losses[True]["clip/loss_stability"])


def test_each_class_of_a_student_has_its_own_threshold_to_teach():
    #                        DINOv3 predicts class 0, 0, 1
    clip, dinov3 = logits_of(0.5, 0.5, 0.5), logits_of(0.8, 0.9, 0.2)
    thresholds = {"clip": torch.tensor([0.95, 0.95]), "dinov3": torch.tensor([0.85, 0.7])}
    losses = stability_losses(clip, dinov3, thresholds)
    torch.testing.assert_close(value(losses["clip"]), torch.tensor((0.4**2 + 0.3**2) / 2))
    assert losses["dinov3"].count == 0


def test_without_confident_pixels_no_student_learns():
    losses = stability_losses(logits_of(0.5, 0.6), logits_of(0.7, 0.8), threshold=0.95)
    assert all(mean.total.item() == 0 and mean.count.item() == 0 for mean in losses.values())


def test_pseudo_label_loss_divides_by_all_image_pixels():
    own = PseudoLabels(
        labels=torch.tensor([[[0, 1, 1, 0]], [[1, 1, 0, 0]]]),
        confidence=torch.tensor([[[0.99, 0.5, 0.97, 0.99]], [[0.6, 0.98, 0.7, 0.8]]]),
        padding=torch.tensor([[[False, False, False, True]], [[False] * 4]]),
    )
    strong = torch.randn(2, 2, 1, 4)
    ce = F.cross_entropy(strong, own.labels, reduction="none")[:, 0]
    torch.testing.assert_close(value(own.loss(strong, 0.95)), (ce[0, 0] + ce[0, 2] + ce[1, 1]) / 7)
    ratio = 2 / 3 * ce[0, :3].sum() + 1 / 4 * ce[1].sum()  # weights: each image's share of confident pixels
    torch.testing.assert_close(value(own.loss(strong, 0.95, "pixelratio")), ratio / 7)
    average = (0.99 + 0.5 + 0.97) / 3 * ce[0, :3].sum() + (0.6 + 0.98 + 0.7 + 0.8) / 4 * ce[1].sum()
    torch.testing.assert_close(value(own.loss(strong, 0.95, "pixelavg")), average / 7)
    padded = PseudoLabels(own.labels, own.confidence, torch.ones_like(own.padding))
    assert all(padded.loss(strong, 0.95, mode).total.item() == 0 for mode in CONFIDENCE_MODES)


def test_labeled_loss_weights_classes_as_torch_does():
    logits, labels = torch.randn(2, 3, 4, 4), torch.randint(3, (2, 4, 4))
    labels[0, 0] = 255
    weights = torch.tensor([0.5, 1.0, 4.0])
    for class_weights in (None, weights):
        expected = F.cross_entropy(logits, labels, ignore_index=255, weight=class_weights)
        torch.testing.assert_close(value(labeled_loss(logits, labels, 255, class_weights=class_weights)), expected)


def test_hard_examples_are_mined():
    # 20 pixels of class 0 with different probabilities; one is ignored
    probabilities = torch.linspace(0.95, 0.50, 20)
    labels = torch.zeros(1, 1, 20, dtype=torch.long)
    labels[0, 0, -1] = 255
    logits = logits_of(*probabilities.tolist())
    hard = -probabilities[:-1][probabilities[:-1] < 0.7].log()
    torch.testing.assert_close(value(labeled_loss(logits, labels, 255, "ohem")), hard.mean())
    easy = logits_of(*torch.linspace(0.99, 0.9, 20).tolist())  # none is below 0.7, so the hardest two of 19 are used
    expected = -torch.linspace(0.99, 0.9, 20)[17:19].log().mean()
    torch.testing.assert_close(value(labeled_loss(easy, labels, 255, "ohem")), expected)


@pytest.mark.parametrize("kind", LABELED_LOSSES)
def test_a_batch_of_ignored_labels_has_loss_zero_with_a_gradient(kind):
    model = make_model()
    views = make_views()
    losses = Co2SObjective(model, labeled_loss=kind)(
        Views(labeled=views.labeled, labels=torch.full_like(views.labels, 255))
    )
    losses["loss"].backward()
    assert losses["loss"].item() == 0 and losses["clip/loss_supervised"].item() == 0
    assert all(not p.grad.any() for p in model.clip.decoder.parameters())


def test_neighbours_are_partners():
    objective = Co2SObjective(make_model(), threshold=0.34, feature_dropout=0.0)
    views = make_views()
    implicit = objective(views, 0.5)
    order = [1, 0, 0]  # neighbours swap; the partner of the last image is the first one
    partners = {f"partner_{k}": getattr(views, k)[order] for k in ("weak", "strong_1", "strong_2", "padding")}
    explicit = objective(make_views(**partners), 0.5)
    assert implicit["clip/loss_strong_1"] > 0
    for name in implicit:
        torch.testing.assert_close(implicit[name], explicit[name], msg=name)


def test_warm_up_step_learns_from_labels_alone():
    model = make_model()
    objective = Co2SObjective(model)
    views = make_views()
    losses = objective(Views(labeled=views.labeled, labels=views.labels))
    torch.testing.assert_close(losses["loss"], 0.5 * model(views.labeled, labels=views.labels).loss)
    full = objective(views, 0.5)
    torch.testing.assert_close(full["clip/loss_supervised"], losses["clip/loss_supervised"])


def test_feature_dropout_changes_its_own_loss_only():
    views, losses = make_views(), {}
    for probability in (0.0, 1.0):
        losses[probability] = Co2SObjective(make_model(), threshold=0.34, feature_dropout=probability)(views, 0.5)
    changed = {name for name, value in losses[0.0].items() if not torch.allclose(value, losses[1.0][name])}
    assert changed == {"loss"} | {f"{s}/{t}" for s in ("clip", "dinov3") for t in ("loss", "loss_feature_dropout")}


def test_stability_off_keeps_the_other_losses():
    views = make_views()
    losses = {}
    for mode in ("off", "paper"):
        losses[mode] = Co2SObjective(make_model(), threshold=0.34, feature_dropout=0.0, stability=mode)(views, 0.5)
    difference = losses["paper"]["loss"] - losses["off"]["loss"]
    terms = losses["paper"]["clip/loss_stability"] + losses["paper"]["dinov3/loss_stability"]
    assert terms > 0 and "clip/loss_stability" not in losses["off"]
    torch.testing.assert_close(difference, 0.5 * terms, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"threshold": 1.5}, "`threshold` is 1.5"),
        ({"stability": "on"}, "`stability` is 'on'; choose one of paper, reference, off"),
        ({"confidence_mode": "mean"}, "`confidence_mode` is 'mean'"),
        ({"labeled_loss": "focal"}, "`labeled_loss` is 'focal'"),
        ({"students": ("dino",)}, r"`students` is \('dino',\)"),
        ({"class_weights": torch.ones(2)}, r"shape \(2,\); 3 classes need \(3,\)"),
    ],
)
def test_wrong_settings_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        Co2SObjective(make_model(), **kwargs)


@pytest.mark.parametrize("student", ["clip", "dinov3"])
def test_one_student_alone(student):
    views, model = make_views(), make_model()
    both = Co2SObjective(model, threshold=0.34, feature_dropout=0.0, stability="off")(views)
    alone = Co2SObjective(model, students=(student,), threshold=0.34, feature_dropout=0.0)(views, 0.5)
    assert {name.split("/")[0] for name in alone} == {"loss", "without_labels", student}
    for name in alone.keys() - {"loss"}:
        torch.testing.assert_close(alone[name], both[name], msg=name)
    torch.testing.assert_close(alone["loss"], both[f"{student}/loss"], check_dtype=False)


def test_hidden_labels_measure_pseudo_labels_without_training():
    model, views = make_model(), make_views()
    objective = Co2SObjective(model, threshold=0.36, feature_dropout=0.0)
    with torch.no_grad():
        confidence, predicted = model.student_logits(views.weak)["clip"].softmax(1).max(1)
    truth = predicted.clone()
    truth[0] = (truth[0] + 1) % 3
    truth[1] = 255
    blind, measured = objective(views, 0.5), objective(make_views(hidden_labels=truth), 0.5)
    confident = confidence >= 0.36
    assert 0 < confident.sum() < confident.numel()
    accuracy = confident[2].sum() / (confident[0].sum() + confident[2].sum())
    torch.testing.assert_close(measured["clip/right_fraction"] / measured["clip/known_fraction"], accuracy)
    for name, expected in blind.items():
        torch.testing.assert_close(measured[name], expected, msg=name)
    covered = [(confident & (predicted == label)).float().mean() for label in range(3)]
    torch.testing.assert_close(blind["clip/coverage"], torch.stack(covered))
    torch.testing.assert_close(blind["clip/coverage"].sum(), blind["clip/confident_fraction"])


@pytest.mark.parametrize("ignore_index", [-100, 100])
def test_views_have_255_without_a_class_whatever_the_model_ignores(ignore_index):
    views = make_views(hidden_labels=make_views(seed=1).labels)
    views.labels[:, :4], views.hidden_labels[:, :6] = 255, 255
    expected, found = (
        Co2SObjective(make_model(semantic_loss_ignore_index=index), threshold=0.36, feature_dropout=0.0)(views, 0.5)
        for index in (255, ignore_index)
    )
    assert found.keys() == expected.keys() and expected["clip/known_fraction"] > 0
    assert all(torch.equal(found[name], value) for name, value in expected.items())
