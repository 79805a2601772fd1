"""What `attnres demo` and `make demo` run: the project's main job, end to end, on a checkpoint that is included."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.syntax import Syntax
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from ..configuration_attnres import AttnResError
from ..conversion import convert
from ..conversion.converter import report_table

CHECKPOINT = Path(__file__).resolve().parent / "tiny-qwen3"
MARK = ".attnres-demo"
PROMPTS = (
    "class TestParser(unittest.TestCase):\n    def",
    "    def test_close(self):\n        with self.assertRaises(",
    "def read_file(path):\n    try:\n",
)


def run(output: Path, console: Console, max_new_tokens: int = 48) -> Path:
    """Converts `tiny-qwen3`, verifies it, generates from original and converted side by side, and evaluates both.

    Args:
        output (`Path`): directory to write to; one that an earlier run made is made anew.
        console (`Console`): where to print.
        max_new_tokens (`int`, *optional*, defaults to 48): length of each continuation.

    Returns:
        `Path`: the converted checkpoint.

    Raises:
        AttnResError: `output` holds something else, or the conversion failed.
    """
    from ..eval import evaluate, quiet  # here, since it takes seconds that an import for `CHECKPOINT` can do without

    if output.exists():
        if not (output / MARK).is_file():
            raise AttnResError(f"{output} exists and was not made by the demo; choose another with --output.")
        shutil.rmtree(output)
    try:
        output.mkdir(parents=True)
        (output / MARK).touch()
    except OSError as error:
        raise AttnResError(f"{output} cannot be made: {error}; choose another with --output.") from error
    converted = output / "tiny-qwen3-attnres"

    logging.disable_progress_bar()
    console.rule("1. Convert")
    console.print("examples/tiny-qwen3 is a Qwen3 of 8 layers, trained on the Python standard library.")
    console.print(report_table(convert(CHECKPOINT, converted, num_blocks=8, progress=True)))

    console.rule("2. Generate from both")
    tokenizer = AutoTokenizer.from_pretrained(converted)
    original: Any = AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32)
    attnres: Any = AutoModelForCausalLM.from_pretrained(converted, dtype=torch.float32, trust_remote_code=True)
    same = 0
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt")
        tokens = [
            model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, repetition_penalty=1.2)[0]
            for model in (original, attnres)
        ]
        same += torch.equal(*tokens)
        table = Table("Qwen3", "Qwen3 with Attention Residuals", expand=True)
        table.add_row(*(Syntax(str(tokenizer.decode(ids)), "python", background_color="default") for ids in tokens))
        console.print(table)
    console.print(f"{same} of {len(PROMPTS)} continuations are the same, token for token.")

    console.rule("3. Evaluate both")
    console.print("A dozen questions for each core benchmark, through its own prompts and metrics.")
    quiet()
    evaluation = output / "evaluation"
    report = evaluate(str(converted), str(CHECKPOINT), tasks="sample", output=evaluation)
    assert report is not None
    console.print(report.terminal_table())
    for missing in report.missing:
        console.print(f"Not run: {missing.line}", markup=False)

    console.rule("4. Where it is, and what next")
    console.print(f"The converted checkpoint: [bold]{escape(str(converted))}[/], with attnres_conversion.json in it.")
    console.print(f"Its evaluation: [bold]{escape(str(evaluation / 'report.html'))}[/]")
    commands = (
        "attnres convert Qwen/Qwen3-0.6B Qwen3-0.6B-AttnRes --num-blocks 8",
        "python -c \"from transformers import pipeline; print(pipeline('text-generation', "
        "'Qwen3-0.6B-AttnRes', trust_remote_code=True)('Attention over depth'))\"",
        "attnres eval Qwen3-0.6B-AttnRes --baseline Qwen/Qwen3-0.6B --tasks core",
        "attnres push Qwen3-0.6B-AttnRes YOUR-NAME/Qwen3-0.6B-AttnRes",
    )
    console.print(
        Panel(escape("\n".join(commands)), title="For your own checkpoint: convert, generate, evaluate, share")
    )
    if same != len(PROMPTS):
        raise AttnResError("the converted checkpoint generates something else than the original.")
    if any(row.difference for row in report.rows):
        raise AttnResError("the converted checkpoint scores something else than the original.")
    return converted
