"""A document from a record's field, a text or messages, or from several.

Two are prompt+completion, three prompt+chosen+rejected.
"""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from jaxpt.data.conversation import join_contents
from jaxpt.data.meta import CONVERSATION, PAIR
from jaxpt.data.sources.source import Document
from jaxpt.spec import UserError


def try_document(id: str, record: dict[str, Any], fields: str, place: str) -> Document | UserError:
    """Return the document of a record, or the error that `make_document` raises."""
    try:
        return make_document(id, record, fields, place)
    except UserError as error:
        return error


def try_row(
    id: str, row: pa.RecordBatch | pa.Table, fields: str, place: str
) -> Document | UserError:
    """Return the document of a single Arrow row, or the error that its own values cause."""
    record: dict[str, Any] = dict.fromkeys(row.schema.names)
    known = [field for field in fields.split("+") if field in record]
    try:
        [values] = row.select(known).to_pylist()
    except UnicodeDecodeError as error:
        return UserError(
            f"{place}: byte {error.start} of a field is not UTF-8 ({error.reason}). Mend or remove "
            "the record."
        )
    return try_document(id, record | values, fields, place)


def make_document(id: str, record: dict[str, Any], fields: str, place: str) -> Document:
    """Return the document that a record's field, or its prompt+completion, makes.

    Raises:
        UserError: a field is missing or no text, or the completion is empty; it names the place.
    """
    if isinstance(record.get(fields), list):
        return make_conversation(id, record[fields], place)
    *prompt, text = [get_text_field(record, field, place) for field in fields.split("+")]
    if len(prompt) == 2:
        return make_pair(id, prompt[0], prompt[1], text, place)
    if prompt and not text:
        raise UserError(
            f"{place}: its completion is empty, so there is nothing to learn from it. Remove the "
            "record."
        )
    prompt_text = "".join(prompt)
    return Document(id, prompt_text + text, len(prompt_text))


def make_pair(id: str, prompt: str, chosen: str, rejected: str, place: str) -> Document:
    """Return the document of a preference pair: prompt and chosen answer, the other in its meta.

    Raises:
        UserError: an answer is empty, or both are the same.
    """
    if not chosen or not rejected or chosen == rejected:
        raise UserError(
            f"{place}: expected two different answers, chosen and rejected, got {chosen!r:.40} and "
            f"{rejected!r:.40}. Remove the record."
        )
    rejected = rejected.replace("\r\n", "\n").replace("\r", "\n")
    return Document(id, prompt + chosen, len(prompt), PAIR.encode(rejected))


def make_conversation(id: str, messages: list[Any], place: str) -> Document:
    """Return the document of a list of messages: their contents, and themselves as its meta.

    Raises:
        UserError: they are none, or no assistant says anything.
    """
    cleaned = []
    for message in messages:
        if not isinstance(message, dict):
            message = {}
        role, content = (get_text_field(message, name, place) for name in ("role", "content"))
        content = content.replace("\r\n", "\n").replace("\r", "\n")
        cleaned.append({**message, "role": role, "content": content})
    if not any(message["role"] == "assistant" for message in cleaned):
        raise UserError(
            f"{place}: no message is an assistant's, so there is nothing to learn from it. Remove "
            "the record."
        )
    return Document(id, join_contents(cleaned), 0, CONVERSATION.encode(cleaned))


def get_text_field(record: dict[str, Any], field: str, place: str) -> str:
    """Return record[field]. Raise UserError, naming the place, if it is no text."""
    if field not in record:
        raise UserError(
            f"{place}: has no field {field!r}; it has: {', '.join(record)}. Name the field that "
            "holds the text after '#'."
        )
    text = record[field]
    if not isinstance(text, str):
        raise UserError(
            f"{place}: field {field!r}: expected text, got {type(text).__name__}. Name another "
            "field or mend the record."
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{place}: character {error.start + 1} is half of a surrogate pair, which is no text. "
            "Mend or remove the record."
        ) from None
    return text
