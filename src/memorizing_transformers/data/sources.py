"""From the settings to documents: which source is read for which split."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from ..errors import ConfigError, UserError
from .documents import Origin, Source
from .hub import PREFIX, HubDataset
from .local import find_files, open_files
from .settings import SPLITS, STDLIB, SourceSettings
from .standard_library import held_out_split, standard_library


class Reading(NamedTuple):
    """A source and the splits that its documents go to."""

    source: Source
    splits: tuple[str, ...]
    split_of: Callable[[str], str]
    """From a document's name to one of `splits`."""
    rule: str
    """The rule behind `split_of` in words, part of the fingerprint."""


def open_sources(settings: SourceSettings) -> list[Reading]:
    """Open all sources; between them every split is covered whose fraction is not 0.

    Raises:
        ConfigError: a source is missing, cannot be read or is too small to be split.
    """
    readings = []
    open_splits = list(SPLITS)
    given = {"validation": settings.validation_source, "test": settings.test_source}
    for split, value in given.items():
        if value is not None:
            source = _open_whole(Origin(f"data.{split}_source", value), settings, split)
            readings.append(_whole(source, split))
            open_splits.remove(split)

    origin = Origin("data.source", settings.source)
    if settings.source.startswith(PREFIX):
        hub = HubDataset(origin, settings.text_column)
        for split in open_splits[1:]:
            own = hub.split(split)
            if own is not None:
                readings.append(_whole(own, split))
                open_splits.remove(split)
        main: Source = hub.require("train")
    else:
        main = _open_whole(origin, settings, "train")

    shares = {split: settings.fractions[split] for split in open_splits[1:]}
    shares = {split: share for split, share in shares.items() if share > 0}
    if not shares:
        readings.append(_whole(main, "train"))
    elif settings.source == STDLIB:
        readings.append(_standard_library_reading(main, tuple(shares)))
    else:
        split_of = split_by_name(main.names(), shares, origin)
        rule = f"by name {sorted(shares.items())}"
        readings.append(Reading(main, ("train", *shares), split_of, rule))
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


def fingerprint_sources(readings: Iterable[Reading]) -> str:
    """Hash of all documents and of the rules that split them."""
    digest = hashlib.blake2b(digest_size=16)
    for reading in readings:
        digest.update(f"{reading.rule}\n{reading.source.fingerprint()}\n".encode())
    return digest.hexdigest()


def split_by_name(
    names: Iterable[str], shares: Mapping[str, float], origin: Origin
) -> Callable[[str], str]:
    """Cut splits off by a hash of each document's name.

    A name always hashes to the same split, whatever stands beside it. Only if a split would get no
    document at all does it get the one that hashes nearest to it.

    Args:
        names: of all documents.
        shares: per split to cut off, its share of the documents, between 0 and 1.
        origin: the setting to name in errors.

    Returns:
        from a document's name to its split.

    Raises:
        UserError: there are fewer documents than splits.
    """
    points = {name: name_point(name) for name in names}
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
    digest = hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest()
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
        # Splits lie side by side on the interval: the nearest document stands at the donor's edge.
        name = members[donor].pop(0 if order.index(donor) > order.index(split) else -1)
        members[split].append(name)
        moved[name] = split
    return moved


def _standard_library_reading(source: Source, held_out: tuple[str, ...]) -> Reading:
    def split_of(name: str) -> str:
        split = held_out_split(name)
        return split if split in held_out else "train"

    return Reading(source, ("train", *held_out), split_of, f"held-out packages {held_out}")


def _whole(source: Source, split: str) -> Reading:
    return Reading(source, (split,), lambda name: split, f"all to {split}")


def _open_whole(origin: Origin, settings: SourceSettings, role: str) -> Source:
    if origin.value == STDLIB:
        return standard_library(origin)
    if origin.value.startswith(PREFIX):
        return HubDataset(origin, settings.text_column).require(role, "train")
    return open_files(origin, settings.text_column, settings.group)
