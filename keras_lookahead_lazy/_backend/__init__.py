"""What differs by backend: one contract, which each module here implements.

Only the module of the backend that Keras runs on is imported, as `engine`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import keras
from keras import ops

SUPPORTED = ("tensorflow", "jax", "torch")


@dataclass(frozen=True)
class Rows:
    """The rows of a table that one step works on.

    Attributes:
        indices: int tensor of shape `(n,)`, the rows. They may repeat, with the
            same gradient each time. `None` stands for every row of the table.
        gradient: tensor of shape `(n, ...)`, the gradient of each of them,
            duplicates already summed.
        sampled: bool tensor of shape `(n,)`, whether the gradient row has an
            entry that is not zero. `None` if they all have.
    """

    indices: Any
    gradient: Any
    sampled: Any


OTHER_PARTS = (
    "the gradient has parts other than lookups: the table is also used in another way, "
    "or lookups are inside scan, vmap, remat or checkpoint"
)
FEW_ROWS = "the table has too few rows for so many lookups"


class RowGradient(NamedTuple):
    """The gradient of a table that was looked up and nothing else.

    Attributes:
        sums: tensor of shape `(n, ...)`, gradients of different rows in the first
            places and zeros in the others; n is the number of look-ups where shapes
            have to be fixed, else of rows.
        indices: int tensor of shape `(n,)`, the rows' ids.
        position: int tensor of shape `(n,)`, where each id has its sum; `None` if in
            its own place.
    """

    sums: Any
    indices: Any
    position: Any

    def by_row(self) -> Any:
        """The sum for each of `indices`."""
        if self.position is None:
            return self.sums
        return ops.take(self.sums, self.position, axis=0)


class Engine(Protocol):
    """A backend. `variable` is a Keras variable, `values` are native tensors."""

    # Whether variables hold the state while `fit` runs, or arrays beside them do.
    VARIABLES_HOLD_STATE: bool
    # The dtype of numbers of updates, and of lists of rows.
    INTEGERS: str

    # Look-ups and their gradients

    def look_up(self, table: keras.Variable, ids: Any) -> Any:
        """Read rows of a table so that its gradient is known by rows.

        Where a sparse tensor has no id, Keras looks up row 0, and so does this.
        """

    def takes_rows(self, gradient: Any) -> bool:
        """Whether a gradient is known by rows to Keras's optimizers, too."""

    def row_gradient(self, gradient: Any, table: keras.Variable) -> RowGradient | str:
        """The look-ups that a gradient consists of.

        Returns:
            The reason, if it has other parts or is better taken as a whole.
        """

    def fits_a_round(self, gradient: Any) -> bool:
        """Whether `step_in_rounds` would call the step once."""

    def step_in_rounds(
        self, gradient: Any, variables: Sequence[Any], step: Callable[[Any, Any], None]
    ) -> None:
        """Call `step(gradient, variables)`, with some rows at a time if they are many.

        Args:
            gradient: of a table, in any form.
            variables: replicas of the table and of what is kept for it.
        """

    def whole(self, gradient: Any) -> Any:
        """A gradient in a form that Keras's optimizers take."""

    def sum_duplicates(self, gradient: Any) -> Any:
        """A gradient with each row in one place, so that Keras computes with sums."""

    # Rows of a table, and of what is kept for it

    def replica(self, variable: Any, like: Any) -> Any:
        """The replica of `variable` that lies where the replica `like` does."""

    def find_rows(
        self, gradient: Any, variables: Sequence[Any], every_row: bool
    ) -> tuple[Rows, list]:
        """The rows of a table that its gradient touches.

        Args:
            gradient: dense or sparse.
            variables: replicas of the table and of what is kept for it.
            every_row: whether the step needs the whole table.

        Returns:
            The rows, and the values of each of the variables there.
        """

    def mark_idle(self, indices: Any, gradient: Any) -> Rows:
        """Rows that were looked up, of which some may have a gradient of zeros."""

    def read_rows(self, variable: Any, indices: Any) -> Any:
        """Rows of a replica; all, if `indices` is `None`."""

    def write_rows(
        self, variables: Sequence[Any], indices: Any, values: Sequence[Any]
    ) -> None:
        """Assign the same rows of some replicas; all, if `indices` is `None`."""

    def split(self, joined: Any, parts: Sequence[Any]) -> list:
        """What was joined from rows of several, in parts as long as the given ones."""

    def placement(self, variable: keras.Variable) -> Any:
        """Rows of tables with the same placement can be joined at no cost."""

    def write_list(self, variable: Any, count: Any, values: Any) -> Any:
        """Write ids behind the first `count` of a list, as many as have room.

        Returns:
            The number of ids.
        """

    def listed_rows(
        self, variable: keras.Variable, ids: keras.Variable, count: Any, size: int
    ) -> RowGradient:
        """The rows of a variable that the first `count` ids of a list name.

        Args:
            size: that the count does not exceed.
        """

    def clear_rows(self, variable: keras.Variable, rows: RowGradient) -> None:
        """Make zeros of rows that were read as `rows`."""

    def row_layout(self, variable: keras.Variable) -> Any:
        """Where a vector with one entry for each row of a table belongs, or `None`."""

    # Counting and branching in a step, which may be compiled

    def num_replicas(self) -> int:
        """How many replicas a step runs in, each with a part of the gradients."""

    def read_count(self, variable: Any) -> Any:
        """The value of a counter, without waiting for an accelerator."""

    def write_count(self, variable: keras.Variable, count: Any) -> None:
        """Assign a counter."""

    def once_known(self, gradients: Sequence[Any], predicate: Any) -> Any:
        """The same predicate, which is known no earlier than the gradients.

        What is written after it is then written after the forward pass has read it.
        XLA would otherwise copy the weights, in every step.
        """

    def run_if(
        self, predicate: Any, function: Callable[[], None], variables: Sequence[Any]
    ) -> None:
        """Call `function`, if `predicate`: one decision, taken on the device.

        Args:
            predicate: scalar bool.
            variables: those that the function may assign.
        """

    # What a decision may lead to

    def update(self, group: tuple, function: Callable[..., tuple]) -> None:
        """Assign `function` of their values to some variables."""

    def back_up(self, pairs: Sequence[tuple], predicate: Any) -> None:
        """slow := fast for pairs `(fast, slow)`.

        Args:
            predicate: that of the decision that led here.
        """

    def sync(self, pairs: Sequence[tuple], sync: Any) -> None:
        """Assign `sync(fast, slow)` to both of each pair.

        Args:
            sync: a `keras_lookahead_lazy._lookahead.Sync`. A backend may compute the
                same in place, from its `alpha`.
        """

    def sync_rows(
        self, group: tuple[Any, Any, Any], is_moved: Callable[[Any], Any], sync: Any
    ) -> None:
        """`sync` of one pair, in the rows that have moved.

        Args:
            group: fast weights, slow weights, the update that moved each row last.
            is_moved: gives a bool vector for the last of these.
        """

    # The rest

    def check_distribution(self, variables: Sequence[Any]) -> None:
        """Raise `ValueError` where replicas do not make each update together.

        Args:
            variables: the weights to train.
        """

    def apply(
        self,
        optimizer: keras.Optimizer,
        grads: list,
        variables: list | None,
        written: list[keras.Variable],
    ) -> None:
        """`optimizer.apply`.

        Args:
            written: variables of a wrapper that the step writes. JAX's gradient
                accumulation chooses between old and new values, so it has to know
                them.
        """

    def is_recording(self) -> bool:
        """Whether operations are recorded, or work on values that are handed in."""

    def store_state(self, model: keras.Model) -> None:
        """Give the variables what a training that goes on keeps in arrays."""

    def outside_graph(self) -> AbstractContextManager:
        """A context in which operations run at once, also while others are recorded."""

    def keeping_random_state(self) -> AbstractContextManager:
        """A context in which going through data takes no random numbers from others."""


if TYPE_CHECKING:
    from keras_lookahead_lazy._backend import jax, tensorflow, torch

    _implementations: list[Engine] = [tensorflow, jax, torch]
    engine: Engine = _implementations[0]
elif keras.backend.backend() in SUPPORTED:
    engine = importlib.import_module(f"{__name__}.{keras.backend.backend()}")
else:
    engine = None


def check_backend() -> None:
    """Raise `ValueError` on a Keras backend that cannot train."""
    if engine is None:
        raise ValueError(
            "keras_lookahead_lazy supports the backends "
            f"{', '.join(SUPPORTED)}. Keras runs on "
            f"{keras.backend.backend()!r}. Set the environment variable "
            "KERAS_BACKEND to one of those before you import Keras."
        )
