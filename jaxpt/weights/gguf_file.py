"""Write a model as a GGUF file, which llama.cpp and what is built on it run.

Names and keys are those of llama.cpp's convert_hf_to_gguf.py, by the package `gguf`.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
from typing import Any

import numpy as np

from jaxpt import stage
from jaxpt.model.rope import compute_rope_frequencies
from jaxpt.model.transformer import Params
from jaxpt.spec import ModelSpec, UserError
from jaxpt.weights import huggingface
from jaxpt.weights.gguf_tokenizer import GgufTokenizer
from jaxpt.weights.huggingface import HfTensor

# dtype of the matrices -> llama.cpp's name of such a file
FILE_TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
BLOCK_SIZE = 32  # numbers of a row that share a scale in q8_0
FILE_NAME = "model.gguf"
# llama.cpp's architecture of a family, and what of a spec it takes beside the sizes
ARCHITECTURES: dict[str, tuple[str, dict[str, tuple[Any, ...]]]] = {
    "llama": ("llama", {"qkv_bias": (False, True), "out_bias": (False, True)}),
    "mistral": ("llama", {}),
    "qwen2": ("qwen2", {"qkv_bias": (True,)}),
    "qwen3": ("qwen3", {"qk_norm": (True,)}),
}
STATED = {"n_layers", "d_model", "d_ff", "n_heads", "n_kv_heads", "d_head", "vocab_size"}
STATED |= {"max_seq_len", "norm_eps", "rope_theta", "rope_scaling", "tie_embeddings", "family"}
STATED |= {"sliding_window", "bos_id", "eos_ids", "pad_id", "generation"}


def import_gguf() -> Any:
    """Return the package gguf. Raise UserError if it is not installed."""
    try:
        import gguf
    except ImportError:
        raise UserError(
            "export_gguf: needs the package gguf. Run: pip install -r requirements-gguf.txt"
        ) from None
    return gguf


def check_spec(spec: ModelSpec) -> None:
    """Raise UserError unless llama.cpp computes what a spec says, naming the field."""
    if spec.family not in ARCHITECTURES:
        raise UserError(
            f"export_gguf: writes {', '.join(ARCHITECTURES)}, got a {spec.family}. Export it with "
            "jaxpt export_hf, and convert that with llama.cpp's convert_hf_to_gguf.py."
        )
    _, allowed = ARCHITECTURES[spec.family]
    for field in dataclasses.fields(ModelSpec):
        value = getattr(spec, field.name)
        if field.name in STATED:
            continue
        expected = allowed.get(field.name, (field.default,))
        if value not in expected:
            raise UserError(
                f"export_gguf: {field.name}: llama.cpp's {spec.family} has {expected[0]!r}, got "
                f"{value!r}. Export with jaxpt export_hf."
            )
    if spec.rope_scaling and spec.rope_scaling.rope_type == "yarn":
        raise UserError(
            "export_gguf: rope_scaling: expected linear, llama3 or none, got yarn. Export with "
            "jaxpt export_hf, and convert that with llama.cpp's convert_hf_to_gguf.py."
        )


def write_gguf(
    spec: ModelSpec,
    params: Params,
    path: pathlib.Path,
    dtype: str,
    tokenizer: GgufTokenizer,
    name: str,
) -> int:
    """Write a GGUF file, tensor by tensor. Return the bytes of weights.

    Args:
        spec: the architecture, as check_spec allows.
        params: nested dict of jax.Arrays.
        path: of the file.
        dtype: of the matrices, a key of FILE_TYPES; vectors are float32.
        tokenizer: of the model.
        name: of the model, shown by llama.cpp.
    """
    gguf = import_gguf()
    architecture, _ = ARCHITECTURES[spec.family]
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType[FILE_TYPES[dtype]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_sizes(writer, spec)
    add_tokenizer(writer, tokenizer)
    tensors = list(huggingface.list_hf_tensors(spec))
    known = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(known[architecture], spec.n_layers)
    kinds = []
    for tensor in tensors:
        kind = choose_kind(tensor.shape, dtype)
        code = gguf.GGMLQuantizationType[kind]
        shape = gguf.quant_shape_to_byte_shape(tensor.shape, code)
        gguf_name = names.get_name(tensor.name, (".weight", ".bias"))
        n_bytes = math.prod(shape)
        writer.add_tensor_info(gguf_name, shape, np.dtype(np.uint8), n_bytes, raw_dtype=code)
        kinds.append(code)
    freqs = compute_rope_factors(spec)
    if freqs is not None:
        writer.add_tensor_info("rope_freqs.weight", freqs.shape, freqs.dtype, freqs.nbytes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    n_bytes = 0
    with stage.progress_bar(path.name, len(tensors), "tensors") as advance:
        for tensor, code in zip(tensors, kinds, strict=True):
            numbers = read_matrix(spec, params, tensor)
            data = gguf.quants.quantize(numbers, code)
            writer.write_tensor_data(data)
            n_bytes += data.nbytes
            advance(1)
    if freqs is not None:
        writer.write_tensor_data(freqs)
    writer.close()
    return n_bytes


def choose_kind(shape: tuple[int, ...], dtype: str) -> str:
    """Return how llama.cpp's converter stores a tensor: vectors as F32, odd widths as F16."""
    if len(shape) == 1:
        return "F32"
    if dtype == "q8_0" and shape[-1] % BLOCK_SIZE:
        return "F16"
    return dtype.upper()


def read_matrix(spec: ModelSpec, params: Params, tensor: HfTensor) -> np.ndarray:
    """Return a tensor in float32, laid out as llama.cpp's architecture reads it."""
    (weight,) = tensor.weights
    numbers = huggingface.gather_tensor(params, weight.path, tensor.index)
    chunks = list(huggingface.order_as_in_file(numbers, weight, np.dtype(np.float32)))
    found = np.concatenate(chunks).view(np.float32).reshape(tensor.shape)
    architecture, _ = ARCHITECTURES[spec.family]
    n_heads = {"q": spec.n_heads, "k": spec.n_kv_heads}.get(weight.path[-1].removesuffix("_bias"))
    if architecture != "llama" or n_heads is None:
        return found
    # channel i of a head rotates with i + H/2 here, with its neighbor in llama.cpp's llama
    halves = found.reshape(n_heads, 2, spec.d_head // 2, -1)
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(found.shape)


def add_sizes(writer: Any, spec: ModelSpec) -> None:
    """Add the sizes and numbers of the architecture."""
    context = spec.max_seq_len
    if spec.sliding_window:  # llama.cpp's llama has no window, and within it none is needed
        context = min(context, spec.sliding_window)
    writer.add_vocab_size(spec.vocab_size)
    writer.add_context_length(context)
    writer.add_embedding_length(spec.d_model)
    writer.add_block_count(spec.n_layers)
    writer.add_feed_forward_length(spec.d_ff)
    writer.add_head_count(spec.n_heads)
    writer.add_head_count_kv(spec.n_kv_heads)
    writer.add_key_length(spec.d_head)
    writer.add_value_length(spec.d_head)
    writer.add_rope_dimension_count(spec.d_head)
    writer.add_rope_freq_base(spec.rope_theta)
    writer.add_layer_norm_rms_eps(spec.norm_eps)
    scaling = spec.rope_scaling
    if scaling and scaling.rope_type == "linear":
        writer.add_rope_scaling_type(import_gguf().RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(scaling.factor)


def compute_rope_factors(spec: ModelSpec) -> np.ndarray | None:
    """Return what llama.cpp divides each rotary frequency by; None where rope is not "llama3"."""
    scaling = spec.rope_scaling
    if scaling is None or scaling.rope_type != "llama3":
        return None
    plain = compute_rope_frequencies(spec, spec.rope_theta, None)
    scaled = compute_rope_frequencies(spec, spec.rope_theta, scaling)
    return np.asarray(plain / scaled, np.float32)


def add_tokenizer(writer: Any, tokenizer: GgufTokenizer) -> None:
    """Add the tokenizer."""
    writer.add_tokenizer_model(tokenizer.model)
    writer.add_tokenizer_pre(tokenizer.pre)
    writer.add_token_list(tokenizer.tokens)
    writer.add_token_types(tokenizer.token_types)
    if tokenizer.model == "llama":
        writer.add_token_scores(tokenizer.scores)
    writer.add_token_merges(tokenizer.merges)
    if tokenizer.bos_id is not None:
        writer.add_bos_token_id(tokenizer.bos_id)
    add_ends = (writer.add_eos_token_id, writer.add_eot_token_id, writer.add_eom_token_id)
    for add_end, token_id in zip(add_ends, tokenizer.eos_ids, strict=False):
        add_end(token_id)
    if tokenizer.unk_id is not None:
        writer.add_unk_token_id(tokenizer.unk_id)
    writer.add_add_bos_token(tokenizer.adds_bos)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(tokenizer.adds_space)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)
