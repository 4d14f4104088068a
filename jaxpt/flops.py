"""Count the FLOPs of a model, and what they come to on a device: MFU and money.

A multiply and an add count as two FLOPs. Backward costs twice forward, so training costs three
forwards. What remat recomputes is not counted, because it is no progress (model FLOPs, as in PaLM,
2204.02311, appendix B). Axis letters as in jaxpt/spec.py.
"""

from __future__ import annotations

from typing import NamedTuple

import jax

from jaxpt import hardware
from jaxpt.config import PlanConfig
from jaxpt.model import transformer
from jaxpt.spec import ModelSpec


def count_flops_per_token(spec: ModelSpec, seq_len: int) -> float:
    """Return the FLOPs to train on one token of a sequence of seq_len.

    Frozen matrices have no gradient of their own: with adapters they cost two forwards, not three.
    """
    flops = 3 * count_forward_flops_per_token(spec, seq_len)
    if spec.lora:
        base = spec.replace(lora=None)
        flops -= 2 * count_matmul_params(base)
    return flops


def count_forward_flops_per_token(spec: ModelSpec, seq_len: int) -> float:
    """Return the FLOPs of one token's forward pass: 2 per matmul parameter, and attention.

    Each layer's scores and mixing take 4 N H per position seen. Causal attention sees half the
    sequence on average, so training takes 6 per parameter plus 12 L N H T / 2. Each sequence
    counts as one document, though kernels skip what lies between several: MFU then overstates how
    busy a device is.
    """
    matmul_flops = 2 * count_matmul_params(spec)
    return matmul_flops + count_attention_flops(spec, seq_len)


def count_attention_flops(spec: ModelSpec, seq_len: int) -> float:
    """Return the forward FLOPs per token of scores and mixing in all layers."""
    per_position = 4 * spec.n_heads * spec.d_head
    return spec.n_layers * per_position * compute_mean_context(spec, seq_len)


def compute_mean_context(spec: ModelSpec, seq_len: int) -> float:
    """Return how many positions a query sees in a sequence of one document, mean over layers."""
    contexts = []
    for kind in spec.layer_kinds:
        window = min(kind.window or seq_len, seq_len)
        contexts.append(window - window**2 / (2 * seq_len))
    return sum(contexts) / max(spec.n_layers, 1)


def count_matmul_params(spec: ModelSpec) -> int:
    """Return the matmul parameters that one token uses: layers and output head, no lookup."""
    head = spec.vocab_size * spec.d_model
    return spec.n_layers * count_layer_matmul_params(spec) + head


def count_layer_matmul_params(spec: ModelSpec) -> int:
    """Return the parameters of one layer's matrices that one token uses."""
    params = transformer.layer_params(spec).values()
    return sum(param.n_active for param in params if param.n_in)


# ---- on the devices of a run


class DeviceCost(NamedTuple):
    """What turns speed into MFU and money; None where the hardware is not in the table."""

    flops_per_token: float | None = None  # forward and backward, of frozen models forward
    peak_flops: float | None = None  # of one device, FLOP/s at the compute dtype
    usd_per_hour: float | None = None  # of one device

    def add_forward(self, spec: ModelSpec, seq_len: int) -> DeviceCost:
        """Return the cost with another model's forward pass in it."""
        if self.flops_per_token is None:
            return self
        forward = count_forward_flops_per_token(spec, seq_len)
        return self._replace(flops_per_token=self.flops_per_token + forward)

    def compute_mfu(self, flops_per_second: float | None, n_devices: int) -> float | None:
        """Return the model's FLOP/s as a fraction of what the devices can do."""
        if not self.peak_flops or not flops_per_second:
            return None
        return flops_per_second / (n_devices * self.peak_flops)

    def compute_usd(self, seconds: float, n_devices: int) -> float | None:
        """Return what the devices cost in this time, in dollars."""
        if not self.usd_per_hour:
            return None
        return seconds / 3600 * n_devices * self.usd_per_hour


def detect_device_cost(
    spec: ModelSpec, seq_len: int, compute_dtype: str, plan: PlanConfig
) -> DeviceCost:
    """Return what turns speed into MFU and money on the devices that JAX sees here."""
    device_kind = jax.devices()[0].device_kind
    chip = hardware.find_chip(device_kind)
    usd_per_hour = plan.usd_per_hour or None
    if usd_per_hour is None and chip and chip.platform != "cpu":
        usd_per_hour = chip.usd_per_hour
    flops_per_token = count_flops_per_token(spec, seq_len)
    peak_flops = hardware.get_peak_flops(device_kind, compute_dtype)
    return DeviceCost(flops_per_token, peak_flops, usd_per_hour)
