"""Files with a right checksum that cannot be: each is refused in one line that names it, and no code in one runs."""

import random
import zipfile
from functools import partial

import pytest
import torch
from conftest import SMALL, one_line, rows_of
from forged import Code, forged, forged_parts, of_version_2

from config import Config, PatchConfig
from dataset import load_train
from detector import Detector, initial_network, load, save
from normals import load_normals, normals_path
from runtime.files import InputError, load_parts, load_tensors
from training.trainer import Precision, RunOptions, Trainer, load_checkpoint

TRIED = 25  # of each kind of file; tests/faults.py tries all


def some_of(content, count=TRIED):
    forgeries = list(forged(content))
    return random.Random(0).sample(forgeries, min(count, len(forgeries)))


def refused(path, read, forgeries, write=torch.save):
    """Return the descriptions of the forgeries that are not refused."""
    accepted = []
    for words, make in forgeries:
        write(make(), path)
        try:
            read(path)
            accepted.append(words)
            continue
        except InputError as error:
            message = str(error)
        assert message.startswith((f"{path}: ", "brick: ")), words
        assert "\n" not in message, words
    return accepted


def joined(data, folder):
    """Write a detector of two stages seen together, with a Gaussian and a memory for each location."""
    patches = PatchConfig(patch_size=32, window=8, stride=8, location="each")
    small = {"height": 32, "width": 48, "pretrained": False, "backbone": "mobilenet_v2", "level": (1, 2)}
    config = Config("brick", **small, join=True, density="both", patches=patches)
    made = Detector(config, [initial_network(config)]).fit(load_train(data, "brick", (32, 48), 0).images)
    save(made, folder / "joined/brick.pt")
    return folder / "joined/brick.pt"


@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants")
@pytest.mark.parametrize("kind", ["patch", "whole", "three", "joined"])
def test_detectors(data, detectors, three, tmp_path, kind):
    source = {"three": three[0] / "brick.pt"}.get(kind, detectors / kind / "brick.pt")
    source = joined(data, tmp_path) if kind == "joined" else source
    load(source)
    accepted = refused(tmp_path / "brick.pt", load, some_of(load_tensors(source, "detector")))
    assert {*accepted} <= {"sources has another dtype"}  # of an empty one, of which nothing is taken


def test_normal_images(detectors, tmp_path):
    source, path = normals_path(detectors / "patch/brick.pt"), tmp_path / "brick.normals"
    made, parts = load(detectors / "patch/brick.pt"), load_parts(source, "normals")

    def write(parts, path, compression=zipfile.ZIP_STORED):
        with zipfile.ZipFile(path, "w", compression) as archive:
            for name, part in parts.items():
                archive.writestr(name, part)

    write(parts, path)
    load_normals(path, made)
    for exported in (False, True):
        read = lambda path: load_normals(path, made, exported)  # noqa: E731, B023
        assert refused(path, read, forged_parts(parts), write) == []
        packed = partial(write, compression=zipfile.ZIP_DEFLATED)
        assert refused(path, read, [("it is compressed", lambda: parts)], packed) == []


@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants")
def test_normal_images_of_version_2(detectors, tmp_path):
    source, path = normals_path(detectors / "patch/brick.pt"), tmp_path / "brick.normals"
    made, content = load(detectors / "patch/brick.pt"), of_version_2(load_parts(source, "normals"))
    assert refused(path, lambda path: load_normals(path, made), forged(content)) == []
    jpegs = content["jpegs"].clone()
    jpegs[-content["lengths"][-1] :] = 255
    gray = content | {"jpegs": jpegs}
    longer = content | {"lengths": [content["lengths"][0] + 1, *content["lengths"][1:]]}
    scaled = content | {"embeddings": 2 * content["embeddings"]}
    for forgery in (gray, longer, scaled):
        assert refused(path, lambda path: load_normals(path, made), [("", lambda f=forgery: f)]) == []


@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants")
def test_saved_states(data, tmp_path, train_unwritten):
    flags = (*SMALL, "--epochs", 2)
    assert train_unwritten(*flags).code == 0
    path = tmp_path / "models/brick.checkpoint"
    images, content = load_train(data, "brick", (32, 32), 0), load_tensors(path, "checkpoint")

    def read(path):
        state = load_checkpoint(path)
        options = RunOptions(torch.device("cpu"))
        Trainer(state["config"], images, options, Precision(**state["precision"]), state)

    read(path)
    parts = {name: content[name] for name in ("format", "version", "step", "seconds", "ranks", "precision", "network")}
    rest = {name: value for name, value in content.items() if name not in parts}
    forgeries = [(words, lambda make=make: make() | rest) for words, make in some_of(parts)]
    slots = {"state": content["optimizer"]["state"]}
    for words, make in some_of(slots, 40):
        if "state." in words:
            optimizer = lambda make=make: content["optimizer"] | make()  # noqa: E731
            forgeries.append((words, lambda optimizer=optimizer: content | {"optimizer": optimizer()}))
    assert refused(path, read, forgeries) == []


def test_no_code_is_run(detectors, tmp_path):
    """Neither of a detector, nor of its normal images, nor of a saved state."""
    made, marker = load(detectors / "patch/brick.pt"), tmp_path / "ran"
    content = load_tensors(detectors / "patch/brick.pt", "detector")
    readers = {"brick.pt": load, "brick.normals": lambda path: load_normals(path, made)}
    readers["brick.checkpoint"] = load_checkpoint
    for name, read in readers.items():
        for place in (*content, "more"):
            forgery = content | {place: Code(f"touch {marker}")}
            assert refused(tmp_path / name, read, [(place, lambda forgery=forgery: forgery)]) == []
    assert not marker.exists()


def test_a_network_that_gives_no_number(data, models, here, script):
    """Finite weights that are too large: no score is told."""
    content = load_tensors(models / "brick.pt", "detector")
    content["members"][0]["network"]["backbone.conv1.weight"].fill_(1e38)
    torch.save(content, here / "brick.pt")
    done = script("predict", "brick.pt", "photos", "--output", "a.csv", "--heatmaps", "heat")
    assert done.code == 1
    assert {row["error"] for row in rows_of(here / "a.csv")} == {"its score is not finite; train the detector again"}
    assert not [row for row in rows_of(here / "a.csv") if row["score"] or row["anomalous"]]
    done = script("eval", "--data_dir", data, "--model_dir", here, "--type", "brick", "--eval_dir", "Eval")
    one_line(done, "brick: 12 of 12 scores are not finite; train it again")


def test_what_a_file_says_of_itself_replaces_no_measurement(data, detectors, here, script):
    content = load_tensors(detectors / "whole/brick.pt", "detector")
    torch.save(content | {"metadata": {"image_auroc": 7, "=cmd": "=1+1"}}, here / "brick.pt")
    done = script("eval", "--data_dir", data, "--model_dir", here, "--type", "brick", "--eval_dir", "Eval")
    (row,) = rows_of(here / f"Eval/{here.name}/results.csv")
    assert done.out.startswith(f"brick AUC: {row['image_auroc']}\n")
    assert row["'=cmd"] == "'=1+1"
