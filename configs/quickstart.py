"""The road in small: a general model trained on English prose, made deeper, and specialised on Python code.

`base`   4 layers from random weights, on docstrings, help topics and package descriptions
`child`  the base grown to 6 layers (0 1 2 1 2 3, the SOLAR way), continued on code with a quarter of prose replayed

On two CPU cores the base trains in one and a half to two and a half minutes, the child in two to three and a half. The
base's held-out prose falls to about 4.7 nats a token (counting tokens alone gives 6.2); the child's held-out code falls
from 5.7 to about 4.1.
"""

from jaxpt.config import defaults


def get_config(model="base"):
    c = defaults()
    c.prepare.sources = ("python:prose", "python:code")  # what every machine with Python has
    c.prepare.max_mb = 6.0  # of each: some 1.5M tokens, about what this trains on
    c.prepare.heldout_frac = 0.05  # few documents: 2 % would be too few to measure on
    c.tokenizer.vocab_size = (
        4096  # small text, small vocabulary: a larger one would be mostly unseen
    )
    c.tokenizer.sample_mb = 8
    c.pack.seq_len = 256

    c.model.n_layers = 4
    c.model.d_model = 192
    c.model.d_ff = 512
    c.model.n_heads = 6
    c.model.n_kv_heads = 2
    c.model.d_head = 32
    c.model.max_seq_len = 256
    c.model.tie_embeddings = True  # at this size the embedding is a third of the weights

    c.train.steps = 300
    c.train.batch_size = 8
    c.train.eval_every = 60
    c.train.eval_sequences = 64
    c.train.checkpoint_every = 60
    c.optim.peak_lr = 3e-3
    c.optim.warmup_steps = 20
    c.mixture.phases = ((0, {"prose": 1.0}),)

    if model == "child":
        c.mixture.packed_paths = ("runs/base/packed",)
        c.mixture.phases = (
            (0, {"code": 0.75, "prose": 0.25}),
        )  # the replay keeps the prose it knows
        c.initialize.source = "runs/grown"
        c.optim.peak_lr = 2e-3  # below the base's peak: it has something to lose
    return c
