import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_image_ops import noise, seeded
from test_paste import HARD, MANY, STILL, assert_inside, paste, tensors

from cutpaste import (
    VARIANTS,
    VIEWS,
    Variant,
    View,
    augment,
    augment_crops,
    cut_paste,
    draw_patch,
    make_views,
    rows,
    sample_params,
    visible,
)
from image_ops import color_jitter, paste_, to_float, translate

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
    params = sample_params(variant, 5, 24, 40, seeded(), translate=0.2, jitter=0.5, patch_jitter=0.5)
    views, labels = make_views(images, params)
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
    params = sample_params("3way", 4, 32, 48, seeded(), **amounts)
    images_before, params_before = images.clone(), [t.clone() for t in tensors(params)]
    views, _ = make_views(images, params)
    views.zero_()
    assert torch.equal(images, images_before)
    assert all(torch.equal(a, b) for a, b in zip(tensors(params), params_before))


def test_type_and_memory_layout_do_not_matter():
    images = (noise(4, 3, 32, 48) * 255).to(torch.uint8)
    params = sample_params("3way", 4, 32, 48, seeded(), translate=0.2)
    views, floats = make_views(images, params)[0], images.float() / 255
    assert torch.equal(views, make_views(floats, params)[0])
    assert torch.equal(views, make_views(floats.contiguous(memory_format=torch.channels_last), params)[0])


@pytest.mark.parametrize("patch_size", [None, 40])
@pytest.mark.parametrize("variant", VARIANTS)
def test_image_does_not_depend_on_its_batch(variant, patch_size):
    images = noise(6, 3, 50, 70)
    amounts = {"translate": 0.2, "jitter": 0.3, "patch_jitter": 0.3}
    params = sample_params(variant, 6, 50, 70, seeded(), **amounts, patch_size=patch_size)
    views = make_views(images, params)[0].unflatten(0, (-1, 6))
    for b in range(6):
        alone, _ = make_views(images[b : b + 1], rows(params, slice(b, b + 1)))
        assert torch.allclose(alone, views[:, b], atol=1e-6)


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (3, 50), (8, 8)])
def test_tiny_images(size):
    images = noise(20, 3, *size)
    views, _ = make_views(images, sample_params("3way", 20, *size, seeded()))
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
        sample_params("odd", 2, 32, 32, seeded())


# Crops of a patch model ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(256, 256), (64, 100), (100, 64), (40, 130)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_pastes_lie_inside_the_crop_and_the_crop_inside_the_image(variant, size):
    params = sample_params(variant, MANY // 10, *size, seeded(), patch_size=40)
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
    patch, scar = sample_params("3way", MANY, size, size, seeded(), patch_size=patch_size).pastes
    area = patch.width * patch.height / patch_size**2
    assert area.mean() == pytest.approx((0.02 + 0.15) / 2, rel=0.03)
    assert (scar.width.min(), scar.width.max()) == widths
    assert (scar.height.min(), scar.height.max()) == lengths


@pytest.mark.parametrize("most", [0.1, 0.99])
@pytest.mark.parametrize("size", [(60, 60), (48, 90), (90, 48)])
def test_views_of_a_crop_are_cut_from_the_augmented_image(size, most):
    """Against slices: the base augmentation sees the whole image, CutPaste the crop alone. Images this small are
    sampled whole."""
    images = noise(6, 3, *size)
    params = sample_params("3way", 6, *size, seeded(1), translate=most, patch_size=32)
    base = color_jitter(to_float(translate(images, params.shift)), params.jitter)
    cut = torch.stack([image[:, y : y + 32, x : x + 32] for image, (y, x) in zip(base, params.corner.tolist())])
    views, labels = make_views(images, params)
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
    params = sample_params("normal", 4, 32, 32, seeded(), patch_size=32)
    assert (params.corner == 0).all()
    whole = replace(params, corner=None, patch_size=None)
    assert torch.allclose(make_views(images, params)[0], make_views(images, whole)[0], atol=1e-6)


def test_statistics_of_a_large_image_are_those_of_an_even_sample():
    images = noise(4, 3, 256, 200) ** torch.tensor([0.3, 1, 2, 4])[:, None, None, None]
    params = sample_params("normal", 4, 256, 200, seeded(3), jitter=0.5, patch_size=64)
    crops, _, sample = augment_crops(images, params)
    base = augment(images, params)
    assert sample.shape == (4, 3, 1, 85 * 67)  # every third pixel
    for statistic in (torch.mean, torch.std):
        assert torch.allclose(statistic(sample, (1, 2, 3)), statistic(base, (1, 2, 3)), atol=0.01)
    cut = torch.stack([image[:, y : y + 64, x : x + 64] for image, (y, x) in zip(base, params.corner.tolist())])
    assert torch.allclose(crops, cut, atol=0.01)  # the contrast refers to the mean of the sample
    still = replace(params, jitter=None)
    crops, _, sample = augment_crops(images, still)
    assert torch.equal(crops, crops_by_hand(images, still))
    assert torch.equal(sample[:, :, 0], translate(images, still.shift)[:, :, 1::3, 1::3].flatten(2))


def crops_by_hand(images, params):
    moved = translate(images, params.shift)
    return torch.stack([image[:, y : y + 64, x : x + 64] for image, (y, x) in zip(moved, params.corner.tolist())])


def test_soft_patches_come_from_anywhere_in_the_image():
    """Against slices: the same boxes, cut from the second crop and pasted into the first."""
    images = noise(6, 3, 60, 90)
    params = sample_params("soft", 6, 60, 90, seeded(1), translate=0.1, patch_size=32)
    assert not torch.equal(params.source, params.corner)
    assert sample_params("3way", 6, 60, 90, seeded(1), patch_size=32).source is None
    base = color_jitter(to_float(translate(images, params.shift)), params.jitter)
    cut, source = (
        torch.stack([image[:, y : y + 32, x : x + 32] for image, (y, x) in zip(base, corner.tolist())])
        for corner in (params.corner, params.source)
    )
    views = make_views(images, params)[0].split(6)
    assert torch.allclose(views[0], cut, atol=1e-6)
    for view, boxes in zip(views[1:], params.pastes):
        target = cut.contiguous(memory_format=torch.channels_last).clone()
        expected = paste_(target, source.contiguous(memory_format=torch.channels_last), boxes)
        assert torch.allclose(view, expected, atol=1e-5)
        assert ((view - cut).abs().amax(1) > 0.01).any((1, 2)).all()


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


def full(p, width, height):
    return replace(p, width=torch.full_like(p.width, width), height=torch.full_like(p.height, height))


@pytest.mark.parametrize("variant", VARIANTS)
def test_nothing_is_visible_on_an_even_image_and_nearly_all_in_noise(variant):
    params = sample_params(variant, 40, 64, 64, seeded(), patch_size=40, jitter=0, patch_jitter=0)
    for images, share in ((torch.full((40, 3, 64, 64), 0.3), 0.0), (noise(40, 3, 64, 64), 0.95)):
        seen = visible(make_views(images, params)[0], params, images)
        assert (seen.float().mean() >= share) if share else not seen.any()


@pytest.mark.parametrize("patch_size", [0, 49, 64])
def test_bad_patch_size(patch_size):
    with pytest.raises(ValueError, match=rf"patch_size lies in \[1, 48\].*not {patch_size}"):
        sample_params("normal", 2, 64, 48, seeded(), patch_size=patch_size)


# Errors -------------------------------------------------------------------------------------------------------------


def test_unknown_variant():
    with pytest.raises(ValueError, match=r"'4way'.*normal, scar, union, 3way, soft"):
        sample_params("4way", 2, 32, 32, seeded())


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    "shape",
    [(3, 64, 48), (4, 1, 64, 48), (4, 4, 64, 48), (4, 64, 48, 3), (1, 3, 64, 48), (5, 3, 64, 48), (4, 3, 48, 64)],
)
def test_images_of_another_shape_than_their_parameters(variant, shape):
    params = sample_params(variant, 4, 64, 48, seeded())
    got = ", ".join(map(str, shape))
    with pytest.raises(ValueError, match=rf"drawn for images \(4, 3, 64, 48\), got \({got}\)"):
        make_views(torch.zeros(shape), params)


def test_images_of_another_type():
    with pytest.raises(ValueError, match="int64"):
        make_views(torch.zeros(4, 3, 64, 48, dtype=torch.int64), sample_params("3way", 4, 64, 48, seeded()))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *itertools.product(["translate"], [-0.1, 1, 1.5, math.nan]),
        *itertools.product(["jitter", "patch_jitter"], [-0.1, 0.51, math.nan]),
    ],
)
def test_bad_amount(name, value):
    with pytest.raises(ValueError, match=f"^{name} .*{value}"):
        sample_params("normal", 2, 32, 32, seeded(), **{name: value})
