"""Growth in depth: an operator is a map over stacked parameters, run under jit onto the child's shardings.

An operator is written as text, 'depth_upscale(m=4)', so that it fits a command line, a config and a manifest.
"""

from __future__ import annotations

import ast
import difflib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxpt.model import llama
from jaxpt.spec import ModelSpec, UserError


class Growth(NamedTuple):
    """What an operator does to a model of n layers."""

    layer_map: tuple[int, ...]  # child's layer i starts as parent's layer layer_map[i]
    silent: tuple[int, ...] = ()  # child's layers whose writes into the residual are zeroed: they begin as identity
    preserves_function: bool = False


# ---- the operators: n layers and settings -> Growth


def depth_upscale(n: int, m: int) -> Growth:
    """Layers 0..n-m-1, then m..n-1: 2 (n - m) layers. SOLAR, 2312.15166: n 32, m 8 -> 48."""
    if not 0 <= m < n:
        raise UserError(f"depth_upscale(m={m}): m is the number of layers left out of each copy of {n}, wanted 0 to {n - 1}.")
    return Growth((*range(n - m), *range(m, n)))


def stack(n: int, g: int = 2) -> Growth:
    """The whole stack g times. G_stack, 2405.15319."""
    return Growth(tuple(range(n)) * positive("stack", g=g), preserves_function=g == 1)


def interleave(n: int, g: int = 2) -> Growth:
    """Each layer g times in place. Collapses without training (iDUS: 29.5 on H6); for comparison."""
    return Growth(tuple(layer for layer in range(n) for _ in range(positive("interleave", g=g))), preserves_function=g == 1)


def insert_identity(n: int, every: int = 1) -> Growth:
    """After each group of `every` layers a copy of its last one that writes nothing yet: exact. LLaMA Pro, 2401.02415."""
    layer_map: list[int] = []
    silent: list[int] = []
    for layer in range(n):
        layer_map.append(layer)
        if (layer + 1) % positive("insert_identity", every=every) == 0:
            silent.append(len(layer_map))
            layer_map.append(layer)
    return Growth(tuple(layer_map), tuple(silent), preserves_function=True)


def layers(n: int, sources: list[int]) -> Growth:
    """Any explicit list of source layers: the course's down-scaling is layers([0, 1, 2, 3, 4, 7, 8, 9, 10, 11])."""
    wrong = [source for source in sources if not isinstance(source, int) or not 0 <= source < n]
    if wrong or not sources:
        raise UserError(f"layers({sources}): {wrong[0] if wrong else 'an empty list'} names no layer of a model of {n}. Use 0 to {n - 1}.")
    return Growth(tuple(sources), preserves_function=list(sources) == list(range(n)))


OPERATORS: dict[str, Callable[..., Growth]] = {
    operator.__name__: operator for operator in (depth_upscale, stack, interleave, insert_identity, layers)
}


# ---- using them


def grow(spec: ModelSpec, params: dict[str, Any], text: str, mesh) -> tuple[ModelSpec, dict[str, Any], Growth]:
    """The child's (spec, parameters, what was done). Every weight outside the blocks is the parent's, the final norm included.

    Raises UserError for an operator that does not exist or does not fit the model.
    """
    growth = parse(text, spec.n_layers)
    child = spec.replace(n_layers=len(growth.layer_map))
    source = np.asarray(growth.layer_map, np.int32)
    writes = np.ones(child.n_layers, np.float32)
    writes[list(growth.silent)] = 0

    def copy(params):
        blocks = {name: jnp.take(leaf, source, axis=0) for name, leaf in params["blocks"].items()}
        for name in ("o", "down", "o_bias", "down_bias"):  # what writes into the residual
            if growth.silent and name in blocks:
                leaf = blocks[name]
                blocks[name] = leaf * writes.reshape(-1, *[1] * (leaf.ndim - 1)).astype(leaf.dtype)
        return {**params, "blocks": blocks}

    return child, jax.jit(copy, out_shardings=llama.shardings(child, mesh))(params), growth


def parse(text: str, n_layers: int) -> Growth:
    """'depth_upscale(m=4)' for a model of n_layers, as a Growth."""
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
        raise UserError(f"grow {text!r}: no such operator; " + (f"did you mean {near[0]}?" if near else f"there are: {', '.join(OPERATORS)}."))
    try:
        return OPERATORS[name](n_layers, *positional, **named)
    except TypeError:
        says = OPERATORS[name].__doc__.splitlines()[0]
        settings = OPERATORS[name].__code__.co_varnames[1 : OPERATORS[name].__code__.co_argcount]
        raise UserError(f"grow {text!r}: {name} takes {', '.join(settings)}. {says}") from None


def positive(name: str, **setting: int) -> int:
    ((key, value),) = setting.items()
    if not isinstance(value, int) or value < 1:
        raise UserError(f"{name}({key}={value!r}): wanted a whole number of at least 1.")
    return value
