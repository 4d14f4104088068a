"""The training run, read top to bottom: open the rows, be born or resume, step, grow, measure, save."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import json
import logging
import math
import pathlib
import shutil
import time
from collections.abc import Callable, Iterator

import jax

from jaxpt import sharding, stage
from jaxpt.config import Config
from jaxpt.data import loader
from jaxpt.data.mixture import MixturePhase, MixtureSchedule
from jaxpt.data.storage import open_storage
from jaxpt.model import attention, loss
from jaxpt.spec import Manifest, ModelSpec, UserError
from jaxpt.train import begin, distributed, forgetting, gate, state, step, verify
from jaxpt.train.metrics import DeviceCost, MetricsLogger
from jaxpt.train.metrics import read_metrics as read_metrics
from jaxpt.train.optimizer import NewParams
from jaxpt.train.state import TrainState
from jaxpt.weights import checkpoint, hub, initialize

log = logging.getLogger(__name__)

# What decides the result of a run. Another mesh does not (law 3), nor do the other sections.
RESULT_SECTIONS = ("mixture", "model", "initialize", "train", "optim")


def train_model(
    config: Config,
    workdir: pathlib.Path,
    estimate_device_cost: Callable[[ModelSpec], DeviceCost] = lambda spec: DeviceCost(),
) -> None:
    """Train in `workdir` to train.steps, from its own newest checkpoint if it has one, else from config.initialize.

    cost_of  what a device costs and can do for this model, for MFU and money in the metrics
    """
    run_dir = stage.local_path(workdir)
    distributed.join_processes(run_dir)
    distributed.enable_compilation_cache()
    packed = list(config.mixture.packed_paths) or [str(run_dir / "packed")]
    result_config = {name: dataclasses.asdict(getattr(config, name)) for name in RESULT_SECTIONS}
    inputs = {
        f"packed {path}": {"path": path, "fingerprint": open_storage(path).manifest.fingerprint}
        for path in packed
    }
    if config.initialize.source != "random":
        source = initialize.resolve_source(config.initialize.source)
        inputs["initialize"] = {"path": str(source), "fingerprint": stage.fingerprint_path(source)}
    if is_finished(run_dir, result_config, inputs):
        return
    started = time.monotonic()

    # The rows, the mesh, and whether they fit each other.
    rows = loader.open_packed(packed)
    mesh = sharding.make_mesh(config.mesh)
    if rows.seq_len != config.pack.seq_len:
        raise UserError(
            f"pack.seq_len: the config says {config.pack.seq_len}, the packed rows have {rows.seq_len} tokens. Set it to that, or pack again."
        )
    heldout = gate.HeldoutData(config, packed, mesh)
    measuring_rows = verify.make_measuring_batches(config, packed, mesh)
    measured_with = {
        "heldout": heldout,
        "rows": measuring_rows,
        "flops_per_token": lambda spec: estimate_device_cost(spec).flops_per_token,
    }

    # Where it begins: at this run's newest whole checkpoint, or with a birth.
    run_dir.mkdir(parents=True, exist_ok=True)
    resumed = checkpoint.find_newest(run_dir)
    if resumed:
        spec = ModelSpec.load(resumed / "spec.json")
        manifest = Manifest.load(resumed)
        counts = manifest.counts
        begin.check_resumed_data(manifest, config, rows, run_dir)
        log.info(
            f"resumed from {resumed}: step {counts['step']:,}, {counts['rows']:,} rows read; {initialize.describe_model(spec)}"
        )
        for change in list_changed_settings(run_dir, config):
            log.info(f"  with another {change}")
        young = NewParams.from_json(counts["young"])
        record, grown, parent = {}, False, counts["parent"]
    else:
        birth = initialize.init_model(config, mesh, rows.vocab_size, measuring_rows)
        spec = birth.model.spec
        if birth.model.tokenizer not in (None, rows.tokenizer):
            raise UserError(
                f"initialize.source: {config.initialize.source} was trained with another tokenizer than the rows were packed with. Pack with its own."
            )
        if rows.vocab_size > birth.model.spec.vocab_size:
            raise UserError(
                f"the rows hold token ids up to {rows.vocab_size - 1}, the model knows {birth.model.spec.vocab_size}. Pack with the model's own tokenizer."
            )
        story = (
            hub.download_model(config.initialize.source) / "growth.json"
            if config.initialize.source != "random"
            else None
        )
        is_grown = bool(birth.parent) or (story is not None and story.is_file())
        if birth.parent:
            found = verify.verify_growth(
                birth.parent,
                birth.model,
                config.initialize.grow,
                birth.growths,
                mesh,
                **measured_with,
            )
            verify.write_growth(
                found
                | {
                    "moments": config.initialize.moments
                    if config.initialize.mode == "grow"
                    else "fresh"
                },
                run_dir,
            )
        elif is_grown and jax.process_index() == 0:
            shutil.copyfile(story, run_dir / "growth.json")
        now, counts, young = begin.init_train_state(config, birth, rows, mesh)
        record = {"tokenizer": birth.model.tokenizer, **birth.model.record}
        # a trained descendant of a growth has a record of its own; a newborn has none yet
        grown, parent = bool(birth.parent) or (is_grown and not birth.model.step), None
        del birth  # the parent's weights, if there was one
    if rows.seq_len > spec.max_seq_len:
        raise UserError(
            f"pack.seq_len: rows of {rows.seq_len} tokens are longer than the model's {spec.max_seq_len} positions. Pack shorter rows."
        )
    sharding.check_mesh_divides(
        mesh, spec, config.train.batch_size, config.train.grad_accum_steps, rows.seq_len
    )
    asked = forgetting.replay_from_json(config.mixture, counts.get("phases"))
    n_rows = counts["rows"] + (config.train.steps - counts["step"]) * config.train.batch_size
    mix = lambda past, n_done, n_read: MixtureSchedule(
        asked, rows.n_rows, config.train.batch_size, past, n_done, n_read, rows.fingerprint
    )
    mixture = mix(
        [MixturePhase(*each) for each in counts["account"]], counts["step"], counts["rows"]
    )
    mixture.check_max_epochs(n_rows, asked.max_epochs)
    if late := [at for at, _ in config.train.grow[counts["n_grown"] :] if at < counts["step"]]:
        raise UserError(
            f"train.grow: {run_dir} stands at step {counts['step']:,} and did not grow after step {late[0]:,}, which will not come again. Name a later "
            "step, or grow it into another --workdir by initialize.source and initialize.grow."
        )

    # The step, and what is said about it. A checkpoint is read while the step is compiled, or read from the cache.
    shape = ", ".join(f"{name} {size}" for name, size in mesh.shape.items() if size > 1) or "no cut"
    log.info(
        f"{jax.device_count()} x {jax.devices()[0].device_kind} ({shape}); a step is "
        f"{config.train.batch_size} rows x {rows.seq_len} tokens; {config.train.steps:,} steps read {format_epochs(mixture.compute_epochs(n_rows))}"
    )
    log_fast_paths(spec, config, mesh)
    with (
        distributed.explain_out_of_memory(config),
        distributed.log_compile_time("train step"),
        concurrent.futures.ThreadPoolExecutor(1) as beside,
    ):
        compiled = beside.submit(step.compile_step, spec, config, mesh, young)
        if resumed:
            goal = state.make_abstract_state(spec, config, mesh)
            now = state.restore_state(
                resumed, checkpoint.restore_tree(resumed, "params", goal.params), goal
            )
        train_step = compiled.result()
        if not resumed:
            now = step.run_warmup_step(train_step, now, config, mesh)
    write_mixture_phases(run_dir, mixture)
    write_run_provenance(run_dir, config, spec, packed, counts["step"])
    tokens_per_step = config.train.batch_size * rows.seq_len
    metrics = MetricsLogger(
        run_dir,
        config,
        tokens_per_step=tokens_per_step,
        resumed_at=counts["step"],
        started=started,
        cost=estimate_device_cost(spec),
    )
    if resumed:
        metrics.log_resume(counts["step"])
    elif config.initialize.source != "random" or config.initialize.grow:
        if config.initialize.source == "random" or config.initialize.mode != "continue":
            losses = heldout.measure_losses(
                spec, now.params
            )  # nobody's weights, or a run's own, on the rows that it was reading
        else:
            losses = gate.check_initial_loss(heldout, spec, now.params, record, grown)
        parent = read_parent_losses(run_dir, config) or losses
        metrics.log_heldout(counts["step"], losses, parent)

    # The loop. Metrics stay on the devices until a line is due, so that the host never waits for a step.
    asked_to_stop = distributed.watch_for_preemption()
    saver = checkpoint.Checkpointer(run_dir, config.train.max_to_keep, config.train.keep_every)
    n_done, n_read, n_grown = counts["step"], counts["rows"], counts["n_grown"]
    nats_sum, weights_sum = counts["interval"]
    waiting, stopping, is_new, saved_at = [], False, bool(resumed), time.monotonic()
    read_from = lambda row: loader.iterate_batches(
        rows,
        mixture,
        sharding.make_batch_sharding(mesh),
        config.train.batch_size,
        row,
        asked.document_mask,
    )
    batches = read_from(n_read)
    metrics.restart_timer(n_done)
    while n_done < config.train.steps and not stopping:
        while n_grown < len(config.train.grow) and config.train.grow[n_grown][0] == n_done:
            text = config.train.grow[n_grown][1]
            now, spec, young = grow_during_training(
                run_dir, text, n_done, now, spec, config, mesh, measured_with
            )
            sharding.check_mesh_divides(
                mesh, spec, config.train.batch_size, config.train.grad_accum_steps, rows.seq_len
            )
            with (
                distributed.explain_out_of_memory(config),
                distributed.log_compile_time("train step"),
            ):
                train_step, is_new = step.compile_step(spec, config, mesh, young), True
            n_grown += 1
            metrics.log_growth(n_done, text, spec, estimate_device_cost(spec))
        terminated = stopping = asked_to_stop(
            n_done
        )  # asked once a step, so that the step that leaves is the one that saves
        batch = next(batches)
        metrics.profile_step(n_done + 1)
        if is_new:
            with distributed.explain_out_of_memory(config):  # which no rehearsal has tried
                now, found = jax.block_until_ready(train_step(now, batch))
            is_new = False
        else:
            now, found = train_step(now, batch)
        waiting.append(found)
        n_done += 1
        metrics.profile_step(n_done, found)
        n_read += config.train.batch_size
        last = n_done == config.train.steps
        logs = last or n_done % config.train.log_every == 0
        saves = last or n_done % config.train.checkpoint_every == 0 or stopping
        if logs and not saves and config.train.checkpoint_minutes:
            saves = distributed.broadcast_from_first(
                time.monotonic() - saved_at > 60 * config.train.checkpoint_minutes
            )
        measures = last or (config.train.eval_every and n_done % config.train.eval_every == 0)
        if logs or saves or measures:
            for at, each in enumerate(jax.device_get(waiting), n_done - len(waiting) + 1):
                if math.isfinite(
                    each["nats_sum"]
                ):  # a batch that is not is skipped, and counted as that
                    nats_sum, weights_sum = (
                        nats_sum + float(each["nats_sum"]),
                        weights_sum + float(each["weights_sum"]),
                    )
                if each["n_in_a_row"]:
                    end = n_read - (n_done - at) * config.train.batch_size
                    places = map(mixture.sequence_at, range(end - config.train.batch_size, end))
                    documents = list(
                        dict.fromkeys(
                            document
                            for name, i in places
                            for document in rows.read_document_ids(name, i)
                        )
                    )
                    metrics.log_skipped_update(
                        at,
                        loss=float(each["loss"]),
                        grad_norm=float(each["grad_norm"]),
                        documents=documents,
                    )
                    check_consecutive_skips(int(each["n_in_a_row"]), config, at, documents)
            waiting.clear()
        if logs:
            newest = {name: float(found[name]) for name in ("grad_norm", "lr")}
            metrics.log_train(
                n_done,
                loss=nats_sum / max(weights_sum, 1),
                **newest,
                n_skipped=int(found["n_skipped"]),
                epochs=mixture.compute_epochs(n_read),
            )
            nats_sum = weights_sum = 0.0
        measured = None
        if measures:
            measured = heldout.measure_losses(spec, now.params)
            metrics.log_heldout(n_done, measured, parent)
            if forgot := forgetting.find_forgotten(measured, parent, config):
                log.info(forgetting.describe_forgetting(forgot, config))
                if config.train.on_forgetting == "stop" and not last:
                    stopping = saves = True
                elif config.train.on_forgetting == "replay" and not last:
                    asked = forgetting.increase_replay(asked, list(forgot), n_done, rows.n_rows)
                    log.info(
                        f"forgetting: from step {n_done + 1:,} on the shares are {asked.phases[-1][1]}"
                    )
                    mixture = mix(mixture.data_history(n_read), n_done, n_read)
                    mixture.check_max_epochs(n_rows, asked.max_epochs)
                    write_mixture_phases(run_dir, mixture)
                    batches.close()
                    batches = read_from(n_read)
        if saves:
            facts = {
                "rows": n_read,
                "packed": rows.fingerprint,
                "seed": config.mixture.seed,
                "interval": [nats_sum, weights_sum],
                "optimizer": config.optim.name,
                "lr": float(found["lr"]),
                "n_grown": n_grown,
                "young": young.to_json(),
                "parent": parent,
                "account": mixture.data_history(n_read),
                "phases": forgetting.replay_to_json(config.mixture, asked),
            }
            if measured:  # what a later start from this checkpoint is held against
                facts["heldout"] = heldout.to_record(measured)
            rest = {"step": now.step, "opt": now.opt, "guard": now.guard}
            with handle_save_errors(config.train.on_save_error == "stop"):
                saver.wait_until_saved()  # for the one before
            with handle_save_errors(config.train.on_save_error == "stop" or last or stopping):
                saver.save_async(
                    n_done, now.params, rest, spec, counts=facts, tokenizer=rows.tokenizer
                )
            saved_at = time.monotonic()
            metrics.restart_timer(n_done)
        elif logs:
            with handle_save_errors(config.train.on_save_error == "stop"):
                saver.check_errors()
    saved = saver.wait_until_saved() if n_done > counts["step"] else resumed
    metrics.close()
    if n_done < config.train.steps:
        log.info(
            f"stopped: step {n_done:,} is saved in {saved}; the same command goes on from there"
        )
        raise SystemExit(143 if terminated else 1)

    # Finished: say so in the way that makes the next start do nothing.
    if jax.process_index():
        return
    losses = [
        record["heldout"]
        for record in read_metrics(run_dir / "metrics.jsonl")
        if "heldout" in record
    ][-1]
    manifest = stage.make_manifest(
        stage.StageRequest("train", result_config, inputs, config.mixture.seed), outputs={f"checkpoints/{n_done}/{name}": checksum for name, checksum in Manifest.load(saved).outputs.items()},
        counts={"steps": n_done, "rows": n_read, "tokens": n_read * rows.seq_len, "heldout": losses, "n_params": sum(x.size for x in jax.tree.leaves(now.params))},
        tokenizer=rows.tokenizer, seconds=metrics.seconds_before_resume + time.monotonic() - started,
    )  # fmt: skip
    stage.write_manifest(manifest, run_dir)
    log.info(f"train: {saved} after {n_done:,} steps, {n_read * rows.seq_len:,} tokens")


def grow_during_training(
    run: pathlib.Path,
    text: str,
    n_done: int,
    now: TrainState,
    spec: ModelSpec,
    settings: Config,
    mesh,
    measured_with: dict,
):
    """Growth inside the run: (state, spec, what is new) of the child; the schedule, the step and the position go on. Writes growth.json and spec.json."""
    parent = initialize.LoadedModel(spec, now.params, None, run, n_done, None, {})
    child, grew = initialize.grow_model(parent, text, mesh, measured_with["rows"])
    policy = grew.moments or settings.initialize.moments
    opt, guard, young = state.grow_state(now.opt_state, now.skip_state, grew, policy, mesh)
    found = verify.verify_growth(
        parent, child, [text], [grew], mesh, **measured_with, at_step=n_done, moments=policy
    )
    verify.write_growth(found, run)
    if jax.process_index() == 0:
        child.spec.save(run / "spec.json")
    return TrainState(now.step, child.params, opt, guard), child.spec, young


def is_finished(run: pathlib.Path, config: dict, inputs: dict) -> bool:
    """True when `run` holds the end of this very training. Raises UserError when it holds another model's."""
    if not (run / "manifest.json").is_file():
        return False
    manifest = Manifest.load(run)
    if manifest.stage != "train":
        raise UserError(
            f"{run}: was made by {manifest.stage}. Train in a --workdir of its own, with --config.initialize.source={run}."
        )
    if stage.request_fingerprint("train", config, inputs, None) == stage.request_fingerprint(
        "train", manifest.config, manifest.inputs, None
    ):
        log.info(
            f"train: {run} is finished already ({manifest.counts['steps']:,} steps), nothing to do"
        )
        return True
    longer = {**config, "train": {**config["train"], "steps": manifest.counts["steps"]}}
    if (
        config["train"]["steps"] > manifest.counts["steps"]
        and stage.to_jsonable(longer) == manifest.config
    ):
        log.info(
            f"train: {run} stood at {manifest.counts['steps']:,} steps and goes on to {config['train']['steps']:,}"
        )
        if jax.process_index() == 0:
            (
                run / "manifest.json"
            ).unlink()  # it is not finished any more, which launch.py and later stages look at
        return False
    raise UserError(
        f"train: {run} holds the result of {stage.describe_difference(manifest, stage.StageRequest('train', config, inputs, manifest.seed))}. Give another --workdir."
    )


def list_changed_settings(run: pathlib.Path, config: dict) -> list[str]:
    """What decides a run's result and is not as it was when the run last started: "optim.peak_lr: 0.001, was 0.003"."""
    before = json.loads((run / "config.json").read_text())
    now = stage.to_jsonable(config)
    return [
        f"{section}.{name}: {value!r}, was {before[section].get(name)!r}"
        for section, knobs in now.items() for name, value in knobs.items() if before[section].get(name) != value
    ]  # fmt: skip


def write_mixture_phases(run: pathlib.Path, mixture: MixtureSchedule) -> None:
    """RUN/phases.json: what the run has read and will read, for whoever asks which rows a step saw."""
    if jax.process_index() == 0:
        stage.write_atomic(
            run / "phases.json",
            json.dumps([stretch._asdict() for stretch in mixture.stretches], indent=1) + "\n",
        )


def write_run_provenance(
    run: pathlib.Path, settings: Config, spec: ModelSpec, packed: list[str], step: int
) -> None:
    """config.json, spec.json and tokenizer/ of the run, so that it can be read, resumed and exported by itself; starts.jsonl and
    program.diff, so that it can be done again: every start with its command, commit, versions and devices.
    """
    if jax.process_index():
        return
    started, diff = stage.describe_program()
    started = {
        **started.to_json(),
        "step": step,
        "processes": jax.process_count(),
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    }
    with open(run / "starts.jsonl", "a") as file:
        file.write(json.dumps(started) + "\n")
    stage.write_atomic(run / "program.diff", diff)
    stage.write_atomic(
        run / "config.json", json.dumps(dataclasses.asdict(settings), indent=1) + "\n"
    )
    spec.save(run / "spec.json")
    if not (run / "tokenizer").exists() and open_storage(packed[0]).copy_to_local(
        "tokenizer", run / "tokenizer.partial"
    ):
        (run / "tokenizer.partial").rename(run / "tokenizer")


def read_parent_losses(run: pathlib.Path, settings: Config) -> dict[str, float] | None:
    """Held-out losses of the model that this run started from, on the same rows: known from its growth."""
    growth = run / "growth.json"
    if growth.is_file():
        found = json.loads(growth.read_text())
        if found["heldout_loss"] and found["heldout_rows"] == settings.train.eval_sequences:
            return found["heldout_loss"]["parent"]
    return None


@contextlib.contextmanager
def handle_save_errors(reraise: bool) -> Iterator[None]:
    """Where a checkpoint could not be written: stop the run, or say so and go on to the next."""
    try:
        yield
    except checkpoint.CheckpointSaveError as failed:
        if reraise:
            raise
        log.info(f"{failed} The run goes on, as train.on_save_error says.")


def check_consecutive_skips(
    consecutive_skips: int, settings: Config, step: int, documents: list[str]
) -> None:
    if consecutive_skips >= settings.train.max_consecutive_skips:
        raise UserError(
            f"train: {consecutive_skips} updates in a row were skipped up to step {step} (not finite, or a spike), which read "
            f"{', '.join(documents[:4])}{f' and {len(documents) - 4} more documents' if len(documents) > 4 else ''}. Lower optim.peak_lr "
            f"({settings.optim.peak_lr:g}), or look at the documents: scripts/trace.py --workdir RUN --step {step} prints them."
        )


def log_fast_paths(spec: ModelSpec, settings: Config, mesh) -> None:
    """Which ways the step takes where there are several, and why."""
    platform = mesh.devices.flat[0].platform
    backend, why = attention.choose_backend(spec, settings, mesh)
    at_a_time = loss.CPU_CHUNK_TOKENS if platform == "cpu" else loss.ACCELERATOR_CHUNK_TOKENS
    products = settings.train.compute_dtype
    if products == "bfloat16" and platform == "cpu":
        products += " (which XLA's CPU turns into float32: slower than train.compute_dtype=float32)"
    elif products == "float32" and platform != "cpu":
        products += " (bfloat16 is several times faster on this device: train.compute_dtype)"
    log.info(
        f"attention: {backend}, {why}; loss: {at_a_time} tokens of a device at a time; products: {products}; backward keeps: {settings.train.remat}"
    )


def format_epochs(epochs: dict[str, float]) -> str:
    return ", ".join(f"{name} {n:.2f} times" for name, n in epochs.items())
