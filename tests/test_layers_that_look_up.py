"""Layers other than a plain Embedding, and ids other than dense ones.

With SGD the rows that were not sampled do not move anyway, so Keras alone has to train
the same weights.
"""

import importlib
import warnings
from importlib.util import find_spec
from typing import Any

import keras
import numpy as np
import pytest
from harness import BACKEND, assert_agree
from keras import layers

from keras_lookahead_lazy import LazyOptimizer

ROWS, WIDTH, BATCH, LENGTH, STEPS = 900, 4, 8, 3, 4

needs_sparse = pytest.mark.skipif(BACKEND == "torch", reason="Keras: no sparse ids")
needs_ragged = pytest.mark.skipif(BACKEND != "tensorflow", reason="ragged tensors")
needs_reversible = pytest.mark.skipif(
    not hasattr(layers, "ReversibleEmbedding"), reason="Keras has none yet"
)
missing = [name for name in ("keras_rs", "keras_hub") if find_spec(name) is None]
if missing:
    warnings.warn(f"Layers of {' and '.join(missing)} not tested", stacklevel=1)
# Not later, in the middle of a test: the import draws random numbers.
keras_rs: Any = None if "keras_rs" in missing else importlib.import_module("keras_rs")
keras_hub: Any = (
    None if "keras_hub" in missing else importlib.import_module("keras_hub")
)
needs_keras_rs = pytest.mark.skipif(keras_rs is None, reason="no keras_rs")
needs_keras_hub = pytest.mark.skipif(keras_hub is None, reason="no keras_hub")


def draw_ids():
    random = np.random.default_rng(1)
    return random.integers(0, ROWS // 3, (STEPS * BATCH, LENGTH)).astype("int32")


def weights_of(ids):
    return np.random.default_rng(2).normal(size=ids.shape).astype("float32")


def as_sparse(array):
    """The same as a sparse tensor of the backend, without the entries that are 0."""
    places = np.argwhere(array)
    values = array[tuple(places.T)]
    if BACKEND == "tensorflow":
        import tensorflow as tf

        return tf.SparseTensor(places, values, array.shape)
    import jax.numpy as jnp
    from jax.experimental.sparse import BCOO

    return BCOO((jnp.asarray(values), jnp.asarray(places)), shape=array.shape)


def as_ragged(array):
    """Rows of different lengths."""
    import tensorflow as tf

    lengths = np.arange(len(array)) % LENGTH + 1
    return tf.RaggedTensor.from_tensor(array, lengths=lengths)


def functional(*arguments, call=lambda layer, *given: layer(*given), **options):
    """A model whose layers reduce the outputs of one that looks up."""

    def make(make_layer):
        inputs = [
            keras.Input((LENGTH,), BATCH, dtype=dtype, **options) for dtype in arguments
        ]
        features = call(make_layer(), *inputs)
        features = layers.Flatten()(features)
        return keras.Model(inputs, layers.Dense(1)(features))

    return make


def embed_reduce(combiner="mean"):
    return keras_rs.layers.EmbedReduce(ROWS, WIDTH, combiner=combiner)


def distributed():
    """Two tables, one of them of two features."""

    def feature(name, table):
        return keras_rs.layers.FeatureConfig(
            name, table, (BATCH, LENGTH), (BATCH, WIDTH)
        )

    users, items = (
        keras_rs.layers.TableConfig(name, ROWS, WIDTH, optimizer="sgd")
        for name in ("users", "items")
    )
    features = [feature("user", users), feature("item", items), feature("last", items)]
    return keras_rs.layers.DistributedEmbedding({f.name: f for f in features})


def distributed_model(make_layer):
    inputs = [keras.Input((LENGTH,), BATCH, dtype="int32") for _ in range(3)]
    features = make_layer()(dict(zip(("user", "item", "last"), inputs, strict=True)))
    joined = layers.Concatenate()(list(features.values()))
    return keras.Model(inputs, layers.Dense(1)(joined))


def token_and_position():
    return keras_hub.layers.TokenAndPositionEmbedding(ROWS, LENGTH, WIDTH)


def tied(layer, ids):
    return layer(layer(ids), reverse=True)


class Subclass(layers.Embedding):
    """One that looks up by itself."""

    def call(self, inputs):
        return keras.ops.take(self.embeddings, inputs, axis=0)


def same(ids):
    return [ids]


def with_weights(ids):
    return [ids, weights_of(ids)]


# A function that makes a model of a layer, one that makes the layer, and one that makes
# the inputs of dense ids.
LAYERS = {
    "EmbedReduce, mean": (functional("int32"), embed_reduce, same),
    "EmbedReduce, sum": (functional("int32"), lambda: embed_reduce("sum"), same),
    "EmbedReduce, sqrtn": (functional("int32"), lambda: embed_reduce("sqrtn"), same),
    "EmbedReduce, weights": (
        functional("int32", "float32"),
        embed_reduce,
        with_weights,
    ),
    "EmbedReduce, sparse": (
        functional("int32", sparse=True),
        embed_reduce,
        lambda ids: [as_sparse(ids)],
    ),
    "EmbedReduce, ragged": (
        functional("int32", ragged=True),
        embed_reduce,
        lambda ids: [as_ragged(ids)],
    ),
    "DistributedEmbedding": (
        distributed_model,
        distributed,
        lambda ids: [ids, ids[::-1], ids // 2],
    ),
    "Embedding, sparse": (
        functional("int32", sparse=True),
        lambda: layers.Embedding(ROWS, WIDTH),
        lambda ids: [as_sparse(ids)],
    ),
    "ReversibleEmbedding, untied": (
        functional("int32", call=tied),
        lambda: layers.ReversibleEmbedding(ROWS, WIDTH, tie_weights=False),
        same,
    ),
    "TokenAndPositionEmbedding": (functional("int32"), token_and_position, same),
}


def marks(name):
    found = [needs_keras_rs] if name.startswith(("EmbedR", "Distributed")) else []
    found += [needs_keras_hub] if name.startswith("TokenAnd") else []
    found += [needs_reversible] if name.startswith("Reversible") else []
    found += [needs_sparse] if "sparse" in name else []
    return found + ([needs_ragged] if "ragged" in name else [])


def trained(name, optimizer):
    """The weights after some steps."""
    make_model, make_layer, inputs = LAYERS[name]
    keras.utils.set_random_seed(0)
    model = make_model(make_layer)
    model.compile(optimizer, "mse")
    ids = draw_ids()
    y = np.random.default_rng(3).normal(size=(len(ids), 1)).astype("float32")
    x = inputs(ids)
    model.fit(
        x[0] if len(x) == 1 else x,
        y,
        batch_size=BATCH,
        shuffle=False,
        verbose=0,
    )
    return model.get_weights()


@pytest.mark.parametrize("name", [pytest.param(n, marks=marks(n)) for n in LAYERS])
def test_tables_are_trained_by_rows(name):
    expected = trained(name, keras.optimizers.SGD(0.3))
    lazy = LazyOptimizer(keras.optimizers.SGD(0.3))
    assert_agree(trained(name, lazy), expected)
    forms = {name: f for name, f in lazy.step_forms.items() if "/position_" not in name}
    assert set(forms.values()) == {"rows"}  # each step uses every position


@pytest.mark.parametrize(
    ("make_layer", "call"),
    [
        pytest.param(
            lambda: layers.ReversibleEmbedding(ROWS, WIDTH),
            tied,
            marks=needs_reversible,
            id="logits are products with the table",
        ),
        pytest.param(
            lambda: Subclass(ROWS, WIDTH), lambda f, x: f(x), id="its own look-up"
        ),
    ],
)
def test_another_use_of_a_table_is_told(make_layer, call):
    """The step is right, and `step_forms` says that it passes over the table."""
    LAYERS["here"] = functional("int32", call=call), make_layer, same
    try:
        expected = trained("here", keras.optimizers.SGD(0.03))
        lazy = LazyOptimizer(keras.optimizers.SGD(0.03))
        assert_agree(trained("here", lazy), expected)
    finally:
        del LAYERS["here"]
    (form,) = lazy.step_forms.values()
    if BACKEND == "tensorflow" and call is not tied:
        assert form == "rows"  # Keras's own look-up has slices for a gradient
    else:
        assert form.startswith("masked: the gradient is not only that")
