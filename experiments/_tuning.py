"""Experiments in two parts: a sweep of learning rates, then seeds at the best rate."""

import argparse
from collections.abc import Callable, Sequence
from typing import Any

from examples.common.options import add_learning_rates
from examples.common.sources import DataError
from experiments._runs import Record, Settings, read

SEED = 0  # of the sweep
PARTS = ("tune", "compare")

Run = Callable[[str, float, int], tuple[str, Settings]]  # optimizer, rate, seed


def add_parts(parser: argparse.ArgumentParser, rates: Sequence[float]) -> None:
    """Add what chooses the part, and the rates of the sweep."""
    text = (
        "tune: every rate, from seed 0; compare: every seed, at the best of the rates"
    )
    parser.add_argument("part", choices=PARTS, help=text)
    add_learning_rates(parser, rates)


def runs_of_part(
    parser: argparse.ArgumentParser, options: Any, run: Run, loss_of: Callable
) -> dict[str, Settings]:
    """List the runs of the part that was asked for.

    Args:
        parser: says that the sweep has not been made, and exits.
        options: those of `add_parts` and of all experiments.
        run: names a run and gives its settings.
        loss_of: what a run's results are judged by; the lowest is the best, and `None`
            is a run that diverged.
    """
    sweep = {
        optimizer: dict(run(optimizer, rate, SEED) for rate in options.learning_rates)
        for optimizer in options.optimizers
    }
    if options.part == "tune":
        return {name: each for runs in sweep.values() for name, each in runs.items()}
    records = {record["name"]: record for record in read(options.output)}
    rates = {}
    try:
        for optimizer, runs in sweep.items():
            rates[optimizer] = _best_rate(runs, records, loss_of)
    except DataError as error:
        parser.error(str(error))
    return dict(
        run(optimizer, rates[optimizer], seed)
        for seed in options.seeds
        for optimizer in options.optimizers
    )


def _best_rate(
    runs: dict[str, Settings], records: dict[str, Record], loss_of: Callable
) -> float:
    missing = [
        name
        for name, settings in runs.items()
        if name not in records or records[name]["settings"] != settings
    ]
    if missing:
        raise DataError(f"not tuned yet: {', '.join(missing)}; run `tune` first")
    losses = {
        settings["learning_rate"]: loss_of(records[name]["results"])
        for name, settings in runs.items()
    }
    finite = {rate: loss for rate, loss in losses.items() if loss is not None}
    if not finite:
        raise DataError(f"diverged with every learning rate: {', '.join(runs)}")
    return min(finite, key=finite.__getitem__)
