"""Test that the planner counts as the model does and compiles the real train step."""

import dataclasses
import json
import math
import re
import subprocess
import sys

import compilers
import entry_points
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import ROOT

from jaxpt import config, flops, hardware, io, sharding
from jaxpt.config import (
    Config,
    InitializeConfig,
    MeshConfig,
    MixtureConfig,
    ModelConfig,
    OptimConfig,
    PackConfig,
    TrainConfig,
)
from jaxpt.config import PlanConfig as PlanSection
from jaxpt.model import transformer
from jaxpt.plan import (
    answer,
    check,
    compile,
    cost,
    grow_or_scratch,
    roofline,
    scaling,
    search,
    transfer,
)
from jaxpt.plan.answer import TrainingPlan
from jaxpt.plan.scaling import ScalingLaw
from jaxpt.report.page import write_report
from jaxpt.spec import ModelSpec, UserError, encode_json
from jaxpt.train import optimizer, state, step
from jaxpt.train.records import NOTHING_DONE, HeldoutMetrics, TrainMetrics
from jaxpt.weights import checkpoint, huggingface

TINY_SOLAR = ModelSpec(
    n_layers=12, d_model=1024, d_ff=4096, n_heads=32, n_kv_heads=8, d_head=32, vocab_size=32_000
)
LLAMA3_8B = ModelSpec(
    n_layers=32, d_model=4096, d_ff=14_336, n_heads=32, n_kv_heads=8, d_head=128, vocab_size=128_256
)
SMALL = Config(
    model=ModelConfig(
        n_layers=5,
        d_model=24,
        d_ff=40,
        n_heads=6,
        n_kv_heads=2,
        d_head=8,
        vocab_size=96,
        max_seq_len=64,
    ),
    pack=PackConfig(seq_len=20),
    train=TrainConfig(batch_size=12, steps=300),
)
POD = Config(
    model=ModelConfig(
        n_layers=32,
        d_model=4096,
        d_ff=14_336,
        n_heads=32,
        n_kv_heads=8,
        d_head=128,
        vocab_size=128_256,
    ),
    pack=PackConfig(seq_len=4096),
    train=TrainConfig(batch_size=1024, compute_dtype="bfloat16"),
)


# ---- arithmetic


def test_published_models_have_their_published_size():
    assert transformer.count_params(TINY_SOLAR) == 248_013_824
    assert transformer.count_params(TINY_SOLAR.replace(n_layers=16)) == 308_839_424
    assert transformer.count_params(LLAMA3_8B) == 8_030_261_248


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_embeddings": True},
        {"qkv_bias": True, "out_bias": True, "mlp_bias": True},
        {"qk_norm": True},
        {"n_layers": 0},
    ],
    ids=lambda changes: "+".join(changes) or "plain",
)
def test_the_flops_formula_counts_the_models_own_products(spec, one, changes):
    spec = spec.replace(**changes)
    B, T = 3, 20
    params = transformer.make_abstract_params(spec, one)
    ids = jax.ShapeDtypeStruct((B, T), jnp.int32)

    def logits(params, tokens, segments, positions):
        return transformer.compute_logits(spec, params, tokens, segments, positions)

    counted = compile.count_matmul_flops(jax.make_jaxpr(logits)(params, ids, ids, ids))
    # one chunk of queries computes the upper triangle too, which the formula takes as not there
    triangle = 4 * spec.n_layers * spec.n_heads * spec.d_head * T / 2
    assert counted == B * T * (flops.count_forward_flops_per_token(spec, T) + triangle)


def test_the_products_of_a_mixture_count_on_every_device(one):
    """Its kernel is traced with the shapes of one of them, and executes no more than it chooses."""
    spec = ModelSpec(
        n_layers=2, d_model=48, d_ff=64, n_heads=6, n_kv_heads=2, d_head=8, vocab_size=96
    )
    mixture = spec.replace(family="mixtral", n_experts=8, n_experts_per_token=3)

    def count(spec, mesh, batch_size):
        train = dataclasses.replace(SMALL.train, batch_size=batch_size)
        settings = dataclasses.replace(SMALL, pack=PackConfig(seq_len=512), train=train)
        return compile.count_matmul_flops(compile.trace_step(spec, settings, mesh).jaxpr)

    spread = sharding.make_mesh(MeshConfig(fsdp=4, tensor=2))
    alone = count(mixture, one, 32)
    assert count(mixture, spread, 128) == 4 * alone
    dense = spec.replace(d_ff=mixture.active_d_ff)
    ring = sharding.fold_expert_axis(sharding.make_mesh(MeshConfig(fsdp=2, expert=2, tensor=2)))
    assert count(mixture, ring, 128) == 4 * alone
    dense = spec.replace(d_ff=mixture.active_d_ff)
    assert alone == pytest.approx(count(dense, one, 32), rel=0.03)


def test_a_layer_that_sees_all_positions_costs_more_than_one_with_a_window():
    T, W, L = 4096, 512, LLAMA3_8B.n_layers
    windowed = LLAMA3_8B.replace(sliding_window=W)
    mixed = windowed.replace(global_layers=(0, 5, 30))
    per_layer = 4 * LLAMA3_8B.n_heads * LLAMA3_8B.d_head
    seen = {"window": W - W * W / (2 * T), "all": T / 2}
    expected = per_layer * (3 * seen["all"] + (L - 3) * seen["window"])
    assert flops.count_attention_flops(mixed, T) == pytest.approx(expected)
    assert flops.count_attention_flops(windowed, T) == pytest.approx(per_layer * L * seen["window"])


def test_training_takes_six_per_parameter_and_six_lnht():
    T = 4096
    attention = 6 * LLAMA3_8B.n_layers * LLAMA3_8B.n_heads * LLAMA3_8B.d_head * T
    multiplied = (
        transformer.count_params(LLAMA3_8B) - LLAMA3_8B.vocab_size * LLAMA3_8B.d_model
    )  # no product looks a token up
    assert flops.count_flops_per_token(LLAMA3_8B, T) == pytest.approx(
        6 * multiplied + attention, rel=1e-4
    )  # the norms multiply nothing


def test_a_sliding_window_sees_what_a_loop_counts(spec):
    T, window = 20, 7
    seen = np.mean([min(position, window) for position in range(T)])
    assert flops.compute_mean_context(spec.replace(sliding_window=window), T) == pytest.approx(
        seen, abs=0.5
    )
    assert (
        flops.compute_mean_context(spec.replace(sliding_window=T + 1), T)
        == flops.compute_mean_context(spec, T)
        == T / 2
    )


def test_a_device_alone_receives_nothing(spec):
    alone = dict.fromkeys(dataclasses.asdict(MeshConfig()), 1)

    def count_received(mesh):
        share = roofline.DeviceShare.from_config(SMALL.train, SMALL.pack.seq_len, mesh)
        return roofline.estimate_comm_bytes(spec, share)

    axes = {"fsdp": "embed", "expert": "experts", "tensor": "mlp", "context": "position"}
    assert count_received(alone) == dict.fromkeys(axes.values(), 0)
    for cut, axis in axes.items():
        found = count_received(alone | {cut: 2})
        assert found[axis] > 0
    # with context 8 keys and values of 7 devices, or 7/8 of queries, keys, values and results
    share = roofline.DeviceShare.from_config(SMALL.train, 4096, alone | {"context": 8})
    passes = 3 * LLAMA3_8B.n_layers * share.microbatch_tokens * share.grad_accum_steps
    for attention, n_heads in (("xla", 7 * 2 * 8), ("splash", 7 / 8 * 2 * (32 + 8))):
        found = roofline.estimate_comm_bytes(LLAMA3_8B, share, attention)["position"]
        assert found == pytest.approx(passes * n_heads * 128 * share.compute_bytes)


@pytest.mark.parametrize("remat", ["none", "dots", "minimal", "full"])
def test_executed_products_by_formula_are_those_of_the_traced_step(remat, one):
    """A model whose head and scores are small beside its layers, as a large one's are."""
    spec = ModelSpec(
        n_layers=5, d_model=96, d_ff=320, n_heads=6, n_kv_heads=2, d_head=16, vocab_size=128
    )
    settings = dataclasses.replace(
        SMALL, pack=PackConfig(seq_len=32), train=dataclasses.replace(SMALL.train, remat=remat)
    )
    traced = step.build_step(
        spec, settings.train, settings.optim, settings.pack.seq_len, one
    ).trace(
        state.make_abstract_state(spec, settings.optim, one),
        step.make_abstract_batch(settings.train.batch_size, settings.pack.seq_len, one),
    )
    tokens = settings.train.batch_size * settings.pack.seq_len
    assert roofline.estimate_executed_flops_per_token(spec, 32, remat) == pytest.approx(
        compile.count_matmul_flops(traced.jaxpr) / tokens, rel=0.1
    )


OWN_MOMENTS = {
    "momentum": (lambda inputs: optax.trace(0.9), 1, 0),
    "amsgrad": (lambda inputs: optax.scale_by_amsgrad(), 3, 4),  # and a count of 4 bytes
}


@pytest.mark.parametrize(("make", "n_moments", "n_bytes"), OWN_MOMENTS.values(), ids=OWN_MOMENTS)
def test_a_registered_optimizer_is_planned_with_the_state_that_it_has(
    make, n_moments, n_bytes, spec, monkeypatch
):
    name = f"planned with {n_moments} moments"
    monkeypatch.setitem(optimizer.OPTIMIZERS, name, make)
    state_bytes = roofline.count_state_bytes(spec, OptimConfig(name=name), "bfloat16")
    mesh = {"replica": 1, "fsdp": 3, "expert": 1, "tensor": 2, "context": 1}
    found = roofline.estimate_step(spec, state_bytes, SMALL.train, 20, mesh, "xla")
    n_params = transformer.count_params(spec)
    assert found.params_bytes == round(2 * n_params / 6)
    assert found.opt_state_bytes == round(2 * n_moments * n_params / 6) + n_bytes
    assert found.restore_bytes == found.params_bytes + found.opt_state_bytes


# ---- the course's two examples


def compute_implied_mfu(flops_per_token, tokens, device_hours, peak_flops):
    """The MFU that a run must have had to train on the tokens in these device hours."""
    possible_flops = device_hours * 3600 * peak_flops
    return flops_per_token * tokens / possible_flops


def test_the_courses_248m_run_reaches_46_percent_at_13_dollars():
    peak = hardware.CHIPS["a100"].bfloat16_flops
    n = transformer.count_params(TINY_SOLAR)
    assert 6 * n * 39e9 == pytest.approx(5.8e19, rel=0.01)
    assert compute_implied_mfu(6 * n, 39e9, 16 * 7, peak) == pytest.approx(0.46, abs=0.005)
    assert pytest.approx(13.4, abs=0.05) == 1_500 / (16 * 7)
    # with attention counted and the embedding lookup not, rows of 4,096 make it a little more
    assert compute_implied_mfu(
        flops.count_flops_per_token(TINY_SOLAR, 4096), 39e9, 16 * 7, peak
    ) == pytest.approx(0.49, abs=0.01)


def test_a_name_of_a_card_means_one_memory_size():
    """Two A100 differ in memory alone; a100 is the 80 GB one everywhere."""
    for kind, name, gigabytes in (
        ("NVIDIA A100-SXM4-80GB", "a100", 85),
        ("NVIDIA A100 80GB PCIe", "a100", 85),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb", 42),
    ):
        chip = hardware.find_chip(kind)
        assert (chip.name, chip.memory_bytes // 10**9) == (name, gigabytes)
    kinds = [kind for chip in hardware.CHIPS.values() for kind in chip.device_kinds]
    assert len(kinds) == len(set(kinds))


def test_the_courses_7b_run_needs_55_percent_of_a100s_at_a_dollar_and_a_half():
    hours = 14 * 24
    assert compute_implied_mfu(
        6 * 7e9, 980e9, 200 * hours, hardware.CHIPS["a100"].bfloat16_flops
    ) == pytest.approx(0.545, abs=0.005)
    assert compute_implied_mfu(
        6 * 7e9, 980e9, 200 * hours, hardware.CHIPS["h100"].bfloat16_flops
    ) == pytest.approx(0.172, abs=0.005)
    assert 100_000 / (200 * hours) == pytest.approx(1.49, abs=0.01)


def test_growing_saves_two_thirds_only_while_the_base_is_free():
    base = LLAMA3_8B.replace(n_layers=24)
    child_flops = flops.count_flops_per_token(LLAMA3_8B, 4096)
    base_flops = flops.count_flops_per_token(base, 4096) * 3e12
    scratch_flops = child_flops * 3e12
    grown_flops = child_flops * 1e12
    assert 1 - grown_flops / scratch_flops == pytest.approx(2 / 3)
    assert grown_flops + base_flops > scratch_flops


# ---- hardware


def test_jaxs_device_names_find_their_chip():
    assert hardware.find_chip("TPU v5 lite").name == "v5e"
    assert hardware.get_peak_flops("NVIDIA H100 80GB HBM3", "bfloat16") == 989.4e12
    assert hardware.get_peak_flops("NVIDIA L40S", "bfloat16") is None
    assert hardware.get_peak_flops("cpu", "float32") is None


def test_a_run_on_cpu_has_flops_but_claims_no_peak_and_no_price(spec):
    known = flops.detect_device_cost(spec, SMALL.pack.seq_len, "float32", SMALL.plan)
    assert known.flops_per_token == flops.count_flops_per_token(spec, SMALL.pack.seq_len)
    assert known.peak_flops is None and known.usd_per_hour is None


def test_every_chip_is_complete():
    for chip in hardware.CHIPS.values():
        assert (
            chip.bfloat16_flops >= chip.float32_flops > 1e9
            and chip.memory_bytes >= 4 * hardware.GIB
            and 0 < chip.efficiency.low < chip.efficiency.high < 1
        )
        assert re.search(r"20\d\d", chip.price_source)  # when the price was read
        assert (chip.usd_per_hour is None) == ("no public list price" in chip.price_source) and (
            chip.usd_per_hour is None or "on demand" in chip.price_source
        )
        if chip.platform == "cuda":
            assert chip.gpu


def test_slices_are_the_offered_ones():
    for on, n in (
        ("v5e:2x2", 4),
        ("v6e:16x16", 256),
        ("v5p:4x4x4", 64),
        ("v5p:16x16x16", 4096),
        ("tpu7x:2x2x1", 8),
        ("h100:24", 24),
        ("cpu:3", 3),
    ):
        assert hardware.parse_target(on).n_devices == n


IMPOSSIBLE = {
    "unknown chip": ("v5q:4x4x4", [], "did you mean v5p"),
    "a chip's other name": ("tpu-v6e:4x4", [], "did you mean v6e"),
    "a misspelt card": ("h1000:8", [], "did you mean h100"),
    "no chip at all": ("toaster:1", [], "there are: v4, v5e"),
    "a topology that does not exist": ("v5p:3x3x3", [], "v5p:2x4x4 (32 chips)"),
    "axes in another order": ("v5p:8x4x4", [], "v5p:4x4x8 (128 chips)"),
    "a slice that is too large": ("v5e:32x32", [], "v5e:16x16 (256 chips)"),
    "a cube of a flat chip": ("v5e:4x4x4", [], "v5e:8x8 (64 chips)"),
    "no topology": ("v5p", [], "such as v5p:2x4x4"),
    "cards between hosts": ("h100:12", [], "such as 8 or 16"),
    "a topology of cards": ("h100:2x8", [], "such as h100:8"),
    "no device": ("cpu:0", [], "such as cpu:8"),
    "a batch that does not divide": (
        "cpu:5",
        [],
        "train.batch_size / train.grad_accum_steps = 12 cannot be sharded 5 ways",
    ),
    "a context that no mesh holds": (
        "cpu:3",
        ["--config.mesh.context=3", "--config.mesh.fsdp=1"],
        "Use a multiple of 3 (18 or 21)",
    ),
    "heads that do not divide": (
        "cpu:4",
        ["--config.mesh.tensor=4", "--config.mesh.fsdp=1"],
        "model.n_kv_heads = 2 cannot be sharded 4 ways",
    ),
    "a mesh of other devices": ("cpu:4", ["--config.mesh.fsdp=3"], "Set one axis to -1"),
    "two open axes": ("cpu:4", ["--config.mesh.tensor=-1"], "at most one -1"),
    "another platform's kernel": ("cpu:4", ["--config.train.attention=splash"], "Use auto"),
    "memory that a CPU does not have": (
        "cpu:4",
        ["--config.train.remat=offload"],
        "Use dots, minimal or full",
    ),
    "micro-batches that do not divide": (
        "cpu:4",
        ["--config.train.grad_accum_steps=5"],
        "Use a divisor of 12",
    ),
    "an unknown growth": ("cpu:4", ["--config.initialize.grow=('stakc()',)"], "stack"),
    "weights that are not there": (
        "cpu:4",
        ["--config.initialize.source=runs/nowhere"],
        "runs/nowhere",
    ),
}


@pytest.mark.parametrize("on, overrides, message", IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_what_is_impossible_is_refused_in_one_sentence_with_what_works(on, overrides, message):
    with pytest.raises(UserError) as refused:
        answer.plan_targets(
            config.build_config(
                config.apply_overrides(
                    overrides, config.apply_overrides([], dataclasses.asdict(SMALL))
                )
            ),
            [on],
        )
    assert message in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"check_run_dirs": ["nowhere"]}, "--check nowhere: no config.json"),
        ({"fit_run_dirs": ["nowhere"], "settings": SMALL}, "--fit nowhere: no config.json"),
        ({"law_name": "chinchila"}, "did you mean chinchilla?"),
        ({"base_usd": "cheap"}, "such as 100000, or free"),
    ],
)
def test_what_cannot_be_answered_is_refused_in_one_sentence(fields, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as refused:
        answer.run_plan(fields.pop("settings", None), answer.PlanRequest([], **fields))
    assert message in str(refused.value) and "\n" not in str(refused.value)


# ---- the real step


@pytest.fixture(scope="module")
def on_cpu():
    """The small config's plan on four CPU devices and on one, compiled."""
    return answer.plan_targets(SMALL, ["cpu:4", "cpu:1"])


def test_the_train_step_compiles_for_cpu_devices(on_cpu):
    record = on_cpu.targets[0]
    spec, _ = cost.resolve_model_spec(SMALL)
    assert record.method == "compiled" and record.fits and record.n_devices == 4
    assert math.prod(record.mesh.values()) == 4
    vectors = (2 * spec.n_layers + 1) * spec.d_model  # norms are whole on every device
    assert record.params_bytes == 4 * ((transformer.count_params(spec) - vectors) // 4 + vectors)
    assert record.opt_state_bytes == 2 * record.params_bytes + 4  # two moments and a counter
    assert record.temporary_bytes > record.params_bytes  # gradients at least
    assert record.executed_flops_per_token > record.flops_per_token


def test_one_recipe_serves_any_number_of_devices(on_cpu):
    four, one = on_cpu.targets
    assert [math.prod(each.mesh.values()) for each in (four, one)] == [4, 1]
    assert (
        one.params_bytes > 3 * four.params_bytes
        and one.comm_bytes_per_layer == 0 < four.comm_bytes_per_layer
    )


def test_restoring_takes_the_state_and_exporting_one_tensor_more(on_cpu):
    record = on_cpu.targets[0]
    assert record.restore_bytes == record.params_bytes + record.opt_state_bytes < record.peak_bytes
    spec, _ = cost.resolve_model_spec(SMALL)
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:4])
    whole = []
    for leaf in jax.tree.leaves(transformer.make_abstract_params(spec, mesh)):
        fetch = huggingface.make_gather(sharding.make_replicated_sharding(mesh))
        layer = jax.ShapeDtypeStruct((), jnp.int32)
        whole.append(
            fetch.lower(leaf, (layer,) if leaf.ndim > 2 else ())
            .compile()
            .memory_analysis()
            .output_size_in_bytes
        )
    assert record.export_bytes == record.params_bytes + max(whole)


def test_a_hosts_memory_holds_the_state_of_its_devices_while_it_is_saved():
    spec, settings, target, measured = planned(POD, "h100:16")
    record = cost.project_target(spec, settings, target, measured, 1e9)
    assert record.host_save_bytes == 8 * record.restore_bytes > record.host_restore_bytes
    assert record.host_export_bytes == spec.vocab_size * spec.d_model * 4
    alone = cost.project_target(*planned(POD, "cpu:1"), 1e9)
    assert alone.host_restore_bytes == checkpoint.CHUNK_BYTES < alone.host_save_bytes
    hosts = {
        on: hardware.parse_target(on).devices_per_host
        for on in ("v5p:4x4x4", "v5e:2x4", "v5e:4x4", "tpu7x:2x2x1", "h100:2", "cpu:3")
    }
    assert hosts == {
        "v5p:4x4x4": 4,
        "v5e:2x4": 8,
        "v5e:4x4": 4,
        "tpu7x:2x2x1": 8,
        "h100:2": 2,
        "cpu:3": 3,
    }


def test_the_compilers_own_count_stands_beside_ours(on_cpu):
    for record in on_cpu.targets:
        # theirs has what is no product too, which for a model of width 24 is much
        assert record.loop_body_flops <= record.compiler_flops <= 2 * record.loop_body_flops


def test_the_roof_bounds_what_is_expected(on_cpu):
    for record in on_cpu.targets:
        alone = [getattr(record, f"{part}_seconds") for part in ("compute", "memory", "network")]
        assert max(alone) <= record.fast.step_seconds < record.slow.step_seconds
        high = record.efficiency_range[1]
        assert (
            record.slow.mfu
            < record.fast.mfu
            <= high * record.flops_per_token / record.executed_flops_per_token * (1 + 1e-9)
        )


def test_collectives_are_read_off_the_loop_over_layers():
    """Eight stacked matrices of 5 layers, sharded over 4 devices, are gathered once per turn."""
    L, D = 5, 24
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:4])
    stacked = tuple(
        jax.ShapeDtypeStruct(
            (L, D, D),
            jnp.float32,
            sharding=sharding.make_logical_sharding(mesh, ("layers", "embed", None)),
        )
        for _ in range(8)
    )
    x = jax.ShapeDtypeStruct((8, D), jnp.float32, sharding=sharding.make_replicated_sharding(mesh))

    def run(x, stacked):
        def layer(x, weights):
            for weight in weights:
                x = jnp.tanh(
                    x
                    @ jax.lax.with_sharding_constraint(
                        weight, sharding.make_replicated_sharding(mesh)
                    )
                )
            return x, None

        return jax.lax.scan(layer, x, stacked)[0]

    (found,) = compile.count_layer_collectives(
        jax.jit(run).lower(x, stacked).compile().as_text(), L, mesh.size
    )
    assert (
        found["all-gather"].n_bytes == 8 * D * D * 4
        and sum(each.n_bytes for each in found.values()) == 8 * D * D * 4
    )
    assert roofline.count_received_bytes(found) == (8 * D * D * 4, 8 * D * D * 4)


def test_two_layers_in_a_turn_are_counted_as_two_and_a_first_micro_batch_not_again():
    """As XLA unrolls loops on GPUs: by two, and the first turn before the loop."""
    carried = ", ".join(["f32[9,24,40]{2,1,0}"] * 8)
    gather = "  %g = f32[24,40]{1,0} all-gather(%w), replica_groups=[1,4]<=[4]"

    def loop(body, more=""):
        return f"  %l = ({carried}) while(%t), condition=%c, body=%{body}{more}"

    step = (
        ', backend_config={"known_trip_count":{"n":"4"},"known_init_step":{"init":"1","step":"2"}}'
    )
    computations = {
        "%layers": [gather, gather],
        "%copy": [gather, gather],
        "%micro": [loop("layers", step)],
        "ENTRY %main": [loop("copy", step), loop("micro")],
    }
    text = ""
    for name, lines in computations.items():
        text += "\n".join([f"{name} (p: f32[]) -> f32[] {{", *lines, "}\n"])
    for domain_size, domain_bytes in ((4, 24 * 40 * 4), (3, 0)):
        (found,) = compile.count_layer_collectives(text, 9, domain_size)
        assert found == {"all-gather": compile.CollectiveCount(1, 24 * 40 * 4, domain_bytes)}


def test_a_started_collective_and_a_scattered_one_count_their_whole_arrays():
    gathered = (
        "  %g = (f32[6,24]{1,0}, f32[24,24]{1,0}) all-gather-start(%w), "
        "replica_groups=[1,4]<=[4], dimensions={0}"
    )
    scattered = (
        "  %s = bf16[6,24]{1,0} reduce-scatter(%w), replica_groups={{0,1,2,3}}, "
        "dimensions={0}, to_apply=%add"
    )
    assert compile.count_collective_bytes(gathered, "all-gather-start") == 24 * 24 * 4
    assert compile.count_collective_bytes(scattered, "reduce-scatter") == 24 * 24 * 2
    named = scattered.replace("{{0,1,2,3}}", "mesh['axis_0'=4,'axis_1'=5] {'axis_0'}")
    assert compile.count_collective_bytes(named, "reduce-scatter") == 24 * 24 * 2
    started = (
        "  %s = ((bf16[24,24]{1,0}, f32[4,8]{1,0}), (bf16[6,24]{1,0}, f32[1,8]{1,0})) "
        "reduce-scatter-start(%w, %v), replica_groups={{0,1,2,3}}, dimensions={0}, to_apply=%add"
    )
    n_bytes = compile.count_collective_bytes(started, "reduce-scatter-start")
    assert n_bytes == 24 * 24 * 2 + 4 * 8 * 4


def test_a_gather_that_runs_beside_several_matmuls_is_counted_once():
    """On a TPU it stands in each of their fusions: at its start, at its end and between."""

    def gather(channel, more=""):
        attributes = f"channel_id={channel}, replica_groups=[1,4]<=[4], dimensions={{0}}{more}"
        return f"  %g = f32[24,40]{{1,0}} all-gather(%w), {attributes}"

    chain = ', frontend_attributes={chain_id="0"}'
    computations = {
        **{f"%part{i} (p: f32[]) -> f32[] {{": [gather(7, chain)] for i in range(3)},
        "%other (p: f32[]) -> f32[] {": [gather(8, chain)],
        "%body (p: f32[]) -> f32[] {": [
            *(f"  %f = f32[] fusion(%p), kind=kOutput, calls=%part{i}" for i in range(3)),
            "  %f = f32[] fusion(%p), kind=kOutput, calls=%other",
            gather(9),
            gather(9),  # a copy of a loop's body has its channels, and gathers again
        ],
    }
    text = ""
    for header, lines in computations.items():
        text += "\n".join([header, *lines, "}\n"])
    found = compile.count_collectives(compile.split_computations(text), "body", 4, set())
    assert found == {"all-gather": compile.CollectiveCount(4, 4 * 24 * 40 * 4, 4 * 24 * 40 * 4)}


GROUPS = {
    "replica_groups={{0,4},{1,5},{2,6},{3,7}}": [0, 4],
    "source_target_pairs={{3,0},{0,1},{1,2},{2,3}}": [3, 0],
    "replica_groups=[2,4]<=[8]": [0, 1, 2, 3],
    "replica_groups=[4,2]<=[2,4]T(1,0)": [0, 4],
    "replica_groups=mesh['fsdp'=2,'tensor'=4] {'tensor'}": [0, 1, 2, 3],
    "replica_groups=mesh['fsdp'=2,'tensor'=4] {'fsdp'}": [0, 4],
}


@pytest.mark.parametrize(("text", "devices"), GROUPS.items())
def test_the_devices_of_a_collective_are_read_in_every_form(text, devices):
    line = f"  %r = f32[6,24]{{1,0}} all-reduce(%w), channel_id=1, {text}, to_apply=%add"
    assert compile.list_group(line) == devices


def test_what_moves_within_a_gpu_host_moves_at_the_speed_of_its_links():
    def seconds(on, **axes):
        target = hardware.parse_target(on)
        mesh = dict.fromkeys(sharding.MESH_AXES, 1) | axes
        knobs = dataclasses.replace(SMALL.train, batch_size=32, compute_dtype="bfloat16")
        spec = ModelSpec(
            n_layers=5, d_model=96, d_ff=320, n_heads=8, n_kv_heads=8, d_head=16, vocab_size=128
        )
        share = roofline.DeviceShare.from_config(knobs, 64, mesh)
        state_bytes = roofline.StateBytes(4, 0, 0, 0)
        analysis = roofline.estimate_step(spec, state_bytes, knobs, 64, mesh, "xla")
        received = roofline.estimate_comm_bytes(spec, share)
        found = roofline.compute_roofline(analysis, target, knobs).network_seconds
        return found, received["embed"], received["mlp"]

    within, between = 900e9 / 2, 100e9 / 2
    found, fsdp, tensor = seconds("h100:8", fsdp=2, tensor=4)
    assert found == pytest.approx((fsdp + tensor) / within)
    found, fsdp, tensor = seconds("h100:16", fsdp=4, tensor=4)
    assert found == pytest.approx(fsdp / between + tensor / within)
    found, fsdp, tensor = seconds("h100:16", fsdp=2, tensor=8)
    assert found == pytest.approx(fsdp / between + tensor / within)


RINGS = {  # target: the axes whose links close a ring, and the share of a chip's links in use
    "v5p:2x2x1": ((False, False, False), 2 / 6),
    "v5p:2x4x4": ((False, False, False), 3 / 6),
    "v5p:4x4x8": ((True, True, True), 1),
    "tpu7x:8x8x12": ((True, True, True), 1),
    "v5e:2x4": ((False, False), 2 / 4),
    "v6e:8x16": ((False, True), 3 / 4),
    "v5e:16x16": ((True, True), 1),
}


@pytest.mark.parametrize(("on", "expected"), RINGS.items())
def test_whole_cubes_and_the_sides_of_a_pod_are_rings(on, expected):
    target = hardware.parse_target(on)
    assert (target.wraps, target.used_links) == expected
    rate = target.chip.link_bandwidth / 2 * expected[1]
    assert target.count_receive_seconds(30e9, 30e9) == pytest.approx(30e9 / rate)
    assert hardware.parse_target("v5e:1x1").count_receive_seconds(0, 0) == 0


GATHER = """
from jax.sharding import NamedSharding, PartitionSpec

sharded = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
weight = jax.ShapeDtypeStruct((4096, 1408), jnp.bfloat16, sharding=sharded)
gather = jax.jit(lambda x: x * 2, out_shardings=NamedSharding(mesh, PartitionSpec()))
print(gather.lower(weight).compile().as_text())
"""


@pytest.mark.slow
@pytest.mark.parametrize("on", ["v5p:2x2x2", "v5p:4x4x4", "v5p:4x4x8", "v5e:4x4", "v6e:16x16"])
def test_a_slice_gathers_weights_and_does_not_add_them_up(on):
    """libtpu gathers by all-reduces, twice the traffic, on 64 chips without rings."""
    text = compilers.run_for(on, GATHER)
    assert " all-gather(" in text
    assert " all-reduce(" not in text


def test_hours_and_money_follow_from_speed(on_cpu):
    record = on_cpu.targets[0]
    assert on_cpu.tokens == 300 * 12 * 20
    assert record.expected.hours * 3600 * record.expected.tokens_per_second == pytest.approx(
        on_cpu.tokens
    )
    assert record.expected.usd == pytest.approx(record.expected.hours * 4 * record.usd_per_hour)
    assert record.fast.hours < record.expected.hours < record.slow.hours
    peak_flops = 4 * hardware.parse_target(record.target).chip.peak_flops("float32")
    model_flops = record.expected.tokens_per_second * record.flops_per_token
    assert record.expected.mfu == pytest.approx(model_flops / peak_flops)


def test_the_plan_is_plain_json_and_a_table(on_cpu):
    assert TrainingPlan.from_json(json.loads(json.dumps(on_cpu.to_json()))) == on_cpu
    assert any(
        "AWS c7i on demand" in note for note in on_cpu.notes
    )  # prices with their dates stand on the page too
    text = answer.format_plan(on_cpu)
    assert "yes, 4.0 GiB to spare" in text and "AWS c7i" in text


def test_a_target_without_its_compiler_is_estimated_and_message_so(on_cpu):
    if compile.find_missing_package(hardware.parse_target("v5e:2x2")) is None:
        pytest.skip("libtpu is installed: nothing is missing")
    (estimated,), (compiled, _) = (
        answer.plan_targets(SMALL, ["v5e:2x2"]).targets,
        on_cpu.targets,
    )
    assert estimated.method == "estimated"
    assert [getattr(estimated, key) for key in ("params_bytes", "opt_state_bytes", "mesh")] == [
        getattr(compiled, key) for key in ("params_bytes", "opt_state_bytes", "mesh")
    ]
    assert any(
        "estimated, not compiled: install libtpu" in note
        for note in cost.describe_assumptions(estimated)
    )


@pytest.mark.parametrize(
    ("on", "kernel", "remat"),
    [
        ("v5e:2x2", "xla", "none"),
        ("v5e:2x2", "splash", "offload"),
        ("h100:4", "xla", "none"),
        ("h100:4", "cudnn", "offload"),
    ],
)
def test_the_train_step_compiles_for_accelerators_with_their_kernels(on, kernel, remat):
    missing = compile.find_missing_package(hardware.parse_target(on))
    if missing:
        pytest.skip(f"{missing} is not installed")
    train = dataclasses.replace(
        SMALL.train, attention=kernel, remat=remat, compute_dtype="bfloat16"
    )  # a kernel by name is never replaced
    settings = dataclasses.replace(
        SMALL, pack=PackConfig(seq_len=256), train=train, mesh=MeshConfig(tensor=2)
    )
    (record,) = answer.plan_targets(settings, [on]).targets
    assert record.method == "compiled" and record.fits and record.attention == kernel
    auto = dataclasses.replace(train, attention="auto")
    seq_len, target = settings.pack.seq_len, hardware.parse_target(on)
    spec, _ = cost.resolve_model_spec(settings)
    mesh = {"tensor": 2, "context": 1}
    backend = roofline.predict_attention_backend(spec, seq_len, auto, mesh, target)
    assert backend in ("splash", "cudnn")
    assert record.executed_flops_per_token > record.flops_per_token
    assert len(record.layer_collectives) == 2 and all(
        sum(kind.n_ops for kind in loop.values()) > 0 for loop in record.layer_collectives
    )  # forward, backward


# ---- what is planned


def test_growth_is_planned_for_the_child():
    grown = dataclasses.replace(SMALL, initialize=InitializeConfig(grow=("depth_upscale(m=1)",)))
    assert cost.resolve_model_spec(grown)[0].n_layers == 8


def test_a_vocabulary_that_is_not_known_yet_is_guessed_aloud():
    spec, notes = cost.resolve_model_spec(
        dataclasses.replace(SMALL, model=dataclasses.replace(SMALL.model, vocab_size=0))
    )
    assert spec.vocab_size == 32_000
    assert "32,000" in notes[0]


def test_a_price_of_ones_own_goes_before_the_list():
    section = PlanSection(usd_per_hour=2.5)
    assert cost.resolve_usd_per_hour(hardware.CHIPS["h100"], section) == (
        2.5,
        "config.plan.usd_per_hour",
    )


def test_the_command_refuses_in_one_line():
    command = [
        sys.executable,
        str(ROOT / "scripts" / "plan.py"),
        "--config",
        str(ROOT / "configs" / "llama3_8b.py"),
        "--on",
        "v5p:5x5x5",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert (
        done.stderr.startswith("error: --on v5p:5x5x5: no such slice")
        and done.stderr.count("\n") == 1
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--config", "configs/llama3_8b.py"], "expected --on TARGET"),
        (["--on", "cpu:8"], "expected --config FILE"),
        (["--check", "runs/base", "--config.train.steps=3"], "Add --config FILE"),
        (
            ["--config", "configs/llama3_8b.py", "--on", "cpu:8", "--config.train.stpes=3"],
            "did you mean train.steps?",
        ),
    ],
)
def test_the_command_asks_for_what_is_missing(flags, message):
    done = subprocess.run(
        [sys.executable, "scripts/plan.py", *flags], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1 and message in done.stderr and done.stderr.count("\n") == 1


def test_the_command_plans_several_targets_and_leaves_the_stated_json(tmp_path):
    recipe = tmp_path / "recipe.py"
    recipe.write_text(
        f"from jaxpt.config import defaults\ndef get_config():\n    c = defaults()\n"
        f"    for section, knobs in {dataclasses.asdict(SMALL)!r}.items():\n"
        "        for name, value in knobs.items():\n"
        "            setattr(getattr(c, section), name, value)\n    return c\n"
    )
    words = [
        "--config",
        str(recipe),
        "--on",
        "cpu:2",
        "--on",
        "cpu:4",
        "--json",
        str(tmp_path / "new" / "plan.json"),
    ]
    status, message = entry_points.run_command(
        "plan", [*words, "--config.plan.tokens=1e9", "--config.plan.usd_per_hour=2"], tmp_path
    )
    assert status == 0, message
    targets = json.loads((tmp_path / "new" / "plan.json").read_text())["targets"]
    assert [each["target"] for each in targets] == ["cpu:2", "cpu:4"]
    for each in targets:
        assert each["method"] == "compiled" and each["fits"] is True and each["n_devices"] in (2, 4)
        assert each["peak_bytes"] > 0 and all(
            each["expected"][key] > 0 for key in ("tokens_per_second", "hours", "usd")
        )
        assert each["expected"]["usd"] == pytest.approx(
            each["expected"]["hours"] * each["n_devices"] * 2
        )
    assert "cpu:4" in message and "config.plan.usd_per_hour" in message


def test_the_page_shows_plan_search_ways_and_check(tmp_path):
    record = cost.project_target(*planned(POD, "v5p:4x4x4"), 1.6e11)
    record = dataclasses.replace(record, overrides=("--config.train.remat=dots",))
    other = cost.project_target(*planned(POD, "v6e:16x16"), 1.6e11)
    compared = grow_or_scratch.compare_strategies(
        LLAMA3_8B,
        4096,
        1.6e11,
        base=grow_or_scratch.BaseModel(with_layers(16), 8e10, 0.0),
        target_plan=record,
    )
    held = [
        {
            "run_dir": "runs/base",
            "planned_step_seconds": 0.25,
            "measured_step_seconds": 0.21,
            "time_ratio": 0.84,
            "calibrated_time_ratio": 1.0,
        }
    ]
    (tmp_path / "run").mkdir()
    found = {
        "targets": [record, other],
        "notes": [],
        "search": {"cheapest": other, "fastest": record, "n_tried": 9, "n_compiled": 2},
        "comparison": compared,
        "checks": held,
    }
    (tmp_path / "run" / "plan.json").write_text(json.dumps(encode_json(found)))
    write_report([tmp_path / "run"], tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    section = page[page.index(">Plan<") :]
    for words in (
        "Money against hours",
        "stacking",
        "late jump",
        compared.verdict[:40],
        "v5p:4x4x4 --config.train.remat=dots",
        "0.84",
    ):
        assert words in section, words


# ---- search


def test_every_layout_can_be_cut_and_is_a_config_to_paste():
    target = hardware.parse_target("cpu:4")
    spec, _ = cost.resolve_model_spec(SMALL)
    found = search.list_layouts(spec, SMALL, target)
    assert (
        len(
            {
                (
                    each.settings.mesh,
                    each.settings.train.grad_accum_steps,
                    each.settings.train.remat,
                )
                for each in found
            }
        )
        == len(found)
        > 20
    )
    for each in found:
        assert math.prod(each.analysis.mesh.values()) == 4
        pasted = config.build_config(
            config.apply_overrides(
                search.list_overrides(SMALL, each.settings),
                config.apply_overrides([], dataclasses.asdict(SMALL)),
            )
        )
        assert pasted == each.settings


def test_less_is_kept_with_every_remat_and_micro_batch():
    target = hardware.parse_target("v5p:4x4x4")
    by_layout = {
        (each.settings.train.grad_accum_steps, each.settings.train.remat): each
        for each in search.list_layouts(LLAMA3_8B, POD, target)
        if each.analysis.mesh == {"replica": 1, "fsdp": 64, "expert": 1, "tensor": 1, "context": 1}
    }
    needs = [by_layout[2, remat].required_bytes for remat in ("none", "dots", "minimal", "full")]
    assert needs == sorted(needs, reverse=True)
    needs = [by_layout[accumulate, "dots"].required_bytes for accumulate in (2, 4, 8, 16)]
    assert needs == sorted(needs, reverse=True)


def test_the_choice_is_the_fastest_unless_a_simpler_or_smaller_one_is_about_as_fast():
    found = search.list_layouts(LLAMA3_8B, POD, hardware.parse_target("v5p:4x4x4"))
    one = next(each for each in found if each.analysis.mesh["fsdp"] == 64)
    cut = next(
        each
        for each in found
        if each.analysis.mesh["tensor"] == 2 and each.analysis.mesh["context"] == 1
    )
    made = lambda like, seconds, n_bytes: like._replace(
        step_seconds=seconds, analysis=dataclasses.replace(like.analysis, peak_bytes=n_bytes)
    )
    slow, fast = made(one, 1.03, 9 * 10**10), made(cut, 1.0, 9 * 10**10)
    assert (
        search.choose_layout([slow, fast]) is slow
        and search.choose_layout([made(one, 1.06, 1), fast]) is fast
    )
    assert search.choose_layout([slow, fast, small := made(one, 1.04, 8 * 10**10)]) is small
    assert (
        search.choose_layout(
            [slow, fast, made(one, 1.049, 8 * 10**10)._replace(step_seconds=1.0601)]
        )
        is slow
    )


def test_the_search_answers_with_what_the_compiler_confirms():
    targets, found = search.search_layouts(SMALL, ["cpu:4"], {})
    (record,) = targets
    assert record.method == "compiled" and record.fits and found.n_compiled == 1 < found.n_tried
    assert found.cheapest is found.fastest is record
    assert all(override in search.format_search(targets, found) for override in record.overrides)


def test_a_search_without_the_compiler_estimates_and_message_so():
    if compile.find_missing_package(hardware.parse_target("v5e:4x4")) is None:
        pytest.skip("libtpu is installed: nothing is missing")
    targets, found = search.search_layouts(POD, ["v5e:4x4", "v5p:4x4x4"], {})
    assert [(each.method, each.missing_package, each.fits) for each in targets] == [
        ("estimated", "libtpu", True)
    ] * 2
    assert (
        found.n_compiled == 0
        and found.fastest.target == "v5p:4x4x4"
        and found.cheapest.target == "v5e:4x4"
    )
    assert "--on v5e:4x4 --config." in search.format_search(targets, found)


def test_the_search_goes_down_from_the_fastest_until_one_fits(monkeypatch):
    """A compiler that needs more than the arithmetic said teaches how much more."""
    target = hardware.parse_target("v5p:4x4x4")
    found = search.list_layouts(LLAMA3_8B, POD, target)
    request = []

    def measure(spec, settings, target):
        request.append(settings)
        (each,) = [each for each in found if each.settings == settings]
        peak_bytes = 2 * each.analysis.peak_bytes
        exceeds_memory = peak_bytes > 1.5 * target.usable_bytes
        return dataclasses.replace(
            each.analysis, peak_bytes=peak_bytes, exceeds_memory=exceeds_memory
        )

    monkeypatch.setattr(compile, "find_missing_package", lambda target: None)
    monkeypatch.setattr(compile, "analyze_step", measure)
    best, n_compiled = search.find_fitting_layout(LLAMA3_8B, target, found)
    assert best.analysis.peak_bytes <= target.usable_bytes and n_compiled == len(request) > 1
    tight = dataclasses.replace(target, chip=dataclasses.replace(target.chip, memory_bytes=10**6))
    assert search.find_fitting_layout(LLAMA3_8B, tight, found) == (None, 0)


def test_a_search_on_gpus_compiles_its_best_layout_unrolled_too(monkeypatch):
    """Only the compiler knows the memory and seconds of unrolled layers, and whether they fit."""

    def search_on(on, gib_more=1):
        layouts = search.list_layouts(LLAMA3_8B, POD, hardware.parse_target(on))

        def measure(spec, settings, target):
            n = settings.train.unroll_layers
            rolled = dataclasses.replace(settings.train, unroll_layers=0)
            settings = dataclasses.replace(settings, train=rolled)
            (each,) = [each for each in layouts if each.settings == settings]
            assert n in (0, LLAMA3_8B.n_layers)
            bytes_more = gib_more * 2**30 if n else 0
            return dataclasses.replace(
                each.analysis,
                peak_bytes=each.analysis.peak_bytes + bytes_more,
                analysis_seconds=170.0 if n else 13.0,
                missing_package=None,
            )

        monkeypatch.setattr(compile, "find_missing_package", lambda target: None)
        monkeypatch.setattr(compile, "analyze_step", measure)
        targets, found = search.search_layouts(POD, [on], {})
        return found, search.format_search(targets, found)

    found, text = search_on("h100:8")
    assert found.n_compiled == 2 and found.unrolled[0] in text
    assert "h100:8: with all 32 layers unrolled it takes +1.0 GiB and compiles in 170 s" in text
    assert "not 13. Published" in text and "--config.train.unroll_layers=32" in text
    found, text = search_on("h100:8", gib_more=40)
    assert "+40.0 GiB" in text and "does not fit." in text and "unroll_layers" not in text
    found, text = search_on("v5p:4x4x4")
    assert found.n_compiled == 1 and "unroll" not in text


@pytest.fixture
def without_compilers(monkeypatch):
    monkeypatch.setattr(compile, "find_missing_package", lambda target: "its compiler")


@pytest.mark.parametrize("factor", [1.0, 1.5])
def test_a_suggested_slice_is_compiled_and_what_is_refused_teaches(monkeypatch, factor):
    """A compiler that needs half as much again goes to a larger slice, or another layout."""
    chip = hardware.CHIPS["v5e"]
    layouts = {}
    for name in hardware.list_target_names(chip)[:8]:
        for each in search.list_layouts(LLAMA3_8B, POD, hardware.parse_target(name)):
            layouts[name, each.settings] = each
    needed = []

    def measure(spec, settings, target):
        analysis = layouts[target.name, settings].analysis
        needed.append(round(factor * analysis.peak_bytes))
        return dataclasses.replace(analysis, peak_bytes=needed[-1])

    monkeypatch.setattr(compile, "find_missing_package", lambda target: None)
    monkeypatch.setattr(compile, "analyze_step", measure)
    message = search.suggest_layout(LLAMA3_8B, POD, hardware.parse_target("v5e:2x2"))
    usable_bytes = hardware.parse_target("v5e:2x2").usable_bytes
    assert message.startswith("Compiled, the smallest v5e that fits is v5e:")
    assert needed[-1] <= usable_bytes and all(each > usable_bytes for each in needed[:-1])
    assert len(needed) == (1 if factor == 1 else 2)
    assert f"with {needed[-1] / 2**30:.1f} of" in message


def test_a_suggestion_that_no_compiled_step_confirmed_says_so(monkeypatch):
    def refuse(spec, settings, target):
        return dataclasses.replace(layout.analysis, exceeds_memory=True)

    target = hardware.parse_target("v5e:2x2")
    layout = search.list_layouts(LLAMA3_8B, POD, target)[0]
    monkeypatch.setattr(compile, "find_missing_package", lambda target: None)
    monkeypatch.setattr(compile, "analyze_step", refuse)
    message = search.suggest_layout(LLAMA3_8B, POD, target)
    assert message.startswith("By arithmetic, after 4 compiled steps that do not fit, the smallest")


def test_a_mixture_may_be_planned_with_sharded_experts():
    spec = LLAMA3_8B.replace(family="mixtral", n_experts=8, n_experts_per_token=2)
    found = search.list_layouts(spec, POD, hardware.parse_target("h200:8"))
    sizes = {each.analysis.mesh["expert"] for each in found}
    assert sizes == {1, 2, 4, 8}
    dense = search.list_layouts(LLAMA3_8B, POD, hardware.parse_target("h200:8"))
    assert {each.analysis.mesh["expert"] for each in dense} == {1}


def test_what_is_too_large_names_the_smallest_that_fits(without_compilers):
    message = search.suggest_layout(LLAMA3_8B, POD, hardware.parse_target("v5e:2x2"))
    on = re.search(r"is (v5e:\w+),", message)[1]
    smaller = [
        each
        for each in hardware.list_target_names(hardware.CHIPS["v5e"])
        if hardware.parse_target(each).n_devices < hardware.parse_target(on).n_devices
    ]
    assert on == "v5e:4x4" and "--config.train.grad_accum_steps=" in message
    for each in map(hardware.parse_target, smaller):
        assert all(
            layout.required_bytes > each.usable_bytes
            for layout in search.list_layouts(LLAMA3_8B, POD, each)
        )


def test_what_fits_with_other_settings_names_them(without_compilers):
    message = search.suggest_layout(
        LLAMA3_8B, POD, hardware.parse_target("h100:8")
    )  # 128 rows a card at once
    assert message.startswith("By arithmetic h100:8 fits it, with ")
    values = config.apply_overrides(
        re.findall(r"--config\S+=\w+", message), config.apply_overrides([], dataclasses.asdict(POD))
    )
    pasted = config.build_config(values)
    (record,) = [
        each
        for each in search.list_layouts(LLAMA3_8B, POD, hardware.parse_target("h100:8"))
        if each.settings == pasted
    ]
    assert record.required_bytes <= hardware.parse_target("h100:8").usable_bytes


def test_a_context_that_no_slice_holds_names_the_longest_that_one_does(without_compilers):
    endless = dataclasses.replace(
        POD, pack=PackConfig(seq_len=2**22), train=dataclasses.replace(POD.train, batch_size=1)
    )
    message = search.suggest_layout(LLAMA3_8B, endless, hardware.parse_target("l4:1"))
    longest = int(re.search(r"pack\.seq_len=(\d+)", message)[1])
    assert "no number of l4" in message and 1024 <= longest < 2**22


# ---- plan and run


def run_directory(path, settings, step_seconds, memory_bytes):
    """What train.py leaves of a run that went at this speed."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(dataclasses.asdict(settings)))
    io.write_json(path / "spec.json", cost.resolve_model_spec(settings)[0])
    (path / "starts.jsonl").write_text(
        json.dumps({"n_devices": 1, "device_kind": "cpu", "step": 0}) + "\n"
    )
    n_tokens = settings.train.batch_size * settings.pack.seq_len
    lines = [
        TrainMetrics(
            step=10 * i,
            loss=3.0,
            grad_norm=1.0,
            lr=1e-3,
            epochs={},
            tokens_per_second=n_tokens / (step_seconds * (5 if i == 1 else 1)),
            step_seconds=step_seconds * (5 if i == 1 else 1),
            mfu=None,
            memory_bytes=int(memory_bytes),
            n_skipped=0,
            **vars(NOTHING_DONE),
        ).to_json()
        for i in range(1, 6)
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.slow
def test_a_plan_is_held_against_runs_and_the_first_calibrates(tmp_path):
    wide = dataclasses.replace(SMALL, model=dataclasses.replace(SMALL.model, d_model=48))
    found = check.compare_plan_to_runs(
        [
            run_directory(tmp_path / "a", SMALL, 0.02, 3e8),
            run_directory(tmp_path / "b", wide, 0.05, 4e8),
        ]
    )
    first, second = found
    assert first.calibrated_time_ratio == first.calibrated_memory_ratio == 1
    assert (
        first.measured_step_seconds == 0.02
        and first.time_ratio == 0.02 / first.planned_step_seconds
    )
    assert second.calibrated_time_ratio == pytest.approx(
        0.05 / second.planned_step_seconds / first.time_ratio
    )
    assert second.calibrated_memory_ratio == pytest.approx(
        4e8 / (second.planned_memory_bytes + 3e8 - first.planned_memory_bytes)
    )
    assert "calibrates the others" in check.format_plan_checks(
        found
    ) and check.compute_time_calibrations(found) == {"cpu": first.time_ratio}
    calibrated = cost.project_target(*planned(SMALL, "cpu:4"), 1e6, 7.0)
    assert calibrated.expected.hours == pytest.approx(
        7 * cost.project_target(*planned(SMALL, "cpu:4"), 1e6).expected.hours
    )


@pytest.mark.parametrize(
    ("kind", "n", "on"),
    [
        ("NVIDIA H100 80GB HBM3", 8, "h100:8"),
        ("TPU v5p", 64, "v5p:4x4x4"),
        ("TPU v5 lite", 4, "v5e:2x2"),
        ("TPU7x", 8, "tpu7x:2x2x1"),
        ("cpu", 3, "cpu:3"),
    ],
)
def test_the_devices_of_a_run_are_a_target(kind, n, on):
    found = check.find_run_target("runs/base", n, kind)
    assert found.name == on and found.n_devices == n
    with pytest.raises(UserError, match="not in the table of chips"):
        check.find_run_target("runs/base", n, "Toaster 3000")


def planned(settings, on):
    """(spec, settings, target, what arithmetic knows): what cost.record takes."""
    target = hardware.parse_target(on)
    spec, _ = cost.resolve_model_spec(settings)
    mesh = {"replica": 1, "fsdp": target.n_devices, "expert": 1, "tensor": 1, "context": 1}
    state_bytes = roofline.count_state_bytes(spec, settings.optim, "float32")
    seq_len = settings.pack.seq_len
    measured = roofline.estimate_step(spec, state_bytes, settings.train, seq_len, mesh, "fused")
    return spec, settings, target, measured


@pytest.mark.parametrize(
    ("stack", "on", "shape", "published"),
    [
        (
            "MaxText, 8B on 256 v6e: 7,207 tokens/s a chip",
            "v6e:16x16",
            (32, 4096, 14_336, 32, 8, 128, 128_256, 8192, 2),
            0.455,
        ),
        (
            "MaxText, 70B on 256 v6e",
            "v6e:16x16",
            (80, 8192, 28_672, 64, 8, 128, 128_256, 8192, 2),
            0.503,
        ),
        (
            "MaxText, 32B on v5p",
            "v5p:4x4x4",
            (64, 5120, 27_648, 40, 8, 128, 152_064, 8192, 4),
            0.648,
        ),
        (
            "MaxText, Llama 2 7B on 8 H100",
            "h100:8",
            (32, 4096, 11_008, 32, 32, 128, 32_000, 4096, 4),
            0.497,
        ),
        (
            "torchtitan, 8B on 8 H100: 6,667 tokens/s a card",
            "h100:8",
            (32, 4096, 14_336, 32, 8, 128, 128_256, 8192, 1),
            None,
        ),
        (
            "the course, 248M on 16 A100",
            "a100:16",
            (12, 1024, 4096, 32, 8, 32, 32_000, 4096, 16),
            None,
        ),
    ],
)
def test_published_speeds_lie_in_the_expected_range(stack, on, shape, published):
    """Theirs count full attention; sequences per device are ours where unpublished. Remat dots."""
    *sizes, seq_len, rows = shape
    model = dict(
        zip(
            ("n_layers", "d_model", "d_ff", "n_heads", "n_kv_heads", "d_head", "vocab_size"),
            sizes,
            strict=True,
        )
    )
    n = hardware.parse_target(on).n_devices
    settings = Config(
        model=ModelConfig(**model),
        pack=PackConfig(seq_len=seq_len),
        train=TrainConfig(batch_size=rows * n, remat="dots", compute_dtype="bfloat16"),
    )
    spec, _ = cost.resolve_model_spec(settings)
    record = cost.project_target(*planned(settings, on), 1e9)
    if message := re.search(r"([\d,]+) tokens/s", stack):
        mfu = (
            float(message[1].replace(",", ""))
            * record.flops_per_token
            / hardware.parse_target(on).chip.bfloat16_flops
        )
    elif published:
        causal = flops.count_flops_per_token(spec, seq_len)
        mfu = published * causal / (2 * causal - 6 * flops.count_matmul_params(spec))
    else:
        mfu = compute_implied_mfu(
            record.flops_per_token, 39e9, 16 * 7, hardware.CHIPS["a100"].bfloat16_flops
        )
    assert record.slow.mfu < mfu < record.fast.mfu, stack


# ---- grow or scratch


CHINCHILLA = scaling.SCALING_LAWS["chinchilla"]


@pytest.mark.parametrize("law", scaling.SCALING_LAWS.values(), ids=scaling.SCALING_LAWS)
def test_a_laws_tokens_reach_its_loss_and_no_size_goes_below_its_floor(law):
    loss = law.predict_loss(8e9, 1.6e11)
    assert law.compute_tokens_to_loss(8e9, loss) == pytest.approx(1.6e11)
    assert law.compute_tokens_to_loss(8e9, law.compute_loss_floor(8e9)) == math.inf
    assert 1.5 < loss < 3 and law.predict_loss(7e10, 1.4e12) == pytest.approx(
        CHINCHILLA.predict_loss(7e10, 1.4e12), abs=0.15
    )


def test_chinchillas_own_model_has_its_published_loss():
    assert CHINCHILLA.predict_loss(70e9, 1.4e12) == pytest.approx(
        1.94, abs=0.01
    )  # 2203.15556: 1.69 + 0.08 + 0.16


def test_a_fit_finds_the_law_that_made_the_losses_and_its_interval_holds_it():
    rng = np.random.default_rng(0)
    points = [
        scaling.LossPoint(
            n, tokens, CHINCHILLA.predict_loss(n, tokens) * (1 + 0.002 * rng.standard_normal())
        )
        for n in (3e6, 1e7, 4e7)
        for tokens in np.geomspace(2e7, 2e9, 8)
    ]
    found = scaling.fit_scaling_law(points, dataclasses.replace(CHINCHILLA, A=1.0, B=1.0, E=0.0))
    low, middle, high = found.predict_loss_interval(1e8, 4e9)
    assert low < middle < high and high - low < 0.2
    assert (
        middle == pytest.approx(CHINCHILLA.predict_loss(1e8, 4e9), abs=0.05)
        and low - 0.02 < CHINCHILLA.predict_loss(1e8, 4e9) < high + 0.02
    )
    assert found.law.describe_extrapolation(1e8, 4e9) == [
        "2.5 times the size of its runs",
        "2 times their tokens",
    ]
    assert not found.law.describe_extrapolation(1e7, 1e9)


def test_one_size_leaves_the_sizes_share_to_the_prior_and_message_so():
    points = [
        scaling.LossPoint(10_000_000, tokens, CHINCHILLA.predict_loss(1e7, tokens))
        for tokens in np.geomspace(2e7, 2e9, 8)
    ]
    found = scaling.fit_scaling_law(points, CHINCHILLA, n_bootstrap=20)
    assert found.law.alpha == CHINCHILLA.alpha and found.law.A == CHINCHILLA.A
    assert found.law.predict_loss(1e7, 4e9) == pytest.approx(
        CHINCHILLA.predict_loss(1e7, 4e9), rel=0.01
    )
    assert "A and alpha are the prior's" in scaling.describe_scaling_fit(found)[0]
    with pytest.raises(UserError, match="expected at least 4"):
        scaling.fit_scaling_law(points[:3], CHINCHILLA)


def with_layers(n):
    return LLAMA3_8B.replace(n_layers=n)


def by_name(found):
    return {each.name: each for each in found.strategies}


def test_scratch_is_the_measure_and_a_free_base_is_counted_in_one_column_only():
    base = grow_or_scratch.BaseModel(with_layers(20), 8e10, 0.0)
    found = grow_or_scratch.compare_strategies(LLAMA3_8B, 4096, 1.6e11, base=base)
    scratch, stacked = by_name(found)["scratch"], by_name(found)["stacking"]
    assert (
        scratch.saved_frac == (0, 0)
        and scratch.tokens == pytest.approx([1.6e11] * 2)
        and scratch.loss == (found.target_loss,) * 2
    )
    base_flops = flops.count_flops_per_token(base.spec, 4096) * base.tokens
    assert [
        b - a for a, b in zip(stacked.flops, stacked.flops_with_base, strict=True)
    ] == pytest.approx([base_flops] * 2)
    assert (
        stacked.saved_frac == pytest.approx([0.22, 0.45])
        and stacked.saved_with_base_frac[1] < stacked.saved_frac[1]
    )


@pytest.fixture
def factors(monkeypatch):
    """Made up, the same in every strategy."""
    made_up = {
        name: known._replace(low=0.75, high=1.25, growth=8.0)
        for name, known in transfer.TRANSFERS.items()
    }
    monkeypatch.setattr(grow_or_scratch, "TRANSFERS", made_up)


def test_small_runs_forecast_what_a_bases_loss_is_worth_from_scratch(factors):
    base = grow_or_scratch.BaseModel(with_layers(16), 8e10, None)
    found = grow_or_scratch.compare_strategies(LLAMA3_8B, 4096, 1.6e11, base=base)
    n = transformer.count_params(LLAMA3_8B)
    base_loss = CHINCHILLA.predict_loss(base.n_params, base.tokens)
    worth = transfer.compute_worth(CHINCHILLA, base.n_params, base.tokens, n)
    assert CHINCHILLA.predict_loss(n, worth) == pytest.approx(base_loss)
    assert worth < 8e10  # more parameters learn faster
    for name in ("depth up-scaling", "stacking", "random layers", "width growth"):
        grown = by_name(found)[f"{name} (small runs)"]
        assert grown.tokens == pytest.approx([1.6e11 - 1.25 * worth, 1.6e11 - 0.75 * worth])
        assert grown.loss[1] == pytest.approx(CHINCHILLA.predict_loss(n, 1.6e11 + 0.75 * worth))
    assert "by small runs, " in found.verdict


def test_growth_far_beyond_the_small_runs_may_count_nothing():
    known = transfer.Transfer(0.7, 1.3, 2.0, "an arm")
    assert transfer.limit_factor(known, 3.0) == ((1.3, 0.7), ())
    (best, worst), (note,) = transfer.limit_factor(known, 3.1)
    assert (best, worst) == (1.3, 0.0) and "3.1 times the base, small runs 2 times" in note


@pytest.mark.parametrize("factor", [0.6, 1.0, 1.7])
def test_an_untrained_child_is_at_best_its_base_and_tokens_count_there_and_back(factor):
    worth = 70.0
    assert transfer.count_effective_tokens(0, worth, factor) == min(factor, 1) * worth
    assert transfer.count_effective_tokens(500, worth, factor) == 500 + factor * worth
    for tokens in (11.0, 69.0, 71.0, 500.0):
        effective = transfer.count_effective_tokens(tokens, worth, factor)
        again = transfer.count_tokens_after_growth(effective, worth, factor)
        assert again == pytest.approx(tokens)
    assert transfer.count_tokens_after_growth(0.5 * worth, worth, factor) == 0


def test_a_late_jump_by_small_runs_is_as_good_as_scratch_after_its_tokens(factors):
    found = by_name(grow_or_scratch.compare_strategies(LLAMA3_8B, 4096, 1.6e11))
    jump = found["late jump from one layer (small runs)"]
    one = transformer.count_params(with_layers(1))
    n = transformer.count_params(LLAMA3_8B)
    for tokens, factor in zip(jump.tokens, (1.25, 0.75), strict=True):
        worth = transfer.compute_worth(CHINCHILLA, one, 0.5 * tokens, n)
        assert 0.5 * tokens + factor * worth == pytest.approx(1.6e11)
    per_token = [flops.count_flops_per_token(with_layers(layers), 4096) for layers in (1, 32)]
    assert jump.flops[0] == pytest.approx(jump.tokens[0] * sum(per_token) / 2)
    assert jump.flops == jump.flops_with_base  # its base is of the run itself


def test_a_base_below_the_target_is_continued_and_not_grown(factors):
    base = grow_or_scratch.BaseModel(with_layers(30), 3e13, 0.0)
    found = grow_or_scratch.compare_strategies(LLAMA3_8B, 4096, 1.6e11, base=base)
    assert by_name(found)["stacking (small runs)"].tokens == (0, 0)
    assert "base for free: continuing the base." in found.verdict
    never = grow_or_scratch.compare_strategies(LLAMA3_8B, 4096, 1.6e11, target_loss=1.7)
    assert by_name(never)["late jump from one layer (small runs)"].tokens == (None, None)


def test_growth_beyond_what_is_published_promises_less():
    def saved(layers, budget, tokens):
        base = grow_or_scratch.BaseModel(with_layers(layers), tokens, 0.0)
        return by_name(grow_or_scratch.compare_strategies(LLAMA3_8B, 4096, budget, base=base))[
            "stacking"
        ].saved_frac

    published = saved(20, 1.5e11, 5e10)
    assert saved(10, 1.5e11, 5e10)[0] == 0  # three times the base
    assert saved(3, 1.5e11, 2e10) == pytest.approx([0, 0])  # nine times
    assert saved(20, 6e11, 5e10)[1] < 0.5 * published[1]  # 75 tokens per parameter
    assert (
        saved(20, 1.5e11, 3e12)[1] < 0.6 * published[1] and saved(20, 1.5e11, 3e12)[0] == 0
    )  # an overtrained base


def test_train_from_scratch_and_continue_the_base_are_answers():
    overtrained = grow_or_scratch.compare_strategies(
        LLAMA3_8B, 4096, 1.6e11, base=grow_or_scratch.BaseModel(with_layers(24), 3e12, 0.0)
    )
    assert "base for free: continuing the base." in overtrained.verdict
    tiny = grow_or_scratch.compare_strategies(
        LLAMA3_8B,
        4096,
        1.6e11,
        base=grow_or_scratch.BaseModel(with_layers(2), 1e10, None),
    )
    assert "base for free: scratch if little" in tiny.verdict
    assert "by small runs, scratch or late jump from one layer. With" in tiny.verdict
    assert "times the base" in by_name(tiny)["stacking (small runs)"].notes[0]
    low = grow_or_scratch.compare_strategies(
        LLAMA3_8B,
        4096,
        1.6e11,
        base=grow_or_scratch.BaseModel(with_layers(16), 8e10, 0.0),
        target_loss=2.0,
    )
    assert (
        by_name(low)["continuing the base"].tokens == (None, None)
        or by_name(low)["continuing the base"].tokens[0] > 8e10
    )
    never = grow_or_scratch.compare_strategies(
        LLAMA3_8B,
        4096,
        1.6e11,
        base=grow_or_scratch.BaseModel(with_layers(16), 8e10, 0.0),
        target_loss=1.7,
    )
    assert by_name(never)["continuing the base"].tokens == (
        None,
        None,
    ) and "never" in grow_or_scratch.format_strategies(never)
    assert [grow_or_scratch.format_saved_frac(value) for value in (-0.004, 0.004, -0.5)] == [
        "0%",
        "0%",
        "-50%",
    ], "nothing saved has no sign"


def test_seventy_percent_is_the_hopeful_end_of_width_and_late_jumps_with_the_base_for_nothing():
    half = grow_or_scratch.BaseModel(with_layers(16), 4e10, None)
    found = by_name(grow_or_scratch.compare_strategies(LLAMA3_8B, 4096, 1.6e11, base=half))
    holds = {name for name, each in found.items() if each.saved_frac[1] >= 0.7}
    assert holds == {"width growth", "late jump from one layer"}
    assert {name for name, each in found.items() if each.saved_with_base_frac[1] >= 0.7} == {
        "late jump from one layer"
    }
    assert not any(
        each.saved_frac[0] >= 0.7 for each in found.values()
    )  # no cautious reading gives it


def test_a_larger_base_is_pruned_and_a_smaller_one_grown():
    names = lambda n: set(
        by_name(
            grow_or_scratch.compare_strategies(
                LLAMA3_8B, 4096, 1.6e11, base=grow_or_scratch.BaseModel(with_layers(n), 1e11, None)
            )
        )
    )
    assert grow_or_scratch.PRUNING.name in names(48) and "stacking" not in names(48)
    assert grow_or_scratch.PRUNING.name not in names(16) and {
        "stacking",
        "random layers",
        "width growth",
        "depth up-scaling",
    } <= names(16)


@pytest.mark.parametrize(
    ("call", "strategy"),
    [
        ("stack(g=2)", "stacking"),
        ("deepen(L=8)", "random layers"),
        ("deepen(L=8, new='copy')", "stacking"),
        ("insert_identity(every=1)", "depth up-scaling"),
        ("widen_rms(d=96)", "width growth"),
        ("narrow(ff=96)", "pruning a larger one"),
        ("upcycle(experts=4)", None),
        ("extend_context(length=512)", None),
    ],
)
def test_a_grown_run_of_ones_own_counts_for_its_operators_strategy(call, strategy):
    assert grow_or_scratch.find_strategy_name(check.Growth(call, 0)) == strategy


def test_money_and_hours_of_a_way_are_the_plans():
    budget = 1.6e11
    record = cost.project_target(*planned(POD, "v5p:4x4x4"), budget)
    found = by_name(
        grow_or_scratch.compare_strategies(
            LLAMA3_8B,
            4096,
            budget,
            base=grow_or_scratch.BaseModel(with_layers(16), 8e10, 5_000.0),
            target_plan=record,
        )
    )
    assert found["scratch"].hours == pytest.approx([record.expected.hours] * 2) and found[
        "scratch"
    ].usd == pytest.approx([record.expected.usd] * 2)
    assert found["scratch"].usd_with_base == found["scratch"].usd
    assert found["stacking"].usd_with_base == pytest.approx(
        [usd + 5_000 for usd in found["stacking"].usd]
    )


def test_g_stacks_timing_is_its_formula():
    assert math.log10(grow_or_scratch.compute_stack_tokens(7e9, 1e22)) == pytest.approx(
        0.88 * math.log10(7e9) + 163.27 / 22 - 5.74
    )


def test_a_law_fitted_to_a_run_of_two_batches_is_that_of_its_tokens(tmp_path):
    """The batch is four times as large from step 800 on."""
    law = ScalingLaw(1.0, 20.0, 0.34, 300.0, 0.4, "made up", (1e3, 1e6), 1e9)
    path = run_directory(tmp_path / "run", SMALL, 1.0, 1e8)
    n = transformer.count_params(cost.resolve_model_spec(SMALL)[0])
    points, lines = [], []
    for at in (200, 400, 800, 1600, 3200, 6400):
        n_tokens = 240 * min(at, 800) + 960 * max(at - 800, 0)
        loss = law.predict_loss(n, n_tokens)
        points.append(scaling.LossPoint(n, float(n_tokens), loss))
        sums = dataclasses.replace(NOTHING_DONE, n_tokens=n_tokens)
        lines.append(json.dumps(HeldoutMetrics(at, {"prose": loss}, 30, **vars(sums)).to_json()))
    (path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    fitted, _ = grow_or_scratch.fit_runs([path], CHINCHILLA)
    by_hand = scaling.fit_scaling_law(points, CHINCHILLA)
    assert fitted.points == by_hand.points
    for n_tokens in (1e5, 1e7):
        expected = by_hand.law.predict_loss(n, n_tokens)
        assert fitted.law.predict_loss(n, n_tokens) == pytest.approx(expected, rel=1e-9)


def test_a_plan_is_checked_by_the_steps_of_todays_batch_and_devices(tmp_path):
    """Records before a change of either are of other steps."""
    path = run_directory(tmp_path / "run", SMALL, 0.02, 3e8)
    file = path / "metrics.jsonl"
    records = [json.loads(line) for line in file.read_text().splitlines()]
    slow = [
        {**record, "step": record["step"] - 50, "step_seconds": 0.08} for record in records
    ]  # of four times the tokens
    lines = [json.dumps(record) + "\n" for record in (*slow, *records)]
    file.write_text("".join(lines))
    run = check.read_run(path, "--check")
    devices = check.read_devices(run)
    assert [speed.step_seconds for speed in check.list_speeds(run, devices)] == [0.1, *[0.02] * 4]
    with open(path / "starts.jsonl", "a", encoding="utf-8") as starts:
        starts.write("half a li\n")
        for step in (20, 30):
            starts.write(json.dumps({"n_devices": 2, "device_kind": "cpu", "step": step}) + "\n")
    devices = check.read_devices(run)
    assert devices == (2, "cpu", 20)
    assert [speed.step_seconds for speed in check.list_speeds(run, devices)] == [0.02] * 3


def test_a_plan_is_checked_by_the_steps_of_the_planned_shape_alone(tmp_path):
    """Shorter sequences with as many tokens per step take another time."""
    shapes = ((0, 24, 10), (15, 12, 20), (45, 24, 10))
    train = dataclasses.replace(SMALL.train, shape_schedule=shapes)
    path = run_directory(tmp_path / "run", dataclasses.replace(SMALL, train=train), 0.02, 3e8)
    run = check.read_run(path, "--check")
    assert run.tokens_per_step == 240 and run.settings.pack.seq_len == 20
    speeds = check.list_speeds(run, check.read_devices(run))
    assert len(speeds) == 2  # of records after 10, 20, ... 50 steps those after 30 and 40


def test_ones_own_runs_replace_law_and_gain(tmp_path):
    """A run from scratch by a known law, and one that was stacked and needs 40 % of its tokens."""
    tokens_per_step = 12 * 20

    def write(name, gain=None, prose=3.0):
        settings = dataclasses.replace(
            SMALL, mixture=MixtureConfig(phases=((0, {"prose": prose, "code": 1.0}),))
        )
        path = run_directory(tmp_path / name, settings, 1.0, 1e8)
        n = transformer.count_params(cost.resolve_model_spec(settings)[0])
        lines = []
        for at in (200, 400, 800, 1600, 3200, 6400):
            loss = law.predict_loss(n, at * tokens_per_step / (gain or 1))
            losses = {"prose": loss + 0.1, "code": loss - 0.3, "unread": 9.0}
            sums = dataclasses.replace(NOTHING_DONE, n_tokens=at * tokens_per_step)
            lines.append(HeldoutMetrics(at, losses, 30, **vars(sums)).to_json())
        (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        if gain:
            (path / "growth.json").write_text(
                json.dumps({"operators": ["stack(g=2)"], "at_step": None})
            )
        return path

    law = ScalingLaw(1.0, 20.0, 0.34, 300.0, 0.4, "made up", (1e3, 1e6), 1e9)
    fitted, gains = grow_or_scratch.fit_runs(
        [write("scratch"), write("stacked", gain=0.4)], CHINCHILLA
    )
    assert fitted.law.predict_loss(*fitted.points[3][:2]) == pytest.approx(
        fitted.points[3].loss, rel=0.01
    )
    low, high = gains["stacking"]
    assert low - 0.02 <= 0.6 <= high + 0.02
    found = grow_or_scratch.compare_strategies(
        LLAMA3_8B,
        4096,
        1.6e11,
        base=grow_or_scratch.BaseModel(with_layers(16), 8e10, 0.0),
        scaling_fit=fitted,
        measured_savings=gains,
    )
    assert by_name(found)["stacking"].saved_frac == pytest.approx([low, high])
    assert any("The law is extrapolated" in note for note in found.notes)
    assert (
        grow_or_scratch.fit_runs(
            [tmp_path / "scratch", write("elsewhere", gain=0.4, prose=9.0)], CHINCHILLA
        )[1]
        == {}
    )  # another mixture tells nothing
    with pytest.raises(UserError, match="at least one run from scratch"):
        grow_or_scratch.fit_runs([tmp_path / "stacked"], CHINCHILLA)
    with pytest.raises(UserError, match="one law holds for one mixture"):
        grow_or_scratch.fit_runs([tmp_path / "scratch", write("other", prose=9.0)], CHINCHILLA)


@pytest.mark.parametrize(
    ("ends", "text"),
    [
        ([0.003, 0.0112], "10.8 to 40.3 seconds"),
        ([0.0133, 0.0435], "0.798 to 2.61 minutes"),
        ([27.4, 13.3], "13.3 to 27.4 hours"),
        ([106.2, 105.9], "106 hours"),
        ([None, 0.5], "30 minutes"),
    ],
)
def test_time_is_in_a_unit_that_suits_it_and_one_value_where_both_ends_read_the_same(ends, text):
    assert cost.format_hours(ends) == text


def test_a_small_plan_has_no_range_from_a_value_to_itself_and_no_vanishing_amount(on_cpu):
    text = answer.format_plan(on_cpu)
    assert not re.search(r"(?<!\S)(\S+) to \1(?!\S)", text)
    rows = {line[:5].strip(): line for line in text.splitlines()}
    assert "seconds" in rows["time"] and "e-" not in rows["usd"] + rows["kWh"]
