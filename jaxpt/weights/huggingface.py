"""Hugging Face checkpoints, both directions from one table; every key is accounted for.

A model comes in and goes out by rename, reshape and transpose only (rotary pairs are split-half here as there), so
export(import(x)) is bit-equal. Weights travel layer by layer: of each file only the pages that this process's devices
need are touched, and the host holds a few tensors, whatever the depth.
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
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jaxpt import stage
from jaxpt.model import llama
from jaxpt.sharding import make_logical_sharding, make_replicated_sharding
from jaxpt.spec import ModelSpec, RopeScaling, UserError
from jaxpt.weights.hub import TOKENIZER_FILES


class TensorRule(NamedTuple):
    """Our path, their name ("{}" is the layer), and how many of our leading dimensions are inputs of a linear map.

    Theirs stores a linear map as [outputs, inputs]; ours as [inputs..., outputs...]. With n_in 0 the numbers lie alike.
    """

    path: str
    hf_name: str
    n_in: int = 0

    @property
    def is_stacked_matrix(self) -> bool:
        """The others are norms, biases and the two tables of words."""
        return self.n_in > 0 and "{}" in self.hf_name


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

SHARD_BYTES = 5 * 10**9  # of one file at most, Hugging Face's own default
DTYPES = {
    "F32": np.dtype("float32"),
    "F16": np.dtype("float16"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


def load_hf_model(
    directory: pathlib.Path, mesh, dtype: str = "float32"
) -> tuple[ModelSpec, dict[str, Any]]:
    """(spec, parameters) of a Hugging Face directory, each device holding its own pieces, in dtype.

    Raises UserError for an architecture or switch that is not supported (before any weight is read), for a broken
    file, and for missing, unused, doubled or mis-shaped tensors, all listed at once.
    """
    spec = read_hf_spec(directory)
    stored = open_safetensors(directory)
    match_tensors(spec, stored, directory)
    params: dict[str, Any] = {}
    number_type = dtype_of_name(dtype)
    # the devices clear the memory of every stack while the host reads the first files
    stacks = {
        row: jnp.zeros(ours.shape, number_type, device=make_logical_sharding(mesh, ours.axes))
        for row, ours, _ in list_tensor_rules(spec)
        if row.is_stacked_matrix
    }
    for row, ours, path in list_tensor_rules(spec):
        inner = params
        for part in path[:-1]:
            inner = inner.setdefault(part, {})
        inner[path[-1]] = read_param(stored, row, ours, mesh, number_type, stacks.pop(row, None))
    return spec, params


def write_hf_model(
    spec: ModelSpec,
    params: dict[str, Any],
    directory: pathlib.Path,
    *,
    dtype: str | None = None,
    tokenizer_dir: pathlib.Path | None = None,
    card: str = "",
) -> int:
    """Write config.json, generation_config.json, safetensors (shards of at most 5 GB) and, where given, tokenizer files
    and README.md (`card`). dtype None keeps the parameters'. Every process calls this; the first one writes. Returns bytes of weights.
    """
    stored_as = dtype_of_name(dtype) if dtype else params["embed"].dtype
    tensors = list(list_hf_tensors(spec))
    writes = jax.process_index() == 0
    if writes:
        directory.mkdir(parents=True, exist_ok=True)
    shards = split_shards_by_size(tensors, stored_as.itemsize)
    names = (
        [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        if len(shards) > 1
        else ["model.safetensors"]
    )
    for name, shard in zip(names, shards, strict=True):
        write_shard(directory / name if writes else None, shard, stored_as, params)
    n_bytes = sum(math.prod(tensor.shape) for tensor in tensors) * stored_as.itemsize
    if writes:
        if len(shards) > 1:
            weight_map = {
                tensor.name: name
                for name, shard in zip(names, shards, strict=True)
                for tensor in shard
            }
            write_hf_json(
                directory / "model.safetensors.index.json",
                {"metadata": {"total_size": n_bytes}, "weight_map": weight_map},
            )
        write_hf_json(directory / "config.json", make_hf_config(spec, stored_as.name))
        write_hf_json(
            directory / "generation_config.json",
            {"bos_token_id": spec.bos_id, "eos_token_id": spec.eos_id, "_from_model_config": True},
        )
        if tokenizer_dir:
            copy_tokenizer(tokenizer_dir, directory)
        if card:
            (directory / "README.md").write_text(card)
    return n_bytes


def copy_tokenizer(source: pathlib.Path, directory: pathlib.Path) -> None:
    """Every file by which a Hugging Face tokenizer is known."""
    directory.mkdir(parents=True, exist_ok=True)
    for file in sorted(source.iterdir()):
        if file.name.startswith(TOKENIZER_FILES):
            shutil.copyfile(file, directory / file.name)


# ---- the table applied to a spec


def list_tensor_rules(
    spec: ModelSpec,
) -> Iterator[tuple[TensorRule, llama.ParamSpec, tuple[str, ...]]]:
    """(row, our weight's row, our path) for every weight that a model of this spec has."""
    ours = llama.param_specs(spec)
    n_found = 0
    for row in TENSOR_RULES:
        path = tuple(row.path.split("/"))
        there = ours
        for part in path:
            there = there.get(part) if isinstance(there, dict) else None
        if there is not None:
            n_found += 1
            yield row, there, path
    assert n_found == len(jax.tree.leaves(ours, is_leaf=llama.is_param_spec)), (
        "a weight of model/llama.py has no row in weights/huggingface.py"
    )


class HfTensor(NamedTuple):
    """One tensor of a Hugging Face file: its name and shape, and where its numbers are with us."""

    name: str
    shape: tuple[int, ...]
    rule: TensorRule
    path: tuple[str, ...]
    layer: int | None


def list_hf_tensors(spec: ModelSpec) -> Iterator[HfTensor]:
    """Every tensor of the export, in the order of the table, layer by layer."""
    for row, ours, path in list_tensor_rules(spec):
        if "{}" in row.hf_name:
            for layer in range(spec.n_layers):
                yield HfTensor(
                    row.hf_name.format(layer), hf_shape(row, ours.shape[1:]), row, path, layer
                )
        else:
            yield HfTensor(row.hf_name, hf_shape(row, ours.shape), row, path, None)


def hf_shape(row: TensorRule, ours: tuple[int, ...]) -> tuple[int, ...]:
    """Shape in the file of a weight that is `ours` here (without the layer axis)."""
    if row.n_in:
        return math.prod(ours[row.n_in :]), math.prod(ours[: row.n_in])
    return ours if row.path == "embed" else (math.prod(ours),)


def match_tensors(
    spec: ModelSpec, stored: dict[str, StoredTensor], directory: pathlib.Path
) -> None:
    """Every key is accounted for, or one error lists what is not. Tied copies are compared, then dropped."""
    wanted = {tensor.name: tensor.shape for tensor in list_hf_tensors(spec)}
    wrong = [f"missing {name} {shape}" for name, shape in wanted.items() if name not in stored]
    wrong += [
        f"{name} has shape {stored[name].shape}, wanted {shape}"
        for name, shape in wanted.items()
        if name in stored and stored[name].shape != shape
    ]
    for name in stored:
        if name in wanted or name.endswith(
            "rotary_emb.inv_freq"
        ):  # old exports keep this table, which the config determines
            continue
        if name == "lm_head.weight" and spec.tie_embeddings:
            if not tensors_equal(stored[name], stored.get("model.embed_tokens.weight")):
                wrong.append(
                    "lm_head.weight differs from the embedding although config.json ties them"
                )
            continue
        wrong.append(f"unused {name} {stored[name].shape}")
    if wrong:
        shown = "; ".join(wrong[:12]) + (f"; and {len(wrong) - 12} more" if len(wrong) > 12 else "")
        raise UserError(
            f"{directory}: its tensors are not those of its config.json: {shown}. Is the config.json of this very model?"
        )


def tensors_equal(a: StoredTensor, b: StoredTensor | None) -> bool:
    """Whether two matrices are the same bit by bit, compared piece by piece."""
    if b is None or len(a.shape) != 2 or (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    step = chunk_rows(a.shape, a.dtype)
    return all(
        a.read_bytes(rows).tobytes() == b.read_bytes(rows).tobytes()
        for rows in (
            range(a.shape[0])[first : first + step] for first in range(0, a.shape[0], step)
        )
    )


# ---- between files and devices


def read_param(
    stored: dict[str, StoredTensor],
    row: TensorRule,
    ours: llama.ParamSpec,
    mesh,
    dtype: np.dtype,
    stack: jax.Array | None,
) -> jax.Array:
    """One weight of ours on its devices, in dtype; of the files only the rows and columns asked for are touched.

    stack  what a stacked matrix is written into, layer by layer
    """
    place = make_logical_sharding(mesh, ours.axes)
    if "{}" not in row.hf_name:
        return jax.make_array_from_callback(
            ours.shape,
            place,
            functools.partial(read_tensor, stored[row.hf_name], row, ours.shape, dtype),
        )
    layers = [
        functools.partial(
            read_tensor, stored[row.hf_name.format(layer)], row, ours.shape[1:], dtype
        )
        for layer in range(ours.shape[0])
    ]
    if stack is None:
        return jax.make_array_from_callback(
            ours.shape,
            place,
            lambda index: np.stack([layer(index[1:]) for layer in layers[index[0]]]),
        )
    for i, layer in enumerate(layers):
        stack = put_layer(
            stack,
            jax.make_array_from_callback(
                ours.shape[1:], make_logical_sharding(mesh, ours.axes[1:]), layer
            ),
            np.int32(i),
        )
        stack.block_until_ready()  # reading that runs ahead would heap layers up on the host
    return stack


@functools.partial(jax.jit, donate_argnums=0)
def put_layer(stack, one, layer):
    """Stack with its layer replaced, in place. As integers: XLA's CPU takes bfloat16 through float32, which is eight times slower."""
    bits = lambda x: jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))  # noqa: E731
    return jax.lax.bitcast_convert_type(
        jax.lax.dynamic_update_index_in_dim(bits(stack), bits(one), layer, 0), stack.dtype
    )


def read_tensor(
    tensor: StoredTensor,
    row: TensorRule,
    shape: tuple[int, ...],
    dtype: np.dtype,
    index: tuple[slice, ...],
) -> np.ndarray:
    """Our array[index] of a tensor whose whole is of our `shape`."""
    bounds = [range(size)[part] for size, part in zip(shape, index, strict=True)]
    out = allocate_array(tuple(map(len, bounds)), dtype)
    if len(tensor.shape) == 1:
        out[...] = tensor.read_bytes().reshape(shape)[index]
        return out
    # A group of dimensions (heads x head width) is one dimension of the file; only its first is ever cut between devices.
    assert all(
        len(bound) == size
        for i, (bound, size) in enumerate(zip(bounds, shape, strict=True))
        if i not in (0, max(row.n_in, 1))
    )

    def span(first, last):
        inner = math.prod(shape[first + 1 : last])
        return range(bounds[first].start * inner, bounds[first].stop * inner)

    rows, columns = (span(row.n_in, len(shape)), span(0, row.n_in)) if row.n_in else bounds
    flat = out.reshape(len(columns), len(rows)) if row.n_in else out
    step = chunk_rows(tensor.shape, tensor.dtype)

    def read_piece(first: int) -> None:
        piece = tensor.read_bytes(rows[first : first + step])[:, columns.start : columns.stop]
        if row.n_in:
            transpose_into(piece, flat[:, first : first + step])
        else:
            flat[first : first + step] = piece

    list(n_copy_threads().map(read_piece, range(0, len(rows), step)))
    return out


@functools.cache
def n_copy_threads() -> concurrent.futures.ThreadPoolExecutor:
    """Threads that copy and transpose pieces: numpy holds no lock there, and one core alone does not fill the memory's bandwidth."""
    return concurrent.futures.ThreadPoolExecutor(min(os.cpu_count() or 1, 8), "pieces")


def chunk_rows(shape: tuple[int, ...], dtype: np.dtype) -> int:
    """Of a matrix, so that a piece of it takes 8 MB: a larger one would be new memory from the system each time."""
    return max(8 * 2**20 // (shape[1] * dtype.itemsize), 1)


def transpose_into(matrix: np.ndarray, out: np.ndarray) -> None:
    """out[...] = matrix.T

    128 rows at a time go through a buffer 64 bytes wider than they are: numpy alone walks down columns whose numbers compete
    for one set of the cache where widths are powers of two (0.2 GB/s for 8,192 x 2,048 in bfloat16; so 2 GB/s).
    """
    buffer = np.empty((128, matrix.shape[1] + 64 // out.itemsize), out.dtype)
    for first in range(0, len(matrix), 128):
        rows = matrix[first : first + 128]
        band = buffer[: len(rows), : rows.shape[1]]
        band[...] = rows
        out[:, first : first + 128] = band.T


def allocate_array(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array that begins at a multiple of 64 bytes, which JAX's CPU takes as it is; others it copies."""
    n_bytes = math.prod(shape) * dtype.itemsize
    room = np.empty(n_bytes + 64, np.uint8)
    start = -room.ctypes.data % 64
    return room[start : start + n_bytes].view(dtype).reshape(shape)


def write_shard(
    path: pathlib.Path | None, tensors: list[HfTensor], dtype: np.dtype, params: dict[str, Any]
) -> None:
    """One safetensors file, written tensor by tensor: 8 bytes of header length, a JSON header, then the numbers.

    Source: the format's description in huggingface/safetensors. path None: take part in fetching, write nothing.
    """
    code = next(code for code, known in DTYPES.items() if known == dtype)
    header, place = {"__metadata__": {"format": "pt"}}, 0
    for tensor in tensors:
        n_bytes = math.prod(tensor.shape) * dtype.itemsize
        header[tensor.name] = {
            "dtype": code,
            "shape": list(tensor.shape),
            "data_offsets": [place, place + n_bytes],
        }
        place += n_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(open(path, "wb")) if path else None
        writer = stack.enter_context(concurrent.futures.ThreadPoolExecutor(1))
        advance = stack.enter_context(stage.progress_bar("export", len(tensors), "tensors"))
        written = (
            writer.submit(file.write, len(text).to_bytes(8, "little") + text) if file else None
        )
        for tensor in tensors:
            numbers = gather_tensor(params, tensor)
            for piece in order_as_in_file(numbers, tensor, dtype) if file else ():
                written.result()  # one piece waits for the disk while the next is made
                written = writer.submit(file.write, piece)
            advance(1)
        if file:
            written.result()


def gather_tensor(params: dict[str, Any], tensor: HfTensor) -> np.ndarray:
    """One tensor of ours on this host. It is gathered on the devices first: in a run of several hosts none of them holds it whole."""
    leaf = params
    for part in tensor.path:
        leaf = leaf[part]
    mesh = leaf.sharding.mesh
    if leaf.is_fully_replicated and mesh.devices.flat[0].platform == "cpu":
        return np.asarray(leaf)[
            tensor.layer if tensor.layer is not None else ...
        ]  # its memory is ours: a view, no copy
    return np.asarray(
        make_gather(make_replicated_sharding(mesh), tensor.layer is not None)(
            leaf, np.int32(tensor.layer or 0)
        )
    )


@functools.cache
def make_gather(place, of_layer: bool):
    """(leaf, layer) -> that layer, or the whole leaf, on every device. One compilation a shape, not one a tensor."""
    return jax.jit(lambda leaf, layer: leaf[layer] if of_layer else leaf, out_shardings=place)


def order_as_in_file(
    numbers: np.ndarray, tensor: HfTensor, dtype: np.dtype
) -> Iterator[np.ndarray]:
    """The bytes of one tensor as the file holds them, in pieces."""
    if len(tensor.shape) == 1:
        yield numbers.reshape(-1).astype(dtype, copy=False).view(np.uint8)
        return
    theirs = numbers.reshape(tensor.shape[::-1]).T if tensor.rule.n_in else numbers
    step = chunk_rows(tensor.shape, dtype)
    for first in range(0, len(theirs), step):
        rows = theirs[first : first + step]
        piece = allocate_array(rows.shape, dtype)
        if tensor.rule.n_in:
            transpose_into(rows.T, piece)
        else:
            piece[...] = rows
        yield piece.reshape(-1).view(np.uint8)


def split_shards_by_size(tensors: list[HfTensor], itemsize: int) -> list[list[HfTensor]]:
    shards, room = [], 0
    for tensor in tensors:
        n_bytes = math.prod(tensor.shape) * itemsize
        if not shards or n_bytes > room:
            shards.append([])
            room = SHARD_BYTES
        shards[-1].append(tensor)
        room -= n_bytes
    return shards


class StoredTensor(NamedTuple):
    """One tensor of a safetensors file. Its numbers are mapped when they are asked for and let go with the array: a map that
    stays open for each tensor would take a file descriptor each (a Qwen2-72B has 963, and 1,024 is a common limit).
    """

    file: pathlib.Path
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int  # bytes from the beginning of the file

    @property
    def n_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read_bytes(self, rows: range | None = None) -> np.ndarray:
        """All of it, or the rows of a matrix."""
        if rows is None:
            return np.memmap(self.file, self.dtype, "r", self.start, self.shape)
        row_bytes = self.shape[1] * self.dtype.itemsize
        return np.memmap(
            self.file,
            self.dtype,
            "r",
            self.start + rows.start * row_bytes,
            (len(rows), self.shape[1]),
        )


def open_safetensors(directory: pathlib.Path) -> dict[str, StoredTensor]:
    """Every tensor of a directory's safetensors files, by name. No numbers are read yet."""
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        weight_map = read_hf_json(index).get("weight_map")
        if (
            not isinstance(weight_map, dict)
            or not all(isinstance(name, str) for name in weight_map.values())
            or not weight_map
        ):
            raise UserError(f"{index}: has no weight_map from tensors to files. Download it again.")
        files = sorted({directory / name for name in weight_map.values()})
    else:
        files = [directory / "model.safetensors"]
    stored: dict[str, StoredTensor] = {}
    for file in files:
        if not file.is_file():
            found = ", ".join(sorted(path.name for path in directory.iterdir())[:8])
            raise UserError(
                f"{file}: not there (the directory holds: {found}). Weights are read from safetensors only, since pickled ones (.bin, .pt) can run "
                "code; download the model whole, or save it again with transformers' save_pretrained."
            )
        for name, tensor in open_safetensors_file(file).items():
            if name in stored:
                raise UserError(
                    f"{file}: tensor {name} stands in another file of {directory} too. Remove the file that does not belong to this model."
                )
            stored[name] = tensor
    return stored


def open_safetensors_file(file: pathlib.Path) -> dict[str, StoredTensor]:
    """Every tensor that the header of one file names. Raises UserError where the header is not that of a whole file."""
    size = file.stat().st_size
    with open(file, "rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        text = (
            opened.read(length) if length <= min(size - 8, 100_000_000) else b""
        )  # the format's own limit
    try:
        header = json.loads(text, object_pairs_hook=refuse_duplicate_keys)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{file}: not a whole safetensors file ({size:,} bytes; its header: {error}). Download it again."
        ) from None
    if not isinstance(header, dict):
        raise UserError(
            f"{file}: not a safetensors file: its header is no list of tensors. Download it again."
        )
    found: dict[str, StoredTensor] = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            code, shape, (start, stop) = (
                entry["dtype"],
                tuple(entry["shape"]),
                entry["data_offsets"],
            )
            described = isinstance(code, str) and all(
                type(number) is int and number >= 0 for number in (*shape, start, stop)
            )
        except (KeyError, TypeError, ValueError):
            described = False
        if not described:
            raise UserError(
                f"{file}: its header says {str(entry)[:200]} of {name}, wanted dtype, shape and data_offsets. Download it again."
            )
        if code not in DTYPES:
            raise UserError(
                f"{file}: {name} is stored as {code}, wanted {', '.join(DTYPES)}. Quantized checkpoints cannot be trained; take the original."
            )
        found[name] = StoredTensor(file, DTYPES[code], shape, 8 + length + start)
        if stop - start != found[name].n_bytes:
            raise UserError(
                f"{file}: {name} of shape {shape} in {code} takes {found[name].n_bytes:,} bytes, but the header gives it {stop - start:,}. Download it again."
            )
        if 8 + length + stop > size:
            raise UserError(
                f"{file}: is cut short ({size:,} bytes, {name} ends at {8 + length + stop:,}). Download it again."
            )
    in_order = sorted(found.items(), key=lambda item: item[1].start)
    for (name, tensor), (following, other) in itertools.pairwise(in_order):
        if other.start < tensor.start + tensor.n_bytes:
            raise UserError(
                f"{file}: its header lays {name} and {following} over each other. Download it again."
            )
    return found


def refuse_duplicate_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Raises ValueError for a name that stands in it twice, of which json would keep the last."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name stands in it twice")
    return found


# ---- config.json


def read_hf_spec(directory: pathlib.Path) -> ModelSpec:
    """config.json, of old and new layout, as a ModelSpec. Raises UserError naming the field that is not supported."""
    path = directory / "config.json"
    if not path.is_file():
        raise UserError(
            f"{directory}: no config.json there. Wanted a Hugging Face model directory, a run directory or a checkpoint."
        )
    config = read_hf_json(path)

    def refuse(field, wanted):
        raise UserError(
            f"{path}: {field} is {config.get(field)!r}, supported: {wanted}. Convert the model to one of these, or take another."
        )

    family = config.get("model_type")
    if family not in ("llama", "mistral", "qwen2", "qwen3"):
        refuse("model_type", "llama, mistral, qwen2, qwen3")
    if config.get("quantization_config"):
        refuse("quantization_config", "none (train the original weights)")
    if config.get("hidden_act", "silu") != "silu":
        refuse("hidden_act", "silu")
    if config.get("use_sliding_window"):
        refuse("use_sliding_window", "false")
    if config.get("partial_rotary_factor") not in (None, 1.0):
        refuse("partial_rotary_factor", "1.0")
    sizes = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "vocab_size",
    )
    missing = [key for key in sizes if key not in config]
    if missing:
        raise UserError(
            f"{path}: has no {', '.join(missing)}. Is it the config of a language model?"
        )
    whole = lambda value: type(value) is int and value > 0  # noqa: E731
    wanted = {
        "whole numbers of at least 1": (
            whole,
            [
                *sizes,
                "num_key_value_heads",
                "head_dim",
                "max_position_embeddings",
                "sliding_window",
            ],
        ),
        "numbers above 0": (
            lambda value: whole(value) or (type(value) is float and 0 < value < math.inf),
            ["rms_norm_eps"],
        ),
        "true or false": (
            lambda value: type(value) is bool,
            ["tie_word_embeddings", "attention_bias", "mlp_bias"],
        ),
        "a token id": (
            lambda value: type(value) is int and value >= 0,
            ["bos_token_id", "eos_token_id"],
        ),
    }
    config |= {key: first_token_id(config.get(key)) for key in wanted["a token id"][1]}
    for words, (fits, keys) in wanted.items():
        for key in keys:
            if not fits(config.get(key)) and (key in sizes or config.get(key) is not None):
                refuse(key, words)
    theta, scaling = read_rope_scaling(config, path)
    n_heads = config["num_attention_heads"]
    attention_bias = family in ("llama", "qwen3") and (config.get("attention_bias") or False)
    try:
        return ModelSpec(
            n_layers=config["num_hidden_layers"],
            d_model=config["hidden_size"],
            d_ff=config["intermediate_size"],
            n_heads=n_heads,
            n_kv_heads=config.get("num_key_value_heads") or n_heads,
            d_head=config.get("head_dim") or config["hidden_size"] // n_heads,
            vocab_size=config["vocab_size"],
            max_seq_len=config.get("max_position_embeddings") or 2048,
            norm_eps=config.get("rms_norm_eps") or 1e-6,
            rope_theta=theta,
            rope_scaling=scaling,
            tie_embeddings=config.get("tie_word_embeddings") or False,
            family=family,
            qkv_bias=family == "qwen2" or attention_bias,
            out_bias=attention_bias,
            mlp_bias=family == "llama" and (config.get("mlp_bias") or False),
            qk_norm=family == "qwen3",
            sliding_window=config.get("sliding_window", 4096)
            if family == "mistral"
            else None,  # the class's default where it is not written
            bos_id=config["bos_token_id"],
            eos_id=config["eos_token_id"],
        )
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def read_rope_scaling(
    config: dict[str, Any], path: pathlib.Path
) -> tuple[float, RopeScaling | None]:
    """(theta, scaling) from rope_parameters (transformers 5) or rope_theta and rope_scaling (before)."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    try:
        theta = get_number(rope, "rope_theta", config.get("rope_theta", 10_000.0))
        kind = rope.get("rope_type") or rope.get("type") or "default"
        if kind == "default":
            return theta, None
        if kind == "linear":
            return theta, RopeScaling("linear", get_number(rope, "factor"))
        if kind == "llama3":
            low, high, original = (
                get_number(rope, key)
                for key in (
                    "low_freq_factor",
                    "high_freq_factor",
                    "original_max_position_embeddings",
                )
            )
            return theta, RopeScaling(
                "llama3", get_number(rope, "factor"), low, high, int(original)
            )
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(
            f"{path}: its rope parameters {rope} cannot be read ({error}). Is it the file of the model's makers?"
        ) from None
    raise UserError(f"{path}: rope type is {kind!r}, supported: default, linear, llama3.")


def get_number(found: dict[str, Any], key: str, default: Any = None) -> float:
    value = float(found.get(key, default))
    if not 0 < value < math.inf:
        raise ValueError(f"{key} {value}")
    return value


def make_hf_config(spec: ModelSpec, dtype: str) -> dict[str, Any]:
    """config.json for a spec. Rope and dtype are written in both layouts: a reader of the old one would otherwise fall back to theta 10,000 in silence."""
    if spec.sliding_window and spec.family != "mistral":
        raise UserError(
            f"export: a sliding window of {spec.sliding_window} cannot be told in a {spec.family} config.json. Set the spec's family to mistral."
        )
    rope: dict[str, Any] = {"rope_type": "default"}
    if spec.rope_scaling:
        rope = {"rope_type": spec.rope_scaling.rope_type, "factor": spec.rope_scaling.factor}
        if spec.rope_scaling.rope_type == "llama3":
            rope |= {
                "low_freq_factor": spec.rope_scaling.low_freq_factor,
                "high_freq_factor": spec.rope_scaling.high_freq_factor,
                "original_max_position_embeddings": spec.rope_scaling.original_max_seq_len,
            }
    config: dict[str, Any] = {
        "architectures": [
            {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}[
                spec.family
            ]
            + "ForCausalLM"
        ],
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
        "rope_scaling": rope if spec.rope_scaling else None,
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
    if spec.family != "llama":
        config["sliding_window"] = spec.sliding_window
    return config


def first_token_id(value):
    """Some configs list several end tokens; the first is the document's."""
    return next(iter(value), None) if isinstance(value, list) else value


def read_hf_json(path: pathlib.Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error}). Download it again.") from None
    if not isinstance(found, dict):
        raise UserError(
            f"{path}: holds a {type(found).__name__}, wanted a JSON object. Download it again."
        )
    return found


def write_hf_json(path: pathlib.Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def dtype_of_name(name: str) -> np.dtype:
    return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)
