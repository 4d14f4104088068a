"""Laws of what is measured on layers, heads, MLP activations and channels, and of predicted layers:
the same on every mesh.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpt import config, sharding
from jaxpt.growth import measure, predict
from jaxpt.model import transformer
from jaxpt.spec import Batch, UserError


@pytest.fixture
def mesh():
    return sharding.make_mesh(config.MeshConfig(fsdp=4, tensor=2))


def randomised(spec, mesh):
    """Parameters of which none is at its initial value, norms too; the same on every mesh."""
    draw = np.random.default_rng(3)
    return jax.tree.map(
        lambda at: jax.device_put(draw.normal(0.05, 0.2, at.shape).astype(np.float32), at.sharding),
        transformer.make_abstract_params(spec, mesh),
    )


def batch(mesh, padding_id=0, empty_from=8, rows=slice(0, 8)):
    """Rows of two documents and padding, of several lengths; the whole is [8, 20]. Rows from
    `empty_from` on are padding alone.
    """
    draw = np.random.default_rng(5)
    tokens, border, length = (
        draw.integers(1, 96, (8, 20)),
        draw.integers(1, 9, (8, 1)),
        draw.integers(10, 20, (8, 1)),
    )
    length[empty_from:] = 0
    column = np.arange(20)[None]
    segments = np.where(column < border, 1, 2) * (column < length)
    tokens = np.where(segments > 0, tokens, padding_id)
    positions = np.where(column < border, column, column - border) * (segments > 0)
    fields = Batch(tokens, np.zeros_like(tokens), segments, positions, segments > 0)
    place = sharding.make_batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.device_put(np.asarray(x[rows], np.int32), place), fields)


def figures(spec, params, batches):
    """Everything that is measured, by name."""
    return {
        **measure.measure_layers(spec, params, batches)._asdict(),
        **measure.measure_importance(spec, params, batches)._asdict(),
        "copies": np.asarray(
            [
                pair.cosine
                for pair in measure.measure_copy_similarity(
                    spec, params, [0, 1, 1, 0, None], batches
                )
            ]
        ),
    }


def assert_close(a, b):
    for name in a:
        np.testing.assert_allclose(a[name], b[name], rtol=1e-5, atol=1e-6, err_msg=name)


def test_padding_does_not_count(spec, one):
    params = randomised(spec, one)
    four = figures(spec, params, [batch(one, rows=slice(0, 4))])
    assert_close(four, figures(spec, params, [batch(one, padding_id=77, empty_from=4)]))


def test_two_batches_are_one_big_one(spec, one):
    params = randomised(spec, one)
    halves = [batch(one, rows=slice(0, 4)), batch(one, rows=slice(4, 8))]
    assert_close(figures(spec, params, halves), figures(spec, params, [batch(one)]))


def test_a_measurement_without_tokens_is_refused(spec, one):
    for batches in ([], [batch(one, empty_from=0)]):
        with pytest.raises(UserError, match="hold no token"):
            measure.measure_layers(spec, randomised(spec, one), batches)


def test_statistics_are_those_of_the_residual_stream(spec, one):
    """Against numpy over the stream behind each layer, whose last state is the model's own."""
    params, rows = randomised(spec, one), batch(one)

    def observe(before, after, inner, state):
        return state, (before, after)

    last, streams = measure.observe_layers(spec, params, rows, observe)
    hidden, _ = transformer.forward(spec, params, rows.tokens, rows.segment_ids, rows.positions)
    normed = transformer.final_norm(spec, params, last)
    np.testing.assert_allclose(normed, hidden, rtol=1e-5, atol=1e-5)
    x, y = (
        np.asarray(stream, np.float64)[:, np.asarray(rows.segment_ids) > 0] for stream in streams
    )  # [L, tokens, D]
    cosines = (x * y).sum(-1) / np.linalg.norm(x, axis=-1) / np.linalg.norm(y, axis=-1)
    found = measure.measure_layers(spec, params, [rows])
    np.testing.assert_allclose(found.rms, np.sqrt((y * y).mean((1, 2))), rtol=1e-5)
    np.testing.assert_allclose(found.influence, 1 - cosines.mean(1), rtol=1e-4)


def with_leaf(params, name, change):
    return {**params, "blocks": {**params["blocks"], name: change(params["blocks"][name])}}


def test_an_identity_layer_has_no_influence(spec, one):
    params = randomised(spec, one)
    for name in ("o", "down"):
        params = with_leaf(params, name, lambda leaf: leaf.at[2].set(0))
    influence = measure.measure_layers(spec, params, [batch(one)]).influence
    assert abs(influence[2]) < 1e-6 and np.delete(influence, 2).min() > 1e-2


def test_equal_copies_at_the_same_input_write_alike(spec, one):
    """Layers 1 and 4 are equal, and writes are so small that both read nearly the same."""
    params = randomised(spec, one)
    params = {
        **params,
        "blocks": {name: leaf.at[4].set(leaf[1]) for name, leaf in params["blocks"].items()},
    }
    for name in ("o", "down"):
        params = with_leaf(params, name, lambda leaf: leaf * 1e-3)
    strangers, copies = measure.measure_copy_similarity(
        spec, params, [5, 7, 5, None, 7], [batch(one)]
    )
    assert (strangers.source, strangers.layers) == (5, (0, 2)) and abs(strangers.cosine) < 0.5
    assert (copies.source, copies.layers) == (7, (1, 4)) and copies.cosine > 0.999
    for name in ("o", "down"):
        params = with_leaf(params, name, lambda leaf: leaf.at[4].set(0))
    assert (
        measure.measure_copy_similarity(spec, params, [5, 7, 5, None, 7], [batch(one)])[1].cosine
        == 0
    )  # layer 4 writes nothing
    assert measure.measure_copy_similarity(spec, params, [0, 1, 2, 3, None], [batch(one)]) == []


def test_similarity_is_between_neighbouring_copies(spec, one):
    pairs = measure.measure_copy_similarity(
        spec, randomised(spec, one), [2, 2, None, 0, 2], [batch(one)]
    )
    assert [(pair.source, pair.layers) for pair in pairs] == [(2, (0, 1)), (2, (1, 4))]


def test_importance_finds_what_was_made_loud_and_what_was_silenced(spec, one):
    def loud(axis, index, factor):
        return lambda leaf: jnp.moveaxis(
            jnp.moveaxis(leaf, axis, 0).at[index].multiply(factor), 0, axis
        )

    params = randomised(spec, one)
    for layer in range(spec.n_layers):  # another kv head, activation and pair in each layer
        silenced, kv = layer % 2, 1 - layer % 2
        params = with_leaf(
            params, "v", lambda leaf, at=(layer, slice(None), kv): leaf.at[at].multiply(9)
        )
        params = with_leaf(
            params, "v", lambda leaf, at=(layer, slice(None), silenced): leaf.at[at].set(0)
        )
        params = with_leaf(
            params, "up", lambda leaf, at=(layer, slice(None), 7 * layer): leaf.at[at].multiply(50)
        )
        params = with_leaf(
            params, "up", lambda leaf, at=(layer, slice(None), 7 * layer + 1): leaf.at[at].set(0)
        )
    for name in ("attn_norm", "mlp_norm"):
        params = with_leaf(params, name, loud(1, 11, 50))
        params = with_leaf(params, name, loud(1, 12, 0))
    params = {**params, "norm": params["norm"].at[12].set(0)}
    found = measure.measure_importance(spec, params, [batch(one)])
    heads, kv = measure.select_heads(found.heads, 6, 2, 3)
    assert {name: value.shape for name, value in found._asdict().items()} == {
        "heads": (5, 6),
        "mlp": (5, 40),
        "embed": (24,),
    }
    assert kv[:, 0].tolist() == [1, 0, 1, 0, 1] and heads[:2].tolist() == [[3, 4, 5], [0, 1, 2]]
    assert measure.select_important(found.mlp, 1)[:, 0].tolist() == [
        0,
        7,
        14,
        21,
        28,
    ] and measure.select_important(found.embed, 1) == [11]
    assert found.heads.reshape(5, 2, 3).min(-1).argmin(-1).tolist() == [0, 1, 0, 1, 0]
    silent = found.heads[0, :3], found.mlp[range(5), [1, 8, 15, 22, 29]], found.embed[12]
    assert not any(np.any(each) for each in silent)


def test_what_is_kept_is_stated_exactly():
    scores = np.asarray([[1.0, 5.0, 5.0, 0.0, 5.0, 2.0], [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]])
    assert measure.select_important(scores, 2).tolist() == [
        [1, 2],
        [4, 5],
    ]  # of three equal ones those of lower index
    assert measure.select_important(scores, 5).tolist() == [[0, 1, 2, 4, 5], [1, 2, 3, 4, 5]]
    assert measure.select_important(scores[0], 1).tolist() == [1]
    heads, kv = measure.select_heads(scores, 6, 3, 4)  # groups of two sum to 6 5 7 and 1 5 9
    assert heads.tolist() == [[0, 1, 4, 5], [2, 3, 4, 5]] and kv.tolist() == [[0, 2], [1, 2]]
    for new_heads in (0, 3, 8):
        with pytest.raises(UserError, match=f"heads={new_heads}: .* a multiple of 2 from 2 to 6"):
            measure.select_heads(scores, 6, 3, new_heads)


def test_any_mesh_measures_and_chooses_alike(spec, one, mesh):
    """Within 1e-5 of each figure: the order of float32 sums is all that differs."""
    a = figures(spec, randomised(spec, one), [batch(one)])
    b = figures(spec, randomised(spec, mesh), [batch(mesh)])
    assert_close(a, b)
    for name in ("influence", "heads", "mlp", "embed"):
        n = a[name].shape[-1]
        np.testing.assert_array_equal(
            measure.select_important(a[name], n // 2),
            measure.select_important(b[name], n // 2),
            err_msg=name,
        )


predicted = jax.jit(predict.predict_layer_params, static_argnums=0)


def test_a_layer_between_equal_ones_equals_them(spec, one):
    blocks = jax.tree.map(
        lambda leaf: jnp.broadcast_to(leaf[:1], leaf.shape), randomised(spec, one)["blocks"]
    )
    for name, new in predicted(spec, blocks, np.asarray([0, 3])).items():
        np.testing.assert_allclose(new, blocks[name][:2], rtol=1e-4, atol=1e-5, err_msg=name)


def test_what_layers_share_is_predicted_and_the_rest_is_made_smaller(spec, one):
    """Half of the channels are read alike by all layers, the others, more softly, by each in its
    own way.
    """
    q = np.array(randomised(spec, one)["blocks"]["q"])
    q[:, :12] = q[0, :12]
    q[:, 12:] *= 0.1
    (new,) = predicted(spec, {"q": q}, np.asarray([2]))["q"]
    mean = (q[2] + q[3]) / 2
    assert np.linalg.norm(new[:12] - mean[:12]) < 0.02 * np.linalg.norm(mean[:12])
    assert (
        0.6 < np.linalg.norm(new[12:]) / np.linalg.norm(mean[12:]) < 0.8
    )  # 2/3, where layers have nothing in common


def test_predicted_layers_keep_dtypes_and_silence_and_average_norms_and_biases(spec, one):
    blocks = dict(randomised(spec, one)["blocks"])
    blocks["o"] = blocks["o"].at[3:].set(0)  # layers that write nothing stay so
    blocks["up"] = blocks["up"].astype(jnp.bfloat16)
    blocks["down"] = jnp.zeros_like(blocks["down"])
    blocks["q_bias"] = jnp.asarray(np.random.default_rng(1).normal(size=(5, 6, 8)))
    gaps = np.asarray([2, 3])
    new = predicted(spec.replace(qkv_bias=True), blocks, gaps)
    for name, leaf in blocks.items():
        assert new[name].dtype == leaf.dtype and new[name].shape == (2, *leaf.shape[1:]), name
        if name.endswith(("norm", "bias")):
            np.testing.assert_allclose(
                new[name], (leaf[gaps] + leaf[gaps + 1]) / 2, rtol=1e-6, err_msg=name
            )
    assert np.any(new["o"][0]) and not np.any(new["o"][1]) and not np.any(new["down"])


def test_layers_are_predicted_from_three_on(spec, one):
    with pytest.raises(UserError, match="at least 3 layers, got 2"):
        two = spec.replace(n_layers=2)
        predict.predict_layer_params(two, randomised(two, one)["blocks"], [0])


def test_any_mesh_predicts_alike(spec, one, mesh):
    """Within 1e-4 of each leaf's norm: directions of near equal strength turn into each other, and
    the fit hardly differs between them.
    """
    a, b = (
        predicted(spec, randomised(spec, where)["blocks"], np.asarray([1, 3]))
        for where in (one, mesh)
    )
    for name in a:
        assert np.linalg.norm(a[name] - np.asarray(b[name])) < 1e-4 * np.linalg.norm(a[name]), name


def test_no_device_holds_a_whole_stacked_leaf(spec, mesh):
    """In the compiled programs: the shape of a stack of matrices stands nowhere, cut stacks do."""
    params, rows = transformer.make_abstract_params(spec, mesh), jax.eval_shape(lambda: batch(mesh))
    programs = [
        measure.jit_sums(spec, mesh, sums).lower(params, rows)
        for sums in (measure.sum_layer_statistics, measure.sum_importance)
    ]
    programs.append(
        measure.jit_sums(spec, mesh, measure.sum_copy_similarity, (0, 1, 1, 0, 2)).lower(
            params, rows
        )
    )
    where = transformer.make_param_shardings(spec.replace(n_layers=2), mesh)["blocks"]
    programs.append(
        jax.jit(predict.predict_layer_params, static_argnums=0, out_shardings=where).lower(
            spec, params["blocks"], np.asarray([1, 3])
        )
    )
    for program in programs:
        text = program.compile().as_text()
        for name in ("q", "k", "v", "o", "gate", "up", "down"):
            leaf = params["blocks"][name]
            whole, cut = (
                f"f32[{','.join(map(str, shape))}]"
                for shape in (leaf.shape, leaf.sharding.shard_shape(leaf.shape))
            )
            assert whole not in text and cut in text, name
