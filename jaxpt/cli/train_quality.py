r"""Train a classifier of good and ordinary documents for the rule `quality`.

Prints how well it tells documents apart that it was not trained on, beside what their length alone
tells. The file is a fastText model. The two lists may be of anything: toxic text and other text.

  jaxpt train_quality --good "jsonl:picked.jsonl#text" --ordinary "jsonl:crawl/*.jsonl#text" \
      --out quality.bin
  jaxpt prepare ... --config.prepare.rules="('quality(model=\"quality.bin\", least=0.5)',)"
"""

import argparse
import itertools

from jaxpt import io
from jaxpt.cli import options
from jaxpt.text import format_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    for name in ("good", "ordinary"):
        parser.add_argument(
            f"--{name}",
            nargs="+",
            required=True,
            metavar="SOURCE",
            help=f"{name} documents, as in prepare.sources",
        )
    parser.add_argument(
        "--out", required=True, metavar="FILE", type=options.parse_path, help="the model to write"
    )
    parser.add_argument(
        "--documents",
        type=int,
        default=100_000,
        metavar="N",
        help="the first documents of each list, at most (default: 100,000)",
    )


def run(arguments: argparse.Namespace) -> None:
    """Write the model and print its measures."""
    from jaxpt.data import classifier, sources, train_classifier

    def read(texts: list[str]) -> list[str]:
        found = map(sources.TextSource.iterate_documents, sources.parse_sources(texts))
        documents = itertools.chain.from_iterable(found)
        return [each.text for each in itertools.islice(documents, max(arguments.documents, 0))]

    trained = train_classifier.train_classifier(read(arguments.good), read(arguments.ordinary))
    io.write_bytes(arguments.out, classifier.encode_classifier(trained.model))
    rows = [["held out", "precision", "recall", "AUC"]]
    for name, quality in (("by words", trained.quality), ("by length", trained.by_length)):
        values = (quality.precision, quality.recall, quality.auc)
        rows.append([name, *(f"{value:.3f}" for value in values)])
    print(format_table(rows))
    print(f"trained on {trained.n_train:,} documents, measured on {trained.n_heldout:,} others")
    print(f"wrote {arguments.out}: quality(model={str(arguments.out)!r}, least=0.5)")
    rule = f"('quality(model=\"{arguments.out}\", least=0.5)',)"
    options.suggest_next(
        "prepare", "--config", "FILE", "--workdir", "DIR", f"--config.prepare.rules={rule}"
    )
