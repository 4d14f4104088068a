"""Measure the held-out losses of a run."""

from __future__ import annotations

from jaxpt.model.param import replace_subtree
from jaxpt.train.average import read_average
from jaxpt.train.hooks.hook import Hook
from jaxpt.train.session import Session


class Validate(Hook):
    """Measures every train.eval_every steps; session.heldout_losses has the result for a step."""

    def __init__(self, every: int):
        """Measure every so many steps; 0: after the last step alone."""
        self.every = every

    def after_step(self, session: Session) -> None:
        """Measure and log the losses by source, beside the parent's."""
        with session.meter.spend_on("evaluation_seconds"):
            losses = session.heldout.measure_losses(session.spec, session.state.params)
            averaged = self.measure_average(session)
        session.heldout_losses = losses
        seq_len = session.heldout.seq_len
        session.metrics.log_heldout(session.step, losses, seq_len, session.parent_loss, averaged)

    def measure_average(self, session: Session) -> dict[str, float] | None:
        """Return the losses of the averaged weights, if there are any."""
        weights = read_average(session.state.average)
        if weights is None:
            return None
        params = replace_subtree(session.state.params, weights)
        return session.heldout.measure_losses(session.spec, params)
