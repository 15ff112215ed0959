"""Shared style of all pictures: one look for PNG files and for the page. Importing this loads matplotlib.

A picture is drawn once and saved as a file (`save`), or embedded in the page (`svg`). In the page its colours become
the variables of the style sheet, so that it follows the reader's light or dark theme.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, cast
from xml.etree import ElementTree

import matplotlib
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter, NullLocator

from ...errors import OutputError
from ...files import check_writable, write_bytes
from ..printable import printable

FORMATS = (".png", ".svg", ".pdf")
INK, SOFT, GRID, CARD = "#1b2230", "#5d6778", "#eceef2", "#ffffff"
KEY, VALUE = "#0072b2", "#d55e00"
COLORS = (KEY, VALUE, "#009e73", "#c0609a", "#dd9500", "#45a5dd", "#7a2a5c")
MARKERS = ("o", "s", "^", "D")
VARIABLES = {INK: "ink", SOFT: "soft", GRID: "grid", CARD: "card"} | {c: f"c{i}" for i, c in enumerate(COLORS)}
"""Variables of the page's style sheet, by the colours that stand for them."""
POINTS = 72
"""Units of a picture in an inch: a length in the page is one in points."""
PHONE = 320
"""Width of a picture in the page, in points: a phone of 390 pixels has room for it, so text is not scaled down."""
TEXT = 12.5
STYLE = {
    "text.parse_math": False,
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",
    "font.size": TEXT,
    "axes.titlesize": TEXT,
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "axes.labelsize": TEXT,
    "axes.labelcolor": SOFT,
    "axes.edgecolor": SOFT,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": GRID,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.labelsize": TEXT,
    "ytick.labelsize": TEXT,
    "legend.fontsize": TEXT,
    "legend.labelcolor": INK,
    "legend.frameon": False,
    "lines.markeredgecolor": CARD,
    "text.color": INK,
}
LARGEST, SMALLEST = 1e30, 1e-30
"""Sizes beyond these are drawn as these, and as zero."""
LONG, LONGEST = 1e4, 1e12
"""Numbers that are written with all their digits."""
SPREAD = 20.0
"""Numbers that differ by more than this factor are drawn on a logarithmic axis."""
ALIKE = 1e-6
"""Numbers that differ by a smaller share get an axis as if they were equal."""


class Look(NamedTuple):
    """A plan's colour and marker, the same in all pictures; `number` counts the plans, -1 is the reference."""

    number: int

    @property
    def color(self) -> str:
        """The colour."""
        return SOFT if self.number < 0 else COLORS[self.number % len(COLORS)]

    @property
    def marker(self) -> str:
        """The marker, another one once the colours are used up."""
        return "o" if self.number < 0 else MARKERS[self.number // len(COLORS) % len(MARKERS)]

    @property
    def style(self) -> str:
        """Class names of the style sheet."""
        return "reference" if self.number < 0 else f"c{self.number % len(COLORS)} m{MARKERS.index(self.marker)}"


@contextmanager
def styled() -> Iterator[None]:
    """Draw in the shared style; also a decorator. Text from files is never read as mathematics."""
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")
        yield


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of a size in points, laid out anew whenever it is drawn."""
    return Figure(figsize=(width / POINTS, height / POINTS), dpi=POINTS, layout="constrained")


@styled()
def page_axes(height: float) -> Axes:
    """Return the axes of a new figure for the page, to be laid out once, by `settle`."""
    return Figure(figsize=(PHONE / POINTS, height / POINTS), dpi=POINTS).subplots()


def figure_of(axes: Axes) -> Figure:
    """Return the figure of some axes."""
    return cast("Figure", axes.get_figure(root=True))


def settle(axes: Axes) -> None:
    """Lay out a figure now, unless it is laid out whenever it is drawn: what is placed afterwards stays there."""
    figure = figure_of(axes)
    if figure.get_layout_engine() is None:
        figure.tight_layout(pad=0.2)
    else:
        figure.draw_without_rendering()


def describe(axes: Axes, *, x: str = "", y: str = "", title: str = "") -> None:
    """Name the axes, with their units.

    Without a title the upright axis is named above itself, where it is read without turning the head.
    """
    axes.set_xlabel(x)
    if title:
        axes.set_title(title)
        axes.set_ylabel(y)
    else:
        axes.set_title(y, color=SOFT)


def tick_text(value: float, _: object = None) -> str:
    """Return a number as it stands on an axis."""
    return f"{value:,.0f}" if LONG <= abs(value) < LONGEST else f"{round(value, 12):.4g}"


def signed(value: float, _: object = None) -> str:
    """Return an increase as it stands on an axis."""
    return f"{'+' if value > 0 else ''}{tick_text(value)}"


def drawable(value: float) -> float:
    """Return the nearest number that can be drawn."""
    return 0.0 if abs(value) < SMALLEST else max(-LARGEST, min(LARGEST, value))


def fit_axis(axis: Axis, values: Sequence[float], text: FuncFormatter | None = None, *, zero: bool = False) -> None:
    """Give an axis a scale that fits some numbers: logarithmic if equal steps would squeeze most of them.

    Args:
        zero: whether it must begin at zero, as a scale of amounts should unless they are far apart.
    """
    axes = axis.axes
    is_level = axis is axes.xaxis
    set_scale, set_limits = (axes.set_xscale, axes.set_xlim) if is_level else (axes.set_yscale, axes.set_ylim)
    sizes = sorted(abs(value) for value in values)
    median, largest, low, high = sizes[len(sizes) // 2], sizes[-1], min(values), max(values)
    if largest > SPREAD * (min(values) if zero else median) and largest > 0:
        unit = max(median or largest / SPREAD, 1e-9 * largest)
        set_scale("log") if low > 0 else set_scale("symlog", linthresh=unit)
        edge = 1.3 if low > 0 else 1.5
        set_limits(low / edge if low > 0 else low * edge, high * edge if high > 0 else -unit)
        axis.set_minor_formatter(NullFormatter())
    else:
        room = 0.08 * (high - (0 if zero else low)) if high - low > ALIKE * largest or zero else 0.05 * largest
        set_limits(0 if zero and low >= 0 else low - (room or 1), high + (room or 1))
        axis.set_major_locator(MaxNLocator(5))
    axis.set_major_formatter(text or FuncFormatter(tick_text))


def fixed_ticks(axis: Axis, candidates: Sequence[float], apart: float, text: FuncFormatter) -> None:
    """Mark some numbers on an axis, as far as they lie within it.

    Args:
        candidates: numbers to mark, those first that should rather be there.
        apart: the least distance of two marks, as a share of the axis.
    """
    low, high = axis.get_view_interval()
    transform = axis.get_transform()
    start, end = (float(transform.transform([edge])[0]) for edge in (low, high))
    chosen: dict[float, float] = {}
    for value in candidates:
        if low <= value <= high:
            at = (float(transform.transform([value])[0]) - start) / (end - start)
            if all(abs(at - other) >= apart for other in chosen.values()):
                chosen[value] = at
    axis.set_major_locator(FixedLocator(sorted(chosen)))
    axis.set_major_formatter(text)
    axis.set_minor_locator(NullLocator())


def hint(artist: Artist, text: str) -> None:
    """Give a shape a text that the page shows under the pointer."""
    artist.set_gid(HINT + text.replace("\n", BREAK))


HINT, BREAK = "hint: ", "¶"
"""Mark of an identifier that is a hint, and of its line breaks, which XML would make spaces."""


def check_plot(path: Path) -> None:
    """Raise OutputError, before any work, if a picture cannot be written there."""
    if path.suffix.lower() not in FORMATS:
        raise OutputError(f"cannot draw {path}: its name must end in {', '.join(FORMATS)}")
    check_writable(path)


def save(figure: Figure, path: Path) -> Path:
    """Write a figure whole or not at all, the same bytes for the same figure. Raises OutputError."""
    kind = path.suffix.lower().lstrip(".")
    if kind == "svg":
        return write_bytes(path, ElementTree.tostring(_tree(figure, path.stem), encoding="utf-8"))
    picture = io.BytesIO()
    undated = {"CreationDate": None} if kind == "pdf" else None
    with styled():
        figure.savefig(picture, format=kind, dpi=150, metadata=undated)
    return write_bytes(path, picture.getvalue())


def svg(figure: Figure, label: str) -> str:
    """Return a figure as an SVG element for the page; colours of the shared style are variables of the style sheet."""
    root = _tree(figure, label)
    view = root.get("viewBox", "")
    root.attrib.clear()
    root.attrib.update({"viewBox": view, "role": "img", "aria-label": printable(label)})
    _make_slim(root)
    return ElementTree.tostring(root, encoding="unicode")


COLOR = re.compile("#[0-9a-f]{6}")
FONT = re.compile("font(-size|-family)?:[^;]*(; )?")
MEASURES = {"d", "x", "y", "transform"}
LONG_NUMBER = re.compile(r"-?\d+\.\d{2,}")
INVISIBLE = "fill: none"


def _make_slim(element: ElementTree.Element) -> None:
    """Leave out what the page does not need: name spaces, fonts, digits, and groups and shapes that show nothing."""
    element.tag, element.tail = element.tag.rpartition("}")[2], None
    element.attrib = {name.rpartition("}")[2]: _slim(name, value) for name, value in element.attrib.items()}
    if element.attrib.get("transform", "").startswith("rotate(-0 "):
        del element.attrib["transform"]
    if element.tag not in ("text", "title", "tspan"):
        element.text = None
    children: list[ElementTree.Element] = []
    for child in element:
        _make_slim(child)
        if child.tag == "g" and not child.attrib and child.find("title") is None:
            children += child
        elif len(child) or (child.tag not in ("g", "defs") and child.get("style") != INVISIBLE):
            children.append(child)
    element[:] = children


def _slim(name: str, value: str) -> str:
    if name == "style":
        return COLOR.sub(_variable, FONT.sub("", value))
    return LONG_NUMBER.sub(lambda found: f"{float(found[0]):.1f}", value) if name in MEASURES else value


def _variable(color: re.Match[str]) -> str:
    return f"var(--{VARIABLES[color[0]]})" if color[0] in VARIABLES else color[0]


def _tree(figure: Figure, salt: str) -> ElementTree.Element:
    """Return a figure as a parsed SVG: no date, ids that follow from its content and the salt, hints as titles."""
    buffer = io.StringIO()
    with styled(), matplotlib.rc_context({"svg.hashsalt": printable(salt)}):
        if figure.get_layout_engine() is not None:
            figure.draw_without_rendering()
        figure.set(facecolor="none", edgecolor="none")
        # Not `savefig`, which draws every figure twice.
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Creator": None})
    root = ElementTree.fromstring(printable(buffer.getvalue()))
    space = "{http://www.w3.org/2000/svg}"
    for metadata in root.findall(f"{space}metadata"):
        root.remove(metadata)
    for defs in root.findall(f"{space}defs"):
        for style in defs.findall(f"{space}style"):
            defs.remove(style)
    for group in root.iter(f"{space}g"):
        name = group.attrib.pop("id", "")
        if name.startswith(HINT):
            title = ElementTree.Element(f"{space}title")
            title.text = name.removeprefix(HINT).replace(BREAK, "\n")
            group.insert(0, title)
    return root
