"""What an optimized program says of itself: the collectives that one layer runs, and how many bytes they move.

Read off the program's text, because no compiler of JAX's answers it otherwise. A layer is one turn of a loop over the stacked weights.
"""

from __future__ import annotations

import math
import re
from typing import Any

COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
DTYPE_BITS = {
    "pred": 8,
    "bf16": 16,
    "f16": 16,
    "f32": 32,
    "f64": 64,
    "s8": 8,
    "u8": 8,
    "s16": 16,
    "u16": 16,
    "s32": 32,
    "u32": 32,
    "s64": 64,
    "u64": 64,
}


def count_layer_collectives(text: str, n_layers: int) -> list[dict[str, dict[str, float]]]:
    """For each loop over the layers, forward first, what one turn runs: {collective: {"n": how many, "bytes": of the whole arrays}}.

    None where the program has no such loop, as on a CPU, where layers are written out.
    """
    bodies = split_computations(text)

    def count(name: str) -> dict[str, dict[str, float]]:
        total: dict[str, dict[str, float]] = {}

        def add(kind: str, n: float, n_bytes: float) -> None:
            before = total.setdefault(kind, {"n": 0, "bytes": 0})
            before["n"], before["bytes"] = before["n"] + n, before["bytes"] + n_bytes

        for line in bodies.get(name, []):
            operation = re.search(r" ([a-z\-]+)\(", line)
            kind = operation[1].removesuffix("-start") if operation else ""
            if kind in COLLECTIVES:
                add(kind, 1, count_collective_bytes(line, operation[1]))
                continue
            turns = re.search(r'known_trip_count":\{"n":"(\d+)"', line) if kind == "while" else None
            for called in re.findall(r"(?:calls|to_apply|body)=%?([\w.\-]+)", line):
                for inner, found in count(called).items():
                    add(
                        inner,
                        *(
                            int(turns[1]) * found[key] if turns else found[key]
                            for key in ("n", "bytes")
                        ),
                    )
        return total

    def over_layers(line: str) -> bool:
        """Whether a loop carries the stacked weights, cast or not: a dozen arrays whose first axis is the layers'."""
        carried, found, _ = line.partition(" while(")
        return bool(found) and len(re.findall(rf"\[{n_layers},", carried)) >= 8

    loops = [
        re.search(r"body=%?([\w.\-]+)", line)[1]
        for lines in bodies.values()
        for line in lines
        if over_layers(line)
    ]
    # the loop over micro-batches carries the weights too, and stands for those within it
    return [count(body) for body in loops if not any(map(over_layers, bodies[body]))]


def split_computations(text: str) -> dict[str, list[str]]:
    """Name -> lines of every computation of a program's text."""
    bodies: dict[str, list[str]] = {}
    name = None
    for line in text.splitlines():
        opened = re.match(r"(?:ENTRY )?%?([\w.\-]+) .*\{$", line)
        if opened and not line.startswith(" "):
            name = opened[1]
            bodies[name] = []
        elif name:
            bodies[name].append(line)
    return bodies


def count_collective_bytes(line: str, operation: str) -> float:
    """Bytes of the array that a collective brings together or takes apart, whichever side is the larger; several are summed."""
    found = re.findall(
        rf"\b({'|'.join(DTYPE_BITS)})\[([\d,]+)\]", line.partition(f" {operation}(")[0]
    )
    sizes = [math.prod(map(int, shape.split(","))) * DTYPE_BITS[kind] / 8 for kind, shape in found]
    if operation in ("all-gather-start", "collective-permute-start"):
        sizes = sizes[
            len(sizes) // 2 :
        ]  # of what is only begun, the operands stand before the results
    group = 1
    if operation.startswith("reduce-scatter"):  # its result is one of the pieces
        listed, counted = (
            re.search(r"replica_groups=\{\{([\d,]+)\}", line),
            re.search(r"replica_groups=\[\d+,(\d+)\]", line),
        )
        group = len(listed[1].split(",")) if listed else int(counted[1]) if counted else 1
    return sum(sizes) * group


def count_received_bytes(collectives: dict[str, dict[str, float]]) -> float:
    """Bytes a device receives for them, at least: an all-reduce brings each number twice, once to be added and once as the sum."""
    return sum(
        found["bytes"] * (2 if kind == "all-reduce" else 1) for kind, found in collectives.items()
    )


def format_collectives(found: list[dict[str, Any]]) -> str:
    """ "4 all-gather 436 MB; 9 reduce-scatter 1,308 MB" """
    parts = [
        ", ".join(
            f"{each['n']:.0f} {kind} {each['bytes'] / 1e6:,.0f} MB"
            for kind, each in sorted(loop.items())
        )
        or "none"
        for loop in found
    ]
    return "; ".join(parts)
