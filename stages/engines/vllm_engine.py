"""Teacher engine on vLLM, CPU and GPU: requests are fed as it has room, what prompts begin with in common is computed once.

Raw logits come out by one of two routes. "rows": `vllm_worker.Capture` hands out arrays from the sampler, one row per
position. "lists": where the sampler of this release cannot be hooked, vLLM's own flat lists with
`logprobs_mode="raw_logits"`, slower and without log-sum-exp. The self-test checks either at every start.
"""

from __future__ import annotations

import logging
import multiprocessing.connection
import os
import signal
import warnings
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np

from duet.cache.errors import Interrupted, UserError
from duet.cache.record import counts_of, offsets_of
from duet.stages.engines.interface import Ask, Engine, EngineSpec, Request, Scored, Usage
from duet.stages.models.directory import load_config
from duet.stages.models.limits import vocab_width
from duet.stages.models.loading import whole_folder

# Of the lists: rows of the head beyond the tokenizer's ids may have any logit. vLLM does not know which they are, so that
# many more entries are asked for and such ids dropped; where more of them are in a top-k, the engine refuses.
PADDING_MARGIN = 64
FULL_BATCHES = 2  # requests in flight, in batches of the scheduler's: one runs, one waits
DEATH_S = 5  # after an error, for a worker process to have ended
CPU_BLOCK_TOKENS = 32  # what prompts share is found in whole blocks; vLLM's own choice on a CPU is 128

_ENVIRONMENT = {
    # One process: a signal for us must not end an engine process before the rows in flight are written.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_USE_V2_MODEL_RUNNER": "0",  # its sampler cannot be hooked, and it knows no logits processors of this kind
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB, read on the CPU only
}


class VllmUnusable(Exception):
    """vLLM is installed but does not start here; the message is its own."""


class VllmEngine(Engine):
    """One in-process vLLM engine with automatic prefix caching."""

    def __init__(self, spec: EngineSpec, hook: bool = True) -> None:
        """`hook`: take the route "rows" where it can be had."""
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        warnings.filterwarnings("ignore", "`torch.distributed.reduce_op` is deprecated", FutureWarning)  # its own use
        logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"])  # it speaks before it reads its setting
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it warns of a CUDA without a GPU
        self._spec = spec
        self._padding = max(vocab_width(load_config(spec.model_dir, spec.trust_remote_code)) - spec.num_ids, 0)
        on_cpu = spec.device == "cpu"
        if on_cpu and spec.pipeline_parallel > 1:
            raise UserError(
                "teacher.pipeline_parallel does not work with vLLM on a CPU (seen with 0.32)",
                "leave it out, or use teacher.tensor_parallel",
            )
        if on_cpu and spec.tensor_parallel > 1:  # vLLM on a CPU refuses ranks that are not bound to cores
            os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "|".join(_cores_of_ranks(spec.tensor_parallel)))
        others = set(multiprocessing.active_children())
        self._kept = ExitStack()
        folder = self._kept.enter_context(whole_folder(spec.model_dir, spec.dtype, spec.trust_remote_code))
        options: dict[str, Any] = {
            "model": str(folder),
            "skip_tokenizer_init": True,
            "dtype": spec.dtype,
            "trust_remote_code": spec.trust_remote_code,
            "max_model_len": spec.context,
            "gpu_memory_utilization": spec.gpu_memory_utilization,
            "tensor_parallel_size": spec.tensor_parallel,
            "pipeline_parallel_size": spec.pipeline_parallel,
            "quantization": spec.quantization,
            "logprobs_mode": "raw_logits",
            "max_logprobs": -1,
            "enable_prefix_caching": spec.share_prefix,
            "generation_config": "vllm",
            "enforce_eager": on_cpu,
            "use_tqdm_on_load": False,
            "seed": 0,
            "worker_extension_cls": "duet.stages.engines.vllm_worker.Capture",
            "logits_processors": ["duet.stages.engines.vllm_worker:ChosenTokens"],
            **({"block_size": CPU_BLOCK_TOKENS} if on_cpu else {}),
        }
        try:
            import vllm

            self.llm = vllm.LLM(**options)
        except Exception as error:
            self._kept.close()
            raise VllmUnusable(
                f"it does not start: {str(error).strip().splitlines()[0] if str(error) else error!r}"
            ) from error
        logging.getLogger("vllm").setLevel(logging.CRITICAL)  # from now on its errors are exceptions, which we tell
        self._engine: Any = self.llm.llm_engine
        self._workers = set(multiprocessing.active_children()) - others  # none for one device
        self._room = FULL_BATCHES * self._engine.vllm_config.scheduler_config.max_num_seqs
        self._hooked = hook and self._capture(1, False)
        self.name = f"vllm {vllm.__version__}"
        self.route = "rows" if self._hooked else "lists"
        self.dtype = str(self._engine.model_config.dtype).removeprefix("torch.")
        self.usage = Usage()
        self._added = 0

    def _capture(self, top_k: int, logsumexp: bool) -> bool:
        """Tell the workers what to hand out; False if one of them cannot."""
        answers = self.llm.collective_rpc("duet_capture", args=(top_k, self._spec.num_ids, logsumexp))
        return all(answers) and hasattr(self._engine.output_processor, "request_states")

    def stream(self, requests: Iterable[Request], ask: Ask) -> Generator[tuple[int, Scored], None, None]:
        if ask.ids != "top_k":
            raise UserError(
                f"{self.name} keeps the likeliest ids only: teacher.ids: {ask.ids} needs the engine transformers",
                "set teacher.engine: transformers, or teacher.ids: top_k",
            )
        if self._hooked:
            self._capture(ask.top_k, ask.logsumexp)
            wanted = 0  # none of vLLM's own
        elif ask.logsumexp:
            raise UserError(
                f"{self.name} gives no log-sum-exp here: its sampler cannot be hooked",
                "set teacher.logsumexp: false, which only KL losses over the whole vocabulary mind, or teacher.engine: "
                "transformers",
            )
        else:
            wanted = ask.top_k + (self._padding if ask.top_k == self._spec.num_ids else self._margin)
        in_order = ((request.key, request.prompt_ids, self._params(request, ask, wanted)) for request in requests)
        for finished in self._run(in_order):
            yield from self._scored([key for key, _ in finished], [output for _, output in finished], ask)

    @property
    def _margin(self) -> int:
        return min(self._padding, PADDING_MARGIN)

    def answers(
        self, prompts: Sequence[list[int]], max_new_tokens: int
    ) -> Generator[tuple[int, list[int]], None, None]:
        params, eos_ids = self._sampling(max_tokens=max_new_tokens), self._spec.eos_ids
        for finished in self._run((number, ids, params) for number, ids in enumerate(prompts)):
            for number, output in finished:
                yield number, [i for i in output.token_ids if i not in eos_ids]

    def close(self) -> None:
        del self._engine, self.llm
        self._kept.close()

    def _params(self, request: Request, ask: Ask, logprobs: int) -> Any:
        given, chosen = request.given_ids, None
        if given is not None:
            chosen = {"given_ids": [int(i) for i in given]}
        elif ask.temperature:
            chosen = {"seed": request.seed or 0, "temperature": ask.temperature}
        return self._sampling(
            max_tokens=ask.max_positions if given is None else len(given),
            logprobs=logprobs,
            flat_logprobs=True,
            extra_args=chosen,
            ignore_eos=given is not None,
            stop_token_ids=list(self._spec.eos_ids) if given is None else None,
        )

    def _sampling(self, **settings: Any) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        common: dict[str, Any] = {"temperature": 0, "stop_token_ids": list(self._spec.eos_ids)}
        if self._padding and not self._hooked:
            common["allowed_token_ids"] = list(range(self._spec.num_ids))
        return SamplingParams(**(common | settings), detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY)

    def _run(self, requests: Iterable[tuple[int, Sequence[int], Any]]) -> Iterator[list[tuple[int, Any]]]:
        """Feed (key, prompt, params) as there is room; yields what each step of the engine has finished."""
        waiting, in_flight = iter(requests), {}
        try:
            while True:
                while len(in_flight) < self._room and (request := next(waiting, None)):
                    key, prompt_ids, params = request
                    in_flight[self._add(prompt_ids, params)] = key
                if not in_flight:
                    return
                finished = [output for output in self._step() if output.finished]
                self.usage.prompt_tokens += sum(len(output.prompt_token_ids or ()) for output in finished)
                self.usage.cached_tokens += sum(output.num_cached_tokens or 0 for output in finished)
                if finished:
                    yield [(in_flight.pop(output.request_id), output.outputs[0]) for output in finished]
        finally:
            if in_flight and all(worker.is_alive() for worker in self._workers):
                self._engine.abort_request(list(in_flight))

    def _step(self) -> list[Any]:
        """One step of vLLM's; Interrupted where one of its worker processes has died.

        vLLM tells that by whatever error comes first ("cancelled", EngineDeadError), within some ten seconds.
        """
        try:
            return self._engine.step()
        except Exception as error:
            ended = multiprocessing.connection.wait([worker.sentinel for worker in self._workers], DEATH_S)
            if not ended:
                raise
            codes = []
            for worker in self._workers:
                if worker.sentinel in ended:
                    worker.join(DEATH_S)
                    codes.append(worker.exitcode or 0)
            # Those that are left end too, by an error of their own or by vLLM's SIGTERM: what came first is another signal.
            code = min(codes, key=lambda code: (code >= 0, code == -signal.SIGTERM))
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
            raise Interrupted(f"a worker process of {self.name} {how}; what was complete is kept") from error

    def _add(self, prompt_ids: Sequence[int], params: Any) -> str:
        from vllm.inputs import TokensPrompt

        self._added += 1
        name = str(self._added)
        own_name = self._engine.add_request(name, TokensPrompt(prompt_token_ids=list(prompt_ids)), params)
        if self._hooked and params.logprobs is not None:
            self._engine.output_processor.request_states[own_name or name].logprobs_processor = _rows_processor()
        return name

    def _scored(self, keys: Sequence[int], outputs: Sequence[Any], ask: Ask) -> Iterator[tuple[int, Scored]]:
        """All finished responses at once, columnar."""
        offsets = offsets_of([len(output.token_ids) for output in outputs])
        if self._hooked:
            rows = [row for output in outputs for row in output.logprobs]
            ids_NK, logits_NK = (np.concatenate(column) for column in zip(*rows, strict=True))
            sums_N = logits_NK[:, -1] if ask.logsumexp else None
            ids_NK, logits_NK = ids_NK[:, : ask.top_k], logits_NK[:, : ask.top_k]
        else:
            ids_NK, logits_NK = self._of_lists([output.logprobs for output in outputs], ask.top_k)
            sums_N = None
        if not len(ids_NK) == offsets[-1]:
            raise UserError(
                f"{self.name} returned {len(ids_NK)} rows of logits for {offsets[-1]} tokens",
                "use another release of it, or set teacher.engine: transformers",
            )
        for key, output, first, count in zip(keys, outputs, offsets[:-1], counts_of(offsets), strict=True):
            own = slice(int(first), int(first + count))
            yield (
                key,
                Scored(
                    np.asarray(output.token_ids, np.int32),
                    ids_NK[own],
                    logits_NK[own],
                    None if sums_N is None else sums_N[own],
                ),
            )

    def _of_lists(self, flat: Sequence[Any], top_k: int) -> tuple[np.ndarray, np.ndarray]:
        """vLLM's flat lists as arrays [N, K]: the sampled token, which comes first, and padding ids are dropped."""
        widths = {end - start for f in flat for start, end in zip(f.start_indices, f.end_indices, strict=True)}
        if len(widths) != 1:
            raise UserError(
                f"{self.name} returned rows of {sorted(widths)} entries, all were to be alike",
                "use another release of it, or set teacher.engine: transformers",
            )
        width = widths.pop()
        ids, logits = (
            np.concatenate([np.asarray(getattr(f, name), dtype).reshape(-1, width)[:, 1:] for f in flat])
            for name, dtype in (("token_ids", np.int32), ("logprobs", np.float32))
        )
        padding = ids >= self._spec.num_ids
        if padding.any():
            keep = np.argsort(padding, axis=1, kind="stable")
            ids, logits = np.take_along_axis(ids, keep, 1), np.take_along_axis(logits, keep, 1)
            if (ids[:, :top_k] >= self._spec.num_ids).any():
                raise UserError(
                    f"more than {PADDING_MARGIN} ids of head padding are among the top {top_k} ids of a row",
                    "set teacher.engine: transformers, which leaves them out before it sorts",
                )
        return np.ascontiguousarray(ids[:, :top_k]), np.ascontiguousarray(logits[:, :top_k])


def _cores_of_ranks(count: int) -> list[str]:
    """The cores of this process in as many parts, as vLLM's setting of that name has them."""
    cores = [str(core) for core in sorted(os.sched_getaffinity(0))]
    return [",".join(cores[rank::count] or cores[:1]) for rank in range(count)]


def _rows_processor() -> Any:
    """In the place of vLLM's own collector of a request, which makes four Python objects of every kept id."""
    from vllm.v1.engine.logprobs import LogprobsProcessor

    rows: list[Any] = []

    class Rows(LogprobsProcessor):
        def _update_sample_logprobs(self, logprobs_lists: Any) -> None:
            rows.append((logprobs_lists.logprob_token_ids, logprobs_lists.logprobs))

    return Rows(None, rows, None, None, None, None)
