"""Make the HTML report: every image of one or several categories, sorted by score, in one file that needs no other.

Owns which images it shows and how; the page itself is gallery.html.
"""

import base64
import heapq
import io
import math
import platform
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape
from PIL import Image

from config import flag_value
from conformal import FalseAlarmGuarantee
from reporting.overlays import crop, drawn_above, overlay, own_pixels, rescaled
from runtime.cli import command_line
from runtime.files import MARK
from runtime.image_files import encode

if TYPE_CHECKING:  # torch is not imported for the reports of an exported detector
    from torch import Tensor

    from reporting.metrics import Evaluation

MAX_TILES = 1000  # images without labels on a page: with heat maps that is 30 MB at most
# At most: 500 images with their maps and regions are then below 15 MB
THUMBNAIL_BYTES, REGION_BYTES = 6_500, 8_000
REGION_SIDE = 400  # pixels of the longer side of a region, at most; it is not made larger than it is
LOWEST_QUALITY = 20
EVERY_LEVEL = 50  # p-values k / (n + 1) up to this k are all on the slider, larger ones in steps of two percent
USUAL = 0.95  # share of the scores that take at least half of the histogram's axis
WIDTH, ROC_HEIGHT, STRIP_HEIGHT, STRIP_GAP, BINS = 280, 200, 82, 26, 40  # of the charts, in units of their SVG


class Decides(Protocol):
    """Name what a page needs of a detector, in whatever form that is."""

    unit: str
    guarantee: FalseAlarmGuarantee
    threshold: "float | Tensor"
    calibration_scores: "np.ndarray | Tensor"
    white: int


class HasScores(Protocol):
    """Name what a page needs of what a model says of B images."""

    scores: np.ndarray  # (B,)
    p_values: np.ndarray  # (B,)
    maps: np.ndarray | None  # (B, H, W) of a patch model


@dataclass(frozen=True)
class Tile:
    """An image on a page."""

    name: str
    defect_type: str  # "" without a label
    label: int | None  # 0 normal, 1 anomalous, None unknown
    score: float
    p_value: float
    image: bytes  # JPEG file
    overlay: bytes | None  # JPEG file of the image under its heat map
    region: bytes | None = None  # JPEG file of its most unusual region, in the photograph's own pixels


@dataclass(frozen=True)
class Page:
    """A category in the report; plain, so that ranks can send it."""

    category: str  # its title
    unit: str  # of the scores
    rate: float  # images with p_value <= rate are called anomalous
    count: int  # n: number of calibration scores; each p-value is a whole number of (n + 1)-ths
    guarantee: str  # a sentence or two on what the rate promises, and what to do
    auroc: float | None  # a fraction; None without both kinds of labels
    tiles: Sequence[Tile]
    details: str = ""  # all that the rate promises
    facts: Sequence[tuple[str, str]] = ()  # how the page was made, by name; see ``facts_of``
    warnings: Sequence[str] = ()
    unreadable: Sequence[tuple[str, str]] = ()  # files that could not be scored, and why
    costs: tuple[float, float] | None = None  # of a miss and a false alarm, if they are known
    normal_scores: Sequence[float] = ()  # (n,): the calibration scores, which are the thresholds of all levels


def facts_of(
    settings: dict, metadata: dict, runtime: str, path: str | Path, images: Iterable[str | Path]
) -> list[tuple[str, str]]:
    """Return how a page was made, by name. settings, metadata: of the detector, by name. runtime: what has run it, with
    its version. path: of the detector's file. images: where the images are."""
    settings = {name: value for name, value in settings.items() if value is not None}
    return [
        ("date", datetime.now().astimezone().isoformat(" ", "seconds")),
        ("detector", str(path)),
        ("images", ", ".join(map(str, images))),
        ("command", command_line()),
        ("trained by", metadata.get("command", "unknown")),
        ("training images", str(metadata.get("train_images", "unknown"))),
        ("settings", ", ".join(f"{name} {flag_value(value)}" for name, value in settings.items())),
        ("versions", f"{runtime}, trained with {metadata.get('torch')}; Python {platform.python_version()}"),
    ]


# From what the detector says to pages -----------------------------------------------------------------------------


def gallery_page(
    evaluation: "Evaluation", seed: str = "", costs: tuple[float, float] | None = None, workers: int = 1
) -> Page:
    """Return the page of a category's test images. seed: the name of the seed's folder, if there are several. costs: of
    a miss and of a false alarm. workers: threads that open the images once more."""
    test, detector = evaluation.test, evaluation.detector
    maps = None if detector.config.patches is None else evaluation.maps  # of the others by Grad-CAM, for the plots

    def tile(i: int) -> Tile:
        path, heat = test.paths[i], None if maps is None else maps[i]
        score, p_value = evaluation.scores[i].item(), evaluation.p_values[i].item()
        label = int(test.labels[i])
        pixels = test.images[i].permute(1, 2, 0).numpy()
        pictures = _pictures(detector, path, pixels, heat, p_value, closer=bool(label))
        return Tile(f"{path.parent.name}/{path.name}", test.defect_types[i], label, score, p_value, *pictures)

    with ThreadPoolExecutor(workers or 1) as pool:
        tiles = list(pool.map(tile, range(len(test.paths))))
    title = " ".join(filter(None, (evaluation.category, seed)))
    return replace(_page(detector, tiles, title, evaluation.metrics.get("image_auroc")), costs=costs)


class Gallery:
    """Collect tiles of images without labels while they are scored; of more than MAX_TILES those with the highest
    scores."""

    def __init__(self, category: str, detector: Decides, facts: Sequence[tuple[str, str]] = ()) -> None:
        self.category, self.detector, self.facts, self.count, self.names = category, detector, facts, 0, set()
        self.warnings: list[str] = []
        self.unreadable: dict[str, str] = {}  # why, by path
        self.heap: list[tuple[float, int, Tile]] = []  # the lowest score first, of equal scores the latest image

    def on_batch(
        self, paths: Sequence[str], sizes: Sequence[tuple[int, int]], pixels: np.ndarray, prediction: HasScores
    ) -> None:
        """Add images, by path and as (B, H, W, 3) uint8, with what the detector says of them. sizes: of their files."""
        maps = [None] * len(paths) if prediction.maps is None else prediction.maps
        scores, p_values = prediction.scores.tolist(), prediction.p_values.tolist()
        for path, image, heat, score, p_value in zip(paths, pixels, maps, scores, p_values):
            self.count += 1
            self.names.add(path)
            full = len(self.heap) == MAX_TILES
            if full and score <= self.heap[0][0]:
                continue
            tile = Tile(path, "", None, score, p_value, *_pictures(self.detector, path, image, heat, p_value))
            (heapq.heappushpop if full else heapq.heappush)(self.heap, (score, -self.count, tile))

    def on_rows(self, rows: list[dict]) -> None:
        """Note the files that could not be scored, by their rows; those that can be now are no longer among them."""
        for row in rows:
            self.unreadable.pop(row["path"], None)
            if row["error"] and len(self.unreadable) < MAX_TILES:
                self.unreadable[row["path"]] = row["error"]

    def page(self) -> Page:
        """Return the page of the images so far."""
        latest = {tile.name: tile for *_, tile in sorted(self.heap, key=lambda entry: -entry[1])}
        tiles = list(latest.values())  # an image that has changed may have been scored again
        note = f". The {len(tiles)} images with the highest scores, of {len(self.names)}"
        note *= len(self.names) > len(tiles)
        page = _page(self.detector, tiles, self.category, None, note)
        unreadable = [*self.unreadable.items()]
        return replace(page, facts=self.facts, warnings=self.warnings, unreadable=unreadable)


def _page(detector: Decides, tiles: list[Tile], title: str, auroc: float | None, note: str = "") -> Page:
    guarantee = detector.guarantee
    advice, scores = guarantee.advice() + note, detector.calibration_scores.tolist()
    about = (title, detector.unit, guarantee.rate, guarantee.count, advice, auroc, tiles)
    return Page(*about, details=guarantee.words(), normal_scores=scores)


# Pictures ---------------------------------------------------------------------------------------------------------


def _pictures(
    detector: Decides,
    path: str | Path,
    pixels: np.ndarray,
    heat: np.ndarray | None,
    p_value: float,
    closer: bool = False,
) -> tuple[bytes, bytes | None, bytes | None]:
    """Return the JPEG files of a tile: of an image (H, W, 3) uint8; with its map (H, W) if it has one, whose scale the
    threshold gives, and whose outline the decision by its p-value; and, if it is called anomalous or ``closer``, of its
    most unusual region as it is in the file."""
    if heat is None:
        return thumbnail(pixels), None, None
    threshold, anomalous = float(detector.threshold), p_value <= detector.guarantee.rate
    level = drawn_above(heat, threshold, anomalous)
    drawn = thumbnail(np.asarray(overlay(pixels, heat, threshold, level)))
    if not (anomalous or closer):
        return thumbnail(pixels), drawn, None
    photograph = own_pixels(path, pixels, detector.white)
    box = crop(heat, min(level, threshold))
    left, top, right, bottom = map(round, rescaled(box, heat.shape, photograph.shape))
    region = photograph[top : max(bottom, top + 1), left : max(right, left + 1)]
    return thumbnail(pixels), drawn, thumbnail(region, REGION_SIDE, most=REGION_BYTES)


def thumbnail(image: np.ndarray, side: int = 192, quality: int = 70, most: int = THUMBNAIL_BYTES) -> bytes:
    """Return a JPEG file of an image (H, W, 3) uint8, its longest side at most ``side`` pixels.

    The quality goes down from ``quality`` to LOWEST_QUALITY, and then the size, until it has at most ``most`` bytes.
    """
    small = Image.fromarray(image)
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    while True:
        jpeg = encode(small, "JPEG", quality=quality, optimize=True, subsampling="4:4:4")  # thin lines too
        if len(jpeg) <= most:
            return jpeg
        if quality > LOWEST_QUALITY:
            quality = max(LOWEST_QUALITY, quality - 10)
        else:
            small = small.resize([max(1, round(0.85 * length)) for length in small.size])


def data_uri(jpeg: bytes) -> str:
    """Return a JPEG file as the address of an image in HTML."""
    return "data:image/jpeg;base64," + base64.b64encode(jpeg).decode()


# The page ---------------------------------------------------------------------------------------------------------


def render(pages: Sequence[Page], title: str) -> str:
    """Return the HTML file of all categories. It can be written as UTF-8 whatever bytes the files' names hold."""
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
    """Return a value as jinja2 escapes it, and escape two things that it does not: carriage returns, which HTML would
    turn into line feeds, and surrogates, which stand for undecodable bytes in file names and which no UTF-8 file can
    hold."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    valid = value.encode("utf-8", "backslashreplace").decode()
    return escape(valid).replace("\r", Markup("&#13;"))


def short(value: float) -> str:
    """Return a number with three digits, as the script in the page writes them."""
    return f"{value:.3g}"


def section(page: Page) -> dict:
    """Return what gallery.html needs of a category."""
    tiles = sorted(page.tiles, key=lambda tile: -tile.score)
    normal, anomalous = ([tile.score for tile in tiles if tile.label == label] for label in (0, 1))
    rank = math.floor(page.rate * (page.count + 1) + 1e-6)
    levels = slider_levels(page.count, rank)
    highest = sorted(page.normal_scores, reverse=True)
    thresholds = [highest[k - 1] if 0 < k <= len(highest) else None for k in levels]
    threshold = thresholds[levels.index(rank)]
    groups = [(name, scores) for name, scores in (("normal", normal), ("anomalous", anomalous)) if scores]
    return {
        "page": page,
        "tiles": tiles,
        "ranks": [round(tile.p_value * (page.count + 1)) for tile in tiles],
        "normal": len(normal),
        "anomalous": len(anomalous),
        "levels": levels,
        "thresholds": ["" if threshold is None else repr(threshold) for threshold in thresholds],
        "start": levels.index(rank),
        "kinds": sorted(Counter(tile.defect_type for tile in tiles if tile.label is not None).items()),
        "with_maps": any(tile.overlay for tile in tiles),
        "aspect": aspect(tiles),
        "roc": roc_path(normal, anomalous) if normal and anomalous else None,
        "histogram": histogram(groups or [("images", [tile.score for tile in tiles])], threshold) if tiles else None,
        "width": WIDTH,
        "roc_height": ROC_HEIGHT,
    }


def slider_levels(count: int, rank: int) -> list[int]:
    """Return the numerators k of the p-values k / (count + 1) that the slider can be set to, ascending; 0, ``rank``,
    the level in use, and count + 1 are among them. With few normal images ``rank`` is 1: below it nothing is called
    anomalous, which the slider shows."""
    levels, k = {0, rank}, 1
    while k <= count:
        levels.add(k)
        k = max(k + 1, round(1.02 * k)) if k >= EVERY_LEVEL else k + 1
    return sorted(levels | {count + 1})


def aspect(tiles: Sequence[Tile]) -> float:
    """Return width / height of the pictures' frames: the median of the pictures', but neither narrow nor flat."""
    sizes = [Image.open(io.BytesIO(tile.image)).size for tile in tiles]
    return float(np.clip(np.median([width / height for width, height in sizes]), 0.6, 1.8)) if sizes else 1.0


# Charts -----------------------------------------------------------------------------------------------------------


def roc_path(normal: Sequence[float], anomalous: Sequence[float]) -> str:
    """Return the ROC curve of scores (N,) and (A,) as the d of an SVG path, from the lower left to the upper right of
    (WIDTH, ROC_HEIGHT)."""
    from sklearn.metrics import roc_curve

    false_alarms, detections, _ = roc_curve([0] * len(normal) + [1] * len(anomalous), [*normal, *anomalous])
    return "M" + "L".join(f"{x * WIDTH:.1f},{(1 - y) * ROC_HEIGHT:.1f}" for x, y in zip(false_alarms, detections))


def score_axis(scores: Sequence[float], threshold: float | None = None) -> tuple[float, float]:
    """Return the ends of a histogram's axis. A few scores far above the others, which would squeeze those, may lie
    beyond it; the threshold does not."""
    low, high = float(np.min(scores)), float(np.max(scores))
    usual = float(np.quantile(scores, USUAL, method="lower"))
    high = min(high, low + 2 * (usual - low)) if usual > low else high
    if threshold is not None:
        low, high = min(low, threshold), max(high, threshold)
    if low == high:
        low, high = low - 0.5 * max(1, abs(low)), high + 0.5 * max(1, abs(high))
    return low, high


def histogram(groups: Sequence[tuple[str, Sequence[float]]], threshold: float | None = None) -> dict:
    """Return the bars of groups of scores, a strip for each group, above a common axis.

    groups: name and scores, at least one. threshold: see ``score_axis``. Returns low and high, the ends of the axis;
    beyond: how many scores are above it and in the last bars; its ticks as place and text; the strips; and measures of
    length.
    """
    everything = np.concatenate([scores for _, scores in groups])
    low, high = score_axis(everything, threshold)
    beyond = int((everything > high).sum())
    strips = []
    for number, (name, scores) in enumerate(groups):
        counts = np.histogram(np.minimum(scores, high), BINS, (low, high))[0]
        heights = STRIP_HEIGHT * counts / counts.max()
        bars = [(WIDTH * k / BINS, STRIP_HEIGHT - height, height) for k, height in enumerate(heights) if height]
        y = STRIP_GAP + number * (STRIP_HEIGHT + STRIP_GAP)
        strips.append({"name": name, "total": len(scores), "highest": counts.max(), "bars": bars, "y": y})
    ticks = [((value - low) / (high - low) * WIDTH, f"{value:g}") for value in round_values(low, high)]
    height = len(groups) * (STRIP_HEIGHT + STRIP_GAP)
    shape = {"bar": WIDTH / BINS, "strip": STRIP_HEIGHT, "height": height}
    return {"low": low, "high": high, "ticks": ticks, "strips": strips, "beyond": beyond} | shape


def round_values(low: float, high: float, count: int = 5) -> list[float]:
    """Return values of few digits and equal steps within low < high, about ``count`` of them."""
    step = 10.0 ** math.floor(math.log10((high - low) / count))
    step = next(step * factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= count)
    return [step * k for k in range(math.ceil(low / step), math.floor(high / step) + 1)]
