"""Where data come from: a file, Keras's own data sets, or neither."""

import os
import socket
import threading
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

T = TypeVar("T")

PATIENCE = 5.0  # seconds until a host that does not answer counts as out of reach


class DataError(Exception):
    """Data that were asked for cannot be had; the message says why."""


@dataclass(frozen=True)
class Data:
    """Arrays ready for `fit`, and what to call them.

    Attributes:
        source: what the output calls the data.
        x_train, x_test: one array, or a dict of arrays.
        epochs: epochs that these data take unless `--epochs` says otherwise.
    """

    source: str
    x_train: Any
    y_train: np.ndarray
    x_test: Any
    y_test: np.ndarray
    epochs: int

    @property
    def about(self) -> dict[str, str | int]:
        """What a file of results says of them."""
        return {
            "source": self.source,
            "train_samples": len(self.y_train),
            "test_samples": len(self.y_test),
        }

    def __str__(self) -> str:
        return f"{self.source}, {len(self.y_train):,} + {len(self.y_test):,} samples"


def choose(
    wanted: str,
    limits: tuple[int | None, int | None],
    from_keras: Callable[..., Data],
    from_path: Callable[..., Data],
    embedded_name: str,
    embedded: Callable[..., Data],
) -> Data:
    """Load what `--data` names and say in one line what was taken.

    Parameters
    ----------
    limits : tuple
        At most so many samples to train and to test on; all loaders take them.
    """
    if wanted == "keras":
        data, origin = from_keras(*limits), "from Keras"
    elif wanted == embedded_name:
        data, origin = embedded(*limits), "as asked"
    elif wanted == "auto":
        try:
            data, origin = from_keras(*limits), "from Keras"
        except DataError as error:
            why = one_line(error)
            data = embedded(*limits)
            origin = f"as Keras's own are not to be had: {why}"
    else:
        data, origin = from_path(Path(wanted), *limits), f"from {wanted}"
    print(f"Data: {data}, {origin}", flush=True)
    return data


def read_npz(
    path: Path, keys: Sequence[str], allow_pickle: bool = False
) -> list[np.ndarray]:
    """Read the arrays `keys` of an .npz file; any fault of it is a `DataError`."""
    if not path.exists():
        raise DataError(f"{path}: no such file")
    if not path.is_file():
        raise DataError(f"{path}: not a file")
    try:
        # Asked first, because np.load takes any other file for a bare pickle.
        if not zipfile.is_zipfile(path):
            raise DataError(f"{path}: damaged, or not an .npz file")
        with np.load(path, allow_pickle=allow_pickle) as arrays:
            missing = [key for key in keys if key not in arrays]
            if missing:
                raise DataError(f"{path}: wrong format, no {', '.join(missing)} in it")
            return [arrays[key] for key in keys]
    except DataError:
        raise
    # What a damaged pickle or zip raises has no common base.
    except Exception as error:
        raise DataError(f"{path}: damaged ({one_line(error)})") from error


def cached(pattern: str) -> Path | None:
    """Return Keras's cached file that matches `pattern`, if there is one."""
    home = Path(os.environ.get("KERAS_HOME", "~/.keras")).expanduser()
    return next(iter(sorted((home / "datasets").glob(pattern))), None)


def download(load: Callable[[], T], url: str) -> T:
    """Call a loader that may download from `url`; no network is a `DataError`.

    Keras itself waits for minutes for a host that is silent, on each of its addresses
    in turn. Hence a knock at the door first, which gives up early.
    """
    if not answers(url):
        raise DataError(f"no answer from {url.split('/')[2]}, so no download")
    return attempt(load)


def attempt(load: Callable[[], T]) -> T:
    """Call one of Keras's loaders, with any of its failures as a `DataError`."""
    try:
        with socket_timeout(30.0):
            return load()
    # Keras raises a bare Exception when a download fails.
    except Exception as error:
        raise DataError(one_line(error)) from error


def answers(url: str) -> bool:
    """Whether the host of `url` answers, through a proxy where one is set."""
    replies: list[bool] = []

    def knock() -> None:
        request = urllib.request.Request(url, method="HEAD")
        try:
            urllib.request.urlopen(request, timeout=PATIENCE).close()
        except urllib.error.HTTPError:
            pass  # a refusal is an answer too: the download will say what is wrong
        except (OSError, ValueError):
            return
        replies.append(True)

    # A thread, because no timeout bounds the look-up of the host's name.
    thread = threading.Thread(target=knock, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    return bool(replies)


@contextmanager
def socket_timeout(seconds: float) -> Iterator[None]:
    """Give sockets that set no timeout themselves one."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def one_line(error: BaseException) -> str:
    """Put an exception's message on one line, its type where there is no message."""
    return " ".join(str(error).split()) or type(error).__name__
