"""Config: defaults, ranges, plain values and back, flags; the one rule of resuming."""

from dataclasses import fields, replace

import pytest

import run_training
from config import RECIPES, SETTINGS, Config, PatchConfig, SettingError, config_of, refitted, resume, with_flag

PATCHES = Config("brick", patches=PatchConfig(), level=(1, 2))
ALL = tuple(range(1, 9))


def parsed(*flags):
    return config_of(run_training.get_parser().parse_args([*map(str, flags)]), "bottle")


def test_defaults_from_scratch_are_the_papers():
    config = parsed("--recipe", "paper")
    assert config == Config("bottle")
    assert parsed("--no-pretrained") == replace(config, pretrained=False)
    assert (config.lr, config.optim, config.epochs, config.batch_size) == (0.03, "sgd", 10000, 32)
    assert (config.size, config.variant, config.pretrained) == ((256, 256), "3way", True)
    assert (config.frozen_steps, config.l2, config.patches, config.levels) == (1351, True, None, (4,))
    assert parsed("--no-pretrained").frozen_steps == 0
    assert parsed("--optim", "adam", "--no-pretrained").lr == 0.001
    patches = parsed("--patch_size", 64, "--level", "2,3", "--stride", 16)
    assert patches.patches == PatchConfig(64, window=24, stride=16)
    assert (patches.l2, patches.levels) == (False, (2, 3))


def test_a_recipe_sets_what_no_flag_sets():
    for name, values in RECIPES.items():
        config = parsed("--recipe", name)
        assert config.to_dict() | values == config.to_dict()
    fast = parsed("--recipe", "fast", "--no-pretrained")
    assert (fast.recipe, fast.variant, fast.invisible, fast.optim, fast.lr) == ("fast", "soft", "drop", "adam", 0.001)
    assert (fast.patches, fast.epochs, fast.batch_size) == (PatchConfig(48), 1500, 28)
    assert (fast.density, fast.join, fast.normalize) == ("torch", False, "image")

    flags = ["--variant", "scar", "--level", "1,2", "--epochs", 7, "--window", 32]
    changed = replace(fast, variant="scar", epochs=7, level=(1, 2), patches=PatchConfig(48, window=32))
    assert parsed("--recipe", "fast", "--no-pretrained", *flags) == changed


def test_pretrained_patch_models_see_their_stages_together():
    """Unless the recipe is the paper's, or each window goes through the network alone."""
    made = parsed("--patch_size", 64)
    assert (made.density, made.join, made.normalize, made.patches.window) == ("both", True, "imagenet", 24)
    assert parsed("--patch_size", 64, "--backbone", "efficientnet_lite0").normalize == "half"  # as its weights
    assert not parsed("--recipe", "paper", "--patch_size", 64).join
    assert not parsed("--patch_size", 64, "--dense", 0).join
    assert parsed("--patch_size", 64, "--join", 0).patches.window == 16
    assert parsed("--patch_size", 64, "--no-pretrained", "--join", 1).patches.window == 16
    assert parsed("--patch_size", 64, "--window", 32).patches.window == 32
    assert parsed("--patch_size", 64, "--density", "nearest", "--normalize", "image").density == "nearest"


def test_stages_apart_have_windows_that_fit_them():
    together = parsed("--patch_size", 64)
    assert refitted(together, {"join": False}).patches.window == 16
    assert refitted(together, {"density": "torch"}).patches.window == 24
    assert not refitted(together, {"dense": False}).join
    assert refitted(replace(together, density="torch"), {"join": False, "window": 32}).patches.window == 32
    chosen = parsed("--patch_size", 64, "--window", 48)
    assert refitted(chosen, {"join": False}).patches.window == 48  # not by default: it stays
    with pytest.raises(SettingError, match="no patch model"):
        refitted(parsed(), {"sigma": 3.0})


@pytest.mark.parametrize(
    ("flags", "recipe", "epochs"),
    [
        ([], "finetune", 185),
        (["--epochs", 7], "finetune", 7),
        (["--epochs", 0], "frozen", 0),
        (["--patch_size", 64], "frozen", 0),
        (["--patch_size", 64, "--epochs", 185], "finetune", 185),
        (["--patch_size", 64, "--minutes", 2], "finetune", 185),
        (["--patch_size", 64, "--recipe", "finetune"], "finetune", 185),
        (["--patch_size", 64, "--no-pretrained"], "paper", 10_000),
        (["--epochs", 0, "--no-pretrained"], "paper", 0),
    ],
)
def test_pretrained_patch_models_are_not_trained_unless_it_is_asked_for(flags, recipe, epochs):
    config = parsed(*flags)
    assert (config.recipe, config.epochs) == (recipe, epochs)


def test_pretrained_weights_are_fine_tuned():
    """By the paper's recipe of its appendix A.4, in fewer steps."""
    config = parsed()
    assert config == parsed("--recipe", "finetune")
    assert (config.recipe, config.pretrained, config.freeze_bn, config.batch_size) == ("finetune", True, True, 24)
    assert parsed("--epochs", 18_944).frozen_steps == 2560
    assert parsed("--freeze_resnet", 7).frozen_steps == 7


@pytest.mark.parametrize(
    ("flags", "levels"),
    [
        ([], (8,)),
        (["--features", "pool"], (8,)),
        (["--features", "level"], (7,)),
        (["--features", "all"], ALL),
        (["--level", "2,7"], (2, 7)),
        (["--patch_size", "64", "--window", "32", "--join", "0"], (3, 5)),
        (["--patch_size", "64"], (2, 3, 5)),
        (["--patch_size", "64", "--no-pretrained"], (1,)),
        (["--patch_size", "64", "--features", "all"], ALL),
    ],
)
def test_features_name_stages(flags, levels):
    config = parsed("--backbone", "efficientnet_b4", *flags)
    assert config.levels == levels
    assert Config.from_dict(config.to_dict()) == config


def test_every_setting_has_a_flag_and_a_place_in_the_plain_values():
    assert set(SETTINGS) <= set(vars(run_training.get_parser().parse_args([]))) | {"category", "height", "width"}
    assert list(PATCHES.to_dict()) == list(SETTINGS)
    assert len(SETTINGS) == len(fields(Config)) - 1 + len(fields(PatchConfig))


@pytest.mark.parametrize(
    "config", [Config("brick"), PATCHES, replace(PATCHES, seed=7, weights="w.pth", lr=1), Config("b", l2=False)]
)
def test_plain_values_and_back(config):
    values = config.to_dict()
    assert Config.from_dict(values) == config
    assert all(value is None or type(value) in (str, int, float, bool) for value in values.values())
    older = {name: value for name, value in values.items() if name not in ("translate", "dims")}
    assert Config.from_dict(older) == config
    if config.patches:
        assert Config.from_dict(values | {"level": 2}).levels == (2,)  # as version 2 of the detector file has it


def test_flags_are_read():
    assert parsed("--size", "320x256").size == (256, 320)
    assert parsed("--minutes", 10).minutes == 10


# Refusals ---------------------------------------------------------------------------------------------------------

WRONG_VALUES = {
    "backbone": ["vgg"],
    "head_layer": [10_000_000, True],
    "height": [16],
    "jitter": [float("nan")],
    "epochs": [-1, 2.5],
    "folds": [0],
    "l2": [1],
    "seed": [-1],
    "category": [3],
    "false_alarm_rate": [1.5],
    "unheard_of": [1],
    "window": [512],
    "stride": [6],
    "level": ["5", "2,1"],
    "density": ["kde"],
    "location": ["all"],
    "patch_size": [300, 16],
    "dims": [0],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in WRONG_VALUES.items() for value in values]
)
def test_values_that_cannot_be_are_named(name, value):
    with pytest.raises(SettingError) as caught:
        Config.from_dict(PATCHES.to_dict() | {name: value})
    assert caught.value.name == name
    assert with_flag(caught.value).startswith("--size: " if name == "height" else f"--{name}: ")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--features", "all", "--level", 2], "level: goes with features level"),
        (["--minutes", 10, "--epochs", 5], "minutes: .*leave --epochs out"),
        (["--sigma", 3], "sigma: goes with --patch_size"),
        (["--no-pretrained", "--weights", "w.pth"], "weights: goes with pretrained weights"),
        (["--folds", 2, "--holdout", 0.2], "holdout: not with folds"),
        (
            ["--patch_size", 64, "--join", 0, "--stride", 12, "--level", 2],
            "stride: 12 must be a multiple of 8 for stage 2",
        ),
        (["--patch_size", 64, "--join", 0, "--window", 30], "window: 30 must be a multiple of 8 for stage 2"),
        (["--patch_size", 64, "--stride", 12], "stride: 12 must divide 8, or be a multiple of it"),
        (["--patch_size", 64, "--join", 1, "--dense", 0], "join: goes with --dense 1"),
        (["--patch_size", 64, "--density", "kde"], "density: kde cannot be fitted"),
        (["--patch_size", 300], "patch_size: 300 is larger than the image, 256x256"),
    ],
)
def test_flags_that_contradict_each_other(flags, message):
    with pytest.raises(SettingError, match=f"^{message}"):
        parsed(*flags)


@pytest.mark.parametrize(
    "flags", ["--size axb", "--size 8", "--size 256x", "--level 0", "--level 1,x", "--jitter nan", "--l2 yes"]
)
def test_texts_that_are_no_value(flags, capsys):
    name, text = flags.split()
    with pytest.raises(SystemExit) as stop:
        run_training.get_parser().parse_args([name, text])
    assert stop.value.code == 2
    assert f"argument {name}: {text!r}: " in capsys.readouterr().err


def test_what_is_resumed_is_what_was_asked_for():
    assert resume({"a": 1}, {"a": 1, "b": 2}) == {"a": 1, "b": 2}
    assert resume({"a": 1}, {}) == {"a": 1}
    with pytest.raises(SettingError, match="b: made with b 2, now 3"):
        resume({"a": 1, "b": 3}, {"a": 1, "b": 2})


def test_a_forgotten_flag_is_named_before_what_follows_from_it():
    def settings(*flags):
        return config_of(run_training.get_parser().parse_args(flags), "lid").to_dict()

    made = ("--backbone", "mobilenet_v2", "--patch_size", "64")
    fast = ("--recipe", "fast", "--no-pretrained")
    for saved, asked, words in (
        (made, made[:2], "made with patch_size 64, now None"),
        (made, (*made[:2], "--epochs", "0"), "made with patch_size 64, now None"),
        (made, made[2:], "made with backbone mobilenet_v2, now resnet18"),
        (made, (*made, "--no-pretrained"), "made with pretrained 1, now 0"),
        (made, (*made, "--recipe", "finetune"), "made with recipe frozen, now finetune"),
        (fast, fast[2:], "made with recipe fast, now paper"),
        (fast, fast[:2], "made with pretrained 0, now 1"),
    ):
        with pytest.raises(SettingError, match=words):
            resume(settings(*asked), settings(*saved))
