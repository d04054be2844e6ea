"""The examples' data, command lines and errors; their trainings: test_examples.py."""

import json
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path

import keras
import numpy as np
import pytest

for module in ("matplotlib", "rich", "PIL", "sklearn"):
    pytest.importorskip(module)


from example_data import write_imdb, write_jpegs  # noqa: E402

from examples.cifar_lookahead import __main__ as cifar  # noqa: E402
from examples.common import cifar as cifar_data  # noqa: E402
from examples.common import imdb as imdb_data  # noqa: E402
from examples.common import record, sources  # noqa: E402
from examples.imdb_lazy import __main__ as imdb  # noqa: E402
from examples.recommender import __main__ as recommender  # noqa: E402

ROOT = Path(__file__).parents[2]
EXAMPLES = {"imdb_lazy": imdb, "cifar_lookahead": cifar}
PROGRAMS = {**EXAMPLES, "recommender": recommender}
LOADERS = {"imdb_lazy": imdb_data.load, "cifar_lookahead": cifar_data.load}


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    """Nothing cached and no network, whatever the machine has."""

    def refuse(*args, **kwargs):
        raise urllib.error.URLError("no network in tests")

    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "keras"))
    monkeypatch.setattr(urllib.request, "urlopen", refuse)


def results(folder):
    return json.loads((folder / "results.json").read_text())


# Loaders


def test_imdb_file_is_read_as_keras_reads_it(tmp_path, monkeypatch):
    path = write_imdb(tmp_path / "imdb.npz")
    monkeypatch.setattr("keras.src.datasets.imdb.get_file", lambda **_: str(path))
    (x_train, y_train), (x_test, y_test) = keras.datasets.imdb.load_data(
        num_words=20_000
    )

    data = imdb_data.from_path(path)

    pad = keras.utils.pad_sequences
    np.testing.assert_array_equal(data.x_train, pad(x_train, maxlen=80))
    np.testing.assert_array_equal(data.x_test, pad(x_test, maxlen=80))
    np.testing.assert_array_equal(data.y_train, y_train)
    np.testing.assert_array_equal(data.y_test, y_test)


def test_imdb_limits_take_the_first_of_the_shuffled_reviews(tmp_path):
    path = write_imdb(tmp_path / "imdb.npz")
    whole, part = imdb_data.from_path(path), imdb_data.from_path(path, 7, 5)
    np.testing.assert_array_equal(part.x_train, whole.x_train[:7])
    np.testing.assert_array_equal(part.y_test, whole.y_test[:5])


@pytest.mark.parametrize("wanted", ["auto", "keras"])
def test_cached_imdb_needs_no_network_and_stays(tmp_path, capsys, wanted):
    path = write_imdb(tmp_path / "keras" / "datasets" / "imdb.npz")
    before = path.read_bytes()
    data = imdb_data.load(wanted)
    np.testing.assert_array_equal(data.x_train, imdb_data.from_path(path).x_train)
    assert capsys.readouterr().out == "Data: IMDB, 40 + 12 samples, from Keras\n"
    assert path.read_bytes() == before


def test_jpegs_are_decoded_and_shuffled_with_their_labels(tmp_path):
    data = cifar_data.from_path(write_jpegs(tmp_path / "jpeg.npz"))
    assert data.x_train.shape == (40, 32, 32, 3)
    assert data.x_test.shape == (20, 32, 32, 3)
    # Red rises with the class, so ordering by either gives the same classes.
    by_red = data.y_train[np.argsort(data.x_train[:, 0, 0, 0], kind="stable")]
    np.testing.assert_array_equal(by_red, np.sort(data.y_train))
    assert (np.diff(data.y_train) < 0).any()
    np.testing.assert_allclose(data.x_train.mean(axis=(0, 1, 2)), 0, atol=1e-4)
    np.testing.assert_allclose(data.x_train.std(axis=(0, 1, 2)), 1, atol=1e-3)


def test_jpeg_limits_take_the_first_of_the_shuffled_pictures(tmp_path):
    path = write_jpegs(tmp_path / "jpeg.npz")
    whole, part = cifar_data.from_path(path), cifar_data.from_path(path, 15, 6)
    np.testing.assert_array_equal(part.y_train, whole.y_train[:15])
    np.testing.assert_array_equal(part.y_test, whole.y_test[:6])


def test_digits_are_divided_without_overlap():
    data = cifar_data.digits()
    assert (len(data.x_train), len(data.x_test)) == (1437, 360)
    assert data.x_train.shape[1:] == (8, 8, 1)
    assert set(data.y_train) == set(data.y_test) == set(range(10))


def test_synthetic_labels_are_in_the_words_but_not_in_the_common_ones():
    data = imdb_data.synthetic()
    again = imdb_data.synthetic()
    np.testing.assert_array_equal(data.x_train, again.x_train)
    assert not np.array_equal(data.x_train[:1000], data.x_test)

    def naive_bayes_accuracy(low, high):
        counts = np.ones((2, imdb_data.NUM_WORDS))
        for review, label in zip(data.x_train, data.y_train, strict=True):
            np.add.at(counts[label], review, 1)
        score = np.diff(np.log(counts / counts.sum(axis=1, keepdims=True)), axis=0)[0]
        score[:low] = score[high:] = 0
        return np.mean((score[data.x_test].sum(axis=1) > 0) == data.y_test)

    # Words number 4 to 53 are the 50 most frequent.
    assert naive_bayes_accuracy(4, 54) < 0.6
    assert 0.7 < naive_bayes_accuracy(54, imdb_data.NUM_WORDS) < 0.89


# Where data cannot be had


@pytest.mark.parametrize(
    ("name", "took"),
    [
        ("imdb_lazy", "synthetic reviews, 3,000 + 1,000 samples"),
        ("cifar_lookahead", "scikit-learn's digits, 1,437 + 360 samples"),
    ],
)
def test_auto_falls_back_and_says_so(name, took, capsys):
    LOADERS[name]("auto")
    out = capsys.readouterr().out
    assert out.startswith(f"Data: {took}, as Keras's own are not to be had: no answer")
    assert out.count("\n") == 1


def test_auto_falls_back_on_a_damaged_cached_file(tmp_path, capsys):
    path = tmp_path / "keras" / "datasets" / "imdb.npz"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"half a download")
    assert imdb_data.load("auto").source == "synthetic reviews"
    assert "imdb.npz: damaged" in capsys.readouterr().out
    assert path.exists()


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("keras", "no answer from"),
        ("nothing.npz", "no such file"),
        (".", "not a file"),
        ("text.npz", "damaged, or not an .npz file"),
        ("cut.npz", "damaged"),
        ("other.npz", "wrong format, no "),
    ],
)
def test_data_asked_for_and_not_there(
    name, source, message, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    Path("text.npz").write_text("not an archive")
    np.savez("other.npz", x=np.zeros(3))
    write = {"imdb_lazy": write_imdb, "cifar_lookahead": write_jpegs}[name]
    content = bytearray(write(tmp_path / "cut.npz").read_bytes())
    content[len(content) // 3 : len(content) // 2] = bytes(
        len(content) // 2 - len(content) // 3
    )
    Path("cut.npz").write_bytes(content)
    assert_refused(name, source, message, capsys)


def words(*reviews):
    array = np.empty(len(reviews), dtype=object)
    array[:] = reviews
    return array


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"y_train": None}, "no y_train in it"),
        ({"y_test": np.zeros(3)}, "differ in number"),
        ({"x_test": words(), "y_test": np.zeros(0)}, "no reviews"),
        ({"y_train": np.arange(40)}, "labels other than 0 and 1"),
        ({"x_test": words(*[[0, 1]] * 12)}, "not a list of word ranks"),
        ({"x_test": words(*[["good", "film"]] * 12)}, "wrong format"),
        ({"x_test": words(*[None] * 12)}, "wrong format"),
        ({"x_train": np.arange(1, 41)}, "not a list of word ranks"),
    ],
)
def test_imdb_file_in_a_wrong_format(changes, message, tmp_path, capsys):
    path = write_imdb(tmp_path / "imdb.npz", **changes)
    assert_refused("imdb_lazy", path, message, capsys)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"test_size": None}, "no test_size in it"),
        ({"train_jpeg": np.zeros((4, 4))}, "not a row of bytes"),
        ({"train_label": np.zeros(3, "uint8")}, "differ in number"),
        ({"train_size": np.full(40, 7)}, "do not add up"),
        ({"test_label": np.full(20, 10)}, "labels other than 0 to 9"),
        ({"side": 16}, "not 32 x 32"),
        (
            {
                "test_jpeg": np.zeros(2000, "uint8"),
                "test_size": np.full(20, 100),
            },
            "wrong format",
        ),
    ],
)
def test_jpeg_file_in_a_wrong_format(changes, message, tmp_path, capsys):
    path = write_jpegs(tmp_path / "jpeg.npz", **changes)
    assert_refused("cifar_lookahead", path, message, capsys)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: "x"}, "line 2: expected the label 0 or 1, received 'x'"),
        ({3: "1.5"}, "line 2: expected an integer of at most 32 bits or nothing as "),
        ({3: "1.5"}, "as integer 3, received '1.5'"),
        ({15: "zz"}, "expected a hexadecimal number of at most 32 bits or nothing as "),
        ({15: "f" * 20}, f"as category 2, received '{'f' * 20}'"),
        ({5: "1\t2"}, "which are 40 fields with tabs between them; received 41"),
    ],
)
def test_clicks_in_a_wrong_format(change, message, tmp_path, capsys):
    line = ["1", *["5"] * 13, *["ff"] * 26]
    wrong = [change.get(place, text) for place, text in enumerate(line)]
    path = tmp_path / "clicks.tsv"
    path.write_text("\n".join("\t".join(fields) for fields in (line, wrong, line)))
    assert_refused("recommender", path, message, capsys)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("nothing.tsv", None, "no such file"),
        (".", None, "not a file"),
        ("empty.tsv", b"", "expected at least 2 lines, received 0"),
        ("picture.png", b"\x89PNG\xff\xfe", "expected lines of text, received other"),
        ("text.tsv.gz", b"not compressed", "expected lines of text, received other"),
        ("words.txt", b"some words\n", "line 1: expected a label, 13 integers and 26"),
    ],
)
def test_clicks_that_cannot_be_read(name, content, message, tmp_path, capsys):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert_refused("recommender", tmp_path / name, message, capsys)


def assert_refused(name, source, message, capsys):
    status = PROGRAMS[name].main(["--data", str(source), "--output", "unused"])
    captured = capsys.readouterr()
    assert status == 2
    assert captured.out == ""
    assert captured.err.startswith(f"{name}: error: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert not Path("unused").exists()


def test_output_that_is_a_file(tmp_path, capsys):
    (tmp_path / "out").touch()
    assert imdb.main(["--data", "synthetic", "--output", str(tmp_path / "out")]) == 2
    assert "error: " in capsys.readouterr().err


def test_the_command_itself_fails_without_a_traceback(tmp_path):
    command = [sys.executable, "-m", "examples.imdb_lazy"]
    path = ["--data", str(tmp_path / "nothing.npz"), "--output", str(tmp_path)]
    done = subprocess.run([*command, *path], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith("nothing.npz: no such file")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["--epochs", "0"],
        ["--alpha", "1.5"],
        ["--optimizers", "lion"],
        ["--seed", "-1"],
        ["--adam-learning-rate", "nan"],
    ],
)
def test_options_that_make_no_sense(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        cifar.main(["--data", "digits", *arguments])
    assert stopped.value.code == 2


def test_a_silent_host_is_given_up(monkeypatch):
    silence_ends = threading.Event()

    def wait(*args, **kwargs):
        assert silence_ends.wait(60)
        raise urllib.error.URLError("too late")

    monkeypatch.setattr(urllib.request, "urlopen", wait)
    monkeypatch.setattr(sources, "PATIENCE", 0.1)
    try:
        assert not sources.answers("https://example.org/file")
    finally:
        silence_ends.set()


def test_a_failing_download_is_a_data_error(monkeypatch):
    monkeypatch.setattr(sources, "answers", lambda url: True)

    def fail():
        raise Exception("URL fetch failure:\n 404")

    with pytest.raises(sources.DataError, match=r"^URL fetch failure: 404$"):
        sources.download(fail, "https://example.org/file")


# Results


def test_json_has_null_for_a_loss_that_is_no_number(tmp_path):
    runs = [{"epochs": [{"epoch": 1, "val_loss": float("nan")}]}]
    record.write_json(tmp_path / "results.json", {"runs": runs})
    assert results(tmp_path)["runs"][0]["epochs"][0]["val_loss"] is None
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
