"""``--model memorizing`` of lm-evaluation-harness: a model of ours, or one with a memory.

A request is a document: it is read from an empty memory, segment by segment, as training reads. No
context is cut, whatever its length.

Shapes: V vocabulary.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from torch import Tensor
from tqdm import tqdm

from memorizing_studies.tasks.scoring import rows_at_once
from memorizing_transformers.commands.reading import open_reader
from memorizing_transformers.data.tokens.tokenized_text import tokenizing
from memorizing_transformers.errors import ConfigError
from memorizing_transformers.generation.causal_lm import SessionCache, causal_lm
from memorizing_transformers.generation.session import Session

from .prefixes import sessions_after, shared

GENERATED = 256
"""Tokens of an answer, where a task does not say how many."""
SAMPLING = ("temperature", "top_p", "top_k")


@register_model("memorizing")
class MemorizingLM(TemplateLM):
    """Scores and continues texts with a memory.

    Args:
        pretrained: folder of a checkpoint, of ``export``, of ``save_pretrained``, or of a model of
            transformers, which then gets a memory.
        memory: slots of each memory; 0 for none. Default: the model's own.
        segment_length: tokens of a segment. Default: the model's own.
        device: where the model computes. Default: a GPU where there is one.
        tokenizer: the model has its own; tasks that make their own texts read this key.
        batch_size: the harness gives it; documents are read one by one, their endings together.
        max_batch_size: likewise.

    Raises:
        ConfigError: where one of them cannot work.
    """

    def __init__(
        self,
        pretrained: str,
        memory: int | None = None,
        segment_length: int | None = None,
        device: str | None = None,
        tokenizer: str | None = None,
        batch_size: Any = 1,
        max_batch_size: Any = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        for name, value in unknown.items():
            known = "pretrained, memory, segment_length, device"
            raise ConfigError(f"model_args.{name}", value, f"is not known; give {known}")
        if memory is not None and not isinstance(memory, int):
            raise ConfigError("model_args.memory", memory, "must be a whole number of slots")
        self.reader = open_reader(str(pretrained), segment_length, memory, device)
        self.tokenizer = self.reader.tokenizer
        if self.tokenizer is None:
            raise ConfigError("model_args.pretrained", pretrained, "holds no tokenizer")
        self.where = next(self.reader.model.parameters()).device
        self._tokenized = tokenizing(self.tokenizer)
        self._context: tuple[str, list[int]] = ("", [])

    @property
    def eot_token_id(self) -> int:
        """What ends a document, or else begins one, or else a new line or any character."""
        for name in ("eos_token_id", "bos_token_id", "sep_token_id", "cls_token_id"):
            found = getattr(self.tokenizer, name, None)
            if found is not None:
                return int(found)
        return (self.tok_encode("\n") or self.tok_encode("."))[0]

    @property
    def tokenizer_name(self) -> str:
        """A name for the harness' cache of requests."""
        return self.reader.fingerprint

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **options: Any
    ) -> list[int]:
        """Token ids as training makes them: no special tokens are added."""
        return self._tokenized(string).ids.tolist()

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Tokens of both as they are next to each other.

        A token with characters of both counts to the continuation. The harness would drop what the
        end of the context becomes next to it: neither read nor scored.
        """
        text = context.rstrip()
        continuation = context[len(text) :] + continuation
        if self._context[0] != text:
            self._context = (text, self.tok_encode(text))
        before, whole = self._context[1], self.tok_encode(text + continuation)
        count = max(0, min(shared(before, whole), len(whole) - 1))
        return whole[:count] or [self.eot_token_id], whole[count:]

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A chat in the template of the tokenizer."""
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def _begin(self) -> Session:
        return Session(self.reader.model, 1, self.reader.segment_length)

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **options: Any
    ) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation, and whether it is what the model would write."""
        by_context: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for number, (_, context, _) in enumerate(requests):
            by_context[tuple(context)].append(number)
        contexts = [*by_context]
        results: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        sessions = sessions_after(contexts, self._begin, self.where)
        quiet = bool(options.get("disable_tqdm"))
        for place, session, logits in tqdm(sessions, "contexts", len(contexts), disable=quiet):
            numbers = by_context[contexts[place]]
            endings = [requests[number][2] for number in numbers]
            rows = rows_at_once(session, max(map(len, endings)), logits.shape[-1])
            parts = (endings[start : start + rows] for start in range(0, len(endings), rows))
            scores = chain.from_iterable(self._score(session, logits, part) for part in parts)
            for number, found in zip(numbers, scores, strict=True):
                results[number] = found
                self.cache_hook.add_partial("loglikelihood", requests[number][0], found)
        return results

    def _score(
        self, session: Session, logits: Tensor, endings: Sequence[list[int]]
    ) -> list[tuple[float, bool]]:
        """Score endings that follow what a session has read.

        Args:
            session: of one row.
            logits: (1, V) after its last token.
            endings: token ids.
        """
        longest = max(map(len, endings))
        whole = logits.expand(len(endings), -1)[:, None]
        if longest > 1:
            # Padding comes last in its row, so no token that counts sees it.
            padded = torch.zeros(len(endings), longest - 1, dtype=torch.int64)
            for row, ending in enumerate(endings):
                padded[row, : len(ending) - 1] = torch.tensor(ending[:-1], dtype=torch.int64)
            rows = session.take([0] * len(endings))
            parts = (output.logits for _, output in rows.parts(padded.to(self.where)))
            whole = torch.cat([whole, *(part for part in parts if part is not None)], 1)
        results = []
        for scores, ending in zip(whole.float().log_softmax(-1), endings, strict=True):
            targets = torch.tensor(ending, dtype=torch.int64, device=scores.device)
            scores = scores[: len(ending)]
            total = scores.gather(1, targets[:, None]).sum()
            results.append((float(total), bool((scores.argmax(-1) == targets).all())))
        return results

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, each read from an empty memory, without a limit."""
        results = []
        for request in tqdm(requests, "texts", disable=disable_tqdm):
            (text,) = request.args
            ids, total = [self.eot_token_id, *self.tok_encode(text)], 0.0
            targets = torch.tensor([ids[1:]], device=self.where)
            start = 0
            for part, output in self._begin().parts(torch.tensor([ids[:-1]], device=self.where)):
                assert output.logits is not None
                scores = output.logits.float().log_softmax(-1)
                wanted = targets[:, start : start + part.shape[1], None]
                total += float(scores.gather(2, wanted).double().sum())
                start += part.shape[1]
            results.append(total)
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return results

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Continue texts up to a stop text, greedily unless a task asks for sampling."""
        writer: Any = causal_lm(self.reader.model, self.reader.segment_length, self.tokenizer)
        results = []
        for request in tqdm(requests, "answers", disable=disable_tqdm):
            context, settings = request.args
            stops = settings.get("until") or []
            stops = [stops] if isinstance(stops, str) else [*filter(None, stops)]
            options: dict[str, Any] = {"do_sample": False}
            if settings.get("do_sample"):
                chosen = {name: settings[name] for name in SAMPLING if name in settings}
                options = {"do_sample": True, **chosen}
            ids = self.tok_encode(context) or [self.eot_token_id]
            whole = writer.generate(
                torch.tensor([ids], device=self.where),
                past_key_values=SessionCache([self._begin()]),
                max_new_tokens=int(settings.get("max_gen_toks", GENERATED)),
                stop_strings=stops or None,
                tokenizer=self.tokenizer,
                **options,
            )
            text = self.tokenizer.decode(whole[0, len(ids) :], skip_special_tokens=True)
            ends = [place for place in map(text.find, stops) if place >= 0]
            results.append(text[: min(ends)] if ends else text)
            self.cache_hook.add_partial("generate_until", request.args, results[-1])
        return results
