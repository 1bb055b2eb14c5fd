"""Counts the FLOPs and the HBM traffic of hand-written kernels, which are opaque calls to XLA.

The kernels are those of `gkd_jax.models.splash`. Their costs follow from the shapes in the call and
from the name of the scope around it, which says how many pairs of blocks they visit.
"""

import math
import re
from typing import NamedTuple

from gkd_jax.planning.hlo_text import Instruction


TARGET = 'custom_call_target="tpu_custom_call"'  # of every kernel that is written in Pallas
_SPLASH = re.compile(r"visits_(\d+)_of_(\d+)\b.*\bsplash_mha_(fwd|dq|dkv)_")
# The matrix products for each pair of blocks, all of T x T x K: the scores and the output; the
# scores, the weights' gradient and the queries'; the scores and the gradients of the others.
_PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4}


class KernelCost(NamedTuple):
    """The cost of one call of a kernel."""

    flops: float
    traffic: float  # bytes


def cost(call: Instruction, operands: list[Instruction]) -> KernelCost | None:
    """Returns the cost of a call of `TARGET`, or None if the kernel is not one of ours.

    The forward pass and the queries' gradient read the keys and values of a block again for each
    query head and block of queries that sees it. The gradient of keys and values reads what belongs
    to the queries again for each block of keys. Everything else is read or written once. The
    operands are the instructions that the call's operands come from.
    """
    found = _SPLASH.search(call.op_name)
    if found is None:
        return None
    share, phase = int(found[1]) / int(found[2]), found[3]
    shapes = [shape for operand in operands for shape in operand.shapes]
    floats = [shape for shape in shapes if re.match(r"b?f\d", shape.dtype)]  # queries, keys, ...
    *rows, heads, length, size = floats[0].dims
    key_heads = floats[1].dims[-3]
    blocks = length // call.shapes[0].dims[-2]  # the first result holds one block on the chip
    # The pipeline reads a block again if the block before it was another one.
    times = share * blocks if blocks > 1 else 1.0
    if phase == "dkv":
        again = [*floats[:1], *floats[3:]]
    else:
        again = floats[1:3]
        times *= heads / key_heads if blocks > 1 else 1
    traffic = sum(shape.traffic for shape in (*shapes, *call.shapes))
    traffic += (times - 1) * sum(shape.traffic for shape in again)
    products = 2.0 * math.prod(rows) * heads * length * length * size
    return KernelCost(_PRODUCTS[phase] * share * products, traffic)
