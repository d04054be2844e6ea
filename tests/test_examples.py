"""The examples train and report; their data are in tools/test_example_data.py."""

import json

import keras
import numpy as np
import pytest

for module in ("matplotlib", "rich", "PIL", "sklearn"):
    pytest.importorskip(module)

from example_data import write_jpegs  # noqa: E402

from examples.cifar_lookahead import __main__ as cifar  # noqa: E402
from examples.imdb_lazy import __main__ as imdb  # noqa: E402
from examples.large_table import __main__ as large_table  # noqa: E402

pytestmark = pytest.mark.slow


def results(folder):
    return json.loads((folder / "results.json").read_text())


def test_imdb_run_leaves_table_json_and_picture(tmp_path, capsys):
    names = ["lazy-freeze", "lookahead-lazy"]
    status = imdb.main(
        "--data synthetic --epochs 2 --train-samples 64 --test-samples 30 --seed 3 "
        f"--optimizers {' '.join(names)} --output {tmp_path}".split()
    )

    assert status == 0
    out = capsys.readouterr().out
    assert out.startswith("Data: synthetic reviews, 64 + 30 samples, as asked\n")
    assert "│ LazyOptimizer, freeze " in out
    assert "│ Lookahead(LazyOptimizer) " in out
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    content = results(tmp_path)
    assert content["environment"]["backend"] == keras.backend.backend()
    assert content["arguments"]["k"] == 5
    assert content["data"]["train_samples"] == 64
    assert [run["optimizer"] for run in content["runs"]] == names
    for run in content["runs"]:
        assert run["seed"] == 3
        assert [epoch["epoch"] for epoch in run["epochs"]] == [1, 2]
        accuracies = [epoch["val_accuracy"] for epoch in run["epochs"]]
        assert run["best_val_accuracy"] == max(accuracies)
        last = run["epochs"][-1]
        assert last["ms_per_step"] == pytest.approx(1000 * last["seconds"] / 2)


def test_runs_of_a_seed_differ_only_by_the_optimizer(tmp_path):
    """With steps too small to move a weight, both optimizers see the same losses."""
    status = cifar.main(
        "--data digits --epochs 2 --train-samples 128 --test-samples 50 --seeds 0 1 "
        "--optimizers sgd adam-lookahead "
        "--sgd-learning-rate 1e-30 --adam-learning-rate 1e-30 "
        f"--output {tmp_path}".split()
    )

    assert status == 0
    losses: dict[int, list] = {}
    for run in results(tmp_path)["runs"]:
        losses.setdefault(run["seed"], []).append(
            [epoch[key] for epoch in run["epochs"] for key in ("loss", "val_loss")]
        )
    for sgd, lookahead in losses.values():
        np.testing.assert_allclose(sgd, lookahead, rtol=1e-5)
    assert not np.allclose(losses[0][0], losses[1][0], rtol=1e-3)


def test_cifar_learns_the_plain_pictures(tmp_path):
    path = write_jpegs(tmp_path / "jpeg.npz", train=100)
    status = cifar.main(
        f"--data {path} --epochs 8 --batch-size 10 --optimizers adam-lookahead "
        f"--output {tmp_path}".split()
    )
    assert status == 0
    assert results(tmp_path)["runs"][0]["best_val_accuracy"] > 0.8


def test_large_table_learns_what_pairs_mean(tmp_path):
    """Whether a review is good is told by the order of its two words alone."""
    order = np.random.default_rng(0).integers(2, size=400)
    pairs = np.where(order[:, None] == 1, [5, 9], [9, 5])
    words = np.array([*pairs, None], dtype=object)[:-1]  # as IMDB is stored
    for i, pair in enumerate(pairs):
        words[i] = list(pair)
    path = tmp_path / "reviews.npz"
    np.savez(path, x_train=words, y_train=order, x_test=words, y_test=order)
    status = large_table.main(
        f"--data {path} --rows 30000 --epochs 6 --batch-size 20 --learning-rate 0.05 "
        f"--optimizers lazy-freeze lookahead-lazy-freeze --output {tmp_path}".split()
    )
    assert status == 0
    for run in results(tmp_path)["runs"]:
        assert run["best_val_accuracy"] == 1.0
        seconds = [epoch["seconds"] for epoch in run["epochs"]]
        assert run["epochs"][-1]["trained_seconds"] == pytest.approx(sum(seconds))


def test_pairs_are_hashed_into_the_other_rows():
    words = np.random.default_rng(0).integers(1, 20_000, size=(50, 400))
    words[:, :7] = 0
    rows = 2**21
    found = large_table.with_pairs(words, rows)
    np.testing.assert_array_equal(found[:, :400], words)
    pairs = found[:, 400:]
    assert not pairs[:, :7].any()
    rest = pairs[:, 7:]
    assert rest.min() >= 20_000
    assert rest.max() < rows
    number: dict[tuple, int] = {}
    for pair, row in zip(
        zip(words[:, 7:-1].ravel(), words[:, 8:].ravel(), strict=True),
        rest.ravel(),
        strict=True,
    ):
        assert number.setdefault(pair, row) == row
    # 19,600 pairs in 2 million rows: few share one.
    assert len(set(number.values())) > 0.98 * len(number)
