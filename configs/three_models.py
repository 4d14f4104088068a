"""The course's first comparison in small: one general model, and two ways to continue from it.

`general`  6 layers from scratch, on English prose with a tenth of Python code
`tuned`    the general one fine-tuned on 900 tasks: a prompt in words, a function as the answer; the
           loss is on answers only
`python`   the general one, pretrained further on Python code

docs/evaluate.md shows what the three write. On two CPU cores they take some fourteen, one and eight
minutes.
"""

from typing import Literal

from jaxpt.config import defaults


def get_config(model: Literal["general", "tuned", "python"] = "general"):
    c = defaults()
    c.prepare.sources = ("python:prose", "python:code", "python:tasks")
    c.prepare.heldout_frac = 0.05
    c.tokenizer.vocab_size = 8192
    c.tokenizer.sample_mb = 16
    c.pack.seq_len = 512

    c.model.n_layers = 6
    c.model.d_model = 256
    c.model.d_ff = 704
    c.model.n_heads = 8
    c.model.n_kv_heads = 4
    c.model.d_head = 32
    c.model.max_seq_len = 512
    c.model.tie_embeddings = True

    c.train.steps = 600
    c.train.batch_size = 8
    c.train.eval_every = 100
    c.train.eval_sequences = 32
    c.train.checkpoint_every = 100
    c.optim.peak_lr = 3e-3
    c.optim.warmup_frac = 0.05
    c.mixture.phases = ((0, {"prose": 0.9, "code": 0.1}),)

    if model != "general":
        c.mixture.packed_paths = ("runs/general/packed",)
        c.initialize.source = "runs/general"
    if model == "tuned":
        c.mixture.phases = ((0, {"tasks": 1.0}),)
        c.train.steps = 60  # three epochs of the tasks
        c.train.eval_every = c.train.checkpoint_every = 20
        c.optim.peak_lr = 5e-4
        c.optim.warmup_frac = 0.08
    if model == "python":
        c.mixture.phases = ((0, {"code": 0.9, "prose": 0.1}),)
        c.train.steps = 400
        c.optim.warmup_frac = 0.075
        c.optim.peak_lr = 2e-3
    return c
