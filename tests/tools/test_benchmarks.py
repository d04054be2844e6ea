"""The benchmarks run, and leave a figure, or the reason for its lack, for each goal."""

import json
import math
from pathlib import Path

import pytest
from harness import BACKEND, INSTALLED, run_python

from benchmarks.endurance import grown

pytest.importorskip("rich")
pytest.importorskip("matplotlib")


def run(folder: Path, *arguments: str) -> dict:
    """A run in tiny sizes; what it leaves."""
    run_python("-m", "benchmarks", "--smoke", "--output", folder, *arguments)
    return json.loads((folder / "benchmarks.json").read_text())


@pytest.mark.long
def test_every_goal_has_a_figure_or_a_reason(tmp_path: Path) -> None:
    report = run(tmp_path, "--backends", "torch", "--no-peers")
    measured = [g for g in report["goals"] if g["measured"] is not None]
    assert all(math.isfinite(goal["measured"]) for goal in measured)
    for kind in (
        "fit-decay",
        "fit-huge",
        "fit-wide",
        "fit-dlrm",
        "fit-setups-accumulation",
        "fit-memory",
        "lookahead-adam",
        "memory-lazy",
        "first-",
    ):
        assert any(goal["name"].startswith(kind) for goal in measured), kind
    reasons = {g["reason"] for g in report["goals"] if g["measured"] is None}
    assert reasons <= {
        "no GPU",
        "peers were left out",
        *(f"backend {other} was left out" for other in ("tensorflow", "jax")),
    }
    assert (tmp_path / "peak_memory.png").stat().st_size > 0
    assert {name.split()[0] for name in report["workers"]} == {"torch"}


@pytest.mark.long
@pytest.mark.parametrize("backend", ["tensorflow", "jax"])
def test_the_other_backends_measure(backend: str, tmp_path: Path) -> None:
    """A whole `fit`, on two devices, too, single steps, and bare operations."""
    names = ["fit-setups-mirrored-*", "fit-setups-model-parallel-*"]
    names += ["lookahead-adam-*", "lazy-decay-bare"]
    report = run(tmp_path, "--backends", backend, "--only", *names)
    measured = [g["measured"] for g in report["goals"] if g["measured"] is not None]
    assert len(measured) >= 2
    assert all(math.isfinite(figure) for figure in measured)
    assert {name.split()[0] for name in report["workers"]} == {backend}


def test_a_single_line_is_measured(tmp_path: Path) -> None:
    report = run(tmp_path, "--backends", "torch", "--only", "fit-dlrm-torch-loop")
    (goal,) = report["goals"]
    assert math.isfinite(goal["measured"])


def test_only_what_was_asked_for_is_measured(tmp_path: Path) -> None:
    report = run(tmp_path, "--backends", "torch", "--only", "x-*")
    assert report["goals"] == []
    assert report["workers"] == {}


@pytest.mark.long
@pytest.mark.parametrize("backend", INSTALLED)
def test_endurance(backend: str, tmp_path: Path) -> None:
    """Nothing grows in a few thousand steps; and what does is seen."""
    command = "-m", "benchmarks.endurance", "--steps", "4000"
    run_python(*command, "--output", tmp_path, backend=backend)
    report = json.loads((tmp_path / f"endurance-{backend}.json").read_text())
    assert report["steps"] == 4000
    early = report["early"]
    assert all(count > 0 for count in early.values())
    assert early.keys() == report["late"].keys() > {"memory"}
    for name in early:
        late = report["late"] | {name: early[name] + 21_000_000}
        growth = {"memory_growth_mb": (late["memory"] - early["memory"]) / 1e6}
        assert grown({"early": early, "late": late, **growth}, 20.0) == [name]


def test_the_cost_of_insight(tmp_path: Path) -> None:
    command = "-m", "benchmarks.insight", "--vocabulary", "1000", "--width", "4"
    run_python(*command, "--output", tmp_path)
    report = json.loads((tmp_path / f"insight-{BACKEND}.json").read_text())
    assert report["step_ms"] > 0
    assert report["steps"] == report["epoch_end_ms"] / report["step_ms"]
