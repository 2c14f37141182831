"""Pure operations on batches of pixels, on any device: color jitter, translation, pasting, filling.

Every random number is drawn beforehand, in cutpaste.py; nothing here is random, and no input is changed unless the name
ends in ``_``. The color jitter is torchvision's ColorJitter, batched.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from runtime.looks import GRAY

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)  # columns of JitterParams.factors, values of .order


@dataclass(frozen=True)
class JitterParams:
    """Color jitter of B images. ``order[b, k]`` names the operation that image b gets in place k."""

    factors: Tensor  # (B, 4): brightness, contrast, saturation as factors around 1; hue in turns around 0
    order: Tensor  # (B, 4) int64, each row a permutation of 0..3


def to_float(images: Tensor) -> Tensor:
    """Return uint8 in 0..255 as float32 in [0, 1]; floating point passes as float32. Raises ValueError for other
    types."""
    if images.dtype == torch.uint8:
        return images.float().div_(255)
    if not images.is_floating_point():
        raise ValueError(f"images must be uint8 or floating point, got {images.dtype}")
    return images.float()


def color_jitter(images: Tensor, params: JitterParams, mask: Tensor | None = None) -> Tensor:
    """Brightness, contrast, saturation and hue in each image's own order, each equal to torchvision's operation.

    images: (B, 3, H, W) float in [0, 1], not changed. mask: (B, 1, H, W) bool, the pixels whose mean gray the contrast
    refers to (all, if None); the others are changed too and mean nothing.
    """
    device, order = images.device, params.order
    kinds = _blends(params).to(device, torch.float32, non_blocking=True)[..., None, None]  # (3, B, 4, 1, 1)
    images = images.clone(memory_format=torch.contiguous_format)  # by planes, and from here on in place
    for place, present in enumerate(map(set, order.T.tolist())):
        factor, to_mean, to_gray = kinds[:, :, place]  # each (B, 1, 1)
        if present != {HUE}:
            other = _blended_with(images, to_mean, to_gray, mask) if present & {CONTRAST, SATURATION} else None
            images.mul_(factor[:, None])
            if other is not None:
                images.add_(other[:, None])
            images.clamp_(0, 1)
        if HUE in present:
            hue = (order[:, place] == HUE).nonzero()[:, 0]
            turn = params.factors[hue, HUE].to(device, non_blocking=True)
            if len(hue) == len(order):
                rotate_hue_(images, turn)
            else:
                hue = hue.to(device, non_blocking=True)
                images[hue] = rotate_hue_(images[hue], turn)
    return images


def _blends(params: JitterParams) -> Tensor:
    """Return what each place blends: factors of the image itself, of its mean gray and of its gray, (3, B, 4).

    Brightness, contrast and saturation blend the image with another: black, its mean gray, its gray. Factors 1, 0, 0
    change nothing; they stand where the hue is turned.
    """
    order, factors = params.order, params.factors.gather(1, params.order)
    blend = torch.where(order == HUE, torch.ones_like(factors), factors)
    return torch.stack([blend, (1 - blend) * (order == CONTRAST), (1 - blend) * (order == SATURATION)])


def _blended_with(images: Tensor, to_mean: Tensor, to_gray: Tensor, mask: Tensor | None) -> Tensor:
    """Return what is added to the weighted images (B, 3, H, W): their gray and its mean, weighted too: (B, H, W)."""
    red, green, blue = images.unbind(1)
    gray = (red * GRAY[0]).add_(green, alpha=GRAY[1]).add_(blue, alpha=GRAY[2])
    if mask is None:
        mean = gray.mean((1, 2), keepdim=True)
    else:
        mask = mask[:, 0]
        mean = (gray * mask).sum((1, 2), keepdim=True) / mask.sum((1, 2), keepdim=True).clamp(min=1)
    return gray.mul_(to_gray).add_(to_mean * mean)


def rotate_hue_(images: Tensor, turn: Tensor) -> Tensor:
    """Turn the hue of image b (3, H, W) in [0, 1] by turn[b] full turns, value and chroma kept, in place."""
    red, green, blue = images.unbind(1)
    low = torch.minimum(red, green).clamp_(max=blue)
    value = torch.maximum(red, green).clamp_(min=blue)
    chroma = value - low
    # The hue in sixths of the circle, red at 0, green at 2, blue at -2: with the channels as shares of the chroma,
    # 1 + green + blue - red is its distance from red in every sector, and the larger of green and blue its side.
    hue = (green + blue).sub_(red).sub_(low).div_(chroma.clamp(min=1e-12)).add_(1).copysign_(green - blue)
    hue.add_(6 * turn[:, None, None])
    hue.sub_((hue / 6).floor_(), alpha=6)  # into [0, 6]
    # A channel is the smallest far from its own place on the circle, the largest near it, on a slope between
    for channel, end, middle, sign in ((red, low, 3, 1), (green, value, 2, -1), (blue, value, 4, -1)):
        torch.addcmul(end, chroma, (hue - middle).abs_().sub_(1).clamp_(0, 1), value=sign, out=channel)
    return images


def translate(images: Tensor, shift: Tensor) -> Tensor:
    """Move image b by shift[b] = (down, right) pixels; what comes in at the border is the image's reflection (the
    border pixel itself is not repeated). The base augmentation's first half, before CutPaste sees the image (A.1)."""
    height, width = images.shape[-2:]
    largest = shift.abs().amax(0)
    for axis, margin in zip((2, 3), largest.tolist()):  # known on the CPU; torch's reflection_pad takes no uint8
        before, after = images.narrow(axis, 1, margin), images.narrow(axis, images.shape[axis] - 1 - margin, margin)
        images = torch.cat([before.flip(axis), images, after.flip(axis)], axis)
    windows = images.unfold(2, height, 1).unfold(3, width, 1)  # (B, 3, 2 * largest[0] + 1, 2 * largest[1] + 1, H, W)
    top, left = (largest - shift).to(images.device, non_blocking=True).unbind(1)
    return windows[torch.arange(len(images), device=images.device), :, top, left]


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


def half_extents(width: Tensor, height: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
    """Return half the width and height of the upright box around a rotated rectangle."""
    cos, sin = angle.deg2rad().cos().abs(), angle.deg2rad().sin().abs()
    return (width * cos + height * sin) / 2, (width * sin + height * cos) / 2


def paste_(target: Tensor, images: Tensor, params: PasteParams) -> Tensor:
    """Copy each image's source box, colors jittered, to its rotated target box in ``target``, in place.

    target, images: (B, 3, H, W) float in [0, 1], channels_last; the target a copy of the images, or of those that
    patches from them are to be pasted into. Every pasted pixel is one pixel of the source box (nearest neighbor:
    interpolation would leave a blur that a network learns instead of the cut), blended with what it covers where the
    edge is soft. Only as many pixels as the largest patch has are worked on.
    """
    (count, _, height, width), device, p = images.shape, images.device, params
    area = int((p.width * p.height).max())  # known on the CPU: the device is not waited for
    half_w, half_h = half_extents(p.width, p.height, p.angle)
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
    number = torch.arange(area, device=device, dtype=torch.float32)[None]  # a patch's pixels, row by row
    inside = number < w * h  # (B, area); a smaller patch repeats its last pixel
    number = torch.minimum(number, w * h - 1)
    y = ((number + 0.5) / w).floor()  # exact, and far faster than the division of whole numbers
    x = number - y * w
    source = first + ((source_y + y) * width + source_x + x).long()
    patch = pixels.index_select(0, source.view(-1))  # (B * area, 3)
    if p.jitter is not None:
        patch = patch.view(count, 1, area, 3).permute(0, 3, 1, 2)  # images one pixel high
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
        origin = torch.arange(count, device=device)[:, None, None] * area + (v * w + u).long()
        place = first[:, None] + (y * width + x).long()
        new, covered = patch.index_select(0, origin.view(-1)), changed.index_select(0, place.view(-1))
        if soft:
            share = ((w / 2 - across.abs()) / soft[0]).clamp(0, 1) * ((h / 2 - along.abs()) / soft[0]).clamp(0, 1)
            patch = torch.lerp(covered, new, share.view(-1, 1))
        else:
            patch = torch.where(inside.view(-1, 1), new, covered)
    changed.index_copy_(0, place.view(-1), patch)
    return target


# The same for a GPU -----------------------------------------------------------------------------------------------
#
# Above, numbers that the host knows decide which operations run, and on how many pixels. That is fast on a CPU; a GPU
# would wait for Python, which issues hundreds of small operations. Below, what was drawn lies on the device as rows of
# numbers, and operations and shapes are the same for every batch: torch.compile makes some ten kernels of them, and a
# CUDA graph can replay those. On a CPU it is several times slower. Tests hold the two against each other.

Planes = tuple[Tensor, Tensor, Tensor]  # red, green and blue of B images, each (B, n) in [0, 1]
BLENDS = 9  # numbers of three places that blend
JITTER_NUMBERS, PASTE_NUMBERS = 2 * (2 * BLENDS + 1), 9


def jitter_numbers(params: JitterParams) -> Tensor:
    """Return the numbers of a color jitter, (B, JITTER_NUMBERS): blends of the places before the hue and of those after
    it, and its turn; then the same up to the contrast, neutral from there on, by which ``jitter_planes`` finds the
    mean."""
    order, place = params.order, torch.arange(4)
    blends, neutral = _blends(params).movedim(0, 2), torch.tensor([1.0, 0.0, 0.0])  # (B, 4, 3)
    hue, contrast = ((order == kind).int().argmax(1, keepdim=True) for kind in (HUE, CONTRAST))  # their places (B, 1)
    numbers = []
    for counts in (place < 4, place < contrast):
        before, after = (
            torch.where((counts & part)[..., None], blends, neutral) for part in (place < hue, place > hue)
        )
        turn = params.factors[:, HUE:] * counts.expand_as(order).gather(1, hue)
        numbers += [before[:, :3].flatten(1), after[:, 1:].flatten(1), turn]
    return torch.cat(numbers, 1)


def jitter_planes(
    planes: Planes, numbers: Tensor, of: Planes, inside: Tensor | None = None, count: Tensor | None = None
) -> Planes:
    """Jitter colors as ``color_jitter`` does, by ``jitter_numbers``. The contrast refers to the mean gray of the images
    ``of``, or of their pixels ``inside`` (B, n), ``count`` (B, 1) each."""
    all_places, up_to_contrast = numbers[..., None].chunk(2, 1)
    gray = _gray(_jittered(of, up_to_contrast, 2))  # two places at most are before the contrast, beside the hue
    mean = gray.mean(1, keepdim=True) if inside is None else (gray * inside).sum(1, keepdim=True) / count
    return _jittered(planes, all_places, 3, mean)


def _jittered(planes: Planes, numbers: Tensor, places: int, mean: Tensor | float = 0.0) -> Planes:
    """Blend in the places before the hue, turn the hue, blend in those after it: only one of them turns it."""
    before, after, (turn,) = (part.unbind(1) for part in numbers.split([BLENDS, BLENDS, 1], 1))
    for place in range(places):
        planes = _blended(planes, *before[3 * place : 3 * place + 3], mean)
    planes = tuple(torch.where(turn != 0, new, old) for new, old in zip(_hue_turned(planes, turn), planes))
    for place in range(places):
        planes = _blended(planes, *after[3 * place : 3 * place + 3], mean)
    return planes


def _blended(planes: Planes, factor: Tensor, to_mean: Tensor, to_gray: Tensor, mean: Tensor | float) -> Planes:
    other = _gray(planes) * to_gray + to_mean * mean
    return tuple((plane * factor + other).clamp(0, 1) for plane in planes)


def _gray(planes: Planes) -> Tensor:
    return planes[0] * GRAY[0] + planes[1] * GRAY[1] + planes[2] * GRAY[2]


def _hue_turned(planes: Planes, turn: Tensor) -> Planes:
    """Turn the hue as ``rotate_hue_`` does; turn: (B, 1)."""
    red, green, blue = planes
    low, value = torch.minimum(torch.minimum(red, green), blue), torch.maximum(torch.maximum(red, green), blue)
    chroma = value - low
    hue = ((green + blue - red - low) / chroma.clamp(min=1e-12) + 1).copysign(green - blue) + 6 * turn
    hue = hue - 6 * (hue / 6).floor()
    red, green, blue = (chroma * ((hue - middle).abs() - 1).clamp(0, 1) for middle in (3, 2, 4))
    return low + red, value - green, value - blue


def paste_numbers(params: PasteParams) -> Tensor:
    """Return the numbers of a pasted rectangle, its jitter apart: (B, PASTE_NUMBERS)."""
    p, turn = params, params.angle.deg2rad()
    soft = torch.zeros_like(turn) if p.soft is None else p.soft.clamp(min=1e-3)
    boxes = [p.width, p.height, p.source_x, p.source_y, p.center_x, p.center_y]
    return torch.stack([*boxes, turn.cos(), turn.sin(), soft], 1)


def paste_planes(target: Planes, images: Planes, width: int, boxes: Tensor, jitter: Tensor) -> Planes:
    """Paste as ``paste_`` does, by ``paste_numbers`` and ``jitter_numbers``: pixels row by row, ``width`` in a row.
    Every pixel of the image looks for its source in the box, by the inverse rotation; outside, what it finds is not
    used."""
    w, h, source_x, source_y, center_x, center_y, cos, sin, soft = boxes[..., None].unbind(1)  # (B, 1) each
    pixel = torch.arange(images[0].shape[1], device=boxes.device)
    y, x = pixel // width, pixel % width
    in_source = (x >= source_x) & (x < source_x + w) & (y >= source_y) & (y < source_y + h)
    dx, dy = x + 0.5 - center_x, y + 0.5 - center_y
    across, along = cos * dx + sin * dy, cos * dy - sin * dx  # from the upright rectangle's center, (B, n)
    u, v = across + w / 2, along + h / 2
    inside = (u >= 0) & (u < w) & (v >= 0) & (v < h)
    u, v = torch.minimum(u.floor().clamp(min=0), w - 1), torch.minimum(v.floor().clamp(min=0), h - 1)
    source = ((source_y + v) * width + source_x + u).long()
    patch = jitter_planes(tuple(plane.gather(1, source) for plane in images), jitter, images, in_source, w * h)
    edge = soft.clamp(min=1e-3)
    share = ((w / 2 - across.abs()) / edge).clamp(0, 1) * ((h / 2 - along.abs()) / edge).clamp(0, 1)
    share = torch.where(soft > 0, share, inside.float())
    return tuple(torch.lerp(old, new, share) for old, new in zip(target, patch))


NOTHING_IGNORED = torch.empty(0, dtype=torch.int32)  # the fill index of images of which every pixel counts


def fill_index_of(ignored: Tensor) -> Tensor:
    """Return for each pixel of a mask (H, W) bool, True where it is ignored, the number, row by row, of the nearest one
    that counts, which may be itself: (H, W) int32."""
    from scipy.ndimage import distance_transform_edt

    down, across = distance_transform_edt(ignored.numpy(), return_distances=False, return_indices=True)
    return torch.from_numpy(down * ignored.shape[1] + across).int()


def ignored_pixels(fill_index: Tensor) -> Tensor:
    """Return the mask (H, W) bool that ``fill_index_of`` was given; empty for NOTHING_IGNORED."""
    return fill_index != torch.arange(fill_index.numel(), device=fill_index.device).view(fill_index.shape)


def fill_ignored(images: Tensor, fill_index: Tensor) -> Tensor:
    """Return images (B, C, H, W), each ignored pixel replaced by the one of the same image that ``fill_index`` (H, W)
    names; the images themselves for NOTHING_IGNORED."""
    if not fill_index.numel():
        return images
    return images.flatten(2).index_select(2, fill_index.flatten()).unflatten(2, tuple(fill_index.shape))
