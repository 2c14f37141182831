"""The files that are drawn of images: heat maps, masks and panels, how they are named, and that they harm no other."""

import os
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

import overlays
from dataset import decode
from listing import relative
from runtime.files import InputError, check_replaceable, write_file


class Drawings:
    """Heat maps, masks and panels of images, each in a folder, None: not drawn. Each file is of one image: no two share
    a name, and none replaces an image, nor a file that this program has not drawn. It is true if there are heat maps or
    masks, which every image has."""

    def __init__(self, heatmaps: str | None, masks: str | None, panels: str | None = None) -> None:
        self.heatmaps, self.masks, self.panels = heatmaps, masks, panels
        self.folders = [folder for folder in (heatmaps, masks, panels) if folder]
        self.owners: dict[str, tuple[str, str]] = {}  # of a file: the image, and the folder of results
        self.real = lru_cache(1024)(os.path.realpath)  # of folders

    def __bool__(self) -> bool:
        return bool(self.heatmaps or self.masks)

    def draw(self, path: str, folders: Sequence[str], heat: np.ndarray, threshold: float, outlined: bool) -> None:
        """Write what is asked for of an image with a map (h, w). folders: those it is named from. outlined: with a line
        around what is above the threshold. Raises InputError if it cannot be drawn."""
        self.keep(path)  # it may have come later
        targets = self.name(path, folders)
        pixels = decode(path)
        heat = overlays.enlarged(heat, pixels.shape[:2])
        if self.heatmaps:
            picture = overlays.overlay(pixels, heat, threshold, outlined)
            write_file(overlays.encoded(picture, targets[0]), targets[0])
        if self.masks:
            write_file(overlays.encoded(overlays.mask(heat, threshold), targets[-1]), targets[-1])

    def name(self, path: str, folders: Sequence[str]) -> list[str]:
        """The files that are drawn of an image, of which none may be in the way of another; see ``add``."""
        kinds = [(folder, suffix) for folder, suffix in ((self.heatmaps, None), (self.masks, ".png")) if folder]
        return [self.add(folder, relative(path, folders), path, suffix) for folder, suffix in kinds]

    def panel(self, path: str, folders: Sequence[str]) -> str:
        """The file of an image's panel. Raises InputError as ``add`` does."""
        self.keep(path)
        return self.add(self.panels, relative(path, folders), path, ".png")

    def place(self, path: str) -> str:
        return os.path.join(self.real(os.path.dirname(path)), os.path.basename(path))

    def keep(self, path: str) -> None:
        """Let nothing be drawn over an image, nor over the file that a link to it leads to."""
        self.owners[self.place(path)] = (path, "")
        if os.path.islink(path):
            self.owners[os.path.realpath(path)] = (path, "")

    def add(self, folder: str, below: str, path: str, suffix: str | None = None) -> str:
        """The file for an image that is called ``below``; without a ``suffix`` a JPEG for a JPEG, else a PNG. Raises
        InputError if another image has that name, or the other drawing of this one, or if something is there that this
        program has not drawn."""
        stem, own = os.path.splitext(below)
        target = os.path.join(folder, stem + (suffix or (own if own.lower() in (".jpg", ".jpeg") else ".png")))
        owner = self.owners.setdefault(self.place(target), (path, folder))
        if owner != (path, folder):
            found = f"{target} would be drawn of it, but that name is taken by {owner[0]}"
            raise InputError(f"{path}: {found}; rename one, or take another folder")
        check_replaceable(target, f"draw {path} in another folder")
        return target
