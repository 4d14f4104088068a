"""hf:NAME[/CONFIG]:SPLIT#field: a record of a Hugging Face data set is a document; streamed."""

from __future__ import annotations

import pathlib
from typing import Any, NamedTuple

from jaxpt.data.sources.fields import try_document
from jaxpt.data.sources.files import first_error_line
from jaxpt.data.sources.parse import clean_name
from jaxpt.data.sources.source import Reading, SourceKind, TextSource
from jaxpt.spec import UserError


def read_hf(source: TextSource, _: str) -> Reading:
    """Yield the documents of a Hugging Face data set."""
    import datasets

    name, config, split = parse_dataset(source.pattern)
    datasets.disable_progress_bars()
    try:
        rows: Any = datasets.load_dataset(name, config, split=split, streaming=True)
        for n, record in enumerate(rows, 1):
            yield try_document(f"{split}:{n}", record, source.field, f"hf:{source.pattern}:{n}")
    # datasets and the hub raise dozens of types; each means that the data set cannot be read
    except Exception as error:
        raise UserError(
            f"hf:{source.pattern}: {type(error).__name__}: {first_error_line(error)} "
            "Check name, config, split and the network."
        ) from error


class HubDataset(NamedTuple):
    """The WHERE of an hf: source.

    Attributes:
        name: of a data set, or a local directory.
        config: its configuration, if one is given.
        split: such as "train".
    """

    name: str
    config: str | None
    split: str


def parse_dataset(where: str) -> HubDataset:
    """Return the parts of NAME[/CONFIG]:SPLIT."""
    name, _, split = where.rpartition(":")
    parts = name.split("/")
    if len(parts) > 2 and not pathlib.Path(name).is_dir():
        return HubDataset("/".join(parts[:2]), "/".join(parts[2:]), split)
    return HubDataset(name, None, split)


def check_dataset(text: str, where: str) -> None:
    """Raise UserError if the split is missing."""
    if ":" not in where:
        raise UserError(
            f"prepare.sources: {text!r}: the split is missing. Write hf:NAME[/CONFIG]:SPLIT#field, "
            f"such as hf:{where}:train#text."
        )


def name_dataset(where: str) -> str:
    """Return a source's name: HuggingFaceFW/fineweb/sample-10BT:train -> fineweb-sample-10BT."""
    path = where.rpartition(":")[0]
    parts = path.strip("/").split("/")
    if pathlib.Path(path).is_dir():
        return clean_name(parts[-1])
    return clean_name("-".join(parts[1:] or parts))


def find_local_dataset(source: TextSource) -> dict[str, pathlib.Path]:
    """Return the directory of a data set that is on a disk."""
    directory = pathlib.Path(parse_dataset(source.pattern).name)
    return {source.name: directory} if directory.is_dir() else {}


KIND = SourceKind(
    "hf",
    read_hf,
    has_files=False,
    has_field=True,
    is_streamed=True,
    check_where=check_dataset,
    default_name=name_dataset,
    find_inputs=find_local_dataset,
)
