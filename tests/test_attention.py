"""Laws of attention: every backend gives the numbers of the plain formula, keeps documents apart,
and is taken only where it can run.
"""

import dataclasses
import itertools
import math
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as splash_kernels,
)
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_masks

from jaxpt import config, hardware, sharding
from jaxpt.config import Config, MeshConfig, PackConfig, TrainConfig
from jaxpt.model.attention import attend_plain
from jaxpt.model.kernels import blockwise, select
from jaxpt.model.kernels import splash as splash_kernel
from jaxpt.model.kernels.blockwise import (
    MAX_QUERY_BLOCK,
    MIN_TOKENS_ALONE,
    Inputs,
    Visibility,
    count_mean_key_blocks,
    make_document_ids,
    split_queries,
)
from jaxpt.model.kernels.splash import choose_blocks, splash_attend
from jaxpt.plan import roofline
from jaxpt.spec import ModelSpec, UserError
from jaxpt.train.step import make_attention_request

B, T, N, K, H = 3, 384, 6, 2, 8


def plain(q, k, v, segments, window=None, softcap=None):
    """The formula within documents."""
    T = q.shape[1]
    distance = jnp.arange(T)[:, None] - jnp.arange(T)[None]
    seen = (
        (distance >= 0) & (distance < (window or T)) & (segments[:, :, None] == segments[:, None])
    )
    return attend_plain(q, k, v, seen, softcap)


def splash(q, k, v, segments, window=None):
    return splash_attend(q, k, v, segments, window, interpret=True)


def as_cudnn_documents_it(
    q, k, v, q_seqlen, kv_seqlen, q_offsets, kv_offsets, scale, mask_type, sliding_window_length
):
    """What JAX documents for its cuDNN call, by a loop over documents: no cuDNN without a card."""
    assert q.shape[2] == k.shape[2] == v.shape[2] and mask_type.name == "PADDING_CAUSAL"
    place = jnp.arange(q.shape[1])[None]
    owner = jnp.zeros(q.shape[:2], jnp.int32)  # 0: nothing is computed there
    for document in range(q_seqlen.shape[1]):
        start, length = q_offsets[:, document, None], q_seqlen[:, document, None]
        owner = jnp.where(
            (start >= 0) & (place >= start) & (place < start + length), document + 1, owner
        )
    mixed = plain(q * scale * q.shape[-1] ** 0.5, k, v, owner, sliding_window_length)
    return jnp.where((owner > 0)[..., None, None], mixed, jnp.nan)


@pytest.fixture(params=["xla", "splash", "cudnn"])
def backend(request, monkeypatch):
    if request.param == "splash":
        return splash
    if request.param == "cudnn":
        from jax._src.cudnn import fused_attention_stablehlo

        monkeypatch.setattr(
            fused_attention_stablehlo, "dot_product_attention", as_cudnn_documents_it
        )
    return lambda *args: select.attend(*args, backend=request.param)


def inputs(lengths=((100, 200, 60), (384,), (1, 129, 128)), B=B, T=T):
    """q, k, v and segment ids of documents of these lengths; the rest of a sequence is padding."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(B, T, n, H)), jnp.float32) for n in (N, K, K))
    segments = np.zeros((B, T), np.int32)
    for row, each in enumerate(lengths):
        segments[row, : sum(each)] = np.repeat(np.arange(len(each)) + 1, each)
    return q, k, v, jnp.asarray(segments)


def check_numbers_and_gradients(tried, args, window):
    """Hold attention of (q, k, v, segment ids) to the formula."""
    q, k, v, segments = args
    trained = (segments > 0)[..., None, None]

    def of(attend):
        return lambda q, k, v: jnp.sum(
            jnp.where(trained, attend(q, k, v, segments, window), 0) * jnp.cos(jnp.arange(H))
        )

    ours, expected = (
        jax.jit(jax.value_and_grad(of(attend), argnums=(0, 1, 2)))(q, k, v)
        for attend in (tried, plain)
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=5e-5), ours, expected
    )
    mixed = jax.jit(tried, static_argnums=4)(q, k, v, segments, window)
    # in the padding too: what is not finite there would reach the weights' gradients
    assert np.isfinite(mixed).all()
    np.testing.assert_allclose(mixed, plain(q, k, v, segments, window), atol=1e-5)


@pytest.mark.parametrize("window", [None, 37])
def test_every_backend_gives_the_formulas_numbers_and_gradients(backend, window):
    check_numbers_and_gradients(backend, inputs(), window)


@pytest.mark.parametrize("max_unrolled", [0, 512])
def test_a_softcap_gives_the_formulas_numbers_and_gradients_and_only_xla_takes_it(
    max_unrolled, monkeypatch
):
    monkeypatch.setattr(blockwise, "MAX_UNROLLED_TOKENS", max_unrolled)
    q, k, v, segments = inputs()
    trained = (segments > 0)[..., None, None]

    def of(attend):
        return lambda q, k, v: jnp.sum(
            jnp.where(trained, attend(q, k, v, segments, 37, softcap=0.7), 0)
            * jnp.cos(jnp.arange(H))
        )

    ours, expected = (
        jax.jit(jax.value_and_grad(of(attend), argnums=(0, 1, 2)))(q, k, v)
        for attend in (select.attend, plain)
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=5e-5), ours, expected
    )
    assert not np.allclose(of(plain)(q, k, v), jnp.sum(plain(q, k, v, segments, 37)))
    spec = ModelSpec(2, 48, 40, N, K, H, 96, attention_softcap=50.0)
    asked = select.AttentionRequest("auto", "bfloat16", 8, 384)
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    for kernel in ("splash", "cudnn"):
        reason = select.unsupported_reason(kernel, spec, asked, mesh)
        assert reason == "model.attention_softcap = 50 (none)"


def test_no_backend_lets_a_document_see_its_neighbor(backend):
    q, k, v, segments = inputs()
    inside = (segments == 2)[..., None, None]

    def others(k, v):
        return jnp.sum(jnp.where(inside, backend(q, k, v, segments, None), 0) ** 2)

    for gradient in jax.jit(jax.grad(others, argnums=(0, 1)))(k, v):
        seen = np.abs(np.asarray(gradient)).sum((2, 3)) > 0
        assert (seen <= (np.asarray(segments) == 2)).all() and seen.sum() > 300


# within a chunk; a short second block; blocks of two chunks, a short last one
@pytest.mark.parametrize("max_unrolled", [0, 512])
@pytest.mark.parametrize(
    ("T", "window"), [(20, None), (130, None), (450, 70), (1300, 200), (1300, None)]
)
def test_query_blocks_equal_the_formula(T, window, max_unrolled, monkeypatch):
    monkeypatch.setattr(blockwise, "MAX_UNROLLED_TOKENS", max_unrolled)
    args = inputs(lengths=((T // 3, T // 2),), B=1, T=T)
    ours, expected = (
        jax.jit(lambda *args, attend=attend: attend(*args, window))(*args)
        for attend in (select.attend, plain)
    )
    np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_a_window_that_leaves_the_padding_of_a_block_no_key_gives_the_formulas_gradients():
    T, window = 385, 2  # 4 blocks of 97 queries reach to 387, and 2 of 193 keys to 385
    q, k, v, segments = inputs(lengths=((T,),), B=1, T=T)

    def of(attend):
        return lambda q, k, v: jnp.sum(attend(q, k, v, segments, window) ** 2)

    ours, expected = (
        jax.jit(jax.grad(of(attend), argnums=(0, 1, 2)))(q, k, v)
        for attend in (select.attend, plain)
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=5e-5), ours, expected
    )


@pytest.mark.parametrize(
    ("lengths", "window", "row"),
    [
        (((256,) * 4, (256,) * 4), None, 0),
        # sequences of MIN_TOKENS_ALONE do not pay for each other's documents
        (((MIN_TOKENS_ALONE,), (256,) * (MIN_TOKENS_ALONE // 256)), None, 1),
        (((1024,), (1024,)), 100, 0),
    ],
    ids=["documents", "long", "window"],
)
def test_keys_that_no_document_or_window_reaches_are_not_computed(lengths, window, row):
    """NaN in the values of the first 256 tokens would show in whoever multiplies them by 0."""
    T = sum(lengths[0])
    q, k, v, segments = inputs(lengths, B=2, T=T)
    poisoned = v.at[row, :256].set(jnp.nan)
    later = slice(512, None)

    def squares(q, k, v):
        return jnp.sum(select.attend(q, k, v, segments, window)[row, later] ** 2)

    ours = jax.jit(select.attend, static_argnums=4)(q, k, poisoned, segments, window)
    expected = plain(q, k, v, segments, window)
    np.testing.assert_allclose(ours[row, later], expected[row, later], atol=1e-5)
    for gradient in jax.jit(jax.grad(squares, argnums=(0, 1, 2)))(q, k, poisoned):
        assert np.isfinite(np.asarray(gradient)[row, later]).all()


@pytest.mark.parametrize(("T", "window"), [(20, None), (1300, None), (1300, 200)])
def test_the_planner_counts_the_blocks_that_one_document_visits(T, window):
    q, k, v, segments = inputs(((T,),), B=1, T=T)
    queries = split_queries(Inputs(q, k, v, make_document_ids(segments)), Visibility(window))
    visited = np.asarray(queries.end_block - queries.first_block)
    assert np.mean(visited) == pytest.approx(count_mean_key_blocks(T, window, 1, on_cpu=True))


def test_backward_transposes_no_scores():
    """It took a CPU as long as all the rest of attention."""
    q, k, v, segments = inputs()
    program = (
        jax.jit(
            jax.grad(lambda *qkv: jnp.sum(select.attend(*qkv, segments) ** 2), argnums=(0, 1, 2))
        )
        .lower(q, k, v)
        .compile()
        .as_text()
    )
    shapes = re.findall(r"= f32\[([\d,]+)\]\S* (?:transpose|copy)\(", program)
    sizes = [math.prod(map(int, shape.split(","))) for shape in shapes]
    assert max(sizes) < B * N * MAX_QUERY_BLOCK**2  # half a block's scores


def test_sequences_with_too_many_documents_for_cudnn_take_xla(monkeypatch):
    from jax._src.cudnn import fused_attention_stablehlo

    monkeypatch.setattr(
        fused_attention_stablehlo,
        "dot_product_attention",
        lambda q, *a, **k: jnp.full_like(q, jnp.nan),
    )
    # cuDNN is given eight per sequence; padding is one
    few = ((40,) * 7 + (104,), (384,), (384,))
    many = ((40,) * 9, (384,), (384,))
    for lengths, is_packed in ((few, True), (many, False)):
        args = inputs(lengths)
        mixed = jax.jit(lambda *a: select.attend(*a, backend="cudnn"))(*args)
        assert np.isnan(mixed).all() == is_packed
        if not is_packed:
            np.testing.assert_allclose(mixed, plain(*args), atol=1e-5)


def test_kernels_on_a_mesh_equal_one_device(backend):
    q, k, v, segments = inputs(lengths=((100, 200, 60), (384,), (1, 129, 128), (7,)), B=4)
    mesh = sharding.make_mesh(MeshConfig(replica=2, fsdp=2, tensor=2))

    def spread(q, k, v, segments):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return backend(q, k, v, segments, None)

    goal = [
        sharding.make_logical_sharding(mesh, ("batch", None, heads, None))
        for heads in ("heads", "kv_heads", "kv_heads")
    ]
    placed = [
        *map(jax.device_put, (q, k, v), goal),
        jax.device_put(segments, sharding.make_batch_sharding(mesh)),
    ]
    np.testing.assert_allclose(jax.jit(spread)(*placed), plain(q, k, v, segments), atol=1e-5)


@pytest.mark.parametrize(
    ("n", "T"), [(2, 384), (4, 384), (8, 200)]
)  # 384 positions over 2 and 4 devices are striped; 200 over 8 cannot be
@pytest.mark.parametrize("window", [None, 37])
def test_sharded_sequences_attend_as_whole_ones(n, T, window):
    q, k, v, segments = inputs(lengths=((T // 3, T // 2), (T,), (1, T - 2)), B=3, T=T)
    mesh = sharding.make_mesh(MeshConfig(context=n, fsdp=1), jax.devices()[:n])

    def of(attend):
        return lambda *args: jnp.sum(attend(*args, segments, window) * jnp.cos(jnp.arange(H)))

    def spread(*args):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return select.attend(*args)

    goal = sharding.make_logical_sharding(mesh, ("batch", "position", "heads", None))
    ours = jax.jit(jax.value_and_grad(of(spread), argnums=(0, 1, 2)))(
        *(jax.device_put(x, goal) for x in (q, k, v))
    )
    expected = jax.jit(jax.value_and_grad(of(plain), argnums=(0, 1, 2)))(q, k, v)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=5e-5), ours, expected
    )


@pytest.mark.parametrize("backend", ["splash", "cudnn"], indirect=True)
@pytest.mark.parametrize(("context", "tensor"), [(6, 1), (3, 2)])
def test_kernels_exchange_positions_for_heads_where_sequences_are_sharded(backend, context, tensor):
    """Two kv heads for six devices, and one for three: they are repeated."""
    args = inputs(lengths=((100, 200, 60), (384,), (1, 129, 128)), B=3)
    mesh = sharding.make_mesh(MeshConfig(fsdp=1, context=context, tensor=tensor), jax.devices()[:6])

    def of(attend):
        return lambda *qkv: jnp.sum(attend(*qkv, args[3], 37) * jnp.cos(jnp.arange(H)))

    def spread(*args):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return backend(*args)

    placed = [
        jax.device_put(x, sharding.make_logical_sharding(mesh, ("batch", "position", heads, None)))
        for x, heads in zip(args, ("heads", "kv_heads", "kv_heads"), strict=False)
    ]
    ours = jax.jit(jax.value_and_grad(of(spread), argnums=(0, 1, 2)))
    program = ours.lower(*placed).compile()
    assert "all-to-all" in program.as_text()
    expected = jax.jit(jax.value_and_grad(of(plain), argnums=(0, 1, 2)))(*args[:3])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=5e-5),
        program(*placed),
        expected,
    )


def test_a_long_sequence_has_large_blocks_whose_scores_are_made_in_parts(monkeypatch):
    sizes = {T: choose_blocks(T) for T in (384, 4096, 8192, 12_800, 131_072)}
    assert sizes == {
        384: (128, 128),
        4096: (512, 512),
        8192: (1024, 512),
        12_800: (512, 512),
        131_072: (1024, 512),
    }
    monkeypatch.setattr(splash_kernel, "MIN_LARGE", 384)
    monkeypatch.setattr(splash_kernel, "LARGE_BLOCK", 384)
    monkeypatch.setattr(splash_kernel, "BLOCK", 128)
    assert choose_blocks(768) == (384, 128)
    args = inputs(lengths=((100, 600, 68), (768,)), B=2, T=768)
    for window in (None, 301):
        check_numbers_and_gradients(splash, args, window)


@pytest.mark.parametrize("window", [None, 301])
@pytest.mark.parametrize("lengths", [(100, 600, 68), (768,), (1, 255, 1, 511), (128,) * 6])
def test_splash_runs_blocks_in_which_a_query_sees_a_key_and_no_others(lengths, window):
    """Of the forward pass, and of the gradients of q and of k and v, which go over queries."""
    T, block = 768, 128
    mask = splash_masks.CausalMask((T, T))
    if window:
        mask = splash_masks.LocalMask((T, T), (window - 1, 0), 0)
    names = [field.name for field in dataclasses.fields(splash_kernels.BlockSizes)]
    sizes = splash_kernels.BlockSizes(**{name: block for name in names if name.startswith("block")})
    run = splash_kernels.make_splash_mha(
        splash_masks.MultiHeadMask([mask]), block_sizes=sizes, head_shards=1, q_seq_shards=1
    )
    owner = np.repeat(np.arange(len(lengths)), lengths)
    first = np.array([np.argmax(owner == each) for each in owner])
    distance = np.arange(T)[:, None] - np.arange(T)
    seen = (owner[:, None] == owner) & (distance >= 0) & (distance < (window or T))
    needed = seen.reshape(T // block, block, T // block, block).any((1, 3))
    first_key = jnp.asarray(first[::block])
    for info in (run.fwd_mask_info, run.dq_mask_info, run.dkv_mask_info):
        by_keys = info is run.dkv_mask_info
        apart = splash_kernel.skip_documents(info, first_key, block, by_keys)
        turns = np.array(apart.block_mask[0]) > 0
        loads = np.array(apart.data_next[0])
        if by_keys:
            turns, loads = turns.T, loads.T
        runs = [(i, loads[i, j]) for i, j in zip(*np.nonzero(turns), strict=True)]
        assert len(runs) == len(set(runs)) == needed.sum()
        assert all(needed[j, i] if by_keys else needed[i, j] for i, j in runs)
        blocks, is_run = loads.ravel(), turns.ravel()
        for at in np.flatnonzero(~is_run[: np.flatnonzero(is_run)[-1]]):
            assert blocks[at] == blocks[at + 1], "a turn that is skipped loads for the next"


def test_sequences_that_the_mesh_does_not_divide_attend_whole_on_every_device():
    """As one does that is decoded; 21 positions are not shared by 2 devices either."""
    args = inputs(lengths=((7, 9), (21,), (1, 20)), B=3, T=21)
    mesh = sharding.make_mesh(MeshConfig(fsdp=2, tensor=2, context=2))

    def spread(*args):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return select.attend(*args)

    placed = jax.device_put(args, sharding.make_replicated_sharding(mesh))
    np.testing.assert_allclose(jax.jit(spread)(*placed), plain(*args), atol=1e-5)


# ---- choosing a backend


SPEC = ModelSpec(n_layers=5, d_model=24, d_ff=40, n_heads=6, n_kv_heads=2, d_head=8, vocab_size=96)


def on(platform, kind="", capability="9.0", position=1, tensor=1):
    """A stand-in for a mesh over such devices."""
    device = types.SimpleNamespace(
        platform=platform, device_kind=kind, compute_capability=capability
    )
    shape = {"replica": 1, "fsdp": 1, "expert": 1, "tensor": tensor, "context": position}
    return types.SimpleNamespace(devices=np.array([device]), shape=shape)


TPU, H100, A100 = (
    ("tpu", "TPU v5"),
    ("gpu", "NVIDIA H100 80GB HBM3"),
    ("gpu", "NVIDIA A100-SXM4-80GB", "8.0"),
)


def settings(attention="auto", seq_len=256, **train):
    return Config(
        pack=PackConfig(seq_len=seq_len),
        train=TrainConfig(attention=attention, **{"compute_dtype": "bfloat16", **train}),
    )


@pytest.mark.parametrize(
    ("mesh", "chosen", "name", "reason"),
    [
        (on("cpu", "cpu"), settings(), "xla", "the default on cpu"),
        (on(*TPU), settings(), "splash", "the kernel for TPU v5"),
        (
            on(*TPU),
            settings(seq_len=200),
            "xla",
            "pack.seq_len = 200 is no multiple of 128 (128 or 256)",
        ),
        (on(*TPU, position=2), settings(), "splash", "the kernel for TPU v5"),
        (on(*TPU, position=4), settings(), "xla", "6 heads per device cannot be exchanged for 4"),
        (on(*H100), settings(), "cudnn", "the kernel for NVIDIA H100"),
        (
            on(*H100),
            settings(compute_dtype="float32"),
            "xla",
            "train.compute_dtype = float32 (bfloat16)",
        ),
        (on(*H100), settings(seq_len=2**20, batch_size=64), "xla", "32-bit offsets"),
        (on(*A100), settings(), "xla", "is 8.0"),
        (on("gpu", "AMD Instinct MI300X"), settings(), "xla", "not NVIDIA's"),
        (on(*TPU), settings("xla"), "xla", "train.attention = xla"),
    ],
)
def test_the_backend_follows_platform_and_shape_and_gives_its_reason(mesh, chosen, name, reason):
    request = make_attention_request(chosen.train, chosen.pack.seq_len)
    got, why = select.choose_backend(SPEC, request, mesh)
    assert got == name and reason in why and "\n" not in why


@pytest.mark.parametrize(
    ("target", "device"),
    [("v5p:2x2x1", TPU), ("h100:8", H100), ("a100:8", A100), ("cpu:4", ("cpu", "cpu"))],
)
def test_a_plan_expects_the_backend_that_a_run_takes(target, device):
    target = hardware.parse_target(target)
    wide = SPEC.replace(n_heads=12, n_kv_heads=4, d_head=16)
    specs = [wide, wide.replace(d_head=12), wide.replace(d_head=144)]
    specs += [wide.replace(attention_softcap=30.0)]
    found = set()
    for spec, tensor, context, seq_len, dtype in itertools.product(
        specs, (1, 2), (1, 2, 3, 4), (256, 200), ("bfloat16", "float32")
    ):
        mesh = on(*device, position=context, tensor=tensor)
        chosen = settings(seq_len=seq_len, compute_dtype=dtype)
        request = make_attention_request(chosen.train, seq_len)
        expected, _ = select.choose_backend(spec, request, mesh)
        planned = roofline.predict_attention_backend(
            spec, seq_len, chosen.train, mesh.shape, target
        )
        assert planned == expected, (spec, tensor, context, seq_len, dtype)
        found.add(planned)
    kernel = {"tpu": {"splash"}, "gpu": {"cudnn"} if device == H100 else set()}
    assert found == {"xla"} | kernel.get(device[0], set())


@pytest.mark.parametrize(
    ("mesh", "requested", "message"),
    [
        (on("cpu", "cpu"), "splash", "splash runs on TPU"),
        (on(*TPU), "cudnn", "cudnn runs on NVIDIA GPU"),
        (on(*A100), "cudnn", "need Hopper"),
    ],
)
def test_a_backend_requested_by_name_is_never_replaced_silently(mesh, requested, message):
    with pytest.raises(UserError, match=message):
        chosen = settings(requested)
        request = make_attention_request(chosen.train, chosen.pack.seq_len)
        select.choose_backend(SPEC, request, mesh)


def test_a_kernel_that_fails_or_gives_other_numbers_is_not_used(monkeypatch):
    device = jax.devices()[0]

    def judge(kernel):
        select.check_against_reference.cache_clear()
        monkeypatch.setitem(select.BACKENDS, "splash", kernel)
        return select.check_against_reference("splash", SPEC, 256, "float32", device)

    assert judge(plain) is None
    assert "its output on cpu differs" in judge(
        lambda q, k, v, segments, window: plain(q, k, v, segments * 0, window)
    )  # blind to documents
    assert "gradient of v" in judge(
        lambda q, k, v, segments, window: plain(q, k, jax.lax.stop_gradient(v), segments, window)
    )
    # a model whose layers differ has every window tried
    mixed = SPEC.replace(n_layers=2, sliding_window=9, global_layers=(1,))
    select.check_against_reference.cache_clear()
    monkeypatch.setitem(
        select.BACKENDS,
        "splash",
        lambda q, k, v, segments, window: plain(q, k, v, segments, window and 10),
    )
    found = select.check_against_reference("splash", mixed, 256, "float32", device)
    assert found and "its output on cpu differs" in found
    assert "by nan x" in judge(lambda q, *_: q * jnp.nan)
    assert "fails on cpu" in judge(lambda q, *_: q.reshape(7))

    def fail(*_):
        raise AssertionError()

    assert judge(fail) == "it fails on cpu (AssertionError())"
    monkeypatch.setitem(select.BACKENDS, "xla", fail)
    assert judge(plain) == "xla, to compare it with, fails on cpu (AssertionError())"
    select.check_against_reference.cache_clear()


@pytest.mark.parametrize(
    ("tensor", "context", "heads"),
    [
        (1, 1, (12, 4)),
        (2, 1, (6, 2)),
        (1, 2, (6, 2)),
        (2, 2, (3, 1)),
        (1, 3, (4, 4)),
        (2, 3, (2, 2)),
    ],
)
def test_a_kernel_is_tried_with_the_heads_of_one_device(tensor, context, heads):
    """Kv heads are repeated until positions can be exchanged for them."""
    spec = SPEC.replace(n_heads=12, n_kv_heads=4)
    own = select.take_own_heads(spec, on(*TPU, position=context, tensor=tensor))
    assert (own.n_heads, own.n_kv_heads) == heads


def test_an_unknown_backend_is_refused_by_the_config():
    with pytest.raises(UserError, match="attention"):
        config.build_config(config.apply_overrides(["--config.train.attention=flash"]))
