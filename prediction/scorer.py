"""A detector at work on files: decoding in parallel with scoring, rows of any number of images in little memory.

Owns what becomes of one image: its row, and what is drawn of it. Knows no flag, and not which files are meant.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import closing
from itertools import islice
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from detector import BatchPrediction, Detector
from prediction.outputs import COLUMNS, Drawings, RowsFile
from reporting import overlays
from runtime.files import InputError
from runtime.image_files import decode, read_size

T, R = TypeVar("T"), TypeVar("R")
RECALLED = 3  # images of earlier rows that are scored again
SAME_SCORE = 0.01  # relative difference; devices and batches round otherwise, in bfloat16 by a few thousandths


class Callback(Protocol):
    """What looks at all images as they are scored."""

    def on_batch(self, paths: Sequence[str], pixels: Tensor, prediction: BatchPrediction) -> None:
        """Images by path, (B, 3, H, W) uint8 on the detector's device, and what the detector says of them."""

    def on_end(self) -> None:
        """There are no more images."""


class Read(NamedTuple):
    """A file, its pixels (h, w, 3) uint8 at the detector's size, and its own size (H, W), which only patch models
    need; or why there are none."""

    path: str
    pixels: np.ndarray | None = None
    size: tuple[int, int] | None = None
    error: str | None = None


class Scorer:
    """Paths in, rows and drawings out.

    first: the first columns of each row; folders: those that drawings are named from; ahead: images that are decoded
    before their turn, beside those that go through the detector together.
    """

    def __init__(
        self,
        detector: Detector,
        first: dict[str, str],
        drawings: Drawings,
        folders: Sequence[str],
        ahead: int,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        self.detector, self.first, self.drawings, self.folders = detector, first, drawings, folders
        self.ahead, self.callbacks = detector.batch_size + ahead, callbacks
        self.has_maps = detector.config.patches is not None
        self.threshold, self.rate = detector.threshold.item(), detector.guarantee.rate
        needs_features = any(getattr(callback, "needs_features", False) for callback in callbacks)
        self.explains = needs_features or (bool(drawings) and not self.has_maps)

    def score(self, paths: Sequence[str], rows: RowsFile, pool: Executor, tell: Callable[[int], object]) -> None:
        """Add a row for each path that has none; as many as go through the detector together are written at once, then
        ``tell`` is called with their number. Raises InputError if rows that are there are another detector's."""
        known = (path for path in paths if rows.done.get(path) is not None)
        self.check(list(islice(known, RECALLED)), rows)
        missing = (path for path in paths if path not in rows.done)
        with closing(in_order(pool, self.read, missing, self.ahead)) as found:
            while block := list(islice(found, self.detector.batch_size)):
                rows.add(self.rows(block, pool))
                tell(len(block))

    def on_end(self) -> None:
        """No more images will come."""
        for callback in self.callbacks:
            callback.on_end()

    def check(self, paths: list[str], rows: RowsFile) -> None:
        """Hold the scores of earlier rows against what this detector says. An image may have been replaced since, or
        be gone: only where all of several differ the rows are of another detector."""
        found = [each for each in map(self.read, paths) if each.error is None]
        if not found:
            return
        pixels = torch.from_numpy(np.stack([each.pixels for each in found])).permute(0, 3, 1, 2)
        with torch.inference_mode():
            scores = self.detector(pixels.to(self.detector.device))[0].cpu()
        known = torch.tensor([rows.done[each.path] for each in found], dtype=scores.dtype)
        if not torch.isclose(scores, known, rtol=SAME_SCORE).any():
            was = f"{found[0].path} has the score {known[0]:.4g} there, this detector gives {scores[0]:.4g}"
            raise InputError(f"{rows.path}: is another detector's ({was}); another --output, or --overwrite")

    def read(self, path: str) -> Read:
        try:
            if os.path.exists(path) and not os.path.isfile(path):
                raise InputError("no file, or a folder that cannot be listed")
            return Read(path, decode(path, self.detector.config.size), read_size(path) if self.has_maps else None)
        except InputError as error:
            return Read(path, error=reason(error, path))

    @torch.inference_mode()
    def rows(self, block: list[Read], pool: Executor) -> list[dict]:
        """Rows of images, whose drawings are in place when they come."""
        empty = self.first | dict.fromkeys(COLUMNS)
        rows = {each.path: empty | {"path": each.path, "error": each.error} for each in block}
        good = [each for each in block if each.error is None]
        if not good:
            return list(rows.values())
        pixels = torch.from_numpy(np.stack([each.pixels for each in good])).permute(0, 3, 1, 2)
        pixels = self.detector.fill(pixels.to(self.detector.device))  # as callbacks shall see them
        prediction = self.detector.predict_batch(pixels, explain=self.explains)
        scores, p_values = prediction.scores.tolist(), prediction.p_values.tolist()
        drawn = self.has_maps or self.drawings
        maps = list(self.detector.heat(prediction).cpu().numpy()) if drawn else [None] * len(good)
        faults = [None] * len(good)
        if self.drawings:
            faults = list(pool.map(self.draw, [each.path for each in good], scores, maps))
        for each, score, p, heat, fault in zip(good, scores, p_values, maps, faults):
            if fault:
                rows[each.path]["error"] = fault
                continue
            rows[each.path] |= {"score": score, "p_value": p, "anomalous": int(p <= self.rate)}
            if self.has_maps and (box := overlays.region(heat, self.threshold, each.size)):
                rows[each.path] |= dict(zip(("x", "y", "width", "height"), box))
        for callback in self.callbacks:
            callback.on_batch([each.path for each in good], pixels, prediction)
        return list(rows.values())

    def draw(self, path: str, score: float, heat: np.ndarray) -> str | None:
        """Draw an image with a map (h, w). Returns why it cannot be drawn."""
        if not self.has_maps:
            heat = overlays.as_score(heat, score)
        try:
            self.drawings.draw(path, self.folders, heat, self.threshold, outlined=self.has_maps)
        except InputError as error:
            return reason(error, path)


def reason(error: InputError, path: str) -> str:
    """What is wrong with a file, in one line, without its path."""
    return " ".join(str(error).removeprefix(f"{path}: ").splitlines())


def in_order(pool: Executor, work: Callable[[T], R], items: Iterable[T], ahead: int) -> Iterator[R]:
    """work(item) of each, in order, done by a pool that is at most ``ahead`` items in front of who takes them."""
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
