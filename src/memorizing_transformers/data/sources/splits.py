"""From the settings to documents: which source is read for which split."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from ...errors import ConfigError, UserError
from ..settings import SPLITS, STDLIB, SourceSettings
from .documents import Origin, Source
from .files import find_files
from .hub_datasets import PREFIX, HubDataset
from .local import holds_records, open_files
from .standard_library import held_out_split, library_files, standard_library
from .token_files import index_of, token_files

StrPath = str | Path


class SplitSource(NamedTuple):
    """A source and the splits that its documents go to."""

    source: Source
    splits: tuple[str, ...]
    split_of: Callable[[str], str]
    """From a document's name to one of `splits`."""
    rule: str
    """The rule behind `split_of` in words, part of the fingerprint."""
    origin: Origin
    """The setting that names the source."""


def open_sources(settings: SourceSettings, cache_dir: Path | None = None) -> list[SplitSource]:
    """Open all sources; between them every split is covered whose fraction is not 0.

    What is read for validation or test is not read for training too.

    Args:
        settings: where the text comes from.
        cache_dir: the folder of token stores, which are no text.

    Raises:
        ConfigError: a source is missing, cannot be read or is too small to be split.
    """
    readings = []
    open_splits = list(SPLITS)
    given = {"validation": settings.validation_source, "test": settings.test_source}
    for split, value in given.items():
        if value is not None:
            origin = Origin(f"data.{split}_source", value)
            source = _open_all(origin, settings, split, cache_dir)
            readings.append(_undivided(source, split, origin))
            open_splits.remove(split)

    origin = Origin("data.source", settings.source)
    if settings.source.startswith(PREFIX):
        hub = HubDataset(origin, settings.records, cache_dir)
        for split in open_splits[1:]:
            own = hub.split(split)
            if own is not None:
                readings.append(_undivided(own, split, origin))
                open_splits.remove(split)
        main: Source = hub.require("train")
    else:
        main = _open_all(origin, settings, "train", cache_dir)
    extra = settings.records.extra
    if extra and not holds_records(main):
        remedy = (
            f"is for records, but {settings.source} holds texts; give .jsonl, .json or .parquet"
        )
        raise ConfigError(*extra, remedy)
    _keep_apart(main, readings, origin)

    shares = {split: settings.fractions[split] for split in open_splits[1:]}
    shares = {split: share for split, share in shares.items() if share > 0}
    if not shares:
        readings.append(_undivided(main, "train", origin))
    elif settings.source == STDLIB:
        readings.append(_standard_library_reading(main, tuple(shares), origin))
    else:
        split_of = split_by_name(main.names(), shares, origin)
        rule = f"by name {sorted(shares.items())}"
        readings.append(SplitSource(main, ("train", *shares), split_of, rule, origin))
    return readings


def check_sources(settings: SourceSettings, split: str) -> None:
    """What can be said of sources without reading them: local ones exist, and a split is asked for.

    Raises:
        ConfigError: a local source is missing, or nothing is left for the split.
    """
    given = {"": settings.source, "validation_": settings.validation_source,
             "test_": settings.test_source}  # fmt: skip
    for name, value in given.items():
        if value not in (None, STDLIB) and not value.startswith(PREFIX):
            find_files(Origin(f"data.{name}source", value))
    share = settings.fractions[split]
    # A dataset of the hub may have the split of its own.
    if given[f"{split}_"] is None and share == 0 and not settings.source.startswith(PREFIX):
        remedy = f"leaves nothing for split: {split}; give a share, or data.{split}_source"
        raise ConfigError(f"data.{split}_fraction", share, remedy)


def source_files(settings: SourceSettings, cache_dir: Path | None = None) -> list[StrPath] | None:
    """All files that may be read for a corpus, without reading one; None where some are not local.

    Args:
        settings: where the text comes from.
        cache_dir: the folder of token stores, which are no text.

    Raises:
        ConfigError: a source is missing.
    """
    given = {"data.validation_source": settings.validation_source,
             "data.test_source": settings.test_source, "data.source": settings.source}  # fmt: skip
    files: list[StrPath] = []
    for key, value in given.items():
        if value is not None and value.startswith(PREFIX):
            return None
        if value == STDLIB:
            files += library_files()
        elif value is not None:
            found = find_files(Origin(key, value), cache_dir).files
            files += [file.location for file in found]
            files += [index_of(file.location) for file in token_files(found)]
    return files


def fingerprint_sources(readings: Iterable[SplitSource]) -> str:
    """Hash of all documents and of the rules that split them."""
    digest = hashlib.blake2b(digest_size=16)
    for reading in readings:
        digest.update(f"{reading.rule}\n{reading.source.fingerprint()}\n".encode())
    return digest.hexdigest()


def split_by_name(
    names: Iterable[str], shares: Mapping[str, float], origin: Origin
) -> Callable[[str], str]:
    """Cut splits off by a hash of each document's name.

    A name always hashes to the same split, whatever other names there are. A split that would get
    no document at all gets the one that hashes nearest to it.

    Args:
        names: of all documents; read on only until each split has one.
        shares: per split to cut off, its share of the documents, between 0 and 1.
        origin: the setting to name in errors.

    Returns:
        from a document's name to its split.

    Raises:
        UserError: there are fewer documents than splits.
    """
    points: dict[str, float] = {}
    empty = {*shares, "train"}
    for name in names:
        points[name] = name_point(name)
        empty.discard(_split_at(points[name], shares))
        if not empty:
            break  # so no document has to move
    if len(points) <= len(shares):
        missing = " and ".join(f"data.{split}_source" for split in shares)
        raise UserError(
            f"{origin.key} = {origin.value!r}: {len(points)} documents, too few to cut off "
            f"{' and '.join(shares)}; give {missing}, or set the fraction to 0"
        )
    moved = _fill_empty_splits(points, shares)
    return lambda name: moved[name] if name in moved else _split_at(name_point(name), shares)


def name_point(name: str) -> float:
    """A name's hash as a number of the unit interval."""
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def _split_at(point: float, shares: Mapping[str, float]) -> str:
    edge = 0.0
    for split in sorted(shares):
        edge += shares[split]
        if point < edge:
            return split
    return "train"


def _fill_empty_splits(points: Mapping[str, float], shares: Mapping[str, float]) -> dict[str, str]:
    """The documents to move so that every split has one: from name to new split."""
    order = [*sorted(shares), "train"]
    members: dict[str, list[str]] = {split: [] for split in order}
    for name in sorted(points, key=lambda name: (points[name], name)):
        members[_split_at(points[name], shares)].append(name)

    moved: dict[str, str] = {}
    for split in order:
        if members[split]:
            continue
        donor = max(order, key=lambda other: len(members[other]))
        # Splits are neighbours on the interval: the nearest document is at the donor's edge.
        name = members[donor].pop(0 if order.index(donor) > order.index(split) else -1)
        members[split].append(name)
        moved[name] = split
    return moved


def _standard_library_reading(
    source: Source, held_out: tuple[str, ...], origin: Origin
) -> SplitSource:
    def split_of(name: str) -> str:
        split = held_out_split(name)
        return split if split in held_out else "train"

    rule = f"held-out packages {held_out}"
    return SplitSource(source, ("train", *held_out), split_of, rule, origin)


def _undivided(source: Source, split: str, origin: Origin) -> SplitSource:
    return SplitSource(source, (split,), lambda name: split, f"all to {split}", origin)


def refuse_leaks(readings: Iterable[SplitSource]) -> None:
    """Refuse to train on nothing but what is read for validation or test too.

    Raises:
        ConfigError: naming the sources that agree.
    """
    held_out = [reading for reading in readings if "train" not in reading.splits]
    for reading in readings:
        keys = _shared(reading.source, held_out) if "train" in reading.splits else {}
        if keys:
            both = " and ".join(sorted({*keys.values()}))
            raise reading.origin.error(f"{both} reads all of it too; give texts of its own to each")


def _keep_apart(main: Source, held_out: Iterable[SplitSource], origin: Origin) -> None:
    """Leave out of training what other sources read, and say so, unless nothing would be left."""
    shared = _shared(main, held_out)
    if shared and len(shared) < len(main.places()):
        main.leave_out(shared.keys())
        both = " and ".join(sorted({*shared.values()}))
        main.notes.append(
            f"{origin.value}: {len(shared)} files left out of training, {both} reads them too"
        )


def _shared(source: Source, others: Iterable[SplitSource]) -> dict[Hashable, str]:
    """The places of a source that others read too, and the key of one of these."""
    own = source.places()
    return {place: other.origin.key for other in others for place in other.source.places() & own}


def _open_all(
    origin: Origin, settings: SourceSettings, role: str, cache_dir: Path | None
) -> Source:
    if origin.value == STDLIB:
        return standard_library(origin)
    if origin.value.startswith(PREFIX):
        return HubDataset(origin, settings.records, cache_dir).require(role, "train")
    return open_files(origin, settings.records, settings.group, cache_dir)
