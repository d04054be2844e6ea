"""What is left of training with several optimizers: a table, a JSON file, a picture."""

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from examples.common.plots import Curve, draw_measure, legend
from examples.common.record import environment, write_json
from examples.common.sources import Data


class EpochTimer(keras.callbacks.Callback):
    """Adds to the history how long each epoch trained, its validation left out."""

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Start the clock."""
        self._start = time.perf_counter()

    def on_test_begin(self, logs: Any = None) -> None:
        """Stop it before the validation."""
        self._seconds = time.perf_counter() - self._start

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Put the time into the history."""
        logs["seconds"] = self._seconds


def epochs_of(history: keras.callbacks.History) -> list[dict[str, float]]:
    """List what each epoch of a `fit` has measured."""
    measured = [[float(value) for value in each] for each in history.history.values()]
    return [
        {"epoch": number, **dict(zip(history.history, values, strict=True))}
        for number, values in enumerate(zip(*measured, strict=True), 1)
    ]


def add_trained_seconds(epochs: Sequence[dict[str, float]]) -> None:
    """Add to what each epoch has measured how long was trained until its end."""
    trained = 0.0
    for epoch in epochs:
        trained += epoch["seconds"]
        epoch["trained_seconds"] = trained


@dataclass(frozen=True)
class Run:
    """One optimizer trained from one seed: a dict of measurements an epoch."""

    optimizer: str
    seed: int
    epochs: list[dict[str, float]]

    @property
    def best_epoch(self) -> dict[str, float]:
        """The epoch of the best validation accuracy, the first of equals."""
        return max(self.epochs, key=lambda epoch: epoch["val_accuracy"])

    @property
    def ms_per_step(self) -> float:
        """The median over epochs, without the first, in which the step is compiled."""
        return statistics.median(
            epoch["ms_per_step"] for epoch in self.epochs[1:] or self.epochs
        )


class Comparison:
    """Runs of a model with several optimizers.

    Parameters
    ----------
    name : str
        What results.json calls the comparison.
    curves : mapping
        How to show each optimizer, by its name.
    data : Data
        What is trained on.
    arguments : mapping
        What was asked for; "output" is the folder of results.json and curves.png.
    over : str
        What the picture shows accuracy and loss over: "epoch", or "trained_seconds".
    """

    def __init__(
        self,
        name: str,
        curves: Mapping[str, Curve],
        data: Data,
        arguments: Mapping[str, Any],
        over: str = "epoch",
    ) -> None:
        self._curves, self._data, self._over = curves, data, over
        self._folder = Path(arguments["output"])
        self._folder.mkdir(parents=True, exist_ok=True)
        arguments = {**arguments, "output": str(self._folder)}
        self._about = {"example": name, "data": data.about, "arguments": arguments}
        self._runs: list[Run] = []
        self._console = Console()

    def jobs(
        self, optimizers: Sequence[str], seeds: Sequence[int]
    ) -> Iterator[tuple[str, int]]:
        """Give every optimizer and seed, when the random numbers start from it.

        Same initial weights, same batches, same dropout: only the optimizer differs.
        """
        pairs = [
            (name, seed)
            for seed in dict.fromkeys(seeds)
            for name in dict.fromkeys(optimizers)
        ]
        for number, (name, seed) in enumerate(pairs, 1):
            heading = f"\n[bold]{number}/{len(pairs)}  {self._curves[name].label}[/]"
            self._console.print(f"{heading}  seed {seed}")
            keras.utils.clear_session()
            keras.utils.set_random_seed(seed)
            yield name, seed

    def add(self, optimizer: str, seed: int, history: keras.callbacks.History) -> None:
        """Take up what a `fit` has measured, and write it.

        At once, so that stopping a long comparison leaves what was done.
        """
        epochs = epochs_of(history)
        add_trained_seconds(epochs)
        for epoch in epochs:
            epoch["ms_per_step"] = 1000 * epoch["seconds"] / history.params["steps"]
        self._runs.append(Run(optimizer, seed, epochs))
        self._write()
        self._draw()

    def show(self) -> None:
        """Print the table, and what was written."""
        self._console.print()
        self._console.print(self._table())
        for name in ("results.json", "curves.png"):
            print(self._folder / name)

    def _write(self) -> None:
        """Write every epoch of every run, and what is needed to run them again."""
        runs = [
            {
                "optimizer": run.optimizer,
                "seed": run.seed,
                "best_val_accuracy": run.best_epoch["val_accuracy"],
                "best_epoch": run.best_epoch["epoch"],
                "ms_per_step": run.ms_per_step,
                "epochs": run.epochs,
            }
            for run in self._runs
        ]
        content = {**self._about, "environment": environment(), "runs": runs}
        write_json(self._folder / "results.json", content)

    def _draw(self) -> None:
        """Draw the validation accuracy and loss of every epoch."""
        # A bare Figure draws with Agg and needs neither pyplot nor a display.
        figure = Figure(figsize=(10, 5))
        accuracy, loss = figure.subplots(1, 2)
        runs = {
            name: [run.epochs for run in group]
            for name, group in self._by_optimizer().items()
        }
        for axes, measure in ((accuracy, "accuracy"), (loss, "loss")):
            label = f"validation {measure}"
            draw_measure(axes, f"val_{measure}", label, runs, self._curves, self._over)
        title = f"{self._data.source} ({keras.backend.backend()})"
        figure.suptitle(title, fontsize=11)
        legend(figure, accuracy)
        figure.savefig(self._folder / "curves.png", dpi=100)

    def _table(self) -> Table:
        """A line an optimizer, means over seeds, the best accuracy in bold."""
        groups = self._by_optimizer()
        one_seed = all(len(group) == 1 for group in groups.values())
        best = {
            name: [100 * run.best_epoch["val_accuracy"] for run in group]
            for name, group in groups.items()
        }
        winner = max(statistics.mean(accuracies) for accuracies in best.values())

        title = f"Validation accuracy (%) and loss: {self._data.source}"
        table = Table(title=title, title_justify="left")
        table.add_column("optimizer", no_wrap=True)
        table.add_column("best", justify="right")
        if one_seed:
            table.add_column("epoch", justify="right")
        for heading in ("last", "last loss", "ms/step"):
            table.add_column(heading, justify="right")
        for name, group in groups.items():
            mean = statistics.mean(best[name])
            if one_seed:
                accuracy = [f"{mean:.2f}", str(group[0].best_epoch["epoch"])]
            else:
                accuracy = [f"{mean:.2f}\n{min(best[name]):.2f}-{max(best[name]):.2f}"]
            last = [run.epochs[-1] for run in group]
            table.add_row(
                self._curves[name].label,
                *accuracy,
                f"{100 * statistics.mean(epoch['val_accuracy'] for epoch in last):.2f}",
                f"{statistics.mean(epoch['val_loss'] for epoch in last):.3f}",
                f"{statistics.mean(run.ms_per_step for run in group):.1f}",
                style="bold" if mean == winner else None,
            )
        return table

    def _by_optimizer(self) -> dict[str, list[Run]]:
        """Group the runs, in the order in which they were made."""
        groups: dict[str, list[Run]] = {}
        for run in self._runs:
            groups.setdefault(run.optimizer, []).append(run)
        return groups
