"""The mesh, and the rules from logical axes to mesh axes.

The model names its axes ("embed", "heads", "mlp", ...); only this file and the config name mesh
axes. There is always a mesh: on one device all its axes have size 1, so that no code asks.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from jaxpt.config import MeshConfig
from jaxpt.spec import ModelSpec, UserError

MESH_AXES = ("replica", "fsdp", "expert", "tensor", "context")
LOGICAL_AXIS_RULES = {
    # parameters
    "layers": None,  # the scan walks it; sharding it would make every device wait for one
    "vocab": "tensor",
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head": None,
    "mlp": "tensor",
    "experts": "expert",  # devices along it run each other's tokens, by their own experts
    "scores": None,  # of experts, by the router
    "shared_mlp": "tensor",  # the width of the expert that all tokens take
    "rank": None,  # of an adapter
    "switch": None,  # that expert's share, a single output
    "norm": None,  # norms and biases are small: gathering them would cost more than replicating
    # activations
    "batch": ("replica", "fsdp", "expert"),
    "gathered_batch": ("replica", "fsdp"),  # of tokens that were gathered over the experts' shards
    "position": "context",
    "act_embed": None,
}

# of one dimension; a tuple: it is sharded over the mesh axes of all of them
LogicalAxis = str | tuple[str, ...] | None


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """Return the mesh of config.mesh over the devices (default: all of them).

    Raises:
        UserError: the sizes do not multiply to the number of devices.
    """
    if devices is None:
        devices = find_devices()
    sizes = {}
    free = []
    fixed = []
    for name in MESH_AXES:
        size = getattr(config, name)
        sizes[name] = size
        if size == -1:
            free.append(name)
        else:
            fixed.append(size)
    if len(free) > 1 or min(fixed) < 1:
        raise UserError(
            f"mesh: expected sizes of at least 1 and at most one -1 (takes the rest), got {sizes}."
        )
    n = len(devices)
    if free:
        n_left = n // math.prod(fixed)
        sizes[free[0]] = max(n_left, 1)
    shape = tuple(sizes.values())
    if math.prod(shape) != n:
        axes = [f"{name} {size}" for name, size in sizes.items()]
        text = " x ".join(axes)
        raise UserError(
            f"mesh: expected sizes that multiply to {n} devices, got {text}. Set one axis to -1, "
            "or change a size."
        )
    # Auto: XLA shards what with_logical_constraint does not pin. make_mesh's present default
    # (Explicit) refuses sharded contractions
    types = (AxisType.Auto,) * len(MESH_AXES)
    if devices[0].platform != "tpu":
        grid = np.asarray(devices).reshape(shape)
        return Mesh(grid, MESH_AXES, axis_types=types)
    n_slices = len({getattr(device, "slice_index", 0) for device in devices})
    if n_slices > 1:
        grid = join_slices(shape, n_slices, devices)
        return Mesh(grid, MESH_AXES, axis_types=types)
    return Mesh(lay_along_torus(shape, devices), MESH_AXES, axis_types=types)


def lay_along_torus(shape: tuple[int, ...], devices: Sequence[Any]) -> np.ndarray[Any, Any]:
    """Return a TPU slice as a grid whose axes lie along the torus.

    An axis of 8 on a torus of 4 x 4 x 4 takes one of its axes and half of another: only that axis'
    collectives are slower.
    """
    try:
        return mesh_utils.create_device_mesh(shape, devices)
    except NotImplementedError:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)


def join_slices(
    shape: tuple[int, ...], n_slices: int, devices: Sequence[Any]
) -> np.ndarray[Any, Any]:
    """Return TPU slices as one grid, joined along `replica`, the first axis.

    Only its collectives leave a slice: one all-reduce of the gradients per step.
    """
    n_replicas, *others = shape
    if n_replicas % n_slices:
        raise UserError(
            f"mesh.replica: expected a multiple of {n_slices}, the slices that this run joins, got "
            f"{n_replicas}. Use --config.mesh.replica={n_slices}."
        )
    inside = (n_replicas // n_slices, *others)
    between = (n_slices, *[1] * len(others))
    return mesh_utils.create_hybrid_device_mesh(
        inside, between, devices, allow_split_physical_axes=True
    )


def find_devices() -> list[Any]:
    """Return JAX's devices. Raise UserError where this machine lacks what was asked for."""
    try:
        return jax.devices()
    except (RuntimeError, AssertionError) as error:
        asked = os.environ.get("JAX_PLATFORMS", "")
        reason = str(error).partition(" (set JAX_PLATFORMS")[0] or "no such device or plugin"
        raise UserError(
            f"JAX_PLATFORMS={asked}: JAX finds none on this machine ({reason:.200}). Unset it to "
            "take what there is, or install requirements-gpu.txt or requirements-tpu.txt where "
            "the card is."
        ) from None


def fold_expert_axis(mesh: Mesh) -> Mesh:
    """Return the mesh with the devices of its expert axis along fsdp."""
    sizes = dict(mesh.shape)
    sizes["fsdp"] *= sizes.pop("expert")
    return make_mesh(MeshConfig(**sizes), list(mesh.devices.flat))


def logical_to_partition_spec(axes: tuple[LogicalAxis, ...]) -> PartitionSpec:
    """Return the PartitionSpec of logical axes. An unknown name fails here, not in XLA."""
    mesh_axes = []
    for axis in axes:
        if axis is None:
            mesh_axes.append(None)
        elif isinstance(axis, tuple):
            mesh_axes.append(find_mesh_axes(*axis))
        elif axis in LOGICAL_AXIS_RULES:
            mesh_axes.append(LOGICAL_AXIS_RULES[axis])
        else:
            known = ", ".join(LOGICAL_AXIS_RULES)
            raise KeyError(f"sharding: no rule for logical axis {axis!r}; there are {known}")
    return PartitionSpec(*mesh_axes)


def find_mesh_axes(*axes: str) -> tuple[str, ...]:
    """Return the mesh axes that logical axes are sharded over, in order."""
    found: list[str] = []
    for axis in axes:
        names = LOGICAL_AXIS_RULES[axis] or ()
        found += [names] if isinstance(names, str) else names
    return tuple(found)


def make_logical_sharding(mesh: Mesh, axes: tuple[str | None, ...]) -> NamedSharding:
    """Return the sharding of an array with these logical axes."""
    spec = logical_to_partition_spec(axes)
    return NamedSharding(mesh, spec)


def make_batch_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of every [B, T] array of a Batch."""
    return make_logical_sharding(mesh, ("batch", "position"))


def make_replicated_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def fit_sharding(sharding: Any, shape: tuple[int, ...]) -> NamedSharding:
    """Return the sharding of a smaller array of the same axes.

    An axis that would not be sharded evenly is replicated.
    """
    mesh, axes = sharding.mesh, []
    for axis, size in zip(sharding.spec, shape, strict=False):
        names = axis if isinstance(axis, tuple) else (axis,)
        n = math.prod(mesh.shape[name] for name in names if name)
        axes.append(axis if size % n == 0 else None)
    return NamedSharding(mesh, PartitionSpec(*axes))


def with_logical_constraint(x: jax.Array, *axes: str | None) -> jax.Array:
    """Constrain an activation to its logical axes on the mesh in force; without one, return x."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    spec = logical_to_partition_spec(axes)
    return jax.lax.with_sharding_constraint(x, spec)


def is_on_cpu() -> bool:
    """Return whether the mesh is of CPUs; without one, whether JAX runs on them."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return (device.platform if device else jax.default_backend()) == "cpu"


def jit_once(function: Callable[..., Any], shardings: Any) -> Any:
    """Jit what runs once and draws random numbers, which take a CPU's compiler longest.

    There it leaves out LLVM's later passes: a quarter of the time to compile, the same to run, and
    the same bits.
    """
    device = next(iter(jax.tree.leaves(shardings)[0].device_set))
    options = {"xla_backend_optimization_level": 1} if device.platform == "cpu" else None
    return jax.jit(function, out_shardings=shardings, compiler_options=options)


def n_shards(mesh: Mesh | AbstractMesh, axis: str) -> int:
    """Return the number of shards of a logical axis."""
    return n_shards_of_shape(mesh.shape, axis)


def n_shards_of_shape(shape: Mapping[str, int], axis: str) -> int:
    """Return the number of shards of a logical axis, given the mesh's sizes."""
    return math.prod(shape[name] for name in find_mesh_axes(axis))


def check_mesh_divides(
    mesh: Mesh, spec: ModelSpec, batch_size: int, grad_accum_steps: int, seq_len: int
) -> None:
    """Raise UserError for sizes that the mesh cannot shard evenly, with the nearest that work."""
    check_batch_divides(mesh, batch_size, grad_accum_steps, seq_len)
    check_model_divides(mesh, spec)


def check_batch_divides(mesh: Mesh, batch_size: int, grad_accum_steps: int, seq_len: int) -> None:
    """Raise UserError for batches that the mesh cannot shard evenly."""
    micro_batch = batch_size // grad_accum_steps
    check_divides(mesh, "batch", "train.batch_size / train.grad_accum_steps", micro_batch)
    check_divides(mesh, "position", "pack.seq_len", seq_len)


def check_model_divides(mesh: Mesh, spec: ModelSpec) -> None:
    """Raise UserError for a model that the mesh cannot shard evenly."""
    check_divides(mesh, "embed", "model.d_model", spec.d_model)
    check_divides(mesh, "kv_heads", "model.n_kv_heads", spec.n_kv_heads)
    check_divides(mesh, "heads", "model.n_heads", spec.n_heads)
    check_divides(mesh, "experts", "model.n_experts", spec.n_experts)
    check_divides(mesh, "mlp", "model.d_ff", spec.d_ff)
    check_divides(mesh, "shared_mlp", "model.d_shared", spec.d_shared)
    check_divides(mesh, "vocab", "model.vocab_size", spec.vocab_size)


def check_divides(mesh: Mesh, axis: str, name: str, size: int) -> None:
    """Raise UserError, with the nearest sizes that work, unless the mesh shards an axis evenly."""
    n = n_shards(mesh, axis)
    rest = size % n
    if not rest:
        return
    below = size - rest
    near = f"{below} or {below + n}" if below else f"{n}"
    raise UserError(
        f"mesh: {name} = {size} cannot be sharded {n} ways over {LOGICAL_AXIS_RULES[axis]}."
        f" Use a multiple of {n} ({near}), or another mesh."
    )
