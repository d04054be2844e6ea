"""Starts the workers and talks to them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

from benchmarks import _peers
from benchmarks._peers import NotMeasured

ROOT = Path(__file__).parent.parent


class Worker:
    """A process that measures optimizers, see `benchmarks.workers`."""

    def __init__(self, module: str, python: str, environment: dict[str, str]) -> None:
        self._log = tempfile.TemporaryFile(mode="w+", errors="replace")  # noqa: SIM115
        paths = [str(ROOT), environment.pop("PYTHONPATH", "")]
        self._process = subprocess.Popen(
            [python, "-m", f"benchmarks.workers.{module}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            cwd=ROOT,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(filter(None, paths)),
                "TF_CPP_MIN_LOG_LEVEL": "2",
                # Waiting threads of torch spin, and can slow each other down a lot
                # where the cores are virtual.
                "OMP_WAIT_POLICY": "PASSIVE",
                **environment,
            },
        )
        self._requests = cast(IO[str], self._process.stdin)
        self._answers = cast(IO[str], self._process.stdout)

    def ask(self, do: str, **arguments: Any) -> Any:
        """Send a request and wait for the answer.

        Raises:
            NotMeasured: the worker could not do it, or is gone.
        """
        try:
            self._requests.write(json.dumps({"do": do, **arguments}) + "\n")
            self._requests.flush()
            line = self._answers.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise NotMeasured(f"the worker ended: {self._last_words()}")
        answer = json.loads(line)
        if "error" in answer:
            raise NotMeasured(answer["error"])
        return answer["result"]

    def _last_words(self) -> str:
        code = self._process.wait()
        self._log.seek(0)
        lines = [line.strip() for line in self._log if line.strip()]
        return lines[-1] if lines else f"exit status {code}"

    def close(self) -> None:
        self._requests.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._answers.close()
        self._log.close()


class Workers:
    """The workers of a run, each started when it is first needed.

    Args:
        backends: the Keras backends to measure.
        peers: folder of the peers' environments; `None` to leave the peers out.
    """

    def __init__(self, backends: list[str], peers: Path | None) -> None:
        self._backends = backends
        self._peers = peers
        self._live: dict[str, Worker] = {}
        self._failed: dict[str, str] = {}
        self.about: dict[str, Any] = {}

    def get(self, name: str) -> Worker:
        """The worker of that name.

        Raises:
            NotMeasured: it cannot be had here, and why.
        """
        if name not in self._live:
            worker = self._start(name)
            self.about[name] = worker.ask("about")
            self._live[name] = worker
        return self._live[name]

    @contextmanager
    def fresh(self, name: str) -> Iterator[Worker]:
        """A worker of that name that has done nothing yet, to measure memory in.

        Its C library gives freed arrays back to the system at once; by default it
        keeps some, depending on the sizes that came before.
        """
        limit = str(2**17)
        returns = {"MALLOC_MMAP_THRESHOLD_": limit, "MALLOC_TRIM_THRESHOLD_": limit}
        worker = self._start(name, returns)
        try:
            yield worker
        finally:
            worker.close()

    def _start(self, name: str, environment: dict[str, str] | None = None) -> Worker:
        if name in self._failed:
            raise NotMeasured(self._failed[name])
        try:
            module, python, needed = self._program(name)
        except NotMeasured as reason:
            self._failed[name] = str(reason)
            raise
        return Worker(module, python, {**needed, **(environment or {})})

    def _program(self, name: str) -> tuple[str, str, dict[str, str]]:
        """A worker's module, its Python and its environment variables."""
        no_gpu = {"CUDA_VISIBLE_DEVICES": "", "JAX_PLATFORMS": "cpu"}
        if name == "tfa":
            if self._peers is None:
                raise NotMeasured("peers were left out")
            return "tfa", str(_peers.tfa_python(self._peers)), no_gpu
        # "jax", "jax on GPU", "jax on 2 CPUs", "jax apart": the last in a process of
        # its own.
        backend, _, device = name.partition(" ")
        if backend not in self._backends:
            raise NotMeasured(f"backend {backend} was left out")
        environment = {"KERAS_BACKEND": backend}
        if device == "on GPU":
            _peers.check_gpu()
        else:
            environment |= no_gpu
        if device == "on 2 CPUs":
            flag = "--xla_force_host_platform_device_count=2"
            environment |= {"XLA_FLAGS": flag, "LOGICAL_CPUS": "2"}
        if backend == "torch" and self._peers is not None:
            environment["PYTHONPATH"] = _peers.pytorch_optimizer_path(self._peers)
        return f"keras_{backend}", sys.executable, environment

    def close_all(self) -> None:
        for worker in self._live.values():
            worker.close()
        self._live.clear()
