"""Bits per byte of the right answers of a benchmark, from what the harness logged of each item.

Accuracy counts only whether the right answer is the likeliest; at small size it moves by chance.
How well the model predicts the right answer falls steadily.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxpt.evaluate.likelihood import estimate_ratio_error

METRIC = "answer_bits_per_byte"

Sample = dict[str, Any]  # what the harness logged of an item


def measure_answers(samples: Sequence[Sample]) -> dict[str, float]:
    """Return METRIC and its standard error under the harness's names; {} if no item has an answer.

    Sums of bits and bytes are divided once, so the error is that of a ratio.
    """
    bits, n_bytes = [], []
    for sample in samples:
        answer = find_right_answer(sample)
        if answer is None:
            return {}
        _, continuation = sample["arguments"][answer]
        log_likelihood = get_log_likelihoods(sample)[answer]
        bits.append(-log_likelihood / math.log(2))
        n_bytes.append(len(continuation.encode()))
    if not sum(n_bytes):
        return {}
    found = {f"{METRIC},none": sum(bits) / sum(n_bytes)}
    stderr = estimate_ratio_error(np.asarray(bits), np.asarray(n_bytes))
    if stderr is not None:
        found[f"{METRIC}_stderr,none"] = stderr
    return found


def find_right_answer(sample: Sample) -> int | None:
    """Return which of an item's requests is the right answer; None if it has none to score."""
    requests, target = sample["arguments"], sample["target"]
    n = len(requests)
    if not all(is_continuation(request) for request in requests):
        return None  # text is generated, or scored as a whole
    if n == 1:
        return 0
    contexts = {context for context, _ in requests}
    if len(contexts) > 1:
        # the choices are contexts and the target is what follows them (winogrande): of two, the
        # likelier is right if the harness says so
        if n != 2 or "acc" not in sample:
            return None
        likelier = int(np.argmax(get_log_likelihoods(sample)))
        return likelier if sample["acc"] else 1 - likelier
    if isinstance(target, list) and target:
        target = target[0]
    if isinstance(target, str):
        answers = [continuation.strip() for _, continuation in requests]
        if target.strip() in answers:
            return answers.index(target.strip())
        target = int(target) if target.isdecimal() else None
    return target if isinstance(target, int) and 0 <= target < n else None


def is_continuation(request: Any) -> bool:
    """Return whether a request is a context and a text whose likelihood is asked for."""
    return len(request) == 2 and all(isinstance(part, str) for part in request)


def get_log_likelihoods(sample: Sample) -> list[float]:
    """Return the log-likelihood of each request of an item, in nats."""
    return [answers[0][0] for answers in sample["resps"]]
