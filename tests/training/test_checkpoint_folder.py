"""Checkpoint folders: whole or absent, and never silently wrong."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small import Run

from memorizing_transformers.errors import UserError
from memorizing_transformers.training.checkpoint import folder as checkpoints
from memorizing_transformers.training.checkpoint.rank_state import RankPart, load_rows
from memorizing_transformers.training.trainer import FolderCheckpointIO


def damage(path: Path, draw: random.Random) -> str:
    """Cut a file short, flip a bit of it, or take it away; say what was done."""
    content = bytearray(path.read_bytes())
    kind = draw.choice(["truncate", "flip", "flip", "remove"])
    if kind == "truncate":
        path.write_bytes(content[: draw.randrange(len(content))])
    elif kind == "flip":
        place = draw.randrange(len(content))
        content[place] ^= 1 << draw.randrange(8)
        path.write_bytes(content)
    else:
        path.unlink()
    return kind


def test_no_damage_is_accepted(checkpoint: Path) -> None:
    draw = random.Random(0)
    files = sorted(path.name for path in checkpoint.iterdir())
    assert files == ["manifest.json", "rank-00000.safetensors", "trainer.ckpt"]
    accepted, told = [], []
    for case in range(210):
        name = files[case % len(files)]
        original = (checkpoint / name).read_bytes()
        kind = damage(checkpoint / name, draw)
        try:
            checkpoints.verify(checkpoint)
            accepted.append((case, kind, name))
        except checkpoints.DamagedCheckpoint as error:
            told.append(name in str(error))
        (checkpoint / name).write_bytes(original)
    assert not accepted
    assert all(told)
    checkpoints.verify(checkpoint)


def test_damage_is_told_in_one_line_with_the_newest_good_one(
    checkpoint: Path, tmp_path: Path
) -> None:
    good = tmp_path / "step=12.ckpt"
    shutil.copytree(checkpoint, good)
    file = checkpoint / "trainer.ckpt"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError) as caught:
        FolderCheckpointIO().load_checkpoint(checkpoint)
    message = str(caught.value)
    assert str(file) in message
    assert str(good) in message
    assert "\n" not in message


def test_loading_executes_no_code(checkpoint: Path) -> None:
    loaded = torch.load(checkpoint / "trainer.ckpt", weights_only=True)
    assert {"state_dict", "optimizer_states", "lr_schedulers", "loops"} <= loaded.keys()


def test_crash_while_saving_leaves_the_previous_one_whole(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever call of ``finish`` is the last one, the folder still holds a whole checkpoint."""
    manifest = checkpoints.verify(checkpoint)
    calls = 0
    limit = 0

    class Killed(BaseException):
        pass

    def counted(function):  # type: ignore[no-untyped-def]
        def call(*args, **kwargs):  # type: ignore[no-untyped-def]
            nonlocal calls
            calls += 1
            if calls > limit:
                raise Killed
            return function(*args, **kwargs)

        return call

    for name in ("rename", "unlink", "write_text"):
        monkeypatch.setattr(Path, name, counted(getattr(Path, name)))
    monkeypatch.setattr(shutil, "rmtree", counted(shutil.rmtree))
    target = tmp_path / "last.ckpt"
    shutil.copytree(checkpoint, target)
    outcomes = set()
    for stop in range(40):
        calls, limit = 0, 10**9
        staging = checkpoints.staging_folder(target, f"run{stop}", 25)
        staging.mkdir()
        parts = []
        for name in manifest["files"]:
            shutil.copy(checkpoint / name, staging / name)
            parts.append(staging / name)
        calls, limit = 0, stop
        try:
            checkpoints.mark_done(staging, 0, parts)
            checkpoints.finish(staging, target, 1, {"step": 25})
            outcomes.add("finished")
        except Killed:
            outcomes.add("killed")
        calls, limit = 0, 10**9
        good = checkpoints.newest_good(tmp_path)
        assert good is not None, f"nothing whole after a stop at call {stop}"
        checkpoints.clean_leftovers(tmp_path)
    assert outcomes == {"finished", "killed"}


def test_missing_rank_ends_in_an_error_that_names_it(tmp_path: Path) -> None:
    staging = tmp_path / "staging"
    staging.mkdir()
    RankPart(0, None).write(staging)
    checkpoints.mark_done(staging, 0, [staging / checkpoints.rank_file(0)])
    with pytest.raises(UserError, match="rank 1"):
        checkpoints.finish(staging, tmp_path / "x.ckpt", 2, {"step": 1}, timeout=0.05)
    assert not (tmp_path / "x.ckpt").exists()


def test_rows_are_found_whatever_the_number_of_ranks(run: Run, tmp_path: Path) -> None:
    """Rows written by one rank, two and four are the same rows, however many read them."""
    whole = load_file(run.checkpoint / "rank-00000.safetensors")
    name = "rows.memory.1.keys"

    class Slice:
        def __init__(self, begin: int, end: int) -> None:
            self.batch_size = end - begin
            self.part = {
                key.removeprefix("rows."): value[begin:end]
                for key, value in whole.items()
                if key.startswith("rows.")
            }

        def tensors(self) -> dict[str, torch.Tensor]:
            return self.part

    for writers in (1, 2, 4):
        folder = tmp_path / str(writers)
        folder.mkdir()
        for rank in range(writers):
            width = 4 // writers
            part = Slice(rank * width, (rank + 1) * width)
            RankPart(rank, part).write(folder)  # type: ignore[arg-type]
        for readers in (1, 2, 4):
            width = 4 // readers
            got = [
                load_rows(
                    folder,
                    range(rank * width * writers // 4, -(-(rank + 1) * width * writers // 4)),
                    rank * width,
                    width,
                )["memory.1.keys"]
                for rank in range(readers)
            ]
            assert torch.equal(torch.cat(got), whole[name])


def test_format_of_another_version_is_refused(checkpoint: Path) -> None:
    path = checkpoint / "manifest.json"
    manifest = {**json.loads(path.read_text()), "format": 99}
    path.write_text(json.dumps({**manifest, "seal": checkpoints._seal(manifest)}))
    with pytest.raises(checkpoints.DamagedCheckpoint, match="format 99"):
        checkpoints.read_manifest(checkpoint)
