"""Prune a trained model by a third, and recover it: from its parent, by cross-entropy, or fresh.

    python benchmarks/prune.py --text 'gutenberg/*.txt' --to runs/prune

A parent is trained to the end of its schedule and pruned. For each seed its child trains on
sequences that the parent has not read, other ones for each seed: by distillation from the parent
(a from 0.9 to 0.5) and by cross-entropy alone, each at three learning rates; beside them a model
of its size from scratch. Then other ways of pruning. A finished run is a line of results.jsonl; a
start passes over what is there. Everything runs in one thread.
"""

import argparse
import functools
import json
import os
import pathlib
import statistics
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")

import growth_runs
import jax
import numpy as np
from growth import cut_into_documents

from jaxpt import config, sharding
from jaxpt.config import DistillConfig, MixtureConfig
from jaxpt.data import loader
from jaxpt.data.mixture import MixtureSchedule
from jaxpt.growth import measure
from jaxpt.growth.apply import grow_params
from jaxpt.growth.growth import Parent
from jaxpt.growth.parse import plan_growth
from jaxpt.model import transformer
from jaxpt.text import format_table
from jaxpt.train import gate, state, step

SEEDS = 5
SHAPE = growth_runs.Shape(4, 48)
CHILD_STEPS, WARMUP_STEPS, BATCH_SIZE = 300, 100, 4
PARENT_RATE = 6e-3
RATES = (6e-4, 1.2e-3, 3e-3)  # a tenth, a fifth and a half of it
MAIN = ("narrow(ff=80)", "drop_layers(n=1, by='loss')")
PRUNINGS = {
    "both": MAIN,
    "width": ("narrow(ff=48)",),
    "width, 4 rounds": ("narrow(ff=48, rounds=4)",),
    "depth by influence": ("drop_layers(n=2)",),
    "depth by loss": ("drop_layers(n=2, by='loss')",),
}
T_95 = {2: 4.303, 3: 3.182, 4: 2.776, 9: 2.262}  # Student's, by degrees of freedom


class Experiment:
    """Trains what a table compares.

    Attributes:
        results: the file of finished runs.
    """

    def __init__(self, text: growth_runs.Text, directory: pathlib.Path, parent_steps: int):
        text.make()
        self.parent_steps = parent_steps
        self.results = directory / "results.jsonl"
        self.done = {tuple(line["key"]): line for line in growth_runs.read_results(self.results)}
        self.packed = [pathlib.Path(text.directory) / "packed"]
        self.dataset = loader.open_packed(self.packed)
        self.mesh = sharding.make_mesh(config.MeshConfig(), jax.devices()[:1])
        train = config.TrainConfig(eval_sequences=growth_runs.HELDOUT_SEQUENCES)
        self.heldout = gate.HeldoutData(self.packed, train, True, self.mesh)
        self.directory = directory

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

    def train(self, spec, params, first_step, n_steps, rate, teacher=None):
        """Return parameters trained on the sequences from a step on; the rate falls to 0."""
        warmup = WARMUP_STEPS / n_steps
        optim = config.OptimConfig(
            peak_lr=rate, schedule="linear", warmup_frac=warmup, end_lr_frac=0.0
        )
        train = config.TrainConfig(steps=n_steps, batch_size=BATCH_SIZE)
        teaching = step.Teaching(DistillConfig("parent"), teacher[0]) if teacher else None
        more = (teacher[1],) if teacher else ()
        run = step.build_step(spec, train, optim, growth_runs.SEQ_LEN, self.mesh, teaching=teaching)
        schedule = MixtureSchedule(MixtureConfig(), self.dataset.n_sequences, BATCH_SIZE)
        batches = loader.iterate_batches(
            self.dataset,
            schedule,
            sharding.make_batch_sharding(self.mesh),
            BATCH_SIZE,
            first_step * BATCH_SIZE,
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
        spec = SHAPE.make_spec()
        file = self.directory / f"parent-{self.parent_steps}.npz"
        params = transformer.init_params(spec, 0, self.mesh)
        leaves, structure = jax.tree.flatten(params)
        if file.exists():
            with np.load(file) as stored:
                leaves = [jax.numpy.asarray(stored[name]) for name in stored.files]
            places = transformer.make_param_shardings(spec, self.mesh)
            return spec, jax.device_put(jax.tree.unflatten(structure, leaves), places)
        params = self.train(spec, params, 0, self.parent_steps, PARENT_RATE)
        np.savez(file, *jax.device_get(jax.tree.leaves(params)))
        return spec, params

    def prune(self, operators):
        """Return the parent's child."""
        spec, params = self.parent
        batches = measure.make_measuring_batches(self.packed, BATCH_SIZE, True, self.mesh)
        for operator in operators:
            growth = plan_growth(operator, Parent(spec, params, batches))
            spec, params = growth.child, grow_params(growth, params, self.mesh)
        return spec, params

    def recover(self, operators, seed, rate, distils):
        """Return a child, trained on, and its loss before that."""
        spec, params = self.prune(operators)
        initial = self.measure(spec, params)
        teacher = self.parent if distils else None
        first = self.parent_steps + seed * CHILD_STEPS
        return spec, self.train(spec, params, first, CHILD_STEPS, rate, teacher), initial

    def start_fresh(self, operators, seed):
        """Return a model of a child's size, trained from scratch on as many steps."""
        spec = SHAPE.make_spec()
        for operator in operators:
            spec = plan_growth(operator, Parent(spec)).child
        params = transformer.init_params(spec, seed, self.mesh)
        first = self.parent_steps + seed * CHILD_STEPS
        return spec, self.train(spec, params, first, CHILD_STEPS, PARENT_RATE), None


def run_all(experiment, seeds):
    """Train everything, seed by seed."""
    experiment.record(("parent", PARENT_RATE, 0), lambda: (*experiment.parent, None))
    for seed in range(seeds):
        for rate in RATES:
            for name in ("distilled", "cross-entropy"):
                make = functools.partial(experiment.recover, MAIN, seed, rate, name == "distilled")
                experiment.record((name, rate, seed), make)
    for seed in range(seeds):
        make = functools.partial(experiment.start_fresh, MAIN, seed)
        experiment.record(("fresh", PARENT_RATE, seed), make)
    for seed in range(seeds):
        for name, operators in PRUNINGS.items():
            if operators != MAIN:
                make = functools.partial(experiment.recover, operators, seed, RATES[1], True)
                experiment.record((name, RATES[1], seed), make)


def summarize(values):
    """Return the mean and the half-width of its 95 % interval, as text."""
    mean = statistics.mean(values)
    if len(values) - 1 not in T_95:
        return f"{mean:.4f}"
    half = T_95[len(values) - 1] * statistics.stdev(values) / len(values) ** 0.5
    return f"{mean:.4f} ± {half:.4f}"


def print_table(done):
    """Print every arm, and its difference from the distilled one at its best rate, seed by seed."""
    arms = {}
    for (name, rate, seed), line in done.items():
        arms.setdefault((name, rate), {})[seed] = line
    distilled = {arm: found for arm, found in arms.items() if arm[0] == "distilled"}
    best = min(distilled, key=lambda arm: statistics.mean(x["loss"] for x in arms[arm].values()))
    rows = [["arm", "rate", "n", "parameters", "pruned", "nats per token", "minus distilled"]]
    for (name, rate), found in arms.items():
        pairs = [
            line["loss"] - arms[best][seed]["loss"]
            for seed, line in found.items()
            if seed in arms[best]
        ]
        losses = [line["loss"] for line in found.values()]
        initials = [line["initial"] for line in found.values() if line["initial"]]
        size = f"{next(iter(found.values()))['n_params'] / 1e3:.0f} k"
        before = f"{statistics.mean(initials):.3f}" if initials else ""
        cells = [name, f"{rate:g}", str(len(found)), size, before]
        rows.append([*cells, summarize(losses), summarize(pairs) if pairs else ""])
    print(format_table(rows))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", required=True, help="files of text, as a glob")
    parser.add_argument("--to", type=pathlib.Path, required=True, metavar="DIR")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--parent-steps", type=int, default=2000)
    arguments = parser.parse_args()
    arguments.to.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(arguments.to / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    documents = cut_into_documents(arguments.text, arguments.to)
    text = growth_runs.Text((f"books=jsonl:{documents}#text",), str(arguments.to / "text"))
    experiment = Experiment(text, arguments.to, arguments.parent_steps)
    run_all(experiment, arguments.seeds)
    print_table(experiment.done)


if __name__ == "__main__":
    main()
