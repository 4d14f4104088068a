"""Mistakes that people make with a command, each with the sentence that answers it."""

import os
import subprocess
import sys

import entry_points
import pytest
from conftest import ROOT

BEGIN = "from jaxpt.config import defaults\n\n\ndef get_config():\n    c = defaults()\n"
TINY = BEGIN + (
    "    c.model.n_layers, c.model.d_model, c.model.d_ff, c.model.vocab_size = 1, 24, 40, 96\n"
    "    c.model.n_heads, c.model.n_kv_heads, c.model.d_head = 6, 2, 8\n    return c\n"
)
FILES = {
    "recipe.py": TINY,
    "wide.py": TINY.replace("40, 96", "56, 96"),
    "recipe.yaml": "train:\n  steps: 30\n",
    "no_return.py": BEGIN,
    "no_function.py": "steps = 30\n",
    "divides.py": BEGIN + "    n = 0\n    c.train.steps = 30 // n\n    return c\n",
    "open.py": BEGIN.replace("defaults()", "defaults("),
    "misspelt.py": BEGIN + "    c.train.stpes = 30\n    return c\n",
}
MAKE_MODEL = ["--config", "recipe.py", "--from", "random", "--to", "runs/grown"]
RUN = "--workdir runs/x"
LAUNCH = "launch ssh --config configs/quickstart.py --workdir /shared/x --hosts"
PLAN = "plan --config recipe.py --on"
MISTAKES = {
    f"train {RUN} --config recipe.yaml": (
        "--config recipe.yaml: expected a recipe, a Python file with get_config(), got "
        "recipe.yaml. Copy configs/quickstart.py and set its knobs, such as c.train.steps = 300."
    ),
    f"train {RUN} --config .": (
        "--config .: expected a recipe, a Python file with get_config(), got a directory. "
        "Copy configs/quickstart.py and set its knobs, such as c.train.steps = 300."
    ),
    f"train {RUN} --config no_return.py": (
        "--config no_return.py: expected get_config() to return what it got from defaults(), got "
        "None. Does it end with `return c`?"
    ),
    f"train {RUN} --config no_function.py": (
        "--config no_function.py: has no function get_config(). A recipe's begins with "
        "`c = defaults()` and ends with `return c`; see configs/quickstart.py."
    ),
    f"train {RUN} --config divides.py": (
        "--config divides.py, line 7: ZeroDivisionError: integer division or modulo by zero"
    ),
    f"train {RUN} --config open.py": "--config open.py, line 5: '(' was never closed",
    f"train {RUN} --config misspelt.py": (
        "--config misspelt.py, line 6: config: there is no knob train.stpes; did you mean "
        "train.steps?"
    ),
    f"train {RUN} --config recipe.py:child": (
        "--config recipe.py:child: get_config() does not take ['child']; what it takes is given "
        "as FILE.py:VALUE."
    ),
    f"train {RUN} --config {ROOT}/configs/quickstart.py:chlid": (
        f"--config {ROOT}/configs/quickstart.py:chlid: config: model is 'chlid'; did you mean "
        "'child'?"
    ),
    "initialize --from meta-llama/Llama-3.2-1B --to runs/llama": (
        "meta-llama/Llama-3.2-1B: not found. Check the path; a repository of the Hugging Face hub "
        "is named hf:meta-llama/Llama-3.2-1B."
    ),
    "export_hf --from meta-llama/Llama-3.2-1B --to hf": (
        "meta-llama/Llama-3.2-1B: not found. Check the path; a repository of the Hugging Face hub "
        "is named hf:meta-llama/Llama-3.2-1B."
    ),
    "pack --config recipe.py --workdir runs/x": (
        "runs/x/tokenizer: not found. Run jaxpt prepare, then jaxpt train_tokenizer with --config "
        "FILE --workdir runs/x."
    ),
    "train_tokenizer --config recipe.py --workdir runs/x": (
        "runs/x/corpus: not found. Run jaxpt prepare with --config FILE --workdir runs/x."
    ),
    "train --config recipe.py --workdir runs/packless": (
        "runs/packless/packed: no manifest.json, so no stage has finished in this directory. Run "
        "jaxpt pack with --config FILE --workdir runs/packless."
    ),
    f"train --config recipe.py {RUN} --config.train.profile_steps=(2000,2005)": (
        "train.profile_steps: expected (first, last) within the run's steps 1 to 1,000, got "
        "(2000, 2005)."
    ),
    f"train --config recipe.py {RUN} --config.optim.warmup_frac=100": (
        "optim.warmup_frac: expected a fraction of the steps from 0 up to 1, got 100.0."
    ),
    "initialize --config wide.py --from random --to runs/grown": (
        "initialize: runs/grown holds the result of another config (model.d_ff: 40 there, 56 "
        "requested). Give another --to, or --replace."
    ),
    f"{LAUNCH} a,b,c": (
        "--hosts a,b,c: 'a,b,c' is no host that ssh reaches. Separate hosts by spaces: "
        "--hosts a b c."
    ),
    f"{PLAN} H100": "--on H100: there is no chip 'H100'; did you mean h100:8?",
    f"{PLAN} 4xH100": "--on 4xH100: there is no chip '4xH100'; did you mean h100:4?",
    f"{PLAN} A100-80GB:16": (
        "--on A100-80GB:16: there is no chip 'A100-80GB'; did you mean a100:16?"
    ),
    f"{PLAN} v5e-8": "--on v5e-8: there is no chip 'v5e-8'; did you mean v5e:2x4 (8 chips)?",
    f"{PLAN} v5litepod-16": (
        "--on v5litepod-16: there is no chip 'v5litepod-16'; did you mean v5e:4x4 (16 chips)?"
    ),
    f"{PLAN} v5p-128": (
        "--on v5p-128: there is no chip 'v5p-128'; did you mean v5p:4x4x4 (64 chips)?"
    ),
}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A directory with recipes, a run without packed data, and a model."""
    home = tmp_path_factory.mktemp("home")
    for name, text in FILES.items():
        (home / name).write_text(text)
    for name in ("corpus", "tokenizer"):
        (home / "runs/packless" / name).mkdir(parents=True)
    status, text = entry_points.run_command("initialize", MAKE_MODEL, home)
    assert status == 0, text
    return home


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_is_answered_by_one_sentence_that_says_what_to_do(line, home):
    command, *words = line.split(" ")
    cwd = ROOT if command == "launch" else home
    assert entry_points.run_command(command, words, cwd) == (1, f"error: {MISTAKES[line]}\n")


def test_a_platform_that_the_machine_lacks_is_a_sentence(home):
    command = [sys.executable, "-m", "jaxpt", "initialize", "--from", "random", "--to", "there"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cuda"}
    done = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.splitlines()[-1] == (
        "error: JAX_PLATFORMS=cuda: JAX finds none on this machine (no such device or plugin). "
        "Unset it to take what there is, or install requirements-gpu.txt or requirements-tpu.txt "
        "where the card is."
    )
    assert "Traceback" not in done.stderr


def test_a_command_that_ends_well_names_the_next_one(home, output):
    status, text = entry_points.run_command("initialize", MAKE_MODEL, home)
    assert status == 0 and (output() + text).rstrip().endswith(
        "next: jaxpt train --config recipe.py --workdir DIR --config.initialize.source=runs/grown"
    )
