"""What `Insight` logs, against NumPy: recorded weights, and the ids in the data."""

import keras
import numpy as np
import pytest
from harness import (
    BACKEND,
    QUICK,
    adam,
    assert_same_bits,
    make_model,
    numpy,
    state,
)

from keras_lookahead_lazy import Insight, LazyOptimizer, Lookahead, SlowWeights

VOCABULARY, BATCH, STEPS, EPOCHS = 40, 4, 4, 3
TABLE = "net/words/embeddings"


OPTIMIZERS = {
    "Lookahead": lambda: Lookahead(adam(), k=3),
    "decay": lambda: LazyOptimizer(adam()),
    "freeze": lambda: LazyOptimizer(adam(), moments="freeze"),
    "both": lambda: Lookahead(LazyOptimizer(adam()), k=3),
    "every row": lambda: Lookahead(LazyOptimizer(keras.optimizers.Adafactor()), k=3),
    "nested": lambda: Lookahead(Lookahead(LazyOptimizer(adam()), k=3), k=2),
    "scaled": lambda: keras.optimizers.LossScaleOptimizer(
        Lookahead(LazyOptimizer(adam()), k=3), initial_scale=2.0
    ),
}
# Updates from one sync of the outermost Lookahead to the next.
CYCLES = {"Lookahead": 3, "both": 3, "every row": 3, "nested": 2, "scaled": 3}


def make_data(seed=5):
    """Words as they come: some often, some in no batch."""
    random = np.random.default_rng(seed)
    samples = EPOCHS * STEPS * BATCH
    ids = np.minimum(random.zipf(1.5, (samples, 4)), VOCABULARY - 1)
    return ids, random.normal(size=(samples, 1))


class Recorder(keras.callbacks.Callback):
    """The weights after every step."""

    def __init__(self):
        super().__init__()
        self.weights = []

    def on_train_batch_end(self, batch, logs=None):
        if BACKEND == "jax":
            self.model.jax_state_sync()
        self.weights.append(self.model.get_weights())


def fit(model, callbacks, verbose=0):
    """Epochs that each see samples of their own."""
    return model.fit(
        *make_data(),
        batch_size=BATCH,
        steps_per_epoch=STEPS,
        epochs=EPOCHS,
        shuffle=False,
        callbacks=callbacks,
        verbose=verbose,
    ).history


def ids_by_epoch():
    return np.split(make_data()[0], EPOCHS)


@pytest.mark.parametrize("case", OPTIMIZERS)
def test_logs(case):
    model, recorder = make_model(OPTIMIZERS[case](), VOCABULARY), Recorder()
    history = fit(model, [recorder, Insight()])
    logged = set(history) - {"loss"}
    expected = set()
    if case in CYCLES:
        expected |= {"fast_slow_distance", "updates_since_sync"}
        ends = np.arange(1, EPOCHS + 1) * STEPS
        assert history["updates_since_sync"] == list(ends % CYCLES[case])
        for end, distance in zip(ends, history["fast_slow_distance"], strict=True):
            fast = recorder.weights[end - 1]
            slow = recorder.weights[end - end % CYCLES[case] - 1]
            squares = [np.sum((a - b) ** 2) for a, b in zip(fast, slow, strict=True)]
            assert distance == pytest.approx(np.sqrt(sum(squares)), rel=1e-5)
    if case != "Lookahead":
        kinds = "sampled", "never_sampled", "by_rows"
        expected |= {f"{kind}/{TABLE}" for kind in kinds}
        seen: set[int] = set()
        for epoch, ids in enumerate(ids_by_epoch()):
            seen |= set(ids.flat)
            sampled = history[f"sampled/{TABLE}"][epoch]
            never = history[f"never_sampled/{TABLE}"][epoch]
            assert sampled == pytest.approx(len(np.unique(ids)) / VOCABULARY)
            assert never == pytest.approx(1 - len(seen) / VOCABULARY)
        assert 0 < never < 1 - sampled
    assert logged == expected


def test_before_the_first_update():
    """A slow copy is zero until then, and the distance is not that to zero."""
    lookahead = Lookahead("adam")
    model = make_model(lookahead, **QUICK)
    lookahead.build(model.trainable_variables)
    assert lookahead.distance() == 0


@pytest.mark.parametrize("case", ["both", "nested"])
def test_training_is_the_same(case):
    without, model = (make_model(OPTIMIZERS[case](), VOCABULARY) for _ in range(2))
    fit(without, [])
    fit(model, [Insight()])
    assert_same_bits(state(model), state(without))


def test_rows_are_counted_over_a_saved_training(tmp_path):
    whole, model = (make_model(OPTIMIZERS["both"](), VOCABULARY) for _ in range(2))
    history = fit(whole, [Insight()])
    targets = np.split(make_data()[1], EPOCHS)
    for epoch, (ids, y) in enumerate(zip(ids_by_epoch(), targets, strict=True)):
        how = {"batch_size": BATCH, "shuffle": False, "verbose": 0}
        ours = model.fit(ids, y, callbacks=[Insight()], **how).history
        for kind in ("sampled", "never_sampled"):
            # The table has another path in a model that was loaded.
            (name,) = (name for name in ours if name.startswith(f"{kind}/"))
            assert ours[name] == [history[f"{kind}/{TABLE}"][epoch]]
        model.save(tmp_path / "model.keras")
        model = keras.models.load_model(tmp_path / "model.keras")


def test_shown_and_monitored(capsys):
    """In the progress bar; and a callback that comes later can stop on it."""
    model = make_model(OPTIMIZERS["both"](), VOCABULARY, **QUICK)
    stop = keras.callbacks.EarlyStopping(f"sampled/{TABLE}", mode="max", patience=1)
    history = fit(model, [Insight(), stop], verbose=2)
    first, second = history[f"sampled/{TABLE}"]  # and no third
    assert second < first
    distance = history["fast_slow_distance"][0]
    shown = capsys.readouterr().out
    assert f"fast_slow_distance: {distance:.4f}" in shown
    assert f"never_sampled/{TABLE}: " in shown


def test_tensorboard(tmp_path):
    """The logs of both callbacks, with the values that `History` has."""
    pytest.importorskip("tensorboard")
    tf = pytest.importorskip("tensorflow")
    model = make_model(OPTIMIZERS["both"](), VOCABULARY, **QUICK)
    board = keras.callbacks.TensorBoard(tmp_path, write_graph=False)
    validation = make_data(seed=6)
    history = model.fit(
        *make_data(),
        batch_size=BATCH,
        validation_data=validation,
        callbacks=[Insight(), SlowWeights(prefix="slow_"), board],
        verbose=0,
    ).history
    scalars = {}
    for file in tmp_path.rglob("events*"):
        for event in tf.compat.v1.train.summary_iterator(str(file)):
            for value in event.summary.value:
                scalars[value.tag] = tf.make_ndarray(value.tensor)
    for name in (
        "fast_slow_distance",
        f"sampled/{TABLE}",
        f"never_sampled/{TABLE}",
        "slow_val_loss",
    ):
        assert scalars[f"epoch_{name}"] == pytest.approx(history[name][0], rel=1e-6)


def test_without_a_wrapper():
    model = make_model("adam", **QUICK)
    before = numpy(model.variables)
    with pytest.raises(ValueError, match=r"optimizer is Adam\. Compile.*or remove"):
        fit(model, [Insight()])
    assert_same_bits(numpy(model.variables), before)
