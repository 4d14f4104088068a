"""Laws of growth: layer maps as published, functions kept where that is promised, the same newborn on every mesh."""

import jax
import numpy as np
import pytest
from test_model import logits_of

from jaxpt import config, sharding
from jaxpt.model import llama
from jaxpt.spec import UserError
from jaxpt.weights import growth, vocabulary


def test_the_course_is_grown_exactly():
    assert growth.parse("depth_upscale(m=4)", 12).layer_map == (0, 1, 2, 3, 4, 5, 6, 7, 4, 5, 6, 7, 8, 9, 10, 11)
    assert growth.parse("depth_upscale(m=8)", 32).layer_map == (*range(24), *range(8, 32))
    assert len(growth.parse("layers([0, 1, 2, 3, 4, 7, 8, 9, 10, 11])", 12).layer_map) == 10


def randomised(spec, mesh):
    """Parameters of which none is at its birth value, norms included."""
    keys = iter(jax.random.split(jax.random.key(3), 64))
    return jax.tree.map(lambda x: x + 0.1 * jax.random.normal(next(keys), x.shape), llama.init(spec, 0, mesh))


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("depth_upscale(m=2)", [0, 1, 2, 2, 3, 4]),
        ("stack(g=2)", [0, 1, 2, 3, 4] * 2),
        ("interleave(g=2)", [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]),
        ("layers([4, 0])", [4, 0]),
    ],
)
def test_a_grown_layer_is_its_source_and_all_else_is_the_parents(spec, text, wanted):
    mesh = sharding.make_mesh(config.Mesh(fsdp=4, tensor=2))
    parent = randomised(spec, mesh)
    child_spec, child, done = growth.grow(spec, parent, text, mesh)
    assert list(done.layer_map) == wanted and child_spec.n_layers == len(wanted)
    for name, leaf in child["blocks"].items():
        np.testing.assert_array_equal(leaf, np.asarray(parent["blocks"][name])[wanted], err_msg=name)
        assert leaf.sharding == llama.shardings(child_spec, mesh)["blocks"][name]
    for name in ("embed", "norm", "unembed"):  # the final norm too, which the course's code forgot
        np.testing.assert_array_equal(child[name], parent[name], err_msg=name)


def test_an_identity_layer_changes_no_logit(spec, one):
    spec = spec.replace(out_bias=True, mlp_bias=True, qkv_bias=True)
    parent = randomised(spec, one)
    child_spec, child, done = growth.grow(spec, parent, "insert_identity(every=2)", one)
    assert done.preserves_function and child_spec.n_layers == 7 and done.silent == (2, 5)
    tokens = np.random.default_rng(0).integers(0, 96, (4, 20)).astype(np.int32)
    rest = np.ones_like(tokens), np.broadcast_to(np.arange(20, dtype=np.int32), tokens.shape)
    np.testing.assert_array_equal(logits_of(spec, parent, tokens, *rest), logits_of(child_spec, child, tokens, *rest))


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("depth_upscal(m=4)", "did you mean depth_upscale?"),
        ("depth_upscale(m=12)", "wanted 0 to 11"),
        ("depth_upscale(k=4)", "takes m"),
        ("depth_upscale", "wanted an operator with its settings"),
        ("layers([0, 12])", "12 names no layer"),
        ("stack(g=0)", "at least 1"),
        ("__import__('os').system('true')", "wanted an operator"),
    ],
)
def test_an_operator_that_cannot_be_is_one_sentence(text, answer):
    with pytest.raises(UserError) as refused:
        growth.parse(text, 12)
    assert answer in str(refused.value)


def test_new_pieces_start_as_the_mean_of_their_old_pieces(spec, one):
    parent = randomised(spec, one)
    old = [[i] for i in range(60)] + [[3, 7], [5, 5, 8]] + [[]]
    child_spec, child = vocabulary.reword(spec, parent, old, one)
    assert child_spec.vocab_size == 128
    for name, axis in (("embed", 0), ("unembed", 1)):
        before, after = np.moveaxis(np.asarray(parent[name]), axis, 0), np.moveaxis(np.asarray(child[name]), axis, 0)
        np.testing.assert_array_equal(after[:60], before[:60])
        np.testing.assert_allclose(after[60], (before[3] + before[7]) / 2, rtol=1e-6)
        np.testing.assert_allclose(after[61], (2 * before[5] + before[8]) / 3, rtol=1e-5)
        np.testing.assert_allclose(after[62:], np.broadcast_to(before.mean(0), (66, 24)), rtol=1e-4, atol=1e-6)
    with pytest.raises(UserError, match="old id 96 is beyond"):
        vocabulary.reword(spec, parent, [[96]], one)
