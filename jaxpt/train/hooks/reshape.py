"""Change the shape of the batches as the run goes on."""

from __future__ import annotations

from jaxpt.train.hooks.hook import Hook
from jaxpt.train.session import Session


class Reshape(Hook):
    """Follows train.shape_schedule, after a growth before the same step."""

    def before_step(self, session: Session) -> None:
        """Read batches of the shape that the step has."""
        if session.batch_shape != session.shape:
            session.change_shape()

    def is_due(self, session: Session) -> bool:
        """Return whether the next step has another shape: this one is waited for."""
        return session.batch_shape != session.shape
