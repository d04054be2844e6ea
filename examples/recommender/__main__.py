"""Train DLRM to predict clicks: Adam, LazyOptimizer and row-wise Adagrad.

The 26 embedding tables have five million rows. Adam updates all of them in every step,
LazyOptimizer only the rows of the batch.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import keras

from examples.common import options
from examples.common.comparison import Comparison, EpochTimer
from examples.common.plots import BLACK, BLUE, ORANGE, SKY, Curve
from examples.common.sources import Data, DataError
from examples.recommender import criteo
from examples.recommender.model import draw_clicks, make_model
from examples.recommender.row_wise_adagrad import RowWiseAdagrad
from keras_lookahead_lazy import LazyOptimizer


def train(
    name: str, data: Data, sizes: Sequence[int], given: argparse.Namespace
) -> keras.callbacks.History:
    """Train the model with one optimizer."""
    model = make_model(sizes, given.width)
    model.compile(
        optimizer=build_optimizer(
            name, given.learning_rate, given.adagrad_learning_rate
        ),
        loss="binary_crossentropy",
        metrics=[keras.metrics.AUC(name="auc")],
    )
    return model.fit(
        data.x_train,
        data.y_train,
        batch_size=given.batch_size,
        epochs=given.epochs,
        validation_data=(data.x_test, data.y_test),
        validation_batch_size=8192,
        callbacks=[EpochTimer()],
        verbose="auto" if sys.stdout.isatty() else 2,  # in a log: one line per epoch
    )


def build_optimizer(
    name: str, learning_rate: float, adagrad_learning_rate: float
) -> keras.optimizers.Optimizer:
    """Build one of the optimizers to compare."""
    adam = keras.optimizers.Adam(learning_rate)
    return {
        "adam": lambda: adam,
        "lazy-freeze": lambda: LazyOptimizer(adam, moments="freeze"),
        "lazy-decay": lambda: LazyOptimizer(adam, moments="decay"),
        "row-wise-adagrad": lambda: LazyOptimizer(
            RowWiseAdagrad(adagrad_learning_rate)
        ),
    }[name]()


CURVES = {
    "adam": Curve("Adam", BLACK),
    "lazy-freeze": Curve("LazyOptimizer, freeze", ORANGE),
    "lazy-decay": Curve("LazyOptimizer, decay", BLUE),
    "row-wise-adagrad": Curve("LazyOptimizer(RowWiseAdagrad)", SKY),
}
FAST = ("lazy-freeze", "adam")  # the picture's title compares their times
SAMPLES = 262_144, 65_536  # synthetic ones to train and to test on


def synthetic(sizes: Sequence[int], train: int | None, test: int | None) -> Data:
    """Draw clicks to train and to test on."""
    parts = zip((train, test), SAMPLES, strict=True)
    (x_train, y_train), (x_test, y_test) = (
        draw_clicks(sizes, wanted or usual, seed)
        for seed, (wanted, usual) in enumerate(parts)
    )
    return Data("synthetic clicks", x_train, y_train, x_test, y_test, epochs=3)


def main(arguments: Sequence[str] | None = None) -> int:
    """Train with each optimizer and compare; return the exit status."""
    parser = argparse.ArgumentParser("recommender", description=__doc__)
    parser.add_argument(
        "--data",
        default="synthetic",
        metavar="SOURCE",
        help="synthetic, or the path of a file in Criteo's format, also compressed "
        "(.gz): label, 13 integers, 26 hexadecimal categories, with tabs between them "
        "(default: %(default)s)",
    )
    options.add_rate(parser, "--learning-rate", 1e-3)
    options.add_rate(parser, "--adagrad-learning-rate", 0.02)
    options.add_comparison(parser, CURVES, batch_size=2048)
    options.add_size(parser, "--rows", max(criteo.SIZES), 2, "at most, of each table")
    options.add_size(parser, "--width", 16, 1, "of the tables")
    given = parser.parse_args(arguments)
    sizes = [min(rows, given.rows) for rows in criteo.SIZES]
    limits = given.train_samples, given.test_samples
    try:
        if given.data == "synthetic":
            data = synthetic(sizes, *limits)
        else:
            data = criteo.load(Path(given.data), sizes, *limits)
        print(f"Data: {data}", flush=True)
        given.epochs = given.epochs or data.epochs
        comparison = Comparison(
            "recommender", CURVES, data, vars(given), metric="auc", fast=FAST
        )
    except (DataError, OSError) as error:
        return options.refuse("recommender", error)
    # From one seed all optimizers get the same initial weights and the same batches.
    for name, seed in comparison.jobs(given.optimizers, given.seeds):
        comparison.add(name, seed, train(name, data, sizes, given))
    comparison.show()
    return 0


if __name__ == "__main__":
    sys.exit(main())
