"""Counts the FLOPs, memory traffic and collectives of a compiled program from its HLO text.

`summary` returns the counts by loop of a program that `hlo_text.parse` has read. XLA's own cost
analysis counts the body of a loop once. Here an instruction inside loops counts once for each of
their iterations. All numbers are for one device.

An instruction that is not recognised costs no FLOPs, and the tests compare the counts with formulas
worked out by hand. A kernel that is not known is named in the summary.
"""

from collections.abc import Iterator
import dataclasses
import math
import re
from typing import Any, NamedTuple

from gkd_jax.planning import hlo_loops, kernels
from gkd_jax.planning.hlo_text import Computation, Instruction, Module


COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
NO_TRAFFIC = re.compile(
    "parameter|constant|tuple|get-tuple-element|bitcast|while|conditional|call|after-all|"
    "partition-id|replica-id|optimization-barrier|iota|.*-done"
)
# The scopes of `kv_cache.share_scope`, around a loop or a conditional and around a branch of one.
_SHARE = re.compile(r"times_(\d+)_of_(\d+)/(?:while|cond)\w*$")
_BRANCH_SHARE = re.compile(r"branch_\d+_fun/times_(\d+)_of_(\d+)/(?!.*branch_\d+_fun)")


class Collective(NamedTuple):
    """All collectives of one kind over groups of one size in one loop."""

    kind: str
    group_size: int
    count: float  # the number of collectives that one device takes part in
    nbytes: float  # on one device: the outputs of an all-gather, the inputs of all other kinds

    @property
    def wire_bytes(self) -> float:
        """The bytes that one device sends if the collectives are ring algorithms."""
        if self.kind == "collective-permute":
            return self.nbytes
        share = (self.group_size - 1) / self.group_size
        return self.nbytes * share * (2 if self.kind == "all-reduce" else 1)


@dataclasses.dataclass
class Cost:
    """The cost of the instructions directly inside one loop, summed over all of its iterations."""

    flops: float = 0.0  # of matrix products and convolutions
    traffic: float = 0.0  # bytes read from and written to HBM
    uncounted: set[str] = dataclasses.field(default_factory=set)  # kernels that the sums lack
    collectives: dict[tuple[str, int], Collective] = dataclasses.field(default_factory=dict)

    def add(self, new: Collective) -> None:
        kind = new.kind, new.group_size
        if old := self.collectives.get(kind):
            new = new._replace(count=old.count + new.count, nbytes=old.nbytes + new.nbytes)
        self.collectives[kind] = new


# Counting -----------------------------------------------------------------------------------------


def costs(module: Module) -> dict[str, Cost]:
    """Returns the costs by loop.

    The key of a loop is its number of iterations behind those of the loops around it: "64 > 24" is
    a loop of 24 iterations inside one of 64. The key "" is for instructions outside all loops.
    """
    found: dict[str, Cost] = {}
    _walk(module, module.entry, 1.0, "", found)
    return found


def summary(module: Module) -> dict[str, Any]:
    """Returns `costs` as plain values for JSON, with the totals over all loops."""
    loops, collectives, uncounted = {}, [], set()
    for loop, cost in costs(module).items():
        uncounted |= cost.uncounted
        wire = sum(found.wire_bytes for found in cost.collectives.values())
        loops[loop] = {"flops": cost.flops, "traffic_bytes": cost.traffic, "wire_bytes": wire}
        for found in cost.collectives.values():
            values = {"count": found.count, "bytes": found.nbytes, "wire_bytes": found.wire_bytes}
            kind = {"kind": found.kind, "group_size": found.group_size, "loop": loop}
            collectives.append({**kind, **values})
    totals = {name: sum(loop[name] for loop in loops.values()) for name in loops[""]}
    found = {"loops": loops, "collectives": collectives, "uncounted": sorted(uncounted)}
    return {**totals, **found}


def _walk(module: Module, name: str, times: float, loop: str, found: dict[str, Cost]) -> None:
    """Adds the costs of a computation that runs `times` times within `loop` to `found`."""
    computation = module.computations[name]
    cost = found.setdefault(loop, Cost())
    for instruction in computation.values():
        opcode, share = instruction.opcode, _SHARE.search(instruction.op_name)
        often = times * (int(share[1]) / int(share[2]) if share else 1.0)
        if opcode == "while" and often:
            turns = hlo_loops.trip_count(module, instruction)
            inside = f"{loop} > {turns}" if loop else str(turns)
            for part in ("body", "condition"):
                _walk(module, instruction.called(part), often * turns, inside, found)
        elif opcode in ("call", "conditional", "async-start"):
            for called in instruction.callees:
                _walk(module, called, often * _branch_share(module, called), loop, found)
        elif opcode == "custom-call" and kernels.TARGET in instruction.attributes:
            operands = [computation[name] for name in instruction.operands]
            own = kernels.cost(instruction, operands)
            if own is None:
                cost.uncounted.add(instruction.op_name)
            else:
                cost.flops += times * own.flops
                cost.traffic += times * own.traffic
        elif opcode != "while":
            cost.flops += times * _flops(module, computation, instruction)
            cost.traffic += times * _traffic(module, computation, instruction)
            for collective in _collectives(module, computation, instruction):
                total = collective.count * times, collective.nbytes * times
                cost.add(collective._replace(count=total[0], nbytes=total[1]))


def _branch_share(module: Module, name: str) -> float:
    """Returns in which share of cases a branch of a conditional runs; 1 if that is not noted."""
    parts = module.computations[name].values()
    noted = next(filter(None, (_BRANCH_SHARE.search(part.op_name) for part in parts)), None)
    return int(noted[1]) / int(noted[2]) if noted else 1.0


def _flops(module: Module, computation: Computation, instruction: Instruction) -> int:
    if instruction.opcode == "fusion":
        inner = module.computations[instruction.called("calls")]
        return sum(_flops(module, inner, part) for part in inner.values())
    if instruction.opcode == "custom-call":
        return _cublas_flops(computation, instruction)
    if instruction.opcode not in ("dot", "convolution"):
        return 0
    left, right = (computation[name].shapes[0].dims for name in instruction.operands[:2])
    out = instruction.shapes[0].dims
    if instruction.opcode == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
        dims = contracted[1].split(",") if contracted and contracted[1] else []
        return 2 * math.prod(out) * math.prod(left[int(dim)] for dim in dims)
    return _convolution_flops(left, right, out, instruction.attributes)


def _cublas_flops(computation: Computation, call: Instruction) -> int:
    dims = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', call.attributes)
    if dims is None:
        return 0
    left = computation[call.operands[0]].shapes[0].dims
    contracted = math.prod(left[int(dim)] for dim in re.findall(r"\d+", dims[1]))
    return 2 * math.prod(call.shapes[0].dims) * contracted


def _convolution_flops(
    left: tuple[int, ...], right: tuple[int, ...], out: tuple[int, ...], attributes: str
) -> int:
    """Returns the FLOPs of a convolution, without products by padding.

    They are 2 x batch x input features x output features x the pairs of an output position and a
    kernel position that read an element. XLA writes a batched matrix product as a convolution whose
    window reads one position of the batch and otherwise zeros, from dilation and padding.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", attributes)
    if labels is None:
        return 0
    window = re.search(r"window=\{([^}]*)\}", attributes)
    fields = dict(part.split("=") for part in window[1].split()) if window else {}
    spatial = sorted(label for label in labels[3] if label.isdigit())

    def field(name: str, index: int, default: str) -> str:
        return fields[name].split("x")[index] if name in fields else default

    pairs = 1
    for index, label in enumerate(spatial):
        pads = field("pad", index, "0_0").split("_")
        pairs *= _meeting(
            size=left[labels[1].index(label)],
            kernel=int(field("size", index, "1")),
            out=out[labels[3].index(label)],
            stride=int(field("stride", index, "1")),
            pad=int(pads[0]),
            dilations=(int(field("lhs_dilate", index, "1")), int(field("rhs_dilate", index, "1"))),
        )
    groups = re.search(r"batch_group_count=(\d+)", attributes)
    batch = out[labels[3].index("b")]
    features = right[labels[2].index("i")] * out[labels[3].index("f")]
    return 2 * batch * features * pairs // (int(groups[1]) if groups else 1)


def _meeting(
    *, size: int, kernel: int, out: int, stride: int, pad: int, dilations: tuple[int, int]
) -> int:
    """Counts the pairs of an output position and a kernel position that read no padding."""
    if out * kernel > 1 << 20:  # too many to count: as if there were no padding
        return out * kernel
    of_input, of_kernel = dilations
    return sum(
        0 <= (at := o * stride + k * of_kernel - pad) < (size - 1) * of_input + 1
        and at % of_input == 0
        for o in range(out)
        for k in range(kernel)
    )


# Memory traffic -----------------------------------------------------------------------------------


def _traffic(module: Module, computation: Computation, instruction: Instruction) -> int:
    """Returns the bytes of HBM that an instruction reads and writes.

    An instruction that reads or writes a slice of an array counts the slice only.
    """
    opcode = instruction.opcode
    if NO_TRAFFIC.fullmatch(opcode):
        return 0
    operands = [computation[name] for name in instruction.operands if name in computation]
    if opcode == "fusion":
        return _fusion_traffic(module, operands, instruction)
    if opcode.endswith("-start"):  # the result is a tuple that repeats the operand
        return operands[0].shapes[0].traffic + instruction.shapes[0].traffic
    if opcode in ("dynamic-slice", "slice", "gather"):
        return 2 * instruction.shapes[0].traffic
    if opcode == "dynamic-update-slice":
        return 2 * operands[1].shapes[0].traffic
    return sum(shape.traffic for part in (instruction, *operands) for shape in part.shapes)


def _fusion_traffic(module: Module, operands: list[Instruction], fusion: Instruction) -> int:
    inner = module.computations[fusion.called("calls")]
    total = 0
    for index, operand in enumerate(operands):
        full = sum(shape.traffic for shape in operand.shapes)
        total += min(full, _read(module, inner, index, full))
    root = next(part for part in inner.values() if part.is_root)
    parts = [inner[name] for name in root.operands] if root.opcode == "tuple" else [root]
    for part, shape in zip(parts, fusion.shapes, strict=False):
        while part.opcode == "bitcast":
            part = inner[part.operands[0]]
        in_place = part.opcode == "dynamic-update-slice" and not shape.on_chip
        total += inner[part.operands[1]].shapes[0].nbytes if in_place else shape.traffic
    return total


def _read(module: Module, fused: Computation, number: int, full: int) -> int:
    """Returns the bytes that a fused computation, or a fusion inside it, reads of a parameter."""
    names = {
        name
        for name, part in fused.items()
        if part.opcode == "parameter" and part.inner == str(number)
    }
    total = 0
    for part in fused.values():
        places = [i for i, name in enumerate(part.operands) if name in names]
        if not places:
            continue
        if part.opcode == "bitcast":
            names.add(part.name)
        elif part.opcode in ("dynamic-slice", "slice", "gather") and places == [0]:
            total += part.shapes[0].nbytes
        elif part.opcode == "fusion":
            inner = module.computations[part.called("calls")]
            if all(each.opcode in ("parameter", "bitcast") for each in inner.values()):
                names.add(part.name)  # the parameter by another name, as in `bitcast`
            else:
                total += sum(_read(module, inner, place, full) for place in places)
        elif part.opcode != "dynamic-update-slice" or places != [0]:
            return full
    return total


# Collectives --------------------------------------------------------------------------------------


def _collectives(
    module: Module, computation: Computation, instruction: Instruction
) -> Iterator[Collective]:
    if instruction.opcode == "fusion":
        called = instruction.called("calls")
        inner = module.computations[called]
        for part in inner.values():
            for collective in _collectives(module, inner, part):
                # On TPUs, a reduce-scatter may be a fusion of an all-reduce and a slice.
                scatter = called.startswith("all-reduce-scatter")
                yield collective._replace(kind="reduce-scatter") if scatter else collective
        return
    kind = instruction.opcode.removesuffix("-start")
    group_size = _group_size(module, instruction)
    if kind not in COLLECTIVES or group_size == 1:
        return
    nbytes = sum(
        shape.nbytes
        for name in instruction.operands
        if name in computation
        for shape in computation[name].shapes
    )
    if kind == "all-gather":
        nbytes *= group_size
    yield Collective(kind, group_size, 1.0, float(nbytes))


def _group_size(module: Module, instruction: Instruction) -> int:
    """Returns the number of devices in one group of a collective."""
    text = instruction.attributes
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", text)
    if mesh:
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", mesh[1]))
        parts = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", mesh[2])
        return math.prod(int(part or sizes[axis]) for axis, part in parts)
    iota = re.search(r"replica_groups=\[\d+,(\d+)\]", text)
    if iota:
        return int(iota[1])
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", text)
    return len(listed[1].split(",")) if listed else module.num_partitions
