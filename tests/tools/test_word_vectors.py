"""Word vectors: which pairs are made of a text, and what is measured on them."""

import json

import keras
import numpy as np
import pytest

for module in ("matplotlib", "rich", "scipy"):
    pytest.importorskip(module)

from example_data import write_imdb  # noqa: E402

from experiments import _runs, report, word_vectors  # noqa: E402


def text(lengths, words=50):
    random = np.random.default_rng(1)
    reviews = np.repeat(np.arange(len(lengths)), lengths)
    return random.integers(1, words, len(reviews)).astype("int32"), reviews


def test_pairs_are_of_words_within_each_window(monkeypatch):
    monkeypatch.setattr(word_vectors, "KEEP", 1.0)  # all words
    words, reviews = text([1, 2, 30, 9])
    pairs = word_vectors.pairs_of(
        words, reviews, np.bincount(words), np.random.default_rng(3)
    )
    random = np.random.default_rng(3)
    random.random(len(words))
    windows = random.integers(1, word_vectors.WINDOW + 1, len(words))
    expected = [
        (words[i], words[j])
        for i in range(len(words))
        for j in range(len(words))
        if i != j and reviews[i] == reviews[j] and abs(i - j) <= windows[i]
    ]
    assert sorted(map(tuple, pairs.tolist())) == sorted(expected)


def test_frequent_words_are_left_out_at_random(monkeypatch):
    monkeypatch.setattr(word_vectors, "KEEP", 0.01)
    monkeypatch.setattr(word_vectors, "WINDOW", 1)
    random = np.random.default_rng(0)
    words = np.where(
        random.random(200_000) < 0.64, 1, random.integers(2, 1000, 200_000)
    )
    counts = np.bincount(words)
    pairs = word_vectors.pairs_of(words, np.zeros(len(words)), counts, random)
    # sqrt(0.01 / 0.64) = 1/8 of the frequent word stays, and all of the others.
    frequent, others = 0.64 / 8, 0.36
    share = np.mean(pairs[:, 0] == 1)
    assert share == pytest.approx(frequent / (frequent + others), abs=0.005)
    kept = (frequent + others) * len(words)
    assert len(pairs) == pytest.approx(2 * kept, rel=0.01)


def test_negatives_are_drawn_by_the_power_of_the_frequency():
    counts = np.array([0.0, 1, 16, 81, 0])
    negatives = word_vectors.Negatives(counts)
    drawn = negatives.draw(20_000, np.random.default_rng(0))
    assert drawn.shape == (20_000, word_vectors.NEGATIVES)
    shares = np.bincount(drawn.ravel(), minlength=5) / drawn.size
    np.testing.assert_allclose(shares, np.array([0, 1, 8, 27, 0]) / 36, atol=0.01)


def test_the_loss_is_that_of_the_paper():
    model = word_vectors.build_model(20)
    random = np.random.default_rng(0)
    tables = [random.normal(size=(20, word_vectors.WIDTH)) for _ in range(2)]
    for name, table in zip(("words", "contexts_of_words"), tables, strict=True):
        model.get_layer(name).embeddings.assign(table.astype("float32"))
    word = random.integers(0, 20, 8).astype("int32")
    contexts = random.integers(0, 20, (8, 1 + word_vectors.NEGATIVES)).astype("int32")
    labels = np.eye(1, contexts.shape[1]).repeat(8, axis=0)
    losses = word_vectors._losses(model, [word, contexts], labels)
    for i in range(8):
        products = [tables[1][c] @ tables[0][word[i]] for c in contexts[i]]
        sigmoid = [1 / (1 + np.exp(-p)) for p in products]
        expected = -np.log(sigmoid[0]) - sum(np.log(1 - s) for s in sigmoid[1:])
        assert losses[i] == pytest.approx(expected, rel=1e-4)


def test_tables_are_updated_by_rows():
    model = word_vectors.build_model(200)
    for name in ("lazy-decay", "lazy-freeze", "lazy-adagrad"):
        optimizer = word_vectors.build({"optimizer": name, "learning_rate": 0.1})
        model.compile(optimizer, keras.losses.BinaryCrossentropy(from_logits=True))
        before = model.get_layer("contexts_of_words").embeddings.numpy().copy()
        word = np.array([3, 4], "int32")
        contexts = np.array([[1, 2, 5, 6, 7, 8]] * 2, "int32")
        model.fit([word, contexts], np.eye(2, 6), verbose=0)
        after = model.get_layer("contexts_of_words").embeddings.numpy()
        moved = np.flatnonzero((before != after).any(axis=1))
        assert moved.tolist() == [1, 2, 5, 6, 7, 8]
        assert set(optimizer.step_forms.values()) == {"rows"}


def test_the_nearest_words_are_named(tmp_path):
    table = np.random.default_rng(0).normal(size=(9000, 4))
    probe, near = word_vectors.PROBES[:2]
    table[near] = 3 * table[probe] + 1e-3
    ranks = tmp_path / "ranks.json"
    ranks.write_text(json.dumps({f"word{rank}": rank for rank in range(1, 9000)}))
    source = write_imdb(tmp_path / "imdb.npz")
    for words, prefix in ((ranks, "word"), (None, "")):
        data = word_vectors.load(source, words)
        neighbours = word_vectors._neighbours(table, data)
        assert len(neighbours) == len(word_vectors.PROBES)
        assert neighbours[f"{prefix}{probe}"][0] == f"{prefix}{near}"


def reviews_of_topics(count, random):
    """Reviews of ten words of one of forty topics each, so that words tell contexts."""
    reviews = np.empty(count, dtype=object)
    for index in range(count):
        words = 20_000 + 10 * random.integers(40) + random.integers(0, 10, 30)
        reviews[index] = words.tolist()
    return reviews


@pytest.mark.long
def test_the_best_rate_of_the_sweep_is_compared(tmp_path):
    random = np.random.default_rng(0)
    texts = {name: reviews_of_topics(400, random) for name in ("x_train", "x_test")}
    source = str(write_imdb(tmp_path / "imdb.npz", **texts))
    arguments = ["--data", source, "--output", str(tmp_path / "runs"), "--epochs", "2"]
    arguments += ["--batch-size", "64", "--batches-an-epoch", "40"]
    arguments += ["--optimizers", "lazy-freeze", "--learning-rates", "1e-9", "0.1"]
    assert word_vectors.main(["tune", *arguments]) == 0
    assert word_vectors.main(["compare", *arguments, "--seeds", "2"]) == 0
    records = {record["name"]: record for record in _runs.read(tmp_path / "runs")}
    assert list(records) == [
        "lazy-freeze-batch64x40-rate0.1-seed0",
        "lazy-freeze-batch64x40-rate0.1-seed2",
        "lazy-freeze-batch64x40-rate1e-09-seed0",
    ]
    for name, record in records.items():
        results = record["results"]
        losses = [epoch["val_loss"] for epoch in results["epochs"]]
        assert results["val_loss"] == min(losses)
        # Six logits of 0 at the start.
        if "1e-09" in name:
            assert losses[0] == pytest.approx(6 * np.log(2), rel=1e-4)
        else:
            assert losses[1] < 0.8 * 6 * np.log(2)
            assert results["test_loss"] == pytest.approx(losses[1], rel=0.1)


# Report


def ran(
    optimizer,
    rate,
    seed,
    loss,
    neighbour="good",
    batches=word_vectors.BATCHES_AN_EPOCH,
):
    settings = {"optimizer": optimizer, "learning_rate": rate, "seed": seed}
    settings |= {"epochs": 4, "batches_an_epoch": batches}
    measured = {f"{part}_loss": loss for part in ("val", "test")}
    measured |= {f"{name}_rare": loss and 2 * loss for name in measured}
    results = {
        **measured,
        "epochs": [{"epoch": e, "seconds": e * batches, **measured} for e in (1, 2, 3)],
        "neighbours": {"great": [neighbour]},
    }
    return {"experiment": "word_vectors", "settings": settings, "results": results}


def test_each_optimizer_is_shown_at_the_rate_of_the_lowest_loss():
    records = [
        ran("adam", 0.1, 0, 2.0),
        ran("adam", 0.2, 0, 3.0),
        ran("adam", 0.3, 0, None),  # diverged
        ran("adam", 0.1, 1, 2.5),
        ran("lazy-decay", 0.2, 0, 2.25, "fine"),
        ran("lazy-decay", 0.2, 1, 2.75, "other"),
        ran("lazy-decay", 0.3, 0, 1.5, "longer", batches=1000),
    ]
    _, adam, decay, longer = report.word_vectors_table(records)
    assert adam[1:6] == ["1000", "0.1", "2", "2.2500 ± 3.1766", ""]
    assert decay[5] == "+0.2500 ± 0.0000"
    assert decay[7:] == ["+0.5000 ± 0.0000", "250.0"]
    assert longer[1:6] == ["4000", "0.3", "1", "1.5000", ""]
    _, of_adam, of_decay, _ = report.word_vectors_rates_table(records)
    assert of_adam[1:] == ["1000", "2.0000", "3.0000", "diverged"]
    assert of_decay[1:] == ["1000", "", "2.2500", ""]
    heading, great = report.neighbours_table(records)
    assert heading == ["word", "LazyOptimizer, decay"]  # of the longest trainings
    assert great == ["great", "longer"]
    assert report.neighbours_table(records[:-1])[1] == ["great", "good", "fine"]
    report.draw_word_vectors(records)


def test_moments_are_compared_on_every_task():
    accuracies = {
        "adam": 0.50,
        "lazy-decay": 0.52,
        "lazy-freeze": 0.51,
        "lazy-replay": 0.53,
    }
    records = []
    for number, (optimizer, accuracy) in enumerate(accuracies.items()):
        for seed in (0, 1):
            settings = {"optimizer": optimizer, "seed": seed, "learning_rate": 0.1}
            epochs = [
                {"val_accuracy": each, "val_loss": each, "seconds": seconds}
                for each, seconds in ((0.3, 99), (0.5, 6 / (number + 1)), (0.4, 9))
            ]
            epochs.append({**epochs[-1], "seconds": 0})
            results = {"best_val_accuracy": accuracy + seed / 10, "epochs": epochs}
            of_imdb = {"experiment": "imdb", "settings": settings, "results": results}
            settings = {**settings, "rows": report.large_table.ROWS}
            of_table = {**of_imdb, "experiment": "large_table", "settings": settings}
            of_vectors = ran(optimizer, 0.1, seed, np.exp(-number / 100))
            of_vectors["results"]["epochs"] = epochs
            records += [of_imdb, of_table, of_vectors]
    for task, gap in (("imdb", 88.0), ("large_table", 391.0), ("word_vectors", 42.0)):
        settings, results = {"task": task, "seed": 0}, {"median_row": gap}
        records.append({"experiment": "gaps", "settings": settings, "results": results})
    _, imdb, table, vectors = report.moments_table(records)
    points = ["2", "+2.00 ± 0.00", "+1.00 ± 0.00", "-1.00 ± 0.00", "2.0", "3.0"]
    # From 0.5 to 0.4, in percent of 0.5. A loss ends above its least, 0.3.
    assert imdb[1:] == ["88", "20.0", *points]
    assert table[1:] == ["391", "20.0", *points]
    # A loss that is one percent lower is one point.
    points = ["2", "+1.00 ± 0.00", "+2.00 ± 0.00", "+1.00 ± 0.00", "2.0", "3.0"]
    assert vectors[1:] == ["42", "33.3", *points]
    report.draw_moments(records)
    heading, _, replay, _ = report.candidates_table(records)
    assert heading[2:] == [imdb[0], table[0], vectors[0]]
    ahead = "+2.00 ± 0.00, 2 seeds"
    assert replay[2:] == [ahead, ahead, "+1.00 ± 0.00, 2 seeds"]
