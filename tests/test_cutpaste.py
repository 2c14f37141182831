"""Test what is drawn for a batch, the views made of it, crops, and which views show anything."""

import math
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from test_image_ops import KINDS, ORDERS, STILL, noise, paste, seeded

from config import VARIANTS, Variant
from cutpaste import (
    VIEWS,
    View,
    ViewParams,
    augment,
    augment_crops,
    cut_paste,
    draw_jitter,
    draw_patch,
    make_views,
    rows,
    sample_params,
    visible,
)
from image_ops import BRIGHTNESS, PasteParams, color_jitter, paste_, to_float, translate

MANY = 20_000
SIDE = 10_000  # drawing costs nothing per pixel, and at this size whole pixels hardly change a ratio
every_variant = pytest.mark.parametrize("variant", VARIANTS)


def drawn(variant, height=SIDE, width=SIDE, **amounts):
    return sample_params(variant, MANY, height, width, seeded(), **amounts).pastes


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


def full(p, width, height):
    """The same boxes, but for their size."""
    return replace(p, width=torch.full_like(p.width, width), height=torch.full_like(p.height, height))


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


def assert_uniform(values, low, high, bins=10, tolerance=1e-3):
    """Reaching both ends, in each bin as often as in any other."""
    assert low - tolerance <= values.min() < low + 0.01 * (high - low)
    assert high - 0.01 * (high - low) < values.max() <= high + tolerance
    counts = torch.histc(values, bins, low, high) * bins / len(values)
    assert (counts > 0.9).all()
    assert (counts < 1.1).all()


# Drawing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("amount", [0.1, 0.5])
def test_jitter_is_uniform_in_its_range_and_independent_in_any_order(amount):
    jitter = draw_jitter(MANY, amount, seeded())
    for kind, middle in zip(KINDS, (1, 1, 1, 0)):
        assert_uniform(jitter.factors[:, kind], middle - amount, middle + amount)
    assert np.abs(np.corrcoef(jitter.factors.T) - np.eye(4)).max() < 0.03
    orders, counts = jitter.order.unique(dim=0, return_counts=True)
    assert sorted(map(tuple, orders.tolist())) == ORDERS
    assert (counts > 0.8 * MANY / 24).all()


@pytest.mark.parametrize("width", [SIDE, 2 * SIDE])
def test_patch_area_is_uniform_and_aspect_log_uniform_relative_to_the_image(width):
    """Upright, on whole pixels, from and to places that do not depend on each other."""
    (p,) = drawn("normal", SIDE, width)
    w, h = p.width.double() / width, p.height.double() / SIDE
    assert_uniform(w * h, 0.02, 0.15)
    assert_uniform((w / h).log(), math.log(0.3), math.log(3.3), tolerance=0.01)
    assert (p.angle == 0).all()
    left, top = p.center_x - p.width / 2, p.center_y - p.height / 2
    assert torch.equal(left, left.round())
    assert torch.equal(top, top.round())
    source, target = p.source_x / (width - p.width), left / (width - p.width)
    assert_uniform(source, 0, 1)
    assert_uniform(target, 0, 1)
    assert abs(np.corrcoef(source, target)[0, 1]) < 0.03


def test_patch_of_whole_pixels_keeps_its_area():
    (p,) = drawn("normal", 200, 300)
    assert ((p.width + 0.5) * (p.height + 0.5) >= 0.02 * 200 * 300).all()
    assert ((p.width - 0.5) * (p.height - 0.5) <= 0.15 * 200 * 300).all()


@pytest.mark.parametrize(
    ("size", "patch_size", "widths", "lengths"),
    [
        ((256, 256), None, (2, 16), (10, 25)),
        ((128, 128), None, (1, 8), (5, 12)),
        ((128, 300), None, (1, 8), (5, 12)),
        ((300, 128), None, (1, 8), (5, 12)),
        ((512, 512), None, (4, 32), (20, 50)),
        ((256, 256), 64, (2, 16), (10, 25)),
        ((256, 256), 32, (1, 8), (5, 12)),
        ((512, 512), 64, (2, 16), (10, 25)),
        ((512, 512), 128, (4, 32), (20, 50)),
        ((128, 128), 64, (1, 8), (5, 12)),
    ],
)
def test_a_scar_scales_with_the_image_and_a_patch_with_the_crop(size, patch_size, widths, lengths):
    """But a scar stays in proportion to a crop that is small against the image. Its angle is uniform."""
    patch, scar = drawn("3way", *size, patch_size=patch_size)
    assert scar.width.unique().tolist() == list(range(widths[0], widths[1] + 1))
    assert scar.height.unique().tolist() == list(range(lengths[0], lengths[1] + 1))
    assert_uniform(scar.angle, -45, 45)
    area = patch.width * patch.height / (patch_size**2 if patch_size else size[0] * size[1])
    assert area.mean() == pytest.approx((0.02 + 0.15) / 2, rel=0.03)


@pytest.mark.parametrize("size", [(256, 256), (64, 64), (40, 130), (130, 40), (7, 9)])
@every_variant
def test_source_and_target_lie_inside_the_image_and_reach_every_border(variant, size):
    height, width = size
    for p in drawn(variant, *size):
        if p.soft is not None and height != width:  # turned, a long patch does not fit: its middle does
            p = full(p, 1, 1)
        assert_inside(p, *size)
        if variant in ("normal", "scar") and 40 in size:
            assert (p.source_x.min(), p.source_y.min()) == (0, 0)
            assert ((p.source_x + p.width).max(), (p.source_y + p.height).max()) == (width, height)
            target = corners(p)
            assert max(target.real.min(), target.imag.min()) < 0.1
            assert min(target.real.max() - width, target.imag.max() - height) > -0.1


@pytest.mark.parametrize("size", [(256, 256), (64, 100), (100, 64), (40, 130)])
@every_variant
def test_pastes_lie_inside_the_crop_and_the_crop_inside_the_image(variant, size):
    params = sample_params(variant, MANY // 10, *size, seeded(), patch_size=40)
    for first, side in zip(params.corner.unbind(1), size):
        assert first.dtype == torch.int64
        assert (first.min(), first.max()) == (0, side - 40)
        assert first.double().mean() == pytest.approx((side - 40) / 2, abs=0.05 * (side - 40))
    for p in params.pastes:
        assert_inside(p, 40, 40)


@pytest.mark.parametrize(("amount", "down", "right"), [(0.04, 4, 2), (0.1, 10, 5), (0.005, 0, 0)])
def test_shift_is_uniform_and_reaches_both_ends(amount, down, right):
    shift = sample_params("normal", MANY, 100, 50, seeded(), translate=amount).shift
    for column, largest in zip(shift.unbind(1), (down, right)):
        values, counts = column.unique(return_counts=True)
        assert values.tolist() == list(range(-largest, largest + 1))
        assert (counts > 0.8 * MANY / len(values)).all()


def test_base_and_patch_have_their_own_amounts_and_no_amount_draws_nothing():
    params = sample_params("3way", 1000, 8, 8, seeded(), jitter=0.01, patch_jitter=0.3)
    assert (params.jitter.factors[:, BRIGHTNESS] - 1).abs().max() <= 0.0101
    for p in params.pastes:
        assert 0.25 < (p.jitter.factors[:, BRIGHTNESS] - 1).abs().max() <= 0.3001
    params, generator = sample_params("3way", 4, 32, 32, seeded(), **STILL), seeded()
    assert params.shift is params.jitter is None
    assert [p.jitter for p in params.pastes] == [None, None]
    assert draw_jitter(3, 0, generator) is None
    assert torch.equal(generator.get_state(), seeded().get_state())


def test_union_draws_both_kinds_in_equal_parts():
    (p,) = drawn("union")
    is_scar = p.angle != 0
    assert 0.48 < is_scar.float().mean() < 0.52
    area = (p.width * p.height)[~is_scar] / SIDE**2
    assert 0.0199 < area.min() < area.max() < 0.1501
    scale = SIDE / 256
    for side, low, high in ((p.width[is_scar], 2, 16), (p.height[is_scar], 10, 25)):
        assert low * scale - 1 <= side.min() <= side.max() <= high * scale + 1


def test_soft_patches_are_turned_any_way_and_half_have_an_edge_half_of_which_is_inside():
    for hard, p in zip(drawn("3way"), drawn("soft")):
        assert_uniform(p.angle, -180, 180)
        for size, other in ((p.width, hard.width), (p.height, hard.height)):
            assert (size - p.soft).mean() == pytest.approx(other.mean().item(), rel=0.03)
        share = (p.soft / torch.minimum(p.width - p.soft, p.height - p.soft))[p.soft > 0]
        assert len(share) / len(p.soft) == pytest.approx(0.5, abs=0.02)
        assert 0.045 < share.min() < share.max() < 0.51
        assert share.mean() == pytest.approx(0.275, abs=0.005)


@every_variant
def test_a_seed_gives_the_same_parameters_others_for_each_image(variant):
    """And the global generator is left alone."""
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first, second, other = (sample_params(variant, 64, 256, 256, seeded(seed)) for seed in (5, 5, 6))
    make_views(noise(2, 3, 256, 256), rows(first, slice(2)))
    assert torch.equal(torch.get_rng_state(), before)
    assert len(tensors(first)) == len(tensors(second)) > 8
    assert all(torch.equal(a, b) for a, b in zip(tensors(first), tensors(second)))
    assert not all(torch.equal(a, b) for a, b in zip(tensors(first), tensors(other)))
    assert len(first.shift.unique(dim=0)) > 32
    assert len(first.jitter.order.unique(dim=0)) > 12
    for jitter in (first.jitter, *(p.jitter for p in first.pastes)):
        assert len(jitter.factors.unique(dim=0)) == 64
    for p in first.pastes:
        assert min(len(p.center_x.unique()), len(p.source_x.unique())) > 32
        assert len(p.width.unique()) > 8


@pytest.mark.parametrize("part", [slice(1, 3), torch.tensor([4, 0])])
@pytest.mark.parametrize("amounts", [STILL, {"patch_size": 24}])
def test_rows_are_the_parameters_of_some_images(amounts, part):
    params = sample_params("3way", 5, 32, 48, seeded(), **amounts)
    chosen = rows(params, part)
    assert [type(p) for p in (chosen, chosen.pastes, *chosen.pastes)] == [ViewParams, tuple, PasteParams, PasteParams]
    assert len(tensors(chosen)) == len(tensors(params)) >= 14
    assert all(torch.equal(a, b[part]) for a, b in zip(tensors(chosen), tensors(params)))
    for name in ("variant", "height", "width", "patch_size"):
        assert getattr(chosen, name) == getattr(params, name)
    with pytest.raises(AttributeError):
        chosen.shift = None  # frozen


# Views ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("amounts", [{"jitter": 0.5, "patch_jitter": 0.5}, STILL, {"translate": 0.5, "jitter": 0}])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64])
@every_variant
def test_views_and_labels(variant, dtype, amounts):
    """No input is changed, and the type of the images does not matter."""
    pixels = (noise(5, 3, 24, 40) * 255).byte()
    images = pixels if dtype == torch.uint8 else (pixels.float() / 255).to(dtype)
    params = sample_params(variant, 5, 24, 40, seeded(), **({"translate": 0.2} | amounts))
    images_before, params_before = images.clone(), [t.clone() for t in tensors(params)]
    views, labels = make_views(images, params)
    count = VARIANTS[variant].num_classes
    assert (views.shape, views.dtype, labels.dtype) == ((5 * count, 3, 24, 40), torch.float32, torch.int64)
    assert 0 <= views.min() < views.max() <= 1
    assert labels.tolist() == [label for label in range(count) for _ in range(5)]
    assert torch.equal(views, make_views(pixels, params)[0])
    assert torch.equal(views, make_views(images.contiguous(memory_format=torch.channels_last), params)[0])
    views.zero_()
    assert torch.equal(images, images_before)
    assert all(torch.equal(a, b) for a, b in zip(tensors(params), params_before))


def test_paste_sees_the_base_augmentation():
    images = noise(6, 3, 40, 60)
    params = sample_params("3way", 6, 40, 60, seeded(), translate=0.3, jitter=0.4)
    views = make_views(images, params)[0].unflatten(0, (3, 6))
    base = color_jitter(to_float(translate(images, params.shift)), params.jitter)
    assert not torch.equal(base, images)
    assert torch.equal(views[0], base)
    assert torch.equal(views[1], paste(base, params.pastes[0]))
    assert torch.equal(views[2], paste(base, params.pastes[1]))


@pytest.mark.parametrize("patch_size", [None, 40])
@every_variant
def test_image_does_not_depend_on_its_batch(variant, patch_size):
    images = noise(6, 3, 50, 70)
    amounts = {"translate": 0.2, "jitter": 0.3, "patch_jitter": 0.3}
    params = sample_params(variant, 6, 50, 70, seeded(), **amounts, patch_size=patch_size)
    views = make_views(images, params)[0].unflatten(0, (-1, 6))
    for b in range(6):
        alone, _ = make_views(images[b : b + 1], rows(params, slice(b, b + 1)))
        assert torch.allclose(alone, views[:, b], atol=1e-6)


@pytest.mark.parametrize("size", [(256, 256), (64, 96), (1, 1), (2, 2), (3, 50), (8, 8)])
def test_white_stays_white(size):
    """A scar rotated the naive way leaves black corners. The image may be tiny."""
    views, _ = make_views(
        torch.ones(32, 3, *size), sample_params("3way", 32, *size, seeded(), jitter=0, patch_jitter=0)
    )
    assert views.shape == (96, 3, *size)
    assert (views == 1).all()
    views, _ = make_views(noise(32, 3, *size), sample_params("3way", 32, *size, seeded()))
    assert torch.isfinite(views).all()


def test_tables_of_views_and_variants():
    assert list(VARIANTS) == ["normal", "scar", "union", "3way", "soft"]
    assert [v.num_classes for v in VARIANTS.values()] == [2, 2, 2, 3, 3]
    assert all(v.views[0] == "image" for v in VARIANTS.values())
    assert {name for v in VARIANTS.values() for name in v.views} == set(VIEWS)
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
    params, three = (sample_params(v, 18, 40, 60, seeded(), patch_size=patch_size) for v in ("4way", "3way"))
    views, labels = make_views(images, params)
    assert len(views) == 4 * 18
    assert labels.tolist() == [0] * 18 + [1] * 18 + [2] * 18 + [3] * 18
    assert torch.equal(views[: 3 * 18], make_views(images, three)[0])
    expected = views[:18].clone()
    for b in range(18):
        expected[box_of(params.pastes[2], b)] = 1 - expected[box_of(params.pastes[2], b)]
    assert not torch.equal(expected, views[:18])
    assert torch.equal(views[3 * 18 :], expected)


# Crops of a patch model -------------------------------------------------------------------------------------------


def crops_of(images, corners, side):
    return torch.stack([image[:, y : y + side, x : x + side] for image, (y, x) in zip(images, corners.tolist())])


@pytest.mark.parametrize("shift", [0.1, 0.99])
@pytest.mark.parametrize("size", [(60, 60), (48, 90), (90, 48)])
def test_views_of_a_crop_are_cut_from_the_augmented_image(size, shift):
    """Against slices: the base augmentation sees the whole image, CutPaste the crop alone. Images this small are
    sampled whole. Soft patches come from a second crop, anywhere in the image."""
    images = noise(6, 3, *size)
    for variant in ("3way", "soft"):
        params = sample_params(variant, 6, *size, seeded(1), translate=shift, patch_size=32)
        base = color_jitter(to_float(translate(images, params.shift)), params.jitter)
        target = source = crops_of(base, params.corner, 32).contiguous(memory_format=torch.channels_last)
        if variant == "soft":
            assert not torch.equal(params.source, params.corner)
            source = crops_of(base, params.source, 32).contiguous(memory_format=torch.channels_last)
        views, labels = make_views(images, params)
        crops, elsewhere, sample = augment_crops(images, params)
        assert (elsewhere is None) == (params.source is None) == (variant == "3way")
        assert torch.allclose(sample[:, :, 0], base.flatten(2), atol=1e-6)
        assert torch.equal(views, cut_paste(crops, elsewhere, params)[0])
        assert torch.equal(views, cut_paste(crops.contiguous(memory_format=torch.channels_last), elsewhere, params)[0])
        assert views.shape == (18, 3, 32, 32)
        assert labels.tolist() == [0] * 6 + [1] * 6 + [2] * 6
        assert torch.allclose(views[:6], target, atol=1e-6)
        for view, boxes in zip(views[6:].split(6), params.pastes, strict=True):
            assert torch.allclose(view, paste_(target.clone(), source, boxes), atol=1e-5)
            assert ((view - target).abs().amax(1) > 0.01).any((1, 2)).all()


def test_statistics_of_a_large_image_are_those_of_an_even_sample():
    images = noise(4, 3, 256, 200) ** torch.tensor([0.3, 1, 2, 4])[:, None, None, None]
    params = sample_params("normal", 4, 256, 200, seeded(3), jitter=0.5, patch_size=64)
    crops, _, sample = augment_crops(images, params)
    base = augment(images, params)
    assert sample.shape == (4, 3, 1, 85 * 67)  # every third pixel
    for statistic in (torch.mean, torch.std):
        assert torch.allclose(statistic(sample, (1, 2, 3)), statistic(base, (1, 2, 3)), atol=0.01)
    assert torch.allclose(crops, crops_of(base, params.corner, 64), atol=0.01)  # contrast: by the mean of the sample
    still = replace(params, jitter=None)
    crops, _, sample = augment_crops(images, still)
    moved = translate(images, still.shift)
    assert torch.equal(crops, crops_of(moved, still.corner, 64))
    assert torch.equal(sample[:, :, 0], moved[:, :, 1::3, 1::3].flatten(2))


# Views that show nothing ------------------------------------------------------------------------------------------


def test_visible_counts_pixels_that_differ_by_half_a_deviation():
    params = sample_params("3way", 4, 32, 32, seeded())
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


@every_variant
def test_nothing_is_visible_on_an_even_image_and_nearly_all_in_noise(variant):
    params = sample_params(variant, 40, 64, 64, seeded(), patch_size=40, jitter=0, patch_jitter=0)
    for images, share in ((torch.full((40, 3, 64, 64), 0.3), 0.0), (noise(40, 3, 64, 64), 0.95)):
        seen = visible(make_views(images, params)[0], params, images)
        assert (seen.float().mean() >= share) if share else not seen.any()


# Errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variant", "changes", "message"),
    [
        ("5way", {}, r"'5way'.*normal, scar, union, 3way, soft"),
        *(("normal", {"patch_size": side}, rf"patch_size lies in \[1, 48\].*not {side}") for side in (0, 49, 64)),
        *(("normal", {"translate": amount}, f"^translate .*{amount}") for amount in (-0.1, 1, 1.5, math.nan)),
        *(("normal", {"jitter": amount}, f"^jitter .*{amount}") for amount in (-0.1, 0.51, math.nan)),
        *(("normal", {"patch_jitter": amount}, f"^patch_jitter .*{amount}") for amount in (-0.1, 0.51, math.nan)),
        (("image", "patch", "hole"), {}, r"'odd': view 2 is 'hole': choose one of patch, scar, patch or scar, soft"),
        (("image", "image"), {}, r"'odd': view 1 is 'image': choose one of patch, scar, patch or scar, soft"),
        (("patch", "scar"), {}, r"'odd': view 0 is 'patch': choose one of image"),
    ],
)
def test_what_cannot_be_drawn(monkeypatch, variant, changes, message):
    if isinstance(variant, tuple):
        monkeypatch.setitem(VARIANTS, "odd", Variant(variant, ""))
        variant = "odd"
    with pytest.raises(ValueError, match=message):
        sample_params(variant, 2, 64, 48, seeded(), **changes)


@every_variant
def test_images_that_do_not_fit_their_parameters(variant):
    params = sample_params(variant, 4, 64, 48, seeded())
    shapes = [
        (3, 64, 48),
        (4, 1, 64, 48),
        (4, 4, 64, 48),
        (4, 64, 48, 3),
        (1, 3, 64, 48),
        (5, 3, 64, 48),
        (4, 3, 48, 64),
    ]
    for shape in shapes:
        got = ", ".join(map(str, shape))
        with pytest.raises(ValueError, match=rf"drawn for images \(4, 3, 64, 48\), got \({got}\)"):
            make_views(torch.zeros(shape), params)
    with pytest.raises(ValueError, match="int64"):
        make_views(torch.zeros(4, 3, 64, 48, dtype=torch.int64), params)
