"""Llama 3's 8B architecture (8,030,261,248 parameters) on 159B tokens, 20 per parameter.

`pod`    a TPU slice or many hosts: 4 micro-batches per step, which makes room for remat dots
`h100`   one host of 8 GPUs: micro-batches of 2 sequences per GPU

As planned (compiled, not run; hours and cost assume matmuls at 45 to 70 % of peak on TPU, 40 to
60 % on H100):

    v5p:4x4x4    52.2 of 95.7 GiB    106 to 171 hours     29,000 to 46,000 usd
    v6e:16x16    15.7 of 31.3 GiB     13 to  27 hours      9,000 to 19,000 usd
    h100:8       46.3 of 72.8 GiB    459 to 773 hours     15,000 to 25,000 usd

Chinchilla's fit expects 2.16 nats per token on its own text at this size and budget (2203.15556).

    jaxpt plan --config configs/llama3_8b.py --on v5p:4x4x4 v6e:16x16
    jaxpt plan --config configs/llama3_8b.py:h100 --on h100:8
"""

from typing import Literal

from jaxpt.config import defaults


def get_config(on: Literal["pod", "h100"] = "pod"):
    c = defaults()
    # Llama 3's; a smaller one trained on your own text makes the head cheaper
    c.tokenizer.vocab_size = 128_256
    c.pack.seq_len = 4096

    c.model.n_layers = 32
    c.model.d_model = 4096
    c.model.d_ff = 14_336
    c.model.n_heads = 32
    c.model.n_kv_heads = 8
    c.model.d_head = 128
    c.model.vocab_size = 128_256
    c.model.max_seq_len = 4096
    c.model.rope_theta = 500_000.0

    c.train.steps = 38_000
    c.train.batch_size = 1024  # 4.2M tokens per step
    c.train.compute_dtype = "bfloat16"
    c.train.grad_accum_steps = 4
    c.train.remat = "dots"  # a fifth fewer FLOPs than full
    c.train.z_loss_weight = 1e-4
    c.train.spike_factor = 10.0
    c.train.eval_every = 1000
    c.train.checkpoint_every = 500
    c.optim.warmup_frac = 0.05

    # mesh: all on fsdp, the default. 90 GiB of state are 1.4 GiB on each of 64 chips, and the
    # sequences of a step hide communication behind matmuls. Larger slices: v5p:8x8x16 (1,024 chips)
    # still has a sequence per chip without micro-batches; beyond that c.mesh.context = 2 shards
    # sequences, c.mesh.tensor = 2 heads. Several slices: c.mesh.replica = number of slices.
    if on == "h100":
        c.train.grad_accum_steps = 64  # 2 sequences per GPU at a time
    return c
