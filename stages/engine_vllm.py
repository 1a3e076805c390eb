"""Teacher engine on vLLM, CPU and GPU: raw logits at generated positions, the prefix computed once by prefix caching.

Read in vLLM 0.32 and checked by the self-test at every start: `logprobs_mode="raw_logits"` hands out the head's output
before penalties and temperature; the sampled token comes first in a row, which may therefore hold K+1 entries.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Sequence

import numpy as np

from cache.errors import UserError
from stages.engine import EngineSpec, Scored
from stages.models import load_config, vocab_width

# Rows of the head beyond the tokenizer's ids may have any logit. vLLM does not know which they are, so that many more
# entries are asked for and such ids dropped; where more of them are in a top-k, the engine refuses.
PADDING_MARGIN = 64

_ENVIRONMENT = {
    # One process: a signal for us must not end an engine process before the rows in flight are written.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB, read on the CPU only
}


class VllmUnusable(Exception):
    """vLLM is installed but does not start here; the message is its own."""


class VllmEngine:
    """One in-process vLLM engine with automatic prefix caching."""

    def __init__(self, spec: EngineSpec) -> None:
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        warnings.filterwarnings("ignore", "`torch.distributed.reduce_op` is deprecated", FutureWarning)  # its own use
        logging.getLogger("vllm").setLevel(
            os.environ["VLLM_LOGGING_LEVEL"]
        )  # it speaks before it reads its own setting
        self._spec = spec
        head_rows = vocab_width(load_config(spec.model_dir, spec.trust_remote_code))
        self._margin = min(max(head_rows - spec.num_ids, 0), PADDING_MARGIN)
        self._padding = max(head_rows - spec.num_ids, 0)
        try:
            import vllm

            self._llm = vllm.LLM(
                model=str(spec.model_dir),
                skip_tokenizer_init=True,
                dtype=spec.dtype,  # pyright: ignore[reportArgumentType]  # checked by the settings
                trust_remote_code=spec.trust_remote_code,
                max_model_len=spec.context,
                gpu_memory_utilization=spec.gpu_memory_utilization,
                logprobs_mode="raw_logits",
                max_logprobs=-1,
                enable_prefix_caching=True,
                generation_config="vllm",
                enforce_eager=spec.device == "cpu",
                use_tqdm_on_load=False,
                seed=0,
            )
        except Exception as error:
            raise VllmUnusable(
                f"it does not start: {str(error).strip().splitlines()[0] if str(error) else error!r}"
            ) from error
        self.name = f"vllm {vllm.__version__}"
        self.dtype = str(self._llm.llm_engine.model_config.dtype).removeprefix("torch.")

    def score(self, prompts: Sequence[list[int]], top_k: int, max_positions: int) -> list[Scored]:
        asked = top_k + (self._padding if top_k == self._spec.num_ids else self._margin)
        outputs = self._run(prompts, max_positions, logprobs=asked, flat_logprobs=True)
        return [self._scored(output, top_k) for output in outputs]

    def generate(self, prompts: Sequence[list[int]], max_new_tokens: int) -> list[list[int]]:
        outputs = self._run(prompts, max_new_tokens)
        return [[i for i in output.token_ids if i not in self._spec.eos_ids] for output in outputs]

    def close(self) -> None:
        del self._llm

    def _run(self, prompts: Sequence[list[int]], max_tokens: int, **more):
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt

        params = SamplingParams(
            max_tokens=max_tokens, temperature=0, detokenize=False, stop_token_ids=list(self._spec.eos_ids), **more
        )
        results = self._llm.generate([TokensPrompt(prompt_token_ids=p) for p in prompts], params, use_tqdm=False)
        return [result.outputs[0] for result in results]

    def _scored(self, output, top_k: int) -> Scored:
        """Flat lists of one response to arrays: sampled entry and padding ids dropped, sorted by logit."""
        flat = output.logprobs
        all_ids, all_logits = np.asarray(flat.token_ids, np.int32), np.asarray(flat.logprobs, np.float32)
        ids_PK, logits_PK = [], []
        for start, end in zip(flat.start_indices, flat.end_indices, strict=True):
            ids, first = np.unique(all_ids[start:end], return_index=True)
            logits = all_logits[start:end][first]
            ids, logits = ids[ids < self._spec.num_ids], logits[ids < self._spec.num_ids]
            order = np.lexsort((ids, -logits))[:top_k]
            if len(order) < top_k:
                raise UserError(
                    f"more than {PADDING_MARGIN} ids of head padding are among the top {top_k} ids of a row",
                    "set teacher.engine: transformers, which leaves them out before it sorts",
                )
            ids_PK.append(ids[order])
            logits_PK.append(logits[order])
        return Scored(np.asarray(output.token_ids, np.int32), np.stack(ids_PK), np.stack(logits_PK), None)
