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

import overlays
from dataset import decode, read_size
from detector import Detector, Judged
from drawings import Drawings
from rows_file import COLUMNS, RowsFile
from runtime.files import InputError

T, R = TypeVar("T"), TypeVar("R")


class Follower(Protocol):
    """What looks at all images as they are scored."""

    def add(self, paths: Sequence[str], pixels: Tensor, judged: Judged) -> None:
        """Images by path, (B, 3, H, W) uint8 on the detector's device, and what the detector says of them."""

    def end(self) -> None:
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
        followers: Sequence[Follower] = (),
    ) -> None:
        self.detector, self.first, self.drawings, self.folders = detector, first, drawings, folders
        self.ahead, self.followers = detector.at_once + ahead, followers
        self.has_maps = detector.config.patches is not None
        self.threshold, self.rate = detector.threshold.item(), detector.promise.rate

    def score(self, paths: Iterable[str], rows: RowsFile, pool: Executor, tell: Callable[[int], object]) -> None:
        """Add a row for each path that has none; as many as go through the detector together are written at once, then
        ``tell`` is called with their number."""
        missing = (path for path in paths if path not in rows.done)
        with closing(in_order(pool, self.read, missing, self.ahead)) as found:
            while block := list(islice(found, self.detector.at_once)):
                rows.add(self.rows(block, pool))
                tell(len(block))

    def end(self) -> None:
        """No more images will come."""
        for follower in self.followers:
            follower.end()

    def read(self, path: str) -> Read:
        try:
            if os.path.exists(path) and not os.path.isfile(path):
                raise InputError("no file, or a folder that cannot be listed")
            return Read(path, decode(path, self.detector.size), read_size(path) if self.has_maps else None)
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
        pixels = pixels.to(self.detector.device)
        judged = self.detector.judge(pixels, grad_cam=bool(self.drawings) and not self.has_maps)
        scores, p_values = judged.scores.tolist(), judged.p_values.tolist()
        maps = [None] * len(good) if judged.maps is None else list(judged.maps.cpu().numpy())
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
        for follower in self.followers:
            follower.add([each.path for each in good], pixels, judged)
        return list(rows.values())

    def draw(self, path: str, score: float, heat: np.ndarray) -> str | None:
        """Draw an image with a map (h, w). Returns why it cannot be drawn."""
        if not self.has_maps:  # brought to the score's unit, as the maximum of a patch model's map is its score
            heat = heat * np.float32(max(score, 0) / max(heat.max(), 1e-30))
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
