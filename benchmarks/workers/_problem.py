"""What an optimizer step works on: weights and prepared gradients."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

# Lookups in each sample of a model with one table.
LENGTH = 32
# Fresh rows in every step, from this many prepared batches.
ROW_BATCHES = 256
ROW_GRADIENTS = 8
DENSE_GRADIENTS = 2


@dataclasses.dataclass(frozen=True)
class Problem:
    """Weights of a model, and which of them a step has gradients for.

    Attributes:
        vocabulary: rows of the embedding table; 0 for none.
        width: columns of the table.
        rows: lookups a step, duplicates among them.
        draw: how they are drawn: "uniform", or "zipf" as words are.
        sparse: whether the table's gradient is `tf.IndexedSlices`.
        matrices: number of dense weights.
        matrix: shape of each of them.
        policy: the dtype policy of a model's layers.
        setup: how a model is trained beside that, a name in `_setups.SETUPS`.
        tables: rows of further tables. If there are any, the model of a `fit` is DLRM,
            and `rows` is its batch size.
    """

    vocabulary: int = 0
    width: int = 64
    rows: int = 4096
    draw: str = "uniform"
    sparse: bool = False
    matrices: int = 0
    matrix: tuple[int, int] = (3000, 1000)
    policy: str = "float32"
    setup: str = "plain"
    tables: tuple[int, ...] = ()

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """Shapes of the weights, the table's first."""
        sizes = [self.vocabulary, *self.tables] if self.vocabulary else []
        return [(size, self.width) for size in sizes] + [self.matrix] * self.matrices

    @property
    def samples(self) -> int:
        """The batch size of a `fit`."""
        return self.rows if self.tables else self.rows // LENGTH

    @property
    def weights(self) -> int:
        """Number of weights."""
        return sum(rows * columns for rows, columns in self.shapes)

    def row_ids(self) -> list[np.ndarray]:
        """The rows that each of the prepared batches looks up."""
        random = np.random.default_rng(0)
        size = (ROW_BATCHES, self.rows)
        if self.draw == "uniform":
            return list(random.integers(self.vocabulary, size=size, dtype=np.int32))
        # Zipf's law with exponent 1: the logarithm of the rank is uniform.
        ids = (self.vocabulary + 1) ** random.random(size) - 1
        return list(np.minimum(ids, self.vocabulary - 1).astype(np.int32))

    def row_gradients(self) -> list[np.ndarray]:
        """Gradients of the looked-up rows."""
        random = np.random.default_rng(1)
        shape = (self.rows, self.width)
        return [normal(random, shape) for _ in range(ROW_GRADIENTS)]

    def table_gradients(self) -> Iterator[np.ndarray]:
        """Dense gradients of the table, zero but in the looked-up rows."""
        ids, rows = self.row_ids(), self.row_gradients()
        for i in range(DENSE_GRADIENTS):
            gradient = np.zeros((self.vocabulary, self.width), np.float32)
            np.add.at(gradient, ids[i], rows[i])
            yield gradient

    def matrix_gradients(self) -> Iterator[np.ndarray]:
        """Gradients of the dense weights."""
        random = np.random.default_rng(2)
        for _ in range(self.matrices):
            yield normal(random, self.matrix)


def normal(random: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """Gradients of the size that training has."""
    return random.standard_normal(shape, np.float32) * np.float32(1e-2)
