"""Grow the model during a run."""

from __future__ import annotations

import jax

from jaxpt import initialize, io
from jaxpt.growth import verify
from jaxpt.train import state
from jaxpt.train.average import init_average
from jaxpt.train.hooks.hook import Hook
from jaxpt.train.session import Session
from jaxpt.train.state import TrainState
from jaxpt.weights.load import LoadedModel


class Grow(Hook):
    """Applies the operators of train.grow, each before the step that follows its own."""

    def __init__(self, growths: tuple[tuple[int, str], ...]):
        """Grow by (after this many steps, operator), rising."""
        self.growths = growths

    def before_step(self, session: Session) -> None:
        """Apply the operators that are due and not done."""
        for step, operator in self.growths[session.n_growths :]:
            if step != session.step:
                break
            grow_session(session, operator)
            session.n_growths += 1
            cost = session.run.estimate_cost(session.spec, session.shape.seq_len)
            session.metrics.log_growth(session.step, operator, session.spec, cost)

    def is_due(self, session: Session) -> bool:
        """Return whether the model grows before the next step: this one is waited for."""
        return any(step == session.step for step, _ in self.growths)


def grow_session(session: Session, operator: str) -> None:
    """Grow the model; schedule, step and position continue. Writes growth.json, spec.json."""
    run, before = session.run, session.state
    parent = LoadedModel(session.spec, before.params, None, run.run_dir, session.step, None, {})
    child, grown = initialize.grow_model(parent, operator, run.mesh, run.measuring_batches)
    policy = grown.moments or session.run.config.initialize.moments
    opt_state, skip_state, session.new_params = state.grow_state(
        before, grown, run.config.optim, policy, run.mesh
    )
    report = verify.verify_growth(
        parent,
        child,
        [operator],
        [grown],
        run.mesh,
        seq_len=session.shape.seq_len,
        heldout=session.heldout,
        batches=run.measuring_batches,
        at_step=session.step,
        moments=policy,
    )
    verify.write_growth(report, run.run_dir)
    if jax.process_index() == 0:
        io.write_json(run.run_dir / "spec.json", child.spec)
    session.spec = child.spec
    average = init_average(session.make_abstract_state().average)  # begins anew
    session.state = TrainState(before.step, child.params, opt_state, skip_state, average)
    session.compiled.clear()
    session.recompile()
