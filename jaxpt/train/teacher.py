"""Open the teacher of a run: a model on the run's mesh, or its samples beside the sequences."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import NamedTuple

import jax

from jaxpt import io, stage
from jaxpt.config import Config, DistillConfig, MixtureConfig
from jaxpt.data import loader, teacher_samples
from jaxpt.data.teacher_samples import SampleReader
from jaxpt.initialize import describe_model
from jaxpt.spec import ModelSpec, UserError
from jaxpt.train import gate
from jaxpt.train.step import DistillSpec
from jaxpt.weights import hub
from jaxpt.weights.load import LoadedModel, list_sources, load_model

log = logging.getLogger(__name__)


class Teacher(NamedTuple):
    """What a run learns from beside its targets.

    Attributes:
        fingerprint: of its files.
        distill_spec: how a step learns from it.
        model: on the run's mesh, in the dtype of its matmuls; None: samples.
        samples: of another time; None: a model.
    """

    fingerprint: str
    distill_spec: DistillSpec
    model: LoadedModel | None = None
    samples: SampleReader | None = None

    def check(self, heldout: gate.HeldoutData) -> None:
        """Log the teacher's held-out losses. Raise UserError where it knows nothing of the text."""
        if not self.model:
            return
        log_knowledge(self.model, heldout)


def log_knowledge(model: LoadedModel, heldout: gate.HeldoutData) -> None:
    """Log a teacher's held-out losses. Raise UserError where it knows nothing of the text."""
    origin = gate.describe_origin(model)
    losses = gate.check_initial_loss(
        heldout, model.spec, model.params, origin, grown=False, knob="distill.teacher"
    )
    parts = [f"{name} {loss:.3f}" for name, loss in losses.items()]
    log.info(f"teacher: held-out nats per token: {', '.join(parts)}")


def list_inputs(section: DistillConfig) -> dict[str, io.Path]:
    """Return what a manifest names as the inputs of a run that learns from a teacher.

    Raises:
        UserError: the teacher is not there.
    """
    if not section.teacher:
        return {}
    inputs = {}
    for name, directory in list_sources(section.teacher, "teacher").items():
        if not io.exists(directory):
            raise UserError(
                f"distill.teacher: {directory}: no such directory. Expected a run, a checkpoint, a "
                "Hugging Face model or what jaxpt teacher_logits wrote."
            )
        inputs["teacher/base" if name == "base" else name] = directory
    return inputs


def open_teacher(
    config: Config,
    dataset: loader.PackedDataset,
    mesh: jax.sharding.Mesh,
    fingerprints: Mapping[str, str],
) -> Teacher | None:
    """Open config.distill.teacher; None if it names none.

    Args:
        config: the recipe.
        dataset: the sequences.
        mesh: the devices.
        fingerprints: of inputs that are hashed already, by the names of `list_inputs`.

    Raises:
        UserError: it is not there, has another tokenizer, is too short for the sequences, does not
            fit the mesh, or was sampled for other sequences or another loss.
    """
    section = config.distill
    if not section.teacher:
        return None
    if is_sampled(section.teacher):
        return open_samples(config, dataset)
    model = load_teacher(section.teacher, config.train.compute_dtype, dataset, mesh)
    inputs = list_inputs(section).items()
    found = [fingerprints.get(name) or stage.fingerprint_path(path) for name, path in inputs]
    return Teacher(stage.fingerprint(found), DistillSpec(section, model.spec), model)


def is_sampled(source: str) -> bool:
    """Return whether a teacher is a directory of samples."""
    directory = io.path(hub.download_model(source))
    if not io.exists(directory / "manifest.json"):
        return False
    return stage.read_manifest(directory).stage == teacher_samples.STAGE


def load_teacher(
    source: str, dtype: str, dataset: loader.PackedDataset, mesh: jax.sharding.Mesh
) -> LoadedModel:
    """Load a teacher's parameters, sharded by their own axes. Raises as `open_teacher`."""
    try:
        model = load_model(source, mesh, dtype)
        check_fits(source, model, dataset)
    except UserError as error:
        raise UserError(f"distill.teacher: {error}") from None
    log.info(f"teacher: {source}: {describe_model(model.spec)}")
    return model


def check_fits(source: str, model: LoadedModel, dataset: loader.PackedDataset) -> None:
    """Raise UserError unless a teacher reads the sequences' tokens and their length."""
    spec = model.spec
    way = (
        "A KL compares probabilities of the same tokens: pack with the teacher's tokenizer, and "
        "give it to the student first, by initialize.grow = ('new_tokenizer(\"DIR\")',)."
    )
    if model.tokenizer not in (None, dataset.tokenizer):
        raise UserError(
            f"{source} was trained with tokenizer {model.tokenizer}, and the data was packed with "
            f"{dataset.tokenizer}. {way}"
        )
    if dataset.n_ids > spec.vocab_size:
        raise UserError(
            f"{source} has {spec.vocab_size:,} embedding rows, and the data has token ids up to "
            f"{dataset.n_ids - 1:,}. {way}"
        )
    if dataset.seq_len > spec.max_seq_len:
        raise UserError(
            f"{source} reads at most {spec.max_seq_len:,} tokens, and the sequences have "
            f"{dataset.seq_len:,}. Pack shorter ones, or take another teacher."
        )


def open_samples(config: Config, dataset: loader.PackedDataset) -> Teacher:
    """Open samples of a teacher. Raise UserError unless they are of this run's sequences."""
    check_sampled(config)
    section = config.distill
    samples = SampleReader(section.teacher)
    counts = samples.counts
    packed = find_read_sources(config.mixture, dataset)
    samples.check_sequences(packed, config.mixture.document_mask)
    if section.temperature != counts.temperature:
        raise UserError(
            f"distill.temperature: expected {counts.temperature:g}, at which {section.teacher} was "
            f"sampled, got {section.temperature:g}. Set it to that, or sample again."
        )
    log.info(
        f"teacher: {section.teacher}: {counts.n_samples} samples per token at temperature "
        f"{counts.temperature:g}"
    )
    distill_spec = DistillSpec(section, None, counts.n_samples, counts.vocab_size)
    return Teacher(samples.fingerprint, distill_spec, samples=samples)


def check_sampled(config: Config) -> None:
    """Raise UserError for a run that cannot learn from samples."""
    if config.distill.direction == "reverse":
        raise UserError(
            "distill.direction: reverse needs all of the teacher's probabilities, and samples are "
            "a part of them. Use forward, or train with the model itself as distill.teacher."
        )
    if config.train.shape_schedule:
        raise UserError(
            "train.shape_schedule: cuts sequences, and samples are of whole ones. Leave it out, or "
            "train with the model itself as distill.teacher."
        )


def find_read_sources(mixture: MixtureConfig, dataset: loader.PackedDataset) -> dict[str, str]:
    """Return the sources that a mixture reads, with the fingerprints of their packed sets."""
    names = set(dataset.names)
    if mixture.phases:
        names = {name for _, shares in mixture.phases for name, share in shares.items() if share}
    return {name: dataset.sources[name].fingerprint for name in sorted(names & set(dataset.names))}


def check_vocabulary(teacher: Teacher | None, spec: ModelSpec) -> None:
    """Raise UserError where samples have ids that a student has no logit for."""
    if not teacher or not teacher.samples:
        return
    vocab_size = teacher.samples.counts.vocab_size
    if vocab_size > spec.vocab_size:
        raise UserError(
            f"distill.teacher: {teacher.distill_spec.config.teacher} has samples of ids up to "
            f"{vocab_size - 1:,}, and the model {spec.vocab_size:,} embedding rows. Name the "
            "teacher itself, whose further ids are left out."
        )
