"""Compile tokamax's kernels beside ours for chips that are not here, and print their memory.

    pip install libtpu jax-cuda13-plugin jax-cuda13-pjrt tokamax   (see docs/plan.md)
    python benchmarks/tokamax_kernels.py attention   # for an H100
    python benchmarks/tokamax_kernels.py loss        # for a v5p

Nothing runs on a chip, so memory is all that is compared. tokamax asks JAX for this machine's
device while it is traced: it gets the target's. Documents reach its attention through a private
module, as the first key that each query sees.
"""

import functools
import os
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from jaxpt.plan import compile

os.environ.update(compile.COMPILER_ENV)

import jax
import jax.numpy as jnp
from absl import flags, logging
from jax.extend import backend
from jax.sharding import NamedSharding, PartitionSpec

from jaxpt import config, hardware, sharding
from jaxpt.model.kernels.select import BACKENDS
from jaxpt.model.loss import cross_entropy

B, T, N, K, H = 8, 4096, 32, 8, 64
TOKENS, D, V = 8192, 4096, 128_256


def make_tokamax_attention(implementation: str):
    """Return attention of packed documents by a kernel of tokamax."""
    from tokamax._src.ops.attention import api, base

    def attend(q, k, v, segment_ids):
        is_first = jnp.diff(segment_ids, prepend=-1) != 0
        start = jax.lax.cummax(jnp.where(is_first, jnp.arange(T), 0), axis=1)
        mask = base.Mask(is_causal=True, k_start=start[:, None, :])
        run = api.IMPLEMENTATIONS[implementation]
        return run(q, k, v, bias=None, mask=mask, logits_scale=H**-0.5)

    return attend


def iterate_attention(shape):
    """Yield (name, function, shapes of its arguments)."""
    kernels = {name: functools.partial(BACKENDS[name], window=None) for name in ("xla", "cudnn")}
    for name in ("mosaic_gpu", "triton"):
        kernels[f"tokamax {name}"] = make_tokamax_attention(name)
    ids, d_out = shape(B, T, dtype=jnp.int32), shape(B, T, N, H)
    for name, kernel in kernels.items():

        def both(q, k, v, segment_ids, d_out, kernel=kernel):
            out, pull = jax.vjp(lambda *qkv: kernel(*qkv, segment_ids), q, k, v)
            return out, pull(d_out)

        yield name, both, (shape(B, T, N, H), shape(B, T, K, H), shape(B, T, K, H), ids, d_out)


def iterate_losses(shape):
    """Yield (name, function, shapes of its arguments)."""
    import tokamax

    def ours(hidden, head, targets):
        ones = jnp.ones((1, TOKENS))
        return cross_entropy(hidden[None], head, targets[None], ones, chunk_tokens=1024)[0]

    def theirs(hidden, head, targets):
        return tokamax.linear_softmax_cross_entropy_loss(
            hidden, targets, head, implementation="mosaic_tpu"
        )

    shapes = shape(TOKENS, D), shape(D, V), shape(TOKENS, dtype=jnp.int32)
    for name, loss in (("ours", ours), ("tokamax", theirs)):
        yield name, jax.grad(loss, (0, 1)), shapes


def main(what: str):
    """Print the memory of each kernel."""
    flags.FLAGS.mark_as_parsed()  # tokamax would read the command line
    logging.set_verbosity(logging.ERROR)
    iterate, target = {
        "attention": (iterate_attention, "h100:1"),
        "loss": (iterate_losses, "v5p:2x2x1"),
    }[what]
    device = compile.make_target_devices(hardware.parse_target(target), None)[0]
    backend.get_default_device = lambda: device
    mesh = sharding.make_mesh(config.MeshConfig(), [device])
    place = NamedSharding(mesh, PartitionSpec())
    options = {"xla_gpu_enable_triton_gemm": False} if what == "attention" else None

    def shape(*sizes, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=place)

    for name, function, shapes in iterate(shape):
        with jax.set_mesh(mesh):
            compiled = jax.jit(function).lower(*shapes).compile(options)
        memory = compiled.memory_analysis()
        print(f"{name}: temporaries {memory.temp_size_in_bytes / 2**20:,.0f} MiB", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
