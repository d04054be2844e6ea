"""Ordinary set-ups train as Keras does, and a step costs its rows in each of them."""

import contextlib
import itertools
import sys
import tempfile
import warnings
from typing import Any

import keras
import numpy as np
import pytest
from harness import (
    BACKEND,
    assert_agree,
    assert_same_bits,
    dtype_policy,
    numpy,
    run_python,
    tensor,
    two_replicas,
)
from whole_tables import whole_results

from keras_lookahead_lazy import LazyOptimizer, Lookahead
from keras_lookahead_lazy._accumulation import RowAccumulator

ROWS, WIDTH, BATCH, TOKENS = 4001, 8, 8, 4
JIT = {"tensorflow": (False, True), "jax": (True,), "torch": (False,)}[BACKEND]

# Policy, arguments of the layer, arguments of the inner optimizer.
SETUPS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "float32": ("float32", {}, {}),
    "mixed_bfloat16": ("mixed_bfloat16", {}, {}),
    "mixed_float16": ("mixed_float16", {}, {}),
    "layer policy": ("float32", {"dtype": "mixed_bfloat16"}, {}),
    "bfloat16 table": ("float32", {"dtype": "bfloat16"}, {}),
    "loss_scale_factor": ("float32", {}, {"loss_scale_factor": 8.0}),
    "accumulation": ("float32", {}, {"gradient_accumulation_steps": 3}),
    "accumulation, float16": (
        "mixed_float16",
        {},
        {"gradient_accumulation_steps": 3, "clipnorm": 1.0},
    ),
    "clipnorm": ("float32", {}, {"clipnorm": 0.01}),
    "global_clipnorm": ("float32", {}, {"global_clipnorm": 0.01}),
    "clipvalue": ("float32", {}, {"clipvalue": 0.001}),
    "weight_decay": ("float32", {}, {"weight_decay": 0.1}),
}
# Of numbers with 16 bits, XLA on CPUs makes 32 bits where rows are written.
UPCAST = BACKEND == "jax", "bfloat16 table"


# Keras alone decays every row, and on TensorFlow it cannot scale `tf.IndexedSlices`.
LEFT_OUT = {"weight_decay", "loss_scale_factor" if BACKEND == "tensorflow" else ""}
COMPARED = [name for name in SETUPS if name not in LEFT_OUT]


def crossed(*choices):
    """All combinations; those beside the diagonal on request."""
    longest = max(map(len, choices))
    diagonal = [tuple(each[i % len(each)] for each in choices) for i in range(longest)]
    return [
        pytest.param(*case, marks=[] if case in diagonal else pytest.mark.long)
        for case in itertools.product(*choices)
    ]


def make_looked_up(optimizer, layer, jit, seed=0):
    keras.utils.set_random_seed(seed)
    table = keras.layers.Embedding(ROWS, WIDTH, name="words", **layer)
    model = keras.Sequential(
        [
            keras.Input((TOKENS,), batch_size=BATCH, dtype="int32"),
            table,
            keras.layers.Flatten(),
            keras.layers.Dense(1, dtype="float32"),
        ]
    )
    model.compile(optimizer, "mse", jit_compile=jit)
    model.optimizer.build(model.trainable_variables)
    return model


def make_batches(count, seed=1):
    rng = np.random.default_rng(seed)
    x = np.minimum(rng.zipf(1.3, size=(count, BATCH, TOKENS)), ROWS - 1)
    return x.astype("int32"), rng.normal(size=(count, BATCH, 1)).astype("float32")


def make_distinct(count, seed=1):
    """Each row once a batch: Keras on TensorFlow does not add up several slices."""
    x, y = make_batches(count, seed)
    rng = np.random.default_rng(seed)
    draws = [rng.permutation(60)[: BATCH * TOKENS] for _ in range(count)]
    return np.stack(draws).reshape(x.shape).astype("int32"), y


def lazy_of(optimizer):
    while not isinstance(optimizer, LazyOptimizer):
        optimizer = optimizer.inner_optimizer
    return optimizer


@pytest.mark.parametrize(("moments", "jit"), crossed(["decay", "freeze"], JIT))
@pytest.mark.parametrize("name", SETUPS)
def test_a_step_computes_no_whole_table(name, moments, jit):
    policy, layer, settings = SETUPS[name]
    with dtype_policy(policy):
        inner = keras.optimizers.Adam(0.01, **settings)
        model = make_looked_up(LazyOptimizer(inner, moments=moments), layer, jit)
        (x,), (y,) = make_batches(1)
        found = whole_results(model, x, y, jit, in_loops="float16" in policy)
    if (jit, name) == UPCAST or (jit and name == "bfloat16 table"):
        return
    if "accumulation" in name and jit:  # which has the whole table for rare cycles
        return
    assert not found
    assert list(lazy_of(model.optimizer).step_forms.values()) == ["rows"]


@pytest.mark.parametrize("jit", JIT)
@pytest.mark.parametrize(
    ("layer", "settings", "word"),
    [
        ({"embeddings_regularizer": "l2"}, {}, "activity_regularizer"),
        ({}, {"use_ema": True}, "use_ema"),
    ],
)
def test_a_step_on_the_whole_table_is_seen(layer, settings, word, jit):
    inner = keras.optimizers.Adam(0.01, **settings)
    model = make_looked_up(LazyOptimizer(inner), layer, jit)
    (x,), (y,) = make_batches(1)
    assert whole_results(model, x, y, jit)
    (form,) = lazy_of(model.optimizer).step_forms.values()
    assert word in form


def test_a_large_table_warns_once(monkeypatch):
    monkeypatch.setattr("keras_lookahead_lazy._lazy_step.LARGE", ROWS - 1)
    lazy = LazyOptimizer(keras.optimizers.Adam(0.01))
    model = make_looked_up(lazy, {"embeddings_regularizer": "l2"}, JIT[0])
    (form,) = lazy.step_forms.values()
    assert form.endswith("(expected)")
    x, y = make_batches(2)
    with pytest.warns(UserWarning, match="works on all .* embeddings_regularizer"):
        model.train_on_batch(x[0], y[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.train_on_batch(x[1], y[1])


@pytest.mark.parametrize(
    ("kind", "around", "jit"), crossed(["SGD", "Adagrad"], [True, False], JIT)
)
@pytest.mark.parametrize("name", COMPARED)
def test_equals_keras_whatever_is_sampled(name, kind, around, jit):
    """SGD without momentum and Adagrad move no row whose gradient is zero."""
    policy, layer, settings = SETUPS[name]

    def train(wrap):
        with dtype_policy(policy):
            inner = getattr(keras.optimizers, kind)(0.05, **settings)
            model = make_looked_up(wrap(inner), layer, jit)
            for x, y in zip(*make_distinct(7), strict=True):
                model.train_on_batch(x, y)
        return [w.astype("float32") for w in numpy(model.weights)]

    if around:
        ours = train(lambda inner: Lookahead(LazyOptimizer(inner), k=2))
        keras_own = train(lambda inner: Lookahead(inner, k=2))
    else:
        ours, keras_own = train(LazyOptimizer), train(lambda inner: inner)
    sixteen = "float16" in policy or "float16" in layer.get("dtype", "")
    assert_agree(ours, keras_own, 2e-2 if sixteen else 2e-6)


@pytest.mark.parametrize("jit", JIT)
@pytest.mark.parametrize("steps", [5, 6, 7])
def test_accumulation_goes_on_in_mid_cycle(steps, jit, tmp_path):
    """Saved after any step and loaded into a new model: the same bits."""

    def new():
        inner = keras.optimizers.Adam(0.01, gradient_accumulation_steps=3)
        return make_looked_up(Lookahead(LazyOptimizer(inner), k=2), {}, jit)

    x, y = make_batches(12)
    whole, first, second = new(), new(), new()
    for i in range(12):
        whole.train_on_batch(x[i], y[i])
        (first if i < steps else second).train_on_batch(x[i], y[i])
        if i == steps - 1:
            first.save_weights(tmp_path / "mid.weights.h5")
            second.load_weights(tmp_path / "mid.weights.h5")
    for ours, expected in zip(numpy(second.weights), numpy(whole.weights), strict=True):
        np.testing.assert_array_equal(ours, expected)


@pytest.mark.skipif(BACKEND == "jax", reason="shapes are fixed")
def test_accumulation_works_on_rows_however_many_differ(monkeypatch):
    """Step by step, where a step has as many rows as differ: fewer and fewer here."""
    monkeypatch.setattr(RowAccumulator, "clear", None)  # of the whole table
    lazy = LazyOptimizer(keras.optimizers.Adam(0.01, gradient_accumulation_steps=3))
    model = make_looked_up(lazy, {}, jit=False)
    model.run_eagerly = True
    x, y = make_batches(6)
    ids = np.arange(BATCH * TOKENS).reshape(BATCH, TOKENS)
    x[:] = np.stack([ids, ids // 4, ids // 16] * 2)
    for ids, labels in zip(x, y, strict=True):
        model.train_on_batch(ids, labels)
    assert list(lazy.step_forms.values()) == ["rows"]


@pytest.mark.parametrize("jit", JIT)
def test_accumulation_of_batches_of_other_sizes(jit):
    """A cycle whose list is longer than the last step's look-ups tell."""
    sizes = [8, 8, 2, 8, 2, 8, 2, 2, 8, 8, 8, 1]

    def train(wrap):
        inner = keras.optimizers.Adagrad(0.05, gradient_accumulation_steps=3)
        keras.utils.set_random_seed(0)
        model = keras.Sequential(
            [
                keras.Input((TOKENS,), dtype="int32"),
                keras.layers.Embedding(ROWS, WIDTH),
                keras.layers.Flatten(),
                keras.layers.Dense(1),
            ]
        )
        model.compile(wrap(inner), "mse", jit_compile=jit)
        for x, y, size in zip(*make_distinct(12), sizes, strict=True):
            model.train_on_batch(x[:size], y[:size])
        return numpy(model.weights)

    assert_agree(train(LazyOptimizer), train(lambda inner: inner), 2e-6)


@pytest.mark.parametrize("jit", JIT)
def test_a_skipped_step_changes_nothing(jit):
    """Loss scaling skips a step whose gradients are infinite, and halves the scale."""
    with dtype_policy("mixed_float16"):
        lazy = LazyOptimizer(keras.optimizers.Adam(0.01))
        model = make_looked_up(Lookahead(lazy, k=2), {}, jit)
        x, y = make_batches(3)
        model.train_on_batch(x[0], y[0])
        scale = float(model.optimizer.dynamic_scale.numpy())
        state = numpy([*model.weights, *lazy._variables])
        model.train_on_batch(x[1], np.full_like(y[1], np.inf))
        after = numpy([*model.weights, *lazy._variables])
    for ours, before in zip(after, state, strict=True):
        np.testing.assert_array_equal(ours, before)
    assert float(model.optimizer.dynamic_scale.numpy()) == scale / 2


class RowWiseAdagrad(keras.optimizers.Optimizer):
    """One second moment a row, and a word about its slots."""

    def build(self, variables):
        if self.built:
            return
        super().build(variables)
        self._accumulators = [
            self.add_variable(
                shape=(*v.shape[:1], *[1] * (len(v.shape) - 1)), name="accumulator"
            )
            for v in variables
        ]

    def update_step(self, gradient, variable, learning_rate):
        accumulator = self._accumulators[self._get_variable_index(variable)]
        gradient = keras.ops.convert_to_tensor(gradient)
        axes = tuple(range(1, len(gradient.shape)))
        squares = keras.ops.mean(gradient * gradient, axis=axes, keepdims=True)
        self.assign_add(accumulator, squares)
        step = learning_rate * gradient / (keras.ops.sqrt(accumulator) + 1e-7)
        self.assign_sub(variable, step)

    def slot_decay_rates(self):
        return {"_accumulators": 1.0}


class Centralized(RowWiseAdagrad):
    """Changes gradients by their mean over rows, and does not say anything of that."""

    def apply(self, grads, trainable_variables=None):
        centred = [g - keras.ops.mean(g, axis=0, keepdims=True) for g in grads]
        super().apply(centred, trainable_variables)


@pytest.mark.parametrize("jit", JIT)
def test_an_optimizer_of_the_users_own_by_rows(jit):
    lazy = LazyOptimizer(RowWiseAdagrad(0.1))
    model = make_looked_up(lazy, {}, jit)
    table, squares = numpy([model.weights[0]])[0].astype("float64"), np.zeros((ROWS, 1))
    for x, y in zip(*make_batches(6), strict=True):
        gradient = table_gradient(model, x, y)
        squares += np.mean(gradient**2, axis=1, keepdims=True)
        table -= 0.1 * gradient / (np.sqrt(squares) + 1e-7)
        model.train_on_batch(x, y)
        assert_agree(numpy([model.weights[0]]), [table], 1e-5)
    assert list(lazy.step_forms.values()) == ["rows"]
    (x,), (y,) = make_batches(1)
    assert not whole_results(model, x, y, jit)


def table_gradient(model, x, y):
    """Of the mean squared error, in float64."""
    table, kernel, bias = (w.astype("float64") for w in numpy(model.weights))
    flat = table[x].reshape(len(x), -1)
    error = 2 * (flat @ kernel + bias - y) / len(x)
    gradient = np.zeros_like(table)
    np.add.at(gradient, x, (error @ kernel.T).reshape(*x.shape, -1))
    return gradient


def test_an_optimizer_with_an_apply_of_its_own_gets_whole_gradients():
    weights = []
    for wrap in (LazyOptimizer, lambda inner: inner):
        model = make_looked_up(wrap(Centralized(0.1)), {}, BACKEND == "jax")
        for x, y in zip(*make_batches(4), strict=True):
            gradients = [
                tensor(g.astype("float32")) for g in all_gradients(model, x, y)
            ]
            with contextlib.nullcontext():
                model.optimizer.apply(gradients, model.trainable_variables)
        weights.append(numpy(model.weights))
    assert_agree(weights[0], weights[1], 1e-6)


def all_gradients(model, x, y):
    table, kernel, bias = (w.astype("float64") for w in numpy(model.weights))
    flat = table[x].reshape(len(x), -1)
    error = 2 * (flat @ kernel + bias - y) / len(x)
    return [table_gradient(model, x, y), flat.T @ error, error.sum(axis=0)]


@pytest.mark.slow
@pytest.mark.skipif(BACKEND != "torch", reason="torch only")
@pytest.mark.parametrize(
    "name",
    ["float32", pytest.param("accumulation, float16", marks=pytest.mark.long)],
)
def test_torch_compile_keeps_the_row_step(name, monkeypatch):
    """torch.compile traces the layers; lookups and optimizers run as without it."""
    import torch

    monkeypatch.setattr("keras_lookahead_lazy._lazy_step.LARGE", ROWS - 1)
    policy, layer, settings = SETUPS[name]
    trained = []
    for jit in (False, True):
        torch._dynamo.reset()
        with dtype_policy(policy), warnings.catch_warnings():
            warnings.filterwarnings("error", message="Each step works on all")
            lazy = LazyOptimizer(keras.optimizers.Adam(0.01, **settings))
            model = make_looked_up(Lookahead(lazy, k=2), layer, jit)
            for x, y in zip(*make_batches(5), strict=True):
                model.train_on_batch(x, y)
        assert list(lazy.step_forms.values()) == ["rows"]
        trained.append(model.get_weights())
    assert torch._dynamo.utils.counters["frames"]["ok"]  # something was compiled
    for eager, compiled in zip(*trained, strict=True):
        np.testing.assert_allclose(compiled, eager, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(BACKEND != "jax", reason="JAX only")
@pytest.mark.parametrize("changed", [False, True])
def test_a_loop_of_your_own_inside_scan(changed):
    """The step works on rows, unless the loop changes the gradient."""
    import jax

    x, y = make_distinct(5)
    mse = keras.losses.MeanSquaredError()
    trained = []
    for wrap in (lambda inner: inner, LazyOptimizer):
        optimizer = wrap(keras.optimizers.Adagrad(0.1))
        model = make_looked_up(optimizer, {}, True)

        def loss(weights, x, y, model=model):
            return mse(y, model.stateless_call(weights, [], x)[0])

        def step(state, batch, optimizer=optimizer, loss=loss):
            weights, variables = state
            gradients = jax.grad(loss)(weights, *batch)
            if changed:
                gradients = [2 * gradient for gradient in gradients]
            return optimizer.stateless_apply(variables, gradients, weights), None

        state = (
            [weight.value for weight in model.trainable_variables],
            [variable.value for variable in optimizer.variables],
        )
        (weights, _), _ = jax.jit(lambda *a, step=step: jax.lax.scan(step, *a))(
            state, (x, y)
        )
        trained.append([np.asarray(weight) for weight in weights])
    (form,) = optimizer.step_forms.values()
    assert "your own loop changed" in form if changed else form == "rows"
    for keras_, ours in zip(*trained, strict=True):
        np.testing.assert_allclose(ours, keras_, rtol=1e-6, atol=1e-7)


@pytest.mark.slow
@pytest.mark.skipif(BACKEND != "torch", reason="torch only")
def test_torch_compile_of_lookahead_compiles_the_inner_step():
    """Once, not for each count of a cycle."""
    import torch

    trained, compiled = [], []
    for jit in (False, True):
        torch._dynamo.reset()
        lookahead = Lookahead(keras.optimizers.Adam(0.01), k=3)
        model = make_looked_up(lookahead, {}, jit)
        for x, y in zip(*make_batches(7), strict=True):
            model.train_on_batch(x, y)
            compiled.append(torch._dynamo.utils.counters["frames"]["ok"])
        trained.append(model.get_weights())
    first, second, *others = compiled[7:]
    assert first
    assert set(others) == {second}
    for eager, ours in zip(*trained, strict=True):
        np.testing.assert_allclose(ours, eager, rtol=1e-5, atol=1e-6)


# Keras refuses gradient accumulation in a compiled step, and bfloat16 tables.
ON_REPLICAS = [
    name for name in SETUPS if "accumulation" not in name and name != "bfloat16 table"
]


def replicas_train_as_keras():
    """With two replicas, each set-up works on rows and trains as Keras does."""
    import tensorflow as tf
    from traffic import operations

    strategy = two_replicas()
    x, y = make_distinct(10)  # pairs of batches: one for each replica

    def train(wrap, name):
        policy, layer, settings = SETUPS[name]
        with strategy.scope(), dtype_policy(policy):
            model = make_looked_up(
                wrap(keras.optimizers.SGD(0.1, **settings)), layer, False
            )

        @tf.function(autograph=False)
        def step(*parts):
            strategy.run(model.train_step, args=(parts,))

        def shares(pair):
            return strategy.experimental_distribute_values_from_function(
                lambda context: tf.constant(pair[context.replica_id_in_sync_group])
            )

        for i in range(0, len(x), 2):
            step(shares(x[i : i + 2]), shares(y[i : i + 2]))
        graph = step.get_concrete_function(shares(x[:2]), shares(y[:2])).graph
        found = {
            op.type
            for op in operations(graph, set())
            for output in op.outputs
            if output.shape.rank and output.shape[0] == ROWS
        }
        return model, found

    for name in ON_REPLICAS:
        model, found = train(LazyOptimizer, name)
        assert not found, (name, found)
        assert list(lazy_of(model.optimizer).step_forms.values()) == ["rows"], name
        if name in COMPARED:
            expected, _ = train(lambda inner: inner, name)
            theirs = numpy(expected.trainable_variables)
            assert_agree(numpy(model.trainable_variables), theirs, 1e-6)


def all_replicas_skip_a_step():
    """Even if only the gradients of the last one are not finite."""
    with two_replicas().scope(), dtype_policy("mixed_float16"):
        lazy = LazyOptimizer(keras.optimizers.Adam(0.1))
        model = make_looked_up(Lookahead(lazy, k=2), {}, False)
    (x, more), (y, _) = make_batches(2)
    x, y = np.concatenate([x, more]), np.concatenate([y, np.full_like(y, 1e30)])
    before = numpy([*model.weights, *lazy.variables])
    model.fit(x, y, batch_size=len(x), shuffle=False, verbose=0)
    assert_same_bits(numpy([*model.weights, *lazy.variables]), before)
    assert float(numpy([model.optimizer.dynamic_scale])[0]) == 2**14  # of 2**15


def replicas_resume():
    """From a file written in mid-cycle, with loss scaling and clipping, to the bit."""
    (x, y), strategy = make_batches(10), two_replicas()
    x, y = x.reshape(-1, TOKENS), y.reshape(-1, 1)
    middle = 4 * BATCH

    def fit(model, part):
        model.fit(x[part], y[part], batch_size=2 * BATCH, shuffle=False, verbose=0)

    with (
        tempfile.TemporaryDirectory() as folder,
        strategy.scope(),
        dtype_policy("mixed_float16"),
    ):
        path = f"{folder}/model.keras"
        inner = keras.optimizers.Adam(0.01, global_clipnorm=0.01)
        model = make_looked_up(Lookahead(LazyOptimizer(inner), k=3), {}, False)
        fit(model, slice(middle))
        model.save(path)
        resumed = keras.models.load_model(path)
        for each in (model, resumed):
            fit(each, slice(middle, None))
        ours, theirs = ([*m.weights, *m.optimizer.variables] for m in (resumed, model))
        assert_same_bits(numpy(ours), numpy(theirs))
        assert list(lazy_of(resumed.optimizer).step_forms.values()) == ["rows"]


@pytest.mark.slow
@pytest.mark.skipif(BACKEND != "tensorflow", reason="tf.distribute")
@pytest.mark.parametrize(
    "program", [replicas_train_as_keras, all_replicas_skip_a_step, replicas_resume]
)
def test_replicas(program):
    run_python(__file__, program.__name__, one_backend=True)


if __name__ == "__main__":
    globals()[sys.argv[1]]()
