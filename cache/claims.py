"""Which shard a writer takes next, when many writers fill one store."""

from __future__ import annotations

PATIENCE = 8  # 4 times that many shards that are not as they were listed call for another listing; 4 times as many for the next


def key(index: int) -> str:
    return f"shard-{index:05d}"


def rank(stamp: float | None, young: float) -> int:
    """What the dead seem to have begun, what nobody has, what somebody seems to work on."""
    return 1 if stamp is None else 0 if stamp < young else 2
