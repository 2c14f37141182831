"""Measure whole detectors, and their bare backbones, in torch, ONNX Runtime and OpenVINO: ``speed.py --only runtimes``.

A row of results/speed.csv for each model, runtime, number of threads and of images in a batch: milliseconds of a batch,
the median and the 99th percentile of calls, and how they compare with the backbone alone in the same runtime. Networks
are not trained: that takes no other time.
"""

import argparse
import itertools
import json
import os
import time
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from config import Config, PatchConfig
from detector import Detector, initial_network
from prediction.exporting import Features, calibration_batches, check_packages, graph_of, in_int8, traced
from runtime.cli import command_line, device_name
from runtime.files import say

BACKBONES = ("resnet18", "mobilenet_v2")
# By the number of images in a batch: turns for each of --repeats, and calls of a turn. One more begins each turn, while
# threads of the runtime before may still spin; it is not counted
BATCHES = {1: (10, 5), 32: (1, 1)}
KINDS = {  # as run_training.py makes them, from scratch and from ImageNet weights
    "image-level": lambda backbone: {"features": "level", "density": "torch"},
    "patch": lambda backbone: (
        {"features": "level", "level": (1,), "density": "torch", "patches": PatchConfig(48, location="shared")}
        if backbone == "resnet18"
        else {"features": "level", "level": (1, 2, 3), "join": True, "density": "both", "patches": PatchConfig(64)}
    ),
}
Call = Callable[[np.ndarray], object]


def measure_runtimes(args: argparse.Namespace, photographs: list[Image.Image]) -> None:
    """Print and record the rows of every model."""
    from speed import commit
    from tables import append

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
        graphs = graphs_of(detector, images)
        for threads in sorted({1, os.cpu_count()}):
            calls = contestants(detector, graphs, threads)
            for batch, (turns, count) in BATCHES.items():
                for name, figures in timed(calls, images[:batch], args.repeats * turns, count).items():
                    row = shared | {"threads": threads, "backbone": backbone, "model": kind, "runtime": name}
                    row |= {"batch_size": batch} | figures
                    print(json.dumps(row), flush=True)
                    append(row, args.results)


def graphs_of(detector: Detector, images: Tensor) -> dict[str, tuple[bytes, bytes]]:
    """Return the graphs of the whole detector and of its backbone, by precision."""
    height, width = detector.config.size
    whole = graph_of(detector)
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
    features = Features(detector.members[0])
    calls: dict[str, tuple[Call, Call]] = {
        "torch": (
            lambda x: detector.predict_batch(torch.from_numpy(x).permute(0, 3, 1, 2)),
            lambda x: features(torch.from_numpy(x).contiguous(memory_format=torch.channels_last)),
        )
    }
    for precision, pair in graphs.items():
        suffix = "" if precision == "float32" else f" {precision}"
        calls[f"onnxruntime{suffix}"] = tuple(onnxruntime_call(graph, threads) for graph in pair)
        try:
            calls[f"openvino{suffix}"] = tuple(openvino_call(graph, threads) for graph in pair)
        except ImportError:
            say("openvino is not installed: left out")
    return calls


def onnxruntime_call(graph: bytes, threads: int) -> Call:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
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
    return {name: {key: float(f"{value:.4g}") for key, value in row.items()} for name, row in figures.items()}
