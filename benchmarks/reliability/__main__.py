"""Ask what trainings survive, of these optimizers and of their peers.

`python -m benchmarks.reliability --help`. Every optimizer in a process of its own, the
peers in environments of their own, which are made when first needed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks import _peers
from benchmarks._peers import NotMeasured
from benchmarks.reliability import _table
from benchmarks.reliability._properties import PROPERTIES, ROOT
from examples.common.options import add_output

Environment = tuple[str, dict[str, str]]  # a Python, and variables


@dataclass(frozen=True)
class Run:
    """A script, with what it needs.

    Attributes:
        script: the module in this folder.
        environment: where it runs, from the folder of the peers' environments.
        is_apart: whether that takes more than this project's own environment.
    """

    script: str
    environment: Callable[[Path], Environment]
    is_apart: bool = True


def here(**variables: str) -> Callable[[Path], Environment]:
    """This Python."""
    return lambda folder: (sys.executable, variables)


def with_addons(folder: Path) -> Environment:
    """An old TensorFlow, which is told where the new one is."""
    paths = {"NEWEST": sys.executable, "ADDONS_PATH": _peers.tfa_path(folder)}
    return str(_peers.tfa_python(folder)), paths


def with_path(of: Callable[[Path], str]) -> Callable[[Path], Environment]:
    """This Python, with another folder to import from."""
    return lambda folder: (sys.executable, {"PYTHONPATH": of(folder)})


RUNS = {
    f"{name}-{backend}": Run("ours", here(KERAS_BACKEND=backend), is_apart=False)
    for name in ("lookahead", "lazyoptimizer", "keras-adam")
    for backend in ("tensorflow", "jax", "torch")
} | {
    "optax": Run("optax_lookahead", here(), is_apart=False),
    "timm": Run("timm_lookahead", with_path(_peers.timm_path)),
    "pytorch_optimizer": Run(
        "pytorch_optimizer_lookahead", with_path(_peers.pytorch_optimizer_path)
    ),
    **{
        name: Run("tfa", with_addons)
        for name in ("tfa-lookahead", "tfa-lazyadam", "keras-2-adam")
    },
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the scripts, print the table; 1 if one of them did not end."""
    options = parse(arguments)
    status = 0
    for name, run in RUNS.items():
        is_chosen = any(fnmatch(name, each) for each in options.only)
        if not is_chosen or (run.is_apart and options.no_peers):
            continue
        try:
            ask(name, run, options)
        except (NotMeasured, subprocess.CalledProcessError) as error:
            print(f"{name}: {_table.MISSING}: {error}", file=sys.stderr)
            status = 1
    console = Console(width=None if sys.stdout.isatty() else 200)
    for table in _table.answers(options.output), _table.notes(options.output):
        heading, *rows = table
        printed = Table(*heading)
        for row in rows:
            printed.add_row(*row)
        console.print(printed)
    return status


def ask(name: str, run: Run, options: argparse.Namespace) -> None:
    """Run one of the scripts; it prints and writes."""
    python, variables = run.environment(options.peers_dir.resolve())
    quiet = {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": ""}
    path = os.pathsep.join(filter(None, [str(ROOT), variables.get("PYTHONPATH")]))
    command = [python, "-m", f"benchmarks.reliability.{run.script}", name]
    command += ["--output", str(options.output.resolve())]
    command += ["--only", *options.properties]
    subprocess.run(
        command,
        env={
            **os.environ,
            **quiet,
            "JAX_PLATFORMS": "cpu",
            **variables,
            "PYTHONPATH": path,
        },
        cwd=ROOT,
        check=True,
    )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.reliability",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add_output(parser, "results/reliability", "folder of the answers")
    text = f"any of {', '.join(RUNS)}; * and ? allowed (default: all)"
    add("--only", nargs="+", default=["*"], metavar="NAME", help=text)
    text = f"any of {', '.join(PROPERTIES)} (default: all)"
    add(
        "--properties",
        nargs="+",
        choices=PROPERTIES,
        default=list(PROPERTIES),
        metavar="NAME",
        help=text,
    )
    text = "folder for the peers' environments, made if missing"
    add("--peers-dir", type=Path, default=ROOT / ".benchmark-peers", help=text)
    add("--no-peers", action="store_true", help="without those that need one")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
