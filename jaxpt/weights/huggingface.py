"""Hugging Face checkpoints, both directions from one table; every key is accounted for.

A model comes in and goes out by rename, reshape and transpose only (rotary pairs are split-half here as there), so
export(import(x)) is bit-equal. Tensors are read and written in slices: of each file only the pages that this
process's devices need are touched, and no more than one stacked weight is held on the host.
"""

from __future__ import annotations

import functools
import json
import math
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np

from jaxpt import stage
from jaxpt.model import llama
from jaxpt.sharding import replicated
from jaxpt.spec import ModelSpec, RopeScaling, UserError


class Row(NamedTuple):
    """Our path, their name ("{}" is the layer), and how many of our leading dimensions are inputs of a linear map.

    Theirs stores a linear map as [outputs, inputs]; ours as [inputs..., outputs...]. With n_in 0 the numbers lie alike.
    """

    ours: str
    theirs: str
    n_in: int = 0


TABLE = (
    Row("embed", "model.embed_tokens.weight"),
    Row("blocks/attn_norm", "model.layers.{}.input_layernorm.weight"),
    Row("blocks/q", "model.layers.{}.self_attn.q_proj.weight", n_in=1),
    Row("blocks/k", "model.layers.{}.self_attn.k_proj.weight", n_in=1),
    Row("blocks/v", "model.layers.{}.self_attn.v_proj.weight", n_in=1),
    Row("blocks/o", "model.layers.{}.self_attn.o_proj.weight", n_in=2),
    Row("blocks/q_bias", "model.layers.{}.self_attn.q_proj.bias"),
    Row("blocks/k_bias", "model.layers.{}.self_attn.k_proj.bias"),
    Row("blocks/v_bias", "model.layers.{}.self_attn.v_proj.bias"),
    Row("blocks/o_bias", "model.layers.{}.self_attn.o_proj.bias"),
    Row("blocks/q_norm", "model.layers.{}.self_attn.q_norm.weight"),
    Row("blocks/k_norm", "model.layers.{}.self_attn.k_norm.weight"),
    Row("blocks/mlp_norm", "model.layers.{}.post_attention_layernorm.weight"),
    Row("blocks/gate", "model.layers.{}.mlp.gate_proj.weight", n_in=1),
    Row("blocks/up", "model.layers.{}.mlp.up_proj.weight", n_in=1),
    Row("blocks/down", "model.layers.{}.mlp.down_proj.weight", n_in=1),
    Row("blocks/gate_bias", "model.layers.{}.mlp.gate_proj.bias"),
    Row("blocks/up_bias", "model.layers.{}.mlp.up_proj.bias"),
    Row("blocks/down_bias", "model.layers.{}.mlp.down_proj.bias"),
    Row("norm", "model.norm.weight"),
    Row("unembed", "lm_head.weight", n_in=1),
)

SHARD_BYTES = 5 * 10**9  # of one file at most, Hugging Face's own default
DTYPES = {"F32": np.dtype("float32"), "F16": np.dtype("float16"), "BF16": np.dtype(ml_dtypes.bfloat16)}


def load(directory: pathlib.Path, mesh, dtype: str = "float32") -> tuple[ModelSpec, dict[str, Any]]:
    """(spec, parameters) of a Hugging Face directory, each device holding its own pieces, in dtype.

    Raises UserError for an architecture or switch that is not supported (before any weight is read), for a broken
    file, and for missing, unused, doubled or mis-shaped tensors, all listed at once.
    """
    spec = read_spec(directory)
    stored = open_tensors(directory)
    account(spec, stored, directory)
    params: dict[str, Any] = {}
    for row, shape, path in table_of(spec):
        place = llama.shardings(spec, mesh)
        for part in path:
            place = place[part]
        read = lambda index, row=row, shape=shape: read_slice(stored, row, shape, index).astype(jnp_dtype(dtype))  # noqa: E731
        leaf = jax.make_array_from_callback(shape, place, read)
        inner = params
        for part in path[:-1]:
            inner = inner.setdefault(part, {})
        inner[path[-1]] = leaf
    return spec, params


def export(
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
    stored_as = jnp_dtype(dtype) if dtype else params["embed"].dtype
    tensors = list(tensors_of(spec))
    writes = jax.process_index() == 0
    if writes:
        directory.mkdir(parents=True, exist_ok=True)
    shards = cut_into_shards(tensors, stored_as.itemsize)
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))] if len(shards) > 1 else ["model.safetensors"]
    for name, shard in zip(names, shards, strict=True):
        write_shard(directory / name if writes else None, shard, stored_as, params)
    n_bytes = sum(math.prod(tensor.shape) for tensor in tensors) * stored_as.itemsize
    if writes:
        if len(shards) > 1:
            weight_map = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
            write_json(directory / "model.safetensors.index.json", {"metadata": {"total_size": n_bytes}, "weight_map": weight_map})
        write_json(directory / "config.json", config_of(spec, stored_as.name))
        write_json(directory / "generation_config.json", {"bos_token_id": spec.bos_id, "eos_token_id": spec.eos_id, "_from_model_config": True})
        if tokenizer_dir:
            copy_tokenizer(tokenizer_dir, directory)
        if card:
            (directory / "README.md").write_text(card)
    return n_bytes


def copy_tokenizer(source: pathlib.Path, directory: pathlib.Path) -> None:
    """Every file by which a Hugging Face tokenizer is known."""
    directory.mkdir(parents=True, exist_ok=True)
    for file in sorted(source.iterdir()):
        if file.name.startswith(("tokenizer", "special_tokens", "vocab", "merges", "added_tokens", "chat_template")):
            shutil.copyfile(file, directory / file.name)


# ---- the table applied to a spec


def table_of(spec: ModelSpec) -> Iterator[tuple[Row, tuple[int, ...], tuple[str, ...]]]:
    """(row, our shape, our path) for every weight that a model of this spec has."""
    ours = llama.rows(spec)
    n_found = 0
    for row in TABLE:
        path = tuple(row.ours.split("/"))
        there = ours
        for part in path:
            there = there.get(part) if isinstance(there, dict) else None
        if there is not None:
            n_found += 1
            yield row, there.shape, path
    assert n_found == len(jax.tree.leaves(ours, is_leaf=llama.is_row)), "a weight of model/llama.py has no row in weights/huggingface.py"


class Tensor(NamedTuple):
    """One tensor of a Hugging Face file: its name and shape, and where its numbers are with us."""

    name: str
    shape: tuple[int, ...]
    row: Row
    path: tuple[str, ...]
    layer: int | None


def tensors_of(spec: ModelSpec) -> Iterator[Tensor]:
    """Every tensor of the export, in the order of the table, layer by layer."""
    for row, shape, path in table_of(spec):
        if "{}" in row.theirs:
            for layer in range(spec.n_layers):
                yield Tensor(row.theirs.format(layer), their_shape(row, shape[1:]), row, path, layer)
        else:
            yield Tensor(row.theirs, their_shape(row, shape), row, path, None)


def their_shape(row: Row, ours: tuple[int, ...]) -> tuple[int, ...]:
    """Shape in the file of a weight that is `ours` here (without the layer axis)."""
    if row.n_in:
        return math.prod(ours[row.n_in :]), math.prod(ours[: row.n_in])
    return ours if row.ours == "embed" else (math.prod(ours),)


def account(spec: ModelSpec, stored: dict[str, np.ndarray], directory: pathlib.Path) -> None:
    """Every key is accounted for, or one error lists what is not. Tied copies are compared, then dropped."""
    wanted = {tensor.name: tensor.shape for tensor in tensors_of(spec)}
    wrong = [f"missing {name} {shape}" for name, shape in wanted.items() if name not in stored]
    wrong += [
        f"{name} has shape {stored[name].shape}, wanted {shape}" for name, shape in wanted.items() if name in stored and stored[name].shape != shape
    ]
    for name in stored:
        if name in wanted or name.endswith("rotary_emb.inv_freq"):  # old exports keep this table, which the config determines
            continue
        if name == "lm_head.weight" and spec.tied:
            if not np.array_equal(stored[name].view(np.uint8), stored["model.embed_tokens.weight"].view(np.uint8)):
                wrong.append("lm_head.weight differs from the embedding although config.json ties them")
            continue
        wrong.append(f"unused {name} {stored[name].shape}")
    if wrong:
        shown = "; ".join(wrong[:12]) + (f"; and {len(wrong) - 12} more" if len(wrong) > 12 else "")
        raise UserError(f"{directory}: its tensors are not those of its config.json: {shown}. Is the config.json of this very model?")


# ---- slices of files


def read_slice(stored: dict[str, np.ndarray], row: Row, shape: tuple[int, ...], index: tuple[slice, ...]) -> np.ndarray:
    """Our array[index], read from the files; only the rows and columns asked for are touched."""
    if "{}" not in row.theirs:
        return read_one(stored[row.theirs], row, shape, index)
    layers = range(shape[0])[index[0]]
    return np.stack([read_one(stored[row.theirs.format(layer)], row, shape[1:], index[1:]) for layer in layers])


def read_one(tensor: np.ndarray, row: Row, shape: tuple[int, ...], index: tuple[slice, ...]) -> np.ndarray:
    if row.n_in == 0:
        return np.array(tensor.reshape(shape)[index])
    # A group of dimensions (heads x head width) is one dimension of the file; only its first is ever cut between devices.
    bounds = [range(size)[part] for size, part in zip(shape, index, strict=True)]
    assert all(len(bound) == size for i, (bound, size) in enumerate(zip(bounds, shape, strict=True)) if i not in (0, row.n_in))

    def span(first, last):
        inner = math.prod(shape[first + 1 : last])
        return slice(bounds[first].start * inner, bounds[first].stop * inner)

    piece = tensor[span(row.n_in, len(shape)), span(0, row.n_in)]
    return np.ascontiguousarray(piece.T).reshape([len(bound) for bound in bounds])


def write_shard(path: pathlib.Path | None, tensors: list[Tensor], dtype: np.dtype, params: dict[str, Any]) -> None:
    """One safetensors file, written tensor by tensor: 8 bytes of header length, a JSON header, then the numbers.

    Source: the format's description in huggingface/safetensors. path None: take part in fetching, write nothing.
    """
    code = next(code for code, known in DTYPES.items() if known == dtype)
    header, place = {"__metadata__": {"format": "pt"}}, 0
    for tensor in tensors:
        n_bytes = math.prod(tensor.shape) * dtype.itemsize
        header[tensor.name] = {"dtype": code, "shape": list(tensor.shape), "data_offsets": [place, place + n_bytes]}
        place += n_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file = open(path, "wb") if path else None  # noqa: SIM115
    try:
        if file:
            file.write(len(text).to_bytes(8, "little") + text)
        with stage.progress("export", len(tensors), "tensors") as advance:
            for tensor in tensors:
                numbers = fetch(params, tensor)
                if file:
                    file.write(np.ascontiguousarray(numbers.astype(dtype)).tobytes())
                advance(1)
    finally:
        if file:
            file.close()


def fetch(params: dict[str, Any], tensor: Tensor) -> np.ndarray:
    """One tensor in the file's layout, on this host. It is gathered on the devices first: in a run of several hosts none of them holds it whole."""
    leaf = params
    for part in tensor.path:
        leaf = leaf[part]
    gather = gatherer(replicated(leaf.sharding.mesh), tensor.layer is not None)
    numbers = np.asarray(gather(leaf, np.int32(tensor.layer or 0)))
    return numbers.reshape(tensor.shape[::-1]).T if tensor.row.n_in else numbers.reshape(tensor.shape)


@functools.cache
def gatherer(place, of_layer: bool):
    """(leaf, layer) -> that layer, or the whole leaf, on every device. One compilation a shape, not one a tensor."""
    return jax.jit(lambda leaf, layer: leaf[layer] if of_layer else leaf, out_shardings=place)


def cut_into_shards(tensors: list[Tensor], itemsize: int) -> list[list[Tensor]]:
    shards, room = [], 0
    for tensor in tensors:
        n_bytes = math.prod(tensor.shape) * itemsize
        if not shards or n_bytes > room:
            shards.append([])
            room = SHARD_BYTES
        shards[-1].append(tensor)
        room -= n_bytes
    return shards


def open_tensors(directory: pathlib.Path) -> dict[str, np.ndarray]:
    """Name -> memory-mapped array for every tensor of a directory's safetensors files. Nothing is read yet."""
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        files = sorted({directory / name for name in read_json(index).get("weight_map", {}).values()})
    else:
        files = [directory / "model.safetensors"]
    stored: dict[str, np.ndarray] = {}
    for file in files:
        if not file.is_file():
            found = ", ".join(sorted(path.name for path in directory.iterdir())[:8])
            raise UserError(f"{file}: not there (the directory holds: {found}). Weights are read from safetensors only; download the model whole.")
        for name, tensor in open_file(file).items():
            if name in stored:
                raise UserError(
                    f"{file}: tensor {name} stands in another file of {directory} too. Remove the file that does not belong to this model."
                )
            stored[name] = tensor
    return stored


def open_file(file: pathlib.Path) -> dict[str, np.ndarray]:
    size = file.stat().st_size
    with open(file, "rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        try:
            header = json.loads(opened.read(length)) if 0 < length <= size - 8 else None
        except (UnicodeDecodeError, json.JSONDecodeError):
            header = None
    if not isinstance(header, dict):
        raise UserError(f"{file}: not a whole safetensors file ({size:,} bytes). Download it again.")
    found = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in DTYPES:
            raise UserError(
                f"{file}: {name} is stored as {entry['dtype']}, wanted {', '.join(DTYPES)}. Quantized checkpoints cannot be trained; take the original."
            )
        start, stop = entry["data_offsets"]
        dtype = DTYPES[entry["dtype"]]
        if 8 + length + stop > size or stop - start != math.prod(entry["shape"]) * dtype.itemsize:
            raise UserError(f"{file}: is cut short ({size:,} bytes, {name} ends at {8 + length + stop:,}). Download it again.")
        found[name] = np.memmap(file, dtype=dtype, mode="r", offset=8 + length + start, shape=tuple(entry["shape"]))
    return found


# ---- config.json


def read_spec(directory: pathlib.Path) -> ModelSpec:
    """config.json, of old and new layout, as a ModelSpec. Raises UserError naming the field that is not supported."""
    path = directory / "config.json"
    if not path.is_file():
        raise UserError(f"{directory}: no config.json there. Wanted a Hugging Face model directory, a run directory or a checkpoint.")
    config = read_json(path)

    def refuse(field, wanted):
        raise UserError(f"{path}: {field} is {config.get(field)!r}, supported: {wanted}. Convert the model to one of these, or take another.")

    family = config.get("model_type")
    if family not in ("llama", "mistral", "qwen2", "qwen3"):
        refuse("model_type", "llama, mistral, qwen2, qwen3")
    if config.get("quantization_config"):
        refuse("quantization_config", "none (train the original weights)")
    if config.get("hidden_act", "silu") != "silu":
        refuse("hidden_act", "silu")
    if config.get("use_sliding_window"):
        refuse("use_sliding_window", "false")
    missing = [key for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size") if key not in config]
    if missing:
        raise UserError(f"{path}: has no {', '.join(missing)}. Is it the config of a language model?")
    theta, scaling = read_rope(config, path)
    n_heads = config["num_attention_heads"]
    attention_bias = config.get("attention_bias", False)
    return ModelSpec(
        n_layers=config["num_hidden_layers"],
        d_model=config["hidden_size"],
        d_ff=config["intermediate_size"],
        n_heads=n_heads,
        n_kv_heads=config.get("num_key_value_heads") or n_heads,
        d_head=config.get("head_dim") or config["hidden_size"] // n_heads,
        vocab_size=config["vocab_size"],
        max_positions=config.get("max_position_embeddings", 2048),
        norm_eps=config.get("rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        tied=config.get("tie_word_embeddings", False),
        family=family,
        qkv_bias=family == "qwen2" or attention_bias,
        out_bias=family in ("llama", "qwen3") and attention_bias,
        mlp_bias=family == "llama" and config.get("mlp_bias", False),
        qk_norm=family == "qwen3",
        sliding_window=config.get("sliding_window", 4096) if family == "mistral" else None,  # the class's default where it is not written
        bos_id=first_of(config.get("bos_token_id")),
        eos_id=first_of(config.get("eos_token_id")),
    )


def read_rope(config: dict[str, Any], path: pathlib.Path) -> tuple[float, RopeScaling | None]:
    """(theta, scaling) from rope_parameters (transformers 5) or rope_theta and rope_scaling (before)."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = float(rope.get("rope_theta", config.get("rope_theta", 10_000.0)))
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, RopeScaling("linear", float(rope["factor"]))
    if kind == "llama3":
        return theta, RopeScaling(
            "llama3", float(rope["factor"]), float(rope["low_freq_factor"]), float(rope["high_freq_factor"]), int(rope["original_max_position_embeddings"])
        )  # fmt: skip
    raise UserError(f"{path}: rope type is {kind!r}, supported: default, linear, llama3.")


def config_of(spec: ModelSpec, dtype: str) -> dict[str, Any]:
    """config.json for a spec. Rope and dtype are written in both layouts: a reader of the old one would otherwise fall back to theta 10,000 in silence."""
    if spec.sliding_window and spec.family != "mistral":
        raise UserError(
            f"export: a sliding window of {spec.sliding_window} cannot be told in a {spec.family} config.json. Set the spec's family to mistral."
        )
    rope: dict[str, Any] = {"rope_type": "default"}
    if spec.rope_scaling:
        rope = {"rope_type": spec.rope_scaling.kind, "factor": spec.rope_scaling.factor}
        if spec.rope_scaling.kind == "llama3":
            rope |= {
                "low_freq_factor": spec.rope_scaling.low_freq_factor,
                "high_freq_factor": spec.rope_scaling.high_freq_factor,
                "original_max_position_embeddings": spec.rope_scaling.original_max_positions,
            }
    config: dict[str, Any] = {
        "architectures": [{"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}[spec.family] + "ForCausalLM"],
        "model_type": spec.family,
        "hidden_size": spec.d_model,
        "intermediate_size": spec.d_ff,
        "num_hidden_layers": spec.n_layers,
        "num_attention_heads": spec.n_heads,
        "num_key_value_heads": spec.n_kv_heads,
        "head_dim": spec.d_head,
        "vocab_size": spec.vocab_size,
        "max_position_embeddings": spec.max_positions,
        "rms_norm_eps": spec.norm_eps,
        "hidden_act": "silu",
        "tie_word_embeddings": spec.tied,
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


def first_of(value):
    """Some configs list several end tokens; the first is the document's."""
    return value[0] if isinstance(value, list) else value


def read_json(path: pathlib.Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: not valid JSON ({error}). Download it again.") from None


def write_json(path: pathlib.Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def jnp_dtype(name: str) -> np.dtype:
    return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)
