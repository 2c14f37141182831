"""Score image files: threads decode some while the network scores others, so that any number needs little memory.

Owns what becomes of one image: its row, and when it is drawn. Knows no flag, and not which files are meant.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from detector import BatchPrediction, Detector
from prediction.outputs import COLUMNS, RowsFile
from reporting import overlays
from runtime.files import InputError
from runtime.gpu import issued_ahead, to_device
from runtime.image_files import FULL_RANGE, decode_with_size

T, R = TypeVar("T"), TypeVar("R")
# What is called with each batch: paths, sizes (H, W) of the files, pixels (B, 3, H, W) uint8 as the detector sees them
# and on its device, what it says of them
Callback = Callable[[Sequence[str], Sequence[tuple[int, int]], Tensor, BatchPrediction], object]
ROWS_COMPARED = 3  # earlier rows whose images are scored again
SAME_SCORE = 0.01  # relative difference; devices and batches round otherwise, in bfloat16 by a few thousandths


class ImageFile(NamedTuple):
    """One file that was read: pixels (h, w, 3) uint8 at the model's size, and the file's own size (H, W); or only the
    error that says why there are none."""

    path: str
    pixels: np.ndarray | None = None
    size: tuple[int, int] | None = None
    error: str | None = None


@dataclass(frozen=True)
class Model:
    """Hold what a Scorer needs to know of a trained model, in whatever form that is.

    view: images (B, 3, H, W) uint8 on the CPU, at most ``batch_size`` of ``size`` (H, W) -> the same as the model sees
    them, on its device. predict: those -> what the model says of them. heat: that -> maps (B, H, W) float32 in the
    score's unit. has_maps: True if the score is the maximum of the map. rate: an image with a p-value <= rate is
    anomalous. device: where the model is. white: of 16-bit images, see image_files.decode.
    """

    view: Callable[[Tensor], Tensor]
    predict: Callable[[Tensor], BatchPrediction]
    heat: Callable[[BatchPrediction], np.ndarray]
    size: tuple[int, int]
    batch_size: int
    threshold: float
    rate: float
    has_maps: bool
    device: torch.device
    white: int = FULL_RANGE

    @classmethod
    def of(cls, detector: Detector, explain: bool) -> "Model":
        """Return a detector as a Model. explain: keep the features that Grad-CAM and panels need."""
        return cls(
            view=lambda images: detector.fill(to_device(images, detector.device)),
            predict=partial(detector.predict_batch, explain=explain),
            heat=partial(heat_maps, detector),
            size=detector.config.size,
            batch_size=detector.batch_size,
            threshold=detector.threshold.item(),
            rate=detector.guarantee.rate,
            has_maps=detector.config.patches is not None,
            device=detector.device,
            white=detector.white,
        )


def heat_maps(detector: Detector, prediction: BatchPrediction, chosen: Tensor | slice = slice(None)) -> np.ndarray:
    """Return the maps (n, H, W) float32 of the chosen images of a batch, those of Grad-CAM in the score's unit. Raises
    InputError where a density has no gradient."""
    maps = detector.heat(prediction, chosen).cpu().numpy()
    if prediction.maps is not None:
        return maps
    return np.stack([overlays.as_score(heat, score) for heat, score in zip(maps, prediction.scores[chosen].tolist())])


class Scorer:
    """Paths in; rows, drawings and calls of callbacks out.

    ahead: how many images are decoded before their turn, beside those of one batch. draw: called in threads with each
    path and its heat (h, w), raises InputError where it cannot; None: nothing is drawn. first: columns that come before
    those of an image, and their values.
    """

    def __init__(
        self,
        model: Model,
        ahead: int,
        draw: Callable[[str, np.ndarray], object] | None = None,
        callbacks: Sequence[Callback] = (),
        first: dict[str, str] | None = None,
    ) -> None:
        self.model, self.ahead, self.draw, self.callbacks = model, model.batch_size + ahead, draw, callbacks
        self.empty_row = (first or {}) | dict.fromkeys(COLUMNS)

    def score(self, paths: Iterable[str], rows: RowsFile, pool: Executor, tell: Callable[[int], object]) -> None:
        """Add a row for each path that has none, one batch at a time, and call ``tell`` with the size of each batch.
        Raises InputError if rows that are there already are another detector's."""
        scored = (path for path in paths if rows.done.get(path) is not None)
        self.check_earlier(list(islice(scored, ROWS_COMPARED)), rows)
        missing = (path for path in paths if path not in rows.done)
        with closing(in_order(pool, self.read, missing, self.ahead)) as files:
            batches = iter(lambda: list(islice(files, self.model.batch_size)), [])
            for batch, pixels, prediction in issued_ahead(map(self.predict, batches), self.model.device):
                rows.add(self.rows(batch, pixels, prediction, pool))
                tell(len(batch))

    @torch.inference_mode()
    def check_earlier(self, paths: list[str], rows: RowsFile) -> None:
        """Score images of earlier rows again, and raise InputError if none has its old score. An image may have been
        replaced since, or be gone: only if all of several differ, the rows are another detector's."""
        files = [file for file in map(self.read, paths) if file.error is None]
        if not files:
            return
        scores = self.model.predict(self.view(files)).scores.cpu()
        earlier = torch.tensor([rows.done[file.path] for file in files], dtype=scores.dtype)
        if not torch.isclose(scores, earlier, rtol=SAME_SCORE).any():
            both = f"{files[0].path} has the score {earlier[0]:.4g} there, this detector gives {scores[0]:.4g}"
            raise InputError(f"{rows.path}: is another detector's ({both}); another --output, or --overwrite")

    def read(self, path: str) -> ImageFile:
        """Open and decode a file, once."""
        try:
            if os.path.exists(path) and not os.path.isfile(path):
                raise InputError("no file, or a folder that cannot be listed")
            return ImageFile(path, *decode_with_size(path, self.model.size, self.model.white))
        except InputError as error:
            return ImageFile(path, error=reason(error, path))

    def view(self, files: list[ImageFile]) -> Tensor:
        """Return files as the model sees them, (B, 3, H, W)."""
        return self.model.view(torch.from_numpy(np.stack([file.pixels for file in files])).permute(0, 3, 1, 2))

    @torch.inference_mode()
    def predict(self, batch: list[ImageFile]) -> tuple[list[ImageFile], Tensor | None, BatchPrediction | None]:
        """Return a batch of files, those that could be read as the model sees them, and what it says of them; None if
        there are none. A GPU is not waited for."""
        files = [file for file in batch if file.error is None]
        pixels = self.view(files) if files else None
        return batch, pixels, self.model.predict(pixels) if files else None

    @torch.inference_mode()
    def rows(
        self, batch: list[ImageFile], pixels: Tensor | None, prediction: BatchPrediction | None, pool: Executor
    ) -> list[dict]:
        """Return the rows of a batch of files. What is drawn of them is in place by then."""
        rows = {file.path: self.empty_row | {"path": file.path, "error": file.error} for file in batch}
        files = [file for file in batch if file.error is None]
        if not files:
            return list(rows.values())
        maps = self.model.heat(prediction) if self.model.has_maps or self.draw else [None] * len(files)
        errors = pool.map(self.draw_one, files, maps) if self.draw else [None] * len(files)
        scores, p_values = prediction.scores.tolist(), prediction.p_values.tolist()
        for file, score, p, heat, error in zip(files, scores, p_values, maps, errors):
            if error:
                rows[file.path]["error"] = error
                continue
            rows[file.path] |= {"score": score, "p_value": p, "anomalous": int(p <= self.model.rate)}
            if self.model.has_maps and (box := overlays.region(heat, self.model.threshold, file.size)):
                rows[file.path] |= dict(zip(("x", "y", "width", "height"), box))
        for callback in self.callbacks:
            callback([file.path for file in files], [file.size for file in files], pixels, prediction)
        return list(rows.values())

    def draw_one(self, file: ImageFile, heat: np.ndarray) -> str | None:
        """Draw an image with its heat (h, w); return why that failed."""
        try:
            self.draw(file.path, heat)
        except InputError as error:
            return reason(error, file.path)


def reason(error: InputError, path: str) -> str:
    """Return what is wrong with a file, in one line, without its path."""
    return " ".join(str(error).removeprefix(f"{path}: ").splitlines())


def in_order(pool: Executor, work: Callable[[T], R], items: Iterable[T], ahead: int) -> Iterator[R]:
    """Yield work(item) for each item, in order; the pool works on at most ``ahead`` items that nobody has asked for."""
    waiting = deque()
    try:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()
