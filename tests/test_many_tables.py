"""A step on many tables joins their rows; each trains as it would by itself."""

import sys

import keras
import numpy as np
import pytest
from harness import BACKEND, assert_agree, run_python, two_replicas
from keras import layers

from keras_lookahead_lazy import LazyOptimizer, Lookahead, _row_step

SIZES = (900, 700, 2000, 3, 40, 1500)  # small ones are taken whole on some backends
BATCH, STEPS = 8, 7
JIT = {"tensorflow": (False, True), "jax": (True,), "torch": (False,)}[BACKEND]


def make_many_tables(optimizer, jit=False):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((len(SIZES),), BATCH, dtype="int32")
    features = [
        layers.Embedding(size, 5 if number == 2 else 4, name=f"table_{number}")(
            inputs[:, number]
        )
        for number, size in enumerate(SIZES)
    ]
    model = keras.Model(inputs, layers.Dense(1)(layers.Concatenate()(features)))
    model.compile(optimizer, "mse", jit_compile=jit)
    return model


def data():
    random = np.random.default_rng(1)
    ids = random.integers(0, np.minimum(SIZES, 300), (STEPS * BATCH, len(SIZES)))
    return ids.astype("int32"), random.normal(size=(len(ids), 1)).astype("float32")


def trained(optimizer, jit=False):
    """Weights and slots after some steps."""
    model = make_many_tables(optimizer, jit)
    model.fit(*data(), batch_size=BATCH, shuffle=False, verbose=0)
    values = [keras.ops.convert_to_numpy(v) for v in model.optimizer.variables]
    return model.get_weights() + [v for v in values if v.dtype == np.float32]


@pytest.fixture
def joined(monkeypatch):
    """How many tables each step of the inner optimizer was made on."""
    counts = []
    step_on = _row_step._step_on

    def note(parts, *arguments):
        counts.append(len(parts))
        step_on(parts, *arguments)

    monkeypatch.setattr(_row_step, "_step_on", note)
    return counts


@pytest.mark.parametrize("jit", JIT)
@pytest.mark.parametrize(
    ("name", "moments"),
    [
        ("Adam", "decay"),
        ("AdamW", "freeze"),
        pytest.param("SGD", "decay", marks=pytest.mark.long),
        pytest.param("Adagrad", "freeze", marks=pytest.mark.long),
    ],
)
def test_joined_tables_train_as_single_ones(name, moments, jit, joined, monkeypatch):
    def make():
        cls = getattr(keras.optimizers, name)
        inner = cls(0.02, momentum=0.9) if name == "SGD" else cls(0.02)
        return Lookahead(LazyOptimizer(inner, moments=moments), k=3)

    ours = trained(make(), jit)
    assert max(joined) == 5  # all but the one with another width
    joined.clear()
    monkeypatch.setattr(_row_step, "TABLES_TO_JOIN", 100)
    apart = trained(make(), jit)
    assert max(joined) == 1
    assert_agree(ours, apart)


def test_sgd_trains_them_as_keras_does(joined):
    lazy = LazyOptimizer(keras.optimizers.SGD(0.1))
    assert_agree(trained(lazy), trained(keras.optimizers.SGD(0.1)), 1e-6)
    assert max(joined) == 5


def test_settings_by_table_keep_them_apart(joined):
    """A constraint, weight decay that leaves one out, an optimizer of one's own."""

    class Mine(keras.optimizers.SGD):
        def update_step(self, gradient, variable, learning_rate):
            super().update_step(2 * gradient, variable, learning_rate)

        def slot_decay_rates(self):
            return {}

    trained(LazyOptimizer(Mine(0.1)))
    assert max(joined) == 1
    joined.clear()

    excluded = keras.optimizers.AdamW(0.02)
    excluded.exclude_from_weight_decay(var_names=["table_1"])
    model = make_many_tables(LazyOptimizer(excluded))
    model.layers[-3].embeddings.constraint = keras.constraints.NonNeg()
    model.fit(*data(), batch_size=BATCH, verbose=0)
    assert max(joined) <= 5
    for layer in model.layers:
        if getattr(layer, "embeddings", None) is None:
            continue
        if layer.embeddings.constraint is not None:
            seen = np.unique(data()[0][:, int(layer.name[-1])])
            rows = keras.ops.convert_to_numpy(layer.embeddings)[seen]
            assert rows.min() >= 0


def replicas():
    """Two replicas against one device, in this process."""
    strategy = two_replicas()
    with strategy.scope():
        model = make_many_tables(LazyOptimizer(keras.optimizers.Adam(0.02)))
        model.fit(*data(), batch_size=BATCH, shuffle=False, verbose=0)
    alone = make_many_tables(LazyOptimizer(keras.optimizers.Adam(0.02)))
    alone.fit(*data(), batch_size=BATCH, shuffle=False, verbose=0)
    assert_agree(model.get_weights(), alone.get_weights(), 1e-5)
    for variable in model.trainable_variables:
        first, second = strategy.experimental_local_results(variable.value)
        np.testing.assert_array_equal(first.numpy(), second.numpy())


@pytest.mark.skipif(BACKEND != "tensorflow", reason="tf.distribute")
def test_replicas_join_tables():
    run_python(__file__, "replicas", one_backend=True)


if __name__ == "__main__":
    globals()[sys.argv[1]]()
