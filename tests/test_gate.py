"""The check before the first update: sound models pass, broken ones stop with the cause named."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_weights import stories260k

from jaxpt import io, sharding, stage
from jaxpt.config import Config, MeshConfig, MixtureConfig, OptimConfig, PackConfig, TrainConfig
from jaxpt.data import loader, pack
from jaxpt.evaluate import likelihood
from jaxpt.flops import count_flops_per_token
from jaxpt.growth.growth import Parent
from jaxpt.growth.parse import plan_growth
from jaxpt.growth.verify import verify_growth, write_growth
from jaxpt.model import decode, transformer
from jaxpt.model.param import is_param_spec
from jaxpt.spec import ModelSpec, RopeScaling, SpecialTokens, UserError
from jaxpt.train import begin, gate, state, step
from jaxpt.weights import huggingface
from jaxpt.weights.load import LoadedModel, load_model

SPEC = ModelSpec(
    n_layers=2,
    d_model=40,
    d_ff=56,
    n_heads=4,
    n_kv_heads=2,
    d_head=16,
    vocab_size=72,
    max_seq_len=200,
)
VOCAB_SIZE, SEQ_LEN, PERIOD = 61, 97, 24  # 11 rows of the embedding lie beyond the tokenizer
SETTINGS = Config(
    pack=PackConfig(seq_len=SEQ_LEN),
    train=TrainConfig(steps=180, batch_size=8, eval_sequences=40),
    optim=OptimConfig(peak_lr=2e-2, warmup_frac=1 / 18),
)
ONE = sharding.make_mesh(MeshConfig(), jax.devices()[:1])


def documents(seed: int, n: int) -> list[np.ndarray]:
    """Bos, tokens, eos. A token is the one 24 before it or the one that always follows its
    predecessor, so that positions matter
    and pieces do; sometimes it is any other."""
    random = np.random.default_rng(seed)
    follows = np.r_[0:3, 3 + np.random.default_rng(99).permutation(VOCAB_SIZE - 3)]
    ids = np.zeros((n, SEQ_LEN), int)
    for t in range(SEQ_LEN):
        shares = [0.2, 0.3, 0.5] if t > PERIOD else [0.5, 0.5, 0]
        kinds = random.choice(3, size=n, p=shares)
        ids[:, t] = np.choose(
            kinds,
            [
                3 + random.zipf(1.5, n) % (VOCAB_SIZE - 3),
                follows[ids[:, t - 1]],
                ids[:, t - PERIOD],
            ],
        )
    ids[:, 0] = 1
    lengths = random.integers(80, SEQ_LEN, n)
    return [
        np.append(each[:length], 2).astype(np.int32)
        for each, length in zip(ids, lengths, strict=True)
    ]


def pack_documents(
    directory,
    sources: dict[str, list[np.ndarray]],
    seq_len=SEQ_LEN,
    vocab_size=VOCAB_SIZE,
    tokenizer="its own",
):
    """A directory as pack.py leaves it, the same rows for training and held out; a token is three
    bytes of text.
    """
    layout = pack.PackLayout(seq_len, "best_fit", 0.0, vocab_size)
    counts = layout.to_json() | {"special_tokens": SpecialTokens(1, (2,), None).to_json()}
    for split in ("train", "heldout"):
        counts[split] = {}
        for name, ids in sources.items():
            rows = pack.pack_best_fit(
                [pack.Segment(each, f"{name}-{i}") for i, each in enumerate(ids)], seq_len
            )
            n_bytes = 3 * sum(len(each) - 2 for each in ids)
            out = directory / split / name
            shard = pack.write_sequences(rows, out / "data-00000.arrow", layout)
            text = pack.TokenizeResult(n_documents=len(ids), n_text_bytes=n_bytes)
            counts[split][name] = pack.gather_shards([text], [shard], out, layout).to_json()
    manifest = stage.make_manifest(
        stage.StageRequest("pack", {}, {}),
        sealed=io.seal(directory),
        counts=counts,
        tokenizer=tokenizer,
        seconds=0,
    )
    io.write_json(directory / "manifest.json", manifest)
    return directory


def heldout_of(packed, *more, mesh=ONE, settings=SETTINGS) -> gate.HeldoutData:
    return gate.HeldoutData([packed, *more], settings.train, settings.mixture.document_mask, mesh)


def test_a_view_of_shorter_parts_leaves_the_whole_as_it_is(tmp_path):
    whole = heldout_of(pack_documents(tmp_path, {"songs": documents(1, 9)}, seq_len=100))
    parts = whole.cut_for(SPEC.replace(max_seq_len=30), SPEC)
    assert (parts.seq_len, whole.seq_len) == (25, 100)
    assert next(parts.iterate_source("songs")).tokens.shape[1] == 25
    record = {"heldout": whole.to_record({"songs": 2.0})}
    assert whole.find_recorded_losses(record) == {"songs": 2.0}
    assert parts.find_recorded_losses(record) == {}  # of longer sequences


def test_a_view_of_fewer_sequences_holds_a_whole_batch(tmp_path):
    whole = heldout_of(pack_documents(tmp_path, {"songs": documents(1, 9)}, seq_len=100))
    assert [whole.limit_to(n).n_sequences for n in (1, 21, 10**6)] == [
        whole.batch_size,
        21,
        whole.n_sequences,
    ]


def test_a_growth_is_judged_at_the_length_that_both_models_read(tmp_path):
    """And a run of longer sequences does not take the losses of its growth for its parent's."""
    whole = heldout_of(pack_documents(tmp_path / "packed", {"songs": documents(1, 9)}, seq_len=100))
    lengths = []

    def measure(heldout, spec, params):
        lengths.append((spec.max_seq_len, heldout.seq_len))
        return {"songs": 2.0}

    short = SPEC.replace(max_seq_len=50)
    models = [LoadedModel(spec, {}, None, None, None, None, {}) for spec in (short, SPEC)]
    grown = plan_growth("extend_context(length=200, theta=40_000.0)", Parent(short))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(gate.HeldoutData, "measure_losses", measure)
        report = verify_growth(
            *models, ["extend"], [grown], ONE, seq_len=100, heldout=whole, batches=None
        )
    assert lengths == [(50, 50), (200, 50)] and report.heldout_seq_len == 50
    assert report.flops_per_token["child"] == count_flops_per_token(SPEC, 100)
    write_growth(report, tmp_path)
    assert begin.read_parent_losses(tmp_path, whole) is None
    assert begin.read_parent_losses(tmp_path, whole.cut_to(50)) == {"songs": 2.0}


def untrained():
    """Untrained weights."""
    random = np.random.default_rng(0)
    drawn = jax.tree.map(
        lambda row: np.float32(random.normal(row.init.mean, row.init.std, row.shape)),
        transformer.param_specs(SPEC),
        is_leaf=is_param_spec,
    )
    return jax.device_put(drawn, transformer.make_param_shardings(SPEC, ONE))


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    return pack_documents(tmp_path_factory.mktemp("rows"), {"songs": documents(1, 40)})


@pytest.fixture(scope="module")
def heldout(packed):
    return heldout_of(packed)


@pytest.fixture(scope="module")
def params(heldout, tmp_path_factory):
    """Trained for real; its final norm far from 1, as of a model trained for long."""
    rows = loader.open_packed(
        [pack_documents(tmp_path_factory.mktemp("training"), {"songs": documents(0, 8 * 180)})]
    )
    now = state.init_state(untrained(), SPEC, SETTINGS.optim, ONE)
    run = step.build_step(SPEC, SETTINGS.train, SETTINGS.optim, SETTINGS.pack.seq_len, ONE)
    for i in range(180):
        batch = loader.make_batch([rows.read_sequence("songs", 8 * i + k) for k in range(8)], True)
        now, _ = run(now, jax.device_put(batch, sharding.make_batch_sharding(ONE)))
    scales = np.exp(np.random.default_rng(0).normal(0.7, 0.4, 40)).astype(
        np.float32
    )  # into the norm, out of the head: the same function
    return {
        **now.params,
        "norm": now.params["norm"] * scales,
        "unembed": now.params["unembed"] / scales[:, None],
    }


@pytest.fixture(scope="module")
def record(heldout, params):
    """What was recorded with the model."""
    return {
        "step": 180,
        "heldout": heldout.to_record(heldout.measure_losses(SPEC, params)),
        "tokenizer": "its own",
    }


def foreign(directory, params, spec=SPEC):
    """(spec, params, record) of the model as somebody else's Hugging Face directory: nothing is
    known of it but its config.json.
    """
    huggingface.write_hf_model(spec, params, directory)
    loaded = load_model(directory, ONE)
    return loaded.spec, loaded.params, loaded.record


def shifted(params, by):
    return {
        **params,
        "embed": jnp.roll(params["embed"], by, 0),
        "unembed": jnp.roll(params["unembed"], by, 1),
    }


# ---- the first update


def test_a_sound_model_passes_whatever_is_known_of_it(heldout, params, record, tmp_path, caplog):
    losses = gate.check_initial_loss(heldout, SPEC, params, record, grown=False)
    assert losses["songs"] < heldout.dataset.unigram_nats["songs"] - 1
    assert gate.check_initial_loss(heldout, *foreign(tmp_path, params), grown=False) == losses
    assert not caplog.text


BROKEN = {
    "rope theta": (
        lambda spec, params: (spec.replace(rope_theta=5e5), params),
        r"rope theta is 10,000, not 500,000; set it in config.json",
    ),
    "rope scaling": (
        lambda spec, params: (spec.replace(rope_scaling=RopeScaling("linear", 4.0)), params),
        "without the rope scaling",
    ),
    "norm eps": (
        lambda spec, params: (spec.replace(norm_eps=30.0), params),
        "norm eps is 1e-0[56], not 30",
    ),
    "a shifted vocabulary": (
        lambda spec, params: (spec, shifted(params, 1)),
        r"id i of the data is embedding row i\+1 of the model",
    ),
    "a vocabulary shifted far": (
        lambda spec, params: (spec, shifted(params, -3)),
        r"id i of the data is embedding row i-3 of the model",
    ),
    "an uncopied final norm": (
        lambda spec, params: (spec, {**params, "norm": jnp.ones(40)}),
        "the final norm was not copied",
    ),
    "uncopied norms of blocks": (
        lambda spec, params: (
            spec,
            {
                **params,
                "blocks": {**params["blocks"], "mlp_norm": 1 + 0 * params["blocks"]["mlp_norm"]},
            },
        ),
        "mlp_norm of all layers was not copied",
    ),
    "weights that are not finite": (
        lambda spec, params: (spec, {**params, "norm": params["norm"].at[3].set(jnp.nan)}),
        "are not finite",
    ),
    "layers in another order": (
        lambda spec, params: (
            spec,
            {**params, "blocks": jax.tree.map(lambda stacked: stacked[::-1], params["blocks"])},
        ),
        "not of the same model",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_is_stopped_and_its_cause_named(name, heldout, params, record):
    breaks, cause = BROKEN[name]
    with pytest.raises(
        UserError,
        match=(
            r"held-out loss on songs is \S+ nats per token, but \d\.\d\d was "
            r"recorded for the same sequences.*"
        )
        + cause,
    ):
        gate.check_initial_loss(heldout, *breaks(SPEC, params), record, grown=False)


@pytest.mark.parametrize(
    ("breaks", "answer"),
    [
        (
            "rope theta",
            (
                r"is \S+ nats per token, and the same weights can do better. Most "
                r"likely the model's rope theta is 10,000, not 500,000"
            ),
        ),  # it still knows more than counts
        (
            "a shifted vocabulary",
            r"a unigram model has 3.\d\d, guessing 4.28. Most likely the vocabulary is shifted",
        ),
        (
            "an uncopied final norm",
            (
                r"is \S+ nats per token, and the same weights can do better. Most "
                r"likely the final norm was not copied"
            ),
        ),
    ],
)
def test_what_is_broken_in_a_foreign_model_is_stopped_too(
    breaks, answer, heldout, params, tmp_path
):
    spec, changed = BROKEN[breaks][0](SPEC, params)
    with pytest.raises(UserError, match=answer):
        gate.check_initial_loss(
            heldout,
            *foreign(
                tmp_path, jax.device_put(changed, transformer.make_param_shardings(spec, ONE)), spec
            ),
            grown=False,
        )


def test_data_of_another_tokenizer_is_stopped(params, tmp_path):
    ids = np.concatenate([np.arange(3), 3 + np.random.default_rng(0).permutation(VOCAB_SIZE - 3)])
    reworded = heldout_of(
        pack_documents(
            tmp_path / "ids", {"songs": [ids[each].astype(np.int32) for each in documents(1, 40)]}
        )
    )
    with pytest.raises(
        UserError, match="the data was packed with another tokenizer; pack with the model's"
    ):
        gate.check_initial_loss(reworded, SPEC, params, {}, grown=False)
    with pytest.raises(
        UserError, match="packed with tokenizer its own, but the model was trained with mine"
    ):
        gate.check_initial_loss(reworded, SPEC, params, {"tokenizer": "mine"}, grown=False)
    beyond = heldout_of(
        pack_documents(
            tmp_path / "beyond",
            {"songs": [np.where(each > 50, each + 11, each) for each in documents(1, 40)]},
            vocab_size=72,
        )
    )
    with pytest.raises(
        UserError, match=r"token ids that the model never learned \(\d+% of its tokens"
    ):
        gate.check_initial_loss(beyond, SPEC, params, {}, grown=False)


@pytest.mark.parametrize(
    ("sizes", "dtype"),
    [({"fsdp": 1}, "bfloat16"), ({"fsdp": 4, "tensor": 2}, "float32")],
    ids=["bfloat16", "8 devices"],
)
def test_meshes_and_number_types_stay_within_the_tolerance(sizes, dtype, packed, params, record):
    mesh = sharding.make_mesh(MeshConfig(**sizes), jax.devices()[: np.prod(list(sizes.values()))])
    settings = dataclasses.replace(
        SETTINGS, train=dataclasses.replace(SETTINGS.train, compute_dtype=dtype)
    )
    here = heldout_of(packed, mesh=mesh, settings=settings)
    rounded = jax.tree.map(
        lambda leaf, place: jax.device_put(leaf.astype(dtype), place),
        params,
        transformer.make_param_shardings(SPEC, mesh),
    )
    losses = gate.check_initial_loss(here, SPEC, rounded, record, grown=False)
    assert abs(losses["songs"] - record["heldout"]["losses"]["songs"]) < gate.LOSS_TOLERANCE / 4


def test_a_record_is_compared_on_the_same_sequences_only(packed, heldout, params, record, tmp_path):
    def with_loss(loss):
        return {**record, "heldout": {**record["heldout"], "losses": {"songs": loss}}}

    more = pack_documents(tmp_path, {"more songs": documents(2, 30)})
    beside = heldout_of(
        packed, more
    )  # the parent's domain and a new one: its part of the rows is the same
    for where in (heldout, beside):
        with pytest.raises(UserError, match=r"but 2\.00 was recorded for the same sequences"):
            gate.check_initial_loss(where, SPEC, params, with_loss(2.0), grown=False)
    for other in (
        heldout_of(more),
        heldout_of(
            packed,
            settings=dataclasses.replace(
                SETTINGS, train=dataclasses.replace(SETTINGS.train, eval_sequences=30)
            ),
        ),
        heldout_of(
            packed,
            settings=dataclasses.replace(SETTINGS, mixture=MixtureConfig(document_mask=False)),
        ),
    ):
        assert not other.find_recorded_losses(with_loss(2.0))


def test_a_grown_model_and_an_untrained_one_only_warn(heldout, params, record, caplog):
    gate.check_initial_loss(heldout, SPEC, shifted(params, 1), record, grown=True)
    assert "Growth broke the model's function" in caplog.text
    caplog.clear()
    bad = dict.fromkeys(heldout.unigram_nats, 9.0)
    gate.check_initial_loss(heldout, SPEC, shifted(params, 1), record, True, bad)
    assert "Its parent was no better before it grew" in caplog.text
    gate.check_initial_loss(heldout, SPEC, untrained(), {"step": 0}, grown=False)
    assert "never trained" in caplog.text
    with pytest.raises(UserError, match="never trained, or no norm was copied"):
        gate.check_initial_loss(heldout, SPEC, untrained(), {}, grown=False)


def test_a_model_that_somebody_trained_passes_and_its_wrong_readings_do_not(data_dir, tmp_path):
    folder = data_dir / "ckpt_stories260K"
    stories260k(folder, tmp_path / "hf")
    loaded = load_model(tmp_path / "hf", ONE)
    texts = decode.generate(
        loaded.spec,
        loaded.params,
        [[1]] * 24,
        max_new=192,
        sampling=decode.Sampling(temperature=1.0),
    )
    rows = pack_documents(
        tmp_path / "rows",
        {"stories": [np.array([1, *ids], np.int32) for ids in texts]},
        seq_len=256,
        vocab_size=512,
    )
    heldout = heldout_of(rows)
    gate.check_initial_loss(heldout, loaded.spec, loaded.params, {}, grown=False)
    with pytest.raises(UserError, match="rope theta is 10,000, not 500,000"):
        gate.check_initial_loss(
            heldout, loaded.spec.replace(rope_theta=5e5), loaded.params, {}, grown=False
        )
    with pytest.raises(UserError, match="the final norm was not copied"):
        gate.check_initial_loss(
            heldout, loaded.spec, {**loaded.params, "norm": jnp.ones(64)}, {}, grown=False
        )


# ---- an import


def test_an_import_says_bits_per_byte_as_they_are_and_rows_of_no_use(params, tmp_path, caplog):
    ids = documents(3, 12)
    few = heldout_of(pack_documents(tmp_path, {"songs": ids}))
    texts = ["abc" * (len(each) - 2) for each in ids]
    expected = likelihood.measure_bits_per_byte(
        SPEC, params, texts, [each[1:-1].tolist() for each in ids], 1
    ).bits_per_byte
    damaged = {
        **params,
        "embed": params["embed"].at[7].set(0).at[jnp.array([9, 30])].multiply(0.01),
    }
    gate.log_import_check(SPEC, params, few, VOCAB_SIZE)
    message = caplog.text
    assert float(re.search(r"songs: ([\d.]+)", message)[1]) == pytest.approx(expected, abs=6e-4)
    assert re.search(r"11 rows beyond the tokenizer's 61 tokens look untrained", message)
    caplog.clear()
    gate.log_import_check(SPEC, params, few, VOCAB_SIZE, keeps_text=False)
    counts = few.dataset.counts["songs"]
    few.dataset.counts["songs"] = dataclasses.replace(counts, n_unknown_tokens=3)
    gate.log_import_check(SPEC, params, few, VOCAB_SIZE)
    message = caplog.text
    assert "the tokenizer changes case or white space" in message
    assert "songs: 3 of" in message and "on a few sequences" not in message
    gate.log_import_check(SPEC, damaged, None, VOCAB_SIZE)
    message = caplog.text
    assert (
        "no held-out data" in message
        and "1 (rows 7) are zero" in message
        and re.search(r"2 \(rows 9, 30\) below 0.1 of the median", message)
    )
    gate.log_import_check(
        SPEC,
        params,
        heldout_of(
            pack_documents(
                tmp_path / "more",
                {"songs": [*ids, np.array([1, 79, 2], np.int32)]},
                vocab_size=83,
            )
        ),
        None,
    )
    message = caplog.text
    assert (
        "token ids up to 79, the model 72 embedding rows" in message and "no tokenizer" in message
    )


def test_transformers_agrees_with_a_sound_reading_and_not_with_another(
    heldout, params, tmp_path, caplog
):
    huggingface.write_hf_model(SPEC, params, tmp_path)
    gate.check_import_against_transformers(tmp_path, SPEC, params, heldout, ONE)
    assert "KL to transformers" in caplog.text
    with pytest.raises(
        UserError,
        match=(
            r"expected a KL of at most 1e-06, got .* The model was read with rope "
            r"theta 500,000, no rope scaling"
        ),
    ):
        gate.check_import_against_transformers(
            tmp_path, SPEC.replace(rope_theta=5e5), params, heldout, ONE
        )
    gate.check_import_against_transformers(
        tmp_path, SPEC, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params), None, ONE
    )
    with pytest.raises(
        UserError,
        match=(
            r"takes [\d,.]+ GB of host memory in transformers and float32, but "
            r"[\d,.]+ GB are free"
        ),
    ):
        gate.check_import_against_transformers(
            tmp_path, SPEC.replace(n_layers=10**9), params, None, ONE
        )
