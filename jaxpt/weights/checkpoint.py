"""Checkpoints: Orbax pytrees in RUN/checkpoints/STEP, whole or not there, each file with its size and checksum.

    STEP/params/        the weights: all that a start from this model reads
    STEP/rest/          moments, guard and step: what only this run's own continuation reads
    STEP/spec.json      the model's shape
    STEP/manifest.json  counts (step, rows consumed, learning rate), sha256 of every file; written last

Orbax restores a file with one flipped byte in silence and with wrong numbers, hence the checksums.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import errno
import logging
import math
import os
import pathlib
import shutil
import sys
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpt import stage
from jaxpt.spec import Manifest, ModelSpec, UserError

log = logging.getLogger(__name__)


class CheckpointSaveError(UserError):
    """A checkpoint could not be written; every one before it is as it was."""


class Checkpointer:
    """Writes the checkpoints of one run behind the training: `save` returns as soon as the arrays are copied off the devices.

    Each becomes RUN/checkpoints/STEP by one rename, once it is whole and its checksums are taken. Of the older ones the
    newest `keep` stay, and those whose step is a multiple of keep_every (0: none). Every process of the run calls every
    method; the first one publishes. What went wrong behind is raised as SaveFailed by the next call of any method.
    """

    def __init__(self, run: pathlib.Path, keep: int, keep_every: int = 0):
        self.run, self.keep, self.keep_every = run, keep, keep_every
        self.behind = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self.begun: concurrent.futures.Future | None = None
        silence_orbax_errors()

    def save_async(
        self,
        step: int,
        params: Any,
        rest: Any,
        spec: ModelSpec,
        *,
        counts: dict,
        tokenizer: str | None,
    ) -> None:
        """Begin a checkpoint; waits for the one before. params and rest are pytrees of jax.Arrays on any mesh, which may be
        donated to the next step when this returns. counts travel in the manifest.
        """
        import orbax.checkpoint as ocp

        self.wait_until_saved()
        final = (self.run / "checkpoints" / str(step)).absolute()
        partial = final.with_name(f".{step}.partial")
        if jax.process_index() == 0:
            shutil.rmtree(partial, ignore_errors=True)
            final.parent.mkdir(parents=True, exist_ok=True)
        sync_processes("checkpoint directory")
        checkpointer = ocp.AsyncCheckpointer(make_handler())
        trees = {
            name: ocp.args.PyTreeSave(drop_empty(tree))
            for name, tree in (("params", params), ("rest", rest))
        }
        n_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves((params, rest)))

        def finish() -> pathlib.Path:
            with contextlib.closing(checkpointer):
                checkpointer.wait_until_finished()  # on the first process: until every process has written
            if jax.process_index() == 0:
                self.publish_saved(partial, final, spec, {"step": step, **counts}, tokenizer)
            return final

        with convert_save_errors(final, n_bytes):
            checkpointer.save(partial, args=ocp.args.Composite(**trees))

        def work() -> pathlib.Path:
            with convert_save_errors(final, n_bytes):
                return finish()

        self.begun = self.behind.submit(work)

    def publish_saved(
        self,
        partial: pathlib.Path,
        final: pathlib.Path,
        spec: ModelSpec,
        counts: dict,
        tokenizer: str | None,
    ) -> None:
        spec.save(partial / "spec.json")
        files = {
            str(file.relative_to(partial)): stage.sha256_file(file)
            for file in sorted(partial.rglob("*"))
            if file.is_file()
        }
        # the counts are what was asked for, so that the fingerprint covers them too: a flipped digit of `rows` would be another run
        manifest = stage.make_manifest(
            stage.StageRequest("checkpoint", counts, {}),
            outputs=files,
            counts=counts,
            tokenizer=tokenizer,
            seconds=0.0,
        )
        stage.write_manifest(dataclasses.replace(manifest, config={}), partial)
        shutil.rmtree(final, ignore_errors=True)  # a damaged one of this step, or none
        partial.rename(final)
        for old in list_steps(self.run)[: -self.keep]:
            if not (self.keep_every and old % self.keep_every == 0):
                shutil.rmtree(self.run / "checkpoints" / str(old))

    def check_errors(self) -> None:
        """Raise what a finished save failed with; does not wait for one that is under way."""
        if self.begun and self.begun.done():
            self.wait_until_saved()

    def wait_until_saved(self) -> pathlib.Path | None:
        """Wait until the last checkpoint is published. Returns its directory, None when none was begun since the last wait."""
        begun, self.begun = self.begun, None
        return begun.result() if begun else None


@contextlib.contextmanager
def convert_save_errors(final: pathlib.Path, n_bytes: int) -> Iterator[None]:
    """Whatever the writing raises, as one sentence; the unfinished directory goes, since a full disk needs the room."""
    try:
        yield
    except Exception as error:  # Orbax and TensorStore raise OSError, ValueError and their own, by where the disk gave out
        for unfinished in final.parent.glob(f".{final.name}.partial*"):
            shutil.rmtree(unfinished, ignore_errors=True)
        free = shutil.disk_usage(final.parent).free
        raise CheckpointSaveError(
            f"checkpoint {final}: could not be written ({format_save_error(error)}). It takes {n_bytes / 1e6:,.1f} MB, its disk has {free / 1e9:.2f} GB free; "
            "the earlier checkpoints are whole. Make room and start the same command again."
        ) from error


def silence_orbax_errors() -> None:
    """Of one write that fails Orbax, asyncio and TensorStore's callbacks print hundreds of lines; SaveFailed says it in one."""
    logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)
    logging.getLogger("asyncio").addFilter(
        lambda record: "exception was never retrieved" not in record.getMessage()
    )

    before = sys.unraisablehook
    sys.unraisablehook = lambda found: (
        None if "Event loop is closed" in str(found.exc_value) else before(found)
    )


def format_save_error(error: Exception) -> str:
    """The system's own words where an error carries them, which libraries wrap in paragraphs."""
    known = (
        os.strerror(number)
        for number in (
            errno.ENOSPC,
            errno.EDQUOT,
            errno.EFBIG,
            errno.EIO,
            errno.EROFS,
            errno.EACCES,
        )
    )
    return next((words for words in known if words in str(error)), first_line_of(error))


def save_checkpoint(
    run: pathlib.Path,
    step: int,
    params: Any,
    train_state: Any,
    spec: ModelSpec,
    *,
    counts: dict,
    tokenizer: str | None,
) -> pathlib.Path:
    """Write RUN/checkpoints/STEP and return when it is there."""
    saver = Checkpointer(run, keep=1)
    saver.save_async(step, params, train_state, spec, counts=counts, tokenizer=tokenizer)
    return saver.wait_until_saved()


def sync_processes(name: str) -> None:
    """Wait until every process of the run is here."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def list_steps(run: pathlib.Path) -> list[int]:
    """Steps that have a finished checkpoint, rising. A numeric directory that no run published is none."""
    found = (run / "checkpoints").glob("*/manifest.json")
    return sorted(int(path.parent.name) for path in found if path.parent.name.isdigit())


def find_newest(run: pathlib.Path) -> pathlib.Path | None:
    """The newest checkpoint of a run that is whole; what is broken is said, with the file. None where there is none.

    Raises UserError when there are checkpoints and every one is broken.
    """
    found = list_steps(run)
    for step in reversed(found):
        directory = run / "checkpoints" / str(step)
        wrong = find_damage(directory)
        if wrong is None:
            return directory
        log.info(f"checkpoint {directory}: {wrong}; taking the one before")
    if found:
        raise UserError(
            f"{run}/checkpoints: none of the {len(found)} checkpoints is whole. Restore one from a copy, or delete them to start again."
        )
    return None


def find_damage(directory: pathlib.Path) -> str | None:
    """What is wrong with a checkpoint's files, in words; None when every one is as it was written."""
    try:
        manifest = Manifest.load(directory)
    except UserError as error:
        return str(error)
    if manifest.fingerprint != stage.fingerprint(
        [stage.request_fingerprint("checkpoint", manifest.counts, {}, None), manifest.outputs]
    ):
        return "manifest.json is not as it was written (its fingerprint differs)"
    if damaged := stage.find_damaged_file(directory, manifest):
        name, there = damaged
        return (
            f"{name} is not as it was written (its checksum differs)"
            if there
            else f"{name} is missing"
        )
    return None


def find_checkpoint(source: pathlib.Path) -> pathlib.Path | None:
    """A checkpoint step directory for a path that is one, or that is a run directory (then its newest whole one)."""
    if (source / "params").is_dir() and (source / "spec.json").is_file():
        wrong = find_damage(source)
        if wrong:
            raise UserError(f"{source}: {wrong}. Take another checkpoint of the run.")
        return source
    return find_newest(source) if (source / "checkpoints").is_dir() else None


def restore_tree(directory: pathlib.Path, name: str, abstract: Any) -> Any:
    """The pytree `name` ("params" or "rest") of a checkpoint, on the shardings and in the dtypes of `abstract`.

    Raises UserError when the stored tree has other leaves or shapes.
    """
    import orbax.checkpoint as ocp

    try:
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
            asked = ocp.args.Composite(**{name: ocp.args.StandardRestore(drop_empty(abstract))})
            found = checkpointer.restore(directory.absolute(), args=asked)[name]
    except (ValueError, KeyError, FileNotFoundError) as error:
        raise UserError(
            f"{directory}/{name}: does not fit the model and optimizer asked for ({first_line_of(error)}). Was the config changed?"
        ) from error
    return jax.tree.map(
        lambda leaf, there: (
            jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding) if there is None else there
        ),
        abstract,
        found,
    )


def drop_empty(tree: Any) -> Any:
    """A pytree whose arrays of no numbers, those of a model without layers, are None: Orbax refuses to write them."""
    return jax.tree.map(lambda leaf: leaf if math.prod(leaf.shape) else None, tree)


def first_line_of(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def describe_checkpoint(source: pathlib.Path) -> Iterator[str]:
    """Lines for a person: what a checkpoint is, then every array with shape and type, without reading them."""
    directory = locate_checkpoint(source)
    manifest = Manifest.load(directory)
    yield f"{directory}: step {manifest.counts['step']:,}, {manifest.counts['rows']:,} rows read, written {manifest.created}, whole"
    yield "spec " + ", ".join(
        f"{name} {value}"
        for name, value in ModelSpec.load(directory / "spec.json").to_json().items()
    )
    for name, leaf in read_array_metadata(directory).items():
        yield f"{name:<32} {leaf.dtype!s:<10} {' x '.join(map(str, leaf.shape)) or 'scalar'}"


def diff_checkpoints(a: pathlib.Path, b: pathlib.Path) -> list[str]:
    """Lines for what differs between two checkpoints; none when every array is equal bit by bit."""
    a, b = locate_checkpoint(a), locate_checkpoint(b)
    trees = read_tree_metadata(a), read_tree_metadata(b)
    left, right = map(flatten_arrays, trees)
    lines = [
        f"{name}: only in {a if name in left else b}" for name in sorted(left.keys() ^ right.keys())
    ]
    for name in sorted(left.keys() & right.keys()):
        if (left[name].shape, left[name].dtype) != (right[name].shape, right[name].dtype):
            lines.append(
                f"{name}: {left[name].dtype}{list(left[name].shape)} and {right[name].dtype}{list(right[name].shape)}"
            )
            continue
        x, y = (
            read_tree(directory, name, tree) for directory, tree in zip((a, b), trees, strict=True)
        )
        if x.tobytes() != y.tobytes():
            n = int(np.sum(x != y))
            largest = np.max(np.abs(x.astype(np.float64) - y.astype(np.float64)))
            lines.append(f"{name}: {n:,} of {x.size:,} numbers differ, by up to {largest:.3g}")
    return lines


def locate_checkpoint(source: pathlib.Path) -> pathlib.Path:
    directory = find_checkpoint(source) if source.is_dir() else None
    if directory is None:
        raise UserError(
            f"{source}: no finished checkpoint there. Wanted a run directory or one of its checkpoints/STEP."
        )
    return directory


def read_array_metadata(directory: pathlib.Path) -> dict[str, jax.ShapeDtypeStruct]:
    """ "params/blocks/q" -> shape and type, for every array."""
    return flatten_arrays(read_tree_metadata(directory))


def flatten_arrays(trees: dict[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    leaves = jax.tree_util.tree_leaves_with_path(trees)
    return {
        array_name(path): jax.ShapeDtypeStruct(tuple(leaf.shape), leaf.dtype)
        for path, leaf in leaves
    }


def read_tree_metadata(directory: pathlib.Path) -> dict[str, Any]:
    """What Orbax knows of each tree's arrays."""
    with open_checkpointer() as checkpointer:
        return {
            item: tree.tree
            for item, tree in checkpointer.metadata(directory.absolute()).item_metadata.items()
        }


def read_tree(
    directory: pathlib.Path, name: str, trees: dict[str, Any] | None = None
) -> np.ndarray:
    """One array, by its name in `stored`. Who reads many gives what `described` said, which takes longer than to read a small array."""
    import orbax.checkpoint as ocp

    item = name.split("/")[0]
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def choose(path, leaf):
        return (
            jax.ShapeDtypeStruct(tuple(leaf.shape), leaf.dtype, sharding=here)
            if f"{item}/{array_name(path)}" == name
            else ocp.PLACEHOLDER
        )

    chosen = jax.tree_util.tree_map_with_path(
        choose, (trees or read_tree_metadata(directory))[item]
    )
    asked = ocp.args.PyTreeRestore(
        item=chosen, restore_args=ocp.checkpoint_utils.construct_restore_args(chosen)
    )
    with open_checkpointer() as checkpointer:
        restored = checkpointer.restore(
            directory.absolute(), args=ocp.args.Composite(**{item: asked})
        )[item]
    return next(
        np.asarray(leaf) for leaf in jax.tree.leaves(restored) if leaf is not ocp.PLACEHOLDER
    )


def open_checkpointer():
    """Orbax's checkpointer for trees whose shapes are not known beforehand."""
    import orbax.checkpoint as ocp

    return ocp.Checkpointer(make_handler())


def make_handler():
    """Orbax's, for both trees. Compressing would spare 8 % of float32's bytes, for four times the processor's time to write and three times
    as long to read (docs/performance.md).
    """
    import orbax.checkpoint as ocp

    return ocp.CompositeCheckpointHandler(
        **{item: ocp.PyTreeCheckpointHandler(use_compression=False) for item in ("params", "rest")}
    )


def array_name(path) -> str:
    return "/".join(str(path_key(part)) for part in path)


def path_key(part) -> Any:
    """The bare key of one step of a pytree path."""
    for attribute in ("key", "idx", "name"):
        if hasattr(part, attribute):
            return getattr(part, attribute)
    return part
