"""The benchmark of accelerators, run at a tiny size: results are there, what is missing is
named, and a part that fails does not end the others.
"""

import importlib.util
import json
import subprocess
import sys
import types

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
        assert result.get("seconds", 0) > 0 or "installed" in result["skipped"], (part, result)
    assert results["train-xla"]["tokens/s per device"] > 0
    resumed = results["resume"]
    assert resumed["losses equal"] == 200 > resumed["killed after step"] >= 10
    for name in ("first loss", "first gradient norm"):
        assert results["train-xla"][name] == results["train-auto"][name]
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    table = (tmp_path / "table.md").read_text().splitlines()
    assert [line.split(" | ")[0].strip("| ") for line in table[2:]] == list(accelerator.PARTS)


def test_a_part_that_fails_hangs_or_lacks_a_package_is_named(tmp_path, monkeypatch):
    script = tmp_path / "parts.py"
    script.write_text(
        "import sys, time\n"
        "part = sys.argv[sys.argv.index('--parts') + 1]\n"
        "if part == 'hangs':\n    time.sleep(600)\n"
        "sys.exit('no memory' if part == 'fails' else None)\n"
    )
    monkeypatch.setattr(accelerator, "SCRIPT", script)
    packages = {"fails": (), "hangs": (), "lacks": ("no_such_package",)}
    parts = {name: accelerator.Part(None, *needed) for name, needed in packages.items()}
    monkeypatch.setattr(accelerator, "PARTS", parts)
    args = types.SimpleNamespace(out=tmp_path, steps=1, tiny=True)
    results = {name: accelerator.run_part(name, args) for name in ("fails", "lacks")}
    monkeypatch.setattr(accelerator, "PART_SECONDS", 1)
    results["hangs"] = accelerator.run_part("hangs", args)
    assert results["fails"] == {"failed": "status 1: no memory"}
    assert results["hangs"] == {"failed": "after 1 s it was stopped"}
    assert results["lacks"] == {"skipped": "no_such_package not installed"}
    assert "| lacks | skipped no_such_package not installed |" in accelerator.format_table(results)
