"""Log the steps since the last line, with every scalar that the step returned."""

from __future__ import annotations

from jaxpt.train.hooks.hook import Hook
from jaxpt.train.session import Session


class Log(Hook):
    """Writes a line and a record every train.log_every steps."""

    def __init__(self, every: int):
        """Log every so many steps."""
        self.every = every

    def after_step(self, session: Session) -> None:
        """Log the mean loss since the last line, and the last step's other scalars."""
        loss = session.take_interval_loss()
        epochs = session.schedule.compute_epochs(session.n_sequences)
        session.metrics.log_train(session.step, session.scalars, loss=loss, epochs=epochs)
