"""What crosses between replicas in a training step: a program for each engine.

`python -m tests.traffic ENGINE SETTING` prints, in JSON, the operations between the
replicas. The devices are set before TensorFlow or JAX starts, hence programs.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

# Numbers that no other dimension has, nor a quarter of the vocabulary.
VOCABULARY = 60_008
WIDTH = 24
LENGTH = 5
BATCH = 16
LOOK_UPS = BATCH * LENGTH


class Crossing(NamedTuple):
    """An operation between replicas, as one of them sees it.

    Attributes:
        operation: its name in the engine.
        shape: of what is sent, where that is known, else received; `None` stands for
            a length that only the step knows.
        bytes: of that, if known.
    """

    operation: str
    shape: list[int | None]
    bytes: int | None


def crossing(operation: str, shape: list[int | None], item: int) -> Crossing:
    known = [length for length in shape if length is not None]
    size = item * math.prod(known) if len(known) == len(shape) else None
    return Crossing(operation, shape, size)


def compiled_model(setting: str) -> Any:
    """A model whose table is looked up.

    Args:
        setting: "plain"; one of Keras's kinds of clipping; "regularizer", with which
            every row of the table has a gradient.
    """
    import keras

    from keras_lookahead_lazy import LazyOptimizer, Lookahead

    regularizer = "l2" if setting == "regularizer" else None
    clipping = {setting: 1.0} if "clip" in setting else {}
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((LENGTH,), dtype="int32"),
            keras.layers.Embedding(
                VOCABULARY, WIDTH, embeddings_regularizer=regularizer
            ),
            keras.layers.Flatten(),
            keras.layers.Dense(1),
        ]
    )
    adam = keras.optimizers.Adam(0.01, **clipping)
    model.compile(Lookahead(LazyOptimizer(adam), k=3), "mse")
    model.optimizer.build(model.trainable_variables)
    return model


def batch() -> tuple[np.ndarray, np.ndarray]:
    ids = np.random.default_rng(0).integers(VOCABULARY, size=(BATCH, LENGTH))
    return ids.astype("int32"), ids[:, :1].astype("float32")


# JAX: the collectives of the compiled train step


def data_parallel(setting: str) -> list[Crossing]:
    use_devices()
    import keras

    return jax_crossings(setting, keras.distribution.DataParallel())


def model_parallel_rows(setting: str) -> list[Crossing]:
    return model_parallel(setting, ("model", None))


def model_parallel_columns(setting: str) -> list[Crossing]:
    return model_parallel(setting, (None, "model"))


def model_parallel(setting: str, axes: tuple) -> list[Crossing]:
    use_devices()
    from keras import distribution

    mesh = distribution.DeviceMesh((2, 4), ("batch", "model"))
    layouts = distribution.LayoutMap(mesh)
    layouts[".*embeddings"] = axes
    return jax_crossings(
        setting,
        distribution.ModelParallel(layout_map=layouts, batch_dim_name="batch"),
    )


def use_devices() -> None:
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"


def jax_crossings(setting: str, distribution: Any) -> list[Crossing]:
    import jax
    import keras

    from benchmarks import _hlo

    keras.distribution.set_distribution(distribution)
    model = compiled_model(setting)
    model._symbolic_build(data_batch=batch())
    parts = (
        model.trainable_variables,
        model.non_trainable_variables,
        model.optimizer.variables,
        model.metrics_variables,
    )
    state = tuple([variable.value for variable in part] for part in parts)
    data = tuple(
        jax.device_put(array, distribution.get_data_layout(array.shape).backend_layout)
        for array in batch()
    )
    layout = jax.tree.map(lambda array: array.sharding, state)
    note_layouts(model)
    step = jax.jit(model.train_step, donate_argnums=0, out_shardings=(None, layout))
    text = step.lower(state, data).compile().as_text()
    return [
        crossing(each.operation, [*shape], bits // 8)
        for each in _hlo.collectives(_hlo.instructions(text or ""), VOCABULARY)
        for bits, shape in _hlo.arrays(each.shape)
    ]


def note_layouts(model: Any) -> None:
    """As `fit` does up to Keras 3.10, for a train step that is compiled alone."""
    if hasattr(model, "_record_training_state_sharding_spec"):
        model._record_training_state_sharding_spec()


# TensorFlow: the collectives in the graph of the train step


def mirrored(setting: str) -> list[Crossing]:
    import tensorflow as tf

    cpu = tf.config.list_physical_devices("CPU")[0]
    half = tf.config.LogicalDeviceConfiguration()
    tf.config.set_logical_device_configuration(cpu, [half, half])
    return graph_crossings(setting, tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]))


def multi_worker(setting: str) -> list[Crossing]:
    import tensorflow as tf

    return graph_crossings(setting, tf.distribute.MultiWorkerMirroredStrategy())


def graph_crossings(setting: str, strategy: Any) -> list[Crossing]:
    import tensorflow as tf

    with strategy.scope():
        model = compiled_model(setting)
    replicas = strategy.num_replicas_in_sync

    def shares(array: np.ndarray) -> Any:
        return strategy.experimental_distribute_values_from_function(
            lambda context: tf.constant(
                array[context.replica_id_in_sync_group :: replicas]
            )
        )

    @tf.function(autograph=False)
    def step(x: Any, y: Any) -> None:
        strategy.run(model.train_step, args=((x, y),))

    graph = step.get_concrete_function(*map(shares, batch())).graph
    return [
        crossing(each.type, tensor.shape.as_list(), tensor.dtype.size)
        for each in operations(graph, set())
        if each.type.startswith(("Collective", "Nccl"))
        for tensor in each.inputs[:1]  # the others are keys
    ]


def operations(graph: Any, seen: set[str]) -> Iterator[Any]:
    """Those of a graph and of all functions that it calls."""
    yield from graph.get_operations()
    for name, function in graph._functions.items():
        if name not in seen:
            seen.add(name)
            yield from operations(function.graph, seen)


# torch: what the process group was given in a step


def ddp(setting: str) -> list[Crossing]:
    from keras_lookahead_lazy import distributed_data_parallel

    return watched(setting, distributed_data_parallel)


def ddp_alone(setting: str) -> list[Crossing]:
    from torch.nn.parallel import DistributedDataParallel

    return watched(setting, DistributedDataParallel)


def watched(setting: str, replicate: Any) -> list[Crossing]:
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    count = torch.distributed.get_world_size()
    model = compiled_model(setting)
    replica = replicate(model)
    weights = model.trainable_variables
    ids, labels = (torch.tensor(array[rank::count]) for array in batch())

    def step() -> None:
        replica.zero_grad()
        loss = torch.nn.functional.mse_loss(replica(ids), labels) + sum(model.losses)
        loss.backward()
        model.optimizer.apply([w.value.grad for w in weights], weights)

    step()
    step()  # DistributedDataParallel orders its buffers anew.
    found: list[Crossing] = []

    class Collectives(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            if operation.namespace == "c10d":
                found.extend(
                    crossing(operation.__name__, list(each.shape), each.itemsize)
                    for each in tree_leaves(args)
                    if isinstance(each, torch.Tensor)
                )
            return operation(*args, **(kwargs or {}))

    with Collectives():
        step()
    return found


if __name__ == "__main__":
    print(json.dumps(globals()[sys.argv[1]](sys.argv[2])))
