"""Limit what a grown or continued model forgets of its parent's knowledge."""

from __future__ import annotations

import dataclasses

from jaxpt.config import MixtureConfig
from jaxpt.stage import to_jsonable
from jaxpt.train.records import ReplayPhases

# Of the tokens, for all replayed sources together: beyond it the run is no longer about new data.
MAX_REPLAY_SHARE = 0.5
# Share of a source that had none: enough against a weak shift (2403.08763).
FIRST_REPLAY_SHARE = 0.05


def find_forgotten(
    losses: dict[str, float], parent: dict[str, float] | None, limit: float
) -> dict[str, float]:
    """Return source -> nats per token above the parent, where that exceeds the limit (0: none)."""
    if not parent or not limit:
        return {}
    rises = {}
    for name, loss in losses.items():
        rise = loss - parent.get(name, loss)
        if rise > limit:
            rises[name] = rise
    return rises


def increase_replay(
    mixture: MixtureConfig, names: list[str], step: int, n_sequences: dict[str, int]
) -> MixtureConfig:
    """Return the mixture with doubled shares of the forgotten sources from a step on.

    Every phase still to come is changed; the other sources divide the rest in their proportions.

    Args:
        mixture: the mixture in force.
        names: the forgotten sources.
        step: updates done.
        n_sequences: source -> size, the shares of a mixture without phases.
    """
    sizes = {name: float(n) for name, n in n_sequences.items()}
    phases = mixture.phases or ((0, sizes),)
    changed = [phase for phase in phases if phase[0] < step]
    coming = [phase for phase in phases if phase[0] >= step]
    if not coming or coming[0][0] != step:
        _, shares = changed[-1]
        coming.insert(0, (step, shares))
    for start, shares in coming:
        raised = raise_shares(shares, names)
        changed.append((start, raised))
    return dataclasses.replace(mixture, phases=tuple(changed))


def raise_shares(shares: dict[str, float], names: list[str]) -> dict[str, float]:
    """Return one phase's shares with those of `names` doubled, within MAX_REPLAY_SHARE."""
    total = sum(shares.values())
    shares = {name: share / total for name, share in shares.items() if share}
    others = {name: share for name, share in shares.items() if name not in names}
    if not others:
        return shares
    raised = {}
    for name in names:
        raised[name] = FIRST_REPLAY_SHARE
        if name in shares:
            raised[name] = 2 * shares[name]
    # a source that has more than the maximum already keeps it
    before = sum(shares.get(name, 0) for name in names)
    limit = max(MAX_REPLAY_SHARE, before)
    total = sum(raised.values())
    scale = min(1, limit / total)
    rest = (1 - scale * total) / sum(others.values())
    result = {}
    for name, share in raised.items():
        result[name] = round(scale * share, 4)
    for name, share in others.items():
        result[name] = round(rest * share, 4)
    return result


def describe_forgetting(rises: dict[str, float], limit: float) -> str:
    """Return a sentence about the sources that `find_forgotten` returned."""
    worse = ", ".join(f"{name} +{rise:.3f}" for name, rise in rises.items())
    return f"forgetting: nats per token above the parent: {worse} (limit {limit:g})"


def record_replay(configured: MixtureConfig, in_force: MixtureConfig) -> ReplayPhases | None:
    """Return the phases for a checkpoint, None where replay has not changed them."""
    if in_force is configured:
        return None
    return ReplayPhases(configured.phases, in_force.phases)


def restore_replay(configured: MixtureConfig, replay: ReplayPhases | None) -> MixtureConfig:
    """Return the mixture with a checkpoint's phases, unless the config has changed since."""
    if replay is None:
        return configured
    if to_jsonable(replay.configured) != to_jsonable(configured.phases):
        return configured
    return dataclasses.replace(configured, phases=replay.in_force)
