"""Train a model: from random weights, from another run's, or from a Hugging Face directory, to config.train.steps.

Reads packed rows (config.mixture.packed_paths, or WORKDIR/packed) and writes checkpoints, metrics.jsonl and tensorboard/ into
WORKDIR. Killed and started again with the same command, it goes on from the newest whole checkpoint and ends with the
same weights.

    python scripts/train.py --config configs/quickstart.py --workdir runs/base
"""

import pathlib
import sys

sys.path.insert(
    0, str(pathlib.Path(__file__).resolve().parent.parent)
)  # run from a clone without installing

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
