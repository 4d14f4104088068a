"""Download models from the Hugging Face hub (hf:NAME), and push exports to it.

Cache, token, endpoint and offline switch are huggingface_hub's own: HF_HOME, HF_TOKEN or
`hf auth login`, HF_ENDPOINT, HF_HUB_OFFLINE.
"""

from __future__ import annotations

import contextlib
import pathlib
import re
from collections.abc import Iterator

from jaxpt import io
from jaxpt.spec import UserError

# no .bin and .pt, which are pickles and can run code; no folders, in which repositories keep the
# same weights in other formats
WEIGHT_FILES = ("model.safetensors", "model-*.safetensors", "model.safetensors.index.json")
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
        return io.path(source)
    from huggingface_hub import snapshot_download

    name, _, revision = address.removeprefix("hf:").partition("@")
    tokenizer_patterns = [
        f"{prefix}*{suffix}" for prefix in TOKENIZER_FILES for suffix in TOKENIZER_SUFFIXES
    ]
    patterns = [*MODEL_FILES, *tokenizer_patterns, *LINEAGE_FILES]
    with explain_hub_errors(address):
        path = snapshot_download(name, revision=revision or None, allow_patterns=patterns)
    directory = pathlib.Path(path)
    if not io.find(directory, "model*.safetensors"):
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


@contextlib.contextmanager
def explain_hub_errors(name: str) -> Iterator[None]:
    """Raise any error of the hub as one sentence."""
    from huggingface_hub import errors

    try:
        yield
    except errors.HFValidationError:
        raise UserError(
            f"{name}: not a valid name on the hub, expected NAME or OWNER/NAME, with @REVISION "
            "for a source."
        ) from None
    except errors.GatedRepoError:
        raise UserError(
            f"{name}: its authors require a license to be accepted. Accept it on the model's page, "
            "then log in with `hf auth login`."
        ) from None
    except errors.RepositoryNotFoundError:
        raise UserError(
            f"{name}: the hub has no such model, or none that your token may read. Check the name; "
            "log in with `hf auth login`."
        ) from None
    except errors.RevisionNotFoundError:
        raise UserError(
            f"{name}: the model has no such revision. Give a branch, tag or commit."
        ) from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        raise UserError(
            f"{name}: not complete in this machine's cache, and the hub cannot be reached (is "
            "HF_HUB_OFFLINE set?). Run it again with a connection, or copy the cache from a "
            "machine that has the model."
        ) from None
    except (OSError, RuntimeError, errors.HfHubHTTPError, errors.XetDownloadError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"{name}: the hub failed ({reason}). Run the same command again; what was transferred "
            "is kept."
        ) from None
