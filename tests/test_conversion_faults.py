"""Whatever happens while a checkpoint is converted: the destination is whole or absent, the source as it was."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from checkpoints import make_source, snapshot

from attnres import AttnResForCausalLM, cli, convert
from attnres.conversion import ConversionError, converter, delivery

STEPS = ("_write_depth_shard", "_link_shards", "_write_index", "write_config_and_code", "check_complete", "compare")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    source = make_source(tmp_path / "source")
    (source / "LICENSE").write_text("the licence")
    return source


def before_step(step: str, happens: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Something happens when a conversion has come as far as `step`."""
    original = getattr(converter, step)

    def interrupted(*arguments: Any) -> Any:
        happens()
        return original(*arguments)

    monkeypatch.setattr(converter, step, interrupted)


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [*STEPS, "deliver"])
def test_a_conversion_that_fails_leaves_nothing(source: Path, step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise OSError(errno.EIO, "Input/output error")

    before_step(step, fail, monkeypatch)
    before = snapshot(source)
    with pytest.raises(ConversionError, match="Input/output error"):
        convert(source, source.parent / "converted")
    assert snapshot(source) == before
    assert [path.name for path in source.parent.iterdir()] == ["source"]


@pytest.mark.parametrize("missing", ["*", "config.json", "*.safetensors", "LICENSE"])
@pytest.mark.parametrize("step", STEPS)
def test_a_source_that_vanishes(source: Path, step: str, missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A conversion that has all it needs already may finish; any other leaves nothing."""
    before_step(step, lambda: [path.unlink(missing_ok=True) for path in source.glob(missing)], monkeypatch)
    destination = source.parent / "converted"
    try:
        convert(source, destination, num_blocks=3)
    except ConversionError:
        assert [path.name for path in source.parent.iterdir()] == ["source"]
    else:
        assert (destination / "LICENSE").read_text() == "the licence"
        AttnResForCausalLM.from_pretrained(destination)
    needs_it = missing in ("*", "*.safetensors")  # small files are read once, before the first of these steps
    assert destination.exists() is not needs_it


# -- the disk ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of 4 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk], capture_output=True, text=True)
    if mount.returncode:
        pytest.skip(f"only root may mount a file system: {mount.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


def remount(disk: Path, option: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{option}", disk], check=True)


def test_full_disk(source: Path, disk: Path) -> None:
    before = snapshot(source)
    report = convert(source, disk / "converted", verify="none")
    assert report.bytes_copied == (source / "model.safetensors").stat().st_size
    needed = sum(path.stat().st_size for path in (disk / "converted").rglob("*"))
    shutil.rmtree(disk / "converted")
    available = shutil.disk_usage(disk).free
    for free in range(0, needed, needed // 20):  # full at one file after another
        (disk / "ballast").write_bytes(bytes(available - free))
        with pytest.raises(ConversionError, match="No space left on device"):
            convert(source, disk / "converted", verify="none")
        assert [path.name for path in disk.iterdir()] == ["ballast"]
        (disk / "ballast").unlink()
    for inodes in (1, 3, 8):
        remount(disk, f"nr_inodes={inodes}")
        with pytest.raises(ConversionError, match="No space left on device"):
            convert(source, disk / "converted", verify="none")
        assert not list(disk.iterdir())
    remount(disk, "nr_inodes=1000")
    convert(source, disk / "converted")
    assert [path.name for path in disk.iterdir()] == ["converted"]
    assert snapshot(source) == before


def test_read_only_disk(source: Path, disk: Path) -> None:
    remount(disk, "ro")
    with pytest.raises(ConversionError, match="converted cannot be written: .*Read-only file system"):
        convert(source, disk / "converted")
    assert not list(disk.iterdir())


def test_read_only_source(source: Path, disk: Path) -> None:
    shutil.copytree(source, disk / "source")
    remount(disk, "ro")
    before = snapshot(disk)
    convert(disk / "source", source.parent / "converted")
    assert snapshot(disk) == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_everything_is_on_disk_before_it_appears(
    source: Path, overwrite: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut leaves what was synced: so all files and directories are, then the rename, then its directory."""
    destination = source.parent / "converted"
    if overwrite:
        convert(source, destination, verify="none")
    fsync, rename, rmtree = os.fsync, os.rename, shutil.rmtree
    events: list[tuple[str, Path]] = []
    synced: dict[str, int] = {}

    def record_sync(descriptor: int) -> None:
        fsync(descriptor)
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        events.append(("sync", path))
        synced[path.name] = path.stat().st_mtime_ns

    def record_rename(old: Path, new: Path) -> None:
        rename(old, new)
        events.append(("rename", Path(new)))

    def record_removal(path: Path, **options: Any) -> None:
        if Path(path).exists() and Path(path).is_relative_to(source.parent):
            events.append(("remove", Path(path)))
        rmtree(path, **options)

    monkeypatch.setattr(os, "fsync", record_sync)
    monkeypatch.setattr(os, "rename", record_rename)
    monkeypatch.setattr(shutil, "rmtree", record_removal)
    convert(source, destination, verify="none", overwrite=overwrite)
    appeared = events.index(("rename", destination))
    stage = next(path for kind, path in events if kind == "sync").parent
    last = [("rename", stage.with_name(stage.name + ".replaced")), ("rename", destination), ("sync", source.parent)]
    expected = [*last, ("remove", stage.with_name(stage.name + ".replaced"))] if overwrite else last[1:]
    assert events[-len(expected) :] == expected
    files = {path.name for path in destination.rglob("*")}
    assert {path.name for kind, path in events[:appeared] if kind == "sync"} == {*files, stage.name}
    for path in destination.rglob("*"):
        assert path.stat().st_mtime_ns == synced[path.name], f"{path.name} was written after it was synced"


# -- replacing a checkpoint --------------------------------------------------------------------------------------------


def test_a_failed_replacement_keeps_the_old_checkpoint(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    destination = source.parent / "converted"
    convert(source, destination, block_size=2, verify="none")
    before = snapshot(destination)
    rename = Path.rename

    def fail_to_deliver(self: Path, target: Path) -> Path:
        if Path(target) == destination and ".replaced" not in self.name:
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_to_deliver)
    with pytest.raises(ConversionError, match="Input/output error"):
        convert(source, destination, block_size=4, verify="none", overwrite=True)
    assert snapshot(destination) == before
    assert sorted(path.name for path in source.parent.iterdir()) == ["converted", "source"]


def test_an_interrupted_replacement_loses_nothing(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C between the two renames puts the old checkpoint back; after SIGKILL the next conversion does."""
    destination = source.parent / "converted"
    convert(source, destination, block_size=2, verify="none")
    before = snapshot(destination)
    rename = Path.rename

    def interrupt(self: Path, target: Path) -> Path:
        if Path(target) == destination and ".replaced" not in self.name:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupt)
    with pytest.raises(KeyboardInterrupt):
        convert(source, destination, block_size=4, verify="none", overwrite=True)
    monkeypatch.undo()
    assert snapshot(destination) == before
    destination.rename(source.parent / ".converted.attnres-abcd1234.replaced")  # as SIGKILL would leave it
    with pytest.raises(ConversionError, match="exists"):
        convert(source, destination, block_size=4, verify="none")
    assert snapshot(destination) == before
    assert sorted(path.name for path in source.parent.iterdir()) == ["converted", "source"]


def test_a_destination_that_appears_meanwhile_is_kept(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = converter._link_shards

    def link_and_make(*arguments: Any) -> Any:
        (source.parent / "converted").mkdir()
        (source.parent / "converted" / "thesis.tex").write_text("years of work")
        return link(*arguments)

    monkeypatch.setattr(converter, "_link_shards", link_and_make)
    with pytest.raises(ConversionError, match="exists"):
        convert(source, source.parent / "converted", verify="none")
    assert (source.parent / "converted" / "thesis.tex").read_text() == "years of work"


def test_neighbours_with_similar_names_are_left_alone(source: Path) -> None:
    notes = source.parent / ".converted.attnres-notes"
    notes.mkdir()
    (source.parent / ".converted.attnres-abcd1234").write_text("a file")
    convert(source, source.parent / "converted", verify="none")
    assert notes.exists()
    assert (source.parent / ".converted.attnres-abcd1234").exists()


PLANTED: list[tuple[str, Callable[[Path], Any]]] = [
    ("nothing in it", lambda path: None),
    ("a file", lambda path: (path / "thesis.tex").write_text("years of work")),
    ("a report alone", lambda path: (path / delivery.REPORT).write_text("{}")),
    ("a report of nothing", lambda path: (path / delivery.REPORT).write_text('{"files": 3}')),
    ("a report of less", lambda path: planted_model(path, {})),
    ("a report of other bytes", lambda path: planted_model(path, {"config.json": "0" * 64})),
    ("a link for a report", lambda path: (path / delivery.REPORT).symlink_to("/etc/hostname")),
    ("a FIFO for a report", lambda path: os.mkfifo(path / delivery.REPORT)),
    ("a directory for a report", lambda path: (path / delivery.REPORT).mkdir()),
    ("of another user", lambda path: (planted_model(path, None), os.chown(path, 12345, 12345))),
]


def planted_model(path: Path, files: dict[str, str] | None) -> None:
    (path / "config.json").write_text("{}")
    files = delivery.written_files(path) if files is None else files
    (path / delivery.REPORT).write_text(json.dumps({"files": files}))


@pytest.mark.parametrize("plant", [case[1] for case in PLANTED], ids=[case[0] for case in PLANTED])
def test_what_others_planted_does_not_become_the_destination(source: Path, plant: Callable[[Path], Any]) -> None:
    planted = source.parent / ".converted.attnres-abcd1234.replaced"
    planted.mkdir()
    try:
        plant(planted)
    except PermissionError:
        pytest.skip("only root gives files away")
    before = snapshot(planted)
    report = convert(source, source.parent / "converted", verify="none")
    assert json.loads((source.parent / "converted" / delivery.REPORT).read_text())["source"] == report.source
    assert snapshot(planted) == before


# -- signals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", STEPS)
def test_sigterm_cleans_up_at_once(source: Path, step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before_step(step, lambda: os.kill(os.getpid(), signal.SIGTERM), monkeypatch)
    before = snapshot(source)
    monkeypatch.setattr(sys, "argv", ["attnres", "convert", str(source), str(source.parent / "converted")])
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as stopped:
            cli.main()
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert stopped.value.code == 128 + signal.SIGTERM
    assert snapshot(source) == before
    assert [path.name for path in source.parent.iterdir()] == ["source"]


INTERRUPTIONS = [
    *((number, "once") for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGINT)),
    *((number, "again while it cleans up") for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGINT)),
    *((number, "three times while it cleans up") for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGINT)),
    (signal.SIGTERM, "another while it cleans up"),
]

INTERRUPTED = """
import os, shutil, signal, sys
from attnres import cli
from attnres.conversion import converter
number, again = int(sys.argv[1]), sys.argv[2]
signal.signal(signal.SIGINT, signal.default_int_handler)
write, remove = converter._write_index, shutil.rmtree
times = {"once": 0, "again while it cleans up": 1, "three times while it cleans up": 3}.get(again, 1)
def interrupted(*arguments):
    def removed(*arguments, **options):
        for _ in range(times):
            os.kill(os.getpid(), signal.SIGHUP if "another" in again else number)
        remove(*arguments, **options)
    shutil.rmtree = removed
    os.kill(os.getpid(), number)
    return write(*arguments)
converter._write_index = interrupted
sys.argv = ["attnres", "convert", "source", "converted", "--verify", "none"]
cli.main()
"""


@pytest.mark.parametrize(("number", "again"), INTERRUPTIONS)
def test_signals_leave_nothing(source: Path, number: signal.Signals, again: str) -> None:
    before = snapshot(source)
    command = [sys.executable, "-c", INTERRUPTED, str(int(number)), again]
    result = subprocess.run(command, cwd=source.parent, capture_output=True, timeout=120)
    assert result.returncode != 0
    assert snapshot(source) == before
    assert [path.name for path in source.parent.iterdir()] == ["source"]


def test_killed_at_50_random_moments(tmp_path: Path) -> None:
    """By SIGKILL and by SIGTERM; and two conversions at once. What must hold is asserted in the program."""
    program = [sys.executable, Path(__file__).with_name("kill_conversions.py"), tmp_path, "50"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    seen = json.loads(subprocess.run(program, check=True, env=environment, stdout=subprocess.PIPE, text=True).stdout)
    assert seen["absent"] >= 30, "nearly all had finished before they were killed"
    assert seen["left behind by SIGKILL"] >= 3, "nothing was there to be cleared up"
    assert seen["left behind by SIGTERM"] <= 2, "SIGTERM is a chance to clean up"
