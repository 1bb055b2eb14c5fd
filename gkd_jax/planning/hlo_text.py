"""Reads the text of compiled programs, which XLA calls HLO.

HLO is not a stable interface. Lines that are not recognised are left out.
"""

import math
import re
from typing import NamedTuple


_ITEM_BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16, "token": 0}
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\](?:\{([^}]*)\})?")
_HEADER = re.compile(r"(ENTRY )?%([\w.\-]+) \(.*\{$")
_NAME = re.compile(r"%([\w.\-]+)")
_KERNEL_METADATA = re.compile(r"kernel_metadata=\{\n.*\n\}")  # it breaks an instruction's line
_OP_NAME = re.compile(r'op_name="([^"]*)"')


class Shape(NamedTuple):
    """The shape of one array; `on_chip` arrays are in vector memory and cause no HBM traffic."""

    dtype: str
    dims: tuple[int, ...]
    on_chip: bool = False

    @property
    def nbytes(self) -> int:
        bits = _ITEM_BITS.get(self.dtype)
        if bits is None:
            digits = re.search(r"\d+", self.dtype)
            bits = int(digits[0]) if digits else 0
        return math.prod(self.dims) * bits // 8

    @property
    def traffic(self) -> int:
        return 0 if self.on_chip else self.nbytes


class Instruction(NamedTuple):
    """One line of HLO."""

    name: str
    shapes: tuple[Shape, ...]  # of the result; several for a tuple
    opcode: str
    operands: tuple[str, ...]
    inner: str  # the text between the parentheses, e.g. a constant's value, a parameter's number
    attributes: str
    is_root: bool

    def called(self, key: str) -> str:
        """Returns the computation that the attribute `key` names, as in `body=%name`, or ""."""
        found = re.search(rf"\b{key}=%([\w.\-]+)", self.attributes)
        return found[1] if found else ""

    @property
    def callees(self) -> list[str]:
        """The names of the computations of a call, or of all branches of a conditional."""
        branches = re.search(r"branch_computations=\{([^}]*)\}", self.attributes)
        if branches:
            return _NAME.findall(branches[1])
        keys = ("to_apply", "calls", "true_computation", "false_computation")
        return [name for key in keys if (name := self.called(key))]

    @property
    def op_name(self) -> str:
        """The operation in the traced program that this instruction comes from, if noted."""
        found = _OP_NAME.search(self.attributes)
        return found[1].replace("\\'", "'") if found else self.name


Computation = dict[str, Instruction]


class Module(NamedTuple):
    """A parsed program."""

    computations: dict[str, Computation]
    entry: str
    num_partitions: int


def parse(text: str) -> Module:
    """Parses the text of an optimized module, which `compiled.as_text()` returns."""
    text = _KERNEL_METADATA.sub("", text)
    partitions = re.search(r"num_partitions=(\d+)", text.split("\n", 1)[0])
    computations: dict[str, Computation] = {}
    entry, current = "", {}
    for line in text.splitlines():
        header = _HEADER.match(line)
        if header:
            current = computations[header[2]] = {}
            entry = header[2] if header[1] else entry
        elif " = " in line:
            instruction = _instruction(line.strip())
            if instruction is not None:
                current[instruction.name] = instruction
    return Module(computations, entry, int(partitions[1]) if partitions else 1)


def _instruction(line: str) -> Instruction | None:
    """Parses one line; returns None for a line that is no instruction."""
    is_root = line.startswith("ROOT ")
    name, _, rest = line.removeprefix("ROOT ").partition(" = ")
    end = _closing(rest, 0) if rest.startswith("(") else rest.find(" ")
    opcode = re.match(r" ?([\w\-]+)\(", rest[end:])
    if opcode is None:
        return None
    start = end + opcode.end() - 1
    stop = _closing(rest, start)
    inner = rest[start + 1 : stop - 1]
    shapes = tuple(
        Shape(
            match[1],
            tuple(int(size) for size in match[2].split(",") if size),
            re.search(r"S\([1-9]\d*\)", match[3] or "") is not None,
        )
        for match in _SHAPE.finditer(rest[:end])
    )
    operands = tuple(_NAME.findall(inner))
    return Instruction(
        name.removeprefix("%"), shapes, opcode[1], operands, inner, rest[stop:], is_root
    )


def _closing(text: str, start: int) -> int:
    """Returns the index after the parenthesis that closes the one at `start`."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, start):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.end()
    return len(text)
