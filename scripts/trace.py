"""Name the documents that a step of a training run saw: row of the batch, source, row of the source, tokens, id, first words.

  python scripts/trace.py --workdir runs/first --step 1200
  python scripts/trace.py --workdir runs/first --step 1200 --losses

Step N is the N-th update, as metrics.jsonl counts them. Reads WORKDIR/config.json, WORKDIR/phases.json, the packed rows that they name and
WORKDIR/tokenizer. With --losses each document's loss is computed by the newest checkpoint before the step (or the first after it), and
the documents come in the order of what they add to the step's loss.
"""

import argparse
import pathlib
import sys

sys.path.insert(
    0, str(pathlib.Path(__file__).resolve().parent.parent)
)  # run from a clone without installing

from jaxpt import stage


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--workdir", required=True, metavar="DIR", type=pathlib.Path, help="the run directory"
    )
    parser.add_argument(
        "--step", required=True, metavar="N", type=int, help="an update of the run, from 1"
    )
    parser.add_argument(
        "--losses",
        action="store_true",
        help="compute each document's loss and rank them: who made this spike?",
    )
    arguments = parser.parse_args()
    from jaxpt.data import loader, tokenizer

    run = stage.local_path(arguments.workdir)
    words = tokenizer.load_tokenizer(run / "tokenizer")

    def tell(seen: loader.TracedDocument, loss: str = "") -> None:
        text = " ".join(words.decode(seen.tokens[:40].tolist()).split())
        print(
            f"{loss}{seen.slot:5d}  {seen.source}/{seen.sequence}  {len(seen.tokens):6d} tokens  {seen.document}  {text[:80]}"
        )

    if not arguments.losses:
        for seen in loader.trace_step(run, arguments.step, words.fingerprint):
            tell(seen)
        return
    from jaxpt.evaluate import attribution

    used, found = attribution.rank_documents(run, arguments.step, words.fingerprint)
    print(
        f"by {used}: nats a token, and what the document adds to the loss of step {arguments.step:,}"
    )
    for each in found:
        tell(each.document, f"{each.loss_sum / each.n_trained:7.3f} {each.delta:+9.5f}  ")


if __name__ == "__main__":
    stage.entry_point(main)
