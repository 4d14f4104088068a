"""Layers that never were, predicted from their neighbours to be: LESA (2502.13794) with a closed-form fit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxpt.spec import UserError

# Times the energy of both neighbours. Where all layers are alike each neighbour gives 1/2 at any strength; where they have
# nothing in common, as in every small model measured, each gives 1/3 at this one. Weaker ones leave layers of nearly nothing.
RIDGE_LAMBDA = 1.0


def predict_layer_params(blocks: dict[str, Any], gaps: Sequence[int]) -> dict[str, Any]:
    """New layers to stand between layers i and i + 1, for each i of gaps: every leaf of blocks [L, ...] as [len(gaps), ...].

    A matrix is taken apart in the directions of the residual stream that all layers' matrices of its kind share (their SVD
    side by side). In each direction two shares are fitted over all triples of neighbours in the model, which make a layer of
    the one before and the one behind it; the new layer is made so of layers i and i + 1. Norms and biases are the
    neighbours' mean.

    LESA trains a network of two hidden layers for each kind of matrix, with a loss that keeps the norm. Here the fit is
    linear, so that it is the same on every mesh and in a second; it is drawn towards the neighbours' mean, which is what is
    left where there is nothing to learn; and what cannot be predicted is made smaller instead of brought back to the norm:
    a layer of full norm in directions that mean nothing does harm that training has to undo.

    Works traced and not; computed in float32. Raises UserError below 3 layers.
    """
    n_layers = len(blocks["q"])
    if n_layers < 3:
        raise UserError(
            f"predict_layers: a model of {n_layers} layers has none between two others to learn from. Wanted at least 3."
        )
    with jax.default_matmul_precision("float32"):
        return {
            name: predict_between(name, leaf, jnp.asarray(gaps)) for name, leaf in blocks.items()
        }


def predict_between(name: str, leaf: jax.Array, gaps: jax.Array) -> jax.Array:
    """The new layers of one leaf; one layer at a time, so that a device gathers no more than one."""
    if name.endswith(("norm", "bias")):
        return jnp.mean(jnp.stack([leaf[gaps], leaf[gaps + 1]]).astype(jnp.float32), axis=0).astype(
            leaf.dtype
        )
    from_residual = name not in (
        "o",
        "down",
    )  # these two have the residual stream as their last axis, the others as their first

    def matrix(i):  # [D, columns]
        one = leaf[i].astype(jnp.float32)
        return one.reshape(len(one), -1) if from_residual else one.reshape(-1, one.shape[-1]).T

    basis, shares = fit_layer_regression(matrix, len(leaf))

    def new(i):
        one = basis @ (shares[0] * (basis.T @ matrix(i)) + shares[1] * (basis.T @ matrix(i + 1)))
        return (one if from_residual else one.T).reshape(leaf.shape[1:]).astype(leaf.dtype)

    return jax.lax.map(new, gaps)


def fit_layer_regression(
    matrix: Callable[[Any], jax.Array], n_layers: int
) -> tuple[jax.Array, jax.Array]:
    """(orthonormal directions [D, D], shares of the layer before and of the layer behind [2, D, 1]) of layers matrix(i), [D, columns]."""

    def add(gram, i):
        return gram + matrix(i) @ matrix(i).T, None

    D = jax.eval_shape(matrix, 0).shape[0]
    # the Gram matrix has the singular directions of all layers side by side, and the size of one layer
    gram, _ = jax.lax.scan(add, jnp.zeros((D, D)), jnp.arange(n_layers))
    basis = jnp.linalg.eigh(gram)[1]

    def products(i):
        a, middle, b = (basis.T @ matrix(j) for j in (i - 1, i, i + 1))
        rest = middle - (a + b) / 2
        return jnp.stack(
            [jnp.sum(x * y, axis=1) for x, y in ((a, a), (b, b), (a, b), (a, rest), (b, rest))]
        )

    aa, bb, ab, a_rest, b_rest = jnp.sum(jax.lax.map(products, jnp.arange(1, n_layers - 1)), axis=0)
    ridge = RIDGE_LAMBDA * (aa + bb)
    aa, bb = aa + ridge, bb + ridge
    determinant = jnp.maximum(
        aa * bb - ab * ab, jnp.finfo(jnp.float32).tiny
    )  # 0 in a direction that no layer uses
    change = jnp.stack([bb * a_rest - ab * b_rest, aa * b_rest - ab * a_rest]) / determinant
    return basis, (0.5 + change)[..., None]
