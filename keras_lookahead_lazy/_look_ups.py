"""How `keras.layers.Embedding` looks up a table that a `LazyOptimizer` trains.

Keras reads the whole table and takes rows of that, so the gradient is an array of the
table's shape (JAX, torch), or the table is copied to be read (TensorFlow). Here the
rows are read from the table, in a way that lets the optimizer know which.

Only tables of a built `LazyOptimizer` are looked up like this, and only in a model
that has no other optimizer.
"""

from __future__ import annotations

import functools
import weakref
from typing import Any

import keras
from keras import ops

from keras_lookahead_lazy import _private
from keras_lookahead_lazy._backend import engine
from keras_lookahead_lazy._wrapper import chain

# The optimizer that trains a table by rows, by the id of the table's variable. (A
# Keras variable cannot be a key: it compares by value.)
_optimizers: dict[int, tuple[weakref.ref, weakref.ref]] = {}


def look_up_by_rows(optimizer: keras.Optimizer, tables: list[keras.Variable]) -> None:
    """Look up `tables` by rows from now on, for as long as `optimizer` lives."""
    for table in tables:
        forget = functools.partial(_forget, id(table))
        _optimizers[id(table)] = weakref.ref(table, forget), weakref.ref(optimizer)
    if tables and not hasattr(keras.layers.Embedding.call, "__wrapped__"):
        keras.layers.Embedding.call = _call_by_rows(keras.layers.Embedding.call)


def _forget(key: int, _: weakref.ref) -> None:
    _optimizers.pop(key, None)


def _call_by_rows(call: Any) -> Any:
    @functools.wraps(call)
    def call_by_rows(self: keras.layers.Embedding, inputs: Any) -> Any:
        table = self.lora_embeddings_a if self.lora_enabled else self._embeddings
        if not _is_by_rows(table) or not engine.is_dense(inputs):
            return call(self, inputs)
        ids = inputs
        if keras.backend.standardize_dtype(ids.dtype) not in ("int32", "int64"):
            ids = ops.cast(ids, "int32")
        rows = engine.look_up(table, ids)
        if self.lora_enabled:
            # Keras has `lora_alpha` since 3.11.
            scale = getattr(self, "lora_alpha", self.lora_rank) / self.lora_rank
            rows = ops.take(self._embeddings, ids, axis=0) + scale * ops.matmul(
                rows, self.lora_embeddings_b
            )
        return ops.cast(rows, dtype=self.compute_dtype)

    return call_by_rows


def _is_by_rows(table: Any) -> bool:
    variable, optimizer = _optimizers.get(id(table), (None, None))
    if variable is None or optimizer is None or variable() is not table:
        return False
    optimizer = optimizer()
    if optimizer is None:
        return False
    of_model = getattr(_private.called_model(), "optimizer", None)
    return of_model is None or any(each is optimizer for each in chain(of_model))
