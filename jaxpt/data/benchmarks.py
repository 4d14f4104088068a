"""Read evaluation sets from disk as items of one form, for decontamination and evaluation.

They are recognized by their fields, whatever the file is called: TruthfulQA (the JSON of
multiple-choice targets, or the CSV), GSM8K, LAMBADA and WinoGrande in its schema form, as JSON
lines. Other JSON lines are taken as they are, under the file's name.
"""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Iterable, Iterator
from typing import Any

from jaxpt import io
from jaxpt.spec import UserError

BENCHMARK_SUFFIXES = (".jsonl", ".json", ".csv")


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


def read_benchmark(path: str | io.Path) -> list[BenchmarkItem]:
    """Return the items of a benchmark file (.jsonl, .json, .csv), or of all such in a directory.

    Raises:
        UserError: there is none, or a record is not what its kind of file holds.
    """
    path = io.path(path)
    if io.size(path) is None:
        if not io.exists(path):
            raise UserError(
                f"{io.printable(path)}: no such benchmark file or directory. Check the path."
            )
        names = io.list_names(path)
        files = [path / name for name in names if name.endswith(BENCHMARK_SUFFIXES)]
        if not files:
            raise UserError(
                f"{io.printable(path)}: no benchmark file (.jsonl, .json or .csv) there. "
                "Name the file, or the directory that holds it."
            )
        items = []
        for file in files:
            items += read_benchmark(file)
        return items
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


def read_benchmark_records(path: io.Path) -> list:
    """Return the records of a file. Raise UserError if it is not JSON or CSV in UTF-8."""
    text = io.read_text(path).removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    if path.suffix == ".csv":
        lines = text.splitlines(keepends=True)
        return list(csv.DictReader(lines))
    if path.suffix == ".json":
        records = parse_json(text, path) if text.strip() else None
        if not isinstance(records, list):
            raise UserError(
                f"{path}: expected a JSON list of questions. "
                "Name the file .jsonl if it has one object per line."
            )
        return records
    records = []
    for n, line in enumerate(text.split("\n"), 1):
        if line.strip():
            record = parse_json(line, path, n)
            records.append(record)
    return records


def parse_json(text: str, path: io.Path, first_line: int = 1) -> Any:
    """Return a JSON value. Raise UserError with its line in the file if it is none."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise UserError(
            f"{path}:{line}: not JSON ({error.msg}). Restore the file from its origin."
        ) from None


def parse_benchmark_record(record: dict[str, Any], name: str) -> tuple[str, str, dict[str, Any]]:
    """Return task, text and fields of a record. `name` is the task of an unknown kind."""
    if "mc2_targets" in record:
        question = record["question"]
        fields = {"question": question}
        lines = [question]
        for key in ("mc1_targets", "mc2_targets"):
            choices = record[key]
            labels = choices.values()
            fields[key] = {"choices": list(choices), "labels": list(labels)}
            lines += choices
        return "truthfulqa", join_unique_lines(lines), fields
    if "Correct Answers" in record:
        best = record["Best Answer"]
        right = split_answers(record["Correct Answers"])
        wrong = split_answers(record["Incorrect Answers"])
        question = record["Question"]
        fields = {
            "question": question,
            "best_answer": best,
            "correct_answers": right,
            "incorrect_answers": wrong,
        }
        text = join_unique_lines([question, best, *right, *wrong])
        return "truthfulqa", text, fields
    if "context_options" in record:
        # Partial evaluation reads a sentence with one "_" and two fillings: the contexts' common
        # start is cut at a word.
        one, two = record["context_options"]
        continuation = record["continuation"]
        n_same = count_common_chars(one, two)
        n_start = one.rfind(" ", 0, n_same) + 1
        start = one[:n_start]
        fields = {
            "sentence": f"{start}_ {continuation}",
            "option1": one[n_start:],
            "option2": two[n_start:],
            "answer": str(record["gold"] + 1),
        }
        text = join_unique_lines([f"{one} {continuation}", f"{two} {continuation}"])
        return "winogrande", text, fields
    if {"context", "continuation"} <= record.keys():
        text = f"{record['context']} {record['continuation']}"
        return "lambada", text, {"text": text}
    if record.keys() == {"question", "answer"}:
        text = join_unique_lines([record["question"], record["answer"]])
        return "gsm8k", text, dict(record)
    values = [value for value in record.values() if isinstance(value, str)]
    return name, join_unique_lines(values), record


def count_common_chars(a: str, b: str) -> int:
    """Return the length of the common start of two texts."""
    n = 0
    for a_char, b_char in zip(a, b, strict=False):
        if a_char != b_char:
            break
        n += 1
    return n


def join_item_text(fields: dict[str, Any]) -> str:
    """Return BenchmarkItem.text of BenchmarkItem.fields."""
    if {"sentence", "option1", "option2"} <= fields.keys():
        sentence = fields["sentence"]
        first = sentence.replace("_", fields["option1"])
        second = sentence.replace("_", fields["option2"])
        return join_unique_lines([first, second])
    return join_unique_lines(collect_strings(fields))


def collect_strings(value: Any) -> Iterator[str]:
    """Yield all strings in a tree of lists and dictionaries, in order."""
    if isinstance(value, str):
        yield value
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for each in value:
            yield from collect_strings(each)


def join_unique_lines(texts: Iterable[str]) -> str:
    """Return the texts, one per line, without repeats."""
    return "\n".join(dict.fromkeys(texts))


def split_answers(answers: str) -> list[str]:
    """Return the answers that ";" separates."""
    stripped = map(str.strip, answers.split(";"))
    return [answer for answer in stripped if answer]
