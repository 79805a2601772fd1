"""What a training is and has done: `attnres_training.json` in the output, written at the start and at the end."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from ..model_cards.card import TRAINING_REPORT
from .errors import TrainingError

PACKAGES = ("attnres", "torch", "transformers", "trl", "peft", "datasets", "accelerate")


@dataclass(frozen=True)
class TrainingReport:
    """What a training is and has done; written to the output as `attnres_training.json`.

    Attributes:
        source: name of the checkpoint or of the configuration that was trained.
        method: what was trained (`"full"`, `"lora"`, `"depth"` or `"scratch"`), and on which residuals.
        model: what else says which model it was: its configuration of depth, and what identifies its weights.
        data: the kind of the data, and for each file its name and SHA-256.
        settings: of the run, see [`TrainingSettings`], and the peak learning rates that it had.
        processes: how many copies of the model were trained together: processes, or pipelines of several.
        versions: of the packages that did it.
        finished: whether the output is complete. What follows is known then.
        steps, tokens: optimizer steps, and tokens that were seen (without padding).
        train_loss: mean loss of the last logged steps, nats per token.
        validation: `loss` (nats per token) and `bits_per_byte`, `before` the first and `after` the last step.
        evaluations: `[step, validation loss]` for each evaluation.
        seconds: wall time of the last process that trained, since its last start.
        files: what was written beside the report, by name.
        losses: `[step, loss]` for each logged loss.
    """

    source: str
    method: dict[str, Any]
    model: dict[str, Any]
    data: dict[str, Any]
    settings: dict[str, Any]
    processes: int
    versions: dict[str, str]
    finished: bool = False
    steps: int = 0
    tokens: int = 0
    train_loss: float | None = None
    validation: dict[str, dict[str, float]] | None = None
    seconds: float = 0.0
    files: tuple[str, ...] = ()
    losses: tuple[tuple[int, float], ...] = ()
    evaluations: tuple[tuple[int, float], ...] = ()

    def write(self, directory: Path) -> None:
        """Writes the report into a directory, at once."""
        path = directory / TRAINING_REPORT
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            with temporary.open("w", encoding="utf-8") as file:
                file.write(json.dumps(asdict(self), indent=2) + "\n")
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise TrainingError(f"{path} cannot be written: {error}") from error

    @classmethod
    def read(cls, directory: Path) -> TrainingReport | None:
        """The report in a directory, or `None` if it has none.

        Raises:
            TrainingError: the file is not what a training writes.
        """
        path = directory / TRAINING_REPORT
        if not path.is_file():
            return None
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            curves = {
                name: tuple((step, loss) for step, loss in values.get(name, ())) for name in ("losses", "evaluations")
            }
            return cls(**values | {"files": tuple(values["files"])} | curves)
        except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
            raise TrainingError(f"{path} is not what a training writes: {error}") from error

    def fixed(self) -> dict[str, Any]:
        """What must be the same when the run is resumed, by dotted names. Of the sizes of batches it is their product:
        more processes may share it, if each of them is given less."""
        parts: dict[str, Any] = {"source": self.source}
        for name in ("method", "model", "data", "settings"):
            parts |= flatten(getattr(self, name), f"{name}.")
        sizes = [parts.pop(f"settings.{name}") for name in ("batch_size", "accumulation")]
        parts["sequences per step (batch_size x accumulation x processes)"] = self.processes * math.prod(sizes)
        return json.loads(json.dumps(parts))


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A mapping of mappings as one, by dotted names."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


def versions() -> dict[str, str]:
    return {name: version(name) for name in PACKAGES}


def report_table(report: TrainingReport) -> Table:
    """The report as a table for a terminal."""
    method = f"{report.method['train']}, {report.method['residual']}"
    table = Table(title=f"{escape(report.source)}: {method}", show_header=False)
    table.add_row("Steps", f"{report.steps:,}")
    table.add_row("Tokens", f"{report.tokens:,}")
    if report.train_loss is not None:
        table.add_row("Last training loss", f"{report.train_loss:.4f}")
    for when, metrics in (report.validation or {}).items():
        words = [f"{value:.4f} {name.replace('_', ' ')}" for name, value in metrics.items()]
        table.add_row(f"Validation {when}", ", ".join(words))
    table.add_row("Seconds", f"{report.seconds:.1f}")
    return table
