"""Grow a model: an operator says which parent layer, head or channel each of the child's copies.

An operator is written as text, 'depth_upscale(m=4)', so that it fits a command line, a config and a
manifest. It returns a `Growth`: for each logical axis that changes, the parent's index of every
index of the child. Weights and Adam's moments are then the same gathers, jitted onto the child's
shardings, layer by layer where a width changes: no device ever holds more than one whole layer's
matrix.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxpt.data import tokenizer
from jaxpt.model import transformer
from jaxpt.model.param import ParamSpec, map_param_specs, param_key, subtree_like
from jaxpt.sharding import with_logical_constraint
from jaxpt.spec import Batch, ModelSpec, UserError
from jaxpt.weights import measure, predict, vocabulary
from jaxpt.weights.measure import Params
from jaxpt.weights.records_growth import Measured

AxisSources = dict[str, np.ndarray]  # logical axis -> the parent's index of each of the child's
AxisScales = dict[str, np.ndarray]  # logical axis -> factor of each of the child's indices
AxisFlags = dict[str, np.ndarray]  # logical axis -> True where the child's index is new
Path = tuple[str, ...]

NO_SOURCE = -1  # in AxisSources: randomly initialized, or predicted


class Parent(NamedTuple):
    """What an operator may look at. Most look at the spec alone.

    Without parameters, operators that measure return a Growth that has the right sizes only.
    """

    spec: ModelSpec
    params: Params | None = None
    batches: Callable[[], Iterable[Batch]] | None = None  # training data, for those that measure
    tokenizer_dir: pathlib.Path | None = None


class Growth(NamedTuple):
    """What an operator makes of a parent.

    Attributes:
        spec: the parent's.
        child: the child's.
        sources: for the axes that change, NO_SOURCE where there is none. [n], or [L, n] where
            every layer has its own ("heads", "kv_heads" and "mlp" of `narrow`).
        zero_output_layers: the child's layers that write zeros into the residual: they start as
            identity.
        divide_copies: copied inputs are divided by their number of copies, so that sums keep
            their value.
        preserves_function: the child computes the same logits.
        predicted_gaps: i for each predicted layer that stands between the parent's i and i + 1,
            in the order of NO_SOURCE in sources["layers"].
        token_mapping: the new vocabulary as old ids.
        noise_std: standard deviation of the noise on new weights, in those of their initialization.
        seed: of noise and of randomly initialized layers.
        moments: the policy for Adam's moments that the operator needs, whatever the run's is.
        measured: what the operator measured, for the report.
    """

    spec: ModelSpec
    child: ModelSpec
    sources: AxisSources
    zero_output_layers: tuple[int, ...] = ()
    divide_copies: bool = False
    preserves_function: bool = False
    predicted_gaps: tuple[int, ...] = ()
    token_mapping: vocabulary.TokenMapping | None = None
    noise_std: float = 0.0
    seed: int = 0
    moments: str | None = None
    measured: dict[str, Measured] = {}

    @property
    def layer_map(self) -> list[int | None]:
        """The parent's layer of each of the child's; None: no source."""
        layer_map = []
        for source in self.sources.get("layers", range(self.spec.n_layers)):
            has_source = source != NO_SOURCE
            layer_map.append(int(source) if has_source else None)
        return layer_map

    @property
    def changes_width(self) -> bool:
        """Whether an axis other than the layers changes."""
        return bool(self.sources.keys() - {"layers"})


def format_layer_map(layer_map: Iterable[int | None]) -> str:
    """Return the sources of layers as text: "0 1 new 2"."""
    names = ["new" if layer is None else str(layer) for layer in layer_map]
    return " ".join(names)


# ---- depth: the layers of the child


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


def stack(parent: Parent, g: int = 2) -> Growth:
    """Repeat the whole stack g times. G_stack, 2405.15319."""
    check_minimum("stack", "g", g, 1)
    layer_map = [*range(parent.spec.n_layers)] * g
    return make_depth_growth(parent, layer_map)


def interleave(parent: Parent, g: int = 2) -> Growth:
    """Repeat each layer g times in place. Collapses untrained (iDUS: 29.5 on H6); a baseline."""
    check_minimum("interleave", "g", g, 1)
    parent_layers = np.arange(parent.spec.n_layers)
    layer_map = np.repeat(parent_layers, g)
    return make_depth_growth(parent, layer_map.tolist())


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


def layers(parent: Parent, sources: list[int]) -> Growth:
    """Take any list of source layers, such as the course's [0, 1, 2, 3, 4, 7, 8, 9, 10, 11]."""
    check_layer_list(f"layers({sources})", sources, parent.spec.n_layers)
    return make_depth_growth(parent, sources)


def drop_layers(parent: Parent, n: int | None = None, by: str | list[int] = "influence") -> Growth:
    """Drop the n layers that change the residual least, or a list of them. ShortGPT, 2403.03853."""
    n_layers = parent.spec.n_layers
    measured: dict[str, Measured] = {}
    if isinstance(by, str):
        influence = measure_influence(parent, n, by)
        rising = np.argsort(influence, kind="stable")
        by = sorted(rising[:n].tolist())
        measured = {"influence": influence.tolist(), "dropped": by}
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


def measure_influence(parent: Parent, n: int | None, by: str) -> np.ndarray:
    """Return the influence of each layer for `drop_layers`, zeros without parameters."""
    n_layers = parent.spec.n_layers
    if by != "influence":
        raise UserError(
            f"drop_layers(by={by!r}): expected 'influence' or a list of layers, got {by!r}."
        )
    if not isinstance(n, int) or not 1 <= n < n_layers:
        raise UserError(
            f"drop_layers(n={n}): expected 1 to {n_layers - 1}, the number of layers to drop, "
            f"got {n}."
        )
    if parent.params is None:
        return np.zeros(n_layers)
    batches = require_batches("drop_layers", parent)
    statistics = measure.measure_layers(parent.spec, parent.params, batches)
    return statistics.influence


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
SIZE_ARGUMENTS = {"d": "d_model", "ff": "d_ff", "heads": "n_heads"}


class Sizes(NamedTuple):
    """The arguments of a width operator; None: unchanged."""

    d: int | None
    ff: int | None
    heads: int | None


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
    growth = make_width_growth("widen", parent, Sizes(d, ff, heads))
    return growth._replace(preserves_function=True)


def widen_rms(
    parent: Parent, d: int | None = None, ff: int | None = None, heads: int | None = None
) -> Growth:
    """Widen to any width, RMS kept on average; new moments are reset and re-warm. 2602.02472."""
    # the reset and re-warmup of the new part tells the copies apart
    growth = make_width_growth("widen_rms", parent, Sizes(d, ff, heads))
    is_exact = growth.child.d_model % parent.spec.d_model == 0
    return growth._replace(preserves_function=is_exact, moments="reset_new")


def narrow(
    parent: Parent, ff: int | None = None, heads: int | None = None, d: int | None = None
) -> Growth:
    """Keep the most active channels, MLP activations and kv groups. Minitron, 2407.14679."""
    spec = parent.spec
    child = resize_spec("narrow", spec, Sizes(d, ff, heads))
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
    batches = require_batches("narrow", parent)
    scores = measure.measure_importance(spec, parent.params, batches)
    heads_kept, kv_heads_kept = measure.select_heads(
        scores.heads, spec.n_heads, spec.n_kv_heads, child.n_heads
    )
    channels = measure.select_important(scores.embed, child.d_model)
    activations = measure.select_important(scores.mlp, child.d_ff)
    sources = {"embed": channels, "mlp": activations}
    sources |= {"heads": heads_kept, "kv_heads": kv_heads_kept}
    sources = keep_changed_axes(spec, child, sources)
    measured: dict[str, Measured] = {}
    if d:
        measured["kept_channels"] = channels.tolist()
    return Growth(spec, child, sources, measured=measured)


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


# ---- the vocabulary


def new_tokenizer(parent: Parent, directory: str) -> Growth:
    """Switch the tokenizer: shared tokens are copied, new ones are the mean of their old tokens."""
    spec = parent.spec
    if parent.params is None:
        n_tokens = tokenizer.load_tokenizer(directory).vocab_size
        n_rows = vocabulary.pad_vocab_size(n_tokens)
        child = spec.replace(vocab_size=n_rows)
        return Growth(spec, child, {})
    if parent.tokenizer_dir is None:
        raise UserError(
            "new_tokenizer: the parent's tokenizer is not known, so no token can be traced to it. "
            "Start from a model that has its own tokenizer."
        )
    old_dir, new_dir = parent.tokenizer_dir, pathlib.Path(directory)
    mapping, special_ids = vocabulary.map_tokens(old_dir, new_dir, spec.vocab_size)
    kept = []
    n_averaged = 0
    for ids in mapping.old_ids:
        kept.append(ids[0] if len(ids) == 1 else NO_SOURCE)
        n_averaged += len(ids) > 1
    n_kept = len(kept) - kept.count(NO_SOURCE)
    measured: dict[str, Measured] = {"kept_tokens": n_kept, "averaged_tokens": n_averaged}
    child = spec.replace(vocab_size=len(kept), **special_ids)
    sources = {"vocab": np.asarray(kept)}
    return Growth(spec, child, sources, token_mapping=mapping, measured=measured)


DEPTH_OPERATORS = (depth_upscale, stack, interleave, stack_middle, deepen, insert_identity)
LAYER_OPERATORS = (layers, drop_layers, predict_layers)
OTHER_OPERATORS = (widen, widen_rms, narrow, new_tokenizer)
OPERATORS: dict[str, Callable[..., Growth]] = {}
for _operator in DEPTH_OPERATORS + LAYER_OPERATORS + OTHER_OPERATORS:
    OPERATORS[_operator.__name__] = _operator


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


# ---- from text to a growth


class OperatorCall(NamedTuple):
    """An operator with its arguments."""

    operator: Callable[..., Growth]
    positional: list[Any]
    named: dict[str, Any]  # without noise and seed, which every operator takes
    noise: Any
    seed: Any


def parse_operator(text: str) -> OperatorCall:
    """Parse 'depth_upscale(m=4)'. Nothing but literals is evaluated.

    Raises:
        UserError: the operator or an argument does not exist.
    """
    try:
        call = ast.parse(text.strip(), mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
            raise ValueError("not a call")
        name = call.func.id
        positional = [ast.literal_eval(argument) for argument in call.args]
        named = {}
        for keyword in call.keywords:
            named[keyword.arg or ""] = ast.literal_eval(keyword.value)
    except (SyntaxError, ValueError):
        raise UserError(
            f"grow {text!r}: expected an operator with its arguments, such as "
            f"'depth_upscale(m=4)'. Operators: {', '.join(OPERATORS)}."
        ) from None
    if name not in OPERATORS:
        hint = f"there are: {', '.join(OPERATORS)}."
        for near in difflib.get_close_matches(name, OPERATORS, 1):
            hint = f"did you mean {near}?"
        raise UserError(f"grow {text!r}: no such operator; {hint}")
    operator = OPERATORS[name]
    noise = named.pop("noise", 0.0)
    seed = named.pop("seed", 0)
    signature = inspect.signature(operator)
    try:
        signature.bind(None, *positional, **named)
    except TypeError:
        _, *own_arguments = signature.parameters
        arguments = ", ".join([*own_arguments, "noise", "seed"])
        raise UserError(
            f"grow {text!r}: {name} takes {arguments}. {inspect.getdoc(operator)}"
        ) from None
    return OperatorCall(operator, positional, named, noise, seed)


def plan_growth(text: str, parent: Parent) -> Growth:
    """Return what the operator makes of this parent. Raise UserError where it does not apply."""
    operator, positional, named, noise, seed = parse_operator(text)
    if not parent.spec.n_layers and operator not in (deepen, new_tokenizer):
        raise UserError(
            f"grow {text!r}: the model has no layers yet; only deepen(L=...) can add some."
        )
    growth = operator(parent, *positional, **named)
    if not isinstance(noise, (int, float)) or not 0 <= noise <= 1:
        raise UserError(
            f"grow {text!r}: expected noise from 0 to 1, in standard deviations of a weight's "
            f"initialization, got {noise!r}."
        )
    flags = find_new_params(growth)
    has_new = any(is_new.any() for is_new in flags.values())
    if noise and not growth.divide_copies and not has_new:
        raise UserError(
            f"grow {text!r}: makes no new weights that noise could be added to. Leave noise out."
        )
    return growth._replace(noise_std=float(noise), seed=seed)


# ---- parameters and moments of the child


def grow_params(growth: Growth, params: Params, mesh: Mesh) -> Params:
    """Return the child's parameters, on its shardings.

    Every weight that the operator does not touch is the parent's, the final norm included.
    """
    return compile_growth(growth, mesh)(params)


def compile_growth(growth: Growth, mesh: Mesh) -> Any:
    """Return the jitted map from the parent's parameters to the child's."""

    def make(params: Params) -> Params:
        predicted: Params = {}
        gaps = growth.predicted_gaps
        if gaps:
            predicted = predict.predict_layer_params(growth.spec, params["blocks"], gaps)

        def grow(path: Path, param: ParamSpec, leaf: jax.Array) -> jax.Array:
            mapping = growth.token_mapping
            if mapping and "vocab" in param.axes:
                axis = param.axes.index("vocab")
                return vocabulary.average_embeddings(leaf, mapping, axis)
            if path[-1] in predicted:
                leaf = jnp.concatenate([leaf, predicted[path[-1]]])
            scales = input_scales(growth, path, param)
            return LeafGrowth(growth, path, param).grow(leaf, scales)

        return map_child_params(growth.child, grow, params)

    shardings = transformer.make_param_shardings(growth.child, mesh)
    return jit_growth(growth, make, mesh, shardings)


def grow_moments(growth: Growth, tree: Params, policy: str, power: int, mesh: Mesh) -> Params:
    """Return Adam's moments of the child's gradients, from the parent's.

    What has no source (a random or predicted layer, an averaged embedding) starts at 0 under every
    policy.

    Args:
        growth: what became of the parent.
        tree: Adam's mean or mean square, or Muon's momentum; may hold some of the weights only.
        policy: what becomes of a moment:
            copy: it is copied.
            copy_scaled: it becomes what the gradient of a widened model truly is. The loss reaches
                an output that is copied c times through c copies of 1/c each, so its gradient is
                1/c of the parent's (power 2: 1/c^2). Depth has no such law: each copy of a layer
                sees its own input, and its moments are copied.
            reset_new: copied, 0 for whatever is new.
            fresh: 0.
        power: 1 for means, 2 for mean squares.
        mesh: of the tree.
    """
    is_scaled = policy == "copy_scaled" and growth.divide_copies
    flags = find_new_params(growth)

    def grow(path: Path, param: ParamSpec, leaf: jax.Array) -> jax.Array:
        if policy == "fresh":
            return jnp.zeros(param.shape, leaf.dtype)
        scales: AxisScales = {}
        if is_scaled:
            scales = output_scales(growth, path, param, power)
        leaf_growth = LeafGrowth(growth, path, param, is_moment=True)
        grown = leaf_growth.grow(leaf, scales)
        if policy != "reset_new":
            return grown
        is_new = new_param_mask(param, flags)
        if is_new is None:
            return grown
        is_kept = jnp.where(is_new, 0, 1)
        return grown * is_kept.astype(leaf.dtype)

    def make(tree: Params) -> Params:
        return map_child_params(growth.child, grow, tree)

    shardings = transformer.make_param_shardings(growth.child, mesh)
    shardings = subtree_like(tree, shardings)
    return jit_growth(growth, make, mesh, shardings)(tree)


def jit_growth(growth: Growth, make: Callable, mesh: Mesh, shardings: Params) -> Any:
    """Return `make` jitted onto the child's shardings."""

    def make_on_mesh(tree: Params) -> Params:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return make(tree)

    return jax.jit(make_on_mesh, out_shardings=shardings)


def map_child_params(child: ModelSpec, function: Callable, tree: Params) -> Params:
    """Return function(path, ParamSpec, leaf) for every parameter that the tree has."""
    specs = subtree_like(tree, transformer.param_specs(child))
    return map_param_specs(function, specs, tree)


def input_axis(growth: Growth, path: Path, param: ParamSpec) -> str | None:
    """Return the logical axis that a parameter sums over.

    Copies along it are divided by their number; along the others they are copied as they are.
    """
    # the final norm is scaled for a tied head: the embedding has to stay whole as an input
    if path == ("norm",) and growth.spec.tie_embeddings:
        return "embed"
    return param.axes[param.in_dims[0]] if param.in_dims else None


def input_scales(growth: Growth, path: Path, param: ParamSpec) -> AxisScales:
    """Return the factors that keep sums over copied inputs."""
    axis = input_axis(growth, path, param)
    if not growth.divide_copies or axis not in growth.sources:
        return {}
    n_copies = count_copies(growth.sources[axis])
    return {axis: 1 / n_copies}


def output_scales(growth: Growth, path: Path, param: ParamSpec, power: int) -> AxisScales:
    """Return the factors of a gradient along copied outputs."""
    excluded = {"layers", "vocab", input_axis(growth, path, param)}
    scales = {}
    for axis in map(source_axis, param.axes):
        if axis in growth.sources and axis not in excluded:
            n_copies = count_copies(growth.sources[axis])
            scales[axis] = n_copies ** -float(power)
    return scales


def count_copies(source: np.ndarray) -> np.ndarray:
    """Return how often each index's source occurs; float32, of the source's shape."""
    n_copies = np.bincount(source)
    return n_copies[source].astype(np.float32)


def source_axis(axis: str) -> str:
    """Return the axis whose sources a weight's axis follows: a norm's are the embedding's."""
    return "embed" if axis == "norm" else axis


class LeafGrowth:
    """Grow one weight, or a moment of it: gather along every axis that changes, and scale.

    Args:
        growth: what becomes of the model.
        path: of the weight, ("blocks", "q").
        param: the child's.
        is_moment: what has no source is 0; else it is randomly initialized, noise is added and
            output layers are zeroed.
    """

    def __init__(self, growth: Growth, path: Path, param: ParamSpec, is_moment: bool = False):
        """Plan the gathers."""
        self.growth = growth
        self.path = path
        self.param = param
        self.is_moment = is_moment
        self.is_stacked = param.is_layered
        self.axes = param.axes
        self.n_layers = 1
        if self.is_stacked:
            self.axes = param.axes[1:]
            self.n_layers = param.shape[0]
        layer_map = growth.sources.get("layers", np.arange(self.n_layers))
        is_missing = layer_map == NO_SOURCE
        if growth.predicted_gaps and not is_moment:
            # the predicted layers were appended to the parent's
            appended = growth.spec.n_layers + np.cumsum(is_missing) - 1
            layer_map = np.where(is_missing, appended, layer_map)
        self.layer_map = layer_map
        is_random = layer_map == NO_SOURCE
        self.has_missing = self.is_stacked and is_random.any()
        self.wide_axes = []
        for i, axis in enumerate(map(source_axis, self.axes)):
            if axis in growth.sources:
                self.wide_axes.append((i, axis))
        self.is_new = new_param_mask(param, find_new_params(growth))
        has_new = self.is_new is not None or growth.divide_copies
        takes_noise = growth.noise_std > 0 and param.init.std > 0
        self.has_noise = not is_moment and takes_noise and has_new
        has_zeros = bool(growth.zero_output_layers) and param.writes_residual
        self.zeroes_output = not is_moment and has_zeros
        self.key = param_key(growth.seed, path)

    def grow(self, leaf: jax.Array, scales: AxisScales) -> jax.Array:
        """Return the child's weight. Layers are made one at a time."""
        if self.is_stacked and not len(leaf):
            # a parent without layers: every layer is random, yet a gather needs one to point at
            leaf = jnp.zeros((1, *leaf.shape[1:]), leaf.dtype)
        changes = self.has_missing or self.has_noise or self.zeroes_output
        if not changes and not self.wide_axes:
            if self.is_stacked and "layers" in self.growth.sources:
                return jnp.take(leaf, self.layer_map, axis=0)
            return leaf

        def grow_layer(layer: Any) -> jax.Array:
            return self.grow_layer(leaf, layer, scales)

        if not self.is_stacked:
            return grow_layer(0)
        return jax.lax.map(grow_layer, jnp.arange(self.n_layers))

    def grow_layer(self, leaf: jax.Array, layer: Any, scales: AxisScales) -> jax.Array:
        """Return one layer of the child's weight."""
        source = jnp.asarray(self.layer_map)[layer]
        x = leaf
        if self.is_stacked:
            x = leaf[jnp.maximum(source, 0)]
        for i, axis in self.wide_axes:
            x = self.gather(x, i, axis, source, scales)
        key = jax.random.fold_in(self.key, layer)
        if self.has_missing:
            new = self.make_new(key, x)
            x = jnp.where(source == NO_SOURCE, new, x)
        if self.has_noise:
            noise_key = jax.random.fold_in(key, 1)
            noise = self.make_noise(noise_key, x.shape, layer)
            x = (x + noise).astype(x.dtype)
        if self.zeroes_output:
            is_kept = np.ones(self.n_layers, bool)
            is_kept[list(self.growth.zero_output_layers)] = False
            factor = jnp.asarray(is_kept).astype(x.dtype)
            x = x * factor[layer]
        return with_logical_constraint(x, *self.axes)

    def gather(self, x: jax.Array, i: int, axis: str, layer: Any, scales: AxisScales) -> jax.Array:
        """Return x with its dimension i taken from the axis's sources, and scaled there."""
        sources = self.growth.sources[axis]
        index = jnp.asarray(sources)
        if sources.ndim == 2:  # per layer: chosen, never copied
            chosen = jnp.maximum(index[layer], 0)
            return jnp.take(x, chosen, axis=i)
        x = jnp.take(x, jnp.maximum(index, 0), axis=i)
        scale = scales.get(axis, np.float32(1))
        factor = scale * (sources != NO_SOURCE)
        if (factor == 1).all():
            return x
        n_inner = x.ndim - i - 1
        factor = factor.reshape(-1, *[1] * n_inner)
        return x * factor.astype(x.dtype)

    def make_new(self, key: jax.Array, like: jax.Array) -> jax.Array:
        """Return what stands where there is no source: initial values, 0 for a moment."""
        if self.is_moment:
            return jnp.zeros_like(like)
        return self.param.init.draw(key, like.shape, like.dtype)

    def make_noise(self, key: jax.Array, shape: tuple[int, ...], layer: Any) -> jax.Array:
        """Return noise on what is new, or noise that cancels over copies."""
        growth = self.growth
        std = growth.noise_std * self.param.init.std
        noise = std * jax.random.normal(key, shape)
        if growth.divide_copies:
            return self.cancel_noise(noise)
        is_new = self.is_new
        assert is_new is not None  # has_noise
        if self.is_stacked:
            is_per_layer = len(is_new) > 1
            is_new = is_new[layer if is_per_layer else 0]
        return jnp.where(is_new, noise, 0)

    def cancel_noise(self, noise: jax.Array) -> jax.Array:
        """Return noise whose sum over the copies of each input is 0; all 0 if no input is copied.

        It tells the copies apart and keeps the function. Each copy takes its own draw less the
        next copy's; only gathers, so that every mesh gives the same bits.
        """
        axis = input_axis(self.growth, self.path, self.param)
        dims = [i for i, wide_axis in self.wide_axes if wide_axis == axis]
        if axis is None or not dims:
            return jnp.zeros_like(noise)
        sources = self.growth.sources[axis]
        next_copy = np.empty_like(sources)
        for index in range(sources.max() + 1):
            copies = np.flatnonzero(sources == index)
            next_copy[copies] = np.roll(copies, -1)
        next_noise = jnp.take(noise, next_copy, axis=dims[0])
        difference = noise - next_noise
        return difference * np.float32(0.5**0.5)


# ---- which parts of the child are new


def find_new_params(growth: Growth, before: AxisFlags | None = None) -> AxisFlags:
    """Return flags of the child's indices that have no source, or whose source occurred before.

    Args:
        growth: what became of the parent.
        before: flags of the parent, from an earlier operator of the same growth. An index made
            from a new one is new as well.
    """
    before = before or {}
    flags = {axis: old for axis, old in before.items() if axis not in growth.sources}
    for axis, source in growth.sources.items():
        if source.ndim == 2:  # chosen, not copied
            continue
        _, first_index = np.unique(source, return_index=True)
        is_new = np.ones(len(source), bool)
        is_new[first_index] = False
        is_new |= source == NO_SOURCE
        if axis in before:
            was_new = before[axis]
            is_new |= was_new[np.maximum(source, 0)]
        flags[axis] = is_new
    return flags


def find_new_params_through(growths: Iterable[Growth]) -> AxisFlags:
    """Return flags of what several operators in a row added."""
    flags: AxisFlags = {}
    for growth in growths:
        flags = find_new_params(growth, flags)
    return flags


def new_param_mask(param: ParamSpec, flags: AxisFlags) -> jax.Array | None:
    """Return True where an element is new along any axis; None if the weight has nothing new.

    Use it under jit, where the whole mask never exists.

    Returns:
        bool, of the weight's rank, 1 along axes without new parts.
    """
    mask = None
    for i, axis in enumerate(param.axes):
        is_new = flags.get(source_axis(axis))
        if is_new is None or not is_new.any():
            continue
        shape = [1] * len(param.axes)
        shape[i] = -1
        along_axis = jnp.asarray(is_new.reshape(shape))
        if mask is not None:
            along_axis = mask | along_axis
        mask = along_axis
    return mask
