"""The HTML report: its pictures, its charts, and what it shows and does in a browser."""

import io
import re
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import roc_auc_score

from reporting import gallery
from reporting.gallery import Page, Tile
from reporting.metrics import cheapest_rate
from reporting.overlays import overlay

COUNT = 60  # normal images that p-values come from
NAMES = [
    "crack/a b.png",
    "<script>document.title = 'run'</script>.png",
    "\"'><img src=x onerror=\"document.title='run'\">.png",
    "</script><!--{{ 7 * 7 }} &amp; &lt;.png",
    "Straße/螺丝/צד/🔩.png",
    "  two\nlines\tand\rmore  ",
]


def texture(rng, side=256):
    """A noise-like photograph (side, side, 3) uint8: coarse structure, grain and some color."""
    coarse = np.asarray(Image.fromarray(rng.integers(40, 210, (32, 32, 3), np.uint8)).resize((side, side)), float)
    grain = rng.normal(0, 35, (side, side, 1)) + rng.normal(0, 8, (side, side, 3))
    return (coarse + grain).clip(0, 255).astype(np.uint8)


def some_page(labelled=True, maps=True) -> Page:
    """40 normal and 50 anomalous images of two types, with p-values that follow their scores."""
    rng = np.random.default_rng(0)
    known = rng.normal(0, 1, COUNT)
    picture = gallery.thumbnail(texture(rng, 48))
    tiles = []
    for number in range(90):
        label = int(number >= 40)
        score = float(rng.normal(2 * label, 1))
        kind = ("good", "bent", "deep scratch")[label * (1 + number % 2)]
        p = (1 + int((known >= score).sum())) / (COUNT + 1)
        name = NAMES[number - 40] if 40 <= number < 40 + len(NAMES) else f"{kind}/{number:03d}.png"
        truth = (kind, label) if labelled else ("", None)
        tiles.append(Tile(name, *truth, score, p, picture, picture if maps else None))
    about = ("<b>lid</b> & co", "Mahalanobis distance", 3 / 61, COUNT, "Holds & <i>so</i>.", 0.9123, tiles)
    return Page(*about, normal_scores=known.tolist())


def decided(page: Page, level: float) -> tuple[np.ndarray, np.ndarray]:
    """Return whether each tile is called anomalous at p <= level, and its label."""
    p = np.array([tile.p_value for tile in page.tiles])
    return p <= level + 1e-9, np.array([tile.label for tile in page.tiles])


# Pictures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "size"), [((300, 600, 3), (192, 96)), ((80, 40, 3), (40, 80)), ((900, 2, 3), (1, 192))]
)
def test_a_thumbnail_keeps_the_shape_and_never_grows(shape, size):
    image = np.full(shape, 90, np.uint8)
    opened = Image.open(io.BytesIO(gallery.thumbnail(image)))
    assert (opened.format, opened.size) == ("JPEG", size)
    assert np.abs(np.asarray(opened).astype(int) - 90).max() <= 2


def test_500_noisy_images_with_maps_are_below_15_megabytes():
    rng = np.random.default_rng(0)
    image = texture(rng)
    heat = np.abs(rng.normal(0, 1, (8, 8))).repeat(32, 0).repeat(32, 1)  # glows nearly everywhere
    pictures = (
        gallery.thumbnail(image),
        gallery.thumbnail(np.asarray(overlay(image, heat.astype(np.float32), 0.75, 0.75))),
        gallery.thumbnail(texture(rng, 1024), gallery.REGION_SIDE, most=gallery.REGION_BYTES),
    )
    tiles = [Tile(f"crack/{i:03d}.png", "crack", 1, float(i), 1 / 61, *pictures) for i in range(500)]
    html = gallery.render([Page("c", "distance", 0.1, COUNT, "", None, tiles)], "title")
    assert 5e6 < len(html.encode()) < 15e6


# Charts -----------------------------------------------------------------------------------------------------------


def test_the_roc_curve_joins_the_shares_above_every_score():
    rng = np.random.default_rng(0)
    normal, anomalous = rng.integers(0, 9, 30).astype(float), rng.integers(3, 12, 40).astype(float)  # with ties
    points = gallery.roc_path(normal, anomalous).removeprefix("M").split("L")
    shares = [[(scores >= level).mean() for scores in (normal, anomalous)] for level in range(12, -1, -1)]
    curve = [f"{x * gallery.WIDTH:.1f},{(1 - y) * gallery.ROC_HEIGHT:.1f}" for x, y in shares]
    x, y = np.array([point.split(",") for point in points], dtype=float).T / [[gallery.WIDTH], [gallery.ROC_HEIGHT]]
    area = (np.diff(x) * (1 - (y[1:] + y[:-1]) / 2)).sum()
    assert set(points) <= set(curve)
    assert (points[0], points[-1]) == (curve[0], curve[-1])
    assert area == pytest.approx(roc_auc_score([0] * 30 + [1] * 40, np.append(normal, anomalous)), abs=1e-3)


def test_bars_hold_every_score():
    chart = gallery.histogram([("normal", [1.0, 1.0, 3.0]), ("anomalous", [5.0])])
    assert (chart["low"], chart["high"]) == (1, 5)
    strips = [(strip["total"], strip["highest"], len(strip["bars"])) for strip in chart["strips"]]
    assert strips == [(3, 2, 2), (1, 1, 1)]
    assert [text for _, text in chart["ticks"]] == ["1", "2", "3", "4", "5"]
    assert chart["beyond"] == 0
    many = [*np.linspace(0, 10, 40), 1000.0]  # an outlier does not squeeze the others
    chart = gallery.histogram([("images", many)])
    assert chart["high"] <= 20
    assert chart["beyond"] == 1
    assert len(chart["strips"][0]["bars"]) >= gallery.BINS / 2
    height = sum(bar[2] for bar in chart["strips"][0]["bars"]) * chart["strips"][0]["highest"] / gallery.STRIP_HEIGHT
    assert height == pytest.approx(41)
    assert gallery.histogram([("images", [1.0, 2.0])], 5.0)["high"] == 5
    assert gallery.histogram([("images", [1.0, 2.0])], 0.5)["low"] == 0.5
    alone = gallery.histogram([("images", [7.0])])
    assert alone["low"] < 7 < alone["high"]


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-3.2, 4.7), (1e-7, 2e-7), (12345, 99999), (0.999, 1.001)])
def test_values_of_an_axis_are_few_and_within(low, high):
    values = gallery.round_values(low, high)
    assert 2 <= len(values) <= 6
    assert low - 1e-9 * abs(low) <= min(values) < max(values) <= high * (1 + 1e-9)


@pytest.mark.parametrize(("count", "chosen"), [(1, 1), (60, 3), (320, 3), (20000, 777)])
def test_the_slider_has_the_level_in_use_and_all_small_ones(count, chosen):
    levels = gallery.slider_levels(count, chosen)
    assert levels == sorted({*levels})
    assert {chosen, count + 1, *range(1, min(count, 50) + 1)} <= {*levels}
    assert levels[0] == 0  # so that the level in use is never at the left end
    assert levels.index(chosen) > 0
    assert len(levels) < 400


# In a browser -----------------------------------------------------------------------------------------------------


@pytest.fixture
def visit(browser, tmp_path) -> Iterator:
    """Opens pages as a file, width pixels wide. In the end: no error, and no request but for the file itself."""
    troubles, opened = [], []

    def call(pages, width=1280):
        file = tmp_path / "report.html"
        file.write_text(gallery.render(pages, "Report <1>"), encoding="utf-8")
        tab = browser.new_page(viewport={"width": width, "height": 800})
        tab.on("console", lambda message: troubles.append(message.text))
        tab.on("pageerror", lambda error: troubles.append(str(error)))
        tab.on("dialog", lambda dialog: troubles.append(dialog.message))
        allowed = ("data:", file.as_uri())
        tab.on("request", lambda request: request.url.startswith(allowed) or troubles.append(request.url))
        tab.goto(file.as_uri())
        opened.append(tab)
        return tab

    yield call
    for tab in opened:
        tab.close()
    assert troubles == []


def text(tab, role: str) -> str:
    return tab.locator(f"[data-role={role}]").inner_text()


def set_slider(tab, position: int) -> int:
    """Moves the slider as a hand does, and returns the numerator of its p-value."""
    script = "(s, at) => { s.value = at; s.dispatchEvent(new Event('input')); return +s.dataset.ranks.split(',')[at]; }"
    return tab.locator("input[type=range]").evaluate(script, position)


@pytest.mark.parametrize("width", [1280, 390])
def test_counts_and_marks_follow_the_slider(visit, width):
    page = some_page()
    tab = visit([page], width)
    assert text(tab, "words") == "anomalous where p ≤ 0.0492"
    assert text(tab, "auroc") == "91.2 %"
    by_score = sorted(page.tiles, key=lambda tile: -tile.score)
    assert tab.locator(".name").evaluate_all("all => all.map(e => e.textContent)") == [t.name for t in by_score]
    last = len(gallery.slider_levels(COUNT, 3)) - 1
    for position in (None, 0, 1, 7, 20, last):  # None: as it starts
        k = 3 if position is None else set_slider(tab, position)
        called, labels = decided(page, k / (COUNT + 1))
        assert text(tab, "false-alarms") == f"{(called & (labels == 0)).sum()} of 40"
        assert text(tab, "detections") == f"{(called & (labels == 1)).sum()} of 50"
        assert tab.locator(".tile.called").count() == called.sum()
        assert tab.locator(".tile.mistake").count() == (called != labels).sum()
        threshold = sorted(page.normal_scores)[-k] if 0 < k <= COUNT else None
        assert tab.locator("[data-role=threshold]").text_content() == (
            "none" if threshold is None else f"{float(f'{threshold:.3g}'):g}"
        )
        if threshold is not None:
            low, high = (float(tab.locator("section").get_attribute(f"data-{end}")) for end in ("low", "high"))
            place = gallery.WIDTH * (np.clip(threshold, low, high) - low) / (high - low)
            assert float(tab.locator(".cut").get_attribute("d")[1:].split(",")[0]) == pytest.approx(place)
        assert text(tab, "in-use") == "the level in use" * (k == 3)
        point = tab.locator(".point").evaluate("e => [e.cx.baseVal.value, e.cy.baseVal.value]")
        shares = called[labels == 0].mean(), called[labels == 1].mean()
        assert np.allclose(point, [gallery.WIDTH * shares[0], gallery.ROC_HEIGHT * (1 - shares[1])], atol=1e-3)
    assert called.all()
    tab.get_by_role("button", name="reset").click()
    assert text(tab, "words") == "anomalous where p ≤ 0.0492"
    assert tab.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("costs", [(10, 1), (1, 1), (0.2, 3), (0, 1)])
def test_the_cheapest_level_is_that_of_eval(visit, costs):
    page = some_page()
    tab = visit([replace(page, costs=costs)])
    labels, p = np.array([tile.label for tile in page.tiles]), np.array([tile.p_value for tile in page.tiles])
    best = cheapest_rate(labels, p, COUNT, costs)
    words = text(tab, "cost")
    assert f"p ≤ {best.rate:.3g} costs least" in words
    low, high = map(float, re.search(r"between (\S+) and (\S+) for 90", words).groups())
    assert low - 1e-3 <= best.rate <= high + 1e-3  # of three digits
    assert (low, high) == pytest.approx((best.low, best.high), abs=0.1)  # by other random numbers
    tab.get_by_role("button", name="Set the level that costs least").click()
    assert f"These images cost {best.cost:.3g} at this level" in text(tab, "cost")
    assert text(tab, "words") == f"anomalous where p ≤ {best.rate:.3g}"


def test_filters_show_exactly_the_mistakes_and_types(visit):
    page = some_page()
    tab = visit([page])
    for position in (2, 12):
        tab.get_by_label("mistakes only").check()
        called, labels = decided(page, set_slider(tab, position) / (COUNT + 1))
        expected = {tile.name for tile, wrong in zip(page.tiles, called != labels) if wrong}
        visible = "all => all.filter(e => e.offsetParent).map(e => e.querySelector('.name').textContent)"
        assert {*tab.locator(".tile").evaluate_all(visible)} == expected
        assert text(tab, "shown") == f"{len(expected)} of 90 images shown"
        tab.get_by_label("mistakes only").uncheck()
    tab.get_by_label("Type").select_option("deep scratch (25)")
    assert {*tab.locator(".tile").evaluate_all(visible)} == {
        tile.name for tile in page.tiles if tile.defect_type == "deep scratch"
    }


@pytest.mark.parametrize("width", [1280, 390])
def test_a_region_is_enlarged_by_keyboard_and_pointer(visit, width):
    page = some_page()
    region = gallery.thumbnail(np.full((300, 400, 3), 200, np.uint8), gallery.REGION_SIDE)
    tab = visit([replace(page, tiles=[replace(tile, region=region) for tile in page.tiles])], width)
    dialog, button = tab.locator("dialog"), tab.get_by_role("button", name="enlarge").first
    assert not dialog.is_visible()
    button.focus()
    tab.keyboard.press("Enter")
    assert dialog.is_visible()
    name = max(page.tiles, key=lambda tile: tile.score).name
    assert dialog.locator(".title").evaluate("e => e.textContent") == name
    size = "e => e.decode().then(() => [e.naturalWidth, e.naturalHeight])"
    assert dialog.locator("img").evaluate(size) == [400, 300]
    tab.keyboard.press("Escape")
    assert not dialog.is_visible()
    assert button.evaluate("e => e === document.activeElement")
    button.click()
    dialog.get_by_role("button", name="close").click()
    assert not dialog.is_visible()
    assert tab.evaluate("document.documentElement.scrollWidth") <= width


def test_called_ones_and_names_are_filtered(visit):
    page = some_page()
    tab = visit([page], 390)
    visible = "all => all.filter(e => e.offsetParent).map(e => e.querySelector('.name').textContent)"
    called, _ = decided(page, set_slider(tab, 5) / (COUNT + 1))
    tab.get_by_label("called anomalous").check()
    names = {tile.name for tile, is_called in zip(page.tiles, called) if is_called}
    assert {*tab.locator(".tile").evaluate_all(visible)} == names
    tab.get_by_label("Name").fill(" BENT/0")
    found = {name for name in names if "bent/0" in name}
    assert found
    assert {*tab.locator(".tile").evaluate_all(visible)} == found
    assert text(tab, "shown") == f"{len(found)} of 90 images shown"
    tab.get_by_label("called anomalous").uncheck()
    assert tab.locator(".tile").evaluate_all(visible) == [
        tile.name for tile in sorted(page.tiles, key=lambda tile: -tile.score) if "bent/0" in tile.name
    ]
    assert "Hover over an image, or tap it" in tab.locator(".hint").inner_text()
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390


def test_a_page_says_how_it_was_made_what_is_wrong_and_what_is_promised(visit):
    facts = [("date", "2026-11-28 10:00:00+01:00"), ("detector", "a/<b>.pt"), ("images", "in"), ("versions", "torch 9")]
    unreadable = [("new/<i>x.png", "not a readable image"), ("\udcff.png", "gone")]
    page = replace(
        some_page(), facts=facts, warnings=["the pictures have changed"], unreadable=unreadable, details="All"
    )
    tab = visit([page], 390)
    section = tab.locator("section")
    assert "2026-11-28 10:00:00+01:00 · a/<b>.pt · in" in section.inner_text()
    assert "Note: the pictures have changed" in section.inner_text()
    assert not tab.get_by_text("torch 9").is_visible()
    tab.get_by_text("About this report").click()
    assert tab.get_by_text("torch 9").is_visible()
    tab.get_by_text("What is promised").click()
    assert tab.get_by_text("All.").is_visible()
    assert tab.locator(".unreadable li").all_inner_texts() == [
        "new/<i>x.png: not a readable image",
        "\\udcff.png: gone",
    ]
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390


def test_maps_show_by_keyboard_pointer_and_all_at_once(visit):
    tab = visit([some_page()])
    first, second = (tab.locator("button.frame").nth(i) for i in (0, 1))

    def shown(tile):
        pressed = tile.get_attribute("aria-pressed") == "true"
        assert tile.locator(".map").is_visible() == pressed
        return pressed

    tab.locator("input[type=range]").focus()
    for _ in range(6):  # reset has nothing to do: type, mistakes only, called, heat maps, name, the first image
        tab.keyboard.press("Tab")
    assert first.evaluate("e => e === document.activeElement")
    assert [shown(first), shown(second)] == [True, False]
    tab.keyboard.press("Enter")
    assert not shown(first)
    tab.keyboard.press("Enter")
    tab.keyboard.press("Tab")
    assert [shown(first), shown(second)] == [True, True]  # the first was asked for, the second has the focus
    tab.keyboard.press("Enter")
    tab.keyboard.press("Tab")
    assert [shown(first), shown(second)] == [True, False]
    second.hover()
    assert shown(second)
    tab.mouse.move(2, 2)
    assert not shown(second)
    tab.get_by_label("heat maps").check()
    assert tab.locator("button.frame[aria-pressed=true]").count() == 90


def test_a_tap_turns_a_map_on_and_off(browser, tmp_path):
    (tmp_path / "report.html").write_text(gallery.render([some_page()], "taps"), encoding="utf-8")
    context = browser.new_context(viewport={"width": 390, "height": 800}, has_touch=True, is_mobile=True)
    tab = context.new_page()
    tab.goto((tmp_path / "report.html").as_uri())
    first = tab.locator("button.frame").first
    for expected in ("true", "false", "true"):
        first.tap()
        assert first.get_attribute("aria-pressed") == expected
    context.close()


def test_without_labels_the_called_are_counted(visit):
    page = replace(some_page(labelled=False, maps=False), auroc=None)
    tab = visit([page], 390)
    called, _ = decided(page, set_slider(tab, 9) / (COUNT + 1))
    assert text(tab, "called") == f"{called.sum()} of 90"
    roles = ("false-alarms", "detections", "mistakes")
    for absent in (*(f"[data-role={role}]" for role in roles), ".curve", "button.frame"):
        assert tab.locator(absent).count() == 0
    assert "AUROC" not in tab.locator("body").inner_text()
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390


def test_hostile_words_are_text_and_nothing_runs(visit):
    page = some_page()
    tab = visit([replace(page, category="<script>document.title = 'run'</script>"), page], 390)
    tab.get_by_label("heat maps").first.check()
    assert tab.title() == "Report <1>"
    assert tab.locator("h2").all_inner_texts() == ["<script>document.title = 'run'</script>", "<b>lid</b> & co"]
    assert tab.locator("script").count() == 1
    labels = tab.locator("button.frame").evaluate_all("all => all.map(e => e.getAttribute('aria-label'))")
    assert {f"heat map of {name}" for name in NAMES} <= {*labels}


def test_a_page_without_images_normal_images_alone_and_undecodable_names(visit):
    page = some_page()
    normal = [replace(tile, name="\udcff.png") for tile in page.tiles if tile.label == 0]
    tab = visit([replace(page, auroc=None, tiles=[]), replace(page, auroc=None, tiles=normal, rate=0.001)])
    assert tab.locator("[data-role=false-alarms]").all_inner_texts() == ["0 of 40"]
    assert tab.locator("[data-role=detections]").count() == 0
    assert tab.locator(".name").first.inner_text() == "\\udcff.png"
    assert tab.locator("[data-role=meaning]").last.inner_text() == "(never)"
    assert tab.locator("[data-role=none]").first.is_visible()
