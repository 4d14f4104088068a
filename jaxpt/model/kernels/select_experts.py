"""How a mixture's experts run: by the platform's grouped products where they support a run.

`scan` multiplies block after block on any device, `megablox` is for TPUs, `tokamax` for NVIDIA
GPUs. `choose_experts_kernel` returns which one a run takes, and why.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxpt.model.kernels.mixture import Activation, Experts, run_experts
from jaxpt.model.kernels.trial import KernelKnob, can_run_on, choose_kernel, describe_difference
from jaxpt.model.mlp import ACTIVATIONS
from jaxpt.sharding import n_shards
from jaxpt.spec import ModelSpec

KNOB = KernelKnob("train.experts", "scan", {"tpu": "megablox", "gpu": "tokamax"})
TRIAL_TOKENS = 384  # 192 rows of an expert on the mean, and of one none
TRIAL_EXPERTS = 4


def choose_experts_kernel(
    spec: ModelSpec, requested: str, dtype: str, mesh: jax.sharding.Mesh
) -> tuple[str, str]:
    """Return (kernel, reason) that train.experts resolves to for a mixture on a mesh.

    Raises:
        UserError: a kernel requested by name does not support the run.
    """
    device = mesh.devices.flat[0]

    def find_reason(kernel: str) -> str | None:
        reason = unsupported_reason(kernel, dtype, device)
        if reason or not can_run_on(device):
            return reason
        shape = TrialShape(
            n_experts=min(spec.n_experts // n_shards(mesh, "experts"), TRIAL_EXPERTS),
            d_model=spec.d_model,
            d_ff=spec.d_ff // n_shards(mesh, "mlp"),
            dtype=dtype,
            activation=spec.activation,
        )
        return check_against_scan(kernel, shape, mesh.local_devices[0])

    return choose_kernel(KNOB, requested, device, find_reason)


def unsupported_reason(kernel: str, dtype: str, device: Any) -> str | None:
    """Return why a kernel does not support a run, with what would help; None if it does."""
    if kernel != "tokamax":
        return None
    kind = device.device_kind
    if "NVIDIA" not in kind:
        return f"{kind} is not NVIDIA's"
    if float(device.compute_capability) < 8:
        return f"it needs Ampere or newer (8.0), and {kind} is {device.compute_capability}"
    if dtype != "bfloat16":
        return f"train.compute_dtype = {dtype} (bfloat16)"
    if importlib.util.find_spec("tokamax") is None:
        return "it is not installed (pip install -r requirements-gpu.txt)"
    return None


class TrialShape(NamedTuple):
    """What one device holds of a layer, but for the number of experts."""

    n_experts: int
    d_model: int
    d_ff: int
    dtype: str
    activation: str


@functools.lru_cache(maxsize=16)
def check_against_scan(kernel: str, shape: TrialShape, device: Any) -> str | None:
    """Return how a kernel's output or gradients differ from the scan's; None if they agree.

    Experts have most rows, few, and none; the last block is not full.
    """
    inputs = jax.device_put(make_check_inputs(shape), device)
    activate = ACTIVATIONS[shape.activation]

    def run(kernel: str) -> dict[str, Array]:
        return run_forward_and_backward(activate, kernel, inputs)

    return describe_difference(kernel, KNOB.plain, run, device.device_kind)


def make_check_inputs(shape: TrialShape) -> tuple[Any, ...]:
    """Return random tokens, their experts and weights, the experts, and the output's gradient."""
    E, D, F, dtype = shape.n_experts, shape.d_model, shape.d_ff, shape.dtype
    keys = iter(jax.random.split(jax.random.key(0), 6))

    def draw(*sizes: int) -> Array:
        return jax.random.normal(next(keys), sizes, dtype)

    matrices = draw(E, D, F) * D**-0.5, draw(E, D, F) * D**-0.5, draw(E, F, D) * F**-0.5
    experts = Experts(*(matrix.astype(dtype) for matrix in matrices))
    k = min(2, E)
    position = jnp.arange(TRIAL_TOKENS)
    first = jnp.where(position % 9 == 0, 0, E - 1)
    second = jnp.where(position % 31 == 0, E - 1 - first, E // 2)
    second = jnp.where(second == first, E - 1 - first, second)
    chosen = jnp.stack([first, second][:k], axis=-1)[None]
    weights = jax.random.uniform(next(keys), chosen.shape, minval=0.2)
    x = draw(1, TRIAL_TOKENS, D)
    return x, chosen, weights, experts, x[:, ::-1]


def run_forward_and_backward(
    activate: Activation, kernel: str, inputs: tuple[Any, ...]
) -> dict[str, Array]:
    """Return output and gradients for tokens, weights and experts."""

    @jax.jit
    def run(x: Array, chosen: Array, weights: Array, experts: Experts, d_out: Array) -> Any:
        def forward(x: Array, weights: Array, experts: Experts) -> Array:
            return run_experts(activate, kernel, x, chosen, weights, experts)

        out, pullback = jax.vjp(forward, x, weights, experts)
        return out, *pullback(d_out)

    out, d_x, d_weights, d_experts = run(*inputs)
    found = {"output": out, "gradient of x": d_x, "gradient of weights": d_weights}
    for name, gradient in d_experts._asdict().items():
        found[f"gradient of {name}"] = gradient
    return found
