"""What no push lets through, by kinds: pickles, secrets, paths, files that nobody could load, and code that misbehaves
when the model is loaded. `test_push.py` has one of each of the rest."""

from __future__ import annotations

import base64
import bz2
import gzip
import io
import json
import lzma
import os
import pickle
import shutil
import tarfile
import time
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import make_source
from safetensors.torch import load_file, save_file

from attnres import convert
from attnres.eval import sandbox
from attnres.eval.sandbox import SandboxUnavailableError
from attnres.examples.demo import CHECKPOINT
from attnres.model_cards import checks, preflight
from attnres.model_cards.checks import CHECKS

Damage = Callable[[Path], Any]
DEPTH = "model-attnres.safetensors"
SECRET = "hf_" + "Ab1" * 11 + "x"


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("converted")
    make_source(directory / "source", num_hidden_layers=1)
    (directory / "source" / "README.md").write_text("---\nlicense: mit\n---\n# A card of another model\n")
    convert(directory / "source", directory / "Tiny-AttnRes", verify="none")
    return directory / "Tiny-AttnRes"


@pytest.fixture
def checkpoint(converted: Path, tmp_path: Path) -> Path:
    return shutil.copytree(converted, tmp_path / "Tiny-AttnRes")


def write(name: str, content: str | bytes) -> Damage:
    def edit(checkpoint: Path) -> None:
        (checkpoint / name).parent.mkdir(parents=True, exist_ok=True)
        (checkpoint / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return edit


def edit_json(name: str, change: Callable[[dict[str, Any]], Any]) -> Damage:
    def edit(checkpoint: Path) -> None:
        path = checkpoint / name
        value = json.loads(path.read_text()) if path.exists() else {}
        change(value)
        path.write_text(json.dumps(value))

    return edit


def zipped(*members: tuple[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return file.getvalue()


def tarred(name: str, content: bytes, mode: str = "w") -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode) as archive:  # type: ignore[call-overload]
        entry = tarfile.TarInfo(name)
        entry.size = len(content)
        archive.addfile(entry, io.BytesIO(content))
    return file.getvalue()


class Call:
    """Pickled, it is a call."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.getcwd, ()


def pickled(protocol: int) -> bytes:
    return pickle.dumps(Call(), protocol)


def saved(array: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


def saved_together(**arrays: Any) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def torch_saved(**kwargs: Any) -> bytes:
    file = io.BytesIO()
    torch.save({"step": 1}, file, **kwargs)
    return file.getvalue()


OBJECTS = np.array([Call(), None], dtype=object)
RECORDS = np.array([(1, Call())], dtype=[("n", "i4"), ("o", "O")])
PICKLES: dict[str, tuple[str, bytes]] = {
    "protocol 0": ("state.dat", pickled(0)),
    "protocol 1": ("state.dat", pickled(1)),
    "protocol 2": ("state.dat", pickled(2)),
    "protocol 4": ("state", pickled(4)),
    "protocol 5": ("state.json5", pickled(5)),
    "protocol 0, written by hand": ("notes.txt", b"cos\ngetcwd\n(tR."),
    "protocol 0 without its end": ("notes.txt", b"cos\ngetcwd\n(tRand more"),
    "an instance of protocol 0": ("x", b"(ios\ngetcwd\n."),
    "a call of data": ("x", b"(lp0\ncbuiltins\nlen\n(S'abc'\ntRa."),
    "behind other data": ("x", b"I1\n0" + pickled(0)),
    "a declared protocol 0": ("x", b"\x80\x00" + pickled(0)),
    "torch, of today": ("rng_state", torch_saved()),
    "torch, of old": ("rng_state", torch_saved(_use_new_zipfile_serialization=False)),
    "an array of objects": ("ids.npy", saved(OBJECTS)),
    "records with objects": ("ids.npy", saved(RECORDS)),
    "an array of objects by another name": ("ids.dat", saved(OBJECTS)),
    "a broken array": ("ids.npy", b"\x93NUMPY\x01\x00\x10\x00{'descr': oops}  "),
    "an array with a vast header": ("ids.npy", b"\x93NUMPY\x02\x00\xff\xff\xff\x7f{"),
    "arrays, one of objects": ("all.npz", saved_together(a=np.ones(2), b=OBJECTS)),
    "gzip": ("state.gz", gzip.compress(pickled(4))),
    "gzip, protocol 0": ("state.gz", gzip.compress(pickled(0))),
    "bzip2": ("state.dat", bz2.compress(pickled(2))),
    "xz": ("state.dat", lzma.compress(pickled(4))),
    "lzma": ("state.dat", lzma.compress(pickled(4), format=lzma.FORMAT_ALONE)),
    "zlib": ("state.dat", zlib.compress(pickled(4))),
    "in a zip": ("all.zip", zipped(("a/state", pickled(3)))),
    "in a zip, by name": ("all.zip", zipped(("a/state.pkl", b"x"))),
    "in a tar": ("all.tar", tarred("state", pickled(4))),
    "in a compressed tar": ("all.tgz", tarred("state", pickled(4), "w:gz")),
    "in a zip in a zip": ("all.zip", zipped(("b.zip", zipped(("c", pickled(0)))))),
    "joblib's name": ("model.joblib", b"x"),
    "joblib's compressed name": ("model.pkl.z", zlib.compress(b"x")),
    "a checkpoint's name": ("epoch=1.ckpt", b"x"),
    "a name in capitals": ("MODEL.PKL", b"x"),
}
NOT_LOOKED_INTO: dict[str, tuple[str, bytes]] = {
    "zstd": ("a.zst", b"\x28\xb5\x2f\xfd\x04\x00"),
    "lz4": ("a.lz4", b"\x04\x22\x4d\x18\x64\x40"),
    "7-zip": ("a.7z", b"7z\xbc\xaf\x27\x1c\x00\x04"),
    "rar": ("a.rar", b"Rar!\x1a\x07\x01\x00"),
    "compress": ("a.Z", b"\x1f\x9d\x90abc"),
    "broken gzip": ("a.gz", gzip.compress(b"abc" * 99)[:-9]),
    "broken xz": ("a.xz", lzma.compress(b"abc" * 99)[:-9]),
    "broken zip": ("a.zip", zipped(("a", b"abc"))[:-3] + b"\xff\xff\xff"),
    "a zip bomb": ("a.zip", zipped(("a", bytes(2**28 + 1)))),
    "a gzip bomb": ("a.gz", gzip.compress(bytes(2**28 + 1), 1)),
    "many members": ("a.zip", zipped(*((f"{i}", b"") for i in range(10_001)), method=zipfile.ZIP_STORED)),
    "zips all the way down": (
        "a.zip",
        zipped(("b", zipped(("c", zipped(("d", zipped(("e", b"x")))))))),
    ),
}
SECRETS = {
    "Hugging Face": SECRET,
    "AWS": "AKIA" + "ABCDEFGHIJKLMNOP",
    "AWS, temporary": "ASIA" + "ABCDEFGHIJKLMNOP",
    "GitHub": "ghp_" + "a1B2" * 9,
    "GitHub, fine-grained": "github_pat_" + "a1B2" * 12,
    "GitLab": "glpat-" + "a1B2c" * 4,
    "OpenAI": "sk-" + "a1B2c" * 4 + "T3BlbkFJ" + "a1B2c" * 4,
    "OpenAI, of a project": "sk-proj-" + "a1B2" * 10,
    "Anthropic": "sk-ant-api03-" + "a1B2" * 20,
    "Google": "AIza" + "a1B2c" * 7,
    "Slack": "xoxb-" + "1234567890-abcdef",
    "Slack, web hook": "https://hooks.slack.com/services/" + "T0A1B2C3D/B0A1B2C3D/abcdefghijkl",
    "Stripe": "sk_live_" + "a1B2c3D4" * 3,
    "SendGrid": "SG." + "a1B2c3D4e5F" * 2 + "." + "a1B2c" * 8 + "abc",
    "PyPI": "pypi-AgEIcHlwaS5vcmc" + "a1B2c" * 15,
    "npm": "//registry.npmjs.org/:_authToken=" + "npm_" + "a1B2" * 9,
    "Azure": "AccountKey=" + "a1B2" * 22,
    "Twilio": "SK" + "0123456789abcdef" * 2,
    "Square": "sq0csp-" + "a1B2c" * 8 + "abc",
    "Mailchimp": "0123456789abcdef" * 2 + "-us12",
    "Telegram": "123456789:" + "a1B2c" * 7,
    "Weights & Biases": "WANDB_API_KEY=" + "0123456789" * 4,
    "Databricks": "dapi" + "0123456789abcdef" * 2,
    "a JSON web token": ".".join(
        base64.urlsafe_b64encode(part).decode().rstrip("=") for part in (b'{"alg":"HS256"}', b'{"sub":"me"}', b"0" * 32)
    ),
    "a private key": "-----BEGIN RSA " + "PRIVATE KEY-----",
    "a key of SSH": "-----BEGIN OPENSSH " + "PRIVATE KEY-----",
    "an encrypted key": "-----BEGIN ENCRYPTED " + "PRIVATE KEY-----",
    "a password in an address": "https://me:secret" + "@example.org/x",
}
PLACES: dict[str, Callable[[str], Damage]] = {
    "JSON of one line": lambda text: write("x.json", json.dumps({"a": list(range(2000)), "b": f"x {text} y"})),
    "the end of megabytes": lambda text: write("x.txt", "lorem ipsum " * 200_000 + text),
    "UTF-16": lambda text: write("x.txt", f"key: {text}".encode("utf-16")),
    "UTF-16, big-endian": lambda text: write("x.txt", f"key: {text}".encode("utf-16-be")),
    "UTF-32": lambda text: write("x.txt", f"key: {text}".encode("utf-32")),
    "a name": lambda text: write(f"notes {text}.txt", "nothing"),
    "a directory's name": lambda text: write(f"run-{text}/a.txt", "nothing"),
    "a zip": lambda text: write("x.zip", zipped(("a.txt", text.encode()))),
    "a compressed tar": lambda text: write("x.tgz", tarred("a.txt", text.encode(), "w:gz")),
    "gzip": lambda text: write("events.gz", gzip.compress(text.encode())),
    "a zip in a tar": lambda text: write("x.tar", tarred("x.zip", zipped(("a", text.encode())))),
    "UTF-16 in a zip": lambda text: write("x.zip", zipped(("a.txt", text.encode("utf-16")))),
    "a hidden file": lambda text: write(".env", f"export TOKEN={text}"),
    "a notebook": lambda text: write("x.ipynb", json.dumps({"cells": [{"source": [f'login("{text}")']}]})),
    "a header of weights": lambda text: (
        lambda checkpoint: save_file(
            load_file(checkpoint / DEPTH), checkpoint / DEPTH, metadata={"format": "pt", "by": text}
        )
    ),
}
PATHS = {
    "a home": "/home/somebody/data",
    "a home with spaces": "/home/some body/my data/x",
    "a home with umlauts": "/home/jürgen/Übung",
    "umlauts in JSON": json.dumps("/home/jürgen/Übung"),
    "a Mac's home": "/Users/some.body/Documents",
    "a Mac's volume": "/Volumes/My Disk/models",
    "a Mac's temporary directory": "/private/var/folders/ab/cd/T",
    "of root": "/root/x",
    "of Colab": "/content/drive/MyDrive/x",
    "of Kaggle": "/kaggle/working/x",
    "of a cluster": "/lustre/group/x",
    "of another cluster": "/gpfs/scratch/user",
    "of AWS": "/fsx/user/x",
    "data": "/data/somebody/runs",
    "temporary": "/tmp/tmpab12/model",
    "of a service": "/srv/models/team/x",
    "of a program": "/opt/conda/lib/python3.11",
    "slashes of JSON": "\\/home\\/somebody\\/data",
    "an address": "file:///home/somebody/data",
    "with blanks in an address": "file:///home/some%20body/data",
    "Windows": "C:\\Users\\somebody\\x",
    "Windows in JSON": json.dumps("D:\\Models\\somebody"),
    "Windows with slashes": "C:/Users/somebody",
    "Windows with spaces": "C:\\Documents and Settings\\Some Body",
    "Windows, another drive": "E:\\Training runs\\7",
    "a share": "\\\\server\\share\\x",
    "a share in JSON": json.dumps("\\\\server\\share\\x"),
    "Windows from Linux": "/mnt/c/Users/somebody",
}
HARMLESS = {
    "addresses.txt": "https://example.org:80/home and http://x.org/data/a/b/c, see /home/ or /root/ or /tmp for more",
    "words.json": json.dumps({"/home": 1, "/Users/": 2, "C:\\Users": 3, "hf_": 4, "sk-": 5, "AKIA": 6, "://": 7}),
    "template.json": json.dumps({"chat_template": "{{ 'Q:\\nWhat\\nA:\\n' }} A:\n\nB:\n\nBoth\\n/data/{x}/{y}"}),
    "latex.md": "$\\begin{aligned} a \\\\ b \\end{aligned}$ \\\\ \\hline and $x:\\alpha$; sum \\\\\\mathbf{x}",
    "placeholders.md": "/home/<you>/models, /home/$USER/models, /home/{user}/models, C:\\Users\\<you>",
    "code.py": "class C:\n    c = 1\n\ncalls = [c]\nimport os\n",
    "c.txt": "cat\ndog\ntRee\n(tR\nR\n",
    "import.txt": "import os\nimport sys\n",
    "numbers.txt": "I1\nI2\n.",
    "x.txt": "x\x9cnot zlib",
    "ids.npy": saved(np.arange(4)),
    "all.npz": saved_together(a=np.arange(4), b=np.ones(3)),
    "notes.zip": zipped(("a.txt", b"nothing of interest")),
    "notes.tgz": tarred("a.txt", b"nothing of interest", "w:gz"),
    "notes.gz": gzip.compress(b"nothing of interest"),
    "vocab.tiktoken": b"\n".join(base64.b64encode(bytes([i, 255 - i, i] * 4)) + b" %d" % i for i in range(256)),
    "hash.txt": "sha256: " + "0123456789abcdef" * 4 + "\nhttps://me@example.org:80/x?a=b@c\n",
    "empty": b"",
}


def failed(checkpoint: Path) -> dict[str, str]:
    """The checks that fail, but for the last, which loads the model and is not reached, or needs seconds."""
    return {check.name: check.detail for check in preflight(checkpoint) if not check.passed and check.name != "Loading"}


@pytest.fixture
def without_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CHECKS, "Loading", lambda directory, files: "left out")


def table(cases: dict[str, Any]) -> Any:
    return pytest.mark.parametrize("case", cases.values(), ids=cases.keys())


@table(PICKLES)
@pytest.mark.usefixtures("without_loading")
def test_pickles(case: tuple[str, bytes], checkpoint: Path) -> None:
    name, content = case
    write(name, content)(checkpoint)
    found = failed(checkpoint)
    assert name in found["Pickles"]
    assert "a pickle can run code" in found["Pickles"]


@table(NOT_LOOKED_INTO)
@pytest.mark.usefixtures("without_loading")
def test_what_cannot_be_looked_into(case: tuple[str, bytes], checkpoint: Path) -> None:
    write(*case)(checkpoint)
    started = time.monotonic()
    found = failed(checkpoint)
    assert case[0] in found["Pickles"]
    assert found["Pickles"].endswith("remove it.")
    assert time.monotonic() - started < 20


@table(SECRETS)
@pytest.mark.usefixtures("without_loading")
def test_secrets(case: str, checkpoint: Path) -> None:
    write("notes/a.txt", f"x\n{case}\n")(checkpoint)
    found = failed(checkpoint)
    assert "notes/a.txt, line 2: " in found["Private data"]
    assert case not in found["Private data"], "the secret is printed"


@table(PLACES)
@pytest.mark.usefixtures("without_loading")
def test_places_of_secrets(case: Callable[[str], Damage], checkpoint: Path) -> None:
    case(SECRET)(checkpoint)
    found = failed(checkpoint)
    assert "Hugging Face token (hf_Ab1...)" in found["Private data"]


@table(PATHS)
@pytest.mark.usefixtures("without_loading")
def test_paths(case: str, checkpoint: Path) -> None:
    write("notes.txt", f"# notes\nmade at {case}.\n")(checkpoint)
    assert "notes.txt, line 2: a path of this machine" in failed(checkpoint)["Private data"]


@pytest.mark.usefixtures("without_loading")
def test_what_is_harmless(checkpoint: Path) -> None:
    for name, content in HARMLESS.items():
        write(name, content)(checkpoint)
    assert failed(checkpoint) == {}


# -- what is broken ----------------------------------------------------------------------------------------------------


def set_depth(value: float, name: str = "query") -> Damage:
    def edit(checkpoint: Path) -> None:
        tensors = load_file(checkpoint / DEPTH)
        [key] = [key for key in tensors if key.endswith(name)]
        tensors[key][0, 1] = value
        save_file(tensors, checkpoint / DEPTH, metadata={"format": "pt"})

    return edit


def set_auto_map(name: str, value: Any) -> Damage:
    return edit_json(name, lambda content: content.update(auto_map=value))


ELSEWHERE = "loads code from another repository"
CARD = "---\nlicense: {}\n---\n# Card\n"
NAN, INF = float("nan"), float("inf")
BROKEN: dict[str, tuple[Damage, str, str]] = {
    "a query not a number": (set_depth(NAN), "Weights", "query holds values that are not finite"),
    "a query infinite": (set_depth(-INF), "Weights", "query holds values that are not finite"),
    "a key norm not a number": (set_depth(NAN, "key_norm"), "Weights", "key_norm holds values that are not finite"),
    "code of another": (set_auto_map("config.json", {"AutoModel": "a/b--c.D"}), "JSON", ELSEWHERE),
    "code of another, two": (set_auto_map("config.json", {"AutoModel": ["c.D", "a/b--c.D"]}), "JSON", ELSEWHERE),
    "a tokenizer of another": (
        set_auto_map("tokenizer_config.json", {"AutoTokenizer": ["a/b--c.D", None]}),
        "JSON",
        ELSEWHERE,
    ),
    "a processor of another": (set_auto_map("processor_config.json", {"AutoProcessor": "a--c.D"}), "JSON", ELSEWHERE),
    "code that is not there": (
        set_auto_map("config.json", {"AutoModel": "gone.D"}),
        "Weights",
        "gone.py, which is not",
    ),
    "tokenizer cut off": (write("tokenizer.json", '{"version": "1.0", '), "JSON", "tokenizer.json is not readable"),
    "tokenizer empty": (write("tokenizer.json", ""), "JSON", "tokenizer.json is not readable"),
    "generation config cut off": (write("generation_config.json", "{"), "JSON", "generation_config.json is not"),
    "any JSON cut off": (write("a/b.json", "[1, 2"), "JSON", "a/b.json is not readable JSON"),
    "JSON in UTF-16": (write("x.json", "{}".encode("utf-16")), "JSON", "x.json is not readable JSON"),
    "JSON nested beyond reason": (write("x.json", "[" * 100_000), "JSON", "x.json is not readable JSON"),
    "a download not ended": (write("model.safetensors.incomplete", "x"), "Files", "download that did not end"),
    "a download of curl": (write("tokenizer.json.part", "x"), "Files", "tokenizer.json.part is of a download"),
    "a download of a browser": (write("a.zip.crdownload", "x"), "Files", "a.zip.crdownload is of a download"),
    "a download of Firefox": (write("a.zip.PART", "x"), "Files", "a.zip.PART is of a download"),
    "a download of aria2": (write("a.bin.aria2", "x"), "Files", "a.bin.aria2 is of a download"),
    "a download of the Hub's client": (
        write(".cache/huggingface/download/x.incomplete", "x"),
        "Files",
        "x.incomplete is of a download",
    ),
    "a pointer of git LFS": (
        write("tokenizer.model", "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"),
        "Files",
        "tokenizer.model is of a download",
    ),
    "an editor's swap file": (write(".README.md.swp", "x"), "Files", ".README.md.swp is of"),
    "a half-written temporary": (write("model.tmp", "x"), "Files", "model.tmp is of a download"),
    "licence a number by tag": (write("README.md", CARD.format('!!int ""')), "Card", "cannot be read"),
    "licence a time by tag": (write("README.md", CARD.format("!!timestamp x")), "Card", "cannot be read"),
    "licence binary by tag": (write("README.md", CARD.format("!!binary x")), "Card", "cannot be read"),
    "licence a float by tag": (write("README.md", CARD.format("!!float {}")), "Card", "cannot be read"),
    "licence a map by tag": (write("README.md", CARD.format("!!omap 3")), "Card", "cannot be read"),
    "licence a set by tag": (write("README.md", CARD.format("!!pairs [1]")), "Card", "cannot be read"),
    "licence made by Python": (write("README.md", CARD.format("!!python/name:os.getcwd")), "Card", "cannot be read"),
    "licence a list": (write("README.md", CARD.format("[mit]")), "Card", "names no licence"),
    "licence a key of keys": (write("README.md", CARD.format("{? {a: b} : c}")), "Card", "cannot be read"),
    "metadata a list": (write("README.md", "---\n- license\n---\n"), "Card", "cannot be read"),
    "a card of megabytes": (write("README.md", CARD.format("mit") + "x" * 2**21), "Card", "are never read"),
    "a card in latin-1": (write("README.md", CARD.format("mit").encode() + b"\xe9"), "Card", "README.md"),
}


@table(BROKEN)
@pytest.mark.usefixtures("without_loading")
def test_what_is_broken(case: tuple[Damage, str, str], checkpoint: Path) -> None:
    damage, check, message = case
    damage(checkpoint)
    found = failed(checkpoint)
    assert message in found[check]
    assert len(found[check]) < 3000


def test_a_directory_that_cannot_be_listed(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may list everything, so the listing itself fails here."""
    (checkpoint / "hidden").mkdir()
    scandir = os.scandir

    def refuse(path: Any) -> Any:
        if Path(path).name == "hidden":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(checks.PushError, match="hidden cannot be listed"):
        preflight(checkpoint)


# -- loading -----------------------------------------------------------------------------------------------------------

HOME_FILE = "a-secret-of-the-caller"
END = "\nraise ValueError(answer)\n"
CODE: dict[str, tuple[str, str]] = {
    "a module that is missing": ("import attnres", "cannot be loaded"),
    "an endless loop": ("while True: pass", "not loaded after"),
    "endless sleep": ("import time\ntime.sleep(10**6)", "not loaded after"),
    "endless output": ("while True: print('x' * 10**5)", "prints more than"),
    "endless complaints": ("import sys\nwhile True: print('x' * 10**5, file=sys.stderr)", "prints more than"),
    "a child that stays": ("import os, time\nif os.fork() == 0: time.sleep(10**6)\nos._exit(1)", "cannot be loaded"),
    "exit": ("import os\nos._exit(0)", "cannot be loaded"),
    "a crash": ("import ctypes\nctypes.string_at(0)", "cannot be loaded"),
    "home": ("import os\nanswer = sorted(os.listdir(os.path.expanduser('~')))" + END, "cannot be loaded"),
    "the caller's home": ("answer = open(bytes.fromhex('{home}')).read()" + END, "No such file"),
    "the environment": ("import os\nanswer = os.environ['HF_TOKEN']" + END, "cannot be loaded: KeyError"),
    "other processes": ("import os\nanswer = os.listdir('/proc')" + END, "cannot be loaded: FileNotFoundError"),
    "the network": ("import socket\nanswer = socket.socket()" + END, "cannot be loaded: PermissionError"),
    "writing": (f"open('{checks.SEEN_AS}/README.md', 'a').write('x')", "cannot be loaded: PermissionError"),
    "a terminal": ("raise ValueError('\\x1b[31mred')", "cannot be loaded"),
    "megabytes of message": ("raise ValueError('x' * 60_000)", "cannot be loaded"),
    "memory": ("answer = bytes(2**36)" + END, "cannot be loaded: MemoryError"),
    "lies that are no numbers": ('print(\'{"name": 1, "parameters": {}}\')\nimport os\nos._exit(0)', "cannot be"),
}


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "LOAD_SECONDS", 25.0)


@table(CODE)
@pytest.mark.usefixtures("short")
def test_code_of_a_checkpoint(
    case: tuple[str, str], checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, message = case
    if "not loaded" in message:
        monkeypatch.setattr(checks, "LOAD_SECONDS", 12.0)
    home = tmp_path / "home"
    home.mkdir()
    (home / HOME_FILE).write_text("the secret itself")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("HF_TOKEN", "the secret itself")
    write("modeling_attnres.py", code.replace("{home}", bytes(home / HOME_FILE).hex()))(checkpoint)
    before = (checkpoint / "README.md").read_bytes()
    *_, loading = preflight(checkpoint)
    assert not loading.passed
    assert message in loading.detail
    assert "the secret itself" not in loading.detail
    assert len(loading.detail) < 3000
    assert loading.detail.isprintable()
    assert (checkpoint / "README.md").read_bytes() == before


LOADED: dict[str, tuple[Damage, str]] = {
    "a tokenizer of nothing": (write("tokenizer.json", "{}"), "loads with tokenizer"),
    "a generation config that makes no sense": (
        edit_json("generation_config.json", lambda config: config.update(max_new_tokens=-3)),
        "`max_new_tokens` must be greater than 0",
    ),
    "sizes of another model": (edit_json("config.json", lambda c: c.update(intermediate_size=64)), "load"),
}


@table(LOADED)
def test_what_does_not_load(case: tuple[Damage, str], tmp_path: Path) -> None:
    checkpoint = tmp_path / "Tiny-AttnRes"
    convert(CHECKPOINT, checkpoint, verify="none")
    case[0](checkpoint)
    *others, loading = preflight(checkpoint)
    assert all(check.passed for check in others)
    assert not loading.passed
    assert case[1] in loading.detail


def test_without_a_sandbox_only_our_own_code_runs(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "_unavailable", lambda name: "there is none")
    *_, loading = preflight(checkpoint)
    assert loading.passed, loading.detail
    with (checkpoint / "modeling_attnres.py").open("a") as file:
        file.write("\n# changed\n")
    *_, loading = preflight(checkpoint)
    assert not loading.passed
    assert "modeling_attnres.py is not this package's code" in loading.detail
    assert "there is none" in loading.detail


def test_a_sandbox_that_does_not_start_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "_bubblewrap", lambda mounts, user: ["--no-such-option"])
    with pytest.raises(SandboxUnavailableError, match="did not start"):
        sandbox.run_program("print(1)")
