"""Turn WORKDIR/corpus into rows of token ids by WORKDIR/tokenizer. Writes WORKDIR/packed: one directory a source, which
`datasets.load_from_disk` opens too.

  python scripts/pack.py --config configs/quickstart.py --workdir runs/first
  python scripts/pack.py --config configs/quickstart.py --workdir runs/first --config.pack.seq_len=4096
  python scripts/pack.py --config configs/quickstart.py --workdir /shared/first --config.prepare.executor=ray
"""

import pathlib
import sys

sys.path.insert(
    0, str(pathlib.Path(__file__).resolve().parent.parent)
)  # run from a clone without installing

from jaxpt import config, stage


def main():
    def flags(parser):
        parser.add_argument(
            "--replace",
            action="store_true",
            help="overwrite the rows of another config, corpus or tokenizer in WORKDIR",
        )

    arguments, settings = config.parse_args(__doc__, flags)
    from jaxpt.data import pack  # heavy imports after the flags were read: --help stays fast

    pack.pack_corpus(settings, arguments.workdir, arguments.replace)


if __name__ == "__main__":
    stage.entry_point(main)
