"""The GPU compiler's word: no lazy step waits for the host, or copies the table."""

import importlib.util
import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from benchmarks import _hlo

ROOT = Path(__file__).parents[2]
LAZY = ("Lazy decay", "Lazy freeze", "Lookahead(Lazy decay)")
TODO = pytest.mark.xfail(
    strict=True, raises=AssertionError, reason="the step does not do so yet"
)

PROGRAM = """
HloModule a, entry_computation_layout={()->f32[]}

%add (x: f32[], y: f32[]) -> f32[] {
  ROOT %add.1 = f32[] add(%x, %y)
}

%fused (p.1: f32[8,4]) -> f32[8,4] {
  %p.1 = f32[8,4]{1,0} parameter(0)
  ROOT %all-reduce.0 = f32[8,4]{1,0} all-reduce(%p.1), to_apply=%add
}

%deeper (p.2: f32[4]) -> f32[4] {
  %p.2 = f32[4]{0} parameter(0)
  ROOT %copy.1 = f32[4]{0} copy(%p.2)
}

%body (p.3: (f32[4])) -> (f32[4]) {
  %p.3 = (f32[4]{0}) parameter(0)
  %gte.1 = f32[4]{0} get-tuple-element(%p.3), index=0
  %if.1 = f32[4]{0} conditional(%gte.1), branch_computations={%deeper, %deeper}
  ROOT %tuple.1 = (f32[4]{0}) tuple(%if.1)
}

%three (p.4: (f32[4])) -> (f32[4]) {
  %p.4 = (f32[4]{0}) parameter(0)
  %gte.2 = f32[4]{0} get-tuple-element(%p.4), index=0
  %all-gather-start.1 = (f32[4]{0}, f32[16]{0}) all-gather-start(%gte.2)
  %all-gather-done.1 = f32[16]{0} all-gather-done(%all-gather-start.1)
  %copy.2 = f32[4]{0} copy(%gte.2)
  ROOT %tuple.2 = (f32[4]{0}) tuple(%copy.2)
}

ENTRY %main (p.5: f32[8,4], p.6: (f32[4])) -> f32[] {
  %p.5 = f32[8,4]{1,0} parameter(0)
  %p.6 = (f32[4]{0}) parameter(1)
  %fusion.1 = f32[8,4]{1,0} fusion(%p.5), kind=kLoop, calls=%fused, metadata={op="a"}
  %reduce-scatter-start.1 = ((f32[8,4]{1,0}), f32[2,4]{1,0}) reduce-scatter-start(%p.5)
  %while.1 = (f32[4]{0}) while(%p.6), condition=%add, body=%body
  %while.2 = (f32[4]{0}) while(%p.6), body=%three, config={"known_trip_count":{"n":"3"}}
  ROOT %copy.3 = bf16[2]{0} copy(%p.5)
}
"""


def test_what_a_program_does_is_read_from_its_text() -> None:
    program = _hlo.instructions(PROGRAM)
    # The loop; the branch in it.
    assert _hlo.decisions(program) == [True, False]
    # In `main` a fusion, a collective and a copy; in three rounds two each.
    assert _hlo.launches(program) == 3 + 3 * 2
    assert [
        (each.operation, each.shape, each.bytes, each.times, each.is_certain)
        for each in _hlo.collectives(program, rows=8)
    ] == [
        ("all-reduce", "f32[8,4]", 128, 1, True),
        ("reduce-scatter", "((f32[8,4]), f32[2,4])", 128, 1, True),
        ("all-gather", "(f32[4], f32[16])", 64, 3, True),
    ]
    wide = [each.has_vocabulary for each in _hlo.collectives(program, rows=16)]
    assert wide == [False, False, True]


def test_a_loop_that_counts_to_a_constant_has_so_many_rounds() -> None:
    """As TPU programs are, where the compiler does not say how many."""
    condition = """%to_five (p.9: (s32[], f32[4])) -> pred[] {
  %limit = s32[] constant(5)
  %p.9 = (s32[], f32[4]{0}) parameter(0)
  %i = s32[] get-tuple-element(%p.9), index=0
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

"""
    counts = "condition=%to_five, body=%three"
    told = 'body=%three, config={"known_trip_count":{"n":"3"}}'
    program = _hlo.instructions(condition + PROGRAM.replace(told, counts))
    times = [each.times for each in _hlo.collectives(program, rows=8)]
    assert times == [1, 1, 5]


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    missing = [
        name
        for name in ("jax_cuda12_plugin", "nvidia", "jax", "rich", "matplotlib")
        if importlib.util.find_spec(name) is None
    ]
    if missing:
        missing_ = ", ".join(missing)
        reason = f"GPU programs not compiled: no {missing_} (extra: gpu-compile)"
        warnings.warn(reason, stacklevel=1)
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("gpu")
    command = [sys.executable, "-m", "benchmarks.gpu", "--smoke", "--output"]
    subprocess.run([*command, str(folder)], check=True, cwd=ROOT, timeout=600)
    return json.loads((folder / "gpu.json").read_text())["programs"]


@pytest.mark.parametrize("gpus", [1, 4])
@pytest.mark.parametrize("optimizer", ["Adam", *LAZY[:2]])
def test_no_step_without_lookahead_waits_for_the_host(
    programs: list[dict], optimizer: str, gpus: int
) -> None:
    program = find(programs, optimizer, gpus)
    assert (program["host_stops"], program["host_stops_inside"]) == (0, 0)


@TODO
@pytest.mark.parametrize("gpus", [1, 4])
@pytest.mark.parametrize("optimizer", ["Lookahead(Adam)", "Lookahead(Lazy decay)"])
def test_a_step_of_lookahead_decides_once(
    programs: list[dict], optimizer: str, gpus: int
) -> None:
    assert find(programs, optimizer, gpus)["host_stops"] == 1


@pytest.mark.parametrize(
    ("gpus", "policy"),
    [
        (1, "float32"),
        pytest.param(4, "float32", marks=TODO),
        (1, "mixed_bfloat16"),
    ],
)
@pytest.mark.parametrize("optimizer", LAZY)
def test_a_lazy_step_has_small_temporaries(
    programs: list[dict], optimizer: str, gpus: int, policy: str
) -> None:
    program = find(programs, optimizer, gpus, policy)
    assert program["temporary_bytes"] <= 0.02 * program["table_bytes"]


@pytest.mark.parametrize("optimizer", LAZY)
def test_only_ids_and_gradients_cross(programs: list[dict], optimizer: str) -> None:
    adam, lazy = find(programs, "Adam", 4), find(programs, optimizer, 4)
    look_up = 4 + 4 * lazy["width"]  # an id and a gradient
    more = lazy["bytes_crossing"] - adam["bytes_crossing"]
    assert 0 < more <= lazy["devices"] * lazy["rows"] * look_up
    assert not [each for each in lazy["collectives"] if each["has_vocabulary"]]


@pytest.mark.parametrize("gpus", [1, 4])
def test_lookahead_needs_no_more_temporaries(programs: list[dict], gpus: int) -> None:
    bare, lookahead = (
        find(programs, optimizer, gpus) for optimizer in ("Adam", "Lookahead(Adam)")
    )
    more = lookahead["temporary_bytes"] - bare["temporary_bytes"]
    assert more <= 0.01 * bare["table_bytes"]
    assert lookahead["state_bytes"] > bare["state_bytes"]


def find(
    programs: list[dict], optimizer: str, gpus: int, policy: str = "float32"
) -> dict:
    (program,) = (
        each
        for each in programs
        if (each["optimizer"], each["devices"], each["policy"])
        == (optimizer, gpus, policy)
    )
    return program
