"""Compare models: their continuations of the same prompts, and the documents they differ on."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import shutil
import sys
import time
from collections.abc import Callable

import numpy as np

from jaxpt import io, stage
from jaxpt.data import chat, sources, tokenizer
from jaxpt.evaluate import likelihood
from jaxpt.evaluate.continuation import (
    STREAM_EVERY,
    Prompt,
    ShowProgress,
    decode_continuation,
    encode_prompts,
    escape_controls,
    load_with_tokenizer,
    stream_text,
)
from jaxpt.model import decode
from jaxpt.spec import Record, UserError
from jaxpt.text import display_width, format_table
from jaxpt.weights.load import LoadedModel, fingerprint_model

log = logging.getLogger(__name__)

# characters of a column; where models would get less, their texts are printed below each other
MIN_COLUMN_WIDTH = 24
COLUMN_GAP = "  "
MAX_DOCUMENTS_COMPARED = 256  # read of each source, from its beginning
MIN_DOCUMENT_TOKENS = 32  # the mean over fewer is mostly chance
N_MOST_DIFFERENT = 4  # documents listed in each direction
MAX_TOKENS_SHOWN = 256  # of each: the window that differs most


@dataclasses.dataclass(frozen=True)
class GenerationSettings(Record):
    """How the continuations are decoded; see decode.Sampling."""

    max_new: int  # tokens
    repetition_penalty: float
    temperature: float
    top_k: int
    top_p: float
    seed: int
    # how a prompt is read: "text"; "control tokens", which it may hold; "chat", by the template
    read_as: str = "text"

    @property
    def sampling(self) -> decode.Sampling:
        """Return the settings of sampling."""
        return decode.Sampling(self.repetition_penalty, self.temperature, self.top_k, self.top_p)


@dataclasses.dataclass(frozen=True)
class Continuation(Record):
    """A model's continuation of a prompt."""

    model: str  # name
    text: str  # without the prompt
    tokens: int
    seconds: float  # to read the prompt and write the tokens, without compilation


@dataclasses.dataclass(frozen=True)
class PromptSamples(Record):
    """The continuations of one prompt, in the order of the models."""

    prompt: str
    outputs: tuple[Continuation, ...]


@dataclasses.dataclass(frozen=True)
class SampleComparison(Record):
    """Continuations of the same prompts by several models: samples.json."""

    request: str  # fingerprint of models, prompts, settings and texts
    models: tuple[str, ...]  # names
    settings: GenerationSettings
    prompts: tuple[PromptSamples, ...]
    # text file -> model -> score; None: see reasons
    bits_per_byte: dict[str, dict[str, float | None]]
    # text file -> model -> why it has no score
    reasons: dict[str, dict[str, str]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class DocumentDifference(Record):
    """The losses of a document by parent and child, and the window that differs most."""

    source: str  # name
    id: str
    tokens: int  # scored
    nats: tuple[float, float]  # mean per token
    first_token: int  # of the window
    pieces: tuple[str, ...]  # what each token of the window adds to the text
    losses: tuple[tuple[float, ...], tuple[float, ...]]  # nats, of each token of the window


@dataclasses.dataclass(frozen=True)
class DocumentComparison(Record):
    """The documents on which parent and child differ most, largest first: differences.json."""

    request: str  # fingerprint of models and sources
    models: tuple[str, ...]  # names of parent and child
    documents: int  # compared
    max_length: int  # tokens read of each document
    better: tuple[DocumentDifference, ...]  # the child's mean loss is lower
    worse: tuple[DocumentDifference, ...]  # the child's mean loss is higher


def compare_samples(
    models: list[io.Path],
    prompts: list[Prompt],
    *,
    read_as: str = "text",
    max_new: int = 128,
    sampling: decode.Sampling = decode.Sampling(),
    seed: int = 0,
    texts: list[io.Path] = [],
    to: io.Path | None = None,
) -> SampleComparison:
    """Continue each prompt by each model and print the texts in columns.

    On a terminal each text is printed as it is written. A prompt begins with the model's
    beginning-of-sequence token if its tokenizer has one.

    Args:
        models: runs, checkpoints or Hugging Face directories.
        prompts: texts to continue, or conversations.
        read_as: "text"; "control tokens": those in a prompt are encoded as such; "chat": a prompt
            is a user's message or a conversation, encoded by the model's chat template.
        max_new: most tokens of a continuation.
        sampling: how tokens are chosen.
        seed: of the sampling.
        texts: files on which to also measure each model's bits per byte.
        to: file to write the result to.

    Raises:
        UserError: a model has no tokenizer, or a prompt does not fit.
    """
    names = name_models(models)
    contents = {str(file): read_text_file(file) for file in texts}
    settings = GenerationSettings(
        max_new, **dataclasses.asdict(sampling), seed=seed, read_as=read_as
    )
    model_prints = list(map(fingerprint_model, models))
    request = stage.fingerprint([names, model_prints, prompts, settings.to_json(), contents])
    earlier = stage.read_cached_result(to, request)
    if earlier:
        found = SampleComparison.from_json(earlier, str(to))
        print_columns(found)
        log.info(f"compare: {to} holds this already, nothing to do")
        return found
    shown = [chat.format_conversation(chat.read_conversation(each, "")) for each in prompts]
    outputs: list[list[Continuation]] = [[] for _ in prompts]
    scores: dict[str, dict[str, float | None]] = {file: {} for file in contents}
    reasons: dict[str, dict[str, str]] = {file: {} for file in contents}
    for name, model in zip(names, models, strict=True):
        loaded, encoder = load_with_tokenizer(model)
        token_ids = encode_prompts(encoder, name, prompts, read_as)
        written = generate_continuations(loaded, encoder, name, shown, token_ids, settings)
        for of_prompt, continuation in zip(outputs, written, strict=True):
            of_prompt.append(continuation)
        for file, text in contents.items():
            token_ids = encoder.encode_batch([text])
            sums = likelihood.measure_bits_per_byte(
                loaded.spec,
                loaded.params,
                [text],
                token_ids,
                encoder.first_id,
                label=f"{name}: {file}",
            )
            lost = encoder.count_lost_bytes([text], token_ids)
            sums = dataclasses.replace(sums, n_lost_bytes=lost)
            scores[file][name] = None if sums.reason else sums.bits_per_byte
            if sums.reason:
                reasons[file][name] = sums.reason
    by_prompt = []
    for prompt, continuations in zip(shown, outputs, strict=True):
        by_prompt.append(PromptSamples(prompt, tuple(continuations)))
    samples = SampleComparison(
        request=request,
        models=tuple(names),
        settings=settings,
        prompts=tuple(by_prompt),
        bits_per_byte=scores,
        reasons=reasons,
    )
    print_columns(samples)
    if to:
        stage.write_result(to, samples.to_json())
        log.info(f"compare: {len(prompts)} prompts by {len(models)} models, written to {to}")
    return samples


def generate_continuations(
    loaded: LoadedModel,
    encoder: tokenizer.Tokenizer,
    name: str,
    prompts: list[str],
    token_ids: list[list[int]],
    settings: GenerationSettings,
) -> list[Continuation]:
    """Return one model's continuation of each prompt.

    Args:
        loaded: the model.
        encoder: its tokenizer.
        name: its name.
        prompts: as they are shown.
        token_ids: of each prompt.
        settings: of decoding.
    """
    decode.check_prompts(loaded.spec, token_ids)
    repeats = decode.number_repeats(token_ids)

    def generate(ids: list[int], repeat: int, watch: decode.Watch, every: int = 1) -> list[int]:
        (new,) = decode.generate(
            loaded.spec,
            loaded.params,
            [ids],
            max_new=settings.max_new,
            sampling=settings.sampling,
            seed=settings.seed,
            repeats=[repeat],
            watch=watch,
            watch_every=every,
        )
        return new

    is_terminal = sys.stdout.isatty()
    if is_terminal:
        bar = contextlib.nullcontext(lambda n: None)
    else:
        bar = stage.progress_bar(name, settings.max_new * len(prompts), "tokens")
    done = []
    with bar as advance:
        for prompt, ids, repeat in zip(prompts, token_ids, repeats, strict=True):
            generate(ids, repeat, lambda *_: True)  # compiles, and stops at the first token
            if is_terminal:
                print(f"\n{name} > {escape_controls(prompt)}")
                show = stream_text(encoder, ids)
            else:
                show = count_progress(advance, settings.max_new)
            start = time.monotonic()
            new = generate(ids, repeat, lambda _, new, show=show: show(new), STREAM_EVERY)
            seconds = round(time.monotonic() - start, 3)
            text = decode_continuation(encoder, ids, new)
            done.append(Continuation(name, text, len(new), seconds))
            show(new, ended=True)
    n_tokens = sum(continuation.tokens for continuation in done)
    seconds = sum(continuation.seconds for continuation in done)
    log.info(f"{name}: {n_tokens:,} tokens in {seconds:,.1f} s")
    return done


def count_progress(advance: Callable[[int], None], max_new: int) -> ShowProgress:
    """Return a function that advances a progress bar; a text that ended counts as max_new."""
    counted = 0

    def show(new: list[int], ended: bool = False) -> None:
        nonlocal counted
        n_done = max_new if ended else len(new)
        advance(n_done - counted)
        counted = n_done

    return show


def name_models(models: list[io.Path]) -> list[str]:
    """Name each model by its run's directory if that is unique, else by its path."""
    runs = []
    for model in models:
        path = io.resolve(model)
        if path.parent.name == "checkpoints":
            path = path.parent.parent
        runs.append(path.name)
    names = []
    for run, model in zip(runs, models, strict=True):
        names.append(run if runs.count(run) == 1 else str(model))
    return names


def read_text_file(file: io.Path) -> str:
    """Return the text of a file of --ppl. Raise UserError if it cannot be read or is empty."""
    try:
        text = io.read_text(file)
    except UserError as error:
        raise UserError(
            f"--ppl {file}: cannot be read ({error}) Expected a text file in UTF-8."
        ) from None
    if not text:
        raise UserError(f"--ppl {file}: is empty, so there is nothing to score.")
    return text


def read_prompts(file: io.Path, read_as: str = "text") -> list[Prompt]:
    """Return the items of a JSON list in a .json file, else the lines, without blank ones.

    Items are strings, or conversations where prompts are read as chat.

    Raises:
        UserError: the file cannot be read, or no prompt is left.
    """
    try:
        if file.suffix == ".json":
            prompts = io.read_json(file)
        else:
            prompts = io.read_text(file).splitlines()
    except UserError as error:
        raise UserError(
            f"--prompts {file}: cannot be read ({error}) Expected a text file with a prompt per "
            "line, or a JSON list of strings."
        ) from None
    if isinstance(prompts, list) and read_as == "chat":
        for number, prompt in enumerate(prompts, 1):
            chat.read_conversation(prompt, f"--prompts {file}: item {number}")
    elif not isinstance(prompts, list) or not all(isinstance(each, str) for each in prompts):
        raise UserError(f"--prompts {file}: expected a list of strings, got other JSON.")
    prompts = [each for each in prompts if not isinstance(each, str) or each.strip()]
    if not prompts:
        raise UserError(f"--prompts {file}: holds no prompt. Write one per line.")
    return prompts


# ---- what the child has learned and what it has forgotten


def compare_documents(
    models: list[io.Path], texts: list[str], *, to: io.Path | None = None
) -> DocumentComparison:
    """Find the documents on which the second model is most above and below the first.

    They are compared by mean nats per token. Each document is read up to the shorter context of the
    two, after the beginning-of-sequence token. Both models are in memory together.

    Args:
        models: parent and child, which share a tokenizer.
        texts: sources, [NAME=]KIND:WHERE as jaxpt prepare reads them. Use held-out ones: a model
            has learned those it was trained on.
        to: file to write the result to.

    Raises:
        UserError: there are not two models, their tokenizers differ, or no document is long enough.
    """
    if len(models) != 2:
        raise UserError(f"--differ: got {len(models)} models, expected two: parent and child.")
    names = name_models(models)
    parsed = [sources.parse_source(text) for text in texts]
    inputs: dict[str, str] = {}
    for source in parsed:
        source.check_published()
        inputs |= source.list_object_tags()
        for key, path in source.fingerprint_inputs().items():
            inputs[key] = stage.fingerprint_path(path)
    model_prints = list(map(fingerprint_model, models))
    request = stage.fingerprint([names, model_prints, texts, inputs])
    earlier = stage.read_cached_result(to, request)
    if earlier:
        result = DocumentComparison.from_json(earlier, str(to))
        print(format_differences(result))
        log.info(f"compare: {to} holds this already, nothing to do")
        return result
    documents = []
    for source in parsed:
        for document in itertools.islice(source.iterate_documents(), MAX_DOCUMENTS_COMPARED):
            documents.append((source.name, document))
    parent, encoder = load_with_tokenizer(models[0])
    child, child_encoder = load_with_tokenizer(models[1])
    if encoder.fingerprint != child_encoder.fingerprint:
        raise UserError(
            f"--differ: {names[0]} and {names[1]} have different tokenizers, so their tokens "
            "cannot be compared. Use --ppl."
        )
    max_length = min(parent.spec.max_seq_len, child.spec.max_seq_len)
    token_ids = encoder.encode_batch([document.text for _, document in documents])
    compared, pairs = [], []
    for (source, document), ids in zip(documents, token_ids, strict=True):
        ids = ids[:max_length]
        if len(ids) >= MIN_DOCUMENT_TOKENS:
            compared.append((source, document.id))
            pairs.append(([encoder.first_id], ids))
    if not pairs:
        raise UserError(
            f"--differ: none of {len(documents):,} documents has {MIN_DOCUMENT_TOKENS} tokens. "
            "Name a source with longer ones."
        )
    parent_losses = compute_token_losses(parent, pairs, max_length, names[0])
    child_losses = compute_token_losses(child, pairs, max_length, names[1])
    differences, changes = [], []
    for n, (source, document_id) in enumerate(compared):
        _, ids = pairs[n]
        before, after = parent_losses[n], child_losses[n]
        token_changes = after - before
        change = compute_mean(token_changes)
        start = select_window(token_changes * np.sign(change), MAX_TOKENS_SHOWN)
        window = slice(start, start + MAX_TOKENS_SHOWN)
        pieces = split_token_texts(encoder, ids[window])
        difference = DocumentDifference(
            source=source,
            id=document_id,
            tokens=len(ids),
            nats=(compute_mean(before), compute_mean(after)),
            first_token=start,
            pieces=tuple(pieces),
            losses=(round_losses(before[window]), round_losses(after[window])),
        )
        changes.append(change)
        differences.append(difference)
    order = sorted(range(len(changes)), key=changes.__getitem__)
    lowest = order[:N_MOST_DIFFERENT]
    highest = order[::-1][:N_MOST_DIFFERENT]
    better = [differences[n] for n in lowest if changes[n] < 0]
    worse = [differences[n] for n in highest if changes[n] > 0]
    result = DocumentComparison(
        request=request,
        models=tuple(names),
        documents=len(compared),
        max_length=max_length,
        better=tuple(better),
        worse=tuple(worse),
    )
    print(format_differences(result))
    if to:
        stage.write_result(to, result.to_json())
        log.info(f"compare: written to {to}")
    return result


def compute_token_losses(
    loaded: LoadedModel,
    pairs: list[likelihood.TokenPair],
    max_length: int,
    label: str,
) -> list[np.ndarray]:
    """Return the loss of each token of the continuations in nats, float32 [n] per pair."""
    losses = [np.empty(0, np.float32)] * len(pairs)
    scored = likelihood.compute_token_log_likelihoods(
        loaded.spec, loaded.params, pairs, max_length=max_length, label=label
    )
    for place, log_likelihoods, _ in scored:
        if not np.isfinite(log_likelihoods).all():
            raise UserError(
                f"--differ: {label} gives losses that are NaN or infinite, so there is nothing to "
                "compare. Use an earlier checkpoint."
            )
        losses[place] = -log_likelihoods
    return losses


def compute_mean(losses: np.ndarray) -> float:
    """Return the mean of losses, summed in float64."""
    return float(losses.mean(dtype=np.float64))


def round_losses(losses: np.ndarray) -> tuple[float, ...]:
    """Return losses with the digits that are written."""
    return tuple(round(loss, 3) for loss in losses.tolist())


def select_window(values: np.ndarray, n: int) -> int:
    """Return where the n consecutive values begin whose sum is largest."""
    if len(values) <= n:
        return 0
    sums = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
    window_sums = sums[n:] - sums[:-n]
    return int(np.argmax(window_sums))


def split_token_texts(encoder: tokenizer.Tokenizer, ids: list[int]) -> list[str]:
    """Return what each token adds to the text; joined they are the text of all.

    A character of several tokens belongs to the last of them.
    """
    pieces, before = [], ""
    for n in range(1, len(ids) + 1):
        text = encoder.decode(ids[:n])
        if n < len(ids):
            text = text.rstrip("\N{REPLACEMENT CHARACTER}")
        pieces.append(text[len(before) :])
        before = text
    return pieces


# ---- on the terminal


def format_differences(found: DocumentComparison) -> str:
    """Return a line per document: both models' losses, and the text where they differ."""
    parent, child = found.models
    lines = [f"{found.documents:,} documents by {parent} and {child}, nats per token"]
    for side, differences in (("better", found.better), ("worse", found.worse)):
        header = f"{child} is {side} on"
        if not differences:
            header += " none"
        lines.append(header)
        for difference in differences:
            words = "".join(difference.pieces).split()
            excerpt = " ".join(words)[:60]
            text = wrap_text(excerpt, 60)[0]
            before, after = difference.nats
            lines.append(f"  {before:.3f} -> {after:.3f}  {difference.id}: {text}")
    return "\n".join(lines)


def print_columns(samples: SampleComparison) -> None:
    """Print the samples as wide as the terminal is."""
    terminal = shutil.get_terminal_size((120, 40))
    print(format_columns(samples, terminal.columns))


def format_columns(samples: SampleComparison, width: int) -> str:
    """Return the samples as text: under each prompt the continuations in columns."""
    names = samples.models
    gaps = len(COLUMN_GAP) * (len(names) - 1)
    column = (width - gaps) // len(names)
    rule_width = max(column, MIN_COLUMN_WIDTH)
    lines = []
    for prompt in samples.prompts:
        quoted = [f"> {line}" for line in wrap_text(prompt.prompt, width - 2)]
        lines += ["", *quoted, ""]
        cells = []
        for output in prompt.outputs:
            rule = "-" * min(display_width(output.model), rule_width)
            cells.append([output.model, rule, output.text])
        if column >= MIN_COLUMN_WIDTH:
            lines.append(format_side_by_side(cells, column))
            continue
        for cell in cells:
            for text in (*cell, ""):
                lines += wrap_text(text, width)
    if samples.bits_per_byte:
        lines += ["", "bits per byte", ""]
    for file, scores in samples.bits_per_byte.items():
        listed = []
        for name in names:
            score = scores[name]
            listed.append(f"{name} -" if score is None else f"{name} {score:.4f}")
        lines.append(f"{file}: {', '.join(listed)}")
        for name, reason in samples.reasons.get(file, {}).items():
            lines.append(f"  {name}: no number: {reason}.")
    return "\n".join(lines)


def format_side_by_side(cells: list[list[str]], column: int) -> str:
    """Return cells, each a list of texts, in columns of one width."""
    wrapped = []
    for cell in cells:
        cell_lines = []
        for text in cell:
            cell_lines += wrap_text(text, column)
        wrapped.append(cell_lines)
    rows = list(itertools.zip_longest(*wrapped, fillvalue=""))
    return format_table(rows, "<", gap=COLUMN_GAP, min_width=column)


def wrap_text(text: str, width: int) -> list[str]:
    """Return lines of at most `width` terminal columns, broken at spaces where there are any.

    Indentation and blank lines stay.
    """
    lines = []
    for line in escape_controls(text).split("\n"):
        while len(line) > 1 and display_width(line) > width:
            lengths = range(len(line), 0, -1)
            fitting = (n for n in lengths if display_width(line[:n]) <= width)
            cut = next(fitting, 1)  # a character that is wider than the line
            space = line.rfind(" ", 0, cut + 1)
            if space > 0 and line[:space].strip():
                cut = space
            lines.append(line[:cut].rstrip())
            line = line[cut:].removeprefix(" ")
        lines.append(line)
    return lines
