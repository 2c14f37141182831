"""Why is this part called anomalous? A panel for each: the photograph, its heat, the normal image nearest to it.

Owns how a panel looks.
"""

import math
from collections.abc import Callable, Sequence
from concurrent.futures import Executor

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from detector import BatchPrediction, Detector
from normals import Normals, compared
from reporting import overlays
from runtime.files import InputError, say, write_file
from runtime.image_files import read_size

# Of a panel, in pixels: what a picture fits into (width, height), also where wide ones are stacked; between pictures
UPRIGHT, WIDE, GAP = (360, 420), (600, 400), 16
STACKED_FROM = 1.5  # width / height
LEAST_COLUMN = 240  # titles need it
LEAST_CROP, MARGIN = 0.25, 1.25  # of the image's sides; around the region
GROUND, TEXT, DIM = "#F2F2F2", "#222222", "#666666"


# The panel --------------------------------------------------------------------------------------------------------


class Explainer:
    """Draws a panel of each image that is called anomalous, as it is scored: a follower of a scoring.Scorer.

    target: the file for an image by its path; where it raises InputError, a message says so and nothing is drawn.
    pool: draws several at once.
    """

    needs_features = True

    def __init__(self, detector: Detector, normals: Normals, target: Callable[[str], str], pool: Executor) -> None:
        self.detector, self.normals, self.target, self.pool = detector, normals, target, pool
        self.has_maps = detector.config.patches is not None
        self.threshold, self.rate = detector.threshold.item(), detector.guarantee.rate

    @torch.inference_mode()
    def on_batch(self, paths: Sequence[str], pixels: Tensor, prediction: BatchPrediction) -> None:
        """Images by path, (B, 3, H, W) uint8 on the detector's device, and what the detector says of them."""
        chosen = (prediction.p_values <= self.rate).nonzero()[:, 0]
        if not len(chosen):
            return
        has_heat = self.has_maps or self.detector.config.has_gradient
        maps = self.detector.heat(prediction, chosen) if has_heat else None
        features = prediction.features[0][self.detector.comparison_level][chosen]
        list(
            self.pool.map(
                self.draw,
                [paths[i] for i in chosen.tolist()],
                pixels[chosen].permute(0, 2, 3, 1).cpu().numpy(),
                prediction.scores[chosen].tolist(),
                prediction.p_values[chosen].tolist(),
                [None] * len(chosen) if maps is None else maps.cpu().numpy(),
                self.normals.nearest(compared(features)),
            )
        )

    def on_end(self) -> None:
        """Nothing is left to do."""

    def draw(self, path: str, pixels: np.ndarray, score: float, p: float, heat: np.ndarray | None, near: int) -> None:
        """Write the panel of an image (h, w, 3) with a map (h, w), next to the normal image of a number."""
        try:
            target, size = self.target(path), read_size(path)
        except InputError as error:
            say(f"no panel: {' '.join(str(error).splitlines())}")
            return
        if heat is not None and not self.has_maps:
            heat = overlays.as_score(heat, score) if heat.max() > 0 else None
        lines = [
            f"{self.detector.config.category}: {path}",
            f"score {score:.3g}, p-value {p:.2g} (anomalous up to {self.rate:.2g})",
        ]
        pictures = [("photograph", pixels), (f"nearest normal: {self.normals.names[near]}", self.normals.image(near))]
        picture = panel(lines, pictures, size, heat, self.threshold, self.has_maps)
        write_file(overlays.encoded(picture, target), target)


def crop(heat: np.ndarray, threshold: float) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of what is enlarged of a map (h, w) and its image, in their shape: the strongest region,
    of a strong one the part above half of the maximum, with a margin; what is around the maximum where nothing is above
    the threshold."""
    level = max(threshold, heat.max().item() / 2)  # else a strong defect is all of the image
    (y, x), (height, width) = np.unravel_index(heat.argmax(), heat.shape), heat.shape
    left, top, across, down = overlays.region(heat, level, heat.shape) or (int(x), int(y), 1, 1)
    share = min(1, max(LEAST_CROP, MARGIN * across / width, MARGIN * down / height))
    w, h = math.ceil(share * width), math.ceil(share * height)
    left = min(max(0, left + (across - w) // 2), width - w)
    top = min(max(0, top + (down - h) // 2), height - h)
    return left, top, left + w, top + h


def panel(
    lines: Sequence[str],
    pictures: Sequence[tuple[str, np.ndarray]],
    size: tuple[int, int],
    heat: np.ndarray | None,
    threshold: float,
    outlined: bool,
) -> Image.Image:
    """Pictures with titles, (h, w, 3) uint8, and the first under its heat (h, w), if there is one: whole, and what
    ``crop`` tells of each, enlarged. All have the shape of the photograph, of ``size`` (H, W); those of wide ones are
    below each other. lines: text above them."""
    limits = WIDE if size[1] > STACKED_FROM * size[0] else UPRIGHT
    scale = min(limits[0] / size[1], limits[1] / size[0])
    cell = (max(1, round(scale * size[1])), max(1, round(scale * size[0])))
    whole = (0, 0, *pictures[0][1].shape[1::-1])
    rows = [[(title, cut(pixels, cell, whole)) for title, pixels in pictures]]
    if heat is not None:
        box = crop(heat, threshold)
        zoom = whole[2] / (box[2] - box[0])
        rows.append([(f"enlarged {zoom:.1f} times", cut(pixels, cell, box)) for _, pixels in pictures])
        for row, part, title in zip(rows, (whole, box), ("heat map", "")):
            own = np.asarray(Image.fromarray(heat).resize(cell, Image.Resampling.BILINEAR, part))
            row.append((title, overlays.overlay(np.asarray(row[0][1]), own, threshold, outlined)))
        for _, picture in rows[0]:
            frame(picture, box, whole)
    return arranged(lines, list(zip(*rows)) if limits is WIDE else rows, cell)


def cut(pixels: np.ndarray, cell: tuple[int, int], box: tuple[int, int, int, int]) -> Image.Image:
    """A box of an image (h, w, 3) uint8 at the size of a cell (width, height)."""
    return Image.fromarray(pixels).resize(cell, Image.Resampling.BICUBIC, box)


def frame(picture: Image.Image, box: tuple[int, int, int, int], whole: tuple[int, int, int, int]) -> None:
    """Draw where a box of an image is on a picture of the whole of it: white within black, for any ground."""
    left, top, right, bottom = (
        round(value * side / own) for value, side, own in zip(box, picture.size * 2, whole[2:] * 2)
    )
    draw = ImageDraw.Draw(picture)
    draw.rectangle((left, top, right - 1, bottom - 1), outline="black", width=3)
    draw.rectangle((left + 1, top + 1, right - 2, bottom - 2), outline="white", width=1)


def arranged(lines: Sequence[str], rows: Sequence[Sequence[tuple[str, Image.Image]]], cell: tuple[int, int]):
    """Rows of pictures of a size, each below its title, under lines of text."""
    large, small = ImageFont.load_default(18), ImageFont.load_default(14)
    column, row, head = max(cell[0], LEAST_COLUMN) + GAP, cell[1] + 22 + GAP, 28 * len(lines) + 2 * GAP
    canvas = Image.new("RGB", (GAP + column * len(rows[0]), head + row * len(rows)), GROUND)
    draw = ImageDraw.Draw(canvas)
    for number, line in enumerate(lines):
        draw.text((GAP, GAP + 26 * number), fitted(line, large, canvas.width - 2 * GAP), TEXT, large)
    for y, pictures in enumerate(rows):
        for x, (title, picture) in enumerate(pictures):
            place = (GAP + column * x, head + row * y)
            draw.text(place, fitted(title, small, column - GAP), DIM, small)
            canvas.paste(picture, (place[0], place[1] + 22))
    return canvas


def fitted(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """A text in one line of at most so many pixels, without its middle if it is longer. What cannot be printed, such
    as bytes that are no UTF-8, becomes a question mark."""
    text = "".join(letter if letter.isprintable() else "?" for letter in text)
    shown, kept = text, len(text)
    while kept > 2 and font.getlength(shown) > width:
        kept -= 1
        shown = f"{text[: kept // 2]}...{text[len(text) - (kept - kept // 2) :]}"
    return shown
