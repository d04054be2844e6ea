"""Compare SGD and Adam, each with and without Lookahead, on a convolutional network."""

import argparse
import sys
from collections.abc import Sequence

import keras
from keras import layers

from examples.common import cifar, options
from examples.common.comparison import Comparison, EpochTimer
from examples.common.plots import BLUE, ORANGE, Curve
from examples.common.sources import Data, DataError
from keras_lookahead_lazy import Lookahead


def train(name: str, data: Data, given: argparse.Namespace) -> keras.callbacks.History:
    """Train the model with one optimizer."""
    if name.startswith("sgd"):
        optimizer = keras.optimizers.SGD(given.sgd_learning_rate, momentum=0.9)
    else:
        optimizer = keras.optimizers.Adam(given.adam_learning_rate)
    if name.endswith("lookahead"):
        optimizer = Lookahead(optimizer, given.k, given.alpha)
    model = build_model(data.x_train.shape[1:])
    model.compile(
        optimizer=optimizer,
        loss="sparse_categorical_crossentropy",
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


def build_model(shape: Sequence[int]) -> keras.Model:
    """Build a network of three convolutions, each followed by pooling."""
    model = keras.Sequential([keras.Input(shape)])
    for filters in (32, 64, 128):
        model.add(layers.Conv2D(filters, 3, padding="same", activation="relu"))
        model.add(layers.MaxPooling2D())
    model.add(layers.Flatten())
    model.add(layers.Dropout(0.3))
    model.add(layers.Dense(cifar.CLASSES, activation="softmax"))
    return model


CURVES = {
    "sgd": Curve("SGD", ORANGE),
    "sgd-lookahead": Curve("Lookahead(SGD)", ORANGE, dashed=True),
    "adam": Curve("Adam", BLUE),
    "adam-lookahead": Curve("Lookahead(Adam)", BLUE, dashed=True),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Train with each optimizer and compare; return the exit status."""
    parser = argparse.ArgumentParser("cifar_lookahead", description=__doc__)
    options.add_data(parser, cifar.SOURCES)
    options.add_rate(parser, "--sgd-learning-rate", 0.02)
    options.add_rate(parser, "--adam-learning-rate", 1e-3)
    options.add_comparison(parser, CURVES, batch_size=64)
    options.add_lookahead(parser)
    given = parser.parse_args(arguments)
    try:
        data = cifar.load(given.data, given.train_samples, given.test_samples)
        given.epochs = given.epochs or data.epochs
        comparison = Comparison("cifar_lookahead", CURVES, data, vars(given))
    except (DataError, OSError) as error:
        return options.refuse("cifar_lookahead", error)
    # All data sources put the colour channels last, whatever keras.json says.
    keras.config.set_image_data_format("channels_last")
    # From one seed all optimizers get the same initial weights and the same batches.
    for name, seed in comparison.jobs(given.optimizers, given.seeds):
        comparison.add(name, seed, train(name, data, given))
    comparison.show()
    return 0


if __name__ == "__main__":
    sys.exit(main())
