"""Talk with a model: it continues what is typed, or answers in its chat template's turns."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator
from io import TextIOWrapper
from typing import NamedTuple

from jaxpt import io, logs
from jaxpt.data.chat import ChatTemplate
from jaxpt.data.conversation import Conversation
from jaxpt.data.tokenizer import Tokenizer
from jaxpt.evaluate.continuation import (
    STREAM_EVERY,
    decode_continuation,
    encode_prompts,
    load_with_tokenizer,
    stream_text,
)
from jaxpt.model import decode, transformer
from jaxpt.spec import UserError
from jaxpt.weights.load import LoadedModel

log = logging.getLogger(__name__)

NEW_TALK = "/new"  # typed: forget the turns so far


class AnswerSettings(NamedTuple):
    """How answers are decoded."""

    sampling: decode.Sampling
    max_new: int  # tokens
    seed: int


class Talk:
    """What was said so far, and the model that goes on with it.

    Attributes:
        template: the model's turns; None: each text is continued by itself.
        messages: the turns so far; always empty without a template.
    """

    def __init__(
        self,
        name: str,
        model: LoadedModel,
        encoder: Tokenizer,
        settings: AnswerSettings,
        is_plain: bool,
    ):
        """Say nothing yet. `is_plain`: continue texts, also where there is a chat template."""
        self.model = model
        self.encoder = encoder
        self.settings = settings
        has_turns = encoder.chat_template is not None and not is_plain
        self.template = ChatTemplate(encoder, name) if has_turns else None
        self.name = name
        self.messages: Conversation = []
        self.asked: list[list[int]] = []  # what was given to the model, as ids

    def answer(self, text: str) -> None:
        """Print the continuation of a text, or the answer to it, as it is written.

        What was written before an interruption counts as said.

        Raises:
            UserError: the text, with the turns before it, does not fit into the context.
        """
        text = text.encode("utf-8", "replace").decode()  # bytes that are no text
        messages = [*self.messages, {"role": "user", "content": text}]
        ids = self.encode(text, messages)
        decode.check_prompts(self.model.spec, [ids])
        self.asked.append(ids)
        show = stream_text(self.encoder, ids)
        new: list[int] = []

        waiting = contextlib.ExitStack()

        def watch(_: int, so_far: list[int]) -> None:
            waiting.close()
            new[:] = so_far
            show(so_far)

        what = f"reading {len(ids):,} tokens; a prompt of a new length is compiled first"
        try:
            with waiting:
                waiting.enter_context(logs.announce_if_slow(log, what))
                [new[:]] = decode.generate(
                    self.model.spec,
                    self.model.params,
                    [ids],
                    max_new=self.settings.max_new,
                    sampling=self.settings.sampling,
                    seed=self.settings.seed,
                    # what is asked again draws another answer
                    repeats=[decode.number_repeats(self.asked)[-1]],
                    watch=watch,
                    watch_every=STREAM_EVERY,
                )
        finally:
            show(new, ended=True)
            if self.template:
                said = decode_continuation(self.encoder, ids, new)
                self.messages = [*messages, {"role": "assistant", "content": said}]

    def encode(self, text: str, messages: Conversation) -> list[int]:
        """Return the ids that the model is to go on from."""
        if self.template:
            return self.template.encode_prompt(messages)
        [ids] = encode_prompts(self.encoder, self.name, [text], "text")
        return ids

    def describe(self) -> str:
        """Return what the model is and does, in a line."""
        n_params = transformer.count_params(self.model.spec)
        does = "answers in its chat template" if self.template else "continues your text"
        return f"{self.name}: {n_params:,} parameters, {does}"


def talk(
    source: io.Path, prompt: str | None, settings: AnswerSettings, *, is_plain: bool = False
) -> None:
    """Answer one prompt, or each line that is typed until the end of the input.

    Args:
        source: a run, a checkpoint, a Hugging Face directory, an adapter or hf:NAME.
        prompt: to answer and be done with; None: read lines.
        settings: of decoding.
        is_plain: continue texts, also where there is a chat template.

    Raises:
        UserError: the model cannot be loaded or has no tokenizer, or the prompt does not fit.
    """
    model, encoder = load_with_tokenizer(source)
    talking = Talk(str(source), model, encoder, settings, is_plain)
    if prompt is not None:
        talking.answer(prompt)
        return
    log.info(talking.describe())
    if not sys.stdin.isatty():
        for line in read_lines(mark=""):
            talking.answer(line)
        return
    new = f", {NEW_TALK} begins a new conversation" if talking.template else ""
    log.info(f"Ctrl-C stops an answer, Ctrl-D ends{new}")
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  the arrow keys edit and recall lines
    try:
        for line in read_lines(mark="> "):
            answer_line(talking, line)
    except KeyboardInterrupt:
        log.info("ended")


def answer_line(talking: Talk, line: str) -> None:
    """Answer what was typed; if that cannot be, say why, and the talk goes on."""
    if line.strip() == NEW_TALK and talking.template:
        talking.messages = []
        return
    try:
        talking.answer(line)
    except KeyboardInterrupt:
        log.info("stopped")
    except UserError as error:
        hint = f" {NEW_TALK} begins a new conversation." if talking.messages else ""
        log.warning(f"{error}{hint}")


def read_lines(mark: str) -> Iterator[str]:
    """Yield the lines of the standard input that are not blank, each asked for by a mark."""
    if isinstance(sys.stdin, TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    while True:
        try:
            line = input(mark)
        except EOFError:
            return
        if line.strip():
            yield line
