"""The operators of growth: one function each, from a parent to the sources of the child's axes.

An operator is written as text, 'depth_upscale(m=4)', so that it fits a command line, a config and a
manifest (growth/parse.py). To add one, write a function here and mark it `@operator`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxpt import io
from jaxpt.data import tokenizer
from jaxpt.families import family
from jaxpt.growth import measure, vocabulary
from jaxpt.growth.apply import grow_params
from jaxpt.growth.growth import NO_SOURCE, AxisSources, Growth, Parent
from jaxpt.growth.records import Measured
from jaxpt.model.transformer import Params
from jaxpt.spec import Batch, ModelSpec, RopeScaling, UserError

OPERATORS: dict[str, Callable[..., Growth]] = {}


def operator(function: Callable[..., Growth]) -> Callable[..., Growth]:
    """Register an operator under its name."""
    OPERATORS[function.__name__] = function
    return function


# ---- depth: the layers of the child


@operator
def depth_upscale(parent: Parent, m: int) -> Growth:
    """Stack layers 0..n-m-1 and m..n-1: 2 (n - m) layers. SOLAR, 2312.15166: n 32, m 8 -> 48."""
    n = parent.spec.n_layers
    if not 0 <= m < n:
        raise UserError(
            f"depth_upscale(m={m}): expected 0 to {n - 1}, got {m}: "
            f"m is the number of layers left out of each copy of {n}."
        )
    layer_map = [*range(n - m), *range(m, n)]
    return make_depth_growth(parent, layer_map)


@operator
def stack(parent: Parent, g: int = 2) -> Growth:
    """Repeat the whole stack g times. G_stack, 2405.15319."""
    check_minimum("stack", "g", g, 1)
    layer_map = [*range(parent.spec.n_layers)] * g
    return make_depth_growth(parent, layer_map)


@operator
def interleave(parent: Parent, g: int = 2) -> Growth:
    """Repeat each layer g times in place. Collapses untrained (iDUS: 29.5 on H6); a baseline."""
    check_minimum("interleave", "g", g, 1)
    parent_layers = np.arange(parent.spec.n_layers)
    layer_map = np.repeat(parent_layers, g)
    return make_depth_growth(parent, layer_map.tolist())


@operator
def stack_middle(parent: Parent, m: int) -> Growth:
    """Repeat the middle block of m layers, where depth is used best.

    MIDAS, 2409.19044; 2512.08819.
    """
    n = parent.spec.n_layers
    if not 1 <= m <= n:
        raise UserError(
            f"stack_middle(m={m}): expected 1 to {n}, the number of layers, got {m}: "
            "m is the size of the middle block."
        )
    first = (n - m) // 2
    layer_map = [*range(first + m), *range(first, n)]
    return make_depth_growth(parent, layer_map)


@operator
def deepen(parent: Parent, L: int, new: str = "random") -> Growth:
    """Jump to L layers, even from 0; new ones are random or copies in order. 2511.04981."""
    n = parent.spec.n_layers
    if new not in ("random", "copy"):
        raise UserError(f"deepen(new={new!r}): expected 'random' or 'copy', got {new!r}.")
    check_minimum("deepen", "L", L, 1)
    if n >= L:
        raise UserError(f"deepen(L={L}): the model has {n} layers already. Give a larger L.")
    if new == "random":
        new_layers = [NO_SOURCE] * (L - n)
        return make_depth_growth(parent, [*range(n), *new_layers])
    if not n:
        raise UserError(
            f"deepen(L={L}, new='copy'): the model has no layers to copy. Use new='random'."
        )
    layer_map = [layer % n for layer in range(L)]
    return make_depth_growth(parent, layer_map)


@operator
def insert_identity(parent: Parent, every: int = 1) -> Growth:
    """Insert after each `every` layers a copy with zero output: exact. LLaMA Pro, 2401.02415."""
    check_minimum("insert_identity", "every", every, 1)
    layer_map: list[int] = []
    inserted: list[int] = []
    for layer in range(parent.spec.n_layers):
        layer_map.append(layer)
        if (layer + 1) % every == 0:
            inserted.append(len(layer_map))
            layer_map.append(layer)
    growth = make_depth_growth(parent, layer_map)
    return growth._replace(zero_output_layers=tuple(inserted), preserves_function=True)


@operator
def layers(parent: Parent, sources: list[int]) -> Growth:
    """Take any list of source layers, such as the course's [0, 1, 2, 3, 4, 7, 8, 9, 10, 11]."""
    check_layer_list(f"layers({sources})", sources, parent.spec.n_layers)
    return make_depth_growth(parent, sources)


@operator
def drop_layers(parent: Parent, n: int | None = None, by: str | list[int] = "influence") -> Growth:
    """Drop the n layers that change the residual least, or a list of them. ShortGPT, 2403.03853.

    by="loss" drops one after the other, each time the one without which the loss is lowest.
    """
    n_layers = parent.spec.n_layers
    measured: dict[str, Measured] = {}
    if isinstance(by, str):
        check_choice_of_layers(parent.spec, n, by)
        assert n is not None
        if parent.params is None:
            by = list(range(n))
        elif by == "loss":
            by, losses = choose_by_loss(parent, n)
            measured = {"loss_without": losses, "dropped": by}
        else:
            statistics = measure.measure_layers(
                parent.spec, parent.params, require_batches("drop_layers", parent)
            )
            rising = np.argsort(statistics.influence, kind="stable")
            by = sorted(rising[:n].tolist())
            measured = {"influence": statistics.influence.tolist(), "dropped": by}
    call = f"drop_layers(n={n}, by={by})"
    check_layer_list(f"drop_layers(by={by})", by, n_layers)
    n_dropped = len(set(by))
    if n not in (None, len(by)) or n_dropped == n_layers:
        raise UserError(
            f"{call}: expected a list of n different layers that leaves at least one of "
            f"{n_layers}, got {by}."
        )
    kept = [layer for layer in range(n_layers) if layer not in by]
    growth = make_depth_growth(parent, kept)
    return growth._replace(measured=measured)


def check_choice_of_layers(spec: ModelSpec, n: int | None, by: str) -> None:
    """Raise UserError unless `drop_layers` can choose n layers by this measure."""
    if by not in ("influence", "loss"):
        raise UserError(
            f"drop_layers(by={by!r}): expected 'influence', 'loss' or a list of layers, got {by!r}."
        )
    if not isinstance(n, int) or not 1 <= n < spec.n_layers:
        raise UserError(
            f"drop_layers(n={n}): expected 1 to {spec.n_layers - 1}, the number of layers to drop, "
            f"got {n}."
        )


def choose_by_loss(parent: Parent, n: int) -> tuple[list[int], list[float]]:
    """Return the layers to drop, and the loss without each layer alone.

    Influence looks at each layer by itself; here the second choice knows of the first.
    """
    assert parent.params is not None
    batches = list(require_batches("drop_layers", parent))
    kept = list(range(parent.spec.n_layers))
    first: list[float] = []
    for _ in range(n):
        losses = []
        for layer in kept:
            others = [other for other in kept if other != layer]
            found = measure.measure_loss_of_layers(parent.spec, parent.params, batches, others)
            losses.append(found)
        first = first or losses
        del kept[int(np.argmin(losses))]
    dropped = [layer for layer in range(parent.spec.n_layers) if layer not in kept]
    return dropped, first


@operator
def predict_layers(parent: Parent, m: int) -> Growth:
    """Add m layers in the upper half, each predicted from its neighbors. LESA, 2502.13794."""
    n = parent.spec.n_layers
    if n < 3 or not 1 <= m < n:
        raise UserError(
            f"predict_layers(m={m}): a layer is predicted between two neighbors. "
            f"A model of {n} layers has room for 1 to {n - 1}, and needs at least 3."
        )
    # the last gaps: the paper leaves the first half of the model alone
    gaps = tuple(range(n - 1 - m, n - 1))
    layer_map = []
    for layer in range(n):
        layer_map.append(layer)
        if layer in gaps:
            layer_map.append(NO_SOURCE)
    growth = make_depth_growth(parent, layer_map)
    return growth._replace(predicted_gaps=gaps)


def make_depth_growth(parent: Parent, layer_map: list[int]) -> Growth:
    """Return the growth that takes these layers of the parent."""
    n_layers = parent.spec.n_layers
    child = parent.spec.take_layers(
        [None if source == NO_SOURCE else source for source in layer_map]
    )
    is_same = layer_map == [*range(n_layers)]
    sources = {"layers": np.asarray(layer_map)}
    return Growth(parent.spec, child, sources, preserves_function=is_same)


# ---- width: the channels of every layer

WIDTH_AXES = {"embed": "d_model", "mlp": "d_ff", "heads": "n_heads", "kv_heads": "n_kv_heads"}
MESH_MULTIPLE = 128 * 3 * 5 * 7  # of 1 to 8 devices, and of powers of two up to 128
SIZE_ARGUMENTS = {"d": "d_model", "ff": "d_ff", "heads": "n_heads"}


class Sizes(NamedTuple):
    """The arguments of a width operator; None: unchanged."""

    d: int | None
    ff: int | None
    heads: int | None


@operator
def widen(
    parent: Parent, d: int | None = None, ff: int | None = None, heads: int | None = None
) -> Growth:
    """Widen by exact copies, each of c divided by c; d a multiple. HyperCloning, 2409.12903."""
    width = parent.spec.d_model
    if d is not None and (not isinstance(d, int) or d % width):
        raise UserError(
            f"widen(d={d}): expected a multiple of {width}, got {d}: RMSNorm keeps its size only "
            "when every channel is copied equally often. widen_rms takes any width."
        )
    n_heads = parent.spec.n_heads
    if parent.spec.qk_norm_whole and heads is not None and heads % n_heads:
        raise UserError(
            f"widen(heads={heads}): expected a multiple of {n_heads}, got {heads}: this model's "
            "norm of q and k takes all heads together, and keeps their size only when every head "
            "is copied equally often. widen_rms takes any number."
        )
    growth = make_width_growth("widen", parent, Sizes(d, ff, heads))
    return growth._replace(preserves_function=True)


@operator
def widen_rms(
    parent: Parent, d: int | None = None, ff: int | None = None, heads: int | None = None
) -> Growth:
    """Widen to any width, RMS kept on average; new moments are reset and re-warm. 2602.02472."""
    # the reset and re-warmup of the new part tells the copies apart
    growth = make_width_growth("widen_rms", parent, Sizes(d, ff, heads))
    spec, child = parent.spec, growth.child
    is_exact = child.d_model % spec.d_model == 0
    if spec.qk_norm_whole:
        is_exact = is_exact and child.n_heads % spec.n_heads == 0
    return growth._replace(preserves_function=is_exact, moments="reset_new")


@operator
def narrow(
    parent: Parent,
    ff: int | None = None,
    heads: int | None = None,
    d: int | None = None,
    rounds: int = 1,
) -> Growth:
    """Keep the most active channels, MLP activations and kv groups. Minitron, 2407.14679.

    rounds=R narrows in up to R parts and measures anew before each.
    """
    spec = parent.spec
    child = resize_spec("narrow", spec, Sizes(d, ff, heads))
    check_minimum("narrow", "rounds", rounds, 1)
    for argument, field in SIZE_ARGUMENTS.items():
        before = getattr(spec, field)
        after = getattr(child, field)
        if after > before:
            raise UserError(
                f"narrow({argument}={after}): the model has only {before}. "
                "Give a smaller number, or use widen."
            )
    if parent.params is None:
        return Growth(spec, child, {})
    batches = list(require_batches("narrow", parent))
    growth = Growth(spec, spec, {})
    for done in range(1, rounds + 1):
        part = part_way(spec, child, done, rounds)
        if part != growth.child:
            growth = narrow_further(growth, parent.params, batches, part)
    measured: dict[str, Measured] = {}
    if d:
        measured["kept_channels"] = growth.sources["embed"].tolist()
    sources = keep_changed_axes(spec, child, growth.sources)
    return growth._replace(sources=sources, measured=measured)


def part_way(spec: ModelSpec, child: ModelSpec, done: int, rounds: int) -> ModelSpec:
    """Return the widths after some of the rounds from one model to a narrower one.

    A mesh that divides both models' widths divides those between.
    """

    def between(field: str) -> int:
        before, after = getattr(spec, field), getattr(child, field)
        unit = math.gcd(before, after, MESH_MULTIPLE)
        return before - (before - after) // unit * done // rounds * unit

    n_kv_heads = between("n_kv_heads")
    n_heads = n_kv_heads * (spec.n_heads // spec.n_kv_heads)
    d_model, d_ff = between("d_model"), between("d_ff")
    return spec.replace(d_model=d_model, d_ff=d_ff, n_heads=n_heads, n_kv_heads=n_kv_heads)


def narrow_further(
    growth: Growth, params: Params, batches: Iterable[Batch], child: ModelSpec
) -> Growth:
    """Return the growth to a model yet narrower, by what is measured after the growth so far."""
    before = growth.child
    if growth.sources:
        mesh = params["embed"].sharding.mesh
        kept = keep_changed_axes(growth.spec, before, growth.sources)
        params = grow_params(growth._replace(sources=kept), params, mesh)
    scores = measure.measure_importance(before, params, batches)
    heads, kv_heads = measure.select_heads(
        scores.heads, before.n_heads, before.n_kv_heads, child.n_heads
    )
    chosen = {
        "embed": measure.select_important(scores.embed, child.d_model),
        "mlp": measure.select_important(scores.mlp, child.d_ff),
        "heads": heads,
        "kv_heads": kv_heads,
    }
    sources = {}
    for axis, indices in chosen.items():
        so_far = growth.sources.get(axis)
        if so_far is not None:
            indices = np.take_along_axis(so_far, indices, axis=-1)
        sources[axis] = indices
    return growth._replace(child=child, sources=sources)


def make_width_growth(name: str, parent: Parent, sizes: Sizes) -> Growth:
    """Return the growth that repeats the whole width until the child's is full."""
    spec = parent.spec
    child = resize_spec(name, spec, sizes)
    for argument, field in SIZE_ARGUMENTS.items():
        before = getattr(spec, field)
        after = getattr(child, field)
        if after < before:
            raise UserError(
                f"{name}({argument}={after}): the model has {before} already. "
                "Give a larger number, or use narrow."
            )
    if child == spec:
        raise UserError(f"{name}: these are the model's sizes already. Give larger ones.")
    # [[W/2, W/2], [W/2, W/2]] in the paper; heads go with their kv groups
    sources = {}
    for axis in WIDTH_AXES:
        indices = np.arange(axis_size(child, axis))
        sources[axis] = indices % axis_size(spec, axis)
    sources = keep_changed_axes(spec, child, sources)
    return Growth(spec, child, sources, divide_copies=True)


def axis_size(spec: ModelSpec, axis: str) -> int:
    """Return the size of a logical axis of a width."""
    return getattr(spec, WIDTH_AXES[axis])


def keep_changed_axes(spec: ModelSpec, child: ModelSpec, sources: AxisSources) -> AxisSources:
    """Return the sources of the axes whose size changes."""
    changed = {}
    for axis, source in sources.items():
        if axis_size(spec, axis) != axis_size(child, axis):
            changed[axis] = source
    return changed


def resize_spec(name: str, spec: ModelSpec, sizes: Sizes) -> ModelSpec:
    """Return the spec with other widths.

    kv heads change with the query heads, so that a group keeps its size.
    """
    given = sizes._asdict()
    given = {key: value for key, value in given.items() if value is not None}
    if not given:
        raise UserError(
            f"{name}(): nothing to change. Give d (width, now {spec.d_model}), "
            f"ff ({spec.d_ff}) or heads ({spec.n_heads})."
        )
    for key, value in given.items():
        check_minimum(name, key, value, 1)
    n_heads = sizes.heads or spec.n_heads
    group = spec.n_heads // spec.n_kv_heads
    if n_heads % group:
        raise UserError(
            f"{name}(heads={n_heads}): expected a multiple of {group}, got {n_heads}: "
            f"{group} query heads share one kv head."
        )
    d_model = sizes.d or spec.d_model
    d_ff = sizes.ff or spec.d_ff
    n_kv_heads = n_heads // group
    return spec.replace(d_model=d_model, d_ff=d_ff, n_heads=n_heads, n_kv_heads=n_kv_heads)


# ---- experts


@operator
def upcycle(
    parent: Parent,
    experts: int | None = None,
    top_k: int | None = None,
    granularity: int = 1,
    expansion: int | None = None,
    shared: bool = False,
    drop: float = 0.0,
    aux: float = 0.01,
    z: float = 0.001,
) -> Growth:
    """Make each MLP a mixture of its copies, with a random router: exact. 2212.05055.

    granularity=G cuts the MLP into G experts first, and expansion=R copies each R times; a group of
    G is chosen together (2410.07524). shared=True keeps one of the G for every token. The copies
    learn apart as the router sends them other tokens; noise, or drop=r, which redraws a share of
    their channels (2502.19261), breaks the tie at once. aux and z weigh the router's losses.
    """
    spec = parent.spec
    call = f"upcycle(experts={experts}, granularity={granularity}, expansion={expansion})"
    if spec.n_experts:
        raise UserError(
            f"{call}: the model has {spec.n_experts} experts already. Use more_experts(m=2)."
        )
    check_upcycle(call, spec, experts, granularity, expansion, shared)
    if not isinstance(drop, (int, float)) or not 0 <= drop < 1:
        raise UserError(f"upcycle(drop={drop!r}): expected a share from 0 to below 1.")
    group = granularity - shared  # experts that are chosen together
    n_copies = expansion or experts
    assert n_copies is not None  # check_upcycle
    if top_k is None:
        top_k = min(2, n_copies) * group
    if granularity > 1 and top_k % group:
        raise UserError(
            f"upcycle(top_k={top_k}): expected a multiple of {group}, got {top_k}: "
            f"{group} experts make up one MLP."
        )
    d_ff = spec.d_ff // granularity
    base = spec.base_shape
    if base:  # the parts of an MLP are as wide in their base as they are here
        base = dataclasses.replace(base, d_ff=base.d_ff / granularity)
    child = spec.replace(
        d_ff=d_ff,
        base_shape=base,
        n_experts=n_copies * group,
        n_experts_per_token=top_k,
        norm_topk_prob=True,  # equal outputs then sum to one of them, whatever the router says
        router_aux_loss_coef=aux,
        router_z_loss_coef=z,
    )
    if shared:
        child = child.replace(
            d_shared=d_ff, router="sigmoid", router_bias_rate=0.001, router_aux_loss_coef=0.0
        )
    child = child.replace(family=find_mixture_family(call, child))
    # the shared expert is the first part
    sources = {"experts": np.tile(np.arange(granularity - group, granularity), n_copies)}
    return Growth(
        spec,
        child,
        sources,
        n_shards=granularity,
        drop_frac=float(drop),
        preserves_function=not drop,
    )


def check_upcycle(
    call: str,
    spec: ModelSpec,
    experts: int | None,
    granularity: int,
    expansion: int | None,
    shared: bool,
) -> None:
    """Raise UserError unless these arguments of `upcycle` say how many experts there will be."""
    check_minimum("upcycle", "granularity", granularity, 1)
    if (experts is None) == (expansion is None):
        raise UserError(
            f"{call}: expected experts, or granularity and expansion. Give one of them."
        )
    if expansion is None:
        check_minimum("upcycle", "experts", experts, 2)
        if granularity > 1:
            raise UserError(f"{call}: expected expansion with granularity, got none.")
    else:
        check_minimum("upcycle", "expansion", expansion, 1)
    if spec.d_ff % granularity:
        raise UserError(
            f"{call}: {spec.d_ff} feed-forward channels cannot be cut into {granularity} equal "
            f"parts. Use a divisor of {spec.d_ff}."
        )
    if shared and granularity < 2:
        raise UserError(
            f"{call}: shared=True keeps one of the parts for every token. "
            "Give a granularity of at least 2."
        )
    if expansion and expansion * (granularity - shared) < 2:
        raise UserError(f"{call}: expected at least 2 experts, got 1. Give a larger expansion.")


def find_mixture_family(call: str, child: ModelSpec) -> str:
    """Return the first family whose config.json can state a mixture."""
    for name in family.list_families():
        if family.can_state(child.replace(family=name)):
            return name
    raise UserError(
        f"{call}: no known family of mixtures has all that this {child.family} model has, such as "
        "biases, so it could not be exported. Take another parent."
    )


@operator
def more_experts(parent: Parent, m: int, top_k: int | None = None) -> Growth:
    """Repeat all experts m times; exact if top_k grows m times as well. 2604.19835.

    With the parent's top_k, copies of one expert take the places of others: not exact.
    """
    spec = parent.spec
    if not spec.n_experts:
        raise UserError(f"more_experts(m={m}): the model has no experts. Use upcycle first.")
    check_minimum("more_experts", "m", m, 2)
    if top_k is None:
        top_k = spec.n_experts_per_token
    child = spec.replace(n_experts=m * spec.n_experts, n_experts_per_token=top_k)
    sources = {"experts": np.tile(np.arange(spec.n_experts), m)}
    # all copies of an expert are then chosen together, each with 1/m of its weight
    divides = spec.norm_topk_prob or spec.router == "softmax"
    is_exact = divides and top_k == m * spec.n_experts_per_token
    return Growth(spec, child, sources, preserves_function=is_exact)


# ---- the context


@operator
def extend_context(
    parent: Parent, length: int, theta: float | None = None, yarn: float | None = None
) -> Growth:
    """Support sequences of `length`, by a larger rope theta or by YaRN (2309.00071): no new weight.

    theta slows all rotations down (2309.16039 takes 500,000 for 32,768 tokens). yarn is the factor
    by which the slow ones are stretched, at least length / max_seq_len.
    """
    spec, call = parent.spec, f"extend_context(length={length}, theta={theta}, yarn={yarn})"
    check_minimum("extend_context", "length", length, spec.max_seq_len + 1)
    if (theta is None) == (yarn is None):
        raise UserError(f"{call}: expected theta or yarn. Give one of them.")
    if yarn is None:
        theta = check_above(call, "theta", theta, spec.rope_theta, "the model's")
        return Growth(spec, spec.replace(max_seq_len=length, rope_theta=theta), {})
    yarn = check_above(call, "yarn", yarn, 1, "no stretching")
    if spec.rope_scaling:
        raise UserError(
            f"{call}: expected a model without rope scaling, got {spec.rope_scaling.rope_type}, "
            "which yarn would replace. Use theta."
        )
    if length > yarn * spec.max_seq_len:
        raise UserError(
            f"{call}: stretches {spec.max_seq_len} tokens to {yarn * spec.max_seq_len:g} only. "
            f"Use yarn={length / spec.max_seq_len:g} or more."
        )
    scaling = RopeScaling("yarn", yarn, original_max_seq_len=spec.max_seq_len)
    return Growth(spec, spec.replace(max_seq_len=length, rope_scaling=scaling), {})


def check_above(call: str, argument: str, value: Any, bound: float, what: str) -> float:
    """Return an operator's argument. Raise UserError unless it is finite and above a bound."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not bound < value < float("inf"):
        raise UserError(f"{call}: expected {argument} above {bound:g}, {what}, got {value!r}.")
    return float(value)


# ---- the vocabulary


@operator
def new_tokenizer(parent: Parent, directory: str) -> Growth:
    """Switch the tokenizer: shared tokens are copied, new ones are the mean of their old tokens."""
    spec = parent.spec
    if parent.params is None:
        new = tokenizer.load_tokenizer(directory)
        n_rows = vocabulary.pad_vocab_size(new.vocab_size)
        child = spec.with_tokens(new.special_tokens).replace(vocab_size=n_rows)
        return Growth(spec, child, {})
    if parent.tokenizer_dir is None:
        raise UserError(
            "new_tokenizer: the parent's tokenizer is not known, so no token can be traced to it. "
            "Start from a model that has its own tokenizer."
        )
    old_dir, new_dir = parent.tokenizer_dir, io.local_copy(io.path(directory))
    mapping, special_tokens = vocabulary.map_tokens(old_dir, new_dir, spec.vocab_size)
    kept = []
    n_averaged = 0
    for ids in mapping.old_ids:
        kept.append(ids[0] if len(ids) == 1 else NO_SOURCE)
        n_averaged += len(ids) > 1
    n_kept = len(kept) - kept.count(NO_SOURCE)
    measured: dict[str, Measured] = {"kept_tokens": n_kept, "averaged_tokens": n_averaged}
    child = spec.with_tokens(special_tokens).replace(vocab_size=len(kept))
    sources = {"vocab": np.asarray(kept)}
    return Growth(spec, child, sources, token_mapping=mapping, measured=measured)


# ---- checks of an operator's arguments


def require_batches(name: str, parent: Parent) -> Iterable[Batch]:
    """Return training batches. Raise UserError if there are none."""
    if parent.batches is None:
        raise UserError(
            f"{name}: measures the model on training sequences, but there are none. "
            "Give a --config whose mixture.packed_paths names some."
        )
    return parent.batches()


def check_layer_list(call: str, listed: Sequence[int], n_layers: int) -> None:
    """Raise UserError unless `listed` is a list of one or more layers of the model."""
    wrong: str | None = None
    if not isinstance(listed, (list, tuple)):
        wrong = repr(listed)
    elif not listed:
        wrong = "an empty list"
    else:
        for layer in listed:
            if not isinstance(layer, int) or not 0 <= layer < n_layers:
                wrong = wrong or repr(layer)
    if wrong:
        raise UserError(f"{call}: expected layers 0 to {n_layers - 1}, got {wrong}.")


def check_minimum(name: str, argument: str, value: Any, minimum: int) -> None:
    """Raise UserError unless an operator's argument is an integer of at least `minimum`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise UserError(
            f"{name}({argument}={value!r}): expected an integer of at least {minimum}, "
            f"got {value!r}."
        )
