"""A detector that has left torch: the graph of an .onnx file and the .json file beside it, run by ONNX Runtime.

<name>.onnx     images (B, H, W, 3) uint8 -> scores (B,), p_values (B,), of patch models maps (B, H, W), all float32;
                what panels need, where export.py has put it in: compared (B, D) float32, of patch models that know
                nearest windows also windows (B, 3) int64, see detector.BatchPrediction
<name>.json     all that a reader needs beside the graph: ``RULES`` names it

Owns the reading of both, and which images tell whether a runtime computes what it should. Imports no torch: a computer
on the line needs none. prediction/exporting.py writes the two.
"""

import hashlib
import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np

from runtime.files import InputError

FORMAT, VERSION = "cutpaste onnx", 2
SUFFIX, FACTS_SUFFIX = ".onnx", ".json"
INPUT, OUTPUTS = "images", ("scores", "p_values", "maps", "compared", "windows")  # by Answers
PRECISIONS = {"float32": 1e-4, "float16": 1e-2, "int8": 1e-2}  # and how far other processors may be off, relatively
PROBES = 4  # images that every runtime is tried with
ANEW = "export it again with export.py"
RESIZE = (
    "turn upright by EXIF, lay transparency on white, make 8-bit RGB (16-bit: 'white' becomes 255), then Pillow's"
    " Image.resize((W, H), BILINEAR), which filters when it shrinks; no resize where the size is right"
)


def _number(value: object) -> bool:
    return type(value) in (int, float) and bool(np.isfinite(value))


def _numbers(value: object) -> bool:
    return isinstance(value, list) and all(map(_number, value))


def _probed(value: object) -> bool:
    return _numbers(value) and len(value) == PROBES


# What the .json file must hold, beside what only a person reads
RULES: dict[str, Callable[[object], bool]] = {
    "category": lambda x: isinstance(x, str),
    "size": lambda x: isinstance(x, list) and len(x) == 2 and all(type(side) is int and side > 0 for side in x),
    "score_unit": lambda x: isinstance(x, str),
    "threshold": _number,  # of a score
    "rate": lambda x: _number(x) and 0 <= x <= 1,  # an image with p_value <= rate is anomalous
    "white": lambda x: type(x) is int and x in [2**bits - 1 for bits in range(8, 17)],  # in 16-bit files
    "has_maps": lambda x: type(x) is bool,
    "precision": lambda x: x in [*PRECISIONS],
    "calibration_scores": lambda x: _numbers(x) and bool(x) and x == sorted(x),
    "guarantee": lambda x: isinstance(x, dict) and {*x} == {"kind", "asked", "chosen"} and _number(x["asked"]),
    "appearance": lambda x: isinstance(x, list) and all(_numbers(row) and len(row) == 3 for row in x),
    # Where pixels are ignored: numbers of those, row by row, and of the pixel that each is filled from
    "ignore": lambda x: x is None or (isinstance(x, dict) and {*x} == {"pixels", "sources"}),
    "probe": lambda x: isinstance(x, dict) and {*x} == {"scores", "p_values"} and all(map(_probed, x.values())),
    "metadata": lambda x: isinstance(x, dict),  # how the detector was trained
    "config": lambda x: isinstance(x, dict),
    "detector": lambda x: isinstance(x, str),  # sha256 of the .pt file
    "normals": lambda x: x is None or isinstance(x, str),  # whose normal images panels show, if the graph compares them
    "versions": lambda x: isinstance(x, dict),
}


class Answers(NamedTuple):
    """Hold what a graph says of B images: the outputs of these names; None for what it lacks."""

    scores: np.ndarray
    p_values: np.ndarray
    maps: np.ndarray | None = None
    compared: np.ndarray | None = None
    windows: np.ndarray | None = None


class Exported:
    """A graph with its facts: ``Exported.open(path).run(images)``.

    facts: what the .json file holds, see RULES. size: (H, W) of its images. normals_digest, compared_width: see
    normals.Owner; None and 0 if the graph gives nothing to compare normal images by.
    """

    def __init__(self, path: Path, session, facts: dict) -> None:
        self.path, self.session, self.facts = path, session, facts
        self.category: str = facts["category"]
        self.size: tuple[int, int] = tuple(facts["size"])
        self.threshold: float = facts["threshold"]
        self.rate: float = facts["rate"]
        self.white: int = facts["white"]
        self.has_maps: bool = facts["has_maps"]
        self.normals_digest: str | None = facts["normals"]
        shapes = {part.name: part.shape for part in session.get_outputs()}
        self.outputs, self.compared_width = [*shapes], [0, *shapes.get("compared", [])][-1]
        # What differences are relative to where a score is smaller: sums of standardized distances may be near 0
        self.scale = max(abs(self.threshold), float(np.std(facts["calibration_scores"])), 1e-12)

    @classmethod
    def open(cls, path: str | Path, threads: int = 0) -> "Exported":
        """Read an .onnx file and the .json beside it. threads: that work on one operation; 0: as many as there are
        cores. Raises InputError, in one line, for whatever is not right."""
        path = Path(path)
        if not path.is_file():
            raise InputError(f"{path}: no such file")
        facts, graph = read_facts(path.with_suffix(FACTS_SUFFIX)), path.read_bytes()
        if facts.get("sha256") != digest(graph):
            other = f"is not the file that {path.with_suffix(FACTS_SUFFIX).name} was written with (its sha256 differs)"
            raise InputError(f"{path}: {other}; restore both, or {ANEW}")
        exported = cls(path, open_session(path, graph, threads), facts)
        exported.check()
        return exported

    def check(self) -> None:
        """Raise InputError for a graph that takes or gives something else than the facts say."""
        names = outputs_of(self.has_maps, bool(self.normals_digest), "windows" in self.outputs)
        height, width = self.size
        taken = [(part.name, part.type, part.shape[1:]) for part in self.session.get_inputs()]
        known = type(self.compared_width) is int  # else it is the name of a dimension, or none
        if self.outputs != names or taken != [(INPUT, "tensor(uint8)", [height, width, 3])] or not known:
            shape = f"{INPUT} (B, {height}, {width}, 3) uint8 to {', '.join(names)}"
            raise InputError(f"{self.path}: is no detector of its .json file, which goes from {shape}; {ANEW}")

    def run(self, images: np.ndarray) -> Answers:
        """Return what the graph says of images (B, H, W, 3) uint8. Raises InputError for others."""
        if images.dtype != np.uint8 or images.shape[1:] != (*self.size, 3):
            needed = f"(B, {self.size[0]}, {self.size[1]}, 3) uint8"
            raise InputError(f"{self.path}: takes images {needed}, not {images.shape} {images.dtype}")
        answers = self.session.run(self.outputs, {INPUT: np.ascontiguousarray(images)})
        return Answers(**dict(zip(self.outputs, answers)))

    def probe(self) -> Answers:
        """Return what the graph says of ``probe_images``."""
        return self.run(probe_images(self.size))

    def probe_difference(self) -> float:
        """Return how far, relatively, this machine's scores of ``probe_images`` are from those when the file was
        written; infinity if one is not finite."""
        expected = np.array(self.facts["probe"]["scores"])
        return largest_difference(self.probe().scores, expected, self.scale)


def outputs_of(maps: bool, compared: bool, windows: bool) -> list[str]:
    """Return the names of what a graph gives."""
    return [name for name, given in zip(OUTPUTS, (True, True, maps, compared, compared and windows)) if given]


def read_facts(path: Path) -> dict:
    """Return what the .json file beside a graph holds. Raises InputError if it is missing, damaged, or of another
    version."""
    if not path.is_file():
        raise InputError(f"{path}: no such file; export.py writes it beside the {SUFFIX} file, both are needed")
    facts = None
    with suppress(ValueError):  # no JSON, or no UTF-8
        facts = json.loads(path.read_bytes())
    if not isinstance(facts, dict) or facts.get("format") != FORMAT:
        raise InputError(f"{path}: is not of an exported detector; {ANEW}")
    if facts.get("version") not in (1, VERSION):
        versions = f"format {facts.get('version')}, this program reads {VERSION}"
        raise InputError(f"{path}: {versions}; update the program, or {ANEW}")
    if facts["version"] == 1:  # which compared no normal images
        facts["normals"] = None
    for name, holds in RULES.items():
        if name not in facts or not holds(facts[name]):
            raise InputError(f"{path}: damaged: {name} is missing or not what it must be; restore it, or {ANEW}")
    return facts


def open_session(path: Path, graph: bytes, threads: int):
    """Return ONNX Runtime's session of a graph, on the CPU. Raises InputError if there is none."""
    try:
        import onnxruntime
    except ImportError as error:
        raise InputError(f"{path}: running it needs ONNX Runtime; pip install onnxruntime") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3  # errors only
    try:
        return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its errors have no common type but this
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{path}: onnxruntime {onnxruntime.__version__} cannot load it ({reason}); {ANEW}") from error


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


# Comparing --------------------------------------------------------------------------------------------------------


def probe_images(size: tuple[int, int]) -> np.ndarray:
    """Return images (PROBES, H, W, 3) uint8 that are the same everywhere: waves, coarse to fine, unlike in each
    channel. Whole numbers alone make them."""
    y, x = (np.arange(side, dtype=np.int64) for side in size)
    y, x = y[:, None, None], x[None, :, None]
    channel = np.arange(3)
    images = [(y * (k + 1) + x * (2 * k + channel + 1) + x * y // (16 >> k)) % 256 for k in range(PROBES)]
    return np.stack(images).astype(np.uint8)


def largest_difference(values: np.ndarray, expected: np.ndarray, least: float) -> float:
    """Return the largest of |values - expected| / max(|expected|, least); infinity for values that are not finite."""
    relative = np.abs(values - expected) / np.maximum(np.abs(expected), least)
    return float(np.max(relative, initial=0.0)) if np.isfinite(values).all() else np.inf
