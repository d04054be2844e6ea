"""Train steps compiled for devices that this machine does not have.

`benchmarks.gpu` and `benchmarks.tpu` say for which. They set the environment before
they import this, which imports JAX and Keras.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import keras
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rich.console import Console
from rich.table import Table

from benchmarks import _hlo
from benchmarks.workers import _fit
from benchmarks.workers._optimizers import build_model
from benchmarks.workers._problem import Problem
from examples.common.options import add_output
from examples.common.record import environment, write_json

# Rows of the table that is really made: a number that no other dimension has, and that
# all devices can divide.
STAND_IN = 11 * 256
LAZY = ("Lazy decay", "Lazy freeze", "Lookahead(Lazy decay)")
KINDS = ("Adam", "Lookahead(Adam)", *LAZY)
POLICIES = ("float32", "mixed_bfloat16")


@dataclasses.dataclass(frozen=True)
class Program:
    """A train step, and what it is compiled for.

    Attributes:
        optimizer: its name, as in the other benchmarks.
        place: the devices that the compiler is told of.
        devices: how many of them share the step: rows of the table and the batch.
        vocabulary, width: of the table.
        rows: look-ups a step, of each device.
        policy: the dtype policy of the layers.
    """

    optimizer: str
    place: str
    devices: int
    vocabulary: int
    width: int
    rows: int
    policy: str = "float32"

    @property
    def table(self) -> int:
        """Bytes of a device's part of the table."""
        return 4 * self.width * self.vocabulary // self.devices

    @property
    def size(self) -> str:
        """That of the table, in words."""
        return f"{self.vocabulary:.0e} x {self.width}"

    def __str__(self) -> str:
        return f"{self.optimizer}, {self.size}, {self.policy}, {self.place}"


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler says of a program, in bytes on each device.

    Attributes:
        program: what was compiled.
        state: bytes of weights, slots and data.
        temporary: bytes that a step needs beside them.
        accessed: bytes read and written, where the compiler counts them.
        text: the compiled program.
    """

    program: Program
    state: int
    temporary: int
    accessed: float | None
    text: str = dataclasses.field(repr=False)

    @functools.cached_property
    def instructions(self) -> list[_hlo.Instruction]:
        """All that the program may run."""
        return _hlo.instructions(self.text)

    @functools.cached_property
    def collectives(self) -> list[_hlo.Collective]:
        """The operations between devices."""
        rows = self.program.vocabulary // self.program.devices
        return _hlo.collectives(self.instructions, rows)

    @property
    def crossing(self) -> int:
        """Bytes of the operations between devices in every step."""
        return sum(c.times * c.bytes for c in self.collectives if c.is_certain)

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
    unit: str = ""

    @property
    def is_met(self) -> bool:
        """Whether the value is within the limit."""
        return self.value <= self.limit


@dataclasses.dataclass(frozen=True)
class Target:
    """A compiler, and what it is asked.

    Attributes:
        name: of the benchmark's module and of its file of results.
        compiler: the compiler's name, in words.
        programs: gives what is compiled; fewer, if its argument is true.
        devices: gives the devices of a program's topology.
        figures: gives what there is to say beside bytes, by name.
        goals: gives what a program should keep to, from it and all that came before.
    """

    name: str
    compiler: str
    programs: Callable[[bool], Iterable[Program]]
    devices: Callable[[Program], Sequence[Any]]
    figures: Callable[[Compiled], dict[str, int]]
    goals: Callable[[Compiled, list[Compiled]], list[Goal]]

    @property
    def word(self) -> str:
        """What the figures are."""
        return f"the {self.compiler} compiler's word; nothing was run"


def main(target: Target, arguments: Sequence[str] | None, about: str | None) -> None:
    """Compile what the command line asks for, print and write it."""
    parser = argparse.ArgumentParser(
        f"python -m benchmarks.{target.name}", description=about
    )
    parser.add_argument("--smoke", action="store_true", help="fewer programs")
    parser.add_argument(
        "--hlo", action="store_true", help="write the compiled programs, too"
    )
    add_output(parser, "results", f"folder for {target.name}.json")
    options = parser.parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else 180)
    options.output.mkdir(parents=True, exist_ok=True)
    done: list[Compiled] = []
    for program in target.programs(options.smoke):
        with console.status(str(program)):
            compiled = compile_step(program, target.devices(program))
        done.append(compiled)
        path = options.output / f"{target.name}.json"
        write_json(path, report(target, done, options.smoke))
        if options.hlo:
            name = re.sub(r"\W+", "-", str(program))
            (options.output / f"{name}.hlo").write_text(compiled.text)
        console.print(f"{program}: {size(compiled.temporary)}", highlight=False)
    console.print(overview(target, done))
    console.print(f"Written to {options.output}")


def compile_step(program: Program, devices: Sequence[Any]) -> Compiled:
    """Compile the step of `fit` on abstract weights: nothing of their size exists."""
    mesh = Mesh(np.array(devices[: program.devices]), ("devices",))
    model, state = abstract_model(program)

    def divided(array: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        by_row = array.shape[:1] == (program.vocabulary,)
        spec = PartitionSpec("devices") if by_row else PartitionSpec()
        sharding = NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)

    state = jax.tree.map(divided, state)
    batch = program.devices * program.rows // _fit.LENGTH
    by_batch = NamedSharding(mesh, PartitionSpec("devices"))
    data = (
        jax.ShapeDtypeStruct((batch, _fit.LENGTH), "int32", sharding=by_batch),
        jax.ShapeDtypeStruct((batch, 1), "float32", sharding=by_batch),
    )
    layout = jax.tree.map(lambda array: array.sharding, state)
    step = jax.jit(model.train_step, donate_argnums=0, out_shardings=(None, layout))
    compiled = step.lower(state, data).compile()
    memory, text = compiled.memory_analysis(), compiled.as_text()
    if memory is None or text is None:
        raise RuntimeError("this compiler does not tell what a program needs")
    return Compiled(
        program,
        state=memory.argument_size_in_bytes,
        temporary=memory.temp_size_in_bytes,
        accessed=(compiled.cost_analysis() or {}).get("bytes accessed"),
        text=text,
    )


def abstract_model(program: Program) -> tuple[keras.Model, Any]:
    """A model built with a stand-in for the table, and the shapes of its state."""
    problem = Problem(STAND_IN, program.width, program.rows, policy=program.policy)
    with table_by_rows(program.devices):
        model = build_model(program.optimizer, "jit", problem)
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


@contextlib.contextmanager
def table_by_rows(devices: int) -> Iterator[None]:
    """Divide embedding tables that are made between stand-ins for the devices.

    While the step is traced, Keras must not ask for the stand-ins themselves.
    """
    mesh = keras.distribution.DeviceMesh(
        (devices,), ("devices",), keras.distribution.list_devices("cpu")[:devices]
    )
    layouts = keras.distribution.LayoutMap(mesh)
    layouts[".*embeddings"] = ("devices", None)
    keras.distribution.set_distribution(
        keras.distribution.ModelParallel(layout_map=layouts, batch_dim_name="devices")
    )
    try:
        yield
    finally:
        keras.distribution.set_distribution(None)


def lookahead_goals(compiled: Compiled, done: list[Compiled]) -> list[Goal]:
    """Lookahead(Adam) needs no more than Adam, and what a condition needs itself."""
    if compiled.program.optimizer != "Lookahead(Adam)":
        return []
    more = compiled.share - adam_of(compiled, done).share
    return [Goal("temporaries - Adam's, / table", 0.01, more)]


def adam_of(compiled: Compiled, done: list[Compiled]) -> Compiled:
    """The same with Adam alone."""
    adam = dataclasses.replace(compiled.program, optimizer="Adam")
    (bare,) = (other for other in done if other.program == adam)
    return bare


def report(target: Target, done: list[Compiled], smoke: bool) -> dict[str, Any]:
    """What is written."""
    command = ["python", "-m", f"benchmarks.{target.name}", *["--smoke"] * smoke]
    return {
        "what": target.word,
        "command": command,
        "environment": environment(),
        "programs": [
            {
                **dataclasses.asdict(each.program),
                "table_bytes": each.program.table,
                "state_bytes": each.state,
                "temporary_bytes": each.temporary,
                "bytes_accessed": each.accessed,
                "bytes_crossing": each.crossing,
                **target.figures(each),
                "collectives": [dataclasses.asdict(c) for c in each.collectives],
                "goals": [
                    {**dataclasses.asdict(goal), "met": goal.is_met}
                    for goal in target.goals(each, done)
                ],
            }
            for each in done
        ],
    }


def overview(target: Target, done: list[Compiled]) -> Table:
    """The table that is printed."""
    title = f"{target.word[0].upper()}{target.word[1:]}; for each device"
    result = Table(title=title, title_justify="left")
    for heading in ("where", "policy", "optimizer"):
        result.add_column(heading)
    figures = list(target.figures(done[0]))
    for heading in ("temporaries", "of table", "between devices", *figures):
        result.add_column(heading.replace("_", " "), justify="right")
    result.add_column("goals that are not met")
    for each in done:
        program = each.program
        result.add_row(
            f"{program.size}, {program.place}",
            program.policy,
            program.optimizer,
            size(each.temporary),
            f"{each.share:.1%}",
            size(each.crossing),
            *map(str, target.figures(each).values()),
            "\n".join(
                f"{goal.what}: {goal.value:.3g}, not {goal.limit:.3g}"
                for goal in target.goals(each, done)
                if not goal.is_met
            ),
        )
    return result


def size(bytes_: float) -> str:
    """Bytes in words."""
    return f"{bytes_ / 1e6:,.1f} MB"
