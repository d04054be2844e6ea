"""Tables that ModelParallel divides train as they do on one device, in every set-up."""

import contextlib
from typing import Any

import keras
import numpy as np
import pytest
from harness import BACKEND, dtype_policy, run_python
from test_setups import SETUPS

from keras_lookahead_lazy import LazyOptimizer, Lookahead

BATCH, STEPS = 16, 7
# Axes of the mesh, and those that divide rows and columns of a table.
DIVISIONS = {
    "rows": ((2, 4), ("batch", "model"), ("model", None)),
    "rows as the batch": ((8,), ("batch",), ("batch", None)),
    "rows as the batch, many devices": ((8,), ("batch",), ("batch", None)),
    "rows, many devices": ((2, 4), ("batch", "model"), ("model", None)),
    "columns": ((2, 4), ("batch", "model"), (None, "model")),
    "rows and columns": ((2, 4), ("batch", "model"), ("batch", "model")),
}
# Set-ups, and arguments of Lookahead.
COMPARED: dict[str, dict[str, Any]] = {
    "layer policy": {},
    "loss_scale_factor": {},
    "accumulation": {},
    "global_clipnorm": {
        "outer_optimizer": {
            "class_name": "SGD",
            "config": {"learning_rate": 0.7, "momentum": 0.5, "nesterov": True},
        }
    },
}


@pytest.mark.slow
@pytest.mark.skipif(BACKEND != "jax", reason="keras.distribution")
def test_divided_tables_train_as_whole_ones():
    run_python(__file__, one_backend=True)


def divide(division):
    from keras_lookahead_lazy._backend import jax_placement

    jax_placement.DEVICES_TO_EXCHANGE = 8 if "many" in division else 9
    shape, names, axes = DIVISIONS[division]
    mesh = keras.distribution.DeviceMesh(shape, names)
    layouts = keras.distribution.LayoutMap(mesh)
    layouts[".*(words|items).*embeddings.*"] = axes
    keras.distribution.set_distribution(
        keras.distribution.ModelParallel(layout_map=layouts, batch_dim_name="batch")
    )


@contextlib.contextmanager
def exchanges_counted():
    from keras_lookahead_lazy._backend import jax_exchange

    calls = []
    function = jax_exchange.sum_on_owner

    def counted(*arguments):
        calls.append("sum_on_owner")
        return function(*arguments)

    jax_exchange.sum_on_owner = counted
    yield calls
    jax_exchange.sum_on_owner = function


def train(name):
    """Two tables: one that is looked up twice, and one that takes a single id."""
    policy, layer, settings = SETUPS[name]
    rng = np.random.default_rng(0)
    with dtype_policy(policy):
        texts = keras.Input((6,), dtype="int32")
        item = keras.Input((), dtype="int32")
        words = keras.layers.Embedding(4000, 8, name="words", **layer)
        items = keras.layers.Embedding(2400, 4, name="items", **layer)
        read = keras.layers.Concatenate(axis=1)([words(texts), words(texts[:, :2])])
        read = keras.layers.Flatten()(read)
        hidden = keras.layers.Concatenate()([read, items(item)])
        model = keras.Model([texts, item], keras.layers.Dense(1)(hidden))
        model.set_weights([rng.normal(size=w.shape) for w in model.weights])
        lazy = LazyOptimizer(keras.optimizers.Adam(0.01, **settings))
        model.compile(Lookahead(lazy, k=3, **COMPARED[name]), "mse")
    count = BATCH * STEPS
    x = rng.integers(0, 4000, (count, 6)), rng.integers(0, 2400, count)
    y = rng.normal(size=(count, 1))
    model.fit(list(x), y, batch_size=BATCH, shuffle=False, verbose=0)
    assert set(lazy.step_forms.values()) == {"rows"}
    return [np.array(w, "float32") for w in model.get_weights()]


def main():
    for name in COMPARED:
        alone = train(name)
        for division in DIVISIONS:
            divide(division)
            with exchanges_counted() as calls:
                divided = train(name)
            is_used = division.endswith("many devices") and name != "accumulation"
            assert ("sum_on_owner" in calls) == is_used
            keras.distribution.set_distribution(None)
            for ours, theirs in zip(divided, alone, strict=True):
                error = np.max(np.abs(ours - theirs)) / np.max(np.abs(theirs))
                assert error < 1e-6, (name, division, error)


if __name__ == "__main__":
    import os

    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
    main()
