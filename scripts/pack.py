r"""Pack WORKDIR/corpus into sequences of token ids with WORKDIR/tokenizer.

Writes WORKDIR/packed: one directory per source, which `datasets.load_from_disk` opens too.

  python scripts/pack.py --config configs/quickstart.py --workdir runs/first
  python scripts/pack.py --config configs/quickstart.py --workdir runs/4k --config.pack.seq_len=4096
  python scripts/pack.py --config configs/quickstart.py --workdir /shared/first \
      --config.prepare.executor=ray
"""

import pathlib
import sys

# run from a clone without installing
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from jaxpt import config, stage


def main():
    def flags(parser):
        parser.add_argument(
            "--replace",
            action="store_true",
            help="overwrite sequences of another config, corpus or tokenizer in WORKDIR",
        )

    arguments, settings = config.parse_args(__doc__, flags)
    from jaxpt.data import pack  # not before --help was answered

    pack.pack_corpus(settings, arguments.workdir, arguments.replace)


if __name__ == "__main__":
    stage.entry_point(main)
