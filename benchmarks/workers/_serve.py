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


class Case:
    """An optimizer that is being measured.

    Args:
        step: makes one step and returns when it is done.
        temporary: bytes that the compiler says a step needs beyond its arguments
            and results; `None` where no compiler says so.
    """

    def __init__(
        self, step: Step, temporary: Callable[[], int | None] | None = None
    ) -> None:
        self.step = step
        self.temporary = temporary


Make = Callable[[str, str, Problem], Case]


class Server:
    """Answers the driver's requests.

    Args:
        make: builds a case from an optimizer's name, how to run it ("graph", "jit",
            "eager") and what it works on.
        about: versions and device.
        bandwidth: bytes a second that a copy on the device reads and writes.
    """

    def __init__(
        self,
        make: Make,
        about: dict[str, Any],
        bandwidth: Callable[[], float] | None = None,
    ) -> None:
        self._make = make
        self._about = about
        self._bandwidth = bandwidth
        self._cases: dict[str, Case] = {}

    def about(self) -> dict[str, Any]:
        return self._about

    def bandwidth(self) -> float:
        if self._bandwidth is None:
            raise RuntimeError("this worker cannot measure its device's bandwidth")
        return self._bandwidth()

    def make(self, key: str, optimizer: str, mode: str, problem: dict) -> float:
        """Build a case; the seconds that its first step took, compiling and all."""
        problem["matrix"] = tuple(problem["matrix"])
        self._cases[key] = self._make(optimizer, mode, Problem(**problem))
        return timed(self._cases[key].step)

    def run(self, key: str, steps: int) -> list:
        """Seconds that each of some steps took."""
        step = self._cases[key].step
        return [timed(step) for _ in range(steps)]

    def drop(self, key: str) -> None:
        del self._cases[key]
        gc.collect()

    def temporary(self, key: str) -> int | None:
        temporary = self._cases[key].temporary
        return temporary and temporary()

    def resident(self) -> int:
        """Bytes of memory that the process holds now."""
        gc.collect()
        try:
            with open("/proc/self/statm") as statm:
                return int(statm.read().split()[1]) * resource.getpagesize()
        except OSError:
            return self.peak()

    def peak(self) -> int:
        """The most bytes of memory that the process has held."""
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


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
