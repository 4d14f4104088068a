"""Conversations: ids and trained tokens as transformers has them, from messages to batches."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import transformers
from test_special_tokens import SPEC as MODEL
from test_special_tokens import write_tokenizer

from jaxpt import config
from jaxpt.data import chat, filters, loader, pack, tokenizer
from jaxpt.data.meta import CONVERSATION, PAIR
from jaxpt.data.prepare import corpus
from jaxpt.evaluate import continuation, harness, reference
from jaxpt.model import transformer
from jaxpt.spec import UserError
from jaxpt.weights import huggingface

SPEC = MODEL.replace(vocab_size=260)
CHATML = (
    "{{ bos_token }}{% for message in messages %}<|begin|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' %}MARK{{ message['content'] }}<|eot_id|>END{{ '\n' }}"
    "{% else %}{{ message['content'] }}<|eot_id|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|begin|>assistant\n{% endif %}"
)
MARKED = CHATML.replace("MARK", "{% generation %}").replace("END", "{% endgeneration %}")
PLAIN = CHATML.replace("MARK", "").replace("END", "")


def say(*contents):
    """User and assistant in turn."""
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]


CONVERSATIONS = [
    say("What is é?", "A letter.", "And <|eot_id|>?", "A token, meant as text or not."),
    [{"role": "system", "content": "Be brief."}, *say("Hi", "  Hello,\n\nyou.  ")],
    say("1", "2"),
]


@pytest.fixture
def made(tmp_path):
    """Write a tokenizer with a template; return its directory."""

    def made(template):
        directory = write_tokenizer(tmp_path / "tokenizer", "<|begin|>")
        (directory / "chat_template.jinja").write_text(template)
        return directory

    return made


def open_template(directory):
    return chat.ChatTemplate(tokenizer.load_tokenizer(directory), str(directory))


def mark(encoded):
    """Return which tokens are trained on, as 0 and 1."""
    mask = np.ones(len(encoded.ids), int)
    for start, stop in encoded.untrained:
        mask[start:stop] = 0
    return mask.tolist()


@pytest.mark.parametrize("template", [MARKED, PLAIN])
def test_ids_and_trained_tokens_are_those_of_transformers(made, template):
    directory = made(template)
    theirs = transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)
    ours = open_template(directory)
    for messages, encoded in zip(
        CONVERSATIONS, ours.encode_conversations(CONVERSATIONS), strict=True
    ):
        expected = theirs.apply_chat_template(
            messages, chat_template=MARKED, return_assistant_tokens_mask=True
        )
        assert encoded.ids.tolist() == expected["input_ids"]
        is_trained = np.array(mark(encoded))
        if template == PLAIN:  # the line end after the end token is the assistant's too
            newline = ours.tokenizer.encode_batch(["\n"])[0]
            last = np.flatnonzero(np.diff([*is_trained, 0]) == -1)
            assert [encoded.ids[i] for i in last] == newline * len(last)
            is_trained[last] = 0
        assert is_trained.tolist() == expected["assistant_masks"]
        prompt = theirs.apply_chat_template(messages[:-1], add_generation_prompt=True)
        assert ours.encode_prompt(messages[:-1]) == prompt["input_ids"]


def test_a_template_that_rewrites_earlier_turns_is_refused(made):
    template = PLAIN.replace("{{ bos_token }}", "{{ messages | length }}")
    with pytest.raises(UserError, match="message 2 of 4 otherwise once others follow"):
        open_template(made(template)).encode_conversations(CONVERSATIONS)
    with pytest.raises(UserError, match=r"cannot render a conversation \(no system"):
        template = "{{ raise_exception('no system') }}"
        open_template(made(template)).encode_prompt(CONVERSATIONS[0])
    with pytest.raises(UserError, match="has no chat template"):
        chat.ChatTemplate(tokenizer.load_tokenizer(write_tokenizer(made("").parent / "b")), "x")


@pytest.mark.slow
def test_the_harness_renders_turns_as_its_own_model_does(made, one):
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}"
    for template in (MARKED, refusing + MARKED):
        directory = made(template)
        params = transformer.init_params(SPEC, 0, one)
        huggingface.write_hf_model(SPEC, params, directory)
        ours = harness.make_lm_adapter(SPEC, params, directory, 64)
        theirs = reference.make_reference_harness_model(directory, 64)
        for messages in CONVERSATIONS:
            for asks in (True, False):
                history = messages[:-1] if asks else messages
                text = ours.apply_chat_template(history, add_generation_prompt=asks)
                assert text == theirs.apply_chat_template(history, add_generation_prompt=asks)
                assert ours.tok_encode(text) == theirs.tok_encode(text)


def test_what_ends_an_answer_ends_generation_too(made):
    template = PLAIN.replace("<|eot_id|>", "<|end_of_text|>")
    assert open_template(made(template)).find_turn_end() == 257, "not the tokenizer's, 258"
    assert open_template(made(PLAIN.replace("<|eot_id|>", ""))).find_turn_end() is None


def test_prompts_are_read_as_text_as_control_tokens_or_as_chat(made):
    encoder = tokenizer.load_tokenizer(made(MARKED))
    prompt = "<|begin|>user"
    [as_text], [as_controls], [as_chat] = (
        continuation.encode_prompts(encoder, "m", [prompt], how)
        for how in ("text", "control tokens", "chat")
    )
    assert encoder.encode_batch([prompt]) == [as_text] and 259 not in as_text
    assert as_controls == [259, *encoder.encode_batch(["user"])[0]]
    assert as_chat.count(259) == 3 and as_chat[0] == 256


@pytest.fixture
def packed(made, tmp_path):
    """Pack conversations and a text in sequences of 96 tokens."""
    lines = [json.dumps({"messages": messages}) for messages in CONVERSATIONS * 7]
    (tmp_path / "chats.jsonl").write_text("\n".join(lines))
    (tmp_path / "texts.jsonl").write_text(json.dumps({"text": "a text " * 40}))
    sources = tuple(
        f"{name}=jsonl:{tmp_path}/{name}.jsonl#{field}"
        for name, field in (("chats", "messages"), ("texts", "text"))
    )
    workdir = tmp_path / "work"
    prepare = config.PrepareConfig(sources=sources, preset="none", heldout_frac=0.0)
    corpus.prepare_corpus(prepare, workdir)
    adopted = config.TokenizerConfig(source=str(made(MARKED)))
    tokenizer.train_tokenizer(adopted, workdir)
    pack.pack_corpus(config.PackConfig(seq_len=96), workdir)
    return workdir


def test_batches_train_on_what_the_assistant_says(packed, made):
    template = open_template(packed / "tokenizer")
    encoded = template.encode_conversations(CONVERSATIONS)
    dataset = loader.open_packed([packed / "packed"])
    seen = []
    for i in range(dataset.n_sequences["chats"]):
        sequence = dataset.read_sequence("chats", i)
        batch = loader.make_batch([sequence], True)
        start = 0
        for length in sequence.doc_lens:
            ids = sequence.tokens[start : start + length]
            mask = batch.loss_mask[0, start : start + length - 1].astype(int)
            seen.append((ids.tolist(), [0, *mask.tolist()]))
            start += length
    whole = [(each.ids.tolist(), mark(each)) for each in encoded if len(each.ids) <= 96]
    assert len(whole) == 2 and all(chat in seen for chat in whole)
    n_trained = sum(sum(mask) for _, mask in seen)
    assert n_trained == dataset.counts["chats"].n_trained_tokens
    assert dataset.special_tokens.eos_ids == (258,)
    text = dataset.read_sequence("texts", 0)
    assert not len(text.untrained) and loader.make_batch([text], True).loss_mask.sum() == 95


def test_the_corpus_has_the_contents_as_text_and_no_rule_edits_them(packed):
    [shard] = (packed / "corpus/train").glob("chats*.parquet")
    rows = pq.read_table(shard).to_pylist()
    assert "Hi\n\n  Hello" in "|".join(row["text"] for row in rows)
    document = filters.Document("d", rows[0]["text"], 0, rows[0]["meta"])
    upper = filters.Rule("upper", edit=lambda texts: [(t.upper(), 1) for t in texts], help="")
    [reason] = filters.apply_rules([document], [upper]).reasons
    assert reason == "it would edit a conversation or a pair"


def test_corpus_paragraphs_takes_nothing_from_conversations_and_pairs():
    [rule] = filters.parse_rules("none", ["corpus_paragraphs(least=3)"])
    metas = ["{}", CONVERSATION.encode([]), PAIR.encode("No.")]
    documents = [filters.Document(meta, "Hello\n\nHello", 0, meta) for meta in metas]
    plain, *whole = filters.apply_rules(documents, [rule]).marks[0]
    assert plain and not any(whole)


def test_messages_that_are_none_are_refused(tmp_path):
    from jaxpt.data.sources.fields import make_document

    for value, message in (
        ([{"role": "user", "content": "x"}], "no message is an assistant's"),
        ([{"role": "user"}], "has no field 'content'"),
        (["hello"], "has no field 'role'"),
        ([{"role": "user", "content": [{"type": "image"}]}], "expected text, got list"),
    ):
        with pytest.raises(UserError, match=message):
            make_document("i", {"messages": value}, "messages", "file:3")
