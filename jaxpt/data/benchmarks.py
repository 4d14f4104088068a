"""Read evaluation sets from disk as items of one form, for decontamination and evaluation.

They are recognized by their fields, whatever the file is called: TruthfulQA (the JSON of
multiple-choice targets, or the CSV), GSM8K, LAMBADA and WinoGrande in its schema form, as JSON
lines. Other JSON lines are taken as they are, under the file's name.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import pathlib
from collections.abc import Iterator
from typing import Any

from jaxpt import stage
from jaxpt.spec import UserError


@dataclasses.dataclass(frozen=True)
class BenchmarkItem:
    """One question of a benchmark.

    Attributes:
        task: "truthfulqa", "gsm8k", "lambada", "winogrande", or the file's name without its suffix.
        id: FILE:NUMBER, counted from 1.
        text: all that a document must not contain: question, context, answers, one per line.
        fields: the record as lm-evaluation-harness's task of that name reads it.
    """

    task: str
    id: str
    text: str
    fields: dict[str, Any]


def read_benchmark(path: str | pathlib.Path) -> list[BenchmarkItem]:
    """Return the items of a benchmark file (.jsonl, .json, .csv), or of all such in a directory.

    Raises:
        UserError: there is none, or a record is not what its kind of file holds.
    """
    path = stage.local_path(path)
    if path.is_dir():
        files = sorted(
            file for file in path.iterdir() if file.suffix in (".jsonl", ".json", ".csv")
        )
        if not files:
            raise UserError(
                f"{path}: no benchmark file (.jsonl, .json or .csv) there. "
                "Name the file, or the directory that holds it."
            )
        return [item for file in files for item in read_benchmark(file)]
    if not path.is_file():
        raise UserError(f"{path}: no such benchmark file or directory. Check the path.")
    items = []
    for n, record in enumerate(read_benchmark_records(path), 1):
        if not isinstance(record, dict):
            raise UserError(
                f"{path}: record {n}: expected an object with the fields of a question, "
                f"got {type(record).__name__}."
            )
        try:
            task, text, fields = parse_benchmark_record(record, path.stem)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{path}: record {n} cannot be read ({type(error).__name__}: {error}). "
                "Restore the file from its origin."
            ) from None
        items.append(BenchmarkItem(task, f"{path.stem}:{n}", text, fields))
    return items


def read_benchmark_records(path: pathlib.Path) -> list:
    """Return the records of a file. Raise UserError if it is not JSON or CSV in UTF-8."""
    try:
        text = path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: byte {error.start} is not UTF-8 ({error.reason}). "
            "Restore the file from its origin."
        ) from None
    if path.suffix == ".csv":
        return list(csv.DictReader(text.splitlines(keepends=True)))
    lines = [text] if path.suffix == ".json" else text.split("\n")
    found = []
    for n, line in enumerate(lines, 1):
        try:
            found += [json.loads(line)] if line.strip() else []
        except json.JSONDecodeError as error:
            raise UserError(
                f"{path}:{error.lineno if len(lines) == 1 else n}: not JSON ({error.msg}). "
                "Restore the file from its origin."
            ) from None
    if path.suffix == ".json" and not (found and isinstance(found[0], list)):
        raise UserError(
            f"{path}: expected a JSON list of questions. "
            "Name the file .jsonl if it has one object per line."
        )
    return found[0] if path.suffix == ".json" else found


def parse_benchmark_record(record: dict[str, Any], name: str) -> tuple[str, str, dict[str, Any]]:
    """Return task, text and fields of a record. `name` is the task of an unknown kind."""
    if "mc2_targets" in record:
        targets = {key: record[key] for key in ("mc1_targets", "mc2_targets")}
        fields = {"question": record["question"]}
        for key, choices in targets.items():
            fields[key] = {"choices": list(choices), "labels": list(choices.values())}
        return (
            "truthfulqa",
            join_unique_lines(record["question"], *targets["mc1_targets"], *targets["mc2_targets"]),
            fields,
        )
    if "Correct Answers" in record:
        best, right, wrong = (
            record["Best Answer"],
            split_answers(record["Correct Answers"]),
            split_answers(record["Incorrect Answers"]),
        )
        fields = {
            "question": record["Question"],
            "best_answer": best,
            "correct_answers": right,
            "incorrect_answers": wrong,
        }
        return "truthfulqa", join_unique_lines(record["Question"], best, *right, *wrong), fields
    if "context_options" in record:
        # Partial evaluation reads a sentence with one "_" and two fillings: the contexts' common
        # start is cut at a word.
        one, two = record["context_options"]
        n_same = next(
            (i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b),
            min(len(one), len(two)),
        )
        start = one[: one.rfind(" ", 0, n_same) + 1]
        fields = {
            "sentence": f"{start}_ {record['continuation']}",
            "option1": one[len(start) :],
            "option2": two[len(start) :],
            "answer": str(record["gold"] + 1),
        }
        return (
            "winogrande",
            join_unique_lines(*(f"{context} {record['continuation']}" for context in (one, two))),
            fields,
        )
    if {"context", "continuation"} <= record.keys():
        text = f"{record['context']} {record['continuation']}"
        return "lambada", text, {"text": text}
    if record.keys() == {"question", "answer"}:
        return "gsm8k", join_unique_lines(record["question"], record["answer"]), dict(record)
    return (
        name,
        join_unique_lines(*(value for value in record.values() if isinstance(value, str))),
        record,
    )


def join_item_text(fields: dict[str, Any]) -> str:
    """Return BenchmarkItem.text of BenchmarkItem.fields."""
    if {"sentence", "option1", "option2"} <= fields.keys():
        return join_unique_lines(
            *(fields["sentence"].replace("_", fields[option]) for option in ("option1", "option2"))
        )
    return join_unique_lines(*collect_strings(fields))


def collect_strings(value: Any) -> Iterator[str]:
    """Yield all strings in a tree of lists and dictionaries, in order."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for each in value.values() if isinstance(value, dict) else value:
            yield from collect_strings(each)


def join_unique_lines(*texts: str) -> str:
    """Return the texts, one per line, without repeats."""
    return "\n".join(dict.fromkeys(texts))


def split_answers(answers: str) -> list[str]:
    """Return the answers that ";" separates."""
    return [answer.strip() for answer in answers.split(";") if answer.strip()]
