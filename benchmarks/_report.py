"""What a run leaves behind: a table, a JSON file and two plots."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure as Canvas
from rich.table import Table

from benchmarks._goals import Goal
from benchmarks._measure import Figure, Variant, summary
from examples.common.plots import BLACK, BLUE, ORANGE, SKY, Curve
from examples.common.record import machine, write_json

CURVES = {
    "Adam": Curve("Keras Adam", BLACK),
    "Lazy decay": Curve('LazyOptimizer(Adam, "decay")', BLUE),
    "Lazy freeze": Curve('LazyOptimizer(Adam, "freeze")', SKY),
    "LazyAdam": Curve("tfa LazyAdam", ORANGE),
}


@dataclasses.dataclass(frozen=True)
class Line:
    """A goal and what was measured; a text, instead of a figure, says why not."""

    goal: Goal
    measured: Figure | str
    peers: dict[str, Figure | str]


@dataclasses.dataclass(frozen=True)
class Point:
    """A point of the plot of step time against vocabulary."""

    variant: Variant
    measured: Figure | str


class Report:
    """The figures so far, written after each, so that none is lost.

    Args:
        folder: where to write.
        command: the command line.
        workers: versions and devices, by worker; filled while they start.
        peaks: peak memory of each variant, likewise.
    """

    def __init__(
        self,
        folder: Path,
        command: list[str],
        workers: dict[str, Any],
        peaks: dict[Variant, Figure],
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._about = {"command": command, "machine": machine(), "workers": workers}
        self._peaks = peaks
        self._lines: list[Line] = []
        self._points: list[Point] = []

    def add_line(self, line: Line) -> None:
        self._lines.append(line)
        self.write()

    def add_point(self, point: Point) -> None:
        self._points.append(point)
        self.write()

    def write(self) -> None:
        """Write the JSON file."""
        content = {
            **self._about,
            "goals": [_line_json(line) for line in self._lines],
            "step_time": [
                {
                    "variant": str(point.variant),
                    "problem": dataclasses.asdict(point.variant.problem),
                    **_json(point.measured),
                }
                for point in self._points
            ],
            "peak_memory": [summary(v, peak) for v, peak in self._peaks.items()],
        }
        write_json(self._folder / "benchmarks.json", content)

    def draw(self) -> None:
        """Draw the plots."""
        if any(isinstance(point.measured, Figure) for point in self._points):
            draw_step_times(self._folder / "step_time.png", self._points)
        if self._peaks:
            draw_memory(self._folder / "peak_memory.png", self._peaks)

    def table(self) -> Table:
        """The goals and what was measured."""
        result = Table(title="Medians [quartiles]", title_justify="left")
        result.add_column("what", min_width=20)
        result.add_column("where", no_wrap=True)
        for heading in ("goal", "measured"):
            result.add_column(heading, justify="right", no_wrap=True)
        result.add_column("peers")
        for line in self._lines:
            goal, measured = line.goal, line.measured
            limit = ""
            if goal.limit is not None:
                limit = f"{'≥' if goal.is_floor else '≤'} {goal.limit:g}"
            style = "dim"
            if isinstance(measured, Figure):
                style = {True: "green", False: "red", None: ""}[
                    goal.is_met(measured.value)
                ]
            peers = [f"{name} {_text(peer)}" for name, peer in line.peers.items()]
            cell = _text(measured)
            result.add_row(
                goal.what,
                goal.where,
                limit,
                f"[{style}]{cell}[/]" if style else cell,
                "\n".join(peers),
            )
        return result


def _text(measured: Figure | str) -> str:
    if isinstance(measured, str):
        return "not measured"
    low, high = (f"{quartile:.3g}" for quartile in measured.quartiles)
    unit = f" {measured.unit}" if measured.unit else ""
    return rf"{measured.value:.3g}{unit} \[{low} {high}]"


def _line_json(line: Line) -> dict[str, Any]:
    goal, measured = line.goal, line.measured
    is_met = goal.is_met(measured.value) if isinstance(measured, Figure) else None
    return {
        "name": goal.name,
        "what": goal.what,
        "where": goal.where,
        "goal": goal.limit,
        "goal_is": "at least" if goal.is_floor else "at most",
        "met": is_met,
        **_json(measured),
        "peers": {name: _json(peer) for name, peer in line.peers.items()},
    }


def _json(measured: Figure | str) -> dict[str, Any]:
    if isinstance(measured, str):
        return {"measured": None, "reason": measured}
    return {
        "measured": measured.value,
        "quartiles": measured.quartiles,
        "samples": len(measured.samples),
        "unit": measured.unit,
        "parts": measured.parts,
    }


def draw_step_times(path: Path, points: Sequence[Point]) -> None:
    """Draw step time against vocabulary, both on logarithmic axes."""
    # A bare Figure draws with Agg and needs neither pyplot nor a display.
    canvas = Canvas(figsize=(7, 4.5))
    axes = canvas.subplots()
    curves: dict[str, list[tuple[int, Figure]]] = {}
    for point in points:
        if isinstance(point.measured, Figure):
            size = point.variant.problem.vocabulary
            curves.setdefault(point.variant.optimizer, []).append(
                (size, point.measured)
            )
    for optimizer, curve in curves.items():
        axes.plot(
            [size for size, _ in curve],
            [measured.value for _, measured in curve],
            color=CURVES[optimizer].color,
            label=CURVES[optimizer].label,
            linewidth=2,
            marker="o",
            markersize=5,
        )
        axes.fill_between(
            [size for size, _ in curve],
            [measured.quartiles[0] for _, measured in curve],
            [measured.quartiles[1] for _, measured in curve],
            color=CURVES[optimizer].color,
            alpha=0.2,
            linewidth=0,
        )
    rows = points[0].variant.problem.rows
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="vocabulary (rows of the table)",
        ylabel="optimizer step (ms)",
        title=f"{rows} lookups a step, width {points[0].variant.problem.width}, CPU",
    )
    axes.legend()
    canvas.savefig(path, dpi=150)


def draw_memory(path: Path, peaks: dict[Variant, Figure]) -> None:
    """Draw each variant's peak memory, in copies of the weights."""
    variants = sorted(peaks, key=lambda v: (v.problem.vocabulary, v.worker, v.mode))
    canvas = Canvas(figsize=(8, 1 + 0.25 * len(variants)))
    axes = canvas.subplots()
    # By number: two problems may have bars of the same name.
    axes.barh(
        range(len(variants)),
        [peaks[v].value / (4 * v.problem.weights) for v in variants],
        color=[ORANGE if _is_wrapper(v.optimizer) else BLUE for v in variants],
    )
    axes.set_yticks(range(len(variants)), [_bar_label(v) for v in variants])
    axes.set_ylim(len(variants) - 0.5, -0.5)
    canvas.supxlabel(
        "peak memory of weights, gradients, slots and steps (copies of the weights)",
        fontsize=10,
    )
    canvas.savefig(path, dpi=150)


def _bar_label(variant: Variant) -> str:
    problem = f", {variant.problem.vocabulary:,} rows"
    place = "tfa" if variant.worker == "tfa" else f"{variant.worker} {variant.mode}"
    return (
        f"{variant.optimizer}{problem if variant.problem.vocabulary else ''}, {place}"
    )


def _is_wrapper(optimizer: str) -> bool:
    return "ookahead" in optimizer or "Lazy" in optimizer
