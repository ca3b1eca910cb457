"""Sample retrievals: the true tokens of the document, as text that does nothing."""

from __future__ import annotations

import html
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small import logs, make_data, make_module, make_trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugin_util import markdown_to_safe_html

from memorizing_transformers.data.tokens.tokenizers import byte_tokenizer
from memorizing_transformers.memory import Memory
from memorizing_transformers.model import Retrieval
from memorizing_transformers.training.callbacks.samples import (
    CONTEXT,
    describe,
    stored_context,
    visible,
)
from memorizing_transformers.training.tensorboard import RunLogger

HOSTILE = (
    "plain text\n\n# heading\n<script>alert(1)</script>\n```\n</code></pre><img src=x onerror=a()>"
    "\n`` ` |a|b|\n[link](javascript:a) &lt; \x00\x1b[31m\x7f \u202egnp\u2066 \u05e9\u05dc "
    "\U0001f600 \u2028 end"
)


def read_all(ids: list[int], size: int) -> Memory:
    """A memory of one row that has read these tokens."""
    memory = Memory(1, 1, size, 2)
    pairs = torch.zeros(1, 1, len(ids), 2)
    memory.write(pairs, pairs, token_ids=torch.tensor([ids]))
    return memory


def test_a_context_is_what_the_document_holds_there() -> None:
    document = torch.randint(0, 256, (100,)).tolist()
    memory = read_all(document, 64)  # holds tokens 36 to 99
    for position in range(36, 100):
        before, token, after = stored_context(memory, 0, position)
        first = max(36, position - CONTEXT)
        assert before == document[first:position]
        assert token == document[position]
        assert after == document[position + 1 : position + 1 + CONTEXT]


def test_contexts_are_true_in_a_memory_that_grew() -> None:
    document = torch.randint(0, 256, (100,)).tolist()
    grown = Memory(1, 1, 80, 2)
    grown.load(read_all(document, 64).tensors())
    assert grown.origin.item() == 36
    before, token, after = stored_context(grown, 0, 50)
    assert [*before, token, *after] == document[50 - CONTEXT : 51 + CONTEXT]


@pytest.mark.parametrize("text", [HOSTILE, *filter(None, HOSTILE.split("\n"))])
def test_text_can_neither_break_out_nor_be_lost(text: str) -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer(text * 3).input_ids
    memory = read_all(ids, 2 * len(ids))
    tokens = tokenizer(text).input_ids[:12]
    shape = (1, 2, len(tokens), 4)
    slots = torch.randint(0, len(ids), shape)
    weights = torch.rand(shape).softmax(-1)
    valid, unused = torch.ones(shape, dtype=torch.bool), torch.zeros(0)
    found = Retrieval(
        slots, valid, weights, torch.ones(shape[:3]), unused, unused, unused, slots, valid
    )
    markdown = describe(memory, found, tokens, 0, tokenizer.decode)
    lines = markdown.split("\n")
    assert all(line.startswith("    ") and visible(line) == line for line in lines)
    page = markdown_to_safe_html(markdown)
    assert re.fullmatch(r"<pre><code>[^<>]*</code></pre>", page)
    shown = html.unescape(page.removeprefix("<pre><code>").removesuffix("</code></pre>"))
    kept = [line.removeprefix("    ").rstrip() for line in lines if line.strip()]
    assert [line.rstrip() for line in shown.split("\n") if line] == kept


def test_what_is_shown_is_what_was_retrieved() -> None:
    document = [*range(100)]
    memory = read_all(document, 64)
    slots = torch.zeros(1, 1, 3, 2, dtype=torch.long)
    slots[0, 0, 1] = torch.tensor([3, 40])  # tokens 67 and 40
    valid = torch.ones_like(slots, dtype=torch.bool)
    weights = torch.tensor([[[[0.5, 0.5], [0.3, 0.7], [0.6, 0.4]]]])
    share = torch.tensor([[[0.5, 0.8, 0.5]]])
    found = Retrieval(slots, valid, weights, share, *[torch.zeros(0)] * 3, slots, valid)

    def decode(ids: Any) -> str:
        return " ".join(map(str, ids))

    head, query, best, second = describe(memory, found, [100, 101, 102], 0, decode).split("\n")[:4]
    assert head == "    head 0, token 101 of its document, share of memory 0.80"
    assert query.endswith("100⟦101⟧102")
    assert re.search(r"weight 0\.70 +61 back .*\b39⟦40⟧41\b", best)
    assert re.search(r"weight 0\.30 +34 back .*\b66⟦67⟧68\b", second)


def texts_of(folder: Path) -> dict[str, dict[int, str]]:
    events = EventAccumulator(str(folder), size_guidance={"tensors": 0})
    events.Reload()
    tags = [tag for tag in events.Tags()["tensors"] if tag.startswith("retrievals/")]
    return {
        tag: {e.step: e.tensor_proto.string_val[0].decode() for e in events.Tensors(tag)}
        for tag in tags
    }


def test_samples_of_a_run_are_lines_of_its_documents(texts: Path, tmp_path: Path) -> None:
    module = make_module(layers=[0, 1])
    logger = RunLogger(tmp_path, name="", version="run")
    trainer = make_trainer(max_steps=20, logger=logger, callbacks=logs(seldom=4))
    trainer.fit(module, datamodule=make_data(texts))
    documents = [path.read_text("utf-8") for path in texts.glob("*.txt")]
    samples = texts_of(tmp_path / "run")
    assert samples.keys() == {"retrievals/layer0/text_summary", "retrievals/layer1/text_summary"}
    for by_step in samples.values():
        assert [*by_step] == [4, 8, 12, 16]
        for text in by_step.values():
            shown = re.findall(r"^ {6}(?:reads|weight \S+ +[\d,]+ back) +(.+⟦.+)$", text, re.M)
            assert len(shown) == 2 * (1 + 3)
            for line in shown:
                assert any(re.sub("[⟦⟧]", "", line).strip() in document for document in documents)


def test_without_a_tokenizer_ids_are_shown() -> None:
    from memorizing_transformers.training.callbacks import RetrievalSamples

    samples = RetrievalSamples()
    samples.module = SimpleNamespace(tokenizer=None)
    assert samples._decoder()([3, 4]) == "3 4"
