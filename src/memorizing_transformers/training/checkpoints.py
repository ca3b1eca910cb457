"""Checkpoints on disk: a folder whose manifest is the last thing to appear.

    step=500.ckpt/
      manifest.json            what the others are: size and SHA-256 of every file, step, rows
      trainer.ckpt             weights, optimiser, schedule, position (loadable with weights_only)
      rank-00000.safetensors   memory and XL cache of the rows that rank 0 owned, its random states

Everything is written in a hidden staging folder and renamed at the end; so a folder with a manifest
is whole, and a crash at any moment leaves the previous checkpoint as it was. Ranks meet through the
files alone: no collective is needed, and a missing rank ends in an error, not in a hang.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

from ..errors import ConfigError, UserError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
TRAINER_FILE = "trainer.ckpt"


FOLDER_KEY = "checkpoint_folder"
"""Where a loaded checkpoint keeps the folder that it came from, and its manifest."""


class DamagedCheckpoint(UserError):
    """A checkpoint that is incomplete or was changed after it was written."""


def digest(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal digits."""
    state = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(2**20):
            state.update(block)
    return state.hexdigest()


def rank_file(rank: int) -> str:
    """The name of a rank's part."""
    return f"rank-{rank:05d}.safetensors"


def staging_folder(target: Path, run: str, step: int) -> Path:
    """Where a checkpoint grows: hidden, beside its target, alike on every rank.

    Args:
        target: the finished checkpoint.
        run: drawn anew at each start of a run, so that leftovers of a dead one never fit.
        step: the training step.
    """
    return target.with_name(f".{target.name}.{run}-{step}.partial")


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a file that is whole as soon as it has its name."""
    draft = path.with_name(path.name + ".draft")
    draft.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
    _sync(draft)
    draft.rename(path)


def _seal(content: dict[str, Any]) -> str:
    plain = {key: value for key, value in content.items() if key != "seal"}
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def mark_done(staging: Path, rank: int, files: list[Path]) -> None:
    """Say that a rank has written its files, with their sizes and digests."""
    entries = {}
    for path in files:
        _sync(path)
        name = path.relative_to(staging).as_posix()
        entries[name] = {"bytes": path.stat().st_size, "sha256": digest(path)}
    _write_json(staging / f"rank-{rank:05d}.done", {"files": entries})


def mark_failed(staging: Path, rank: int, reason: str) -> None:
    """Say that a rank can't write its files, so that nobody waits for it."""
    with contextlib.suppress(OSError):
        mark = staging / f"rank-{rank:05d}.failed"
        mark.touch()  # succeeds on a full disk too
        mark.write_text(reason)


def finish(
    staging: Path, target: Path, world_size: int, info: dict[str, Any], timeout: float = 600.0
) -> None:
    """Wait for every rank's mark, write the manifest, give the checkpoint its name.

    Args:
        staging: the folder that all ranks wrote into.
        target: the checkpoint's name; one that stands there is replaced.
        world_size: ranks.
        info: what else the manifest should say, e.g. ``step`` and ``batch_rows``.
        timeout: seconds to wait for the slowest rank.

    Raises:
        UserError: naming the rank that could not write, or did not in time.
    """
    files: dict[str, Any] = {}
    deadline = time.monotonic() + timeout
    for rank in range(world_size):
        mark = staging / f"rank-{rank:05d}.done"
        while not mark.exists():
            failed = mark.with_suffix(".failed")
            if failed.exists():
                raise UserError(f"rank {rank} could not write its part: {failed.read_text()}")
            if time.monotonic() > deadline:
                raise UserError(f"rank {rank} did not write its part within {timeout:.0f} s")
            time.sleep(0.01)
        files.update(json.loads(mark.read_text())["files"])
        mark.unlink()
    manifest = {**info, "format": FORMAT_VERSION, "world_size": world_size, "files": files}
    _write_json(staging / MANIFEST, {**manifest, "seal": _seal(manifest)})
    _sync(staging)
    old = target.with_name(f".{target.name}.replaced")
    if old.exists():
        remove(old)
    if target.exists():
        target.rename(old)
    staging.rename(target)
    _sync(target.parent)
    remove(old)


def remove(folder: Path) -> None:
    """Delete a checkpoint, its manifest first, so that no half of it passes for a whole."""
    (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


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


def candidates(folder: Path) -> list[Path]:
    """Complete checkpoints in a folder, by their manifests and file sizes, newest first."""
    found = []
    # A run that died between the two renames of ``finish`` has its last one under the old name.
    for path in [*folder.glob("*.ckpt"), *folder.glob(".*.ckpt.replaced")]:
        try:
            manifest = read_manifest(path)
        except DamagedCheckpoint:
            continue
        found.append((manifest["step"], (path / MANIFEST).stat().st_mtime_ns, path))
    return [path for _, _, path in sorted(found, reverse=True)]


def newest_good(folder: Path) -> Path | None:
    """The newest checkpoint in a folder whose every file agrees with its digest."""
    for path in candidates(folder):
        try:
            verify(path)
        except DamagedCheckpoint:
            continue
        return path
    return None


def clean_leftovers(folder: Path) -> None:
    """Delete what runs that died while saving have left behind."""
    for path in folder.glob(".*.partial"):
        shutil.rmtree(path, ignore_errors=True)


def explain_damage(folder: Path, error: DamagedCheckpoint) -> UserError:
    """The damage in one line, with the newest good checkpoint beside it."""
    good = newest_good(folder.parent)
    remedy = f"the newest good one is {good}" if good else "there is no good one beside it"
    return UserError(f"ckpt_path: {error}; {remedy}")


def open_folder(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint whose trainer's part agrees with its digest.

    Raises:
        UserError: where the checkpoint is damaged or none of ours.
    """
    if not folder.is_dir():
        remedy = "not a checkpoint of this project, which are folders with a manifest.json"
        raise ConfigError("ckpt_path", str(folder), remedy)
    try:
        return verify(folder, [TRAINER_FILE])
    except DamagedCheckpoint as error:
        raise explain_damage(folder, error) from error
