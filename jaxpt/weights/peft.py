"""Read and write LoRA adapters as PEFT stores them: adapter_config.json, adapter_model.safetensors.

Both directions go by the tensors of the base's files, so that every family works, those with fused
tensors included.
"""

from __future__ import annotations

import pathlib
import re
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxpt import io
from jaxpt.model.lora import adapter_names, can_adapt
from jaxpt.model.transformer import Params
from jaxpt.spec import LoraSpec, ModelSpec, UserError
from jaxpt.weights import checkpoint, hub, huggingface
from jaxpt.weights.huggingface import HfTensor, StoredTensors
from jaxpt.weights.safetensors_file import (
    AdaptedTensor,
    StoredTensor,
    dtype_of_name,
    open_safetensors_file,
    read_hf_json,
    write_hf_json,
    write_safetensors,
)

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # of PEFT's names, before the base's
A_SUFFIX, B_SUFFIX = ".lora_A.weight", ".lora_B.weight"
# keys of adapter_config.json: read here, of no meaning once the tensors are there, and those of
# which some values are plain LoRA. Any other must be empty: it changes the function
READ_KEYS = {"r", "lora_alpha", "use_rslora", "target_modules", "base_model_name_or_path"}
READ_KEYS |= {"revision"}
HARMLESS_KEYS = {"task_type", "auto_mapping", "peft_version", "inference_mode", "lora_dropout"}
HARMLESS_KEYS |= {"exclude_modules", "layers_to_transform", "layers_pattern", "megatron_core"}
HARMLESS_KEYS |= {"runtime_config", "qalora_group_size", "eva_config"}
PLAIN_VALUES: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    # others, such as pissa and loftq, change the base as they initialize
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),
}
MAX_SHOWN = 8


def is_adapter(directory: io.Path) -> bool:
    """Return whether a directory holds a LoRA adapter."""
    return io.size(directory / CONFIG) is not None


# ---- read


class Adapter(NamedTuple):
    """A LoRA adapter on a disk.

    Attributes:
        directory: of its files.
        rank: of every pair of matrices.
        scale: of their product.
        targets: names that modules of the base end in; empty where they are given as a pattern.
    """

    directory: pathlib.Path
    rank: int
    scale: float
    targets: tuple[str, ...]

    def adapt(self, spec: ModelSpec, stored: StoredTensors) -> StoredTensors:
        """Return the base's tensors with the adapter added. Use as `load_hf_model`'s `adapt`.

        Raises:
            UserError: listing what does not fit the base.
        """
        file = self.directory / TENSORS
        pairs, wrong = pair_tensors(open_safetensors_file(file))
        known = {tensor.name: tensor for tensor in huggingface.list_hf_tensors(spec)}
        for name, pair in pairs.items():
            wrong += self.find_mismatch(name, pair, known.get(name))
        wrong += self.find_missing(pairs.keys(), known)
        if wrong:
            shown = "; ".join(wrong[:MAX_SHOWN])
            n_more = len(wrong) - MAX_SHOWN
            more = f"; and {n_more} more" if n_more > 0 else ""
            raise UserError(
                f"{file}: does not fit its base: {shown}{more}. Is that the base it was trained on?"
                " Else merge it with PEFT (merge_and_unload, then save_pretrained)."
            )
        adapted = dict(stored)
        for name, (a, b) in pairs.items():
            base = stored[name]
            assert isinstance(base, StoredTensor)
            low = a.map_numbers().astype(np.float32)
            high = self.scale * b.map_numbers().astype(np.float32)
            adapted[name] = AdaptedTensor(base, low, high)
        return adapted

    def find_mismatch(
        self, name: str, pair: list[StoredTensor | None], target: HfTensor | None
    ) -> list[str]:
        """Return why a pair of matrices cannot be added to a tensor of the base."""
        module = name.removesuffix(".weight")
        if target is None:
            return [f"{module}: the base has no such matrix"]
        if not all(map(is_mergeable, target.weights)):
            return [f"{module}: expected matrices of attention, dense MLP or lm_head"]
        if None in pair:
            return [f"{module}: has one of lora_A and lora_B"]
        n_out, n_in = target.shape
        expected = [(self.rank, n_in), (n_out, self.rank)]
        got = [matrix.shape for matrix in pair if matrix]
        if got != expected:
            return [f"{module}: expected lora_A and lora_B of shapes {expected}, got {got}"]
        return []

    def find_missing(self, names: Any, known: dict[str, HfTensor]) -> list[str]:
        """Return target modules of the base of which the file has no matrices."""
        missing = []
        for target in self.targets:
            ending = f".{target}.weight"
            modules = [name for name in known if f".{name}".endswith(ending)]
            if not modules:
                missing.append(f"target_modules: {target}: the base has no such matrix")
            missing += [
                f"{name}: is a target without lora_A" for name in modules if name not in names
            ]
        return missing


def is_mergeable(weight: huggingface.HfWeight) -> bool:
    """Return whether an adapter can be merged into a parameter."""
    return can_adapt(weight.param) or weight.path == ("unembed",)


def pair_tensors(
    stored: dict[str, StoredTensor],
) -> tuple[dict[str, list[Any]], list[str]]:
    """Return (tensor of the base -> [A, B], what is no part of such a pair)."""
    pairs: dict[str, list[Any]] = {}
    wrong = []
    for name, tensor in stored.items():
        module = name.removeprefix(PREFIX)
        for i, suffix in enumerate((A_SUFFIX, B_SUFFIX)):
            if name.startswith(PREFIX) and name.endswith(suffix):
                pair = pairs.setdefault(f"{module.removesuffix(suffix)}.weight", [None, None])
                pair[i] = tensor
                break
        else:
            wrong.append(f"{name}: is no lora_A or lora_B of a linear layer")
    return pairs, wrong


def read_adapter(directory: pathlib.Path) -> Adapter:
    """Return the adapter of a directory.

    Raises:
        UserError: it is more than LoRA on linear layers, naming the key and its value.
    """
    path = directory / CONFIG
    config = read_hf_json(path)
    check_is_plain(path, config)
    if io.size(directory / TENSORS) is None:
        raise UserError(
            f"{directory / TENSORS}: not found. Adapters are read from safetensors only, since "
            "pickled ones (.bin) can run code; save it again with PEFT's save_pretrained."
        )
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float):
        raise UserError(
            f"{path}: expected a rank r of at least 1 and a number lora_alpha, got {rank!r} and "
            f"{alpha!r}. Download it again."
        )
    scale = alpha / (rank**0.5 if config.get("use_rslora") else rank)
    targets = config.get("target_modules")
    is_everywhere = not config.get("layers_to_transform") and not config.get("exclude_modules")
    if not isinstance(targets, list) or not is_everywhere:
        targets = ()
    return Adapter(directory, rank, scale, tuple(targets))


def check_is_plain(path: pathlib.Path, config: dict[str, Any]) -> None:
    """Raise UserError for a key and value that make an adapter more than LoRA's A and B."""
    for key, value in config.items():
        if key in READ_KEYS | HARMLESS_KEYS:
            continue
        if key in PLAIN_VALUES:
            expected = " or ".join(map(repr, PLAIN_VALUES[key]))
            is_plain = value in PLAIN_VALUES[key]
        else:
            expected = "nothing (it changes what the adapter computes)"
            is_plain = value in (None, False, "", [], {})
        if not is_plain:
            raise UserError(
                f"{path}: {key}: expected {expected}, got {value!r:.80}. Merge the adapter into "
                "its base with PEFT (merge_and_unload, then save_pretrained)."
            )


def find_base(directory: io.Path, base: str = "") -> io.Path:
    """Return the directory of an adapter's base.

    Args:
        directory: of the adapter.
        base: a Hugging Face directory or hf:NAME; empty: as adapter_config.json says.

    Raises:
        UserError: there is no such model, or it is not one of Hugging Face.
    """
    if huggingface.is_hf_directory(directory):
        raise UserError(
            f"{directory}: holds a whole model and a LoRA adapter ({CONFIG}). Remove {CONFIG} if "
            "the adapter is merged already, else keep the adapter in a directory of its own."
        )
    config = read_hf_json(io.local_copy(directory / CONFIG))
    name = base or config.get("base_model_name_or_path")
    found = None
    if isinstance(name, str) and name.startswith("hf:"):
        found = hub.download_model(name)
    elif isinstance(name, str) and name and io.exists(io.path(name)):
        found = io.path(name)
    elif isinstance(name, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        revision = config.get("revision")
        found = hub.download_model(f"hf:{name}@{revision}" if revision else f"hf:{name}")
    if found is None:
        raise UserError(
            f"{directory}: the base of this LoRA adapter, {name!r}, is not here. Name it: "
            "--config.initialize.base=DIR or hf:NAME."
        )
    if is_adapter(found) or checkpoint.find_checkpoint(found):
        raise UserError(
            f"{found}: expected the base of {directory}, a Hugging Face model, got a run or an "
            "adapter. Export it with jaxpt export_hf, and name the export."
        )
    return found


# ---- write


def write_adapter(
    spec: ModelSpec,
    params: Params,
    directory: pathlib.Path,
    base_name: str,
    *,
    dtype: str | None = None,
    card: str = "",
) -> int:
    """Write a run's adapters as PEFT's files, with README.md.

    Every process calls this; the first one writes.

    Args:
        spec: the architecture, with its adapters.
        params: base and adapters.
        directory: to write to.
        base_name: what PEFT is to open as the base: a directory or a name of the hub.
        dtype: of the stored weights; None: float32.
        card: the text of README.md.

    Returns:
        Bytes of weights.
    """
    lora = spec.lora
    assert lora
    base = spec.replace(lora=None)
    targets = [tensor for tensor in huggingface.list_hf_tensors(base) if is_target(tensor, lora)]
    # PEFT has one rank: a tensor of q, k and v holds their adapters side by side, others are padded
    n_parts = max(len(tensor.weights) for tensor in targets)
    np_dtype = dtype_of_name(dtype or "float32")
    tensors: dict[str, np.ndarray] = {}
    for tensor in targets:
        a, b = join_parts(tensor, lora, params, n_parts)
        module = PREFIX + tensor.name.removesuffix(".weight")
        tensors[module + A_SUFFIX] = a.astype(np_dtype)
        tensors[module + B_SUFFIX] = b.astype(np_dtype)
    n_bytes = sum(array.nbytes for array in tensors.values())
    if jax.process_index():
        return n_bytes
    write_safetensors(directory / TENSORS, tensors)
    modules = {tensor.name.removesuffix(".weight").rpartition(".")[2] for tensor in targets}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": n_parts * lora.rank,
        "lora_alpha": n_parts * lora.alpha,
        "target_modules": sorted(modules),
        "bias": "none",
        "lora_dropout": 0.0,
        "inference_mode": True,
    }
    write_hf_json(directory / CONFIG, config)
    if card:
        io.write_text(directory / "README.md", card)
    return n_bytes


def is_target(tensor: HfTensor, lora: LoraSpec) -> bool:
    """Return whether a tensor holds a matrix that has an adapter."""
    return any(is_adapted(weight, lora) for weight in tensor.weights)


def is_adapted(weight: huggingface.HfWeight, lora: LoraSpec) -> bool:
    """Return whether a parameter is a matrix that has an adapter."""
    return weight.path[0] == "blocks" and weight.path[-1] in lora.targets


def join_parts(
    tensor: HfTensor, lora: LoraSpec, params: Params, n_parts: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return A [n_parts x rank, in] and B [out, n_parts x rank] of a tensor of the base.

    The adapter of each parameter in it has ranks of its own, so that the product is block-wise.
    """
    n_out, n_in = tensor.shape
    joined_a = np.zeros((n_parts * lora.rank, n_in), np.float32)
    joined_b = np.zeros((n_out, n_parts * lora.rank), np.float32)
    for i, weight in enumerate(tensor.weights):
        if not is_adapted(weight, lora):
            continue
        *_, target = weight.path
        a, b = (
            huggingface.gather_tensor(params, ("blocks", name), tensor.index)
            for name in adapter_names(target)
        )
        first_rank = i * lora.rank
        ranks = slice(first_rank, first_rank + lora.rank)
        n_rows, _ = weight.hf_shape
        rows = slice(weight.first_row, weight.first_row + n_rows)
        joined_a[ranks] = a.reshape(n_in, lora.rank).T
        joined_b[rows, ranks] = b.reshape(lora.rank, n_rows).T
    return joined_a, joined_b
