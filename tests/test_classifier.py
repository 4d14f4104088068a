"""Laws of the classifier: fastText's own scores, and a measure on what it was not trained on."""

import json
import pathlib
import random
import string
import tempfile

import numpy as np
import pytest
from hypothesis import given, settings, strategies

from jaxpt.cli import main
from jaxpt.data import classifier, filters, train_classifier
from jaxpt.data.sources import Document
from jaxpt.spec import UserError

fasttext = pytest.importorskip("fasttext")

GOOD = ["theorem", "proof", "lemma", "because", "hence", "integral", "naïve", "定理", "é"]
ORDINARY = ["buy", "cheap", "click", "here", "sale", "now", "free", "ünder"]
SHARED = ["the", "of", "and", "a", "is", "</s>", "it", "to", "we", "1997", "🙂"]


def make_text(rng: random.Random, words: list[str], n: int) -> str:
    chosen = [rng.choice(words if rng.random() < 0.3 else SHARED) for _ in range(n)]
    return " ".join(chosen)


def make_lists(n: int = 300) -> tuple[list[str], list[str]]:
    """Good and ordinary documents of the same lengths."""
    rng = random.Random(3)
    good = [make_text(rng, GOOD, rng.randint(5, 60)) for _ in range(n)]
    return good, [make_text(rng, ORDINARY, rng.randint(5, 60)) for _ in range(n)]


def write(trained: train_classifier.TrainedClassifier, file) -> None:
    file.write_bytes(classifier.encode_classifier(trained.model))


KINDS = {"words": (1, 0, 0), "runs": (3, 0, 0), "characters": (1, 1, 4), "all": (2, 2, 3)}


@pytest.fixture(params=KINDS)
def theirs(request, tmp_path):
    """A model of random numbers as fastText opens it, and as we do."""
    word_ngrams, shortest, longest = KINDS[request.param]
    names = ["</s>", *GOOD, *ORDINARY, "the", "of"]
    features = classifier.Features(
        {name: row for row, name in enumerate(names)}, 701, word_ngrams, shortest, longest
    )
    generator = np.random.default_rng(5)
    rows = generator.normal(size=(len(names) + 701, 6)).astype(np.float32)
    out = generator.normal(size=(3, 6)).astype(np.float32)
    model = classifier.Classifier(features, rows, ["hq", "cc", "else"], out)
    (tmp_path / "model.bin").write_bytes(classifier.encode_classifier(model))
    file = str(tmp_path / "model.bin")
    return fasttext.load_model(file), classifier.read_classifier(file)


def predict(model, text: str, label: str) -> float:
    """fastText's own score, through the binding below its Python wrapper."""
    found = model.f.predict(text.replace("\n", " ") + "\n", 9, 0.0, "strict")
    return {name: score for score, name in found}[f"__label__{label}"]


def test_scores_of_any_text_are_fasttexts(theirs):
    model, ours = theirs
    words = strategies.sampled_from(GOOD + ORDINARY + SHARED) | strategies.text(max_size=6)
    plain = words.map(lambda word: word.replace("\ud800", "")).filter(
        lambda word: "</s>" not in word and "__label__" not in word and "\n" not in word
    )

    @settings(deadline=None, max_examples=150)
    @given(strategies.lists(plain, max_size=20).map(" ".join))
    def law(text):
        for label in ("hq", "cc"):
            assert ours.score(text, label) == pytest.approx(predict(model, text, label), abs=1e-4)

    law()


def test_what_is_trained_is_a_fasttext_model_that_tells_documents_apart(tmp_path):
    good, ordinary = make_lists()
    trained = train_classifier.train_classifier(good, ordinary)
    assert trained.quality.auc > 0.99 and trained.quality.precision > 0.95
    assert 0.4 < trained.by_length.auc < 0.65, "the lengths tell nothing"
    assert trained.n_train + trained.n_heldout == 600 and 80 < trained.n_heldout < 160
    file = tmp_path / "quality.bin"
    write(trained, file)
    ours, model = classifier.read_classifier(str(file)), fasttext.load_model(str(file))
    for text in [*good[:20], *ordinary[:20]]:
        text = text.replace("</s>", "")
        for label in ("good", "ordinary"):
            assert ours.score(text, label) == pytest.approx(predict(model, text, label), abs=1e-4)
    again = train_classifier.train_classifier(good, ordinary)
    assert (again.model.rows == trained.model.rows).all(), "deterministic"


@pytest.mark.slow
def test_a_length_that_tells_all_is_seen_in_the_baseline():
    rng = random.Random(1)
    good = [make_text(rng, SHARED, rng.randint(80, 120)) for _ in range(200)]
    ordinary = [make_text(rng, SHARED, rng.randint(5, 40)) for _ in range(200)]
    trained = train_classifier.train_classifier(good, ordinary)
    assert trained.by_length.auc > 0.99 and trained.quality.auc < trained.by_length.auc


@settings(deadline=None)
@given(strategies.lists(strategies.tuples(strategies.integers(-9, 9), strategies.booleans())))
def test_the_area_under_the_curve_is_the_share_of_pairs_in_the_right_order(scored):
    logits = np.array([score for score, _ in scored], float)
    is_good = np.array([good for _, good in scored], bool)
    if not is_good.any() or is_good.all():
        return
    quality = train_classifier.measure_quality(logits, is_good)
    pairs = np.sign(logits[is_good][:, None] - logits[~is_good][None])
    assert quality.auc == pytest.approx(((pairs + 1) / 2).mean())
    assert quality.recall == pytest.approx((logits[is_good] > 0).mean())


def test_the_rule_drops_by_score_and_a_changed_model_is_noticed(tmp_path):
    good, ordinary = make_lists()
    file = tmp_path / "quality.bin"
    write(train_classifier.train_classifier(good[:200], ordinary[:200]), file)
    [rule] = filters.parse_rules("none", [f"quality(model='{file}', least=0.5)"])
    shown = [Document(f"d{i}", text) for i, text in enumerate([*good[200:], *ordinary[200:]])]
    results = filters.apply_rules(shown, [rule])
    assert np.mean([failed == 1 for failed in results.failed_rule[:100]]) > 0.95
    assert np.mean([failed == 0 for failed in results.failed_rule[100:]]) > 0.95
    assert '"quality_good"' in results.documents[0].meta
    assert "expected 0.5 to 1" in results.reasons[-1]
    [toxic] = filters.parse_rules("none", [f"quality(model='{file}', least=0, most=0.4)"])
    assert filters.apply_rules(shown[:1], [toxic]).failed_rule == [0]
    write(train_classifier.train_classifier(good, ordinary), file)
    classifier.read_classifier.cache_clear()
    [changed] = filters.parse_rules("none", [f"quality(model='{file}', least=0.5)"])
    assert changed.help != rule.help
    [other] = filters.parse_rules("none", [f"quality(model='{file}', label='hq')"])
    with pytest.raises(UserError, match="no label 'hq'; it has: good, ordinary"):
        filters.apply_rules(shown, [other])


@pytest.mark.parametrize("content", [b"", b"text\n" * 50, bytes(200), string.printable.encode()])
def test_what_is_no_classifier_is_one_sentence(tmp_path, content):
    (tmp_path / "model.bin").write_bytes(content)
    with pytest.raises(UserError, match="cannot be read as a fastText classifier") as error:
        filters.parse_rules("none", [f"quality(model='{tmp_path}/model.bin')"])
    assert "\n" not in str(error.value)


@settings(deadline=None, max_examples=40)
@given(cut=strategies.floats(0, 0.999))
def test_a_truncated_model_is_one_sentence(cut):
    features = classifier.Features({"</s>": 0, "a": 1}, 5, 2)
    rows, out = np.ones((7, 3), np.float32), np.ones((2, 3), np.float32)
    data = classifier.encode_classifier(classifier.Classifier(features, rows, ["a", "b"], out))
    with tempfile.TemporaryDirectory() as place:
        file = pathlib.Path(place) / "model.bin"
        file.write_bytes(data[: int(cut * len(data))])
        with pytest.raises(UserError, match="cannot be read as a fastText classifier"):
            classifier.read_classifier(str(file))


def test_the_command_says_what_words_tell_beside_what_length_tells(tmp_path, capsys, monkeypatch):
    for name, texts in zip(("good", "ordinary"), make_lists(), strict=True):
        lines = [json.dumps({"text": text}) + "\n" for text in texts]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    lists = [f"--{name}=jsonl:{tmp_path}/{name}.jsonl" for name in ("good", "ordinary")]
    main.run_command(["train_quality", *lists, "--out", str(tmp_path / "q.bin")])
    printed = capsys.readouterr().out
    words, length = [line.split() for line in printed.splitlines() if line.startswith("by ")]
    assert float(words[-1]) > 0.99 > 0.65 > float(length[-1])
    assert classifier.read_classifier(str(tmp_path / "q.bin")).labels == ["good", "ordinary"]


def test_lists_of_too_few_documents_are_refused():
    with pytest.raises(UserError, match="ordinary: expected some ten different documents"):
        train_classifier.train_classifier([f"text {i}" for i in range(50)], ["one"])
