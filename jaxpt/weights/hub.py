"""Download models from the Hugging Face hub (hf:NAME), and push exports to it.

Cache, token, endpoint and offline switch are huggingface_hub's own: HF_HOME, HF_TOKEN or
`hf auth login`, HF_ENDPOINT, HF_HUB_OFFLINE.
"""

from __future__ import annotations

import pathlib
import re

from jaxpt import io
from jaxpt.data.tokenizer import NAMED_TEMPLATES
from jaxpt.io.hub import check_is_no_hub_name, download, explain_hub_errors
from jaxpt.spec import UserError

# no .bin and .pt, which are pickles and can run code; no folders, in which repositories keep the
# same weights in other formats
WEIGHT_FILES = ("model.safetensors", "model-*.safetensors", "model.safetensors.index.json")
WEIGHT_FILES += ("adapter_config.json", "adapter_model.safetensors")
MODEL_FILES = ("config.json", "generation_config.json", *WEIGHT_FILES)
# how the names of tokenizer files begin
TOKENIZER_FILES = (
    "tokenizer",
    "special_tokens",
    "vocab",
    "merges",
    "added_tokens",
    "chat_template",
)
TOKENIZER_SUFFIXES = (".json", ".model", ".txt", ".jinja", ".tiktoken")  # no code, no pickles
LINEAGE_FILES = ("jaxpt.json", "manifest.json")  # of our own exports


def download_model(source: str | io.Path) -> io.Path:
    """Return the directory of a source.

    Args:
        source: hf:NAME or hf:NAME@REVISION, downloaded into the hub's cache if it is not there
            already; or a path, returned as it is.

    Raises:
        UserError: the repository does not exist, is not open to this token, is not cached while
            offline, or has no safetensors.
    """
    address = str(source)
    if not address.startswith("hf:"):
        check_is_no_hub_name(address)
        return io.path(source)
    tokenizer_patterns = [
        f"{prefix}*{suffix}" for prefix in TOKENIZER_FILES for suffix in TOKENIZER_SUFFIXES
    ]
    tokenizer_patterns.append(f"{NAMED_TEMPLATES}/*.jinja")
    directory = download(address, [*MODEL_FILES, *tokenizer_patterns, *LINEAGE_FILES])
    if not io.find(directory, "*model*.safetensors"):
        raise UserError(
            f"{source}: has no safetensors, and pickled weights (.bin, .pt) are not opened since "
            "they can run code. Take a revision that has them (hf:NAME@refs/pr/1 where the hub's "
            "converter left one), or save the model again with transformers' save_pretrained."
        )
    return directory


def recorded_hub_name(directory: str | io.Path) -> str | None:
    """Return NAME@REVISION for a directory in the hub's cache."""
    match = re.search(r"models--(.+)/snapshots/(\w+)$", str(directory))
    if not match:
        return None
    folder, revision = match.groups()
    name = folder.replace("--", "/")
    return f"{name}@{revision}"


def check_push_allowed(name: str) -> None:
    """Raise UserError early if the name is invalid or no token is set."""
    from huggingface_hub import get_token
    from huggingface_hub.utils import validate_repo_id

    with explain_hub_errors(name):
        validate_repo_id(name)
    if not get_token():
        raise UserError(
            f"--push {name}: no token for the Hugging Face hub. Log in with `hf auth login`, or "
            "set HF_TOKEN to one that may write."
        )


def push_to_hub(directory: pathlib.Path, name: str, private: bool) -> str:
    """Upload every file of an export to a repository, created if needed. Return its URL."""
    from huggingface_hub import create_repo, upload_folder

    with explain_hub_errors(name):
        url = create_repo(name, private=private or None, exist_ok=True)
        # weights of an earlier export under other names would be read as this one's
        upload_folder(
            repo_id=name,
            folder_path=directory,
            commit_message="Export by jaxpt",
            delete_patterns=list(WEIGHT_FILES),
        )
    return str(url)
