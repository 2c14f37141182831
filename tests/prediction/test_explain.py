"""The normal images beside a detector: which is nearest, what a panel shows, and files that do not fit."""

import math
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, contents, network_of, one_line, rows_of
from forged import of_version_2
from PIL import Image

import normals as normals_module
from config import Config, PatchConfig
from dataset import TrainSet, load_train, train_paths
from detector import Detector, initial_network, load, save
from image_ops import NOTHING_IGNORED
from normals import load_normals, save_normals
from prediction.explain import Explainer, crop
from prediction.outputs import Drawings, RowsFile
from prediction.scorer import Model, as_arrays
from reporting.overlays import encoded, region
from runtime.files import InputError, load_parts, save_tensors, write_file

NAMES = [f"{i}.png" for i in range(8)]


def train_set(images):
    return TrainSet(images, [Path(name) for name in NAMES], NOTHING_IGNORED)


def embedded(detector, images):
    """Return what images are compared by."""
    return detector.predict_batch(images, explain=True).compared.detach().numpy()


def untrained(images, **settings):
    """An untrained detector of brick, fitted to images."""
    size = dict(zip(("height", "width"), images.shape[2:]))
    config = Config("brick", backbone="mobilenet_v2", pretrained=False, **size, **settings)
    return Detector(config, [initial_network(config)]).fit(images)


@pytest.fixture(scope="module")
def patch(data, tmp_path_factory):
    """A patch model of brick at 64 pixels, its normal images as its file holds them, and as (8, 3, 64, 64)."""
    images = load_train(data, "brick", (64, 64), 0).images
    detector = untrained(images, patches=PatchConfig(patch_size=32, window=8, stride=4, sigma=2.0), level=(1,))
    path = tmp_path_factory.mktemp("patch") / "brick.normals"
    save_normals(detector, train_set(images), path)
    return detector, load_normals(path, detector), images


def panels_in(folder):
    return {str(path.relative_to(folder)) for path in contents(folder)}


# Which image is nearest -------------------------------------------------------------------------------------------


def test_the_nearest_is_that_of_a_slow_loop(patch):
    detector, normals, images = patch
    queries = torch.cat([images[[6, 1]].flip(3), 255 - images[2:4]])

    def features(image):  # 4 x 4 of stride 16
        network = network_of(detector)
        with torch.inference_mode():
            return network.features(network.normalized(image[None] / 255), (3,))[0][0].flatten().tolist()

    def angle(a, b):
        lengths = [math.sqrt(sum(x * x for x in vector)) for vector in (a, b)]
        return math.acos(min(1, sum(x * y for x, y in zip(a, b)) / lengths[0] / lengths[1]))

    known = [features(image) for image in images]
    expected = []
    for query in queries:
        angles = [angle(features(query), vector) for vector in known]
        expected.append(angles.index(min(angles)))
    assert normals.nearest(embedded(detector, queries)) == expected
    assert len(set(expected)) > 1
    assert normals.nearest(embedded(detector, images)) == list(range(8))


def test_files_of_earlier_versions_hold_the_same(detectors, tmp_path):
    """Version 1 kept no numbers: its images were the first ones."""
    source, detector = detectors / "patch/brick.normals", load(detectors / "patch/brick.pt")
    expected, content = load_normals(source, detector), of_version_2(load_parts(source, "normals"))
    path = tmp_path / "brick.normals"
    first = {name: value for name, value in content.items() if name != "numbers"} | {"version": 1}
    for earlier in (content, first):
        save_tensors(earlier, path)
        normals = load_normals(path, detector)
        assert normals.content() == expected.content() == source.read_bytes()
        with pytest.raises(InputError, match=r"brick\.normals: of an earlier version, .*; do this"):
            load_normals(path, detector, exported=True, way_out="do this")


def test_many_images_are_thinned_out_and_keep_their_colors(patch, tmp_path, monkeypatch):
    detector, _, _ = patch
    ramp = torch.linspace(0, 255, 64)
    images = torch.stack([ramp.expand(64, 64), ramp[:, None].expand(64, 64), 255 - ramp.expand(64, 64)])
    images = torch.stack([(images * (1 - 0.1 * i)).byte() for i in range(8)])
    monkeypatch.setattr(normals_module, "KEPT", 5)
    save_normals(detector, train_set(images), tmp_path / "brick.normals")
    normals = load_normals(tmp_path / "brick.normals", detector)
    numbers = [0, 1, 3, 4, 6]
    assert normals.names == [NAMES[i] for i in numbers]
    assert np.allclose(normals.embeddings, embedded(detector, images[numbers]), atol=1e-3)
    for number, i in enumerate(numbers):
        expected = images[i].permute(1, 2, 0).numpy().astype(int)
        assert np.abs(normals.image(number) - expected).mean() < 2
        assert np.abs(normals.image(number)[:, :, ::-1] - expected).mean() > 20


# What a panel shows -----------------------------------------------------------------------------------------------


def test_the_crop_holds_the_strongest_region():
    generator = np.random.default_rng(0)
    for _ in range(50):
        heat = generator.random((40, 80)).astype(np.float32)
        heat[generator.integers(40), generator.integers(80)] = 1.5
        left, top, right, bottom = crop(heat, 0.8)
        x, y, width, height = region(heat, 0.8, heat.shape)
        assert 0 <= left <= x < x + width <= right <= 80
        assert 0 <= top <= y < y + height <= bottom <= 40
        assert right - left == 2 * (bottom - top) >= 20  # the shape of the image, a quarter of it at least
    heat[:] = 1
    assert crop(heat, 0.5) == (0, 0, 80, 40)
    heat[:20, :40] = 9  # of what is above the threshold everywhere, the strong part
    assert crop(heat, 0.5) == (0, 0, 50, 25)
    heat[:] = 0
    heat[39, 0] = 0.3  # nothing is above: around the maximum
    assert crop(heat, 0.5) == (0, 30, 20, 40)


def explain(detector, normals, images, paths, target):
    """Draw panels of images (B, 3, H, W) in the files that ``target`` names; returns what the detector says of them."""
    with ThreadPoolExecutor(2) as pool, torch.inference_mode():
        prediction = detector.predict_batch(images, explain=True)
        pixels, said = images.permute(0, 2, 3, 1).numpy(), as_arrays(prediction)
        model = Model.of(detector, explain=True)
        Explainer(model, normals, target, pool).on_batch(paths, [(64, 64)] * len(paths), pixels, said)
    return prediction


def test_a_painted_defect_is_shown_next_to_the_image_without_it(patch, tmp_path):
    detector, normals, images = patch
    painted = images[[5]].clone()
    color = torch.tensor([250, 0, 250], dtype=torch.uint8)
    painted[0, :, 40:48, 10:18] = color[:, None, None]
    detector.set_false_alarm_rate(0.2)
    prediction = explain(detector, normals, painted, ["painted.png"], lambda path: f"{tmp_path}/why.png")
    assert normals.nearest(embedded(detector, painted)) == [5]
    left, top, right, bottom = crop(prediction.maps[0].numpy(), detector.threshold.item())
    assert left <= 10 < 18 <= right
    assert top <= 40 < 48 <= bottom
    drawn = np.array(Image.open(tmp_path / "why.png")).astype(int)
    x, y = 16, 2 * 28 + 2 * 16 + 22  # of the first picture; they are 360 pixels wide, 376 and 398 apart
    cells = [[drawn[y + 398 * row :, x + 376 * column :][:360, :360] for column in range(3)] for row in range(2)]
    marked = [[(np.abs(cell - color.numpy()).max(2) < 20).mean() for cell in row] for row in cells]
    zoom = (64 / (right - left)) ** 2
    assert marked[0][0] == pytest.approx(64 / 64**2, rel=0.3)
    assert marked[1][0] == pytest.approx(zoom * 64 / 64**2, rel=0.3)
    assert marked[0][1] == marked[1][1] == 0
    normal = images[5, :, top:bottom, left:right].permute(1, 2, 0).numpy()
    assert np.abs(cells[1][1] - Image.fromarray(normal).resize((360, 360), 3)).mean() < 8  # it was a JPEG file


def test_what_cannot_be_named_is_told_and_does_not_stop_the_others(patch, tmp_path, capsys):
    detector, normals, images = patch
    detector.set_false_alarm_rate(1)

    def target(path):
        if path == "taken.png":
            raise InputError("taken.png: would be drawn\nover")
        return str(tmp_path / path)

    explain(detector, normals, images[:2], ["taken.png", "free.png"], target)
    assert panels_in(tmp_path) == {"free.png"}
    assert capsys.readouterr().err.splitlines() == ["no panel: taken.png: would be drawn over"]


# The scripts ------------------------------------------------------------------------------------------------------


def test_training_keeps_the_normal_images(models, data):
    detector = load(models / "brick.pt")
    normals = load_normals(models / "brick.normals", detector)
    assert normals.names == [path.name for path in train_paths(data, "brick")]
    images = load_train(data, "brick", (32, 32), 0).images
    assert np.abs(normals.image(7) - images[7].permute(1, 2, 0).numpy().astype(int)).mean() < 12
    assert normals.nearest(embedded(detector, images)) == list(range(8))


def test_each_anomalous_image_has_a_panel(detectors, here, script):
    odd = 'a b,"\n日'
    (here / "photos/d.png").rename(here / f"photos/{odd}.png")
    words = ["predict", detectors / "whole/brick.pt", "photos", "--explain", "photos/why"]
    p_values = sorted(float(row["p_value"]) for row in rows_of(script(*words[:3]).out))
    assert p_values[0] < p_values[-1]
    for rate in (p_values[0], 1):
        done = script(*words, "--false_alarm_rate", rate)
        assert done.code == 0, done.err
        rows = rows_of(done.out)
        assert sorted(float(row["p_value"]) for row in rows) == p_values  # panels within the folder are no images of it
        names = {row["path"].removeprefix("photos/").rpartition(".")[0] for row in rows if row["anomalous"] == "1"}
        assert len(names) == sum(p <= rate for p in p_values)
        assert panels_in(here / "photos/why") == {f"{name}.png" for name in names}
    for name, size in (("a", "wide"), (odd, "upright"), ("more/a", "wide"), ("c", "narrow")):
        head = 2 * 28 + 2 * 16
        expected = {  # wide pictures are below each other
            "wide": (16 + 2 * 616, head + 3 * (300 + 22 + 16)),
            "upright": (16 + 3 * 376, head + 2 * (240 + 22 + 16)),
            "narrow": (16 + 3 * 256, head + 2 * (420 + 22 + 16)),
        }
        with Image.open(here / f"photos/why/{name}.png") as panel:
            assert (panel.format, panel.size) == ("PNG", expected[size]), name


def test_panels_are_there_before_rows(detectors, here, script, monkeypatch):
    def full(self, rows):
        raise OSError(28, "No space left on device", "out.csv")

    monkeypatch.setattr(RowsFile, "add", full)
    words = ["--explain", "why", "--false_alarm_rate", 1, "--output", "out.csv"]
    one_line(script("predict", detectors / "whole/brick.pt", "photos/more", *words), "out.csv")
    assert len(panels_in(here / "why")) == 2


def test_panels_of_images_that_are_normal_now_go(detectors, here, script):
    """At another rate, as after a --refit: of the images that are scored, and nothing but this program's panels."""
    words = ["predict", detectors / "patch/brick.pt", "photos", "--explain", "why", "--false_alarm_rate"]
    assert script(*words, 1).code == 0
    panels = contents(here / "why")
    assert len(panels) == 6
    rows = rows_of(script(*words[:3], "--false_alarm_rate", 0.2).out)
    names = {row["path"]: f"{Path(row['path']).relative_to('photos').with_suffix('.png')}" for row in rows}
    anomalous, (link, *normal) = ([names[row["path"]] for row in rows if row["anomalous"] == x] for x in "10")
    assert anomalous
    assert normal
    shutil.copy(here / "why" / link, "why/another.png")  # of no image that is scored
    (here / "why" / link).rename("kept.png")
    (here / "why" / link).symlink_to(here / "kept.png")
    done = script(*words, 0.2)
    assert done.code == 0, done.err
    assert f"{len(normal)} panels of images that are not anomalous now are gone from why" in done.err
    assert panels_in(here / "why") == {*anomalous, link, "another.png"}
    assert (here / "kept.png").read_bytes() == panels[here / "why" / link]
    assert "gone from" not in script(*words, 0.2).err


def test_a_panel_of_another_image_stays(here):
    """A normal image that would have the same name removes nothing, nor does it take the name."""
    shutil.copy("photos/b.png", "photos/a.png")
    drawings, normal, other = Drawings(None, None, "why"), ("photos/a.png", ["photos"]), ("photos/a.jpg", ["photos"])
    drawings.remove_panel(*normal)
    target = drawings.panel(*other)
    write_file(encoded(Image.new("RGB", (4, 4)), target), target)
    drawings.remove_panel(*normal)
    assert panels_in(here / "why") == {"a.png"}
    drawings.remove_panel(*other)
    assert (panels_in(here / "why"), drawings.removed) == (set(), 1)
    shutil.copy("photos/b.png", target)  # without the mark of this program
    drawings.remove_panel(*other)
    assert panels_in(here / "why") == {"a.png"}


def test_without_a_gradient_there_is_no_heat(data, here, script):
    images = load_train(data, "brick", (32, 32), 0).images
    detector = untrained(images, density="kde")
    save(detector, here / "brick.pt")
    save_normals(detector, train_set(images), here / "brick.normals")
    assert script("predict", "brick.pt", "photos/a.jpg", "--explain", "why", "--false_alarm_rate", 1).code == 0
    with Image.open(here / "why/photos/a.png") as panel:
        assert panel.size == (16 + 616, 2 * 28 + 2 * 16 + 2 * (300 + 22 + 16))


def test_files_that_do_not_fit_get_one_line(detectors, here, script):
    shutil.copytree(detectors / "whole", "models")
    words = ["predict", "models/brick.pt", "photos", "--explain", "why", "--output", "out.csv"]
    path, other = here / "models/brick.normals", here / "models/grass.normals"
    content, detector = of_version_2(load_parts(path, "normals")), load(here / "models/brick.pt")
    shutil.copy(other, path)
    one_line(script(*words), "models/brick.normals", "another detector", "--explain 1")
    for replacement, told in (
        (other.read_bytes()[:3000], "truncated, damaged or not a normals file"),
        (content | {"version": 99}, "format 99"),
        (content | {"format": "other"}, "not a file of normal images"),
    ):
        path.write_bytes(replacement) if isinstance(replacement, bytes) else save_tensors(replacement, path)
        with pytest.raises(InputError, match=rf"brick\.normals: {told}"):
            load_normals(path, detector)
    path.unlink()
    one_line(script(*words), "models/brick.normals", "no such file", "train anew with --explain 1")
    assert not (here / "out.csv").exists()
    assert not (here / "why").exists()


def test_normal_images_are_left_out_if_so_asked(detectors, here, data, script):
    shutil.copytree(detectors / "whole", "models")
    words = ["--data_dir", data, "--model_dir", "models", "--logdir", "logs", "--type", "brick", *TINY]
    done = script("run_training", *words, "--epochs", 0, "--overwrite", "--explain", 0)
    assert done.code == 0, done.err
    assert panels_in(here / "models") == {"brick.pt", "grass.pt", "grass.normals"}  # the earlier detector's went
    assert "skipped" in script("run_training", *words, "--epochs", 0).err
    assert not (here / "models/brick.normals").exists()
