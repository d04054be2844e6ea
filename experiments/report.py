"""Draw the pictures of docs/results.md and write the pages' tables, from the runs.

`python -m experiments.report` reads `experiments/results`; `--check` says whether the
tables of the pages are those that the runs give.
"""

import argparse
import math
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial, reduce
from operator import getitem
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from examples.common.plots import (
    BLACK,
    BLUE,
    GREY,
    ORANGE,
    Curve,
    Epochs,
    draw_measure,
    legend,
)
from examples.imdb_lazy.__main__ import CURVES as IMDB_CURVES
from experiments import (
    _candidates,
    _pages,
    _tuning,
    cifar,
    gan,
    imdb,
    language_model,
    large_table,
    ncf,
    outer,
    word_vectors,
)
from experiments._intervals import mean_interval
from experiments._pages import Table
from experiments._runs import RESULTS, Record, read
from experiments.large_table import CURVES as TABLE_CURVES

DOCS = Path(__file__).parents[1] / "docs"
IMAGES = DOCS / "images"

LANGUAGE_CURVES = {
    "adam": Curve("Adam", BLUE),
    "lookahead-adam": Curve("Lookahead(Adam)", BLUE, dashed=True),
    "sgd": Curve("SGD", ORANGE),
    "lookahead-sgd": Curve("Lookahead(SGD)", ORANGE, dashed=True),
}
# A factor of the learning rate, k and alpha.
SWEEP_CURVES: dict[tuple[float, int | None, float | None], Curve] = {
    (1, None, None): Curve("SGD", ORANGE),
    (cifar.ALPHA, None, None): Curve(f"SGD, {cifar.ALPHA} x learning rate", BLACK),
    (1, cifar.K, cifar.ALPHA): Curve(
        f"Lookahead, alpha {cifar.ALPHA}", ORANGE, dashed=True
    ),
    (1, cifar.K, cifar.LARGE_ALPHA): Curve(
        f"Lookahead, alpha {cifar.LARGE_ALPHA}", BLUE, dashed=True
    ),
}
NOMINAL: dict[str, Any] = {
    "learning_rate": cifar.LEARNING_RATE,
    "momentum": cifar.MOMENTUM,
}
TEST_ACCURACY = ("test", "accuracy")
TRAININGS = (
    ("train", "loss", "final train loss"),
    (*TEST_ACCURACY, "test accuracy"),
)


# IMDB


def imdb_table(records: Sequence[Record]) -> Table:
    """Best validation accuracy of every seed, and what goes with it."""
    groups = _group(records, "optimizer", IMDB_CURVES)
    adam = _by_seed(groups["adam"], "best_val_accuracy")
    table = [
        [
            "optimizer",
            "best validation accuracy, %",
            "each seed",
            "points above Adam, same seeds",
            "best on the slow weights, %",
            "last epoch, %",
            "train loss, last epoch",
            "a sampled row moves in a step, 1e-3",
            "another row, 1e-3",
            "other rows' share of all movement",
        ]
    ]
    for optimizer, group in groups.items():
        accuracy = _by_seed(group, "best_val_accuracy")
        slow = [
            max(epoch["slow_val_accuracy"] for epoch in epochs)
            for epochs in _epochs(group)
            if "slow_val_accuracy" in epochs[0]
        ]
        runs = _epochs(group)
        ends = [epochs[-1] for epochs in runs]
        movement = [
            statistics.mean(epoch[measure] for epochs in runs for epoch in epochs)
            for measure in (
                "moved_if_sampled",
                "moved_if_not_sampled",
                "share_not_sampled",
            )
        ]
        table.append(
            [
                IMDB_CURVES[optimizer].label,
                _percent(accuracy.values()),
                ", ".join(f"{100 * value:.2f}" for value in accuracy.values()),
                "" if optimizer == "adam" else _above(accuracy, adam),
                _percent(slow) if slow else "",
                f"{100 * statistics.mean(end['val_accuracy'] for end in ends):.2f}",
                f"{statistics.mean(end['loss'] for end in ends):.3f}",
                *(f"{1000 * distance:.2f}" for distance in movement[:2]),
                f"{100 * movement[2]:.0f} %",
            ]
        )
    return table


def imdb_epochs_table(records: Sequence[Record]) -> Table:
    """Train loss and validation accuracy after every epoch, means over seeds."""
    groups = _group(records, "optimizer", IMDB_CURVES)
    table = [["epoch", *(IMDB_CURVES[optimizer].label for optimizer in groups)]]
    for number in range(len(records[0]["results"]["epochs"])):
        row = [str(number + 1)]
        for group in groups.values():
            epochs = [record["results"]["epochs"][number] for record in group]
            loss = statistics.mean(epoch["loss"] for epoch in epochs)
            accuracy = statistics.mean(epoch["val_accuracy"] for epoch in epochs)
            row.append(f"{loss:.3f}, {100 * accuracy:.2f}")
        table.append(row)
    return table


def imdb_short_table(records: Sequence[Record]) -> Table:
    """What a reader in a hurry wants to know."""
    heading, *rows = imdb_table(records)
    return [[*heading[:2], heading[3]], *([*row[:2], row[3]] for row in rows)]


def draw_imdb(records: Sequence[Record]) -> Figure:
    """Accuracy, losses and the movement of rows over the epochs."""
    runs = {
        optimizer: _epochs(group)
        for optimizer, group in _group(records, "optimizer", IMDB_CURVES).items()
    }
    figure = Figure(figsize=(11, 8))
    (accuracy, train_loss), (against, moved) = figure.subplots(2, 2)
    draw_measure(accuracy, "val_accuracy", "validation accuracy", runs, IMDB_CURVES)
    draw_measure(train_loss, "loss", "train loss", runs, IMDB_CURVES)
    label = "distance a row not sampled moves in a step"
    draw_measure(moved, "moved_if_not_sampled", label, runs, IMDB_CURVES)
    for optimizer, seeds in runs.items():
        curve = IMDB_CURVES[optimizer]
        for epochs in seeds:
            against.plot(
                [epoch["loss"] for epoch in epochs],
                [epoch["val_accuracy"] for epoch in epochs],
                curve.line,
                color=curve.color,
                marker="o",
                markersize=3,
                linewidth=0.7,
            )
    against.set(xlabel="train loss", ylabel="validation accuracy")
    against.invert_xaxis()
    legend(figure, accuracy)
    return figure


# CIFAR-10


def sweep_table(records: Sequence[Record]) -> Table:
    """Means over seeds for every learning rate and momentum."""
    table = [["learning rate", "momentum"]]
    for measure in ("train loss", "test accuracy, %"):
        table[0] += [f"{measure}: {curve.label}" for curve in SWEEP_CURVES.values()]
    for rate, momentum in sorted(cifar.SWEEP):
        groups = [_swept(records, rate, momentum, *variant) for variant in SWEEP_CURVES]
        table.append(
            [f"{rate:g}", f"{momentum:g}"]
            + [_losses(group) for group in groups]
            + [_accuracies(group) for group in groups]
        )
    return table


def sweep_differences_table(records: Sequence[Record]) -> Table:
    """How far Lookahead is ahead of SGD, of runs from the same seeds."""
    sgd, slower, lookahead, large_alpha = SWEEP_CURVES
    pairs = [(lookahead, sgd), (lookahead, slower), (large_alpha, sgd)]
    labels = [[SWEEP_CURVES[variant].label for variant in pair] for pair in pairs]
    table = [["learning rate", "momentum", *(" above ".join(pair) for pair in labels)]]
    for rate, momentum in sorted(cifar.SWEEP):
        row = [f"{rate:g}", f"{momentum:g}"]
        for pair in pairs:
            first, second = (_swept(records, rate, momentum, *each) for each in pair)
            accuracies = [_by_seed(each, *TEST_ACCURACY) for each in (first, second)]
            row.append(_above(*accuracies))
        table.append(row)
    return table


def draw_sweep(records: Sequence[Record]) -> Figure:
    """Final train loss and test accuracy over the learning rate and the momentum."""
    figure = Figure(figsize=(11, 8))
    for row, (part, measure, label) in zip(
        figure.subplots(2, 2), TRAININGS, strict=True
    ):
        for variant, curve in SWEEP_CURVES.items():
            by_rate = [
                _values(_swept(records, rate, cifar.MOMENTUM, *variant), part, measure)
                for rate in cifar.LEARNING_RATES
            ]
            _plot(row[0], cifar.LEARNING_RATES, by_rate, curve)
            by_momentum = [
                _values(
                    _swept(records, cifar.LEARNING_RATE, momentum, *variant),
                    part,
                    measure,
                )
                for momentum in cifar.MOMENTA
            ]
            _plot(row[1], range(len(cifar.MOMENTA)), by_momentum, curve)
        row[0].set_xscale("log")
        row[0].set(xlabel=f"learning rate (momentum {cifar.MOMENTUM})", ylabel=label)
        row[1].set_xticks(range(len(cifar.MOMENTA)), map(str, cifar.MOMENTA))
        x_label = f"momentum (learning rate {cifar.LEARNING_RATE})"
        row[1].set(xlabel=x_label, ylabel=label)
    legend(figure, row[0])
    return figure


def _swept(
    records: Sequence[Record],
    rate: float,
    momentum: float,
    factor: float,
    k: int | None,
    alpha: float | None,
) -> list[Record]:
    return _trainings(
        records, learning_rate=factor * rate, momentum=momentum, k=k, alpha=alpha
    )


def k_alpha_table(records: Sequence[Record]) -> Table:
    """Means over seeds for every k and alpha."""
    table = [["k"]]
    for measure in ("train loss", "test accuracy, %"):
        table[0] += [f"{measure}: alpha {alpha:g}" for alpha in cifar.ALPHAS]
    for k in cifar.KS:
        groups = [
            _trainings(records, k=k, alpha=alpha, **NOMINAL) for alpha in cifar.ALPHAS
        ]
        table.append(
            [str(k)]
            + [_losses(group) for group in groups]
            + [_accuracies(group) for group in groups]
        )
    sgd = _trainings(records, k=None, **NOMINAL)
    table.append(["without Lookahead", _losses(sgd), "", "", _accuracies(sgd), "", ""])
    return table


def draw_k_alpha(records: Sequence[Record]) -> Figure:
    """Final train loss and test accuracy over k, a line an alpha."""
    figure = Figure(figsize=(11, 4.5))
    for axes, (part, measure, label) in zip(
        figure.subplots(1, 2), TRAININGS, strict=True
    ):
        for alpha, color in zip(cifar.ALPHAS, (ORANGE, BLACK, BLUE), strict=True):
            by_k = [
                _values(_trainings(records, k=k, alpha=alpha, **NOMINAL), part, measure)
                for k in cifar.KS
            ]
            _plot(axes, range(len(cifar.KS)), by_k, Curve(f"alpha {alpha:g}", color))
        sgd = _values(_trainings(records, k=None, **NOMINAL), part, measure)
        axes.axhline(np.mean(sgd), color=GREY, ls=":", label="without Lookahead")
        axes.set_xticks(range(len(cifar.KS)), map(str, cifar.KS))
        axes.set(xlabel="k", ylabel=label)
    legend(figure, axes)
    return figure


def longer_table(records: Sequence[Record]) -> Table:
    """Each at its best learning rate of the sweep, as long as there and longer."""
    table = [
        [
            "",
            "learning rate",
            "epochs",
            "train loss",
            "test accuracy, %",
            "each seed",
            "points above SGD, same seeds",
        ]
    ]
    for times_longer in (1, cifar.TIMES_LONGER):
        sgd: dict[int, float] = {}
        for k, alpha in cifar.LONGER:
            rate, group = _at_best_rate(records, times_longer, k, alpha)
            accuracy = _by_seed(group, *TEST_ACCURACY)
            sgd = sgd or accuracy
            table.append(
                [
                    SWEEP_CURVES[1, k, alpha].label,
                    f"{rate:g}",
                    str(times_longer * cifar.SMALL.epochs),
                    _losses(group),
                    _accuracies(group),
                    ", ".join(f"{100 * value:.2f}" for value in accuracy.values()),
                    _above(accuracy, sgd) if k else "",
                ]
            )
    return table


def draw_longer(records: Sequence[Record]) -> Figure:
    """Train loss and test accuracy over the epochs of the longer training."""
    figure = Figure(figsize=(11, 4.5))
    curves, runs = {}, {}
    for k, alpha in cifar.LONGER:
        curve = SWEEP_CURVES[1, k, alpha]
        curves[curve.label] = curve
        _, group = _at_best_rate(records, cifar.TIMES_LONGER, k, alpha)
        runs[curve.label] = _epochs(group)
    loss, accuracy = figure.subplots(1, 2)
    draw_measure(loss, "loss", "train loss", runs, curves)
    draw_measure(accuracy, "val_accuracy", "test accuracy", runs, curves)
    legend(figure, accuracy)
    return figure


def _at_best_rate(
    records: Sequence[Record], times_longer: int, k: int | None, alpha: float | None
) -> tuple[float, list[Record]]:
    """The best learning rate of the sweep, and the runs of some length with it."""
    rate = cifar.best_rate(records, cifar.SMALL, k, alpha)
    settings = {**NOMINAL, "learning_rate": rate, "k": k, "alpha": alpha}
    return rate, _trainings(records, times_longer, **settings)


def updates_table(records: Sequence[Record]) -> Table:
    """Mean changes by one fast update and by one sync, with confidence intervals."""
    table = [
        [
            "after epoch",
            "learning rate",
            "cycles",
            "statistics",
            "accuracy, points: a fast update",
            "a sync",
            "loss: a fast update",
            "a sync",
        ]
    ]
    for (epoch, rate), group in _windows(records).items():
        cycles = [cycle for record in group for cycle in record["results"]["cycles"]]
        for name, of_cycles in (
            ("moving", cycles),
            ("fresh", [cycle["with_fresh_statistics"] for cycle in cycles]),
        ):
            row = [str(epoch), f"{rate:.2g}", str(len(cycles)), name]
            for measure, factor, digits in (("accuracy", 100, 3), ("loss", 1, 5)):
                values = np.array([cycle[measure] for cycle in of_cycles])
                for change in changes(factor * values, cifar.K):
                    mean, margin = mean_interval(change.tolist())
                    row.append(f"{mean:+.{digits}f} ± {margin:.{digits}f}")
            table.append(row)
    return table


def changes(cycles: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return each cycle's mean change by a fast update, and its change by the sync.

    Args:
        cycles: what was measured at the start, in between, before and after the sync,
            of shape (cycles, at least 3).
        k: updates between two syncs.
    """
    start, before, after = cycles[:, 0], cycles[:, -2], cycles[:, -1]
    return (before - start) / k, after - before


def draw_updates(records: Sequence[Record]) -> Figure:
    """Test accuracy over the first sixty updates of a window, and over a cycle."""
    windows = _windows(records)
    figure = Figure(figsize=(11, 3.4 * len(windows)))
    rows = figure.subplots(len(windows), 2, squeeze=False, width_ratios=(2, 1))
    for (trace, cycle), (window, group) in zip(rows, windows.items(), strict=True):
        percents = [
            100 * np.array([each["accuracy"] for each in record["results"]["cycles"]])
            for record in group
        ]
        k = cifar.K
        for number, values in enumerate(percents[0][: 60 // k]):
            updates = number * k + np.arange(k + 1)
            trace.plot(updates, values[:-1], "o-", color=ORANGE, markersize=2.5)
            trace.plot(updates[[-1, -1]], values[-2:], color=BLUE)
            trace.plot(updates[-1], values[-1], "o", color=BLUE, markersize=5)
        epoch, rate = window
        x_label = f"updates after epoch {epoch}, learning rate {rate:.2g}"
        trace.set(xlabel=x_label, ylabel="test accuracy, %")
        all_cycles = np.concatenate(percents)
        since_sync = (all_cycles - all_cycles[:, :1]).T[1:]
        intervals = [mean_interval(values.tolist()) for values in since_sync]
        means, margins = np.array(intervals).T
        places = np.arange(1, k + 2)
        cycle.axhline(0, color=GREY, ls=":")
        for chosen, color, label in (
            (slice(k), ORANGE, "a fast update"),
            (slice(k, None), BLUE, "a sync"),
        ):
            cycle.errorbar(
                places[chosen],
                means[chosen],
                margins[chosen],
                color=color,
                label=label,
                fmt="o",
                capsize=3,
            )
        cycle.set_xticks(places, [*map(str, places[:-1]), "sync"])
        cycle.set(xlabel="fast updates since the last sync", ylabel="points since it")
    legend(figure, cycle)
    return figure


# Language model


def language_model_table(records: Sequence[Record]) -> Table:
    """Tuned learning rates, and test perplexities of the other seeds."""
    table = [
        [
            "optimizer",
            "tuned learning rate",
            "validation perplexity in the tuning",
            "test perplexity",
            "each seed",
            "on the fast weights",
        ]
    ]
    for optimizer, group in _group(records, "optimizer", LANGUAGE_CURVES).items():
        rate = language_model.tuned_rate(records, optimizer)
        seed = language_model.TUNING_SEED
        at_rate = [r for r in group if r["settings"]["learning_rate"] == rate]
        tuned = [r for r in at_rate if r["settings"]["seed"] == seed]
        compared = [r for r in at_rate if r["settings"]["seed"] != seed]
        tests = [record["results"]["test_perplexity"] for record in compared]
        fast = [
            record["results"]["test_perplexity_fast_weights"] for record in compared
        ]
        table.append(
            [
                LANGUAGE_CURVES[optimizer].label,
                f"{rate:g}",
                f"{tuned[0]['results']['validation_perplexity']:.1f}",
                _interval(tests, 1),
                ", ".join(f"{value:.1f}" for value in tests),
                f"{statistics.mean(fast):.1f}" if "lookahead" in optimizer else "",
            ]
        )
    return table


def draw_language_model(records: Sequence[Record]) -> Figure:
    """Validation perplexity over the learning rate, and over epochs when tuned."""
    figure = Figure(figsize=(11, 4.5))
    adam, sgd, epochs = figure.subplots(1, 3)
    seed = language_model.TUNING_SEED
    runs = {}
    for optimizer, group in _group(records, "optimizer", LANGUAGE_CURVES).items():
        curve = LANGUAGE_CURVES[optimizer]
        rate = language_model.tuned_rate(records, optimizer)
        tuning = {
            record["settings"]["learning_rate"]: record["results"]
            for record in group
            if record["settings"]["seed"] == seed
        }
        rates = sorted(tuning)
        axes = sgd if "sgd" in optimizer else adam
        perplexities = [tuning[each]["validation_perplexity"] for each in rates]
        finite = [[np.nan if p is None else p] for p in perplexities]
        _plot(axes, rates, finite, curve)
        axes.set_xscale("log")
        runs[optimizer] = _epochs(
            record
            for record in group
            if record["settings"]["learning_rate"] == rate
            and record["settings"]["seed"] != seed
        )
    for axes in (adam, sgd):
        axes.set(xlabel="learning rate", ylabel="validation perplexity")
    label = "validation perplexity, tuned"
    draw_measure(epochs, "validation_perplexity", label, runs, LANGUAGE_CURVES)
    legend(figure, epochs)
    return figure


# An outer optimizer

CORE_SECONDS = "seconds of one core, on a shared machine"


def outer_table(model: str, records: Sequence[Record]) -> Table:
    """Each optimizer at its best rate, from seeds that took no part in the sweep."""
    steps = "share of AdamW's steps to its final loss, each seed"
    table = [
        [
            "optimizer",
            "learning rate",
            "test loss",
            "each seed",
            "above AdamW, same seeds",
            steps,
            "core seconds for 100 steps",
        ]
    ]
    groups = {
        optimizer: compared
        for optimizer, group in _outer_groups(model, records).items()
        if (compared := [r for r in group if r["settings"]["seed"] != _tuning.SEED])
    }
    adamw = _by_seed(groups["adamw"], "test_loss")
    targets = _by_seed(groups["adamw"], "val_loss")
    for optimizer, group in groups.items():
        losses = _by_seed(group, "test_loss")
        above = _differences(losses, adamw) if optimizer != "adamw" else []
        factors = [
            _share_of_steps(record["results"]["epochs"], targets[seed])
            for record in group
            if (seed := record["settings"]["seed"]) in targets and above
        ]
        settings = group[0]["settings"]
        seconds = [e["seconds"] for epochs in _epochs(group) for e in epochs[1:]]
        table.append(
            [
                outer.CURVES[optimizer].label,
                f"{settings['learning_rate']:g}",
                _interval(list(losses.values()), 4),
                ", ".join(f"{value:.4f}" for value in losses.values()),
                _interval(above, 4, "+") if above else "",
                ", ".join(factors),
                f"{100 * statistics.median(seconds) / settings['steps_an_epoch']:.1f}",
            ]
        )
    return table


def _share_of_steps(epochs: Epochs, loss: float) -> str:
    """After what share of the steps a run has come down to a loss.

    Between two evaluations, its loss is taken to fall along a line.
    """
    before = None
    for epoch in epochs:
        if epoch["val_loss"] <= loss:
            step = epoch["epoch"]
            if before is not None:
                fall = before["val_loss"] - epoch["val_loss"]
                step -= (loss - epoch["val_loss"]) / fall
            return f"{step / len(epochs):.3f}"
        before = epoch
    return "not reached"


def outer_rates_table(model: str, records: Sequence[Record]) -> Table:
    """Validation loss at the end of each run of a model's sweep."""
    of_model = [r for r in records if r["settings"]["model"] == model]
    return _rates_table(of_model, outer.CURVES, "val_loss")


def draw_outer(records: Sequence[Record]) -> Figure:
    """Validation loss over the steps and over seconds of one core."""
    runs = {
        optimizer: [
            _in_steps(record)
            for record in group
            if record["settings"]["seed"] != _tuning.SEED
        ]
        for optimizer, group in _outer_groups("gpt", records).items()
    }
    runs = {optimizer: seeds for optimizer, seeds in runs.items() if seeds}
    figure = Figure(figsize=(11, 4.5))
    plots = figure.subplots(1, 2)
    for axes, over in zip(plots, ("steps", CORE_SECONDS), strict=True):
        draw_measure(axes, "val_loss", "validation loss", runs, outer.CURVES, over)
        axes.set_xscale("linear")
        axes.set_xlabel(over)
    legend(figure, plots[0])
    return figure


def _in_steps(record: Record) -> Epochs:
    """A run's losses with their steps, and seconds of a core without compiling."""
    epochs = record["results"]["epochs"]
    seconds = statistics.median(epoch["seconds"] for epoch in epochs[1:])
    return [
        {
            "val_loss": epoch["val_loss"],
            "steps": number * record["settings"]["steps_an_epoch"],
            CORE_SECONDS: number * seconds,
        }
        for number, epoch in enumerate(epochs, 1)
    ]


def _outer_groups(model: str, records: Sequence[Record]) -> dict[str, list[Record]]:
    of_model = [record for record in records if record["settings"]["model"] == model]
    return _at_best_rates(of_model, outer.CURVES, lambda results: results["val_loss"])


# A GAN


def gan_table(records: Sequence[Record]) -> Table:
    """The distance at the end of training and the bells found, at each rate."""
    rates = sorted({record["settings"]["learning_rate"] for record in records})
    table = [["optimizer of both players", *(f"{rate:g}" for rate in rates)]]
    for optimizer, group in _group(records, "optimizer", gan.CURVES).items():
        by_rate = _group(group, "learning_rate", rates)
        cells = [_distance_and_bells(by_rate.get(rate, [])) for rate in rates]
        table.append([gan.CURVES[optimizer].label, *cells])
    return table


def _distance_and_bells(group: Sequence[Record]) -> str:
    if not group:
        return ""
    distances = [record["results"]["distance"] for record in group]
    if None in distances:
        return "diverged"
    bells = statistics.mean(record["results"]["bells"] for record in group)
    return f"{_interval(distances, 3)}, {bells:.1f} bells"


def draw_gan(records: Sequence[Record]) -> Figure:
    """The distance over the steps, and points from the first seed's generators."""
    groups = _gan_groups(records)
    figure = Figure(figsize=(11, 4))
    distance, *planes = figure.subplots(1, 1 + len(groups))
    for optimizer, group in groups.items():
        curve = gan.CURVES[optimizer]
        distances = [[e["distance"] for e in epochs] for epochs in _epochs(group)]
        seeds = np.array(distances, dtype="float64")
        steps = gan.STEPS_AN_EPOCH * np.arange(1, 1 + seeds.shape[1])
        distance.semilogy(steps, np.transpose(seeds), color=curve.color, lw=0.5)
        mean = np.mean(seeds, axis=0)
        distance.semilogy(steps, mean, color=curve.color, label=curve.label, lw=2)
    distance.set(xlabel="steps", ylabel="energy distance")
    for plane, (optimizer, group) in zip(planes, groups.items(), strict=True):
        points = np.array(group[0]["results"]["points"])
        plane.plot(*gan.centers().T, "o", color=GREY, markersize=12, fillstyle="none")
        plane.plot(*points.T, ".", color=gan.CURVES[optimizer].color, markersize=2)
        plane.set(xlim=(-3, 3), ylim=(-3, 3), aspect="equal")
    legend(figure, distance)
    return figure


def _gan_groups(records: Sequence[Record]) -> dict[str, list[Record]]:
    """The runs of each optimizer at the rate of the lowest mean distance."""

    def mean_distance(group: Sequence[Record]) -> float:
        distances = [record["results"]["distance"] for record in group]
        return math.inf if None in distances else statistics.mean(distances)

    rates = sorted({record["settings"]["learning_rate"] for record in records})
    return {
        optimizer: min(
            _group(group, "learning_rate", rates).values(), key=mean_distance
        )
        for optimizer, group in _group(records, "optimizer", gan.CURVES).items()
    }


# A large table


def large_table_table(records: Sequence[Record]) -> Table:
    """Accuracy and time of training on each size of table, at the best rate of each."""
    table = [
        [
            "optimizer",
            "rows",
            "learning rate",
            "best validation accuracy, %",
            "each seed",
            "after each epoch, %",
            "seconds of training an epoch, median without the first",
        ]
    ]
    for rows in sorted({record["settings"]["rows"] for record in records}):
        groups = _tuned(records, rows)
        timed = _of_common_seeds(groups)  # on the same machine
        for optimizer, group in groups.items():
            best = _by_seed(group, "best_val_accuracy").values()
            runs = _epochs(group)
            accuracies = [
                statistics.mean(epoch["val_accuracy"] for epoch in same)
                for same in zip(*runs, strict=True)
            ]
            seconds = [
                epoch["seconds"]
                for epochs in _epochs(timed[optimizer])
                for epoch in epochs[1:]
            ]
            table.append(
                [
                    TABLE_CURVES[optimizer].label,
                    f"2^{math.log2(rows):g}",
                    f"{group[0]['settings']['learning_rate']:g}",
                    _percent(best),
                    ", ".join(f"{100 * accuracy:.2f}" for accuracy in best),
                    ", ".join(f"{100 * accuracy:.2f}" for accuracy in accuracies),
                    f"{statistics.median(seconds):.3g}",
                ]
            )
    return table


def large_table_rates_table(records: Sequence[Record]) -> Table:
    """Best validation accuracy at every learning rate, by what else was varied."""
    rates = sorted({record["settings"]["learning_rate"] for record in records})
    shown = [f"{rate:g}" for rate in rates]
    table = [["optimizer", "rows", "batch", "epsilon", *shown]]
    for varied in sorted({_varied(record) for record in records}):
        rows, batch_size, epsilon = varied
        alike = [record for record in records if _varied(record) == varied]
        for optimizer, group in _group(alike, "optimizer", large_table.USUAL).items():
            by_rate = _group(group, "learning_rate", rates)
            best = [by_rate.get(rate, []) for rate in rates]
            table.append(
                [
                    TABLE_CURVES[optimizer].label,
                    f"2^{math.log2(rows):g}",
                    str(batch_size),
                    f"{epsilon:g}",
                    *map(_best, best),
                ]
            )
    return table


def draw_large_table(records: Sequence[Record]) -> Figure:
    """Accuracy over the seconds of training, on the table of the usual size."""
    groups = _of_common_seeds(_tuned(records, large_table.ROWS))
    runs = {optimizer: _epochs(group) for optimizer, group in groups.items()}
    figure = Figure(figsize=(11, 5))
    axes = figure.subplots()
    draw_measure(
        axes,
        "val_accuracy",
        "validation accuracy",
        runs,
        TABLE_CURVES,
        "trained_seconds",
    )
    legend(figure, axes)
    return figure


def _tuned(
    records: Sequence[Record], rows: int, order: Iterable[str] = large_table.USUAL
) -> dict[str, list[Record]]:
    """The runs on a table of so many rows, of each optimizer at its best rate."""
    wanted = rows, large_table.BATCH_SIZE, large_table.EPSILON
    usual = [record for record in records if _varied(record) == wanted]
    return _at_best_rates(usual, order, _error)


def _of_common_seeds(groups: dict[str, list[Record]]) -> dict[str, list[Record]]:
    seeds = [{r["settings"]["seed"] for r in group} for group in groups.values()]
    common = set.intersection(*seeds)
    return {
        optimizer: [r for r in group if r["settings"]["seed"] in common]
        for optimizer, group in groups.items()
    }


def _error(results: Any) -> float:
    return -results["best_val_accuracy"]


def _varied(record: Record) -> tuple[int, int, float]:
    """Rows, batch size and epsilon, of which a run names those that are not usual."""
    settings = record["settings"]
    return (
        settings["rows"],
        settings.get("batch_size", large_table.BATCH_SIZE),
        settings.get("epsilon", large_table.EPSILON),
    )


# Recommendation


def ncf_table(records: Sequence[Record]) -> Table:
    """Hit rate and gain on the test items, each optimizer at its best rate."""
    table = [
        [
            "optimizer",
            "batch",
            "crosses",
            "learning rate",
            "seeds",
            "test HR@10, %",
            "points above Adam, same seeds",
            "test NDCG@10, %",
            "NDCG points above Adam",
            "best epoch of each seed",
        ]
    ]
    for (batch_size, crosses), groups in _ncf_groups(records).items():
        for optimizer, group in groups.items():
            adam = groups.get("adam", [])
            row = [
                ncf.CURVES[optimizer].label,
                str(batch_size),
                f"2^{math.log2(crosses):g}" if crosses else "",
                f"{group[0]['settings']['learning_rate']:g}",
                str(len(group)),
            ]
            for measure in ("test_hr10", "test_ndcg10"):
                values, of_adam = _by_seed(group, measure), _by_seed(adam, measure)
                above = "" if optimizer == "adam" else _above(values, of_adam)
                row += [_percent(values.values()), above]
            row.append(", ".join(map(str, _by_seed(group, "best_epoch").values())))
            table.append(row)
    return table


def ncf_rates_table(records: Sequence[Record]) -> Table:
    """NDCG on the validation items at every learning rate of the sweep."""
    sweep = [r for r in records if r["settings"]["seed"] == _tuning.SEED]
    rates = sorted({record["settings"]["learning_rate"] for record in sweep})
    table = [["optimizer", "batch", "crosses", *(f"{rate:g}" for rate in rates)]]
    for kind in sorted({_ncf_kind(record) for record in sweep}):
        batch_size, crosses = kind
        alike = [record for record in sweep if _ncf_kind(record) == kind]
        for optimizer, group in _group(
            alike, "optimizer", _of_one_decay(ncf.CURVES)
        ).items():
            gains = {
                record["settings"]["learning_rate"]: record["results"]["val_ndcg10"]
                for record in group
            }
            table.append(
                [
                    ncf.CURVES[optimizer].label,
                    str(batch_size),
                    f"2^{math.log2(crosses):g}" if crosses else "",
                    *(f"{100 * gains[r]:.2f}" if r in gains else "" for r in rates),
                ]
            )
    return table


def ncf_same_rate_table(records: Sequence[Record]) -> Table:
    """Hit rate on the test items over the epochs, at the authors' learning rate."""
    usual = [
        record
        for record in records
        if _ncf_kind(record) == (ncf.BATCH_SIZE, 0)
        and record["settings"]["learning_rate"] == ncf.AUTHORS_RATE
    ]
    epochs = (5, 10, ncf.EPOCHS)
    table = [["optimizer", "seeds"]]
    for number in epochs:
        table[0] += [f"HR@10 after {number} epochs, %", "points above Adam"]
    groups = _group(usual, "optimizer", ncf.CURVES)
    for optimizer, group in groups.items():
        row = [ncf.CURVES[optimizer].label, str(len(group))]
        for number in epochs:
            values, of_adam = (
                _by_seed(each, "epochs", number - 1, "test_hr10")
                for each in (group, groups["adam"])
            )
            row.append(_percent(values.values()))
            row.append("" if optimizer == "adam" else _above(values, of_adam))
        table.append(row)
    return table


def draw_ncf(records: Sequence[Record]) -> Figure:
    """Hit rate on the test items over the epochs, each at its best rate."""
    kinds = _ncf_groups(records)
    figure = Figure(figsize=(11, 4.5))
    plots = figure.subplots(1, max(1, len(kinds)), squeeze=False)[0]
    for axes, ((batch_size, crosses), groups) in zip(plots, kinds.items(), strict=True):
        runs = {optimizer: _epochs(group) for optimizer, group in groups.items()}
        draw_measure(axes, "test_hr10", "test HR@10", runs, ncf.CURVES)
        axes.set_title(f"batch {batch_size}" + (", with crosses" if crosses else ""))
    legend(figure, plots[0])
    return figure


def _ncf_kind(record: Record) -> tuple[int, int]:
    return record["settings"]["batch_size"], record["settings"]["crosses"]


def _ncf_groups(
    records: Sequence[Record],
) -> dict[tuple[int, int], dict[str, list[Record]]]:
    """The runs of each kind, of each optimizer at its best rate."""
    return {
        kind: _at_best_rates(
            [record for record in records if _ncf_kind(record) == kind],
            ncf.CURVES,
            lambda results: -results["val_ndcg10"],
        )
        for kind in sorted({_ncf_kind(record) for record in records})
    }


# Word vectors


def word_vectors_table(records: Sequence[Record]) -> Table:
    """Loss on the test pairs, each optimizer at its best rate."""
    table = [["optimizer", "steps", "learning rate", "seeds"]]
    for of in ("", ", pairs with a rare word"):
        table[0] += [f"test loss{of}", f"above Adam's, same seeds{of}"]
    table[0].append("seconds of 100 steps, median")
    for batches_an_epoch, of_length in _by_length(records).items():
        groups = _word_vector_groups(of_length)
        for optimizer, group in groups.items():
            settings = group[0]["settings"]
            row = [
                word_vectors.CURVES[optimizer].label,
                str(settings["epochs"] * batches_an_epoch),
                f"{settings['learning_rate']:g}",
                str(len(group)),
            ]
            for measure in ("test_loss", "test_loss_rare"):
                values = _by_seed(group, measure)
                adam = _by_seed(groups.get("adam", []), measure)
                above = _differences(values, adam)
                is_other = optimizer != "adam" and above
                row.append(_interval(list(values.values()), 4))
                row.append(_interval(above, 4, "+") if is_other else "")
            seconds = [e["seconds"] for epochs in _epochs(group) for e in epochs[1:]]
            a_hundred = 100 * statistics.median(seconds) / batches_an_epoch
            table.append([*row, f"{a_hundred:.1f}"])
    return table


def word_vectors_rates_table(records: Sequence[Record]) -> Table:
    """Loss on the validation pairs at every learning rate of the sweep."""
    sweep = [r for r in records if r["settings"]["seed"] == _tuning.SEED]
    rates = sorted({record["settings"]["learning_rate"] for record in sweep})
    table = [["optimizer", "steps", *(f"{rate:g}" for rate in rates)]]
    for batches_an_epoch, of_length in _by_length(sweep).items():
        by_optimizer = _group(
            of_length, "optimizer", _of_one_decay(word_vectors.CURVES)
        )
        for optimizer, group in by_optimizer.items():
            losses = {
                record["settings"]["learning_rate"]: record["results"]["val_loss"]
                for record in group
            }
            steps = group[0]["settings"]["epochs"] * batches_an_epoch
            row = [word_vectors.CURVES[optimizer].label, str(steps)]
            for rate in rates:
                loss = losses.get(rate, "")
                row.append("diverged" if loss is None else loss and f"{loss:.4f}")
            table.append(row)
    return table


def neighbours_table(records: Sequence[Record]) -> Table:
    """The nearest neighbours of some words, after the longest training there is.

    From the first seed, at the best rate.
    """
    groups = _word_vector_groups(_by_length(records).popitem()[1])
    table = [["word", *(word_vectors.CURVES[each].label for each in groups)]]
    first = [
        min(group, key=lambda record: record["settings"]["seed"])
        for group in groups.values()
    ]
    for word in first[0]["results"]["neighbours"] if first else ():
        near = [", ".join(record["results"]["neighbours"][word]) for record in first]
        table.append([word, *near])
    return table


def draw_word_vectors(records: Sequence[Record]) -> Figure:
    """Loss on the validation pairs over the epochs, of all pairs and of rare words."""
    usual = _by_length(records)[word_vectors.BATCHES_AN_EPOCH]
    groups = _word_vector_groups(usual)
    runs = {optimizer: _epochs(group) for optimizer, group in groups.items()}
    figure = Figure(figsize=(11, 4.5))
    plots = figure.subplots(1, 2)
    for axes, measure, label in zip(
        plots,
        ("val_loss", "val_loss_rare"),
        ("validation loss", "validation loss, pairs with a rare word"),
        strict=True,
    ):
        draw_measure(axes, measure, label, runs, word_vectors.CURVES)
    legend(figure, plots[0])
    return figure


def _word_vector_groups(records: Sequence[Record]) -> dict[str, list[Record]]:
    return _at_best_rates(
        records, word_vectors.CURVES, lambda results: results["val_loss"]
    )


def _by_length(records: Sequence[Record]) -> dict[int, list[Record]]:
    """Group runs by how long they trained, the shortest first."""
    groups: dict[int, list[Record]] = defaultdict(list)
    for record in records:
        groups[record["settings"]["batches_an_epoch"]].append(record)
    return dict(sorted(groups.items()))


def _at_best_rates(
    records: Sequence[Record],
    order: Iterable[str],
    loss_of: Callable[[Any], float | None],
) -> dict[str, list[Record]]:
    """The runs of each optimizer at its best rate, and weight decay, of the sweep."""
    best = {}
    for optimizer, group in _group(records, "optimizer", order).items():
        sweep = [
            (loss, _rates(record))
            for record in group
            if record["settings"]["seed"] == _tuning.SEED
            and (loss := loss_of(record["results"])) is not None
        ]
        _, rates = min(sweep)
        best[optimizer] = [record for record in group if _rates(record) == rates]
    return best


def _of_one_decay(names: Iterable[str]) -> list[str]:
    """Leave out the optimizers that were trained with several weight decays."""
    return [name for name in names if name not in _candidates.DECAYING]


def _rates(record: Record) -> tuple[float, float]:
    """The learning rate and the weight decay; 0 where a run has none of its own."""
    settings = record["settings"]
    return settings.get("learning_rate", 0), settings.get("weight_decay", 0)


# Moments, on all tasks


OVERFITTING = "validation of Adam, last epoch below best"
# What each task is validated by after every epoch.
VALIDATED = {
    "imdb": "val_accuracy",
    "large_table": "val_accuracy",
    "ncf": "val_ndcg10",
    "word_vectors": "val_loss",
}


def moments_table(records: Sequence[Record]) -> Table:
    """The two kinds of moments and Adam on every task, each at its best rate."""
    table = [
        [
            "task",
            "steps for each sample of a row, median row",
            f"{OVERFITTING}, %",
            "seeds",
            "decay above Adam",
            "freeze above Adam",
            "freeze above decay",
            "time, Adam / decay",
            "time, Adam / freeze",
        ]
    ]
    optimizers = "adam", "lazy-decay", "lazy-freeze"
    for label, task in _tasks(records).items():
        adam, decay, freeze = (task.points[optimizer] for optimizer in optimizers)
        times, *others = (task.seconds[optimizer] for optimizer in optimizers)
        faster = (
            statistics.median(
                times[seed] / other[seed] for seed in times if seed in other
            )
            for other in others
        )
        pairs = [_differences(*p) for p in ((decay, adam), (freeze, adam))]
        pairs.append(_differences(freeze, decay))
        table.append(
            [
                label,
                f"{task.gap:.0f}",
                f"{task.overfitting:.1f}",
                str(len(pairs[-1])),
                *(_interval(each, 2, "+") for each in pairs),
                *(f"{factor:.1f}" for factor in faster),
            ]
        )
    return table


def candidates_table(records: Sequence[Record]) -> Table:
    """How far what other systems do is above "freeze", on each task.

    On NCF, with the smaller batches and without crosses. A task is left out if no
    candidate was trained on it.
    """
    pairs = [
        (each, "lazy-adamw" if each == "lazy-missed-decay" else "lazy-freeze")
        for each in _candidates.CURVES
        if each != "lazy-adamw"
    ]
    tasks = {
        label: task.points
        for label, task in _tasks(records).items()
        if any(candidate in task.points for candidate, _ in pairs)
    }
    labels = {**large_table.CURVES, **_candidates.CURVES}
    table = [["candidate", "compared with", *tasks]]
    for candidate, other in pairs:
        cells = [labels[candidate].label, labels[other].label]
        for groups in tasks.values():
            above = _differences(groups.get(candidate, {}), groups.get(other, {}))
            seeds = f", {len(above)} seed{'s' * (len(above) > 1)}"
            cells.append(_interval(above, 2, "+") + seeds if above else "not trained")
        table.append(cells)
    return table


def draw_moments(records: Sequence[Record]) -> Figure:
    """How far "freeze" is above "decay", over what might predict it."""
    figure = Figure(figsize=(11, 4.5))
    gaps, overfitting = figure.subplots(1, 2, sharey=True)
    for number, (label, task) in enumerate(_tasks(records).items()):
        above = _differences(task.points["lazy-freeze"], task.points["lazy-decay"])
        mean, margin = mean_interval(above)
        up = 4 if number else -12  # Two points are close to each other.
        for axes, x in ((gaps, task.gap), (overfitting, task.overfitting)):
            axes.errorbar(x, mean, margin, color=BLACK, fmt="o", capsize=3)
            offset = {"xytext": (6, up), "textcoords": "offset points", "fontsize": 8}
            axes.annotate(label, (x, mean), **offset)
    for axes in (gaps, overfitting):
        axes.axhline(0, color=GREY, ls=":")
    gaps.set_xscale("log")
    gaps.set(
        xlim=(0.7, 3000),
        xlabel="steps for each sample of a row, median row",
        ylabel='"freeze" above "decay", points',
    )
    overfitting.set(xlabel=f"{OVERFITTING}, %", xlim=(-0.3, 7.5))
    return figure


class _Task(NamedTuple):
    """What the optimizers did on a task, each at its best rate.

    Attributes:
        gap: how seldom rows are sampled.
        overfitting: by how many percent Adam's validation measure is worse after the
            last epoch than after its best one, mean over seeds.
        points: each optimizer's measure by seed, in points of accuracy or hit rate; of
            a loss, in hundredths of its logarithm, which differ by about as much as the
            losses do in percent.
        seconds: an epoch's by seed, the median without the first.
    """

    gap: float
    overfitting: float
    points: dict[str, dict[int, float]]
    seconds: dict[str, dict[int, float]]


def _tasks(records: Sequence[Record]) -> dict[str, _Task]:
    """The tasks on which both kinds of moments and Adam were trained, by label."""
    of: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        of[record["experiment"]].append(record)
    gaps = {r["settings"]["task"]: r["results"]["median_row"] for r in of["gaps"]}
    accuracy, hit_rate = "best_val_accuracy", "test_hr10"
    tasks = [
        (
            "LSTM on IMDB",
            "imdb",
            _at_best_rates(of["imdb"], imdb.CURVES, _error),
            accuracy,
        ),
        (
            "fastText on IMDB",
            "large_table",
            _tuned(of["large_table"], large_table.ROWS, TABLE_CURVES),
            accuracy,
        ),
    ]
    for (batch_size, crosses), groups in _ncf_groups(of["ncf"]).items():
        name = f"ncf-{batch_size}" + ("-crosses" if crosses else "")
        label = f"NCF, batch {batch_size}" + (", crosses" if crosses else "")
        tasks.append((label, name, groups, hit_rate))
    usual = _by_length(of["word_vectors"])[word_vectors.BATCHES_AN_EPOCH]
    groups = _word_vector_groups(usual)
    tasks.append(("word vectors", "word_vectors", groups, "test_loss"))

    def points(measure: str, value: float) -> float:
        return -100 * math.log(value) if measure == "test_loss" else 100 * value

    def by_seed(measure: str, group: list[Record]) -> dict[int, float]:
        values = _by_seed(group, measure).items()
        return {seed: points(measure, value) for seed, value in values}

    return {
        label: _Task(
            gaps[name],
            statistics.mean(map(_overfitting, groups["adam"])),
            {each: by_seed(measure, group) for each, group in groups.items()},
            {each: _epoch_seconds(group) for each, group in groups.items()},
        )
        for label, name, groups, measure in tasks
        if {"adam", "lazy-decay", "lazy-freeze"} <= groups.keys()
    }


def _overfitting(record: Record) -> float:
    measure = VALIDATED[record["experiment"]]
    values = [epoch[measure] for epoch in record["results"]["epochs"]]
    best = (min if measure == "val_loss" else max)(values)
    return 100 * abs(values[-1] - best) / best


def _epoch_seconds(records: Iterable[Record]) -> dict[int, float]:
    return {
        record["settings"]["seed"]: statistics.median(
            epoch["seconds"] for epoch in record["results"]["epochs"][1:]
        )
        for record in records
    }


ALL = "*"  # the folders of all experiments

# The pages' tables and the pictures, and the folders of the runs they are made from.
TABLES: dict[str, tuple[str, Callable[[Sequence[Record]], Table]]] = {
    "imdb": ("imdb", imdb_table),
    "imdb-epochs": ("imdb", imdb_epochs_table),
    "imdb-short": ("imdb", imdb_short_table),
    "cifar-sweep": ("cifar", sweep_table),
    "cifar-sweep-differences": ("cifar", sweep_differences_table),
    "cifar-k-alpha": ("cifar", k_alpha_table),
    "cifar-longer": ("cifar", longer_table),
    "cifar-updates": ("cifar", updates_table),
    "language-model": ("language_model", language_model_table),
    "outer": ("outer", partial(outer_table, "gpt")),
    "outer-6m": ("outer", partial(outer_table, "gpt-6m")),
    "outer-rates": ("outer", partial(outer_rates_table, "gpt")),
    "outer-rates-6m": ("outer", partial(outer_rates_table, "gpt-6m")),
    "outer-rates-lstm": ("outer", partial(outer_rates_table, "lstm")),
    "gan": ("gan", gan_table),
    "large-table": ("large_table", large_table_table),
    "large-table-rates": ("large_table", large_table_rates_table),
    "ncf": ("ncf", ncf_table),
    "ncf-rates": ("ncf", ncf_rates_table),
    "ncf-same-rate": ("ncf", ncf_same_rate_table),
    "word-vectors": ("word_vectors", word_vectors_table),
    "word-vectors-rates": ("word_vectors", word_vectors_rates_table),
    "word-vectors-neighbours": ("word_vectors", neighbours_table),
    "moments": (ALL, moments_table),
    "candidates": (ALL, candidates_table),
}
PICTURES: dict[str, tuple[str, Callable[[Sequence[Record]], Figure]]] = {
    "imdb": ("imdb", draw_imdb),
    "cifar-sweep": ("cifar", draw_sweep),
    "cifar-k-alpha": ("cifar", draw_k_alpha),
    "cifar-longer": ("cifar", draw_longer),
    "cifar-updates": ("cifar", draw_updates),
    "language-model": ("language_model", draw_language_model),
    "outer": ("outer", draw_outer),
    "gan": ("gan", draw_gan),
    "large-table": ("large_table", draw_large_table),
    "ncf": ("ncf", draw_ncf),
    "word-vectors": ("word_vectors", draw_word_vectors),
    "moments": (ALL, draw_moments),
}


def pages() -> list[Path]:
    """List the pages that may have marks in them."""
    root = DOCS.parent
    examples = sorted((root / "examples").rglob("README.md"))
    return [root / "README.md", *examples, *sorted(DOCS.rglob("*.md"))]


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw and write, or check; return the exit status."""
    parser = argparse.ArgumentParser("report", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args(arguments)
    tables = {
        name: partial(_table, folder, make) for name, (folder, make) in TABLES.items()
    }
    differing = _pages.write(pages(), tables, options.check)
    if not options.check:
        IMAGES.mkdir(exist_ok=True)
        for name, (folder, draw) in PICTURES.items():
            draw(_records(folder)).savefig(IMAGES / f"{name}.png", dpi=110)
    return differing


def _table(folder: str, make: Callable[[Sequence[Record]], Table]) -> Table:
    return make(_records(folder))


def _records(folder: str) -> list[Record]:
    return [record for each in sorted(RESULTS.glob(folder)) for record in read(each)]


def _group(
    records: Iterable[Record], setting: str, order: Iterable[str]
) -> dict[str, list[Record]]:
    """Group records by a setting, in the given order; leave out empty groups."""
    records = list(records)
    groups = {
        value: [record for record in records if record["settings"][setting] == value]
        for value in order
    }
    return {value: group for value, group in groups.items() if group}


def _trainings(
    records: Iterable[Record], times_longer: int = 1, **settings: Any
) -> list[Record]:
    """Select the runs of whole trainings of such a length, with such settings."""
    epochs = times_longer * cifar.SMALL.epochs
    return [
        record
        for record in records
        if "test" in record["results"]
        and record["settings"]["scale"]["epochs"] == epochs
        and all(record["settings"][name] == value for name, value in settings.items())
    ]


def _rates_table(
    records: Iterable[Record], curves: Mapping[str, Curve], measure: str
) -> Table:
    """What each run of a sweep ended with, by optimizer and learning rate."""
    sweep = [r for r in records if r["settings"]["seed"] == _tuning.SEED]
    rates = sorted({record["settings"]["learning_rate"] for record in sweep})
    table = [["optimizer", *(f"{rate:g}" for rate in rates)]]
    for optimizer, group in _group(sweep, "optimizer", curves).items():
        found = {
            record["settings"]["learning_rate"]: record["results"][measure]
            for record in group
        }
        cells = [_number(found[rate]) if rate in found else "" for rate in rates]
        table.append([curves[optimizer].label, *cells])
    return table


def _number(value: float | None) -> str:
    return "diverged" if value is None else f"{value:.4f}"


def _windows(records: Iterable[Record]) -> dict[tuple[int, float], list[Record]]:
    groups: dict[tuple[int, float], list[Record]] = {}
    for record in records:
        if "cycles" in record["results"]:
            start = record["settings"]["start_epoch"]
            rate = record["results"]["learning_rate"]
            groups.setdefault((start, rate), []).append(record)
    return dict(sorted(groups.items()))


def _epochs(records: Iterable[Record]) -> list[Epochs]:
    return [record["results"]["epochs"] for record in records]


def _by_seed(records: Iterable[Record], *place: str | int) -> dict[int, float]:
    """What stands in some place of the results, by the seed."""
    return {
        record["settings"]["seed"]: reduce(getitem, place, record["results"])
        for record in records
    }


def _differences(
    values: Mapping[int, float], others: Mapping[int, float]
) -> list[float]:
    """How far runs are above others of the same seeds."""
    return [values[seed] - others[seed] for seed in values if seed in others]


def _above(values: Mapping[int, float], others: Mapping[int, float]) -> str:
    """The mean difference from the same seeds, in points, with its interval."""
    differences = _differences(values, others)
    return _percent(differences, "+") if differences else ""


def _best(records: Iterable[Record]) -> str:
    best = _by_seed(records, "best_val_accuracy").values()
    return _percent(best) if best else ""


def _percent(values: Collection[float], sign: str = "") -> str:
    """The mean of parts of 1, in percent, with its 95 % interval."""
    return _interval([100 * value for value in values], 2, sign)


def _interval(values: Sequence[float], digits: int, sign: str = "") -> str:
    """The mean, with its 95 % interval where there is more than one value."""
    mean, margin = mean_interval(values)
    shown = f"{mean:{sign}.{digits}f}"
    return shown + (f" ± {margin:.{digits}f}" if len(values) > 1 else "")


def _losses(records: Iterable[Record]) -> str:
    """The mean final train loss of several seeds."""
    values = _values(records, "train", "loss")
    if np.isnan(values).any():
        return "diverged"
    return f"{statistics.mean(values):.3f}" if values else ""


def _accuracies(records: Iterable[Record]) -> str:
    """The mean test accuracy of several seeds, with its interval."""
    values = _values(records, *TEST_ACCURACY)
    if np.isnan(values).any():
        return "diverged"
    return _percent(values) if values else ""


def _values(records: Iterable[Record], part: str, measure: str) -> list[float]:
    """List what every seed measured, NaN where it diverged."""
    values = [record["results"][part][measure] for record in records]
    return [np.nan if value is None else value for value in values]


def _plot(
    axes: Axes, x: Sequence[float], seeds: Sequence[Sequence[float]], curve: Curve
) -> None:
    """Plot a line through the means over seeds, a dot for every seed, their range."""
    axes.plot(
        x,
        [float(np.mean(values)) if values else np.nan for values in seeds],
        curve.line,
        color=curve.color,
        label=curve.label,
        linewidth=2,
    )
    for position, values in zip(x, seeds, strict=True):
        axes.plot(
            [position] * len(values), values, "o-", color=curve.color, markersize=3
        )


if __name__ == "__main__":
    sys.exit(main())
