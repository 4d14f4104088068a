"""Import and export Hugging Face checkpoints; every tensor is accounted for.

Import and export only rename, reshape and transpose (both use split-half rotary pairs), so
export(import(x)) is bit-equal. Weights are streamed layer by layer: of each file only the pages
that this process's devices need are read, and the host holds a few tensors at any depth.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import json
import logging
import math
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxpt import io, stage
from jaxpt.data.tokenizer import NAMED_TEMPLATES
from jaxpt.families import family
from jaxpt.model import transformer
from jaxpt.model.param import ParamSpec, list_param_specs
from jaxpt.model.transformer import Params
from jaxpt.sharding import (
    check_model_divides,
    make_logical_sharding,
    make_replicated_sharding,
)
from jaxpt.spec import ModelSpec, UserError
from jaxpt.weights.hub import TOKENIZER_FILES, TOKENIZER_SUFFIXES
from jaxpt.weights.safetensors_file import (
    AdaptedTensor,
    StoredTensor,
    chunk_rows,
    dtype_of_name,
    encode_header,
    open_safetensors,
    open_safetensors_file,
    read_hf_json,
    write_hf_json,
)

log = logging.getLogger(__name__)

SINGLE_FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
GENERATION_CONFIG = "generation_config.json"
UNCARRIED_GENERATION_KEYS = ("_from_model_config", "transformers_version")
EMBEDDING, LM_HEAD = "model.embed_tokens.weight", "lm_head.weight"
SHARD_BYTES = 5 * 10**9  # per file at most, Hugging Face's own default
NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")  # of a layer or an expert, in a tensor's name
MAX_WRONG_SHOWN = 12
MAX_MISSING_LISTED = 10_000  # an absurd number of experts takes minutes to name


StoredTensors = Mapping[str, StoredTensor | AdaptedTensor]  # by name
# (spec, a model's tensors) -> those to read in their place
Adapt = Callable[[ModelSpec, StoredTensors], StoredTensors]


def load_hf_model(
    directory: pathlib.Path,
    mesh: jax.sharding.Mesh,
    dtype: str = "float32",
    adapt: Adapt | None = None,
) -> tuple[ModelSpec, Params]:
    """Return spec and sharded parameters of a Hugging Face directory, in dtype.

    Args:
        directory: of the model.
        mesh: to place parameters on.
        dtype: of the parameters.
        adapt: puts other tensors in place of the directory's.

    Raises:
        UserError: the architecture or a switch is not supported or the mesh cannot shard it (before
            any weight is read), a file is broken, or tensors are missing, unused or of another
            shape (all listed at once).
    """
    spec = read_hf_spec(directory)
    check_model_divides(mesh, spec)
    stored = open_weights(directory)
    if spec.tie_embeddings and EMBEDDING not in stored and LM_HEAD in stored:
        stored[EMBEDDING] = stored.pop(LM_HEAD)  # safetensors' save_model keeps one of two names
    match_tensors(spec, stored, directory)
    if adapt:
        stored = adapt(spec, stored)
    np_dtype = dtype_of_name(dtype)
    weights = list_hf_weights(spec)
    stacks = {}  # devices zero the memory of every stack while the host reads the first files
    for weight in weights:
        if weight.is_stacked_matrix:
            place = make_logical_sharding(mesh, weight.param.axes)
            stacks[weight] = jnp.zeros(weight.param.shape, np_dtype, device=place)
    params: Params = {}
    n_bytes = sum(math.prod(weight.param.shape) for weight in weights) * np_dtype.itemsize
    with stage.progress_bar(f"reading {directory.name}", n_bytes, "B") as advance:
        for weight in weights:
            *outer, name = weight.path
            inner = params
            for part in outer:
                inner = inner.setdefault(part, {})
            stack = stacks.pop(weight, None)
            inner[name] = read_weight(stored, weight, mesh, np_dtype, stack)
            advance(inner[name].nbytes)
    return spec, params


def read_hf_spec(directory: io.Path) -> ModelSpec:
    """Return config.json, of old or new layout, as a ModelSpec.

    Raises:
        UserError: naming the key that is not supported.
    """
    path = directory / "config.json"
    if io.size(path) is None:
        raise UserError(
            f"{directory}: no config.json. Expected a Hugging Face model directory, a run "
            "directory or a checkpoint."
        )
    file = io.local_copy(path)
    spec = family.read_spec(read_hf_json(file), file)
    generation = directory / GENERATION_CONFIG
    if io.size(generation) is not None:
        spec = add_generation_config(spec, io.local_copy(generation))
    return drop_pad_beyond_rows(spec, directory)


def add_generation_config(spec: ModelSpec, file: pathlib.Path) -> ModelSpec:
    """Return a config.json's spec with what generation_config.json says.

    Its token ids are taken, as transformers' generate does. An end token that only config.json
    names stays one too: editors of a directory often miss one of the two files.
    """
    settings = read_hf_json(file)
    tokens: dict[str, Any] = {}
    for key in family.TOKEN_KEYS:
        [field] = key.field_names
        ours, theirs = getattr(spec, field), key.read(settings, file)
        encode = key.kind.encode
        settings.pop(key.name, None)
        taken: Any = ours if theirs is None else theirs
        if key.kind is family.TOKEN_IDS:
            taken = tuple(dict.fromkeys((*(theirs or ()), *ours)))
        if theirs not in (None, ()) and ours not in (None, (), theirs):
            log.warning(
                f"{file}: {key.name} is {encode(theirs)}, in config.json {encode(ours)}. "
                f"{encode(taken)} is taken: what generation_config.json says, and every end token."
            )
        tokens[field] = taken
    for name in UNCARRIED_GENERATION_KEYS:
        settings.pop(name, None)
    return spec.replace(**tokens, generation=json.dumps(settings, sort_keys=True))


def drop_pad_beyond_rows(spec: ModelSpec, directory: io.Path) -> ModelSpec:
    """Return the spec without a padding token that it has no embedding row for."""
    if spec.pad_id is None or spec.pad_id < spec.vocab_size:
        return spec
    log.warning(
        f"{directory}: pad_token_id is {spec.pad_id}, but the model knows ids 0 to "
        f"{spec.vocab_size - 1}. It is left out: a batch padded with it cannot be read."
    )
    return spec.replace(pad_id=None)


def is_hf_directory(directory: io.Path) -> bool:
    """Return whether a directory holds a Hugging Face model, whatever folders it has besides."""
    if not io.exists(directory / "config.json"):
        return False
    return io.exists(directory / SINGLE_FILE) or io.exists(directory / INDEX)


def open_weights(directory: pathlib.Path) -> dict[str, StoredTensor]:
    """Return every tensor of a directory's safetensors files by name, without reading numbers.

    As transformers does, take model.safetensors where there is an index beside it: a second
    save_pretrained leaves the first one's.

    Raises:
        UserError: a file is missing or broken, or the index names one elsewhere.
    """
    has_index = io.size(directory / INDEX) is not None
    if has_index and io.size(directory / SINGLE_FILE) is not None:
        return open_safetensors_file(directory / SINGLE_FILE)
    return open_safetensors(directory)


def write_hf_model(
    spec: ModelSpec,
    params: Params,
    directory: pathlib.Path,
    *,
    dtype: str | None = None,
    tokenizer_dir: pathlib.Path | None = None,
    card: str = "",
) -> int:
    """Write config.json, generation_config.json, safetensors, tokenizer files and README.md.

    Every process calls this; the first one writes.

    Args:
        spec: the architecture.
        params: nested dict of jax.Arrays on any mesh.
        directory: to write to.
        dtype: of the stored weights; None: as the parameters.
        tokenizer_dir: whose tokenizer files are copied.
        card: the text of README.md.

    Returns:
        Bytes of weights.
    """
    np_dtype = params["embed"].dtype
    if dtype:
        np_dtype = dtype_of_name(dtype)
    config = family.write_config(spec, np_dtype.name)
    tensors = list(list_hf_tensors(spec))
    is_writer = jax.process_index() == 0
    shards = split_shards_by_size(tensors, np_dtype)
    n_shards = len(shards)
    weight_map = {}
    for i, shard in enumerate(shards):
        name = SINGLE_FILE
        if n_shards > 1:
            name = f"model-{i + 1:05d}-of-{n_shards:05d}.safetensors"
        path = directory / name if is_writer else None
        write_shard(path, shard, np_dtype, params)
        weight_map |= {tensor.name: name for tensor in shard}
    n_bytes = sum(tensor.n_bytes(np_dtype) for tensor in tensors)
    if not is_writer:
        return n_bytes
    if n_shards > 1:
        index = {"metadata": {"total_size": n_bytes}, "weight_map": weight_map}
        write_hf_json(directory / INDEX, index)
    write_hf_json(directory / "config.json", config)
    write_hf_json(directory / GENERATION_CONFIG, make_generation_config(spec))
    if tokenizer_dir:
        copy_tokenizer(tokenizer_dir, directory)
    if card:
        io.write_text(directory / "README.md", card)
    return n_bytes


def make_generation_config(spec: ModelSpec) -> dict[str, Any]:
    """Return generation_config.json: token ids, and what an import brought."""
    settings = json.loads(spec.generation)
    for key in family.TOKEN_KEYS:
        settings[key.name] = key.write(spec)
    if spec.generation == ModelSpec.generation:
        settings["_from_model_config"] = True
    return settings


def copy_tokenizer(source: pathlib.Path, directory: pathlib.Path) -> None:
    """Copy every file that belongs to a Hugging Face tokenizer.

    Not `auto_map`, which names code of strangers: instead of their class the one that reads
    tokenizer.json as it is.
    """
    for name in io.list_names(source):
        file = source / name
        is_copied = name.startswith(TOKENIZER_FILES) and name.endswith(TOKENIZER_SUFFIXES)
        if is_copied and io.size(file) is not None:
            io.copy_file(file, directory / name)
    for file in io.find(source / NAMED_TEMPLATES, "*.jinja"):
        io.copy_file(file, directory / NAMED_TEMPLATES / file.name)
    settings_file = directory / "tokenizer_config.json"
    if io.size(settings_file) is not None:
        settings = read_hf_json(settings_file)
        if settings.pop("auto_map", None):
            settings["tokenizer_class"] = "PreTrainedTokenizerFast"
            write_hf_json(settings_file, settings)


# ---- which tensor holds which parameter


class HfWeight(NamedTuple):
    """A parameter, and its name in Hugging Face's files.

    They store a linear map as [outputs, inputs], jaxpt as [inputs..., outputs...].

    Attributes:
        path: of the parameter, ("blocks", "q").
        param: its description.
        hf_name: of its tensors, with "{}" for each stacked axis.
        is_float32: whether it is stored in float32 whatever the others are.
        first_row: of its part of a tensor that it shares with other parameters.
    """

    path: tuple[str, ...]
    param: ParamSpec
    hf_name: str
    is_float32: bool = False
    first_row: int = 0

    @property
    def is_stacked_matrix(self) -> bool:
        """Whether this is a matrix of each layer, not a norm, bias or embedding."""
        return self.param.n_in > 0 and self.param.is_layered

    @property
    def inner_shape(self) -> tuple[int, ...]:
        """Our shape of one tensor, without the stacked axes."""
        return self.param.shape[self.param.n_stacked :]

    @property
    def hf_shape(self) -> tuple[int, ...]:
        """The shape of one tensor in the file, or of its part of one."""
        n_in = self.param.n_in
        if n_in:
            n_inputs = math.prod(self.inner_shape[:n_in])
            n_outputs = math.prod(self.inner_shape[n_in:])
            return n_outputs, n_inputs
        if "vocab" in self.param.axes:
            return self.inner_shape
        return (math.prod(self.inner_shape),)


def list_hf_weights(spec: ModelSpec) -> list[HfWeight]:
    """Return every parameter of a spec with its name in its family's files."""
    found = family.find_family(spec)
    weights = {}
    for path, param in list_param_specs(transformer.param_specs(spec)):
        name = "/".join(path)
        hf_name = found.tensor_names.get(name, param.hf_name)
        weights[name] = HfWeight(path, param, hf_name, name in found.float32)
    for hf_name, parts in found.fused.items():
        first_row = 0
        for name in parts:
            weight = weights[name]
            weights[name] = weight._replace(hf_name=hf_name, first_row=first_row)
            first_row += weight.hf_shape[0]
    return list(weights.values())


class HfTensor(NamedTuple):
    """A tensor of a Hugging Face file.

    Attributes:
        name: in the file.
        weights: the parameters that hold its numbers, by rows; one, but for a fused tensor.
        index: along the parameters' stacked axes.
    """

    name: str
    weights: tuple[HfWeight, ...]
    index: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape in the file."""
        n_rows = sum(weight.hf_shape[0] for weight in self.weights)
        return n_rows, *self.weights[0].hf_shape[1:]

    def stored_dtype(self, dtype: np.dtype) -> np.dtype:
        """Return its dtype in a file of this dtype."""
        return np.dtype(np.float32) if self.weights[0].is_float32 else dtype

    def n_bytes(self, dtype: np.dtype) -> int:
        """Return its size in a file of this dtype."""
        return math.prod(self.shape) * self.stored_dtype(dtype).itemsize


def list_hf_tensors(spec: ModelSpec) -> Iterator[HfTensor]:
    """Yield every tensor of the export, parameter by parameter."""
    by_name: dict[str, list[HfWeight]] = {}
    for weight in list_hf_weights(spec):
        by_name.setdefault(weight.hf_name, []).append(weight)
    for hf_name, weights in by_name.items():
        param = weights[0].param
        weights.sort(key=lambda weight: weight.first_row)
        for index in np.ndindex(*param.shape[: param.n_stacked]):
            yield HfTensor(hf_name.format(*index), tuple(weights), index)


def count_hf_tensors(spec: ModelSpec) -> int:
    """Return how many tensors the export has, without listing them."""
    stacked = {}
    for weight in list_hf_weights(spec):
        stacked[weight.hf_name] = math.prod(weight.param.shape[: weight.param.n_stacked])
    return sum(stacked.values())


def match_tensors(
    spec: ModelSpec, stored: dict[str, StoredTensor], directory: pathlib.Path
) -> None:
    """Raise one UserError that lists missing, unused and mis-shaped tensors.

    Compare tied copies.
    """
    n_expected = count_hf_tensors(spec)
    if n_expected > len(stored) + MAX_MISSING_LISTED:
        raise UserError(
            f"{directory}: its config.json describes {n_expected:,} tensors, but its files hold "
            f"{len(stored):,}. Is the config.json that of this model?"
        )
    expected = {tensor.name: tensor.shape for tensor in list_hf_tensors(spec)}
    missing, misshaped = {}, {}
    for name, shape in expected.items():
        if name not in stored:
            missing[name] = f" {shape}"
        elif stored[name].shape != shape:
            misshaped[name] = f": expected shape {shape}, got {stored[name].shape}"
    wrong = [f"missing {text}" for text in list_by_pattern(missing)]
    wrong += list_by_pattern(misshaped)
    unused = {}
    for name, tensor in stored.items():
        # old exports keep rotary_emb.inv_freq, which the config determines
        if name in expected or name.endswith("rotary_emb.inv_freq"):
            continue
        if name == LM_HEAD and spec.tie_embeddings:
            embedding = stored.get(EMBEDDING)
            if not tensors_equal(tensor, embedding):
                wrong.append("lm_head.weight differs from the embedding that it is tied to")
            continue
        unused[name] = f" {tensor.shape}"
    wrong += [f"unused {text}" for text in list_by_pattern(unused)]
    if wrong:
        shown = "; ".join(wrong[:MAX_WRONG_SHOWN])
        n_more = len(wrong) - MAX_WRONG_SHOWN
        if n_more > 0:
            shown += f"; and {n_more} more"
        raise UserError(
            f"{directory}: its tensors do not match its config.json: {shown}. "
            "Is the config.json that of this model?"
        )


def list_by_pattern(remarks: dict[str, str]) -> list[str]:
    """Return tensors' names and what is said of each, those of all layers or experts as one.

    So eight tensors are "experts.{0..7}.w1.weight (14, 24)".
    """
    groups: dict[tuple[str, str], list[tuple[int, ...]]] = {}
    for name, remark in remarks.items():
        pattern = NUMBER.sub("{}", name)
        numbers = tuple(map(int, NUMBER.findall(name)))
        groups.setdefault((pattern, remark), []).append(numbers)
    texts = []
    for (pattern, remark), numbers in groups.items():
        texts += [pattern.format(*merged) + remark for merged in merge_numbers(numbers)]
    return texts


def merge_numbers(numbers: list[tuple[int, ...]]) -> list[tuple[str, ...]]:
    """Return tensors' numbers as texts; layers of the same experts are one."""
    if not numbers[0]:
        return [()]
    by_first: dict[int, list[tuple[int, ...]]] = {}
    for first, *rest in sorted(numbers):
        by_first.setdefault(first, []).append(tuple(rest))
    alike: dict[tuple[tuple[str, ...], ...], list[int]] = {}
    for first, rests in by_first.items():
        alike.setdefault(tuple(merge_numbers(rests)), []).append(first)
    merged = []
    for rests, firsts in alike.items():
        merged += [(format_numbers(firsts), *rest) for rest in rests]
    return merged


def format_numbers(numbers: list[int]) -> str:
    """Return rising numbers as "3", "{0..7}" or "{0,2,5}"."""
    first, last = numbers[0], numbers[-1]
    if first == last:
        return str(first)
    if last - first == len(numbers) - 1:
        return f"{{{first}..{last}}}"
    listed = ",".join(map(str, numbers))
    return f"{{{listed}}}"


def tensors_equal(a: StoredTensor, b: StoredTensor | None) -> bool:
    """Return whether two matrices are equal bit by bit, compared in chunks."""
    if b is None or len(a.shape) != 2:
        return False
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    n_rows, _ = a.shape
    step = chunk_rows(a.shape, a.dtype)
    for first in range(0, n_rows, step):
        stop = min(first + step, n_rows)
        rows = range(first, stop)
        a_chunk = a.map_numbers(rows)
        b_chunk = b.map_numbers(rows)
        if a_chunk.tobytes() != b_chunk.tobytes():
            return False
    return True


# ---- between files and devices


def read_weight(
    stored: StoredTensors,
    weight: HfWeight,
    mesh: jax.sharding.Mesh,
    dtype: np.dtype,
    stack: jax.Array | None,
) -> jax.Array:
    """Return one sharded parameter, in dtype; only the rows and columns needed are read.

    `stack` is what a stacked matrix is written into, layer by layer.
    """
    shape, axes = weight.param.shape, weight.param.axes
    if stack is None:
        read = functools.partial(read_stacked, stored, weight, dtype, ())
        return jax.make_array_from_callback(shape, make_logical_sharding(mesh, axes), read)
    place = make_logical_sharding(mesh, axes[1:])
    for i in range(shape[0]):
        read_layer = functools.partial(read_stacked, stored, weight, dtype, (i,))
        layer = jax.make_array_from_callback(shape[1:], place, read_layer)
        updated = put_layer(stack, layer, jnp.int32(i))
        # reading ahead would pile layers up on the host
        stack = updated.block_until_ready()
    return jnp.asarray(stack)


def read_stacked(
    stored: StoredTensors,
    weight: HfWeight,
    dtype: np.dtype,
    numbers: tuple[int, ...],
    index: Any,
) -> np.ndarray:
    """Return part of a parameter: `numbers` along the first stacked axes, `index` within."""
    if len(numbers) == weight.param.n_stacked:
        tensor = stored[weight.hf_name.format(*numbers)]
        return read_tensor(tensor, weight, dtype, index)
    chosen, *inner_index = index
    size = weight.param.shape[len(numbers)]
    parts = []
    for i in range(size)[chosen]:
        part = read_stacked(stored, weight, dtype, (*numbers, i), tuple(inner_index))
        parts.append(part)
    return np.stack(parts)


@functools.partial(jax.jit, donate_argnums=0)
def put_layer(stack: jax.Array, layer: jax.Array, i: jax.Array) -> jax.Array:
    """Return the stack with layer i replaced, in place."""
    # as integers: XLA's CPU takes bfloat16 through float32, which is eight times slower
    n_bits = 8 * stack.dtype.itemsize
    bits = jnp.dtype(f"uint{n_bits}")
    stack_bits = jax.lax.bitcast_convert_type(stack, bits)
    layer_bits = jax.lax.bitcast_convert_type(layer, bits)
    updated = jax.lax.dynamic_update_index_in_dim(stack_bits, layer_bits, i, 0)
    return jax.lax.bitcast_convert_type(updated, stack.dtype)


def read_tensor(
    tensor: StoredTensor | AdaptedTensor,
    weight: HfWeight,
    dtype: np.dtype,
    index: tuple[slice, ...],
) -> np.ndarray:
    """Return part of one tensor, given its index in our layout."""
    shape, n_in = weight.inner_shape, weight.param.n_in
    bounds = []
    for size, part in zip(shape, index, strict=True):
        bound = range(size)[part]
        bounds.append(bound)
    out_shape = tuple(map(len, bounds))
    out = allocate_array(out_shape, dtype)
    if len(tensor.shape) == 1:
        stop = weight.first_row + math.prod(shape)
        whole = tensor.map_numbers()[weight.first_row : stop]
        out[...] = whole.reshape(shape)[index]
        return out
    # a group of dimensions (heads x head width) is one dimension of the file; only the first of a
    # group is ever sharded
    first_of_group = (0, max(n_in, 1))
    for i, bound in enumerate(bounds):
        assert len(bound) == shape[i] or i in first_of_group

    def flat_span(first: int, last: int) -> range:
        bound = bounds[first]
        inner = math.prod(shape[first + 1 : last])
        start = bound.start * inner
        stop = bound.stop * inner
        return range(start, stop)

    if n_in:
        rows = flat_span(n_in, len(shape))
        rows = range(weight.first_row + rows.start, weight.first_row + rows.stop)
        columns = flat_span(0, n_in)
        flat = out.reshape(len(columns), len(rows)).T
    else:
        rows, columns = bounds
        flat = out
    step = chunk_rows(tensor.shape, tensor.dtype)

    def read_chunk(first: int) -> None:
        part = slice(first, first + step)
        chunk = tensor.map_numbers(rows[part])
        chunk = chunk[:, columns.start : columns.stop]
        if n_in:
            transpose_into(chunk, flat[part].T)
        else:
            flat[part] = chunk

    first_rows = range(0, len(rows), step)
    list(copy_threads().map(read_chunk, first_rows))
    return out


@functools.cache
def copy_threads() -> concurrent.futures.ThreadPoolExecutor:
    """Return threads that copy and transpose chunks.

    numpy frees the GIL there, and one core does not saturate the memory's bandwidth.
    """
    n_threads = min(os.cpu_count() or 1, 8)
    return concurrent.futures.ThreadPoolExecutor(n_threads, "chunks")


def transpose_into(matrix: np.ndarray, out: np.ndarray) -> None:
    """Write matrix.T into out.

    128 rows at a time go through a buffer that is 64 bytes wider than they are: numpy alone walks
    down columns whose numbers compete for one set of the cache where widths are powers of two
    (0.2 GB/s for 8,192 x 2,048 in bfloat16; 2 GB/s like this).
    """
    width = matrix.shape[1]
    n_spare = 64 // out.itemsize
    buffer = np.empty((128, width + n_spare), out.dtype)
    for first in range(0, len(matrix), 128):
        rows = matrix[first : first + 128]
        band = buffer[: len(rows), :width]
        band[...] = rows
        out[:, first : first + 128] = band.T


def allocate_array(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Return an array aligned to 64 bytes, which JAX's CPU takes without a copy."""
    n_bytes = math.prod(shape) * dtype.itemsize
    room = np.empty(n_bytes + 64, np.uint8)
    start = -room.ctypes.data % 64
    aligned = room[start : start + n_bytes]
    return aligned.view(dtype).reshape(shape)


def write_shard(
    path: pathlib.Path | None, tensors: list[HfTensor], dtype: np.dtype, params: Params
) -> None:
    """Write one safetensors file. A path of None takes part in gathering and writes nothing."""
    kinds = {tensor.name: (tensor.stored_dtype(dtype), tensor.shape) for tensor in tensors}
    with contextlib.ExitStack() as cleanup:
        file = None
        label = "gather"
        if path:
            file = cleanup.enter_context(io.open_write(path))
            file.write(encode_header(kinds))
            label = path.name
        pool = concurrent.futures.ThreadPoolExecutor(1)
        writer = cleanup.enter_context(pool)
        bar = stage.progress_bar(label, len(tensors), "tensors")
        advance = cleanup.enter_context(bar)
        written = None
        for tensor in tensors:
            for weight in tensor.weights:
                numbers = gather_tensor(params, weight.path, tensor.index)
                if not file:
                    continue
                for chunk in order_as_in_file(numbers, weight, tensor.stored_dtype(dtype)):
                    if written:
                        written.result()  # one chunk waits for the disk while the next is made
                    written = writer.submit(file.write, chunk.data)
            advance(1)
        if written:
            written.result()


def gather_tensor(params: Params, path: tuple[str, ...], index: tuple[int, ...]) -> np.ndarray:
    """Return one tensor on this host, gathered on the devices first: no host holds it whole."""
    leaf: Any = params
    for part in path:
        leaf = leaf[part]
    mesh = leaf.sharding.mesh
    if leaf.is_fully_replicated and mesh.devices.flat[0].platform == "cpu":
        whole = np.asarray(leaf)  # the device's memory is the host's: a view, no copy
        return whole[index]
    gather = make_gather(make_replicated_sharding(mesh))
    where = tuple(np.int32(i) for i in index)
    return np.asarray(gather(leaf, where))


@functools.cache
def make_gather(place: jax.sharding.Sharding) -> Callable[..., jax.Array]:
    """Return (leaf, index) -> leaf[index] on every device; it compiles once per shape."""

    def gather(leaf: jax.Array, index: tuple[jax.Array, ...]) -> jax.Array:
        return leaf[index]

    return jax.jit(gather, out_shardings=place)


def order_as_in_file(
    numbers: np.ndarray, weight: HfWeight, dtype: np.dtype
) -> Iterator[np.ndarray]:
    """Yield the bytes of one tensor, or of its part of one, as the file holds them, in chunks."""
    if len(weight.hf_shape) == 1:
        vector = numbers.reshape(-1)
        vector = vector.astype(dtype, copy=False)
        yield vector.view(np.uint8)
        return
    matrix = numbers
    if weight.param.n_in:
        n_out, n_in = weight.hf_shape
        matrix = numbers.reshape(n_in, n_out).T
    step = chunk_rows(weight.hf_shape, dtype)
    for first in range(0, len(matrix), step):
        rows = matrix[first : first + step]
        chunk = allocate_array(rows.shape, dtype)
        if weight.param.n_in:
            transpose_into(rows.T, chunk)
        else:
            chunk[...] = rows
        yield chunk.reshape(-1).view(np.uint8)


def split_shards_by_size(tensors: list[HfTensor], dtype: np.dtype) -> list[list[HfTensor]]:
    """Split tensors into files of at most SHARD_BYTES (or one tensor)."""
    shards: list[list[HfTensor]] = []
    room = 0
    for tensor in tensors:
        n_bytes = tensor.n_bytes(dtype)
        if not shards or n_bytes > room:
            shards.append([])
            room = SHARD_BYTES
        shards[-1].append(tensor)
        room -= n_bytes
    return shards
