"""Compare Adam with LazyOptimizer and Lookahead on an LSTM that reads reviews."""

import argparse
import sys
from collections.abc import Sequence

import keras

from examples.common import imdb, options
from examples.common.comparison import Comparison, EpochTimer
from examples.common.plots import BLACK, BLUE, ORANGE, Curve
from examples.common.sources import DataError
from keras_lookahead_lazy import LazyOptimizer, Lookahead

CURVES = {
    "adam": Curve("Adam", BLACK),
    "lazy-decay": Curve("LazyOptimizer, decay", BLUE),
    "lazy-freeze": Curve("LazyOptimizer, freeze", ORANGE),
    "lookahead": Curve("Lookahead(Adam)", BLACK, dashed=True),
    "lookahead-lazy": Curve("Lookahead(LazyOptimizer)", BLUE, dashed=True),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Train with each optimizer and compare; return the exit status."""
    given = parse(arguments)
    try:
        data = imdb.load(given.data, given.train_samples, given.test_samples)
        given.epochs = given.epochs or data.epochs
        comparison = Comparison("imdb_lazy", CURVES, data, vars(given))
    except (DataError, OSError) as error:
        return options.refuse("imdb_lazy", error)

    for name, seed in comparison.jobs(given.optimizers, given.seeds):
        model = build_model(tokens=data.x_train.shape[1])
        model.compile(
            optimizer=build_optimizer(name, given.learning_rate, given.k, given.alpha),
            loss="binary_crossentropy",
            metrics=["accuracy"],
        )
        history = model.fit(
            data.x_train,
            data.y_train,
            batch_size=given.batch_size,
            epochs=given.epochs,
            validation_data=(data.x_test, data.y_test),
            validation_batch_size=256,
            callbacks=[EpochTimer()],
            verbose="auto" if sys.stdout.isatty() else 2,  # in a log, a line an epoch
        )
        comparison.add(name, seed, history)
    comparison.show()
    return 0


def build_model(tokens: int) -> keras.Model:
    """Build the LSTM that bojone's article on lazy optimizers trained."""
    return keras.Sequential(
        [
            keras.Input((tokens,), dtype="int32"),
            keras.layers.Embedding(imdb.NUM_WORDS, 128),
            keras.layers.LSTM(128, dropout=0.2, recurrent_dropout=0.2),
            keras.layers.Dense(1, activation="sigmoid"),
        ]
    )


def build_optimizer(
    name: str,
    learning_rate: float = 1e-3,
    k: int = 5,
    alpha: float = 0.5,
    epsilon: float = 1e-7,
) -> keras.optimizers.Optimizer:
    """Build what a name says: one of `CURVES`, or another in the same words."""
    optimizer = keras.optimizers.Adam(learning_rate, epsilon=epsilon)
    if "lazy" in name:
        moments = "freeze" if "freeze" in name else "decay"
        optimizer = LazyOptimizer(optimizer, moments=moments)
    return Lookahead(optimizer, k, alpha) if "lookahead" in name else optimizer


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser("imdb_lazy", description=__doc__)
    options.add_data(parser, imdb.SOURCES)
    options.add_rate(parser, "--learning-rate", 1e-3)
    options.add_comparison(parser, CURVES, batch_size=32)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
