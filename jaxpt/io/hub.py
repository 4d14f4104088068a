"""Repositories of the Hugging Face hub: hf:NAME or hf:NAME@REVISION, downloaded and resolved."""

from __future__ import annotations

import contextlib
import pathlib
import re
from collections.abc import Iterator, Sequence

from jaxpt.io.files import exists
from jaxpt.io.paths import path
from jaxpt.spec import UserError


def download(address: str, patterns: Sequence[str], noun: str = "model") -> pathlib.Path:
    """Return the local directory of a repository's files, in the hub's cache.

    Args:
        address: hf:NAME or hf:NAME@REVISION.
        patterns: of the names of the files.
        noun: what it is called in errors.

    Raises:
        UserError: the repository does not exist, is not open to this token, or is not cached while
            offline.
    """
    from huggingface_hub import snapshot_download

    name, _, revision = address.removeprefix("hf:").partition("@")
    with explain_hub_errors(address, noun):
        found = snapshot_download(name, revision=revision or None, allow_patterns=list(patterns))
    return pathlib.Path(found)


def check_is_no_hub_name(address: str) -> None:
    """Raise UserError for OWNER/NAME, which names no directory here but may name a repository."""
    owner, _, name = address.partition("/")
    is_name = re.fullmatch(r"[\w-][\w.-]*", owner) and re.fullmatch(r"[\w.-]+", name)
    if is_name and not exists(path(address)) and not exists(path(owner)):
        raise UserError(
            f"{address}: not found. Check the path; a repository of the Hugging Face hub is named "
            f"hf:{address}."
        )


def find_dataset_commit(name: str, revision: str | None) -> str:
    """Return the commit of a data set's branch, tag or commit; without one, of its newest.

    Offline it is that of the hub's cache.

    Raises:
        UserError: as `download`.
    """
    from huggingface_hub import snapshot_download

    with explain_hub_errors(f"hf:{name}", "data set"):
        found = snapshot_download(
            name, repo_type="dataset", revision=revision, allow_patterns=["README.md"]
        )
    return pathlib.Path(found).name


@contextlib.contextmanager
def explain_hub_errors(name: str, noun: str = "model") -> Iterator[None]:
    """Raise any error of the hub as one sentence.

    Args:
        name: of the repository, as the user gave it.
        noun: what it holds.
    """
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
            f"{name}: its authors require a license to be accepted. Accept it on the {noun}'s "
            "page, then log in with `hf auth login`."
        ) from None
    except errors.RepositoryNotFoundError:
        raise UserError(
            f"{name}: the hub has no such {noun}, or none that your token may read. Check the "
            "name; log in with `hf auth login`."
        ) from None
    except errors.RevisionNotFoundError:
        raise UserError(
            f"{name}: the {noun} has no such revision. Give a branch, tag or commit."
        ) from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        raise UserError(
            f"{name}: not complete in this machine's cache, and the hub cannot be reached (is "
            "HF_HUB_OFFLINE set?). Run it again with a connection, or copy the cache from a "
            f"machine that has the {noun}."
        ) from None
    except (OSError, RuntimeError, errors.HfHubHTTPError, errors.XetDownloadError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"{name}: the hub failed ({reason}). Run the same command again; what was transferred "
            "is kept."
        ) from None
