"""Both backends of evaluate.py on the same requests, and decoding beside transformers' generate, on
a random model of the course's 248M shape.

    python benchmarks/evaluate.py TOKENIZER DATA_DIR [--items 40] [--rounds 2] [--at FOLDER]

TOKENIZER is a SentencePiece .model or a Hugging Face directory of at most 32,000 pieces, DATA_DIR
holds the files of truthfulqa and winogrande
(docs/evaluate.md). Every turn is a process of its own, in turn: evaluate.py as a user starts it on
the first --items of both tasks, then 64 greedy tokens
after one prompt and after eight of different lengths (left-padded in one batch). Seconds of an
evaluation are those that its results file says, from the start of its
work to its end, loading and compiling included; those of decoding are without loading and without a
first call.
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
sys.path.insert(0, str(ROOT))
os.environ["JAX_PLATFORMS"] = "cpu"
TASKS = ["truthfulqa_mc2", "winogrande"]
NEW = 64


def make(tokenizer_path: str, out: pathlib.Path) -> None:
    from jaxpt import config, sharding
    from jaxpt.data import tokenizer
    from jaxpt.model import llama
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
        llama.init_params(spec, 0, sharding.make_mesh(config.MeshConfig())),
        out,
        tokenizer_dir=out.parent / "tokenizer",
    )


def prompts(n: int) -> list[list[int]]:
    import numpy as np

    random = np.random.default_rng(n)
    return [[1, *random.integers(10, 30_000, 25 + 7 * i).tolist()] for i in range(n)]


def jaxpt(model: pathlib.Path, n: int) -> tuple[float, list[list[int]]]:
    import dataclasses

    from jaxpt import config, sharding
    from jaxpt.model import decode
    from jaxpt.weights import huggingface

    spec, params = huggingface.load_hf_model(
        model, sharding.make_mesh(config.MeshConfig()), "float32"
    )
    spec = dataclasses.replace(spec, eos_id=None)
    decode.generate(spec, params, prompts(n), max_new=NEW)
    start = time.perf_counter()
    texts = decode.generate(spec, params, prompts(n), max_new=NEW)
    return time.perf_counter() - start, texts


def transformers(model: pathlib.Path, n: int) -> tuple[float, list[list[int]]]:
    import torch
    from transformers import AutoModelForCausalLM

    judge = AutoModelForCausalLM.from_pretrained(model, dtype="float32").eval()
    longest = max(map(len, prompts(n)))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts(n)])
    mask = torch.tensor(
        [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts(n)]
    )
    asked = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        judge.generate(ids, attention_mask=mask, **asked)
        start = time.perf_counter()
        texts = judge.generate(ids, attention_mask=mask, **asked)
    return time.perf_counter() - start, texts[:, longest:].tolist()


WAYS = {"jaxpt": jaxpt, "transformers": transformers}


def evaluation(
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
    return json.loads(to.read_text())


def child(*arguments) -> dict:
    told = subprocess.run(
        [sys.executable, __file__, *map(str, arguments)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout
    return json.loads(told.splitlines()[-1])


def main(tokenizer_path: str, data_dir: str, items: int, rounds: int, at: pathlib.Path) -> None:
    model = at / "model"
    if not model.is_dir():
        make(tokenizer_path, model)
    print(
        f"| {items} items of each task | " + " | ".join(TASKS) + " | seconds |\n|---|---|---|---|"
    )
    for _ in range(rounds):
        for backend in ("jax", "hf"):
            found = evaluation(model, backend, items, data_dir, at / f"{backend}.json")
            scores = " | ".join(f"{found['results'][task]['acc,none']:.4f}" for task in TASKS)
            print(f"| {backend} | {scores} | {found['seconds']:.1f} |", flush=True)
    print("\n| decoding | prompts at once | tokens/s | text |\n|---|---|---|---|")
    for n in (1, 8):
        for _ in range(rounds):
            told = {way: child("--turn", way, str(n), "--at", at) for way in WAYS}
            same = (
                "equal" if told["jaxpt"]["texts"] == told["transformers"]["texts"] else "DIFFERENT"
            )
            for way, each in told.items():
                print(f"| {way} | {n} | {n * NEW / each['seconds']:.1f} | {same} |", flush=True)


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
        help="where the model is made and kept; by default a temporary folder",
    )
    parser.add_argument(
        "--turn",
        nargs=2,
        metavar=("WAY", "PROMPTS"),
        help="one turn of decoding in this process; what the rounds start",
    )
    arguments = parser.parse_args()
    if arguments.turn:
        seconds, texts = WAYS[arguments.turn[0]](arguments.at / "model", int(arguments.turn[1]))
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
