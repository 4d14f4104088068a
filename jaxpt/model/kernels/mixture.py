"""Run each token through its chosen experts, dropping none.

Rows are sorted by expert into blocks of one expert each, at most so many that any balance fits, and
one scan multiplies block after block, forward and backward. That costs about what a dense MLP of
the chosen experts' width does. Where experts are sharded, the devices that hold the shards gather
each other's tokens, run their own experts on them, and sum the results on the way back.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

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


# inside `run_experts` they are whole but for their number and width
READS: Axes = ("experts", None, "mlp")
WRITES: Axes = ("experts", "mlp", None)
EXPERT_AXES = [READS, READS, WRITES]


class Kept(NamedTuple):
    """What backward needs of forward; gate and up [M, R, F] are of every row."""

    x: Array
    chosen: Array
    weights: Array
    gate: Array
    up: Array
    experts: Experts


def run_sorted(
    activate: Activation, x: Array, chosen: Array, weights: Array, experts: Experts
) -> Array:
    """Return each token's weighted sum of its chosen experts, with a backward of its own.

    The experts' number and width may be sharded.

    Args:
        activate: the activation of the gate.
        x: [B, T, D].
        chosen: int32 [B, T, k].
        weights: float32 [B, T, k].
        experts: in x's dtype.

    Returns:
        [B, T, D].
    """
    out, _ = run_sorted_fwd(activate, x, chosen, weights, experts)
    return out


def run_sorted_fwd(
    activate: Activation, x: Array, chosen: Array, weights: Array, experts: Experts
) -> tuple[Array, Kept]:
    """Return the sum, and what backward needs."""
    axes = TokenAxes.of(x)
    in_axes = [axes.tokens] * 3 + EXPERT_AXES
    out_axes = [axes.tokens, axes.rows, axes.rows]
    run = functools.partial(run_own_experts, activate, axes)
    run = shard_map_axes(run, in_axes, out_axes)
    out, gate, up = run(x, chosen, weights, *experts)
    return out, Kept(x, chosen, weights, gate, up, experts)


def run_sorted_bwd(
    activate: Activation, kept: Kept, d_out: Array
) -> tuple[Array, None, Array, Experts]:
    """Return the gradients for tokens, weights and experts."""
    axes = TokenAxes.of(kept.x)
    run = functools.partial(differentiate_own_experts, activate, axes)
    in_axes = [axes.tokens] * 4 + [axes.rows] * 2 + EXPERT_AXES
    out_axes = [axes.tokens] * 2 + EXPERT_AXES
    run = shard_map_axes(run, in_axes, out_axes)
    *arguments, experts = kept
    d_x, d_weights, *d_experts = run(d_out, *arguments, *experts)
    return d_x, None, d_weights, Experts(*d_experts)


run_experts = jax.custom_vjp(run_sorted, nondiff_argnums=(0,))
run_experts.defvjp(run_sorted_fwd, run_sorted_bwd)


def run_own_experts(
    activate: Activation,
    axes: TokenAxes,
    x: Array,
    chosen: Array,
    weights: Array,
    *matrices: Array,
) -> tuple[Array, Array, Array]:
    """Return what the experts make of a device's tokens, and gate and up of its own rows."""
    experts = Experts(*matrices)
    x, chosen, weights = map(axes.gather, (x, chosen, weights))
    blocks = sort_own(chosen, experts)

    def run_block(_: None, block: BlockRows) -> tuple[None, tuple[Array, Array, Array]]:
        gate = block.x @ experts.gate[block.expert]
        up = block.x @ experts.up[block.expert]
        activations = activate(gate) * up
        out = (block.weights * activations) @ experts.down[block.expert]
        return None, (gate, up, out)

    rows = blocks.take_rows(x, weights)
    _, (gate, up, out) = scan_blocks(run_block, None, rows, blocks.is_used)
    out = blocks.sum_rows(out).reshape(x.shape)
    return axes.sum(out), gate, up


def differentiate_own_experts(
    activate: Activation,
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

    Those for experts are summed over blocks and devices in float32.
    """
    experts = Experts(*matrices)
    d_out, x, chosen, weights = map(axes.gather, (d_out, x, chosen, weights))
    blocks = sort_own(chosen, experts)

    def multiply_gated(gate: Array, up: Array) -> Array:
        return activate(gate) * up

    def run_block(sums: Experts, saved: SavedRows) -> tuple[Experts, tuple[Array, Array]]:
        block, d_out = saved.block, saved.d_out
        activations, differentiate = jax.vjp(multiply_gated, saved.gate, saved.up)
        d_weighted = d_out @ experts.down[block.expert].T
        d_weights = jnp.sum(activations * d_weighted, axis=1, dtype=jnp.float32)
        d_gate, d_up = differentiate(block.weights * d_weighted)
        d_x = d_gate @ experts.gate[block.expert].T
        d_x += d_up @ experts.up[block.expert].T
        weighted = block.weights * activations
        gate_sum = add_product(sums.gate, block.expert, block.x, d_gate)
        up_sum = add_product(sums.up, block.expert, block.x, d_up)
        down_sum = add_product(sums.down, block.expert, weighted, d_out)
        return Experts(gate_sum, up_sum, down_sum), (d_x, d_weights)

    rows = blocks.take_rows(x, weights)
    saved = SavedRows(rows, gate, up, blocks.take_tokens(d_out))
    zeros = [jnp.zeros(matrix.shape, jnp.float32) for matrix in experts]
    start = Experts(*zeros)
    sums, (d_rows, d_row_weights) = scan_blocks(run_block, start, saved, blocks.is_used)
    d_x = blocks.sum_rows(d_rows).reshape(x.shape)
    d_weights = d_row_weights.reshape(-1).at[blocks.row].get(mode="fill", fill_value=0)
    d_weights = d_weights.reshape(weights.shape)
    d_experts = [sum_over_shards(total, *axes.gathered).astype(x.dtype) for total in sums]
    return axes.sum(d_x), axes.sum(d_weights), *d_experts


def add_product(total: Array, expert: Array, left: Array, right: Array) -> Array:
    """Return the gradients of all experts' matrices with left.T @ right added to one's."""
    product = jnp.matmul(left.T, right, preferred_element_type=jnp.float32)
    return total.at[expert].add(product)


def scan_blocks(run: Callable[..., Any], carry: Any, blocks: Any, is_used: Array) -> Any:
    """Return `scan`'s result, with zeros of blocks without a token.

    Where experts are sharded those are most, since all tokens might choose one device's; otherwise
    they are fewer than the experts, and multiplied.
    """
    if count_shards("experts") == 1:
        return jax.lax.scan(run, carry, blocks)

    def skip(carry: Any, block: Any) -> Any:
        _, shapes = jax.eval_shape(run, carry, block)
        return carry, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    def run_if_used(carry: Any, numbered: tuple[Array, Any]) -> Any:
        is_used, block = numbered
        return jax.lax.cond(is_used, run, skip, carry, block)

    return jax.lax.scan(run_if_used, carry, (is_used, blocks))


# ---- blocks


class BlockRows(NamedTuple):
    """The rows of blocks of one expert each; `scan` takes one block after the other.

    Attributes:
        expert: int32 [M].
        x: [M, R, D], their tokens.
        weights: [M, R, 1], of their outputs.
    """

    expert: Array
    x: Array
    weights: Array


class SavedRows(NamedTuple):
    """What backward reads of every row: gate and up [M, R, F], the gradient d_out [M, R, D]."""

    block: BlockRows
    gate: Array
    up: Array
    d_out: Array


class Blocks(NamedTuple):
    """Assignments of tokens to experts, sorted into M blocks of R rows of one expert each.

    Attributes:
        expert: int32 [M], of each block.
        is_used: bool [M], whether there is a token in it.
        token: int32 [M, R], that a row holds; past the last token where it is padding.
        row: int32 [n_tokens, k], of each assignment among the M R rows; past the last one where
            the expert is another device's.
    """

    expert: Array
    is_used: Array
    token: Array
    row: Array

    def take_tokens(self, x: Array) -> Array:
        """Return the rows [M, R, D] of tokens [B, T, D], 0 where they are padding."""
        tokens = x.reshape(-1, x.shape[-1])
        return tokens.at[self.token].get(mode="fill", fill_value=0)

    def take_rows(self, x: Array, weights: Array) -> BlockRows:
        """Return the rows of tokens [B, T, D] and weights [B, T, k], in x's dtype."""
        flat = weights.reshape(self.row.shape).astype(x.dtype)
        row_weights = jnp.zeros(self.token.size, x.dtype)
        row_weights = row_weights.at[self.row].set(flat, mode="drop")
        row_weights = row_weights.reshape(*self.token.shape, 1)
        return BlockRows(self.expert, self.take_tokens(x), row_weights)

    def sum_rows(self, rows: Array) -> Array:
        """Return each token's sum [n_tokens, D] over its rows [M, R, D]."""
        flat = rows.reshape(-1, rows.shape[-1])
        return jnp.sum(flat.at[self.row].get(mode="fill", fill_value=0), axis=1)


def sort_own(chosen: Array, experts: Experts) -> Blocks:
    """Sort the assignments [B, T, k] to the experts that a device holds."""
    n_own = len(experts.gate)
    own = chosen - n_own * find_shard_index("experts")
    return sort_into_blocks(own, n_own, n_shards=count_shards("experts"))


def sort_into_blocks(experts: Array, n_experts: int, n_shards: int = 1) -> Blocks:
    """Sort assignments [B, T, k] by expert. The number of blocks fits any balance.

    Args:
        experts: the chosen ones; those below 0 and from n_experts on are left out.
        n_experts: of this device.
        n_shards: devices that hold as many each.
    """
    k = experts.shape[-1]
    flat = experts.reshape(-1)
    is_own = (flat >= 0) & (flat < n_experts)
    flat = jnp.where(is_own, flat, n_experts)
    n = flat.size // k * min(k, n_experts)  # at most; the experts of a token are distinct
    R = choose_block_rows(flat.size, n_shards * n_experts)
    M = min((n + n_experts * (R - 1)) // R, n)
    n_rows = jnp.bincount(flat, length=n_experts)
    n_blocks = -(-n_rows // R)
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
    return Blocks(expert, is_used, token.reshape(M, R), row.reshape(-1, k))


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
        """The axes of blocks [M, R, F], each device's own."""
        owners = self.names if self.batch else (*self.names, "experts")
        return owners, None, "mlp"

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
