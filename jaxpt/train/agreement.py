"""Compare the processes of a run before its first step: a difference would train in silence.

Each compares itself with process 0, which publishes its facts in JAX's store of keys. All of them
then read what any found, and all end with the same sentence.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import pathlib
import socket
import time
import uuid
from collections.abc import Mapping
from typing import Any

import jax

from jaxpt import io, stage
from jaxpt.config import Config, InitializeConfig
from jaxpt.spec import Record, UserError
from jaxpt.text import name_some
from jaxpt.train.context import RunContext
from jaxpt.weights.load import list_sources

Facts = Mapping[str, str]  # name -> value, the same on all processes of a run

# sections that training reads; those of earlier stages are in the data's fingerprint
SECTIONS = ("pack", "mixture", "model", "initialize", "train", "optim", "lora", "distill")
SECTIONS += ("mesh",)
VARIABLES = ("LIBTPU_INIT_ARGS", "NVIDIA_TF32_OVERRIDE")  # beside JAX_... and XLA_...
# of one process or host, by nature
OWN_VARIABLES = (
    "JAX_COMPILATION_CACHE_DIR",
    "JAX_COORDINATOR_BIND_ADDRESS",
    "JAX_LOCAL_DEVICE_IDS",
    "JAX_PARTITION_INDEX",
    "JAX_PROCESS_ID",
    "JAX_SLICE_INDEX",
)
PATIENCE_SECONDS = 600  # for the slowest process to come to the comparison
COMPILE_SECONDS = 3600
SHARED_SECONDS = 10  # a network disk shows another host's new file after a few
MAX_NAMED = 3


@dataclasses.dataclass(frozen=True)
class Difference(Record):
    """What one process found different from process 0.

    Attributes:
        name: of the fact.
        here: its value on this process.
        there: on process 0.
    """

    name: str
    here: str
    there: str


@dataclasses.dataclass(frozen=True)
class Comparison(Record):
    """What one process found.

    Attributes:
        host: its name.
        first_host: that of process 0.
        differences: from process 0.
    """

    host: str
    first_host: str
    differences: tuple[Difference, ...]


def check_program(config: Config, run_dir: io.Path) -> None:
    """Compare settings, versions, code, environment, devices; see whether the directory is shared.

    Raises:
        UserError: on every process, if one differs.
    """
    if jax.process_count() == 1:
        return
    facts = dict(
        list_settings(config)
        | {f"version of {name}": version for name, version in stage.package_versions().items()}
        | {"version of jaxlib": importlib.metadata.version("jaxlib"), "code of jaxpt": hash_code()}
        | list_environment()
        | {"devices": describe_devices()}
    )
    check_same("program", facts)
    check_is_shared(run_dir)


def check_data(run: RunContext) -> None:
    """Compare the packed sequences. Raise UserError, on every process, if one has others."""
    facts = {}
    for split, dataset in (("train", run.dataset), ("heldout", run.heldout.dataset)):
        for name, source in dataset.sources.items():
            facts[f"{split} sequences of {name}"] = source.fingerprint
    facts["teacher"] = run.teacher.fingerprint if run.teacher else "none"
    check_same("data", facts)


def check_start(newest: io.Path | None, section: InitializeConfig) -> None:
    """Compare the checkpoint to resume, or the files of the weights to start from.

    Raises:
        UserError: on every process, if one has others.
    """
    if jax.process_count() == 1:
        return
    facts = {"newest whole checkpoint": newest.name if newest else "none"}
    if newest is None and section.source != "random":
        for name, directory in list_sources(section.source, section.source, section.base).items():
            facts[f"files of {name}"] = hash_model_files(directory)
    check_same("start", facts)


# ---- facts


def list_settings(config: Config) -> dict[str, str]:
    """Return "optim.peak_lr" -> "0.001" for what training reads."""
    settings = {}
    for section in SECTIONS:
        for name, value in dataclasses.asdict(getattr(config, section)).items():
            settings[f"{section}.{name}"] = repr(value)
    return settings


def list_environment() -> dict[str, str]:
    """Return the variables that change programs or results."""
    found = {}
    for name, value in os.environ.items():
        is_ours = name.startswith(("JAX_", "XLA_")) or name in VARIABLES
        if is_ours and name not in OWN_VARIABLES:
            found[name] = value
    return found


def hash_code() -> str:
    """Return the hash of this package's source files."""
    package = pathlib.Path(__file__).resolve().parent.parent
    files = io.find(package, "**/*.py")
    return stage.fingerprint({str(file.relative_to(package)): io.sha256(file) for file in files})


def describe_devices() -> str:
    """Return "4 x NVIDIA H100 80GB HBM3" with the version of the platform."""
    [device, *_] = devices = jax.local_devices()
    version = " ".join(device.client.platform_version.split())
    return f"{len(devices)} x {device.device_kind} ({version})"


def hash_model_files(directory: io.Path) -> str:
    """Return a hash of a model's files: of weights the sizes, of small files the content."""
    seen = {}
    for file in io.find(directory, "*"):
        if file.suffix == ".safetensors":
            seen[file.name] = str(io.size(file))
        elif file.suffix == ".json":
            seen[file.name] = io.sha256(file)
    return stage.fingerprint(seen)


# ---- comparing


def check_same(subject: str, facts: Facts) -> None:
    """Compare facts with those of process 0. Call it on every process in the same order.

    Args:
        subject: of the comparison; once per run.
        facts: what must be the same.

    Raises:
        UserError: on every process, if they differ on one.
    """
    if jax.process_count() == 1:
        return
    [first_host, first] = json.loads(publish(f"{subject}/first", json.dumps([host(), dict(facts)])))
    names = sorted(facts.keys() | first.keys())
    differences = [
        Difference(name, facts.get(name, "not set"), first.get(name, "not set"))
        for name in names
        if facts.get(name) != first.get(name)
    ]
    own = Comparison(host(), first_host, tuple(differences))
    found = gather(subject, json.dumps(own.to_json()) if differences else "")
    unequal = {i: Comparison.from_json(json.loads(text)) for i, text in found.items() if text}
    if unequal:
        raise UserError(describe_comparisons(unequal))


def check_is_shared(run_dir: io.Path) -> None:
    """Raise UserError, on every process, if one does not see what process 0 writes in `run_dir`."""
    name = publish("shared", f".hosts-{uuid.uuid4().hex}")
    marker = run_dir / name
    if jax.process_index() == 0:
        io.make_directory(run_dir)
        io.write_text(marker, "")
    publish("shared/written", "yes")
    deadline = time.monotonic() + SHARED_SECONDS
    while not io.exists(marker) and time.monotonic() < deadline:
        time.sleep(0.2)
    name = "" if io.exists(marker) else f"{host()} (process {jax.process_index()})"
    found = gather("shared", name)
    if jax.process_index() == 0:
        io.remove(marker)
    missing = [text for text in found.values() if text]
    if missing:
        raise UserError(
            f"--workdir {run_dir}: is not one directory for all hosts: what process 0 writes there "
            f"does not appear on {name_some(missing, MAX_NAMED)}. Give a disk or mount that every "
            "host sees under this name."
        )


def describe_comparisons(unequal: Mapping[int, Comparison]) -> str:
    """Return a sentence that names the differences and the processes that have them."""
    places: dict[Difference, list[str]] = {}
    for index, comparison in unequal.items():
        for difference in comparison.differences:
            place = f"{comparison.host} (process {index})"
            places.setdefault(difference, []).append(place)
    first_host = next(iter(unequal.values())).first_host
    parts = [
        f"{difference.name} is {shorten(difference.here)} on {name_some(names, MAX_NAMED)}, "
        f"{shorten(difference.there)} on {first_host} (process 0)"
        for difference, names in list(places.items())[:MAX_NAMED]
    ]
    n_more = len(places) - len(parts)
    more = f"; and {n_more} more" if n_more else ""
    return (
        f"the processes of this run differ: {'; '.join(parts)}{more}. Start all of them with the "
        "same command, code, data and environment."
    )


def shorten(value: str) -> str:
    """Return a value in at most 100 characters."""
    return value if len(value) <= 100 else f"{value[:97]}..."


def host() -> str:
    """Return the name of this host."""
    return socket.gethostname()


# ---- JAX's store of keys


def get_client() -> Any:
    """Return the client of JAX's coordination service, which holds keys and barriers."""
    from jax._src import distributed as jax_distributed

    return jax_distributed.global_state.client


def publish(key: str, value: str) -> str:
    """Return process 0's value on every process."""
    client = get_client()
    if jax.process_index() == 0:
        client.key_value_set(f"jaxpt/agreement/{key}", value)
    return client.blocking_key_value_get(f"jaxpt/agreement/{key}", 1000 * PATIENCE_SECONDS)


def wait_for_compilation() -> None:
    """Wait until every process has compiled what it starts with.

    On CPU a collective waits 30 s for the others; one whose cache is cold may compile for longer.
    """
    if jax.process_count() > 1:
        get_client().wait_at_barrier("jaxpt/compiled", 1000 * COMPILE_SECONDS)


def gather(key: str, value: str) -> dict[int, str]:
    """Return every process's value on every process."""
    client = get_client()
    directory = f"jaxpt/gathered/{key}"
    client.key_value_set(f"{directory}/{jax.process_index()}", value)
    client.wait_at_barrier(f"{directory}/written", 1000 * PATIENCE_SECONDS)
    found = client.key_value_dir_get(directory)
    client.wait_at_barrier(f"{directory}/read", 1000 * PATIENCE_SECONDS)  # process 0 may end now
    values = {int(name.rpartition("/")[2]): text for name, text in found}
    return dict(sorted(values.items()))
