"""`jaxpt COMMAND`: help at once and in 100 columns, the nearest name for a mistake, completion."""

import os
import re
import stat
import subprocess
import sys

import entry_points
import pytest
from conftest import ROOT

from jaxpt import config
from jaxpt.cli import doctor, main, plan

SCRIPT = """\"\"\"The same as `jaxpt {name}`.\"\"\"

from jaxpt.cli.main import main

if __name__ == "__main__":
    main("{name}")
"""


def run_process(*words, **environment):
    """Return what `jaxpt WORDS` prints, and the modules that it has imported."""
    code = f"""import sys
from jaxpt.cli.main import main
sys.argv = {["jaxpt", *words]!r}
try:
    main()
finally:
    print("LOADED", *sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    text, _, loaded = done.stdout.partition("LOADED")
    return text, set(loaded.split())


def test_the_overview_lists_each_command_once_in_the_order_of_the_pipeline():
    text, loaded = run_process("--help", COLUMNS="100")
    listed = re.findall(r"^  (\w+)  +[A-Z].*\.$", text, re.MULTILINE)
    assert listed == main.COMMANDS
    pipeline = ["prepare", "train_tokenizer", "pack", "initialize", "train", "export_hf"]
    pipeline += ["evaluate", "compare", "report"]
    assert [name for name in listed if name in pipeline] == pipeline
    assert max(map(len, text.splitlines())) <= 100
    assert not loaded & {"jax", "numpy", "argcomplete"}


@pytest.mark.parametrize("name", main.COMMANDS)
def test_every_command_answers_help_without_importing_jax(name):
    text, loaded = run_process(name, "--help", COLUMNS="100")
    assert text.startswith(f"usage: jaxpt {name}") and text.count(f"jaxpt {name} ") >= 2, (
        "help shows an example"
    )
    assert max(map(len, text.splitlines())) <= 100
    assert not loaded & {"jax", "numpy"}, "it answers in well under a second"


@pytest.mark.parametrize(
    ("words", "expected"), [(["doctor"], ["set", "run"]), (["plan", "--check", "x"], ["run"])]
)
def test_a_command_that_uses_devices_sets_their_variables_before_it_runs(
    words, expected, monkeypatch
):
    """The others import no jax, leave it to processes of their own, or read what is on disk."""
    others = {"plan", "prepare", "train_quality", "train_tokenizer", "pack", "sweep", "report"}
    assert {*main.COMMANDS} - {*main.ON_DEVICE} == others | {"launch"}
    calls = []
    monkeypatch.setattr(main.xla_settings, "set_variables", lambda: calls.append("set"))
    for command in (doctor, plan):
        monkeypatch.setattr(command, "run", lambda arguments: calls.append("run"))
    main.run_command(words)
    assert calls == expected


def test_help_lists_the_knobs_that_a_command_reads_and_no_others(capsys):
    status, text = entry_points.run_command("train", ["--help"], ROOT)
    text = " ".join(text.split())
    for section in (config.TrainConfig, config.OptimConfig, config.MeshConfig):
        name = section.__name__.removesuffix("Config").lower()
        for knob in section.__dataclass_fields__.values():
            assert f"--config.{name}.{knob.name} " in text
            assert " ".join(knob.metadata["help"].split()) in text
    assert "--config.train.max_consecutive_skips 20 " in text, "the default"
    assert status == 0 and "--config.prepare" not in text and "--config.plan" not in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian"], "jaxpt: there is no command trian; did you mean jaxpt train?"),
        (["export-fh"], "there is no command export-fh; did you mean jaxpt export_hf?"),
        (["quux"], "there is no command quux; expected one of plan, doctor, "),
        (
            ["train", "--confg", "x"],
            "jaxpt train: there is no flag --confg; did you mean --config?",
        ),
        (["train", "--config.train.stpes=5"], "no knob train.stpes; did you mean train.steps?"),
        (["train", "--config.trian.steps", "5"], "no section trian; did you mean train?"),
        (["train", "--config.train.step=5"], "no knob train.step; did you mean train.steps?"),
        (["pack", "--workdir", "x"], "jaxpt pack: the following arguments are required: --config"),
        (["launch", "ssh", "--host", "a"], "jaxpt launch ssh: there is no flag --host; did you"),
        (
            ["checkpoint", "inspct", "x"],
            "jaxpt checkpoint: argument inspect|diff|merge|average: invalid choice",
        ),
        (
            ["train", "--config=x.py", "--workdir=x", "--config.train.steps"],
            "expected one argument",
        ),
    ],
)
def test_a_mistake_in_a_command_line_is_one_sentence(words, message):
    status, text = entry_points.run_command(words[0], words[1:], ROOT)
    assert status == 1 and message in text and text.count("\n") == 1, text


@pytest.mark.parametrize("form", ["=", " "])
def test_overrides_arrive_in_order_whatever_they_contain(tmp_path, form):
    recipe = tmp_path / "recipe.py"
    recipe.write_text("from jaxpt.config import defaults as get_config\n")
    given = ["5", "('a b=text:it\\'s $HOME/\"x\" *.txt',)", "7"]
    knobs = ["train.steps", "prepare.sources", "train.steps"]
    words = ["train", "--config", str(recipe), "--workdir", "x"]
    for knob, value in zip(knobs, given, strict=True):
        flag = f"--config.{knob}"
        words += [f"{flag}={value}"] if form == "=" else [flag, value]
    arguments = main.build_parser().parse_args(words)
    assert list(arguments.overrides) == [
        f"--config.{knob}={value}" for knob, value in zip(knobs, given, strict=True)
    ]
    assert main.options.load_settings(arguments).train.steps == 7


def test_a_hyphen_is_as_good_as_an_underscore():
    assert entry_points.run_command("export-hf", ["--help"], ROOT) == entry_points.run_command(
        "export_hf", ["--help"], ROOT
    )


def test_every_command_is_a_script_too():
    for name in main.COMMANDS:
        assert (ROOT / f"scripts/{name}.py").read_text() == SCRIPT.format(name=name)


@pytest.fixture
def complete(tmp_path):
    """A function: what bash offers at the end of a command line, with jaxpt on the PATH."""
    argcomplete = pytest.importorskip("argcomplete")
    jaxpt = tmp_path / "bin/jaxpt"
    jaxpt.parent.mkdir()
    jaxpt.write_text(f"#!{sys.executable}\nfrom jaxpt.cli.main import main\nmain()\n")
    jaxpt.chmod(jaxpt.stat().st_mode | stat.S_IXUSR)
    (tmp_path / "recipe.py").touch()

    def ask(line):
        script = argcomplete.shellcode(["jaxpt"]) + (
            f"\nCOMP_LINE={line!r}; COMP_POINT=${{#COMP_LINE}}; COMP_TYPE=9\n"
            "COMP_WORDS=($COMP_LINE); COMP_CWORD=$((${#COMP_WORDS[@]} - 1))\n"
            '_python_argcomplete jaxpt; printf "%s\\n" "${COMPREPLY[@]}"\n'
        )
        done = subprocess.run(
            ["bash", "--norc", "-c", script],
            cwd=tmp_path,
            env={**os.environ, "PATH": f"{jaxpt.parent}:{os.environ['PATH']}"},
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout.split()

    return ask


@pytest.mark.parametrize(
    ("line", "offers"),
    [
        ("jaxpt che", ["checkpoint"]),
        ("jaxpt prepare --rep", ["--replace"]),
        ("jaxpt train --config.train.batch", ["--config.train.batch_size"]),
        ("jaxpt train --config.prepare.", []),
        ("jaxpt train --config.train.remat=m", ["minimal"]),
        ("jaxpt train --config.mixture.document_mask F", ["False"]),
        ("jaxpt train --config rec", ["recipe.py"]),
        ("jaxpt launch s", ["ssh"]),
    ],
)
def test_bash_completes_commands_flags_knobs_and_values(complete, line, offers):
    assert complete(line) == offers


@pytest.mark.parametrize("module", ["jaxpt", "jaxpt.cli.main"])
def test_the_package_runs_as_a_module(module):
    done = subprocess.run(
        [sys.executable, "-m", module, "pak"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1 and "did you mean jaxpt pack?" in done.stderr
    done = subprocess.run(
        [sys.executable, "-m", module, "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0 and "train_tokenizer" in done.stdout


CLEAR = "\x1b[2J\x07"
PRINT_DATA = f"""
import logging
from jaxpt import stage, text
from jaxpt.spec import UserError
def main():
    print(text.format_table([["id", {CLEAR!r}], ["a\\rb", "2"]]))
    logging.getLogger("jaxpt").warning("key " + {CLEAR!r} + "\\nnext line")
    raise UserError("name " + {CLEAR!r} + "\\nnext line")
stage.entry_point(main)
"""


def test_control_characters_of_data_never_reach_a_terminal():
    done = subprocess.run([sys.executable, "-c", PRINT_DATA], cwd=ROOT, capture_output=True)
    shown = (done.stdout + done.stderr).decode()
    assert all(char.isprintable() or char == "\n" for char in shown)
    assert shown.count(r"\x1b[2J\x07") == 3 and r"a\rb" in shown and shown.count("\nnext line") == 2


def test_a_mistyped_address_is_a_sentence_and_no_folder(tmp_path):
    for given, hint in (("gs:/b/run", "two slashes"), ("gcs://b/run", "Write gs://b/run")):
        command = [sys.executable, "-m", "jaxpt", "prepare", "--workdir", given]
        command += ["--config", str(ROOT / "configs/quickstart.py")]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode and hint in done.stderr and "Traceback" not in done.stderr
    assert not os.listdir(tmp_path)
