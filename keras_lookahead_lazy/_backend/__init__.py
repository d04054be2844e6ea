"""The contract of a backend, which each module in this folder implements.

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
        indices: Int tensor of shape `(n,)`, the rows. They may repeat, with the same
            gradient each time. `None` stands for every row of the table.
        gradient: Tensor of shape `(n, ...)`, the gradient of each row, with duplicates
            already summed.
        sampled: Bool tensor of shape `(n,)`, whether the gradient of a row has a
            nonzero entry. `None` if all have one.
    """

    indices: Any
    gradient: Any
    sampled: Any


OTHER_PARTS = (
    "the gradient is not only that of lookups: the table is also used in another way, "
    "your own loop changed the gradient, or lookups are inside scan, vmap, remat or "
    "checkpoint"
)
ONLY_ON_TORCH = (
    "distributed_data_parallel is for torch, and Keras runs on {}. Use "
    "tf.distribute.MirroredStrategy on TensorFlow, or keras.distribution on JAX."
)
FEW_ROWS = "the table has too few rows for so many lookups"


class RowGradient(NamedTuple):
    """The gradient of a table that was used only for lookups.

    Attributes:
        sums: Tensor of shape `(n, ...)`: first the gradients of distinct rows, then
            zeros. If shapes have to be fixed, n is the number of lookups, otherwise
            the number of distinct rows.
        indices: Int tensor of shape `(n,)`, the ids of the rows.
        position: Int tensor of shape `(n,)`, the position of each id's sum. `None` if
            it is the id's own position.
    """

    sums: Any
    indices: Any
    position: Any

    def by_row(self) -> Any:
        """Return the sum for each of `indices`."""
        if self.position is None:
            return self.sums
        return ops.take(self.sums, self.position, axis=0)


class MovedTable(NamedTuple):
    """A table of which the rows that have moved get new values.

    Attributes:
        variables: The fast weights, the slow weights, and what else has an entry for
            each row.
        last_update: Int variable of shape `(vocabulary,)`, the update that last moved
            each row.
        is_moved: Returns which rows have moved, for the value of `last_update`.
        function: Returns the rows' new values for their old ones.
        place: The engine's `placement` of the table.
    """

    variables: tuple[Any, ...]
    last_update: Any
    is_moved: Callable[[Any], Any]
    function: Callable[..., tuple]
    place: Any


class Engine(Protocol):
    """A backend. `variable` is a Keras variable, and `values` are native tensors."""

    # Whether variables hold the state while `fit` runs. If not, separate arrays do.
    VARIABLES_HOLD_STATE: bool
    # The dtype of update numbers and of lists of rows.
    INTEGERS: str

    # Lookups and their gradients

    def look_up(self, table: keras.Variable, ids: Any, dtype: str, place: Any) -> Any:
        """Read rows of a table, in `dtype`, so that its gradient is known by rows.

        Where a sparse tensor has no id, Keras looks up row 0, and so does this.
        """

    def takes_rows(self, gradient: Any) -> bool:
        """Return whether Keras's optimizers, too, know such a gradient by rows."""

    def row_gradient(
        self, gradient: Any, table: keras.Variable, place: Any, is_listed: bool
    ) -> RowGradient | str:
        """Return the lookups that a gradient consists of.

        Args:
            gradient: of the table.
            table: its variable.
            place: The table's `placement`.
            is_listed: Whether a list will remember the rows, on every device.

        Returns:
            The reason, as text, if the gradient has other parts or if a step on the
            whole table is better.
        """

    def fixed_length(self, indices: Any) -> int | None:
        """Return how many rows each step has, or `None` if steps differ."""

    def may_join(self, gradient: Any, table: Any) -> bool:
        """Return whether a step on this table works on few enough rows to join them.

        Args:
            gradient: of the table, in any form.
            table: the table's variable.
        """

    def rows_to_join(self, gradient: Any, table: Any) -> tuple[Any, Any]:
        """Return the rows of a gradient that can be joined, and the sum for each row.

        Returns:
            Their indices, `None` for every row; and the gradient.
        """

    def sampled(self, gradient: Any) -> Any:
        """Return which rows of a gradient are not all zero; `None` if no row is."""

    def step_in_rounds(
        self,
        gradient: Any,
        variables: Sequence[Any],
        place: Any,
        step: Callable[[Any, Any], None],
    ) -> None:
        """Call `step(gradient, variables)`, in chunks of rows if there are many.

        If devices divide the rows between them, each device calls it for its own rows.

        Args:
            gradient: The gradient of a table, in any form.
            variables: Replicas of the table and of its other variables.
            place: The table's `placement`.
        """

    def for_keras(self, gradient: Any) -> Any:
        """Return a gradient in a form that Keras's optimizers accept."""

    def sum_duplicates(self, gradient: Any) -> Any:
        """Return a gradient with the duplicates of each row summed."""

    def on_values(self, function: Callable[[list], list], gradients: list) -> list:
        """Call a function of gradients on the values of those from `sum_duplicates`."""

    # Rows of a table, and of what is kept for it

    def replica(self, variable: Any, like: Any) -> Any:
        """Return the replica of `variable` on the device of the replica `like`."""

    def find_rows(
        self, gradient: Any, variables: Sequence[Any], every_row: bool
    ) -> tuple[Rows, list]:
        """Find the rows of a table that its gradient concerns, and read them.

        Args:
            gradient: A dense or sparse gradient.
            variables: Replicas of the table and of its other variables.
            every_row: Whether the step needs the whole table.

        Returns:
            The rows, and their values in each of the variables.
        """

    def mark_idle(self, indices: Any, gradient: Any) -> Rows:
        """Return looked-up rows, with those marked whose gradient is all zero."""

    def read_rows(self, variable: Any, indices: Any) -> Any:
        """Return rows of a replica, or all rows if `indices` is `None`."""

    def write_rows(
        self, variables: Sequence[Any], indices: Any, values: Sequence[Any]
    ) -> None:
        """Assign the same rows of some replicas, or all rows if `indices` is `None`."""

    def split(self, joined: Any, parts: Sequence[Any]) -> list:
        """Split joined rows into parts as long as the given ones."""

    def placement(self, variable: keras.Variable) -> Any:
        """Return a placement; rows of tables with equal placements may be joined.

        This can be called in `build`, not in a step.
        """

    def write_list(self, variable: Any, count: Any, values: Any) -> Any:
        """Write ids after the first `count` of a list, as far as there is room.

        Returns:
            The number of ids.
        """

    def listed_rows(
        self,
        variable: keras.Variable,
        ids: keras.Variable,
        count: Any,
        size: int,
        place: Any,
    ) -> RowGradient:
        """Return the rows of a variable for the first `count` ids of a list.

        Args:
            size: An upper bound for `count`.
            place: The `placement` of the table, and of this variable.
        """

    def clear_rows(
        self, variable: keras.Variable, rows: RowGradient, place: Any
    ) -> None:
        """Set the rows that were read as `rows` to zero."""

    def layout_like(self, variable: keras.Variable, axes: int) -> Any:
        """Return a layout for what has the first axes of a variable, or `None`.

        Without a layout, a name that contains the variable's could match the user's
        `LayoutMap`.
        """

    # Counting and branching in a step, which may be compiled

    def num_replicas(self) -> int:
        """Return how many replicas run a step, each with a part of the gradients."""

    def on_every_replica(self, predicate: Any) -> Any:
        """Return whether a predicate is true on each of the replicas of a step."""

    def read_count(self, variable: Any) -> Any:
        """Return the value of a counter without waiting for an accelerator."""

    def write_count(self, variable: keras.Variable, count: Any) -> None:
        """Assign a counter."""

    def once_known(self, gradients: Sequence[Any], predicate: Any) -> Any:
        """Return the predicate, made to depend on the gradients.

        Writes that follow it then happen after the forward pass has read the weights.
        Otherwise XLA would copy the weights in every step.
        """

    def run_if(
        self, predicate: Any, function: Callable[[], None], variables: Sequence[Any]
    ) -> None:
        """Call `function` if `predicate` is true, decided on the device.

        Args:
            predicate: Scalar bool.
            variables: The variables that the function may assign.
        """

    # What a decision may lead to

    def update(self, group: tuple, function: Callable[..., tuple]) -> None:
        """Assign `function` of their values to some variables."""

    def back_up(self, pairs: Sequence[tuple], predicate: Any) -> None:
        """slow := fast for pairs `(fast, slow)`.

        Args:
            predicate: The predicate of the `run_if` that called this.
        """

    def sync(self, pairs: Sequence[tuple], sync: Any) -> None:
        """Assign `sync(fast, slow)` to both of each pair.

        Args:
            sync: A `keras_lookahead_lazy._lookahead.Sync`. A backend may compute the
                same in place, from its `alpha`.
        """

    def update_rows(self, tables: Sequence[MovedTable]) -> None:
        """Assign new values to the rows of some tables that have moved.

        Args:
            tables: At least one. All have the same `place`.
        """

    # The rest

    def check_processes(self) -> None:
        """Raise `ValueError` if `replicate` cannot be called here."""

    def replicate(
        self, model: keras.Model, tables: list[keras.Variable], settings: dict[str, Any]
    ) -> Any:
        """Return torch's replica of a model, whose tables are exchanged by rows."""

    def check_distribution(self, variables: Sequence[Any]) -> None:
        """Raise `ValueError` if replicas do not make each update together.

        Args:
            variables: The weights to train.
        """

    def apply(
        self,
        optimizer: keras.Optimizer,
        grads: list,
        variables: list | None,
        assigned: list[keras.Variable],
    ) -> None:
        """Call `optimizer.apply`.

        Args:
            assigned: Variables of a wrapper that the step assigns. On JAX, gradient
                accumulation chooses between old and new values, so it has to know
                them.
        """

    def uncompiled(self, function: Callable, *arguments: Any) -> Any:
        """Call a function in a way that `torch.compile` does not trace it.

        torch.compile would trace it again for each value of a counter on the host, and
        in what it traces, it gives a table a dense gradient. The steps of Keras's own
        optimizers inside are compiled by themselves.
        """

    def is_recording(self) -> bool:
        """Return whether operations are traced, or work on values passed in."""

    def store_state(self, model: keras.Model) -> None:
        """Write the state of a running training from arrays to the variables."""

    def outside_graph(self) -> AbstractContextManager:
        """Return a context in which operations run at once, also during tracing."""

    def keeping_random_state(self) -> AbstractContextManager:
        """Return a context in which reading data does not change the random state."""


if TYPE_CHECKING:
    from keras_lookahead_lazy._backend import jax, tensorflow, torch

    _implementations: list[Engine] = [tensorflow, jax, torch]
    engine: Engine = _implementations[0]
elif keras.backend.backend() in SUPPORTED:
    engine = importlib.import_module(f"{__name__}.{keras.backend.backend()}")
else:
    engine = None


def check_backend() -> None:
    """Raise `ValueError` if Keras runs on a backend that is not supported."""
    if engine is None:
        raise ValueError(
            "keras_lookahead_lazy supports the backends "
            f"{', '.join(SUPPORTED)}. Keras runs on "
            f"{keras.backend.backend()!r}. Set the environment variable "
            "KERAS_BACKEND to one of those before you import Keras."
        )
