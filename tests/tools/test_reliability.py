"""The comparison of what trainings survive: its checks find faults, its scripts run."""

import json
import os
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from harness import BACKEND, run_python

from benchmarks.reliability import _properties, _table
from benchmarks.reliability._properties import (
    PROPERTIES,
    WIDTH,
    Answer,
    Way,
    ask,
    initial,
)

pytest.importorskip("rich")

ALIVE: list[Any] = []
SHARED: dict[int, Any] = {}


class Training(_properties.Training):
    """Lookahead around SGD with momentum, or a fault that it is given."""

    def __init__(self, fault, weights, k, inner, rate, is_scaled):
        self.fault, self.k, self.inner, self.rate = fault, k, inner, rate
        self.is_scaled = is_scaled
        self.fast = weights
        self.copies = [w.copy() for w in weights]
        self.momenta: Any = [np.zeros_like(w) for w in weights]
        if fault == "threads":
            self.momenta = [SHARED.setdefault(i, m) for i, m in enumerate(self.momenta)]
        self.updates = 0

    def step(self, gradients):
        if self.fault == "constant":
            ALIVE.append(None)
        if self.is_scaled and not all(np.isfinite(g).all() for g in gradients):
            self.updates += self.fault == "skipped"
            return
        if self.updates == 0 and self.fault != "loaded-first":
            self.copies = [w.copy() for w in self.fast]
        if self.fault == "nan" and np.isnan(gradients[0]).any():
            gradients = [g * np.nan for g in gradients]
        self.updates += 1
        for fast, slow, momentum, gradient in zip(
            self.fast, self.copies, self.momenta, gradients, strict=True
        ):
            if gradient is not None:
                momentum[:] = np.float32(0.9) * momentum + gradient
                fast -= np.float32(self.rate) * momentum
            if self.updates % self.k == 0:
                if gradient is not None or self.fault == "frozen":
                    slow += np.float32(0.5) * (fast - slow)
                    fast[:] = slow
                else:
                    slow[:] = fast

    def weights(self):
        return [w.copy() for w in self.fast]

    def set_weights(self, weights):
        self.fast = [w.copy() for w in weights]

    def kept(self):
        everything = [*self.copies, *self.momenta, self.updates]
        return [np.array(each) for each in everything]

    def slow(self):
        return [w.copy() for w in self.copies]


def save(training, folder):
    parts = training.fast, training.copies, training.momenta, training.updates
    content = parts, (training.k, training.inner)
    (folder / "run.pickle").write_bytes(pickle.dumps(content))


def load(training, folder):
    fault = training.fault
    try:
        parts, settings = pickle.loads((folder / "run.pickle").read_bytes())
    except Exception:
        if fault == "cut-off":
            return training
        raise
    if fault == "another-model":
        training.fast = parts[0]
    if [w.shape for w in parts[0]] != [w.shape for w in training.copies]:
        raise ValueError("of another model")
    expected = training.k, training.inner
    for name, ours, theirs in zip(
        ("another-k", "another-inner"), expected, settings, strict=True
    ):
        if ours != theirs and fault != name:
            raise ValueError("of other settings")
    training.fast, training.copies, training.momenta, training.updates = parts
    training.updates += fault == "resumed"
    return training


class Subject(_properties.Subject):
    name, column, runs_with = "numpy", "numpy", "NumPy"
    ways: ClassVar = {"pickle": Way(save, load)}
    scalings = ("of its own",)

    def __init__(self, fault=""):
        self.fault = fault

    def build(self, setup):
        if setup.k < 1 and self.fault != "wrong-uses":
            raise ValueError("k")
        shapes = (setup.rows, WIDTH), (WIDTH, setup.units), (setup.units,)
        return Training(
            self.fault,
            initial(shapes, setup.seed),
            setup.k,
            setup.inner,
            setup.rate,
            setup.scaling is not None,
        )

    def wrong_uses(self) -> Mapping[str, Callable[[], object]]:
        return {"k=0": lambda: self.make(k=0)}

    def restart(self, training):
        if self.fault == "replaced":
            raise NotImplementedError
        training.updates = 0

    def alive(self):
        return {"arrays": len(ALIVE)}

    def versions(self):
        return {}


CHECKED = [name for name in PROPERTIES if name not in ("killed", "runs-with")]


@pytest.mark.parametrize("name", CHECKED)
def test_a_property_that_holds(name: str) -> None:
    assert ask(Subject(), name) == Answer("yes")


@pytest.mark.parametrize("name", CHECKED)
def test_a_property_that_does_not_hold(name: str) -> None:
    answer = ask(Subject(name), name)
    assert answer.cell == "no"
    assert answer.says


SCRIPTS = ["optax", f"lookahead-{BACKEND}"]


@pytest.mark.slow
@pytest.mark.long
def test_scripts_run(tmp_path: Path) -> None:
    """In processes that are killed, too; and what holds of ours."""
    properties = ["killed", "skipped", "frozen"]
    output = "--output", tmp_path, "--no-peers"
    command = "-m", "benchmarks.reliability", *output, "--only", *SCRIPTS
    printed = run_python(*command, "--properties", *properties)
    assert PROPERTIES["killed"].title[:9] in printed
    reports = {
        name: json.loads((tmp_path / f"{name}.json").read_text()) for name in SCRIPTS
    }
    for name, report in reports.items():
        assert list(report["answers"]) == properties
        cells = {key: each["cell"] for key, each in report["answers"].items()}
        if name == "optax":
            assert cells == {"killed": "yes", "skipped": "in part", "frozen": "-"}
        else:
            assert set(cells.values()) == {"yes"}
        assert report["answers"]["killed"]["details"].startswith("4 kills, ")
    assert sorted(os.listdir(tmp_path)) == sorted(f"{name}.json" for name in SCRIPTS)


def written(folder: Path, place: str, **cells: dict) -> None:
    report = {"column": "Lookahead", "place": place, "answers": cells}
    (folder / f"{place}.json").write_text(json.dumps(report))


def test_table(tmp_path: Path) -> None:
    """Places that agree stand once, and what is said has a number of its own."""
    yes, no = {"cell": "yes", "says": ""}, {"cell": "no", "says": "it ends"}
    written(tmp_path, "JAX", resumed=yes, frozen=no)
    written(tmp_path, "torch", resumed=yes, frozen=no, killed=no)
    written(tmp_path, "TensorFlow", resumed=yes, frozen=yes)
    rows = {row[0]: row[1:] for row in _table.answers(tmp_path)}
    frozen, killed = (PROPERTIES[name].title for name in ("frozen", "killed"))
    assert rows[PROPERTIES["resumed"].title][:2] == ["yes", _table.MISSING]
    assert rows[killed][0] == "no (1)"
    assert rows[frozen][0] == "no (1) on JAX, torch; yes on TensorFlow"
    assert _table.notes(tmp_path)[1:] == [["1", "it ends"]]
