"""Settings, tables, batches and events drawn at random, against the reference.

The other tests go through the factors one by one; here they meet. What is drawn is
the same in every run; `RANDOM_EXAMPLES` is the number of problems (CONTRIBUTING.md).
"""

import os

import numpy as np
from harness import (
    BACKEND,
    OPTIMIZERS,
    Run,
    around,
    assert_agree,
    make,
    numpy,
    row_slices,
)
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from reference import Reference

from keras_lookahead_lazy import LazyOptimizer

# torch takes a tenth of the others' time for one.
USUAL = {"tensorflow": 300, "jax": 300, "torch": 1500}[BACKEND]
EXAMPLES = int(os.environ.get("RANDOM_EXAMPLES", USUAL))
# One row, a square, rows of one number, rows of matrices.
SHAPES = [(1, 3), (4, 4), (6, 1), (5, 2, 3), (9, 4)]
REST = [(5, 3), (3,)]
# JAX computes with float64 only if all of the process does, Keras's Muon never does.
DTYPES = ["float32"] if BACKEND == "jax" else ["float32", "float64"]
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
OUTER = [
    ("SGD", {"learning_rate": 0.7, "momentum": 0.9, "nesterov": True}),
    ("SGD", {"learning_rate": 0.5, "momentum": 0.5, "weight_decay": 0.1}),
    ("Adam", {"learning_rate": 0.05}),
]
LOOKAHEADS = st.fixed_dictionaries(
    {
        "k": st.integers(1, 5),
        "alpha": st.floats(0.0625, 1.0),
        "inner_state": st.sampled_from(["maintain", "interpolate", "reset"]),
    }
) | st.fixed_dictionaries(
    {
        "k": st.integers(1, 5),
        "outer": st.sampled_from(OUTER),
        "inner_state": st.sampled_from(["maintain", "reset"]),
    }
)
# What happens between two steps, most often nothing.
EVENTS = st.sampled_from(
    [*["nothing"] * 6, "set_weights", "restart", "learning_rate", "restore"]
)


@st.composite
def steps(draw, rows, may_freeze):
    """Up to 8 steps: the rows looked up, the weights left out, what comes before."""
    some = st.lists(st.integers(0, rows - 1), max_size=5)
    every = st.just(list(range(rows)))
    frozen = st.sampled_from([(), (), (), (0,), (1,)]) if may_freeze else st.just(())
    step = st.tuples(st.one_of(some, every), frozen, EVENTS)
    return draw(st.lists(step, min_size=1, max_size=8))


@st.composite
def problems(draw):
    """The arguments of `compare`."""
    shape = draw(st.sampled_from(SHAPES))
    kind, arguments = draw(st.sampled_from(OPTIMIZERS))
    setting = draw(st.sampled_from(SETTINGS))
    lazy = draw(st.none() | st.sampled_from(["decay", "freeze"]))
    # What Keras accumulates or averages of a weight that is left out is its own.
    may_freeze = not {"use_ema", "gradient_accumulation_steps"} & set(setting)
    return {
        "shape": shape,
        "dtype": draw(st.sampled_from(DTYPES[:1] if kind == "Muon" else DTYPES)),
        "case": (kind, {**arguments, **setting}),
        "moments": lazy,
        "lookahead": draw(LOOKAHEADS if lazy is None else st.none() | LOOKAHEADS),
        "steps": draw(steps(shape[0], may_freeze)),
        "sparse": draw(st.booleans()),
    }


@settings(
    max_examples=EXAMPLES,
    derandomize=True,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    print_blob=True,
)
@given(problems())
# Adafactor's averages over the last axis but one: by rows here, and not of a matrix.
@example(
    {
        "shape": (5, 2, 3),
        "dtype": "float32",
        "case": ("Adafactor", {"learning_rate": 0.01}),
        "moments": "freeze",
        "lookahead": None,
        "steps": [([0, 1], (), "nothing"), ([], (), "nothing"), ([2], (), "nothing")],
        "sparse": False,
    }
)
def test_random_settings(problem):
    compare(**problem)


def compare(shape, dtype, case, moments, lookahead, steps, sparse):
    rng = np.random.default_rng(0)

    def draw():
        return [rng.normal(size=s).astype(dtype) for s in (shape, *REST)]

    def start(weights):
        optimizer = make(case)
        if moments:
            # By name, for Keras's own Embedding has no table of more dimensions.
            optimizer = LazyOptimizer(optimizer, ["words/embeddings"], moments)
        if lookahead:
            optimizer = around(optimizer, **lookahead)
        return Run(optimizer, weights, "eager")

    weights = draw()
    lazy = {"tables": [0], "moments": moments} if moments else None
    reference = Reference(weights, case, lazy=lazy, lookahead=lookahead)
    run, rate = start(weights), case[1]["learning_rate"]
    for rows, left_out, event in steps:
        if event == "set_weights":
            weights = draw()
            reference.set_weights(weights)
            for variable, weight in zip(run.variables, weights, strict=True):
                variable.assign(weight)
        elif event == "restart" and lookahead:
            reference.restart()
            run.optimizer.restart()
        elif event == "learning_rate":
            rate /= 2
            reference.optimizer.learning_rate = run.optimizer.learning_rate = rate
        elif event == "restore":
            saved = numpy(run.optimizer.variables)
            run = start(run.weights)
            run.optimizer.set_weights(saved)
        # A row without a gradient comes along, as a padding token's does.
        values = rng.normal(size=(len(rows) + 1, *shape[1:])).astype(dtype)
        values[-1] = 0.0
        table = np.zeros(shape, dtype)
        np.add.at(table, [*rows, 0], values)
        gradients = [table, *draw()[1:]]
        reference.apply(gradients, left_out)
        if sparse and moments:
            gradients[0] = row_slices([*rows, 0], values, shape)
        given = [i for i in range(3) if i not in left_out]
        ours = run.step([gradients[i] for i in given], given)
        assert_agree(ours, reference.weights)
