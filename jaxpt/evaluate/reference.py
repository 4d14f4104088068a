"""The same measurements by torch and transformers, the judge of ours.

Bits per byte, the harness's own model, logits, KL.

The only file of jaxpt that runs transformers' models. Everything here computes in float32 on the
CPU.
"""

from __future__ import annotations

import pathlib
from typing import NamedTuple

import numpy as np

from jaxpt import stage
from jaxpt.evaluate.likelihood import BitsPerByte, split_rolling_windows
from jaxpt.spec import UserError


def load_reference_model(hf_dir: pathlib.Path):
    """The directory's model, in float32, ready to be read.

    Raises UserError when torch is not installed or the directory cannot be opened.
    """
    require_torch("torch", "transformers")
    import transformers

    transformers.utils.logging.disable_progress_bar()
    try:
        return transformers.AutoModelForCausalLM.from_pretrained(
            str(hf_dir), dtype="float32", local_files_only=True
        ).eval()
    except (OSError, ValueError) as error:
        raise UserError(
            f"{hf_dir}: transformers cannot open it "
            f"({str(error).splitlines()[0]}). Expected a directory that "
            "export_hf.py wrote."
        ) from None


def require_torch(*packages: str) -> None:
    """Raises UserError for a package that only evaluation needs and that is not installed."""
    import importlib.util

    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise UserError(
            f"evaluate: {' and '.join(missing)} not installed. Run: pip "
            "install -r requirements-eval.txt"
        )


def measure_reference_bits_per_byte(
    hf_dir: pathlib.Path, texts: list[str], token_ids: list[list[int]], bos_id: int, max_length: int
) -> BitsPerByte:
    """What likelihood.bits_per_byte measures, over the same windows, one at a time."""
    import torch

    judge = load_reference_model(hf_dir)
    windows = [
        window for ids in token_ids for window in split_rolling_windows(ids, bos_id, max_length)
    ]
    nats_sum = 0.0
    with torch.no_grad():
        for context, predicted in stage.track_progress(
            windows, "bits per byte by transformers", len(windows), "windows"
        ):
            ids = torch.tensor([context + predicted])
            log_shares = torch.log_softmax(judge(ids[:, :-1]).logits[0, -len(predicted) :], dim=-1)
            nats_sum -= (
                log_shares.gather(1, ids[0, -len(predicted) :, None])
                .sum(dtype=torch.float64)
                .item()
            )
    return BitsPerByte(
        nats_sum, sum(len(text.encode()) for text in texts), sum(map(len, token_ids))
    )


def make_reference_harness_model(hf_dir: pathlib.Path, max_length: int):
    """lm-evaluation-harness's own HFLM."""
    require_torch("torch", "transformers", "lm_eval", "accelerate")
    from lm_eval.models.huggingface import HFLM

    return HFLM(
        pretrained=str(hf_dir), device="cpu", dtype="float32", max_length=max_length, batch_size=8
    )


def compute_reference_logits(hf_dir: pathlib.Path, tokens: np.ndarray) -> np.ndarray:
    """Tokens int [B, T] -> float32 [B, T, V]."""
    judge = load_reference_model(hf_dir)
    import torch

    with torch.no_grad():
        return judge(torch.from_numpy(np.asarray(tokens, np.int64))).logits.numpy()


class LogitDistance(NamedTuple):
    """Between two models' logits at the same tokens."""

    kl: float  # mean KL(theirs || ours) a token, in nats
    max_abs_diff: float  # |difference| of any logit


def measure_logit_distance(
    hf_dir: pathlib.Path, tokens: np.ndarray, our_logits: np.ndarray
) -> LogitDistance:
    """Of our logits [B, T, V] from transformers' at the same tokens [B, T]."""
    V, kl_sum, largest = our_logits.shape[-1], 0.0, 0.0
    ours, theirs = (
        our_logits.reshape(-1, V),
        compute_reference_logits(hf_dir, tokens).reshape(-1, V),
    )
    for start in range(0, len(ours), 64):  # tokens whose float64 copies exist at one time
        q, p = (x[start : start + 64].astype(np.float64) for x in (ours, theirs))
        largest = max(largest, float(np.abs(q - p).max()))
        q, p = log_softmax_numpy(q), log_softmax_numpy(p)
        kl_sum += float((np.exp(p) * (p - q)).sum())
    return LogitDistance(kl_sum / len(ours), largest)


def log_softmax_numpy(x: np.ndarray) -> np.ndarray:
    """Return log-softmax over the last axis, float64."""
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))
