"""Compile train steps for TPUs, on a machine without one.

What is printed is the compiler's word, not a run: `python -m benchmarks.tpu --help`.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any

# Keras's own arrays live on the CPU; libtpu is asked for nothing but to compile, which
# several processes may do.
os.environ.update(
    ALLOW_MULTIPLE_LIBTPU_LOAD="1",
    JAX_PLATFORMS="cpu",
    KERAS_BACKEND="jax",
    TPU_SKIP_MDS_QUERY="1",
    TPU_ACCELERATOR_TYPE="v5litepod-4",
    TPU_WORKER_HOSTNAMES="localhost",
)

import jax
import keras
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rich.console import Console
from rich.table import Table

from benchmarks.workers import _fit
from benchmarks.workers._optimizers import OPTIMIZERS
from benchmarks.workers._problem import Problem
from workbench.options import add_output
from workbench.record import environment, write_json

# Rows of the table that is really made: a number that no other dimension has.
STAND_IN = 997
LAZY = ("Lazy decay", "Lazy freeze", "Lookahead(Lazy decay)")
COLLECTIVE = re.compile(
    r"= (.*?) "
    r"(all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute)(-start)?\("
)
ARRAY = re.compile(r"\b[a-z]+(\d+)\w*\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Program:
    """A train step, and what it is compiled for.

    Attributes:
        optimizer: its name, as in the other benchmarks.
        topology: of the TPUs that the compiler is told of.
        chips: how many of them share the step: rows of the table and the batch.
        vocabulary, width: of the table.
        rows: look-ups a step, of each chip.
    """

    optimizer: str
    topology: str
    chips: int
    vocabulary: int
    width: int
    rows: int

    @property
    def table(self) -> int:
        """Bytes of a chip's part of the table."""
        return 4 * self.width * self.vocabulary // self.chips

    def __str__(self) -> str:
        return f"{self.optimizer}, {self.vocabulary:.0e} x {self.width}, {self.place}"

    @property
    def place(self) -> str:
        """What it is compiled for, in words."""
        return self.topology if self.chips > 1 else "one v5e chip"


@dataclasses.dataclass(frozen=True)
class Collective:
    """An operation between the chips.

    Attributes:
        operation: its name in the compiled program.
        shape: of its result, as it stands there.
        bytes: of the result, on each chip.
        has_vocabulary: whether a dimension is as long as a chip's part of the table.
    """

    operation: str
    shape: str
    bytes: int
    has_vocabulary: bool


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler says of a program, in bytes on each chip."""

    program: Program
    state: int
    temporary: int
    accessed: float
    collectives: list[Collective]
    text: str = dataclasses.field(repr=False)

    @property
    def share(self) -> float:
        """Temporaries over the table."""
        return self.temporary / self.program.table


@dataclasses.dataclass(frozen=True)
class Goal:
    """Something that a compiled program should keep to."""

    what: str
    limit: float
    value: float
    unit: str

    @property
    def is_met(self) -> bool:
        """Whether the value is within the limit."""
        return self.value <= self.limit


def main(arguments: Sequence[str] | None = None) -> None:
    """Compile what the command line asks for, print and write it."""
    options = parse(arguments)
    console = Console(width=None if sys.stdout.isatty() else 120)
    options.output.mkdir(parents=True, exist_ok=True)
    done: list[Compiled] = []
    for program in programs(options.smoke):
        with console.status(str(program)):
            compiled = compile_step(program)
        done.append(compiled)
        write_json(options.output / "tpu.json", report(done, options.smoke))
        if options.hlo:
            name = re.sub(r"\W+", "-", str(program))
            (options.output / f"{name}.hlo").write_text(compiled.text)
        console.print(f"{program}: {size(compiled.temporary)}", highlight=False)
    console.print(overview(done))
    console.print(f"Written to {options.output}")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser("python -m benchmarks.tpu", description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="less of the large table")
    parser.add_argument(
        "--hlo", action="store_true", help="write the compiled programs, too"
    )
    add_output(parser, "results", "folder for tpu.json")
    return parser.parse_args(arguments)


def programs(smoke: bool) -> Iterator[Program]:
    """All that is compiled."""
    for chips in (1, 4):
        for optimizer in ("Adam", "Lookahead(Adam)", *LAZY):
            yield Program(optimizer, "v5e:2x2", chips, 10**6, 128, rows=4096)
    for optimizer in ("Lazy decay", "Lookahead(Lazy decay)")[: 1 if smoke else 2]:
        yield Program(optimizer, "v5e:16x16", 256, 10**9, 128, rows=4096)


def compile_step(program: Program) -> Compiled:
    """Compile the step of `fit` on abstract weights: nothing of their size exists."""
    topology = topologies.get_topology_desc(
        platform="tpu", topology_name=program.topology
    )
    mesh = Mesh(np.array(topology.devices[: program.chips]), ("chips",))
    model, state = abstract_model(program)

    def divided(array: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        by_row = array.shape[:1] == (program.vocabulary,)
        spec = PartitionSpec("chips") if by_row else PartitionSpec()
        sharding = NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)

    state = jax.tree.map(divided, state)
    batch = program.chips * program.rows // _fit.LENGTH
    by_batch = NamedSharding(mesh, PartitionSpec("chips"))
    data = (
        jax.ShapeDtypeStruct((batch, _fit.LENGTH), "int32", sharding=by_batch),
        jax.ShapeDtypeStruct((batch, 1), "float32", sharding=by_batch),
    )
    layout = jax.tree.map(lambda array: array.sharding, state)
    step = jax.jit(model.train_step, donate_argnums=0, out_shardings=(None, layout))
    compiled = step.lower(state, data).compile()
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    text = compiled.as_text()
    if memory is None or cost is None or text is None:
        raise RuntimeError("this compiler does not tell what a program needs")
    return Compiled(
        program,
        state=memory.argument_size_in_bytes,
        temporary=memory.temp_size_in_bytes,
        accessed=cost["bytes accessed"],
        collectives=find_collectives(text, program.vocabulary // program.chips),
        text=text,
    )


def abstract_model(program: Program) -> tuple[keras.Model, Any]:
    """A model built with a stand-in for the table, and the shapes of its state."""
    problem = Problem(STAND_IN, program.width, program.rows)
    model = _fit.build(keras, OPTIMIZERS[program.optimizer], "jit", problem)
    model.optimizer.build(model.trainable_variables)
    batch = np.zeros((1, _fit.LENGTH), "int32"), np.zeros((1, 1), "float32")
    model._symbolic_build(data_batch=batch)
    parts = (
        model.trainable_variables,
        model.non_trainable_variables,
        model.optimizer.variables,
        model.metrics_variables,
    )
    for variable in parts[0] + parts[2]:
        if variable.shape[:1] == (STAND_IN,):
            variable._shape = (program.vocabulary, *variable.shape[1:])
    return model, tuple(
        [jax.ShapeDtypeStruct(v.shape, v.value.dtype) for v in part] for part in parts
    )


def find_collectives(text: str, rows: int) -> list[Collective]:
    """The operations between chips in a compiled program, each counted once.

    Args:
        text: the program.
        rows: of a chip's part of the table.
    """
    found = []
    for shape, operation, start in COLLECTIVE.findall(text):
        arrays = [
            (int(bits), [int(n) for n in dimensions.split(",") if n])
            for bits, dimensions in ARRAY.findall(shape)
        ]
        sizes = [bits * math.prod(dimensions) // 8 for bits, dimensions in arrays]
        # What starts an operation has its operands in the result, too.
        bytes_ = max(sizes) if start else sum(sizes)
        has_vocabulary = any(n >= rows for _, dimensions in arrays for n in dimensions)
        plain = re.sub(r"\{.*?\}", "", shape)
        found.append(Collective(operation, plain, bytes_, has_vocabulary))
    return found


def goals(compiled: Compiled, done: list[Compiled]) -> list[Goal]:
    """What a program should keep to."""
    program = compiled.program
    found = []
    if program.optimizer in LAZY:
        wide = [c for c in compiled.collectives if c.has_vocabulary]
        found.append(Goal("collectives as long as the table", 0, len(wide), ""))
        if program.vocabulary >= 10**9:
            found.append(Goal("temporaries", 1e9, compiled.temporary, "bytes"))
        else:
            found.append(Goal("temporaries / table", 0.02, compiled.share, ""))
    elif program.optimizer == "Lookahead(Adam)":
        adam = dataclasses.replace(program, optimizer="Adam")
        (bare,) = (other for other in done if other.program == adam)
        more = compiled.share - bare.share
        # Nothing, and what a condition needs for itself.
        found.append(Goal("temporaries - Adam's, / table", 0.01, more, ""))
    return found


def report(done: list[Compiled], smoke: bool) -> dict[str, Any]:
    """What is written."""
    return {
        "what": "the TPU compiler's word; nothing was run",
        "command": ["python", "-m", "benchmarks.tpu", *["--smoke"] * smoke],
        "environment": environment(),
        "programs": [
            {
                **dataclasses.asdict(each.program),
                "table_bytes": each.program.table,
                "state_bytes": each.state,
                "temporary_bytes": each.temporary,
                "bytes_accessed": each.accessed,
                "collectives": [dataclasses.asdict(c) for c in each.collectives],
                "goals": [
                    {**dataclasses.asdict(goal), "met": goal.is_met}
                    for goal in goals(each, done)
                ],
            }
            for each in done
        ],
    }


def overview(done: list[Compiled]) -> Table:
    """The table that is printed."""
    title = "The TPU compiler's word, for each chip; nothing was run"
    result = Table(title=title, title_justify="left")
    for heading in ("where", "table", "optimizer"):
        result.add_column(heading)
    for heading in ("state", "temporaries", "of table", "accessed"):
        result.add_column(heading, justify="right", no_wrap=True)
    result.add_column("between chips")
    result.add_column("goals")
    for each in done:
        program = each.program
        result.add_row(
            program.place,
            f"{program.vocabulary:.0e} x {program.width}",
            program.optimizer,
            size(each.state),
            size(each.temporary),
            f"{each.share:.1%}",
            size(each.accessed),
            between_chips(each.collectives),
            "\n".join(
                f"[{'green' if goal.is_met else 'red'}]{goal.what} "
                f"{goal.value:.3g} ≤ {goal.limit:g}[/]"
                for goal in goals(each, done)
            ),
        )
    return result


def between_chips(collectives: list[Collective]) -> str:
    """How many operations and bytes, in a line."""
    if not collectives:
        return "nothing"
    return f"{len(collectives)}, {size(sum(c.bytes for c in collectives))}"


def size(bytes_: float) -> str:
    """Bytes in words."""
    return f"{bytes_ / 1e6:,.1f} MB"


if __name__ == "__main__":
    main()
