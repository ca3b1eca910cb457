"""Checkpoints on disk: a folder whose manifest is the last thing to appear.

    step=500.ckpt/
      manifest.json            what the others are: size and SHA-256 of every file, step, rows
      trainer.ckpt             weights, optimiser, schedule, position (loadable with weights_only)
      rank-00000.safetensors   memory and XL cache of the rows that rank 0 owned, its random states

Everything is written in a hidden staging folder and renamed at the end; so a folder with a manifest
is complete, and a crash at any moment leaves the previous checkpoint as it was. Ranks meet through
the files alone: no collective is needed, and a missing rank ends in an error, not in a hang.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ...errors import ConfigError, UserError
from .. import locks
from .file_system import digest, sync, walk, write_json

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
TRAINER_FILE = "trainer.ckpt"


FOLDER_KEY = "checkpoint_folder"
"""Where a loaded checkpoint keeps the folder that it came from, and its manifest."""


class DamagedCheckpoint(UserError):
    """A checkpoint that is incomplete or was changed after it was written."""


def rank_file(rank: int) -> str:
    """The name of a rank's part."""
    return f"rank-{rank:05d}.safetensors"


def staging_folder(target: Path, run: str, number: int) -> Path:
    """Where a checkpoint grows: hidden, next to its target, alike on every rank.

    Args:
        target: the finished checkpoint.
        run: drawn at each start of a run, so that leftovers of a dead one never fit.
        number: of the save, counted by every rank from the start, so that no name comes twice.
    """
    return target.with_name(f".{target.name}.{run}-{number}.partial")


def _seal(content: dict[str, Any]) -> str:
    plain = {key: value for key, value in content.items() if key != "seal"}
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def mark_done(staging: Path, rank: int, files: list[Path]) -> None:
    """Say that a rank has written its files, with their sizes and digests."""
    entries = {}
    for path in files:
        sync(path)
        name = path.relative_to(staging).as_posix()
        entries[name] = {"bytes": path.stat().st_size, "sha256": digest(path)}
    write_json(staging / f"rank-{rank:05d}.done", {"files": entries})


def mark_failed(staging: Path, rank: int, reason: str) -> None:
    """Say that a rank can't write its files, so that nobody waits for it."""
    with contextlib.suppress(OSError):
        mark = staging / f"rank-{rank:05d}.failed"
        mark.touch()  # succeeds on a full disk too
        mark.write_text(reason)


def finish(
    staging: Path,
    target: Path,
    world_size: int,
    info: dict[str, Any],
    timeout: float = 600.0,
    has_ended: Callable[[int], bool] = lambda rank: False,
) -> None:
    """Wait for every rank's mark, write the manifest, give the checkpoint its name.

    Args:
        staging: the folder that all ranks wrote into.
        target: the checkpoint's name; what has it already is replaced.
        world_size: ranks.
        info: what else the manifest should say, e.g. ``step`` and ``batch_rows``.
        timeout: seconds to wait for the slowest rank.
        has_ended: whether a rank has ended, so that it writes no more.

    Raises:
        UserError: naming the rank that could not write, or did not in time.
    """
    files: dict[str, Any] = {}
    deadline = time.monotonic() + timeout
    for rank in range(world_size):
        mark = staging / f"rank-{rank:05d}.done"
        while not mark.exists():
            # Asked before the last look, since a rank may write and end between two looks.
            over = has_ended(rank)
            failed = mark.with_suffix(".failed")
            if failed.exists():
                raise UserError(f"rank {rank} could not write its part: {failed.read_text()}")
            if over and not mark.exists():
                raise UserError(f"rank {rank} has ended without writing its part")
            if time.monotonic() > deadline:
                raise UserError(f"rank {rank} did not write its part within {timeout:.0f} s")
            time.sleep(0.01)
        files.update(json.loads(mark.read_text())["files"])
        mark.unlink()
    manifest = {"written": time.time_ns(), **info, "format": FORMAT_VERSION}
    manifest |= {"world_size": world_size, "files": files}
    write_json(staging / MANIFEST, {**manifest, "seal": _seal(manifest)})
    sync(staging)
    put_in_place(staging, target)


def put_in_place(staging: Path, target: Path) -> None:
    """Give a finished checkpoint its name; at every moment the old or the new one can be found."""
    old = target.with_name(f".{target.name}.replaced")
    if target.is_symlink() or not is_complete(target):
        # A crash can have left the only complete checkpoint as the old one: it stays until then.
        # An empty folder, which reserves the name, gives way by itself.
        if target.is_symlink() or target.is_file() or (target.exists() and any(target.iterdir())):
            remove(target)
    else:
        remove(old)
        target.rename(old)
    staging.rename(target)
    sync(target.parent)
    remove(old)


def remove(folder: Path) -> None:
    """Delete a checkpoint, its manifest first, so that no part of it looks complete.

    Of a link only the link is deleted: the checkpoint that it names is another's.
    """
    if folder.is_symlink() or folder.is_file():
        folder.unlink()
        return
    (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def reserve(target: Path) -> None:
    """Make the name of a checkpoint that is being written visible, as an empty folder.

    So whoever looks for a free name takes another one. An empty folder is no checkpoint, and gives
    way to the finished one.
    """
    if not target.is_symlink():
        target.mkdir(parents=True, exist_ok=True)


def unreserve(target: Path) -> None:
    """Take back an empty name, where nothing was written."""
    with contextlib.suppress(OSError):
        target.rmdir()


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint whose files are all there, with their sizes.

    Raises:
        DamagedCheckpoint: naming the file that is missing or wrong.
    """
    path = folder / MANIFEST
    try:
        manifest: dict[str, Any] = json.loads(path.read_text())
        whole = manifest["seal"] == _seal(manifest)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedCheckpoint(f"{path} cannot be read ({type(error).__name__})") from error
    if not whole:
        raise DamagedCheckpoint(f"{path} was changed after it was written")
    if manifest["format"] != FORMAT_VERSION:
        raise DamagedCheckpoint(
            f"{path} has format {manifest['format']}; this version reads {FORMAT_VERSION}"
        )
    for name, entry in manifest["files"].items():
        part = folder / name
        size = part.stat().st_size if part.is_file() else None
        if size != entry["bytes"]:
            found = "is missing" if size is None else f"has {size} bytes of {entry['bytes']}"
            raise DamagedCheckpoint(f"{part} {found}")
    return manifest


def verify(folder: Path, names: list[str] | None = None) -> dict[str, Any]:
    """The manifest, after comparing files with their digests.

    Args:
        folder: the checkpoint.
        names: the files to compare, or None for all.

    Raises:
        DamagedCheckpoint: naming the file that differs.
    """
    manifest = read_manifest(folder)
    for name, entry in manifest["files"].items():
        if (names is None or name in names) and digest(folder / name) != entry["sha256"]:
            raise DamagedCheckpoint(f"{folder / name} was changed after it was written")
    return manifest


def is_complete(folder: Path) -> bool:
    """Whether a folder is a checkpoint with all its files."""
    try:
        read_manifest(folder)
    except DamagedCheckpoint:
        return False
    return True


def candidates(folder: Path) -> list[Path]:
    """Complete checkpoints at or below a folder, by their manifests and sizes, newest first."""
    found = []
    for path in walk(folder, (MANIFEST,)):
        with contextlib.suppress(DamagedCheckpoint):
            step = read_manifest(path).get("step", 0)
            found.append((written(path), step, str(path)))
    return [Path(path) for _, _, path in sorted(found, reverse=True)]


def written(folder: Path) -> int:
    """When a checkpoint was written, in nanoseconds; it grows from save to save of a run.

    Steps do not tell the newest: whoever goes back to an earlier checkpoint abandons later steps.
    """
    known = read_manifest(folder).get("written")
    return int(known) if known is not None else (folder / MANIFEST).stat().st_mtime_ns


def newest_good(folder: Path) -> Path | None:
    """The newest checkpoint at or below a folder whose every file agrees with its digest."""
    for path in candidates(folder):
        with contextlib.suppress(DamagedCheckpoint):
            verify(path)
            return path
    return None


def clean_leftovers(folder: Path) -> None:
    """Delete what runs that died while saving have left at or below a folder.

    What is in a folder that another live run has locked is that run's.
    """
    for path, names, _ in os.walk(folder):
        here = Path(path)
        if locks.is_foreign(here):
            names.clear()
        for name in [name for name in names if name.endswith(".partial") and name[0] == "."]:
            shutil.rmtree(here / name, ignore_errors=True)
        for name in [name for name in names if name.endswith(".ckpt")]:
            unreserve(here / name)


def explain_damage(folder: Path, error: DamagedCheckpoint) -> UserError:
    """The damage in one line, with the newest good checkpoint of the same run."""
    homes = [path for path in folder.parents if path.name == "checkpoints"]
    good = newest_good(homes[0] if homes else folder.parent)
    remedy = f"the newest good one is {good}" if good else "there is no good one next to it"
    return UserError(f"ckpt_path: {error}; {remedy}")


def open_checkpoint(folder: Path, mmap: bool = True) -> dict[str, Any]:
    """The trainer's part of a checkpoint, verified, on the CPU; no code of the file is executed.

    Its ``FOLDER_KEY`` holds the folder and its manifest.

    Args:
        folder: the checkpoint.
        mmap: whether tensors stay in the file until they are read.

    Raises:
        UserError: where the checkpoint is damaged or none of ours.
    """
    if not folder.is_dir():
        remedy = "not a checkpoint of this project, which are folders with a manifest.json"
        raise ConfigError("ckpt_path", str(folder), remedy)
    try:
        manifest = verify(folder, [TRAINER_FILE])
    except DamagedCheckpoint as error:
        raise explain_damage(folder, error) from error
    file = folder / TRAINER_FILE
    checkpoint: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
    return {**checkpoint, FOLDER_KEY: {"path": str(folder), "manifest": manifest}}
