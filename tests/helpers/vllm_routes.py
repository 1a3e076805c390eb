"""What real vLLM returns by both of the engine's routes, for every kind of request: `vllm_routes.py MODEL_DIR FOLDER CONTEXT`.

Reads `FOLDER/asked.pickle`, a dictionary of (requests, ask), and writes `FOLDER/found.pickle`: per route the results of
each, what was computed once, greedy continuations, and why ids cannot be named.
"""

from __future__ import annotations

import pickle
import sys
from dataclasses import replace
from pathlib import Path

from duet.stages.engines.interface import EngineSpec, Usage
from duet.stages.engines.self_test import self_test
from duet.stages.engines.vllm_engine import VllmEngine
from duet.stages.models.tokenizers import load_tokenizer


def fault_of_named_ids(engine: VllmEngine, prompt: list[int]) -> str:
    """What this release says to ids named for a prompt's positions, run as Duet runs it; "" where it scores them."""
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError
    from vllm.inputs import TokensPrompt

    params = SamplingParams(max_tokens=1, detokenize=False, prompt_logprob_token_ids=[[5, 6]] * (len(prompt) - 1))
    try:
        engine.llm.generate(TokensPrompt(prompt_token_ids=prompt), params, use_tqdm=False)
    except VLLMValidationError as error:
        return str(error)
    return ""


def main(model_dir: Path, folder: Path, context: int) -> None:
    asked = pickle.loads((folder / "asked.pickle").read_bytes())
    tokenizer = load_tokenizer(model_dir)
    spec = EngineSpec(model_dir, "float32", len(tokenizer), context, (tokenizer.eos_token_id,), "cpu")
    found = {}
    for route in ("rows", "lists"):
        engine = VllmEngine(spec, hook=route == "rows")
        assert engine.route == route
        results = {}
        for name, (requests, ask) in asked[route].items():
            self_test(engine, requests[:3], ask, spec.num_ids, "small")
            engine.usage = Usage()
            results[name] = engine.score_all(requests, ask), replace(engine.usage)
        prompts = [list(request.prompt_ids) for request in asked["rows"]["greedy"][0]]
        found[route] = results, engine.generate(prompts, 6), fault_of_named_ids(engine, prompts[0])
        if route == "rows":  # more than is scheduled at once: prompts are computed in parts
            many = [replace(request, key=n, seed=n) for n, request in enumerate(asked["rows"]["sampled"][0] * 60)]
            assert len(engine.score_all(many, asked["rows"]["sampled"][1])) == len(many)
        engine.close()
    (folder / "found.pickle").write_bytes(pickle.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
