"""Import and export Hugging Face checkpoints from one table; every key is accounted for.

Import and export only rename, reshape and transpose (both use split-half rotary pairs), so
export(import(x)) is bit-equal. Weights are streamed layer by layer: of each file only the pages
that this process's devices need are read, and the host holds a few tensors at any depth.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import itertools
import json
import math
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jaxpt import stage
from jaxpt.model import transformer
from jaxpt.model.param import ParamSpec, is_param_spec
from jaxpt.sharding import make_logical_sharding, make_replicated_sharding
from jaxpt.spec import ModelSpec, RopeScaling, UserError
from jaxpt.weights.hub import TOKENIZER_FILES

Params = dict[str, Any]  # nested dict of jax.Arrays


class TensorRule(NamedTuple):
    """Where a parameter is in a Hugging Face file.

    Hugging Face stores a linear map as [outputs, inputs], jaxpt as [inputs..., outputs...].

    Attributes:
        path: of the parameter in jaxpt.
        hf_name: of the tensor; "{}" is the layer.
        n_in: leading dimensions that are inputs of a linear map; 0: same layout in both.
    """

    path: str
    hf_name: str
    n_in: int = 0

    @property
    def is_layered(self) -> bool:
        """Whether each layer has a tensor of its own."""
        return "{}" in self.hf_name

    @property
    def is_stacked_matrix(self) -> bool:
        """Whether this is a matrix of each layer, not a norm, bias or embedding."""
        return self.n_in > 0 and self.is_layered


TENSOR_RULES = (
    TensorRule("embed", "model.embed_tokens.weight"),
    TensorRule("blocks/attn_norm", "model.layers.{}.input_layernorm.weight"),
    TensorRule("blocks/q", "model.layers.{}.self_attn.q_proj.weight", n_in=1),
    TensorRule("blocks/k", "model.layers.{}.self_attn.k_proj.weight", n_in=1),
    TensorRule("blocks/v", "model.layers.{}.self_attn.v_proj.weight", n_in=1),
    TensorRule("blocks/o", "model.layers.{}.self_attn.o_proj.weight", n_in=2),
    TensorRule("blocks/q_bias", "model.layers.{}.self_attn.q_proj.bias"),
    TensorRule("blocks/k_bias", "model.layers.{}.self_attn.k_proj.bias"),
    TensorRule("blocks/v_bias", "model.layers.{}.self_attn.v_proj.bias"),
    TensorRule("blocks/o_bias", "model.layers.{}.self_attn.o_proj.bias"),
    TensorRule("blocks/q_norm", "model.layers.{}.self_attn.q_norm.weight"),
    TensorRule("blocks/k_norm", "model.layers.{}.self_attn.k_norm.weight"),
    TensorRule("blocks/mlp_norm", "model.layers.{}.post_attention_layernorm.weight"),
    TensorRule("blocks/gate", "model.layers.{}.mlp.gate_proj.weight", n_in=1),
    TensorRule("blocks/up", "model.layers.{}.mlp.up_proj.weight", n_in=1),
    TensorRule("blocks/down", "model.layers.{}.mlp.down_proj.weight", n_in=1),
    TensorRule("blocks/gate_bias", "model.layers.{}.mlp.gate_proj.bias"),
    TensorRule("blocks/up_bias", "model.layers.{}.mlp.up_proj.bias"),
    TensorRule("blocks/down_bias", "model.layers.{}.mlp.down_proj.bias"),
    TensorRule("norm", "model.norm.weight"),
    TensorRule("unembed", "lm_head.weight", n_in=1),
)

SHARD_BYTES = 5 * 10**9  # per file at most, Hugging Face's own default
CHUNK_BYTES = 8 * 2**20  # larger buffers would be new memory from the system each time
MAX_HEADER_BYTES = 100_000_000  # the format's own limit
MAX_WRONG_SHOWN = 12
DTYPES = {
    "F32": np.dtype("float32"),
    "F16": np.dtype("float16"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


def load_hf_model(
    directory: pathlib.Path, mesh: jax.sharding.Mesh, dtype: str = "float32"
) -> tuple[ModelSpec, Params]:
    """Return spec and sharded parameters of a Hugging Face directory, in dtype.

    Raises:
        UserError: the architecture or a switch is not supported (before any weight is read), a file
            is broken, or tensors are missing, unused or of another shape (all listed at once).
    """
    spec = read_hf_spec(directory)
    stored = open_safetensors(directory)
    match_tensors(spec, stored, directory)
    np_dtype = dtype_of_name(dtype)
    rules = list(list_tensor_rules(spec))
    stacks = {}  # devices zero the memory of every stack while the host reads the first files
    for rule, param, _ in rules:
        if rule.is_stacked_matrix:
            place = make_logical_sharding(mesh, param.axes)
            stacks[rule] = jnp.zeros(param.shape, np_dtype, device=place)
    params: Params = {}
    for rule, param, path in rules:
        *outer, name = path
        inner = params
        for part in outer:
            inner = inner.setdefault(part, {})
        stack = stacks.pop(rule, None)
        inner[name] = read_param(stored, rule, param, mesh, np_dtype, stack)
    return spec, params


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
    tensors = list(list_hf_tensors(spec))
    is_writer = jax.process_index() == 0
    if is_writer:
        directory.mkdir(parents=True, exist_ok=True)
    shards = split_shards_by_size(tensors, np_dtype.itemsize)
    n_shards = len(shards)
    weight_map = {}
    for i, shard in enumerate(shards):
        name = "model.safetensors"
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
        write_hf_json(directory / "model.safetensors.index.json", index)
    config = make_hf_config(spec, np_dtype.name)
    write_hf_json(directory / "config.json", config)
    generation: dict[str, Any] = {
        "bos_token_id": spec.bos_id,
        "eos_token_id": spec.eos_id,
        "_from_model_config": True,
    }
    write_hf_json(directory / "generation_config.json", generation)
    if tokenizer_dir:
        copy_tokenizer(tokenizer_dir, directory)
    if card:
        (directory / "README.md").write_text(card)
    return n_bytes


def copy_tokenizer(source: pathlib.Path, directory: pathlib.Path) -> None:
    """Copy every file that belongs to a Hugging Face tokenizer."""
    directory.mkdir(parents=True, exist_ok=True)
    for file in sorted(source.iterdir()):
        name = file.name
        if name.startswith(TOKENIZER_FILES):
            shutil.copyfile(file, directory / name)


# ---- the table applied to a spec


def list_tensor_rules(
    spec: ModelSpec,
) -> Iterator[tuple[TensorRule, ParamSpec, tuple[str, ...]]]:
    """Yield (rule, our ParamSpec, our path) for every parameter of a spec."""
    params = transformer.param_specs(spec)
    n_found = 0
    for rule in TENSOR_RULES:
        path = tuple(rule.path.split("/"))
        param: Any = params
        for part in path:
            param = param.get(part, {})
        if param:
            n_found += 1
            yield rule, param, path
    n_params = len(jax.tree.leaves(params, is_leaf=is_param_spec))
    assert n_found == n_params, "a parameter of model/transformer.py has no rule in huggingface.py"


class HfTensor(NamedTuple):
    """A tensor of a Hugging Face file, and the parameter that holds its numbers."""

    name: str
    shape: tuple[int, ...]
    rule: TensorRule
    path: tuple[str, ...]
    layer: int | None

    def n_bytes(self, dtype: np.dtype) -> int:
        """Return its size in a file."""
        return math.prod(self.shape) * dtype.itemsize


def list_hf_tensors(spec: ModelSpec) -> Iterator[HfTensor]:
    """Yield every tensor of the export, in the order of the table, layer by layer."""
    for rule, param, path in list_tensor_rules(spec):
        if not rule.is_layered:
            shape = hf_shape(rule, param.shape)
            yield HfTensor(rule.hf_name, shape, rule, path, None)
            continue
        shape = hf_shape(rule, param.shape[1:])
        for layer in range(spec.n_layers):
            name = rule.hf_name.format(layer)
            yield HfTensor(name, shape, rule, path, layer)


def hf_shape(rule: TensorRule, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return a tensor's shape in the file, given ours without the layer axis."""
    n_in = rule.n_in
    if n_in:
        n_inputs = math.prod(shape[:n_in])
        n_outputs = math.prod(shape[n_in:])
        return n_outputs, n_inputs
    if rule.path == "embed":
        return shape
    return (math.prod(shape),)


def match_tensors(
    spec: ModelSpec, stored: dict[str, StoredTensor], directory: pathlib.Path
) -> None:
    """Raise one UserError that lists missing, unused and mis-shaped tensors.

    Compare tied copies.
    """
    expected = {tensor.name: tensor.shape for tensor in list_hf_tensors(spec)}
    wrong = []
    for name, shape in expected.items():
        if name not in stored:
            wrong.append(f"missing {name} {shape}")
    for name, shape in expected.items():
        if name not in stored:
            continue
        stored_shape = stored[name].shape
        if stored_shape != shape:
            wrong.append(f"{name}: expected shape {shape}, got {stored_shape}")
    for name, tensor in stored.items():
        # old exports keep rotary_emb.inv_freq, which the config determines
        if name in expected or name.endswith("rotary_emb.inv_freq"):
            continue
        if name == "lm_head.weight" and spec.tie_embeddings:
            embedding = stored.get("model.embed_tokens.weight")
            if not tensors_equal(tensor, embedding):
                wrong.append("lm_head.weight differs from the embedding that it is tied to")
            continue
        wrong.append(f"unused {name} {tensor.shape}")
    if wrong:
        shown = "; ".join(wrong[:MAX_WRONG_SHOWN])
        n_more = len(wrong) - MAX_WRONG_SHOWN
        if n_more > 0:
            shown += f"; and {n_more} more"
        raise UserError(
            f"{directory}: its tensors do not match its config.json: {shown}. "
            "Is the config.json that of this model?"
        )


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
        a_chunk = a.read_bytes(rows)
        b_chunk = b.read_bytes(rows)
        if a_chunk.tobytes() != b_chunk.tobytes():
            return False
    return True


# ---- between files and devices


def read_param(
    stored: dict[str, StoredTensor],
    rule: TensorRule,
    param: ParamSpec,
    mesh: jax.sharding.Mesh,
    dtype: np.dtype,
    stack: jax.Array | None,
) -> jax.Array:
    """Return one sharded parameter, in dtype; only the rows and columns needed are read.

    `stack` is what a stacked matrix is written into, layer by layer.
    """
    shape = param.shape
    place = make_logical_sharding(mesh, param.axes)
    if not rule.is_layered:
        tensor = stored[rule.hf_name]
        read_whole: Any = functools.partial(read_tensor, tensor, rule, shape, dtype)
        return jax.make_array_from_callback(shape, place, read_whole)
    n_layers, *layer_dims = shape
    layer_shape = tuple(layer_dims)
    layers = []
    for i in range(n_layers):
        name = rule.hf_name.format(i)
        read_layer = functools.partial(read_tensor, stored[name], rule, layer_shape, dtype)
        layers.append(read_layer)
    if stack is None:

        def read_layers(index: Any) -> np.ndarray:
            chosen, *layer_index = index
            parts = []
            for read_layer in layers[chosen]:
                part = read_layer(tuple(layer_index))
                parts.append(part)
            return np.stack(parts)

        return jax.make_array_from_callback(shape, place, read_layers)
    place = make_logical_sharding(mesh, param.axes[1:])

    for i, read_layer in enumerate(layers):
        layer = jax.make_array_from_callback(layer_shape, place, read_layer)
        updated = put_layer(stack, layer, jnp.int32(i))
        # reading ahead would pile layers up on the host
        stack = updated.block_until_ready()
    return jnp.asarray(stack)


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
    tensor: StoredTensor,
    rule: TensorRule,
    shape: tuple[int, ...],
    dtype: np.dtype,
    index: tuple[slice, ...],
) -> np.ndarray:
    """Return param[index] of a tensor that has `shape` in jaxpt."""
    bounds = []
    for size, part in zip(shape, index, strict=True):
        bound = range(size)[part]
        bounds.append(bound)
    out_shape = tuple(map(len, bounds))
    out = allocate_array(out_shape, dtype)
    if len(tensor.shape) == 1:
        whole = tensor.read_bytes().reshape(shape)
        out[...] = whole[index]
        return out
    # a group of dimensions (heads x head width) is one dimension of the file; only the first of a
    # group is ever sharded
    n_in = rule.n_in
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
        columns = flat_span(0, n_in)
        flat = out.reshape(len(columns), len(rows)).T
    else:
        rows, columns = bounds
        flat = out
    step = chunk_rows(tensor.shape, tensor.dtype)

    def read_chunk(first: int) -> None:
        part = slice(first, first + step)
        chunk = tensor.read_bytes(rows[part])
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


def chunk_rows(shape: tuple[int, ...], dtype: np.dtype) -> int:
    """Return how many rows of a matrix make a chunk of CHUNK_BYTES."""
    row_bytes = shape[1] * dtype.itemsize
    return max(CHUNK_BYTES // row_bytes, 1)


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
    """Write one safetensors file: 8 bytes of header length, a JSON header, then the numbers.

    A path of None takes part in gathering and writes nothing.

    Source: the format's description in huggingface/safetensors.
    """
    [code] = [code for code, known in DTYPES.items() if known == dtype]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for tensor in tensors:
        stop = start + tensor.n_bytes(dtype)
        entry = {"dtype": code, "shape": tensor.shape, "data_offsets": [start, stop]}
        header[tensor.name] = entry
        start = stop
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with contextlib.ExitStack() as cleanup:
        file = None
        label = "gather"
        if path:
            file = cleanup.enter_context(open(path, "wb"))
            header_length = len(text).to_bytes(8, "little")
            file.write(header_length)
            file.write(text)
            label = path.name
        pool = concurrent.futures.ThreadPoolExecutor(1)
        writer = cleanup.enter_context(pool)
        bar = stage.progress_bar(label, len(tensors), "tensors")
        advance = cleanup.enter_context(bar)
        written = None
        for tensor in tensors:
            numbers = gather_tensor(params, tensor)
            if file:
                for chunk in order_as_in_file(numbers, tensor, dtype):
                    if written:
                        written.result()  # one chunk waits for the disk while the next is made
                    written = writer.submit(file.write, chunk.data)
            advance(1)
        if written:
            written.result()


def gather_tensor(params: Params, tensor: HfTensor) -> np.ndarray:
    """Return one tensor on this host, gathered on the devices first: no host holds it whole."""
    leaf: Any = params
    for part in tensor.path:
        leaf = leaf[part]
    layer = tensor.layer
    of_layer = layer is not None
    mesh = leaf.sharding.mesh
    any_device = mesh.devices.flat[0]
    if leaf.is_fully_replicated and any_device.platform == "cpu":
        whole = np.asarray(leaf)  # the device's memory is the host's: a view, no copy
        if of_layer:
            return whole[layer]
        return whole
    place = make_replicated_sharding(mesh)
    gather = make_gather(place, of_layer)
    gathered = gather(leaf, np.int32(layer or 0))
    return np.asarray(gathered)


@functools.cache
def make_gather(place: jax.sharding.Sharding, of_layer: bool) -> Callable[..., jax.Array]:
    """Return (leaf, layer) -> that layer, or the leaf, on every device; compiles once per shape."""

    def gather(leaf: jax.Array, layer: jax.Array) -> jax.Array:
        if of_layer:
            return leaf[layer]
        return leaf

    return jax.jit(gather, out_shardings=place)


def order_as_in_file(
    numbers: np.ndarray, tensor: HfTensor, dtype: np.dtype
) -> Iterator[np.ndarray]:
    """Yield the bytes of one tensor as the file holds them, in chunks."""
    if len(tensor.shape) == 1:
        vector = numbers.reshape(-1)
        vector = vector.astype(dtype, copy=False)
        yield vector.view(np.uint8)
        return
    matrix = numbers
    if tensor.rule.n_in:
        n_out, n_in = tensor.shape
        matrix = numbers.reshape(n_in, n_out).T
    step = chunk_rows(tensor.shape, dtype)
    for first in range(0, len(matrix), step):
        rows = matrix[first : first + step]
        chunk = allocate_array(rows.shape, dtype)
        if tensor.rule.n_in:
            transpose_into(rows.T, chunk)
        else:
            chunk[...] = rows
        yield chunk.reshape(-1).view(np.uint8)


def split_shards_by_size(tensors: list[HfTensor], itemsize: int) -> list[list[HfTensor]]:
    """Split tensors into files of at most SHARD_BYTES (or one tensor)."""
    shards: list[list[HfTensor]] = []
    room = 0
    for tensor in tensors:
        n_bytes = itemsize * math.prod(tensor.shape)
        if not shards or n_bytes > room:
            shards.append([])
            room = SHARD_BYTES
        shards[-1].append(tensor)
        room -= n_bytes
    return shards


class StoredTensor(NamedTuple):
    """One tensor of a safetensors file.

    Its numbers are mapped on demand and unmapped with the array: an open map per tensor would take
    a file descriptor each (a Qwen2-72B has 963, and 1,024 is a common limit).
    """

    file: pathlib.Path
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int  # byte offset in the file

    @property
    def n_bytes(self) -> int:
        """Bytes of its numbers."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read_bytes(self, rows: range | None = None) -> np.ndarray:
        """Return the whole tensor, or some rows of a matrix, as a memory map."""
        if rows is None:
            return np.memmap(self.file, self.dtype, "r", self.start, self.shape)
        _, width = self.shape
        skipped_bytes = rows.start * width * self.dtype.itemsize
        start = self.start + skipped_bytes
        shape = (len(rows), width)
        return np.memmap(self.file, self.dtype, "r", start, shape)


def open_safetensors(directory: pathlib.Path) -> dict[str, StoredTensor]:
    """Return every tensor of a directory's safetensors files by name, without reading numbers."""
    stored: dict[str, StoredTensor] = {}
    for file in list_safetensors_files(directory):
        if not file.is_file():
            present = sorted(path.name for path in directory.iterdir())
            names = ", ".join(present[:8])
            raise UserError(
                f"{file}: not found (the directory holds: {names}). Weights are read from "
                "safetensors only, since pickled ones (.bin, .pt) can run code; download the whole "
                "model, or save it again with transformers' save_pretrained."
            )
        tensors = open_safetensors_file(file)
        for name, tensor in tensors.items():
            if name in stored:
                raise UserError(
                    f"{file}: tensor {name} is also in another file of {directory}. "
                    "Remove the file that does not belong to this model."
                )
            stored[name] = tensor
    return stored


def list_safetensors_files(directory: pathlib.Path) -> list[pathlib.Path]:
    """Return the files that a directory's index names, or model.safetensors."""
    index = directory / "model.safetensors.index.json"
    if not index.is_file():
        return [directory / "model.safetensors"]
    weight_map = read_hf_json(index).get("weight_map")
    names = []
    if isinstance(weight_map, dict):
        names = weight_map.values()
    are_texts = all(isinstance(name, str) for name in names)
    if not names or not are_texts:
        raise UserError(f"{index}: has no weight_map from tensors to files. Download it again.")
    return sorted({directory / name for name in names})


def open_safetensors_file(file: pathlib.Path) -> dict[str, StoredTensor]:
    """Return every tensor in the header of one file. Raise UserError for a broken or cut file."""
    size = file.stat().st_size
    with open(file, "rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        text = b""
        if length <= min(size - 8, MAX_HEADER_BYTES):
            text = opened.read(length)
    try:
        header = json.loads(text, object_pairs_hook=refuse_duplicate_keys)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{file}: not a complete safetensors file ({size:,} bytes; its header: {error}). "
            "Download it again."
        ) from None
    if not isinstance(header, dict):
        raise UserError(
            f"{file}: not a safetensors file: its header is no JSON object. Download it again."
        )
    data_start = 8 + length
    tensors: dict[str, StoredTensor] = {}
    for name, entry in header.items():
        if name != "__metadata__":
            tensors[name] = parse_header_entry(file, name, entry, data_start, size)
    in_order = sorted(tensors, key=lambda name: tensors[name].start)
    for name, next_name in itertools.pairwise(in_order):
        tensor = tensors[name]
        stop = tensor.start + tensor.n_bytes
        if tensors[next_name].start < stop:
            raise UserError(
                f"{file}: in its header {name} and {next_name} overlap. Download it again."
            )
    return tensors


def parse_header_entry(
    file: pathlib.Path, name: str, entry: Any, data_start: int, size: int
) -> StoredTensor:
    """Return the tensor that one entry of a header describes.

    Args:
        file: the safetensors file.
        name: of the tensor.
        entry: its dtype, shape and data_offsets.
        data_start: where numbers begin in the file, in bytes.
        size: of the file in bytes.
    """
    code = ""
    shape = ()
    start = stop = 0
    try:
        code = entry["dtype"]
        shape = tuple(entry["shape"])
        start, stop = entry["data_offsets"]
        numbers = (*shape, start, stop)
        are_counts = all(map(is_count, numbers))
        is_valid = isinstance(code, str) and are_counts
    except (KeyError, TypeError, ValueError):
        is_valid = False
    if not is_valid:
        raise UserError(
            f"{file}: {name}: expected dtype, shape and data_offsets in the header, got "
            f"{str(entry)[:200]}. Download it again."
        )
    if code not in DTYPES:
        raise UserError(
            f"{file}: {name}: expected dtype {', '.join(DTYPES)}, got {code}. Quantized "
            "checkpoints cannot be trained; take the original."
        )
    tensor = StoredTensor(file, DTYPES[code], shape, data_start + start)
    if stop - start != tensor.n_bytes:
        raise UserError(
            f"{file}: {name} of shape {shape} in {code} takes {tensor.n_bytes:,} bytes, but the "
            f"header gives it {stop - start:,}. Download it again."
        )
    if data_start + stop > size:
        raise UserError(
            f"{file}: is truncated ({size:,} bytes, {name} ends at {data_start + stop:,}). "
            "Download it again."
        )
    return tensor


def is_count(value: Any) -> bool:
    """Return whether a JSON value is an integer of at least 0."""
    return type(value) is int and value >= 0


def refuse_duplicate_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object. Raise ValueError for a duplicate key, of which json keeps the last."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name occurs twice")
    return found


# ---- config.json


def is_size(value: Any) -> bool:
    """Return whether a JSON value is an integer of at least 1."""
    return type(value) is int and value > 0


def is_positive(value: Any) -> bool:
    """Return whether a JSON value is a finite number above 0."""
    if type(value) is float:
        return 0 < value < math.inf
    return is_size(value)


FAMILIES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
REQUIRED_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "vocab_size",
)
OPTIONAL_SIZES = ("num_key_value_heads", "head_dim", "max_position_embeddings", "sliding_window")
TOKEN_IDS = ("bos_token_id", "eos_token_id")
SWITCHES = ("tie_word_embeddings", "attention_bias", "mlp_bias")


def read_hf_spec(directory: pathlib.Path) -> ModelSpec:
    """Return config.json, of old or new layout, as a ModelSpec.

    Raises:
        UserError: naming the field that is not supported.
    """
    path = directory / "config.json"
    if not path.is_file():
        raise UserError(
            f"{directory}: no config.json. Expected a Hugging Face model directory, a run "
            "directory or a checkpoint."
        )
    config = read_hf_json(path)
    check_hf_config(config, path)
    family = config["model_type"]
    theta, scaling = read_rope_scaling(config, path)
    d_model = config["hidden_size"]
    n_heads = config["num_attention_heads"]
    attention_bias = False
    if family in ("llama", "qwen3"):
        attention_bias = config.get("attention_bias") or False
    mlp_bias = False
    if family == "llama":
        mlp_bias = config.get("mlp_bias") or False
    window = None
    if family == "mistral":
        window = config.get("sliding_window", 4096)  # the class's default where it is not written
    try:
        return ModelSpec(
            n_layers=config["num_hidden_layers"],
            d_model=d_model,
            d_ff=config["intermediate_size"],
            n_heads=n_heads,
            n_kv_heads=config.get("num_key_value_heads") or n_heads,
            d_head=config.get("head_dim") or d_model // n_heads,
            vocab_size=config["vocab_size"],
            max_seq_len=config.get("max_position_embeddings") or 2048,
            norm_eps=config.get("rms_norm_eps") or 1e-6,
            rope_theta=theta,
            rope_scaling=scaling,
            tie_embeddings=config.get("tie_word_embeddings") or False,
            family=family,
            qkv_bias=family == "qwen2" or attention_bias,
            out_bias=attention_bias,
            mlp_bias=mlp_bias,
            qk_norm=family == "qwen3",
            sliding_window=window,
            bos_id=first_token_id(config.get("bos_token_id")),
            eos_id=first_token_id(config.get("eos_token_id")),
        )
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def check_hf_config(config: dict[str, Any], path: pathlib.Path) -> None:
    """Raise UserError for an architecture, switch or value that is not supported."""

    def refuse(key: str, supported: str) -> NoReturn:
        raise UserError(
            f"{path}: {key}: expected {supported}, got {config.get(key)!r}. "
            "Convert the model, or take another."
        )

    if config.get("model_type") not in tuple(FAMILIES):
        refuse("model_type", ", ".join(FAMILIES))
    if config.get("quantization_config"):
        refuse("quantization_config", "none (train the original weights)")
    if config.get("hidden_act", "silu") != "silu":
        refuse("hidden_act", "silu")
    if config.get("use_sliding_window"):
        refuse("use_sliding_window", "false")
    if config.get("partial_rotary_factor") not in (None, 1.0):
        refuse("partial_rotary_factor", "1.0")
    missing = [key for key in REQUIRED_SIZES if key not in config]
    if missing:
        raise UserError(
            f"{path}: has no {', '.join(missing)}. Is it the config of a language model?"
        )
    for key in (*REQUIRED_SIZES, *OPTIONAL_SIZES):
        size = config.get(key)
        is_absent = size is None and key not in REQUIRED_SIZES
        if not is_absent and not is_size(size):
            refuse(key, "an integer of at least 1")
    eps = config.get("rms_norm_eps")
    if eps is not None and not is_positive(eps):
        refuse("rms_norm_eps", "a number above 0")
    for key in SWITCHES:
        switch = config.get(key)
        if switch is not None and type(switch) is not bool:
            refuse(key, "true or false")
    for key in TOKEN_IDS:
        token_id = first_token_id(config.get(key))
        if token_id is not None and not is_count(token_id):
            refuse(key, "a token id")


def read_rope_scaling(
    config: dict[str, Any], path: pathlib.Path
) -> tuple[float, RopeScaling | None]:
    """Return (theta, scaling) from rope_parameters (transformers 5) or rope_scaling (before)."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    default_theta = config.get("rope_theta", 10_000.0)
    try:
        theta = get_number(rope, "rope_theta", default_theta)
        rope_type = rope.get("rope_type") or rope.get("type") or "default"
        if rope_type == "default":
            return theta, None
        if rope_type == "linear":
            factor = get_number(rope, "factor")
            return theta, RopeScaling("linear", factor)
        if rope_type == "llama3":
            factor = get_number(rope, "factor")
            low = get_number(rope, "low_freq_factor")
            high = get_number(rope, "high_freq_factor")
            original = get_number(rope, "original_max_position_embeddings")
            scaling = RopeScaling("llama3", factor, low, high, int(original))
            return theta, scaling
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(
            f"{path}: cannot read its rope parameters {rope} ({error}). "
            "Is it the file of the model's authors?"
        ) from None
    raise UserError(f"{path}: rope type: expected default, linear or llama3, got {rope_type!r}.")


def get_number(values: dict[str, Any], key: str, default: Any = None) -> float:
    """Return a finite number above 0. Raise ValueError or TypeError for anything else."""
    value = float(values.get(key, default))
    if not 0 < value < math.inf:
        raise ValueError(f"{key} {value}")
    return value


def make_hf_config(spec: ModelSpec, dtype: str) -> dict[str, Any]:
    """Return config.json for a spec.

    Rope and dtype are written in both layouts: a reader of the old one would otherwise silently
    fall back to theta 10,000.
    """
    if spec.sliding_window and spec.family != "mistral":
        raise UserError(
            f"export: a {spec.family} config.json cannot state a sliding window of "
            f"{spec.sliding_window}. Set the spec's family to mistral."
        )
    scaling = spec.rope_scaling
    rope: dict[str, Any] = {"rope_type": "default"}
    rope_scaling = None
    if scaling:
        rope = {"rope_type": scaling.rope_type, "factor": scaling.factor}
        rope_scaling = rope
    if scaling and scaling.rope_type == "llama3":
        rope["low_freq_factor"] = scaling.low_freq_factor
        rope["high_freq_factor"] = scaling.high_freq_factor
        rope["original_max_position_embeddings"] = scaling.original_max_seq_len
    config: dict[str, Any] = {
        "architectures": [FAMILIES[spec.family] + "ForCausalLM"],
        "model_type": spec.family,
        "hidden_size": spec.d_model,
        "intermediate_size": spec.d_ff,
        "num_hidden_layers": spec.n_layers,
        "num_attention_heads": spec.n_heads,
        "num_key_value_heads": spec.n_kv_heads,
        "head_dim": spec.d_head,
        "vocab_size": spec.vocab_size,
        "max_position_embeddings": spec.max_seq_len,
        "rms_norm_eps": spec.norm_eps,
        "hidden_act": "silu",
        "tie_word_embeddings": spec.tie_embeddings,
        "rope_parameters": {"rope_theta": spec.rope_theta, **rope},
        "rope_theta": spec.rope_theta,
        "rope_scaling": rope_scaling,
        "bos_token_id": spec.bos_id,
        "eos_token_id": spec.eos_id,
        "dtype": dtype,
        "torch_dtype": dtype,
        "initializer_range": 0.02,
        "use_cache": True,
    }
    if spec.family in ("llama", "qwen3"):
        config["attention_bias"] = spec.qkv_bias
    if spec.family == "llama":
        config["mlp_bias"] = spec.mlp_bias
    else:
        config["sliding_window"] = spec.sliding_window
    return config


def first_token_id(value: Any) -> Any:
    """Return the first of several end tokens, which is the document's."""
    if isinstance(value, list):
        return next(iter(value), None)
    return value


def read_hf_json(path: pathlib.Path) -> dict[str, Any]:
    """Return the JSON object in a file. Raise UserError if it holds none."""
    try:
        found = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error}). Download it again.") from None
    if not isinstance(found, dict):
        raise UserError(
            f"{path}: expected a JSON object, got a {type(found).__name__}. Download it again."
        )
    return found


def write_hf_json(path: pathlib.Path, value: dict[str, Any]) -> None:
    """Write JSON as transformers does."""
    text = json.dumps(value, indent=2)
    path.write_text(text + "\n")


def dtype_of_name(name: str) -> np.dtype:
    """Return a numpy dtype by name, bfloat16 included."""
    if name == "bfloat16":
        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)
