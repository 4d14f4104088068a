"""Laws of the step and its state: the same curve on any mesh, exact accumulation, one compilation,
skipped updates that change nothing.
"""

import dataclasses
import functools
import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import SMALL_SPEC

from jaxpt import sharding
from jaxpt.config import Config, MeshConfig, MixtureConfig, OptimConfig, PackConfig, TrainConfig
from jaxpt.model import transformer
from jaxpt.model.kernels import select, splash
from jaxpt.model.param import is_param_spec
from jaxpt.spec import Batch, UserError
from jaxpt.train import distributed, forgetting, optimizer, state, step
from jaxpt.train.schedule import make_lr_schedule

# three layers: on a CPU the step is unrolled, and compiles by the layer
SPEC = SMALL_SPEC
SETTINGS = Config(
    pack=PackConfig(seq_len=32),
    train=TrainConfig(steps=12, batch_size=16, max_consecutive_skips=3),
    optim=OptimConfig(peak_lr=1e-2, warmup_frac=0.25, weight_decay=0.1),
)
MESHES = [
    {"replica": r, "fsdp": f, "tensor": t, "context": c}
    for r in (1, 2, 4, 8)
    for f in (1, 2, 4, 8)
    for t in (1, 2, 4, 8)
    for c in (1, 2, 4, 8)
    if r * f * t * c == 8
]
QUICK = [
    MESHES.index({"replica": 1, "fsdp": 8, "tensor": 1, "context": 1}),
    MESHES.index({"replica": 1, "fsdp": 2, "tensor": 2, "context": 2}),
    MESHES.index({"replica": 4, "fsdp": 1, "tensor": 2, "context": 1}),
]


def make_batch(seed=0, batch_size=16, T=32) -> Batch:
    """Two documents per sequence and ragged padding, so that micro-batches differ in targets."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, 30, (batch_size, T)).astype(np.int32)
    segments, positions, weights = (
        np.zeros((batch_size, T), np.int32),
        np.zeros((batch_size, T), np.int32),
        np.zeros((batch_size, T), np.float32),
    )
    for row in range(batch_size):
        first = rng.integers(3, 12)
        second = rng.integers(1, T - first)
        for segment, (start, stop) in enumerate([(0, first), (first, first + second)], 1):
            segments[row, start:stop] = segment
            positions[row, start:stop] = np.arange(stop - start)
            weights[row, start : stop - 1] = 1
    return Batch(
        tokens * (segments > 0),
        np.roll(tokens, -1, axis=1) * (weights > 0),
        segments,
        positions,
        weights,
    )


def put(batch, mesh):
    return jax.device_put(batch, sharding.make_batch_sharding(mesh))


@functools.cache
def initial_params(spec):
    """A model's initial values, which are the same on every mesh."""
    return jax.device_get(
        transformer.init_params(spec, 0, sharding.make_mesh(MeshConfig(), jax.devices()[:1]))
    )


def make_state(mesh, settings=SETTINGS, spec=SPEC, **changes):
    """The state at step 0, with some fields changed."""
    now = state.init_state(
        jax.device_put(initial_params(spec), transformer.make_param_shardings(spec, mesh)),
        spec,
        settings.optim,
        mesh,
    )._replace(**changes)
    return jax.device_put(
        now, state.state_shardings(state.make_abstract_state(spec, settings.optim, mesh))
    )


def train(mesh, settings=SETTINGS, n=6, spec=SPEC, run=None):
    """n steps; returns (losses, final state, the jitted step)."""
    now, losses = make_state(mesh, settings, spec), []
    run = run or step.build_step(spec, settings.train, settings.optim, settings.pack.seq_len, mesh)
    for i in range(n):
        now, metrics = run(now, put(make_batch(i), mesh))
        losses.append(float(metrics["loss"]))
    return np.array(losses), now, run


@pytest.fixture(scope="module")
def run(one):
    """The step of one device, compiled once for all tests that need no other."""
    return step.build_step(SPEC, SETTINGS.train, SETTINGS.optim, SETTINGS.pack.seq_len, one)


@pytest.fixture(scope="module")
def sharded():
    """A mesh that shards weights both ways, and its step."""
    mesh = sharding.make_mesh(MeshConfig(fsdp=4, tensor=2))
    return mesh, step.build_step(SPEC, SETTINGS.train, SETTINGS.optim, SETTINGS.pack.seq_len, mesh)


@pytest.fixture(scope="module")
def alone(one, run):
    """The curve of one device."""
    return train(one, run=run)[0]


@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param(
            mesh, id="-".join(map(str, mesh.values())), marks=[] if i in QUICK else pytest.mark.slow
        )
        for i, mesh in enumerate(MESHES)
    ],
)
def test_any_mesh_gives_the_curve_of_one_device(one, alone, sizes):
    spec = SPEC
    if sizes["tensor"] > spec.n_kv_heads:  # with enough heads to shard
        spec = spec.replace(n_heads=8, n_kv_heads=8)
        alone, _, _ = train(one, spec=spec)
    spread, now, _ = train(sharding.make_mesh(MeshConfig(**sizes)), spec=spec)
    assert alone[-1] < alone[0] - 0.5
    # float32 sums in another order; 6 updates at a high learning rate carry that along
    np.testing.assert_allclose(spread, alone, rtol=2e-5)
    assert int(now.step) == 6


def test_a_kernel_on_sharded_sequences_gives_the_curve_of_one_device(one, monkeypatch):
    """A TPU's kernel, interpreted: positions are exchanged for heads, and 2 kv heads repeated."""
    spec = SPEC.replace(n_heads=8, n_kv_heads=2, max_seq_len=256)
    pack = PackConfig(seq_len=256)
    settings = dataclasses.replace(SETTINGS, pack=pack)

    def train(mesh):
        now, losses = make_state(mesh, settings, spec), []
        built = step.build_step(spec, settings.train, settings.optim, 256, mesh)
        for i in range(4):
            now, metrics = built(now, put(make_batch(i, 16, 256), mesh))
            losses.append(float(metrics["loss"]))
        return np.array(losses)

    plain = train(one)
    monkeypatch.setattr(splash, "BLOCK", 128)
    interpreted = functools.partial(splash.splash_attend, interpret=True)
    monkeypatch.setitem(select.BACKENDS, "splash", interpreted)
    monkeypatch.setitem(select.KNOB.by_platform, "cpu", "splash")
    mesh = sharding.make_mesh(MeshConfig(fsdp=2, tensor=2, context=2))
    request = step.make_attention_request(settings.train, 256)
    assert select.choose_backend(spec, request, mesh)[0] == "splash"
    kernel = train(mesh)
    assert plain[-1] < plain[0] - 0.3
    np.testing.assert_allclose(kernel, plain, rtol=2e-5)


def test_layers_in_a_loop_and_unrolled_give_one_curve(one):
    losses = []
    for n in (1, SPEC.n_layers):
        knobs = dataclasses.replace(SETTINGS.train, unroll_layers=n)
        losses.append(train(one, dataclasses.replace(SETTINGS, train=knobs), n=3)[0])
    np.testing.assert_allclose(*losses, rtol=2e-5)


def test_accumulation_equals_one_large_batch_whatever_the_padding(one, run):
    settings = dataclasses.replace(
        SETTINGS, train=dataclasses.replace(SETTINGS.train, grad_accum_steps=8)
    )
    (whole, first, _), (split, second, _) = train(one, n=3, run=run), train(one, settings, n=3)
    np.testing.assert_allclose(split, whole, rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), first.params, second.params
    )


def test_state_is_initialized_sharded_keeps_its_shardings_and_compiles_once(sharded):
    mesh, run = sharded
    now = state.init_state(transformer.init_params(SPEC, 0, mesh), SPEC, SETTINGS.optim, mesh)
    for i in range(3):
        now, _ = run(now, put(make_batch(i), mesh))
    assert run.program._cache_size() == 1
    expected = state.make_abstract_state(SPEC, SETTINGS.optim, mesh)
    jax.tree.map(
        lambda leaf, goal: (
            leaf.sharding.is_equivalent_to(goal.sharding, leaf.ndim)
            or pytest.fail(str(leaf.sharding))
        ),
        now,
        expected,
    )
    moments = [leaf for leaf in jax.tree.leaves(now.opt_state) if leaf.shape == (3, 24, 40)]
    assert len(moments) == 4 and all(
        leaf.addressable_shards[0].data.shape == (3, 6, 20) for leaf in moments
    ), "a moment is sharded as its weight"


def make_slices(n_slices, n_per_slice, platform):
    """Devices of TPU slices, in an order that mixes the slices."""
    found = []
    for i in range(n_slices * n_per_slice):
        place = {"id": i, "slice_index": i % n_slices, "process_index": i}
        found.append(types.SimpleNamespace(platform=platform, device_kind="a chip", **place))
    return found


@pytest.mark.parametrize("sizes", [(1, 8, 8, 1, 1), (2, 16, 1, 2, 1), (1, 1, 1, 64, 1)])
def test_axes_that_are_no_whole_ones_of_the_torus_are_laid_along_it(sizes):
    devices = []
    for i, coords in enumerate(itertools.product(range(4), repeat=3)):
        place = {"id": i, "process_index": i // 4, "coords": coords, "core_on_chip": 0}
        kind = {"platform": "tpu", "device_kind": "TPU v5"}
        devices.append(types.SimpleNamespace(**place, **kind))
    grid = sharding.lay_along_torus(sizes, devices)
    assert grid.shape == sizes and {device.id for device in grid.flat} == set(range(64))


def test_slices_are_joined_along_replica_alone():
    grid = sharding.join_slices((4, 3, 1, 2, 1), 2, make_slices(2, 12, "cpu"))
    slices = np.vectorize(lambda device: device.slice_index)(grid)
    assert sorted(slices[:, 0, 0, 0, 0]) == [0, 0, 1, 1]
    assert (slices == slices[:, :1, :1, :1, :1]).all(), "no other axis leaves a slice"
    with pytest.raises(UserError, match=r"expected a multiple of 2, .* got 3.*mesh.replica=2"):
        sharding.make_mesh(MeshConfig(replica=3, fsdp=-1), make_slices(2, 6, "tpu"))


def test_a_warmup_step_keeps_the_state_and_is_the_steps_one_compile(sharded):
    mesh, run = sharded
    now, _ = run(make_state(mesh), put(make_batch(0), mesh))
    before = jax.device_get(now)
    now = step.run_warmup_step(run, now, step.make_abstract_batch(16, 32, mesh))
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(now))
    run(now, put(make_batch(1), mesh))
    assert run.program._cache_size() == 1


def test_remat_changes_memory_not_numbers(one):
    curves = {}
    for remat in ("none", "dots", "minimal", "full"):
        changed = dataclasses.replace(SETTINGS.train, remat=remat)
        settings = dataclasses.replace(SETTINGS, train=changed)
        curves[remat], _, _ = train(one, settings, n=3, spec=SPEC.replace(n_layers=1))
    for remat, curve in curves.items():
        np.testing.assert_allclose(curve, curves["none"], rtol=1e-6, err_msg=remat)


@pytest.mark.parametrize(
    "n_layers, n_steps, n_unrolled", [(35, 1, 1), (35, 10**9, 7), (5, 10**9, 5), (0, 10**9, 1)]
)
def test_a_cpu_unrolls_layers_by_a_divisor_and_only_in_a_long_run(n_layers, n_steps, n_unrolled):
    spec = dataclasses.replace(SPEC, n_layers=n_layers)
    train = dataclasses.replace(SETTINGS.train, steps=n_steps)
    assert step.choose_unroll(spec, train, 32, on_cpu=True) == n_unrolled
    assert step.choose_unroll(spec, train, 32, on_cpu=False) == 1
    for on_cpu in (True, False):  # a recipe's own number, of the layers that there are
        chosen = dataclasses.replace(train, unroll_layers=6)
        expected = {35: 6, 5: 5, 0: 1}[n_layers]
        assert step.choose_unroll(spec, chosen, 32, on_cpu) == expected


def test_unrolling_layers_changes_the_loop_not_numbers(one):
    spec = SPEC.replace(n_layers=5)
    curves = {}
    for n in (1, 2, 5):
        changed = dataclasses.replace(SETTINGS.train, unroll_layers=n)
        settings = dataclasses.replace(SETTINGS, train=changed)
        curves[n], _, _ = train(one, settings, n=3, spec=spec)
    for n, curve in curves.items():
        np.testing.assert_allclose(curve, curves[1], rtol=1e-6, err_msg=str(n))


def test_offloading_on_a_cpu_is_refused(one):
    offload = dataclasses.replace(SETTINGS.train, remat="offload")
    with pytest.raises(UserError, match="a CPU has no other"):
        step.build_step(SPEC, offload, SETTINGS.optim, 32, one)


def test_an_update_that_is_not_finite_is_skipped_and_counted(one, run):
    good = make_batch(0)
    bad = good._replace(
        loss_mask=good.loss_mask * np.where(np.arange(32) == 5, np.nan, 1).astype(np.float32)
    )
    now, seen = make_state(one), []
    for batch in (good, good, bad, bad, good):
        now, _ = run(now, put(batch, one))
        seen.append(jax.device_get(now))
    _, before, _, after, mended = seen
    jax.tree.map(np.testing.assert_array_equal, before.params, after.params)
    jax.tree.map(np.testing.assert_array_equal, before.opt_state, after.opt_state)
    assert (
        int(after.skip_state.n_skipped) == int(after.skip_state.consecutive_skips) == 2
        and int(after.step) == 4
    )
    assert (
        int(mended.skip_state.consecutive_skips) == 0
        and (mended.params["embed"] != after.params["embed"]).any()
    )


GUARDED = dataclasses.replace(SETTINGS, train=dataclasses.replace(SETTINGS.train, spike_factor=2.0))


@pytest.fixture(scope="module")
def guarded(one):
    """The step that skips spikes."""
    return step.build_step(SPEC, GUARDED.train, GUARDED.optim, GUARDED.pack.seq_len, one)


def make_guarded_state(mesh, at, mean):
    """A state after so many steps whose gradients had this norm."""
    skips = state.SkipState(np.float32(mean), np.int32(0), np.int32(0))
    return make_state(mesh, GUARDED, step=np.int32(at), skip_state=skips)


def test_a_spike_is_skipped_once_the_mean_is_trusted(one, guarded):
    skipped = {}
    for at, mean in (
        (3, 1e-6),
        (80, 1e-6),
        (81, 1e6),
    ):  # the norm is far above, far above, far below the mean
        _, metrics = guarded(make_guarded_state(one, at, mean), put(make_batch(0), one))
        skipped[at] = int(metrics["n_skipped"])
    assert skipped == {3: 0, 80: 1, 81: 0}


def test_what_is_skipped_never_enters_the_mean_that_it_is_judged_by(one, guarded):
    """A NaN in the mean, or a spike, would turn the guard off for good."""
    spike = make_batch(0)
    nan = spike._replace(loss_mask=spike.loss_mask * np.float32(np.nan))
    now = make_guarded_state(one, 80, 0.25)
    for n_skipped, batch in enumerate((spike, nan, spike, spike), 1):
        now, metrics = guarded(now, put(batch, one))
        assert float(now.skip_state.norm_mean) == 0.25
        assert int(metrics["n_skipped"]) == n_skipped


# by hand, of peak_lr: 3 steps up, 9 after them; wsd falls in the last 4
RISE = [1 / 3, 2 / 3, 1]
COSINES = [0.972862, 0.894720, 0.775, 0.628142, 0.471858, 0.325, 0.205280, 0.127138, 0.1]
SCHEDULES = {
    "wsd": [*RISE, 1, 1, 1, 1, 1, 0.775, 0.55, 0.325, 0.1],
    "linear": [*RISE, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1],
    "cosine": [*RISE, *COSINES],
    "constant": [*RISE, 1, 1, 1, 1, 1, 1, 1, 1, 1],
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_update_has_the_learning_rate_of_its_schedule(name):
    """The first one moves the weights, and the last one has end_lr_frac of the peak."""
    optim = OptimConfig(
        peak_lr=2.0, warmup_frac=0.25, schedule=name, end_lr_frac=0.1, decay_frac=1 / 3
    )
    schedule = make_lr_schedule(optim, TrainConfig(steps=12))
    rates = [float(schedule(jnp.int32(n))) for n in range(12)]
    assert rates == pytest.approx([2.0 * part for part in SCHEDULES[name]], rel=1e-5)


def test_without_a_warmup_the_first_update_is_at_the_peak_or_one_step_down():
    optim = OptimConfig(peak_lr=2.0, warmup_frac=0, schedule="linear", end_lr_frac=0.0)
    schedule = make_lr_schedule(optim, TrainConfig(steps=5))
    rates = [float(schedule(jnp.int32(n))) for n in range(5)]
    assert rates == pytest.approx([1.6, 1.2, 0.8, 0.4, 0.0], abs=1e-6)


@pytest.mark.parametrize(("steps", "n_warmup"), [(1, 0), (2, 1), (4, 2), (30, 18), (50, 30)])
def test_a_warmup_is_a_share_of_the_steps_and_leaves_one(steps, n_warmup):
    optim = OptimConfig(peak_lr=2.0, warmup_frac=0.6, schedule="constant")
    schedule = make_lr_schedule(optim, TrainConfig(steps=steps))
    rates = [float(schedule(jnp.int32(n))) for n in range(steps)]
    rising = [2.0 * (n + 1) / n_warmup for n in range(n_warmup)]
    assert rates == pytest.approx(rising + [2.0] * (steps - n_warmup))


def test_runs_that_differ_in_rates_and_steps_share_a_program(one):
    """A sweep of rates is compiled once."""

    def lower(steps, **optim):
        train = dataclasses.replace(SETTINGS.train, steps=steps)
        optim = dataclasses.replace(SETTINGS.optim, **optim)
        built = step.build_step(SPEC, train, optim, SETTINGS.pack.seq_len, one)
        goal = state.make_abstract_state(SPEC, optim, one)
        batch = step.make_abstract_batch(train.batch_size, SETTINGS.pack.seq_len, one)
        return built.lower(goal, batch).as_text()

    first = lower(12, schedule="wsd", peak_lr=3e-3, warmup_frac=0.25)
    assert lower(35, schedule="wsd", peak_lr=1e-3, warmup_frac=0, end_lr_frac=0.3) == first
    assert lower(12, schedule="constant", decay_frac=0.4) == first
    assert lower(12, schedule="wsd", clip_norm=0.7) != first


def test_decay_is_by_name_never_on_norms_biases_or_embedding():
    spec = SPEC.replace(qkv_bias=True, out_bias=True, mlp_bias=True, qk_norm=True)
    mask = optimizer.decay_mask(transformer.param_specs(spec))
    assert {name for name, decays in {**mask, **mask["blocks"]}.items() if decays is True} == {
        "q",
        "k",
        "v",
        "o",
        "gate",
        "up",
        "down",
        "unembed",
    }


def test_zero_gradients_leave_what_does_not_decay(one, run):
    """Through the whole optimizer: without targets only decayed weights change."""
    batch = make_batch(0)._replace(loss_mask=np.zeros((16, 32), np.float32))
    now = make_state(one, step=np.int32(5))
    before = jax.device_get(now.params)
    now, _ = run(now, put(batch, one))
    np.testing.assert_array_equal(now.params["embed"], before["embed"])
    np.testing.assert_array_equal(now.params["norm"], before["norm"])
    np.testing.assert_allclose(
        now.params["blocks"]["q"], before["blocks"]["q"] * (1 - 1e-2 * 0.1), rtol=1e-5
    )


# ---- Muon

MUON = dataclasses.replace(SETTINGS, optim=dataclasses.replace(SETTINGS.optim, name="muon"))


def test_muon_gives_one_curve_on_any_mesh_and_keeps_half_of_adams_moments(one):
    spec = SPEC.replace(n_layers=2)
    alone, now, _ = train(one, MUON, n=4, spec=spec)
    spread, _, run = train(sharding.make_mesh(MeshConfig(fsdp=4, tensor=2)), MUON, n=4, spec=spec)
    np.testing.assert_allclose(spread, alone, rtol=2e-5)
    assert run.program._cache_size() == 1 and alone[-1] < alone[0] - 0.1
    muon, adam = (masked.inner_state for masked in now.opt_state[0])
    names = lambda tree: {path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(tree)}
    matrices = {"q", "k", "v", "o", "gate", "up", "down"}
    others = {"attn_norm", "mlp_norm", "embed", "norm", "unembed"}
    assert names(muon[0].mu) == matrices and names(adam.mu) == names(adam.nu) == others


def test_muon_treats_each_stacked_layer_as_a_matrix_of_its_own():
    """Updates are orthogonal up to Adam's scale; a layer's do not depend on its neighbors."""
    tx = optimizer.make_optimizer(
        dataclasses.replace(MUON.optim, weight_decay=0), SPEC, learning_rate=-1.0
    )
    rng = np.random.default_rng(0)
    grads = jax.tree.map(
        lambda row: rng.normal(size=row.shape).astype(np.float32),
        transformer.param_specs(SPEC),
        is_leaf=is_param_spec,
    )
    update = jax.jit(lambda grads: tx.update(grads, tx.init(grads), grads)[0]["blocks"])
    directions = update(grads)
    shapes = {
        "q": (24, 48),
        "k": (24, 16),
        "v": (24, 16),
        "o": (48, 24),
        "gate": (24, 40),
        "up": (24, 40),
        "down": (40, 24),
    }
    for name, shape in shapes.items():
        for layer in np.asarray(directions[name]):
            singular = np.linalg.svd(layer.reshape(shape), compute_uv=False) / (
                0.2 * max(shape) ** 0.5
            )
            assert singular.min() > 0.6 and singular.max() < 1.3, (
                name
            )  # Newton-Schulz comes near to 1, not onto it
    for leaf in grads["blocks"].values():
        leaf[1], leaf[2] = 1.0, 7 * leaf[2]
    changed = update(grads)
    for name in shapes:
        np.testing.assert_allclose(changed[name][0], directions[name][0], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(
            changed[name][2], directions[name][2], rtol=1e-3, atol=1e-4
        )  # its scale does not count


# ---- forgetting, and joining processes


def test_replay_doubles_what_is_forgotten_up_to_half_and_in_later_phases_too():

    def more(phases, names, step):
        mixture = MixtureConfig(phases=phases)
        return forgetting.increase_replay(mixture, names, step, {"a": 30, "b": 10}).phases

    assert more(((0, {"b": 1.0}),), ["a"], 8) == ((0, {"b": 1.0}), (8, {"a": 0.05, "b": 0.95}))
    assert more(((0, {"a": 1.0, "b": 3.0}),), ["a"], 8)[1] == (8, {"a": 0.5, "b": 0.5})
    assert more(((0, {"a": 0.4, "b": 0.6}),), ["a"], 8)[1] == (8, {"a": 0.5, "b": 0.5}), (
        "no more than half"
    )
    assert more(((0, {"a": 0.7, "b": 0.3}),), ["a"], 8)[1] == (8, {"a": 0.7, "b": 0.3}), (
        "what has more keeps it"
    )
    assert more((), ["b"], 8)[1] == (8, {"b": 0.5, "a": 0.5}), (
        "no phases: in proportion to the sequences"
    )
    later = more(((0, {"b": 1.0}), (8, {"a": 0.1, "b": 0.9}), (20, {"b": 1.0})), ["a"], 8)
    assert later == ((0, {"b": 1.0}), (8, {"a": 0.2, "b": 0.8}), (20, {"a": 0.05, "b": 0.95}))


def test_forgetting_counts_only_beyond_its_limit():
    losses, parent = {"a": 2.2, "b": 2.05, "c": 9.0}, {"a": 2.0, "b": 2.0}
    assert forgetting.find_forgotten(losses, parent, 0.1) == {"a": pytest.approx(0.2)}
    assert forgetting.find_forgotten(losses, parent, 0.0) == {}
    assert forgetting.find_forgotten(losses, None, 0.1) == {}


def test_processes_are_joined_only_when_all_variables_are_set(monkeypatch, tmp_path):
    distributed.join_processes(tmp_path)  # nothing set: nothing happens
    assert not jax.distributed.is_initialized()
    monkeypatch.setenv("JAXPT_COORDINATOR", "host:1234")
    with pytest.raises(
        UserError, match="expected all of JAXPT_COORDINATOR, JAXPT_PROCESSES, JAXPT_PROCESS"
    ):
        distributed.join_processes(tmp_path)


@pytest.mark.parametrize(
    ("environment", "devices"),
    [
        (
            {"SLURM_NTASKS": "2", "SLURM_STEP_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "8"},
            list(range(8)),
        ),  # one task per node has all of its GPUs
        (
            {"SLURM_NTASKS": "16", "SLURM_STEP_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "8"},
            None,
        ),  # one per GPU, as JAX itself assigns it
    ],
)
def test_a_task_of_slurm_sees_every_gpu_of_its_node(monkeypatch, tmp_path, environment, devices):
    passed = {}
    monkeypatch.setattr(
        distributed.jax.distributed, "initialize", lambda *_, **more: passed.update(more)
    )
    for name, value in {
        **environment,
        "SLURM_STEP_NODELIST": "n[1-2]",
        "SLURM_JOB_ID": "7",
    }.items():
        monkeypatch.setenv(name, value)
    distributed.join_processes(tmp_path)
    assert passed["local_device_ids"] == devices
