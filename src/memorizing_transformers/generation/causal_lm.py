"""A network with a memory as a model of transformers, so that its ``generate`` works on it.

Shapes: B rows, N tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..errors import ConfigError
from ..model import MemorizingNet
from ..pretrained.arguments import MODEL_TYPE, SETTINGS, brief
from ..pretrained.hub import MemorizingTransformer
from .session import UNKNOWN_LENGTH, Session


class SessionCache:
    """What ``generate`` carries from token to token: sessions in the place of a key/value cache.

    Args:
        sessions: one of all rows, or for rows of different lengths one of each row.
    """

    is_compileable = False

    def __init__(self, sessions: Sequence[Session]) -> None:
        self.sessions = [*sessions]
        self.seen = 0
        """Tokens of this call's ``input_ids`` that were read, padding among them."""

    @property
    def rows(self) -> int:
        """Rows B."""
        return sum(session.bank.batch_size for session in self.sessions)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens of this call that were read; what a session had read before does not count."""
        return self.seen

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row ``i`` continues as row ``beam_idx[i]``."""
        self.sessions = self._taken(beam_idx.tolist())

    def _taken(self, rows: list[int]) -> list[Session]:
        if len(self.sessions) == 1:
            return [self.sessions[0].take(rows)]
        return [self.sessions[row].take([0]) for row in rows]

    def expand(self, rows: int) -> None:
        """Let each row be the start of as many rows, ``rows`` in all.

        Raises:
            ConfigError: where ``rows`` is no multiple.
        """
        count, rest = divmod(rows, self.rows)
        if rest:
            remedy = f"has read {self.rows} texts; give input_ids of as many rows, or a multiple"
            raise ConfigError("past_key_values", rows, remedy)
        own = range(self.rows)
        self.sessions = self._taken([row for row in own for _ in range(count)])

    def part(self) -> None:
        """Let each row continue by itself."""
        if len(self.sessions) == 1:
            (session,) = self.sessions
            self.sessions = [session.take([row]) for row in range(self.rows)]

    def read(self, input_ids: Tensor, mask: Tensor | None, last: bool) -> Tensor:
        """Read on.

        Args:
            input_ids: (B, N).
            mask: (B, N) bool, False for padding, which is not read; None for none.
            last: whether the logits of the last token are enough.

        Returns:
            logits (B, N or 1, V); those of padding are 0.
        """
        self.seen += input_ids.shape[1]
        if mask is None and len(self.sessions) == 1:
            return self._read(self.sessions[0], input_ids, last)
        self.part()
        found = []
        for row, session in enumerate(self.sessions):
            ids = input_ids[row : row + 1]
            kept = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask[row : row + 1]
            logits = self._read(session, ids[kept][None], last)
            if not last:
                whole = logits.new_zeros(1, ids.shape[1], logits.shape[2])
                whole[kept] = logits[0]
                logits = whole
            found.append(logits)
        return torch.cat(found)

    @staticmethod
    def _read(session: Session, ids: Tensor, last: bool) -> Tensor:
        if last:
            return session.read(ids)[:, None]
        parts = (output.logits for _, output in session.parts(ids))
        return torch.cat([logits for logits in parts if logits is not None], 1)


UNREAD = "needs to take back tokens that were read, which a memory cannot; leave it out"
REFUSED = {
    "assistant_model": UNREAD,
    "prompt_lookup_num_tokens": UNREAD,
    "prefill_chunk_size": "is not needed, for a prompt is read in segments; leave it out",
}
"""Options of ``generate`` that cannot work, and what would do."""


class MemorizingConfig(PreTrainedConfig):
    """What transformers asks of a model before it generates.

    Args:
        vocab_size: tokens V.
        segment_length: tokens of a segment; None where a saved model does not say.
        options: of ``PreTrainedConfig``, such as the tokens that end a text.
    """

    model_type = MODEL_TYPE

    def __init__(
        self, vocab_size: int = 0, segment_length: int | None = None, **options: Any
    ) -> None:
        super().__init__(**options)
        self.vocab_size = vocab_size
        self.segment_length = segment_length


class MemorizingForCausalLM(PreTrainedModel, GenerationMixin):
    """A network with a memory, with the ``generate`` of transformers; ``causal_lm`` makes it.

    ``past_key_values`` is a ``SessionCache``; one that has read a document may be given, and then
    ``input_ids`` are what follows it.

    Args:
        config: sizes and special tokens.
        net: the network.
    """

    config_class = MemorizingConfig
    main_input_name = "input_ids"

    def __init__(self, config: MemorizingConfig, net: MemorizingNet) -> None:
        super().__init__(config)
        self.net = net.eval()

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str, *_: Any, **options: Any
    ) -> MemorizingForCausalLM:
        """A folder or hub name that ``MemorizingTransformer.save_pretrained`` wrote.

        Args:
            pretrained_model_name_or_path: a folder, or a name on the hub.
            options: ``segment_length`` (default: that of the XL cache, else 512), and those of
                ``MemorizingTransformer.from_pretrained``.

        Raises:
            ConfigError: as there.
        """
        # The Auto classes add arguments, and put what a configuration knows into one.
        config = options.pop("config", None)
        for name in [name for name in options if name.startswith("_") or name == "adapter_kwargs"]:
            del options[name]
        for name in (*SETTINGS, "segment_length"):
            if getattr(config, name, None) is not None:
                options.setdefault(name, getattr(config, name))
        length = options.pop("segment_length", None)
        net = MemorizingTransformer.from_pretrained(pretrained_model_name_or_path, **options)
        length = length or net.config.xl_cache or UNKNOWN_LENGTH
        return causal_lm(net, length, net.tokenizer)

    def save_pretrained(self, save_directory: str, **options: Any) -> None:  # type: ignore[override]
        """Write what ``from_pretrained`` reads: the network, as its own method writes it."""
        net: Any = self.net
        net.save_pretrained(save_directory, **options)

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def generate(self, *args: Any, **options: Any) -> Any:
        """As ``GenerationMixin.generate``.

        Raises:
            ConfigError: naming an option that a memory cannot follow.
        """
        given = options.get("generation_config")
        for name, remedy in REFUSED.items():
            value = options.get(name, getattr(given, name, None))
            if value is not None:
                raise ConfigError(name, brief(value), remedy)
        return super().generate(*args, **options)  # type: ignore[misc]

    def new_cache(self, rows: int) -> SessionCache:
        """A cache of rows that have read nothing."""
        return SessionCache([Session(self.net, rows, self.config.segment_length)])

    def prepare_inputs_for_generation(  # type: ignore[override]
        self,
        input_ids: Tensor,
        past_key_values: SessionCache | None = None,
        attention_mask: Tensor | None = None,
        **others: Any,
    ) -> dict[str, Any]:
        """The tokens that were not read yet."""
        seen = 0 if past_key_values is None else past_key_values.seen
        mask = None if attention_mask is None else attention_mask[:, seen:]
        return {
            "input_ids": input_ids[:, seen:],
            "past_key_values": past_key_values,
            "attention_mask": mask,
            "logits_to_keep": 1,
        }

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: SessionCache | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int = 0,
        return_dict: bool = True,
        use_cache: bool | None = None,
    ) -> CausalLMOutputWithPast:
        """Read on, in segments.

        Args:
            input_ids: (B, N).
            attention_mask: (B, N), 0 for padding, at any side; it is not read.
            past_key_values: what was read before; rows that follow one row share what it read.
            labels: (B, N), -100 where they do not count; the loss is that of the next tokens.
            logits_to_keep: 1 for the last token's alone; 0 for all.
            return_dict: must be True.
            use_cache: not used.

        Raises:
            ConfigError: where a row is only padding.
        """
        cache = past_key_values or self.new_cache(input_ids.shape[0])
        if cache.rows != input_ids.shape[0]:
            cache.expand(input_ids.shape[0])
        mask = None if attention_mask is None else attention_mask.bool()
        if mask is not None and bool(mask.all()):
            mask = None
        if mask is not None and not bool(mask.any(1).all()):
            raise ConfigError("attention_mask", mask.int().tolist(), "a row has no token")
        logits = cache.read(input_ids, mask, last=logits_to_keep == 1)
        loss = None
        if labels is not None:
            loss = self.net.loss(logits[:, :-1], labels[:, 1:])
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache)  # type: ignore[arg-type]


def causal_lm(
    net: MemorizingNet, segment_length: int, tokenizer: Any = None
) -> MemorizingForCausalLM:
    """A network as a model of transformers that generates.

    Args:
        net: the network; one of a pretrained model brings its settings of generation.
        segment_length: tokens of a segment.
        tokenizer: whose end of text ends a generation; None for none.
    """
    base = getattr(net, "base", None)
    known: Any = getattr(net, "config", None)
    end = getattr(tokenizer, "eos_token_id", None)
    config = MemorizingConfig(known.vocab_size, segment_length, eos_token_id=end, pad_token_id=end)
    model = MemorizingForCausalLM(config, net)
    given = getattr(base, "generation_config", None)
    model.generation_config = given or GenerationConfig.from_model_config(config)
    return model


AutoConfig.register(MODEL_TYPE, MemorizingConfig, exist_ok=True)
AutoModelForCausalLM.register(MemorizingConfig, MemorizingForCausalLM, exist_ok=True)
