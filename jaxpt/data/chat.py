"""Conversations as token ids, by the chat template of a tokenizer.

A conversation is a list of messages, {"role": "user", "content": "..."}. transformers renders it,
so that text and ids are those of its apply_chat_template.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxpt.data.conversation import Conversation
from jaxpt.data.tokenizer import SPECIAL_TOKEN_KEYS, Tokenizer, get_token_text
from jaxpt.io import printable
from jaxpt.spec import UserError

GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")


class ChatTemplate:
    """Renders and encodes conversations for one tokenizer."""

    def __init__(self, tokenizer: Tokenizer, where: str):
        """Find the tokenizer's default template.

        Args:
            tokenizer: whose template it is.
            where: what to name in errors.

        Raises:
            UserError: it has none.
        """
        template = tokenizer.chat_template
        if template is None:
            raise UserError(
                f"{where}: its tokenizer has no chat template, so no conversation can be encoded. "
                "Put one beside it, as chat_template.jinja, or use a chat model's tokenizer."
            )
        self.where = where
        self.tokenizer = tokenizer
        self.template = template
        settings = tokenizer.tokenizer_config
        named_tokens = {key: get_token_text(settings.get(key)) for key in SPECIAL_TOKEN_KEYS}
        self.tokens = {key: text for key, text in named_tokens.items() if text}

    def encode_prompt(self, messages: Conversation) -> list[int]:
        """Return the ids of a conversation that the assistant is to continue."""
        text, _ = self.render(messages, for_answer=True)
        return self.tokenizer.encode_with_controls(text)

    def encode_conversations(self, conversations: Sequence[Conversation]) -> list[EncodedChat]:
        """Return the ids of whole conversations, and which of them are not the assistant's."""
        rendered = [self.render_with_spans(messages) for messages in conversations]
        backend = self.tokenizer.control_backend
        texts = [each.text for each in rendered]
        encodings = backend.encode_batch(texts, add_special_tokens=False)
        encoded = []
        for each, encoding in zip(rendered, encodings, strict=True):
            offsets = np.array(encoding.offsets, np.int64).reshape(-1, 2)
            is_assistant = find_tokens_in_spans(offsets, each.spans)
            untrained = find_runs(~is_assistant)
            encoded.append(EncodedChat(np.array(encoding.ids, np.int32), untrained))
        return encoded

    def find_turn_end(self) -> int | None:
        """Return the control token by which the assistant is trained to end an answer, if any."""
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        [encoded] = self.encode_conversations([turns])
        is_trained = np.ones(len(encoded.ids), bool)
        for start, stop in encoded.untrained:
            is_trained[start:stop] = False
        added = self.tokenizer.backend.get_added_tokens_decoder()
        trained = encoded.ids[is_trained].tolist()
        ends = [i for i in trained if i in added and added[i].special]
        return ends[-1] if ends else None

    def render_with_spans(self, messages: Conversation) -> RenderedChat:
        """Return the text of a whole conversation, and where the assistant speaks.

        Where the template marks it by {% generation %}, as transformers finds it. Else from where
        the text that asks for an answer ends to the end of that message, its end token included.

        Raises:
            UserError: a template without marks writes earlier messages otherwise once later ones
                follow, so that no place can be found.
        """
        has_marks = bool(GENERATION_MARK.search(self.template))
        text, spans = self.render(messages, with_spans=has_marks)
        if has_marks:
            return RenderedChat(text, [(start, stop) for start, stop in spans])
        found = []
        for k, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before, _ = self.render(messages[:k], for_answer=True)
            through, _ = self.render(messages[: k + 1])
            if not text.startswith(through) or not through.startswith(before):
                raise UserError(
                    f"{self.where}: its chat template writes message {k + 1} of {len(messages)} "
                    "otherwise once others follow, so what the assistant says cannot be found. Put "
                    "{% generation %} and {% endgeneration %} around it in the template."
                )
            found.append((len(before), len(through)))
        return RenderedChat(text, found)

    def render(
        self, messages: Conversation, *, for_answer: bool = False, with_spans: bool = False
    ) -> tuple[str, Any]:
        """Return the text of a conversation, and the spans of {% generation %} if asked.

        Args:
            messages: of the conversation.
            for_answer: end where the assistant's answer begins.
            with_spans: as (start, stop), in characters.

        Raises:
            UserError: the template refuses the conversation.
        """
        import jinja2
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            rendered: Any = render_jinja_template(
                [messages],
                chat_template=self.template,
                add_generation_prompt=for_answer,
                return_assistant_tokens_mask=with_spans,
                **self.tokens,
            )
        except (jinja2.TemplateError, TypeError, KeyError, ValueError) as error:
            raise UserError(
                f"{self.where}: its chat template cannot render a conversation "
                f"({printable(str(error))}). Expected messages with role and content, in the order "
                "that the template wants."
            ) from None
        [text], spans = rendered
        return text, spans[0] if with_spans else None


class RenderedChat(NamedTuple):
    """A conversation as text."""

    text: str
    spans: list[tuple[int, int]]  # of characters that the assistant says, in order


class EncodedChat(NamedTuple):
    """A conversation as ids."""

    ids: np.ndarray  # int32
    untrained: np.ndarray  # int32 [n, 2], the runs of tokens that are not the assistant's


def find_tokens_in_spans(offsets: np.ndarray, spans: list[tuple[int, int]]) -> np.ndarray:
    """Return which tokens overlap a span, bool [n].

    Source: transformers' apply_chat_template, return_assistant_tokens_mask.

    Args:
        offsets: of each token, in characters, int [n, 2].
        spans: in characters.
    """
    starts, stops = offsets.T
    inside = np.zeros(len(offsets), bool)
    for start, stop in spans:
        inside |= (stops > start) & (starts < stop)
    return inside


def find_runs(mask: np.ndarray) -> np.ndarray:
    """Return where the runs of true values begin and end, int32 [n, 2]."""
    padded = np.concatenate([[False], mask, [False]])
    edges = np.flatnonzero(padded[1:] != padded[:-1])
    return edges.reshape(-1, 2).astype(np.int32)


def read_conversation(value: Any, where: str) -> Conversation:
    """Return a text or a list of messages as a conversation. Raise UserError for another value."""
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    is_list = isinstance(value, list) and value
    if not is_list or not all(map(is_message, value)):
        raise UserError(
            f'{where}: expected messages, [{{"role": "user", "content": "..."}}, ...], got '
            f"{printable(repr(value)[:80])}. Mend or remove it."
        )
    return value


def is_message(value: Any) -> bool:
    """Return whether a JSON value has a role and a text."""
    if not isinstance(value, dict):
        return False
    return isinstance(value.get("role"), str) and isinstance(value.get("content"), str)


def format_conversation(messages: Conversation) -> str:
    """Return a conversation for people: one message alone as it is, several with their roles."""
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n".join(f"{message['role']}: {message['content']}" for message in messages)
