r"""Train or adopt a tokenizer: writes WORKDIR/tokenizer.

Trains on WORKDIR/corpus, or adopts a SentencePiece .model, a tokenizer.json or a Hugging Face
directory (config.tokenizer.source). With --compare, only prints bytes per token for each tokenizer
and source.

  jaxpt train_tokenizer --config configs/quickstart.py --workdir runs/first
  jaxpt train_tokenizer --config configs/quickstart.py --workdir runs/first \
      --config.tokenizer.source=tokenizer.model
  jaxpt train_tokenizer --config configs/quickstart.py --workdir runs/first \
      --compare runs/first/tokenizer tokenizer.model
"""

import argparse

from jaxpt.cli import options
from jaxpt.text import format_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    options.add_stage(parser, "the tokenizer of another config or corpus")
    parser.add_argument(
        "--compare",
        nargs="+",
        metavar="PATH",
        type=options.parse_path,
        help="tokenizers to compare on tokenizer.sample_mb of the corpus",
    )
    options.add_knobs(parser, ("tokenizer",))


def run(arguments: argparse.Namespace) -> None:
    """Write WORKDIR/tokenizer, or print the table of --compare."""
    settings = options.load_settings(arguments)
    from jaxpt.data import tokenizer

    if not arguments.compare:
        tokenizer.train_tokenizer(
            settings.tokenizer, arguments.workdir, arguments.replace, verify=arguments.verify
        )
        options.suggest_stage("pack", arguments)
        return
    table = tokenizer.compare_tokenizers(
        arguments.compare,
        arguments.workdir / "corpus",
        settings.tokenizer.sample_mb,
    )
    print(format_bytes_per_token(table))
    options.suggest_stage("train_tokenizer", arguments)


def format_bytes_per_token(table: dict[str, dict[str, float]]) -> str:
    """Return a row per tokenizer and a column per source."""
    sources = list(next(iter(table.values())))
    rows = [["bytes per token", *sources]]
    for path, found in table.items():
        rows.append([path, *(f"{found[source]:.3f}" for source in sources)])
    return format_table(rows)
