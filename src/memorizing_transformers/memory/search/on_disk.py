"""An index over very many keys in files that are mapped: inverted lists of product codes.

Jégou et al., "Product quantization for nearest neighbor search", 2011, as faiss has it: keys lie in
lists around centroids, each as D / 2 bytes. Lists are read from the disk as they are asked for.

Shapes: G key/value heads, D head width.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import faiss as _faiss
import numpy as np
from numpy.typing import NDArray

# Its type stubs know the C++ names only.
faiss: Any = _faiss

FLAGS = faiss.IO_FLAG_ONDISK_SAME_DIR | faiss.IO_FLAG_READ_ONLY
"""The lists lie next to the index, wherever the folder is moved."""
TRAIN_ON = 64
"""Keys for each list that centroids are learned from, at most."""
MOST_LISTS = 4096
CODES = 256
"""Centroids of a part of a key, which a byte can name; fewer keys cannot be indexed."""
ADD_AT_ONCE = 2**18
"""Keys that are encoded at once."""


class OnDiskIndex:
    """The index of one memory, one part for each head.

    Args:
        files: of each head, as ``extend`` wrote them.
        probes: lists that a query reads; None for a sixteenth of them, and at least 8.
    """

    def __init__(self, files: Sequence[Path], probes: int | None = None) -> None:
        with unsaid():
            self.heads = [faiss.read_index(str(file), FLAGS) for file in files]
        for head in self.heads:
            # Else each search starts 32 threads that read lists ahead, which takes milliseconds.
            faiss.downcast_InvertedLists(head.invlists).prefetch_nthread = 0
            head.nprobe = min(head.nlist, probes or max(8, head.nlist // 16))
        self.count = self.heads[0].ntotal
        """Pairs that it knows."""

    def nearest(self, head: int, queries: NDArray[Any], number: int) -> NDArray[Any]:
        """Slots (n, number) whose keys have large inner products; -1 for none."""
        found: NDArray[Any] = self.heads[head].search(queries, number)[1]
        return found


@contextmanager
def unsaid() -> Iterator[None]:
    """Keeps what faiss prints about its files out of the standard output, which is the answer's."""
    sys.stdout.flush()
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        ctypes.CDLL(None).fflush(None)
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


def extend(
    old: Path | None, new: Path, keys: Callable[[int, int], NDArray[Any]], first: int, last: int
) -> None:
    """Write the index of one head with more keys; the old one is left as it is.

    Centroids are learned when an index begins, and kept.

    Args:
        old: file of the index of slots 0 to ``first`` - 1; None where there is none.
        new: file to write; its lists and its centroids lie next to it.
        keys: gives the keys (n, D) fp32 of slots from .. to.
        first: the first slot to add.
        last: the slot after the last one.
    """
    empty = new.with_suffix(".empty")
    if old is None:
        faiss.write_index(_trained(keys, last), str(empty))
    else:
        shutil.copyfile(old.with_suffix(".empty"), empty)
    added = faiss.read_index(str(empty))
    for begin in range(first, last, ADD_AT_ONCE):
        end = min(last, begin + ADD_AT_ONCE)
        added.add_with_ids(keys(begin, end), np.arange(begin, end))
    with unsaid():
        parts = faiss.InvertedListsPtrVector()
        whole = [added] if old is None else [faiss.read_index(str(old), FLAGS), added]
        for one in whole:
            parts.push_back(one.invlists)
        lists = faiss.OnDiskInvertedLists(
            added.nlist, added.code_size, str(new.with_suffix(".lists"))
        )
        total = lists.merge_from_multiple(parts.data(), parts.size(), False)
        written = faiss.read_index(str(empty))
        written.replace_invlists(lists)
        written.ntotal = total
        faiss.write_index(written, str(new))


def _trained(keys: Callable[[int, int], NDArray[Any]], count: int) -> Any:
    lists = max(1, min(MOST_LISTS, count // TRAIN_ON))
    # Evenly spread over the keys, in runs, for they are read from a file.
    wanted = min(count, max(TRAIN_ON * lists, 16 * CODES))
    runs = min(64, wanted)
    starts = np.linspace(0, count - wanted // runs, runs).astype(int)
    sample = np.concatenate([keys(start, start + wanted // runs) for start in starts])
    width = sample.shape[1]
    parts = width // 2 if width % 2 == 0 else 1
    index = faiss.IndexIVFPQ(
        faiss.IndexFlatIP(width), width, lists, parts, 8, faiss.METRIC_INNER_PRODUCT
    )
    for clustering in (index.cp, index.pq.cp):
        clustering.min_points_per_centroid = 1
    index.train(sample)
    return index
