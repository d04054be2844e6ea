"""NCF on ratings: what is held out, what is drawn, how ranks are scored."""

import zipfile

import keras
import numpy as np
import pytest

for module in ("matplotlib", "rich", "scipy", "pyarrow"):
    pytest.importorskip(module)

from example_data import write_ratings  # noqa: E402

from examples.common.sources import DataError  # noqa: E402
from experiments import _runs, gaps, ncf, report  # noqa: E402


@pytest.fixture
def data(tmp_path):
    return ncf.load(write_ratings(tmp_path / "ratings.parquet"))


def test_what_is_held_out_is_what_each_user_rated_last(tmp_path):
    path = write_ratings(tmp_path / "ratings.parquet")
    data = ncf.load(path)
    by_user: dict[int, list] = {}
    from pyarrow import parquet

    for row in parquet.read_table(path).to_pylist():
        rating = row["timestamp"], row["movie_id"]
        by_user.setdefault(row["user_id"], []).append(rating)
    movies = sorted({movie for ratings in by_user.values() for _, movie in ratings})
    train = {tuple(pair) for pair in data.x_train.tolist()}
    for user, (number, ratings) in enumerate(sorted(by_user.items())):
        items = [movies.index(movie) for _, movie in sorted(ratings)]
        assert {item for who, item in train if who == user} == set(items[:-2]), number
        assert data.x_test[user, :, 0].tolist() == items[-2:]
        for candidates in data.x_test[user, :, 1:].tolist():
            assert len(set(candidates)) == ncf.RANKED
            assert not set(candidates) & set(items)


def test_ratings_are_read_from_the_wheel(tmp_path, data):
    with zipfile.ZipFile(tmp_path / "some.whl", "w") as wheel:
        wheel.write(tmp_path / "ratings.parquet", ncf.IN_WHEEL)
    again = ncf.load(tmp_path / "some.whl")
    np.testing.assert_array_equal(again.x_train, data.x_train)
    np.testing.assert_array_equal(again.x_test, data.x_test)
    (tmp_path / "broken.parquet").write_text("no parquet")
    with pytest.raises(DataError, match=r"broken\.parquet: "):
        ncf.load(tmp_path / "broken.parquet")


def test_negatives_are_drawn_anew_and_not_rated_in_training(data):
    pairs, labels = ncf.examples_of(data, seed=3, epoch=1)
    rated = {tuple(pair) for pair in data.x_train.tolist()}
    assert {tuple(pair) for pair in pairs[labels == 1].tolist()} == rated
    negatives = pairs[labels == 0]
    assert len(negatives) == ncf.NEGATIVES * len(data.x_train)
    assert not {tuple(pair) for pair in negatives.tolist()} & rated
    for user in range(data.users):  # each user as many as ratings, by four
        drawn = np.sum(negatives[:, 0] == user)
        assert drawn == ncf.NEGATIVES * np.sum(data.x_train[:, 0] == user)
    again, _ = ncf.examples_of(data, seed=3, epoch=1)
    np.testing.assert_array_equal(pairs, again)
    other, _ = ncf.examples_of(data, seed=3, epoch=2)
    assert (pairs != other).any()


def test_ranks_are_scored_as_in_the_paper():
    scores = np.zeros((4, 1 + ncf.RANKED))
    scores[:, 1:] = np.linspace(0.01, 0.99, ncf.RANKED)
    scores[0, 0] = 1  # first
    scores[1, 0] = 0.9 + 1e-6  # tenth: nine are above
    scores[2, 0] = 0.9  # ties with the tenth and so is the eleventh
    scores[3, 0] = np.nan
    hit_rate, gain = ncf.ranking(scores)
    assert hit_rate == 2 / 4
    assert gain == pytest.approx((1 / np.log2(2) + 1 / np.log2(11)) / 4)


def test_crosses_are_spread_over_their_rows():
    pairs = np.stack(np.divmod(np.arange(943 * 1682), 1682), axis=1).astype("int32")
    _, _, crosses = ncf.inputs_of(pairs, 1682, ncf.CROSSES)
    counts = np.bincount(crosses, minlength=ncf.CROSSES)
    assert len(counts) == ncf.CROSSES
    # As evenly as drawn at random (1.513 pairs a row), or more so.
    assert counts.var() < 1.6


@pytest.mark.parametrize("crosses", [0, 64])
def test_the_peer_is_the_same_model(data, crosses):
    torch = pytest.importorskip("torch")
    from experiments import _torch_ncf

    model = ncf.build_model(data.users, data.items, crosses)
    peer = _torch_ncf.NeuMF(data.users, data.items, crosses)
    random = np.random.default_rng(0)
    dense = iter([*(f"hidden.{i}" for i in range(len(ncf.MLP_UNITS))), "out"])
    state = {}
    for name, value in peer.state_dict().items():
        values = random.normal(size=value.shape).astype("float32")
        state[name] = torch.from_numpy(values)
    peer.load_state_dict(state)
    for layer in model.layers:
        if isinstance(layer, keras.layers.Embedding):
            rows, width = layer.embeddings.shape
            tables = [n for n in state if n.startswith(("tables", "crosses"))]
            (name,) = (n for n in tables if tuple(state[n].shape) == (rows, width))
            layer.embeddings.assign(state[name].numpy())
        elif isinstance(layer, keras.layers.Dense):
            name = next(dense)
            layer.kernel.assign(state[f"{name}.weight"].numpy().T)
            layer.bias.assign(state[f"{name}.bias"].numpy())
    pairs, _ = ncf.examples_of(data, seed=0, epoch=1)
    inputs = ncf.inputs_of(pairs[:50], data.items, crosses)
    theirs = peer(*map(torch.from_numpy, inputs)).detach().numpy()
    ours = model.predict(inputs, verbose=0)[:, 0]
    np.testing.assert_allclose(theirs, ours, rtol=1e-4, atol=1e-5)
    assert np.ptp(ours) > 0.1


def test_lookahead_is_ranked_on_its_slow_weights(data):
    """After one update and no sync these are the initial ones."""
    settings = {
        "optimizer": "lookahead",
        "learning_rate": 0.1,
        "batch_size": 10**6,
        "crosses": 0,
    }
    keras.utils.set_random_seed(0)
    trainer = ncf._KerasTrainer(data, settings)
    pairs, labels = ncf.examples_of(data, seed=0, epoch=1)
    inputs = ncf.inputs_of(pairs, data.items, 0)
    before = trainer._logits(inputs)
    trainer.train(inputs, labels)
    np.testing.assert_array_equal(trainer.logits(inputs), before)
    assert np.abs(trainer._logits(inputs) - before).max() > 1e-3


@pytest.mark.long
def test_the_best_rate_of_the_sweep_is_compared(tmp_path, capsys):
    pytest.importorskip("torch")
    path = write_ratings(tmp_path / "ratings.parquet")
    output = tmp_path / "runs"
    arguments = ["--data", str(path), "--epochs", "2", "--output", str(output)]
    arguments += ["--optimizers", "lookahead-lazy-freeze", ncf.PEER]
    arguments += ["--learning-rates", "1e-9", "0.03", "--crosses", "64"]
    with pytest.raises(SystemExit):
        ncf.main(["compare", *arguments])
    assert "not tuned yet: lookahead-lazy-freeze-batch256" in capsys.readouterr().err
    assert ncf.main(["tune", *arguments]) == 0
    assert ncf.main(["compare", *arguments, "--seeds", "0", "5"]) == 0
    records = _runs.read(output)
    assert len(records) == 6
    for optimizer in ("lookahead-lazy-freeze", ncf.PEER):
        found = {
            record["settings"]["learning_rate"]: record["results"]["val_ndcg10"]
            for record in records
            if record["settings"]["optimizer"] == optimizer
            and record["settings"]["seed"] == 0
        }
        best = max(found, key=found.__getitem__)
        name = f"{optimizer}-batch256-crosses64-rate{best:g}-seed5"
        (record,) = (record for record in records if record["name"] == name)
        first, second = record["results"]["epochs"]
        assert second["loss"] != first["loss"]


# Report


def ran(optimizer, rate, seed, gain, hit_rate, batch_size=256, crosses=0):
    settings = {
        "optimizer": optimizer,
        "learning_rate": rate,
        "seed": seed,
        "batch_size": batch_size,
        "crosses": crosses,
    }
    measured = {"val_ndcg10": gain, "test_ndcg10": gain / 2, "test_hr10": hit_rate}
    results = {"best_epoch": seed + 7, **measured, "epochs": [{"epoch": 1, **measured}]}
    return {"experiment": "ncf", "settings": settings, "results": results}


def test_each_optimizer_is_shown_at_the_best_rate_on_validation_items():
    records = [
        ran("adam", 0.1, 0, gain=0.30, hit_rate=0.50),
        ran("adam", 0.2, 0, gain=0.20, hit_rate=0.90),  # better on the test only
        ran("adam", 0.1, 1, gain=0.30, hit_rate=0.52),
        ran("lazy-freeze", 0.2, 0, gain=0.40, hit_rate=0.53),
        ran("lazy-freeze", 0.2, 1, gain=0.40, hit_rate=0.56),
        ran("lazy-freeze", 0.2, 2, gain=0.40, hit_rate=0.99),  # Adam has no seed 2
        ran("lazy-freeze", 0.1, 3, gain=0.90, hit_rate=0.99),  # not of the sweep
        ran("adam", 0.1, 0, gain=0.10, hit_rate=0.20, crosses=64),
    ]
    _, adam, freeze, crossed = report.ncf_table(records)
    # Student's quantile of two values, 12.706, times half of their difference.
    assert adam[1:7] == ["256", "", "0.1", "2", "51.00 ± 12.71", ""]
    assert freeze[3:5] == ["0.2", "3"]
    assert freeze[6] == "+3.50 ± 6.35"
    assert freeze[8] == "+5.00 ± 0.00"
    assert freeze[9] == "7, 8, 9"
    assert crossed[2:6] == ["2^6", "0.1", "1", "20.00"]
    heading, of_adam, of_freeze, _ = report.ncf_rates_table(records)
    assert heading[3:] == ["0.1", "0.2"]
    assert of_adam[3:] == ["30.00", "20.00"]
    assert of_freeze[3:] == ["", "40.00"]
    report.draw_ncf(records)


def test_the_authors_rate_is_compared_epoch_by_epoch():
    records = []
    for optimizer, ahead in (("adam", 0.0), ("lazy-freeze", -0.01)):
        for seed in (0, 1):
            record = ran(optimizer, ncf.AUTHORS_RATE, seed, gain=0.3, hit_rate=0.9)
            record["results"]["epochs"] = [
                {"test_hr10": 0.5 + number / 100 + seed / 10 + number * ahead}
                for number in range(1, ncf.EPOCHS + 1)
            ]
            records.append(record)
    records.append(ran("adam", 0.5, 0, gain=0.9, hit_rate=0.9))
    _, adam, freeze = report.ncf_same_rate_table(records)
    assert adam[1] == "2"
    assert [cell.split()[0] for cell in adam[2::2]] == ["60.00", "65.00", "75.00"]
    assert adam[3::2] == ["", "", ""]
    assert freeze[3::2] == ["-5.00 ± 0.00", "-10.00 ± 0.00", "-20.00 ± 0.00"]


def test_steps_between_samples_are_counted():
    random = np.random.default_rng(0)
    drawn = [[random.integers(0, rows, 6) for rows in (9, 30)] for _ in range(40)]
    found = gaps.gaps_of(iter(drawn), [9, 40])
    expected, times = [], {}
    for table in (0, 1):
        for row in range(40):
            steps = [n for n, ids in enumerate(drawn) if row in ids[table]]
            expected += np.diff(steps).tolist()
            if steps:
                times[table, row] = len(steps)
    assert found["median"] == np.median(expected)
    assert found["third_quartile"] == np.quantile(expected, 0.75)
    assert found["median_row"] == np.median([40 / each for each in times.values()])
    assert found["rows_sampled"] == len(times) / 49
