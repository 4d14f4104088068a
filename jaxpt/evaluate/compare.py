"""Several models, the same prompts, side by side."""

from __future__ import annotations

import json
import pathlib
import shutil
import time
import unicodedata
from typing import Any

from jaxpt import config, stage
from jaxpt.data import tokenizer
from jaxpt.evaluate import likelihood
from jaxpt.model import decode
from jaxpt.sharding import make_mesh
from jaxpt.spec import UserError
from jaxpt.weights import initialize

NARROWEST = 24  # characters of a column; where models would get less, they stand one below the other
GAP = "  "


def compare(
    models: list[pathlib.Path], prompts: list[str], *, max_new: int = 128, sampling: decode.Sampling = decode.Sampling(),  # noqa: B008 (frozen)
    seed: int = 0, texts: list[pathlib.Path] = [], to: pathlib.Path | None = None,  # noqa: B006 (never changed)
) -> dict[str, Any]:  # fmt: skip
    """Continue each prompt by each model, show the texts in columns, and write them to `to`.

    A prompt begins with the model's beginning-of-sequence token where its tokenizer puts one. Seconds are those of reading
    the prompt and writing the tokens, compilation not counted. texts: files whose bits per byte by each model are put beside. Raises UserError for a model without tokenizer and a prompt that does not fit.
    """
    names = names_of(models)
    read = {str(file): read_text(file) for file in texts}
    asked = {"max_new": max_new, **stage.plain(sampling), "seed": seed}
    request = stage.fingerprint([names, [stage.fingerprint_path(initialize.source_of(model)) for model in models], prompts, asked, read])
    if earlier := stage.answered(to, request):
        stage.say(side_by_side(earlier, shutil.get_terminal_size((120, 40)).columns))
        stage.say(f"compare: {to} holds this already, nothing to do")
        return earlier
    outputs: list[list[dict]] = [[] for _ in prompts]
    scores: dict[str, dict[str, float]] = {file: {} for file in read}
    for name, model in zip(names, models, strict=True):
        loaded, encoder = opened(model)
        for row, output in enumerate(continuations(loaded, encoder, name, prompts, max_new, sampling, seed)):
            outputs[row].append({"model": name, **output})
        first = encoder.eos_id if encoder.bos_id is None else encoder.bos_id
        for file, text in read.items():
            found = likelihood.bits_per_byte(loaded.spec, loaded.params, [text], encoder.encode_batch([text]), first, label=f"{name}: {file}")
            scores[file][name] = found.bits_per_byte
    samples = {
        "request": request,
        "models": names,
        "settings": asked,
        "prompts": [{"prompt": prompt, "outputs": row} for prompt, row in zip(prompts, outputs, strict=True)],
        "bits_per_byte": scores,
    }
    stage.say(side_by_side(samples, shutil.get_terminal_size((120, 40)).columns))
    if to:
        to.parent.mkdir(parents=True, exist_ok=True)
        stage.write_whole(to, json.dumps(samples, indent=1, ensure_ascii=False) + "\n")
        stage.say(f"compare: {len(prompts)} prompts by {len(models)} models, written to {to}")
    return samples


def opened(model: pathlib.Path) -> tuple[initialize.Loaded, tokenizer.Tokenizer]:
    """A model and its tokenizer. Raises UserError where there is none."""
    loaded = initialize.load(model, make_mesh(config.Mesh()))
    if loaded.tokenizer_dir is None:
        raise UserError(
            f"{model}: has no tokenizer beside it (tokenizer.json), so it cannot read a prompt. Copy the one that it was trained with there."
        )
    return loaded, tokenizer.load(loaded.tokenizer_dir)


def continuations(
    loaded: initialize.Loaded, encoder: tokenizer.Tokenizer, name: str, prompts: list[str], max_new: int, sampling: decode.Sampling, seed: int
) -> list[dict[str, Any]]:
    """One model's {"text", "tokens", "seconds"} for each prompt."""
    start_ids = [] if encoder.bos_id is None else [encoder.bos_id]
    token_ids = [start_ids + ids for ids in encoder.encode_batch(prompts)]
    decode.check_prompts(loaded.spec, token_ids)
    done, written = [], 0
    with stage.progress(name, max_new * len(prompts), "tokens") as advance:

        def count(row: int, ids: list[int]) -> None:
            nonlocal written
            advance(len(ids) - written)
            written = len(ids)

        for ids in token_ids:
            settings = {"max_new": max_new, "sampling": sampling, "seed": seed}
            decode.generate(loaded.spec, loaded.params, [ids], watch=lambda *_: True, **settings)  # compiles, and stops at the first token
            start, written = time.monotonic(), 0
            (new,) = decode.generate(loaded.spec, loaded.params, [ids], watch=count, watch_every=8, **settings)
            seconds = time.monotonic() - start
            before, whole = encoder.decode(ids), encoder.decode(ids + new)
            # decoded together, so that a space between prompt and continuation is not taken for one at a text's beginning
            text = whole.removeprefix(before) if whole.startswith(before) else encoder.decode(new)
            done.append({"text": text, "tokens": len(new), "seconds": round(seconds, 3)})
            advance(max_new - written)
    n_tokens, seconds = (sum(each[key] for each in done) for key in ("tokens", "seconds"))
    stage.say(f"{name}: {n_tokens:,} tokens in {seconds:,.1f} s")
    return done


def names_of(models: list[pathlib.Path]) -> list[str]:
    """A model's name is its run's directory where that is unique, else its path."""
    runs = [model.resolve().parent.parent.name if model.resolve().parent.name == "checkpoints" else model.resolve().name for model in models]
    return [run if runs.count(run) == 1 else str(model) for run, model in zip(runs, models, strict=True)]


def read_text(file: pathlib.Path) -> str:
    """A text whose bits per byte are asked for. Raises UserError where it cannot be read or is empty."""
    try:
        text = file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--ppl {file}: cannot be read ({error}). Wanted a text file in UTF-8.") from None
    if not text:
        raise UserError(f"--ppl {file}: is empty, so there is nothing to score.")
    return text


def read_prompts(file: pathlib.Path) -> list[str]:
    """A JSON list of strings in a .json file, else a prompt a line; blank ones are skipped. Raises UserError when none is left."""
    try:
        text = file.read_text()
        prompts = json.loads(text) if file.suffix == ".json" else text.splitlines()
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"--prompts {file}: cannot be read ({error}). Wanted a text file with a prompt a line, or a JSON list of strings.") from None
    if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
        raise UserError(f"--prompts {file}: got JSON of another form, wanted a list of strings.")
    prompts = [prompt for prompt in prompts if prompt.strip()]
    if not prompts:
        raise UserError(f"--prompts {file}: holds no prompt. Write one a line.")
    return prompts


# ---- on the terminal


def side_by_side(samples: dict[str, Any], width: int) -> str:
    """The samples as text: under each prompt the models' continuations in columns."""
    names = samples["models"]
    column = (width - len(GAP) * (len(names) - 1)) // len(names)
    lines = []
    for prompt in samples["prompts"]:
        lines += ["", *(f"> {line}" for line in wrap(prompt["prompt"], width - 2)), ""]
        cells = [[output["model"], "-" * min(columns_of(output["model"]), max(column, NARROWEST)), output["text"]] for output in prompt["outputs"]]
        if column < NARROWEST:
            lines += [line for cell in cells for text in (*cell, "") for line in wrap(text, width)]
            continue
        wrapped = [[line for text in cell for line in wrap(text, column)] for cell in cells]
        for row in range(max(map(len, wrapped))):
            line = [cell[row] if row < len(cell) else "" for cell in wrapped]
            lines.append(GAP.join(text + " " * (column - columns_of(text)) for text in line).rstrip())
    for n, (file, found) in enumerate(samples["bits_per_byte"].items()):
        lines += [] if n else ["", "bits per byte", ""]
        lines.append(f"{file}: " + ", ".join(f"{name} {found[name]:.4f}" for name in names))
    return "\n".join(lines)


def wrap(text: str, width: int) -> list[str]:
    """Lines of at most `width` terminal columns, broken at spaces where there are any; indentation and blank lines stay."""
    lines = []
    for line in text.expandtabs(4).split("\n"):
        line = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in line)  # an escape sequence shows, it does not act
        while columns_of(line) > width:
            fits = next(n for n in range(len(line), 0, -1) if columns_of(line[:n]) <= width)
            space = line.rfind(" ", 0, fits + 1)
            cut = space if line[:space].strip() and space > 0 else fits
            lines.append(line[:cut].rstrip())
            line = line[cut:].removeprefix(" ")
        lines.append(line)
    return lines


def columns_of(text: str) -> int:
    """Terminal columns: East Asian wide characters take two, combining marks none."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)
