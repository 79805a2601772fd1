"""One run in a process of its own: reads what to do from the standard input, prints the result as one line of JSON."""

from __future__ import annotations

import json
import platform
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ...analysis import magnitudes
from .. import finetune, train
from ..report import TrainingReport, versions
from .studies import TINY, Run

MAGNITUDE_WINDOWS = 16  # sequences of the validation text over which magnitudes are means


def result_of(run: Run, corpus: dict[str, Any]) -> dict[str, Any]:
    """Trains, and returns what is kept: validation losses, settings, seeds, versions and the corpus's hash."""
    settings = {"precision": precision(), **run.training, "seed": run.seed, "tensorboard": False}
    settings |= {"save_every": 10 * settings["steps"], "log_every": 10}
    with TemporaryDirectory() as directory:
        output = Path(directory) / "out"
        files = dict(data=corpus["training"], validation=corpus["validation"])
        if run.source is not None:
            is_plain = run.residual == "plain"
            report = finetune(run.source, output=output, plain=is_plain, depth=dict(run.depth), **files, **settings)
        else:
            model = dict(
                backbone=dict(run.backbone), tokenizer=TINY, residual=run.residual, depth_attention=dict(run.depth)
            )
            data = dict(train=files["data"], validation=files["validation"])
            report = train(dict(output=str(output), model=model, data=data, training=settings))
        found = _magnitudes(output, corpus, run) if run.magnitudes else None
        parameters = _num_parameters(output)
    return summary(run, report, corpus) | {"parameters": parameters, "magnitudes": found}


def precision() -> str:
    return "bf16" if torch.cuda.is_available() else "fp32"


def summary(run: Run, report: TrainingReport, corpus: dict[str, Any]) -> dict[str, Any]:
    assert report.validation is not None
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {
        "study": run.study,
        "arm": run.arm,
        "seed": run.seed,
        "stage": run.stage,
        "residual": run.residual,
        "depth": dict(run.depth),
        "backbone": dict(run.backbone),
        "training": dict(run.training),
        "validation_loss": report.validation["after"]["loss"],
        "validation_loss_before": report.validation["before"]["loss"],
        "bits_per_byte": report.validation["after"].get("bits_per_byte"),
        "train_losses": [[step, round(loss, 5)] for step, loss in report.losses],
        "steps": report.steps,
        "tokens": report.tokens,
        "seconds": report.seconds,
        "corpus": {"sha256": corpus["sha256"], "packages": corpus["packages"]},
        "versions": versions(),
        "device": device,
    }


def _num_parameters(output: Path) -> int:
    from safetensors import safe_open

    count = 0
    for path in output.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (it is no dictionary)
                count += int(torch.tensor(file.get_slice(name).get_shape()).prod())
    return count


def _magnitudes(output: Path, corpus: dict[str, Any], run: Run) -> dict[str, list[float]]:
    model = AutoModelForCausalLM.from_pretrained(output, trust_remote_code=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(output, trust_remote_code=True)
    rows = Path(corpus["validation"]).read_text(encoding="utf-8").splitlines()
    text = "\n".join(json.loads(row)["text"] for row in rows)
    length = run.training["sequence_length"]
    ids = tokenizer(text[: 20 * MAGNITUDE_WINDOWS * length], return_tensors="pt").input_ids[0]
    batches = [window.unsqueeze(0) for window in ids.split(length)[:MAGNITUDE_WINDOWS]]
    found = magnitudes(model, batches, gradients=True)
    assert found.gradients is not None
    return {name: [float(value) for value in getattr(found, name)] for name in ("written", "accumulated", "gradients")}


def main() -> None:
    request = json.loads(sys.stdin.read())
    print(json.dumps(result_of(Run(**request["run"]), request["corpus"])))


if __name__ == "__main__":
    main()
