r"""Prepare a clean corpus from raw text.

Reads sources, drops what fails the quality rules, what repeats and what holds test questions, and
splits off a held-out part. Writes WORKDIR/corpus: parquet shards, funnel.json, samples of what was
dropped.

  python scripts/prepare.py --config configs/quickstart.py --workdir runs/first
  python scripts/prepare.py --config configs/base.py --workdir runs/mine \
      --config.prepare.preset=prose \
      --config.prepare.sources="('web=jsonl:crawl/*.jsonl.gz#text', 'python:code')"

A source is [NAME=]KIND:WHERE:
  text:GLOB                      one document per file
  jsonl:GLOB#field               one document per line (.gz and .zst are decompressed)
  parquet:GLOB#column            one document per row
  hf:NAME[/CONFIG]:SPLIT#field   a Hugging Face data set, streamed
  warc:GLOB                      main text of crawled pages
  python:prose, code, tasks      text of this Python installation: English documentation, the
                                 standard library, its functions as exercises
Presets of rules: none, course, gopher, c4, fineweb, prose, code. docs/prepare.md explains them and
how a config changes them.
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
            help="overwrite the corpus of another config or other inputs in WORKDIR",
        )

    arguments, settings = config.parse_args(__doc__, flags)
    from jaxpt.data import prepare  # not before --help was answered

    prepare.prepare_corpus(settings, stage.local_path(arguments.workdir), arguments.replace)


if __name__ == "__main__":
    stage.entry_point(main)
