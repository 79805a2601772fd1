from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from hub_server import Fault, Hub
from huggingface_hub import ModelCard
from rich.console import Console
from test_conversion import snapshot
from tiny import randomize, tiny_model
from transformers.utils import hub as transformers_hub

from attnres import AttnResError, AttnResForCausalLM, convert
from attnres.examples.demo import CHECKPOINT
from attnres.model_cards import Check, PushError, preflight, push
from attnres.model_cards.checks import CHECKS

TOKENS = torch.arange(3, 20)[None]
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=")  # of the client, about itself


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A Hub of our own, which the client in this process uses; its storage for large files is LFS, not Xet."""
    with Hub() as hub:
        constants = huggingface_hub.constants
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(transformers_hub, "_hf_api", None)  # made once, for one endpoint
        monkeypatch.setenv("HF_TOKEN", "hf_writer")
        waited: list[float] = []
        monkeypatch.setattr(time, "sleep", waited.append)
        hub.waited = waited
        yield hub
        huggingface_hub.close_session()


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("converted")
    tiny_model("qwen3").save_pretrained(directory / "source")
    (directory / "source" / "README.md").write_text("---\nlicense: mit\n---\n# A card of another model\n")
    convert(directory / "source", directory / "Tiny-AttnRes", verify="none")
    return directory / "Tiny-AttnRes"


@pytest.fixture
def checkpoint(converted: Path, tmp_path: Path) -> Path:
    return shutil.copytree(converted, tmp_path / "Tiny-AttnRes")


@pytest.fixture
def without_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves out the fresh process, which takes seconds; where it matters it is not left out."""
    monkeypatch.setitem(CHECKS, "Loading", lambda directory, files: "left out")


# -- what arrives ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_what_is_pushed_loads_from_the_hub(hub: Hub, converted: Path, tmp_path: Path) -> None:
    """By `push`, `model.push_to_hub` and `config.push_to_hub`; loaded without this package into an empty cache, in a
    fresh process: the same logits, bit by bit."""
    checkpoint = tmp_path / "Tiny-AttnRes"
    convert(CHECKPOINT, checkpoint, verify="none")
    before = snapshot(checkpoint)
    console = Console(record=True, width=120)
    commit = push(checkpoint, "user/tiny", private=True, revision="v1", console=console)
    assert commit is not None
    assert commit.oid == hub.repositories["user/tiny"].refs["v1"]
    assert hub.repositories["user/tiny"].private
    assert hub.files("user/tiny") == {}, "the main branch was not asked for"
    assert hub.files("user/tiny", "v1") == {name: (checkpoint / name).read_bytes() for name in before}
    assert snapshot(checkpoint) == before
    assert any(re.fullmatch(r"PUT /lfs/\w+/8", request) for request in hub.requests), "nothing went in parts"
    printed = console.export_text()
    for text in ("AttnResForCausalLM with 3,647,552 parameters", "licence apache-2.0", "7.3 MB", "user/tiny"):
        assert text in printed

    model = AttnResForCausalLM.from_pretrained(converted).eval()
    randomize(model)
    model.push_to_hub("user/model", max_shard_size="40KB")
    model.config.push_to_hub("user/config")
    assert {"configuration_attnres.py", "modeling_attnres.py", "depth_attention.py"} <= set(hub.files("user/model"))
    assert "model.safetensors.index.json" in hub.files("user/model")
    assert "configuration_attnres.py" in hub.files("user/config")

    pushed = AttnResForCausalLM.from_pretrained(checkpoint, dtype="auto").eval()
    torch.save([pushed(TOKENS).logits, model(TOKENS).logits], tmp_path / "logits.pt")
    program = (
        "import sys, torch\n"
        "sys.modules['attnres'] = None\n"
        "from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer\n"
        "trust = {'trust_remote_code': True}\n"
        "models = [\n"
        "    AutoModelForCausalLM.from_pretrained('user/tiny', revision='v1', dtype='auto', **trust),\n"
        "    AutoModelForCausalLM.from_pretrained('user/model', **trust),\n"
        "]\n"
        "tokens = torch.arange(3, 20)[None]\n"
        "torch.set_grad_enabled(False)  # as here: with gradients, a norm behind a read is rounded apart\n"
        "for model, logits in zip(models, torch.load('logits.pt'), strict=True):\n"
        "    assert torch.equal(model.eval()(tokens).logits, logits), model.config\n"
        "assert AutoTokenizer.from_pretrained('user/tiny', revision='v1')('def')['input_ids']\n"
        "assert AutoConfig.from_pretrained('user/config', **trust).block_size == models[1].config.block_size\n"
    )
    fresh = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
    }
    result = subprocess.run(
        [sys.executable, "-P", "-c", program], cwd=tmp_path, env=os.environ | fresh, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr


def test_conversion_of_a_hub_id(hub: Hub, converted: Path, tmp_path: Path) -> None:
    """Its card is fetched for what is inherited, and it is the base model."""
    source = converted.with_name("source")
    hub.add("org/tiny", {path.name: path.read_bytes() for path in source.iterdir()})
    convert("org/tiny", tmp_path / "converted", verify="none")
    card = ModelCard.load(tmp_path / "converted" / "README.md")
    expected = {"license": "mit", "base_model": "org/tiny", "base_model_relation": "finetune"}
    assert {name: card.data.get(name) for name in expected} == expected
    assert "A card of another model" not in card.text


@pytest.mark.usefixtures("without_loading")
@pytest.mark.parametrize("token", ["hf_writer", "hf_other"], ids=["owner", "somebody else"])
def test_pull_request(token: str, hub: Hub, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    hub.add("user/tiny")
    commit = push(checkpoint, "user/tiny", create_pr=True)
    assert commit is not None
    assert commit.pr_url == f"{hub.url}/user/tiny/discussions/1"
    assert hub.files("user/tiny") == {}
    assert set(hub.files("user/tiny", "refs/pr/1")) == set(snapshot(checkpoint))


@pytest.mark.usefixtures("without_loading")
def test_a_second_push_sends_what_has_changed(hub: Hub, checkpoint: Path) -> None:
    push(checkpoint, "user/tiny")
    (checkpoint / "README.md").write_text((checkpoint / "README.md").read_text() + "\nOne more line.\n")
    push(checkpoint, "user/tiny")
    assert hub.files("user/tiny")["README.md"].endswith(b"One more line.\n")
    assert set(hub.uploads.values()) == {1}
    commits = len(hub.repositories["user/tiny"].commits)
    push(checkpoint, "user/tiny")
    assert len(hub.repositories["user/tiny"].commits) == commits


@pytest.mark.usefixtures("without_loading")
def test_a_dry_run_sends_nothing(hub: Hub, checkpoint: Path) -> None:
    before = snapshot(checkpoint)
    assert push(checkpoint, "user/tiny", dry_run=True) is None
    assert hub.requests == []
    assert snapshot(checkpoint) == before


# -- what is refused before anything is sent ---------------------------------------------------------------------------


def write(name: str, content: str | bytes) -> Callable[[Path], None]:
    def edit(checkpoint: Path) -> None:
        (checkpoint / name).parent.mkdir(exist_ok=True)
        (checkpoint / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return edit


def edit_json(name: str, change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def edit(checkpoint: Path) -> None:
        value = json.loads((checkpoint / name).read_text())
        change(value)
        (checkpoint / name).write_text(json.dumps(value))

    return edit


def save_pickle(checkpoint: Path) -> None:
    torch.save({"step": 1}, checkpoint / "state.dat")


def truncate(checkpoint: Path) -> None:
    os.truncate(checkpoint / "model-attnres.safetensors", 100)


def add_shard(checkpoint: Path) -> None:
    shutil.copy(checkpoint / "model-attnres.safetensors", checkpoint / "model-old.safetensors")


def name_the_path(checkpoint: Path) -> None:
    write("notes.txt", f"made in {checkpoint}/x\n")(checkpoint)


def hide_in_the_header(checkpoint: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = checkpoint / "model-attnres.safetensors"
    save_file(load_file(path), path, metadata={"format": "pt", "from": "/home/somebody/run/7"})


CARD = "---\n{}\n---\n# Card\n"
INDEX = "model.safetensors.index.json"
SECRETS = {"hf_" + "Ab1" * 11 + "x": "Hugging Face token", "glpat-" + "a1B2c" * 4: "GitLab Token"}
REFUSED: list[tuple[str, Callable[[Path], Any], str]] = [
    ("no card", lambda c: (c / "README.md").unlink(), "there is no README.md"),
    ("no licence", write("README.md", CARD.format("tags: [x]")), "names no licence"),
    ("no metadata", write("README.md", "# Card\n"), "names no licence"),
    ("bad metadata", write("README.md", CARD.format("license: [")), "cannot be read"),
    ("other licence", write("README.md", CARD.format("license: other")), "needs a `license_name`"),
    ("pickle by name", write("training_args.bin", "x"), "training_args.bin: a pickle can run code"),
    ("pickle by content", write("state.dat", b"\x80\x04K\x01."), "state.dat: a pickle"),
    ("torch's pickle", save_pickle, "state.dat: state/data.pkl: a pickle"),
    ("link outside", lambda c: (c / "passwd").symlink_to("/etc/passwd"), "passwd is a link that leaves"),
    ("linked directory", lambda c: (c / "etc").symlink_to("/etc"), "etc is a link that leaves"),
    ("broken link", lambda c: (c / "link").symlink_to("nothing"), "link is a link to no file"),
    ("link to itself", lambda c: (c / "link").symlink_to("link"), "link is a link to no file"),
    (
        "broken archive",
        write("x.zip", b"PK\x05\x06" + bytes(8) + b"\xff" * 8 + bytes(2)),
        "x.zip is an archive that cannot be read",
    ),
    ("named pipe", lambda c: os.mkfifo(c / "pipe"), "pipe is neither a file nor a directory"),
    ("no config", lambda c: (c / "config.json").unlink(), "config.json cannot be read"),
    ("other model", edit_json("config.json", lambda v: v.update(model_type="llama")), "model_type='llama'"),
    ("no code", lambda c: (c / "modeling_attnres.py").unlink(), "modeling_attnres.py, which is not there"),
    (
        "code from elsewhere",
        edit_json("config.json", lambda v: v["auto_map"].update(AutoModel="a/b--code.Model")),
        "config.json loads code from another repository (a/b--code.Model)",
    ),
    ("missing shard", lambda c: (c / "model-attnres.safetensors").unlink(), "named by model.safetensors.index.json"),
    ("truncated shard", truncate, "not a whole safetensors file"),
    (
        "missing tensor",
        edit_json(INDEX, lambda v: v["weight_map"].update(x="model-attnres.safetensors")),
        "lacks tensor",
    ),
    ("extra shard", add_shard, "model-old.safetensors is not in the index"),
    ("this directory", name_the_path, "notes.txt, line 1: a path of this machine"),
    (
        "home",
        write("config.yaml", "a: 1\npath: /home/somebody/data\n"),
        "line 2: a path of this machine (/home/somebody/d",
    ),
    ("home on a Mac", write("x.py", "p = '/Users/somebody/data'"), "a path of this machine"),
    ("home on Windows", write("x.json", json.dumps({"p": "C:\\Users\\somebody"})), "a path of this machine"),
    ("path in a header", hide_in_the_header, "model-attnres.safetensors, line 1: a path of this machine"),
    ("hidden file", write(".env", "export HF_TOKEN=hf_writer"), ".env, line 1: your Hub token (hf_wri...)"),
    *(
        (kind, write("notes/a.txt", f"x\n{secret}\n"), f"notes/a.txt, line 2: {kind}")
        for secret, kind in SECRETS.items()
    ),
]


@pytest.mark.usefixtures("without_loading")
@pytest.mark.parametrize(("edit", "message"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED])
def test_what_is_not_fit_is_not_sent(edit: Callable[[Path], None], message: str, checkpoint: Path, hub: Hub) -> None:
    edit(checkpoint)
    before = snapshot(checkpoint)
    with pytest.raises(PushError) as raised:
        push(checkpoint, "user/tiny")
    assert message in str(raised.value)
    assert not any(secret in str(raised.value) for secret in SECRETS)
    assert hub.requests == []
    assert snapshot(checkpoint) == before


def set_header_length(shard: Path, length: int) -> None:
    content = shard.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    shard.write_bytes(length.to_bytes(8, "little") + content[8:end].rstrip().ljust(length) + content[end:])
    assert shard.read_bytes()[:2] == b"\x80\x02"


@pytest.mark.usefixtures("without_loading")
def test_what_looks_private_but_is_not(checkpoint: Path, hub: Hub) -> None:
    """Words of a vocabulary, addresses, placeholders, links within, a shard that starts as a pickle does; and what is
    never sent is not looked at."""
    set_header_length(checkpoint / "model-attnres.safetensors", 0x280)
    write("vocab.json", json.dumps({"/home": 1, "/Users/": 2, "C:\\Users": 3, "hf_": 4, "sk-": 5, "AKIA": 6}))(
        checkpoint
    )
    write("notes.txt", "https://example.org:80/home, see /home/ and https://example.org/home/user/x\n")(checkpoint)
    write(".git/config", "/home/somebody/x")(checkpoint)
    (checkpoint / ".git" / "link").symlink_to("/etc/passwd")
    write("__pycache__/x.pyc", "/home/somebody/x")(checkpoint)
    (checkpoint / "NOTICE").symlink_to("notes.txt")
    push(checkpoint, "user/tiny")
    assert {"vocab.json", "notes.txt", "NOTICE"} <= set(hub.files("user/tiny"))
    assert not any(name.startswith((".git/", "__pycache__")) for name in hub.files("user/tiny"))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (write("modeling_attnres.py", "import attnres\n"), "cannot be loaded"),
        (edit_json("config.json", lambda v: v.update(intermediate_size=64)), "loads with|be loaded"),
    ],
    ids=["code that needs the package", "shapes"],
)
def test_a_checkpoint_that_does_not_load(edit: Callable[[Path], None], message: str, checkpoint: Path) -> None:
    edit(checkpoint)
    *others, loading = preflight(checkpoint)
    assert all(check.passed for check in others)
    assert loading == Check("Loading", False, loading.detail)
    assert any(text in loading.detail for text in message.split("|"))


def test_loading_is_not_tried_on_what_is_not_fit(checkpoint: Path) -> None:
    save_pickle(checkpoint)
    assert preflight(checkpoint)[-1] == Check("Loading", False, "not tried, because of the above.")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(repo_id="tiny"), "lacks its owner"),
        (dict(repo_id="user/a b"), "is no Hub id"),
        (dict(checkpoint="nowhere"), "is no directory"),
        (dict(create_pr=True, revision="v1"), "not both"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str, checkpoint: Path, hub: Hub) -> None:
    with pytest.raises(PushError, match=message):
        push(**{"checkpoint": checkpoint, "repo_id": "user/tiny", **arguments})
    assert hub.requests == []


# -- what the Hub may do -----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("without_loading")
@pytest.mark.parametrize("pattern", ["PUT /lfs/{}$", "POST /api/models/user/tiny/commit"], ids=["upload", "commit"])
def test_an_interrupted_push_is_resumed(pattern: str, hub: Hub, checkpoint: Path) -> None:
    """The connection is cut in the middle of one of the objects, or of the commit, again and again."""
    save_model_in_shards(checkpoint)
    before = snapshot(checkpoint)
    shards = {fingerprint for name, (fingerprint, _) in before.items() if name.endswith(".safetensors")}
    cut = sorted(shards)[0]
    hub.faults = [Fault(pattern.format(cut))]
    with pytest.raises(PushError, match="the same command goes on from there"):
        push(checkpoint, "user/tiny")
    assert hub.files("user/tiny") == {}, "half a checkpoint can be seen"
    assert snapshot(checkpoint) == before
    assert set(hub.uploads) == (shards - {cut} if "PUT" in pattern else shards)
    hub.faults = []
    push(checkpoint, "user/tiny")
    assert hub.uploads == dict.fromkeys(shards, 1), "something was sent twice"
    assert set(hub.files("user/tiny")) == set(before)


def save_model_in_shards(checkpoint: Path) -> None:
    card = (checkpoint / "README.md").read_text()
    model = AttnResForCausalLM.from_pretrained(checkpoint)
    shutil.rmtree(checkpoint)
    model.save_pretrained(checkpoint, max_shard_size="40KB")
    (checkpoint / "README.md").write_text(card)


@pytest.mark.usefixtures("without_loading")
def test_an_interrupted_pull_request_says_how_to_resume_it(hub: Hub, checkpoint: Path) -> None:
    hub.add("user/tiny")
    hub.faults = [Fault("POST /api/models/user/tiny/commit", 503)]
    with pytest.raises(PushError, match="--revision refs/pr/1 instead of --create-pr"):
        push(checkpoint, "user/tiny", create_pr=True)
    hub.faults = []
    push(checkpoint, "user/tiny", revision="refs/pr/1")
    assert set(hub.files("user/tiny", "refs/pr/1")) == set(snapshot(checkpoint))
    assert list(hub.repositories["user/tiny"].refs) == ["main", "refs/pr/1"]


PLACES = [
    "POST /api/repos/create",
    "POST /api/validate-yaml",
    "POST /api/models/user/tiny/preupload",
    r"POST /user/tiny\.git/info/lfs",
    r"PUT /lfs/",
    r"POST /lfs/\w+/verify",
    "POST /api/models/user/tiny/commit",
]


@pytest.mark.usefixtures("without_loading")
@pytest.mark.parametrize("place", PLACES)
def test_passing_trouble_is_waited_for(place: str, hub: Hub, checkpoint: Path) -> None:
    fault = Fault(place, 503, times=2)
    hub.faults = [fault]
    push(checkpoint, "user/tiny")
    assert fault.times == 0
    assert hub.waited
    assert set(hub.files("user/tiny")) == set(snapshot(checkpoint))


@pytest.mark.usefixtures("without_loading")
@pytest.mark.parametrize("place", [place for place in PLACES if "verify" not in place])  # that is asked once only
def test_lasting_trouble_is_reported(place: str, hub: Hub, checkpoint: Path) -> None:
    before = snapshot(checkpoint)
    hub.faults = [Fault(place, 503)]
    with pytest.raises(PushError, match=r"status 503.*The Hub is in trouble.*goes on from there"):
        push(checkpoint, "user/tiny")
    assert snapshot(checkpoint) == before


def hub_is_down(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.faults = [Fault(".*")]


def offline(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def token(value: str) -> Callable[[Hub, pytest.MonkeyPatch], None]:
    return lambda hub, monkeypatch: monkeypatch.setenv("HF_TOKEN", value)


def there(name: str, content: bytes) -> Callable[[Hub, pytest.MonkeyPatch], Any]:
    return lambda hub, monkeypatch: hub.add("user/tiny", {name: content})


HUB_SAYS_NO: dict[str, tuple[Callable[[Hub, pytest.MonkeyPatch], Any], str]] = {
    "unknown token": (token("hf_wrong"), "status 401.*The token was refused"),
    "no token": (token(""), "status 401.*The token was refused"),
    "token that may not write": (token("hf_reader"), "status 403.*The token may not write there"),
    "name of somebody else": (token("hf_other"), "status 403.*rights to create.*another name"),
    "repository of somebody else": (
        lambda hub, monkeypatch: (hub.add("user/tiny"), monkeypatch.setenv("HF_TOKEN", "hf_other")),
        "status 403.*The token may not write there",
    ),
    "another model's weights": (there("model.safetensors", b"x"), "holds model.safetensors, weights that this"),
    "another model": (there("config.json", b'{"model_type": "qwen3"}'), "holds a model of type 'qwen3'"),
    "somebody wrote meanwhile": (
        lambda hub, monkeypatch: hub.faults.append(Fault("POST /api/models/user/tiny/commit", 409)),
        "status 409.*at the same time",
    ),
    "metadata that the Hub refuses": (
        lambda hub, monkeypatch: hub.faults.append(Fault("POST /api/validate-yaml", 400)),
        "status 400.*does not accept",
    ),
    "slow down": (lambda hub, monkeypatch: hub.faults.append(Fault("POST /api/repos/create", 429)), "status 429"),
    "no network": (hub_is_down, "Check the network"),
    "offline": (offline, "unset HF_HUB_OFFLINE"),
}


@pytest.mark.usefixtures("without_loading")
@pytest.mark.parametrize(("prepare", "message"), HUB_SAYS_NO.values(), ids=HUB_SAYS_NO)
def test_what_the_hub_refuses(
    prepare: Callable[[Hub, pytest.MonkeyPatch], Any],
    message: str,
    hub: Hub,
    checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prepare(hub, monkeypatch)
    before, there = snapshot(checkpoint), {name: hub.files(name) for name in hub.repositories}
    with pytest.raises(PushError, match=message) as raised:
        push(checkpoint, "user/tiny")
    assert isinstance(raised.value, AttnResError)
    assert snapshot(checkpoint) == before
    assert {name: hub.files(name) for name in there} == there
    assert not any(files for name in hub.repositories if (files := hub.files(name)) and name not in there)


@pytest.mark.usefixtures("without_loading")
def test_private_weights_do_not_go_to_a_public_repository(hub: Hub, checkpoint: Path) -> None:
    hub.add("user/tiny")
    with pytest.raises(PushError, match="there already and public"):
        push(checkpoint, "user/tiny", private=True)
    assert hub.files("user/tiny") == {}


@pytest.mark.usefixtures("without_loading")
def test_files_that_the_hub_ignores_are_missed(hub: Hub, checkpoint: Path) -> None:
    write("ignored.txt", "ignored by a rule of the repository")(checkpoint)
    with pytest.raises(PushError, match=r"ignores ignored\.txt"):
        push(checkpoint, "user/tiny")
