"""How long a step takes: what products, memory and links would take alone at full speed, and what is expected of them together."""

from __future__ import annotations

from typing import Any, NamedTuple

from jaxpt.config import Config
from jaxpt.plan import hardware, hlo


class Roofline(NamedTuple):
    """Seconds of a step: what each part would take alone at full speed, and the ends of what is expected."""

    compute_seconds: float
    memory_seconds: float
    network_seconds: float
    fast_seconds: (
        float  # products at the high efficiency, the rest hidden behind them where it is less
    )
    slow_seconds: float  # products at the low one, and no transfer hidden behind them

    @property
    def expected_seconds(self) -> float:
        return (self.fast_seconds + self.slow_seconds) / 2


def compute_roofline(
    measured: dict[str, Any], target: hardware.Target, settings: Config
) -> Roofline:
    """Compute from the products that are executed, memory and network from the bytes that move. The fast end moves the cut weights
    only; the slow end what the compiled program's layers move, where that is known to be more.
    """
    chip, n = target.chip, target.n_devices
    (low, high), _ = chip.efficiency
    compute = measured["executed_flops"] / (n * getattr(chip, settings.train.compute_dtype))
    memory = measured["traffic_bytes"] / chip.memory_bandwidth
    network = measured["moved_bytes"] / target.receive_bandwidth
    in_layers = (
        sum(map(hlo.count_received_bytes, measured["layers"]))
        * measured["n_layers"]
        * settings.train.grad_accum_steps
    )
    found = max(network, in_layers / target.receive_bandwidth)
    return Roofline(
        compute,
        memory,
        network,
        fast_seconds=max(compute / high, memory, network),
        slow_seconds=max(compute / low, memory) + found,
    )
