"""Report updates that the step skipped, and stop a run that does little else."""

from __future__ import annotations

from jaxpt.spec import UserError
from jaxpt.train.hooks.hook import Hook
from jaxpt.train.session import Session

STORM = 0.5  # of train.max_consecutive_skips: the webhook hears of it before the run stops


class Skip(Hook):
    """Looks at the steps that the host has waited for, whichever hook it waited for."""

    is_storm = False  # of which the webhook has heard

    def is_due(self, session: Session) -> bool:
        """Return whether the scalars of steps have come."""
        return bool(session.collected)

    def after_step(self, session: Session) -> None:
        """Record each skipped update. Raise UserError after train.max_consecutive_skips."""
        for collected in session.collected:
            n_skips = int(collected.scalars["consecutive_skips"])
            limit = session.run.config.train.max_consecutive_skips
            is_storm = n_skips >= STORM * limit
            if is_storm and not self.is_storm:
                sentence = f"{n_skips} consecutive updates skipped up to step {collected.step:,}"
                session.webhook.send("skips", f"{sentence}; the run stops at {limit}")
            self.is_storm = is_storm
            if n_skips:
                documents = list_documents(session, collected.step)
                session.metrics.log_skipped_update(collected, documents)
                check_consecutive_skips(session, n_skips, collected.step, documents)


def list_documents(session: Session, step: int) -> list[str]:
    """Return the ids of the documents of a step's batch."""
    documents: dict[str, None] = {}
    for i in session.schedule.sequences_of(step):
        sequence = session.schedule.sequence_at(i)
        found = session.run.dataset.read_document_ids(*sequence)
        documents |= dict.fromkeys(found)
    return list(documents)


def check_consecutive_skips(
    session: Session, n_skips: int, step: int, documents: list[str]
) -> None:
    """Raise UserError after train.max_consecutive_skips skipped updates."""
    if n_skips < session.run.config.train.max_consecutive_skips:
        return
    more = ""
    if len(documents) > 4:
        more = f" and {len(documents) - 4} more documents"
    raise UserError(
        f"train: {n_skips} consecutive updates were skipped up to step {step} (not finite, or a "
        f"spike), which read {', '.join(documents[:4])}{more}. Lower optim.peak_lr "
        f"({session.run.config.optim.peak_lr:g}), or look at the documents: jaxpt trace "
        f"--workdir RUN --step {step} prints them."
    )
