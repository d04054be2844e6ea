"""Somebody has decided about every optimizer that Keras has.

The decisions are the table in docs/how-it-works.md. A version of Keras that brings a
new optimizer fails here until the table has a row for it.
"""

import re
from typing import Any

import keras
import pytest
from harness import ROOT, make_model

from keras_lookahead_lazy import LazyOptimizer, Lookahead

PAGE = (ROOT / "docs" / "how-it-works.md").read_text(encoding="utf-8")
SECTION = PAGE.partition("## Inner optimizers")[2].partition("\n## ")[0]
ROWS = [line.strip("| ").split(" | ") for line in SECTION.splitlines() if "| `" in line]
DECIDED = {
    name: (states.split(", "), form)
    for names, states, form in ROWS
    for name in re.findall(r"`(\w+)`", names)
}
EXPORTED = [
    cls
    for cls in vars(keras.optimizers).values()
    if isinstance(cls, type)
    and issubclass(cls, keras.Optimizer)
    and cls is not keras.Optimizer
]
AROUND = {"LossScaleOptimizer", "MultiOptimizer"}  # which need others inside them
STATES = ["maintain", "interpolate", "reset"]


def make(cls: type) -> Any:
    if cls.__name__ == "MultiOptimizer":
        return cls(keras.optimizers.OptimizerMap(keras.optimizers.Adam()))
    return cls(keras.optimizers.Adam()) if cls.__name__ in AROUND else cls()


def test_each_exported_optimizer_is_decided_about():
    assert len(EXPORTED) >= 14
    undecided = {cls.__name__ for cls in EXPORTED} - DECIDED.keys()
    assert not undecided, "derive them by their equations; see docs/how-it-works.md"


@pytest.mark.parametrize("cls", EXPORTED, ids=lambda cls: cls.__name__)
def test_inner_states_that_are_decided_on(cls):
    states, _ = DECIDED[cls.__name__]
    allowed = []
    for state in STATES:
        model = make_model()
        try:
            Lookahead(make(cls), inner_state=state).build(model.trainable_variables)
        except ValueError:
            continue
        allowed.append(state)
    assert allowed == (STATES if states[0].startswith("as the optimizer") else states)


@pytest.mark.parametrize("cls", EXPORTED, ids=lambda cls: cls.__name__)
def test_forms_of_steps_that_are_decided_on(cls):
    _, decided = DECIDED[cls.__name__]
    if decided == "refused":
        with pytest.raises(ValueError, match="LazyOptimizer"):
            LazyOptimizer(make(cls))
        return
    lazy = LazyOptimizer(make(cls))
    lazy.build(make_model().trainable_variables)
    (form,) = lazy.step_forms.values()
    if decided in ("rows", "masked"):
        assert re.match(r"\w+", form)[0] == decided  # type: ignore[index]


@pytest.mark.skipif("ScheduleFreeAdamW" not in vars(keras.optimizers), reason="3.15")
def test_schedule_free_that_is_known_in_build_only():
    """A `MultiOptimizer` may have a function, which it asks for each weight's."""
    schedule_free = keras.optimizers.ScheduleFreeAdamW()
    optimizer = Lookahead(keras.optimizers.MultiOptimizer(lambda _: schedule_free))
    with pytest.raises(ValueError, match="inside the MultiOptimizer"):
        optimizer.build(make_model().trainable_variables)
    assert not optimizer.built
