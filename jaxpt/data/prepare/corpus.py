"""The stage `prepare`: sources -> rules -> deduplication -> train and held-out parquet shards."""

from __future__ import annotations

import dataclasses
import json
import logging
import pathlib
from typing import Any

from jaxpt import config, io, stage
from jaxpt.data import decontaminate, executor, filters, sources
from jaxpt.data import tokenizer as tokenizers
from jaxpt.data.prepare import judge, read, write
from jaxpt.data.prepare.decide import SPLITS, decide_drops
from jaxpt.data.prepare.funnel import build_funnel, estimate_token_bytes, format_funnel
from jaxpt.data.prepare.jobs import JobRunner
from jaxpt.spec import Manifest, UserError
from jaxpt.text import name_some

log = logging.getLogger(__name__)


def prepare_corpus(
    section: config.PrepareConfig,
    workdir: io.Path | str,
    replace: bool = False,
    tokenizer_source: str = "train",
    verify: bool = False,
) -> Manifest:
    """Prepare WORKDIR/corpus as the section asks, or find it finished.

    Args:
        section: sources and rules.
        workdir: the run directory.
        replace: overwrite the corpus of another config or other inputs.
        tokenizer_source: one to count tokens with; "train": there is none yet.
        verify: compare the checksums of a finished one, not only sizes.

    Raises:
        UserError: a source, rule, benchmark, executor or record cannot be used, or every document
            is dropped.
    """
    check_section(section)
    text_sources = [source.pin() for source in sources.parse_sources(section.sources)]
    section_json = json.dumps(stage.to_jsonable(section))
    rules, index = judge.open_rules(section_json)
    executor.check_executor(section.executor)
    tokenizer = None
    if tokenizer_source != "train":
        tokenizer = tokenizers.load_tokenizer(tokenizer_source)
    if index.n_short:
        log.info(
            f"prepare: {index.n_short:,} of {len(index.items):,} benchmark items have fewer than "
            f"{index.n} words: no document can be matched with them"
        )
    inputs = {}
    versions = {}
    for source in text_sources:
        source.check_published()
        versions |= source.list_versions()
        inputs |= source.fingerprint_inputs()
    for i, path in enumerate(section.decontaminate):
        inputs[f"benchmarks/{i}"] = io.path(path)
    corpus = io.path(workdir) / "corpus"
    work = CorpusWork(section, section_json, text_sources, versions, rules, index, tokenizer)
    request = work.describe_request()
    manifest = stage.run_stage(
        "prepare",
        corpus,
        work.run,
        config=request,
        inputs=inputs,
        replace=replace,
        verify=verify,
    )
    log_counts(manifest.counts, corpus)
    if section.heldout_frac:
        log_missing_heldout(manifest.counts, section.heldout_frac)
    return manifest


def check_section(section: config.PrepareConfig) -> None:
    """Raise UserError for sizes out of range."""
    if section.shard_mb < 1:
        raise UserError(f"prepare.shard_mb: expected at least 1, got {section.shard_mb}.")
    if section.max_mb < 0:
        raise UserError(f"prepare.max_mb: expected at least 0, got {section.max_mb}.")
    if section.decontaminate_ngram < 1:
        raise UserError(
            f"prepare.decontaminate_ngram: expected at least 1, got {section.decontaminate_ngram}."
        )


@dataclasses.dataclass(frozen=True)
class CorpusWork:
    """The work of one stage `prepare`."""

    section: config.PrepareConfig
    section_json: str
    sources: list[sources.TextSource]
    versions: dict[str, str]  # of their files before they are fingerprinted
    rules: list[filters.Rule]
    index: decontaminate.NgramIndex
    tokenizer: tokenizers.Tokenizer | None  # it estimates the funnel's tokens

    def describe_request(self) -> dict[str, Any]:
        """Return the settings that the corpus depends on."""
        request = stage.to_jsonable(self.section)
        del request["executor"]  # it decides where the work is done, not what comes out
        request["rules"] = [rule.help for rule in self.rules]
        if self.tokenizer:
            request["tokenizer"] = self.tokenizer.fingerprint
        request["installed"] = {}
        for source in self.sources:
            versions = source.describe_installation()
            if versions:
                request["installed"][source.name] = versions
        return request

    def run(self, partial: pathlib.Path) -> dict[str, Any]:
        """Write the corpus and return the counts of the manifest."""
        partial = partial.resolve()
        state_dir = partial / ".work"
        runner = JobRunner(self.section.executor, state_dir)
        files, unread = read.read_sources(runner, self.sources, self.versions, self.section)
        names = [source.name for source in self.sources]
        table = judge.judge_documents(runner, files, names, self.section_json, self.rules)
        drops = decide_drops(table, self.rules)
        matches = write.write_corpus(runner, table, self.rules, drops, self.section_json, partial)
        if self.section.decontaminate:
            lines = []
            for match in matches:
                line = json.dumps(match.to_json(), ensure_ascii=False)
                lines.append(line + "\n")
            io.write_text(partial / "contaminated.jsonl", "".join(lines))
        token_bytes = estimate_token_bytes(table, self.tokenizer)
        funnel = build_funnel(table, self.rules, drops, token_bytes)
        funnel["unread"] = {name: skipped.to_json() for name, skipped in unread.items()}
        io.write_json(partial / "funnel.json", funnel)
        train_amounts = funnel["train"].values()
        if not any(amounts["rows"] for amounts in train_amounts):
            raise UserError(
                f"prepare: none of {len(drops.dropped_by):,} documents is left to train on.\n"
                f"{format_funnel(funnel)}\nSamples of what each rule dropped are in "
                f"{partial / 'dropped'}. Choose another prepare.preset or source, or lower "
                "prepare.heldout_frac."
            )
        io.remove_working(state_dir)
        contaminated = self.count_contaminated(matches)
        return {**funnel, "contaminated": contaminated}

    def count_contaminated(self, matches: list[write.Match]) -> dict[str, int]:
        """Return how many documents matched each benchmark task."""
        tasks = {item.task for item in self.index.items}
        documents = {task: set() for task in sorted(tasks)}
        for match in matches:
            documents[match.task].add(match.id)
        return {task: len(ids) for task, ids in documents.items()}


def log_missing_heldout(counts: dict[str, Any], heldout_frac: float) -> None:
    """Warn of the sources of which no document is held out."""
    missing = []
    for name, amounts in counts["train"].items():
        if amounts["rows"] and not counts["heldout"][name]["rows"]:
            missing.append(f"{name} ({amounts['rows']:,} documents)")
    if not missing:
        return
    log.warning(
        f"prepare: nothing is held out of {name_some(missing)}, so no loss will be measured there: "
        f"prepare.heldout_frac is {heldout_frac:g}, of the documents. Raise it, or prepare shorter "
        "documents, such as chapters instead of books."
    )


def log_counts(counts: dict[str, Any], corpus: io.Path) -> None:
    """Log the funnel, edits, skipped records and contaminated documents."""
    log.info(format_funnel(counts))
    for step in counts["steps"]:
        edits = step.get("edits", {})
        for name, n in edits.items():
            if n:
                log.info(f"prepare: {step['rule']} made {n:,} edits in {name}")
    for name, unread in counts["unread"].items():
        for reason, n in unread["counts"].items():
            log.warning(f"prepare: {name}: skipped {n:,} records or files: {reason}")
        for message in unread["first"]:
            log.warning(f"prepare: skipped: {message}")
    for task, n in counts["contaminated"].items():
        log.info(
            f"prepare: dropped {n:,} documents that overlap {task}; see {corpus}/contaminated.jsonl"
        )
    for split in SPLITS:
        per_source = counts[split].values()
        n = sum(amounts["rows"] for amounts in per_source)
        n_bytes = sum(amounts["bytes"] for amounts in per_source)
        log.info(f"prepare: {split}: {n:,} documents ({n_bytes / 1e6:.1f} MB)")
    log.info(f"prepare: the corpus is {corpus}")
