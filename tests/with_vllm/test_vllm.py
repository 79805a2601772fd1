"""Stock vLLM serves converted checkpoints: the tokens of Transformers, and what the plain model does, it does.

`make test-vllm` runs these. They need the environment of vLLM, and the directory that `make_models.py` made, in
ATTNRES_VLLM_MODELS. This package is not installed there: vLLM runs the code that travels with the checkpoint.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from ecosystem import row

HERE = Path(__file__).parent
MODELS = Path(os.environ.get("ATTNRES_VLLM_MODELS", "missing"))
NEW_TOKENS = 24
EAGER = dict(enforce_eager=True)

pytestmark = [
    pytest.mark.skipif(not (MODELS / "tokens.json").is_file(), reason="`make test-vllm` runs this"),
    pytest.mark.skipif(find_spec("torch") is None, reason="`make test-vllm` runs this"),
    pytest.mark.timeout(1200),
]


def environment() -> dict[str, str]:
    settings = dict(VLLM_CPU_KVCACHE_SPACE="1", VLLM_CPU_OMP_THREADS_BIND="nobind", OMP_NUM_THREADS="1")
    return os.environ | settings | dict(HF_HUB_OFFLINE="1")


def run(tmp_path: Path, model: str, **options: Any) -> tuple[dict[str, Any] | None, str]:
    """What vLLM generated in a process of its own, or `None`, and its log."""
    content = json.loads((MODELS / "tokens.json").read_text(encoding="utf-8"))
    request = dict(model=str(MODELS / model), prompts=content["prompts"][Path(model).name], options=options)
    output = tmp_path / "output.json"
    command = [sys.executable, str(HERE / "generate.py"), str(output), json.dumps(request | {"new_tokens": NEW_TOKENS})]
    with (tmp_path / "log").open("w+", encoding="utf-8") as log:
        code = subprocess.run(command, env=environment(), stdout=log, stderr=log, timeout=900).returncode
        log.seek(0)
        text = log.read()
    return (json.loads(output.read_text(encoding="utf-8")) if code == 0 else None), text


def assert_tokens(tmp_path: Path, model: str, **options: Any) -> None:
    found, log = run(tmp_path, model, **options)
    assert found is not None, log[-5000:]
    assert "Using Transformers modeling backend" in log
    assert found["tokens"] == json.loads((MODELS / "tokens.json").read_text(encoding="utf-8"))["tokens"][model]


@row("vLLM", "Qwen3, random queries; eager; chunked prefill, prefix caching")
@pytest.mark.parametrize("model", ["converted/tiny-qwen3", "random/tiny-qwen3"])
def test_tokens_are_those_of_transformers(model: str, tmp_path: Path) -> None:
    assert_tokens(tmp_path, model, **EAGER)


MODES: dict[str, dict[str, Any]] = {
    "eager": EAGER,
    "compiled": {},
    "`tensor_parallel_size=2`": dict(tensor_parallel_size=2, **EAGER),
}
KINDS = {
    "qwen3_moe": "Qwen3-MoE, random queries: fused experts",
    "gemma2": "Gemma 2, random queries: sliding window, four norms per layer, capped logits",
    "deepseek_v3": "DeepSeek-V3, random queries: fused multi-head latent attention and experts",
}


@row("vLLM", *(f"{kind}; {mode}" for kind in KINDS.values() for mode in MODES))
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("model", KINDS)
def test_other_decoders(model: str, mode: str, tmp_path: Path) -> None:
    assert_tokens(tmp_path, f"random/{model}", **MODES[mode])


@row("vLLM", "Qwen3, random queries; compiled", "Qwen3, random queries; `tensor_parallel_size=2`")
@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "eager"])
def test_qwen3(mode: str, tmp_path: Path) -> None:
    assert_tokens(tmp_path, "random/tiny-qwen3", **MODES[mode])


# -- vllm serve and the client of OpenAI -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of vLLM's server with the converted example."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # What `vllm serve` runs. The command itself asks for the version of "vllm", which the wheel for CPUs does not have.
    command = [
        sys.executable,
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        str(MODELS / "random" / "tiny-qwen3"),
    ]
    command += ["--served-model-name", "attnres", "--trust-remote-code", "--dtype", "float32", "--enforce-eager"]
    command += ["--max-model-len", "256", "--host", "127.0.0.1", "--port", str(port)]
    log = tmp_path_factory.mktemp("serve") / "log"
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(command, env=environment(), stdout=file, stderr=file)
    try:
        for _ in range(600):
            if process.poll() is not None or re.search("Application startup complete", log.read_text("utf-8")):
                break
            time.sleep(1)
        assert process.poll() is None, log.read_text("utf-8")[-5000:]
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(60)


@row("vLLM", "the server of `vllm serve` and the `openai` client: completions, streaming, log-probabilities")
def test_openai_client(server: str) -> None:
    from openai import OpenAI

    client = OpenAI(base_url=server, api_key="none")
    content = json.loads((MODELS / "tokens.json").read_text(encoding="utf-8"))
    for prompt, tokens in zip(content["prompts"]["tiny-qwen3"], content["tokens"]["random/tiny-qwen3"], strict=True):
        request: dict[str, Any] = dict(model="attnres", prompt=prompt, max_tokens=NEW_TOKENS, temperature=0)
        extra = dict(return_token_ids=True, ignore_eos=True)
        completion = client.completions.create(**request, logprobs=1, extra_body=extra)
        assert completion.choices[0].token_ids == tokens
        assert len(completion.choices[0].logprobs.token_logprobs) == NEW_TOKENS
        stream = client.completions.create(**request, stream=True, extra_body=extra)
        assert "".join(part.choices[0].text for part in stream) == completion.choices[0].text


# -- the harness -------------------------------------------------------------------------------------------------------


@row("vLLM", "`attnres eval --model vllm`: the answers and scores of `--model hf`")
def test_the_harness_asks_vllm(tmp_path: Path) -> None:
    """This package is on the path here, as it is for whoever runs `attnres eval`; so is a note that vLLM is installed,
    which the harness asks for and the wheel for CPUs leaves under another name."""
    path = tmp_path / "path"
    release = f"{version('vllm-cpu')}+cpu"  # by which vLLM also tells that it runs on a CPU
    note = path / f"vllm-{release}.dist-info" / "METADATA"
    note.parent.mkdir(parents=True)
    note.write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {release}\n", encoding="utf-8")
    (path / "attnres").symlink_to(HERE.parents[1], target_is_directory=True)
    model, found = MODELS / "random" / "tiny-qwen3", []
    for backend, options in (("hf", []), ("vllm", ["--model-args", "enforce_eager=True,max_model_len=512"])):
        output = tmp_path / backend
        command = [sys.executable, "-m", "attnres.eval", str(model), "--model", backend, "--output", str(output)]
        command += ["--tasks", "sample_minerva_math500,sample_mmlu", "--limit", "3", "--dtype", "float32", *options]
        command += ["--num-fewshot", "1", "--gen-kwargs", "max_gen_toks=16", "--trust-remote-code"]
        with (tmp_path / "log").open("w+", encoding="utf-8") as log:
            settings = environment() | {"PYTHONPATH": str(path)}
            code = subprocess.run(command, env=settings, stdout=log, stderr=log, timeout=900).returncode
            log.seek(0)
            assert code == 0, log.read()[-5000:]
        report = json.loads((output / "report.json").read_text(encoding="utf-8"))
        samples = sorted((output / "harness" / "model").glob("*/samples_*math500*.jsonl"))
        lines = [json.loads(line) for file in samples for line in file.read_text("utf-8").splitlines()]
        # A character that ends before it is whole is held back by vLLM, and shown as "\ufffd" by Transformers.
        answers = [sample["resps"][0][0].replace("\ufffd", "") for sample in lines]
        found.append(([(row["task"], row["attnres"]) for row in report["rows"]], answers))
    assert len(found[0][1]) == 3
    assert found[1] == found[0]


# -- what vLLM's Transformers backend does not do on a CPU, for the plain model neither --------------------------------


@row(
    "vLLM",
    "`pipeline_parallel_size=2`",
    result="refused (`AttnResError`); the plain model fails too, with `model_impl='transformers'`",
)
def test_pipeline_parallel_fails_for_the_plain_model_too(tmp_path: Path) -> None:
    found, log = run(tmp_path, "plain/tiny-qwen3", pipeline_parallel_size=2, model_impl="transformers", **EAGER)
    assert found is None, "the plain model works now, so ours has to"
    assert "AssertionError" in log


def test_pipeline_parallel_is_refused(tmp_path: Path) -> None:
    """vLLM waits for workers that failed, so it is ended once the message is in its log."""
    request: dict[str, Any] = dict(model=str(MODELS / "random" / "tiny-qwen3"), prompts=[[5, 6, 7]], new_tokens=2)
    request["options"] = dict(pipeline_parallel_size=2, **EAGER)
    command = [sys.executable, str(HERE / "generate.py"), str(tmp_path / "output.json"), json.dumps(request)]
    file = tmp_path / "log"
    with file.open("w", encoding="utf-8") as log:
        process = subprocess.Popen(command, env=environment(), stdout=log, stderr=log, start_new_session=True)
    try:
        for _ in range(600):
            text = file.read_text("utf-8", errors="replace")
            if process.poll() is not None or "PPMissingLayer" in text:
                break
            time.sleep(1)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(60)
    text = file.read_text("utf-8", errors="replace")
    assert re.search("AttnResError.*PPMissingLayer", text), text[-5000:]
    assert not (tmp_path / "output.json").exists()
