"""Say and show where an image is anomalous, from its map: the strongest region, and heat drawn over the image.

Maps and images in; boxes, pictures and the content of their files out. Owns how heat is colored. Needs NumPy and Pillow
alone, for computers on the line.
"""

import math
from pathlib import Path

import numpy as np
from PIL import Image, PngImagePlugin

from runtime.files import MARK, InputError
from runtime.image_files import decode, encode

SMALLEST_CROP, MARGIN = 0.25, 1.25  # of the image's sides; around the region
OPACITY = 0.65  # of heat from the threshold on
COLORS = ((255, 120, 0), (255, 30, 0), (255, 0, 110))  # of heat, weak to strong: seen on gray, dark and bright parts
OUTLINE = (0x3F, 0xD0, 0xFF)  # as on the sheets of heat maps
SIDE_PER_PIXEL = 400  # an outline is 1 pixel wide for each 400 pixels, or part of them, of the image's longer side


def region(heat: np.ndarray, threshold: float, size: tuple[int, int]) -> tuple[int, int, int, int] | None:
    """Return x, y, width, height, in pixels of the image, of the region above the threshold that holds a map's maximum.

    heat: the map (h, w). size: (H, W) of the image. The region is connected by 4 neighbors; the box is the smallest
    that covers it. None if nothing is above the threshold.
    """
    above = heat.astype(np.float64) > threshold
    if not above.any():
        return None
    places = connected(above, np.unravel_index(heat.argmax(), heat.shape)).nonzero()
    (top, bottom), (left, right) = (
        (int(part.min()) * side // cells, -(-int(part.max() + 1) * side // cells))
        for part, side, cells in zip(places, size, heat.shape)
    )
    return left, top, right - left, bottom - top


def connected(marked: np.ndarray, place: tuple[int, int]) -> np.ndarray:
    """Return the part (H, W) bool of what is marked (H, W) that is connected with a marked place by 4 neighbors."""
    begins = marked.copy()
    begins[:, 1:] &= ~marked[:, :-1]
    rows = begins.cumsum().reshape(marked.shape)  # the number of the run of marks along its row that a mark is in
    begins = marked.copy()
    begins[1:] &= ~marked[:-1]
    columns = begins.T.cumsum().reshape(marked.T.shape).T
    part, before = np.zeros_like(marked), 0
    part[place] = True
    while before != (before := np.count_nonzero(part)):
        for runs in (rows, columns):
            reached = np.zeros(runs.max() + 1, dtype=bool)
            reached[runs[part]] = True
            part = reached[runs] & marked
    return part


def drawn_above(heat: np.ndarray, threshold: float, anomalous: bool) -> float:
    """Return the level above which a map (h, w) is drawn as anomalous: what its outline, box and mask are of.

    It follows the decision: nothing is above it in an image called normal, something always is in one called anomalous.
    That is the threshold, but where several networks decide, whose p-values can differ from their mean score: then it
    is as far below the maximum as shows the strongest place.
    """
    if not anomalous:
        return np.inf
    highest = heat.max().item()
    return min(threshold, highest - (highest - np.median(heat).item()) / 4)


def crop(heat: np.ndarray, threshold: float) -> tuple[int, int, int, int]:
    """Return left, top, right, bottom of the part of a map (h, w) and its image that is enlarged, a box of their shape:
    the strongest region with a margin, or what is around the maximum where nothing is above the threshold.

    Of a strong region only what is above half of the maximum counts: else the box would be the whole image.
    """
    level = max(threshold, heat.max().item() / 2)
    (y, x), (height, width) = np.unravel_index(heat.argmax(), heat.shape), heat.shape
    left, top, across, down = region(heat, level, heat.shape) or (int(x), int(y), 1, 1)
    share = min(1, max(SMALLEST_CROP, MARGIN * across / width, MARGIN * down / height))
    w, h = math.ceil(share * width), math.ceil(share * height)
    left = min(max(0, left + (across - w) // 2), width - w)
    top = min(max(0, top + (down - h) // 2), height - h)
    return left, top, left + w, top + h


def rescaled(
    box: tuple[int, int, int, int], shape: tuple[int, ...], other: tuple[int, ...]
) -> tuple[float, float, float, float]:
    """Return a box of an image of one shape (H, W, ...) as that of the same image at another one."""
    down, across = (to / of for of, to in zip(shape[:2], other[:2]))
    left, top, right, bottom = box
    return left * across, top * down, right * across, bottom * down


def own_pixels(path: str | Path, pixels: np.ndarray, white: int) -> np.ndarray:
    """Return an image file at its own size, (H, W, 3) uint8; ``pixels``, as the detector sees it, if it has gone."""
    try:
        return decode(path, white=white)
    except InputError:
        return pixels


def as_score(heat: np.ndarray, score: float) -> np.ndarray:
    """Return a Grad-CAM map, at least 0, in the unit of the score: its maximum is the score, as in a patch model."""
    return heat * np.float32(max(score, 0) / max(heat.max(), 1e-30))


def enlarged(heat: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return a map (h, w) float32 at the size (H, W) of its image, bilinear, as eval.py saves maps: to the same bits,
    where torch multiplies and adds in one step, rounded once."""
    for axis in (1, 0):
        length, side = heat.shape[axis], size[axis]
        scale = np.float64(np.float32(length) / np.float32(side))
        places = (scale * (np.arange(side) + 0.5) - 0.5).astype(np.float32).clip(0)
        lower = places.astype(int)
        share = (places - lower.astype(np.float32)).reshape([-1, 1][: 2 - axis])  # of the next one
        upper = heat.take(np.minimum(lower + 1, length - 1), axis) * share
        heat = (heat.take(lower, axis) * (1 - share).astype(np.float64) + upper).astype(np.float32)
    return heat


def above(heat: np.ndarray, level: float) -> Image.Image:
    """Return a picture that is 255 where the map (H, W) is above the level, else 0."""
    return Image.fromarray((heat > level).astype(np.uint8) * np.uint8(255))


def heat_range(threshold: float) -> tuple[float, float]:
    """Return where the colors of heat begin and end, which depends on the threshold alone: half of it, twice of it."""
    return threshold - abs(threshold) / 2, threshold + max(abs(threshold), 1e-9)


def heat_colors() -> np.ndarray:
    """Return the colors of heat (256, 4) uint8, red, green, blue and opacity, evenly spaced over ``heat_range``.

    The opacity grows up to the threshold, which is at a third of the range, and then stays. It grows late: in textures
    distances are above half of the threshold everywhere.
    """
    places = np.linspace(0, 255, len(COLORS))
    channels = [np.interp(np.arange(256), places, channel) for channel in zip(*COLORS)]
    channels.append(255 * OPACITY * np.linspace(0, 3, 256).clip(0, 1) ** 2)
    return np.stack(channels, 1).round().astype(np.uint8)


def overlay(pixels: np.ndarray, heat: np.ndarray, threshold: float, level: float | None) -> Image.Image:
    """Return a picture of an image (H, W, 3) uint8 under its map (H, W), in ``heat_colors``.

    level: what is above it gets a thin line around it, see ``drawn_above``; None: without such a line.
    """
    low, high = heat_range(threshold)
    strength = (255 * ((heat - low) / (high - low)).clip(0, 1)).astype(np.uint8)
    heat_image = Image.fromarray(heat_colors()[strength])
    image = Image.composite(heat_image.convert("RGB"), Image.fromarray(pixels), heat_image.getchannel("A"))
    if level is not None:
        inside = heat > level
        width = -(-max(inside.shape) // SIDE_PER_PIXEL)
        image.paste(OUTLINE, mask=Image.fromarray(inside & ~eroded(inside, width)))
    return image


def eroded(inside: np.ndarray, steps: int) -> np.ndarray:
    """Return what of a region (H, W) bool is more than so many steps from what lies outside it, each to one of 4
    neighbors. Beyond the edges of the image all is inside."""
    for _ in range(steps):
        rest = inside.copy()
        rest[1:] &= inside[:-1]
        rest[:-1] &= inside[1:]
        rest[:, 1:] &= inside[:, :-1]
        rest[:, :-1] &= inside[:, 1:]
        inside = rest
    return inside


def encoded(image: Image.Image, target: str) -> bytes:
    """Return the content of a PNG or JPEG file, with MARK. Raises InputError if the format cannot hold the image."""
    info = PngImagePlugin.PngInfo()
    info.add_text("Software", MARK)
    try:
        return encode(image, "PNG" if target.endswith(".png") else "JPEG", quality=90, pnginfo=info, comment=MARK)
    except (OSError, ValueError) as error:
        raise InputError(f"{target}: cannot be drawn ({error})") from error
