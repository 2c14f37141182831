import colorsys
import itertools

import numpy as np
import pytest
import torch
from torchvision.transforms import functional as F

from cutpaste import draw_jitter
from image_ops import BRIGHTNESS, CONTRAST, HUE, SATURATION, JitterParams, color_jitter, rotate_hue_, to_float

KINDS = (BRIGHTNESS, CONTRAST, SATURATION, HUE)
ADJUST = dict(zip(KINDS, (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)))
ORDERS = list(itertools.permutations(range(4)))
PURE = torch.cartesian_prod(*[torch.tensor([0, 0.5, 1])] * 3).T.reshape(1, 3, 3, 9)  # corners, edges, grays
MANY = 20_000


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def noise(*shape, seed=0):
    return torch.rand(*shape, generator=seeded(seed))


def torchvision_jitter(image, factors, order):
    for kind in order.tolist():
        image = ADJUST[kind](image, factors[kind].item())
    return image


def all_orders(amount, copies=1):
    """Jitter of 24 * copies images, every order among them, with the factors that draw_jitter draws."""
    order = torch.tensor(ORDERS * copies)
    return JitterParams(draw_jitter(len(order), amount, seeded()).factors, order)


@pytest.mark.parametrize("amount", [0.1, 0.5])
def test_factors_are_uniform_in_their_range_and_independent(amount):
    factors = draw_jitter(MANY, amount, seeded()).factors
    for kind, middle in zip(KINDS, (1, 1, 1, 0)):
        factor = factors[:, kind]
        assert middle - amount - 1e-6 <= factor.min() < middle - 0.99 * amount
        assert middle + 0.99 * amount < factor.max() <= middle + amount + 1e-6
        counts = torch.histc(factor, 10, middle - amount, middle + amount)
        assert (counts > 0.09 * MANY).all()
        assert (counts < 0.11 * MANY).all()
    assert np.abs(np.corrcoef(factors.T) - np.eye(4)).max() < 0.03


def test_all_orders_occur_equally_often():
    orders, counts = draw_jitter(MANY, 0.1, seeded()).order.unique(dim=0, return_counts=True)
    assert sorted(map(tuple, orders.tolist())) == ORDERS
    assert (counts > 0.8 * MANY / 24).all()


def test_no_amount_draws_nothing():
    generator = seeded()
    before = generator.get_state()
    assert draw_jitter(3, 0, generator) is None
    assert torch.equal(generator.get_state(), before)


def test_to_float_scales_uint8_alone():
    assert to_float(torch.tensor([0, 51, 255], dtype=torch.uint8)).tolist() == pytest.approx([0, 0.2, 1])
    assert to_float(torch.tensor([0, 0.2, 1], dtype=torch.float64)).dtype == torch.float32
    assert to_float(torch.tensor([0.25, 1])).tolist() == [0.25, 1]
    with pytest.raises(ValueError, match=r"uint8 or floating point, got .*int64"):
        to_float(torch.tensor([0, 51, 255]))


@pytest.mark.parametrize("images", [noise(96, 3, 9, 13), PURE.expand(96, -1, -1, -1)], ids=["noise", "pure"])
@pytest.mark.parametrize("amount", [0.1, 0.5])
def test_color_jitter_equals_torchvision(amount, images):
    params = all_orders(amount, copies=4)
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
    factors = torch.tensor([1.0, 1, 1, 0]).expand(24, 4)
    images = noise(24, 3, 6, 6)
    assert torch.allclose(color_jitter(images, JitterParams(factors, torch.tensor(ORDERS))), images, atol=1e-6)


def test_color_jitter_is_per_image_and_changes_no_input():
    params, images = all_orders(0.5), noise(24, 3, 6, 7)
    before = images.clone()
    result = color_jitter(images, params)
    assert torch.equal(images, before)
    for b in range(24):
        alone = JitterParams(params.factors[b : b + 1], params.order[b : b + 1])
        assert torch.allclose(color_jitter(images[b : b + 1], alone)[0], result[b], atol=1e-6)


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


def test_a_third_of_a_turn_makes_green_of_red():
    red = torch.tensor([1.0, 0, 0]).view(1, 3, 1, 1)
    assert rotate_hue_(red, torch.tensor([1 / 3])).flatten().tolist() == pytest.approx([0, 1, 0], abs=1e-6)


def test_rotate_hue_keeps_gray():
    grays = torch.linspace(0, 1, 256).view(1, 1, 16, 16).expand(8, 3, 16, 16)
    assert torch.equal(rotate_hue_(grays.clone(), torch.linspace(-0.5, 0.5, 8)), grays)
