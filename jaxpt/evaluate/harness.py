"""Evaluate a model on tasks of lm-evaluation-harness and by bits per byte.

`evaluate_model` computes with jaxpt or with transformers, and returns results in the harness's own
format, with the origin of the model.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import itertools
import json
import logging
import math
import os
import pathlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import jax

from jaxpt import config, io, stage
from jaxpt.data import benchmarks, sources, tokenizer
from jaxpt.data.chat import ChatTemplate
from jaxpt.evaluate import answers, contamination, likelihood, long_context, reference
from jaxpt.model import decode, transformer
from jaxpt.sharding import make_mesh
from jaxpt.spec import ModelSpec, UserError, describe_nonfinite
from jaxpt.text import format_table
from jaxpt.weights import checkpoint, huggingface
from jaxpt.weights.load import LoadedModel, fingerprint_model, load_model, open_tokenizer

if TYPE_CHECKING:
    from lm_eval.api.model import LM

log = logging.getLogger(__name__)


class TaskRequest(NamedTuple):
    """How a task is run.

    Attributes:
        items: read of it; None: all.
        shots: examples in front of each item; None: as the task defines it.
    """

    items: int | None = None
    shots: int | None = None


class ChatRequest(NamedTuple):
    """The harness's settings for chat models.

    Attributes:
        apply_template: its prompts go through the chat template.
        fewshot_as_multiturn: examples are turns of the conversation.
    """

    apply_template: bool = False
    fewshot_as_multiturn: bool = False


GROUPS: dict[str, dict[str, TaskRequest]] = {
    "course": {"truthfulqa_mc2": TaskRequest(items=5)},
    "h6": {  # the Open LLM Leaderboard of 2023, in whose average SOLAR's paper reports
        "arc_challenge": TaskRequest(shots=25),
        "hellaswag": TaskRequest(shots=10),
        "mmlu": TaskRequest(shots=5),
        "truthfulqa_mc2": TaskRequest(shots=0),
        "winogrande": TaskRequest(shots=5),
        "gsm8k": TaskRequest(shots=5),
    },
}
BITS_PER_BYTE, BY_POSITION, NEEDLE = ("bits_per_byte/", "by_position/", "needle/")


class TextTask(NamedTuple):
    """A measure of raw text, one of those above, and the source of the text."""

    measure: str
    source: sources.TextSource

    @property
    def name(self) -> str:
        """Return the task's name in the results."""
        return self.measure + self.source.name


SplitRows = dict[str, list[dict]]  # split -> rows of a task's file
LocalRows = dict[str, SplitRows]  # task -> rows that replace the harness's own files
Samples = dict[str, list[dict]]  # task -> what the harness logged of each item


class Benchmarks(NamedTuple):
    """Tasks of the harness: how each is run, and the rows of those that are read from files."""

    asked: dict[str, TaskRequest]
    local: LocalRows


def open_benchmarks(names: Sequence[str], limit: int, data_dir: io.Path | None) -> Benchmarks:
    """Return the tasks of these names, as `evaluate_model` runs them.

    Raises:
        UserError: the harness is not installed, there is no such task, or no file of it.
    """
    texts, asked = parse_tasks(list(names), limit, data_dir)
    if texts:
        raise UserError("--tasks: held-out losses measure texts already. Name benchmarks.")
    return Benchmarks(asked, load_local_rows(asked, data_dir))


def evaluate_model(
    model: io.Path,
    tasks: list[str],
    *,
    backend: str = "jax",
    limit: int | None = None,
    max_length: int | None = None,
    data_dir: io.Path | None = None,
    to: io.Path | None = None,
    chat: ChatRequest = ChatRequest(),
    by_position: bool = False,
) -> dict[str, Any]:
    """Evaluate a model, print a table, and write the results to `to`.

    Args:
        model: a run, a checkpoint step directory or a Hugging Face directory.
        tasks: the harness's task names, `course`, `h6`, or bits_per_byte/[NAME=]KIND:WHERE (a
            source, see docs/prepare.md), or needle/[NAME=]KIND:WHERE.
        backend: "jax": jaxpt; "hf": transformers and torch, on a temporary export if the model is
            no Hugging Face directory.
        limit: items (of a benchmark) or documents (of a source) read of each task; None: all.
        max_length: tokens that the model sees at once; None: its own context.
        data_dir: where benchmark files are; None: the harness downloads its own.
        to: the file to write.
        chat: whether the harness puts its prompts into the model's chat template.
        by_position: whether each bits_per_byte source is also measured by position.

    Returns:
        The results as JSON, in the harness's format.

    Raises:
        UserError: a task is unknown, the tokenizer or a benchmark file is missing, or packages are
            not installed.
    """
    start = time.monotonic()
    if limit is not None and limit < 1:
        raise UserError(f"--limit: got {limit}, expected at least 1 item.")
    if max_length is not None and max_length < 2:
        raise UserError(f"--max-length: got {max_length}, expected at least 2 tokens.")
    texts, asked = parse_tasks(tasks, limit, data_dir)
    if by_position:
        texts = add_by_position(texts)
    check_text_tasks(texts, backend)
    local = load_local_rows(asked, data_dir)
    read: dict[str, str] = {}
    for source in [task.source for task in texts]:
        source.check_published()
        read |= source.list_object_tags()
        for key, path in source.fingerprint_inputs().items():
            read[key] = stage.fingerprint_path(path)
    model_print = fingerprint_model(model)
    local_print = stage.fingerprint(local)
    names = [text.name for text in texts]
    asked_for = [model_print, tasks, names, backend, limit, max_length, read, local_print, chat]
    request = stage.fingerprint(asked_for)
    earlier = stage.read_cached_result(to, request)
    if earlier:
        print(io.printable(format_results(earlier), keep="\n"))
        log.info(f"evaluate: {to} holds this already, nothing to do")
        return earlier
    mesh = make_mesh(config.MeshConfig())
    loaded = load_model(model, mesh)
    spec, tokenizer_dir = loaded.spec, loaded.tokenizer_dir
    if tokenizer_dir is None:
        raise UserError(
            f"{model}: has no tokenizer beside it (tokenizer.json), so no "
            "text can be scored. Copy there the one it was trained with."
        )
    encoder = open_tokenizer(loaded)
    if chat.apply_template:
        ChatTemplate(encoder, str(model))  # or it is refused
    computed_by = "our code" if backend == "jax" else "transformers"
    n_params = transformer.count_params(spec)
    log.info(f"evaluate: {model}, {n_params:,} parameters, by {computed_by}")

    # answers so far, from which an interrupted evaluation of this request continues
    kept = None
    if to:
        beside = to.parent
        if isinstance(beside, io.BucketPath):
            beside = io.cache_directory() / "answers"
        io.make_directory(beside)
        kept = beside / f".{to.stem}-{request}"
    length = min(max_length or spec.max_seq_len, spec.max_seq_len)
    results: dict[str, Any] = {"results": {}, "versions": {}, "n-samples": {}, "reasons": {}}
    samples: Samples = {}
    with contextlib.ExitStack() as stack:
        hf_dir = None
        if backend == "hf":
            hf_dir = stack.enter_context(export_temporarily(loaded, encoder))
        for text in texts:
            scored = score_text_source(text, loaded, encoder, hf_dir, limit, length)
            merge_results(results, scored)
        if asked:
            if hf_dir is None:
                judged = make_lm_adapter(spec, loaded.params, tokenizer_dir, length)
            else:
                judged = reference.make_reference_harness_model(hf_dir, length)
            found, samples = score_benchmarks(judged, Benchmarks(asked, local), kept, chat)
            merge_results(results, found)
    corpora = contamination.find_training_corpora(model)
    if samples and corpora.directories:
        configs = results["configs"]
        overlaps = contamination.measure_contamination(corpora, samples, configs)
        results["contamination"] = overlaps.to_json()
    results["request"] = request
    results["model"] = str(model)
    results["backend"] = backend
    results["max_length"] = length
    results["lineage"] = describe_evaluated_model(loaded, encoder)
    seconds = round(time.monotonic() - start, 2)
    results["seconds"] = seconds
    explain_missing(results, samples)
    results = drop_nonfinite(stage.to_jsonable(results))
    print(io.printable(format_results(results), keep="\n"))
    if to and kept:
        stage.write_result(to, results)
        for name in io.list_names(kept.parent):
            if name.startswith(kept.name):
                io.remove(kept.parent / name)
        n_results = len(results["results"])
        log.info(f"evaluate: {n_results} results in {seconds:,.1f} s, written to {to}")
    return results


def parse_tasks(
    tasks: list[str], limit: int | None, data_dir: io.Path | None
) -> tuple[list[TextTask], dict[str, TaskRequest]]:
    """Return the texts to score, and harness task -> how. Raise UserError for unknown names."""
    tasks = split_task_lists(tasks)
    if not tasks:
        raise UserError(
            "--tasks: none given. Name at least one, such as course or "
            "bits_per_byte/prose=python:prose."
        )
    texts: list[TextTask] = []
    asked: dict[str, TaskRequest] = {}
    for task in tasks:
        measure = find_measure(task)
        if measure:
            texts.append(TextTask(measure, sources.parse_source(task.removeprefix(measure))))
        elif task in GROUPS:
            members = {}
            for name, how in GROUPS[task].items():
                members[name] = TaskRequest(limit or how.items, how.shots)
            asked = members | asked  # a task that was asked for before stays as it was
        else:
            asked[task] = TaskRequest(limit)
    names = [text.name for text in texts]
    for measure, source in texts:
        if names.count(measure + source.name) > 1:
            raise UserError(
                f"--tasks: two tasks would be called {measure}{source.name}. "
                f"Give one another name: {measure}NAME=KIND:WHERE."
            )
    if asked:
        check_task_names(list(asked), data_dir)
    return texts, asked


def find_measure(task: str) -> str:
    """Return which measure of raw text a task is; "" if it is none that --tasks can name."""
    return next(filter(task.startswith, (BITS_PER_BYTE, NEEDLE)), "")


def add_by_position(texts: list[TextTask]) -> list[TextTask]:
    """Return the tasks with those of --by-position."""
    measured = [text.source for text in texts if text.measure == BITS_PER_BYTE]
    by_position = [TextTask(BY_POSITION, source) for source in measured]
    if not by_position:
        raise UserError(
            f"--by-position: expected a text to measure. Name one: {BITS_PER_BYTE}NAME=KIND:WHERE."
        )
    return [*texts, *by_position]


def check_text_tasks(texts: list[TextTask], backend: str) -> None:
    """Raise UserError for a measure that transformers does not compute here."""
    for text in texts:
        if backend == "hf" and text.measure != BITS_PER_BYTE:
            raise UserError(
                f"--backend hf: {text.name} is measured by jaxpt's own code alone. Use "
                "--backend jax."
            )


def split_task_lists(words: list[str]) -> list[str]:
    """Return the task names of comma-separated lists; the name of a text stays whole."""
    names = []
    for word in words:
        if find_measure(word):
            names.append(word)
        else:
            names += word.split(",")
    return [name for name in names if name]


def check_task_names(names: list[str], data_dir: io.Path | None) -> None:
    """Raise UserError for a task that cannot be run, or if the harness is not installed."""
    reference.require_torch("lm_eval")
    if data_dir:
        known = list(LOCAL_TASKS)
    else:
        known = make_task_manager().all_tasks
    for name in names:
        if name in known:
            continue
        texts = [measure + "NAME=KIND:WHERE" for measure in (BITS_PER_BYTE, NEEDLE)]
        candidates = [*known, *GROUPS, *texts]
        nearest = difflib.get_close_matches(name, candidates, 3, 0.4)
        message = f"--tasks: there is no task {name!r}"
        if data_dir:
            message += f" that is read from {data_dir}"
        if nearest:
            message += f"; the nearest are: {', '.join(nearest)}."
        else:
            listed = ", ".join([*LOCAL_TASKS, *GROUPS])
            message += f"; there are: {listed}, and others of the harness."
        if data_dir:
            message += " Without --data-dir the harness downloads its own files."
        raise UserError(message)


@contextlib.contextmanager
def export_temporarily(loaded: LoadedModel, encoder: tokenizer.Tokenizer) -> Iterator[pathlib.Path]:
    """Return the model's Hugging Face directory, or else that of a temporary export."""
    if loaded.source is not None and huggingface.is_hf_directory(loaded.source):
        yield io.local_copy(loaded.source)
        return
    with io.temporary_directory() as directory:
        huggingface.write_hf_model(loaded.spec, loaded.params, directory)
        encoder.save_tokenizer(directory)
        yield directory


# ---- texts


def score_text_source(
    task: TextTask,
    loaded: LoadedModel,
    encoder: tokenizer.Tokenizer,
    hf_dir: pathlib.Path | None,
    limit: int | None,
    max_length: int,
) -> dict[str, Any]:
    """Measure a source's first `limit` documents, as results of the harness."""
    measure, source = task
    name = task.name
    n_read = long_context.N_DOCUMENTS if measure == NEEDLE else limit
    documents = itertools.islice(source.iterate_documents(), n_read)
    texts = [document.text for document in documents]
    if not any(texts):
        raise UserError(
            f"{name}: {source.pattern} holds no text, so there is nothing to score. Check the path."
        )
    token_ids = encoder.encode_batch(texts)
    if measure == BY_POSITION:
        first_id = encoder.first_id
        metrics = long_context.measure_by_position(loaded, token_ids, first_id, max_length, name)
        n_long = sum(len(ids) >= max_length for ids in token_ids)
        return long_context.score_long_context(name, metrics, n_long, higher_is_better=False)
    if measure == NEEDLE:
        n = limit or long_context.N_NEEDLES
        metrics = long_context.find_needles(loaded, encoder, token_ids, n, max_length, name)
        return long_context.score_long_context(name, metrics, n, higher_is_better=True)
    if hf_dir is None:
        sums = likelihood.measure_bits_per_byte(
            loaded.spec,
            loaded.params,
            texts,
            token_ids,
            encoder.first_id,
            max_length=max_length,
            label=name,
        )
    else:
        sums = reference.measure_reference_bits_per_byte(
            hf_dir, texts, token_ids, encoder.first_id, max_length
        )
    lost = encoder.count_lost_bytes(texts, token_ids)
    sums = dataclasses.replace(sums, n_lost_bytes=lost)
    score = None if sums.reason else sums.bits_per_byte
    metrics = {"alias": name, "bits_per_byte,none": score, **sums.to_json()}
    stderr = metrics.pop("stderr")
    if score is not None and stderr is not None:
        metrics["bits_per_byte_stderr,none"] = stderr
    n_samples = {"original": len(texts), "effective": len(texts)}
    result = {"results": {name: metrics}, "versions": {name: 1}, "n-samples": {name: n_samples}}
    result["higher_is_better"] = {name: {"bits_per_byte": False}}
    if sums.reason:
        result["reasons"] = {name: {"bits_per_byte,none": sums.reason}}
    return result


# ---- the harness


def score_benchmarks(
    judged: LM,
    benchmarks: Benchmarks,
    kept: pathlib.Path | None = None,
    chat: ChatRequest = ChatRequest(),
) -> tuple[dict[str, Any], Samples]:
    """Return the harness's results of all tasks, and what it logged; see `run_harness`."""
    asked, local = benchmarks
    results: dict[str, Any] = {}
    samples: Samples = {}
    # the harness has one limit and one number of examples for all tasks of a call
    for how in dict.fromkeys(asked.values()):
        names = [name for name in asked if asked[name] == how]
        found, logged = run_harness(judged, names, how, local, kept, chat)
        merge_results(results, found)
        samples |= logged
    for task, logged in samples.items():
        measured = answers.measure_answers(logged)
        results["results"][task] |= measured
        if measured:
            results["higher_is_better"][task][answers.METRIC] = False
    return results, samples


def run_harness(
    judged: LM,
    tasks: list[str],
    how: TaskRequest,
    local: LocalRows,
    kept: pathlib.Path | None,
    chat: ChatRequest = ChatRequest(),
) -> tuple[dict[str, Any], Samples]:
    """Run the harness's simple_evaluate over tasks.

    Args:
        judged: the harness's model.
        tasks: names.
        how: number of items and examples.
        local: task -> split -> rows that replace the harness's own files.
        kept: where the harness stores each answer, and looks before it asks.
        chat: its settings for chat models.

    Returns:
        Its results, and task -> what it logged of each item.

    Raises:
        UserError: the harness cannot download a task's files.
    """
    import lm_eval

    # it would fork to bootstrap standard errors, and a fork of a process that runs JAX may hang
    os.environ["DISABLE_MULTIPROC"] = "1"
    manager = make_task_manager()
    asked = []
    for name in tasks:
        if name in local:
            asked.append(make_local_task(name, local[name], how))
        else:
            asked.append(name)
    # a decorator of the harness hides the types of its arguments
    evaluate = cast(Callable[..., dict[str, Any]], lm_eval.simple_evaluate)
    try:
        found = evaluate(
            judged,
            tasks=asked,
            limit=how.items,
            num_fewshot=how.shots,
            task_manager=manager,
            bootstrap_iters=1000,
            use_cache=str(kept) if kept else None,
            apply_chat_template=chat.apply_template,
            fewshot_as_multiturn=chat.fewshot_as_multiturn,
        )
    except OverflowError:
        raise UserError(
            f"--tasks: a score of {', '.join(tasks)} is above the largest number: the model finds "
            "the answers impossible. Leave out the task that measures a perplexity, or train on."
        ) from None
    # datasets raises these for a hub out of reach and for a data set that does not exist
    except (ConnectionError, FileNotFoundError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"--tasks: the harness cannot get the files of {', '.join(tasks)} "
            f"({reason}). Go online, or give --data-dir."
        ) from None
    results = {key: found[key] for key in RESULT_KEYS if key in found}
    return results, found["samples"]


def make_local_task(name: str, rows: SplitRows, how: TaskRequest) -> dict[str, Any]:
    """Return the harness's definition of a task, with rows in place of its own files."""
    import datasets
    from lm_eval.tasks import _yaml_loader

    yaml_path = make_task_manager().task_index[name].yaml_path
    assert yaml_path is not None
    definition = _yaml_loader.load_yaml(yaml_path, resolve_func=True)
    # one file for both: an item must not be among its own examples
    if how.shots and rows.get("train") == rows.get("validation"):
        n = how.shots + 1  # the harness wants one to spare
        rows = {"train": rows["train"][:n], "validation": rows["validation"][n:]}
    splits = {split: datasets.Dataset.from_list(found) for split, found in rows.items()}
    return {**definition, "custom_dataset": lambda **metadata: splits}


# of the harness's result, those that are kept
RESULT_KEYS = ("results", "groups", "group_subtasks", "configs", "versions", "n-shot")
RESULT_KEYS += ("higher_is_better", "n-samples", "lm_eval_version")


@functools.cache  # reading its thousands of task files takes seconds
def make_task_manager():
    """Return the harness's index of its tasks, and silence its log below errors."""
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return TaskManager()


def make_lm_adapter(
    spec: ModelSpec, params: transformer.Params, tokenizer_dir: pathlib.Path, longest: int
) -> LM:
    """Return the model as a model of the harness.

    Text becomes ids as in the harness's HFLM, by AutoTokenizer, so that the same requests reach the
    model in both.

    Source: lm-evaluation-harness 0.4.13, lm_eval/models/huggingface.py.
    """
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import (
        handle_stop_sequences,
        has_bos_prefix,
        normalize_gen_kwargs,
        postprocess_generated_text,
    )

    class Jaxpt(TemplateLM):
        tokenizer = reference.open_hf_tokenizer(tokenizer_dir)
        max_length = longest
        max_gen_toks = 256

        @property
        def eot_token_id(self) -> int:
            return self.tokenizer.eos_token_id

        @property
        def prefix_token_id(self) -> int:
            bos_id = self.tokenizer.bos_token_id
            return self.eot_token_id if bos_id is None else bos_id

        @property
        def tokenizer_name(self) -> str:
            return self.tokenizer.name_or_path.replace("/", "__")

        def apply_chat_template(
            self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
        ) -> str:
            import jinja2

            render = functools.partial(
                self.tokenizer.apply_chat_template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
            try:
                return render(chat_history)
            except jinja2.TemplateError:  # of a template without a system's message
                return render([turn for turn in chat_history if turn["role"] != "system"])

        def tok_encode(
            self, string: str, add_special_tokens: bool | None = None, **kwargs
        ) -> list[int]:
            prefix = self.tokenizer.decode(self.prefix_token_id)
            if add_special_tokens is None and has_bos_prefix(string, prefix):
                add_special_tokens = False
            if add_special_tokens is None:
                return self.tokenizer.encode(string)
            return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

        def _loglikelihood_tokens(self, requests, **kwargs) -> list[likelihood.Score]:
            texts = [text for text, *_ in requests]
            pairs = [(context, continuation) for _, context, continuation in requests]

            def keep(place: int, score: likelihood.Score) -> None:
                self.cache_hook.add_partial("loglikelihood", texts[place], score)

            return likelihood.compute_continuation_log_likelihoods(
                spec, params, pairs, max_length=longest, answered=keep
            )

        def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
            windows: list[likelihood.TokenPair] = []
            owners: list[int] = []  # of each window: its request
            n_left: list[int] = []  # of each request: windows that are not scored yet
            for i, request in enumerate(requests):
                ids = self.tok_encode(request.args[0])
                own = list(likelihood.split_rolling_windows(ids, self.prefix_token_id, longest))
                windows += own
                owners += [i] * len(own)
                n_left.append(len(own))
            sums = [0.0] * len(requests)

            def keep(place: int, score: likelihood.Score) -> None:
                i = owners[place]
                log_likelihood, _ = score
                sums[i] += log_likelihood
                n_left[i] -= 1
                if not n_left[i]:
                    self.cache_hook.add_partial("loglikelihood_rolling", requests[i].args, sums[i])

            likelihood.compute_continuation_log_likelihoods(
                spec, params, windows, max_length=longest, answered=keep
            )
            return sums

        def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
            texts = [""] * len(requests)
            alike: dict[str, list[int]] = {}  # requests of equal settings are decoded together
            for i, request in enumerate(requests):
                settings = json.dumps(request.args[1], sort_keys=True)
                alike.setdefault(settings, []).append(i)
            with stage.progress_bar("generating", len(requests), "requests") as advance:
                for group in alike.values():
                    written = self.generate_alike([requests[i].args for i in group], advance)
                    for i, text in zip(group, written, strict=True):
                        texts[i] = text
            return texts

        def generate_alike(
            self, requests: list[tuple[str, dict]], advance: Callable[[int], None]
        ) -> list[str]:
            _, settings = requests[0]
            asked = cast(dict[str, Any], normalize_gen_kwargs(settings, self.max_gen_toks))
            end = self.tokenizer.decode(self.eot_token_id)
            stops = handle_stop_sequences(asked["until"], eos=end)
            max_new = asked["max_gen_toks"]
            if max_new >= self.max_length:
                raise UserError(
                    f"evaluate: a task asks for {max_new} new tokens, but the "
                    f"model's context is {self.max_length}. "
                    "Leave the task out, or use a model with a longer context."
                )
            n_read = self.max_length - max_new
            prompts = [self.tok_encode(context)[-n_read:] for context, _ in requests]
            chosen: dict[str, Any] = {"temperature": 0.0}
            if asked["do_sample"]:
                chosen["temperature"] = asked["temperature"]
            defaults = json.loads(spec.generation)  # as in transformers' generate
            for name in ("top_p", "top_k", "repetition_penalty"):
                value = asked.get(name, defaults.get(name))
                if value is not None:
                    chosen[name] = value
            sampling = decode.Sampling(**chosen)

            def stopped(row: int, ids: list[int]) -> bool:
                text = self.tokenizer.decode(ids, skip_special_tokens=True)
                return any(stop in text for stop in stops)

            repeats = decode.number_repeats(prompts)
            texts = []
            for first in range(0, len(prompts), decode.MAX_DECODE_BATCH):
                part = slice(first, first + decode.MAX_DECODE_BATCH)
                outputs = decode.generate(
                    spec,
                    params,
                    prompts[part],
                    max_new=max_new,
                    sampling=sampling,
                    repeats=repeats[part],
                    watch=stopped,
                    watch_every=16,
                )
                for request, ids in zip(requests[part], outputs, strict=True):
                    written = self.tokenizer.decode(ids, skip_special_tokens=True)
                    text = postprocess_generated_text(written, stops, None)
                    texts.append(text)
                    self.cache_hook.add_partial("generate_until", request, text)
                advance(len(outputs))
            return texts

    return Jaxpt()


# ---- benchmark files on disk


@dataclasses.dataclass(frozen=True)
class LocalTask:
    """Where a task's items are read from under --data-dir.

    Attributes:
        kind: of the items, see `benchmarks.read_benchmark`.
        folder: that the files are in, if they are not in the directory itself.
        files: split -> file name.
    """

    kind: str
    folder: str
    files: dict[str, str]


LOCAL_TASKS = {
    "truthfulqa_mc2": LocalTask("truthfulqa", "eval_truthfulqa", {"validation": "v0_mc_task.json"}),
    "winogrande": LocalTask(
        "winogrande",
        "eval_winogrande",
        {"train": "winogrande.jsonl", "validation": "winogrande.jsonl"},
    ),
    "lambada_openai": LocalTask("lambada", "eval_lambada", {"test": "lambada_openai.jsonl"}),
    "gsm8k": LocalTask("gsm8k", "eval_gsm8k", {"train": "train.jsonl", "test": "test.jsonl"}),
}


def load_local_items(name: str, data_dir: io.Path) -> SplitRows:
    """Return split -> rows as the task reads them, from DATA_DIR/FOLDER or DATA_DIR itself.

    Raises:
        UserError: a file is missing or of another benchmark.
    """
    task = LOCAL_TASKS[name]
    directory = find_task_directory(task, data_dir)
    if directory is None:
        files = dict.fromkeys(task.files.values())
        expected = " and ".join(f"{task.folder}/{file}" for file in files)
        raise UserError(
            f"--data-dir {data_dir}: {name} wants {expected} there. Copy the "
            "benchmark's files, or leave the task out."
        )
    rows = {}
    for split, file in task.files.items():
        items = benchmarks.read_benchmark(directory / file)
        if not items or any(item.task != task.kind for item in items):
            raise UserError(
                f"{directory / file}: its records are not those of "
                f"{name}. Restore the file from its origin."
            )
        rows[split] = [item.fields for item in items]
    return rows


def load_local_rows(asked: Iterable[str], data_dir: io.Path | None) -> LocalRows:
    """Return the rows of the tasks that are read from `data_dir`; none if there is no such."""
    if data_dir is None:
        return {}
    return {name: load_local_items(name, data_dir) for name in asked}


def find_task_directory(task: LocalTask, data_dir: io.Path) -> io.Path | None:
    """Return the first of DATA_DIR/FOLDER and DATA_DIR that has all files of a task."""
    for directory in (data_dir / task.folder, data_dir):
        if all(io.size(directory / file) is not None for file in task.files.values()):
            return directory
    return None


# ---- results


def list_scores(results: dict[str, Any], samples: Samples) -> dict[str, dict[str, float]]:
    """Return task -> metric -> value, NaN for what `explain_missing` takes out."""
    explained = {"reasons": {}, **results}
    explain_missing(explained, samples)
    scores: dict[str, dict[str, float]] = {}
    for task, metrics in explained["results"].items():
        scores[task] = {}
        for key, value in metrics.items():
            name, comma, kind = key.partition(",")
            if comma and isinstance(value, (int, float, type(None))):
                name = name if kind == "none" else f"{name} ({kind})"
                scores[task][name] = math.nan if value is None else float(value)
    return scores


def merge_results(results: dict[str, Any], more: dict[str, Any]) -> None:
    """Add results to others."""
    for key, value in more.items():
        if isinstance(value, dict):
            results.setdefault(key, {}).update(value)
        else:
            results[key] = value


def explain_missing(results: dict[str, Any], samples: Samples) -> None:
    """Take out scores that are no numbers, and write to results["reasons"] why.

    A score of answers whose log-likelihoods are no numbers is none either, whatever it looks like:
    an accuracy takes the first choice for the likeliest.

    Args:
        results: of the harness.
        samples: task -> what it logged of each item.
    """
    members = results.get("group_subtasks", {})

    def find_fault(task: str) -> str:
        faults = [describe_faulty_answers(samples.get(task, []))]
        faults += [find_fault(member) for member in members.get(task, [])]
        return next(filter(None, faults), "")

    for task, metrics in results["results"].items():
        fault = find_fault(task)
        reasons = results["reasons"].setdefault(task, {})
        for key, value in metrics.items():
            if "," not in key or not isinstance(value, (int, float)):
                continue
            reason = fault or describe_nonfinite(value)
            if reason:
                metrics[key] = None
                reasons[key] = reason
        if not reasons:
            del results["reasons"][task]
        if task in results.get("groups", {}):
            results["groups"][task] |= dict.fromkeys(reasons)
        if fault and task in results.get("contamination", {}).get("tasks", {}):
            results["contamination"]["tasks"][task]["without"] = {}


def describe_faulty_answers(logged: list[dict]) -> str:
    """Return how many items have a log-likelihood that is no number, or ""."""
    faulty = {sample["doc_id"] for sample in logged if has_nonfinite(sample["resps"])}
    if not faulty:
        return ""
    n_items = len({sample["doc_id"] for sample in logged})
    return (
        f"log-likelihoods of {len(faulty):,} of {n_items:,} items are NaN or infinite: "
        "the model's weights or logits are not finite"
    )


def has_nonfinite(value: Any) -> bool:
    """Return whether a tree of lists has a number that is NaN or infinite."""
    if isinstance(value, (list, tuple)):
        return any(map(has_nonfinite, value))
    return isinstance(value, float) and not math.isfinite(value)


def drop_nonfinite(value: Any) -> Any:
    """Return a JSON value with null for NaN and infinity, which JSON has not."""
    if isinstance(value, dict):
        return {key: drop_nonfinite(each) for key, each in value.items()}
    if isinstance(value, list):
        return list(map(drop_nonfinite, value))
    return None if has_nonfinite(value) else value


def describe_evaluated_model(loaded: LoadedModel, encoder: tokenizer.Tokenizer) -> dict[str, Any]:
    """Return what was evaluated, by fingerprint, and the versions that evaluated it."""
    assert loaded.source is not None
    directory = checkpoint.find_checkpoint(loaded.source) or loaded.source
    return {
        "fingerprint": stage.fingerprint_path(directory),
        "step": loaded.step,
        "tokenizer": encoder.fingerprint,
        "n_params": transformer.count_params(loaded.spec),
        "spec": loaded.spec.to_json(),
        "device": jax.devices()[0].device_kind,
        "versions": stage.package_versions(),
    }


def format_results(results: dict[str, Any]) -> str:
    """Return a line per metric, and the contamination of the tasks.

    A line has task, metric, value, standard error and number of items.
    """
    rows = [("task", "metric", "value", "+/-", "items")]
    for task, metrics in results["results"].items():
        n_items = results["n-samples"].get(task, {}).get("effective", "")
        for key, value in metrics.items():
            metric, comma, kind = key.partition(",")
            is_score = comma and (value is None or isinstance(value, (int, float)))
            if not is_score or metric.endswith("_stderr"):
                continue
            stderr = metrics.get(f"{metric}_stderr,{kind}")
            error = f"{stderr:.4f}" if isinstance(stderr, float) else ""
            shown = metric if kind == "none" else f"{metric} ({kind})"
            number = "-" if value is None else f"{value:.4f}"
            rows.append((task, shown, number, error, str(n_items)))
    lines = [format_table(rows, "<<>")]
    for task, reasons in results.get("reasons", {}).items():
        by_reason: dict[str, list[str]] = {}
        for key, reason in reasons.items():
            by_reason.setdefault(reason, []).append(key.removesuffix(",none"))
        for reason, metrics in by_reason.items():
            lines.append(f"{task}: no number for {', '.join(metrics)}: {reason}.")
    if "contamination" in results:
        found = contamination.ContaminationReport.from_json(results["contamination"])
        lines += ["", contamination.format_contamination(found, results["results"])]
    return "\n".join(lines)
