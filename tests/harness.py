"""What tests share: optimizers run on given gradients, small models, comparisons."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import ops
from reference import OPTIMIZERS as EQUATIONS
from reference import EarlyMuon, InPlaceScheduleFreeAdamW, Reference

from keras_lookahead_lazy import LazyOptimizer, Lookahead

ROOT = Path(__file__).parents[1]
BACKEND = keras.backend.backend()
INSTALLED = [name for name in ("tensorflow", "jax", "torch") if find_spec(name)]
OTHERS = [name for name in INSTALLED if name != BACKEND]

# How a step is run: recorded in a graph, one operation at a time, through XLA.
MODES = {
    "tensorflow": ("graph", "eager", "jit"),
    "jax": ("jit", "eager"),
    "torch": ("eager",),
}[BACKEND]


def rotated(*factors: Iterable[Any], modes: Sequence[str] = MODES) -> list[Any]:
    """Parameters: each combination of the factors once, behind one of the modes.

    The modes take turns along every factor: where the factors behind one have as many
    levels as there are modes, each of its levels meets each mode. A complete product
    would run the same code in every mode.
    """
    parameters = []
    for combination in itertools.product(*map(enumerate, factors)):
        turn = sum(position for position, _ in combination)
        levels = [level for _, level in combination]
        parameters.append((modes[turn % len(modes)], *levels))
    return parameters


# Gradients of tables: TensorFlow makes `tf.IndexedSlices`.
GRADIENTS = ("dense", "sparse") if BACKEND == "tensorflow" else ("dense",)

# Every inner optimizer of the specification, with the variants that have slots of
# their own. Learning rates are large, so that errors are, too.
OPTIMIZERS: list[tuple[str, dict[str, Any]]] = [
    ("SGD", {"learning_rate": 0.1}),
    ("SGD", {"learning_rate": 0.1, "momentum": 0.9}),
    ("SGD", {"learning_rate": 0.1, "momentum": 0.8, "nesterov": True}),
    ("Adam", {"learning_rate": 0.01}),
    ("Adam", {"learning_rate": 0.01, "amsgrad": True, "beta_2": 0.9}),
    ("AdamW", {"learning_rate": 0.01, "weight_decay": 0.1}),
    ("Nadam", {"learning_rate": 0.01}),
    ("Adamax", {"learning_rate": 0.01}),
    ("RMSprop", {"learning_rate": 0.01}),
    ("RMSprop", {"learning_rate": 0.01, "momentum": 0.9, "centered": True}),
    ("Adagrad", {"learning_rate": 0.1}),
    ("Adadelta", {"learning_rate": 1.0}),
    ("Ftrl", {"learning_rate": 0.1, "l1_regularization_strength": 0.01, "beta": 0.1}),
    ("Ftrl", {"learning_rate": 0.1, "l2_shrinkage_regularization_strength": 0.1}),
    ("Lion", {"learning_rate": 0.01, "weight_decay": 0.1}),
    ("Lamb", {"learning_rate": 0.01}),
    ("Adafactor", {"learning_rate": 0.01}),
    ("Muon", {"learning_rate": 0.01, "exclude_embeddings": False}),
]
if "rms_rate" not in inspect.signature(keras.optimizers.Muon).parameters:
    EQUATIONS["Muon"] = EarlyMuon
    if BACKEND == "tensorflow":  # on which that Muon cannot train, without us either
        OPTIMIZERS.pop()
# This one goes inside Lookahead only.
SCHEDULE_FREE: list[tuple[str, dict[str, Any]]] = [
    ("ScheduleFreeAdamW", {"learning_rate": 0.01, "beta_2": 0.9}),
    ("ScheduleFreeAdamW", {"learning_rate": 0.01, "warmup_steps": 5, "beta_1": 0.7}),
    ("ScheduleFreeAdamW", {"learning_rate": 0.01, "weight_decay": 0.1}),
]
if not hasattr(keras.optimizers, "ScheduleFreeAdamW"):  # which came with Keras 3.15
    SCHEDULE_FREE = []
if BACKEND != "jax":
    EQUATIONS["ScheduleFreeAdamW"] = InPlaceScheduleFreeAdamW


def name_of(case: Any) -> str | None:
    """A test's id: an optimizer's settings, or what stands for itself."""
    if not isinstance(case, tuple):
        return str(case)
    kind, arguments = case
    settings = [f"{k}={v}" for k, v in arguments.items() if k != "learning_rate"]
    return "-".join([kind, *settings])


def make(case: tuple[str, dict[str, Any]]) -> keras.Optimizer:
    kind, arguments = case
    return getattr(keras.optimizers, kind)(**arguments)


def adam() -> keras.Optimizer:
    return keras.optimizers.Adam(0.05)


def sgd() -> keras.Optimizer:
    return keras.optimizers.SGD(0.1, momentum=0.9)


def both(
    optimizer: keras.Optimizer,
    moments: str = "decay",
    inner_state: str = "maintain",
    k: int = 3,
) -> Lookahead:
    """Both wrappers around an optimizer."""
    return Lookahead(LazyOptimizer(optimizer, moments=moments), k, 0.5, inner_state)


def around(
    optimizer: keras.Optimizer,
    outer: tuple[str, dict[str, Any]] | None = None,
    **arguments: Any,
) -> Lookahead:
    """A Lookahead from the arguments that the reference gets."""
    return Lookahead(optimizer, outer_optimizer=outer and make(outer), **arguments)


VOCABULARY = 12
NAMES = ["words_embeddings", "dense_kernel", "dense_bias"]


def make_weights(seed: int = 0) -> list[np.ndarray]:
    """A table, a matrix and a vector."""
    rng = np.random.default_rng(seed)
    shapes = (VOCABULARY, 4), (5, 3), (3,)
    return [rng.normal(size=shape).astype("float32") for shape in shapes]


def make_gradients(
    steps: int, weights: list[np.ndarray], tables: tuple[int, ...] = (0,), seed: int = 1
) -> list[list[np.ndarray]]:
    """Random gradients; of a table, a few rows, drawn as words are (Zipf)."""
    rng = np.random.default_rng(seed)
    gradients = []
    for _ in range(steps):
        step = [rng.normal(size=w.shape).astype("float32") for w in weights]
        for i in tables:
            vocabulary = len(weights[i])
            sampled = np.minimum(rng.zipf(1.5, size=4) - 1, vocabulary - 1)
            step[i][np.setdiff1d(np.arange(vocabulary), sampled)] = 0.0
        gradients.append(step)
    return gradients


def make_variables(weights: list[np.ndarray], constraint: Any) -> list[keras.Variable]:
    """A variable for each weight; `constraint` is that of the first."""
    variables = []
    for name, weight in zip(NAMES, weights, strict=False):
        layer, variable = name.split("_")
        with keras.name_scope(layer):
            variables.append(keras.Variable(weight, name=variable, dtype=weight.dtype))
    variables[0].constraint = constraint
    return variables


class Run:
    """Variables under an optimizer that is stepped with given gradients.

    Args:
        optimizer: built here, if it is not built yet.
        weights: arrays, or the variables of another `Run`.
        mode: one of `MODES`.
        sparse: hand gradients of tables over as `tf.IndexedSlices`, with rows that
            are split into duplicates and a row whose gradient is zero.
    """

    def __init__(
        self,
        optimizer: keras.Optimizer,
        weights: list[np.ndarray] | list[Any],
        mode: str = MODES[0],
        sparse: tuple[int, ...] = (),
        constraint: Any = None,
    ) -> None:
        self.optimizer = optimizer
        are_arrays = isinstance(weights[0], np.ndarray)
        self.variables: list[keras.Variable] = (
            make_variables(weights, constraint) if are_arrays else weights
        )
        optimizer.build(self.variables)
        self.sparse = sparse if BACKEND == "tensorflow" else ()
        self._step = getattr(self, f"_{BACKEND}_step")(mode)

    def step(
        self, gradients: Sequence[Any], given: Sequence[int] | None = None
    ) -> list[np.ndarray]:
        """One step; the weights after it. Gradients are arrays or the backend's.

        With `given` they are those of the weights at these indices, the others are
        left out, and the step is eager.
        """
        if given is None:
            self._step(gradients)
        else:
            variables = [self.variables[i] for i in given]
            with one_by_one():
                self.optimizer.apply([tensor(g) for g in gradients], variables)
        return self.weights

    @property
    def weights(self) -> list[np.ndarray]:
        return numpy(self.variables)

    def _tensorflow_step(self, mode: str) -> Any:
        import tensorflow as tf

        def apply(dense: list, indices: list, values: list) -> None:
            gradients = list(dense)
            for i, rows, slices in zip(self.sparse, indices, values, strict=True):
                shape = tf.constant(gradients[i].shape.as_list(), "int64")
                gradients[i] = tf.IndexedSlices(slices, rows, shape)
            self.optimizer.apply_gradients(zip(gradients, self.variables, strict=True))

        compiled = apply
        if mode != "eager":
            compiled = tf.function(apply, jit_compile=mode == "jit", autograph=False)

        def step(gradients: list[np.ndarray]) -> None:
            slices = [as_slices(gradients[i]) for i in self.sparse]
            compiled(
                [tensor(g) for g in gradients],
                [tf.constant(indices) for indices, _ in slices],
                [tf.constant(values) for _, values in slices],
            )

        return step

    def _jax_step(self, mode: str) -> Any:
        import jax

        if mode == "eager":
            return self._eager_step

        def stateless_apply(*arrays: Any) -> Any:
            return self.optimizer.stateless_apply(*arrays)

        # A function of its own, so that JAX traces it anew: methods are equal.
        stateless = jax.jit(stateless_apply, donate_argnums=(0, 2))

        def step(gradients: list[np.ndarray]) -> None:
            state = self.optimizer.variables
            weights, new_state = stateless(
                [v.value for v in state], gradients, [v.value for v in self.variables]
            )
            for v, value in zip(self.variables + state, weights + new_state):  # noqa: B905
                v.assign(value)

        return step

    def _torch_step(self, mode: str) -> Any:
        return self._eager_step

    def _eager_step(self, gradients: Sequence[Any]) -> None:
        with one_by_one():
            self.optimizer.apply([tensor(g) for g in gradients], self.variables)


def one_by_one() -> contextlib.AbstractContextManager[Any]:
    """Run operations one at a time; on JAX, which compiles loops anew, theirs, too."""
    if BACKEND != "jax":
        return contextlib.nullcontext()
    import jax

    return jax.disable_jit()


def as_slices(gradient: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Row ids and rows that sum to `gradient`, each row in two parts.

    A row without gradient is listed too, as a padding token's is. The number of
    entries is always the same, as a batch's number of tokens is.
    """
    sampled = np.flatnonzero(np.any(gradient != 0, axis=1))
    idle = np.setdiff1d(np.arange(len(gradient)), sampled)[:1]
    padding = np.repeat(idle, 10 - 2 * len(sampled))
    indices = np.concatenate([sampled, padding, sampled]).astype("int32")
    first = gradient[sampled] * np.float32(0.25)
    values = np.concatenate(
        [first, np.zeros_like(gradient[padding]), gradient[sampled] - first]
    )
    return indices, values


def row_slices(indices: list[int], values: np.ndarray, shape: tuple[int, ...]) -> Any:
    """A table's gradient by rows, as the backend has it; a row may come twice."""
    if BACKEND == "tensorflow":
        import tensorflow as tf

        return tf.IndexedSlices(values, indices, tf.constant(shape, "int64"))
    if BACKEND == "jax":
        from jax.experimental.sparse import BCOO

        return BCOO((tensor(values), tensor(np.array(indices)[:, None])), shape=shape)
    import torch

    return torch.sparse_coo_tensor(tensor(np.array([indices])), tensor(values), shape)


def tensor(value: Any) -> Any:
    return ops.convert_to_tensor(value) if isinstance(value, np.ndarray) else value


def numpy(variables: Iterable[Any]) -> list[np.ndarray]:
    return [np.array(ops.convert_to_numpy(v)) for v in variables]


# Models that Keras trains


# Recording a graph takes longer than the few steps of most tests; not on JAX.
QUICK = {"run_eagerly": BACKEND != "jax"}


def make_model(
    optimizer: Any = None,
    vocabulary: int = VOCABULARY,
    width: int = 3,
    **how: Any,
) -> keras.Model:
    """A model of four tokens, compiled with `how` if there is an optimizer."""
    model = keras.Sequential(
        [
            keras.Input((4,), dtype="int32"),
            keras.layers.Embedding(vocabulary, width, name="words"),
            keras.layers.Flatten(),
            keras.layers.Dense(2, "tanh"),
            keras.layers.Dense(1),
        ],
        name="net",
    )
    model.set_weights(random_weights(model, seed=3))
    if optimizer is not None:
        model.compile(optimizer, "mse", **how)
    return model


def make_two_tables(optimizer: Any, vocabulary: int, **how: Any) -> keras.Model:
    """A functional model whose layers have the same paths whenever it is made."""
    ids = keras.Input((4,), dtype="int32", name="ids")
    words = keras.layers.Embedding(vocabulary, 3, name="words")(ids)
    tags = keras.layers.Embedding(vocabulary, 3, name="tags")(ids)
    rows = keras.layers.Add(name="sum")([words, tags])
    flat = keras.layers.Flatten(name="flat")(rows)
    model = keras.Model(ids, keras.layers.Dense(1, name="head")(flat), name="net")
    model.set_weights([0.1 * w for w in random_weights(model, seed=3)])
    model.compile(optimizer, "mse", **QUICK, **how)
    return model


def random_weights(model: keras.Model, seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.normal(size=w.shape).astype("float32") for w in model.get_weights()]


def make_data(samples: int, seed: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """Tokens, some frequent and some rare, and a number for each sample."""
    rng = np.random.default_rng(seed)
    tokens = np.minimum(rng.zipf(1.4, size=(samples, 4)) - 1, VOCABULARY - 1)
    return tokens, rng.normal(size=(samples, 1)).astype("float32")


def state(model: keras.Model) -> list[np.ndarray]:
    """Weights, and all variables of the optimizer."""
    return model.get_weights() + numpy(model.optimizer.variables)


@contextlib.contextmanager
def dtype_policy(name: str) -> Iterator[None]:
    """The policy of the layers that are made in the block."""
    keras.config.set_dtype_policy(name)
    try:
        yield
    finally:
        keras.config.set_dtype_policy("float32")


def environment(backend: str = BACKEND, one_backend: bool = False) -> dict[str, str]:
    """That of another Python, which imports what this one does.

    Args:
        one_backend: it finds that backend only, and so starts in half the time.
    """
    folders = [str(ROOT / "tests" / "one_backend")] if one_backend else []
    path = os.pathsep.join(folders + list(filter(None, sys.path)))
    return {**os.environ, "KERAS_BACKEND": backend, "PYTHONPATH": path}


def run_python(
    *arguments: Any, backend: str = BACKEND, one_backend: bool = False
) -> str:
    """Another Python in the root of the repository; what it prints."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=environment(backend, one_backend),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# Comparisons


def assert_follows(
    run: Run,
    reference: Reference,
    steps: Iterable[list[np.ndarray]],
    tolerance: float = 2e-5,
) -> None:
    """The weights after each step are the reference's."""
    for step in steps:
        reference.apply(step)
        assert_agree(run.step(step), reference.weights, tolerance)


def error(ours: list[np.ndarray], reference: list[np.ndarray]) -> float:
    """Largest difference, relative to the largest entry of each array."""
    return max(
        float(np.max(np.abs(a - b)) / max(1e-8, np.max(np.abs(b))))
        for a, b in zip(ours, reference, strict=True)
    )


def assert_agree(
    ours: list[np.ndarray], reference: list[np.ndarray], tolerance: float = 2e-5
) -> None:
    assert error(ours, reference) <= tolerance, error(ours, reference)


def assert_same_bits(ours: list[np.ndarray], reference: list[np.ndarray]) -> None:
    for a, b in zip(ours, reference, strict=True):
        np.testing.assert_array_equal(a, b)


def two_replicas() -> Any:
    """A strategy with two replicas on the CPU; to be called before TensorFlow runs."""
    import tensorflow as tf

    cpu = tf.config.list_physical_devices("CPU")[0]
    half = tf.config.LogicalDeviceConfiguration()
    tf.config.set_logical_device_configuration(cpu, [half, half])
    return tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
