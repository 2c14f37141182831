"""Types of flags and the parser that scripts share.

Owns `Rule`: what a value may be, as a type of argparse and as a check of a value that is there already; and the rules
for numbers, names and sizes of images.
"""

import argparse
from collections.abc import Callable, Collection
from dataclasses import dataclass

LARGEST_SIDE = 4096  # of images, in pixels


@dataclass(frozen=True, eq=False)  # argparse needs a hash
class Rule:
    """What a setting may be. Called with a flag's text, as argparse does, it gives the value."""

    kind: type
    words: str  # "a whole number, at least 2"
    allows: Callable[..., bool] = lambda value: True
    parse: Callable[[str], object] | None = None  # text -> value; default: kind
    choices: Collection[str] = ()  # all that it may be, if they are a few names

    def __call__(self, text: str) -> object:
        try:
            value = (self.parse or self.kind)(text)
        except (ValueError, KeyError):
            value = None
        if not self.holds(value):
            raise argparse.ArgumentTypeError(f"{text!r}: {self.words}")
        return value

    def holds(self, value: object) -> bool:
        kinds = (int, float) if self.kind is float else (self.kind,)
        return type(value) in kinds and self.allows(value)


def int_within(least: int, most: int) -> Rule:
    return Rule(int, f"a whole number from {least} to {most}", lambda value: least <= value <= most)


def int_at_least(least: int) -> Rule:
    return Rule(int, f"a whole number, at least {least}", lambda value: least <= value < 2**63)


def number(least: float, most: float) -> Rule:
    return Rule(float, f"a number from {least:g} to {most:g}", lambda value: least <= value <= most)


def one_of(choices: Collection[str]) -> Rule:
    """One of the names in a table, which may grow."""
    return Rule(str, f"one of {', '.join(choices)}", lambda value: value in choices, choices=choices)


zero_or_one = Rule(bool, "0 or 1", parse={"0": False, "1": True}.__getitem__)
anything = Rule(str, "text")
html_file = Rule(str, "the name of an .html file", lambda value: value.lower().endswith((".html", ".htm")))


def _parse_size(text: str) -> tuple[int, int]:
    """'256' -> (256, 256); '256x192' (width x height, as pictures are named) -> (H, W) = (192, 256)."""
    width, *height = text.lower().split("x")
    return int(*(height or [width])), int(width)


side = int_within(32, LARGEST_SIDE)
size = Rule(
    tuple,
    f"a side such as 256, or WIDTHxHEIGHT such as 256x192, each in 32..{LARGEST_SIDE} pixels",
    lambda value: all(map(side.holds, value)),
    _parse_size,
)


def new_parser(description: str, epilog: str | None = None) -> argparse.ArgumentParser:
    """A parser that takes no shortened flags (``--epoch`` for ``--epochs`` hides a mistake) and keeps line breaks."""
    kind = argparse.RawDescriptionHelpFormatter
    formatter = lambda prog: kind(prog, max_help_position=30, width=100)  # noqa: E731
    return argparse.ArgumentParser(
        description=description, epilog=epilog, allow_abbrev=False, formatter_class=formatter
    )
