"""Models of KerasHub, tied and untied: their tables by rows, against plain Keras.

The reference is Keras's own optimizer; after each of its steps NumPy gives the rows
that were not sampled, and their slots, back what they were, and does the sync.
"""

import warnings
from importlib.util import find_spec

import keras
import numpy as np
import pytest
from harness import BACKEND, assert_agree, assert_same_bits, numpy

from keras_lookahead_lazy import LazyOptimizer, Lookahead

if find_spec("keras_hub") is None:
    reason = "KerasHub's models not tested: no keras_hub (extra: hub)"
    warnings.warn(reason, stacklevel=1)
    pytest.skip(reason, allow_module_level=True)

import keras_hub

VOCABULARY, LENGTH, BATCH, STEPS = 20, 4, 3, 5
K, ALPHA = 2, 0.25
SIZES = {
    "vocabulary_size": VOCABULARY,
    "num_layers": 1,
    "num_heads": 2,
    "hidden_dim": 8,
    "intermediate_dim": 16,
    "max_sequence_length": LENGTH + 2,
    "dropout": 0.0,
}


def make_hub_model(kind):
    if kind == "GPT-2":  # whose logits are products with the table
        backbone = keras_hub.models.GPT2Backbone(**SIZES)
        model = keras_hub.models.GPT2CausalLM(backbone=backbone, preprocessor=None)
    else:
        backbone = keras_hub.models.BertBackbone(**SIZES, num_segments=2)
        model = keras_hub.models.BertTextClassifier(
            backbone, num_classes=VOCABULARY, preprocessor=None, dropout=0.0
        )
    random = np.random.default_rng(1)
    shapes = [weight.shape for weight in model.get_weights()]
    model.set_weights([0.3 * random.normal(size=shape) for shape in shapes])
    return model


def compiled(kind, optimizer):
    model = make_hub_model(kind)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, metrics=[])
    return model


def batches(kind):
    """Half of the words are in no batch."""
    random = np.random.default_rng(2)
    for _ in range(STEPS):
        ids = random.integers(0, VOCABULARY // 2, (BATCH, LENGTH))
        x = {"token_ids": ids, "padding_mask": np.ones_like(ids)}
        if kind == "BERT":
            x["segment_ids"] = np.zeros_like(ids)
        yield x, ids if kind == "GPT-2" else ids[:, 0]


def sampled_rows(kind, x):
    """Of each table, the rows with a gradient."""
    words = np.unique(x["token_ids"])
    if kind == "GPT-2":
        words = np.arange(VOCABULARY)
    return {
        "token_embedding/embeddings": words,
        "position_embedding/embeddings": np.arange(LENGTH),
        "segment_embedding/embeddings": np.array([0]),
    }


def table_of(variable):
    """The table that a weight is, or that a slot is of; with its rows."""
    for name in sampled_rows("BERT", {"token_ids": [0]}):
        if name in variable.path or name.replace("/", "_") in variable.path:
            return name
    return None


def reference_steps(kind, optimizer, freezes):
    """The weights after each step."""
    model = compiled(kind, optimizer)
    optimizer.build(model.trainable_variables)
    slow = model.get_weights()
    for i, (x, y) in enumerate(batches(kind), 1):
        variables = [*model.variables, *optimizer.variables] if freezes else []
        before = numpy(variables)
        model.train_on_batch(x, y)
        sampled = sampled_rows(kind, x)
        for variable, old in zip(variables, before, strict=True):
            if table := table_of(variable):
                value, rows = old.copy(), sampled[table]
                value[rows] = numpy([variable])[0][rows]
                variable.assign(value)
        if i % K == 0:
            pairs = zip(slow, model.get_weights(), strict=True)
            slow = [a + np.float32(ALPHA) * (b - a) for a, b in pairs]
            model.set_weights(slow)
        yield model.get_weights()


class SummingAdam(keras.optimizers.Adam):
    """Keras's on TensorFlow squares a word's gradients one by one if it comes twice."""

    def update_step(self, gradient, variable, learning_rate):
        if BACKEND == "tensorflow":
            import tensorflow as tf

            gradient = tf.convert_to_tensor(gradient)
        super().update_step(gradient, variable, learning_rate)


OPTIMIZERS = {
    "Adam, freeze": lambda: SummingAdam(0.02),
    # Without slots a zero gradient does nothing: this is plain SGD.
    "SGD, decay": lambda: keras.optimizers.SGD(0.2),
}


@pytest.mark.parametrize("case", OPTIMIZERS)
@pytest.mark.parametrize("kind", ["GPT-2", "BERT"])
def test_training(kind, case):
    moments = case.split()[-1]
    config = OPTIMIZERS[case]().get_config()
    inner = getattr(keras.optimizers, case.split(",")[0]).from_config(config)
    lazy = LazyOptimizer(inner, moments=moments)
    model = compiled(kind, Lookahead(lazy, k=K, alpha=ALPHA))
    first = model.get_weights()
    expected = reference_steps(kind, OPTIMIZERS[case](), moments == "freeze")
    seen: dict[str, set[int]] = {}
    for (x, y), weights in zip(batches(kind), expected, strict=True):
        model.train_on_batch(x, y)
        assert_agree(model.get_weights(), weights)
        for table, rows in sampled_rows(kind, x).items():
            seen.setdefault(table, set()).update(rows.tolist())
    tables = 0
    for variable, old in zip(model.weights, first, strict=True):
        if table := table_of(variable):
            others = sorted(set(range(len(old))) - seen[table])
            new = numpy([variable])[0]
            assert_same_bits([new[others]], [old[others]])
            assert (new[list(seen[table])] != old[list(seen[table])]).any(axis=1).all()
            tables += 1
    assert tables == len(lazy.step_forms) == (2 if kind == "GPT-2" else 3)
