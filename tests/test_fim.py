"""Laws of fill-in-the-middle: pieces rejoin to the document, whole, by its text alone."""

import itertools

import numpy as np
import pytest
from hypothesis import given, strategies
from test_tokenizer import asking, english_and_code, every_form, write_corpus

from jaxpt import config
from jaxpt.data import fim, pack, tokenizer
from jaxpt.spec import UserError

TOKENS = fim.TOKEN_NAMES[0]
SEQ_LEN = 512
TEXTS = [
    " a leading space",
    "two  spaces  and\ttabs\n\n    indented",
    "日本語 and 😀, é\u0301",
    "<|fim_middle|> as text, and </s>",
    "abc",
]


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def trained(request, tmp_path_factory):
    workdir = write_corpus(tmp_path_factory.mktemp("fim"), english_and_code())
    knobs = {"vocab_size": 900, "model": request.param, "control_tokens": TOKENS}
    tokenizer.train_tokenizer(asking(**knobs), workdir)
    return workdir / "tokenizer"


def read_pieces(ids: list[int], encoder: fim.FimEncoder) -> tuple[list[int], bool]:
    """Return the ids of prefix + middle + suffix of bos + document + eos, and whether it is PSM."""
    ours = encoder.tokenizer
    assert ids[0] == ours.bos_id and ids[-1] == ours.eos_id and ids[1] == encoder.prefix_id
    at_suffix, at_middle = ids.index(encoder.suffix_id), ids.index(encoder.middle_id)
    before, suffix, after = (
        ids[2:at_suffix],
        ids[at_suffix + 1 : at_middle],
        ids[at_middle + 1 : -1],
    )
    assert not {encoder.prefix_id, encoder.suffix_id, encoder.middle_id} & {*suffix, *after}
    return before + after + suffix, at_suffix > 2


@given(text=strategies.text(min_size=3), rate=strategies.floats(0, 1))
def test_three_pieces_rejoin_to_the_document(text, rate):
    pieces = fim.cut_document(text, 1.0)
    assert pieces.prefix and pieces.middle and pieces.suffix
    assert pieces.prefix + pieces.middle + pieces.suffix == text
    assert fim.cut_document(text, rate) in (pieces, None)
    assert fim.cut_document(text, 0.0) is None


def test_cuts_are_as_likely_anywhere_and_documents_by_the_rate():
    n = 6000
    texts = [f"{i:06d}" for i in range(n)]
    for rate in (0.1, 0.5):
        share = sum(fim.cut_document(text, rate) is not None for text in texts) / n
        assert abs(share - rate) < 4 * (rate * (1 - rate) / n) ** 0.5
    found = [fim.cut_document(text, 1) for text in texts]
    assert abs(sum(pieces.is_psm for pieces in found) / n - 0.5) < 0.03
    pairs = [(len(pieces.prefix), len(pieces.prefix + pieces.middle)) for pieces in found]
    counts = [pairs.count(pair) for pair in itertools.combinations(range(1, 6), 2)]
    assert sum(counts) == n and max(abs(np.array(counts) - n / 10)) < 4 * (n * 0.09) ** 0.5


def test_ids_of_the_pieces_decode_to_the_document(trained):
    encoder = fim.FimEncoder(tokenizer.load_tokenizer(trained))
    texts = TEXTS + english_and_code()["english"][:9]
    pieces = [fim.cut_document(text, 1) for text in texts]
    forms = set()
    for text, ids in zip(texts, encoder.encode_documents(pieces), strict=True):
        rejoined, is_psm = read_pieces(ids.tolist(), encoder)
        assert encoder.tokenizer.decode(rejoined) == text
        forms.add(is_psm)
    assert forms == {True, False}


def test_an_adopted_tokenizer_that_puts_a_space_before_a_text_puts_none_inside(data_dir, tmp_path):
    source = str(data_dir / "tok_mistral_v1" / "tokenizer.model")
    tokenizer.train_tokenizer(asking(source=source), tmp_path)
    ours = tokenizer.load_tokenizer(tmp_path / "tokenizer")
    with pytest.raises(UserError, match="tokenizer has no tokens for fill-in-the-middle"):
        fim.FimEncoder(ours)
    ours.backend.add_special_tokens(list(TOKENS))
    encoder = fim.FimEncoder(ours)
    for text in TEXTS:
        [ids] = encoder.encode_documents([fim.cut_document(text, 1)])
        assert ours.decode(read_pieces(ids.tolist(), encoder)[0]) == text


def test_control_tokens_have_the_same_ids_everywhere_and_are_never_read_from_text(trained):
    ours = tokenizer.load_tokenizer(trained)
    ids = [ours.backend.token_to_id(name) for name in TOKENS]
    assert ids == [3, 4, 5]
    if (trained / "tokenizer.model").exists():
        _, sentencepiece, auto = every_form(trained)
        assert [sentencepiece.piece_to_id(name) for name in TOKENS] == ids
        assert auto.convert_tokens_to_ids(list(TOKENS)) == ids
    for text in [*TOKENS, f"x{TOKENS[0]}y {TOKENS[1]}"]:
        [read] = ours.encode_batch([text])
        assert not set(read) & set(ids) and ours.decode(read) == text


@pytest.mark.parametrize("name", ["<s>", "<0x0A>", "a b", "", "<|twice|>"])
def test_a_control_token_that_cannot_be_is_refused(name):
    knobs = config.Config(tokenizer=config.TokenizerConfig(control_tokens=("<|twice|>", name)))
    with pytest.raises(UserError, match=r"tokenizer\.control_tokens: .*got "):
        config.check_config(knobs)


@pytest.mark.parametrize("method", ["best_fit", "course"])
def test_packed_documents_are_rearranged_whole_and_held_out_ones_are_not(tmp_path, method, caplog):
    import datasets

    words = " ".join(english_and_code()["english"]).split(" ")
    texts = [" ".join(words[i : i + 90]) for i in range(0, 9000, 90)]
    long = " ".join(words[:2000])
    write_corpus(tmp_path, {"prose": [*texts, long, long + "."]}, {"prose": texts[:70]})
    tokenizer.train_tokenizer(asking(vocab_size=900, control_tokens=TOKENS), tmp_path)
    section = config.PackConfig(seq_len=SEQ_LEN, method=method, fim_rate=0.5)
    with caplog.at_level("INFO"):
        manifest = pack.pack_corpus(section, tmp_path)
    counts = pack.PackCounts.from_json(manifest.counts)
    chosen = {text for text in texts if fim.cut_document(text, 0.5)}
    n_long = sum(fim.cut_document(text, 0.5) is not None for text in (long, long + "."))
    assert 30 < len(chosen) < 70
    assert counts.train["prose"].n_fim_documents == len(chosen)
    assert counts.train["prose"].n_fim_too_long == n_long
    assert counts.heldout["prose"].n_fim_documents == 0
    said = f"fill-in-the-middle: {len(chosen)} documents; {n_long} more do not fit a sequence"
    assert any(said in line for line in caplog.messages)
    encoder = fim.FimEncoder(tokenizer.load_tokenizer(tmp_path / "tokenizer"))
    by_document: dict[str, dict[str, list[int]]] = {"train": {}, "heldout": {}}
    for split, found in by_document.items():
        for row in datasets.load_from_disk(str(tmp_path / "packed" / split / "prose")):
            ends = np.cumsum([0, *row["doc_lens"]])
            for document, start, stop in zip(row["doc_ids"], ends, ends[1:], strict=False):
                found.setdefault(document, []).extend(row["input_ids"][start:stop])
    for i, text in enumerate(texts[:95]):  # the last may be cut off by course
        ids = by_document["train"][f"prose-{i}"]
        if text in chosen:
            assert encoder.tokenizer.decode(read_pieces(ids, encoder)[0]) == text
        else:
            assert ids[1:-1] == encoder.tokenizer.encode_batch([text])[0]
    for i, text in enumerate(texts[:60]):
        ids = by_document["heldout"][f"prose-{i}"]
        assert ids[1:-1] == encoder.tokenizer.encode_batch([text])[0]


def test_prompts_stay_before_their_completions(tmp_path):
    texts = english_and_code()["english"][:20]
    write_corpus(tmp_path, {"tasks": texts}, prompts={"tasks": 9})
    tokenizer.train_tokenizer(asking(vocab_size=700, control_tokens=TOKENS), tmp_path)
    section = config.PackConfig(seq_len=SEQ_LEN, fim_rate=1.0)
    manifest = pack.pack_corpus(section, tmp_path)
    counts = pack.PackCounts.from_json(manifest.counts)
    assert counts.train["tasks"].n_fim_documents == counts.train["tasks"].n_fim_too_long == 0


def test_a_tokenizer_without_the_tokens_is_refused_before_any_work(tmp_path):
    write_corpus(tmp_path, english_and_code())
    tokenizer.train_tokenizer(asking(vocab_size=700), tmp_path)
    with pytest.raises(UserError, match=r"pack\.fim_rate: .*tokenizer\.control_tokens"):
        pack.pack_corpus(config.PackConfig(seq_len=SEQ_LEN, fim_rate=0.5), tmp_path)
    assert not list(tmp_path.glob("packed*"))
