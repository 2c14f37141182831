"""Draw every figure: numbers and images in, a matplotlib Figure or the content of a PNG file out.

The only module that imports matplotlib or seaborn. Computes nothing but what drawing needs. Chooses what a sheet shows.
"""

import io
import textwrap
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize, to_rgb
from matplotlib.figure import Figure
from torch.nn import functional

from config import VARIANTS, Config
from cutpaste import VIEWS, config_params, make_views
from dataset import GOOD
from detector import Detector, category_seed, stream
from image_ops import to_float
from reporting.gallery import BINS, score_axis
from reporting.metrics import Evaluation
from reporting.overlays import as_score, drawn_above, heat_colors, heat_range, overlay
from runtime.files import MARK, shown

NORMAL_COLOR = VIEWS["image"].color
ANOMALY_COLOR = "#c8402f"
OUTLINE = "#3fd0ff"  # of what is above the threshold, as in overlays.py
UNTRAINED = "untrained baseline"
UNIT = "unusualness"  # of scores and maps; Detector.unit says exactly what it is
LETTER = 0.65 / 72  # inches, the width of a letter for each point of its size
DPI = 120
CASES_ACROSS = 6  # cases side by side on a sheet of heat maps
WORST = 2  # normal images with the highest scores on such a sheet, and anomalous images with the lowest
SAMPLE_VIEWS = 60  # normal test images whose augmented views enter the t-SNE plot, at most


# The files of an evaluation ---------------------------------------------------------------------------------------


def evaluation_plots(evaluation: Evaluation, untrained: Evaluation | None = None) -> dict[str, bytes]:
    """Return the PNG files of one category by name: ROC curve, score histogram, t-SNE plot, sheet of heat maps.

    Left out: the ROC curve without both kinds of images, the t-SNE plot of a patch model or of too few images, the
    sheet without maps. untrained: the evaluation of the untrained baseline, drawn beside the ROC curve.
    """
    figures = {}
    if "image_auroc" in evaluation.metrics:
        figures["roc"] = roc(evaluation, untrained)
    figures["histogram"] = score_histogram(evaluation)
    if evaluation.detector.config.patches is None:
        embeddings, groups = sample_views(evaluation)
        if len(embeddings) > 3:
            figures["tsne"] = tsne(evaluation.category, embeddings, groups)
    if evaluation.maps is not None:
        figures["heatmaps"] = heat_sheet(evaluation.detector, choose_cases(evaluation))
    return {f"{evaluation.category}/{name}.png": png(figure) for name, figure in figures.items()}


def summary_plot(rows: Sequence[dict]) -> dict[str, bytes]:
    """Return the PNG file over all categories by name, from rows of results.csv or seeds.csv; {} if none has an AUC."""
    rows = [row for row in rows if row["image_auroc"] is not None]
    return {"summary.png": png(summary(rows))} if rows else {}


def png(figure: Figure) -> bytes:
    """Return the content of a PNG file of the figure, with MARK."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, bbox_inches="tight", metadata={"Software": MARK})
    return buffer.getvalue()


def plain(text: str) -> str:
    """Return text with names in it as matplotlib shows it letter by letter: a pair of dollar signs would be a formula.
    Its line breaks stay."""
    return "\n".join(map(shown, text.split("\n"))).replace("$", r"\$")


# Sheets -----------------------------------------------------------------------------------------------------------


def preview(images: torch.Tensor, names: Sequence[str], config: Config, invisible: dict[str, float]) -> Figure:
    """Draw a sheet of images (R, 3, H, W) uint8, each beside its views.

    names: of the images. invisible: for each kind of view the share that shows no difference from the image.
    """
    views = VARIANTS[config.variant].views
    generator = torch.Generator().manual_seed(category_seed(config.seed, config.category))
    params = config_params(config, len(images), generator)
    augmented, _ = make_views(images, params)
    shown = to_float(images)
    if config.patches:
        shown, augmented = framed(shown, params.corner, params.patch_size), enlarged_crops(augmented, shown.shape[2:])
    cells = torch.stack([shown, *augmented.split(len(images))], 1)  # (R, 1 + V, 3, H, W)
    titles = ["crop" if config.patches and name == "image" else VIEWS[name].title for name in views]
    columns = ["original", *(f"{title} ({label})" for label, title in enumerate(titles))]
    for place, name in enumerate(views[1:], start=2):
        columns[place] += f"\n{100 * invisible[name]:.0f} % show nothing"
    return views_sheet(cells.permute(0, 1, 3, 4, 2).cpu().numpy(), columns, names)


def framed(images: torch.Tensor, corner: torch.Tensor, side: int) -> torch.Tensor:
    """Return images (B, 3, H, W) in [0, 1] with a line around the square crop at each corner (B, 2), top and left."""
    images, line = images.clone(), max(1, min(images.shape[2:]) // 100)
    color = torch.tensor(to_rgb(OUTLINE))[:, None, None]
    for image, (top, left) in zip(images, corner.tolist()):
        inside = image[:, top + line : top + side - line, left + line : left + side - line].clone()
        image[:, top : top + side, left : left + side] = color
        image[:, top + line : top + side - line, left + line : left + side - line] = inside
    return images


def enlarged_crops(crops: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Return square crops (N, 3, S, S) as large as fits into ``size`` (H, W), pixel by pixel, on light gray."""
    side = min(size)
    top, left = ((length - side) // 2 for length in size)
    cells = crops.new_full((len(crops), 3, *size), 0.8)
    cells[:, :, top : top + side, left : left + side] = functional.interpolate(crops, (side, side), mode="nearest")
    return cells


def views_sheet(images: np.ndarray, columns: Sequence[str], rows: Sequence[str]) -> Figure:
    """Draw a sheet of images (R, C, H, W, 3) in [0, 1], one image a row, one view of it a column."""
    count, views, height, width = images.shape[:4]
    gap = max(2, width // 20)
    down, right = height + gap, width + gap
    sheet = np.full((count, down, views, right, 3), 0.8, dtype=images.dtype)  # light gray gaps: some images are white
    sheet[:, :height, :, :width] = images.transpose(0, 2, 1, 3, 4).clip(0, 1)
    cell = min(2.6, max(1.7, width / DPI))  # inches
    rows = [_shortened(row, cell * height / width, 9) for row in rows]
    figure = Figure(figsize=(cell * views + 0.4, cell * height / width * count + 0.4), layout="constrained")
    axes = figure.subplots()  # one for all cells: each takes a tenth of a second
    axes.imshow(sheet.reshape(count * down, views * right, 3)[:-gap, :-gap])
    axes.set_xticks([column * right + width / 2 for column in range(views)], columns, fontsize=10)
    middles = [row * down + height / 2 for row in range(count)]
    axes.set_yticks(middles, list(map(plain, rows)), fontsize=9, rotation=90, va="center")
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return figure


class Case(NamedTuple):
    """An image on a sheet of heat maps."""

    title: str
    image: np.ndarray  # (H, W, 3) in [0, 1]
    mask: np.ndarray | None  # (H, W) of {0, 1}: ground truth; None if it is missing
    heat: np.ndarray | None  # (H, W): anomaly map in the score's unit; None for all cases or for none
    level: float | None  # what is above it has an outline; None: nothing


def choose_cases(evaluation: Evaluation) -> list[Case]:
    """Choose what a sheet of heat maps shows: of each defect type and of the normal images the one with the median
    score, and the worst mistakes."""
    detector, test, scores = evaluation.detector, evaluation.test, evaluation.scores
    known = test.known(evaluation.masks)
    roles = {}
    for defect_type in dict.fromkeys(test.defect_types):
        numbers = np.flatnonzero(np.array(test.defect_types) == defect_type)
        roles[int(numbers[np.argsort(scores[numbers])[len(numbers) // 2]])] = "median"
    for label, sign, role in ((0, -1, "highest"), (1, 1, "lowest")):
        numbers = np.flatnonzero(test.labels == label)
        roles |= dict.fromkeys(numbers[np.argsort(sign * scores[numbers])][:WORST].tolist(), role)
    cases = []
    for i, role in roles.items():
        name = _shortened(test.paths[i].name, 1.0, 7.5)
        title = f"{_words(test.defect_types[i])}, {role}\n{name}: score {scores[i]:.3g}"
        mask = evaluation.masks[i] if known[i] else None
        heat, level = evaluation.maps[i], None
        if detector.config.patches:
            level = drawn_above(heat, detector.threshold.item(), evaluation.p_values[i] <= detector.guarantee.rate)
        else:
            heat = as_score(heat, scores[i])
        cases.append(Case(title, test.images[i].permute(1, 2, 0).numpy() / 255, mask, heat, level))
    return cases


def _words(defect_type: str) -> str:
    """Return the name of a defect type's folder as a person would write it."""
    return "normal" if defect_type == GOOD else defect_type.replace("_", " ")


def heat_sheet(
    detector: Detector, cases: Sequence[Case], shows: str = "image", outline: str = "why it is called anomalous"
) -> Figure:
    """Draw images over their masks, if there are any, over their heat maps, up to CASES_ACROSS side by side, in the
    colors of all heat maps. shows, outline: in words, what images are on the sheet, and what an outline is around."""
    category, threshold = detector.config.category, detector.threshold.item()
    with_masks = any(case.mask is not None and case.mask.any() for case in cases)
    height, width = cases[0].image.shape[:2]
    bands, per_case = -(-len(cases) // CASES_ACROSS), 3 if with_masks else 2
    across = -(-len(cases) // bands)  # bands of about the same length
    side = 1.75
    size = (side * across + 1.2, bands * (per_case * side * height / width + 0.5) + 0.5)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(per_case * bands, across, squeeze=False)
    outlined = False
    for axes in grid.flat:
        axes.set_axis_off()
    for number, (title, image, mask, heat, level) in enumerate(cases):
        band, column = divmod(number, across)
        top, *middle, bottom = grid[per_case * band : per_case * (band + 1), column]
        top.imshow(image.clip(0, 1))
        top.set_title(plain("\n".join(_shortened(line, 0.95 * side, 7.5) for line in title.split("\n"))), fontsize=7.5)
        for axes in middle:
            if mask is None:
                axes.text(0.5, 0.5, "no mask", ha="center", va="center", fontsize=9, color="0.4")
            else:
                axes.imshow(mask, cmap="gray", vmin=0, vmax=1)
        if heat is None:
            continue
        bottom.imshow(overlay((255 * image).round().clip(0, 255).astype(np.uint8), heat, threshold, None))
        if level is not None and heat.min() < level < heat.max():
            bottom.contour(heat, [level], colors=OUTLINE, linewidths=1, linestyles="solid")
            outlined = True
    note = f"; blue outline: {outline}" if outlined else ""
    title = f"{category}: {shows}{', defect as marked' * with_masks}, heat map{note}"
    figure.suptitle(plain(textwrap.fill(title, int(size[0] / (11 * LETTER)))), fontsize=11)
    if any(case.heat is not None for case in cases):
        colors = ScalarMappable(Normalize(*heat_range(threshold)), ListedColormap(heat_colors() / 255))
        bar = figure.colorbar(colors, ax=grid, shrink=0.6, pad=0.01, aspect=30, extend="max")
        bar.set_label(UNIT, fontsize=9)
        bar.ax.axhline(threshold, color=OUTLINE, linewidth=2)
    return figure


def _shortened(text: str, inches: float, points: float) -> str:
    """Return a text without its middle if it would be longer than that at a size in points."""
    letters = max(5, int(inches / (points * LETTER)))
    return text if len(text) <= letters else f"{text[: letters // 2 - 1]}…{text[len(text) - letters // 2 :]}"


# Charts -----------------------------------------------------------------------------------------------------------


def _new_axes(width: float, height: float, count: int = 1, grid: str = "0.9") -> tuple[Figure, np.ndarray]:
    """Return a figure of a size in inches and its ``count`` axes, one below the other; grid: the color of its lines."""
    import seaborn  # imported late: with scipy and pandas it takes seconds, and no training needs it

    figure = Figure(figsize=(width, height), layout="constrained")
    with seaborn.axes_style("whitegrid", {"axes.edgecolor": "0.6", "grid.color": grid}):
        axes = figure.subplots(count, 1, sharex=True, squeeze=False)[:, 0]
    seaborn.despine(figure)
    return figure, axes


def roc(evaluation: Evaluation, untrained: Evaluation | None = None) -> Figure:
    """Draw the ROC curve of the test images, and that of the untrained baseline, dashed, below it."""
    from sklearn.metrics import roc_curve

    figure, (axes,) = _new_axes(5, 4.6)
    axes.plot([0, 1], [0, 1], color="0.75", linestyle=":", label="chance")
    for curve, name, style, color in (
        (untrained, UNTRAINED, "--", "0.45"),
        (evaluation, "detector", "-", ANOMALY_COLOR),
    ):
        if curve is not None:
            false_alarms, detections, _ = roc_curve(curve.test.labels, curve.scores)
            label = f"{name}, AUROC {curve.metrics['image_auroc']:.3f}"
            axes.plot(false_alarms, detections, style, color=color, linewidth=2, label=label)
    axes.set(
        xlabel="share of normal images called anomalous",
        ylabel="share of anomalous images found",
        title=plain(f"{evaluation.category}: ROC curve"),
        xlim=(-0.01, 1.01),
        ylim=(-0.01, 1.01),
        aspect="equal",
    )
    axes.legend(loc="lower right", frameon=True)
    return figure


def score_histogram(evaluation: Evaluation) -> Figure:
    """Draw a strip of test scores for each defect type and one for normal images, and the threshold."""
    detector, scores, defect_types = evaluation.detector, evaluation.scores, np.array(evaluation.test.defect_types)
    threshold = detector.threshold.item()
    kinds = list(dict.fromkeys(evaluation.test.defect_types))
    figure, grid = _new_axes(6.6, 1.05 * len(kinds) + 1.4, len(kinds), "0.92")
    low, high = score_axis(scores, threshold)
    edges = np.linspace(low, high, BINS + 1)
    for axes, kind in zip(grid, kinds):
        values = scores[defect_types == kind]
        color = NORMAL_COLOR if kind == GOOD else ANOMALY_COLOR
        axes.hist(values.clip(max=high), edges, color=color, alpha=0.85, edgecolor="white", linewidth=0.4)
        axes.axvline(threshold, color="0.25", linestyle="--", linewidth=1.2)
        title = f"{_words(kind)}: {(values > threshold).sum()} of {len(values)} above"
        axes.set_title(plain(title), loc="left", fontsize=9, pad=3)
        axes.yaxis.get_major_locator().set_params(nbins=2, integer=True)
        axes.grid(axis="x", visible=False)
    if detector.guarantee.holds:
        meaning = f"for {100 * detector.config.false_alarm_rate:g} % false alarms"
    else:
        held_out = " held out" * bool(detector.config.holdout)
        meaning = f"the largest score of the training images{held_out}"
    title = f"{evaluation.category}: scores of the test images\ndashed: threshold {threshold:.3g}, {meaning}"
    figure.suptitle(plain(title), fontsize=11)
    beyond = (scores > high).sum()
    grid[-1].set_xlabel(f"{UNIT} (the score)" + f"; the last bars hold {beyond} beyond the end" * bool(beyond))
    figure.supylabel("images", fontsize=10)
    return figure


def sample_views(evaluation: Evaluation) -> tuple[np.ndarray, list[str]]:
    """Return embeddings (N, D) of the test images and of augmented views of the normal ones, which the network has
    never seen, and the group of each: normal, anomalous, or the name of a view."""
    detector, test = evaluation.detector, evaluation.test

    def embed(prepared: torch.Tensor) -> torch.Tensor:
        member = detector.members[0]  # the networks of an ensemble have no common embedding
        return member.project(member.embed(prepared))[-1][:, 0].cpu()

    parts = list(stream(detector, test.images, embed))
    groups = ["anomalous" if label else "normal" for label in test.labels]
    normal = test.images[torch.from_numpy(np.flatnonzero(test.labels == 0)[:SAMPLE_VIEWS])]
    if len(normal):
        views, labels = make_views(
            normal, config_params(detector.config, len(normal), torch.Generator().manual_seed(0))
        )
        parts += stream(detector, views[labels > 0], embed)
        groups += [VARIANTS[detector.config.variant].views[label] for label in labels[labels > 0].tolist()]
    return torch.cat(parts).numpy(), groups


def tsne(category: str, embeddings: np.ndarray, groups: Sequence[str]) -> Figure:
    """Draw the t-SNE of embeddings (N, D), as in the paper's Figure 3. groups: N names, as of sample_views."""
    from sklearn.manifold import TSNE

    perplexity = min(30.0, (len(embeddings) - 1) / 3)
    points = TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(embeddings.astype(np.float32))
    figure, (axes,) = _new_axes(6, 5)
    views = [name for name in dict.fromkeys(groups) if name in VIEWS]
    styles = {name: (VIEWS[name].title, VIEWS[name].color) for name in views}
    # drawn in this order: real images above made-up ones
    styles |= {"normal": ("normal", NORMAL_COLOR), "anomalous": ("anomalous", ANOMALY_COLOR)}
    for name, (title, color) in styles.items():
        x, y = points[np.array(groups) == name].T
        axes.scatter(x, y, s=22, color=color, edgecolor="white", linewidth=0.4, label=title)
    axes.set(title=plain(f"{category}: t-SNE of test images and their augmented views"), xticks=[], yticks=[])
    axes.set(xlabel="t-SNE, no unit", ylabel="t-SNE, no unit")
    axes.legend(loc="best", frameon=True, fontsize=9)
    return figure


def enough(category: str, rows: Sequence[dict]) -> Figure:
    """Draw what new normal images score against the number of normal images in the density, and below it the image
    AUROC if there is one; from rows of enough.csv. A dot is one subset, a line the mean of subsets of one size."""
    panels = (("median", "quantile_90"), ("image_auroc",))[: 1 if rows[0]["image_auroc"] is None else 2]
    styles = {"median": ("median", NORMAL_COLOR, 1), "quantile_90": ("90 % quantile", "#e8a33d", 1)}
    styles["image_auroc"] = ("image AUROC of the test images", ANOMALY_COLOR, 100)
    counts = sorted({row["images"] for row in rows})
    figure, grid = _new_axes(5.6, 2.9 * len(panels), len(panels))
    for axes, columns in zip(grid, panels):
        for column in columns:
            title, color, factor = styles[column]
            dots = [(row["images"], factor * row[column]) for row in rows]
            means = [np.mean([value for images, value in dots if images == count]) for count in counts]
            axes.plot(counts, means, color=color, label=title)
            axes.scatter(*zip(*dots), s=14, color=color, alpha=0.6, linewidth=0)
        axes.set_xscale("log", base=2)
        axes.set_xticks(counts, map(str, counts))
        axes.legend(frameon=True, fontsize=9)
    grid[0].set(
        title=plain(f"{category}: what more normal images bring"), ylabel="score of new normal ones\n(deviations)"
    )
    if len(panels) > 1:
        grid[1].set(ylabel="percent")
    grid[-1].set(xlabel="normal images in the density")
    return figure


def summary(rows: Sequence[dict]) -> Figure:
    """Draw the image AUROC of each category and, of several, their mean, in percent, from rows of results.csv that have
    one; the untrained baseline's as marks, if all rows have it."""
    categories, *aurocs = ([row[key] for row in rows] for key in ("category", "image_auroc", "control_auroc"))
    names, (values, untrained) = [*map(plain, categories)], aurocs
    if len(rows) > 1:
        names.append("average")
        values, untrained = ([*x, None if None in x else np.mean(x)] for x in aurocs)
    percent = 100 * np.array(values)
    figure, (axes,) = _new_axes(6.4, 0.38 * len(names) + 1.3)
    colors = [NORMAL_COLOR] * len(categories) + ["#1d3f66"]
    axes.barh(names, percent, color=colors[: len(names)], height=0.65)
    if None not in untrained:
        axes.scatter(100 * np.array(untrained), names, marker="|", s=170, linewidth=3, color="#e8a33d", label=UNTRAINED)
        figure.legend(loc="outside lower center", frameon=False)
    for row, value in enumerate(percent):
        axes.text(101, row, f"{value:.1f}", va="center", fontsize=10)
    axes.axvline(50, color="0.6", linestyle=":", linewidth=1)
    axes.set(xlim=(0, 109), xticks=range(0, 101, 10), xlabel="image AUROC, percent", title="Image AUROC by category")
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    return figure
