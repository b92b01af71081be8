import pytest
import torch
from accelerate import Accelerator
from helpers import make_model, make_views

from co2s_hf.training.class_balance import BALANCES, Balance, ClassStatistics, class_thresholds, logit_shift
from co2s_hf.training.objective import Co2SObjective
from co2s_hf.training.pseudo_labels import PseudoLabels


TAU = 0.95
LABELED_SHARE = torch.tensor([0.5, 0.3, 0.2])


def logits_of(*pixels):
    """Make logits of one row of pixels from (predicted class, confidence); the other two classes share the rest."""
    probabilities = torch.full((len(pixels), 3), 0.0)
    for row, (label, confidence) in zip(probabilities, pixels):
        row[:] = (1 - confidence) / 2
        row[label] = confidence
    return probabilities.log().T.reshape(1, 3, 1, -1)


# The frequent class 0 is confident, class 1 never reaches tau, class 2 is not predicted.
PIXELS = (
    [(0, 0.99)] * 60 + [(0, 0.97)] * 10 + [(1, confidence) for confidence in torch.linspace(0.5, 0.8, 30).tolist()]
)


def statistics_of(logits, balance, padding=None):
    statistics = ClassStatistics(3, balance)
    padding = torch.zeros(logits.shape[0], *logits.shape[2:], dtype=torch.bool) if padding is None else padding
    statistics.update(statistics.measure(logits, padding))
    return statistics


def covered(logits, thresholds):
    """Return the number of confident pixels of each class."""
    own = PseudoLabels.from_logits(logits, torch.zeros(logits.shape[0], *logits.shape[2:], dtype=torch.bool))
    return torch.bincount(own.labels[own.confident(thresholds)], minlength=3).tolist()


def test_one_threshold_loses_a_class_and_quantiles_keep_it():
    logits, balance = logits_of(*PIXELS), Balance(thresholds="quantile", share=0.5)
    assert covered(logits, TAU) == [70, 0, 0]
    thresholds = class_thresholds(statistics_of(logits, balance), balance, TAU)
    assert thresholds[0] == pytest.approx(TAU)  # more than half of class 0 is above tau, so tau is its threshold
    assert thresholds[1] == pytest.approx(0.65, abs=0.01)  # the median of class 1
    assert thresholds[2] == pytest.approx(TAU)  # nothing is known about class 2
    assert covered(logits, thresholds) == [70, 15, 0]


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 0.9])
def test_quantiles_are_those_of_the_sorted_confidences(share):
    confidences = 0.4 + 0.59 * torch.rand(2000, generator=torch.Generator().manual_seed(0))
    logits = logits_of(*((1, confidence) for confidence in confidences.tolist()))
    found = statistics_of(logits, Balance(thresholds="quantile")).confidence_reached_by(share)
    assert found[1].item() == pytest.approx(confidences.quantile(1 - share).item(), abs=0.004)
    assert found[0] == 1 and found[2] == 1  # not predicted


def test_confidences_close_to_one_are_told_apart():
    logits = torch.zeros(1, 2, 1, 2000)
    logits[0, 0] = torch.linspace(5, 13, 2000)  # probabilities from 0.993 to 0.999998
    statistics = ClassStatistics(2, Balance())
    statistics.update(statistics.measure(logits, torch.zeros(1, 1, 2000, dtype=torch.bool)))
    expected = torch.tensor(11.0).sigmoid()
    assert 1 - statistics.confidence_reached_by(0.25)[0] == pytest.approx(1 - expected.item(), rel=0.01)


def test_a_class_gets_no_more_pseudo_labels_than_its_labels_allow():
    """Class 1 is predicted in 90 % of the pixels, but 30 % of the labelled pixels are class 1."""
    confidences = torch.linspace(0.6, 0.999, 900).tolist()
    logits = logits_of(*((1, confidence) for confidence in confidences), *[(0, 0.99)] * 100)
    plain, capped = Balance(thresholds="quantile"), Balance(thresholds="quantile", cap=1.0)
    thresholds = [class_thresholds(statistics_of(logits, b), b, 0.7, LABELED_SHARE) for b in (plain, capped)]
    assert covered(logits, thresholds[0])[1] > 600
    assert covered(logits, thresholds[1])[1] == pytest.approx(300, abs=5)
    assert thresholds[1][1] > 0.8 and thresholds[0][0] == thresholds[1][0]  # above tau; class 0 is below its share
    half = Balance(thresholds="quantile", cap=0.5)
    assert covered(logits, class_thresholds(statistics_of(logits, half), half, 0.7, LABELED_SHARE))[1] == (
        pytest.approx(150, abs=5)
    )
    fixed = Balance(cap=1.0)  # the cap works with one threshold, too
    assert covered(logits, class_thresholds(statistics_of(logits, fixed), fixed, 0.7, LABELED_SHARE)) == (
        pytest.approx([100, 300, 0], abs=5)
    )


def test_freematch_lowers_the_threshold_of_classes_that_are_seldom_probable():
    logits, balance = logits_of(*PIXELS), Balance(thresholds="freematch")
    probabilities = logits.softmax(dim=1)
    mean = probabilities.mean(dim=(0, 2, 3))
    expected = probabilities.amax(dim=1).mean() * mean / mean.max()
    thresholds = class_thresholds(statistics_of(logits, balance), balance, TAU)
    torch.testing.assert_close(thresholds, expected)
    assert covered(logits, TAU)[1] == 0 and covered(logits, thresholds)[1] == 30


def test_logit_adjustment_changes_the_class_of_close_decisions():
    """Class 1 always comes second behind the frequent class 0, so no threshold keeps it."""
    balance = Balance(logit_adjustment=0.4)
    sure = torch.tensor([6.0, 0.0, 0.0]).view(1, 3, 1, 1).expand(-1, -1, -1, 90)
    close = torch.tensor([1.0, 0.6, -4.0]).view(1, 3, 1, 1).expand(-1, -1, -1, 10)
    logits = torch.cat([sure, close], dim=3)
    assert covered(logits, 0.0) == [100, 0, 0]
    statistics = statistics_of(logits, balance)
    q = logits.softmax(dim=1).mean(dim=(0, 2, 3))
    shift = logit_shift(statistics, balance.logit_adjustment)
    torch.testing.assert_close(shift.flatten(), 0.4 * q.log())
    assert covered(logits - shift, 0.0) == [90, 10, 0]
    # With the margin, the frequent class needs less to win, so a rare pseudo-label is trained harder.
    own = PseudoLabels.from_logits(logits - shift, torch.zeros(1, 1, 100, dtype=torch.bool))
    with_margin, without = (own.loss(z, 0.0).total for z in (logits + shift, logits))
    assert with_margin > without + 1


def test_statistics_fade_and_do_not_count_padding():
    balance = Balance(momentum=0.5, quantile_momentum=0.0)
    statistics = ClassStatistics(3, balance)
    first, second = logits_of(*[(0, 0.9)] * 4), logits_of((1, 0.6), (2, 0.7), (2, 0.7), (2, 0.7))
    padding = torch.tensor([[[False, False, True, True]]])
    statistics.update(statistics.measure(first, torch.zeros_like(padding)))
    assert statistics.mean_confidence().item() == pytest.approx(0.9)
    statistics.update(statistics.measure(second, padding))
    # Four pixels with half the weight, and two pixels: the padded ones are not counted.
    assert statistics.mean_confidence().item() == pytest.approx((0.5 * 4 * 0.9 + 0.6 + 0.7) / 4)
    expected = (0.5 * 4 * first.exp()[0, :, 0, 0] + second.exp()[0, :, 0, :2].sum(dim=1)) / 4
    torch.testing.assert_close(statistics.mean_probability(), expected)
    torch.testing.assert_close(statistics.predicted_share(), torch.tensor([0.0, 0.5, 0.5]))  # of the last batch alone


def test_a_batch_that_is_not_finite_leaves_no_trace():
    balance = Balance(thresholds="freematch")
    statistics = statistics_of(logits_of(*PIXELS), balance)
    before = class_thresholds(statistics, balance, TAU)
    broken = torch.full((1, 3, 1, 4), torch.nan)
    statistics.update(statistics.measure(broken, torch.zeros(1, 1, 4, dtype=torch.bool)))
    torch.testing.assert_close(class_thresholds(statistics, balance, TAU), before)


def test_coverage_is_the_share_of_all_pixels_above_the_thresholds():
    logits = logits_of(*PIXELS)
    statistics = statistics_of(logits, Balance())
    found = statistics.coverage(torch.tensor([0.95, 0.65, 0.95]))
    torch.testing.assert_close(found, torch.tensor([0.7, 0.15, 0.0]), atol=0.01, rtol=0)
    assert statistics.coverage(torch.tensor([0.0, 1.0, 1.0])).tolist() == pytest.approx([0.7, 0, 0])


def objective_of(balance, **settings):
    defaults = {"threshold": 0.36, "feature_dropout": 0.0, "labeled_share": LABELED_SHARE}
    return Co2SObjective(make_model(), balance=balance, **{**defaults, **settings})


def test_the_paper_has_no_statistics_and_its_losses():
    assert BALANCES["paper"] == BALANCES["released"] == Balance() != BALANCES["balanced"]
    views = make_views()
    default, explicit = Co2SObjective(make_model(), threshold=0.36, feature_dropout=0.0), objective_of(Balance())
    assert default.state_dict().keys() == explicit.state_dict().keys() and not default.statistics
    expected, found = default(views, 0.5), explicit(views, 0.5)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    "balance",
    [
        Balance(thresholds="quantile"),
        Balance(thresholds="freematch"),
        Balance(cap=0.5),
        Balance(logit_adjustment=0.4),
        Balance(thresholds="quantile", cap=1.0, logit_adjustment=0.4),
    ],
)
def test_the_objective_uses_the_rules_of_each_student(balance):
    """Compute the losses on strong views and the stability loss again, from the model's logits."""
    views = make_views(cutmix_boxes_1=torch.zeros(3, 16, 16, dtype=torch.bool))
    objective = objective_of(balance)
    losses = objective(views, 0.5)
    with torch.no_grad():
        weak, strong = objective.model.student_logits(views.weak), objective.model.student_logits(views.strong_1)
    probabilities, confident = {}, {}
    for name in ("clip", "dinov3"):
        statistics = statistics_of(weak[name], balance)
        thresholds = class_thresholds(statistics, balance, 0.36, LABELED_SHARE)
        shift = logit_shift(statistics, balance.logit_adjustment)
        own = PseudoLabels.from_logits(weak[name] - shift, views.padding)
        mean = own.loss(strong[name] + shift, thresholds)
        torch.testing.assert_close(losses[f"{name}/loss_strong_1"], mean.total / mean.count, rtol=1e-4, atol=1e-6)
        confident[name] = own.confident(thresholds)
        coverage = torch.bincount(own.labels[confident[name]], minlength=3) / own.labels.numel()
        torch.testing.assert_close(losses[f"{name}/coverage"], coverage)
        probabilities[name] = (weak[name] - shift).softmax(dim=1)
    clip, dinov3 = (probabilities[name].amax(dim=1) for name in ("clip", "dinov3"))
    learns = confident["dinov3"] & (~confident["clip"] | (dinov3 >= clip))
    assert learns.any()
    squared = (probabilities["clip"] - probabilities["dinov3"]).square().mean(dim=1)
    torch.testing.assert_close(losses["clip/loss_stability"], squared[learns].mean(), rtol=1e-4, atol=1e-6)


def test_statistics_are_part_of_the_state_and_continue():
    balance = Balance(thresholds="quantile", logit_adjustment=0.4)
    first, second = make_views(seed=0), make_views(seed=1)
    whole = objective_of(balance)
    whole(first, 0.5)
    state = {name: value.clone() for name, value in whole.state_dict().items()}
    resumed = objective_of(balance)
    resumed.load_state_dict(state)
    expected, found = whole(second, 0.5), resumed(second, 0.5)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    fresh = objective_of(balance)(second, 0.5)
    assert not torch.equal(fresh["clip/loss_strong_1"], expected["clip/loss_strong_1"])
    with torch.no_grad():
        objective_of(balance, accelerator=Accelerator(cpu=True))(second, 0.5)  # one process: nothing to reduce


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"thresholds": "otsu"}, "`thresholds` is 'otsu'; choose fixed, quantile or freematch"),
        ({"share": 0.0}, "`share` is 0.0; it must be above 0 and at most 1"),
        ({"cap": 0.0}, "`cap` is 0.0; it must be above 0"),
        ({"rare_class_temperature": -1.0}, "`rare_class_temperature` is -1.0; it must be above 0"),
        ({"momentum": 1.0}, "`momentum` is 1.0; it must be at least 0 and less than 1"),
        ({"logit_adjustment": -0.4}, "`logit_adjustment` is -0.4; it must be at least 0"),
    ],
)
def test_wrong_rules_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        Balance(**settings)


def test_a_cap_needs_the_shares_of_the_labels():
    with pytest.raises(ValueError, match="needs `labeled_share`"):
        Co2SObjective(make_model(), balance=Balance(cap=1.0))
