"""Folders of a cache: damage is found and mended, one process builds for all, what the dead have left is deleted."""

import os
import signal
import socket
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path

import pytest

from comol_ds.data.verified_folder import MANIFEST, fault_of, open_folder

KEY, OTHER = "0a" * 16, "0b" * 16
CONTENT = bytes(range(256)) * 40
FORK = get_context("fork")


def build(built: Path, scratch: Path) -> dict:
    (built / "part").mkdir(parents=True)
    (built / "part" / "tokens").write_bytes(CONTENT)
    (built / "state").write_text("{}")
    return {"stamp": "s"}


def build_never(built: Path, scratch: Path) -> dict:
    raise AssertionError("built again")


def opened(root: Path, build: Callable = build, outdated: bool = False) -> Path:
    folder, facts = open_folder(root, KEY, build, lambda folder: outdated)
    assert facts == {"stamp": "s"}
    assert (folder / "part" / "tokens").read_bytes() == CONTENT
    return folder


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_what_was_built_is_found_again(tmp_path):
    folder = opened(tmp_path)
    assert fault_of(folder) is None
    assert opened(tmp_path, build_never) == folder
    assert names(tmp_path) == [KEY, f"{KEY}.lock"]


def zero_the_middle(folder: Path) -> str:
    with (folder / "part" / "tokens").open("r+b") as file:
        file.seek(5000)
        file.write(bytes(200))
    return "the content of part/tokens has changed"


def cut(folder: Path) -> str:
    os.truncate(folder / "part" / "tokens", 5000)
    return f"part/tokens has 5000 of {len(CONTENT)} bytes"


def remove(folder: Path) -> str:
    (folder / "state").unlink()
    return "state: No such file or directory"


def cut_manifest(folder: Path) -> str:
    os.truncate(folder / MANIFEST, 20)
    return "manifest.json is missing or damaged"


def empty_manifest(folder: Path) -> str:
    (folder / MANIFEST).write_text("{}")
    return "manifest.json is missing or damaged"


@pytest.mark.parametrize("damage", [zero_the_middle, cut, remove, cut_manifest, empty_manifest])
def test_damage_is_mended_with_one_line(damage, tmp_path, capsys):
    folder = opened(tmp_path)
    fault = damage(folder)
    assert capsys.readouterr().out == ""
    opened(tmp_path)
    assert capsys.readouterr().out == f"{folder} is not what was written ({fault}) and is built again\n"
    opened(tmp_path, build_never)
    assert names(tmp_path) == [KEY, f"{KEY}.lock"]


def test_what_is_outdated_is_replaced_without_a_line(tmp_path, capsys):
    opened(tmp_path)
    with pytest.raises(AssertionError, match="built again"):
        opened(tmp_path, build_never, outdated=True)
    assert opened(tmp_path, build_never).exists(), "a build that fails leaves the old one"
    opened(tmp_path, outdated=True)
    assert capsys.readouterr().out == ""
    assert names(tmp_path) == [KEY, f"{KEY}.lock"]


def build_slowly(built: Path, scratch: Path) -> dict:
    (scratch / "started").touch()
    (built.parent.parent / f"built_by_{os.getpid()}").touch()
    time.sleep(1.0)
    return build(built, scratch)


def test_of_several_processes_one_builds(tmp_path):
    processes = [FORK.Process(target=opened, args=(tmp_path, build_slowly)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert len(list(tmp_path.glob("built_by_*"))) == 1


def build_and_die(built: Path, scratch: Path) -> dict:
    """With a child that lives on, as the processes that tokenize do."""
    child = FORK.Process(target=time.sleep, args=(60,))
    child.start()
    (built.parent.parent / "child").write_text(str(child.pid))
    os.kill(os.getpid(), signal.SIGKILL)


def building(root: Path) -> list[Path]:
    return list(root.glob("building-*"))


def test_what_another_host_has_finished_meanwhile_is_kept(tmp_path, monkeypatch):
    found = []

    def build_later(built: Path, scratch: Path) -> dict:
        with monkeypatch.context() as other:
            other.setattr(socket, "gethostname", lambda: "another-host")
            found.append((opened(tmp_path) / "state").stat().st_ino)
        return build(built, scratch)

    assert (opened(tmp_path, build_later) / "state").stat().st_ino == found[0]
    assert names(tmp_path) == [KEY, f"{KEY}.lock"]


def test_a_lock_that_cannot_be_opened_keeps_what_it_guards(tmp_path):
    (tmp_path / f"{OTHER}.lock").mkdir()  # as for root another user's file cannot be
    abandoned = tmp_path / f"building-{OTHER}-{socket.gethostname()}-17"
    abandoned.mkdir()
    opened(tmp_path)
    assert abandoned.exists()


@pytest.mark.parametrize("key", [KEY, OTHER])
def test_what_a_killed_process_was_building_is_deleted(key, tmp_path):
    process = FORK.Process(target=open_folder, args=(tmp_path, key, build_and_die, lambda folder: False))
    process.start()
    process.join()
    child = int((tmp_path / "child").read_text())
    try:
        assert process.exitcode == -signal.SIGKILL
        assert [path.name for path in building(tmp_path)] == [f"building-{key}-{socket.gethostname()}-{process.pid}"]
        opened(tmp_path)
        assert building(tmp_path) == []
        assert Path(f"/proc/{child}").exists()
    finally:
        os.kill(child, signal.SIGKILL)


def test_what_a_living_process_or_another_host_builds_is_left_alone(tmp_path):
    elsewhere = [tmp_path / f"building-{OTHER}-another-host-17", tmp_path / "building-notes"]
    for folder in elsewhere:
        folder.mkdir()
    process = FORK.Process(target=open_folder, args=(tmp_path, OTHER, build_slowly, lambda folder: False))
    process.start()
    try:
        end = time.monotonic() + 20
        while not list(tmp_path.glob("building-*/scratch/started")) and time.monotonic() < end:
            time.sleep(0.01)
        living = list(tmp_path.glob("building-*/scratch/started"))
        assert len(living) == 1
        opened(tmp_path)
        assert living[0].exists()
    finally:
        process.join(30)
    assert process.exitcode == 0
    assert sorted(building(tmp_path)) == sorted(elsewhere)
