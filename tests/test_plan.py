"""Laws of the planner: its arithmetic is the model's, the course's examples come out, and what is compiled is the train step."""

import dataclasses
import json
import math
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT

from jaxpt.config import Config, Initialize, Mesh, Model, Pack, Train
from jaxpt.config import Plan as PlanSection
from jaxpt.model import llama
from jaxpt.plan import compile, cost, flops, hardware
from jaxpt.spec import ModelSpec, UserError

TINY_SOLAR = ModelSpec(n_layers=12, d_model=1024, d_ff=4096, n_heads=32, n_kv_heads=8, d_head=32, vocab_size=32_000)
LLAMA3_8B = ModelSpec(n_layers=32, d_model=4096, d_ff=14_336, n_heads=32, n_kv_heads=8, d_head=128, vocab_size=128_256)
SMALL = Config(
    model=Model(n_layers=5, d_model=24, d_ff=40, n_heads=6, n_kv_heads=2, d_head=8, vocab_size=96, max_positions=64),
    pack=Pack(row_len=20),
    train=Train(batch_rows=12, steps=300),
)


# ---- arithmetic


@pytest.mark.parametrize(
    "changes",
    [{}, {"tied": True}, {"qkv_bias": True}, {"out_bias": True, "mlp_bias": True}, {"qk_norm": True}],
    ids=lambda changes: "+".join(changes) or "plain",
)
def test_the_parameter_formula_counts_the_models_own_rows(spec, changes):
    spec = spec.replace(**changes)
    assert flops.n_params(spec) == llama.count(spec)


def test_published_models_have_their_published_size():
    assert flops.n_params(TINY_SOLAR) == 248_013_824
    assert flops.n_params(TINY_SOLAR.replace(n_layers=16)) == 308_839_424
    assert flops.n_params(LLAMA3_8B) == 8_030_261_248


def test_the_flops_formula_counts_the_models_own_products(spec, one):
    B, T = 3, 20
    params = llama.abstract_params(spec, one)
    ids = jax.ShapeDtypeStruct((B, T), jnp.int32)

    def logits(params, tokens, segments, positions):
        model = llama.bind(spec, params)
        return model(tokens, segments, positions) @ model.head()

    counted = compile.count_products(jax.make_jaxpr(logits)(params, ids, ids, ids))
    # one chunk of queries computes the upper triangle too, which the formula takes as not there
    triangle = 4 * spec.n_layers * spec.n_heads * spec.d_head * T / 2
    assert counted == B * T * (flops.forward(spec, T) + triangle)


def test_training_takes_six_a_parameter_and_six_lnht():
    T = 4096
    attention = 6 * LLAMA3_8B.n_layers * LLAMA3_8B.n_heads * LLAMA3_8B.d_head * T
    multiplied = flops.n_params(LLAMA3_8B) - LLAMA3_8B.vocab_size * LLAMA3_8B.d_model  # no product looks a token up
    assert flops.training(LLAMA3_8B, T) == pytest.approx(6 * multiplied + attention, rel=1e-4)  # the norms multiply nothing


def test_a_sliding_window_sees_what_a_loop_counts(spec):
    T, window = 20, 7
    seen = np.mean([min(position, window) for position in range(T)])
    assert flops.mean_context(spec.replace(sliding_window=window), T) == pytest.approx(seen, abs=0.5)
    assert flops.mean_context(spec.replace(sliding_window=T + 1), T) == flops.mean_context(spec, T) == T / 2


def test_weights_of_one_device_do_not_travel(spec):
    assert flops.weights_moved(spec, n_shards=1, n_tensor=1, accumulate=3, compute_bytes=4) == 0


# ---- the course's two examples


def test_the_courses_248m_run_reaches_46_percent_at_13_dollars():
    peak = hardware.CHIPS["a100"].bfloat16
    n = flops.n_params(TINY_SOLAR)
    assert 6 * n * 39e9 == pytest.approx(5.8e19, rel=0.01)
    assert cost.implied_mfu(6 * n, 39e9, 16, 7, peak) == pytest.approx(0.46, abs=0.005)
    assert cost.implied_price(1_500, 16, 7) == pytest.approx(13.4, abs=0.05)
    # with attention counted and the embedding lookup not, rows of 4,096 make it a little more
    assert cost.implied_mfu(flops.training(TINY_SOLAR, 4096), 39e9, 16, 7, peak) == pytest.approx(0.49, abs=0.01)


def test_the_courses_7b_run_needs_55_percent_of_a100s_at_a_dollar_and_a_half():
    hours = 14 * 24
    assert cost.implied_mfu(6 * 7e9, 980e9, 200, hours, hardware.CHIPS["a100"].bfloat16) == pytest.approx(0.545, abs=0.005)
    assert cost.implied_mfu(6 * 7e9, 980e9, 200, hours, hardware.CHIPS["h100"].bfloat16) == pytest.approx(0.172, abs=0.005)
    assert cost.implied_price(100_000, 200, hours) == pytest.approx(1.49, abs=0.01)


def test_growing_saves_two_thirds_only_while_the_base_is_free():
    base = LLAMA3_8B.replace(n_layers=24)
    found = cost.compare(LLAMA3_8B, base, 4096, scratch_tokens=3e12, grown_tokens=1e12, base_tokens=3e12)
    assert found["saved_frac"] == pytest.approx(2 / 3)
    assert found["saved_with_base_frac"] < 0  # paying for the base too costs more than scratch


# ---- hardware


def test_jaxs_device_names_find_their_chip():
    assert hardware.chip_for("TPU v5 lite").name == "v5e"
    assert hardware.peak_flops("NVIDIA H100 80GB HBM3", "bfloat16") == 989.4e12
    assert hardware.peak_flops("NVIDIA L40S", "bfloat16") is None
    assert hardware.peak_flops("cpu", "float32") is None


def test_a_run_on_cpu_has_flops_but_claims_no_peak_and_no_price(spec):
    known = cost.of_this_machine(spec, SMALL)
    assert known.flops_per_token == flops.training(spec, SMALL.pack.row_len)
    assert known.peak_flops is None and known.usd_per_hour is None


def test_every_chip_is_complete():
    for chip in hardware.CHIPS.values():
        assert chip.bfloat16 >= chip.float32 > 1e9 and chip.memory >= 4 * hardware.GIB and 0 < chip.mfu[0][0] < chip.mfu[0][1] < 1
        assert "20" in chip.priced  # the year in which the price was read
        if chip.platform == "cuda":
            assert compile.CARDS[chip.name][0] in chip.device_kinds


def test_slices_are_the_offered_ones():
    for on, n in (("v5e:2x2", 4), ("v6e:16x16", 256), ("v5p:4x4x4", 64), ("v5p:16x16x16", 4096), ("tpu7x:2x2x1", 8), ("h100:24", 24), ("cpu:3", 3)):
        assert hardware.target(on).n_devices == n


@pytest.mark.parametrize(
    "on, says",
    [
        ("v5q:4x4x4", "did you mean v5p"),
        ("tpu-v6e:4x4", "did you mean v6e"),
        ("h1000:8", "did you mean h100"),
        ("toaster:1", "there are: v4, v5e"),
        ("v5p:3x3x3", "v5p:2x4x4 (32 chips)"),
        ("v5p:8x4x4", "v5p:4x4x8 (128 chips)"),
        ("v5e:32x32", "v5e:16x16 (256 chips)"),
        ("v5e:4x4x4", "v5e:8x8 (64 chips)"),
        ("v5p", "such as v5p:2x4x4"),
        ("h100:12", "such as 8 or 16"),
        ("h100:2x8", "such as h100:8"),
        ("cpu:0", "such as cpu:8"),
    ],
)
def test_what_does_not_exist_is_refused_with_what_is_near(on, says):
    with pytest.raises(UserError, match=r"^--on ") as error:
        hardware.target(on)
    assert says in str(error.value)


# ---- the real step


@pytest.fixture(scope="module")
def on_cpu():
    """The small config's plan on four CPU devices, compiled."""
    return cost.plan(SMALL, ["cpu:4"])


def test_the_train_step_compiles_for_cpu_devices(on_cpu):
    (record,) = on_cpu["targets"]
    spec, _ = cost.model_of(SMALL)
    assert record["method"] == "compiled" and record["fits"] and record["devices"] == 4
    assert math.prod(record["mesh"].values()) == 4
    vectors = (2 * spec.n_layers + 1) * spec.d_model  # norms are whole on every device
    assert record["params_bytes"] == 4 * ((flops.n_params(spec) - vectors) // 4 + vectors)
    assert record["opt_bytes"] == 2 * record["params_bytes"] + 4  # two moments and a counter
    assert record["temporary_bytes"] > record["params_bytes"]  # gradients at least
    assert record["executed_flops_per_token"] > record["flops_per_token"]


def test_hours_and_money_follow_from_speed(on_cpu):
    (record,) = on_cpu["targets"]
    assert on_cpu["tokens"] == 300 * 12 * 20
    assert record["hours"] * 3600 * record["tokens_per_second"] == pytest.approx(on_cpu["tokens"])
    assert record["usd"] == pytest.approx(record["hours"] * 4 * record["usd_per_hour"])
    assert record["high"]["hours"] < record["hours"] < record["low"]["hours"]


def test_the_plan_is_plain_json_and_a_table(on_cpu):
    assert json.loads(json.dumps(on_cpu)) == on_cpu
    text = cost.table(on_cpu)
    assert "yes, 4.0 GiB to spare" in text and "AWS c7i" in text


def test_a_batch_that_does_not_divide_is_refused_in_one_sentence():
    with pytest.raises(UserError, match=r"--on cpu:5: mesh: train\.batch_rows / train\.accumulate = 12 cannot be cut into 5 pieces"):
        cost.plan(SMALL, ["cpu:5"])


def test_a_target_without_its_compiler_is_estimated_and_says_so(on_cpu):
    if compile.missing_package(hardware.target("v5e:2x2")) is None:
        pytest.skip("libtpu is installed: nothing is missing")
    (estimated,), (compiled,) = cost.plan(SMALL, ["v5e:2x2"])["targets"], on_cpu["targets"]
    assert estimated["method"] == "estimated"
    assert [estimated[key] for key in ("params_bytes", "opt_bytes", "mesh")] == [compiled[key] for key in ("params_bytes", "opt_bytes", "mesh")]
    assert any("estimated, not compiled: install libtpu" in note for note in cost.notes_of(estimated))


@pytest.mark.parametrize(
    ("on", "kernel", "remat"),
    [("v5e:2x2", "xla", "none"), ("v5e:2x2", "splash", "offload"), ("h100:4", "xla", "none"), ("h100:4", "cudnn", "offload")],
)
def test_the_train_step_compiles_for_accelerators_with_their_kernels(on, kernel, remat):
    missing = compile.missing_package(hardware.target(on))
    if missing:
        pytest.skip(f"{missing} is not installed")
    train = dataclasses.replace(SMALL.train, attention=kernel, remat=remat, compute_dtype="bfloat16")  # a kernel by name is never replaced
    settings = dataclasses.replace(SMALL, pack=Pack(row_len=256), train=train, mesh=Mesh(tensor=2))
    (record,) = cost.plan(settings, [on])["targets"]
    assert record["method"] == "compiled" and record["fits"]
    assert record["executed_flops_per_token"] > record["flops_per_token"]


# ---- what is planned


def test_growth_is_planned_for_the_child():
    grown = dataclasses.replace(SMALL, initialize=Initialize(grow=("depth_upscale(m=1)",)))
    assert cost.model_of(grown)[0].n_layers == 8


def test_a_vocabulary_that_is_not_known_yet_is_guessed_aloud():
    spec, notes = cost.model_of(dataclasses.replace(SMALL, model=dataclasses.replace(SMALL.model, vocab_size=0)))
    assert spec.vocab_size == 32_000
    assert "32,000" in notes[0]


def test_a_price_of_ones_own_goes_before_the_list():
    asked = dataclasses.replace(SMALL, plan=PlanSection(usd_per_hour=2.5))
    assert cost.price(hardware.CHIPS["h100"], asked) == (2.5, "config.plan.usd_per_hour")


def test_the_door_refuses_in_one_line():
    command = [sys.executable, str(ROOT / "scripts" / "plan.py"), "--config", str(ROOT / "configs" / "llama3_8b.py"), "--on", "v5p:5x5x5"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: --on v5p:5x5x5: no such slice") and done.stderr.count("\n") == 1
