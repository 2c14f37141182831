import cmath
import itertools
import math
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from test_color import noise, seeded, torchvision_jitter

from color import BRIGHTNESS, color_jitter, to_float
from cutpaste import (
    VARIANTS,
    VIEWS,
    Variant,
    View,
    ViewParams,
    apply,
    augment,
    augment_crops,
    cut_paste,
    make_params,
    translate,
    visible,
)
from paste import PasteParams, draw_patch, paste, paste_, rows

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
    return make_params(variant, count, height, width, seeded()).pastes


# Cut and paste ------------------------------------------------------------------------------------------------------


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
            if p.soft is None:
                assert torch.equal(view[b][:, ~unsure], expected[:, ~unsure])
            else:
                assert torch.allclose(view[b][:, ~unsure], expected[:, ~unsure], atol=1e-4)


@pytest.mark.parametrize("size", [(100, 180), (180, 100), (256, 256)])
@pytest.mark.parametrize("variant", HARD)
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
    shift = make_params("normal", MANY, 100, 50, seeded(), translate=amount).shift
    for column, most in ((shift[:, 0], down), (shift[:, 1], right)):
        values, counts = column.unique(return_counts=True)
        assert values.tolist() == list(range(-most, most + 1))
        assert (counts > 0.8 * MANY / len(values)).all()


def test_base_and_patch_have_their_own_amounts():
    params = make_params("3way", 1000, 8, 8, seeded(), jitter=0.01, patch_jitter=0.3)
    assert (params.jitter.factors[:, BRIGHTNESS] - 1).abs().max() <= 0.0101
    for p in params.pastes:
        assert 0.25 < (p.jitter.factors[:, BRIGHTNESS] - 1).abs().max() <= 0.3001


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
    for side, low, high in ((p.width[is_scar], 2, 16), (p.height[is_scar], 10, 25)):
        assert low * scale - 1 <= side.min() <= side.max() <= high * scale + 1


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


@pytest.mark.parametrize("part", [slice(1, 3), torch.tensor([4, 0])])
@pytest.mark.parametrize("amounts", [STILL, {"patch_size": 24}])
def test_rows_are_the_parameters_of_some_images(amounts, part):
    params = make_params("3way", 5, 32, 48, seeded(), **amounts)
    some = rows(params, part)
    assert [type(p) for p in (some, some.pastes, *some.pastes)] == [ViewParams, tuple, PasteParams, PasteParams]
    assert len(tensors(some)) == len(tensors(params)) >= 14
    assert all(torch.equal(a, b[part]) for a, b in zip(tensors(some), tensors(params)))
    others = ("variant", "height", "width", "patch_size")
    assert [getattr(some, name) for name in others] == [getattr(params, name) for name in others]
    with pytest.raises(AttributeError):
        some.shift = None  # frozen


# Translation --------------------------------------------------------------------------------------------------------


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


# Views --------------------------------------------------------------------------------------------------------------


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


def test_type_and_memory_layout_do_not_matter():
    images = (noise(4, 3, 32, 48) * 255).to(torch.uint8)
    params = make_params("3way", 4, 32, 48, seeded(), translate=0.2)
    views, floats = apply(images, params)[0], images.float() / 255
    assert torch.equal(views, apply(floats, params)[0])
    assert torch.equal(views, apply(floats.contiguous(memory_format=torch.channels_last), params)[0])


@pytest.mark.parametrize("patch_size", [None, 40])
@pytest.mark.parametrize("variant", VARIANTS)
def test_image_does_not_depend_on_its_batch(variant, patch_size):
    images = noise(6, 3, 50, 70)
    amounts = {"translate": 0.2, "jitter": 0.3, "patch_jitter": 0.3}
    params = make_params(variant, 6, 50, 70, seeded(), **amounts, patch_size=patch_size)
    views = apply(images, params)[0].unflatten(0, (-1, 6))
    for b in range(6):
        alone, _ = apply(images[b : b + 1], rows(params, slice(b, b + 1)))
        assert torch.allclose(alone, views[:, b], atol=1e-6)


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (3, 50), (8, 8)])
def test_tiny_images(size):
    images = noise(20, 3, *size)
    views, _ = apply(images, make_params("3way", 20, *size, seeded()))
    assert views.shape == (60, 3, *size)
    assert torch.isfinite(views).all()


def test_variants_start_with_the_image():
    assert list(VARIANTS) == [*HARD, "soft"]
    assert [v.num_classes for v in VARIANTS.values()] == [2, 2, 2, 3, 3]
    assert all(v.views[0] == "image" for v in VARIANTS.values())
    assert {name for v in VARIANTS.values() for name in v.views} == set(VIEWS)


def test_every_view_has_a_title_and_a_color_of_its_own():
    assert len({v.title for v in VIEWS.values()}) == len({v.color for v in VIEWS.values()}) == len(VIEWS)
    assert all(len(v.color) == 7 and v.color[0] == "#" and int(v.color[1:], 16) for v in VIEWS.values())


@pytest.mark.parametrize("patch_size", [None, 30])
def test_a_new_view_is_one_entry_of_the_table(monkeypatch, patch_size):
    """A fourth class whose box, with the colors inverted, stays where it is."""

    def box_of(p, b):
        x, y, w, h = (int(n[b]) for n in (p.source_x, p.source_y, p.width, p.height))
        return b, slice(None), slice(y, y + h), slice(x, x + w)

    def invert_(target, images, p):
        for b in range(len(images)):
            target[box_of(p, b)] = 1 - images[box_of(p, b)]

    monkeypatch.setitem(VIEWS, "inverted", View(draw_patch, invert_, "Inverted", "#cc0000"))
    monkeypatch.setitem(VARIANTS, "4way", Variant(("image", "patch", "scar", "inverted"), "3way and inverted colors"))
    images = noise(18, 3, 40, 60)  # more than are acted on at once
    params, three = (make_params(v, 18, 40, 60, seeded(), patch_size=patch_size) for v in ("4way", "3way"))
    views, labels = apply(images, params)
    assert len(views) == 4 * 18
    assert labels.tolist() == [0] * 18 + [1] * 18 + [2] * 18 + [3] * 18
    assert torch.equal(views[: 3 * 18], apply(images, three)[0])
    expected = views[:18].clone()
    for b in range(18):
        expected[box_of(params.pastes[2], b)] = 1 - expected[box_of(params.pastes[2], b)]
    assert not torch.equal(expected, views[:18])
    assert torch.equal(views[3 * 18 :], expected)


@pytest.mark.parametrize(
    ("views", "message"),
    [
        (("image", "patch", "hole"), r"'odd': view 2 is 'hole': choose one of patch, scar, patch or scar, soft"),
        (("image", "image"), r"'odd': view 1 is 'image': choose one of patch, scar, patch or scar, soft"),
        (("patch", "scar"), r"'odd': view 0 is 'patch': choose one of image"),
    ],
)
def test_unknown_or_misplaced_view(monkeypatch, views, message):
    monkeypatch.setitem(VARIANTS, "odd", Variant(views, ""))
    with pytest.raises(ValueError, match=message):
        make_params("odd", 2, 32, 32, seeded())


# Crops of a patch model ---------------------------------------------------------------------------------------------


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
        assert_inside(p, 40, 40)


@pytest.mark.parametrize(
    ("size", "patch_size", "widths", "lengths"),
    [
        (256, 64, (2, 16), (10, 25)),
        (256, 32, (1, 8), (5, 12)),
        (512, 64, (2, 16), (10, 25)),
        (512, 128, (4, 32), (20, 50)),
        (128, 64, (1, 8), (5, 12)),
    ],
)
def test_a_patch_scales_with_the_crop_and_a_scar_with_the_image(size, patch_size, widths, lengths):
    """But a scar stays in proportion to a crop that is small against the image."""
    patch, scar = make_params("3way", MANY, size, size, seeded(), patch_size=patch_size).pastes
    area = patch.width * patch.height / patch_size**2
    assert area.mean() == pytest.approx((0.02 + 0.15) / 2, rel=0.03)
    assert (scar.width.min(), scar.width.max()) == widths
    assert (scar.height.min(), scar.height.max()) == lengths


@pytest.mark.parametrize("size", [(60, 60), (48, 90), (90, 48)])
def test_views_of_a_crop_are_cut_from_the_augmented_image(size):
    """Against slices: the base augmentation sees the whole image, CutPaste the crop alone. Images this small are
    sampled whole."""
    images = noise(6, 3, *size)
    params = make_params("3way", 6, *size, seeded(1), translate=0.1, patch_size=32)
    base = color_jitter(to_float(translate(images, params.shift)), params.jitter)
    cut = torch.stack([image[:, y : y + 32, x : x + 32] for image, (y, x) in zip(base, params.corner.tolist())])
    views, labels = apply(images, params)
    crops, source, sample = augment_crops(images, params)
    assert source is None
    assert torch.allclose(sample[:, :, 0], base.flatten(2), atol=1e-6)
    assert torch.equal(views, cut_paste(crops, None, params)[0])
    assert torch.equal(views, cut_paste(crops.contiguous(memory_format=torch.channels_last), None, params)[0])
    assert views.shape == (18, 3, 32, 32)
    assert labels.tolist() == [0] * 6 + [1] * 6 + [2] * 6
    assert torch.allclose(views[:6], cut, atol=1e-6)
    for number, boxes in enumerate(params.pastes, 1):
        assert torch.allclose(views[6 * number : 6 * number + 6], paste(cut, boxes), atol=1e-5)


def test_a_crop_of_the_whole_image_is_the_image():
    images = noise(4, 3, 32, 32)
    params = make_params("normal", 4, 32, 32, seeded(), patch_size=32)
    assert (params.corner == 0).all()
    whole = replace(params, corner=None, patch_size=None)
    assert torch.allclose(apply(images, params)[0], apply(images, whole)[0], atol=1e-6)


def test_statistics_of_a_large_image_are_those_of_an_even_sample():
    images = noise(4, 3, 256, 200) ** torch.tensor([0.3, 1, 2, 4])[:, None, None, None]
    params = make_params("normal", 4, 256, 200, seeded(3), jitter=0.5, patch_size=64)
    crops, _, sample = augment_crops(images, params)
    base = augment(images, params)
    assert sample.shape == (4, 3, 1, 85 * 67)  # every third pixel
    for statistic in (torch.mean, torch.std):
        assert torch.allclose(statistic(sample, (1, 2, 3)), statistic(base, (1, 2, 3)), atol=0.01)
    cut = torch.stack([image[:, y : y + 64, x : x + 64] for image, (y, x) in zip(base, params.corner.tolist())])
    assert torch.allclose(crops, cut, atol=0.01)  # the contrast refers to the mean of the sample
    still = replace(params, jitter=None)
    assert torch.equal(augment_crops(images, still)[0], crops_by_hand(images, still))


def crops_by_hand(images, params):
    moved = translate(images, params.shift)
    return torch.stack([image[:, y : y + 64, x : x + 64] for image, (y, x) in zip(moved, params.corner.tolist())])


def test_soft_patches_come_from_anywhere_in_the_image():
    """Against slices: the same boxes, cut from the second crop and pasted into the first."""
    images = noise(6, 3, 60, 90)
    params = make_params("soft", 6, 60, 90, seeded(1), translate=0.1, patch_size=32)
    assert not torch.equal(params.source, params.corner)
    assert make_params("3way", 6, 60, 90, seeded(1), patch_size=32).source is None
    base = color_jitter(to_float(translate(images, params.shift)), params.jitter)
    cut, source = (
        torch.stack([image[:, y : y + 32, x : x + 32] for image, (y, x) in zip(base, corner.tolist())])
        for corner in (params.corner, params.source)
    )
    views = apply(images, params)[0].split(6)
    assert torch.allclose(views[0], cut, atol=1e-6)
    for view, boxes in zip(views[1:], params.pastes):
        target = cut.contiguous(memory_format=torch.channels_last).clone()
        expected = paste_(target, source.contiguous(memory_format=torch.channels_last), boxes)
        assert torch.allclose(view, expected, atol=1e-5)
        assert ((view - cut).abs().amax(1) > 0.01).any((1, 2)).all()


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


# Views that show nothing ------------------------------------------------------------------------------------------


def test_visible_counts_pixels_that_differ_by_half_a_deviation():
    params = make_params("3way", 4, 32, 32, seeded())
    patch, scar = params.pastes
    params = replace(params, pastes=(full(patch, 8, 8), full(scar, 2, 4)))
    views = torch.full((12, 3, 32, 32), 0.5)
    views[4, 1, 0, :10] += 0.051  # one channel of ten pixels: just enough
    views[5, :, 0, :9] += 0.4  # too few
    views[6] += 0.049  # too little
    views[9, :, :2, :2] -= 0.06  # half of a patch of eight pixels
    views[10, :, 0, :3] -= 0.4
    whole = torch.tensor([0.4, 0.6]).repeat(4, 3, 1, 8)  # a deviation of 0.1
    seen = visible(views, params, whole).view(3, 4).int().tolist()
    assert seen == [[1, 1, 0, 0], [1, 0, 0, 0], [0, 1, 0, 0]]
    assert visible(views, params, 0.5 * whole).view(3, 4)[1].tolist() == [True, False, True, False]


def full(p, width, height):
    return replace(p, width=torch.full_like(p.width, width), height=torch.full_like(p.height, height))


@pytest.mark.parametrize("variant", VARIANTS)
def test_nothing_is_visible_on_an_even_image_and_nearly_all_in_noise(variant):
    params = make_params(variant, 40, 64, 64, seeded(), patch_size=40, jitter=0, patch_jitter=0)
    for images, share in ((torch.full((40, 3, 64, 64), 0.3), 0.0), (noise(40, 3, 64, 64), 0.95)):
        seen = visible(apply(images, params)[0], params, images)
        assert (seen.float().mean() >= share) if share else not seen.any()


@pytest.mark.parametrize("patch_size", [0, 49, 64])
def test_bad_patch_size(patch_size):
    with pytest.raises(ValueError, match=rf"patch_size lies in \[1, 48\].*not {patch_size}"):
        make_params("normal", 2, 64, 48, seeded(), patch_size=patch_size)


# Errors -------------------------------------------------------------------------------------------------------------


def test_unknown_variant():
    with pytest.raises(ValueError, match=r"'4way'.*normal, scar, union, 3way, soft"):
        make_params("4way", 2, 32, 32, seeded())


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    "shape",
    [(3, 64, 48), (4, 1, 64, 48), (4, 4, 64, 48), (4, 64, 48, 3), (1, 3, 64, 48), (5, 3, 64, 48), (4, 3, 48, 64)],
)
def test_images_of_another_shape_than_their_parameters(variant, shape):
    params = make_params(variant, 4, 64, 48, seeded())
    got = ", ".join(map(str, shape))
    with pytest.raises(ValueError, match=rf"drawn for images \(4, 3, 64, 48\), got \({got}\)"):
        apply(torch.zeros(shape), params)


def test_images_of_another_type():
    with pytest.raises(ValueError, match="int64"):
        apply(torch.zeros(4, 3, 64, 48, dtype=torch.int64), make_params("3way", 4, 64, 48, seeded()))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *itertools.product(["translate"], [-0.1, 1, 1.5, math.nan]),
        *itertools.product(["jitter", "patch_jitter"], [-0.1, 0.51, math.nan]),
    ],
)
def test_bad_amount(name, value):
    with pytest.raises(ValueError, match=f"^{name} .*{value}"):
        make_params("normal", 2, 32, 32, seeded(), **{name: value})
