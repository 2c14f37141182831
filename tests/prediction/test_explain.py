"""The normal images beside a detector: which is nearest, what a panel shows, and files that do not fit."""

import csv
import io
import math
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, network_of, one_line
from PIL import Image

import normals as explain
from config import Config, PatchConfig
from dataset import TrainSet, load_train, train_paths
from detector import Detector, initial_network, load, save
from image_ops import NOTHING_IGNORED
from normals import compared, load_normals, normals_path, save_normals
from prediction.explain import Explainer, crop
from prediction.outputs import RowsFile
from reporting.overlays import region
from runtime.files import InputError, load_tensors, save_tensors
from runtime.image_files import find_images

NAMES = [f"{i}.png" for i in range(8)]


def train_set(images):
    return TrainSet(images, [Path(name) for name in NAMES], NOTHING_IGNORED)


def embedded(made, images):
    prediction = made.predict_batch(images, explain=True)
    return compared(prediction.features[0][made.comparison_level])


@pytest.fixture(scope="module")
def patch(data, tmp_path_factory):
    """A patch model of brick at 64 pixels with its file of normal images; detector, normals, images (8, 3, 64, 64)."""
    patches = PatchConfig(patch_size=32, window=8, stride=4, sigma=2.0)
    config = Config("brick", height=64, width=64, pretrained=False, patches=patches)
    images = load_train(data, "brick", (64, 64), 0).images
    made = Detector(config, [initial_network(config)]).fit(images)
    path = tmp_path_factory.mktemp("patch") / "brick.pt"
    save_normals(made, train_set(images), normals_path(path))
    save(made, path)
    made = load(path)
    return made, load_normals(normals_path(path), made), images


@pytest.fixture
def here(models, data, tmp_path, monkeypatch):
    """The working folder: own/ with the detectors, photos/ with odd names, some in a sub-folder."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(models, "own")
    (tmp_path / "photos/more").mkdir(parents=True)
    sources = [path for kind in ("good", "hole", "scratch") for path in find_images(data / "brick/test" / kind)]
    for name, source in zip(['a b,".png', "b.jpg", "more/c.png", "more/d.png", "e.png", "f\n日.png"], sources[::-1]):
        Image.open(source).convert("RGB").resize((60, 30)).save(tmp_path / "photos" / name)
    return tmp_path


def keep_untrained(data, folder, **settings):
    """An untrained detector of brick with its normal images, in the place of the one in a folder."""
    config = Config("brick", pretrained=False, **settings)
    images = load_train(data, "brick", (config.height, config.width), 0).images
    made = Detector(config, [initial_network(config)]).fit(images)
    save(made, folder / "brick.pt")
    save_normals(made, train_set(images), folder / "brick.normals")


def rows_of(done):
    assert done.code == 0, done.err
    return list(csv.DictReader(io.StringIO(done.out, newline="")))


def panels_of(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


# Which image is nearest -------------------------------------------------------------------------------------------


def test_the_nearest_is_that_of_a_slow_loop(patch):
    made, normals, images = patch
    queries = torch.cat([images[[6, 1]].flip(3), 255 - images[2:4]])

    def features(image):  # 4 x 4 of stride 16
        with torch.inference_mode():
            return (
                made.members[0]
                .network.features(network_of(made).normalized(image[None] / 255), (3,))[0][0]
                .flatten()
                .tolist()
            )

    def angle(a, b):
        lengths = [math.sqrt(sum(x * x for x in one)) for one in (a, b)]
        return math.acos(min(1, sum(x * y for x, y in zip(a, b)) / lengths[0] / lengths[1]))

    known = [features(image) for image in images]
    expected = []
    for query in queries:
        angles = [angle(features(query), own) for own in known]
        expected.append(angles.index(min(angles)))
    assert normals.nearest(embedded(made, queries)) == expected
    assert len(set(expected)) > 1
    assert normals.nearest(embedded(made, images)) == list(range(8))


def test_many_images_are_thinned_out_and_keep_their_colors(patch, tmp_path, monkeypatch):
    made, _, _ = patch
    ramp = torch.linspace(0, 255, 64)
    images = torch.stack([ramp.expand(64, 64), ramp[:, None].expand(64, 64), 255 - ramp.expand(64, 64)])
    images = torch.stack([(images * (1 - 0.1 * i)).byte() for i in range(8)])
    monkeypatch.setattr(explain, "KEPT", 5)
    save_normals(made, train_set(images), tmp_path / "brick.normals")
    found = load_normals(tmp_path / "brick.normals", made)
    kept = [0, 1, 3, 4, 6]
    assert found.names == [NAMES[i] for i in kept]
    assert torch.allclose(found.embeddings, embedded(made, images[kept]), atol=1e-3)
    for number, i in enumerate(kept):
        expected = images[i].permute(1, 2, 0).numpy().astype(int)
        assert np.abs(found.image(number) - expected).mean() < 2
        assert np.abs(found.image(number)[:, :, ::-1] - expected).mean() > 20


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


def test_a_painted_defect_is_shown_next_to_the_image_without_it(patch, tmp_path):
    made, normals, images = patch
    painted = images[[5]].clone()
    color = torch.tensor([250, 0, 250], dtype=torch.uint8)
    painted[0, :, 40:48, 10:18] = color[:, None, None]
    Image.fromarray(painted[0].permute(1, 2, 0).numpy()).save(tmp_path / "painted.png")
    made.set_false_alarm_rate(0.2)
    with torch.inference_mode():
        judged = made.predict_batch(painted)
    assert normals.nearest(embedded(made, painted)) == [5]
    left, top, right, bottom = crop(judged.maps[0].numpy(), made.threshold.item())
    assert left <= 10 < 18 <= right
    assert top <= 40 < 48 <= bottom
    with ThreadPoolExecutor(1) as pool:
        Explainer(made, normals, lambda path: f"{tmp_path}/why.png", pool).on_batch(
            [str(tmp_path / "painted.png")], painted, judged
        )
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
    made, normals, images = patch
    made.set_false_alarm_rate(1)
    paths = [str(tmp_path / name) for name in ("gone.png", "there.png")]
    Image.new("RGB", (30, 90)).save(paths[1])
    with ThreadPoolExecutor(2) as pool, torch.inference_mode():
        explainer = Explainer(made, normals, lambda path: path.replace(".png", "-why.png"), pool)
        explainer.on_batch(paths, images[:2], made.predict_batch(images[:2]))
    assert panels_of(tmp_path) == {"there.png", "there-why.png"}
    assert f"no panel: {paths[0]}: No such file" in capsys.readouterr().err


# The scripts ------------------------------------------------------------------------------------------------------


def test_training_keeps_the_normal_images(models, data):
    made = load(models / "brick.pt")
    found = load_normals(models / "brick.normals", made)
    assert found.names == [path.name for path in train_paths(data, "brick")]
    images = load_train(data, "brick", (32, 32), 0).images
    assert np.abs(found.image(7) - images[7].permute(1, 2, 0).numpy().astype(int)).mean() < 12
    assert found.nearest(embedded(made, images)) == list(range(8))


def test_each_anomalous_image_has_a_panel(here, data, script):
    # The score does not change with the length of an embedding, so that Grad-CAM sums to zero over the last stage,
    # before what is negative is cut: at 32 pixels that is one feature, and rounding says whether there is any heat
    keep_untrained(data, here / "own", height=64, width=64)
    words = ["predict", "own/brick.pt", "photos", "--explain", "photos/why"]
    p_values = sorted(float(row["p_value"]) for row in rows_of(script(*words[:3])))
    for rate in (p_values[0], 1):
        rows = rows_of(script(*words, "--false_alarm_rate", rate))
        assert len(rows) == 6  # panels within the folder are no images of it
        below = {row["path"].removeprefix("photos/").rpartition(".")[0] for row in rows if row["anomalous"] == "1"}
        assert panels_of(here / "photos/why") == {f"{name}.png" for name in below}
        assert len(below) == sum(p <= rate for p in p_values)
    assert p_values[0] < p_values[-1]
    assert sorted(float(row["p_value"]) for row in rows) == p_values
    with Image.open(here / "photos/why/more/c.png") as panel:  # those of wide images are below each other
        assert panel.format == "PNG"
        assert panel.size == (16 + 2 * 616, 2 * 28 + 2 * 16 + 3 * (300 + 22 + 16))


def test_panels_are_there_before_rows(here, script, monkeypatch):
    def full(self, rows):
        raise OSError(28, "No space left on device", "out.csv")

    monkeypatch.setattr(RowsFile, "add", full)
    words = ["--explain", "why", "--false_alarm_rate", 1, "--output", "out.csv"]
    one_line(script("predict", "own/brick.pt", "photos", *words), "out.csv")
    assert len(panels_of(here / "why")) == 6


def test_panels_of_several_categories_and_names_in_the_way(here, script):
    shutil.copytree(here / "photos", here / "all/brick")
    shutil.copytree(here / "photos/more", here / "all/grass")
    words = ["predict", "--model_dir", "own", "all", "--false_alarm_rate", 1]
    rows_of(script(*words, "--explain", "why"))
    assert len(panels_of(here / "why")) == 8
    assert {"brick/more/c.png", "grass/c.png"} < panels_of(here / "why")
    words = ["predict", "own/brick.pt", "photos", "--explain"]
    one_line(script(*words, "photos"), "would be drawn of it")
    before = shutil.copy(here / "photos/e.png", here / "photos/c.png").read_bytes()
    one_line(script(*words[:2], "photos/more", "--explain", "photos"), "photos/c.png: is there already")
    assert (here / "photos/c.png").read_bytes() == before
    one_line(script(*words, "why", "--heatmaps", "why"), "a folder of its own")


def test_without_a_gradient_there_is_no_heat(here, data, script):
    keep_untrained(data, here / "own", height=32, width=32, density="kde")
    rows_of(script("predict", "own/brick.pt", "photos/e.png", "--explain", "why", "--false_alarm_rate", 1))
    with Image.open(here / "why/photos/e.png") as panel:
        assert panel.size == (16 + 616, 2 * 28 + 2 * 16 + 2 * (300 + 22 + 16))


def test_files_that_do_not_fit_get_one_line(here, script):
    words = ["predict", "own/brick.pt", "photos", "--explain", "why", "--output", "out.csv"]
    own, other = here / "own/brick.normals", here / "own/grass.normals"
    content = load_tensors(own, "normals")
    shutil.copy(other, own)
    one_line(script(*words), "own/brick.normals", "another detector", "--explain 1")
    made = load(here / "own/brick.pt")
    own.write_bytes(other.read_bytes()[:3000])
    with pytest.raises(InputError, match=r"brick\.normals: truncated, damaged or not a normals file"):
        load_normals(own, made)
    save_tensors(content | {"version": 99}, own)
    with pytest.raises(InputError, match=r"brick\.normals: format 99"):
        load_normals(own, made)
    save_tensors(content | {"format": "other"}, own)
    with pytest.raises(InputError, match=r"brick\.normals: not a file of normal images"):
        load_normals(own, made)
    own.unlink()
    one_line(script(*words), "own/brick.normals", "no such file", "train anew with --explain 1")
    assert not (here / "out.csv").exists()
    assert not (here / "why").exists()


def test_normal_images_are_left_out_if_so_asked(here, data, script):
    words = ["--data_dir", data, "--model_dir", "own", "--logdir", "logs", "--type", "brick", *TINY]
    done = script("run_training", *words, "--epochs", 0, "--overwrite", "--explain", 0)
    assert done.code == 0, done.err
    assert panels_of(here / "own") == {"brick.pt", "grass.pt", "grass.normals"}  # those of the earlier detector went
    assert "skipped" in script("run_training", *words, "--epochs", 0).err
    assert not (here / "own/brick.normals").exists()
