"""Laws of the tokenizer: the same ids in every form, text comes back, control tokens are never read
from text.
"""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT
from hypothesis import given, settings, strategies

from jaxpt import stage
from jaxpt.config import TokenizerConfig
from jaxpt.data import tokenizer
from jaxpt.spec import UserError

# what once came out differently somewhere: runs of spaces, tabs, digits, bytes without tokens, text
# that looks like tokens
MIXED = " \n\tthe1,.<>sé日😀"
TRICKY = [
    "",
    " ",
    "  a",
    "a  b   c ",
    " " * 37 + "x",
    "\t\tif x:\n\n\n    return 1234567",
    "\r\n",
    "\0",
    "é\u0301 ß 𝔘 😀 日本語",
    "<0x0A> <unk>",
    "a\u00a0b\u200bc",
]
CONTROL = ["<s>", "</s>", "a<s>b", "<s></s> <s>", "end.</s><s>New"]


def write_corpus(
    workdir: pathlib.Path,
    texts: dict[str, list[str]],
    heldout: dict[str, list[str]] | None = None,
    prompts: dict[str, int] | None = None,
) -> pathlib.Path:
    """A corpus as the stage prepare leaves it; prompts has the characters of those of a source."""

    def work(out):
        for split, sources in (("train", texts), ("heldout", heldout or {})):
            (out / split).mkdir()
            for name, documents in sources.items():
                ids = [f"{name}-{i}" for i in range(len(documents))]
                prompt_chars = [(prompts or {}).get(name, 0)] * len(documents)
                table = pa.table(
                    {
                        "id": ids,
                        "source": [name] * len(documents),
                        "text": documents,
                        "prompt_chars": pa.array(prompt_chars, pa.int32()),
                    }
                )
                pq.write_table(table, out / split / f"{name}-00000.parquet", compression="zstd")
        return {}

    stage.run_stage(
        "prepare",
        workdir / "corpus",
        work,
        config={"texts": stage.fingerprint([texts, heldout])},
        inputs={},
        replace=True,
    )
    return workdir


def english_and_code() -> dict[str, list[str]]:
    """Real text that every Python has."""
    from pydoc_data import topics

    folder = pathlib.Path(json.__file__).parent
    return {
        "english": sorted(topics.topics.values())[:60],
        "code": [file.read_text() for file in sorted(folder.glob("*.py"))],
    }


def asking(**knobs) -> TokenizerConfig:
    return TokenizerConfig(**knobs)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> pathlib.Path:
    workdir = write_corpus(tmp_path_factory.mktemp("trained"), english_and_code())
    tokenizer.train_tokenizer(asking(vocab_size=900), workdir)
    return workdir / "tokenizer"


@pytest.fixture
def mistral(data_dir, tmp_path) -> pathlib.Path:
    tokenizer.train_tokenizer(
        asking(source=str(data_dir / "tok_mistral_v1" / "tokenizer.model")), tmp_path
    )
    return tmp_path / "tokenizer"


def every_form(directory: pathlib.Path):
    """(our tokenizer, SentencePiece's own, AutoTokenizer's) of one directory."""
    import sentencepiece
    import transformers

    own = sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
    return (
        tokenizer.load_tokenizer(directory),
        own,
        transformers.AutoTokenizer.from_pretrained(directory),
    )


def test_ids_are_equal_in_every_form_for_any_unicode(trained):
    ours, own, auto = every_form(trained)

    @settings(max_examples=300, deadline=None)
    @given(strategies.text(max_size=60) | strategies.text(alphabet=MIXED, max_size=60))
    def law(text):
        ids = ours.encode_batch([text])[0]
        assert ids == own.encode(text)
        assert auto(text, split_special_tokens=True)["input_ids"] == [ours.bos_id, *ids]
        assert ours.decode(ids) == text.replace(
            "▁", " "
        )  # SentencePiece writes a space as ▁, so that the two are one to it

    law()


@pytest.fixture(scope="module")
def unigram(tmp_path_factory) -> pathlib.Path:
    workdir = write_corpus(tmp_path_factory.mktemp("unigram"), english_and_code())
    tokenizer.train_tokenizer(asking(vocab_size=900, model="unigram"), workdir)
    return workdir / "tokenizer"


def abort(job):
    os.abort()


def test_a_training_that_memory_ends_says_so(tmp_path, monkeypatch):
    workdir = write_corpus(tmp_path, english_and_code())
    monkeypatch.setattr(tokenizer, "MAX_BYTES_IN_PROCESS", 0)
    monkeypatch.setattr(tokenizer, "train_on_texts", abort)
    with pytest.raises(UserError, match="perhaps because memory ran out"):
        tokenizer.train_tokenizer(asking(vocab_size=900), workdir)


def test_a_unigram_tokenizer_is_saved_in_the_form_in_which_its_ids_are_one(unigram):
    """No SentencePiece .model: its ids would part on long texts. What both read agrees with what
    SentencePiece means, where it can be exact.
    """
    import transformers

    ours, auto = (
        tokenizer.load_tokenizer(unigram),
        transformers.AutoTokenizer.from_pretrained(unigram),
    )
    assert (
        not (unigram / "tokenizer.model").exists()
        and ours.vocab_size == 900
        and (ours.bos_id, ours.eos_id) == (1, 2)
    )
    texts = [*TRICKY, *english_and_code()["code"], *english_and_code()["english"]]
    ids = ours.encode_batch(texts)
    assert [[1, *token_ids] for token_ids in ids] == auto(texts, split_special_tokens=True)[
        "input_ids"
    ]
    assert [ours.decode(token_ids) for token_ids in ids] == texts
    assert sum(map(len, ids)) < 0.6 * sum(len(text.encode()) for text in texts), "words have tokens"
    for text, token_ids in zip(CONTROL, ours.encode_batch(CONTROL), strict=True):
        assert not {1, 2} & set(token_ids) and ours.decode(token_ids) == text

    @settings(max_examples=200, deadline=None)
    @given(strategies.text(max_size=60) | strategies.text(alphabet=MIXED, max_size=60))
    def law(text):
        ids = ours.encode_batch([text])[0]
        assert auto(text, split_special_tokens=True)["input_ids"] == [1, *ids]
        assert ours.decode(ids) == text.replace("▁", " ")

    law()


def test_unigram_tokens_are_sentencepieces_own_word_by_word(tmp_path):
    """The same tokens and scores read by SentencePiece give the same segmentation of each word, but
    for tokens of equal merit.
    """
    import sentencepiece

    corpus = write_corpus(tmp_path, english_and_code()) / "corpus"
    proto = tokenizer.train_sentencepiece(asking(vocab_size=900, model="unigram"), corpus)
    backend, _, kept = tokenizer.convert_sentencepiece(proto, "here", "unigram")
    assert kept is None
    own = sentencepiece.SentencePieceProcessor(model_proto=proto)
    words = sorted(
        {word for text in english_and_code()["english"] for word in text.split() if "<" not in word}
    )
    theirs = own.encode(words)
    mine = [each.ids for each in backend.encode_batch(words, add_special_tokens=False)]
    score = lambda ids: sum(own.get_score(i) for i in ids)
    assert all(
        a == b or score(a) == pytest.approx(score(b), rel=1e-5)
        for a, b in zip(mine, theirs, strict=True)
    )
    assert sum(a == b for a, b in zip(mine, theirs, strict=True)) > 0.99 * len(words)


@pytest.mark.slow
@pytest.mark.parametrize("which", ["trained", "mistral"])
def test_ids_are_equal_in_every_form_over_all_texts(which, request, data_dir):
    """Every text of the shared data as a whole, and every line of it."""
    ours, own, auto = every_form(request.getfixturevalue(which))
    files = [
        file
        for file in sorted(data_dir.rglob("*"))
        if file.suffix in (".txt", ".md", ".csv", ".json", ".jsonl")
    ]
    assert len(files) > 20
    for file in files:
        text = file.read_text()
        texts = (
            [text, *text.splitlines(keepends=True)]
            if len(text) < 1_000_000
            else text.splitlines(keepends=True)
        )
        ids = ours.encode_batch(texts)
        assert ids == own.encode(texts), file
        assert [[ours.bos_id, *token_ids] for token_ids in ids] == auto(
            texts, split_special_tokens=True
        )["input_ids"], file
        assert [ours.decode(token_ids) for token_ids in ids] == [
            text.replace("▁", " ") for text in texts
        ], file


@pytest.mark.parametrize("which", ["trained", "mistral"])
def test_ids_are_equal_in_every_form_on_real_text_and_text_comes_back(which, request, data_dir):
    ours, own, auto = every_form(request.getfixturevalue(which))
    japanese = (data_dir / "text_botchan" / "wagahaiwa_nekodearu.txt").read_text()[:100_000]
    book = (data_dir / "text_gutenberg" / "The-Adventures-of-Sherlock-Holmes_1661.txt").read_text()
    texts = [
        japanese,
        book,
        *book.split("\n\n"),
        *english_and_code()["code"],
        *TRICKY,
        *(" " * n + "x" for n in range(70)),
    ]
    ids = ours.encode_batch(texts)
    assert ids == own.encode(texts)
    assert [[ours.bos_id, *token_ids] for token_ids in ids] == auto(
        texts, split_special_tokens=True
    )["input_ids"]
    assert [ours.decode(token_ids) for token_ids in ids] == texts


@pytest.mark.parametrize("which", ["trained", "mistral"])
def test_a_literal_control_token_is_text(which, request):
    ours, own, _ = every_form(request.getfixturevalue(which))
    for text, ids in zip(CONTROL, ours.encode_batch(CONTROL), strict=True):
        assert not {ours.bos_id, ours.eos_id} & set(ids)
        assert ids == own.encode(text)
        assert ours.decode(ids) == text


def test_an_exported_model_directory_reads_text_the_same(trained, tmp_path):
    """With the config.json of a Llama beside it AutoTokenizer must not fall back to
    LlamaTokenizer's own rules, and must put one <s> first.
    """
    import transformers

    shutil.copytree(trained, tmp_path / "export")
    (tmp_path / "export" / "config.json").write_text(
        '{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}'
    )
    auto, ours = (
        transformers.AutoTokenizer.from_pretrained(tmp_path / "export"),
        tokenizer.load_tokenizer(tmp_path / "export"),
    )
    assert auto(TRICKY, split_special_tokens=True)["input_ids"] == [
        [1, *ids] for ids in ours.encode_batch(TRICKY)
    ]
    assert (auto.bos_token_id, auto.eos_token_id) == (ours.bos_id, ours.eos_id) == (1, 2)
    assert auto("a", "b")["input_ids"].count(1) == 2


def test_training_twice_gives_the_same_tokenizer(trained, tmp_path, monkeypatch):
    """The second time in a process of its own, as of much text."""
    monkeypatch.setattr(tokenizer, "MAX_BYTES_IN_PROCESS", 0)
    again = tokenizer.train_tokenizer(
        asking(vocab_size=900), write_corpus(tmp_path, english_and_code())
    )
    assert again.outputs == stage.read_manifest(trained).outputs
    assert again.counts["vocab_size"] == 900
    tokens = tokenizer.load_tokenizer(tmp_path / "tokenizer").backend.get_vocab()
    assert not [
        token
        for token in tokens
        if len(token) > 1 and any(mark.isdigit() for mark in token) and not token.startswith("<0x")
    ], "digits are single"
    assert any(set(token) == {"▁"} and len(token) > 1 for token in tokens), (
        "runs of spaces are tokens"
    )


def test_the_fingerprint_is_of_the_content(trained, tmp_path):
    import transformers

    ours = tokenizer.load_tokenizer(trained)
    assert stage.read_manifest(trained).tokenizer == ours.fingerprint
    transformers.AutoTokenizer.from_pretrained(trained).save_pretrained(tmp_path / "resaved")
    form = json.loads((trained / "tokenizer.json").read_text())
    (tmp_path / "old").mkdir()
    shutil.copy(trained / "tokenizer_config.json", tmp_path / "old")
    old = {
        **form,
        "model": {
            **form["model"],
            "merges": [" ".join(merge) for merge in form["model"]["merges"]],
        },
    }  # as earlier versions wrote it
    (tmp_path / "old" / "tokenizer.json").write_text(json.dumps(old))
    assert (
        tokenizer.load_tokenizer(tmp_path / "resaved").fingerprint
        == tokenizer.load_tokenizer(tmp_path / "old").fingerprint
        == ours.fingerprint
    )

    (tmp_path / "resaved" / "tokenizer.json").write_text(
        json.dumps({**form, "model": {**form["model"], "merges": form["model"]["merges"][:-1]}})
    )
    (tmp_path / "old" / "tokenizer_config.json").write_text('{"eos_token": "<unk>"}')
    assert (
        len(
            {
                ours.fingerprint,
                tokenizer.load_tokenizer(tmp_path / "resaved").fingerprint,
                tokenizer.load_tokenizer(tmp_path / "old").fingerprint,
            }
        )
        == 3
    )


def byte_level(directory: pathlib.Path, special: bool = True) -> pathlib.Path:
    """A tokenizer in the manner of GPT-2: no token before a text, one after; cut and padded, as
    sentence encoders are.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    backend.train_from_iterator(
        english_and_code()["english"],
        trainers.BpeTrainer(
            vocab_size=500,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    (backend.add_special_tokens if special else backend.add_tokens)(
        [AddedToken("<|endoftext|>", special=special)]
    )
    backend.enable_truncation(7)
    backend.enable_padding(length=9)
    directory.mkdir()
    backend.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "GPT2Tokenizer", "eos_token": {"content": "<|endoftext|>"}, '
        '"chat_template": "{{ x }}"}'
    )
    return directory


@pytest.mark.parametrize("which", ["bpe", "unigram", "mistral", "byte_level"])
def test_a_text_encoded_in_parts_has_the_ids_of_the_whole(which, request, tmp_path, monkeypatch):
    fixtures = {"bpe": "trained", "unigram": "unigram", "mistral": "mistral"}
    if which == "byte_level":
        directory = byte_level(tmp_path / "bytes")
    else:
        directory = request.getfixturevalue(fixtures[which])
    encoder = tokenizer.load_tokenizer(directory)
    monkeypatch.setattr(tokenizer, "PART_CHARS", 41)
    monkeypatch.setattr(tokenizer, "CUT_CONTEXT", 23)
    monkeypatch.setattr(tokenizer, "GROUP_CHARS", 97)
    random = np.random.default_rng(5)
    words = ["the", " ", "  ", "\n", "\t", "<s>", "é", "e\u0301", "日本", "12", "▁", "."]
    words += ["Let's"]
    for _ in range(40):
        text = " ".join(random.choice(words, 200))
        whole = encoder.backend.encode(text, add_special_tokens=False)
        assert len(encoder.split_text(text)) > 5
        n_prompt = int(random.integers(1, len(text)))
        ids, loss_from = encoder.encode_documents([text, "a"], [n_prompt, 0])
        n_bos = encoder.bos_id is not None
        assert ids[0].tolist()[n_bos:-1] == whole.ids == encoder.encode_batch([text])[0]
        n_in_prompt = next(
            (k for k, (_, end) in enumerate(whole.offsets) if end > n_prompt), len(whole.ids)
        )
        assert loss_from == [n_bos + n_in_prompt, 0]


def test_a_text_is_not_cut_where_a_token_may_reach_over_a_space(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer, "PART_CHARS", 41)
    directory = byte_level(tmp_path / "bytes")
    path = directory / "tokenizer.json"
    form = json.loads(path.read_text())
    form["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "split": False}
    form["model"]["vocab"]["t▁h"] = 900
    path.write_text(json.dumps(form))
    encoder = tokenizer.load_tokenizer(directory)
    text = "the " * 100
    assert len(encoder.split_text(text)) == 1
    monkeypatch.setattr(tokenizer, "MAX_PART_CHARS", 300)
    with pytest.raises(UserError, match="a document of 400 characters: expected a space"):
        encoder.encode_documents([text], [0])


def test_an_adopted_directory_keeps_its_ids_and_settings(tmp_path):
    import transformers

    source = byte_level(tmp_path / "source")
    manifest = tokenizer.train_tokenizer(asking(source=str(source)), tmp_path)
    ours, auto = (
        tokenizer.load_tokenizer(tmp_path / "tokenizer"),
        transformers.AutoTokenizer.from_pretrained(tmp_path / "tokenizer"),
    )
    texts = [*TRICKY, *english_and_code()["code"]]
    ids = ours.encode_batch(texts)
    assert [ours.decode(token_ids) for token_ids in ids] == texts, "neither truncated nor padded"
    assert auto(texts)["input_ids"] == ids
    assert auto.chat_template == "{{ x }}"
    assert ours.bos_id is None, "it puts nothing before a text of its own accord"
    assert ours.decode([*ids[-1], ours.eos_id]) == texts[-1]
    assert manifest.tokenizer == tokenizer.load_tokenizer(source).fingerprint
    assert ours.eos_id not in ours.encode_batch(["a<|endoftext|>b"])[0]

    (source / "tokenizer_config.json").write_text(
        '{"eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>", "add_bos_token": true}'
    )
    assert tokenizer.load_tokenizer(source).bos_id == ours.eos_id, "requested, it is added"


def test_adopting_the_same_files_from_another_place_is_the_same_work(tmp_path, output):
    tokenizer.train_tokenizer(asking(source=str(byte_level(tmp_path / "here"))), tmp_path)
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    tokenizer.train_tokenizer(asking(source=str(tmp_path / "there"), vocab_size=77), tmp_path)
    assert "nothing to do" in output()


def test_compare_counts_bytes_per_token(trained, tmp_path):
    table = tokenizer.compare_tokenizers(
        [trained, byte_level(tmp_path / "bytes")], trained.parent / "corpus", sample_mb=1e6
    )
    texts, ours = english_and_code(), tokenizer.load_tokenizer(trained)
    for name in texts:
        spans = [
            text[i : i + tokenizer.MAX_SPAN_CHARS]
            for text in texts[name]
            for i in range(0, len(text), tokenizer.MAX_SPAN_CHARS)
        ]
        expected = sum(len(span.encode()) for span in spans) / sum(
            map(len, ours.encode_batch(spans))
        )
        assert table[str(trained)][name] == pytest.approx(expected)
        assert table[str(tmp_path / "bytes")][name] != pytest.approx(expected)


def test_the_sample_is_spread_evenly_over_the_documents(tmp_path):
    texts = {"long": ["a" * 40_000] * 3, "short": ["b" * 1000] * 120}
    corpus = write_corpus(tmp_path, texts) / "corpus"
    for share in (0.1, 0.25, 0.5, 1.0):
        taken = {"long": 0, "short": 0}
        for name, text in tokenizer.sample_corpus(
            corpus,
            share
            * sum(
                tokenizer.count_text_bytes(f)
                for fs in tokenizer.list_corpus_files(corpus, "train").values()
                for f in fs
            ),
        ):
            taken[name] += len(text)
        assert taken["long"] == pytest.approx(share * 120_000, abs=tokenizer.MAX_SPAN_CHARS)
        assert taken["short"] == pytest.approx(share * 120_000, abs=1000)


def broken_directory(directory: pathlib.Path, files: dict[str, str | bytes]) -> str:
    directory.mkdir()
    for name, content in files.items():
        (directory / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return str(directory)


def no_eos(directory: pathlib.Path, trained: pathlib.Path) -> str:
    return broken_directory(
        directory,
        {
            "tokenizer.json": (trained / "tokenizer.json").read_bytes(),
            "tokenizer_config.json": '{"eos_token": "<end>"}',
        },
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda d, t: asking(source=str(d / "nowhere")), "not found"),
        (
            lambda d, t: asking(source=broken_directory(d / "x", {"config.json": "{}"})),
            "no tokenizer.json and no SentencePiece .model",
        ),
        (
            lambda d, t: asking(source=broken_directory(d / "x", {"tokenizer.json": "{not json"})),
            "cannot be read as a tokenizer",
        ),
        (
            lambda d, t: asking(
                source=broken_directory(d / "x", {"tokenizer.model": b"\xff\xfe\xfd"})
            ),
            "not a SentencePiece model",
        ),
        (lambda d, t: asking(source=no_eos(d / "x", t)), "no end-of-document token"),
        (lambda d, t: asking(source=str(byte_level(d / "x", special=False))), '"special": true'),
        (lambda d, t: asking(vocab_size=1_000_000), "give at most"),
        (lambda d, t: asking(vocab_size=200), "Raise it"),
    ],
    ids=[
        "missing",
        "no tokenizer in it",
        "broken json",
        "broken model",
        "no eos",
        "eos is text",
        "too many tokens",
        "too few tokens",
    ],
)
def test_what_cannot_be_a_tokenizer_is_refused_on_one_line(make, message, trained, tmp_path):
    workdir = write_corpus(tmp_path / "work", english_and_code())
    with pytest.raises(UserError, match=message) as error:
        tokenizer.train_tokenizer(make(tmp_path, trained), workdir)
    assert "\n" not in str(error.value)
    assert not (workdir / "tokenizer").exists()


def test_a_sentencepiece_model_without_an_exact_form_is_refused(data_dir, tmp_path):
    with pytest.raises(UserError, match="equal ids"):
        tokenizer.train_tokenizer(
            asking(source=str(data_dir / "tok_spm_test" / "test_model.model")), tmp_path
        )


@pytest.mark.parametrize("model", ["bpe", "unigram"])
def test_text_comes_back_from_a_tokenizer_of_a_script_written_without_spaces(model, tmp_path):
    """A space is then rarer than the characters that are left to bytes."""
    generator = np.random.default_rng(5)
    letters = [chr(0x4E00 + i) for i in range(300)]
    texts = ["".join(generator.choice(letters, 3900)) for _ in range(12)]
    texts[7] += " a b"
    write_corpus(tmp_path, {"han": texts})
    tokenizer.train_tokenizer(asking(vocab_size=562, model=model), tmp_path)
    ours = tokenizer.load_tokenizer(tmp_path / "tokenizer")

    @settings(deadline=None)
    @given(strategies.text(alphabet=MIXED + "".join(letters[:9]), max_size=40))
    def law(text):
        assert ours.decode(ours.encode_batch([text])[0]) == text

    law()


def unigram_of_others(pre_tokenizer=None):
    """A unigram model with "</s>" among its pieces, as T5 has it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    pieces = [("<unk>", 0.0), ("</s>", 0.0), ("▁", -2.0), ("a", -3.0), ("▁a", -2.5)]
    pieces += [(char, -5.0) for char in "</s>b"]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0))
    backend.pre_tokenizer = pre_tokenizer or pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.add_special_tokens(["</s>"])
    return backend


@settings(deadline=None)
@given(strategies.lists(strategies.sampled_from(["</s>", "<", "/s>", "a", "b", " "]), max_size=9))
def test_an_end_of_document_that_is_a_piece_of_the_model_is_text_in_a_document(parts):
    text = "".join(parts)
    plain = unigram_of_others()
    plain.encode_special_tokens = True
    ours = tokenizer.Tokenizer(unigram_of_others(), {"eos_token": "</s>"}, "here")
    [ids] = ours.encode_batch([text])
    assert ours.eos_id not in ids
    if "</s>" not in text:
        assert ids == plain.encode(text, add_special_tokens=False).ids
    assert ours.decode(ids).lstrip() == text.lstrip()


def test_a_tokenizer_with_dropout_gives_one_list_of_ids_and_this_is_said(tmp_path, caplog):
    from tokenizers import Tokenizer, models

    vocabulary = {"a": 0, "b": 1, "ab": 2, "abab": 3, "</s>": 4}
    merges = [("a", "b"), ("ab", "ab")]
    backend = Tokenizer(models.BPE(vocabulary, merges, dropout=0.4))
    backend.add_special_tokens(["</s>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer.train_tokenizer(asking(source=str(tmp_path / "tokenizer.json")), tmp_path)
    assert "dropout (0.4" in caplog.text and "switched off" in caplog.text
    ours = tokenizer.load_tokenizer(tmp_path / "tokenizer")
    assert ours.encode_batch(["abab" * 5] * 20) == [[3] * 5] * 20
    assert (
        json.loads((tmp_path / "tokenizer/tokenizer.json").read_text())["model"]["dropout"] is None
    )


ADOPT = """
import sys
from jaxpt.config import TokenizerConfig
from jaxpt.data import tokenizer
from jaxpt.spec import UserError
try:
    print(tokenizer.train_tokenizer(TokenizerConfig(source=sys.argv[1]), sys.argv[2]).tokenizer)
except UserError as error:
    print(error)
"""


def test_a_tokenizer_of_the_hub_is_adopted_by_its_name(trained, tmp_path):
    """Offline, from the hub's cache; tests/test_hub.py has the transfers."""
    cache = tmp_path / "hub/models--org--tiny"
    shutil.copytree(trained, cache / "snapshots" / ("1" * 40))
    (cache / "snapshots" / ("1" * 40) / "manifest.json").unlink()
    (cache / "refs").mkdir()
    (cache / "refs/main").write_text("1" * 40)
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = str(ROOT)

    def adopt(source):
        command = [sys.executable, "-c", ADOPT, source, str(tmp_path / "run")]
        return subprocess.run(
            command, env=environment, capture_output=True, text=True, check=True
        ).stdout.strip()

    fingerprint = stage.read_manifest(trained).tokenizer
    assert adopt("hf:org/tiny") == adopt(f"hf:org/tiny@{'1' * 40}") == fingerprint
    assert "hf:org/none: not complete in this machine's cache" in adopt("hf:org/none")


@pytest.mark.parametrize("file", ["corpus/train/english-00000.parquet", "tokenizer/tokenizer.json"])
def test_a_flipped_bit_in_what_a_stage_reads_ends_it(file, tmp_path):
    write_corpus(tmp_path, english_and_code())
    tokenizer.train_tokenizer(asking(vocab_size=700), tmp_path)
    damaged = tmp_path / file
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(data)
    with pytest.raises(UserError, match="checksum is not its manifest's"):
        if file.startswith("corpus"):
            tokenizer.train_tokenizer(asking(vocab_size=701), tmp_path, replace=True)
        else:
            tokenizer.load_tokenizer(tmp_path / "tokenizer")
