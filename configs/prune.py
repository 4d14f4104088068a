"""A smaller model from the quickstart's base: a third fewer parameters, recovered by distillation.

`first`   the base without 31 % of its parameters: a layer and three eighths of each MLP, those
          without which it does best; then 300 steps of distillation from the base
`second`  the first one with half of each MLP's rest, 42 % smaller than the base and distilled from
          it too: more than a third at once recovers badly

The learning rate is a fifth of the base's, after 100 steps of warm-up (Minitron, 2407.14679).
The quickstart's base is far from converged: its child soon knows more than it, and listens to the
text. It needs the quickstart's runs/base, and takes about as long as that did:

    jaxpt train --config configs/prune.py --workdir runs/pruned
    jaxpt train --config configs/prune.py:second --workdir runs/pruned_again
"""

from typing import Literal

from jaxpt.config import defaults


def get_config(stage: Literal["first", "second"] = "first"):
    c = defaults()
    c.mixture.packed_paths = ("runs/base/packed",)
    c.mixture.phases = ((0, {"prose": 1.0}),)
    c.pack.seq_len = 256

    c.initialize.source = "runs/base"
    c.initialize.grow = ("narrow(ff=320)", "drop_layers(n=1, by='loss')")
    if stage == "second":
        c.initialize.source = "runs/pruned"
        c.initialize.grow = ("narrow(ff=160)",)
    c.distill.teacher = "runs/base"
    c.distill.alpha = (0.5, 0.0)  # from a parent that has converged (0.9, 0.5), the default

    c.train.steps = 300
    c.train.batch_size = 8
    c.train.eval_every = 60
    c.train.eval_sequences = 64
    c.train.checkpoint_every = 60
    c.optim.peak_lr = 3e-3 / 5
    c.optim.warmup_frac = 1 / 3  # 100 steps
    return c
