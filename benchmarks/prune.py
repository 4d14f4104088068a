"""Prune trained models, and recover them: from their parent, by cross-entropy, or fresh.

    python benchmarks/prune.py third --text gutenberg/*.txt --to runs/prune
    python benchmarks/prune.py lesson --to runs/prune_lesson

`third`: a parent is trained to the end of its schedule and loses a third of its parameters. For
each seed its child trains on sequences that the parent has not read, other ones for each seed: by
distillation from the parent (a from 0.9 to 0.5) and by cross-entropy alone, each at four learning
rates; beside them a model of its size from scratch. Then other ways of pruning.

`lesson`: a parent of 12 layers, as wide as the quickstart's model and on its text, cut to 10 as the
course's lesson does (without layers 5 and 6) and by measure, with and without its parent's help.

A finished run is a line of DIR/PART-STEPS.jsonl; a start passes over what is there. Everything runs
in one thread; once the parent is there, `--seed N` makes the runs of one seed, for seeds side by
side.
"""

import argparse
import dataclasses
import functools
import json
import os
import pathlib
import statistics
import sys
from typing import Literal, NamedTuple

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")

import growth_runs
import jax
import numpy as np
from growth import cut_into_documents

from jaxpt import config, initialize, sharding
from jaxpt.config import DistillConfig, MixtureConfig
from jaxpt.data import loader
from jaxpt.data.mixture import MixtureSchedule
from jaxpt.growth import measure
from jaxpt.growth.apply import grow_params
from jaxpt.growth.growth import Parent
from jaxpt.growth.parse import plan_growth
from jaxpt.model import transformer
from jaxpt.spec import ModelSpec
from jaxpt.text import format_table
from jaxpt.train import gate, state, step

MAIN = ("narrow(ff=80)", "drop_layers(n=1, by='loss')")
PRUNINGS = {
    "width": ("narrow(ff=48)",),
    "width, 4 rounds": ("narrow(ff=48, rounds=4)",),
    "depth by influence": ("drop_layers(n=2)",),
    "depth by loss": ("drop_layers(n=2, by='loss')",),
}
LESSON = ("drop_layers(by=[5, 6])",)
MEASURED = ("drop_layers(n=2, by='loss')",)


class Arm(NamedTuple):
    """How a child is pruned (from scratch: to which shape), its rate, and what it learns from."""

    name: str
    operators: tuple[str, ...]
    rate: float
    learns_from: Literal["parent", "text", "nothing before"]


@dataclasses.dataclass(frozen=True)
class Setting:
    """A parent, and how its children train. The first arm is the one that others compare with."""

    spec: ModelSpec
    batch_size: int
    parent_rate: float
    parent_steps: int
    child_steps: int
    child_warmup: int  # steps
    seeds: int
    arms: tuple[Arm, ...]


def make_third() -> Setting:
    """Return the setting of `third`: rates from a tenth of the parent's to all of it."""
    rate = 6e-3
    arms = []
    for share in (5, 10, 2, 1):
        arms.append(Arm("distilled", MAIN, rate / share, "parent"))
        arms.append(Arm("cross-entropy", MAIN, rate / share, "text"))
    arms.append(Arm("fresh", MAIN, rate, "nothing before"))
    arms += [Arm(name, each, rate / 5, "parent") for name, each in PRUNINGS.items()]
    return Setting(growth_runs.Shape(4, 48).make_spec(), 4, rate, 2000, 300, 100, 5, tuple(arms))


def make_lesson() -> Setting:
    """Return the setting of `lesson`."""
    quickstart = config.load_config(str(ROOT / "configs/quickstart.py"))
    spec = initialize.make_random_spec(quickstart.model, quickstart.tokenizer.vocab_size)
    rate = quickstart.optim.peak_lr
    arms = (
        Arm("by loss, distilled", MEASURED, rate / 5, "parent"),
        Arm("the lesson's, distilled", LESSON, rate / 5, "parent"),
        Arm("the lesson's, cross-entropy", LESSON, rate / 5, "text"),
        Arm("by loss, cross-entropy", MEASURED, rate / 5, "text"),
        Arm("fresh", LESSON, rate, "nothing before"),
    )
    return Setting(spec.replace(n_layers=12), 8, rate, 1200, 100, 30, 3, arms)


class Experiment:
    """Trains what a table compares.

    Attributes:
        results: the file of finished runs.
    """

    def __init__(self, part: str, setting: Setting, text: growth_runs.Text, to: pathlib.Path):
        text.make()
        self.setting = setting
        self.directory = to
        self.results = to / f"{part}-{setting.parent_steps}.jsonl"
        self.done = {tuple(line["key"]): line for line in growth_runs.read_results(self.results)}
        self.packed = [pathlib.Path(text.directory) / "packed"]
        self.dataset = loader.open_packed(self.packed)
        self.seq_len = text.seq_len
        self.mesh = sharding.make_mesh(config.MeshConfig(), jax.devices()[:1])
        train = config.TrainConfig(eval_sequences=growth_runs.HELDOUT_SEQUENCES)
        self.heldout = gate.HeldoutData(self.packed, train, True, self.mesh)

    def run_all(self, seeds):
        """Train everything, seed by seed."""
        setting = self.setting
        self.record(("parent", setting.parent_rate, 0), lambda: (*self.parent, None))
        for seed in seeds:
            for arm in setting.arms:
                self.record((arm.name, arm.rate, seed), lambda a=arm, s=seed: self.make(a, s))

    def record(self, key, make):
        """Keep what a run reached, unless it is there."""
        if key in self.done:
            return
        spec, params, initial = make()
        line = {"key": key, "initial": initial, "loss": self.measure(spec, params)}
        line["n_params"] = transformer.count_params(spec)
        self.done[key] = line
        with self.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print(*key, f"{line['loss']:.4f}", flush=True)

    def measure(self, spec, params):
        """Return held-out nats per token, mean over the sources."""
        return statistics.mean(self.heldout.measure_losses(spec, params).values())

    def make(self, arm, seed):
        """Return a child after its training, and its loss before that (None: from scratch)."""
        setting = self.setting
        first = setting.parent_steps + seed * setting.child_steps
        if arm.learns_from == "nothing before":
            spec = setting.spec
            for operator in arm.operators:
                spec = plan_growth(operator, Parent(spec)).child
            params, initial = transformer.init_params(spec, seed, self.mesh), None
        else:
            spec, params = self.prune(arm.operators)
            initial = self.measure(spec, params)
        teacher = self.parent if arm.learns_from == "parent" else None
        warmup = setting.child_warmup
        params = self.train(spec, params, first, setting.child_steps, warmup, arm.rate, teacher)
        return spec, params, initial

    def train(self, spec, params, first_step, n_steps, n_warmup, rate, teacher=None):
        """Return parameters trained on the sequences from a step on; the rate falls to 0."""
        optim = config.OptimConfig(
            peak_lr=rate, schedule="linear", warmup_frac=n_warmup / n_steps, end_lr_frac=0.0
        )
        batch_size = self.setting.batch_size
        train = config.TrainConfig(
            steps=n_steps,
            batch_size=batch_size,
            grad_accum_steps=batch_size * self.seq_len // 512,  # they stay in the cache
        )
        distill_spec = step.DistillSpec(DistillConfig("parent"), teacher[0]) if teacher else None
        more = (teacher[1],) if teacher else ()
        run = step.build_step(
            spec, train, optim, self.seq_len, self.mesh, distill_spec=distill_spec
        )
        schedule = MixtureSchedule(MixtureConfig(), self.dataset.n_sequences, batch_size)
        batches = loader.iterate_batches(
            self.dataset,
            schedule,
            sharding.make_batch_sharding(self.mesh),
            batch_size,
            first_step * batch_size,
            True,
        )
        now = state.init_state(jax.tree.map(lambda x: x + 0, params), spec, optim, self.mesh)
        for _ in range(n_steps):
            now, _ = run(now, next(batches), *more)
        batches.close()
        return jax.block_until_ready(now.params)

    @functools.cached_property
    def parent(self):
        """Return the parent's spec and parameters, trained once."""
        setting = self.setting
        spec, n_steps = setting.spec, setting.parent_steps
        file = self.directory / f"{self.results.stem}.npz"
        params = transformer.init_params(spec, 0, self.mesh)
        leaves, structure = jax.tree.flatten(params)
        if file.exists():
            with np.load(file) as stored:
                leaves = [jax.numpy.asarray(stored[name]) for name in stored.files]
            places = transformer.make_param_shardings(spec, self.mesh)
            return spec, jax.device_put(jax.tree.unflatten(structure, leaves), places)
        params = self.train(spec, params, 0, n_steps, n_steps // 20, setting.parent_rate)
        np.savez(file, *jax.device_get(jax.tree.leaves(params)))
        return spec, params

    @functools.cache  # noqa: B019
    def prune(self, operators):
        """Return the parent's child."""
        spec, params = self.parent
        batches = measure.make_measuring_batches(
            self.packed, self.setting.batch_size, True, self.mesh
        )
        for operator in operators:
            growth = plan_growth(operator, Parent(spec, params, batches))
            print(operator, growth.measured or "", flush=True)
            spec, params = growth.child, grow_params(growth, params, self.mesh)
        return spec, params


def summarize(values):
    """Return the mean and the half-width of its 95 % interval, as text."""
    if len(set(values)) < 2:
        return f"{values[0]:.4f}"
    mean, half, _ = growth_runs.paired_interval(values)
    return f"{mean:.4f} ± {half:.4f}"


def print_table(experiment):
    """Print every arm, and its difference from the first one at its best rate, seed by seed."""
    arms = {}
    for (name, rate, seed), line in experiment.done.items():
        arms.setdefault((name, rate), {})[seed] = line
    rates = {rate for name, rate in arms if name == experiment.setting.arms[0].name}
    firsts = [arms[experiment.setting.arms[0].name, rate] for rate in rates]
    first = min(firsts, key=lambda found: statistics.mean(x["loss"] for x in found.values()))
    rows = [["arm", "rate", "n", "parameters", "pruned", "nats per token", "minus the first"]]
    for (name, rate), found in arms.items():
        pairs = [line["loss"] - first[seed]["loss"] for seed, line in found.items()]
        losses = [line["loss"] for line in found.values()]
        initials = [line["initial"] for line in found.values() if line["initial"]]
        size = f"{next(iter(found.values()))['n_params'] / 1e3:.0f} k"
        before = f"{statistics.mean(initials):.3f}" if initials else ""
        cells = [name, f"{rate:g}", str(len(found)), size, before]
        rows.append([*cells, summarize(losses), summarize(pairs)])
    print(format_table(rows))


def main():
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("part", choices=("third", "lesson"))
    parser.add_argument("--text", nargs="+", type=pathlib.Path, help="books (third)")
    parser.add_argument("--to", type=pathlib.Path, required=True, metavar="DIR")
    parser.add_argument("--seed", type=int, help="make the runs of this seed (all)")
    arguments = parser.parse_args()
    to = arguments.to
    to.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(to / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    if arguments.part == "third":
        if not arguments.text:
            parser.error("third needs --text")
        documents = to / "documents.jsonl"
        cut_into_documents(arguments.text, documents)
        setting = make_third()
        text = growth_runs.Text((f"books=jsonl:{documents}#text",), str(to / "text"))
    else:
        setting = make_lesson()
        spec = setting.spec
        text = growth_runs.Text(
            ("python:prose",), str(to / "text"), spec.vocab_size, spec.max_seq_len
        )
    experiment = Experiment(arguments.part, setting, text, to)
    experiment.run_all(range(setting.seeds) if arguments.seed is None else [arguments.seed])
    print_table(experiment)


if __name__ == "__main__":
    main()
