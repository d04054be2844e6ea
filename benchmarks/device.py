"""Measure both optimizers on an accelerator, in one command.

It needs JAX and torch with support for the accelerator, and Keras; neither TensorFlow
nor a network. What is known is written after each part, so that a run which is cut off
leaves the parts before: `python -m benchmarks.device --help`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from examples.common.options import add_output, positive_float
from examples.common.record import machine, write_json
from examples.recommender.criteo import SIZES

ROOT = Path(__file__).parents[1]
BACKENDS = ("jax", "torch")
OPTIMIZERS = (
    "Lazy decay",
    "Lookahead(Lazy decay)",
    "Adam",
    "Lazy freeze",
    "Lookahead(Adam)",
)
PEER = "torch SparseAdam"
# Seconds that are kept for each process that comes after the times of steps.
KEPT = 30
ENVIRONMENT = {
    "TF_CPP_MIN_LOG_LEVEL": "3",
    # Nothing else runs there, and a table may need three quarters of the memory.
    "XLA_PYTHON_CLIENT_MEM_FRACTION": ".95",
}


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is measured.

    Attributes:
        vocabularies: of the tables, the smallest first.
        width: of the tables.
        rows: look-ups a step.
        policies: the layers' dtype policies.
        optimizers: what trains, the most important first.
        correct: look-ups a step of the comparison with NumPy.
        tables: rows of DLRM's tables.
        clicks: its batch size.
    """

    vocabularies: tuple[int, ...] = (10**6, 10**7, 5 * 10**7)
    width: int = 128
    rows: int = 4096
    policies: tuple[str, ...] = ("mixed_bfloat16", "float32")
    optimizers: tuple[str, ...] = OPTIMIZERS
    correct: int = 256
    tables: tuple[int, ...] = SIZES
    clicks: int = 2048


SMOKE = Sizes(
    (1000,), 4, 64, ("float32",), OPTIMIZERS[:2], 32, tables=(50, 3, 20), clicks=8
)


@dataclasses.dataclass(frozen=True)
class Task:
    """A process that measures something, see `benchmarks.workers.on_device`."""

    part: str
    backend: str
    arguments: dict[str, Any]
    seconds: float

    def __str__(self) -> str:
        optimizer = self.arguments.get("optimizer", "")
        return " ".join(filter(None, (self.part, self.backend, optimizer)))


def tasks(sizes: Sizes) -> Iterator[Task]:
    """All that is measured, in order, with the most time for each."""
    optimizers = {"optimizers": sizes.optimizers}
    for backend in BACKENDS:
        yield Task("correct", backend, {**optimizers, "rows": sizes.correct}, 60)
    table = {"width": sizes.width, "rows": sizes.rows}
    for optimizer in (*sizes.optimizers, PEER):
        policies = sizes.policies if optimizer != PEER else ("float32",)
        tables = [(v, p) for v in sizes.vocabularies for p in policies]
        arguments = {"optimizer": optimizer, "tables": tables, **table}
        for backend in BACKENDS if optimizer != PEER else ("torch",):
            yield Task("fit", backend, arguments, 60)
    for backend in BACKENDS:
        names = [*sizes.optimizers[:3], *[PEER] * (backend == "torch")]
        model = {"tables": sizes.tables, "clicks": sizes.clicks}
        yield Task("recommender", backend, {"optimizers": names, **model}, 45)
    arguments = {**optimizers, "vocabulary": sizes.vocabularies[0], **table}
    for part in ("stops", "same_bits"):
        for backend in BACKENDS:
            yield Task(part, backend, arguments, KEPT)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what fits into the time, print and write it."""
    options = parse(arguments)
    console = Console(width=None if sys.stdout.isatty() else 140)
    options.output.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * options.minutes
    report: dict[str, Any] = {
        "command": command(options),
        "environment": machine(),
        "backends": {},
        "parts": [],
    }
    path = options.output / "device.json"
    todo = list(tasks(SMOKE if options.smoke else Sizes()))
    while todo:
        task = todo.pop(0)
        part: dict[str, Any] = {
            "part": task.part,
            "backend": task.backend,
            "results": [],
        }
        part |= {k: v for k, v in task.arguments.items() if k in ("width", "rows")}
        report["parts"].append(part)

        def note(found: dict, backend: str = task.backend, part: dict = part) -> None:
            if "device" in found:
                report["backends"][backend] = found
            else:
                part["results"].append(found)
            write_json(path, report)

        started = time.monotonic()
        kept = sum(KEPT for each in todo if task.part == "fit" != each.part)
        most = end - started - kept
        seconds = most if options.smoke else min(task.seconds, most)
        part["reason"] = run(task, seconds, note) if seconds > 0 else "no time left"
        part["seconds"] = round(time.monotonic() - started, 1)
        write_json(path, report)
        told = part["reason"] or f"{len(part['results'])} results"
        console.print(f"{task}: {told}, {part['seconds']} s", highlight=False)
    console.print(overview(report))
    console.print(f"Written to {path}")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser("python -m benchmarks.device", description=__doc__)
    parser.add_argument(
        "--minutes",
        type=positive_float,
        default=8.0,
        metavar="N",
        help="stop after so long, whatever is left (default: %(default)s)",
    )
    parser.add_argument("--smoke", action="store_true", help="tables of no size")
    add_output(parser, "results", "folder for device.json")
    return parser.parse_args(arguments)


def command(options: argparse.Namespace) -> list[str]:
    """The command line in full, without the folder."""
    words = ["python", "-m", "benchmarks.device", "--minutes", f"{options.minutes:g}"]
    return words + ["--smoke"] * options.smoke


def run(task: Task, seconds: float, note: Callable[[dict], None]) -> str | None:
    """Note what a process finds; return why that is not all, if it is not."""
    module = "benchmarks.workers.on_device"
    with tempfile.TemporaryFile(mode="w+", errors="replace") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", module, task.part, json.dumps(task.arguments)],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            cwd=ROOT,
            env={**ENVIRONMENT, **os.environ, "KERAS_BACKEND": task.backend},
        )
        timer = threading.Timer(seconds, process.kill)
        timer.start()
        assert process.stdout is not None
        for line in process.stdout:
            note(json.loads(line))
        code = process.wait()
        is_late = not timer.is_alive()
        timer.cancel()
        if code == 0:
            return None
        if is_late:
            return f"stopped after {seconds:.0f} s"
        log.seek(0)
        lines = [line.strip() for line in log if line.strip()]
        return lines[-1][:200] if lines else f"exit status {code}"


def overview(report: dict[str, Any]) -> Table:
    """The table that is printed."""
    names = {about["device"] for about in report["backends"].values()}
    result = Table(title=f"On {' and '.join(sorted(names))}", title_justify="left")
    for heading in ("part", "backend", "optimizer", "result"):
        result.add_column(heading)
    for part in report["parts"]:
        for found in part["results"]:
            hidden = ("optimizer", "events", "rounds_ms")
            words = [f"{k} {short(v)}" for k, v in found.items() if k not in hidden]
            row = part["part"], part["backend"], found["optimizer"], ", ".join(words)
            result.add_row(*row)
    return result


def short(value: Any) -> str:
    """A figure of three digits."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
