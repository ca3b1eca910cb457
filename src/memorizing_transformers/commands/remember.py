"""The command that reads a document and keeps what the model remembers of it."""

from __future__ import annotations

from pathlib import Path


def remember(
    model: str,
    document: str,
    out: str | None = None,
    index: str | None = None,
    capacity: int | None = None,
    segment_length: int | None = None,
    memory_size: int | None = None,
    device: str | None = None,
) -> None:
    """Read a document once and write what the model remembers of it.

    The command generate asks it later, with --memory.

    Example: python -m memorizing_transformers remember --model model --document book.txt
    --out book.memory

    Args:
        model: A checkpoint, a folder of export, or the folder or hub name of a pretrained model.
        document: A UTF-8 text file.
        out: The file to write; its name should end in .memory.
        index: A folder that collects very many documents, in the place of out: the document is
            added to it. generate and serve take the folder as memory.
        capacity: Pairs of each memory that a new index has room for, one a token; only with index.
            Default: 4194304.
        segment_length: Tokens that are read at once. Default: as in training, else the length of
            the XL cache, else 512.
        memory_size: Slots of each memory. Default: as in training.
        device: Where to compute. Default: a GPU where there is one.
    """
    from ..errors import ConfigError
    from ..generation.remembered import check_out, save
    from ..generation.session import Session
    from .reading import open_reader

    if (out is None) == (index is None):
        raise ConfigError("out", out, "give a file to write, or --index and a folder")
    if capacity is not None and capacity < 1:
        raise ConfigError("capacity", capacity, "must be at least 1")
    if capacity is not None and index is None:
        raise ConfigError("capacity", capacity, "is of a new --index; leave it out")
    if out is not None:
        check_out(Path(out))
    reader = open_reader(model, segment_length, memory_size, device)
    if index is not None:
        reader.add_to(Path(index), document, segment_length, memory_size, capacity)
        return
    assert out is not None
    session = Session(reader.model, 1, reader.segment_length)
    passage = reader.read(session, document)
    save(session, out, passage.name, reader.fingerprint)
    size = Path(out).stat().st_size
    print(f"tokens: {passage.count:,}")
    slots = max((memory.size for memory in session.bank.memories.values()), default=0)
    if passage.count > slots:
        print(f"of them in the memory: the last {slots:,}; more with --memory_size")
    print(f"memory: {out} ({size / 1e6:.1f} MB)")
