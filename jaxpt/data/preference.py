"""A preference pair as a document: prompt and chosen answer; the rejected one in its meta."""

from __future__ import annotations

import json

META_KEY = "rejected"
META_START = f'{{"{META_KEY}": '  # of the meta of a pair


def encode_rejected(rejected: str) -> str:
    """Return the meta of a pair's document."""
    return json.dumps({META_KEY: rejected}, ensure_ascii=False)


def is_pair(meta: str) -> bool:
    """Return whether a document with this meta is a preference pair."""
    return meta.startswith(META_START)


def decode_rejected(meta: str) -> str:
    """Return the rejected answer of a pair's document."""
    return json.loads(meta)[META_KEY]
