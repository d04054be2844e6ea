"""Several processes of JAX, with a table that is divided between them."""

import json
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from harness import BACKEND, environment

from examples.distributed._task import free_port
from keras_lookahead_lazy import LazyOptimizer, Lookahead


@pytest.mark.slow
@pytest.mark.skipif(BACKEND != "jax", reason="keras.distribution is JAX's")
@pytest.mark.skipif(
    keras.__version__ < "3.11", reason="fit refused arrays with several processes"
)
def test_insight_and_distance():
    """What they tell is what one process with the whole table tells."""
    program = Path(__file__).with_name("divided_between_processes.py")
    port = str(free_port())
    processes = [
        subprocess.Popen(
            [sys.executable, program, str(rank), port],
            cwd=program.parents[1],
            env=environment(one_backend=True),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    printed = [process.communicate(timeout=300) for process in processes]
    for process, (_, errors) in zip(processes, printed, strict=True):
        assert process.returncode == 0, errors
    found = json.loads(printed[0][0].splitlines()[-1])

    rng = np.random.default_rng(0)
    model = keras.Sequential(
        [
            keras.Input((4,), dtype="int32"),
            keras.layers.Embedding(64, 3),
            keras.layers.Flatten(),
            keras.layers.Dense(1),
        ]
    )
    model.set_weights([rng.normal(size=w.shape) for w in model.weights])
    optimizer = Lookahead(LazyOptimizer(keras.optimizers.Adam(0.01)), k=5)
    model.compile(optimizer, "mse")
    x = rng.integers(0, 20, (28, 4)).astype("int32")
    y = rng.normal(size=(28, 1)).astype("float32")
    model.fit(x, y, batch_size=4, shuffle=False, verbose=0)
    assert found["sampled"] == 1 - found["never_sampled"] == len(np.unique(x)) / 64
    assert found["updates_since_sync"] == 2
    for distance in (found["distance"], found["fast_slow_distance"]):
        np.testing.assert_allclose(distance, optimizer.distance(), rtol=1e-4)
    sums = [keras.ops.convert_to_numpy(keras.ops.sum(w)) for w in model.weights[1:]]
    np.testing.assert_allclose(found["sums"], sums, rtol=1e-4)
