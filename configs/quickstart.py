"""The whole pipeline in small: a base model on English prose, grown in depth, continued on code.

`base`   4 layers from scratch, on docstrings, help topics and package descriptions
`child`  the base grown to 6 layers (0 1 2 1 2 3, as SOLAR does), continued on Python code with a
         quarter of prose replayed

On two CPU cores the base trains in one and a half to two and a half minutes, the child in two to
three and a half. The base's held-out prose falls to about 4.7 nats per token (a unigram model has
6.2); the child's held-out code falls from 5.7 to about 4.1.
"""

from typing import Literal

from jaxpt.config import defaults


def get_config(model: Literal["base", "child"] = "base"):
    c = defaults()
    c.prepare.sources = ("python:prose", "python:code")  # what every machine with Python has
    c.prepare.max_mb = 6.0  # per source: some 1.5M tokens, about what this trains on
    c.prepare.heldout_frac = 0.05  # few documents: 2 % would be too few to measure on
    c.tokenizer.vocab_size = 4096  # of so little text, most of a larger one would stay unseen
    c.tokenizer.sample_mb = 8
    c.pack.seq_len = 256

    c.model.n_layers = 4
    c.model.d_model = 192
    c.model.d_ff = 512
    c.model.n_heads = 6
    c.model.n_kv_heads = 2
    c.model.d_head = 32
    c.model.max_seq_len = 256
    c.model.tie_embeddings = True  # at this size the embedding is a third of the parameters

    c.train.steps = 300
    c.train.batch_size = 8
    c.train.eval_every = 60
    c.train.eval_sequences = 64
    c.train.checkpoint_every = 60
    c.optim.peak_lr = 3e-3
    c.optim.warmup_frac = 1 / 15
    c.mixture.phases = ((0, {"prose": 1.0}),)

    if model == "child":
        c.mixture.packed_paths = ("runs/base/packed",)
        # replayed prose keeps the model from forgetting it
        c.mixture.phases = ((0, {"code": 0.75, "prose": 0.25}),)
        c.initialize.source = "runs/grown"
        c.optim.peak_lr = 2e-3  # below the base's peak: it has something to lose
    return c
