"""DLRM in plain Keras layers, and synthetic clicks of Criteo's shape to train it on.

The model is that of Naumov et al., "Deep Learning Recommendation Model for
Personalization and Recommendation Systems" (arXiv:1906.00091).
"""

from collections.abc import Sequence

import keras
import numpy as np
from keras import layers, ops

from examples.recommender.criteo import NUMBERS, SIZES

COMMON = 100  # ids of each table that say little about a click
EFFECTS_SEED = 7


def make_model(
    sizes: Sequence[int] = SIZES,
    width: int = 16,
    bottom: Sequence[int] = (64,),
    top: Sequence[int] = (64,),
) -> keras.Model:
    """Build DLRM, which gives the probability of a click.

    Args:
        sizes: rows of the embedding tables, one table for each category.
        width: columns of every table.
        bottom: units of the layers that the numbers go through, before one of `width`.
        top: units of the layers after the interactions.
    """
    ids = keras.Input((len(sizes),), dtype="int32", name="ids")
    numbers = keras.Input((NUMBERS,), name="numbers")
    hidden = numbers
    for units in (*bottom, width):
        hidden = layers.Dense(units, activation="relu")(hidden)
    vectors = [hidden]
    for i, rows in enumerate(sizes):
        start = keras.initializers.RandomUniform(-(rows**-0.5), rows**-0.5)
        table = layers.Embedding(rows, width, start, name=f"table_{i}")
        vectors.append(table(ids[:, i]))
    # The inner products of all pairs of vectors are the interactions.
    stacked, count = ops.stack(vectors, axis=1), len(vectors)
    products = ops.reshape(layers.Dot(axes=2)([stacked, stacked]), (-1, count**2))
    pairs = [i * count + j for i in range(count) for j in range(i)]
    hidden = layers.Concatenate()([hidden, ops.take(products, pairs, axis=1)])
    for units in top:
        hidden = layers.Dense(units, activation="relu")(hidden)
    click = layers.Dense(1, activation="sigmoid")(hidden)
    return keras.Model({"ids": ids, "numbers": numbers}, click)


def draw_clicks(
    sizes: Sequence[int], count: int, seed: int
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Draw what was shown to users, and whether they clicked on it.

    The ids of a table follow Zipf's law: an id's frequency falls as one over its rank,
    so most rows are rare. Each id has an effect of its own on the log-odds of a click.
    The effects of the `COMMON` most frequent ids of a table are small, so most of what
    can be learned is in the rare ids. A quarter of a million draws contain enough of an
    id of rank 1,000 to learn its effect, and too little of one of rank 100,000.

    Args:
        sizes: how many different ids each table has.
        count: how many clicks and non-clicks to draw.
        seed: of the draw; the effects are the same in all draws.

    Returns:
        The inputs of the model, and the labels.
    """
    random = np.random.default_rng(seed)
    uniform = random.random((count, len(sizes)))
    ids = ((np.array(sizes) + 1) ** uniform - 1).astype("int32")
    ids = np.minimum(ids, np.array(sizes, "int32") - 1)  # where a power was rounded up
    numbers = np.log1p(
        np.floor(np.exp(random.normal(scale=1.5, size=(count, NUMBERS))))
    )

    hidden = np.random.default_rng(EFFECTS_SEED)
    odds = (numbers - numbers.mean(axis=0)) @ hidden.normal(scale=0.1, size=NUMBERS)
    for rows, column in zip(sizes, ids.T, strict=True):
        effects = hidden.normal(scale=0.6, size=rows)
        effects[:COMMON] /= 4
        odds += effects[column]
    labels = random.random(count) < 1 / (1 + np.exp(1.5 - odds))
    inputs = {"ids": ids, "numbers": numbers.astype("float32")}
    return inputs, labels.astype("float32")
