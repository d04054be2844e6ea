"""Times and memory of variants, in turns."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import (
    AbstractContextManager,
    ExitStack,
    contextmanager,
    nullcontext,
)
from pathlib import Path
from typing import Any

from benchmarks._peers import NotMeasured
from benchmarks._workers import Worker, Workers
from benchmarks.workers._problem import Problem

# Of each call of `fit`, beside those that do not count: whole cycles of k = 5, and of
# four accumulated gradients.
FIT_STEPS = 20


@dataclasses.dataclass(frozen=True)
class Variant:
    """An optimizer at work on a problem, in one worker.

    Attributes:
        worker: "tensorflow", "jax", "torch" or "tfa", or the same with " on GPU",
            " on 2 CPUs" or " apart".
        mode: "graph", "jit" or "eager".
        optimizer: its name in the worker.
        problem: what it works on.
        step: "optimizer" for its own step, "fit" for a whole one of `model.fit`.
    """

    worker: str
    mode: str
    optimizer: str
    problem: Problem
    step: str = "optimizer"

    def __str__(self) -> str:
        fit = "fit, " if self.step == "fit" else ""
        return f"{self.optimizer} ({fit}{self.worker} {self.mode})"

    @property
    def request(self) -> dict[str, Any]:
        """What a worker needs to know to build it."""
        return {
            "key": f"{self} {self.problem}",
            "optimizer": self.optimizer,
            "mode": self.mode,
            "step": self.step,
            "problem": dataclasses.asdict(self.problem),
        }


@dataclasses.dataclass(frozen=True)
class Effort:
    """How long to measure.

    Attributes:
        seconds: of alternating runs of two variants.
        rounds: the fewest rounds, and the most.
        processes: fresh processes for a figure of memory; 0 takes the process that
            is there, to see that it works.
        compilations: fresh compilations for a figure of the first step.
    """

    seconds: float
    rounds: tuple[int, int]
    processes: int
    compilations: int


@dataclasses.dataclass(frozen=True)
class Figure:
    """A measured number.

    Attributes:
        value: the median of the samples.
        quartiles: the first and the third.
        samples: one for each round.
        unit: what it counts.
        parts: what it was computed from, for the report.
    """

    value: float
    quartiles: tuple[float, float]
    samples: Sequence[float]
    unit: str
    parts: dict[str, Any]


def figure(
    samples: Sequence[float], unit: str, parts: dict[str, Any] | None = None
) -> Figure:
    """Median and quartiles of some samples."""
    low = high = samples[0]
    if len(samples) > 1:
        low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
    return Figure(statistics.median(samples), (low, high), samples, unit, parts or {})


class Bench:
    """Measures variants.

    Args:
        workers: where they are built.
        effort: how long to measure.
    """

    def __init__(self, workers: Workers, effort: Effort) -> None:
        self.workers = workers
        self.effort = effort
        self.peaks: dict[Variant, Figure] = {}

    @contextmanager
    def _made(self, variant: Variant) -> Iterator[Callable[[int], list[float]]]:
        """Build a variant; gives what runs steps of it and returns their seconds."""
        check_memory(variant)
        worker = self.workers.get(variant.worker)
        key = variant.request["key"]
        worker.ask("make", **variant.request)
        try:
            yield lambda steps: worker.ask("run", key=key, steps=steps)
        finally:
            worker.ask("drop", key=key)

    @contextmanager
    def room(self, variant: Variant) -> Iterator[None]:
        """Have all memory free for a large table, and again after it."""
        # TensorFlow gives memory that it freed back when it ends, not before.
        is_large = variant.problem.weights > 10**8
        if is_large:
            self.workers.close_all()
        try:
            yield
        finally:
            if is_large:
                self.workers.close_all()

    def step_times(self, variants: Sequence[Variant], cycle: int = 1) -> list[Figure]:
        """Milliseconds a step of variants that take turns.

        In one process the turns are single steps. Between processes they are short
        runs, of which the first step, that finds the caches full of the other's
        data, does not count. Of whole steps of `fit` they are calls of `fit`.

        Args:
            variants: what takes turns.
            cycle: steps over whose mean, rather than each, the median is taken: the
                k of Lookahead, of which one step in k is dearer.
        """
        single = len({variant.worker for variant in variants}) == 1
        steps, skipped = (cycle, 0) if single else (max(cycle, 5), 1)
        if any(variant.step == "fit" for variant in variants):
            single, steps, skipped = False, FIT_STEPS, 0
        fewest, most = self.effort.rounds
        rounds: list[list[float]] = [[] for _ in variants]
        with ExitStack() as stack:
            runs = [stack.enter_context(self._made(variant)) for variant in variants]
            for run in runs:
                run(2)
            end = time.monotonic() + self.effort.seconds
            while len(rounds[0]) < fewest or (
                time.monotonic() < end and len(rounds[0]) < most
            ):
                if single:
                    turns = [[run(1)[0] for run in runs] for _ in range(steps)]
                    times = [list(seconds) for seconds in zip(*turns, strict=True)]
                else:
                    times = [run(skipped + steps)[skipped:] for run in runs]
                average = statistics.mean if cycle > 1 else statistics.median
                for values, seconds in zip(rounds, times, strict=True):
                    values.append(1e3 * average(seconds))
        return [figure(values, "ms") for values in rounds]

    def step_ratio(self, over: Variant, under: Variant, cycle: int = 1) -> Figure:
        """Step time of one variant over another's, of runs that alternate."""
        return _ratio(over, under, *self.step_times([over, under], cycle))

    def step_ratio_apart(self, over: Variant, under: Variant) -> Figure:
        """`step_ratio` in several pairs of fresh processes.

        For what works in processes of its own: steps differ between processes by more
        than within one.
        """
        rounds: list[list[float]] = [[], []]
        for _ in range(max(self.effort.processes, 1)):
            self.workers.close_all()
            for values, times in zip(
                rounds, self.step_times([over, under]), strict=True
            ):
                values.extend(times.samples)
        return _ratio(over, under, *(figure(ms, "ms") for ms in rounds))

    def first_step_ratio(self, over: Variant, under: Variant) -> Figure:
        """Time of the first step, in which the step is compiled, likewise."""
        values: list[list[float]] = [[], []]
        # The first pair is not counted: it starts the framework.
        for i in range(1 + self.effort.compilations):
            for variant, seconds in zip((over, under), values, strict=True):
                worker = self.workers.get(variant.worker)
                first = worker.ask("make", **variant.request)
                worker.ask("drop", key=variant.request["key"])
                if i:
                    seconds.append(1e3 * first)
        return _ratio(over, under, *(figure(ms, "ms") for ms in values))

    def extra_memory(
        self, over: Variant, under: Variant, size: float, unit: str
    ) -> Figure:
        """What one variant's peak memory has more than another's, over `size`."""
        a, b = self.peak(over), self.peak(under)
        more = [x - y for x, y in zip(a.samples, b.samples, strict=True)]
        parts = {"over": summary(over, a), "under": summary(under, b)}
        return figure([bytes_ / size for bytes_ in more], unit, parts)

    def step_memory(self, variant: Variant, small: Variant, size: float) -> Figure:
        """What a step needs beyond weights and slots, over `size`.

        Less what a step on a smaller table needs, which frameworks need for themselves.
        """
        check_memory(variant)
        processes = range(max(self.effort.processes, 1))
        needs = {
            each: figure([self._step_memory(each) for _ in processes], "bytes")
            for each in (variant, small)
        }
        pairs = zip(needs[variant].samples, needs[small].samples, strict=True)
        parts = {
            "variant": summary(variant, needs[variant]),
            "small": summary(small, needs[small]),
        }
        return figure([(large - little) / size for large, little in pairs], "", parts)

    def _step_memory(self, variant: Variant) -> int:
        with self._memory_worker(variant.worker) as worker:
            return _step_memory(worker, variant)

    def peak(self, variant: Variant) -> Figure:
        """Bytes at the peak of building a variant and making some steps.

        In fresh processes, less what the process held before. A small problem goes
        first, so that the framework itself is loaded by then.
        """
        if variant not in self.peaks:
            check_memory(variant)
            peaks, temporary = [], None
            for _ in range(max(self.effort.processes, 1)):
                with self._memory_worker(variant.worker) as worker:
                    peaks.append(_peak(worker, variant))
                    temporary = worker.ask("temporary", key=variant.request["key"])
            parts = {"compiler_temporary": temporary}
            self.peaks[variant] = figure(peaks, "bytes", parts)
        return self.peaks[variant]

    def _memory_worker(self, name: str) -> AbstractContextManager[Worker]:
        if self.effort.processes:
            return self.workers.fresh(name)
        return nullcontext(self.workers.get(name))

    def bandwidth_share(self, variant: Variant, streams: float, cycle: int) -> Figure:
        """The bytes that a step must move, over what a copy moves in that time.

        Args:
            variant: whose step.
            streams: times that a step must read or write all weights or slots.
            cycle: as in `step_times`.
        """
        (times,) = self.step_times([variant], cycle)
        speed = self.workers.get(variant.worker).ask("bandwidth")
        needed = streams * 4 * variant.problem.weights
        shares = [needed / (1e-3 * ms) / speed for ms in times.samples]
        parts = {"step": summary(variant, times), "copy_bytes_per_second": speed}
        return figure(shares, "of bandwidth", parts)


def _step_memory(worker: Worker, variant: Variant) -> int:
    # Small first, so that the framework itself is loaded.
    small = dataclasses.replace(variant.problem, vocabulary=100)
    for each in (dataclasses.replace(variant, problem=small), variant):
        key = each.request["key"]
        worker.ask("make", **each.request)
        temporary = worker.ask("temporary", key=key)
        if temporary is None:
            temporary = worker.ask("step_peak", key=key)
        worker.ask("drop", key=key)
    return temporary


def _peak(worker: Worker, variant: Variant) -> int:
    problem = variant.problem
    small = dataclasses.replace(
        problem, vocabulary=min(problem.vocabulary, 100), rows=10, matrix=(10, 10)
    )
    for warm_up in (dataclasses.replace(variant, problem=small), variant):
        before = worker.ask("resident")
        worker.ask("make", **warm_up.request)
        worker.ask("run", key=warm_up.request["key"], steps=7)
    return worker.ask("peak") - before


def _ratio(over: Variant, under: Variant, a: Figure, b: Figure) -> Figure:
    ratios = [x / y for x, y in zip(a.samples, b.samples, strict=True)]
    return figure(ratios, "", {"over": summary(over, a), "under": summary(under, b)})


def summary(variant: Variant, measured: Figure) -> dict[str, Any]:
    """A variant's figure, for the report, without the single samples."""
    return {
        "variant": str(variant),
        "problem": dataclasses.asdict(variant.problem),
        "median": measured.value,
        "quartiles": measured.quartiles,
        "samples": len(measured.samples),
        "unit": measured.unit,
        **measured.parts,
    }


def check_memory(variant: Variant) -> None:
    """Raise `NotMeasured` where a variant might not fit into memory."""
    # Weights, two slots and a gradient; a dense step's temporaries; lazy has none.
    copies = 4 if "Lazy" in variant.optimizer else 7
    needed = copies * 4 * variant.problem.weights
    available = available_memory()
    if available is not None and needed > available and "GPU" not in variant.worker:
        raise NotMeasured(
            f"{variant} may need {needed / 1e9:.0f} GB of memory; "
            f"{available / 1e9:.0f} GB are free"
        )


def available_memory() -> int | None:
    """Bytes of memory that a new process could have, where the system tells."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    values = dict(line.split(":", 1) for line in lines)
    return int(values["MemAvailable"].split()[0]) * 1024
