"""Laws of preference pairs: from JSON lines to packed pairs, and the loss that TRL has for them."""

import dataclasses
import json
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from conftest import SMALL_SPEC
from test_session import compiled, make_config, start, train, train_in_parts  # noqa: F401

from jaxpt.config import PackConfig, PrepareConfig, TrainConfig
from jaxpt.data import filters, loader, pack, sources, tokenizer
from jaxpt.data.meta import PAIR
from jaxpt.data.prepare import corpus
from jaxpt.flops import DeviceCost, count_flops_per_token, count_forward_flops_per_token
from jaxpt.hardware import parse_target
from jaxpt.model import dpo, transformer
from jaxpt.plan import compile, cost
from jaxpt.spec import LoraSpec, UserError
from jaxpt.train import begin, gate, step
from jaxpt.train.context import open_run
from jaxpt.train.metrics import read_metrics
from jaxpt.train.records import CheckpointRecord, TrainMetrics
from jaxpt.weights import checkpoint, huggingface
from jaxpt.weights.load import load_model

BETA = 0.3
SPEC = SMALL_SPEC.replace(n_layers=2)


def make_pairs(n, rng):
    """Prompts, chosen and rejected answers as ids, of different lengths."""
    draw = lambda low, high: rng.integers(1, 90, rng.integers(low, high)).tolist()
    return [(draw(2, 5), draw(2, 6), draw(3, 7)) for _ in range(n)]


def lay_out(pairs, seq_len=32):
    """Two pairs per sequence, as the loader lays packed pairs out."""
    sequences = []
    for first in range(0, len(pairs), 2):
        ids, lengths, loss_from = [], [], []
        for prompt, *answers in pairs[first : first + 2]:
            for answer in answers:
                ids += prompt + answer
                lengths.append(len(prompt) + len(answer))
                loss_from.append(len(prompt))
        ids += [0] * (seq_len * 2 - len(ids))
        arrays = (np.array(x, np.int32) for x in (ids, lengths, loss_from))
        sequences.append(loader.PackedSequence(*arrays))
    return loader.make_batch(sequences, document_mask=True)


def compute_trl_loss(policy, reference, pairs):
    """TRL's DPOTrainer with loss_type="sigmoid", written out: the mean over pairs, in torch."""

    def log_prob(model, prompt, answer):
        ids = torch.tensor([prompt + answer])
        logits = model(ids).logits[0, :-1]
        taken = torch.log_softmax(logits, -1)[torch.arange(ids.shape[1] - 1), ids[0, 1:]]
        return taken[len(prompt) - 1 :].sum()

    losses, margins = [], []
    for prompt, chosen, rejected in pairs:
        by_policy = log_prob(policy, prompt, chosen) - log_prob(policy, prompt, rejected)
        with torch.no_grad():
            expected = log_prob(reference, prompt, chosen) - log_prob(reference, prompt, rejected)
        margins.append(float(by_policy.detach() - expected))
        losses.append(-torch.nn.functional.logsigmoid(BETA * (by_policy - expected)))
    return torch.stack(losses).mean(), margins


@pytest.mark.parametrize("n_micro_batches", [1, 3])
def test_loss_and_gradients_equal_trl(one, tmp_path, n_micro_batches):
    pairs = make_pairs(6, np.random.default_rng(0))
    models, theirs = [], []
    for seed in (1, 2):
        params = jax.tree.map(lambda x: 4 * x, transformer.init_params(SPEC, seed, one))
        models.append(params)
        huggingface.write_hf_model(SPEC, params, tmp_path / str(seed))
        load = transformers.AutoModelForCausalLM.from_pretrained
        theirs.append(load(tmp_path / str(seed), dtype="float32").eval())
    expected, margins = compute_trl_loss(*theirs, pairs)
    expected.backward()
    settings = TrainConfig(batch_size=3, grad_accum_steps=n_micro_batches, dpo_beta=BETA)
    gradients = step.make_gradient_function(SPEC, settings, 64, one)
    grads, loss_sum, side = jax.jit(gradients)(
        models[0], lay_out(pairs), step.LossInputs(models[1])
    )
    assert float(loss_sum) / 6 == pytest.approx(float(expected), rel=1e-4)
    assert float(side.scalars["dpo_margin"]) / 6 == pytest.approx(BETA * np.mean(margins), rel=1e-3)
    assert float(side.scalars["dpo_accuracy"]) == sum(margin > 0 for margin in margins)
    layer = theirs[0].model.layers[1]
    for name, weight in (("down", layer.mlp.down_proj), ("up", layer.mlp.up_proj)):
        ours = np.asarray(grads["blocks"][name][1]).T / 6
        found = weight.weight.grad.numpy()
        np.testing.assert_allclose(ours, found, atol=1e-4 * abs(found).max() + 1e-7)


def test_equal_models_have_a_loss_of_ln_2_and_half_of_a_pair_counts_for_nothing(one):
    pairs = make_pairs(4, np.random.default_rng(3))
    batch = lay_out(pairs)
    nats = jnp.abs(jax.random.normal(jax.random.key(0), batch.tokens.shape)) * batch.loss_mask
    losses = dpo.measure_pairs(nats, nats, batch, BETA)
    assert float(losses.loss_sum) == pytest.approx(4 * np.log(2), rel=1e-6)
    weights = np.asarray(losses.token_weights)
    assert np.unique(weights.round(6)).tolist() == pytest.approx([-BETA / 2, 0, BETA / 2])
    # without targets of its rejected answer a pair has no loss
    is_torn = (batch.segment_ids == 2) & (np.arange(2) == 0)[:, None]
    torn = batch._replace(loss_mask=batch.loss_mask * ~is_torn)
    losses = dpo.measure_pairs(nats, nats, torn, BETA)
    assert float(losses.loss_sum) == pytest.approx(3 * np.log(2), rel=1e-6)
    assert not np.asarray(losses.token_weights)[0][batch.segment_ids[0] <= 2].any()


# ---- data


RECORDS = [
    {"q": f"What is {i} + {i}?", "good": f" It is {2 * i}, of course.", "bad": " x" * (1 + i % 9)}
    for i in range(60)
]


@pytest.fixture(scope="module")
def paired(texts, tmp_path_factory):
    """A directory with packed pairs, and the tokenizer of the shared texts."""
    home = tmp_path_factory.mktemp("pairs")
    write_lines(home / "pairs.jsonl", RECORDS)
    shutil.copytree(texts / "base/tokenizer", home / "tokenizer")
    prepare_lines(home, "likes", "q+good+bad")
    pack.pack_corpus(PackConfig(seq_len=64), home)
    return home


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def prepare_lines(home, name, fields, **knobs):
    section = dataclasses.replace(
        PrepareConfig(), sources=(f"{name}=jsonl:{home}/pairs.jsonl#{fields}",), **knobs
    )
    section = dataclasses.replace(section, heldout_frac=0.0)  # too few to be judged by
    corpus.prepare_corpus(section, home)


def test_packed_pairs_stay_together_with_their_prompts_masked(paired):
    dataset = loader.open_packed([paired / "packed"])
    encoder = tokenizer.load_tokenizer(paired / "tokenizer")
    good = {record["q"]: record for record in RECORDS}
    n_pairs = 0
    for i in range(dataset.n_sequences["likes"]):
        sequence = dataset.read_sequence("likes", i)
        ends = np.cumsum(sequence.doc_lens)
        documents = np.split(sequence.tokens[: ends[-1]], ends[:-1])
        assert len(documents) % 2 == 0
        batch = loader.make_batch([sequence], True)
        for k in range(0, len(documents), 2):
            chosen, rejected = (encoder.decode(ids.tolist()) for ids in documents[k : k + 2])
            record = good[chosen.partition("?")[0] + "?"]
            assert chosen == record["q"] + record["good"]
            assert rejected == record["q"] + record["bad"]
            for segment, answer in ((k + 1, record["good"]), (k + 2, record["bad"])):
                is_target = (batch.segment_ids[0] == segment) & (batch.loss_mask[0] > 0)
                trained = encoder.decode(batch.targets[0][is_target].tolist())
                assert trained.strip() == answer.strip()
            n_pairs += 1
    counts = dataset.counts["likes"]
    assert n_pairs == counts.n_pairs == counts.n_documents > 30
    assert counts.n_text_bytes == sum(len(each["q"] + each["good"]) for each in RECORDS)
    assert counts.n_rejected_bytes == sum(len(each["q"] + each["bad"]) for each in RECORDS)


def test_bits_per_byte_are_of_both_answers_with_their_prompts(paired, monkeypatch):
    """At one bit per token they are the tokens per byte."""
    dataset = loader.open_packed([paired / "packed"])
    counts = dataset.counts["likes"]
    heldout = types.SimpleNamespace(dataset=dataset, compute_dtype="float32")
    batch = loader.make_batch([dataset.read_sequence("likes", 0)], True)
    heldout.read_small_batch = lambda name: batch
    monkeypatch.setattr(gate.diagnosis, "measure_nats_per_token", lambda *_: np.log(2))
    found = gate.estimate_bits_per_byte(heldout, "likes", SPEC, {})
    encoder = tokenizer.load_tokenizer(paired / "tokenizer")
    texts = [each["q"] + each[answer] for each in RECORDS for answer in ("good", "bad")]
    assert len(texts) == 2 * counts.n_documents
    n_tokens = sum(map(len, encoder.encode_batch(texts)))
    assert found == pytest.approx(n_tokens / sum(map(len, texts)), rel=0.02)  # beside a prompt


def test_pairs_that_no_sequence_holds_are_left_out_and_counted(paired, tmp_path, caplog):
    for name in ("tokenizer", "corpus"):
        shutil.copytree(paired / name, tmp_path / name)
    dataset = loader.open_packed([paired / "packed"])
    lengths = []
    for i in range(dataset.n_sequences["likes"]):
        doc_lens = dataset.read_sequence("likes", i).doc_lens
        lengths += doc_lens.reshape(-1, 2).sum(axis=1).tolist()
    seq_len = int(np.median(lengths))
    pack.pack_corpus(PackConfig(seq_len=seq_len), tmp_path)
    counts = loader.open_packed([tmp_path / "packed"]).counts["likes"]
    assert counts.n_long_pairs == sum(length > seq_len for length in lengths) > 0
    assert counts.n_pairs == len(lengths) - counts.n_long_pairs > 0
    assert f"{counts.n_long_pairs} pairs are left out" in caplog.text


def test_a_record_of_three_fields_is_a_pair(tmp_path):
    path = tmp_path / "pairs.jsonl"
    write_lines(path, [RECORDS[3], {"q": "Why?", "good": "No.", "bad": "No."}])
    source = sources.parse_source(f"likes=jsonl:{path}#q+good+bad")
    found = source.iterate_documents()
    document = next(found)
    assert document.text == RECORDS[3]["q"] + RECORDS[3]["good"]
    assert document.prompt_chars == len(RECORDS[3]["q"])
    assert PAIR.decode(document.meta) == RECORDS[3]["bad"]
    with pytest.raises(UserError, match=r"pairs.jsonl:2: expected two different answers"):
        next(found)


def test_a_rule_that_would_edit_one_answer_drops_the_pair():
    meta = PAIR.encode("Ask bob@mail.com.")
    texts = {"clean": "Who? Nobody.", "mail": "Who? Ask ann@mail.com."}
    documents = [filters.Document(id, text, 5, meta) for id, text in texts.items()]
    results = filters.apply_rules(documents, filters.parse_rules("none", ["pii_email"]))
    assert results.reasons == ["", "it would edit a conversation or a pair"]


def test_rejected_answers_to_one_chosen_answer_are_different_pairs(tmp_path):
    first = RECORDS[3]
    other = {**first, "bad": first["bad"] + " Or so."}
    write_lines(tmp_path / "pairs.jsonl", [first, other, first])
    prepare_lines(tmp_path, "likes", "q+good+bad", preset="none", rules=("exact_dedup",))
    [shard] = (tmp_path / "corpus/train").glob("likes*.parquet")
    rejected = [PAIR.decode(meta) for meta in pq.read_table(shard)["meta"].to_pylist()]
    assert sorted(rejected) == sorted([first["bad"], other["bad"]])


# ---- a run


@pytest.fixture
def tuned(make_config, start, paired, tmp_path):  # noqa: F811
    """A function that returns the recipe that tunes a base, with some knobs changed."""
    train(start(make_config(train__steps=3), tmp_path / "base"))

    def make(**changes):
        knobs = {"mixture__packed_paths": (str(paired / "packed"),), "optim__peak_lr": 3e-3}
        knobs |= {"initialize__source": str(tmp_path / "base"), "train__dpo_beta": 0.5}
        return make_config(**(knobs | changes))

    return make


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 4])
def test_a_run_learns_preferences_against_its_own_beginning_however_it_is_cut(
    tuned,
    start,  # noqa: F811
    tmp_path,
    rank,
):
    """The reference is a copy of the initial model, or the frozen base of adapters."""
    settings = tuned(lora__rank=rank, train__log_every=1)
    whole = train(start(settings, tmp_path / "whole"))
    records = [
        record
        for record in read_metrics(tmp_path / "whole/metrics.jsonl")
        if isinstance(record, TrainMetrics)
    ]
    first, last = records[0], records[-1]
    assert first.loss == pytest.approx(np.log(2), abs=1e-5)
    assert first.scalars["dpo_margin"] == pytest.approx(0, abs=1e-4)
    assert last.loss < 0.6 and last.scalars["dpo_margin"] > 0.1
    assert last.scalars["dpo_accuracy"] > 0.9
    parts = train_in_parts(start, settings, tmp_path / "parts", (5, 9))
    jax.tree.map(np.testing.assert_array_equal, whole.state, parts.state)
    if not rank:
        initial = load_model(tmp_path / "base", whole.run.mesh).params
        jax.tree.map(np.testing.assert_array_equal, parts.reference, initial)
        jax.tree.map(np.testing.assert_array_equal, whole.reference, initial)
        other = tuned(train__log_every=1, initialize__grow=("stack(g=2)",))
        with pytest.raises(UserError, match="expected the reference"):
            start(other, tmp_path / "parts")


@pytest.fixture
def run(tuned, paired, one, tmp_path):
    """A function that opens the run of a recipe without starting it."""

    def run(**changes):
        cost = lambda *_: DeviceCost(flops_per_token=7.0)
        return open_run(tuned(**changes), tmp_path / "run", [str(paired / "packed")], one, cost)

    return run


def test_the_reference_of_a_resumed_run_is_that_of_its_beginning(run, tmp_path):
    base = tmp_path / "base"
    model = load_model(base, run().mesh)
    record = CheckpointRecord(step=2, reference=begin.fingerprint_reference(run(), model.spec))
    check = lambda run: begin.check_same_reference(tmp_path / "2", record, run, model.spec)
    check(run())
    with pytest.raises(UserError, match=r"expected the reference \w+, which .*/2 was tuned from"):
        check(run(initialize__grow=("stack(g=2)",)))
    shutil.copytree(base, tmp_path / "kept")
    counts = CheckpointRecord(step=7).to_json()
    rest = {"step": np.int32(7)}
    checkpoint.save_checkpoint(
        base, 7, model.params, rest, model.spec, counts=counts, tokenizer=model.tokenizer
    )
    with pytest.raises(UserError, match=r"got \w+: .*/base as it is now. Name the checkpoint"):
        check(run())
    check(run(initialize__source=str(tmp_path / "kept/checkpoints/3")))
    assert (
        begin.fingerprint_reference(run(), model.spec.replace(lora=LoraSpec(4, 8.0, ("q",))))
        is None
    )


@pytest.mark.parametrize("rank", [0, 4])
def test_a_plan_and_the_flops_of_a_run_count_the_reference(run, one, monkeypatch, rank):
    monkeypatch.setattr(compile, "make_target_devices", lambda *_: list(one.devices.flat))
    opened = run(lora__rank=rank)
    settings = opened.config
    spec, _ = cost.resolve_model_spec(settings)
    base = spec.replace(lora=None)
    forward = count_forward_flops_per_token(base, 64)
    assert opened.estimate_cost(spec, 64).flops_per_token == 7.0 + forward
    request = compile.AnalysisRequest(spec, dataclasses.asdict(settings), "cpu:1", "none is here")
    found = compile.analyze_step_in_process(request)
    n_params = 0 if rank else transformer.count_params(base)  # the base of adapters is there
    assert found.frozen_bytes == 4 * n_params and found.frozen_flops_per_token == forward
    step_flops = count_flops_per_token(spec, 64) + forward
    assert found.executed_flops > 8 * 64 * step_flops
    plan = cost.project_target(spec, settings, parse_target("cpu:1"), found, 1e6)
    assert plan.flops_per_token == step_flops


BAD_RUNS = {
    "dpo_beta: expected 0": {"train__dpo_beta": -1.0},
    "0.5 does not go with initialize.source=random": {"initialize__source": "random"},
    "0.5 does not go with initialize.mode=resume": {"initialize__mode": "resume"},
    "0.5 does not go with train.grow": {"train__grow": ((3, "stack(g=2)"),)},
    "0.5 does not go with train.shape": {"train__shape_schedule": ((0, 16, 32),)},
    "0.5 does not go with mixture.document_mask": {"mixture__document_mask": False},
}


@pytest.mark.parametrize(("message", "changes"), BAD_RUNS.items())
def test_a_recipe_that_has_no_reference_or_separates_pairs_is_refused(
    make_config,  # noqa: F811
    message,
    changes,
):
    knobs = {"train__dpo_beta": 0.5, "initialize__source": "runs/base"}
    with pytest.raises(UserError, match=f"train.dpo_beta: .*{message}|train.{message}"):
        make_config(**(knobs | changes))


def test_pairs_and_dpo_come_together(tuned, start, texts, paired, tmp_path):  # noqa: F811
    text = str(texts / "base/packed")
    with pytest.raises(
        UserError, match=r"dpo_beta: expected .* pairs, got .* in code, prose.*#pro"
    ):
        start(tuned(mixture__packed_paths=(text,)), tmp_path / "new")
    with pytest.raises(UserError, match=r"likes holds preference pairs.*Set train.dpo_beta"):
        start(tuned(train__dpo_beta=0.0), tmp_path / "new")


def test_a_source_of_pairs_holds_nothing_else(paired, tmp_path):
    write_lines(tmp_path / "pairs.jsonl", RECORDS)
    shutil.copytree(paired / "tokenizer", tmp_path / "tokenizer")
    prepare_lines(tmp_path, "likes", "q+good+bad")
    with pytest.raises(UserError, match=r"pairs alone and pack.method=best_fit.* and course"):
        pack.pack_corpus(PackConfig(seq_len=64, method="course"), tmp_path)
