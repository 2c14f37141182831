"""Test what becomes of each file: one opening, one pass of the network, a row, whatever is wrong with some of them."""

import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import contents
from PIL import Image

from conformal import FalseAlarmGuarantee
from detector import load
from prediction.inputs import list_paths
from prediction.outputs import COLUMNS, STATE, RowsFile, file_state
from prediction.scorer import BatchScores, Model, Scorer, begun_ahead
from reporting.overlays import drawn_above, region
from runtime.files import InputError
from runtime.image_files import decode, find_images, read_size


def scored(model, paths, callbacks=(), draw=None, done=()):
    """The rows of paths, by a RowsFile in memory."""
    added, sizes = [], []

    class Rows(RowsFile):
        def add(self, rows):
            added.extend(rows)

    rows = Rows("rows.csv", "csv", COLUMNS)
    rows.done = dict(done)
    rows.told = {path: (False, False, "", "") for path in rows.done}
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
        ("whole", ["--report", "r.html"], 1),
        ("whole", ["--explain", "why", "--report", "r.html"], 2),
        ("patch", ["--heatmaps", "heat", "--masks", "masks", "--explain", "why", "--report", "r.html"], 4),
        ("whole", ["--heatmaps", "heat", "--explain", "why", "--report", "r.html"], 3),
    ],
)
def test_a_photograph_is_opened_once_and_the_network_runs_once(
    detectors, here, script, monkeypatch, kind, flags, openings
):
    """Once more it is opened for each kind of drawing of its own pixels: heat map and mask, panel, region in the
    report; the latter two of images called anomalous, as these are."""
    opened, passes, open_image = Counter(), [], Image.open

    def counted(file, *args, **kwargs):
        opened[getattr(file, "name", None)] += 1  # None: a normal image, in memory
        return open_image(file, *args, **kwargs)

    def note_pass(module, inputs, _):
        if isinstance(module, torch.nn.Conv2d) and module.in_channels == 3:  # the network's first layer
            passes.append(len(inputs[0]))

    monkeypatch.setattr(Image, "open", counted)
    hook = torch.nn.modules.module.register_module_forward_hook(note_pass)
    done = script("predict", detectors / kind / "brick.pt", "photos/more", "--false_alarm_rate", 1, *flags)
    hook.remove()
    assert done.code == 0, done.err
    del opened[None]
    assert opened == {"photos/more/a.png": openings, "photos/more/e.bmp": openings}
    assert passes == [2]  # both at once
    drawings = sum(len(contents(here / flag)) for flag in flags if flag in ("heat", "masks", "why"))
    assert drawings == 2 * len({"--heatmaps", "--masks", "--explain"} & {*flags})


# Rows -------------------------------------------------------------------------------------------------------------


def test_any_function_of_a_batch_can_score(here):
    """Here the score is the mean of the red channel, above 100 the image is anomalous."""

    def predict(pixels):
        maps = pixels[..., 0].astype(np.float32)
        scores = maps.mean((1, 2), dtype=np.float64)
        return pixels, BatchScores(scores, 1 / (1 + (scores - 100).clip(0)), maps)

    at_half = FalseAlarmGuarantee("split", 1, 0.5)
    assert at_half.rate == 0.5
    heat = lambda said: said.maps  # noqa: E731
    model = Model(lambda x: x, predict, heat, (20, 30), 4, threshold=120.0, guarantee=at_half, has_maps=True)
    batches, drawn = [], {}
    paths = [*list_paths(["photos"]), "none.png"]

    def draw(path, heat, level):
        assert level == drawn_above(heat, 120.0, heat.mean() >= 101)
        drawn[path] = heat
        if path == paths[-2]:
            raise InputError(f"{path}: is in\nthe way")

    rows = scored(model, paths, [lambda *args: batches.append(args)], draw)
    assert [row["path"] for row in rows] == paths
    for row, error in zip(rows[-2:], ("is in the way", "No such file or directory")):
        state = dict(zip(STATE, (row["time"], *(file_state(row["path"]) or (None, None)))))
        assert row == dict.fromkeys(COLUMNS) | {"path": row["path"], "error": error} | state
    for row in rows[:-2]:
        red = decode(row["path"], (20, 30))[:, :, 0].astype(np.float32)
        assert row["score"] == pytest.approx(red.mean(), rel=1e-5)
        assert row["anomalous"] == (red.mean() >= 101)
        box = region(red, drawn_above(red, 120.0, red.mean() >= 101), read_size(row["path"])) or (None,) * 4
        assert (box[0] is None) == (red.mean() < 101)  # what is decided is what is drawn
        assert (row["x"], row["y"], row["width"], row["height"]) == box
        assert np.array_equal(drawn[row["path"]], red)
    assert [path for batch, *_ in batches for path in batch] == paths[:-1]
    for batch, sizes, pixels, prediction in batches:
        assert sizes == [read_size(path) for path in batch]
        assert np.array_equal(pixels, [decode(path, (20, 30)) for path in batch])
        assert len(prediction.scores) == len(batch)
    some = {row["path"]: row["score"] for row in rows[:3]}
    assert scored(model, paths, draw=draw, done=some) == rows[3:]


def test_broken_files_do_not_stop_the_others(detectors, data, here):
    """200 files, eight of them broken in as many ways; test_image_files.py tries what else may be wrong with one."""
    sources = find_images(data / "brick/train/good")
    (here / "many").mkdir()
    names = [f"many/{number:03}.png" for number in range(200)]
    for number, name in enumerate(names):
        os.link(sources[number % 8], name)
    png, nothing = sources[0].read_bytes(), "no file, or a folder that cannot be listed"
    ways = {
        7: (png[: len(png) // 2], "not a readable image (image file is truncated"),
        17: (b"", "not a readable image"),
        27: (b"no picture\n", "not a readable image"),
        37: (png[:16] + (10**6).to_bytes(4, "big") * 2 + png[24:], "not a readable image"),  # its checksum is wrong
        47: (os.mkfifo, nothing),  # would be waited for
        57: (os.mkdir, nothing),
        67: (lambda name: os.symlink(os.path.basename(name), name), "not a readable image"),
        77: (lambda name: None, "No such file or directory"),
    }
    for number, (way, _) in ways.items():
        os.unlink(names[number])
        way(names[number]) if callable(way) else (here / names[number]).write_bytes(way)
    rows = scored(Model.of(load(detectors / "whole/brick.pt"), False), names)
    assert [row["path"] for row in rows] == names
    expected = load(detectors / "whole/brick.pt").predict(sources).scores
    for number, row in enumerate(rows):
        if number not in ways:
            assert row["score"] == pytest.approx(expected[number % 8], rel=1e-5)
            continue
        assert row["error"].startswith(ways[number][1])
        assert len(row["error"].splitlines()) == 1
        assert {row[name] for name in COLUMNS[1:8]} == {None}


@pytest.mark.parametrize(("count", "taken_by_first"), [(0, [0]), (2, [0, 1, 2]), (9, [0, 1, 2, 3, 4])])
def test_so_many_batches_are_begun_before_the_first_is_waited_for(count, taken_by_first):
    taken = []

    def items():
        for number in range(5):
            taken.append(number)
            yield number

    given = begun_ahead(items(), count)
    assert next(given) == 0
    assert taken == taken_by_first
    assert [*given] == [1, 2, 3, 4]
