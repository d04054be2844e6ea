"""Compile train steps for GPUs, on a machine without one.

What is printed is the compiler's word, not a run: `python -m benchmarks.gpu --help`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

# Keras's own arrays live on the CPU. No kernel can be tried out where no GPU is.
os.environ.update(
    JAX_PLATFORMS="cpu",
    KERAS_BACKEND="jax",
    XLA_FLAGS="--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false "
    "--xla_force_host_platform_device_count=4",
)

from jax.experimental import topologies

from benchmarks import _compiled, _hlo
from benchmarks._compiled import KINDS, LAZY, POLICIES, Compiled, Goal, Program

H100 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84929347584
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 7 }
runtime_version { major: 12 minor: 8 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def programs(smoke: bool) -> Iterator[Program]:
    """All that is compiled."""
    for gpus in (1, 4):
        place = f"{gpus} H100"
        for policy in POLICIES[: 1 if smoke and gpus > 1 else 2]:
            for optimizer in KINDS:
                yield Program(optimizer, place, gpus, 10**6, 128, 4096, policy)


def devices(program: Program) -> Sequence[Any]:
    """So many H100 in one machine."""
    return topologies.get_topology_desc(
        topology_name=program.place,
        platform="cuda",
        target_config=H100,
        topology=f"1x1x{program.devices}",
    ).devices


def figures(compiled: Compiled) -> dict[str, int]:
    """What makes a step wait.

    For a loop or a branch that depends on a value, the host reads that from the GPU, of
    a loop once a round, and launches no kernel meanwhile.
    """
    decisions = _hlo.decisions(compiled.instructions)
    return {
        "host_stops": decisions.count(True),
        "host_stops_inside": decisions.count(False),
        "launches": _hlo.launches(compiled.instructions),
    }


def goals(compiled: Compiled, done: list[Compiled]) -> list[Goal]:
    """What a program should keep to."""
    program = compiled.program
    most = 1 if program.optimizer.startswith("Lookahead") else 0
    found = [Goal("host stops", most, figures(compiled)["host_stops"])]
    if program.optimizer not in LAZY:
        return found + _compiled.lookahead_goals(compiled, done)
    look_ups = program.devices * program.rows
    if program.devices == 1:
        return [*found, Goal("temporaries / table", 0.02, compiled.share)]
    # Every device gets the gradients of all lookups, and keeps rows of the table and of
    # two slots for them, old and new.
    gathered = look_ups * (4 + 4 * program.width)
    found.append(Goal("temporaries / all gradients", 6, compiled.temporary / gathered))
    # What Adam's step sends, and once each look-up's id and gradient.
    size = 4 if program.policy == "float32" else 2
    sent = look_ups * (4 + size * program.width)
    most = _compiled.adam_of(compiled, done).crossing + sent
    return [*found, Goal("between devices", most, compiled.crossing, "bytes")]


TARGET = _compiled.Target("gpu", "H100", programs, devices, figures, goals)

if __name__ == "__main__":
    _compiled.main(TARGET, None, __doc__)
