"""jaxpt doctor: what it measures and finds, and that its report stays with the run."""

import dataclasses

import entry_points
import jax
import pytest

from jaxpt import doctor, io, sharding
from jaxpt.train import result

GOOD = doctor.DoctorReport(
    created="2026-11-29T12:00:00+00:00",
    host="box",
    platform="gpu",
    device_kind="NVIDIA H100 80GB HBM3",
    n_devices=8,
    versions={"jax": "0.10.2"},
    matmul_flops={"bfloat16": 7e14, "float32": 3.5e14},
    fastest_matmul_flops={"bfloat16": 7.1e14, "float32": 3.6e14},
    peak_flops={"bfloat16": 9.9e14, "float32": 4.95e14},
    memory_bytes=2.9e12,
    link_bytes=3e11,
    write_bytes=1e9,
    read_bytes=2e9,
    clock_seconds=0.2,
    findings=(),
)


def test_a_machine_is_measured_and_its_report_stays_in_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "MEASURE_SECONDS", 0.01)
    monkeypatch.setattr(doctor, "N_DISK_BYTES", 3_000_001)
    monkeypatch.setattr(sharding, "find_devices", lambda: jax.devices()[:2])
    status, text = entry_points.run_command("doctor", ["--workdir", "run"], tmp_path)
    assert status == 0 and "2 x cpu" in text and "TFLOP/s" in text and "one device" not in text
    report = doctor.DoctorReport.from_json(io.read_json(tmp_path / "run/doctor.json"))
    rates = (*report.matmul_flops.values(), report.memory_bytes, report.link_bytes)
    assert min(rates) > 0 and min(report.write_bytes, report.read_bytes) > 0
    assert report.n_devices == 2 and report.versions["jaxlib"]
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["doctor.json"]
    assert doctor.FILE in result.RECORDS, "a finished run's manifest has its checksum"
    assert doctor.read_summary(tmp_path / "run").startswith("2 x cpu on ")

    (tmp_path / "run/doctor.json").unlink()
    (tmp_path / "run/manifest.json").touch()
    doctor.examine_machine(tmp_path / "run")
    assert not (tmp_path / "run/doctor.json").exists(), "the record of a finished run is sealed"


@pytest.mark.parametrize(
    ("changes", "finding"),
    [
        ({}, None),
        ({"matmul_flops": {"bfloat16": 4.8e14}}, "48% of the published peak"),
        ({"matmul_flops": {"bfloat16": 5.4e14}}, "the slowest device has 76% of the fastest's"),
        ({"write_bytes": 2e7}, "writing takes 50 s per GB"),
        ({"clock_seconds": -70.0}, "clocks differ by -70 s"),
    ],
)
def test_what_a_run_would_suffer_from_is_named(changes, finding):
    found = doctor.list_findings(dataclasses.replace(GOOD, **changes))
    assert bool(found) == bool(finding) and (finding or "") in " ".join(found)


def test_cards_that_jax_does_not_see_are_named(monkeypatch):
    monkeypatch.setattr(doctor, "CARDS", {"/dev/null": "requirements-gpu.txt"})
    [finding] = doctor.list_findings(dataclasses.replace(GOOD, platform="cpu", peak_flops={}))
    assert "JAX sees CPUs alone: install requirements-gpu.txt" in finding
