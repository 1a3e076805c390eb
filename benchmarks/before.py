"""The transformers engine as it was before it filled its batches first, to be measured beside today's in one run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

import numpy as np

from duet.stages.engines.transformers_engine import TransformersEngine, _Batch
from duet.stages.models.batching import cut_by_length


class Before(TransformersEngine):
    """Batches as they were: by the first 16 tokens, then by length with at most 5 % of padding, 64 rows at most."""

    def _batches(self, prompts: Sequence[Sequence[int]], steps: int) -> Iterator[_Batch]:
        by_ids = sorted(range(len(prompts)), key=lambda row: list(prompts[row]))
        for _, members in groupby(by_ids, key=lambda row: tuple(prompts[row][:16])):
            group = np.array(list(members))
            first, last = prompts[group[0]], prompts[group[-1]]
            most = min(len(prompts[row]) for row in group) - 1
            shared = next((i for i in range(most) if first[i] != last[i]), most) if len(group) > 1 else 0
            lengths = np.array([len(prompts[row]) - shared for row in group])
            for part in cut_by_length(lengths, 0.05, 64 * int(lengths.max())):
                for rows in np.array_split(part, -(-len(part) // 64)):
                    yield _Batch(group[rows], [prompts[row] for row in group[rows]], shared)
