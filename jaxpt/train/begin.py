"""What a start from weights keeps: nothing but the weights, or all of the run that it goes on with."""

from __future__ import annotations

import logging

from jaxpt.config import Config
from jaxpt.data import loader
from jaxpt.data.mixture import MixturePhase, schedule_from_history
from jaxpt.spec import Manifest, UserError
from jaxpt.stage import local_path
from jaxpt.train import state
from jaxpt.train.optimizer import NewParams
from jaxpt.train.state import TrainState
from jaxpt.weights import checkpoint, growth
from jaxpt.weights.initialize import InitResult

log = logging.getLogger(__name__)

INITIAL_PROGRESS = {"step": 0, "rows": 0, "interval": [0.0, 0.0], "n_grown": 0, "account": []}


def init_train_state(
    settings: Config, birth: InitResult, rows: loader.PackedDataset, mesh
) -> tuple[TrainState, dict, NewParams]:
    """(state, counts, what is new in the model) of a run's first step, by initialize.mode; the table of it is said.

    counts  step and rows that are done, as a checkpoint's manifest has them
    """
    asked = settings.initialize
    if asked.mode == "continue":
        log_init_plan(settings, birth)
        # what initialize.py grew is known to rates by age too
        told = birth.model.record.get("young", {}).get("new", {})
        new = (
            growth.find_new_params_through(birth.growths)
            if birth.growths
            else growth.ranges_to_flags(told)
        )
        return (
            state.init_state(birth.model.params, birth.model.spec, settings, mesh),
            INITIAL_PROGRESS,
            NewParams(new),
        )

    source = checkpoint.find_checkpoint(local_path(asked.source))
    if source is None or not (source / "rest").is_dir():
        raise UserError(
            f"initialize.mode: {asked.mode} needs a run's checkpoint, {asked.source} is none. Use continue, which needs only weights."
        )
    manifest = Manifest.load(source)
    counts = manifest.counts
    check_resumed_data(manifest, settings, rows, asked.source)
    if counts["step"] >= settings.train.steps:
        raise UserError(
            f"initialize.mode: {asked.source} stands at step {counts['step']} and train.steps is {settings.train.steps}. Set more."
        )
    log_init_plan(settings, birth)
    spec = birth.growths[0].spec if birth.growths else birth.model.spec
    now, young = (
        state.restore_state(
            source, birth.model.params, state.make_abstract_state(spec, settings, mesh)
        ),
        NewParams.from_json(counts["young"]),
    )
    opt, guard = now.opt_state, now.skip_state
    for i, grew in enumerate(birth.growths):
        opt, guard, young = state.grow_state(
            opt, guard, grew, asked.moments, mesh, young if i else NewParams()
        )
    # growths of train.grow that lie behind this step: the source's own at this very step only if it had grown there
    n_grown = sum(
        at < counts["step"] or (at == counts["step"] and i < counts["n_grown"])
        for i, (at, _) in enumerate(settings.train.grow)
    )
    kept = {name: counts[name] for name in ("step", "rows", "account")} | {
        "interval": [0.0, 0.0] if birth.growths else counts["interval"]
    }
    return now._replace(opt_state=opt, skip_state=guard), {**kept, "n_grown": n_grown}, young


def check_resumed_data(
    manifest: Manifest, settings: Config, rows: loader.PackedDataset, run: object
) -> None:
    """A run that goes on must find the rows that it was reading. Raises UserError saying what other rows break, unless mixture.allow_changed_data
    names these very rows; then that is said.

    manifest  of the checkpoint
    """
    counts = manifest.counts
    if counts.get("seed", settings.mixture.seed) != settings.mixture.seed:
        raise UserError(
            f"mixture.seed: {run} reads in the order of seed {counts['seed']}, another begins in the middle of its epochs. Set it back, or start anew."
        )
    if counts.get("packed") == rows.fingerprint:
        return
    where = ", ".join(sorted({source.place.where for source in rows.sources.values()}))
    if manifest.tokenizer != rows.tokenizer:
        raise UserError(
            f"{run}: has read rows of tokenizer {manifest.tokenizer}, {where} was packed with {rows.tokenizer}. Pack with its own, or start anew."
        )
    account = [MixturePhase(*each) for each in counts["account"]]
    n_rows = {
        **dict.fromkeys((name for stretch in account for name in stretch.shares), 1),
        **rows.n_rows,
    }  # some may be there no more
    epochs = schedule_from_history(account, n_rows, settings.mixture.seed).compute_epochs(
        counts["rows"]
    )
    begun = [f"{name} ({n % 1:.0%} of an epoch)" for name, n in epochs.items() if n % 1]
    breaks = (
        f"rows read in epochs that are under way may come again and others not: {', '.join(begun) or 'none'}; "
        f"the documents of steps up to {counts['step']:,} can no longer be traced; the run cannot be repeated from one set"
    )
    if settings.mixture.allow_changed_data != rows.fingerprint:
        raise UserError(
            f"{run}: has read other rows than {where} holds now. Give it those again, or another --workdir, or go on with "
            f"--config.mixture.allow_changed_data={rows.fingerprint}, which breaks this: {breaks}."
        )
    log.info(f"accepted: {run} goes on with other rows, which breaks this: {breaks}")


def log_init_plan(settings: Config, birth: InitResult) -> None:
    if settings.initialize.source != "random":
        for line in format_init_plan(settings, birth):
            log.info(line)


def format_init_plan(settings: Config, birth: InitResult) -> list[str]:
    """Lines: each part of a run, and what becomes of it."""
    asked, optim = settings.initialize, settings.optim
    known = birth.model.record
    goes_on = asked.mode != "continue"
    policies = [grew.moments or asked.moments for grew in birth.growths]
    rows = [
        ("weights", "grown" if birth.growths else "kept"),
        ("step", f"kept: {known['step']:,}" if goes_on else "0"),
        (
            "schedule",
            "goes on"
            if goes_on
            else f"begins again: {optim.warmup_steps} steps up to {optim.peak_lr:g}, then {optim.schedule}",
        ),
        (
            "moments",
            ("kept" if not policies else f"mapped: {', '.join(policies)}") if goes_on else "0",
        ),
        ("rows read", f"kept: {known['rows']:,}" if goes_on else "0"),
        ("random state", "none: every draw comes from a seed and a position"),
    ]
    lines = [f"start: {asked.mode}", *(f"  {part:<13} {fate}" for part, fate in rows)]
    theirs = known.get("optimizer", "adamw")
    if theirs != optim.name:  # 2605.06654: a base trained by one optimizer degrades under another
        lines.append(
            f"warning: {asked.source} was trained with {theirs}, this run uses {optim.name}; such a change costs quality. Compare with a short run"
        )
    if not goes_on and (lr := known.get("lr")) and optim.peak_lr > lr:
        lines.append(
            f"  its last learning rate was {lr:.2e}; {optim.peak_lr:.2e} re-warms it, which forgets some before it learns (2403.08763)"
        )
    return lines
