"""export.py: a graph decides as its detector, whatever that is made of; what is altered or does not belong is told."""

import json
import lzma
import shutil
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from conftest import ROOT, needs_export, one_line
from forged import of_version_2
from test_detector import VERSION_2_IMAGES

from config import Config, PatchConfig
from dataset import load_train
from detector import Detector, initial_network, load, save
from image_ops import fill_index_of
from normals import load_normals
from prediction import exporting
from prediction.exported import Exported, digest, open_session, probe_images
from runtime.files import InputError, load_parts, save_tensors

pytestmark = needs_export
SIZE = (32, 48)
SMALL = Config(
    "brick",
    height=32,
    width=48,
    pretrained=False,
    backbone="mobilenet_v2",
    features="level",
    level=(1,),
    false_alarm_rate=0.2,
)
PATCH = replace(SMALL, patches=PatchConfig(32, window=8, stride=4, sigma=2.0, location="shared"))
JOINED = replace(SMALL, level=(1, 2, 3), join=True, patches=PatchConfig(32, window=8, stride=8, location="each"))
KINDS = {
    "image-level": replace(SMALL, backbone="resnet18", level=(4,), normalize="image"),
    "both, several stages": replace(SMALL, density="both", level=(1, 2), l2=True),
    "kde, folds": replace(SMALL, density="kde", folds=2),
    "held out": replace(SMALL, holdout=0.4),
    "patch": replace(PATCH, backbone="resnet18", normalize="image", density="sklearn"),
    "patch, each window alone": replace(PATCH, patches=replace(PATCH.patches, window=16, stride=8, dense=False)),
    "patch, nearest, folds": replace(PATCH, density="nearest", folds=2),
    "joined": replace(JOINED, density="both", l2=True),
    "ignored": replace(PATCH, density="both"),
}


KEEP_WINDOWS = ("nearest", "both")  # densities of patch models


@pytest.fixture(scope="module")
def images(data):
    """Images of three textures: those of one are so alike that some would be nearer to each other than rounding."""
    return torch.cat([load_train(data, name, SIZE, 0).images for name in ("brick", "grass", "gravel")])


def fitted(config, images, hidden=False):
    """An untrained detector whose BatchNorm knows the images: its features have the size of trained ones."""
    networks = [initial_network(config, member=number) for number in range(config.folds)]
    for network in networks:
        for module in network.modules():
            if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                module.momentum = None  # the mean of all batches, here of one
        with torch.no_grad():
            network.train()(images.float() / 255)
    ignored = torch.zeros(SIZE, dtype=torch.bool)
    ignored[4:15, 20:40] = True
    extra = (fill_index_of(ignored),) if hidden else ()
    return Detector(config, networks, *extra).fit(images)


@pytest.fixture(scope="module")
def traced(images):
    """A detector of a kind and its graph, made once; it says what panels need, too."""

    @cache
    def call(kind):
        made = fitted(KINDS[kind], images, hidden=kind == "ignored")
        return made, exporting.graph_of(made, 18, True)

    return call


def opened(detector, graph=None):
    """A detector's graph, in ONNX Runtime."""
    graph = exporting.graph_of(detector, 18) if graph is None else graph
    path = Path("here.onnx")
    facts = exporting.facts_of(detector, b"", normals=detector.normals_digest)
    return Exported(path, open_session(path, graph, 1), facts)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "held out"])
def test_a_graph_decides_as_its_detector(kind, images, traced):
    made, graph = traced(kind)
    exported = opened(made, graph)
    exported.check()
    comparison = exporting.compare(made, exported, images, lambda count: None)
    assert comparison.fits, comparison.words()
    other = torch.from_numpy(probe_images(SIZE)).permute(0, 3, 1, 2)
    comparison = exporting.compare(made, exported, torch.cat([other, other.flip(3)]), lambda count: None)
    assert comparison.fits, comparison.words()
    assert comparison.count == 8
    # In numbers, and an image alone as among others
    expected, answers = made.predict_batch(other), exported.run(probe_images(SIZE))
    assert np.allclose(answers.scores, expected.scores, rtol=1e-4)
    assert np.array_equal(answers.p_values, expected.p_values.float())
    assert (answers.maps is None) == (expected.maps is None)
    if answers.maps is not None:
        assert np.allclose(answers.maps, expected.maps, atol=1e-4 * float(expected.scores.abs().max()))
    alone = exported.run(probe_images(SIZE)[1:2])
    assert np.allclose(alone.scores, answers.scores[1:2], rtol=1e-5)
    # What panels need
    with torch.inference_mode():
        explained = made.predict_batch(other, explain=True)
    assert answers.compared.shape == (4, exported.compared_width) == (4, made.compared_width)
    assert np.allclose(answers.compared, explained.compared, atol=1e-5)
    assert np.allclose(alone.compared, answers.compared[1:2], atol=1e-6)
    assert (answers.windows is None) == (explained.windows is None)
    keeps = made.config.patches is not None and made.config.density in KEEP_WINDOWS
    assert (answers.windows is not None) == keeps
    if answers.windows is not None:
        assert np.array_equal(answers.windows, explained.windows)
        assert np.array_equal(alone.windows, answers.windows[1:2])


def test_a_score_on_the_threshold_is_told_from_a_changed_decision(images):
    """The networks of folds score their calibration images as they did: rounding alone says which side they are on."""
    made = fitted(KINDS["held out"], images)
    scores = made(images)[0]
    rank = int((made.calibration_scores[:, None] >= scores).sum(0).min())
    made.set_false_alarm_rate((rank + 1) / (len(made.calibration_scores) + 1))
    exported = opened(made, exporting.graph_of(made, 18))
    run = exported.run
    top = made.calibration_scores.max().float().item()

    def nudged(factor):
        def answers(batch):
            given = run(batch)
            p = (1 + (made.calibration_scores[:, None] >= torch.from_numpy(given.scores * factor)).sum(0)).float()
            return given._replace(
                scores=given.scores * factor, p_values=(p / (1 + len(made.calibration_scores))).numpy()
            )

        return answers

    image = images[int((scores - top).abs().argmin())][None]
    for factor, fits in ((1 + 5e-5, True), (1 - 5e-5, True), (0.9, False)):
        exported.run = nudged(factor)
        comparison = exporting.compare(made, exported, image, lambda count: None)
        assert comparison.fits == fits, (factor, comparison.words())


def test_a_detector_of_version_2_is_exported(tmp_path, script):
    path = tmp_path / "brick.pt"
    path.write_bytes(lzma.decompress((ROOT / "tests/detector_version_2.pt.xz").read_bytes()))
    made = load(path)
    comparison = exporting.compare(made, opened(made), VERSION_2_IMAGES, lambda count: None)
    assert comparison.fits, comparison.words()


# The script -------------------------------------------------------------------------------------------------------


@pytest.fixture
def made(exported) -> SimpleNamespace:
    """The files of patch and image-level detectors of brick; read only."""
    return SimpleNamespace(whole=exported / "whole/brick.onnx", patch=exported / "patch/brick.onnx")


@pytest.fixture
def copied(made, tmp_path) -> Path:
    """A copy of an exported patch model, to be altered."""
    for path in (made.patch, made.patch.with_suffix(".json")):
        shutil.copy(path, tmp_path / f"b{path.suffix}")
    return tmp_path / "b.onnx"


def test_the_facts_are_those_of_the_detector(made, detectors):
    for kind in ("whole", "patch"):
        detector, exported = load(detectors / kind / "brick.pt"), Exported.open(getattr(made, kind), 1)
        facts = exported.facts
        assert exported.size == (32, 48)
        assert exported.threshold == detector.threshold.item()
        assert np.float32(exported.rate) == np.float32(detector.guarantee.rate)
        assert facts["calibration_scores"] == detector.calibration_scores.sort().values.tolist()
        assert facts["score_unit"] == detector.unit
        assert facts["has_maps"] == (kind == "patch")
        assert Config.from_dict(facts["config"]) == detector.config
        assert torch.equal(torch.tensor(facts["appearance"]), detector.appearance)
        assert facts["detector"] == digest((detectors / kind / "brick.pt").read_bytes())
        assert facts["ignore"] is None


def test_a_file_checks_without_torch(made):
    """As on a computer of the line: no module of torch is there."""
    program = (
        "import runpy, sys; sys.path.insert(0, sys.argv[1])\n"
        "for name in ('torch', 'torchvision', 'scipy', 'sklearn', 'onnx'): sys.modules[name] = None\n"
        "sys.argv = ['export.py', '--check', sys.argv[2]]\n"
        "runpy.run_path('export.py', run_name='__main__')"
    )
    command = [sys.executable, "-c", program, ROOT, made.patch]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "digests agree" in done.stdout
    assert "those of the exporting machine" in done.stdout


def test_check_compares_with_the_detector(made, detectors, data, script):
    done = script("export", "--check", made.patch)
    assert done.code == 0, done.err
    assert "digests agree" in done.out
    assert "those of the exporting machine; largest difference " in done.out
    done = script("export", "--check", made.patch, detectors / "patch/brick.pt", data / "brick/test")
    assert done.code == 0, done.err
    assert "decisions that differ: 0" in done.out
    # The training images that are kept beside the detector, where there is no folder of images
    done = script("export", "--check", made.patch, detectors / "patch/brick.pt", "--data_dir", "nowhere")
    assert done.code == 0, done.err
    assert ": 8 images" in done.out


def altered(path: Path, change, signed: bool) -> None:
    """Change a graph; signed: and the digest in its .json, as who does it on purpose would."""
    model = onnx.load(path)
    change(model.graph)
    path.write_bytes(model.SerializeToString())
    if signed:
        rewrite(path.with_suffix(".json"), sha256=digest(path.read_bytes()))


def rewrite(path: Path, **changes) -> None:
    facts = json.loads(path.read_bytes()) | changes
    path.write_text(json.dumps({name: value for name, value in facts.items() if value is not ...}))


def alter_a_weight(graph):
    """Make one weight of a convolution in the middle a little larger."""
    weights = [x for x in graph.initializer if "weight" in x.name and len(x.dims) == 4]
    weight = weights[len(weights) // 2]
    values = onnx.numpy_helper.to_array(weight).copy()
    values[0, 0, 0, 0] += 0.01 + 0.1 * abs(values).max()
    weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))


@pytest.mark.parametrize("signed", [False, True])
def test_a_graph_with_one_weight_altered_is_caught(copied, script, detectors, data, signed):
    altered(copied, alter_a_weight, signed)
    words = ("test patterns",) if signed else ("sha256",)
    one_line(script("export", "--check", copied), "b.onnx", *words)
    if signed:  # even by who has altered what the patterns should give, too
        exported = Exported.open(copied, 1)
        probe = exported.probe()
        rewrite(
            copied.with_suffix(".json"), probe={name: getattr(probe, name).tolist() for name in ("scores", "p_values")}
        )
        assert script("export", "--check", copied).code == 0
        done = script("export", "--check", copied, detectors / "patch/brick.pt", "--data_dir", data)
        one_line(done, "b.onnx", "brick.pt", "largest relative difference")


@pytest.mark.parametrize("axes", [[0, 1], [1]])
def test_a_graph_that_compares_normal_images_by_something_else_is_told(made, detectors, script, tmp_path, axes):
    """By one number, or by one for each image."""

    def change(graph):
        (node,) = (node for node in graph.node if "compared" in node.output)
        node.output[:] = ["before"]
        graph.initializer.append(onnx.helper.make_tensor("axes", onnx.TensorProto.INT64, [len(axes)], axes))
        graph.node.append(onnx.helper.make_node("ReduceMax", ["before", "axes"], ["compared"], keepdims=0))
        (output,) = (output for output in graph.output if output.name == "compared")
        output.CopyFrom(onnx.helper.make_tensor_value_info("compared", onnx.TensorProto.FLOAT, ["B"][: 2 - len(axes)]))

    path = tmp_path / "b.onnx"
    for suffix in (".onnx", ".json"):
        shutil.copy(made.whole.with_suffix(suffix), path.with_suffix(suffix))
    altered(path, change, signed=True)
    shutil.copy(detectors / "whole/brick.normals", tmp_path / "b.normals")
    done = script("predict", path, tmp_path, "--explain", tmp_path / "why")
    one_line(done, "b.onnx: is no detector" if axes == [1] else "b.normals: damaged")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format": "other"}, ("b.json", "not of an exported detector")),
        ({"version": 3}, ("b.json", "format 3, this program reads 2")),
        ({"normals": 7}, ("b.json", "normals")),
        ({"normals": "of another graph"}, ("b.onnx", "no detector")),
        ({"threshold": None}, ("b.json", "threshold")),
        ({"rate": 2}, ("b.json", "rate")),
        ({"calibration_scores": [2, 1]}, ("b.json", "calibration_scores")),
        ({"size": ...}, ("b.json", "size")),
        ({"size": [64, 64]}, ("b.onnx", "64, 64")),
        ({"has_maps": False}, ("b.onnx", "no detector")),
        ({"sha256": "0"}, ("b.onnx", "b.json", "sha256")),
    ],
)
def test_facts_that_do_not_fit_are_told(copied, script, changes, words):
    rewrite(copied.with_suffix(".json"), **changes)
    one_line(script("export", "--check", copied), *words)


def of_opset(path: Path, opset: int) -> bytes:
    """A graph that says it is of another version of ONNX's operators."""
    model = onnx.load(path)
    model.opset_import[0].version = opset
    return model.SerializeToString()


def test_files_that_are_no_exported_detector_are_told(copied, made, script, tmp_path):
    one_line(script("export", "--check", tmp_path / "none.onnx"), "none.onnx", "no such file")
    copied.write_bytes(b"no graph")
    rewrite(copied.with_suffix(".json"), sha256=digest(b"no graph"))
    one_line(script("export", "--check", copied), "b.onnx", "cannot load it")
    rewrite(copied.with_suffix(".json"), sha256=digest(newer := of_opset(made.patch, 99)))
    copied.write_bytes(newer)
    one_line(script("export", "--check", copied), "b.onnx", "cannot load it", "99")
    rewrite(copied.with_suffix(".json"), sha256=digest(other := made.whole.read_bytes()))
    copied.write_bytes(other)
    one_line(script("export", "--check", copied), "b.onnx", "is no detector of its .json file")
    copied.with_suffix(".json").write_text("{")
    one_line(script("export", "--check", copied), "b.json", "not of an exported detector")
    copied.with_suffix(".json").unlink()
    one_line(script("export", "--check", copied), "b.json", "no such file")


def test_another_detector_is_told(copied, made, detectors, script, tmp_path):
    one_line(script("export", "--check", copied, detectors / "patch/grass.pt"), "grass.pt", "category brick, not grass")
    one_line(script("export", "--check", copied, detectors / "whole/brick.pt"), "brick.pt", "sha256")
    larger = fitted(replace(PATCH, height=64, width=64), torch.randint(0, 256, (8, 3, 64, 64), dtype=torch.uint8))
    save(larger, tmp_path / "brick.pt")
    one_line(script("export", "--check", copied, tmp_path / "brick.pt"), "size 48x32, not 64x64")


def test_wrong_images_are_told(made):
    exported = Exported.open(made.patch, 1)
    for images in (np.zeros((1, 48, 32, 3), np.uint8), np.zeros((1, 32, 48, 3), np.float32)):
        with pytest.raises(exporting.InputError, match=r"brick.onnx: takes images \(B, 32, 48, 3\) uint8"):
            exported.run(images)


@pytest.mark.parametrize("missing", ["onnx", "onnxscript", "onnxruntime"])
def test_packages_that_are_missing_are_told(detectors, data, script, monkeypatch, tmp_path, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    out = tmp_path / "b.onnx"
    done = script("export", detectors / "patch/brick.pt", "--data_dir", data, "--output", out)
    one_line(done, missing, "pip install")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(("version", "told"), [("2.7.1+cu126", True), ("2.8.0", False), ("2.10.0a0+git1", False)])
def test_a_torch_that_is_too_old_is_told(monkeypatch, version, told):
    monkeypatch.setattr(torch, "__version__", version)
    with pytest.raises(InputError, match=r"needs torch 2\.8 or newer, this is 2\.7\.1") if told else nullcontext():
        exporting.check_packages()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "a detector file is needed"),
        (["photos", "brick.pt"], "comes first"),
        (["brick.pt", "--half", "--int8"], "not both"),
        (["brick.pt", "--accept"], "--accept goes with"),
        (["--check", "b.onnx", "--output", "c.onnx"], "--check writes nothing"),
        (["--check", "b.onnx", "--explain", "0"], "--check writes nothing"),
        (["brick.pt", "--output", "b.pt"], "b.pt: the name of an .onnx file"),
        (["brick.pt", "--opset", "17"], "a whole number from 18"),
    ],
)
def test_wrong_usage_is_told(script, flags, words):
    done = script("export", *flags)
    assert done.code == 2
    assert words in done.err
    assert "Traceback" not in done.err


def test_a_graph_that_does_not_decide_the_same_is_not_written(made, detectors, data, script, monkeypatch, tmp_path):
    """Not even in place of an earlier one."""
    out = tmp_path / "b.onnx"

    def wrong(*args):
        model = onnx.load(made.patch)
        alter_a_weight(model.graph)
        return model.SerializeToString()

    command = ("export", detectors / "patch/brick.pt", "--data_dir", data, "--output", out)
    monkeypatch.setattr(exporting, "graph_of", wrong)
    one_line(script(*command), "b.onnx: not written", "largest relative difference")
    assert not any(tmp_path.iterdir())


# Smaller weights --------------------------------------------------------------------------------------------------


def kinds_of(graph):
    """How many nodes of each kind a graph has, and the types of the weights of its convolutions."""
    model = onnx.load_from_string(graph)
    nodes = [node.op_type for node in model.graph.node]
    weights = {x.data_type for x in model.graph.initializer if len(x.dims) == 4 and "weight" in x.name}
    return nodes, weights


def test_only_networks_become_smaller(traced):
    """Densities, maps and p-values compute as before; the sum of two standardized distances is none of a network."""
    made, graph = traced("joined")
    names = {*exporting.in_networks(onnx.load_from_string(graph).graph)}
    nodes = [node for node in onnx.load_from_string(graph).graph.node if node.name in names]
    assert {node.op_type for node in nodes} <= {"Conv", *exporting.BETWEEN}
    convolutions = sum(node.op_type == "Conv" for node in onnx.load_from_string(graph).graph.node)
    assert sum(node.op_type == "Conv" for node in nodes) == convolutions
    half = exporting.in_half_precision(graph)
    patterns = torch.from_numpy(probe_images(SIZE)).permute(0, 3, 1, 2)
    comparison = exporting.compare(made, opened(made, half), patterns, lambda count: None)
    with torch.inference_mode():
        compared = made.predict_batch(patterns, explain=True).compared.numpy()
    answers = opened(made, half).run(probe_images(SIZE))
    assert 1e-6 < np.abs(answers.compared - compared).max() < 1e-2
    assert answers.windows.shape == (4, 3)
    assert comparison.scores > 1e-6
    assert comparison.scores < 0.1, comparison.words()
    assert kinds_of(half)[1] == {onnx.TensorProto.FLOAT16}
    assert kinds_of(graph)[1] == {onnx.TensorProto.FLOAT}


def test_an_int8_detector_knows_what_its_networks_give(images):
    """The densities that are fitted to int8 call normal images normal; those of float32 do not."""
    made = fitted(replace(PATCH, density="both"), images)
    before = {name: value.clone() for name, value in made.state_dict().items()}
    refitted = exporting.fitted_to_int8(made, images, 1)
    assert all(torch.equal(value.nan_to_num(), before[name].nan_to_num()) for name, value in made.state_dict().items())
    batches = [x.permute(0, 2, 3, 1).contiguous().numpy() for x in exporting.calibration_batches(images)]
    graph = exporting.in_int8(exporting.graph_of(refitted, 18, True), batches)
    assert "QuantizeLinear" in kinds_of(graph)[0]
    exported = opened(refitted, graph)
    arrays = images.permute(0, 2, 3, 1).contiguous().numpy()
    answers = exported.run(arrays)
    assert np.isfinite(answers.scores).all()
    with torch.inference_mode():
        angles = (answers.compared * made.predict_batch(images, explain=True).compared.numpy()).sum(1)
    assert angles.min() > 0.8  # cosines; the network is untrained, and rounded to 8 bits in each of 14 blocks
    assert {*answers.windows[:, 0].tolist()} <= {*range(len(images))}
    # Those it was fitted to score below its threshold, and so below the patterns, as by the detector itself
    assert (answers.p_values > exported.rate).mean() > 0.7
    assert answers.scores.mean() < exported.probe().scores.min()
    again = exported.run(arrays[:3])
    assert np.allclose(again.scores, answers.scores[:3], rtol=1e-3)


def test_int8_is_written_with_its_own_threshold(made, detectors, data, script, monkeypatch, tmp_path):
    out, graph_of, traced = tmp_path / "b.onnx", exporting.graph_of, [made.patch.read_bytes()]
    monkeypatch.setattr(exporting, "graph_of", lambda *args: traced.pop() if traced else graph_of(*args))
    done = script("export", detectors / "patch/brick.pt", "--data_dir", data, "--output", out, "--int8", "--accept")
    assert done.code == 0, done.err
    words = [line.split(": ", 1)[1] for line in done.out.splitlines()]
    assert [line.split(":")[0] for line in words] == [
        "float32",
        words[1],
        "int8",
        words[3],
        "labelled images",
        words[5],
    ]
    assert "image AUROC" in words[5]
    exported, detector = Exported.open(out, 1), load(detectors / "patch/brick.pt")
    assert exported.facts["precision"] == "int8"
    assert exported.threshold != detector.threshold.item()
    assert len(exported.facts["calibration_scores"]) == len(detector.calibration_scores)
    checked = script("export", "--check", out, detectors / "patch/brick.pt", "--data_dir", data)
    assert checked.code == 0, checked.err


def test_int8_needs_the_training_images(detectors, data, script, tmp_path):
    for name in ("brick.pt", "brick.normals"):
        shutil.copy(detectors / "patch" / name, tmp_path)
    out = ("--output", tmp_path / "b.onnx", "--int8")
    one_line(script("export", tmp_path / "brick.pt", "--data_dir", tmp_path, *out), "--int8 needs the training images")
    done = script("export", tmp_path / "brick.pt", data / "brick/test", *out)
    assert done.code == 2
    assert "--int8 takes no images" in done.err


def test_changed_decisions_must_be_accepted(made, detectors, data, script, monkeypatch, tmp_path):
    out, in_half_precision = tmp_path / "b.onnx", exporting.in_half_precision

    def wrong(graph):
        model = onnx.load_from_string(in_half_precision(graph))
        (weight,) = [x for x in model.graph.initializer if len(x.dims) == 4][-1:]
        weight.CopyFrom(onnx.numpy_helper.from_array(-onnx.numpy_helper.to_array(weight), weight.name))
        return model.SerializeToString()

    monkeypatch.setattr(exporting, "graph_of", lambda *_: made.patch.read_bytes())  # the same, traced already
    monkeypatch.setattr(exporting, "in_half_precision", wrong)
    command = ("export", detectors / "patch/brick.pt", "--data_dir", data, "--output", out, "--half")
    one_line(script(*command), "float16 changes", "decisions", "--accept")
    assert not out.exists()
    done = script(*command, "--accept")
    assert done.code == 0, done.err
    assert Exported.open(out, 1).facts["precision"] == "float16"


def test_other_files_are_not_replaced(detectors, data, script, tmp_path):
    out, command = tmp_path / "b.onnx", ("export", detectors / "patch/brick.pt", "--data_dir", data)
    (tmp_path / "b.json").write_text("{}")
    one_line(script(*command, "--output", out), "b.json", "move it away")
    (tmp_path / "b.json").unlink()
    out.write_bytes(b"mine")
    one_line(script(*command, "--output", out), "b.onnx: is there already")
    assert out.read_bytes() == b"mine"


def test_images_that_are_not_there_are_told(detectors, script, tmp_path):
    shutil.copy(detectors / "patch/brick.pt", tmp_path)
    command = ("export", tmp_path / "brick.pt")
    one_line(script(*command, "--data_dir", tmp_path), "no training images", "--data_dir")
    one_line(script(*command, tmp_path / "none.png"), "none.png: no such file")
    (tmp_path / "empty").mkdir()
    one_line(script(*command, tmp_path / "empty"), "no image found")


# Normal images ----------------------------------------------------------------------------------------------------


def test_normal_images_go_where_the_graph_goes(made, detectors, data, script, monkeypatch, tmp_path):
    """Also those of an earlier version; other files in their place stay."""
    monkeypatch.setattr(exporting, "graph_of", lambda *args: made.whole.read_bytes())  # the same, traced already
    for name in ("brick.pt", "brick.normals"):
        shutil.copy(detectors / "whole" / name, tmp_path)
    source, expected = tmp_path / "brick.normals", (detectors / "whole/brick.normals").read_bytes()
    save_tensors(of_version_2(load_parts(source, "normals")), source)
    out, beside = tmp_path / "line/b.onnx", tmp_path / "line/b.normals"
    command = ("export", tmp_path / "brick.pt", "--data_dir", data, "--output", out)
    beside.parent.mkdir()
    beside.write_bytes(b"mine")
    one_line(script(*command), "b.normals", "it would be replaced: move it away")
    assert [*beside.parent.iterdir()] == [beside]
    shutil.copy(detectors / "whole/grass.normals", beside)
    done = script(*command)
    assert done.code == 0, done.err
    assert "b.onnx, b.json, b.normals: " in done.err
    assert beside.read_bytes() == expected
    exported = Exported.open(out, 1)
    assert load_normals(beside, exported, exported=True).content() == expected
    for suffix in (".pt", ".normals"):  # of a detector of its own, which would lose its normal images
        shutil.copy(detectors / f"whole/grass{suffix}", tmp_path)
    taken = (*command[:-1], tmp_path / "grass.onnx")
    one_line(script(*taken), "grass.normals: would be replaced", "grass.pt")
    assert (tmp_path / "grass.normals").read_bytes() == (detectors / "whole/grass.normals").read_bytes()
    assert not (tmp_path / "grass.onnx").exists()
    source.write_bytes(expected[:3000])
    one_line(script(*command), f"{source}: truncated, damaged", "or leave it out with --explain 0")
    source.unlink()
    one_line(script(*command, "--explain", 1), f"{source}: no such file", "--explain 1")


def test_the_network_runs_no_further_for_panels_unless_so_asked(made, detectors, data, script, monkeypatch, tmp_path):
    """The network of the patch model need not run so far for its score."""
    out, asked, graph_of = tmp_path / "b.onnx", [], exporting.graph_of

    def noted(detector, opset, explain):
        asked.append(explain)
        return graph_of(detector, opset, explain) if explain else made.patch.read_bytes()

    monkeypatch.setattr(exporting, "graph_of", noted)
    command = ("export", detectors / "patch/brick.pt", "--data_dir", data, "--output", out)
    done = script(*command)
    assert done.code == 0, done.err
    assert "brick.normals is left out" in done.err
    assert "--explain 1" in done.err
    assert Exported.open(out, 1).outputs == ["scores", "p_values", "maps"]
    assert not out.with_suffix(".normals").exists()
    done = script(*command, "--explain", 1)
    assert done.code == 0, done.err
    assert Exported.open(out, 1).outputs == ["scores", "p_values", "maps", "compared"]
    assert out.with_suffix(".normals").read_bytes() == (detectors / "patch/brick.normals").read_bytes()
    assert asked == [False, True]
    assert Exported.open(made.whole, 1).outputs == ["scores", "p_values", "compared"]
