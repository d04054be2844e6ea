"""What users' programs do around training, against plain Keras or NumPy."""

from typing import Any

import keras
import numpy as np
import pytest
from harness import BACKEND, around, assert_agree, assert_same_bits
from keras import ops
from reference import Cycle, Reference

from keras_lookahead_lazy import LazyOptimizer, Lookahead, SlowWeights

VOCABULARY, WIDTH, TOKENS, BATCH = 300, 3, 4, 5
ADAM = {"learning_rate": 0.03}


def network(seed=0):
    keras.utils.set_random_seed(seed)
    return keras.Sequential(
        [
            keras.Input((TOKENS,), dtype="int32"),
            keras.layers.Embedding(VOCABULARY, WIDTH),
            keras.layers.Flatten(),
            keras.layers.Dense(1),
        ]
    )


def batches(steps, most=VOCABULARY):
    rng = np.random.default_rng(1)
    x = np.minimum(rng.zipf(1.4, size=(steps, BATCH, TOKENS)) - 1, most - 1)
    return x.astype("int32"), rng.normal(size=(steps, BATCH, 1)).astype("float32")


def fit(model, x, y, **arguments):
    x, y = x.reshape(-1, TOKENS), y.reshape(-1, 1)
    model.fit(x, y, batch_size=BATCH, shuffle=False, verbose=0, **arguments)


def step(reference, x, y):
    """A step of the reference, with the gradient of the mean squared error."""
    table, kernel, bias = reference.weights
    rows = table[x].reshape(len(x), -1)
    error = 2 * (rows @ kernel + bias - y) / len(x)
    gradient = np.zeros_like(table)
    np.add.at(gradient, x.ravel(), (error @ kernel.T).reshape(-1, WIDTH))
    reference.apply([gradient, rows.T @ error, error.sum(axis=0)])


OUTER = {"learning_rate": 0.7, "momentum": 0.9, "nesterov": True}


@pytest.mark.parametrize("with_outer", [None, 0, 2])
def test_three_lookaheads_around_lazy(with_outer):
    """One of them has an outer optimizer, the innermost or the outermost, or none."""
    x, y = batches(14)
    optimizer = LazyOptimizer(keras.optimizers.Adam(**ADAM))
    cycles: list[dict[str, Any]] = [
        {"k": 2, "alpha": 0.3},
        {"k": 3, "alpha": 0.6},
        {"k": 2, "alpha": 0.8},
    ]
    if with_outer is not None:
        cycles[with_outer] = {"k": 2, "outer": ("SGD", OUTER)}
    for cycle in cycles:
        optimizer = around(optimizer, **cycle)
    model = network()
    model.compile(optimizer, "mse")
    reference = Reference(
        model.get_weights(), ("Adam", ADAM), lazy={"tables": [0]}, lookahead=cycles
    )
    fit(model, x, y)
    for pair in zip(x, y, strict=True):
        step(reference, *pair)
    assert_agree(model.get_weights(), reference.weights)


def scaled(gradients, weights):
    return [g * 0.5 for g in gradients]


def clipped(gradients, weights):
    return [ops.clip(g, -0.01, 0.01) for g in gradients]


def with_decay(gradients, weights):
    return [g + 0.1 * w for g, w in zip(gradients, weights, strict=True)]


def normalized(gradients, weights):
    total = sum(ops.sum(ops.square(g)) for g in gradients)
    return [g / (ops.sqrt(total) + 1e-3) for g in gradients]


def only_large(gradients, weights):
    return [ops.where(ops.abs(g) > 0.02, g, 0.0) for g in gradients]


class Trainer(keras.Sequential):
    """Its `train_step` does something with the gradients before they are applied."""

    def loss_of(self, predicted, y):
        return ops.mean(ops.square(predicted - y))

    if BACKEND == "tensorflow":

        def train_step(self, *data):
            import tensorflow as tf

            ((x, y),) = data
            with tf.GradientTape() as tape:
                loss = self.loss_of(self(x, training=True), y)
            weights = [v.value for v in self.trainable_variables]
            found = [tf.convert_to_tensor(g) for g in tape.gradient(loss, weights)]
            self.optimizer.apply(self.change(found, weights), self.trainable_variables)
            return {"loss": loss}

    elif BACKEND == "torch":

        def train_step(self, *data):
            ((x, y),) = data
            self.zero_grad()
            loss = self.loss_of(self(x, training=True), y)
            loss.backward()
            weights = [v.value.detach() for v in self.trainable_variables]
            found = [v.value.grad for v in self.trainable_variables]
            self.optimizer.apply(self.change(found, weights), self.trainable_variables)
            return {"loss": loss}

    else:

        def train_step(self, *data):
            import jax

            (weights, others, slots, metrics), (x, y) = data

            def loss_of(weights):
                predicted, _ = self.stateless_call(weights, others, x, training=True)
                return self.loss_of(predicted, y)

            loss, found = jax.value_and_grad(loss_of)(weights)
            weights, slots = self.optimizer.stateless_apply(
                slots, self.change(found, weights), weights
            )
            return {"loss": loss}, (weights, others, slots, metrics)


@pytest.mark.parametrize(
    "change",
    [scaled, clipped, with_decay, normalized, only_large],
    ids=lambda function: function.__name__,
)
def test_gradients_that_a_train_step_changes(change):
    """Under plain SGD a lazy step is the step of the plain optimizer."""
    x, y = batches(6)
    weights = []
    for wrap in (LazyOptimizer, lambda optimizer: optimizer):
        model = Trainer(network().layers)
        model.change = change
        model.compile(wrap(keras.optimizers.SGD(0.3)))
        fit(model, x, y)
        weights.append(model.get_weights())
    assert_agree(*weights)


def test_a_second_model_on_the_same_table():
    """Each has an optimizer of its own; they train in turn."""
    x, y = batches(8)
    weights = []
    for wrap in (LazyOptimizer, lambda optimizer: optimizer):
        first = network()
        rows = keras.layers.GlobalMaxPooling1D()(first.layers[0].output)
        second = keras.Model(first.inputs, keras.layers.Dense(1)(rows))
        first.compile(wrap(keras.optimizers.SGD(0.2)), "mse")
        second.compile(keras.optimizers.SGD(0.1, momentum=0.5), "mse")
        for i in range(len(x)):
            model = (first, second)[i % 2]
            model.train_on_batch(x[i], y[i])
            model.get_weights()
        weights.append(first.get_weights() + second.get_weights())
    assert_agree(*weights)


@pytest.mark.parametrize("order", [1, -1])
def test_the_plateau_is_that_of_the_slow_weights(order):
    x, y = batches(4)
    rng = np.random.default_rng(7)
    held = rng.integers(0, 9, (10, TOKENS)), rng.normal(size=(10, 1))
    model = network()
    optimizer = LazyOptimizer(keras.optimizers.Adam(**ADAM))
    model.compile(Lookahead(optimizer, k=3, alpha=0.4), "mse")
    reference = Reference(
        model.get_weights(),
        ("Adam", dict(ADAM)),
        lazy={"tables": [0]},
        lookahead={"k": 3, "alpha": 0.4},
    )
    plateau = keras.callbacks.ReduceLROnPlateau(
        "val_loss", factor=0.5, patience=1, min_delta=0.3
    )
    callbacks = [SlowWeights(), plateau][::order]
    fit(model, x, y, epochs=6, validation_data=held, callbacks=callbacks)
    best, rate = np.inf, ADAM["learning_rate"]
    for _ in range(6):
        for pair in zip(x, y, strict=True):
            step(reference, *pair)
        table, kernel, bias = reference.cycles[0].slow_weights or []
        predicted = table[held[0]].reshape(len(held[0]), -1) @ kernel + bias
        loss = float(np.mean((predicted - held[1]) ** 2))
        if loss < best - 0.3:
            best = loss
        else:
            rate /= 2
            reference.optimizer.learning_rate = rate
    assert rate < ADAM["learning_rate"]
    assert_agree(model.get_weights(), reference.weights, 5e-5)


def test_two_lookaheads_share_a_model():
    """Both blocks may be open at once, and be closed in the order of opening."""
    model = network()
    weights = model.trainable_variables
    first, second = Lookahead("adam", k=3), Lookahead("adam", k=3)
    for _ in range(4):
        gradients = [ops.ones(v.shape) for v in weights]
        first.apply(gradients[:1], weights[:1])
        second.apply(gradients[1:], weights[1:])
    fast = model.get_weights()
    blocks = first.slow_weights(model), second.slow_weights(model)
    for block in blocks:
        block.__enter__()
    assert all(np.any(a != b) for a, b in zip(model.get_weights(), fast, strict=True))
    for block in blocks:
        block.__exit__(None, None, None)
    assert_same_bits(model.get_weights(), fast)


@pytest.mark.parametrize("inner_state", ["interpolate", "reset"])
@pytest.mark.parametrize("moments", ["decay", "freeze"])
def test_lookahead_given_to_a_lazy_optimizer_between_two_fits(moments, inner_state):
    x, y = batches(12)
    lazy = LazyOptimizer(keras.optimizers.Adam(**ADAM), moments=moments)
    model = network()
    model.compile(lazy, "mse")
    reference = Reference(
        model.get_weights(), ("Adam", ADAM), lazy={"tables": [0], "moments": moments}
    )
    fit(model, x[:6], y[:6])
    settings = {"k": 3, "alpha": 0.4, "inner_state": inner_state}
    model.compile(Lookahead(lazy, **settings), "mse")
    fit(model, x[6:], y[6:])
    for i, pair in enumerate(zip(x, y, strict=True)):
        if i == 6:  # a multiple of k
            reference.cycles = [Cycle(**settings)]
        step(reference, *pair)
    assert_agree(model.get_weights(), reference.weights)


def test_rows_that_a_user_sets_between_nested_syncs():
    """No update moves them in the cycle, so no sync does."""
    x, y = batches(8, most=20)
    optimizer = LazyOptimizer(keras.optimizers.Adam(**ADAM))
    model = network()
    model.compile(Lookahead(Lookahead(optimizer, k=2), k=3), "mse")
    for i in range(len(x)):
        if i == 4:
            weights = model.get_weights()
            weights[0][40:] = 7.0
            model.set_weights(weights)
        model.train_on_batch(x[i], y[i])
    np.testing.assert_array_equal(model.get_weights()[0][40:], 7.0)


class InAFunction(keras.layers.Layer):
    """Looks up inside of a transformed function, and once more outside."""

    def __init__(self, how):
        super().__init__()
        self.how, self.table = how, keras.layers.Embedding(VOCABULARY, WIDTH)

    def build(self, shape):
        self.table.build(shape)

    def call(self, ids):
        if self.how == "vmap":
            return ops.vectorized_map(self.table, ids) + self.table(ids)
        if self.how == "cond":
            return ops.cond(
                ops.sum(ids) > 0, lambda: self.table(ids), lambda: 2 * self.table(ids)
            )
        again = keras.remat(lambda ids: ops.sin(self.table(ids)))
        return again(ids) + self.table(ids)


@pytest.mark.parametrize("how", ["vmap", "cond", "remat"])
def test_first_look_up_inside_of_a_function(how):
    x, y = batches(3)
    weights = []
    for wrap in (LazyOptimizer, lambda optimizer: optimizer):
        keras.utils.set_random_seed(0)
        head = [keras.layers.Flatten(), keras.layers.Dense(1)]
        inputs = keras.Input((TOKENS,), dtype="int32")
        model = keras.Sequential([inputs, InAFunction(how), *head])
        model.compile(wrap(keras.optimizers.SGD(0.3)), "mse")
        fit(model, x, y)
        weights.append(model.get_weights())
    assert_agree(*weights)


def test_another_model_that_is_only_compiled():
    """The one that the optimizer trains is trained as if it were alone."""
    x, y = batches(3)
    weights = []
    for others in ([network()], []):
        model = network()
        optimizer = Lookahead(keras.optimizers.SGD(0.1), k=2)
        for each in [model, *others]:
            each.compile(optimizer, "mse")
        fit(model, x, y)
        weights.append(model.get_weights())
        for other in others:
            assert_same_bits(other.get_weights(), network().get_weights())
    assert_same_bits(*weights)
    assert np.any(weights[0][-1] != network().get_weights()[-1])
