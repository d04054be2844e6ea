"""Replicas in torch processes."""

from __future__ import annotations

from typing import Any

import keras

from keras_lookahead_lazy._arguments import check_type
from keras_lookahead_lazy._backend import engine
from keras_lookahead_lazy._keras import chain
from keras_lookahead_lazy._lazy import LazyOptimizer


def distributed_data_parallel(model: keras.Model, **settings: Any) -> Any:
    """Replicate a model in torch processes that exchange rows of embedding tables.

    torch's `DistributedDataParallel` averages the gradients of all processes in the
    backward pass. By itself it exchanges the gradient of every row of a table. Here the
    processes exchange only the rows that they looked up. All other weights are left to
    `DistributedDataParallel`.

    Every process has to look up each table in every step. The processes first exchange
    how many rows they looked up, which makes a GPU wait for the host.

    Example:

    >>> import keras
    >>> from keras_lookahead_lazy import LazyOptimizer, distributed_data_parallel
    >>> words = keras.layers.Embedding(20000, 128)
    >>> inputs = keras.Input((9,), dtype="int32")
    >>> model = keras.Sequential([inputs, words, keras.layers.Dense(1)])
    >>> model.compile(optimizer=LazyOptimizer("adam"), loss="mse")
    >>> if keras.config.backend() == "torch":
    ...     import torch.distributed as processes
    ...     store = processes.HashStore()  # one process, for this example
    ...     processes.init_process_group("gloo", store=store, rank=0, world_size=1)
    ...     replica = distributed_data_parallel(model)
    ...     processes.destroy_process_group()

    Args:
        model: A built model, compiled with a `LazyOptimizer`, possibly inside
            `Lookahead`.
        **settings: Arguments of `torch.nn.parallel.DistributedDataParallel`, such as
            `device_ids`.

    Returns:
        The `torch.nn.parallel.DistributedDataParallel`. Call it for the forward pass;
        after `backward()`, apply the gradients with `model.optimizer`.

    Raises:
        TypeError: If `model` is not a Keras model.
        ValueError: If Keras does not run on torch, if the model is not built or not
            compiled with a `LazyOptimizer`, or if `torch.distributed` is not
            initialized.
    """
    check_type("model", model, keras.Model, "the model to replicate")
    optimizers = chain(getattr(model, "optimizer", None))
    lazy = next((o for o in optimizers if isinstance(o, LazyOptimizer)), None)
    if lazy is None:
        raise ValueError(
            f"The model {model.name!r} is not compiled with a LazyOptimizer. Compile "
            "it with LazyOptimizer(...) first. With another optimizer, use "
            "torch.nn.parallel.DistributedDataParallel."
        )
    if not model.built:
        raise ValueError(
            f"The model {model.name!r} is not built, so it has no weights to "
            "replicate. Call model.build(...) first, or call it on a batch."
        )
    engine.check_processes()
    # From here on, the gradient of a table that is only looked up consists of rows.
    model.optimizer.build(model.trainable_variables)
    return engine.replicate(model, lazy.tables_by_rows(), settings)
