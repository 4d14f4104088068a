"""The optimizer: AdamW as an optax chain, decay by name, and the learning rate as a function of the step."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from jaxpt.config import Optim
from jaxpt.spec import UserError

# By name: "decay what has two dimensions" would decay stacked norm scales, which are [L, D].
DECAYED = frozenset({"q", "k", "v", "o", "gate", "up", "down", "unembed"})


def build(optim: Optim) -> optax.GradientTransformation:
    """Gradients -> update directions; the step multiplies them by -learning_rate(step).

    The learning rate stays outside so that it follows the run's step even when an update is skipped.
    """
    return optax.chain(
        optax.clip_by_global_norm(optim.clip_norm) if optim.clip_norm else optax.identity(),
        optax.scale_by_adam(b1=optim.b1, b2=optim.b2, eps=optim.eps),
        optax.add_decayed_weights(optim.weight_decay, mask=decayed) if optim.weight_decay else optax.identity(),
    )


def decayed(params):
    """True where a weight is a matrix that decays."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in DECAYED, params)


def learning_rate(optim: Optim, steps: int) -> Callable[[jax.Array], jax.Array]:
    """Learning rate of update number `step` (0 for the first).

    Warm-up rises linearly to peak_lr, which the update after it has. Then wsd stays and falls linearly over the last
    decay_frac of the steps (2405.18392), cosine and linear fall all the way, to peak_lr x end_lr_frac at the last step.
    Raises UserError when there is no room for the schedule.
    """
    warmup, end = optim.warmup_steps, optim.end_lr_frac
    if warmup >= steps:
        raise UserError(
            f"optim.warmup_steps: {warmup} steps of warm-up leave nothing of train.steps = {steps}. Use fewer, such as {max(steps // 20, 1)}."
        )
    first = {"wsd": steps - max(round(steps * optim.decay_frac), 1), "cosine": warmup, "linear": warmup, "constant": steps}[optim.schedule]
    first = max(first, warmup)

    def at(step):
        rise = jnp.minimum(step / max(warmup, 1), 1.0) if warmup else 1.0
        passed = jnp.clip((step - first) / max(steps - first, 1), 0.0, 1.0)
        fall = (1 + jnp.cos(jnp.pi * passed)) / 2 if optim.schedule == "cosine" else 1 - passed
        return optim.peak_lr * rise * (end + (1 - end) * fall)

    return at
