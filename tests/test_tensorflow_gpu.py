"""TensorFlow: every operation of a train step has a GPU kernel for its types.

The `tensorflow` wheel knows its kernels without a GPU; `tensorflow-cpu` has none. What
has no kernel for a GPU runs on the host, and a variable that it works on stays there.
"""

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import keras
import pytest
from harness import BACKEND

from keras_lookahead_lazy import LazyOptimizer, Lookahead

if BACKEND != "tensorflow":
    pytest.skip("TensorFlow alone", allow_module_level=True)

import tensorflow as tf
from tensorflow.python.framework import kernels

if not tf.test.is_built_with_cuda():
    REASON = "GPU kernels not checked: this TensorFlow has none (package: tensorflow)"
    warnings.warn(REASON, stacklevel=1)
    pytest.skip(REASON, allow_module_level=True)

VOCABULARY, LENGTH, BATCH = 1000, 4, 8
# What a graph has for its own sake.
OF_A_GRAPH = ("Placeholder", "PartitionedCall", "StatefulPartitionedCall")


def adam(**settings: Any) -> keras.Optimizer:
    return keras.optimizers.Adam(1e-3, **settings)


def lazy(words: keras.layers.Layer, moments: str = "decay", **settings: Any) -> Any:
    return LazyOptimizer(adam(**settings), [words], moments=moments)


def lookahead(inner: keras.Optimizer, inner_state: str = "maintain") -> Lookahead:
    return Lookahead(inner, k=3, inner_state=inner_state)


scaled = keras.optimizers.LossScaleOptimizer
OPTIMIZERS: dict[str, Callable[[keras.layers.Layer], keras.Optimizer]] = {
    "decay": lazy,
    "freeze": lambda words: lazy(words, "freeze"),
    "clipnorm": lambda words: lazy(words, clipnorm=1.0),
    "accumulation": lambda words: lazy(words, gradient_accumulation_steps=2),
    "masked": lambda words: LazyOptimizer(keras.optimizers.Lamb(1e-3), [words]),
    "lookahead": lambda words: lookahead(adam()),
    "lookahead lazy": lambda words: lookahead(lazy(words)),
    "lookahead lazy interpolate": lambda w: lookahead(lazy(w), "interpolate"),
    "lookahead lazy reset": lambda words: lookahead(lazy(words), "reset"),
    "nested": lambda words: lookahead(lookahead(lazy(words))),
    "scaled": lambda words: scaled(lookahead(lazy(words))),
}


def has_kernel(node: Any) -> bool:
    """Whether a GPU's kernel takes the types of an operation.

    Those for "DEFAULT" are for any device: they keep what they work on on the host.
    """

    def takes(kernel: Any) -> bool:
        return all(
            {*(given.list.type or [given.type])} <= {*rule.allowed_values.list.type}
            for rule in kernel.constraint
            for given in [node.attr[rule.name]]
        )

    found = kernels.get_registered_kernels_for_op(node.op).kernel
    return any(k.device_type in ("GPU", "DEFAULT") and takes(k) for k in found)


def described(node: Any) -> str:
    types = {
        name: [tf.as_dtype(t).name for t in given.list.type or [given.type]]
        for name, given in node.attr.items()
        if given.type or given.list.type
    }
    return f"{node.op} {types}"


def nodes(function: Any) -> Iterator[Any]:
    """The operations of a function, and of those that it calls."""
    graph = function.graph.as_graph_def()
    yield from graph.node
    for inside in graph.library.function:
        yield from inside.node_def


def train_step(name: str) -> tuple[keras.Model, Any]:
    words = keras.layers.Embedding(VOCABULARY, 3)
    model = keras.Sequential(
        [
            keras.Input((LENGTH,), dtype="int32"),
            words,
            keras.layers.GlobalAveragePooling1D(),
            keras.layers.Dense(1),
        ]
    )
    model.compile(OPTIMIZERS[name](words), "mse", jit_compile=False)
    model.optimizer.build(model.trainable_variables)
    step = tf.function(lambda x, y: model.train_step((x, y)), autograph=False)
    x = tf.TensorSpec((BATCH, LENGTH), "int32")
    return model, step.get_concrete_function(x, tf.TensorSpec((BATCH, 1)))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_operation_has_a_gpu_kernel(name: str) -> None:
    model, function = train_step(name)
    missing = {
        described(node)
        for node in nodes(function)
        if node.op not in OF_A_GRAPH and not has_kernel(node)
    }
    assert missing == set()
    on_host = [
        variable.path
        for variable in model.optimizer.variables
        if variable.shape and not lies_on_gpu(variable.dtype)
    ]
    assert on_host == []


def lies_on_gpu(dtype: str) -> bool:
    """Whether a variable of this type can lie in a GPU's memory."""
    node = tf.compat.v1.NodeDef(op="VarHandleOp")
    node.attr["dtype"].type = tf.as_dtype(dtype).as_datatype_enum
    return has_kernel(node)


def test_what_has_no_kernel_is_seen() -> None:
    assert lies_on_gpu("int64")
    assert not lies_on_gpu("int32")
    node = tf.compat.v1.NodeDef(op="ResourceScatterUpdate")
    node.attr["Tindices"].type = tf.int64.as_datatype_enum
    node.attr["dtype"].type = tf.int32.as_datatype_enum
    assert not has_kernel(node)
