"""Tables as notebooks show them: HTML without styles of its own, so that it fits any theme."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape


def shown_in_notebook(
    rows: Sequence[Mapping[str, str]], caption: str, *, bold: int | None = None
) -> str:
    """An HTML table with a line below it.

    rows: column -> figure, the same columns in each; the first one names the row
    bold: index of the row that is emphasised
    """
    head = "".join(f"<th>{escape(name)}</th>" for name in rows[0])
    lines = []
    for index, row in enumerate(rows):
        first, *others = map(escape, row.values())
        if index == bold:
            first, *others = (f"<strong>{cell}</strong>" for cell in (first, *others))
        cells = "".join(f"<td>{cell}</td>" for cell in others)
        lines.append(f'<tr><th scope="row">{first}</th>{cells}</tr>')
    body = "".join(lines)
    return (
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        f"<p>{escape(caption)}</p>"
    )
