"""What `attnres inspect` does: runs a checkpoint over a text and writes figures, their numbers and a page."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from .. import __version__
from ..conversion.tokenizer import TEXTS
from . import tables
from .drop_study import DropStudy, drop_source
from .errors import AnalysisError
from .layer_outputs import Magnitudes, magnitudes
from .layout import Layout, depth_module
from .maps import DepthMaps
from .statistics import MAX_TOKENS_KEPT, DepthStatistics, collect, pieces, windows

MARK = "inspection.json"
MAGNITUDE_TOKENS = 8192
DROP_TOKENS = 1024


@dataclass(frozen=True)
class Inspection:
    """What was found in one checkpoint.

    Attributes:
        name: of the checkpoint.
        maps: depth weights, over the whole text; `None` for a plain decoder.
        tokens: the kept tokens, as text.
        parameters: how far training moved queries and key norms; `None` for a plain decoder.
        magnitudes: of the outputs of its decoder layers.
        dropped: the drop-source study, if it was asked for.
    """

    name: str
    maps: DepthMaps | None
    tokens: tuple[str, ...]
    parameters: pd.DataFrame | None
    magnitudes: Magnitudes
    dropped: DropStudy | None


def inspect_checkpoint(
    checkpoint: str | os.PathLike[str],
    *,
    text: str | os.PathLike[str] | None = None,
    prompt: str | None = None,
    compare: str | os.PathLike[str] | None = None,
    output: str | os.PathLike[str] | None = None,
    gradients: bool = False,
    drop: bool = False,
    read: int | None = None,
    sequence_length: int = 512,
    batch_size: int = 4,
    max_tokens: int | None = None,
    dtype: str = "auto",
    device_map: str | None = None,
    overwrite: bool = False,
    console: Console | None = None,
) -> list[Inspection]:
    """Looks inside a checkpoint and writes what it finds.

    Writes into `output`: each figure as PNG and SVG, with its numbers as CSV, and `report.html`, which needs no other
    file.

    Args:
        checkpoint (`str` or `PathLike`): an AttnRes checkpoint, a directory or a Hub id.
        text (`str` or `PathLike`, *optional*): file of the text that statistics are taken over; else the prompt, or a
            few sentences that come with this package.
        prompt (`str`, *optional*): the tokens that are shown one by one; else the first of the text.
        compare (`str` or `PathLike`, *optional*): a second checkpoint, of an AttnRes model or a plain decoder.
        output (`str` or `PathLike`, *optional*): directory to write to; else `NAME-inspect`, by the checkpoint.
        gradients (`bool`, *optional*, defaults to `False`): measure gradients too, over the first 8192 tokens.
        drop (`bool`, *optional*, defaults to `False`): measure the loss without each source, over 1024 tokens.
        read (`int`, *optional*): the read whose tokens are drawn; else the one that depends most on the token.
        sequence_length (`int`, *optional*, defaults to 512): tokens in a window of the text.
        batch_size (`int`, *optional*, defaults to 4): windows per forward pass.
        max_tokens (`int`, *optional*): stop after so many tokens of the text.
        dtype (`str`, *optional*, defaults to `"auto"`): of the weights; `"auto"` is the checkpoint's own, but float32
            on a CPU.
        device_map (`str`, *optional*): where the parts of the model go, as Accelerate takes it, `"auto"` for one; else
            the first accelerator or the CPU.
        overwrite (`bool`, *optional*, defaults to `False`): replace an earlier inspection in `output`.
        console (`Console`, *optional*): where progress is shown.

    Returns:
        `list[Inspection]`: of the checkpoint, and of the one it is compared with.

    Raises:
        AnalysisError: a checkpoint cannot be loaded or has no attention over depth, the text is empty or cannot be
            read, or `output` cannot be written.
    """
    from . import report  # needs the packages of the extra `analysis`

    for name, value in (("sequence_length", sequence_length), ("batch_size", batch_size), ("max_tokens", max_tokens)):
        if value is not None and value < 1:
            raise AnalysisError(f"{name}={value} leaves nothing to read; give 1 or more.")
    directory = Path(output) if output is not None else Path(f"{Path(checkpoint).name}-inspect")
    _check_directory(directory, overwrite)
    where = Path(text) if text is not None else prompt or "\n\n".join(TEXTS)
    settings = _Settings(where, prompt, gradients, drop, sequence_length, batch_size, max_tokens)
    found: list[Inspection] = []
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:3.0f} %"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console or Console(stderr=True), disable=console is None) as progress:
        for name in (str(checkpoint), *([] if compare is None else [str(compare)])):
            model, tokenizer = _load(name, dtype, device_map)
            has_depth = isinstance(getattr(model.config, "depth_attention", None), dict)
            if not found and not has_depth:
                Layout.of(model)  # raises
            if has_depth and read is not None and not 0 <= read <= model.config.num_sublayers:
                raise AnalysisError(f"read={read} is none of the reads 0 to {model.config.num_sublayers} of {name}.")
            label = _label(name, [inspection.name for inspection in found])
            found.append(_inspect(model, tokenizer, label, settings, progress))
            del model
        task = progress.add_task("figures and page", total=1)
        facts = {
            "text": "a few sentences that come with attnres" if text is None and not prompt else _fact(text, prompt),
            "tokens": f"{found[0].maps.num_tokens:,}" if found[0].maps else "0",
            "window": f"{sequence_length} tokens",
            "attnres": __version__,
            "torch": torch.__version__,
        }
        try:
            if directory.exists() and overwrite:
                shutil.rmtree(directory)
            directory.mkdir(parents=True, exist_ok=True)
            files = report.write(found, directory, read, facts)
            mark = {"files": sorted(files), "checkpoints": [inspection.name for inspection in found], **facts}
            (directory / MARK).write_text(json.dumps(mark, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        except OSError as error:
            raise AnalysisError(f"{directory} cannot be written: {error}; choose another --output.") from error
        progress.update(task, completed=1)
    return found


@dataclass(frozen=True)
class _Settings:
    text: str | Path
    prompt: str | None
    gradients: bool
    drop: bool
    sequence_length: int
    batch_size: int
    max_tokens: int | None

    def window(self, model: PreTrainedModel) -> int:
        longest = getattr(model.config, "max_position_embeddings", None)
        return min(self.sequence_length, longest) if isinstance(longest, int) and longest > 0 else self.sequence_length


def _fact(text: Any, prompt: str | None) -> str:
    return Path(text).name if text is not None else f"the prompt, {len(prompt or '')} characters"


def _inspect(model: PreTrainedModel, tokenizer: Any, name: str, settings: _Settings, progress: Progress) -> Inspection:
    length = settings.window(model)
    maps = parameters = dropped = None
    tokens: tuple[str, ...] = ()

    def sample(count: int) -> list[torch.Tensor]:
        most = min(count, settings.max_tokens or count)
        return list(windows(tokenizer, pieces(settings.text), length, 1, most))

    if isinstance(getattr(model.config, "depth_attention", None), dict):
        task = progress.add_task(f"{name}: depth weights", total=None)
        shown = _with_progress(settings.text, progress, task)
        shown_windows = windows(tokenizer, shown, length, settings.batch_size, settings.max_tokens)
        statistics = DepthStatistics(Layout.of(model))
        maps = DepthMaps.of(collect(model, shown_windows, statistics))
        progress.update(task, total=1, completed=1)
        if settings.prompt and isinstance(settings.text, Path):
            of_prompt = DepthStatistics(Layout.of(model))
            one = windows(tokenizer, [settings.prompt], length, 1, MAX_TOKENS_KEPT)
            prompted = DepthMaps.of(collect(model, one, of_prompt))
            maps = replace(maps, token_ids=prompted.token_ids, token_weights=prompted.token_weights)
        tokens = tuple(str(tokenizer.decode([token])) for token in maps.token_ids)
        depth: Any = depth_module(model)
        parameters = tables.parameters(maps.layout, depth)
    batches = sample(MAGNITUDE_TOKENS)
    if not batches:
        raise AnalysisError("no token was seen; the text is empty.")
    task = progress.add_task(f"{name}: magnitudes", total=len(batches))
    found = magnitudes(model, _counted(batches, progress, task), settings.gradients)
    if settings.drop and maps is not None:
        task = progress.add_task(f"{name}: sources taken away", total=1)
        dropped = drop_source(
            model, sample(DROP_TOKENS), advance=lambda done, total: progress.update(task, completed=done, total=total)
        )
    return Inspection(name, maps, tokens, parameters, found, dropped)


def _with_progress(text: str | Path, progress: Progress, task: Any) -> Iterator[str]:
    size = len(text) if isinstance(text, str) else (text.stat().st_size if text.is_file() else None)
    progress.update(task, total=size)
    for piece in pieces(text):
        yield piece
        progress.advance(task, len(piece) if isinstance(text, str) else len(piece.encode()))


def _counted(batches: Iterable[torch.Tensor], progress: Progress, task: Any) -> Iterator[torch.Tensor]:
    for batch in batches:
        yield batch
        progress.advance(task)


def _load(name: str, dtype: str, device_map: str | None) -> tuple[PreTrainedModel, Any]:
    accelerator = str(torch.accelerator.current_accelerator() or "cpu")
    if dtype == "auto" and accelerator == "cpu":
        dtype = "float32"
    arguments: dict[str, Any] = {"dtype": dtype} | ({"device_map": device_map} if device_map else {})
    try:
        # The package's own classes serve AttnRes checkpoints, so no code that comes with one has to be run.
        model: Any = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=False, **arguments)
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise AnalysisError(f"{name} cannot be loaded: {reason}") from error
    return (model if device_map else model.to(accelerator)).eval(), tokenizer


def _label(name: str, taken: list[str]) -> str:
    label = Path(name).name or name
    return f"{label}-2" if label in taken else label


def _check_directory(directory: Path, overwrite: bool) -> None:
    """An earlier inspection is replaced if that is asked for, and nothing else ever."""
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        return
    if not (directory / MARK).is_file():
        raise AnalysisError(f"{directory} exists and holds no inspection; choose another --output.")
    if not overwrite:
        raise AnalysisError(f"{directory} holds an inspection; replace it (--overwrite), or choose another --output.")
