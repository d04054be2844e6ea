"""The experiment with an outer optimizer, its tables, and the bilinear game."""

import numpy as np
import pytest
from example_data import write_imdb

pytest.importorskip("matplotlib")
pytest.importorskip("scipy")

from experiments import _runs, bilinear, outer, report
from keras_lookahead_lazy import Lookahead


def test_sequences_are_the_reviews_behind_each_other(tmp_path):
    reviews = np.empty(3, dtype=object)
    for i in range(3):
        reviews[i] = list(range(1 + 40 * i, 41 + 40 * i))
    reviews[1] = [5_000] * 40
    source = write_imdb(tmp_path / "imdb.npz", x_train=reviews, x_test=reviews)
    data = outer.load(source)
    expected = [0, *range(1, 41), 0, *[outer.WORDS - 1] * 40]
    np.testing.assert_array_equal(data.x_train[0], expected[:64])
    np.testing.assert_array_equal(data.y_train[0], expected[1:65])


@pytest.mark.parametrize("kind", outer.MODELS)
def test_no_word_sees_those_behind_it(kind):
    model = outer.build_model(kind)
    words = np.random.default_rng(0).integers(0, outer.WORDS, (1, outer.TOKENS))
    other = words.copy()
    other[0, 40:] = 7
    first, second = (model.predict(each, verbose=0)[0] for each in (words, other))
    np.testing.assert_allclose(first[:40], second[:40], atol=1e-5)
    assert np.abs(first[40:] - second[40:]).max() > 1e-3


def test_optimizers():
    for name, setting in outer.SETTINGS.items():
        built = outer.build_optimizer(name, 0.1, 100)
        assert isinstance(built, Lookahead) == (setting.k is not None)
        if setting.k:
            assert built.k == setting.k
            assert built.alpha == setting.alpha
            assert (built.outer_optimizer is None) == (setting.eta is None)
            # The last evaluation comes right after a sync, as every one does.
            assert outer.STEPS_AN_EPOCH % setting.k == 0
    rate = outer.build_optimizer("adamw", 0.1, 100)._learning_rate
    assert float(rate(0)) == 0
    np.testing.assert_allclose([rate(10), rate(100)], [0.1, 0.01], rtol=1e-5)


@pytest.mark.long
def test_the_experiment_runs(tmp_path):
    random = np.random.default_rng(0)
    texts = {}
    for part in ("x_train", "x_test"):
        texts[part] = np.empty(300, dtype=object)
        for i in range(300):
            texts[part][i] = random.integers(1, 20, 70).tolist()
    source = str(write_imdb(tmp_path / "imdb.npz", **texts))
    arguments = ["--data", source, "--output", str(tmp_path / "runs"), "--epochs", "2"]
    arguments += ["--steps-an-epoch", "10", "--test-samples", "20"]
    arguments += ["--model", "lstm", "--optimizers", "outer-10-0.9"]
    arguments += ["--learning-rates", "1e-9", "0.01"]
    assert outer.main(["tune", *arguments]) == 0
    assert outer.main(["compare", *arguments, "--seeds", "2"]) == 0
    records = {record["name"]: record for record in _runs.read(tmp_path / "runs")}
    assert len(records) == 3
    losses = {
        name: [epoch["val_loss"] for epoch in record["results"]["epochs"]]
        for name, record in records.items()
    }
    slow = losses["lstm-outer-10-0.9-rate1e-09-seed0"]
    np.testing.assert_allclose(slow, np.log(outer.WORDS), rtol=1e-2)
    assert losses["lstm-outer-10-0.9-rate0.01-seed2"][1] < 0.7 * np.log(outer.WORDS)


def ran(optimizer, rate, seed, losses):
    settings = {"model": "gpt", "optimizer": optimizer, "learning_rate": rate}
    settings |= {"seed": seed, "steps_an_epoch": 50}
    epochs = [
        {"epoch": i, "seconds": 4.0, "val_loss": loss}
        for i, loss in enumerate(losses, 1)
    ]
    results = {"val_loss": losses[-1], "test_loss": losses[-1], "epochs": epochs}
    return {"experiment": "outer", "settings": settings, "results": results}


def test_report():
    records = [
        ran("adamw", 0.1, 0, [5.0, 4.5, 4.0]),
        ran("adamw", 0.2, 0, [5.0, 4.5, 4.2]),
        ran("adamw", 0.1, 1, [5.0, 4.5, 4.0]),
        ran("adamw", 0.1, 2, [5.0, 4.5, 4.0]),
        ran("outer-30-0.5", 0.1, 0, [5.0, 4.5, 4.0]),
        ran("outer-30-0.5", 0.1, 1, [5.0, 4.2, 3.8]),  # 4.0 in the middle
        ran("outer-30-0.5", 0.1, 2, [5.0, 4.2, 4.1]),
    ]
    _, adamw, ours = report.outer_table("gpt", records)
    assert adamw[1:4] == ["0.1", "4.0000 ± 0.0000", "4.0000, 4.0000"]
    assert ours[3] == "3.8000, 4.1000"
    assert ours[4].startswith("-0.0500 ± ")
    assert ours[5:] == ["0.833, not reached", "8.0"]
    _, adamw, ours = report.outer_rates_table("gpt", records)
    assert adamw[1:] == ["4.0000", "4.2000"]
    assert ours[1:] == ["4.0000", ""]
    assert len(report.outer_rates_table("lstm", records)) == 1
    report.draw_outer(records)


def test_both_players_reach_the_solution():
    """The paths of 60 steps, against the powers of two matrices."""
    turn = np.array([[1, -bilinear.RATE], [bilinear.RATE, 1]])
    cycle = (np.eye(2) + np.linalg.matrix_power(turn, bilinear.K)) / 2
    start, steps = np.ones(2), 3 * bilinear.K
    circling = np.linalg.matrix_power(turn, steps) @ start
    inward = np.linalg.matrix_power(cycle, 3) @ start
    plays = [(bilinear.sgd, circling), (bilinear.lookahead, inward)]
    for make, expected in plays:
        end = bilinear.play(make, steps)[-1]
        np.testing.assert_allclose(end, expected, rtol=1e-4)
    assert np.linalg.norm(inward) < 0.5 < np.linalg.norm(circling)
