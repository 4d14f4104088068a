"""TinySolar in small, for the pages of docs/course: its 12 layers and its ratios, 64 wide.

`general`  from scratch, on English prose with a tenth of Python code
`tuned`    the general one fine-tuned on tasks: a prompt in words, a function as the answer
`python`   the general one, pretrained further on Python code, with a tenth of prose replayed

On two CPU cores they take about 50, 17 and 18 seconds, with their start and compilation.
"""

from jaxpt.config import defaults


def get_config(model="general"):
    c = defaults()
    c.prepare.sources = ("python:prose", "python:code", "python:tasks")
    c.prepare.max_mb = 4.0  # per source: some 1M tokens, more than this trains on
    c.prepare.heldout_frac = 0.05
    c.tokenizer.vocab_size = 2048
    c.tokenizer.sample_mb = 8
    c.pack.seq_len = 128

    c.model.n_layers = 12
    c.model.d_model = 64  # the lesson's 1024, 4096, 32 and 8: ratios kept, heads half as wide
    c.model.d_ff = 256
    c.model.n_heads = 4
    c.model.n_kv_heads = 1
    c.model.d_head = 16
    c.model.max_seq_len = 256
    c.model.fields = (("norm_eps", 1e-6),)

    c.train.steps = 120
    c.train.batch_size = 16
    c.train.grad_accum_steps = 4  # micro-batches that stay in a CPU's cache
    c.train.log_every = 20
    c.train.eval_every = 40
    c.train.eval_sequences = 32
    c.train.checkpoint_every = c.train.keep_every = 40
    c.optim.peak_lr = 3e-3
    c.optim.warmup_frac = 0.1
    c.mixture.phases = ((0, {"prose": 0.9, "code": 0.1}),)

    if model != "general":
        c.mixture.packed_paths = ("runs/general/packed",)
        c.initialize.source = "runs/general"
        c.optim.peak_lr = 2e-3  # below the general one's peak: it has something to lose
    if model == "tuned":
        c.mixture.phases = ((0, {"tasks": 1.0}),)
        c.train.steps = 40
        c.train.eval_every = c.train.checkpoint_every = 20
        c.optim.peak_lr = 5e-4
        c.optim.warmup_frac = 0.125
    if model == "python":
        c.mixture.phases = ((0, {"code": 0.9, "prose": 0.1}),)
        c.train.steps = 40
        c.train.eval_every = c.train.checkpoint_every = 20
        c.optim.warmup_frac = 0.25
    return c
