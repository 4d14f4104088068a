"""Evaluate a model on tasks of lm-evaluation-harness and by bits per byte.

`evaluate_model` computes with jaxpt or with transformers, and returns results in the harness's own
format, with the origin of the model.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import itertools
import json
import logging
import os
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, cast

import jax

from jaxpt import config, stage
from jaxpt.data import benchmarks, sources, tokenizer
from jaxpt.evaluate import contamination, likelihood
from jaxpt.model import decode, transformer
from jaxpt.sharding import make_mesh
from jaxpt.spec import ModelSpec, UserError
from jaxpt.weights import checkpoint, huggingface, initialize

log = logging.getLogger(__name__)


class TaskRequest(NamedTuple):
    """How a task is run.

    Attributes:
        items: read of it; None: all.
        shots: examples in front of each item; None: as the task defines it.
    """

    items: int | None = None
    shots: int | None = None


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
BITS_PER_BYTE = "bits_per_byte/"


def evaluate_model(
    model: pathlib.Path,
    tasks: list[str],
    *,
    backend: str = "jax",
    limit: int | None = None,
    max_length: int | None = None,
    data_dir: pathlib.Path | None = None,
    to: pathlib.Path | None = None,
) -> dict[str, Any]:
    """Evaluate a model, print a table, and write the results to `to`.

    Args:
        model: a run, a checkpoint step directory or a Hugging Face directory.
        tasks: the harness's task names, `course`, `h6`, or bits_per_byte/[NAME=]KIND:WHERE (a
            source, see docs/prepare.md).
        backend: "jax": jaxpt; "hf": transformers and torch, on a temporary export if the model is
            no Hugging Face directory.
        limit: items (of a benchmark) or documents (of a source) read of each task; None: all.
        max_length: tokens that the model sees at once; None: its own context.
        data_dir: where benchmark files are; None: the harness downloads its own.
        to: the file to write.

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
    local = {name: load_local_items(name, data_dir) for name in asked} if data_dir else {}
    read = {
        key: stage.fingerprint_path(path)
        for source in texts
        for key, path in source.fingerprint_inputs().items()
    }
    model_print = stage.fingerprint_path(initialize.resolve_source(model))
    request = stage.fingerprint(
        [model_print, tasks, backend, limit, max_length, read, stage.fingerprint(local)]
    )
    if earlier := stage.read_cached_result(to, request):
        print(format_results(earlier))
        log.info(f"evaluate: {to} holds this already, nothing to do")
        return earlier
    mesh = make_mesh(config.MeshConfig())
    loaded = initialize.load_model(model, mesh)
    if loaded.tokenizer_dir is None:
        raise UserError(
            f"{model}: has no tokenizer beside it (tokenizer.json), so no "
            "text can be scored. Copy there the one it was trained with."
        )
    encoder = tokenizer.load_tokenizer(loaded.tokenizer_dir)
    if encoder.vocab_size > loaded.spec.vocab_size:
        raise UserError(
            f"{loaded.tokenizer_dir}: the tokenizer gives ids up to "
            f"{encoder.vocab_size - 1:,}, but the model knows ids 0 to "
            f"{loaded.spec.vocab_size - 1:,}. Copy there the one it was trained with."
        )
    log.info(
        f"evaluate: {model}, {transformer.count_params(loaded.spec):,} parameters, "
        f"by {'our code' if backend == 'jax' else 'transformers'}"
    )

    # answers so far, from which an interrupted evaluation of this request continues
    kept = to.with_name(f".{to.stem}-{request}") if to else None
    length = min(max_length or loaded.spec.max_seq_len, loaded.spec.max_seq_len)
    results: dict[str, Any] = {"results": {}, "versions": {}, "n-samples": {}}
    samples: dict[str, list[dict]] = {}
    with contextlib.ExitStack() as stack:
        hf_dir = stack.enter_context(export_temporarily(loaded)) if backend == "hf" else None
        for source in texts:
            merge_results(
                results, score_text_source(source, loaded, encoder, hf_dir, limit, length)
            )
        if asked:
            if hf_dir is None:
                judged = make_lm_adapter(loaded.spec, loaded.params, loaded.tokenizer_dir, length)
            else:
                from jaxpt.evaluate import reference

                judged = reference.make_reference_harness_model(hf_dir, length)
            # the harness has one limit and one number of examples for all tasks of a call
            for how in dict.fromkeys(asked.values()):
                names = [name for name in asked if asked[name] == how]
                found, logged = run_harness(judged, names, how, local, kept)
                merge_results(results, found)
                samples |= logged
    corpora = contamination.find_training_corpora(model)
    if samples and corpora.directories:
        results["contamination"] = contamination.measure_contamination(
            corpora, samples, results["configs"]
        ).to_json()
    results |= {
        "request": request,
        "model": str(model),
        "backend": backend,
        "max_length": length,
        "lineage": describe_evaluated_model(loaded, encoder),
    }
    results["seconds"] = round(time.monotonic() - start, 2)
    results = stage.to_jsonable(results)
    print(format_results(results))
    if to and kept:
        to.parent.mkdir(parents=True, exist_ok=True)
        stage.write_atomic(to, json.dumps(results, indent=1) + "\n")
        for file in to.parent.glob(f"{kept.name}*"):
            file.unlink()
        log.info(
            f"evaluate: {len(results['results'])} results in "
            f"{results['seconds']:,.1f} s, written to {to}"
        )
    return results


def parse_tasks(
    tasks: list[str], limit: int | None, data_dir: pathlib.Path | None
) -> tuple[list[sources.TextSource], dict[str, TaskRequest]]:
    """Return the sources to score, and harness task -> how. Raise UserError for unknown names."""
    tasks = [
        name
        for word in tasks
        for name in ([word] if word.startswith(BITS_PER_BYTE) else word.split(","))
        if name
    ]
    if not tasks:
        raise UserError(
            "--tasks: none given. Name at least one, such as course or "
            "bits_per_byte/prose=python:prose."
        )
    texts = [
        sources.parse_source(task.removeprefix(BITS_PER_BYTE))
        for task in tasks
        if task.startswith(BITS_PER_BYTE)
    ]
    names = [source.name for source in texts]
    for name in names:
        if names.count(name) > 1:
            raise UserError(
                f"--tasks: two tasks would be called {BITS_PER_BYTE}{name}. "
                f"Give one another name: {BITS_PER_BYTE}NAME=KIND:WHERE."
            )
    asked: dict[str, TaskRequest] = {}
    for task in tasks:
        if task in GROUPS:
            asked = {
                name: TaskRequest(limit or how.items, how.shots)
                for name, how in GROUPS[task].items()
            } | asked
        elif not task.startswith(BITS_PER_BYTE):
            asked[task] = TaskRequest(limit)
    if asked:
        from jaxpt.evaluate.reference import require_torch

        require_torch("lm_eval")
        known = list(LOCAL_TASKS) if data_dir else make_task_manager().all_tasks
        for name in asked:
            if name not in known:
                near = difflib.get_close_matches(
                    name, [*known, *GROUPS, BITS_PER_BYTE + "NAME=KIND:WHERE"], 3, 0.4
                )
                where = f" that is read from {data_dir}" if data_dir else ""
                raise UserError(
                    f"--tasks: there is no task {name!r}{where}; "
                    + (
                        f"the nearest are: {', '.join(near)}."
                        if near
                        else (
                            f"there are: {', '.join([*LOCAL_TASKS, *GROUPS])}, "
                            "and others of the harness."
                        )
                    )
                    + (
                        " Without --data-dir the harness downloads its own files."
                        if data_dir
                        else ""
                    )
                )
    return texts, asked


@contextlib.contextmanager
def export_temporarily(loaded: initialize.LoadedModel) -> Iterator[pathlib.Path]:
    """Return the model's Hugging Face directory, or else that of a temporary export."""
    if loaded.source and loaded.tokenizer_dir == loaded.source:
        yield loaded.source
        return
    with tempfile.TemporaryDirectory(prefix="jaxpt-") as directory:
        huggingface.write_hf_model(
            loaded.spec, loaded.params, pathlib.Path(directory), tokenizer_dir=loaded.tokenizer_dir
        )
        yield pathlib.Path(directory)


# ---- bits per byte


def score_text_source(
    source: sources.TextSource,
    loaded: initialize.LoadedModel,
    encoder: tokenizer.Tokenizer,
    hf_dir: pathlib.Path | None,
    limit: int | None,
    max_length: int,
) -> dict[str, Any]:
    """Measure bits per byte of a source's first `limit` documents, as results of the harness."""
    name = BITS_PER_BYTE + source.name
    texts = [document.text for document in itertools.islice(source.iterate_documents(), limit)]
    if not any(texts):
        raise UserError(
            f"{name}: {source.pattern} holds no text, so there is nothing to score. Check the path."
        )
    token_ids = encoder.encode_batch(texts)
    first = encoder.eos_id if encoder.bos_id is None else encoder.bos_id
    if hf_dir is None:
        sums = likelihood.measure_bits_per_byte(
            loaded.spec, loaded.params, texts, token_ids, first, max_length=max_length, label=name
        )
    else:
        from jaxpt.evaluate import reference

        sums = reference.measure_reference_bits_per_byte(
            hf_dir, texts, token_ids, first, max_length
        )
    return {
        "results": {
            name: {"alias": name, "bits_per_byte,none": sums.bits_per_byte, **sums.to_json()}
        },
        "versions": {name: 1},
        "n-samples": {name: {"original": len(texts), "effective": len(texts)}},
    }


# ---- the harness


def run_harness(
    judged,
    tasks: list[str],
    how: TaskRequest,
    local: dict[str, dict[str, list[dict]]],
    kept: pathlib.Path | None,
) -> tuple[dict[str, Any], dict[str, list[dict]]]:
    """Run the harness's simple_evaluate over tasks.

    Args:
        judged: the harness's model.
        tasks: names.
        how: number of items and examples.
        local: task -> split -> rows that replace the harness's own files.
        kept: where the harness stores each answer, and looks before it asks.

    Returns:
        Its results, and task -> what it logged of each item.

    Raises:
        UserError: the harness cannot download a task's files.
    """
    import datasets
    import lm_eval
    from lm_eval.tasks import _yaml_loader

    # it would fork to bootstrap standard errors, and a fork of a process that runs JAX may hang
    os.environ["DISABLE_MULTIPROC"] = "1"
    manager = make_task_manager()

    def with_local_rows(name: str):
        if name not in local:
            return name
        yaml_path = manager.task_index[name].yaml_path
        assert yaml_path is not None
        shipped = _yaml_loader.load_yaml(yaml_path, resolve_func=True)
        rows = local[name]
        # one file for both: an item must not be among its own examples
        if how.shots and rows.get("train") == rows.get("validation"):
            n = how.shots + 1  # the harness wants one to spare
            rows = {"train": rows["train"][:n], "validation": rows["validation"][n:]}
        splits = {split: datasets.Dataset.from_list(found) for split, found in rows.items()}
        return {**shipped, "custom_dataset": lambda **metadata: splits}

    asked = [with_local_rows(name) for name in tasks]
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
        )
    # datasets raises these for a hub out of reach and for a data set that does not exist
    except (ConnectionError, FileNotFoundError) as error:
        raise UserError(
            f"--tasks: the harness cannot get the files of {', '.join(tasks)} "
            f"({str(error).splitlines()[0]}). Go online, or give --data-dir."
        ) from None
    results = {key: found[key] for key in RESULT_KEYS if key in found}
    return results, found["samples"]


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
    spec: ModelSpec, params: dict[str, Any], tokenizer_dir: pathlib.Path, longest: int
):
    """Return the model as a model of the harness.

    Text becomes ids as in the harness's HFLM, by AutoTokenizer, so that the same requests reach the
    model in both.

    Source: lm-evaluation-harness 0.4.13, lm_eval/models/huggingface.py.
    """
    import transformers
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import (
        handle_stop_sequences,
        has_bos_prefix,
        normalize_gen_kwargs,
        postprocess_generated_text,
    )

    class Jaxpt(TemplateLM):
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            str(tokenizer_dir), local_files_only=True
        )
        max_length = longest
        max_gen_toks = 256

        @property
        def eot_token_id(self) -> int:
            return self.tokenizer.eos_token_id

        @property
        def prefix_token_id(self) -> int:
            bos_id = self.tokenizer.bos_token_id
            return self.eot_token_id if bos_id is None else bos_id

        def tok_encode(
            self, string: str, add_special_tokens: bool | None = None, **kwargs
        ) -> list[int]:
            if add_special_tokens is None and has_bos_prefix(
                string, self.tokenizer.decode(self.prefix_token_id)
            ):
                add_special_tokens = False
            return self.tokenizer.encode(
                string,
                **(
                    {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
                ),
            )

        def _loglikelihood_tokens(self, requests, **kwargs) -> list[tuple[float, bool]]:
            texts, pairs = (
                [text for text, *_ in requests],
                [(context, continuation) for _, context, continuation in requests],
            )

            def keep(place: int, answer: tuple[float, bool]) -> None:
                self.cache_hook.add_partial("loglikelihood", texts[place], answer)

            return likelihood.compute_continuation_log_likelihoods(
                spec, params, pairs, max_length=longest, answered=keep
            )

        def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
            windows = [
                list(
                    likelihood.split_rolling_windows(
                        self.tok_encode(r.args[0]), self.prefix_token_id, self.max_length
                    )
                )
                for r in requests
            ]
            owners, left, sums = (
                [i for i, own in enumerate(windows) for _ in own],
                list(map(len, windows)),
                [0.0] * len(windows),
            )

            def keep(place: int, answer: tuple[float, bool]) -> None:
                i = owners[place]
                sums[i], left[i] = sums[i] + answer[0], left[i] - 1
                if not left[i]:
                    self.cache_hook.add_partial("loglikelihood_rolling", requests[i].args, sums[i])

            likelihood.compute_continuation_log_likelihoods(
                spec, params, list(itertools.chain(*windows)), max_length=longest, answered=keep
            )
            return sums

        def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
            texts = [""] * len(requests)
            alike: dict[str, list[int]] = {}  # requests of equal settings are decoded together
            for i, request in enumerate(requests):
                alike.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(i)
            with stage.progress_bar("generating", len(requests), "requests") as advance:
                for group in alike.values():
                    self.generate_alike([requests[i].args for i in group], group, texts, advance)
            return texts

        def generate_alike(
            self,
            requests: list[tuple[str, dict]],
            places: list[int],
            texts: list[str],
            advance: Callable,
        ) -> None:
            asked = cast(dict[str, Any], normalize_gen_kwargs(requests[0][1], self.max_gen_toks))
            stops = handle_stop_sequences(
                asked["until"], eos=self.tokenizer.decode(self.eot_token_id)
            )
            max_new = asked["max_gen_toks"]
            if max_new >= self.max_length:
                raise UserError(
                    f"evaluate: a task asks for {max_new} new tokens, but the "
                    f"model's context is {self.max_length}. "
                    "Leave the task out, or use a model with a longer context."
                )
            prompts = [
                self.tok_encode(context)[-(self.max_length - max_new) :] for context, _ in requests
            ]
            chosen = {
                name: asked[name]
                for name in ("top_p", "top_k", "repetition_penalty")
                if name in asked
            }
            sampling = decode.Sampling(
                temperature=asked["temperature"] if asked["do_sample"] else 0.0, **chosen
            )

            def stopped(row: int, ids: list[int]) -> bool:
                text = self.tokenizer.decode(ids, skip_special_tokens=True)
                return any(stop in text for stop in stops)

            for first in range(0, len(prompts), decode.MAX_DECODE_BATCH):
                part = slice(first, first + decode.MAX_DECODE_BATCH)
                outputs = decode.generate(
                    spec,
                    params,
                    prompts[part],
                    max_new=max_new,
                    sampling=sampling,
                    watch=stopped,
                    watch_every=16,
                )
                for place, request, ids in zip(places[part], requests[part], outputs, strict=True):
                    texts[place] = postprocess_generated_text(
                        self.tokenizer.decode(ids, skip_special_tokens=True), stops, None
                    )
                    self.cache_hook.add_partial("generate_until", request, texts[place])
                advance(len(outputs))

    return Jaxpt()


# ---- benchmark files on disk


def load_local_items(name: str, data_dir: pathlib.Path) -> dict[str, list[dict]]:
    """Return split -> rows as the task reads them, from DATA_DIR/FOLDER or DATA_DIR itself.

    Raises:
        UserError: a file is missing or of another benchmark.
    """
    kind, folder, files = LOCAL_TASKS[name]
    directory = next(
        (
            found
            for found in (data_dir / folder, data_dir)
            if all((found / file).is_file() for file in files.values())
        ),
        None,
    )
    if directory is None:
        expected = " and ".join(f"{folder}/{file}" for file in dict.fromkeys(files.values()))
        raise UserError(
            f"--data-dir {data_dir}: {name} wants {expected} there. Copy the "
            "benchmark's files, or leave the task out."
        )
    items = {split: benchmarks.read_benchmark(directory / file) for split, file in files.items()}
    for split, found in items.items():
        if not found or any(item.task != kind for item in found):
            raise UserError(
                f"{directory / files[split]}: its records are not those of "
                f"{name}. Restore the file from its origin."
            )
    return {split: [item.fields for item in found] for split, found in items.items()}


# task -> kind of its items, folder, file of each split
LOCAL_TASKS = {
    "truthfulqa_mc2": ("truthfulqa", "eval_truthfulqa", {"validation": "v0_mc_task.json"}),
    "winogrande": (
        "winogrande",
        "eval_winogrande",
        {"train": "winogrande.jsonl", "validation": "winogrande.jsonl"},
    ),
    "lambada_openai": ("lambada", "eval_lambada", {"test": "lambada_openai.jsonl"}),
    "gsm8k": ("gsm8k", "eval_gsm8k", {"train": "train.jsonl", "test": "test.jsonl"}),
}


# ---- results


def merge_results(results: dict[str, Any], more: dict[str, Any]) -> None:
    """Add results to others."""
    for key, value in more.items():
        if isinstance(value, dict):
            results.setdefault(key, {}).update(value)
        else:
            results[key] = value


def describe_evaluated_model(
    loaded: initialize.LoadedModel, encoder: tokenizer.Tokenizer
) -> dict[str, Any]:
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
    lines = [("task", "metric", "value", "+/-", "items")]
    for task, metrics in results["results"].items():
        n_items = results["n-samples"].get(task, {}).get("effective", "")
        for key, value in metrics.items():
            metric, comma, kind = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            error = metrics.get(f"{metric}_stderr,{kind}")
            shown = metric if kind == "none" else f"{metric} ({kind})"
            lines.append(
                (
                    task,
                    shown,
                    f"{value:.4f}",
                    f"{error:.4f}" if isinstance(error, float) else "",
                    str(n_items),
                )
            )
    widths = [max(len(line[column]) for line in lines) for column in range(5)]
    lines = [
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    if "contamination" in results:
        found = contamination.ContaminationReport.from_json(results["contamination"])
        lines += ["", contamination.format_contamination(found, results["results"])]
    return "\n".join(lines)
