"""Train one model with several optimizers; all that both examples share."""

import argparse
import math
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
from rich.console import Console

from examples._data import Data, DataError, one_line
from examples._report import Curve, Run, draw, print_table, write_json


@dataclass(frozen=True)
class Comparison:
    """What one example compares.

    Attributes:
        name: the example's name.
        curves: the optimizers `--optimizers` offers, and how to show each.
        load_data, build_model, build_optimizer: what differs between the examples.
        loss: the loss `build_model`'s output is trained with.
    """

    name: str
    curves: Mapping[str, Curve]
    load_data: Callable[[argparse.Namespace], Data]
    build_model: Callable[[Data], keras.Model]
    build_optimizer: Callable[[str, argparse.Namespace], keras.optimizers.Optimizer]
    loss: str


class EpochTimer(keras.callbacks.Callback):
    """Seconds that each epoch trained, its validation left out."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: list[float] = []
        self._start = 0.0

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._start = time.perf_counter()

    def on_test_begin(self, logs: Any = None) -> None:
        self.seconds.append(time.perf_counter() - self._start)


def add_options(
    parser: argparse.ArgumentParser, curves: Mapping[str, Curve], batch_size: int
) -> None:
    """Add the options that both examples have."""
    add_optimizers_option(parser, list(curves))
    add = parser.add_argument
    for option, default, text in (
        ("--epochs", None, "default: what suits the data"),
        ("--batch-size", batch_size, "default: %(default)s"),
        ("--train-samples", None, "train on at most so many"),
        ("--test-samples", None, "validate on at most so many"),
        ("--k", 5, "Lookahead's k (default: %(default)s)"),
    ):
        add(option, type=positive_int, default=default, metavar="N", help=text)
    add(
        "--alpha",
        type=fraction,
        default=0.5,
        metavar="SHARE",
        help="Lookahead's alpha (default: %(default)s)",
    )
    add(
        "--seeds",
        "--seed",
        nargs="+",
        type=seed_number,
        default=[0],
        metavar="SEED",
        help="train every optimizer once from each (default: 0)",
    )
    add(
        "--output",
        type=Path,
        default=Path("results") / parser.prog,
        metavar="FOLDER",
        help="where results.json and curves.png go (default: %(default)s)",
    )


def add_optimizers_option(parser: argparse.ArgumentParser, names: list[str]) -> None:
    """Add the option that chooses among the optimizers."""
    parser.add_argument(
        "--optimizers",
        nargs="+",
        choices=names,
        default=names,
        metavar="NAME",
        help=f"any of {', '.join(names)} (default: all)",
    )


def run(comparison: Comparison, options: argparse.Namespace) -> int:
    """Compare the optimizers; return the exit status.

    Results are written after every run, so that stopping a long comparison leaves what
    was done.
    """
    try:
        data = comparison.load_data(options)
        options.output.mkdir(parents=True, exist_ok=True)
    except (DataError, OSError) as error:
        message = one_line(error)
        print(f"{comparison.name}: error: {message}", file=sys.stderr)
        return 2
    epochs = options.epochs or data.epochs
    about = {
        "example": comparison.name,
        "data": {
            "source": data.source,
            "train_samples": len(data.x_train),
            "test_samples": len(data.x_test),
        },
        "arguments": {**vars(options), "epochs": epochs, "output": str(options.output)},
    }
    console = Console()
    jobs = [
        (name, seed)
        for seed in dict.fromkeys(options.seeds)
        for name in dict.fromkeys(options.optimizers)
    ]
    runs: list[Run] = []
    for number, (name, seed) in enumerate(jobs, 1):
        label = comparison.curves[name].label
        console.print(f"\n[bold]{number}/{len(jobs)}  {label}[/bold]  seed {seed}")
        runs.append(train(comparison, options, data, epochs, name, seed))
        write_json(options.output / "results.json", about, runs)
        draw(
            options.output / "curves.png",
            f"{data.source} ({keras.backend.backend()})",
            runs,
            comparison.curves,
        )
    console.print()
    print_table(data.source, runs, comparison.curves, console)
    for name in ("results.json", "curves.png"):
        print(options.output / name)
    return 0


def train(
    comparison: Comparison,
    options: argparse.Namespace,
    data: Data,
    epochs: int,
    name: str,
    seed: int,
) -> Run:
    """Train the model with the optimizer `name`."""
    keras.utils.clear_session()
    # Same initial weights, same batches, same dropout: only the optimizer differs.
    keras.utils.set_random_seed(seed)
    model = comparison.build_model(data)
    model.compile(
        optimizer=comparison.build_optimizer(name, options),
        loss=comparison.loss,
        metrics=["accuracy"],
    )
    timer = EpochTimer()
    history = model.fit(
        data.x_train,
        data.y_train,
        batch_size=options.batch_size,
        epochs=epochs,
        validation_data=(data.x_test, data.y_test),
        validation_batch_size=256,
        callbacks=[timer],
        # A progress bar on a terminal; in a log file, where a bar would fill pages,
        # a line an epoch.
        verbose="auto" if sys.stdout.isatty() else 2,
    ).history
    steps = math.ceil(len(data.x_train) / options.batch_size)
    measures = ("loss", "accuracy", "val_loss", "val_accuracy")
    return Run(
        optimizer=name,
        seed=seed,
        epochs=[
            {
                "epoch": epoch + 1,
                **{key: float(history[key][epoch]) for key in measures},
                "seconds": seconds,
                "ms_per_step": 1000 * seconds / steps,
            }
            for epoch, seconds in enumerate(timer.seconds)
        ],
    )


def positive_int(text: str) -> int:
    """Parse an option that counts something."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def positive_float(text: str) -> float:
    """Parse a learning rate."""
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError("must be above 0")
    return number


def fraction(text: str) -> float:
    """Parse a share of one, zero left out."""
    number = float(text)
    if not 0 < number <= 1:
        raise argparse.ArgumentTypeError("must be above 0 and at most 1")
    return number


def seed_number(text: str) -> int:
    """Parse a seed that every backend takes."""
    number = int(text)
    if not 0 <= number < 2**32:
        raise argparse.ArgumentTypeError("must be from 0 to 4294967295")
    return number
