"""Act where a run forgets more of its parent's knowledge than it may."""

from __future__ import annotations

import logging

from jaxpt.config import TrainConfig
from jaxpt.train import forgetting
from jaxpt.train.hooks.hook import Hook
from jaxpt.train.session import Session

log = logging.getLogger(__name__)


class Replay(Hook):
    """Compares each evaluation with the parent's losses and acts by train.on_forgetting."""

    def __init__(self, train: TrainConfig):
        """Take limit and action from the config."""
        self.limit = train.max_forgetting
        self.action = train.on_forgetting

    def is_due(self, session: Session) -> bool:
        """Return whether this step was evaluated."""
        return session.heldout_losses is not None

    def after_step(self, session: Session) -> None:
        """Warn, ask the run to save and stop, or read more of what was forgotten."""
        losses = session.heldout_losses or {}
        forgotten = forgetting.find_forgotten(losses, session.parent_loss, self.limit)
        if not forgotten:
            return
        sentence = forgetting.describe_forgetting(forgotten, self.limit)
        log.warning(sentence)
        session.webhook.send("forgetting", f"step {session.step:,}: {sentence}")
        if session.is_last_step:
            return
        if self.action == "stop":
            session.stop(exit_status=1)
        elif self.action == "replay":
            names, sizes = list(forgotten), dict(session.run.dataset.n_sequences)
            mixture = forgetting.increase_replay(session.mixture, names, session.step, sizes)
            _, shares = mixture.phases[-1]
            log.info(f"forgetting: from step {session.step + 1:,} on the shares are {shares}")
            session.change_mixture(mixture)
