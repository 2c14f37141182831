import cmath
import math
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from test_image_ops import noise, seeded, torchvision_jitter

from cutpaste import VARIANTS, ViewParams, make_views, rows, sample_params
from image_ops import BRIGHTNESS, PasteParams, color_jitter, paste_, to_float, translate


def paste(images, params):
    images = images.contiguous(memory_format=torch.channels_last)
    return paste_(images.clone(), images, params)


STILL = {"translate": 0, "jitter": 0, "patch_jitter": 0}  # cut and paste, and nothing else
MANY = 20_000
HARD = ["normal", "scar", "union", "3way"]  # variants whose patches have hard edges
SIDE = 10_000  # drawing costs nothing per pixel, and at this size whole pixels hardly change a ratio


def coordinate_images(count, height, width):
    """Each pixel's color says where it is: red is x / 256, green y / 256, blue image / 256, exact in float32."""
    image, y, x = torch.meshgrid(torch.arange(count), torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([x, y, image], 1) / 256


def one_paste(width, height, source, center, angle):
    numbers = (width, height, *source, *center, angle)
    return PasteParams(*(torch.tensor([float(n)]) for n in numbers), jitter=None)


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


def assert_inside(p, height, width):
    """Sources and targets of whole, positive size lie inside the image."""
    for numbers in (p.width, p.height, p.source_x, p.source_y):
        assert torch.equal(numbers, numbers.round())
    assert min(p.width.min(), p.height.min()) >= 1
    assert min(p.source_x.min(), p.source_y.min()) >= 0
    assert (p.source_x + p.width <= width).all()
    assert (p.source_y + p.height <= height).all()
    target = corners(p)
    assert min(target.real.min(), target.imag.min()) > -1e-3
    assert target.real.max() < width + 1e-3
    assert target.imag.max() < height + 1e-3


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
                share = 1.0
                if p.soft is not None and p.soft[b] > 0:
                    for edge in (at.real, p.width[b] - at.real), (at.imag, p.height[b] - at.imag):
                        share *= min(1.0, float(min(edge)) / p.soft[b].item())
                new = image[:, source_y + int(at.imag), source_x + int(at.real)]
                result[:, y, x] = new if share == 1 else share * new + (1 - share) * image[:, y, x]
    return result, unsure


def drawn(variant, height=SIDE, width=SIDE, count=MANY):
    return sample_params(variant, count, height, width, seeded()).pastes


# Cut and paste ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(100, 180), (180, 100)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_paste_equals_pixel_loop(variant, size):
    images = coordinate_images(3, *size)
    params = sample_params(variant, 3, *size, seeded(1), **STILL)
    views = make_views(images, params)[0].unflatten(0, (-1, 3))
    assert torch.equal(views[0], images)
    for view, p in zip(views[1:], params.pastes):
        for b in range(3):
            expected, unsure = paste_by_hand(images[b], p, b)
            assert unsure.float().mean() < 0.02
            if p.soft is None:
                assert torch.equal(view[b][:, ~unsure], expected[:, ~unsure])
            else:
                assert torch.allclose(view[b][:, ~unsure], expected[:, ~unsure], atol=1e-4)


@pytest.mark.parametrize("size", [(100, 180), (180, 100), (256, 256)])
@pytest.mark.parametrize("variant", HARD)
def test_changed_pixels_lie_in_target_and_come_from_source(variant, size):
    images = coordinate_images(50, *size)
    params = sample_params(variant, 50, *size, seeded(2), **STILL)
    views = make_views(images, params)[0].unflatten(0, (-1, 50))
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


@pytest.mark.parametrize("variant", ["normal", "scar"])
def test_no_soft_edge_is_a_hard_edge(variant):
    """But for pixels on the very border."""
    images = noise(8, 3, 64, 64)
    (boxes,) = sample_params(variant, 8, 64, 64, seeded(2), **STILL).pastes
    hard, soft = (paste(images, replace(boxes, soft=soft)) for soft in (None, torch.zeros(8)))
    pasted = (hard != images).any(1)
    assert pasted.any((1, 2)).all()
    assert ((hard - soft).abs() > 1e-5).any(1).sum() < 0.02 * pasted.sum()


def test_upright_paste_is_a_slice():
    images = noise(1, 3, 12, 20)
    result = paste(images, one_paste(6, 4, source=(13, 1), center=(5, 9), angle=0))
    expected = images.clone()
    expected[:, :, 7:11, 2:8] = images[:, :, 1:5, 13:19]
    assert torch.equal(result, expected)
    whole = one_paste(20, 12, source=(0, 0), center=(10, 6), angle=0)
    assert torch.equal(paste(images, whole), images)


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


@pytest.mark.parametrize("size", [(256, 256), (64, 96)])
def test_white_stays_white(size):
    """A scar rotated the naive way leaves black corners."""
    images = torch.ones(64, 3, *size)
    views, _ = make_views(images, sample_params("3way", 64, *size, seeded(), jitter=0, patch_jitter=0))
    assert (views == 1).all()


def test_paste_sees_the_base_augmentation():
    images = noise(6, 3, 40, 60)
    params = sample_params("3way", 6, 40, 60, seeded(), translate=0.3, jitter=0.4)
    views = make_views(images, params)[0].unflatten(0, (3, 6))
    base = color_jitter(to_float(translate(images, params.shift)), params.jitter)
    assert not torch.equal(base, images)
    assert torch.equal(views[0], base)
    assert torch.equal(views[1], paste(base, params.pastes[0]))
    assert torch.equal(views[2], paste(base, params.pastes[1]))


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
    assert torch.allclose(make_views(images, params)[0][24:], expected, atol=1e-5)


# Drawing ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [SIDE, 2 * SIDE])
def test_patch_area_is_uniform_and_aspect_log_uniform_relative_to_the_image(width):
    (p,) = drawn("normal", SIDE, width)
    w, h = p.width.double() / width, p.height.double() / SIDE
    for values, low, high in ((w * h, 0.02, 0.15), ((w / h).log(), math.log(0.3), math.log(3.3))):
        assert low - 0.01 * abs(low) < values.min() < low + 0.01 * abs(low)
        assert high - 0.005 * high < values.max() < high + 0.002 * high
        counts = torch.histc(values, 10, low, high)
        assert (counts > 0.09 * MANY).all()
        assert (counts < 0.11 * MANY).all()


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


@pytest.mark.parametrize("size", [(256, 256), (64, 64), (40, 130), (130, 40), (7, 9)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_source_and_target_lie_inside_the_image(variant, size):
    for p in drawn(variant, *size):
        if p.soft is not None and size[0] != size[1]:  # turned, a long patch does not fit: its middle does
            p = replace(p, width=torch.ones_like(p.width), height=torch.ones_like(p.height))
        assert_inside(p, *size)


@pytest.mark.parametrize("variant", ["normal", "scar"])
def test_source_and_target_reach_every_border(variant):
    (p,) = drawn(variant, 40, 60)
    assert (p.source_x.min(), p.source_y.min()) == (0, 0)
    assert ((p.source_x + p.width).max(), (p.source_y + p.height).max()) == (60, 40)
    target = corners(p)
    assert max(target.real.min(), target.imag.min()) < 0.1
    assert min(target.real.max() - 60, target.imag.max() - 40) > -0.1


def test_source_and_target_are_independent():
    (p,) = drawn("normal")
    source = p.source_x / (SIDE - p.width)
    target = (p.center_x - p.width / 2) / (SIDE - p.width)
    assert abs(np.corrcoef(source, target)[0, 1]) < 0.03
    assert abs(source.mean() - 0.5) < 0.01
    assert abs(target.mean() - 0.5) < 0.01


def test_patch_is_upright_and_lands_on_whole_pixels():
    (p,) = drawn("normal", 64, 96)
    assert (p.angle == 0).all()
    left, top = p.center_x - p.width / 2, p.center_y - p.height / 2
    assert torch.equal(left, left.round())
    assert torch.equal(top, top.round())


@pytest.mark.parametrize(("amount", "down", "right"), [(0.04, 4, 2), (0.1, 10, 5), (0.005, 0, 0)])
def test_shift_is_uniform_and_reaches_both_ends(amount, down, right):
    shift = sample_params("normal", MANY, 100, 50, seeded(), translate=amount).shift
    for column, most in ((shift[:, 0], down), (shift[:, 1], right)):
        values, counts = column.unique(return_counts=True)
        assert values.tolist() == list(range(-most, most + 1))
        assert (counts > 0.8 * MANY / len(values)).all()


def test_base_and_patch_have_their_own_amounts():
    params = sample_params("3way", 1000, 8, 8, seeded(), jitter=0.01, patch_jitter=0.3)
    assert (params.jitter.factors[:, BRIGHTNESS] - 1).abs().max() <= 0.0101
    for p in params.pastes:
        assert 0.25 < (p.jitter.factors[:, BRIGHTNESS] - 1).abs().max() <= 0.3001


def test_no_amount_means_none():
    params = sample_params("3way", 4, 32, 32, seeded(), **STILL)
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
    for side, low, high in ((p.width[is_scar], 2, 16), (p.height[is_scar], 10, 25)):
        assert low * scale - 1 <= side.min() <= side.max() <= high * scale + 1


@pytest.mark.parametrize("variant", VARIANTS)
def test_same_seed_same_params(variant):
    first, second, other = (tensors(sample_params(variant, 8, 64, 96, seeded(s))) for s in (5, 5, 6))
    assert len(first) == len(second) > 8
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    assert not all(torch.equal(a, b) for a, b in zip(first, other))


def test_drawing_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    params = sample_params("3way", 8, 64, 96, seeded())
    make_views(noise(8, 3, 64, 96), params)
    assert torch.equal(torch.get_rng_state(), before)


def test_each_image_gets_its_own_parameters():
    params = sample_params("3way", 64, 256, 256, seeded())
    assert len(params.shift.unique(dim=0)) > 32
    assert len(params.jitter.factors.unique(dim=0)) == 64
    assert len(params.jitter.order.unique(dim=0)) > 12
    for p in params.pastes:
        assert len(p.center_x.unique()) > 48
        assert len(p.source_x.unique()) > 32
        assert len(p.width.unique()) > 8
        assert len(p.jitter.factors.unique(dim=0)) == 64


@pytest.mark.parametrize("part", [slice(1, 3), torch.tensor([4, 0])])
@pytest.mark.parametrize("amounts", [STILL, {"patch_size": 24}])
def test_rows_are_the_parameters_of_some_images(amounts, part):
    params = sample_params("3way", 5, 32, 48, seeded(), **amounts)
    some = rows(params, part)
    assert [type(p) for p in (some, some.pastes, *some.pastes)] == [ViewParams, tuple, PasteParams, PasteParams]
    assert len(tensors(some)) == len(tensors(params)) >= 14
    assert all(torch.equal(a, b[part]) for a, b in zip(tensors(some), tensors(params)))
    others = ("variant", "height", "width", "patch_size")
    assert [getattr(some, name) for name in others] == [getattr(params, name) for name in others]
    with pytest.raises(AttributeError):
        some.shift = None  # frozen


def test_soft_patches_are_turned_any_way_and_half_have_an_edge_half_of_which_is_inside():
    hard, soft = drawn("3way"), drawn("soft")
    for of, p in zip(hard, soft):
        assert p.angle.min() < -179
        assert p.angle.max() > 179
        assert abs(p.angle.mean()) < 3
        for size, other in ((p.width, of.width), (p.height, of.height)):
            assert (size - p.soft).mean() == pytest.approx(other.mean().item(), rel=0.03)
        share = (p.soft / torch.minimum(p.width - p.soft, p.height - p.soft))[p.soft > 0]
        assert len(share) / len(p.soft) == pytest.approx(0.5, abs=0.02)
        assert share.min() > 0.045
        assert share.max() < 0.51
        assert share.mean() == pytest.approx(0.275, abs=0.005)
