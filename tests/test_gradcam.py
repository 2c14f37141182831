"""Grad-CAM: maps that can be worked out by hand, and nothing left behind."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from localization import grad_cam
from model import CutPasteNet

IMAGES = torch.rand(3, 3, 64, 96, generator=torch.Generator().manual_seed(0))


def norm(features):
    return functional.adaptive_avg_pool2d(features, 1).flatten(1).norm(dim=1)


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return CutPasteNet("resnet18", 1, 3, "image").eval()


@pytest.fixture(scope="module")
def features(network):
    """Of the last stage, (3, 512, 2, 3)."""
    with torch.no_grad():
        return network.features(network.normalized(IMAGES), (4,))[0]


def test_map_by_hand():
    """Features that are the image's red and green; a score that is a weighted sum of their means."""
    features = torch.rand(2, 2, 4, 6, generator=torch.Generator().manual_seed(1))
    scores, maps = grad_cam(features, lambda x: x.mean((2, 3)) @ torch.tensor([2.0, -3.0]), (4, 6))
    red, green = features[:, 0], features[:, 1]
    assert torch.allclose(scores, 2 * red.mean((1, 2)) - 3 * green.mean((1, 2)), atol=1e-6)
    # the gradient of the score at each feature is weight / 24, and so is its mean
    assert torch.allclose(maps, ((2 * red - 3 * green) / 24).relu(), atol=1e-6)
    assert 0 == maps.min() < maps.max()


def test_a_red_spot_is_the_maximum_and_a_green_one_is_not():
    features = torch.zeros(1, 2, 8, 12)
    features[0, 0, 2, 9] = features[0, 1, 6, 3] = 1
    _, maps = grad_cam(features, lambda x: x.mean((2, 3)) @ torch.tensor([1.0, -1.0]), (24, 36))
    assert maps.shape == (1, 24, 36)
    assert maps[0].argmax() == (2 * 3 + 1) * 36 + 9 * 3 + 1  # the middle of the 3 x 3 pixels of feature (2, 9)
    assert maps[0, 6 * 3 + 1, 3 * 3 + 1] == 0


def test_against_the_gradient_of_the_whole_network(network, features):
    scores, maps = grad_cam(features, norm, (64, 96))
    (last,) = network.features(network.normalized(IMAGES), (4,))
    embeddings = last.mean((2, 3))
    (gradient,) = torch.autograd.grad(embeddings.norm(dim=1).sum(), last)
    assert torch.allclose(scores, network.embed(IMAGES).norm(dim=1), rtol=1e-4)
    for image in range(len(IMAGES)):
        coarse = sum(g.mean() * f for g, f in zip(gradient[image], last[image])).relu()
        fine = functional.interpolate(coarse[None, None], (64, 96), mode="bilinear", align_corners=False)[0, 0]
        assert torch.allclose(maps[image], fine, rtol=1e-3, atol=1e-6)
    assert maps.shape == (3, 64, 96)
    assert maps.min() >= 0
    assert maps.max() > 0


def test_an_image_has_the_map_that_it_has_alone(features):
    scores, maps = grad_cam(features, norm, (64, 96))
    for image in range(len(features)):
        score, alone = grad_cam(features[image : image + 1], norm, (64, 96))
        assert torch.allclose(score[0], scores[image], rtol=1e-4)
        assert torch.allclose(alone[0], maps[image], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_is_left_behind(features, dtype):
    torch.manual_seed(1)
    layer, frozen = nn.Linear(512, 1), nn.Linear(512, 1).requires_grad_(False)
    layer.weight.grad = torch.full_like(layer.weight, 3)
    given = features.to(dtype, copy=True).requires_grad_()
    scores, maps = grad_cam(
        given, lambda x: (layer(x.float().mean((2, 3))) + frozen(x.float().mean((2, 3))))[:, 0], (64, 96)
    )
    assert maps.dtype == torch.float32
    assert not any(found.requires_grad for found in (scores, maps))
    assert (layer.weight.grad == 3).all()
    assert layer.bias.grad is frozen.weight.grad is frozen.bias.grad is given.grad is None
    assert [p.requires_grad for m in (layer, frozen) for p in m.parameters()] == [True, True, False, False]
    assert torch.equal(given, features.to(dtype))


@pytest.mark.parametrize("distance", [lambda d: d.square().sum(1).sqrt(), lambda d: d.sum(1).sqrt()])
def test_a_distance_of_zero_has_an_empty_map(features, distance):
    """The gradient of a root at 0 is not finite."""
    target = features.mean((2, 3))
    target[1:] -= 1
    scores, maps = grad_cam(features, lambda x: distance(x.mean((2, 3)) - target), (64, 96))
    assert scores[0] == 0
    assert (maps[0] == 0).all()
    assert (scores[1:] > 0).all()
    assert (maps[1:] > 0).any()


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_works_where_gradients_are_off(network, features, off):
    expected = grad_cam(features, norm, (64, 96))
    with off():
        scores, maps = grad_cam(network.features(network.normalized(IMAGES), (4,))[0], norm, (64, 96))
    assert torch.equal(scores, expected[0])
    assert torch.equal(maps, expected[1])
    assert maps.max() > 0
