"""Compile the embedding, forward and backward, as a lookup and as a matmul with one-hot rows.

    python benchmarks/embedding.py v5p:4x4x4 h100:1 h100:8

The second is MaxText's `use_iota_embed`. Llama 3's vocabulary; width 4,096 and a sequence of 8,192
tokens a chip on TPUs, width 2,048 and 8 sequences of 4,096 in all on GPUs. Nothing runs.
"""

import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

VOCAB_SIZE = 128_256
FORMS = ("lookup", "one-hot")


def main():
    from jaxpt.plan import compile

    print("| program | temporaries, MiB | FLOPs per token | bytes read and written per device |")
    print("|---|---|---|---|", flush=True)
    for target in sys.argv[1:]:
        for form in FORMS:
            command = [sys.executable, __file__, "--child", target, form]
            subprocess.run(command, env=os.environ | compile.COMPILER_ENV, check=True)


def child(name, form):
    import jax
    import jax.numpy as jnp

    from jaxpt import config, hardware, sharding
    from jaxpt.plan import compile
    from jaxpt.sharding import make_logical_sharding, with_logical_constraint

    target = hardware.parse_target(name)
    is_tpu = target.chip.platform == "tpu"
    B, T, D = (target.n_devices, 8192, 4096) if is_tpu else (8, 4096, 2048)
    devices = compile.make_target_devices(target, None)
    mesh = sharding.make_mesh(config.MeshConfig(), devices)

    def embed(table, tokens):
        table = table.astype(jnp.bfloat16)
        if form == "lookup":  # as jaxpt/model/transformer.py
            x = with_logical_constraint(table, "vocab", None)[tokens]
        else:
            x = jax.nn.one_hot(tokens, VOCAB_SIZE, dtype=table.dtype) @ table
        return with_logical_constraint(x, "batch", "position", None)

    def run(table, tokens, d_x):
        x, pullback = jax.vjp(lambda table: embed(table, tokens), table)
        return x, *pullback(d_x)

    def make_abstract(shape, dtype, *axes):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=make_logical_sharding(mesh, axes))

    table = make_abstract((VOCAB_SIZE, D), jnp.float32, "vocab", "embed")
    tokens = make_abstract((B, T), jnp.int32, "batch", "position")
    d_x = make_abstract((B, T, D), jnp.bfloat16, "batch", "position", None)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        compiled = jax.jit(run, out_shardings=(d_x.sharding, table.sharding)).lower(
            table, tokens, d_x
        )
        compiled = compiled.compile()
    cost = compiled.cost_analysis() or {}  # of a GPU's compiler: nothing
    n_tokens = B * T / target.n_devices
    flops = f"{cost['flops'] / n_tokens:.2g}" if "flops" in cost else "unknown"
    n_bytes = f"{cost['bytes accessed']:.2g}" if "bytes accessed" in cost else "unknown"
    temporaries = compiled.memory_analysis().temp_size_in_bytes / 2**20
    print(f"| {name} {form} | {temporaries:,.0f} | {flops} | {n_bytes} |")


if __name__ == "__main__":
    child(*sys.argv[2:]) if sys.argv[1:2] == ["--child"] else main()
