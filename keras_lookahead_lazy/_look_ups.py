"""Change how `keras.layers.Embedding` reads a table that a `LazyOptimizer` trains.

Keras reads the whole table and then takes rows of it, so the gradient is an array of
the table's shape (JAX, torch), or the table is copied (TensorFlow). The lookup here
reads only the rows, in a way that tells the optimizer which rows they are.

This applies only to tables of a built `LazyOptimizer`, and only in models without
another optimizer.
"""

from __future__ import annotations

import functools
import weakref
from dataclasses import dataclass
from typing import Any

import keras
from keras import ops

from keras_lookahead_lazy import _keras
from keras_lookahead_lazy._backend import engine
from keras_lookahead_lazy._keras import chain


@dataclass(frozen=True)
class _TrainedTable:
    """A table, the optimizer that trains it by rows, and where it is stored."""

    variable: weakref.ref
    optimizer: weakref.ref
    place: Any


# By the id of the table's variable. (A variable cannot be a key: it compares by value.)
_trained: dict[int, _TrainedTable] = {}


def look_up_by_rows(optimizer: keras.Optimizer, tables: list[keras.Variable]) -> None:
    """Look up `tables` by rows from now on, for as long as `optimizer` lives."""
    for table in tables:
        variable = weakref.ref(table, functools.partial(_forget, id(table)))
        place = engine.placement(table)
        _trained[id(table)] = _TrainedTable(variable, weakref.ref(optimizer), place)
    if tables:
        _keras.replace_method(keras.layers.Embedding, "call", _call_by_rows)


def _forget(key: int, _: weakref.ref) -> None:
    _trained.pop(key, None)


def _call_by_rows(call: Any) -> Any:
    def call_by_rows(self: keras.layers.Embedding, inputs: Any) -> Any:
        # A subclass may override this property to return something else.
        is_own = type(self).embeddings is not keras.layers.Embedding.embeddings
        table = None if is_own else _keras.looked_up_table(self)
        trained = _trained.get(id(table))
        if trained is None or not _is_by_rows(table, trained):
            return call(self, inputs)
        ids = inputs
        if keras.backend.standardize_dtype(ids.dtype) not in ("int32", "int64"):
            ids = ops.cast(ids, "int32")
        rows = engine.look_up(table, ids, self.compute_dtype, trained.place)
        return _keras.with_lora(self, ids, rows)

    return call_by_rows


def _is_by_rows(table: Any, trained: _TrainedTable) -> bool:
    optimizer = trained.optimizer()
    if optimizer is None or trained.variable() is not table:
        return False
    of_model = getattr(_keras.called_model(), "optimizer", None)
    return of_model is None or any(each is optimizer for each in chain(of_model))
