"""A small model whose answers depend on what it has read, and a server of it."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from memorizing_transformers import MemorizingTransformer
from memorizing_transformers.data.tokens.tokenizers import byte_tokenizer

TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"


def save_model(folder: Path, tokenizer: Any = None) -> Path:
    """A model in a folder, nearly all of whose last layer is what it retrieves; of bytes, unless
    another tokenizer is given."""
    tokenizer = tokenizer or byte_tokenizer()
    torch.manual_seed(0)
    memory = {"size": 256, "top_k": 8, "combine": "fixed", "fixed_value": 0.9, "layers": [-1]}
    sizes = {"d_model": 32, "num_layers": 2, "num_heads": 2, "xl_cache": 16}
    model = MemorizingTransformer(vocab_size=len(tokenizer), memory=memory, **sizes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    tokenizer.chat_template = TEMPLATE
    model.tokenizer = tokenizer
    model.save_pretrained(folder)
    return folder


def free_port() -> int:
    """One that nobody listens at now."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@contextlib.contextmanager
def serving(*args: object) -> Iterator[tuple[int, subprocess.Popen]]:
    """A server that answers; it ends with the context."""
    port = free_port()
    command = [sys.executable, "-m", "memorizing_transformers", "serve", "--port", str(port)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*command, *map(str, args)], stderr=subprocess.PIPE, text=True, env=environment
    )
    assert process.stderr is not None
    try:
        said = []
        for line in process.stderr:
            said.append(line)
            if line.startswith("serving"):
                break
        assert said, "the server said nothing"
        assert re.match(rf"serving \S+ at http://\S+:{port}/v1 until Ctrl-C", said[-1]), said
        limit = time.monotonic() + 60
        while time.monotonic() < limit:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
        yield port, process
    finally:
        process.terminate()
        try:
            process.wait(30)
        finally:
            process.kill()
