"""A conversation as a document: its text for the rules, its messages in the document's meta."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

Message = dict[str, Any]  # role and content, and what else a chat template reads
Conversation = list[Message]

META_KEY = "messages"
META_START = f'{{"{META_KEY}": '  # of the meta of a conversation


def encode_conversation(messages: Conversation) -> str:
    """Return the meta of a conversation's document."""
    return json.dumps({META_KEY: messages}, ensure_ascii=False)


def is_conversation(meta: str) -> bool:
    """Return whether a document with this meta is a conversation."""
    return meta.startswith(META_START)


def decode_conversation(meta: str) -> Conversation:
    """Return the messages of a conversation's document."""
    return json.loads(meta)[META_KEY]


def join_contents(messages: Sequence[Message]) -> str:
    """Return the text that rules, deduplication and the tokenizer's training see."""
    return "\n\n".join(message["content"] for message in messages)
