"""Tables and single cells of them, written between marks into Markdown pages.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`, on lines of their own;
a cell, in a sentence, between `<!-- cell: NAME / ROW / COLUMN -->` and `<!-- end -->`,
where a row goes by its first cell and a column by its heading.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

Table = list[list[str]]  # the heading and the rows
Tables = Mapping[str, Callable[[], Table]]

MARKED = re.compile(r"(<!-- (table|cell): (.+?) -->)(.*?)(<!-- end -->)", re.DOTALL)


def fill(page: str, tables: Tables) -> str:
    """Put tables and cells between their marks; leave those of other tables."""

    def written(match: re.Match[str]) -> str:
        begin, kind, reference, _, end = match.groups()
        name, *place = reference.split(" / ")
        if name not in tables:
            return match[0]
        table = tables[name]()
        content = f"\n{markdown(table)}\n" if kind == "table" else cell(table, *place)
        return begin + content + end

    return MARKED.sub(written, page)


def markdown(table: Table) -> str:
    """Write a table in Markdown."""
    heading, *rows = table
    lines = [heading, ["---"] * len(heading), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def cell(table: Table, row: str, column: str) -> str:
    """Look a cell up by the row's first cell and the column's heading."""
    heading, *rows = table
    by_name = {cells[0]: cells for cells in rows}
    return by_name[row][heading.index(column)]


def write(paths: Iterable[Path], tables: Tables, check: bool) -> int:
    """Bring pages up to date, or check that they are; return the exit status."""
    differing = 0
    for path in paths:
        page = path.read_text(encoding="utf-8")
        written = fill(page, tables)
        if check and page != written:
            print(f"{path.name}: its figures are not those of the results")
            differing = 1
        if not check:
            path.write_text(written, encoding="utf-8")
    return differing
