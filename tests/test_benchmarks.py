"""The benchmarks run, and leave a figure, or the reason for its lack, for each goal."""

import json
import math
import subprocess
import sys
from pathlib import Path

import keras
import pytest

ROOT = Path(__file__).parent.parent

pytest.importorskip("rich")
pytest.importorskip("matplotlib")


def run(*arguments: str) -> None:
    command = [sys.executable, "-m", "benchmarks", *arguments]
    subprocess.run(command, check=True, cwd=ROOT, timeout=300)


def test_every_goal_has_a_figure_or_a_reason(tmp_path: Path) -> None:
    backend = keras.backend.backend()
    run("--smoke", "--backends", backend, "--no-peers", "--output", str(tmp_path))

    report = json.loads((tmp_path / "benchmarks.json").read_text())
    measured = [g for g in report["goals"] if g["measured"] is not None]
    assert all(math.isfinite(goal["measured"]) for goal in measured)
    for kind in (
        "fit-decay",
        "fit-huge",
        "fit-memory",
        "lookahead-adam",
        "memory-lazy",
        "first-",
    ):
        assert any(goal["name"].startswith(kind) for goal in measured), kind
    reasons = {g["reason"] for g in report["goals"] if g["measured"] is None}
    left_out = {"tensorflow", "jax", "torch"} - {backend}
    assert reasons <= {
        "no GPU",
        "peers were left out",
        *(f"backend {other} was left out" for other in left_out),
    }
    assert (tmp_path / "peak_memory.png").stat().st_size > 0
    assert {name.split()[0] for name in report["workers"]} == {backend}


def test_only_what_was_asked_for_is_measured(tmp_path: Path) -> None:
    run("--smoke", "--backends", "torch", "--only", "x-*", "--output", str(tmp_path))

    report = json.loads((tmp_path / "benchmarks.json").read_text())
    assert report["goals"] == []
    assert report["workers"] == {}
