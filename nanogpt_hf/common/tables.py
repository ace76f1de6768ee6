"""Tables in Markdown that are read as they are, too."""

from collections.abc import Mapping, Sequence

from .text import printable

Columns = Mapping[str, tuple[str, str]]  # key of a row -> heading and format


def table(rows: Sequence[Mapping], columns: Columns) -> str:
    """The rows in Markdown, with the columns that any of them has, the first aligned to the left."""
    keys = [key for key in columns if any(key in row for row in rows)]
    cells = [[columns[key][0] for key in keys]]
    for row in rows:
        cells.append([_cell(columns[key][1].format(row[key])) if key in row else "" for key in keys])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = [
        [
            cell.ljust(width) if key == keys[0] else cell.rjust(width)
            for key, cell, width in zip(keys, line, widths, strict=True)
        ]
        for line in (cells[0], rule, *cells[1:])
    ]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cell(text: str) -> str:
    """A text that can neither drive a terminal nor leave its cell."""
    return " ".join(printable(text).split()).replace("|", r"\|")
