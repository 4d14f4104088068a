"""Laws of the forward pass: equal to transformers, blind to neighbors and to the future; the
chunked loss equals the plain one.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import variants

from jaxpt import config, sharding
from jaxpt.model import loss, transformer
from jaxpt.model.kernels import cpu_matmul
from jaxpt.spec import ModelSpec, UserError
from jaxpt.weights import huggingface


def logits_of(spec, params, tokens, segments, positions):
    compute = jax.jit(transformer.compute_logits, static_argnums=0)
    return np.asarray(compute(spec, params, tokens, segments, positions))


@pytest.mark.parametrize("name", variants.CONFIGS)
def test_logits_equal_transformers_at_long_positions(name, tmp_path, one):
    theirs = variants.make(name, tmp_path)
    spec, params = huggingface.load_hf_model(tmp_path, one)
    assert transformer.count_params(spec) == sum(p.numel() for p in theirs.parameters())
    tokens = np.random.default_rng(0).integers(0, spec.vocab_size, (2, 48)).astype(np.int32)
    positions = np.arange(48, dtype=np.int32) + np.array([[0], [3000]], np.int32)
    with torch.no_grad():
        expected = theirs(
            input_ids=torch.tensor(tokens).long(), position_ids=torch.tensor(positions).long()
        ).logits.numpy()
    ours = logits_of(spec, params, tokens, np.ones_like(tokens), positions)
    np.testing.assert_allclose(ours, expected, atol=3e-5)


def test_a_document_does_not_attend_to_its_neighbor_in_the_sequence(spec, one):
    params = transformer.init_params(spec, 0, one)
    tokens = np.random.default_rng(0).integers(0, 96, (1, 20)).astype(np.int32)
    segments = np.array([[1] * 7 + [2] * 9 + [0] * 4], np.int32)
    positions = np.array([[*range(7), *range(9), *range(4)]], np.int32)
    before = logits_of(spec, params, tokens, segments, positions)
    changed = tokens.copy()
    changed[:, :7] = (tokens[:, :7] + 1) % 96
    changed[:, 16:] = 5
    after = logits_of(spec, params, changed, segments, positions)
    np.testing.assert_array_equal(before[:, 7:16], after[:, 7:16])
    alone = logits_of(spec, params, tokens[:, 7:16], np.ones((1, 9), np.int32), positions[:, 7:16])
    np.testing.assert_allclose(before[:, 7:16], alone, atol=1e-5)


def test_no_token_sees_the_future(spec, one):
    params = transformer.init_params(spec, 0, one)
    tokens = np.arange(20, dtype=np.int32)[None]
    segments, positions = np.ones_like(tokens), tokens

    def of_embedding(embed):
        changed = {**params, "embed": embed}
        hidden, _ = transformer.forward(spec, changed, tokens, segments, positions)
        return hidden[0, 8].sum()

    seen = np.abs(np.asarray(jax.jit(jax.grad(of_embedding))(params["embed"]))).sum(axis=1)
    assert (seen[:9] > 0).all() and (seen[9:] == 0).all()


@pytest.mark.parametrize("R, W", [(24, 88), (88, 24)])
def test_a_weights_gradient_transposes_only_the_narrower_side_of_its_matmul(R, W):
    B, T = 3, 40
    rng = np.random.default_rng(0)
    x, matrix = (
        jnp.asarray(rng.normal(size=(B, T, R)), jnp.float32),
        jnp.asarray(rng.normal(size=(R, W)), jnp.float32),
    )

    def gradients(product):
        def loss(x, matrix):
            return jnp.sum(product(x, matrix) ** 2)

        return jax.jit(jax.grad(loss, argnums=(0, 1)))(x, matrix)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
        gradients(cpu_matmul.matmul),
        gradients(jnp.matmul),
    )
    pull = jax.jit(lambda x, matrix, g: jax.vjp(cpu_matmul.matmul, x, matrix)[1](g))
    program = pull.lower(x, matrix, jnp.ones((B, T, W))).compile().as_text()
    assert (f"[24,{B * T}]" in program, f"[88,{B * T}]" in program) == (True, False)
    assert "lhs_contracting_dims={0}" not in program  # tokens first on the left: half the speed


@pytest.fixture(scope="module")
def by_remat():
    """Temporary bytes and gradients of a loss per policy, with the scan that accelerators run."""
    spec = ModelSpec(
        n_layers=20, d_model=48, d_ff=160, n_heads=6, n_kv_heads=2, d_head=16, vocab_size=96
    )
    params = transformer.init_params(
        spec, 0, sharding.make_mesh(config.MeshConfig(), jax.devices()[:1])
    )
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 96, (4, 128)), jnp.int32)

    def of(remat):
        def total(params):
            hidden, _ = transformer.forward(
                spec,
                params,
                tokens,
                jnp.ones_like(tokens),
                jnp.broadcast_to(jnp.arange(128), (4, 128)),
                remat=remat,
            )
            return jnp.sum(hidden * jnp.cos(jnp.arange(48)))

        compiled = jax.jit(jax.grad(total)).lower(params).compile()
        return compiled.memory_analysis().temp_size_in_bytes, compiled(params)

    return {remat: of(remat) for remat in transformer.CHECKPOINT_POLICIES}


def test_every_remat_policy_gives_the_same_gradients(by_remat):
    (_, expected), *others = by_remat.values()
    for _, gradients in others:
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max()),
            gradients,
            expected,
        )


def test_remat_policies_are_ordered_by_what_they_keep(by_remat):
    """And what they keep is what the planner computes, in elements per token and layer."""
    L, tokens = 20, 4 * 128
    temporary = {remat: size for remat, (size, _) in by_remat.items()}
    assert temporary["none"] > temporary["dots"] > temporary["minimal"] > temporary["full"]
    D, F, mixed, qkv = 48, 160, 96 + 6, 160  # and a logsumexp for each of the six heads
    kept = {"minimal": mixed, "dots": mixed + qkv + D + 2 * F}
    for remat, elements in kept.items():
        assert temporary[remat] - temporary["full"] == pytest.approx(
            L * tokens * elements * 4, rel=0.25
        ), remat


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_chunked_loss_equals_plain_loss_and_its_gradients(softcap):
    B, T, D, V = 4, 384, 24, 96  # 1,536 tokens: four chunks
    rng = np.random.default_rng(0)
    hidden, head = (
        jnp.asarray(rng.normal(size=(B, T, D)), jnp.float32),
        jnp.asarray(rng.normal(size=(D, V)), jnp.float32),
    )
    targets, weights = (
        jnp.asarray(rng.integers(0, V, (B, T))),
        jnp.asarray(rng.integers(0, 2, (B, T)), jnp.float32),
    )

    def plain(hidden, head):
        logits = hidden @ head
        if softcap:
            logits = softcap * jnp.tanh(logits / softcap)
        log_z = jax.nn.logsumexp(logits, axis=-1)
        nats = log_z - jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return jnp.sum(weights * (nats + 0.01 * log_z**2)), jnp.sum(weights * nats)

    def chunked(hidden, head):
        return loss.cross_entropy(hidden, head, targets, weights, 0.01, softcap=softcap)

    ours, expected = (
        jax.jit(jax.value_and_grad(of, argnums=(0, 1), has_aux=True))(hidden, head)
        for of in (chunked, plain)
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-4), ours, expected
    )


def test_the_logits_of_a_batch_never_exist_at_once():
    B, T, D, V = 4, 1024, 24, 1000
    args = [
        jax.ShapeDtypeStruct(s, d)
        for s, d in (
            ((B, T, D), jnp.float32),
            ((D, V), jnp.float32),
            ((B, T), jnp.int32),
            ((B, T), jnp.float32),
        )
    ]
    compiled = (
        jax.jit(jax.grad(lambda h, w, t, m: loss.cross_entropy(h, w, t, m)[0], argnums=(0, 1)))
        .lower(*args)
        .compile()
    )
    assert compiled.memory_analysis().temp_size_in_bytes < B * T * V * 4 / 2


def test_initial_values_are_the_same_on_every_mesh(spec, one):
    alone = transformer.init_params(spec, 7, one)
    spread = transformer.init_params(
        spec, 7, sharding.make_mesh(config.MeshConfig(replica=2, fsdp=2, tensor=2))
    )
    jax.tree.map(np.testing.assert_array_equal, alone, spread)


def test_layers_are_initialized_differently_and_every_parameter_has_its_stated_std(one):
    spec = ModelSpec(
        n_layers=5, d_model=192, d_ff=320, n_heads=12, n_kv_heads=4, d_head=16, vocab_size=384
    )
    params, specs = transformer.init_params(spec, 0, one), transformer.param_specs(spec)
    for name, leaf in params["blocks"].items():
        param = specs["blocks"][name]
        if param.init.mean:
            assert (leaf == 1).all()
            continue
        assert len({layer.tobytes() for layer in np.asarray(leaf)}) == 5, name
        for layer in np.asarray(leaf):
            assert abs(layer.std() / param.init.std - 1) < 0.05, name
    assert abs(float(params["embed"].std()) / 0.02 - 1) < 0.05


def test_what_writes_into_the_residual_is_smaller_by_the_root_of_the_writes(one):
    """1/sqrt(2L), so that the sum over 2L writes keeps its size (GPT-2)."""
    L, D, F = 8, 192, 320
    spec = ModelSpec(
        n_layers=L, d_model=D, d_ff=F, n_heads=12, n_kv_heads=4, d_head=16, vocab_size=384
    )
    blocks = transformer.init_params(spec, 0, one)["blocks"]
    stds = {name: float(blocks[name].std()) for name in ("q", "o", "up", "down")}
    expected = {
        "q": D**-0.5,
        "o": (12 * 16) ** -0.5 / (2 * L) ** 0.5,
        "up": D**-0.5,
        "down": F**-0.5 / (2 * L) ** 0.5,
    }
    assert stds == pytest.approx(expected, rel=0.03)


def test_the_course_shape_has_the_course_count():
    shape = ModelSpec(
        n_layers=12, d_model=1024, d_ff=4096, n_heads=32, n_kv_heads=8, d_head=32, vocab_size=32_000
    )
    assert [transformer.count_params(shape.replace(n_layers=n)) for n in (12, 16, 10)] == [
        248_013_824,
        308_839_424,
        217_601_024,
    ]


@pytest.mark.parametrize(
    ("change", "answer"),
    [
        ({"n_kv_heads": 4}, "Use a divisor of 6"),
        ({"d_head": 7}, "even number"),
        ({"n_layers": -1}, "at least 0"),
        ({"d_ff": 0}, "at least 1"),
        ({"d_model": 2.5}, "an integer of at least"),
        ({"activation": "relu"}, "model.activation: expected 'silu' or"),
        ({"logit_softcap": -1.0}, "model.logit_softcap: expected a number above 0"),
        ({"rotary_frac": 0.4}, "makes an even number of 8 channels, got 0.4, which makes 3"),
        ({"no_rope_layers": (5,)}, "model.no_rope_layers: expected layers 0 to 4, got 5"),
    ],
)
def test_sizes_that_cannot_make_a_model_are_refused(spec, change, answer):
    with pytest.raises(UserError, match=answer):
        dataclasses.replace(spec, **change)


@pytest.mark.parametrize(
    ("mesh", "changes", "answer"),
    [
        ({"fsdp": 3}, {}, "expected sizes that multiply to 8 devices"),
        ({"fsdp": -1, "tensor": -1}, {}, "at most one -1"),
        ({"fsdp": 2, "tensor": 4}, {}, "model.n_kv_heads = 2 cannot be sharded 4 ways"),
        ({"fsdp": 8}, {"batch_size": 12}, "8 or 16"),
        ({"fsdp": 4, "expert": 2}, {"n_experts": 7}, r"model.n_experts = 7 .* over expert.*6 or 8"),
        ({"fsdp": 1, "context": 8}, {"seq_len": 20}, "pack.seq_len = 20 cannot be sharded 8 ways"),
    ],
)
def test_sizes_that_a_mesh_cannot_shard_are_refused_with_the_nearest_that_work(
    spec, mesh, changes, answer
):
    changes = dict(changes)
    if n_experts := changes.pop("n_experts", 0):
        spec = spec.replace(family="mixtral", n_experts=n_experts, n_experts_per_token=2)
    with pytest.raises(UserError, match=answer):
        made = sharding.make_mesh(config.MeshConfig(**mesh))
        sharding.check_mesh_divides(
            made, spec, **{"batch_size": 16, "grad_accum_steps": 1, "seq_len": 32, **changes}
        )


def test_parameters_are_neither_made_nor_read_on_a_mesh_that_does_not_divide(spec, tmp_path):
    mesh = sharding.make_mesh(config.MeshConfig(fsdp=2, tensor=4))
    for make in (
        lambda: transformer.init_params(spec, 0, mesh),
        lambda: transformer.make_abstract_params(spec, mesh),
        lambda: transformer.make_param_shardings(spec, mesh),
    ):
        with pytest.raises(UserError, match="n_kv_heads = 2 cannot be sharded 4 ways over tensor"):
            make()


def test_an_unknown_logical_axis_fails_in_the_rules():
    with pytest.raises(KeyError, match="embd"):
        sharding.logical_to_partition_spec(("layers", "embd"))
