"""Read the safetensors format: a JSON header, then numbers that are mapped on demand.

The library `safetensors` (0.8) is not used, as it cannot do what these lines are for:

- A damaged file is named with its tensor and both sizes. The library says "invalid shape, data
  type, or offset for tensor" or "incomplete metadata, file not fully covered".
- Memory stays flat. An open `safe_open` keeps what it has read mapped: 0.78 GB after 0.8 GB, here
  0.02 GB. Opened anew for each chunk it is as lean, and as fast within the machine's noise (0.3 to
  0.6 s for 0.8 GB, here 0.6 to 1.1 s).
- It writes a file from all of its tensors' bytes at once, up to 5 GB; `huggingface.write_shard`
  streams them from the devices.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import pathlib
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from jaxpt import io
from jaxpt.spec import UserError

MAX_HEADER_BYTES = 30_000_000  # the format's own limit is 100 MB, which take half a minute
MAX_TENSORS = 200_000  # twice those of the largest mixtures
CHUNK_BYTES = 8 * 2**20  # larger buffers would be new memory from the system each time
DTYPES = {
    "F32": np.dtype("float32"),
    "F16": np.dtype("float16"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F64": np.dtype("float64"),  # read as what the run computes in
}


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

    def map_numbers(self, rows: range | None = None) -> np.ndarray:
        """Return the whole tensor, or some rows of a matrix, as a memory map."""
        shape = self.shape
        start = self.start
        if rows is not None:
            _, width = self.shape
            shape = (len(rows), width)
            start += rows.start * width * self.dtype.itemsize
        n_bytes = math.prod(shape) * self.dtype.itemsize
        mapped = io.map_part(self.file, start, n_bytes)
        return np.frombuffer(mapped, self.dtype).reshape(shape)


class AdaptedTensor(NamedTuple):
    """A matrix of a file with a LoRA adapter added, computed as it is read.

    Attributes:
        base: the matrix [out, in].
        a: float32 [rank, in].
        b: float32 [out, rank], times the adapter's scale.
    """

    base: StoredTensor
    a: np.ndarray
    b: np.ndarray

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the base."""
        return self.base.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the base."""
        return self.base.shape

    def map_numbers(self, rows: range | None = None) -> np.ndarray:
        """Return the whole matrix, or some rows, in float32."""
        b = self.b if rows is None else self.b[rows.start : rows.stop]
        return self.base.map_numbers(rows).astype(np.float32) + b @ self.a


def open_safetensors(directory: pathlib.Path) -> dict[str, StoredTensor]:
    """Return every tensor of a directory's safetensors files by name, without reading numbers."""
    stored: dict[str, StoredTensor] = {}
    for file in list_safetensors_files(directory):
        if io.size(file) is None:
            names = io.printable(", ".join(io.list_names(directory)[:8]))
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
    if io.size(index) is None:
        return [directory / "model.safetensors"]
    weight_map = read_hf_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        weight_map = {}
    names = weight_map.values()
    check_count(index, len(names))
    are_texts = all(isinstance(name, str) for name in names)
    if not names or not are_texts:
        raise UserError(f"{index}: has no weight_map from tensors to files. Download it again.")
    for tensor, name in weight_map.items():
        place = os.path.normpath(name)
        if os.path.isabs(place) or place.startswith(os.pardir):
            raise UserError(
                f"{index}: {tensor}: expected a file in this directory, got {name}. Take the index "
                "of the model's authors."
            )
    return sorted({directory / name for name in names})


def open_safetensors_file(file: pathlib.Path) -> dict[str, StoredTensor]:
    """Return every tensor in the header of one file. Raise UserError for a broken or cut file."""
    size = io.size(file) or 0
    length = int.from_bytes(io.read_range(file, 0, 8), "little")
    text = b""
    if length <= size - 8:
        if length > MAX_HEADER_BYTES:
            raise UserError(
                f"{file}: its header takes {length:,} bytes, and at most {MAX_HEADER_BYTES:,} are "
                "read. Is it a model's?"
            )
        text = io.read_range(file, 8, length)
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
    check_count(file, len(header))
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(x, str) for x in metadata.values()):
        raise UserError(
            f"{file}: its __metadata__ is no JSON object of texts, and other libraries refuse "
            "such a file. Download it again."
        )
    data_start = 8 + length
    tensors: dict[str, StoredTensor] = {}
    for name, entry in header.items():
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


def check_count(file: pathlib.Path, n_tensors: int) -> None:
    """Raise UserError for more tensors than a model has: naming them all would take minutes."""
    if n_tensors > MAX_TENSORS:
        raise UserError(
            f"{file}: names {n_tensors:,} tensors, and at most {MAX_TENSORS:,} are read. "
            "Is it a model's?"
        )


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


def chunk_rows(shape: tuple[int, ...], dtype: np.dtype) -> int:
    """Return how many rows of a matrix make a chunk of CHUNK_BYTES."""
    row_bytes = shape[1] * dtype.itemsize
    return max(CHUNK_BYTES // row_bytes, 1)


def encode_header(kinds: dict[str, tuple[np.dtype, tuple[int, ...]]]) -> bytes:
    """Return how a safetensors file of these dtypes and shapes begins; numbers follow in order.

    8 bytes of header length, then the JSON header.

    Source: the format's description in huggingface/safetensors.
    """
    codes = {known: code for code, known in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, (dtype, shape) in kinds.items():
        stop = start + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": codes[dtype], "shape": shape, "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_safetensors(path: pathlib.Path, tensors: dict[str, np.ndarray]) -> None:
    """Write arrays that fit into memory as one file."""
    kinds = {name: (array.dtype, array.shape) for name, array in tensors.items()}
    with io.open_write(path) as file:
        file.write(encode_header(kinds))
        for array in tensors.values():
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def read_hf_json(path: pathlib.Path) -> dict[str, Any]:
    """Return the JSON object in a file. Raise UserError if it holds none."""
    try:
        found = json.loads(io.read_text(path))
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
    io.write_text(path, text + "\n")


def dtype_of_name(name: str) -> np.dtype:
    """Return a numpy dtype by name, bfloat16 included."""
    if name == "bfloat16":
        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)
