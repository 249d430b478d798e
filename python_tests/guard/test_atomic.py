"""Files that are whole or absent, and what killed and competing writers leave."""

import errno
import fcntl
import os
import resource
import stat
import threading

import pytest
import torch

from guardspace_kernels.guard import atomic
from guardspace_kernels.guard.atomic import locked, staged, write_atomic, write_text
from guardspace_kernels.guard.files import save_tensors


def test_a_write_that_raises_midway_leaves_what_was_there(tmp_path):
    target = tmp_path / "file.bin"
    target.write_bytes(b"old")

    def write(file):
        file.write(b"half of the n")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        write_atomic(target, write)
    assert target.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file.bin"]
    with pytest.raises(RuntimeError, match="disk full"):
        write_atomic(tmp_path / "new.bin", write)
    assert os.listdir(tmp_path) == ["file.bin"]


def test_the_target_never_holds_a_part(tmp_path):
    target = tmp_path / "file.bin"
    target.write_bytes(b"old")

    def write(file):
        temporary, _ = sorted(os.listdir(tmp_path))  # beside it: os.replace is atomic within one file system
        assert temporary.startswith(".file.bin.")
        file.write(b"new")
        file.flush()
        assert target.read_bytes() == b"old"

    write_atomic(target, write)
    assert target.read_bytes() == b"new"


def test_a_full_disk_leaves_the_target_and_is_named(tmp_path):
    target = tmp_path / "file.bin"
    save_tensors(target, "thing", {"t": torch.ones(10)}, {})
    before = target.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"file\.bin") as raised:
            save_tensors(target, "thing", {"t": torch.ones(100_000)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert raised.value.errno == errno.EFBIG
    assert target.read_bytes() == before and os.listdir(tmp_path) == ["file.bin"]


def test_a_folder_in_its_place_is_named(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(IsADirectoryError, match=r"it is a folder, a file was to be written: '.*/a'"):
        write_text(tmp_path / "a", "x")
    (tmp_path / "file").write_text("x")
    with pytest.raises(NotADirectoryError, match="file"):
        write_text(tmp_path / "file" / "b", "x")
    assert sorted(os.listdir(tmp_path)) == ["a", "file"]


def test_bare_names_and_missing_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_text("bare.txt", "Σ")
    write_text(tmp_path / "a" / "b" / "c.txt", "x")
    assert (tmp_path / "bare.txt").read_text(encoding="utf-8") == "Σ"
    assert (tmp_path / "a" / "b" / "c.txt").read_text() == "x"


def test_file_and_folder_are_on_the_disk_before_and_after_the_rename(tmp_path, monkeypatch):
    steps = []
    fsync, replace = os.fsync, os.replace

    def synced(descriptor):
        kind = "folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else os.fstat(descriptor).st_size
        steps.append(kind)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", lambda *names: (steps.append("rename"), replace(*names)))
    write_text(tmp_path / "x", "12345")
    assert steps == [5, "rename", "folder"]
    steps.clear()
    write_text(tmp_path / "a" / "b" / "x", "12345")  # the names of new folders too
    assert steps == ["folder", "folder", 5, "rename", "folder"]


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_modes_are_those_of_any_new_file(tmp_path, umask):
    before = os.umask(umask)
    try:
        write_text(tmp_path / "a", "x")
        save_tensors(tmp_path / "b", "thing", {"t": torch.ones(1)}, {})
    finally:
        os.umask(before)
    for name in "ab":
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o666 & ~umask


def test_links_are_replaced_and_never_written_through(tmp_path, monkeypatch):
    victim, target = tmp_path / "victim", tmp_path / "out" / "file"
    victim.write_text("mine")
    target.parent.mkdir()
    target.symlink_to(victim)
    write_text(target, "new")
    assert victim.read_text() == "mine" and target.read_text() == "new" and not target.is_symlink()
    # One at the temporary name, were it guessed: another name is taken.
    names = iter(["0" * 16, "0" * 16, "1" * 16])
    monkeypatch.setattr(atomic.secrets, "token_hex", lambda _: next(names))
    planted = target.parent / f".file.{'0' * 16}.tmp"
    planted.symlink_to(victim)
    write_text(target, "newer")
    assert victim.read_text() == "mine" and target.read_text() == "newer" and planted.is_symlink()
    assert next(names, None) is None


def test_temporary_names_are_unpredictable(tmp_path):
    with staged(tmp_path / "x") as a, staged(tmp_path / "x") as b:
        assert a.temporary != b.temporary and str(os.getpid()) not in a.temporary.name


def test_what_killed_writers_left_is_removed_at_the_next_write(tmp_path):
    abandoned = [".x.4711.tmp", f".x.{'ab' * 8}.tmp"]  # of earlier versions too
    others = [".x.tmp", ".x.backup.tmp", f".y.{'ab' * 8}.tmp", f"x.{'ab' * 8}.tmp", ".x.4711.tmp2"]
    for name in abandoned + others:
        (tmp_path / name).write_text("half")
    held = f".x.{'cd' * 8}.tmp"  # of one that lives
    with open(tmp_path / held, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        write_text(tmp_path / "x", "new")
    assert sorted(os.listdir(tmp_path)) == sorted([*others, held, "x"])
    write_text(tmp_path / "x", "new")
    assert sorted(os.listdir(tmp_path)) == sorted([*others, "x"])


def test_a_writer_that_is_killed_leaves_the_target_and_no_rest(tmp_path):
    target = tmp_path / "x"
    write_text(target, "old")
    for child_writes in (0, 3):
        child = os.fork()
        if child == 0:
            with staged(target) as new:
                new.file.write(b"n" * child_writes)
                new.flush()
                os._exit(1)
        os.waitpid(child, 0)
        assert target.read_text() == "old" and len(os.listdir(tmp_path)) == 2
        with staged(target) as new:
            assert len(os.listdir(tmp_path)) == 2  # only our own
        assert os.listdir(tmp_path) == ["x"]


def test_a_temporary_file_that_is_removed_before_it_is_locked_is_made_again(tmp_path, monkeypatch):
    made, lock = [], atomic._lock

    def late(descriptor, operation):
        if not made:
            made.extend(tmp_path.glob(".x.*"))
            made[0].unlink()
        return lock(descriptor, operation)

    monkeypatch.setattr(atomic, "_lock", late)
    write_text(tmp_path / "x", "new")
    assert made and (tmp_path / "x").read_text() == "new" and os.listdir(tmp_path) == ["x"]


def test_many_writers_and_readers_of_one_path(tmp_path):
    """One whole result wins, every reader sees a whole one, nothing fails and nothing is left."""
    target, failures = tmp_path / "x", []
    write_text(target, "0" * 5000)

    def run(work):
        try:
            for _ in range(40):
                work()
        except Exception as error:
            failures.append(error)

    def read():
        text = target.read_text()
        assert len(text) == 5000 and len(set(text)) == 1

    writers = [lambda digit=str(i): write_text(target, digit * 5000) for i in range(6)]
    threads = [threading.Thread(target=run, args=(work,)) for work in [*writers, read, read]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and os.listdir(tmp_path) == ["x"]


def test_locks_of_a_folder(tmp_path):
    order, inside = [], threading.Event()

    def wait(shared, name):
        with locked(tmp_path, shared=shared):
            order.append(name)

    with locked(tmp_path, shared=True):
        wait(True, "a reader beside a reader")
        thread = threading.Thread(target=wait, args=(False, "writer"))
        thread.start()
        assert not inside.wait(0.05)
        order.append("reader")
    thread.join()
    assert order == ["a reader beside a reader", "reader", "writer"]


def test_file_systems_without_locks(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(atomic.fcntl, "flock", refuse)
    left = tmp_path / ".x.4711.tmp"
    left.write_text("half")
    write_text(tmp_path / "x", "new")
    assert (tmp_path / "x").read_text() == "new" and left.exists()  # its writer may be alive
    with locked(tmp_path):
        pass
