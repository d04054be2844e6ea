"""What `benchmarks.device` asks on a backend's device, a part in each process.

`python -m benchmarks.workers.on_device PART ARGUMENTS` reads the arguments of the
function of that name as JSON and prints, an object a line, what it runs on and then
what it yields.
"""

from __future__ import annotations

import contextlib
import gc
import gzip
import hashlib
import importlib
import itertools
import json
import re
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.workers import _serve

channel = _serve.take_stdout()

import keras  # noqa: E402
import numpy as np  # noqa: E402

from benchmarks.workers import _fit, _optimizers  # noqa: E402
from benchmarks.workers._problem import Problem  # noqa: E402

# The equations that the tests compare with.
sys.path.append(str(Path(__file__).parents[2] / "tests"))

from reference import Reference  # noqa: E402

BACKEND = keras.backend.backend()
MODE = "jit" if BACKEND == "jax" else "eager"
PEER = "torch SparseAdam"
STEPS = 20
ROUNDS = 3
K = {"k": _optimizers.K}
# What the reference makes of an optimizer, by the optimizer's name.
AROUND: dict[str, dict[str, Any]] = {
    "Adam": {},
    "Lazy decay": {"lazy": {"tables": [0]}},
    "Lazy freeze": {"lazy": {"tables": [0], "moments": "freeze"}},
    "Lookahead(Adam)": {"lookahead": K},
    "Lookahead(Lazy decay)": {"lazy": {"tables": [0]}, "lookahead": K},
}
# Events of a profile that start work on a device, move data or wait.
EVENTS = re.compile(r"memcpy|synchroni[sz]e|launch|local_scalar_dense|nonzero", re.I)
# A value that the host waits for is copied there: PyTorch's and JAX's names of that.
TO_HOST = re.compile(r"^Memcpy ?D(2H|toH)")


def about() -> dict[str, Any]:
    """Versions and the device."""
    return {
        "keras": keras.__version__,
        "version": backend().__version__,
        "device": device(),
        "device_memory_bytes": device_memory(),
    }


def correct(optimizers: list[str], rows: int) -> Iterator[dict[str, Any]]:
    """Whether `fit` trains as float64 NumPy does.

    Errors are relative to the largest entry of each weight.
    """
    if BACKEND == "jax":
        # It would round float32 to ten bits before it multiplies.
        backend().config.update("jax_default_matmul_precision", "highest")
    problem = Problem(vocabulary=16 * rows, width=8, rows=rows)
    for name in optimizers:
        keras.utils.set_random_seed(0)
        model = _optimizers.build_model(name, MODE, problem)
        weights = [np.array(w) for w in model.get_weights()]
        reference = Reference(
            weights, ("Adam", {"learning_rate": 1e-3}), **AROUND[name]
        )
        ids, _ = _fit.data(problem)
        batch = rows // _fit.LENGTH
        ids = ids[: STEPS * batch]
        labels = np.random.default_rng(1).normal(size=(len(ids), 1)).astype("float32")
        for x, y in zip(
            ids.reshape(STEPS, batch, -1), labels.reshape(STEPS, batch, 1), strict=True
        ):
            reference.apply(gradients(reference.weights, x, y))
        model.fit(ids, labels, batch_size=batch, shuffle=False, verbose=0)
        errors = [
            float(np.max(np.abs(ours - theirs)) / np.max(np.abs(theirs)))
            for ours, theirs in zip(model.get_weights(), reference.weights, strict=True)
        ]
        yield {"optimizer": name, "steps": STEPS, "error": max(errors), "limit": 1e-4}


def gradients(weights: list, ids: np.ndarray, labels: np.ndarray) -> list[np.ndarray]:
    """Of the mean squared error of the model of `_fit`."""
    table, kernel, bias = weights
    mean = table[ids].mean(1)
    error = 2 * (mean @ kernel + bias - labels) / len(labels)
    of_table = np.zeros_like(table)
    of_row = error @ kernel.T / ids.shape[1]
    np.add.at(of_table, ids, of_row[:, None, :])
    return [of_table, mean.T @ error, error.sum(0)]


def fit(
    optimizer: str, width: int, rows: int, tables: list[tuple[int, str]]
) -> Iterator[dict[str, Any]]:
    """Milliseconds of a step of `fit`, and the most memory of the device.

    What needs more memory should come later among the tables, each a vocabulary and a
    policy: on JAX the peak is that of the process, and known where it has risen.
    """
    highest = 0
    for vocabulary, policy in tables:
        problem = Problem(vocabulary, width, rows, policy=policy)
        found = {"optimizer": optimizer, "vocabulary": vocabulary, "policy": policy}
        forget_peak()
        try:
            found |= measured(optimizer, problem)
            peak = peak_memory()
            is_new = peak is not None and (BACKEND == "torch" or peak > highest)
            found["peak_bytes"] = peak if is_new else None
            highest = max(highest, peak or 0)
        except Exception as error:
            found["reason"] = reason(error)
        yield found
        keras.utils.clear_session()
        free_memory()


def recommender(
    optimizers: list[str], tables: list[int], clicks: int
) -> Iterator[dict[str, Any]]:
    """Milliseconds of a step of DLRM."""
    first, *others = tables
    problem = Problem(first, 16, clicks, tables=tuple(others))
    for name in optimizers:
        try:
            yield {"optimizer": name, **measured(name, problem)}
        except Exception as error:
            yield {"optimizer": name, "reason": reason(error)}
        keras.utils.clear_session()
        free_memory()


def measured(optimizer: str, problem: Problem) -> dict[str, Any]:
    """Times of a step, and in which form it works on the tables.

    The first seconds are those of six steps and of all that they wait for.
    """
    case: _serve.Case
    forms: list[str] = []
    if optimizer == PEER:
        from benchmarks.workers._torch_loop import torch_loop

        case = _serve.Case(torch_loop(problem), warm_up=_fit.WARM_UP)
    else:
        model = _optimizers.build_model(optimizer, MODE, problem)
        model.optimizer.build(model.trainable_variables)
        case = _fit.Fit(keras, model, problem)
    started = time.monotonic()
    case.run(1)
    first = time.monotonic() - started
    times = [1000 * statistics.mean(case.run(STEPS)) for _ in range(ROUNDS)]
    if optimizer != PEER:
        lazy = getattr(model.optimizer, "inner_optimizer", None)
        for each in (model.optimizer, lazy):
            forms += getattr(each, "step_forms", {}).values()
    return {
        "ms": statistics.median(times),
        "rounds_ms": times,
        "first_s": first,
        "step_forms": sorted({*forms}),
    }


def stops(
    optimizers: list[str], vocabulary: int, width: int, rows: int
) -> Iterator[dict[str, Any]]:
    """How often the host waits for the device in a step, under a profiler."""
    problem = Problem(vocabulary, width, rows)
    for name in optimizers:
        model = _optimizers.build_model(name, MODE, problem)
        model.optimizer.build(model.trainable_variables)
        case = _fit.Fit(keras, model, problem)
        try:
            events = profiled(case)
        except Exception as error:
            yield {"optimizer": name, "reason": reason(error)}
            continue
        copies = sum(count for event, count in events.items() if TO_HOST.match(event))
        yield {
            "optimizer": name,
            "copies_to_host": copies / STEPS,
            "events": {event: count / STEPS for event, count in events.items()},
        }


def profiled(case: _fit.Fit) -> Counter[str]:
    """How often each event occurred in the last steps of a `fit`."""
    with contextlib.ExitStack() as stack:
        found: list[Callable[[], Counter[str]]] = []

        def begin(batch: int, logs: Any = None) -> None:
            if batch == _fit.WARM_UP:
                found.append(stack.enter_context(profiler()))

        callback = keras.callbacks.LambdaCallback(
            on_train_batch_begin=begin, async_safe=True
        )
        case.fit(STEPS, callback)
    return found[0]()


@contextlib.contextmanager
def profiler() -> Iterator[Callable[[], Counter[str]]]:
    """Count events; what is given counts once the block has ended."""
    if BACKEND == "torch":
        with backend().profiler.profile() as profile:
            yield lambda: counted(event.name for event in profile.events())
        return
    with tempfile.TemporaryDirectory() as folder:
        names: list[str] = []
        with backend().profiler.trace(folder):
            yield lambda: counted(names)
        for path in Path(folder).rglob("*.trace.json.gz"):
            events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
            names += [event.get("name", "") for event in events]


def counted(names: Any) -> Counter[str]:
    """Those of the events that start something, move data or wait."""
    return Counter(name for name in names if EVENTS.search(name))


def same_bits(
    optimizers: list[str], vocabulary: int, width: int, rows: int
) -> Iterator[dict[str, Any]]:
    """Whether two trainings from the same seed end on the same bits."""
    for name in optimizers:
        problem = Problem(vocabulary, width, rows)
        digests = [digest(name, problem) for _ in range(2)]
        yield {"optimizer": name, "steps": STEPS, "same": len(set(digests)) == 1}


def digest(name: str, problem: Problem) -> str:
    """What a training ends on."""
    keras.utils.set_random_seed(0)
    model = _optimizers.build_model(name, MODE, problem)
    model.optimizer.build(model.trainable_variables)
    _fit.Fit(keras, model, problem).fit(STEPS, keras.callbacks.Callback())
    variables = model.variables + model.optimizer.variables
    values = [keras.ops.convert_to_numpy(variable) for variable in variables]
    return hashlib.sha256(b"".join(v.tobytes() for v in values)).hexdigest()


# The device


def backend() -> Any:
    """The module of the backend."""
    return importlib.import_module(BACKEND)


def device() -> str:
    """Its name."""
    if BACKEND == "jax":
        return backend().devices()[0].device_kind
    cuda = backend().cuda
    return cuda.get_device_name() if cuda.is_available() else "cpu"


def device_memory() -> int | None:
    """Bytes that the backend can allocate there, if known."""
    if BACKEND == "jax":
        return (backend().devices()[0].memory_stats() or {}).get("bytes_limit")
    cuda = backend().cuda
    return cuda.mem_get_info()[1] if cuda.is_available() else None


def peak_memory() -> int | None:
    """The most bytes that were allocated on the device, if known."""
    if BACKEND == "jax":
        return (backend().devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    cuda = backend().cuda
    return cuda.max_memory_allocated() if cuda.is_available() else None


def forget_peak() -> None:
    """Start anew to take note of the most memory, where that can be done."""
    if BACKEND == "torch" and backend().cuda.is_available():
        backend().cuda.reset_peak_memory_stats()


def free_memory() -> None:
    """Give the device's memory back."""
    gc.collect()
    if BACKEND == "jax":
        backend().clear_caches()
    elif backend().cuda.is_available():
        backend().cuda.empty_cache()


def reason(error: Exception) -> str:
    """Why there is no figure, in a line."""
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


PARTS: dict[str, Callable[..., Iterator[dict[str, Any]]]] = {
    "correct": correct,
    "fit": fit,
    "recommender": recommender,
    "stops": stops,
    "same_bits": same_bits,
}

if __name__ == "__main__":
    arguments = json.loads(sys.argv[2])
    for found in itertools.chain([about()], PARTS[sys.argv[1]](**arguments)):
        channel.write(json.dumps(found) + "\n")
