"""Training that is killed, files that do not load, disks that are full.

Adam stands beside as the control: what Keras itself does then.
"""

import contextlib
import json
import resource
import warnings
import zipfile

import h5py
import keras
import numpy as np
import pytest
from harness import QUICK, assert_same_bits, make_model, numpy, state
from kill_and_resume import CASES, METHODS, survive
from training_to_kill import OPTIMIZERS, STEPS, SaveWhole, fit

from keras_lookahead_lazy import LazyOptimizer, Lookahead


@pytest.mark.slow
def test_killed_trainings():
    """Each optimizer once, and the ways to save in turn."""
    names = [f"{case}:{METHODS[i % len(METHODS)]}" for i, case in enumerate(CASES)]
    done = survive(names, kills=3, seed=0)
    assert [t for t in done if t.failed] == []
    assert sum(t.kills for t in done) == 3
    assert sum(t.kills_in_saving for t in done) > 0


def test_the_test_above_has_every_case():
    assert list(OPTIMIZERS) == list(CASES)


def filled(case, seed=1, **shape):
    """A model and an optimizer with something in every variable."""
    model = make_model(OPTIMIZERS[case](), **shape)
    model.optimizer.build(model.trainable_variables)
    random = np.random.default_rng(seed)
    for variable in [*model.weights, *model.optimizer.variables]:
        variable.assign(random.integers(1, 9, variable.shape))
    return model


def own_state(model):
    """The wrappers' variables, without those of Keras's optimizer inside."""
    inner = model.optimizer
    while isinstance(inner, (Lookahead, LazyOptimizer)):
        inner = inner.inner_optimizer
    variables = model.optimizer.variables
    return numpy(variables[: len(variables) - len(inner.variables)])


# BackupAndRestore


CONTROL = ["Adam", "both"]


@pytest.mark.parametrize("case", CONTROL)
def test_backup_with_the_metadata_of_the_epoch_before(case, tmp_path):
    """As a kill between its two files leaves them: Keras repeats an epoch."""
    new = OPTIMIZERS[case]
    backup = keras.callbacks.BackupAndRestore(tmp_path, delete_checkpoint=False)
    fit(make_model(new(), **QUICK), [backup], epochs=2)
    metadata = tmp_path / "training_metadata.json"
    metadata.write_text(json.dumps(json.loads(metadata.read_text()) | {"epoch": 1}))
    model = fit(make_model(new(), **QUICK), [backup], epochs=4)
    assert int(model.optimizer.iterations) == 5 * STEPS
    whole = metadata.read_text()
    metadata.write_text("")
    with pytest.raises(json.JSONDecodeError):
        fit(make_model(new(), **QUICK), [backup], epochs=4)
    # A later backup that was killed: what is there of the earlier one does not help.
    metadata.write_text(whole)
    weights = tmp_path / "latest.weights.h5"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(OSError, match="truncated"):
        fit(make_model(new(), **QUICK), [backup], epochs=6)


@pytest.mark.parametrize("case", CONTROL)
def test_backup_in_the_middle_of_an_epoch(case, tmp_path):
    """It goes on at the beginning of the epoch: three batches come twice."""

    class Interrupt(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if batch == 2:
                raise KeyboardInterrupt

    new = OPTIMIZERS[case]
    backup = keras.callbacks.BackupAndRestore(tmp_path, save_freq=3)
    with pytest.raises(KeyboardInterrupt):
        fit(make_model(new(), **QUICK), [backup, Interrupt()])
    model = fit(make_model(new(), **QUICK), [backup])
    assert int(model.optimizer.iterations) == STEPS + 3


# Files that do not load


@pytest.mark.parametrize("file", ["model.keras", "model.weights.h5"])
@pytest.mark.parametrize("case", ["Adam", "interpolate", "both"])
def test_file_that_was_cut_off(case, file, tmp_path):
    whole = tmp_path / file
    saved, model = filled(case), filled(case, seed=2)
    saved.save(whole) if file.endswith(".keras") else saved.save_weights(whole)
    content, before = whole.read_bytes(), state(model)
    cut = tmp_path / f"cut.{file}"
    for length in np.linspace(0, len(content) - 1, 24).astype(int):
        cut.write_bytes(content[:length])
        with pytest.raises((OSError, zipfile.BadZipFile)):
            model.load_weights(cut)
        if file.endswith(".keras"):
            with pytest.raises(ValueError, match="zip file"):
                keras.models.load_model(cut)
        assert_same_bits(state(model), before)


def refused(model, path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match="could not be loaded"):
            model.load_weights(path)


@pytest.mark.parametrize("case", OPTIMIZERS)
def test_file_of_another_model(case, tmp_path):
    """None of whose layers fits: nothing changes, as with Adam."""
    path = tmp_path / "model.weights.h5"
    tokens = keras.Input((4,), dtype="int32")
    layers = keras.layers.Embedding(7, 2), keras.layers.LSTM(2)
    other = keras.Model(tokens, layers[1](layers[0](tokens)))
    other.compile(OPTIMIZERS[case](), "mse")
    other.optimizer.build(other.trainable_variables)
    other.save_weights(path)
    model = filled(case)
    before = state(model)
    refused(model, path)
    assert_same_bits(state(model), before)


@pytest.mark.parametrize("case", OPTIMIZERS)
def test_file_of_a_wider_table(case, tmp_path):
    """Keras loads the layers that fit, and a part of Adam's state, before its error."""
    path = tmp_path / "model.weights.h5"
    filled(case, seed=2, width=5).save_weights(path)
    model = filled(case)
    before, own = state(model), own_state(model)
    refused(model, path)
    assert not all(map(np.array_equal, state(model), before))
    assert_same_bits(own_state(model), own)


@pytest.mark.parametrize("case", ["interpolate", "decay"])
def test_file_with_other_shapes(case, tmp_path):
    """As many, but in another order: none is assigned, and the training starts anew."""
    path = tmp_path / "model.weights.h5"
    saved, model = filled(case, seed=2), filled(case)
    saved.save_weights(path)
    before = own_state(model)
    with h5py.File(path, "r+") as file:
        group = file["optimizer/vars"]
        for name, new in (("0", "moved"), ("1", "0"), ("moved", "1")):
            group.move(name, new)
    with pytest.warns(UserWarning, match="holds no state"):
        model.load_weights(path)
    assert_same_bits(model.get_weights(), saved.get_weights())
    for value, ours in zip(before, own_state(model), strict=True):
        is_count = value.dtype.kind == "i"
        np.testing.assert_array_equal(ours, 0 * value if is_count else value)


@pytest.mark.parametrize("case", ["maintain", "decay", "both"])
def test_file_that_cannot_be_read_to_the_end(case, tmp_path):
    """One of the wrapper's variables is damaged, which HDF5 finds when it reads."""
    path = tmp_path / "model.weights.h5"
    filled(case, seed=2).save_weights(path)
    model = filled(case)
    own = own_state(model)
    with h5py.File(path, "r+") as file:
        group = file["optimizer/vars"]
        last = max((name for name in group if group[name].shape), key=int)
        value = group[last][()]
        del group[last]
        checked = group.create_dataset(
            last, data=value, chunks=value.shape, fletcher32=True
        )
        file.flush()
        offset = checked.id.get_chunk_info(0).byte_offset
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)
    refused(model, path)
    assert_same_bits(own_state(model), own)


# A disk that is full


@contextlib.contextmanager
def full_disk():
    """Files cannot grow beyond 10,000 bytes: writing more is an OSError."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("case", OPTIMIZERS)
def test_full_disk(case, tmp_path):
    """What is in memory is unharmed; Keras has overwritten the file in place."""
    path = tmp_path / "run.keras"
    filled(case).save(path)
    model = filled(case, seed=2)
    before = state(model)
    with full_disk(), pytest.raises(OSError, match="too large"):
        model.save(path)
    assert_same_bits(state(model), before)
    with pytest.raises(ValueError, match="zip file"):
        keras.models.load_model(path)


@pytest.mark.parametrize("case", CONTROL)
def test_full_disk_where_a_whole_file_takes_the_place(case, tmp_path):
    """The recipe of the page on saving: the file of the epoch before is there."""
    path = tmp_path / "run.keras"
    model = fit(make_model(OPTIMIZERS[case](), **QUICK), [SaveWhole(path)])
    before = state(model)
    with full_disk(), pytest.raises(OSError, match="too large"):
        fit(model, [SaveWhole(path)])
    assert_same_bits(state(keras.models.load_model(path)), before)
    assert int(model.optimizer.iterations) == 2 * STEPS
    fit(model, [SaveWhole(path)])
    assert_same_bits(state(keras.models.load_model(path)), state(model))
