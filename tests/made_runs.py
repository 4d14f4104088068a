"""Make run directories without training, for tests of the report; parse its page."""

import html.parser
import json
import math
import random

from jaxpt import config, stage

SPEC = {
    "n_layers": 5,
    "d_model": 96,
    "d_ff": 256,
    "n_heads": 6,
    "n_kv_heads": 2,
    "d_head": 16,
    "vocab_size": 1024,
    "max_seq_len": 512,
    "norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "tie_embeddings": True,
    "qkv_bias": False,
    "out_bias": False,
    "mlp_bias": False,
    "qk_norm": False,
    "sliding_window": None,
    "bos_id": 1,
    "eos_ids": [2],
}
HOSTILE = (
    "<script>document.title = 'hostile'</script> & "
    "<img src=https://example.org/x.png onerror=alert(1)>"
)


def write_runs(root):
    """Write a base and the child grown from it: only JSON, of the size of a quickstart."""
    base, child = root / "base", root / "child"
    write_data(base)
    write_run(
        base,
        SPEC,
        seed=1,
        steps=300,
        start=6.93,
        floor=3.72,
        initialize={"source": "random", "grow": []},
        seconds=141.0,
    )
    grown = {**SPEC, "n_layers": 8}
    write_run(
        child,
        grown,
        seed=2,
        steps=180,
        start=4.31,
        floor=3.49,
        initialize={"source": str(base), "grow": ["depth_upscale(m=1)"]},
        seconds=118.0,
        base=base,
    )
    write_json(child / "growth.json", growth(parent=str(base / "checkpoints" / "300")))
    for run, offset in ((base, 0.0), (child, -0.07)):
        for backend, seconds in (("jax", 11.4), ("hf", 37.9)):
            write_json(
                run / "eval" / f"{backend}.json",
                {
                    "results": {
                        "bits_per_byte/prose": {
                            "bits_per_byte,none": 2.113 + offset,
                            "loss_sum": 8.1e5,
                            "n_bytes": 5.5e5,
                            "n_tokens": 2.1e5,
                        },
                        "bits_per_byte/code": {"bits_per_byte,none": 1.702 + offset / 2},
                        "truthfulqa_mc2": {
                            "alias": "truthfulqa_mc2",
                            "acc,none": 0.461 - offset,
                            "acc_stderr,none": 0.048,
                        },
                        "winogrande": {
                            "alias": "winogrande",
                            "acc,none": 0.512 - offset / 3,
                            "acc_stderr,none": 0.035,
                        },
                    },
                    "higher_is_better": {
                        "bits_per_byte/prose": {"bits_per_byte": False},
                        "bits_per_byte/code": {"bits_per_byte": False},
                        "truthfulqa_mc2": {"acc": True},
                        "winogrande": {"acc": True},
                    },
                    "contamination": {
                        "ngram": 13,
                        "corpora": {str(base / "corpus"): 41_285},
                        "unknown": [],
                        "tasks": {
                            "truthfulqa_mc2": {
                                "items": 100,
                                "overlapping": 3,
                                "short": 0,
                                "without": {"acc,none": 0.447 - offset, "acc_stderr,none": 0.052},
                                "examples": [
                                    {
                                        "item": "41",
                                        "shared": "if you crack your knuckles a lot you may "
                                        + HOSTILE,
                                        "document": "web/8812",
                                    }
                                ],
                            },
                            "winogrande": {
                                "items": 200,
                                "overlapping": 0,
                                "short": 17,
                                "examples": [],
                                "without": {
                                    "acc,none": 0.512 - offset / 3,
                                    "acc_stderr,none": 0.035,
                                },
                            },
                        },
                    },
                    "n-samples": {
                        "truthfulqa_mc2": {"original": 817, "effective": 100},
                        "winogrande": {"original": 1267, "effective": 200},
                    },
                    "model": str(run / "hf" if backend == "hf" else run / "checkpoints" / "300"),
                    "backend": backend,
                    "seconds": seconds,
                },
            )
    write_json(
        child / "eval" / "samples.json",
        {
            "models": ["base", "child"],
            "settings": {"temperature": 0.0, "max_new_tokens": 48, "repetition_penalty": 1.1},
            "prompts": [
                {
                    "prompt": "I am an engineer. I love",
                    "outputs": [
                        {
                            "model": "base",
                            "text": " the first of the house, and the old man had been "
                            "a great many of the people, "
                            "and that he was not to be seen",
                            "tokens": 48,
                            "seconds": 0.61,
                        },
                        {
                            "model": "child",
                            "text": " my mother, and I have not seen a better house in "
                            "all the country, "
                            "said the old man; but there is no more to do with it.",
                            "tokens": 48,
                            "seconds": 0.88,
                        },
                    ],
                },
                {
                    "prompt": "def find_max(numbers):",
                    "outputs": [
                        {
                            "model": "base",
                            "text": '\n    """Return the number of the value."""\n    '
                            "if self.name is None:"
                            "\n        return self._value\n    return self",
                            "tokens": 48,
                            "seconds": 0.6,
                        },
                        {
                            "model": "child",
                            "text": "\n    "
                            + HOSTILE
                            + "\n    for number in numbers:\n        if number > result:\n"
                            + "            result = number\n    return result",
                            "tokens": 48,
                            "seconds": 0.9,
                        },
                    ],
                },
            ],
        },
    )
    write_json(
        child / "eval" / "differences.json",
        {
            "models": ["base", "child"],
            "documents": 53,
            "max_length": 512,
            "better": [
                {
                    "source": "code",
                    "id": "code/lib/heapq.py",
                    "tokens": 498,
                    "nats": [3.301, 2.618],
                    "first_token": 40,
                    "pieces": ["def", " heap", "push", "(", HOSTILE, ", item):"],
                    "losses": [[4.1, 3.9, 2.2, 0.5, 6.0, 3.0], [1.2, 3.8, 1.4, 0.5, 4.5, 3.1]],
                }
            ],
            "worse": [
                {
                    "source": "prose",
                    "id": "prose/moby.txt:18",
                    "tokens": 512,
                    "nats": [3.61, 3.88],
                    "first_token": 0,
                    "pieces": ["Call", " me", " Ishmael"],
                    "losses": [[5.0, 2.0, 7.0], [5.8, 2.2, 9.9]],
                }
            ],
        },
    )
    write_json(
        child / "plan.json",
        {
            "targets": [
                {
                    "on": "h100:1",
                    "method": "compiled",
                    "devices": 1,
                    "fits": True,
                    "peak_bytes_per_device": 61.2e9,
                    "tokens_per_second": 41_300,
                    "hours": 262.0,
                    "usd": 786.0,
                },
                {
                    "on": "h100:8",
                    "method": "compiled",
                    "devices": 8,
                    "fits": True,
                    "peak_bytes_per_device": 22.9e9,
                    "tokens_per_second": 318_000,
                    "hours": 34.1,
                    "usd": 818.0,
                },
                {
                    "on": "v5e:4x4",
                    "method": "compiled",
                    "devices": 16,
                    "fits": True,
                    "peak_bytes_per_device": 11.7e9,
                    "tokens_per_second": 201_000,
                    "hours": 53.9,
                    "usd": 1035.0,
                },
                {
                    "on": "v5p:2x2x2",
                    "method": "estimated",
                    "devices": 8,
                    "fits": True,
                    "peak_bytes_per_device": 25.1e9,
                    "tokens_per_second": 272_000,
                    "hours": 39.8,
                    "usd": 1337.0,
                },
                {
                    "on": "l4:8",
                    "method": "estimated",
                    "devices": 8,
                    "fits": False,
                    "peak_bytes_per_device": 31.0e9,
                    "tokens_per_second": 42_000,
                    "hours": 258.0,
                    "usd": 1445.0,
                },
            ]
        },
    )
    return base, child


def growth(**changes):
    """growth.json of a stack of 5 layers that became 8, everything measured."""
    layer = lambda i, influence: {"rms": 0.05 * 1.9**i, "influence": influence}
    return {
        "parent": "runs/base",
        "operators": ["depth_upscale(m=1)"],
        "at_step": None,
        "layer_map": [0, 1, 2, 3, 1, 2, 3, 4],
        "new_layers": [4, 5, 6],
        "n_params": {"parent": 590_880, "child": 886_368},
        "flops_per_token": {"parent": 3_421_000.0, "child": 5_310_000.0},
        "spec": {"parent": SPEC, "child": {**SPEC, "n_layers": 8}},
        "heldout_loss": {
            "parent": {"prose": 3.912, "code": 3.204},
            "child": {"prose": 4.466, "code": 3.927},
        },
        "heldout_sequences": 64,
        "heldout_seq_len": 64,
        "preserves_function": False,
        "max_logit_difference": None,
        "layers": {
            "parent": [
                layer(i, influence)
                for i, influence in enumerate((0.614, 0.181, 0.093, 0.102, 0.254))
            ],
            "child": [
                layer(i, influence)
                for i, influence in enumerate(
                    (0.614, 0.181, 0.093, 0.102, 0.041, 0.032, 0.055, 0.297)
                )
            ],
        },
        "copy_similarity": [
            {"source": source, "layers": [source, source + 3], "cosine": cosine}
            for source, cosine in ((1, 0.713), (2, 0.587), (3, 0.821))
        ],
        "probe": {
            "steps": 20,
            "parent": {"prose": 3.874, "code": 3.151},
            "child": {"prose": 3.899, "code": 3.118},
        },
        "measured": {},
        "moments": "reset_new",
        "verdict": "healthy: it starts +0.72 nats per token from its parent (held-out: "
        "prose 3.91 -> "
        "4.47, code 3.20 -> 3.93); training has to win that back",
    } | changes


def write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1))


def write_manifest(out, name, inputs, counts, seconds):
    given = {
        key: {"path": str(path), "fingerprint": stage.fingerprint_path(path)}
        for key, path in inputs.items()
    }
    out.mkdir(parents=True, exist_ok=True)
    manifest = stage.make_manifest(
        stage.StageRequest(name, {"of": out.name}, given, 0),
        sealed={},
        counts=counts,
        tokenizer=None,
        seconds=seconds,
    )
    write_json(out / "manifest.json", manifest.to_json())


def write_data(workdir):
    amounts = {
        "prose": [
            ("read", 60_009, 191.4),
            ("line_length", 52_357, 188.2),
            ("paragraph_repetition", 52_327, 187.6),
            ("exact_dedup", 43_598, 151.0),
            ("language", 40_474, 140.7),
        ],
        "code": [
            ("read", 1_836, 31.9),
            ("line_length", 1_711, 31.8),
            ("paragraph_repetition", 1_702, 31.5),
            ("exact_dedup", 1_655, 30.3),
            ("language", 1_655, 30.3),
        ],
    }
    kept = lambda rows, mb: {"rows": rows, "chars": int(mb * 0.98e6), "bytes": int(mb * 1e6)}
    steps = [
        {
            "rule": amounts["prose"][i][0],
            "kept": {name: kept(*steps[i][1:]) for name, steps in amounts.items()},
        }
        for i in range(5)
    ]
    held = {"prose": kept(811, 2.8), "code": kept(33, 0.6)}
    train = {"prose": kept(39_663, 137.9), "code": kept(1_622, 29.7)}
    write_manifest(
        workdir / "corpus", "prepare", {}, {"documents": 41_285, "bytes": 167_600_000}, 38.2
    )
    write_json(
        workdir / "corpus" / "funnel.json",
        {"sources": ["prose", "code"], "steps": steps, "heldout": held, "train": train},
    )
    write_manifest(
        workdir / "tokenizer",
        "tokenizer",
        {"corpus": workdir / "corpus"},
        {"vocab_size": 1024, "bos_id": 1, "eos_id": 2},
        21.7,
    )

    def part(rows, nats):
        bytes_, documents = 1300 * rows, 3 * rows
        return {
            "n_sequences": rows,
            "n_tokens": 509 * rows,
            "n_documents": documents,
            "n_split_documents": 7,
            "n_unknown_tokens": 0,
            "n_text_bytes": bytes_,
            "padding_frac": 0.006,
            "unigram_nats": nats,
        }

    counts = {
        "seq_len": 512,
        "method": "best_fit",
        "vocab_size": 1024,
        "train": {"prose": part(98_211, 5.61), "code": part(24_007, 5.32)},
    }
    counts["heldout"] = {"prose": part(2_003, 5.60), "code": part(491, 5.29)}
    write_manifest(
        workdir / "packed",
        "pack",
        {"corpus": workdir / "corpus", "tokenizer": workdir / "tokenizer"},
        counts,
        47.5,
    )


def write_run(run, spec, *, seed, steps, start, floor, initialize, seconds, base=None):
    data = base or run
    write_json(run / "spec.json", spec)
    settings = stage.to_jsonable(config.Config())
    settings["train"] |= {"steps": steps, "batch_size": 16, "log_every": 2, "eval_every": 30}
    settings["optim"] |= {"peak_lr": 1e-3 if base is None else 4e-4, "warmup_frac": 20 / steps}
    settings["model"] |= {"n_layers": spec["n_layers"], "d_model": 96}
    settings["initialize"] |= initialize
    settings["mixture"] |= {"packed": [str(data / "packed")] if base else []}
    write_json(run / "config.json", settings)
    noise = random.Random(seed)
    curve = lambda step: floor + (start - floor) * math.exp(-4.2 * (step / steps) ** 0.6)
    lines = []
    heldout = lambda step: {"prose": curve(step) + 0.09, "code": curve(step) - 0.55}
    parent = {"parent": {"prose": 3.912, "code": 3.204}} if base else {}
    if base:
        lines.append({"step": 0, "heldout": heldout(0)} | parent)
    for step in range(2, steps + 1, 2):
        lr = (
            settings["optim"]["peak_lr"]
            * min(1, step / 20)
            * min(1, max(0.1, 5 * (1 - step / steps)))
        )
        done = step / steps
        lines.append(
            {
                "step": step,
                "loss": curve(step) + noise.gauss(0, 0.035),
                "grad_norm": math.exp(noise.gauss(-0.4 - done, 0.16)) + 2 * math.exp(-step / 9),
                "lr": lr,
                "tokens": step * 16 * 512,
                "epochs": {"prose": 0.049 * done, "code": 0.2 * done},
                "tokens_per_second": 17_400 * spec["n_layers"] ** -0.2 + noise.gauss(0, 320),
                "step_seconds": seconds / steps,
                "mfu": None,
                "memory_bytes": 1_310_000_000 + 9_000_000 * spec["n_layers"],
                "n_skipped": 1 if base and step > 90 else 0,
                "flops": step * 16 * 512 * 3.1e6,
                "productive_seconds": 0.8 * seconds * done,
                "seconds": seconds * done,
                "goodput": 0.8,
                "usd": None,
            }
        )
        if step == 160:
            lines.append({"step": step, "resumed": True})
        if base and step == 92:
            documents = [
                "code/lib/heapq.py",
                HOSTILE,
                "prose/moby.txt",
                *(f"prose/{i}.txt" for i in range(29)),
            ]
            lines.append(
                {
                    "step": 91,
                    "skipped": {
                        "loss": 9.75,
                        "grad_norm": None,
                        "documents": documents,
                        "n_documents": 41,
                    },
                }
            )
        if step % 30 == 0:
            lines.append({"step": step, "heldout": heldout(step)} | parent)
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    inputs = {
        "packed/0": data / "packed",
        **({"initialize": base} if base else {}),
    }
    write_manifest(
        run,
        "train",
        inputs,
        {"steps": steps, "rows": steps * 16, "tokens": steps * 16 * 512},
        seconds,
    )


class Page(html.parser.HTMLParser):
    """A parsed page: text by tag, rows of tables, attributes, figures, and all visible text."""

    def __init__(self, path):
        super().__init__()
        self.stack, self.attributes, self.found, self.rows, self.text = [], [], {}, [], ""
        self.feed(path.read_text())

    def handle_starttag(self, tag, attributes):
        self.stack.append(tag)
        self.attributes += [(tag, *pair) for pair in attributes]
        self.found.setdefault(tag, []).append("")
        if tag == "tr":
            self.rows.append([])
        elif tag == "td":
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        while tag in self.stack and self.stack.pop() != tag:
            pass

    def handle_data(self, data):
        if self.stack:
            self.found[self.stack[-1]][-1] += data
        if "td" in self.stack:
            self.rows[-1][-1] += data
        if not {"script", "style"} & set(self.stack):
            self.text += data

    @property
    def plots(self):
        return [data for data in self.found.get("script", []) if data.startswith("{")]
