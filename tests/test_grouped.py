"""Laws of the experts' kernels: a grouped product gives the scan's numbers, and is taken only where
it can run and was seen to agree.
"""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_attention import A100, H100, TPU, on
from test_moe import MIXTURE, RING, differentiate, make_tokens
from test_train import SETTINGS, make_batch, make_state, put

from jaxpt import config, flops, hardware, sharding
from jaxpt.config import Config, MeshConfig, ModelConfig, PackConfig, TrainConfig
from jaxpt.model.kernels import grouped, mixture, select_experts
from jaxpt.plan import answer, compile, cost
from jaxpt.spec import UserError
from jaxpt.train import step

SHAPE = select_experts.TrialShape(4, 24, 40, "float32", "silu")


@pytest.fixture
def interpreted(monkeypatch):
    """Megablox on a CPU."""
    products = grouped.make_megablox_products(interpret=True)
    monkeypatch.setitem(grouped.PRODUCTS, "megablox", products)
    select_experts.check_against_scan.cache_clear()
    yield
    select_experts.check_against_scan.cache_clear()


@pytest.mark.parametrize(
    ("sizes", "balance"), [(None, "random"), (None, "worst"), (RING, "random"), (RING, "worst")]
)
def test_grouped_products_equal_the_scan_with_all_gradients(one, interpreted, sizes, balance):
    """In the worst balance five of eight experts have no token, and a shard of the ring's has."""
    inputs = make_tokens(balance)
    mesh = sharding.make_mesh(config.MeshConfig(**sizes)) if sizes else one
    run = functools.partial(mixture.run_experts, jax.nn.silu)
    expected = differentiate(functools.partial(run, "scan"), one, *inputs)
    found = differentiate(functools.partial(run, "megablox"), mesh, *inputs)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=3e-6 * np.abs(b).max()), found, expected
    )


@pytest.mark.slow
def test_a_step_by_a_kernel_is_the_scans(one, interpreted, monkeypatch):
    spec = MIXTURE.replace(n_layers=1)
    ends = {}
    for kernel in ("scan", "megablox"):
        monkeypatch.setattr(
            step, "choose_kernels", lambda *_, kernel=kernel: step.Kernels("xla", kernel)
        )
        run = step.build_step(spec, SETTINGS.train, SETTINGS.optim, SETTINGS.pack.seq_len, one)
        now, scalars = run(make_state(one, spec=spec), put(make_batch(0), one))
        ends[kernel] = now.params, scalars["loss"], scalars["grad_norm"]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5), *ends.values()
    )


# ---- choosing a kernel


def choose(mesh, requested="auto", dtype="bfloat16"):
    return select_experts.choose_experts_kernel(MIXTURE, requested, dtype, mesh)


@pytest.mark.parametrize(
    ("mesh", "asked", "kernel", "reason"),
    [
        (on("cpu", "cpu"), {}, "scan", "the default on cpu"),
        (on(*TPU), {}, "megablox", "the kernel for TPU v5"),
        (on(*TPU), {"requested": "scan"}, "scan", "train.experts = scan"),
        (on(*H100), {}, "tokamax", "the kernel for NVIDIA H100"),
        (on(*A100), {}, "tokamax", "the kernel for NVIDIA A100"),
        (on("gpu", "NVIDIA V100", "7.0"), {}, "scan", "Ampere or newer (8.0)"),
        (on(*H100), {"dtype": "float32"}, "scan", "train.compute_dtype = float32 (bfloat16)"),
        (on("gpu", "AMD Instinct MI300X"), {}, "scan", "not NVIDIA's"),
    ],
)
def test_the_kernel_follows_the_platform_and_gives_its_reason(
    monkeypatch, mesh, asked, kernel, reason
):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    got, why = choose(mesh, **asked)
    assert got == kernel and reason in why and "\n" not in why


def test_tokamax_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    kernel, reason = choose(on(*H100))
    assert kernel == "scan" and "not installed (pip install -r requirements-gpu.txt)" in reason
    with pytest.raises(UserError, match="tokamax does not support this run: it is not installed"):
        choose(on(*H100), "tokamax")


@pytest.mark.parametrize(
    ("mesh", "requested", "message"),
    [
        (on("cpu", "cpu"), "megablox", "train.experts: megablox runs on TPU"),
        (on(*TPU), "tokamax", "tokamax runs on NVIDIA GPU"),
    ],
)
def test_a_kernel_requested_by_name_is_never_replaced_silently(mesh, requested, message):
    with pytest.raises(UserError, match=message):
        choose(mesh, requested)


@pytest.mark.slow
def test_a_kernel_that_fails_or_gives_other_numbers_is_not_used(interpreted, monkeypatch):
    products = grouped.PRODUCTS["megablox"]
    device = jax.devices()[0]

    def judge(**changes):
        select_experts.check_against_scan.cache_clear()
        monkeypatch.setitem(grouped.PRODUCTS, "megablox", products._replace(**changes))
        return select_experts.check_against_scan("megablox", SHAPE, device)

    def multiply_by_first(rows, matrices, sizes):  # whatever expert a row is of
        return rows @ matrices[0]

    def miss_the_last_row(left, right, sizes):
        return products.sum_groups(left, right, sizes.at[-1].add(-64))

    assert judge() is None
    assert "its output on cpu differs from scan's" in judge(multiply_groups=multiply_by_first)
    assert "gradient of gate" in judge(sum_groups=miss_the_last_row)
    assert "by nan x" in judge(multiply_transposed=lambda rows, m, _: rows @ m[0].T * jnp.nan)
    assert "fails on cpu" in judge(multiply_groups=lambda rows, *_: rows.reshape(7))


def test_the_trial_has_an_expert_without_a_token_and_one_with_most():
    _, chosen, *_ = select_experts.make_check_inputs(SHAPE)
    loads = np.bincount(np.ravel(chosen), minlength=SHAPE.n_experts)
    assert min(loads) == 0 and max(loads) > 0.4 * chosen.size and sorted(loads)[1] < 64
    assert all(len(set(row)) == 2 for row in np.asarray(chosen[0]))
    _, alone, *_ = select_experts.make_check_inputs(SHAPE._replace(n_experts=1))
    assert not np.any(alone)


# ---- compiled for chips that are not here


def test_the_products_of_a_kernel_are_counted_by_the_rows_that_are_chosen(one, interpreted):
    """Two tiles of 128 rows at most are padding."""
    x, chosen, weights, experts, d_out = make_tokens("random")
    run = functools.partial(mixture.run_experts, jax.nn.silu, "megablox")
    program = jax.make_jaxpr(
        jax.value_and_grad(lambda x, w, e: jnp.sum(run(x, chosen, w, e) * d_out), argnums=(0, 1, 2))
    )(x, weights, experts)
    n_rows = 512  # of 288 assignments to 8 experts
    assert compile.count_matmul_flops(program) == 3 * 3 * 2 * n_rows * 24 * 40


# small layers of Mixtral and Solar Open
PUBLISHED = {
    "mixtral": (1792, {"n_experts": 8, "n_experts_per_token": 2}),
    "solar_open": (640, {"n_experts": 32, "n_experts_per_token": 8, "router": "sigmoid"}),
}


@pytest.mark.slow
@pytest.mark.parametrize("family", PUBLISHED)
@pytest.mark.parametrize("on", ["v5p:2x2x1", "h100:4"])
@pytest.mark.parametrize("mesh", [{}, {"fsdp": 1, "expert": 2, "tensor": 2}])
def test_a_mixtures_step_compiles_with_the_chips_kernel(family, on, mesh):
    """By name, which is never replaced; its products are those of the active parameters."""
    target = hardware.parse_target(on)
    kernel = {"tpu": "megablox", "cuda": "tokamax"}[target.chip.platform]
    missing = compile.find_missing_package(target)
    if not missing and kernel == "tokamax" and not importlib.util.find_spec(kernel):
        missing = kernel
    if missing:
        pytest.skip(f"{missing} is not installed")
    d_ff, fields = PUBLISHED[family]
    fields = {**fields, "family": family, "norm_topk_prob": True}
    settings = Config(
        model=ModelConfig(
            n_layers=2,
            d_model=1024,
            d_ff=d_ff,
            n_heads=8,
            n_kv_heads=2,
            d_head=128,
            vocab_size=8192,
            fields=tuple(fields.items()),
        ),
        pack=PackConfig(seq_len=2048),
        train=TrainConfig(batch_size=16, compute_dtype="bfloat16", experts=kernel),
        mesh=MeshConfig(**mesh),
    )
    (record,) = answer.plan_targets(settings, [on]).targets
    assert record.method == "compiled" and record.fits
    assert record.experts.startswith(f"{kernel}, the kernel for")
    attention = flops.count_attention_flops(cost.resolve_model_spec(settings)[0], 2048)
    expected = record.flops_per_token + attention  # whose backward computes its scores again
    assert record.executed_flops_per_token == pytest.approx(expected, rel=0.03)
