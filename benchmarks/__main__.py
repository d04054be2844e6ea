"""Measure every ratio that the project claims: `python -m benchmarks --help`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

from rich.console import Console

from benchmarks._goals import Goal, Measure, Sizes, goals, scaling_variants
from benchmarks._measure import Bench, Effort, Figure, Variant
from benchmarks._peers import NotMeasured
from benchmarks._report import Line, Point, Report
from benchmarks._workers import ROOT, Workers
from examples.common.options import add_output

BACKENDS = ("tensorflow", "jax", "torch")
FULL = Effort(seconds=10, rounds=(7, 200), processes=3, compilations=7)
QUICK = Effort(seconds=2, rounds=(3, 50), processes=1, compilations=3)
SMOKE = Effort(seconds=0, rounds=(2, 2), processes=0, compilations=1)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what the command line asks for, print and write it."""
    options = parse(arguments)
    sizes, effort = Sizes(draw=options.draw), FULL
    if options.quick:
        sizes = Sizes(draw=options.draw, vocabularies=(10**4, 10**5, 10**6))
        effort = QUICK
    if options.smoke:
        sizes, effort = smoke_sizes(options.draw), SMOKE
    console = Console(width=None if sys.stdout.isatty() else 120)
    if options.list:
        list_names(sizes, console)
        return
    peers = None if options.no_peers else options.peers_dir.resolve()
    workers = Workers(options.backends, peers)
    bench = Bench(workers, effort)
    report = Report(options.output, command(options), workers.about, bench.peaks)
    try:
        for goal in goals(sizes):
            if is_chosen(goal.name, options.only):
                report.add_line(measure_goal(goal, bench, console))
        if is_chosen("scaling", options.only):
            for vocabulary in sizes.vocabularies:
                for variant in scaling_variants(sizes, vocabulary):
                    report.add_point(measure_point(variant, bench, console))
    finally:
        workers.close_all()
    report.write()
    report.draw()
    console.print(report.table())
    console.print(f"Written to {options.output}")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser("python -m benchmarks", description=__doc__)
    parser.add_argument(
        "--quick",
        action="store_true",
        help="shorter runs; tables of at most 10^6 rows in the plot",
    )
    parser.add_argument(
        "--smoke", action="store_true", help="tiny sizes: shows only that it works"
    )
    add_output(parser, "results", "folder for the JSON file and the plots")
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="NAME",
        help="names of what to measure, * and ? allowed; see --list",
    )
    parser.add_argument("--list", action="store_true", help="list the names, and stop")
    parser.add_argument(
        "--backends", nargs="+", choices=BACKENDS, default=BACKENDS, metavar="BACKEND"
    )
    parser.add_argument(
        "--draw",
        choices=("uniform", "zipf"),
        default="uniform",
        help="how looked-up rows are distributed (default: uniform)",
    )
    parser.add_argument(
        "--peers-dir",
        type=Path,
        default=ROOT / ".benchmark-peers",
        metavar="DIR",
        help="folder for the peers' environments, made if missing",
    )
    parser.add_argument(
        "--no-peers",
        action="store_true",
        help="without what other environments or packages are needed for",
    )
    return parser.parse_args(arguments)


def command(options: argparse.Namespace) -> list[str]:
    """The command line in full, without the folders."""
    words = ["python", "-m", "benchmarks"]
    for name, value in vars(options).items():
        if value and not isinstance(value, Path):
            words.append(f"--{name.replace('_', '-')}")
            if isinstance(value, str):
                words.append(value)
            elif value is not True:
                words.extend(value)
    return words


def list_names(sizes: Sizes, console: Console) -> None:
    """Print what `--only` can choose."""
    for goal in goals(sizes):
        console.print(f"{goal.name:32}{goal.what}, {goal.where}", highlight=False)
    console.print(f"{'scaling':32}step time against vocabulary, for the plot")


def smoke_sizes(draw: str) -> Sizes:
    """Problems that take no time."""
    return Sizes(
        huge_table=4000,
        wide_table=1000,
        big_table=2000,
        table=1000,
        medium_table=500,
        small_table=100,
        rows=64,
        draw=draw,
        matrices=2,
        matrix=(30, 10),
        layers=2,
        gpu_matrices=2,
        gpu_matrix=(30, 10),
        tables=(50, 3, 20),
        clicks=8,
        vocabularies=(100, 1000),
    )


def is_chosen(name: str, patterns: Sequence[str] | None) -> bool:
    """Whether `--only` asks for that name."""
    return patterns is None or any(fnmatch(name, pattern) for pattern in patterns)


def measure_goal(goal: Goal, bench: Bench, console: Console) -> Line:
    """Measure a line of the table, and its peers."""
    with console.status(f"{goal.what}, {goal.where}"):
        measured = attempt(goal.measure, bench)
        peers = {name: attempt(peer, bench) for name, peer in goal.peers.items()}
    console.print(f"{goal.name}: {brief(measured)}", highlight=False)
    return Line(goal, measured, peers)


def measure_point(variant: Variant, bench: Bench, console: Console) -> Point:
    """Measure a point of the plot of step time against vocabulary."""
    vocabulary = variant.problem.vocabulary
    with console.status(f"{variant}, {vocabulary:,} rows"), bench.room(variant):
        measured = attempt(lambda b: b.step_times([variant])[0], bench)
    text = f"{variant}, {vocabulary:,} rows: {brief(measured)}"
    console.print(text, highlight=False)
    return Point(variant, measured)


def attempt(measure: Measure, bench: Bench) -> Figure | str:
    """A figure, or why there is none."""
    try:
        return measure(bench)
    except NotMeasured as reason:
        return str(reason)


def brief(measured: Figure | str) -> str:
    """A figure, or why there is none, in a line."""
    if isinstance(measured, Figure):
        return f"{measured.value:.3g} {measured.unit}"
    return f"not measured: {measured}"


if __name__ == "__main__":
    main()
