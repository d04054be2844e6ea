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
    answers = [(report["answers"][name], report["place"]) for report in reports]
    if name == "runs-with" and len(answers) > 1:
        parts = [part for answer, _ in answers for part in answer["cell"].split(", ")]
        return ", ".join(dict.fromkeys(parts))
    places: dict[str, dict[str, list[str]]] = {}  # by cell, and by what it says
    for answer, place in answers:
        by_says = places.setdefault(answer["cell"], {})
        by_says.setdefault(answer["says"], []).append(place)
    cells = []
    for cell, by_says in places.items():
        numbers = [
            numbered.number(says if len(by_says) == 1 else f"{_on(who)}: {says}")
            for says, who in by_says.items()
            if says
        ]
        text = cell + (f" ({', '.join(map(str, numbers))})" if numbers else "")
        who = [place for each in by_says.values() for place in each]
        cells.append(text if len(places) == 1 else f"{text} {_on(who)}")
    return "; ".join(cells) or MISSING


def _on(places: list[str]) -> str:
    return f"on {', '.join(places)}"
