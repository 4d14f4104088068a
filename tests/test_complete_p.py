"""Laws of CompleteP: the paper's table, the same function at every depth and width, exports."""

import dataclasses
import functools
import itertools

import coordinates
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_train import SETTINGS, SPEC, make_batch, make_state, put

from jaxpt import initialize
from jaxpt.config import ModelConfig, OptimConfig
from jaxpt.families import family
from jaxpt.growth.apply import grow_params
from jaxpt.growth.growth import Parent
from jaxpt.growth.parse import plan_growth
from jaxpt.model import transformer
from jaxpt.model.param import list_param_specs, map_param_specs
from jaxpt.spec import UserError
from jaxpt.train import step

# L3 D24 of a base of L2 D8: depth 1.5, width 3
BASE = "2x8"
DEPTH, WIDTH = 1.5, 3.0
# eps as large as gradients are: Adam would not see its ratios otherwise
OPTIM = OptimConfig(
    peak_lr=1e-2, schedule="constant", warmup_frac=0, weight_decay=0.3, eps=3e-3, clip_norm=0
)
WRITERS = ("o", "down")
MATRICES = ("q", "k", "v", "o", "gate", "up", "down")


def with_base(spec, base=BASE):
    return initialize.set_base_shape(spec, base)


def run_steps(spec, params, one, optim, n=5):
    """Return the losses of n steps."""
    settings = dataclasses.replace(SETTINGS, optim=optim)
    run = step.build_step(spec, settings.train, optim, settings.pack.seq_len, one)
    now, losses = make_state(one, settings, spec), []
    now = now._replace(
        params=jax.device_put(params, jax.tree.map(lambda x: x.sharding, now.params))
    )
    for i in range(n):
        now, scalars = run(now, put(make_batch(i), one))
        losses.append(float(scalars["loss"]))
    return losses


# ---- the paper's table


def run_paper(spec, params, n=5):
    """Return the losses of n steps by the paper's table 1: forward multipliers, plain optax."""
    forward = spec.replace(base_shape=None, residual_multiplier=1 / DEPTH, logit_divisor=WIDTH)

    def label(path, _):
        name = path[-1].key
        if name in MATRICES:
            return "matrix"
        return "in_layer" if path[0].key == "blocks" else "outside" if name != "unembed" else name

    def adamw(rate, eps, decay):
        peak, b1, b2 = OPTIM.peak_lr, OPTIM.b1, OPTIM.b2
        return optax.adamw(rate * peak, b1, b2, eps * OPTIM.eps, weight_decay=decay * 0.3)

    tx = optax.multi_transform(
        {
            "matrix": adamw(1 / WIDTH, 1 / (WIDTH * DEPTH), WIDTH),
            "in_layer": adamw(1, 1 / (WIDTH * DEPTH), 0),
            "outside": adamw(1, 1 / WIDTH, 0),
            "unembed": adamw(1, 1 / WIDTH, 1),
        },
        functools.partial(jax.tree_util.tree_map_with_path, label),
    )

    def loss(params, batch):
        inputs = batch.tokens, batch.segment_ids, batch.positions
        logits = transformer.compute_logits(forward, params, *inputs)
        found = jnp.take_along_axis(jax.nn.log_softmax(logits), batch.targets[..., None], axis=-1)
        return -jnp.sum(found[..., 0] * batch.loss_mask) / jnp.sum(batch.loss_mask)

    @jax.jit
    def update(params, opt_state, batch):
        value, grads = jax.value_and_grad(loss)(params, batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    opt_state, losses = tx.init(params), []
    for i in range(n):
        params, opt_state, value = update(params, opt_state, make_batch(i))
        losses.append(float(value))
    return losses


@pytest.mark.parametrize("tied", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_steps_equal_the_papers_table_with_multipliers_in_the_forward_pass(one, tied):
    spec = with_base(SPEC.replace(tie_embeddings=tied))
    params = transformer.init_params(spec, 0, one)
    unfolded = {**params, "blocks": dict(params["blocks"])}
    for name in WRITERS:
        unfolded["blocks"][name] = DEPTH * params["blocks"][name]
    head = "norm" if tied else "unembed"
    unfolded[head] = WIDTH * params[head]
    expected = run_paper(spec, unfolded)
    np.testing.assert_allclose(run_steps(spec, params, one, OPTIM), expected, rtol=2e-5)
    assert expected[-1] < expected[0] - 0.05


@pytest.mark.parametrize("placement", ["pre", "post", "both"])
def test_initial_values_are_the_bases_times_what_the_table_says(placement):
    spec = SPEC.replace(norm_placement=placement)
    base = spec.replace(n_layers=2, d_model=8, d_ff=40 // 3, n_heads=2)
    at_base = dict(list_param_specs(transformer.param_specs(base)))
    for path, param in list_param_specs(transformer.param_specs(with_base(spec))):
        expected = at_base[path].init.std
        if path[-1] in MATRICES:
            expected *= WIDTH**-0.5
        if path[-1] in WRITERS and placement == "pre":  # otherwise the norms after them write
            expected /= DEPTH
        if path == ("unembed",):
            expected /= WIDTH
        assert param.init.std == pytest.approx(expected, rel=0.02), path  # 40 / 3 is no integer


def test_the_base_itself_trains_as_without():
    specs = transformer.param_specs(with_base(SPEC, "3x24"))
    plain = transformer.param_specs(SPEC)
    map_param_specs(same, specs, plain)


def same(path, ours, theirs):
    assert ours == theirs, path


def test_a_norm_that_writes_into_the_residual_holds_the_multiplier():
    spec = with_base(SPEC.replace(family="gemma2", norm_placement="both", norm_adds_one=True))
    blocks = transformer.param_specs(spec)["blocks"]
    assert blocks["attn_post_norm"].init.mean == pytest.approx(1 / DEPTH - 1)
    assert blocks["mlp_post_norm"].lr_ratio == 1 / DEPTH
    assert blocks["down"].lr_ratio == pytest.approx(1 / WIDTH)


# ---- the coordinate check (benchmarks/coordinates.py: widths 64-512, depths 4-32)


def measure_change(shape, base, name):
    optim = dataclasses.replace(coordinates.OPTIM, name=name, peak_lr=1e-3)
    spec = coordinates.make_spec(*shape, base)
    return coordinates.measure_change(spec, optim, 1.0, n_steps=4, shape=(2, 32)).hidden


@pytest.mark.parametrize("name", ["adamw", pytest.param("muon", marks=pytest.mark.slow)])
def test_what_steps_change_does_not_depend_on_depth_and_width(name):
    small = measure_change((2, 16), "", name)
    plain = measure_change((12, 96), "", name) / small
    ours = measure_change((12, 96), "2x16", name) / small
    assert 0.8 < ours < 1.25 and plain > 2.5, (ours, plain)


# ---- growth and export


def test_growth_keeps_the_base_and_the_function_and_follows_with_rates(one):
    spec = with_base(SPEC)
    params = transformer.init_params(spec, 0, one)
    grown = plan_growth("insert_identity(every=1)", Parent(spec))
    assert grown.child.base_shape == spec.base_shape
    child = grow_params(grown, params, one)
    inputs = np.arange(20)[None] % 96, np.ones((1, 20), int), np.arange(20)[None]
    ours = transformer.compute_logits(grown.child, child, *inputs)
    np.testing.assert_array_equal(ours, transformer.compute_logits(spec, params, *inputs))
    ratios = itertools.product(["o", "down", "q"], [spec, grown.child])
    found = [transformer.param_specs(s)["blocks"][name].lr_ratio for name, s in ratios]
    assert found[1] == found[0] / 2 and found[3] == found[2] / 2 and found[5] == found[4]
    wide = plan_growth("widen(ff=80, heads=12)", Parent(spec)).child
    blocks = transformer.param_specs(wide)["blocks"]
    assert blocks["down"].lr_ratio == pytest.approx(found[2] / 2)
    assert blocks["gate"].lr_ratio == pytest.approx(1 / WIDTH)


def test_an_upcycled_mlp_cut_into_parts_keeps_its_rates():
    spec = with_base(SPEC)
    child = plan_growth("upcycle(granularity=2, expansion=3, top_k=2)", Parent(spec)).child
    ours, theirs = (transformer.param_specs(s)["blocks"] for s in (child, spec))
    for name in ("gate", "up", "down"):
        assert ours[name].lr_ratio == pytest.approx(theirs[name].lr_ratio), name


def test_an_export_is_that_of_a_plain_model():
    spec = with_base(SPEC)
    assert family.write_config(spec, "float32") == family.write_config(SPEC, "float32")


# ---- the knob


@pytest.mark.parametrize("text", ["4", "4x", "0x256", "4x256x3", "4 x 256"])
def test_a_base_that_is_no_shape_is_refused(text):
    with pytest.raises(UserError, match="expected LAYERSxWIDTH"):
        initialize.make_random_spec(ModelConfig(vocab_size=96, base_shape=text), None)


def test_a_family_whose_embedding_grows_with_the_width_is_refused():
    gemma = SPEC.replace(family="gemma2", embed_multiplier=SPEC.d_model**0.5)
    with pytest.raises(UserError, match="gemma2 multiplies its embedding by the root of the width"):
        initialize.set_base_shape(gemma, "1x16")
    granite = gemma.replace(family="granite", embed_multiplier=12.0)
    assert initialize.set_base_shape(granite, "1x16").base_shape


def test_a_model_keeps_the_base_that_it_was_trained_with():
    spec = with_base(SPEC)
    wide = spec.replace(d_ff=80)
    assert with_base(wide, "") == with_base(wide) == wide
    with pytest.raises(UserError, match="trained with 2x8, got 2x16"):
        with_base(wide, "2x16")
