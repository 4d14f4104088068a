"""Several models, the same prompts, side by side.

And the documents on which two of them differ most.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import pathlib
import shutil
import sys
import time
import unicodedata
from collections.abc import Callable
from typing import Any

import numpy as np

from jaxpt import config, stage
from jaxpt.data import sources, tokenizer
from jaxpt.evaluate import likelihood
from jaxpt.model import decode
from jaxpt.sharding import make_mesh
from jaxpt.spec import UserError
from jaxpt.weights import initialize

log = logging.getLogger(__name__)

MIN_COLUMN_WIDTH = (
    24  # characters of a column; where models would get less, they stand one below the other
)
COLUMN_GAP = "  "
MAX_DOCUMENTS_COMPARED = 256  # read of each source, from its beginning
MIN_DOCUMENT_TOKENS = 32  # of a document: the mean of fewer is mostly chance
N_MOST_DIFFERENT = 4  # documents listed in each direction
MAX_TOKENS_SHOWN = 256  # of each: the stretch that differs most


def compare_samples(
    models: list[pathlib.Path],
    prompts: list[str],
    *,
    max_new: int = 128,
    sampling: decode.Sampling = decode.Sampling(),
    seed: int = 0,
    texts: list[pathlib.Path] = [],
    to: pathlib.Path | None = None,
) -> dict[str, Any]:
    """Continue each prompt by each model, show the texts in columns, and write them to `to`.

    On a terminal each text is seen as it is written.

    A prompt begins with the model's beginning-of-sequence token where its tokenizer puts one.
    Seconds are those of reading
    the prompt and writing the tokens, compilation not counted. texts: files whose bits per byte by
    each model are put beside. Raises UserError for a model without tokenizer and a prompt that does
    not fit.
    """
    names = name_models(models)
    read = {str(file): read_text_file(file) for file in texts}
    asked = {"max_new": max_new, **stage.to_jsonable(sampling), "seed": seed}
    request = stage.fingerprint(
        [
            names,
            [stage.fingerprint_path(initialize.resolve_source(model)) for model in models],
            prompts,
            asked,
            read,
        ]
    )
    if earlier := stage.read_cached_result(to, request):
        log.info(format_columns(earlier, shutil.get_terminal_size((120, 40)).columns))
        log.info(f"compare: {to} holds this already, nothing to do")
        return earlier
    outputs: list[list[dict]] = [[] for _ in prompts]
    scores: dict[str, dict[str, float]] = {file: {} for file in read}
    for name, model in zip(names, models, strict=True):
        loaded, encoder = load_compared_models(model)
        for row, output in enumerate(
            generate_continuations(loaded, encoder, name, prompts, max_new, sampling, seed)
        ):
            outputs[row].append({"model": name, **output})
        first = encoder.eos_id if encoder.bos_id is None else encoder.bos_id
        for file, text in read.items():
            found = likelihood.measure_bits_per_byte(
                loaded.spec,
                loaded.params,
                [text],
                encoder.encode_batch([text]),
                first,
                label=f"{name}: {file}",
            )
            scores[file][name] = found.bits_per_byte
    samples = {
        "request": request,
        "models": names,
        "settings": asked,
        "prompts": [
            {"prompt": prompt, "outputs": row} for prompt, row in zip(prompts, outputs, strict=True)
        ],
        "bits_per_byte": scores,
    }
    log.info(format_columns(samples, shutil.get_terminal_size((120, 40)).columns))
    if to:
        to.parent.mkdir(parents=True, exist_ok=True)
        stage.write_atomic(to, json.dumps(samples, indent=1, ensure_ascii=False) + "\n")
        log.info(f"compare: {len(prompts)} prompts by {len(models)} models, written to {to}")
    return samples


def load_compared_models(model: pathlib.Path) -> tuple[initialize.LoadedModel, tokenizer.Tokenizer]:
    """A model and its tokenizer. Raises UserError where there is none."""
    loaded = initialize.load_model(model, make_mesh(config.MeshConfig()))
    if loaded.tokenizer_dir is None:
        raise UserError(
            f"{model}: has no tokenizer beside it (tokenizer.json), so it "
            "cannot read a prompt. Copy the one that it was trained with "
            "there."
        )
    return loaded, tokenizer.load_tokenizer(loaded.tokenizer_dir)


def generate_continuations(
    loaded: initialize.LoadedModel,
    encoder: tokenizer.Tokenizer,
    name: str,
    prompts: list[str],
    max_new: int,
    sampling: decode.Sampling,
    seed: int,
) -> list[dict[str, Any]]:
    """One model's {"text", "tokens", "seconds"} for each prompt."""
    start_ids = [] if encoder.bos_id is None else [encoder.bos_id]
    token_ids = [start_ids + ids for ids in encoder.encode_batch(prompts)]
    decode.check_prompts(loaded.spec, token_ids)
    done, settings, live = (
        [],
        {"max_new": max_new, "sampling": sampling, "seed": seed},
        sys.stdout.isatty(),
    )
    bar = (
        contextlib.nullcontext(lambda n: None)
        if live
        else stage.progress_bar(name, max_new * len(prompts), "tokens")
    )
    with bar as advance:
        for prompt, ids in zip(prompts, token_ids, strict=True):
            decode.generate(
                loaded.spec, loaded.params, [ids], watch=lambda *_: True, **settings
            )  # compiles, and stops at the first token
            if live:
                log.info(f"\n{name} > {escape_controls(prompt)}")
            show = stream_text(encoder, ids) if live else count_progress(advance, max_new)
            start = time.monotonic()
            (new,) = decode.generate(
                loaded.spec,
                loaded.params,
                [ids],
                watch=lambda row, new, show=show: show(new),
                watch_every=4,
                **settings,
            )
            done.append(
                {
                    "text": decode_continuation(encoder, ids, new),
                    "tokens": len(new),
                    "seconds": round(time.monotonic() - start, 3),
                }
            )
            show(new, ended=True)
    n_tokens, seconds = (sum(each[key] for each in done) for key in ("tokens", "seconds"))
    log.info(f"{name}: {n_tokens:,} tokens in {seconds:,.1f} s")
    return done


def stream_text(encoder: tokenizer.Tokenizer, ids: list[int]) -> Callable[..., None]:
    """show(new, ended=False) puts on the terminal what the new tokens have added to the text since
    it was called last.
    """
    shown = ""

    def show(new: list[int], ended: bool = False) -> None:
        nonlocal shown
        text = decode_continuation(encoder, ids, new)
        text = (
            text if ended else text.rstrip("\N{REPLACEMENT CHARACTER}")
        )  # a character may take several tokens
        print(escape_controls(text[len(shown) :]), end="\n" if ended else "", flush=True)
        shown = text

    return show


def count_progress(advance: Callable[[int], None], most: int) -> Callable[..., None]:
    """The same for a progress bar of `most` tokens a text; a text that ended counts whole."""
    counted = 0

    def show(new: list[int], ended: bool = False) -> None:
        nonlocal counted
        now = most if ended else len(new)
        advance(now - counted)
        counted = now

    return show


def decode_continuation(encoder: tokenizer.Tokenizer, ids: list[int], new: list[int]) -> str:
    """The text that new tokens add to a prompt's."""
    # decoded together, so that a space between prompt and continuation is not taken for one at a
    # text's beginning
    before, whole = encoder.decode(ids), encoder.decode(ids + new)
    return whole.removeprefix(before) if whole.startswith(before) else encoder.decode(new)


def name_models(models: list[pathlib.Path]) -> list[str]:
    """A model's name is its run's directory where that is unique, else its path."""
    runs = [
        model.resolve().parent.parent.name
        if model.resolve().parent.name == "checkpoints"
        else model.resolve().name
        for model in models
    ]
    return [
        run if runs.count(run) == 1 else str(model) for run, model in zip(runs, models, strict=True)
    ]


def read_text_file(file: pathlib.Path) -> str:
    """A text whose bits per byte are asked for.

    Raises UserError where it cannot be read or is empty.
    """
    try:
        text = file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"--ppl {file}: cannot be read ({error}). Expected a text file in UTF-8."
        ) from None
    if not text:
        raise UserError(f"--ppl {file}: is empty, so there is nothing to score.")
    return text


def read_prompts(file: pathlib.Path) -> list[str]:
    """A JSON list of strings in a .json file, else a prompt a line.

    Blank ones are skipped. Raises UserError when none is left.
    """
    try:
        text = file.read_text()
        prompts = json.loads(text) if file.suffix == ".json" else text.splitlines()
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(
            f"--prompts {file}: cannot be read ({error}). Expected a text "
            "file with a prompt a line, or a JSON list of strings."
        ) from None
    if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
        raise UserError(f"--prompts {file}: got JSON of another form, expected a list of strings.")
    prompts = [prompt for prompt in prompts if prompt.strip()]
    if not prompts:
        raise UserError(f"--prompts {file}: holds no prompt. Write one a line.")
    return prompts


# ---- what one learnt and the other forgot


def compare_documents(
    models: list[pathlib.Path], texts: list[str], *, to: pathlib.Path | None = None
) -> dict[str, Any]:
    """The documents on which the second model is furthest below and furthest above the first, by
    mean nats per token; printed, and written to `to`.

    Each document is read up to the shorter context of the two, after the beginning-of-sequence
    token. Both models are in memory together.

    models  parent and child, which share a tokenizer
    texts   sources of documents, [NAME=]KIND:WHERE as prepare.py reads them: held-out ones, for a
    model knows those it was trained on

    Returns {"models", "documents", "max_length", "better": [...], "worse": [...]}, most different
    first, each document with its "source", "id",
    "tokens", the models' mean "nats", and of the stretch of TOKENS_SHOWN tokens that differs most:
    "first_token", "pieces" of text and each
    model's "losses" of them.

    Raises UserError for other than two models, different tokenizers, and sources without a document
    that is long enough.
    """
    if len(models) != 2:
        raise UserError(f"--differ: got {len(models)} models, expected two: parent and child.")
    names, found = name_models(models), [sources.parse_source(text) for text in texts]
    read = {
        key: stage.fingerprint_path(path)
        for source in found
        for key, path in source.fingerprint_inputs().items()
    }
    request = stage.fingerprint(
        [
            names,
            [stage.fingerprint_path(initialize.resolve_source(model)) for model in models],
            texts,
            read,
        ]
    )
    if earlier := stage.read_cached_result(to, request):
        log.info(find_most_different_tokens(earlier))
        log.info(f"compare: {to} holds this already, nothing to do")
        return earlier
    documents = [
        (source.name, each.id, each.text)
        for source in found
        for each in itertools.islice(source.iterate_documents(), MAX_DOCUMENTS_COMPARED)
    ]
    loaded, encoders = zip(*map(load_compared_models, models), strict=True)
    encoder = encoders[0]
    if encoder.fingerprint != encoders[1].fingerprint:
        raise UserError(
            f"--differ: {names[0]} and {names[1]} have different tokenizers, "
            "so their tokens cannot be set side by side. Use --ppl."
        )
    max_length = min(each.spec.max_seq_len for each in loaded)
    cut = [ids[:max_length] for ids in encoder.encode_batch([text for *_, text in documents])]
    chosen = [i for i, ids in enumerate(cut) if len(ids) >= MIN_DOCUMENT_TOKENS]
    if not chosen:
        raise UserError(
            f"--differ: none of {len(documents):,} documents has "
            f"{MIN_DOCUMENT_TOKENS} tokens. Name a source with longer ones."
        )
    first = encoder.eos_id if encoder.bos_id is None else encoder.bos_id
    pairs = [([first], cut[i]) for i in chosen]
    losses = []
    for name, each in zip(names, loaded, strict=True):
        scored = likelihood.compute_token_log_likelihoods(
            each.spec, each.params, pairs, max_length=max_length, label=name
        )
        losses.append({chosen[place]: -nats for place, nats, _ in scored})
    change = {i: float((losses[1][i] - losses[0][i]).mean(dtype=np.float64)) for i in chosen}

    def describe(i: int) -> dict[str, Any]:
        source, id, _ = documents[i]
        both = [each[i] for each in losses]
        start = select_window((both[1] - both[0]) * np.sign(change[i]), MAX_TOKENS_SHOWN)
        span = slice(start, start + MAX_TOKENS_SHOWN)
        return {
            "source": source,
            "id": id,
            "tokens": len(cut[i]),
            "nats": [float(each.mean(dtype=np.float64)) for each in both],
            "first_token": start,
            "pieces": split_token_texts(encoder, cut[i][span]),
            "losses": [[round(float(loss), 3) for loss in each[span]] for each in both],
        }

    order = sorted(chosen, key=change.__getitem__)
    result = {
        "request": request,
        "models": names,
        "documents": len(chosen),
        "max_length": max_length,
        "better": [describe(i) for i in order[:N_MOST_DIFFERENT] if change[i] < 0],
        "worse": [describe(i) for i in order[::-1][:N_MOST_DIFFERENT] if change[i] > 0],
    }
    log.info(find_most_different_tokens(result))
    if to:
        to.parent.mkdir(parents=True, exist_ok=True)
        stage.write_atomic(to, json.dumps(result, ensure_ascii=False) + "\n")
        log.info(f"compare: written to {to}")
    return result


def select_window(values: np.ndarray, n: int) -> int:
    """Where the n values in a row begin whose sum is largest."""
    sums = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
    return int(np.argmax(sums[n:] - sums[:-n])) if len(values) > n else 0


def split_token_texts(encoder: tokenizer.Tokenizer, ids: list[int]) -> list[str]:
    """What each token adds to the text, together the text of all.

    A character of several tokens stands with its last.
    """
    pieces, before = [], ""
    for n in range(1, len(ids) + 1):
        text = encoder.decode(ids[:n])
        text = text.rstrip("\N{REPLACEMENT CHARACTER}") if n < len(ids) else text
        pieces.append(text[len(before) :])
        before = text
    return pieces


# ---- on the terminal


def find_most_different_tokens(found: dict[str, Any]) -> str:
    """A line for each document.

    How far apart the models are on it, and how it goes where they differ.
    """
    parent, child = found["models"]
    lines = [f"{found['documents']:,} documents by {parent} and {child}, nats per token"]
    for side in ("better", "worse"):
        lines.append(f"{child} is {side} on" + ("" if found[side] else " none"))
        for each in found[side]:
            text = wrap_text(" ".join("".join(each["pieces"]).split())[:60], 60)[0]
            lines.append(
                f"  {each['nats'][0]:.3f} -> {each['nats'][1]:.3f}  "
                f"{each['source']} {each['id']}: {text}"
            )
    return "\n".join(lines)


def format_columns(samples: dict[str, Any], width: int) -> str:
    """The samples as text: under each prompt the models' continuations in columns."""
    names = samples["models"]
    column = (width - len(COLUMN_GAP) * (len(names) - 1)) // len(names)
    lines = []
    for prompt in samples["prompts"]:
        lines += ["", *(f"> {line}" for line in wrap_text(prompt["prompt"], width - 2)), ""]
        cells = [
            [
                output["model"],
                "-" * min(display_width(output["model"]), max(column, MIN_COLUMN_WIDTH)),
                output["text"],
            ]
            for output in prompt["outputs"]
        ]
        if column < MIN_COLUMN_WIDTH:
            lines += [
                line for cell in cells for text in (*cell, "") for line in wrap_text(text, width)
            ]
            continue
        wrapped = [[line for text in cell for line in wrap_text(text, column)] for cell in cells]
        for row in range(max(map(len, wrapped))):
            line = [cell[row] if row < len(cell) else "" for cell in wrapped]
            lines.append(
                COLUMN_GAP.join(
                    text + " " * (column - display_width(text)) for text in line
                ).rstrip()
            )
    for n, (file, found) in enumerate(samples["bits_per_byte"].items()):
        lines += [] if n else ["", "bits per byte", ""]
        lines.append(f"{file}: " + ", ".join(f"{name} {found[name]:.4f}" for name in names))
    return "\n".join(lines)


def wrap_text(text: str, width: int) -> list[str]:
    """Lines of at most `width` terminal columns, broken at spaces where there are any.

    Indentation and blank lines stay.
    """
    lines = []
    for line in escape_controls(text).split("\n"):
        while display_width(line) > width:
            fits = next(n for n in range(len(line), 0, -1) if display_width(line[:n]) <= width)
            space = line.rfind(" ", 0, fits + 1)
            cut = space if line[:space].strip() and space > 0 else fits
            lines.append(line[:cut].rstrip())
            line = line[cut:].removeprefix(" ")
        lines.append(line)
    return lines


def escape_controls(text: str) -> str:
    """An escape sequence shows, it does not act."""
    return "".join(
        c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}"
        for c in text.expandtabs(4)
    )


def display_width(text: str) -> int:
    """Terminal columns: East Asian wide characters take two, combining marks none."""
    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1
        for c in text
    )
