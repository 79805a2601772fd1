"""What no file to be shared may hold: secrets, and paths of the machine it was made on."""

from __future__ import annotations

import json
import os
import re
from bisect import bisect_right
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

from huggingface_hub import get_token

from ..configuration_attnres import AttnResError

PATH, TOKEN = "a path of this machine", "your Hub token"

# Directories in the root under which people keep their own. Below those of the second group programs have directories
# too, so that one more part has to follow.
HOMES = "home Users users mnt media scratch workspace Volumes nfs lustre gpfs gscratch fsx efs cephfs beegfs dbfs data"
HOMES += " datasets models tmp kaggle admin/home run/media content/drive"
ROOTS = "opt srv work project projects storage ssd raid cluster export share shared hpc local private/var var/folders"
# A part of a path has no separator, quote or bracket, and no space at its ends. JSON writes ä as \u00e4.
_EDGE = r"(?:[^\s/\\\"'`<>|:*?,;()\[\]{}$\x00-\x1f]|\\u[0-9a-fA-F]{4})"
_PART = rf"{_EDGE}(?:(?:{_EDGE}| ){{0,80}}{_EDGE})?"
_LONG_PART = rf"{_EDGE}(?:{_EDGE}| ){{0,80}}{_EDGE}"
_SLASH = r"\\?/"  # JSON may write / as \/
PATHS = (
    rf"/(?<![\w.-]/)(?:{'|'.join(HOMES.split())}){_SLASH}{_PART}{_SLASH}{_EDGE}",
    rf"/(?<![\w.-]/)(?:{'|'.join(ROOTS.split())}){_SLASH}{_PART}{_SLASH}{_PART}{_SLASH}{_EDGE}",
    rf"/(?<![\w.-]/)root{_SLASH}{_EDGE}",
    # Windows: C:\Users\me, and C:\\Users\\me in JSON, but not Q:\nWhat; C:/Users/me; \\server\share\me.
    rf":(?<=\b[A-Za-z]:)\\{{1,2}}(?:[A-MO-TV-Z]{_PART}|[Uu]sers|home|data|models?|work|projects?)\\{{1,2}}{_EDGE}",
    rf":(?<=\b[A-Z]:)/(?!/){_LONG_PART}/{_EDGE}",
    rf"\\\\(?<![\\\w]\\\\)[A-Za-z][\w.$-]+\\(?!\\){_PART}\\(?!\\){_EDGE}",
    rf"\\\\\\\\[A-Za-z][\w.$-]+\\\\{_PART}\\\\{_EDGE}",
)

# Providers that detect-secrets has no patterns for, or older ones.
SECRETS = {
    "Hugging Face token": r"hf_[A-Za-z0-9]{30,}\b",
    "Hugging Face organisation token": r"api_org_[A-Za-z0-9]{30,}\b",
    "GitHub token": r"github_pat_\w{40,}\b",
    "OpenAI or Anthropic key": r"sk-(?<!\wsk-)(?:ant-|proj-|svcacct-|or-v1-)?[A-Za-z0-9_-]{32,}",
    "Google API key": r"AIza[\w-]{35}\b",
    "Google OAuth secret": r"GOCSPX-[\w-]{28}\b",
    "Slack token": r"xox[abeprs]-[\w-]{10,}",
    "Weights & Biases key": r"(?:WANDB_API_KEY|wandb_api_key|api\.wandb\.ai)\W.{0,80}\b[0-9a-f]{40}\b",
    "private key": r"BEGIN ENCRYPTED PRIVATE KEY",
    "Databricks token": r"\bdapi[0-9a-f]{32}\b",
    "DigitalOcean token": r"\bdo[opr]_v1_[0-9a-f]{64}\b",
    "Replicate token": r"\br8_[A-Za-z0-9]{37}\b",
    "Groq key": r"\bgsk_[A-Za-z0-9]{52}\b",
    "age key": r"AGE-SECRET-KEY-1[0-9A-Z]{58}",
}
# Detectors of detect-secrets that find words of a vocabulary, or what is no secret.
NOT_USED = ("Artifactory Credentials", "Public IP (ipv4)")

# Every secret has a long run of these characters, or one of these words, and ends not far from it. Only there the
# patterns are tried: some of them take long on a line of megabytes.
NEAR_SECRETS = re.compile(rb"[\w+/=.-]{20,}|PRIVATE KEY|PuTTY-User-Key|://[^\s/:@\"']+:[^\s/@\"']+@")
AROUND = 120
MAX_STRETCH = 2**12


def find_private(content: Any, token: str | None = None, places: tuple[Path, ...] = ()) -> Iterator[tuple[int, str]]:
    """Secrets and paths in the content of a file, also if it is in UTF-16 or UTF-32.

    Args:
        content (`bytes` or `mmap`): of a file.
        token (`str`, *optional*): the caller's own, which is looked for too.
        places (`tuple[Path]`, *optional*): directories that are looked for too.

    Returns:
        iterator of `(int, str)`: the line, from 1, and what is there; of a secret only the first characters.

    Raises:
        AttnResError: detect-secrets is not installed.
    """
    yield from _find(content, token, places)
    if b"\0" in content[:]:
        yield from _find(content[:].replace(b"\0", b""), token, places)


def _find(content: Any, token: str | None, places: tuple[Path, ...]) -> Iterator[tuple[int, str]]:
    for pattern in (*_path_patterns(), *(re.compile(re.escape(text)) for text in _forms(places))):
        if (match := pattern.search(content)) is not None:
            yield _line(content, match.start()), f"{PATH} ({match.group()[:200].decode('utf-8', 'replace')})"
    if token and (found := content.find(token.encode())) >= 0:
        yield _line(content, found), f"{TOKEN} ({token[:6]}...)"
    near, starts, origins = _near_secrets(content)
    for kind, secret_pattern, is_valid in _secret_patterns():
        for match in secret_pattern.finditer(near):
            text = match.group().decode("utf-8", "replace")
            if is_valid is None or is_valid(text):
                index = bisect_right(starts, match.start()) - 1
                yield _line(content, origins[index] + match.start() - starts[index]), f"{kind} ({text[:6]}...)"
                break


def _line(content: Any, position: int) -> int:
    return content[:position].count(b"\n") + 1


def _near_secrets(content: Any) -> tuple[bytes, list[int], list[int]]:
    """The stretches where secrets can be, one a line; where each starts, there and in the content."""
    stretches: list[list[int]] = []
    for match in NEAR_SECRETS.finditer(content):
        begin, end = max(0, match.start() - AROUND), match.end() + AROUND
        if stretches and begin <= stretches[-1][1]:
            stretches[-1][1] = end
        else:
            stretches.append([begin, end])
    parts, starts, origins, position = [], [], [], 0
    for begin, end in stretches:
        for start in range(begin, end, MAX_STRETCH):
            part = content[start : min(end, start + MAX_STRETCH + AROUND)]
            parts.append(part)
            starts.append(position)
            origins.append(start)
            position += len(part) + 1
    return b"\n".join(parts), starts, origins


def _forms(places: tuple[Path, ...]) -> set[bytes]:
    """How directories may be written in a file: as they are, in JSON, and in an address."""
    forms = set()
    for place in places:
        text = str(place) + os.sep
        forms |= {text, json.dumps(text)[1:-1], text.replace("/", "\\/"), quote(text)}
    return {form.encode("utf-8", "surrogateescape") for form in forms}


@cache
def _path_patterns() -> tuple[re.Pattern[bytes], ...]:
    return tuple(re.compile(pattern.encode()) for pattern in PATHS)


@cache
def _secret_patterns() -> tuple[tuple[str, re.Pattern[bytes], Any], ...]:
    """The kind, the pattern, and what else must hold of a match, if anything: detect-secrets' patterns, then ours."""
    try:
        from detect_secrets.core.plugins.util import get_mapping_from_secret_type_to_class
        from detect_secrets.plugins.base import RegexBasedDetector
    except ImportError as error:
        raise AttnResError('secrets cannot be looked for: install detect-secrets (pip install ".[push]").') from error
    found: list[tuple[str, re.Pattern[bytes], Any]] = []
    detectors: dict[str, Any] = get_mapping_from_secret_type_to_class()
    for kind, detector in sorted(detectors.items()):
        if issubclass(detector, RegexBasedDetector) and kind not in NOT_USED:
            is_valid = getattr(detector, "is_formally_valid", None)
            flags = re.IGNORECASE | re.VERBOSE | re.MULTILINE
            found += [
                (kind, re.compile(pattern.pattern.encode(), pattern.flags & flags), is_valid)
                for pattern in detector.denylist
            ]
    return (*found, *((kind, re.compile(pattern.encode()), None) for kind, pattern in SECRETS.items()))


def own_token() -> str | None:
    return get_token()


def own_places(directory: Path) -> tuple[Path, ...]:
    """The directory, the caller's home and where the caller is, unless they are directories of anybody."""
    return tuple(place for place in (directory, Path.home(), Path.cwd()) if len(place.parts) > 2)
