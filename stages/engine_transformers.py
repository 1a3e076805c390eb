"""Teacher engine on plain transformers: the reference, and what runs where vLLM does not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import transformers
from transformers import GenerationConfig

from stages.engine import EngineSpec, Scored
from stages.models import load_model

# Shapes: B batch, P positions, K kept ids, V vocabulary (without head padding).


class TransformersEngine:
    """Batches of left-padded prompts through `generate`, which hands out the logits before any processing."""

    def __init__(self, spec: EngineSpec) -> None:
        self.name = f"transformers {transformers.__version__}"
        self._spec = spec
        self._model = load_model(spec.model_dir, spec.dtype, spec.trust_remote_code).to(spec.device)
        self.dtype = str(self._model.dtype).removeprefix("torch.")
        # The directory's own generation settings (penalties, sampling) must not change what greedy means.
        self._model.generation_config = GenerationConfig()

    def score(self, prompts: Sequence[list[int]], top_k: int, max_positions: int) -> list[Scored]:
        sequences_BP, steps_PBV = self._generate(prompts, max_positions, want_logits=True)
        real_PBV = [logits_BV[:, : self._spec.num_ids].float() for logits_BV in steps_PBV]
        top = [logits_BV.topk(top_k, dim=-1) for logits_BV in real_PBV]
        ids_BPK = torch.stack([t.indices for t in top], dim=1).to("cpu", torch.int32).numpy()
        logits_BPK = torch.stack([t.values for t in top], dim=1).cpu().numpy()
        # Over the whole head, padding rows included: that is the sum the model's own softmax takes.
        lse_BP = torch.stack([logits_BV.float().logsumexp(-1) for logits_BV in steps_PBV], dim=1).cpu().numpy()
        scored = []
        for row, response in enumerate(self._responses(sequences_BP)):
            count = len(response)
            scored.append(
                Scored(
                    np.asarray(response, np.int32), ids_BPK[row, :count], logits_BPK[row, :count], lse_BP[row, :count]
                )
            )
        return scored

    def generate(self, prompts: Sequence[list[int]], max_new_tokens: int) -> list[list[int]]:
        sequences_BP, _ = self._generate(prompts, max_new_tokens, want_logits=False)
        return [[i for i in ids if i not in self._spec.eos_ids] for ids in self._responses(sequences_BP)]

    def close(self) -> None:
        del self._model
        if self._spec.device == "cuda":
            torch.cuda.empty_cache()

    def _generate(
        self, prompts: Sequence[list[int]], new_tokens: int, want_logits: bool
    ) -> tuple[torch.Tensor, tuple[Any, ...]]:
        """Greedy continuations [B, P], padded after their end, and if wanted the raw logits [B, V] of each step."""
        eos_ids = list(self._spec.eos_ids)
        pad_id = eos_ids[0] if eos_ids else 0
        width = max(map(len, prompts))
        ids_BT = torch.full((len(prompts), width), pad_id)
        mask_BT = torch.zeros_like(ids_BT)
        for row, prompt in enumerate(prompts):
            ids_BT[row, width - len(prompt) :] = torch.tensor(prompt)
            mask_BT[row, width - len(prompt) :] = 1
        settings = GenerationConfig(
            max_new_tokens=new_tokens,
            do_sample=False,
            eos_token_id=eos_ids or None,
            pad_token_id=pad_id,
            return_dict_in_generate=True,
            output_logits=want_logits,
            # Head padding can have any logit; it is no token and must not be generated.
            suppress_tokens=list(range(self._spec.num_ids, self._head_rows())) or None,
        )
        with torch.inference_mode():
            out = self._model.generate(
                input_ids=ids_BT.to(self._spec.device),
                attention_mask=mask_BT.to(self._spec.device),
                generation_config=settings,
            )
        return out.sequences[:, width:].cpu(), out.logits or ()

    def _head_rows(self) -> int:
        return self._model.get_output_embeddings().weight.shape[0]

    def _responses(self, sequences_BP: torch.Tensor) -> list[list[int]]:
        """Each row up to and including its first end-of-sequence id."""
        responses = []
        for ids in sequences_BP.tolist():
            end = next((i for i, token in enumerate(ids) if token in self._spec.eos_ids), len(ids) - 1)
            responses.append(ids[: end + 1])
        return responses
