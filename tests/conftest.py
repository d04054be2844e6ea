import gc
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")

import keras
import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--quick",
        metavar="I/N",
        help="the first case of each test that is not slow, of every N tests the I-th",
    )
    parser.addoption(
        "--long", action="store_true", help="also the tests marked as long"
    )


def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> None:
    # Slow ones first: at the end, one that takes long would let other workers wait.
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
    for item in items if not config.getoption("long") else ():
        if item.get_closest_marker("long"):
            item.add_marker(pytest.mark.skip("long: python -m tests --long"))
    if (share := config.getoption("quick")) is None:
        return
    turn, turns = map(int, share.split("/"))
    firsts: dict[str, pytest.Item] = {}
    for item in items:
        if not item.get_closest_marker("slow"):
            firsts.setdefault(item.nodeid.partition("[")[0], item)
    chosen = list(firsts.values())[turn - 1 :: turns]
    config.hook.pytest_deselected(items=[i for i in items if i not in chosen])
    items[:] = chosen


@pytest.fixture(autouse=True)
def _fresh_session():
    keras.utils.set_random_seed(0)
    yield
    keras.utils.clear_session()
    # It collects garbage: what is left, imported or compiled, the next time not again.
    gc.freeze()


def pytest_report_header() -> str:
    return f"keras {keras.__version__} on {keras.backend.backend()}"
