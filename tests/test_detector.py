"""The detector file: what is written comes back, and whatever is wrong with it gets one line."""

import pytest
import torch

import detector
import localization
from dataset import InputError, load_test, load_train
from density import held_out_scores
from detector import Detector, initial_network, load, save

CONFIG = {
    "category": "brick",
    "backbone": "resnet18",
    "variant": "3way",
    "head_layer": 1,
    "normalize": "image",
    "height": 32,
    "width": 48,
    "density": "torch",
    "l2": True,
    "false_alarm_rate": 0.2,
    "seed": 3,
    "pretrained": False,
}


@pytest.fixture(scope="module")
def images():
    return torch.randint(0, 256, (12, 3, 32, 48), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


@pytest.fixture(scope="module")
def fitted(images):
    made = Detector(CONFIG, initial_network(CONFIG)).fit(images)
    made.made = {"command": "python run_training.py"}
    return made


@pytest.mark.parametrize("density", ["torch", "sklearn", "kde"])
def test_round_trip(tmp_path, images, density):
    config = CONFIG | {"density": density}
    one = Detector(config, initial_network(config)).fit(images)
    save(one, tmp_path / "brick.pt")
    other = load(tmp_path / "brick.pt")
    assert torch.equal(one(images), other(images))
    assert torch.equal(one.threshold, other.threshold)
    assert torch.equal(one.normal_scores, other.normal_scores)
    assert other.config == config
    assert other.size == (32, 48)
    assert not list(tmp_path.glob(".*"))


def test_saving_twice_gives_the_same_bytes(tmp_path, fitted):
    for name in ("a", "b"):
        save(fitted, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_scores_do_not_depend_on_the_batch(fitted, images):
    together = fitted(images)
    alone = torch.cat([fitted(image[None]) for image in images])
    assert torch.allclose(together, alone, rtol=1e-4)


def test_l2_brings_embeddings_to_length_one(fitted, images):
    assert torch.allclose(fitted.embed(images).norm(dim=1), torch.ones(12, dtype=torch.float64))
    plain = fitted.refit(images, l2=False)
    assert plain.embed(images).norm(dim=1).std() > 0
    assert fitted.config["l2"]
    assert not plain.config["l2"]


def test_threshold_is_the_quantile_of_held_out_normal_scores(fitted, images):
    scores = held_out_scores("torch", fitted.embed(images))
    assert fitted.threshold == scores.quantile(0.8)
    assert (scores > fitted.threshold).float().mean() <= 0.25


def test_density_is_fitted_to_an_even_sample_of_many_images(images, monkeypatch):
    monkeypatch.setattr(detector, "DENSITY_IMAGES", 70)
    many = torch.cat([images] * 20)  # 240
    many[:, 0, 0, 0] = torch.arange(240)
    chosen = [240 * i // 70 for i in range(70)]
    assert len(set(chosen)) == 70
    network = initial_network(CONFIG)
    fitted = Detector(CONFIG, network).fit(many)
    expected = Detector(CONFIG, network).fit(many[chosen])
    for name, value in expected.density.state_dict().items():
        assert torch.equal(fitted.density.state_dict()[name], value)
    assert torch.equal(fitted.normal_scores, expected.normal_scores)
    assert len(fitted.normal_scores) == 70
    assert torch.equal(fitted.embed_sample(many[:70], 70), fitted.embed(many[:70]))


def test_wrong_image_size_is_refused(fitted):
    with pytest.raises(ValueError, match=r"\(M, 3, 32, 48\)"):
        fitted(torch.zeros(1, 3, 48, 32))


def test_untrained_is_the_network_training_starts_from(fitted):
    control = fitted.untrained()
    start = initial_network(CONFIG).state_dict()
    assert all(torch.equal(value, start[name]) for name, value in control.network.state_dict().items())


def test_initial_network_depends_on_seed_and_category_and_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    weight = initial_network(CONFIG).head[0].weight
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(weight, initial_network(CONFIG).head[0].weight)
    for change in ({"seed": 4}, {"category": "grass"}):
        assert not torch.equal(weight, initial_network(CONFIG | change).head[0].weight)


def damaged(path, **changes):
    content = torch.load(path, weights_only=True)
    content.update(changes)
    torch.save(content, path)


def test_bad_files_are_named(tmp_path, fitted):
    path = tmp_path / "brick.pt"

    def fails(match):
        with pytest.raises(InputError, match=match) as caught:
            load(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)

    fails("no such file")
    save(fitted, path)
    whole = path.read_bytes()
    for length in (0, 10, 1000, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        fails("truncated, damaged or not a detector file")
    for text in ("hello", "test of a file", "X", "\x89PNG\r\n"):
        path.write_text(text)
        fails("truncated, damaged or not a detector file")
    torch.save({"weight": torch.zeros(3)}, path)
    fails("not a detector file of this project")
    save(fitted, path)
    damaged(path, version=detector.VERSION + 1)
    fails("update the program")
    save(fitted, path)
    damaged(path, config=CONFIG | {"backbone": "vgg"})
    fails("backbone is 'vgg'")
    save(fitted, path)
    damaged(path, network={})
    fails("damaged detector file")
    save(fitted, path)
    path.rename(tmp_path / "grass.pt")
    path = tmp_path / "grass.pt"
    fails("category 'brick' under another name")


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path, fitted):
    path = tmp_path / "brick.pt"
    save(fitted, path)
    before = path.read_bytes()
    (tmp_path / ".brick.pt.part").symlink_to("/dev/full")  # every write ends in "no space left on device"
    with pytest.raises(OSError, match="No space left on device") as caught:
        save(fitted, path)
    assert caught.value.filename == str(path)
    assert path.read_bytes() == before


# Patch models -----------------------------------------------------------------------------------------------------

PATCHES = CONFIG | {
    **{"height": 64, "width": 96, "l2": False, "patch_size": 32},
    **{"window": 16, "stride": 8, "level": 1, "dense": True, "location": "each", "sigma": 4.0},
}
PLAIN = {"level": 4, "dense": False, "window": 32}


def pictures(count, seed=0):
    """Waves with some noise, all different: (N, 3, 64, 96) uint8."""
    generator = torch.Generator().manual_seed(seed)
    phase = 6.3 * torch.rand(count, 1, 1, 1, generator=generator)
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(96.0), indexing="ij")
    waves = 0.5 + 0.2 * (x / 7 + phase).sin() + 0.1 * (y / 5).cos()
    noise = 0.05 * torch.randn(count, 3, 64, 96, generator=generator)
    return (255 * (waves + noise)).clamp(0, 255).byte()


@pytest.fixture(scope="module")
def patch_model():
    return Detector(PATCHES, initial_network(PATCHES)).eval().fit(pictures(20))


@pytest.mark.parametrize("changes", [{}, {"location": "shared"}, PLAIN, PLAIN | {"location": "shared"}, {"l2": True}])
def test_a_defect_is_the_maximum_of_the_map_where_it_was_drawn(patch_model, changes):
    """Images that are not square, a defect far from where height and width swapped would put it."""
    made = patch_model.refit(pictures(20), **changes).eval()
    images = pictures(3, seed=1)
    for image, (top, left) in zip(images, ((8, 70), (40, 12), (28, 80))):
        image[:, top : top + 10, left : left + 10] = torch.tensor([250, 10, 120], dtype=torch.uint8)[:, None, None]
    (scores, maps) = next(iter(made.maps(images)))
    assert maps.shape == (3, 64, 96)
    for values, (top, left) in zip(maps, ((8, 70), (40, 12), (28, 80))):
        y, x = divmod(int(values.argmax()), 96)
        assert abs(y + 0.5 - (top + 5)) <= 10
        assert abs(x + 0.5 - (left + 5)) <= 10
    assert torch.equal(scores, maps.amax((1, 2)).double())
    assert (scores > made(pictures(20, seed=2)).max()).all()


@pytest.mark.parametrize("location", ["each", "shared", "auto"])
def test_round_trip_of_a_patch_model(tmp_path, patch_model, location):
    one = patch_model.refit(pictures(20), location=location)
    save(one, tmp_path / "brick.pt")
    other = load(tmp_path / "brick.pt")
    images = pictures(6, seed=1)
    assert torch.equal(one.eval()(images), other(images))
    assert other.config == PATCHES | {"location": location}
    assert other.density.location == one.density.location
    assert torch.equal(one.normal_scores, other.normal_scores)


def test_a_map_does_not_depend_on_the_batch(patch_model):
    images = pictures(9, seed=1)
    together = torch.cat([maps for _, maps in patch_model.maps(images)])
    alone = torch.cat([maps for image in images for _, maps in patch_model.maps(image[None])])
    assert torch.allclose(together, alone, rtol=1e-3)
    assert torch.allclose(patch_model(images), together.amax((1, 2)).double())


def test_threshold_of_a_patch_model_is_the_quantile_of_held_out_maxima(patch_model):
    assert patch_model.normal_scores.shape == (20,)
    assert patch_model.threshold == patch_model.normal_scores.quantile(0.8)
    # what the other folds have not seen is further away than what the density was fitted to
    assert (patch_model.normal_scores > patch_model(pictures(20))).float().mean() > 0.9


def test_a_damaged_patch_model_is_named(tmp_path, patch_model):
    path = tmp_path / "brick.pt"
    save(patch_model, path)
    content = torch.load(path, weights_only=True)
    for key, value in (("window", None), ("level", 7), ("location", "all"), ("dense", 1.5)):
        torch.save(content | {"config": content["config"] | {key: value}}, path)
        with pytest.raises(InputError, match=f"damaged detector file \\({key} is"):
            load(path)


def test_gaussians_of_other_windows_than_the_files_are_named(tmp_path, patch_model):
    path = tmp_path / "brick.pt"
    for changes in ({"window": 18}, {"window": 32}, {"stride": 16}):
        save(patch_model, path)
        content = torch.load(path, weights_only=True)
        torch.save(content | {"config": content["config"] | changes}, path)
        with pytest.raises(InputError, match="damaged detector file"):
            load(path)


def test_the_papers_grid_fits_into_a_file(tmp_path):
    """One Gaussian for each of 57 x 57 locations: 512 dimensions would make gigabytes of them."""
    config = PATCHES | PLAIN | {"height": 256, "width": 256, "stride": 4}
    made = Detector(config, initial_network(config))
    assert made.grid.shape == (57, 57)
    dims = localization.EACH_DIMS
    made.density.projection, made.density.mean = torch.zeros(512, dims), torch.zeros(57 * 57, dims)
    made.density.factor = torch.zeros(57 * 57, dims, dims)
    save(made, tmp_path / "brick.pt")
    assert load(tmp_path / "brick.pt").density.location == "each"
    assert (tmp_path / "brick.pt").stat().st_size < 200e6


def test_the_control_of_a_patch_model_has_the_kind_of_its_density(patch_model):
    made = patch_model.refit(pictures(20), location="auto")
    assert made.untrained().fit(pictures(20), threshold=False).density.location == made.density.location
    assert made.untrained().config["location"] == made.density.location


def test_too_few_images_for_a_gaussian_each(patch_model):
    with pytest.raises(InputError, match=r"brick: 5 training images, .*needs 8; use --location shared or auto"):
        Detector(PATCHES, patch_model.network).fit(pictures(5))


def test_equal_images_fit_no_patch_density(patch_model):
    flat = torch.full((9, 3, 64, 96), 128, dtype=torch.uint8)
    with pytest.raises(InputError, match=r"brick: .*no density can be fitted"):
        Detector(PATCHES, patch_model.network).fit(flat)


def test_grad_cam_has_the_scores_of_the_detector(fitted, images):
    scores, maps = (torch.cat(parts) for parts in zip(*fitted.maps(images)))
    assert torch.allclose(scores, fitted(images), rtol=1e-4)
    assert maps.shape == (12, 32, 48)
    with pytest.raises(InputError, match="kde"):
        next(iter(fitted.refit(images, density="kde").maps(images)))


def test_a_detector_trained_by_the_script_scores_the_test_images(data, models):
    made = load(models / "brick.pt")
    test = load_test(data, "brick", made.size, 0)
    train = load_train(data, "brick", made.size, 0)
    scores = made(test.images)
    assert scores.shape == (12,)
    assert torch.isfinite(scores).all()
    assert (scores > 0).all()
    assert made.made["train_images"] == 8
    again = made.refit(train)
    assert torch.allclose(again(test.images), scores, rtol=1e-9)
