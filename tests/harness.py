"""Run an optimizer on given gradients, on any backend, the ways users run it."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import ops

BACKEND = keras.backend.backend()

# How a step is run: recorded in a graph, one operation at a time, through XLA.
MODES = {
    "tensorflow": ("graph", "eager", "jit"),
    "jax": ("jit", "eager"),
    "torch": ("eager",),
}[BACKEND]

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


def name_of(case: tuple[str, dict[str, Any]]) -> str:
    kind, arguments = case
    settings = [f"{k}={v}" for k, v in arguments.items() if k != "learning_rate"]
    return "-".join([kind, *settings])


def make(case: tuple[str, dict[str, Any]]) -> keras.Optimizer:
    kind, arguments = case
    return getattr(keras.optimizers, kind)(**arguments)


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
            variables.append(keras.Variable(weight, name=variable))
    variables[0].constraint = constraint
    return variables


class Run:
    """Variables under an optimizer that is stepped with given gradients.

    Args:
        mode: one of `MODES`.
        sparse: hand gradients of tables over as `tf.IndexedSlices`, with rows that
            are split into duplicates and a row whose gradient is zero.
    """

    def __init__(
        self,
        optimizer: keras.Optimizer,
        weights: list[np.ndarray],
        mode: str = MODES[0],
        sparse: tuple[int, ...] = (),
        constraint: Any = None,
    ) -> None:
        self.optimizer = optimizer
        self.variables = make_variables(weights, constraint)
        optimizer.build(self.variables)
        self.sparse = sparse if BACKEND == "tensorflow" else ()
        self._step = getattr(self, f"_{BACKEND}_step")(mode)

    def step(self, gradients: list[np.ndarray]) -> list[np.ndarray]:
        """One step; the weights after it."""
        self._step(gradients)
        return self.weights

    @property
    def weights(self) -> list[np.ndarray]:
        return [np.array(ops.convert_to_numpy(v)) for v in self.variables]

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
                [tf.constant(g) for g in gradients],
                [tf.constant(indices) for indices, _ in slices],
                [tf.constant(values) for _, values in slices],
            )

        return step

    def _jax_step(self, mode: str) -> Any:
        import jax

        if mode == "eager":
            return lambda gradients: self.optimizer.apply(
                [jax.numpy.asarray(g) for g in gradients], self.variables
            )
        stateless = jax.jit(self.optimizer.stateless_apply, donate_argnums=(0, 2))

        def step(gradients: list[np.ndarray]) -> None:
            state = self.optimizer.variables
            weights, new_state = stateless(
                [v.value for v in state], gradients, [v.value for v in self.variables]
            )
            for v, value in zip(self.variables + state, weights + new_state):  # noqa: B905
                v.assign(value)

        return step

    def _torch_step(self, mode: str) -> Any:
        import torch

        return lambda gradients: self.optimizer.apply(
            [torch.tensor(g) for g in gradients], self.variables
        )


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
