"""The model outside the training world: called on text, saved and loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from memorizing_transformers import MemorizingTransformer, MemoryConfig
from memorizing_transformers.data.tokens.tokenizers import train_bpe
from memorizing_transformers.errors import ConfigError

TEXT = "The quick brown fox jumps over the lazy dog"
SMALL: dict[str, Any] = {"d_model": 16, "num_layers": 2, "num_heads": 2}


def small(**settings: Any) -> MemorizingTransformer:
    memory = {"size": 64, "top_k": 4, "combine": "content", "position_bias": "t5", "layers": [1]}
    return MemorizingTransformer(**{**SMALL, "memory": memory, **settings}).eval()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where a model with a BPE tokenizer and no weight at its start was saved."""
    tokenizer = train_bpe([TEXT * 20], 270)
    model = small(vocab_size=len(tokenizer))
    model.tokenizer = tokenizer
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


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


@pytest.mark.parametrize("text", [TEXT, "a"])
def test_what_the_tokenizer_returns_can_be_unpacked(text: str) -> None:
    model = small()
    expected = model(model.tokenizer(text)).logits
    for form in (None, "pt", "np"):
        logits = model(**model.tokenizer(text, return_tensors=form)).logits
        assert torch.equal(logits, expected)
    assert expected.shape == (1, len(text), 256)


def test_padding_at_the_right_changes_no_logits_before_it() -> None:
    model = small()
    ids = torch.randint(256, (2, 7))
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    logits = model(ids, attention_mask=mask).logits
    assert torch.allclose(logits[1, :4], model(ids[1, :4]).logits[0], atol=1e-5)
    assert torch.equal(model({"input_ids": ids, "attention_mask": mask}).logits, logits)


@pytest.mark.parametrize(
    "mask", [[[0, 1, 1]], [[1, 0, 1]], [[1, 1]], [[1, 1, 1], [1, 1, 1]], [0, 0, 1]]
)
def test_padding_elsewhere_is_refused(mask: Any) -> None:
    model = small()
    for call in (
        lambda: model([[1, 2, 3]], attention_mask=mask),
        lambda: model({"input_ids": [[1, 2, 3]], "attention_mask": mask}),
    ):
        with pytest.raises(ConfigError, match=r"attention_mask = .*at the right"):
            call()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("a text", "tokenizer"),
        (None, "tokenizer"),
        ([], "no token"),
        ([[]], "no token"),
        ({"input_ids": [], "attention_mask": []}, "no token"),
        ([[1, 2], [1, 2, 3]], "one length"),
        (torch.ones(1, 3), "integers"),
        (torch.ones(1, 2, 3).long(), "integers"),
        ([256], "below 256"),
        ([[255, -1]], "at least 0"),
    ],
)
def test_what_is_no_input_is_told_in_one_line(given: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=f"input_ids = .*{said}") as caught:
        small()(given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["labels", "use_cache", "output_attentions", "memry"])
def test_arguments_of_a_call_that_are_not_known_are_named(name: str) -> None:
    with pytest.raises(ConfigError, match=f"^{name} = "):
        small()([1, 2], **{name: torch.ones(2, 2)})


def test_settings_that_are_not_known_are_named(folder: Path) -> None:
    for load in (
        MemorizingTransformer,
        lambda **s: MemorizingTransformer.from_pretrained(folder, **s),
    ):
        with pytest.raises(ConfigError, match=r"d_modell = 16: .*did you mean .*d_model"):
            load(d_modell=16)
        with pytest.raises(ConfigError, match=r"model.memory.sise = 3: .*model.memory.size"):
            load(memory={"sise": 3})


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_weights_are_loaded_in_the_type_asked_for(folder: Path, key: str) -> None:
    saved = MemorizingTransformer.from_pretrained(folder)
    for given in (torch.bfloat16, "bfloat16", "torch.bfloat16"):
        model = MemorizingTransformer.from_pretrained(folder, **{key: given})
        for name, weight in model.state_dict().items():
            assert torch.equal(weight, saved.state_dict()[name].to(torch.bfloat16)), name
    for given in ("auto", None):
        model = MemorizingTransformer.from_pretrained(folder, **{key: given})
        assert {p.dtype for p in model.parameters()} == {torch.float32}
    for given in ("int8", torch.int8, "half a dozen", 16):
        with pytest.raises(ConfigError, match=r"^dtype = "):
            MemorizingTransformer.from_pretrained(folder, **{key: given})


def test_a_model_is_loaded_onto_the_device_asked_for(folder: Path) -> None:
    for given in ("cpu", {"": "cpu"}, torch.device("cpu")):
        model = MemorizingTransformer.from_pretrained(folder, device_map=given)
        assert model.embedding.weight.device.type == "cpu"
    model = MemorizingTransformer.from_pretrained(folder, device_map="meta")
    assert model.embedding.weight.device.type == "meta"
    for given in ({"a": "cpu", "b": "meta"}, "nowhere", 3.5):
        with pytest.raises(ConfigError, match=r"^device_map = "):
            MemorizingTransformer.from_pretrained(folder, device_map=given)


def test_habits_that_change_nothing_are_let_pass(folder: Path) -> None:
    model = MemorizingTransformer.from_pretrained(
        folder, trust_remote_code=True, low_cpu_mem_usage=True, use_safetensors=True
    )
    model.save_pretrained(folder, safe_serialization=True, max_shard_size="5GB")
    assert MemorizingTransformer.from_pretrained(folder).config == model.config


@pytest.mark.parametrize("name", ["attn_implementation", "quantization_config", "subfolder"])
def test_habits_that_would_change_something_are_named(folder: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=f"^{name} = "):
        MemorizingTransformer.from_pretrained(folder, **{name: "x"})


def test_other_paths_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "last.ckpt").mkdir()
    (tmp_path / "last.ckpt" / "manifest.json").write_text("{}")
    (tmp_path / "list").mkdir()
    (tmp_path / "list" / "config.json").write_text("[1]")
    (tmp_path / "gpt2").mkdir()
    (tmp_path / "gpt2" / "config.json").write_text('{"model_type": "gpt2"}')
    for name, said in (
        ("file", "is a file"),
        ("last.ckpt", "export --ckpt_path"),
        ("list", "cannot be read"),
        ("gpt2", "model_type"),
    ):
        with pytest.raises(ConfigError, match=said):
            MemorizingTransformer.from_pretrained(tmp_path / name)


def test_saving_says_what_it_cannot_do(tmp_path: Path) -> None:
    model = small()
    (tmp_path / "file").write_text("x")
    for where in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ConfigError, match=r"cannot be written"):
            model.save_pretrained(where)
    with pytest.raises(ConfigError, match="safe_serialization = False"):
        model.save_pretrained(tmp_path / "model", safe_serialization=False)
    with pytest.raises(ConfigError, match=r"^shard = 3"):
        model.save_pretrained(tmp_path / "model", shard=3)
    model.save_pretrained(tmp_path / "model", is_main_process=False)
    assert not (tmp_path / "model").exists()
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "config.json").unlink()
    (tmp_path / "model" / "config.json").mkdir()
    with pytest.raises(ConfigError, match=r"cannot be written"):
        model.save_pretrained(tmp_path / "model")


def test_an_upload_that_fails_leaves_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi.create_repo", fail)
    with pytest.raises(ConfigError, match="cannot be uploaded"):
        small().save_pretrained(tmp_path / "model", push_to_hub=True, repo_id="nobody/nothing")
    assert MemorizingTransformer.from_pretrained(tmp_path / "model").config.d_model == 16


def test_a_folder_with_the_weights_names_of_earlier_versions_is_read(folder: Path) -> None:
    model = MemorizingTransformer.from_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    earlier = {
        name.replace(".reader.gate.linear.", ".gate.").replace(".reader.bias.", ".memory_bias."): w
        for name, w in weights.items()
    }
    assert earlier.keys() != weights.keys()
    save_file(earlier, folder / "model.safetensors", metadata={"format": "pt"})
    again = MemorizingTransformer.from_pretrained(folder)
    for name, weight in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight), name
