"""Encode texts with AutoTokenizer, in a program of its own.

tokenizer_files.py starts this file. Without torch and jaxpt it takes 0.9 s; transformers with torch
would take 3. It reads a JSON list of texts from stdin and prints a JSON object: the class that
AutoTokenizer chose and the ids of each text, or why it cannot open the directory.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any


def main() -> None:
    """Print what AutoTokenizer makes of the texts."""
    sys.modules["torch"] = None  # pyright: ignore  # its import fails, as where it is not installed
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")
    texts = json.load(sys.stdin)
    try:
        found = encode(sys.argv[1], texts)
    except Exception as error:  # by what is wrong, of any type
        found = {"error": str(error).partition("\n")[0] or type(error).__name__}
    json.dump(found, sys.stdout)


def encode(directory: str, texts: list[str]) -> dict[str, Any]:
    """Return the class and the ids."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(
        directory, local_files_only=True, trust_remote_code=False
    )
    return {"class": type(tokenizer).__name__, "ids": [tokenizer(text).input_ids for text in texts]}


if __name__ == "__main__":
    main()
