"""Read the collectives of one layer, and the bytes they move, from a compiled program's text.

None of JAX's compilers reports them otherwise. A layer is one turn of a loop over stacked weights.
"""

from __future__ import annotations

import math
import re

from jaxpt.plan.records import CollectiveCount, LayerCollectives

COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
DTYPE_BYTES = {
    "pred": 1,
    "s8": 1,
    "u8": 1,
    "bf16": 2,
    "f16": 2,
    "s16": 2,
    "u16": 2,
    "f32": 4,
    "s32": 4,
    "u32": 4,
    "f64": 8,
    "s64": 8,
    "u64": 8,
}
ARRAY = re.compile(rf"\b({'|'.join(DTYPE_BYTES)})\[([\d,]+)\]")
MIN_STACKED_ARRAYS = 8  # a loop over layers carries the stacked weights: a dozen arrays


def count_layer_collectives(text: str, n_layers: int) -> tuple[LayerCollectives, ...]:
    """Return what one turn of each loop over layers runs, forward first.

    It is empty if the program has no such loop, as on a CPU, where layers are unrolled.
    """
    computations = split_computations(text)
    counts = []
    for lines in computations.values():
        for line in lines:
            if not loops_over_layers(line, n_layers):
                continue
            body = re.findall(r"body=%?([\w.\-]+)", line)[0]
            # a loop over micro-batches carries the weights too; the loops inside of it are counted
            if any(loops_over_layers(inner, n_layers) for inner in computations[body]):
                continue
            counts.append(count_collectives(computations, body))
    return tuple(counts)


def split_computations(text: str) -> dict[str, list[str]]:
    """Return name -> lines of every computation of a program's text."""
    computations: dict[str, list[str]] = {}
    lines: list[str] = []  # what stands before the first computation is dropped
    for line in text.splitlines():
        header = re.match(r"(?:ENTRY )?%?([\w.\-]+) .*\{$", line)
        if header and not line.startswith(" "):
            lines = computations[header[1]] = []
        else:
            lines.append(line)
    return computations


def loops_over_layers(line: str, n_layers: int) -> bool:
    """Return whether a line is a loop that carries the stacked weights, cast or not."""
    carried, is_loop, _ = line.partition(" while(")
    stacked_arrays = re.findall(rf"\[{n_layers},", carried)
    return bool(is_loop) and len(stacked_arrays) >= MIN_STACKED_ARRAYS


def count_collectives(computations: dict[str, list[str]], name: str) -> LayerCollectives:
    """Return the collectives of a computation and of all that it calls, inner loops multiplied."""
    total: LayerCollectives = {}

    def add(kind: str, n_ops: int, n_bytes: float) -> None:
        before = total.get(kind, CollectiveCount(0, 0))
        total[kind] = CollectiveCount(before.n_ops + n_ops, before.n_bytes + n_bytes)

    for line in computations.get(name, []):
        match = re.search(r" ([a-z\-]+)\(", line)
        operation = match[1] if match else ""
        kind = operation.removesuffix("-start")
        if kind in COLLECTIVES:
            add(kind, 1, count_collective_bytes(line, operation))
            continue
        trip_count = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
        n_turns = int(trip_count[1]) if trip_count and kind == "while" else 1
        for called in re.findall(r"(?:calls|to_apply|body)=%?([\w.\-]+)", line):
            inner = count_collectives(computations, called)
            for inner_kind, count in inner.items():
                add(inner_kind, n_turns * count.n_ops, n_turns * count.n_bytes)
    return total


def count_collective_bytes(line: str, operation: str) -> float:
    """Return the bytes of the whole array that a collective gathers or scatters, summed if several.

    Args:
        line: of the program's text.
        operation: the operation's name as in the line, such as "all-gather-start".
    """
    result, _, _ = line.partition(f" {operation}(")
    sizes = []
    for dtype, shape in ARRAY.findall(result):
        n_elements = math.prod(map(int, shape.split(",")))
        sizes.append(n_elements * DTYPE_BYTES[dtype])
    if operation in ("all-gather-start", "collective-permute-start"):
        # of a started operation, the operands stand before the results
        sizes = sizes[len(sizes) // 2 :]
    if operation.startswith("reduce-scatter"):  # the result is one shard of the array
        return sum(sizes) * count_group_devices(line)
    return sum(sizes)


def count_group_devices(line: str) -> int:
    """Return how many devices take part in one group of a collective."""
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", line)
    if listed:
        return len(listed[1].split(","))
    counted = re.search(r"replica_groups=\[\d+,(\d+)\]", line)
    return int(counted[1]) if counted else 1


def count_received_bytes(collectives: LayerCollectives) -> float:
    """Return the least bytes that a device receives for them.

    An all-reduce brings each number twice: once to be added and once as the sum.
    """
    total = 0.0
    for kind, count in collectives.items():
        n_times = 2 if kind == "all-reduce" else 1
        total += n_times * count.n_bytes
    return total


def format_collectives(layers: tuple[LayerCollectives, ...]) -> str:
    """Return, such as, "4 all-gather 436 MB; 9 reduce-scatter 1,308 MB"."""
    texts = []
    for counts in layers:
        parts = []
        for kind, count in sorted(counts.items()):
            parts.append(f"{count.n_ops} {kind} {count.n_bytes / 1e6:,.0f} MB")
        texts.append(", ".join(parts) or "none")
    return "; ".join(texts)
