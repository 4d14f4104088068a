"""Configs: what is misspelt, missing or of the wrong type is refused with the nearest match."""

import ast
import dataclasses
import json
import subprocess
import sys

import pytest
from conftest import ROOT

from jaxpt import config
from jaxpt.spec import UserError

RECIPES = sorted((ROOT / "configs").glob("*.py"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_every_recipe_opens_and_says_what_to_expect(path):
    config.load_config(path)
    assert ast.get_docstring(ast.parse(path.read_text()))


def test_the_list_of_knobs_is_the_defaults():
    assert config.load_config(ROOT / "configs/base.py") == config.Config()


def test_a_recipe_takes_an_argument_and_overrides_apply_last(tmp_path):
    recipe = tmp_path / "recipe.py"
    recipe.write_text(
        "from jaxpt.config import defaults\ndef get_config(size='small'):\n  "
        "  c = defaults()\n    c.model.d_model = "
        "{'small': 24, 'large': 48}[size]\n    return c\n"
    )
    assert config.load_config(recipe).model.d_model == 24
    assert config.load_config(f"{recipe}:large").model.d_model == 48
    assert config.load_config(f"{recipe}:large", ["--config.model.d_model=72"]).model.d_model == 72


@pytest.mark.parametrize(
    ("override", "answer"),
    [
        ("--config.train.stpes=5", "did you mean train.steps?"),
        ("--config.trian.steps=5", "did you mean train?"),
        ("--config.train.steps=many", "train.steps: expected int, got 'many'"),
        ("--config.train.steps=True", "expected int"),
        ("--config.train.steps=0", "expected at least 1"),
        ("--config.optim.schedule=wds", "did you mean 'wsd'?"),
        ("--config.train.grad_accum_steps=5", "Use a divisor of 32"),
        ("--config.prepare.heldout_frac=1.5", "expected a fraction"),
        ("--config.mixture.phases=((5, {'a': 1}),)", "start at 0 and rise"),
        ("--config.mixture.phases=((0, {'a': 0}),)", "at least one above 0"),
        ("--config.train.grow=((20, 'stack()'), (10, 'stack()'))", "expected rising steps"),
        ("--config.train.grow=((1000, 'stack()'),)", "between 0 and train.steps = 1000"),
        ("--config.optim.lr_multipliers=(('old', -0.5),)", "0 freezes a group"),
        ("--config.initialize.mode=resume", "initialize.source is random"),
        ("--config.train", "expected --config.SECTION.NAME=VALUE"),
    ],
)
def test_a_wrong_override_is_one_sentence(override, answer):
    with pytest.raises(UserError) as refused:
        config.load_config(ROOT / "configs/base.py", [override])
    assert answer in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_misspelt_knob_in_a_recipe_is_one_sentence(tmp_path):
    recipe = tmp_path / "recipe.py"
    recipe.write_text(
        "from jaxpt.config import defaults\ndef get_config():\n    c = "
        "defaults()\n    c.train.stpes = 5\n    return c\n"
    )
    with pytest.raises(UserError, match="steps"):
        config.load_config(recipe)


def test_a_recipe_that_returns_nothing_is_named(tmp_path):
    recipe = tmp_path / "recipe.py"
    recipe.write_text("def get_config():\n    pass\n")
    with pytest.raises(UserError, match=r"got None. Does it end with `return c`\?"):
        config.load_config(recipe)


def test_a_type_checker_refuses_what_is_misspelt_or_of_another_type_in_a_recipe(tmp_path):
    pytest.importorskip("pyright")
    (tmp_path / "recipe.py").write_text(
        "from jaxpt.config import defaults\n\nc = defaults()\nc.train.steps = 300\n"
        "c.mixture.phases = ((0, {'prose': 1}),)\nc.train.stpes = 300\n"
        "c.train.steps = '300'\nc.trian.steps = 300\n"
    )
    command = [sys.executable, "-m", "pyright", "--outputjson", "recipe.py"]
    (tmp_path / "jaxpt").symlink_to(ROOT / "jaxpt")
    output = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True).stdout
    found = json.loads(output)["generalDiagnostics"]
    assert [(each["severity"], each["range"]["start"]["line"] + 1) for each in found] == [
        ("error", 6),
        ("error", 7),
        ("error", 8),
    ]


def test_numbers_keep_their_kind():
    settings = config.load_config(
        ROOT / "configs/base.py",
        [
            "--config.train.steps=1e3",
            "--config.optim.peak_lr=1",
            "--config.prepare.sources=text:a.txt",
        ],
    )
    assert settings.train.steps == 1000 and type(settings.train.steps) is int
    assert settings.optim.peak_lr == 1.0 and type(settings.optim.peak_lr) is float
    assert settings.prepare.sources == ("text:a.txt",)


def test_sections_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.Config().train.steps = 5


def test_a_command_fails_with_one_sentence_and_status_1(tmp_path):
    message = subprocess.run(
        [
            sys.executable,
            "scripts/train.py",
            "--config",
            "configs/quickstart.py",
            "--workdir",
            str(tmp_path),
            "--config.train.stpes=5",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert message.returncode == 1
    assert (
        message.stderr.strip()
        == "error: config: there is no knob train.stpes; did you mean train.steps?"
    )
