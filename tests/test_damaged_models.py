"""Whatever a model's directory holds, the answer is one sentence or the right model.

benchmarks/faults_models.py is the long form: every command, in children that are watched.
"""

import glob
import json
import os
import random
import re
import shutil

import entry_points
import jax
import numpy as np
import pytest

from jaxpt import export
from jaxpt.data import tokenizer
from jaxpt.spec import UserError
from jaxpt.weights import load

pytest.importorskip("torch")
import faults_models as faults  # after torch is known to be there

N_HOSTILE = 16
# the others take seconds each
SMALL = [name for name in sorted(faults.HOSTILE) if not re.search(r"million|MB|10\^|end", name)]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """llama, by transformers, and llama-exported, by jaxpt."""
    home = tmp_path_factory.mktemp("models")
    faults.make_models(home, ["llama"])
    return home


@pytest.fixture
def read(one):
    """What load_model and load_tokenizer give, or their sentence."""

    def read(directory):
        try:
            model = load.load_model(directory, one)
            return model, tokenizer.load_tokenizer(directory, model.tokenizer)
        except UserError as error:
            assert "\n" not in str(error)
            return str(error)

    return read


@pytest.mark.parametrize("name", random.Random(0).sample(SMALL, N_HOSTILE))
def test_a_hostile_directory_has_an_answer(name, home, read, tmp_path):
    shutil.copytree(home / "llama", tmp_path / "copy")
    faults.HOSTILE[name](tmp_path / "copy", random.Random(0))
    answer = read(tmp_path / "copy")
    assert isinstance(answer, str) or answer[0].spec.vocab_size == faults.VOCAB_SIZE


TOKENIZERS = {
    "an id of 2^31": "ids end at 2,147,483,647",
    "an id twice": "two tokens have one id",
    "a normalizer that multiplies": "its normalizer may make a text 100,000,000 times as long",
    "a normalizer of 10^7": "its normalizer may make a text 10,000,000 times as long",
    "a decoder that multiplies": "its decoder may make a text 1,000,000 times as long",
    "a template's ids without end": "its post_processor adds 3,000,006 tokens to every text",
    "a template of B alone": "index out of bounds",  # a panic of Rust
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_tokenizer_is_tried_before_it_is_used(name, home, tmp_path, capfd):
    shutil.copytree(home / "llama", tmp_path / "copy")
    faults.HOSTILE[f"tokenizer: {name}"](tmp_path / "copy", random.Random(0))
    with pytest.raises(UserError, match=f"cannot be read as a tokenizer .*{TOKENIZERS[name]}"):
        tokenizer.load_tokenizer(tmp_path / "copy")
    with pytest.raises(UserError, match="cannot be read as a tokenizer"):
        export.export_model(tmp_path / "copy", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert "panicked" not in capfd.readouterr().err


def test_a_tokenizer_that_needs_too_much_is_ended(home, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tokenizer, "TRIAL_SECONDS", 0.01)
    with pytest.raises(UserError, match="breaks off on a short text, or takes too long or much"):
        tokenizer.load_tokenizer(home / "llama")


@pytest.mark.parametrize(
    "kind",
    [
        "one bit",
        "empty",
        *(
            pytest.param(kind, marks=pytest.mark.slow)
            for kind in ("cut", "4 kB of zeros", "a pipe", "gone")
        ),
    ],
)
def test_a_damaged_export_is_refused_or_right(kind, home, read, tmp_path):
    whole = home / "llama-exported"
    model, encoder = read(whole)
    for file in sorted(path.name for path in whole.iterdir()):
        copy = shutil.copytree(whole, tmp_path / file)
        faults.FILE_DAMAGES[kind](copy / file, random.Random(file))
        answer = read(copy)
        if isinstance(answer, str):
            assert str(copy) in answer
            continue
        assert answer[1].fingerprint == encoder.fingerprint, file
        assert answer[0].spec == model.spec, file
        jax.tree.map(np.testing.assert_array_equal, answer[0].params, model.params)


def test_control_characters_of_names_never_reach_the_terminal(home, tmp_path):
    names = ("\x1b[2Jgiven", "\x1b]0;x\x07out", "\x9b1mrun", "\x1b[31mtext")
    given, out, run, text = [tmp_path / name for name in names]
    shutil.copytree(home / "llama-exported", given)
    (given / "\x1b[2Jmodel.safetensors").write_text("")
    faults.edit(given / "config.json", lambda config: config | {"\x1b[31mkey": 1})
    (given / "manifest.json").unlink()
    text.write_text(faults.TEXT)
    printed = ""
    for line in (
        ("evaluate", "--model", given, "--tasks", f"bits_per_byte/t=text:{glob.escape(str(text))}"),
        ("export_hf", "--from", given, "--to", out),
        ("initialize", "--from", out, "--to", run, "--probe", "0"),
        ("checkpoint", "inspect", run),
        ("report", "--lineage", out, "--verify"),
        ("export_hf", "--from", given, "--to", out, "--dtype", "bfloat16"),
        ("evaluate", "--model", tmp_path / "\x1b[2J", "--tasks", "bits_per_byte/t=\x1b[2J:x"),
    ):
        _, found = entry_points.run_command(line[0], line[1:], tmp_path)
        printed += found
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", printed), printed
    assert printed.count("\\x1b") > 5 and "params/embed  " in printed
    (given / "model.safetensors").rename(given / "model.bin")
    _, found = entry_points.run_command("evaluate", ["--model", given, "--tasks", "x"], tmp_path)
    assert "\x1b" not in found


def test_code_of_strangers_is_not_copied_and_such_an_export_opens(home, tmp_path):
    import transformers

    given = shutil.copytree(home / "llama", tmp_path / "given")
    edit = lambda name, **keys: faults.edit(given / name, lambda value: value | keys)
    edit("config.json", auto_map={"AutoModelForCausalLM": "theirs.M"})
    edit("tokenizer_config.json", auto_map={"AutoTokenizer": ["theirs.T", None]})
    for name in ("theirs.py", "tokenizer_theirs.py", "vocab.pkl"):
        (given / name).write_text(f"open({str(tmp_path / 'run')!r}, 'w')\n")
    export.export_model(given, tmp_path / "out")
    names = os.listdir(tmp_path / "out")
    assert not [name for name in names if name.endswith((".py", ".pkl"))]
    for name in names:
        if name.endswith(".json"):
            assert "auto_map" not in json.loads((tmp_path / "out" / name).read_text())
    opened = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = tokenizer.load_tokenizer(given).encode_batch([faults.TEXT])[0]
    assert opened(faults.TEXT, add_special_tokens=False).input_ids == ids
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert not (tmp_path / "run").exists()
