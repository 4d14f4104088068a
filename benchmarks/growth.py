"""What growing is worth, measured: every operator after the same few hundred steps, and the fair
test of up-scaling.

`operators`  one base, trained; each operator's grown model: held-out loss at initialization and
after the same steps on the same rows
`fair`       FLOPs and tokens to one held-out loss: from scratch, depth_upscale, stack, deepen
(inside the run) and the base
             simply trained on; several seeds; with and without the base's own cost

    python benchmarks/growth.py operators fair --text 'gutenberg/*.txt' --to runs/growth
"""

import argparse
import dataclasses
import glob
import json
import pathlib
import statistics
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import jax

from jaxpt import config, flops, sharding, stage
from jaxpt.data import loader, pack, prepare, tokenizer
from jaxpt.data.mixture import MixtureSchedule
from jaxpt.growth import measure
from jaxpt.growth.apply import grow_params
from jaxpt.growth.growth import Parent
from jaxpt.growth.new_params import NewParams
from jaxpt.growth.parse import plan_growth
from jaxpt.model import transformer
from jaxpt.spec import ModelSpec
from jaxpt.train import gate, optimizer, state, step

BASE = config.Config(
    prepare=config.PrepareConfig(heldout_frac=0.05),
    tokenizer=config.TokenizerConfig(vocab_size=2048, sample_mb=8),
    pack=config.PackConfig(seq_len=128),
    model=config.ModelConfig(
        n_layers=6,
        d_model=96,
        d_ff=256,
        n_heads=4,
        n_kv_heads=2,
        d_head=24,
        vocab_size=2048,
        max_seq_len=128,
        tie_embeddings=True,
    ),
    train=config.TrainConfig(steps=100_000, batch_size=8, eval_sequences=64),
    optim=config.OptimConfig(peak_lr=3e-3, schedule="constant", warmup_steps=20),
)
BASE_STEPS = 1000  # of the base of `operators`
AFTER = 200  # steps of every grown model
OPERATORS = [
    "depth_upscale(m=2)",
    "stack(g=2)",
    "interleave(g=2)",
    "stack_middle(m=2)",
    "deepen(L=8)",
    "deepen(L=8, new='copy')",
    "insert_identity(every=3)",
    "predict_layers(m=2)",
    "widen(d=192)",
    "widen(ff=512, heads=8)",
    "widen(d=192, ff=512, heads=8)",
    "widen(d=192, ff=512, heads=8, noise=0.2)",
    "widen_rms(d=144, ff=384)",
    "drop_layers(n=1)",
    "layers([0, 1, 2, 4, 5])",
    "narrow(ff=192)",
    "narrow(d=72, ff=192, heads=2)",
]
DEEP = 8  # layers of every grown model in the fair test
FAIR_STEPS = 400  # of the scratch arm, whose last loss is the one to reach
EVERY = 20  # steps between measurements


class Bench:
    """Rows of one text, and training on them."""

    def __init__(self, text: str, out: pathlib.Path):
        self.settings = dataclasses.replace(
            BASE, prepare=dataclasses.replace(BASE.prepare, sources=(text,))
        )
        for make in (prepare.prepare_corpus, tokenizer.train_tokenizer, pack.pack_corpus):
            make(self.settings, out)
        self.packed = [out / "packed"]
        self.mesh = sharding.make_mesh(config.MeshConfig())
        self.rows = loader.open_packed(self.packed)
        self.heldout = gate.HeldoutData(
            self.packed, self.settings.train, self.settings.mixture.document_mask, self.mesh
        )
        self.measuring = measure.make_measuring_batches(
            self.packed,
            self.settings.train.batch_size,
            self.settings.mixture.document_mask,
            self.mesh,
        )

    def loss(self, spec, params) -> float:
        return statistics.mean(self.heldout.measure_losses(spec, params).values())

    def train(
        self,
        spec,
        now,
        n_steps: int,
        *,
        first_row: int,
        seed: int = 0,
        every: int = 0,
        until: float = 0.0,
        new_params=NewParams(),
    ):
        """(state after n_steps, or after `until` is reached; [(steps, held-out loss)] every so
        many)
        """
        mixture = MixtureSchedule(
            dataclasses.replace(self.settings.mixture, seed=seed),
            self.rows.n_sequences,
            self.settings.train.batch_size,
        )
        batches = loader.iterate_batches(
            self.rows,
            mixture,
            sharding.make_batch_sharding(self.mesh),
            self.settings.train.batch_size,
            first_row,
            True,
        )
        train, optim = self.settings.train, self.settings.optim
        seq_len = self.settings.pack.seq_len
        run = step.build_step(spec, train, optim, seq_len, self.mesh, new_params)
        curve = []
        for done in range(1, n_steps + 1):
            now, _ = run(now, next(batches))
            if every and done % every == 0:
                curve.append((done, self.loss(spec, now.params)))
                if curve[-1][1] <= until:
                    break
        return now, curve

    def init_state(self, spec, params):
        return state.init_state(
            jax.tree.map(lambda x: x.copy(), params), spec, self.settings.optim, self.mesh
        )

    def random(self, n_layers: int, seed: int):
        shape = dataclasses.asdict(self.settings.model) | {"n_layers": n_layers}
        spec = ModelSpec(**shape)
        return spec, transformer.init_params(spec, seed, self.mesh)

    def flops_per_step(self, spec) -> float:
        tokens = self.settings.train.batch_size * self.settings.pack.seq_len
        return flops.count_flops_per_token(spec, self.settings.pack.seq_len) * tokens


def operators(bench: Bench) -> list[dict]:
    spec, params = bench.random(BASE.model.n_layers, 0)
    base, _ = bench.train(spec, bench.init_state(spec, params), BASE_STEPS, first_row=0)
    params, first_row = base.params, BASE_STEPS * BASE.train.batch_size
    table = []

    def measure(name, spec, params, exact):
        initial_loss = bench.loss(spec, params)
        start = time.monotonic()
        now, _ = bench.train(spec, bench.init_state(spec, params), AFTER, first_row=first_row)
        table.append(
            {
                "operator": name,
                "layers": spec.n_layers,
                "width": spec.d_model,
                "n_params": transformer.count_params(spec),
                "exact": exact,
                "initial_loss": initial_loss,
                "after": bench.loss(spec, now.params),
                "seconds": time.monotonic() - start,
            }
        )
        print(row(table[-1]), flush=True)

    print(
        f"\nbase: {BASE_STEPS} steps\n\n| operator | layers x width | "
        f"parameters | keeps the function | loss at initialization | after {AFTER} "
        "steps | seconds |"
    )
    print("|---|---|---|---|---|---|---|")
    measure("(the base, trained on)", spec, params, True)
    for text in OPERATORS:
        grew = plan_growth(text, Parent(spec, params, bench.measuring))
        measure(text, grew.child, grow_params(grew, params, bench.mesh), grew.preserves_function)
    return table


def row(each: dict) -> str:
    return (
        f"| `{each['operator']}` | {each['layers']} x {each['width']} | "
        f"{each['n_params'] / 1e3:,.0f} k | "
        f"{'yes' if each['exact'] else 'no'} "
        f"| {each['initial_loss']:.3f} | {each['after']:.3f} | {each['seconds']:.0f} |"
    )


def fair(bench: Bench, seeds: int) -> list[dict]:
    """For every seed: the scratch arm's best loss is the target; each other arm's steps until it
    gets there, at most twice as many.
    """
    found = []
    for seed in range(seeds):
        spec, params = bench.random(DEEP, seed)
        _, curve = bench.train(
            spec, bench.init_state(spec, params), FAIR_STEPS, first_row=0, seed=seed, every=EVERY
        )
        steps, target = min(curve, key=lambda point: point[1])
        scratch = steps * bench.flops_per_step(spec)
        found.append(arm("scratch", seed, target, bench, spec, steps, 0, 0.0, scratch))
        for name, n_base, n_base_steps, text in (
            ("depth_upscale", 6, 200, "depth_upscale(m=2)"),
            ("stack", 4, 200, "stack(g=2)"),
            (
                "deepen",
                1,
                280,
                f"deepen(L={DEEP})",
            ),  # 70 % of the scratch arm's steps, then the jump
            ("base trained on", 6, 200, None),
        ):
            base_spec, params = bench.random(n_base, seed)
            now, _ = bench.train(
                base_spec, bench.init_state(base_spec, params), n_base_steps, first_row=0, seed=seed
            )
            spec, new_params = base_spec, NewParams()
            if text:
                grew = plan_growth(text, Parent(base_spec, now.params))
                opt, skip_state, new_params = state.grow_state(
                    now, grew, bench.settings.optim, "reset_new", bench.mesh
                )
                spec = grew.child
                now = state.TrainState(
                    now.step, grow_params(grew, now.params, bench.mesh), opt, skip_state
                )
            first_row = n_base_steps * BASE.train.batch_size
            _, curve = bench.train(
                spec,
                now,
                2 * FAIR_STEPS,
                first_row=first_row,
                seed=seed,
                every=EVERY,
                until=target,
                new_params=new_params,
            )
            steps = crossing(curve, target)
            base_cost = n_base_steps * bench.flops_per_step(base_spec)
            found.append(
                arm(name, seed, target, bench, spec, steps, n_base_steps, base_cost, scratch)
            )
    print(
        "\n| arm | reached | tokens, child alone | tokens, base counted | "
        "FLOPs saved, child alone | FLOPs saved, base counted "
        "|\n|---|---|---|---|---|---|"
    )
    best = {"saved": 0.0, "saved_alone": 0.0}
    for name in dict.fromkeys(each["arm"] for each in found):
        mine = [each for each in found if each["arm"] == name]
        done = [each for each in mine if each["steps"] is not None]
        columns = (
            ("tokens", "{:,.0f}"),
            ("all_tokens", "{:,.0f}"),
            ("saved_alone", "{:.0%}"),
            ("saved", "{:.0%}"),
        )
        cells = [spread([each[key] for each in done], form) for key, form in columns]
        if len(done) == seeds:
            best = {
                key: max(before, statistics.mean(each[key] for each in done))
                for key, before in best.items()
            }
        print(f"| {name} | {len(done)} of {len(mine)} | {' | '.join(cells)} |")
    held = (
        "held"
        if best["saved"] >= 0.7
        else "held only with the base for nothing"
        if best["saved_alone"] >= 0.7
        else "did not hold"
    )
    print(
        f"\n70 % fewer FLOPs {held}: the best arm saved {best['saved']:.0%} "
        f"with the base's cost, {best['saved_alone']:.0%} without, on average."
    )
    return found


def arm(name, seed, target, bench, spec, steps, n_base_steps, base_cost, scratch) -> dict:
    tokens_per_step = bench.settings.train.batch_size * bench.settings.pack.seq_len
    cost = None if steps is None else steps * bench.flops_per_step(spec)
    each = {
        "arm": name,
        "seed": seed,
        "target": target,
        "steps": steps,
        "tokens": None if steps is None else steps * tokens_per_step,
        "all_tokens": None if steps is None else (steps + n_base_steps) * tokens_per_step,
        "flops": cost,
        "base_flops": base_cost,
        "saved_alone": None if cost is None else 1 - cost / scratch,
        "saved": None if cost is None else 1 - (cost + base_cost) / scratch,
    }
    print(json.dumps(each), flush=True)
    return each


def crossing(curve: list[tuple[int, float]], target: float) -> float | None:
    """Steps at which the curve first reaches the target, by a line between two measurements."""
    before = None
    for steps, loss in curve:
        if loss <= target:
            return (
                float(steps)
                if before is None
                else before[0] + (steps - before[0]) * (before[1] - target) / (before[1] - loss)
            )
        before = steps, loss
    return None


def spread(values: list[float], form: str) -> str:
    return (
        (
            f"{form.format(statistics.mean(values))} ({form.format(min(values))} "
            f"to {form.format(max(values))})"
        )
        if values
        else "not reached"
    )


def pieces(pattern: str, out: pathlib.Path) -> pathlib.Path:
    """Whole books as a file of documents of about 4,000 characters, cut between paragraphs: a few
    books leave none to hold out.
    """
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "pieces.jsonl", "w", encoding="utf-8") as file:
        for book in sorted(glob.glob(pattern)):
            piece: list[str] = []
            for paragraph in pathlib.Path(book).read_text(encoding="utf-8").split("\n\n"):
                piece.append(paragraph)
                if sum(map(len, piece)) > 4000:
                    file.write(json.dumps({"text": "\n\n".join(piece)}) + "\n")
                    piece = []
    return out / "pieces.jsonl"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="+", choices=["operators", "fair"])
    parser.add_argument(
        "--text",
        default="python:prose",
        help="text files as a glob, or any source of config.prepare.sources",
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--to", type=pathlib.Path, required=True)
    arguments = parser.parse_args()
    text = (
        arguments.text
        if ":" in arguments.text
        else f"books=jsonl:{pieces(arguments.text, arguments.to)}#text"
    )
    bench = Bench(text, arguments.to)
    for part in arguments.parts:
        found = operators(bench) if part == "operators" else fair(bench, arguments.seeds)
        (arguments.to / f"{part}.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    stage.entry_point(main)
