"""What decides the ids of a text: a tokenizer's rules, for its fingerprint and for encoding.

Text is only text: what it holds never becomes a special token, even where it looks like one.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHANGE_NO_ID = ("truncation", "padding", "decoder", "post_processor", "version")
"""Parts of a tokenizer of the `tokenizers` library that change no id of a complete text."""
SETTINGS_CHANGE_NO_ID = (
    "additional_special_tokens", "chat_template", "clean_up_tokenization_spaces",
    "extra_special_tokens", "is_local", "local_files_only", "max_length", "model_input_names",
    "model_max_length", "name_or_path", "pad_to_multiple_of", "pad_token_type_id", "padding",
    "padding_side", "processor_class", "return_token_type_ids", "stride", "tokenizer_class",
    "truncation", "truncation_side", "truncation_strategy",
)  # fmt: skip
"""Settings of a tokenizer of `transformers` that change no id of a complete text."""


def backend_of(tokenizer: PreTrainedTokenizerBase) -> Tokenizer | None:
    """The tokenizer of the `tokenizers` library behind one of `transformers`, if there is one."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return backend if isinstance(backend, Tokenizer) else None


def facts_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """Everything that decides which ids a text gets, as text to be hashed."""
    backend = backend_of(tokenizer)
    return _saved_facts(tokenizer) if backend is None else encoding_rules(backend)


def encoding_rules(backend: Tokenizer) -> str:
    """A tokenizer without what changes no id of a complete text, as JSON."""
    rules = json.loads(backend.to_str())
    for key in CHANGE_NO_ID:
        rules.pop(key, None)
    if _special(rules):
        rules["special_tokens_in_text"] = "text"
    return json.dumps(rules, sort_keys=True)


def text_only(backend: Tokenizer) -> Tokenizer:
    """A copy that encodes any text completely, always alike, and as nothing but text.

    Special tokens keep their ids and get contents that no text holds. (``encode_special_tokens`` is
    not enough: a model whose vocabulary lists the content would still choose it.)
    """
    rules = json.loads(backend.to_str())
    rules.update(truncation=None, padding=None, post_processor=None)
    model = rules["model"]
    hidden = {content: _unreachable(content) for content in _special(rules)}
    for token in rules["added_tokens"]:
        token["content"] = hidden.get(token["content"], token["content"])
    if isinstance(model["vocab"], dict):
        model["vocab"] = {hidden.get(name, name): index for name, index in model["vocab"].items()}
    else:
        model["vocab"] = [[hidden.get(name, name), score] for name, score in model["vocab"]]
    if model.get("unk_token") in hidden:
        model["unk_token"] = hidden[model["unk_token"]]
    if "merges" in model:
        model["merges"] = [
            pair for pair in model["merges"] if hidden.keys().isdisjoint({*pair, "".join(pair)})
        ]
    if model.get("dropout") is not None:
        model["dropout"] = None
    copy = Tokenizer.from_str(json.dumps(rules))
    copy.encode_special_tokens = True
    return copy


def _special(rules: dict[str, Any]) -> list[str]:
    return [token["content"] for token in rules["added_tokens"] if token["special"]]


def _unreachable(content: str) -> str:
    digest = hashlib.blake2b(content.encode(), digest_size=16).hexdigest()
    return f"\ufdd0{digest}\ufdd1"


def _saved_facts(tokenizer: PreTrainedTokenizerBase) -> str:
    """Everything that a tokenizer needs in order to be loaded again."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        files = {
            file.name: hashlib.blake2b(file.read_bytes(), digest_size=16).hexdigest()
            for file in sorted(Path(folder).iterdir())
            if file.name != "tokenizer_config.json"
        }
        settings = json.loads(Path(folder, "tokenizer_config.json").read_text("utf-8"))
    for key in SETTINGS_CHANGE_NO_ID:
        settings.pop(key, None)
    kind = type(tokenizer).__name__
    vocabulary = sorted(tokenizer.get_vocab().items())
    return json.dumps([kind, vocabulary, files, settings], sort_keys=True)
