r"""Train or adopt a tokenizer: writes WORKDIR/tokenizer.

Trains on WORKDIR/corpus, or adopts a SentencePiece .model, a tokenizer.json or a Hugging Face
directory (config.tokenizer.source). With --compare, only prints bytes per token for each tokenizer
and source.

  python scripts/train_tokenizer.py --config configs/quickstart.py --workdir runs/first
  python scripts/train_tokenizer.py --config configs/quickstart.py --workdir runs/first \
      --config.tokenizer.source=tokenizer.model
  python scripts/train_tokenizer.py --config configs/quickstart.py --workdir runs/first \
      --compare runs/first/tokenizer tokenizer.model
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
            help="overwrite the tokenizer of another config or corpus in WORKDIR",
        )
        parser.add_argument(
            "--compare",
            nargs="+",
            metavar="PATH",
            type=pathlib.Path,
            help="tokenizers to compare on tokenizer.sample_mb of the corpus",
        )

    arguments, settings = config.parse_args(__doc__, flags)
    from jaxpt.data import tokenizer  # not before --help was answered

    if not arguments.compare:
        tokenizer.train_tokenizer(settings, arguments.workdir, arguments.replace)
        return
    table = tokenizer.compare_tokenizers(
        arguments.compare,
        stage.local_path(arguments.workdir) / "corpus",
        settings.tokenizer.sample_mb,
    )
    sources = list(next(iter(table.values())))
    width = max(len(path) for path in table)
    print("bytes per token".ljust(width) + "".join(f"{source:>14}" for source in sources))
    for path, found in table.items():
        print(path.ljust(width) + "".join(f"{found[source]:14.3f}" for source in sources))


if __name__ == "__main__":
    stage.entry_point(main)
