"""Compile train steps for TPUs, on a machine without one.

What is printed is the compiler's word, not a run: `python -m benchmarks.tpu --help`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

# Keras's own arrays live on the CPU; libtpu is asked for nothing but to compile, which
# several processes may do.
os.environ.update(
    ALLOW_MULTIPLE_LIBTPU_LOAD="1",
    JAX_PLATFORMS="cpu",
    KERAS_BACKEND="jax",
    XLA_FLAGS="--xla_force_host_platform_device_count=256",
    TPU_SKIP_MDS_QUERY="1",
    TPU_ACCELERATOR_TYPE="v5litepod-4",
    TPU_WORKER_HOSTNAMES="localhost",
)

from jax.experimental import topologies

from benchmarks import _compiled
from benchmarks._compiled import KINDS, LAZY, POLICIES, Compiled, Goal, Program


def programs(smoke: bool) -> Iterator[Program]:
    """All that is compiled."""
    for chips in (1, 4):
        place = "v5e:2x2" if chips > 1 else "one v5e chip"
        for policy in POLICIES[: 1 if smoke else 2]:
            for optimizer in KINDS:
                yield Program(optimizer, place, chips, 10**6, 128, 4096, policy)
    for optimizer in ("Lazy decay", "Lookahead(Lazy decay)")[: 1 if smoke else 2]:
        yield Program(optimizer, "v5e:16x16", 256, 10**9, 128, rows=4096)


def devices(program: Program) -> Sequence[Any]:
    """Those that libtpu knows of; a single chip is one of four."""
    name = program.place if program.devices > 1 else "v5e:2x2"
    return topologies.get_topology_desc(platform="tpu", topology_name=name).devices


def goals(compiled: Compiled, done: list[Compiled]) -> list[Goal]:
    """What a program should keep to."""
    program = compiled.program
    if program.optimizer not in LAZY:
        return _compiled.lookahead_goals(compiled, done)
    wide = [each for each in compiled.collectives if each.has_vocabulary]
    found = [Goal("collectives as long as the table", 0, len(wide))]
    if program.vocabulary >= 10**9:
        (few,) = (
            each
            for each in done
            if (each.program.devices, each.program.policy) == (4, program.policy)
            and each.program.optimizer == program.optimizer
        )
        more = Goal("between chips / on 4 chips", 2, compiled.crossing / few.crossing)
        return [*found, more, Goal("temporaries", 6e8, compiled.temporary, "bytes")]
    return [*found, Goal("temporaries / table", 0.02, compiled.share)]


TARGET = _compiled.Target("tpu", "TPU", programs, devices, lambda _: {}, goals)

if __name__ == "__main__":
    _compiled.main(TARGET, None, __doc__)
