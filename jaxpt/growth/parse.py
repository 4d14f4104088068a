"""Parse an operator's text, and plan the growth of a parent by it."""

from __future__ import annotations

import ast
import difflib
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

from jaxpt.families import family
from jaxpt.growth.growth import Growth, Parent
from jaxpt.growth.new_params import find_new_params
from jaxpt.growth.operators import OPERATORS, deepen, new_tokenizer
from jaxpt.spec import ModelSpec, UserError


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
    check_exportable(text, parent.spec, growth.child)
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
    # noise leaves the function as it is where it cancels, or where new layers write zeros
    harmless = not noise or growth.divide_copies or bool(growth.zero_output_layers)
    keeps = growth.preserves_function and harmless
    return growth._replace(noise_std=float(noise), seed=seed, preserves_function=keeps)


def check_exportable(text: str, parent: ModelSpec, child: ModelSpec) -> None:
    """Raise UserError if the parent's family states the parent and cannot state the child.

    Gemma's embedding is multiplied by the root of its width, for one: a wider copy would need the
    parent's multiplier.
    """
    if not family.can_state(parent):
        return
    try:
        family.write_config(child, "float32")
    except UserError as error:
        raise UserError(f"grow {text!r}: the grown model could not be exported: {error}") from None
