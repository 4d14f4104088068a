"""Measure a model: lm-evaluation-harness benchmarks and bits per byte of texts, by jaxpt's code or by transformers.

python scripts/evaluate.py --model runs/base --tasks course 'bits_per_byte/prose=parquet:runs/base/corpus/heldout/prose-*.parquet#text' \\
        --data-dir benchmarks/data --to runs/base/eval/course.json
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
        "--model",
        required=True,
        metavar="DIR",
        help="a run, a checkpoint step directory or a Hugging Face directory",
    )
    parser.add_argument(
        "--tasks", required=True, nargs="+", action="extend", metavar="TASK",
        help="harness tasks, 'course', or bits_per_byte/NAME=KIND:WHERE; spaced, repeated, or benchmark names with commas between",
    )  # fmt: skip
    parser.add_argument(
        "--backend",
        choices=("jax", "hf"),
        default="jax",
        help="our code, or transformers and torch (default: jax)",
    )
    parser.add_argument(
        "--limit",
        type=int,
        metavar="N",
        help="read only the first N items or documents of each task",
    )
    parser.add_argument(
        "--max-length",
        type=int,
        metavar="N",
        help="tokens that the model sees at once (default: its longest)",
    )
    parser.add_argument(
        "--data-dir",
        type=pathlib.Path,
        metavar="DIR",
        help="benchmark files on disk; without it the harness downloads its own",
    )
    parser.add_argument("--to", type=pathlib.Path, metavar="FILE.json", help="where the results go")
    arguments = parser.parse_args()

    from jaxpt.evaluate import harness

    harness.evaluate_model(
        stage.local_path(arguments.model), arguments.tasks,
        backend=arguments.backend, limit=arguments.limit, max_length=arguments.max_length, data_dir=arguments.data_dir, to=stage.check_output_path(arguments.to, "results.json"),
    )  # fmt: skip


if __name__ == "__main__":
    stage.entry_point(main)
