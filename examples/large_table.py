"""Train a table of a million rows and more: reviews as bags of words and word pairs.

The classifier of fastText (Joulin et al., "Bag of Tricks for Efficient Text
Classification", arXiv:1607.01759), with pairs hashed into the rows of one table. Adam
works on every row in every step, LazyOptimizer on those of the batch.
"""

import argparse
import sys
from collections.abc import Sequence

import keras
import numpy as np

from examples.common import imdb, options
from examples.common.comparison import Comparison, EpochTimer
from examples.common.plots import BLACK, BLUE, ORANGE, Curve
from examples.common.sources import DataError
from examples.imdb_lazy import build_optimizer

CURVES = {
    "adam": Curve("Adam", BLACK),
    "lazy-freeze": Curve("LazyOptimizer, freeze", ORANGE),
    "lazy-decay": Curve("LazyOptimizer, decay", BLUE),
    "lookahead-lazy-freeze": Curve(
        "Lookahead(LazyOptimizer, freeze)", ORANGE, dashed=True
    ),
}
TOKENS = 400
NEGATED = 0.3  # of the made-up reviews' words, so that pairs carry meaning
ROWS, WIDTH = 2**21, 16
EPOCHS, BATCH_SIZE, LEARNING_RATE = 3, 64, 1e-2


def main(arguments: Sequence[str] | None = None) -> int:
    """Train with each optimizer and compare; return the exit status."""
    given = parse(arguments)
    try:
        limits = given.train_samples, given.test_samples
        data = imdb.load(given.data, *limits, tokens=TOKENS, negated=NEGATED)
        comparison = Comparison(
            "large_table", CURVES, data, vars(given), "trained_seconds"
        )
    except (DataError, OSError) as error:
        return options.refuse("large_table", error)

    x_train, x_test = (with_pairs(x, given.rows) for x in (data.x_train, data.x_test))
    for name, seed in comparison.jobs(given.optimizers, given.seeds):
        model = build_model(x_train.shape[1], given.rows, given.width)
        model.compile(
            optimizer=build_optimizer(name, given.learning_rate, given.k, given.alpha),
            loss="binary_crossentropy",
            metrics=["accuracy"],
        )
        history = model.fit(
            x_train,
            data.y_train,
            batch_size=given.batch_size,
            epochs=given.epochs or EPOCHS,
            validation_data=(x_test, data.y_test),
            validation_batch_size=256,
            callbacks=[EpochTimer()],
            verbose="auto" if sys.stdout.isatty() else 2,  # in a log, a line an epoch
        )
        comparison.add(name, seed, history)
    comparison.show()
    return 0


def with_pairs(words: np.ndarray, rows: int) -> np.ndarray:
    """Word numbers, then those of neighbouring pairs, hashed into the other rows."""
    first, second = words[:, :-1].astype("int64"), words[:, 1:].astype("int64")
    pairs = imdb.NUM_WORDS + (first * 1_000_003 + second) % (rows - imdb.NUM_WORDS)
    pairs[(first == 0) | (second == 0)] = 0  # padding
    return np.concatenate([words, pairs], axis=1).astype("int32")


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


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser("large_table", description=__doc__)
    options.add_data(parser, imdb.SOURCES)
    options.add_rate(parser, "--learning-rate", LEARNING_RATE)
    options.add_comparison(parser, CURVES, batch_size=BATCH_SIZE)
    options.add_size(parser, "--rows", ROWS, imdb.NUM_WORDS + 1, "of the table")
    options.add_size(parser, "--width", WIDTH, 1, "of the table")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
