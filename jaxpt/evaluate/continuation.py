"""Read prompts and write what a model makes of them: ids in, text out as it comes."""

from __future__ import annotations

from typing import Protocol

from jaxpt import config, io
from jaxpt.data import chat, tokenizer
from jaxpt.data.conversation import Conversation
from jaxpt.sharding import make_mesh
from jaxpt.spec import UserError
from jaxpt.weights.load import LoadedModel, load_model, open_tokenizer

Prompt = str | Conversation
STREAM_EVERY = 4  # tokens between two updates of the terminal


def load_with_tokenizer(model: io.Path) -> tuple[LoadedModel, tokenizer.Tokenizer]:
    """Load a model and its tokenizer. Raise UserError if it has none."""
    mesh = make_mesh(config.MeshConfig())
    loaded = load_model(model, mesh)
    if loaded.tokenizer_dir is None:
        raise UserError(
            f"{model}: has no tokenizer beside it (tokenizer.json), so it cannot read a prompt. "
            "Copy the one that it was trained with there."
        )
    return loaded, open_tokenizer(loaded)


def encode_prompts(
    encoder: tokenizer.Tokenizer, name: str, prompts: list[Prompt], read_as: str
) -> list[list[int]]:
    """Return the ids of each prompt, for one model."""
    if read_as == "chat":
        template = chat.ChatTemplate(encoder, name)
        conversations = [chat.read_conversation(prompt, "--prompts") for prompt in prompts]
        return [template.encode_prompt(each) for each in conversations]
    texts = list(map(str, prompts))
    if read_as == "control tokens":
        encoded = list(map(encoder.encode_with_controls, texts))
    else:
        encoded = encoder.encode_batch(texts)
    bos_id = encoder.bos_id
    if bos_id is None:
        return encoded
    return [ids if ids[:1] == [bos_id] else [bos_id, *ids] for ids in encoded]


class ShowProgress(Protocol):
    """What shows a continuation while it is written."""

    def __call__(self, new: list[int], ended: bool = False) -> None:
        """Show all new tokens so far; `ended` on the last call."""


def stream_text(encoder: tokenizer.Tokenizer, ids: list[int]) -> ShowProgress:
    """Return a function that prints what the tokens add to the text since its last call."""
    shown = ""

    def show(new: list[int], ended: bool = False) -> None:
        nonlocal shown
        text = decode_continuation(encoder, ids, new)
        if not ended:
            text = text.rstrip("\N{REPLACEMENT CHARACTER}")  # a character of several tokens
        added = text[len(shown) :]
        end = "\n" if ended else ""
        print(escape_controls(added), end=end, flush=True)
        shown = text

    return show


def decode_continuation(encoder: tokenizer.Tokenizer, ids: list[int], new: list[int]) -> str:
    """Return the text that new tokens add to a prompt."""
    # decoded together: a space at the beginning of the continuation would be lost otherwise
    before = encoder.decode(ids)
    whole = encoder.decode(ids + new)
    if whole.startswith(before):
        return whole.removeprefix(before)
    return encoder.decode(new)


def escape_controls(text: str) -> str:
    """Return a text without control characters but line ends, so that none has an effect."""
    return io.printable(text.expandtabs(4), keep="\n")
