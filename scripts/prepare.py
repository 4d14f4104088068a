"""Turn raw text into a clean corpus: read sources, drop what fails the quality rules, repeats or holds test questions, and
split off a held-out part. Writes WORKDIR/corpus (parquet shards, funnel.json, samples of what was dropped).

  python scripts/prepare.py --config configs/quickstart.py --workdir runs/first
  python scripts/prepare.py --config configs/base.py --workdir runs/mine --config.prepare.preset=prose \\
      --config.prepare.sources="('web=jsonl:crawl/*.jsonl.gz#text', 'python:code')"

A source is [NAME=]KIND:WHERE:
  text:GLOB                      a file is a document
  jsonl:GLOB#field               a line is a document (.gz and .zst are unpacked)
  parquet:GLOB#column            a row is a document
  hf:NAME[/CONFIG]:SPLIT#field   a Hugging Face data set, streamed
  warc:GLOB                      the main text of crawled pages
  python:prose, code, tasks      what this Python installation carries: English documentation, the standard library, its functions as exercises
Presets of rules: none, course, gopher, c4, fineweb, prose, code. docs/prepare.md explains them, and how a config changes them.
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
            help="overwrite the corpus of another config or other inputs in WORKDIR",
        )

    arguments, settings = config.parse_args(__doc__, flags)
    from jaxpt.data import prepare  # heavy imports after the flags were read: --help stays fast

    prepare.prepare_corpus(settings, stage.local_path(arguments.workdir), arguments.replace)


if __name__ == "__main__":
    stage.entry_point(main)
