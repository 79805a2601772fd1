"""The model card: what a checkpoint says of itself, and nothing that it does not know.

One template, `attnres.md.j2`, writes a whole card. An existing card is updated by rendering a new one and taking over
its marked regions and the metadata that the old one lacks; everything else stays as it was, byte for byte.
"""

from __future__ import annotations

import html
import json
import math
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData, metadata_load
from huggingface_hub.errors import StrictDataclassError
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.utils import yaml_dump
from safetensors import SafetensorError, safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..configuration_attnres import DEPTH_VARIANTS, AttnResConfig, AttnResError
from .scores import score_text

CARD = "README.md"
TEMPLATE = Path(__file__).with_name("attnres.md.j2")
CONVERSION_REPORT = "attnres_conversion.json"
EVALUATION_REPORT = "report.json"
TRAINER_STATE = "trainer_state.json"
TRAINING_REPORT = "attnres_training.json"
TAGS = ("attnres", "attention-residuals", "arxiv:2603.15031", "custom_code")
TO_FILL_IN = re.compile(r"\[To fill in: ([^\]]*)\]")

# A card of somebody else is read no further than this; the largest on the Hub list thousands of evaluation results.
MAX_CARD_BYTES = 2**20
INHERITED = ("license", "license_name", "license_link", "language", "base_model")
QUERY = "depth_attention.query"  # how the name of the pseudo-queries ends on disk
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")

LOCAL_PATH = re.compile(r"(?<![\w:/.~])(?:[.~]{0,2}(?:/[\w.@+-]+){2,}|[A-Za-z]:(?:\\{1,2}[\w.@+-]+)+)")

REGION = re.compile(r"<!-- attnres:(\w+):start -->(.*?)<!-- attnres:\1:end -->", re.DOTALL)
MARKER = re.compile(r"<!-- attnres:\w+:(?:start|end) -->")
OURS = ", attnres eval"  # ends the name of each metric in the model index that is of an evaluation by this package

# What the evaluation's report has for each task, and what it may be.
NUMBER = (int, float)
SCORES = ("baseline", "baseline_stderr", "attnres", "attnres_stderr", "difference", "difference_stderr", "p_value")
ROW = {
    "task": (str,),
    "metric": (str,),
    "num_fewshot": (int, type(None)),
    "n": (int, type(None)),
    "limited": (bool,),
    "dataset": (str, type(None)),
    **dict.fromkeys((*SCORES, "paper_baseline", "paper_attnres"), (*NUMBER, type(None))),
}
TRAINER_FIELDS = {
    "global_step": "Steps",
    "epoch": "Epochs",
    "train_batch_size": "Batch size per device",
    "num_input_tokens_seen": "Tokens seen",
}


class CardError(AttnResError):
    """A model card cannot be made or updated; it is as it was."""


def build_card(
    checkpoint: str | os.PathLike,
    results: str | os.PathLike | None = None,
    *,
    repo_id: str | None = None,
    name: str | None = None,
    inherited: Mapping[str, Any] | None = None,
) -> ModelCard:
    """Makes the card of a checkpoint from what lies beside its weights; writes nothing.

    Args:
        checkpoint (`str` or `PathLike`): directory of an AttnRes checkpoint.
        results (`str` or `PathLike`, *optional*): directory that an evaluation wrote, or the `report.json` in it.
        repo_id (`str`, *optional*): the Hub repository that the card will be in, for its example.
        name (`str`, *optional*): title of the card; by default the repository's name, else the directory's.
        inherited (`Mapping[str, Any]`, *optional*): metadata of the original; see [`inherited_metadata`].

    Returns:
        `ModelCard`: metadata and text. What is not known, and somebody has to fill in, says `[To fill in: ...]`.

    Raises:
        CardError: a file of the checkpoint or of the results is missing or is not what it should be.
    """
    directory = Path(checkpoint)
    config = _read_json(directory / "config.json")
    if config.get("model_type") != AttnResConfig.model_type:
        raise CardError(
            f"{directory / 'config.json'}: model_type={config.get('model_type')!r}; an AttnRes checkpoint was expected."
        )
    try:
        depth = AttnResConfig.from_pretrained(directory)
    except (OSError, TypeError, ValueError, KeyError, AttributeError, StrictDataclassError) as error:
        raise CardError(f"{directory / 'config.json'} makes no configuration: {error}") from error
    name = name or (repo_id or directory.resolve().name).split("/")[-1]
    metadata = dict(inherited or {})
    report = _read_json(directory / CONVERSION_REPORT) if (directory / CONVERSION_REPORT).is_file() else None
    if report is not None and HUB_ID.fullmatch(str(report.get("source"))):
        metadata["base_model"] = report["source"]
    evaluation = None if results is None else _read_evaluation(Path(results))
    card_data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        **metadata,
        # The Hub knows adapter, finetune, merge and quantized: this is a whole model of further trained, or as yet
        # untrained, parameters of one original.
        base_model_relation="finetune" if "base_model" in metadata else None,
        tags=list(TAGS),
        **({} if evaluation is None else _model_index(name, evaluation)),
    )
    return ModelCard.from_template(
        card_data,
        template_path=str(TEMPLATE),
        name=_text(name),
        original="" if report is None else _join(str(report.get("source")), link=True),
        base_model=_join(metadata.get("base_model"), link=True),
        licence=_join(metadata.get("license_name") or metadata.get("license")),
        languages=_join(metadata.get("language")),
        repo_id=repo_id,
        repo_id_literal=json.dumps(repo_id or name),
        has_tokenizer=any(directory.glob("tokenizer*")),
        conversion=None if report is None else _conversion(directory / CONVERSION_REPORT, report),
        configuration=_configuration(depth, config),
        num_reads=depth.num_reads,
        trained_reads=_count_trained_reads(directory),
        training=_training(directory / TRAINER_STATE),
        trained_with=training_rows(directory),
        evaluation=None if evaluation is None else _evaluation(evaluation),
    )


def update_card(
    checkpoint: str | os.PathLike, results: str | os.PathLike | None = None, *, repo_id: str | None = None
) -> Path:
    """Writes the card of a checkpoint, or brings the one that is there up to date.

    Of an existing card, the marked regions are written anew, the evaluation only if there are `results` and the example
    only if there is a `repo_id`. Metadata that it lacks are added, and of its `model-index` the results of earlier
    evaluations by this package are replaced. Everything else stays, byte for byte; regions whose markers were removed
    are not put back, but for the evaluation, which then goes to the end.

    Args:
        checkpoint (`str` or `PathLike`): directory of an AttnRes checkpoint.
        results (`str` or `PathLike`, *optional*): directory that an evaluation wrote, or the `report.json` in it.
        repo_id (`str`, *optional*): the Hub repository that the card will be in, for its example.

    Returns:
        `Path`: the card, `README.md` in the directory.

    Raises:
        CardError: a file is missing or is not what it should be, or the card's markers or metadata cannot be
            understood; the card is as it was.
    """
    path = Path(checkpoint) / CARD
    fresh = build_card(checkpoint, results, repo_id=repo_id)
    kept = {name for name, given in (("evaluation", results), ("loading", repo_id)) if given is None}
    _write(path, _merge(path, fresh, kept) if path.exists() else str(fresh))
    return path


def inherited_metadata(source: Path) -> dict[str, Any]:
    """Licence, languages and base model from the card of a checkpoint that is to be converted, as far as it has them.

    Anybody may have written that card: it is bounded in size, loaded as plain data, and only short strings are taken.
    """
    path = source / CARD
    try:
        if path.stat().st_size > MAX_CARD_BYTES:
            return {}
        metadata = metadata_load(path) or {}
    except (OSError, ValueError, RecursionError, yaml.YAMLError):  # a card that cannot be read has nothing to inherit
        return {}
    inherited = {}
    for name in INHERITED:
        value = metadata.get(name)
        values = value if isinstance(value, list) else [value]
        values = ["no" if name == "language" and item is False else item for item in values]  # Norwegian, in YAML 1.1
        if values and all(isinstance(item, str) and 0 < len(item) < 200 and item.isprintable() for item in values):
            inherited[name] = values if isinstance(value, list) else values[0]
    return inherited


def _write(path: Path, text: str) -> None:
    """Writes a file at once or not at all, its line ends as they are."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            shutil.copymode(path, temporary)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise CardError(f"{path} cannot be written: {error}") from error


# -- updating an existing card -----------------------------------------------------------------------------------------


def _merge(path: Path, fresh: ModelCard, kept: set[str]) -> str:
    try:
        text = path.read_bytes().decode("utf-8")
    except (OSError, ValueError) as error:
        raise CardError(f"{path} cannot be read as UTF-8 text: {error}") from error
    line_end = "\r\n" if "\r\n" in text else "\n"
    mark = "\ufeff" if text.startswith("\ufeff") else ""
    text = text.removeprefix(mark)
    if (match := REGEX_YAML_BLOCK.match(text)) is not None:
        head, body = match.group(2), text[match.end() :]
        opening, closing = match.group(1), match.group(3)
    else:
        head, body, opening, closing = "", text, f"---{line_end}", f"{line_end}---{line_end}"

    _check_markers(path, body)
    regions = {name: content for name, content in REGION.findall(str(fresh)) if name not in kept}
    found = {name for name, _ in REGION.findall(body)}
    if "evaluation" in regions and "evaluation" not in found:
        body += "" if body.endswith(("\n", "\r")) else line_end
        body += line_end.join(
            ["", "## Evaluation", "", "<!-- attnres:evaluation:start --><!-- attnres:evaluation:end -->", ""]
        )
    body = REGION.sub(lambda region: _replaced(region, regions, line_end), body)
    merged = _merge_metadata(path, head, fresh, replace_index="evaluation" not in kept)
    if merged != head:
        head = merged.rstrip("\n").replace("\r\n", "\n").replace("\n", line_end)
    return mark + opening + head + closing + body


def _replaced(region: re.Match[str], regions: Mapping[str, str], line_end: str) -> str:
    name = region.group(1)
    if name not in regions:
        return region.group()
    content = regions[name].replace("\n", line_end)
    return f"<!-- attnres:{name}:start -->{content}<!-- attnres:{name}:end -->"


def _check_markers(path: Path, body: str) -> None:
    names = [name for name, _ in REGION.findall(body)]
    if MARKER.search(REGION.sub("", body)) or any(MARKER.search(content) for _, content in REGION.findall(body)):
        raise CardError(
            f"{path}: a marker `<!-- attnres:...:start -->` or `:end -->` lacks its other half; restore it."
        )
    if len(names) != len(set(names)):
        raise CardError(f"{path}: a region `<!-- attnres:...:start -->` is there twice; remove one.")


def _merge_metadata(path: Path, head: str, fresh: ModelCard, replace_index: bool) -> str:
    """Adds to the YAML `head` what it lacks and replaces its model index, as text: comments, order and quotes stay."""
    try:
        old = yaml.safe_load(head) or {}
        new = fresh.data.to_dict()
        new_index = new.pop("model-index", [])
        added = {name: value for name, value in new.items() if name not in old}
        if "base_model" in old:
            added.pop("base_model_relation", None)  # whoever named the base left it out
        expected = {**old, **added}
        index = [*_index_of_others(old.get("model-index") or []), *new_index]
        if replace_index and index != (old.get("model-index") or []):
            head = _without(head, "model-index")
            expected.pop("model-index", None)
            if index:
                expected["model-index"] = added["model-index"] = index
        if added:
            head = "\n".join([*filter(None, [head.rstrip()]), yaml_dump(added, sort_keys=False).rstrip()])
        understood = (yaml.safe_load(head) or {}) == expected
    except (yaml.YAMLError, RecursionError, AttributeError, TypeError, KeyError, ValueError) as error:
        raise CardError(f"{path}: the metadata at its top cannot be read: {error}") from error
    if not understood:
        raise CardError(f"{path}: the metadata at its top cannot be added to; write them as one `name: value` a line.")
    return head


def _index_of_others(index: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The model index without the results of earlier evaluations by this package."""
    models = []
    for model in index:
        results = []
        for result in model["results"]:
            metrics = [metric for metric in result["metrics"] if not str(metric.get("name")).endswith(OURS)]
            if metrics:
                results.append({**result, "metrics": metrics})
        if results:
            models.append({**model, "results": results})
    return models


def _without(head: str, name: str) -> str:
    """The YAML without the block of a top-level name: its line, and what is indented or listed below."""
    lines = head.splitlines(keepends=True)
    start = next((i for i, line in enumerate(lines) if line.startswith(f"{name}:")), None)
    if start is None:
        return head
    end = start + 1
    for i in range(start + 1, len(lines)):
        if lines[i].startswith((" ", "\t", "-")):
            end = i + 1
        elif lines[i].strip() and not lines[i].startswith("#"):
            break
    return "".join(lines[:start] + lines[end:]).rstrip("\r\n")


# -- what the template is given ----------------------------------------------------------------------------------------


def _text(value: Any) -> str:
    """A value as inline Markdown: on one line, and nothing in it is markup."""
    text = html.escape(" ".join(str(value).split()), quote=False)
    return re.sub(r"([\\`*_\[\]|~])", r"\\\1", text)


def _public(value: Any) -> str:
    """A value as inline Markdown, and of the paths in it, which tell of the machine, the last part only."""
    return _text(LOCAL_PATH.sub(lambda path: re.split(r"[/\\\\]", path.group())[-1], str(value)))


def _join(values: Any, link: bool = False) -> str:
    values = values if isinstance(values, list) else [values] if values else []
    is_linked = [link and HUB_ID.fullmatch(value) for value in values]
    return ", ".join(
        f"[{_text(value)}](https://huggingface.co/{value})" if linked else _text(value)
        for value, linked in zip(values, is_linked)
    )


def _conversion(path: Path, report: dict[str, Any]) -> dict[str, Any]:
    try:
        source = report["source"]
        seen = report["verification"]
        rows = []
        if seen is not None:
            scope = (
                "the whole model" if seen["mode"] == "full" else f"the first {seen['num_hidden_layers']:d} layers only"
            )
            tokens = f"{seen['tokens']:d} tokens of {_text(seen['tokens_from'])} in {seen['sequences']:d} sequences"
            rows = [
                ("compared", f"{scope}, in {_text(seen['dtype'])}, on {tokens}"),
                ("largest difference of two logits", f"{seen['largest_logit_difference']:.2e}"),
                ("largest logit", f"{seen['largest_logit']:.1f}"),
                ("positions with the same most likely token", f"{seen['greedy_agreement']:.1%}"),
            ]
        return {
            "source": _join(source, link=True),
            "model_type": _text(report["model_type"]),
            "parameters": f"{report['parameters']:,d}",
            "added_parameters": f"{report['added_parameters']:,d}",
            "mix": report["mix"],
            "verification": rows,
            "versions": ", ".join(f"{_text(name)} {_text(value)}" for name, value in report["versions"].items()),
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CardError(f"{path} is not what the converter writes: {type(error).__name__}: {error}") from error


def _configuration(depth: AttnResConfig, config: Mapping[str, Any]) -> list[tuple[str, str]]:
    settings, size = depth.depth_attention, depth.depth_attention["block_size"]
    kind = "Full AttnRes" if size == 1 else "Block AttnRes"
    mixes = {"sum": "sum: a read is the weighted mean times the number of sources", "mean": "mean, as in the paper"}
    mixes["gated"] = "gated: the residual stream plus a learned gate times the weighted mean"
    variants = [name for name, value in DEPTH_VARIANTS.items() if settings[name] != value]
    return [
        ("Kind", f"{kind}: {depth.num_blocks} blocks of {size} sublayers, {depth.num_sublayers} in all"),
        ("Reads", f"{depth.num_reads}, each with a pseudo-query and a key norm of {depth.hidden_size}"),
        ("Mix", mixes[settings["mix"]]),
        ("Epsilon of the key norm", f"{settings['key_norm_eps']:g}"),
        *((f"`{name}`", _text(str(settings[name]))) for name in variants),
        ("Backbone", f"{_text(depth.model_type)}, {depth.num_hidden_layers} decoder layers"),
        ("Weights", _text(config.get("dtype") or "dtype not recorded")),
    ]


def _count_trained_reads(directory: Path) -> int:
    """How many pseudo-queries are not zero, as every conversion leaves them."""
    shard = directory / SAFE_WEIGHTS_NAME
    if not shard.is_file():
        weight_map: Any = _read_json(directory / SAFE_WEIGHTS_INDEX_NAME).get("weight_map")
        queries = [name for name in weight_map if name.endswith(QUERY)] if isinstance(weight_map, dict) else []
        if len(queries) != 1 or not isinstance(weight_map[queries[0]], str):
            raise CardError(f"{directory / SAFE_WEIGHTS_INDEX_NAME} does not say where {QUERY!r} is.")
        shard = directory / Path(weight_map[queries[0]]).name
    try:
        with safe_open(shard, framework="pt") as file:
            queries = [name for name in file.keys() if name.endswith(QUERY)]  # noqa: SIM118
            if len(queries) != 1:
                raise CardError(f"{shard} holds no {QUERY!r}.")
            return int(file.get_tensor(queries[0]).ne(0).any(-1).sum())
    except (SafetensorError, OSError) as error:
        raise CardError(f"{shard} is not a whole safetensors file with {QUERY!r}: {error}") from error


def _training(path: Path) -> list[tuple[str, str]]:
    if not path.is_file():
        return []
    state = _read_json(path)
    rows = [(label, state.get(field)) for field, label in TRAINER_FIELDS.items()]
    logged = state.get("log_history")
    losses = [entry["loss"] for entry in logged if "loss" in entry] if isinstance(logged, list) else []
    rows += [("Last training loss", losses[-1])] if losses else []
    return [(label, f"{value:,.6g}") for label, value in rows if isinstance(value, NUMBER) and value]


def training_rows(directory: Path) -> list[tuple[str, str]]:
    """How `attnres finetune` or `attnres train` made a checkpoint, as rows of a table; none if it did not.

    Raises:
        CardError: its report is not what a training writes.
    """
    path = directory / TRAINING_REPORT
    if not path.is_file():
        return []
    report = _read_json(path)
    try:
        settings, data = report["settings"], report["data"]
        rates = f"{settings['learning_rate']:g}, and {settings['depth_learning_rate']:g} for depth parameters"
        names = [_public(name) for name in data["files"]]
        rows = [
            ("Trained from", _public(report["source"])),
            ("What", ", ".join(f"{_text(name)}: {_text(value)}" for name, value in report["method"].items())),
            ("Data", f"{_text(data['kind'])}: {', '.join(names[:8])}" + (" and others" if len(names) > 8 else "")),
            ("Steps", f"{report['steps']:,d}"),
            ("Tokens seen", f"{report['tokens']:,d}"),
            ("Learning rates", f"{rates}, {_text(settings['schedule'])}, {_text(settings['optimizer'])}"),
            (
                "Sequences per step",
                f"{report['processes'] * settings['batch_size'] * settings['accumulation']:,d} of "
                f"{settings['sequence_length']:,d} tokens",
            ),
        ]
        if report["train_loss"] is not None:
            rows.append(("Last training loss", f"{report['train_loss']:.4f}"))
        for when, metrics in (report["validation"] or {}).items():
            values = ", ".join(f"{_text(name)} {value:.4f}" for name, value in metrics.items())
            rows.append((f"Validation, {_text(when)}", values))
        rows.append(("Versions", ", ".join(f"{_text(n)} {_text(v)}" for n, v in report["versions"].items())))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CardError(f"{path} is not what a training writes: {type(error).__name__}: {error}") from error
    return rows


def _read_evaluation(path: Path) -> dict[str, Any]:
    path = path / EVALUATION_REPORT if path.is_dir() else path
    report = _read_json(path)
    rows = report.get("rows")
    if not isinstance(rows, list) or not rows:
        raise CardError(f"{path}: rows is missing or empty; give the directory that an evaluation wrote.")
    for number, row in enumerate(rows):
        for name, types in ROW.items():
            value = row.get(name) if isinstance(row, dict) else None
            is_bad = not isinstance(value, types) or (isinstance(value, bool) and bool not in types)
            if is_bad or (isinstance(value, float) and not math.isfinite(value)):
                allowed = " or ".join("null" if t is type(None) else t.__name__ for t in types)
                raise CardError(f"{path}: rows[{number}].{name} is {value!r}; {allowed} was expected.")
    for name in ("settings", "versions", "hardware"):
        if not isinstance(report.get(name), dict):
            raise CardError(f"{path}: {name} is {report.get(name)!r}; an object was expected.")
    return report


def _model_index(name: str, evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """The results that are of a whole benchmark; a part of one must not stand where readers expect all of it."""
    results = [
        EvalResult(
            task_type="text-generation",
            task_name="Text generation",
            dataset_type=row["dataset"] or row["task"],
            dataset_name=row["task"],
            metric_type=row["metric"],
            metric_name=f"{row['metric']}, {row['num_fewshot'] or 0}-shot{OURS}",
            metric_value=row["attnres"],
        )
        for row in evaluation["rows"]
        if not row["limited"] and row["attnres"] is not None
    ]
    return {"model_name": name, "eval_results": results} if results else {}


def _evaluation(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    rows = evaluation["rows"]
    has_paper = any(row["paper_attnres"] is not None for row in rows)
    header = ["Task", "Metric", "Shots", "n", "Baseline", "AttnRes", "Difference", "p"]
    header += ["Paper: baseline", "Paper: AttnRes"] if has_paper else []
    cells = []
    for row in rows:
        task = f"**⚠ LIMITED** {_text(row['task'])}" if row["limited"] else _text(row["task"])
        p_value = "–" if row["p_value"] is None else f"{row['p_value']:.2g}"
        cells.append(
            [task, _text(row["metric"]), _dash(row["num_fewshot"]), _dash(row["n"])]
            + [score_text(row["metric"], row[name], row[f"{name}_stderr"]) for name in ("baseline", "attnres")]
            + [score_text(row["metric"], row["difference"], row["difference_stderr"], sign="+"), p_value]
            + (
                [score_text(row["metric"], row[f"paper_{name}"]) for name in ("baseline", "attnres")]
                if has_paper
                else []
            )
        )
    settings = [(name, value) for part in ("settings", "hardware") for name, value in evaluation[part].items()]
    settings += [("versions", ", ".join(f"{name} {value}" for name, value in evaluation["versions"].items()))]
    settings += [("seconds", evaluation.get("seconds")), ("date", evaluation.get("date"))]
    return {
        "rows": cells,
        "header": header,
        "has_paper": has_paper,
        "num_limited": sum(row["limited"] for row in rows),
        "baseline": _public(evaluation["baseline"]) if evaluation.get("baseline") else None,
        "settings": [(_text(name), _public(value)) for name, value in settings if value is not None],
    }


def _dash(value: int | None) -> str:
    return "–" if value is None else f"{value:,d}"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CardError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(value, dict):
        raise CardError(f"{path} holds a JSON {type(value).__name__}; an object was expected.")
    return value
