"""What a model remembers of a document, in a file: read once, asked later.

A file of safetensors holds the bank of one row, filled slots only, and the tokens of its open
segment. Its header says which model and tokenizer it belongs to, and a digest of it all.

Shapes: M slots.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..data.sources.documents import first_line
from ..errors import ConfigError
from ..memory import Memory, MemoryBank
from ..model import MemorizingNet
from ..pretrained.keys import fingerprint_weights
from ..pretrained.memorized import MemorizedModel
from .session import Session

FORMAT = 1
HEADER = "remembered"
OPEN = "open.input_ids"


@dataclass(frozen=True)
class Passage:
    """Consecutive tokens of a document, of which a memory holds pairs."""

    name: str
    """Of the document."""
    first: int
    """Position in the memory of the document's first token that it still holds."""
    begin: int
    """Position of that token in the document; more than 0 where the memory had to forget."""
    count: int
    """Tokens."""
    library: bool = False
    """Whether positions are those of a library, not of a memory."""

    def place(self, position: int) -> int:
        """The position in the document of a position in the memory."""
        return position - self.first + self.begin


def identity(model: MemorizingNet) -> str:
    """A name of a model: of its weights, those of a base among them, and of what they mean."""
    weights = fingerprint_weights(dict(model.named_parameters()))
    # How a memory was trained does not matter to what it holds.
    facts = {k: v for k, v in model.architecture().items() if not k.startswith(("base", "adapt."))}
    digest = hashlib.sha256(weights.encode())
    digest.update(json.dumps(facts, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:16]


def _digest(tensors: dict[str, Tensor], header: dict[str, Any]) -> str:
    state = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        state.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        state.update(flat.numpy().data)
    return state.hexdigest()


def filled(bank: MemoryBank) -> dict[str, Tensor]:
    """``bank.tensors()`` without the slots that no row has filled."""
    found = {}
    for name, tensor in bank.tensors().items():
        room, layer, _ = name.split(".", 2)
        if room == "memory" and tensor.ndim > 1:
            used = max(1, int(bank.memories[int(layer)].used.max()))
            tensor = tensor[:, :, :used] if tensor.ndim > 2 else tensor[:, :used]
        found[name] = tensor.contiguous()
    return found


def check_out(path: Path) -> None:
    """Refuse a file that cannot be written, before a document is read for it.

    Raises:
        ConfigError: naming it.
    """
    if path.is_dir():
        raise ConfigError("out", str(path), "is a folder; give a file")
    above = next(folder for folder in path.absolute().parents if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        remedy = f"cannot be written, for {above} is no folder that can; give another file"
        raise ConfigError("out", str(path), remedy)


def save(session: Session, path: str | Path, name: str, tokenizer: str) -> None:
    """Write what a session of one row has read; the file is complete as soon as it is there.

    Args:
        session: that has read one document.
        path: the file.
        name: of the document.
        tokenizer: fingerprint of the tokenizer that made its tokens.

    Raises:
        ConfigError: where it cannot be written.
    """
    if session.bank.batch_size != 1:
        raise ValueError(f"a file holds one row, not {session.bank.batch_size}")
    session.bank.own()
    tensors = {**filled(session.bank), OPEN: session.open.input_ids.clone()}
    header = {
        "format": FORMAT,
        "model": identity(session.model),
        "tokenizer": tokenizer,
        "segment_length": session.segment_length,
        "document": name,
        "tokens": session.count,
        "slots": {str(layer): m.size for layer, m in session.bank.memories.items()},
    }
    whole = {HEADER: json.dumps({**header, "digest": _digest(tensors, header)})}
    path = Path(path)
    draft = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, draft, whole)
        with draft.open("rb") as stream:
            os.fsync(stream.fileno())
        draft.replace(path)
    except (OSError, SafetensorError) as error:
        draft.unlink(missing_ok=True)
        remedy = f"cannot be written ({first_line(error)}); give another file"
        raise ConfigError("out", str(path), remedy) from error


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {})[HEADER])
            tensors = {name: file.get_tensor(name) for name in [*file.keys()]}
        digest = header.pop("digest")
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
        remedy = f"is no memory of a document, or damaged ({first_line(error)}); remember it again"
        raise ConfigError("memory", str(path), remedy) from error
    if digest != _digest(tensors, header):
        raise ConfigError("memory", str(path), "is damaged; remember the document again")
    return tensors, header


def load(
    path: str | Path,
    model: MemorizingNet,
    tokenizer: str,
    to_join: bool = False,
    size: int | None = None,
) -> tuple[Session, str]:
    """A session that continues where ``save`` left it, and the name of its document.

    Args:
        path: the file.
        model: the network that read the document.
        tokenizer: fingerprint of the tokenizer.
        to_join: whether its memories need no room but for the open segment.
        size: slots of each memory, which keeps the newest pairs; 0 for none. Default: as many as
            the one had that was saved.

    Raises:
        ConfigError: where the file is damaged, or of another model, XL cache or tokenizer.
    """
    path = Path(path)
    tensors, header = _read(path)
    if header["format"] != FORMAT:
        remedy = f"has format {header['format']}, and this version reads {FORMAT}; remember again"
        raise ConfigError("memory", str(path), remedy)
    own = {"model": identity(model), "tokenizer": tokenizer}
    for what, value in own.items():
        if header[what] != value:
            remedy = (
                f"was made with another {what} ({header[what]}) than this one ({value}); give "
                "that one, or remember the document again"
            )
            raise ConfigError("memory", str(path), remedy)
    check_cache(model, _cached(tensors), "memory", path)
    if size is None:
        size = max([int(slots) for slots in header["slots"].values()], default=0)
    if to_join:
        stores = [x for name, x in tensors.items() if name.startswith("memory.")]
        filled = [x.shape[2] for x in stores if x.ndim == 4]
        size = min(size, max(filled, default=0) + header["segment_length"])
    bank = model.new_memory(1, size=size)
    input_ids = tensors.pop(OPEN)
    bank.load(tensors)
    session = Session(model, 1, header["segment_length"], bank)
    session.count = header["tokens"] - input_ids.shape[1]
    if input_ids.numel():
        session.read(input_ids.to(next(model.parameters()).device))
    return session, header["document"]


def _cached(tensors: dict[str, Tensor]) -> int:
    """Tokens of the XL caches among the tensors of a bank; 0 for none."""
    caches = [x for name, x in tensors.items() if name.startswith("cache.")]
    return max([x.shape[2] for x in caches if x.ndim == 4], default=0)


def check_cache(model: MemorizingNet, cached: int, key: str, path: Path) -> None:
    """Refuse what a pretrained model read with another XL cache: reading on would differ.

    A command gives such a model a cache as long as its segments, whatever the file was read with.

    Args:
        model: that is to read on; one of our own has the cache that it was trained with.
        cached: tokens of the XL cache that the document was read with.
        key: of the path, for the message.
        path: of the file or folder.

    Raises:
        ConfigError: naming both lengths.
    """
    if isinstance(model, MemorizedModel) and model.xl_cache != cached:
        own = model.xl_cache
        remedy = (
            f"was read with an XL cache of {cached} tokens, and this model has one of {own}; give "
            f"--segment_length {cached} or xl_cache={cached}, or remember the document again"
        )
        raise ConfigError(key, str(path), remedy)


def passages(session: Session, name: str) -> list[Passage]:
    """What the memory of a session holds of the one document that it has read."""
    begin = 0
    for memory in session.bank.memories.values():
        held = memory.positions[0][memory.valid()[0]]
        begin = int(held.min()) if held.numel() else session.count
    return [Passage(name, begin, begin, session.count - begin)]


def join(
    sessions: Sequence[Session], names: Sequence[str], room: int, size: int | None = None
) -> tuple[Session, list[Passage]]:
    """One session whose memory holds those of all, one after the other.

    A token can retrieve pairs of all documents; none was read with another one before it. The XL
    caches are empty.

    Args:
        sessions: of one row each, of one model; the tokens of their open segments are written.
        names: of their documents.
        room: slots for the text that follows.
        size: slots in all, which keep the newest pairs. Default: for all pairs and the text.
    """
    first = sessions[0]
    model, length = first.model, max(session.segment_length for session in sessions)
    if len(sessions) == 1:
        return first, passages(first, names[0])
    for session in sessions:
        session.close()
    own = [passages(session, name)[0] for session, name in zip(sessions, names, strict=True)]
    layers = [*first.bank.memories]
    used = {n: [int(s.bank.memories[n].used[0]) for s in sessions] for n in layers}
    total = max((sum(counts) for counts in used.values()), default=0)
    bank = model.new_memory(1, size=total + room if size is None else size)
    joined: list[Passage] = []
    start = 0
    for passage in own:
        joined.append(replace(passage, first=start))
        start += passage.count
    for layer in bank.memories:
        parts = [in_order(session.bank.memories[layer]) for session in sessions]
        tensors = {
            name: torch.cat([part[name] for part in parts], 2 if parts[0][name].ndim > 2 else 1)
            for name in parts[0]
            if parts[0][name].ndim > 1
        }
        if "places" in tensors:
            shifts = [new.first - old.first for new, old in zip(joined, own, strict=True)]
            moved = [part["places"] + by for part, by in zip(parts, shifts, strict=True)]
            tensors["places"] = torch.cat(moved, 1)
            tensors["read"] = torch.tensor([start])
        count = torch.tensor([sum(used[layer])])
        none = torch.zeros_like(count)
        bank.memories[layer].load(
            {**tensors, "written": count, "origin": none, "oldest": none, "bound": count}
        )
    result = Session(model, 1, length, bank)
    result.count = start
    return result, joined


def in_order(memory: Memory) -> dict[str, Tensor]:
    """The tensors of a memory of one row: its pairs from the oldest to the newest alone."""
    used = int(memory.used[0])
    end = int(memory.written[0] - memory.origin[0])
    slots = torch.arange(end - used, end, device=memory.device) % memory.size
    return {
        name: tensor[:, :, slots] if tensor.ndim > 2 else tensor[:, slots]
        for name, tensor in memory.tensors().items()
        if tensor.ndim > 1
    }
