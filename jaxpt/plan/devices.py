"""Describe the devices of a run to its metrics. Training imports this and none of the planner."""

from __future__ import annotations

import jax

from jaxpt.config import PlanConfig
from jaxpt.plan import flops, hardware
from jaxpt.spec import ModelSpec
from jaxpt.train.metrics import DeviceCost


def detect_device_cost(
    spec: ModelSpec, seq_len: int, compute_dtype: str, plan: PlanConfig
) -> DeviceCost:
    """Return what turns speed into MFU and money on the devices that JAX sees here."""
    device_kind = jax.devices()[0].device_kind
    chip = hardware.find_chip(device_kind)
    usd_per_hour = plan.usd_per_hour or None
    if usd_per_hour is None and chip and chip.platform != "cpu":
        usd_per_hour = chip.usd_per_hour
    flops_per_token = flops.count_flops_per_token(spec, seq_len)
    peak_flops = hardware.get_peak_flops(device_kind, compute_dtype)
    return DeviceCost(flops_per_token, peak_flops, usd_per_hour)
