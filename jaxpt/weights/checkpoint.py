"""Write and read checkpoints: Orbax pytrees in RUN/checkpoints/STEP, complete or absent.

    STEP/params/        the parameters: all that a start from this model reads
    STEP/train_state/   optimizer moments, skip state and step: read only when this run resumes
    STEP/spec.json      the architecture
    STEP/manifest.json  counts (step, sequences read, learning rate) and sha256 of every file

The manifest is written last. Orbax silently restores a file with a flipped byte as wrong numbers,
hence the checksums.

Orbax writes to disks and to gs://. For s3://, which it does not know, a checkpoint is written to
this machine's cache and uploaded, and fetched before it is read.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import errno
import functools
import itertools
import logging
import math
import os
import pathlib
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpt import io, logs, stage
from jaxpt.spec import ModelSpec, UserError
from jaxpt.text import format_table

log = logging.getLogger(__name__)

PyTree = Any  # nested dicts and tuples of jax.Arrays
PARAMS = "params"
TRAIN_STATE = "train_state"
AVERAGE = "average"  # of the weights; only in a run with optim.average
# an array is stored in chunks of at most this size, which bounds what a restore holds beside it
CHUNK_BYTES = 1 << 26
BUCKET_FILE_BYTES = 100_000_000  # of numbers in an object: one upload, repeated if it fails
# what a failing disk says, in the system's words, which libraries wrap in paragraphs
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES)


class CheckpointSaveError(UserError):
    """A checkpoint could not be written; every earlier one is intact."""


class Checkpointer:
    """Saves the checkpoints of one run in the background.

    `save_async` returns as soon as the arrays are copied off the devices. A checkpoint is published
    as RUN/checkpoints/STEP once it is complete, durable and its checksums are computed; only then
    are older ones removed. Every process of the run calls every method; the first one publishes. A
    background failure is raised as CheckpointSaveError by the next call of any method.
    """

    def __init__(self, run: io.Path, max_to_keep: int, keep_every: int = 0):
        """Save into a run.

        Args:
            run: the run directory.
            max_to_keep: how many of the newest checkpoints are kept.
            keep_every: checkpoints at multiples of this many steps are kept too; 0: none.

        Raises:
            UserError: no checkpoint can be kept there.
        """
        recover_run(run)
        self.run = run
        self.max_to_keep = max_to_keep
        self.keep_every = keep_every
        self.executor = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self.pending: concurrent.futures.Future[io.Path] | None = None
        silence_orbax_errors()

    def save_async(
        self,
        step: int,
        params: PyTree,
        train_state: PyTree,
        spec: ModelSpec,
        *,
        counts: dict[str, Any],
        tokenizer: str | None,
        average: PyTree | None = None,
        before_publishing: Callable[[], None] | None = None,
    ) -> None:
        """Start saving a checkpoint, after waiting for the previous one.

        Args:
            step: updates done.
            params: jax.Arrays on any mesh; they may be donated once this returns.
            train_state: like params.
            spec: the architecture.
            counts: goes into the manifest.
            tokenizer: fingerprint of the tokenizer.
            average: like params, if the run has one.
            before_publishing: called in the background, when all else is written.
        """
        import orbax.checkpoint as ocp

        self.wait_until_saved()
        final = self.run / "checkpoints" / str(step)
        partial = find_partial(final)
        if jax.process_index() == 0:
            remove_unfinished(final)
            io.make_directory(partial.parent)
            if isinstance(final, io.BucketPath):
                io.write_text(unfinished_marker(final), "")
        sync_processes("checkpoint directory")
        checkpointer = ocp.AsyncCheckpointer(make_handler())
        trees = {}
        n_bytes = 0
        max_file_bytes = BUCKET_FILE_BYTES if isinstance(final, io.BucketPath) else None
        given = {PARAMS: params, TRAIN_STATE: train_state}
        if average:
            given[AVERAGE] = average
        for name, tree in given.items():
            stored = drop_empty(tree)
            in_chunks = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), stored)
            trees[name] = ocp.args.PyTreeSave(
                stored, save_args=in_chunks, ocdbt_target_data_file_size=max_file_bytes
            )
            n_bytes += sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
        args = ocp.args.Composite(**trees)
        all_counts = {"step": step, **counts}
        with convert_save_errors(final, n_bytes):
            # force: in a bucket, what an earlier attempt left is there until Orbax replaces it
            checkpointer.save(orbax_path(partial), args=args, force=True)

        def finish() -> io.Path:
            with convert_save_errors(final, n_bytes):
                with contextlib.closing(checkpointer):
                    # on the first process: until every process has written
                    checkpointer.wait_until_finished()
                if before_publishing:
                    before_publishing()
                if jax.process_index() == 0:
                    self.publish_saved(partial, final, spec, all_counts, tokenizer)
            return final

        self.pending = self.executor.submit(finish)

    def publish_saved(
        self,
        partial: io.Path,
        final: io.Path,
        spec: ModelSpec,
        counts: dict[str, Any],
        tokenizer: str | None,
    ) -> None:
        """Write spec and manifest, publish, and remove checkpoints that are not kept."""
        io.write_json(partial / "spec.json", spec)
        # counts as the request, so that the fingerprint covers them: a flipped digit would be
        # another run
        request = stage.StageRequest("checkpoint", counts, {})
        sealed = io.seal(partial)
        manifest = stage.make_manifest(
            request, sealed=sealed, counts=counts, tokenizer=tokenizer, seconds=0.0
        )
        manifest = stage.seal_manifest(dataclasses.replace(manifest, config={}))
        if isinstance(partial, io.BucketPath):
            io.write_json(final / "manifest.json", manifest)
        else:
            io.publish(partial, final, manifest.to_json())
        if isinstance(final, io.BucketPath):
            io.remove(unfinished_marker(final))
        for old in list_steps(self.run)[: -self.max_to_keep]:
            is_kept = self.keep_every and old % self.keep_every == 0
            if not is_kept:
                remove_checkpoint(self.run / "checkpoints" / str(old))

    def check_errors(self) -> None:
        """Raise the error of a finished save, without waiting for one in progress."""
        if self.pending and self.pending.done():
            self.wait_until_saved()

    def wait_until_saved(self) -> io.Path | None:
        """Wait for the pending checkpoint. Return its directory, or None if there is none."""
        pending = self.pending
        self.pending = None
        if pending:
            return pending.result()
        return None


def is_uploaded(place: io.Path) -> bool:
    """Return whether Orbax cannot write there itself."""
    return isinstance(place, io.BucketPath) and place.scheme == "s3"


def find_partial(final: io.Path) -> io.Path:
    """Return where Orbax writes what becomes a checkpoint: a gs:// bucket has no renames."""
    if isinstance(final, io.BucketPath) and not is_uploaded(final):
        return final
    return io.working_directory(final)


def orbax_path(directory: io.Path) -> Any:
    """Return a directory as Orbax takes it: a path of etils for a bucket.

    Raises:
        UserError: its name has characters that Orbax takes for another name.
    """
    check_name(directory)
    if isinstance(directory, pathlib.Path):
        return directory.absolute()
    from etils import epath

    return epath.Path(str(directory))


def check_name(directory: io.Path) -> None:
    """Raise UserError for a path with characters that Orbax takes for another name.

    It looks for its files by a pattern, and TensorStore takes a backslash for "/": both find none
    or others, and a checkpoint there would have no numbers.
    """
    wrong = set("[]*?\\") & set(str(io.resolve(directory)))
    if wrong:
        raise UserError(
            f"{io.printable(directory)}: a checkpoint cannot be kept below a name with "
            f"{' '.join(sorted(wrong))}. Rename it, or give another directory."
        )


def find_readable(directory: io.Path) -> io.Path:
    """Return where a checkpoint can be read from: itself, or this machine's copy of it."""
    return io.local_copy(directory) if is_uploaded(directory) else directory


def check_run(run: io.Path) -> None:
    """Raise UserError if no checkpoint can be kept in a run, before anything is written."""
    if is_uploaded(run) and jax.process_count() > 1:
        raise UserError(
            f"{run}: only one process can save checkpoints to s3://. Give a disk that all "
            "hosts share, or gs://."
        )
    check_name(find_partial(run) if is_uploaded(run) else run)


def recover_run(run: io.Path) -> None:
    """Publish what was decided when a process was killed, and remove what was not.

    Raises:
        UserError: no checkpoint can be kept there.
    """
    check_run(run)
    if jax.process_index() == 0:
        for final in list_unfinished(run / "checkpoints"):
            if not io.finish_publishing(final) and not io.exists(final / "manifest.json"):
                remove_unfinished(final)
            if isinstance(final, io.BucketPath):
                io.remove(unfinished_marker(final))


def unfinished_marker(final: io.BucketPath) -> io.BucketPath:
    """Return the object that is there while a checkpoint is written.

    Without it a start could not tell what a kill left from a checkpoint of other programs.
    """
    return final.with_name(f"{final.name}.partial")


def list_unfinished(directory: io.Path) -> list[io.Path]:
    """Return the checkpoints of a run that a killed process was saving."""
    names = io.list_names(directory)
    steps = {name.partition(".")[0] for name in names if ".partial" in name}
    if isinstance(directory, io.BucketPath):
        for working in io.list_working():
            step = working.name.partition("-")[0]
            if io.working_directory(directory / step) == working:
                steps.add(step)
    return [directory / step for step in sorted(steps) if step.isdecimal()]


def remove_unfinished(final: io.Path) -> None:
    """Remove what an attempt to save a checkpoint left; a bucket's damaged one of this step too."""
    if isinstance(final, io.BucketPath):
        io.remove(final / "manifest.json")
        io.remove_unpublished(final)
        io.remove(unfinished_marker(final))
    partial = find_partial(final)
    if isinstance(partial, io.BucketPath):
        return
    for name in io.list_names(partial.parent):
        # Orbax itself writes beside it and renames
        if name == partial.name or name.startswith(f"{partial.name}."):
            io.remove_working(partial.with_name(name))


def remove_checkpoint(directory: io.Path) -> None:
    """Remove a checkpoint that is not kept; log why it cannot be."""
    try:
        io.remove_published(directory)
    except UserError as error:
        log.warning(f"an older checkpoint was not removed: {error}")


@contextlib.contextmanager
def convert_save_errors(final: io.Path, n_bytes: int) -> Iterator[None]:
    """Raise any error as CheckpointSaveError, after deleting the unfinished directory."""
    try:
        yield
    # Orbax and TensorStore raise OSError, ValueError and their own, by where the disk failed
    except Exception as error:
        with contextlib.suppress(UserError):
            remove_unfinished(final)  # a full disk needs the room
        raise CheckpointSaveError(
            f"checkpoint {final}: could not be written ({format_save_error(error)}). It takes "
            f"{n_bytes / 1e6:,.1f} MB{format_room(final)}; the earlier checkpoints are intact. "
            "Make room and start the same command again."
        ) from error


def format_room(final: io.Path) -> str:
    """Return what is free on a checkpoint's disk, as part of a sentence; "" for a bucket."""
    if isinstance(final, io.BucketPath):
        return ""
    free = shutil.disk_usage(final.parent).free
    return f", its disk has {free / 1e9:.2f} GB free"


def silence_orbax_errors() -> None:
    """Keep a failed write from printing hundreds of lines: CheckpointSaveError says it in one."""
    unretrieved = "exception was never retrieved"
    absl_log = logging.getLogger("absl")
    asyncio_log = logging.getLogger("asyncio")
    absl_log.addFilter(lambda record: "orbax" not in record.pathname)
    asyncio_log.addFilter(lambda record: unretrieved not in record.getMessage())
    before = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if "Event loop is closed" not in str(unraisable.exc_value):
            before(unraisable)

    sys.unraisablehook = hook


def format_save_error(error: Exception) -> str:
    """Return the system's own words if the error carries them, else its first line."""
    for number in DISK_ERRORS:
        message = os.strerror(number)
        if message in str(error):
            return message
    return first_line_of(error)


def save_checkpoint(
    run: io.Path,
    step: int,
    params: PyTree,
    train_state: PyTree,
    spec: ModelSpec,
    *,
    counts: dict[str, Any],
    tokenizer: str | None,
    average: PyTree | None = None,
) -> io.Path:
    """Write RUN/checkpoints/STEP and return it once it is published."""
    checkpointer = Checkpointer(run, max_to_keep=1)
    checkpointer.save_async(
        step, params, train_state, spec, counts=counts, tokenizer=tokenizer, average=average
    )
    saved = checkpointer.wait_until_saved()
    assert saved
    return saved


def sync_processes(name: str) -> None:
    """Wait until every process of the run has come here."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def list_steps(run: io.Path) -> list[int]:
    """Return the steps with a finished checkpoint, rising."""
    directory = run / "checkpoints"
    steps = []
    for name in io.list_names(directory):
        if name.isdecimal() and io.size(directory / name / "manifest.json") is not None:
            steps.append(int(name))
    return sorted(steps)


def find_newest(run: io.Path) -> io.Path | None:
    """Return the newest undamaged checkpoint of a run; log damaged ones. None if it has none.

    Raises:
        UserError: there are checkpoints and every one is damaged.
    """
    steps = list_steps(run)
    for step in reversed(steps):
        directory = run / "checkpoints" / str(step)
        damage = find_damage(directory)
        if damage is None:
            return directory
        log.warning(f"checkpoint {directory}: {damage}; taking the one before")
    if steps:
        raise UserError(
            f"{run}/checkpoints: all of the {len(steps)} checkpoints are damaged. Restore one from "
            "a copy, or delete them to start over."
        )
    return None


def find_damage(directory: io.Path) -> str | None:
    """Return what is wrong with a checkpoint's files, or None if they are as written."""
    try:
        manifest = stage.read_manifest(directory)
    except UserError as error:
        return str(error)
    request = stage.StageRequest("checkpoint", manifest.counts, {})
    expected = stage.fingerprint([request.fingerprint, manifest.outputs])
    if manifest.fingerprint != expected:
        return "manifest.json was changed (its fingerprint differs)"
    damage = io.find_damage(find_readable(directory), verify=True)
    return f"{damage.name} {damage.reason}" if damage else None


def find_checkpoint(source: io.Path) -> io.Path | None:
    """Return a path that is a checkpoint, or a run's newest undamaged checkpoint."""
    has_params = io.exists(source / PARAMS)
    has_spec = io.size(source / "spec.json") is not None
    if has_params and has_spec:
        damage = find_damage(source)
        if damage:
            raise UserError(f"{source}: {damage}. Take another checkpoint of the run.")
        return source
    if io.list_names(source / "checkpoints"):
        return find_newest(source)
    return None


def restore_tree(directory: io.Path, name: str, abstract: PyTree) -> PyTree:
    """Restore a tree, PARAMS, TRAIN_STATE or AVERAGE, with the shardings and dtypes of `abstract`.

    Beside the arrays the host holds one chunk at a time: Orbax's own restore holds an array twice,
    and reads all of them at once.

    Raises:
        UserError: the stored tree has other leaves or shapes.
    """
    stored = {}
    directory = find_readable(directory)
    if io.exists(directory / name):
        stored = flatten_arrays({name: read_tree_metadata(directory)[name]})
    expected = flatten_arrays({name: drop_empty(abstract)})
    for array in sorted(stored.keys() | expected.keys()):
        shapes = [list(side[array].shape) if array in side else None for side in (expected, stored)]
        if shapes[0] != shapes[1]:
            raise UserError(
                f"{directory}/{name}: does not match the requested model and optimizer ({array}: "
                f"expected {shapes[0] or 'none'}, got {shapes[1] or 'none'}). "
                "Was the config changed?"
            )

    def restore(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if not math.prod(leaf.shape):
            return jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding)
        with explain_reading(directory):
            return restore_array(open_array(directory / name, array_name(path)), leaf)

    n_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract))
    with logs.announce_if_slow(log, f"reading {n_bytes / 1e9:.1f} GB of {directory}/{name}"):
        return jax.tree_util.tree_map_with_path(restore, abstract)


@contextlib.contextmanager
def explain_reading(directory: io.Path) -> Iterator[None]:
    """Raise UserError, a sentence, for what cannot be read: TensorStore raises ValueError."""
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise io.file_error(error, "read", directory) from None


def open_array(directory: io.Path, name: str) -> Any:
    """Return the TensorStore of an array in a tree's directory, as Orbax names and stores it."""
    import tensorstore

    if isinstance(directory, io.BucketPath):
        base = {"driver": "gcs", "bucket": directory.bucket, "path": f"{directory.key}/"}
    else:
        base = {"driver": "file", "path": f"{directory.absolute()}/"}
    kvstore = {"driver": "ocdbt", "base": base, "path": name.replace("/", ".") + "/"}
    return tensorstore.open({"driver": "zarr", "kvstore": kvstore}, open=True, read=True).result()


def restore_array(stored: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    """Return a stored array with a dtype and sharding, read chunk by chunk into place."""
    devices_of: dict[tuple[tuple[int, int], ...], list[Any]] = {}
    sharding: Any = leaf.sharding
    for device, index in sharding.addressable_devices_indices_map(leaf.shape).items():
        bounds = tuple(part.indices(size)[:2] for part, size in zip(index, leaf.shape, strict=True))
        devices_of.setdefault(bounds, []).append(device)
    shards = []
    for bounds, devices in devices_of.items():
        chunks = list(iter_chunks(bounds, stored.chunk_layout.read_chunk.shape or ()))
        if len(chunks) == 1:
            numbers = read_chunk(stored, chunks[0], leaf.dtype)
            # not shared with numpy: such a buffer would be copied when a step is given it to keep
            shards += [jax.device_put(numbers, device, may_alias=False) for device in devices]
            continue
        shape = [stop - start for start, stop in bounds]
        copies = [jnp.zeros(shape, leaf.dtype, device=device) for device in devices]
        for chunk in chunks:
            numbers = read_chunk(stored, chunk, leaf.dtype)
            starts = [part.start - start for part, (start, _) in zip(chunk, bounds, strict=True)]
            # waiting: chunks that are read ahead would pile up on the host
            copies = [put_chunk(copy, numbers, starts).block_until_ready() for copy in copies]
        shards += copies
    return jax.make_array_from_single_device_arrays(leaf.shape, sharding, shards)


def read_chunk(stored: Any, chunk: tuple[slice, ...], dtype: Any) -> np.ndarray:
    """Return a part of a stored array in another dtype."""
    return stored[chunk].read().result().astype(dtype, copy=False)


def iter_chunks(
    bounds: Sequence[tuple[int, int]], chunk_shape: Sequence[int]
) -> Iterator[tuple[slice, ...]]:
    """Yield the part of each stored chunk that lies within (start, stop) of every axis."""
    axes = []
    for (start, stop), size in zip(bounds, chunk_shape, strict=True):
        edges = [start, *range(start - start % size + size, stop, size), stop]
        axes.append([slice(a, b) for a, b in itertools.pairwise(edges)])
    yield from itertools.product(*axes)


@functools.partial(jax.jit, donate_argnums=0)
def put_chunk(array: jax.Array, chunk: jax.Array, starts: Sequence[jax.Array]) -> jax.Array:
    """Return the array with a part of it replaced, in place."""
    # as integers: XLA's CPU takes bfloat16 through float32, which is eight times slower
    bits = jnp.dtype(f"uint{8 * array.dtype.itemsize}")
    array_bits = jax.lax.bitcast_convert_type(array, bits)
    chunk_bits = jax.lax.bitcast_convert_type(chunk, bits)
    updated = jax.lax.dynamic_update_slice(array_bits, chunk_bits, starts)
    return jax.lax.bitcast_convert_type(updated, array.dtype)


def drop_empty(tree: PyTree) -> PyTree:
    """Replace arrays without numbers (of a model without layers) by None: Orbax refuses them."""

    def keep_if_filled(leaf: Any) -> Any:
        if math.prod(leaf.shape):
            return leaf
        return None

    return jax.tree.map(keep_if_filled, tree)


def first_line_of(error: Exception) -> str:
    """Return the first line of an error's text, or its type."""
    text = str(error).strip() or type(error).__name__
    first_line, *_ = text.splitlines()
    return first_line[:300]


def describe_checkpoint(source: io.Path) -> Iterator[str]:
    """Yield lines about a checkpoint, then one per array with dtype and shape."""
    directory = locate_checkpoint(source)
    manifest = stage.read_manifest(directory)
    counts = manifest.counts
    yield f"{directory}: step {counts['step']:,}, written {manifest.created}, undamaged"
    spec = stage.read_spec(directory / "spec.json")
    fields = [f"{name} {value}" for name, value in spec.to_json().items()]
    yield "spec " + ", ".join(fields)
    rows = []
    for name, leaf in read_array_metadata(directory).items():
        sizes = map(str, leaf.shape)
        rows.append((name, str(leaf.dtype), " x ".join(sizes) or "scalar"))
    yield format_table(rows, "<")


def diff_checkpoints(a: io.Path, b: io.Path) -> list[str]:
    """Return a line per array that differs between two checkpoints; none if all are bit-equal."""
    a = locate_checkpoint(a)
    b = locate_checkpoint(b)
    left = read_array_metadata(a)
    right = read_array_metadata(b)
    lines = []
    for name in sorted(left.keys() ^ right.keys()):
        where = b
        if name in left:
            where = a
        lines.append(f"{name}: only in {where}")
    for name in sorted(left.keys() & right.keys()):
        one = left[name]
        other = right[name]
        kind = f"{one.dtype}{list(one.shape)}"
        other_kind = f"{other.dtype}{list(other.shape)}"
        if kind != other_kind:
            lines.append(f"{name}: {kind} and {other_kind}")
            continue
        x = read_array(a, name)
        y = read_array(b, name)
        if x.tobytes() != y.tobytes():
            n = int(np.sum(x != y))
            difference = x.astype(np.float64) - y.astype(np.float64)
            largest = np.max(np.abs(difference))
            lines.append(f"{name}: {n:,} of {x.size:,} numbers differ, by up to {largest:.3g}")
    return lines


def locate_checkpoint(source: io.Path) -> io.Path:
    """Return the checkpoint of a path. Raise UserError if it has none."""
    directory = find_checkpoint(source)
    if directory is None:
        raise UserError(
            f"{source}: no finished checkpoint. Expected a run directory or one of its "
            "checkpoints/STEP."
        )
    return directory


def read_array_metadata(directory: io.Path) -> dict[str, jax.ShapeDtypeStruct]:
    """Return "params/blocks/q" -> shape and dtype, for every array."""
    return flatten_arrays(read_tree_metadata(directory))


def flatten_arrays(trees: dict[str, PyTree]) -> dict[str, jax.ShapeDtypeStruct]:
    """Return path -> shape and dtype for every leaf."""
    arrays = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(trees):
        name = array_name(path)
        arrays[name] = jax.ShapeDtypeStruct(tuple(leaf.shape), leaf.dtype)
    return arrays


def read_tree_metadata(directory: io.Path) -> dict[str, PyTree]:
    """Return Orbax's metadata of the arrays of each tree."""

    def read() -> dict[str, PyTree]:
        with open_checkpointer() as checkpointer:
            metadata = checkpointer.metadata(orbax_path(find_readable(directory)))
            items = metadata.item_metadata.items()
            # Orbax lists every directory; one of other files, such as a tokenizer, as None
            return {item: tree.tree for item, tree in items if tree is not None}

    # in a thread of its own: Ctrl-C in Orbax's event loop prints a traceback per array
    with explain_reading(directory), concurrent.futures.ThreadPoolExecutor(1) as executor:
        return executor.submit(read).result()


def read_array(directory: io.Path, name: str) -> np.ndarray:
    """Return one array by its name in `read_array_metadata`."""
    item, _, in_tree = name.partition("/")
    with explain_reading(directory):
        return open_array(find_readable(directory) / item, in_tree).read().result()


def open_checkpointer() -> Any:
    """Return Orbax's checkpointer for trees whose shapes are not known beforehand."""
    import orbax.checkpoint as ocp

    return ocp.Checkpointer(make_handler())


def make_handler() -> Any:
    """Return Orbax's handler for all trees, without compression.

    Compressing saves 8 % of float32's bytes, for four times the CPU time to write and three times
    as long to read (docs/performance.md).
    """
    import orbax.checkpoint as ocp

    def plain() -> Any:
        return ocp.PyTreeCheckpointHandler(use_compression=False)

    return ocp.CompositeCheckpointHandler(params=plain(), train_state=plain(), average=plain())


def array_name(path: Any) -> str:
    """Return a pytree path as text: "blocks/q"."""
    keys = [str(path_key(part)) for part in path]
    return "/".join(keys)


def path_key(part: Any) -> Any:
    """Return the bare key of one step of a pytree path."""
    for attribute in ("key", "idx", "name"):
        if hasattr(part, attribute):
            return getattr(part, attribute)
    return part
