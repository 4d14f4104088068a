"""Define every knob once, and read a recipe into frozen, checked sections.

A knob is stated in its section: name, type, default, and help that gives its unit and consequence.
configs/base.py, the list of every knob, is printed from them by `python -m jaxpt.config`, and
`jaxpt COMMAND --help` lists those of the sections that a command reads.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import importlib.util
import inspect
import math
import pathlib
import re
import sys
import textwrap
import traceback
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from jaxpt.spec import UserError

Phases = tuple[tuple[int, dict[str, float]], ...]
T = TypeVar("T")


@typing.dataclass_transform()
def section(cls: type[T]) -> type[T]:
    """Make a frozen dataclass that type checkers take for an open one.

    A recipe assigns to the knobs of `defaults()`: an editor completes their names and refuses what
    is misspelt or of another type.
    """
    return dataclasses.dataclass(frozen=True)(cls)


def knob(default: Any, help: str, *choices: str) -> Any:
    """Return a field of a section: default, help with unit and consequence, allowed names."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices})


@section
class PrepareConfig:
    """Raw text -> a clean corpus."""

    sources: tuple[str, ...] = knob(
        (), "Text to read: KIND:WHERE or NAME=KIND:WHERE; docs/prepare.md lists the kinds."
    )
    preset: str = knob(
        "none",
        "Quality rules: none, course, gopher, c4, fineweb, prose or code; see docs/prepare.md.",
        *("none", "course", "gopher", "c4", "fineweb", "prose", "code"),
    )
    rules: tuple[str, ...] = knob(
        (),
        "Changes to the preset: '-language' drops a rule, 'min_chars(least=50)' sets or adds one, "
        "'NAME before OTHER' places it, MODULE:FUNCTION is your own.",
    )
    near_dedup: bool = knob(
        False, "Drop near-duplicates by MinHash over word 5-grams, first kept. About 2 x the time."
    )
    decontaminate: tuple[str, ...] = knob(
        (), "Benchmark files; a document that shares an n-gram with an item is dropped."
    )
    decontaminate_ngram: int = knob(
        13,
        "Words per n-gram. GPT-3's 13 are hardly ever shared by chance; shorter items are missed.",
    )
    on_error: str = knob(
        "stop",
        "A record or file that cannot be read: stop, or skip and count it "
        "(a file from where it breaks).",
        *("stop", "skip"),
    )
    heldout_frac: float = knob(
        0.02, "Fraction of documents kept out of training, by hash of the text, per source."
    )
    max_mb: float = knob(
        0.0, "MB of text per source at most, sampled by hash; 0 takes all. For quick trials."
    )
    shard_mb: int = knob(128, "MB of text per parquet shard. Smaller shards use more cores.")
    executor: str = knob(
        "local", "Where prepare and pack run: local, ray, or ray://HOST:PORT of a running cluster."
    )


@section
class TokenizerConfig:
    """Text -> token ids."""

    source: str = knob(
        "train",
        "Train one on the corpus, or the path of a SentencePiece .model, a tokenizer.json or a "
        "Hugging Face directory.",
    )
    model: str = knob(
        "bpe",
        "Algorithm when training: bpe (also saved as SentencePiece .model) or unigram.",
        *("bpe", "unigram"),
    )
    vocab_size: int = knob(
        32_000, "Tokens. More put more bytes into a token and cost V x D parameters twice."
    )
    sample_mb: int = knob(64, "MB of corpus text to train on, spread evenly over the documents.")
    control_tokens: tuple[str, ...] = knob(
        (),
        "More control tokens of a trained tokenizer, such as <|im_start|> for a chat template or "
        "<|fim_prefix|>, <|fim_suffix|>, <|fim_middle|>. Text never becomes one.",
    )
    chat_template: str = knob(
        "", "File of a Jinja chat template for the tokenizer; '' keeps the one that it has."
    )


@section
class PackConfig:
    """Documents -> packed sequences of token ids."""

    seq_len: int = knob(1024, "Tokens per sequence: the longest context that training sees.")
    method: str = knob(
        "best_fit",
        "best_fit keeps short documents whole and pads; course concatenates and splits.",
        *("best_fit", "course"),
    )
    fim_rate: float = knob(
        0.0,
        "Share of the documents that train as fill-in-the-middle (half prefix-suffix-middle, half "
        "suffix-prefix-middle). Code models use 0.5; needs a tokenizer with FIM tokens.",
    )


@section
class MixtureConfig:
    """Which sequences to train on, and in which proportions."""

    packed_paths: tuple[str, ...] = knob(
        (), "Directories written by pack; empty means WORKDIR/packed."
    )
    phases: Phases = knob(
        (), "((from step, {source: share of tokens}), ...); empty takes all in proportion."
    )
    max_epochs: tuple[tuple[str, float], ...] = knob(
        (), "((source or all, epochs), ...): refuse a run that repeats a source more often."
    )
    document_mask: bool = knob(
        True,
        "Attend only within a document; off attends to the whole sequence, as the course does.",
    )
    seed: int = knob(0, "Seed for the order of sequences.")
    allow_changed_data: str = knob(
        "",
        "Allow resuming on changed data with this fingerprint. "
        "The log lists what is no longer reproducible.",
    )


@section
class ModelConfig:
    """Architecture when training from scratch; ignored when loading weights."""

    n_layers: int = knob(12, "Transformer layers.")
    d_model: int = knob(768, "Width of the residual stream.")
    d_ff: int = knob(2048, "Width of the gated MLP.")
    n_heads: int = knob(12, "Query heads.")
    n_kv_heads: int = knob(4, "Key-value heads; divides n_heads. Fewer shrink the KV cache.")
    d_head: int = knob(64, "Width of a head; even.")
    vocab_size: int = knob(
        0, "Embedding rows; 0 means the tokenizer's size, rounded up to a multiple of 128."
    )
    max_seq_len: int = knob(4096, "Longest sequence that the model supports, in tokens.")
    rope_theta: float = knob(10_000.0, "Base of the rotary embedding; 500,000 for long contexts.")
    tie_embeddings: bool = knob(
        False, "Share embedding and output head; saves V x D parameters, good for small models."
    )
    base_shape: str = knob(
        "",
        "LAYERSxWIDTH at which the values of optim were found, such as 4x256. CompleteP transfers "
        "rates, epsilon, decay and initial values to any depth and width, through growth too.",
    )
    fields: tuple[tuple[str, object], ...] = knob(
        (),
        "((name, value), ...) of further fields of ModelSpec (jaxpt/spec.py), such as "
        "(('norm_eps', 1e-6), ('family', 'qwen3'), ('qk_norm', True)).",
    )


@section
class InitializeConfig:
    """Where the initial weights come from."""

    source: str = knob(
        "random",
        "random, a run or checkpoint directory, a Hugging Face directory or hf:NAME; of a model, "
        "or of a LoRA adapter, which is merged into its base.",
    )
    base: str = knob(
        "",
        "Base of a LoRA adapter in source: a Hugging Face directory or hf:NAME; empty takes the "
        "one that its adapter_config.json names.",
    )
    mode: str = knob(
        "continue",
        "continue: step 0, fresh optimizer, new schedule; resume: the source run with its "
        "optimizer, schedule and data order; grow: resume with a grown model.",
        *("continue", "resume", "grow"),
    )
    grow: tuple[str, ...] = knob(
        (), "Growth operators in order, such as 'depth_upscale(m=4)'; see docs/growth.md."
    )
    moments: str = knob(
        "reset_new",
        "Optimizer moments through growth: fresh, copy, copy_scaled, or reset_new, "
        "which re-warms new parameters.",
        *("fresh", "copy", "copy_scaled", "reset_new"),
    )
    param_dtype: str = knob(
        "float32",
        "Dtype of parameters in training; bfloat16 halves memory and rounds small updates away.",
        *("float32", "bfloat16"),
    )
    seed: int = knob(0, "Seed for parameter initialization.")


@section
class TrainConfig:
    """The training loop."""

    steps: int = knob(1000, "Optimizer steps in the whole run.")
    grow: tuple[tuple[int, str], ...] = knob(
        (), "Growth during the run: ((after this many steps, operator), ...), rising."
    )
    batch_size: int = knob(
        32, "Global batch in sequences. Tokens per step = batch_size x pack.seq_len."
    )
    shape_schedule: tuple[tuple[int, int, int], ...] = knob(
        (),
        "((from step, batch size, tokens per sequence), ...) in place of batch_size x "
        "pack.seq_len: packed sequences are cut into equal parts.",
    )
    grad_accum_steps: int = knob(
        1, "Micro-batches per step. Same result, 1/n of the activation memory, somewhat slower."
    )
    compute_dtype: str = knob(
        "float32",
        "Dtype for matmuls and activations: bfloat16 on GPU and TPU, float32 on CPU.",
        *("float32", "bfloat16"),
    )
    matmul_dtype: str = knob(
        "compute",
        "Dtype of the layers' large matmuls in training: compute_dtype, float8 (Hopper, Ada and "
        "newer, TPU7x) or int8 in forward (TPU v5e, v5p, v6e). See docs/train.md.",
        *("compute", "float8", "int8"),
    )
    attention: str = knob(
        "auto",
        "Attention kernel; auto takes the platform's where it supports the run. "
        "See docs/performance.md.",
        *("auto", "xla", "splash", "cudnn"),
    )
    experts: str = knob(
        "auto",
        "Kernel for a mixture's experts; auto takes the platform's where it supports the run. "
        "See docs/moe.md.",
        *("auto", "scan", "megablox", "tokamax"),
    )
    remat: str = knob(
        "none",
        "Activation checkpointing policy, from most memory to least: none, dots, minimal, full. "
        "offload is dots kept in host memory.",
        *("none", "minimal", "dots", "full", "offload"),
    )
    unroll_layers: int = knob(
        0,
        "Layers in the body of the loop over layers: more take longer to compile, and a CPU less "
        "time for a step; 0: as many as the run's length pays for there, one on an accelerator. "
        "See docs/performance.md.",
    )
    dpo_beta: float = knob(
        0.0,
        "Learn preferences from pairs (DPO), against the initial model: 0.1 is usual, less lets it "
        "move further away. Needs data of pairs; 0: the next token.",
    )
    z_loss_weight: float = knob(
        0.0, "Weight of log(Z)^2, which keeps logits small; 1e-4 for long bfloat16 runs."
    )
    spike_factor: float = knob(
        0.0,
        "Skip an update whose gradient norm exceeds this many times its running mean; "
        "0 skips only non-finite ones.",
    )
    max_consecutive_skips: int = knob(20, "Consecutive skipped updates that stop the run.")
    stop_above: float = knob(
        3.0,
        "Stop a run whose loss stays above this many times the data's unigram entropy, and save "
        "nothing there; 0: never.",
    )
    log_every: int = knob(10, "Steps between console lines and metrics.jsonl records.")
    eval_every: int = knob(200, "Steps between held-out losses; 0 measures at the end only.")
    eval_sequences: int = knob(256, "Held-out sequences per source and evaluation, at most.")
    eval_tasks: tuple[str, ...] = knob(
        (),
        "Benchmarks scored with each held-out loss, as jaxpt evaluate names them (needs "
        "requirements-eval.txt).",
    )
    eval_items: int = knob(200, "Items of each benchmark: its first ones, the same each time.")
    eval_dir: str = knob(
        "", "Where the benchmarks' files are, as of evaluate --data-dir; '': the harness's cache."
    )
    max_forgetting: float = knob(
        0.0,
        "Nats per token by which a source's held-out loss may exceed the parent's before "
        "on_forgetting acts; 0: any.",
    )
    on_forgetting: str = knob(
        "stop",
        "Past max_forgetting: warn, stop at a checkpoint, or replay: double that source's share "
        "from here on (up to half).",
        *("warn", "stop", "replay"),
    )
    checkpoint_every: int = knob(500, "Steps between checkpoints: the most that a kill loses.")
    checkpoint_minutes: float = knob(
        0.0, "Also save when this many minutes passed without a checkpoint; 0: by steps alone."
    )
    max_to_keep: int = knob(
        2,
        "Newest checkpoints kept; each holds parameters, optimizer state and an average: 12 bytes "
        "per parameter with float32 AdamW.",
    )
    keep_every: int = knob(
        0, "Checkpoints at multiples of this many steps are kept for good; 0: none."
    )
    on_save_error: str = knob(
        "stop",
        "A checkpoint that cannot be written (full disk): stop, or continue and try the next.",
        *("stop", "continue"),
    )
    wandb_project: str = knob(
        "", "Weights & Biases project that also gets every record (pip install wandb)."
    )
    prometheus_file: str = knob(
        "",
        "NAME.prom that always holds the newest records in Prometheus' text format, in "
        "node_exporter's textfile directory; '': none.",
    )
    profile_steps: tuple[int, ...] = knob(
        (), "(first, last) steps recorded by the JAX profiler into WORKDIR/tensorboard."
    )


@section
class OptimConfig:
    """The optimizer and its schedule."""

    name: str = knob(
        "adamw",
        "adamw; muon orthogonalizes the updates of a layer's matrices and needs half their "
        "moments; adafactor keeps mean squares by row and column. Keep the one that a base model "
        "was trained with.",
    )
    moment_dtype: str = knob(
        "params",
        "Dtype of moments between updates: the parameters', bfloat16 (2 bytes each) or int8 (1, "
        "with a scale per block); both are rounded stochastically.",
        *("params", "bfloat16", "int8"),
    )
    peak_lr: float = knob(3e-4, "Learning rate after warm-up.")
    end_lr_frac: float = knob(0.1, "Learning rate at the last step, as a fraction of peak_lr.")
    schedule: str = knob(
        "wsd",
        "After warm-up: wsd is constant, then falls over decay_frac; cosine; linear; constant.",
        *("wsd", "cosine", "linear", "constant"),
    )
    warmup_frac: float = knob(
        0.1, "Initial fraction of the steps in which the rate rises. Too few are noisy updates."
    )
    decay_frac: float = knob(0.2, "Final fraction of the steps in which wsd decays, linearly.")
    average: float = knob(
        0.0,
        "Average the weights on the device: 500 is the mean of the last 500 steps at the constant "
        "rate, 0.999 the decay of a moving average over them all; 0: none. One more copy.",
    )
    lr_multipliers: tuple[tuple[str, float], ...] = knob(
        (),
        "((group, multiplier), ...), multiplied together; 0 freezes. Groups: old, new (by the last "
        "growth), a parameter's name, layers A-B.",
    )
    batch_power: float = knob(
        0.0,
        "With train.shape_schedule: multiply the rate by (tokens per step / those of the first "
        "step) to this power. 0.5 is the square-root rule.",
    )
    b1: float = knob(0.9, "Adam's decay of the mean.")
    b2: float = knob(0.95, "Adam's decay of the square; 0.999 for small batches and short runs.")
    eps: float = knob(1e-8, "Adam's epsilon.")
    weight_decay: float = knob(
        0.1, "Decoupled weight decay, on matrices only (not on norms, biases, embeddings)."
    )
    clip_norm: float = knob(1.0, "Clip gradients to this global norm; 0: do not clip.")


@section
class LoraConfig:
    """Training low-rank adapters on a frozen base."""

    rank: int = knob(
        0,
        "Train adapters of this rank (LoRA) on the model of initialize.source and freeze the rest: "
        "only adapters have optimizer state. 0 trains all weights. 8 to 64 are usual.",
    )
    alpha: float = knob(
        32.0, "An adapter's output is times alpha / rank. Learning rates are about 10 x the usual."
    )
    targets: tuple[str, ...] = knob(
        (),
        "Matrices that get adapters, such as q and v; empty takes q, k, v, o and a dense MLP's "
        "gate, up, down.",
    )


@section
class DistillConfig:
    """Learning from a frozen teacher: (1 - a) CE + a T^2 KL; see docs/distill.md."""

    teacher: str = knob(
        "",
        "A run, checkpoint, Hugging Face directory or hf:NAME with the student's tokenizer, or "
        "what jaxpt teacher_logits wrote; empty: none. Its forward pass adds to each step's time.",
    )
    alpha: tuple[float, float] = knob(
        (0.9, 0.5),
        "Weight a of the KL at the first and at the last step, linear between; 0 to 1.",
    )
    temperature: float = knob(
        1.0, "T, by which both models' logits are divided. Above 1 shows more of unlikely tokens."
    )
    direction: str = knob(
        "forward",
        "forward is KL(teacher || student), which covers all that the teacher holds likely; "
        "reverse is KL(student || teacher), which avoids what it holds unlikely.",
        *("forward", "reverse"),
    )


@section
class MeshConfig:
    """Devices along each mesh axis; -1 on one axis takes the rest."""

    replica: int = knob(1, "Data parallelism with whole copies, between slices or hosts.")
    fsdp: int = knob(-1, "Data parallelism with sharded parameters (fast links).")
    expert: int = knob(1, "Data parallelism with sharded experts; divides n_experts.")
    tensor: int = knob(1, "Tensor parallelism over heads and MLP; divides n_kv_heads.")
    context: int = knob(1, "Context parallelism over positions; divides seq_len.")


@section
class PlanConfig:
    """Inputs of the planner."""

    tokens: float = knob(
        0.0, "Tokens to train for; 0 means train.steps x train.batch_size x pack.seq_len."
    )
    usd_per_hour: float = knob(
        0.0, "Price of one device per hour; 0 takes the list price in hardware.py."
    )


@section
class Config:
    """All sections of a recipe."""

    prepare: PrepareConfig = PrepareConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    pack: PackConfig = PackConfig()
    mixture: MixtureConfig = MixtureConfig()
    model: ModelConfig = ModelConfig()
    initialize: InitializeConfig = InitializeConfig()
    train: TrainConfig = TrainConfig()
    optim: OptimConfig = OptimConfig()
    lora: LoraConfig = LoraConfig()
    distill: DistillConfig = DistillConfig()
    mesh: MeshConfig = MeshConfig()
    plan: PlanConfig = PlanConfig()


class Draft:
    """Knobs of a section, or the sections, while a recipe changes them.

    It refuses an unknown name; values are checked when the recipe has ended.
    """

    def __init__(self, values: dict[str, Any], path: str = ""):
        vars(self).update(_values=values, _path=path)

    def __getattr__(self, name: str) -> Any:
        """Return a knob or section."""
        return lookup_name(name, self._values, "knob" if self._path else "section", self._path)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set a knob that exists."""
        getattr(self, name)
        if not self._path:
            raise UserError(f"config: {name} is a section. Set its knobs: c.{name}.NAME = VALUE.")
        self._values[name] = value

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Return section -> knob -> value."""
        return {name: dict(section._values) for name, section in self._values.items()}


def defaults() -> Config:
    """Return every knob at its default, for a recipe to change."""
    sections = dataclasses.asdict(Config())
    drafts = {name: Draft(knobs, f"{name}.") for name, knobs in sections.items()}
    return typing.cast(Config, Draft(drafts))


def ramp_phases(
    start: int, stop: int, before: dict[str, float], after: dict[str, float], n: int = 16
) -> Phases:
    """Return phases of the mixture that shift gradually from one to another.

    There are n equal steps of constant shares. In a recipe:
    `c.mixture.phases = ((0, {"prose": 1}), *ramp_phases(8_000, 10_000, {"prose": 1}, {"code": 1}))`
    """
    n = max(1, min(n, stop - start))
    names = list({**before, **after})
    before_sum = sum(before.values())
    after_sum = sum(after.values())
    phases = []
    for i in range(n + 1):
        mixed = {}
        for name in names:
            old = before.get(name, 0) / before_sum
            new = after.get(name, 0) / after_sum
            mixed[name] = (1 - i / n) * old + i / n * new
        step = start + (stop - start) * i // n
        phases.append((step, mixed))
    return tuple(phases)


def load_config(path: str | pathlib.Path, overrides: typing.Sequence[str] = ()) -> Config:
    """Read a recipe and apply overrides.

    Args:
        path: `configs/quickstart.py`, or `configs/quickstart.py:child` for get_config("child").
        overrides: such as "--config.train.steps=300".

    Raises:
        UserError: something is missing, misspelt or of the wrong type.
    """
    name, _, argument = str(path).partition(":")
    file = pathlib.Path(name)
    check_recipe_file(path, file)
    try:
        draft = run_recipe(file, [argument] if argument else [])
    except UserError as error:
        raise UserError(f"--config {path}{find_line(error, file)}: {error}") from None
    except SyntaxError as error:
        raise UserError(f"--config {path}, line {error.lineno}: {error.msg}") from None
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"--config {path}{find_line(error, file)}: {reason}") from error
    if not isinstance(draft, Draft):
        raise UserError(
            f"--config {path}: expected get_config() to return what it got from defaults(), "
            f"got {draft!r:.40}. Does it end with `return c`?"
        )
    values = apply_overrides(overrides, draft.to_dict())
    return build_config(values)


def check_recipe_file(path: str | pathlib.Path, file: pathlib.Path) -> None:
    """Raise UserError unless a file is there that can be a recipe."""
    if not file.exists():
        names = [other.name for other in file.parent.glob("*.py")]
        hint = "Recipes are in configs/."
        for near in difflib.get_close_matches(file.name, names, 1):
            hint = f"Did you mean {file.parent / near}?"
        raise UserError(f"--config {path}: file not found. {hint}")
    if file.is_dir() or file.suffix != ".py":
        kind = "a directory" if file.is_dir() else f"{file.name}"
        raise UserError(
            f"--config {path}: expected a recipe, a Python file with get_config(), got {kind}. "
            "Copy configs/quickstart.py and set its knobs, such as c.train.steps = 300."
        )


def run_recipe(file: pathlib.Path, arguments: list[str]) -> Any:
    """Return what a recipe's get_config returns. It raises whatever the recipe does."""
    module_spec = importlib.util.spec_from_file_location(f"_config_{file.stem}", file)
    assert module_spec and module_spec.loader
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    function = getattr(module, "get_config", None)
    if not callable(function):
        raise UserError(
            "has no function get_config(). A recipe's begins with `c = defaults()` and ends with "
            "`return c`; see configs/quickstart.py."
        )
    check_recipe_arguments(function, arguments)
    return function(*arguments)


def check_recipe_arguments(function: Callable[..., Any], arguments: list[str]) -> None:
    """Raise UserError unless get_config takes the argument, by its number and its Literal."""
    signature = inspect.signature(function)
    try:
        bound = signature.bind(*arguments)
    except TypeError:
        parameters = ", ".join(signature.parameters)
        raise UserError(
            f"get_config({parameters}) does not take {arguments}; what it takes is given as "
            "FILE.py:VALUE."
        ) from None
    hints = typing.get_type_hints(function)
    for name, value in bound.arguments.items():
        check_choice(name, value, typing.get_args(hints.get(name)))


def find_line(error: Exception, file: pathlib.Path) -> str:
    """Return ", line 12", of the recipe's line that failed; "" where it is none of them."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if pathlib.Path(frame.filename) == file.absolute()]
    return f", line {lines[-1]}" if lines else ""


def apply_overrides(
    overrides: typing.Sequence[str], values: dict[str, dict[str, Any]] | None = None
) -> dict[str, dict[str, Any]]:
    """Return nested plain values (default: the defaults) with overrides applied."""
    values = values or dataclasses.asdict(Config())
    for override in overrides:
        section, key, value = parse_override(override, values)
        values[section][key] = value
    return values


def build_config(values: dict[str, dict[str, Any]]) -> Config:
    """Return nested plain values as frozen, checked sections. Raise UserError naming the knob."""
    known_sections = {}
    for field in dataclasses.fields(Config):
        section = getattr(Config(), field.name)
        known_sections[field.name] = type(section)
    sections = {}
    for name, fields in values.items():
        section = lookup_name(name, known_sections, "section", "")
        sections[name] = build_section(name, section, fields)
    config = Config(**sections)
    check_config(config)
    return config


def build_section(name: str, section: type, values: dict[str, Any]) -> Any:
    """Return one section of the config with its values checked."""
    knobs = {field.name: field for field in dataclasses.fields(section)}
    hints = typing.get_type_hints(section)
    checked = {}
    for key, value in values.items():
        field = lookup_name(key, knobs, "knob", name + ".")
        checked[key] = coerce_value(f"{name}.{key}", value, hints[key], field)
    return section(**checked)


def check_config(config: Config) -> None:
    """Raise UserError for knobs that are out of range or do not agree with each other."""
    check_train(config.train)
    check_shapes(config.train, config.pack.seq_len)
    check_profile_steps(config.train)
    check_control_tokens(config.tokenizer.control_tokens)
    if not 0 <= config.prepare.heldout_frac < 1:
        raise UserError(
            "prepare.heldout_frac: expected a fraction from 0 up to 1, "
            f"got {config.prepare.heldout_frac}."
        )
    if config.pack.seq_len < 8:
        raise UserError(f"pack.seq_len: expected at least 8 tokens, got {config.pack.seq_len}.")
    if not 0 <= config.pack.fim_rate <= 1:
        raise UserError(
            f"pack.fim_rate: expected a fraction from 0 to 1, got {config.pack.fim_rate}."
        )
    check_phases(config.mixture.phases)
    if any(multiplier < 0 for _, multiplier in config.optim.lr_multipliers):
        raise UserError(
            "optim.lr_multipliers: expected multipliers of at least 0 (0 freezes a group), "
            f"got {config.optim.lr_multipliers}."
        )
    average = config.optim.average
    if average < 0 or (average > 1 and not average.is_integer()):
        raise UserError(
            "optim.average: expected a whole number of steps, a decay between 0 and 1, or 0, "
            f"got {average:g}."
        )
    if not 0 <= config.optim.warmup_frac < 1:
        raise UserError(
            "optim.warmup_frac: expected a fraction of the steps from 0 up to 1, "
            f"got {config.optim.warmup_frac}."
        )
    check_mode(config.initialize)
    check_lora(config)
    check_distill(config.distill)
    check_dpo(config)


def check_control_tokens(names: Sequence[str]) -> None:
    """Raise UserError for control tokens that a tokenizer cannot have."""
    taken = {"<unk>", "<s>", "</s>"}
    for name in names:
        if name in taken or len(name) < 2 or re.search(r"\s|▁|^<0x..>$", name):
            raise UserError(
                f"tokenizer.control_tokens: expected names of two characters or more without white "
                f"space, each once and none of <unk>, <s>, </s> and <0x00> to <0xFF>, got {name!r}."
            )
        taken.add(name)


def check_train(train: TrainConfig) -> None:
    """Raise UserError for values of the section train that cannot be."""
    positive = "steps batch_size grad_accum_steps log_every checkpoint_every max_to_keep"
    for name in positive.split():
        if getattr(train, name) < 1:
            raise UserError(f"train.{name}: expected at least 1, got {getattr(train, name)}.")
    if train.unroll_layers < 0:
        raise UserError(f"train.unroll_layers: expected at least 0, got {train.unroll_layers}.")
    if train.batch_size % train.grad_accum_steps:
        raise UserError(
            f"train.grad_accum_steps: {train.batch_size} sequences cannot be split into "
            f"{train.grad_accum_steps} equal micro-batches. Use a divisor of {train.batch_size}."
        )
    if train.prometheus_file and not train.prometheus_file.endswith(".prom"):
        raise UserError(
            "train.prometheus_file: expected a name that ends in .prom, as node_exporter reads no "
            f"other, got {train.prometheus_file}."
        )
    at = [step for step, _ in train.grow]
    is_rising = sorted(set(at)) == at
    if not is_rising or any(not 0 < step < train.steps for step in at):
        raise UserError(
            f"train.grow: expected rising steps between 0 and train.steps = {train.steps}, "
            f"got {at}."
        )


def check_shapes(train: TrainConfig, packed_len: int) -> None:
    """Raise UserError for a schedule of shapes that cannot be read from the packed sequences."""
    starts = [start for start, _, _ in train.shape_schedule]
    if starts and (starts[0] != 0 or sorted(set(starts)) != starts or starts[-1] >= train.steps):
        raise UserError(
            f"train.shape_schedule: expected steps that start at 0 and rise below train.steps = "
            f"{train.steps}, got {starts}."
        )
    for start, batch_size, seq_len in train.shape_schedule:
        where = f"train.shape_schedule, from step {start}"
        if seq_len < 8 or packed_len % seq_len:
            raise UserError(
                f"{where}: expected sequences of at least 8 tokens that divide pack.seq_len = "
                f"{packed_len}, got {seq_len}. Set pack.seq_len to a multiple of it."
            )
        n = packed_len // seq_len
        if batch_size < 1 or batch_size % n or batch_size % train.grad_accum_steps:
            n = math.lcm(n, train.grad_accum_steps)
            raise UserError(
                f"{where}: expected a batch that makes up whole packed sequences of {packed_len} "
                f"tokens and equal micro-batches, a multiple of {n} sequences, got {batch_size}."
            )


def check_profile_steps(train: TrainConfig) -> None:
    """Raise UserError for steps to record that the run does not make."""
    steps = train.profile_steps
    is_within = len(steps) == 2 and 1 <= steps[0] <= steps[1] <= train.steps
    if steps and not is_within:
        raise UserError(
            f"train.profile_steps: expected (first, last) within the run's steps 1 to "
            f"{train.steps:,}, got {steps}."
        )


def check_phases(phases: Phases) -> None:
    """Raise UserError for phases without shares or not in order."""
    for start, shares in phases:
        has_negative = any(share < 0 for share in shares.values())
        if has_negative or sum(shares.values()) <= 0:
            raise UserError(
                f"mixture.phases: expected shares of at least 0, with at least one above 0, "
                f"from step {start}, got {shares}."
            )
    starts = [start for start, _ in phases]
    is_rising = sorted(set(starts)) == starts
    if starts and (starts[0] != 0 or not is_rising):
        raise UserError(f"mixture.phases: expected steps that start at 0 and rise, got {starts}.")


def check_mode(initialize: InitializeConfig) -> None:
    """Raise UserError where initialize.mode does not go with the source or the operators."""
    mode = initialize.mode
    n_operators = len(initialize.grow)
    if mode != "continue" and initialize.source == "random":
        raise UserError(
            f"initialize.mode: {mode} needs a run, but initialize.source is random. "
            "Set initialize.source to the run."
        )
    forbidden = mode == "resume" and n_operators > 0
    missing = mode == "grow" and n_operators == 0
    if forbidden or missing:
        raise UserError(
            f"initialize.mode: {mode} with {n_operators} growth operators; "
            "use grow to grow a run and resume to leave it as it is."
        )


def check_lora(config: Config) -> None:
    """Raise UserError where adapters do not go with the rest of a recipe."""
    rank, initialize = config.lora.rank, config.initialize
    if rank < 0:
        raise UserError(f"lora.rank: expected 0 (no adapters) or more, got {rank}.")
    if rank and initialize.source == "random":
        raise UserError(
            f"lora.rank: {rank} needs a base to freeze, but initialize.source is random. "
            "Set initialize.source to the model to adapt."
        )
    if rank and initialize.mode != "continue":
        raise UserError(
            f"lora.rank: {rank} starts an optimizer of its own, but initialize.mode is "
            f"{initialize.mode}. Use continue."
        )
    if rank and config.train.grow:
        raise UserError(
            f"lora.rank: {rank} with train.grow: a frozen base does not grow during the run. "
            "Grow it before, with initialize.grow."
        )


def check_distill(distill: DistillConfig) -> None:
    """Raise UserError for numbers that make no loss."""
    if not all(0 <= alpha <= 1 for alpha in distill.alpha):
        raise UserError(f"distill.alpha: expected weights from 0 to 1, got {distill.alpha}.")
    if not 0 < distill.temperature < math.inf:
        raise UserError(
            f"distill.temperature: expected a number above 0, got {distill.temperature}."
        )


def check_dpo(config: Config) -> None:
    """Raise UserError where learning from pairs does not go with the rest of a recipe."""
    train, beta = config.train, config.train.dpo_beta
    if not 0 <= beta < math.inf:
        raise UserError(f"train.dpo_beta: expected 0 (no pairs) or more, got {beta}.")
    start, masked = config.initialize, config.mixture.document_mask
    conflicts = {
        "initialize.source=random, which is no reference": start.source == "random",
        f"initialize.mode={start.mode}: use continue": start.mode != "continue",
        "train.grow: the reference does not grow": bool(train.grow),
        "train.shape_schedule: cut sequences would separate the answers of a pair": bool(
            train.shape_schedule
        ),
        "distill.teacher: learn from pairs or from a teacher": bool(config.distill.teacher),
        "mixture.document_mask=False: answers would see each other": not masked,
    }
    for conflict, is_there in conflicts.items():
        if beta and is_there:
            raise UserError(f"train.dpo_beta: {beta:g} does not go with {conflict}.")


def parse_override(text: str, values: dict[str, dict[str, Any]]) -> tuple[str, str, Any]:
    """Return ("train", "steps", 300) for "--config.train.steps=300"."""
    path, equals, value = text.removeprefix("--config.").partition("=")
    section, _, key = path.partition(".")
    if not equals or not key:
        raise UserError(
            f"{text}: expected --config.SECTION.NAME=VALUE, such as --config.train.steps=300."
        )
    lookup_name(section, values, "section", "")
    lookup_name(key, values[section], "knob", section + ".")
    try:
        return section, key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return section, key, value  # a bare word is a string


def lookup_name(name: str, known: dict[str, Any], noun: str, prefix: str) -> Any:
    """Return known[name]. Raise UserError with the nearest name if there is none."""
    if name in known:
        return known[name]
    hint = suggest_name(name, known, prefix)
    raise UserError(f"config: there is no {noun} {prefix}{name}; {hint}")


def suggest_name(name: str, known: typing.Iterable[str], prefix: str = "") -> str:
    """Return the end of an error message: the nearest name, or all."""
    known = list(known)
    for near in difflib.get_close_matches(name, known, 1, 0.5):
        return f"did you mean {prefix}{near}?"
    return f"expected one of {', '.join(known)}."


def coerce_value(name: str, value: Any, expected: Any, field: dataclasses.Field[Any]) -> Any:
    """Return a value as the knob's type. Raise UserError if it has another."""
    is_bool = isinstance(value, bool)
    if typing.get_origin(expected) is tuple:
        items = coerce_tuple(name, value, expected, field)
        if items is not None:
            return items
    elif typing.get_origin(expected) is dict:
        if isinstance(value, dict):
            return value
    elif expected is float and isinstance(value, (int, float)) and not is_bool:
        return float(value)
    elif expected is int and isinstance(value, float) and value.is_integer():  # 1e6 is a float
        return int(value)
    elif isinstance(value, expected) and not (expected is int and is_bool):
        check_choice(name, value, field.metadata["choices"])
        return value
    kind = expected
    if not isinstance(expected, types.GenericAlias):
        kind = expected.__name__
    raise UserError(f"config: {name}: expected {kind}, got {value!r}: {field.metadata['help']}")


def coerce_tuple(name: str, value: Any, expected: Any, field: dataclasses.Field[Any]) -> Any:
    """Return a tuple with its items coerced; None if the value is no such tuple."""
    inner = typing.get_args(expected)
    if isinstance(value, str) and inner[0] is str:
        value = (value,)
    if not isinstance(value, (list, tuple)):
        return None
    if inner[1:] == (Ellipsis,):
        inner = (inner[0],) * len(value)
    if len(inner) != len(value):
        return None
    items = []
    for item, kind in zip(value, inner, strict=True):
        items.append(coerce_value(f"{name}[{len(items)}]", item, kind, field))
    return tuple(items)


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raise UserError for a name that is not among the choices of a knob."""
    if choices and value not in choices:
        hint = f"expected one of {', '.join(choices)}."
        for near in difflib.get_close_matches(value, choices, 1):
            hint = f"did you mean {near!r}?"
        raise UserError(f"config: {name} is {value!r}; {hint}")


HEADER = '''"""Every knob of jaxpt with default, unit and consequence.

Printed by `python -m jaxpt.config`.

A recipe starts from these defaults and changes what it needs: see configs/quickstart.py.
"""

from jaxpt.config import defaults


def get_config():
    c = defaults()
'''


def render_base_config() -> str:
    """Return the text of configs/base.py."""
    lines = [HEADER.rstrip()]
    for section_field in dataclasses.fields(Config):
        section = type(getattr(Config(), section_field.name))
        lines += ["", f"    # ---- {section_field.name}: {section.__doc__}"]
        for field in dataclasses.fields(section):
            lines += textwrap.wrap(
                field.metadata["help"], 100, initial_indent="    # ", subsequent_indent="    # "
            )
            value = format_literal(field.default)
            lines.append(f"    c.{section_field.name}.{field.name} = {value}")
    return "\n".join([*lines, "", "    return c", ""])


def format_literal(value: Any) -> str:
    """Return a default as Python source: 32_000, "adamw"."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 1000:
        return f"{value:_}"
    if isinstance(value, str):
        return f'"{value}"'
    return repr(value)


if __name__ == "__main__":
    sys.stdout.write(render_base_config())
