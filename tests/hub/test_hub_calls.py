"""The exported model is called and loaded with arguments of all kinds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from exported import TEXT, small
from safetensors.torch import load_file, save_file

from memorizing_transformers import MemorizingTransformer
from memorizing_transformers.errors import ConfigError


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


def test_it_scores_targets() -> None:
    model = small()
    ids, targets = torch.randint(256, (2, 2, 7))
    bank = model.new_memory(2)
    bank.commit(model(ids, bank).pairs, token_ids=ids)
    expected = model.loss(model(ids, bank).logits, targets, "none")
    torch.testing.assert_close(model.score(ids, bank, targets).nll, expected)


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
