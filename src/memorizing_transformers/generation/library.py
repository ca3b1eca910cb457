"""A library: what a model remembers of very many documents, in a folder, with an index.

Stores are files with room for ``capacity`` slots; they are mapped, so only what is read is in RAM.
Pairs are added behind the others. The header, which is written last, says how many count, so a
library is whole at every moment.

Shapes: G key/value heads, M slots, D head width.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from ..data.sources.documents import first_line
from ..errors import ConfigError
from ..memory import Memory, mapped
from ..memory.search.indexed import IndexedSearch, PairIndex
from ..model import MemorizingNet
from .remembered import Passage, check_cache, identity
from .session import Session

HEADER = "library.json"
FORMAT = 1
CAPACITY = 2**22
"""Slots of a library that is not told otherwise."""
INDEX_EVERY = 65536
"""Pairs that are scanned at most; so many more are added to the index at once."""


@dataclass
class Catalogue:
    """The header of a library."""

    model: str
    """Fingerprint of the model."""
    tokenizer: str
    segment_length: int
    capacity: int
    count: dict[str, int] = field(default_factory=dict)
    """By layer, pairs."""
    indexed: int = 0
    """Pairs of each layer that the index knows."""
    tokens: int = 0
    """Of all documents."""
    documents: list[list[Any]] = field(default_factory=list)
    """Name, position of the first token in the library, and tokens of each."""
    xl_cache: int | None = None
    """Tokens of the XL cache that its documents were read with; None where nobody noted it."""
    format: int = FORMAT


class Library:
    """A library in a folder.

    Args:
        folder: that holds it; made by ``create`` or by an earlier call.
        model: the network that reads the documents.
        tokenizer: fingerprint of its tokenizer.

    Raises:
        ConfigError: where it is damaged, or of another model or tokenizer.
    """

    def __init__(self, folder: Path, model: MemorizingNet, tokenizer: str) -> None:
        self.folder, self.model = folder, model
        self.engine: Callable[[int, Memory], PairIndex] | None = None
        """Gives what is searched of a layer and its memory, in the place of the folder's index."""
        try:
            self.catalogue = Catalogue(**json.loads((folder / HEADER).read_text("utf-8")))
        except (OSError, ValueError, TypeError) as error:
            remedy = f"is no library, or damaged ({first_line(error)})"
            raise ConfigError("index", str(folder), remedy) from error
        known = self.catalogue
        if known.format != FORMAT:
            remedy = f"has format {known.format}, and this version reads {FORMAT}"
            raise ConfigError("index", str(folder), remedy)
        for what, value in (("model", identity(model)), ("tokenizer", tokenizer)):
            if getattr(known, what) != value:
                remedy = (
                    f"was made with another {what} ({getattr(known, what)}) than this one "
                    f"({value}); give that one, or begin another library"
                )
                raise ConfigError("index", str(folder), remedy)
        if known.xl_cache is not None:
            check_cache(model, known.xl_cache, "index", folder)

    @classmethod
    def create(
        cls, folder: Path, model: MemorizingNet, tokenizer: str, segment_length: int, capacity: int
    ) -> Library:
        """An empty library in a new folder.

        Raises:
            ConfigError: where the folder holds something else.
            OSError: where it cannot be written.
        """
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ConfigError("index", str(folder), "holds other things; give a new folder")
        folder.mkdir(parents=True, exist_ok=True)
        facts = (identity(model), tokenizer, segment_length, capacity)
        catalogue = Catalogue(*facts, xl_cache=getattr(model, "xl_cache", None))
        _write(folder, catalogue)
        return cls(folder, model, tokenizer)

    @property
    def passages(self) -> list[Passage]:
        """The documents, by their positions in the library."""
        return [
            Passage(name, first, 0, count, library=True)
            for name, first, count in self.catalogue.documents
        ]

    def attach(self, session: Session) -> None:
        """Let a session read the library besides its own memories."""
        for layer, memory in session.bank.memories.items():
            memory.base.library = self._memory(layer)

    def _memory(self, layer: int) -> Memory:
        count = self.catalogue.count.get(str(layer), 0)
        memory: Memory = self.model.new_memory(1, "cpu", size=1).memories[layer]
        stores = {name: self._map(layer, name, like) for name, like in _stores(memory).items()}
        index: PairIndex | None = None
        if self.catalogue.indexed and self.engine is None:
            from ..memory.search.on_disk import OnDiskIndex

            heads = range(memory.keys.shape[1])
            files = [self._part(layer, head, self.catalogue.indexed) for head in heads]
            try:
                index = OnDiskIndex(files)
            except RuntimeError as error:  # of faiss
                remedy = "its index is damaged, or another process has just added to it; try again"
                raise ConfigError("index", str(self.folder), remedy) from error
        if hasattr(memory, "read"):
            memory.read.fill_(self.catalogue.tokens)
        found = mapped(memory, stores, count, IndexedSearch(index))
        if self.engine is not None:
            found.search = IndexedSearch(self.engine(layer, found))
        return found

    def _part(self, layer: int, head: int, count: int) -> Path:
        return self.folder / f"{layer}.{head}.{count}.faiss"

    def _map(self, layer: int, name: str, like: Tensor, shared: bool = False) -> Tensor:
        """A store as its file; what is written to it reaches the file only where ``shared``."""
        shape = [*like.shape]
        shape[_slot_dim(like)] = self.catalogue.capacity
        size = torch.Size(shape).numel()
        path = self.folder / f"{layer}.{name}.bin"
        try:
            if shared and not path.exists():
                with path.open("wb") as file:
                    file.truncate(size * like.dtype.itemsize)
            if path.stat().st_size != size * like.dtype.itemsize:
                raise OSError(f"{path.name} has another size than its library says")
            store = torch.from_file(str(path), shared, size, dtype=like.dtype)
        except (OSError, RuntimeError) as error:
            remedy = f"is damaged, or the disk is full ({first_line(error)})"
            raise ConfigError("index", str(self.folder), remedy) from error
        return store.view(shape)

    def add(self, session: Session, input_ids: Tensor, name: str) -> Iterator[int]:
        """Read a document with an empty session and add its pairs.

        Args:
            session: of one row, that has read nothing.
            input_ids: (1, any number) tokens of the document.
            name: of the document.

        Yields:
            the tokens of each part that was read.

        Raises:
            ConfigError: where there is no room for it, or it cannot be written.
        """
        known, length = self.catalogue, input_ids.shape[1]
        if max(known.count.values(), default=0) + length > known.capacity:
            remedy = (
                f"has room for {known.capacity:,} pairs, and {known.tokens:,} of its documents; "
                f"{name} has {length:,}: begin another library with a larger --capacity"
            )
            raise ConfigError("index", str(self.folder), remedy)
        if not session.bank.memories:
            raise ConfigError("memory_size", 0, "a library needs a memory; give at least 1 slot")
        for memory in session.bank.memories.values():
            if memory.size < session.segment_length:
                remedy = f"must be at least the segment length ({session.segment_length})"
                raise ConfigError("memory_size", memory.size, remedy)
        slots = [(m, m.size) for m in session.bank.memories.values()]
        needed = length * sum(m.nbytes() // size for m, size in slots)
        free = shutil.disk_usage(self.folder).free
        if needed > free:  # a mapped file that cannot grow would end the process
            remedy = (
                f"{name} needs {needed / 1e9:.2f} GB on the disk, and {free / 1e9:.2f} are free"
            )
            raise ConfigError("index", str(self.folder), remedy)
        stores: dict[int, dict[str, Tensor]] = {}
        counts = dict.fromkeys(session.bank.memories, 0)
        for layer, memory in session.bank.memories.items():
            counts[layer] = known.count.get(str(layer), 0)
            stores[layer] = {
                store: self._map(layer, store, like, shared=True)
                for store, like in _stores(memory).items()
            }
        done = dict.fromkeys(counts, 0)

        def harvest() -> None:
            for layer, memory in session.bank.memories.items():
                new = torch.arange(done[layer], int(memory.written[0]))
                slots = new.to(memory.device) % memory.size
                begin = counts[layer] + done[layer]
                for store, tensor in _stores(memory).items():
                    dim = _slot_dim(tensor)
                    rows = tensor.index_select(dim, slots)
                    if store == "places":
                        rows = rows + known.tokens
                    stores[layer][store].narrow(dim, begin, len(new)).copy_(rows)
                done[layer] += len(new)

        for part, _ in session.parts(input_ids):
            harvest()  # of the part before, whose pairs were written when this one was asked for
            yield part.shape[1]
        session.close()
        harvest()
        count = {str(layer): counts[layer] + done[layer] for layer in counts}
        documents = [*known.documents, [name, known.tokens, length]]
        grown = Catalogue(**{**asdict(known), "count": count, "documents": documents})
        grown.tokens += length
        old = known.indexed
        pairs = min(count.values(), default=0)
        if pairs - old >= INDEX_EVERY:
            self._index(stores, old, pairs)
            grown.indexed = pairs
        _write(self.folder, grown)
        self.catalogue = grown
        if grown.indexed != old:
            for path in self.folder.glob(f"*.*.{old}.*"):
                path.unlink(missing_ok=True)

    def _index(self, stores: dict[int, dict[str, Tensor]], first: int, last: int) -> None:
        from ..memory.search.on_disk import extend
        from ..memory.storage import restore

        for layer, tensors in stores.items():
            scales = tensors.get("key_scales")
            for head in range(tensors["keys"].shape[1]):

                def keys(begin: int, end: int, head: int = head) -> Any:
                    part = (0, head, slice(begin, end))
                    own = None if scales is None else scales[part]  # noqa: B023
                    return restore(tensors["keys"][part], own).contiguous().numpy()  # noqa: B023

                old = self._part(layer, head, first) if first else None
                extend(old, self._part(layer, head, last), keys, first, last)


def _stores(memory: Memory) -> dict[str, Tensor]:
    """The tensors of a memory that have a part for each slot."""
    return {name: tensor for name, tensor in memory.tensors().items() if tensor.ndim > 1}


def _slot_dim(tensor: Tensor) -> int:
    """The dimension of slots: (B, M), (B, G, M) or (B, G, M, D)."""
    return min(2, tensor.ndim - 1)


def _write(folder: Path, catalogue: Catalogue) -> None:
    draft = folder / f".{HEADER}.partial"
    draft.write_text(json.dumps(asdict(catalogue)), "utf-8")
    draft.replace(folder / HEADER)


@contextmanager
def adding(folder: Path) -> Iterator[None]:
    """Keeps others from adding to a library, which may not be there yet.

    Raises:
        ConfigError: where another process adds.
    """
    folder = folder.resolve()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f".{folder.name}.lock"), timeout=0):
            yield
    except Timeout as error:
        remedy = "another process adds to it; wait for its end"
        raise ConfigError("index", str(folder), remedy) from error
    except OSError as error:
        remedy = f"cannot be written ({first_line(error)}); give another folder"
        raise ConfigError("index", str(folder), remedy) from error


def is_library(folder: Path) -> bool:
    """Whether a folder holds a library."""
    return (folder / HEADER).is_file()
