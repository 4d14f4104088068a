"""Checkpoints: Orbax pytrees in RUN/checkpoints/STEP, whole or not there, each file with its size and checksum.

    STEP/params/        the weights: all that a start from this model reads
    STEP/rest/          moments, guard and step: what only this run's own continuation reads
    STEP/spec.json      the model's shape
    STEP/manifest.json  counts (step, rows consumed, learning rate), sha256 of every file; written last

Orbax restores a file with one flipped byte in silence and with wrong numbers, hence the checksums.
"""

from __future__ import annotations

import math
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpt import stage
from jaxpt.spec import Manifest, ModelSpec, UserError


def save(run: pathlib.Path, step: int, params: Any, rest: Any, spec: ModelSpec, *, counts: dict, tokenizer: str | None, keep: int) -> pathlib.Path:
    """Write RUN/checkpoints/STEP; older ones beyond the newest `keep` go after the new one is whole.

    params and rest are pytrees of jax.Arrays on any mesh; every process calls this. counts travel in the manifest.
    """
    import orbax.checkpoint as ocp

    final = (run / "checkpoints" / str(step)).absolute()
    partial = final.with_name(f".{step}.partial")
    first = jax.process_index() == 0
    if first:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    together("checkpoint directory")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(partial / "params", without_empty(params))
        checkpointer.save(partial / "rest", without_empty(rest))
        checkpointer.wait_until_finished()
    if first:
        spec.save(partial / "spec.json")
        files = {str(file.relative_to(partial)): stage.sha256(file) for file in sorted(partial.rglob("*")) if file.is_file()}
        manifest = stage.make_manifest(
            "checkpoint", {}, {}, outputs=files, counts={"step": step, **counts}, tokenizer=tokenizer, seed=None, seconds=0.0
        )  # fmt: skip
        stage.write_manifest(manifest, partial)
        shutil.rmtree(final, ignore_errors=True)  # a damaged one of this step, or none
        partial.rename(final)
        for old in steps(run)[:-keep]:
            shutil.rmtree(run / "checkpoints" / str(old))
    together("checkpoint published")
    return final


def together(name: str) -> None:
    """Wait until every process of the run is here."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def steps(run: pathlib.Path) -> list[int]:
    """Steps that have a finished checkpoint, rising. A numeric directory that no run published is none."""
    found = (run / "checkpoints").glob("*/manifest.json")
    return sorted(int(path.parent.name) for path in found if path.parent.name.isdigit())


def newest(run: pathlib.Path) -> pathlib.Path | None:
    """The newest checkpoint of a run that is whole; what is broken is said, with the file. None where there is none.

    Raises UserError when there are checkpoints and every one is broken.
    """
    found = steps(run)
    for step in reversed(found):
        directory = run / "checkpoints" / str(step)
        wrong = damage(directory)
        if wrong is None:
            return directory
        stage.say(f"checkpoint {directory}: {wrong}; taking the one before")
    if found:
        raise UserError(f"{run}/checkpoints: none of the {len(found)} checkpoints is whole. Restore one from a copy, or delete them to start again.")
    return None


def damage(directory: pathlib.Path) -> str | None:
    """What is wrong with a checkpoint's files, in words; None when every one is as it was written."""
    try:
        manifest = Manifest.load(directory)
    except UserError as error:
        return str(error)
    for name, checksum in manifest.outputs.items():
        path = directory / name
        if not path.is_file():
            return f"{name} is missing"
        if stage.sha256(path) != checksum:
            return f"{name} is not as it was written (its checksum differs)"
    return None


def find(source: pathlib.Path) -> pathlib.Path | None:
    """A checkpoint step directory for a path that is one, or that is a run directory (then its newest whole one)."""
    if (source / "params").is_dir() and (source / "spec.json").is_file():
        wrong = damage(source)
        if wrong:
            raise UserError(f"{source}: {wrong}. Take another checkpoint of the run.")
        return source
    return newest(source) if (source / "checkpoints").is_dir() else None


def restore(directory: pathlib.Path, name: str, abstract: Any) -> Any:
    """The pytree `name` ("params" or "rest") of a checkpoint, on the shardings and in the dtypes of `abstract`.

    Raises UserError when the stored tree has other leaves or shapes.
    """
    import orbax.checkpoint as ocp

    try:
        with ocp.StandardCheckpointer() as checkpointer:
            found = checkpointer.restore(directory.absolute() / name, without_empty(abstract))
    except (ValueError, KeyError, FileNotFoundError) as error:
        raise UserError(
            f"{directory}/{name}: does not fit the model and optimizer asked for ({first_line(error)}). Was the config changed?"
        ) from error
    return jax.tree.map(lambda leaf, there: jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding) if there is None else there, abstract, found)


def without_empty(tree: Any) -> Any:
    """A pytree whose arrays of no numbers, those of a model without layers, are None: Orbax refuses to write them."""
    return jax.tree.map(lambda leaf: leaf if math.prod(leaf.shape) else None, tree)


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def describe(source: pathlib.Path) -> Iterator[str]:
    """Lines for a person: what a checkpoint is, then every array with shape and type, without reading them."""
    directory = found(source)
    manifest = Manifest.load(directory)
    yield f"{directory}: step {manifest.counts['step']:,}, {manifest.counts['rows']:,} rows read, written {manifest.created}, whole"
    yield "spec " + ", ".join(f"{name} {value}" for name, value in ModelSpec.load(directory / "spec.json").to_dict().items())
    for name, leaf in stored(directory).items():
        yield f"{name:<32} {leaf.dtype!s:<10} {' x '.join(map(str, leaf.shape)) or 'scalar'}"


def differences(a: pathlib.Path, b: pathlib.Path) -> list[str]:
    """Lines for what differs between two checkpoints; none when every array is equal bit by bit."""
    a, b = found(a), found(b)
    left, right = stored(a), stored(b)
    lines = [f"{name}: only in {a if name in left else b}" for name in sorted(left.keys() ^ right.keys())]
    for name in sorted(left.keys() & right.keys()):
        if (left[name].shape, left[name].dtype) != (right[name].shape, right[name].dtype):
            lines.append(f"{name}: {left[name].dtype}{list(left[name].shape)} and {right[name].dtype}{list(right[name].shape)}")
            continue
        x, y = read(a, name), read(b, name)
        if x.tobytes() != y.tobytes():
            n = int(np.sum(x != y))
            largest = np.max(np.abs(x.astype(np.float64) - y.astype(np.float64)))
            lines.append(f"{name}: {n:,} of {x.size:,} numbers differ, by up to {largest:.3g}")
    return lines


def found(source: pathlib.Path) -> pathlib.Path:
    directory = find(source) if source.is_dir() else None
    if directory is None:
        raise UserError(f"{source}: no finished checkpoint there. Wanted a run directory or one of its checkpoints/STEP.")
    return directory


def stored(directory: pathlib.Path) -> dict[str, jax.ShapeDtypeStruct]:
    """ "params/blocks/q" -> shape and type, for every array."""
    import orbax.checkpoint as ocp

    leaves = {}
    with ocp.StandardCheckpointer() as checkpointer:
        for item in ("params", "rest"):
            tree = checkpointer.metadata(directory.absolute() / item).item_metadata.tree
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
                leaves["/".join([item, *(str(key(part)) for part in path)])] = jax.ShapeDtypeStruct(tuple(leaf.shape), leaf.dtype)
    return leaves


def read(directory: pathlib.Path, name: str) -> np.ndarray:
    """One array, by its name in `stored`."""
    import orbax.checkpoint as ocp

    item = name.split("/")[0]
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def choose(path, leaf):
        if name != "/".join([item, *(str(key(part)) for part in path)]):
            return ocp.PLACEHOLDER
        return jax.ShapeDtypeStruct(tuple(leaf.shape), leaf.dtype, sharding=here)

    with ocp.PyTreeCheckpointer() as checkpointer:
        tree = checkpointer.metadata(directory.absolute() / item).item_metadata.tree
        chosen = jax.tree_util.tree_map_with_path(choose, tree)
        restored = checkpointer.restore(
            directory.absolute() / item, args=ocp.args.PyTreeRestore(item=chosen, restore_args=ocp.checkpoint_utils.construct_restore_args(chosen))
        )
    return next(np.asarray(leaf) for leaf in jax.tree.leaves(restored) if leaf is not ocp.PLACEHOLDER)


def key(part) -> Any:
    """The bare key of one step of a pytree path."""
    for attribute in ("key", "idx", "name"):
        if hasattr(part, attribute):
            return getattr(part, attribute)
    return part
