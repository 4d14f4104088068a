"""Laws of what is measured along a context: loss by position, needles in a haystack."""

import json

import jax
import numpy as np
import pytest
from test_evaluate import SPEC, encoder, hf_dir, params  # noqa: F401

from jaxpt.evaluate import harness, long_context
from jaxpt.model import transformer
from jaxpt.spec import UserError

WORDS = ["ship", "quay", "gulls", "dawn", "word", "alt", "return", "Jahre"]
LENGTH = 160


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Documents of 1,000, 600 and 20 words."""
    random = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("texts") / "long.jsonl"
    documents = [" ".join(random.choice(WORDS, n)) for n in (1000, 600, 20)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return path, documents


def test_buckets_double_and_cover_every_position_once():
    assert long_context.make_bucket_ends(160) == [64, 128, 160]
    assert long_context.make_bucket_ends(128) == [64, 128]
    assert long_context.make_bucket_ends(50) == [50]


def test_loss_by_position_is_that_of_the_logits_over_the_long_documents(
    params,  # noqa: F811
    hf_dir,  # noqa: F811
    encoder,  # noqa: F811
    texts,
):
    path, documents = texts
    found = harness.evaluate_model(
        hf_dir, [f"bits_per_byte/long=jsonl:{path}"], max_length=LENGTH, by_position=True
    )
    metrics = found["results"]["by_position/long"]
    assert found["n-samples"]["by_position/long"]["effective"] == 2, "one is too short"
    ids = np.stack([encoder.encode_batch([text])[0][:LENGTH] for text in documents[:2]])
    inputs = np.concatenate([np.full((2, 1), encoder.first_id), ids[:, :-1]], axis=1)
    positions = np.broadcast_to(np.arange(LENGTH), ids.shape)
    logits = transformer.compute_logits(SPEC, params, inputs, np.ones_like(ids), positions)
    log_probs = jax.nn.log_softmax(logits)
    nats = -np.take_along_axis(np.asarray(log_probs), ids[..., None], axis=-1)[..., 0]
    for start, stop in ((0, 64), (64, 128), (128, 160)):
        means = nats[:, start:stop].mean(axis=1)
        name = f"nats_{start}-{stop - 1}"
        assert metrics[f"{name},none"] == pytest.approx(means.mean(), rel=1e-4)
        stderr = means.std(ddof=1) / 2**0.5
        assert metrics[f"{name}_stderr,none"] == pytest.approx(stderr, rel=1e-2)


def test_a_needle_lies_where_its_depth_says_and_the_right_number_comes_first(
    encoder,  # noqa: F811
):
    text = list(range(3, 403))
    places = []
    for i in range(5):
        pairs = long_context.make_needle_item(encoder, text, i, LENGTH, "needle/x")
        (context, right), *others = pairs
        assert len(others) == 9 and all(context == other for other, _ in others)
        assert len({tuple(candidate) for _, candidate in pairs}) == 10
        assert len(context) + max(len(candidate) for _, candidate in pairs) == LENGTH
        whole = encoder.decode(context)
        number = encoder.decode(right).strip()
        name = whole.rpartition("secret number of ")[2].removesuffix(" is")
        assert f"The secret number of {name} is {number}." in whole
        assert whole.endswith(f"The secret number of {name} is")
        assert not any(encoder.decode(candidate).strip() in whole for _, candidate in others)
        needle = encoder.encode_batch([long_context.NEEDLE.format(name=name, number=number)])[0]
        starts = [k for k in range(len(context)) if context[k : k + len(needle)] == needle]
        assert len(starts) == 1
        places.append(starts[0])
    assert places[0] == 1 and places == sorted(places)


def test_needles_are_scored_by_likelihood_at_every_depth(hf_dir, texts):  # noqa: F811
    task = f"needle/long=jsonl:{texts[0]}"
    found = harness.evaluate_model(hf_dir, [task], limit=6, max_length=LENGTH)
    metrics = found["results"]["needle/long"]
    depths = [metrics[f"acc_depth_{depth},none"] for depth in ("0", "0.25", "0.5", "0.75", "1")]
    assert metrics["acc,none"] == pytest.approx((2 * depths[0] + sum(depths[1:])) / 6)
    assert found["n-samples"]["needle/long"]["effective"] == 6
    assert found["higher_is_better"]["needle/long"]["acc"] is True


def test_long_contexts_that_cannot_be_measured_are_refused(hf_dir, texts):  # noqa: F811
    path, _ = texts
    text, needle = f"bits_per_byte/long=jsonl:{path}", f"needle/long=jsonl:{path}"
    short = path.parent / "short.jsonl"
    short.write_text(json.dumps({"text": "gulls"}) + "\n")
    for tasks, options, expected in (
        ([needle], {"by_position": True}, "--by-position: expected a text"),
        ([needle], {"backend": "hf"}, "--backend hf: needle/long .* --backend jax"),
        ([needle], {"max_length": 30}, "needle/long: .* context much longer .* got .* 30"),
        ([f"bits_per_byte/short=jsonl:{short}"], {"by_position": True}, "no document of 300"),
        ([text, text], {}, "two tasks would be called bits_per_byte/long"),
    ):
        with pytest.raises(UserError, match=expected):
            harness.evaluate_model(hf_dir, tasks, **options)
