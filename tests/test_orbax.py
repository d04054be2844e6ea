"""Training that is resumed from `keras.callbacks.OrbaxCheckpoint`, bit for bit."""

import warnings
from importlib.util import find_spec

import keras
import pytest
from harness import (
    assert_same_bits,
    make_data,
    make_two_tables,
    sgd,
    state,
)

from keras_lookahead_lazy import LazyOptimizer, Lookahead

if find_spec("orbax") is None or not hasattr(keras.callbacks, "OrbaxCheckpoint"):
    reason = "OrbaxCheckpoint not tested: no orbax-checkpoint (extra: orbax)"
    warnings.warn(reason, stacklevel=1)
    pytest.skip(reason, allow_module_level=True)


def adam():
    return keras.optimizers.Adam(0.05, amsgrad=True)


CASES = {
    "plain": adam,
    "interpolate": lambda: Lookahead(adam(), 5, 0.3, "interpolate"),
    "reset": lambda: Lookahead(sgd(), 5, inner_state="reset"),
    "decay": lambda: LazyOptimizer(adam()),
    "freeze": lambda: LazyOptimizer(sgd(), moments="freeze"),
    "both": lambda: Lookahead(LazyOptimizer(adam()), 5, 0.7, "interpolate"),
    "outer": lambda: Lookahead(LazyOptimizer(adam()), 5, outer_optimizer=sgd()),
    "twice": lambda: Lookahead(Lookahead(LazyOptimizer(sgd()), 3), 2, 0.8),
}


def fit(model, **arguments):
    """Seven steps an epoch: in the middle of every cycle."""
    x, y = make_data(7 * 4)
    model.fit(x, y, batch_size=4, shuffle=False, verbose=0, **arguments)


def make_named(case):
    """An optimizer with the name that it has in a new process."""
    keras.backend.clear_session()
    return CASES[case]()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Sharding info not provided")
@pytest.mark.parametrize("case", CASES)
def test_resume(case, tmp_path):
    """By `load_model`, by `load_weights`, and by the model that was saved."""
    whole = make_two_tables(make_named(case), 16)
    fit(whole, epochs=2)
    saved = make_two_tables(make_named(case), 16)
    fit(saved, callbacks=[keras.callbacks.OrbaxCheckpoint(tmp_path)])
    loaded = keras.saving.load_model(tmp_path)
    made_again = make_two_tables(make_named(case), 16)
    made_again.optimizer.build(made_again.trainable_variables)
    made_again.load_weights(tmp_path)
    for model in (saved, loaded, made_again):
        fit(model)
        assert_same_bits(state(model), state(whole))
