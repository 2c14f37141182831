"""The detector and its file: what is written comes back, and whatever is wrong with it gets one line."""

import lzma
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import network_of

import detector
import detector as member
import localization
from config import Config, PatchConfig, SettingError
from conformal import conformal_threshold
from dataset import load_test, load_train
from density import fit_density, held_out
from detector import Detector, all_but, initial_network, load, load_config, save, scored_images, stream, unseen_by
from localization import upsample
from model import CutPasteNet
from reporting.metrics import evaluate
from runtime.files import InputError, load_tensors, save_tensors
from runtime.image_files import decode

CONFIG = Config("brick", height=32, width=48, false_alarm_rate=0.2, seed=3, pretrained=False)


def scores_of(made, images):
    return torch.cat([scores for scores, _ in stream(made, images)])


def projected(made, images):
    """Embeddings (N, L, d) of the first level as its density takes them."""
    member = made.members[0]
    return torch.cat([member.project(stages)[0] for stages in stream(made, images, member.embed)])


def maps_of(made, images):
    return torch.cat([maps for _, maps in stream(made, images)])


@pytest.fixture(scope="module")
def images():
    return torch.randint(0, 256, (12, 3, 32, 48), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def trained_network(config):
    """As a network is after training: not the initial one."""
    network = initial_network(config)
    with torch.no_grad():
        network.backbone.conv1.weight.mul_(torch.linspace(0.9, 1.1, 64)[:, None, None, None])
    return network


@pytest.fixture(scope="module")
def fitted(images):
    made = Detector(CONFIG, [trained_network(CONFIG)]).fit(images)
    made.metadata = {"command": "python run_training.py"}
    return made


@pytest.mark.parametrize("density", ["torch", "sklearn", "kde", "nearest", "both"])
def test_round_trip(tmp_path, fitted, images, density):
    one = fitted.refit(images, density=density)
    save(one, tmp_path / "brick.pt")
    other = load(tmp_path / "brick.pt")
    assert torch.equal(scores_of(one, images), scores_of(other, images))
    assert torch.equal(one.threshold, other.threshold)
    assert torch.equal(one.calibration_scores, other.calibration_scores)
    assert other.config == replace(CONFIG, density=density)
    assert other.metadata == fitted.metadata
    assert other.config.size == (32, 48)
    assert not list(tmp_path.glob(".*"))


def test_scores_do_not_depend_on_the_batch(fitted, images):
    together, maps = fitted(images)
    assert maps is None
    alone = torch.cat([fitted(image[None])[0] for image in images])
    assert torch.allclose(together, alone, rtol=1e-4)


def test_l2_normalizes_embeddings(fitted, images):
    plain = fitted.refit(images, l2=False)
    for made, deviation in ((fitted, 0), (plain, 1)):
        (level,) = made.members[0].levels
        lengths = level.project(made.members[0].embed(made.prepare(images))).norm(dim=2)
        assert (lengths.std() > 1e-9) == deviation
        assert made.config.l2 == (not deviation)


def test_threshold_is_the_conformal_one_of_held_out_normal_scores(fitted, images):
    (level,) = fitted.members[0].levels
    scores, _ = held_out("torch", level.project(fitted.members[0].embed(fitted.prepare(images))), True)
    assert torch.allclose(fitted.calibration_scores, scores[:, 0])
    assert fitted.threshold == conformal_threshold(fitted.calibration_scores, 0.2)[0]
    assert list(fitted.notes()) == []
    (note,) = fitted.refit(images, false_alarm_rate=0.01).notes()
    assert "0.01 needs 99 normal images, not 12" in note


def test_density_is_fitted_to_an_even_sample_of_many_images(images, monkeypatch):
    monkeypatch.setattr(member, "DENSITY_IMAGES", 70)
    many = torch.cat([images] * 20)  # 240
    many[:, 0, 0, 0] = torch.arange(240)
    chosen = [240 * i // 70 for i in range(70)]
    assert len(set(chosen)) == 70
    network = initial_network(CONFIG)
    fitted, expected = Detector(CONFIG, [network]).fit(many), Detector(CONFIG, [network]).fit(many[chosen])
    for name, value in expected.members[0].levels.state_dict().items():
        assert torch.allclose(fitted.members[0].levels.state_dict()[name], value, rtol=1e-4)
    assert torch.allclose(fitted.calibration_scores, expected.calibration_scores, rtol=1e-4)
    assert len(fitted.calibration_scores) == 70


def test_fitting_runs_the_network_once_over_the_images(images, monkeypatch):
    seen = []
    features = CutPasteNet.features
    monkeypatch.setattr(
        CutPasteNet, "features", lambda self, x, levels: seen.append(len(x)) or features(self, x, levels)
    )
    Detector(CONFIG).fit(images)
    assert sum(seen) == 12
    seen.clear()
    Detector(replace(CONFIG, features="level", patches=PatchConfig(32, location="auto"))).fit(images)
    assert sum(seen) == 12


def test_wrong_image_size_is_refused(fitted):
    with pytest.raises(ValueError, match=r"\(M, 3, 32, 48\)"):
        scores_of(fitted, torch.zeros(1, 3, 48, 32))


def test_untrained_is_the_network_training_starts_from(fitted):
    start = initial_network(CONFIG).folded().state_dict()
    assert all(torch.equal(value, start[name]) for name, value in network_of(fitted.untrained()).state_dict().items())


def test_initial_network_depends_on_seed_and_category_and_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    weight = initial_network(CONFIG).head[0].weight
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(weight, initial_network(CONFIG).head[0].weight)
    for change in ({"seed": 4}, {"category": "grass"}):
        assert not torch.equal(weight, initial_network(replace(CONFIG, **change)).head[0].weight)


# The file ---------------------------------------------------------------------------------------------------------


def test_bad_files_are_named(tmp_path, fitted):
    path = tmp_path / "brick.pt"
    save(fitted, path)
    content = load_tensors(path, "detector")

    def fails(match, change=None):
        if change is not None:
            save_tensors(content | change, path)
        for read in (load,) if "backbone.conv1" in match or "networks" in match else (load, load_config):
            with pytest.raises(InputError, match=match) as caught:
                read(path)
            assert str(path) in str(caught.value)
            assert "\n" not in str(caught.value)

    whole = path.read_bytes()
    for length in (0, 10, 1000, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        fails("truncated, damaged or not a detector file")
    for text in ("hello", "test of a file", "X", "\x89PNG\r\n"):
        path.write_text(text)
        fails("truncated, damaged or not a detector file")
    middle = len(whole) // 2
    path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 4]) + whole[middle + 1 :])
    fails("truncated, damaged or not a detector file")
    torch.save({"weight": torch.zeros(3)}, path)
    fails("not a detector file of this project")
    fails("update the program", {"version": detector.VERSION + 1})
    fails("backbone: must be one of resnet18", {"config": content["config"] | {"backbone": "vgg"}})
    fails("head_layer: must be a whole number from 0 to 64", {"config": content["config"] | {"head_layer": 10_000_000}})
    fails("made by a newer program .hue: no setting", {"config": content["config"] | {"hue": 1}})
    fails("damaged detector file", {"config": None})
    fails("damaged detector file .2 networks for 1 folds", {"members": 2 * content["members"]})
    empty = content["members"][0] | {"network": {}}
    fails("damaged detector file .it lacks backbone.conv1.bias and ", {"members": [empty]})
    save_tensors(content | {"metadata": {"refitted": 5}}, path)
    for read in (load, detector.set_since):
        with pytest.raises(InputError, match="damaged detector file"):
            read(path)
    save_tensors(content, tmp_path / "grass.pt")
    path = tmp_path / "grass.pt"
    fails("category 'brick' under another name")
    path = tmp_path / "slate.pt"
    fails("no such file")


def test_settings_that_an_older_file_lacks_have_their_defaults(tmp_path, fitted):
    save(fitted, tmp_path / "brick.pt")
    content = load_tensors(tmp_path / "brick.pt", "detector")
    for name in ("dims", "translate", "lr", "l2"):
        del content["config"][name]
    torch.save(content | {"version": 4, "checksum": 64 * "0"}, tmp_path / "brick.pt")  # as version 4 wrote them
    assert load_config(tmp_path / "brick.pt") == CONFIG


def test_a_patch_model_of_version_2_scores_the_same(tmp_path):
    """A file that version 2 wrote, with most weights 0 or repeated to keep it small, and the scores that it gave."""
    path = tmp_path / "brick.pt"
    path.write_bytes(lzma.decompress((Path(__file__).parent / "detector_version_2.pt.xz").read_bytes()))
    made = load(path)
    assert made.metadata["train_images"] == 12
    assert made.threshold == conformal_threshold(made.calibration_scores, 0.2)[0]
    assert made.config.levels == (1,)
    scores, maps = made(VERSION_2_IMAGES)
    assert torch.allclose(scores, made.threshold.new_tensor(made.metadata["scores"]), rtol=1e-5)
    assert torch.allclose(maps[:, ::16, ::16].reshape(-1), torch.tensor(made.metadata["map"]), rtol=1e-4)


@pytest.mark.parametrize("kind", ["torch", "kde"])
def test_an_image_level_model_of_version_2_scores_the_same(tmp_path, fitted, images, kind):
    """As version 2 wrote it: a mean and an inverse covariance, or points and a bandwidth, and the distance by them."""
    made = fitted.refit(images, density=kind)
    (level,) = made.members[0].levels
    density = dict(level.density.state_dict())
    if kind == "torch":
        precision = density["factor"][0].T @ density["factor"][0]
        density = {"mean": density["mean"][0], "precision": precision, "shrinkage": torch.tensor(0.1)}
        x = level.project(made.members[0].embed(made.prepare(images)))[:, 0] - density["mean"]
        assert torch.allclose(((x @ precision) * x).sum(1).sqrt(), made(images)[0])
    config = {name: value for name, value in made.config.to_dict().items() if name != "dims"}
    content = {"format": detector.FORMAT, "version": 2, "config": config, "made": {}, "density": density}
    content |= {
        "network": trained_network(CONFIG).state_dict(),
        "threshold": made.threshold,
        "normal_scores": made.calibration_scores,
    }
    torch.save(content, tmp_path / "brick.pt")
    assert torch.allclose(load(tmp_path / "brick.pt")(images)[0], made(images)[0], rtol=1e-9)


def test_a_patch_model_of_version_3_has_the_same_stages(tmp_path):
    """As version 3 wrote it: one network; MobileNetV2's fourth stage ended with the head convolution, the fifth now."""
    patches = PatchConfig(32, window=32, stride=32)
    config = replace(
        CONFIG, backbone="mobilenet_v2", height=64, width=96, features="level", level=(2, 5), patches=patches
    )
    made = Detector(config, [initial_network(config)]).fit(pictures(20))
    (member,) = made.members
    settings = {name: value for name, value in config.to_dict().items() if name not in ("features", "folds")}
    content = {"format": detector.FORMAT, "version": 3, "config": settings | {"level": "2,4"}, "metadata": {}}
    content |= {"network": initial_network(config).state_dict(), "levels": member.levels.state_dict()}
    save_tensors(
        content | {"threshold": made.threshold, "normal_scores": made.calibration_scores}, tmp_path / "brick.pt"
    )
    found = load(tmp_path / "brick.pt")
    assert found.config == config
    for one, other in zip(found(pictures(3, seed=1)), made(pictures(3, seed=1))):
        assert torch.equal(one, other)


def test_batchnorm_of_version_7_is_folded(tmp_path, patch_model):
    save(patch_model, tmp_path / "brick.pt")
    content = load_tensors(tmp_path / "brick.pt", "detector")
    content["members"][0]["network"] = trained_network(PATCHES).state_dict()
    save_tensors(content | {"version": 7}, tmp_path / "brick.pt")
    earlier, images = load(tmp_path / "brick.pt"), pictures(3, seed=1)
    assert torch.equal(earlier(images)[1], patch_model(images)[1])
    save(earlier, tmp_path / "brick.pt")
    assert torch.equal(load(tmp_path / "brick.pt")(images)[1], patch_model(images)[1])


def test_a_lite_network_of_version_6_is_padded_as_it_was(tmp_path):
    config = replace(PATCHES, backbone="efficientnet_lite0_centered", level=(2,))
    network = initial_network(config)
    made = Detector(config, [network]).fit(pictures(8))
    save(made, tmp_path / "brick.pt")
    content = load_tensors(tmp_path / "brick.pt", "detector")
    content["members"][0]["network"] = network.state_dict()
    content |= {"version": 6, "config": content["config"] | {"backbone": "efficientnet_lite0"}}
    save_tensors(content, tmp_path / "brick.pt")
    earlier, images = load(tmp_path / "brick.pt"), pictures(3, seed=1)
    assert torch.equal(earlier(images)[0], made(images)[0])
    save_tensors(content | {"version": 7}, tmp_path / "brick.pt")
    assert not torch.allclose(load(tmp_path / "brick.pt")(images)[0], earlier(images)[0], rtol=0.01)


def test_places_of_version_6_have_no_limit(tmp_path, patch_model, monkeypatch):
    monkeypatch.setattr(localization, "PLACE_LIMIT", 3.0)
    both, images = patch_model.refit(pictures(20), **BOTH), pictures(3, seed=1)
    images[:, :, 10:40:4, 10:40] = 255  # stripes
    both.members[0].limit.fill_(1e9)
    limited = both(images)[1]
    both.members[0].levels[0].limit.fill_(1e9)
    save(both, tmp_path / "brick.pt")
    content = load_tensors(tmp_path / "brick.pt", "detector")
    content["members"][0]["network"] = trained_network(PATCHES).state_dict()
    del content["members"][0]["levels"]["0.limit"]
    save_tensors(content | {"version": 6}, tmp_path / "brick.pt")
    assert torch.equal(load(tmp_path / "brick.pt")(images)[1], both(images)[1])
    assert not torch.allclose(limited, both(images)[1], rtol=0.01)


def test_sums_of_version_8_have_no_limit(tmp_path, patch_model):
    """Nor when the file is written again."""
    both, images = patch_model.refit(pictures(20), **BOTH), pictures(3, seed=1)
    images[:, :, 10:40:4, 10:40] = 255  # stripes
    limited = both(images)[1]
    save(both, tmp_path / "brick.pt")
    both.members[0].limit.fill_(1e9)
    content = load_tensors(tmp_path / "brick.pt", "detector")
    del content["members"][0]["limit"]
    save_tensors(content | {"version": 8}, tmp_path / "brick.pt")
    for _ in range(2):
        earlier = load(tmp_path / "brick.pt")
        assert torch.equal(earlier(images)[1], both(images)[1])
        save(earlier, tmp_path / "brick.pt")
    assert not torch.allclose(limited, both(images)[1], rtol=0.01)


# Patch models -----------------------------------------------------------------------------------------------------

PATCHES = replace(CONFIG, height=64, width=96, l2=False, features="level", patches=PatchConfig(32, location="each"))
PLAIN = {"level": 4, "dense": False, "window": 32}


def pictures(count, seed=0):
    """Waves with some noise, all different: (N, 3, 64, 96) uint8."""
    generator = torch.Generator().manual_seed(seed)
    phase = 6.3 * torch.rand(count, 1, 1, 1, generator=generator)
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(96.0), indexing="ij")
    waves = 0.5 + 0.2 * (x / 7 + phase).sin() + 0.1 * (y / 5).cos()
    noise = 0.05 * torch.randn(count, 3, 64, 96, generator=generator)
    return (255 * (waves + noise)).clamp(0, 255).byte()


VERSION_2_IMAGES = pictures(3, seed=5)


@pytest.fixture(scope="module")
def patch_model():
    return Detector(PATCHES, [trained_network(PATCHES)]).fit(pictures(20))


DEFECTS = ((8, 70), (40, 12), (28, 80))
TWO_LEVELS = {"level": "2,3", "window": 32, "stride": 16}
NEAREST, BOTH = ({"density": density, "join": True, "level": "1,2,3"} for density in ("nearest", "both"))
JOINED = {"join": True, "level": "2"}


@pytest.mark.parametrize(
    "changes",
    [
        *({}, {"location": "shared"}, {"l2": True}, {"density": "sklearn"}),
        *(PLAIN, PLAIN | {"location": "shared"}, TWO_LEVELS, NEAREST, BOTH, JOINED, NEAREST | {"location": "shared"}),
        *(PLAIN | {"density": "nearest"}, TWO_LEVELS | {"density": "both"}),
    ],
)
def test_a_defect_is_the_maximum_of_the_map_where_it_was_drawn(patch_model, changes):
    """Images that are not square, a defect far from where height and width swapped would put it."""
    made = patch_model.refit(pictures(20), **changes)
    images = pictures(3, seed=1)
    for image, (top, left) in zip(images, DEFECTS):
        image[:, top : top + 10, left : left + 10] = torch.tensor([250, 10, 120], dtype=torch.uint8)[:, None, None]
    scores, maps = made(images)
    assert maps.shape == (3, 64, 96)
    reach = 16 if "," in str(changes.get("level")) else 10
    reach += 6 if changes == PLAIN | {"density": "nearest"} else 0  # a window of 32 px beside the defect
    for values, (top, left) in zip(maps, DEFECTS):
        y, x = divmod(int(values.argmax()), 96)
        assert abs(y + 0.5 - (top + 5)) <= reach
        assert abs(x + 0.5 - (left + 5)) <= reach
    assert torch.equal(scores, maps.amax((1, 2)).double())
    assert (scores > scores_of(made, pictures(20, seed=2)).max()).all()


def test_levels_are_standardized_by_held_out_normal_distances_and_added(patch_model):
    """The map of two levels is the sum of those of each alone, each less its mean and in its deviations."""
    train, images = pictures(20), pictures(4, seed=1)
    both = patch_model.refit(train, **TWO_LEVELS)
    expected = 0
    for number, level in enumerate(both.members[0].levels):
        alone = patch_model.refit(train, **TWO_LEVELS | {"level": str(2 + number)})
        distances = held_out("torch", projected(alone, train), False)[0]
        assert level.center == pytest.approx(distances.mean().item(), rel=1e-4)
        assert level.scale == pytest.approx(distances.std().item(), rel=1e-4)
        expected = expected + (alone(images)[1] - level.center) / level.scale
    assert torch.allclose(both(images)[1], expected.float(), rtol=1e-3, atol=1e-3)
    assert both.unit == "sum of 2 standardized Mahalanobis distances"


@pytest.mark.parametrize(
    "changes",
    [
        *({"location": "each"}, {"location": "shared"}, {"location": "auto"}, TWO_LEVELS, PLAIN | {"dims": 32}),
        *(NEAREST, BOTH, JOINED, NEAREST | {"location": "shared"}, {"density": "auto"}),
    ],
)
def test_round_trip_of_a_patch_model(tmp_path, patch_model, changes):
    one = patch_model.refit(pictures(20), **changes)
    save(one, tmp_path / "brick.pt")
    other = load(tmp_path / "brick.pt")
    images = pictures(6, seed=1)
    assert torch.equal(scores_of(one, images), scores_of(other, images))
    assert other.config == one.config == Config.from_dict(PATCHES.to_dict() | changes)
    assert [level.shared for level in other.members[0].levels] == [level.shared for level in one.members[0].levels]
    assert torch.equal(one.calibration_scores, other.calibration_scores)


@pytest.mark.parametrize(("changes", "near_zero"), [({}, 0), (NEAREST, 0), (BOTH, 1e-3)])
def test_a_map_does_not_depend_on_the_batch(patch_model, changes, near_zero):
    """near_zero: sums of standardized distances have both signs."""
    images, made = pictures(9, seed=1), patch_model.refit(pictures(20), **changes)
    together, alone = made(images)[1], maps_of(made, images)
    assert torch.allclose(together, alone, rtol=1e-3, atol=near_zero)
    one_by_one = torch.cat([made(image[None])[1] for image in images])
    assert torch.allclose(together, one_by_one, rtol=1e-3, atol=near_zero)


@pytest.mark.parametrize("changes", [None, {}, {"location": "shared"}, TWO_LEVELS, PLAIN, NEAREST, BOTH])
def test_a_detector_can_be_exported(fitted, images, patch_model, changes):
    """Tensors only: what torch.export traces gives the same scores and maps, for other images of that number."""
    made = fitted if changes is None else patch_model.refit(pictures(20), **changes)
    first, second = (images[:2], images[2:4]) if changes is None else (pictures(2, seed=1), pictures(2, seed=2))
    program = torch.export.export(made, (first,)).module()
    for found, expected in zip(program(second), made(second)):
        assert found is expected is None or torch.allclose(found, expected, rtol=1e-4)


def test_both_is_the_sum_of_standardized_distances_the_gaussians_place_by_place(patch_model):
    """No place may say too much: neither in the Gaussian's distance nor in the sum."""
    both = patch_model.refit(pictures(20), **BOTH)
    images, (member,) = pictures(4, seed=1), both.members
    images[3, :, 10:40:4, 10:40] = 255  # stripes
    gaussian, nearest = member.levels
    x = member.project(member.embed(both.prepare(images)))[0]
    assert (gaussian.center.shape, nearest.center.shape, x.shape) == ((8 * 12,), (), (4, 8 * 12, 64))
    expected = (gaussian.distances(x) - gaussian.center) / gaussian.scale
    assert gaussian.limit == 15
    gaussian.limit.fill_(9)
    assert expected[:3].max() < 9 < expected[3].max()  # no place has a greater say
    expected = expected.clamp(max=9) + (nearest.distances(x) - nearest.center) / nearest.scale
    assert member.limit == 15
    assert expected[:3].max() < 7.5 < 15 < expected[3].max()
    expected = torch.where(expected <= 7.5, expected, 15 - 15**2 / (4 * expected))
    assert torch.allclose(both(images)[1], upsample(expected.float(), gaussian.grid, 4.0), rtol=1e-3, atol=1e-3)
    assert both.unit == "sum of standardized distances: Mahalanobis distance, distance to the nearest normal embedding"
    for density, level in (("torch", gaussian), ("nearest", nearest)):
        alone = member.with_density(density)
        assert torch.equal(alone.levels[0].distances(x), level.distances(x))
        assert torch.equal(alone(both.prepare(images))[1], upsample(level.distances(x), level.grid, 4.0).float())


def test_the_nearest_normal_embedding_knows_its_image(patch_model):
    """Training images find themselves; half precision lies between."""
    made = patch_model.refit(pictures(20), **NEAREST)
    (level,), member = made.members[0].levels, made.members[0]
    x = member.project(member.embed(made.prepare(pictures(20))))[0].transpose(0, 1)
    distances = level.density.distances(x)
    windows = torch.arange(96).repeat_interleave(20)
    locations, images = level.density.nearest_at(x.flatten(0, 1), windows)
    assert torch.equal(images, torch.arange(20).repeat(96))
    assert torch.equal(locations, windows)
    assert distances.max() < 0.01 * x.norm(dim=-1).mean()
    assert made.calibration_scores.min() > distances.max()  # they leave out the image itself


@pytest.mark.parametrize("location", ["each", "shared"])
def test_the_nearest_normal_window_is_told_with_its_shift(patch_model, location):
    """An image of the training set, moved by one window, has its like there, in the image that it is made of."""
    images = pictures(20)
    made = patch_model.refit(images, **NEAREST | {"location": location}, holdout=0.5)
    kept = [image for image in range(20) if image not in member.unseen_by(made.config, 20, 0)]
    moved = torch.stack([images[kept[3]].roll((8, 8), (1, 2)), images[kept[5]].roll((-8, 8), (1, 2))])
    first, maps = made.members[0], torch.zeros(2, 64, 96)
    projected = first.project(first.embed(made.prepare(moved)))
    maps[0, 32, 48] = maps[1, 24, 32] = 1  # highest there
    assert made.nearest_windows(projected, maps).tolist() == [[kept[3], -8, -8], [kept[5], 8, -8]]
    prediction = made.predict_batch(moved, explain=True)
    assert torch.equal(prediction.windows, made.nearest_windows(projected, prediction.maps))
    assert patch_model.refit(images, location="each").predict_batch(moved, explain=True).windows is None


def test_threshold_of_a_patch_model_is_of_held_out_maxima(patch_model):
    assert patch_model.calibration_scores.shape == (20,)
    assert patch_model.threshold == conformal_threshold(patch_model.calibration_scores, 0.2)[0]
    # what the other folds have not seen is further away than what the density was fitted to
    assert (patch_model.calibration_scores > scores_of(patch_model, pictures(20))).float().mean() > 0.9


def test_a_damaged_patch_model_is_named(tmp_path, patch_model):
    path = tmp_path / "brick.pt"
    save(patch_model, path)
    content = load_tensors(path, "detector")
    for key, value in (
        ("window", 18),
        ("level", 7),
        ("location", "all"),
        ("dense", 1.5),
        ("window", 32),
        ("stride", 16),
    ):
        save_tensors(content | {"config": content["config"] | {key: value}}, path)
        with pytest.raises(InputError, match="damaged detector file"):
            load(path)


def test_the_papers_grid_fits_into_a_file(tmp_path):
    """One Gaussian for each of 57 x 57 locations: 512 dimensions would make gigabytes of them."""
    patches = PatchConfig(32, dense=False, window=32, stride=4)
    made = Detector(replace(PATCHES, height=256, width=256, level=(4,), patches=patches))
    (level,) = made.members[0].levels
    assert level.grid.shape == (57, 57)
    level.axes, level.density.mean = torch.zeros(512, level.dims), torch.zeros(57 * 57, level.dims)
    level.density.factor = torch.zeros(57 * 57, level.dims, level.dims)
    save(made, tmp_path / "brick.pt")
    assert not load(tmp_path / "brick.pt").members[0].levels[0].shared
    assert (tmp_path / "brick.pt").stat().st_size < 200e6


def test_the_untrained_baseline_has_the_kind_of_density(patch_model):
    """Also where "auto" would choose the other one for it."""
    made = patch_model.refit(pictures(20), location="auto")
    (level,) = made.members[0].levels
    other = not level.shared
    level.density = fit_density("torch", projected(made, pictures(20)), other)
    assert made.untrained().fit(pictures(20), threshold=False).members[0].levels[0].shared == other


def test_too_few_or_equal_images(patch_model):
    with pytest.raises(SettingError, match=r"brick: 5 training images, .*needs 8; take shared or auto"):
        Detector(PATCHES, [network_of(patch_model)]).fit(pictures(5))
    flat = torch.full((9, 3, 64, 96), 128, dtype=torch.uint8)
    with pytest.raises(InputError, match=r"brick: no density can be fitted: all embeddings are equal"):
        Detector(PATCHES, [network_of(patch_model)]).fit(flat)
    with pytest.raises(InputError, match=r"brick: no density can be fitted: .*at least 2 .*, got 1$"):
        Detector(CONFIG).fit(flat[:1, :, :32, :48])


def test_grad_cam_has_the_scores_of_the_detector(fitted, images):
    cam = lambda prepared: fitted.predict_prepared(prepared, explain=True)  # noqa: E731
    predictions = list(stream(fitted, images, cam))
    scores = torch.cat([prediction.scores for prediction in predictions])
    maps = torch.cat([fitted.heat(prediction) for prediction in predictions])
    assert torch.allclose(scores, scores_of(fitted, images), rtol=1e-4)
    assert maps.shape == (12, 32, 48)
    kde = fitted.refit(images, density="kde")
    prediction = kde.predict_batch(images, explain=True)
    with pytest.raises(InputError, match="kde"):
        kde.heat(prediction)


def test_a_detector_trained_by_the_script_scores_the_test_images(data, models):
    made = load(models / "brick.pt")
    test, train = load_test(data, "brick", made.config.size, 0), load_train(data, "brick", made.config.size, 0).images
    scores = scores_of(made, test.images)
    assert scores.shape == (12,)
    assert torch.isfinite(scores).all()
    assert (scores > 0).all()
    assert made.metadata["train_images"] == 8
    assert torch.allclose(scores_of(made.refit(train), test.images), scores, rtol=1e-9)


# Decisions and the Python interface -------------------------------------------------------------------------------

HELD = replace(CONFIG, holdout=0.25)  # images 0, 4 and 8 of twelve


@pytest.fixture(scope="module")
def held(images):
    return Detector(HELD, [initial_network(HELD)]).fit(images)


def test_held_out_images_are_seen_by_neither_network_nor_density(held, images):
    assert unseen_by(HELD, 12, 0).tolist() == [0, 4, 8]
    other = Detector(CONFIG, [initial_network(HELD)]).fit(images[[1, 2, 3, 5, 6, 7, 9, 10, 11]], threshold=False)
    assert torch.equal(held.calibration_scores, scores_of(other, images[[0, 4, 8]]))
    assert (held.guarantee.kind, held.guarantee.rate) == ("split", 0.25)  # the finest, of three
    with pytest.raises(SettingError, match="leave 1 to learn from"):
        Detector(replace(CONFIG, holdout=0.9), [initial_network(HELD)]).fit(images[:8])


def test_p_values_of_folds_compare_with_each_member_s_own(images):
    config = replace(CONFIG, folds=3)
    made = Detector(config, [initial_network(config, member=number) for number in range(3)]).fit(images)
    new = images[:5].flip(-1)
    count = torch.zeros(5)
    with torch.inference_mode():
        for number, one in enumerate(made.members):
            unseen, scores = (one(made.prepare(part))[0] for part in (images[number::3], new))
            count += (unseen[:, None] >= scores).sum(0)
        assert made.predict_batch(new).p_values.tolist() == pytest.approx(((1 + count) / 13).tolist())
    assert made.guarantee.kind == "cross"


def test_scores_are_standardized_by_the_calibration_scores(held, images):
    scores, normal = scores_of(held, images).numpy(), held.calibration_scores.numpy()
    assert np.allclose(held.standardized_scores(scores), (scores - normal.mean()) / normal.std(ddof=1))
    alone = Detector(replace(CONFIG, holdout=0.01), [initial_network(HELD)]).fit(images)
    assert alone.guarantee.count == 1  # which has no deviation
    assert np.array_equal(np.argsort(alone.standardized_scores(scores)), np.argsort(scores))


def test_which_images_calibration_scores_are_of(images, monkeypatch):
    monkeypatch.setattr(detector, "DENSITY_IMAGES", 6)
    one = Detector(CONFIG, [initial_network(CONFIG)]).fit(images)
    assert scored_images(one, 12).tolist() == [0, 2, 4, 6, 8, 10]
    assert len(one.calibration_scores) == 6
    assert scored_images(Detector(replace(CONFIG, folds=2)), 12).tolist() == list(range(12))
    assert scored_images(Detector(HELD), 12).tolist() == [0, 4, 8]


def test_predict_takes_paths_and_arrays_of_any_size(held, data, tmp_path):
    test = load_test(data, "brick", held.config.size, 0)
    found, expected = held.predict(test.paths), evaluate(held, test)
    assert np.allclose(found.scores, expected.scores, rtol=1e-5)
    assert np.array_equal(found.p_values, expected.p_values)
    assert np.array_equal(found.anomalous, expected.p_values <= 0.25)
    assert found.maps is None
    assert np.array_equal(held.predict([decode(path) for path in test.paths]).scores, found.scores)
    assert held.predict([]).scores.shape == (0,)
    (tmp_path / "a.png").write_text("no image")
    for wrong, words in ((tmp_path / "a.png", r"a\.png"), (np.zeros((8, 8)), r"\(H, W, 3\) uint8")):
        with pytest.raises(InputError, match=words):
            held.predict([wrong])


# Several networks -------------------------------------------------------------------------------------------------

FOLDS = replace(CONFIG, folds=3)


@pytest.fixture(scope="module")
def folds(images):
    return Detector(FOLDS, [initial_network(FOLDS, member=number) for number in range(3)]).fit(images)


def test_each_image_is_left_out_by_one_member():
    for number in range(3):
        assert all_but(unseen_by(FOLDS, 13, number), 13).tolist() == [i for i in range(13) if i % 3 != number]
    assert unseen_by(CONFIG, 13, 0).tolist() == []
    with pytest.raises(SettingError, match="brick: 5 training images make at most 2 folds of two, 3 were asked for"):
        Detector(FOLDS).fit(pictures(5)[..., :32, :48])


def test_fitting_several_members_tells_after_each(images):
    for config, expected in ((FOLDS, 3), (CONFIG, 0)):
        told = []
        networks = [initial_network(config, member=number) for number in range(config.folds)]
        Detector(config, networks).fit(images, tell=lambda told=told: told.append(1))
        assert len(told) == expected


def test_scores_are_those_of_the_members_in_deviations_of_the_images_they_have_not_seen(folds, images):
    expected, calibration = 0, torch.empty(12, dtype=torch.float64)
    for number in range(3):
        alone = Detector(CONFIG, [initial_network(FOLDS, member=number)])
        alone.fit(images[[i for i in range(12) if i % 3 != number]], threshold=False)
        unseen = scores_of(alone, images[number::3])
        calibration[number::3] = (unseen - unseen.mean()) / unseen.std()
        expected = expected + (scores_of(alone, images) - unseen.mean()) / unseen.std() / 3
    assert torch.allclose(folds.calibration_scores, calibration, rtol=1e-6, atol=1e-9)
    assert torch.allclose(scores_of(folds, images), expected, rtol=1e-6, atol=1e-9)
    assert folds.threshold == folds.calibration_scores.sort().values[11 - 1]  # the ceil(0.8 * 13)-th
    assert folds.unit == "standardized Mahalanobis distance, mean of 3 networks"


def test_members_begin_with_networks_of_their_own_the_first_as_if_alone(folds):
    weights = [member.network.head[0].weight for member in folds.untrained().members]
    assert torch.equal(weights[0], initial_network(CONFIG).head[0].weight)
    assert not torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[1], weights[2])


@pytest.mark.parametrize("config", [FOLDS, replace(PATCHES, folds=2, level=(2, 3))], ids=["images", "patches"])
def test_round_trip_of_several_networks(tmp_path, config):
    normal = pictures(20)[..., : config.height, : config.width]
    one = Detector(config).fit(normal)
    save(one, tmp_path / "brick.pt")
    other = load(tmp_path / "brick.pt")
    for (scores, maps), (expected_scores, expected_maps) in zip(stream(other, normal), stream(one, normal)):
        assert torch.equal(scores, expected_scores)
        assert maps is expected_maps is None or torch.equal(maps, expected_maps)
    assert other.config == config
    assert torch.equal(other.calibration_scores, one.calibration_scores)
    assert len(other.members) == config.folds


def test_maps_are_averaged():
    made, images = Detector(replace(PATCHES, folds=2)).fit(pictures(20)), pictures(3, seed=1)
    scores, maps = made(images)
    parts = [member(made.prepare(images)) for member in made.members]
    assert torch.allclose(maps, (parts[0][1] + parts[1][1]) / 2, atol=1e-4)
    assert torch.allclose(scores, (parts[0][0] + parts[1][0]) / 2)
    assert torch.allclose(parts[0][0], parts[0][1].amax((1, 2)).double(), atol=1e-4)


STAGES = ((False, "torch"), (True, "torch"), (True, "nearest"), (True, "both"), (False, "both"))


@pytest.mark.parametrize(
    "config",
    [FOLDS, *(replace(CONFIG, features="all", join=join, density=density) for join, density in STAGES)],
    ids=["folds", *map(str, STAGES)],
)
def test_grad_cam_of_several_networks_or_stages(images, config):
    made, new = Detector(config).fit(images), 255 - images
    prediction = made.predict_batch(new, explain=True)
    maps = made.heat(prediction)
    assert torch.allclose(prediction.scores, scores_of(made, new), rtol=1e-4, atol=1e-4)
    assert maps.shape == (12, 32, 48)
    assert maps.min() >= 0
    assert maps.max() > 0
