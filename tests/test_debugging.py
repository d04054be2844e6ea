"""Two trainings in two threads, and what backends offer to find faults."""

import contextlib
import threading

import keras
import numpy as np
import pytest
from harness import (
    BACKEND,
    adam,
    assert_same_bits,
    both,
    make_data,
    make_model,
    sgd,
    state,
)

MOMENTS = ["decay", "freeze"]


def train(model, seed):
    x, y = make_data(64, seed)
    model.fit(x, y, batch_size=4, epochs=2, shuffle=False, verbose=0)


def models():
    """Two that differ in all but their shapes."""
    first = make_model(both(adam(), "decay", "interpolate"))
    second = make_model(both(sgd(), "freeze", "interpolate", k=2))
    second.set_weights([-weight for weight in second.get_weights()])
    return first, second


def test_two_threads():
    """Each model ends as it does alone."""
    alone, together = models(), models()
    for seed, model in enumerate(alone):
        train(model, seed)
    start, errors = threading.Barrier(2), []

    def work(model, seed):
        try:
            start.wait()
            train(model, seed)
        except BaseException as error:
            errors.append(error)

    threads = [
        threading.Thread(target=work, args=(model, seed))
        for seed, model in enumerate(together)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    for model, other in zip(together, alone, strict=True):
        assert_same_bits(state(model), state(other))


@contextlib.contextmanager
def jax_setting(name):
    import jax

    before = getattr(jax.config, name)
    jax.config.update(name, True)
    try:
        yield
    finally:
        jax.config.update(name, before)


@contextlib.contextmanager
def torch_determinism():
    import torch

    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def tensorflow_determinism():
    import tensorflow as tf
    from tensorflow.python.framework import config

    tf.config.experimental.enable_op_determinism()
    try:
        yield
    finally:
        config.disable_op_determinism()


CHECKS = {
    "tensorflow": {"enable_op_determinism": tensorflow_determinism},
    "jax": {
        "checking_leaks": lambda: jax_setting("jax_check_tracer_leaks"),
        "debug_nans": lambda: jax_setting("jax_debug_nans"),
    },
    "torch": {"use_deterministic_algorithms": torch_determinism},
}[BACKEND]


@pytest.mark.parametrize("moments", MOMENTS)
@pytest.mark.parametrize("check", CHECKS)
def test_fit_under(check, moments):
    """`fit` runs, and ends where it does without the check."""
    ended = []
    for context in (contextlib.nullcontext, CHECKS[check]):
        model = make_model(both(adam(), moments, "interpolate"))
        with context():
            keras.utils.set_random_seed(0)
            train(model, 0)
        ended.append(state(model))
    assert all(np.isfinite(array).all() for array in ended[0])
    assert_same_bits(*ended)
