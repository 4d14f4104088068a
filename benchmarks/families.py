"""What is held of each family of models, and the time to read and write it, beside Llama's.

    python benchmarks/families.py [--rounds 3]

The models are those of tests/variants.py, random, by transformers. Of the small ones: the largest
difference of logits to transformers' over that of the logits, at positions 0 to 1,499, and whether
the export of the import has the same bits in every tensor. Of wide ones (0.3 to 2 GB): seconds
per byte to import and export, over those of Llama in the same round; the median over the rounds.
"""

import argparse
import os
import pathlib
import shutil
import statistics
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np
import torch
import variants

from jaxpt import config, sharding
from jaxpt.model import transformer
from jaxpt.weights import huggingface

N_POSITIONS = 1_500
WIDE = {"vocab_size": 32_000, "hidden_size": 480, "intermediate_size": 8_192}
LEAST_BYTES = 2e8  # of a model whose time depends on bytes: experts stay narrow in most mixtures
# the first variant of each family: by model_type
NAMES = {}
for variant in variants.CONFIGS:
    NAMES.setdefault(variants.CONFIGS[variant]().model_type, variant)


def measure_logits(name: str, home: pathlib.Path, mesh: jax.sharding.Mesh) -> tuple[float, bool]:
    """Return the largest relative difference of logits, and whether an export has equal bits."""
    theirs = variants.make(name, home / "given")
    spec, params = huggingface.load_hf_model(home / "given", mesh)
    tokens = np.random.default_rng(0).integers(0, spec.vocab_size, (1, N_POSITIONS), np.int32)
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
    positions = np.arange(N_POSITIONS)[None]
    got = transformer.compute_logits(spec, params, tokens, np.ones_like(tokens), positions)
    huggingface.write_hf_model(spec, params, home / "written")
    given, written = (huggingface.open_weights(home / place) for place in ("given", "written"))
    same = given.keys() == written.keys() and all(
        np.array_equal(tensor.map_numbers(), written[key].map_numbers())
        for key, tensor in given.items()
    )
    return float(np.abs(got - expected).max() / np.abs(expected).max()), same


def measure_seconds(source: pathlib.Path, out: pathlib.Path, mesh: jax.sharding.Mesh) -> float:
    """Return the seconds per byte to import and export a directory."""
    start = time.perf_counter()
    spec, params = huggingface.load_hf_model(source, mesh)
    jax.block_until_ready(params)
    n_bytes = huggingface.write_hf_model(spec, params, out)
    return (time.perf_counter() - start) / n_bytes


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    mesh = sharding.make_mesh(config.MeshConfig())
    with tempfile.TemporaryDirectory() as directory:
        home = pathlib.Path(directory)
        variants.SIZES["max_position_embeddings"] = 2_048
        held = {}
        for family, name in NAMES.items():
            held[family] = measure_logits(name, home / family, mesh)
        variants.SIZES |= WIDE
        for family, name in NAMES.items():
            variants.make(name, home / family / "wide")
            shutil.rmtree(home / family / "given")
        seconds = {family: [] for family in NAMES}
        for _ in range(asked.rounds + 1):  # the first compiles
            for family, times in seconds.items():
                times.append(measure_seconds(home / family / "wide", home / "out", mesh))
        print("| family | logits differ by | export | time per byte |\n|---|--:|---|--:|")
        for family, (difference, same) in held.items():
            pairs = zip(seconds[family][1:], seconds["llama"][1:], strict=True)
            ratio = statistics.median(ours / llamas for ours, llamas in pairs)
            files = (home / family / "wide").glob("*.safetensors")
            is_large = sum(file.stat().st_size for file in files) > LEAST_BYTES
            spent = f"{ratio:.2f} x" if is_large else ""
            bits = "equal" if same else "DIFFERS"
            print(f"| `{family}` | {difference:.1e} | {bits} | {spent} |", flush=True)


if __name__ == "__main__":
    main()
