"""Adam and LazyOptimizer on a table of millions of rows: accuracy over seconds.

The model is that of `examples/large_table`: fastText's classifier, on real reviews.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from examples.common import imdb as reviews
from examples.common.comparison import EpochTimer, add_trained_seconds, epochs_of
from examples.common.options import (
    add_learning_rates,
    add_optimizers,
    add_size,
    positive_float,
    positive_int,
)
from examples.common.plots import GREY, Curve
from examples.common.sources import Data
from examples.large_table import __main__ as example
from experiments import _candidates
from experiments._runs import Progress, Settings, add_options, run_all

ROWS, WIDTH = 2**21, 16
TOKENS, BATCH_SIZE, EPOCHS = 400, 64, 3
EPSILON = 1e-7  # Keras's; torch has 1e-8
PEER = "torch-sparse-adam"
CURVES = {
    **example.CURVES,
    PEER: Curve("SparseAdam in a plain torch loop", GREY),
    **_candidates.CURVES,
}
USUAL = [name for name in CURVES if name not in _candidates.CURVES]


def measure(data: Data, settings: Settings, name: str) -> dict[str, Any]:
    """Train once; return what each epoch measured, and the seconds of training so far.

    The first epoch's seconds include the compilation of the step.
    """
    rows = settings["rows"]
    x_train, x_test = (example.with_pairs(x, rows) for x in (data.x_train, data.x_test))
    train = _in_torch if settings["optimizer"] == PEER else _in_keras
    validation = x_test, data.y_test
    epochs = train(x_train, data.y_train, validation, settings, name)
    add_trained_seconds(epochs)
    best = max(epoch["val_accuracy"] for epoch in epochs)
    return {"best_val_accuracy": best, "epochs": epochs}


def _in_keras(
    x: np.ndarray, y: np.ndarray, validation: tuple, settings: Settings, name: str
) -> list[dict[str, float]]:
    model = example.build_model(x.shape[1], settings["rows"], WIDTH)
    model.compile(
        optimizer=_candidates.build(settings, epsilon=settings.get("epsilon", EPSILON)),
        loss="binary_crossentropy",
        metrics=["accuracy"],
    )
    history = model.fit(
        x,
        y,
        batch_size=settings.get("batch_size", BATCH_SIZE),
        epochs=settings["epochs"],
        validation_data=validation,
        validation_batch_size=256,
        callbacks=[Progress(name), EpochTimer()],
        verbose=0,
    )
    return epochs_of(history)


def _in_torch(
    x: np.ndarray, y: np.ndarray, validation: tuple, settings: Settings, name: str
) -> list[dict[str, float]]:
    from experiments import _torch_loop

    return _torch_loop.train(
        x,
        y,
        validation,
        rows=settings["rows"],
        width=WIDTH,
        learning_rate=settings["learning_rate"],
        epsilon=EPSILON,
        batch_size=settings.get("batch_size", BATCH_SIZE),
        epochs=settings["epochs"],
        seed=settings["seed"],
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the experiment; return the exit status."""
    parser = argparse.ArgumentParser("large_table", description=__doc__)
    add_optimizers(parser, CURVES, USUAL)
    _candidates.add_weight_decay(parser)
    add_learning_rates(parser, [1e-2])
    parser.add_argument(
        "--batch-size",
        type=positive_int,
        default=BATCH_SIZE,
        metavar="N",
        help="(default: %(default)s)",
    )
    parser.add_argument(
        "--epsilon",
        type=positive_float,
        default=EPSILON,
        metavar="EPSILON",
        help="Adam's (default: %(default)s)",
    )
    add_size(parser, "--rows", ROWS, reviews.NUM_WORDS + 1, "of the table")
    add_options(parser, seeds=[0, 1, 2], data="keras, or a path of an imdb.npz")
    options = parser.parse_args(arguments)
    batch_size, epsilon = options.batch_size, options.epsilon
    unusual: Settings = {}
    suffix = ""
    if batch_size != BATCH_SIZE:
        unusual["batch_size"] = batch_size
        suffix += f"-batch{batch_size}"
    if epsilon != EPSILON:
        if PEER in options.optimizers:
            parser.error(f"{PEER} is run with Keras's epsilon only")
        unusual["epsilon"] = epsilon
        suffix += f"-epsilon{epsilon:g}"
    end, decay = _candidates.weight_decay(parser, options)
    runs: dict[str, Settings] = {
        f"{optimizer}-rows{options.rows}-rate{rate:g}{suffix}{end}-seed{seed}": {
            "optimizer": optimizer,
            "seed": seed,
            "rows": options.rows,
            "learning_rate": rate,
            "epochs": options.epochs or EPOCHS,
            "train_samples": options.train_samples,
            "test_samples": options.test_samples,
            **unusual,
            **decay,
        }
        for seed in options.seeds
        for optimizer in options.optimizers
        for rate in options.learning_rates
    }

    def load() -> Data:
        return reviews.load(
            options.data,
            options.train_samples,
            options.test_samples,
            tokens=TOKENS,
        )

    return run_all("large_table", runs, load, measure, options.output, options.jobs)


if __name__ == "__main__":
    sys.exit(main())
