"""Settings: what decides what a detector is, the recipes that set many at once, and the flags of both.

Owns `Config`: each setting's default, range, help and flag. The detector file, the saved state and the tables of
results read it: a new setting is one field. Reads no file, builds no network.
"""

import argparse
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch

from cutpaste import VARIANTS, ViewParams, sample_params
from density import DENSITIES
from localization import LOCATIONS
from model import BACKBONES, NORMALIZATIONS
from runtime import cache
from runtime.cli import Rule, anything, int_at_least, int_within, number, one_of, side, size, zero_or_one
from runtime.files import InputError

# Settings that flags override. "paper" is the default of each setting; "finetune" is the paper's way with pretrained
# weights, in fewer steps (docs/transfer.md); "fast" is for ten minutes on two cores (docs/recipe.md).
RECIPES = {
    "paper": {},
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
    """A setting as its flag takes it: 1 for True."""
    return int(value) if isinstance(value, bool) else value


RECIPE_HELP = "defaults of other flags; " + "; ".join(
    f"{recipe}: " + ", ".join(f"{name} {flag_value(value)}" for name, value in own.items())
    for recipe, own in RECIPES.items()
    if own
)
FEATURES = ("pool", "level", "all")
LEVELS = tuple(range(1, 1 + max(len(spec.stages) for spec in BACKBONES.values())))
INVISIBLE = ("keep", "drop")
LEARNING_RATES = {"sgd": 0.03, "adam": 0.001}  # sgd: the paper's
EACH_DIMS = 64  # dimensions of Gaussians for each location
FROZEN_SHARE = 5 / 37  # of the steps that the head trains alone on pretrained weights: 2,560 of 18,944 (A.4)


class SettingError(InputError):
    """A setting that cannot be. ``name`` is the field of Config, ``reason`` what is wrong; scripts add the flag."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)
        self.name, self.reason = name, reason

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


class UnknownSettingError(SettingError):
    """A setting that this version does not know: a newer one has written it."""


levels = Rule(
    tuple,
    f"stages of the network from {LEVELS[0]} to {LEVELS[-1]}, separated by commas",
    lambda value: value and list(value) == sorted(set(value)) and set(value) <= set(LEVELS),
    lambda text: tuple(map(int, text.split(","))),
)


# Settings ---------------------------------------------------------------------------------------------------------


def setting(default: object, rule: Rule, group: str, help: str, shown: str = "") -> object:
    """A field of a Config. default None: none, or derived from other settings; shown: what --help says of it then."""
    return field(default=default, metadata={"rule": rule, "group": group, "help": help, "shown": shown})


@dataclass(frozen=True)
class PatchConfig:
    """How a patch model is trained on crops and makes its maps."""

    patch_size: int = setting(64, side, "maps", "train a patch model on crops of that side, such as 64", "none")
    # Crops below 32 leave the last stage a single feature, whose gradient in bfloat16 oneDNN computes from memory that
    # nobody wrote: the loss is NaN in some runs
    window: int = setting(16, int_within(8, 4096), "maps", "side of the windows that are scored, in pixels")
    stride: int = setting(8, int_within(1, 4096), "maps", "pixels between windows")
    dense: bool = setting(True, zero_or_one, "maps", "run the network once per image; 0: on each window alone")
    location: str = setting("auto", one_of(LOCATIONS), "maps", "one Gaussian for all locations, or for each its own")
    dims: int | None = setting(
        None, int_within(1, 4096), "maps", "directions of most variance kept of embeddings", "64; all if shared"
    )
    sigma: float = setting(4.0, number(0.1, 1e3), "maps", "of the kernel that up-samples scores, in pixels")

    @property
    def most_dims(self) -> float:
        """``dims``, or what they are if not given: many Gaussians of all dimensions would make a file of gigabytes."""
        return self.dims or (math.inf if self.location == "shared" else EACH_DIMS)


@dataclass(frozen=True)
class Config:
    """Every setting that decides what a detector is. Raises SettingError for a value that cannot be."""

    category: str = setting("", anything, "", "")
    recipe: str = setting("paper", one_of(RECIPES), "recipe", RECIPE_HELP, "finetune; paper with --no-pretrained")
    backbone: str = setting("resnet18", one_of(BACKBONES), "network", "network that is trained")
    head_layer: int = setting(1, int_within(0, 64), "network", "layers of 512 in the projection head")
    height: int = setting(256, side, "", "")
    width: int = setting(256, side, "", "")
    normalize: str = setting(
        "image", one_of(NORMALIZATIONS), "network", "input normalization: each image's own statistics, or ImageNet's"
    )
    pretrained: bool = setting(
        True, zero_or_one, "network", "start from ImageNet weights; --no-pretrained: from scratch, as the paper does"
    )
    weights: str | None = setting(None, anything, "network", "file of ImageNet weights", "those that torchvision loads")
    variant: str = setting("3way", one_of(VARIANTS), "pretext task", "augmentation that normal images are told from")
    invisible: str = setting(
        "keep", one_of(INVISIBLE), "pretext task", "views that show no difference: learned as anomalous, or left out"
    )
    jitter: float = setting(0.1, number(0, 0.5), "pretext task", "color jitter of the whole image")
    patch_jitter: float = setting(0.1, number(0, 0.5), "pretext task", "color jitter of the patch")
    translate: float = setting(0.04, number(0, 0.5), "pretext task", "largest shift, as a fraction of the side")
    epochs: int = setting(10000, int_at_least(0), "training", "steps (parameter updates); 0: the network as it is")
    batch_size: int = setting(32, int_at_least(2), "training", "images read per step; each gives 2 or 3 views")
    minutes: float | None = setting(
        None, number(0.01, 1e6), "training", "as many steps as they allow, each category", "none"
    )
    optim: str = setting("sgd", one_of(LEARNING_RATES), "training", "optimizer")
    lr: float = setting(
        None, number(1e-9, 1e9), "training", "learning rate at the start", "0.03 for sgd, 0.001 for adam"
    )
    lr_unfrozen: float | None = setting(
        None, number(1e-9, 1e9), "training", "learning rate once the backbone is not frozen any more", "it goes on"
    )
    freeze_resnet: int | None = setting(
        None,
        int_at_least(0),
        "training",
        "first steps with the backbone frozen",
        "5 of 37 if pretrained, else 0",
    )
    freeze_bn: bool = setting(
        False, zero_or_one, "training", "the backbone's BatchNorm keeps its statistics and affine parameters"
    )
    folds: int = setting(
        1,
        int_at_least(1),
        "training",
        "networks of a detector, each trained without one fold of the images, their scores averaged",
    )
    holdout: float = setting(
        0.0,
        number(0, 0.9),
        "training",
        "share of the images that neither network nor density sees, so that the false-alarm rate holds",
    )
    ignore: str | None = setting(
        None,
        anything,
        "training",
        "mask of what does not count, such as a date stamp: all that is not black; or a folder of <category>.png",
        "none",
    )
    seed: int = setting(0, int_at_least(0), "training", "seed of everything random")
    features: str = setting(
        None,
        one_of(FEATURES),
        "density",
        "what is embedded: the last stage, those of --level, or all, a density for each",
        "level if --level is given or for patch models, else pool",
    )
    level: tuple[int, ...] | None = setting(
        None,
        levels,
        "density",
        "stages whose features are embedded, such as 1 or 1,2",
        "7 of EfficientNet, 4 of others; of patch models 1, pretrained those of strides 8 and 16",
    )
    density: str = setting("torch", one_of(DENSITIES), "density", "density of the embeddings")
    l2: bool = setting(None, zero_or_one, "density", "L2-normalize embeddings first", "1; 0 for patch models")
    false_alarm_rate: float = setting(
        0.01, number(0, 1), "density", "share of new normal images that may be called anomalous"
    )
    patches: PatchConfig | None = None  # None: an image-level model

    def __post_init__(self) -> None:
        self._check()
        derived = {
            "lr": LEARNING_RATES[self.optim],
            "features": "level" if self.patches or self.level else "pool",
            "l2": self.patches is None,  # the length of a patch's features says how much there is to see in it
        }
        for name, value in derived.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        self._choose_level()
        if self.patches is not None:
            self._check_patches()

    def _check(self) -> None:
        if self.weights is not None and not self.pretrained:
            raise SettingError("weights", "goes with pretrained weights, not with training from scratch")
        if self.holdout and self.folds > 1:
            raise SettingError("holdout", "not with folds, where a network that has not seen it judges each image")
        for part in (self, self.patches):
            for each in settings_of(type(part)) if part is not None else ():
                value, rule = getattr(part, each.name), each.metadata["rule"]
                if not (rule.holds(value) or (value is None and each.default is None)):
                    raise SettingError(each.name, f"{rule.words} is needed, not {value!r}")

    def _choose_level(self) -> None:
        """Stages are named under "level" alone: the others name their own."""
        spec = BACKBONES[self.backbone]
        if self.features != "level" and self.level is not None:
            raise SettingError("level", f"goes with features level, not {self.features}")
        if self.features == "level" and self.level is None:
            own = (spec.middle if self.pretrained else (1,)) if self.patches else (spec.level,)
            object.__setattr__(self, "level", own)
        if max(self.levels) > len(spec.stages):
            raise SettingError("level", f"{max(self.levels)}: {self.backbone} has {len(spec.stages)} stages")

    def _check_patches(self) -> None:
        patches, shown = self.patches, f"{self.width}x{self.height}"
        for name in ("patch_size", "window"):
            if (value := getattr(patches, name)) > min(self.height, self.width):
                raise SettingError(name, f"{value} is larger than the image, {shown}")
        for level in self.levels if patches.dense else ():
            unit = BACKBONES[self.backbone].strides[level - 1]
            for name in ("window", "stride"):
                if (value := getattr(patches, name)) > unit and value % unit:  # a smaller one becomes one feature
                    raise SettingError(name, f"{value}: a multiple of {unit} is needed for stage {level}")
        if not DENSITIES[self.density].several:
            raise SettingError("density", f"{self.density} is no density for the windows of a patch model")

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) of the images."""
        return self.height, self.width

    @property
    def dense(self) -> bool:
        """True if the network runs on whole images when it scores, False if on each window alone."""
        return self.patches is None or self.patches.dense

    @property
    def levels(self) -> tuple[int, ...]:
        """The stages that are embedded."""
        every = BACKBONES[self.backbone].levels
        return {"pool": every[-1:], "level": self.level, "all": every}[self.features]

    @property
    def frozen_steps(self) -> int:
        """The first steps, in which the head trains alone."""
        if self.freeze_resnet is not None:
            return self.freeze_resnet
        return int(self.epochs * FROZEN_SHARE) if self.pretrained else 0

    @property
    def has_gradient(self) -> bool:
        """Whether a score has a gradient, which Grad-CAM needs."""
        return DENSITIES[self.density].has_gradient

    def sample_params(self, count: int, generator: torch.Generator) -> ViewParams:
        """Draw the parameters of the views of ``count`` images, see cutpaste.make_params."""
        patch_size = self.patches.patch_size if self.patches else None
        amounts = {"translate": self.translate, "jitter": self.jitter, "patch_jitter": self.patch_jitter}
        return sample_params(self.variant, count, self.height, self.width, generator, **amounts, patch_size=patch_size)

    def to_dict(self) -> dict:
        """Plain values by the names of fields, those of PatchConfig beside the others, None of an image-level model."""
        values = {each.name: getattr(self, each.name) for each in settings_of(Config)}
        values |= {each.name: self.patches and getattr(self.patches, each.name) for each in settings_of(PatchConfig)}
        if self.level:
            values["level"] = ",".join(map(str, self.level))
        return values

    @classmethod
    def from_dict(cls, values: dict) -> "Config":
        """The Config that ``to_dict`` gave, also by an earlier version: a setting it did not know has its default."""
        known = {each.name for part in (Config, PatchConfig) for each in settings_of(part)}
        for name in values:
            if name not in known:
                raise UnknownSettingError(str(name), "no setting of this version")
        given = {name: value for name, value in values.items() if value is not None}
        if isinstance(given.get("level"), int | str):  # version 2 of the detector file had one level
            try:
                given["level"] = levels(str(given["level"]))
            except argparse.ArgumentTypeError as error:
                raise SettingError("level", str(error)) from error
        patches = {each.name: given.pop(each.name) for each in settings_of(PatchConfig) if each.name in given}
        return cls(**given, patches=PatchConfig(**patches) if "patch_size" in patches else None)


def settings_of(part: type) -> list:
    """The fields of Config or PatchConfig that are settings."""
    return [each for each in fields(part) if each.metadata]


def resume(asked: dict, saved: dict) -> dict:
    """The settings that a saved run goes on with. asked: those that were asked for, by name.

    The one rule of resuming: what was asked for must be what is saved. Raises SettingError for the first difference.
    """
    for name, value in asked.items():
        if name in saved and saved[name] != value:
            was, now = flag_value(saved[name]), flag_value(value)
            raise SettingError(name, f"made with {name} {was}, now {now}")
    return {**asked, **saved}


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
    """What is wrong with a setting, after the flag that sets it."""
    return f"--{'size' if error.name in ('height', 'width') else error.name}: {error.reason}"


# Flags ------------------------------------------------------------------------------------------------------------


def add_data_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("data").add_argument
    add("--data_dir", default="Data", metavar="DIR", help="folder of the categories (default: Data)")
    add("--type", type=categories, default=["all"], metavar="NAMES", help=f"{categories.words} (default: all)")
    add("--model_dir", default="models", metavar="DIR", help="folder of the detectors (default: models)")
    add = parser.add_argument_group("machine").add_argument
    add("--cuda", type=zero_or_one, default=False, metavar="0|1", help="use the GPU (default: 0)")
    add(
        "--workers",
        type=int_at_least(0),
        default=min(8, os.cpu_count() or 1),
        metavar="N",
        help="threads that decode images (default: one per core, 8 at most)",
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
        help="decoded images held in memory; larger folders are read from disk as needed (default: 4)",
    )


METAVARS = {int: "N", float: "X", bool: "0|1", tuple: "N[,N]"}


def add_config_flags(parser: argparse.ArgumentParser) -> None:
    """A flag for each setting. Each is None unless given: what is not given is the recipe's."""
    groups = {}
    for part in (Config, PatchConfig):
        for each in settings_of(part):
            _add_flag(parser, groups, each)
    size_help = "image size, a side or WIDTHxHEIGHT, in pixels (default: 256)"
    groups["network"].add_argument("--size", type=size, metavar="S|WxH", help=size_help)


def add_given_flags(parser: argparse.ArgumentParser, names: Iterable[str], title: str, note: str) -> None:
    """Flags for some settings of a detector that is there already; each is None unless given."""
    known = {each.name: each for part in (Config, PatchConfig) for each in settings_of(part)}
    group = parser.add_argument_group(title, note)
    for name in names:
        if name == "size":
            group.add_argument("--size", type=size, metavar="S|WxH", help="image size, a side or WIDTHxHEIGHT")
        else:
            _add_flag(parser, {known[name].metadata["group"]: group}, known[name], note=False)


def _add_flag(parser: argparse.ArgumentParser, groups: dict, each, note: bool = True) -> None:
    rule, title, help = (each.metadata[key] for key in ("rule", "group", "help"))
    if not title:
        return
    group = groups[title] = groups.get(title) or parser.add_argument_group(title)
    shown = each.metadata["shown"] or each.default
    text = f"{help} (default: {int(shown) if isinstance(shown, bool) else shown})" if note else help
    if each.name == "pretrained":
        group.add_argument("--pretrained", action=argparse.BooleanOptionalAction, help=help)
        return
    if each.name == "seed":
        note = "; several, such as 0,1,2: a detector for each"
        group.add_argument("--seed", type=seeds, metavar="N[,N]", help=text + note)
        return
    metavar = "|".join(rule.choices) or METAVARS.get(rule.kind, "FILE")
    group.add_argument(f"--{each.name}", type=rule, metavar=metavar, help=text)


def config_of(args: argparse.Namespace, category: str) -> Config:
    """The Config that the flags of ``add_config_flags`` come to. Raises SettingError."""
    given = given_settings(args)
    if "minutes" in given and "epochs" in given:
        raise SettingError("minutes", "sets the number of steps; leave --epochs out")
    recipe = given.setdefault("recipe", "finetune" if given.get("pretrained", Config.pretrained) else "paper")
    values = RECIPES[recipe] | given | {"category": category}
    patches = {name: values.pop(name) for name in PATCH_SETTINGS if name in values}
    if patches and "patch_size" not in patches:
        raise SettingError(next(iter(patches)), "goes with --patch_size, which makes a patch model")
    return Config(**values, patches=PatchConfig(**patches) if patches else None)


PATCH_SETTINGS = tuple(each.name for each in settings_of(PatchConfig))


def given_settings(args: argparse.Namespace) -> dict:
    """The settings among ``args`` that are not None, by the names of Config's fields; --size as height and width."""
    names = [each.name for part in (Config, PatchConfig) for each in settings_of(part)]
    given = {name: value for name in names if (value := getattr(args, name, None)) is not None}
    if "level" in given:
        given.setdefault("features", "level")
    elif given.get("features", "level") != "level":
        given["level"] = None  # instead of that of a detector which is evaluated anew
    if "seed" in given:
        given["seed"] = given["seed"][0]  # of several the first stands for them
    if getattr(args, "size", None) is not None:
        given["height"], given["width"] = args.size
    return given


def storage(args: argparse.Namespace) -> cache.Storage:
    """Where decoded images live, by ``--cache_dir`` and ``--memory_gb``."""
    if args.cache_dir is None:
        folder = cache.default_folder()
    else:
        folder = None if args.cache_dir == "none" else Path(args.cache_dir)
    return cache.Storage(folder, args.memory_gb * 1e9)
