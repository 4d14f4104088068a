"""Laws of the mixture of experts: equal to the plain sum over all experts on any mesh, balanced by
transformers' loss, grown from a dense model without a change of its function.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
import variants
from test_growth import grown, randomised
from test_model import logits_of
from test_session import assert_equal_ends, compiled, make_config, start, train_in_parts
from test_session import train as train_session
from test_train import SETTINGS, make_batch, make_state, put, train

from jaxpt import config, flops, sharding
from jaxpt.families import family
from jaxpt.growth.growth import Parent
from jaxpt.growth.parse import plan_growth
from jaxpt.model import moe, transformer
from jaxpt.model.param import list_param_specs
from jaxpt.spec import ModelSpec, UserError
from jaxpt.train import step

__all__ = ["compiled", "make_config", "start"]  # fixtures of test_session

MIXTURE = ModelSpec(
    n_layers=2,
    d_model=24,
    d_ff=20,
    n_heads=6,
    n_kv_heads=2,
    d_head=8,
    vocab_size=96,
    max_seq_len=64,
    family="mixtral",
    n_experts=7,
    n_experts_per_token=3,
    norm_topk_prob=True,
    router_aux_loss_coef=0.01,
    router_z_loss_coef=0.001,
)
MESH = {"fsdp": 2, "tensor": 2, "context": 2}


# ---- the experts


def sum_over_all_experts(x, chosen, weights, experts):
    gate = jnp.einsum("btd,edf->btef", x, experts.gate)
    up = jnp.einsum("btd,edf->btef", x, experts.up)
    share = jnp.sum(jax.nn.one_hot(chosen, len(experts.gate)) * weights[..., None], axis=2)
    return jnp.einsum("btef,efd,bte->btd", jax.nn.silu(gate) * up, experts.down, share)


def make_tokens(balance):
    """Tokens, their experts and weights, and the experts; 96 tokens of 3 experts make 7 x 6 rows on
    the mean, in blocks of 8 to 64.
    """
    B, T, D, F, E, k = 8, 12, 24, 40, 7, 3
    rng = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    weights, chosen = jax.lax.top_k(jax.nn.softmax(draw(B, T, E) + jnp.linspace(0, 3, E)), k)
    if balance == "worst":
        chosen = jnp.broadcast_to(jnp.array([2, 5, 6]), chosen.shape)
    experts = moe.Experts(draw(E, D, F) / 5, draw(E, D, F) / 5, draw(E, F, D) / 6)
    return draw(B, T, D), chosen, weights, experts, draw(B, T, D)


def differentiate(run, mesh, x, chosen, weights, experts, d_out):
    def total(x, weights, experts):
        return jnp.sum(run(x, chosen, weights, experts) * d_out)

    def on_mesh(*arguments):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return jax.value_and_grad(total, argnums=(0, 1, 2))(*arguments)

    def place(x, *axes):
        return jax.device_put(x, sharding.make_logical_sharding(mesh, axes))

    x, weights = (place(a, "batch", "position", None) for a in (x, weights))
    gate, up = (place(a, "experts", "embed", "mlp") for a in (experts.gate, experts.up))
    experts = moe.Experts(gate, up, place(experts.down, "experts", "mlp", "embed"))
    return jax.jit(on_mesh)(x, weights, experts)


@pytest.mark.parametrize("balance", ["random", "worst"])
@pytest.mark.parametrize("sizes", [None, MESH, {"replica": 2, "fsdp": 4}])
def test_blocks_equal_the_sum_over_all_experts_with_all_gradients(one, sizes, balance):
    inputs = make_tokens(balance)
    mesh = sharding.make_mesh(config.MeshConfig(**sizes)) if sizes else one
    expected = differentiate(sum_over_all_experts, one, *inputs)
    found = differentiate(moe.run_experts, mesh, *inputs)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=3e-6 * np.abs(b).max()), found, expected
    )


@pytest.mark.parametrize(("n_tokens", "k"), [(1, 1), (1, 3), (5, 2), (300, 3)])
def test_every_assignment_has_a_row_of_its_experts_block(n_tokens, k):
    E = 7
    for seed in range(3):
        rng = np.random.default_rng(seed)
        chosen = np.stack([rng.permutation(E)[:k] for _ in range(n_tokens)])
        if seed == 2:
            chosen[:] = np.arange(k)
        blocks = moe.sort_into_blocks(jnp.asarray(chosen)[None], E)
        n_rows = blocks.token.shape[1]
        assert len(set(np.ravel(blocks.row))) == chosen.size
        np.testing.assert_array_equal(blocks.expert[blocks.row // n_rows], chosen)
        tokens = np.broadcast_to(np.arange(n_tokens)[:, None], chosen.shape)
        np.testing.assert_array_equal(np.ravel(blocks.token)[blocks.row], tokens)
        assert np.sum(np.asarray(blocks.token) < n_tokens) == chosen.size


def test_a_mixture_gives_the_curve_of_one_device_on_a_mesh(one):
    losses, now, _ = train(one, n=4, spec=MIXTURE)
    spread, there, _ = train(sharding.make_mesh(config.MeshConfig(**MESH)), n=4, spec=MIXTURE)
    assert losses[-1] < losses[0] - 0.2
    np.testing.assert_allclose(spread, losses, rtol=2e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), there.params, now.params)


# ---- the router


def test_the_balance_loss_is_that_of_transformers_in_each_layer():
    B, T, E, k = 3, 16, 7, 3
    logits = jax.random.normal(jax.random.key(0), (B, T, E)) * 2
    probs = jax.nn.softmax(logits)
    weights, chosen = jax.lax.top_k(probs, k)
    routing = moe.Routing(logits, probs, chosen, weights)
    losses, scalars = moe.measure_balance(MIXTURE, routing)
    theirs = transformers.models.mixtral.modeling_mixtral.load_balancing_loss_func(
        (torch.tensor(np.asarray(logits)).reshape(-1, E),), E, k
    )
    assert float(scalars["balance_loss"]) == pytest.approx(float(theirs), rel=1e-5)
    n_layers = MIXTURE.n_layers
    assert float(losses["balance"]) == pytest.approx(0.01 * float(theirs) / n_layers, rel=1e-5)
    log_z = np.log(np.sum(np.exp(np.asarray(logits, float)), axis=-1))
    expected = 0.001 * np.mean(log_z**2) / n_layers
    assert float(losses["router_z"]) == pytest.approx(expected, rel=1e-5)


def test_a_step_reports_a_made_up_load():
    """All tokens take experts 0, 1 and 2 of 7: four are dead, and the load is 7/3 of the mean."""
    logits = jnp.broadcast_to(jnp.array([9.0, 9, 9, 0, 0, 0, 0]), (2, 5, 7))
    probs = jax.nn.softmax(logits)
    weights, chosen = jax.lax.top_k(probs, 3)
    _, scalars = moe.measure_balance(MIXTURE, moe.Routing(logits, probs, chosen, weights))
    found = {name: float(value) for name, value in scalars.items()}
    assert found["load_imbalance"] == pytest.approx(7 / 3)
    assert found["dead_experts"] == pytest.approx(4 / 7)
    assert found["router_entropy"] == pytest.approx(np.log(3), abs=0.01)


def test_the_losses_of_the_router_are_trained_and_reported(one):
    """With a coefficient that outweighs the data the loads level out."""
    spec = MIXTURE.replace(n_layers=1, router_aux_loss_coef=2.0)
    now = make_state(one, spec=spec)
    run = step.build_step(spec, SETTINGS.train, SETTINGS.optim, SETTINGS.pack.seq_len, one)
    imbalance = []
    for i in range(12):
        now, scalars = run(now, put(make_batch(i), one))
        imbalance.append(float(scalars["load_imbalance"]))
    assert np.mean(imbalance[-4:]) < np.mean(imbalance[:4]) - 0.2
    assert 3 <= float(scalars["balance_loss"]) < 3.3  # k at perfect balance


def test_muon_takes_each_expert_as_a_matrix_and_leaves_the_router_to_adam(one):
    optim = dataclasses.replace(SETTINGS.optim, name="muon", weight_decay=0.0, warmup_steps=0)
    settings = dataclasses.replace(SETTINGS, optim=optim)
    spec = MIXTURE.replace(n_layers=1)
    before = make_state(one, settings, spec)
    start = jax.device_get(before.params["blocks"]["down"])
    run = step.build_step(spec, settings.train, optim, settings.pack.seq_len, one)
    now, scalars = run(before, put(make_batch(0), one))
    update = (np.asarray(now.params["blocks"]["down"]) - start) / float(scalars["lr"])
    for expert in update.reshape(-1, *update.shape[2:]):
        singular = np.linalg.svd(expert, compute_uv=False) / (0.2 * 24**0.5)
        assert singular.min() > 0.6 and singular.max() < 1.3
    muon, adam = now.opt_state[0]
    assert not jax.tree.leaves(muon.inner_state[0].mu["blocks"]["router"])
    assert adam.inner_state.mu["blocks"]["router"].shape == (1, 24, 7)


# ---- families


@pytest.mark.parametrize(
    ("fields", "total", "active"),
    [
        ({"family": "mixtral"}, 46_702_792_704, 12_879_925_248),
        ({"family": "qwen3_moe", "qk_norm": True}, 30_532_122_624, 3_353_032_704),
        (
            {"family": "olmoe", "qk_norm": True, "qk_norm_whole": True},
            6_919_161_856,
            1_282_017_280,
        ),
    ],
)
def test_published_mixtures_have_their_parameters(fields, total, active):
    sizes, n_experts, k = {
        "mixtral": ((32, 4096, 14336, 32, 8, 128, 32_000), 8, 2),
        "qwen3_moe": ((48, 2048, 768, 32, 4, 128, 151_936), 128, 8),
        "olmoe": ((16, 2048, 1024, 16, 16, 128, 50_304), 64, 8),
    }[fields["family"]]
    spec = ModelSpec(*sizes, n_experts=n_experts, n_experts_per_token=k, **fields)
    assert transformer.count_params(spec) == total
    assert transformer.count_active_params(spec) == active
    params = list_param_specs(transformer.param_specs(spec))
    no_matrices = sum(param.size for _, param in params if not param.n_in)  # lookup and norms
    assert flops.count_matmul_params(spec) == active - no_matrices
    assert f"({active:,} active per token)" in transformer.describe_params(spec)


def test_both_names_of_the_number_of_experts_are_read_and_written(tmp_path):
    variants.make("qwen3_moe", tmp_path)
    path = tmp_path / "config.json"
    stored = json.loads(path.read_text())
    spec = family.read_spec(stored, path)
    written = family.write_config(spec, "float32")
    assert written["num_experts"] == written["num_local_experts"] == spec.n_experts == 7
    for name in ("num_experts", "num_local_experts"):
        alone = {key: value for key, value in written.items() if key != name}
        assert family.read_spec(alone, path) == spec


@pytest.mark.parametrize(
    ("changes", "answer"),
    [
        ({"n_experts_per_token": 8}, "expected 1 to n_experts = 7, got 8"),
        ({"n_experts_per_token": 0}, "expected 1 to n_experts = 7, got 0"),
        ({"n_experts": 0}, "expected 0 to n_experts = 0, got 3"),
        ({"n_experts": -1}, "at least 0"),
        ({"router_aux_loss_coef": -0.1}, "router_aux_loss_coef: expected a number of at least 0"),
        ({"router_z_loss_coef": float("nan")}, "router_z_loss_coef"),
        ({"mlp_bias": True}, "Experts have no biases"),
        ({"qk_norm_whole": True}, "Set qk_norm"),
    ],
)
def test_a_mixture_that_cannot_be_is_refused(changes, answer):
    with pytest.raises(UserError, match=answer):
        MIXTURE.replace(**changes)


def test_a_layer_mix_that_is_not_supported_is_refused(tmp_path):
    spec = MIXTURE.replace(family="qwen3_moe", qk_norm=True)
    written = family.write_config(spec, "float32")
    for key, value in (("mlp_only_layers", [1]), ("decoder_sparse_step", 2)):
        with pytest.raises(UserError, match=key):
            family.read_spec({**written, key: value}, tmp_path / "config.json")


# ---- growth


@pytest.mark.parametrize("parent_family", ["llama", "qwen3"])
@pytest.mark.parametrize("sizes", [None, {"fsdp": 4, "tensor": 2}])
def test_an_upcycled_model_computes_what_the_dense_one_does(spec, one, parent_family, sizes):
    mesh = sharding.make_mesh(config.MeshConfig(**sizes)) if sizes else one
    spec = spec.replace(family=parent_family, qk_norm=parent_family == "qwen3")
    dense = randomised(spec, mesh)
    child_spec, child, grew = grown(spec, dense, "upcycle(experts=7, top_k=3)", mesh)
    assert child_spec.family == {"llama": "mixtral", "qwen3": "qwen3_moe"}[parent_family]
    assert grew.preserves_function and child_spec.n_experts_per_token == 3
    assert (
        child["blocks"]["up"].sharding.spec
        == transformer.make_param_shardings(child_spec, mesh)["blocks"]["up"].spec
    )
    assert np.std(child["blocks"]["router"]) == pytest.approx(24**-0.5, rel=0.1)
    tokens = np.random.default_rng(0).integers(0, 96, (8, 20)).astype(np.int32)
    rest = np.ones_like(tokens), np.broadcast_to(np.arange(20, dtype=np.int32), tokens.shape)
    expected = logits_of(spec, dense, tokens, *rest)
    found = logits_of(child_spec, child, tokens, *rest)
    tolerance = 2e-6 if sizes else 1e-6  # a mesh sums in another order
    np.testing.assert_allclose(found, expected, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize(
    "text",
    ["more_experts(m=2, top_k=6)", "insert_identity(every=1)", "widen(d=48)", "widen(ff=50)"],
)
def test_growth_of_a_mixture_keeps_its_function(one, text):
    spec = MIXTURE.replace(n_layers=1)
    parent = randomised(spec, one)
    child_spec, child, grew = grown(spec, parent, text, one)
    assert grew.preserves_function
    tokens = np.random.default_rng(0).integers(0, 96, (2, 20)).astype(np.int32)
    rest = np.ones_like(tokens), np.broadcast_to(np.arange(20, dtype=np.int32), tokens.shape)
    expected = logits_of(spec, parent, tokens, *rest)
    found = logits_of(child_spec, child, tokens, *rest)
    np.testing.assert_allclose(found, expected, atol=2e-6 * np.abs(expected).max())


def test_layers_of_a_mixture_are_predicted_expert_by_expert(one):
    """Where all layers are one, each expert's new layer is that one too."""
    spec = MIXTURE.replace(n_layers=4)
    parent = randomised(spec, one)
    parent["blocks"] = jax.tree.map(lambda x: jnp.stack([x[0]] * 4), parent["blocks"])
    _, child, _ = grown(spec, parent, "predict_layers(m=1)", one)
    for name in ("router", "gate", "down"):
        found = child["blocks"][name]
        np.testing.assert_allclose(found[3], found[0], atol=1e-4, err_msg=name)


@pytest.mark.parametrize(
    ("spec_changes", "text", "answer"),
    [
        ({}, "upcycle(experts=4)", "7 experts already"),
        ({"n_experts": 0, "n_experts_per_token": 0}, "more_experts(m=2)", "has no experts"),
        (
            {"n_experts": 0, "n_experts_per_token": 0, "out_bias": True},
            "upcycle(experts=4)",
            "no known family of mixtures",
        ),
        ({"n_experts": 0, "n_experts_per_token": 0}, "upcycle(experts=2, top_k=3)", "got 3"),
        ({}, "more_experts(m=1)", "at least 2"),
    ],
)
def test_growth_of_experts_that_cannot_be_is_refused(spec_changes, text, answer):
    with pytest.raises(UserError, match=answer):
        plan_growth(text, Parent(MIXTURE.replace(**spec_changes)))


def test_noise_on_copied_experts_is_no_promise_of_the_same_function(spec):
    assert not plan_growth("upcycle(experts=4, noise=0.1)", Parent(spec)).preserves_function


def test_an_upcycled_run_that_is_stopped_and_resumed_ends_as_one_that_went_on(
    make_config, start, tmp_path
):
    settings = make_config(train__grow=((5, "upcycle(experts=3)"),))
    whole = train_session(start(settings, tmp_path / "whole"))
    assert whole.spec.n_experts == 3
    train_in_parts(start, settings, tmp_path / "cut", [9])
    assert_equal_ends(tmp_path / "cut", tmp_path / "whole")
