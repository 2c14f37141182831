"""Every figure. Numbers and images in, a matplotlib Figure or a PNG file's bytes out.

The only module that imports matplotlib or seaborn; computes nothing but what drawing needs. Chooses what a sheet shows.
"""

import io
from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.figure import Figure
from torch.nn import functional

from config import Config
from cutpaste import VARIANTS, VIEWS, make_views
from dataset import GOOD, TestSet
from detector import Detector, category_seed, stream
from image_ops import to_float
from runtime.files import MARK

NORMAL_COLOR = VIEWS["image"].color
ANOMALY_COLOR = "#c8402f"
UNTRAINED = "untrained baseline"
DPI = 120
CASES_ACROSS = 6  # on a sheet of heat maps
SAMPLE_VIEWS = 60  # normal test images whose augmented views enter the t-SNE plot, at most
WORST = 2  # normal images with the highest and anomalous ones with the lowest scores on such a sheet


# Sheets -----------------------------------------------------------------------------------------------------------


def preview(images: torch.Tensor, names: Sequence[str], config: Config, invisible: dict[str, float]) -> Figure:
    """A sheet of images (R, 3, H, W) uint8, each beside its views. invisible: of each kind of view the share that shows
    no difference from the image."""
    views = VARIANTS[config.variant].views
    generator = torch.Generator().manual_seed(category_seed(config.seed, config.category))
    augmented, _ = make_views(images, config.sample_params(len(images), generator))
    shown = to_float(images)
    if augmented.shape != shown.shape:  # crops
        shown = functional.interpolate(shown, augmented.shape[2:], mode="area")
    cells = torch.stack([shown, *augmented.split(len(images))], 1)  # (R, 1 + V, 3, H, W)
    titles = ["crop" if config.patches and name == "image" else VIEWS[name].title for name in views]
    columns = ["original", *(f"{title} ({label})" for label, title in enumerate(titles))]
    for place, name in enumerate(views[1:], start=2):
        columns[place] += f"\n{100 * invisible[name]:.0f} % show nothing"
    return views_sheet(cells.permute(0, 1, 3, 4, 2).cpu().numpy(), columns, names)


def choose_cases(test: TestSet, scores: np.ndarray, masks: np.ndarray, maps: np.ndarray) -> list[tuple]:
    """What a sheet of heat maps shows, as ``heat_sheet`` takes it: of each kind the image with the median score, and
    the worst mistakes."""
    chosen = {}
    for kind in dict.fromkeys(test.defect_types):
        own = np.flatnonzero(np.array(test.defect_types) == kind)
        chosen[int(own[np.argsort(scores[own])[len(own) // 2]])] = "median"
    for label, sign, role in ((0, -1, "highest"), (1, 1, "lowest")):
        own = np.flatnonzero(test.labels == label)
        chosen |= dict.fromkeys(own[np.argsort(sign * scores[own])][:WORST].tolist(), role)
    cases = []
    for index, role in chosen.items():
        name = "normal" if not test.labels[index] else test.defect_types[index].replace("_", " ")
        title = f"{name}, {role}\n{test.paths[index].name}: score {scores[index]:.3g}"
        image = test.images[index].permute(1, 2, 0).numpy() / 255
        cases.append((title, image, masks[index] if test.with_truth[index] else None, maps[index]))
    return cases


def views_sheet(images: np.ndarray, columns: Sequence[str], rows: Sequence[str]) -> Figure:
    """A sheet of samples. images: (R, C, H, W, 3) in [0, 1], a row an image, a column a view of it."""
    count, views, height, width = images.shape[:4]
    gap = max(2, width // 20)
    down, right = height + gap, width + gap
    sheet = np.full((count, down, views, right, 3), 0.8, dtype=images.dtype)  # gray between them: some are bright
    sheet[:, :height, :, :width] = images.transpose(0, 2, 1, 3, 4).clip(0, 1)
    cell = 1.7
    figure = Figure(figsize=(cell * views + 0.4, cell * height / width * count + 0.4), layout="constrained")
    axes = figure.subplots()  # one for all: each more would take a tenth of a second
    axes.imshow(sheet.reshape(count * down, views * right, 3)[:-gap, :-gap])
    axes.set_xticks([column * right + width / 2 for column in range(views)], columns, fontsize=10)
    axes.set_yticks([row * down + height / 2 for row in range(count)], rows, fontsize=9, rotation=90, va="center")
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return figure


def heat_sheet(
    category: str,
    cases: Sequence[tuple[str, np.ndarray, np.ndarray | None, np.ndarray | None]],
    threshold: float | None,
    unit: str,
    shows: str = "image, defect as marked, heat map",
    with_masks: bool = True,
) -> Figure:
    """Images over their masks over their heat maps, up to CASES_ACROSS side by side, in one scale of colors.

    cases: title, image (H, W, 3) in [0, 1], mask (H, W) of {0, 1} or None if it is missing, map (H, W), or None for all
    of them. threshold: the level that an image's maximum is held against, drawn as an outline; None draws none. shows:
    what the sheet does, in words.
    """
    height, width = cases[0][1].shape[:2]
    bands, kinds = -(-len(cases) // CASES_ACROSS), 3 if with_masks else 2
    across = -(-len(cases) // bands)  # bands of about the same length
    side = 1.75
    size = (side * across + 1.2, bands * (kinds * side * height / width + 0.5) + 0.5)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(kinds * bands, across, squeeze=False)
    maps = [case[3] for case in cases if case[3] is not None]
    low, high = np.quantile(np.stack(maps), [0.02, 0.998]) if maps else (0, 1)
    high = max(high, low + 1e-9)
    if threshold is not None:  # never out of sight, and not below the middle of the colors: faint defects show too
        high = min(max(high, 1.05 * threshold), max(2 * threshold - low, low + 1e-9))
    for axes in grid.flat:
        axes.set_axis_off()
    for number, (title, image, mask, heat) in enumerate(cases):
        band, column = divmod(number, across)
        top, *middle, bottom = grid[kinds * band : kinds * (band + 1), column]
        top.imshow(image.clip(0, 1))
        top.set_title(title, fontsize=7.5)
        for axes in middle:
            if mask is None:
                axes.text(0.5, 0.5, "no mask", ha="center", va="center", fontsize=9, color="0.4")
            else:
                axes.imshow(mask, cmap="gray", vmin=0, vmax=1)
        if heat is None:
            continue
        bottom.imshow(image.mean(2), cmap="gray", vmin=0, vmax=1)
        colors = bottom.imshow(heat, cmap="inferno", vmin=low, vmax=high, alpha=0.75)
        if threshold is not None and heat.min() < threshold < heat.max():
            bottom.contour(heat, [threshold], colors="#3fd0ff", linewidths=1)
    note = "" if threshold is None else "; blue outline: above the threshold"
    figure.suptitle(f"{category}: {shows}{note}", fontsize=11)
    if maps:
        _color_bar(figure, colors, grid, threshold, unit)
    return figure


def _color_bar(figure: Figure, colors, grid: np.ndarray, threshold: float | None, unit: str) -> None:
    bar = figure.colorbar(colors, ax=grid, shrink=0.6, pad=0.01, aspect=30, extend="both")
    bar.solids.set_alpha(1)
    bar.set_label(f"{unit}, higher is more anomalous", fontsize=9)
    if threshold is not None:
        bar.ax.axhline(threshold, color="#3fd0ff", linewidth=2)


# Charts -----------------------------------------------------------------------------------------------------------


def png(figure: Figure) -> bytes:
    """Return the content of a PNG file of the figure, with MARK."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, bbox_inches="tight", metadata={"Software": MARK})
    return buffer.getvalue()


def new_axes(width: float, height: float):
    import seaborn  # imported late: with scipy and pandas it takes seconds, and no training needs it

    with seaborn.axes_style("whitegrid", {"axes.edgecolor": "0.6", "grid.color": "0.9"}):
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.add_subplot()
    seaborn.despine(ax=axes)
    return figure, axes


def roc(category: str, labels: np.ndarray, scores: np.ndarray, untrained: np.ndarray | None = None) -> Figure:
    """ROC curve of labels (M,) in {0, 1} and scores (M,); untrained: those of the untrained baseline, drawn dashed."""
    from sklearn.metrics import roc_auc_score, roc_curve

    figure, axes = new_axes(5, 4.6)
    axes.plot([0, 1], [0, 1], color="0.75", linestyle=":", label="chance")
    for values, name, style, color in (
        (untrained, UNTRAINED, "--", "0.45"),
        (scores, "detector", "-", ANOMALY_COLOR),
    ):
        if values is not None:
            false_alarms, found, _ = roc_curve(labels, values)
            area = roc_auc_score(labels, values)
            axes.plot(false_alarms, found, style, color=color, linewidth=2, label=f"{name}, AUROC {area:.3f}")
    axes.set(
        xlabel="share of normal images called anomalous",
        ylabel="share of anomalous images found",
        title=f"{category}: ROC curve",
        xlim=(-0.01, 1.01),
        ylim=(-0.01, 1.01),
        aspect="equal",
    )
    axes.legend(loc="lower right", frameon=True)
    return figure


def score_histogram(
    category: str, scores: np.ndarray, defect_types: Sequence[str], threshold: float, line: str, unit: str
) -> Figure:
    """Test scores (M,), normal against each defect type, one strip a type, and the threshold; line: what that is."""
    import seaborn

    kinds = list(dict.fromkeys(defect_types))
    figure = Figure(figsize=(6.6, 1.05 * len(kinds) + 1.4), layout="constrained")
    with seaborn.axes_style("whitegrid", {"grid.color": "0.92", "axes.edgecolor": "0.6"}):
        grid = figure.subplots(len(kinds), 1, sharex=True, squeeze=False)[:, 0]
    edges = np.histogram_bin_edges(np.append(scores, threshold), bins=40)
    for axes, kind in zip(grid, kinds):
        own = scores[np.array(defect_types) == kind]
        color = NORMAL_COLOR if kind == GOOD else ANOMALY_COLOR
        axes.hist(own, bins=edges, color=color, alpha=0.85, edgecolor="white", linewidth=0.4)
        axes.axvline(threshold, color="0.25", linestyle="--", linewidth=1.2)
        name = "normal" if kind == GOOD else kind.replace("_", " ")
        above = (own > threshold).sum()
        axes.set_title(f"{name}: {above} of {len(own)} above", loc="left", fontsize=9, pad=3)
        axes.yaxis.get_major_locator().set_params(nbins=2, integer=True)
        axes.grid(axis="x", visible=False)
        seaborn.despine(ax=axes)
    figure.suptitle(f"{category}: scores of the test images\ndashed: threshold, {line}", fontsize=11)
    grid[-1].set_xlabel(f"{unit}, higher is more anomalous")
    figure.supylabel("images", fontsize=10)
    return figure


def sample_views(detector: Detector, test: TestSet) -> tuple[np.ndarray, list[str]]:
    """Embeddings of the test images and of augmented views of the normal ones, which the network has never seen, and
    the group of each: normal, anomalous, or the name of a view."""

    def embed(prepared: torch.Tensor) -> torch.Tensor:
        member = detector.members[0]  # each network has an embedding of its own
        return member.levels[-1].project(member.embed(prepared)[-1])[:, 0].cpu()

    parts = list(stream(detector, test.images, embed))
    groups = ["anomalous" if label else "normal" for label in test.labels]
    normal = test.images[torch.from_numpy(np.flatnonzero(test.labels == 0)[:SAMPLE_VIEWS])]
    if len(normal):
        views, labels = make_views(normal, detector.config.sample_params(len(normal), torch.Generator().manual_seed(0)))
        parts += stream(detector, views[labels > 0], embed)
        groups += [VARIANTS[detector.config.variant].views[label] for label in labels[labels > 0].tolist()]
    return torch.cat(parts).numpy(), groups


def tsne(category: str, embeddings: np.ndarray, groups: Sequence[str]) -> Figure:
    """t-SNE of embeddings (N, D), as in the paper's Figure 3. groups: of each, normal, anomalous or a view's name."""
    from sklearn.manifold import TSNE

    perplexity = min(30.0, (len(embeddings) - 1) / 3)
    points = TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(embeddings.astype(np.float32))
    figure, axes = new_axes(6, 5)
    views = [name for name in dict.fromkeys(groups) if name in VIEWS]
    styles = {name: (VIEWS[name].title, VIEWS[name].color) for name in views}
    # the order of drawing: what was made up below what is real
    styles |= {"normal": ("normal", NORMAL_COLOR), "anomalous": ("anomalous", ANOMALY_COLOR)}
    for name, (title, color) in styles.items():
        own = points[np.array(groups) == name]
        axes.scatter(own[:, 0], own[:, 1], s=22, color=color, edgecolor="white", linewidth=0.4, label=title)
    axes.set(title=f"{category}: t-SNE of test images and their augmented views", xticks=[], yticks=[])
    axes.set(xlabel="t-SNE, no unit", ylabel="t-SNE, no unit")
    axes.legend(loc="best", frameon=True, fontsize=9)
    return figure


def enough(category: str, rows: Sequence[dict]) -> Figure:
    """What new normal images score, and below it the image AUROC if rows have one, against the number of normal images
    in the density; from rows of enough.csv. Dots are subsets, lines their means."""
    import seaborn

    panels = (("median", "quantile_90"), ("image_auroc",))[: 1 if rows[0]["image_auroc"] is None else 2]
    styles = {"median": ("median", NORMAL_COLOR, 1), "quantile_90": ("90 % quantile", "#e8a33d", 1)}
    styles["image_auroc"] = ("image AUROC of the test images", ANOMALY_COLOR, 100)
    figure, counts = Figure(figsize=(5.6, 2.9 * len(panels)), layout="constrained"), [row["images"] for row in rows]
    counts = sorted(set(counts))
    with seaborn.axes_style("whitegrid", {"axes.edgecolor": "0.6", "grid.color": "0.9"}):
        grid = figure.subplots(len(panels), 1, squeeze=False, sharex=True)[:, 0]
    for axes, names in zip(grid, panels):
        for name in names:
            title, color, factor = styles[name]
            dots = [(row["images"], factor * row[name]) for row in rows]
            means = [np.mean([value for count, value in dots if count == each]) for each in counts]
            axes.plot(counts, means, color=color, label=title)
            axes.scatter(*zip(*dots), s=14, color=color, alpha=0.6, linewidth=0)
        axes.set_xscale("log", base=2)
        axes.set_xticks(counts, map(str, counts))
        axes.legend(frameon=True, fontsize=9)
        seaborn.despine(ax=axes)
    grid[0].set(title=f"{category}: what more normal images bring", ylabel="score of new normal ones\n(deviations)")
    if len(panels) > 1:
        grid[1].set(ylabel="percent")
    grid[-1].set(xlabel="normal images in the density")
    return figure


def summary(rows: Sequence[dict]) -> Figure:
    """Image AUROC of each category, from rows of results.csv that have one, and their mean, in percent; those of the
    untrained baseline, if all rows have them, as marks."""
    categories, values, untrained = ([row[key] for row in rows] for key in ("category", "image_auroc", "control_auroc"))
    names = [*categories, "average"]
    percent = 100 * np.append(values, np.mean(values))
    figure, axes = new_axes(6.4, 0.38 * len(names) + 1.3)
    colors = [NORMAL_COLOR] * len(categories) + ["#1d3f66"]
    axes.barh(names, percent, color=colors, height=0.65)
    if None not in untrained:
        marks = 100 * np.append(untrained, np.mean(untrained))
        axes.scatter(marks, names, marker="|", s=170, linewidth=3, color="#e8a33d", label=UNTRAINED)
        figure.legend(loc="outside lower center", frameon=False)
    for row, value in enumerate(percent):
        axes.text(101, row, f"{value:.1f}", va="center", fontsize=10)
    axes.axvline(50, color="0.6", linestyle=":", linewidth=1)
    axes.set(xlim=(0, 109), xticks=range(0, 101, 10), xlabel="image AUROC, percent", title="Image AUROC by category")
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    return figure
