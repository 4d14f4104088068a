"""A small mixture of experts on the quickstart's text, beside the dense model of equal active size.

`moe`    4 layers of 8 experts with 256 channels, of which each token takes 2: 5.9M parameters,
         2.4M active
`dense`  the same with one MLP of 512 channels in each layer: 2.4M parameters

They read what `configs/quickstart.py` prepares and packs. A step of `moe` takes 1.0 to 1.2 times
that of `dense` on two CPU cores, where each of them trains in about two minutes.

    jaxpt train --config configs/moe_small.py --workdir runs/moe
    jaxpt train --config configs/moe_small.py:dense --workdir runs/dense
"""

from typing import Literal

from jaxpt.config import defaults


def get_config(model: Literal["moe", "dense"] = "moe"):
    c = defaults()
    c.mixture.packed_paths = ("runs/base/packed",)
    c.mixture.phases = ((0, {"prose": 1.0}),)
    c.tokenizer.vocab_size = 4096
    c.pack.seq_len = 256

    c.model.n_layers = 4
    c.model.d_model = 192
    c.model.d_ff = 512
    c.model.n_heads = 6
    c.model.n_kv_heads = 2
    c.model.d_head = 32
    c.model.vocab_size = 4096
    c.model.max_seq_len = 256
    c.model.tie_embeddings = True
    if model == "moe":
        c.model.d_ff = 256
        c.model.fields = (
            ("family", "mixtral"),
            ("n_experts", 8),
            ("n_experts_per_token", 2),
            ("norm_topk_prob", True),
            ("router_aux_loss_coef", 0.01),
            ("router_z_loss_coef", 0.001),
        )

    c.train.steps = 300
    c.train.batch_size = 8
    c.train.eval_every = 60
    c.train.eval_sequences = 64
    c.train.checkpoint_every = 60
    c.optim.peak_lr = 3e-3
    c.optim.warmup_frac = 1 / 15
    return c
