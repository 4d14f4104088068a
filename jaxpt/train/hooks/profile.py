"""Record steps with the JAX profiler."""

from __future__ import annotations

import logging
import pathlib
import threading

import jax

from jaxpt import io
from jaxpt.train import writers
from jaxpt.train.hooks.hook import Hook
from jaxpt.train.session import Session

log = logging.getLogger(__name__)


class Profile(Hook):
    """Records the steps of train.profile_steps into RUN/tensorboard."""

    local: pathlib.Path  # where the profiler writes

    def __init__(self, steps: tuple[int, ...]):
        """Record from the first to the last of the steps; none if there are none."""
        self.first, self.last = steps or (0, 0)
        self.upload: threading.Thread | None = None

    def before_step(self, session: Session) -> None:
        """Start before the first step."""
        if session.step + 1 == self.first:
            run_dir = session.run.run_dir
            if isinstance(run_dir, io.BucketPath):
                self.local = writers.open_local(run_dir / f"profile-{jax.process_index()}")
            else:
                self.local = run_dir / "tensorboard"
            jax.profiler.start_trace(str(self.local))

    def is_due(self, session: Session) -> bool:
        """Return whether the last step was made."""
        return session.step == self.last

    def after_step(self, session: Session) -> None:
        """Stop once the devices are done."""
        jax.block_until_ready(session.state)
        jax.profiler.stop_trace()
        directory = session.run.run_dir / "tensorboard"
        if self.local != directory:
            places = self.local, directory
            self.upload = threading.Thread(target=writers.upload, args=places, daemon=True)
            self.upload.start()
        log.info(f"profile of steps {self.first} to {self.last}: tensorboard --logdir {directory}")

    def finish(self, session: Session) -> None:
        """Give the upload a moment."""
        if self.upload:
            self.upload.join(writers.CLOSE_SECONDS)
