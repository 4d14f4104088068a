"""XLA's settings for a kind of device: a user's values win, compilers know all flags."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT

from jaxpt import hardware, launch, xla_settings
from jaxpt.plan import compile

CHIPS = [chip for chip in hardware.CHIPS.values() if chip.platform != "cpu"]
COMPILE = """
import sys
import jax
from jaxpt import hardware
from jaxpt.plan import compile
target = hardware.parse_target(sys.argv[1])
device = compile.make_target_devices(target, None)[0]
x = jax.ShapeDtypeStruct((8, 8), "float32", sharding=jax.sharding.SingleDeviceSharding(device))
jax.jit(lambda x: x @ x).lower(x).compile()
"""


def compile_product(target, variables):
    """The process that compiles a matmul for a target, under these variables alone."""
    kept = {k: v for k, v in os.environ.items() if k not in xla_settings.VARIABLES}
    return subprocess.run(
        [sys.executable, "-c", COMPILE, target],
        env=kept | variables | compile.COMPILER_ENV | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )


def pick_target(chip):
    return f"{chip.name}:1" if chip.platform == "cuda" else f"{chip.name}:{smallest_slice(chip)}"


def smallest_slice(chip):
    return "2x2x1" if chip.name in ("v4", "v5p", "tpu7x") else "2x2"


@pytest.mark.slow
@pytest.mark.parametrize("chip", CHIPS, ids=lambda chip: chip.name)
def test_the_installed_compilers_know_every_flag(chip):
    """An unknown one ends a process: the same with one more flag shows that it would."""
    target = pick_target(chip)
    missing = compile.find_missing_package(hardware.parse_target(target))
    if missing:
        pytest.skip(f"{missing} is not installed")
    variables = xla_settings.choose_variables(chip.platform, chip, {})
    done = compile_product(target, variables)
    assert done.returncode == 0, done.stderr[-2000:]
    name = "LIBTPU_INIT_ARGS" if chip.platform == "tpu" else "XLA_FLAGS"
    misspelt = variables | {name: variables[name] + " --xla_tpu_gpu_no_such_flag=true"}
    assert compile_product(target, misspelt).returncode != 0


def test_a_users_own_flags_and_variables_win():
    h100 = hardware.CHIPS["h100"]
    threshold = "--xla_gpu_all_gather_combine_threshold_bytes"
    user = {
        "XLA_FLAGS": f"{threshold}=7 --xla_dump_to=d",
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.5",
        "HOME": "h",
    }
    found = xla_settings.choose_variables("cuda", h100, user)
    words = found["XLA_FLAGS"].split()
    assert words[-2:] == [f"{threshold}=7", "--xla_dump_to=d"]
    assert [word.partition("=")[0] for word in words].count(threshold) == 1
    assert "--xla_gpu_enable_command_buffer=" in words  # no CUDA graphs on Hopper
    assert found["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.5"
    assert found["JAX_OPTIMIZATION_LEVEL"] == "O1" and "HOME" not in found
    tpu = xla_settings.choose_variables("tpu", None, {"LIBTPU_INIT_ARGS": "--xla_a=b"})
    assert tpu["LIBTPU_INIT_ARGS"].split()[-1] == "--xla_a=b" and len(tpu) == 1
    assert xla_settings.choose_variables("cpu", None, user) == {}


def test_a_users_file_of_flags_is_left_alone():
    """XLA reads flags from a file of that name only if nothing else is there."""
    found = xla_settings.choose_variables("cuda", None, {"XLA_FLAGS": "flags.txt"})
    assert found["XLA_FLAGS"] == "flags.txt" and found["JAX_OPTIMIZATION_LEVEL"] == "O1"


def test_launch_hands_on_what_a_user_set():
    assert set(xla_settings.VARIABLES) <= set(launch.HANDED_ON)


@pytest.mark.parametrize(
    ("files", "asked", "found"),
    [
        ({"cards/0/information": "Model: \t NVIDIA H100 80GB HBM3\n"}, "", ("cuda", "h100")),
        ({"cards/0/information": "Model: \t NVIDIA T1000\n"}, "cuda,cpu", ("cuda", None)),
        ({"cards/0/information": "Model: \t NVIDIA H100 80GB HBM3\n"}, "cpu", ("cpu", None)),
        ({"dev/accel0": ""}, "", ("tpu", None)),
        ({"dev/vfio/0": ""}, "tpu,cpu", ("tpu", None)),
        ({"dev/accel0": ""}, "cpu", ("cpu", None)),
        ({"dev/null": ""}, "", ("cpu", None)),
    ],
)
def test_a_card_or_tpu_is_found_before_jax_starts(monkeypatch, tmp_path, files, asked, found):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(xla_settings, "NVIDIA_CARDS", tmp_path / "cards")
    monkeypatch.setattr(xla_settings, "DEVICE_FILES", tmp_path / "dev")
    monkeypatch.setenv("JAX_PLATFORMS", asked)
    platform, chip = xla_settings.find_accelerator()
    assert (platform, chip and chip.name) == found


@pytest.mark.parametrize(
    ("user", "expected"), [((), ("0.92", None)), (("0.4",), ("0.4", None)), ((None, "0.5"), None)]
)
def test_one_variable_at_most_sets_the_share_of_a_card(user, expected):
    """JAX has two names for it, and refuses both at once."""
    names = xla_settings.MEM_VARIABLES
    theirs = {name: value for name, value in zip(names, user, strict=False) if value}
    found = xla_settings.choose_variables("cuda", None, theirs)
    assert tuple(map(found.get, names)) == (expected or user)


def test_cards_get_command_buffers_by_their_generation():
    def flags(chip):
        return xla_settings.choose_variables("cuda", chip, {})["XLA_FLAGS"].split()

    buffers = "--xla_gpu_enable_command_buffer"
    assert f"{buffers}=FUSION,CUSTOM_CALL" in flags(hardware.CHIPS["b200"])
    for chip in (hardware.CHIPS["a100"], None):
        assert not [flag for flag in flags(chip) if flag.startswith(buffers)]


def test_a_process_without_accelerator_is_told_nothing(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    before = dict(os.environ)
    xla_settings.set_variables()
    assert dict(os.environ) == before and xla_settings.find_accelerator() == ("cpu", None)
