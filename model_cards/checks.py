"""What is looked at before a checkpoint is shared: nothing is changed, nothing leaves the machine."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors import SafetensorError, safe_open

from .. import modeling_attnres
from ..configuration_attnres import AttnResConfig, AttnResError
from ..conversion.source import DEPTH_MODULE, read_headers, read_index, read_json
from ..eval.sandbox import Limits, SandboxUnavailableError, run_program
from .card import CARD, TO_FILL_IN, read_metadata
from .contents import PICKLE_NAMES, contents, is_pickle
from .private import find_private, own_places, own_token

IGNORED = [f"{prefix}{name}/*" for name in (".git", ".cache", "__pycache__", "runs") for prefix in ("", "*/")]

# Files of which a download or a copy has not come to its end, by their names; and how a file begins that git has put in
# the place of a large one.
UNFINISHED = (
    "*.incomplete *.part *.partial *.crdownload *.download *.aria2 *.opdownload *.!ut *.filepart *.tmp *.temp "
    "*.swp .~lock.* .nfs* .fuse_hidden*"
).split()
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
MAX_JSON_BYTES = 2**26
ELSEWHERE = "--"  # between a repository and a class, in `auto_map`

# The model and its tokenizer as anybody else will load them: from these files alone, without this package, the network
# or a token.
LOAD = """
import json, os, sys
os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"}
sys.modules["attnres"] = None
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
directory = sys.argv[1]
files = os.listdir(directory)
model, info = AutoModelForCausalLM.from_pretrained(
    directory, trust_remote_code=True, device_map="meta", output_loading_info=True
)
wrong = {kind: sorted(map(str, keys)) for kind, keys in info.items() if kind.endswith("_keys") and keys}
if "generation_config.json" in files:
    try:
        GenerationConfig.from_pretrained(directory).validate()
    except Exception as error:
        wrong["generation config"] = [f"generation_config.json: {error}"]
if any(name.startswith(("tokenizer", "vocab.")) or name in ("spiece.model", "tekken.json") for name in files):
    try:
        AutoTokenizer.from_pretrained(directory, trust_remote_code=True)("def f(x): return x")
    except ImportError:  # the tokenizer needs a package that is not installed here
        pass
    except Exception as error:
        wrong["tokenizer"] = [f"{type(error).__name__}: {error}"]
print(json.dumps({"name": type(model).__name__, "parameters": model.num_parameters(), "wrong": wrong}))
"""
SEEN_AS = "/checkpoint"
LOAD_SECONDS = 300.0
LOAD_BYTES = 2**34  # of memory; torch alone reserves several gigabytes of addresses
LOAD_OUTPUT_BYTES = 2**16
MAX_DETAIL = 2000


class PushError(AttnResError):
    """A checkpoint cannot be pushed as it is, or the Hub did not take it; the local files are as they were."""


@dataclass(frozen=True)
class Check:
    """One thing that was looked at before a push.

    Attributes:
        name: what was looked at.
        passed: whether it is as it should be.
        detail: what was found.
    """

    name: str
    passed: bool
    detail: str


def preflight(checkpoint: str | os.PathLike) -> list[Check]:
    """Looks at everything that a push would send, and loads the model as its users will; changes and sends nothing.

    The model is loaded without its weights, in a sandbox that sees the directory's files and nothing else of the
    machine. Where there is no sandbox it is loaded in a process of its own, if its code is this package's. That is left
    out if something else is wrong.

    Args:
        checkpoint (`str` or `PathLike`): directory of an AttnRes checkpoint.

    Returns:
        `list[Check]`: what was looked at, and what was found.

    Raises:
        PushError: there is no such directory.
    """
    directory = find_checkpoint(checkpoint)
    files = find_files(directory)
    checks: list[Check] = []
    for name, look in CHECKS.items():
        if look is _check_loading and not all(check.passed for check in checks):
            checks.append(Check(name, False, "not tried, because of the above."))
            continue
        try:
            checks.append(Check(name, True, look(directory, files)))
        except (AttnResError, OSError) as error:
            checks.append(Check(name, False, _shortened(str(error))))
    return checks


def find_checkpoint(checkpoint: str | os.PathLike) -> Path:
    directory = Path(checkpoint).resolve()
    if not directory.is_dir():
        raise PushError(
            f"checkpoint {str(checkpoint)!r} is no directory; give the directory of a converted checkpoint."
        )
    return directory


def find_files(directory: Path) -> list[str]:
    """What the client uploads, relative to the directory."""
    return [name for name in _names(directory) if (directory / name).is_file()]


def first(names: list[str]) -> str:
    return names[0] + (f" (and {len(names) - 1} more)" if len(names) > 1 else "")


def _names(directory: Path) -> list[str]:
    """What lies below the directory, without what is never uploaded."""
    return list(filter_repo_objects(_all_names(directory), ignore_patterns=IGNORED))


def _all_names(directory: Path) -> list[str]:
    def refuse(error: OSError) -> None:  # what cannot be listed would be left out in silence
        raise PushError(f"{error.filename} cannot be listed ({error.strerror}); mend its permissions or remove it.")

    names = []
    for parent, directories, files in os.walk(directory, onerror=refuse):
        names += [(Path(parent) / name).relative_to(directory).as_posix() for name in (*directories, *files)]
    return sorted(names)


def _shortened(text: str) -> str:
    return text if len(text) <= MAX_DETAIL else f"{text[: MAX_DETAIL // 2]} ... {text[-MAX_DETAIL // 2 :]}"


# -- the checks --------------------------------------------------------------------------------------------------------


def _check_files(directory: Path, files: list[str]) -> str:
    wrong = []
    for name in _names(directory):
        path = directory / name
        if path.is_symlink():
            target = Path(os.path.realpath(path))
            if not target.is_relative_to(directory):
                wrong.append(f"{name} is a link that leaves the directory")
            elif not target.is_file():
                wrong.append(f"{name} is a link to no file")
        elif not (path.is_file() or path.is_dir()):
            wrong.append(f"{name} is neither a file nor a directory")
    if wrong:
        raise PushError(f"{first(wrong)}; replace links by what they lead to (cp -rL), and remove the rest.")
    if unfinished := [name for name in _all_names(directory) if _is_unfinished(directory, name)]:
        raise PushError(f"{first(unfinished)} is of a download that did not end; fetch it again, or remove it.")
    return f"{len(files)} files, no links that leave the directory"


def _is_unfinished(directory: Path, name: str) -> bool:
    path = directory / name
    if ".git" in path.relative_to(directory).parts[:-1] or path.is_symlink() or not path.is_file():
        return False
    is_cache = ".cache" in path.relative_to(directory).parts[:-1]  # whose locks and metadata stay when all is done
    if any(fnmatch(path.name.lower(), pattern) for pattern in (UNFINISHED[:1] if is_cache else UNFINISHED)):
        return True
    with path.open("rb") as file:
        return file.read(len(LFS_POINTER)) == LFS_POINTER


def _check_pickles(directory: Path, files: list[str]) -> str:
    wrong = [
        label for name in files for label, content in contents(directory / name, name) if _is_pickle(label, content)
    ]
    if wrong:
        raise PushError(f"{first(wrong)}: a pickle can run code where it is loaded; move it elsewhere.")
    return "none"


def _is_pickle(label: str, content: Any) -> bool:
    if label.endswith(".safetensors"):  # of which this is the header, in JSON
        return False
    return PICKLE_NAMES.search(label.removesuffix(", unpacked")) is not None or is_pickle(content)


def _check_json(directory: Path, files: list[str]) -> str:
    names = [name for name in files if name.endswith(".json")]
    for name in names:
        if (size := (directory / name).stat().st_size) > MAX_JSON_BYTES:
            raise PushError(f"{name} has {size} bytes; more than {MAX_JSON_BYTES} are never read.")
        try:
            value = json.loads((directory / name).read_bytes().decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise PushError(f"{name} is not readable JSON ({error}); write it again.") from error
        code = value.get("auto_map") if isinstance(value, dict) else None
        if elsewhere := [text for text in _strings(code) if ELSEWHERE in text]:
            raise PushError(
                f"{name} loads code from another repository ({elsewhere[0]}), which may change at any time; put the "
                "code into this directory and remove the repository's name."
            )
    return f"{len(names)} files, all readable, no code from other repositories"


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _strings(inner)


def _check_weights(directory: Path, files: list[str]) -> str:
    config = read_json(directory / "config.json")
    if config.get("model_type") != AttnResConfig.model_type:
        raise PushError(f"config.json has model_type={config.get('model_type')!r}; an AttnRes checkpoint was expected.")
    code = config.get("auto_map")
    modules = [f"{name.split('.')[0]}.py" for name in _strings(code)]
    if missing := [name for name in modules or ["modeling_attnres.py"] if name not in files]:
        raise PushError(f"config.json loads its model from {missing[0]}, which is not there; convert or save it again.")
    shards, tensors = read_index(directory)
    read_headers(directory, shards, tensors)
    if unnamed := [name for name in files if name.endswith(".safetensors") and name not in shards]:
        raise PushError(f"{first(unnamed)} is not in the index, so nobody would load it; move it elsewhere.")
    for name, shard in tensors.items():
        if DEPTH_MODULE in name.split("."):
            _check_finite(directory / shard, name)
    return f"{len(tensors)} tensors in {len(shards)} shards, all there"


def _check_finite(shard: Path, name: str) -> None:
    try:
        with safe_open(shard, framework="pt") as file:
            tensor = file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise PushError(f"{shard.name} is not a whole safetensors file: {error}") from error
    if not torch.isfinite(tensor.float()).all():
        raise PushError(f"{shard.name}: {name} holds values that are not finite (NaN or infinity); train it again.")


def _check_card(directory: Path, files: list[str]) -> str:
    if CARD not in files:
        raise PushError(f"there is no {CARD}; write one with `attnres card {directory.name}`.")
    metadata = read_metadata(directory / CARD)
    licence = metadata.get("license")
    if not isinstance(licence, str) or not licence.strip():
        raise PushError(
            f"{CARD} names no licence; write one into the metadata at its top, such as `license: apache-2.0` (the "
            "original's terms bind this model too)."
        )
    if licence == "other" and not metadata.get("license_name"):
        raise PushError(f"{CARD} has `license: other`, which needs a `license_name` (and a `license_link`) beside it.")
    try:
        to_fill_in = len(TO_FILL_IN.findall((directory / CARD).read_text(encoding="utf-8")))
    except ValueError as error:
        raise PushError(f"{CARD} is no UTF-8 text: {error}") from error
    return f"licence {licence}" + (f"; still to be filled in: {to_fill_in}" if to_fill_in else "")


def _check_private(directory: Path, files: list[str]) -> str:
    token, places = own_token(), own_places(directory)
    wrong = []
    for name in files:
        wrong += [f"the name of {name}: {kind}" for _, kind in find_private(os.fsencode(name), token)]
        for label, content in contents(directory / name, name):
            wrong += [f"{label}, line {line}: {kind}" for line, kind in find_private(content, token, places)]
    if wrong:
        raise PushError(f"{first(wrong)}; remove it, and revoke a secret that was shared before.")
    return "no paths of this machine, no secrets"


def _check_loading(directory: Path, files: list[str]) -> str:
    with tempfile.TemporaryDirectory() as folder:
        view = Path(folder) / "checkpoint"
        _copy_without_weights(directory, files, view)
        limits = Limits(
            seconds=LOAD_SECONDS,
            memory_bytes=LOAD_BYTES + sum((directory / name).stat().st_size for name in files),
            processes=64,
            open_files=256 + len(files),
            output_bytes=LOAD_OUTPUT_BYTES,
        )
        load = partial(run_program, LOAD, [SEEN_AS], {SEEN_AS: str(view)}, limits)
        try:
            run = load()
        except SandboxUnavailableError as error:
            if foreign := _foreign_code(directory, files):
                raise PushError(f"{first(foreign)} is not this package's code, and would be run. {error}") from error
            run = load(unsafe=True)
    if run.status == "timeout":
        raise PushError(f"it is not loaded after {LOAD_SECONDS:g} s.")
    if run.status == "output":
        raise PushError(f"it prints more than {LOAD_OUTPUT_BYTES} bytes while it is loaded.")
    last = ([*run.printed.strip().splitlines()] or ["no message"])[-1]
    try:
        loaded: Any = json.loads(last) if run.code == 0 else None
        name, parameters, wrong = str(loaded["name"]), int(loaded["parameters"]), dict(loaded["wrong"])
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise PushError(f"it cannot be loaded: {last}") from error
    if wrong:
        kind, what = next(iter(wrong.items()))
        raise PushError(f"it loads with {kind.replace('_', ' ')}: {first([str(each) for each in what])}.")
    return f"{name} with {parameters:,} parameters, in a fresh process"


def _copy_without_weights(directory: Path, files: list[str], view: Path) -> None:
    """A copy that anybody may read, in which weights have their headers only, and holes behind them."""
    for name in files:
        source, target = directory / name, view / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".safetensors"):
            with source.open("rb") as reader, target.open("wb") as writer:
                length = reader.read(8)
                writer.write(length + reader.read(int.from_bytes(length, "little")))
                writer.truncate(source.stat().st_size)
        else:
            shutil.copyfile(source, target)
    for path in (view.parent, view, *view.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)


def _foreign_code(directory: Path, files: list[str]) -> list[str]:
    """Modules of a checkpoint that are not byte for byte those of this package."""
    package = Path(modeling_attnres.__file__).parent
    return [
        name
        for name in files
        if name.endswith(".py")
        and not ((package / name).is_file() and (package / name).read_bytes() == (directory / name).read_bytes())
    ]


CHECKS: Mapping[str, Callable[[Path, list[str]], str]] = {
    "Files": _check_files,
    "Pickles": _check_pickles,
    "JSON": _check_json,
    "Weights": _check_weights,
    "Card": _check_card,
    "Private data": _check_private,
    "Loading": _check_loading,
}
