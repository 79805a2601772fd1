"""Generates with vLLM from a checkpoint, in a process of its own, and writes the tokens into a file."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any


def main(output: Path, model: str, prompts: list[list[int]], new_tokens: int, options: dict[str, Any]) -> None:
    from vllm import LLM, SamplingParams

    repeats = options.pop("repeats", 1)
    options = (
        dict(
            dtype="float32",
            max_model_len=256,
            max_num_batched_tokens=32,  # long prompts are prefilled in chunks
            enable_chunked_prefill=True,
            enable_prefix_caching=True,
            trust_remote_code=True,
        )
        | options
    )
    llm = LLM(model, **options)
    parameters = SamplingParams(temperature=0, max_tokens=new_tokens, min_tokens=new_tokens, ignore_eos=True)
    found = []
    started = time.perf_counter()
    for _ in range(repeats):
        # The first prompt alone fills the prefix cache, the others hit it.
        for batch in (prompts[:2], prompts[2:]):
            if batch:
                outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in batch], parameters, use_tqdm=False)
                found += [list(output.outputs[0].token_ids) for output in outputs]
    seconds = time.perf_counter() - started
    output.write_text(json.dumps({"tokens": found, "seconds": seconds}) + "\n", encoding="utf-8")


if __name__ == "__main__":
    request = json.loads(sys.argv[2])
    main(Path(sys.argv[1]), **request)
