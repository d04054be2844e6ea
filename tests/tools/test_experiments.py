"""The experiments measure what they say; their runs' files give the results page."""

import dataclasses
import shutil
from concurrent.futures import ThreadPoolExecutor

import keras
import numpy as np
import pytest

for module in ("filelock", "matplotlib", "rich", "PIL", "sklearn"):
    pytest.importorskip(module)

from example_data import write_imdb, write_jpegs  # noqa: E402

from examples.common import cifar as cifar_data  # noqa: E402
from examples.common import imdb as imdb_data  # noqa: E402
from examples.common import record as recording  # noqa: E402
from examples.common.sources import Data, DataError  # noqa: E402
from experiments import (  # noqa: E402
    _runs,
    cifar,
    compare,
    imdb,
    language_model,
    large_table,
    report,
)
from experiments._intervals import mean_interval, next_interval  # noqa: E402

TINY = cifar.ImageScale(
    filters=[4, 8],
    blocks=1,
    first_stride=2,
    augment=False,
    weight_decay=0.0,
    epochs=2,
    batch_size=8,
)


def read(folder, name):
    (run,) = [run for run in _runs.read(folder) if run["name"] == name]
    return run


# Runs


def squared(data, settings, name):
    """Stand for a measurement, in another process."""
    if settings["seed"] == 13:
        raise RuntimeError("an unlucky seed")
    return {"squared": settings["seed"] ** 2, "nan": float("nan")}


def run_squares(folder, *seeds, **settings):
    part = np.zeros(3)
    data = Data("numbers", part, part, part, part, epochs=1)
    runs = {f"seed{seed}": {"seed": seed, **settings} for seed in seeds}
    return _runs.run_all("squares", runs, lambda: data, squared, folder, jobs=2)


def test_runs_are_made_once_and_side_by_side(tmp_path, capsys):
    assert run_squares(tmp_path, 2, 3) == 0
    record = read(tmp_path, "seed3")
    assert record["results"] == {"squared": 9, "nan": None}
    assert record["settings"] == {"seed": 3}
    assert record["data"] == {
        "source": "numbers",
        "train_samples": 3,
        "test_samples": 3,
    }
    environment = record["environment"]
    assert environment["backend"] == keras.backend.backend()
    assert environment["keras"] == keras.__version__
    assert environment["processor"]

    before = (tmp_path / "runs.json").stat().st_mtime_ns
    assert run_squares(tmp_path, 2) == 0
    assert "seed2: there already" in capsys.readouterr().out
    assert (tmp_path / "runs.json").stat().st_mtime_ns == before

    # What was asked for is not what is there.
    assert run_squares(tmp_path, 2, epochs=7) == 2
    message = "other settings (epochs); choose another --output or remove it"
    assert message in capsys.readouterr().err


def test_a_run_that_fails_leaves_the_others(tmp_path, capsys):
    assert run_squares(tmp_path, 13, 4) == 1
    captured = capsys.readouterr()
    assert "seed13: failed" in captured.out
    assert "RuntimeError: an unlucky seed" in captured.err
    assert {path.name for path in tmp_path.iterdir()} <= {"runs.json", ".lock"}
    assert [run["name"] for run in _runs.read(tmp_path)] == ["seed4"]


def test_no_run_is_lost_if_several_write_at_once(tmp_path):
    names = [f"seed{i}" for i in range(40)]
    with ThreadPoolExecutor(8) as threads:
        for name in names:
            threads.submit(_runs.add, tmp_path, {"name": name})
    assert [run["name"] for run in _runs.read(tmp_path)] == sorted(names)


def test_a_file_that_is_not_of_runs_is_left_alone(tmp_path, capsys):
    path = tmp_path / "runs.json"
    path.write_text('{"runs": [{"na')
    assert run_squares(tmp_path, 2) == 2
    assert f"{path} is not a file of runs" in capsys.readouterr().err
    assert path.read_text() == '{"runs": [{"na'


def test_options_change_the_scale():
    scale = _runs.changed(cifar.SMALL, epochs=3, train_samples=None, test_samples=20)
    assert (scale.epochs, scale.test_samples) == (3, 20)
    assert scale.train_samples == cifar.SMALL.train_samples
    assert scale.filters == cifar.SMALL.filters


# IMDB


def tiny_language_model(optimizer):
    keras.utils.set_random_seed(3)
    model = keras.Sequential(
        [
            keras.layers.Embedding(60, 4),
            keras.layers.GlobalAveragePooling1D(),
            keras.layers.Dense(1),
        ]
    )
    model.build((None, 5))
    model.compile(optimizer, loss="mse")
    return model


def test_movement_of_rows_is_that_of_single_steps(monkeypatch):
    monkeypatch.setattr(imdb, "PROBE_EVERY", 2)
    random = np.random.default_rng(0)
    x, y = random.integers(0, 60, (200, 5)), random.normal(size=200)
    batches = imdb.Batches(x, y, seed=0)
    movement = imdb.RowMovement(batches)
    model = tiny_language_model(keras.optimizers.SGD(0.1, momentum=0.9))
    model.fit(batches, epochs=2, shuffle=False, callbacks=[movement], verbose=0)

    model = tiny_language_model(keras.optimizers.SGD(0.1, momentum=0.9))
    batches = imdb.Batches(x, y, seed=0)
    for epoch in range(2):
        batches.start(epoch)
        distances: dict[bool, list[float]] = {True: [], False: []}
        for index in range(7):
            tokens, values = batches[index]
            before = model.get_weights()[0]
            model.train_on_batch(tokens, values)
            after = model.get_weights()[0]
            for row in range(60) if index % 2 == 0 else ():
                distance = np.sqrt(np.sum((after[row] - before[row]) ** 2))
                distances[row in tokens].append(distance)
        assert movement.epochs[epoch] == pytest.approx(
            {
                "moved_if_sampled": np.mean(distances[True]),
                "moved_if_not_sampled": np.mean(distances[False]),
                "share_not_sampled": sum(distances[False])
                / sum(distances[True] + distances[False]),
            },
            rel=1e-3,
        )
    assert movement.epochs[1]["share_not_sampled"] > 0.05


def test_lazy_rows_do_not_move_unless_sampled(tmp_path):
    data = imdb_data.from_path(write_imdb(tmp_path / "imdb.npz", train=300))
    settings = {"optimizer": "lazy-decay", "seed": 5, "epochs": 1}
    results = imdb.measure(data, settings, "")
    (epoch,) = results["epochs"]
    assert epoch["moved_if_sampled"] > 0
    assert epoch["moved_if_not_sampled"] == epoch["share_not_sampled"] == 0
    assert results["best_val_accuracy"] == epoch["val_accuracy"]


def test_batches_come_in_the_order_that_is_measured():
    x = np.arange(70)[:, None]
    batches = imdb.Batches(x, x[:, 0], seed=1)
    epochs = []
    for epoch in range(2):
        batches.start(epoch)
        drawn = [batches[index] for index in range(len(batches))]
        assert all((tokens[:, 0] == labels).all() for tokens, labels in drawn)
        epochs.append(np.concatenate([labels for _, labels in drawn]))
        assert sorted(epochs[-1]) == list(range(70))
    assert (epochs[0] != epochs[1]).any()


def test_imdb_command(tmp_path):
    arguments = ["--data", str(write_imdb(tmp_path / "imdb.npz")), "--epochs", "1"]
    arguments += ["--optimizers", "lookahead-lazy", "--seeds", "4"]
    assert imdb.main([*arguments, "--output", str(tmp_path / "runs")]) == 0
    record = read(tmp_path / "runs", "lookahead-lazy-seed4")
    (epoch,) = record["results"]["epochs"]
    assert 0 <= epoch["slow_val_accuracy"] <= 1


@pytest.mark.long
def test_large_table_command(tmp_path):
    arguments = ["--data", str(write_imdb(tmp_path / "imdb.npz")), "--epochs", "2"]
    arguments += ["--seeds", "4", "--rows", "30000", "--output", str(tmp_path)]
    pytest.importorskip("torch")
    of_two = ["--optimizers", "lazy-freeze", large_table.PEER]
    assert large_table.main([*arguments, *of_two]) == 0
    of_one = ["--optimizers", "adam", "--learning-rates", "1e-9", "0.1"]
    assert large_table.main([*arguments, *of_one]) == 0
    assert large_table.main([*arguments, *of_one[:3], "0.1", "--batch-size", "8"]) == 0
    at_rate = [*of_one[:3], "0.1"]
    assert large_table.main([*arguments, *at_rate, "--epsilon", "0.001"]) == 0
    assert len(_runs.read(tmp_path)) == 6
    assert read(tmp_path, "adam-rows30000-rate0.1-epsilon0.001-seed4")
    with pytest.raises(SystemExit):
        large_table.main([*arguments, *of_two, "--epsilon", "0.001"])
    assert read(tmp_path, "adam-rows30000-rate0.1-batch8-seed4")
    records = _runs.read(tmp_path)
    for record in records:
        first, second = record["results"]["epochs"]
        assert second["trained_seconds"] == first["seconds"] + second["seconds"]

    _, adam, lazy, peer = report.large_table_table(records)
    assert adam[0] == "Adam"
    assert lazy[0] == "LazyOptimizer, freeze"
    assert peer[0] == "SparseAdam in a plain torch loop"
    for _, _, rate, best, *_, seconds in (adam, lazy, peer):
        accuracy = {
            record["results"]["best_val_accuracy"]
            for record in records
            if f"{record['settings']['learning_rate']:g}" == rate
        }
        assert best in {f"{100 * each:.2f}" for each in accuracy}
        assert float(seconds) > 0
    heading, of_batch_8, of_adam, *_, of_epsilon = report.large_table_rates_table(
        records
    )
    assert heading[3:] == ["epsilon", "1e-09", "0.01", "0.1"]
    assert of_batch_8[2:6] == ["8", "1e-07", "", ""]
    assert of_adam[2:4] == ["64", "1e-07"]
    assert of_adam[5] == ""
    assert of_epsilon[2:6] == ["64", "0.001", "", ""]
    usual, other = (
        read(tmp_path, f"adam-rows30000-rate0.1{suffix}-seed4")["results"]["epochs"]
        for suffix in ("", "-epsilon0.001")
    )
    assert usual[1]["loss"] != other[1]["loss"]


def test_the_peer_takes_the_mean_of_what_is_no_padding():
    torch = pytest.importorskip("torch")
    from experiments import _torch_loop

    model = _torch_loop.Classifier(rows=7, width=3)
    ids = np.array([[1, 4, 0, 0], [6, 6, 2, 0]])
    with torch.no_grad():
        logits = model(torch.from_numpy(ids)).numpy()
        table, weights = (w.numpy() for w in (model.bag.weight, model.dense.weight))
    means = [table[[1, 4]].mean(axis=0), table[[6, 6, 2]].mean(axis=0)]
    np.testing.assert_allclose(logits, np.array(means) @ weights[0], rtol=1e-5)


# CIFAR-10


def pictures(tmp_path, train=80):
    return cifar_data.from_path(write_jpegs(tmp_path / "jpeg.npz", train=train))


def test_updates_are_evaluated_before_and_after_a_sync(tmp_path):
    data = pictures(tmp_path)
    _, settings = cifar.training(TINY, seed=0, learning_rate=0.05)
    settings |= {"start_epoch": 0, "cycles": 2}
    with pytest.raises(ValueError, match="rate falls while single updates"):
        cifar.measure_updates(data, settings, "")  # after 6 of 20 updates
    settings["scale"]["epochs"] = 20
    first, second = cifar.measure_updates(data, settings, "")["cycles"]
    assert len(first["loss"]) == len(first["accuracy"]) == cifar.K + 2
    assert second["loss"][0] == pytest.approx(first["loss"][-1], rel=1e-5)

    # Up to the sync Lookahead is SGD; the sync goes half the way back.
    keras.utils.set_random_seed(0)
    model = cifar.build_model(data.x_train.shape[1:], TINY)
    model.set_weights(initial_weights(data, settings))
    model.compile(
        keras.optimizers.SGD(0.05, momentum=0.9),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    start = [_runs.copy_of(weight) for weight in model.trainable_variables]
    losses = [model.evaluate(data.x_test, data.y_test, verbose=0)]
    batches = cifar._batches(data, TINY.batch_size, seed=0)
    for _ in range(cifar.K):
        model.train_on_batch(*next(batches))
        losses.append(model.evaluate(data.x_test, data.y_test, verbose=0))
    for weight, before in zip(model.trainable_variables, start, strict=True):
        weight.assign((before + _runs.copy_of(weight)) / 2)
    losses.append(model.evaluate(data.x_test, data.y_test, verbose=0))
    np.testing.assert_allclose(first["loss"], losses, rtol=1e-4)
    assert len(first["with_fresh_statistics"]["loss"]) == 3
    assert np.ptp(losses) > 1e-3


def test_fresh_statistics_are_those_of_the_images(tmp_path):
    data = pictures(tmp_path)
    _, settings = cifar.training(TINY, seed=0)
    model = cifar.compile_model(data, settings)
    model.fit(data.x_train, data.y_train, batch_size=8, verbose=0)
    before = model.get_weights()
    stale = model.predict(data.x_test, verbose=0)
    with cifar._fresh_statistics(model, data.x_test):
        fresh = model.predict(data.x_test, verbose=0)
    # What normalization by the statistics of the batch gives, as in training.
    expected = keras.ops.convert_to_numpy(model(data.x_test, training=True))
    np.testing.assert_allclose(fresh, expected, rtol=1e-3, atol=1e-4)
    assert np.abs(stale - expected).max() > 0.01
    model.set_weights(before)
    with cifar._fresh_statistics(model, data.x_test):
        pass
    for weight, value in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(weight, value)


def initial_weights(data, settings):
    """Return the weights that `measure_updates` starts with."""
    keras.utils.set_random_seed(settings["seed"])
    return cifar.compile_model(data, settings).get_weights()


def test_the_learning_rate_falls_as_in_the_paper(tmp_path):
    data = pictures(tmp_path)
    _, settings = cifar.training(TINY, seed=0)
    schedule = cifar.schedule(data, settings)
    # By 5 after 60, 120 and 160 of 200 epochs; here there are 20 updates. Keras's
    # schedule still gives the update after the boundary the old rate.
    rates = [float(schedule(update)) for update in (0, 6, 7, 12, 13, 16, 17, 19)]
    expected = [0.1, 0.1, 0.02, 0.02, 0.004, 0.004, 0.0008, 0.0008]
    np.testing.assert_allclose(rates, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("scale", "weights"),
    [
        (cifar.SMALL, 78_042),
        # ResNet-18 with a 3 x 3 first convolution and 10 classes, as in He et al.
        (cifar.FULL, 11_173_962),
    ],
    ids=["small", "full"],
)
def test_residual_networks_have_the_weights_that_the_page_says(scale, weights):
    model = cifar.build_model((32, 32, 3), scale)
    assert sum(int(np.prod(w.shape)) for w in model.trainable_variables) == weights


@pytest.mark.long
def test_cifar_command(tmp_path, monkeypatch):
    augmented = dataclasses.replace(TINY, augment=True, weight_decay=1e-3)
    monkeypatch.setattr(cifar, "SMALL", augmented)
    monkeypatch.setattr(cifar, "SWEEP", ((0.1, 0.9),))
    arguments = ["sweep", "--data", str(write_jpegs(tmp_path / "jpeg.npz"))]
    arguments += ["--epochs", "1", "--train-samples", "8", "--seeds", "2"]
    arguments += ["--output", str(tmp_path / "runs")]
    assert cifar.main(arguments) == 0
    with_lookahead = read(tmp_path / "runs", "k5-alpha0.5-rate0.1-momentum0.9-seed2")
    results = with_lookahead["results"]
    assert np.isfinite([results["train"]["loss"], results["test"]["loss"]]).all()
    # One update, no sync: the slow weights are the initial ones.
    assert results["test"] != results["test_fast_weights"]
    alone = read(tmp_path / "runs", "sgd-rate0.1-momentum0.9-seed2")["results"]
    assert alone["test"] == alone["test_fast_weights"]
    assert alone["test_fast_weights"]["loss"] == pytest.approx(
        results["test_fast_weights"]["loss"], rel=1e-4
    )


# Language model


def test_language_data_are_next_words(tmp_path):
    source = str(write_imdb(tmp_path / "imdb.npz"))
    reviews = imdb_data.load(source).x_train
    data = language_model.load_data(source, words=500)
    whole = [review for review in reviews if (review != 0).all()]
    assert len(data.x_train) == len(whole) < len(reviews)
    np.testing.assert_array_equal(data.x_train[:, 1:], data.y_train[:, :-1])
    known = [[word if word < 500 else 2 for word in review] for review in whole]
    np.testing.assert_array_equal(data.y_train, np.array(known)[:, 1:])


def test_language_model_of_the_full_scale():
    model = language_model.build_model(79, language_model.FULL)
    assert model.output_shape == (None, 79, 20_000)


@pytest.mark.long
def test_tuning_then_comparing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(language_model, "LEARNING_RATES", {"sgd": (1.0,)})
    source = str(write_imdb(tmp_path / "imdb.npz"))
    arguments = ["--data", source, "--optimizers", "lookahead-sgd", "--epochs", "1"]
    arguments += ["--output", str(tmp_path / "runs"), "--seeds", "1"]
    with pytest.raises(SystemExit):
        language_model.main(["compare", *arguments])
    assert (
        "not tuned yet: lookahead-sgd-rate1-seed0; run `tune` first"
        in capsys.readouterr().err
    )
    assert language_model.main(["tune", *arguments]) == 0
    assert language_model.main(["compare", *arguments]) == 0
    name = "lookahead-sgd-rate1-seed1"
    results = read(tmp_path / "runs", name)["results"]
    assert 1 < results["test_perplexity"] < 5_500


def test_the_tuned_rate_is_that_of_the_lowest_validation_perplexity():
    records = [
        {
            "settings": {"optimizer": "adam", "learning_rate": rate, "seed": seed},
            "results": {"validation_perplexity": perplexity},
        }
        for rate, seed, perplexity in [
            (1.0, 0, None),  # diverged
            (0.1, 0, 90.0),
            (0.01, 0, 80.0),
            (0.001, 1, 70.0),  # not of the tuning
        ]
    ]
    assert language_model.tuned_rate(records, "adam") == 0.01
    with pytest.raises(DataError, match="adam has diverged"):
        language_model.tuned_rate(records[:1], "adam")


# Report


def test_changes_by_a_fast_update_and_by_a_sync():
    cycles = np.array([[10.0, 9.0, 8.0, 12.0], [12.0, 12.5, 13.0, 13.5]])
    fast, sync = report.changes(cycles, k=2)
    np.testing.assert_allclose(fast, [-1.0, 0.5])
    np.testing.assert_allclose(sync, [4.0, 0.5])


def test_intervals_of_a_few_seeds():
    """The quantile is that of Student's tables: 3.182 for four values."""
    mean, margin = mean_interval([1.0, 2.0, 3.0, 4.0])
    assert mean == 2.5
    assert margin == pytest.approx(3.182446 * (5 / 3) ** 0.5 / 2, rel=1e-6)
    mean, margin = next_interval([1.0, 2.0, 3.0, 4.0])
    assert mean == 2.5
    assert margin == pytest.approx(3.182446 * (5 / 3) ** 0.5 * 1.25**0.5, rel=1e-6)


def trained(k, alpha, rate, momentum, seed, loss, scale=cifar.SMALL):
    _, settings = cifar.training(scale, seed, rate, momentum, k, alpha)
    measured = {"loss": loss, "accuracy": None if loss is None else 1 - loss}
    return {"settings": settings, "results": {"train": measured, "test": measured}}


def test_runs_of_the_sweep_are_told_apart(monkeypatch):
    monkeypatch.setattr(cifar, "SWEEP", ((0.1, 0.9), (1.0, 0.9)))
    records = [
        trained(None, None, 0.1, 0.9, 0, 0.50),
        trained(None, None, 0.1, 0.9, 1, 0.52),
        trained(None, None, 0.05, 0.9, 0, 0.40),
        trained(5, 0.5, 0.1, 0.9, 0, 0.30),
        trained(5, 0.2, 0.1, 0.9, 0, 0.20),  # of another experiment
        trained(10, 0.5, 0.1, 0.9, 0, 0.10),
        trained(None, None, 1.0, 0.9, 0, None),
    ]
    _, first, second = report.sweep_table(records)
    assert first[:6] == ["0.1", "0.9", "0.510", "0.400", "0.300", ""]
    # Student's quantile of two values, 12.706, times half of their difference.
    assert first[6:] == ["49.00 ± 12.71", "60.00", "70.00", ""]
    assert second == ["1", "0.9", "diverged", "", "", "", "diverged", "", "", ""]
    report.draw_sweep(records)
    _, above, diverged = report.sweep_differences_table(records)
    assert above == ["0.1", "0.9", "+20.00", "+10.00", ""]
    assert diverged[2:] == ["", "", ""]

    _, five, ten, _, without = report.k_alpha_table(records)
    assert five == ["5", "0.200", "0.300", "", "80.00", "70.00", ""]
    assert ten == ["10", "", "0.100", "", "", "90.00", ""]
    assert without[:5] == ["without Lookahead", "0.510", "", "", "49.00 ± 12.71"]


def test_the_longer_training_is_at_the_best_rate_of_the_sweep(monkeypatch):
    monkeypatch.setattr(cifar, "LEARNING_RATES", (0.1, 0.3))
    long = dataclasses.replace(cifar.SMALL, epochs=30)
    records = []
    for (k, alpha), best in zip(cifar.LONGER, (0.3, 0.1, 0.3), strict=True):
        for rate in (0.1, 0.3):
            losses = (0.5, 0.4) if rate == best else (0.3, 0.7)
            for seed, loss in enumerate(losses):
                records.append(trained(k, alpha, rate, 0.9, seed, loss))
    runs = cifar.longer(cifar.SMALL, 1, records)
    assert list(runs) == [
        "longer-sgd-rate0.3-momentum0.9-seed1",
        "longer-k5-alpha0.5-rate0.1-momentum0.9-seed1",
        "longer-k5-alpha0.8-rate0.3-momentum0.9-seed1",
    ]
    assert {run["scale"]["epochs"] for run in runs.values()} == {30}

    for seed, loss in ((0, 0.2), (1, 0.3)):
        records.append(trained(None, None, 0.3, 0.9, seed, loss, long))
        records.append(trained(5, 0.5, 0.1, 0.9, seed, loss - 0.1, long))
    _, *short, sgd, lookahead, missing = report.longer_table(records)
    assert [row[4] for row in short] == ["55.00 ± 63.53"] * 3
    assert sgd[1:3] == ["0.3", "30"]
    assert sgd[5:] == ["80.00, 70.00", ""]
    assert lookahead[6] == "+10.00 ± 0.00"
    assert missing[3:6] == ["", "", ""]

    with pytest.raises(DataError, match=r"alpha=0.8, learning rate 0.3; run `sweep`"):
        cifar.longer(cifar.SMALL, 0, records[:10])


def test_tables_of_the_page_are_those_of_the_runs():
    """`python -m experiments.report` brings the page up to date."""
    assert report.main(["--check"]) == 0


def test_every_run_was_recorded_with_what_it_depends_on():
    records = [
        record for folder in report.RESULTS.iterdir() for record in _runs.read(folder)
    ]
    assert records
    for record in records:
        assert {"seed"} <= record["settings"].keys()
        assert {"keras", "backend", "backend_version", "processor", "device"} <= (
            record["environment"].keys()
        )


# Compare


def test_runs_made_again_are_compared(tmp_path, monkeypatch, capsys):
    committed, again = tmp_path / "results", tmp_path / "again"
    monkeypatch.setattr(compare, "RESULTS", committed)
    assert run_squares(committed / "squares", 2, 3) == 0
    shutil.copytree(committed / "squares", again)
    assert compare.main([str(again)]) == 0
    change_squared(again, "seed3", 8)
    capsys.readouterr()
    assert compare.main([str(again)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "seed2: equal"
    assert lines[1] == "seed3: no interval, from 0 seeds; squared is 8, was 9"


@pytest.mark.parametrize(("value", "verdict"), [(61, "within"), (62, "outside of")])
def test_runs_made_elsewhere_lie_where_other_seeds_would(
    value, verdict, tmp_path, monkeypatch, capsys
):
    """4 and 9 say 6.5 ± 55.02, which is 12.706 * 3.536 * 1.225."""
    committed, again = tmp_path / "results", tmp_path / "again"
    monkeypatch.setattr(compare, "RESULTS", committed)
    monkeypatch.setattr(compare, "MEASURES", {"squares": "squared"})
    run_squares(committed / "squares", 2, 3)
    shutil.copytree(committed / "squares", again)
    change_squared(again, "seed3", value)
    capsys.readouterr()
    assert compare.main([str(again)]) == (verdict != "within")
    _, line = capsys.readouterr().out.splitlines()
    assert line.startswith(
        f"seed3: {verdict} the interval: squared is {value}; 2 seeds"
    )


def test_settings_that_differ_are_named(tmp_path, monkeypatch, capsys):
    committed, again = tmp_path / "results", tmp_path / "again"
    monkeypatch.setattr(compare, "RESULTS", committed)
    run_squares(committed / "squares", 2)
    shutil.copytree(committed / "squares", again)
    for folder, settings in (
        (committed / "squares", {"seed": 2, "scale": {"epochs": 8}, "width": 3}),
        (again, {"seed": 2, "scale": {"epochs": 2}, "rate": 0.1}),
    ):
        run = read(folder, "seed2")
        run["settings"] = settings
        _runs.add(folder, run)
    capsys.readouterr()
    assert compare.main([str(again)]) == 1
    assert capsys.readouterr().out == (
        "seed2: made with other settings: scale.epochs is 2, was 8, "
        "width is not set, was 3, rate is 0.1, was not set\n"
    )


def test_the_processor_is_recorded(tmp_path):
    """With what tells it from another of the same name."""
    about = tmp_path / "cpuinfo"
    about.write_text(
        "processor\t: 0\ncpu family\t: 25\nmodel\t\t: 17\nmodel name\t: AMD EPYC\n"
        "stepping\t: 1\nflags\t\t: fpu avx2 fma amx_tile avx512f avx sse\n\n"
        "processor\t: 1\nmodel\t\t: 18\n"
    )
    processor = recording._processor(about)
    assert (processor["cpu family"], processor["model"]) == ("25", "17")
    flags = recording._vector_flags(processor)
    assert flags == ["amx_tile", "avx", "avx2", "avx512f", "fma"]
    assert recording._processor(tmp_path / "elsewhere") == {}
    assert {
        "processor",
        "processor_family",
        "processor_model",
        "processor_stepping",
        "processor_flags",
    } <= recording.machine().keys()


def change_squared(folder, name, squared):
    run = read(folder, name)
    run["results"]["squared"] = squared
    _runs.add(folder, run)
