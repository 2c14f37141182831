"""Operations on batches of pixels, against torchvision, colorsys, NumPy and loops."""

import cmath
import colorsys
import itertools
import math

import numpy as np
import pytest
import torch
from torchvision.transforms import functional as F

from cutpaste import VARIANTS, draw_jitter, make_views, sample_params
from image_ops import (
    BRIGHTNESS,
    CONTRAST,
    HUE,
    SATURATION,
    JitterParams,
    PasteParams,
    color_jitter,
    paste_,
    rotate_hue_,
    to_float,
    translate,
)

KINDS = (BRIGHTNESS, CONTRAST, SATURATION, HUE)
ADJUST = dict(zip(KINDS, (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)))
ORDERS = list(itertools.permutations(range(4)))
PURE = torch.cartesian_prod(*[torch.tensor([0, 0.5, 1])] * 3).T.reshape(1, 3, 3, 9)  # corners, edges, grays
STILL = {"translate": 0, "jitter": 0, "patch_jitter": 0}  # cut and paste, and nothing else


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def noise(*shape, seed=0):
    return torch.rand(*shape, generator=seeded(seed))


def test_to_float_scales_uint8_alone():
    assert to_float(torch.tensor([0, 51, 255], dtype=torch.uint8)).tolist() == pytest.approx([0, 0.2, 1])
    assert to_float(torch.tensor([0, 0.2, 1], dtype=torch.float64)).dtype == torch.float32
    assert to_float(torch.tensor([0.25, 1])).tolist() == [0.25, 1]
    with pytest.raises(ValueError, match=r"uint8 or floating point, got .*int64"):
        to_float(torch.tensor([0, 51, 255]))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("size", [(9, 14), (14, 9), (1, 5)])
def test_translate_equals_numpy_reflection(dtype, size):
    height, width = size
    shift = torch.tensor(list(itertools.product(range(1 - height, height), range(1 - width, width))))  # all there are
    images = (noise(len(shift), 3, *size) * 255).to(dtype)
    result = translate(images, shift)
    assert result.dtype == dtype
    for image, (down, right), moved in zip(images.numpy(), shift.tolist(), result.numpy()):
        border = np.pad(image, ((0, 0), (height - 1,) * 2, (width - 1,) * 2), mode="reflect")
        top, left = height - 1 - down, width - 1 - right
        assert np.array_equal(moved, border[:, top : top + height, left : left + width])


# Color jitter -----------------------------------------------------------------------------------------------------


def torchvision_jitter(image, factors, order):
    for kind in order.tolist():
        image = ADJUST[kind](image, factors[kind].item())
    return image


def all_orders(amount, copies=1):
    """Jitter of 24 * copies images, every order among them, with the factors that draw_jitter draws."""
    order = torch.tensor(ORDERS * copies)
    return JitterParams(draw_jitter(len(order), amount, seeded()).factors, order)


@pytest.mark.parametrize("images", [noise(96, 3, 9, 13), PURE.expand(96, -1, -1, -1)], ids=["noise", "pure"])
@pytest.mark.parametrize("amount", [0.1, 0.5])
def test_color_jitter_equals_torchvision(amount, images):
    """Image by image, and no input is changed."""
    params, before = all_orders(amount, copies=4), images.clone()
    result = color_jitter(images, params)
    for b in range(96):
        expected = torchvision_jitter(images[b], params.factors[b], params.order[b])
        assert torch.allclose(result[b], expected, atol=1e-5)
    for b in range(24):
        alone = JitterParams(params.factors[b : b + 1], params.order[b : b + 1])
        assert torch.allclose(color_jitter(images[b : b + 1], alone)[0], result[b], atol=1e-6)
    assert torch.equal(images, before)


def test_color_jitter_under_mask_equals_torchvision_on_the_crop():
    params = all_orders(0.5)
    images = noise(24, 3, 16, 20)
    mask = torch.zeros(24, 1, 16, 20, dtype=torch.bool)
    boxes = [(b % 5, b % 7, 3 + b % 4, 4 + b % 6) for b in range(24)]  # top, left, height, width
    crops = [(slice(None), slice(y, y + h), slice(x, x + w)) for y, x, h, w in boxes]
    for b, crop in enumerate(crops):
        mask[b][crop] = True
    result = color_jitter(images, params, mask)
    for b, crop in enumerate(crops):
        expected = torchvision_jitter(images[b][crop], params.factors[b], params.order[b])
        assert torch.allclose(result[b][crop], expected, atol=1e-5)
    assert torch.isfinite(color_jitter(images, params, torch.zeros_like(mask))).all()


@pytest.mark.parametrize(
    ("images", "turn"),
    [(noise(32, 3, 3, 4), 2 * noise(32, seed=1) - 1), (PURE.expand(25, -1, -1, -1), torch.arange(-12, 13) / 12)],
    ids=["noise", "pure"],
)
def test_rotate_hue_equals_colorsys(images, turn):
    result = rotate_hue_(images.clone(), turn)
    for b, y, x in itertools.product(*map(range, (len(images), *images.shape[2:]))):
        hue, saturation, value = colorsys.rgb_to_hsv(*images[b, :, y, x].tolist())
        expected = colorsys.hsv_to_rgb((hue + turn[b].item()) % 1, saturation, value)
        assert result[b, :, y, x].tolist() == pytest.approx(expected, abs=1e-5)


def test_rotate_hue_keeps_gray():
    grays = torch.linspace(0, 1, 256).view(1, 1, 16, 16).expand(8, 3, 16, 16)
    assert torch.equal(rotate_hue_(grays.clone(), torch.linspace(-0.5, 0.5, 8)), grays)


# Cut and paste ----------------------------------------------------------------------------------------------------


def paste(images, params):
    images = images.contiguous(memory_format=torch.channels_last)
    return paste_(images.clone(), images, params)


def one_paste(width, height, source, center, angle):
    numbers = (width, height, *source, *center, angle)
    return PasteParams(*(torch.tensor([float(n)]) for n in numbers), jitter=None)


def coordinate_images(count, height, width):
    """Each pixel's color says where it is: red is x / 256, green y / 256, blue image / 256, exact in float32."""
    image, y, x = torch.meshgrid(torch.arange(count), torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([x, y, image], 1) / 256


def paste_by_hand(image, p, b):
    """What each pixel becomes, and which lie within rounding of a source pixel's border: there, either is right."""
    image = image.numpy()
    width, height, soft = (0 if n is None else n[b].item() for n in (p.width, p.height, p.soft))
    y, x = np.mgrid[: image.shape[1], : image.shape[2]] + 0.5
    back = cmath.exp(-1j * math.radians(p.angle[b].item()))
    at = (x + 1j * y - complex(p.center_x[b], p.center_y[b])) * back + complex(width, height) / 2  # in the patch
    unsure = (abs(at.real - at.real.round()) < 1e-3) | (abs(at.imag - at.imag.round()) < 1e-3)
    inside = (at.real >= 0) & (at.real < width) & (at.imag >= 0) & (at.imag < height)
    share = inside.astype(float)
    for near, far in ((at.real, width - at.real), (at.imag, height - at.imag)) if soft else ():
        share *= (np.minimum(near, far) / soft).clip(0, 1)
    from_x, from_y = np.where(inside, at.real, 0).astype(int), np.where(inside, at.imag, 0).astype(int)
    new = image[:, int(p.source_y[b]) + from_y, int(p.source_x[b]) + from_x]
    return np.where(inside, share * new + (1 - share) * image, image), unsure


@pytest.mark.parametrize("size", [(100, 180), (180, 100), (256, 256)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_paste_equals_a_formula(variant, size):
    images = coordinate_images(8, *size)
    params = sample_params(variant, 8, *size, seeded(2), **STILL)
    views = make_views(images, params)[0].unflatten(0, (-1, 8))
    assert torch.equal(views[0], images)
    for view, p in zip(views[1:], params.pastes):
        assert (view != images).any((1, 2, 3)).sum() >= 7  # a tiny scar may fall on its own source
        for b in range(8):
            expected, unsure = paste_by_hand(images[b], p, b)
            assert unsure.mean() < 0.02
            apart = np.abs(view[b].numpy() - expected)[:, ~unsure]
            assert apart.max() <= (0 if p.soft is None else 1e-4)


def test_pastes_by_hand():
    """An upright one, the whole image, a quarter turn clockwise as seen."""
    images = noise(1, 3, 20, 20)
    expected = images.clone()
    expected[:, :, 7:11, 2:8] = images[:, :, 1:5, 13:19]
    assert torch.equal(paste(images, one_paste(6, 4, source=(13, 1), center=(5, 9), angle=0)), expected)
    assert torch.equal(paste(images, one_paste(20, 20, source=(0, 0), center=(10, 10), angle=0)), images)
    expected = images.clone()
    expected[:, :, 10:16, 10:14] = torch.rot90(images[:, :, 2:6, 1:7], -1, (2, 3))
    assert torch.equal(paste(images, one_paste(6, 4, source=(1, 2), center=(12, 13), angle=90)), expected)


def test_patch_jitter_changes_the_patch_alone():
    images = noise(24, 3, 60, 90)
    params = sample_params("normal", 24, 60, 90, seeded(), translate=0, jitter=0, patch_jitter=0.5)
    (p,) = params.pastes
    expected = images.clone()
    for b in range(24):
        w, h, source_x, source_y = (int(n[b]) for n in (p.width, p.height, p.source_x, p.source_y))
        x, y = int(p.center_x[b] - w / 2), int(p.center_y[b] - h / 2)
        patch = images[b, :, source_y : source_y + h, source_x : source_x + w]
        expected[b, :, y : y + h, x : x + w] = torchvision_jitter(patch, p.jitter.factors[b], p.jitter.order[b])
    assert torch.allclose(paste(images, p), expected, atol=1e-5)
