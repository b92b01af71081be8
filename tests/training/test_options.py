import pytest

from co2s_hf.data.benchmarks import BENCHMARKS
from co2s_hf.data.options import DataOptions
from co2s_hf.model.text_guidance_co2s import SHIPPED_BACKBONES
from co2s_hf.training.options import SHIPPED, AdaptationOptions, TrainingOptions, follow_protocol


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"clip_model": "x"}, "Give both `clip_model` and `dinov3_model`, or neither"),
        ({"clip_model": "co2s-tiny-clip"}, "Give both `clip_model` and `dinov3_model`, or neither"),
        (
            {"from_scratch": True, "clip_model": "a", "dinov3_model": "b"},
            "Give either `from_scratch`, or `clip_model` and `dinov3_model`",
        ),
        ({"max_train_steps": 5, "num_train_epochs": 5}, "either `max_train_steps` or `num_train_epochs`"),
        ({"eval_steps": 5, "eval_epochs": 5}, "either `eval_steps` or `eval_epochs`"),
        ({"lora": True, "train_backbones": "all"}, "either `lora` or `train_backbones='all'`"),
        ({"confidence_threshold": 2.0}, "`confidence_threshold` is 2.0; a probability lies between 0 and 1"),
        ({"crop_size": 7}, "`crop_size` is 7; it must be at least 8"),
        ({"stability_weight": -1}, "`stability_weight` is -1; it must be at least 0"),
        ({"lora_alpha": 0}, "`lora_alpha` is 0; it must be at least 1"),
        ({"lora_dropout": 1.0}, "`lora_dropout` is 1.0; it must be less than 1"),
        ({"seed": -1}, "`seed` is -1; it must be at least 0"),
        ({"learning_rate": -1.0}, "`learning_rate` is -1.0; it must be a finite number above 0"),
        ({"lora_rank": 0}, "`lora_rank` is 0; it must be at least 1"),
        ({"base_size": [512]}, r"expected a long and a short side: `base_size=\(2048, 512\)`"),
        ({"overwrite_output_dir": True, "resume_from_checkpoint": "last"}, "Give either `overwrite_output_dir`"),
        ({"report_to": ["tensorbored"]}, "`report_to` names tensorbored, which is not installed"),
    ],
)
def test_values_that_do_not_fit_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        TrainingOptions(**settings)


def test_defaults_depend_on_the_model():
    scratch = TrainingOptions(from_scratch=True)
    pretrained = TrainingOptions(clip_model="a", dinov3_model="b", crop_size=96)
    for options in (scratch, pretrained):
        options.fill(options.defaults)
    assert (scratch.clip_model, scratch.dinov3_model) == (None, None)
    assert (scratch.crop_size, scratch.confidence_threshold, scratch.train_backbones) == (64, 0.6, "all")
    assert (pretrained.crop_size, pretrained.confidence_threshold, pretrained.learning_rate) == (96, 0.95, 1e-4)
    lora = TrainingOptions(clip_model="a", dinov3_model="b", lora=True)
    assert (lora.defaults["train_backbones"], lora.defaults["backbone_lr_scale"]) == ("none", 1.0)


def test_the_shipped_backbones_are_the_default_and_have_defaults_of_their_own():
    options, named = TrainingOptions(), TrainingOptions(clip_model="co2s-tiny-clip", dinov3_model="co2s-tiny-dinov3")
    for filled in (options, named):
        filled.fill(filled.defaults)
    assert options == named and (options.clip_model, options.dinov3_model) == SHIPPED_BACKBONES
    assert {name: getattr(options, name) for name in SHIPPED} == SHIPPED
    lora = TrainingOptions(lora=True)
    lora.fill(lora.defaults)
    assert (lora.clip_model, lora.train_backbones, lora.backbone_lr_scale) == ("co2s-tiny-clip", "none", 1.0)
    mixed = TrainingOptions(clip_model="co2s-tiny-clip", dinov3_model="./mine")
    mixed.fill(mixed.defaults)
    assert (mixed.dinov3_model, mixed.crop_size, mixed.train_backbones) == ("./mine", 256, "attention")
    adaptation = AdaptationOptions(checkpoint="user/name")
    adaptation.fill(adaptation.defaults)
    assert (adaptation.clip_model, adaptation.dinov3_model) == (None, None)


@pytest.mark.parametrize(
    ("settings", "stability"),
    [({}, "paper"), ({"recipe": "released"}, "reference"), ({"recipe": "released", "stability_weight": 0}, "off")],
)
def test_the_stability_loss_follows_recipe_and_weight(settings, stability):
    assert TrainingOptions(**settings).stability == stability


def test_steps_follow_the_epoch():
    options = TrainingOptions(num_train_epochs=3, eval_epochs=2, from_scratch=True, recipe="paper")
    options.resolve_steps(10)
    assert (options.max_train_steps, options.eval_steps, options.supervised_warmup_steps) == (30, 20, 18)
    for names, warmup in ((SHIPPED_BACKBONES, 10), (("a", "b"), 0)):
        pretrained = TrainingOptions(clip_model=names[0], dinov3_model=names[1], recipe="paper", max_train_steps=30)
        pretrained.resolve_steps(10)
        assert pretrained.supervised_warmup_steps == warmup
    supervised = TrainingOptions(method="supervised", max_train_steps=5)
    supervised.resolve_steps(10)
    assert supervised.supervised_warmup_steps == 5
    with pytest.raises(ValueError, match="`supervised_warmup_steps` is 4 of 4 steps: no unlabelled image"):
        TrainingOptions(max_train_steps=4, supervised_warmup_steps=4).resolve_steps(10)


@pytest.mark.parametrize("name", sorted(BENCHMARKS))
def test_benchmarks_bring_their_protocol(name):
    benchmark, options, data = BENCHMARKS[name], TrainingOptions(), DataOptions(dataset=name)
    follow_protocol(options, data)
    assert data.partition == f"1_{benchmark.partitions[0]}" and options.num_train_epochs == benchmark.num_epochs
    assert (options.crop_size, options.base_size) == (benchmark.crop_size, benchmark.base_size)
    assert options.per_device_train_batch_size == benchmark.images_per_device
    assert options.eval_short_side == benchmark.eval_short_side
    shorter = TrainingOptions(max_train_steps=5, crop_size=64)
    follow_protocol(shorter, DataOptions(dataset=name))
    assert shorter.num_train_epochs is None and shorter.crop_size == 64


def test_all_labels_of_a_benchmark_go_with_supervised_training():
    message = r"`partition` is 'all' and `method` is 'co2s'. With all labels there are no unlabelled images"
    with pytest.raises(ValueError, match=message):
        follow_protocol(TrainingOptions(), DataOptions(dataset="gid", partition="all"))
    options, data = TrainingOptions(method="supervised"), DataOptions(dataset="gid", partition="all")
    follow_protocol(options, data)
    assert data.partition == "all" and options.num_train_epochs == BENCHMARKS["gid"].num_epochs


def test_an_adaptation_needs_its_base():
    with pytest.raises(ValueError, match="Name the model to adapt: `checkpoint='user/name'`"):
        AdaptationOptions()
    options = AdaptationOptions(checkpoint="user/name")
    options.fill(options.defaults)
    assert (options.method, options.max_train_steps, options.decoder_lr_scale) == ("supervised", 200, 0.1)
