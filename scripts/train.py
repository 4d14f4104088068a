"""Train a model to config.train.steps, from scratch, from another run or from Hugging Face.

Reads packed sequences (config.mixture.packed_paths, or WORKDIR/packed) and writes checkpoints,
metrics.jsonl and tensorboard/ into WORKDIR. Killed and started again with the same command, it
resumes from the newest complete checkpoint and ends with the same weights.

    python scripts/train.py --config configs/quickstart.py --workdir runs/base
"""

import pathlib
import sys

# run from a clone without installing
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from jaxpt import config, stage


def main():
    arguments, settings = config.parse_args(__doc__)
    from jaxpt.plan import cost
    from jaxpt.train import loop

    loop.train_model(
        settings,
        arguments.workdir,
        estimate_device_cost=lambda spec: cost.detect_device_cost(spec, settings),
    )


if __name__ == "__main__":
    stage.use_large_pages()
    stage.entry_point(main)
