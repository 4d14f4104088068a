"""Score benchmarks during a run."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxpt import io
from jaxpt.train.hooks.hook import Hook
from jaxpt.train.session import Session


class EvalTasks(Hook):
    """Scores train.eval_tasks with each held-out loss, on the same items each time.

    The scores are those of `jaxpt evaluate` of the same checkpoint.
    """

    def __init__(self, every: int):
        """Score every so many steps; 0: after the last step alone."""
        self.every = every

    def is_due(self, session: Session) -> bool:
        """Return whether there are benchmarks, and their time has come."""
        return session.run.benchmarks is not None and super().is_due(session)

    def after_step(self, session: Session) -> None:
        """Score the model as it is, and log it."""
        from jaxpt.evaluate import harness  # 0.05 s, which most starts save

        spec, benchmarks = session.spec, session.run.benchmarks
        assert benchmarks
        tokenizer = io.local_copy(session.run.run_dir / "tokenizer")
        # as a checkpoint is read for evaluation
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), session.state.params)
        judged = harness.make_lm_adapter(spec, params, tokenizer, spec.max_seq_len)
        with session.meter.spend_on("evaluation_seconds"):
            results, samples = harness.score_benchmarks(judged, benchmarks)
        session.metrics.log_tasks(session.step, harness.list_scores(results, samples))
