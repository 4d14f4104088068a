r"""Pack WORKDIR/corpus into sequences of token ids with WORKDIR/tokenizer.

Writes WORKDIR/packed: one directory per source, which `datasets.load_from_disk` opens too.

  jaxpt pack --config configs/quickstart.py --workdir runs/first
  jaxpt pack --config configs/quickstart.py --workdir runs/4k --config.pack.seq_len=4096
  jaxpt pack --config configs/quickstart.py --workdir /shared/first \
      --config.prepare.executor=ray
"""

import argparse

from jaxpt.cli import options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    options.add_stage(parser, "sequences of another config, corpus or tokenizer")
    options.add_knobs(parser, ("pack",))


def run(arguments: argparse.Namespace) -> None:
    """Write WORKDIR/packed."""
    settings = options.load_settings(arguments)
    from jaxpt.data import pack

    pack.pack_corpus(
        settings.pack,
        arguments.workdir,
        arguments.replace,
        settings.prepare.executor,
        verify=arguments.verify,
    )
    options.suggest_stage("train", arguments)
