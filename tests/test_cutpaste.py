import cmath
import colorsys
import itertools
import math
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from torchvision.transforms import functional as F

from cutpaste import (
    BRIGHTNESS,
    CONTRAST,
    HUE,
    SATURATION,
    VARIANTS,
    JitterParams,
    PasteParams,
    ViewParams,
    apply,
    augment,
    color_jitter,
    crop,
    cut_paste,
    make_params,
    paste,
    rotate_hue_,
    to_float,
    translate,
)

STILL = {"translate": 0, "jitter": 0, "patch_jitter": 0}  # cut and paste, and nothing else
ADJUST = {
    BRIGHTNESS: F.adjust_brightness,
    CONTRAST: F.adjust_contrast,
    SATURATION: F.adjust_saturation,
    HUE: F.adjust_hue,
}
MANY = 20_000
SIDE = 10_000  # drawing costs nothing per pixel, and at this size whole pixels hardly change a ratio


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def noise(*shape, seed=0):
    return torch.rand(*shape, generator=seeded(seed))


def coordinate_images(count, height, width):
    """Each pixel's colour says where it is: red is x / 256, green y / 256, blue image / 256, exact in float32."""
    image, y, x = torch.meshgrid(torch.arange(count), torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([x, y, image], 1) / 256


def one_paste(width, height, source, center, angle):
    numbers = (width, height, *source, *center, angle)
    return PasteParams(*(torch.tensor([float(n)]) for n in numbers), jitter=None)


def of_image(params, b):
    """The parameters of image b of a batch."""
    if isinstance(params, torch.Tensor):
        return params[b : b + 1]
    if isinstance(params, tuple):
        return tuple(of_image(p, b) for p in params)
    if params is None or isinstance(params, str | int):
        return params
    return replace(params, **{f.name: of_image(getattr(params, f.name), b) for f in fields(params)})


def tensors(params):
    """All tensors in the parameters."""
    if isinstance(params, torch.Tensor):
        return [params]
    if isinstance(params, tuple):
        return [t for p in params for t in tensors(p)]
    if params is None or isinstance(params, str | int):
        return []
    return [t for f in fields(params) for t in tensors(getattr(params, f.name))]


def corners(p):
    """Corners of the rotated targets, clockwise as seen, as complex numbers x + iy: (4, B)."""
    turn = np.exp(1j * np.radians(p.angle.double().numpy()))
    center = p.center_x.double().numpy() + 1j * p.center_y.double().numpy()
    w, h = p.width.double().numpy() / 2, p.height.double().numpy() / 2
    return np.stack([center + (sx * w + 1j * sy * h) * turn for sx, sy in ((-1, -1), (1, -1), (1, 1), (-1, 1))])


def paste_by_hand(image, p, b):
    """Pixel by pixel, and the pixels that lie within rounding of a source pixel's border: either is right there."""
    result, unsure = image.clone(), torch.zeros(image.shape[1:], dtype=torch.bool)
    back = cmath.exp(-1j * math.radians(p.angle[b].item()))
    center = complex(p.center_x[b].item(), p.center_y[b].item())
    corner = complex(p.width[b].item(), p.height[b].item()) / 2
    source_x, source_y = int(p.source_x[b]), int(p.source_y[b])
    for y in range(image.shape[1]):
        for x in range(image.shape[2]):
            at = (complex(x + 0.5, y + 0.5) - center) * back + corner
            unsure[y, x] = abs(at.real - round(at.real)) < 1e-3 or abs(at.imag - round(at.imag)) < 1e-3
            if 0 <= at.real < p.width[b] and 0 <= at.imag < p.height[b]:
                result[:, y, x] = image[:, source_y + int(at.imag), source_x + int(at.real)]
    return result, unsure


def torchvision_jitter(image, factors, order):
    for kind in order.tolist():
        image = ADJUST[kind](image, factors[kind].item())
    return image


def all_orders(amount, copies=1, seed=0):
    """Jitter of 24 * copies images, every order among them, with the factors that make_params draws."""
    order = torch.tensor(list(itertools.permutations(range(4))) * copies)
    return JitterParams(jitter_drawn(amount, len(order), seed).factors, order)


def jitter_drawn(amount, count=MANY, seed=0):
    return make_params("normal", count, 8, 8, seeded(seed), jitter=amount).jitter


def drawn(variant, height=SIDE, width=SIDE, count=MANY):
    return make_params(variant, count, height, width, seeded()).pastes


# Cut and paste ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(100, 180), (180, 100)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_paste_equals_pixel_loop(variant, size):
    images = coordinate_images(3, *size)
    params = make_params(variant, 3, *size, seeded(1), **STILL)
    views = apply(images, params)[0].unflatten(0, (-1, 3))
    assert torch.equal(views[0], images)
    for view, p in zip(views[1:], params.pastes):
        for b in range(3):
            expected, unsure = paste_by_hand(images[b], p, b)
            assert unsure.float().mean() < 0.02
            assert torch.equal(view[b][:, ~unsure], expected[:, ~unsure])


@pytest.mark.parametrize("size", [(100, 180), (180, 100), (256, 256)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_changed_pixels_lie_in_target_and_come_from_source(variant, size):
    images = coordinate_images(50, *size)
    params = make_params(variant, 50, *size, seeded(2), **STILL)
    views = apply(images, params)[0].unflatten(0, (-1, 50))
    for view, p in zip(views[1:], params.pastes):
        b, y, x = (view != images).any(1).nonzero(as_tuple=True)
        assert len(b.unique()) >= 48  # a tiny scar may fall on its own source
        from_x, from_y, from_b = (view[b, :, y, x] * 256).unbind(1)
        assert torch.equal(from_b, b.float())
        assert ((from_x >= p.source_x[b]) & (from_x < p.source_x[b] + p.width[b])).all()
        assert ((from_y >= p.source_y[b]) & (from_y < p.source_y[b] + p.height[b])).all()
        target, point = corners(p)[:, b.numpy()], (x + 0.5).numpy() + 1j * (y + 0.5).numpy()
        for start, end in zip(target, np.roll(target, -1, axis=0)):  # the point is to the right of every edge
            assert (((end - start).conj() * (point - start)).imag > -1e-3).all()


def test_upright_paste_is_a_slice():
    images = noise(1, 3, 12, 20)
    result = paste(images, one_paste(6, 4, source=(13, 1), center=(5, 9), angle=0))
    expected = images.clone()
    expected[:, :, 7:11, 2:8] = images[:, :, 1:5, 13:19]
    assert torch.equal(result, expected)


def test_positive_angle_turns_clockwise_as_seen():
    images = torch.zeros(1, 3, 64, 64)
    images[:, 0, :2, :20] = 1
    images[:, 1, :2, 10:20] = 1  # the patch's right half is yellow
    result = paste(images, one_paste(20, 2, source=(0, 0), center=(40, 40), angle=40))
    y, x = result[0, 1, 20:, 20:].nonzero(as_tuple=True)
    assert (x + 20.5 > 40).all()
    assert (y + 20.5 > 39).all()  # right half turned down
    assert y.max() + 20 > 44


def test_quarter_turn_equals_rot90():
    images = noise(1, 3, 20, 20)
    result = paste(images, one_paste(6, 4, source=(1, 2), center=(12, 13), angle=90.0))
    expected = images.clone()
    expected[:, :, 10:16, 10:14] = torch.rot90(images[:, :, 2:6, 1:7], -1, (2, 3))
    assert torch.equal(result, expected)


def test_paste_covers_the_whole_image():
    images = noise(1, 3, 8, 8)
    assert torch.equal(paste(images, one_paste(8, 8, source=(0, 0), center=(4, 4), angle=0)), images)


@pytest.mark.parametrize("size", [(256, 256), (64, 96)])
def test_white_stays_white(size):
    """A scar rotated the naive way leaves black corners."""
    images = torch.ones(64, 3, *size)
    views, _ = apply(images, make_params("3way", 64, *size, seeded(), jitter=0, patch_jitter=0))
    assert (views == 1).all()


def test_paste_sees_the_base_augmentation():
    images = noise(6, 3, 40, 60)
    params = make_params("3way", 6, 40, 60, seeded(), translate=0.3, jitter=0.4)
    views = apply(images, params)[0].unflatten(0, (3, 6))
    base = color_jitter(to_float(translate(images, params.shift)), params.jitter)
    assert not torch.equal(base, images)
    assert torch.equal(views[0], base)
    assert torch.equal(views[1], paste(base, params.pastes[0]))
    assert torch.equal(views[2], paste(base, params.pastes[1]))


def test_patch_jitter_changes_the_patch_alone():
    images = noise(24, 3, 60, 90)
    params = make_params("normal", 24, 60, 90, seeded(), translate=0, jitter=0, patch_jitter=0.5)
    (p,) = params.pastes
    expected = images.clone()
    for b in range(24):
        w, h, source_x, source_y = (int(n[b]) for n in (p.width, p.height, p.source_x, p.source_y))
        x, y = int(p.center_x[b] - w / 2), int(p.center_y[b] - h / 2)
        patch = images[b, :, source_y : source_y + h, source_x : source_x + w]
        expected[b, :, y : y + h, x : x + w] = torchvision_jitter(patch, p.jitter.factors[b], p.jitter.order[b])
    assert torch.allclose(apply(images, params)[0][24:], expected, atol=1e-5)


# Drawing ----------------------------------------------------------------------------------------------------------


def test_patch_area_is_uniform_in_its_range():
    (p,) = drawn("normal")
    area = p.width.double() * p.height.double() / SIDE**2
    assert 0.0199 < area.min() < 0.0202
    assert 0.1498 < area.max() < 0.1501
    counts = torch.histc(area, 10, 0.02, 0.15)
    assert (counts > 0.09 * MANY).all()
    assert (counts < 0.11 * MANY).all()


def test_patch_aspect_is_log_uniform_in_its_range():
    (p,) = drawn("normal")
    aspect = p.width / p.height
    assert 0.299 < aspect.min() < 0.302
    assert 3.28 < aspect.max() < 3.302
    counts = torch.histc(aspect.log(), 10, math.log(0.3), math.log(3.3))
    assert (counts > 0.09 * MANY).all()
    assert (counts < 0.11 * MANY).all()


def test_patch_aspect_is_relative_to_the_image():
    (p,) = drawn("normal", SIDE, 2 * SIDE)
    aspect = p.width / p.height / 2
    assert 0.299 < aspect.min() < 0.302
    assert 3.28 < aspect.max() < 3.302


def test_patch_of_whole_pixels_keeps_its_area():
    (p,) = drawn("normal", 200, 300)
    assert ((p.width + 0.5) * (p.height + 0.5) >= 0.02 * 200 * 300).all()
    assert ((p.width - 0.5) * (p.height - 0.5) <= 0.15 * 200 * 300).all()


@pytest.mark.parametrize(
    ("size", "widths", "lengths"),
    [
        ((256, 256), (2, 16), (10, 25)),
        ((128, 128), (1, 8), (5, 12)),
        ((128, 300), (1, 8), (5, 12)),
        ((300, 128), (1, 8), (5, 12)),
        ((512, 512), (4, 32), (20, 50)),
    ],
)
def test_scar_sizes(size, widths, lengths):
    (p,) = drawn("scar", *size)
    assert p.width.unique().tolist() == list(range(widths[0], widths[1] + 1))
    assert p.height.unique().tolist() == list(range(lengths[0], lengths[1] + 1))


def test_scar_angle_is_uniform_in_its_range():
    (p,) = drawn("scar")
    assert -45 <= p.angle.min() < -44.9
    assert 44.9 < p.angle.max() <= 45
    counts = torch.histc(p.angle, 9, -45, 45)
    assert (counts > 0.1 * MANY).all()
    assert (counts < 0.122 * MANY).all()


def test_patch_is_upright():
    (p,) = drawn("normal")
    assert (p.angle == 0).all()


@pytest.mark.parametrize("size", [(256, 256), (64, 64), (40, 130), (130, 40), (7, 9)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_source_and_target_lie_inside_the_image(variant, size):
    height, width = size
    for p in drawn(variant, *size):
        for numbers in (p.width, p.height, p.source_x, p.source_y):
            assert torch.equal(numbers, numbers.round())
        assert (p.width >= 1).all()
        assert (p.height >= 1).all()
        assert (p.source_x >= 0).all()
        assert (p.source_y >= 0).all()
        assert (p.source_x + p.width <= width).all()
        assert (p.source_y + p.height <= height).all()
        target = corners(p)
        assert target.real.min() > -1e-3
        assert target.imag.min() > -1e-3
        assert target.real.max() < width + 1e-3
        assert target.imag.max() < height + 1e-3


@pytest.mark.parametrize("variant", ["normal", "scar"])
def test_source_and_target_reach_every_border(variant):
    (p,) = drawn(variant, 40, 60)
    target = corners(p)
    assert p.source_x.min() == 0
    assert p.source_y.min() == 0
    assert (p.source_x + p.width).max() == 60
    assert (p.source_y + p.height).max() == 40
    assert target.real.min() < 0.1
    assert target.imag.min() < 0.1
    assert target.real.max() > 59.9
    assert target.imag.max() > 39.9


def test_source_and_target_are_independent():
    (p,) = drawn("normal")
    source = p.source_x / (SIDE - p.width)
    target = (p.center_x - p.width / 2) / (SIDE - p.width)
    assert abs(np.corrcoef(source, target)[0, 1]) < 0.03
    assert abs(source.mean() - 0.5) < 0.01
    assert abs(target.mean() - 0.5) < 0.01


def test_target_of_a_patch_is_on_whole_pixels():
    (p,) = drawn("normal", 64, 96)
    left, top = p.center_x - p.width / 2, p.center_y - p.height / 2
    assert torch.equal(left, left.round())
    assert torch.equal(top, top.round())


@pytest.mark.parametrize(("amount", "down", "right"), [(0.04, 4, 2), (0.1, 10, 5), (0.005, 0, 0)])
def test_shift_is_uniform_and_reaches_both_ends(amount, down, right):
    shift = make_params("normal", MANY, 100, 50, seeded(), translate=amount).shift
    for column, most in ((shift[:, 0], down), (shift[:, 1], right)):
        values, counts = column.unique(return_counts=True)
        assert values.tolist() == list(range(-most, most + 1))
        assert (counts > 0.8 * MANY / len(values)).all()


@pytest.mark.parametrize("amount", [0.1, 0.5])
def test_jitter_factors_are_uniform_in_their_range(amount):
    base = make_params("normal", MANY, 8, 8, seeded(), jitter=amount).jitter
    patch = make_params("normal", MANY, 8, 8, seeded(), patch_jitter=amount).pastes[0].jitter
    for jitter in (base, patch):
        for kind, middle in ((BRIGHTNESS, 1), (CONTRAST, 1), (SATURATION, 1), (HUE, 0)):
            factor = jitter.factors[:, kind]
            assert middle - amount - 1e-6 <= factor.min() < middle - 0.99 * amount
            assert middle + 0.99 * amount < factor.max() <= middle + amount + 1e-6
            assert abs(factor.mean() - middle) < 0.02 * amount


def test_jitter_factors_are_independent():
    jitter = jitter_drawn(0.1)
    correlation = np.corrcoef(jitter.factors.T)
    assert np.abs(correlation - np.eye(4)).max() < 0.03


def test_base_and_patch_have_their_own_amounts():
    params = make_params("3way", 1000, 8, 8, seeded(), jitter=0.01, patch_jitter=0.3)
    assert (params.jitter.factors[:, BRIGHTNESS] - 1).abs().max() <= 0.0101
    for p in params.pastes:
        assert 0.25 < (p.jitter.factors[:, BRIGHTNESS] - 1).abs().max() <= 0.3001


def test_all_orders_occur_equally_often():
    orders, counts = jitter_drawn(0.1).order.unique(dim=0, return_counts=True)
    assert sorted(map(tuple, orders.tolist())) == list(itertools.permutations(range(4)))
    assert (counts > 0.8 * MANY / 24).all()


def test_no_amount_means_none():
    params = make_params("3way", 4, 32, 32, seeded(), **STILL)
    assert params.shift is None
    assert params.jitter is None
    assert [p.jitter for p in params.pastes] == [None, None]


def test_union_draws_both_kinds_in_equal_parts():
    (p,) = drawn("union")
    is_scar = p.angle != 0
    assert 0.48 < is_scar.float().mean() < 0.52
    area = (p.width * p.height)[~is_scar] / SIDE**2
    assert area.min() > 0.0199
    assert area.max() < 0.1501
    scale = SIDE / 256
    assert (p.width[is_scar] >= 2 * scale - 1).all()
    assert (p.width[is_scar] <= 16 * scale + 1).all()
    assert (p.height[is_scar] >= 10 * scale - 1).all()
    assert (p.height[is_scar] <= 25 * scale + 1).all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_same_seed_same_params(variant):
    first, second, other = (tensors(make_params(variant, 8, 64, 96, seeded(s))) for s in (5, 5, 6))
    assert len(first) == len(second) > 8
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    assert not all(torch.equal(a, b) for a, b in zip(first, other))


def test_drawing_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    params = make_params("3way", 8, 64, 96, seeded())
    apply(noise(8, 3, 64, 96), params)
    assert torch.equal(torch.get_rng_state(), before)


def test_each_image_gets_its_own_parameters():
    params = make_params("3way", 64, 256, 256, seeded())
    assert len(params.shift.unique(dim=0)) > 32
    assert len(params.jitter.factors.unique(dim=0)) == 64
    assert len(params.jitter.order.unique(dim=0)) > 12
    for p in params.pastes:
        assert len(p.center_x.unique()) > 48
        assert len(p.source_x.unique()) > 32
        assert len(p.width.unique()) > 8
        assert len(p.jitter.factors.unique(dim=0)) == 64


def test_equal_images_get_different_views():
    images = noise(1, 3, 64, 64).expand(8, -1, -1, -1)
    views = apply(images, make_params("3way", 8, 64, 64, seeded()))[0]
    assert len(views.flatten(1).unique(dim=0)) == 24


# Translation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("size", [(9, 14), (14, 9), (1, 5)])
def test_translate_equals_numpy_reflection(dtype, size):
    height, width = size
    down, right = range(1 - height, height), range(1 - width, width)
    shift = torch.tensor(list(itertools.product(down, right)))  # every shift there is
    images = (noise(len(shift), 3, *size) * 255).to(dtype)
    result = translate(images, shift)
    assert result.dtype == dtype
    for image, (d, r), moved in zip(images.numpy(), shift.tolist(), result.numpy()):
        border = np.pad(image, ((0, 0), (height - 1,) * 2, (width - 1,) * 2), mode="reflect")
        top, left = height - 1 - d, width - 1 - r
        assert np.array_equal(moved, border[:, top : top + height, left : left + width])


def test_translate_moves_down_and_right():
    images = torch.zeros(1, 3, 8, 10)
    images[:, :, 2, 6] = 1
    moved = translate(images, torch.tensor([[1, 2]]))
    assert moved[0, 0].nonzero().tolist() == [[3, 8]]


# Colour jitter ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("amount", [0.1, 0.5])
def test_color_jitter_equals_torchvision(amount):
    params = all_orders(amount, copies=4)
    images = noise(96, 3, 9, 13)
    result = color_jitter(images, params)
    for b in range(96):
        expected = torchvision_jitter(images[b], params.factors[b], params.order[b])
        assert torch.allclose(result[b], expected, atol=1e-5)


def test_color_jitter_under_mask_equals_torchvision_on_the_crop():
    params = all_orders(0.5)
    images = noise(24, 3, 16, 20)
    mask = torch.zeros(24, 1, 16, 20, dtype=torch.bool)
    boxes = [(b % 5, b % 7, 3 + b % 4, 4 + b % 6) for b in range(24)]  # top, left, height, width
    for b, (y, x, h, w) in enumerate(boxes):
        mask[b, :, y : y + h, x : x + w] = True
    result = color_jitter(images, params, mask)
    for b, (y, x, h, w) in enumerate(boxes):
        crop = (slice(None), slice(y, y + h), slice(x, x + w))
        expected = torchvision_jitter(images[b][crop], params.factors[b], params.order[b])
        assert torch.allclose(result[b][crop], expected, atol=1e-5)


def test_contrast_goes_around_the_mean_of_the_masked_pixels():
    images = torch.full((1, 3, 2, 4), 0.9)
    images[..., 0], images[..., 1] = 0.2, 0.4
    mask = torch.tensor([True, True, False, False]).expand(1, 1, 2, 4)
    params = JitterParams(torch.tensor([[1, 0.5, 1, 0]]), torch.tensor([[0, 1, 2, 3]]))
    result = color_jitter(images, params, mask)
    assert torch.allclose(result[..., 0], torch.tensor(0.25), atol=1e-4)  # half way to 0.3
    assert torch.allclose(result[..., 1], torch.tensor(0.35), atol=1e-4)


def test_empty_mask_stays_finite():
    result = color_jitter(noise(24, 3, 4, 4), all_orders(0.5), torch.zeros(24, 1, 4, 4, dtype=torch.bool))
    assert torch.isfinite(result).all()


def test_neutral_jitter_changes_nothing():
    order = torch.tensor(list(itertools.permutations(range(4))))
    factors = torch.tensor([1.0, 1, 1, 0]).expand(24, 4)
    images = noise(24, 3, 6, 6)
    assert torch.allclose(color_jitter(images, JitterParams(factors, order)), images, atol=1e-6)


def test_color_jitter_is_per_image():
    params, images = all_orders(0.5), noise(24, 3, 6, 7)
    result = color_jitter(images, params)
    for b in range(24):
        assert torch.allclose(color_jitter(images[b : b + 1], of_image(params, b))[0], result[b], atol=1e-6)


def test_rotate_hue_equals_colorsys():
    images, turn = noise(32, 3, 3, 4), 2 * noise(32, seed=1) - 1
    result = rotate_hue_(images.clone(), turn)
    for b, y, x in itertools.product(range(32), range(3), range(4)):
        hue, saturation, value = colorsys.rgb_to_hsv(*images[b, :, y, x].tolist())
        expected = colorsys.hsv_to_rgb((hue + turn[b].item()) % 1, saturation, value)
        assert result[b, :, y, x].tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("color", "turn", "expected"),
    [
        ((1, 0, 0), 1 / 3, (0, 1, 0)),
        ((1, 0, 0), -1 / 3, (0, 0, 1)),
        ((1, 0, 0), 0.5, (0, 1, 1)),
        ((1, 0, 0), -0.5, (0, 1, 1)),
        ((0, 1, 0), 1 / 3, (0, 0, 1)),
        ((0, 0, 1), 1 / 3, (1, 0, 0)),
        ((1, 1, 0), 1 / 6, (0, 1, 0)),
        ((0, 1, 1), 0.5, (1, 0, 0)),
        ((1, 0, 1), -1 / 6, (0, 0, 1)),
        ((0.5, 0.2, 0.2), 1 / 3, (0.2, 0.5, 0.2)),
        ((1, 0, 0), 1, (1, 0, 0)),
        ((0, 0, 0), 0.3, (0, 0, 0)),
    ],
)
def test_rotate_hue_of_pure_colors(color, turn, expected):
    image = torch.tensor(color, dtype=torch.float32).view(1, 3, 1, 1)
    assert rotate_hue_(image.clone(), torch.tensor([turn])).flatten().tolist() == pytest.approx(expected, abs=1e-6)


def test_rotate_hue_keeps_gray():
    grays = torch.linspace(0, 1, 256).view(1, 1, 16, 16).expand(8, 3, 16, 16)
    assert torch.equal(rotate_hue_(grays.clone(), torch.linspace(-0.5, 0.5, 8)), grays)


def test_hue_jitter_of_gray_and_pure_colors_equals_torchvision():
    levels = torch.tensor([0, 0.5, 1])
    colors = torch.cartesian_prod(levels, levels, levels).T.reshape(3, 3, 9)  # all corners, edges and the grays
    params = all_orders(0.5)
    result = color_jitter(colors.expand(24, 3, 3, 9), params)
    for b in range(24):
        expected = torchvision_jitter(colors, params.factors[b], params.order[b])
        assert torch.allclose(result[b], expected, atol=1e-5)


# Views ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64])
@pytest.mark.parametrize("variant", VARIANTS)
def test_views_and_labels(variant, dtype):
    images = (noise(5, 3, 24, 40) * (255 if dtype == torch.uint8 else 1)).to(dtype)
    params = make_params(variant, 5, 24, 40, seeded(), translate=0.2, jitter=0.5, patch_jitter=0.5)
    views, labels = apply(images, params)
    count = VARIANTS[variant].num_classes
    assert views.shape == (5 * count, 3, 24, 40)
    assert views.dtype == torch.float32
    assert views.min() >= 0
    assert views.max() <= 1
    assert labels.dtype == torch.int64
    assert labels.tolist() == [label for label in range(count) for _ in range(5)]


@pytest.mark.parametrize("amounts", [{}, STILL, {"translate": 0, "jitter": 0}, {"translate": 0.5, "jitter": 0}])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_apply_changes_no_input(dtype, amounts):
    images = (noise(4, 3, 32, 48) * 255).to(dtype) if dtype == torch.uint8 else noise(4, 3, 32, 48)
    params = make_params("3way", 4, 32, 48, seeded(), **amounts)
    images_before, params_before = images.clone(), [t.clone() for t in tensors(params)]
    views, _ = apply(images, params)
    views.zero_()
    assert torch.equal(images, images_before)
    assert all(torch.equal(a, b) for a, b in zip(tensors(params), params_before))


def test_color_jitter_changes_no_input():
    images = noise(24, 3, 6, 6)
    before = images.clone()
    color_jitter(images, all_orders(0.5))
    assert torch.equal(images, before)


def test_uint8_and_float_give_the_same_views():
    images = (noise(4, 3, 32, 48) * 255).to(torch.uint8)
    params = make_params("3way", 4, 32, 48, seeded(), translate=0.2)
    assert torch.equal(apply(images, params)[0], apply(images.float() / 255, params)[0])


def test_to_float_scales_uint8_alone():
    assert to_float(torch.tensor([0, 51, 255], dtype=torch.uint8)).tolist() == pytest.approx([0, 0.2, 1])
    assert to_float(torch.tensor([0, 0.2, 1], dtype=torch.float64)).dtype == torch.float32
    assert to_float(torch.tensor([0.25, 1])).tolist() == [0.25, 1]


@pytest.mark.parametrize("patch_size", [None, 40])
@pytest.mark.parametrize("variant", VARIANTS)
def test_image_does_not_depend_on_its_batch(variant, patch_size):
    images = noise(6, 3, 50, 70)
    amounts = {"translate": 0.2, "jitter": 0.3, "patch_jitter": 0.3}
    params = make_params(variant, 6, 50, 70, seeded(), **amounts, patch_size=patch_size)
    views = apply(images, params)[0].unflatten(0, (-1, 6))
    for b in range(6):
        alone, _ = apply(images[b : b + 1], of_image(params, b))
        assert torch.allclose(alone, views[:, b], atol=1e-6)


def test_memory_layout_does_not_matter():
    images = noise(4, 3, 32, 48)
    params = make_params("3way", 4, 32, 48, seeded())
    other = images.contiguous(memory_format=torch.channels_last)
    assert torch.equal(apply(images, params)[0], apply(other, params)[0])


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (3, 50), (8, 8)])
def test_tiny_images(size):
    images = noise(20, 3, *size)
    views, _ = apply(images, make_params("3way", 20, *size, seeded()))
    assert views.shape == (60, 3, *size)
    assert torch.isfinite(views).all()


def test_variants_start_with_the_image():
    assert set(VARIANTS) == {"normal", "scar", "union", "3way"}
    assert [v.num_classes for v in VARIANTS.values()] == [2, 2, 2, 3]
    assert all(v.views[0] == "image" for v in VARIANTS.values())


# Crops of a patch model --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(256, 256), (64, 100), (100, 64), (40, 130)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_pastes_lie_inside_the_crop_and_the_crop_inside_the_image(variant, size):
    params = make_params(variant, MANY // 10, *size, seeded(), patch_size=40)
    top, left = params.corner.unbind(1)
    for first, side in ((top, size[0]), (left, size[1])):
        assert first.dtype == torch.int64
        assert (first.min(), first.max()) == (0, side - 40)
        assert first.double().mean() == pytest.approx((side - 40) / 2, abs=0.05 * (side - 40))
    for p in params.pastes:
        assert (p.source_x >= 0).all()
        assert (p.source_y >= 0).all()
        assert (p.source_x + p.width <= 40).all()
        assert (p.source_y + p.height <= 40).all()
        target = corners(p)
        assert min(target.real.min(), target.imag.min()) > -1e-3
        assert max(target.real.max(), target.imag.max()) < 40 + 1e-3


def test_a_patch_scales_with_the_crop_and_a_scar_with_the_image():
    patch, scar = make_params("3way", MANY, 256, 256, seeded(), patch_size=64).pastes
    area = patch.width * patch.height / 64**2
    assert area.mean() == pytest.approx((0.02 + 0.15) / 2, rel=0.03)
    assert (scar.width.min(), scar.width.max()) == (2, 16)
    assert (scar.height.min(), scar.height.max()) == (10, 25)


@pytest.mark.parametrize(
    ("size", "patch_size", "length"), [(256, 32, 12), (512, 64, 25), (512, 128, 50), (128, 64, 12)]
)
def test_a_scar_stays_in_proportion_to_its_crop(size, patch_size, length):
    _, scar = make_params("3way", MANY, size, size, seeded(), patch_size=patch_size).pastes
    assert scar.height.max() == length


@pytest.mark.parametrize("size", [(60, 60), (48, 90), (90, 48)])
def test_views_of_a_crop_are_cut_from_the_augmented_image(size):
    """Against slices: the base augmentation sees the whole image, CutPaste the crop alone."""
    images = noise(6, 3, *size)
    params = make_params("3way", 6, *size, seeded(1), translate=0.1, patch_size=32)
    base = images if params.shift is None else translate(images, params.shift)
    base = color_jitter(to_float(base), params.jitter)
    cut = torch.stack([image[:, y : y + 32, x : x + 32] for image, (y, x) in zip(base, params.corner.tolist())])
    views, labels = apply(images, params)
    assert views.shape == (18, 3, 32, 32)
    assert labels.tolist() == [0] * 6 + [1] * 6 + [2] * 6
    assert torch.allclose(views[:6], cut, atol=1e-6)
    for number, boxes in enumerate(params.pastes, 1):
        assert torch.allclose(views[6 * number : 6 * number + 6], paste(cut, boxes), atol=1e-5)


def test_the_parts_of_apply_are_the_whole():
    images = noise(5, 3, 50, 70)
    params = make_params("3way", 5, 50, 70, seeded(), patch_size=24)
    views, labels = cut_paste(crop(augment(images, params), params), params)
    together = apply(images, params)
    assert torch.equal(views, together[0])
    assert torch.equal(labels, together[1])


def test_a_crop_of_the_whole_image_is_the_image():
    images = noise(4, 3, 32, 32)
    params = make_params("normal", 4, 32, 32, seeded(), patch_size=32)
    assert (params.corner == 0).all()
    whole = replace(params, corner=None, patch_size=None)
    assert torch.equal(apply(images, params)[0], apply(images, whole)[0])


@pytest.mark.parametrize("patch_size", [0, 49, 64])
def test_bad_patch_size(patch_size):
    with pytest.raises(ValueError, match=rf"patch_size lies in \[1, 48\].*not {patch_size}"):
        make_params("normal", 2, 64, 48, seeded(), patch_size=patch_size)


# Errors -----------------------------------------------------------------------------------------------------------


def test_unknown_variant():
    with pytest.raises(ValueError, match=r"'4way'.*normal, scar, union, 3way"):
        make_params("4way", 2, 32, 32, seeded())


@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 1, 32, 32), (2, 4, 32, 32), (2, 32, 32, 3)])
def test_bad_shape(shape):
    with pytest.raises(ValueError, match="must be"):
        apply(torch.zeros(shape), make_params("normal", 2, 32, 32, seeded()))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("count", [1, 3])
def test_batch_of_another_size_than_its_parameters(variant, count):
    with pytest.raises(ValueError, match=rf"drawn for images \(2, 3, 32, 32\), got \({count}, 3, 32, 32\)"):
        apply(torch.zeros(count, 3, 32, 32), make_params(variant, 2, 32, 32, seeded()))


@pytest.mark.parametrize("value", [-0.1, 1, 1.5, math.nan])
def test_bad_translate(value):
    with pytest.raises(ValueError, match=f"translate.*{value}"):
        make_params("normal", 2, 32, 32, seeded(), translate=value)


@pytest.mark.parametrize("name", ["jitter", "patch_jitter"])
@pytest.mark.parametrize("value", [-0.1, 0.51, math.nan])
def test_bad_jitter(name, value):
    with pytest.raises(ValueError, match=f"^{name} .*{value}"):
        make_params("normal", 2, 32, 32, seeded(), **{name: value})


def test_params_are_frozen():
    params = make_params("normal", 2, 32, 32, seeded())
    assert isinstance(params, ViewParams)
    with pytest.raises(AttributeError):
        params.shift = None


def test_parameters_of_another_size_or_count_are_refused():
    params = make_params("3way", 4, 64, 48, torch.Generator().manual_seed(0))
    for shape in ((4, 3, 32, 32), (4, 3, 48, 64), (4, 3, 128, 128), (3, 3, 64, 48)):
        with pytest.raises(ValueError, match=r"drawn for images \(4, 3, 64, 48\)"):
            apply(torch.zeros(shape), params)
    with pytest.raises(ValueError, match="int64"):
        apply(torch.zeros(4, 3, 64, 48, dtype=torch.int64), params)
