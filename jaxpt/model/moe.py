"""The mixture of experts, a layer's feed-forward part: a router sends each token to k of E MLPs.

No token is dropped: rows are sorted by expert into blocks of one expert each, at most so many that
any balance fits, and one scan multiplies block after block. That costs about what a dense MLP of
the chosen experts' width does.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxpt.model.kernels.sharded import Axes, shard_map_axes, sum_over_shards
from jaxpt.model.mlp import FeedForward, LayerParams
from jaxpt.model.param import ParamSpec, matrix
from jaxpt.sharding import n_shards
from jaxpt.spec import ModelSpec

MAX_BLOCK_ROWS = 128  # larger blocks multiply faster, and pad more rows of each expert


def params(spec: ModelSpec, residual_scale: float) -> dict[str, ParamSpec]:
    """Return the parameters of one layer's router and experts.

    Args:
        spec: the architecture.
        residual_scale: of the initial std of what writes into the residual.
    """
    D, F, E = spec.d_model, spec.d_ff, spec.n_experts
    std = D**-0.5
    down_std = F**-0.5 * residual_scale
    expert = functools.partial(matrix, active_frac=spec.n_experts_per_token / E)
    reads, writes = ("experts", "embed", "mlp"), ("experts", "mlp", "embed")
    name = "mlp.experts.{}."
    return {
        "router": matrix((D, E), ("embed", "experts"), std, "mlp.gate"),
        "gate": expert((E, D, F), reads, std, name + "gate_proj"),
        "up": expert((E, D, F), reads, std, name + "up_proj"),
        "down": expert((E, F, D), writes, down_std, name + "down_proj", writes_residual=True),
    }


def apply(spec: ModelSpec, params: LayerParams, x: Array) -> FeedForward:
    """Return what the chosen experts add to the residual."""
    routing = route(spec, params["router"], x)
    experts = Experts(*(params[name].astype(x.dtype) for name in Experts._fields))
    out = run_experts(x, routing.experts, routing.weights, experts)
    activations = mix_activations(jax.lax.stop_gradient((x, routing, experts)))
    return FeedForward(out, activations, *measure_balance(spec, routing))


# ---- the router


class Routing(NamedTuple):
    """Where the tokens go.

    Attributes:
        logits: float32 [B, T, E].
        probs: their softmax.
        experts: int32 [B, T, k], the chosen ones.
        weights: float32 [B, T, k], of their outputs.
    """

    logits: Array
    probs: Array
    experts: Array
    weights: Array


def route(spec: ModelSpec, router: Array, x: Array) -> Routing:
    """Choose each token's experts, in float32 whatever the compute dtype."""
    x, router = x.astype(jnp.float32), router.astype(jnp.float32)
    logits = jnp.einsum("btd,de->bte", x, router, precision="highest")
    probs = jax.nn.softmax(logits)
    weights, experts = jax.lax.top_k(probs, spec.n_experts_per_token)
    if spec.norm_topk_prob:
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    return Routing(logits, probs, experts, weights)


def measure_balance(spec: ModelSpec, routing: Routing) -> tuple[dict[str, Array], dict[str, Array]]:
    """Return the weighted auxiliary losses, and scalars to report.

    The balance loss is transformers': E times the sum over experts of load and mean probability,
    k at perfect balance. It is a layer's own, over the tokens of all devices (2501.11873), and the
    layers' mean. The z-loss (2202.08906) keeps logits small.
    """
    E, k = spec.n_experts, spec.n_experts_per_token
    is_chosen = jax.nn.one_hot(routing.experts, E)
    load = jnp.mean(jnp.sum(is_chosen, axis=2), axis=(0, 1))  # of each expert, sums to k
    mean_probs = jnp.mean(routing.probs, axis=(0, 1))
    balance = E * jnp.sum(load * mean_probs)
    log_z = jax.nn.logsumexp(routing.logits, axis=-1)
    entropy = log_z - jnp.sum(routing.probs * routing.logits, axis=-1)
    losses = {
        "balance": spec.router_aux_loss_coef / spec.n_layers * balance,
        "router_z": spec.router_z_loss_coef / spec.n_layers * jnp.mean(log_z**2),
    }
    scalars = {
        "balance_loss": balance,  # before its coefficient
        "load_imbalance": jnp.max(load) * E / k,  # of the fullest expert, in mean loads
        "dead_experts": jnp.mean(load == 0),  # share of them
        "router_entropy": jnp.mean(entropy),  # nats
    }
    return losses, scalars


# ---- the experts


class Experts(NamedTuple):
    """The weights of all experts of a layer: gate and up [E, D, F], down [E, F, D]."""

    gate: Array
    up: Array
    down: Array


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


class Blocks(NamedTuple):
    """Assignments of tokens to experts, sorted into M blocks of R rows of one expert each.

    Attributes:
        expert: int32 [M], of each block.
        token: int32 [M, R], that a row holds; past the last token where it is padding.
        row: int32 [n_tokens, k], of each assignment among the M R rows.
    """

    expert: Array
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
        row_weights = row_weights.at[self.row].set(flat)
        row_weights = row_weights.reshape(*self.token.shape, 1)
        return BlockRows(self.expert, self.take_tokens(x), row_weights)

    def sum_rows(self, rows: Array) -> Array:
        """Return each token's sum [n_tokens, D] over its rows [M, R, D]."""
        flat = rows.reshape(-1, rows.shape[-1])
        return jnp.sum(flat[self.row], axis=1)


def sort_into_blocks(experts: Array, n_experts: int) -> Blocks:
    """Sort assignments [B, T, k] by expert. The number of blocks fits any balance."""
    k = experts.shape[-1]
    flat = experts.reshape(-1)
    n = flat.size
    mean_rows = -(-n // n_experts)
    R = min(max(1 << (mean_rows - 1).bit_length(), 8), MAX_BLOCK_ROWS)
    M = min((n + n_experts * (R - 1)) // R, n)
    n_rows = jnp.bincount(flat, length=n_experts)
    n_blocks = -(-n_rows // R)
    last_block = jnp.cumsum(n_blocks)
    order = jnp.argsort(flat, stable=True)
    # among the sorted assignments and among the rows, where each expert begins
    first = jnp.cumsum(n_rows) - n_rows
    first_row = R * (last_block - n_blocks)
    shift = (first_row - first)[flat[order]]
    rows = jnp.arange(n) + shift
    expert = jnp.searchsorted(last_block, jnp.arange(M), side="right")
    expert = jnp.minimum(expert, n_experts - 1)
    token = jnp.full(M * R, n // k).at[rows].set(order // k)
    row = jnp.zeros(n, rows.dtype).at[order].set(rows)
    return Blocks(expert, token.reshape(M, R), row.reshape(-1, k))


@jax.custom_vjp
def run_experts(x: Array, chosen: Array, weights: Array, experts: Experts) -> Array:
    """Return each token's weighted sum of its chosen experts, with a backward of its own.

    A device runs its own tokens through all experts, whose width may be sharded.

    Args:
        x: [B, T, D].
        chosen: int32 [B, T, k].
        weights: float32 [B, T, k].
        experts: in x's dtype.

    Returns:
        [B, T, D].
    """
    out, _ = run_experts_fwd(x, chosen, weights, experts)
    return out


def run_experts_fwd(
    x: Array, chosen: Array, weights: Array, experts: Experts
) -> tuple[Array, tuple[Any, ...]]:
    """Return the sum, and what backward needs: the arguments, and gate and up of every row."""
    axes = TokenAxes.of(x)
    in_axes = [axes.tokens] * 3 + EXPERT_AXES
    run = shard_map_axes(run_own_tokens, in_axes, [axes.tokens, axes.rows, axes.rows])
    out, gate, up = run(x, chosen, weights, *experts)
    return out, (x, chosen, weights, gate, up, experts)


def run_experts_bwd(residuals: tuple[Any, ...], d_out: Array) -> tuple[Array, None, Array, Experts]:
    """Return the gradients for tokens, weights and experts."""
    x, chosen, weights, gate, up, experts = residuals
    axes = TokenAxes.of(x)
    run = functools.partial(differentiate_own_tokens, axes.names)
    in_axes = [axes.tokens] * 4 + [axes.rows] * 2 + EXPERT_AXES
    run = shard_map_axes(run, in_axes, [axes.tokens] * 2 + EXPERT_AXES)
    d_x, d_weights, *d_experts = run(x, chosen, weights, d_out, gate, up, *experts)
    return d_x, None, d_weights, Experts(*d_experts)


run_experts.defvjp(run_experts_fwd, run_experts_bwd)


def run_own_tokens(
    x: Array, chosen: Array, weights: Array, *matrices: Array
) -> tuple[Array, Array, Array]:
    """Return what a device's experts make of its tokens, and gate and up of every row."""
    experts = Experts(*matrices)
    blocks = sort_into_blocks(chosen, len(experts.gate))

    def run_block(_: None, block: BlockRows) -> tuple[None, tuple[Array, Array, Array]]:
        gate = block.x @ experts.gate[block.expert]
        up = block.x @ experts.up[block.expert]
        activations = jax.nn.silu(gate) * up
        out = (block.weights * activations) @ experts.down[block.expert]
        return None, (gate, up, out)

    rows = blocks.take_rows(x, weights)
    _, (gate, up, out) = jax.lax.scan(run_block, None, rows)
    out = blocks.sum_rows(out)
    out = sum_over_shards(out, "mlp")
    return out.reshape(x.shape), gate, up


def differentiate_own_tokens(
    token_axes: tuple[str, ...],
    x: Array,
    chosen: Array,
    weights: Array,
    d_out: Array,
    gate: Array,
    up: Array,
    *matrices: Array,
) -> tuple[Array, ...]:
    """Return the gradients for a device's tokens and weights, and for its experts.

    Those for experts are summed over blocks and devices in float32.
    """
    experts = Experts(*matrices)
    blocks = sort_into_blocks(chosen, len(experts.gate))

    def run_block(
        sums: Experts, inputs: tuple[BlockRows, Array, Array, Array]
    ) -> tuple[Experts, tuple[Array, Array]]:
        block, gate, up, d_out = inputs
        sigmoid = jax.nn.sigmoid(gate)
        silu = gate * sigmoid
        activations = silu * up
        d_weighted = d_out @ experts.down[block.expert].T
        d_weights = jnp.sum(activations * d_weighted, axis=1, dtype=jnp.float32)
        d_activations = block.weights * d_weighted
        d_up = d_activations * silu
        d_silu = sigmoid + silu * (1 - sigmoid)
        d_gate = d_activations * up * d_silu
        d_x = d_gate @ experts.gate[block.expert].T
        d_x += d_up @ experts.up[block.expert].T
        sums = Experts(
            gate=add_product(sums.gate, block.expert, block.x, d_gate),
            up=add_product(sums.up, block.expert, block.x, d_up),
            down=add_product(sums.down, block.expert, block.weights * activations, d_out),
        )
        return sums, (d_x, d_weights)

    rows = blocks.take_rows(x, weights)
    inputs = rows, gate, up, blocks.take_tokens(d_out)
    zeros = [jnp.zeros(matrix.shape, jnp.float32) for matrix in experts]
    sums, (d_rows, d_row_weights) = jax.lax.scan(run_block, Experts(*zeros), inputs)
    d_x = blocks.sum_rows(d_rows)
    d_x = sum_over_shards(d_x, "mlp")
    d_weights = d_row_weights.reshape(-1)[blocks.row]
    d_weights = sum_over_shards(d_weights, "mlp")
    d_experts = [sum_over_shards(total, *token_axes).astype(x.dtype) for total in sums]
    return d_x.reshape(x.shape), d_weights.reshape(weights.shape), *d_experts


def add_product(total: Array, expert: Array, left: Array, right: Array) -> Array:
    """Return the gradients of all experts' matrices with left.T @ right added to one's."""
    product = jnp.matmul(left.T, right, preferred_element_type=jnp.float32)
    return total.at[expert].add(product)


# of gate, up and down inside `run_experts`: whole but for their width
EXPERT_AXES: list[Axes] = [(None, None, "mlp"), (None, None, "mlp"), (None, "mlp", None)]


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
        return self.names, None, "mlp"


def mix_activations(inputs: tuple[Array, Routing, Experts]) -> Array:
    """Return the weighted sum [B, T, F] of the chosen experts' activations.

    For measuring: it runs all experts, where it is read.
    """
    x, routing, experts = inputs

    def add(total: Array, numbered: tuple[Array, Array, Array]) -> tuple[Array, None]:
        number, gate, up = numbered
        weight = jnp.sum(routing.weights * (routing.experts == number), axis=-1, keepdims=True)
        activations = jax.nn.silu(x @ gate) * (x @ up)
        return total + weight.astype(x.dtype) * activations, None

    E, _, F = experts.gate.shape
    zeros = jnp.zeros((*x.shape[:2], F), x.dtype)
    total, _ = jax.lax.scan(add, zeros, (jnp.arange(E), experts.gate, experts.up))
    return total
