"""Replicas in torch processes train as one process does on the whole batch."""

import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from harness import BACKEND, environment

from examples.distributed._task import free_port
from keras_lookahead_lazy import LazyOptimizer, distributed_data_parallel

PROGRAM = Path(__file__).parent / "replicated_by_ddp.py"


def make_model(optimizer=None):
    layers = [keras.Input((2,), dtype="int32"), keras.layers.Embedding(9, 2)]
    model = keras.Sequential(layers)
    if optimizer is not None:
        model.compile(optimizer=optimizer, loss="mse")
    return model


@pytest.mark.skipif(BACKEND != "torch", reason="replicas in torch processes")
def test_two_processes_train_as_one(tmp_path):
    shared = {
        **environment(one_backend=True),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": "2",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    paths = [tmp_path / f"{rank}.npz" for rank in range(2)]
    processes = [
        subprocess.Popen(
            [sys.executable, PROGRAM, path], env={**shared, "RANK": str(rank)}
        )
        for rank, path in enumerate(paths)
    ]
    assert [process.wait(timeout=300) for process in processes] == [0, 0]
    import replicated_by_ddp

    alone = replicated_by_ddp.make_model()
    alone.optimizer.build(alone.trainable_variables)
    expected = replicated_by_ddp.train(alone, alone, rank=0, count=1)
    first, second = (list(np.load(path).values()) for path in paths)
    for weight, other, reference in zip(first, second, expected, strict=True):
        np.testing.assert_array_equal(weight, other)
        np.testing.assert_allclose(weight, reference, rtol=1e-4, atol=1e-6)


@pytest.mark.skipif(BACKEND == "torch", reason="torch has it")
def test_other_backends_are_told_what_to_use():
    with pytest.raises(ValueError, match=r"is for torch.*MirroredStrategy"):
        distributed_data_parallel(make_model(LazyOptimizer("adam")))


@pytest.mark.skipif(BACKEND != "torch", reason="replicas in torch processes")
@pytest.mark.parametrize(
    ("model", "error", "says"),
    [
        (lambda: "model", TypeError, "the model to replicate"),
        (make_model, ValueError, r"is not compiled with a LazyOptimizer.*LazyOpt"),
        (lambda: make_model("adam"), ValueError, r"torch\.nn\.parallel"),
        (
            lambda: keras.Sequential([keras.layers.Embedding(9, 2)]),
            ValueError,
            "is not compiled",
        ),
        (lambda: make_model(LazyOptimizer("adam")), ValueError, "init_process_group"),
    ],
)
def test_errors_come_before_any_change(model, error, says):
    model = model()
    with pytest.raises(error, match=says):
        distributed_data_parallel(model)
    if isinstance(getattr(model, "optimizer", None), LazyOptimizer):
        assert not model.optimizer.built


@pytest.mark.skipif(BACKEND != "torch", reason="replicas in torch processes")
def test_a_model_that_is_not_built():
    model = keras.Sequential([keras.layers.Embedding(9, 2)])
    model.compile(optimizer=LazyOptimizer("adam"), loss="mse")
    with pytest.raises(ValueError, match=r"is not built.*model\.build"):
        distributed_data_parallel(model)
