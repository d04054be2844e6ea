"""What a compiled XLA program does in a step, read from its text."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator

INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%(\S+) = (.*?) ([a-z][\w-]*)\((.*)$")
CALLED = re.compile(r"(?:body|calls|\w+_computations?)=\{?((?:%[\w.-]+(?:, )?)+)")
APPLIED = re.compile(r"to_apply=(%[\w.-]+)")
TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
CONDITION = re.compile(r"condition=(%[\w.-]+)")
ARRAY = re.compile(r"\b[a-z]+(\d*)\w*\[([\d,]*)\]")
COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "all-to-all",
    "ragged-all-to-all",
    "reduce-scatter",
    "collective-broadcast",
    "collective-permute",
)
# A program that hands arrays around launches nothing for it.
FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all")
CONTROL = ("while", "conditional", "call")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """An instruction, and when it runs.

    Attributes:
        operation: its name.
        result: the type of its result, as it stands in the program.
        operands: the types of its operands, likewise.
        rest: the remainder of its line.
        times: how often it runs in a step, if it does.
        is_certain: whether it runs in every step: it does not stand in a branch, or in
            a loop whose number of rounds is only known when the program runs.
        is_fused: whether it is a part of another instruction.
        trips: the rounds of a loop, if they are known when it is compiled.
    """

    operation: str
    result: str
    operands: list[str]
    rest: str
    times: int = 1
    is_certain: bool = True
    is_fused: bool = False
    trips: int | None = None

    @property
    def is_decided_while_running(self) -> bool:
        """Whether what comes next depends on a value that the program computes."""
        is_loop = self.operation == "while" and self.trips is None
        return is_loop or self.operation == "conditional"


@dataclasses.dataclass(frozen=True)
class Collective:
    """An operation between devices.

    Attributes:
        operation: its name in the compiled program.
        shape: of its result, as it stands there.
        bytes: of its operands or of its result, on each device, whichever is more.
        has_vocabulary: whether a dimension is as long as a device's part of the table.
        times: how often it runs in a step, if it does.
        is_certain: whether it runs in every step.
    """

    operation: str
    shape: str
    bytes: int
    has_vocabulary: bool
    times: int
    is_certain: bool


def instructions(text: str) -> list[Instruction]:
    """All instructions that a program may run, loops and branches gone through."""
    computations, entry = _computations(text)
    for computation in computations.values():
        computation[:] = [_with_trips(computations, each) for each in computation]
    return list(_walk(computations, entry, Instruction("", "", [], "")))


def _computations(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """The instructions of each computation, and the name of the first one."""
    found: dict[str, list[Instruction]] = {}
    types: dict[str, str] = {}
    entry = name = ""
    for line in text.splitlines():
        if line.endswith("{") and line.startswith(("%", "ENTRY")):
            name = line.removeprefix("ENTRY ").split(" ", 1)[0]
            entry = name if line.startswith("ENTRY") else entry
            found[name], types = [], {}
        elif name and (match := INSTRUCTION.match(line)):
            own, result, operation, rest = match.groups()
            types[own] = result
            operands = re.findall(r"%([\w.-]+)", rest.split(")", 1)[0])
            found[name].append(
                Instruction(
                    operation, result, [types.get(o, "") for o in operands], rest
                )
            )
    return found, entry


def _with_trips(
    computations: dict[str, list[Instruction]], each: Instruction
) -> Instruction:
    """Add the rounds of a loop. TPU programs do not tell them, but count up to them."""
    if each.operation != "while":
        return each
    if known := TRIPS.search(each.rest):
        return dataclasses.replace(each, trips=int(known[1]))
    condition = computations[CONDITION.search(each.rest)[1]]  # type: ignore[index]
    *before, last = condition
    operations = sorted(each.operation for each in before)
    if operations != ["constant", "get-tuple-element", "parameter"]:
        return each
    if last.operation != "compare" or "direction=LT" not in last.rest:
        return each
    limit = next(each.rest for each in before if each.operation == "constant")
    return dataclasses.replace(each, trips=int(limit.split(")")[0]))


def _walk(
    computations: dict[str, list[Instruction]], name: str, caller: Instruction
) -> Iterator[Instruction]:
    for each in computations[name]:
        instruction = dataclasses.replace(
            each,
            times=caller.times * (each.trips or 1),
            is_certain=caller.is_certain,
            is_fused=caller.is_fused,
        )
        yield instruction
        inside = dataclasses.replace(
            instruction,
            is_certain=caller.is_certain and not each.is_decided_while_running,
            is_fused=caller.is_fused or each.operation not in CONTROL,
        )
        called = APPLIED if each.operation == "call" else CALLED
        for names in called.findall(each.rest):
            for computation in re.findall(r"%[\w.-]+", names):
                yield from _walk(computations, computation, inside)


def launches(program: list[Instruction]) -> int:
    """Kernels and copies of a step, those in branches and unknown loops left out."""
    return sum(
        each.times
        for each in program
        if each.is_certain
        and not each.is_fused
        and each.operation not in FREE + CONTROL
        and not each.operation.endswith("-done")
    )


def decisions(program: list[Instruction]) -> list[bool]:
    """Loops and branches that wait for a value; whether they are in every step."""
    return [each.is_certain for each in program if each.is_decided_while_running]


def collectives(program: list[Instruction], rows: int) -> list[Collective]:
    """The operations between devices.

    Args:
        program: of `instructions`.
        rows: of a device's part of the table.
    """
    found = []
    for each in program:
        operation = each.operation.removesuffix("-start")
        if operation not in COLLECTIVES:
            continue
        given = sum(map(_bytes, each.operands))
        results = _bytes(each.result)
        if operation != each.operation and operation != "all-reduce":
            results -= given  # What starts an operation returns its operands, too.
        sizes = [n for _, shape in arrays(each.result) for n in shape]
        plain = re.sub(r"\{.*?\}", "", each.result)
        found.append(
            Collective(
                operation,
                plain,
                max(given, results),
                any(n >= rows for n in sizes),
                each.times,
                each.is_certain,
            )
        )
    return found


def _bytes(type_: str) -> int:
    return sum(bits * math.prod(shape) // 8 for bits, shape in arrays(type_))


def arrays(type_: str) -> list[tuple[int, list[int]]]:
    """Bits of an element, and the shape, of each array in a type."""
    return [
        (int(bits or 8), [int(n) for n in shape.split(",") if n])
        for bits, shape in ARRAY.findall(type_)
    ]
