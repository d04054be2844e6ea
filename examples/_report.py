"""What a comparison leaves behind: a table, a JSON file and a picture."""

import importlib
import json
import math
import os
import platform
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.console import Console
from rich.table import Table

import keras_lookahead_lazy

# Apart in hue and in lightness, so also for colour-blind readers and in grey.
BLACK, BLUE, ORANGE = "#222222", "#0072b2", "#e08a00"


@dataclass(frozen=True)
class Curve:
    """How the table and the picture show one optimizer; dashed is with Lookahead."""

    label: str
    color: str
    dashed: bool = False


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


def environment() -> dict[str, Any]:
    """List what else the numbers depend on: versions, backend, machine."""
    backend = keras.backend.backend()
    module = importlib.import_module(backend)
    return {
        "keras_lookahead_lazy": keras_lookahead_lazy.__version__,
        "python": platform.python_version(),
        "keras": keras.__version__,
        "backend": backend,
        "backend_version": getattr(module, "__version__", None),
        "numpy": np.__version__,
        "machine": platform.machine(),
        "cpu_count": os.cpu_count(),
    }


def write_json(path: Path, about: Mapping[str, Any], runs: Iterable[Run]) -> None:
    """Write every epoch of every run, and what is needed to run them again."""
    content = {
        **about,
        "environment": environment(),
        "runs": [
            {
                "optimizer": run.optimizer,
                "seed": run.seed,
                "best_val_accuracy": run.best_epoch["val_accuracy"],
                "best_epoch": run.best_epoch["epoch"],
                "ms_per_step": run.ms_per_step,
                "epochs": run.epochs,
            }
            for run in runs
        ],
    }
    text = json.dumps(without_nan(content), indent=2, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


def print_table(
    title: str, runs: Sequence[Run], curves: Mapping[str, Curve], console: Console
) -> None:
    """Print a line an optimizer, means over seeds, the best accuracy in bold."""
    groups = by_optimizer(runs)
    one_seed = all(len(group) == 1 for group in groups.values())
    best = {
        name: [100 * run.best_epoch["val_accuracy"] for run in group]
        for name, group in groups.items()
    }
    winner = max(statistics.mean(accuracies) for accuracies in best.values())

    table = Table(
        title=f"Validation accuracy (%) and loss: {title}", title_justify="left"
    )
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
            curves[name].label,
            *accuracy,
            f"{100 * statistics.mean(epoch['val_accuracy'] for epoch in last):.2f}",
            f"{statistics.mean(epoch['val_loss'] for epoch in last):.3f}",
            f"{statistics.mean(run.ms_per_step for run in group):.1f}",
            style="bold" if mean == winner else None,
        )
    console.print(table)


def draw(
    path: Path, title: str, runs: Sequence[Run], curves: Mapping[str, Curve]
) -> None:
    """Draw the validation accuracy and loss of every epoch to a PNG file."""
    # A bare Figure draws with Agg and needs neither pyplot nor a display.
    figure = Figure(figsize=(10, 5), layout="constrained")
    accuracy, loss = figure.subplots(1, 2)
    draw_measure(accuracy, "val_accuracy", "validation accuracy", runs, curves)
    draw_measure(loss, "val_loss", "validation loss", runs, curves)
    figure.suptitle(title, fontsize=11)
    legend(figure, accuracy)
    figure.savefig(path, dpi=150)


def legend(figure: Figure, axes: Axes) -> None:
    """Put the legend of one of a figure's axes below all of them."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=len(labels) if len(labels) < 5 else 3,
        frameon=False,
    )


def style(axes: Axes, x_label: str, y_label: str) -> None:
    """Label the axes, over a light grid."""
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def by_optimizer(runs: Iterable[Run]) -> dict[str, list[Run]]:
    """Group runs by optimizer, in the order in which they were made."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.optimizer, []).append(run)
    return groups


def draw_measure(
    axes: Axes, key: str, label: str, runs: Sequence[Run], curves: Mapping[str, Curve]
) -> None:
    """Draw what each epoch measured: the mean over seeds, and thinly every seed."""
    for name, group in by_optimizer(runs).items():
        curve = curves[name]
        epochs = [epoch["epoch"] for epoch in group[0].epochs]
        values = np.array(
            [[epoch[key] for epoch in run.epochs] for run in group], dtype="float64"
        )
        line = "--" if curve.dashed else "-"
        axes.plot(
            epochs,
            values.mean(axis=0),
            line,
            color=curve.color,
            label=curve.label,
            linewidth=2,
            marker="o",
            markersize=5,
            markerfacecolor="white" if curve.dashed else curve.color,
        )
        if len(group) > 1:  # the seeds behind the mean
            axes.plot(
                epochs, values.T, line, color=curve.color, linewidth=0.7, alpha=0.5
            )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_xlim(0.8, len(epochs) + 0.2)
    style(axes, "epoch", label)


def without_nan(value: Any) -> Any:
    """Put null for what JSON has no word for: NaN and infinity."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_nan(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
