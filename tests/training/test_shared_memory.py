"""Buffers in shared memory: deleted once nobody has them mapped, and never another user's or a living run's."""

import mmap
import os
import tempfile
import time
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from comol_ds.parallel import shared_memory
from comol_ds.parallel.shared_memory import remove_abandoned_buffers, remove_own_buffers


@pytest.fixture
def folder(monkeypatch):
    """In shared memory itself, where the inode of a file is that of its mapping."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        monkeypatch.setattr(shared_memory, "_FOLDER", Path(name))
        yield Path(name)


def buffer(folder: Path, port: int, rank: int, age: float = 60) -> Path:
    file = folder / f"deepspeed_allreduce_buffer_{os.getuid()}_127.0.0.1_{port}_{rank}"
    file.write_bytes(bytes(mmap.PAGESIZE))
    os.utime(file, (time.time() - age,) * 2)
    return file


def hold(file: Path, ready: Connection) -> None:
    with file.open("r+b") as content, mmap.mmap(content.fileno(), mmap.PAGESIZE):
        ready.send(True)
        time.sleep(60)


def test_what_no_process_has_mapped_is_deleted(folder):
    abandoned = [buffer(folder, 20017, rank) for rank in range(2)]
    others = [folder / "notes_20017_0", folder / "deepspeed_notes"]
    for file in others:
        file.touch()
        os.utime(file, (0, 0))
    assert sorted(remove_abandoned_buffers()) == abandoned
    assert sorted(folder.iterdir()) == sorted(others)


def test_a_buffer_that_its_run_deletes_meanwhile_is_passed_over(folder, monkeypatch):
    gone, abandoned = buffer(folder, 20017, 0), buffer(folder, 20017, 1)
    found = shared_memory._buffers()
    monkeypatch.setattr(shared_memory, "_buffers", lambda: found)
    gone.unlink()
    assert remove_abandoned_buffers() == [abandoned]


def test_a_living_runs_buffer_stays_until_the_run_is_killed(folder):
    file, context = buffer(folder, 20017, 0), get_context("fork")
    told, ready = context.Pipe(duplex=False)
    holder = context.Process(target=hold, args=(file, ready))
    holder.start()
    try:
        assert told.poll(10)
        assert remove_abandoned_buffers() == []
        assert file.exists()
    finally:
        holder.kill()
    holder.join(10)
    assert remove_abandoned_buffers() == [file]


def test_a_buffer_that_was_just_created_stays(folder):
    """Its owner, or one that is to read it, may be about to map it."""
    file = buffer(folder, 20017, 0, age=0)
    assert remove_abandoned_buffers() == []
    assert file.exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a file another user's")
def test_another_users_buffer_stays(folder):
    file = buffer(folder, 20017, 0)
    os.chown(file, 12345, 12345)
    assert remove_abandoned_buffers() == []
    assert file.exists()


def test_a_rank_that_ends_deletes_its_own_alone(folder):
    files = [buffer(folder, port, rank) for port, rank in ((20017, 0), (20017, 1), (20018, 1), (120017, 1))]
    remove_own_buffers(20017, 1)
    assert sorted(folder.iterdir()) == sorted([files[0], *files[2:]])
