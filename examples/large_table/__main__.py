"""Train a table of two million rows on reviews, as bags of words and of word pairs.

The model is the classifier of fastText (Joulin et al., "Bag of Tricks for Efficient
Text Classification", arXiv:1607.01759), with word pairs hashed into the rows of one
table. Adam updates every row in every step, LazyOptimizer only the rows of the batch.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from examples.common import imdb, options
from examples.common.comparison import Comparison, EpochTimer
from examples.common.plots import BLACK, BLUE, ORANGE, Curve
from examples.common.sources import Data, DataError
from keras_lookahead_lazy import LazyOptimizer, Lookahead

TOKENS = 400
ROWS, WIDTH = 2**21, 16
EPOCHS, BATCH_SIZE, LEARNING_RATE = 3, 64, 1e-2


def train(name: str, data: Data, given: argparse.Namespace) -> keras.callbacks.History:
    """Train the model with one optimizer."""
    model = build_model(data.x_train.shape[1], given.rows, given.width)
    model.compile(
        optimizer=build_optimizer(name, given.learning_rate, given.k, given.alpha),
        loss="binary_crossentropy",
        metrics=["accuracy"],
    )
    return model.fit(
        data.x_train,
        data.y_train,
        batch_size=given.batch_size,
        epochs=given.epochs,
        validation_data=(data.x_test, data.y_test),
        validation_batch_size=256,
        callbacks=[EpochTimer()],
        verbose="auto" if sys.stdout.isatty() else 2,  # in a log: one line per epoch
    )


def build_model(tokens: int, rows: int, width: int) -> keras.Model:
    """Build a classifier of the mean of the embeddings, padding left out."""
    return keras.Sequential(
        [
            keras.Input((tokens,), dtype="int32"),
            keras.layers.Embedding(rows, width, mask_zero=True),
            keras.layers.GlobalAveragePooling1D(),
            keras.layers.Dense(1, activation="sigmoid"),
        ]
    )


def build_optimizer(
    name: str, learning_rate: float, k: int, alpha: float
) -> keras.optimizers.Optimizer:
    """Build one of the optimizers to compare."""
    adam = keras.optimizers.Adam(learning_rate)
    return {
        "adam": lambda: adam,
        "lazy-freeze": lambda: LazyOptimizer(adam, moments="freeze"),
        "lazy-decay": lambda: LazyOptimizer(adam, moments="decay"),
        "lookahead-lazy-freeze": lambda: Lookahead(
            LazyOptimizer(adam, moments="freeze"), k, alpha
        ),
    }[name]()


def with_pairs(words: np.ndarray, rows: int) -> np.ndarray:
    """Append the ids of neighbouring word pairs, hashed into the other rows."""
    first, second = words[:, :-1].astype("int64"), words[:, 1:].astype("int64")
    pairs = imdb.NUM_WORDS + (first * 1_000_003 + second) % (rows - imdb.NUM_WORDS)
    pairs[(first == 0) | (second == 0)] = 0  # padding
    return np.concatenate([words, pairs], axis=1).astype("int32")


# In synthetic reviews half of the words are negated, so that it takes pairs to tell.
SYNTHETIC: dict[str, Any] = {
    "count": 3_000,
    "words": (16, 28),
    "share": 1.0,
    "strength": 3.0,
    "negated": 0.5,
}
FAST = ("lazy-freeze", "adam")  # the picture's title compares their times
CURVES = {
    "adam": Curve("Adam", BLACK),
    "lazy-freeze": Curve("LazyOptimizer, freeze", ORANGE),
    "lazy-decay": Curve("LazyOptimizer, decay", BLUE),
    "lookahead-lazy-freeze": Curve(
        "Lookahead(LazyOptimizer, freeze)", ORANGE, dashed=True
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Train with each optimizer and compare; return the exit status."""
    parser = argparse.ArgumentParser("large_table", description=__doc__)
    options.add_data(parser, imdb.SOURCES)
    options.add_rate(parser, "--learning-rate", LEARNING_RATE)
    options.add_comparison(parser, CURVES, batch_size=BATCH_SIZE)
    options.add_lookahead(parser)
    options.add_size(parser, "--rows", ROWS, imdb.NUM_WORDS + 1, "of the table")
    options.add_size(parser, "--width", WIDTH, 1, "of the table")
    given = parser.parse_args(arguments)
    given.epochs = given.epochs or EPOCHS
    limits = given.train_samples, given.test_samples
    try:
        data = imdb.load(given.data, *limits, tokens=TOKENS, **SYNTHETIC)
        comparison = Comparison("large_table", CURVES, data, vars(given), fast=FAST)
    except (DataError, OSError) as error:
        return options.refuse("large_table", error)
    x_train, x_test = (with_pairs(x, given.rows) for x in (data.x_train, data.x_test))
    data = dataclasses.replace(data, x_train=x_train, x_test=x_test)
    # From one seed all optimizers get the same initial weights and the same batches.
    for name, seed in comparison.jobs(given.optimizers, given.seeds):
        comparison.add(name, seed, train(name, data, given))
    comparison.show()
    return 0


if __name__ == "__main__":
    sys.exit(main())
