"""Sample retrievals as text: a token that a head read, and what the head retrieved for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ...data.batch import Batch
from ...memory import Memory, MemoryBank
from ...model import ModelOutput, Retrieval
from .observer import Observer, WarnOnce, tensorboards

CONTEXT = 12
"""Tokens shown on either side of a token."""
HEADS = 8
"""Heads shown of a layer."""
NEIGHBOURS = 3
"""Neighbours shown of a query, best first."""

Decode = Callable[[Sequence[int]], str]


def visible(text: str) -> str:
    """The text on one line, with escapes for characters that do not print (controls, line ends,
    direction marks), so that it can neither leave its line nor reorder it."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode()
        for c in text
    )


def marked(decode: Decode, before: Sequence[int], token: int, after: Sequence[int]) -> str:
    """A token in brackets within its context, on one line."""
    parts = (decode(before), decode([token]), decode(after))
    return "{}⟦{}⟧{}".format(*map(visible, parts))


def stored_context(memory: Memory, row: int, position: int) -> tuple[list[int], int, list[int]]:
    """A stored token and the tokens next to it in the document, as far as the ring holds them.

    Args:
        memory: the layer's memory.
        row: the row.
        position: number of the token in the row's document, from 0.
    """
    written, fill = int(memory.written[row]), int(memory.fill[row])
    first, last = max(written - fill, position - CONTEXT), min(written - 1, position + CONTEXT)
    positions = torch.arange(first, last + 1, device=memory.origin.device)
    tokens = memory.token_ids[row, (positions - memory.origin[row]) % memory.size].tolist()
    here = position - first
    return tokens[:here], tokens[here], tokens[here + 1 :]


def describe(
    memory: Memory, retrieval: Retrieval, tokens: Sequence[int], row: int, decode: Decode
) -> str:
    """For each head, the token of a row with the largest contribution of one retrieved pair, and
    what was retrieved for it.

    Args:
        memory: the layer's memory, before the segment is committed.
        retrieval: what the layer retrieved for the segment.
        tokens: the row's segment, without padding.
        row: the row.
        decode: turns token ids into text.

    Returns:
        Markdown: one code block, so that nothing in it is interpreted.
    """
    start, valid = int(memory.written[row]), retrieval.valid[row, :, : len(tokens)]
    weights = retrieval.weights[row, :, : len(tokens)].masked_fill(~valid, 0.0)
    part = retrieval.parts()[row, :, : len(tokens)].masked_fill(~valid, 0.0)
    lines = []
    for head in range(min(HEADS, part.shape[0])):
        query = int(part[head].amax(-1).argmax())
        before, after = tokens[max(0, query - CONTEXT) : query], tokens[query + 1 :][:CONTEXT]
        shown = marked(decode, before, tokens[query], after)
        share = retrieval.share[row, head, query].item()
        lines += [
            f"head {head}, token {start + query:,} of its document, share of memory {share:.2f}",
            f"  reads                      {shown}",
        ]
        count = min(NEIGHBOURS, int(valid[head, query].sum()))
        best = weights[head, query].topk(count)
        for weight, rank in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            position = int(memory.positions[row, retrieval.slots[row, head, query, rank]])
            shown = marked(decode, *stored_context(memory, row, position))
            distance = start + query - position
            lines.append(f"  weight {weight:.2f} {distance:>9,} back  {shown}")
        lines.append("")
    return "\n".join(f"    {line}" for line in lines)


class RetrievalSamples(Observer):
    """Writes sample retrievals of the fullest row to TensorBoard's text page.

    Args:
        every_n_steps: Training steps between two samples. 0 = never.
    """

    def __init__(self, every_n_steps: int = 500) -> None:
        super().__init__(every_n_steps)
        self._warn_once = WarnOnce("sample retrievals")

    def observe(self, batch: Batch, bank: MemoryBank, output: ModelOutput, step: int) -> None:
        """Write this step's samples."""
        writers = tensorboards(self.trainer)
        if writers:
            self._warn_once(lambda: self._write(writers, batch, bank, output, step))

    def _decoder(self) -> Decode:
        tokenizer = self.module.tokenizer
        if tokenizer is None:
            return lambda ids: " ".join(map(str, ids))
        return lambda ids: tokenizer.decode(ids, clean_up_tokenization_spaces=False)

    def _write(
        self, writers: list[Any], batch: Batch, bank: MemoryBank, output: ModelOutput, step: int
    ) -> None:
        decode = self._decoder()
        for layer, retrieval in output.retrievals.items():
            memory = bank.memories[layer]
            row = int(memory.fill.argmax())
            if not retrieval.valid[row].any() or not batch.mask[row].any():
                continue
            tokens = batch.input_ids[row][batch.mask[row]].tolist()
            text = describe(memory, retrieval, tokens, row, decode)
            for writer in writers:
                writer.add_text(f"retrievals/layer{layer}", text, step)
