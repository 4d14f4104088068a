"""Compile a program for a chip that is not here, in a process that has its compiler."""

import os
import subprocess
import sys

import pytest

from jaxpt import hardware
from jaxpt.plan import compile

# what a program has: jax, jnp, the package, and a mesh of the chip's devices
HEAD = """
import sys
import jax
import jax.numpy as jnp
from jaxpt import config, hardware, sharding
from jaxpt.plan import compile
devices = compile.make_target_devices(hardware.parse_target(sys.argv[1]), None)
mesh = sharding.make_mesh(config.MeshConfig(), devices)
"""


def run_for(on: str, program: str) -> str:
    """Return what a program prints for a target; skip the test where its compiler is missing."""
    if missing := compile.find_missing_package(hardware.parse_target(on)):
        pytest.skip(f"{missing} is not installed")
    environment = os.environ | compile.COMPILER_ENV | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", HEAD + program, on]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
