"""A conversation: messages, which stand in a document's meta, and the text that they make."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Message = dict[str, Any]  # role and content, and what else a chat template reads
Conversation = list[Message]


def join_contents(messages: Sequence[Message]) -> str:
    """Return the text that rules, deduplication and the tokenizer's training see."""
    return "\n\n".join(message["content"] for message in messages)
