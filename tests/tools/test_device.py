"""The command for a machine with a GPU, tried without one."""

import json
import math
from pathlib import Path

import pytest
from harness import INSTALLED, run_python

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from benchmarks import pages

pytestmark = pytest.mark.long
LAZY = ["Lazy decay", "Lookahead(Lazy decay)"]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict:
    if missing := {"jax", "torch"} - {*INSTALLED}:
        pytest.skip(f"benchmarks.device needs {', '.join(missing)}")
    folder = tmp_path_factory.mktemp("device")
    run_python("-m", "benchmarks.device", "--smoke", "--output", folder)
    return json.loads((folder / "device.json").read_text())


def found(report: dict, part: str) -> dict[tuple[str, str], dict]:
    """The results of a part, by backend and optimizer."""
    return {
        (each["backend"], result["optimizer"]): result
        for each in report["parts"]
        for result in each["results"]
        if each["part"] == part
    }


def test_every_part_is_measured(report: dict) -> None:
    assert [each["reason"] for each in report["parts"]] == [None] * len(report["parts"])
    both = {(backend, name) for backend in ("jax", "torch") for name in LAZY}
    for part in ("correct", "stops", "same_bits"):
        assert found(report, part).keys() == both, part
    times = found(report, "fit")
    clicks = found(report, "recommender")
    for timed in (times, clicks):
        assert timed.keys() == both | {("torch", "torch SparseAdam")}
        assert all(0 < each["ms"] < math.inf for each in timed.values())
        assert all(0 < each["first_s"] < math.inf for each in timed.values())
    assert all(times[key]["step_forms"] == ["rows"] for key in both)
    assert report["backends"].keys() == {"jax", "torch"}


def test_the_optimizers_are_correct(report: dict) -> None:
    for result in found(report, "correct").values():
        assert 0 < result["error"] <= result["limit"]


def test_two_runs_are_the_same(report: dict) -> None:
    """On a CPU; on a GPU that is a question."""
    assert all(result["same"] for result in found(report, "same_bits").values())


def test_it_becomes_tables(report: dict) -> None:
    (_, *times), (_, *checks) = pages.device_times(report), pages.device_checks(report)
    assert len(times) == 5
    assert all(float(line[4]) > 0 for line in times)
    assert len(pages.device_recommender(report)) == 1 + 5
    assert len(checks) == 4
    assert all(pages.MISSING not in line for line in checks)


def test_no_time_is_a_reason(tmp_path: Path) -> None:
    command = "-m", "benchmarks.device", "--smoke", "--minutes", "1e-9"
    run_python(*command, "--output", tmp_path)
    parts = json.loads((tmp_path / "device.json").read_text())["parts"]
    assert {each["reason"] for each in parts} == {"no time left"}
