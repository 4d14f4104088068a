"""Products of rows that are sorted by expert with their experts' matrices, by tuned kernels.

Megablox is JAX's for TPUs, tokamax is Google's for NVIDIA GPUs. Rows past the last expert's are
read and written by neither: what stands there is undefined.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

TILE_ROWS = 128  # at least; the rows are a multiple of it
MAX_TILE_ROWS = 512
MAX_TILE_WIDTH = 1024  # of bfloat16; with 512 rows 10 of the 16 MiB that a TPU's kernel may use


class GroupedProducts(NamedTuple):
    """The three products of a mixture's forward and backward, jitted under these names.

    M rows, of which the first sizes[0] are of expert 0 and so on; int32 sizes [E], none of them 0.

    Attributes:
        multiply_groups: of rows [M, D], matrices [E, D, F] and sizes; returns [M, F].
        multiply_transposed: of rows [M, F], matrices [E, D, F] and sizes; returns [M, D].
        sum_groups: of left [M, D], right [M, F] and sizes; returns each expert's left.T @ right,
            float32 [E, D, F].
    """

    multiply_groups: Callable[[Array, Array, Array], Array]
    multiply_transposed: Callable[[Array, Array, Array], Array]
    sum_groups: Callable[[Array, Array, Array], Array]


def count_product_flops(name: str, shapes: Sequence[tuple[int, ...]]) -> float | None:
    """Return the FLOPs of a product by its name and its arguments' shapes; None for other names."""
    n_operands = 3  # in a step with tokamax 0.0.12, calls of the same name without any were seen
    if name not in GroupedProducts._fields or len(shapes) != n_operands:
        return None
    left, right, _ = shapes
    n_out = right[1] if name == "multiply_transposed" else right[-1]
    return 2.0 * left[0] * left[1] * n_out


# ---- on TPUs


def make_megablox_products(interpret: bool = False) -> GroupedProducts:
    """Return JAX's kernels (jax.experimental.pallas.ops.tpu.megablox)."""

    def multiply(rows: Array, matrices: Array, sizes: Array, is_transposed: bool) -> Array:
        from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm

        _, D, F = matrices.shape
        n_in, n_out = (F, D) if is_transposed else (D, F)
        max_width = MAX_TILE_WIDTH * 2 // rows.dtype.itemsize
        tiling = (
            choose_tile_rows(len(rows), len(sizes)),
            choose_tile_width(n_in, max_width),
            choose_tile_width(n_out, max_width),
        )
        return gmm(
            rows,
            matrices,
            sizes,
            rows.dtype,
            tiling,
            transpose_rhs=is_transposed,
            interpret=interpret,
        )

    @jax.jit
    def multiply_groups(rows: Array, matrices: Array, sizes: Array) -> Array:
        return multiply(rows, matrices, sizes, is_transposed=False)

    @jax.jit
    def multiply_transposed(rows: Array, matrices: Array, sizes: Array) -> Array:
        return multiply(rows, matrices, sizes, is_transposed=True)

    @jax.jit
    def sum_groups(left: Array, right: Array, sizes: Array) -> Array:
        from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

        # its tiles are converted to float32, and so is the result
        tiling = (
            choose_tile_rows(len(left), len(sizes)),
            choose_tile_width(left.shape[1], MAX_TILE_WIDTH // 2),
            choose_tile_width(right.shape[1], MAX_TILE_WIDTH // 2),
        )
        return tgmm(left.T, right, sizes, jnp.float32, tiling, interpret=interpret)

    return GroupedProducts(multiply_groups, multiply_transposed, sum_groups)


def choose_tile_rows(n_rows: int, n_experts: int) -> int:
    """Return the rows of a tile, at most an eighth of an expert's mean.

    A tile that two experts share is multiplied for both.
    """
    tile = MAX_TILE_ROWS
    while tile > TILE_ROWS and (n_rows % tile or 8 * tile * n_experts > n_rows):
        tile //= 2
    return tile


def choose_tile_width(width: int, max_width: int) -> int:
    """Return the largest multiple of 128 that divides a width.

    Other widths are one tile, or tiles of the largest size of which the last is masked.
    """
    for tile in range(max_width, 0, -128):
        if width % tile == 0:
            return tile
    return min(width, max_width)


# ---- on NVIDIA GPUs


def make_tokamax_products() -> GroupedProducts:
    """Return tokamax's kernels."""

    @jax.jit
    def multiply_groups(rows: Array, matrices: Array, sizes: Array) -> Array:
        return run_tokamax(rows, matrices, sizes, contracted=((1,), (1,)))

    @jax.jit
    def multiply_transposed(rows: Array, matrices: Array, sizes: Array) -> Array:
        return run_tokamax(rows, matrices, sizes, contracted=((1,), (2,)))

    @jax.jit
    def sum_groups(left: Array, right: Array, sizes: Array) -> Array:
        return run_tokamax(left, right, sizes, contracted=((0,), (0,)))

    return GroupedProducts(multiply_groups, multiply_transposed, sum_groups)


def run_tokamax(
    left: Array,
    right: Array,
    sizes: Array,
    contracted: tuple[tuple[int], tuple[int]],
) -> Array:
    """Return the product that contracts these axes of left and right, by Triton.

    tokamax has kernels by Mosaic too. They read and write 64 x 64 tiles unless they were tuned on
    the card, half as much work for each byte as Triton's 128 x 128, and take widths of whole tiles.
    """
    import tokamax  # pyright: ignore[reportMissingImports]  (optional)
    from absl import flags, logging

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # tokamax would read the command line, which is the run's
    is_sum = contracted == ((0,), (0,))
    numbers = jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(contracted, ((), ())),
        lhs_ragged_dimensions=[0],
        rhs_group_dimensions=[] if is_sum else [0],
    )
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)  # it warns of each product that was not tuned, at length
    try:
        return tokamax.ragged_dot_general(
            left,
            right,
            sizes,
            numbers,
            preferred_element_type=jnp.float32 if is_sum else left.dtype,
            implementation="triton",
        )
    finally:
        logging.set_verbosity(verbosity)


PRODUCTS = {"megablox": make_megablox_products(), "tokamax": make_tokamax_products()}
