"""Patches: the boxes that are drawn, and the pasting, batched on tensors of any device.

Owns what a patch and a scar are (``draw_patch``, ``draw_scar``, ...), the parameters of a pasted rectangle, ``paste``.
Every random number is drawn on the CPU; pasting happens on the images' device.
Source: Li, Sohn, Yoon, Pfister, "CutPaste", CVPR 2021 (arXiv 2104.04015), sections 2.2 and A.2.
"""

from dataclasses import dataclass, is_dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from color import JitterParams, color_jitter

AREA = (0.02, 0.15)  # patch area as a fraction of the image's (A.2)
ASPECT = (0.3, 3.3)  # patch width over height, relative to the image's (A.2)
SCAR_WIDTH, SCAR_LENGTH = (2.0, 16.0), (10.0, 25.0)  # pixels of an image of SCAR_IMAGE_SIZE (A.2)
SCAR_ANGLE = 45.0  # degrees, either way (A.2)
SCAR_IMAGE_SIZE = 256
SOFT_EDGE = (0.05, 0.5)  # width of a soft edge as a fraction of the patch's shorter side
SOFT_SHARE = 0.5  # of the patches of the soft views that have one


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
    soft: Tensor | None = None  # over how many pixels inside the rectangle it fades in, 0 a hard cut; None: all hard


def rows(params: Any, part: slice | Tensor) -> Any:
    """Parameters, of any class, of some images of the batch: every tensor indexed by ``part``, the rest as it is."""
    if isinstance(params, Tensor):
        return params[part]
    if isinstance(params, tuple):
        return tuple(rows(each, part) for each in params)
    return type(params)(*[rows(each, part) for each in vars(params).values()]) if is_dataclass(params) else params


# Drawing ----------------------------------------------------------------------------------------------------------


def draw_patch(count: int, height: int, width: int, scar_scale: float, generator: Generator) -> dict[str, Tensor]:
    """Large upright patches."""
    w, h = _patch_size(count, height, width, generator)
    x, y, angle = whole_numbers(width - w, generator), whole_numbers(height - h, generator), torch.zeros(count)
    to_x, to_y = whole_numbers(width - w, generator) + w / 2, whole_numbers(height - h, generator) + h / 2
    return {"width": w, "height": h, "source_x": x, "source_y": y, "center_x": to_x, "center_y": to_y, "angle": angle}


def draw_scar(count: int, height: int, width: int, scar_scale: float, generator: Generator) -> dict[str, Tensor]:
    """Thin rotated rectangles whose bounding box lies inside the image. scar_scale: 1 means the paper's pixels."""
    w, h = _scar_size(count, height, width, scar_scale, generator)
    return _turned(w, h, _uniform(-SCAR_ANGLE, SCAR_ANGLE, count, generator), height, width, generator)


def draw_soft_patch(count: int, height: int, width: int, scar_scale: float, generator: Generator) -> dict[str, Tensor]:
    """Patches of the same sizes, turned any way, half of them with soft edges. In an image that is not square, a long
    one that is turned too far to fit sticks out of it."""
    return _softened(*_patch_size(count, height, width, generator), height, width, generator)


def draw_soft_scar(count: int, height: int, width: int, scar_scale: float, generator: Generator) -> dict[str, Tensor]:
    """Scars of the same sizes, turned any way, half of them with soft edges."""
    return _softened(*_scar_size(count, height, width, scar_scale, generator), height, width, generator)


def _patch_size(count: int, height: int, width: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Widths and heights of patches. The aspect ratio is relative to the image's, so that a patch always fits, and
    log-uniform, so that both are exchangeable: the paper, all of square images, does not say how it is distributed."""
    area = _uniform(*AREA, count, generator)
    aspect = _uniform(*torch.tensor(ASPECT).log(), count, generator).exp()
    w = (width * (area * aspect).sqrt()).round().clamp(1, width)
    return w, (height * (area / aspect).sqrt()).round().clamp(1, height)


def _scar_size(count: int, height: int, width: int, scar_scale: float, generator: Generator) -> tuple[Tensor, Tensor]:
    """Widths and heights of scars."""
    w = (_uniform(*SCAR_WIDTH, count, generator) * scar_scale).round().clamp(1, width)
    return w, (_uniform(*SCAR_LENGTH, count, generator) * scar_scale).round().clamp(1, height)


def _softened(w: Tensor, h: Tensor, height: int, width: int, generator: Generator) -> dict[str, Tensor]:
    """Boxes of rectangles turned any way, around some of each a soft edge, half of it inside the given size.

    Defects have both kinds of edges, and cuts alone would be all that a network learns to see; without any, it misses
    what is scratched or cut.
    """
    soft = _uniform(*SOFT_EDGE, len(w), generator) * torch.minimum(w, h)
    soft *= torch.rand(len(w), generator=generator) < SOFT_SHARE
    w, h = ((size + soft).round().clamp(max=side) for size, side in ((w, width), (h, height)))
    return _turned(w, h, _uniform(-180.0, 180.0, len(w), generator), height, width, generator) | {"soft": soft}


def _turned(w: Tensor, h: Tensor, angle: Tensor, height: int, width: int, generator: Generator) -> dict[str, Tensor]:
    """Boxes of rotated rectangles, from anywhere to anywhere in the image."""
    count = len(w)
    x, y = whole_numbers(width - w, generator), whole_numbers(height - h, generator)
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


def whole_numbers(high: Tensor, generator: Generator) -> Tensor:
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
    """``paste`` from the images into ``target`` in place; both (B, 3, H, W) in channels_last memory, the target a copy
    of the images, or of those that patches from them are to be pasted into.

    Every pasted pixel is one pixel of the source box (nearest neighbor: interpolation would leave a blur that a
    network learns instead of the cut), blended with what it covers where the edge is soft. Only as many pixels as the
    largest patch has are worked on.
    """
    (count, _, height, width), device, p = images.shape, images.device, params
    most = int((p.width * p.height).max())  # known on the CPU: the device is not waited for
    half_w, half_h = _half_extents(p.width, p.height, p.angle)
    left, top = (p.center_x - half_w).floor(), (p.center_y - half_h).floor()
    upright = p.soft is None and not p.angle.any()
    if not upright:  # the largest target fits a tile of one size
        tile_w, tile_h = min(width, int(half_w.max() * 2) + 2), min(height, int(half_h.max() * 2) + 2)
        left, top = left.clamp(0, width - tile_w), top.clamp(0, height - tile_h)
    turn = p.angle.deg2rad()
    numbers = [left, top, p.source_x, p.source_y, p.width, p.height, p.center_x, p.center_y, turn.cos(), turn.sin()]
    numbers += [] if p.soft is None else [p.soft.clamp(min=1e-3)]
    numbers = torch.stack(numbers).to(device, non_blocking=True)[:, :, None]  # (10 or 11, B, 1): one copy
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
        w, h, center_x, center_y, cos, sin, *soft = numbers[4:, ..., None]
        y = top[:, None] + torch.arange(tile_h, device=device)[:, None]  # (B, h, 1)
        x = left[:, None] + torch.arange(tile_w, device=device)  # (B, 1, w)
        dx, dy = x + 0.5 - center_x, y + 0.5 - center_y
        across, along = cos * dx + sin * dy, cos * dy - sin * dx  # from the upright rectangle's center, (B, h, w)
        u, v = across + w / 2, along + h / 2
        inside = (u >= 0) & (u < w) & (v >= 0) & (v < h)
        u, v = torch.minimum(u.floor().clamp(min=0), w - 1), torch.minimum(v.floor().clamp(min=0), h - 1)
        origin = torch.arange(count, device=device)[:, None, None] * most + (v * w + u).long()
        place = first[:, None] + (y * width + x).long()
        new, covered = patch.index_select(0, origin.view(-1)), changed.index_select(0, place.view(-1))
        if soft:
            share = ((w / 2 - across.abs()) / soft[0]).clamp(0, 1) * ((h / 2 - along.abs()) / soft[0]).clamp(0, 1)
            patch = torch.lerp(covered, new, share.view(-1, 1))
        else:
            patch = torch.where(inside.view(-1, 1), new, covered)
    changed.index_copy_(0, place.view(-1), patch)
    return target
