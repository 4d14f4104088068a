"""Run an attention kernel on each device's shard of a batch."""

from __future__ import annotations

from collections.abc import Callable

import jax
from jax import Array

from jaxpt.sharding import logical_to_partition_spec

ATTENTION_OUTPUT = "attention_output"  # the name by which remat policies know it


def shard_map_attention(local: Callable[..., Array]) -> Callable[..., Array]:
    """Return local(q, k, v, segment_ids) run by each device on its shard, if there is a mesh."""
    if jax.sharding.get_abstract_mesh().empty:
        return local
    queries = logical_to_partition_spec(("batch", "position", "heads", None))
    keys = logical_to_partition_spec(("batch", "position", "kv_heads", None))
    ids = logical_to_partition_spec(("batch", "position"))
    in_specs = (queries, keys, keys, ids)
    return jax.shard_map(local, in_specs=in_specs, out_specs=queries, check_vma=False)
