"""The coordinate check: what the first steps change, at several widths and depths (2203.03466).

    python benchmarks/coordinates.py

A parametrization transfers rates if the change of the hidden states before the head, and with it
of the logits, depends neither on width nor on depth.
Ten steps of one batch of random tokens at a constant rate, with and without model.base_shape.
"""

import pathlib
import sys
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxpt import config, initialize
from jaxpt.model import transformer
from jaxpt.model.param import ParamSpec, map_param_specs
from jaxpt.spec import ModelSpec
from jaxpt.train import optimizer

BASE = (4, 64)  # layers, width
SHAPES = ((4, 64), (4, 128), (4, 256), (4, 512), (8, 64), (16, 64), (32, 64))
OPTIM = config.OptimConfig(peak_lr=2e-4, schedule="constant", warmup_frac=0)


class Change(NamedTuple):
    """Root mean squares, after the steps.

    Attributes:
        hidden: of the change of the hidden states before the head, whose own is about 1.
        logits: of the change of the logits.
    """

    hidden: float
    logits: float


def make_spec(n_layers: int, d_model: int, base: str) -> ModelSpec:
    n_heads = d_model // 16
    spec = ModelSpec(
        n_layers=n_layers,
        d_model=d_model,
        d_ff=2 * d_model,
        n_heads=n_heads,
        n_kv_heads=n_heads,
        d_head=16,
        vocab_size=256,
    )
    return initialize.set_base_shape(spec, base)


def measure_change(
    spec: ModelSpec,
    optim: config.OptimConfig,
    embed_std: float,
    n_steps: int = 10,
    shape: tuple[int, int] = (4, 64),
    seed: int = 0,
) -> Change:
    """Return what steps on one batch of this shape change."""
    rng = np.random.default_rng(seed)

    def draw(path: tuple[str, ...], param: ParamSpec) -> jax.Array:
        mean, std = param.init
        if path == ("embed",):
            std = embed_std
        return jnp.asarray(rng.normal(mean, std, param.shape), jnp.float32)

    params = map_param_specs(draw, transformer.param_specs(spec))
    draws = rng.zipf(1.3, shape)  # frequencies as in text
    tokens = jnp.asarray(draws % spec.vocab_size, jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(shape[1]), shape)
    inputs = tokens, jnp.ones(shape, jnp.int32), positions
    tx = optimizer.make_optimizer(optim, spec, learning_rate=optim.peak_lr)

    def run(params: transformer.Params) -> tuple[jax.Array, jax.Array]:
        hidden, _ = transformer.forward(spec, params, *inputs)
        return hidden, hidden @ transformer.lm_head(spec, params)

    def loss(params: transformer.Params) -> jax.Array:
        _, logits = run(params)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:])
        return jnp.mean(losses)

    def update(carry: tuple, _: None) -> tuple[tuple, None]:
        params, opt_state = carry
        updates, opt_state = tx.update(jax.grad(loss)(params), opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), None

    @jax.jit
    def train(params: transformer.Params) -> list[jax.Array]:
        start = (params, tx.init(params))
        (trained, _), _ = jax.lax.scan(update, start, None, n_steps)
        pairs = zip(run(params), run(trained), strict=True)
        return [jnp.sqrt(jnp.mean((after - before) ** 2)) for before, after in pairs]

    return Change(*map(float, train(params)))


def print_table(embed_std: float = 1.0) -> None:
    """Print the changes over those of the base, standard and with model.base_shape."""
    base = "x".join(map(str, BASE))
    print(f"\n| layers x width | standard: hidden | logits | base_shape {base}: hidden | logits |")
    print("|---|---|---|---|---|")
    firsts: dict[str, Change] = {}
    for shape in SHAPES:
        cells = []
        for text in ("", base):
            found = measure_change(make_spec(*shape, text), OPTIM, embed_std)
            first = firsts.setdefault(text, found)
            cells += [f"{a / b:.2f}" for a, b in zip(found, first, strict=True)]
        print(f"| {shape[0]} x {shape[1]} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    print_table()
