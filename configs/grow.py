"""Growing in the middle of a run: half of the layers for half of the tokens, then the stack twice.

`grown`  2 layers, which become 4 after half of the steps
`full`   4 layers from the start, for as many FLOPs

Of what docs/growth.md compares at this budget, the first reaches the lowest loss: 9 % fewer FLOPs
than the second to the same loss, its small start included. The budget matters: at a sixth of it
2 layers that never grow are better than either.

    jaxpt prepare         --config configs/grow.py --workdir runs/grown_in_training
    jaxpt train_tokenizer --config configs/grow.py --workdir runs/grown_in_training
    jaxpt pack            --config configs/grow.py --workdir runs/grown_in_training
    jaxpt train           --config configs/grow.py --workdir runs/grown_in_training
    jaxpt train           --config configs/grow.py:full --workdir runs/full
    jaxpt report          --workdir runs/full runs/grown_in_training
"""

from typing import Literal

from jaxpt.config import defaults


def get_config(model: Literal["grown", "full"] = "grown"):
    c = defaults()
    c.prepare.sources = ("python:prose", "python:code")
    c.prepare.heldout_frac = 0.03
    c.tokenizer.vocab_size = 1024  # small, so that layers and not the head make up the model
    c.tokenizer.sample_mb = 8
    c.pack.seq_len = 128

    c.model.n_layers = 2
    c.model.d_model = 64
    c.model.d_ff = 176
    c.model.n_heads = 4
    c.model.n_kv_heads = 2
    c.model.d_head = 16
    c.model.max_seq_len = 128
    c.model.tie_embeddings = True

    c.train.steps = 4276
    c.train.grow = ((2138, "stack(g=2)"),)
    c.train.batch_size = 16
    c.train.grad_accum_steps = 4  # micro-batches that stay in a CPU's cache
    c.train.log_every = 100
    c.train.eval_every = 500
    c.train.checkpoint_every = 1000
    c.optim.peak_lr = 4e-3
    c.optim.warmup_frac = 50 / 4276
    c.optim.end_lr_frac = 0.0  # constant after the warm-up, then to 0 over a fifth of the steps

    if model == "full":
        c.mixture.packed_paths = ("runs/grown_in_training/packed",)
        c.model.n_layers = 4
        c.train.grow = ()
        c.train.steps = 3455
        c.optim.warmup_frac = 50 / 3455
    return c
