"""Training steps whose table gradient is known by rows, against a dense NumPy step.

The reference takes its gradients from a twin of the model that no LazyOptimizer
trains, so from Keras's own look-up and the backend's own dense gradient.
"""

import keras
import numpy as np
import pytest
from harness import BACKEND, assert_agree, numpy
from keras import ops
from reference import Reference

from keras_lookahead_lazy import LazyOptimizer, Lookahead

VOCABULARY, WIDTH, BATCH, TOKENS = 400, 4, 4, 4
STEPS = 7
HOW = {
    "tensorflow": {
        "graph": {"jit_compile": False},
        "jit": {"jit_compile": True},
        "eager": {"run_eagerly": True},
    },
    "jax": {"jit": {"jit_compile": True}, "eager": {"run_eagerly": True}},
    "torch": {"eager": {"jit_compile": False}},
}[BACKEND]


def words(**arguments):
    return keras.layers.Embedding(VOCABULARY, WIDTH, name="words", **arguments)


def tokens():
    return keras.Input((TOKENS,), dtype="int32")


def head(x):
    return keras.layers.Dense(1)(keras.layers.Flatten()(x))


def one_look_up():
    x = tokens()
    return keras.Model(x, head(words()(x)))


def two_look_ups():
    """Two towers that share a table."""
    x, table = tokens(), words()
    left, right = table(x), table(ops.flip(x, axis=1) // 2)
    return keras.Model(x, head(keras.layers.Multiply()([left, right])))


def recurrent():
    x = tokens()
    return keras.Model(x, head(keras.layers.LSTM(3)(words(mask_zero=True)(x))))


def regularized():
    x = tokens()
    return keras.Model(
        x, head(words(embeddings_regularizer=keras.regularizers.L2(0.1))(x))
    )


class Tied(keras.layers.Layer):
    """Logits of all tokens, from the table that they were looked up in."""

    def __init__(self, table):
        super().__init__()
        self.table = table

    def call(self, x):
        mean = ops.mean(self.table(x), axis=1)
        return ops.matmul(mean, ops.transpose(self.table.embeddings))


def tied():
    x = tokens()
    return keras.Model(x, keras.layers.Dense(1)(Tied(words())(x)))


class Again(keras.layers.Layer):
    """Looks up inside of a function that the backward pass computes again."""

    def __init__(self, table):
        super().__init__()
        self.table = table

    def build(self, shape):
        self.table.build(shape)

    def call(self, x):
        return keras.remat(lambda x: ops.sin(self.table(x)))(x)


def computed_again():
    x = tokens()
    return keras.Model(x, head(Again(words())(x)))


class Scan(Again):
    """Looks up in a loop over the tokens."""

    def call(self, x):
        def add(total, column):
            return total + ops.sin(self.table(column)), None

        zeros = ops.zeros((BATCH, WIDTH))
        return ops.scan(add, zeros, ops.transpose(x))[0]


def scanned():
    x = keras.Input(batch_shape=(BATCH, TOKENS), dtype="int32")
    return keras.Model(x, keras.layers.Dense(1)(Scan(words())(x)))


def with_gradient_of_inputs():
    """Ids that were computed, as floats."""
    x = tokens()
    return keras.Model(x, head(words()(ops.cast(x, "float32") * 1.0)))


MODELS = [
    one_look_up,
    two_look_ups,
    recurrent,
    regularized,
    tied,
    computed_again,
    with_gradient_of_inputs,
]
if BACKEND == "jax":
    MODELS.append(scanned)


def batches(seed=0):
    rng = np.random.default_rng(seed)
    shape = (STEPS, BATCH, TOKENS)
    x = np.minimum(rng.zipf(1.3, size=shape), VOCABULARY - 1).astype("int32")
    return x, rng.normal(size=(STEPS, BATCH, 1)).astype("float32")


def gradients(model, x, y):
    """Keras's own gradients of the loss, as arrays."""

    def loss_of(predicted, losses):
        return ops.mean(ops.square(ops.subtract(predicted, y))) + sum(losses, 0.0)

    weights = model.trainable_variables
    if BACKEND == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            loss = loss_of(model(x, training=True), model.losses)
        found = tape.gradient(loss, [w.value for w in weights])
        found = [tf.convert_to_tensor(g) for g in found]
    elif BACKEND == "torch":
        model.zero_grad()
        loss_of(model(x, training=True), model.losses).backward()
        found = [w.value.grad for w in weights]
        assert not any(type(g).__name__ == "RowGradient" for g in found)
    else:
        import jax

        def loss(values):
            rest = [v.value for v in model.non_trainable_variables]
            predicted, _, losses = model.stateless_call(
                values, rest, x, training=True, return_losses=True
            )
            return loss_of(predicted, losses)

        found = jax.grad(loss)([w.value for w in weights])
    return numpy(found)


def train(make_model, how, settings=None, moments="decay", k=None, kind="Adam"):
    """Compare weights after each `train_on_batch` with the reference's."""
    settings = {"learning_rate": 0.02, **(settings or {})}
    model, twin = make_model(), make_model()
    rng = np.random.default_rng(1)
    initial = [rng.normal(size=w.shape) * 0.5 for w in model.get_weights()]
    model.set_weights(initial)
    inner = getattr(keras.optimizers, kind)(**settings)
    lazy = LazyOptimizer(inner, moments=moments)
    optimizer = Lookahead(lazy, k=k, alpha=0.3) if k else lazy
    model.compile(optimizer, "mse", **how)
    # Keras builds an optimizer in the first step, which looks up as Keras does.
    optimizer.build(model.trainable_variables)
    table = [w.path.endswith("words/embeddings") for w in model.trainable_variables]
    reference = Reference(
        numpy(model.trainable_variables),
        (kind, settings),
        lazy={"tables": [table.index(True)], "moments": moments},
        lookahead={"k": k, "alpha": 0.3} if k else None,
    )
    for x, y in zip(*batches(), strict=True):
        pairs = zip(twin.trainable_variables, reference.weights, strict=True)
        for variable, value in pairs:
            variable.assign(value)
        reference.apply(gradients(twin, x, y))
        model.train_on_batch(x, y)
        weights = numpy(model.trainable_variables)
        assert_agree(weights, reference.weights)


@pytest.mark.parametrize("how", HOW.values(), ids=HOW)
@pytest.mark.parametrize("make_model", MODELS, ids=lambda f: f.__name__)
def test_models(make_model, how):
    train(make_model, how, k=3)


SETTINGS = {
    "clipnorm": {"clipnorm": 0.05},
    "clipvalue": {"clipvalue": 0.01},
    "global_clipnorm": {"global_clipnorm": 0.05},
    "weight decay": {"weight_decay": 0.1},
    "EMA": {"use_ema": True, "ema_overwrite_frequency": 3, "ema_momentum": 0.5},
    "accumulation": {"gradient_accumulation_steps": 2},
}


@pytest.mark.parametrize("how", HOW.values(), ids=HOW)
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("make_model", [two_look_ups, tied], ids=lambda f: f.__name__)
def test_settings(settings, make_model, how):
    moments = "freeze" if make_model is tied else "decay"
    train(make_model, how, settings, moments)


@pytest.mark.skipif(BACKEND != "jax", reason="JAX takes rounds")
@pytest.mark.parametrize("k", [None, 3])
@pytest.mark.parametrize("moments", ["decay", "freeze"])
@pytest.mark.parametrize(
    ("make_model", "kind"),
    [
        (one_look_up, "SGD"),
        (one_look_up, "Adagrad"),
        (one_look_up, "Ftrl"),
        (two_look_ups, "Adam"),
        (recurrent, "Nadam"),
    ],
)
def test_more_look_ups_than_a_round_has(monkeypatch, make_model, kind, moments, k):
    from keras_lookahead_lazy._backend import jax_rows

    monkeypatch.setattr(jax_rows, "LOOK_UPS_PER_ROUND", 2)
    monkeypatch.setattr(jax_rows, "ON_ONE_DEVICE", 3)
    train(make_model, {"jit_compile": True}, None, moments, k, kind)


@pytest.mark.skipif(BACKEND != "torch", reason="a gradient that torch's programs see")
def test_a_torch_gradient_can_be_sent_by_rows():
    import torch

    model = one_look_up()
    model.compile(LazyOptimizer(keras.optimizers.Adam(0.01)), "mse")
    model.optimizer.build(model.trainable_variables)
    ids = torch.randint(VOCABULARY, (BATCH, TOKENS))
    model(ids).sum().backward()
    gradient = model.get_layer("words").embeddings.value.grad
    dense = gradient + torch.zeros(VOCABULARY, WIDTH)

    rows = gradient.to_sparse(1)
    assert sorted(rows._indices()[0].tolist()) == sorted(ids.ravel().tolist())
    torch.testing.assert_close(rows.to_dense(), dense)
    rows.mul_(3)
    torch.testing.assert_close(gradient.to_sparse(1).to_dense(), dense)  # a copy

    received = torch.sparse_coo_tensor(
        torch.tensor([[2, 7, 2]]), torch.ones(3, WIDTH), dense.shape
    )
    total = gradient.clone().zero_() + received
    assert total.to_sparse(1)._indices()[0].tolist() == [2, 7, 2]
    torch.testing.assert_close(total + torch.zeros(1), received.to_dense())
    both = gradient.clone()
    both += received
    assert both.to_sparse(1)._indices().shape == (1, BATCH * TOKENS + 3)
    torch.testing.assert_close(both + torch.zeros(1), dense + received.to_dense())
