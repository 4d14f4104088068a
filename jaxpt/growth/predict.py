"""Predict layers between two others from their neighbors: LESA (2502.13794), fitted in closed form.

LESA trains a network of two hidden layers for each kind of matrix, with a loss that keeps the norm.
Here the fit is linear, so that it is the same on every mesh and takes a second. It is regularized
towards the neighbors' mean, which remains where there is nothing to learn; and what cannot be
predicted is made smaller instead of rescaled to the norm: a layer of full norm in meaningless
directions does harm that training has to undo.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxpt.model import transformer
from jaxpt.model.param import ParamSpec
from jaxpt.model.transformer import Params
from jaxpt.spec import ModelSpec, UserError

# Times the energy of both neighbors. Where all layers are alike each neighbor gives 1/2 at any
# strength; where they have nothing in common, as in every small model measured, each gives 1/3 at
# this one. Weaker ones leave layers of nearly nothing.
RIDGE_LAMBDA = 1.0


def predict_layer_params(spec: ModelSpec, blocks: Params, gaps: Sequence[int]) -> Params:
    """Return new layers to insert between layers i and i + 1, for each i of `gaps`.

    A matrix is written in the directions of the residual stream that all layers' matrices of its
    kind share (their SVD side by side). In each direction two coefficients, fitted over all triples
    of neighbors in the model, give a layer from the one before and the one after it; they are
    applied to layers i and i + 1. Norms and biases are the neighbors' mean.

    Args:
        spec: the architecture.
        blocks: name -> [L, ...]. Works traced and not.
        gaps: layers with a new one after them.

    Returns:
        name -> [len(gaps), ...], computed in float32.

    Raises:
        UserError: fewer than 3 layers.
    """
    n_layers = spec.n_layers
    if n_layers < 3:
        raise UserError(
            f"predict_layers: expected a model of at least 3 layers, got {n_layers}: "
            "it learns from layers between two others."
        )
    indices = jnp.asarray(gaps)
    params = transformer.param_specs(spec)["blocks"]
    predicted = {}
    with jax.default_matmul_precision("float32"):
        for name, leaf in blocks.items():
            predict = functools.partial(predict_between, params[name], gaps=indices)
            for _ in range(params[name].n_stacked - 1):  # each expert from its own neighbors
                predict = jax.vmap(predict, in_axes=1, out_axes=1)
            predicted[name] = predict(leaf)
    return predicted


def predict_between(param: ParamSpec, leaf: jax.Array, gaps: jax.Array) -> jax.Array:
    """Return one weight's new layers, one at a time: a device gathers no more than one layer."""
    if not param.n_in:
        neighbors = jnp.stack([leaf[gaps], leaf[gaps + 1]])
        mean = jnp.mean(neighbors.astype(jnp.float32), axis=0)
        return mean.astype(leaf.dtype)

    writes_residual = param.axes[-1] == "embed"

    def matrix(i: Any) -> jax.Array:
        layer = leaf[i].astype(jnp.float32)
        if writes_residual:  # the residual stream is its last axis, the others' first
            return layer.reshape(-1, layer.shape[-1]).T
        return layer.reshape(len(layer), -1)

    basis, coefficients = fit_layer_regression(matrix, len(leaf))

    def predict(i: jax.Array) -> jax.Array:
        before = coefficients[0] * (basis.T @ matrix(i))
        after = coefficients[1] * (basis.T @ matrix(i + 1))
        new = basis @ (before + after)
        if writes_residual:
            new = new.T
        new = new.reshape(leaf.shape[1:])
        return new.astype(leaf.dtype)

    return jax.lax.map(predict, gaps)


def fit_layer_regression(
    matrix: Callable[[Any], jax.Array], n_layers: int
) -> tuple[jax.Array, jax.Array]:
    """Fit each layer's matrix from the two beside it.

    Args:
        matrix: layer -> [D, columns].
        n_layers: how many layers there are.

    Returns:
        Orthonormal directions [D, D], and the coefficients of the layer before and of the layer
        after, [2, D, 1].
    """

    def add_gram(gram: jax.Array, i: jax.Array) -> tuple[jax.Array, None]:
        return gram + matrix(i) @ matrix(i).T, None

    D = jax.eval_shape(matrix, 0).shape[0]
    zeros = jnp.zeros((D, D))
    # the Gram matrix has the singular directions of all layers, and the size of one layer
    gram, _ = jax.lax.scan(add_gram, zeros, jnp.arange(n_layers))
    _, basis = jnp.linalg.eigh(gram)

    def multiply_triple(i: jax.Array) -> jax.Array:
        a = basis.T @ matrix(i - 1)
        middle = basis.T @ matrix(i)
        b = basis.T @ matrix(i + 1)
        rest = middle - (a + b) / 2
        products = [a * a, b * b, a * b, a * rest, b * rest]
        return jnp.stack([jnp.sum(product, axis=1) for product in products])

    products = jax.lax.map(multiply_triple, jnp.arange(1, n_layers - 1))
    aa, bb, ab, a_rest, b_rest = jnp.sum(products, axis=0)
    ridge = RIDGE_LAMBDA * (aa + bb)
    aa += ridge
    bb += ridge
    tiny = jnp.finfo(jnp.float32).tiny  # the determinant is 0 in a direction that no layer uses
    determinant = jnp.maximum(aa * bb - ab * ab, tiny)
    before = bb * a_rest - ab * b_rest
    after = aa * b_rest - ab * a_rest
    coefficients = 0.5 + jnp.stack([before, after]) / determinant
    return basis, coefficients[..., None]
