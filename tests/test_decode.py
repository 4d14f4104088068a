"""Decoding equals transformers' generate, alone or in a batch, greedy or sampled."""

import jax
import numpy as np
import pytest
from conftest import SMALL_SPEC

from jaxpt import config, sharding
from jaxpt.model import decode, transformer
from jaxpt.model.param import is_param_spec
from jaxpt.spec import UserError
from jaxpt.weights import huggingface

ONE = sharding.make_mesh(config.MeshConfig(), jax.devices()[:1])
SPEC = SMALL_SPEC.replace(n_layers=5, max_seq_len=160)
LENGTHS = (5, 17, 70, 1)  # of prompts, one longer than decode.LENGTH_STEP


def make_params(spec):
    """Return random ones; a large embedding lets the next token depend on the tokens before."""
    random = np.random.default_rng(0)
    params = jax.tree.map(
        lambda row: np.float32(random.normal(row.init.mean, row.init.std or 0.1, row.shape)),
        transformer.param_specs(spec),
        is_leaf=is_param_spec,
    )
    return jax.device_put(
        params | {"embed": params["embed"] * 50}, transformer.make_param_shardings(spec, ONE)
    )


def prompts():
    random = np.random.default_rng(0)
    return [random.integers(3, SPEC.vocab_size, n).tolist() for n in LENGTHS]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"family": "qwen3", "qk_norm": True, "tie_embeddings": True},
        {"family": "mistral", "sliding_window": 7},
        {
            "family": "gemma2",
            "norm_placement": "both",
            "norm_adds_one": True,
            "tie_embeddings": True,
            "sliding_window": 7,
            "global_layers": (1, 3),
            "query_scale": 12**-0.5,
            "attention_softcap": 2.0,
            "logit_softcap": 3.0,
            "embed_multiplier": 24**0.5,
        },
        pytest.param(
            {
                "family": "glm4",
                "norm_placement": "both",
                "rotary_frac": 0.5,
                "rope_interleaved": True,
            },
            marks=pytest.mark.slow,
        ),
    ],
    ids=["llama", "qwen3, tied", "mistral, sliding window 7", "gemma2", "glm4"],
)
def test_greedy_text_equals_transformers_token_for_token(changes, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    spec = SPEC.replace(**changes)
    params = make_params(spec)
    huggingface.write_hf_model(spec, params, tmp_path)
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="float32")
    for penalty in (1.0, 1.1):
        ours = decode.generate(
            spec,
            params,
            prompts(),
            max_new=30,
            sampling=decode.Sampling(repetition_penalty=penalty),
        )
        for prompt, text in zip(prompts(), ours, strict=True):
            ids = torch.tensor([prompt])
            theirs = reference.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=30,
                do_sample=False,
                repetition_penalty=penalty,
                pad_token_id=0,
            )
            assert text == [
                token for token in theirs[0, len(prompt) :].tolist() if token not in spec.eos_ids
            ]


def test_logits_are_shaped_as_by_transformers_processors():
    torch = pytest.importorskip("torch")
    processors = pytest.importorskip("transformers.generation.logits_process")
    random = np.random.default_rng(0)
    logits = random.normal(size=(3, 96)).astype(np.float32) * 3
    tokens = random.integers(0, 96, (3, 20))
    seen = np.zeros((3, 96), bool)
    np.put_along_axis(seen, tokens, True, axis=1)
    as_torch = torch.from_numpy(logits), torch.from_numpy(tokens)
    pairs = [
        (
            decode.penalize_repetition(logits, seen, 1.3),
            processors.RepetitionPenaltyLogitsProcessor(1.3),
        ),
        (decode.mask_top_k(jax.numpy.asarray(logits), 7), processors.TopKLogitsWarper(7)),
        (decode.mask_top_p(jax.numpy.asarray(logits), 0.8), processors.TopPLogitsWarper(0.8)),
        (
            decode.mask_top_p(jax.numpy.asarray(logits), 1e-4),
            processors.TopPLogitsWarper(1e-4),
        ),  # the likeliest stays
    ]
    for ours, theirs in pairs:
        np.testing.assert_allclose(ours, theirs(as_torch[1], as_torch[0]).numpy(), rtol=1e-6)


def test_a_prompt_is_continued_in_a_batch_as_alone():
    params = make_params(SPEC)
    settings = {
        "max_new": 12,
        "sampling": decode.Sampling(temperature=0.9, top_k=40, top_p=0.95, repetition_penalty=1.1),
        "seed": 3,
    }
    together = decode.generate(SPEC, params, prompts(), **settings)
    for i, prompt in enumerate(prompts()):
        assert decode.generate(SPEC, params, [prompt], **settings) == [together[i]]


@pytest.mark.slow
def test_equal_prompts_draw_as_many_texts_whatever_the_size_of_the_batch(monkeypatch):
    params = make_params(SPEC)
    equal = [prompts()[0]] * 64
    settings = {"max_new": 12, "sampling": decode.Sampling(temperature=1.0)}
    texts = decode.generate(SPEC, params, equal, **settings)
    assert len({tuple(text) for text in texts}) == 64
    for size in (5, 64):
        monkeypatch.setattr(decode, "MAX_DECODE_BATCH", size)
        assert decode.generate(SPEC, params, equal, **settings) == texts
    later = decode.generate(SPEC, params, equal[:3], repeats=[40, 0, 63], **settings)
    assert later == [texts[40], texts[0], texts[63]]


def test_seeds_and_repeats_draw_different_texts():
    params = make_params(SPEC)
    twice = [prompts()[1]] * 2
    sampling = decode.Sampling(temperature=1.0)
    texts = [
        decode.generate(SPEC, params, twice, max_new=12, sampling=sampling, seed=seed)
        for seed in (0, 0, 1)
    ]
    assert texts[0] == texts[1]
    assert len({tuple(text) for pair in (texts[0], texts[2]) for text in pair}) == 4


def test_text_does_not_depend_on_the_mesh_or_on_watching():
    params = make_params(SPEC)
    alone = decode.generate(SPEC, params, prompts(), max_new=12)
    mesh = sharding.make_mesh(config.MeshConfig(fsdp=2, tensor=2), jax.devices()[:4])
    moved = jax.device_put(params, transformer.make_param_shardings(SPEC, mesh))
    watched: dict[int, list] = {}
    assert (
        decode.generate(
            SPEC,
            moved,
            prompts(),
            max_new=12,
            watch=lambda row, ids: watched.update({row: ids}),
            watch_every=5,
        )
        == alone
    )
    assert [watched.get(row, []) for row in range(len(LENGTHS))] == alone


def test_generation_ends_at_max_new_at_the_context_at_eos_and_when_watch_stops_it():
    params = make_params(SPEC)
    narrow = SPEC.replace(eos_ids=(), max_seq_len=81)
    free = decode.generate(narrow, params, prompts(), max_new=40)
    assert [len(text) for text in free] == [40, 40, 81 - 70, 40]

    stopped = decode.generate(
        narrow, params, prompts(), max_new=40, watch=lambda row, ids: row == 2, watch_every=3
    )
    assert stopped == [text[:3] if row == 2 else text for row, text in enumerate(free)]

    eos_id = free[1][6]
    ended = decode.generate(narrow.replace(eos_ids=(eos_id,)), params, prompts(), max_new=40)
    assert ended == [text[: text.index(eos_id)] if eos_id in text else text for text in free]

    several = (free[1][6], free[0][9], free[3][2])
    ended = decode.generate(narrow.replace(eos_ids=several), params, prompts(), max_new=40)
    ends = [next((n for n, i in enumerate(text) if i in several), 40) for text in free]
    assert ended == [text[:end] for text, end in zip(free, ends, strict=True)]
    assert len(set(ends)) == 4 or sum(end < 40 for end in ends) >= 3, "each is seen to end one"


def test_an_invalid_request_is_refused_in_one_sentence():
    params = make_params(SPEC)
    for bad, message in (
        ([[]], "no tokens"),
        ([[5] * 160], "context is 160"),
        ([[5, 96]], "token id 96"),
        ([[-3]], "token id -3"),
    ):
        with pytest.raises(UserError, match=message):
            decode.generate(SPEC, params, bad, max_new=4)
    with pytest.raises(UserError, match="at least 1"):
        decode.generate(SPEC, params, [[5]], max_new=0)
    for bad in ({"temperature": -1.0}, {"top_p": 0.0}, {"top_k": -1}, {"repetition_penalty": 0.0}):
        with pytest.raises(UserError, match=next(iter(bad))):
            decode.Sampling(**bad)


def test_another_batch_of_like_size_compiles_nothing():
    params = make_params(SPEC)
    decode.generate(SPEC, params, prompts()[:2], max_new=9)
    sizes = decode.prefill_cache._cache_size(), decode.decode_step._cache_size()
    decode.generate(SPEC, params, [[7, 8, 9], [4] * 60], max_new=25, seed=5)
    assert (decode.prefill_cache._cache_size(), decode.decode_step._cache_size()) == sizes
