"""The tables of decisions: results/false_alarms.csv and results/decisions.csv; and that of results/reach.csv."""

import pandas
from cells import markdown, newest, percent
from record import ROOT

WAYS = {"split": "held out", "cross": "folds", "seen": "density folds"}


def false_alarms_table() -> str:
    """What was promised and what came, over random splits of the normal images of one category."""
    told = ["category", "way", "asked", "splits"]
    rows = newest("results/false_alarms.csv", pandas.read_csv(ROOT / "results/false_alarms.csv"), told)
    cells = []
    for row in rows.itertuples():
        promised = f"{percent(row.promised, 2)} ({percent(row.promised_low)} to {percent(row.promised_high)})"
        observed = f"{percent(row.observed, 2)} ± {percent(row.standard_error, 2)}"
        between = f"{percent(row.observed_low)} to {percent(row.observed_high)}"
        cells.append(
            [row.category, WAYS[row.way], percent(row.asked, 0), row.calibration_scores, promised, observed, between]
        )
    head = ["category", "normal scores", "asked", "n", "promised", "observed", "90 % of the splits"]
    return markdown(head, cells)


def decisions_table() -> str:
    """False alarms and detections among test images."""
    rows = pandas.read_csv(ROOT / "results/decisions.csv")
    rows = rows.assign(asked=rows.false_alarm_rate)
    told = ["category", "normal_scores", "asked", "backbone", "width", "epochs", "folds", "holdout"]
    rows = newest("results/decisions.csv", rows, told, ["seed"]).sort_values(["category", "asked"], kind="stable")
    cells = []
    for row in rows.itertuples():
        setting = [row.category, WAYS[row.calibration_scores], percent(row.asked, 0), percent(row.promised_rate, 2)]
        cells.append([*setting, *(share(row, *name) for name in SHARES), percent(row.image_auroc)])
    head = ["category", "normal scores", "asked", "promised", "false alarms", "detections", "image AUROC"]
    return markdown(head, cells)


SHARES = (("false_alarms", "test_normal"), ("detections", "test_anomalous"))


def share(row: tuple, name: str, total: str) -> str:
    """A count and its 95 % interval."""
    low, high = (percent(getattr(row, f"{name}_{end}"), 0) for end in ("low", "high"))
    return f"{getattr(row, name)} of {getattr(row, total)} ({low} to {high} %)"


def reach_table() -> str:
    """How far from a defect each stage's map is raised, before and after training."""
    told = ["category", "stage", "backbone", "patch_size", "epochs"]
    rows = newest("results/reach.csv", pandas.read_csv(ROOT / "results/reach.csv"), told)
    away = ["within", "to_8_px", "to_16_px", "to_32_px", "to_64_px"]
    cells = []
    for row in rows.sort_values(["category", "epochs"], kind="stable").itertuples():
        values = [f"{getattr(row, name):.1f}" for name in away]
        figures = percent(row.image_auroc), percent(row.pixel_auroc)
        cells.append([row.category, f"{row.epochs} steps", row.stage, *figures, *values])
    head = ["category", "training", "stage", "image AUROC", "pixel AUROC", "in the mask", *(n[3:] for n in away[1:])]
    return markdown([each.replace("_", " ") for each in head], cells)


DECIDING = {"reach": reach_table, "false_alarms": false_alarms_table, "decisions": decisions_table}
