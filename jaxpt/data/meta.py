"""What a document's meta holds beside its text: a conversation's messages, a second answer."""

from __future__ import annotations

import json
from typing import Any, NamedTuple


class MetaKind(NamedTuple):
    """A meta that begins with one key, by which its documents are known."""

    key: str

    def encode(self, value: Any) -> str:
        """Return the meta of a document of this kind."""
        return json.dumps({self.key: value}, ensure_ascii=False)

    def is_in(self, meta: str) -> bool:
        """Return whether a document with this meta is of this kind."""
        return meta.startswith(f'{{"{self.key}": ')

    def decode(self, meta: str) -> Any:
        """Return the value in a document's meta."""
        return json.loads(meta)[self.key]


CONVERSATION = MetaKind("messages")  # whose contents are the text
PAIR = MetaKind("rejected")  # whose prompt and chosen answer are the text
