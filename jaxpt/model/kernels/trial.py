"""Choose a platform's kernel where it supports a run and was tried against the plain form.

The kernels are others', and no test here can run them on their hardware: each is run once on the
device, forward and backward, before a run relies on it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxpt.spec import UserError

MAX_RELATIVE_DIFFERENCE = 0.05  # bfloat16 stays below a tenth of it, a wrong row or leak above
HARDWARE = {"tpu": "TPU", "gpu": "NVIDIA GPU"}


class KernelKnob(NamedTuple):
    """A knob that names a kernel, or "auto".

    Attributes:
        name: such as "train.attention".
        plain: the form that runs everywhere.
        by_platform: platform -> its kernel.
    """

    name: str
    plain: str
    by_platform: dict[str, str]


def choose_kernel(
    knob: KernelKnob, requested: str, device: Any, find_reason: Callable[[str], str | None]
) -> tuple[str, str]:
    """Return (kernel, reason) that a knob resolves to.

    Args:
        knob: what there is.
        requested: its value.
        device: one of the run's jax.Devices.
        find_reason: returns why a kernel cannot be used; None if it can.

    Raises:
        UserError: a kernel requested by name cannot be used.
    """
    kernel = knob.by_platform.get(device.platform)
    kind = device.device_kind
    if requested == knob.plain:
        return knob.plain, f"{knob.name} = {knob.plain}"
    if requested not in ("auto", kernel):
        (platform,) = (p for p, name in knob.by_platform.items() if name == requested)
        raise UserError(
            f"{knob.name}: {requested} runs on {HARDWARE[platform]}, but this is {kind}. Use auto."
        )
    if kernel is None:
        return knob.plain, f"the default on {kind}"
    reason = find_reason(kernel)
    if not reason:
        return kernel, f"the kernel for {kind}"
    if requested == "auto":
        return knob.plain, f"{kernel} does not support this run: {reason}; more memory traffic"
    raise UserError(
        f"{knob.name}: {requested} does not support this run: {reason}. Use auto or {knob.plain}, "
        "or change that."
    )


def can_run_on(device: Any) -> bool:
    """Return whether a device is here; one that is only compiled for is not."""
    return device in jax.devices()


def describe_difference(
    kernel: str, plain: str, run: Callable[[str], dict[str, Any]], device_kind: str
) -> str | None:
    """Return how a kernel's results differ from the plain form's; None if they agree.

    Args:
        kernel: its name.
        plain: that of the plain form.
        run: returns the arrays of either, by what they are.
        device_kind: where it runs.
    """
    results = []
    for form, what in ((kernel, "it fails"), (plain, f"{plain}, to compare it with, fails")):
        try:
            found = {name: np.asarray(x, np.float32) for name, x in run(form).items()}
        except Exception as error:
            lines = str(error).strip().splitlines() or [repr(error)]
            return f"{what} on {device_kind} ({lines[0][:200]})"
        results.append(found)
    by_kernel, by_plain = results
    for name, expected in by_plain.items():
        difference = np.abs(by_kernel[name] - expected).max()  # XLA's max on a CPU ignores NaN
        difference /= np.abs(expected).max()
        if not difference < MAX_RELATIVE_DIFFERENCE:
            size = f"{difference:.2g} x the largest entry"
            return f"its {name} on {device_kind} differs from {plain}'s by {size}"
    return None
