"""Write a model's tokenizer for transformers, which gives the ids of the run."""

from __future__ import annotations

import json
import logging
import pathlib
import subprocess
import sys
from collections.abc import Iterable
from typing import NamedTuple

from jaxpt import io
from jaxpt.data import tokenizer
from jaxpt.data.tokenizer import Tokenizer
from jaxpt.families import family
from jaxpt.spec import ModelSpec, UserError
from jaxpt.weights import auto_tokenizer
from jaxpt.weights.huggingface import copy_tokenizer
from jaxpt.weights.safetensors_file import write_hf_json

log = logging.getLogger(__name__)

TRIAL_SECONDS = 300  # the largest tokenizer in use takes 5
# files beside tokenizer.json whose content is in a tokenizer_config.json of ours
MERGED_FILES = (tokenizer.TOKENS_MAP, tokenizer.ADDED_TOKENS)


def export_tokenizer(
    encoder: Tokenizer, source: pathlib.Path, spec: ModelSpec, directory: pathlib.Path
) -> None:
    """Write the tokenizer of a model, and open it as transformers does beside its config.json.

    Its files are copied. Where AutoTokenizer would give other ids than `encoder`, as by an
    add_bos_token that it does not read, they are written anew.

    Args:
        encoder: of the run.
        source: directory of its files.
        spec: of the model.
        directory: to write to.

    Raises:
        UserError: AutoTokenizer gives other ids all the same.
    """
    copy_tokenizer(source, directory)
    is_copy = io.size(source / "tokenizer.json") is not None
    if is_copy and not find_difference(encoder, spec, directory):
        return
    encoder.save_tokenizer(directory)
    for name in MERGED_FILES:
        io.remove(directory / name)
    difference = find_difference(encoder, spec, directory)
    if not difference:
        if is_copy:
            log.warning("export: transformers read the tokenizer otherwise; it is written anew")
        return
    others = [name for name in family.list_families() if name != spec.family]
    stating = [spec.replace(family=name) for name in others]
    stating = filter(family.can_state, stating)
    able = [other.family for other in stating if not find_difference(encoder, other, directory)]
    hint = "Train the model on a tokenizer that this family's class reads."
    if able:
        hint = f"Export it as another family, which has no class of its own: --family {able[0]}."
    raise UserError(f"{source}: beside a {spec.family} config.json, {difference}. {hint}")


def find_difference(encoder: Tokenizer, spec: ModelSpec, directory: pathlib.Path) -> str:
    """Return how AutoTokenizer's ids differ from ours in a model's directory; "" if they do not."""
    with io.temporary_directory() as trial:
        copy_tokenizer(directory, trial)
        write_hf_json(trial / "config.json", family.write_config(spec, "float32"))
        found = encode_by_transformers(trial, tokenizer.PROBE_TEXTS)
    if found.error:
        return f"transformers cannot open the tokenizer ({io.printable(found.error)})"
    ours = encoder.encode_probe_texts()
    pairs = zip(tokenizer.PROBE_TEXTS, ours, found.ids, strict=True)
    other = [text for text, expected, got in pairs if expected != got]
    if not other:
        return ""
    return (
        f"transformers opens the tokenizer as {found.tokenizer_class}, which encodes {len(other)} "
        f"of {len(ours)} texts otherwise than the run, such as {other[0]!r}"
    )


class TrialResult(NamedTuple):
    """What AutoTokenizer made of some texts."""

    tokenizer_class: str
    ids: list[list[int]]
    error: str  # "" if there is none


def encode_by_transformers(directory: pathlib.Path, texts: Iterable[str]) -> TrialResult:
    """Encode texts with AutoTokenizer in a process of its own."""
    try:
        done = subprocess.run(
            [sys.executable, "-P", auto_tokenizer.__file__, str(directory)],
            input=json.dumps(list(texts)).encode(),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=TRIAL_SECONDS,
        )
        found = json.loads(done.stdout)
    except (subprocess.TimeoutExpired, ValueError):
        return TrialResult("", [], "it breaks off, or takes too long")
    return TrialResult(found.get("class", ""), found.get("ids", []), found.get("error", ""))
