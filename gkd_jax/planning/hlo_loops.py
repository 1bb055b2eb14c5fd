"""Finds how often the loops of a compiled program turn, from its HLO text."""

from collections.abc import Iterator
import itertools
import math
import re
from typing import NamedTuple

from gkd_jax.planning.hlo_text import Instruction, Module


def trip_count(module: Module, loop: Instruction) -> int:
    """Returns the iterations of a loop; the most, where a loop may stop early (a decode loop).

    On some backends XLA notes the number. Elsewhere it follows from the constant that the loop's
    condition compares the counter with, because counters start at 0. It is 1 where there is no such
    constant.
    """
    noted = re.search(r'known_trip_count[^\d}]*"?n"?[^\d}]*(\d+)', loop.attributes)
    if noted:
        return int(noted[1])
    turns = [
        math.ceil(bound / step)
        for elements, bound in _bounds(module, loop.called("condition"))
        for step in (_step(module, loop, element) for element in elements)
        if step is not None
    ]
    return max(1, min(turns, default=1))


class _Scalar(NamedTuple):
    """What is known of a value in the condition of a loop.

    Its elements are those of the loop's tuple from which scalar integers lead to the value. A
    number of rows has none, because it is a sum over an array.
    """

    elements: frozenset[int] = frozenset()
    constant: int | None = None  # the value, if it is one


def _bounds(
    module: Module, name: str, arguments: list[_Scalar] | None = None
) -> Iterator[tuple[frozenset[int], int]]:
    """Yields (elements, constant) of each comparison of the loop's elements with a constant.

    The name is that of a loop's condition, or of a computation that it calls with `arguments`.
    """
    known: dict[str, _Scalar] = {}
    for instruction in module.computations[name].values():
        operands = [known.get(operand, _Scalar()) for operand in instruction.operands]
        known[instruction.name] = _scalar(instruction, operands, arguments)
        if instruction.opcode == "compare":
            for one, other in itertools.permutations(operands):
                if one.elements and other.constant is not None:
                    yield one.elements, other.constant
        if instruction.opcode in ("fusion", "call"):
            for called in instruction.callees:
                yield from _bounds(module, called, operands)


def _scalar(
    instruction: Instruction, operands: list[_Scalar], arguments: list[_Scalar] | None
) -> _Scalar:
    """Returns what is known of an instruction's result; see `_bounds` for the arguments."""
    shape = instruction.shapes[0]
    if shape.dims or not re.fullmatch(r"[su]\d+", shape.dtype):
        return _Scalar()
    if instruction.opcode == "constant":
        return _Scalar(constant=int(instruction.inner))
    if instruction.opcode == "parameter":
        return arguments[int(instruction.inner)] if arguments else _Scalar()
    if instruction.opcode == "get-tuple-element" and arguments is None:
        return _Scalar(frozenset({_index(instruction)}))
    return _Scalar(frozenset().union(*(operand.elements for operand in operands)))


def _step(module: Module, loop: Instruction, element: int) -> int | None:
    """Returns by how much a turn of a loop raises an element; None if the element stays the same.

    It is 1 in JAX's scans, and 2 in the loops that XLA makes of a product with a gathered operand
    ("windowed" products) and unrolls.
    """
    body = module.computations[loop.called("body")]
    root = next(instruction for instruction in body.values() if instruction.is_root)
    raised = body[root.operands[element]]
    if raised.opcode == "get-tuple-element" and _index(raised) == element:
        return None
    parts = (body[name] for name in raised.operands) if raised.opcode == "add" else ()
    return next((int(part.inner) for part in parts if part.opcode == "constant"), 1)


def _index(element: Instruction) -> int:
    """Returns which element of a tuple a `get-tuple-element` reads."""
    found = re.search(r"\bindex=(\d+)", element.attributes)
    assert found is not None
    return int(found[1])
