"""Pictures: well-formed whatever names say, the same bytes every time, names that hide nothing, and any numbers."""

import sys
from xml.etree import ElementTree

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

from kvmix_cli.evaluation.grid import grid
from kvmix_cli.evaluation.results import Estimate
from kvmix_cli.plan import Plan
from kvmix_cli.reporting.plots.drawing import Look, new_figure, page_axes, save, styled, svg, tick_text
from kvmix_cli.reporting.plots.heat_map import draw_heat_map
from kvmix_cli.reporting.plots.labels import name_points
from kvmix_cli.reporting.plots.plans import Frontier, draw_bits, plot_plans
from kvmix_cli.reporting.plots.quality import Dot, Quality, draw_quality, draw_rows

LEAST, MOST = 5e-324, sys.float_info.max
HOSTILE = "a\x1b]0;b\x07<script>$\\frac$&\"'{}`</svg>"
INCREASE = Quality("perplexity increase in %", False, 0.0, increase=True)


def dots(values, costs=None, name="plan"):
    costs = costs or [2 + index for index in range(len(values))]
    return [
        Dot(f"{name} {index}", cost, Estimate(value, value, value), Look(index), f"{value:g}")
        for index, (value, cost) in enumerate(zip(values, costs, strict=True))
    ]


def texts(axes):
    """Texts that are shown, with what each covers in pixels."""
    axes.figure.draw_without_rendering()
    renderer = FigureCanvasAgg(axes.figure).get_renderer()
    shown = [each for each in axes.findobj(Text) if each.get_visible() and each.get_text()]
    return [(each.get_text(), Text.get_window_extent(each, renderer)) for each in shown]


def test_a_picture_for_the_page_follows_the_theme_and_asks_for_nothing():
    axes = page_axes(250)
    draw_quality(axes, dots([3.0, 1.0]), INCREASE, "stored bits")
    text = svg(axes.figure, "a label")
    root = ElementTree.fromstring(text)
    assert (root.tag, root.get("role"), root.get("aria-label")) == ("svg", "img", "a label")
    assert "var(--c0)" in text and "var(--ink)" in text and "#0072b2" not in text
    assert not any(word in text for word in ("http", "<style", "metadata", "font-family", "<image"))


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_the_same_picture_is_the_same_file(tmp_path, suffix):
    def draw(folder):
        with styled():
            axes = new_figure(400, 300).subplots()
        draw_quality(axes, dots([3.0, 1.0, 2.0]), INCREASE, "stored bits")
        return save(axes.figure, tmp_path / folder / f"picture.{suffix}").read_bytes()

    assert draw("one") == draw("other")


def test_names_from_files_are_text_in_every_picture(tmp_path):
    for draw in (
        lambda axes: draw_quality(axes, dots([3.0, 1.0], name=HOSTILE), INCREASE, "stored bits"),
        lambda axes: draw_rows(axes, dots([3.0, 1.0], name=HOSTILE), HOSTILE),
    ):
        axes = page_axes(300)
        draw(axes)
        root = ElementTree.fromstring(svg(axes.figure, HOSTILE))
        assert not {"script", "image"} & {element.tag for element in root.iter()}
        assert not any(character in "".join(root.itertext()) for character in "\x1b\x07")
        save(axes.figure, tmp_path / "picture.svg")
        ElementTree.parse(tmp_path / "picture.svg")


NUMBERS = [
    [LEAST],
    [0.0, LEAST],
    [-LEAST, LEAST, 1.0],
    [LEAST, LEAST, MOST],
    [-MOST, MOST],
    [MOST],
    [0.0, 0.0, MOST],
    [1.0, 1.0 + sys.float_info.epsilon],
    [0.0, 0.0],
    [-0.4, 0.2, 19898.8],
    [1e-13, 3e-13],
]
EXTREME = ([-LEAST, LEAST, 1.0], [-MOST, MOST], [1.0, 1.0 + sys.float_info.epsilon])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("values", "reference"),
    [(values, 10.0) for values in NUMBERS] + [(values, other) for values in EXTREME for other in (0.0, None)],
)
def test_any_numbers_can_be_drawn_with_ticks_that_are_short(values, reference):
    for draw in (
        lambda axes: draw_quality(axes, dots(values), INCREASE._replace(reference=reference), "stored bits"),
        lambda axes: draw_rows(axes, dots(values), "number", reference),
        lambda axes: draw_rows(axes, dots([abs(value) for value in values]), "number", zero=True),
    ):
        axes = page_axes(250)
        draw(axes)
        ElementTree.fromstring(svg(axes.figure, "x"))
        for axis in (axes.xaxis, axes.yaxis):
            assert all(len(label.get_text()) <= 12 for label in axis.get_ticklabels())


@pytest.mark.parametrize(
    ("value", "text"),
    [(14.8, "14.8"), (0.1 + 0.2, "0.3"), (19898.8, "19,899"), (1e308, "1e+308"), (0, "0"), (2.5e-7, "2.5e-07")],
)
def test_a_tick_is_short(value, text):
    assert tick_text(value) == text


@pytest.mark.parametrize("count", [1, 2, 5, 10])
def test_names_hide_neither_points_nor_each_other_and_stay_inside(count):
    axes = page_axes(270)
    values = [(7 * index) % 10 / 3 for index in range(count)]
    draw_quality(axes, dots(values), INCREASE, "stored bits")
    shown = texts(axes)
    named = [box for text, box in shown if text.startswith("plan")]
    assert len(named) == count
    for index, box in enumerate(named):
        assert not box.count_overlaps([*named[:index], *named[index + 1 :]])
        assert box.x0 >= 0 and box.x1 <= axes.figure.bbox.x1
    for text, box in shown:
        assert text.startswith("plan") or not box.count_overlaps(named), text


@pytest.mark.slow
def test_a_name_without_room_is_told():
    axes = page_axes(100)
    axes.plot([0] * 60, [0] * 60, "o")
    left_out = name_points(axes, [(0, 0)] * 60, ["a long name of a plan"] * 60)
    assert 50 < len(left_out) < 60


@pytest.mark.slow
def test_of_many_plans_the_best_are_named_beside_their_points_and_rows_name_all():
    many = dots([20.0 - index for index in range(20)], costs=[4.0] * 20)
    axes = page_axes(270)
    left_out = draw_quality(axes, many, INCREASE, "stored bits")
    assert sorted(left_out) == sorted(f"plan {index}" for index in range(19))
    axes = page_axes(36 * 20 + 66)
    draw_rows(axes, many, "perplexity increase in %", 0.0)
    shown = texts(axes)
    assert {f"plan {index}" for index in range(20)} <= {text for text, _ in shown}
    for index, (_, box) in enumerate(shown):
        assert not box.count_overlaps([other for _, other in shown[index + 1 :]])


def test_a_plot_of_one_plan_has_its_point_its_interval_and_ticks():
    axes = page_axes(270)
    one = Dot("alone", 2.7, Estimate(0.4, 0.1, 0.8), Look(0), "+0.4")
    assert draw_quality(axes, [one], INCREASE, "stored bits") == []
    shown = [text for text, _ in texts(axes)]
    assert {"alone", "unquantized", "stored bits"} <= set(shown)
    assert sum(text.replace(".", "").isdigit() for text in shown) >= 3
    low, high = axes.get_ylim()
    assert low < 0 < 0.1 < 0.8 < high


def test_bits_of_80_layers_of_which_some_are_left_alone():
    axes = page_axes(165)
    draw_bits(axes, {index: (2 + index % 2, 8) for index in range(0, 80, 1) if index % 5})
    shown = [text for text, _ in texts(axes)]
    assert {"keys", "values", "layer", "bits"} <= set(shown)
    assert {"8", "0"} <= set(shown)


@pytest.mark.parametrize("bits, numbers", [((0, 2), ["0", "2"]), ((0, 0), ["0", "0"])])
def test_a_width_of_zero_is_written_and_a_layer_that_is_left_alone_has_no_number(bits, numbers):
    axes = page_axes(165)
    draw_bits(axes, {0: bits, 2: (4, 4)})
    assert [text.get_text() for text in axes.texts if text.get_text()[0].isdigit()] == [
        numbers[0],
        "4",
        numbers[1],
        "4",
    ]


@pytest.mark.slow
def test_a_picture_of_plans_has_titles_units_and_the_frontier(tmp_path):
    from made_up import make_info

    plan = Plan.from_short("0-1:k4v4,2-7:k2v2", make_info(8))
    frontier = Frontier("ilp", [(2, 0.3), (3, 0.1), (4, 0.01)], (3, 0.1))
    path = plot_plans([("a", plan)], tmp_path / "plans.svg", frontier)
    text = "".join(ElementTree.parse(path).getroot().itertext())
    for word in (
        "a: 2.5 bits nominal, 3 stored",
        "layer",
        "bits",
        "stored bits",
        "nats a token",
        "this plan",
        "by ilp",
    ):
        assert word in text


def test_columns_of_a_heat_map_have_room_for_their_names():
    records = [
        {"context": context, "answers": [{"depth": depth, "distance": 1, "recalled": True}]}
        for context in range(1000, 1040)
        for depth in (0.0, 0.5, 1.0)
    ]
    axes = page_axes(140)
    draw_heat_map(axes, grid(records), 250)
    columns = [box for text, box in texts(axes) if len(text) == 4 and text.startswith("10")]
    assert len(columns) > 3
    assert not any(box.count_overlaps(columns[index + 1 :]) for index, box in enumerate(columns))
