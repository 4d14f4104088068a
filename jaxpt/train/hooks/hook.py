"""Define what a hook is: something that happens beside the steps of a run, with its own period."""

from __future__ import annotations

from jaxpt.train.session import Session


class Hook:
    """Called around the steps of a run. A hook reads and changes the session, no other hook."""

    every: int = 0  # period in steps; 0: the last step alone

    def before_step(self, session: Session) -> None:
        """Act before each step."""

    def is_due(self, session: Session) -> bool:
        """Return whether to act after the step just made: every `every` steps and after the last.

        If any hook is due, the host waits for the step, so that `session.collected` and
        `session.scalars` are there.
        """
        is_periodic = self.every > 0 and session.step % self.every == 0
        return is_periodic or session.is_last_step

    def after_step(self, session: Session) -> None:
        """Act after a step at which the hook is due."""

    def finish(self, session: Session) -> None:
        """Finish what runs in the background, after the last step."""
