"""The normal images kept beside a detector, and which of them is nearest to a new one.

<model_dir>/<category>.normals      at most KEPT training images as JPEG files, their names, embeddings
"""

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dataset import TrainSet
from detector import Detector, batches_of, evenly_spaced
from runtime.files import InputError, damage_named, load_tensors, save_tensors
from runtime.image_files import encode
from runtime.tensors import TensorRule, check_tensor

FORMAT = "cutpaste-normals"
VERSION = 2
SUFFIX = ".normals"  # not that of detectors, which are found by theirs
KEPT = 1000  # normal images that are kept
ANEW = "train anew with --explain 1 --overwrite"
QUALITY = 85  # of their JPEG files
UNIT_ERROR = 0.01  # of the length of an embedding, which is kept in half precision


# The file ---------------------------------------------------------------------------------------------------------


def normals_path(detector_path: str | Path) -> Path:
    """Return the path of the file beside a detector's."""
    return Path(detector_path).with_suffix(SUFFIX)


@dataclass(frozen=True)
class Normals:
    """N normal images. jpegs: their files at the detector's size; embeddings: (N, D) float32 of unit length. numbers:
    where they stand among the training images. path: of the file."""

    path: Path
    numbers: list[int]
    names: list[str]
    jpegs: list[bytes]
    embeddings: Tensor

    def image(self, number: int) -> np.ndarray:
        """Return an image, (H, W, 3) uint8. Raises InputError if its JPEG file is damaged."""
        try:
            return np.array(Image.open(io.BytesIO(self.jpegs[number]), formats=("JPEG",)))
        except (OSError, SyntaxError, ValueError) as error:
            raise InputError(f"{self.path}: {self.names[number]} cannot be decoded ({error}); {ANEW}") from error

    def nearest(self, embeddings: Tensor) -> list[int]:
        """Return the numbers of the images whose embeddings have the smallest angle to each of (B, D)."""
        return (embeddings.cpu() @ self.embeddings.T).argmax(1).tolist()


@torch.inference_mode()
def save_normals(detector: Detector, train: TrainSet, path: str | Path) -> None:
    """Write the file of a fitted detector, whole or not at all: at most KEPT of its training images, evenly spaced.
    Raises OSError if it cannot be written."""
    jpegs, embeddings = [], []
    numbers = evenly_spaced(len(train), KEPT)
    for block in batches_of(detector, train.images, numbers=numbers):
        features = detector.members[0].features(detector.prepare(block), [detector.comparison_level])
        embeddings.append(detector.compared(features).half().cpu())
        pictures = map(Image.fromarray, block.permute(0, 2, 3, 1).cpu().numpy())
        # Subsampled, colors of thin lines would get lost
        jpegs += [encode(picture, "JPEG", quality=QUALITY, subsampling="4:4:4") for picture in pictures]
    content = {
        "format": FORMAT,
        "version": VERSION,
        "detector": detector.normals_digest,
        "numbers": numbers.tolist(),
        "names": [train.paths[number].name for number in numbers.tolist()],
        "lengths": [len(jpeg) for jpeg in jpegs],
        "jpegs": torch.from_numpy(np.frombuffer(b"".join(jpegs), np.uint8).copy()),
        "embeddings": torch.cat(embeddings),
    }
    save_tensors(content, path)


def load_normals(path: str | Path, detector: Detector) -> Normals:
    """Read the file that was written with a detector. Raises InputError if it is missing, damaged, of a newer format,
    or of another training."""
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file; no normal images were kept: {ANEW}")
    content = load_tensors(path, "normals")
    if content.get("format") != FORMAT:
        raise InputError(f"{path}: not a file of normal images; {ANEW}")
    if content.get("version") not in (1, VERSION):
        versions = f"format {content.get('version')}, this program reads {VERSION}"
        raise InputError(f"{path}: {versions}; update the program, or {ANEW}")
    if content.get("detector") != detector.normals_digest:
        raise InputError(f"{path}: was written with another detector than the one beside it; {ANEW}")
    with damage_named(path, "normals", ANEW):
        return _checked(content, detector, Path(path))


def _checked(content: dict, detector: Detector, path: Path) -> Normals:
    """Return what a file holds. Raises ValueError for what cannot be, or does not fit the detector."""
    names, lengths = content["names"], content["lengths"]
    if not (isinstance(names, list) and all(isinstance(name, str) for name in names) and 0 < len(names) <= KEPT):
        raise ValueError(f"names are no list of 1 to {KEPT} names")
    numbers = content["numbers"] if content["version"] > 1 else [*range(len(names))]
    if len(numbers) != len(names) or not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError(f"numbers are not those of {len(names)} images")
    if len(lengths) != len(names) or not all(type(length) is int and length > 0 for length in lengths):
        raise ValueError(f"lengths are not those of {len(names)} images")
    rule = TensorRule((len(names), detector.compared_width), (torch.float16,))
    check_tensor("embeddings", content["embeddings"], rule, {})
    check_tensor("jpegs", content["jpegs"], TensorRule((sum(lengths),), (torch.uint8,)), {})
    embeddings = content["embeddings"].float()
    if ((embeddings.norm(dim=1) - 1).abs() > UNIT_ERROR).any():
        raise ValueError("embeddings are not of unit length")
    jpegs = [part.numpy().tobytes() for part in content["jpegs"].split(lengths)]
    for name, jpeg in zip(names, jpegs):
        with Image.open(io.BytesIO(jpeg), formats=("JPEG",)) as image:
            if image.size != detector.config.size[::-1] or image.mode != "RGB":
                raise ValueError(f"{name} is {image.mode} of {image.size}, not RGB of {detector.config.size[::-1]}")
    return Normals(path, numbers, names, jpegs, embeddings)
