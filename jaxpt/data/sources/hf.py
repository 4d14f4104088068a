"""`hf:NAME[/CONFIG][@REVISION]:SPLIT#field`: a record of a Hugging Face data set is a document.

NAME may be a local directory, of files or as `save_to_disk` writes it. Records are streamed. Of the
hub the commit is found when a run begins, and recorded.
"""

from __future__ import annotations

import pathlib
from typing import Any, NamedTuple

from jaxpt import io
from jaxpt.data.sources.fields import try_row
from jaxpt.data.sources.files import first_error_line
from jaxpt.data.sources.parse import clean_name
from jaxpt.data.sources.source import Reading, SourceKind, TextSource
from jaxpt.io import hub
from jaxpt.spec import UserError


def read_hf(source: TextSource, _: str) -> Reading:
    """Yield the documents of a Hugging Face data set."""
    import datasets
    from datasets.table import CastError

    where = parse_dataset(source.pattern)
    datasets.disable_progress_bars()
    try:
        rows = open_dataset(where).with_format("arrow")
        for n, row in enumerate(rows, 1):
            place = f"hf:{source.pattern}:{n}"
            yield try_row(f"{where.split}:{n}", row, source.field, place)
    except CastError as error:
        raise UserError(
            f"hf:{source.pattern}: its files have different columns ({first_error_line(error)}). "
            "Read them as jsonl:GLOB or parquet:GLOB, which look at the named field alone."
        ) from None
    # datasets and the hub raise dozens of types; each means that the data set cannot be read
    except Exception as error:
        raise UserError(
            f"hf:{source.pattern}: {type(error).__name__}: {first_error_line(error)} "
            "Check name, config, split and the network."
        ) from error


def open_dataset(where: HubDataset) -> Any:
    """Return the rows of a data set, streamed, or mapped where `save_to_disk` wrote it."""
    import datasets

    directory = io.path(where.name)
    if io.exists(directory / "state.json"):
        saved = datasets.load_from_disk(where.name)
        if where.split not in ("train", str(saved.split)):
            raise ValueError(
                f"Bad split: {where.split}. It has one alone: write {where.name}:train."
            )
        return saved
    if io.exists(directory / "dataset_dict.json"):
        saved: Any = datasets.load_from_disk(where.name)
        if where.split not in saved:
            raise ValueError(f"Bad split: {where.split}. Available splits: {list(saved)}.")
        return saved[where.split]
    return datasets.load_dataset(
        where.name, where.config, split=where.split, revision=where.revision, streaming=True
    )


class HubDataset(NamedTuple):
    """The WHERE of an hf: source.

    Attributes:
        name: of a data set, or a local directory.
        config: its configuration, if one is given.
        split: such as "train".
        revision: a branch, tag or commit, if one is given.
    """

    name: str
    config: str | None
    split: str
    revision: str | None = None

    @property
    def is_local(self) -> bool:
        """Whether it is a directory."""
        return pathlib.Path(self.name).is_dir()


def parse_dataset(where: str) -> HubDataset:
    """Return the parts of `NAME[/CONFIG][@REVISION]:SPLIT`."""
    name, _, split = where.rpartition(":")
    if pathlib.Path(name).is_dir():
        return HubDataset(name, None, split)
    name, _, revision = name.partition("@")
    owner, *rest = name.split("/", 2)
    config = None
    if len(rest) > 1:
        config = rest.pop()
    return HubDataset("/".join([owner, *rest]), config, split, revision or None)


def pin_dataset(where: str) -> str:
    """Return WHERE with the commit that its revision is now."""
    found = parse_dataset(where)
    if found.is_local:
        return where
    commit = hub.find_dataset_commit(found.name, found.revision)
    place, _, split = where.rpartition(":")
    name, _, _ = place.partition("@")
    return f"{name}@{commit}:{split}"


def describe_commit(source: TextSource) -> dict[str, str]:
    """Return the commit of a pinned data set."""
    revision = parse_dataset(source.pattern).revision
    return {"commit": revision} if revision else {}


def check_dataset(text: str, where: str) -> None:
    """Raise UserError if the split is missing."""
    if ":" not in where:
        raise UserError(
            f"prepare.sources: {text!r}: the split is missing. Write hf:NAME[/CONFIG]:SPLIT#field, "
            f"such as hf:{where}:train#text."
        )


def name_dataset(where: str) -> str:
    """Return a source's name: HuggingFaceFW/fineweb/sample-10BT:train -> fineweb-sample-10BT."""
    found = parse_dataset(where)
    parts = found.name.strip("/").split("/")
    if found.is_local:
        return clean_name(parts[-1])
    words = [*(parts[1:] or parts), found.config or ""]
    return clean_name("-".join(filter(None, words)))


def find_local_dataset(source: TextSource) -> dict[str, pathlib.Path]:
    """Return the directory of a data set that is on a disk."""
    found = parse_dataset(source.pattern)
    return {source.name: pathlib.Path(found.name)} if found.is_local else {}


KIND = SourceKind(
    "hf",
    read_hf,
    has_files=False,
    has_field=True,
    is_streamed=True,
    check_where=check_dataset,
    default_name=name_dataset,
    find_inputs=find_local_dataset,
    describe_versions=describe_commit,
    pin=pin_dataset,
)
