"""Laws of the mixture of experts: equal to the plain sum over all experts on any mesh, balanced by
transformers' loss, grown from a dense model without a change of its function.
"""

import dataclasses
import functools
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
import variants
from safetensors.numpy import load_file, save_file
from test_growth import grown, randomised
from test_model import logits_of
from test_session import assert_equal_ends, compiled, make_config, start, train_in_parts
from test_session import train as train_session
from test_train import SETTINGS, initial_params, make_batch, make_state, put, train

from jaxpt import config, flops, sharding
from jaxpt.families import family
from jaxpt.growth.growth import Parent
from jaxpt.growth.parse import plan_growth
from jaxpt.model import moe, transformer
from jaxpt.model.kernels import mixture
from jaxpt.model.mlp import ACTIVATIONS
from jaxpt.model.param import list_param_specs
from jaxpt.spec import Batch, ModelSpec, UserError
from jaxpt.train import state, step
from jaxpt.weights import huggingface, safetensors_file

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
SIGMOID = MIXTURE.replace(
    router="sigmoid", router_bias_rate=0.001, d_shared=36, has_shared_switch=True
)
DENSE = {"n_experts": 0, "n_experts_per_token": 0}
MESH = {"fsdp": 2, "tensor": 2, "context": 2}
RING = {"fsdp": 2, "expert": 2, "tensor": 2}


# ---- the experts


def sum_over_all_experts(activate, x, chosen, weights, experts):
    gate = jnp.einsum("btd,edf->btef", x, experts.gate)
    up = jnp.einsum("btd,edf->btef", x, experts.up)
    share = jnp.sum(jax.nn.one_hot(chosen, len(experts.gate)) * weights[..., None], axis=2)
    return jnp.einsum("btef,efd,bte->btd", activate(gate) * up, experts.down, share)


def make_tokens(balance):
    """Tokens, their experts and weights, and the experts; 96 tokens of 3 experts make 36 rows of
    each of 8 on the mean, in blocks of 8 to 64.
    """
    B, T, D, F, E, k = 8, 12, 24, 40, 8, 3
    rng = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    weights, chosen = jax.lax.top_k(jax.nn.softmax(draw(B, T, E) + jnp.linspace(0, 3, E)), k)
    if balance == "worst":
        chosen = jnp.broadcast_to(jnp.array([2, 5, 6]), chosen.shape)
    experts = mixture.Experts(draw(E, D, F) / 5, draw(E, D, F) / 5, draw(E, F, D) / 6)
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
    experts = mixture.Experts(gate, up, place(experts.down, "experts", "mlp", "embed"))
    return jax.jit(on_mesh)(x, weights, experts)


@pytest.mark.parametrize(
    ("sizes", "balance", "activation"),
    [
        (None, "random", "gelu_pytorch_tanh"),
        (MESH, "worst", "silu"),
        ({"replica": 2, "fsdp": 4}, "random", "silu"),
        (RING, "worst", "silu"),
        ({"fsdp": 1, "expert": 8}, "random", "gelu_pytorch_tanh"),
    ],
)
def test_blocks_equal_the_sum_over_all_experts_with_all_gradients(one, sizes, balance, activation):
    inputs = make_tokens(balance)
    mesh = sharding.make_mesh(config.MeshConfig(**sizes)) if sizes else one
    activate = ACTIVATIONS[activation]
    expected = differentiate(functools.partial(sum_over_all_experts, activate), one, *inputs)
    found = differentiate(functools.partial(mixture.run_experts, activate, "scan"), mesh, *inputs)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=3e-6 * np.abs(b).max()), found, expected
    )


def test_a_batch_that_the_mesh_does_not_divide_runs_whole_on_every_device(one):
    """As one sequence does that is decoded: each device sums its own experts' part."""
    x, chosen, weights, experts, d_out = make_tokens("random")
    x, chosen, weights, d_out = (a[:3] for a in (x, chosen, weights, d_out))
    ring = sharding.make_mesh(config.MeshConfig(**RING))

    def differentiate_on(mesh):
        def total(x, weights, experts):
            out = mixture.run_experts(jax.nn.silu, "scan", x, chosen, weights, experts)
            return jnp.sum(out * d_out)

        def on_mesh(*arguments):
            with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
                return jax.value_and_grad(total, argnums=(0, 1, 2))(*arguments)

        place = sharding.make_replicated_sharding(mesh)
        return jax.jit(on_mesh)(*jax.device_put((x, weights, experts), place))

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=3e-6 * np.abs(b).max()),
        differentiate_on(ring),
        differentiate_on(one),
    )


@pytest.mark.parametrize(("n_tokens", "k"), [(1, 1), (1, 3), (5, 2), (300, 3)])
@pytest.mark.parametrize("for_kernel", [False, True])
def test_every_assignment_has_a_row_of_its_expert(n_tokens, k, for_kernel):
    E = 7
    for seed in range(3):
        rng = np.random.default_rng(seed)
        chosen = np.stack([rng.permutation(E)[:k] for _ in range(n_tokens)])
        if seed == 2:
            chosen[:] = np.arange(k)
        n_rows = 1 if for_kernel else mixture.choose_block_rows(chosen.size, E)
        rows = mixture.sort_by_expert(jnp.asarray(chosen)[None], E, n_rows, for_kernel)
        assert len(set(np.ravel(rows.row))) == chosen.size
        np.testing.assert_array_equal(rows.expert[rows.row // n_rows], chosen)
        tokens = np.broadcast_to(np.arange(n_tokens)[:, None], chosen.shape)
        np.testing.assert_array_equal(rows.token[rows.row], tokens)
        assert np.sum(np.asarray(rows.token) < n_tokens) == chosen.size
        owners = np.repeat(np.arange(E), rows.sizes)  # the first rows, one expert after the other
        np.testing.assert_array_equal(owners[rows.row], chosen)
        if for_kernel:
            assert min(rows.sizes) > 0 and len(rows.token) >= sum(rows.sizes) + 128


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [MESH, RING, {"fsdp": 1, "expert": 4, "context": 2}])
def test_a_mixture_gives_the_curve_of_one_device_on_a_mesh(one, sizes):
    spec = MIXTURE.replace(n_experts=8)
    losses, now, _ = train(one, n=4, spec=spec)
    spread, there, _ = train(sharding.make_mesh(config.MeshConfig(**sizes)), n=4, spec=spec)
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
    is_token = np.arange(T) < np.array([[T], [5], [11]])  # the rest is padding
    losses, scalars, loads = moe.measure_balance(MIXTURE, routing, jnp.asarray(is_token))
    theirs = transformers.models.mixtral.modeling_mixtral.load_balancing_loss_func(
        (torch.tensor(np.asarray(logits)).reshape(-1, E),), E, k, torch.tensor(is_token).long()
    )
    np.testing.assert_allclose(loads, np.bincount(np.ravel(chosen[is_token]), minlength=E))
    assert float(scalars["balance_loss"]) == pytest.approx(float(theirs), rel=1e-5)
    n_layers = MIXTURE.n_layers
    assert float(losses["balance"]) == pytest.approx(0.01 * float(theirs) / n_layers, rel=1e-5)
    log_z = np.log(np.sum(np.exp(np.asarray(logits, float)), axis=-1))[is_token]
    expected = 0.001 * np.mean(log_z**2) / n_layers
    assert float(losses["router_z"]) == pytest.approx(expected, rel=1e-5)


def test_a_step_reports_a_made_up_load():
    """Tokens of the first of two layers take experts 0, 1 and 2 of 7: four are dead, and the load
    is 7/3 of the mean. The second is even.
    """
    logits = jnp.broadcast_to(jnp.array([9.0, 9, 9, 0, 0, 0, 0]), (2, 5, 7))
    probs = jax.nn.softmax(logits)
    weights, chosen = jax.lax.top_k(probs, 3)
    routing = moe.Routing(logits, probs, chosen, weights)
    _, scalars, load = moe.measure_balance(MIXTURE, routing, jnp.ones((2, 5), bool))
    assert float(scalars["router_entropy"]) == pytest.approx(np.log(3), abs=0.01)
    blocks = {"router_bias": jnp.array([[3.0, 4.0], [0.0, 1.0]])}
    found = moe.measure_routers(blocks, jnp.stack([load, jnp.full(7, 30 / 7)]))
    assert float(found["load_imbalance"]) == pytest.approx((7 / 3 + 1) / 2)
    assert float(found["dead_experts"]) == pytest.approx(4 / 14)
    assert float(found["router_bias_norm"]) == pytest.approx(3)


def test_a_bias_moves_to_the_experts_of_less_than_the_mean_load():
    spec = MIXTURE.replace(router="sigmoid", router_bias_rate=0.25)
    loads = jnp.array([[9.0, 3, 0, 4, 4, 4, 4], [1, 1, 1, 1, 1, 1, 8]])
    bias = moe.move_router_bias(spec, jnp.ones((2, 7)), loads)
    expected = [[0.75, 1.25, 1.25, 1, 1, 1, 1], [1.25] * 6 + [0.75]]
    np.testing.assert_array_equal(bias, expected)


@pytest.mark.slow
def test_a_step_moves_the_bias_by_the_loads_of_the_whole_batch_on_any_mesh(one):
    """Not those of a micro-batch, nor of a device; a bad step and a frozen layer keep theirs."""
    spec = SIGMOID.replace(router_bias_rate=0.25, n_experts=8)
    optim = dataclasses.replace(SETTINGS.optim, lr_multipliers=(("layers 1-1", 0.0),))
    spread = sharding.make_mesh(config.MeshConfig(fsdp=2, expert=2, tensor=2))
    found = []
    for mesh, n_micro_batches in ((one, 1), (spread, 4)):
        knobs = dataclasses.replace(SETTINGS.train, grad_accum_steps=n_micro_batches)
        run = step.build_step(spec, knobs, optim, SETTINGS.pack.seq_len, mesh)
        now, scalars = run(make_state(mesh, spec=spec), put(make_batch(0), mesh))
        found.append(jax.device_get(now.params["blocks"]["router_bias"]))
    assert set(np.unique(found[0][0])) == {-0.25, 0.25}
    assert not found[0][1].any()
    np.testing.assert_array_equal(found[0], found[1])
    assert float(scalars["router_bias_norm"]) == pytest.approx(0.25 * 8**0.5 / 2)
    broken = make_batch(0)
    broken.loss_mask[0, 0] = np.nan
    now, _ = run(make_state(spread, spec=spec), put(broken, spread))
    assert not np.asarray(now.params["blocks"]["router_bias"]).any()


def test_a_bias_changes_which_experts_are_chosen_and_not_their_weights():
    spec = SIGMOID.replace(n_experts=4, n_experts_per_token=2, norm_topk_prob=False)
    params = {"router": jnp.eye(4), "router_bias": jnp.array([0.0, 0, 0, 9])}
    x = jnp.array([[[3.0, 2, 1, 0]]])
    routing = moe.route(spec, params, x)
    np.testing.assert_array_equal(routing.experts, [[[3, 0]]])
    np.testing.assert_allclose(routing.weights, [[[0.5, 1 / (1 + np.exp(-3))]]], rtol=1e-6)


def test_padding_does_not_change_the_routers_losses(one):
    params = initial_params(MIXTURE)
    tokens = np.random.default_rng(0).integers(1, 90, (2, 24)).astype(np.int32)
    segments, positions = np.ones_like(tokens), np.broadcast_to(np.arange(24), tokens.shape)
    _, short = transformer.forward(
        MIXTURE, params, tokens[:, :16], segments[:, :16], positions[:, :16]
    )
    _, padded = transformer.forward(MIXTURE, params, tokens, segments * (positions < 16), positions)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), padded, short)


@pytest.mark.slow
def test_accumulation_takes_the_mean_of_the_micro_batches_balance(one):
    """The balance loss is a product of two means, so that of halves is another than the whole's."""
    spec = MIXTURE.replace(n_layers=1)
    params, batch = initial_params(spec), make_batch(0)

    def differentiate(n_micro_batches, batch):
        knobs = dataclasses.replace(SETTINGS.train, grad_accum_steps=n_micro_batches)
        run = jax.jit(step.make_gradient_function(spec, knobs, 32, one))
        _, _, side = run(params, batch)
        return side

    whole, found = differentiate(1, batch), differentiate(2, batch)
    halves = [differentiate(1, jax.tree.map(lambda x, i=i: x[i::2], batch)) for i in range(2)]
    expected = sum(half.scalars["balance_loss"] for half in halves)
    assert found.scalars["balance_loss"] == pytest.approx(float(expected), rel=1e-5)
    np.testing.assert_array_equal(found.loads, whole.loads)
    ratio = float(found.scalars["balance_loss"] / whole.scalars["balance_loss"])
    assert 1e-4 < abs(ratio - 1) < 0.05


def test_bfloat16_changes_gradients_by_rounding_where_the_choice_of_experts_is_the_same(
    monkeypatch,
):
    """Where it is not, a whole token goes to another expert: that is most of the difference."""
    spec = MIXTURE.replace(n_experts_per_token=1)
    params = jax.tree.map(lambda x: x[0], initial_params(spec)["blocks"])
    x = jax.random.normal(jax.random.key(0), (1, 20_000, 24))
    rounded = moe.route(spec, params, x.astype("bfloat16"))
    is_same = jnp.ravel(moe.route(spec, params, x).experts == rounded.experts)
    x = x[:, jnp.argsort(is_same)[:1000]]  # all that differ, and others
    d_out = jax.random.normal(jax.random.key(1), x.shape)

    @jax.jit
    def differentiate(x):
        def total(params):
            out = moe.apply(spec, params, x).out
            return jnp.sum(out * d_out.astype(x.dtype), dtype=jnp.float32)

        return jax.grad(total)(params)["up"]

    expected = differentiate(x)

    def differ(found):
        return float(jnp.abs(found - expected).max() / jnp.abs(expected).max())

    free = differ(differentiate(x.astype("bfloat16")))
    choice = moe.route(spec, params, x).experts
    monkeypatch.setattr(moe, "choose_experts", lambda scores, k: choice)
    differentiate.clear_cache()
    fixed = differ(differentiate(x.astype("bfloat16")))
    assert fixed < 0.015 and free > 3 * fixed, (fixed, free)


@pytest.mark.slow
def test_the_losses_of_the_router_are_trained_and_reported(one):
    """With a coefficient that outweighs the data the balance loss is below that without it."""

    def train_with(coefficient):
        spec = MIXTURE.replace(n_layers=1, router_aux_loss_coef=coefficient)
        now = make_state(one, spec=spec)
        run = step.build_step(spec, SETTINGS.train, SETTINGS.optim, SETTINGS.pack.seq_len, one)
        found = []
        for i in range(24):
            now, scalars = run(now, put(make_batch(i), one))
            found.append(float(scalars["balance_loss"]))
        return np.mean(found[-8:])

    without, balanced = train_with(0.0), train_with(2.0)
    # k at perfect balance
    assert 3 <= balanced < 3 + (without - 3) / 2, (balanced, without)


@pytest.mark.slow
def test_the_published_balance_loss_evens_loads_on_real_text_and_costs_no_loss(one, data_dir):
    """200 steps on bytes with OLMoE's coefficient (2409.02060) and without, three seeds each."""
    text = (data_dir / "text_tinyshakespeare/input.txt").read_bytes()
    B, T, n_steps = 16, 64, 200
    train_config = dataclasses.replace(SETTINGS.train, steps=n_steps, batch_size=B)
    optim = dataclasses.replace(SETTINGS.optim, peak_lr=3e-3, warmup_frac=0.1)
    positions = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
    ones = np.ones((B, T), np.int32)

    def train_with(coefficient):
        spec = MIXTURE.replace(
            d_model=48,
            vocab_size=256,
            n_experts=8,
            n_experts_per_token=2,
            router_aux_loss_coef=coefficient,
        )
        run = step.build_step(spec, train_config, optim, T, one)
        ends = []
        for seed in range(3):
            params = transformer.init_params(spec, seed, one)
            now = state.init_state(params, spec, optim, one)
            bytes_read = np.frombuffer(text, np.uint8).astype(np.int32)
            scalars = []
            for i in range(n_steps):
                part = bytes_read[i * B * T : (i + 1) * B * T + 1]
                tokens, targets = part[:-1].reshape(B, T), part[1:].reshape(B, T)
                batch = Batch(tokens, targets, ones, positions, ones.astype(np.float32))
                now, found = run(now, put(batch, one))
                scalars.append((found["loss"], found["load_imbalance"]))
            ends.append(np.mean(np.array(scalars[-50:], float), axis=0))
        return np.array(ends).T  # of each seed

    (loss, imbalance), (loss_alone, imbalance_alone) = train_with(0.01), train_with(0.0)
    print(f"with {loss} {imbalance}, without {loss_alone} {imbalance_alone}")
    assert imbalance.max() < 2 and imbalance.max() < imbalance_alone.min()
    assert loss.mean() - loss_alone.mean() < np.ptp(loss_alone)


def test_muon_takes_each_expert_as_a_matrix_and_leaves_the_router_to_adam(one):
    optim = dataclasses.replace(SETTINGS.optim, name="muon", weight_decay=0.0, warmup_frac=0)
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
        (
            {"family": "solar_open", "router": "sigmoid", "d_shared": 1280},
            102_651_793_408,
            12_054_827_008,
        ),
    ],
)
def test_published_mixtures_have_their_parameters(fields, total, active):
    sizes, n_experts, k = {
        "mixtral": ((32, 4096, 14336, 32, 8, 128, 32_000), 8, 2),
        "qwen3_moe": ((48, 2048, 768, 32, 4, 128, 151_936), 128, 8),
        "olmoe": ((16, 2048, 1024, 16, 16, 128, 50_304), 64, 8),
        "solar_open": ((48, 4096, 1280, 64, 8, 128, 196_608), 128, 8),
    }[fields["family"]]
    spec = ModelSpec(*sizes, n_experts=n_experts, n_experts_per_token=k, **fields)
    assert transformer.count_params(spec) == total
    assert transformer.count_active_params(spec) == active
    params = list_param_specs(transformer.param_specs(spec))
    no_matrices = sum(param.n_active for _, param in params if not param.n_in)  # lookup and norms
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
    with pytest.raises(UserError, match="num_local_experts: expected 7, as num_experts, got 5"):
        family.read_spec({**written, "num_local_experts": 5}, path)


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


def test_wrong_tensors_of_experts_are_listed_by_their_pattern(one, tmp_path):
    """As after a download that was cut within a layer, and a router of another width."""
    spec = MIXTURE.replace(n_layers=4)
    huggingface.write_hf_model(spec, transformer.init_params(spec, 0, one), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    experts = "model.layers.{}.block_sparse_moe.experts.{}."
    for layer, e in [(1, 5), (1, 6), *itertools.product((2, 3), range(7))]:
        del tensors[experts.format(layer, e) + "w1.weight"]
    del tensors[experts.format(0, 2) + "w2.weight"]
    for layer in range(4):
        router = f"model.layers.{layer}.block_sparse_moe.gate.weight"
        tensors[router] = tensors[router][:5]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError) as error:
        huggingface.load_hf_model(tmp_path, one)
    for part in (
        experts.format("1", "{5..6}") + "w1.weight (20, 24)",
        experts.format("{2..3}", "{0..6}") + "w1.weight (20, 24)",
        experts.format("0", "2") + "w2.weight (24, 20)",
        "model.layers.{0..3}.block_sparse_moe.gate.weight: expected shape (7, 24), got (5, 24)",
    ):
        assert part in str(error.value)
    assert str(error.value).count("layers") == 4


def test_the_router_of_solar_open_stays_float32_in_a_bfloat16_export(one, tmp_path):
    spec = SIGMOID.replace(family="solar_open", d_shared=40, has_shared_switch=False)
    params = transformer.init_params(spec, 0, one)
    bias = np.random.default_rng(0).normal(size=(2, 7)).astype(np.float32)
    place = params["blocks"]["router_bias"].sharding
    params["blocks"]["router_bias"] = jax.device_put(bias, place)
    huggingface.write_hf_model(spec, params, tmp_path, dtype="bfloat16")
    stored = safetensors_file.open_safetensors(tmp_path)
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    np.testing.assert_array_equal(stored[name].map_numbers(), bias[1])
    kept = {name for name, tensor in stored.items() if tensor.dtype == np.float32}
    assert len(kept) == 4 and all(".mlp.gate." in name for name in kept)


def test_a_layer_mix_that_is_not_supported_is_refused(tmp_path):
    spec = MIXTURE.replace(family="qwen3_moe", qk_norm=True)
    written = family.write_config(spec, "float32")
    for key, value in (("mlp_only_layers", [1]), ("decoder_sparse_step", 2)):
        with pytest.raises(UserError, match=key):
            family.read_spec({**written, key: value}, tmp_path / "config.json")


# ---- growth


@pytest.mark.parametrize(
    ("parent_family", "sizes"), [("llama", {"fsdp": 4, "tensor": 2}), ("qwen3", None)]
)
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
    ("text", "n_experts", "n_per_token"),
    [
        ("upcycle(granularity=4, expansion=3)", 12, 8),
        ("upcycle(granularity=4, expansion=3, shared=True, top_k=3)", 9, 3),
    ],
)
def test_parts_of_an_mlp_that_are_chosen_together_compute_what_it_does(
    spec, one, text, n_experts, n_per_token
):
    """For any router: here, that of the growth's seed."""
    spec = spec.replace(n_layers=2)
    dense = randomised(spec, one)
    child_spec, child, grew = grown(spec, dense, text, one)
    assert grew.preserves_function
    assert (child_spec.n_experts, child_spec.n_experts_per_token) == (n_experts, n_per_token)
    assert child_spec.family == ("solar_open" if child_spec.d_shared else "mixtral")
    tokens = np.random.default_rng(0).integers(0, 96, (2, 20)).astype(np.int32)
    rest = np.ones_like(tokens), np.broadcast_to(np.arange(20, dtype=np.int32), tokens.shape)
    expected = logits_of(spec, dense, tokens, *rest)
    found = logits_of(child_spec, child, tokens, *rest)
    np.testing.assert_allclose(found, expected, atol=1e-6 * np.abs(expected).max())


def test_a_dropped_share_of_channels_is_drawn_as_the_others_are_spread(spec, one):
    spec = spec.replace(n_layers=2, d_ff=160)
    dense = randomised(spec, one)
    _, child, grew = grown(spec, dense, "upcycle(experts=3, drop=0.25)", one)
    assert not grew.preserves_function
    was_redrawn = {}
    for name, axis in (("gate", 2), ("up", 2), ("down", 3)):
        old = np.asarray(dense["blocks"][name])
        new = np.asarray(child["blocks"][name])
        changed = (new != old[:, None]).any(axis=axis)
        was_redrawn[name] = changed
        assert (changed.sum(axis=2) == 40).all()
        redrawn = np.moveaxis(new, 5 - axis, 2)[changed]
        assert np.std(redrawn) == pytest.approx(np.std(old), rel=0.1)
    np.testing.assert_array_equal(was_redrawn["gate"], was_redrawn["up"])
    np.testing.assert_array_equal(was_redrawn["gate"], was_redrawn["down"])
    assert (was_redrawn["gate"][:, 0] != was_redrawn["gate"][:, 1]).any()


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


@pytest.mark.slow
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
        (DENSE, "more_experts(m=2)", "has no experts"),
        ({**DENSE, "out_bias": True}, "upcycle(experts=4)", "no known family of mixtures"),
        (DENSE, "upcycle(experts=2, top_k=3)", "got 3"),
        ({}, "more_experts(m=1)", "at least 2"),
        (DENSE, "upcycle()", "experts, or granularity and expansion"),
        (DENSE, "upcycle(granularity=3, expansion=2)", "20 feed-forward channels cannot be cut"),
        (DENSE, "upcycle(granularity=4, expansion=2, top_k=6)", "a multiple of 4, got 6"),
        (DENSE, "upcycle(experts=4, shared=True)", "a granularity of at least 2"),
        (DENSE, "upcycle(experts=4, drop=1)", "from 0 to below 1"),
    ],
)
def test_growth_of_experts_that_cannot_be_is_refused(spec_changes, text, answer):
    with pytest.raises(UserError, match=answer):
        plan_growth(text, Parent(MIXTURE.replace(**spec_changes)))


def test_noise_on_copied_experts_is_no_promise_of_the_same_function(spec):
    assert not plan_growth("upcycle(experts=4, noise=0.1)", Parent(spec)).preserves_function


@pytest.mark.slow
def test_an_upcycled_run_that_is_stopped_and_resumed_ends_as_one_that_went_on(
    make_config, start, tmp_path
):
    """Stopped before its upcycling, right after it and later; the router's bias has moved."""
    text = "upcycle(granularity=4, expansion=2, shared=True, top_k=3)"
    settings = make_config(train__grow=((5, text),))
    whole = train_session(start(settings, tmp_path / "whole"))
    assert whole.spec.n_experts == 6
    assert np.asarray(whole.state.params["blocks"]["router_bias"]).any()
    train_in_parts(start, settings, tmp_path / "cut", [3, 6, 9])
    assert_equal_ends(tmp_path / "cut", tmp_path / "whole")
