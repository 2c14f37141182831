"""Measure whole detectors, and their bare backbones, in torch, ONNX Runtime and OpenVINO: ``speed.py --only runtimes``.

A row of results/speed.csv for each model, runtime, number of threads and of images in a batch: milliseconds of a batch,
the median and the 99th percentile of calls, and how they compare with the backbone alone in the same runtime. Networks
are not trained: that takes no other time.

``speed.py --only line`` measures predict.py on an exported detector, from its start to its last row, against decoding
alone and scoring alone: a row for each model.
"""

import argparse
import copy
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from config import JOINED_WINDOW, Config, PatchConfig
from detector import Detector, initial_network
from prediction.exported import Exported, open_session
from prediction.exporting import (
    Features,
    calibration_batches,
    check_packages,
    described,
    explains_free,
    facts_of,
    graph_of,
    in_int8,
    traced,
)
from prediction.scorer import EXPORTED_BATCH
from runtime.cli import command_line, device_name
from runtime.files import InputError, say
from runtime.image_files import decode

BACKBONES = ("resnet18", "mobilenet_v2")
# By the number of images in a batch: turns for each of --repeats, and calls of a turn. One more begins each turn, while
# threads of the runtime before may still spin; it is not counted
BATCHES = {1: (10, 5), 32: (1, 1)}
KINDS = {  # as run_training.py makes them, from scratch and from ImageNet weights
    "image-level": lambda backbone: {"features": "level", "density": "torch"},
    "patch": lambda backbone: (
        {"features": "level", "level": (1,), "density": "torch", "patches": PatchConfig(48, location="shared")}
        if backbone == "resnet18"
        else {"features": "level", "level": (1, 2, 3), "join": True, "density": "both"}
        | {"patches": PatchConfig(64, window=JOINED_WINDOW)}
    ),
}
FORMS = {"torch": False, "torch.compile": True}  # of a detector in torch: whether torch compiles it
ONE_IMAGE_ONLY = ("torch.compile",)  # for each other number of images it would compile for minutes
FILES = 1000  # that predict.py scores: copies of the photographs
Call = Callable[[np.ndarray], object]


def measure_runtimes(args: argparse.Namespace, photographs: list[Image.Image]) -> None:
    """Print and record the rows of every model in every runtime."""
    for detector, images, shared in models(args, photographs):
        graphs = graphs_of(detector, images)
        for threads in sorted({1, os.cpu_count()}):
            calls = contestants(detector, graphs, threads)
            for batch, (turns, count) in BATCHES.items():
                chosen = {name: pair for name, pair in calls.items() if batch == 1 or name not in ONE_IMAGE_ONLY}
                for name, figures in timed(chosen, images[:batch], args.repeats * turns, count).items():
                    record(args, shared | {"threads": threads, "runtime": name, "batch_size": batch} | figures)


def models(args: argparse.Namespace, photographs: list[Image.Image]) -> Iterator[tuple[Detector, Tensor, dict]]:
    """Yield a detector of each backbone and kind, the images (N, 3, H, W) uint8 that it is fitted to, and what its rows
    share."""
    from speed import commit

    check_packages()
    images = torch.from_numpy(np.stack([np.array(x.resize(args.size[::-1])) for x in photographs]))
    images = images.permute(0, 3, 1, 2).contiguous()
    shared = {
        "command": command_line().replace("python ", "python benchmarks/", 1),
        "processor": device_name(torch.device("cpu")),
        "cores": os.cpu_count(),
        "torch": str(torch.__version__),
        "commit": commit(),
        "height": args.size[0],
        "width": args.size[1],
        "repeats": args.repeats,
        "note": args.note,
    }
    for backbone, kind in itertools.product(BACKBONES, KINDS):
        settings = {"height": args.size[0], "width": args.size[1], "pretrained": False, "backbone": backbone}
        config = Config("speed", **settings, **KINDS[kind](backbone))
        say(f"measuring: {backbone}, {kind}")
        detector = Detector(config, [initial_network(config)]).fit(images)
        yield detector, images, shared | {"backbone": backbone, "model": kind}


def record(args: argparse.Namespace, row: dict) -> None:
    """Print a row and add it to the CSV file, its figures rounded to four digits."""
    from tables import append

    row = {name: float(f"{value:.4g}") if isinstance(value, float) else value for name, value in row.items()}
    print(json.dumps(row), flush=True)
    append(row, args.results)


def graphs_of(detector: Detector, images: Tensor) -> dict[str, tuple[bytes, bytes]]:
    """Return the graphs of the whole detector and of its backbone, by precision."""
    height, width = detector.config.size
    whole = graph_of(detector, explain=explains_free(detector))  # as export.py does by default
    features = Features(detector.members[0])
    bare = traced(features, torch.zeros(2, 3, height, width), features.outputs)
    pixels, prepared = [], []
    for batch in calibration_batches(images):
        pixels.append(batch.permute(0, 2, 3, 1).contiguous().numpy())
        prepared.append(detector.prepare(batch).contiguous().numpy())
    return {"float32": (whole, bare), "int8": (in_int8(whole, pixels), in_int8(bare, prepared))}


def contestants(
    detector: Detector, graphs: dict[str, tuple[bytes, bytes]], threads: int
) -> dict[str, tuple[Call, Call]]:
    """Return by runtime what scores a batch (B, H, W, 3) uint8, and what runs the backbone alone on (B, 3, H, W)."""
    torch.set_num_threads(threads)
    calls: dict[str, tuple[Call, Call]] = {}
    for name, compiles in FORMS.items():
        calls[name] = torch_calls(detector, compiles)
        try:
            calls[name][0](np.zeros((1, *detector.config.size, 3), np.uint8))
        except Exception as error:  # of what compiles, of any type: no compiler, say
            say(f"{name}: left out: {(str(error).splitlines() or [type(error).__name__])[0]}")
            del calls[name]
    for precision, pair in graphs.items():
        suffix = "" if precision == "float32" else f" {precision}"
        calls[f"onnxruntime{suffix}"] = tuple(onnxruntime_call(graph, threads) for graph in pair)
        try:
            calls[f"openvino{suffix}"] = tuple(openvino_call(graph, threads) for graph in pair)
        except ImportError:
            say("openvino is not installed: left out")
    return calls


def torch_calls(detector: Detector, compiles: bool) -> tuple[Call, Call]:
    """Return torch's calls. The bare backbone is as torchvision makes it: a detector has folded its BatchNorm.
    compiles: torch compiles both, for each shape when it first comes."""
    detector, network = copy.deepcopy(detector), initial_network(detector.config).eval()
    if compiles:
        torch.compiler.reset()  # of one function, torch compiles a few networks and numbers of threads only
        for part in (network, *(member.network for member in detector.members)):
            part.features = torch.compile(part.features, dynamic=False)
    features = Features(detector.members[0])
    features.network = network
    return (
        lambda x: detector.predict_batch(torch.from_numpy(x).permute(0, 3, 1, 2)),
        lambda x: features(torch.from_numpy(x).contiguous(memory_format=torch.channels_last)),
    )


def onnxruntime_call(graph: bytes, threads: int) -> Call:
    session = open_session(Path(), graph, threads)
    return lambda x: session.run(None, {"images": x})


def openvino_call(graph: bytes, threads: int) -> Call:
    """Return OpenVINO's call, in float32: on processors with bfloat16 it would compute in that by itself."""
    import openvino

    core = openvino.Core()
    settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    compiled = core.compile_model(core.read_model(graph), "CPU", settings)
    return lambda x: compiled([x])


@torch.inference_mode()
def timed(calls: dict[str, tuple[Call, Call]], images: Tensor, turns: int, count: int) -> dict[str, dict]:
    """Return the figures of each runtime on one batch (B, 3, H, W) uint8, from ``count`` calls in each of its turns."""
    pixels = images.permute(0, 2, 3, 1).contiguous().numpy()
    floats = (images.float() / 255).numpy()
    seconds = {(name, part): [] for name in calls for part in (0, 1)}
    for _ in range(turns):
        for name, pair in calls.items():
            for part, call in enumerate(pair):
                given = (pixels, floats)[part]
                call(given)
                for _ in range(count):
                    began = time.perf_counter()
                    call(given)
                    seconds[name, part].append(time.perf_counter() - began)
    figures = {}
    for name in calls:
        whole, bare = (float(np.median(seconds[name, part])) for part in (0, 1))
        figures[name] = {
            "scoring_ms": 1000 * whole,
            "scoring_p99_ms": 1000 * float(np.percentile(seconds[name, 0], 99)),
            "bare_ms": 1000 * bare,
            "whole_over_bare": whole / bare,
            "scored_per_second": len(images) / whole,
        }
    return figures


# predict.py -------------------------------------------------------------------------------------------------------


def measure_line(args: argparse.Namespace, photographs: list[Image.Image]) -> None:
    """Print and record how many files predict.py scores in a second, of every model, and how many are decoded alone,
    and scored alone: the medians of --repeats turns."""
    from speed import write_photographs

    for detector, images, shared in models(args, photographs):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            path, files = folder / "speed.onnx", folder / "files"
            files.mkdir()
            for number, photograph in enumerate(write_photographs(photographs, folder, args.original)):
                for copied in range(number, FILES, len(photographs)):
                    os.link(photograph, files / f"{copied:04}.png")
            explained = explains_free(detector)
            graph = graph_of(detector, explain=explained)
            facts = facts_of(detector, b"", normals=detector.normals_digest if explained else None)
            exported = Exported(path, open_session(path, graph, 1), facts)
            path.write_bytes(graph)
            path.with_suffix(".json").write_bytes(described(facts, graph, exported))
            works = {
                "files": partial(predict, path, files),
                "decoding": partial(decode_all, sorted(files.iterdir()), detector),
                "scored": partial(score_all, exported, images.permute(0, 2, 3, 1).contiguous().numpy()),
            }
            seconds: dict[str, list[float]] = {name: [] for name in works}
            for _ in range(args.repeats):
                for name, work in works.items():
                    began = time.perf_counter()
                    work()
                    seconds[name].append(time.perf_counter() - began)
        rates = {name: FILES / float(np.median(values)) for name, values in seconds.items()}
        row = shared | {"threads": os.cpu_count(), "runtime": "predict.py", "batch_size": FILES}
        row |= {"file_height": args.original[0], "file_width": args.original[1]}
        row |= {f"{name}_images_per_second": rates[name] for name in ("files", "decoding")}
        row |= {
            "scored_per_second": rates["scored"],
            "line_over_slower": rates["files"] / min(rates["decoding"], rates["scored"]),
        }
        record(args, row)


def predict(path: Path, folder: Path) -> None:
    """Run predict.py on a folder. Raises InputError if it fails."""
    script, rows = Path(__file__).resolve().parents[1] / "predict.py", path.with_suffix(".csv")
    command = [sys.executable, script, path, folder, "--output", rows, "--overwrite"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    if done.returncode:
        raise InputError(f"predict.py failed: {done.stderr.strip()}")


def decode_all(paths: list[Path], detector: Detector) -> None:
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for _ in pool.map(lambda path: decode(path, detector.config.size, detector.white), paths):
            pass


def score_all(exported: Exported, images: np.ndarray) -> None:
    """Score as many images as there are files, in as many threads as there are cores, a batch each."""
    numbers = [
        np.arange(first, min(first + EXPORTED_BATCH, FILES)) % len(images) for first in range(0, FILES, EXPORTED_BATCH)
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for _ in pool.map(lambda batch: exported.run(images[batch]), numbers):
            pass
