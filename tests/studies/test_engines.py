"""A library that asks a vector database gives what it gives with its own scan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from build import random_tokens, small_model
from qdrant_client import QdrantClient

from memorizing_studies.engines.qdrant import from_qdrant
from memorizing_transformers.generation.library import Library
from memorizing_transformers.generation.session import Session

N = 8


def logits(library: Library) -> tuple[Session, torch.Tensor]:
    session = Session(library.model, 1, N)
    library.attach(session)
    ids = random_tokens(1, 2 * N + 3, 9)
    return session, torch.cat([out.logits for _, out in session.parts(ids)], 1)


@pytest.mark.parametrize("settings", [{}, {"dtype": "int8"}], ids=str)
def test_qdrant_finds_what_a_scan_finds(settings: dict[str, Any], tmp_path: Path) -> None:
    model = small_model(size=512, top_k=6, **settings).eval()
    library = Library.create(tmp_path / "library", model, "bytes", N, 400)
    client = QdrantClient(":memory:")
    for number, ids in enumerate([random_tokens(1, 150, 1), random_tokens(1, 60, 2)]):
        list(library.add(Session(model, 1, N), ids, str(number)))
        library.engine = None
        _, scanned = logits(library)
        from_qdrant(library, client, "library")
        session, asked = logits(library)
        search = session.bank.memories[1].library.search
        assert search.index.count == library.catalogue.count["1"]
        torch.testing.assert_close(asked, scanned)
        # Asked again, nothing is uploaded twice.
        assert logits(library)[0].bank.memories[1].library.search.index.count == search.index.count
