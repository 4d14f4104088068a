"""jaxpt sample: a model continues a text, or answers in turns, as it is written."""

import builtins
import io
import itertools
import logging
import sys

import pytest
from conftest import ROOT
from entry_points import run_command
from test_chat import PLAIN, SPEC
from test_special_tokens import write_tokenizer

from jaxpt.data import chat, tokenizer
from jaxpt.evaluate import compare, talk
from jaxpt.model import decode, transformer
from jaxpt.weights import huggingface

LONG = SPEC.replace(max_seq_len=192, eos_ids=(258,))
SETTINGS = talk.AnswerSettings(decode.Sampling(temperature=1.0), max_new=7, seed=3)


@pytest.fixture(scope="module")
def model(tmp_path_factory, one):
    """A model of random weights with a chat template."""
    directory = write_tokenizer(tmp_path_factory.mktemp("talk") / "model", "<|begin|>")
    (directory / "chat_template.jinja").write_text(PLAIN)
    huggingface.write_hf_model(LONG, transformer.init_params(LONG, 1, one), directory)
    return directory


@pytest.fixture
def asked(monkeypatch):
    """The prompts that the model is given, as ids; it says "yes" or "no" in turn."""
    given = []
    answers = itertools.cycle((b"yes", b"no"))

    def generate(spec, params, prompts, *, watch, **_):
        given.extend(prompts)
        new = encode(next(answers).decode())
        watch(0, new[:1])
        watch(0, new)
        return [new]

    monkeypatch.setattr(decode, "generate", generate)
    return given


def encode(text):
    """One token per byte; printable ASCII begins with "!"."""
    return [ord(letter) - ord("!") for letter in text]


@pytest.fixture
def logged(monkeypatch, caplog):
    """What the package logs."""
    monkeypatch.setattr(logging.getLogger("jaxpt"), "propagate", True)
    caplog.set_level(logging.INFO, "jaxpt")
    return caplog


def type_lines(monkeypatch, *lines):
    """Type at a terminal; an exception is raised instead, as by Ctrl-C."""
    left = iter(lines)

    def read(mark):
        assert mark == "> "
        line = next(left, EOFError())
        if isinstance(line, BaseException):
            raise line
        return line

    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    monkeypatch.setattr(builtins, "input", read)


def test_a_prompt_is_continued_as_compare_continues_it(model, capsys):
    greedy = talk.AnswerSettings(decode.Sampling(), max_new=9, seed=0)
    talk.talk(model, "The sea", greedy, is_plain=True)
    printed = capsys.readouterr().out
    [prompt] = compare.compare_samples([model], ["The sea"], max_new=9).prompts
    assert printed == compare.escape_controls(prompt.outputs[0].text) + "\n" != "\n"


def test_what_is_asked_again_draws_another_answer_and_a_seed_repeats_the_talk(
    model, capsys, monkeypatch
):
    printed = []
    for seed in (3, 3, 4):
        monkeypatch.setattr(sys, "stdin", io.StringIO("The sea\n\nThe sea\n"))
        talk.talk(model, None, SETTINGS._replace(seed=seed), is_plain=True)
        printed.append(capsys.readouterr().out)
    first, second, other = printed
    assert first == second != other
    assert len(first.split("\n")) == 3 and len(set(first.split("\n"))) == 3


def test_an_answer_is_asked_for_with_the_turns_before_it(model, asked, monkeypatch, capsys):
    type_lines(monkeypatch, "a", " ", "b", talk.NEW_TALK, "c")
    talk.talk(model, None, SETTINGS)
    template = chat.ChatTemplate(tokenizer.load_tokenizer(model), "it")
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "yes"}]
    talks = [turns[:1], [*turns, {"role": "user", "content": "b"}]]
    talks.append([{"role": "user", "content": "c"}])
    assert asked == [template.encode_prompt(each) for each in talks]
    assert capsys.readouterr().out == "yes\nno\nyes\n"


def test_a_turn_too_many_is_a_sentence_and_the_talk_goes_on(model, asked, monkeypatch, logged):
    type_lines(monkeypatch, "a", "b" * 200, talk.NEW_TALK, "c")
    talk.talk(model, None, SETTINGS)
    [warning] = [each for each in logged.records if each.levelno == logging.WARNING]
    assert "context is 192" in warning.message
    assert warning.message.endswith(f"{talk.NEW_TALK} begins a new conversation.")
    assert len(asked) == 2


def test_an_interrupted_answer_is_said_and_an_interrupted_talk_ends_in_a_sentence(
    model, asked, monkeypatch, logged, capsys
):
    whole = decode.generate

    def interrupt_first(*args, watch, **settings):
        def stop(i, new):
            watch(i, new)
            if len(asked) == 1:
                raise KeyboardInterrupt

        return whole(*args, watch=stop, **settings)

    monkeypatch.setattr(decode, "generate", interrupt_first)
    type_lines(monkeypatch, "a", "b", KeyboardInterrupt())
    talk.talk(model, None, SETTINGS)
    assert capsys.readouterr().out == "y\nno\n"
    template = chat.ChatTemplate(tokenizer.load_tokenizer(model), "it")
    roles = ("user", "assistant", "user")
    turns = [{"role": r, "content": c} for r, c in zip(roles, "ayb", strict=True)]
    assert asked[1] == template.encode_prompt(turns)
    assert [record.message for record in logged.records][-2:] == ["stopped", "ended"]


@pytest.mark.parametrize(
    "flags, expected",
    [
        (["--model", "no/such/run"], "no such directory. Expected a run, a checkpoint"),
        (["--top-p", "3"], "top_p: expected a number above 0"),
        (["--prompt", "b" * 300, "--plain"], "the model's context is 192"),
        (["--max-new", "0", "--prompt", "a"], "expected at least 1 new token"),
    ],
)
def test_bad_input_is_one_sentence(model, flags, expected, capsys):
    if "--model" not in flags:
        flags = ["--model", str(model), *flags]
    status, text = run_command("sample", flags, str(ROOT))
    assert status == 1 and expected in text and text.strip().count("\n") == 0, text


def test_bytes_that_are_no_text_are_continued_all_the_same(model, asked, capsys):
    talk.talk(model, "a\udcff", SETTINGS, is_plain=True)
    assert asked == [encode("a?")]
