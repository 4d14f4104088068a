"""What the first documents of each source become, rule by rule: a look before the whole is run."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence

from jaxpt import config, stage
from jaxpt.data import filters, sources
from jaxpt.data.prepare import judge
from jaxpt.data.prepare.corpus import check_section
from jaxpt.spec import UserError

SHOWN_CHARS = 200  # of a text before and after the rules


def preview_corpus(section: config.PrepareConfig, n: int) -> Iterator[str]:
    """Yield the lines of a preview of n documents of each source. Nothing is written.

    Raises:
        UserError: a source, rule or record cannot be used.
    """
    if n < 1:
        raise UserError(f"--preview: expected at least 1 document of each source, got {n}.")
    check_section(section)
    rules, _ = judge.open_rules(json.dumps(stage.to_jsonable(section)))
    for source in sources.parse_sources(section.sources):
        yield f"{source.name} ({source.kind}:{source.pattern})"
        skipped: list[str] = []
        found = source.pin().iterate_documents(
            lambda reason, message, skipped=skipped: skipped.append(message), section.on_error
        )
        documents = list(itertools.islice(found, n))
        results = filters.apply_rules(documents, rules)
        for i, document in enumerate(documents):
            yield from describe_document(document, i, results, rules)
        for message in skipped[:n]:
            yield f"  skipped: {message}"
        yield ""
    compared = [rule.name for rule in rules if rule.mark]
    if compared:
        yield f"Not shown: {', '.join(compared)}, which compare with the whole corpus."


def describe_document(
    document: sources.Document,
    i: int,
    results: filters.RuleResults,
    rules: Sequence[filters.Rule],
) -> Iterator[str]:
    """Yield what a document is, each rule that changed or dropped it, and what it becomes.

    Args:
        document: as it was read.
        i: its place among those of the results.
        results: what the rules did to each by itself.
        rules: in order.
    """
    yield f"  {document.id}: {len(document.text):,} characters"
    yield f"    {shorten(document.text)}"
    for k, rule in enumerate(rules):
        edit = results.edits[k][i] if rule.edit else None
        if edit and edit[0]:
            n_edits, n_chars, _ = edit
            yield f"    {rule.name}: {n_edits:,} edits, {n_chars:,} characters left"
        if results.failed_rule[i] == k:
            yield f"    {rule.name}: dropped: {results.reasons[i]}"
            return
    after = results.documents[i].text
    if after == document.text:
        yield "    kept as it is"
    else:
        yield f"    kept: {shorten(after)}"


def shorten(text: str) -> str:
    """Return the beginning of a text on one line, with line ends and the like escaped."""
    quoted = repr(text[:SHOWN_CHARS])
    return f"{quoted}..." if len(text) > SHOWN_CHARS else quoted
