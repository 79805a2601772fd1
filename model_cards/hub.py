"""Sharing a checkpoint on the Hugging Face Hub: everything is looked at before anything leaves the machine."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import filter_repo_objects, validate_repo_id
from rich import filesize
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .. import __version__
from ..configuration_attnres import AttnResConfig
from ..conversion.source import read_json
from .card import CARD
from .checks import IGNORED, Check, PushError, find_checkpoint, find_files, first, preflight

WEIGHTS = ["*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.gguf"]

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
    directory = find_checkpoint(checkpoint)
    checks = preflight(directory)
    files = find_files(directory)
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
        raise PushError(f"{repo_id} ignores {first(missing)}, so what is there is incomplete; see its .gitignore.")
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
        raise PushError(f"{repo_id} holds {first(others)}, weights that this checkpoint has not, {advice}")
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
        return _cause(error, HTTPError) is not None  # an error of the connection
    return refused.response.status_code >= 500
