"""Windows, their embeddings, the densities of a level, and maps, against slow loops and networks made by hand."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from density import NotFiniteError, fit_density, held_out
from localization import Grid, StageDensity, embed_windows, principal_axes, upsample
from model import CutPasteNet


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def network(normalize="image"):
    """With statistics of BatchNorm other than those it starts with, as after training."""
    torch.manual_seed(0)
    made = CutPasteNet("resnet18", 1, 3, normalize)
    for module in made.backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean += 0.1 * torch.randn(module.num_features)
            module.running_var *= 0.5 + torch.rand(module.num_features)
    return made.eval()


class MeanColor(nn.Module):
    """A network whose map is known: it hands pixels on, so that the embedding of a window is its mean color."""

    def normalized(self, images):
        return images

    def features(self, images, levels):
        return [functional.avg_pool2d(images, 4) for _ in levels]


# Where windows are ------------------------------------------------------------------------------------------------


def test_the_papers_grid_and_the_grid_of_a_whole_image():
    grid = Grid(256, 256, 32, 4)
    assert grid.shape == (57, 57)
    down, across = grid.centers
    assert down[0] == across[0] == 16
    assert down[-1] == across[-1] == 240
    assert Grid(256, 192).shape == (1, 1)


@pytest.mark.parametrize("feature_stride", [1, 4, 8])
@pytest.mark.parametrize(("height", "width", "window", "stride"), [(64, 96, 32, 8), (70, 101, 32, 8), (45, 64, 16, 16)])
def test_windows_lie_inside_and_leave_less_than_a_stride(height, width, window, stride, feature_stride):
    grid = Grid(height, width, window, stride, feature_stride)
    assert grid.shape == tuple(1 + math.floor((side - window) / stride) for side in (height, width))
    for side, centers, corner in zip((height, width), grid.centers, grid.corner):
        assert (centers.diff() == stride).all()
        assert centers[0] - window / 2 + (feature_stride - 1) / 2 == corner
        assert 0 <= corner < stride
        assert corner % feature_stride == 0
        assert 0 <= side - (centers[-1] - centers[0] + corner + window) < stride


# Embeddings -------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("normalize", ["image", "imagenet"])
def test_windows_alone_against_a_loop(normalize):
    net, images, grid = network(normalize), torch.rand(2, 3, 50, 71, generator=seeded(1)), Grid(50, 71, 32, 8)
    early, last = embed_windows(net, net.normalized(images), (2, 4), [grid, grid], dense=False)
    whole = net.normalized(images)
    assert (early.shape, last.shape) == ((2, 3 * 5, 128), (2, 3 * 5, 512))
    for image, (row, y), (col, x) in itertools.product(
        range(2), enumerate(grid.centers[0]), enumerate(grid.centers[1])
    ):
        top, left = int(y) - 16, int(x) - 16
        window = whole[image : image + 1, :, top : top + 32, left : left + 32]
        assert window.shape == (1, 3, 32, 32)
        for found, features in zip((early, last), net.features(window, (2, 4))):
            assert torch.allclose(found[image, row * 5 + col], features[0].mean((1, 2)), rtol=1e-3, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("level", [1, 2, 3])
@pytest.mark.parametrize(("height", "width"), [(64, 97), (80, 64)])
def test_dense_windows_against_a_loop(level, height, width):
    net, images = network(), torch.rand(2, 3, height, width, generator=seeded(2))
    feature_stride = net.spec.strides[level - 1]
    grid = Grid(height, width, 32, 16, feature_stride)
    (found,) = embed_windows(net, net.normalized(images), (level,), [grid], dense=True)
    (features,) = net.features(net.normalized(images), (level,))
    for row, col in itertools.product(*map(range, grid.shape)):
        top, left = (corner + 16 * n for corner, n in zip(grid.corner, (row, col)))
        part = features[
            :,
            :,
            top // feature_stride : (top + 32) // feature_stride,
            left // feature_stride : (left + 32) // feature_stride,
        ]
        assert part.shape[2:] == (32 // feature_stride, 32 // feature_stride)
        assert torch.allclose(found[:, row * grid.shape[1] + col], part.mean((2, 3)), rtol=1e-3, atol=1e-5)


@torch.no_grad()
def test_a_whole_image_is_the_grid_with_one_window():
    net, images = network(), torch.rand(2, 3, 50, 71, generator=seeded(3))
    (found,) = embed_windows(net, net.normalized(images), (4,), [Grid(50, 71)], dense=True)
    assert torch.equal(found, net.embed(images)[:, None])


@pytest.mark.parametrize(
    ("level", "window", "stride"), [(1, 16, 8), (1, 8, 4), (1, 4, 4), (2, 16, 16), (2, 8, 8), (3, 32, 16)]
)
def test_centers_are_in_the_middle_of_what_dense_windows_see(level, window, stride):
    """By the gradient of windows in the middle of the image, of a network whose filters are all symmetric."""
    net = network("imagenet")
    grid = Grid(160, 192, window, stride, net.spec.strides[level - 1])
    for module in net.backbone.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.constant_(module.weight, 1 / module.weight[0].numel())
        elif isinstance(module, nn.BatchNorm2d):
            module.reset_parameters()
    net.backbone.maxpool = nn.AvgPool2d(3, 2, 1)  # of equal pixels the largest is the first
    images = torch.full((1, 3, 160, 192), 0.9, requires_grad=True)
    (embeddings,) = embed_windows(net, net.normalized(images), (level,), [grid], dense=True)
    row, col = grid.shape[0] // 2, grid.shape[1] // 2
    embeddings[0, row * grid.shape[1] + col].sum().backward()
    seen = images.grad[0].sum(0).double()
    for axis, center in ((1, grid.centers[0][row]), (0, grid.centers[1][col])):
        weights = seen.sum(axis)
        middle = ((torch.arange(len(weights)) + 0.5) * weights).sum() / weights.sum()
        assert middle == pytest.approx(center.item(), abs=0.51)


# Levels -----------------------------------------------------------------------------------------------------------


def embeddings(images, locations, dims, seed=0, spread=1.0):
    """Normal embeddings whose mean and deviation differ from location to location by ``spread``."""
    generator = seeded(seed)
    mix = torch.randn(dims, dims, generator=generator)
    scale = (spread * torch.rand(locations, 1, generator=generator)).exp()
    mean = 3 * spread * torch.randn(locations, dims, generator=generator)
    return mean + scale * (torch.randn(images, locations, dims, generator=generator) @ mix) + 5


def level(location="auto", dims=None, l2=False, grid=None):
    return StageDensity(grid or Grid(64, 64, 32, 16), "torch", l2, location, dims)


def test_principal_axes_are_those_of_scikit_learn():
    from sklearn.decomposition import PCA

    x = embeddings(12, 7, 6)
    found = principal_axes(x).numpy()
    expected = PCA().fit(x.double().reshape(-1, 6).numpy()).components_.T
    assert np.allclose(found.T @ found, np.eye(6), atol=1e-9)
    assert np.allclose(np.abs((found * expected).sum(0)), 1, atol=1e-6)
    x[3, 2, 1] = math.nan
    with pytest.raises(NotFiniteError, match="not finite"):
        principal_axes(x)


def test_embeddings_are_projected_on_the_axes_of_the_normalized_ones():
    x, made = embeddings(12, 7, 6), level(dims=4, l2=True)
    feature_stride = functional.normalize(x.double(), dim=2)
    assert torch.allclose(made.project(x), feature_stride.float())
    made.choose_axes(x)
    assert torch.allclose(made.project(x), (feature_stride @ principal_axes(feature_stride)[:, :4]).float(), atol=1e-5)
    assert level(grid=Grid(64, 64)).project(x).dtype == torch.float64


@pytest.mark.parametrize("shared", [True, False])
def test_distances_are_the_densitys_window_by_window(shared):
    x, new = embeddings(12, 9, 6), embeddings(5, 9, 6, seed=1)
    made = level("shared" if shared else "each")
    found = made.fit(x, with_held_out=True)
    assert torch.equal(found, held_out("torch", x, shared)[0])
    assert made.shared == shared
    density, distances = fit_density("torch", x, shared), made.distances(new)
    for place in range(9):
        own = density.score(new[:, place][None])[0] if shared else density.score(new.transpose(0, 1))[place]
        assert torch.allclose(distances[:, place], own)
    assert level("shared" if shared else "each").fit(x, with_held_out=False) is None


def test_auto_takes_the_likelier():
    """Locations that differ need Gaussians of their own; where they do not, one of all is the better estimate."""
    differing, alike, few = level(), level(), level()
    differing.fit(embeddings(30, 9, 5), False)
    alike.fit(embeddings(30, 9, 5, spread=0), False)
    assert (differing.shared, alike.shared) == (False, True)
    for made in (differing, alike):
        assert set(made.likelihoods) == {"shared", "each"}
        assert (max(made.likelihoods, key=made.likelihoods.get) == "shared") == made.shared
        assert "mean log likelihood" in made.choice
    assert few.fit(embeddings(3, 9, 5), True).shape == (3, 9)
    assert few.shared


# Maps -------------------------------------------------------------------------------------------------------------


def slow_upsampling(scores, grid, sigma):
    """Every score spreads a Gaussian around its window's center, as a transposed convolution does; then every pixel
    is divided by what it would have got from scores of 1. Pixels further out than all centers are as those there."""
    down, across = (centers.tolist() for centers in grid.centers)
    sums, ones = np.zeros((2, grid.height, grid.width))
    for row, y in enumerate(down):
        for col, x in enumerate(across):
            for i in range(grid.height):
                for j in range(grid.width):
                    at_y, at_x = min(max(i + 0.5, down[0]), down[-1]), min(max(j + 0.5, across[0]), across[-1])
                    weight = math.exp(-((at_y - y) ** 2 + (at_x - x) ** 2) / (2 * sigma**2))
                    sums[i, j] += weight * float(scores[row, col])
                    ones[i, j] += weight
    return sums / ones


def test_a_score_at_the_border_is_smoothed_as_any_other():
    """Else the maximum of a map, an image's score, would lean towards the border."""
    grid = Grid(64, 96, 16, 8)
    scores = torch.zeros(2, *grid.shape)
    scores[0, 3, 5] = scores[1, 3, -1] = 1
    inner, outer = upsample(scores.flatten(1), grid, 4.0).amax((1, 2)).tolist()
    assert inner < outer < 1.2 * inner


@pytest.mark.parametrize("sigma", [3.0, 8.0])
@pytest.mark.parametrize(("height", "width"), [(40, 40), (40, 57)])
def test_upsampling_against_a_loop(height, width, sigma):
    grid = Grid(height, width, 16, 8)
    scores = torch.rand(2, *grid.shape, generator=seeded(5))
    found = upsample(scores.flatten(1), grid, sigma)
    assert found.shape == (2, height, width)
    for one, own in zip(found, scores):
        assert np.allclose(one.numpy(), slow_upsampling(own, grid, sigma), rtol=1e-4)


def test_upsampling_against_a_transposed_convolution():
    """Well inside the image, where a kernel cut off at four deviations is all there is."""
    grid, sigma = Grid(128, 96, 32, 4), 3.0
    scores = torch.rand(1, 1, *grid.shape, generator=seeded(6))
    around = torch.arange(32, dtype=torch.float32) + 0.5 - 16
    kernel = torch.exp(-(around[:, None] ** 2 + around**2) / (2 * sigma**2))[None, None]
    spread = functional.conv_transpose2d(scores, kernel, stride=4) / functional.conv_transpose2d(
        torch.ones_like(scores), kernel, stride=4
    )
    found = upsample(scores[0].flatten(1), grid, sigma)
    assert spread.shape[2:] == found.shape[1:]
    assert torch.allclose(found[0, 30:-30, 30:-30], spread[0, 0, 30:-30, 30:-30], rtol=1e-4)


@pytest.mark.parametrize("sigma", [0.1, 1.0, 8.0, 100.0])
def test_upsampling_keeps_a_flat_map_flat_for_any_sigma(sigma):
    grid = Grid(45, 70, 32, 8)
    found = upsample(torch.full((1, math.prod(grid.shape)), 7.0), grid, sigma)
    assert torch.allclose(found, torch.full_like(found, 7.0), rtol=1e-5)


def test_a_map_by_hand():
    """Windows of mean colors: a window half covered by a red square is half as far from black, in every direction."""
    images = torch.zeros(1, 3, 64, 96)
    images[0, 0, 32:48, 64:80] = 1  # covers one window of the grid exactly
    grid = Grid(64, 96, 16, 8, 4)
    (found,) = embed_windows(MeanColor(), images, (1,), [grid], dense=True)
    made = level(grid=grid)
    made.density.mean, made.density.factor = torch.zeros(1, 3), torch.diag(torch.tensor([2.0, 1.0, 1.0]))[None]
    distances = made.distances(made.project(found))
    expected = torch.zeros(grid.shape)
    shares = torch.tensor([0.5, 1.0, 0.5])
    expected[3:6, 7:10] = 2 * shares[:, None] * shares
    assert torch.allclose(distances.view(grid.shape), expected, atol=1e-6)
    y, x = divmod(int(upsample(distances, Grid(64, 96, 16, 8), 4.0)[0].argmax()), 96)
    assert (y, x) in {(39, 71), (39, 72), (40, 71), (40, 72)}  # the middle of the square
