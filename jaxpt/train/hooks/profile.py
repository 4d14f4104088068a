"""Record steps with the JAX profiler."""

from __future__ import annotations

import logging

import jax

from jaxpt.train.hooks.hook import Hook
from jaxpt.train.session import Session

log = logging.getLogger(__name__)


class Profile(Hook):
    """Records the steps of train.profile_steps into RUN/tensorboard."""

    def __init__(self, steps: tuple[int, ...]):
        """Record from the first to the last of the steps; none if there are none."""
        self.first, self.last = steps or (0, 0)

    def before_step(self, session: Session) -> None:
        """Start before the first step."""
        if session.step + 1 == self.first:
            jax.profiler.start_trace(str(session.run.run_dir / "tensorboard"))

    def is_due(self, session: Session) -> bool:
        """Return whether the last step was made."""
        return session.step == self.last

    def after_step(self, session: Session) -> None:
        """Stop once the devices are done."""
        jax.block_until_ready(session.state)
        jax.profiler.stop_trace()
        directory = session.run.run_dir / "tensorboard"
        log.info(f"profile of steps {self.first} to {self.last}: tensorboard --logdir {directory}")
