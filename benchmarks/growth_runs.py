"""Runs of the growth experiment: chains of segments that share what they have in common.

A run is a chain of segments: a shape, then for each segment an operator or none, steps, and whether
its learning rate falls to 0. The rate is constant before that (warm-up, stable, decay), so that two
runs that begin alike share the state up to where they part: a trunk is trained once for a seed and
a rate, and every length and every growth is a branch of it.

Every process has one core: small matmuls gain little from a second one, and as many runs as there
are cores go on at once. A finished run is a line of the results, and is not trained again.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import itertools
import json
import multiprocessing
import os
import pathlib
import pickle
import resource
import statistics
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import jax
import numpy as np
import scipy.stats

from jaxpt import config, flops, initialize, sharding, stage
from jaxpt.data import loader, pack, prepare, tokenizer
from jaxpt.data.mixture import MixtureSchedule
from jaxpt.growth import measure
from jaxpt.growth.apply import grow_params
from jaxpt.growth.growth import Parent
from jaxpt.growth.new_params import NewParams
from jaxpt.growth.parse import plan_growth
from jaxpt.model import transformer
from jaxpt.model.param import ParamSpec, map_param_specs
from jaxpt.spec import Batch, ModelSpec
from jaxpt.train import gate, state, step
from jaxpt.train.schedule import make_schedule
from jaxpt.train.state import TrainState

SEQ_LEN = 128
VOCAB_SIZE = 1024  # small, so that layers and not the head make up a small model
HELDOUT_SEQUENCES = 256  # of each source, for a result
CURVE_SEQUENCES = 32  # for a point of a curve
SPEED_STEPS, SPEED_ROUNDS = 20, 7  # of a shape, to measure its step
WARMUP_STEPS = 50  # of a run, whatever its budget
D_HEAD = 16


@dataclasses.dataclass(frozen=True)
class Text:
    """The experiment's data: sources of config.prepare, and where their packed sequences are."""

    sources: tuple[str, ...]
    directory: str
    vocab_size: int = VOCAB_SIZE
    seq_len: int = SEQ_LEN

    def settings(self) -> config.Config:
        return config.Config(
            prepare=config.PrepareConfig(sources=self.sources, heldout_frac=0.03),
            tokenizer=config.TokenizerConfig(vocab_size=self.vocab_size, sample_mb=8),
            pack=config.PackConfig(seq_len=self.seq_len),
        )

    def make(self) -> None:
        """Prepare and pack the text, unless that is done."""
        settings = self.settings()
        prepare.prepare_corpus(settings.prepare, self.directory)
        tokenizer.train_tokenizer(settings.tokenizer, self.directory)
        pack.pack_corpus(settings.pack, self.directory)


@dataclasses.dataclass(frozen=True)
class Shape:
    """A model's shape at its start.

    Attributes:
        n_layers: of it.
        d_model: its width.
        experts: more than 0: a mixture, of which a token takes two.
        base: model.base_shape.
        init: name of the initial values, of INITS; "" is jaxpt's.
    """

    n_layers: int
    d_model: int
    experts: int = 0
    base: str = ""
    init: str = ""

    def make_spec(self) -> ModelSpec:
        n_heads = self.d_model // D_HEAD
        spec = ModelSpec(
            n_layers=self.n_layers,
            d_model=self.d_model,
            d_ff=width_of_mlp(self.d_model),
            n_heads=n_heads,
            n_kv_heads=n_heads // 2,
            d_head=D_HEAD,
            vocab_size=VOCAB_SIZE,
            max_seq_len=SEQ_LEN,
            tie_embeddings=True,
        )
        spec = initialize.set_base_shape(spec, self.base)
        if not self.experts:
            return spec
        return spec.replace(
            family="mixtral",
            n_experts=self.experts,
            n_experts_per_token=2,
            norm_topk_prob=True,
            router_aux_loss_coef=0.01,
            router_z_loss_coef=0.001,
        )


# name -> the std of a parameter's initial values, of its path, ParamSpec and number of layers
INITS: dict[str, Callable[[tuple[str, ...], ParamSpec, int], float]] = {
    "embedding 0.1": lambda path, param, L: 0.1 if path == ("embed",) else param.init.std,
    "embedding 1": lambda path, param, L: 1.0 if path == ("embed",) else param.init.std,
    "no 1/sqrt(2L)": lambda path, param, L: param.init.std * scale_of_writers(param, L) ** -1,
    "0.02 and 1/sqrt(2L)": lambda path, param, L: 0.02 * scale_of_writers(param, L),
}


def scale_of_writers(param: ParamSpec, n_layers: int) -> float:
    """Return 1 / sqrt(2L) for what writes into the residual, else 1."""
    return (2 * n_layers) ** -0.5 if param.writes_residual else 1.0


def init_params(shape: Shape, seed: int, mesh: Any) -> Any:
    """Return a shape's initial values."""
    spec = shape.make_spec()
    params = transformer.init_params(spec, seed, mesh)
    if not shape.init:
        return params

    def scale(path: tuple[str, ...], param: ParamSpec, leaf: jax.Array) -> jax.Array:
        std = param.init.std
        return leaf * (INITS[shape.init](path, param, shape.n_layers) / std) if std else leaf

    return map_param_specs(scale, transformer.param_specs(spec), params)


def width_of_mlp(d_model: int) -> int:
    """Return 8/3 of the width, in multiples of 16 (Llama)."""
    return round(d_model * 8 / 3 / 16) * 16


@dataclasses.dataclass(frozen=True)
class Segment:
    """Steps between two changes.

    Attributes:
        n_steps: of it.
        operator: growth before its first step; "" is none.
        decay: the learning rate falls to 0 over it, linearly.
        restart: fresh optimizer and schedule, with a warm-up: a finished model is trained again.
        moments: of the growth.
        shuffled: the tokens of each batch are in another order, the same for all of its sequences.
        peak_lr: of it and its schedule; 0 is the run's.
        text: the part of the sequences that it reads, over and over: from and to, as fractions. The
            segments of one schedule read the same part.
    """

    n_steps: int
    operator: str = ""
    decay: bool = False
    restart: bool = False
    moments: str = "reset_new"
    shuffled: bool = False
    peak_lr: float = 0.0
    text: tuple[float, float] = (0.0, 1.0)


# which the earliest results lack
NEW_FIELDS = {"shuffled": False, "peak_lr": 0.0, "text": (0.0, 1.0)}


@dataclasses.dataclass(frozen=True)
class Run:
    """A run of the experiment. `arm` and `part` are its names in tables; the rest makes it."""

    part: str
    arm: str
    shape: Shape
    segments: tuple[Segment, ...]
    peak_lr: float
    seed: int
    batch_size: int
    n_curve: int = 0  # steps between held-out losses of the last two segments; 0: none

    @property
    def key(self) -> str:
        """Return a name for its result: of what makes it, and what it is called."""
        fields = dataclasses.asdict(self)
        for name in ("base", "init"):  # which the earliest results lack
            if not fields["shape"][name]:
                del fields["shape"][name]
        for segment in fields["segments"]:
            for name, default in NEW_FIELDS.items():
                if segment[name] == default:
                    del segment[name]
        content = json.dumps(fields, sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    @property
    def trunk(self) -> tuple[Any, ...]:
        """Return what runs have in common that share a trunk, for one process to make."""
        peak_lr = self.segments[0].peak_lr or self.peak_lr
        return self.shape, peak_lr, self.seed, self.batch_size


class Reached(NamedTuple):
    """A model in training, after some segments."""

    spec: ModelSpec
    state: TrainState
    new_params: NewParams
    steps_since_start: int  # since the last fresh schedule
    n_steps: int  # of all, which is the position in the data
    flops: float
    cpu_seconds: float


class Trainer:
    """Trains the runs of one trunk, and keeps the states in which they part."""

    def __init__(self, text: Text):
        self.text = text
        self.settings = text.settings()
        self.packed = [pathlib.Path(text.directory) / "packed"]
        self.mesh = sharding.make_mesh(config.MeshConfig(), jax.devices()[:1])
        self.dataset = loader.open_packed(self.packed)
        self.heldout: dict[int, gate.HeldoutData] = {}  # by the number of sequences
        self.states: dict[Any, Any] = {}
        self.steps: dict[Any, step.TrainStep] = {}  # compiled once, whatever the schedule

    def train(self, run: Run, forks: set[Any]) -> dict[str, Any]:
        """Return a run's result. States at `forks` are kept for the runs that follow."""
        curve: list[tuple[int, float]] = []
        reached = self.reach(run, len(run.segments), forks, curve)
        heldout = self.measure_loss(reached.spec, reached.state.params, HELDOUT_SEQUENCES)
        return {
            "key": run.key,
            **dataclasses.asdict(run),
            "layers": reached.spec.n_layers,
            "n_params": transformer.count_params(reached.spec),
            "n_params_without_embedding": count_without_embedding(reached.spec),
            "tokens": reached.n_steps * run.batch_size * SEQ_LEN,
            "flops": reached.flops,
            "cpu_seconds": round(reached.cpu_seconds, 1),
            "heldout": heldout,
            "loss": statistics.mean(heldout.values()),
            "text": stage.fingerprint_path(self.packed[0]),
            "curve": curve,
        }

    def reach(self, run: Run, n_segments: int, forks: set[Any], curve: list) -> Reached:
        """Return the state after a run's first segments, from the longest prefix that is kept."""
        if n_segments == 0:
            spec = run.shape.make_spec()
            params = init_params(run.shape, run.seed, self.mesh)
            start = state.init_state(params, spec, config.OptimConfig(), self.mesh)
            return Reached(spec, start, NewParams(), 0, 0, 0.0, 0.0)
        prefix = fork_key(run, n_segments)
        if prefix in self.states:
            return pickle.loads(self.states[prefix])
        before = self.reach(run, n_segments - 1, forks, curve)
        is_watched = n_segments >= len(run.segments) - 1
        every = run.n_curve if is_watched else 0
        reached = self.run_segment(run, run.segments[n_segments - 1], before, every, curve)
        if prefix in forks:
            self.states[prefix] = pickle.dumps(reached._replace(state=to_host(reached.state)))
        return reached

    def run_segment(
        self, run: Run, segment: Segment, before: Reached, n_curve: int, curve: list
    ) -> Reached:
        """Return what a segment makes of a state."""
        started = cpu_seconds()
        optim = config.OptimConfig(peak_lr=segment.peak_lr or run.peak_lr, schedule="constant")
        now, spec, new_params = before.state, before.spec, before.new_params
        n_since = before.steps_since_start
        if segment.operator:
            parent = Parent(spec, now.params, self.measuring_batches(run))
            growth = plan_growth(segment.operator, parent)
            opt_state, skips, new_params = state.grow_state(
                now, growth, optim, segment.moments, self.mesh, new_params
            )
            params = grow_params(growth, now.params, self.mesh)
            now, spec = TrainState(now.step, params, opt_state, skips), growth.child
        if segment.operator or segment.restart:
            losses = self.measure_loss(spec, now.params, HELDOUT_SEQUENCES)
            curve.append((before.n_steps, statistics.mean(losses.values())))
        if segment.restart:
            now = state.init_state(now.params, spec, optim, self.mesh)
            new_params, n_since = NewParams(), 0
        n_after = n_since + segment.n_steps
        steps = max(n_after, 2)
        optim = dataclasses.replace(optim, schedule="constant", warmup_frac=WARMUP_STEPS / steps)
        if segment.decay:
            optim = dataclasses.replace(
                optim, schedule="wsd", decay_frac=segment.n_steps / n_after, end_lr_frac=0.0
            )
        make_step = self.build_step(spec, run.batch_size, optim, steps, new_params)
        batches = self.batches(run, segment.text, before.n_steps, n_since)
        for done in range(1, segment.n_steps + 1):
            batch = next(batches)
            if segment.shuffled:
                batch = shuffle_tokens(batch, before.n_steps + done)
            now, _ = make_step(now, batch)
            if n_curve and done % n_curve == 0:
                losses = self.measure_loss(spec, now.params, CURVE_SEQUENCES)
                curve.append((before.n_steps + done, statistics.mean(losses.values())))
        jax.block_until_ready(now)
        cost = segment.n_steps * flops_per_step(spec, run.batch_size)
        return Reached(
            spec,
            now,
            new_params,
            n_after,
            before.n_steps + segment.n_steps,
            before.flops + cost,
            before.cpu_seconds + cpu_seconds() - started,
        )

    def build_step(
        self,
        spec: ModelSpec,
        batch_size: int,
        optim: config.OptimConfig,
        steps: int,
        new_params: NewParams,
    ) -> step.TrainStep:
        """Return the step on a schedule; what has grown differently is compiled anew."""
        key = spec, batch_size, repr(new_params.to_record())
        if key not in self.steps:
            # four micro-batches stay in the cache: 8 x 64 takes 0.6 to 0.8 times the CPU time; the
            # router's losses of a mixture would be means over micro-batches
            n_parts = 1 if spec.n_experts else 4
            train = config.TrainConfig(steps=steps, batch_size=batch_size, grad_accum_steps=n_parts)
            self.steps[key] = step.build_step(spec, train, optim, SEQ_LEN, self.mesh, new_params)
        return dataclasses.replace(self.steps[key], schedule=make_schedule(optim, steps))

    def batches(
        self, run: Run, text: tuple[float, float], n_steps: int, n_since: int
    ) -> Iterator[Batch]:
        """Yield the run's batches from a step on. Their order depends on the seed alone.

        Args:
            run: whose batches.
            text: the part of the sequences that they are of, from and to, as fractions.
            n_steps: of the run before them, for all of the text.
            n_since: of the schedule before them, for a part of it.
        """
        mixture = config.MixtureConfig(seed=run.seed)
        schedule = MixtureSchedule(mixture, self.dataset.n_sequences, run.batch_size)
        place = sharding.make_batch_sharding(self.mesh)

        def iterate(step: int) -> Iterator[Batch]:
            position = step * run.batch_size
            return loader.iterate_batches(
                self.dataset, schedule, place, run.batch_size, position, True
            )

        if text == (0.0, 1.0):
            yield from iterate(n_steps)
        n_whole = sum(self.dataset.n_sequences.values()) // run.batch_size
        first, last = (round(share * n_whole) for share in text)
        at = first + n_since % (last - first)
        while True:
            yield from itertools.islice(iterate(at), last - at)
            at = first

    def measuring_batches(self, run: Run) -> Any:
        return measure.make_measuring_batches(self.packed, run.batch_size, True, self.mesh)

    def measure_loss(self, spec: ModelSpec, params: Any, n_sequences: int) -> dict[str, float]:
        """Return held-out nats per token of each source."""
        if n_sequences not in self.heldout:
            train = config.TrainConfig(eval_sequences=n_sequences)
            self.heldout[n_sequences] = gate.HeldoutData(self.packed, train, True, self.mesh)
        return self.heldout[n_sequences].measure_losses(spec, params)


def shuffle_tokens(batch: Batch, seed: int) -> Batch:
    """Return a batch in another order of tokens, each of which predicts the one that follows it."""
    order = np.random.default_rng(seed).permutation(SEQ_LEN)
    tokens = np.asarray(batch.tokens)[:, order]
    mask = np.asarray(batch.loss_mask).copy()
    mask[:, -1] = 0
    shuffled = batch._replace(tokens=tokens, targets=np.roll(tokens, -1, 1), loss_mask=mask)
    return jax.device_put(shuffled, jax.tree.map(lambda leaf: leaf.sharding, batch))


def fork_key(run: Run, n_segments: int) -> Any:
    """Return what the state after a run's first segments depends on."""
    segments = run.segments[:n_segments]
    return run.trunk, segments, tuple(each.peak_lr or run.peak_lr for each in segments)


def to_host(tree: Any) -> Any:
    return jax.tree.map(jax.device_get, tree)


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def flops_per_step(spec: ModelSpec, batch_size: int) -> float:
    return flops.count_flops_per_token(spec, SEQ_LEN) * batch_size * SEQ_LEN


def count_without_embedding(spec: ModelSpec) -> int:
    return transformer.count_params(spec) - spec.vocab_size * spec.d_model


# ---- many runs


def train_all(
    plan: Callable[[list[dict[str, Any]]], list[Run]],
    text: Text,
    results: pathlib.Path,
    n_processes: int,
) -> None:
    """Train what a plan lists, given the results that are there, until it lists nothing new.

    The runs of one trunk are made by one process. Results of another text do not count.
    """
    drop_torn_line(results)
    fingerprint = stage.fingerprint_path(pathlib.Path(text.directory) / "packed")
    while True:
        found = [each for each in read_results(results) if each.get("text") == fingerprint]
        done = {result["key"] for result in found}
        groups: dict[Any, list[Run]] = {}
        for run in plan(found):
            if run.key not in done:
                groups.setdefault(run.trunk, []).append(run)
        if not groups:
            return
        n_runs = sum(map(len, groups.values()))
        print(f"{n_runs} runs to make in {len(groups)} groups", flush=True)
        with open_pool(n_processes) as pool:
            tasks = [
                pool.submit(run_on_core, train_runs, group, text, results)
                for group in groups.values()
            ]
            for task in concurrent.futures.as_completed(tasks):
                task.result()


def measure_all(runs: list[Run], text: Text, results: pathlib.Path) -> None:
    """Measure the speed of a step of what runs train, on one core, and append the results."""
    drop_torn_line(results)
    with open_pool(1) as pool:
        pool.submit(run_on_core, measure_speeds, runs, text, results).result()


def measure_speeds(runs: list[Run], text: Text, results: pathlib.Path) -> None:
    """Append the CPU seconds of a step before and after each run's growth.

    The least of SPEED_ROUNDS, in each of which every shape has its turn: what disturbs a round
    only makes it slower.
    """
    trainer = Trainer(text)
    states, steps = {}, {}
    for run in runs:
        optim = config.OptimConfig(peak_lr=run.peak_lr, schedule="constant")
        for n, segment in enumerate(run.segments, start=1):
            reached = trainer.reach(run, n, set(), [])
            name = name_shape(run.shape, segment.operator)
            states[name] = reached.state
            steps[name] = trainer.build_step(
                reached.spec, run.batch_size, optim, 2, reached.new_params
            )
    batch = next(trainer.batches(runs[0], (0.0, 1.0), 0, 0))
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(SPEED_ROUNDS):
        for name, make_step in steps.items():
            started = cpu_seconds()
            for _ in range(SPEED_STEPS):
                states[name], _ = make_step(states[name], batch)
            jax.block_until_ready(states[name])
            seconds[name].append((cpu_seconds() - started) / SPEED_STEPS)
    with open(results, "a", encoding="utf-8") as file:
        for name, rounds in seconds.items():
            print(f"speed: {name}: {1000 * min(rounds):.1f} ms of a core", flush=True)
            result = {"key": f"speed {name}", "part": "speed", "arm": name}
            result |= {"step_cpu_seconds": min(rounds), "rounds": rounds}
            file.write(json.dumps(result) + "\n")


def name_shape(shape: Shape, operator: str) -> str:
    """Return the name of a shape, grown by an operator or not."""
    name = f"{shape.n_layers} x {shape.d_model}"
    return f"{name}, {operator}" if operator else name


def open_pool(n_processes: int) -> concurrent.futures.ProcessPoolExecutor:
    """Return processes that have one thread and one core each."""
    os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"
    context = multiprocessing.get_context("spawn")
    usable = sorted(os.sched_getaffinity(0))
    cores = context.SimpleQueue()
    for i in range(n_processes):
        cores.put(usable[i % len(usable)])
    return concurrent.futures.ProcessPoolExecutor(
        n_processes, context, keep_cores, (cores,), max_tasks_per_child=1
    )


def keep_cores(cores: Any) -> None:
    """Keep the queue of free cores, in a worker."""
    global free_cores
    free_cores = cores


def run_on_core(
    function: Callable[[list[Run], Text, pathlib.Path], None],
    runs: list[Run],
    text: Text,
    results: pathlib.Path,
) -> None:
    """Call a function of runs on one free core."""
    core = free_cores.get()
    os.sched_setaffinity(0, {core})  # before JAX starts its threads
    try:
        function(runs, text, results)
    finally:
        free_cores.put(core)


def train_runs(runs: list[Run], text: Text, results: pathlib.Path) -> None:
    """Train runs of one trunk, and append each one's result when it is there."""
    trainer = Trainer(text)
    for number, run in enumerate(runs):
        forks = set()
        for other in runs[number + 1 :]:
            forks |= {fork_key(other, n) for n in range(1, len(other.segments))}
        result = trainer.train(run, forks)
        with open(results, "a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")
        print(
            f"{run.part}: {run.arm}, rate {run.peak_lr:g}, seed {run.seed}: {result['loss']:.4f} "
            f"nats, {result['flops']:.3g} FLOPs, {result['cpu_seconds']:.0f} s",
            flush=True,
        )


def drop_torn_line(results: pathlib.Path) -> None:
    """Drop the result that a kill cut, so that the next one begins a line."""
    if results.exists():
        content = results.read_bytes()
        results.write_bytes(content[: content.rfind(b"\n") + 1])


def read_results(results: pathlib.Path) -> list[dict[str, Any]]:
    """Return all results of a file, but for one that is being written."""
    if not results.exists():
        return []
    lines = results.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def paired_interval(differences: list[float]) -> tuple[float, float, float]:
    """Return (mean, half of its 95 % t interval, p of a mean of 0)."""
    n = len(differences)
    error = statistics.stdev(differences) / n**0.5
    half = float(scipy.stats.t.ppf(0.975, n - 1)) * error
    p = float(scipy.stats.ttest_1samp(differences, 0).pvalue)
    return statistics.mean(differences), half, p
