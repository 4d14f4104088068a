"""Describe a parameter before it exists: all that is known of a weight, stated once.

Sharding, initialization, decay, Muon's dimensions, FLOPs, counts, growth and conversion are
derived from these descriptions. The axis letters are those of jaxpt/spec.py.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

# As leading axes these number parameters of one kind: a layer's, an expert's. In Hugging Face's
# files each has a tensor of its own.
STACKED_AXES = ("layers", "experts")
# Outputs along these axes are choices: such a matrix is a classifier, not a map of features.
CLASS_AXES = ("vocab", "scores", "switch")


class Init(NamedTuple):
    """Initial values: normal with this mean and standard deviation.

    The std is stated because initializers that infer it from the shape count the layer axis too
    (lecun_normal on (16, 256, 256) gives 0.0156 instead of 0.0626).
    """

    mean: float
    std: float

    def draw(self, key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
        """Return initial values, drawn in float32."""
        values = jnp.full(shape, self.mean)
        if self.std:
            values += self.std * jax.random.normal(key, shape)
        return values.astype(dtype)


ONES = Init(1.0, 0.0)
ZEROS = Init(0.0, 0.0)


def normal(std: float) -> Init:
    """Return normal initial values around 0."""
    return Init(0.0, std)


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """A parameter before it exists.

    Attributes:
        shape: of the array.
        axes: logical axis of each dimension, see sharding.LOGICAL_AXIS_RULES.
        init: initial values.
        hf_name: of the tensor in Hugging Face's files, with "{}" for each stacked axis: Llama's,
            or that of the family that brought the parameter in. Others state what differs.
        n_in: dimensions that a matmul sums over: the first ones, after the stacked axes. 0 for what
            is no matrix: a lookup table, a norm's scale, a bias.
        decays: whether weight decay applies.
        writes_residual: whether its output is added to the residual stream.
        active_frac: share of it that one token uses.
        is_state: whether the step moves it by a rule of its own: it has no gradient, and does not
            count as a parameter.
        offset: what is added to it where it is read: 1 for Gemma's norms.
        is_adapter: whether it is one of the two factors of a LoRA adapter.
        in_ratio: size of what it sums over, in that of the base shape (model/complete_p.py).
        multiplier: CompleteP's of the forward pass, which the weight holds.
        grad_ratio: typical size of its gradient, in that of the base shape.
    """

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    init: Init
    hf_name: str
    n_in: int = 0
    decays: bool = False
    writes_residual: bool = False
    active_frac: float = 1.0
    is_state: bool = False
    offset: float = 0.0
    is_adapter: bool = False
    in_ratio: float = 1.0
    multiplier: float = 1.0
    grad_ratio: float = 1.0

    @property
    def lr_ratio(self) -> float:
        """Its learning rate in that of the run, for optimizers of Adam's kind."""
        return self.multiplier / self.in_ratio

    @property
    def is_layered(self) -> bool:
        """Whether the first axis is the layer."""
        return self.axes[0] == "layers"

    @property
    def n_stacked(self) -> int:
        """Number of stacked axes."""
        stacked = itertools.takewhile(STACKED_AXES.__contains__, self.axes)
        return len(list(stacked))

    @property
    def in_dims(self) -> tuple[int, ...]:
        """The dimensions that a matmul sums over."""
        return tuple(range(self.n_stacked, self.n_stacked + self.n_in))

    @property
    def out_dims(self) -> tuple[int, ...]:
        """The dimensions that a matmul writes."""
        return tuple(range(self.n_stacked + self.n_in, len(self.shape)))

    @property
    def is_classifier(self) -> bool:
        """Whether it is a matrix whose outputs are scores of tokens or experts."""
        return self.n_in > 0 and self.axes[-1] in CLASS_AXES

    @property
    def size(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)

    @property
    def n_params(self) -> int:
        """Number of entries that count as parameters of the model."""
        return 0 if self.is_state else self.size

    @property
    def n_active(self) -> int:
        """Number of parameters that one token uses."""
        return round(self.n_params * self.active_frac)

    def stored_dtype(self, dtype: Any) -> Any:
        """Return its dtype in a model of this dtype: adapters are float32 on any base, as PEFT's.

        bfloat16 would round their small updates away.
        """
        return jnp.dtype(jnp.float32) if self.is_adapter else jnp.dtype(dtype)

    def stack(self, n_layers: int, hf_prefix: str) -> ParamSpec:
        """Return the parameter of all layers, given that of one."""
        return dataclasses.replace(
            self,
            shape=(n_layers, *self.shape),
            axes=("layers", *self.axes),
            hf_name=hf_prefix + self.hf_name,
        )


def matrix(
    shape: tuple[int, ...],
    axes: tuple[str, ...],
    std: float,
    hf_name: str,
    *,
    n_in: int = 1,
    writes_residual: bool = False,
    active_frac: float = 1.0,
) -> ParamSpec:
    """Return the weight of a linear map [...in, ...out]. It decays."""
    return ParamSpec(
        shape,
        axes,
        normal(std),
        f"{hf_name}.weight",
        n_in=n_in,
        decays=True,
        writes_residual=writes_residual,
        active_frac=active_frac,
    )


def bias(
    shape: tuple[int, ...], axes: tuple[str, ...], hf_name: str, *, writes_residual: bool = False
) -> ParamSpec:
    """Return a bias: zeros, no decay."""
    return ParamSpec(shape, axes, ZEROS, f"{hf_name}.bias", writes_residual=writes_residual)


def norm_scale(
    shape: tuple[int, ...],
    hf_name: str,
    axes: tuple[str, ...] = ("norm",),
    *,
    adds_one: bool = False,
) -> ParamSpec:
    """Return the scale of an RMSNorm: ones, or zeros that one is added to; no decay."""
    init = ZEROS if adds_one else ONES
    return ParamSpec(shape, axes, init, f"{hf_name}.weight", offset=float(adds_one))


# ---- nested dicts of ParamSpecs

ParamSpecs = dict[str, Any]


def is_param_spec(x: Any) -> bool:
    """Return whether a node of a tree is a ParamSpec."""
    return isinstance(x, ParamSpec)


def map_param_specs(function: Callable[..., Any], specs: ParamSpecs, *trees: Any) -> Any:
    """Return function(path, ParamSpec, leaves...) for every parameter, nested like `specs`.

    Args:
        function: the path is a tuple of names, ("blocks", "q").
        specs: nested dict.
        trees: of the same structure.
    """

    def call(key_path: tuple[Any, ...], param: ParamSpec, *leaves: Any) -> Any:
        path = tuple(entry.key for entry in key_path)
        return function(path, param, *leaves)

    return jax.tree_util.tree_map_with_path(call, specs, *trees, is_leaf=is_param_spec)


def list_param_specs(specs: ParamSpecs) -> list[tuple[tuple[str, ...], ParamSpec]]:
    """Return (path, ParamSpec) of every parameter."""
    found: list[tuple[tuple[str, ...], ParamSpec]] = []
    map_param_specs(lambda path, param: found.append((path, param)), specs)
    return found


def subtree_like(tree: Any, whole: ParamSpecs) -> ParamSpecs:
    """Return the part of a nested dict over all parameters that `tree` has too."""
    part = {}
    for name, inner in tree.items():
        part[name] = whole[name]
        if isinstance(inner, dict):
            part[name] = subtree_like(inner, whole[name])
    return part


def replace_subtree(whole: Any, part: Any) -> Any:
    """Return a nested dict over all parameters with those of `part` put in or replaced."""
    result = dict(whole)
    for name, inner in part.items():
        is_dict = isinstance(inner, dict)
        result[name] = replace_subtree(whole[name], inner) if is_dict else inner
    return result


def param_key(seed: int, path: tuple[str, ...]) -> jax.Array:
    """Return a parameter's own random key, whatever other parameters there are."""
    name_seed = zlib.crc32("/".join(path).encode())
    return jax.random.fold_in(jax.random.key(seed), name_seed)
