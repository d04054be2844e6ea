"""Runs of an experiment: each in a process of its own, all recorded in one file."""

import argparse
import dataclasses
import json
import math
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import keras
import numpy as np
from filelock import FileLock

from examples.common.options import add_samples, add_trainings, positive_int, refuse
from examples.common.record import environment, write_json
from examples.common.sources import Data, DataError

RESULTS = Path(__file__).parent / "results"
FILE = "runs.json"  # in the folder of an experiment's runs

Settings = dict[str, Any]  # what tells a run from the experiment's others
Record = dict[str, Any]  # what is written of a run
Measure = Callable[[Data, Settings, str], dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How much is trained; each experiment adds the size of its model.

    Attributes:
        train_samples, test_samples: at most so many, and all without.
    """

    epochs: int
    batch_size: int
    train_samples: int | None = None
    test_samples: int | None = None

    def updates_per_epoch(self, data: Data) -> int:
        """Count an epoch's batches, the last of which may be smaller."""
        return math.ceil(len(data.x_train) / self.batch_size)


AnyScale = TypeVar("AnyScale", bound=Scale)


def add_options(parser: argparse.ArgumentParser, seeds: list[int], data: str) -> None:
    """Add the options that every experiment on data has."""
    parser.add_argument(
        "--data", required=True, type=data_source, metavar="SOURCE", help=data
    )
    add_samples(parser)
    add_run_options(parser, seeds)


def add_run_options(parser: argparse.ArgumentParser, seeds: list[int]) -> None:
    """Add the options that every experiment has."""
    parser.add_argument(
        "--jobs",
        type=positive_int,
        default=1,
        metavar="N",
        help="runs at a time, which share the cores; on a GPU, one "
        "(default: %(default)s)",
    )
    output = f"where {FILE} goes; runs that are in it already are left out"
    add_trainings(parser, seeds, output)


def data_source(text: str) -> str:
    """Parse what `--data` names: real data only."""
    if text != "keras" and not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"neither keras nor a file: {text}")
    return text


def add_full_option(parser: argparse.ArgumentParser) -> None:
    """Add the option of the experiments that a CPU can only make smaller."""
    parser.add_argument(
        "--full",
        action="store_true",
        help="a scale like that of the publication, for a machine with a GPU",
    )


def changed(scale: AnyScale, **numbers: int | None) -> AnyScale:
    """Change those numbers of a scale that are given."""
    given = {name: number for name, number in numbers.items() if number}
    return dataclasses.replace(scale, **given)


def run_all(
    experiment: str,
    runs: Mapping[str, Settings],
    load_data: Callable[[], Data],
    measure: Measure,
    output: Path,
    jobs: int = 1,
) -> int:
    """Make those of the runs that a folder lacks; return the exit status.

    Args:
        experiment: the experiment's name.
        runs: the settings of every run, by its name.
        load_data: makes the data, which go to each run's process.
        measure: makes one run of the data, its settings and its name; a function that a
            new process can import.
        output: the folder of the runs.
        jobs: runs at a time.
    """
    try:
        before = {record["name"]: record for record in read(output)}
        there = [name for name in runs if name in before]
        for name in there:
            _check_settings(before[name], runs[name], output)
        for name in there:
            print(f"{name}: there already")
        missing = [name for name in runs if name not in there]
        data = load_data() if missing else None
        output.mkdir(parents=True, exist_ok=True)
    except (DataError, OSError) as error:
        return refuse(experiment, error)
    failed = 0
    # A thread a run, which waits for the run's process: what one run leaves in memory
    # or breaks is then nothing to the next one.
    threads = ThreadPoolExecutor(jobs)
    with _cores_divided_by(jobs):
        futures = {}
        for name in missing:
            run = (experiment, measure, data, name, runs[name])
            futures[threads.submit(_make_and_add, output, *run)] = name
        try:
            for done, future in enumerate(as_completed(futures), 1):
                fault = future.exception()
                failed += fault is not None
                if fault:
                    traceback.print_exception(fault)
                outcome = "failed" if fault else f"{future.result():.0f} s"
                print(
                    f"[{done}/{len(missing)}] {futures[future]}: {outcome}", flush=True
                )
        finally:
            threads.shutdown(cancel_futures=True)  # the user may have had enough
    return min(failed, 1)


def read(folder: Path) -> list[Record]:
    """Read all runs in a folder, in the order of their names."""
    path = folder / FILE
    if not path.exists():
        return []
    try:
        records = json.loads(path.read_text(encoding="utf-8"))["runs"]
        return sorted(records, key=lambda record: record["name"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is not a file of runs") from error


def add(folder: Path, record: Record) -> None:
    """Write one more run into a folder's file, or the same run again.

    Other threads and processes may do the same at the same time.
    """
    with FileLock(folder / ".lock"):
        others = [other for other in read(folder) if other["name"] != record["name"]]
        runs = sorted([*others, record], key=lambda each: each["name"])
        write_json(folder / FILE, {"runs": runs})


def copy_of(variable: keras.Variable) -> np.ndarray:
    """Copy a variable to NumPy; what a backend gives may be a view of its memory."""
    return np.array(keras.ops.convert_to_numpy(variable))


class Progress(keras.callbacks.Callback):
    """A line an epoch, in which the run is named: runs go on side by side."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def on_epoch_end(self, epoch: int, logs: Mapping[str, float] | None = None) -> None:
        measures = "  ".join(
            f"{key} {value:.4f}" for key, value in (logs or {}).items()
        )
        print(f"{self.name}  epoch {epoch + 1}  {measures}", flush=True)


def _check_settings(record: Record, settings: Settings, folder: Path) -> None:
    """Raise an error if a run that is there has other settings than the wanted one."""
    before, wanted = dict(_flat(record["settings"])), dict(_flat(settings))
    differing = [key for key in wanted | before if wanted.get(key) != before.get(key)]
    if differing:
        raise DataError(
            f"{folder / FILE}: the run {record['name']} has other settings "
            f"({', '.join(differing)}); choose another --output or remove it"
        )


def _flat(settings: Settings) -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from _flat(value)
        else:
            yield key, value


def _make_and_add(folder: Path, *run: Any) -> float:
    """Make a run in a new process, write what it measured; return its seconds."""
    record = _in_new_process(_make_run, *run)
    add(folder, record)
    return record["seconds"]


def _in_new_process(function: Callable, *arguments: Any) -> Any:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as process:
        return process.submit(function, *arguments).result()


def _make_run(
    experiment: str,
    measure: Measure,
    data: Data,
    name: str,
    settings: Settings,
) -> Record:
    start = time.perf_counter()
    keras.config.set_image_data_format("channels_last")
    keras.utils.set_random_seed(settings["seed"])
    measured = measure(data, settings, name)
    seconds = time.perf_counter() - start
    return {
        "experiment": experiment,
        "name": name,
        "settings": settings,
        "data": data.about,
        "environment": environment(),
        "seconds": seconds,
        "results": measured,
    }


@contextmanager
def _cores_divided_by(jobs: int) -> Iterator[None]:
    """Let each new process take its share of the cores, where nobody has said how many.

    Two processes on two cores that both start two threads slow each other down by a
    third.
    """
    cores = (
        len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count() or 1
    )
    share = str(max(1, cores // jobs))
    names = ("NPROC", "OMP_NUM_THREADS", "TF_NUM_INTRAOP_THREADS")  # JAX, torch, TF
    ours = [name for name in names if name not in os.environ]
    os.environ.update(dict.fromkeys(ours, share))
    try:
        yield
    finally:
        for name in ours:
            del os.environ[name]
