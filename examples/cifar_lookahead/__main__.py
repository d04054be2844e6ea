"""Compare SGD and Adam, each with and without Lookahead, on a convolutional network."""

import argparse
import sys
from collections.abc import Sequence
from functools import partial

import keras

from examples._compare import Comparison, add_options, positive_float, run
from examples._data import Data, choose
from examples._report import BLUE, ORANGE, Curve
from examples.cifar_lookahead import data as cifar
from keras_lookahead_lazy import Lookahead

CURVES = {
    "sgd": Curve("SGD", ORANGE),
    "sgd-lookahead": Curve("Lookahead(SGD)", ORANGE, dashed=True),
    "adam": Curve("Adam", BLUE),
    "adam-lookahead": Curve("Lookahead(Adam)", BLUE, dashed=True),
}


def build_optimizer(
    name: str, options: argparse.Namespace
) -> keras.optimizers.Optimizer:
    """Build one of `CURVES`."""
    inner, _, wrapper = name.partition("-")
    optimizer = (
        keras.optimizers.SGD(options.sgd_learning_rate, momentum=0.9)
        if inner == "sgd"
        else keras.optimizers.Adam(options.adam_learning_rate)
    )
    if wrapper:
        return Lookahead(optimizer, k=options.k, alpha=options.alpha)
    return optimizer


def build_model(data: Data) -> keras.Model:
    """Build a network of three convolutions, each followed by pooling."""
    layers = keras.layers
    model = keras.Sequential([keras.Input(shape=data.x_train.shape[1:])])
    for filters in (32, 64, 128):
        model.add(layers.Conv2D(filters, 3, padding="same", activation="relu"))
        model.add(layers.MaxPooling2D())
    model.add(layers.Flatten())
    model.add(layers.Dropout(0.3))
    model.add(layers.Dense(cifar.CLASSES, activation="softmax"))
    return model


def load_data(options: argparse.Namespace) -> Data:
    """Load what `--data` names."""
    limits = {"train": options.train_samples, "test": options.test_samples}
    return choose(
        options.data,
        from_keras=partial(cifar.from_keras, **limits),
        from_path=partial(cifar.from_path, **limits),
        embedded_name="digits",
        embedded=partial(cifar.digits, **limits),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the comparison; return the exit status."""
    parser = argparse.ArgumentParser("cifar_lookahead", description=__doc__)
    parser.add_argument(
        "--data",
        default="auto",
        metavar="SOURCE",
        help="keras: keras.datasets.cifar10; digits: scikit-learn's handwritten "
        "digits; a path: an .npz file of JPEGs (train_jpeg, train_size, train_label "
        "and the same for test); auto: keras where it is cached or can be downloaded, "
        "else digits (default: %(default)s)",
    )
    for inner, rate in (("sgd", 0.02), ("adam", 1e-3)):
        parser.add_argument(
            f"--{inner}-learning-rate",
            type=positive_float,
            default=rate,
            metavar="RATE",
            help="default: %(default)s",
        )
    add_options(parser, CURVES, batch_size=64)
    options = parser.parse_args(arguments)
    # Every source gives pictures with the colours last, whatever keras.json says.
    keras.config.set_image_data_format("channels_last")
    comparison = Comparison(
        name=parser.prog,
        curves=CURVES,
        load_data=load_data,
        build_model=build_model,
        build_optimizer=build_optimizer,
        loss="sparse_categorical_crossentropy",
    )
    return run(comparison, options)


if __name__ == "__main__":
    sys.exit(main())
