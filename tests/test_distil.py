"""Laws of distillation: the loss and its gradients, what is sampled of a teacher, runs that learn
from one, and what is refused.
"""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_session
import test_train

from jaxpt import config, flops, hardware, io, sharding
from jaxpt.config import DistillConfig, MeshConfig
from jaxpt.data import loader, teacher_samples
from jaxpt.flops import DeviceCost
from jaxpt.model import distill, transformer
from jaxpt.model.distill import Divergence
from jaxpt.plan import compile, cost
from jaxpt.spec import TeacherSamples, UserError
from jaxpt.stage import read_manifest, read_spec
from jaxpt.train import loop, result, step, teacher, teacher_logits
from jaxpt.train.records import TrainMetrics
from jaxpt.weights import huggingface
from jaxpt.weights.load import load_model

compiled, make_config, start = test_session.compiled, test_session.make_config, test_session.start

B, T, D, W, V = 2, 6, 7, 5, 11  # W: the teacher's width


def make_inputs(seed=0, V=V):
    """Hidden states and heads of a student and a teacher, targets, a ragged mask."""
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    targets = jnp.asarray(rng.integers(0, V, (B, T)), jnp.int32)
    mask = jnp.asarray(rng.integers(0, 2, (B, T)), jnp.float32)
    return draw(B, T, D), draw(D, V), targets, mask, (draw(B, T, W), draw(W, V))


def plain_loss(hidden, head, targets, mask, teacher, alpha, divergence, z, softcap):
    """The loss with all logits at once, differentiated by JAX."""

    def cap(logits, softcap):
        return softcap * jnp.tanh(logits / softcap) if softcap else logits

    logits = cap(hidden @ head, softcap)
    theirs = cap(teacher[0] @ teacher[1], divergence.teacher_softcap)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    nats = log_z - jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    log_q = jax.nn.log_softmax(logits / divergence.temperature)
    log_p = jax.nn.log_softmax(theirs / divergence.temperature)
    if divergence.is_reverse:
        log_q, log_p = log_p, log_q
    kl = jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
    losses = (1 - alpha) * nats + alpha * divergence.temperature**2 * kl + z * log_z**2
    return jnp.sum(mask * losses), (jnp.sum(mask * nats), jnp.sum(mask * kl))


DIVERGENCES = [
    Divergence(),
    Divergence(temperature=2.5),
    Divergence(1.7, is_reverse=True, teacher_softcap=2.0),
]


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_chunked_loss_and_its_gradients_are_the_plain_ones(divergence):
    hidden, head, targets, mask, teacher = make_inputs()

    def chunked(hidden, head):
        sums = distill.distillation_loss(
            hidden, head, targets, mask, teacher, 0.7, divergence, 0.01, 4, 3.0
        )
        return sums[0], sums[1:]

    def plain(hidden, head):
        return plain_loss(hidden, head, targets, mask, teacher, 0.7, divergence, 0.01, 3.0)

    ours, expected = (
        jax.jit(jax.value_and_grad(of, (0, 1), has_aux=True))(hidden, head)
        for of in (chunked, plain)
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), ours, expected
    )


@pytest.mark.parametrize("is_reverse", [False, True])
def test_the_gradient_of_the_kl_equals_finite_differences(is_reverse):
    with jax.enable_x64(True):
        rng = np.random.default_rng(3)
        logits, theirs, direction = rng.standard_normal((3, 1, 4, V))
        _, gradient = distill.measure_kl(jnp.asarray(logits), jnp.asarray(theirs), is_reverse)

        def total(size):
            moved = jnp.asarray(logits + size * direction)
            return float(distill.measure_kl(moved, jnp.asarray(theirs), is_reverse)[0].sum())

        measured = (total(1e-5) - total(-1e-5)) / 2e-5
        assert measured == pytest.approx(float((gradient * direction).sum()), rel=1e-8)


@pytest.mark.parametrize("divergence", [*DIVERGENCES[:2], Divergence(is_reverse=True)])
def test_a_model_has_no_divergence_from_itself_and_learns_nothing_of_it(divergence):
    hidden, head, targets, mask, _ = make_inputs()

    def loss(hidden):
        return distill.distillation_loss(
            hidden, head, targets, mask, (hidden, head), 1.0, divergence
        )

    (_, _, kl), back = jax.vjp(loss, hidden)
    assert abs(float(kl)) < 1e-5
    (gradient,) = back((jnp.float32(1), jnp.float32(0), jnp.float32(0)))
    assert np.abs(gradient).max() < 1e-6


def test_vocabularies_padded_to_other_sizes_share_their_ids():
    """Rows beyond the smaller one count in neither distribution, and have no gradient of the KL."""
    rng = np.random.default_rng(5)
    logits, theirs = rng.standard_normal((2, 1, 4, V)).astype(np.float32)
    kl, gradient = distill.measure_kl(logits[..., :8], theirs[..., :8], False)
    longer = distill.measure_kl(logits[..., :8], theirs, False)
    wider, padded = distill.measure_kl(logits, theirs[..., :8], False)
    np.testing.assert_allclose(longer[0], kl, rtol=1e-6)
    np.testing.assert_allclose(wider, kl, rtol=1e-6)
    np.testing.assert_allclose(padded[..., :8], gradient, rtol=1e-6)
    assert not padded[..., 8:].any()


def test_the_logits_of_a_batch_never_exist_at_once_of_either_model():
    B, T, D, W, V = 4, 512, 24, 40, 1000
    float32 = jnp.float32
    hidden, head, theirs, their_head = (
        jax.ShapeDtypeStruct(shape, float32) for shape in ((B, T, D), (D, V), (B, T, W), (W, V))
    )
    targets, mask = jax.ShapeDtypeStruct((B, T), jnp.int32), jax.ShapeDtypeStruct((B, T), float32)

    def loss(hidden, head, targets, mask, *teacher):
        return distill.distillation_loss(
            hidden, head, targets, mask, teacher, 0.5, chunk_tokens=128
        )[0]

    compiled = (
        jax.jit(jax.grad(loss, (0, 1)))
        .lower(hidden, head, targets, mask, theirs, their_head)
        .compile()
    )
    assert compiled.memory_analysis().temp_size_in_bytes < B * T * V * 4 / 3


# ---- samples of a teacher


def sample(teacher, n_samples, seed=0, temperature=1.0, softcap=None):
    starts = jax.random.uniform(jax.random.key(seed), teacher[0].shape[:2])
    return distill.sample_teacher(*teacher, starts, n_samples, temperature, 4, softcap)


def test_a_sampled_kl_is_the_full_one_within_its_standard_error():
    hidden, head, targets, mask, teacher = make_inputs()
    mask = jnp.ones_like(mask)

    @jax.jit
    def measure(seed):
        samples = sample(teacher, 3, seed, 1.3)
        loss = distill.distillation_loss
        args = (hidden, head, targets, mask)
        gradient = jax.grad(lambda h: loss(h, *args[1:], samples, 1.0, Divergence(1.3))[0])(hidden)
        return loss(*args, samples, 1.0, Divergence(1.3))[2], gradient

    kls, gradients = jax.lax.map(measure, jnp.arange(2000))
    loss = distill.distillation_loss
    args = (targets, mask, teacher, 1.0, Divergence(1.3))
    full = loss(hidden, head, *args)[2]
    expected = jax.grad(lambda h: loss(h, head, *args)[0])(hidden)
    for found, true in ((kls, full), (gradients, expected)):
        error = np.std(found, axis=0) / np.sqrt(len(found))
        assert (error > 0).all()
        z = np.abs(np.mean(found, axis=0) - true) / error
        assert z.max() < 4.5, "of 85 numbers none is off by 4.5 standard errors"
        assert np.mean(z**2) < 1.6


def test_a_sampled_kl_is_over_the_ids_that_both_vocabularies_have(sampled, make_config):
    """As the full one is where a student's vocabulary is padded further than its teacher's."""
    hidden, head, targets, mask, (theirs, their_head) = make_inputs(seed=1)
    full = theirs, their_head[:, :8]

    @jax.jit
    def measure(head):
        divergence = Divergence(teacher_vocab_size=8)
        kls = [
            distill.distillation_loss(hidden, head, targets, mask, teacher, 1.0, divergence)[2]
            for teacher in (sample(full, 400), full)
        ]
        return kls, distill.measure_sampled_kl(hidden @ head, sample(full, 3), 8)[1]

    (kl, full_kl), gradient = measure(head)
    assert float(kl) == pytest.approx(float(full_kl), rel=0.02)
    assert gradient[..., :8].any(-1).all() and not gradient[..., 8:].any()

    settings = make_config(distill__teacher=str(sampled))
    opened = teacher.open_samples(settings, loader.open_packed(settings.mixture.packed_paths))
    vocab_size = teacher_samples.SampleReader(sampled).counts.vocab_size
    assert step.make_divergence(opened.distill_spec).teacher_vocab_size == vocab_size


def test_no_token_is_drawn_more_than_once_off_its_share():
    teacher = make_inputs(seed=2)[-1]
    K = 16
    samples = jax.jit(lambda: sample(teacher, K, temperature=0.8, softcap=2.0))()
    logits = 2.0 * jnp.tanh(teacher[0] @ teacher[1] / 2.0) / 0.8
    log_p = jax.nn.log_softmax(logits)
    counts = jax.nn.one_hot(samples.ids, V).sum(-2)
    assert np.abs(counts - K * jnp.exp(log_p)).max() < 1 + 1e-4
    assert (counts.sum(-1) == K).all()
    taken = jnp.take_along_axis(log_p, samples.ids, axis=-1)
    np.testing.assert_allclose(samples.mean_log_prob, taken.mean(-1), rtol=1e-5)


# ---- the step

TEACHER = test_train.SPEC.replace(n_layers=2, d_model=40, d_ff=56, n_heads=4)
DISTILL_SPEC = step.DistillSpec(DistillConfig("a teacher", (0.9, 0.5)), TEACHER)


def make_samples(batch, n_samples=3, seed=0):
    rng = np.random.default_rng(seed)
    ids = np.sort(rng.integers(0, 96, (*batch.tokens.shape, n_samples)), axis=-1)
    mean_log_prob = -rng.random(batch.tokens.shape)
    return batch._replace(
        samples=TeacherSamples(ids.astype(np.int32), mean_log_prob.astype(np.float32))
    )


def train(mesh, n=3, distill_spec=DISTILL_SPEC, **knobs):
    """n steps of a student; returns each step's scalars, the last state, the step, the teacher."""
    settings = test_train.SETTINGS
    knobs = dataclasses.replace(settings.train, **knobs)
    run = step.build_step(
        test_train.SPEC, knobs, settings.optim, 32, mesh, distill_spec=distill_spec
    )
    now = test_train.make_state(mesh)
    more = ()
    if distill_spec.teacher:
        params = test_train.initial_params(TEACHER)
        more = (jax.device_put(params, transformer.make_param_shardings(TEACHER, mesh)),)
    found = []
    for i in range(n):
        batch = test_train.make_batch(i)
        batch = batch if distill_spec.teacher else make_samples(batch)
        now, scalars = run(now, test_train.put(batch, mesh), *more)
        found.append({name: float(scalars[name]) for name in ("loss", "kl", "alpha", "grad_norm")})
    assert run.program._cache_size() == 1
    return found, now, more


@pytest.fixture(scope="module")
def alone(one):
    return train(one)


def test_a_teacher_keeps_its_bits_while_its_student_comes_nearer(alone):
    found, _, (teacher,) = alone
    jax.tree.map(np.testing.assert_array_equal, teacher, test_train.initial_params(TEACHER))
    assert found[-1]["kl"] < found[0]["kl"]
    assert [scalars["alpha"] for scalars in found] == pytest.approx(
        [0.9, 0.9 - 0.4 / 11, 0.9 - 0.8 / 11]
    )


def test_the_weight_of_the_kl_arrives_at_its_last_value_and_stays():
    alphas = [
        float(step.make_loss_inputs(DISTILL_SPEC, jnp.int32(done), 12, None).alpha)
        for done in (0, 11, 12)
    ]
    assert alphas == pytest.approx([0.9, 0.5, 0.5])


@pytest.mark.slow
@pytest.mark.parametrize("sampled", [False, True])
def test_a_student_learns_alike_on_any_mesh_and_micro_batch(one, alone, sampled):
    distill_spec = DISTILL_SPEC._replace(teacher=None, n_samples=3) if sampled else DISTILL_SPEC
    expected, _, _ = train(one, distill_spec=distill_spec) if sampled else alone
    mesh = sharding.make_mesh(MeshConfig(fsdp=2, tensor=2, context=2))
    found, _, _ = train(mesh, distill_spec=distill_spec, grad_accum_steps=2)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=3e-5)


def test_at_weight_0_a_teacher_changes_nothing(one):
    silent = DISTILL_SPEC._replace(config=DistillConfig("a teacher", (0.0, 0.0)))
    found, now, _ = train(one, n=2, distill_spec=silent)
    losses, alone, _ = test_train.train(one, n=2)
    np.testing.assert_allclose([scalars["loss"] for scalars in found], losses, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), now.params, alone.params)


# ---- runs


@pytest.fixture(scope="module")
def home(make_config, tmp_path_factory):
    """A directory with a trained teacher."""
    home = tmp_path_factory.mktemp("teachers")
    settings = make_config(train__steps=40, model__n_layers=1, model__d_ff=56, optim__peak_lr=2e-2)
    loop.train_model(settings, home / "teacher")
    return home


@pytest.fixture(scope="module")
def sampled(home, make_config):
    """The directory of the teacher's samples, made in three files of a source or so."""
    before, teacher_samples.FILE_BYTES = teacher_samples.FILE_BYTES, 40_000
    sample_sequences(make_config(distill__teacher=str(home / "teacher")), home / "samples")
    yield home / "samples"
    teacher_samples.FILE_BYTES = before


def sample_sequences(settings, out, **changes):
    packed = list(settings.mixture.packed_paths)
    return teacher_logits.sample_sequences(settings, packed, out, **{"n_samples": 5, **changes})


@pytest.mark.slow
def test_a_run_with_a_teacher_that_is_stopped_and_resumed_ends_as_one_that_went_on(
    make_config, start, home, tmp_path
):
    settings = make_config(distill__teacher=str(home / "teacher"))
    whole = test_session.train(start(settings, tmp_path / "whole"))
    test_session.train_in_parts(start, settings, tmp_path / "cut", [6])
    test_session.assert_equal_ends(tmp_path / "cut", tmp_path / "whole")
    records = test_session.read_records(tmp_path / "whole", TrainMetrics)
    assert records[-1].scalars["kl"] < records[0].scalars["kl"]
    assert records[-1].scalars["alpha"] == pytest.approx(0.5)
    forward = flops.count_forward_flops_per_token(read_spec(home / "teacher/spec.json"), 64)
    run = dataclasses.replace(
        whole.run, estimate_device_cost=lambda *_: DeviceCost(flops_per_token=7.0)
    )
    assert run.estimate_cost(whole.spec, 64).flops_per_token == 7.0 + forward
    with pytest.raises(UserError, match=r"expected .*, the files with which .*, got none"):
        start(make_config(train__steps=20), tmp_path / "whole")


@pytest.mark.slow
def test_a_run_from_samples_that_is_stopped_and_resumed_ends_as_one_that_went_on(
    make_config, start, sampled, tmp_path
):
    settings = make_config(distill__teacher=str(sampled))
    whole = test_session.train(start(settings, tmp_path / "whole"))
    test_session.train_in_parts(start, settings, tmp_path / "cut", [6])
    test_session.assert_equal_ends(tmp_path / "cut", tmp_path / "whole")
    place = whole.schedule.sequence_at(8 * 3 + 1)
    whole.n_sequences = 8 * 3
    batches = whole.read_batches()
    batch = next(batches)
    expected = whole.run.teacher.samples.read_sequence(*place)
    np.testing.assert_array_equal(batch.samples.ids[1], expected.ids)
    batches.close()


@pytest.mark.slow
def test_samples_lie_beside_their_sequences_and_a_killed_command_goes_on(
    make_config, home, sampled, one, tmp_path
):
    """Each row is what the teacher gives for that sequence, whatever the batch."""
    settings = make_config(distill__teacher=str(home / "teacher"))
    dataset = loader.open_packed(settings.mixture.packed_paths)
    reader = teacher_samples.SampleReader(sampled)
    model = load_model(home / "teacher", one)
    draw = teacher_logits.make_draw(model, settings, 64, 5, one)
    files = reader.counts.list_files()
    assert len(files) > 2 * len(dataset.names)
    for name in dataset.names:
        last = dataset.n_sequences[name] - 1
        batch = loader.make_batch([dataset.read_sequence(name, last)] * 8, True)
        places = np.full(8, last, np.uint32)
        found = draw(model.params, test_train.put(batch, one), teacher_logits.key_of(name), places)
        row = reader.read_sequence(name, last)
        assert np.mean(found.ids[0] == row.ids) > 0.99  # an end may lie within a rounding error
        np.testing.assert_allclose(found.mean_log_prob[0], row.mean_log_prob, atol=1e-2)

    def fail(*_):
        raise KeyboardInterrupt

    written = []

    def write(file, counts, rows):
        if len(written) == 3:
            fail()
        written.append(file)
        write_rows(file, counts, rows)

    write_rows, teacher_samples.write_rows = teacher_samples.write_rows, write
    try:
        with pytest.raises(KeyboardInterrupt):
            sample_sequences(settings, tmp_path / "samples")
    finally:
        teacher_samples.write_rows = write_rows
    times = {file: file.stat().st_mtime_ns for file in written}
    again = sample_sequences(settings, tmp_path / "samples")
    assert again.outputs == read_manifest(sampled).outputs
    kept = [tmp_path / "samples" / file.relative_to(file.parents[2]) for file in written]
    assert [file.stat().st_mtime_ns for file in kept] == list(times.values())


def test_the_devices_that_a_teacher_needs_are_in_the_plan(
    make_config, home, sampled, one, monkeypatch
):
    monkeypatch.setattr(compile, "make_target_devices", lambda *_: list(one.devices.flat))
    settings = make_config(distill__teacher=str(home / "teacher"))
    spec, _ = cost.resolve_model_spec(settings)
    request = compile.AnalysisRequest(spec, dataclasses.asdict(settings), "cpu:1", "none is here")
    with_teacher, alone, from_samples = (
        compile.analyze_step_in_process(
            dataclasses.replace(request, settings=dataclasses.asdict(changed))
        )
        for changed in (settings, make_config(), make_config(distill__teacher=str(sampled)))
    )
    teacher = read_spec(home / "teacher/spec.json")
    forward = flops.count_forward_flops_per_token(teacher, 64)
    assert with_teacher.frozen_bytes == 4 * transformer.count_params(teacher)
    assert with_teacher.peak_bytes > alone.peak_bytes + with_teacher.frozen_bytes
    # its own attention is counted, not by the student's windows
    expected = alone.executed_flops + 8 * 64 * forward
    assert with_teacher.executed_flops == pytest.approx(expected, rel=1e-9)
    assert from_samples.executed_flops == alone.executed_flops
    plan = cost.project_target(spec, settings, hardware.parse_target("cpu:1"), with_teacher, 1e6)
    assert plan.flops_per_token == flops.count_flops_per_token(spec, 64) + forward
    labels = list(cost.make_column(plan))
    i = labels.index("optimizer state")
    assert labels[i + 1 : i + 3] == ["  bytes per parameter", "teacher or reference"]


# ---- what is refused


def refuse(make_config, tmp_path, expected, **changes):
    with pytest.raises(UserError, match=expected):
        loop.train_model(make_config(**changes), tmp_path / "refused")
    assert not io.exists(tmp_path / "refused/checkpoints")


def test_a_teacher_that_is_none_is_refused(make_config, home, sampled, tmp_path):
    refuse(make_config, tmp_path, r"^distill.teacher: .*gone: no such", distill__teacher="gone")
    packed = make_config().mixture.packed_paths[0]
    refuse(make_config, tmp_path, r"^distill.teacher: .*/packed: ", distill__teacher=packed)
    with pytest.raises(UserError, match="expected a model to sample, got none"):
        sample_sequences(make_config(), tmp_path / "out")
    with pytest.raises(UserError, match=r"expected a model to sample, got .*samples"):
        sample_sequences(make_config(distill__teacher=str(sampled)), tmp_path / "out")
    with pytest.raises(UserError, match=r"--samples: expected at least 1, got 0"):
        settings = make_config(distill__teacher=str(home / "teacher"))
        sample_sequences(settings, tmp_path / "out", n_samples=0)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"distill__direction": "reverse"}, "distill.direction: reverse needs all"),
        ({"train__shape_schedule": ((0, 8, 64), (5, 16, 32))}, "train.shape_schedule: cuts"),
    ],
)
def test_what_samples_cannot_teach_is_refused_before_the_teacher_runs(
    make_config, home, tmp_path, changes, expected
):
    settings = make_config(distill__teacher=str(home / "teacher"), **changes)
    with pytest.raises(UserError, match=expected):
        sample_sequences(settings, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_teacher_is_sampled_by_micro_batches(make_config, one):
    settings = make_config(train__grad_accum_steps=2)
    dataset = loader.open_packed(settings.mixture.packed_paths)
    batches = list(teacher_logits.iterate_rows(settings, dataset, "prose", range(1, 7), one))
    assert [batch.tokens.shape for batch, _ in batches] == [(4, 64), (4, 64)]
    assert [places.tolist() for _, places in batches] == [[1, 2, 3, 4], [5, 6, 7, 8]]


def test_files_of_a_teacher_that_were_hashed_are_not_hashed_again(
    make_config, home, one, monkeypatch
):
    settings = make_config(distill__teacher=str(home / "teacher"))
    dataset = loader.open_packed(settings.mixture.packed_paths)
    request = result.make_request(settings, list(settings.mixture.packed_paths))
    known = {name: found["fingerprint"] for name, found in request.inputs.items()}
    expected = teacher.open_teacher(settings, dataset, one, {}).fingerprint
    monkeypatch.setattr(teacher.stage, "fingerprint_path", None)
    assert teacher.open_teacher(settings, dataset, one, known).fingerprint == expected


def test_a_teacher_of_another_tokenizer_is_refused_with_the_way(make_config, home, one):
    dataset = loader.open_packed(make_config().mixture.packed_paths)
    model = load_model(home / "teacher", one)
    way = r"initialize.grow = \('new_tokenizer"
    with pytest.raises(UserError, match=f"trained with tokenizer other, and the data .*{way}"):
        teacher.check_fits("it", model._replace(tokenizer="other"), dataset)
    with pytest.raises(UserError, match=f"has 96 embedding rows, .*{way}"):
        teacher.check_fits("it", model._replace(spec=test_train.SPEC), dataset)
    short = model.spec.replace(max_seq_len=32)
    with pytest.raises(UserError, match="reads at most 32 tokens, and the sequences have 64"):
        teacher.check_fits("it", model._replace(spec=short), dataset)


def test_a_teacher_that_knows_nothing_is_refused(make_config, home, tmp_path, one):
    spec = read_spec(home / "teacher/spec.json")
    huggingface.write_hf_model(spec, transformer.init_params(spec, 0, one), tmp_path / "random")
    refuse(
        make_config,
        tmp_path,
        "^distill.teacher: held-out loss on .* a unigram model has",
        distill__teacher=str(tmp_path / "random"),
    )


def test_samples_of_other_sequences_or_of_another_loss_are_refused(make_config, sampled, tmp_path):
    settings = {"distill__teacher": str(sampled)}
    refuse(
        make_config,
        tmp_path,
        "temperature: expected 1, .* got 2",
        distill__temperature=2,
        **settings,
    )
    refuse(
        make_config,
        tmp_path,
        "direction: reverse needs all",
        distill__direction="reverse",
        **settings,
    )
    refuse(
        make_config,
        tmp_path,
        "sampled with mixture.document_mask = True, and the run has False",
        mixture__document_mask=False,
        **settings,
    )
    reader = teacher_samples.SampleReader(sampled)
    name = next(iter(reader.counts.sources))
    with pytest.raises(UserError, match=f"no samples of the sequences that are read of {name}"):
        reader.check_sequences({name: "packed again"}, True)
    with pytest.raises(UserError, match="no samples of the sequences that are read of other"):
        reader.check_sequences({"other": "packed"}, True)


def test_a_flipped_bit_of_samples_is_named(sampled, tmp_path):
    shutil.copytree(sampled, tmp_path / "samples")
    reader = teacher_samples.SampleReader(tmp_path / "samples")
    file, (name, _) = next(iter(reader.counts.list_files().items()))
    data = bytearray((tmp_path / "samples" / file).read_bytes())
    data[reader.counts.row_bytes * 2 + 7] ^= 4
    (tmp_path / "samples" / file).write_bytes(data)
    reader = teacher_samples.SampleReader(tmp_path / "samples")
    reader.read_sequence(name, 1)
    with pytest.raises(
        UserError, match=rf"{file}: damaged bytes from {reader.counts.row_bytes * 2:,}"
    ):
        reader.read_sequence(name, 2)
    (tmp_path / "samples" / file).write_bytes(data[:-1])
    with pytest.raises(
        UserError, match=rf"{file}: {len(data) - 1:,} bytes, expected {len(data):,}"
    ):
        teacher_samples.SampleReader(tmp_path / "samples")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"alpha": (0.5, 1.1)}, r"distill.alpha: expected weights from 0 to 1, got \(0.5, 1.1\)"),
        ({"alpha": 0.5}, "distill.alpha: expected"),
        ({"temperature": 0}, "distill.temperature: expected a number above 0, got 0"),
        ({"direction": "both"}, "distill.direction is 'both'; expected one of forward, reverse"),
    ],
)
def test_knobs_that_make_no_loss_are_refused(changes, expected):
    values = dataclasses.asdict(config.Config())
    values["distill"] |= changes
    with pytest.raises(UserError, match=expected):
        config.build_config(values)
