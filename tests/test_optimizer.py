"""AdamW as it is written here, in place and with one factor, is optax's."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxpt.config import OptimConfig
from jaxpt.train import optimizer


@pytest.mark.parametrize("clip_norm", [0.0, 0.5])
def test_adam_equals_optax_and_a_bad_step_leaves_it_as_it_was(spec, clip_norm):
    optim = OptimConfig(clip_norm=clip_norm, weight_decay=0.1)
    plain = optax.chain(
        optax.clip_by_global_norm(clip_norm) if clip_norm else optax.identity(),
        optax.scale_by_adam(optim.b1, optim.b2, optim.eps),
        optax.add_decayed_weights(0.1, mask=optimizer.decay_mask),
    )
    ours = optimizer.make_optimizer(optim, spec)
    rng = np.random.default_rng(0)
    draw = lambda: {
        "q": jnp.asarray(rng.normal(size=(5, 24)), jnp.float32),
        "norm": jnp.asarray(rng.normal(size=24), jnp.float32),
    }
    params = draw()
    state, expected_state = ours.init(params), plain.init(params)
    for tokens in (7, 96, 40):
        sums = draw()  # of gradients over so many tokens
        mean = jax.tree.map(lambda g, n=tokens: g / n, sums)
        scale = (
            min(clip_norm / float(optax.tree.norm(mean)), 1) / tokens if clip_norm else 1 / tokens
        )
        update = jax.jit(
            lambda s, state, scale, good: ours.update(s, state, params, scale=scale, good=good)
        )
        broken = jax.tree.map(lambda g: g * jnp.nan, sums)
        jax.tree.map(np.testing.assert_array_equal, update(broken, state, scale, False)[1], state)
        directions, state = update(sums, state, scale, True)
        expected, expected_state = plain.update(mean, expected_state, params)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-9),
            state[0],
            optimizer.AdamState(*expected_state[1]),
        )
        # of order 1, and a difference of two such numbers here and there
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7),
            directions,
            expected,
        )
