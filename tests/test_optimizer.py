"""Laws of the optimizer's contract: the step is optax on the mean loss, and any optax
transformation is skipped, sharded, grown and resumed.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from test_train import SETTINGS, SPEC, initial_params, make_batch, make_state, put

from jaxpt import sharding
from jaxpt.config import MeshConfig, OptimConfig
from jaxpt.growth.apply import grow_params
from jaxpt.growth.growth import Parent
from jaxpt.growth.new_params import NewParams
from jaxpt.growth.parse import plan_growth
from jaxpt.model import transformer
from jaxpt.plan import roofline
from jaxpt.spec import UserError
from jaxpt.train import begin, low_precision, optimizer, state, step
from jaxpt.train.records import CheckpointRecord
from jaxpt.weights import checkpoint

# ---- the step is optax


def naive_loss(params, batch):
    """Nats per trained token, written out."""
    inputs = batch.tokens, batch.segment_ids, batch.positions
    logits = transformer.compute_logits(SPEC, params, *inputs)
    log_probs = jax.nn.log_softmax(logits)
    found = jnp.take_along_axis(log_probs, batch.targets[..., None], axis=-1)[..., 0]
    return -jnp.sum(found * batch.loss_mask) / jnp.sum(batch.loss_mask)


# eps as large as gradients are: Adam would not see the size of clipped ones otherwise
SIX = OptimConfig(
    peak_lr=3e-3, end_lr_frac=0.1, warmup_frac=1 / 3, decay_frac=0.5, weight_decay=0.3, eps=1e-3
)


def run_optax(optim):
    """Return (losses, parameters) of six steps with nothing of ours but the forward pass."""
    peak = optim.peak_lr
    from_one = optax.join_schedules(
        [
            optax.linear_schedule(0, peak, 2),
            optax.constant_schedule(peak),
            optax.linear_schedule(peak, 0.1 * peak, 3),
        ],
        [2, 3],
    )

    def schedule(n_updates):
        return from_one(n_updates + 1)  # optax counts the updates done before

    matrices = {"q", "k", "v", "o", "gate", "up", "down", "unembed"}
    clip = optax.clip_by_global_norm(optim.clip_norm) if optim.clip_norm else optax.identity()
    params = initial_params(SPEC)
    mask = jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in matrices, params)
    tx = optax.chain(
        clip,
        optax.adamw(schedule, optim.b1, optim.b2, optim.eps, weight_decay=0.3, mask=mask),
    )
    opt_state, losses = tx.init(params), []
    differentiate = jax.jit(jax.value_and_grad(naive_loss))
    for i in range(6):
        loss, grads = differentiate(params, make_batch(i))
        updates, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        losses.append(float(loss))
    return losses, params


@pytest.mark.parametrize("clip_norm", [pytest.param(0.0, marks=pytest.mark.slow), 6.0])
def test_six_steps_equal_optax_on_the_mean_loss(one, clip_norm):
    optim = dataclasses.replace(SIX, clip_norm=clip_norm)
    train = dataclasses.replace(SETTINGS.train, steps=6)
    settings = dataclasses.replace(SETTINGS, optim=optim, train=train)
    run = step.build_step(SPEC, settings.train, settings.optim, settings.pack.seq_len, one)
    now, losses, norms = make_state(one, settings), [], []
    for i in range(6):
        now, scalars = run(now, put(make_batch(i), one))
        losses.append(float(scalars["loss"]))
        norms.append(float(scalars["grad_norm"]))
    expected_losses, expected = run_optax(optim)
    assert min(norms) < 6 < max(norms) < 12, "some are clipped"
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-4)
    jax.tree.map(
        lambda ours, theirs: np.testing.assert_allclose(ours, theirs, atol=1e-4),
        now.params,
        expected,
    )


# ---- any transformation


def make_lion(inputs):
    optim = inputs.optim
    return optimizer.descend(optax.scale_by_lion(optim.b1, optim.b2), inputs)


def make_schedule_free(inputs):
    optim = inputs.optim
    return optax.contrib.schedule_free_adamw(
        inputs.learning_rate, b1=optim.b1, b2=optim.b2, weight_decay=optim.weight_decay
    )


def make_momentum(inputs):
    return optax.sgd(inputs.learning_rate, momentum=0.9)


def make_factored(inputs):
    rms = optax.scale_by_factored_rms(min_dim_size_to_factor=16)
    return optimizer.descend(rms, inputs)


STOCK = {
    "lion": make_lion,
    "schedule_free": make_schedule_free,
    "momentum": make_momentum,
    "factored": make_factored,
}
PACKED = ["adamw bfloat16", "adamw int8", "muon int8", "adafactor int8"]
FIRST = ["adamw", "adafactor", "muon int8"]  # the rest are slow
ANY = ["adamw", "muon", "adafactor", *PACKED, *STOCK]
SMALL = SPEC.replace(n_layers=2)  # compiles in two thirds of the time
PEAK = {"lion": 3e-3, "momentum": 0.3}


@pytest.fixture(autouse=True)
def stock(monkeypatch):
    """optax's own transformations, each registered by one function."""
    for name, make in STOCK.items():
        monkeypatch.setitem(optimizer.OPTIMIZERS, name, make)


def settings_of(name, **train):
    """Settings of an optimizer, or of one and the dtype of its moments."""
    name, _, dtype = name.partition(" ")
    peak = PEAK.get(name, 1e-2)
    optim = dataclasses.replace(SETTINGS.optim, name=name, peak_lr=peak)
    optim = dataclasses.replace(optim, moment_dtype=dtype or "params")
    train = dataclasses.replace(SETTINGS.train, **train)
    return dataclasses.replace(SETTINGS, optim=optim, train=train)


def take_steps(run, now, mesh, seeds):
    losses = []
    for seed in seeds:
        now, scalars = run(now, put(make_batch(seed), mesh))
        losses.append(float(scalars["loss"]))
    return now, losses


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


@pytest.mark.parametrize(
    "name",
    [name if name in FIRST else pytest.param(name, marks=pytest.mark.slow) for name in ANY],
)
def test_any_optimizer_learns_is_skipped_bit_by_bit_and_resumes(one, tmp_path, name):
    settings = settings_of(name, spike_factor=3.0)
    run = step.build_step(SMALL, settings.train, settings.optim, settings.pack.seq_len, one)
    now, losses = take_steps(run, make_state(one, settings, SMALL), one, range(6))
    assert losses[-1] < losses[0] - 0.2

    # neither NaN nor a spike moves a bit
    before = jax.device_get(now)
    batch = make_batch(7)
    bad = batch._replace(loss_mask=batch.loss_mask * np.float32(np.nan))
    now, _ = run(now, put(bad, one))
    spiked = now._replace(
        step=jnp.int32(80), skip_state=now.skip_state._replace(norm_mean=jnp.float32(1e-6))
    )
    now, scalars = run(spiked, put(batch, one))
    assert int(scalars["n_skipped"]) == int(scalars["consecutive_skips"]) == 2
    assert_equal(now.params, before.params)
    assert_equal(now.opt_state, before.opt_state)
    assert float(now.skip_state.norm_mean) == np.float32(1e-6)

    # a checkpoint goes on as if there had been none
    now = jax.device_put(
        before, state.state_shardings(state.make_abstract_state(SMALL, settings.optim, one))
    )
    saved = state.rest_of_state(now)
    checkpoint.save_checkpoint(tmp_path, 6, now.params, saved, SMALL, counts={}, tokenizer=None)
    stored = checkpoint.find_newest(tmp_path)
    abstract = state.make_abstract_state(SMALL, settings.optim, one)
    params = checkpoint.restore_tree(stored, checkpoint.PARAMS, abstract.params)
    resumed = state.restore_state(stored, params, abstract)
    onward, resumed_losses = take_steps(run, resumed, one, (8, 9))
    expected, losses = take_steps(run, now, one, (8, 9))
    assert resumed_losses == losses
    assert_equal(onward, expected)


@functools.cache
def train_sharded(name):
    """A state after three steps on a mesh that shards weights both ways; the policies share it."""
    mesh = sharding.make_mesh(MeshConfig(fsdp=4, tensor=2))
    settings = settings_of(name)
    run = step.build_step(SMALL, settings.train, settings.optim, settings.pack.seq_len, mesh)
    now, _ = take_steps(run, make_state(mesh, settings, SMALL), mesh, range(3))
    return mesh, settings, now


@pytest.mark.parametrize(
    ("name", "policy"),
    [
        ("muon", "reset_new"),
        pytest.param("adamw", "fresh", marks=pytest.mark.slow),
        pytest.param("lion", "copy_scaled", marks=pytest.mark.slow),
        ("schedule_free", "fresh"),
        ("adamw int8", "copy_scaled"),
        ("adafactor bfloat16", "reset_new"),
        *(pytest.param(name, "reset_new", marks=pytest.mark.slow) for name in STOCK),
    ],
)
def test_any_optimizer_grows_sharded_and_goes_on(name, policy):
    mesh, settings, now = train_sharded(name)
    now = jax.tree.map(jnp.copy, now)  # the step takes over what growth keeps
    grown = plan_growth("widen(d=48, heads=12)", Parent(SMALL))
    child = grow_params(grown, now.params, mesh)
    opt_state, skips, new_params = state.grow_state(now, grown, settings.optim, policy, mesh)
    now = state.TrainState(now.step, child, opt_state, skips)
    goal = state.make_abstract_state(grown.child, settings.optim, mesh)
    assert state.state_shardings(now) == state.state_shardings(goal)
    jax.tree.map(lambda leaf, like: leaf.shape == like.shape or pytest.fail(str(like)), now, goal)
    run = step.build_step(
        grown.child, settings.train, settings.optim, settings.pack.seq_len, mesh, new_params
    )
    now, losses = take_steps(run, now, mesh, range(3, 8))
    assert np.isfinite(losses).all() and losses[-1] < losses[0] and run.program._cache_size() == 1


def test_moments_are_those_of_the_child_and_counts_are_kept(one):
    """Depth copies a layer's moments; what is no moment stays, or starts again under fresh."""
    settings = settings_of("schedule_free")
    run = step.build_step(SMALL, settings.train, settings.optim, settings.pack.seq_len, one)
    now, _ = take_steps(run, make_state(one, settings, SMALL), one, range(3))
    grown = plan_growth("stack(g=2)", Parent(SMALL))
    parent = jax.device_get(now.opt_state)
    for policy, is_kept in (("copy", True), ("fresh", False)):
        child, _, new_params = state.grow_state(now, grown, settings.optim, policy, one)
        assert new_params.n_updates == 3
        assert int(child.step_count) == (4 if is_kept else 1)
        # an iterate is a parameter at another point: no policy sets it to 0
        np.testing.assert_array_equal(
            child.z["blocks"]["up"], np.concatenate([parent.z["blocks"]["up"]] * 2)
        )
        squares, before = (
            next(part.nu for part in opt_state.base_optimizer_state if hasattr(part, "nu"))
            for opt_state in (child, parent)
        )
        expected = np.concatenate([before["blocks"]["up"]] * 2) * is_kept
        np.testing.assert_array_equal(squares["blocks"]["up"], expected)


def test_a_squared_moment_shrinks_by_the_square(one):
    """Under copy_scaled, whatever the transformation that holds it."""
    settings = settings_of("adamw")
    run = step.build_step(SMALL, settings.train, settings.optim, settings.pack.seq_len, one)
    now, _ = take_steps(run, make_state(one, settings, SMALL), one, range(2))
    grown = plan_growth("widen(d=48, heads=12)", Parent(SMALL))
    grew, _, _ = state.grow_state(now, grown, settings.optim, "copy_scaled", one)
    for field, power in (("mu", 1), ("nu", 2)):
        before = getattr(now.opt_state[0], field)["embed"]
        after = getattr(grew[0], field)["embed"]
        copied = np.concatenate([before, before], axis=1)
        np.testing.assert_allclose(after, copied / 2**power, rtol=1e-6)


def test_what_cannot_be_mapped_is_initialized_again_and_named(one, caplog):
    settings = settings_of("factored")
    now = make_state(one, settings)
    grown = plan_growth("stack(g=2)", Parent(SPEC))
    with caplog.at_level("INFO", "jaxpt"):
        state.grow_state(now, grown, settings.optim, "copy", one)
    assert "initialized again" in caplog.text and "v_row['blocks']['up']" in caplog.text


@pytest.mark.parametrize("is_good", [True, False])
def test_an_update_is_skipped_bit_by_bit_in_the_form_of_cpus_and_of_others(is_good):
    """A conditional there, a selection here: both give the same."""
    tx = optax.adamw(0.1)
    params = {"w": jnp.linspace(-2.0, 3.0, 24)}
    before = params, tx.update(params, tx.init(params), params)[1]
    grads = {"w": jnp.full(24, 0.3 if is_good else jnp.nan)}

    def update(params, opt_state):
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    run = jax.jit(functools.partial(step.update_if, update=update), static_argnames="on_cpu")
    found = [
        run(jnp.bool_(is_good), params=params, opt_state=before[1], on_cpu=on_cpu)
        for on_cpu in (True, False)
    ]
    jax.tree.map(np.testing.assert_array_equal, *found)
    if not is_good:
        jax.tree.map(np.testing.assert_array_equal, found[1], before)


def test_adafactor_updates_each_layer_of_a_stack_as_if_it_were_alone():
    """optax would factor the layers' axis, which is the largest, and clip all layers as one."""
    heads = {"n_heads": 32, "n_kv_heads": 32, "d_head": 34}
    spec = SPEC.replace(n_layers=45, d_model=36, qkv_bias=True, **heads)
    blocks = transformer.param_specs(spec)["blocks"]
    is_factored = {"up": True, "attn_norm": False, "k_bias": False}
    specs = {"blocks": {name: blocks[name] for name in is_factored}}
    optim = OptimConfig(weight_decay=0, b1=0)
    inputs = optimizer.OptimizerInputs(optim, specs, NewParams(), -1.0, 0, 0)
    rng = np.random.default_rng(0)
    first, second = (
        {name: rng.standard_normal(blocks[name].shape, np.float32) for name in is_factored}
        for _ in range(2)
    )
    for values in second.values():
        values[44] *= 10  # clipped

    def run(tx, *gradients):
        opt_state = tx.init(gradients[0])
        for grads in gradients:
            updates, opt_state = tx.update(grads, opt_state, grads)
        return updates

    @jax.jit
    def compare(first, second):
        found = run(optimizer.make_adafactor(inputs), {"blocks": first}, {"blocks": second})
        expected = {}
        for name, factored in is_factored.items():
            rms = optax.scale_by_factored_rms(factored, min_dim_size_to_factor=32)
            alone = optax.chain(rms, optax.clip_by_block_rms(1.0))
            layers = [run(alone, first[name][i], second[name][i]) for i in (0, 44)]
            expected[name] = jnp.stack(layers)
        return jax.tree.map(lambda x: x[jnp.array([0, 44])], found["blocks"]), expected

    found, expected = compare(first, second)
    for name in is_factored:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, err_msg=name)


def test_an_optimizer_that_does_not_exist_is_named_with_those_that_do():
    with pytest.raises(UserError, match=r"optim.name.*did you mean .adamw"):
        optimizer.make_optimizer(OptimConfig(name="adamx"), SPEC)


def test_multipliers_that_would_not_reach_an_iterate_are_refused(one):
    optim = dataclasses.replace(settings_of("schedule_free").optim, lr_multipliers=(("up", 0.0),))
    with pytest.raises(UserError, match=r"lr_multipliers.*schedule_free.*\(z\).*adamw or muon"):
        run = step.build_step(SPEC, SETTINGS.train, optim, SETTINGS.pack.seq_len, one)
        abstract = state.make_abstract_state(SPEC, optim, one)
        run.lower(abstract, step.make_abstract_batch(16, 32, one))


# ---- moments in few bits


@pytest.mark.parametrize("power", [1, 2])
def test_rounding_is_right_on_average_and_the_same_for_the_same_seed(power):
    rng = np.random.default_rng(0)
    values = rng.uniform(0.05, 1, (3, 40)) * rng.choice([-1, 1], (3, 40))
    values = jnp.asarray(values**power, jnp.float32)
    n = 2_000

    def through_int8(seed):
        bits = low_precision.draw_bits(values.shape, seed, salt=3)
        codes, scales = low_precision.encode_blocks(values, bits, power)
        assert codes.dtype == jnp.int8 and scales.shape == (3, 1)
        return low_precision.decode_blocks(codes, scales, power)

    def through_bfloat16(seed):
        bits = low_precision.draw_bits(values.shape, seed, salt=3)
        return low_precision.round_to_bfloat16(values, bits).astype(jnp.float32)

    for through, largest in ((through_int8, 0.2), (through_bfloat16, 0.008)):
        found = np.asarray(jax.jit(jax.vmap(through))(jnp.arange(n)))
        error = found - np.asarray(values)
        deviations = error.mean(0) / (error.std(0) / n**0.5 + 1e-6)
        assert abs(deviations).max() < 5 and 0.5 < np.square(deviations).mean() < 1.5
        assert 0 < abs(error / values).max() < largest
        np.testing.assert_array_equal(jax.jit(through)(7), found[7])


def test_a_small_mean_square_never_becomes_zero_and_zero_stays():
    values = jnp.array([1.0, 1e-20, 0.0, 0.3])
    for seed in range(5):
        bits = low_precision.draw_bits(values.shape, seed, salt=0)
        codes, _ = low_precision.encode_blocks(values, bits, power=2)
        assert codes[1] == 1 and codes[2] == 0
    zeros, scales = low_precision.encode_blocks(jnp.zeros(6), bits[:1] * jnp.ones(6, jnp.uint32), 1)
    np.testing.assert_array_equal(low_precision.decode_blocks(zeros, scales, 1), np.zeros(6))


def test_a_block_divides_the_last_axis_of_any_weight():
    for n, block in ((24, 24), (512, 256), (768, 256), (11_008, 256), (257, 1), (1_000, 250)):
        assert low_precision.split_blocks(jnp.zeros((2, n))).shape == (2, n // block, block)


def test_int8_moments_take_no_more_than_bfloat16_whatever_the_last_axis():
    def pack(params):
        packed = low_precision.pack_state(optax.TraceState(params), params, "int8", 0)
        return packed, low_precision.unpack_state(packed)

    for n, n_bytes in ((256, 1 + 4 / 256), (8, 1.5), (7, 2), (32_003, 2)):
        params = {"w": jax.ShapeDtypeStruct((3, n), jnp.float32)}
        packed, unpacked = jax.eval_shape(pack, params)
        sizes = [leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(packed)]
        assert sum(sizes) == 3 * n * n_bytes
        assert unpacked.trace == params


def test_int8_moments_on_any_mesh_have_the_bits_of_one_device_and_sharded_scales(one):
    """The rounding does not depend on the mesh; scales are sharded where blocks allow it."""
    values = jax.random.normal(jax.random.key(0), (3, 16, 1024))
    params = {"blocks": {"up": values}}
    moments = optax.ScaleByAdamState(jnp.int32(5), params, jax.tree.map(jnp.square, params))

    def pack(moments):
        return low_precision.pack_state(moments, params, "int8", 9)

    expected = jax.jit(pack)(moments)
    mesh = sharding.make_mesh(MeshConfig(fsdp=4, tensor=2))
    there = sharding.make_logical_sharding(mesh, ("layers", "embed", "mlp"))
    sharded = jax.device_put(moments, optax.ScaleByAdamState(None, there, there))
    found = jax.jit(pack)(sharded)
    assert_equal(found, expected)
    scale = found.scales.nu["blocks"]["up"]
    assert scale.shape == (3, 16, 4)
    assert sharding.fit_sharding(there, scale.shape) == there
    assert sharding.fit_sharding(there, (3, 16, 3)) != there
    abstract = state.make_abstract_state(SPEC, settings_of("adamw int8").optim, mesh)
    scales = abstract.opt_state.scales[0].mu["blocks"]["up"]
    assert scales.sharding.shard_shape(scales.shape)[1] == SPEC.d_model // 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"moment_dtype": "int8"}, r"optim.moment_dtype: runs/a has moments of params.*int8"),
        ({"name": "muon"}, r"optim.name: runs/a has moments of adamw.*muon.*source=runs/a"),
    ],
)
def test_moments_in_another_form_are_refused(changes, message):
    record = CheckpointRecord(step=3, optimizer="adamw", moment_dtype="params")
    begin.check_optimizer(record, OptimConfig(), "runs/a")
    with pytest.raises(UserError, match=message):
        begin.check_optimizer(record, OptimConfig(**changes), "runs/a")


N_BYTES = {"adamw": 8, "adamw bfloat16": 4, "adamw int8": 2, "adafactor": 4, "adafactor int8": 1}


@pytest.mark.parametrize(("name", "n_bytes"), N_BYTES.items(), ids=N_BYTES)
def test_bytes_per_parameter_are_what_the_dtype_says(name, n_bytes):
    spec = SPEC.replace(d_model=128, d_ff=256, vocab_size=512)
    optim = settings_of(name).optim
    counted = roofline.count_state_bytes(spec, optim, "float32")
    per_param = (counted.moments + counted.rest) / transformer.count_params(spec)
    assert n_bytes <= per_param < n_bytes + 0.7
