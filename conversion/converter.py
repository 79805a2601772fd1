"""The retrofit itself: the source's own shards under a new index, beside one small shard of depth parameters.

A PreNorm checkpoint already is an AttnRes model whose pseudo-queries are zero, so nothing is computed: shards are
hard-linked, or copied where a link is not possible, and `model-attnres.safetensors` adds `depth_attention.*`.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
import warnings
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich import filesize
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from .. import modeling_attnres
from ..configuration_attnres import MIXES, AttnResConfig
from ..depth_attention import DepthAttention
from ..model_cards.card import CARD, build_card, inherited_metadata
from . import pickles, quantization
from .delivery import REPORT, check_destination, deliver, staging, umask, written_files
from .errors import ConversionError
from .loading import depth_names
from .source import DEPTH_SHARD, Source, check_names_free, check_sizes, open_source, read_headers, regular_file
from .tokenizer import pin_tokenizer, write_generation_config
from .verification import VERIFICATION_MODES, Verification, check_complete, compare

SINGLE_SHARD = "model-00001-of-00001.safetensors"  # `model.safetensors` would be loaded without looking at the index


@dataclass(frozen=True)
class ConversionReport:
    """What a conversion did; also written beside the weights as `attnres_conversion.json`.

    Attributes:
        source: Hub id, or name of the directory, that was converted.
        model_type: architecture of the backbone.
        block_size, num_blocks, num_sublayers, num_reads, mix, num_heads: the depth configuration (S, N, L, R, H).
        parameters, added_parameters: of the source, and of depth attention on top.
        tokenizer: class of the tokenizer, whose token ids were compared; `None` if there is none that can be loaded.
        quantization: the method that the source is quantised by, and so the result; `None` for most.
        pickles: pickled files that were rewritten as safetensors.
        bytes_linked, bytes_copied, bytes_written: of weights: hard-linked, copied unchanged, and new.
        seconds: wall time of the conversion, verification included.
        verification: what was compared and how close it was; `None` if it was not asked for.
        versions: of the packages that did it.
        files: what was written beside this report, by name, with the SHA-256 of each small file and the size of others.
    """

    source: str
    model_type: str
    block_size: int
    num_blocks: int
    num_sublayers: int
    num_reads: int
    mix: str
    num_heads: int
    parameters: int
    added_parameters: int
    tokenizer: str | None
    quantization: str | None
    pickles: tuple[str, ...]
    bytes_linked: int
    bytes_copied: int
    bytes_written: int
    seconds: float
    verification: Verification | None
    versions: dict[str, str]
    files: dict[str, str]


def convert(
    source: str | os.PathLike,
    destination: str | os.PathLike,
    *,
    block_size: int | None = None,
    num_blocks: int | None = None,
    mix: str = "sum",
    num_heads: int = 1,
    verify: str = "full",
    overwrite: bool = False,
    allow_pickle: bool = False,
    revision: str | None = None,
    progress: bool = False,
) -> ConversionReport:
    """Makes an AttnRes checkpoint of an existing one, without changing what it computes or rewriting a weight.

    Args:
        source (`str` or `PathLike`):
            directory of a checkpoint, or a Hub id. Nothing in it is trusted: none of its code runs, and no link is
            followed out of it, except by a snapshot in the Hub's cache to the blobs of its repository.
        destination (`str` or `PathLike`): directory to make. It appears at once and complete, or not at all.
        block_size (`int`, *optional*): S, sublayers per block; 1 is Full AttnRes. Excludes `num_blocks`.
        num_blocks (`int`, *optional*, defaults to 8): N, the number of blocks.
        mix (`str`, *optional*, defaults to `"sum"`):
            `"sum"` is lossless for every architecture; `"mean"` is the paper's read, lossless behind RMSNorms up to
            their epsilon, and verified to 1 % instead of 0.01 % of the largest logit. `"gated"` adds the mean to the
            residual stream, times a gate that is zero at first: lossless for every architecture.
        num_heads (`int`, *optional*, defaults to 1):
            H, the depth heads: each weighs its own slice of the hidden dimension. Lossless, and no parameter more.
        verify (`str`, *optional*, defaults to `"full"`):
            `"full"` compares the logits of the whole models, `"sample"` of their first layers, which are in memory one
            at a time (for models that do not fit there), `"none"` compares only names and shapes.
        overwrite (`bool`, *optional*, defaults to `False`): replace a checkpoint that is already at `destination`.
        allow_pickle (`bool`, *optional*, defaults to `False`):
            Take pickled weights (`pytorch_model.bin`) where there are no safetensors. They are read with
            `weights_only`, which runs no code of theirs, and rewritten as safetensors, with a warning.
        revision (`str`, *optional*): branch, tag or commit of a Hub id.
        progress (`bool`, *optional*, defaults to `False`): show a progress bar on stderr while shards are copied.

    Returns:
        [`ConversionReport`]: what was done and measured.

    Raises:
        AttnResError: the request makes no sense, the source cannot be converted, or the result differs from it. The
            message says what, where and what to do; source and destination are as they were.
    """
    started = time.perf_counter()
    if mix not in MIXES:
        raise ConversionError(f"mix={mix!r} is not allowed; choose one of {', '.join(map(repr, MIXES))}.")
    if verify not in VERIFICATION_MODES:
        raise ConversionError(f"verify={verify!r} is not allowed; choose one of {', '.join(VERIFICATION_MODES)}.")
    try:
        target = Path(destination).absolute()
        target.resolve()  # fails for what is no path
        check_destination(target, overwrite)
    except (TypeError, ValueError, OSError) as error:
        if isinstance(error, ConversionError):
            raise
        raise ConversionError(f"destination {destination!r} is no path that can be used: {error}") from error
    checkpoint = open_source(source, revision, allow_pickle)
    _check_apart(checkpoint, target)
    method = quantization.quantization_method(checkpoint.config)
    if verify != "none" and (reason := quantization.unavailable(checkpoint.config)):
        raise ConversionError(
            f"{checkpoint.name} is quantised by {method} and cannot be loaded here, so it cannot be "
            f"verified: {reason} Convert it where that can be loaded, or pass verify='none' (--verify none), which "
            "checks names and shapes only."
        )
    config = AttnResConfig(
        backbone_config=checkpoint.config,
        block_size=block_size,
        num_blocks=num_blocks,
        mix=mix,
        depth_attention={"num_heads": num_heads},
        architectures=["AttnResForCausalLM"],
    )

    with staging(target) as stage:
        linked = copied = written = 0
        if checkpoint.pickles:
            checkpoint, written = _rewrite_pickles(checkpoint, stage)
        else:
            linked, copied = _link_shards(checkpoint, stage, progress)
        config.dtype = quantization.stored_dtype(checkpoint.config, checkpoint.num_elements)
        names = depth_names(config, checkpoint.name)
        written += _write_depth_shard(config, names, stage)
        _write_index(checkpoint, config, names, stage)
        write_config_and_code(config, stage)
        for name in checkpoint.companions:
            (stage / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(checkpoint.directory / name, stage / name)
        write_generation_config(checkpoint.directory, stage)
        tokenizer = pin_tokenizer(checkpoint.directory, stage)
        check_complete(checkpoint, stage)
        report = ConversionReport(
            source=checkpoint.name,
            model_type=checkpoint.config.model_type,
            block_size=config.depth_attention["block_size"],
            num_blocks=config.num_blocks,
            num_sublayers=config.num_sublayers,
            num_reads=config.num_reads,
            mix=mix,
            num_heads=num_heads,
            parameters=checkpoint.num_parameters,
            added_parameters=sum(map(torch.numel, DepthAttention.from_config(config).parameters())),
            tokenizer=tokenizer,
            quantization=method,
            pickles=checkpoint.pickles,
            bytes_linked=linked,
            bytes_copied=copied,
            bytes_written=written,
            verification=None if verify == "none" else compare(checkpoint, stage, config, verify),
            seconds=round(time.perf_counter() - started, 2),
            versions={name: version(name) for name in ("attnres", "torch", "transformers", "safetensors")},
            files={},
        )
        _write_report(report, stage)
        card = build_card(stage, name=target.name, inherited=_inherited(checkpoint.directory))
        (stage / CARD).write_text(str(card), encoding="utf-8")
        report = replace(report, files=written_files(stage))
        _write_report(report, stage)
        deliver(stage, target, overwrite)
    return report


def _inherited(directory: Path) -> dict[str, Any]:
    """Metadata of the source's card, if that is a file of the source."""
    try:
        regular_file(directory / CARD, directory)
    except ConversionError:  # a FIFO or a link elsewhere has nothing to inherit
        return {}
    return inherited_metadata(directory)


def _write_report(report: ConversionReport, stage: Path) -> None:
    (stage / REPORT).write_text(json.dumps(asdict(report), indent=2) + "\n", encoding="utf-8")


def report_table(report: ConversionReport) -> Table:
    """The report as a table for a terminal."""
    title = f"{escape(report.source)}: {report.model_type} with Attention Residuals"
    table = Table(title=title, show_header=False)
    kind = "Full" if report.block_size == 1 else "Block"
    heads = "" if report.num_heads == 1 else f" of {report.num_heads} heads"
    table.add_row("Depth attention", f"{kind}, mix {report.mix}, {report.num_reads} reads{heads}")
    table.add_row("Blocks", f"{report.num_blocks} of {report.block_size} sublayers ({report.num_sublayers} in all)")
    table.add_row("Parameters", f"{report.parameters:,} + {report.added_parameters:,} added")
    if report.quantization is not None:
        table.add_row("Quantised by", report.quantization)
    if report.pickles:
        table.add_row("Rewritten from pickles", escape(", ".join(report.pickles)))
    table.add_row("Tokenizer", "none that can be loaded" if report.tokenizer is None else escape(report.tokenizer))
    table.add_row("Weights linked", filesize.decimal(report.bytes_linked))
    table.add_row("Weights copied", filesize.decimal(report.bytes_copied))
    table.add_row("Weights written", filesize.decimal(report.bytes_written))
    if report.verification is None:
        table.add_row("Verification", "none")
    else:
        seen = report.verification
        scope = "whole model" if seen.mode == "full" else f"first {seen.num_hidden_layers} decoder layers"
        what = f"{seen.tokens} tokens of {seen.tokens_from} in {seen.sequences} sequences"
        table.add_row("Verification", f"{scope}, {seen.dtype}, {what}")
        table.add_row("Largest logit difference", f"{seen.largest_logit_difference:.2e} (of {seen.largest_logit:.1f})")
        table.add_row("Greedy tokens equal", f"{seen.greedy_agreement:.1%}")
    table.add_row("Seconds", f"{report.seconds:.1f}")
    return table


def _check_apart(source: Source, target: Path) -> None:
    """Refuses a destination whose replacement could remove a file of the source, also through symbolic links."""
    target = target.resolve()
    directory = source.directory.resolve()
    files = [
        (directory / name).resolve() for name in ("config.json", *source.shards, *source.pickles, *source.companions)
    ]
    if directory == target or directory in target.parents or any(target in path.parents for path in files):
        raise ConversionError(f"source {directory} and destination {target} overlap; choose a destination elsewhere.")


def _write_depth_shard(config: AttnResConfig, names: dict[str, str], stage: Path) -> int:
    parameters = DepthAttention.from_config(config).named_parameters()  # float32, whatever the rest is
    tensors = {names[name]: parameter.detach() for name, parameter in parameters}
    return _save(tensors, stage / DEPTH_SHARD)


def _rewrite_pickles(source: Source, stage: Path) -> tuple[Source, int]:
    """Writes each pickled file as one safetensors file. Returns the source with what is now known of its tensors, and
    bytes written."""
    warnings.warn(
        f"{source.name}: pickled weights ({', '.join(source.pickles)}) are read with weights_only, which runs no code "
        "of theirs, and rewritten as safetensors.",
        stacklevel=3,
    )
    tensors: dict[str, str] = {}
    written = 0
    for number, pickled in enumerate(source.pickles, start=1):
        shard = f"model-{number:05}-of-{len(source.pickles):05}.safetensors"
        regular_file(source.directory / pickled, source.directory)
        contents = pickles.read_pickle(source.directory / pickled)
        if twice := sorted(contents.keys() & tensors.keys()):
            raise ConversionError(f"{source.directory / pickled} holds {twice[0]!r}, which another file holds too.")
        try:
            written += _save(contents, stage / shard)
        except (KeyError, ValueError) as error:  # a dtype that safetensors does not have
            path = source.directory / pickled
            raise ConversionError(f"{path} cannot be written as safetensors: {error!r}") from error
        tensors |= dict.fromkeys(contents, shard)
    if missing := sorted(source.tensors.keys() - tensors.keys()):
        raise ConversionError(
            f"{source.directory / source.tensors[missing[0]]} lacks tensor {missing[0]!r}, which the index puts there."
        )
    shards = tuple(sorted(set(tensors.values())))
    infos = read_headers(stage, shards, tensors)
    check_names_free(source.directory, {name: source.tensors.get(name, source.pickles[0]) for name in tensors})
    check_sizes(source.directory, source.config, infos)
    return replace(source, shards=shards, tensors=tensors, infos=infos), written


def _save(tensors: dict[str, torch.Tensor], path: Path) -> int:
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:  # a full disk, for one
        raise OSError(str(error)) from error
    path.chmod(0o666 & ~umask())  # safetensors makes private files
    return path.stat().st_size


def _shard_name(shard: str) -> str:
    return SINGLE_SHARD if shard == SAFE_WEIGHTS_NAME else shard


def _link_shards(source: Source, stage: Path, progress: bool) -> tuple[int, int]:
    """Hard-links every shard, or copies it where the file system does not allow that. Returns bytes linked, copied."""
    linked = copied = 0
    console = Console(file=sys.stderr)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not progress, transient=True) as bar:
        task = bar.add_task("Linking shards", total=source.num_bytes)
        for shard in source.shards:
            path = (source.directory / shard).resolve()  # the Hub's cache holds links to blobs
            size = path.stat().st_size
            try:
                os.link(path, stage / _shard_name(shard))
                linked += size
                bar.advance(task, size)
            except OSError:
                bar.update(task, description="Copying shards")
                with path.open("rb") as reader, (stage / _shard_name(shard)).open("wb") as writer:
                    while chunk := reader.read(16 * 2**20):
                        writer.write(chunk)
                        bar.advance(task, len(chunk))
                copied += size
    return linked, copied


def _write_index(source: Source, config: AttnResConfig, names: dict[str, str], stage: Path) -> None:
    weight_map = {name: _shard_name(shard) for name, shard in source.tensors.items()}
    weight_map |= dict.fromkeys(names.values(), DEPTH_SHARD)
    metadata = {
        "total_parameters": source.num_parameters + 2 * config.num_reads * config.hidden_size,
        "total_size": sum((stage / shard).stat().st_size for shard in set(weight_map.values())),
    }
    index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
    (stage / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def write_config_and_code(config: AttnResConfig, stage: Path) -> None:
    config.save_pretrained(stage)
    code = modeling_attnres.__file__
    for path in {code, *get_relative_import_files(code)}:
        shutil.copyfile(path, stage / Path(path).name)
