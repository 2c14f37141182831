"""Flags of the scripts.

Owns a flag for each setting of config.py, the data flags that scripts share, and how flags become a Config. Reads no
file, builds no network.
"""

import argparse
import os
from collections.abc import Iterable
from pathlib import Path

from config import RECIPES, Config, PatchConfig, SettingError, settings_of
from runtime import cache
from runtime.flags import Rule, int_at_least, number, size, zero_or_one

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


def flagged(error: SettingError) -> str:
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
