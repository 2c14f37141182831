"""Score image files: threads decode some while the network scores others, so that any number needs little memory.

Owns what becomes of one image: its row, and when it is drawn; and ``Model``, which stands for a detector in any form.
Knows no flag, and not which files are meant. Works on arrays; imports torch only for a detector of torch.
"""

import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np

from conformal import FalseAlarmGuarantee, conformal_threshold
from prediction.exported import Exported
from prediction.outputs import COLUMNS, STATE, RowsFile, file_state
from reporting import overlays
from runtime.files import InputError, say
from runtime.image_files import FULL_RANGE, decode_with_size

if TYPE_CHECKING:
    from detector import BatchPrediction, Detector

T, R = TypeVar("T"), TypeVar("R")
EXPORTED_BATCH = 4  # images that go through an exported graph together: as fast as more, or faster
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


class BatchScores(NamedTuple):
    """Hold what a model says of B images, as arrays.

    scores, p_values: (B,) float64, see detector.BatchPrediction. maps: (B, H, W) float32 of a patch model, else None.
    compared: (B, D) float32 of unit length, what normal images are compared by; windows: (B, 3) of a patch model that
    knows nearest windows, see Detector.nearest_windows; both None where panels are not asked for. source: what a
    detector of torch has said, for Grad-CAM; None of other forms.
    """

    scores: np.ndarray
    p_values: np.ndarray
    maps: np.ndarray | None
    compared: np.ndarray | None = None
    windows: np.ndarray | None = None
    source: "BatchPrediction | None" = None


# What is called with each batch: paths, sizes (H, W) of the files, pixels (B, H, W, 3) uint8 as the detector sees them,
# what it says of them
Callback = Callable[[Sequence[str], Sequence[tuple[int, int]], np.ndarray, BatchScores], object]


@dataclass(frozen=True)
class Model:
    """Hold what a Scorer, a report and a warning need to know of a trained model, in whatever form that is.

    begin: images (B, H, W, 3) uint8, at most ``batch_size`` of ``size`` (H, W) -> what ``end`` takes; a GPU is not
    waited for. end: that -> the images as the model sees them, and what it says of them. ahead: takes an iterator of
    what ``begin`` gives, and gives it on when it should be waited for. heat: what the model says, and which of its
    images are chosen (default: all) -> their maps (n, H, W) float32 in the score's unit; None if it has none. has_maps:
    True if the score is the maximum of the map. An image with a p-value <=
    guarantee.rate is anomalous. white: of 16-bit images, see image_files.decode. category, unit: of the scores, in
    words. calibration_scores (n,): of normal images; appearance (n, 3): how those look, see looks.image_statistics; n
    is 0 if that is not known. made: for gallery.facts_of: settings, metadata, what runs it.
    """

    begin: Callable[[np.ndarray], T]
    end: Callable[[T], tuple[np.ndarray, BatchScores]]
    heat: Callable[..., np.ndarray] | None
    size: tuple[int, int]
    batch_size: int
    threshold: float
    guarantee: FalseAlarmGuarantee
    has_maps: bool
    white: int = FULL_RANGE
    category: str = ""
    unit: str = ""
    calibration_scores: np.ndarray = field(default_factory=lambda: np.empty(0))
    appearance: np.ndarray = field(default_factory=lambda: np.empty((0, 3), np.float32))
    made: tuple[dict, dict, str] = ({}, {}, "")
    ahead: Callable[[Iterator[T]], Iterator[T]] = iter

    @classmethod
    def of(cls, detector: "Detector", explain: bool) -> "Model":
        """Return a detector of torch as a Model. explain: keep the features that Grad-CAM and panels need."""
        import torch

        from density import has_gradient
        from runtime.gpu import issued_ahead, to_device

        @torch.inference_mode()
        def begin(images: np.ndarray) -> tuple:
            on_device = to_device(torch.from_numpy(images).permute(0, 3, 1, 2), detector.device)
            filled = detector.fill(on_device)
            return images if filled is on_device else filled, detector.predict_batch(filled, explain)

        def end(work: tuple) -> tuple[np.ndarray, BatchScores]:
            pixels, prediction = work
            if not isinstance(pixels, np.ndarray):
                pixels = pixels.permute(0, 2, 3, 1).cpu().numpy()
            return pixels, as_arrays(prediction)

        has_maps = detector.config.patches is not None
        has_heat = has_maps or has_gradient(detector.config.density)
        return cls(
            begin=begin,
            end=end,
            heat=torch.inference_mode()(partial(heat_maps, detector)) if has_heat else None,
            size=detector.config.size,
            batch_size=detector.batch_size,
            threshold=detector.threshold.item(),
            calibration_scores=detector.calibration_scores.cpu().numpy(),
            guarantee=detector.guarantee,
            has_maps=has_maps,
            white=detector.white,
            category=detector.config.category,
            unit=detector.unit,
            appearance=detector.appearance.cpu().numpy(),
            made=(detector.config.to_dict(), detector.metadata, f"torch {torch.__version__}"),
            ahead=partial(issued_ahead, device=detector.device),
        )

    @classmethod
    def of_exported(cls, exported: Exported, rate: float | None = None, threads: int = 1) -> "Model":
        """Return an exported detector as a Model; torch is not needed. rate: the false-alarm rate that is asked for;
        default: the detector's. threads: that score a batch each. One thread for a batch scores a quarter more than two
        that share its operations, and does not wait where another one decodes."""
        import onnxruntime

        facts, threshold = exported.facts, exported.threshold
        calibration_scores = np.array(facts["calibration_scores"])
        guarantee = FalseAlarmGuarantee(count=len(calibration_scores), **facts["guarantee"])
        if rate is not None:
            guarantee = replace(guarantee, asked=rate, chosen="")
            threshold = conformal_threshold(calibration_scores, rate)[0].item()

        pool = ThreadPoolExecutor(threads)

        def end(work: tuple[np.ndarray, Future]) -> tuple[np.ndarray, BatchScores]:
            images, (scores, p_values, *rest) = work[0], work[1].result()
            ranks = np.rint(p_values.astype(np.float64) * (guarantee.count + 1))
            p_values = ranks / (guarantee.count + 1)  # in float32 one could be above the rate that it is equal to
            return filled(images, facts["ignore"]), BatchScores(scores.astype(np.float64), p_values, *rest)

        return cls(
            begin=lambda images: (images, pool.submit(exported.run, images)),
            end=end,
            heat=(lambda prediction, chosen=slice(None): prediction.maps[chosen]) if exported.has_maps else None,
            size=exported.size,
            batch_size=EXPORTED_BATCH,
            threshold=threshold,
            calibration_scores=calibration_scores,
            guarantee=guarantee,
            has_maps=exported.has_maps,
            white=exported.white,
            category=exported.category,
            unit=facts["score_unit"],
            appearance=np.array(facts["appearance"], np.float32).reshape(-1, 3),
            made=(facts["config"], facts["metadata"], f"onnxruntime {onnxruntime.__version__}"),
            ahead=partial(begun_ahead, count=threads),
        )


def begun_ahead(items: Iterable[T], count: int) -> Iterator[T]:
    """Yield the items, each once ``count`` more were taken, or none is left."""
    waiting = deque()
    for item in items:
        waiting.append(item)
        if len(waiting) > count:
            yield waiting.popleft()
    yield from waiting


def as_arrays(prediction: "BatchPrediction") -> BatchScores:
    """Return what a detector of torch says of a batch as arrays; waits for a GPU."""
    parts = *prediction[:3], prediction.compared, prediction.windows
    return BatchScores(*(None if part is None else part.cpu().numpy() for part in parts), prediction)


def heat_maps(detector: "Detector", prediction: BatchScores, chosen: np.ndarray | slice = slice(None)) -> np.ndarray:
    """Return the maps (n, H, W) float32 of the chosen images of a batch, those of Grad-CAM in the score's unit. Raises
    InputError where a density has no gradient."""
    if prediction.maps is not None:
        return prediction.maps[chosen]
    maps = detector.heat(prediction.source, chosen).cpu().numpy()
    return np.stack([overlays.as_score(heat, score) for heat, score in zip(maps, prediction.scores[chosen].tolist())])


def filled(images: np.ndarray, ignore: dict | None) -> np.ndarray:
    """Return images (B, H, W, 3) with ignored pixels filled, as an exported detector sees them. ignore: see
    exported.RULES."""
    if ignore is None:
        return images
    pixels = images.reshape(len(images), -1, 3).copy()
    pixels[:, ignore["pixels"]] = pixels[:, ignore["sources"]]
    return pixels.reshape(images.shape)


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
        """Yield the files of each batch; of those that could be read pixels and what the model says of them, as a
        Callback takes them, None if there are none."""
        with closing(in_order(pool, self.read, paths, self.ahead)) as files:
            batches = iter(lambda: list(islice(files, self.model.batch_size)), [])
            for batch, work in self.model.ahead(map(self.begin, batches)):
                yield batch, *((None, None) if work is None else self.model.end(work))

    def check_earlier(self, paths: list[str], rows: RowsFile) -> None:
        """Raise InputError if earlier rows, by path, are another detector's or were decided at another rate.

        Some images are scored again. All must have their old scores; where a row does not say which file it was made
        from, as in files of earlier versions, the image may have been replaced since: there one is enough.
        """
        instead = "another --output, or --overwrite"
        files = [file for file in map(self.read, paths[:ROWS_COMPARED]) if file.error is None]
        if files:
            scores = self.model.end(self.begin(files)[1])[1].scores
            earlier = np.array([rows.done[file.path] for file in files])
            same = np.isclose(scores, earlier, rtol=SAME_SCORE)
            certain = np.array([bool(rows.told[file.path][-1]) for file in files])
            if not (same[certain].all() if certain.any() else same.any()):
                first = int(np.flatnonzero(~same)[0])
                differ = f"has the score {earlier[first]:.4g} there, this detector gives {scores[first]:.4g}"
                other = f"is another detector's ({files[first].path} {differ}), or of before a --refit"
                raise InputError(f"{rows.path}: {other}; {instead}")
        for path in paths:
            anomalous, _, p_value, *_ = rows.told[path]
            if p_value and anomalous != (float(p_value) <= self.model.guarantee.rate):
                there = f"{path} has p {float(p_value):.3g} and anomalous {int(anomalous)} there"
                other = f"was decided at another rate than {self.model.guarantee.rate:.3g} ({there})"
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

    def begin(self, batch: list[ImageFile]) -> tuple[list[ImageFile], object]:
        """Return a batch of files, and what the model has begun with of those that could be read; None if there are
        none."""
        pixels = [file.pixels for file in batch if file.error is None]
        return batch, self.model.begin(np.stack(pixels)) if pixels else None

    def rows(
        self,
        batch: list[ImageFile],
        pixels: np.ndarray | None,
        prediction: BatchScores | None,
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
            decided = [p <= self.model.guarantee.rate for p in p_values]
            levels = [overlays.drawn_above(heat, self.model.threshold, p) for heat, p in zip(maps, decided)]
        errors = pool.map(self.draw_one, files, maps, levels) if self.draw else [None] * len(files)
        for file, score, p, heat, level, error in zip(files, scores, p_values, maps, levels, errors):
            error = error or (None if math.isfinite(score) else "its score is not finite; train the detector again")
            if error:
                rows[file.path]["error"] = error
                continue
            rows[file.path] |= {"score": score, "p_value": p, "anomalous": int(p <= self.model.guarantee.rate)}
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
