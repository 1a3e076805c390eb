"""The unlearning depth score: how much of a fact that base holds is gone from a model's inner layers. Pure functions.

Source: arXiv 2605.24614. For each layer, base reads a question and its reference answer while the output of that layer, at the
positions that predict the fact's tokens, comes from another model. What base then loses of the fact's log-probability is what
the other model's layer does not hold of it. The control, a model that never knew, says what there is to lose.

Shapes: L layers, N answers.
"""

from __future__ import annotations

import numpy as np

from duet.stages.metrics.metric import Metric

MIN_LOSS = (
    0.05  # nats per token that base must lose to a layer of the control for that layer to count: the source's threshold
)
ID = "unlearning_depth"


def unlearning_depth(lost_LN: np.ndarray, control_LN: np.ndarray) -> np.ndarray:
    """Per answer, the share of what base loses to the control's layers that it loses to the model's too, float64 [N].

    Sum of min(max(lost, 0), control) / sum of control, over the layers where control is above MIN_LOSS: the source's mean of
    clipped ratios, weighted by the control's loss. Both are losses in nats per token. NaN where no layer counts.
    """
    counts_LN = control_LN > MIN_LOSS
    gone_N = np.where(counts_LN, np.clip(lost_LN, 0, np.maximum(control_LN, 0)), 0).sum(axis=0)
    whole_N = np.where(counts_LN, control_LN, 0).sum(axis=0)
    return np.divide(gone_N, whole_N, out=np.full(len(whole_N), np.nan), where=whole_N > 0)


METRICS = (
    Metric(
        ID,
        unlearning_depth,
        "Unlearning depth score (UDS, arXiv 2605.24614). Base reads a question and its reference answer while the output "
        "of one layer, at the positions that predict the tokens of the fact, comes from the model in question; the fall "
        "in the mean log-probability of these tokens is the layer's loss. The same with the control "
        "(evaluate.control_model) says how much there is to lose; layers at which that is 0.05 nats or less do not count. "
        "The score is the model's loss as a share of the control's, each layer between 0 and the control's loss, summed "
        "over layers; answers without such a layer are left out. 0 is base, 1 a model whose layers hold no more of the "
        "fact than those of one that never knew. evaluate.depth says which tokens are the fact's.",
        better="high",
    ),
)
