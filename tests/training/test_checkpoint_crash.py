"""A checkpoint that is cut off while it is written: the old one or the new one is complete."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small import Run, command

from memorizing_transformers.errors import UserError
from memorizing_transformers.training import locks
from memorizing_transformers.training.checkpoint import folder as checkpoints
from memorizing_transformers.training.checkpoint.rank_state import RankPart


def staged(checkpoint: Path, target: Path, number: int, step: int) -> Path:
    """A complete staging folder for a target."""
    staging = checkpoints.staging_folder(target, "run", number)
    manifest = checkpoints.read_manifest(checkpoint)
    shutil.copytree(checkpoint, staging)
    info = {**manifest, "step": step, "written": manifest["written"] + 1}
    sealed = {**info, "seal": checkpoints._seal(info)}
    (staging / "manifest.json").write_text(json.dumps(sealed))
    return staging


class Cut(BaseException):
    """The process ends here."""


def cut_after(monkeypatch: pytest.MonkeyPatch, calls: int) -> None:
    """Let so many changes of the disk happen, then no more."""
    left = calls

    def counted(function):  # type: ignore[no-untyped-def]
        def call(*args, **kwargs):  # type: ignore[no-untyped-def]
            nonlocal left
            left -= 1
            if left < 0:
                raise Cut
            return function(*args, **kwargs)

        return call

    for name in ("rename", "unlink", "rmdir", "mkdir", "symlink_to"):
        monkeypatch.setattr(Path, name, counted(getattr(Path, name)))
    monkeypatch.setattr(shutil, "rmtree", counted(shutil.rmtree))


BEFORE = ["nothing", "old", "old and its old", "only the old's old", "reserved over it", "link"]


@pytest.mark.parametrize("before", BEFORE)
def test_a_cut_anywhere_leaves_the_old_one_or_the_new_one(
    checkpoint: Path, tmp_path: Path, before: str
) -> None:
    """Whatever an earlier crash has left under the names of the target."""
    finished = False
    for cut in range(12):
        home = tmp_path / f"cut{cut}"
        target, old = home / "last.ckpt", home / ".last.ckpt.replaced"
        home.mkdir()
        if before in ("old", "old and its old"):
            shutil.copytree(checkpoint, target)
        if before in ("old and its old", "only the old's old", "reserved over it"):
            shutil.copytree(checkpoint, old)
        if before == "reserved over it":
            checkpoints.reserve(target)
        if before == "link":
            shutil.copytree(checkpoint, home / "best.ckpt")
            target.symlink_to("best.ckpt")
        staging = staged(checkpoint, target, cut, step=25)
        with pytest.MonkeyPatch.context() as patch:
            cut_after(patch, cut)
            try:
                checkpoints.put_in_place(staging, target)
                finished = True
            except Cut:
                finished = False
        good = checkpoints.newest_good(home)
        if before != "nothing" or finished:
            assert good is not None, f"nothing whole after {cut} changes"
            step = checkpoints.verify(good)["step"]
            assert step in ((25,) if finished else (24, 25))
        if before == "link":
            assert checkpoints.verify(home / "best.ckpt")["step"] == 24
        checkpoints.clean_leftovers(home)
        assert (checkpoints.newest_good(home) is not None) == (good is not None)
        if finished:
            assert target.is_dir()
            assert not target.is_symlink()
            assert not old.exists()
    assert finished


def test_removing_a_link_leaves_what_it_names(checkpoint: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.ckpt"
    link.symlink_to(checkpoint)
    checkpoints.remove(link)
    assert not link.is_symlink()
    checkpoints.verify(checkpoint)
    checkpoints.remove(tmp_path / "nowhere.ckpt")
    checkpoints.remove(checkpoint)
    assert not checkpoint.exists()


def test_the_newest_is_what_was_written_last_whatever_its_step(
    checkpoint: Path, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    for number, step in enumerate((4, 16, 10)):
        target = home / "a" / f"step={step}" / "x.ckpt"
        target.parent.mkdir(parents=True)
        staging = tmp_path / f"staging{number}"
        shutil.copytree(checkpoint, staging)
        (staging / "manifest.json").unlink()
        parts = [path for path in staging.iterdir() if path.name != "manifest.json"]
        checkpoints.mark_done(staging, 0, parts)
        checkpoints.finish(staging, target, 1, {"step": step})
    steps = [checkpoints.read_manifest(path)["step"] for path in checkpoints.candidates(home)]
    assert steps == [10, 16, 4]


def test_checkpoints_without_the_time_of_writing_are_told_apart_by_their_files(
    checkpoint: Path, tmp_path: Path
) -> None:
    manifest = checkpoints.read_manifest(checkpoint)
    for name, when, step in (("a", 3 * 10**9, 9), ("b", 4 * 10**9, 5)):
        copy = tmp_path / "home" / f"{name}.ckpt"
        shutil.copytree(checkpoint, copy)
        plain = {k: v for k, v in manifest.items() if k not in ("written", "run", "seal")}
        plain["step"] = step
        file = copy / "manifest.json"
        file.write_text(json.dumps({**plain, "seal": checkpoints._seal(plain)}))
        os.utime(file, ns=(when, when))
    found = checkpoints.candidates(tmp_path / "home")
    assert [path.name for path in found] == ["b.ckpt", "a.ckpt"]


def test_leftovers_of_a_live_run_stay(checkpoint: Path, tmp_path: Path) -> None:
    for home in ("dead", "alive"):
        (tmp_path / home / "val").mkdir(parents=True)
        (tmp_path / home / "val" / ".x.ckpt.run-1.partial").mkdir()
    file = str(tmp_path / ".alive.lock")
    code = f"from filelock import FileLock; import sys; l = FileLock({file!r}); l.acquire()"
    code += "; print('here', flush=True); sys.stdin.read()"
    other = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout
        assert other.stdout.readline() == "here\n"
        checkpoints.clean_leftovers(tmp_path)
        assert not [*(tmp_path / "dead" / "val").iterdir()]
        assert [*(tmp_path / "alive" / "val").iterdir()]
        with pytest.raises(UserError, match="another run is training there"):
            locks.take(tmp_path / "alive")
    finally:
        other.kill()
        other.wait()
    # The lock has ended with its process, though its file is there.
    assert (tmp_path / ".alive.lock").exists()
    checkpoints.clean_leftovers(tmp_path)
    assert not [*(tmp_path / "alive" / "val").iterdir()]
    assert locks.take(tmp_path / "alive")
    assert not locks.take(tmp_path / "alive")
    assert not locks.is_foreign(tmp_path / "alive")
    locks.release(tmp_path / "alive")
    assert not (tmp_path / ".alive.lock").exists()


@pytest.mark.parametrize("when", ["at once", "after its mark", "never"])
def test_a_save_whose_partner_has_ended_is_an_error_at_once(tmp_path: Path, when: str) -> None:
    staging, target = tmp_path / "staging", tmp_path / "x.ckpt"
    staging.mkdir()
    for rank in (0, 1):
        RankPart(rank, None).write(staging)
    checkpoints.mark_done(staging, 0, [staging / checkpoints.rank_file(0)])

    def has_ended(rank: int) -> bool:
        if when == "after its mark":
            checkpoints.mark_done(staging, rank, [staging / checkpoints.rank_file(rank)])
        return when != "never"

    began = time.monotonic()
    options = {"timeout": 0.3 if when == "never" else 60.0, "has_ended": has_ended}
    if when == "after its mark":
        checkpoints.finish(staging, target, 2, {"step": 1}, **options)
        checkpoints.verify(target)
    else:
        told = "did not write" if when == "never" else "rank 1 has ended without writing its part"
        with pytest.raises(UserError, match=told):
            checkpoints.finish(staging, target, 2, {"step": 1}, **options)
    assert time.monotonic() - began < 20


@pytest.mark.parametrize("part", ["rank-00000.safetensors", "trainer.ckpt"])
def test_a_flipped_byte_is_refused_in_one_line_that_names_the_newest_good_one(
    run: Run, tmp_path: Path, part: str
) -> None:
    home = tmp_path / "runs" / "version_0" / "checkpoints"
    for name in ("a.ckpt", "val/b.ckpt"):
        shutil.copytree(run.checkpoint, home / name)
    bad = home / "val" / "b.ckpt"
    content = bytearray((bad / part).read_bytes())
    content[len(content) // 2] ^= 1
    (bad / part).write_bytes(content)
    root = ("--trainer.default_root_dir", tmp_path / "runs", "--trainer.max_steps", 30)
    code, out, err = command("fit", "--config", run.config, *root, "--ckpt_path", bad)
    assert code == 2
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert str(bad / part) in line
    assert f"the newest good one is {home / 'a.ckpt'}" in line
    assert "Traceback" not in out + err
