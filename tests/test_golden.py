"""The golden text of every recipe: resolved settings, and what is stated of each parameter.

After an intended change write the files again and review the diff:

    python -m tests.test_golden
"""

import dataclasses
import difflib
import pathlib

import pytest

from jaxpt import config, initialize
from jaxpt.growth.growth import Parent
from jaxpt.growth.parse import plan_growth
from jaxpt.model import transformer
from jaxpt.model.param import list_param_specs

ROOT = pathlib.Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests/golden"
RECIPES = {
    "base": "base.py",
    "course": "course.py",
    "grow-full": "grow.py:full",
    "grow-grown": "grow.py",
    "llama3_8b-pod": "llama3_8b.py",
    "llama3_8b-h100": "llama3_8b.py:h100",
    "moe_small-moe": "moe_small.py:moe",
    "prune-first": "prune.py",
    "prune-second": "prune.py:second",
    "quickstart-base": "quickstart.py",
    "quickstart-child": "quickstart.py:child",
    "three_models-general": "three_models.py",
    "three_models-python": "three_models.py:python",
    "three_models-tuned": "three_models.py:tuned",
    "tiny_solar-general": "tiny_solar.py",
    "tiny_solar-python": "tiny_solar.py:python",
    "tiny_solar-tuned": "tiny_solar.py:tuned",
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
        spec = plan_growth(operator, Parent(spec)).child
    for path, param in sorted(list_param_specs(transformer.param_specs(spec))):
        init = f"mean {param.init.mean:g} std {param.init.std:.6g}"
        yield f"{'/'.join(path)}  shape {param.shape}  axes {param.axes}  {init}"
        roles = [f"n_in {param.n_in}"]
        roles += ["decays"] if param.decays else []
        roles += ["writes_residual"] if param.writes_residual else []
        yield f"    {', '.join(roles)}  {param.hf_name}"
    yield f"{transformer.count_params(spec):,} parameters"


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
