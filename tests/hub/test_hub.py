"""The model outside the training world: called on text, saved and loaded."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from exported import SMALL, TEXT, small
from transformers import AutoModelForCausalLM

from memorizing_transformers import MemorizingTransformer, MemoryConfig
from memorizing_transformers.data.tokens.tokenizers import train_bpe
from memorizing_transformers.errors import ConfigError


def test_the_snippet_of_the_readme() -> None:
    model = MemorizingTransformer()
    tokenized = model.tokenizer(TEXT)
    output = model(tokenized)
    assert output.logits.shape == (1, len(TEXT), 256)
    assert output.logits.isfinite().all()


def test_every_form_of_input_gives_the_same_logits() -> None:
    model = small()
    ids = model.tokenizer(TEXT)["input_ids"]
    expected = model(torch.tensor([ids])).logits
    tokenized = model.tokenizer(TEXT, return_tensors="pt")
    for form in (ids, [ids], torch.tensor(ids), tokenized, {"input_ids": ids}):
        assert torch.equal(model(form).logits, expected)
    assert torch.equal(model([ids, ids]).logits[1:], expected)


def test_it_reads_and_commits_as_plain_torch() -> None:
    model, ids = small(), torch.randint(0, 256, (2, 8))
    bank = model.new_memory(2)
    bank.commit(model(ids, bank).pairs, token_ids=ids)
    assert bank.memories[1].fill.tolist() == [8, 8]
    assert not torch.equal(model(ids, bank).logits, model(ids).logits)


def read_twice(model: MemorizingTransformer) -> torch.Tensor:
    """Logits of a text read after itself, so that the memory speaks too."""
    bank, tokenized = model.new_memory(1), model.tokenizer(TEXT)
    bank.commit(model(tokenized, bank).pairs)
    return model(tokenized, bank).logits


def test_saved_and_loaded_it_is_the_same(folder: Path) -> None:
    once = MemorizingTransformer.from_pretrained(folder)
    assert once.config.memory.combine == "content"
    assert once.tokenizer.get_vocab() == train_bpe([TEXT * 20], 270).get_vocab()
    once.save_pretrained(folder.parent / "again")
    twice = MemorizingTransformer.from_pretrained(str(folder.parent / "again"))
    assert twice.config == once.config
    assert isinstance(twice.config.memory, MemoryConfig)
    assert twice.state_dict().keys() == once.state_dict().keys()
    for name, weight in once.state_dict().items():
        assert torch.equal(twice.state_dict()[name], weight), name
    assert not twice.training
    assert torch.equal(read_twice(twice), read_twice(once))


def test_the_saved_logits_are_the_loaded_ones(tmp_path: Path) -> None:
    model = small(xl_cache=5, num_kv_heads=1)
    model.save_pretrained(tmp_path)
    assert torch.equal(
        read_twice(MemorizingTransformer.from_pretrained(tmp_path)), read_twice(model)
    )


def test_the_folder_holds_plain_files(folder: Path) -> None:
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*")}
    assert {"config.json", "model.safetensors", "tokenizer/tokenizer.json"} <= names


def test_every_setting_is_saved_though_it_be_a_default(tmp_path: Path) -> None:
    MemorizingTransformer(**SMALL).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["memory"]["top_k"] == 32
    assert saved["vocab_size"] == 256
    assert saved["qk_scale_init"] == 8.0


def test_one_field_of_the_memory_can_be_replaced_at_load(folder: Path) -> None:
    model = MemorizingTransformer.from_pretrained(folder, memory={"size": 512}, xl_cache=3)
    assert model.config.xl_cache == 3
    assert (model.config.memory.size, model.config.memory.top_k) == (512, 4)
    assert model.config.memory.combine == "content"
    assert model.new_memory(1).memories[1].size == 512
    saved = MemorizingTransformer.from_pretrained(folder)
    for name, weight in saved.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight), name


def test_the_whole_memory_can_be_replaced_at_load(folder: Path) -> None:
    memory = MemoryConfig(size=16, top_k=2, combine="content", position_bias="t5", layers=[1])
    assert MemorizingTransformer.from_pretrained(folder, memory=memory).config.memory == memory


def test_a_replaced_setting_is_saved(folder: Path) -> None:
    MemorizingTransformer.from_pretrained(folder, memory={"size": 512}).save_pretrained(folder)
    assert MemorizingTransformer.from_pretrained(folder).config.memory.size == 512


def test_weights_that_are_missing_are_told_and_not_invented(folder: Path) -> None:
    """``strict=False`` is for those who want to add a part and train it."""
    with pytest.raises(
        ConfigError, match=r"do not fit the settings .*layers.0.attention.reader.gate.linear"
    ):
        MemorizingTransformer.from_pretrained(folder, memory={"layers": [0, 1]})
    model = MemorizingTransformer.from_pretrained(folder, memory={"layers": [0, 1]}, strict=False)
    assert model.config.memory_layers == (0, 1)


def test_weights_of_another_width_are_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="do not fit the settings"):
        MemorizingTransformer.from_pretrained(folder, d_model=32)


def test_a_bad_setting_at_load_is_refused_as_ever(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.memory\.top_k = 99"):
        MemorizingTransformer.from_pretrained(folder, memory={"top_k": 99})


def test_a_folder_that_does_not_exist_is_told_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no folder, and no model on the hub") as caught:
        MemorizingTransformer.from_pretrained(tmp_path / "nothing")
    assert str(tmp_path / "nothing") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_name_that_is_not_on_this_machine_is_told_in_one_line() -> None:
    with pytest.raises(ConfigError, match="is no folder, and no model on the hub"):
        MemorizingTransformer.from_pretrained("nobody/nothing", local_files_only=True)


def test_a_folder_without_a_model_is_told_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no config.json"):
        MemorizingTransformer.from_pretrained(tmp_path)


def test_a_folder_without_weights_is_told_in_one_line(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"cannot be read .*model.safetensors"):
        MemorizingTransformer.from_pretrained(folder)


def test_a_broken_weights_file_is_told_in_one_line(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"half")
    with pytest.raises(ConfigError, match=r"cannot be read"):
        MemorizingTransformer.from_pretrained(folder)


def test_a_model_on_the_hub_brings_its_tokenizer(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub is played by a folder: what is asked for there, and with which options."""
    asked: list[tuple[str, Any]] = []

    def download(repo_id: str, filename: str, **options: Any) -> str:
        asked.append((filename, options["revision"]))
        return str(folder / filename)

    def snapshot(repo_id: str, allow_patterns: str, **options: Any) -> str:
        asked.append((allow_patterns, options["revision"]))
        return str(folder)

    monkeypatch.setattr("huggingface_hub.hub_mixin.hf_hub_download", download)
    monkeypatch.setattr("memorizing_transformers.pretrained.hub.snapshot_download", snapshot)
    model = MemorizingTransformer.from_pretrained("somebody/model", revision="v1")
    assert asked == [("config.json", "v1"), ("model.safetensors", "v1"), ("tokenizer/*", "v1")]
    local = MemorizingTransformer.from_pretrained(folder)
    assert model.tokenizer.get_vocab() == local.tokenizer.get_vocab()
    assert torch.equal(read_twice(model), read_twice(local))


@pytest.mark.parametrize("ours_first", [False, True])
def test_the_auto_class_of_transformers_opens_a_saved_folder(
    tmp_path: Path, ours_first: bool
) -> None:
    imports = ["import transformers\n", "import memorizing_transformers\n"]
    code = (
        "import sys\n"
        + "".join(reversed(imports) if ours_first else imports)
        + "model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "print(type(model).__name__, model.config.segment_length, end='')\n"
    )
    model = small(xl_cache=16)
    model.save_pretrained(tmp_path)
    command = [sys.executable, "-c", code, str(tmp_path)]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout
    assert shown == "MemorizingForCausalLM 16"
    again = AutoModelForCausalLM.from_pretrained(tmp_path, segment_length=8, memory={"top_k": 2})
    assert again.config.segment_length == 8
    assert again.net.config.memory.top_k == 2
    assert torch.equal(again.net.embedding.weight, model.embedding.weight)
    ids = torch.randint(256, (2, 40))
    again.save_pretrained(tmp_path / "copy")
    copy = MemorizingTransformer.from_pretrained(tmp_path / "copy")
    assert torch.equal(copy.embedding.weight, model.embedding.weight)
    made = again.generate(ids, max_new_tokens=5, do_sample=False)
    assert made.shape == (2, 45)
