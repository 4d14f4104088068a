"""Evaluation: our numbers are those of transformers and of lm-evaluation-harness, whatever is
packed beside what, on any mesh.
"""

import dataclasses
import io
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import unicodedata

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.numpy
from conftest import ROOT, SMALL_SPEC

from jaxpt import config, sharding, stage
from jaxpt.data import benchmarks, decontaminate, tokenizer
from jaxpt.evaluate import (
    answers,
    compare,
    contamination,
    harness,
    likelihood,
    prefix_trees,
    reference,
)
from jaxpt.evaluate.continuation import escape_controls
from jaxpt.model import decode, transformer
from jaxpt.model.param import is_param_spec
from jaxpt.spec import Batch, UserError
from jaxpt.weights import checkpoint, huggingface

ONE = sharding.make_mesh(config.MeshConfig(), jax.devices()[:1])
SPEC = SMALL_SPEC.replace(vocab_size=448, max_seq_len=300)
TEXTS = [
    "The ship sailed at dawn.\n\n  Nobody on the quay said a word; the gulls did. "
    * 15,  # longer than the context
    "def area(r):\n    return 3.14159 * r ** 2\n",
    "Ein Zürcher Äpfel-Händler, 12½ Jahre alt — naïve?",
    "x",
    "",
]


def read_result(path):
    """What a result file holds beside its checksum."""
    found = json.loads(path.read_text())
    assert found.pop("checksum") == stage.checksum_fields(found)
    return found


@pytest.fixture(scope="module")
def params():
    """Random, with an embedding large enough that the next token depends on the tokens before."""
    random = np.random.default_rng(0)
    made = jax.tree.map(
        lambda row: np.float32(random.normal(row.init.mean, row.init.std or 0.1, row.shape)),
        transformer.param_specs(SPEC),
        is_leaf=is_param_spec,
    )
    return jax.device_put(
        made | {"embed": made["embed"] * 50}, transformer.make_param_shardings(SPEC, ONE)
    )


@pytest.fixture(scope="module")
def hf_dir(params, tmp_path_factory):
    """The model and a small tokenizer, as a Hugging Face directory."""
    import sentencepiece

    learnt = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for text in TEXTS for line in text.split("\n") if line]),
        model_writer=learnt,
        model_type="bpe",
        vocab_size=345,
        minloglevel=2,
        **tokenizer.SENTENCEPIECE_OPTIONS,
    )
    backend, settings_file, _ = tokenizer.convert_sentencepiece(learnt.getvalue(), "test")
    directory = tmp_path_factory.mktemp("model")
    made = directory / "tokenizer"
    made.mkdir()
    tokenizer.Tokenizer(backend, settings_file, made).save_tokenizer(made)
    huggingface.write_hf_model(SPEC, params, directory / "hf", tokenizer_dir=made)
    return directory / "hf"


@pytest.fixture(scope="module")
def encoder(hf_dir):
    return tokenizer.load_tokenizer(hf_dir)


def some_pairs():
    """Thirty of any length, and three times four that share long contexts."""
    random = np.random.default_rng(1)
    draw = lambda n: random.integers(3, 448, n).tolist()
    lengths = zip(random.integers(1, 260, 30), random.integers(1, 30, 30), strict=True)
    trunk = draw(100)
    return [(draw(n), draw(m)) for n, m in lengths] + [
        (context, draw(m))
        for context in (trunk, trunk + draw(40), trunk[:60])
        for m in (1, 2, 19, 5)
    ]


def test_windows_are_those_of_the_harness():
    utils = pytest.importorskip("lm_eval.utils")
    for n in (0, 1, 5, 9, 10, 11, 20, 25, 31):
        for max_length in (1, 7, 10):
            ids = list(range(100, 100 + n))
            theirs = utils.get_rolling_token_windows(ids, 1, max_length, 1)
            assert list(likelihood.split_rolling_windows(ids, 1, max_length)) == [
                utils.make_disjoint_window(window) for window in theirs
            ]


def test_every_token_is_predicted_once_and_after_what_stood_before_it():
    ids = list(range(100, 131))
    windows = list(likelihood.split_rolling_windows(ids, 1, 7))
    assert [token for _, predicted in windows for token in predicted] == ids
    whole = [1, *ids]
    for context, predicted in windows:
        at = whole.index(context[0])
        assert whole[at : at + len(context) + len(predicted)] == context + predicted
        assert len(context) + len(predicted) <= 7 + 1


def answered(batch, piece):
    """What a batch's row says of a piece: the ids on the path to each of its questions, those
    visible from it, and the target.
    """
    ((_, row, first),) = [place for place in batch.places if place[0] == piece]
    tokens, ends, positions, columns, targets = (each[row] for each in batch.arrays)
    for question in itertools.count(first):
        column = columns[question]
        seen = [c for c in range(column + 1) if ends[c] > column]
        assert positions[seen].tolist() == list(range(len(seen))), "each place of the text once"
        yield tokens[seen].tolist(), int(targets[question])


def test_a_sequence_of_trees_scores_each_token_after_its_prefix_and_holds_prefixes_once():
    random = np.random.default_rng(0)
    trunk, stems = (
        random.integers(3, 9, 90).tolist(),
        [random.integers(3, 9, n).tolist() for n in (30, 1, 17)],
    )
    texts = [
        (trunk + stem + random.integers(3, 9, n).tolist(), n_asked)
        for stem in stems
        for n, n_asked in ((5, 3), (2, 1), (9, 9), (2, 14))
    ]
    texts += [
        texts[3],
        (trunk, 7),
        (random.integers(3, 9, 200).tolist(), 199),
        (random.integers(3, 9, 20).tolist(), 2),
    ]
    pieces = [
        prefix_trees.ScoredSequence(np.asarray(ids, np.int32), n_asked) for ids, n_asked in texts
    ]
    batches = list(prefix_trees.make_tree_batches(pieces, 300, n_shards=2))
    assert sorted(piece for batch in batches for piece, *_ in batch.places) == list(
        range(len(pieces))
    )
    for batch in batches:
        assert len(batch.arrays.tokens) % 2 == 0
        for i, *_ in batch.places:
            ids, n_asked = texts[i]
            asked = list(itertools.islice(answered(batch, i), n_asked))
            assert asked == [(ids[:k], ids[k]) for k in range(len(ids) - n_asked, len(ids))]
    once = len({tuple(ids[: k + 1]) for ids, _ in texts for k in range(len(ids) - 1)})
    used = sum(int((batch.arrays.positions > 0).sum()) for batch in batches) + len(
        prefix_trees.build_trees(pieces, 300)
    )  # a root's position is 0
    assert used <= once + 2 * prefix_trees.MIN_SHARED_TOKENS, (
        "of the 17 texts of about 110 tokens that share 90"
    )


def test_packing_loses_nothing_and_leaves_little_empty():
    random = np.random.default_rng(0)
    sizes = random.integers(1, 256, 2000).tolist() + random.integers(1, 3000, 20).tolist()
    rows = prefix_trees.pack_trees(sizes, 3000)
    assert sorted(i for seq_len in rows.values() for row in seq_len for i in row) == list(
        range(2020)
    )
    used = [
        (sum(sizes[i] for i in row), seq_len) for seq_len, filled in rows.items() for row in filled
    ]
    assert all(n <= seq_len for n, seq_len in used)
    assert sum(n for n, _ in used) / sum(seq_len for _, seq_len in used) > 0.9
    assert set(rows) <= {256, 1024, 3072}


@pytest.mark.parametrize(
    "sizes,changes",
    [
        ({"fsdp": 1}, {}),
        ({"fsdp": 4, "tensor": 2}, {}),
        ({"fsdp": 1}, {"sliding_window": 50}),
        (
            {"fsdp": 1},
            {"attention_softcap": 0.5, "logit_softcap": 0.5, "embed_multiplier": 7.0},
        ),
    ],
    ids=["1 device", "8 devices", "sliding window", "softcaps"],
)
def test_likelihoods_are_those_of_each_pair_alone_on_any_mesh(params, sizes, changes):
    spec = dataclasses.replace(SPEC, **changes)
    mesh = sharding.make_mesh(
        config.MeshConfig(**sizes), jax.devices()[: math.prod(sizes.values())]
    )
    moved = jax.device_put(params, transformer.make_param_shardings(SPEC, mesh))

    @jax.jit
    def log_shares(ids):
        segments, positions = (ids > 0).astype(int), np.arange(300)[None]
        logits = transformer.compute_logits(spec, params, ids, segments, positions)
        return jax.nn.log_softmax(logits, axis=-1)[0]

    for (context, continuation), (nats, is_greedy) in zip(
        some_pairs(),
        likelihood.compute_continuation_log_likelihoods(spec, moved, some_pairs()),
        strict=True,
    ):
        ids = context + continuation
        table = np.asarray(log_shares(np.pad(np.asarray([ids]), ((0, 0), (0, 300 - len(ids))))))[
            len(context) - 1 : len(ids) - 1
        ]
        assert nats == pytest.approx(
            sum(table[i, token] for i, token in enumerate(continuation)), abs=1e-3
        )
        assert is_greedy == (table.argmax(-1).tolist() == continuation)


def test_a_greedy_continuation_is_distinguished(params):
    prompt = [7, 8, 9]
    (text,) = decode.generate(SPEC, params, [prompt], max_new=6)
    scores = likelihood.compute_continuation_log_likelihoods(
        SPEC, params, [(prompt, text), (prompt, [*text[:-1], text[-1] % 400 + 3])]
    )
    assert [is_greedy for _, is_greedy in scores] == [True, False]


def test_bits_per_byte_equal_transformers(params, hf_dir, encoder):
    pytest.importorskip("torch")
    ids = encoder.encode_batch(TEXTS)
    for max_length in (300, 64):
        ours = likelihood.measure_bits_per_byte(
            SPEC, params, TEXTS, ids, encoder.bos_id, max_length=max_length
        )
        theirs = reference.measure_reference_bits_per_byte(
            hf_dir, TEXTS, ids, encoder.bos_id, max_length
        )
        assert ours.bits_per_byte == pytest.approx(theirs.bits_per_byte, rel=1e-4)
        n_bytes = sum(len(text.encode()) for text in TEXTS)
        assert ours.n_bytes == theirs.n_bytes == n_bytes
        assert ours.n_tokens == theirs.n_tokens == sum(map(len, ids))
    assert ours.bits_per_byte == ours.loss_sum / math.log(2) / ours.n_bytes


def adopt(directory, normalizer=None, alphabet=()):
    """A tokenizer of single characters, with <unk> and without byte fallback."""
    import tokenizers

    names = ["<unk>", "</s>", *sorted(alphabet)]
    vocabulary = {name: i for i, name in enumerate(names)}
    model = tokenizers.models.BPE(vocabulary, [], unk_token="<unk>", fuse_unk=True)
    backend = tokenizers.Tokenizer(model)
    backend.add_special_tokens(["<unk>", "</s>"])
    backend.decoder = tokenizers.decoders.Fuse()
    if normalizer:
        backend.normalizer = normalizer
    directory.mkdir(parents=True)
    backend.save(str(directory / "tokenizer.json"))
    return directory


def test_the_error_of_bits_per_byte_is_what_other_texts_would_have_changed():
    """Against the spread of the ratio over many draws of as many texts."""
    rng = np.random.default_rng(3)

    def draw(n):
        sizes = rng.integers(50, 900, n)
        return 2.5 * sizes * rng.lognormal(0, 0.3, n), sizes

    ratios = [np.sum(bits) / np.sum(sizes) for bits, sizes in (draw(40) for _ in range(4000))]
    errors = [likelihood.estimate_ratio_error(*draw(40)) for _ in range(400)]
    assert np.mean(errors) == pytest.approx(np.std(ratios), rel=0.1)
    assert likelihood.estimate_ratio_error(*draw(1)) is None
    scores, owners = [-3.0, -5.0, -11.0], [0, 0, 1]
    sums = likelihood.sum_over_texts(["abcd", "abé"], [[1, 2], [3]], owners, scores)
    assert sums.loss_sum == 19 and sums.n_bytes == 8 and sums.n_tokens == 3
    bits = np.array([8.0, 11.0]) / np.log(2)
    assert sums.stderr == pytest.approx(likelihood.estimate_ratio_error(bits, np.array([4, 4])))


def test_text_that_a_tokenizer_cannot_spell_has_no_bits_per_byte(params, hf_dir, tmp_path, output):
    from tokenizers import Regex, normalizers

    text = "The  Ship sailed.\n\nNobody said a word."
    file, source = tmp_path / "text.txt", tmp_path / "text.jsonl"
    file.write_text(text)
    source.write_text(json.dumps({"text": text}))
    collapse = normalizers.Replace(Regex(r"\s+"), " ")
    for name, normalizer, alphabet, n_lost in (
        ("whole", None, set(text), 0),
        ("unknown", None, set(text) - set("Tp"), 2),
        ("nothing", None, set("x"), len(text)),
        ("lower", normalizers.Lowercase(), set(text.lower()), 3),
        ("spaces", collapse, set(text), 2),
    ):
        model = tmp_path / name
        tokenizer_dir = adopt(tmp_path / "made" / name, normalizer, alphabet)
        huggingface.write_hf_model(SPEC, params, model, tokenizer_dir=tokenizer_dir)
        task = "bits_per_byte/text"
        found = harness.evaluate_model(model, [f"{task}=jsonl:{source}"])
        metrics = found["results"][task]
        assert metrics["n_lost_bytes"] == n_lost
        compared = compare.compare_samples([model], ["a"], max_new=1, texts=[file])
        score = compared.bits_per_byte[str(file)][name]
        assert score == metrics["bits_per_byte,none"]
        shown = output()
        if n_lost:
            sentence = f"cannot spell {n_lost} of {len(text)} bytes ({n_lost / len(text):.2%})"
            assert score is None and shown.count(sentence) == 2
            assert sentence in found["reasons"][task]["bits_per_byte,none"]
            assert sentence in compared.reasons[str(file)][name]
        else:
            assert score > 0 and "cannot spell" not in shown and not found["reasons"]


def test_results_that_are_no_numbers_are_null_with_the_reason(
    params, hf_dir, data_dir, tmp_path, output
):
    pytest.importorskip("lm_eval")
    broken = {**params, "norm": params["norm"].at[3].set(np.nan)}
    model = tmp_path / "broken"
    huggingface.write_hf_model(SPEC, broken, model, tokenizer_dir=hf_dir)
    source = tmp_path / "text.jsonl"
    source.write_text(json.dumps({"text": TEXTS[1]}))
    to = tmp_path / "results.json"
    tasks = [f"bits_per_byte/mine=jsonl:{source}", "winogrande"]
    harness.evaluate_model(model, tasks, limit=3, data_dir=data_dir, to=to)
    refuse = lambda name: pytest.fail(f"{name} is not JSON")
    found = json.loads(to.read_text(), parse_constant=refuse)
    results, reasons = found["results"], found["reasons"]
    assert results["winogrande"]["acc,none"] is None
    assert results["bits_per_byte/mine"]["bits_per_byte,none"] is None
    assert "3 of 3 items are NaN" in reasons["winogrande"]["acc,none"]
    assert reasons["bits_per_byte/mine"] == {"bits_per_byte,none": "NaN"}
    metrics = "acc, acc_stderr, answer_bits_per_byte, answer_bits_per_byte_stderr"
    assert f"winogrande: no number for {metrics}: log-likelihoods of 3 of 3" in output()
    with pytest.raises(UserError, match="NaN or infinite"):
        compare.compare_samples([model], ["a"], max_new=1)
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({"text": TEXTS[0]}))
    with pytest.raises(UserError, match="broken gives losses that are NaN"):
        compare.compare_documents([hf_dir, model], [f"mine=jsonl:{long}"])


def test_bits_of_right_answers_are_summed_and_divided_once():
    """By index, by text, of the likelier context where the harness says so; with the error of a
    ratio.
    """

    def sample(target, continuations, log_likelihoods, **more):
        requests = [("Q:", text) for text in continuations]
        if "acc" in more:
            requests = [(f"Q {i}", text) for i, text in enumerate(continuations)]
        answers = [[(nats, False)] for nats in log_likelihoods]
        return {"target": target, "arguments": requests, "resps": answers, **more}

    bits = math.log(2)
    samples = [
        sample(1, [" no", " yes"], [-1.0, -8 * bits]),
        sample("Ä", [" Ä", " B"], [-6 * bits, -1.0]),
        sample(" end", [" end", " end"], [-2.0, -10 * bits], acc=0.0),
    ]
    found = answers.measure_answers(samples)
    ratio = (8 + 6 + 10) / (4 + 3 + 4)
    residuals = np.array([8 - 4 * ratio, 6 - 3 * ratio, 10 - 4 * ratio])
    assert found["answer_bits_per_byte,none"] == pytest.approx(ratio)
    expected = (np.sum(residuals**2) * 3 / 2) ** 0.5 / 11
    assert found["answer_bits_per_byte_stderr,none"] == pytest.approx(expected)
    generated = {"target": "4", "arguments": [("2 + 2 =", {"until": []})], "resps": [["4"]]}
    assert answers.measure_answers([generated]) == {}


def test_equal_requests_of_the_harness_draw_as_many_texts(params, hf_dir, monkeypatch):
    instances = pytest.importorskip("lm_eval.api.instance")
    settings = {"until": ["\n\n"], "max_gen_toks": 40, "do_sample": True, "temperature": 1.0}
    requests = []
    for i in range(64):
        requests.append(instances.Instance("generate_until", {}, ("The gulls", settings), i))
    judge = harness.make_lm_adapter(SPEC, params, hf_dir, 300)
    texts = judge.generate_until(requests)
    assert len(set(texts)) == 64
    monkeypatch.setattr(decode, "MAX_DECODE_BATCH", 7)
    assert judge.generate_until(requests) == texts
    assert judge.generate_until(requests[:1]) == texts[:1]


def test_the_code_that_a_tokenizer_names_is_neither_run_nor_copied(params, hf_dir, tmp_path):
    pytest.importorskip("torch"), pytest.importorskip("lm_eval")
    model = shutil.copytree(hf_dir, tmp_path / "model")
    settings = json.loads((model / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "Theirs", "auto_map": {"AutoTokenizer": ["theirs.T", None]}}
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    for name in ("theirs.py", "tokenizer_theirs.py"):
        (model / name).write_text(f"open({str(tmp_path / 'run')!r}, 'w')\n")
    ours = harness.make_lm_adapter(SPEC, params, model, 300)
    theirs = reference.make_reference_harness_model(model, 300)
    plain = tokenizer.load_tokenizer(hf_dir)
    for text in TEXTS:
        ids = [plain.bos_id, *plain.encode_batch([text])[0]]
        assert ours.tok_encode(text) == theirs.tok_encode(text) == ids
    huggingface.copy_tokenizer(model, tmp_path / "copy")
    assert "auto_map" not in (tmp_path / "copy/tokenizer_config.json").read_text()
    assert not list((tmp_path / "copy").glob("*.py"))
    assert tokenizer.load_tokenizer(tmp_path / "copy").fingerprint == plain.fingerprint
    assert not (tmp_path / "run").exists()


def test_heldout_loss_divides_sums_once(params):
    random = np.random.default_rng(0)
    tokens = random.integers(0, 448, (2, 4, 20), np.int32)
    weights = (random.random((2, 4, 20)) < [[[0.9]], [[0.2]]]).astype(np.float32)
    ones, places = np.ones((4, 20), np.int32), np.tile(np.arange(20, dtype=np.int32), (4, 1))
    batches = [
        Batch(tokens[i], np.roll(tokens[i], -1, 1), ones, places, weights[i]) for i in range(2)
    ]
    step = likelihood.make_loss_step(SPEC, ONE)
    sums = [[float(x) for x in step(params, batch)] for batch in batches]
    expected = (sums[0][0] + sums[1][0]) / weights.sum()
    assert likelihood.measure_heldout_loss(step, params, batches) == pytest.approx(
        expected, rel=1e-6
    )
    assert math.isnan(likelihood.measure_heldout_loss(step, params, []))


def test_logits_and_kl_agree_with_transformers(params, hf_dir):
    pytest.importorskip("torch")
    tokens = np.random.default_rng(0).integers(3, 448, (2, 33))
    positions = np.tile(np.arange(33), (2, 1))
    logits = transformer.compute_logits(SPEC, params, tokens, np.ones_like(tokens), positions)
    ours = np.asarray(logits)
    np.testing.assert_allclose(ours, reference.compute_reference_logits(hf_dir, tokens), atol=1e-3)
    assert 0 <= reference.measure_logit_distance(hf_dir, tokens, ours).kl < 1e-6
    assert reference.measure_logit_distance(hf_dir, tokens, ours * 0.5).kl > 1e-2


def test_the_same_requests_get_the_same_answers_as_from_the_harness_own_model(params, hf_dir):
    pytest.importorskip("torch")
    instances = pytest.importorskip("lm_eval.api.instance")

    def requests(kind, *arguments):
        return [instances.Instance(kind, {}, each, i) for i, each in enumerate(arguments)]

    pairs = [
        ("The ship sailed", " at dawn."),
        ("The ship sailed ", "at dawn."),  # the space moves to the continuation
        ("", "Nobody said a word"),
        ("<s>The quay", " said"),  # a written beginning-of-sequence token is not put twice
        (TEXTS[0], " The end"),  # loses tokens on its left
        (TEXTS[2], "\n\n"),
    ]
    until = {"until": ["\n\n", "ship"], "max_gen_toks": 40, "do_sample": False}
    generate = [("The gulls", until), (TEXTS[0], until), ("x", {"until": ["."], "max_gen_toks": 9})]
    ours, theirs = (
        harness.make_lm_adapter(SPEC, params, hf_dir, 300),
        reference.make_reference_harness_model(hf_dir, 300),
    )

    answers = zip(
        *(judge.loglikelihood(requests("loglikelihood", *pairs)) for judge in (ours, theirs)),
        strict=True,
    )
    for (our_nats, our_greedy), (their_nats, their_greedy) in answers:
        assert our_nats == pytest.approx(their_nats, abs=1e-3)
        assert our_greedy == their_greedy
    texts = [(text,) for text in TEXTS[:4]]
    rolling = [
        judge.loglikelihood_rolling(requests("loglikelihood_rolling", *texts))
        for judge in (ours, theirs)
    ]
    assert rolling[0] == pytest.approx(rolling[1], rel=1e-5, abs=1e-3)
    written = [
        judge.generate_until(requests("generate_until", *generate)) for judge in (ours, theirs)
    ]
    assert written[0] == written[1]


def test_both_backends_measure_a_run_and_write_the_harness_format(
    params, hf_dir, data_dir, tmp_path
):
    pytest.importorskip("torch"), pytest.importorskip("lm_eval")
    run = tmp_path / "run"
    checkpoint.save_checkpoint(
        run, 7, params, {"step": jax.numpy.int32(7)}, SPEC, counts={"step": 7}, tokenizer=None
    )
    huggingface.copy_tokenizer(hf_dir, run / "tokenizer")
    (tmp_path / "texts.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in TEXTS[:4])
    )
    tasks = [f"bits_per_byte/mine=jsonl:{tmp_path}/texts.jsonl", "course,winogrande"]
    ours, theirs = (
        harness.evaluate_model(
            run,
            tasks,
            backend=backend,
            limit=3,
            data_dir=data_dir,
            to=tmp_path / "eval" / f"{backend}.json",
        )
        for backend in ("jax", "hf")
    )
    assert read_result(tmp_path / "eval/jax.json") == ours
    assert (ours["backend"], theirs["backend"], ours["lineage"]["step"]) == ("jax", "hf", 7)
    assert ours["n-samples"]["truthfulqa_mc2"] == {"original": 817, "effective": 3}
    assert {"acc,none", "acc_stderr,none"} <= ours["results"]["truthfulqa_mc2"].keys()
    assert {"bits_per_byte,none", "loss_sum", "n_bytes", "n_tokens"} <= ours["results"][
        "bits_per_byte/mine"
    ].keys()
    assert (
        list(ours["results"])
        == list(theirs["results"])
        == ["bits_per_byte/mine", "truthfulqa_mc2", "winogrande"]
    )
    for task, metrics in ours["results"].items():
        scored = {name.partition(",")[0] for name in metrics if "," in name}
        directions = ours["higher_is_better"][task]
        assert {name for name in scored if not name.endswith("_stderr")} == directions.keys()
        for name, is_higher_better in directions.items():
            assert is_higher_better != name.endswith("bits_per_byte"), name
        for name, value in metrics.items():
            their_value = theirs["results"][task][name]
            assert value == (
                pytest.approx(their_value, rel=1e-4) if isinstance(value, float) else their_value
            )


def test_an_interrupted_evaluation_asks_only_what_was_not_answered(
    params, hf_dir, data_dir, tmp_path, monkeypatch
):
    pytest.importorskip("lm_eval")
    score, asked = likelihood.compute_continuation_log_likelihoods, []

    def cut_after(n):
        def scored(spec, params, pairs, *, answered, **how):
            asked.append(len(pairs))

            def count_answer(place, answer):
                answered(place, answer)
                count_answer.n += 1
                if count_answer.n == n:
                    raise KeyboardInterrupt

            count_answer.n = 0
            return score(spec, params, pairs, answered=count_answer, **how)

        return scored

    to = tmp_path / "eval" / "truth.json"
    uncut = harness.evaluate_model(hf_dir, ["truthfulqa_mc2"], limit=4, data_dir=data_dir)
    monkeypatch.setattr(likelihood, "compute_continuation_log_likelihoods", cut_after(11))
    with pytest.raises(KeyboardInterrupt):
        harness.evaluate_model(hf_dir, ["truthfulqa_mc2"], limit=4, data_dir=data_dir, to=to)
    monkeypatch.setattr(likelihood, "compute_continuation_log_likelihoods", cut_after(10**6))
    went_on = harness.evaluate_model(hf_dir, ["truthfulqa_mc2"], limit=4, data_dir=data_dir, to=to)
    assert asked[0] - asked[1] == 11
    score_of = lambda found: found["results"]["truthfulqa_mc2"]["acc,none"]
    assert score_of(went_on) == pytest.approx(score_of(uncut), rel=1e-6)
    assert [file.name for file in to.parent.iterdir()] == ["truth.json"]


def test_items_that_stand_in_the_corpus_are_counted_and_the_score_is_given_without_them(
    params, hf_dir, data_dir, tmp_path, output
):
    """A corpus in which two of seven items stand, and a model whose export was made from a run on
    it.
    """
    pytest.importorskip("lm_eval")
    items = benchmarks.read_benchmark(data_dir / "eval_winogrande" / "winogrande.jsonl")[:7]
    corpus, run, export = (
        tmp_path / "corpus",
        tmp_path / "run",
        shutil.copytree(hf_dir, tmp_path / "run" / "hf"),
    )
    (corpus / "train").mkdir(parents=True)
    texts = [
        "Nothing of note.",
        unicodedata.normalize("NFD", f"HE SAID -- {items[2].text}").replace("e", "e\u00ad"),
        items[5].text.replace(" ", "\n"),
        items[5].text,
    ]
    columns = {"id": [f"d{i}" for i in range(4)], "source": ["prose"] * 4, "text": texts}
    pq.write_table(pa.table(columns), corpus / "train" / "prose-00000.parquet")
    for stage_name, out, source in (
        ("prepare", corpus, None),
        ("train", run, corpus),
        ("export", export, run),
    ):
        inputs = (
            {"from": {"path": str(source), "fingerprint": stage.fingerprint_path(source)}}
            if source
            else {}
        )
        manifest = stage.make_manifest(
            stage.StageRequest(stage_name, {}, inputs, 0),
            sealed={},
            counts={},
            tokenizer=None,
            seconds=1.0,
        )
        (out / "manifest.json").write_text(json.dumps(manifest.to_json()))
    with_all = harness.evaluate_model(export, ["winogrande"], limit=7, data_dir=data_dir)
    found = with_all["contamination"]
    assert (found["corpora"], found["unknown"]) == ({str(corpus): 4}, [])
    (one,) = found["tasks"].values()
    assert (one["items"], one["overlapping"], [each["item"] for each in one["examples"]]) == (
        7,
        2,
        ["2", "5"],
    )
    assert [each["document"] for each in one["examples"]] == ["d1", "d2"] and all(
        len(each["shared"].split()) == 13 for each in one["examples"]
    )
    without = tmp_path / "winogrande.jsonl"
    lines = (data_dir / "eval_winogrande" / "winogrande.jsonl").read_text().splitlines()
    without.write_text("\n".join(line for i, line in enumerate(lines[:7]) if i not in (2, 5)))
    alone = harness.evaluate_model(hf_dir, ["winogrande"], data_dir=tmp_path)["results"][
        "winogrande"
    ]
    assert one["without"] == pytest.approx(
        {key: value for key, value in alone.items() if key.startswith("acc")}
    )
    assert (
        "winogrande: 2 of 7 items share 13 consecutive words with a training "
        f"document; acc {with_all['results']['winogrande']['acc,none']:.4f}, "
        f"without them {alone['acc,none']:.4f}"
    ) in output()
    shutil.rmtree(corpus)
    assert contamination.find_training_corpora(export) == (
        [],
        [f"{corpus}: is not there."],
    )


def test_shards_looked_through_in_processes_give_what_they_give_in_turn(tmp_path, monkeypatch):
    words = [f"w{i}" for i in range(60)]
    items = [
        benchmarks.BenchmarkItem("task", str(i), " ".join(words[i * 7 : i * 7 + 15]), {})
        for i in range(5)
    ]
    (tmp_path / "train").mkdir()
    for shard, texts in enumerate(
        (["nothing", items[3].text], [items[1].text, f"and {items[3].text}"], ["nothing again"])
    ):
        columns = {"id": [f"{shard}/{i}" for i in range(len(texts))], "text": texts}
        pq.write_table(pa.table(columns), tmp_path / f"train/web-{shard:05d}.parquet")
    in_turn = contamination.find_overlaps(items, [tmp_path])
    shared = lambda i: " ".join(words[i * 7 : i * 7 + 13])
    assert in_turn == (
        {("task", "3"): (shared(3), "0/1"), ("task", "1"): (shared(1), "1/0")},
        {str(tmp_path): 5},
    )
    monkeypatch.setattr(contamination, "MIN_BYTES_FOR_PROCESSES", 0)
    assert contamination.find_overlaps(items, [tmp_path]) == in_turn


@pytest.mark.parametrize(
    "file",
    [
        "eval_truthfulqa/v0_mc_task.json",
        "eval_winogrande/winogrande.jsonl",
        "eval_lambada/lambada_openai.jsonl",
        "eval_gsm8k/test.jsonl",
    ],
)
def test_an_item_says_the_same_words_in_its_own_form_and_in_the_harness_form(data_dir, file):
    items = benchmarks.read_benchmark(data_dir / file)
    assert [
        item.id
        for item in items
        if decontaminate.normalize_words(item.text)
        != decontaminate.normalize_words(benchmarks.join_item_text(item.fields))
    ] == []


def test_gsm8k_takes_its_examples_from_its_training_file(data_dir):
    rows = harness.load_local_items("gsm8k", data_dir)
    assert {split: len(found) for split, found in rows.items()} == {"train": 7473, "test": 1319}
    assert not {row["question"] for row in rows["train"]} & {
        row["question"] for row in rows["test"]
    }


def test_a_group_says_how_many_examples_and_none_of_them_is_an_item(
    params, hf_dir, data_dir, monkeypatch
):
    pytest.importorskip("lm_eval")
    _, h6 = harness.parse_tasks(["h6", "winogrande"], 7, None)
    assert {name: how.shots for name, how in h6.items()} == {
        "arc_challenge": 25,
        "hellaswag": 10,
        "mmlu": 5,
        "truthfulqa_mc2": 0,
        "winogrande": None,
        "gsm8k": 5,
    }, "a task that is named beside its group is run as it was named"
    assert {how.items for how in h6.values()} == {7}
    seen = []
    monkeypatch.setattr(
        harness, "GROUPS", {"two": {"winogrande": harness.TaskRequest(items=3, shots=2)}}
    )
    score = likelihood.compute_continuation_log_likelihoods
    monkeypatch.setattr(
        likelihood,
        "compute_continuation_log_likelihoods",
        lambda spec, params, pairs, **how: seen.extend(pairs) or score(spec, params, pairs, **how),
    )
    found = harness.evaluate_model(hf_dir, ["two"], data_dir=data_dir)
    rows = harness.load_local_items("winogrande", data_dir)["validation"]
    assert found["n-shot"]["winogrande"] == 2 and found["n-samples"]["winogrande"] == {
        "original": len(rows) - 3,
        "effective": 3,
    }
    encoder = tokenizer.load_tokenizer(hf_dir)
    contexts = {encoder.decode([i for i in context if i > 2]) for context, _ in seen}
    ends = [row["sentence"].split("_")[1].strip() for row in rows]
    for context in contexts:
        assert sum(end in context for end in ends[:3]) == 2, (
            "two of the three examples stand in front of each item"
        )


def test_a_wrong_request_is_one_sentence(params, hf_dir, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    (tmp_path / "winogrande.jsonl").write_text('{"question": "1 + 1?", "answer": "2"}\n')
    bare = tmp_path / "bare"
    huggingface.write_hf_model(SPEC, params, bare)
    for tasks, says in (
        (["bits_per_byte/x=txt:foo"], "did you mean text:"),
        (["hellaswga"], "hellaswag"),
        ([","], "none given"),
    ):
        with pytest.raises(UserError, match=says):
            harness.evaluate_model(hf_dir, tasks)
    for data_dir, task, says in (
        (tmp_path / "no", "gsm8k", "eval_gsm8k/train.jsonl and eval_gsm8k/test.jsonl"),
        (tmp_path, "winogrande", "not those of winogrande"),
        (tmp_path, "winogrand", "nearest are: winogrande"),
    ):
        with pytest.raises(UserError, match=says):
            harness.evaluate_model(hf_dir, [task], data_dir=data_dir)
    with pytest.raises(UserError, match="no tokenizer"):
        harness.evaluate_model(bare, ["bits_per_byte/x=python:code"], limit=1)
    for bad in ({"limit": 0}, {"max_length": 1}):
        with pytest.raises(UserError, match="at least"):
            harness.evaluate_model(hf_dir, ["course"], **bad)
    for pair, says in (
        (([5], [448]), "token id 448"),
        (([5], []), "empty continuation"),
        (([5], [6] * 301), "does not fit"),
    ):
        with pytest.raises(UserError, match=says):
            likelihood.compute_continuation_log_likelihoods(SPEC, params, [pair])
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match=r"torch not installed.*requirements-eval"):
        reference.require_torch("torch")


def test_a_tokenizer_and_a_prompt_that_do_not_fit_the_model_are_refused(hf_dir, tmp_path):
    small = dataclasses.replace(SPEC, vocab_size=300)
    random = np.random.default_rng(0)
    made = jax.tree.map(
        lambda row: np.float32(random.normal(row.init.mean, row.init.std or 0.1, row.shape)),
        transformer.param_specs(small),
        is_leaf=is_param_spec,
    )
    huggingface.write_hf_model(
        small,
        jax.device_put(made, transformer.make_param_shardings(small, ONE)),
        tmp_path / "small",
        tokenizer_dir=hf_dir,
    )
    with pytest.raises(UserError, match="gives ids up to 344, but the model knows ids 0 to 299"):
        harness.evaluate_model(tmp_path / "small", ["bits_per_byte/x=python:code"], limit=1)
    for prompt, says in ((TEXTS[0] * 3, "context"), ("~" * 40 + TEXTS[2], "ids")):
        with pytest.raises(UserError, match=says):
            compare.compare_samples(
                [hf_dir if says == "context" else tmp_path / "small"], [prompt], max_new=3
            )


def test_bits_per_byte_alone_needs_neither_harness_nor_torch():
    code = (
        "import sys; from jaxpt.evaluate import harness, compare, reference; "
        "print({'lm_eval', 'torch', 'transformers', 'datasets'} & "
        "set(sys.modules))"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()
        == "set()"
    )


def test_a_model_of_the_same_shape_is_not_compiled_for_again(hf_dir, tmp_path):
    """Whatever its weights are: commands share the compile cache that training has."""
    cache = tmp_path / "jaxpt/compiled"
    command = [sys.executable, "-m", "jaxpt", "compare", "--prompts", "prompts.txt"]
    (tmp_path / "prompts.txt").write_text("The ship\n")
    other = shutil.copytree(hf_dir, tmp_path / "other")
    file = other / "model.safetensors"
    weights = safetensors.numpy.load_file(file)
    safetensors.numpy.save_file({name: 0.5 * w for name, w in weights.items()}, file)
    kept = []
    for model in (hf_dir, other):
        subprocess.run(
            [*command, "--models", str(model)],
            cwd=tmp_path,
            env=os.environ | {"XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)},
            check=True,
        )
        kept.append({file.name for file in cache.glob("*-cache")})
    assert kept[0] and kept[0] == kept[1]


# ---- comparisons


def test_models_are_compared_on_the_same_prompts(params, hf_dir, encoder, tmp_path, output):
    prompts = ["The ship", "def area(r):"]
    (tmp_path / "sea.txt").write_text(TEXTS[0])
    samples = compare.compare_samples(
        [hf_dir, hf_dir],
        prompts,
        max_new=9,
        texts=[tmp_path / "sea.txt"],
        to=tmp_path / "eval" / "samples.json",
    ).to_json()
    alone = likelihood.measure_bits_per_byte(
        SPEC, params, [TEXTS[0]], encoder.encode_batch([TEXTS[0]]), encoder.bos_id
    ).bits_per_byte
    assert samples["bits_per_byte"] == {
        str(tmp_path / "sea.txt"): {str(hf_dir): pytest.approx(alone)}
    }
    assert read_result(tmp_path / "eval/samples.json") == samples
    assert samples["models"] == [str(hf_dir)] * 2  # not unique, so the path
    assert [each["prompt"] for each in samples["prompts"]] == prompts
    for prompt, each in zip(prompts, samples["prompts"], strict=True):
        first, second = each["outputs"]
        ids = [encoder.bos_id, *encoder.encode_batch([prompt])[0]]
        (new,) = decode.generate(SPEC, params, [ids], max_new=9)
        assert prompt + first["text"] == encoder.decode(ids + new)
        assert (
            (first["text"], first["tokens"])
            == (second["text"], second["tokens"])
            == (first["text"], len(new))
        )
    printed = output()
    assert "> def area(r):" in printed and f"sea.txt: {hf_dir} {alone:.4f}" in printed
    with pytest.raises(UserError, match=r"--ppl .*nothing.txt: cannot be read"):
        compare.compare_samples([hf_dir], prompts, texts=[tmp_path / "nothing.txt"])


def test_on_a_terminal_a_text_is_seen_as_it_is_written_and_is_inert(hf_dir, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    seen = []
    generate = decode.generate

    def watched(*args, watch, **settings):
        def watch_and_note(row, ids):
            answer = watch(row, ids)
            seen.append(capsys.readouterr().out)
            return answer

        return generate(*args, watch=watch_and_note, **settings)

    monkeypatch.setattr(decode, "generate", watched)
    samples = compare.compare_samples([hf_dir], ["The \x1b[31mship"], max_new=11)
    (output,) = samples.prompts[0].outputs
    parts = seen[1:]  # the first was to compile
    assert parts[0].startswith(f"\n{hf_dir.name} > The \\x1b[31mship\n")
    streamed = "".join(parts).partition("ship\n")[2] + capsys.readouterr().out.partition("\n")[0]
    assert (
        len(parts) == 3
        and output.text
        and streamed == escape_controls(output.text).partition("\n")[0]
    )


def test_the_documents_on_which_two_models_differ_most_are_found_in_both_directions(
    params, hf_dir, encoder, tmp_path, output
):
    child = tmp_path / "child"
    random = np.random.default_rng(1)
    shuffled = jax.tree.map(
        lambda x: random.permutation(np.asarray(x).ravel()).reshape(x.shape), params
    )
    flatter = shuffled | {
        "unembed": shuffled["unembed"] * np.float32(0.6)
    }  # about as good as its parent, and elsewhere
    other = jax.device_put(flatter, transformer.make_param_shardings(SPEC, ONE))
    huggingface.write_hf_model(SPEC, other, child, tokenizer_dir=hf_dir)
    words = [TEXTS[0].split(), TEXTS[1].split() * 9, list("0123456789.*;:—") * 9]
    texts = [
        " ".join(random.permutation(words[i % 3])[: 25 + 9 * i]) + " naïve Zürcher ½"
        for i in range(11)
    ] + ["x", TEXTS[0] * 2]
    (tmp_path / "held.jsonl").write_text(
        "".join(json.dumps({"id": f"d{i}", "text": text}) + "\n" for i, text in enumerate(texts))
    )
    to = tmp_path / "eval" / "differences.json"
    held = f"held=jsonl:{tmp_path}/held.jsonl"
    found = compare.compare_documents([hf_dir, child], [held], to=to).to_json()
    assert read_result(to) == found and found["documents"] == 12, "x is too short"
    ids = [each[:300] for each in encoder.encode_batch(texts)]
    means = [[], []]
    for mine, weights in zip(means, (params, other), strict=True):
        for each in ids:
            ((nats, _),) = likelihood.compute_continuation_log_likelihoods(
                SPEC, weights, [([encoder.bos_id], each)]
            )
            mine.append(-nats / len(each))
    change = {i: means[1][i] - means[0][i] for i in range(13) if i != 11}
    order = sorted(change, key=change.get)
    numbers = {
        side: [int(each["id"].rpartition(":")[2]) - 1 for each in found[side]]
        for side in ("better", "worse")
    }
    assert numbers["better"] == [i for i in order[:4] if change[i] < 0] and numbers["worse"] == [
        i for i in order[::-1][:4] if change[i] > 0
    ]
    assert found["better"] and found["worse"], "this child is better on some and worse on others"
    for side in ("better", "worse"):
        for i, each in zip(numbers[side], found[side], strict=True):
            assert each["nats"] == pytest.approx([means[0][i], means[1][i]], abs=1e-4) and each[
                "tokens"
            ] == len(ids[i])
            span = ids[i][each["first_token"] : each["first_token"] + compare.MAX_TOKENS_SHOWN]
            assert "".join(each["pieces"]) == encoder.decode(span) and len(each["pieces"]) == len(
                span
            ) == len(each["losses"][0]) == len(each["losses"][1])
            if len(span) == len(ids[i]):
                assert [np.mean(losses) for losses in each["losses"]] == pytest.approx(
                    each["nats"], abs=1e-3
                )
    printed = output()
    assert "child is better on\n" in printed and "child is worse on\n" in printed
    compare.compare_documents([hf_dir, child], [f"held=jsonl:{tmp_path}/held.jsonl"], to=to)
    assert "holds this already" in output()
    values = np.float32([0, 3, -9, 2, 2, -1, 5, 0])
    assert [compare.select_window(values, n) for n in (1, 2, 3, 8, 99)] == [6, 6, 4, 0, 0]


def test_models_that_cannot_be_set_side_by_side_are_refused(params, hf_dir, tmp_path):
    (tmp_path / "held.jsonl").write_text(json.dumps({"text": TEXTS[0]}) + "\n")
    (tmp_path / "short.jsonl").write_text(json.dumps({"text": "x"}) + "\n")
    other = shutil.copytree(hf_dir, tmp_path / "other")
    words = json.loads((other / "tokenizer.json").read_text())
    words["model"]["merges"] = words["model"]["merges"][:-40]
    (other / "tokenizer.json").write_text(json.dumps(words))
    for models, file, says in (
        ([hf_dir], "held", "got 1 models, expected two"),
        ([hf_dir, other], "held", "different tokenizers"),
        ([hf_dir, hf_dir], "short", "none of 1 documents has 32 tokens"),
    ):
        with pytest.raises(UserError, match=says):
            compare.compare_documents(models, [f"held=jsonl:{tmp_path}/{file}.jsonl"])


def test_columns_hold_their_width_and_text_stays_inert():
    text = (
        "def f(x):\n    return x\n\nA line that is certainly longer than its column, with a word "
        + "m" * 50
        + "\n吾輩は猫である。名前はまだ無い。どこで生れたか\x1b[31mred"
    )
    outputs = tuple(compare.Continuation(name, text, 9, 0.1) for name in ("a", "bb"))
    samples = compare.SampleComparison(
        request="",
        models=("a", "bb"),
        settings=compare.GenerationSettings(9, 1.0, 0.0, 0, 1.0, seed=0),
        prompts=(compare.PromptSamples("p", outputs),),
        bits_per_byte={},
    )
    shown = compare.format_columns(samples, 62)
    assert all(compare.display_width(line) <= 62 for line in shown.split("\n"))
    assert "\x1b" not in shown
    assert "    return x" in shown
    column = compare.wrap_text(text, 30)
    assert "".join(column).replace(" ", "") == text.replace("\x1b", "\\x1b").replace(
        "\n", ""
    ).replace(" ", "")
    for width in (0, 1, 2, 3):
        lines = compare.wrap_text("a吾 b", width)
        assert "".join(lines).replace(" ", "") == "a吾b"
        assert max(map(compare.display_width, lines)) <= max(width, 2)
        assert "return" in compare.format_columns(samples, 70) and compare.format_columns(
            samples, width
        )
    below = compare.format_columns(samples, 40)  # too narrow for two columns
    assert below.count("def f(x):") == 2 and "def f(x):  " not in below


def test_prompts_are_read_from_lines_or_json(tmp_path):
    lines, listed, empty, wrong = (
        tmp_path / name for name in ("a.txt", "b.json", "c.txt", "d.json")
    )
    lines.write_text("one\n\n  two\n")
    listed.write_text('["one\\ntwo", ""]')
    empty.write_text("\n \n")
    wrong.write_text('{"prompt": "one"}')
    assert compare.read_prompts(lines) == ["one", "  two"]
    assert compare.read_prompts(listed) == ["one\ntwo"]
    for file, says in (
        (empty, "no prompt"),
        (wrong, "list of strings"),
        (tmp_path / "e.txt", "cannot be read"),
    ):
        with pytest.raises(UserError, match=says):
            compare.read_prompts(file)


def test_a_model_is_named_by_its_run(tmp_path):
    base, child = tmp_path / "base", tmp_path / "child"
    assert compare.name_models([base, child / "checkpoints" / "300"]) == ["base", "child"]
    assert compare.name_models([child, child / "checkpoints" / "300"]) == [
        str(child),
        str(child / "checkpoints" / "300"),
    ]
