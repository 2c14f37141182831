"""Test what figures show: the cases of a sheet of heat maps, and each view of the table."""

from dataclasses import replace

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from choices import VARIANTS, Variant
from cutpaste import VIEWS
from dataset import load_masks, load_test
from detector import load
from reporting import figures
from reporting.metrics import Evaluation, evaluate


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

    assert drawn(name, parse_math=False).min() == 0
    assert (drawn(figures.plain(name)) == drawn(name, parse_math=False)).all()


def test_text_that_cannot_be_drawn_has_escapes():
    assert figures.plain("a\rb\udcff.png\nscore 1") == "a\\rb\\udcff.png\nscore 1"
