"""What the laws share: eight CPU devices, sizes that cannot coincide, and real text where the
machine has some.
"""

import logging
import os
import pathlib
import signal
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test asks a hub
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("DO_NOT_TRACK", "1")
# a job in the background of a script is started without them, and so would the tests' processes be
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
given = os.environ.get("XLA_FLAGS")
# Most of the suite's time is compiling, for programs that run a moment: here LLVM optimizes none of
# them, and no fusion goes through MLIR, which takes half of the time. XLA's own passes, and with
# them memory and sharding, are as ever. XLA_FLAGS="--xla_backend_optimization_level=3
# --xla_cpu_use_fusion_emitters=true" has what users have, as the processes that tests start do:
# those train for longer.
ours = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = f"{ours} {given or ''}"

import entry_points
import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.devices()  # XLA has read its flags
if given is None:
    del os.environ["XLA_FLAGS"]
else:
    os.environ["XLA_FLAGS"] = given

from jaxpt import config, sharding
from jaxpt.spec import ModelSpec

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "benchmarks"))  # some tests are short forms of benchmarks
os.environ["PYTHONPATH"] = str(ROOT)  # the processes that tests start run this clone


@pytest.fixture
def data_dir():
    """Public texts, benchmark files and a trained model: JAXPT_TEST_DATA, else the shared folder
    beside the clone.
    """
    directory = pathlib.Path(os.environ.get("JAXPT_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not directory.is_dir():
        pytest.skip(
            "no test data: set JAXPT_TEST_DATA to a folder with "
            f"text_gutenberg, eval_truthfulqa, ... ({directory} is not there)"
        )
    return directory


# no two sizes that a wrong transpose could swap
SMALL_SPEC = ModelSpec(
    n_layers=3,
    d_model=24,
    d_ff=40,
    n_heads=6,
    n_kv_heads=2,
    d_head=8,
    vocab_size=96,
    max_seq_len=64,
)


@pytest.fixture(scope="session")
def spec():
    """L5 K2 N6 H8 D24 F40 V96: no two sizes that a wrong transpose could swap."""
    return SMALL_SPEC.replace(n_layers=5)


@pytest.fixture(scope="session")
def one():
    """The mesh of one device."""
    return sharding.make_mesh(config.MeshConfig(), jax.devices()[:1])


SMALL = """
from jaxpt.config import defaults
def get_config():
    c = defaults()
    c.prepare.sources = ("python:prose", "python:code")
    c.prepare.max_mb, c.prepare.heldout_frac = 0.3, 0.2
    c.tokenizer.vocab_size, c.pack.seq_len = 500, 64
    return c
"""


@pytest.fixture(scope="session")
def texts(tmp_path_factory):
    """A directory with base/corpus, base/tokenizer and base/packed: a little of this Python's own
    texts, through the commands.
    """
    home = tmp_path_factory.mktemp("texts")
    (home / "small.py").write_text(SMALL)
    for name in ("prepare", "train_tokenizer", "pack"):
        status, printed = entry_points.run_command(
            name, ["--config", "small.py", "--workdir", "base"], home
        )
        assert status == 0, printed
    return home


@pytest.fixture(autouse=True)
def logger():
    """The package's logger, with what a test did to it undone."""
    logger = logging.getLogger("jaxpt")
    handlers, logger.propagate = list(logger.handlers), True
    yield logger
    logger.handlers[:] = handlers
    logger.propagate = True  # a command sets it; pytest would then attach a handler of its own


@pytest.fixture
def output(capsys, caplog):
    """Return a function: what was printed and logged since its last call."""

    def read() -> str:
        text = capsys.readouterr().out + caplog.text
        caplog.clear()
        return text

    return read
