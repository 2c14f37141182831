"""Bring a detector out of torch: its graph, the facts beside it, smaller weights, and the comparison with the detector.

Owns what goes into the .onnx and .json files that prediction/exported.py reads. The graph takes pixels and gives the
decision: filling, normalization, networks, densities, maps, scores, p-values; and, if it is to explain, what normal
images are compared by. Grad-CAM is not in it.
"""

import importlib
import json
import logging
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from detector import Detector, EnsembleMember, evenly_spaced
from image_ops import ignored_pixels
from prediction.exported import FORMAT, INPUT, RESIZE, VERSION, Exported, digest, largest_difference, outputs_of
from runtime.files import InputError

PACKAGES = "onnx", "onnxscript", "onnxruntime"
TORCH = 2, 8  # its first version that exports what a detector is made of
OPSET = 18  # version of ONNX's operators
TOLERANCE = 1e-4  # largest relative difference of scores and maps in float32
SEEN_AT_ONCE = 2  # images that the graph is traced with: one would be taken for the only number there is
CALIBRATED, CALIBRATED_AT_ONCE = 64, 8  # normal images that activations are measured on for int8
INT8_NEEDS = 8  # training images
TIMED = 20  # repeats, of which the median counts
# What is computed in int8 or float16: convolutions, and these between them. Densities stay as they are
BETWEEN = ("Add", "Relu", "Clip", "MaxPool")


def check_packages() -> None:
    """Raise InputError if a package is missing that only export needs, or torch is too old for it."""
    if tuple(map(int, torch.__version__.split(".")[:2])) < TORCH:
        raise InputError(f"export needs torch {'.'.join(map(str, TORCH))} or newer, this is {torch.__version__}")
    for name in PACKAGES:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise InputError(f"export needs {name}; pip install -r requirements-export.txt") from error


class Decision(nn.Module):
    """All that a detector says, as a graph gives it: images (B, H, W, 3) uint8 -> what exported.Answers names. explain:
    what normal images are compared by, too."""

    def __init__(self, detector: Detector, explain: bool) -> None:
        super().__init__()
        self.detector, self.explain = detector, explain

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        prediction = self.detector.predict_batch(images.permute(0, 3, 1, 2), self.explain)
        answers = prediction.scores.float(), prediction.p_values.float()
        rest = prediction.maps, prediction.compared, prediction.windows
        return *answers, *(part for part in rest if part is not None)


def graph_of(detector: Detector, opset: int = OPSET, explain: bool = False) -> bytes:
    """Return the content of an .onnx file of a detector on the CPU."""
    images = torch.zeros(SEEN_AT_ONCE, *detector.size, 3, dtype=torch.uint8)
    has_maps = detector.config.patches is not None
    names = outputs_of(has_maps, explain, has_maps and detector.members[0].nearest_level is not None)
    return traced(Decision(detector, explain), images, names, opset)


def explains_free(detector: Detector) -> bool:
    """Return whether a detector's network runs, for its score alone, as far as what images are compared by needs: ONNX
    Runtime computes all that is in a graph, whatever is asked for."""
    return detector.config.dense and detector.comparison_level <= max(detector.config.levels)


def traced(module: nn.Module, images: Tensor, outputs: Sequence[str], opset: int = OPSET) -> bytes:
    """Return the content of an .onnx file of a module that takes any number of images (B, ...)."""
    with quiet():
        program = torch.onnx.export(
            module.eval().requires_grad_(False),
            (images,),
            dynamo=True,
            verbose=False,
            opset_version=opset,
            input_names=[INPUT],
            output_names=[*outputs],
            dynamic_shapes=({0: torch.export.Dim("B")},),
        )
    graph = program.model_proto
    del graph.metadata_props[:]
    for node in graph.graph.node:  # where in the code it comes from, with paths of this machine
        del node.metadata_props[:]
        node.doc_string = ""
    return graph.SerializeToString()


@contextmanager
def quiet() -> Iterator[None]:
    """Keep torch's exporter from telling what no user can change."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "torch.export")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels):
                logger.setLevel(level)


def facts_of(detector: Detector, source: bytes, precision: str = "float32", normals: str | None = None) -> dict:
    """Return what a .json file says of a detector; ``described`` adds what it says of a graph. source: the content of
    the detector's file. normals: Detector.normals_digest of whose normal images its panels show."""
    import onnx
    import onnxruntime

    guarantee, hidden = detector.guarantee, ignored_pixels(detector.fill_index).flatten()
    pixels = hidden.nonzero()[:, 0]
    filled = {"pixels": pixels.tolist(), "sources": detector.fill_index.flatten()[pixels].tolist()}
    return {
        "format": FORMAT,
        "version": VERSION,
        "category": detector.config.category,
        "size": [*detector.config.size],
        "resize": RESIZE,
        "white": detector.white,
        "has_maps": detector.config.patches is not None,
        "score_unit": detector.unit,
        "threshold": detector.threshold.item(),
        "rate": float(np.float32(guarantee.rate)),  # as the graph's p-values are rounded, so that p <= rate is safe
        "precision": precision,
        "guarantee": {"kind": guarantee.kind, "asked": guarantee.asked, "chosen": guarantee.chosen},
        "calibration_scores": detector.calibration_scores.sort().values.tolist(),
        "appearance": detector.appearance.tolist(),
        "ignore": filled if len(pixels) else None,
        "metadata": detector.metadata,
        "config": detector.config.to_dict(),
        "detector": digest(source),
        "normals": normals,
        "versions": {
            "torch": str(torch.__version__),
            "onnx": onnx.__version__,
            "onnxruntime": onnxruntime.__version__,
            "numpy": np.__version__,
        },
    }


def described(facts: dict, graph: bytes, exported: Exported) -> bytes:
    """Return the content of the .json file of a graph, with what it says of the probe images here."""
    answers = exported.probe()
    probe = {"scores": answers.scores.tolist(), "p_values": answers.p_values.tolist()}
    return json.dumps(facts | {"sha256": digest(graph), "probe": probe}, indent=1, allow_nan=False).encode()


# Smaller weights --------------------------------------------------------------------------------------------------


class Features(nn.Module):
    """A member's network alone: prepared images (B, 3, H, W) float32 -> the features of the stages that are used."""

    def __init__(self, member: EnsembleMember) -> None:
        super().__init__()
        self.network, self.levels = member.network, member.config.levels

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.network.features(images, self.levels))

    @property
    def outputs(self) -> list[str]:
        return [f"stage_{level}" for level in self.levels]


def in_networks(graph) -> list[str]:
    """Return the names of the nodes of networks: convolutions, and those of BETWEEN that take nothing but what these
    give."""
    given, names = set(), []
    for node in graph.node:
        inputs = {name for name in node.input if name} - {weight.name for weight in graph.initializer}
        if node.op_type == "Conv" or (node.op_type in BETWEEN and inputs and inputs <= given):
            given.update(node.output)
            names.append(node.name)
    return names


def in_half_precision(graph: bytes) -> bytes:
    """Return a graph that computes its networks in float16 and all else as before.

    Not by onnxruntime's converter: that turns a cast of scores from float64 to float32, outside, into one to float16.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    model = onnx.load_from_string(graph)
    weights, names, nodes = {x.name: x for x in model.graph.initializer}, {*in_networks(model.graph)}, []
    halved: dict[str, str] = {}  # float32 tensors that there is one in float16 of, by name
    back: dict[str, str] = {}  # and those of networks that there is one in float32 of

    def cast(name: str, to: int, done: dict[str, str]) -> str:
        if name not in done:
            done[name] = f"{name}_{'half' if to == TensorProto.FLOAT16 else 'float'}"
            if name in weights:
                values = numpy_helper.to_array(weights[name]).astype(np.float16)
                model.graph.initializer.append(numpy_helper.from_array(values, done[name]))
            else:
                nodes.append(helper.make_node("Cast", [name], [done[name]], to=to))
        return done[name]

    given: set[str] = set()
    for node in model.graph.node:
        for place, name in enumerate(node.input):
            if node.name in names and name and name not in given:
                node.input[place] = cast(name, TensorProto.FLOAT16, halved)
            elif node.name not in names and name in given:
                node.input[place] = cast(name, TensorProto.FLOAT, back)
        nodes.append(node)
        given.update(node.output if node.name in names else ())
    used = {name for node in nodes for name in node.input}
    kept = [weight for weight in model.graph.initializer if weight.name in used]
    for field_, values in (("node", nodes), ("initializer", kept), ("value_info", [])):
        copies = [type(value).FromString(value.SerializeToString()) for value in values]
        model.graph.ClearField(field_)
        getattr(model.graph, field_).extend(copies)
    onnx.checker.check_model(model)
    return model.SerializeToString()


def in_int8(graph: bytes, batches: Iterable[np.ndarray]) -> bytes:
    """Return a graph that computes its networks in int8: weights channel by channel, activations in the ranges that
    they have on batches of what the graph takes."""
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = iter(batches)

        def get_next(self) -> dict | None:
            batch = next(self.batches, None)
            return None if batch is None else {INPUT: batch}

    model = onnx.load_from_string(graph)
    with tempfile.TemporaryDirectory() as folder, quiet():
        path = Path(folder) / "int8.onnx"
        quantize_static(
            model,
            path,
            Reader(),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["Conv", *BETWEEN],
            nodes_to_quantize=in_networks(model.graph),
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
        return path.read_bytes()


def calibration_batches(images: Tensor) -> Iterator[Tensor]:
    """Yield the images (N, ...) that the ranges of int8 are taken from, batch by batch."""
    yield from images[evenly_spaced(len(images), CALIBRATED)].split(CALIBRATED_AT_ONCE)


def fitted_to_int8(detector: Detector, images: Tensor, threads: int) -> Detector:
    """Return a detector of the same networks whose densities and threshold are fitted to what these give in int8.

    images: (N, 3, H, W) uint8, those that the detector was made from. A density measures in units of what little varies
    among normal images: to one that was fitted in float32, rounding alone would be a defect.
    """
    from onnxruntime import InferenceSession, SessionOptions

    other = detector.changed()
    options = SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    try:
        for member, new_member in zip(detector.members, other.members):
            for level, new_level in zip(member.levels, new_member.levels):
                new_level.location = "shared" if level.shared else "each"
            module, prepared = Features(member), [detector.prepare(batch) for batch in calibration_batches(images)]
            if not detector.config.dense:
                prepared = [member.grids[0].cut(batch) for batch in prepared]
            batches = (batch.contiguous().numpy() for batch in prepared)
            graph = in_int8(traced(module, torch.zeros(SEEN_AT_ONCE, *prepared[0].shape[1:]), module.outputs), batches)
            session = InferenceSession(graph, options, providers=["CPUExecutionProvider"])

            def features(images: Tensor, levels: Sequence[int], session=session) -> list[Tensor]:
                names = [f"stage_{level}" for level in levels]
                return [torch.from_numpy(x) for x in session.run(names, {INPUT: images.contiguous().numpy()})]

            member.network.features = features
        return other.fit(images)
    finally:
        for member in detector.members:
            vars(member.network).pop("features", None)


# Comparing --------------------------------------------------------------------------------------------------------


@dataclass
class Comparison:
    """Hold how a graph differs from its detector, over the images that ``add`` was called with.

    scores, maps: the largest differences, relative to the size of the image's score, or of the threshold where that is
    larger. p_values: the largest difference. changed: decisions that
    differ. rounded: those of them that a difference of TOLERANCE in the scores would explain.
    """

    detector: Detector
    exported: Exported
    count: int = 0
    scores: float = 0.0
    maps: float = 0.0
    p_values: float = 0.0
    changed: int = 0
    rounded: int = 0
    graph_scores: list[np.ndarray] = field(default_factory=list)
    detector_scores: list[np.ndarray] = field(default_factory=list)

    @torch.inference_mode()
    def add(self, images: Tensor) -> None:
        """Let both score images (B, 3, H, W) uint8."""
        detector, rate, scale = self.detector, self.exported.rate, self.exported.scale
        answers = self.exported.run(images.permute(0, 2, 3, 1).contiguous().numpy())
        by_member, maps = detector.score_by_member(detector.prepare(images))
        scores = by_member.mean(0).numpy()
        # What p-values may be where a score is nearly that of a normal image
        margin = TOLERANCE * by_member.abs().clamp(min=scale)
        p, low, high = (detector.p_values(by_member + sign * margin).float().numpy() for sign in (0, 1, -1))
        self.count += len(images)
        self.scores = max(self.scores, largest_difference(answers.scores, scores, scale))
        if maps is not None:
            size = np.maximum(np.abs(scores), scale)[:, None, None]
            self.maps = max(self.maps, largest_difference(answers.maps / size, maps.numpy() / size, 1.0))
        self.p_values = max(self.p_values, float(np.abs(answers.p_values - p).max()))
        changed = (answers.p_values <= rate) != (p <= rate)
        self.changed += int(changed.sum())
        self.rounded += int((changed & ((low <= rate) != (high <= rate))).sum())
        self.graph_scores.append(answers.scores)
        self.detector_scores.append(scores)

    @property
    def fits(self) -> bool:
        """Return whether the graph says what the detector says, up to rounding."""
        return max(self.scores, self.maps) <= TOLERANCE and self.changed == self.rounded

    def all_scores(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the scores (N,) by the detector and by the graph."""
        return np.concatenate(self.detector_scores), np.concatenate(self.graph_scores)

    def words(self) -> str:
        """Return it in a line."""
        maps = f", maps {self.maps:.2g}" if self.exported.has_maps else ""
        text = f"{self.count} images, largest relative difference: scores {self.scores:.2g}{maps}"
        text += f"; largest of p-values {self.p_values:.2g}; decisions that differ: {self.changed}"
        return text + (f", {self.rounded} of them of scores on the threshold" if self.rounded else "")


def compare(detector: Detector, exported: Exported, images: Tensor, tell: Callable[[int], object]) -> Comparison:
    """Return how a graph and its detector differ on images (N, 3, H, W) uint8: the first alone, the others in batches.
    tell: called with the number of images of each batch."""
    comparison = Comparison(detector, exported)
    for batch in (images[:1], *images[1:].split(detector.batch_size)):
        if len(batch):
            comparison.add(batch)
            tell(len(batch))
    return comparison


def milliseconds(work: Callable[[], object]) -> float:
    """Return the median time of a call."""
    seconds = []
    for _ in range(TIMED + 1):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return 1000 * float(np.median(seconds[1:]))  # the first one allocates


def speeds(detector: Detector, exported: Exported, image: Tensor) -> tuple[float, float]:
    """Return how many milliseconds the graph and the detector take for one image (3, H, W) uint8."""
    array = image.permute(1, 2, 0)[None].contiguous().numpy()
    with torch.inference_mode():
        return milliseconds(lambda: exported.run(array)), milliseconds(lambda: detector.predict_batch(image[None]))
