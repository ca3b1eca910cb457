"""The command that continues a prompt after what was read or remembered."""

from __future__ import annotations

import sys
from typing import Any


def generate(
    model: str,
    prompt: str,
    document: str | None = None,
    memory: list[str] | None = None,
    max_new_tokens: int = 100,
    temperature: float = 0.7,
    top_p: float = 1.0,
    top_k: int = 0,
    repetition_penalty: float = 1.0,
    stop: list[str] | None = None,
    seed: int = 0,
    sources: bool = False,
    segment_length: int | None = None,
    memory_size: int | None = None,
    device: str | None = None,
) -> None:
    """Continue a prompt after a document, or after what was remembered of documents.

    Example: python -m memorizing_transformers generate --model model --memory book.memory
    --prompt "Her name was"

    Args:
        model: A checkpoint, a folder of export, or the folder or hub name of a pretrained model.
        prompt: The text to continue.
        document: A UTF-8 text file that is read before the prompt.
        memory: Files that remember wrote, or folders of them; all of them are searched.
        max_new_tokens: Number of tokens to generate, at most.
        temperature: Divides the logits before a token is drawn, 0.0001 to 100. 0 always takes the
            likeliest token.
        top_p: Draw from the likeliest tokens that together have this probability.
        top_k: Draw from this number of likeliest tokens. 0 = all.
        repetition_penalty: Makes tokens that were already there less likely. 1 = off.
        stop: Texts that end the generation.
        seed: Seed of what is drawn.
        sources: Show for each token the passages that it was predicted from.
        segment_length: Tokens that are read at once. Default: as in training, else the length of
            the XL cache, else 512.
        memory_size: Slots of each memory, which keep the newest pairs; 0 = nothing is remembered.
            Default: as in training, and for files of memory as they were written.
        device: Where to compute. Default: a GPU where there is one.
    """
    from transformers import TextStreamer, set_seed

    from ..errors import ConfigError
    from ..generation.causal_lm import SessionCache, causal_lm
    from ..generation.drawing_bounds import check_drawing
    from ..generation.session import Session
    from ..generation.sources import Sources
    from .reading import open_reader

    for name, value, least in (
        ("max_new_tokens", max_new_tokens, 1),
        ("top_k", top_k, 0),
        ("seed", seed, 0),
    ):
        if not value >= least:
            raise ConfigError(name, value, f"must be at least {least}")
    if seed >= 2**32:
        raise ConfigError("seed", seed, "must be below 2**32")
    if stop is not None and not all(stop):
        raise ConfigError("stop", " ".join(stop), "holds an empty text; leave it out")
    if not 0 < top_p <= 1:
        raise ConfigError("top_p", top_p, "must lie above 0 and be at most 1")
    check_drawing(temperature, repetition_penalty)
    if not prompt:
        raise ConfigError("prompt", prompt, "is empty; give a text to continue")
    reader = open_reader(model, segment_length, memory_size, device)
    tokenizer = reader.tokenizer
    if memory:
        session, passages = reader.recall(memory)
    else:
        session, passages = Session(reader.model, 1, reader.segment_length), []
    if document is not None:
        passages.append(reader.read(session, document))
    observer = Sources(passages, tokenizer)
    if sources:
        session.observer = observer
    ids = reader.ids(prompt)
    drawn: dict[str, Any] = {"do_sample": False}
    if temperature:
        drawn = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": top_k}
    set_seed(seed)
    sys.stdout.write(prompt)
    writer: Any = causal_lm(reader.model, session.segment_length, tokenizer)
    made = writer.generate(
        ids,
        past_key_values=SessionCache([session]),
        max_new_tokens=max_new_tokens,
        repetition_penalty=repetition_penalty,
        stop_strings=stop or None,
        tokenizer=tokenizer,
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
        **drawn,
    )
    if sources:
        new = made[0, ids.shape[1] :].tolist()
        show(tokenizer, new, observer.origins[-len(new) :])


def show(tokenizer: Any, tokens: list[int], origins: list[Any]) -> None:
    """A table of tokens and where their predictions came from."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Where each token was predicted from", box=box.SIMPLE_HEAD, expand=True)
    copies = any(origin.copied is not None for origin in origins)
    table.add_column("token", no_wrap=True, min_width=8)
    table.add_column("memory", justify="right", min_width=6)
    if copies:
        table.add_column("copied", justify="right", min_width=6)
    table.add_column("document", min_width=12, max_width=24, overflow="ellipsis", no_wrap=True)
    table.add_column("position", justify="right", min_width=8)
    table.add_column("passage", no_wrap=True, overflow="ellipsis", ratio=1)
    for token, origin in zip(tokens, origins, strict=True):
        best = origin.sources[0] if origin.sources else None
        if origin.repeated is not None and origin.repeated.weight > origin.memory:
            best = origin.repeated
        cells = [repr(tokenizer.decode([token]))[1:-1], f"{origin.memory:.0%}"]
        if copies:
            cells.append("" if origin.copied is None else f"{origin.copied:.0%}")
        if best is None:
            cells += ["", "", ""]
        else:
            name = best.document or "(the prompt and what follows)"
            cells += [name, f"{best.position:,}", repr(best.text)[1:-1]]
        table.add_row(*cells)
    Console(soft_wrap=False).print(table)
