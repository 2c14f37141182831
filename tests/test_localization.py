"""Windows, their embeddings, the densities of a stage, maps and Grad-CAM, against loops and networks made by hand."""

import itertools
import math

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from torch import nn
from torch.nn import functional

from density import NotFiniteError, fit_density, held_out
from localization import WHITENED, Grid, StageDensity, bounded, embed_windows, grad_cam, principal_axes, upsample
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

    def features(self, images, levels):
        return [functional.avg_pool2d(images, 4) for _ in levels]


# Where windows are ------------------------------------------------------------------------------------------------


def test_the_papers_grid_and_the_grid_of_a_whole_image():
    grid = Grid(256, 256, 32, 4)
    assert grid.shape == (57, 57)
    for centers in grid.centers:
        assert (centers[0], centers[-1]) == (16, 240)
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
    net, grid = network(normalize), Grid(50, 71, 32, 16)
    images = net.normalized(torch.rand(2, 3, 50, 71, generator=seeded(1)))
    embeddings = embed_windows(net, images, (2, 4), [grid, grid], dense=False)
    assert [tuple(x.shape) for x in embeddings] == [(2, 2 * 3, 128), (2, 2 * 3, 512)]
    for number, (y, x) in enumerate(itertools.product(*grid.centers)):
        window = images[:, :, int(y) - 16 : int(y) + 16, int(x) - 16 : int(x) + 16]
        assert window.shape == (2, 3, 32, 32)
        for stage, features in zip(embeddings, net.features(window, (2, 4))):
            assert torch.allclose(stage[:, number], features.mean((2, 3)), rtol=1e-3, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(("height", "width"), [(64, 97), (80, 64)])
def test_dense_windows_against_a_loop(height, width):
    net, levels = network(), (1, 2, 3)
    images = net.normalized(torch.rand(2, 3, height, width, generator=seeded(2)))
    grids = [Grid(height, width, 32, 16, net.spec.strides[level - 1]) for level in levels]
    embeddings = embed_windows(net, images, levels, grids, dense=True)
    for grid, stage, features in zip(grids, embeddings, net.features(images, levels)):
        for row, col in itertools.product(*map(range, grid.shape)):
            corner = [(first + 16 * number) // grid.feature_stride for first, number in zip(grid.corner, (row, col))]
            (top, left), side = corner, 32 // grid.feature_stride
            part = features[:, :, top : top + side, left : left + side]
            assert part.shape[2:] == (side, side)
            assert torch.allclose(stage[:, row * grid.shape[1] + col], part.mean((2, 3)), rtol=1e-3, atol=1e-5)
    (last,) = embed_windows(net, images, (4,), [Grid(height, width)], dense=True)  # the grid with one window
    assert torch.equal(last, net.features(images, (4,))[0].mean((2, 3))[:, None])


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


# Densities of a stage ---------------------------------------------------------------------------------------------


def embeddings_of(images, locations, dims, seed=0, spread=1.0):
    """Normal embeddings whose mean and deviation differ from location to location by ``spread``."""
    generator = seeded(seed)
    mix = torch.randn(dims, dims, generator=generator)
    scale = (spread * torch.rand(locations, 1, generator=generator)).exp()
    mean = 3 * spread * torch.randn(locations, dims, generator=generator)
    return mean + scale * (torch.randn(images, locations, dims, generator=generator) @ mix) + 5


def stage(location="auto", dims=None, l2=False, grid=None):
    return StageDensity([0], [grid or Grid(64, 64, 32, 16)], "torch", l2, location, dims)


@pytest.mark.parametrize(("feature_stride", "size"), [(4, 3), (8, 3), (16, 3)])
def test_cells_against_a_loop(feature_stride, size):
    """Pool every stage at the same places: means over an odd number of features, zero beyond the border, then over the
    features of a cell; where a feature is larger, linearly between the middles of two."""
    height, width, stride = 48, 80, 8
    grid = Grid(height, width, 16, stride, feature_stride, cells=True)
    features = torch.randn(2, 3, height // feature_stride, width // feature_stride, generator=seeded(0))
    padded = functional.pad(features, [size // 2] * 4)
    means = torch.empty_like(features)
    for y, x in np.ndindex(*features.shape[2:]):
        means[:, :, y, x] = padded[:, :, y : y + size, x : x + size].mean((2, 3))
    assert grid.shape == (6, 10)
    assert [centers[:2].tolist() for centers in grid.centers] == [[4, 12], [4, 12]]
    if feature_stride > stride:
        expected = functional.interpolate(means, (6, 10), mode="bilinear", align_corners=False)
    else:
        expected = functional.adaptive_avg_pool2d(means, (6, 10))
    assert torch.allclose(grid.pool(features).mT.view(2, 3, 6, 10), expected, atol=1e-5)


def test_the_last_cell_may_be_smaller():
    grid = Grid(44, 60, 16, 8, 4, cells=True)
    pooled = grid.pool(torch.ones(1, 1, 11, 15)).view(grid.shape)
    assert grid.shape == (6, 8)
    assert pooled[1:-1, 1:-1].eq(1).all()
    assert math.isclose(pooled[-1, 3], 2 / 3, rel_tol=1e-6)  # one feature, whose mean reaches beyond the border


def test_joined_stages_are_scaled_and_their_directions_are_those_within_a_place():
    """Two stages, one of a thousand times the scale: both count alike. What differs from place to place, but not from
    image to image, is no direction. Variances shrink."""
    first, second = embeddings_of(40, 7, 4), 1000 * embeddings_of(40, 7, 3, seed=1)
    grids = [Grid(64, 64, 32, 16)] * 2
    made = StageDensity([0, 1], grids, "nearest", False, "auto", 5, joined=True)
    made.choose_axes([first, second])
    x = made.project([first, second])
    assert (made.axes.shape, x.shape) == ((7, 5), (40, 7, 5))
    assert torch.allclose(x.mean((0, 1)), torch.zeros(5), atol=1e-4)
    assert torch.allclose(made.project([first[:1], second[:1]]), x[:1], atol=1e-4)
    scaled = torch.cat([part / part.flatten(0, 1).std(0).mean() / part.shape[2] ** 0.5 for part in (first, second)], 2)
    within = (scaled - scaled.mean(0)).flatten(0, 1).double()
    values = PCA().fit(within.numpy()).explained_variance_[:5] * (len(within) - 1) / len(within)
    variances = (x - x.mean(0)).flatten(0, 1).var(0, correction=0)
    assert np.allclose(variances, values ** (1 - WHITENED), rtol=1e-3)


def test_principal_axes_are_those_of_scikit_learn():
    x = embeddings_of(12, 7, 6)
    axes = principal_axes(x).numpy()
    expected = PCA().fit(x.double().reshape(-1, 6).numpy()).components_.T
    assert np.allclose(axes.T @ axes, np.eye(6), atol=1e-9)
    assert np.allclose(np.abs((axes * expected).sum(0)), 1, atol=1e-6)
    x[3, 2, 1] = math.nan
    with pytest.raises(NotFiniteError, match="not finite"):
        principal_axes(x)


def test_embeddings_are_projected_on_the_axes_of_the_normalized_ones():
    x, made = embeddings_of(12, 7, 6), stage(dims=4, l2=True)
    unit = functional.normalize(x.double(), dim=2)
    assert torch.allclose(made.project([x]), unit.float())
    made.choose_axes([x])
    assert torch.allclose(made.project([x]), (unit @ principal_axes(unit)[:, :4]).float(), atol=1e-5)
    assert stage(grid=Grid(64, 64)).project([x]).dtype == torch.float64


@pytest.mark.parametrize("location", ["shared", "each"])
def test_distances_are_the_densitys_window_by_window(location):
    x, new, shared = embeddings_of(12, 9, 6), embeddings_of(5, 9, 6, seed=1), location == "shared"
    made = stage(location)
    assert torch.equal(made.fit(x, with_held_out=True), held_out("torch", x, shared)[0])
    assert made.shared == shared
    density, distances = fit_density("torch", x, shared), made.distances(new)
    for place in range(9):
        alone = density.score(new[:, place][None])[0] if shared else density.score(new.transpose(0, 1))[place]
        assert torch.allclose(distances[:, place], alone)
    assert stage(location).fit(x, with_held_out=False) is None


def test_auto_takes_the_likelier():
    """Locations that differ need Gaussians of their own; where they do not, one of all is the better estimate."""
    differing, alike, few = stage(), stage(), stage()
    differing.fit(embeddings_of(30, 9, 5), False)
    alike.fit(embeddings_of(30, 9, 5, spread=0), False)
    assert (differing.shared, alike.shared) == (False, True)
    for made in (differing, alike):
        assert set(made.likelihoods) == {"shared", "each"}
        assert (max(made.likelihoods, key=made.likelihoods.get) == "shared") == made.shared
        assert "mean log likelihood" in made.choice
    assert few.fit(embeddings_of(3, 9, 5), True).shape == (3, 9)
    assert few.shared


# Maps -------------------------------------------------------------------------------------------------------------


def slow_upsampling(scores, grid, sigma):
    """Every score spreads a Gaussian around its window's center, as a transposed convolution does; then every pixel
    is divided by what it would have got from scores of 1. Pixels further out than all centers are as those there."""
    down, across = (centers.tolist() for centers in grid.centers)
    i, j = np.mgrid[: grid.height, : grid.width] + 0.5
    sums, ones = np.zeros((2, grid.height, grid.width))
    for (row, y), (col, x) in itertools.product(enumerate(down), enumerate(across)):
        squares = (i.clip(down[0], down[-1]) - y) ** 2 + (j.clip(across[0], across[-1]) - x) ** 2
        weights = np.exp(-squares / (2 * sigma**2))
        sums += weights * float(scores[row, col])
        ones += weights
    return sums / ones


@pytest.mark.parametrize("sigma", [3.0, 8.0])
@pytest.mark.parametrize(("height", "width"), [(40, 40), (40, 57)])
def test_upsampling_against_a_loop(height, width, sigma):
    grid = Grid(height, width, 16, 8)
    scores = torch.rand(2, *grid.shape, generator=seeded(5))
    maps = upsample(scores.flatten(1), grid, sigma)
    assert maps.shape == (2, height, width)
    for one, windows in zip(maps, scores):
        assert np.allclose(one.numpy(), slow_upsampling(windows, grid, sigma), rtol=1e-4)


def test_upsampling_against_a_transposed_convolution():
    """Well inside the image, where a kernel cut off at four deviations is all there is."""
    grid, sigma = Grid(128, 96, 32, 4), 3.0
    scores = torch.rand(1, 1, *grid.shape, generator=seeded(6))
    around = torch.arange(32, dtype=torch.float32) + 0.5 - 16
    kernel = torch.exp(-(around[:, None] ** 2 + around**2) / (2 * sigma**2))[None, None]
    ones = functional.conv_transpose2d(torch.ones_like(scores), kernel, stride=4)
    spread = functional.conv_transpose2d(scores, kernel, stride=4) / ones
    maps = upsample(scores[0].flatten(1), grid, sigma)
    assert spread.shape[2:] == maps.shape[1:]
    assert torch.allclose(maps[0, 30:-30, 30:-30], spread[0, 0, 30:-30, 30:-30], rtol=1e-4)


@pytest.mark.parametrize("sigma", [0.1, 1.0, 8.0, 100.0])
def test_upsampling_keeps_a_flat_map_flat_for_any_sigma(sigma):
    grid = Grid(45, 70, 32, 8)
    maps = upsample(torch.full((1, math.prod(grid.shape)), 7.0), grid, sigma)
    assert torch.allclose(maps, torch.full_like(maps, 7.0), rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bounded_values_keep_their_order_and_never_exceed_the_limit(dtype):
    values = torch.cat([torch.linspace(-20, 40, 6001), torch.logspace(1.7, 6, 200)]).to(dtype)
    limit = torch.tensor(15.0, dtype=torch.float64)
    found = bounded(values, limit)
    assert found.dtype == dtype
    assert torch.equal(found[values <= 7.5], values[values <= 7.5])
    steps = found.diff() / values.diff()
    assert (steps[values[1:] > 7.5] > 0).all()
    assert steps.max() < 1.01  # no jump at half of the limit
    assert steps[values[1:] > 7.6].diff().max() < 0.01
    assert 14.99 < found[-1] <= 15
    assert torch.equal(bounded(values, torch.tensor(1e9, dtype=torch.float64)), values)
    assert bounded(torch.tensor([9.0, 30.0]), limit).tolist() == [8.75, 13.125]  # 15 - 225 / 36, 15 - 225 / 120


def test_a_map_by_hand():
    """Windows of mean colors: a window half covered by a red square is half as far from black, in every direction."""
    images = torch.zeros(1, 3, 64, 96)
    images[0, 0, 32:48, 64:80] = 1  # covers one window of the grid exactly
    grid = Grid(64, 96, 16, 8, 4)
    (embeddings,) = embed_windows(MeanColor(), images, (1,), [grid], dense=True)
    made = stage(grid=grid)
    made.density.mean, made.density.factor = torch.zeros(1, 3), torch.diag(torch.tensor([2.0, 1.0, 1.0]))[None]
    distances = made.distances(made.project([embeddings]))
    expected = torch.zeros(grid.shape)
    shares = torch.tensor([0.5, 1.0, 0.5])
    expected[3:6, 7:10] = 2 * shares[:, None] * shares
    assert torch.allclose(distances.view(grid.shape), expected, atol=1e-6)
    y, x = divmod(int(upsample(distances, Grid(64, 96, 16, 8), 4.0)[0].argmax()), 96)
    assert (y, x) in {(39, 71), (39, 72), (40, 71), (40, 72)}  # the middle of the square


# Grad-CAM ---------------------------------------------------------------------------------------------------------

IMAGES = torch.rand(3, 3, 64, 96, generator=seeded(0))


def norm(features):
    return functional.adaptive_avg_pool2d(features, 1).flatten(1).norm(dim=1)


@pytest.fixture(scope="module")
def last():
    """Features of the last stage, (3, 512, 2, 3)."""
    net = network()
    with torch.no_grad():
        return net.features(net.normalized(IMAGES), (4,))[0]


def test_a_cam_by_hand():
    """Features that are the image's red and green; a score that is a weighted sum of their means."""
    features = torch.rand(2, 2, 4, 6, generator=seeded(1))
    scores, maps = grad_cam(features, lambda x: x.mean((2, 3)) @ torch.tensor([2.0, -3.0]), (4, 6))
    red, green = features[:, 0], features[:, 1]
    assert torch.allclose(scores, 2 * red.mean((1, 2)) - 3 * green.mean((1, 2)), atol=1e-6)
    # the gradient of the score at each feature is weight / 24, and so is its mean
    assert torch.allclose(maps, ((2 * red - 3 * green) / 24).relu(), atol=1e-6)
    assert 0 == maps.min() < maps.max()
    spots = torch.zeros(1, 2, 8, 12)
    spots[0, 0, 2, 9] = spots[0, 1, 6, 3] = 1  # a red one, a green one
    _, maps = grad_cam(spots, lambda x: x.mean((2, 3)) @ torch.tensor([1.0, -1.0]), (24, 36))
    assert maps.shape == (1, 24, 36)
    assert maps[0].argmax() == (2 * 3 + 1) * 36 + 9 * 3 + 1  # the middle of the 3 x 3 pixels of feature (2, 9)
    assert maps[0, 6 * 3 + 1, 3 * 3 + 1] == 0


def test_a_cam_against_the_gradient_of_the_whole_network(last):
    """Each image has the map that it has alone, wherever gradients are off."""
    net = network()
    scores, maps = grad_cam(last, norm, (64, 96))
    (features,) = net.features(net.normalized(IMAGES), (4,))
    (gradient,) = torch.autograd.grad(features.mean((2, 3)).norm(dim=1).sum(), features)
    assert torch.allclose(scores, net.embed(IMAGES).norm(dim=1), rtol=1e-4)
    for image in range(len(IMAGES)):
        coarse = sum(g.mean() * f for g, f in zip(gradient[image], features[image])).relu()
        fine = functional.interpolate(coarse[None, None], (64, 96), mode="bilinear", align_corners=False)[0, 0]
        assert torch.allclose(maps[image], fine, rtol=1e-3, atol=1e-6)
        score, alone = grad_cam(last[image : image + 1], norm, (64, 96))
        assert torch.allclose(score[0], scores[image], rtol=1e-4)
        assert torch.allclose(alone[0], maps[image], rtol=1e-3, atol=1e-6)
    assert maps.shape == (3, 64, 96)
    assert 0 <= maps.min() < maps.max()
    for off in (torch.no_grad, torch.inference_mode):
        with off():
            others = grad_cam(net.features(net.normalized(IMAGES), (4,))[0], norm, (64, 96))
        assert torch.equal(others[0], scores)
        assert torch.equal(others[1], maps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cam_leaves_nothing_behind(last, dtype):
    torch.manual_seed(1)
    layer, frozen = nn.Linear(512, 1), nn.Linear(512, 1).requires_grad_(False)
    layer.weight.grad = torch.full_like(layer.weight, 3)
    given = last.to(dtype, copy=True).requires_grad_()

    def score(features):
        embeddings = features.float().mean((2, 3))
        return (layer(embeddings) + frozen(embeddings))[:, 0]

    scores, maps = grad_cam(given, score, (64, 96))
    assert maps.dtype == torch.float32
    assert scores.requires_grad is maps.requires_grad is False
    assert (layer.weight.grad == 3).all()
    assert layer.bias.grad is frozen.weight.grad is frozen.bias.grad is given.grad is None
    assert [p.requires_grad for m in (layer, frozen) for p in m.parameters()] == [True, True, False, False]
    assert torch.equal(given, last.to(dtype))


@pytest.mark.parametrize("distance", [lambda d: d.square().sum(1).sqrt(), lambda d: d.sum(1).sqrt()])
def test_a_distance_of_zero_has_an_empty_map(last, distance):
    """The gradient of a root at 0 is not finite."""
    target = last.mean((2, 3))
    target[1:] -= 1
    scores, maps = grad_cam(last, lambda x: distance(x.mean((2, 3)) - target), (64, 96))
    assert scores[0] == 0
    assert (maps[0] == 0).all()
    assert (scores[1:] > 0).all()
    assert (maps[1:] > 0).any()
