"""Compute reference values with torch and transformers: bits per byte, harness model, logits, KL.

This is the only file of jaxpt that runs transformers' models. All of it computes in float32 on the
CPU.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
import pathlib
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxpt import io, stage
from jaxpt.data import tokenizer
from jaxpt.evaluate import likelihood
from jaxpt.spec import UserError
from jaxpt.weights import huggingface

if TYPE_CHECKING:
    from lm_eval.api.model import LM

log = logging.getLogger(__name__)

N_FLOAT64_TOKENS = 64  # tokens whose logits are copied to float64 at a time


def load_reference_model(hf_dir: pathlib.Path) -> Any:
    """Load a Hugging Face directory with transformers, in float32 and in evaluation mode.

    Raises:
        UserError: torch is not installed, or the directory cannot be opened.
    """
    require_torch("torch", "transformers")
    import transformers

    quiet_transformers()
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            str(hf_dir), dtype="float32", local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # by what is wrong, of any type
        raise UserError(
            f"{hf_dir}: transformers cannot open it ({describe_error(error)}). Expected a "
            "directory that jaxpt export_hf wrote."
        ) from None
    return model.eval()


def open_hf_tokenizer(directory: pathlib.Path) -> Any:
    """Return transformers' tokenizer of a directory, with the ids of ours.

    That is AutoTokenizer's, without the code of an auto_map. Where it gives other ids, as by an
    add_bos_token that it does not read, ours is saved and opened.

    Raises:
        UserError: transformers cannot open it.
    """
    import transformers

    quiet_transformers()
    encoder = tokenizer.load_tokenizer(directory)
    with io.temporary_directory() as copied:
        if (directory / "config.json").is_file():
            io.copy_file(directory / "config.json", copied / "config.json")
        huggingface.copy_tokenizer(directory, copied)
        try:
            found = transformers.AutoTokenizer.from_pretrained(
                str(copied), local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # by what is wrong, of any type
            raise UserError(
                f"{directory}: transformers cannot open its tokenizer ({describe_error(error)}). "
                "Get the files again from where they came."
            ) from None
        ids = [found(text).input_ids for text in tokenizer.PROBE_TEXTS]
        if ids == encoder.encode_probe_texts():
            return found
        log.warning(
            f"{directory}: transformers' {type(found).__name__} encodes texts otherwise than "
            "tokenizer.json says. The latter is used."
        )
        encoder.save_tokenizer(copied)
        return transformers.PreTrainedTokenizerFast.from_pretrained(
            str(copied), local_files_only=True
        )


def describe_error(error: Exception) -> str:
    """Return the first line of an error's text, or its type."""
    lines = str(error).splitlines() or [type(error).__name__]
    return lines[0]


def quiet_transformers() -> None:
    """Keep transformers' warnings, which print names of a directory's files as they are, back."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def require_torch(*packages: str) -> None:
    """Raise UserError for packages that only evaluation needs and that are not installed."""
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise UserError(
            f"evaluate: {' and '.join(missing)} not installed. "
            "Run: pip install -r requirements-eval.txt"
        )


def measure_reference_bits_per_byte(
    hf_dir: pathlib.Path, texts: list[str], token_ids: list[list[int]], bos_id: int, max_length: int
) -> likelihood.BitsPerByte:
    """Measure what `likelihood.measure_bits_per_byte` does, window by window.

    Args:
        hf_dir: a Hugging Face directory.
        texts: the documents.
        token_ids: of each text, without beginning- or end-of-sequence tokens.
        bos_id: the token in front of each text.
        max_length: tokens that the model sees at once.
    """
    model = load_reference_model(hf_dir)
    import torch

    windows, owners = likelihood.split_all(token_ids, bos_id, max_length)
    scores = []
    progress = stage.track_progress(
        windows, "bits per byte by transformers", len(windows), "windows"
    )
    with torch.no_grad():
        for context, predicted in progress:
            ids = torch.tensor([context + predicted])
            n = len(predicted)
            logits = model(ids[:, :-1]).logits[0, -n:]
            log_probs = torch.log_softmax(logits, dim=-1)
            targets = ids[0, -n:, None]
            log_likelihoods = log_probs.gather(1, targets)
            scores.append(log_likelihoods.sum(dtype=torch.float64).item())
    return likelihood.sum_over_texts(texts, token_ids, owners, scores)


def make_reference_harness_model(hf_dir: pathlib.Path, max_length: int) -> LM:
    """Return lm-evaluation-harness's own HFLM of a Hugging Face directory."""
    require_torch("torch", "transformers", "lm_eval", "accelerate")
    from lm_eval.models.huggingface import HFLM

    class LocalModel(HFLM):
        """HFLM of a directory."""

        def get_model_info(self) -> dict[str, Any]:
            """Return nothing: HFLM looks the directory's name up on the hub."""
            return {}

    # its constructor is registered by a decorator whose type hides the arguments
    make_model: Any = LocalModel
    return make_model(
        pretrained=str(hf_dir),
        tokenizer=open_hf_tokenizer(hf_dir),
        device="cpu",
        dtype="float32",
        max_length=max_length,
        batch_size=8,
        trust_remote_code=False,
    )


def compute_reference_logits(hf_dir: pathlib.Path, tokens: np.ndarray) -> np.ndarray:
    """Return the logits of tokens int [B, T], float32 [B, T, V]."""
    model = load_reference_model(hf_dir)
    import torch

    token_ids = torch.from_numpy(np.asarray(tokens, np.int64))
    with torch.no_grad():
        return model(token_ids).logits.numpy()


@dataclasses.dataclass(frozen=True)
class LogitDistance:
    """How far two models' logits at the same tokens are apart.

    Attributes:
        kl: mean KL(theirs || ours), nats per token.
        max_abs_diff: largest |difference| of two logits.
    """

    kl: float
    max_abs_diff: float


def measure_logit_distance(
    hf_dir: pathlib.Path, tokens: np.ndarray, our_logits: np.ndarray
) -> LogitDistance:
    """Compare logits [B, T, V] with those of transformers at the same tokens [B, T]."""
    vocab_size = our_logits.shape[-1]
    ours = our_logits.reshape(-1, vocab_size)
    theirs = compute_reference_logits(hf_dir, tokens).reshape(-1, vocab_size)
    kl_sum, max_abs_diff = 0.0, 0.0
    for start in range(0, len(ours), N_FLOAT64_TOKENS):
        block = slice(start, start + N_FLOAT64_TOKENS)
        q = ours[block].astype(np.float64)
        p = theirs[block].astype(np.float64)
        diff = float(np.abs(q - p).max())
        max_abs_diff = max(max_abs_diff, diff)
        log_q = log_softmax_numpy(q)
        log_p = log_softmax_numpy(p)
        kl = np.exp(log_p) * (log_p - log_q)
        kl_sum += float(kl.sum())
    return LogitDistance(kl_sum / len(ours), max_abs_diff)


def log_softmax_numpy(x: np.ndarray) -> np.ndarray:
    """Return log-softmax over the last axis, in the dtype of x."""
    shifted = x - x.max(axis=-1, keepdims=True)
    z = np.exp(shifted).sum(axis=-1, keepdims=True)
    return shifted - np.log(z)
