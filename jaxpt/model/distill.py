"""The loss of a student: (1 - a) cross-entropy + a T^2 KL to its teacher, by chunks of logits.

The teacher's distribution is that of its hidden states and output head, whose logits exist for a
chunk at a time as the student's do, or samples drawn from it beforehand (2503.16870).

Source: Hinton et al., 1503.02531, section 2; T^2 keeps the KL's gradients at the size of the
cross-entropy's whatever the temperature.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxpt.model import loss
from jaxpt.model.loss import compute_chunk_logits, measure_targets, pass_softcap, sum_chunks
from jaxpt.spec import TeacherSamples


class Divergence(NamedTuple):
    """Which KL is taken.

    Attributes:
        temperature: both logits are divided by it.
        is_reverse: KL(student || teacher) instead of KL(teacher || student).
        teacher_softcap: of the teacher's logits.
        teacher_vocab_size: of a teacher that was sampled; None: as large as the student's.
    """

    temperature: float = 1.0
    is_reverse: bool = False
    teacher_softcap: float | None = None
    teacher_vocab_size: int | None = None


def distillation_loss(
    hidden: Array,
    lm_head: Array,
    targets: Array,
    loss_mask: Array,
    teacher: tuple[Array, Array] | TeacherSamples,
    alpha: Array | float,
    divergence: Divergence = Divergence(),
    z_loss_weight: float = 0.0,
    chunk_tokens: int = loss.CPU_CHUNK_TOKENS,
    softcap: float | None = None,
) -> tuple[Array, Array, Array]:
    """Return the summed loss, the summed nats and the summed KL.

    Args:
        hidden: the student's, [B, T, D], after the final norm.
        lm_head: the student's, [D, V].
        targets: int32 [B, T].
        loss_mask: float32 [B, T], weight of each target.
        teacher: its hidden states [B, T, D'] and output head [D', V'], or its samples. Of two
            vocabularies padded to other sizes, the KL is over the ids that both have.
        alpha: float32 scalar, weight of the KL.
        divergence: which KL.
        z_loss_weight: of log(Z)^2, whatever alpha.
        chunk_tokens: tokens over all devices whose logits may exist at once.
        softcap: of the student's logits.

    Returns:
        sum of mask x ((1 - alpha) nats + alpha T^2 KL + z-loss), of mask x nats and of mask x KL:
        float32 scalars. The first has gradients for hidden and lm_head; the others are for the log.
    """
    temperature = divergence.temperature
    if isinstance(teacher, TeacherSamples):
        signal, teacher_head = teacher, None
    else:
        signal, teacher_head = teacher

    def measure(hidden: Array, lm_head: Array, per_token: Any, shared: Any) -> Any:
        targets, mask, signal = per_token
        alpha, teacher_head = shared
        logits = compute_chunk_logits(hidden, lm_head, softcap)
        losses, nats, d_logits = measure_targets(logits, targets, z_loss_weight, 1 - alpha)
        divided = logits / temperature
        if isinstance(signal, TeacherSamples):
            kl, d_kl = measure_sampled_kl(divided, signal, divergence.teacher_vocab_size)
        else:
            theirs = compute_chunk_logits(signal, teacher_head, divergence.teacher_softcap)
            kl, d_kl = measure_kl(divided, theirs / temperature, divergence.is_reverse)
        # d (T^2 KL) / d logits = T^2 / T x that of the divided logits
        d_logits = (d_logits + alpha * temperature * d_kl) * mask[..., None]
        losses = (losses + alpha * temperature**2 * kl) * mask
        return losses, (nats * mask, kl * mask), pass_softcap(d_logits, logits, softcap)

    per_token = (targets, loss_mask, signal)
    shared = (jnp.float32(alpha), teacher_head)
    sums: Any = sum_chunks(measure, chunk_tokens, hidden, lm_head, per_token, shared)
    objective, nats, kl = sums
    return objective, nats, kl


def measure_kl(logits: Array, teacher_logits: Array, is_reverse: bool) -> tuple[Array, Array]:
    """Return the KL [B, T] in nats and its gradient for the student's logits [B, T, V]."""
    V, n = logits.shape[-1], min(logits.shape[-1], teacher_logits.shape[-1])
    log_q = jax.nn.log_softmax(logits[..., :n])
    log_p = jax.nn.log_softmax(teacher_logits[..., :n])
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    if is_reverse:
        kl = jnp.sum(q * (log_q - log_p), axis=-1)
        d_logits = q * (log_q - log_p - kl[..., None])
    else:
        kl = jnp.sum(p * (log_p - log_q), axis=-1)
        d_logits = q - p
    return kl, pad_ids(d_logits, V)


def measure_sampled_kl(
    logits: Array, samples: TeacherSamples, n_ids: int | None = None
) -> tuple[Array, Array]:
    """Return an unbiased estimate of KL(teacher || student) and its gradient, likewise unbiased.

    Args:
        logits: the student's, [B, T, V].
        samples: the teacher's.
        n_ids: its vocabulary, at most V, over which the KL is; None: V.

    Source: random sampling knowledge distillation, 2503.16870, section 3.
    """
    log_q = jax.nn.log_softmax(logits[..., :n_ids])
    ids = samples.ids
    taken = jnp.take_along_axis(log_q, ids, axis=-1)
    kl = samples.mean_log_prob - jnp.mean(taken, axis=-1)
    B, T, n_samples = ids.shape
    sequence, position = jnp.arange(B)[:, None, None], jnp.arange(T)[:, None]
    d_logits = jnp.exp(log_q).at[sequence, position, ids].add(-1 / n_samples)
    return kl, pad_ids(d_logits, logits.shape[-1])


def pad_ids(d_logits: Array, vocab_size: int) -> Array:
    """Return d_logits [B, T, n] as [B, T, vocab_size], 0 for the further ids."""
    return jnp.pad(d_logits, [(0, 0), (0, 0), (0, vocab_size - d_logits.shape[-1])])


def sample_teacher(
    hidden: Array,
    lm_head: Array,
    starts: Array,
    n_samples: int,
    temperature: float,
    chunk_tokens: int = loss.CPU_CHUNK_TOKENS,
    softcap: float | None = None,
) -> TeacherSamples:
    """Draw tokens from a teacher's distribution.

    The draws of a position are systematic: one random start, then steps of 1 / n over the
    cumulative distribution. A token of probability p is drawn n p times on average, as by
    independent draws, but never more than one draw off.

    Args:
        hidden: the teacher's, [B, T, D], after the final norm.
        lm_head: the teacher's, [D, V].
        starts: float32 [B, T], uniform in [0, 1).
        n_samples: draws per position.
        temperature: logits are divided by it.
        chunk_tokens: tokens over all devices whose logits may exist at once.
        softcap: of the logits.
    """

    def sample(_: None, chunk: Any) -> tuple[None, TeacherSamples]:
        hidden, starts = chunk
        log_p = jax.nn.log_softmax(compute_chunk_logits(hidden, lm_head, softcap) / temperature)
        ends = jnp.cumsum(jnp.exp(log_p), axis=-1)
        points = (starts[..., None] + jnp.arange(n_samples)) / n_samples * ends[..., -1:]
        find = jax.vmap(jax.vmap(lambda ends, points: jnp.searchsorted(ends, points, "right")))
        ids = jnp.minimum(find(ends, points), log_p.shape[-1] - 1).astype(jnp.int32)
        taken = jnp.take_along_axis(log_p, ids, axis=-1)
        return None, TeacherSamples(ids, jnp.mean(taken, axis=-1))

    chunks = loss.split_token_chunks(chunk_tokens, hidden, starts)
    _, samples = jax.lax.scan(sample, None, chunks)
    return jax.tree.map(loss.join_token_chunks, samples)
