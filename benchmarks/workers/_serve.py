"""The worker's side of the pipe: one JSON object a line in, one out."""

from __future__ import annotations

import gc
import json
import os
import resource
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

from benchmarks.workers._problem import Problem

Step = Callable[[], None]
PAGE = resource.getpagesize()


class Case:
    """An optimizer that is being measured.

    Args:
        step: makes one step and returns when it is done.
        temporary: bytes that the compiler says a step needs beyond its arguments
            and results; `None` where no compiler says so.
        warm_up: steps that do not count, before each run.
    """

    def __init__(
        self,
        step: Step,
        temporary: Callable[[], int | None] | None = None,
        warm_up: int = 0,
    ) -> None:
        self._step = step
        self._warm_up = warm_up
        self.temporary = temporary

    def run(self, steps: int) -> list[float]:
        """Seconds that each of some steps took."""
        times = [timed(self._step) for _ in range(self._warm_up + steps)]
        return times[self._warm_up :]

    def first(self) -> float:
        """Seconds that the first step takes."""
        return self.run(1)[0]

    def peak(self) -> int:
        """The most bytes held during steps, beyond weights and slots."""
        raise NotImplementedError("only of whole steps of `fit`")


Make = Callable[[str, str, Problem], Case]


class Server:
    """Answers the driver's requests.

    Args:
        make: builds a case from an optimizer's name, how to run it ("graph", "jit",
            "eager") and what it works on.
        make_fit: the same for whole steps of `fit`.
        about: versions and device.
        bandwidth: bytes a second that a copy on the device reads and writes.
    """

    def __init__(
        self,
        make: Make,
        make_fit: Make,
        about: dict[str, Any],
        bandwidth: Callable[[], float] | None = None,
    ) -> None:
        self._make = {"optimizer": make, "fit": make_fit}
        self._about = about
        self._bandwidth = bandwidth
        self._cases: dict[str, Case] = {}

    def about(self) -> dict[str, Any]:
        return self._about

    def bandwidth(self) -> float:
        if self._bandwidth is None:
            raise RuntimeError("this worker cannot measure its device's bandwidth")
        return self._bandwidth()

    def make(
        self, key: str, step: str, optimizer: str, mode: str, problem: dict
    ) -> float:
        """Build a case; the seconds that its first step took, compiling and all."""
        for name in ("matrix", "tables"):
            problem[name] = tuple(problem[name])
        case = self._make[step](optimizer, mode, Problem(**problem))
        self._cases[key] = case
        return case.first()

    def run(self, key: str, steps: int) -> list[float]:
        """Seconds a step, of each or (`fit`) the mean."""
        return self._cases[key].run(steps)

    def drop(self, key: str) -> None:
        del self._cases[key]
        gc.collect()

    def temporary(self, key: str) -> int | None:
        temporary = self._cases[key].temporary
        return temporary and temporary()

    def step_peak(self, key: str) -> int:
        return self._cases[key].peak()

    def resident(self) -> int:
        """Bytes of memory that the process holds now."""
        return resident()

    def peak(self) -> int:
        """The most bytes of memory that the process has held."""
        return peak()


def resident() -> int:
    """Bytes of memory that the process holds now; the most, where that is all known."""
    gc.collect()
    try:
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[1]) * PAGE
    except OSError:
        return peak()


def peak() -> int:
    """The most bytes of memory that the process has held."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def forget_peak() -> None:
    """Start anew to take note of the most memory held. Linux alone can."""
    with open("/proc/self/clear_refs", "w") as clear_refs:
        clear_refs.write("5")


def latest_peak() -> int:
    """The most bytes of memory held since `forget_peak`."""
    with open("/proc/self/status") as status:
        (kilobytes,) = (line.split()[1] for line in status if line.startswith("VmHWM"))
    return int(kilobytes) * 1024


def timed(step: Step) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def take_stdout() -> Any:
    """Keep stdout for answers; what libraries print goes to stderr."""
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    return channel


def serve(server: Server, channel: Any) -> None:
    """Answer requests until the driver closes the pipe."""
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = {"result": getattr(server, request.pop("do"))(**request)}
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        channel.write(json.dumps(answer) + "\n")
