"""Export a model to the Hugging Face format: safetensors, config.json, tokenizer and a model card with its lineage.

The directory opens with transformers' AutoModelForCausalLM.from_pretrained and AutoTokenizer.from_pretrained.

    python scripts/export_hf.py --from runs/child --to runs/child/hf
    python scripts/export_hf.py --from runs/child --to runs/child/hf --push me/child --private
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
        "--from",
        dest="source",
        required=True,
        type=pathlib.Path,
        metavar="CHECKPOINT",
        help="a run directory (its newest checkpoint), a checkpoint step directory, a Hugging Face directory or hf:NAME",
    )
    parser.add_argument(
        "--to", required=True, type=pathlib.Path, metavar="HF_DIR", help="the directory to write"
    )
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16"],
        help="of the stored weights; default: as the checkpoint stores them",
    )
    parser.add_argument("--replace", action="store_true", help="overwrite what --to holds")
    parser.add_argument(
        "--push",
        metavar="NAME",
        help="upload the export to this repository of the Hugging Face hub, which is made where it is missing",
    )
    parser.add_argument(
        "--private",
        action="store_true",
        help="a repository that --push makes is seen by its owners only",
    )
    arguments = parser.parse_args()
    from jaxpt import export

    export.export_model(
        arguments.source,
        arguments.to,
        arguments.dtype,
        arguments.replace,
        arguments.push,
        arguments.private,
    )


if __name__ == "__main__":
    stage.entry_point(main)
