"""Estimate a step's time from what matmuls, memory and links would each take at full speed."""

from __future__ import annotations

from typing import NamedTuple

from jaxpt.config import TrainConfig
from jaxpt.plan import hlo
from jaxpt.plan.hardware import Target
from jaxpt.plan.records import StepAnalysis


class Roofline(NamedTuple):
    """Seconds per step: of each part alone at full speed, and the range that is expected."""

    compute_seconds: float
    memory_seconds: float
    network_seconds: float
    fast_seconds: float  # matmuls at high efficiency, transfers overlapped with them
    slow_seconds: float  # matmuls at low efficiency, no transfer overlapped

    @property
    def expected_seconds(self) -> float:
        """The middle of the range."""
        return (self.fast_seconds + self.slow_seconds) / 2


def compute_roofline(analysis: StepAnalysis, target: Target, train: TrainConfig) -> Roofline:
    """Return the time of a step from its executed matmuls and the bytes that it moves.

    The fast end moves the sharded weights, activations and sequences only; the slow end moves what
    the compiled program's layers move, where that is known to be more.
    """
    chip = target.chip
    peak_flops = target.n_devices * chip.peak_flops(train.compute_dtype)
    compute = analysis.executed_flops / peak_flops
    memory = analysis.memory_traffic_bytes / chip.memory_bandwidth
    network = analysis.comm_bytes / target.receive_bandwidth

    layer_bytes = sum(map(hlo.count_received_bytes, analysis.layer_collectives))
    n_turns = analysis.n_layers * train.grad_accum_steps
    compiled_network = layer_bytes * n_turns / target.receive_bandwidth

    slow_compute = compute / chip.efficiency.low
    fast_compute = compute / chip.efficiency.high
    return Roofline(
        compute,
        memory,
        network,
        fast_seconds=max(fast_compute, memory, network),
        slow_seconds=max(slow_compute, memory) + max(network, compiled_network),
    )
