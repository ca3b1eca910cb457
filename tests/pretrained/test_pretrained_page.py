"""The snippets of docs/pretrained.md run, on a small model in place of SmolLM2; those of
docs/generation.md too."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from families import tiny

from memorizing_transformers.data.tokens.tokenizers import train_bpe


def test_the_snippets_of_the_page_run_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (Path(__file__).parents[2] / "docs" / "pretrained.md").read_text("utf-8")
    snippets = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    assert len(snippets) == 3
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "data" / "models" / "smollm2-135m"
    tokenizer = train_bpe(["It was the best of times, it was the worst of times. " * 4], 270)
    tiny("llama", vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    names: dict = {}
    for snippet in snippets:
        exec(compile(snippet, "docs/pretrained.md", "exec"), names)
    assert names["output"].retrievals
    assert names["model"].memory_layers


def test_the_snippet_of_generation_runs() -> None:
    page = (Path(__file__).parents[2] / "docs" / "generation.md").read_text("utf-8")
    snippets = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    (snippet,) = [one for one in snippets if "openai" not in one]
    names: dict = {}
    exec(compile(snippet, "docs/generation.md", "exec"), names)
    assert names["answers"].shape == (4, 30)
