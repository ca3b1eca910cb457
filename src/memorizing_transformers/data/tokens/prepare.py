"""From text to a token store, once; afterwards the cache answers.

A store is in ``cache_dir/<fingerprint>/``. It is written into a temporary folder next to it and
moved into place by one rename, so that a store is either complete or not there. A lock lets a
second process wait for the first and then use its store; the system frees a dead process's lock.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout
from tqdm import tqdm

from ...errors import ConfigError, UserError
from ...pace import Pace
from ..settings import SPLITS, CorpusSettings, TokenizerSettings
from ..sources.documents import Document, first_line
from ..sources.splits import (
    SplitSource,
    fingerprint_sources,
    open_sources,
    refuse_leaks,
    source_files,
)
from .known_stores import KnownStore, tokenizer_files
from .made_elsewhere import MadeElsewhere
from .store import (
    FORMAT,
    MIN_TOKENS,
    TOKENIZER_FOLDER,
    SplitWriter,
    read_manifest,
    token_dtype,
    write_manifest,
)
from .tokenizers import (
    BPE,
    BYTES,
    byte_tokenizer,
    encode_in_order,
    fingerprint_tokenizer,
    load_tokenizer,
    make_encoder,
    train_bpe,
    vocabulary_size,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

TEMPORARY = ".tmp-"


def prepare_store(
    settings: CorpusSettings, cache_dir: Path, num_workers: int | None = None
) -> Path:
    """Tokenise the corpus unless its store is there already.

    Args:
        settings: the sources and the tokenizer.
        cache_dir: made if missing.
        num_workers: threads that encode. Default: the number of processors.

    Returns:
        the folder of the complete store.

    Raises:
        UserError: a source, the tokenizer or the cache folder cannot be used, or a split is empty.
    """
    files = source_files(settings.sources, cache_dir)
    own = tokenizer_files(settings.tokenizer)
    facts: list[Any] = [FORMAT, settings]
    if own is None:
        facts.append(_kind(settings.tokenizer, _open_tokenizer(settings.tokenizer)))
    known = None if files is None else KnownStore(cache_dir, facts, [*files, *(own or [])])
    folder = known.find() if known is not None else None
    if folder is not None:
        log.info("tokens found in %s; no file has changed", folder)
        return folder
    folder = _prepared(settings, cache_dir, num_workers)
    if known is not None:
        known.note(folder)
    return folder


def _prepared(settings: CorpusSettings, cache_dir: Path, num_workers: int | None) -> Path:
    """The folder of the store, written unless a store of the same content is there."""
    tokenizer = _open_tokenizer(settings.tokenizer)
    kind = _kind(settings.tokenizer, tokenizer)
    readings = open_sources(settings.sources, cache_dir)
    refuse_leaks(readings)
    facts: list[Any] = [FORMAT, kind, settings.shortest, fingerprint_sources(readings)]
    if settings.min_tokens != MIN_TOKENS:
        facts.append(f"min_tokens {settings.min_tokens}")
    folder = cache_dir / hashlib.blake2b(repr(facts).encode(), digest_size=8).hexdigest()
    if read_manifest(folder) is not None:
        log.info("tokens found in %s", folder)
        return folder
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with FileLock(_lock_of(folder)):
            _remove_leftovers(cache_dir, folder)
            if read_manifest(folder) is None:
                temporary = Path(
                    tempfile.mkdtemp(prefix=f"{folder.name}{TEMPORARY}", dir=cache_dir)
                )
                try:
                    workers = num_workers or os.cpu_count() or 1
                    _write_store(temporary, settings, readings, tokenizer, workers)
                    if folder.exists():
                        shutil.rmtree(folder)  # damaged, or its manifest would have been read
                    temporary.rename(folder)
                finally:
                    shutil.rmtree(temporary, ignore_errors=True)
    except UserError:
        raise
    except Exception as error:
        remedy = _disk_remedy(error)
        if remedy is None:
            raise
        raise ConfigError("data.cache_dir", str(cache_dir), remedy) from error
    return folder


def summary_lines(folder: Path) -> list[str]:
    """One line for the tokenizer and one for each split of a store."""
    manifest = read_manifest(folder)
    if manifest is None:
        return [f"{folder}: no complete token store"]
    lines = [f"tokenizer {manifest['tokenizer']}: {manifest['vocab_size']:,} tokens ({folder})"]
    for split, counts in manifest["splits"].items():
        line = (
            f"{split}: {counts['documents']:,} documents, {counts['tokens']:,} tokens, "
            f"{counts['bytes']:,} bytes"
        )
        if counts["left_out"]:
            line += f"; {counts['left_out']:,} documents left out as too short"
        lines.append(line)
    return lines


def _open_tokenizer(settings: TokenizerSettings) -> PreTrainedTokenizerBase | None:
    """The tokenizer, None if it is yet to be trained on the corpus."""
    if settings.tokenizer == BPE:
        return None
    return byte_tokenizer() if settings.tokenizer == BYTES else load_tokenizer(settings.tokenizer)


def _write_store(
    folder: Path,
    settings: CorpusSettings,
    readings: Sequence[SplitSource],
    tokenizer: PreTrainedTokenizerBase | None,
    num_workers: int,
) -> None:
    made = {
        reading.origin: MadeElsewhere(tokenizer, settings.tokenizer.tokenizer, made_by)
        for reading in readings
        if (made_by := reading.source.made_by) is not None
    }
    if tokenizer is None:
        log.info("training a BPE of %d tokens", settings.tokenizer.bpe_vocab_size)
        tokenizer = train_bpe(
            (document.text for document in _training_documents(readings, settings.shortest)),
            settings.tokenizer.bpe_vocab_size,
            settings.tokenizer.bpe_train_bytes,
        )
    vocab_size = vocabulary_size(tokenizer)
    encode = make_encoder(tokenizer)
    with ExitStack() as stack:
        writers = {
            split: stack.enter_context(
                SplitWriter(folder, split, token_dtype(vocab_size), settings.min_tokens)
            )
            for reading in readings
            for split in reading.splits
        }
        for reading in readings:
            documents = reading.source.documents(_everything)
            if reading.origin in made:
                documents = made[reading.origin].with_texts(documents)
            documents = _progress(documents, "tokenising")
            long_enough = _long_enough(documents, reading.split_of, writers, settings.shortest)
            encoded = encode_in_order(
                encode, long_enough, num_workers, settings.tokenizer.tokenizer
            )
            for document, tokens in encoded:
                num_bytes = len(document.text.encode("utf-8"))
                writers[reading.split_of(document.name)].add(document.name, tokens, num_bytes)
            for line in reading.source.report():
                log.warning(line)
    counts = {split: writers[split].counts() for split in SPLITS if split in writers}
    too_few = sum(writer.too_few_tokens for writer in writers.values())
    if too_few and settings.min_tokens > MIN_TOKENS:
        kept = sum(count["documents"] for count in counts.values())
        log.warning(
            "data.min_tokens = %d: %d documents of fewer tokens left out, %d kept",
            settings.min_tokens,
            too_few,
            kept,
        )
    _refuse_empty(counts, settings)
    tokenizer.save_pretrained(folder / TOKENIZER_FOLDER)
    facts = {
        "tokenizer": settings.tokenizer.tokenizer,
        "vocab_size": vocab_size,
        "dtype": token_dtype(vocab_size).name,
        "splits": counts,
        "settings": asdict(settings),
    }
    write_manifest(folder, facts)


def _everything(name: str) -> bool:
    return True


def _training_documents(readings: Sequence[SplitSource], shortest: int) -> Iterator[Document]:
    for reading in readings:
        if "train" not in reading.splits:
            continue
        documents = reading.source.documents(
            lambda name, split_of=reading.split_of: split_of(name) == "train"  # type: ignore[misc]
        )
        for document in _progress(documents, "training the tokenizer"):
            if len(document.text) >= shortest:
                yield document


def _long_enough(
    documents: Iterable[Document],
    split_of: Callable[[str], str],
    writers: dict[str, SplitWriter],
    shortest: int,
) -> Iterator[Document]:
    for document in documents:
        if len(document.text) >= shortest:
            yield document
        else:
            writers[split_of(document.name)].left_out += 1


def _progress(documents: Iterator[Document], what: str) -> Iterator[Document]:
    """Show documents and megabytes: a bar on a terminal, elsewhere a line now and then."""
    with tqdm(documents, desc=what, unit=" documents", disable=None) as bar:
        characters, pace = 0, Pace()
        for number, document in enumerate(bar, start=1):
            characters += len(document.text)
            size = f"{characters / 1e6:.1f}M characters"
            bar.set_postfix_str(size, refresh=False)
            if bar.disable and pace.due():
                print(f"{what}: {number:,} documents, {size}", file=sys.stderr, flush=True)
            yield document


def _refuse_empty(counts: dict[str, dict[str, int]], settings: CorpusSettings) -> None:
    for split in ("train", *(split for split in counts if split != "train")):
        found = counts.get(split, {"documents": 0, "left_out": 0})
        if found["documents"] == 0:
            key = "data.source" if split == "train" else f"data.{split}_source"
            given = getattr(settings.sources, key.removeprefix("data."))
            raise ConfigError(
                key if given else "data.source",
                given or settings.sources.source,
                f"no document left for {split}, {found['left_out']} were too short; give longer "
                f"ones, or lower data.min_characters ({settings.shortest}) or data.min_tokens "
                f"({settings.min_tokens})",
            )


def _kind(settings: TokenizerSettings, tokenizer: PreTrainedTokenizerBase | None) -> str:
    """What decides the ids that the tokenizer gives."""
    if tokenizer is None:
        return f"bpe {settings.bpe_vocab_size} {settings.bpe_train_bytes}"
    return fingerprint_tokenizer(tokenizer)


def _lock_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.lock")


def _remove_leftovers(cache_dir: Path, mine: Path) -> None:
    """Remove temporary folders of runs that died; the caller holds the lock of `mine`."""
    for leftover in cache_dir.glob(f"*{TEMPORARY}*"):
        owner = cache_dir / leftover.name.partition(TEMPORARY)[0]
        if owner == mine:
            shutil.rmtree(leftover, ignore_errors=True)
            continue
        # A live run holds its lock; whoever gets the lock meets a dead run's folder.
        with suppress(Timeout), FileLock(_lock_of(owner), timeout=0):
            shutil.rmtree(leftover, ignore_errors=True)


def _disk_remedy(error: Exception) -> str | None:
    """What to do about a cache folder that cannot be written, None for any other error."""
    number = error.errno if isinstance(error, OSError) else None
    # The tokenizers library, written in Rust, gives the number in the text of a bare Exception.
    if number in (errno.ENOSPC, errno.EDQUOT) or "os error 28" in str(error):
        return "the disk is full; make room or choose a folder on another disk"
    if isinstance(error, OSError):
        return f"cannot be written ({first_line(error)}); choose a folder that can"
    return None
