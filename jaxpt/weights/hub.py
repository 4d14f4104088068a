"""Models on the Hugging Face hub: hf:NAME as a source, and exports pushed there.

Cache, token, endpoint and offline switch are huggingface_hub's own: HF_HOME, HF_TOKEN or `hf auth login`, HF_ENDPOINT, HF_HUB_OFFLINE.
"""

from __future__ import annotations

import contextlib
import pathlib
import re

from jaxpt.spec import UserError
from jaxpt.stage import local_path

# No .bin and .pt, which are pickles and can run code; no folders, where repositories keep the same weights in other formats.
MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model-*.safetensors",
    "model.safetensors.index.json",
)
TOKENIZER_FILES = (
    "tokenizer",
    "special_tokens",
    "vocab",
    "merges",
    "added_tokens",
    "chat_template",
)  # how their names begin
LINEAGE_FILES = ("jaxpt.json", "manifest.json")  # of our own exports


def download_model(source: str | pathlib.Path) -> pathlib.Path:
    """A directory on this machine for a source: hf:NAME or hf:NAME@REVISION is downloaded into the hub's cache, where it is
    not there already; any other path is its own.

    Raises UserError for a repository that is not there, not open to this token, not cached while offline, or without safetensors.
    """
    name, _, revision = str(source).removeprefix("hf:").partition("@")
    if not str(source).startswith("hf:"):
        return local_path(source)
    from huggingface_hub import snapshot_download

    with explain_hub_errors(str(source)):
        directory = snapshot_download(
            name,
            revision=revision or None,
            allow_patterns=[
                *MODEL_FILES,
                *(f"{prefix}*" for prefix in TOKENIZER_FILES),
                *LINEAGE_FILES,
            ],
        )
    if not any(pathlib.Path(directory).glob("model*.safetensors")):
        raise UserError(
            f"{source}: has no safetensors, and pickled weights (.bin, .pt) are not opened since they can run code. "
            "Take a revision that has them (hf:NAME@refs/pr/1 where the hub's converter left one), or save the model again with transformers' save_pretrained."
        )
    return pathlib.Path(directory)


def recorded_hub_name(directory: str | pathlib.Path) -> str | None:
    """NAME@REVISION for a directory of the hub's cache."""
    found = re.search(r"models--(.+)/snapshots/(\w+)$", str(directory))
    return f"{found[1].replace('--', '/')}@{found[2]}" if found else None


def check_push_allowed(name: str) -> None:
    """Raises UserError, before anything is computed, where the name cannot be one or nobody is logged in."""
    from huggingface_hub import get_token
    from huggingface_hub.utils import validate_repo_id

    with explain_hub_errors(name):
        validate_repo_id(name)
    if not get_token():
        raise UserError(
            f"--push {name}: no token of the Hugging Face hub. Log in with `hf auth login`, or set HF_TOKEN to one that may write."
        )


def push_to_hub(directory: pathlib.Path, name: str, private: bool) -> str:
    """Upload every file of an export to the repository `name`, made where it is missing. Returns its address."""
    from huggingface_hub import create_repo, upload_folder

    with explain_hub_errors(name):
        address = create_repo(name, private=private or None, exist_ok=True)
        # weights of an earlier export under other names would be read as this one's
        upload_folder(
            repo_id=name,
            folder_path=directory,
            commit_message="Export by jaxpt",
            delete_patterns=[name for name in MODEL_FILES if "model" in name],
        )
    return str(address)


@contextlib.contextmanager
def explain_hub_errors(name: str):
    """Every way in which the hub says no, as one sentence."""
    from huggingface_hub import errors

    try:
        yield
    except errors.HFValidationError:
        raise UserError(
            f"{name}: cannot be the name of a model on the hub, wanted NAME or OWNER/NAME, with @REVISION where it is a source."
        ) from None
    except errors.GatedRepoError:
        raise UserError(
            f"{name}: its makers ask for a licence to be accepted. Accept it on the model's page of the hub, then log in with `hf auth login`."
        ) from None
    except errors.RepositoryNotFoundError:
        raise UserError(
            f"{name}: the hub has no such model, or none that your token may read. Check the name; log in with `hf auth login`."
        ) from None
    except errors.RevisionNotFoundError:
        raise UserError(
            f"{name}: the model has no such revision. Give one of its branches, tags or commits."
        ) from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        raise UserError(
            f"{name}: not whole in this machine's cache, and the hub cannot be reached (is HF_HUB_OFFLINE set?). "
            "Run it again with a connection, or copy the cache from a machine that has the model."
        ) from None
    except (OSError, RuntimeError, errors.HTTPError, errors.XetDownloadError) as error:
        raise UserError(
            f"{name}: the hub did not do it ({' '.join(str(error).split())[:300]}). Run the same command again; what arrived is kept."
        ) from None
