"""What becomes of each file: one opening, one pass of the network, a row, whatever is wrong with some of them."""

import os
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import contents
from PIL import Image

from detector import BatchPrediction, load
from prediction.inputs import list_paths
from prediction.outputs import COLUMNS, RowsFile
from prediction.scorer import Model, Scorer, in_order
from reporting.overlays import region
from runtime.image_files import decode, decode_with_size, find_images, read_size


def scored(model, paths, callbacks=(), draw=None, done=()):
    """The rows of paths, by a RowsFile in memory."""
    added, sizes = [], []

    class Rows(RowsFile):
        def add(self, rows):
            added.extend(rows)

    rows = Rows("rows.csv", "csv", COLUMNS)
    rows.done = dict(done)
    with ThreadPoolExecutor(2) as pool:
        Scorer(model, 2, draw, callbacks).score(paths, rows, pool, sizes.append)
    assert sum(sizes) == len(added)
    assert all(size <= model.batch_size for size in sizes)
    return added


# One opening, one pass --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "flags", "openings"),
    [
        ("patch", [], 1),
        ("whole", [], 1),
        ("patch", ["--explain", "why", "--report", "r.html"], 1),
        ("whole", ["--explain", "why", "--report", "r.html"], 1),
        ("patch", ["--heatmaps", "heat", "--masks", "masks", "--explain", "why", "--report", "r.html"], 2),
        ("whole", ["--heatmaps", "heat", "--explain", "why", "--report", "r.html"], 2),
    ],
)
def test_a_photograph_is_opened_once_and_the_network_runs_once(
    detectors, here, script, monkeypatch, kind, flags, openings
):
    """Once more it is opened to be drawn at its own size."""
    opened, passes, open_image = Counter(), [], Image.open

    def counted(file, *args, **kwargs):
        opened[getattr(file, "name", None)] += 1  # None: a normal image, in memory
        return open_image(file, *args, **kwargs)

    def note_pass(module, inputs, _):
        if isinstance(module, torch.nn.Conv2d) and module.in_channels == 3:  # the network's first layer
            passes.append(len(inputs[0]))

    monkeypatch.setattr(Image, "open", counted)
    hook = torch.nn.modules.module.register_module_forward_hook(note_pass)
    done = script("predict", detectors / kind / "brick.pt", "photos", "--false_alarm_rate", 1, *flags)
    hook.remove()
    assert done.code == 0, done.err
    del opened[None]
    assert opened == dict.fromkeys(list_paths(["photos"]), openings)
    assert passes == ([4, 2] if kind == "patch" else [6])
    drawings = sum(len(contents(here / flag)) for flag in flags if flag in ("heat", "masks", "why"))
    assert drawings == 6 * len({"--heatmaps", "--masks", "--explain"} & {*flags})


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("suffix", ["jpg", "tiff", "png"])
def test_pixels_and_size_of_one_opening_are_those_of_two(tmp_path, orientation, suffix):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{suffix}"
    Image.effect_noise((60, 40), 50).convert("RGB").save(path, exif=exif)
    for size in ((9, 7), None):
        pixels, file_size = decode_with_size(path, size)
        assert np.array_equal(pixels, decode(path, size))
        assert file_size == read_size(path) == ((60, 40) if orientation == 6 else (40, 60))


# Rows -------------------------------------------------------------------------------------------------------------


def test_any_function_of_a_batch_can_score(here):
    """Here the score is the mean of the red channel, above 100 the image is anomalous."""

    def predict(pixels):
        maps = pixels[:, 0].float()
        scores = maps.mean((1, 2)).double()
        return BatchPrediction(scores, 1 / (1 + (scores - 100).clamp(0)), maps)

    heat = lambda prediction: prediction.maps.numpy()  # noqa: E731
    model = Model(lambda x: x, predict, heat, (20, 30), 4, threshold=120.0, rate=0.5, has_maps=True)
    batches, drawn = [], {}
    paths = [*list_paths(["photos"]), "none.png"]
    rows = scored(model, paths, [lambda *args: batches.append(args)], drawn.__setitem__)
    assert [row["path"] for row in rows] == paths
    assert rows[-1] == dict.fromkeys(COLUMNS) | {"path": "none.png", "error": "No such file or directory"}
    for row in rows[:-1]:
        red = decode(row["path"], (20, 30))[:, :, 0].astype(np.float32)
        assert row["score"] == pytest.approx(red.mean(), rel=1e-5)
        assert row["anomalous"] == (red.mean() >= 101)
        box = region(red, 120.0, read_size(row["path"])) or (None,) * 4
        assert (row["x"], row["y"], row["width"], row["height"]) == box
        assert np.array_equal(drawn[row["path"]], red)
    assert [path for batch, *_ in batches for path in batch] == paths[:-1]
    for batch, sizes, pixels, prediction in batches:
        assert sizes == [read_size(path) for path in batch]
        assert np.array_equal(pixels.permute(0, 2, 3, 1), [decode(path, (20, 30)) for path in batch])
        assert len(prediction.scores) == len(batch)
    some = {row["path"]: row["score"] for row in rows[:3]}
    assert scored(model, paths, done=some) == rows[3:]


def broken_contents(png, gray):
    """What is no image, in many ways."""
    claim = bytearray(png)
    claim[16:24] = (1_000_000).to_bytes(4, "big") * 2
    claim[29:33] = zlib.crc32(claim[12:29]).to_bytes(4, "big")
    yield from (claim, png[: len(png) // 2], b"", b"no picture\n", b"x", png[:8], png[:60], png[:-40])
    yield from (png[:41] + bytes(len(png) - 41), b"GIF89a" + bytes(90), b"\0" * 5000)
    for kind in ("jpeg", "tiff", "bmp", "webp"):
        gray.save(f"gray.{kind}")
        with open(f"gray.{kind}", "rb") as file:
            content = file.read()
        yield from (content[:20], content[: len(content) // 2])
        if kind == "bmp":
            yield content[:18] + b"\xff\xff\x0f\x00" * 2 + content[26:]
    Image.fromarray(np.full((8, 8), np.nan, np.float32)).save("nan.tiff")
    with open("nan.tiff", "rb") as file:
        yield file.read()


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_broken_files_do_not_stop_the_others(detectors, data, here):
    """500 files, 25 of them broken in as many ways."""
    sources = find_images(data / "brick/train/good")
    (here / "many").mkdir()
    names = [f"many/{number:03}.png" for number in range(500)]
    for number, name in enumerate(names):
        os.link(sources[number % 8], name)
    not_images = [*broken_contents(sources[0].read_bytes(), Image.open(sources[0]).convert("L"))]
    makers = [os.mkfifo, os.mkdir, lambda name: os.symlink(name, name), lambda name: None]  # a fifo would be waited for
    broken = names[7::20]
    for name, way in zip(broken, not_images + makers, strict=True):
        os.unlink(name)
        way(name) if callable(way) else (here / name).write_bytes(way)
    rows = scored(Model.of(load(detectors / "whole/brick.pt"), False), names)
    assert [row["path"] for row in rows] == names
    errors = {row["path"]: row["error"] for row in rows if row["error"]}
    assert [*errors] == broken
    for row in rows:
        if row["error"]:
            assert {row[name] for name in COLUMNS[1:-1]} == {None}
            assert len(row["error"].splitlines()) == 1
    reasons = ["claims 1000000x1000000 pixels", "not a readable image (image file is truncated", "not a readable image"]
    for error, reason in zip(errors.values(), reasons):
        assert error.startswith(reason)
    assert [*errors.values()][-4:-2] == 2 * ["no file, or a folder that cannot be listed"]
    assert errors[broken[-1]] == "No such file or directory"
    scores = np.array([np.nan if row["score"] is None else row["score"] for row in rows] + 4 * [np.nan]).reshape(-1, 8)
    assert np.isfinite(scores).sum() == 475
    assert np.allclose(np.nanmin(scores, 0), np.nanmax(scores, 0), rtol=1e-5)
    expected = load(detectors / "whole/brick.pt").predict(sources).scores
    assert np.allclose(np.nanmin(scores, 0), expected, rtol=1e-5)


def test_work_is_done_in_order_and_not_too_far_ahead():
    started = []
    with ThreadPoolExecutor(3) as pool:
        results = in_order(pool, lambda item: (started.append(item), item)[1], range(100), ahead=5)
        for number, result in enumerate(results):
            assert result == number
            assert max(started) <= number + 5
            if number == 50:
                results.close()
                break
    assert max(started) <= 56
