"""Score image files: threads decode some while the network scores others, so that any number needs little memory.

Owns what becomes of one image: its row, and when it is drawn. Knows no flag, and not which files are meant.
"""

import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import closing
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from itertools import islice
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from detector import BatchPrediction, Detector
from prediction.outputs import COLUMNS, STATE, RowsFile, file_state
from reporting import overlays
from runtime.files import InputError, say
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
    error that says why there are none. state: of the file before it was read."""

    path: str
    pixels: np.ndarray | None = None
    size: tuple[int, int] | None = None
    error: str | None = None
    state: tuple[str, str] | None = None  # see outputs.file_state


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
    path, its heat (h, w) and overlays.drawn_above of it, raises InputError where it cannot; None: nothing is drawn.
    first: columns that come before those of an image, and their values. shows: callbacks, too, that show something of
    each image; they and ``draw`` get an image that was scored before once more if ``lacks``, called with its path and
    whether it is anomalous, says so. stamped: rows tell when they were made. on_rows: called
    with new rows once they are written.
    """

    def __init__(
        self,
        model: Model,
        ahead: int,
        draw: Callable[[str, np.ndarray, float | None], object] | None = None,
        callbacks: Sequence[Callback] = (),
        first: dict[str, str] | None = None,
        shows: Sequence[Callback] = (),
        lacks: Callable[[str, bool], bool] = lambda path, anomalous: False,
        stamped: bool = False,
        on_rows: Callable[[list[dict]], object] = lambda rows: None,
    ) -> None:
        self.model, self.ahead, self.draw, self.callbacks = model, model.batch_size + ahead, draw, callbacks
        self.shows, self.lacks, self.stamped, self.on_rows = shows, lacks, stamped, on_rows
        self.empty_row = (first or {}) | dict.fromkeys(COLUMNS)

    def score(self, paths: Iterable[str], rows: RowsFile, pool: Executor, tell: Callable[[int], object]) -> None:
        """Add a row for each path that has none, or an outdated one, one batch at a time, and call ``tell`` with the
        size of each batch. Raises InputError if rows that are there already are another detector's."""
        paths = list(paths)
        outdated = {path for path in paths if rows.outdated(path)}
        scored = [path for path in paths if rows.done.get(path) is not None and path not in outdated]
        self.check_earlier(scored, rows)
        shown_again = [path for path in scored if self.lacks(path, rows.told[path][0])]
        if shown_again:
            say(f"{len(shown_again)} images that have a row are looked at again, to be shown")
        for batch, pixels, prediction in self.predictions(shown_again, pool):
            self.rows(batch, pixels, prediction, pool, self.shows)
            tell(0)
        rows.forget(outdated)
        missing = (path for path in paths if path not in rows.done)
        for batch, pixels, prediction in self.predictions(missing, pool):
            new = self.rows(batch, pixels, prediction, pool, (*self.callbacks, *self.shows))
            rows.add(new)
            self.on_rows(new)
            tell(len(batch))

    def predictions(self, paths: Iterable[str], pool: Executor) -> Iterator[tuple]:
        """Yield what ``predict`` returns, batch by batch."""
        with closing(in_order(pool, self.read, paths, self.ahead)) as files:
            batches = iter(lambda: list(islice(files, self.model.batch_size)), [])
            yield from issued_ahead(map(self.predict, batches), self.model.device)

    @torch.inference_mode()
    def check_earlier(self, paths: list[str], rows: RowsFile) -> None:
        """Raise InputError if earlier rows, by path, are another detector's or were decided at another rate.

        Some images are scored again. All must have their old scores; where a row does not say which file it was made
        from, as in files of earlier versions, the image may have been replaced since: there one is enough.
        """
        instead = "another --output, or --overwrite"
        files = [file for file in map(self.read, paths[:ROWS_COMPARED]) if file.error is None]
        if files:
            scores = self.model.predict(self.view(files)).scores.cpu()
            earlier = torch.tensor([rows.done[file.path] for file in files], dtype=scores.dtype)
            same = torch.isclose(scores, earlier, rtol=SAME_SCORE)
            certain = torch.tensor([bool(rows.told[file.path][-1]) for file in files])
            if not (same[certain].all() if certain.any() else same.any()):
                first = int((~same).nonzero()[0])
                differ = f"has the score {earlier[first]:.4g} there, this detector gives {scores[first]:.4g}"
                other = f"is another detector's ({files[first].path} {differ}), or of before a --refit"
                raise InputError(f"{rows.path}: {other}; {instead}")
        for path in paths:
            anomalous, _, p_value, *_ = rows.told[path]
            if p_value and anomalous != (float(p_value) <= self.model.rate):
                there = f"{path} has p {float(p_value):.3g} and anomalous {int(anomalous)} there"
                other = f"was decided at another rate than {self.model.rate:.3g} ({there})"
                raise InputError(f"{rows.path}: {other}; {instead}")

    def read(self, path: str) -> ImageFile:
        """Open and decode a file, once."""
        state = file_state(path)
        try:
            if os.path.exists(path) and not os.path.isfile(path):
                raise InputError("no file, or a folder that cannot be listed")
            return ImageFile(path, *decode_with_size(path, self.model.size, self.model.white), state=state)
        except InputError as error:
            return ImageFile(path, error=reason(error, path), state=state)

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
        self,
        batch: list[ImageFile],
        pixels: Tensor | None,
        prediction: BatchPrediction | None,
        pool: Executor,
        callbacks: Iterable[Callback],
    ) -> list[dict]:
        """Return the rows of a batch of files. What is drawn of them is in place by then."""
        now = datetime.now().astimezone().isoformat(timespec="seconds") if self.stamped else None
        rows = {}
        for file in batch:
            state = dict(zip(STATE, (now, *(file.state or (None, None)))))
            rows[file.path] = self.empty_row | {"path": file.path, "error": file.error} | state
        files = [file for file in batch if file.error is None]
        if not files:
            return list(rows.values())
        maps = self.model.heat(prediction) if self.model.has_maps or self.draw else [None] * len(files)
        scores, p_values = prediction.scores.tolist(), prediction.p_values.tolist()
        levels = [None] * len(files)
        if self.model.has_maps:
            decisions = zip(maps, p_values)
            levels = [overlays.drawn_above(heat, self.model.threshold, p <= self.model.rate) for heat, p in decisions]
        errors = pool.map(self.draw_one, files, maps, levels) if self.draw else [None] * len(files)
        for file, score, p, heat, level, error in zip(files, scores, p_values, maps, levels, errors):
            error = error or (None if math.isfinite(score) else "its score is not finite; train the detector again")
            if error:
                rows[file.path]["error"] = error
                continue
            rows[file.path] |= {"score": score, "p_value": p, "anomalous": int(p <= self.model.rate)}
            if self.model.has_maps and (box := overlays.region(heat, level, file.size)):
                rows[file.path] |= dict(zip(("x", "y", "width", "height"), box))
        for callback in callbacks:
            callback([file.path for file in files], [file.size for file in files], pixels, prediction)
        return list(rows.values())

    def draw_one(self, file: ImageFile, heat: np.ndarray, level: float | None) -> str | None:
        """Draw an image with its heat (h, w); return why that failed."""
        try:
            self.draw(file.path, heat, level)
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
