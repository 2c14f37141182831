"""The normal images kept beside a detector, and which of them is nearest to a new one.

<model_dir>/<category>.normals      a zip archive of at most KEPT training images, not compressed:
    normals.json        format, version, which detector it belongs to; names of the images, and their numbers among all
    embeddings.f16      what they are compared by, (N, D) float16, little-endian
    0.jpg, 1.jpg, ...   the images at the detector's size

Imports torch only to write such a file, and to read one of version 1 or 2, which torch has written: a computer on the
line needs none.
"""

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from PIL import Image

from runtime.files import InputError, archive_of, damage_named, load_parts, load_tensors, write_file
from runtime.image_files import encode

if TYPE_CHECKING:
    from dataset import TrainSet
    from detector import Detector

FORMAT = "cutpaste-normals"
VERSION = 3
SUFFIX = ".normals"  # not that of detectors, which are found by theirs
LIST, EMBEDDINGS = "normals.json", "embeddings.f16"
KEPT = 1000  # normal images that are kept
ANEW = "train anew with --explain 1 --overwrite"
QUALITY = 85  # of their JPEG files
UNIT_ERROR = 0.01  # of the length of an embedding, which is kept in half precision


# The file ---------------------------------------------------------------------------------------------------------


class Owner(Protocol):
    """Name what a file of normal images is read for: a Detector, or an Exported one.

    normals_digest: tells it from others. size: (H, W) of its images. compared_width: D of their embeddings.
    """

    normals_digest: str
    size: tuple[int, int]
    compared_width: int


def normals_path(detector_path: str | Path) -> Path:
    """Return the path of the file beside a detector's."""
    return Path(detector_path).with_suffix(SUFFIX)


@dataclass(frozen=True)
class Normals:
    """N normal images. jpegs: their files at the detector's size; embeddings: (N, D) float32 of unit length. numbers:
    where they stand among the training images. path: of the file. digest: of the detector, see Owner."""

    path: Path
    digest: str
    numbers: list[int]
    names: list[str]
    jpegs: list[bytes]
    embeddings: np.ndarray

    def image(self, number: int) -> np.ndarray:
        """Return an image, (H, W, 3) uint8. Raises InputError if its JPEG file is damaged."""
        try:
            return np.array(Image.open(io.BytesIO(self.jpegs[number]), formats=("JPEG",)))
        except (OSError, SyntaxError, ValueError) as error:
            raise InputError(f"{self.path}: {self.names[number]} cannot be decoded ({error}); restore it") from error

    def nearest(self, embeddings: np.ndarray) -> list[int]:
        """Return the numbers of the images whose embeddings have the smallest angle to each of (B, D)."""
        return (embeddings @ self.embeddings.T).argmax(1).tolist()

    def content(self) -> bytes:
        """Return the content of its file, of the newest version."""
        listed = {"format": FORMAT, "version": VERSION, "detector": self.digest}
        listed |= {"numbers": self.numbers, "names": self.names}
        parts = {LIST: json.dumps(listed, indent=1).encode(), EMBEDDINGS: self.embeddings.astype("<f2").tobytes()}
        return archive_of(parts | dict(zip(jpeg_names(len(self.jpegs)), self.jpegs)))


def jpeg_names(count: int) -> list[str]:
    return [f"{number}.jpg" for number in range(count)]


def save_normals(detector: "Detector", train: "TrainSet", path: str | Path) -> None:
    """Write the file of a fitted detector, whole or not at all: at most KEPT of its training images, evenly spaced.
    Raises OSError if it cannot be written."""
    import torch

    from detector import batches_of, evenly_spaced

    jpegs, embeddings = [], []
    numbers = evenly_spaced(len(train), KEPT)
    with torch.inference_mode():
        for block in batches_of(detector, train.images, numbers=numbers):
            features = detector.members[0].features(detector.prepare(block), [detector.comparison_level])
            embeddings.append(detector.compared(features).cpu().numpy())
            pictures = map(Image.fromarray, block.permute(0, 2, 3, 1).cpu().numpy())
            # Subsampled, colors of thin lines would get lost
            jpegs += [encode(picture, "JPEG", quality=QUALITY, subsampling="4:4:4") for picture in pictures]
    names = [train.paths[number].name for number in numbers.tolist()]
    parts = Path(path), detector.normals_digest, numbers.tolist(), names, jpegs, np.concatenate(embeddings)
    write_file(Normals(*parts).content(), path)


def load_normals(path: str | Path, owner: Owner, exported: bool = False, way_out: str = ANEW) -> Normals:
    """Read the file that was written with a detector. exported: without torch. way_out: what to do about a file that
    is not right. Raises InputError if it is missing, damaged, of a newer format, or of another training; if exported,
    of an earlier format, too."""
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file, which holds the normal images; copy it here, or {way_out}")
    listed, parts = read_normals(path, exported, way_out)
    if listed.get("detector") != owner.normals_digest:
        raise InputError(f"{path}: was written with another detector than the one beside it; {way_out}")
    with damage_named(path, "normals", way_out):
        if LIST not in parts:
            parts = _earlier_parts(listed, owner.compared_width)
        return _checked(listed, parts, owner, Path(path))


def read_normals(path: str | Path, exported: bool = False, way_out: str = ANEW) -> tuple[dict, dict[str, bytes]]:
    """Return what a file of normal images lists, and its parts, neither checked: of an earlier version tensors among
    the former. Raises InputError for any other file, see ``load_normals``."""
    parts = load_parts(path, "normals", f"restore it, or {way_out}")
    with damage_named(path, "normals", way_out):
        if LIST in parts:
            listed = json.loads(parts[LIST])
        elif exported:
            raise InputError(f"{path}: of an earlier version, which needs torch; {way_out}")
        else:
            listed = load_tensors(path, "normals")
        if listed.get("format") != FORMAT:
            raise InputError(f"{path}: not a file of normal images; {way_out}")
        if listed.get("version") not in ((VERSION,) if LIST in parts else (1, 2)):
            versions = f"format {listed.get('version')}, this program reads {VERSION}"
            raise InputError(f"{path}: {versions}; update the program, or {way_out}")
        return listed, parts


def _earlier_parts(content: dict, width: int) -> dict[str, bytes]:
    """Return the parts of what a file of version 1 or 2 holds. Raises ValueError for tensors that cannot be."""
    import torch

    from runtime.tensors import TensorRule, check_tensor

    lengths = content["lengths"]
    if not all(type(length) is int and length > 0 for length in lengths):
        raise ValueError("lengths are none of files")
    check_tensor("embeddings", content["embeddings"], TensorRule((len(lengths), width), (torch.float16,)), {})
    check_tensor("jpegs", content["jpegs"], TensorRule((sum(lengths),), (torch.uint8,)), {})
    jpegs = [part.numpy().tobytes() for part in content["jpegs"].split(lengths)]
    embeddings = content["embeddings"].numpy().astype("<f2").tobytes()
    return {LIST: b"", EMBEDDINGS: embeddings} | dict(zip(jpeg_names(len(lengths)), jpegs))


def _checked(listed: dict, parts: dict[str, bytes], owner: Owner, path: Path) -> Normals:
    """Return what a file holds. Raises ValueError for what cannot be, or does not fit the detector."""
    names = listed["names"]
    if not (isinstance(names, list) and all(isinstance(name, str) for name in names) and 0 < len(names) <= KEPT):
        raise ValueError(f"names are no list of 1 to {KEPT} names")
    numbers = listed["numbers"] if listed["version"] > 1 else [*range(len(names))]
    if len(numbers) != len(names) or not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError(f"numbers are not those of {len(names)} images")
    files = jpeg_names(len(names))
    if parts.keys() != {LIST, EMBEDDINGS, *files}:
        raise ValueError(f"its parts are not those of {len(names)} images")
    embeddings = np.frombuffer(parts[EMBEDDINGS], "<f2").reshape(len(names), owner.compared_width).astype(np.float32)
    if not (np.abs(np.linalg.norm(embeddings, axis=1) - 1) <= UNIT_ERROR).all():
        raise ValueError("embeddings are not of unit length")
    jpegs = [parts[name] for name in files]
    for name, jpeg in zip(names, jpegs):
        with Image.open(io.BytesIO(jpeg), formats=("JPEG",)) as image:
            if image.size != owner.size[::-1] or image.mode != "RGB":
                raise ValueError(f"{name} is {image.mode} of {image.size}, not RGB of {owner.size[::-1]}")
    return Normals(path, listed["detector"], numbers, names, jpegs, embeddings)
