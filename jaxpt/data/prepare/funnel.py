"""The funnel: what was read, what each rule left and edited, and what each split has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxpt.data import filters
from jaxpt.data import tokenizer as tokenizers
from jaxpt.data.prepare.decide import SPLITS, Drops, is_kept
from jaxpt.data.prepare.judge import EDIT_FIELDS, PARAGRAPHS
from jaxpt.data.prepare.rows import DocumentTable, iterate_batches_of_file
from jaxpt.text import format_table

TOKEN_BYTES = 4  # bytes per token, about
N_COLUMNS = 4  # of the printed funnel: more would not fit a terminal's width

Funnel = dict[str, Any]


def build_funnel(
    table: DocumentTable,
    rules: Sequence[filters.Rule],
    drops: Drops,
    token_bytes: dict[str, float],
) -> Funnel:
    """Return what was read, what each rule left and edited, and what each split has, per source."""
    names = table.names
    n_rules = len(rules)
    left = [make_amounts(names) for _ in ("read", *rules)]
    edits = [dict.fromkeys(names, 0) for _ in rules]
    splits = {split: make_amounts(names) for split in SPLITS}
    columns = ["chars", "bytes", "split"]
    for k, rule in enumerate(rules):
        if rule.edit:
            columns += [f"{k}.{name}" for name in EDIT_FIELDS]
    for rows, source, *values in table.iterate_files(*columns):
        after = dict(zip(columns, values, strict=True))
        name = names[source]
        dropped_by = drops.dropped_by[rows]
        chars = after["chars"]
        size = after["bytes"]
        left[0][name] += sum_amounts(dropped_by >= 0, chars, size)
        for k, rule in enumerate(rules):
            mask = dropped_by > k
            n_edits = None
            if rule.edit:
                n_edits = after[f"{k}.edits"]
                chars = after[f"{k}.chars"]
                size = after[f"{k}.bytes"]
            elif rule.name == PARAGRAPHS and drops.repeated:
                repeated_chars = drops.repeated.repeated_chars[rows]
                n_edits, cut_chars, cut_bytes = repeated_chars.T
                chars = chars - cut_chars
                size = size - cut_bytes
            if n_edits is not None:
                n_kept_edits = n_edits[mask].sum()
                edits[k][name] += int(n_kept_edits)
            left[k + 1][name] += sum_amounts(mask, chars, size)
        numbers = after["split"]
        for split, amounts in splits.items():
            mask = is_kept(dropped_by, numbers, split, n_rules, table.heldout)
            amounts[name] += sum_amounts(mask, chars, size)
    steps: list[dict[str, Any]] = []
    labels = ["read", *(rule.name for rule in rules)]
    for label, amounts in zip(labels, left, strict=True):
        kept = name_amounts(amounts, token_bytes)
        steps.append({"rule": label, "kept": kept})
    for k, rule in enumerate(rules):
        if rule.edit or rule.name == PARAGRAPHS:
            steps[k + 1]["edits"] = edits[k]
    funnel = {"sources": names, "steps": steps}
    for split in reversed(SPLITS):
        funnel[split] = name_amounts(splits[split], token_bytes)
    return funnel


def make_amounts(names: list[str]) -> dict[str, np.ndarray]:
    """Return zero documents, characters and bytes of each source."""
    return {name: np.zeros(3, np.int64) for name in names}


def sum_amounts(mask: np.ndarray, chars: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Return the documents, characters and bytes where the mask is true, [3]."""
    n_documents = mask.sum()
    n_chars = chars[mask].sum()
    n_bytes = size[mask].sum()
    return np.array([n_documents, n_chars, n_bytes], np.int64)


def name_amounts(
    amounts: dict[str, np.ndarray], token_bytes: dict[str, float]
) -> dict[str, dict[str, int]]:
    """Return the amounts of each source by name, with the estimated tokens."""
    named = {}
    for name, values in amounts.items():
        rows, chars, size = values.tolist()
        tokens = round(size / token_bytes[name])
        named[name] = {"rows": rows, "chars": chars, "bytes": size, "tokens": tokens}
    return named


def estimate_token_bytes(
    table: DocumentTable, tokenizer: tokenizers.Tokenizer | None
) -> dict[str, float]:
    """Return the bytes per token of each source.

    It is TOKEN_BYTES, or measured on a sample with the tokenizer that the config names.
    """
    token_bytes = dict.fromkeys(table.names, float(TOKEN_BYTES))
    if tokenizer is None:
        return token_bytes
    for k, name in enumerate(table.names):
        path = next(file.path for file in table.files if file.source == k)
        batch = next(iterate_batches_of_file(path))
        texts = batch.column("text").to_pylist()
        encoded = tokenizer.encode_batch(texts)
        n_tokens = sum(map(len, encoded))
        n_bytes = sum(len(text.encode()) for text in texts)
        token_bytes[name] = n_bytes / max(1, n_tokens)
    return token_bytes


def format_funnel(funnel: Funnel) -> str:
    """Return the documents and MB left after each rule as a table, one column per source.

    Of more than N_COLUMNS sources the largest have columns, and the others one together.
    """
    lines = [(step["rule"], step["kept"]) for step in funnel["steps"]]
    lines += [(split, funnel[split]) for split in SPLITS]
    columns = group_sources(funnel["sources"], funnel["steps"][0]["kept"])
    cells = [["left after", *columns]]
    for label, kept in lines:
        row = [label]
        for names in columns.values():
            n_documents = sum(kept[name]["rows"] for name in names)
            n_bytes = sum(kept[name]["bytes"] for name in names)
            row.append(f"{n_documents:,} docs {n_bytes / 1e6:8.2f} MB")
        cells.append(row)
    return format_table(cells, gap="   ", indent="  ")


def group_sources(names: list[str], read: dict[str, dict[str, int]]) -> dict[str, list[str]]:
    """Return title -> sources of each column of the funnel, given what was read of each."""
    if len(names) <= N_COLUMNS:
        return {name: [name] for name in names}
    by_size = sorted(names, key=lambda name: -read[name]["bytes"])
    largest, others = by_size[: N_COLUMNS - 1], by_size[N_COLUMNS - 1 :]
    return {name: [name] for name in largest} | {f"{len(others):,} others": others}
