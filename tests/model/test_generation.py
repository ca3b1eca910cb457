"""``generate`` of transformers draws what a model that reads everything anew would draw."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from build import VOCAB, small_model
from test_open_segment import SETTINGS, N, by_segment, text
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast

from memorizing_transformers.errors import ConfigError
from memorizing_transformers.generation.causal_lm import (
    MemorizingForCausalLM,
    SessionCache,
    causal_lm,
)
from memorizing_transformers.generation.session import Session

NEW = 16


class Anew(MemorizingForCausalLM):
    """Reads all tokens again for each new one."""

    def prepare_inputs_for_generation(self, input_ids: Tensor, **_: Any) -> dict[str, Any]:
        return {"input_ids": input_ids}

    def forward(self, input_ids: Tensor, **_: Any) -> CausalLMOutputWithPast:
        return CausalLMOutputWithPast(logits=by_segment(self.net, input_ids))  # type: ignore[arg-type]


def both(name: str) -> tuple[Any, Any]:
    """The model that generates and the one that reads anew."""
    # All pairs are retrieved: of a token again and again, rounding would decide which are.
    settings = {**SETTINGS[name], "top_k": SETTINGS[name].get("size", 7)}
    model = causal_lm(small_model(**settings).eval(), N)
    anew = Anew(model.config, model.net)
    anew.generation_config = model.generation_config
    return model, anew


def answers(model: Any, ids: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """Tokens, and the logits or scores that chose them."""
    settings = {"max_new_tokens": NEW, "return_dict_in_generate": True, "output_scores": True}
    made = model.generate(ids, **{**settings, "do_sample": False, **options})
    return made.sequences, torch.stack(made.scores, 1)


def same(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> bool:
    tokens, scores = (torch.equal(one[0], other[0]), one[1].isfinite())
    return tokens and torch.allclose(one[1][scores], other[1][scores], atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3, "num_return_sequences": 2}], ids=str)
@pytest.mark.parametrize("name", ["joint-xl", "copies", "t5", "matches", "int8", "nothing"])
def test_what_is_generated_is_what_reading_anew_gives(name: str, options: dict[str, Any]) -> None:
    model, anew = both(name)
    ids = text()[:, :10]
    assert same(answers(model, ids, **options), answers(anew, ids, **options))


def test_draws_are_those_of_the_seed() -> None:
    model, anew = both("joint-xl")
    made = []
    for one in (model, anew):
        torch.manual_seed(5)
        options = {"do_sample": True, "top_k": 5, "temperature": 0.8, "repetition_penalty": 1.2}
        made.append(answers(one, text()[:, :10], **options))
    assert same(*made)


def test_rows_of_other_lengths_are_padded_at_the_left() -> None:
    model, _ = both("copies")
    ids = text()[:, :10]
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    for beams in (1, 2):
        tokens, scores = answers(model, ids, attention_mask=mask, num_beams=beams)
        short = answers(model, ids[:1, 4:], num_beams=beams)
        whole = answers(model, ids[1:], num_beams=beams)
        assert same((tokens[:1, 4:], scores[:beams]), short)
        assert same((tokens[1:], scores[beams:]), whole)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", ["joint-xl", "copies", "two-layers"])
def test_many_prompts_share_what_was_read_and_answer_as_if_alone(name: str, beams: int) -> None:
    model, _ = both(name)
    document, prompts = text(1, 40), torch.randint(VOCAB, (20, 5))
    read = Session(model.net, 1, N)
    read.read(document)
    before = {name: tensor.clone() for name, tensor in read.bank.tensors().items()}
    options = {"max_new_tokens": NEW, "do_sample": False, "num_beams": beams}

    def ask(ids: Tensor) -> Tensor:
        cache = SessionCache([read.take([0])])
        found: Tensor = model.generate(ids, past_key_values=cache, **options)
        return found

    together = ask(prompts)
    for row, prompt in enumerate(prompts):
        assert torch.equal(together[row : row + 1], ask(prompt[None]))
    whole = torch.cat([document, prompts[:1]], 1)
    assert torch.equal(together[0], model.generate(whole, **options)[0, 40:])
    for layer, memory in read.bank.memories.items():
        for key, tensor in memory.base.tensors().items():
            assert torch.equal(tensor, before[f"memory.{layer}.{key}"])


def test_rows_over_one_memory_do_not_copy_it_before_a_segment_is_full() -> None:
    model, _ = both("joint-xl")
    read = Session(model.net, 1, N)
    read.read(text(1, 4 * N))
    base = read.bank.memories[1]
    cache = SessionCache([read.take([0])])
    cache.expand(200)
    cache.read(torch.randint(VOCAB, (200, N - 1)), None, last=True)
    assert cache.sessions[0].bank.memories[1].base is base
    cache.read(torch.randint(VOCAB, (200, 1)), None, last=True)
    assert cache.sessions[0].bank.memories[1] is not base


def test_each_row_is_the_start_of_rows_beside_each_other() -> None:
    model, _ = both("joint-xl")
    ids = text(2, 3 * N + 2)
    cache = model.new_cache(2)
    cache.read(ids, None, last=True)
    cache.expand(6)
    found = cache.read(ids[:, :1].repeat_interleave(3, 0), None, last=True)
    with pytest.raises(ConfigError, match="past_key_values = 9"):
        cache.expand(9)
    expected = by_segment(model.net, torch.cat([ids, ids[:, :1]], 1))[:, -1:]
    assert torch.allclose(found, expected.repeat_interleave(3, 0), atol=2e-4)


def test_a_loss_and_logits_of_all_tokens_are_given() -> None:
    model, _ = both("joint-xl")
    ids = text()
    labels = ids.clone()
    labels[:, :5] = -100
    output = model(ids, labels=labels)
    expected = by_segment(model.net, ids)
    assert torch.equal(output.logits, expected)
    assert output.loss == model.net.loss(expected[:, :-1], labels[:, 1:])
    mask = torch.ones_like(ids)
    mask[0, -3:] = 0
    found = model(ids, attention_mask=mask).logits
    assert torch.allclose(found[0, :-3], expected[0, :-3], atol=1e-4)


def test_a_pipeline_of_transformers_takes_the_model() -> None:
    from transformers import pipeline

    from memorizing_transformers.data.tokens.tokenizers import byte_tokenizer

    tokenizer = byte_tokenizer()
    net = small_model(vocab_size=len(tokenizer), xl_cache=5).eval()
    model = causal_lm(net, N, tokenizer)
    talk = pipeline("text-generation", model=model, tokenizer=tokenizer)
    (found,) = talk("Hello", max_new_tokens=5, do_sample=False)
    ids = tokenizer("Hello", return_tensors="pt").input_ids
    expected = model.generate(ids, max_new_tokens=5, do_sample=False)
    assert found["generated_text"] == tokenizer.decode(expected[0])
