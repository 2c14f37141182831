"""What an evaluation leaves in words and figures: the lines on stdout and the rows of the tables.

Owns the names of lines and columns. Writes no file; chooses nothing.
"""

from collections.abc import Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from conformal import FalseAlarmGuarantee, proportion_interval
from dataset import TestSet
from detector import Detector
from reporting.metrics import image_metrics
from runtime.cli import command_line

if TYPE_CHECKING:
    pass


LINES = {  # on stdout, for columns of results.csv
    "image_auroc": "AUC",
    "pixel_auroc": "pixel AUROC",
    "aupro": "AUPRO",
    "control_auroc": "control AUC",
    "control_pixel_auroc": "control pixel AUROC",
}


# Lines ------------------------------------------------------------------------------------------------------------


def print_lines(row: dict) -> None:
    """The lines of one category on stdout."""
    for column, name in LINES.items():
        if row[column] is not None:
            print(f"{row['category']} {name}: {row[column]}", flush=True)


def print_average(rows: list[dict]) -> None:
    for column, name in LINES.items():
        values = [row[column] for row in rows if row[column] is not None]
        if values:
            print(f"average {name}: {float(np.mean(values))}", flush=True)


def missing(test: TestSet, masks: np.ndarray | None, metrics: dict) -> Iterator[str]:
    """Where metrics are missing, or of fewer images, and why."""
    if "image_auroc" not in metrics:
        kind = "normal" if test.labels.any() else "anomalous"
        yield f"no {kind} test image, so no AUC; the scores are in scores.csv"
    if masks is None:
        return
    bare = int((~test.with_truth).sum())
    if bare and bare == test.labels.sum():
        yield "no masks in ground_truth, so image metrics only"
        return
    if bare:
        yield f"{bare} anomalous images without a mask, left out of the pixel metrics"
    share = masks[test.with_truth].mean()
    if share in (0, 1) and test.labels.any():
        yield f"the masks mark {'every' if share else 'no'} pixel, so image metrics only"


# Several seeds ----------------------------------------------------------------------------------------------------


def seed_row(rows: Sequence[dict], labels: np.ndarray, scores: Sequence[np.ndarray]) -> dict:
    """A row of seeds.csv: of one category's rows of results.csv, one a seed, mean and standard error of each figure,
    and the image AUROC of the mean of their scores. scores: of each seed, (M,), standardized; labels: (M,)."""
    row = {"category": rows[0]["category"], "seeds": len(rows)}
    for column in LINES:
        values = [each[column] for each in rows]
        known = None not in values and len(values) > 1
        row[column] = float(np.mean(values)) if None not in values else None
        row[f"{column}_standard_error"] = float(np.std(values, ddof=1) / len(values) ** 0.5) if known else None
    both = 0 < labels.sum() < len(labels)
    row["averaged_auroc"] = image_metrics(labels, np.mean(scores, 0))["image_auroc"] if both else None
    return row


def print_seed_lines(row: dict) -> None:
    """The lines of one category on stdout: means over seeds, their standard errors, and of averaged scores."""
    for column, name in LINES.items():
        if row[column] is not None:
            print(f"{row['category']} {name}: {row[column]}")
        if (error := row[f"{column}_standard_error"]) is not None:
            print(f"{row['category']} {name} standard error: {error}")
    if row["averaged_auroc"] is not None:
        print(f"{row['category']} AUC of averaged scores: {row['averaged_auroc']}", flush=True)


# Tables -----------------------------------------------------------------------------------------------------------


def result_row(detector: Detector, test: TestSet, scores: np.ndarray, p: np.ndarray, metrics: dict) -> dict:
    """One row of results.csv: figures as fractions, counts, and how detector and figures were made."""
    normal, anomalous = test.labels == 0, test.labels == 1
    above, row = scores > detector.threshold.item(), {"category": detector.config.category}
    row |= {name: metrics.get(name) for name in ("image_auroc", "image_auprc", "best_f1")}
    row["control_auroc"] = metrics.get("control_image_auroc")
    row |= {name: metrics.get(name) for name in ("pixel_auroc", "aupro", "control_pixel_auroc")}
    row |= {
        "test_normal": int(normal.sum()),
        "test_anomalous": int(anomalous.sum()),
        "threshold": detector.threshold.item(),
        "normal_above_threshold": int(above[normal].sum()),
        "anomalous_above_threshold": int(above[anomalous].sum()),
    }
    row |= decisions(detector.guarantee, p[normal], p[anomalous])
    made = {"eval_command": command_line(), "eval_torch": str(torch.__version__), "eval_date": date.today().isoformat()}
    return record(detector, row) | made


def decisions(guarantee: FalseAlarmGuarantee, normal: np.ndarray, anomalous: np.ndarray) -> dict:
    """Columns of results.csv: what deciding by p-values comes to, of those of normal and of anomalous test images,
    with 95 % intervals, beside what is promised."""
    row = {"normal_scores": guarantee.kind, "promised_rate": guarantee.rate}
    row["promised_low"], row["promised_high"] = guarantee.interval
    for name, p in (("false_alarm", normal), ("detection", anomalous)):
        row[f"{name}s"] = count = int((p <= guarantee.rate).sum())
        row[f"{name}s_low"], row[f"{name}s_high"] = proportion_interval(count, len(p))
    return row


def decision_line(row: dict) -> str:
    """The decisions of a row of results.csv, in words."""
    parts = []
    for name, total in (("false_alarms", "test_normal"), ("detections", "test_anomalous")):
        if row[total]:
            low, high = (100 * row[f"{name}_{end}"] for end in ("low", "high"))
            what = f"{row[name]} of {row[total]} {name.replace('_', ' ')} ({low:.1f} to {high:.1f} %)"
            parts.append(what)
    worth = "promised" if row["normal_scores"] != "seen" else "of images that the network has seen"
    return f"p <= {row['promised_rate']:.3g}, {worth}: {', '.join(parts)}"


def record(detector: Detector, row: dict) -> dict:
    """A row, followed by the detector's settings and how it was made."""
    row = row | {name: value for name, value in detector.config.to_dict().items() if name not in row}
    if detector.config.patches:
        levels = list(zip(*(member.levels for member in detector.members)))  # of each stage, every member's
        kinds = [sorted({"shared" if each.shared else "each" for each in level}) for level in levels]
        row["location_chosen"] = ",".join("/".join(found) for found in kinds)
        row["dims"] = ",".join(str(level[0].density.mean.shape[-1]) for level in levels)
    made = {("train_command" if name == "command" else name): value for name, value in detector.metadata.items()}
    return row | made


def score_table(
    data_dir: str, category: str, test: TestSet, scores: np.ndarray, p: np.ndarray, seed: str
) -> list[dict]:
    """Rows of scores.csv. Paths are relative to the data folder; seed: the folder of one of several."""
    columns = ("category", "path", "label", "defect_type", "score", "p_value", "seed")[: 7 if seed else 6]
    paths = [path.relative_to(data_dir).as_posix() for path in test.paths]
    each = zip(paths, test.labels.tolist(), test.defect_types, scores.tolist(), p.tolist())
    return [dict(zip(columns, (category, *values, seed))) for values in each]


def normal_table(data_dir: str, detector: Detector, paths: Sequence[Path]) -> list[dict]:
    """Rows of normal_scores.csv: training images as a network saw them that had not been trained on them; the most
    unusual first."""
    category, scores = detector.config.category, detector.calibration_scores.cpu()
    names = [path.relative_to(data_dir).as_posix() for path in paths]
    order = scores.argsort(descending=True).tolist()
    above = (scores > detector.threshold.cpu()).tolist()
    columns = ("category", "path", "score", "above_threshold")
    return [dict(zip(columns, (category, names[i], scores[i].item(), above[i]))) for i in order]


def as_csv(rows: list[dict], columns: Sequence[str] | None = None) -> bytes:
    """columns: their names where there may be no row."""
    import pandas

    return pandas.DataFrame(rows, columns=columns).to_csv(index=False).encode()
