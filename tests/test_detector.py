"""The detector file: what is written comes back, and whatever is wrong with it gets one line."""

import pytest
import torch

import detector
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
