"""Show why an image is called anomalous: a panel of the photograph, its heat, and the normal image nearest to it.

Owns how a panel looks. Works on arrays; imports no torch.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from normals import Normals
from prediction.scorer import BatchScores, Model
from reporting import overlays
from reporting.overlays import crop, rescaled
from runtime.files import InputError, say, shown, write_file

# Of a panel, in pixels: what a picture fits into (width, height), also where wide ones are stacked; between pictures
UPRIGHT, WIDE, GAP = (360, 420), (600, 400), 16
STACKED_FROM = 1.5  # width / height
NARROWEST_COLUMN = 240  # titles need it
GROUND, TEXT, DIM = "#F2F2F2", "#222222", "#666666"


# The panel --------------------------------------------------------------------------------------------------------


class Comparison(NamedTuple):
    """Hold what an image is compared with: a normal image, by number, and how many pixels down and right of the
    strongest part of its map the like of it lies there."""

    number: int
    title: str
    shift: tuple[int, int] = (0, 0)


class Explainer:
    """Draw a panel of each image that is called anomalous. ``on_batch`` is a callback of a Scorer.

    model: says what normal images are compared by, see BatchScores. normals: those beside it. target: path of an image
    -> the file of its panel; where it raises InputError, a message says so and nothing is drawn. pool: draws several at
    once. remove: called with the path of each image that is not anomalous.
    """

    def __init__(
        self,
        model: Model,
        normals: Normals,
        target: Callable[[str], str],
        pool: Executor,
        remove: Callable[[str], object] = lambda path: None,
    ) -> None:
        self.model, self.normals, self.target, self.pool, self.remove = model, normals, target, pool, remove

    def on_batch(
        self,
        paths: Sequence[str],
        sizes: Sequence[tuple[int, int]],
        pixels: np.ndarray,
        prediction: BatchScores,
    ) -> None:
        """Draw the anomalous ones of a batch; see ``scorer.Callback``."""
        rate = self.model.guarantee.rate
        anomalous = np.flatnonzero(prediction.p_values <= rate)
        for index in np.flatnonzero(prediction.p_values > rate).tolist():
            self.remove(paths[index])
        if not len(anomalous):
            return
        heats = self.model.heat(prediction, anomalous) if self.model.heat else [None] * len(anomalous)
        arguments = (
            [paths[i] for i in anomalous.tolist()],
            [sizes[i] for i in anomalous.tolist()],
            pixels[anomalous],
            prediction.scores[anomalous].tolist(),
            prediction.p_values[anomalous].tolist(),
            heats,
            self.compare(prediction, anomalous),
        )
        list(self.pool.map(self.draw, *arguments))  # which waits for all of them

    def compare(self, prediction: BatchScores, anomalous: np.ndarray) -> list[Comparison]:
        """Return what each image is compared with: the normal window nearest to the one where its map is highest, if
        the density knows it and its image is kept; else the nearest of the normal images."""
        nearest = self.normals.nearest(prediction.compared[anomalous])
        comparisons = [Comparison(number, f"nearest normal: {self.normals.names[number]}") for number in nearest]
        windows = () if prediction.windows is None else prediction.windows[anomalous].tolist()
        places = {number: place for place, number in enumerate(self.normals.numbers)}
        for row, (number, *shift) in enumerate(windows):
            if (place := places.get(number)) is not None:
                title = f"nearest normal window: {self.normals.names[place]}"
                comparisons[row] = Comparison(place, title, tuple(shift))
        return comparisons

    def draw(
        self,
        path: str,
        size: tuple[int, int],
        pixels: np.ndarray,
        score: float,
        p: float,
        heat: np.ndarray | None,
        normal: Comparison,
    ) -> None:
        """Write the panel of an image (h, w, 3) with its heat (h, w), next to what it is compared with."""
        model = self.model
        if heat is not None and not model.has_maps and heat.max() <= 0:
            heat = None
        lines = [
            f"{model.category}: {path}",
            f"score {score:.3g}, p-value {p:.2g} (anomalous up to {model.guarantee.rate:.2g})",
        ]
        level = overlays.drawn_above(heat, model.threshold, True) if model.has_maps else None
        try:
            target = self.target(path)
            photograph = overlays.own_pixels(path, pixels, model.white)
            pictures = [("photograph", photograph), (normal.title, self.normals.image(normal.number))]
            picture = panel(lines, pictures, size, heat, model.threshold, level, normal.shift)
            write_file(overlays.encoded(picture, target), target)
        except InputError as error:
            say(f"no panel: {' '.join(str(error).splitlines())}")


def panel(
    lines: Sequence[str],
    pictures: Sequence[tuple[str, np.ndarray]],
    size: tuple[int, int],
    heat: np.ndarray | None,
    threshold: float,
    level: float | None,
    shift: tuple[int, int] = (0, 0),
) -> Image.Image:
    """Draw lines of text, below them pictures with their titles, and below those what ``crop`` tells of each, enlarged.

    pictures: titles and images (h, w, 3) uint8 of any sizes, the photograph first. heat: its map (h, w), laid over it
    in one more picture; None: neither that nor anything enlarged. threshold, level: as overlays.overlay takes them.
    size: the photograph's own (H, W), whose shape all pictures get; wide ones are stacked. shift: how many pixels of
    the map down and right the enlarged part of the other pictures lies, as far as they reach.
    """
    limits = WIDE if size[1] > STACKED_FROM * size[0] else UPRIGHT
    scale = min(limits[0] / size[1], limits[1] / size[0])
    cell = (max(1, round(scale * size[1])), max(1, round(scale * size[0])))
    rows = [[(title, cut(pixels, cell)) for title, pixels in pictures]]
    if heat is not None:
        box, whole = crop(heat, threshold if level is None else level), (0, 0, *heat.shape[::-1])
        zoom = whole[2] / (box[2] - box[0])
        boxes = [box, *[shifted(box, shift, heat.shape)] * (len(pictures) - 1), box]
        enlarged = [cut(x, cell, rescaled(part, heat.shape, x.shape)) for (_, x), part in zip(pictures, boxes)]
        rows.append([(f"enlarged {zoom:.1f} times", picture) for picture in enlarged])
        for row, part, title in zip(rows, (whole, box), ("heat map", "")):
            cell_heat = np.asarray(Image.fromarray(heat).resize(cell, Image.Resampling.BILINEAR, part))
            row.append((title, overlays.overlay(np.asarray(row[0][1]), cell_heat, threshold, level)))
        for (_, picture), part in zip(rows[0], boxes):
            frame(picture, rescaled(part, heat.shape, picture.size[::-1]))
    return page(lines, list(zip(*rows)) if limits is WIDE else rows, cell)


def shifted(
    box: tuple[int, int, int, int], shift: tuple[int, int], shape: tuple[int, ...]
) -> tuple[int, int, int, int]:
    """Return a box moved down and right within an image of a shape (H, W)."""
    left, top, right, bottom = box
    down = min(max(shift[0], -top), shape[0] - bottom)
    across = min(max(shift[1], -left), shape[1] - right)
    return left + across, top + down, right + across, bottom + down


def cut(pixels: np.ndarray, cell: tuple[int, int], box: tuple[float, float, float, float] | None = None) -> Image.Image:
    """Return a box of an image (h, w, 3) uint8, or all of it, at the size of a cell (width, height)."""
    return Image.fromarray(pixels).resize(cell, Image.Resampling.BICUBIC, box)


def frame(picture: Image.Image, box: tuple[float, float, float, float]) -> None:
    """Draw a box on a picture: white within black, to be seen on any ground."""
    left, top, right, bottom = map(round, box)
    draw = ImageDraw.Draw(picture)
    draw.rectangle((left, top, right - 1, bottom - 1), outline="black", width=3)
    draw.rectangle((left + 1, top + 1, right - 2, bottom - 2), outline="white", width=1)


def page(lines: Sequence[str], rows: Sequence[Sequence[tuple[str, Image.Image]]], cell: tuple[int, int]) -> Image.Image:
    """Put rows of pictures, all of the size of a cell (width, height), each below its title, under lines of text."""
    large, small = ImageFont.load_default(18), ImageFont.load_default(14)
    column, row, head = max(cell[0], NARROWEST_COLUMN) + GAP, cell[1] + 22 + GAP, 28 * len(lines) + 2 * GAP
    canvas = Image.new("RGB", (GAP + column * len(rows[0]), head + row * len(rows)), GROUND)
    draw = ImageDraw.Draw(canvas)
    for number, line in enumerate(lines):
        draw.text((GAP, GAP + 26 * number), fitted(shown(line), large, canvas.width - 2 * GAP), TEXT, large)
    for y, pictures in enumerate(rows):
        for x, (title, picture) in enumerate(pictures):
            left, top = GAP + column * x, head + row * y
            draw.text((left, top), fitted(shown(title), small, column - GAP), DIM, small)
            canvas.paste(picture, (left, top + 22))
    return canvas


def fitted(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """Shorten a text in its middle until it is at most ``width`` pixels long."""
    fitting, length = text, len(text)
    while length > 2 and font.getlength(fitting) > width:
        length -= 1
        fitting = f"{text[: length // 2]}...{text[len(text) - (length - length // 2) :]}"
    return fitting
