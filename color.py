"""torchvision's ColorJitter, batched on tensors of any device, its parameters drawn beforehand on the CPU."""

from dataclasses import dataclass

import torch
from torch import Tensor

GRAY = (0.2989, 0.587, 0.114)  # luma weights of torchvision's rgb_to_grayscale
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)  # columns of JitterParams.factors, values of .order


@dataclass(frozen=True)
class JitterParams:
    """Color jitter of B images. ``order[b, k]`` names the operation that image b gets in place k."""

    factors: Tensor  # (B, 4): brightness, contrast, saturation as factors around 1; hue in turns around 0
    order: Tensor  # (B, 4) int64, each row a permutation of 0..3


def draw_jitter(count: int, amount: float, generator: torch.Generator) -> JitterParams | None:
    """Draw factors uniformly, at most ``amount`` (0 to 0.5) from those that change nothing, and orders all equally
    likely. None, and nothing is drawn, if the amount is 0. generator: on the CPU."""
    if not amount:
        return None
    factors = (2 * torch.rand(count, 4, generator=generator) - 1) * amount
    factors[:, :HUE] += 1
    order = torch.rand(count, 4, generator=generator).argsort(dim=1, stable=True)
    return JitterParams(factors, order)


def to_float(images: Tensor) -> Tensor:
    """uint8 in 0..255 to float32 in [0, 1]; floating point passes as float32. Raises ValueError for other types."""
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
    factors = params.factors.gather(1, order)  # (B, 4): the factor of each place
    # Each of the first three blends the image with another: black, its mean gray, its gray. Factor 1 changes nothing.
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
    """What is added to the weighted images (B, 3, H, W): their gray and its mean, weighted too: (B, H, W)."""
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
