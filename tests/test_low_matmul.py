"""Laws of matmuls in float8 and int8: bounded errors whatever the scale, the same numbers on any
mesh and in micro-batches, only in the products that are large, and only on chips that have them.
"""

import dataclasses
import functools
import logging
import math
import re

import compilers
import jax
import jax.numpy as jnp
import low_matmul as benchmark
import numpy as np
import pytest
from jax.interpreters import partial_eval
from jax.sharding import NamedSharding, PartitionSpec
from test_attention import A100, H100, TPU, on
from test_train import SETTINGS, train

from jaxpt import config, hardware, sharding
from jaxpt.config import Config, MeshConfig, TrainConfig
from jaxpt.hardware import CHIPS
from jaxpt.model import lora, transformer
from jaxpt.model.kernels import low_matmul
from jaxpt.plan import compile, roofline
from jaxpt.spec import LoraSpec, ModelSpec, UserError
from jaxpt.train import session, state, step

# B T, D, N H and F are multiples of 16 and none is another
SPEC = ModelSpec(
    n_layers=3,
    d_model=32,
    d_ff=80,
    n_heads=6,
    n_kv_heads=2,
    d_head=8,
    vocab_size=96,
    max_seq_len=64,
)
LOW = ("float8", "int8")


def draw(*shape, seed=0, size=1.0):
    return size * jax.random.normal(jax.random.key(seed), shape)


@functools.partial(jax.jit, static_argnums=0)
def run(multiply, x, weight, d_y):
    y, pullback = jax.vjp(multiply, x, weight)
    return y, *pullback(d_y)


def differentiate(multiply, x, weight, d_y):
    """The result and both gradients, as numpy's."""
    return jax.device_get(run(multiply, x, weight, d_y))


def measure_error(found, expected):
    """The largest relative error of the arrays, by their norms."""
    pairs = [np.asarray([a, b], np.float64) for a, b in zip(found, expected, strict=True)]
    return [np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in pairs]


def make_inputs(sizes=(1.0, 1.0, 1.0), dtype=jnp.float32):
    shapes = (4, 24, 48), (48, 5, 16), (4, 24, 5, 16)
    return [draw(*shape, seed=i, size=sizes[i]).astype(dtype) for i, shape in enumerate(shapes)]


# ---- numbers


@pytest.mark.parametrize("sizes", [(1, 1, 1), (1e-6, 1, 1e6), (1e6, 1e-6, 1e-12), (1, 1e6, 1e-30)])
def test_errors_of_the_product_and_of_both_gradients_are_bounded_at_any_scale(sizes):
    """e4m3 rounds by 2^-4 at most, e5m2 by 2^-3, int8 to a 127th of a token's largest entry."""
    inputs = make_inputs(sizes)
    expected = differentiate(low_matmul.MATMULS["compute"], *inputs)
    y, d_x, d_weight = measure_error(differentiate(low_matmul.float8_matmul, *inputs), expected)
    assert 0.01 < y < 0.05 and 0.01 < d_x < 0.08 and 0.01 < d_weight < 0.08
    y, *gradients = measure_error(differentiate(low_matmul.int8_matmul, *inputs), expected)
    assert 1e-3 < y < 0.02 and gradients == [0, 0], "backward is in the compute dtype"


@pytest.mark.parametrize("dtype", LOW)
def test_zeros_give_zeros_and_what_is_not_finite_stays_so(dtype):
    x, weight, d_y = make_inputs()
    multiply = low_matmul.MATMULS[dtype]
    for zeros in ((0 * x, weight, d_y), (x, 0 * weight, d_y), (x, weight, 0 * d_y)):
        expected = differentiate(low_matmul.MATMULS["compute"], *zeros)
        for found, right in zip(differentiate(multiply, *zeros), expected, strict=True):
            assert np.isfinite(found).all() and (found.any() == right.any())
    for bad in (np.nan, np.inf):
        if (
            dtype == "float8" or bad == np.inf
        ):  # XLA's max on a CPU ignores NaN; the residual has it
            assert not np.isfinite(multiply(x.at[1, 2, 3].set(bad), weight)[1, 2]).any()
        _, d_x, d_weight = differentiate(multiply, x, weight, d_y.at[1, 2, 3, 4].set(bad))
        assert not np.isfinite(d_x[1, 2]).any() and not np.isfinite(d_weight[:, 3, 4]).any()


def test_bfloat16_products_are_bfloat16_with_the_error_of_float32s():
    found = differentiate(low_matmul.float8_matmul, *make_inputs(dtype=jnp.bfloat16))
    assert {array.dtype.name for array in found} == {"bfloat16"}
    exact = differentiate(low_matmul.MATMULS["compute"], *make_inputs())
    assert max(measure_error(found, exact)) < 0.08


def test_micro_batches_with_other_scales_give_the_gradient_of_the_batch():
    """A scale that is no power of two would round the halves to other numbers."""
    x, weight, d_y = make_inputs()
    x, d_y = x.at[:2].multiply(0.77), d_y.at[:2].multiply(3.3)
    y, _, whole = differentiate(low_matmul.float8_matmul, x, weight, d_y)
    halves = [
        differentiate(low_matmul.float8_matmul, x[part], weight, d_y[part])
        for part in (slice(2), slice(2, 4))
    ]
    np.testing.assert_allclose(np.concatenate([half[0] for half in halves]), y, rtol=1e-6)
    np.testing.assert_allclose(halves[0][2] + halves[1][2], whole, atol=1e-5 * abs(whole).max())


@pytest.mark.parametrize("dtype", LOW)
def test_a_mesh_gives_the_numbers_of_one_device_though_its_shards_differ_in_size(dtype):
    """Beside entries 2^40 times as large, small ones of a tensor are 0 in float8, on any device."""
    x, weight, d_y = make_inputs()
    x = x.at[:2, :, :16].multiply(2.0**40)
    expected = differentiate(low_matmul.MATMULS[dtype], x, weight, d_y)
    mesh = sharding.make_mesh(MeshConfig(fsdp=4, tensor=2))
    axes = ("fsdp", None, "tensor"), ("tensor", None, None), ("fsdp",)
    shardings = [NamedSharding(mesh, PartitionSpec(*names)) for names in axes]
    placed = jax.device_put([x, weight, d_y], shardings)
    found = differentiate(low_matmul.MATMULS[dtype], *placed)
    for one, many in zip(expected, found, strict=True):
        np.testing.assert_allclose(many, one, rtol=1e-5, atol=1e-5 * abs(one).max())
    assert (not expected[0][2:].any()) == (dtype == "float8"), "one scale for the tensor"


# ---- which products


@pytest.mark.parametrize("name", ["tokens", "in", "out"])
@pytest.mark.parametrize("dtype", LOW)
def test_products_of_odd_sizes_are_left_alone_to_the_bit(dtype, name):
    n_tokens, n_in, n_out = (24 if name == axis else 32 for axis in ("tokens", "in", "out"))
    x, params = draw(1, n_tokens, n_in), {"up": draw(n_in, n_out, seed=1)}
    plain, low = (
        lora.linear(None, "btd,df->btf", x, params, "up", each) for each in ("compute", dtype)
    )
    np.testing.assert_array_equal(low, plain)
    even = draw(1, 32, 32), {"up": draw(32, 32, seed=1)}
    assert np.any(
        lora.linear(None, "btd,df->btf", *even, "up", dtype)
        != lora.linear(None, "btd,df->btf", *even, "up")
    )


def test_a_matrix_in_float8_has_its_adapter_and_its_bias_in_the_compute_dtype():
    x, params = draw(2, 16, 32), {"up": draw(32, 48, seed=1), "up_bias": draw(48, seed=2)}
    params |= {"up_lora_a": draw(32, 16, seed=3), "up_lora_b": draw(16, 48, seed=4)}
    adapters = LoraSpec(16, 16.0, ("up",))
    plain, low = (
        lora.linear(adapters, "btd,df->btf", x, params, "up", dtype)
        for dtype in ("compute", "float8")
    )
    matrix = low_matmul.float8_matmul(x, params["up"]) - x @ params["up"]
    np.testing.assert_allclose(low - plain, matrix, atol=1e-4)


def list_matmul_dtypes(jaxpr, n=1):
    """The operands' dtypes of every product of a program, as often as it runs."""
    found = []
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        if equation.primitive.name == "dot_general":
            found += n * [tuple(operand.aval.dtype.name for operand in equation.invars)]
        repeats = equation.params["length"] if equation.primitive.name == "scan" else 1
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            found += list_matmul_dtypes(inner, n * repeats)
    return found


def trace(one, spec=SPEC, **train):
    """The traced step, and its settings."""
    knobs = dataclasses.replace(SETTINGS.train, **train)
    built = step.build_step(spec, knobs, SETTINGS.optim, 32, one)
    abstract = state.make_abstract_state(spec, SETTINGS.optim, one)
    program = built.trace(abstract, step.make_abstract_batch(16, 32, one)).jaxpr.jaxpr
    alive, _ = partial_eval.dce_jaxpr(program, [True] * len(program.outvars))  # as XLA compiles it
    return alive, knobs


MIXTURE = {"n_experts": 5, "n_experts_per_token": 2, "family": "qwen2_moe", "d_shared": 48}


@pytest.mark.parametrize(
    ("spec", "knobs", "n_matrices"),
    [
        (SPEC, {"remat": "dots"}, 7),
        (SPEC, {"remat": "full"}, 7),
        (SPEC.replace(d_head=10), {}, 3),
        (SPEC.replace(lora=LoraSpec(4, 8.0, ("q", "down"))), {}, 7),
        (SPEC.replace(**MIXTURE), {}, 7),
    ],
    ids=["dots", "full", "odd heads", "adapters", "mixture"],
)
@pytest.mark.parametrize("dtype", LOW)
def test_the_steps_large_products_alone_are_low_as_the_plan_counts_them(
    one, dtype, spec, knobs, n_matrices
):
    """The head, embedding, router, experts and adapters are not."""
    program, knobs = trace(one, spec, matmul_dtype=dtype, **knobs)
    dtypes = list_matmul_dtypes(program)
    low = [pair for pair in dtypes if "float32" not in pair]
    n = n_matrices * spec.n_layers
    n_forward = n
    if knobs.remat == "full":  # nothing reads the result of `down` again
        n_forward += n - spec.n_layers
    expected = {("int8", "int8"): n_forward}
    if dtype == "float8":
        expected = {
            ("float8_e4m3fn", "float8_e4m3fn"): n_forward,
            ("float8_e5m2", "float8_e4m3fn"): n,
            ("float8_e4m3fn", "float8_e5m2"): 0 if spec.lora else n,
        }
    assert {pair: low.count(pair) for pair in expected} == expected
    assert len(low) == sum(expected.values())
    matrices = transformer.list_low_matmuls(spec, 16 * 32)
    assert len(matrices) == n_matrices
    n_passes = math.ceil(len(low) / n)
    expected_flops = 2 * n_passes * spec.n_layers * sum(p.size for p in matrices.values())
    assert roofline.estimate_low_flops_per_token(spec, knobs, 32) == expected_flops


def test_the_compute_dtype_is_the_default_and_changes_nothing(one):
    program, knobs = trace(one)
    assert knobs.matmul_dtype == "compute"
    assert set(list_matmul_dtypes(program)) == {("float32", "float32")}
    assert roofline.estimate_low_flops_per_token(SPEC, knobs, 32) == 0


# ---- whole steps


def with_low(dtype, **train):
    knobs = dataclasses.replace(SETTINGS.train, matmul_dtype=dtype, **train)
    return dataclasses.replace(SETTINGS, train=knobs)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", LOW)
def test_a_mesh_and_micro_batches_give_the_curve_of_one_device(one, dtype):
    """Sums in another order round some entries to their neighbors, an eighth away."""
    alone, *_ = train(one, with_low(dtype), spec=SPEC)
    assert alone[-1] < alone[0] - 0.5
    mesh = sharding.make_mesh(MeshConfig(fsdp=2, tensor=2, context=2))
    for found in (
        train(mesh, with_low(dtype), spec=SPEC)[0],
        train(one, with_low(dtype, grad_accum_steps=4), spec=SPEC)[0],
    ):
        np.testing.assert_allclose(found, alone, rtol=2e-3)
    plain, *_ = train(one, spec=SPEC)
    assert 1e-5 < np.abs(alone - plain).max() < 0.05


@pytest.mark.slow
def test_a_training_of_500_steps_ends_within_two_percent_of_bfloat16():
    """Of the three seeds in docs/train.md, that with the widest gap: 1.1 %."""
    plain = benchmark.train("compute", 2, 500)
    assert plain < 2, "it has learnt"
    for dtype in LOW:
        assert benchmark.train(dtype, 2, 500) < 1.02 * plain


# ---- which devices


@pytest.mark.parametrize(
    ("device", "dtype"),
    [
        (("cpu", "cpu"), "float8"),
        (("cpu", "cpu"), "int8"),
        (H100, "float8"),
        (("gpu", "NVIDIA L40S", "8.9"), "float8"),
        (("tpu", "TPU7x"), "float8"),
        (("tpu", "TPU v5 lite"), "int8"),
        (("tpu", "TPU v6 lite"), "int8"),
        (A100, "compute"),
    ],
)
def test_chips_with_the_units_are_taken(device, dtype):
    low_matmul.check_matmul_dtype(dtype, on(*device).devices.flat[0])


@pytest.mark.parametrize(
    ("device", "dtype", "message"),
    [
        (A100, "float8", "a100 .* no higher peak .*; tpu7x, h100, h200, b200, l4, rtx4090 have"),
        (("gpu", "NVIDIA A40", "8.6"), "float8", "NVIDIA A40 has no higher peak in float8"),
        (TPU, "float8", "v5p has no higher peak in float8"),
        (H100, "int8", "h100 has no higher peak in int8 than in bfloat16; v5e, v5p, v6e have"),
        (("tpu", "TPU v4"), "int8", "v4 has no higher peak in int8"),
        (("gpu", "AMD Instinct MI300X"), "float8", "MI300X"),
    ],
)
def test_chips_without_the_units_are_refused_in_one_sentence(device, dtype, message):
    mesh = on(*device)
    with pytest.raises(UserError, match=message):
        low_matmul.check_matmul_dtype(dtype, mesh.devices.flat[0])


def test_the_log_names_what_is_multiplied_in_float8_and_that_a_cpu_emulates_it(one, caplog):
    caplog.set_level(logging.INFO)
    knobs = dataclasses.replace(SETTINGS.train, matmul_dtype="float8")
    session.log_fast_paths(SPEC.replace(d_ff=81), knobs, 32, one)
    session.log_fast_paths(SPEC.replace(d_model=33), knobs, 32, one)
    found = [line for line in caplog.messages if line.startswith("matmuls")]
    assert found == [
        "matmuls: float8 (emulated on a CPU, slower) of q, k, v, o; others float32",
        "matmuls: float8 (emulated on a CPU, slower) of none (multiples of 16); others float32",
    ]


# ---- the plan


@pytest.mark.parametrize(("on", "dtype"), [("h100:8", "float8"), ("v5e:2x4", "int8")])
def test_a_plan_takes_the_low_products_at_their_peak_and_mfu_at_the_compute_dtypes(on, dtype):
    target = hardware.parse_target(on)
    knobs = TrainConfig(batch_size=16, compute_dtype="bfloat16", matmul_dtype=dtype)
    sizes = roofline.count_state_bytes(SPEC, config.OptimConfig(), "float32")
    mesh = {"replica": 1, "fsdp": 8, "expert": 1, "tensor": 1, "context": 1}
    analysis = roofline.estimate_step(SPEC, sizes, knobs, 32, mesh, "xla")
    low = analysis.low_flops
    assert 0.1 < low / analysis.executed_flops < 0.9
    peak, low_peak = target.chip.bfloat16_flops, target.chip.peak_flops(dtype)
    expected = ((analysis.executed_flops - low) / peak + low / low_peak) / 8
    found = roofline.compute_roofline(analysis, target, knobs)
    assert found.compute_seconds == pytest.approx(expected, rel=1e-12)
    assert 1.9 < low_peak / peak < 2.1


def test_a_plan_for_a_chip_without_the_units_is_refused():
    settings = Config(train=TrainConfig(matmul_dtype="float8"))
    request = compile.AnalysisRequest(SPEC, dataclasses.asdict(settings), "v5p:2x2x1", None)
    with pytest.raises(UserError, match="v5p has no higher peak in float8"):
        compile.analyze_step_in_process(request)
    low_matmul.check_chip("float8", CHIPS["cpu"])  # which emulates it


# ---- compiled for chips that are not here

# target -> what compiles there, and how the text says that a product is low
COMPILED = {
    "h100:1": (
        """
from jaxpt.spec import ModelSpec

spec = ModelSpec(
    n_layers=2, d_model=1024, d_ff=4096, n_heads=8, n_kv_heads=2, d_head=128, vocab_size=1152
)
train = config.TrainConfig(
    batch_size=4, compute_dtype="bfloat16", matmul_dtype="float8", attention="xla", remat="minimal"
)
settings = config.Config(train=train, pack=config.PackConfig(seq_len=1024))
lowered = compile.trace_step(spec, settings, mesh).lower()
print(lowered.compile({"xla_gpu_enable_triton_gemm": False}).as_text())
""",
        r'__cublas\$lt\$matmul\$f8".*op_name="(.*?)"',
    ),
    # the product alone: libtpu takes minutes for the step
    "v5e:1x1": (
        """
from jaxpt.model.kernels.low_matmul import int8_matmul

def run(x, weight, d_y):
    y, pullback = jax.vjp(int8_matmul, x, weight)
    return y, pullback(d_y)

place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
shapes = (4, 1024, 512), (512, 1408), (4, 1024, 1408)
inputs = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=place) for shape in shapes]
print(jax.jit(run).lower(*inputs).compile().as_text())
""",
        r'= s32\[[\d,]+\]\S* convolution\(.*op_name="(.*?)"',
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("on", COMPILED)
def test_the_compilers_of_chips_make_their_low_products(on):
    """XLA joins some of the step's seven matrices that read one input."""
    program, pattern = COMPILED[on]
    names = re.findall(pattern, compilers.run_for(on, program))
    n_again = sum("rematted" in name for name in names)
    n_backward = sum("transpose" in name for name in names) - n_again
    found = len(names) - n_again - n_backward, n_again, n_backward
    if on == "v5e:1x1":
        assert found == (1, 0, 0)
    else:
        assert all(n <= most for n, most in zip(found, (7, 6, 14), strict=True))
        assert all(n >= least for n, least in zip(found, (4, 3, 11), strict=True))
