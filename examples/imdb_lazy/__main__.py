"""Compare Adam with LazyOptimizer and Lookahead on an LSTM that reads film reviews."""

import argparse
import sys
from collections.abc import Sequence

import keras

from examples.common import imdb, options
from examples.common.comparison import Comparison, EpochTimer
from examples.common.plots import BLACK, BLUE, ORANGE, Curve
from examples.common.sources import Data, DataError
from keras_lookahead_lazy import LazyOptimizer, Lookahead


def train(name: str, data: Data, given: argparse.Namespace) -> keras.callbacks.History:
    """Train the model with one optimizer."""
    model = build_model(tokens=data.x_train.shape[1])
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


def build_model(tokens: int) -> keras.Model:
    """Build the LSTM of bojone's article on lazy optimizers."""
    return keras.Sequential(
        [
            keras.Input((tokens,), dtype="int32"),
            keras.layers.Embedding(imdb.NUM_WORDS, 128),
            keras.layers.LSTM(128, dropout=0.2, recurrent_dropout=0.2),
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
        "lazy-decay": lambda: LazyOptimizer(adam, moments="decay"),
        "lazy-freeze": lambda: LazyOptimizer(adam, moments="freeze"),
        "lookahead": lambda: Lookahead(adam, k, alpha),
        "lookahead-lazy": lambda: Lookahead(LazyOptimizer(adam), k, alpha),
    }[name]()


CURVES = {
    "adam": Curve("Adam", BLACK),
    "lazy-decay": Curve("LazyOptimizer, decay", BLUE),
    "lazy-freeze": Curve("LazyOptimizer, freeze", ORANGE),
    "lookahead": Curve("Lookahead(Adam)", BLACK, dashed=True),
    "lookahead-lazy": Curve("Lookahead(LazyOptimizer)", BLUE, dashed=True),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Train with each optimizer and compare; return the exit status."""
    parser = argparse.ArgumentParser("imdb_lazy", description=__doc__)
    options.add_data(parser, imdb.SOURCES)
    options.add_rate(parser, "--learning-rate", 1e-3)
    options.add_comparison(parser, CURVES, batch_size=32)
    options.add_lookahead(parser)
    given = parser.parse_args(arguments)
    try:
        data = imdb.load(given.data, given.train_samples, given.test_samples)
        given.epochs = given.epochs or data.epochs
        comparison = Comparison("imdb_lazy", CURVES, data, vars(given))
    except (DataError, OSError) as error:
        return options.refuse("imdb_lazy", error)
    # From one seed all optimizers get the same initial weights and the same batches.
    for name, seed in comparison.jobs(given.optimizers, given.seeds):
        comparison.add(name, seed, train(name, data, given))
    comparison.show()
    return 0


if __name__ == "__main__":
    sys.exit(main())
