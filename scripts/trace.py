"""Name the documents that a step of a training run saw: row of the batch, source, row of the source, tokens, id, first words.

  python scripts/trace.py --workdir runs/first --step 1200

Step N is the N-th update, as metrics.jsonl counts them. Reads WORKDIR/config.json, the packed rows that it names, WORKDIR/tokenizer.
"""

import argparse
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))  # run from a clone without installing

from jaxpt import stage


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", required=True, metavar="DIR", type=pathlib.Path, help="the run directory")
    parser.add_argument("--step", required=True, metavar="N", type=int, help="an update of the run, from 1")
    arguments = parser.parse_args()
    from jaxpt.data import loader, tokenizer

    words = tokenizer.load(arguments.workdir / "tokenizer")
    for seen in loader.trace(arguments.workdir, arguments.step, words.fingerprint):
        text = " ".join(words.decode(seen.tokens[:40].tolist()).split())
        stage.say(f"{seen.slot:5d}  {seen.source}/{seen.row}  {len(seen.tokens):6d} tokens  {seen.document}  {text[:80]}")


if __name__ == "__main__":
    stage.door(main)
