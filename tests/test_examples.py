"""The examples train and report; their data are in tools/test_example_data.py."""

import gzip
import json

import keras
import numpy as np
import pytest

for module in ("matplotlib", "rich", "PIL", "sklearn"):
    pytest.importorskip(module)

from example_data import write_jpegs  # noqa: E402

from examples.cifar_lookahead import __main__ as cifar  # noqa: E402
from examples.common import imdb as imdb_data  # noqa: E402
from examples.common.comparison import METRICS, Comparison  # noqa: E402
from examples.common.sources import DataError  # noqa: E402
from examples.imdb_lazy import __main__ as imdb  # noqa: E402
from examples.large_table import __main__ as large_table  # noqa: E402
from examples.recommender import __main__ as recommender  # noqa: E402
from examples.recommender import criteo  # noqa: E402
from examples.recommender import model as dlrm  # noqa: E402

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


def test_every_optimizer_learns_the_synthetic_reviews(tmp_path):
    """So that the first example a reader runs shows a difference in time alone."""
    status = large_table.main(
        f"--data synthetic --rows 100000 --output {tmp_path}".split()
    )
    assert status == 0
    runs = results(tmp_path)["runs"]
    best = {run["optimizer"]: run["best_val_accuracy"] for run in runs}
    assert best.keys() == large_table.CURVES.keys()
    # What the picture's title calls the same accuracy.
    fast, slow = large_table.FAST
    assert abs(best[fast] - best[slow]) <= METRICS["accuracy"].same
    # Without the word pairs, no model tells good reviews from bad ones.
    assert min(best.values()) > 0.95


def test_the_title_of_a_comparison_of_times_says_what_was_measured(tmp_path):
    comparison = Comparison(
        "large_table",
        large_table.CURVES,
        imdb_data.synthetic(8, 8),
        {"output": tmp_path},
        fast=large_table.FAST,
    )

    def add(name, accuracy, seconds):
        history = keras.callbacks.History()
        history.params = {"steps": 4}
        history.history = {
            "val_accuracy": [0.5, accuracy],
            "val_loss": [0.7, 0.6],
            "seconds": [9.0, seconds],  # the first includes compiling
        }
        comparison.add(name, 0, history)

    add("adam", 0.9, 5.0)
    assert comparison.title() == f"synthetic reviews, {keras.backend.backend()}"
    add("lazy-freeze", 0.905, 0.1)
    first, second = comparison.title().splitlines()
    assert first == "Same accuracy, an epoch in 1/50 of the time"
    assert second.startswith("LazyOptimizer, freeze: 90.50%, 0.1 s per epoch; Adam: ")
    add("lazy-freeze", 0.8, 0.1)
    assert comparison.title().startswith("Lower accuracy, an epoch in 1/50 of the time")


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


# The recommender


def auc(scores, labels):
    """In which share of pairs of a click and a non-click the click scores higher."""
    order = np.argsort(np.argsort(scores, kind="stable"), kind="stable")
    clicks = labels == 1
    pairs = clicks.sum() * (~clicks).sum()
    return (order[clicks].sum() - clicks.sum() * (clicks.sum() - 1) / 2) / pairs


def test_recommender_run_leaves_table_json_and_picture(tmp_path, capsys):
    names = ["row-wise-adagrad"]
    status = recommender.main(
        "--data synthetic --rows 3000 --train-samples 512 --test-samples 256 "
        f"--epochs 2 --batch-size 128 --output {tmp_path} "
        f"--optimizers {' '.join(names)}".split()
    )
    assert status == 0
    out = capsys.readouterr().out
    assert out.startswith("Data: synthetic clicks, 512 + 256 samples\n")
    assert "Validation AUC and loss: synthetic clicks" in out
    assert "│ LazyOptimizer(RowWiseAdagrad) " in out
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    runs = results(tmp_path)["runs"]
    assert [run["optimizer"] for run in runs] == names
    for run in runs:
        assert 0 < run["best_val_auc"] < 1
        assert [epoch["epoch"] for epoch in run["epochs"]] == [1, 2]


def test_model_is_that_of_the_paper():
    """Against the equations in NumPy: layers, inner products of all pairs, layers."""
    sizes = (5, 4, 3)
    model = dlrm.make_model(sizes, width=2, bottom=(4,), top=(6,))
    inputs, _ = dlrm.draw_clicks(sizes, 7, seed=0)
    weights = {
        f"{layer.name}/{weight.name}": keras.ops.convert_to_numpy(weight)
        for layer in model.layers
        for weight in layer.weights
    }
    tables = [weights[f"table_{i}/embeddings"] for i in range(3)]
    dense = [
        (weights[name], weights[name.replace("kernel", "bias")])
        for name in weights
        if name.endswith("kernel")
    ]

    def through(x, layers):
        for kernel, bias in layers:
            x = np.maximum(x @ kernel + bias, 0)
        return x

    bottom = through(inputs["numbers"], dense[:2])
    vectors = [
        bottom,
        *(t[i] for t, i in zip(tables, inputs["ids"].T, strict=True)),
    ]
    products = [
        (vectors[i] * vectors[j]).sum(axis=1) for i in range(4) for j in range(i)
    ]
    top = through(np.column_stack([bottom, *products]), dense[2:3])
    logit = top @ dense[3][0] + dense[3][1]
    np.testing.assert_allclose(
        model.predict(inputs, verbose=0), 1 / (1 + np.exp(-logit)), rtol=1e-4
    )


def test_rare_ids_tell_more_of_a_click_than_common_ones():
    """Rated by the clicks that each id got in other draws: no model, no optimizer."""
    train, clicks = dlrm.draw_clicks(criteo.SIZES, 200_000, seed=0)
    test, labels = dlrm.draw_clicks(criteo.SIZES, 20_000, seed=1)
    score = {"common": np.zeros(len(labels)), "rare": np.zeros(len(labels))}
    for table, rows in enumerate(criteo.SIZES):
        ids = train["ids"][:, table]
        shown = np.bincount(ids, minlength=rows)
        clicked = np.bincount(ids, clicks, minlength=rows)
        rate = (clicked + 10 * clicks.mean()) / (shown + 10)
        odds = np.log(rate / (1 - rate))
        is_rare = shown < len(clicks) / 1000
        found = odds[test["ids"][:, table]]
        rare = is_rare[test["ids"][:, table]]
        score["rare"] += np.where(rare, found, odds.mean())
        score["common"] += np.where(rare, odds.mean(), found)
    assert auc(score["rare"], labels) > 0.6
    assert auc(score["rare"], labels) > auc(score["common"], labels) + 0.03
    assert 0.2 < labels.mean() < 0.4


def test_a_file_in_the_format_of_criteo(tmp_path):
    """Missing values, hashing, both parts; the same compressed."""
    numbers = [[str(i * j) for j in range(13)] for i in range(4)]
    numbers[1][0], numbers[1][1] = "", "-2"
    categories = [[f"{1000 * i + j:08x}" for j in range(26)] for i in range(4)]
    categories[2][3] = ""
    text = "".join(
        "\t".join([str(i % 2), *numbers[i], *categories[i]]) + "\n" for i in range(4)
    )
    (tmp_path / "clicks.tsv").write_text(text)
    with gzip.open(tmp_path / "clicks.tsv.gz", "wt") as file:
        file.write(text)
    sizes = [10] * 25 + [1000]
    for name in ("clicks.tsv", "clicks.tsv.gz"):
        data = criteo.load(tmp_path / name, sizes, train=2, test=1)
        np.testing.assert_array_equal(data.y_train, [0, 1])
        np.testing.assert_array_equal(data.y_test, [0])
        numbers_read = [[0] * 13, [0, 0, *range(2, 13)], [*range(0, 26, 2)]]
        expected = np.log1p(np.array(numbers_read, "float32"))
        np.testing.assert_allclose(data.x_train["numbers"], expected[:2], rtol=1e-6)
        np.testing.assert_allclose(data.x_test["numbers"], expected[2:], rtol=1e-6)
        values = 1000 * np.arange(3)[:, None] + np.arange(26)
        rows = 1 + values % (np.array(sizes) - 1)
        rows[2, 3] = 0  # is missing
        np.testing.assert_array_equal(data.x_train["ids"], rows[:2])
        np.testing.assert_array_equal(data.x_test["ids"], rows[2:])


def test_a_short_file_keeps_its_last_tenth_for_the_test(tmp_path):
    line = "\t".join(["1", *["5"] * 13, *["ff"] * 26]) + "\n"
    (tmp_path / "clicks.tsv").write_text(20 * line)
    data = criteo.load(tmp_path / "clicks.tsv", criteo.SIZES)
    assert (len(data.y_train), len(data.y_test)) == (18, 2)
    (tmp_path / "clicks.tsv").write_text(line)
    with pytest.raises(DataError, match="expected at least 2 lines, received 1"):
        criteo.load(tmp_path / "clicks.tsv", criteo.SIZES)
