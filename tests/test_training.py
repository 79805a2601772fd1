"""`attnres finetune` and `attnres train`: what is trained, saved and resumed, and what is refused."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_config
from transformers import AutoModelForCausalLM, AutoTokenizer

from attnres import AttnResError, AttnResForCausalLM, convert

pytest.importorskip("trl", reason="TRL is in the extra `train`")

from attnres.training import TrainingError, TrainingSettings, baselines, engine, finetune, train
from attnres.training.baselines.hyper_connections import sinkhorn
from attnres.training.engine import check_output
from attnres.training.from_scratch import RunConfig
from attnres.training.optimizers import is_depth_parameter, make_optimizer, parameter_groups
from attnres.training.report import TRAINING_REPORT, TrainingReport

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "examples" / "tiny-qwen3"
QUICK: dict[str, Any] = dict(
    steps=4, batch_size=2, sequence_length=32, log_every=1, save_every=2, tensorboard=False, precision="fp32"
)
LINES = [f"def f{i}(a, b):\n    return a * {i} + b - {i * i}\n" for i in range(60)]
DIALOGUES = [
    [{"role": "user", "content": f"add {i}"}, {"role": "assistant", "content": f"return a + {i}"}] for i in range(30)
]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers of the example, in bfloat16, as it is on disk."""
    directory = tmp_path_factory.mktemp("training") / "plain"
    model = AutoModelForCausalLM.from_pretrained(SOURCE, num_hidden_layers=2, dtype=torch.bfloat16)
    model.config.layer_types = model.config.layer_types[:2]
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(SOURCE).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def converted(plain: Path) -> Path:
    convert(plain, plain.with_name("converted"), num_blocks=2, verify="none")
    return plain.with_name("converted")


@pytest.fixture(scope="module")
def corpus(plain: Path) -> Path:
    """Text as files, JSON lines, Parquet and dialogues."""
    import datasets

    directory = plain.with_name("corpus")
    (directory / "files").mkdir(parents=True)
    for i in range(4):
        (directory / "files" / f"{i}.py").write_text("".join(LINES[i::4]), encoding="utf-8")
    rows = {
        "text": [{"text": line} for line in LINES],
        "content": [{"content": line} for line in LINES],
        "completion": [{"prompt": line[:8], "completion": line[8:]} for line in LINES],
        "messages": [{"messages": dialogue} for dialogue in DIALOGUES],
    }
    for name, examples in rows.items():
        (directory / f"{name}.jsonl").write_text("\n".join(map(json.dumps, examples)) + "\n", encoding="utf-8")
    datasets.Dataset.from_list(rows["text"]).to_parquet(directory / "text.parquet")
    return directory


def names_and_shapes(directory: Path) -> dict[str, tuple[Any, ...]]:
    tensors = {name: t for shard in directory.glob("*.safetensors") for name, t in load_file(shard).items()}
    return {name: (tuple(t.shape), t.dtype) for name, t in sorted(tensors.items())}


def shards(directory: Path) -> dict[str, str]:
    return json.loads((directory / "model.safetensors.index.json").read_text(encoding="utf-8"))["weight_map"]


# -- fine-tuning -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["full", "depth"])
def test_output_is_a_checkpoint_like_the_converters(mode: str, converted: Path, corpus: Path, tmp_path: Path) -> None:
    report = finetune(
        converted,
        data=corpus / "files",
        output=tmp_path / "out",
        train=mode,
        validation=0.25,
        learning_rate=1e-3,
        **QUICK,
    )
    assert report.finished
    assert report.steps == 4
    assert report.validation is not None
    assert report.validation["after"]["loss"] < report.validation["before"]["loss"]
    out = tmp_path / "out"
    assert names_and_shapes(out) == names_and_shapes(converted)
    assert shards(out) == shards(converted)
    assert {p.name for p in converted.iterdir()} <= {p.name for p in out.iterdir()}
    assert not (out / "checkpoints").exists()
    before, after = load_all(converted), load_all(out)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name for name in changed if is_depth_parameter(name)}
    assert any(not is_depth_parameter(name) for name in changed) == (mode == "full")
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "from `attnres_training.json`" in card
    assert "[To fill in: on which data" not in card
    assert str(tmp_path) not in card
    # Anybody can load it, without this package.
    program = (
        "import sys, torch; sys.modules['attnres'] = None; from transformers import AutoModelForCausalLM as A; "
        "m = A.from_pretrained(sys.argv[1], trust_remote_code=True); "
        "print(m(torch.tensor([[5, 6, 7]])).logits.sum().item())"
    )
    shown = subprocess.run([sys.executable, "-c", program, str(out)], capture_output=True, text=True, check=True).stdout
    with torch.no_grad():
        expected = AttnResForCausalLM.from_pretrained(out)(torch.tensor([[5, 6, 7]])).logits.sum().item()
    assert float(shown.split()[-1]) == pytest.approx(expected, rel=1e-2)


def load_all(directory: Path) -> dict[str, torch.Tensor]:
    return {name: t for shard in directory.glob("*.safetensors") for name, t in load_file(shard).items()}


def test_a_plain_checkpoint_is_retrofitted_while_loading(
    plain: Path, converted: Path, corpus: Path, tmp_path: Path
) -> None:
    """The losses are those of the converted checkpoint, and without depth attention those of the source."""
    arguments: dict[str, Any] = dict(data=corpus / "text.jsonl", learning_rate=1e-3, **QUICK)
    ours = finetune(plain, output=tmp_path / "a", depth=dict(num_blocks=2), **arguments)
    expected = finetune(converted, output=tmp_path / "b", **arguments)
    assert ours.losses == expected.losses
    assert names_and_shapes(tmp_path / "a") == names_and_shapes(converted)
    control = finetune(plain, output=tmp_path / "c", plain=True, **arguments)
    assert control.losses[0][1] == pytest.approx(ours.losses[0][1], abs=1e-4)
    assert control.losses != ours.losses
    assert names_and_shapes(tmp_path / "c") == names_and_shapes(plain)
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "c")).__name__ == "Qwen3ForCausalLM"


def test_lora_and_merge(converted: Path, plain: Path, corpus: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    arguments: dict[str, Any] = dict(data=corpus / "text.jsonl", train="lora", learning_rate=1e-2, lora_rank=2, **QUICK)
    finetune(converted, output=tmp_path / "adapter", **arguments)
    finetune(converted, output=tmp_path / "merged", merge=True, **arguments)
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert any("lora_A" in name for name in saved)
    assert any(is_depth_parameter(name) and t.dtype == torch.float32 for name, t in saved.items())
    assert "Training with attnres" in (tmp_path / "adapter" / "README.md").read_text(encoding="utf-8")
    input_ids = torch.arange(5, 25)[None]
    base = AttnResForCausalLM.from_pretrained(converted, dtype=torch.float32)
    with torch.no_grad():
        before = base(input_ids).logits
        adapted = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
        expected = adapted(input_ids).logits
        merged = AttnResForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()(input_ids).logits
    assert (expected - before).abs().max() > 0.1
    torch.testing.assert_close(merged, expected, atol=0.1, rtol=0.1)  # it was rounded to bfloat16
    assert names_and_shapes(tmp_path / "merged") == names_and_shapes(converted)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("files", {}),
        ("text.parquet", dict(packing="none")),
        ("text.jsonl", dict(packing="bfd")),
        ("content.jsonl", {}),
        ("completion.jsonl", {}),
        ("completion.jsonl", dict(completion_only=False)),
        ("messages.jsonl", dict(assistant_only=True)),
        ("text.jsonl", dict(optimizer="muon")),
        ("text.jsonl", dict(schedule="warmup_stable_decay", warmup=0.25, decay=0.5)),
        ("text.jsonl", dict(accumulation=2, gradient_checkpointing=True)),
        ("text.jsonl", dict(precision="bf16")),
    ],
)
def test_data_and_settings(name: str, settings: dict[str, Any], converted: Path, corpus: Path, tmp_path: Path) -> None:
    """Every kind of data and every choice trains: the validation loss falls."""
    checkpoint = converted
    if name == "messages.jsonl":
        checkpoint = with_chat_template(converted, tmp_path / "chat")
    report = finetune(
        checkpoint,
        data=corpus / name,
        validation=0.2,
        text_column="content" if name == "content.jsonl" else "text",
        output=tmp_path / "out",
        learning_rate=1e-3,
        **{**QUICK, **settings},
    )
    assert report.validation is not None
    before, after = report.validation["before"], report.validation["after"]
    assert after["loss"] < before["loss"]
    assert after["bits_per_byte"] == pytest.approx(after["loss"] * before["bits_per_byte"] / before["loss"])


def with_chat_template(checkpoint: Path, directory: Path) -> Path:
    import shutil

    shutil.copytree(checkpoint, directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}\n"
        "{% endgeneration %}{% else %}{{ m['content'] }}\n{% endif %}{% endfor %}"
    )
    tokenizer.save_pretrained(directory)
    return directory


def test_validation_is_the_mean_over_tokens(converted: Path, corpus: Path, tmp_path: Path) -> None:
    """The loss and the bits per byte before training, computed again from the text."""
    text = "".join(LINES[:20])
    (tmp_path / "held_out.txt").write_text(text, encoding="utf-8")
    report = finetune(
        converted, data=corpus / "files", validation=tmp_path / "held_out.txt", output=tmp_path / "out", **QUICK
    )
    tokenizer = AutoTokenizer.from_pretrained(converted)
    ids = torch.tensor(tokenizer(text + tokenizer.eos_token)["input_ids"])
    model = AttnResForCausalLM.from_pretrained(converted, dtype=torch.float32)
    total, count = 0.0, 0
    for window in ids.split(32):
        if len(window) > 1:
            with torch.no_grad():
                logits = model(window[None, :-1]).logits[0].double()
            total += torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum").item()
            count += len(window) - 1
    assert report.validation is not None
    assert report.validation["before"]["loss"] == pytest.approx(total / count, abs=1e-4)
    bits = total / count / math.log(2) * len(ids) / len(text.encode())
    assert report.validation["before"]["bits_per_byte"] == pytest.approx(bits, abs=1e-4)


# -- interruption ------------------------------------------------------------------------------------------------------


def command(checkpoint: Path, data: Path, output: Path, steps: int = 24) -> list[str]:
    arguments = ["finetune", str(checkpoint), "--data", str(data), "--output", str(output), "--validation", "0.2"]
    arguments += ["--steps", str(steps), "--batch-size", "2", "--sequence-length", "32", "--log-every", "2"]
    arguments += ["--save-every", "4", "--lora-dropout", "0.1", "--train", "lora", "--merge", "--learning-rate", "1e-2"]
    return [sys.executable, "-m", "attnres.cli", *arguments]


@pytest.mark.parametrize("kills", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_at_any_moment_it_ends_at_the_same_losses(
    kills: int, converted: Path, corpus: Path, tmp_path: Path
) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}

    def start(output: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            command(converted, corpus / "files", tmp_path / output),
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    whole = start("whole")
    begun = time.perf_counter()
    while not (tmp_path / "whole" / "checkpoints").is_dir() and whole.poll() is None:
        time.sleep(0.05)
    until_training = time.perf_counter() - begun
    assert whole.wait(timeout=300) == 0
    duration = time.perf_counter() - begun
    generator = random.Random(kills)
    for _ in range(kills):
        process = start("killed")
        time.sleep(until_training + generator.random() * (duration - until_training) * 0.6)
        process.send_signal(signal.SIGKILL)
        process.wait()
        for checkpoint in (tmp_path / "killed" / "checkpoints").glob("checkpoint-*"):
            assert (checkpoint / "trainer_state.json").is_file(), "a checkpoint is not whole"
    assert start("killed").wait(timeout=300) == 0
    expected, actual = (TrainingReport.read(tmp_path / name) for name in ("whole", "killed"))
    assert expected is not None
    assert actual is not None
    assert [step for step, _ in actual.losses] == [step for step, _ in expected.losses]
    differences = [abs(a - b) for (_, a), (_, b) in zip(actual.losses, expected.losses)]
    assert max(differences) < 1e-6
    assert expected.validation is not None
    assert actual.validation is not None
    for when, metrics in expected.validation.items():
        assert actual.validation[when] == pytest.approx(metrics, abs=1e-6)
    assert actual.tokens == expected.tokens
    for name in ("model-attnres.safetensors", "model-00001-of-00001.safetensors"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not [path for path in (tmp_path / "killed").iterdir() if path.name.startswith(".result")]


def test_killed_after_the_last_step_it_does_no_other(converted: Path, corpus: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    settings: dict[str, Any] = dict(data=corpus / "files", output=output, keep_checkpoints=True, **QUICK)
    whole = finetune(converted, **settings)
    weights = (output / "model-attnres.safetensors").read_bytes()
    dataclasses.replace(whole, finished=False, losses=(), files=()).write(output)
    (output / "model-attnres.safetensors").unlink()
    again = finetune(converted, **settings)
    assert (again.steps, again.losses, again.tokens) == (whole.steps, whole.losses, whole.tokens)
    assert (output / "model-attnres.safetensors").read_bytes() == weights


def test_a_checkpoint_of_other_parameters_is_refused(converted: Path, corpus: Path, tmp_path: Path) -> None:
    """It has more of them than learn here; the report, which would have said so, is changed to agree."""
    output = tmp_path / "out"
    settings: dict[str, Any] = dict(data=corpus / "files", output=output, keep_checkpoints=True, **QUICK)
    whole = finetune(converted, **settings)
    rates = {name: whole.settings[name] for name in ("learning_rate", "depth_learning_rate")}
    method = whole.method | {"train": "depth"}
    dataclasses.replace(whole, finished=False, losses=(), files=(), method=method).write(output)
    for name in ("model-attnres.safetensors", "model-00001-of-00001.safetensors"):
        (output / name).unlink()
    with pytest.raises(TrainingError, match="has other parameters than the model, first 'model\\."):
        finetune(converted, train="depth", **settings, **rates)


def test_default_learning_rates() -> None:
    rates = TrainingSettings(steps=1).learning_rates
    assert rates("full") == (1e-4, 1e-4)
    for width, multiple in ((24, 8), (192, 1), (576, 1 / 3)):
        assert rates("full", width) == (1e-4, pytest.approx(multiple * 1e-4))
        assert rates("lora", width) == (2e-4, pytest.approx(multiple * 1e-4))
        assert rates("depth", width) == (0.0, pytest.approx(min(1, multiple) * 3e-3))
        assert rates("scratch", width) == (4e-3, 4e-3)
    assert TrainingSettings(steps=1, learning_rate=1e-5).learning_rates("full", 24) == (1e-5, pytest.approx(8e-5))
    chosen = TrainingSettings(steps=1, learning_rate=1e-5, depth_learning_rate=2e-3)
    assert chosen.learning_rates("full", 24) == (1e-5, 2e-3)


def test_the_depth_learning_rate_follows_the_width_of_a_head(converted: Path, corpus: Path, tmp_path: Path) -> None:
    arguments: dict[str, Any] = dict(data=corpus / "text.jsonl", **QUICK | {"steps": 1})
    config = AttnResForCausalLM.config_class.from_pretrained(converted)
    report = finetune(converted, output=tmp_path / "out", **arguments)
    width = config.hidden_size / config.depth_attention["num_heads"]
    assert report.settings["depth_learning_rate"] == pytest.approx(1e-4 * 192 / width)


def test_finished_and_other_settings(converted: Path, corpus: Path, tmp_path: Path) -> None:
    arguments: dict[str, Any] = dict(data=corpus / "text.jsonl", output=tmp_path / "out", **QUICK)
    first = finetune(converted, **arguments)
    assert finetune(converted, **arguments) == first, "a finished run is not run again"
    with pytest.raises(TrainingError, match="settings.seed was 42 and is 7"):
        finetune(converted, **{**arguments, "seed": 7})
    with pytest.raises(TrainingError, match="data.files"):
        finetune(converted, **{**arguments, "data": corpus / "files"})
    note = write(tmp_path / "out" / "note.txt", b"mine")
    with pytest.raises(TrainingError, match=r"note\.txt"):
        finetune(converted, **{**arguments, "seed": 7}, overwrite=True)
    assert (tmp_path / "out" / "model-attnres.safetensors").is_file()
    note.unlink()
    again = finetune(converted, **{**arguments, "seed": 7}, overwrite=True)
    assert again.losses != first.losses
    with pytest.raises(TrainingError, match="is the checkpoint that is to be trained"):
        finetune(tmp_path / "out", **arguments, overwrite=True)


@pytest.mark.parametrize(
    ("settings", "shares"),
    [
        (dict(schedule="cosine", warmup=0.25), [0, 0.5, 1, 0.933, 0.75, 0.5, 0.25, 0.067]),
        (dict(schedule="warmup_stable_decay", warmup=0.25, decay=0.5), [0, 0.5, 1, 1, 1, 0.854, 0.5, 0.146]),
    ],
)
def test_schedules(
    settings: dict[str, Any], shares: list[float], converted: Path, corpus: Path, tmp_path: Path
) -> None:
    """Learning rates of eight steps as shares of the peak."""
    finetune(
        converted,
        data=corpus / "text.jsonl",
        output=tmp_path / "out",
        learning_rate=1e-3,
        **{**QUICK, "steps": 8, "keep_checkpoints": True, **settings},
    )
    state = json.loads((tmp_path / "out" / "checkpoints" / "checkpoint-8" / "trainer_state.json").read_text())
    rates = [entry["learning_rate"] for entry in state["log_history"] if "learning_rate" in entry]
    assert rates == pytest.approx([share * 1e-3 for share in shares], abs=2e-6)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_loss_that_is_not_finite_stops(
    where: str, converted: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from attnres.training.trainer import DepthTrainer

    step = DepthTrainer.compute_loss

    def compute_loss(self: DepthTrainer, model: Any, *args: Any, **kwargs: Any) -> Any:
        if self.model.training and self.state.global_step == 2:
            layer = self.model.model.layers[1]
            if where == "loss":
                layer.mlp.down_proj.weight.data.fill_(float("nan"))
            else:
                layer.mlp.down_proj.weight.register_hook(lambda grad: grad * float("inf"))
        return step(self, model, *args, **kwargs)

    monkeypatch.setattr(DepthTrainer, "compute_loss", compute_loss)
    with pytest.raises(TrainingError) as raised:
        finetune(converted, data=corpus / "text.jsonl", output=tmp_path / "out", **QUICK)
    message = str(raised.value)
    assert "Step 3" in message
    assert "learning rates" in message
    assert "largest activation is" in message
    if where == "loss":
        assert "the loss is nan" in message
        assert "first that is not finite is of model.layers.1.mlp.down_proj" in message
    assert (tmp_path / "out" / "checkpoints" / "checkpoint-2").is_dir()


# -- what is refused ---------------------------------------------------------------------------------------------------


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "mode": (dict(train="half"), "train='half'"),
    "merge": (dict(merge=True), "merge folds the adapter"),
    "setting": (dict(learning_rat=1), "'learning_rat' is no setting"),
    "negative rate": (dict(learning_rate=-1), "learning_rate=-1"),
    "nan rate": (dict(depth_learning_rate=float("nan")), "depth_learning_rate=nan"),
    "steps": (dict(steps=0), "steps=0"),
    "batch": (dict(batch_size=True), "batch_size=True"),
    "epochs": (dict(steps=None, epochs=0), "epochs=0 trains nothing"),
    "optimizer": (dict(optimizer="sgd"), "optimizer='sgd'"),
    "schedule": (dict(schedule="linear"), "schedule='linear'"),
    "warmup": (dict(schedule="warmup_stable_decay", warmup=0.9, decay=0.9), "make more than all steps"),
    "multiple": (dict(save_every=3, log_every=2), "no multiple of log_every"),
    "wrapped dialogues": (dict(assistant_only=True, packing="wrapped"), "do not go together"),
    "length": (dict(sequence_length=10**6), "max_position_embeddings"),
    "no data": (dict(data=[]), "No data are given"),
    "missing data": (dict(data="nowhere/at/all.jsonl"), "no such file or directory"),
    "empty directory": (dict(data="{tmp}/empty"), "has no file that ends in"),
    "not text": (dict(data="{tmp}/binary.txt"), "cannot be read as UTF-8"),
    "empty file": (dict(data="{tmp}/empty.txt"), "no example"),
    "broken lines": (dict(data="{tmp}/broken.jsonl"), "cannot be read as json"),
    "broken parquet": (dict(data="{tmp}/broken.parquet"), "cannot be read as parquet"),
    "columns": (dict(data="{tmp}/other.jsonl"), "has the columns a"),
    "numbers": (dict(data="{tmp}/numbers.jsonl"), "is not text"),
    "template": (dict(data="{corpus}/messages.jsonl"), "no chat template"),
    "kinds": (dict(validation="{corpus}/completion.jsonl"), "of kind 'completion'"),
    "share": (dict(validation=1.5), "no share of the data"),
    "nothing to predict": (dict(data="{tmp}/tiny.jsonl", packing="none"), "no token that counts"),
    "output": (dict(output="{corpus}"), "holds something that no training wrote"),
    "parent": (dict(output="{tmp}/no/where"), "parent directory does not exist"),
    "file": (dict(output="{tmp}/empty.txt"), "is not a directory"),
    "depth of a converted one": (dict(depth=dict(num_blocks=2)), "is an AttnRes checkpoint already"),
    "plain of a converted one": (dict(plain=True), "needs the source"),
    "plain with depth": (dict(checkpoint="{plain}", plain=True, depth=dict(mix="sum")), "without depth attention"),
    "unknown depth": (dict(checkpoint="{plain}", depth=dict(blocks=2)), "depth has 'blocks'"),
    "too many blocks": (dict(checkpoint="{plain}", depth=dict(num_blocks=99)), "num_blocks=99"),
    "adapter of a plain one": (dict(checkpoint="{plain}", train="lora"), "convert it first"),
    "no checkpoint": (dict(checkpoint="{tmp}/empty"), "has no config.json"),
    "no such checkpoint": (dict(checkpoint="{tmp}/nowhere"), "does not exist"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, converted: Path, plain: Path, corpus: Path, tmp_path: Path) -> None:
    changes, message = REFUSED[name]
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty.txt", b"")
    write(tmp_path / "binary.txt", b"\xff\xfe\x00")
    write(tmp_path / "broken.jsonl", b'{"text": "a"}\n{"text": ')
    write(tmp_path / "broken.parquet", b"PAR1 no")
    write(tmp_path / "other.jsonl", b'{"a": "b"}\n')
    write(tmp_path / "numbers.jsonl", b'{"text": 1}\n')
    write(tmp_path / "tiny.jsonl", b'{"text": ""}\n')
    places = dict(tmp=tmp_path, corpus=corpus, plain=plain)
    arguments: dict[str, Any] = dict(checkpoint=converted, data=corpus / "text.jsonl", output=tmp_path / "out", **QUICK)
    for key, value in changes.items():
        arguments[key] = value.format(**places) if isinstance(value, str) else value
    with pytest.raises(Exception, match=message) as raised:
        finetune(arguments.pop("checkpoint"), **arguments)
    assert isinstance(raised.value, AttnResError), raised.value


def test_a_late_process_accepts_a_report_that_is_being_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / f".{TRAINING_REPORT}.4711").touch()
    with pytest.raises(TrainingError, match="holds something that no training wrote"):
        check_output(tmp_path)
    monkeypatch.setattr(engine, "process_state", lambda: SimpleNamespace(is_main_process=False))
    check_output(tmp_path)
    with pytest.raises(TrainingError, match="parent directory does not exist"):
        check_output(tmp_path / "no" / "where")


# -- optimizers --------------------------------------------------------------------------------------------------------


def test_groups_of_parameters(converted: Path) -> None:
    model = AttnResForCausalLM.from_pretrained(converted, dtype=torch.float32)
    decayed = {name for name, p in model.named_parameters() if p.ndim == 2 and "depth" not in name}
    groups = parameter_groups(model, decayed, 1.0, 2.0, 0.5, with_muon=True)
    names = {id(p): name for name, p in model.named_parameters()}
    found = [({names[id(p)] for p in group["params"]}, group["lr"], group["weight_decay"]) for group in groups]
    muon, embedding, others, depth = found
    assert sorted(name for part, *_ in found for name in part) == sorted(names.values())
    assert all("proj" in name for name in muon[0])
    assert embedding == ({"model.embed_tokens.weight"}, 1.0, 0.5)
    assert all("norm" in name for name in others[0])
    assert others[2] == 0
    assert depth == ({"model.depth_attention.query", "model.depth_attention.key_norm"}, 2.0, 0.0)


def test_muon_beside_adamw() -> None:
    """Each parameter moves as under its own optimizer alone, also after saving and loading."""
    torch.manual_seed(0)
    start = [torch.randn(4, 3), torch.randn(4)]
    gradients = [[torch.randn_like(t) for t in start] for _ in range(4)]

    def run(parameters: list[torch.Tensor], optimizers: list[Any], steps: range) -> None:
        for i in steps:
            for p, g in zip(parameters, gradients[i]):
                p.grad = g.clone()
            for optimizer in optimizers:
                optimizer.step()

    def groups(parameters: list[torch.Tensor]) -> list[dict[str, Any]]:
        return [
            dict(params=[parameters[0]], lr=0.1, weight_decay=0.1, use_muon=True),
            dict(params=[parameters[1]], lr=0.2, weight_decay=0.0, use_muon=False),
        ]

    expected = [torch.nn.Parameter(t.clone()) for t in start]
    alone = [
        torch.optim.Muon([expected[0]], lr=0.1, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW([expected[1]], lr=0.2, weight_decay=0.0, betas=(0.9, 0.95)),
    ]
    run(expected, alone, range(4))
    actual = [torch.nn.Parameter(t.clone()) for t in start]
    first = make_optimizer(groups(actual))
    run(actual, [first], range(2))
    resumed = [torch.nn.Parameter(p.detach().clone()) for p in actual]
    second = make_optimizer(groups(resumed))
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    run(resumed, [second], range(2, 4))
    run(actual, [first], range(2, 4))
    for a, b, c in zip(expected, actual, resumed):
        torch.testing.assert_close(b, a)
        torch.testing.assert_close(c, a)


# -- from scratch ------------------------------------------------------------------------------------------------------

EXAMPLES = sorted((ROOT / "training" / "examples").glob("*.yaml"))


def scratch(residual: str, corpus: Path, output: Path, **model: Any) -> RunConfig:
    backbone = dict(
        model_type="llama",
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    return RunConfig.from_dict(
        dict(
            output=str(output),
            model=dict(backbone=backbone, tokenizer=str(SOURCE), residual=residual, **model),
            data=dict(train=str(corpus / "text.jsonl"), validation=0.2),
            training=QUICK | dict(learning_rate=1e-2, depth_learning_rate=1e-2),
        )
    )


@pytest.mark.parametrize("residual", ["attnres", *baselines.BASELINES])
def test_from_scratch(residual: str, corpus: Path, tmp_path: Path) -> None:
    """What is compared starts as the plain decoder does, on the same data, and then goes its own way."""
    plain = train(scratch("plain", corpus, tmp_path / "plain"))
    ours = train(scratch(residual, corpus, tmp_path / "ours"))
    assert ours.validation is not None
    assert plain.validation is not None
    assert ours.validation["before"]["loss"] == pytest.approx(plain.validation["before"]["loss"], abs=2e-3)
    assert ours.losses[0][1] == pytest.approx(plain.losses[0][1], abs=2e-3)
    assert ours.losses[-1] != plain.losses[-1]
    assert ours.validation["after"]["loss"] < ours.validation["before"]["loss"]
    assert ours.data == plain.data
    if residual == "attnres":
        assert AttnResForCausalLM.from_pretrained(tmp_path / "ours").config.mix == "mean"
        return
    loaded = baselines.from_pretrained(tmp_path / "ours")
    with torch.no_grad():
        assert loaded(torch.tensor([[5, 6, 7]])).logits.isfinite().all()
    assert any(is_depth_parameter(name) for name, _ in loaded.named_parameters())
    with pytest.raises(ValueError, match="attnres_baseline"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "ours")


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_differ_in_the_residuals_alone(path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(ROOT)
    first, config = (RunConfig.read(p) for p in (EXAMPLES[0], path))
    assert config.data == first.data
    assert config.training == first.training
    assert config.model.backbone == first.model.backbone
    from attnres.training.finetuning import load_tokenizer
    from attnres.training.from_scratch import _backbone, make_model

    backbone = _backbone(config.model, load_tokenizer(config.model.tokenizer))
    backbone.num_hidden_layers, backbone.layer_types = 2, backbone.layer_types[:2]
    assert make_model(backbone, config.model, 0)(torch.tensor([[5, 6, 7]])).logits.shape == (1, 3, 4096)


@pytest.mark.parametrize(
    ("part", "values", "message"),
    [
        ("model", dict(residual="other"), "model.residual='other'"),
        ("model", dict(colour=1), "model has 'colour'"),
        ("model", dict(num_streams=4), "model.num_streams is for"),
        ("model", dict(residual="plain", depth_attention=dict(mix="mean")), "is for residual: attnres"),
        ("model", dict(depth_attention=dict(mix="max")), "mix='max'"),
        ("model", dict(backbone=dict(model_type="nothing")), "makes no configuration"),
        ("model", dict(residual="mhc", num_streams=0, depth_attention={}), "num_streams=0"),
        ("model", dict(tokenizer="nowhere"), "has no tokenizer"),
        ("data", dict(trian="x"), "data has 'trian'"),
        ("training", dict(steps=-1), "steps=-1"),
        ("training", None, "training is None"),
    ],
)
def test_configurations_that_are_refused(part: str, values: Any, message: str, corpus: Path, tmp_path: Path) -> None:
    import yaml

    config = yaml.safe_load((ROOT / "training" / "examples" / "attnres-block.yaml").read_text(encoding="utf-8"))
    config["model"]["tokenizer"] = str(SOURCE)
    config["data"] = dict(train=str(corpus / "text.jsonl"))
    config[part] = None if values is None else config[part] | values
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    with pytest.raises(AttnResError, match=message):
        train(tmp_path / "run.yaml", output=tmp_path / "out")


# -- baselines ---------------------------------------------------------------------------------------------------------

Sublayer = Callable[[torch.Tensor], torch.Tensor]


def sublayers_of(model: Any, input_ids: torch.Tensor) -> tuple[torch.Tensor, list[Sublayer]]:
    """The embedding, and what each sublayer of a Llama adds, as functions of its input; the library's own modules."""
    base = model.model
    positions = torch.arange(input_ids.shape[1])[None]
    embedding = base.embed_tokens(input_ids)
    rope = base.rotary_emb(embedding, positions)
    length = input_ids.shape[1]
    mask = torch.full((length, length), -1e30, dtype=embedding.dtype).triu(1)[None, None]
    functions: list[Sublayer] = []
    for layer in base.layers:
        functions.append(
            lambda h, of=layer: of.self_attn(of.input_layernorm(h), position_embeddings=rope, attention_mask=mask)[0]
        )
        functions.append(lambda h, of=layer: of.mlp(of.post_attention_layernorm(h)))
    return embedding, functions


def dense_former(model: Any, x: torch.Tensor, functions: list[Sublayer]) -> torch.Tensor:
    outputs, y = [x], x
    for index, layer in enumerate(model.model.layers):
        y = y + functions[2 * index](y)
        y = y + functions[2 * index + 1](y)
        outputs.append(y)
        y = sum(w * o for w, o in zip(layer.depth_weights.weight.tolist(), outputs))  # type: ignore[assignment]
    return y


def hyper_connections(model: Any, x: torch.Tensor, functions: list[Sublayer]) -> torch.Tensor:
    """Eq. 2 to 5 and 10 to 13 of arXiv 2409.19606, token by token, as they are written: H is [n, d]."""
    connections = [c for layer in model.model.layers for c in layer.hyper_connections]
    n = connections[0].num_streams
    streams = [[h.expand(n, -1) for h in sequence] for sequence in x]
    for connection, function in zip(connections, functions):
        reads, mixed, writes = [], [], []
        for sequence in streams:
            for h in sequence:
                normed = h / (h.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * connection.norm
                tanh = torch.tanh(normed @ connection.dynamic)
                a_m = connection.scale[0] * tanh[:, :1] + connection.static[:, :1]
                a_r = connection.scale[0] * tanh[:, 1:-1] + connection.static[:, 1:-1]
                b = connection.scale[1] * tanh[:, -1:] + connection.static[:, -1:]
                reads.append((a_m.T @ h)[0])
                mixed.append(a_r.T @ h)
                writes.append(b)
        outputs = function(torch.stack(reads).view(x.shape)).flatten(0, 1)
        flat = [m + b @ o[None] for m, b, o in zip(mixed, writes, outputs)]
        length = x.shape[1]
        streams = [flat[i * length : (i + 1) * length] for i in range(len(streams))]
    return torch.stack([torch.stack([h.mean(0) for h in sequence]) for sequence in streams])


def mhc(model: Any, x: torch.Tensor, functions: list[Sublayer]) -> torch.Tensor:
    """Eq. 3, 7, 8 and 9 of arXiv 2512.24880, token by token."""
    connections = [c for layer in model.model.layers for c in layer.hyper_connections]
    n = connections[0].num_streams
    streams = [h.expand(n, -1) for h in x.flatten(0, 1)]
    for connection, function in zip(connections, functions):
        reads, mixed, writes = [], [], []
        for h in streams:
            flat = h.flatten()
            flat = flat / (flat.pow(2).mean() + 1e-6).sqrt()
            pre, post, res = (flat @ connection.weight).split([n, n, n * n])
            b_pre, b_post, b_res = connection.bias.split([n, n, n * n])
            matrix = (connection.scale[2] * res + b_res).view(n, n).exp()
            for _ in range(20):
                matrix = matrix / matrix.sum(0, keepdim=True)
                matrix = matrix / matrix.sum(1, keepdim=True)
            reads.append(torch.sigmoid(connection.scale[0] * pre + b_pre) @ h)
            mixed.append(matrix @ h)
            writes.append(2 * torch.sigmoid(connection.scale[1] * post + b_post))
        outputs = function(torch.stack(reads).view(x.shape)).flatten(0, 1)
        streams = [m + b[:, None] * o[None] for m, b, o in zip(mixed, writes, outputs)]
    return torch.stack([h.mean(0) for h in streams]).view(x.shape)


REFERENCES = dict(dense_former=dense_former, hyper_connections=hyper_connections, mhc=mhc)


@pytest.mark.parametrize("kind", REFERENCES)
def test_baseline_equals_its_reference(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = baselines.from_config(tiny_config("llama", num_hidden_layers=3), kind).double().eval()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if is_depth_parameter(name):
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    input_ids = torch.randint(3, 60, (2, 7), generator=generator)
    # The library's RMSNorm takes its statistics in float32; in both, so what is compared is what stands between.
    with torch.no_grad():
        embedding, functions = sublayers_of(model, input_ids)
        expected = model.model.norm(REFERENCES[kind](model, embedding, functions))
        actual = model.model(input_ids).last_hidden_state
    torch.testing.assert_close(actual, expected, atol=1e-6, rtol=1e-6)
    baselines.save_pretrained(model.float(), tmp_path / kind)
    loaded = baselines.from_pretrained(tmp_path / kind)
    with torch.no_grad():
        assert torch.equal(loaded(input_ids).logits, model(input_ids).logits)
    assert sorted(loaded.state_dict()) == sorted(model.state_dict())


@pytest.mark.parametrize("kind", REFERENCES)
@pytest.mark.parametrize("family", ["gemma2", "qwen3_moe", "kimi_linear", "gpt_neox", "minimax"])
def test_baseline_starts_as_any_decoder(kind: str, family: str) -> None:
    from tiny import random_tokens, tiny_model

    plain = tiny_model(family)
    model = baselines.from_config(plain.config, kind).float().eval()
    missing, unexpected = model.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected
    assert missing
    with torch.no_grad():
        torch.testing.assert_close(model(random_tokens()).logits, plain(random_tokens()).logits, atol=2e-5, rtol=2e-5)
    model.train()
    model.gradient_checkpointing_enable()
    model(random_tokens(), labels=random_tokens(), use_cache=False).loss.backward()
    learned = [p.grad for name, p in model.named_parameters() if is_depth_parameter(name)]
    assert learned
    assert all(grad is not None and grad.isfinite().all() for grad in learned)


def test_sinkhorn_gives_doubly_stochastic_matrices() -> None:
    matrix = sinkhorn(torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(0)).double() * 3)
    torch.testing.assert_close(matrix.sum(-1), torch.ones(3, 4, dtype=torch.float64))
    torch.testing.assert_close(matrix.sum(-2), torch.ones(3, 4, dtype=torch.float64), atol=1e-2, rtol=0)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("none", {}, "'none' is no baseline"),
        ("dense_former", dict(num_streams=2), "has no streams"),
        ("mhc", dict(num_streams=99), "num_streams=99"),
    ],
)
def test_baselines_that_are_refused(kind: str, options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=message):
        baselines.from_config(tiny_config("llama"), kind, **options)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(TrainingError, match="is no configuration of a baseline"):
        baselines.from_pretrained(tmp_path)


def test_defaults_are_those_of_the_command() -> None:
    """The command repeats defaults of [`TrainingSettings`] for its help."""
    import inspect

    from attnres import cli

    settings = TrainingSettings()
    parameters = inspect.signature(cli.finetune).parameters
    for name in TrainingSettings.__dataclass_fields__:
        default = parameters[name].default
        assert getattr(default, "value", default) == getattr(settings, name), name
