"""Trajectories that bojone's own code computed on Keras 2.3.1 (tests/golden)."""

import json
from pathlib import Path

import keras
import numpy as np
import pytest

from keras_lookahead_lazy import LazyOptimizer, Lookahead

GOLDEN = sorted((Path(__file__).parent / "golden").glob("*.npz"))
# torch.compile gives eager's numbers at many times the cost: once is enough.
COMPILED = keras.backend.backend() != "torch"


def model_of(golden):
    vocabulary, width = golden["initial_0"].shape
    model = keras.Sequential(
        [
            keras.Input(golden["x"].shape[2:]),
            keras.layers.Embedding(vocabulary, width),
            keras.layers.Flatten(),
            keras.layers.Dense(8, "tanh"),
            keras.layers.Dense(1),
        ]
    )
    model.set_weights([golden[f"initial_{i}"] for i in range(5)])
    return model


def make_optimizer(case):
    arguments = dict(case["args"])
    arguments["learning_rate"] = arguments.pop("lr")
    inner = getattr(keras.optimizers, case["opt"])(**arguments)
    if case["kind"] == "lazy":
        return LazyOptimizer(inner)
    return Lookahead(inner, k=case["k"], alpha=case["alpha"])


def largest_difference(model, golden, step):
    return max(
        np.max(np.abs(weight - golden[f"weights_{i}"][step]))
        for i, weight in enumerate(model.get_weights())
    )


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
@pytest.mark.parametrize(
    "how", [{}, {"run_eagerly": True}] + [{"jit_compile": True}] * COMPILED, ids=str
)
def test_train_on_batch(path, how):
    golden = np.load(path)
    model = model_of(golden)
    model.compile(make_optimizer(json.loads(str(golden["case"]))), "mse", **how)
    for step, (x, y) in enumerate(zip(golden["x"], golden["y"], strict=True)):
        model.reset_metrics()  # before Keras 3.11 the loss is that of all steps so far
        loss = model.train_on_batch(x, y)
        assert abs(loss - golden["loss"][step]) < 2e-6
        assert largest_difference(model, golden, step) < 2e-6


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_fit(path):
    golden = np.load(path)
    model = model_of(golden)
    model.compile(make_optimizer(json.loads(str(golden["case"]))), "mse")
    x, y = golden["x"], golden["y"]
    model.fit(
        x.reshape(-1, x.shape[-1]),
        y.reshape(-1, 1),
        batch_size=x.shape[1],
        shuffle=False,
        verbose=0,
    )
    assert largest_difference(model, golden, -1) < 2e-6


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="GradientTape")
@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
@pytest.mark.parametrize("compiled", [False, True])
def test_gradient_tape(path, compiled):
    import tensorflow as tf

    golden = np.load(path)
    model = model_of(golden)
    optimizer = make_optimizer(json.loads(str(golden["case"])))

    def step(x, y):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((model(x, training=True) - y) ** 2)
        gradients = tape.gradient(loss, model.trainable_variables)
        assert isinstance(gradients[0], tf.IndexedSlices)
        pairs = zip(gradients, model.trainable_variables, strict=True)
        optimizer.apply_gradients(pairs)

    if compiled:
        step = tf.function(step)
    for i, (x, y) in enumerate(zip(golden["x"], golden["y"], strict=True)):
        step(tf.constant(x), tf.constant(y))
        assert largest_difference(model, golden, i) < 2e-6


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="loss.backward()")
@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_backward(path):
    import torch

    golden = np.load(path)
    model = model_of(golden)
    optimizer = make_optimizer(json.loads(str(golden["case"])))
    for i, (x, y) in enumerate(zip(golden["x"], golden["y"], strict=True)):
        model.zero_grad()
        loss = torch.mean((model(torch.tensor(x)) - torch.tensor(y)) ** 2)
        loss.backward()
        weights = model.trainable_variables
        optimizer.apply([w.value.grad for w in weights], weights)
        assert largest_difference(model, golden, i) < 2e-6


@pytest.mark.skipif(keras.backend.backend() != "jax", reason="jax.jit")
@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_jitted_loop(path):
    import jax

    golden = np.load(path)
    model = model_of(golden)
    optimizer = make_optimizer(json.loads(str(golden["case"])))
    optimizer.build(model.trainable_variables)

    def loss(weights, x, y):
        prediction, _ = model.stateless_call(weights, [], x, training=True)
        return jax.numpy.mean((prediction - y) ** 2)

    def step(weights, state, x, y):
        gradients = jax.grad(loss)(weights, x, y)
        return optimizer.stateless_apply(state, gradients, weights)

    step = jax.jit(step, donate_argnums=(0, 1))
    weights = [jax.numpy.array(v.value, copy=True) for v in model.trainable_variables]
    state = [jax.numpy.array(v.value, copy=True) for v in optimizer.variables]
    for i, (x, y) in enumerate(zip(golden["x"], golden["y"], strict=True)):
        weights, state = step(weights, state, x, y)
        difference = max(
            np.max(np.abs(w - golden[f"weights_{j}"][i])) for j, w in enumerate(weights)
        )
        assert difference < 2e-6
