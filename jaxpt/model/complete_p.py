"""CompleteP: rates and initial values of one depth and width, transferred to another.

The paper multiplies what a layer adds to the residual by 1 / depth and logits by 1 / width. Adam's
update does not depend on the size of a gradient, so a weight W with the multiplier c, initial std
s, rate r and epsilon e trains as cW with cs, cr and e / c. Here the multiplier is in the weight:
the forward pass, every export and growth that preserves the function stay as they are.

With depth and width as multiples of the base's, and `inputs` as that of what a matrix sums over:

| parameter                            | std            | rate       | epsilon             |
|--------------------------------------|----------------|------------|---------------------|
| embedding                            | 1              | 1          | 1 / width           |
| matrix of a layer                    | inputs ** -0.5 | 1 / inputs | 1 / (depth x width) |
| bias, norm of a layer                | 1              | 1          | 1 / (depth x width) |
| what writes into the residual, times | 1 / depth      | 1 / depth  | depth               |
| final norm                           | 1              | 1          | 1 / width           |
| head; if tied, the final norm        | 1 / width      | 1 / width  | 1                   |

The decay of a step is learning rate x weight decay, the base's.

Source: 2505.01618, table 1 with alpha = 1.
"""

from __future__ import annotations

import dataclasses
import math

from jaxpt.model.param import Init, ParamSpec, ParamSpecs, map_param_specs
from jaxpt.spec import ModelSpec


def transfer(spec: ModelSpec, specs: ParamSpecs) -> ParamSpecs:
    """Return the parameters with the initial values and ratios that follow from spec.base_shape."""
    base = spec.base_shape
    if base is None:
        return specs
    depth = max(spec.n_layers, 1) / base.n_layers
    width = spec.d_model / base.d_model
    mlp = spec.d_ff / base.d_ff
    sizes = {"embed": width, "mlp": mlp, "shared_mlp": mlp, "heads": spec.n_heads / base.n_heads}
    scaled_head = "norm" if spec.tie_embeddings else "unembed"

    def scale(path: tuple[str, ...], param: ParamSpec) -> ParamSpec:
        if param.is_adapter:
            return param
        is_head = path == (scaled_head,)
        multiplier = 1.0
        if param.writes_residual:
            multiplier = 1 / depth
        elif is_head:
            multiplier = 1 / width
        inputs = [sizes.get(param.axes[dim], 1.0) for dim in param.in_dims]
        is_router = param.is_layered and param.is_classifier
        grad_ratio = 1.0 if is_router else 1 / width
        if param.is_layered:
            grad_ratio /= depth
        return dataclasses.replace(
            param,
            init=scale_init(param, multiplier),
            in_ratio=1.0 if is_head else math.prod(inputs),
            multiplier=multiplier,
            grad_ratio=grad_ratio / multiplier,
        )

    return map_param_specs(scale, specs)


def scale_init(param: ParamSpec, multiplier: float) -> Init:
    """Return the initial values of a weight that holds its multiplier.

    The std of a matrix has the root of it already: of the residual's writers with depth, of the
    head with its inputs.
    """
    factor = multiplier**0.5 if param.n_in else multiplier
    mean = factor * (param.init.mean + param.offset) - param.offset
    return Init(mean, factor * param.init.std)
