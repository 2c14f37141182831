"""Windows, their embeddings and densities, and maps, against slow loops, scikit-learn and networks made by hand."""

import itertools
import math

import numpy as np
import pytest
import torch
from sklearn.covariance import LedoitWolf
from torch import nn
from torch.nn import functional

import localization
from localization import (
    POOLED,
    Grid,
    Moments,
    PatchGaussian,
    arranged,
    distances,
    embed_windows,
    embedding_blocks,
    gaussians,
    principal_axes,
    upsample,
)
from model import CutPasteNet, stage_features, stage_stride

CPU = torch.device("cpu")


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
    """A network whose map is known: it hands pixels on, so that the embedding of a window is its mean colour."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Module()
        for name in ("conv1", "bn1", "relu", "maxpool", "layer1"):
            self.backbone.add_module(name, nn.Identity())

    def normalized(self, images):
        return images


# Where windows are ------------------------------------------------------------------------------------------------


def test_the_papers_grid():
    grid = Grid(256, 256, 32, 4, 4, False)
    assert grid.shape == (57, 57)
    down, across = grid.centers
    assert down[0] == across[0] == 16
    assert down[-1] == across[-1] == 240


@pytest.mark.parametrize(("level", "dense", "unit"), [(4, False, 1), (1, True, 4), (2, True, 8)])
@pytest.mark.parametrize(("height", "width", "window", "stride"), [(64, 96, 32, 8), (70, 101, 32, 8), (45, 64, 16, 16)])
def test_windows_lie_inside_and_leave_less_than_a_stride(height, width, window, stride, level, dense, unit):
    grid = Grid(height, width, window, stride, level, dense)
    assert grid.shape == tuple(1 + math.floor((side - window) / stride) for side in (height, width))
    for side, centers, corner in zip((height, width), grid.centers, grid.corner):
        assert (centers.diff() == stride).all()
        assert centers[0] - window / 2 + (unit - 1) / 2 == corner
        assert 0 <= corner < stride
        assert corner % unit == 0
        assert 0 <= side - (centers[-1] - centers[0] + corner + window) < stride


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((64, 48, 49, 4, 4, False), "window 49"),
        ((64, 64, 32, 0, 4, False), "stride 0"),
        ((64, 64, 32, 2, 1, True), "stride 2: a multiple of 4"),
        ((64, 64, 30, 4, 1, True), "window 30: a multiple of 4"),
        ((64, 64, 32, 4, 2, True), "stride 4: a multiple of 8"),
    ],
)
def test_grids_that_cannot_be(arguments, words):
    with pytest.raises(ValueError, match=words):
        Grid(*arguments)


# Embeddings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", ["image", "imagenet"])
def test_plain_windows_against_a_loop(normalize):
    net, images, grid = network(normalize), torch.rand(2, 3, 50, 71, generator=seeded(1)), Grid(50, 71, 32, 8, 4, False)
    with torch.no_grad():
        found = embed_windows(net, images, grid)
        whole = net.normalized(images)
        assert found.shape == (2, 3 * 5, 512)
        for image, (row, y), (col, x) in itertools.product(
            range(2), enumerate(grid.centers[0]), enumerate(grid.centers[1])
        ):
            top, left = int(y) - 16, int(x) - 16
            window = whole[image : image + 1, :, top : top + 32, left : left + 32]
            assert window.shape == (1, 3, 32, 32)
            assert torch.allclose(found[image, row * 5 + col], net.backbone(window)[0], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("level", [1, 2, 3])
@pytest.mark.parametrize(("height", "width"), [(64, 97), (80, 64)])
def test_dense_windows_against_a_loop(level, height, width):
    net, images = network(), torch.rand(2, 3, height, width, generator=seeded(2))
    grid, unit = Grid(height, width, 32, 16, level, True), (4, 8, 16)[level - 1]
    with torch.no_grad():
        found = embed_windows(net, images, grid)
        features = stage_features(net.backbone, net.normalized(images), level)
        for row, col in itertools.product(*map(range, grid.shape)):
            top, left = (corner + 16 * n for corner, n in zip(grid.corner, (row, col)))
            part = features[:, :, top // unit : (top + 32) // unit, left // unit : (left + 32) // unit]
            assert part.shape[2:] == (32 // unit, 32 // unit)
            expected = part.mean((2, 3))
            assert torch.allclose(found[:, row * grid.shape[1] + col], expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("level", [1, 2, 3, 4])
def test_the_stages_are_those_of_the_backbone(level):
    net, images = network(), torch.rand(2, 3, 64, 96, generator=seeded(3))
    kept = []
    hook = net.backbone.get_submodule(f"layer{level}").register_forward_hook(lambda m, i, output: kept.append(output))
    with torch.no_grad():
        embeddings = net.backbone(images)
        hook.remove()
        found = stage_features(net.backbone, images, level)
        assert torch.allclose(found, kept[0], rtol=1e-5, atol=1e-6)
        assert found.shape[2:] == (64 // stage_stride(level), 96 // stage_stride(level))
        if level == 4:
            assert torch.allclose(found.mean((2, 3)), embeddings, rtol=1e-4, atol=1e-6)


def test_blocks_are_all_images_in_order_and_the_network_is_left_as_it_was():
    net, grid = network().train(), Grid(48, 64, 32, 16, 4, False)
    images = torch.randint(0, 256, (9, 3, 48, 64), generator=seeded(4), dtype=torch.uint8)
    before = images.clone()
    blocks = list(embedding_blocks(net, images, grid, True, CPU))
    assert net.training
    assert torch.equal(images, before)
    assert max(map(len, blocks)) <= localization.IMAGES_AT_ONCE
    found = torch.cat(blocks)
    assert torch.allclose(found.norm(dim=2), torch.ones(9, 2 * 3), atol=1e-5)
    net.eval()
    for image, own in zip(images, found):  # none depends on the others
        with torch.no_grad():
            alone = embed_windows(net, image[None].float() / 255, grid)[0]
        assert torch.allclose(functional.normalize(alone, dim=1), own, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("level", "window", "stride"), [(1, 16, 8), (1, 8, 4), (1, 4, 4), (2, 16, 16), (2, 8, 8), (3, 32, 16)]
)
def test_centers_are_in_the_middle_of_what_dense_windows_see(level, window, stride):
    """By the gradient of windows in the middle of the image, of a network whose filters are all symmetric."""
    grid, net = Grid(160, 192, window, stride, level, True), network("imagenet")
    for module in net.backbone.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.constant_(module.weight, 1 / module.weight[0].numel())
        elif isinstance(module, nn.BatchNorm2d):
            module.reset_parameters()
    net.backbone.maxpool = nn.AvgPool2d(3, 2, 1)  # of equal pixels the largest is the first
    images = torch.full((1, 3, 160, 192), 0.9, requires_grad=True)
    embeddings = embed_windows(net, images, grid)
    row, col = grid.shape[0] // 2, grid.shape[1] // 2
    embeddings[0, row * grid.shape[1] + col].sum().backward()
    seen = images.grad[0].sum(0).double()
    for axis, center in ((1, grid.centers[0][row]), (0, grid.centers[1][col])):
        weights = seen.sum(axis)
        middle = ((torch.arange(len(weights)) + 0.5) * weights).sum() / weights.sum()
        assert middle == pytest.approx(center.item(), abs=0.51)


# Densities --------------------------------------------------------------------------------------------------------


def embeddings(images, locations, dims, seed=0, spread=1.0):
    """Normal embeddings whose mean and deviation differ from location to location by ``spread``."""
    generator = seeded(seed)
    mix = torch.randn(dims, dims, generator=generator, dtype=torch.float64)
    scale = (spread * torch.rand(locations, 1, generator=generator, dtype=torch.float64)).exp()
    mean = 3 * spread * torch.randn(locations, dims, generator=generator, dtype=torch.float64)
    noise = torch.randn(images, locations, dims, generator=generator, dtype=torch.float64)
    return mean + scale * (noise @ mix) + 5


def passes(x, size=3):
    def blocks(most):
        chosen = x if len(x) <= most else x[torch.arange(most) * len(x) // most]
        return iter(chosen.split(size))

    return blocks


def mahalanobis(x, mean, covariance):
    d = x - mean
    return np.sqrt(np.einsum("...i,ij,...j->...", d, np.linalg.inv(covariance), d))


def test_one_gaussian_for_all_locations_against_scikit_learn():
    x, new = embeddings(12, 7, 6), embeddings(5, 7, 6, seed=1)
    density = PatchGaussian()
    density.fit(passes(x), "shared", held_out=False)
    estimator = LedoitWolf().fit(x.reshape(-1, 6).numpy())
    expected = mahalanobis(new.numpy(), estimator.location_, estimator.covariance_)
    assert density.location == "shared"
    assert np.allclose(density.score(new).numpy(), expected, rtol=1e-3)


@pytest.mark.parametrize(("dims", "kept"), [(6, 6), (6, 4)])
def test_a_gaussian_for_each_location_against_scikit_learn(monkeypatch, dims, kept):
    monkeypatch.setattr(localization, "EACH_DIMS", kept)
    x, new = embeddings(12, 7, dims), embeddings(5, 7, dims, seed=1)
    density = PatchGaussian()
    density.fit(passes(x), "each", held_out=False)
    basis = principal_axes(passes(x)(32))[:, :kept].numpy()
    fits = [LedoitWolf().fit(x[:, location].numpy() @ basis) for location in range(7)]
    pooled = np.mean([fit.covariance_ for fit in fits], axis=0)
    assert density.location == "each"
    assert density.factor.shape == (7, kept, kept)
    found = density.score(new).numpy()
    for location, fit in enumerate(fits):
        covariance = (1 - POOLED) * fit.covariance_ + POOLED * pooled
        expected = mahalanobis(new[:, location].numpy() @ basis, fit.location_, covariance)
        assert np.allclose(found[:, location], expected, rtol=1e-3)


def test_principal_axes_are_those_of_scikit_learn():
    from sklearn.decomposition import PCA

    x = embeddings(12, 7, 6)
    found = principal_axes(passes(x)(32)).numpy()
    expected = PCA().fit(x.reshape(-1, 6).numpy()).components_.T
    assert np.allclose(found.T @ found, np.eye(6), atol=1e-9)
    assert np.allclose(np.abs((found * expected).sum(0)), 1, atol=1e-6)


@pytest.mark.parametrize("images", [13, 4])
@pytest.mark.parametrize("location", ["shared", "each"])
def test_held_out_scores_are_those_of_a_fit_without_the_fold(monkeypatch, location, images):
    monkeypatch.setattr(localization, "EACH_LEAST", 4)
    x = embeddings(images, 4, 5)
    whole = PatchGaussian()
    found = whole.fit(passes(x), location)
    basis = principal_axes(passes(x)(32))
    assert found.shape == (images, 4)
    for image in range(images):
        others = x[torch.arange(images) % 5 != image % 5] @ basis
        fitted = gaussians(Moments.of(arranged(others, location)))
        expected = distances(arranged(x[image : image + 1] @ basis, location), *fitted).reshape(-1)
        assert torch.allclose(found[image], expected, rtol=1e-6)
    assert found.mean() > whole.score(x).mean()


def test_auto_takes_the_likelier():
    """Locations that differ need Gaussians of their own; where they do not, one of all is the better estimate."""
    differing, alike = PatchGaussian(), PatchGaussian()
    differing.fit(passes(embeddings(30, 9, 5)), "auto")
    alike.fit(passes(embeddings(30, 9, 5, spread=0)), "auto")
    assert differing.location == "each"
    assert alike.location == "shared"
    for density in (differing, alike):
        assert set(density.likelihoods) == {"shared", "each"}
        assert max(density.likelihoods, key=density.likelihoods.get) == density.location


def test_likelihoods_are_those_of_scipy():
    from scipy.stats import multivariate_normal

    x = embeddings(13, 3, 4)
    density = PatchGaussian()
    density.fit(passes(x), "auto")
    y = (x @ principal_axes(passes(x)(32))).numpy()
    sums = {"shared": 0.0, "each": 0.0}
    for image in range(13):
        others = y[np.arange(13) % 5 != image % 5]
        one = LedoitWolf().fit(others.reshape(-1, 4))
        fits = [LedoitWolf().fit(others[:, location]) for location in range(3)]
        pooled = np.mean([fit.covariance_ for fit in fits], axis=0)
        for location, fit in enumerate(fits):
            covariance = (1 - POOLED) * fit.covariance_ + POOLED * pooled
            sums["each"] += multivariate_normal(fit.location_, covariance).logpdf(y[image, location])
            sums["shared"] += multivariate_normal(one.location_, one.covariance_).logpdf(y[image, location])
    constant = 4 / 2 * math.log(2 * math.pi)
    for kind, total in sums.items():
        assert density.likelihoods[kind] - constant == pytest.approx(total / (13 * 3), rel=1e-6)


@pytest.mark.parametrize("location", ["shared", "each", "auto"])
def test_blocks_of_any_size_give_the_same_density(location):
    x, new = embeddings(11, 4, 5), embeddings(2, 4, 5, seed=3)
    scores = []
    for size in (1, 4, 11):
        density = PatchGaussian()
        density.fit(passes(x, size), location)
        scores.append(density.score(new))
    assert torch.allclose(scores[0], scores[1], rtol=1e-4)
    assert torch.allclose(scores[0], scores[2], rtol=1e-4)


def test_moments_add_and_subtract():
    x = embeddings(10, 3, 4).transpose(0, 1)
    whole, part, rest = Moments.of(x), Moments.of(x[:, :4]), Moments.of(x[:, 4:])
    for found, expected in (((part + rest), whole), ((whole - part), rest), (whole.pooled(), None)):
        if expected is None:
            expected = Moments.of(x.reshape(1, -1, 4))
        assert found.count == expected.count
        for name in ("first", "second", "square", "fourth"):
            assert torch.allclose(getattr(found, name), getattr(expected, name))


def test_a_density_is_fitted_to_an_even_sample_of_many_images(monkeypatch):
    monkeypatch.setattr(localization, "PATCH_DENSITY_IMAGES", 20)
    asked = []
    x = embeddings(50, 3, 4)

    def counted(most):
        asked.append(most)
        return passes(x)(most)

    density = PatchGaussian()
    assert density.fit(counted, "shared").shape == (20, 3)
    assert asked == [localization.PROJECTION_IMAGES, 20, 20]
    expected = LedoitWolf().fit(x[torch.arange(20) * 50 // 20].reshape(-1, 4).numpy())
    assert np.allclose(
        density.score(x[:2]).numpy(),
        mahalanobis(x[:2].numpy(), expected.location_, expected.covariance_),
        rtol=1e-3,
    )


def test_a_location_that_never_changes_is_no_infinity():
    x = embeddings(12, 4, 5)
    x[:, 2] = x[0, 2]
    density = PatchGaussian()
    density.fit(passes(x), "each")
    assert torch.isfinite(density.score(x + 0.1)).all()


def test_densities_that_cannot_be():
    with pytest.raises(ValueError, match="3 images, one Gaussian for each location needs 8"):
        PatchGaussian().fit(passes(embeddings(3, 4, 5)), "each")
    with pytest.raises(ValueError, match="all equal"):
        PatchGaussian().fit(passes(torch.ones(9, 4, 5, dtype=torch.float64)), "shared")
    for bad in (math.nan, math.inf):
        x = embeddings(9, 4, 5)
        x[3, 2, 1] = bad
        with pytest.raises(ValueError, match="not finite"):
            PatchGaussian().fit(passes(x), "shared")
    few = PatchGaussian()
    assert few.fit(passes(embeddings(3, 4, 5)), "auto").shape == (3, 4)
    assert few.location == "shared"


# Maps -------------------------------------------------------------------------------------------------------------


def slow_upsampling(scores, grid, sigma):
    """Every score spreads a Gaussian around its window's centre, as a transposed convolution does; then every pixel
    is divided by what it would have got from scores of 1. Pixels further out than all centres are as those there."""
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
    grid = Grid(64, 96, 16, 8, 1, False)
    scores = torch.zeros(2, *grid.shape)
    scores[0, 3, 5] = scores[1, 3, -1] = 1
    inner, outer = upsample(scores, grid, 4.0).amax((1, 2)).tolist()
    assert inner < outer < 1.2 * inner


@pytest.mark.parametrize("sigma", [3.0, 8.0])
@pytest.mark.parametrize(("height", "width"), [(40, 40), (40, 57)])
def test_upsampling_against_a_loop(height, width, sigma):
    grid = Grid(height, width, 16, 8, 1, False)
    scores = torch.rand(2, *grid.shape, generator=seeded(5))
    found = upsample(scores, grid, sigma)
    assert found.shape == (2, height, width)
    for one, own in zip(found, scores):
        assert np.allclose(one.numpy(), slow_upsampling(own, grid, sigma), rtol=1e-4)


def test_upsampling_against_a_transposed_convolution():
    """Well inside the image, where a kernel cut off at four deviations is all there is."""
    grid, sigma = Grid(128, 96, 32, 4, 4, False), 3.0
    scores = torch.rand(1, 1, *grid.shape, generator=seeded(6))
    around = torch.arange(32, dtype=torch.float32) + 0.5 - 16
    kernel = torch.exp(-(around[:, None] ** 2 + around**2) / (2 * sigma**2))[None, None]
    spread = functional.conv_transpose2d(scores, kernel, stride=4) / functional.conv_transpose2d(
        torch.ones_like(scores), kernel, stride=4
    )
    found = upsample(scores[0], grid, sigma)
    assert spread.shape[2:] == found.shape[1:]
    assert torch.allclose(found[0, 30:-30, 30:-30], spread[0, 0, 30:-30, 30:-30], rtol=1e-4)


@pytest.mark.parametrize("sigma", [0.1, 1.0, 8.0, 100.0])
def test_upsampling_keeps_a_flat_map_flat_for_any_sigma(sigma):
    grid = Grid(45, 70, 32, 8, 4, False)
    found = upsample(torch.full((1, *grid.shape), 7.0), grid, sigma)
    assert torch.allclose(found, torch.full_like(found, 7.0), rtol=1e-5)


def test_a_map_by_hand():
    """Windows of mean colours: a window half covered by a red square is half as far from black, in every direction."""
    images = torch.zeros(1, 3, 64, 96)
    images[0, 0, 32:48, 64:80] = 1  # covers one window of the grid exactly
    grid = Grid(64, 96, 16, 8, 1, False)
    (found,) = embedding_blocks(MeanColor(), images, grid, False, CPU)
    density = PatchGaussian()
    density.projection, density.mean = torch.eye(3), torch.zeros(1, 3)
    density.factor = torch.diag(torch.tensor([2.0, 1.0, 1.0]))[None]
    scores = density.score(found).view(grid.shape)
    expected = torch.zeros(grid.shape)
    shares = torch.tensor([0.5, 1.0, 0.5])
    expected[3:6, 7:10] = 2 * shares[:, None] * shares
    assert torch.allclose(scores, expected, atol=1e-6)
    maps = upsample(scores[None], grid, 4.0)[0]
    y, x = divmod(int(maps.argmax()), 96)
    assert (y, x) in {(39, 71), (39, 72), (40, 71), (40, 72)}  # the middle of the square
