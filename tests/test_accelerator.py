"""The benchmark of accelerators, run at a tiny size: results are there, what is missing is
named, and a part that fails does not end the others.
"""

import importlib.util
import json
import subprocess
import sys
import types

import numpy as np
import pytest
from conftest import ROOT

SCRIPT = ROOT / "benchmarks/accelerator.py"
spec = importlib.util.spec_from_file_location("accelerator", SCRIPT)
accelerator = importlib.util.module_from_spec(spec)
spec.loader.exec_module(accelerator)


@pytest.mark.slow
def test_every_part_runs_at_a_tiny_size_or_says_what_it_lacks(tmp_path):
    command = [sys.executable, str(SCRIPT), "--out", str(tmp_path), "--tiny", "--steps", "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    results = {
        part: json.loads((tmp_path / f"{part}.json").read_text()) for part in accelerator.PARTS
    }
    assert done.returncode == 0, (done.stdout, done.stderr)
    for part, result in results.items():
        assert result.get("seconds", 0) > 0 or "skipped" in result, (part, result)
    assert results["attention-cudnn"] == {"skipped": "cudnn is not for cpu"}
    ran = {part for part, result in results.items() if "skipped" not in result}
    assert {part for part in accelerator.PARTS if part.startswith("train-")} - ran <= {
        "train-torch"  # where torch is not installed
    }
    assert results["train-xla"]["tokens/s per device"] > 0
    resumed = results["resume"]
    assert resumed["steps"] == 200 > resumed["killed after step"] >= 10
    assert resumed["equal losses"] == 200 and resumed["largest difference, nats"] == 0
    for name in ("first loss", "first gradient norm"):
        assert results["train-xla"][name] == results["train-auto"][name]
    planned = results["plan"]["planned peak GiB"]
    assert planned == pytest.approx(results["train-auto"]["compiler's GiB"], rel=0.05)
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    table = (tmp_path / "table.md").read_text().splitlines()
    parts = [line.split(" | ")[0].strip("| ") for line in table if " | " in line]
    assert sorted(parts) == sorted([*accelerator.PARTS, "train step", "part"])


def test_a_tokens_document_is_as_long_as_its_tokens_say():
    ids = np.array([[1, 1, 1, 1, 2, 0], [3, 3, 3, 3, 3, 3]])
    assert accelerator.measure_mean_document(ids) == round((16 + 1 + 1 + 36) / 12)


def test_a_big_model_is_not_measured_on_a_cpu(tmp_path):
    command = [sys.executable, str(SCRIPT), "--out", str(tmp_path), "--parts", "train-auto"]
    subprocess.run(command, check=True, capture_output=True)
    found = json.loads((tmp_path / "train-auto.json").read_text())
    assert found == {"skipped": "JAX sees no accelerator"}


def test_a_result_is_replaced_by_a_newer_one_and_by_nothing_else(tmp_path):
    path = tmp_path / "decode.json"
    for result, kept in (
        ({"skipped": "no time"}, "skipped"),
        ({"tokens/s": 3.5, "seconds": 2.0}, 3.5),
        ({"failed": "status 1"}, 3.5),
        ({"tokens/s": 7.25, "seconds": 2.0}, 7.25),
    ):
        accelerator.keep_result(path, result)
        found = accelerator.read_results(tmp_path)["decode"]
        assert kept in (*found, *found.values())


def test_a_part_that_fails_hangs_or_lacks_a_package_is_named(tmp_path, monkeypatch):
    script = tmp_path / "parts.py"
    script.write_text(
        "import pathlib, sys, time\n"
        "part = sys.argv[sys.argv.index('--parts') + 1]\n"
        "if part == 'hangs':\n    time.sleep(600)\n"
        "if part == 'fails':\n    sys.exit('no memory')\n"
        "print('chatter')\n"
        "home = pathlib.Path(sys.argv[sys.argv.index('--out') + 1])\n"
        "(home / f'{part}.new').write_text('{\"tokens/s\": 7.5}')\n"
    )
    monkeypatch.setattr(accelerator, "SCRIPT", script)
    packages = {"fails": (), "hangs": (), "runs": (), "lacks": ("no_such_package",)}
    parts = {name: accelerator.Part(None, *needed) for name, needed in packages.items()}
    monkeypatch.setattr(accelerator, "PARTS", parts)
    args = types.SimpleNamespace(out=tmp_path, steps=1, tiny=True)
    results = {name: accelerator.run_part(name, args) for name in ("fails", "lacks", "runs")}
    monkeypatch.setattr(accelerator, "PART_SECONDS", 1)
    results["hangs"] = accelerator.run_part("hangs", args)
    assert results["fails"] == {"failed": "status 1: no memory"}
    assert results["hangs"] == {"failed": "after 1 s it was stopped"}
    assert results["lacks"] == {"skipped": "no_such_package not installed"}
    assert results["runs"].keys() == {"tokens/s", "seconds", "date", "commit", "size"}
    assert "| lacks | skipped no_such_package not installed |" in accelerator.format_tables(results)
