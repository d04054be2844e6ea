"""What an Embedding returns, once a LazyOptimizer trains its table by rows."""

import functools

import keras
import numpy as np
import pytest
from harness import BACKEND, dtype_policy, numpy
from keras import ops

from keras_lookahead_lazy import LazyOptimizer

ROWS, WIDTH = 400, 4
IDS = np.array([[1, 2, 2], [399, 0, -1]], "int32")


def embedding(cls=keras.layers.Embedding, **arguments):
    keras.utils.set_random_seed(0)
    layer = cls(ROWS, WIDTH, **arguments)
    layer.build(None)
    return layer


def by_rows(layer):
    """The optimizer that lives as long as the look-ups are by rows."""
    lazy = LazyOptimizer(keras.optimizers.SGD(0.1))
    lazy.build(layer.trainable_variables)
    return lazy


class Doubled(keras.layers.Embedding):
    @property
    def embeddings(self):
        return 2 * self._embeddings


class CallsSuper(keras.layers.Embedding):
    def call(self, inputs):
        return 3 * super().call(inputs)


@pytest.mark.parametrize("cls", [keras.layers.Embedding, Doubled, CallsSuper])
@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16", "mixed_float16"])
@pytest.mark.parametrize("rank", [None, 2])
def test_building_an_optimizer_changes_no_output(cls, policy, rank):
    if cls is Doubled and rank:
        pytest.skip("LoRA has its own `embeddings`")
    with dtype_policy(policy):
        layer = embedding(cls, lora_rank=rank)
        if rank:
            layer.lora_embeddings_b.assign(np.ones((rank, WIDTH)))
        before = layer(IDS)
        lazy = by_rows(layer)
        after = layer(IDS)
    assert lazy.built
    for value in (before, after):
        assert keras.backend.standardize_dtype(value.dtype) == layer.compute_dtype
    tolerance = 0 if not rank else 1e-2 if "16" in policy else 1e-6
    arrays = [ops.convert_to_numpy(ops.cast(v, "float32")) for v in (before, after)]
    np.testing.assert_allclose(arrays[1], arrays[0], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 1, 3)])
def test_ids_of_any_shape(shape):
    layer = embedding()
    ids = ops.convert_to_tensor(np.full(shape, 7, "int32"))
    before = numpy([layer(ids)])[0]
    lazy = by_rows(layer)
    np.testing.assert_array_equal(numpy([layer(ids)])[0], before)
    assert lazy.built


def test_a_wrapper_of_another_library_does_not_hide_ours(monkeypatch):
    """One around Keras's method was there before, another comes after."""

    def wrapped(call):
        @functools.wraps(call)
        def outer(self, inputs):
            return call(self, inputs)

        return outer

    from keras_lookahead_lazy import _look_ups

    plain = keras.layers.Embedding.call
    while hasattr(plain, "__wrapped__"):
        plain = plain.__wrapped__
    monkeypatch.setattr(keras.layers.Embedding, "call", wrapped(plain))
    looked_up = []
    look_up = _look_ups.engine.look_up

    def note(*arguments):
        looked_up.append(arguments)
        return look_up(*arguments)

    monkeypatch.setattr(_look_ups.engine, "look_up", note)
    layer = embedding()
    lazy = by_rows(layer)
    layer(IDS)
    assert len(looked_up) == 1
    monkeypatch.setattr(
        keras.layers.Embedding, "call", wrapped(keras.layers.Embedding.call)
    )
    other = embedding()
    lazy = lazy, by_rows(other)
    other(IDS)
    assert len(looked_up) == 2


@pytest.mark.skipif(BACKEND != "jax", reason="transforms of JAX")
def test_transforms_of_jax():
    """Forward, reverse and mixed mode, as through plain Keras."""
    import jax
    import jax.numpy as jnp

    ids = jnp.array([1, 2, 2, 399])

    def loss_of(layer, table, ids=ids):
        with keras.StatelessScope([(layer.embeddings, table)]):
            return jnp.sum(jnp.sin(layer(ids)) ** 2)

    def values(layer):
        loss = functools.partial(loss_of, layer)
        table = layer.embeddings.value
        scanned = jax.grad(
            lambda t: jax.lax.scan(lambda c, i: (c + loss(t, i), None), 0.0, ids)[0]
        )
        mapped = jax.grad(lambda t: jax.vmap(lambda i: loss(t, i))(ids).sum())
        small = table[:, :1]

        def narrow(column):
            return loss(table.at[:, :1].set(column))

        return [
            jax.grad(loss)(table),
            jax.jit(jax.grad(loss))(table),
            jax.jacfwd(narrow)(small),
            jax.jvp(loss, (table,), (2 * table,))[1],
            jax.linearize(loss, table)[1](table),
            jax.jvp(jax.grad(loss), (table,), (table,))[1],
            jax.vmap(jax.grad(loss))(jnp.stack([table, 2 * table])),
            jax.grad(jax.checkpoint(loss))(table),
            scanned(table),
            mapped(table),
        ]

    expected = values(embedding())
    layer = embedding()
    lazy = by_rows(layer)
    for ours, keras_own in zip(values(layer), expected, strict=True):
        np.testing.assert_allclose(ours, keras_own, rtol=1e-6, atol=1e-7)
    assert lazy.built


@pytest.mark.skipif(BACKEND != "jax", reason="where JAX wraps ids around")
def test_an_id_far_below_moves_no_row():
    """As in plain Keras: ids from -1 to -ROWS count from the end, lower ones do not."""
    weights = []
    for wrap in (LazyOptimizer, lambda inner: inner):
        keras.utils.set_random_seed(0)
        model = keras.Sequential(
            [keras.Input((3,), dtype="int32"), keras.layers.Embedding(ROWS, WIDTH)]
        )
        model.compile(wrap(keras.optimizers.SGD(0.1)), lambda _, x: ops.sum(x[..., :2]))
        model.optimizer.build(model.trainable_variables)
        ids = np.array([[-ROWS - 3, -1, 5]], "int32")
        model.train_on_batch(ids, np.zeros((1, 3, WIDTH)))
        weights.append(model.get_weights()[0])
    moved = [
        np.flatnonzero(np.any(w != embedding().get_weights()[0], 1)) for w in weights
    ]
    assert moved[0].tolist() == moved[1].tolist()


@pytest.mark.skipif(BACKEND != "tensorflow", reason="ragged tensors, and XLA by hand")
def test_ragged_ids():
    import tensorflow as tf

    layer = embedding()
    ids = tf.ragged.constant([[1, 2], [], [3]], dtype="int32")
    lazy = by_rows(layer)
    with tf.GradientTape() as tape:
        rows = layer(ids)
        loss = tf.reduce_sum(rows.flat_values)
    assert rows.row_lengths().numpy().tolist() == [2, 0, 1]
    gradient = tape.gradient(loss, layer.embeddings.value)
    assert sorted(gradient.indices.numpy().tolist()) == [1, 2, 3]
    assert lazy.built


@pytest.mark.skipif(BACKEND != "tensorflow", reason="XLA by hand")
def test_vectorized_map_under_xla():
    import tensorflow as tf

    def gradient(layer):
        @tf.function(jit_compile=True)
        def run(ids):
            with tf.GradientTape() as tape:
                rows = ops.vectorized_map(lambda i: tf.reduce_sum(layer(i) ** 2), ids)
                loss = tf.reduce_sum(rows)
            return tf.convert_to_tensor(tape.gradient(loss, layer.embeddings.value))

        return run(tf.constant(abs(IDS)))

    expected = gradient(embedding())
    layer = embedding()
    lazy = by_rows(layer)
    np.testing.assert_allclose(gradient(layer), expected, rtol=1e-6)
    assert lazy.built


@pytest.mark.skipif(BACKEND != "torch", reason="torch.jit")
def test_traced_by_torch():
    import torch

    layer = embedding()
    lazy = by_rows(layer)
    ids = torch.tensor(abs(IDS))
    traced = torch.jit.trace(layer, ids, check_trace=False)
    torch.testing.assert_close(traced(ids + 1 - 1), layer(ids))
    assert lazy.built
