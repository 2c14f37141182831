"""Test what figures show: the cases of a sheet of heat maps, and each view of the table."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from config import VARIANTS, Config, PatchConfig, Variant
from cutpaste import VIEWS
from dataset import load_masks, load_test
from detector import load
from reporting import figures
from reporting.metrics import Evaluation, evaluate
from reporting.overlays import overlay


def test_a_sheet_shows_every_kind_and_the_worst_mistakes(data, models):
    test = load_test(data, "brick", (32, 32), 0)
    scores = np.arange(len(test.labels), dtype=float)[::-1]  # the first image, a normal one, has the highest
    masks = load_masks(test, (32, 32), 0).numpy()
    maps = np.zeros(masks.shape)
    cases = figures.choose_cases(Evaluation(load(models / "brick.pt"), test, scores, scores, maps, masks, {}))
    kinds = {case.title.split(",")[0] for case in cases}
    assert kinds == {"normal", *test.defect_types} - {"good"}
    titles = [case.title.split(":")[0] for case in cases]
    assert "normal, highest\n000.png" in titles
    assert f"{test.defect_types[-1]}, lowest\n{test.paths[-1].name}" in titles
    assert len({case.title for case in cases}) == len(cases)
    (highest,) = (case for case in cases if "highest\n000" in case.title)
    assert np.allclose(highest.image, test.images[0].permute(1, 2, 0) / 255)


def drawn_pixels(figure):
    """The pictures on a sheet, as they were handed to matplotlib."""
    return [np.asarray(axes.images[0].get_array()) for axes in figure.axes if axes.images]


def test_a_sheet_has_the_colors_of_all_heat_maps_and_tells_of_an_outline_only_if_one_is_drawn(detectors):
    """See heat at the threshold on dark, gray and bright parts."""
    detector = load(detectors / "patch/brick.pt")
    threshold = detector.threshold.item()
    heat = np.linspace(0, 3 * threshold, 32 * 48, dtype=np.float32).reshape(32, 48)
    grays = (20, 128, 240)
    images = [np.full((32, 48, 3), gray / 255) for gray in grays]
    for level, words in ((np.inf, "heat map"), (2 * threshold, "heat map; blue outline: why it is called anomalous")):
        cases = [figures.Case("a", image, None, heat, level) for image in images]
        figure = figures.heat_sheet(detector, cases)
        assert figure._suptitle.get_text().replace("\n", " ") == f"brick: image, {words}"
        for gray, picture in zip(grays, drawn_pixels(figure)[3:]):
            pixels = np.full((32, 48, 3), gray, np.uint8)
            assert (picture == np.asarray(overlay(pixels, heat, threshold, None))).all()
            at_threshold = picture[np.abs(heat - threshold) < threshold / 50].astype(float)
            assert np.abs(at_threshold - gray).max(1).min() > 60
        scale = figure.axes[-1].get_ylim()
        assert scale == pytest.approx((threshold / 2, 2 * threshold))
    assert "why" not in figures.heat_sheet(detector, cases, outline="x")._suptitle.get_text()


def test_a_histogram_shows_the_threshold_and_is_not_squeezed_by_an_outlier(data, models):
    test, detector = load_test(data, "brick", (32, 32), 0), load(models / "brick.pt")
    evaluation = evaluate(detector, test)
    threshold = detector.threshold.item()
    scores = np.linspace(0.5, 1.5, len(test.labels)) * threshold
    scores[-1] = 1000 * threshold
    figure = figures.score_histogram(replace(evaluation, scores=scores))
    assert figure.axes[-1].get_xlim()[1] < 4 * threshold
    assert "the last bars hold 1 beyond the end" in figure.axes[-1].get_xlabel()
    assert sum(patch.get_height() for axes in figure.axes for patch in axes.patches) == len(scores)
    assert f"threshold {threshold:.3g}, the largest score of the training images" in figure._suptitle.get_text()
    assert "beyond" not in figures.score_histogram(evaluation).axes[-1].get_xlabel()
    low = figures.score_histogram(replace(evaluation, scores=scores.clip(max=0.9 * threshold)))
    assert low.axes[0].get_xlim()[1] >= threshold
    (line,) = low.axes[0].lines
    assert line.get_xdata()[0] == threshold


def test_a_view_that_is_added_to_the_table_is_drawn(models, data, monkeypatch):
    """In previews and in the t-SNE plot, of a variant with three augmented views."""
    views = ("image", "patch", "scar", "hole")
    monkeypatch.setitem(VIEWS, "hole", replace(VIEWS["patch"], title="Hole", color="#000000"))
    monkeypatch.setitem(VARIANTS, "4way", Variant(views, "four classes"))
    test, detector = load_test(data, "brick", (32, 32), 0), load(models / "brick.pt")
    detector.config = replace(detector.config, variant="4way")
    invisible = {"patch": 0.0, "scar": 0.256, "hole": 1.0}
    (axes,) = figures.preview(test.images[:2], ["a", "b"], detector.config, invisible).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b"]
    shares = [("CutPaste (1)", 0), ("CutPaste-Scar (2)", 26), ("Hole (3)", 100)]
    titles = ["original", "image view (0)", *(f"{title}\n{share} % show nothing" for title, share in shares)]
    assert [label.get_text() for label in axes.get_xticklabels()] == titles
    embeddings, groups = figures.sample_views(evaluate(detector, test))
    assert len(embeddings) == len(groups) == 12 + 3 * 3
    assert set(groups) == {"normal", "anomalous", *views[1:]}
    legend = [text.get_text() for text in figures.tsne("brick", embeddings, groups).axes[0].get_legend().get_texts()]
    assert legend == ["CutPaste", "CutPaste-Scar", "Hole", "normal", "anomalous"]


@pytest.mark.parametrize("name", ["$5$", "a$\\frac$", "\\$x\\$", "$", "100 %_{a}^b#~&"])
def test_names_are_shown_letter_by_letter(name):
    def drawn(text, **options):
        figure = Figure(figsize=(3, 1))
        figure.text(0, 0.5, text, **options)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        return np.asarray(canvas.buffer_rgba())

    assert drawn(name, parse_math=False).min() <= 1  # matplotlib 3.8 draws "$" a little lighter
    assert (drawn(figures.plain(name)) == drawn(name, parse_math=False)).all()


def test_text_that_cannot_be_drawn_has_escapes():
    assert figures.plain("a\rb\udcff.png\nscore 1") == "a\\rb\\udcff.png\nscore 1"


@pytest.mark.parametrize(("count", "shape"), [(2, (20, 60)), (12, (40, 40))])
@pytest.mark.parametrize("marked", [True, False])
def test_words_on_a_sheet_fit_and_there_is_no_row_without_masks(detectors, count, shape, marked):
    """Titles of long names do not overlap, and nothing is wider than the figure."""
    detector = load(detectors / "patch/brick.pt")
    image, heat = np.full((*shape, 3), 0.5), np.linspace(0, 9, shape[0] * shape[1], dtype=np.float32).reshape(shape)
    mask = (heat > 8).astype(np.uint8) * marked
    title = f"{'IMG_20261128_' * 4}{{:03}}.png\nscore 12.3, p 0.012"
    cases = [figures.Case(title.format(number), image, mask, heat, 8.0) for number in range(count)]
    figure = figures.heat_sheet(detector, cases, "the most unusual training images")
    bands = -(-count // figures.CASES_ACROSS)
    assert len(figure.axes) == bands * (3 if marked else 2) * (count // bands) + 1
    figure.draw_without_rendering()
    boxes = [axes.title.get_window_extent() for axes in figure.axes if axes.get_title()]
    assert len(boxes) == count
    assert all("png" in axes.get_title() for axes in figure.axes if axes.get_title())
    rows = {round(box.y0): [other for other in boxes if round(other.y0) == round(box.y0)] for box in boxes}
    for row in rows.values():
        assert all(left.x1 < right.x0 for left, right in itertools.pairwise(sorted(row, key=lambda box: box.x0)))
    for text in (figure._suptitle, figure.axes[-1].yaxis.label):
        box = text.get_window_extent()
        assert box.x0 >= 0
        assert box.x1 <= figure.bbox.width
        assert box.y0 >= 0
        assert box.y1 <= figure.bbox.height


def test_a_preview_of_crops_shows_their_pixels_beside_the_whole_image(data):
    test = load_test(data, "brick", (64, 48), 0)
    config = Config("brick", height=64, width=48, pretrained=False, patches=PatchConfig(patch_size=32))
    figure = figures.preview(test.images[:2], ["a", "b"], config, {"patch": 0.0, "scar": 0.0})
    sheet = figure.axes[0].images[0].get_array()
    cell, gap = (64, 48), 2
    whole = sheet[: cell[0], : cell[1]]
    same = np.abs(whole - test.images[0].permute(1, 2, 0).numpy() / 255).max(2) < 1e-6
    outline = 4 * 32 - 4
    assert (~same).sum() <= outline  # nothing but a line around the crop is drawn on the image
    assert (~same).sum() > outline / 2
    rows, columns = np.nonzero(~same)
    assert (np.ptp(rows), np.ptp(columns)) == (31, 31)
    crop = sheet[: cell[0], cell[1] + gap : 2 * cell[1] + gap][8:-8]  # the largest square
    step = np.abs(np.diff(crop, axis=0)).max((1, 2)) > 0
    assert step.sum() <= 31  # 32 rows of pixels, each repeated as it is
