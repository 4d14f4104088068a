"""Train: start or resume a run, make its steps with hooks around them, write its manifest."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Sequence

import jax

from jaxpt import io, sharding
from jaxpt.config import Config
from jaxpt.growth.parse import parse_operator
from jaxpt.spec import UserError
from jaxpt.train import agreement, distributed, result
from jaxpt.train.context import EstimateCost, no_cost, open_run
from jaxpt.train.hooks.checkpoint import Checkpoint
from jaxpt.train.hooks.diverge import Diverge
from jaxpt.train.hooks.eval_tasks import EvalTasks
from jaxpt.train.hooks.grow import Grow
from jaxpt.train.hooks.hook import Hook
from jaxpt.train.hooks.log import Log
from jaxpt.train.hooks.profile import Profile
from jaxpt.train.hooks.replay import Replay
from jaxpt.train.hooks.reshape import Reshape
from jaxpt.train.hooks.skip import Skip
from jaxpt.train.hooks.validate import Validate
from jaxpt.train.meter import describe_goodput
from jaxpt.train.session import Session, start_session
from jaxpt.weights import checkpoint

log = logging.getLogger(__name__)


@distributed.end_together()
def train_model(
    config: Config,
    run_dir: io.Path,
    estimate_device_cost: EstimateCost = no_cost,
    started: float | None = None,
    verify: bool = False,
) -> None:
    """Train in a run directory to train.steps.

    Starts from the run's own newest checkpoint, else from config.initialize.

    Args:
        config: the recipe.
        run_dir: the run directory.
        estimate_device_cost: what a device costs and can do for a model, for MFU and money.
        started: time.monotonic() from which time and money count; None: now.
        verify: compare the checksums of a finished run, not only sizes.
    """
    started = started or time.monotonic()
    distributed.join_processes(run_dir)
    checkpoint.check_run(run_dir)
    distributed.enable_compilation_cache()
    with hold_run(run_dir) as lock:
        train_run(config, run_dir, lock, estimate_device_cost, started, verify)


def hold_run(run_dir: io.Path) -> contextlib.AbstractContextManager[io.Lock | None]:
    """Return a hold on the run directory, by the first process. UserError names who has it."""
    return contextlib.nullcontext() if jax.process_index() else io.hold(run_dir)


def train_run(
    config: Config,
    run_dir: io.Path,
    lock: io.Lock | None,
    estimate_device_cost: EstimateCost,
    started: float,
    verify: bool,
) -> None:
    """Train in a directory that this start holds; see `train_model`."""
    checkpoint.recover_run(run_dir)
    agreement.check_program(config, run_dir)
    for _, operator in config.train.grow:
        parse_operator(operator)  # raises for a misspelt one, not hours later
    packed = list(config.mixture.packed_paths) or [str(run_dir / "packed")]
    request = result.make_request(config, packed)
    if result.is_finished(run_dir, request, verify):
        return
    mesh = sharding.make_mesh(config.mesh)
    known = {name: found["fingerprint"] for name, found in request.inputs.items()}
    run = open_run(config, run_dir, packed, mesh, estimate_device_cost, started, lock, known)
    agreement.check_data(run)
    session = start_session(run)
    result.remove_manifest(run_dir)  # only now: a start that was refused changes nothing
    train(session, make_hooks(session))
    if not session.is_last_step:
        log.info(f"stopped: step {session.step:,} is saved in {session.saved}")
        log.info("run the same command again to continue")
        raise SystemExit(session.exit_status)
    result.write_manifest(session, request)


def make_hooks(session: Session) -> list[Hook]:
    """Return a run's hooks in the order in which they act, before a step and after it."""
    settings = session.run.config.train
    return [
        Grow(settings.grow),
        Reshape(),
        Profile(settings.profile_steps),
        Skip(),
        Log(settings.log_every),
        Diverge(settings.stop_above),
        Validate(settings.eval_every),
        EvalTasks(settings.eval_every),
        Replay(settings),  # reads what Validate measured
        Checkpoint(session, distributed.watch_for_preemption()),  # saves what the others changed
    ]


def train(session: Session, hooks: Sequence[Hook]) -> None:
    """Make steps until train.steps, or until a hook stops the session. Close it then.

    Args:
        session: changed in place.
        hooks: called in this order before each step, and after those at which they are due.

    Raises:
        UserError: a hook had it fail; what was being saved is saved.
    """
    try:
        while not session.is_last_step and not session.is_stopping:
            for hook in hooks:
                hook.before_step(session)
            session.run_step()
            if any(hook.is_due(session) for hook in hooks):
                session.collect_scalars()
            for hook in hooks:
                if hook.is_due(session):  # asked again: it may depend on what an earlier one did
                    hook.after_step(session)
        for hook in hooks:
            hook.finish(session)
        log.info(describe_goodput(session.meter.read()))
        if session.failure:
            raise UserError(session.failure)
        session.webhook.send("stop", describe_end(session))
    except BaseException as error:
        reason = f"{type(error).__name__}: {error}"
        session.webhook.send("stop", f"ended at step {session.step:,}: {reason}")
        raise
    finally:
        session.close()


def describe_end(session: Session) -> str:
    """Return how a session ended that did not fail."""
    if session.is_last_step:
        return f"finished, {session.step:,} steps"
    return f"stopped, step {session.step:,} is saved"
