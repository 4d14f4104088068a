"""Run each token through its chosen experts, dropping none.

Rows are sorted by expert, with space for any balance. On TPUs and NVIDIA GPUs a grouped product
takes them all at once; elsewhere they stand in blocks of one expert each, and one scan multiplies
block after block, forward and backward. Either costs about what a dense MLP of the chosen experts'
width does. Where experts are sharded, the devices that hold the shards gather each other's tokens,
run their own experts on them, and sum the results on the way back.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxpt.model.kernels.grouped import PRODUCTS, TILE_ROWS
from jaxpt.model.kernels.sharded import (
    Axes,
    count_shards,
    find_shard_index,
    gather_shards,
    scatter_sum,
    shard_map_axes,
    sum_over_shards,
)
from jaxpt.sharding import n_shards

Activation = Callable[[Array], Array]

MAX_BLOCK_ROWS = 128  # larger blocks multiply faster, and pad more rows of each expert


class Experts(NamedTuple):
    """The weights of all experts of a layer: gate and up [E, D, F], down [E, F, D]."""

    gate: Array
    up: Array
    down: Array


READS: Axes = ("experts", "embed", "mlp")
WRITES: Axes = ("experts", "mlp", "embed")
EXPERT_AXES = [READS, READS, WRITES]


def gather_experts(matrices: tuple[Array, ...]) -> Experts:
    """Return the experts, given a device's part of each: whole but for their number and width."""
    gathered = [
        gather_shards(matrix, "embed", axes.index("embed"))
        for matrix, axes in zip(matrices, EXPERT_AXES, strict=True)
    ]
    return Experts(*gathered)


class Kept(NamedTuple):
    """What backward needs of forward; gate and up [rows, F] are of every row."""

    x: Array
    chosen: Array
    weights: Array
    gate: Array
    up: Array
    experts: Experts


def run_sorted(
    activate: Activation, kernel: str, x: Array, chosen: Array, weights: Array, experts: Experts
) -> Array:
    """Return each token's weighted sum of its chosen experts, with a backward of its own.

    The experts' number and width may be sharded.

    Args:
        activate: the activation of the gate.
        kernel: as select_experts.choose_experts_kernel returned.
        x: [B, T, D].
        chosen: int32 [B, T, k].
        weights: float32 [B, T, k].
        experts: in x's dtype.

    Returns:
        [B, T, D].
    """
    out, _ = run_sorted_fwd(activate, kernel, x, chosen, weights, experts)
    return out


def run_sorted_fwd(
    activate: Activation, kernel: str, x: Array, chosen: Array, weights: Array, experts: Experts
) -> tuple[Array, Kept]:
    """Return the sum, and what backward needs."""
    axes = TokenAxes.of(x)
    in_axes = [axes.tokens] * 3 + EXPERT_AXES
    out_axes = [axes.tokens, axes.rows, axes.rows]
    run = functools.partial(run_own_experts, activate, kernel, axes)
    run = shard_map_axes(run, in_axes, out_axes)
    out, gate, up = run(x, chosen, weights, *experts)
    return out, Kept(x, chosen, weights, gate, up, experts)


def run_sorted_bwd(
    activate: Activation, kernel: str, kept: Kept, d_out: Array
) -> tuple[Array, None, Array, Experts]:
    """Return the gradients for tokens, weights and experts."""
    axes = TokenAxes.of(kept.x)
    run = functools.partial(differentiate_own_experts, activate, kernel, axes)
    in_axes = [axes.tokens] * 4 + [axes.rows] * 2 + EXPERT_AXES
    out_axes = [axes.tokens] * 2 + EXPERT_AXES
    run = shard_map_axes(run, in_axes, out_axes)
    *arguments, experts = kept
    d_x, d_weights, *d_experts = run(d_out, *arguments, *experts)
    return d_x, None, d_weights, Experts(*d_experts)


run_experts = jax.custom_vjp(run_sorted, nondiff_argnums=(0, 1))
run_experts.defvjp(run_sorted_fwd, run_sorted_bwd)


def run_own_experts(
    activate: Activation,
    kernel: str,
    axes: TokenAxes,
    x: Array,
    chosen: Array,
    weights: Array,
    *matrices: Array,
) -> tuple[Array, Array, Array]:
    """Return what the experts make of a device's tokens, and gate and up of its own rows."""
    experts = gather_experts(matrices)
    x, chosen, weights = map(axes.gather, (x, chosen, weights))
    rows = sort_own(kernel, chosen, experts)
    run = run_blocks if kernel == "scan" else functools.partial(run_groups, kernel)
    inputs = rows.take_tokens(x), rows.place_weights(weights, x.dtype)
    gate, up, out = run(activate, rows, *inputs, experts)
    return axes.sum(rows.sum_rows(out).reshape(x.shape)), gate, up


def differentiate_own_experts(
    activate: Activation,
    kernel: str,
    axes: TokenAxes,
    d_out: Array,
    x: Array,
    chosen: Array,
    weights: Array,
    gate: Array,
    up: Array,
    *matrices: Array,
) -> tuple[Array, ...]:
    """Return the gradients for a device's tokens and weights, and for its experts.

    Those for experts are summed over rows and devices in float32.
    """
    experts = gather_experts(matrices)
    d_out, x, chosen, weights = map(axes.gather, (d_out, x, chosen, weights))
    rows = sort_own(kernel, chosen, experts)
    saved = SavedRows(
        x=rows.take_tokens(x),
        weights=rows.place_weights(weights, x.dtype),
        gate=gate,
        up=up,
        d_out=rows.take_tokens(d_out),
    )
    run = differentiate_blocks
    if kernel != "scan":
        run = functools.partial(differentiate_groups, kernel)
    found = run(activate, rows, saved, experts)
    d_x = rows.sum_rows(found.x).reshape(x.shape)
    d_weights = found.weights.at[rows.row].get(mode="fill", fill_value=0)
    d_weights = d_weights.reshape(weights.shape)
    d_experts = [
        axes.sum_gradient(gradient, names.index("embed")).astype(x.dtype)
        for gradient, names in zip(found.experts, EXPERT_AXES, strict=True)
    ]
    return axes.sum(d_x), axes.sum(d_weights), *d_experts


class SavedRows(NamedTuple):
    """What backward reads of every row: token, weight, gate and up [F], the gradient d_out [D]."""

    x: Array
    weights: Array
    gate: Array
    up: Array
    d_out: Array


class RowGradients(NamedTuple):
    """The gradients for rows [rows, D] and their weights [rows], float32 ones for experts."""

    x: Array
    weights: Array
    experts: Experts


def backpropagate_gate(
    activate: Activation, saved: SavedRows, d_weighted: Array
) -> tuple[Array, Array, Array, Array]:
    """Return the gradients for weights, gate and up of rows, and their weighted activations.

    Args:
        activate: the activation of the gate.
        saved: the rows.
        d_weighted: the gradient for weighted activations [rows, F].
    """

    def multiply_gated(gate: Array, up: Array) -> Array:
        return activate(gate) * up

    activations, differentiate = jax.vjp(multiply_gated, saved.gate, saved.up)
    d_weights = jnp.sum(activations * d_weighted, axis=1, dtype=jnp.float32)
    d_gate, d_up = differentiate(saved.weights * d_weighted)
    return d_weights, d_gate, d_up, saved.weights * activations


# ---- all rows at once, by a kernel


def run_groups(
    kernel: str, activate: Activation, rows: SortedRows, x: Array, weights: Array, experts: Experts
) -> tuple[Array, Array, Array]:
    """Return gate, up and weighted output of rows [rows, D] and weights [rows, 1]."""
    multiply = PRODUCTS[kernel].multiply_groups
    gate = rows.clear_unused(multiply(x, experts.gate, rows.sizes))
    up = rows.clear_unused(multiply(x, experts.up, rows.sizes))
    out = multiply(weights * activate(gate) * up, experts.down, rows.sizes)
    return gate, up, out


def differentiate_groups(
    kernel: str, activate: Activation, rows: SortedRows, saved: SavedRows, experts: Experts
) -> RowGradients:
    """Return the gradients that rows give."""
    _, multiply, sum_groups = PRODUCTS[kernel]
    d_weighted = rows.clear_unused(multiply(saved.d_out, experts.down, rows.sizes))
    d_weights, d_gate, d_up, weighted = backpropagate_gate(activate, saved, d_weighted)
    d_x = multiply(d_gate, experts.gate, rows.sizes)
    d_x += multiply(d_up, experts.up, rows.sizes)
    d_experts = Experts(
        gate=sum_groups(saved.x, d_gate, rows.sizes),
        up=sum_groups(saved.x, d_up, rows.sizes),
        down=sum_groups(weighted, saved.d_out, rows.sizes),
    )
    return RowGradients(d_x, d_weights, d_experts)


# ---- block after block


def run_blocks(
    activate: Activation, rows: SortedRows, x: Array, weights: Array, experts: Experts
) -> tuple[Array, Array, Array]:
    """Return gate, up and weighted output of rows [rows, D] and weights [rows, 1]."""

    def run_block(_: None, block: Any) -> tuple[None, tuple[Array, Array, Array]]:
        expert, (x, weights) = block
        gate = x @ experts.gate[expert]
        up = x @ experts.up[expert]
        activations = activate(gate) * up
        out = (weights * activations) @ experts.down[expert]
        return None, (gate, up, out)

    _, found = scan_blocks(run_block, None, rows, (x, weights))
    return found


def differentiate_blocks(
    activate: Activation, rows: SortedRows, saved: SavedRows, experts: Experts
) -> RowGradients:
    """Return the gradients that rows give."""

    def run_block(sums: Experts, block: Any) -> tuple[Experts, tuple[Array, Array]]:
        expert, saved = block
        d_weighted = saved.d_out @ experts.down[expert].T
        d_weights, d_gate, d_up, weighted = backpropagate_gate(activate, saved, d_weighted)
        d_x = d_gate @ experts.gate[expert].T
        d_x += d_up @ experts.up[expert].T
        gate_sum = add_product(sums.gate, expert, saved.x, d_gate)
        up_sum = add_product(sums.up, expert, saved.x, d_up)
        down_sum = add_product(sums.down, expert, weighted, saved.d_out)
        return Experts(gate_sum, up_sum, down_sum), (d_x, d_weights)

    zeros = [jnp.zeros(matrix.shape, jnp.float32) for matrix in experts]
    sums, (d_x, d_weights) = scan_blocks(run_block, Experts(*zeros), rows, saved)
    return RowGradients(d_x, d_weights, sums)


def add_product(total: Array, expert: Array, left: Array, right: Array) -> Array:
    """Return the gradients of all experts' matrices with left.T @ right added to one's."""
    product = jnp.matmul(left.T, right, preferred_element_type=jnp.float32)
    return total.at[expert].add(product)


def scan_blocks(run: Callable[..., Any], carry: Any, rows: SortedRows, arrays: Any) -> Any:
    """Return `scan`'s result over blocks of rows, with zeros of blocks without a token.

    Where experts are sharded those are most, since all tokens might choose one device's; otherwise
    they are fewer than the experts, and multiplied.

    Args:
        run: of the carry and a block: its expert and its rows of the arrays.
        carry: as in jax.lax.scan.
        rows: how they are sorted.
        arrays: a pytree of [rows, ...].
    """
    M = len(rows.expert)
    blocks = rows.expert, jax.tree.map(lambda x: x.reshape(M, -1, *x.shape[1:]), arrays)

    def skip(carry: Any, block: Any) -> Any:
        _, shapes = jax.eval_shape(run, carry, block)
        return carry, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    def run_if_used(carry: Any, numbered: tuple[Array, Any]) -> Any:
        is_used, block = numbered
        return jax.lax.cond(is_used, run, skip, carry, block)

    if count_shards("experts") == 1:
        carry, found = jax.lax.scan(run, carry, blocks)
    else:
        carry, found = jax.lax.scan(run_if_used, carry, (rows.is_used, blocks))
    return carry, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), found)


# ---- rows


class SortedRows(NamedTuple):
    """Assignments of tokens to experts, sorted into rows, whole blocks of one expert each.

    Attributes:
        sizes: int32 [E], rows of each expert, padding included.
        expert: int32 [M], of each block.
        is_used: bool [M], whether the block is an expert's.
        token: int32 [rows], that a row holds; past the last token where it is padding.
        row: int32 [n_tokens, k], of each assignment; past the last one where the expert is another
            device's.
    """

    sizes: Array
    expert: Array
    is_used: Array
    token: Array
    row: Array

    def take_tokens(self, x: Array) -> Array:
        """Return the rows [rows, D] of tokens [B, T, D], 0 where they are padding."""
        tokens = x.reshape(-1, x.shape[-1])
        return tokens.at[self.token].get(mode="fill", fill_value=0)

    def place_weights(self, weights: Array, dtype: Any) -> Array:
        """Return the rows' own [rows, 1] of weights [B, T, k]."""
        flat = weights.reshape(self.row.shape).astype(dtype)
        row_weights = jnp.zeros(self.token.size, dtype)
        return row_weights.at[self.row].set(flat, mode="drop")[:, None]

    def sum_rows(self, rows: Array) -> Array:
        """Return each token's sum [n_tokens, D] over its rows [rows, D]."""
        return jnp.sum(rows.at[self.row].get(mode="fill", fill_value=0), axis=1)

    def clear_unused(self, rows: Array) -> Array:
        """Return the rows [rows, F] with 0 where no expert's are: kernels leave anything there."""
        is_used = jnp.arange(len(rows)) < jnp.sum(self.sizes)
        return jnp.where(is_used[:, None], rows, 0)


def sort_own(kernel: str, chosen: Array, experts: Experts) -> SortedRows:
    """Sort the assignments [B, T, k] to the experts that a device holds."""
    n_own = len(experts.gate)
    n_shards = count_shards("experts")
    own = chosen - n_own * find_shard_index("experts")
    if kernel != "scan":
        return sort_by_expert(own, n_own, block_rows=1, for_kernel=True)
    block_rows = choose_block_rows(chosen.size, n_shards * n_own)
    return sort_by_expert(own, n_own, block_rows)


def sort_by_expert(
    experts: Array, n_experts: int, block_rows: int, for_kernel: bool = False
) -> SortedRows:
    """Sort assignments [B, T, k] by expert. The number of rows fits any balance.

    Args:
        experts: the chosen ones; those below 0 and from n_experts on are left out.
        n_experts: of this device.
        block_rows: an expert's rows are a multiple of it.
        for_kernel: give each expert a block (tokamax 0.0.12 adds another's product to an empty
            one), and make whole tiles, one more than are used (its loads run over).
    """
    R = block_rows
    k = experts.shape[-1]
    flat = experts.reshape(-1)
    is_own = (flat >= 0) & (flat < n_experts)
    flat = jnp.where(is_own, flat, n_experts)
    n = flat.size // k * min(k, n_experts)  # at most; the experts of a token are distinct
    n_rows = jnp.bincount(flat, length=n_experts)
    n_blocks = -(-n_rows // R)
    M = min((n + n_experts * (R - 1)) // R, n)
    if for_kernel:
        n_blocks = jnp.maximum(n_blocks, 1)
        n_tiles = -(-(n + n_experts * R) // TILE_ROWS) + 1
        M = n_tiles * TILE_ROWS // R
    last_block = jnp.cumsum(n_blocks)
    order = jnp.argsort(flat, stable=True)
    # among the sorted assignments and among the rows, where each expert begins
    first = jnp.cumsum(n_rows) - n_rows
    first_row = R * (last_block - n_blocks)
    shift = (first_row - first)[flat[order]]
    rows = jnp.arange(flat.size) + shift
    rows = jnp.where(is_own[order], rows, M * R)
    expert = jnp.searchsorted(last_block, jnp.arange(M), side="right")
    expert = jnp.minimum(expert, n_experts - 1)
    is_used = jnp.arange(M) < last_block[-1]
    token = jnp.full(M * R, flat.size // k).at[rows].set(order // k, mode="drop")
    row = jnp.zeros(flat.size, rows.dtype).at[order].set(rows)
    sizes = (R * n_blocks).astype(jnp.int32)
    return SortedRows(sizes, expert, is_used, token, row.reshape(-1, k))


def choose_block_rows(n_assignments: int, n_experts: int) -> int:
    """Return the power of two that holds an expert's mean load, within 8 and MAX_BLOCK_ROWS."""
    mean_load = -(-n_assignments // n_experts)
    rows = 1 << (mean_load - 1).bit_length()
    return min(max(rows, 8), MAX_BLOCK_ROWS)


class TokenAxes(NamedTuple):
    """The logical axes that tokens are sharded over: those whose shards are of equal size."""

    batch: str | None
    position: str | None

    @classmethod
    def of(cls, x: Array) -> TokenAxes:
        """Return the axes of tokens [B, T, D]."""
        mesh = jax.sharding.get_abstract_mesh()
        found = []
        for axis, size in zip(cls._fields, x.shape, strict=False):
            divides = not mesh.empty and size % n_shards(mesh, axis) == 0
            found.append(axis if divides else None)
        return cls(*found)

    @property
    def names(self) -> tuple[str, ...]:
        """The axes in force."""
        return tuple(axis for axis in self if axis)

    @property
    def tokens(self) -> Axes:
        """The axes of an array [B, T, n]."""
        return self.batch, self.position, None

    @property
    def rows(self) -> Axes:
        """The axes of rows [rows, F], each device's own."""
        owners = self.names if self.batch else (*self.names, "experts")
        return owners, "mlp"

    @property
    def gathered(self) -> tuple[str, ...]:
        """The axes that tokens are sharded over once they are gathered."""
        return tuple("gathered_batch" if axis == "batch" else axis for axis in self.names)

    @property
    def is_gathered(self) -> bool:
        """Whether devices hold other tokens than those with the other experts."""
        return self.batch is not None and count_shards("experts") > 1

    def gather(self, x: Array) -> Array:
        """Return an array [B, T, n] of the tokens of all devices that share the experts."""
        return gather_shards(x, "experts") if self.is_gathered else x

    def sum(self, x: Array) -> Array:
        """Return a device's tokens [B, T, n] of the sum over experts and their width."""
        x = sum_over_shards(x, "mlp")
        if self.is_gathered:
            return scatter_sum(x, "experts")
        return sum_over_shards(x, "experts")

    def sum_gradient(self, gradient: Array, dimension: int) -> Array:
        """Return a device's part, along a dimension, of the experts' gradient by all tokens."""
        gradient = scatter_sum(gradient, "embed", dimension)
        if not self.batch:  # it was whole on each of them
            gradient = gradient / count_shards("embed")
        return sum_over_shards(gradient, *self.gathered, but=("embed",))
