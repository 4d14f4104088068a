"""The training run, read top to bottom: open the rows, be born or resume, step, grow, measure, save."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import json
import math
import pathlib
import shutil
import time
from collections.abc import Callable, Iterator

import jax

from jaxpt import sharding, stage
from jaxpt.config import Config
from jaxpt.data import loader
from jaxpt.data.mixture import Mixture, Stretch
from jaxpt.data.storage import open_set
from jaxpt.model import attention, loss
from jaxpt.spec import Manifest, ModelSpec, UserError
from jaxpt.train import forgetting, gate, machine, newborn, start, state, step
from jaxpt.train.metrics import Cost, Metrics
from jaxpt.train.metrics import read as read_metrics
from jaxpt.train.optimizer import Young
from jaxpt.train.state import TrainState
from jaxpt.weights import checkpoint, hub, initialize

# What decides the result of a run. Another mesh does not (law 3), nor do the other sections.
DECIDING = ("mixture", "model", "initialize", "train", "optim")


def run(settings: Config, workdir: pathlib.Path, cost_of: Callable[[ModelSpec], Cost] = lambda spec: Cost()) -> None:
    """Train in `workdir` to train.steps, from its own newest checkpoint if it has one, else from config.initialize.

    cost_of  what a device costs and can do for this model, for MFU and money in the metrics
    """
    machine.join()
    machine.keep_compiled()
    run_dir = stage.local_path(workdir)
    packed = list(settings.mixture.packed) or [str(run_dir / "packed")]
    config = {name: dataclasses.asdict(getattr(settings, name)) for name in DECIDING}
    inputs = {f"packed {path}": {"path": path, "fingerprint": open_set(path).manifest.fingerprint} for path in packed}
    if settings.initialize.source != "random":
        source = initialize.source_of(settings.initialize.source)
        inputs["initialize"] = {"path": str(source), "fingerprint": stage.fingerprint_path(source)}
    if finished(run_dir, config, inputs):
        return
    started = time.monotonic()

    # The rows, the mesh, and whether they fit each other.
    rows = loader.open_rows(packed)
    mesh = sharding.make_mesh(settings.mesh)
    if rows.row_len != settings.pack.row_len:
        raise UserError(
            f"pack.row_len: the config says {settings.pack.row_len}, the packed rows have {rows.row_len} tokens. Set it to that, or pack again."
        )
    heldout = gate.Heldout(settings, packed, mesh)
    measuring_rows = newborn.measuring_rows(settings, packed, mesh)
    measured_with = {"heldout": heldout, "rows": measuring_rows, "flops_per_token": lambda spec: cost_of(spec).flops_per_token}

    # Where it begins: at this run's newest whole checkpoint, or with a birth.
    run_dir.mkdir(parents=True, exist_ok=True)
    resumed = checkpoint.newest(run_dir)
    if resumed:
        spec = ModelSpec.load(resumed / "spec.json")
        manifest = Manifest.load(resumed)
        counts = manifest.counts
        start.check_rows(manifest, settings, rows, run_dir)
        stage.say(f"resumed from {resumed}: step {counts['step']:,}, {counts['rows']:,} rows read; {initialize.describe(spec)}")
        for change in changed_settings(run_dir, config):
            stage.say(f"  with another {change}")
        young = Young.from_json(counts["young"])
        record, grown, parent = {}, False, counts["parent"]
    else:
        birth = initialize.birth(settings, mesh, rows.n_pieces, measuring_rows)
        spec = birth.model.spec
        if birth.model.tokenizer not in (None, rows.tokenizer):
            raise UserError(
                f"initialize.source: {settings.initialize.source} was trained with another tokenizer than the rows were packed with. Pack with its own."
            )
        if rows.n_pieces > birth.model.spec.vocab_size:
            raise UserError(
                f"the rows hold token ids up to {rows.n_pieces - 1}, the model knows {birth.model.spec.vocab_size}. Pack with the model's own tokenizer."
            )
        story = hub.local(settings.initialize.source) / "growth.json" if settings.initialize.source != "random" else None
        is_grown = bool(birth.parent) or (story is not None and story.is_file())
        if birth.parent:
            found = newborn.verify(birth.parent, birth.model, settings.initialize.grow, birth.growths, mesh, **measured_with)
            newborn.write_growth(found | {"moments": settings.initialize.moments if settings.initialize.start == "grow" else "fresh"}, run_dir)
        elif is_grown and jax.process_index() == 0:
            shutil.copyfile(story, run_dir / "growth.json")
        now, counts, young = start.begin(settings, birth, rows, mesh)
        record = {"tokenizer": birth.model.tokenizer, **birth.model.record}
        # a trained descendant of a growth has a record of its own; a newborn has none yet
        grown, parent = bool(birth.parent) or (is_grown and not birth.model.step), None
        del birth  # the parent's weights, if there was one
    if rows.row_len > spec.max_positions:
        raise UserError(f"pack.row_len: rows of {rows.row_len} tokens are longer than the model's {spec.max_positions} positions. Pack shorter rows.")
    sharding.check(mesh, spec, settings.train.batch_rows, settings.train.accumulate, rows.row_len)
    asked = forgetting.known(settings.mixture, counts.get("phases"))
    n_rows = counts["rows"] + (settings.train.steps - counts["step"]) * settings.train.batch_rows
    mix = lambda past, n_done, n_read: Mixture(asked, rows.n_rows, settings.train.batch_rows, past, n_done, n_read, rows.fingerprint)  # noqa: E731
    mixture = mix([Stretch(*each) for each in counts["account"]], counts["step"], counts["rows"])
    mixture.check(n_rows, asked.max_epochs)
    if late := [at for at, _ in settings.train.grow[counts["n_grown"] :] if at < counts["step"]]:
        raise UserError(
            f"train.grow: {run_dir} stands at step {counts['step']:,} and did not grow after step {late[0]:,}, which will not come again. Name a later "
            "step, or grow it into another --workdir by initialize.source and initialize.grow."
        )

    # The step, and what is said about it. A checkpoint is read while the step is compiled, or read from the cache.
    shape = ", ".join(f"{name} {size}" for name, size in mesh.shape.items() if size > 1) or "no cut"
    stage.say(
        f"{jax.device_count()} x {jax.devices()[0].device_kind} ({shape}); a step is "
        f"{settings.train.batch_rows} rows x {rows.row_len} tokens; {settings.train.steps:,} steps read {describe_epochs(mixture.epochs(n_rows))}"
    )
    say_paths(spec, settings, mesh)
    with machine.enough_memory(settings), machine.compiling("train step"), concurrent.futures.ThreadPoolExecutor(1) as beside:
        compiled = beside.submit(step.compiled, spec, settings, mesh, young)
        if resumed:
            goal = state.abstract_state(spec, settings, mesh)
            now = state.restored(resumed, checkpoint.restore(resumed, "params", goal.params), goal)
        train_step = compiled.result()
        if not resumed:
            now = step.rehearse(train_step, now, settings, mesh)
    keep_account(run_dir, mixture)
    keep_program(run_dir, settings, spec, packed, counts["step"])
    tokens_per_step = settings.train.batch_rows * rows.row_len
    metrics = Metrics(run_dir, settings, tokens_per_step=tokens_per_step, resumed_at=counts["step"], started=started, cost=cost_of(spec))
    if resumed:
        metrics.resumed(counts["step"])
    elif settings.initialize.source != "random" or settings.initialize.grow:
        if settings.initialize.source == "random" or settings.initialize.start != "continue":
            losses = heldout.losses(spec, now.params)  # nobody's weights, or a run's own, on the rows that it was reading
        else:
            losses = gate.check_start(heldout, spec, now.params, record, grown)
        parent = losses_of_parent(run_dir, settings) or losses
        metrics.heldout(counts["step"], losses, parent)

    # The loop. Metrics stay on the devices until a line is due, so that the host never waits for a step.
    asked_to_stop = machine.catch_stop()
    saver = checkpoint.Saver(run_dir, settings.train.keep, settings.train.keep_every)
    n_done, n_read, n_grown = counts["step"], counts["rows"], counts["n_grown"]
    nats_sum, weights_sum = counts["interval"]
    waiting, stopping, is_new, saved_at = [], False, bool(resumed), time.monotonic()
    read_from = lambda row: loader.stream(rows, mixture, sharding.batch_sharding(mesh), settings.train.batch_rows, row, asked.document_mask)  # noqa: E731
    batches = read_from(n_read)
    metrics.pause(n_done)
    while n_done < settings.train.steps and not stopping:
        while n_grown < len(settings.train.grow) and settings.train.grow[n_grown][0] == n_done:
            text = settings.train.grow[n_grown][1]
            now, spec, young = grow(run_dir, text, n_done, now, spec, settings, mesh, measured_with)
            sharding.check(mesh, spec, settings.train.batch_rows, settings.train.accumulate, rows.row_len)
            with machine.enough_memory(settings), machine.compiling("train step"):
                train_step, is_new = step.compiled(spec, settings, mesh, young), True
            n_grown += 1
            metrics.grown(n_done, text, spec, cost_of(spec))
        terminated = stopping = asked_to_stop(n_done)  # asked once a step, so that the step that leaves is the one that saves
        batch = next(batches)
        metrics.profile(n_done + 1)
        if is_new:
            with machine.enough_memory(settings):  # which no rehearsal has tried
                now, found = jax.block_until_ready(train_step(now, batch))
            is_new = False
        else:
            now, found = train_step(now, batch)
        waiting.append(found)
        n_done += 1
        metrics.profile(n_done, found)
        n_read += settings.train.batch_rows
        last = n_done == settings.train.steps
        logs = last or n_done % settings.train.log_every == 0
        saves = last or n_done % settings.train.checkpoint_every == 0 or stopping
        if logs and not saves and settings.train.checkpoint_minutes:
            saves = machine.first_decides(time.monotonic() - saved_at > 60 * settings.train.checkpoint_minutes)
        measures = last or (settings.train.eval_every and n_done % settings.train.eval_every == 0)
        if logs or saves or measures:
            for at, each in enumerate(jax.device_get(waiting), n_done - len(waiting) + 1):
                if math.isfinite(each["nats_sum"]):  # a batch that is not is skipped, and counted as that
                    nats_sum, weights_sum = nats_sum + float(each["nats_sum"]), weights_sum + float(each["weights_sum"])
                if each["n_in_a_row"]:
                    end = n_read - (n_done - at) * settings.train.batch_rows
                    places = map(mixture.row_at, range(end - settings.train.batch_rows, end))
                    documents = list(dict.fromkeys(document for name, i in places for document in rows.doc_ids(name, i)))
                    metrics.skipped(at, loss=float(each["loss"]), grad_norm=float(each["grad_norm"]), documents=documents)
                    stop_if_stuck(int(each["n_in_a_row"]), settings, at, documents)
            waiting.clear()
        if logs:
            newest = {name: float(found[name]) for name in ("grad_norm", "lr")}
            metrics.train(n_done, loss=nats_sum / max(weights_sum, 1), **newest, n_skipped=int(found["n_skipped"]), epochs=mixture.epochs(n_read))
            nats_sum = weights_sum = 0.0
        measured = None
        if measures:
            measured = heldout.losses(spec, now.params)
            metrics.heldout(n_done, measured, parent)
            if forgot := forgetting.beyond(measured, parent, settings):
                stage.say(forgetting.tell(forgot, settings))
                if settings.train.on_forgetting == "stop" and not last:
                    stopping = saves = True
                elif settings.train.on_forgetting == "replay" and not last:
                    asked = forgetting.more_replay(asked, list(forgot), n_done, rows.n_rows)
                    stage.say(f"forgetting: from step {n_done + 1:,} on the shares are {asked.phases[-1][1]}")
                    mixture = mix(mixture.account(n_read), n_done, n_read)
                    mixture.check(n_rows, asked.max_epochs)
                    keep_account(run_dir, mixture)
                    batches.close()
                    batches = read_from(n_read)
        if saves:
            facts = {
                "rows": n_read,
                "packed": rows.fingerprint,
                "seed": settings.mixture.seed,
                "interval": [nats_sum, weights_sum],
                "optimizer": settings.optim.name,
                "lr": float(found["lr"]),
                "n_grown": n_grown,
                "young": young.to_json(),
                "parent": parent,
                "account": mixture.account(n_read),
                "phases": forgetting.to_json(settings.mixture, asked),
            }
            if measured:  # what a later start from this checkpoint is held against
                facts["heldout"] = heldout.record(measured)
            rest = {"step": now.step, "opt": now.opt, "guard": now.guard}
            with failures_told(settings.train.on_failed_save == "stop"):
                saver.wait()  # for the one before
            with failures_told(settings.train.on_failed_save == "stop" or last or stopping):
                saver.save(n_done, now.params, rest, spec, counts=facts, tokenizer=rows.tokenizer)
            saved_at = time.monotonic()
            metrics.pause(n_done)
        elif logs:
            with failures_told(settings.train.on_failed_save == "stop"):
                saver.check()
    saved = saver.wait() if n_done > counts["step"] else resumed
    metrics.close()
    if n_done < settings.train.steps:
        stage.say(f"stopped: step {n_done:,} is saved in {saved}; the same command goes on from there")
        raise SystemExit(143 if terminated else 1)

    # Finished: say so in the way that makes the next start do nothing.
    if jax.process_index():
        return
    losses = [record["heldout"] for record in read_metrics(run_dir / "metrics.jsonl") if "heldout" in record][-1]
    manifest = stage.make_manifest(
        "train", config, inputs, outputs={f"checkpoints/{n_done}/{name}": checksum for name, checksum in Manifest.load(saved).outputs.items()},
        counts={"steps": n_done, "rows": n_read, "tokens": n_read * rows.row_len, "heldout": losses, "n_params": sum(x.size for x in jax.tree.leaves(now.params))},
        tokenizer=rows.tokenizer, seed=settings.mixture.seed, seconds=metrics.seconds_before + time.monotonic() - started,
    )  # fmt: skip
    stage.write_manifest(manifest, run_dir)
    stage.say(f"train: {saved} after {n_done:,} steps, {n_read * rows.row_len:,} tokens")


def grow(run: pathlib.Path, text: str, n_done: int, now: TrainState, spec: ModelSpec, settings: Config, mesh, measured_with: dict):
    """Growth inside the run: (state, spec, what is new) of the child; the schedule, the step and the position go on. Writes growth.json and spec.json."""
    parent = initialize.Loaded(spec, now.params, None, run, n_done, None, {})
    child, grew = initialize.grow(parent, text, mesh, measured_with["rows"])
    policy = grew.moments or settings.initialize.moments
    opt, guard, young = state.grown(now.opt, now.guard, grew, policy, mesh)
    found = newborn.verify(parent, child, [text], [grew], mesh, **measured_with, at_step=n_done, moments=policy)
    newborn.write_growth(found, run)
    if jax.process_index() == 0:
        child.spec.save(run / "spec.json")
    return TrainState(now.step, child.params, opt, guard), child.spec, young


def finished(run: pathlib.Path, config: dict, inputs: dict) -> bool:
    """True when `run` holds the end of this very training. Raises UserError when it holds another model's."""
    if not (run / "manifest.json").is_file():
        return False
    manifest = Manifest.load(run)
    if manifest.stage != "train":
        raise UserError(f"{run}: was made by {manifest.stage}. Train in a --workdir of its own, with --config.initialize.source={run}.")
    if stage.request_fingerprint("train", config, inputs, None) == stage.request_fingerprint("train", manifest.config, manifest.inputs, None):
        stage.say(f"train: {run} is finished already ({manifest.counts['steps']:,} steps), nothing to do")
        return True
    longer = {**config, "train": {**config["train"], "steps": manifest.counts["steps"]}}
    if config["train"]["steps"] > manifest.counts["steps"] and stage.plain(longer) == manifest.config:
        stage.say(f"train: {run} stood at {manifest.counts['steps']:,} steps and goes on to {config['train']['steps']:,}")
        if jax.process_index() == 0:
            (run / "manifest.json").unlink()  # it is not finished any more, which launch.py and later stages look at
        return False
    raise UserError(f"train: {run} holds the result of {stage.difference(manifest, config, inputs, manifest.seed)}. Give another --workdir.")


def changed_settings(run: pathlib.Path, config: dict) -> list[str]:
    """What decides a run's result and is not as it was when the run last started: "optim.peak_lr: 0.001, was 0.003"."""
    before = json.loads((run / "config.json").read_text())
    now = stage.plain(config)
    return [
        f"{section}.{name}: {value!r}, was {before[section].get(name)!r}"
        for section, knobs in now.items() for name, value in knobs.items() if before[section].get(name) != value
    ]  # fmt: skip


def keep_account(run: pathlib.Path, mixture: Mixture) -> None:
    """RUN/phases.json: what the run has read and will read, for whoever asks which rows a step saw."""
    if jax.process_index() == 0:
        stage.write_whole(run / "phases.json", json.dumps([stretch._asdict() for stretch in mixture.stretches], indent=1) + "\n")


def keep_program(run: pathlib.Path, settings: Config, spec: ModelSpec, packed: list[str], step: int) -> None:
    """config.json, spec.json and tokenizer/ of the run, so that it can be read, resumed and exported by itself; starts.jsonl and
    program.diff, so that it can be done again: every start with its command, commit, versions and devices."""
    if jax.process_index():
        return
    started, diff = stage.program()
    started |= {"step": step, "processes": jax.process_count(), "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}"}
    with open(run / "starts.jsonl", "a") as file:
        file.write(json.dumps(started) + "\n")
    stage.write_whole(run / "program.diff", diff)
    stage.write_whole(run / "config.json", json.dumps(dataclasses.asdict(settings), indent=1) + "\n")
    spec.save(run / "spec.json")
    if not (run / "tokenizer").exists() and open_set(packed[0]).copy_beside("tokenizer", run / "tokenizer.partial"):
        (run / "tokenizer.partial").rename(run / "tokenizer")


def losses_of_parent(run: pathlib.Path, settings: Config) -> dict[str, float] | None:
    """Held-out losses of the model that this run started from, on the same rows: known from its growth."""
    growth = run / "growth.json"
    if growth.is_file():
        found = json.loads(growth.read_text())
        if found["heldout_loss"] and found["heldout_rows"] == settings.train.eval_rows:
            return found["heldout_loss"]["parent"]
    return None


@contextlib.contextmanager
def failures_told(stop: bool) -> Iterator[None]:
    """Where a checkpoint could not be written: stop the run, or say so and go on to the next."""
    try:
        yield
    except checkpoint.SaveFailed as failed:
        if stop:
            raise
        stage.say(f"{failed} The run goes on, as train.on_failed_save says.")


def stop_if_stuck(n_in_a_row: int, settings: Config, step: int, documents: list[str]) -> None:
    if n_in_a_row >= settings.train.max_skips:
        raise UserError(
            f"train: {n_in_a_row} updates in a row were skipped up to step {step} (not finite, or a spike), which read "
            f"{', '.join(documents[:4])}{f' and {len(documents) - 4} more documents' if len(documents) > 4 else ''}. Lower optim.peak_lr "
            f"({settings.optim.peak_lr:g}), or look at the documents: scripts/trace.py --workdir RUN --step {step} prints them."
        )


def say_paths(spec: ModelSpec, settings: Config, mesh) -> None:
    """Which ways the step takes where there are several, and why."""
    platform = mesh.devices.flat[0].platform
    backend, why = attention.choose(spec, settings, mesh)
    at_a_time = loss.ON_CPU if platform == "cpu" else loss.ON_ACCELERATOR
    products = settings.train.compute_dtype
    if products == "bfloat16" and platform == "cpu":
        products += " (which XLA's CPU turns into float32: slower than train.compute_dtype=float32)"
    elif products == "float32" and platform != "cpu":
        products += " (bfloat16 is several times faster on this device: train.compute_dtype)"
    stage.say(
        f"attention: {backend}, {why}; loss: {at_a_time} tokens of a device at a time; products: {products}; backward keeps: {settings.train.remat}"
    )


def describe_epochs(epochs: dict[str, float]) -> str:
    return ", ".join(f"{name} {n:.2f} times" for name, n in epochs.items())
