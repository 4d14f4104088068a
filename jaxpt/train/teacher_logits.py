"""Sample a teacher for all sequences that a run will read: the stage of `jaxpt teacher_logits`."""

from __future__ import annotations

import logging
import pathlib
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpt import io, stage
from jaxpt.config import Config
from jaxpt.data import loader, teacher_samples
from jaxpt.data.teacher_samples import SampleCounts, SampledSource
from jaxpt.model import distill, loss, transformer
from jaxpt.sharding import check_batch_divides, make_batch_sharding, make_mesh
from jaxpt.spec import Batch, Manifest, TeacherSamples, UserError
from jaxpt.train import distributed, gate, step, teacher
from jaxpt.weights.load import LoadedModel

log = logging.getLogger(__name__)

SEED = 0  # of the draws, each of which depends on its source and its place in it besides


def sample_sequences(
    config: Config,
    packed: list[str],
    out: io.Path,
    n_samples: int,
    replace: bool = False,
    verify: bool = False,
) -> Manifest:
    """Write samples of config.distill.teacher for the sequences that config.mixture reads.

    Args:
        config: the recipe.
        packed: directories of packed sequences.
        out: the directory to write.
        n_samples: draws per token.
        replace: overwrite what `out` holds.
        verify: compare the checksums of finished samples, not only sizes.
    """
    section = config.distill
    if not section.teacher or teacher.is_sampled(section.teacher):
        raise UserError(
            f"distill.teacher: expected a model to sample, got {section.teacher or 'none'}. Name a "
            "run, a checkpoint, a Hugging Face directory or hf:NAME."
        )
    teacher.check_sampled(config)
    if n_samples < 1:
        raise UserError(f"--samples: expected at least 1, got {n_samples}.")
    dataset = loader.open_packed(packed)
    sources = {
        name: SampledSource(fingerprint, dataset.n_sequences[name])
        for name, fingerprint in teacher.find_read_sources(config.mixture, dataset).items()
    }

    def work(directory: pathlib.Path) -> dict[str, Any]:
        return run_teacher(config, packed, dataset, sources, n_samples, directory).to_json()

    inputs = {f"packed/{i}": io.path(path) for i, path in enumerate(packed)}
    request = {
        "n_samples": n_samples,
        "temperature": section.temperature,
        "document_mask": config.mixture.document_mask,
        "compute_dtype": config.train.compute_dtype,
        "sources": list(sources),
    }
    inputs |= teacher.list_inputs(section)
    manifest = stage.run_stage(
        teacher_samples.STAGE,
        out,
        work,
        config=request,
        inputs=inputs,
        seed=SEED,
        tokenizer=dataset.tokenizer,
        replace=replace,
        verify=verify,
        flag="--to",
    )
    size = sum(manifest.sizes.values()) / 1e6
    log.info(f"{teacher_samples.STAGE}: {out}: {', '.join(sources)}, {size:,.1f} MB")
    return manifest


def run_teacher(
    config: Config,
    packed: list[str],
    dataset: loader.PackedDataset,
    sources: dict[str, SampledSource],
    n_samples: int,
    directory: pathlib.Path,
) -> SampleCounts:
    """Write the files that a directory does not hold yet. Return the counts."""
    train, mixture = config.train, config.mixture
    mesh = make_mesh(config.mesh)
    check_batch_divides(mesh, train.batch_size, train.grad_accum_steps, dataset.seq_len)
    model = teacher.load_teacher(config.distill.teacher, train.compute_dtype, dataset, mesh)
    heldout = gate.HeldoutData(packed, train, mixture.document_mask, mesh)
    if heldout.dataset.names:
        teacher.log_knowledge(model, heldout)
    temperature = config.distill.temperature
    counts = SampleCounts(
        dataset.seq_len,
        n_samples,
        model.spec.vocab_size,
        temperature,
        mixture.document_mask,
        sources,
    )
    draw = make_draw(model, config, dataset.seq_len, n_samples, mesh)
    files = counts.list_files()
    n_tokens = dataset.seq_len * sum(len(rows) for _, rows in files.values())
    with (
        distributed.explain_out_of_memory(train, dataset.seq_len),
        stage.progress_bar(teacher_samples.STAGE, n_tokens, "tokens") as advance,
    ):
        for file, (name, rows) in files.items():
            if io.size(directory / file) != len(rows) * counts.row_bytes:
                batches = iterate_rows(config, dataset, name, rows, mesh)
                drawn = (
                    draw(model.params, batch, key_of(name), places) for batch, places in batches
                )
                teacher_samples.write_rows(directory / file, counts, list_rows(drawn, len(rows)))
            advance(dataset.seq_len * len(rows))
    return counts


def key_of(name: str) -> np.uint32:
    """Return what the draws of a source differ by from those of others."""
    return np.uint32(zlib.crc32(name.encode()))


def iterate_rows(
    config: Config, dataset: loader.PackedDataset, name: str, rows: range, mesh: jax.sharding.Mesh
) -> Any:
    """Yield (batch, places [B]) of consecutive sequences, the last batch filled up."""
    batch_size = config.train.batch_size // config.train.grad_accum_steps
    sharding = make_batch_sharding(mesh)
    for start in range(rows.start, rows.stop, batch_size):
        places = np.arange(start, start + batch_size, dtype=np.uint32)
        sequences = [dataset.read_sequence(name, min(int(i), rows.stop - 1)) for i in places]
        batch = loader.make_batch(sequences, config.mixture.document_mask)
        slots = list(range(batch_size))
        yield loader.make_global_batch(batch, slots, sharding, batch_size), places


def list_rows(drawn: Any, n: int) -> Any:
    """Yield the first n rows of batches of samples."""
    for samples in drawn:
        ids, mean_log_prob = jax.device_get(samples)
        for row in list(zip(ids, mean_log_prob, strict=True))[:n]:
            yield TeacherSamples(*row)
        n -= len(ids)


def make_draw(
    model: LoadedModel, config: Config, seq_len: int, n_samples: int, mesh: jax.sharding.Mesh
) -> Any:
    """Return the jitted draw(params, batch, key, places [B]) -> samples [B, T, K]."""
    spec, train = model.spec, config.train
    dtype = jnp.dtype(train.compute_dtype)
    kernels = step.choose_kernels(spec, train, seq_len, mesh)

    def draw(
        params: transformer.Params, batch: Batch, key: jax.Array, places: jax.Array
    ) -> TeacherSamples:
        source_key = jax.random.fold_in(jax.random.key(SEED), key)

        def start(place: jax.Array) -> jax.Array:
            return jax.random.uniform(jax.random.fold_in(source_key, place), (seq_len,))

        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            inputs = batch.tokens, batch.segment_ids, batch.positions
            hidden, _ = transformer.forward(spec, params, *inputs, dtype, kernels=kernels)
            head = transformer.lm_head(spec, params, dtype)
            return distill.sample_teacher(
                hidden,
                head,
                jax.vmap(start)(places),
                n_samples,
                config.distill.temperature,
                loss.count_chunk_tokens(mesh),
                spec.logit_softcap,
            )

    shardings = (transformer.make_param_shardings(spec, mesh), make_batch_sharding(mesh))
    return jax.jit(draw, in_shardings=(*shardings, None, None), out_shardings=shardings[1])
