"""Settings, tables and batches drawn at random, against the reference.

The other tests go through the factors one by one; here they meet. What is drawn is
the same in every run.
"""

import numpy as np
from harness import OPTIMIZERS, Run, assert_agree, make, row_slices
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import Reference

from keras_lookahead_lazy import LazyOptimizer, Lookahead

# One row, a square, rows of one number, rows of matrices.
SHAPES = [(1, 3), (4, 4), (6, 1), (5, 2, 3), (9, 4)]
REST = [(5, 3), (3,)]
SETTINGS = [
    {},
    {"weight_decay": 0.05},
    {"clipnorm": 0.5},
    {"clipvalue": 0.3},
    {"global_clipnorm": 0.8},
    {"use_ema": True, "ema_momentum": 0.8, "ema_overwrite_frequency": 3},
    {"gradient_accumulation_steps": 2},
    {"loss_scale_factor": 8.0},
]
LOOKAHEADS = st.fixed_dictionaries(
    {
        "k": st.integers(1, 4),
        "alpha": st.sampled_from([0.1, 0.5, 0.8, 1.0]),
        "inner_state": st.sampled_from(["maintain", "interpolate", "reset"]),
    }
)


@st.composite
def batches(draw, rows):
    """The rows that each of 8 batches looks up: none, all, or some, also twice."""
    some = st.lists(st.integers(0, rows - 1), max_size=5)
    every = st.just(list(range(rows)))
    return draw(st.lists(st.one_of(some, every), min_size=8, max_size=8))


@st.composite
def problems(draw):
    """The arguments of `compare`."""
    shape = draw(st.sampled_from(SHAPES))
    kind, arguments = draw(st.sampled_from(OPTIMIZERS))
    lazy = draw(st.none() | st.sampled_from(["decay", "freeze"]))
    return {
        "shape": shape,
        "case": (kind, {**arguments, **draw(st.sampled_from(SETTINGS))}),
        "moments": lazy,
        "lookahead": draw(LOOKAHEADS if lazy is None else st.none() | LOOKAHEADS),
        "batches": draw(batches(shape[0])),
        "sparse": draw(st.booleans()),
    }


@settings(max_examples=40, derandomize=True, deadline=None)
@given(problems())
def test_random_settings(problem):
    compare(**problem)


def compare(shape, case, moments, lookahead, batches, sparse):
    rng = np.random.default_rng(0)
    weights = [rng.normal(size=s).astype("float32") for s in (shape, *REST)]
    optimizer = make(case)
    if moments:
        optimizer = LazyOptimizer(optimizer, moments=moments)
    if lookahead:
        optimizer = Lookahead(optimizer, **lookahead)
    lazy = {"tables": [0], "moments": moments} if moments else None
    reference = Reference(weights, case, lazy=lazy, lookahead=lookahead)
    run = Run(optimizer, weights, "eager")
    for rows in batches:
        # A row without a gradient comes along, as a padding token's does.
        values = rng.normal(size=(len(rows) + 1, *shape[1:])).astype("float32")
        values[-1] = 0.0
        table = np.zeros(shape, "float32")
        np.add.at(table, [*rows, 0], values)
        rest = [rng.normal(size=s).astype("float32") for s in REST]
        reference.apply([table, *rest])
        if sparse and moments:
            table = row_slices([*rows, 0], values, shape)
        assert_agree(run.step([table, *rest]), reference.weights)
