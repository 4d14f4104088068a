"""Record steps with the JAX profiler: those of the recipe, and the next ones at SIGUSR1."""

from __future__ import annotations

import logging
import pathlib
import signal
import threading

import jax

from jaxpt import io
from jaxpt.train import writers
from jaxpt.train.hooks.hook import Hook
from jaxpt.train.session import Session

log = logging.getLogger(__name__)

N_STEPS = 5  # that SIGUSR1 asks for: a trace of more is slow to open


class Profile(Hook):
    """Records the steps of train.profile_steps, or the next ones, into RUN/tensorboard.

    Of several processes, the one that receives the signal records.
    """

    local: pathlib.Path  # where the profiler writes

    def __init__(self, steps: tuple[int, ...]):
        """Record from the first to the last of the steps; none if there are none."""
        self.first, self.last = steps or (0, 0)
        self.is_asked = False
        self.is_recording = False
        self.upload: threading.Thread | None = None
        if signal.getsignal(signal.SIGUSR1) != signal.SIG_IGN:
            signal.signal(signal.SIGUSR1, lambda *_: setattr(self, "is_asked", True))

    def before_step(self, session: Session) -> None:
        """Start before the first step."""
        if self.is_asked and not self.is_recording:
            self.first = session.step + 1
            self.last = session.step + N_STEPS
        self.is_asked = False
        if session.step + 1 != self.first:
            return
        run_dir = session.run.run_dir
        if isinstance(run_dir, io.BucketPath):
            self.local = writers.open_local(run_dir / f"profile-{jax.process_index()}")
        else:
            self.local = run_dir / "tensorboard"
        jax.profiler.start_trace(str(self.local))
        self.is_recording = True

    def is_due(self, session: Session) -> bool:
        """Return whether the last step was made, of those to record or of the run."""
        is_end = session.step == self.last or session.is_last_step or session.is_stopping
        return self.is_recording and is_end

    def after_step(self, session: Session) -> None:
        """Stop once the devices are done."""
        jax.block_until_ready(session.state)
        jax.profiler.stop_trace()
        self.is_recording = False
        directory = session.run.run_dir / "tensorboard"
        if self.local != directory:
            places = self.local, directory
            self.upload = threading.Thread(target=writers.upload, args=places, daemon=True)
            self.upload.start()
        steps = f"{self.first} to {session.step}"
        log.info(f"profile of steps {steps}: tensorboard --logdir {directory}")

    def finish(self, session: Session) -> None:
        """Give the upload a moment."""
        if self.upload:
            self.upload.join(writers.CLOSE_SECONDS)
