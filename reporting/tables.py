"""Turn an evaluation into words and numbers: the lines on stdout and the rows of the tables.

Owns the names of lines and columns. Writes no file; chooses nothing.
"""

from collections.abc import Iterator, Sequence
from datetime import date
from pathlib import Path

import numpy as np
import torch

from conformal import proportion_interval
from dataset import unpaired_masks
from detector import Detector
from reporting.metrics import Evaluation, cheapest_rate, image_metrics
from runtime.cli import command_line
from runtime.files import print_line, say, spreadsheet_safe

NAMED_FILES = 3  # of those that a line is about
MANY_MISSED = 0.2  # share of the anomalous images; more are told
LINES = {  # on stdout, for columns of results.csv
    "image_auroc": "AUC",
    "pixel_auroc": "pixel AUROC",
    "aupro": "AUPRO",
    "control_auroc": "control AUC",
    "control_pixel_auroc": "control pixel AUROC",
}


# Lines ------------------------------------------------------------------------------------------------------------


def print_lines(row: dict) -> None:
    """Print the lines of one category, from its row of results.csv."""
    for column, name in LINES.items():
        if row[column] is not None:
            print_line(f"{row['category']} {name}: {row[column]}")


def print_average(rows: list[dict]) -> None:
    """Print the mean of each metric over the categories that have it; nothing of a single category."""
    for column, name in LINES.items() if len(rows) > 1 else ():
        values = [row[column] for row in rows if row[column] is not None]
        if values:
            print_line(f"average {name}: {float(np.mean(values))}")


def missing(evaluation: Evaluation) -> Iterator[str]:
    """Yield a sentence for each metric that is missing, or that leaves images out, with the reason."""
    test, masks = evaluation.test, evaluation.masks
    if "image_auroc" not in evaluation.metrics:
        kind = "normal" if test.labels.any() else "anomalous"
        yield f"no {kind} test image, so no AUC; the scores are in scores.csv"
    if masks is None:
        return
    known, lacking = test.known(masks), [path for path, paired in zip(test.paths, test.with_truth) if not paired]
    if unpaired := unpaired_masks(test) if test.labels.any() else []:
        expected = "".join(f"; looked for: ground_truth/{x.parent.name}/{x.stem}_mask.png" for x in lacking[:1])
        yield f"{len(unpaired)} masks fit no test image: {_first(unpaired)}{expected}"
    if lacking and len(lacking) == test.labels.sum():
        yield f"no {'such mask' if unpaired else 'masks'} in ground_truth, so image metrics only"
        return
    if lacking:
        yield f"{len(lacking)} anomalous images without a mask, left out of the pixel metrics"
    if empty := [test.mask_paths[i] for i in np.flatnonzero(test.with_truth & ~known)]:
        yield f"{len(empty)} masks mark nothing; their images are left out of the pixel metrics: {_first(empty)}"
    shares = masks.mean((1, 2))
    if large := [test.mask_paths[i] for i in np.flatnonzero(shares > 0.5)]:
        yield f"{len(large)} masks mark more than half of their image; are they inverted? {_first(large)}"
    truth = masks[known]
    if test.labels.any() and (truth.all() or not truth.any()):
        yield f"the masks mark {'every' if truth.any() else 'no'} pixel, so image metrics only"


def _first(paths: Sequence[Path]) -> str:
    """Name the first of some files, with their folders."""
    named = ", ".join(f"{path.parent.name}/{path.name}" for path in paths[:NAMED_FILES])
    return named + (", ..." if len(paths) > NAMED_FILES else "")


def missed_line(row: dict) -> str:
    """Return what to do if many of the anomalous images are called normal, from a row of results.csv; else nothing."""
    missed, total = row["test_anomalous"] - row["detections"], row["test_anomalous"]
    if not row["test_normal"] or missed <= MANY_MISSED * total:
        return ""
    costs = "--costs 10:1, if a miss costs as much as 10 false alarms, says which rate costs least on the test images"
    return f"{missed} of {total} anomalous images are called normal: {costs}; --set_rate writes it into the detector"


def decision_line(row: dict) -> str:
    """Say in words what a row of results.csv holds of decisions: false alarms and detections."""
    parts = []
    for name, total in (("false_alarms", "test_normal"), ("detections", "test_anomalous")):
        if row[total]:
            low, high = (100 * row[f"{name}_{end}"] for end in ("low", "high"))
            parts.append(f"{row[name]} of {row[total]} {name.replace('_', ' ')} ({low:.1f} to {high:.1f} %)")
    worth = "promised" if row["normal_scores"] != "seen" else "of images that the network has seen"
    return f"p <= {row['promised_rate']:.3g}, {worth}: {', '.join(parts)}"


# Several seeds ----------------------------------------------------------------------------------------------------


def seed_row(rows: Sequence[dict], labels: np.ndarray, scores: Sequence[np.ndarray]) -> dict:
    """Return a category's row of seeds.csv: mean and standard error of each metric over the seeds, and the image AUROC
    of the mean of their scores.

    rows: the category's rows of results.csv, one for each seed. labels: (M,). scores: for each seed the standardized
    scores (M,) of the same images.
    """
    result = {"category": rows[0]["category"], "seeds": len(rows)}
    for column in LINES:
        values = [row[column] for row in rows]
        known = None not in values
        result[column] = float(np.mean(values)) if known else None
        error = float(np.std(values, ddof=1) / len(values) ** 0.5) if known and len(values) > 1 else None
        result[f"{column}_standard_error"] = error
    both = 0 < labels.sum() < len(labels)
    result["averaged_auroc"] = image_metrics(labels, np.mean(scores, 0))["image_auroc"] if both else None
    return result


def print_seed_lines(row: dict) -> None:
    """Print the lines of one category, from its row of seeds.csv."""
    for column, name in LINES.items():
        if row[column] is not None:
            print_line(f"{row['category']} {name}: {row[column]}")
        if (error := row[f"{column}_standard_error"]) is not None:
            print_line(f"{row['category']} {name} standard error: {error}")
    if row["averaged_auroc"] is not None:
        print_line(f"{row['category']} AUC of averaged scores: {row['averaged_auroc']}")


# Tables -----------------------------------------------------------------------------------------------------------


def result_row(evaluation: Evaluation, untrained: Evaluation | None = None) -> dict:
    """Return a row of results.csv: metrics as fractions, counts, and how detector and metrics were made.

    untrained: the evaluation of the untrained baseline, for the columns control_*.
    """
    detector, labels = evaluation.detector, evaluation.test.labels
    threshold, metrics = detector.threshold.item(), evaluation.metrics
    above, control = evaluation.scores > threshold, {} if untrained is None else untrained.metrics
    row = {"category": evaluation.category}
    row |= {name: metrics.get(name) for name in ("image_auroc", "image_auprc", "best_f1")}
    row["control_auroc"] = control.get("image_auroc")
    row |= {name: metrics.get(name) for name in ("pixel_auroc", "aupro")}
    row["control_pixel_auroc"] = control.get("pixel_auroc")
    row |= {
        "test_normal": int((labels == 0).sum()),
        "test_anomalous": int((labels == 1).sum()),
        "threshold": threshold,
        "normal_above_threshold": int(above[labels == 0].sum()),
        "anomalous_above_threshold": int(above[labels == 1].sum()),
    }
    row |= _decisions(evaluation)
    made = {"eval_command": command_line(), "eval_torch": str(torch.__version__), "eval_date": date.today().isoformat()}
    return record(detector, row) | made


def _decisions(evaluation: Evaluation) -> dict:
    """Return the columns of results.csv on decisions by p-values: what the false-alarm rate promises, and the false
    alarms and detections among the test images, with 95 % intervals of their shares."""
    guarantee = evaluation.detector.guarantee
    columns = {"normal_scores": guarantee.kind, "promised_rate": guarantee.rate}
    columns["promised_low"], columns["promised_high"] = guarantee.interval
    for label, name in enumerate(("false_alarms", "detections")):
        p_values = evaluation.p_values[evaluation.test.labels == label]
        columns[name] = count = int((p_values <= guarantee.rate).sum())
        columns[f"{name}_low"], columns[f"{name}_high"] = proportion_interval(count, len(p_values))
    return columns


def cost_columns(evaluation: Evaluation, costs: tuple[float, float]) -> dict:
    """Return the columns of results.csv on what decisions cost, and say the least cost; without both kinds of images
    {}. costs: of a miss, of a false alarm."""
    labels, category = evaluation.test.labels, evaluation.category
    if not 0 < labels.sum() < len(labels):
        say(f"{category}: test images of one kind only, so no rate costs least")
        return {}
    best = cheapest_rate(labels, evaluation.p_values, evaluation.detector.guarantee.count, costs)
    anomalous, normal = int(labels.sum()), int((labels == 0).sum())
    result = f"{best.missed} of {anomalous} missed, {best.false_alarms} of {normal} false alarms, cost {best.cost:g}"
    text = f"p <= {best.rate:.3g} costs least on the test images ({result})"
    say(f"{category}: {text}; between {best.low:.3g} and {best.high:.3g} for 90 of 100 such sets")
    names = ("cheapest_rate", "cheapest_low", "cheapest_high", "least_cost")
    miss, false_alarm = costs
    values = (best.rate, best.low, best.high, best.cost)
    return {"costs": f"{miss:g}:{false_alarm:g}"} | dict(zip(names, values))


def record(detector: Detector, row: dict) -> dict:
    """Return a row, followed by the detector's settings and how it was made."""
    row = row | {name: value for name, value in detector.config.to_dict().items() if name not in row}
    if detector.config.patches:
        stages = list(zip(*(member.levels for member in detector.members)))  # for each stage, every member's density
        kinds = [sorted({"shared" if density.shared else "each" for density in stage}) for stage in stages]
        row["location_chosen"] = ",".join("/".join(names) for names in kinds)
        row["dims"] = ",".join(str(stage[0].density.width) for stage in stages)
    made = {("train_command" if name == "command" else name): value for name, value in detector.metadata.items()}
    return row | {name: value for name, value in made.items() if name not in row}  # no file says what was measured


def path_below(path: Path, data_dir: str | Path) -> str:
    """Return a path as tables have it: relative to the data folder, after ./ if it would look like a formula."""
    return spreadsheet_safe(path.relative_to(data_dir).as_posix())


def score_table(evaluation: Evaluation, data_dir: str | Path, seed: str = "") -> list[dict]:
    """Return the rows of scores.csv, one for each test image, with paths relative to the data folder.

    seed: the name of the seed's folder, for a column of that name; empty if there is one seed.
    """
    test, category = evaluation.test, evaluation.category
    columns = ("category", "path", "label", "defect_type", "score", "p_value", "seed")[: 7 if seed else 6]
    paths = [path_below(path, data_dir) for path in test.paths]
    scores, p_values = evaluation.scores.tolist(), evaluation.p_values.tolist()
    rows = zip(paths, test.labels.tolist(), test.defect_types, scores, p_values)
    return [dict(zip(columns, (category, *values, seed))) for values in rows]


def normal_table(detector: Detector, paths: Sequence[Path], data_dir: str | Path) -> list[dict]:
    """Return the rows of normal_scores.csv, one for each calibration score, the highest first.

    paths: the training images that the calibration scores belong to, in their order.
    """
    category, scores = detector.config.category, detector.calibration_scores.cpu()
    names = [path_below(path, data_dir) for path in paths]
    above = (scores > detector.threshold.cpu()).tolist()
    columns = ("category", "path", "score", "above_threshold")
    order = scores.argsort(descending=True).tolist()
    return [dict(zip(columns, (category, names[i], scores[i].item(), above[i]))) for i in order]
