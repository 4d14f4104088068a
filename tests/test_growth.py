"""Laws of growth: layer maps as published, functions kept where that is promised, moments that are
the child's own, the same new parameters on every mesh.
"""

import dataclasses
import math
import os
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
from conftest import ROOT
from test_model import logits_of
from test_train import SPEC as THREE
from test_train import make_batch, make_state

from jaxpt import config, initialize, sharding
from jaxpt.config import TrainConfig
from jaxpt.growth import measure, operators, vocabulary
from jaxpt.growth.apply import compile_growth, grow_params
from jaxpt.growth.growth import Parent
from jaxpt.growth.moments import grow_moments
from jaxpt.growth.new_params import NewParams, find_new_params
from jaxpt.growth.parse import plan_growth
from jaxpt.growth.records import GrowthReport
from jaxpt.growth.verify import judge_growth, limit_by_time, run_probe, verify_growth
from jaxpt.model import loss, transformer
from jaxpt.model.param import is_param_spec
from jaxpt.spec import ModelSpec, UserError
from jaxpt.train import begin, optimizer, state, step
from jaxpt.train.schedule import make_lr_schedule
from jaxpt.weights.load import LoadedModel

COURSE = ModelSpec(
    n_layers=12,
    d_model=1024,
    d_ff=4096,
    n_heads=32,
    n_kv_heads=8,
    d_head=32,
    vocab_size=32_000,
    max_seq_len=2048,
    norm_eps=1e-6,
)


def of(n_layers: int) -> Parent:
    return Parent(COURSE.replace(n_layers=n_layers))


def grown(spec, params, text, mesh, rows=None):
    """(child's spec, its parameters, the growth)"""
    grew = plan_growth(text, Parent(spec, params, rows))
    return grew.child, grow_params(grew, params, mesh), grew


def randomised(spec, mesh):
    """Parameters of which none is at its initialization value, norms and biases included."""
    rng = np.random.default_rng(3)

    def one(row, place):
        return jax.device_put(
            (row.init.mean + (row.init.std + 0.1) * rng.standard_normal(row.shape)).astype(
                np.float32
            ),
            place,
        )

    return jax.tree.map(
        one,
        transformer.param_specs(spec),
        transformer.make_param_shardings(spec, mesh),
        is_leaf=is_param_spec,
    )


# ---- depth


@pytest.mark.parametrize(
    ("text", "n_params", "layer_map"),
    [
        ("depth_upscale(m=4)", 308_839_424, [*range(8), *range(4, 12)]),
        ("layers([0, 1, 2, 3, 4, 7, 8, 9, 10, 11])", 217_601_024, [*range(5), *range(7, 12)]),
    ],
)
def test_the_course_is_grown_exactly(text, n_params, layer_map):
    grew = plan_growth(text, of(12))
    assert (
        grew.layer_map == layer_map
        and transformer.count_params(grew.child) == n_params
        and transformer.count_params(COURSE) == 248_013_824
    )


def test_solar_is_grown_exactly():
    assert plan_growth("depth_upscale(m=8)", of(32)).layer_map == [*range(24), *range(8, 32)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("depth_upscale(m=2)", [0, 1, 2, 2, 3, 4]),
        ("stack(g=2)", [0, 1, 2, 3, 4] * 2),
        ("interleave(g=2)", [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]),
        ("stack_middle(m=2)", [0, 1, 2, 1, 2, 3, 4]),
        ("deepen(L=7, new='copy')", [0, 1, 2, 3, 4, 0, 1]),
        ("drop_layers(by=[1, 3])", [0, 2, 4]),
        ("layers([4, 0])", [4, 0]),
    ],
)
def test_a_grown_layer_is_its_source_and_all_else_is_the_parents(spec, text, expected):
    mesh = sharding.make_mesh(config.MeshConfig(fsdp=4, tensor=2))
    parent = randomised(spec, mesh)
    child_spec, child, done = grown(spec, parent, text, mesh)
    assert done.layer_map == expected and child_spec.n_layers == len(expected)
    for name, leaf in child["blocks"].items():
        np.testing.assert_array_equal(
            leaf, np.asarray(parent["blocks"][name])[expected], err_msg=name
        )
        assert leaf.sharding == transformer.make_param_shardings(child_spec, mesh)["blocks"][name]
    for name in ("embed", "norm", "unembed"):  # the final norm too, which the course's code forgot
        np.testing.assert_array_equal(child[name], parent[name], err_msg=name)


@pytest.mark.parametrize("n_layers", [0, 1])
def test_random_layers_are_drawn_as_at_init_and_no_two_alike(spec, one, n_layers):
    parent = randomised(spec.replace(n_layers=n_layers), one)
    child_spec, child, done = grown(spec.replace(n_layers=n_layers), parent, "deepen(L=40)", one)
    assert done.layer_map == [0, *[None] * 39] if n_layers else [None] * 40
    rows = transformer.param_specs(child_spec)["blocks"]
    for name, leaf in child["blocks"].items():
        np.testing.assert_array_equal(leaf[:n_layers], parent["blocks"][name])
        if rows[name].init.mean:
            assert (np.asarray(leaf[n_layers:]) == 1).all()
        else:
            assert np.std(np.asarray(leaf[n_layers:])) == pytest.approx(
                rows[name].init.std, rel=0.05
            )
            assert len({np.asarray(layer).tobytes() for layer in leaf}) == 40
    np.testing.assert_array_equal(child["embed"], parent["embed"])
    _, other, _ = grown(spec.replace(n_layers=1), parent, "deepen(L=40, seed=1)", one)
    assert (np.asarray(other["blocks"]["q"][1]) != np.asarray(child["blocks"]["q"][1])).all()


def test_predicted_layers_stand_in_the_last_gaps(spec, one):
    parent = randomised(spec, one)
    _, child, done = grown(spec, parent, "predict_layers(m=2)", one)
    assert done.layer_map == [0, 1, 2, None, 3, None, 4]
    for name, leaf in child["blocks"].items():
        np.testing.assert_array_equal(
            np.asarray(leaf)[[0, 1, 2, 4, 6]], parent["blocks"][name], err_msg=name
        )
        assert np.isfinite(leaf).all() and np.asarray(leaf)[[3, 5]].std() > 0


# ---- what measures


def rows_on(mesh):
    """Training rows for operators that measure, on a mesh."""
    return lambda: [
        jax.device_put(make_batch(seed=seed), sharding.make_batch_sharding(mesh)) for seed in (1, 2)
    ]


def test_narrow_leaves_out_what_does_nothing(spec, one):
    """MLP activations and kv groups that are silent, other ones in each layer: without them the
    model computes what it did.
    """
    parent = jax.tree.map(np.array, randomised(spec, one))
    blocks = parent["blocks"]
    for layer in range(5):
        blocks["gate"][layer, :, layer:40:5] = 0  # silu(0) = 0
        blocks["v"][layer, :, layer % 2] = 0
    child_spec, child, done = grown(
        spec,
        jax.device_put(parent, transformer.make_param_shardings(spec, one)),
        "narrow(ff=32, heads=3)",
        one,
        rows_on(one),
    )
    assert (child_spec.d_ff, child_spec.n_heads, child_spec.n_kv_heads) == (32, 3, 1)
    for layer in range(5):
        assert done.sources["mlp"][layer].tolist() == [i for i in range(40) if i % 5 != layer]
        assert done.sources["kv_heads"][layer].tolist() == [1 - layer % 2]
    before, after = (
        logits_of(spec, parent, *sides(spec)),
        logits_of(child_spec, child, *sides(spec)),
    )
    np.testing.assert_allclose(after, before, atol=1e-5 * np.abs(before).max())


def test_the_layers_that_change_least_are_dropped(spec, one):
    parent = jax.tree.map(np.array, randomised(spec, one))
    for layer in (1, 3):
        for name in ("o", "down"):
            parent["blocks"][name][layer] *= 1e-3
    _, _, done = grown(
        spec,
        jax.device_put(parent, transformer.make_param_shardings(spec, one)),
        "drop_layers(n=2)",
        one,
        rows_on(one),
    )
    assert (
        done.layer_map == [0, 2, 4]
        and done.measured["dropped"] == [1, 3]
        and len(done.measured["influence"]) == 5
    )


def test_layers_are_dropped_by_loss_one_after_the_other(spec, one):
    """Each time the one without which the loss is lowest, of those that are left."""
    params, read = randomised(spec, one), rows_on(one)

    def loss_of(layers):
        return measure.measure_loss_of_layers(spec, params, read(), layers)

    child_spec, child, done = grown(spec, params, "drop_layers(n=3, by='loss')", one, read)
    kept = list(range(5))
    for _ in range(3):
        losses = {layer: loss_of([other for other in kept if other != layer]) for layer in kept}
        kept.remove(min(losses, key=losses.get))
    assert done.layer_map == kept and len(done.measured["loss_without"]) == 5
    assert done.measured["dropped"] == [layer for layer in range(5) if layer not in kept]
    alone = measure.measure_loss_of_layers(child_spec, child, read(), [0, 1])
    assert alone == pytest.approx(loss_of(kept), rel=1e-5)


def test_width_is_measured_anew_in_each_round(spec, one, monkeypatch):
    measured = []
    measure_importance = measure.measure_importance

    def watch(spec, params, batches):
        measured.append((spec.d_ff, spec.n_kv_heads, spec.d_model, params["embed"].shape[1]))
        return measure_importance(spec, params, batches)

    monkeypatch.setattr(measure, "measure_importance", watch)
    parent = randomised(spec, one)
    text = "narrow(ff=24, heads=3, d=16{})"
    child_spec, child, once = grown(spec, parent, text.format(""), one, rows_on(one))
    _, again, in_rounds = grown(spec, parent, text.format(", rounds=4"), one, rows_on(one))
    assert measured == [(40, 2, 24, 24), (40, 2, 24, 24), (32, 2, 24, 24)]
    assert in_rounds.child == once.child == child_spec
    for axis, source in in_rounds.sources.items():
        assert source.shape == once.sources[axis].shape
        assert (np.diff(source, axis=-1) > 0).all(), "the parent's order"
    assert any(np.any(in_rounds.sources[axis] != once.sources[axis]) for axis in once.sources)
    assert jax.tree.map(np.shape, again) == jax.tree.map(np.shape, child)


def test_a_mesh_that_divides_both_widths_divides_those_between(spec):
    spec = spec.replace(d_model=4096, n_heads=12, n_kv_heads=6)
    child = spec.replace(d_model=3072, n_heads=8, n_kv_heads=4)
    parts = [operators.part_way(spec, child, done, 4) for done in (1, 2, 3, 4)]
    assert [part.d_model for part in parts] == [3840, 3584, 3328, 3072]
    assert [part.n_kv_heads for part in parts] == [6, 6, 6, 4]
    child = spec.replace(d_model=4096 - 6 * 5)
    assert operators.part_way(spec, child, 3, 4).d_model == 4096 - 22


@pytest.mark.parametrize("text", ["drop_layers(n=2)", "narrow(d=16, ff=24, heads=3, rounds=4)"])
def test_what_measures_chooses_the_same_on_every_mesh(spec, one, text):
    mesh = sharding.make_mesh(config.MeshConfig(fsdp=4, tensor=2))
    spec = spec.replace(n_kv_heads=6)  # so that the narrow one can still be cut
    text = text.replace("heads=3", "heads=4")
    trees = [
        grown(spec, randomised(spec, where), text, where, rows_on(where))[1]
        for where in (one, mesh)
    ]
    jax.tree.map(np.testing.assert_array_equal, *trees)


# ---- what promises to keep the function keeps it


def sides(spec, tokens=None):
    tokens = (
        np.random.default_rng(0).integers(0, spec.vocab_size, (4, 20)).astype(np.int32)
        if tokens is None
        else tokens
    )
    return (
        tokens,
        np.ones_like(tokens),
        np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape),
    )


FAMILIES = {
    "llama with every bias": {"out_bias": True, "mlp_bias": True, "qkv_bias": True},
    "tie_embeddings": {"tie_embeddings": True},
    "qwen3": {"family": "qwen3", "qk_norm": True},
}


# parts of other families, with operators that keep them
PARTS = {
    "olmo2": {
        "family": "olmo2",
        "norm_placement": "post",
        "qk_norm": True,
        "qk_norm_whole": True,
        "norm_eps": 1e-6,
    },
    "gemma3_text": {
        "family": "gemma3_text",
        "norm_placement": "both",
        "norm_adds_one": True,
        "qk_norm": True,
        "activation": "gelu_pytorch_tanh",
        "tie_embeddings": True,
        "sliding_window": 7,
        "global_layers": (1, 4),
        "window_rope_theta": 1e3,
        "logit_softcap": 3.0,
        "query_scale": 12**-0.5,
        "embed_multiplier": 24**0.5,
    },
    "granite": {
        "family": "granite",
        "tie_embeddings": True,
        "query_scale": 0.2,
        "embed_multiplier": 3.0,
        "residual_multiplier": 0.4,
        "logit_divisor": 1.7,
    },
    # no family has all of these; a tied head behind a norm by 1 + w, and softcaps
    "others": {
        "tie_embeddings": True,
        "norm_adds_one": True,
        "attention_softcap": 2.0,
        "rotary_frac": 0.5,
        "rope_interleaved": True,
        "no_rope_layers": (1, 4),
    },
}


def crossed(single):
    """Every family with every text; by default all widths at once for each family, and one width at
    a time only with --slow.
    """
    whole = [(family, "widen(d=48, ff=90, heads=12)") for family in FAMILIES]
    return whole + [
        pytest.param(family, text, marks=pytest.mark.slow) for family in FAMILIES for text in single
    ]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "text",
    [
        pytest.param("insert_identity(every=2)", marks=pytest.mark.slow),
        "insert_identity(every=2, noise=0.5)",
    ],
)
def test_an_identity_layer_changes_no_logit(spec, one, family, text):
    spec = spec.replace(**FAMILIES[family])
    parent = randomised(spec, one)
    child_spec, child, done = grown(spec, parent, text, one)
    assert (
        done.preserves_function and child_spec.n_layers == 7 and done.zero_output_layers == (2, 5)
    )
    np.testing.assert_array_equal(
        logits_of(spec, parent, *sides(spec)), logits_of(child_spec, child, *sides(spec))
    )


@pytest.mark.parametrize(
    ("family", "text"),
    crossed(["widen(d=72)", "widen(ff=52)", "widen(heads=15)", "widen_rms(d=48, heads=9)"]),
)
@pytest.mark.parametrize("noise", [pytest.param("", marks=pytest.mark.slow), ", noise=0.3)"])
def test_a_wider_model_computes_the_same_function_with_and_without_noise(
    spec, one, family, text, noise
):
    spec = spec.replace(**FAMILIES[family])
    text = text[:-1] + noise if noise else text
    parent = randomised(spec, one)
    child_spec, child, done = grown(spec, parent, text, one)
    assert done.preserves_function and transformer.count_params(
        child_spec
    ) > transformer.count_params(spec)
    before, after = (
        logits_of(spec, parent, *sides(spec)),
        logits_of(child_spec, child, *sides(spec)),
    )
    np.testing.assert_allclose(after, before, atol=1e-5 * np.abs(before).max())


@pytest.mark.parametrize(
    ("parts", "text"),
    [(parts, "insert_identity(every=2)") for parts in ("olmo2", "gemma3_text", "others")]
    + [("olmo2", "widen(d=48, heads=12)"), ("gemma3_text", "widen(ff=90, heads=15)")]
    + [("granite", "widen(d=48, ff=90)"), ("others", "widen(d=48, ff=90)")],
)
def test_parts_of_other_families_grow_without_a_change_of_the_function(spec, one, parts, text):
    spec = spec.replace(**PARTS[parts])
    parent = randomised(spec, one)
    child_spec, child, done = grown(spec, parent, text, one)
    before, after = (
        logits_of(spec, parent, *sides(spec)),
        logits_of(child_spec, child, *sides(spec)),
    )
    assert done.preserves_function
    if done.zero_output_layers:
        np.testing.assert_array_equal(after, before)
        assert child_spec.no_rope_layers == ((1, 2, 6) if parts == "others" else ())
        assert child_spec.global_layers == ((1, 2, 6) if parts == "gemma3_text" else ())
    else:
        np.testing.assert_allclose(after, before, atol=1e-5 * np.abs(before).max())


def test_an_identity_layer_behind_a_norm_learns_as_gently_as_any(spec, one):
    """A zeroed projection would have a gradient of 1 / sqrt(eps), 1,000 times its neighbors'."""
    spec = spec.replace(**PARTS["olmo2"])
    child_spec, child, done = grown(spec, randomised(spec, one), "insert_identity(every=2)", one)
    found = gradient(child_spec, child, make_batch(batch_size=4))["blocks"]
    for name in ("attn_post_norm", "mlp_post_norm"):
        sizes = np.abs(np.asarray(found[name])).max(axis=1)
        assert sizes[list(done.zero_output_layers)].min() / np.median(sizes) > 0.05
        assert sizes.max() / np.median(sizes) < 20
    for name in ("o", "down"):
        assert not np.asarray(found[name])[list(done.zero_output_layers)].any()


@pytest.mark.parametrize(
    ("parts", "text", "answer"),
    [
        ("gemma3_text", "widen(d=48)", "a gemma3_text config.json cannot state embed_multiplier"),
        ("olmo2", "widen(heads=15)", "a multiple of 6, got 15: this model's norm of q and k"),
    ],
)
def test_a_width_that_a_part_forbids_is_refused_in_one_sentence(spec, parts, text, answer):
    with pytest.raises(UserError, match=answer) as refused:
        plan_growth(text, Parent(spec.replace(**PARTS[parts])))
    assert "\n" not in str(refused.value)


def test_noise_tells_the_copies_of_a_width_apart(spec, one):
    parent = randomised(spec, one)
    _, plain, _ = grown(spec, parent, "widen(d=48)", one)
    _, noisy, _ = grown(spec, parent, "widen(d=48, noise=0.3)", one)
    for name in ("q", "gate"):
        first, second = np.split(np.asarray(plain["blocks"][name]), 2, axis=1)
        np.testing.assert_array_equal(first, second)
        first, second = np.split(np.asarray(noisy["blocks"][name]), 2, axis=1)
        std = transformer.param_specs(spec.replace(d_model=48))["blocks"][name].init.std
        assert np.std(first - second) == pytest.approx(2 * 0.3 * std, rel=0.1)


def test_an_uneven_width_keeps_the_rms_in_the_mean(spec, one):
    parent = randomised(spec, one)
    child_spec, child, done = grown(spec, parent, "widen_rms(d=36)", one)
    assert not done.preserves_function and done.moments == "reset_new"
    before, after = (
        logits_of(spec, parent, *sides(spec)),
        logits_of(child_spec, child, *sides(spec)),
    )
    assert (
        0.5 < np.std(after) / np.std(before) < 1.5
        and np.corrcoef(before.ravel(), after.ravel())[0, 1] > 0.8
    )


def test_the_final_norm_stands_for_a_tied_head(spec, one):
    parent = randomised(spec.replace(tie_embeddings=True), one)
    _, child, _ = grown(spec.replace(tie_embeddings=True), parent, "widen(d=48)", one)
    np.testing.assert_array_equal(child["norm"], np.tile(parent["norm"], 2) / 2)
    np.testing.assert_array_equal(child["embed"], np.tile(parent["embed"], (1, 2)))


# ---- moments


def gradient(spec, params, batch):
    def nats(params):
        inputs = batch.tokens, batch.segment_ids, batch.positions
        hidden, _ = transformer.forward(spec, params, *inputs)
        head = transformer.lm_head(spec, params)
        return loss.cross_entropy(hidden, head, batch.targets, batch.loss_mask)[0]

    return jax.jit(jax.grad(nats))(params)


@pytest.mark.parametrize(
    ("family", "text"), crossed(["widen(d=48)", "widen(ff=52)", "widen(heads=15)"])
)
def test_scaled_moments_are_those_of_the_widened_models_own_gradients(spec, one, family, text):
    """The law behind copy_scaled: the child's gradient is the parent's, mapped."""
    spec = spec.replace(**FAMILIES[family])
    parent, batch = randomised(spec, one), make_batch(batch_size=4)
    child_spec, child, done = grown(spec, parent, text, one)
    own, theirs = jax.device_get(
        (gradient(child_spec, child, batch), gradient(spec, parent, batch))
    )
    mapped = grow_moments(done, theirs, "copy_scaled", 1, one)
    squares = grow_moments(done, jax.tree.map(np.square, theirs), "copy_scaled", 2, one)
    largest = max(np.abs(x).max() for x in jax.tree.leaves(own))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5 * largest), mapped, own)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-12),
        squares,
        jax.tree.map(np.square, jax.device_get(mapped)),
    )


def test_moments_follow_their_policy(spec, one):
    parent = jax.tree.map(lambda x: np.abs(x) + 1, randomised(spec, one))
    done = plan_growth("depth_upscale(m=2)", Parent(spec))
    source = np.asarray(done.layer_map)
    copied, kept, fresh = (
        grow_moments(done, parent, policy, 2, one) for policy in ("copy", "reset_new", "fresh")
    )
    scaled = grow_moments(done, parent, "copy_scaled", 2, one)
    for name, leaf in parent["blocks"].items():
        leaf = np.asarray(leaf)[source]
        np.testing.assert_array_equal(copied["blocks"][name], leaf)
        np.testing.assert_array_equal(scaled["blocks"][name], leaf)  # depth has no law to scale by
        leaf[3] = 0  # the second copy of layer 2 is what is new
        np.testing.assert_array_equal(kept["blocks"][name], leaf)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(fresh))
    np.testing.assert_array_equal(kept["embed"], parent["embed"])


def test_a_layer_without_a_source_has_no_moments(spec, one):
    parent = jax.tree.map(lambda x: np.abs(x) + 1, randomised(spec, one))
    for text, without in (("deepen(L=7)", [5, 6]), ("predict_layers(m=2)", [3, 5])):
        done = plan_growth(text, Parent(spec))
        for name, leaf in grow_moments(done, parent, "copy", 1, one)["blocks"].items():
            assert not np.asarray(leaf)[without].any(), name
            assert np.asarray(leaf)[[i for i in range(7) if i not in without]].all(), name


def test_new_is_what_has_no_source_or_stood_before():
    new_params = find_new_params(plan_growth("depth_upscale(m=4)", of(12)))
    assert list(new_params["layers"].nonzero()[0]) == [8, 9, 10, 11]
    new_params = find_new_params(
        plan_growth("stack(g=2)", Parent(COURSE.replace(n_layers=16))), new_params
    )
    assert list(new_params["layers"].nonzero()[0]) == [8, 9, 10, 11, *range(16, 32)]
    record = NewParams(new_params).to_record()
    assert record.to_json()["axes"] == {"layers": {"size": 32, "new": [[8, 12], [16, 32]]}}
    np.testing.assert_array_equal(NewParams.from_record(record).new["layers"], new_params["layers"])
    width = find_new_params(plan_growth("widen(d=2048, ff=6000)", of(12)))
    assert (
        width["embed"].tolist() == [False] * 1024 + [True] * 1024
        and width["mlp"].sum() == 6000 - 4096
    )


# ---- the step after a growth

TWO = THREE.replace(n_layers=2)

SETTINGS = config.Config(
    pack=config.PackConfig(seq_len=32),
    train=config.TrainConfig(steps=40, batch_size=16),
    optim=config.OptimConfig(peak_lr=1e-2, warmup_frac=0.1),
)


def trained(settings, spec, mesh, n_steps, now=None, new_params=NewParams()):
    """(state after n_steps, the step)"""
    now = now or make_state(mesh, settings, spec)
    run = step.build_step(
        spec, settings.train, settings.optim, settings.pack.seq_len, mesh, new_params
    )
    for i in range(n_steps):
        now, _ = run(now, jax.device_put(make_batch(seed=i), sharding.make_batch_sharding(mesh)))
    return now, run


def after_growth(settings, spec, mesh, text, policy, n_before=3):
    now, _ = trained(settings, spec, mesh, n_before)
    grew = plan_growth(text, Parent(spec))
    opt, guard, new_params = state.grow_state(now, grew, settings.optim, policy, mesh)
    return (
        grew,
        state.TrainState(now.step, grow_params(grew, now.params, mesh), opt, guard),
        new_params,
    )


def test_a_growth_adds_one_compilation_and_leaves_the_state_sharded_as_at_init():
    """In depth, with Muon; test_optimizer.py widens under every optimizer."""
    mesh = sharding.make_mesh(config.MeshConfig(fsdp=4, tensor=2))
    settings = dataclasses.replace(SETTINGS, optim=dataclasses.replace(SETTINGS.optim, name="muon"))
    text = "depth_upscale(m=1)"
    grew, now, new_params = after_growth(settings, THREE, mesh, text, "reset_new", n_before=2)
    assert state.state_shardings(now) == state.state_shardings(
        state.make_abstract_state(grew.child, settings.optim, mesh)
    )
    # momenta of the first copies are the parent's, of the second ones 0
    momenta = np.asarray(now.opt_state[0][0].inner_state[0].mu["blocks"]["gate"])
    is_new = find_new_params(grew)["layers"]
    assert [bool(momentum.any()) for momentum in momenta] == [not new for new in is_new]
    now, run = trained(settings, grew.child, mesh, 2, now, new_params)
    assert run.program._cache_size() == 1 and int(now.step) == 4


def test_new_parts_learn_as_in_a_fresh_run_and_old_ones_go_on(one):
    """Adam on one weight by hand: own count for the bias of new moments, own warm-up; the old part
    as if nothing had grown.
    """
    settings = dataclasses.replace(
        SETTINGS,
        optim=dataclasses.replace(SETTINGS.optim, clip_norm=0.0, weight_decay=0.0, eps=1e-12),
    )
    grew, now, new_params = after_growth(settings, TWO, one, "stack(g=2)", "reset_new")
    assert new_params.n_updates == 3 and new_params.rewarm == "new"
    optim, adam = settings.optim, now.opt_state[0]
    before, mean, square = (
        np.asarray(tree["blocks"]["gate"], np.float64) for tree in (now.params, adam.mu, adam.nu)
    )
    assert (mean[2:] == 0).all() and (mean[:2] != 0).all()
    grads = gradient(grew.child, now.params, batch := make_batch(seed=0))
    grad = np.asarray(grads["blocks"]["gate"], np.float64) / batch.loss_mask.sum()
    after, _ = trained(settings, grew.child, one, 1, now, new_params)
    lr = float(make_lr_schedule(optim, TrainConfig(steps=40))(3))
    mean, square = (
        optim.b1 * mean + (1 - optim.b1) * grad,
        optim.b2 * square + (1 - optim.b2) * grad**2,
    )
    expected = before.copy()
    for part, count, share in ((slice(0, 2), 4, 1.0), (slice(2, 4), 1, 1 / 4)):
        expected[part] -= (
            lr
            * share
            * (mean[part] / (1 - optim.b1**count))
            / np.sqrt(square[part] / (1 - optim.b2**count))
        )
    np.testing.assert_allclose(np.asarray(after.params["blocks"]["gate"]), expected, atol=2e-6)


def test_a_base_trains_among_frozen_identity_layers_as_if_nothing_had_grown(one):
    """The negative control of every comparison of grown models."""
    settings = dataclasses.replace(SETTINGS, optim=dataclasses.replace(SETTINGS.optim, eps=1e-3))
    optim = dataclasses.replace(settings.optim, lr_multipliers=(("new", 0.0),))
    grew = plan_growth("insert_identity(every=1)", Parent(THREE))
    params = randomised(THREE, one)
    child = state.init_state(grow_params(grew, params, one), grew.child, optim, one)
    base = state.init_state(params, THREE, settings.optim, one)
    base, _ = trained(settings, THREE, one, 3, base)
    frozen = dataclasses.replace(settings, optim=optim)
    added = find_new_params(grew)
    child, _ = trained(frozen, grew.child, one, 3, child, NewParams(added))
    is_old = ~np.asarray(added["layers"])
    assert is_old.tolist() == [True, False] * 3
    for name, leaf in base.params["blocks"].items():
        of_base = np.asarray(child.params["blocks"][name])[is_old]
        np.testing.assert_allclose(of_base, np.asarray(leaf), atol=2e-5, err_msg=name)
    np.testing.assert_allclose(child.params["embed"], base.params["embed"], atol=2e-5)


def test_rates_by_age_name_and_layer_multiply_and_zero_freezes(one):
    settings = dataclasses.replace(
        SETTINGS,
        optim=dataclasses.replace(
            SETTINGS.optim, lr_multipliers=(("old", 0.0), ("up", 0.5), ("layers 3-4", 0.5))
        ),
    )
    grew = plan_growth("stack(g=2)", Parent(THREE))
    new_params = NewParams(find_new_params(grew))
    rates = optimizer.lr_multiplier_tree(settings.optim, grew.child, new_params)
    assert np.ravel(rates["blocks"]["up"]).tolist() == [0] * 3 + [0.25] * 2 + [0.5]
    assert np.ravel(rates["blocks"]["gate"]).tolist() == [0] * 3 + [0.5] * 2 + [1]
    assert float(rates["embed"]) == float(rates["norm"]) == 0
    params = grow_params(grew, randomised(THREE, one), one)
    kept = jax.tree.map(np.asarray, params)
    now, _ = trained(
        settings,
        grew.child,
        one,
        3,
        state.init_state(params, grew.child, settings.optim, one),
        new_params,
    )
    np.testing.assert_array_equal(now.params["embed"], kept["embed"])
    for name, leaf in now.params["blocks"].items():
        np.testing.assert_array_equal(leaf[:3], kept["blocks"][name][:3])
        assert (np.asarray(leaf[3:]) != kept["blocks"][name][3:]).any(), name
    for group, answer in (("new_params", "expected old, new"), ("layers 4-6", "layers 0-5")):
        with pytest.raises(UserError, match=answer):
            optimizer.lr_multiplier_tree(
                config.OptimConfig(lr_multipliers=((group, 0.5),)), grew.child, new_params
            )
    with pytest.raises(UserError, match="was not grown"):
        optimizer.lr_multiplier_tree(
            config.OptimConfig(lr_multipliers=(("new", 0.5),)), THREE, NewParams()
        )


def test_another_optimizer_and_a_rewarmed_rate_are_warned_of(spec, one):
    record = {"optimizer": "muon", "lr": 1e-5, "step": 7, "rows": 70}
    model = LoadedModel(spec, randomised(spec, one), None, None, 7, None, record)
    settings = dataclasses.replace(SETTINGS, initialize=config.InitializeConfig(source="base"))
    message = "\n".join(
        begin.format_init_plan(
            settings.initialize, settings.optim, initialize.InitResult(model, None, ())
        )
    )
    assert (
        "base was trained with muon" in message
        and "last learning rate was 1.00e-05" in message
        and "moments       0" in message
    )


# ---- any mesh


EXACT = [
    "deepen(L=8)",
    "stack(g=2, noise=0.1)",
    "widen(d=48, ff=80, heads=12, noise=0.2)",
    *(
        pytest.param(text, marks=pytest.mark.slow)
        for text in (
            "depth_upscale(m=2)",
            "insert_identity(every=2)",
            "widen(d=48)",
            "widen_rms(d=48, ff=60)",
        )
    ),
]


AS_USERS = "--xla_cpu_use_fusion_emitters=true"  # else a mesh's fusions round otherwise


@pytest.mark.parametrize("text", EXACT)
def test_the_same_new_layers_on_every_mesh_bit_by_bit(spec, one, text, request):
    if os.environ.get("XLA_FLAGS") != AS_USERS:
        command = [sys.executable, "-m", "pytest", "-n", "0", request.node.nodeid]
        environment = os.environ | {"XLA_FLAGS": AS_USERS}
        subprocess.run(command, cwd=ROOT, env=environment, check=True)
        return
    mesh = sharding.make_mesh(config.MeshConfig(fsdp=4, tensor=2))
    spec = spec.replace(tie_embeddings=True)
    trees = [grown(spec, randomised(spec, where), text, where)[1] for where in (one, mesh)]
    jax.tree.map(np.testing.assert_array_equal, *trees)
    grew = plan_growth(text, Parent(spec))
    moved = [
        grow_moments(grew, randomised(spec, where), "copy_scaled", 2, where)
        for where in (one, mesh)
    ]
    jax.tree.map(np.testing.assert_array_equal, *moved)


@pytest.mark.parametrize("text", [*EXACT, "predict_layers(m=3)"])
def test_no_stack_of_layers_is_ever_whole_on_a_device(spec, text):
    mesh = sharding.make_mesh(config.MeshConfig(fsdp=4, tensor=2))
    params = transformer.make_abstract_params(spec, mesh)
    grew = plan_growth(text, Parent(spec))
    program = compile_growth(grew, mesh).lower(params).compile().as_text()
    for n_layers in {spec.n_layers, grew.child.n_layers}:
        for each in (spec, grew.child):
            for name, row in transformer.param_specs(each.replace(n_layers=n_layers))[
                "blocks"
            ].items():
                if len(row.shape) > 2:
                    whole = "f32[" + ",".join(map(str, row.shape)) + "]"
                    flat = f"f32[{n_layers},{math.prod(row.shape[1:])}]"
                    assert whole not in program and flat not in program, f"{name}: {whole}"


# ---- what cannot be


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("depth_upscal(m=4)", "did you mean depth_upscale?"),
        ("depth_upscale(m=12)", "expected 0 to 11"),
        ("depth_upscale(k=4)", "takes m, noise, seed"),
        ("depth_upscale", "expected an operator with its arguments"),
        ("layers([0, 12])", "expected layers 0 to 11, got 12"),
        ("stack(g=0)", "at least 1"),
        ("__import__('os').system('true')", "expected an operator"),
        ("stack_middle(m=13)", "expected 1 to 12"),
        ("deepen(L=12)", "has 12 layers already"),
        ("deepen(L=13, new='zero')", "'random' or 'copy'"),
        ("drop_layers(by='size')", "'influence', 'loss' or a list"),
        ("narrow(ff=24, rounds=0)", "rounds=0): expected an integer of at least 1"),
        ("drop_layers(n=12)", "1 to 11"),
        ("drop_layers(n=3, by=[1])", "n different layers"),
        ("predict_layers(m=12)", "has room for 1 to 11"),
        ("widen()", "nothing to change"),
        ("widen(d=1536)", "a multiple of 1024"),
        ("widen(ff=4000)", "Give a larger number"),
        ("widen(ff=4096)", "sizes already"),
        ("widen(heads=34)", "a multiple of 4"),
        ("narrow(ff=5000)", "Give a smaller number"),
        ("stack(g=2, noise=2)", "expected noise from 0 to 1"),
        ("drop_layers(by=[3], noise=0.1)", "no new weights"),
    ],
)
def test_an_operator_that_cannot_be_is_one_sentence(text, answer):
    with pytest.raises(UserError) as refused:
        plan_growth(text, of(12))
    assert answer in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("depth_upscale(m=6)", "nothing grew"),
        ("stack(g=1)", "nothing grew"),
        ("insert_identity(every=13)", "nothing grew"),
        ("layers([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11])", "nothing grew"),
        ("depth_upscale(m=11)", "more than a third at once"),
        ("drop_layers(by=[3])", "shrinks the model from"),
        ("layers([1, 0, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11])", ""),
        ("depth_upscale(m=5)", ""),
    ],
)
def test_a_growth_that_adds_nothing_says_so(text, answer, one, spec, output):
    """In the log and in its verdict; a model whose layers move has changed."""
    twelve = spec.replace(n_layers=12)
    parent = LoadedModel(
        twelve, transformer.init_params(twelve, 0, one), None, None, None, None, {}
    )
    child, growth = initialize.grow_model(parent, text, one, None)
    logged = output()
    assert growth.is_identity == (answer == "nothing grew")
    assert answer in logged and ("nothing grew" in logged or "shrinks" in logged) == bool(answer)
    report = verify_growth(
        parent, child, [text], [growth], one, seq_len=20, heldout=None, batches=None
    )
    assert report.verdict.startswith("nothing grew: ") == growth.is_identity
    assert ("12 -> 2 layers" in report.verdict) == (text == "depth_upscale(m=11)")


def test_a_model_without_layers_is_only_deepened():
    with pytest.raises(UserError, match="only deepen"):
        plan_growth("stack(g=2)", of(0))
    with pytest.raises(UserError, match="no layers to copy"):
        plan_growth("deepen(L=3, new='copy')", of(0))


def test_an_operator_that_measures_asks_for_sequences(spec, one):
    for text in ("drop_layers(n=2)", "narrow(ff=20)"):
        with pytest.raises(UserError, match="training sequences"):
            grown(spec, randomised(spec, one), text, one)
        assert plan_growth(text, Parent(spec)).child != spec  # its size is known without


def test_a_tokenizer_needs_the_parents_own(spec, one, tmp_path):
    with pytest.raises(UserError, match="parent's tokenizer is not known"):
        grown(spec, randomised(spec, one), f"new_tokenizer({str(tmp_path)!r})", one)


# ---- the vocabulary


def test_new_rows_are_the_mean_of_their_old_rows(spec, one):
    parent = randomised(spec, one)
    old = [[i] for i in range(60)] + [[3, 7], [5, 5, 8]] + [[]] * 66
    for name, axis in (("embed", 0), ("unembed", 1)):
        before = np.moveaxis(np.asarray(parent[name]), axis, 0)
        after = np.moveaxis(
            np.asarray(
                vocabulary.average_embeddings(
                    parent[name], vocabulary.TokenMapping(old, None), axis
                )
            ),
            axis,
            0,
        )
        np.testing.assert_array_equal(after[:60], before[:60])
        np.testing.assert_allclose(after[60], (before[3] + before[7]) / 2, rtol=1e-6)
        np.testing.assert_allclose(after[61], (2 * before[5] + before[8]) / 3, rtol=1e-5)
        np.testing.assert_allclose(
            after[62:], np.broadcast_to(before.mean(0), (66, 24)), rtol=1e-4, atol=1e-6
        )


# ---- the verdict


@pytest.mark.parametrize(
    ("parent", "child", "verdict"),
    [
        (4.0, 4.2, "healthy: it starts +0.20"),
        (4.0, 5.5, "not healthy: no better than a unigram model"),
        (4.0, 9.0, "not healthy: worse than guessing"),
        (5.5, 5.6, "healthy: it starts +0.10"),  # a parent that had not learned yet either
        (4.0, math.nan, "not healthy: worse than guessing"),
        (9.0, 9.1, "not healthy: its parent was worse than guessing already"),
        (math.nan, math.nan, "not healthy: its parent was worse than guessing already"),
    ],
)
def test_the_verdict_is_one_sentence_on_whether_the_grown_model_is_healthy(parent, child, verdict):
    spec = THREE.replace(vocab_size=512)
    report = GrowthReport(
        parent="base",
        operators=("stack(g=2)",),
        at_step=None,
        layer_map=(0, 1, 2, 0, 1, 2),
        new_layers=(3, 4, 5),
        n_params={"parent": 1, "child": 2},
        flops_per_token={"parent": 3.0, "child": 5.0},
        spec={"parent": spec, "child": spec.replace(n_layers=6)},
        heldout_loss={"parent": {"prose": parent}, "child": {"prose": child}},
        heldout_sequences=16,
        heldout_seq_len=64,
        preserves_function=False,
        max_logit_difference=None,
        layers=None,
        copy_similarity=None,
        measured={},
        moments=None,
    )
    assert judge_growth(report, {"prose": 5.0}).startswith(verdict)


class TimedProbe:
    """A training whose step takes so many seconds; it notes how many were asked for."""

    n_steps = 20

    def __init__(self, seconds):
        self.seconds = seconds
        self.trained = []

    def time_step(self, spec, params):
        return self.seconds

    def train(self, spec, params, n_steps):
        self.trained.append(n_steps)
        return params


@pytest.mark.parametrize("seconds, n_steps", [(0.45, 20), (1.1, 9), (2.6, None)])
def test_a_probe_has_no_more_steps_than_its_time_holds(seconds, n_steps):
    """Parent and child take the time of a step each."""
    model = types.SimpleNamespace(spec=None, params={})
    heldout = types.SimpleNamespace(
        n_sequences=7, measure_losses=lambda spec, params: {"prose": 3.25}
    )
    probe = TimedProbe(seconds)
    found = run_probe(probe, {"parent": model, "child": model}, heldout)
    assert (found and found.n_steps) == n_steps
    assert probe.trained == ([n_steps] * 2 if n_steps else [])


@pytest.mark.parametrize("seconds, n_sequences", [(9.5, 320), (40.0, 80)])
def test_a_probe_measures_no_more_sequences_than_its_time_holds(seconds, n_sequences):
    heldout = types.SimpleNamespace(
        n_sequences=320, limit_to=lambda n: types.SimpleNamespace(n_sequences=n)
    )
    assert limit_by_time(heldout, seconds).n_sequences == n_sequences
