r"""The course "Pretraining LLMs" (DeepLearning.AI with Upstage), with its numbers.

Lesson 2's rules on your own documents, lesson 3's sequences of 32 tokens, lesson 4's 12-layer
TinySolar architecture grown to 16 layers (308,839,424 parameters), lesson 5's 30 steps. On two CPU
cores the 30 steps take under a minute, at 60 to 75 tokens per second, and 6 GiB. A step reads 64
tokens: the loss falls from 10.9 to about 9, which shows that the pipeline works, not that a model
was trained. The pages of docs/course go through it lesson by lesson.

    run="--config configs/course.py --workdir runs/course"
    jaxpt prepare $run --config.prepare.sources="('jsonl:docs.jsonl#text',)"
    jaxpt train_tokenizer $run --config.tokenizer.source=tokenizer.model
    jaxpt pack $run
    jaxpt train $run
"""

from jaxpt.config import defaults


def get_config():
    c = defaults()
    c.prepare.preset = "course"
    # SOLAR uses Mistral-7B-v0.1's tokenizer: set tokenizer.source to its tokenizer.model
    c.tokenizer.vocab_size = 32_000
    c.pack.seq_len = 32
    c.pack.method = "course"
    c.mixture.document_mask = False  # the lesson attends to the whole sequence

    c.model.n_layers = 12
    c.model.d_model = 1024
    c.model.d_ff = 4096
    c.model.n_heads = 32
    c.model.n_kv_heads = 8
    c.model.d_head = 32
    c.model.vocab_size = 32_000
    c.model.max_seq_len = 2048
    c.model.fields = (("norm_eps", 1e-6),)
    c.initialize.grow = ("depth_upscale(m=4)",)  # layers 0-7, then 4-11

    c.train.steps = 30
    c.train.batch_size = 2
    c.train.log_every = 3
    c.train.eval_every = 0
    c.train.eval_sequences = 8
    c.train.checkpoint_every = 30
    c.train.remat = "full"  # the lesson's gradient checkpointing
    c.optim.peak_lr = 5e-5
    c.optim.schedule = "linear"
    c.optim.end_lr_frac = 0.0
    c.optim.warmup_frac = 1 / 3
    c.optim.b2 = 0.999
    c.optim.weight_decay = 0.0
    return c
