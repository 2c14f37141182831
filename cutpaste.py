"""CutPaste augmentations, batched on tensors of any device.

Owns the base augmentation (translation, color jitter), the crops of a patch model, CutPaste and CutPaste-Scar, and the
tables ``VIEWS`` and ``VARIANTS``. ``make_params`` draws every random number, on the CPU; ``apply`` acts on the images'
device and changes no input. For a patch model ``augment``, ``crop`` and ``cut_paste`` are the three parts of ``apply``.
Source: Li, Sohn, Yoon, Pfister, "CutPaste", CVPR 2021 (arXiv 2104.04015), sections 2.2, 2.4, A.1, A.2 and A.5.
"""

from collections.abc import Callable
from dataclasses import dataclass, is_dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from color import JitterParams, color_jitter, draw_jitter, to_float

AREA = (0.02, 0.15)  # patch area as a fraction of the image's (A.2)
ASPECT = (0.3, 3.3)  # patch width over height, relative to the image's (A.2)
SCAR_WIDTH, SCAR_LENGTH = (2.0, 16.0), (10.0, 25.0)  # pixels of an image of SCAR_IMAGE_SIZE (A.2)
SCAR_ANGLE = 45.0  # degrees, either way (A.2)
SCAR_IMAGE_SIZE = 256
CROP_SIZE = 64  # the paper's crops of a patch model, of images of SCAR_IMAGE_SIZE (2.4)
BASES_AT_ONCE, PASTES_AT_ONCE = 1, 16  # images that fit into a processor's cache with all that is computed of them


@dataclass(frozen=True)
class PasteParams:
    """One pasted rectangle per image, all (B,). Pixels; x to the right, y down; a pixel's center is at +0.5."""

    width: Tensor  # of the rectangle before rotation, whole numbers
    height: Tensor
    source_x: Tensor  # left edge of the upright source box, whole numbers
    source_y: Tensor  # top edge
    center_x: Tensor  # of the (rotated) target box
    center_y: Tensor
    angle: Tensor  # degrees, clockwise as seen
    jitter: JitterParams | None  # None leaves the patch's colors alone


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


def rows(params: Any, part: slice | Tensor) -> Any:
    """Parameters, of any class, of some images of the batch: every tensor indexed by ``part``, the rest as it is."""
    if isinstance(params, Tensor):
        return params[part]
    if isinstance(params, tuple):
        return tuple(rows(each, part) for each in params)
    return type(params)(*[rows(each, part) for each in vars(params).values()]) if is_dataclass(params) else params


# Views: the boxes drawn, and what is done with them ---------------------------------------------------------------


def draw_patch(count: int, height: int, width: int, scar_scale: float, generator: Generator) -> dict[str, Tensor]:
    """Large upright patches. The aspect ratio is relative to the image's, so that a patch always fits, and log-uniform,
    so that width and height are exchangeable: the paper, all of square images, does not say how it is distributed."""
    area = _uniform(*AREA, count, generator)
    aspect = _uniform(*torch.tensor(ASPECT).log(), count, generator).exp()
    w = (width * (area * aspect).sqrt()).round().clamp(1, width)
    h = (height * (area / aspect).sqrt()).round().clamp(1, height)
    x, y, angle = _whole(width - w, generator), _whole(height - h, generator), torch.zeros(count)
    to_x, to_y = _whole(width - w, generator) + w / 2, _whole(height - h, generator) + h / 2
    return {"width": w, "height": h, "source_x": x, "source_y": y, "center_x": to_x, "center_y": to_y, "angle": angle}


def draw_scar(count: int, height: int, width: int, scar_scale: float, generator: Generator) -> dict[str, Tensor]:
    """Thin rotated rectangles whose bounding box lies inside the image. scar_scale: 1 means the paper's pixels."""
    w = (_uniform(*SCAR_WIDTH, count, generator) * scar_scale).round().clamp(1, width)
    h = (_uniform(*SCAR_LENGTH, count, generator) * scar_scale).round().clamp(1, height)
    angle = _uniform(-SCAR_ANGLE, SCAR_ANGLE, count, generator)
    x, y = _whole(width - w, generator), _whole(height - h, generator)
    half_w, half_h = (e.clamp(max=side / 2) for e, side in zip(_half_extents(w, h, angle), (width, height)))
    to_x, to_y = _uniform(half_w, width - half_w, count, generator), _uniform(half_h, height - half_h, count, generator)
    return {"width": w, "height": h, "source_x": x, "source_y": y, "center_x": to_x, "center_y": to_y, "angle": angle}


def draw_either(count: int, height: int, width: int, scar_scale: float, generator: Generator) -> dict[str, Tensor]:
    """Patches and scars in equal parts: one class of both, drawn per image, so that the classes stay balanced."""
    patch, scar = (draw(count, height, width, scar_scale, generator) for draw in (draw_patch, draw_scar))
    is_scar = torch.rand(count, generator=generator) < 0.5
    return {name: torch.where(is_scar, scar[name], patch[name]) for name in patch}


def _uniform(low: float | Tensor, high: float | Tensor, count: int, generator: Generator) -> Tensor:
    return low + (high - low) * torch.rand(count, generator=generator)


def _whole(high: Tensor, generator: Generator) -> Tensor:
    """Whole numbers from 0 to ``high``, both included, as float32."""
    draw = (torch.rand(high.shape, generator=generator) * (high + 1)).floor()
    return torch.minimum(draw, high)  # float32 rounding could reach high + 1


def _half_extents(width: Tensor, height: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
    """Half the width and height of the upright box around a rotated rectangle."""
    cos, sin = angle.deg2rad().cos().abs(), angle.deg2rad().sin().abs()
    return (width * cos + height * sin) / 2, (width * sin + height * cos) / 2


def paste(images: Tensor, params: PasteParams) -> Tensor:
    """Copy each image's source box, colors jittered, to its rotated target box: (B, 3, H, W) float in [0, 1]."""
    images = images.contiguous(memory_format=torch.channels_last)
    return paste_(images.clone(), images, params)


def paste_(target: Tensor, images: Tensor, params: PasteParams) -> Tensor:
    """``paste`` into ``target``, a copy of the images, in place; both (B, 3, H, W) in channels_last memory.

    Every pasted pixel is one pixel of the source box (nearest neighbor: interpolation would leave a blur that a
    network learns instead of the cut). Only as many pixels as the largest patch has are worked on.
    """
    (count, _, height, width), device, p = images.shape, images.device, params
    most = int((p.width * p.height).max())  # known on the CPU: the device is not waited for
    half_w, half_h = _half_extents(p.width, p.height, p.angle)
    left, top = (p.center_x - half_w).floor(), (p.center_y - half_h).floor()
    upright = not p.angle.any()
    if not upright:  # the largest target fits a tile of one size
        tile_w, tile_h = min(width, int(half_w.max() * 2) + 2), min(height, int(half_h.max() * 2) + 2)
        left, top = left.clamp(0, width - tile_w), top.clamp(0, height - tile_h)
    turn = p.angle.deg2rad()
    numbers = (left, top, p.source_x, p.source_y, p.width, p.height, p.center_x, p.center_y, turn.cos(), turn.sin())
    numbers = torch.stack(numbers).to(device, non_blocking=True)[:, :, None]  # (10, B, 1): one copy
    left, top, source_x, source_y, w, h = numbers[:6]

    # A pixel's number in the whole batch; with three channels each, rows of a matrix are faster than any index by axes
    pixels, changed = (x.permute(0, 2, 3, 1).view(-1, 3) for x in (images, target))  # (B*H*W, 3)
    first = torch.arange(count, device=device)[:, None] * (height * width)
    each = torch.arange(most, device=device, dtype=torch.float32)[None]  # a patch's pixels, row by row
    inside = each < w * h  # (B, most); a smaller patch repeats its last pixel
    each = torch.minimum(each, w * h - 1)
    y = ((each + 0.5) / w).floor()  # exact, and far faster than the division of whole numbers
    x = each - y * w
    source = first + ((source_y + y) * width + source_x + x).long()
    patch = pixels.index_select(0, source.view(-1))  # (B * most, 3)
    if p.jitter is not None:
        patch = patch.view(count, 1, most, 3).permute(0, 3, 1, 2)  # images one pixel high
        patch = color_jitter(patch, p.jitter, inside[:, None, None]).permute(0, 2, 3, 1).reshape(-1, 3)
    if upright:
        place = first + ((top + y) * width + left + x).long()
    else:
        w, h, center_x, center_y, cos, sin = numbers[4:, ..., None]
        y = top[:, None] + torch.arange(tile_h, device=device)[:, None]  # (B, h, 1)
        x = left[:, None] + torch.arange(tile_w, device=device)  # (B, 1, w)
        dx, dy = x + 0.5 - center_x, y + 0.5 - center_y
        u = cos * dx + sin * dy + w / 2  # position inside the upright rectangle, (B, h, w)
        v = cos * dy - sin * dx + h / 2
        inside = (u >= 0) & (u < w) & (v >= 0) & (v < h)
        u, v = torch.minimum(u.floor().clamp(min=0), w - 1), torch.minimum(v.floor().clamp(min=0), h - 1)
        origin = torch.arange(count, device=device)[:, None, None] * most + (v * w + u).long()
        place = first[:, None] + (y * width + x).long()
        new, covered = patch.index_select(0, origin.view(-1)), pixels.index_select(0, place.view(-1))
        patch = torch.where(inside.view(-1, 1), new, covered)
    changed.index_copy_(0, place.view(-1), patch)
    return target


@dataclass(frozen=True)
class View:
    """A way to alter an image: draw(count, height, width, scar_scale, generator) gives the boxes, as ``draw_scar``, and
    act(target, images, params) changes copies of the images, as ``paste_``. "image", always the first, has neither."""

    draw: Callable[[int, int, int, float, Generator], dict[str, Tensor]] | None
    act: Callable[[Tensor, Tensor, PasteParams], object] | None
    title: str  # in previews and legends
    color: str  # likewise, hex


VIEWS = {
    "image": View(None, None, "image view", "#2a6fbb"),
    "patch": View(draw_patch, paste_, "CutPaste", "#e8a33d"),
    "scar": View(draw_scar, paste_, "CutPaste-Scar", "#6aa84f"),
    "patch or scar": View(draw_either, paste_, "CutPaste or Scar", "#8e5ea2"),
}


@dataclass(frozen=True)
class Variant:
    """A pretext task: the views made of each image. A view's place in ``views`` is its class label."""

    views: tuple[str, ...]
    description: str

    @property
    def num_classes(self) -> int:
        return len(self.views)


VARIANTS = {
    "normal": Variant(("image", "patch"), "normal against CutPaste"),
    "scar": Variant(("image", "scar"), "normal against CutPaste-Scar"),
    "union": Variant(("image", "patch or scar"), "normal against either, drawn per image"),
    "3way": Variant(("image", "patch", "scar"), "normal, CutPaste and CutPaste-Scar as three classes"),
}


def _further(variant: str) -> list[View]:
    """The views of a variant after the first, the image. Raises ValueError for an unknown variant or view."""
    if variant not in VARIANTS:
        raise ValueError(f"unknown variant {variant!r}: choose one of {', '.join(VARIANTS)}")
    for place, name in enumerate(VARIANTS[variant].views):
        known = [other for other in VIEWS if (other == "image") == (place == 0)]
        if name not in known:
            raise ValueError(f"variant {variant!r}: view {place} is {name!r}: choose one of {', '.join(known)}")
    return [VIEWS[name] for name in VARIANTS[variant].views[1:]]


# A batch: drawing, then acting ------------------------------------------------------------------------------------


def make_params(
    variant: str,
    batch_size: int,
    height: int,
    width: int,
    generator: Generator,
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
    further = _further(variant)
    if not 0 <= translate < 1:
        raise ValueError(f"translate is a fraction of the image, 0 <= translate < 1, not {translate}")
    for name, value in (("jitter", jitter), ("patch_jitter", patch_jitter)):
        if not 0 <= value <= 0.5:
            raise ValueError(f"{name} lies in [0, 0.5], not {value}")
    if patch_size is not None and not 1 <= patch_size <= min(height, width):
        raise ValueError(f"patch_size lies in [1, {min(height, width)}], the image's shorter side, not {patch_size}")
    most = torch.tensor([int(translate * height), int(translate * width)])
    shift = _whole((2 * most).expand(batch_size, 2), generator).long() - most if translate else None
    base = draw_jitter(batch_size, jitter, generator)
    corner, size, scar_scale = None, (height, width), min(height, width) / SCAR_IMAGE_SIZE
    if patch_size is not None:
        corner = torch.stack([_whole(torch.full((batch_size,), side - patch_size), generator) for side in size], 1)
        corner, size = corner.long(), (patch_size, patch_size)
        # A scar in a crop is as long as in the whole image, but no longer against the crop than in the paper's
        scar_scale = min(scar_scale, patch_size / CROP_SIZE)
    pastes = []
    for view in further:
        boxes = view.draw(batch_size, *size, scar_scale, generator)
        pastes.append(PasteParams(**boxes, jitter=draw_jitter(batch_size, patch_jitter, generator)))
    return ViewParams(variant, height, width, shift, base, tuple(pastes), corner, patch_size)


def apply(images: Tensor, params: ViewParams) -> tuple[Tensor, Tensor]:
    """Make the views of images (B, 3, H, W), uint8 in 0..255 or float in [0, 1], never changed.

    Returns views (V*B, 3, H, W), float32 in [0, 1] and channels_last, view after view in the variant's order, and
    labels (V*B,) int64; with a patch size P views (V*B, 3, P, P). Raises ValueError for images that params do not fit.
    """
    if params.corner is not None:
        return cut_paste(crop(augment(images, params), params), params)
    size = ((1 + len(params.pastes)) * len(images), 3, params.height, params.width)
    views = torch.empty(size, device=images.device, memory_format=torch.channels_last)
    return cut_paste(augment(images, params, views[: len(images)]), params, views)


def augment(images: Tensor, params: ViewParams, out: Tensor | None = None) -> Tensor:
    """The base augmentation alone, of whole images (B, 3, H, W): float32 in [0, 1], channels_last; ``out`` if given."""
    drawn_for = (len(params.pastes[0].width), 3, params.height, params.width)
    if tuple(images.shape) != drawn_for:
        raise ValueError(f"parameters drawn for images {drawn_for}, got {tuple(images.shape)}")
    out = torch.empty(images.shape, device=images.device, memory_format=torch.channels_last) if out is None else out
    for part in _parts(len(images), BASES_AT_ONCE, images.device):
        base = to_float(images[part] if params.shift is None else translate(images[part], params.shift[part]))
        out[part] = base if params.jitter is None else color_jitter(base, rows(params.jitter, part))
    return out


def crop(images: Tensor, params: ViewParams) -> Tensor:
    """The square that was drawn for each image (B, 3, H, W): (B, 3, P, P) (section 2.4)."""
    windows = images.unfold(2, params.patch_size, 1).unfold(3, params.patch_size, 1)  # (B, 3, H-P+1, W-P+1, P, P)
    top, left = params.corner.to(images.device, non_blocking=True).unbind(1)
    return windows[torch.arange(len(images), device=images.device), :, top, left]


def cut_paste(base: Tensor, params: ViewParams, views: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Views and labels, as ``apply`` gives them, of images or crops after the base augmentation. views: room for them
    (V*B, 3, H, W), channels_last, the first B being the base."""
    labels = torch.arange(1 + len(params.pastes), device=base.device).repeat_interleave(len(base))
    if views is None:
        views = torch.empty((len(labels), *base.shape[1:]), device=base.device, memory_format=torch.channels_last)
        views[: len(base)] = base
        base = views[: len(base)]
    for view, target, boxes in zip(_further(params.variant), views.split(len(base))[1:], params.pastes, strict=True):
        target.copy_(base)
        for part in _parts(len(base), PASTES_AT_ONCE, base.device):
            view.act(target[part], base[part], rows(boxes, part))
    return views, labels


def _parts(count: int, at_once: int, device: torch.device) -> list[slice]:
    """A batch in parts that stay in a processor's cache from the first operation to the last; a GPU takes it whole."""
    step = at_once if device.type == "cpu" else count
    return [slice(start, start + step) for start in range(0, count, step)]


def translate(images: Tensor, shift: Tensor) -> Tensor:
    """Move image b by shift[b] = (down, right) pixels; what comes in at the border is the image's reflection (the
    border pixel itself is not repeated). The base augmentation's first half, before CutPaste sees the image (A.1)."""
    height, width = images.shape[-2:]
    most = shift.abs().amax(0)
    for axis, margin in zip((2, 3), most.tolist()):  # known on the CPU; torch's reflection_pad takes no uint8
        before, after = images.narrow(axis, 1, margin), images.narrow(axis, images.shape[axis] - 1 - margin, margin)
        images = torch.cat([before.flip(axis), images, after.flip(axis)], axis)
    windows = images.unfold(2, height, 1).unfold(3, width, 1)  # (B, 3, 2 * most[0] + 1, 2 * most[1] + 1, H, W)
    top, left = (most - shift).to(images.device, non_blocking=True).unbind(1)
    return windows[torch.arange(len(images), device=images.device), :, top, left]
