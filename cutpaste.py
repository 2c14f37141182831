"""CutPaste augmentations, batched on tensors of any device.

Owns the base augmentation (translation, colour jitter), the crops of a patch model, CutPaste and CutPaste-Scar, and the
table ``VARIANTS``. ``make_params`` draws every random number, on the CPU; ``apply`` acts on the images' device and
changes no input. For a patch model ``augment``, ``crop`` and ``cut_paste`` are the three parts of ``apply``.
Source: Li, Sohn, Yoon, Pfister, "CutPaste", CVPR 2021 (arXiv 2104.04015), sections 2.2, 2.4, A.1, A.2 and A.5.
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

AREA = (0.02, 0.15)  # patch area as a fraction of the image's (A.2)
ASPECT = (0.3, 3.3)  # patch width over height, relative to the image's (A.2)
SCAR_WIDTH = (2.0, 16.0)  # pixels of an image of SCAR_IMAGE_SIZE (A.2)
SCAR_LENGTH = (10.0, 25.0)  # likewise
SCAR_ANGLE = 45.0  # degrees, either way (A.2)
SCAR_IMAGE_SIZE = 256
CROP_SIZE = 64  # the paper's crops of a patch model, of images of SCAR_IMAGE_SIZE (2.4)
BASES_AT_ONCE, PASTES_AT_ONCE = 1, 16  # images that a processor's cache holds with all that is computed of them
GRAY = (0.2989, 0.587, 0.114)  # luma weights of torchvision's rgb_to_grayscale

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)  # columns of JitterParams.factors, values of .order


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


@dataclass(frozen=True)
class JitterParams:
    """Colour jitter of B images. ``order[b, k]`` names the operation that image b gets in place k."""

    factors: Tensor  # (B, 4): brightness, contrast, saturation as factors around 1; hue in turns around 0
    order: Tensor  # (B, 4) int64, each row a permutation of 0..3

    def rows(self, part: slice) -> "JitterParams":
        """Of some images of the batch."""
        return JitterParams(self.factors[part], self.order[part])


@dataclass(frozen=True)
class PasteParams:
    """One pasted rectangle per image, all (B,). Pixels; x to the right, y down; a pixel's centre is at +0.5."""

    width: Tensor  # of the rectangle before rotation, whole numbers
    height: Tensor
    source_x: Tensor  # left edge of the upright source box, whole numbers
    source_y: Tensor  # top edge
    center_x: Tensor  # of the (rotated) target box
    center_y: Tensor
    angle: Tensor  # degrees, clockwise as seen
    jitter: JitterParams | None  # None leaves the patch's colours alone

    def rows(self, part: slice) -> "PasteParams":
        """Of some images of the batch."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        jitter = values.pop("jitter")
        boxes = {name: value[part] for name, value in values.items()}
        return PasteParams(**boxes, jitter=None if jitter is None else jitter.rows(part))


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

    def rows(self, part: slice) -> "ViewParams":
        """Of some images of the batch."""
        shift = None if self.shift is None else self.shift[part]
        jitter = None if self.jitter is None else self.jitter.rows(part)
        pastes = tuple(paste.rows(part) for paste in self.pastes)
        corner = None if self.corner is None else self.corner[part]
        return ViewParams(self.variant, self.height, self.width, shift, jitter, pastes, corner, self.patch_size)


# Drawing ----------------------------------------------------------------------------------------------------------


def make_params(
    variant: str,
    batch_size: int,
    height: int,
    width: int,
    generator: torch.Generator,
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
    if variant not in VARIANTS:
        raise ValueError(f"unknown variant {variant!r}: choose one of {', '.join(VARIANTS)}")
    if not 0 <= translate < 1:
        raise ValueError(f"translate is a fraction of the image, 0 <= translate < 1, not {translate}")
    for name, value in (("jitter", jitter), ("patch_jitter", patch_jitter)):
        if not 0 <= value <= 0.5:
            raise ValueError(f"{name} lies in [0, 0.5], not {value}")
    if patch_size is not None and not 1 <= patch_size <= min(height, width):
        raise ValueError(f"patch_size lies in [1, {min(height, width)}], the image's shorter side, not {patch_size}")
    shift = _draw_shift(batch_size, height, width, translate, generator) if translate else None
    base = _draw_jitter(batch_size, jitter, generator) if jitter else None
    corner, size, scar_scale = None, (height, width), min(height, width) / SCAR_IMAGE_SIZE
    if patch_size is not None:
        corner = torch.stack([_whole(torch.full((batch_size,), side - patch_size), generator) for side in size], 1)
        corner, size = corner.long(), (patch_size, patch_size)
        # A scar in a crop is as long as in the whole image, but no longer against the crop than in the paper's
        scar_scale = min(scar_scale, patch_size / CROP_SIZE)
    pastes = []
    for view in VARIANTS[variant].views[1:]:
        if view == "patch":
            box = _draw_patch(batch_size, *size, generator)
        elif view == "scar":
            box = _draw_scar(batch_size, *size, scar_scale, generator)
        else:  # "patch or scar": one class of both in equal parts, so that the two classes stay balanced
            patch = _draw_patch(batch_size, *size, generator)
            scar = _draw_scar(batch_size, *size, scar_scale, generator)
            is_scar = torch.rand(batch_size, generator=generator) < 0.5
            box = {name: torch.where(is_scar, scar[name], patch[name]) for name in patch}
        colors = _draw_jitter(batch_size, patch_jitter, generator) if patch_jitter else None
        pastes.append(PasteParams(**box, jitter=colors))
    return ViewParams(variant, height, width, shift, base, tuple(pastes), corner, patch_size)


def _uniform(low: float | Tensor, high: float | Tensor, count: int, generator: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(count, generator=generator)


def _whole(high: Tensor, generator: torch.Generator) -> Tensor:
    """Whole numbers from 0 to ``high`` (B,), both included, as float32."""
    draw = (torch.rand(len(high), generator=generator) * (high + 1)).floor()
    return torch.minimum(draw, high)  # float32 rounding could reach high + 1


def _draw_shift(count: int, height: int, width: int, translate: float, generator: torch.Generator) -> Tensor:
    most = torch.tensor([int(translate * height), int(translate * width)])
    unit = torch.rand(count, 2, generator=generator)
    return ((unit * (2 * most + 1)).floor().long()).clamp(max=2 * most) - most


def _draw_jitter(count: int, amount: float, generator: torch.Generator) -> JitterParams:
    factors = (2 * torch.rand(count, 4, generator=generator) - 1) * amount
    factors[:, :HUE] += 1
    order = torch.rand(count, 4, generator=generator).argsort(dim=1, stable=True)
    return JitterParams(factors, order)


def _draw_patch(count: int, height: int, width: int, generator: torch.Generator) -> dict[str, Tensor]:
    """A large upright patch. The paper does not say how the aspect ratio is distributed: log-uniform here, so that
    width and height are exchangeable. Relative to the image's own aspect ratio, which is the paper's on the square
    images it has and lets the patch always fit on others."""
    area = _uniform(*AREA, count, generator)
    aspect = torch.tensor(ASPECT).log()
    aspect = _uniform(aspect[0], aspect[1], count, generator).exp()
    patch_w = (width * (area * aspect).sqrt()).round().clamp(1, width)
    patch_h = (height * (area / aspect).sqrt()).round().clamp(1, height)
    source_x, source_y = _whole(width - patch_w, generator), _whole(height - patch_h, generator)
    target_x, target_y = _whole(width - patch_w, generator), _whole(height - patch_h, generator)
    return {
        "width": patch_w,
        "height": patch_h,
        "source_x": source_x,
        "source_y": source_y,
        "center_x": target_x + patch_w / 2,
        "center_y": target_y + patch_h / 2,
        "angle": torch.zeros(count),
    }


def _draw_scar(count: int, height: int, width: int, scale: float, generator: torch.Generator) -> dict[str, Tensor]:
    """A thin rotated rectangle whose bounding box lies inside the image. scale: 1 means the paper's pixels."""
    scar_w = (_uniform(*SCAR_WIDTH, count, generator) * scale).round().clamp(1, width)
    scar_h = (_uniform(*SCAR_LENGTH, count, generator) * scale).round().clamp(1, height)
    angle = _uniform(-SCAR_ANGLE, SCAR_ANGLE, count, generator)
    source_x, source_y = _whole(width - scar_w, generator), _whole(height - scar_h, generator)
    half_w, half_h = (e.clamp(max=side / 2) for e, side in zip(_half_extents(scar_w, scar_h, angle), (width, height)))
    return {
        "width": scar_w,
        "height": scar_h,
        "source_x": source_x,
        "source_y": source_y,
        "center_x": _uniform(half_w, width - half_w, count, generator),
        "center_y": _uniform(half_h, height - half_h, count, generator),
        "angle": angle,
    }


def _half_extents(width: Tensor, height: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
    """Half the width and height of the upright box around a rotated rectangle."""
    cos, sin = angle.deg2rad().cos().abs(), angle.deg2rad().sin().abs()
    return (width * cos + height * sin) / 2, (width * sin + height * cos) / 2


# Acting -----------------------------------------------------------------------------------------------------------


def apply(images: Tensor, params: ViewParams) -> tuple[Tensor, Tensor]:
    """Make the views of a batch.

    images: (B, 3, H, W), uint8 in 0..255 or float in [0, 1], never changed.
    Returns views (V*B, 3, H, W), float32 in [0, 1] and channels_last, view after view in the variant's order, and
    labels (V*B,) int64; of parameters with a patch size P views (V*B, 3, P, P). Raises ValueError if images and params
    do not fit each other.
    """
    if params.corner is not None:
        return cut_paste(crop(augment(images, params), params), params)
    _check(images, params)
    views = _empty_views(images, params)
    augment(images, params, views[: len(images)])
    return _pasted(views, params)


def augment(images: Tensor, params: ViewParams, out: Tensor | None = None) -> Tensor:
    """The base augmentation alone, of whole images (B, 3, H, W): float32 in [0, 1], channels_last; ``out`` if given."""
    _check(images, params)
    if out is None:
        out = torch.empty(images.shape, device=images.device, memory_format=torch.channels_last)
    for part in _parts(len(images), BASES_AT_ONCE, images.device):
        base = to_float(images[part] if params.shift is None else translate(images[part], params.shift[part]))
        out[part] = base if params.jitter is None else color_jitter(base, params.jitter.rows(part))
    return out


def crop(images: Tensor, params: ViewParams) -> Tensor:
    """The square that was drawn for each image (B, 3, H, W): (B, 3, P, P) (section 2.4)."""
    windows = images.unfold(2, params.patch_size, 1).unfold(3, params.patch_size, 1)  # (B, 3, H-P+1, W-P+1, P, P)
    top, left = params.corner.to(images.device, non_blocking=True).unbind(1)
    return windows[torch.arange(len(images), device=images.device), :, top, left]


def cut_paste(base: Tensor, params: ViewParams) -> tuple[Tensor, Tensor]:
    """Views and labels, as ``apply`` gives them, of images or crops that the base augmentation has seen."""
    views = _empty_views(base, params)
    views[: len(base)] = base
    return _pasted(views, params)


def _check(images: Tensor, params: ViewParams) -> None:
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images must be (B, 3, H, W), got {tuple(images.shape)}")
    drawn_for = (len(params.pastes[0].width), 3, params.height, params.width)
    if tuple(images.shape) != drawn_for:
        raise ValueError(f"parameters drawn for images {drawn_for}, got {tuple(images.shape)}")
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise ValueError(f"images must be uint8 or floating point, got {images.dtype}")


def _empty_views(base: Tensor, params: ViewParams) -> Tensor:
    shape = ((1 + len(params.pastes)) * len(base), *base.shape[1:])
    return torch.empty(shape, dtype=torch.float32, device=base.device, memory_format=torch.channels_last)


def _pasted(views: Tensor, params: ViewParams) -> tuple[Tensor, Tensor]:
    """Make the further views, in place, of the first one, which is there already; the labels of all."""
    count = len(views) // (1 + len(params.pastes))
    base = views[:count]
    for number, boxes in enumerate(params.pastes, 1):
        view = views[number * count : (number + 1) * count].copy_(base)
        for part in _parts(count, PASTES_AT_ONCE, views.device):
            paste_(view[part], base[part], boxes.rows(part))
    labels = torch.arange(1 + len(params.pastes), device=views.device).repeat_interleave(count)
    return views, labels


def _parts(count: int, at_once: int, device: torch.device) -> list[slice]:
    """A batch in parts that stay in a processor's cache from the first operation to the last; a GPU takes it whole."""
    step = at_once if device.type == "cpu" else count
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]


def to_float(images: Tensor) -> Tensor:
    """uint8 in 0..255 to float32 in [0, 1]; floating point passes as float32."""
    return images.float().div_(255) if images.dtype == torch.uint8 else images.float()


def translate(images: Tensor, shift: Tensor) -> Tensor:
    """Move image b by shift[b] = (down, right) pixels; what comes in at the border is the image's reflection (the
    border pixel itself is not repeated). The base augmentation's first half, before CutPaste sees the image (A.1)."""
    height, width = images.shape[-2:]
    most = shift.abs().amax(0)
    for axis, margin in zip((2, 3), most.tolist()):  # known on the CPU; torch's reflection_pad takes no uint8
        size = images.shape[axis]
        before, after = images.narrow(axis, 1, margin), images.narrow(axis, size - 1 - margin, margin)
        images = torch.cat([before.flip(axis), images, after.flip(axis)], axis)
    windows = images.unfold(2, height, 1).unfold(3, width, 1)  # (B, 3, 2 * most[0] + 1, 2 * most[1] + 1, H, W)
    top, left = (most - shift).to(images.device, non_blocking=True).unbind(1)
    return windows[torch.arange(len(images), device=images.device), :, top, left]


def paste(images: Tensor, params: PasteParams) -> Tensor:
    """Copy each image's source box, colours jittered, to its rotated target box: (B, 3, H, W) float in [0, 1]."""
    images = images.contiguous(memory_format=torch.channels_last)
    return paste_(images.clone(), images, params)


def paste_(target: Tensor, images: Tensor, params: PasteParams) -> Tensor:
    """``paste`` into ``target``, a copy of the images, in place; both (B, 3, H, W) in channels_last memory.

    Every pasted pixel is one pixel of the source box (nearest neighbour: interpolation would leave a blur that a
    network learns instead of the cut). Only as many pixels as the largest patch has are worked on.
    """
    height, width = images.shape[-2:]
    device, count, upright = images.device, len(images), not params.angle.any()
    most = int((params.width * params.height).max())  # known on the CPU: the device is not waited for
    half_w, half_h = _half_extents(params.width, params.height, params.angle)
    left, top = (params.center_x - half_w).floor(), (params.center_y - half_h).floor()
    if not upright:
        tile_w = min(width, int(half_w.max() * 2) + 2)  # holds the largest target
        tile_h = min(height, int(half_h.max() * 2) + 2)
        left, top = left.clamp(0, width - tile_w), top.clamp(0, height - tile_h)
    radians = params.angle.deg2rad()
    p = params
    numbers = (
        p.width,
        p.height,
        p.source_x,
        p.source_y,
        p.center_x,
        p.center_y,
        radians.cos(),
        radians.sin(),
        left,
        top,
    )
    numbers = torch.stack(numbers).to(device, non_blocking=True)[:, :, None]  # (10, B, 1): one copy
    w, h, source_x, source_y, center_x, center_y, cos, sin, left, top = numbers

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
    if params.jitter is not None:
        patch = patch.view(count, 1, most, 3).permute(0, 3, 1, 2)  # images one pixel high
        patch = color_jitter(patch, params.jitter, inside[:, None, None]).permute(0, 2, 3, 1).reshape(-1, 3)
    if upright:
        place = first + ((top + y) * width + left + x).long()
        changed.index_copy_(0, place.view(-1), patch)
        return target

    rows = (top + torch.arange(tile_h, device=device))[:, :, None]  # (B, h, 1)
    cols = (left + torch.arange(tile_w, device=device))[:, None]  # (B, 1, w)
    w, h, center_x, center_y, cos, sin = (number[:, :, None] for number in (w, h, center_x, center_y, cos, sin))
    dx, dy = cols + 0.5 - center_x, rows + 0.5 - center_y
    u = cos * dx + sin * dy + w / 2  # position inside the upright rectangle, (B, h, w)
    v = cos * dy - sin * dx + h / 2
    inside = (u >= 0) & (u < w) & (v >= 0) & (v < h)
    u, v = torch.minimum(u.floor().clamp(min=0), w - 1), torch.minimum(v.floor().clamp(min=0), h - 1)
    origin = torch.arange(count, device=device)[:, None, None] * most + (v * w + u).long()
    place = first[:, None] + (rows * width + cols).long()
    new, covered = patch.index_select(0, origin.view(-1)), pixels.index_select(0, place.view(-1))
    changed.index_copy_(0, place.view(-1), torch.where(inside.view(-1, 1), new, covered))
    return target


def color_jitter(images: Tensor, params: JitterParams, mask: Tensor | None = None) -> Tensor:
    """Brightness, contrast, saturation and hue in each image's own order, each equal to torchvision's operation.

    images: (B, 3, H, W) float in [0, 1]. mask: (B, 1, H, W) bool, the pixels whose mean grey the contrast refers to
    (all, if None); the others are changed too and mean nothing.
    """
    device, order = images.device, params.order
    factors = params.factors.gather(1, order)  # (B, 4): the factor of each place
    # Each of the first three blends the image with another: black, its mean grey, its grey. Factor 1 changes nothing.
    blend = torch.where(order == HUE, torch.ones_like(factors), factors)
    kinds = torch.stack([blend, (1 - blend) * (order == CONTRAST), (1 - blend) * (order == SATURATION)])
    kinds = kinds.to(device, torch.float32, non_blocking=True)[..., None, None]  # (3, B, 4, 1, 1)
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
            turn = factors[hue, place].to(device, non_blocking=True)
            if len(hue) == len(order):
                rotate_hue_(images, turn)
            else:
                hue = hue.to(device, non_blocking=True)
                images[hue] = rotate_hue_(images[hue], turn)
    return images


def _blended_with(images: Tensor, to_mean: Tensor, to_gray: Tensor, mask: Tensor | None) -> Tensor:
    """What is added to the weighted images (B, 3, H, W): their grey and its mean, weighted too: (B, H, W)."""
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
