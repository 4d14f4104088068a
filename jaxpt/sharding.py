"""Where logic meets metal: the mesh, and the one table from logical axes to mesh axes.

The model names its axes ("embed", "heads", "mlp", ...); nothing outside this file and the configs names a mesh axis.
There is always a mesh: on one device it is 1 x 1 x 1 x 1, so that no code asks whether there is one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxpt.config import MeshConfig as MeshSizes
from jaxpt.spec import ModelSpec, UserError

LOGICAL_AXIS_RULES = {
    # weights
    "layers": None,  # the scan walks it; a cut along it would make every device wait for one
    "vocab": "tensor",
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head": None,
    "mlp": "tensor",
    "norm": None,  # norms and biases are small: gathering them would cost more than holding them
    # activations
    "batch": ("replica", "fsdp"),
    "position": "context",
    "act_embed": None,
}


def make_mesh(sizes: MeshSizes, devices=None) -> Mesh:
    """The mesh of config.mesh over the devices (all of them by default); a size of -1 takes what the others leave.

    Raises UserError when the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    n = len(devices)
    names = ("replica", "fsdp", "tensor", "context")
    asked = {name: getattr(sizes, name) for name in names}
    free = [name for name, size in asked.items() if size == -1]
    fixed = math.prod(size for size in asked.values() if size != -1)
    if len(free) > 1 or any(size < 1 and size != -1 for size in asked.values()):
        raise UserError(
            f"mesh: got {asked}, wanted sizes of at least 1 and at most one -1 (what the others leave)."
        )
    if free:
        asked[free[0]] = max(n // fixed, 1)
    if math.prod(asked.values()) != n:
        raise UserError(
            f"mesh: {' x '.join(f'{k} {v}' for k, v in asked.items())} does not make {n} devices. Set one axis to -1, or sizes that multiply to {n}."
        )
    shape = tuple(asked.values())
    # Auto: XLA places what `constrain` does not pin. make_mesh's default of today (Explicit) refuses sharded contractions.
    types = (AxisType.Auto,) * len(names)
    if devices[0].platform == "tpu":
        return jax.make_mesh(
            shape, names, axis_types=types, devices=devices
        )  # lays the axes along the torus
    return Mesh(np.asarray(devices).reshape(shape), names, axis_types=types)


def logical_to_partition_spec(axes: tuple[str | None, ...]) -> PartitionSpec:
    """Logical axes of an array, one a dimension, as a PartitionSpec. An unknown name fails here, not in XLA."""
    unknown = [axis for axis in axes if axis is not None and axis not in LOGICAL_AXIS_RULES]
    if unknown:
        raise KeyError(
            f"sharding: no row for logical axis {unknown[0]!r}; there are {', '.join(LOGICAL_AXIS_RULES)}"
        )
    return PartitionSpec(*(None if axis is None else LOGICAL_AXIS_RULES[axis] for axis in axes))


def make_logical_sharding(mesh: Mesh, axes: tuple[str | None, ...]) -> NamedSharding:
    return NamedSharding(mesh, logical_to_partition_spec(axes))


def make_batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of every [B, T] array of a Batch."""
    return make_logical_sharding(mesh, ("batch", "position"))


def make_replicated_sharding(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def with_logical_constraint(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pin an activation to its logical axes on the mesh in force (`jax.set_mesh`); without one, x as it is."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, logical_to_partition_spec(axes))


def n_shards(mesh: Mesh, axis: str) -> int:
    """Into how many pieces the mesh cuts a logical axis."""
    return n_shards_of_shape(mesh.shape, axis)


def n_shards_of_shape(shape: Mapping[str, int], axis: str) -> int:
    """The same for a mesh of which only the sizes are known."""
    names = LOGICAL_AXIS_RULES[axis]
    return math.prod(shape[name] for name in ((names,) if isinstance(names, str) else names or ()))


def check_mesh_divides(
    mesh: Mesh, spec: ModelSpec, batch_size: int, grad_accum_steps: int, seq_len: int
) -> None:
    """Refuse sizes that the mesh cannot cut evenly, with the numbers that would do."""
    cuts = [
        ("train.batch_size / train.grad_accum_steps", batch_size // grad_accum_steps, "batch"),
        ("pack.seq_len", seq_len, "position"),
        ("model.d_model", spec.d_model, "embed"),
        ("model.n_kv_heads", spec.n_kv_heads, "kv_heads"),
        ("model.n_heads", spec.n_heads, "heads"),
        ("model.d_ff", spec.d_ff, "mlp"),
        ("model.vocab_size", spec.vocab_size, "vocab"),
    ]
    for name, size, axis in cuts:
        pieces = n_shards(mesh, axis)
        if size % pieces:
            near = " or ".join(str(n * pieces) for n in (size // pieces, size // pieces + 1) if n)
            raise UserError(
                f"mesh: {name} = {size} cannot be cut into {pieces} pieces along {LOGICAL_AXIS_RULES[axis]}. Use a multiple of {pieces} ({near}), or another mesh."
            )
