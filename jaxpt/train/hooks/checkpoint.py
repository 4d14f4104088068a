"""Save checkpoints: by steps, by minutes, at the end and when the run is asked to stop."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator

from jaxpt.train import distributed, forgetting, provenance, state
from jaxpt.train.average import describe_average
from jaxpt.train.hooks.hook import Hook
from jaxpt.train.records import CheckpointRecord, HeldoutRecord
from jaxpt.train.session import Session
from jaxpt.weights import checkpoint

log = logging.getLogger(__name__)

TERMINATED = 143  # exit status after SIGTERM by the shell's convention, here of every such signal


class Checkpoint(Hook):
    """Saves every train.checkpoint_every steps, and whenever the run stops."""

    def __init__(self, session: Session, should_stop: Callable[[int], bool]):
        """Save into the session's run.

        Args:
            session: the run.
            should_stop: of the step, whether the run was asked to stop; the same on every process.
        """
        train = session.run.config.train
        self.every = train.checkpoint_every
        self.minutes = train.checkpoint_minutes
        self.look_every = train.log_every
        self.must_succeed = train.on_save_error == "stop"
        self.should_stop = should_stop
        self.checkpointer = checkpoint.Checkpointer(
            session.run.run_dir, train.max_to_keep, train.keep_every
        )
        self.saved_at = time.monotonic()

    def before_step(self, session: Session) -> None:
        """Note that the run must stop: asked once per step, the step that leaves also saves."""
        if self.should_stop(session.step):
            log.info(f"asked to stop: saves after step {session.step + 1:,}")
            session.stop(TERMINATED)

    def is_due(self, session: Session) -> bool:
        """Return whether to save, or to look at the clock and at the save in progress."""
        is_looking = session.step % self.look_every == 0
        return is_looking or session.is_stopping or super().is_due(session)

    def after_step(self, session: Session) -> None:
        """Save, or raise the error of a save in the background.

        What has diverged is not saved: in time it would replace every good checkpoint.
        """
        is_time = session.is_stopping or super().is_due(session) or self.is_late()
        if is_time and not session.is_diverged:
            with session.meter.spend_on("save_seconds"):
                self.save(session)
        else:
            with self.handle_save_errors():
                self.checkpointer.check_errors()

    def is_late(self) -> bool:
        """Return whether train.checkpoint_minutes have passed since the last save."""
        if not self.minutes:
            return False
        seconds = time.monotonic() - self.saved_at
        return distributed.broadcast_from_first(seconds > 60 * self.minutes)

    def save(self, session: Session) -> None:
        """Start saving a checkpoint. Raise UserError where another start has taken the run over."""
        if session.run.lock:
            session.run.lock.check()
        provenance.write_epochs(session.run.run_dir, session.schedule, session.n_sequences)
        record = make_checkpoint_record(session)
        with self.handle_save_errors():
            self.checkpointer.wait_until_saved()  # for the previous one
        with self.handle_save_errors(reraise=session.is_last_step or session.is_stopping):
            self.checkpointer.save_async(
                session.step,
                session.state.params,
                state.rest_of_state(session.state),
                session.spec,
                counts=record.to_json(),
                tokenizer=session.run.dataset.tokenizer,
                average=session.state.average,
                before_publishing=session.metrics.flush,
            )
        self.saved_at = time.monotonic()

    @contextlib.contextmanager
    def handle_save_errors(self, reraise: bool = False) -> Iterator[None]:
        """Raise a failed save, or by train.on_save_error log it so that the run continues."""
        try:
            yield
        except checkpoint.CheckpointSaveError as error:
            if self.must_succeed or reraise:
                raise
            log.warning(f"{error} The run continues, by train.on_save_error.")

    def finish(self, session: Session) -> None:
        """Wait until the last checkpoint is complete."""
        with session.meter.spend_on("save_seconds"):
            session.saved = self.checkpointer.wait_until_saved() or session.saved


def make_checkpoint_record(session: Session) -> CheckpointRecord:
    """Return what a checkpoint tells of its run, from which the run resumes."""
    run = session.run
    heldout = None
    if session.heldout_losses:  # what a later start from this checkpoint is compared with
        heldout = HeldoutRecord(**session.heldout.to_record(session.heldout_losses))
    return CheckpointRecord(
        step=session.step,
        progress=session.make_progress(),
        data_fingerprint=run.dataset.fingerprint,
        mixture_seed=run.config.mixture.seed,
        optimizer=run.config.optim.name,
        teacher=run.teacher.fingerprint if run.teacher else None,
        reference=session.reference_fingerprint,
        moment_dtype=run.config.optim.moment_dtype,
        lr=float(session.scalars["lr"]),
        new_params=session.new_params.to_record(),
        parent=session.parent,
        average=describe_average(run.config.optim, run.config.train.steps),
        replay=forgetting.record_replay(run.config.mixture, session.mixture),
        heldout=heldout,
    )
