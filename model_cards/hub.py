"""Sharing a checkpoint on the Hugging Face Hub: everything is looked at before anything leaves the machine."""

from __future__ import annotations

import json
import mmap
import os
import re
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import CommitInfo, HfApi, get_token, metadata_load
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import filter_repo_objects, validate_repo_id
from rich import filesize
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .. import __version__
from ..configuration_attnres import AttnResConfig, AttnResError
from ..conversion.source import read_headers, read_index, read_json
from .card import CARD, TO_FILL_IN

IGNORED = [f"{prefix}{name}/*" for name in (".git", ".cache", "__pycache__", "runs") for prefix in ("", "*/")]
WEIGHTS = ["*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.gguf"]

PICKLE_NAMES = re.compile(r"\.(bin|ckpt|dill|joblib|pickle|pkl|pt|pth)$", re.IGNORECASE)
PICKLE_START = re.compile(rb"\x80[\x02-\x05]")

# What no file to be shared may hold. Of a secret only the first characters are ever shown. Each pattern starts with a
# letter or two of its own where it can: that is what makes searching fast.
PATH, TOKEN = "a path of this machine", "your Hub token"
PRIVATE = {
    PATH: rb"/(?<![\w.-]/)(?:home|Users|mnt|media|scratch|workspace)\\?/[\w.-]+\\?/[\w.-]|/(?<![\w.-]/)root\\?/[\w.-]"
    rb"|:(?<=\b[A-Za-z]:)(?:\\{1,2}|/)Users(?:\\{1,2}|/)\w",
    "a Hugging Face token": rb"hf_[A-Za-z0-9]{30,}\b",
    "an AWS access key": rb"A(?:KIA|SIA)[0-9A-Z]{16}\b",
    "a GitHub token": rb"g(?:h[pousr]_[A-Za-z0-9]{36,}|ithub_pat_\w{40,})\b",
    "a GitLab token": rb"glpat-[\w-]{20,}",
    "an OpenAI or Anthropic key": rb"sk-(?<!\wsk-)(?:ant-|proj-)?[A-Za-z0-9_-]{32,}",
    "a Google API key": rb"AIza[\w-]{35}\b",
    "a Slack token": rb"xox[abprs]-[\w-]{10,}",
    "a Weights & Biases key": rb"(?:WANDB_API_KEY|wandb_api_key|api\.wandb\.ai)\W.{0,80}\b[0-9a-f]{40}\b",
    "a private key": rb"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY-----",
    "a password in an address": rb"://[^\s/:@\"']+:[^\s/:@\"']+@",
}

# The model as anybody else will load it: from these files alone, without this package, the network or a token.
LOAD = """
import json, sys
sys.modules["attnres"] = None
from transformers import AutoModelForCausalLM
from transformers.utils import logging
logging.set_verbosity_error()
model, info = AutoModelForCausalLM.from_pretrained(
    sys.argv[1], trust_remote_code=True, device_map="meta", output_loading_info=True
)
wrong = {kind: sorted(map(str, keys)) for kind, keys in info.items() if kind.endswith("_keys") and keys}
print(json.dumps({"name": type(model).__name__, "parameters": model.num_parameters(), "wrong": wrong}))
"""

RETRY_AFTER = (2, 8)  # seconds; the client itself has retried most requests for half a minute before
ADVICE = {
    400: "The Hub does not accept what it was sent; see its message.",
    401: "The token was refused: log in again with `hf auth login`, or set HF_TOKEN to a token that may write.",
    402: "The account has to pay for that; see the Hub's message.",
    403: "The token may not write there: use one with write permission for that user or organisation, or another name.",
    404: "There is no such repository or revision, or the token may not see it.",
    409: "Something else is at that name, or wrote to it at the same time; choose another, or try again.",
    413: "The Hub finds it too large.",
    429: "The Hub asks to slow down; try again later.",
}


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


def push(
    checkpoint: str | os.PathLike,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    dry_run: bool = False,
    token: str | None = None,
    console: Console | None = None,
) -> CommitInfo | None:
    """Checks a checkpoint, and uploads it to the Hub if nothing speaks against it.

    What is uploaded is left as it is. A push that was interrupted is resumed by the same call: what has arrived is not
    sent again, and a repository shows the new version only once all of it has arrived (a very large one, batch after
    batch).

    Args:
        checkpoint (`str` or `PathLike`): directory of an AttnRes checkpoint, with a card.
        repo_id (`str`): the repository, `user/name` or `organisation/name`; made if there is none.
        private (`bool`, *optional*, defaults to `False`): make the repository private. One that is there and public is
            refused.
        revision (`str`, *optional*, defaults to `"main"`): branch to push to, made if there is none, or `refs/pr/N`.
        create_pr (`bool`, *optional*, defaults to `False`): open a pull request instead of writing to the main branch.
        dry_run (`bool`, *optional*, defaults to `False`): only check; nothing is sent, nobody is asked.
        token (`str`, *optional*): a Hub token; by default the one of `hf auth login` or HF_TOKEN.
        console (`Console`, *optional*): where to print what was checked and what is uploaded.

    Returns:
        `CommitInfo`, *optional*: the last commit on the Hub (`commit_url`, `oid`, `pr_url`), `None` for a dry run.

    Raises:
        PushError: a check failed and nothing was sent, or the Hub refused or could not be reached.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise PushError(f"repository {repo_id!r} is no Hub id: {error}") from error
    if repo_id.count("/") != 1:
        raise PushError(f"repository {repo_id!r} lacks its owner; give user/name or organisation/name.")
    if create_pr and revision is not None:
        raise PushError(f"create_pr opens a pull request against main; give it or revision={revision!r}, not both.")
    directory = _find(checkpoint)
    checks = preflight(directory)
    files = _files(directory)
    if console is not None:
        console.print(_checks_table(checks, directory.name))
        console.print(_files_table(directory, files, repo_id))
        card = (directory / CARD).read_text(encoding="utf-8", errors="replace") if CARD in files else ""
        if CARD in files and repo_id not in card:
            console.print(
                f"The card does not name {escape(repo_id)}; `attnres card {escape(directory.name)} --repo-id "
                f"{escape(repo_id)}` writes it into the example.",
                style="yellow",
                soft_wrap=True,
            )
    if failed := [check for check in checks if not check.passed]:
        raise PushError(
            f"{directory} is not fit to be shared, and nothing was sent. "
            + " ".join(f"{check.name}: {check.detail}" for check in failed)
        )
    if dry_run:
        return None
    return _upload(directory, files, repo_id, private, revision, create_pr, token)


def preflight(checkpoint: str | os.PathLike) -> list[Check]:
    """Looks at everything that a push would send, and loads the model as its users will; changes and sends nothing.

    The model is loaded without its weights, in a fresh process that runs the directory's own code. That is left out if
    something else is wrong.

    Args:
        checkpoint (`str` or `PathLike`): directory of an AttnRes checkpoint.

    Returns:
        `list[Check]`: what was looked at, and what was found.

    Raises:
        PushError: there is no such directory.
    """
    directory = _find(checkpoint)
    files = _files(directory)
    checks: list[Check] = []
    for name, look in CHECKS.items():
        if look is _check_loading and not all(check.passed for check in checks):
            checks.append(Check(name, False, "not tried, because of the above."))
            continue
        try:
            checks.append(Check(name, True, look(directory, files)))
        except (AttnResError, OSError) as error:
            checks.append(Check(name, False, str(error)))
    return checks


# -- what is looked at -------------------------------------------------------------------------------------------------


def _find(checkpoint: str | os.PathLike) -> Path:
    directory = Path(checkpoint).resolve()
    if not directory.is_dir():
        raise PushError(
            f"checkpoint {str(checkpoint)!r} is no directory; give the directory of a converted checkpoint."
        )
    return directory


def _names(directory: Path) -> list[str]:
    """What lies below the directory, without what is never uploaded."""
    names = (path.relative_to(directory).as_posix() for path in sorted(directory.rglob("*")))
    return list(filter_repo_objects(names, ignore_patterns=IGNORED))


def _files(directory: Path) -> list[str]:
    """What the client uploads, relative to the directory."""
    return [name for name in _names(directory) if (directory / name).is_file()]


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
        raise PushError(f"{_first(wrong)}; replace links by what they lead to (cp -rL), and remove the rest.")
    return f"{len(files)} files, no links that leave the directory"


def _check_pickles(directory: Path, files: list[str]) -> str:
    wrong = [name for name in files if PICKLE_NAMES.search(name) or _is_pickle(directory / name)]
    if wrong:
        raise PushError(f"{_first(wrong)}: a pickle can run code where it is loaded; move it elsewhere.")
    return "none"


def _is_pickle(path: Path) -> bool:
    if path.suffix == ".safetensors":  # its first bytes are a length, and any length is allowed
        return False
    with path.open("rb") as file:
        start = file.read(2)
    if start == b"PK" and zipfile.is_zipfile(path):
        try:
            with zipfile.ZipFile(path) as archive:
                return any(name.endswith(".pkl") for name in archive.namelist())
        except zipfile.BadZipFile as error:
            raise PushError(f"{path.name} is an archive that cannot be read ({error}); mend or remove it.") from error
    return PICKLE_START.match(start) is not None


def _check_weights(directory: Path, files: list[str]) -> str:
    config = read_json(directory / "config.json")
    if config.get("model_type") != AttnResConfig.model_type:
        raise PushError(f"config.json has model_type={config.get('model_type')!r}; an AttnRes checkpoint was expected.")
    code = config.get("auto_map")
    classes = [name for name in code.values() if isinstance(name, str)] if isinstance(code, dict) else []
    modules = [f"{name.split('.')[0]}.py" for name in classes]
    if missing := [name for name in modules or ["modeling_attnres.py"] if name not in files]:
        raise PushError(f"config.json loads its model from {missing[0]}, which is not there; convert or save it again.")
    shards, tensors = read_index(directory)
    read_headers(directory, shards, tensors)
    if unnamed := [name for name in files if name.endswith(".safetensors") and name not in shards]:
        raise PushError(f"{_first(unnamed)} is not in the index, so nobody would load it; move it elsewhere.")
    return f"{len(tensors)} tensors in {len(shards)} shards, all there"


def _check_card(directory: Path, files: list[str]) -> str:
    if CARD not in files:
        raise PushError(f"there is no {CARD}; write one with `attnres card {directory.name}`.")
    try:
        metadata = metadata_load(directory / CARD) or {}
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise PushError(f"the metadata at the top of {CARD} cannot be read: {error}") from error
    licence = metadata.get("license")
    if not licence:
        raise PushError(
            f"{CARD} names no licence; write one into the metadata at its top, such as `license: apache-2.0` (the "
            "original's terms bind this model too)."
        )
    if licence == "other" and not metadata.get("license_name"):
        raise PushError(f"{CARD} has `license: other`, which needs a `license_name` (and a `license_link`) beside it.")
    to_fill_in = len(TO_FILL_IN.findall((directory / CARD).read_text(encoding="utf-8")))
    return f"licence {licence}" + (f"; still to be filled in: {to_fill_in}" if to_fill_in else "")


def _check_private(directory: Path, files: list[str]) -> str:
    places = [place for place in (directory, Path.home(), Path.cwd()) if len(place.parts) > 2]
    own = {PATH: [str(place) + os.sep for place in places], TOKEN: [token] if (token := get_token()) else []}
    searches = [(kind, re.compile(pattern)) for kind, pattern in PRIVATE.items()]
    searches += [(kind, re.compile(re.escape(value.encode()))) for kind, values in own.items() for value in values]
    wrong = []
    for name in files:
        with _searchable(directory / name) as content:
            for kind, pattern in searches:
                if (match := pattern.search(content)) is not None:
                    found = match.group().decode("utf-8", "replace")
                    line = content[: match.start()].count(b"\n") + 1
                    wrong.append(f"{name}, line {line}: {kind} ({found if kind == PATH else found[:6] + '...'})")
    if wrong:
        raise PushError(f"{_first(wrong)}; remove it, and revoke a secret that was shared before.")
    return "no paths of this machine, no secrets"


@contextmanager
def _searchable(path: Path) -> Iterator[Any]:
    """The bytes of a file, of weights only the header."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if path.suffix == ".safetensors":
            yield file.read(min(int.from_bytes(file.read(8), "little"), size))
        elif size == 0:
            yield b""
        else:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                yield content


def _check_loading(directory: Path, files: list[str]) -> str:
    hidden = ("HF_TOKEN", "HF_TOKEN_PATH", "HUGGING_FACE_HUB_TOKEN")  # the checkpoint's code runs there
    with tempfile.TemporaryDirectory() as home:
        environment = {name: value for name, value in os.environ.items() if name not in hidden}
        environment |= {"HF_HOME": home, "HF_MODULES_CACHE": f"{home}/modules", "HF_HUB_OFFLINE": "1"}
        result = subprocess.run(
            [sys.executable, "-P", "-c", LOAD, str(directory)],
            env=environment,
            cwd=home,
            capture_output=True,
            text=True,
        )
    if result.returncode != 0:
        raise PushError(f"it cannot be loaded: {([*result.stderr.strip().splitlines()] or ['no message'])[-1]}")
    loaded = json.loads(result.stdout.strip().splitlines()[-1])
    if loaded["wrong"]:
        kind, keys = next(iter(loaded["wrong"].items()))
        raise PushError(f"it loads with {kind.replace('_', ' ')}: {_first(keys)}.")
    return f"{loaded['name']} with {loaded['parameters']:,} parameters, in a fresh process"


CHECKS: Mapping[str, Callable[[Path, list[str]], str]] = {
    "Files": _check_files,
    "Pickles": _check_pickles,
    "Weights": _check_weights,
    "Card": _check_card,
    "Private data": _check_private,
    "Loading": _check_loading,
}


def _first(names: list[str]) -> str:
    return names[0] + (f" (and {len(names) - 1} more)" if len(names) > 1 else "")


def _checks_table(checks: list[Check], name: str) -> Table:
    table = Table("Checked", "", "Found", title=escape(name))
    for check in checks:
        table.add_row(check.name, "[green]ok[/]" if check.passed else "[red]no[/]", escape(check.detail))
    return table


def _files_table(directory: Path, files: list[str], repo_id: str) -> Table:
    sizes = {name: (directory / name).stat().st_size for name in files}
    table = Table("File", "Size", title=f"To be uploaded to {escape(repo_id)}", show_footer=True)
    table.columns[1].justify = "right"
    for name, size in sizes.items():
        table.add_row(escape(name), filesize.decimal(size))
    table.columns[0].footer = f"{len(files)} files"
    table.columns[1].footer = filesize.decimal(sum(sizes.values()))
    return table


# -- the Hub -----------------------------------------------------------------------------------------------------------


def _upload(
    directory: Path,
    files: list[str],
    repo_id: str,
    private: bool,
    revision: str | None,
    create_pr: bool,
    token: str | None,
) -> CommitInfo:
    api = HfApi(token=token, library_name="attnres", library_version=__version__)
    ask = _Patient(repo_id)
    ask(api.create_repo, repo_id, private=private or None, exist_ok=True)
    if private and not ask(api.model_info, repo_id).private:
        raise PushError(
            f"{repo_id} is there already and public, so nothing was sent; make it private first (`hf repos settings "
            f"{repo_id} --private`), or choose another name."
        )
    if revision is not None and not revision.startswith("refs/pr/"):
        ask(api.create_branch, repo_id, branch=revision, exist_ok=True)
    _check_conflict(ask, api, repo_id, revision, files)
    message = "Upload AttnRes checkpoint"
    pull_request = None
    if create_pr:
        # Made before the upload, so that an interrupted one is resumed in the same pull request.
        pull_request = ask.once(
            api.create_pull_request, repo_id, title=message, description="Made with `attnres push`."
        )
        revision = pull_request.git_reference
        ask.resume = f"What has arrived is kept; go on with --revision {revision} instead of --create-pr."
    # Of any size: the client sends large folders in batches, and skips what the Hub has.
    commit = ask(
        api.upload_folder,
        repo_id=repo_id,
        folder_path=directory,
        revision=revision,
        ignore_patterns=list(IGNORED),
        commit_message=message,
    )
    arrived = ask(api.list_repo_files, repo_id, revision=revision)
    if missing := [name for name in files if name not in arrived]:
        raise PushError(f"{repo_id} ignores {_first(missing)}, so what is there is incomplete; see its .gitignore.")
    if pull_request is not None:
        commit.pr_url = pull_request.url
    return commit


def _check_conflict(ask: _Patient, api: HfApi, repo_id: str, revision: str | None, files: list[str]) -> None:
    """Refuses a repository that holds another model: loaders would mix the two, and people would lose theirs."""
    there = ask(api.list_repo_files, repo_id, revision=revision)
    advice = (
        "so nothing was sent; choose another name or --revision, or `hf repos delete-files` what is no longer wanted."
    )
    if others := [name for name in filter_repo_objects(there, allow_patterns=WEIGHTS) if name not in files]:
        raise PushError(f"{repo_id} holds {_first(others)}, weights that this checkpoint has not, {advice}")
    if "config.json" in there:
        with tempfile.TemporaryDirectory() as folder:
            path = ask(api.hf_hub_download, repo_id, "config.json", revision=revision, local_dir=folder)
            model_type = read_json(Path(path)).get("model_type")
        if model_type != AttnResConfig.model_type:
            raise PushError(f"{repo_id} holds a model of type {model_type!r}, {advice}")


class _Patient:
    """Calls the Hub's client, again if the Hub or the network is in trouble, and says what went wrong in the end."""

    def __init__(self, repo_id: str) -> None:
        self.repo_id = repo_id
        self.resume = "What has arrived is kept; the same command goes on from there."

    def __call__(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        for seconds in RETRY_AFTER:
            try:
                return call(*args, **kwargs)
            except Exception as error:
                if not _is_passing(error):
                    raise PushError(self.explain(error)) from error
            time.sleep(seconds)
        return self.once(call, *args, **kwargs)

    def once(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        try:
            return call(*args, **kwargs)
        except Exception as error:  # the client raises its own, its HTTP library's and the storage's errors
            raise PushError(self.explain(error)) from error

    def explain(self, error: Exception) -> str:
        if isinstance(error, OfflineModeIsEnabled):
            return f"pushing to {self.repo_id} needs the network; unset HF_HUB_OFFLINE (and TRANSFORMERS_OFFLINE)."
        refused = _cause(error, HfHubHTTPError)
        if refused is None:
            reason, advice = f"{type(error).__name__}: {error}", f"Check the network. {self.resume}"
        else:
            status = refused.response.status_code
            reason = f"status {status}, {refused.server_message or refused.response.reason_phrase}"
            advice = f"The Hub is in trouble. {self.resume}" if status >= 500 else ADVICE.get(status, "")
        reason = reason.splitlines()[0].rstrip(".")
        return f"pushing to {self.repo_id} failed ({reason}). {advice} Nothing here was changed."


def _cause(error: BaseException | None, kind: type[Any]) -> Any:
    """The first of a kind in what led to an error."""
    while error is not None and not isinstance(error, kind):
        error = error.__cause__
    return error


def _is_passing(error: Exception) -> bool:
    refused = _cause(error, HfHubHTTPError)
    if refused is None:
        return _cause(error, HTTPError) is not None  # of the connection
    return refused.response.status_code >= 500
