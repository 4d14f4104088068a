"""Compare both backends of evaluate.py, and decoding with transformers' generate.

The model is random, of the course's 248M architecture.

    python benchmarks/evaluate.py TOKENIZER DATA_DIR [--items 40] [--rounds 2] [--at FOLDER]

TOKENIZER is a SentencePiece .model or a Hugging Face directory with at most 32,000 tokens, DATA_DIR
holds the files of truthfulqa and winogrande (docs/evaluate.md). Each measurement is a process of
its own, alternating: evaluate.py as a user starts it on the first --items of both tasks, then 64
greedy tokens after one prompt and after eight of different lengths (left-padded in one batch).
Seconds of an evaluation are those of its results file, loading and compiling included; those of
decoding are without loading and without a first call.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
os.environ["PYTHONPATH"] = str(ROOT)  # what is started here is of this clone
sys.path.insert(0, str(ROOT))
os.environ["JAX_PLATFORMS"] = "cpu"
TASKS = ["truthfulqa_mc2", "winogrande"]
MAX_NEW = 64


def make_model(tokenizer_path: str, out: pathlib.Path) -> None:
    """Write a random model in Hugging Face format."""
    from jaxpt import config, sharding
    from jaxpt.data import tokenizer
    from jaxpt.model import transformer
    from jaxpt.spec import ModelSpec
    from jaxpt.weights import huggingface

    spec = ModelSpec(
        n_layers=12,
        d_model=1024,
        d_ff=4096,
        n_heads=32,
        n_kv_heads=8,
        d_head=32,
        vocab_size=32_000,
        max_seq_len=2048,
    )
    encoder = tokenizer.load_tokenizer(pathlib.Path(tokenizer_path))
    (out.parent / "tokenizer").mkdir(parents=True, exist_ok=True)
    encoder.save_tokenizer(out.parent / "tokenizer")
    huggingface.write_hf_model(
        spec,
        transformer.init_params(spec, 0, sharding.make_mesh(config.MeshConfig())),
        out,
        tokenizer_dir=out.parent / "tokenizer",
    )


def make_prompts(n: int) -> list[list[int]]:
    """Return n random prompts of different lengths."""
    import numpy as np

    random = np.random.default_rng(n)
    return [[1, *random.integers(10, 30_000, 25 + 7 * i).tolist()] for i in range(n)]


def decode_by_jaxpt(model: pathlib.Path, n: int) -> tuple[float, list[list[int]]]:
    """Return seconds and the texts."""
    import dataclasses

    from jaxpt import config, sharding
    from jaxpt.model import decode
    from jaxpt.weights import huggingface

    spec, params = huggingface.load_hf_model(
        model, sharding.make_mesh(config.MeshConfig()), "float32"
    )
    spec = dataclasses.replace(spec, eos_ids=())
    decode.generate(spec, params, make_prompts(n), max_new=MAX_NEW)
    start = time.perf_counter()
    texts = decode.generate(spec, params, make_prompts(n), max_new=MAX_NEW)
    return time.perf_counter() - start, texts


def decode_by_transformers(model: pathlib.Path, n: int) -> tuple[float, list[list[int]]]:
    """Return seconds and the texts."""
    import torch
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(model, dtype="float32").eval()
    longest = max(map(len, make_prompts(n)))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in make_prompts(n)])
    mask = torch.tensor(
        [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in make_prompts(n)]
    )
    options = {
        "max_new_tokens": MAX_NEW,
        "min_new_tokens": MAX_NEW,
        "do_sample": False,
        "pad_token_id": 0,
    }
    with torch.no_grad():
        reference.generate(ids, attention_mask=mask, **options)
        start = time.perf_counter()
        texts = reference.generate(ids, attention_mask=mask, **options)
    return time.perf_counter() - start, texts[:, longest:].tolist()


DECODERS = {"jaxpt": decode_by_jaxpt, "transformers": decode_by_transformers}


def run_evaluation(
    model: pathlib.Path, backend: str, items: int, data_dir: str, to: pathlib.Path
) -> dict:
    to.unlink(missing_ok=True)
    command = [
        sys.executable,
        ROOT / "scripts/evaluate.py",
        "--model",
        model,
        "--tasks",
        *TASKS,
        "--backend",
        backend,
        "--data-dir",
        data_dir,
    ]
    subprocess.run(
        [*map(str, command), "--limit", str(items), "--to", str(to)],
        check=True,
        capture_output=True,
    )
    return json.loads(to.read_text(encoding="utf-8"))


def run_child(*arguments) -> dict:
    """Return what this script prints as JSON in a process of its own."""
    output = subprocess.run(
        [sys.executable, __file__, *map(str, arguments)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout
    return json.loads(output.splitlines()[-1])


def main(tokenizer_path: str, data_dir: str, items: int, rounds: int, at: pathlib.Path) -> None:
    model = at / "model"
    if not model.is_dir():
        make_model(tokenizer_path, model)
    print(
        f"| {items} items of each task | " + " | ".join(TASKS) + " | seconds |\n|---|---|---|---|"
    )
    for _ in range(rounds):
        for backend in ("jax", "hf"):
            found = run_evaluation(model, backend, items, data_dir, at / f"{backend}.json")
            scores = " | ".join(f"{found['results'][task]['acc,none']:.4f}" for task in TASKS)
            print(f"| {backend} | {scores} | {found['seconds']:.1f} |", flush=True)
    print("\n| decoding | prompts at once | tokens/s | text |\n|---|---|---|---|")
    for n in (1, 8):
        for _ in range(rounds):
            results = {name: run_child("--turn", name, str(n), "--at", at) for name in DECODERS}
            same = (
                "equal"
                if results["jaxpt"]["texts"] == results["transformers"]["texts"]
                else "DIFFERENT"
            )
            for name, each in results.items():
                print(
                    f"| {name} | {n} | {n * MAX_NEW / each['seconds']:.1f} | {same} |", flush=True
                )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tokenizer", nargs="?")
    parser.add_argument("data_dir", nargs="?")
    parser.add_argument("--items", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument(
        "--at",
        type=pathlib.Path,
        help="where the model is written and kept; default: a temporary folder",
    )
    parser.add_argument(
        "--turn",
        nargs=2,
        metavar=("DECODER", "PROMPTS"),
        help="decode once in this process; what the rounds start",
    )
    arguments = parser.parse_args()
    if arguments.turn:
        seconds, texts = DECODERS[arguments.turn[0]](arguments.at / "model", int(arguments.turn[1]))
        print(json.dumps({"seconds": seconds, "texts": texts}))
    else:
        with tempfile.TemporaryDirectory() as folder:
            main(
                arguments.tokenizer,
                arguments.data_dir,
                arguments.items,
                arguments.rounds,
                arguments.at or pathlib.Path(folder),
            )
