"""Grad-CAM: maps that can be worked out by hand, and a network that is left as it was found."""

import pytest
import torch
from torch import nn

from gradcam import GradCAM
from model import CutPasteNet

IMAGES = torch.randint(0, 256, (3, 3, 64, 96), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def length(embeddings):
    return embeddings.norm(dim=1)


class HandMade(nn.Module):
    """A network whose map is known: its last stage holds the image's red and green, its embedding their means."""

    def __init__(self):
        super().__init__()
        self.last_stage = nn.Conv2d(3, 2, 1, bias=False)
        with torch.no_grad():
            self.last_stage.weight.copy_(torch.tensor([[1.0, 0, 0], [0, 1.0, 0]])[:, :, None, None])

    def embed(self, images):
        return self.last_stage(images).mean((2, 3))


def make():
    torch.manual_seed(0)
    return CutPasteNet("resnet18", 1, 3, "image")


def state(network):
    modes = [module.training for module in network.modules()]
    flags = [parameter.requires_grad for parameter in network.parameters()]
    gradients = [None if parameter.grad is None else parameter.grad.clone() for parameter in network.parameters()]
    hooks = [len(module._forward_hooks) for module in network.modules()]
    values = [value.clone() for value in network.state_dict().values()]
    return modes, flags, gradients, hooks, values


def same(one, other):
    return all(
        len(a) == len(b) and all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in zip(a, b))
        for a, b in zip(one, other)
    )


def test_map_by_hand():
    images = torch.rand(2, 3, 4, 6, generator=torch.Generator().manual_seed(1))
    weights = torch.tensor([2.0, -3.0])
    with GradCAM(HandMade()) as cam:
        scores, maps = cam(images, lambda embeddings: embeddings @ weights)
    red, green = images[:, 0], images[:, 1]
    assert torch.allclose(scores, 2 * red.mean((1, 2)) - 3 * green.mean((1, 2)), atol=1e-6)
    # the gradient of the score at each feature is weight / 24, and so is its mean
    assert torch.allclose(maps, ((2 * red - 3 * green) / 24).relu(), atol=1e-6)
    assert (maps == 0).any()
    assert (maps > 0).any()


def test_a_red_spot_is_the_maximum_and_a_green_one_is_not():
    images = torch.zeros(1, 3, 8, 12)
    images[0, 0, 2, 9] = images[0, 1, 6, 3] = 1
    with GradCAM(HandMade()) as cam:
        _, maps = cam(images, lambda embeddings: embeddings[:, 0] - embeddings[:, 1])
    assert maps[0].argmax() == 2 * 12 + 9
    assert maps[0, 6, 3] == 0


def test_against_the_gradient_of_the_whole_network():
    network = make().eval()
    with GradCAM(network) as cam:
        scores, maps = cam(IMAGES, length)
    features = []
    hook = network.last_stage.register_forward_hook(lambda module, inputs, output: features.append(output))
    embeddings = network.embed(IMAGES.float() / 255)
    hook.remove()
    (gradient,) = torch.autograd.grad(length(embeddings).sum(), features)
    assert torch.allclose(scores, length(embeddings).detach(), rtol=1e-4)
    for image in range(len(IMAGES)):
        coarse = sum(g.mean() * f for g, f in zip(gradient[image], features[0][image])).relu()
        fine = nn.functional.interpolate(coarse[None, None], (64, 96), mode="bilinear", align_corners=False)[0, 0]
        assert torch.allclose(maps[image], fine, rtol=1e-3, atol=1e-6)
    assert maps.shape == (3, 64, 96)
    assert maps.min() >= 0
    assert maps.max() > 0


def test_an_image_has_the_map_that_it_has_alone():
    with GradCAM(make()) as cam:
        scores, maps = cam(IMAGES, length)
        for image in range(len(IMAGES)):
            score, alone = cam(IMAGES[image : image + 1], length)
            assert torch.allclose(score[0], scores[image], rtol=1e-4)
            assert torch.allclose(alone[0], maps[image], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_the_network_is_left_as_it_was(training, fails):
    network = make().train(training)
    network.head.eval()  # a mixture of modes and flags, and gradients of the caller's
    for number, parameter in enumerate(network.parameters()):
        parameter.requires_grad_(number % 3 != 0)
        parameter.grad = torch.full_like(parameter, number) if number % 2 else None
    before = state(network)

    def score(embeddings):
        if fails:
            raise RuntimeError("in the score")
        return length(embeddings)

    try:
        with GradCAM(network) as cam:
            assert not network.training
            cam(IMAGES, score)
    except RuntimeError as error:
        assert fails
        assert str(error) == "in the score"  # noqa: PT017
    else:
        assert not fails
    assert same(state(network), before)


def test_a_frozen_network_stays_frozen():
    network = make()
    network.freeze_backbone(True)
    with GradCAM(network) as cam:
        _, maps = cam(IMAGES, length)
    assert maps.max() > 0
    assert network.frozen
    assert not any(parameter.requires_grad for parameter in network.backbone.parameters())
    assert network.training
    assert not network.backbone.training


def test_images_are_not_changed():
    images = IMAGES.clone()
    with GradCAM(make()) as cam:
        cam(images, length)
    assert torch.equal(images, IMAGES)


def test_a_distance_of_zero_has_an_empty_map():
    """The gradient of a square root at 0 is not finite."""
    with GradCAM(make()) as cam:
        scores, maps = cam(IMAGES, lambda embeddings: (embeddings - embeddings.detach()).square().sum(1).sqrt())
    assert (scores == 0).all()
    assert (maps == 0).all()


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_works_where_gradients_are_off(off):
    with off(), GradCAM(make()) as cam:
        _, maps = cam(IMAGES.clone(), length)
    assert maps.max() > 0
