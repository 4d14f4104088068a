"""Extend the context of a trained model from 128 to 1,024 tokens, and measure by position.

    python benchmarks/context.py --text gutenberg/*.txt --to runs/context

For each seed a base learns from sequences of 128 tokens. Its context is extended by rope theta or
by YaRN and measured as it is; then both train on, on sequences of 1,024 tokens, and beside them the
base itself, on as many tokens in sequences of 128. Every model is measured by the loss by position
in held-out documents, and by needles. All of it is jaxpt's own commands; what is there is passed
over.
"""

import argparse
import concurrent.futures
import json
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from growth_runs import paired_interval

from jaxpt.config import defaults
from jaxpt.text import format_table

SHORT, LONG, TOKENS_PER_STEP = 128, 1024, 4096
BASE_STEPS, MORE_STEPS, SEEDS = 800, 100, 3
OPERATORS = {
    "theta": f"extend_context(length={LONG}, theta=500_000)",
    "yarn": f"extend_context(length={LONG}, yarn={LONG // SHORT})",
}


def get_config():
    """Return the recipe of all runs: packed for the longest sequences, trained on short ones."""
    c = defaults()
    c.tokenizer.vocab_size = 1024
    c.pack.seq_len = LONG
    c.prepare.heldout_frac = 0.03
    c.model.n_layers = 4
    c.model.d_model = 96
    c.model.d_ff = 256
    c.model.n_heads = 3
    c.model.n_kv_heads = 3
    c.model.d_head = 32
    c.model.max_seq_len = SHORT
    c.model.tie_embeddings = True
    c.train.steps = BASE_STEPS
    c.train.shape_schedule = ((0, TOKENS_PER_STEP // SHORT, SHORT),)
    c.train.eval_every = c.train.checkpoint_every = BASE_STEPS
    c.train.eval_sequences = 32
    c.optim.peak_lr = 4e-3
    c.optim.warmup_frac = 0.05
    return c


def run(*arguments):
    """Run a jaxpt command in one thread."""
    flags = os.environ | {"XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false"}
    command = [sys.executable, "-m", "jaxpt", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=flags, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}:\n{done.stderr[-2000:]}")


def cut_books(books, to):
    """Write books as documents of some 9,000 characters, longer than the longest context."""
    path = to / "documents.jsonl"
    with open(path, "w", encoding="utf-8") as file:
        for book in sorted(books, key=lambda book: book.name):
            text = book.read_text(encoding="utf-8")
            for start in range(0, len(text) - 9_000, 9_000):
                file.write(json.dumps({"text": text[start : start + 9_000]}) + "\n")
    return path


def train(to, name, seed, *overrides):
    """Train a model, unless it is there."""
    place = to / f"{name}-{seed}"
    packed = f"--config.mixture.packed_paths=('{to}/data/packed',)"
    recipe = ("--config", __file__, "--workdir", place, packed)
    seeds = (f"--config.initialize.seed={seed}", f"--config.mixture.seed={seed}")
    run("train", *recipe, *seeds, *overrides)
    return place


def measure(to, model, max_length):
    """Return a model's results by metric, measured once."""
    results = to / f"{model.parent.name if model.name.isdigit() else model.name}.json"
    if not results.exists():
        texts = f"{to}/data/corpus/heldout/books-*.parquet#text"
        tasks = (f"bits_per_byte/books=parquet:{texts}", f"needle/books=parquet:{texts}")
        flags = ("--by-position", "--max-length", max_length, "--to", results)
        run("evaluate", "--model", model, "--tasks", *tasks, *flags)
    found = {}
    for task, metrics in json.loads(results.read_text())["results"].items():
        for name, value in metrics.items():
            if name.endswith(",none") and "stderr" not in name:
                found[f"{task.split('/')[0]} {name.removesuffix(',none')}"] = value
    return found


def run_seed(to, seed):
    """Return the results of a seed: name of the model -> metrics."""
    base = train(to, "base", seed)
    found = {"base": measure(to, base, SHORT)}
    source = f"--config.initialize.source={base}"
    steps = (f"--config.train.steps={MORE_STEPS}", f"--config.train.eval_every={MORE_STEPS}")
    steps += (f"--config.train.checkpoint_every={MORE_STEPS}", "--config.optim.peak_lr=2e-3")
    again = train(to, "base_trained_on", seed, source, *steps)
    found["base, trained on"] = measure(to, again, SHORT)
    shape = f"--config.train.shape_schedule=((0, {TOKENS_PER_STEP // LONG}, {LONG}),)"
    for name, operator in OPERATORS.items():
        raw = to / f"{name}_alone-{seed}"
        if not raw.exists():
            run("initialize", "--from", base, "--grow", operator, "--to", raw)
        found[f"{name}, as it is"] = measure(to, raw, LONG)
        grow = f'--config.initialize.grow=("{operator}",)'
        place = train(to, name, seed, source, grow, shape, *steps)
        found[f"{name}, trained on"] = measure(to, place, LONG)
    return found


def summarize(values):
    """Return a mean and the half-width of its 95 % interval over the seeds."""
    mean, half, _ = paired_interval(values)
    return f"{mean:.3f} ± {half:.3f}"


def main():
    """Print the table."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--text", required=True, nargs="+", type=pathlib.Path, help="books")
    parser.add_argument("--to", type=pathlib.Path, required=True, metavar="DIR")
    parser.add_argument("--processes", type=int, default=1, help="seeds side by side")
    arguments = parser.parse_args()
    to = arguments.to.absolute()
    to.mkdir(parents=True, exist_ok=True)
    source = f"--config.prepare.sources=('books=jsonl:{cut_books(arguments.text, to)}#text',)"
    data = ("--config", __file__, "--workdir", to / "data")
    run("prepare", *data, source)
    run("train_tokenizer", *data)
    run("pack", *data)
    with concurrent.futures.ThreadPoolExecutor(arguments.processes) as pool:
        seeds = list(pool.map(lambda seed: run_seed(to, seed), range(SEEDS)))
    metrics = [name for name in seeds[0]["yarn, trained on"] if "depth" not in name]
    rows = [["model", *metrics]]
    for model in seeds[0]:
        cells = [[seed[model][m] for seed in seeds if m in seed[model]] for m in metrics]
        rows.append([model, *(summarize(values) if values else "" for values in cells)])
    print(format_table(rows))
    print("minus the base trained on, same seed:")
    for model in ("theta, trained on", "yarn, trained on"):
        for metric in seeds[0]["base"]:
            if "nats" in metric:
                pairs = [s[model][metric] - s["base, trained on"][metric] for s in seeds]
                print(f"{model}: {metric}: {summarize(pairs)}")


if __name__ == "__main__":
    main()
