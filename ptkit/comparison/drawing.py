"""Figures by matplotlib: PNG and SVG files, and inline SVG in the colours of the report's page."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal
from xml.etree import ElementTree

from markupsafe import Markup, escape

from ptkit.extras import extra

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Width and height in inches: one column of a two-column paper, or of a phone's screen.
SIZE = (4.6, 3.2)
#: Longer names are cut in a legend; the whole name is in a mark's tooltip and in the table.
LONGEST = 22
_LEGEND_COLUMNS = 2

#: Text stays text, and the same figures give the same bytes.
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "ptkit",
    "text.parse_math": False,  # a method's name is no formula
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.markersize": 8,
    "lines.markeredgewidth": 0.8,
}
_PAPER: dict[str, Any] = {
    "font.size": 8,
    "axes.labelcolor": "0.25",
    "grid.alpha": 0.3,
    "lines.linewidth": 1.2,
    "lines.markersize": 5,
}
#: A colour that stands for a CSS variable of the page -> the variable. The page has a light and a
#: dark value for each.
_VARIABLES = {f"#7f01{number:02x}": f"var(--c{number})" for number in range(10)} | {
    "#7f02f0": "var(--ink)",
    "#7f02f1": "var(--soft)",
    "#7f02f2": "var(--line)",
    "#7f02f3": "var(--card)",
}
_INK, _SOFT, _LINE, _CARD = list(_VARIABLES)[10:]
_PAGE: dict[str, Any] = {
    "font.size": 11.5,
    "text.color": _INK,
    "axes.labelcolor": _SOFT,
    "xtick.labelcolor": _SOFT,
    "ytick.labelcolor": _SOFT,
    "axes.edgecolor": _LINE,
    "grid.color": _LINE,
    "lines.markeredgecolor": _CARD,
}
#: Before the text of a mark's tooltip, in the name matplotlib gives the mark's group.
_SAID = "said: "

Draw = Callable[["Axes"], None]


def as_files(draw: Draw) -> dict[Literal["png", "svg"], bytes]:
    """What `draw` puts into a pair of axes, as the bytes of files (see `written`)."""
    with paper():
        figure = _figure(draw)
        png = written(figure, "png")
        figure.set_layout_engine("none")  # half of the work; everything keeps its place
        return {"png": png, "svg": written(figure, "svg")}


@contextmanager
def paper(wanted_by: str = "a chart") -> Iterator[None]:
    """matplotlib's settings for files. Raises MissingExtraError where it is not installed."""
    with extra("report", wanted_by):
        from matplotlib import rc_context
    settings: Any = {**_STYLE, **_PAPER}
    with rc_context(settings):
        yield


def written(figure: Figure, form: Literal["png", "svg"]) -> bytes:
    """`figure` as the bytes of a PNG (200 dots per inch) or an SVG without a date."""
    stream = io.BytesIO()
    figure.savefig(stream, format=form, dpi=200, metadata={"Date": None} if form == "svg" else None)
    return stream.getvalue()


def on_page(draw: Draw, title: str) -> Markup:
    """What `draw` puts into a pair of axes, as an `<svg>` element without ids, fonts or addresses.

    Its colours are the page's: `--c0` to `--c9`, `--ink`, `--soft`, `--line` and `--card`. A screen
    reader is told `title`, and what the marks say (see `say`).
    """
    with extra("report", "a chart"):
        from cycler import cycler
        from matplotlib import rc_context
    colours = cycler(color=list(_VARIABLES)[:10])
    settings: Any = {**_STYLE, **_PAGE, "axes.prop_cycle": colours}
    with rc_context(settings):
        figure = _figure(draw)
        figure.patch.set_visible(False)
        for axes in figure.axes:
            axes.patch.set_visible(False)
        for artist in figure.findobj():
            artist.set_clip_on(False)  # the limits leave room for everything
        root = ElementTree.fromstring(written(figure, "svg"))
    shapes = {node.get("id"): node for node in root.iter() if node.get("id")}
    drawn = [made for node in root if (made := _plain(node, shapes)) is not None]
    told = dict.fromkeys(node.text or "" for part in drawn for node in part.iter("title"))
    inner = "".join(ElementTree.tostring(part, encoding="unicode") for part in drawn)
    for colour, variable in _VARIABLES.items():
        inner = inner.replace(colour, variable)
    return Markup(
        f'<svg viewBox="{escape(root.get("viewBox"))}" role="img" aria-label="{escape(title)}">'
        f"<desc>{escape('; '.join(told))}</desc>{inner}</svg>"
    )


def say(artists: list[Artist], text: str) -> None:
    """Give `artists` a tooltip on the page."""
    for artist in artists:
        artist.set_gid(f"{_SAID}{text}")


def short(name: str) -> str:
    """`name` as a legend has room for it."""
    return name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}…"


def _figure(draw: Draw) -> Figure:
    """A figure of one pair of axes, with a legend below them where they have named marks."""
    from matplotlib import rcParams
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE, layout="constrained")
    draw(axes := figure.subplots())
    handles, names = axes.get_legend_handles_labels()
    if names:
        rows = -(-len(names) // _LEGEND_COLUMNS)
        # The axes keep their size, however many names there are.
        figure.set_figheight(SIZE[1] + rows * 1.5 * rcParams["font.size"] / 72)
        figure.legend(handles, names, loc="outside lower center", ncols=_LEGEND_COLUMNS)
    return figure


def _plain(node: ElementTree.Element, shapes: dict[Any, Any]) -> ElementTree.Element | None:
    """`node` of matplotlib's SVG without names and references; None for what draws nothing."""
    tag = node.tag.rpartition("}")[2]
    if tag in ("defs", "metadata", "style"):
        return None
    if tag == "use":
        shape = shapes[next(v for k, v in node.items() if k.endswith("href"))[1:]]
        styles = filter(None, (node.get("style"), shape.get("style")))
        place = f"translate({node.get('x')} {node.get('y')})"
        return ElementTree.Element(
            "path", d=shape.get("d", ""), transform=place, style="; ".join(styles)
        )
    kept = {k: v for k, v in node.items() if k in ("d", "style", "transform", "x", "y")}
    if "style" in kept:
        kept["style"] = re.sub(r"\s*font-family: [^;]*;?", "", kept["style"])
    made = ElementTree.Element(tag, kept)
    if tag == "text":
        made.text = node.text
    said = node.get("id", "")
    if said.startswith(_SAID):
        ElementTree.SubElement(made, "title").text = said.removeprefix(_SAID)
    made.extend(child for each in node if (child := _plain(each, shapes)) is not None)
    return made if len(made) or tag != "g" else None
