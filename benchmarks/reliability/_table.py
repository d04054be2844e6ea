"""The table of answers and its notes, from the files that the scripts write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.reliability._properties import PROPERTIES

RESULTS = Path(__file__).parents[1] / "results" / "reliability"
COLUMNS = (
    *("Lookahead", "LazyOptimizer", "tfa Lookahead", "tfa LazyAdam"),
    *("optax", "timm", "pytorch_optimizer"),
)
MISSING = "not measured"
Report = dict[str, Any]


class Notes:
    """Numbers what is said, each thing once."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def number(self, says: str) -> int:
        """The number of a note."""
        return self._numbers.setdefault(says, len(self._numbers) + 1)

    def rows(self) -> list[list[str]]:
        """The notes in order."""
        return [[str(number), says] for says, number in self._numbers.items()]


def answers(folder: Path = RESULTS) -> list[list[str]]:
    """The properties, a column for each optimizer."""
    return _tables(folder)[0]


def notes(folder: Path = RESULTS) -> list[list[str]]:
    """What happens where a cell of `answers` has a number."""
    return _tables(folder)[1]


def _tables(folder: Path) -> tuple[list[list[str]], list[list[str]]]:
    paths = sorted(folder.glob("*.json"))
    reports = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    numbered = Notes()
    table = [["", *COLUMNS]]
    for name, line in PROPERTIES.items():
        row = [line.title]
        for column in COLUMNS:
            asked = [
                report
                for report in reports
                if report["column"] == column and name in report["answers"]
            ]
            row.append(_cell(asked, name, numbered))
        table.append(row)
    return table, [["", "what happens"], *numbered.rows()]


def _cell(reports: list[Report], name: str, numbered: Notes) -> str:
    """A cell; of several places, what they agree in stands once."""
    by_cell: dict[str, list[str]] = {}
    for report in reports:
        answer = report["answers"][name]
        cell, says = answer["cell"], answer["says"]
        if says and cell != "yes":
            cell += f" ({numbered.number(says)})"
        by_cell.setdefault(cell, []).append(report["place"])
    if name == "runs-with":
        parts = [part for cell in by_cell for part in cell.split(", ")]
        return ", ".join(dict.fromkeys(parts)) or MISSING
    if len(by_cell) < 2:
        return next(iter(by_cell), MISSING)
    return "; ".join(f"{cell} on {', '.join(who)}" for cell, who in by_cell.items())
