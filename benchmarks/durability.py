"""The price of durability and of checksums: the quickstart's stages and the saving of a checkpoint,
as they are, without fsync, and without sha256, in turn.

    python benchmarks/durability.py [--rounds 5] [--gigabytes 2.2] [--directory /a/disk]

Each round starts every way once, in an order that is drawn anew. Prints wall and CPU seconds per
way, their medians over the rounds, and the share of the time that fsync and sha256 take. Where that
is less than the machine's own changes, the seconds inside these calls tell more: those of all
threads added up, whether something waited for them or not, so an upper bound of the price. The disk
is that of --directory: give the one that is asked about.
"""

import argparse
import os
import pathlib
import random
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
WAYS = {
    "as it is": """
import atexit, os, time
from jaxpt import io
from jaxpt.io import published
inside = {"fsync": 0.0, "sha256": 0.0}
def timed(name, function):
    def run(*values):
        start = time.monotonic()
        try:
            return function(*values)
        finally:
            inside[name] += time.monotonic() - start
    return run
os.fsync, os.fdatasync = timed("fsync", os.fsync), timed("fsync", os.fdatasync)
io.sha256 = published.sha256 = timed("sha256", published.sha256)
atexit.register(lambda: print(f"INSIDE {inside['fsync']:.3f} {inside['sha256']:.3f}"))
""",
    "without fsync": """
import os
from jaxpt.io import files
files.sync = os.fdatasync = lambda handle: None
""",
    "without sha256": """
import types
from jaxpt import io
from jaxpt.data import loader
from jaxpt.io import published
io.sha256 = published.sha256 = lambda path: "0" * 64
digest = types.SimpleNamespace(hexdigest=lambda: "0" * 64)
loader.hashlib = types.SimpleNamespace(sha256=lambda data: digest)
""",
}
PIPELINE = """
import sys
from jaxpt.cli.main import main
config = ["--config", sys.argv[1] + "/configs/quickstart.py", "--workdir", "run"]
for words in (["prepare"], ["train_tokenizer"], ["pack"], ["train"]):
    sys.argv = ["jaxpt", *words, *config]
    main()
sys.argv = ["jaxpt", "export_hf", "--from", "run", "--to", "hf"]
main()
"""
CHECKPOINT = """
import pathlib, sys, time
import jax.numpy as jnp
from jaxpt.spec import ModelSpec
from jaxpt.weights import checkpoint
n = int(float(sys.argv[2]) * 1e9 / 4 / 8)
params = {f"w{k}": jnp.full((n // 1024, 1024), k, jnp.float32) for k in range(8)}
sizes = dict(n_layers=1, d_model=8, d_ff=8, n_heads=1, n_kv_heads=1, d_head=8)
spec = ModelSpec(**sizes, vocab_size=8, max_seq_len=8)
start, cpu = time.monotonic(), time.process_time()
for step in (1, 2):
    state = {"step": jnp.int32(step)}
    checkpoint.save_checkpoint(
        pathlib.Path("run"), step, params, state, spec, counts={"step": step}, tokenizer=None
    )
print(f"SAVED {(time.monotonic() - start) / 2} {(time.process_time() - cpu) / 2}")
"""


def measure(home: pathlib.Path, way: str, work: str, gigabytes: float) -> tuple[float, float]:
    """Return wall and CPU seconds of a piece of work."""
    home.mkdir()
    command = [sys.executable, "-c", WAYS[way] + work, str(ROOT), str(gigabytes)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.monotonic()
    done = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True)
    wall = time.monotonic() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    subprocess.run(["rm", "-rf", home], check=True)
    if inside := re.search(r"INSIDE (\S+) (\S+)", done.stdout):
        print(f"  in all threads: {inside[1]} s of fsync, {inside[2]} s of sha256", flush=True)
    if saved := re.search(r"SAVED (\S+) (\S+)", done.stdout):  # without the start of Python
        return float(saved[1]), float(saved[2])
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return wall, cpu


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--gigabytes", type=float, default=2.2)
    parser.add_argument("--directory", help="where to write; default: the temporary directory")
    asked = parser.parse_args()
    rng = random.Random(0)
    works = {"quickstart": PIPELINE, f"checkpoint of {asked.gigabytes} GB": CHECKPOINT}
    with tempfile.TemporaryDirectory(dir=asked.directory) as directory:
        for name, work in works.items():
            found = {way: [] for way in WAYS}
            for k in range(asked.rounds):
                for way in rng.sample(list(WAYS), len(WAYS)):
                    home = pathlib.Path(directory) / f"{k}-{way.replace(' ', '_')}"
                    found[way].append(measure(home, way, work, asked.gigabytes))
                    wall, cpu = found[way][-1]
                    print(f"{name}, {way}: {wall:.2f} s wall, {cpu:.2f} s CPU", flush=True)
            report(name, found)


def report(name: str, found: dict[str, list[tuple[float, float]]]) -> None:
    """Print the medians, and what each way saves of what is there."""
    medians = {}
    for way, pairs in found.items():
        medians[way] = [statistics.median(each) for each in zip(*pairs, strict=True)]
    print(f"\n{name}: median of {len(found['as it is'])} rounds")
    whole_wall, whole_cpu = medians["as it is"]
    for way, (wall, cpu) in medians.items():
        shares = f"{1 - wall / whole_wall:+.1%} wall, {1 - cpu / whole_cpu:+.1%} CPU saved"
        print(f"  {way:15} {wall:8.2f} s wall {cpu:8.2f} s CPU  {shares}")
    print()


if __name__ == "__main__":
    main()
