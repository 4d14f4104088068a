"""The door for settings: a config file is opened here once, checked against the knobs below, and frozen.

A knob is stated once, in its section: name, type, default, and a sentence with its unit and its consequence.
configs/base.py, the list of every knob, is printed from them by `python -m jaxpt.config`.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import difflib
import importlib.util
import pathlib
import sys
import types
import typing
from typing import Any

from jaxpt.spec import UserError


def knob(default, says: str, *choices: str):
    """A field of a section: its default, its unit and consequence in words, and for a name the values that it may take."""
    return dataclasses.field(default=default, metadata={"says": says, "choices": choices})


@dataclasses.dataclass(frozen=True)
class Prepare:
    """raw text -> a clean corpus"""

    sources: tuple[str, ...] = knob((), "where text comes from: KIND:WHERE or NAME=KIND:WHERE, see docs/prepare.md for the kinds")
    preset: str = knob(
        "none", "rules, in order: none, course, gopher, c4, fineweb, prose or code; see docs/prepare.md",
        "none", "course", "gopher", "c4", "fineweb", "prose", "code",
    )  # fmt: skip
    rules: tuple[str, ...] = knob(
        (),
        "changes to the preset: '-language' drops a rule, 'min_chars(least=50)' sets or adds one, 'NAME before OTHER' places it, MODULE:FUNCTION is yours",
    )
    near_dedup: bool = knob(False, "drop near-duplicates by MinHash over word 5-grams, first kept; about doubles the stage's time")
    decontaminate: tuple[str, ...] = knob((), "benchmark files; a document that shares words in a row with an item is dropped")
    decontaminate_words: int = knob(13, "so many words in a row: GPT-3's 13 are hardly ever shared by chance, and shorter items cannot be found")
    on_error: str = knob(
        "stop", "a record or file that cannot be read: stop, or skip and count it (a file from the place on where it breaks)", "stop", "skip"
    )
    heldout_frac: float = knob(0.02, "share of documents kept out of training, chosen by hash of the text, per source")
    limit_mb: float = knob(0.0, "MB of text taken from each source at most, after a hash shuffle; 0 takes all. For samples")
    shard_mb: int = knob(128, "MB of text in a parquet shard, about; smaller shards spread over more cores")
    engine: str = knob("local", "where Daft runs, for pack too: local, ray, or ray://HOST:PORT of a running cluster")


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """text -> token ids"""

    source: str = knob("train", "train one on the corpus, or the path of a SentencePiece .model, a tokenizer.json or a Hugging Face directory")
    model: str = knob("bpe", "what is trained: bpe, also saved as SentencePiece .model; unigram, in Hugging Face form alone", "bpe", "unigram")
    vocab_size: int = knob(32_000, "pieces; larger packs more bytes into a token and costs V x D weights twice")
    sample_mb: int = knob(64, "MB of corpus text the training reads, spread evenly over the documents")


@dataclasses.dataclass(frozen=True)
class Pack:
    """documents -> rows of token ids"""

    row_len: int = knob(1024, "tokens in a row: the longest context training sees")
    method: str = knob("best_fit", "best_fit: short documents whole, padding at the end; course: concatenated and cut", "best_fit", "course")


@dataclasses.dataclass(frozen=True)
class Mixture:
    """which rows, in which shares"""

    packed: tuple[str, ...] = knob((), "directories that pack.py wrote; empty means WORKDIR/packed")
    phases: tuple[tuple[int, dict], ...] = knob((), "((from step, {source: share of tokens}), ...); empty means all rows in proportion")
    max_epochs: tuple[tuple[str, float], ...] = knob((), "((source or all, epochs), ...): refuse a run that reads a source more often than this")
    document_mask: bool = knob(True, "a token sees only its own document; off lets it see the whole row, as the course does")
    seed: int = knob(0, "of the order of rows; another seed is another order of the same rows")
    accept: str = knob("", "fingerprint of other rows than a run has read, which it may go on with all the same; it says what that breaks")


@dataclasses.dataclass(frozen=True)
class Model:
    """the shape, when a model is born at random; a start from weights brings its own"""

    n_layers: int = knob(12, "blocks")
    d_model: int = knob(768, "width of the residual stream")
    d_ff: int = knob(2048, "width of the gated feed-forward")
    n_heads: int = knob(12, "query heads")
    n_kv_heads: int = knob(4, "key-value heads; divides n_heads. Fewer make the decoding cache smaller")
    d_head: int = knob(64, "width of a head; even")
    vocab_size: int = knob(0, "rows of the embedding; 0 means the tokenizer's pieces, rounded up to a multiple of 128")
    max_positions: int = knob(4096, "longest sequence the model claims to understand, in tokens")
    norm_eps: float = knob(1e-5, "added under the root in RMSNorm")
    rope_theta: float = knob(10_000.0, "base of the rotary wavelengths; 500,000 for long contexts")
    tied: bool = knob(False, "use the embedding as output head too; saves V x D weights, right for small models")


@dataclasses.dataclass(frozen=True)
class Initialize:
    """where the first weights come from"""

    source: str = knob("random", "random, a run or checkpoint directory, a Hugging Face directory, or hf:NAME of its hub")
    start: str = knob(
        "continue", "continue: step 0, fresh moments, new schedule; resume: all of the source run goes on; grow: that too, moments mapped",
        "continue", "resume", "grow",
    )  # fmt: skip
    grow: tuple[str, ...] = knob((), "growth operators applied in order, such as 'depth_upscale(m=4)'; see docs/growth.md")
    moments: str = knob(
        "reset_new", "Adam's moments through a growth that keeps the schedule: fresh, copy, copy_scaled, or reset_new, which re-warms new parts",
        "fresh", "copy", "copy_scaled", "reset_new",
    )  # fmt: skip
    dtype: str = knob("float32", "of the parameters while training; bfloat16 halves memory and rounds small updates away", "float32", "bfloat16")
    seed: int = knob(0, "of random weights")


@dataclasses.dataclass(frozen=True)
class Train:
    """the loop"""

    steps: int = knob(1000, "optimizer updates in the whole run")
    grow: tuple[tuple[int, str], ...] = knob((), "growth inside the run: ((after so many steps, operator), ...), rising")
    batch_rows: int = knob(32, "rows in a step over all devices; tokens a step = batch_rows x row_len")
    accumulate: int = knob(1, "micro-batches a step is cut into; same result, activations / accumulate, somewhat slower")
    compute_dtype: str = knob("float32", "of matrix products; bfloat16 on GPU and TPU, float32 on CPU", "float32", "bfloat16")
    attention: str = knob(
        "auto", "auto takes the kernel of the platform where it can do the run; see docs/performance.md", "auto", "xla", "splash", "cudnn"
    )
    remat: str = knob(
        "none", "what backward keeps of a layer, most first: none keeps all; then dots, minimal, full; offload is dots in host memory",
        "none", "minimal", "dots", "full", "offload",
    )  # fmt: skip
    z_loss: float = knob(0.0, "weight of log(Z)^2, keeps logits small; 1e-4 where bfloat16 runs for long")
    spike_factor: float = knob(0.0, "skip an update whose gradient norm exceeds this many times its running mean; 0 skips only non-finite ones")
    max_skips: int = knob(20, "skipped updates in a row that stop the run")
    log_every: int = knob(10, "steps between console lines and metrics.jsonl records")
    eval_every: int = knob(200, "steps between held-out losses; 0 measures at the end only")
    eval_rows: int = knob(256, "held-out rows read for each source and measurement, at most")
    max_forgetting: float = knob(0.0, "nats a token by which a source's held-out loss may exceed the parent's before on_forgetting; 0: any")
    on_forgetting: str = knob(
        "stop", "past max_forgetting: say so, stop the run at a checkpoint, or double that source's share from here on (up to half)",
        "say", "stop", "replay",
    )  # fmt: skip
    checkpoint_every: int = knob(500, "steps between checkpoints; at most so many are lost by a kill")
    checkpoint_minutes: float = knob(0.0, "one more whenever so many minutes passed without one, at the next log line; 0: by steps alone")
    keep: int = knob(2, "newest checkpoints kept; each takes 3 x parameters x 4 bytes")
    keep_every: int = knob(0, "checkpoints at multiples of so many steps stay for good; 0: none")
    on_failed_save: str = knob("stop", "a checkpoint that cannot be written (full disk): stop the run, or go on and try the next", "stop", "go on")
    wandb: str = knob("", "project of Weights & Biases that gets every record too (pip install wandb); empty: none")
    profile: tuple[int, ...] = knob((), "(first, last) steps recorded by the JAX profiler into WORKDIR/tensorboard")


@dataclasses.dataclass(frozen=True)
class Optim:
    """the optimizer and its schedule"""

    name: str = knob(
        "adamw", "adamw; muon orthogonalizes the updates of a layer's matrices, half their moments. Keep the one a base was trained with",
        "adamw", "muon",
    )  # fmt: skip
    peak_lr: float = knob(3e-4, "learning rate after warm-up")
    end_lr_frac: float = knob(0.1, "learning rate at the last step, as a share of peak_lr")
    schedule: str = knob("wsd", "after warm-up: wsd stays and falls over decay_frac; cosine, linear; constant", "wsd", "cosine", "linear", "constant")
    warmup_steps: int = knob(100, "steps of linear rise from 0; too few and the first updates are noise")
    decay_frac: float = knob(0.2, "last share of the steps in which wsd falls, linearly")
    rates: tuple[tuple[str, float], ...] = knob(
        (), "((group, factor of the learning rate), ...), multiplied; 0 freezes. Groups: old, new (by the last growth), a weight's name, layers A-B"
    )
    b1: float = knob(0.9, "Adam's decay of the mean")
    b2: float = knob(0.95, "Adam's decay of the square; 0.999 for small batches and short runs")
    eps: float = knob(1e-8, "added to Adam's root")
    weight_decay: float = knob(0.1, "decoupled, on matrices only (by name: never on norms, biases, embedding)")
    clip_norm: float = knob(1.0, "gradients are scaled down to this global norm; 0 leaves them")


@dataclasses.dataclass(frozen=True)
class Mesh:
    """devices along each axis; -1 on one axis takes what the others leave"""

    replica: int = knob(1, "copies of the model, data parallel between slices or hosts (slow links)")
    fsdp: int = knob(-1, "data parallel with parameters cut into as many pieces (fast links)")
    tensor: int = knob(1, "heads and feed-forward cut; must divide n_kv_heads")
    context: int = knob(1, "positions of a row cut; must divide row_len")


@dataclasses.dataclass(frozen=True)
class Plan:
    """what a run is worth"""

    tokens: float = knob(0.0, "tokens to train for; 0 means train.steps x batch_rows x row_len")
    usd_per_hour: float = knob(0.0, "price of one device and hour; 0 takes the list price in plan/hardware.py")


@dataclasses.dataclass(frozen=True)
class Config:
    prepare: Prepare = Prepare()
    tokenizer: Tokenizer = Tokenizer()
    pack: Pack = Pack()
    mixture: Mixture = Mixture()
    model: Model = Model()
    initialize: Initialize = Initialize()
    train: Train = Train()
    optim: Optim = Optim()
    mesh: Mesh = Mesh()
    plan: Plan = Plan()


def defaults():
    """Every knob at its default, as an ml_collections ConfigDict, for a recipe to change: `c = defaults(); c.train.steps = 300`."""
    import ml_collections

    return ml_collections.ConfigDict(dataclasses.asdict(Config()), convert_dict=True)


def ramp(start: int, stop: int, before: dict[str, float], after: dict[str, float], n: int = 16) -> tuple[tuple[int, dict[str, float]], ...]:
    """Phases from `before`, at step `start`, to `after`, at step `stop`, in n equal steps of constant shares:
    `c.mixture.phases = ((0, {"prose": 1}), *ramp(8_000, 10_000, {"prose": 1}, {"prose": 0.5, "code": 0.5}))`."""
    n = max(1, min(n, stop - start))

    def shares(i: int) -> dict[str, float]:
        parts = ((1 - i / n, before), (i / n, after))
        return {name: sum(part * of.get(name, 0) / sum(of.values()) for part, of in parts) for name in {**before, **after}}

    return tuple((start + (stop - start) * i // n, shares(i)) for i in range(n + 1))


def load(path: str, overrides: list[str] = ()) -> Config:
    """Open a config file (`configs/quickstart.py`, or `configs/quickstart.py:child` for get_config("child")) and apply
    overrides such as "--config.train.steps=300". Raises UserError for what is missing, misspelt or of the wrong type.
    """
    name, _, argument = str(path).partition(":")
    file = pathlib.Path(name)
    if not file.is_file():
        near = difflib.get_close_matches(file.name, [other.name for other in file.parent.glob("*.py")], 1)
        raise UserError(f"--config {path}: no such file." + (f" Did you mean {file.parent / near[0]}?" if near else " Recipes lie in configs/."))
    module_spec = importlib.util.spec_from_file_location(f"_config_{file.stem}", file)
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
        config = module.get_config(*([argument] if argument else []))
    except UserError:
        raise
    except Exception as error:
        # ml_collections answers a misspelt assignment in a recipe with its own KeyError or AttributeError
        raise UserError(f"--config {path}: {type(error).__name__}: {str(error).strip(chr(34))}") from error
    return typed(overridden(overrides, config.to_dict()))


def overridden(overrides: list[str], values: dict[str, dict[str, Any]] | None = None) -> dict[str, dict[str, Any]]:
    """Nested plain values (the defaults, if none are given) with "--config.train.steps=300" and the like applied."""
    values = values or dataclasses.asdict(Config())
    for override in overrides:
        section, key, value = parse_override(override, values)
        values[section][key] = value
    return values


def typed(values: dict[str, dict[str, Any]]) -> Config:
    """Nested plain values as frozen, checked sections. Raises UserError naming the knob."""
    sections = {}
    for name, fields in values.items():
        section = lookup(name, {field.name: field for field in dataclasses.fields(Config)}, "section", "").type
        cls = globals()[section]
        knobs = {field.name: field for field in dataclasses.fields(cls)}
        hints = typing.get_type_hints(cls)
        sections[name] = cls(
            **{key: fit(f"{name}.{key}", value, hints[lookup(key, knobs, "knob", name + ".").name], knobs[key]) for key, value in fields.items()}
        )
    config = Config(**sections)
    check(config)
    return config


def check(config: Config) -> None:
    """Knobs that must agree with each other."""
    for name in ("steps", "batch_rows", "accumulate", "log_every", "checkpoint_every", "keep"):
        if getattr(config.train, name) < 1:
            raise UserError(f"train.{name}: got {getattr(config.train, name)}, wanted at least 1.")
    if config.train.batch_rows % config.train.accumulate:
        raise UserError(
            f"train.accumulate: {config.train.batch_rows} rows cannot be cut into {config.train.accumulate} equal micro-batches. Use a divisor of {config.train.batch_rows}."
        )
    if not 0 <= config.prepare.heldout_frac < 1:
        raise UserError(f"prepare.heldout_frac: got {config.prepare.heldout_frac}, wanted a share from 0 up to 1.")
    if config.pack.row_len < 8:
        raise UserError(f"pack.row_len: got {config.pack.row_len}, wanted at least 8 tokens.")
    for start, weights in config.mixture.phases:
        if not weights or any(share < 0 for share in weights.values()) or sum(weights.values()) <= 0:
            raise UserError(f"mixture.phases: the shares from step {start} are {weights}, wanted at least one above 0 and none below.")
    at = [step for step, _ in config.train.grow]
    if sorted(set(at)) != at or any(not 0 < step < config.train.steps for step in at):
        raise UserError(f"train.grow: grows after steps {at}, wanted rising steps between 0 and train.steps = {config.train.steps}.")
    if any(factor < 0 for _, factor in config.optim.rates):
        raise UserError(f"optim.rates: got {config.optim.rates}, wanted factors of at least 0 (0 freezes a group).")
    start, grows = config.initialize.start, bool(config.initialize.grow)
    if start != "continue" and config.initialize.source == "random":
        raise UserError(f"initialize.start: {start} goes on with a run, but initialize.source is random. Name the run as initialize.source.")
    if (start == "resume" and grows) or (start == "grow" and not grows):
        raise UserError(
            f"initialize.start: {start} with {len(config.initialize.grow)} growth operators; use grow to grow a run and resume to take it as it is."
        )
    starts = [start for start, _ in config.mixture.phases]
    if starts and (starts[0] != 0 or sorted(set(starts)) != starts):
        raise UserError(f"mixture.phases: start at steps {starts}, wanted 0 first and then rising.")


def parse_override(text: str, values: dict) -> tuple[str, str, Any]:
    """ "--config.train.steps=300" -> ("train", "steps", 300)"""
    path, equals, value = text.removeprefix("--config.").partition("=")
    section, _, key = path.partition(".")
    if not equals or not key:
        raise UserError(f"{text}: wanted --config.SECTION.NAME=VALUE, such as --config.train.steps=300.")
    lookup(section, values, "section", "")
    lookup(key, values[section], "knob", section + ".")
    try:
        return section, key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return section, key, value  # a bare word is a string


def lookup(name: str, known: dict[str, Any], noun: str, prefix: str):
    """known[name], or a UserError with the nearest name."""
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name, known, 1, 0.5)
    hint = f"did you mean {prefix}{near[0]}?" if near else f"there are: {', '.join(known)}."
    raise UserError(f"config: there is no {noun} {prefix}{name}; {hint}")


def fit(name: str, value: Any, wanted: Any, field: dataclasses.Field) -> Any:
    """value as the knob's type. Raises UserError where it is of another."""
    if typing.get_origin(wanted) is tuple:
        if isinstance(value, str) and typing.get_args(wanted)[0] is str:
            value = (value,)
        if isinstance(value, (list, tuple)):
            inner = typing.get_args(wanted)
            if len(inner) == 2 and inner[1] is Ellipsis:
                return tuple(fit(f"{name}[{i}]", each, inner[0], field) for i, each in enumerate(value))
            if len(inner) == len(value):
                return tuple(fit(f"{name}[{i}]", each, kind, field) for i, (each, kind) in enumerate(zip(value, inner, strict=True)))
    elif wanted is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    elif wanted is int and isinstance(value, float) and value.is_integer():  # 1e6 reads as a float
        return int(value)
    elif isinstance(value, wanted) and not (wanted is int and isinstance(value, bool)):
        choices = field.metadata["choices"]
        if choices and value not in choices:
            near = difflib.get_close_matches(value, choices, 1)
            raise UserError(f"config: {name} is {value!r}; " + (f"did you mean {near[0]!r}?" if near else f"it may be: {', '.join(choices)}."))
        return value
    kind = wanted if isinstance(wanted, types.GenericAlias) else wanted.__name__
    raise UserError(f"config: {name} is {value!r}, wanted {kind}: {field.metadata['says']}.")


def parse(description: str, add_arguments=None) -> tuple[argparse.Namespace, Config]:
    """Flags of a door that takes --config and --config.section.name=value."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Any knob of the config can be overridden: --config.train.steps=300. configs/base.py lists them all.",
    )  # fmt: skip
    parser.add_argument("--config", required=True, metavar="FILE", help="a recipe, such as configs/quickstart.py")
    parser.add_argument("--workdir", required=True, metavar="DIR", type=pathlib.Path, help="the run directory: read from and written to")
    if add_arguments:
        add_arguments(parser)
    arguments, rest = parser.parse_known_args()
    return arguments, load(arguments.config, overrides_from(rest, parser))


def overrides_from(rest: list[str], parser: argparse.ArgumentParser) -> list[str]:
    """The --config.a.b=value flags among what argparse did not know; `--config.a.b value` counts too."""
    overrides, words = [], iter(rest)
    for word in words:
        if not word.startswith("--config."):
            parser.error(f"unrecognized argument: {word}")
        overrides.append(word if "=" in word else f"{word}={next(words, '')}")
    return overrides


def source_of_base() -> str:
    """The text of configs/base.py."""
    lines = [
        '"""Every knob of jaxpt with its default, unit and consequence. Printed by `python -m jaxpt.config`; do not edit.',
        "",
        "A recipe starts from these defaults and changes what it needs: see configs/quickstart.py.",
        '"""',
        "",
        "from jaxpt.config import defaults",
        "",
        "",
        "def get_config():",
        "    c = defaults()",
    ]
    for section in dataclasses.fields(Config):
        lines += ["", f"    # {section.name}: {globals()[section.type].__doc__}"]
        for field in dataclasses.fields(globals()[section.type]):
            lines.append(f"    # {field.metadata['says']}")
            lines.append(f"    c.{section.name}.{field.name} = {literal(field.default)}")
    return "\n".join([*lines, "", "    return c", ""])


def literal(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 1000:
        return f"{value:_}"
    return f'"{value}"' if isinstance(value, str) else repr(value)


if __name__ == "__main__":
    sys.stdout.write(source_of_base())
