"""Merge checkpoints of one architecture into the weights of a new start: mean, linear, spherical.

The mean over the constant-rate phase of a run comes near to what a decay of the learning rate would
give, without one (2505.12082, 2507.17634); `write_average` takes the one that the run made itself.
Spherical interpolation is that of mergekit's slerp.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np

from jaxpt import config, initialize, io, sharding, stage
from jaxpt.model import transformer
from jaxpt.model.param import ParamSpec, map_param_specs
from jaxpt.spec import ModelSpec, UserError
from jaxpt.train import average
from jaxpt.train.initial_run import save_initial_model
from jaxpt.weights import checkpoint, load

log = logging.getLogger(__name__)

# a pair of tensors that point the same way is mixed linearly: the angle's sine is a divisor
PARALLEL_COSINE = 0.9995


def merge_checkpoints(
    sources: Sequence[io.Path],
    out: io.Path,
    weights: Sequence[float] | None = None,
    slerp: float | None = None,
    replace: bool = False,
) -> None:
    """Write a run directory at step 0 with the merged weights of checkpoints.

    Arrays are merged one after the other: of the largest one, memory holds some four.

    Args:
        sources: runs (their newest checkpoints) or checkpoints, of one architecture and tokenizer.
        out: the directory.
        weights: one for each source, of any sum; None: equal, which is the mean.
        slerp: of two sources, how far from the first to the second, 0 to 1, along the sphere;
            None: linear.
        replace: overwrite what `out` holds.

    Raises:
        UserError: the sources do not fit together, or the numbers do not fit them.
    """
    check_numbers(len(sources), weights, slerp)
    directories = [checkpoint.locate_checkpoint(source) for source in sources]
    spec, tokenizer = check_alike(directories)
    factors = list(weights or [1.0] * len(directories))

    def merge(path: tuple[str, ...], param: ParamSpec) -> np.ndarray:
        name = "/".join((checkpoint.PARAMS, *path))
        arrays = (checkpoint.read_array(directory, name) for directory in directories)
        if slerp is None:
            return mix_linear(arrays, factors)
        first, second = arrays
        return mix_spherical(first, second, slerp, param.n_stacked)

    settings = {"weights": factors, "slerp": slerp}
    write_model("merge", out, directories, spec, tokenizer, merge, settings, replace)


def write_average(source: io.Path, out: io.Path, replace: bool = False) -> None:
    """Write a run directory at step 0 with the weights that a run averaged (optim.average).

    Args:
        source: the run (its newest checkpoint) or a checkpoint.
        out: the directory.
        replace: overwrite what `out` holds.

    Raises:
        UserError: the checkpoint has no average.
    """
    directory = checkpoint.locate_checkpoint(source)
    spec, tokenizer = check_alike([directory])
    stored = checkpoint.read_array_metadata(directory)
    count = f"{checkpoint.AVERAGE}/{average.COUNT}"
    n_averaged = int(checkpoint.read_array(directory, count)) if count in stored else 0
    if not n_averaged:
        raise UserError(
            f"{directory}: holds no averaged weights. Train with optim.average, and take a "
            "checkpoint of the constant-rate phase or after it."
        )
    log.info(f"average: {n_averaged:,} steps of {directory}")

    def read(path: tuple[str, ...], param: ParamSpec) -> np.ndarray:
        for kind, divisor in ((average.SUM, n_averaged), (average.EMA, 1)):
            name = "/".join((checkpoint.AVERAGE, kind, *path))
            if name in stored:
                return checkpoint.read_array(directory, name) / np.float32(divisor)
        return checkpoint.read_array(directory, "/".join((checkpoint.PARAMS, *path)))  # frozen

    write_model("average", out, [directory], spec, tokenizer, read, {}, replace)


def write_model(
    name: str,
    out: io.Path,
    directories: Sequence[io.Path],
    spec: ModelSpec,
    tokenizer: str | None,
    make: Callable[[tuple[str, ...], ParamSpec], np.ndarray],
    settings: dict[str, Any],
    replace: bool,
) -> None:
    """Write a run directory at step 0 with weights made one by one from checkpoints."""

    def work(run: pathlib.Path) -> dict[str, Any]:
        mesh = sharding.make_mesh(config.MeshConfig())

        def put(path: tuple[str, ...], param: ParamSpec, leaf: jax.ShapeDtypeStruct) -> jax.Array:
            return jax.device_put(make(path, param).astype(leaf.dtype), leaf.sharding)

        abstract = transformer.make_abstract_params(spec, mesh)
        params = map_param_specs(put, transformer.param_specs(spec), abstract)
        tokenizer_dir = load.find_tokenizer_dir(directories[0])
        local = io.local_copy(tokenizer_dir) if tokenizer_dir else None
        model = load.LoadedModel(spec, params, local, directories[0], None, tokenizer, {})
        return save_initial_model(run, initialize.InitResult(model, None, ()))

    stage.run_stage(
        name,
        out,
        work,
        config=settings,
        inputs={f"checkpoint/{i}": directory for i, directory in enumerate(directories)},
        replace=replace,
        flag="--to",
    )
    log.info(f"{name}: {out} is ready")


def check_numbers(n_sources: int, weights: Sequence[float] | None, slerp: float | None) -> None:
    """Raise UserError for numbers that do not fit the sources."""
    if n_sources < 2:
        raise UserError("merge: expected at least two checkpoints, got one.")
    if weights is not None:
        total = sum(weights)
        if len(weights) != n_sources or not math.isfinite(total) or total == 0:
            given = ", ".join(f"{weight:g}" for weight in weights)
            raise UserError(
                f"--weights: expected {n_sources} numbers, one for each checkpoint, whose sum is "
                f"not 0, got {given}."
            )
    if slerp is None:
        return
    if weights is not None or n_sources != 2 or not 0 <= slerp <= 1:
        raise UserError(
            f"--slerp: expected a number from 0 to 1, two checkpoints and no --weights, got "
            f"{slerp:g} and {n_sources} checkpoints."
        )


def check_alike(directories: Sequence[io.Path]) -> tuple[ModelSpec, str | None]:
    """Return the sources' one architecture and tokenizer. Raise UserError if they differ."""
    first, *others = directories
    spec = stage.read_spec(first / "spec.json")
    tokenizer = stage.read_manifest(first).tokenizer
    for other in others:
        theirs = stage.read_spec(other / "spec.json")
        for name, value in dataclasses.asdict(spec).items():
            if dataclasses.asdict(theirs)[name] != value:
                raise UserError(
                    f"{other}: model.{name} is {getattr(theirs, name)}, but {value} in {first}. "
                    "Only checkpoints of one architecture can be merged."
                )
        if stage.read_manifest(other).tokenizer != tokenizer:
            raise UserError(
                f"{other}: has another tokenizer than {first}. Only checkpoints of one tokenizer "
                "can be merged."
            )
    return spec, tokenizer


def mix_linear(arrays: Iterable[np.ndarray], weights: Sequence[float]) -> np.ndarray:
    """Return the weighted mean of arrays, in float32. Equal weights of 1 give numpy's mean."""
    total = np.float32(0)
    for weight, array in zip(weights, arrays, strict=True):
        total = total + np.float32(weight) * array.astype(np.float32)
    return np.divide(total, np.float32(sum(weights)))


def mix_spherical(a: np.ndarray, b: np.ndarray, t: float, n_stacked: int) -> np.ndarray:
    """Return the point at t between two arrays, along the sphere, in float32.

    Each layer's and each expert's tensor has an angle of its own. They are mixed one by one, in
    float64.

    Args:
        a: at t = 0.
        b: at t = 1.
        t: 0 to 1.
        n_stacked: leading axes that number tensors.
    """
    if n_stacked:
        mixed = np.empty(a.shape, np.float32)
        for number in range(len(a)):
            mixed[number] = mix_spherical(a[number], b[number], t, n_stacked - 1)
        return mixed
    x, y = a.astype(np.float64), b.astype(np.float64)
    norms = math.sqrt(np.sum(x * x) * np.sum(y * y))
    cosine = np.sum(x * y) / norms if norms else 1.0
    if abs(cosine) > PARALLEL_COSINE:
        return ((1 - t) * x + t * y).astype(np.float32)
    angle = math.acos(cosine)
    spherical = (math.sin((1 - t) * angle) * x + math.sin(t * angle) * y) / math.sin(angle)
    return spherical.astype(np.float32)
