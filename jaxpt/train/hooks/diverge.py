"""Stop a run whose loss explodes, and keep what it leaves from replacing good checkpoints."""

from __future__ import annotations

import logging
import math

from jaxpt.train.hooks.hook import Hook
from jaxpt.train.session import Session

log = logging.getLogger(__name__)


class Diverge(Hook):
    """Compares the loss with a multiple of the unigram entropy of the data.

    Above it nothing is saved. One look above it gives a warning; a second one in a row stops the
    run, and so does the last step. Weights that start above it may come down first.
    """

    def __init__(self, factor: float):
        """Take train.stop_above; 0 looks at nothing."""
        self.factor = factor
        self.before = math.inf  # loss at the last look
        self.was_below = False  # the limit, since this start

    def is_due(self, session: Session) -> bool:
        """Return whether the scalars of steps have come."""
        return self.factor > 0 and bool(session.collected)

    def after_step(self, session: Session) -> None:
        """Look at the mean loss of the steps that have come; end the run where it exploded."""
        loss = compute_mean_loss(session)
        limit = self.find_limit(session)
        was_above, session.is_diverged = session.is_diverged, loss > limit
        is_falling = not self.was_below and loss < self.before
        self.before = loss
        self.was_below |= loss <= limit
        if not session.is_diverged:
            return
        finding = (
            f"the loss is {loss:,.2f} nats per token up to step {session.step:,}, above "
            f"{limit:.2f} (train.stop_above = {self.factor:g} times the data's unigram entropy)"
        )
        is_second = was_above and not is_falling
        if is_second or session.is_last_step or session.is_stopping:
            peak_lr = session.run.config.optim.peak_lr
            session.fail(
                f"train: {finding}. The run has diverged, and its checkpoints are from before. "
                f"Lower optim.peak_lr ({peak_lr:g}) and run the same command again, which "
                "continues from the newest one, or start over."
            )
        else:
            log.warning(f"{finding}. Nothing is saved meanwhile; the run stops if it stays there")

    def find_limit(self, session: Session) -> float:
        """Return nats per token that a run stays below: well above guessing, whatever the data."""
        entropy = max(session.run.dataset.unigram_nats.values())
        return max(self.factor * entropy, 2 * math.log(session.spec.vocab_size))


def compute_mean_loss(session: Session) -> float:
    """Return nats per target over the steps that have come; NaN if all of them were skipped."""
    loss_sum = n_targets = 0.0
    for collected in session.collected:
        if math.isfinite(collected.scalars["loss_sum"]):
            loss_sum += float(collected.scalars["loss_sum"])
            n_targets += float(collected.scalars["n_targets"])
    return loss_sum / n_targets if n_targets else math.nan
