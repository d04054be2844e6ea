"""Adam and LazyOptimizer on a table of millions of rows: accuracy over seconds.

The model is that of `examples/large_table.py`: fastText's classifier, on real reviews.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from examples import large_table
from examples.imdb_lazy import build_optimizer
from experiments._runs import Progress, Settings, add_options, run_all
from workbench import imdb as reviews
from workbench.comparison import EpochTimer, add_trained_seconds, epochs_of
from workbench.options import add_optimizers, add_rate, add_size
from workbench.sources import Data


def measure(data: Data, settings: Settings, name: str) -> dict[str, Any]:
    """Train once; return what each epoch measured, and the seconds of training so far.

    The first epoch's seconds include the compilation of the step.
    """
    rows = settings["rows"]
    x_train, x_test = (
        large_table.with_pairs(x, rows) for x in (data.x_train, data.x_test)
    )
    model = large_table.build_model(x_train.shape[1], rows, large_table.WIDTH)
    model.compile(
        optimizer=build_optimizer(settings["optimizer"], settings["learning_rate"]),
        loss="binary_crossentropy",
        metrics=["accuracy"],
    )
    history = model.fit(
        x_train,
        data.y_train,
        batch_size=large_table.BATCH_SIZE,
        epochs=settings["epochs"],
        validation_data=(x_test, data.y_test),
        validation_batch_size=256,
        callbacks=[Progress(name), EpochTimer()],
        verbose=0,
    )
    epochs = epochs_of(history)
    add_trained_seconds(epochs)
    return {
        "best_val_accuracy": max(history.history["val_accuracy"]),
        "epochs": epochs,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the experiment; return the exit status."""
    parser = argparse.ArgumentParser("large_table", description=__doc__)
    add_optimizers(parser, large_table.CURVES)
    add_rate(parser, "--learning-rate", large_table.LEARNING_RATE)
    add_size(parser, "--rows", large_table.ROWS, reviews.NUM_WORDS + 1, "of the table")
    add_options(parser, seeds=[0, 1, 2], data="keras, or a path of an imdb.npz")
    options = parser.parse_args(arguments)
    runs: dict[str, Settings] = {
        f"{optimizer}-rows{options.rows}-rate{options.learning_rate:g}-seed{seed}": {
            "optimizer": optimizer,
            "seed": seed,
            "rows": options.rows,
            "learning_rate": options.learning_rate,
            "epochs": options.epochs or large_table.EPOCHS,
            "train_samples": options.train_samples,
            "test_samples": options.test_samples,
        }
        for seed in options.seeds
        for optimizer in options.optimizers
    }

    def load() -> Data:
        return reviews.load(
            options.data,
            options.train_samples,
            options.test_samples,
            tokens=large_table.TOKENS,
        )

    return run_all("large_table", runs, load, measure, options.output, options.jobs)


if __name__ == "__main__":
    sys.exit(main())
