"""n replicas on a global batch train as one replica does on the same batch."""

import os
import subprocess
import sys

import keras
import numpy as np
import pytest

from keras_lookahead_lazy import LazyOptimizer, Lookahead


def fit(strategy, moments, inner_state):
    rng = np.random.default_rng(0)
    x = np.minimum(rng.zipf(1.4, (160, 5)) - 1, 29)
    y = rng.normal(size=(160, 1)).astype("float32")
    keras.utils.set_random_seed(0)
    with strategy.scope():
        model = keras.Sequential(
            [
                keras.Input((5,)),
                keras.layers.Embedding(30, 4),
                keras.layers.Flatten(),
                keras.layers.Dense(1),
            ]
        )
        lazy = LazyOptimizer(keras.optimizers.Adam(0.01), moments=moments)
        model.compile(Lookahead(lazy, k=3, inner_state=inner_state), "mse")
    model.fit(x, y, batch_size=16, epochs=5, shuffle=False, verbose=0)
    return model


def mirrored(moments, inner_state):
    """50 steps on one replica and on two: run where TensorFlow is still fresh."""
    import tensorflow as tf

    cpu = tf.config.list_physical_devices("CPU")[0]
    half = tf.config.LogicalDeviceConfiguration()
    tf.config.set_logical_device_configuration(cpu, [half, half])
    two = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    ours = fit(two, moments, inner_state)
    alone = fit(tf.distribute.get_strategy(), moments, inner_state)
    for weight, reference in zip(ours.weights, alone.weights, strict=True):
        first, second = two.experimental_local_results(weight.value)
        np.testing.assert_array_equal(first.numpy(), second.numpy())
        error = np.max(np.abs(first.numpy() - reference.numpy()))
        assert error < 1e-5 * np.max(np.abs(reference.numpy())), (weight.path, error)


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="tf.distribute")
@pytest.mark.parametrize(
    ("moments", "inner_state"),
    [("decay", "maintain"), ("freeze", "interpolate"), ("decay", "reset")],
)
def test_mirrored_strategy(moments, inner_state):
    done = subprocess.run(
        [sys.executable, __file__, moments, inner_state],
        env=os.environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


if __name__ == "__main__":
    mirrored(*sys.argv[1:])
