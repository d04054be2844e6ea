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
from typing import Any

import keras
from keras import ops

from keras_lookahead_lazy import _keras
from keras_lookahead_lazy._backend import engine
from keras_lookahead_lazy._keras import chain

# The table and the optimizer that trains it by rows, by the id of the table's variable.
# (A Keras variable cannot be a key, because it compares by value.)
_optimizers: dict[int, tuple[weakref.ref, weakref.ref]] = {}


def look_up_by_rows(optimizer: keras.Optimizer, tables: list[keras.Variable]) -> None:
    """Look up `tables` by rows from now on, for as long as `optimizer` lives."""
    for table in tables:
        forget = functools.partial(_forget, id(table))
        _optimizers[id(table)] = weakref.ref(table, forget), weakref.ref(optimizer)
    if tables:
        _keras.replace_method(keras.layers.Embedding, "call", _call_by_rows)


def _forget(key: int, _: weakref.ref) -> None:
    _optimizers.pop(key, None)


def _call_by_rows(call: Any) -> Any:
    def call_by_rows(self: keras.layers.Embedding, inputs: Any) -> Any:
        # A subclass may override this property to return something else.
        is_own = type(self).embeddings is not keras.layers.Embedding.embeddings
        table = None if is_own else _keras.looked_up_table(self)
        if not _is_by_rows(table):
            return call(self, inputs)
        ids = inputs
        if keras.backend.standardize_dtype(ids.dtype) not in ("int32", "int64"):
            ids = ops.cast(ids, "int32")
        rows = _keras.with_lora(self, ids, engine.look_up(table, ids))
        return ops.cast(rows, dtype=self.compute_dtype)

    return call_by_rows


def _is_by_rows(table: Any) -> bool:
    variable, optimizer = _optimizers.get(id(table), (None, None))
    if variable is None or optimizer is None or variable() is not table:
        return False
    optimizer = optimizer()
    if optimizer is None:
        return False
    of_model = getattr(_keras.called_model(), "optimizer", None)
    return of_model is None or any(each is optimizer for each in chain(of_model))
