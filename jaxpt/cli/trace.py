"""List the documents in the batch of a training step.

Prints position in the batch, source, sequence of the source, tokens, id and first words.

  jaxpt trace --workdir runs/first --step 1200
  jaxpt trace --workdir runs/first --step 1200 --losses

Step N is the N-th update, as metrics.jsonl counts them. Reads WORKDIR/config.json,
WORKDIR/phases.json, the packed sequences that they name and WORKDIR/tokenizer. With --losses each
document's loss is computed with the newest checkpoint before the step (or the first after it), and
documents are sorted by what they add to the step's loss.
"""

import argparse

from jaxpt.cli import options
from jaxpt.text import format_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    parser.add_argument(
        "--workdir", required=True, metavar="DIR", type=options.parse_path, help="the run directory"
    )
    parser.add_argument(
        "--step", required=True, metavar="N", type=int, help="step of the run, from 1"
    )
    parser.add_argument(
        "--losses",
        action="store_true",
        help="compute and rank each document's loss: which one caused this spike?",
    )


def run(arguments: argparse.Namespace) -> None:
    """Print a row per document."""
    from jaxpt.data import loader, tokenizer

    run_dir = arguments.workdir
    encoder = tokenizer.load_tokenizer(run_dir / "tokenizer")

    def list_cells(document: loader.TracedDocument) -> list[str]:
        text = " ".join(encoder.decode(document.tokens[:40].tolist()).split())[:80]
        where = f"{document.source}/{document.sequence}"
        size = f"{len(document.tokens)} tokens"
        return [str(document.slot), where, size, document.document, text]

    if not arguments.losses:
        traced = loader.trace_step(run_dir, arguments.step, encoder.fingerprint)
        print(format_table([list_cells(document) for document in traced], "><><"))
        options.suggest_next("trace", "--workdir", run_dir, "--step", arguments.step, "--losses")
        return
    from jaxpt.evaluate import attribution

    step = arguments.step
    used, ranked = attribution.rank_documents(run_dir, step, encoder.fingerprint)
    print(f"by {used}: nats per token, and what the document adds to the loss of step {step:,}")
    rows = []
    for found in ranked:
        mean = found.loss_sum / found.n_trained
        rows.append([f"{mean:.3f}", f"{found.delta:+.5f}", *list_cells(found.document)])
    print(format_table(rows, ">>><><"))
