"""Compare Adam with LazyOptimizer and Lookahead on an LSTM that reads reviews."""

import argparse
import sys
from collections.abc import Sequence
from functools import partial

import keras

from examples._compare import Comparison, add_options, positive_float, run
from examples._data import Data, choose
from examples._report import BLACK, BLUE, ORANGE, Curve
from examples.imdb_lazy import data as imdb
from keras_lookahead_lazy import LazyOptimizer, Lookahead

CURVES = {
    "adam": Curve("Adam", BLACK),
    "lazy-decay": Curve("LazyOptimizer, decay", BLUE),
    "lazy-freeze": Curve("LazyOptimizer, freeze", ORANGE),
    "lookahead": Curve("Lookahead(Adam)", BLACK, dashed=True),
    "lookahead-lazy": Curve("Lookahead(LazyOptimizer)", BLUE, dashed=True),
}


def build_optimizer(
    name: str, options: argparse.Namespace
) -> keras.optimizers.Optimizer:
    """Build one of `CURVES`."""
    adam = keras.optimizers.Adam(options.learning_rate)
    lookahead = partial(Lookahead, k=options.k, alpha=options.alpha)
    match name:
        case "adam":
            return adam
        case "lazy-decay":
            return LazyOptimizer(adam, moments="decay")
        case "lazy-freeze":
            return LazyOptimizer(adam, moments="freeze")
        case "lookahead":
            return lookahead(adam)
        case "lookahead-lazy":
            return lookahead(LazyOptimizer(adam, moments="decay"))
    raise ValueError(f"unknown optimizer: {name}")


def build_model(data: Data) -> keras.Model:
    """Build the LSTM that bojone's article on lazy optimizers trained."""
    return keras.Sequential(
        [
            keras.Input(shape=data.x_train.shape[1:], dtype="int32"),
            keras.layers.Embedding(imdb.NUM_WORDS, 128),
            keras.layers.LSTM(128, dropout=0.2, recurrent_dropout=0.2),
            keras.layers.Dense(1, activation="sigmoid"),
        ]
    )


def load_data(options: argparse.Namespace) -> Data:
    """Load what `--data` names."""
    limits = {"train": options.train_samples, "test": options.test_samples}
    return choose(
        options.data,
        from_keras=partial(imdb.from_keras, **limits),
        from_path=partial(imdb.from_path, **limits),
        embedded_name="synthetic",
        embedded=partial(imdb.synthetic, **limits),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the comparison; return the exit status."""
    parser = argparse.ArgumentParser("imdb_lazy", description=__doc__)
    parser.add_argument(
        "--data",
        default="auto",
        metavar="SOURCE",
        help="keras: keras.datasets.imdb; synthetic: made-up reviews; a path: a file "
        "as Keras caches it (imdb.npz; read with pickle, so only one you trust); "
        "auto: keras where it is cached or can be downloaded, else synthetic "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--learning-rate",
        type=positive_float,
        default=1e-3,
        metavar="RATE",
        help="Adam's (default: %(default)s)",
    )
    add_options(parser, CURVES, batch_size=32)
    options = parser.parse_args(arguments)
    comparison = Comparison(
        name=parser.prog,
        curves=CURVES,
        load_data=load_data,
        build_model=build_model,
        build_optimizer=build_optimizer,
        loss="binary_crossentropy",
    )
    return run(comparison, options)


if __name__ == "__main__":
    sys.exit(main())
