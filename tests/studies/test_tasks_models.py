"""The models that the command tasks reads with: the control, tokenizers, figures that are none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from task_texts import latex
from transformers import LlamaConfig, LlamaForCausalLM

from memorizing_studies.tasks.running import Request, open_arms, open_other
from memorizing_studies.tasks.task import Settings
from memorizing_transformers import memorize
from memorizing_transformers.__main__ import main
from memorizing_transformers.data.tokens.tokenizers import byte_tokenizer
from memorizing_transformers.errors import ConfigError

SMALL = ["--questions", 8, "--min_distance", 48, "--max_tokens", 1024, "--segment_length", 64]


def llama() -> LlamaForCausalLM:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=256, num_hidden_layers=2, **sizes)).eval()


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of transformers, which gets a memory when it is opened."""
    folder = tmp_path_factory.mktemp("models") / "llama"
    llama().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def request(model: Path, **options: Any) -> Request:
    known = {"control": None, "reference": None, "out": "", "tasks": None, "items": None}
    known |= {"background": [], "settings": Settings(), "max_documents": 1, "text_column": "text"}
    known |= {"segment_length": 64, "memory_size": None, "device": "cpu"}
    return Request(str(model), ["x"], **{**known, **options})


def call(monkeypatch: pytest.MonkeyPatch, *args: object) -> None:
    monkeypatch.setattr("sys.argv", ["memorizing_transformers", "tasks", *map(str, args)])
    main()


def test_a_pretrained_control_has_no_memory(
    pretrained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    (tmp_path / "sets.txt").write_text(latex(0, 4))
    call(monkeypatch, "--model", pretrained, "--control", pretrained, *SMALL,
         "--data", tmp_path / "sets.txt", "--tasks", "label-recall", "far-copies",
         "--memory_size", 2048, "--out", tmp_path / "out")  # fmt: skip
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    for by_arm in scores.values():
        assert by_arm["control"] == by_arm["memory off"]
        assert by_arm["control"] != by_arm["memory on"]
    # Segments of 64 and as long an XL cache; items begin at 48.
    for name in ("table.md", "index.html"):
        assert "sees up to 128 tokens back" in (tmp_path / "out" / name).read_text("utf-8")
    assert "sees up to 128 tokens back" in capsys.readouterr().out.replace("\n", " ")
    control, reference = (open_other(request(pretrained), key, str(pretrained))
                          for key in ("control", "reference"))  # fmt: skip
    assert (control.size, reference.size) == (0, None)


def test_a_model_without_a_tokenizer_is_refused(pretrained: Path, tmp_path: Path) -> None:
    base = LlamaForCausalLM.from_pretrained(pretrained)
    memorize(base, {"size": 64, "top_k": 4}, [1], xl_cache=8).save_pretrained(tmp_path / "bare")
    with pytest.raises(ConfigError, match=r"model = .*bare': holds no tokenizer; set"):
        open_arms(request(tmp_path / "bare"))
    with pytest.raises(ConfigError, match=r"control = .*bare': holds no tokenizer; set"):
        open_arms(request(pretrained, control=str(tmp_path / "bare")))
