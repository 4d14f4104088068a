"""What a grown or continued model may forget of what its parent knew, and what happens when it forgets more."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from jaxpt.config import Config
from jaxpt.config import MixtureConfig as Asked

MAX_REPLAY_SHARE = 0.5  # of the tokens, for all sources that are replayed more: beyond it the run would no longer be about what is new
FIRST_REPLAY_SHARE = (
    0.05  # share of a source that had none: enough against a weak shift (2403.08763)
)


def find_forgotten(
    measured: dict[str, float], parent: dict[str, float] | None, settings: Config
) -> dict[str, float]:
    """{source: nats a token above the parent} of the sources that are worse than train.max_forgetting allows."""
    limit = settings.train.max_forgetting
    if not (parent and limit):
        return {}
    return {
        name: measured[name] - parent[name]
        for name in measured
        if name in parent and measured[name] - parent[name] > limit
    }


def increase_replay(asked: Asked, names: list[str], step: int, n_rows: dict[str, int]) -> Asked:
    """The mixture with twice the share of `names` from `step` on, in every phase that is still to come; the others share the rest as before."""

    def raised(shares: dict[str, float]) -> dict[str, float]:
        whole = sum(shares.values())
        shares = {name: share / whole for name, share in shares.items() if share}
        more = {name: 2 * shares[name] if name in shares else FIRST_REPLAY_SHARE for name in names}
        others = {name: share for name, share in shares.items() if name not in more}
        if not others:
            return shares
        most = max(
            MAX_REPLAY_SHARE, sum(shares.get(name, 0) for name in names)
        )  # what has more already keeps it
        scale = min(1, most / sum(more.values()))
        left = (1 - scale * sum(more.values())) / sum(others.values())
        return {
            name: round(share, 4)
            for name, share in (
                {n: scale * s for n, s in more.items()} | {n: left * s for n, s in others.items()}
            ).items()
        }

    phases = asked.phases or ((0, {name: float(n) for name, n in n_rows.items()}),)
    past = [phase for phase in phases if phase[0] < step]
    now = [(step, raised(past[-1][1]))] if not any(at == step for at, _ in phases) else []
    return dataclasses.replace(
        asked, phases=(*past, *now, *((at, raised(shares)) for at, shares in phases if at >= step))
    )


def describe_forgetting(found: dict[str, float], settings: Config) -> str:
    worse = ", ".join(f"{name} by {rise:.3f}" for name, rise in found.items())
    return f"forgetting: held-out loss is above the parent's: {worse} nats a token ({settings.train.max_forgetting:g} allowed)"


def replay_to_json(asked: Asked, in_force: Asked) -> dict[str, Any] | None:
    """For a checkpoint: the phases that replay has made of those asked for, where it has."""
    return None if in_force is asked else {"asked": asked.phases, "in_force": in_force.phases}


def replay_from_json(asked: Asked, found: dict[str, Any] | None) -> Asked:
    """The mixture with the phases that a checkpoint's `to_json` holds, unless others are asked for by now."""
    if not found or json.dumps(found["asked"]) != json.dumps(asked.phases):
        return asked
    return dataclasses.replace(
        asked, phases=tuple((step, shares) for step, shares in found["in_force"])
    )
