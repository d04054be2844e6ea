"""Files that earlier versions wrote load, and training continues from them.

`tests/files` has an archive for each version: files of every kind, written mid-cycle,
and the weights at which the training that wrote them arrived later. That training was
not interrupted, and ran on TensorFlow with Keras 3.10.
"""

import json
import shutil
import warnings
from pathlib import Path

import keras
import numpy as np
import pytest
from harness import BACKEND, QUICK, assert_agree, error
from state_files import AFTER, BEFORE, FOLDER, KINDS, make_stored, train

from keras_lookahead_lazy import LazyOptimizer, __version__
from keras_lookahead_lazy._keras import chain
from keras_lookahead_lazy._saving import FORMAT

# The last version that changed what is stored.
NEWEST = "0.2.0"
ENDINGS = ["keras", "weights.h5"] + ["checkpoint"] * (BACKEND == "tensorflow")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The archives' files, in a folder for each version."""
    folder = tmp_path_factory.mktemp("files")
    for archive in FOLDER.glob("*.zip"):
        shutil.unpack_archive(archive, folder / archive.stem)
    return folder


def recorded(folder: Path, name: str) -> list[np.ndarray]:
    weights = json.loads((folder / "weights.json").read_text())[name]
    return [np.array(weight, "float32") for weight in weights]


def load(folder: Path, name: str, ending: str) -> keras.Model:
    path = folder / f"{name}.{ending}"
    if ending == "keras":
        model = keras.models.load_model(path)
        model.compile(model.optimizer, "mse", auto_scale_loss=False, **QUICK)
        return model
    model = make_stored(KINDS[name](), **QUICK)
    if ending == "weights.h5":
        model.load_weights(path)
    else:
        import tensorflow as tf

        checkpoint = tf.train.Checkpoint(model=model, optimizer=model.optimizer)
        checkpoint.read(str(path)).assert_existing_objects_matched()
    return model


def updates(optimizer: keras.Optimizer) -> int:
    return int(keras.ops.convert_to_numpy(optimizer.iterations))


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("name", KINDS)
def test_training_continues(files, name, ending):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = load(files / NEWEST, name, ending)
    expected = recorded(files / NEWEST, name)
    weights_alone = make_stored(KINDS[name](), **QUICK)
    weights_alone.set_weights(model.get_weights())
    for each in (model, weights_alone):
        train(each, BEFORE, AFTER)
    assert_agree(model.get_weights(), expected)
    assert error(weights_alone.get_weights(), expected) > 1e-3


def test_every_kind_has_files_of_the_present_format(files):
    import h5py

    written = json.loads((files / NEWEST / "weights.json").read_text())
    assert list(written) == list(KINDS)
    with h5py.File(files / NEWEST / "both.weights.h5") as file:
        assert file["optimizer/vars/format"][()] == FORMAT
    numbers = [[int(n) for n in v.split(".")] for v in (NEWEST, __version__)]
    assert numbers == sorted(numbers)


# Version 0.1, which wrote no format number. What a Lookahead stores is still the same;
# a LazyOptimizer stored less.


@pytest.mark.parametrize("ending", ["keras", "weights.h5"])
@pytest.mark.parametrize("name", ["lookahead", "interpolate"])
def test_lookahead_of_the_first_version(files, name, ending):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = load(files / "0.1.0", name, ending)
    train(model, BEFORE, AFTER)
    assert_agree(model.get_weights(), recorded(files / "0.1.0", name))


@pytest.mark.parametrize("ending", ["keras", "weights.h5"])
@pytest.mark.parametrize("name", ["lazy-decay", "both"])
def test_lazy_optimizer_of_the_first_version(files, name, ending):
    """It is refused with a sentence that says so. The weights are loaded."""
    with pytest.warns(UserWarning, match=r"before 0\.2\.0.* starts from the beginning"):
        model = load(files / "0.1.0", name, ending)
    trained = make_stored(KINDS[name](), **QUICK)
    train(trained, 0, BEFORE)
    assert_agree(model.get_weights(), trained.get_weights())
    for optimizer in chain(model.optimizer):
        if isinstance(optimizer, LazyOptimizer):
            assert list(optimizer.update_counts().values()) == [0]
    train(model, BEFORE, AFTER)
