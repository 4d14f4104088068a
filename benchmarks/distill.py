"""Print the memory that a student's loss takes, as compiled, and the noise of samples of a teacher.

    python benchmarks/distill.py

Memory: the gradients of cross-entropy, of distillation in chunks and of the same with all logits at
once are compiled for this machine's CPU, and their buffers added up. Noise: the mean square error
of sampled targets, by systematic and by independent draws. Time: steps without a teacher, from
samples and with a teacher of the student's size, in turns.
"""

import pathlib
import statistics
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import jax
import jax.numpy as jnp
import numpy as np

from jaxpt import config, initialize, sharding
from jaxpt.model import distill, loss, transformer
from jaxpt.spec import Batch, TeacherSamples
from jaxpt.text import format_table
from jaxpt.train import state, step

B, T, D, W, V = 8, 1024, 512, 1024, 32_000


def abstract(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


STUDENT = (abstract(B, T, D), abstract(D, V))
TARGETS = (abstract(B, T, dtype=jnp.int32), abstract(B, T))
TEACHER = (abstract(B, T, W), abstract(W, V))


def plain(hidden, head, targets, mask, theirs, their_head):
    """Return the loss with all logits at once."""
    log_q = jax.nn.log_softmax(hidden @ head)
    log_p = jax.nn.log_softmax(theirs @ their_head)
    nats = -jnp.take_along_axis(log_q, targets[..., None], axis=-1)[..., 0]
    kl = jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
    return jnp.sum(mask * (0.5 * nats + 0.5 * kl))


def chunked(hidden, head, targets, mask, *teacher):
    return distill.distillation_loss(hidden, head, targets, mask, teacher, 0.5)[0]


def alone(hidden, head, targets, mask):
    return loss.cross_entropy(hidden, head, targets, mask)[0]


def measure_memory(function, *shapes):
    """Return the bytes of temporaries of a loss's gradient."""
    compiled = jax.jit(jax.grad(function, (0, 1))).lower(*shapes).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def measure_noise(n_samples, n_draws=200):
    """Return the mean square errors of sampled targets: systematic draws, and independent ones."""
    rng = np.random.default_rng(0)
    scores = rng.gumbel(size=(64, 4096))
    probs = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    ends = np.cumsum(probs, -1)
    errors = [0.0, 0.0]
    for _ in range(n_draws):
        start = (rng.random((64, 1)) + np.arange(n_samples)) / n_samples
        for kind, points in enumerate((start, rng.random((64, n_samples)))):
            for p, end, point in zip(probs, ends, points * ends[:, -1:], strict=True):
                ids = np.searchsorted(end, point, "right")
                counts = np.bincount(ids, minlength=len(p)) / n_samples
                errors[kind] += float(np.sum((counts - p) ** 2))
    return [error / n_draws / 64 for error in errors]


def measure_steps(n_rounds=12):
    """Return the median ratios of a step's time to one without a teacher, quickstart's shape."""
    settings = config.load_config(str(ROOT / "configs/quickstart.py"))
    seq_len, batch_size = settings.pack.seq_len, settings.train.batch_size
    spec = initialize.make_random_spec(settings.model, 4096)
    mesh = sharding.make_mesh(config.MeshConfig(), jax.devices()[:1])
    rng = np.random.default_rng(0)
    shape = (batch_size, seq_len)
    tokens = rng.integers(0, 4096, shape).astype(np.int32)
    ones = np.ones(shape, np.int32)
    positions = np.broadcast_to(np.arange(seq_len, dtype=np.int32), shape)
    batch = Batch(tokens, np.roll(tokens, -1, 1), ones, positions, ones.astype(np.float32))
    ids = np.sort(rng.integers(0, 4096, (*shape, 32)).astype(np.int32))
    samples = TeacherSamples(ids, -np.ones(shape, np.float32))
    knobs = config.DistillConfig("it")
    params = transformer.init_params(spec, 1, mesh)
    kinds = {
        "none": (None, batch, ()),
        "samples": (step.DistillSpec(knobs, None, 32, 4096), batch._replace(samples=samples), ()),
        "a model of its size": (step.DistillSpec(knobs, spec), batch, (params,)),
    }
    runs = {}
    for name, (distill_spec, given, more) in kinds.items():
        built = step.build_step(
            spec, settings.train, settings.optim, seq_len, mesh, distill_spec=distill_spec
        )
        student = transformer.init_params(spec, 0, mesh)
        now = state.init_state(student, spec, settings.optim, mesh)
        now, _ = built(now, given, *more)
        runs[name] = [built, now, given, more]
    seconds = {name: [] for name in runs}
    for _ in range(n_rounds):
        for name, run in runs.items():
            built, now, given, more = run
            start = time.perf_counter()
            run[1], _ = jax.block_until_ready(built(now, given, *more))
            seconds[name].append(time.perf_counter() - start)
    ratios = {}
    for name, times in seconds.items():
        ratios[name] = statistics.median(np.divide(times, seconds["none"]).tolist())
    return ratios


def main():
    rows = [["gradient of the loss", "temporaries"]]
    for name, function, shapes in (
        ("cross-entropy, chunks of 512", alone, (*STUDENT, *TARGETS)),
        ("with a teacher, chunks of 512", chunked, (*STUDENT, *TARGETS, *TEACHER)),
        ("with a teacher, all logits at once", plain, (*STUDENT, *TARGETS, *TEACHER)),
    ):
        rows.append([name, f"{measure_memory(function, *shapes) / 2**20:,.0f} MiB"])
    print(format_table(rows))
    rows = [["draws", "systematic", "independent", "ratio"]]
    for n_samples in (8, 16, 32, 64):
        ours, theirs = measure_noise(n_samples)
        rows.append([str(n_samples), f"{ours:.5f}", f"{theirs:.5f}", f"{theirs / ours:.1f}"])
    print(format_table(rows))
    rows = [["teacher", "step's time"]]
    rows += [[name, f"{ratio:.2f} x"] for name, ratio in measure_steps().items()]
    print(format_table(rows))


if __name__ == "__main__":
    main()
