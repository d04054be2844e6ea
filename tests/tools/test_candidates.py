"""Optimizers that are tried in experiments, against their equations in float64."""

import keras
import numpy as np
import pytest

from experiments import _candidates
from keras_lookahead_lazy import LazyOptimizer

ROWS, STEPS, RATE = 5, 12, 0.01
BETA_1, BETA_2, EPSILON = 0.9, 0.999, 1e-7


def gradients():
    """Of rows that are sampled in every step, in some, and never."""
    random = np.random.default_rng(0)
    sampled = random.random((STEPS, ROWS)) < [1, 0.5, 0.3, 0.2, 0]
    return random.normal(size=(STEPS, ROWS, 2)) * sampled[..., None]


def trained(inner, start, updates_before=0):
    """The table after the steps, by `LazyOptimizer` around `inner`."""
    table = keras.layers.Embedding(ROWS, 2)
    table.build()
    table.embeddings.assign(start)
    optimizer = LazyOptimizer(inner, [table], moments="freeze")
    optimizer.build([table.embeddings])
    assert set(optimizer.step_forms.values()) == {"rows (expected)"}
    inner.iterations.assign(updates_before)
    for gradient in gradients():
        tensor = keras.ops.convert_to_tensor(gradient.astype("float32"))
        optimizer.apply([tensor], [table.embeddings])
    return keras.ops.convert_to_numpy(table.embeddings)


@pytest.fixture
def start():
    return np.random.default_rng(1).normal(size=(ROWS, 2))


def adam(weight, m, v, gradient, step):
    m[:] = BETA_1 * m + (1 - BETA_1) * gradient
    v[:] = BETA_2 * v + (1 - BETA_2) * gradient**2
    corrected = m / (1 - BETA_1**step), v / (1 - BETA_2**step)
    weight -= RATE * corrected[0] / (np.sqrt(corrected[1]) + EPSILON)


def test_bias_is_corrected_by_the_samples_of_a_row(start):
    weights = start.copy()
    for row in range(ROWS):
        own = [gradient[row] for gradient in gradients() if gradient[row].any()]
        m, v = np.zeros(2), np.zeros(2)
        for step, gradient in enumerate(own, 1):
            adam(weights[row], m, v, gradient, step)
    found = trained(_candidates.CorrectedAdam(RATE), start)
    np.testing.assert_allclose(found, weights, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(found[-1], start[-1].astype("float32"))
    plain = trained(keras.optimizers.Adam(RATE), start)
    assert np.abs(found - plain).max() > 1e-3


def test_a_row_is_paid_what_it_missed(start):
    """After many updates, where the bias is gone, Adam's own steps, until the last."""
    updates_before = 100_000
    weights, m, v = start.copy(), np.zeros((ROWS, 2)), np.zeros((ROWS, 2))
    at_last_sample = start.copy()
    for number, gradient in enumerate(gradients()):
        adam(weights, m, v, gradient, updates_before + number + 1)
        sampled = gradient.any(axis=1)
        at_last_sample[sampled] = weights[sampled]
    found = trained(_candidates.ReplayAdam(RATE), start, updates_before)
    np.testing.assert_allclose(found, at_last_sample, rtol=1e-4, atol=1e-5)
    plain = trained(keras.optimizers.Adam(RATE), start, updates_before)
    assert np.abs(found - plain).max() > 1e-2


def test_rows_decay_for_the_steps_they_missed(start):
    decay = 0.5
    weights = start.copy()
    for row in range(ROWS):
        m, v, last = np.zeros(2), np.zeros(2), None
        for step, gradient in enumerate(gradients()[:, row], 1):
            if not gradient.any():
                continue
            steps = step - last if last else 1  # a first sample decays once
            last = step
            weights[row] *= (1 - RATE * decay) ** steps
            adam(weights[row], m, v, gradient, step)
    found = trained(_candidates.MissedDecayAdamW(RATE, weight_decay=decay), start)
    np.testing.assert_allclose(found, weights, rtol=1e-4, atol=1e-6)
    plain = trained(keras.optimizers.AdamW(RATE, weight_decay=decay), start)
    assert np.abs(found - plain).max() > 1e-3
