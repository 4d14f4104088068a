"""The golden text of every recipe: resolved settings, and each parameter's shape, axes and std.

After an intended change write the files again and review the diff:

    python -m tests.test_golden
"""

import dataclasses
import difflib
import pathlib

import pytest

from jaxpt import config
from jaxpt.model import llama
from jaxpt.weights import growth, initialize

ROOT = pathlib.Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests/golden"
RECIPES = {
    "base": "base.py",
    "course": "course.py",
    "llama3_8b-pod": "llama3_8b.py",
    "llama3_8b-h100": "llama3_8b.py:h100",
    "quickstart-base": "quickstart.py",
    "quickstart-child": "quickstart.py:child",
    "three_models-general": "three_models.py",
    "three_models-python": "three_models.py:python",
    "three_models-tuned": "three_models.py:tuned",
}


def describe_settings(settings):
    """Yield a line per knob of every section."""
    for section in dataclasses.fields(settings):
        for name, value in dataclasses.asdict(getattr(settings, section.name)).items():
            yield f"{section.name}.{name} = {value!r}"


def describe_params(settings):
    """Yield a line per parameter of the model that a recipe initializes from scratch."""
    spec = initialize.make_random_spec(settings.model, settings.tokenizer.vocab_size)
    for operator in settings.initialize.grow:
        spec = growth.plan_growth(operator, growth.Parent(spec)).child
    params = llama.param_specs(spec)
    rows = {**params, **{f"blocks/{name}": row for name, row in params["blocks"].items()}}
    del rows["blocks"]
    for name, row in sorted(rows.items()):
        start = "ones" if row.ones else f"std {row.std:.6g}"
        yield f"{name}  shape {row.shape}  axes {row.axes}  {start}"
    yield f"{llama.count_params(spec):,} parameters"


def describe_recipe(path):
    settings = config.load_config(ROOT / "configs" / path)
    lines = list(describe_settings(settings))
    if settings.initialize.source == "random":
        lines += ["", *describe_params(settings)]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_resolves_to_its_golden_text(name):
    golden = (GOLDEN / f"{name}.txt").read_text()
    now = describe_recipe(RECIPES[name])
    changes = difflib.unified_diff(golden.splitlines(), now.splitlines(), "golden", "now", n=0)
    assert now == golden, "\n".join([*changes, "Intended? python -m tests.test_golden"])


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for name, path in RECIPES.items():
        (GOLDEN / f"{name}.txt").write_text(describe_recipe(path))
