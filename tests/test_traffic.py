"""What crosses between replicas in a training step is rows, not the table."""

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from harness import BACKEND, environment
from packaging.version import Version
from traffic import BATCH, LENGTH, LOOK_UPS, VOCABULARY, WIDTH, Crossing

from examples.distributed._task import free_port

ROOT = Path(__file__).parents[1]
ENGINES = {
    "tensorflow": ["mirrored", "multi_worker"],
    "jax": ["data_parallel", "model_parallel_rows", "model_parallel_columns"],
    "torch": ["ddp"],
}[BACKEND]
# The partitioner of JAX 0.6 also divides the summing of gradients, for more traffic.
HAS_SHARDY = BACKEND != "jax" or Version(version("jax")) >= Version("0.7")
CLIPPING = ["clipnorm", "clipvalue", "global_clipnorm"]
# Each engine with plain gradients, and each kind of clipping on one of them.
CASES = [(engine, "plain") for engine in ENGINES]
CASES += [(ENGINES[i % len(ENGINES)], clip) for i, clip in enumerate(CLIPPING)]
# The shortest length that stands for a table, or for a part of one that is divided.
PART = VOCABULARY // 4


def crossings(engine, setting):
    """The operations between the replicas, as the first of them sees them."""
    port = free_port()
    count = 2 if engine.startswith(("multi_worker", "ddp")) else 1
    cluster = {"worker": [f"localhost:{free_port()}" for _ in range(count)]}
    processes = []
    for rank in range(count):
        of_rank = {
            "RANK": str(rank),
            "WORLD_SIZE": str(count),
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": str(port),
        }
        if engine == "multi_worker":
            task = {"cluster": cluster, "task": {"type": "worker", "index": rank}}
            of_rank["TF_CONFIG"] = json.dumps(task)
        processes.append(
            subprocess.Popen(
                [sys.executable, "-m", "tests.traffic", engine, setting],
                cwd=ROOT,
                env={**environment(one_backend=True), **of_rank},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    printed = [process.communicate(timeout=300) for process in processes]
    for process, (_, errors) in zip(processes, printed, strict=True):
        assert process.returncode == 0, errors
    return [Crossing(*each) for each in json.loads(printed[0][0].splitlines()[-1])]


def has_table(crossing):
    return any(length is not None and length >= PART for length in crossing.shape)


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "setting"), CASES)
def test_rows_cross_and_no_table(engine, setting):
    found = crossings(engine, setting)
    assert not [each for each in found if has_table(each)]
    widths = {WIDTH, WIDTH // 4}  # of a table that is divided by columns
    assert any(
        (len(each.shape) == 2 and each.shape[1] in widths)
        or each.shape == [BATCH, LENGTH * WIDTH]  # as the next layer gives them
        for each in found
    )
    sizes = [each.bytes for each in found if each.bytes is not None]
    # Rows of the table and of what is kept for it, ids, and the dense weights.
    most = 12 * LOOK_UPS * (WIDTH + 2) * 8
    if engine == "model_parallel_rows" and HAS_SHARDY:
        # Each device updates its own rows: what was looked up crosses on the way out,
        # and its gradients on the way back. A sync needs nothing of other devices.
        most = LOOK_UPS * (2 * WIDTH + 2) * 4 + 1000
    assert sum(sizes) <= most


ENGINES_THAT_SEE = ENGINES + ["ddp_alone"] * (BACKEND == "torch")


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES_THAT_SEE)
def test_a_table_that_crosses_is_seen(engine):
    assert any(has_table(each) for each in crossings(engine, "regularizer"))
