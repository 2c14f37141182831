"""CutPaste augmentations: every random draw, the tables ``VIEWS`` and ``VARIANTS``, and the views of a batch.

``sample_params`` draws every random number of a batch, on the CPU, so that a seed gives the same batches on every
device; ``make_views`` acts on the images' device and changes no input; ``make_packed_views`` does the same for a GPU,
from the numbers that ``pack_params`` gives. Owns what a patch and a scar are, the base augmentation (translation, color
jitter), the crops of a patch model, and which views show anything.
Source: Li, Sohn, Yoon, Pfister, "CutPaste", CVPR 2021 (arXiv 2104.04015), sections 2.2, 2.4, A.1, A.2 and A.5.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, is_dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from config import VARIANTS, Config
from image_ops import (
    HUE,
    JITTER_NUMBERS,
    PASTE_NUMBERS,
    JitterParams,
    PasteParams,
    color_jitter,
    half_extents,
    jitter_numbers,
    jitter_planes,
    paste_,
    paste_numbers,
    paste_planes,
    to_float,
    translate,
)

AREA = (0.02, 0.15)  # patch area as a fraction of the image's (A.2)
ASPECT = (0.3, 3.3)  # patch width over height, relative to the image's (A.2)
SCAR_WIDTH, SCAR_LENGTH = (2.0, 16.0), (10.0, 25.0)  # pixels of an image of SCAR_IMAGE_SIZE (A.2)
SCAR_ANGLE = 45.0  # degrees, either way (A.2)
SCAR_IMAGE_SIZE = 256
SOFT_EDGE = (0.05, 0.5)  # width of a soft edge as a fraction of the patch's shorter side
SOFT_SHARE = 0.5  # of the patches of the soft views that have one
CROP_SIZE = 64  # the paper's crops of a patch model, of images of SCAR_IMAGE_SIZE (2.4)
# A pasted view shows something if enough of its pixels differ from the image by enough
VISIBLE_CHANGE = 0.5  # deviations of the whole image's values, the unit that --normalize image measures in
VISIBLE_PIXELS, VISIBLE_SHARE = 10.0, 0.5  # as many pixels, or that share of a patch that is smaller
SAMPLE_SIDE = 64  # pixels along the shorter side of an image that its statistics are taken from
BASES_AT_ONCE, PASTES_AT_ONCE = 1, 16  # images that fit into a processor's cache with all that is computed of them
SURVEYED_VIEWS, SURVEY_BATCH = 128, 8  # views of each kind that invisible_shares makes, and how many together


# Drawing ----------------------------------------------------------------------------------------------------------


@dataclass
class Drawn:
    """Random numbers that were drawn before, each batch's in a row: (batches, n) uniform in [0, 1).

    It takes the place of a generator: the parameters of many batches then come from the operations of one, and are
    those that each batch would have drawn for itself.
    """

    numbers: Tensor
    taken: int = 0  # of each row

    def take(self, shape: Sequence[int]) -> Tensor:
        """The next numbers, those of a batch after those of the one before."""
        start, self.taken = self.taken, self.taken + math.prod(shape) // len(self.numbers)
        return self.numbers[:, start : self.taken].reshape(shape)


Source = Generator | Drawn  # of random numbers, on the CPU


def _rand(shape: Sequence[int], source: Source) -> Tensor:
    """Uniform random numbers in [0, 1)."""
    return source.take(shape) if isinstance(source, Drawn) else torch.rand(shape, generator=source)


def draw_patch(count: int, height: int, width: int, scar_scale: float, generator: Source) -> dict[str, Tensor]:
    """Large upright patches."""
    w, h = _patch_size(count, height, width, generator)
    x, y, angle = whole_numbers(width - w, generator), whole_numbers(height - h, generator), torch.zeros(count)
    to_x, to_y = whole_numbers(width - w, generator) + w / 2, whole_numbers(height - h, generator) + h / 2
    return {"width": w, "height": h, "source_x": x, "source_y": y, "center_x": to_x, "center_y": to_y, "angle": angle}


def draw_scar(count: int, height: int, width: int, scar_scale: float, generator: Source) -> dict[str, Tensor]:
    """Thin rotated rectangles whose bounding box lies inside the image. scar_scale: 1 means the paper's pixels."""
    w, h = _scar_size(count, height, width, scar_scale, generator)
    return _turned(w, h, _uniform(-SCAR_ANGLE, SCAR_ANGLE, count, generator), height, width, generator)


def draw_soft_patch(count: int, height: int, width: int, scar_scale: float, generator: Source) -> dict[str, Tensor]:
    """Patches of the same sizes, turned any way, half of them with soft edges. In an image that is not square, a long
    one that is turned too far to fit sticks out of it."""
    return _softened(*_patch_size(count, height, width, generator), height, width, generator)


def draw_soft_scar(count: int, height: int, width: int, scar_scale: float, generator: Source) -> dict[str, Tensor]:
    """Scars of the same sizes, turned any way, half of them with soft edges."""
    return _softened(*_scar_size(count, height, width, scar_scale, generator), height, width, generator)


def _patch_size(count: int, height: int, width: int, generator: Source) -> tuple[Tensor, Tensor]:
    """Widths and heights of patches. The aspect ratio is relative to the image's, so that a patch always fits, and
    log-uniform, so that both are exchangeable: the paper, all of square images, does not say how it is distributed."""
    area = _uniform(*AREA, count, generator)
    aspect = _uniform(*torch.tensor(ASPECT).log(), count, generator).exp()
    w = (width * (area * aspect).sqrt()).round().clamp(1, width)
    return w, (height * (area / aspect).sqrt()).round().clamp(1, height)


def _scar_size(count: int, height: int, width: int, scar_scale: float, generator: Source) -> tuple[Tensor, Tensor]:
    """Widths and heights of scars."""
    w = (_uniform(*SCAR_WIDTH, count, generator) * scar_scale).round().clamp(1, width)
    return w, (_uniform(*SCAR_LENGTH, count, generator) * scar_scale).round().clamp(1, height)


def _softened(w: Tensor, h: Tensor, height: int, width: int, generator: Source) -> dict[str, Tensor]:
    """Boxes of rectangles turned any way, around some of each a soft edge, half of it inside the given size.

    Defects have both kinds of edges, and cuts alone would be all that a network learns to see; without any, it misses
    what is scratched or cut.
    """
    soft = _uniform(*SOFT_EDGE, len(w), generator) * torch.minimum(w, h)
    soft *= _rand((len(w),), generator) < SOFT_SHARE
    w, h = ((size + soft).round().clamp(max=side) for size, side in ((w, width), (h, height)))
    return _turned(w, h, _uniform(-180.0, 180.0, len(w), generator), height, width, generator) | {"soft": soft}


def _turned(w: Tensor, h: Tensor, angle: Tensor, height: int, width: int, generator: Source) -> dict[str, Tensor]:
    """Boxes of rotated rectangles, from anywhere to anywhere in the image."""
    count = len(w)
    x, y = whole_numbers(width - w, generator), whole_numbers(height - h, generator)
    half_w, half_h = (e.clamp(max=side / 2) for e, side in zip(half_extents(w, h, angle), (width, height)))
    to_x, to_y = _uniform(half_w, width - half_w, count, generator), _uniform(half_h, height - half_h, count, generator)
    return {"width": w, "height": h, "source_x": x, "source_y": y, "center_x": to_x, "center_y": to_y, "angle": angle}


def draw_either(count: int, height: int, width: int, scar_scale: float, generator: Source) -> dict[str, Tensor]:
    """Patches and scars in equal parts: one class of both, drawn per image, so that the classes stay balanced."""
    patch, scar = (draw(count, height, width, scar_scale, generator) for draw in (draw_patch, draw_scar))
    is_scar = _rand((count,), generator) < 0.5
    return {name: torch.where(is_scar, scar[name], patch[name]) for name in patch}


def _uniform(low: float | Tensor, high: float | Tensor, count: int, generator: Source) -> Tensor:
    return low + (high - low) * _rand((count,), generator)


def whole_numbers(high: Tensor, generator: Source) -> Tensor:
    """Whole numbers from 0 to ``high``, both included, as float32."""
    draw = (_rand(high.shape, generator) * (high + 1)).floor()
    return torch.minimum(draw, high)  # float32 rounding could reach high + 1


def draw_jitter(count: int, amount: float, generator: Source) -> JitterParams | None:
    """Draw factors uniformly, at most ``amount`` (0 to 0.5) from those that change nothing, and orders all equally
    likely. None, and nothing is drawn, if the amount is 0. generator: on the CPU."""
    if not amount:
        return None
    factors = (2 * _rand((count, 4), generator) - 1) * amount
    factors[:, :HUE] += 1
    order = _rand((count, 4), generator).argsort(dim=1, stable=True)
    return JitterParams(factors, order)


@dataclass(frozen=True)
class View:
    """A way to alter an image: draw(count, height, width, scar_scale, generator) gives the boxes, as ``draw_scar``, and
    act(target, images, params) changes copies of the images, as ``paste_``. "image", always the first, has neither."""

    draw: Callable[[int, int, int, float, Source], dict[str, Tensor]] | None
    paste: Callable[[Tensor, Tensor, PasteParams], object] | None
    title: str  # in previews and legends
    color: str  # likewise, hex
    source_anywhere: bool = False  # patches of a crop come from anywhere in the image; else from the crop


VIEWS = {
    "image": View(None, None, "image view", "#2a6fbb"),
    "patch": View(draw_patch, paste_, "CutPaste", "#e8a33d"),
    "scar": View(draw_scar, paste_, "CutPaste-Scar", "#6aa84f"),
    "patch or scar": View(draw_either, paste_, "CutPaste or Scar", "#8e5ea2"),
    "soft patch": View(draw_soft_patch, paste_, "soft CutPaste", "#b5651d", source_anywhere=True),
    "soft scar": View(draw_soft_scar, paste_, "soft Scar", "#2f7f79", source_anywhere=True),
}


def pasted_views(variant: str) -> list[View]:
    """Return the views of a variant after the first, the image. Raises ValueError for an unknown variant or view."""
    if variant not in VARIANTS:
        raise ValueError(f"unknown variant {variant!r}: choose one of {', '.join(VARIANTS)}")
    for place, name in enumerate(VARIANTS[variant].views):
        known = [other for other in VIEWS if (other == "image") == (place == 0)]
        if name not in known:
            raise ValueError(f"variant {variant!r}: view {place} is {name!r}: choose one of {', '.join(known)}")
    return [VIEWS[name] for name in VARIANTS[variant].views[1:]]


@dataclass(frozen=True)
class ViewParams:
    """Everything random about one batch: the base augmentation and one paste per further view."""

    variant: str
    height: int  # of the images it was drawn for
    width: int
    shift: Tensor | None  # (B, 2) int64, pixels down and right
    jitter: JitterParams | None
    pastes: tuple[PasteParams, ...]  # one for each view after the first
    corner: Tensor | None = None  # (B, 2) int64, top and left of the square crop that the pastes lie in
    patch_size: int | None = None  # its side
    source: Tensor | None = None  # (B, 2) int64, as corner: the crop that patches from elsewhere are cut from


# A batch: drawing, then acting ------------------------------------------------------------------------------------


def sample_params(
    variant: str,
    batch_size: int,
    height: int,
    width: int,
    generator: Source,
    *,
    translate: float = 0.04,
    jitter: float = 0.1,
    patch_jitter: float = 0.1,
    patch_size: int | None = None,
) -> ViewParams:
    """Draw the parameters of one batch of views.

    translate: largest shift of the base augmentation, a fraction of height and width. jitter, patch_jitter: largest
    change of brightness, contrast, saturation (around 1) and hue (in turns; at most 0.5) of the whole image and of
    the patch. The paper gives 0.1 for the patch and no amount for the base augmentation. patch_size: side of a square
    crop of each image, at a random place, that CutPaste then acts in (None: in the whole image).
    generator: on the CPU, so that a seed gives the same parameters whatever the device.
    """
    further = pasted_views(variant)
    if not 0 <= translate < 1:
        raise ValueError(f"translate is a fraction of the image, 0 <= translate < 1, not {translate}")
    for name, value in (("jitter", jitter), ("patch_jitter", patch_jitter)):
        if not 0 <= value <= 0.5:
            raise ValueError(f"{name} lies in [0, 0.5], not {value}")
    if patch_size is not None and not 1 <= patch_size <= min(height, width):
        raise ValueError(f"patch_size lies in [1, {min(height, width)}], the image's shorter side, not {patch_size}")
    largest = torch.tensor([int(translate * height), int(translate * width)])
    shift = whole_numbers((2 * largest).expand(batch_size, 2), generator).long() - largest if translate else None
    base = draw_jitter(batch_size, jitter, generator)
    corner, source, size, scar_scale = None, None, (height, width), min(height, width) / SCAR_IMAGE_SIZE
    if patch_size is not None:
        corner = _corner(batch_size, height, width, patch_size, generator)
        if any(view.source_anywhere for view in further):
            source = _corner(batch_size, height, width, patch_size, generator)
        size = patch_size, patch_size
        # A scar in a crop is as long as in the whole image, but no longer against the crop than in the paper's
        scar_scale = min(scar_scale, patch_size / CROP_SIZE)
    pastes = []
    for view in further:
        boxes = view.draw(batch_size, *size, scar_scale, generator)
        pastes.append(PasteParams(**boxes, jitter=draw_jitter(batch_size, patch_jitter, generator)))
    return ViewParams(variant, height, width, shift, base, tuple(pastes), corner, patch_size, source)


def config_params(config: Config, count: int, generator: Source) -> ViewParams:
    """Draw the parameters of the views of ``count`` images as the settings say, see ``sample_params``."""
    patch_size = config.patches.patch_size if config.patches else None
    amounts = {"translate": config.translate, "jitter": config.jitter, "patch_jitter": config.patch_jitter}
    return sample_params(config.variant, count, *config.size, generator, **amounts, patch_size=patch_size)


def _corner(count: int, height: int, width: int, side: int, generator: Source) -> Tensor:
    """Draw (top, left) of squares anywhere in images: (count, 2) int64."""
    room = [torch.full((count,), float(size - side)) for size in (height, width)]
    return torch.stack([whole_numbers(high, generator) for high in room], 1).long()


def make_views(images: Tensor, params: ViewParams) -> tuple[Tensor, Tensor]:
    """Make the views of images (B, 3, H, W), uint8 in 0..255 or float in [0, 1], never changed.

    Returns views (V*B, 3, H, W), float32 in [0, 1] and channels_last, view after view in the variant's order, and
    labels (V*B,) int64; with a patch size P views (V*B, 3, P, P). Raises ValueError for images that params do not fit.
    """
    return make_views_and_sample(images, params)[:2]


def make_views_and_sample(images: Tensor, params: ViewParams) -> tuple[Tensor, Tensor, Tensor]:
    """Return what ``make_views`` gives, and pixels of the augmented whole images whose statistics stand for theirs:
    (B, 3, h, w), of crops a sample."""
    if params.corner is not None:
        base, source, whole = augment_crops(images, params)
        views, labels = cut_paste(base, source, params)
    else:
        size = ((1 + len(params.pastes)) * len(images), 3, params.height, params.width)
        views = torch.empty(size, device=images.device, memory_format=torch.channels_last)
        whole = augment(images, params, views[: len(images)])
        views, labels = cut_paste(whole, None, params, views)
    return views, labels, whole


def augment(images: Tensor, params: ViewParams, out: Tensor | None = None) -> Tensor:
    """Return the base augmentation alone, of whole images (B, 3, H, W): float32 in [0, 1], channels_last; ``out`` if
    given."""
    _check_fit(images, params)
    out = torch.empty(images.shape, device=images.device, memory_format=torch.channels_last) if out is None else out
    for part in _parts(len(images), BASES_AT_ONCE, images.device):
        base = to_float(images[part] if params.shift is None else translate(images[part], params.shift[part]))
        out[part] = base if params.jitter is None else color_jitter(base, rows(params.jitter, part))
    return out


def augment_crops(images: Tensor, params: ViewParams) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return the base augmentation of the squares drawn for images (B, 3, H, W), (B, 3, P, P) float32 each: those that
    become views (section 2.4), and those that patches from elsewhere are cut from, if there are such.

    The third is an even sample of each whole image's augmented pixels, (B, 3, 1, n), whose statistics stand for the
    image's: the color jitter of a whole image would cost more than all else that is done to the crops.
    """
    _check_fit(images, params)
    count, side, size = len(images), params.patch_size, (params.height, params.width)
    start, step, counts = _sample_grid(*size)
    squares = [(corner, (side, side), 1) for corner in (params.corner, params.source) if corner is not None]
    places = []
    for corner, shape, apart in (*squares, (torch.full((count, 2), start), counts, step)):
        corner = corner if params.shift is None else corner - params.shift
        places.append(_places(corner.to(images.device, non_blocking=True), shape, apart, size))
    pixels = to_float(images.flatten(2).gather(2, torch.cat(places, 1)[:, None].expand(-1, 3, -1)))
    pixels = pixels[:, :, None]  # (B, 3, 1, pixels)
    if params.jitter is not None:
        sampled = torch.zeros(pixels.shape[-1], dtype=torch.bool, device=pixels.device)
        sampled[-places[-1].shape[1] :] = True  # the contrast of all refers to the whole image's mean gray
        pixels = color_jitter(pixels, params.jitter, sampled.expand(count, 1, 1, -1))
    *parts, sample = pixels.split([piece.shape[1] for piece in places], 3)
    base, *source = (part.view(count, 3, side, side) for part in parts)
    return base, source[0] if source else None, sample


def _sample_grid(height: int, width: int) -> tuple[int, int, tuple[int, int]]:
    """Return the even sample of an image's pixels: first row and column, step, number of rows and of columns."""
    step = max(1, min(height, width) // SAMPLE_SIDE)
    return step // 2, step, tuple(len(range(step // 2, side, step)) for side in (height, width))


def _places(corner: Tensor, shape: Sequence[int], step: int, size: tuple[int, int]) -> Tensor:
    """Return where the pixels of rectangles in translated images come from, as numbers of an image's pixels: (B, h *
    w).

    corner (B, 2) int64, less the translation; shape (h, w), a pixel every ``step``; size (H, W) of the images. What
    ``translate`` does, for these pixels alone.
    """
    down, across = (
        _reflected(corner[:, axis, None] + step * torch.arange(shape[axis], device=corner.device), side)
        for axis, side in enumerate(size)
    )
    return (down[:, :, None] * size[1] + across[:, None]).flatten(1)


def _reflected(places: Tensor, size: int) -> Tensor:
    """Return places along an axis, those beyond the border as reflections at the border pixel."""
    return size - 1 - (size - 1 - places.abs()).abs()


def cut_paste(
    base: Tensor, source: Tensor | None, params: ViewParams, views: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return views and labels, as ``make_views`` does, of images or crops after the base augmentation. source: of
    crops, see ``augment_crops``. views: room for them (V*B, 3, H, W), channels_last, the first B being the base."""
    labels = torch.arange(1 + len(params.pastes), device=base.device).repeat_interleave(len(base))
    if views is None:
        views = torch.empty((len(labels), *base.shape[1:]), device=base.device, memory_format=torch.channels_last)
        views[: len(base)] = base
        base = views[: len(base)]
    if source is not None:
        source = source.contiguous(memory_format=torch.channels_last)
    for view, target, boxes in zip(
        pasted_views(params.variant), views.split(len(base))[1:], params.pastes, strict=True
    ):
        target.copy_(base)
        images = source if view.source_anywhere and source is not None else base
        for part in _parts(len(base), PASTES_AT_ONCE, base.device):
            view.paste(target[part], images[part], rows(boxes, part))
    return views, labels


def visible(views: Tensor, params: ViewParams, whole: Tensor) -> Tensor:
    """Return whether each of the views (V*B, 3, H, W) shows something: (V*B,) bool; for the unmodified view True if any
    of its pasted views does.

    A pasted view in which nothing can be seen to differ from the image is no anomaly: smooth surfaces and backgrounds
    give many, and each is a wrong label. whole: pixels of the augmented whole images, (B, 3, h, w), or a sample.
    """
    areas = [(boxes.width * boxes.height).to(views.device, non_blocking=True) for boxes in params.pastes]
    return _visible(views, areas, whole)


def _visible(views: Tensor, areas: Sequence[Tensor], whole: Tensor) -> Tensor:
    """Return what ``visible`` does, for pasted rectangles of these areas, (B,) on the device for each view after the
    first."""
    base, *further = views.chunk(1 + len(areas))
    least = VISIBLE_CHANGE * whole.flatten(1).std(1, correction=0).clamp(min=1e-3)[:, None, None]
    results = []
    for view, area in zip(further, areas):
        changed = ((view - base).abs().amax(1) > least).sum((1, 2))
        results.append(changed >= (VISIBLE_SHARE * area).clamp(max=VISIBLE_PIXELS))
    return torch.cat([torch.stack(results).any(0), *results])


def invisible_shares(images: Tensor, config: Config, numbers: Tensor | None = None) -> dict[str, float]:
    """Return the share, in [0, 1], of each kind of pasted view that shows nothing (see ``visible``), by its name.

    images: (N, 3, H, W) uint8, of which SURVEYED_VIEWS are taken, evenly spaced. numbers: the images that may be taken,
    (n,) int64; default: all.
    """
    numbers = torch.arange(len(images)) if numbers is None else numbers
    numbers = numbers[torch.arange(SURVEYED_VIEWS) * len(numbers) // SURVEYED_VIEWS]
    generator, shown = torch.Generator().manual_seed(config.seed), []
    for part in numbers.split(SURVEY_BATCH):
        params = config_params(config, len(part), generator)
        views, _, whole = make_views_and_sample(images[part], params)
        shown.append(visible(views, params, whole).view(-1, len(part)))
    shares = 1 - torch.cat(shown, 1).float().mean(1)
    return dict(zip(VARIANTS[params.variant].views[1:], shares[1:].tolist()))


def _check_fit(images: Tensor, params: ViewParams) -> None:
    drawn_for = (len(params.pastes[0].width), 3, params.height, params.width)
    if tuple(images.shape) != drawn_for:
        raise ValueError(f"parameters drawn for images {drawn_for}, got {tuple(images.shape)}")


def _parts(count: int, batch_size: int, device: torch.device) -> list[slice]:
    """A batch in parts that stay in a processor's cache from the first operation to the last; a GPU takes it whole."""
    step = batch_size if device.type == "cpu" else count
    return [slice(start, start + step) for start in range(0, count, step)]


def rows(params: Any, part: slice | Tensor) -> Any:
    """Return parameters, of any class, of some images of the batch: every tensor indexed by ``part``, the rest as it
    is."""
    if isinstance(params, Tensor):
        return params[part]
    if isinstance(params, tuple):
        return tuple(rows(value, part) for value in params)
    return type(params)(*[rows(value, part) for value in vars(params).values()]) if is_dataclass(params) else params


# The same for a GPU -----------------------------------------------------------------------------------------------


def packable(variant: str) -> bool:
    """Return whether ``make_packed_views`` knows how to make every view of a variant."""
    return all(view.paste is paste_ for view in pasted_views(variant))


def pack_params(params: ViewParams) -> Tensor:
    """Return all that was drawn for a batch as a row of numbers for each image, (B, K) float32: one copy to the
    device."""
    count = len(params.pastes[0].width)
    neutral = JitterParams(torch.tensor([1.0, 1.0, 1.0, 0.0]).expand(count, 4), torch.arange(4).expand(count, 4))
    jitters = [neutral if jitter is None else jitter for jitter in (params.jitter, *(p.jitter for p in params.pastes))]
    factors, order = (torch.cat([getattr(jitter, name) for jitter in jitters]) for name in ("factors", "order"))
    base, *others = jitter_numbers(JitterParams(factors, order)).split(count)
    corners = [
        torch.zeros(count, 2) if corner is None else corner.float()
        for corner in (params.shift, params.corner, params.source)
    ]
    pastes = [part for boxes, jitter in zip(params.pastes, others) for part in (paste_numbers(boxes), jitter)]
    return torch.cat([*corners, base, *pastes], 1)


def make_packed_views(
    images: Tensor, numbers: Tensor, variant: str, patch_size: int | None = None, with_visible: bool = False
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Make the views of images (B, 3, H, W) uint8 by ``pack_params``'s numbers (B, K), on the device of both.

    Returns views (V*B, 3, H, W), as ``make_views``; the third result of ``augment_crops``, None without a patch size;
    what ``visible`` gives, None unless asked for. No value of ``numbers`` reaches the host, and none decides which
    operations run or on how many pixels.
    """
    further, size = pasted_views(variant), tuple(images.shape[2:])
    widths = [2, 2, 2, JITTER_NUMBERS, (PASTE_NUMBERS + JITTER_NUMBERS) * len(further)]
    shift, corner, source_corner, base_jitter, pastes = numbers.split(widths, 1)
    # All views after the first as one batch, view after view
    pastes = pastes.unflatten(1, (len(further), -1)).transpose(0, 1).flatten(0, 1)
    boxes, jitter = pastes.split([PASTE_NUMBERS, JITTER_NUMBERS], 1)

    # Pixels of the squares, of those that patches come from, of the sample; or the whole image, which is all three
    shape = size if patch_size is None else (patch_size, patch_size)
    pieces = [(corner, shape, 1)]
    if patch_size is not None:
        anywhere = any(view.source_anywhere for view in further)
        start, step, counts = _sample_grid(*size)
        pieces += [(source_corner, shape, 1)] * anywhere + [(torch.full_like(corner, start), counts, step)]
    places = [_places((corner - shift).long(), *piece, size) for corner, *piece in pieces]
    here = torch.cat(places, 1)
    pixels = tuple(plane.gather(1, here).float() / 255 for plane in images.flatten(2).unbind(1))
    sampled = slice(here.shape[1] - places[-1].shape[1], None)
    pixels = jitter_planes(pixels, base_jitter, tuple(plane[:, sampled] for plane in pixels))

    count = math.prod(shape)
    base = tuple(plane[:, :count] for plane in pixels)
    elsewhere = tuple(plane[:, count : 2 * count] for plane in pixels)
    sources = [elsewhere if view.source_anywhere and len(pieces) == 3 else base for view in further]
    targets, sources = (tuple(map(torch.cat, zip(*parts))) for parts in ([base] * len(further), sources))
    pasted = paste_planes(targets, sources, shape[1], boxes, jitter)
    views = torch.stack([torch.cat(planes) for planes in zip(base, pasted)], 2)  # (V*B, H*W, 3)
    views = views.unflatten(1, shape).permute(0, 3, 1, 2)
    whole = torch.stack([plane[:, sampled] for plane in pixels], 1)[:, :, None]
    seen = None
    if with_visible:
        seen = _visible(views, (boxes[:, 0] * boxes[:, 1]).chunk(len(further)), whole)
    return views, whole if patch_size is not None else None, seen
