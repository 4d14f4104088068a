"""Train a linear classifier of texts from two lists of documents.

It is a logistic regression over words and pairs of words, stored as a fastText model of two
dimensions: a weight, and a constant.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Iterable, Sequence

import numpy as np
import scipy.optimize
import scipy.sparse
import scipy.stats

from jaxpt.data import dedup
from jaxpt.data.classifier import END_OF_LINE, LABEL_PREFIX, Classifier, Features, split_words
from jaxpt.spec import UserError

MAX_WORDS = 20_000
N_BUCKETS = 2**18  # of pairs of words
LEAST_COUNT = 2  # of a word that has a row of its own
L2 = 1e-4
SCALE = 100.0  # of the mean of the rows: a text has some hundred words
HELDOUT_SHARE = 5  # one document of so many


@dataclasses.dataclass(frozen=True)
class Quality:
    """How well a score tells good documents from ordinary ones, at a threshold of 0.5."""

    precision: float
    recall: float
    auc: float  # 0.5: no better than chance


@dataclasses.dataclass(frozen=True)
class TrainedClassifier:
    """A classifier and its measure on documents that it was not trained on."""

    model: Classifier
    quality: Quality
    by_length: Quality  # of the best that a document's length alone can do
    n_train: int
    n_heldout: int


def train_classifier(good: Sequence[str], ordinary: Sequence[str]) -> TrainedClassifier:
    """Train a linear classifier with the labels good and ordinary.

    One document of five, by the hash of its text, is held out.

    Raises:
        UserError: either list has too few documents.
    """
    texts = [*good, *ordinary]
    is_good = np.arange(len(texts)) < len(good)
    numbers = [dedup.hash_text(text.encode())[0] for text in texts]
    heldout = np.array(numbers) % HELDOUT_SHARE == 0
    for name, of_list in (("good", is_good), ("ordinary", ~is_good)):
        n_least = min(np.sum(of_list & heldout), np.sum(of_list & ~heldout))
        if n_least < 2:
            raise UserError(
                f"train_quality: {name}: expected some ten different documents at least, got "
                f"{np.sum(of_list)}. Give more."
            )
    trained = [text for text, held in zip(texts, heldout, strict=True) if not held]
    features = Features(choose_words(trained), N_BUCKETS, word_ngrams=2)
    means = build_matrix(texts, features)
    weights, bias = fit_logistic(means[~heldout], is_good[~heldout])
    rows = np.stack([weights, np.ones_like(weights)], 1)
    length = np.log1p([[len(text)] for text in texts])
    length = (length - length.mean()) / max(length.std(), 1e-9)
    length = scipy.sparse.csr_matrix(np.hstack([length, length**2]) / SCALE)
    length_weights, length_bias = fit_logistic(length[~heldout], is_good[~heldout])
    return TrainedClassifier(
        model=Classifier(features, rows, ["good", "ordinary"], np.array([[1, bias], [0, 0]])),
        quality=measure_quality(means[heldout] @ weights + bias, is_good[heldout]),
        by_length=measure_quality(length[heldout] @ length_weights + length_bias, is_good[heldout]),
        n_train=int(np.sum(~heldout)),
        n_heldout=int(np.sum(heldout)),
    )


def choose_words(texts: Iterable[str]) -> dict[str, int]:
    """Return word -> row of the words in most texts."""
    counts = collections.Counter()
    for text in texts:
        counts.update(set(split_words(text)))
    frequent = [word for word, n in counts.most_common(MAX_WORDS) if n >= LEAST_COUNT]
    usable = [word for word in frequent if not word.startswith(LABEL_PREFIX)]
    names = [END_OF_LINE, *(word for word in usable if word != END_OF_LINE)]
    return {word: row for row, word in enumerate(names)}


def build_matrix(texts: Sequence[str], features: Features) -> scipy.sparse.csr_matrix:
    """Return the mean of each text's features, [texts, rows]."""
    rows = [features.list_rows(text) for text in texts]
    lengths = np.array(list(map(len, rows)))
    columns = np.fromiter(itertools.chain.from_iterable(rows), np.int64)
    values = np.repeat(1 / lengths, lengths)
    ends = np.cumsum([0, *lengths.tolist()])
    shape = (len(texts), len(features.words) + features.n_buckets)
    matrix = scipy.sparse.csr_matrix((values, columns, ends), shape)
    matrix.sum_duplicates()
    return matrix


def fit_logistic(means: scipy.sparse.csr_matrix, is_good: np.ndarray) -> tuple[np.ndarray, float]:
    """Return the weights and bias of a regularized logistic regression."""
    scaled = means * SCALE
    signs = np.where(is_good, 1.0, -1.0)

    def loss_and_gradient(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        weights, bias = parameters[:-1], parameters[-1]
        margins = signs * (scaled @ weights + bias)
        loss = np.logaddexp(0, -margins).mean() + L2 / 2 * weights @ weights
        slopes = -signs / (1 + np.exp(np.clip(margins, -500, 500))) / len(signs)
        return loss, np.append(scaled.T @ slopes + L2 * weights, slopes.sum())

    n_weights = len(means.sum(0).T)
    start = np.zeros(n_weights + 1)
    found = scipy.optimize.minimize(loss_and_gradient, start, jac=True, method="L-BFGS-B")
    return found.x[:-1] * SCALE, float(found.x[-1])


def measure_quality(logits: np.ndarray, is_good: np.ndarray) -> Quality:
    """Return precision and recall of what has a logit above 0, and the area under the ROC curve."""
    is_chosen = logits > 0
    n_right = np.sum(is_chosen & is_good)
    n_good = np.sum(is_good)
    n_ordinary = len(is_good) - n_good
    ranks = scipy.stats.rankdata(logits)
    n_ordered = ranks[is_good].sum() - n_good * (n_good + 1) / 2
    return Quality(
        precision=float(n_right / max(np.sum(is_chosen), 1)),
        recall=float(n_right / n_good),
        auc=float(n_ordered / (n_good * n_ordinary)),
    )
