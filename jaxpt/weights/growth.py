"""Growth: an operator says where each layer, head, neuron and channel of the child comes from; one function makes it so.

An operator is written as text, 'depth_upscale(m=4)', so that it fits a command line, a config and a manifest. Its answer is
a `Growth`: for each logical axis that changes, the parent's index of every index of the child. Weights and Adam's moments
are then the same gathers, run under jit onto the child's shardings, layer by layer where a width changes: no device ever
holds more than one layer's matrix whole.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import pathlib
import zlib
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxpt.data import tokenizer
from jaxpt.model import llama
from jaxpt.sharding import with_logical_constraint
from jaxpt.spec import Batch, ModelSpec, UserError
from jaxpt.weights import measure, predict, vocabulary

NO_SOURCE = -1  # the source of what has no source: a layer born at random, or predicted


class Parent(NamedTuple):
    """What an operator may look at. Most look at the spec alone; without parameters those that measure answer with the sizes only."""

    spec: ModelSpec
    params: dict[str, Any] | None = None
    batches: Callable[[], Iterable[Batch]] | None = (
        None  # training rows for the operators that measure
    )
    tokenizer_dir: pathlib.Path | None = None


class Growth(NamedTuple):
    """What an operator makes of a parent.

    sources   {logical axis: the parent's index of each of the child's}, for the axes that change; NONE where there is no
              source. [n], or [L, n] where every layer has its own ("heads", "kv_heads" and "mlp" of `narrow`)
    silent    the child's layers whose writes into the residual are zeroed: they begin as identity
    divided   inputs that stand several times are divided by their number of copies: sums stay what they were
    gaps      i for each predicted layer that stands between the parent's i and i + 1, in the order of the NONEs of "layers"
    words     the new vocabulary as old ids, see vocabulary.mixed_rows
    noise     standard deviation of what is added to new weights, as a share of the one they would be born with
    moments   the policy for Adam's moments that belongs to the operator, whatever the run's own is
    measured  what the operator saw, for the report
    """

    spec: ModelSpec
    child: ModelSpec
    sources: dict[str, np.ndarray]
    zero_output_layers: tuple[int, ...] = ()
    divide_copies: bool = False
    preserves_function: bool = False
    predicted_gaps: tuple[int, ...] = ()
    token_mapping: vocabulary.TokenMapping | None = None
    noise_std: float = 0.0
    seed: int = 0
    moments: str | None = None
    measured: dict[str, Any] = {}  # noqa: RUF012  (never changed)

    @property
    def layer_map(self) -> list[int | None]:
        """The parent's layer that each of the child's began as; None for one without."""
        return [
            None if layer == NO_SOURCE else int(layer)
            for layer in self.sources.get("layers", range(self.spec.n_layers))
        ]

    @property
    def changes_width(self) -> bool:
        return bool(self.sources.keys() - {"layers"})


def format_layer_map(layer_map: Iterable[int | None]) -> str:
    """The sources of layers in words: "0 1 new 2"."""
    return " ".join("new" if layer is None else str(layer) for layer in layer_map)


# ---- depth: the layers of the child


def depth_upscale(parent: Parent, m: int) -> Growth:
    """Layers 0..n-m-1, then m..n-1: 2 (n - m) layers. SOLAR, 2312.15166: n 32, m 8 -> 48."""
    n = parent.spec.n_layers
    if not 0 <= m < n:
        raise UserError(
            f"depth_upscale(m={m}): m is the number of layers left out of each copy of {n}, wanted 0 to {n - 1}."
        )
    return make_depth_growth(parent, [*range(n - m), *range(m, n)])


def stack(parent: Parent, g: int = 2) -> Growth:
    """The whole stack g times. G_stack, 2405.15319."""
    return make_depth_growth(
        parent, [*range(parent.spec.n_layers)] * check_minimum("stack", 1, g=g)
    )


def interleave(parent: Parent, g: int = 2) -> Growth:
    """Each layer g times in place. Collapses without training (iDUS: 29.5 on H6); for comparison."""
    check_minimum("interleave", 1, g=g)
    return make_depth_growth(
        parent, [layer for layer in range(parent.spec.n_layers) for _ in range(g)]
    )


def stack_middle(parent: Parent, m: int) -> Growth:
    """The middle block of m layers twice: the added depth stands where it is used best. MIDAS, 2409.19044; 2512.08819."""
    n = parent.spec.n_layers
    if not 1 <= m <= n:
        raise UserError(
            f"stack_middle(m={m}): m is the size of the middle block, wanted 1 to {n}, the number of layers."
        )
    first = (n - m) // 2
    return make_depth_growth(parent, [*range(first + m), *range(first, n)])


def deepen(parent: Parent, L: int, new: str = "random") -> Growth:
    """Up to L layers in one late jump, from 0 if need be; the new ones at random (as at birth) or copies of the stack in order. 2511.04981."""
    n = parent.spec.n_layers
    if new not in ("random", "copy"):
        raise UserError(f"deepen(new={new!r}): wanted 'random' or 'copy'.")
    if check_minimum("deepen", 1, L=L) <= n:
        raise UserError(f"deepen(L={L}): the model has {n} layers already. Give a larger L.")
    if new == "copy" and not n:
        raise UserError(
            f"deepen(L={L}, new='copy'): the model has no layers to copy. Use new='random'."
        )
    return make_depth_growth(
        parent, [layer % n if new == "copy" or layer < n else NO_SOURCE for layer in range(L)]
    )


def insert_identity(parent: Parent, every: int = 1) -> Growth:
    """After each group of `every` layers a copy of its last one that writes nothing yet: exact. LLaMA Pro, 2401.02415."""
    check_minimum("insert_identity", 1, every=every)
    layer_map: list[int] = []
    silent: list[int] = []
    for layer in range(parent.spec.n_layers):
        layer_map.append(layer)
        if (layer + 1) % every == 0:
            silent.append(len(layer_map))
            layer_map.append(layer)
    return make_depth_growth(parent, layer_map)._replace(
        zero_output_layers=tuple(silent), preserves_function=True
    )


def layers(parent: Parent, sources: list[int]) -> Growth:
    """Any explicit list of source layers: the course's down-scaling is layers([0, 1, 2, 3, 4, 7, 8, 9, 10, 11])."""
    check_layer_list(f"layers({sources})", sources, parent.spec.n_layers)
    return make_depth_growth(parent, sources)


def drop_layers(parent: Parent, n: int | None = None, by: str | list[int] = "influence") -> Growth:
    """Without the n layers that change the residual least on the run's rows, or without those listed. ShortGPT, 2403.03853."""
    n_layers, measured = parent.spec.n_layers, {}
    if isinstance(by, str):
        if by != "influence":
            raise UserError(f"drop_layers(by={by!r}): wanted 'influence' or a list of layers.")
        if not isinstance(n, int) or not 1 <= n < n_layers:
            raise UserError(
                f"drop_layers(n={n}): wanted the number of layers to drop, 1 to {n_layers - 1}."
            )
        influence = np.zeros(n_layers)
        if parent.params is not None:
            influence = measure.measure_layers(
                parent.spec, parent.params, require_batches("drop_layers", parent)
            ).influence
        by = sorted(int(layer) for layer in np.argsort(influence, kind="stable")[:n])
        measured = {"influence": [float(x) for x in influence], "dropped": by}
    check_layer_list(f"drop_layers(by={by})", by, n_layers)
    if n not in (None, len(by)) or len(set(by)) == n_layers:
        raise UserError(
            f"drop_layers(n={n}, by={by}): wanted a list of n different layers, and at least one of the {n_layers} left."
        )
    return make_depth_growth(
        parent, [layer for layer in range(n_layers) if layer not in by]
    )._replace(measured=measured)


def predict_layers(parent: Parent, m: int) -> Growth:
    """M new layers in the upper half, each predicted from its two neighbours in a common SVD basis. LESA, 2502.13794."""
    n = parent.spec.n_layers
    if not 1 <= m < n or n < 3:
        raise UserError(
            f"predict_layers(m={m}): a layer is predicted between two neighbours; a model of {n} has room for 1 to {n - 1} from 3 layers on."
        )
    gaps = tuple(
        range(n - 1 - m, n - 1)
    )  # the last ones: the paper leaves the first half of the model alone
    layer_map = [
        source
        for layer in range(n)
        for source in ([layer, NO_SOURCE] if layer in gaps else [layer])
    ]
    return make_depth_growth(parent, layer_map)._replace(predicted_gaps=gaps)


# ---- width: the channels of every layer


def widen(
    parent: Parent, d: int | None = None, ff: int | None = None, heads: int | None = None
) -> Growth:
    """Wider by exact copies: an input that stands c times counts 1/c. d a multiple of the old; heads in whole groups. HyperCloning, 2409.12903."""
    spec = parent.spec
    if d is not None and (not isinstance(d, int) or d % spec.d_model):
        raise UserError(
            f"widen(d={d}): RMSNorm keeps its size only when every channel is copied equally often, wanted a multiple of {spec.d_model}. "
            "widen_rms takes any width."
        )
    return make_width_growth("widen", parent, d, ff, heads)._replace(preserves_function=True)


def widen_rms(
    parent: Parent, d: int | None = None, ff: int | None = None, heads: int | None = None
) -> Growth:
    """Copies to any width, RMS kept in the mean; moments of the new part alone are reset and it re-warms, which tells copies apart. 2602.02472."""
    grown = make_width_growth("widen_rms", parent, d, ff, heads)
    return grown._replace(
        preserves_function=grown.child.d_model % parent.spec.d_model == 0, moments="reset_new"
    )


def make_width_growth(
    name: str, parent: Parent, d: int | None, ff: int | None, heads: int | None
) -> Growth:
    child = resize_spec(name, parent.spec, d, ff, heads)
    for what, before, after in format_sizes(parent.spec, child):
        if after < before:
            raise UserError(
                f"{name}({what}={after}): the model has {before} already. Give a larger number, or use narrow."
            )
    if child == parent.spec:
        raise UserError(f"{name}: these are the model's sizes already. Give larger ones.")
    # the whole width again and again, [[W/2, W/2], [W/2, W/2]] in the paper; heads go with their kv groups
    sources = {
        axis: np.arange(axis_size(child, axis)) % axis_size(parent.spec, axis)
        for axis in WIDTH_AXES
    }
    return Growth(
        parent.spec, child, find_changed_axes(parent.spec, child, sources), divide_copies=True
    )


def narrow(
    parent: Parent, ff: int | None = None, heads: int | None = None, d: int | None = None
) -> Growth:
    """Keeps the channels, neurons and kv groups that are most active on the run's rows. Minitron, 2407.14679."""
    child = resize_spec("narrow", parent.spec, d, ff, heads)
    for what, before, after in format_sizes(parent.spec, child):
        if after > before:
            raise UserError(
                f"narrow({what}={after}): the model has {before} only. Give a smaller number, or use widen."
            )
    if parent.params is None:
        return Growth(parent.spec, child, {})
    scores = measure.measure_importance(
        parent.spec, parent.params, require_batches("narrow", parent)
    )
    kept_heads, kept_groups = measure.select_heads(
        scores["heads"], parent.spec.n_heads, parent.spec.n_kv_heads, child.n_heads
    )
    sources = {
        "embed": measure.select_important(scores["embed"], child.d_model),
        "mlp": measure.select_important(scores["mlp"], child.d_ff),
        "heads": kept_heads,
        "kv_heads": kept_groups,
    }
    measured = {"kept_channels": [int(i) for i in sources["embed"]]} if d else {}
    return Growth(
        parent.spec, child, find_changed_axes(parent.spec, child, sources), measured=measured
    )


WIDTH_AXES = {"embed": "d_model", "mlp": "d_ff", "heads": "n_heads", "kv_heads": "n_kv_heads"}


def axis_size(spec: ModelSpec, axis: str) -> int:
    return getattr(spec, WIDTH_AXES[axis])


def format_sizes(before: ModelSpec, after: ModelSpec) -> list[tuple[str, int, int]]:
    """(setting, before, after) of the widths that an operator can set."""
    return [
        (what, getattr(before, field), getattr(after, field))
        for what, field in (("d", "d_model"), ("ff", "d_ff"), ("heads", "n_heads"))
    ]


def find_changed_axes(
    before: ModelSpec, after: ModelSpec, sources: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    return {
        axis: source
        for axis, source in sources.items()
        if axis_size(before, axis) != axis_size(after, axis)
    }


def resize_spec(
    name: str, spec: ModelSpec, d: int | None, ff: int | None, heads: int | None
) -> ModelSpec:
    """The spec with other widths; kv heads change with the query heads, so that a group keeps its size."""
    if d is ff is heads is None:
        raise UserError(
            f"{name}(): nothing to change. Give d (width, now {spec.d_model}), ff ({spec.d_ff}) or heads ({spec.n_heads})."
        )
    for key, value in (("d", d), ("ff", ff), ("heads", heads)):
        if value is not None:
            check_minimum(name, 1, **{key: value})
    group = spec.n_heads // spec.n_kv_heads
    if heads is not None and heads % group:
        raise UserError(
            f"{name}(heads={heads}): {group} query heads share one kv head, wanted a multiple of {group}."
        )
    n_heads = heads or spec.n_heads
    return spec.replace(
        d_model=d or spec.d_model,
        d_ff=ff or spec.d_ff,
        n_heads=n_heads,
        n_kv_heads=n_heads // group,
    )


# ---- the vocabulary


def new_tokenizer(parent: Parent, directory: str) -> Growth:
    """The embedding and head of another tokenizer: kept pieces are copied, new ones start as the mean of their old pieces."""
    if parent.params is None:
        return Growth(
            parent.spec,
            parent.spec.replace(
                vocab_size=vocabulary.pad_vocab_size(tokenizer.load_tokenizer(directory).vocab_size)
            ),
            {},
        )
    if parent.tokenizer_dir is None:
        raise UserError(
            "new_tokenizer: the parent's tokenizer is not known, so no piece can be traced to it. Start from a model that carries its own."
        )
    words, document_ids = vocabulary.map_tokens(
        parent.tokenizer_dir, pathlib.Path(directory), parent.spec.vocab_size
    )
    kept = [ids[0] if len(ids) == 1 else NO_SOURCE for ids in words.old_ids]
    measured = {
        "kept_pieces": len(kept) - kept.count(NO_SOURCE),
        "averaged_pieces": sum(len(ids) > 1 for ids in words.old_ids),
    }
    child = parent.spec.replace(vocab_size=len(kept), **document_ids)
    return Growth(
        parent.spec, child, {"vocab": np.asarray(kept)}, token_mapping=words, measured=measured
    )


OPERATORS: dict[str, Callable[..., Growth]] = {
    operator.__name__: operator
    for operator in (
        depth_upscale, stack, interleave, stack_middle, deepen, insert_identity, layers, drop_layers, predict_layers, widen, widen_rms, narrow,
        new_tokenizer,
    )
}  # fmt: skip


def make_depth_growth(parent: Parent, layer_map: list[int]) -> Growth:
    child = parent.spec.replace(n_layers=len(layer_map))
    return Growth(
        parent.spec,
        child,
        {"layers": np.asarray(layer_map)},
        preserves_function=layer_map == [*range(parent.spec.n_layers)],
    )


def require_batches(name: str, parent: Parent) -> Iterable[Batch]:
    if parent.batches is None:
        raise UserError(
            f"{name}: measures the model on training rows, but there are none. Give a --config whose mixture.packed_paths names some."
        )
    return parent.batches()


def check_layer_list(call: str, listed: list[int], n: int) -> None:
    wrong = (
        [layer for layer in listed if not isinstance(layer, int) or not 0 <= layer < n]
        if isinstance(listed, (list, tuple))
        else [listed]
    )
    if wrong or not listed:
        raise UserError(
            f"{call}: {wrong[0] if wrong else 'an empty list'} names no layer of a model of {n}. Use 0 to {n - 1}."
        )


def check_minimum(name: str, least: int, **setting: Any) -> int:
    ((key, value),) = setting.items()
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise UserError(f"{name}({key}={value!r}): wanted a whole number of at least {least}.")
    return value


# ---- using them


def parse_operator(text: str) -> tuple[Callable[..., Growth], list[Any], dict[str, Any]]:
    """'depth_upscale(m=4)' as (operator, its settings by place, by name); nothing but literals is read.

    Raises UserError for an operator or setting that does not exist.
    """
    try:
        call = ast.parse(text.strip(), mode="eval").body
        name = call.func.id
        positional = [ast.literal_eval(argument) for argument in call.args]
        named = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (SyntaxError, AttributeError, ValueError):
        raise UserError(
            f"grow {text!r}: wanted an operator with its settings, such as 'depth_upscale(m=4)'. There are: {', '.join(OPERATORS)}."
        ) from None
    if name not in OPERATORS:
        near = difflib.get_close_matches(name, OPERATORS, 1)
        raise UserError(
            f"grow {text!r}: no such operator; "
            + (f"did you mean {near[0]}?" if near else f"there are: {', '.join(OPERATORS)}.")
        )
    operator = OPERATORS[name]
    settings = {key: value for key, value in named.items() if key not in ("noise", "seed")}
    try:
        inspect.signature(operator).bind(None, *positional, **settings)
    except TypeError:
        takes = [*inspect.signature(operator).parameters][1:]
        raise UserError(
            f"grow {text!r}: {name} takes {', '.join([*takes, 'noise', 'seed'])}. {operator.__doc__}"
        ) from None
    return operator, positional, named


def plan_growth(text: str, parent: Parent) -> Growth:
    """What the operator makes of this parent. Raises UserError where it does not fit."""
    operator, positional, named = parse_operator(text)
    if not parent.spec.n_layers and operator not in (deepen, new_tokenizer):
        raise UserError(
            f"grow {text!r}: the model has no layers yet, which only deepen(L=...) can give it."
        )
    noise, seed = named.pop("noise", 0.0), named.pop("seed", 0)
    growth = operator(parent, *positional, **named)
    if not isinstance(noise, (int, float)) or not 0 <= noise <= 1:
        raise UserError(
            f"grow {text!r}: noise is {noise!r}, wanted a share from 0 to 1 of the spread that a weight is born with."
        )
    if (
        noise
        and not growth.divide_copies
        and not any(flags.any() for flags in find_new_params(growth).values())
    ):
        raise UserError(
            f"grow {text!r}: makes no new weights that noise could be added to. Leave noise out."
        )
    return growth._replace(noise_std=float(noise), seed=seed)


def grow_params(growth: Growth, params: dict[str, Any], mesh) -> dict[str, Any]:
    """The child's parameters, on its shardings. Every weight that the operator does not touch is the parent's, the final norm included."""
    return compile_growth(growth, mesh)(params)


def compile_growth(growth: Growth, mesh):
    """The jitted map from the parent's parameters to the child's."""

    def make(params):
        predicted = (
            predict.predict_layer_params(params["blocks"], list(growth.predicted_gaps))
            if growth.predicted_gaps
            else {}
        )

        def one(path, row, leaf):
            name = path[-1].key
            if growth.token_mapping and "vocab" in row.axes:
                return vocabulary.average_embeddings(
                    leaf, growth.token_mapping, row.axes.index("vocab")
                )
            if name in predicted:
                leaf = jnp.concatenate([leaf, predicted[name]])
            return grow_leaf(growth, name, row, leaf, input_scale(growth, name))

        return map_param_specs(growth.child, one, params)

    return jit_growth(growth, make, mesh)


def grow_moments(
    growth: Growth, tree: dict[str, Any], policy: str, power: int, mesh
) -> dict[str, Any]:
    """Adam's mean (power 1; Muon's momentum too) or mean square (power 2) of the child's gradients, from the parent's, by policy:

    copy         as they lie
    copy_scaled  as the gradient of a widened model truly is: the loss reaches an output that stands c times through c copies
                 of 1/c each, so its gradient is 1/c of the parent's (power 2: 1/c^2). Depth has no such law: each copy of a
                 layer sees its own input, and is copied as it lies
    reset_new    as they lie, 0 for whatever is new
    fresh        0

    What has no source (a random, a predicted layer, an averaged row of the embedding) starts at 0 under every policy.
    """

    def make(tree):
        def one(path, row, leaf):
            name = path[-1].key
            if policy == "fresh":
                return jnp.zeros(row.shape, leaf.dtype)
            if (
                policy == "reset_new"
                and (new := new_param_mask(row, find_new_params(growth))) is not None
            ):
                keep = jnp.where(new, 0, 1).astype(leaf.dtype)
            else:
                keep = None
            scale = (
                output_scale(growth, name, row, power)
                if policy == "copy_scaled" and growth.divide_copies
                else {}
            )
            grown = grow_leaf(
                growth._replace(noise_std=0.0, zero_output_layers=()),
                name,
                row,
                leaf,
                scale,
                born=False,
            )
            return grown if keep is None else grown * keep

        return map_param_specs(growth.child, one, tree)

    return jit_growth(growth, make, mesh, of=tree)(tree)


def jit_growth(growth: Growth, make: Callable, mesh, of: dict[str, Any] | None = None):
    """of: a tree that holds some of the weights (a moment that not every weight has); None for all of them."""
    llama.make_abstract_model(
        growth.child
    )  # traced before a mesh is in force, which its eager initialisers would ask for

    def placed(tree):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return make(tree)

    shardings = llama.make_param_shardings(growth.child, mesh)
    return jax.jit(placed, out_shardings=shardings if of is None else get_subtree(of, shardings))


def map_param_specs(child: ModelSpec, one: Callable, tree: dict[str, Any]) -> dict[str, Any]:
    return jax.tree_util.tree_map_with_path(
        one, get_subtree(tree, llama.param_specs(child)), tree, is_leaf=llama.is_param_spec
    )


def get_subtree(tree: dict[str, Any], whole: dict[str, Any]) -> dict[str, Any]:
    """Of a nested dict over all weights the part that `tree` has too."""
    return {
        name: get_subtree(inner, whole[name]) if isinstance(inner, dict) else whole[name]
        for name, inner in tree.items()
    }


# The axis that a weight sums over. What stands several times there counts less; along its other axes it is copied as it is.
INPUT_AXES = {
    "q": "embed",
    "k": "embed",
    "v": "embed",
    "gate": "embed",
    "up": "embed",
    "unembed": "embed",
    "o": "heads",
    "down": "mlp",
}


def input_axis(growth: Growth, name: str) -> str | None:
    """The final norm stands for the head where that is the embedding itself, which has to stay whole as an input."""
    return "embed" if name == "norm" and growth.spec.tie_embeddings else INPUT_AXES.get(name)


def input_scale(growth: Growth, name: str) -> dict[str, np.ndarray]:
    axis = input_axis(growth, name)
    return (
        {axis: 1 / count_copies(growth.sources[axis])}
        if growth.divide_copies and axis in growth.sources
        else {}
    )


def output_scale(
    growth: Growth, name: str, row: llama.ParamSpec, power: int
) -> dict[str, np.ndarray]:
    axes = {parent_axis(axis) for axis in row.axes} & growth.sources.keys() - {
        "layers",
        "vocab",
        input_axis(growth, name),
    }
    return {axis: count_copies(growth.sources[axis]) ** -float(power) for axis in axes}


def count_copies(source: np.ndarray) -> np.ndarray:
    """How often each index's source stands, float32 like the source."""
    return np.bincount(source)[source].astype(np.float32)


def parent_axis(axis: str) -> str:
    return "embed" if axis == "norm" else axis


def grow_leaf(
    growth: Growth,
    name: str,
    row: llama.ParamSpec,
    leaf,
    scale: dict[str, np.ndarray],
    born: bool = True,
):
    """One weight (or moment) of the child from the parent's: gathered along every axis that changes and scaled there.

    born   what has no source is drawn as at birth (and silenced, and noise added); else it is 0
    """
    stacked = row.axes[0] == "layers"
    axes = row.axes[1:] if stacked else row.axes
    n_layers = row.shape[0] if stacked else 1
    if stacked and not len(
        leaf
    ):  # of a parent without layers: every layer is drawn, yet a gather needs one to point at
        leaf = jnp.zeros((1, *leaf.shape[1:]), leaf.dtype)
    layer_map = growth.sources.get("layers", np.arange(n_layers))
    if growth.predicted_gaps and born:  # the predicted layers stand behind the parent's
        layer_map = np.where(
            layer_map == NO_SOURCE,
            growth.spec.n_layers + np.cumsum(layer_map == NO_SOURCE) - 1,
            layer_map,
        )
    wide = [
        (i, parent_axis(axis))
        for i, axis in enumerate(axes)
        if parent_axis(axis) in growth.sources.keys() - {"layers"}
    ]
    new = new_param_mask(row, find_new_params(growth))
    noisy = (
        born and growth.noise_std > 0 and row.std > 0 and (new is not None or growth.divide_copies)
    )
    missing = stacked and (layer_map == NO_SOURCE).any()
    if not (wide or noisy or missing or (growth.zero_output_layers and name in OUTPUT_PARAMS)):
        return jnp.take(leaf, layer_map, axis=0) if stacked and "layers" in growth.sources else leaf
    key = jax.random.fold_in(jax.random.key(growth.seed), zlib.crc32(name.encode()))

    def one(layer):
        source = jnp.asarray(layer_map)[layer]
        x = leaf[jnp.maximum(source, 0)] if stacked else leaf
        for i, axis in wide:
            index = jnp.asarray(growth.sources[axis])
            x = jnp.take(x, jnp.maximum(index[source] if index.ndim == 2 else index, 0), axis=i)
            factor = scale.get(axis, np.float32(1)) * (growth.sources[axis] != NO_SOURCE)
            if index.ndim == 1 and (factor != 1).any():
                x = x * factor.reshape(-1, *[1] * (x.ndim - i - 1)).astype(x.dtype)
        own = jax.random.fold_in(key, layer)
        if missing:
            first = (
                jnp.ones(x.shape, x.dtype)
                if row.ones
                else (jax.random.normal(own, x.shape) * row.std).astype(x.dtype)
            )
            x = jnp.where(source == NO_SOURCE, first if born else jnp.zeros_like(x), x)
        if noisy:
            added = (
                growth.noise_std * row.std * jax.random.normal(jax.random.fold_in(own, 1), x.shape)
            )
            if growth.divide_copies:
                added = cancel_noise(added, growth, input_axis(growth, name), wide)
            else:
                added = jnp.where(
                    new[layer if new.shape[0] > 1 else 0] if stacked else new, added, 0
                )
            x = (x + added).astype(x.dtype)
        if growth.zero_output_layers and name in OUTPUT_PARAMS:
            x = (
                x
                * jnp.asarray(~np.isin(np.arange(n_layers), growth.zero_output_layers)).astype(
                    x.dtype
                )[layer]
            )
        return with_logical_constraint(x, *axes)

    return jax.lax.map(one, jnp.arange(n_layers)) if stacked else one(0)


OUTPUT_PARAMS = frozenset({"o", "down", "o_bias", "down_bias"})  # what writes into the residual


def cancel_noise(added, growth: Growth, axis: str | None, wide: list[tuple[int, str]]):
    """Noise whose sum over the copies of each input is 0: it tells the copies apart and keeps the function. 0 where no input is copied.

    Each copy takes its own draw less the next copy's; only gathers, so that every mesh gives the same bits.
    """
    place = next((i for i, known in wide if known == axis), None)
    if place is None:
        return jnp.zeros_like(added)
    source = growth.sources[axis]
    following = np.empty_like(source)
    for index in range(source.max() + 1):
        own = np.flatnonzero(source == index)
        following[own] = np.roll(own, -1)
    return (added - jnp.take(added, following, axis=place)) * np.float32(0.5**0.5)


# ---- ages: which parts of the child are new


def find_new_params(
    growth: Growth, before: dict[str, np.ndarray] | None = None
) -> dict[str, np.ndarray]:
    """{logical axis: True where the child's index is new}: it has no source, or its source stood before it. An index made
    from one that was new before (of an earlier operator of the same growth) is new as well.
    """
    flags = {}
    for axis in growth.sources.keys() | (before or {}).keys():
        source = growth.sources.get(axis)
        if source is None:
            flags[axis] = before[axis]
            continue
        if source.ndim == 2:  # chosen, not copied
            continue
        first = np.zeros(len(source), bool)
        first[np.unique(source, return_index=True)[1]] = True
        flags[axis] = ~first | (source == NO_SOURCE)
        if axis in (before or {}):
            flags[axis] |= np.where(source == NO_SOURCE, True, before[axis][np.maximum(source, 0)])
    return flags


def find_new_params_through(growths: Iterable[Growth]) -> dict[str, np.ndarray]:
    """What several operators in a row made new."""
    flags: dict[str, np.ndarray] = {}
    for growth in growths:
        flags = find_new_params(growth, flags)
    return flags


def new_param_mask(row: llama.ParamSpec, flags: dict[str, np.ndarray]) -> jax.Array | None:
    """True where an element of the weight is new along any of its axes: of the weight's rank, 1 along axes without new parts.
    None where nothing of it is. For use under jit, where the whole mask never exists.
    """
    found = None
    for i, axis in enumerate(row.axes):
        along = flags.get(parent_axis(axis))
        if along is not None and along.any():
            along = jnp.asarray(along.reshape([-1 if j == i else 1 for j in range(len(row.axes))]))
            found = along if found is None else found | along
    return found


def flags_to_ranges(flags: dict[str, np.ndarray]) -> dict[str, list]:
    """For JSON: {axis: [length, [start, stop], ...]}."""
    ranges = {}
    for axis, along in flags.items():
        edges = np.flatnonzero(np.diff(np.concatenate([[False], along, [False]]).astype(np.int8)))
        ranges[axis] = [len(along), *([int(a), int(b)] for a, b in edges.reshape(-1, 2))]
    return ranges


def ranges_to_flags(ranges: dict[str, list]) -> dict[str, np.ndarray]:
    flags = {}
    for axis, (length, *spans) in ranges.items():
        flags[axis] = np.zeros(length, bool)
        for start, stop in spans:
            flags[axis][start:stop] = True
    return flags
