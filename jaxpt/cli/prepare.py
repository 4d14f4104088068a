r"""Prepare a clean corpus from raw text.

Reads sources, drops what fails the quality rules, what repeats and what holds test questions, and
splits off a held-out part. Writes WORKDIR/corpus: parquet shards, funnel.json, samples of what was
dropped.

  jaxpt prepare --config configs/quickstart.py --workdir runs/first
  jaxpt prepare --config configs/base.py --workdir runs/mine \
      --config.prepare.preset=prose \
      --config.prepare.sources="('web=jsonl:crawl/*.jsonl.gz#text', 'python:code')"

A source is [NAME=]KIND:WHERE:
  text:GLOB                      one document per file
  jsonl:GLOB#field               one document per line (.gz and .zst are decompressed)
  parquet:GLOB#column            one document per row
  hf:NAME[/CONFIG]:SPLIT#field   a Hugging Face data set, streamed; NAME@REVISION for another
  warc:GLOB                      main text of crawled pages
  python:prose, code, tasks      text of this Python installation: English documentation, the
                                 standard library, its functions as exercises
Presets of rules: none, course, gopher, c4, fineweb, prose, code. docs/prepare.md explains them and
how a config changes them.
"""

import argparse

from jaxpt.cli import options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    options.add_stage(parser, "the corpus of another config or other inputs")
    parser.add_argument(
        "--preview",
        type=int,
        metavar="N",
        help="print what the rules make of the first N documents of each source, and write nothing",
    )
    options.add_knobs(parser, ("prepare",))


def run(arguments: argparse.Namespace) -> None:
    """Write WORKDIR/corpus."""
    settings = options.load_settings(arguments)
    from jaxpt.data import prepare

    if arguments.preview is not None:
        for line in prepare.preview_corpus(settings.prepare, arguments.preview):
            print(line)
        options.suggest_stage("prepare", arguments)
        return
    prepare.prepare_corpus(
        settings.prepare,
        arguments.workdir,
        arguments.replace,
        settings.tokenizer.source,
        verify=arguments.verify,
    )
    options.suggest_stage("train_tokenizer", arguments)
