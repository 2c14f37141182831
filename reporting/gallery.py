"""The HTML report: every image of one or several categories by its score, in one file that needs no other.

Owns which images it shows and how; the page itself is gallery.html.
"""

import base64
import heapq
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape
from PIL import Image
from torch import Tensor

from dataset import TestSet
from detector import BatchPrediction, Detector
from reporting.metrics import Evaluation
from runtime.files import MARK

THUMBNAIL_BYTES = 10_000  # at most, down to LOWEST_QUALITY: 500 images with their maps are then below 15 MB
LOWEST_QUALITY = 20
EVERY_LEVEL = 50  # p-values k / (n + 1) up to this k are all on the slider, larger ones in steps of two percent
WIDTH, ROC_HEIGHT, STRIP_HEIGHT, STRIP_GAP, BINS = 280, 200, 82, 26, 40  # of the charts, in units of their SVG


@dataclass(frozen=True)
class Tile:
    """An image. label: 0 normal, 1 anomalous, None unknown. defect_type: "" without a label. image, overlay: JPEG
    files, the second with the heat map; None without one."""

    name: str
    defect_type: str
    label: int | None
    score: float
    p_value: float
    image: bytes
    overlay: bytes | None


@dataclass(frozen=True)
class Page:
    """A category. unit: of the score. rate: images with p_value <= rate are called anomalous. count: n, the normal
    images that p-values come from, each a whole number of (n + 1)-ths. promise: a sentence or two on what the rate
    promises. auroc: a fraction, None without labels."""

    category: str
    unit: str
    rate: float
    count: int
    guarantee: str
    auroc: float | None
    tiles: Sequence[Tile]


# Pictures ---------------------------------------------------------------------------------------------------------


def thumbnail(image: np.ndarray, side: int = 192, quality: int = 70) -> bytes:
    """A JPEG file of an image (H, W, 3) uint8, its longest side at most ``side`` pixels. The quality goes down from
    ``quality`` until the file has at most THUMBNAIL_BYTES."""
    small = Image.fromarray(image)
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    while True:
        buffer = io.BytesIO()
        small.save(buffer, "JPEG", quality=quality, optimize=True, subsampling="4:4:4")  # thin lines too
        if buffer.tell() <= THUMBNAIL_BYTES or quality <= LOWEST_QUALITY:
            return buffer.getvalue()
        quality = max(LOWEST_QUALITY, quality - 10)


def data_uri(jpeg: bytes) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(jpeg).decode()


# The page ---------------------------------------------------------------------------------------------------------


def render(pages: Sequence[Page], title: str) -> str:
    """The HTML file of all categories. It can be written as UTF-8 whatever the names hold."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=as_text,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"data_uri": data_uri, "short": short}
    sections = [section(page) for page in pages]
    return environment.get_template("gallery.html").render(mark=MARK, title=title, sections=sections)


def as_text(value: object) -> object:
    """What jinja2 escapes, with two things that it leaves: carriage returns, which HTML would turn into line feeds, and
    the halves of characters that stand for undecodable bytes in names of files, which no UTF-8 file can hold."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    valid = value.encode("utf-8", "backslashreplace").decode()
    return escape(valid).replace("\r", Markup("&#13;"))


def short(value: float) -> str:
    """Three digits, as the script in the page writes them."""
    return f"{value:.3g}"


def section(page: Page) -> dict:
    """What gallery.html needs of a category."""
    tiles = sorted(page.tiles, key=lambda tile: -tile.score)
    normal, anomalous = ([tile.score for tile in tiles if tile.label == label] for label in (0, 1))
    chosen = math.floor(page.rate * (page.count + 1) + 1e-6)
    levels = slider_levels(page.count, chosen)
    kinds = {}
    for tile in tiles:
        if tile.label is not None:
            kinds[tile.defect_type] = kinds.get(tile.defect_type, 0) + 1
    if normal or anomalous:
        groups = [(name, own) for name, own in (("normal", normal), ("anomalous", anomalous)) if own]
    else:
        groups = [("images", [tile.score for tile in tiles])]
    return {
        "page": page,
        "tiles": tiles,
        "ranks": [round(tile.p_value * (page.count + 1)) for tile in tiles],
        "normal": len(normal),
        "anomalous": len(anomalous),
        "levels": levels,
        "start": levels.index(chosen),
        "kinds": sorted(kinds.items()),
        "with_maps": any(tile.overlay for tile in tiles),
        "aspect": aspect(tiles),
        "roc": roc_path(np.array(normal), np.array(anomalous)) if normal and anomalous else None,
        "histogram": histogram(groups) if tiles else None,
        "width": WIDTH,
        "roc_height": ROC_HEIGHT,
    }


def slider_levels(count: int, chosen: int) -> list[int]:
    """The numerators k of the p-values k / (count + 1) that the slider can be set to, ascending, ``chosen`` and
    count + 1 among them."""
    levels, k = {chosen}, 1
    while k <= count:
        levels.add(k)
        k = max(k + 1, round(1.02 * k)) if k >= EVERY_LEVEL else k + 1
    return sorted(levels | {count + 1})


def aspect(tiles: Sequence[Tile]) -> float:
    """Width / height of the frames of the pictures: that of the median picture, within what a grid bears."""
    sizes = [Image.open(io.BytesIO(tile.image)).size for tile in tiles]
    return float(np.clip(np.median([width / height for width, height in sizes]), 0.6, 1.8)) if sizes else 1.0


# Charts -----------------------------------------------------------------------------------------------------------


def roc_points(normal: np.ndarray, anomalous: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """From scores (N,), (A,) the shares (T,), (T,) of normal and anomalous images at or above each score, from none to
    all."""
    levels = np.unique(np.concatenate([normal, anomalous]))[::-1]
    shares = [1 - np.searchsorted(np.sort(own), levels, "left") / len(own) for own in (normal, anomalous)]
    return np.append(0.0, shares[0]), np.append(0.0, shares[1])


def roc_path(normal: np.ndarray, anomalous: np.ndarray) -> str:
    """The curve as the d of an SVG path, from the lower left to the upper right of (WIDTH, ROC_HEIGHT)."""
    return "M" + "L".join(f"{x * WIDTH:.1f},{(1 - y) * ROC_HEIGHT:.1f}" for x, y in zip(*roc_points(normal, anomalous)))


def histogram(groups: Sequence[tuple[str, Sequence[float]]]) -> dict:
    """Bars of groups of scores, a strip a group, above a common axis. groups: name, scores, of which there is at least
    one. Returns low and high, the ends of the axis; ticks: place, text; strips; the height of all."""
    everything = np.concatenate([own for _, own in groups])
    low, high = float(everything.min()), float(everything.max())
    if low == high:
        low, high = low - 0.5 * max(1, abs(low)), high + 0.5 * max(1, abs(high))
    strips = []
    for number, (name, own) in enumerate(groups):
        found = np.histogram(own, BINS, (low, high))[0]
        heights = STRIP_HEIGHT * found / found.max()
        bars = [(WIDTH * k / BINS, STRIP_HEIGHT - height, height) for k, height in enumerate(heights) if height]
        y = STRIP_GAP + number * (STRIP_HEIGHT + STRIP_GAP)
        strips.append({"name": name, "total": len(own), "most": found.max(), "bars": bars, "y": y})
    ticks = [((value - low) / (high - low) * WIDTH, f"{value:g}") for value in round_values(low, high)]
    height = len(groups) * (STRIP_HEIGHT + STRIP_GAP)
    shape = {"bar": WIDTH / BINS, "strip": STRIP_HEIGHT, "height": height}
    return {"low": low, "high": high, "ticks": ticks, "strips": strips} | shape


def round_values(low: float, high: float, most: int = 5) -> list[float]:
    """Values of few digits and equal steps within low < high, about ``most`` of them."""
    step = 10.0 ** math.floor(math.log10((high - low) / most))
    step = next(step * factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= most)
    return [step * k for k in range(math.ceil(low / step), math.floor(high / step) + 1)]


MOST_TILES = 1000  # of images that have no labels: with heat maps 30 MB at most


# The HTML report --------------------------------------------------------------------------------------------------


def gallery_page(detector: Detector, test: TestSet, found: Evaluation, seed: str) -> "Page":
    """A category's test images for the HTML report."""
    tiles = []
    for i, path in enumerate(test.paths):
        about = {"defect_type": test.defect_types[i], "label": int(test.labels[i])}
        about |= {"score": found.scores[i].item(), "p_value": found.p_values[i].item()}
        heat = None if found.maps is None else found.maps[i]
        tiles.append(tile(detector, f"{path.parent.name}/{path.name}", test.images[i], heat, about))
    return page(detector, tiles, " ".join(filter(None, (detector.config.category, seed))), found.metrics)


class Gallery:
    """Tiles of images without labels as they are scored; of more than MOST_TILES those with the highest scores."""

    def __init__(self, detector: Detector) -> None:
        self.detector, self.count = detector, 0
        self.kept: list[tuple[float, int, Tile]] = []  # a heap, the lowest score first, of equal ones the last

    def on_batch(self, paths: Sequence[str], pixels: Tensor, prediction: BatchPrediction) -> None:
        """Images by path, (B, 3, H, W) uint8, and what the detector says of them."""
        maps = [None] * len(paths) if prediction.maps is None else prediction.maps.cpu().numpy()
        for path, image, heat, score, p in zip(
            paths, pixels, maps, prediction.scores.tolist(), prediction.p_values.tolist()
        ):
            self.count += 1
            if len(self.kept) == MOST_TILES and score <= self.kept[0][0]:
                continue
            about = {"defect_type": "", "label": None, "score": score, "p_value": p}
            new = (score, -self.count, tile(self.detector, path, image, heat, about))
            (heapq.heappushpop if len(self.kept) == MOST_TILES else heapq.heappush)(self.kept, new)

    def on_end(self) -> None:
        """Nothing is left to do."""

    def page(self) -> "Page":
        tiles = [each for *_, each in self.kept]
        more = f". The {len(tiles)} images with the highest scores, of {self.count}" * (self.count > len(tiles))
        return page(self.detector, tiles, self.detector.config.category, {}, more)


def tile(detector: Detector, name: str, image: Tensor, heat: np.ndarray | None, about: dict) -> "Tile":
    """An image (3, H, W) uint8, of a patch model with its map (H, W) in the detector's own scale."""
    from reporting.gallery import Tile, thumbnail

    pixels, drawn = image.permute(1, 2, 0).cpu().numpy(), None
    if detector.config.patches and heat is not None:
        from reporting.overlays import overlay

        drawn = thumbnail(np.asarray(overlay(pixels, heat, detector.threshold.item(), outlined=True)))
    return Tile(name, image=thumbnail(pixels), overlay=drawn, **about)


def page(detector: Detector, tiles: "list[Tile]", title: str, metrics: dict, more: str = "") -> "Page":
    from reporting.gallery import Page

    guarantee = detector.guarantee
    auroc, words = metrics.get("image_auroc"), guarantee.words() + more
    return Page(title, detector.unit, guarantee.rate, guarantee.count, words, auroc, tiles)
