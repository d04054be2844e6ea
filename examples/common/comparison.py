"""Compare several optimizers in a table, a JSON file and a picture."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
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
class Metric:
    """How to show a metric.

    Attributes:
        label: its name in the table and the picture.
        form: how to write a value.
        same: values that differ by no more than this are called the same.
    """

    label: str
    form: str
    same: float

    def format(self, value: float) -> str:
        """Write a value."""
        return self.form.format(value)


METRICS = {
    "accuracy": Metric("accuracy", "{:.2%}", same=0.01),
    "auc": Metric("AUC", "{:.4f}", same=0.002),
}


@dataclass(frozen=True)
class Run:
    """One optimizer trained from one seed: a dict of measurements for each epoch."""

    optimizer: str
    seed: int
    epochs: list[dict[str, float]]

    def best_epoch(self, measure: str) -> dict[str, float]:
        """Return the epoch with the highest value of `measure`, the first of equals."""
        return max(self.epochs, key=lambda epoch: epoch[measure])

    @property
    def ms_per_step(self) -> float:
        """The median over epochs, without the first, in which the step is compiled."""
        return self._typical("ms_per_step")

    @property
    def seconds_per_epoch(self) -> float:
        """The same for the seconds of training in an epoch."""
        return self._typical("seconds")

    def _typical(self, measure: str) -> float:
        return median(epoch[measure] for epoch in self.epochs[1:] or self.epochs)


class Comparison:
    """Runs of a model with several optimizers.

    Args:
        name: what results.json calls the comparison.
        curves: how to show each optimizer, by its name.
        data: what the runs train on.
        arguments: the options of the command; "output" is the folder of results.json
            and curves.png.
        metric: the metric to compare by, as `fit` calls it: "accuracy" or "auc".
        fast: for comparisons of training time, the names of the optimizer that is meant
            to be fast and of the one to compare it with. Then the picture shows the
            metric over the seconds of training, and its title compares the two.
    """

    def __init__(
        self,
        name: str,
        curves: Mapping[str, Curve],
        data: Data,
        arguments: Mapping[str, Any],
        metric: str = "accuracy",
        fast: tuple[str, str] | None = None,
    ) -> None:
        self._curves, self._data, self._fast = curves, data, fast
        self._metric, self._measure = METRICS[metric], f"val_{metric}"
        self._folder = Path(arguments["output"])
        self._folder.mkdir(parents=True, exist_ok=True)
        arguments = {**arguments, "output": str(self._folder)}
        self._about = {"example": name, "data": data.about, "arguments": arguments}
        self._runs: list[Run] = []
        self._console = Console()

    def jobs(
        self, optimizers: Sequence[str], seeds: Sequence[int]
    ) -> Iterator[tuple[str, int]]:
        """Yield every optimizer and seed, and start the random numbers from the seed.

        So the runs of a seed have the same initial weights, batches and dropout, and
        differ only by the optimizer.
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
        """Add what a `fit` has measured, and write the files.

        They are written after every run, so that what was done is kept if a long
        comparison is stopped.
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
                f"best_{self._measure}": run.best_epoch(self._measure)[self._measure],
                "best_epoch": run.best_epoch(self._measure)["epoch"],
                "ms_per_step": run.ms_per_step,
                "epochs": run.epochs,
            }
            for run in self._runs
        ]
        content = {**self._about, "environment": environment(), "runs": runs}
        write_json(self._folder / "results.json", content)

    def _draw(self) -> None:
        """Draw the validation metric and loss of every epoch."""
        # A bare Figure draws with Agg and needs neither pyplot nor a display.
        figure = Figure(figsize=(10, 5))
        metric, loss = figure.subplots(1, 2)
        runs = {
            name: [run.epochs for run in group]
            for name, group in self._by_optimizer().items()
        }
        over = "trained_seconds" if self._fast else "epoch"
        for axes, measure, label in (
            (metric, self._measure, self._metric.label),
            (loss, "val_loss", "loss"),
        ):
            label = f"validation {label}"
            draw_measure(axes, measure, label, runs, self._curves, over)
        if self._fast:
            top = metric.dataLim.y1
            metric.set_ylim(0.5, top + 0.05 * (top - 0.5))  # from chance on
        figure.suptitle(self.title(), fontsize=11)
        legend(figure, metric)
        figure.savefig(self._folder / "curves.png", dpi=100)

    def title(self) -> str:
        """Name the data; if time is compared, first say what came out."""
        data = f"{self._data.source}, {keras.backend.backend()}"
        groups = self._by_optimizer()
        if self._fast is None or not groups.keys() >= set(self._fast):
            return data
        best = {name: mean(map(self._best, groups[name])) for name in self._fast}
        seconds = {
            name: mean(run.seconds_per_epoch for run in groups[name])
            for name in self._fast
        }
        fast, slow = self._fast
        gain = best[fast] - best[slow]
        if abs(gain) <= self._metric.same:
            found = "Same"
        else:
            found = "Higher" if gain > 0 else "Lower"
        times = seconds[slow] / seconds[fast]
        part = f"1/{times:.0f} of" if times >= 2 else f"{1 / times:.2g} times"
        details = "; ".join(
            f"{self._curves[name].label}: {self._metric.format(best[name])}, "
            f"{seconds[name]:.3g} s per epoch"
            for name in self._fast
        )
        found += f" {self._metric.label}, an epoch in {part} the time"
        return f"{found}\n{details} ({data})"

    def _table(self) -> Table:
        """Show each optimizer in a line, means over seeds, the best metric in bold."""
        groups = self._by_optimizer()
        show = self._metric.format
        one_seed = all(len(group) == 1 for group in groups.values())
        best = {name: [*map(self._best, group)] for name, group in groups.items()}
        winner = max(map(mean, best.values()))

        title = f"Validation {self._metric.label} and loss: {self._data.source}"
        table = Table(title=title, title_justify="left")
        table.add_column("optimizer", no_wrap=True)
        for name, group in groups.items():
            last = [run.epochs[-1] for run in group]
            cells = {"best": show(mean(best[name]))}
            if not one_seed:
                cells["best"] += f"\n{show(min(best[name]))}-{show(max(best[name]))}"
            elif not self._fast:
                cells["epoch"] = str(group[0].best_epoch(self._measure)["epoch"])
            if not self._fast:
                cells["last"] = show(mean(epoch[self._measure] for epoch in last))
            cells["last loss"] = f"{mean(epoch['val_loss'] for epoch in last):.3f}"
            if self._fast:
                whole = mean(epoch["trained_seconds"] for epoch in last)
                cells["seconds"] = f"{whole:.1f}"
                each = mean(run.seconds_per_epoch for run in group)
                cells["s/epoch"] = f"{each:.3g}"
            else:
                cells["ms/step"] = f"{mean(run.ms_per_step for run in group):.1f}"
            if not table.row_count:
                for heading in cells:
                    table.add_column(heading, justify="right")
            style = "bold" if mean(best[name]) == winner else None
            table.add_row(self._curves[name].label, *cells.values(), style=style)
        return table

    def _best(self, run: Run) -> float:
        """Return the best value of the metric in a run."""
        return run.best_epoch(self._measure)[self._measure]

    def _by_optimizer(self) -> dict[str, list[Run]]:
        """Group the runs, in the order in which they were made."""
        groups: dict[str, list[Run]] = {}
        for run in self._runs:
            groups.setdefault(run.optimizer, []).append(run)
        return groups
