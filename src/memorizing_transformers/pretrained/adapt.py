"""A pretrained model with a memory as a network to train: what is trained, what is saved.

Checkpoints hold the trained weights alone, and which base they belong to.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import nn
from transformers import AutoModelForCausalLM

from ..data.sources.documents import first_line
from ..data.tokens.tokenizers import fingerprint_tokenizer, load_tokenizer
from ..errors import ConfigError
from ..model import ModelConfig
from .hook import attention_modules
from .induction import induction_layers
from .memorized import MemorizedModel

OWN = ("vocab_size", "xl_cache", "memory", "activation_checkpointing")
"""The settings of ``ModelConfig`` that also hold for a pretrained model; it brings the others."""


@dataclass
class AdaptConfig:
    """How a pretrained model is given a memory.

    Args:
        train: What is trained. gates are the memory's own numbers: gates and temperatures.
            projections are also the weights of attention in the memory layers. lora are also
            low-rank updates of these (needs peft). all is everything.
        lora_rank: Rank of the updates if train is lora.
        position: Where retrieved keys are. distance is their true distance, at most the window that
            the model was trained on. start is the start of the segment.
        skip_first: Number of pairs at the start of each segment that are never stored. The XL cache
            keeps as many pairs of the document's start.
    """

    train: Literal["gates", "projections", "lora", "all"] = "gates"
    lora_rank: int = 8
    position: Literal["distance", "start"] = "distance"
    skip_first: int = 1

    def validate(self, base: str | None = None, init_from: str | None = None) -> None:
        """Refuse what cannot work.

        Args:
            base: ``model.base``.
            init_from: ``model.init_from``.

        Raises:
            ConfigError: naming the field and what would do.
        """
        if base is not None and init_from is not None:
            remedy = "cannot be given together with model.base; give ckpt_path, or leave it out"
            raise ConfigError("model.init_from", init_from, remedy)
        for name, least in (("lora_rank", 1), ("skip_first", 0)):
            if getattr(self, name) < least:
                raise ConfigError(
                    f"model.adapt.{name}", getattr(self, name), f"must be at least {least}"
                )


class AdaptedConfig(ModelConfig):
    """The settings of a pretrained model with a memory, before its number of layers is known."""

    def _check_layers(self) -> None:
        """``MemorizedModel`` does it."""


def load_base(name: str, key: str = "model.base", dtype: torch.dtype = torch.float32) -> Any:
    """A decoder of transformers.

    Args:
        name: folder or hub name.
        key: of the name, for the message.
        dtype: of its weights.

    Raises:
        ConfigError: where there is none of that name or folder.
    """
    try:
        return AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    except Exception as error:
        # A wrong name, no network, other files: transformers raises many types.
        remedy = (
            f"cannot be loaded ({first_line(error)}); give a folder with a causal language model "
            "of transformers, or a name on the hub that can be reached"
        )
        raise ConfigError(key, name, remedy) from error


class AdaptedModel(MemorizedModel):
    """A ``MemorizedModel`` whose base stays as it is, except for what ``adapt.train`` names.

    Its ``state_dict`` holds what is trained; loading one needs no more.

    Args:
        base: the model.
        config: ``xl_cache``, ``memory`` and ``activation_checkpointing`` count.
        adapt: what is trained, and positions.

    Raises:
        ConfigError: where a setting cannot work.
    """

    prefix = "model."

    def __init__(self, base: Any, config: ModelConfig, adapt: AdaptConfig) -> None:
        self._refuse(config)
        if config.memory.layers is None:
            config.memory.layers = induction_layers(
                base, show=getattr(rank_zero_only, "rank", 0) == 0
            )
        super().__init__(base, config.memory, config.xl_cache, adapt.position, adapt.skip_first)
        if config.activation_checkpointing:
            base.activation_checkpointing_enable()
        self.adapt = adapt
        if adapt.train == "lora":
            self._add_lora(adapt.lora_rank)
        self.trained = set(self._choose(adapt.train))
        self._untrained = [name for name in self.state_dict() if name not in self.trained]
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name in self.trained)
        # What ``from_pretrained`` gives is in evaluation mode.
        self.train()
        self.register_state_dict_post_hook(_leave_out_the_base)
        self.register_load_state_dict_pre_hook(_put_back_the_base)

    @staticmethod
    def _refuse(config: ModelConfig) -> None:
        default = ModelConfig()
        for field in fields(ModelConfig):
            given = getattr(config, field.name)
            if field.name not in OWN and given != getattr(default, field.name):
                remedy = "is set by the pretrained model (model.base); leave it out"
                raise ConfigError(f"model.{field.name}", given, remedy)
        for name in ("refresh_every_n_steps", "drop_below_cosine"):
            if getattr(config.memory, name):
                remedy = "does not work with model.base yet; leave it out"
                raise ConfigError(f"model.memory.{name}", getattr(config.memory, name), remedy)

    def _attention(self) -> dict[int, nn.Module]:
        return {layer: attention_modules(self.base)[layer] for layer in self.memory_layers}

    def _add_lora(self, rank: int) -> None:
        try:
            from peft import LoraConfig, inject_adapter_in_model
        except ImportError as error:
            remedy = "needs the package peft: pip install 'memorizing-transformers-lightning[lora]'"
            raise ConfigError("model.adapt.train", "lora", remedy) from error
        names = {module: name for name, module in self.base.named_modules()}
        targets = [
            f"{names[attention]}.{name}"
            for attention in self._attention().values()
            for name, child in attention.named_children()
            if getattr(child, "weight", torch.empty(0)).ndim == 2
        ]
        inject_adapter_in_model(LoraConfig(r=rank, target_modules=targets), self.base)

    def _choose(self, train: str) -> list[str]:
        own = {id(parameter) for parameter in self.memory_parameters()}
        if train == "projections":
            own |= {id(p) for module in self._attention().values() for p in module.parameters()}
        return [
            name
            for name, parameter in self.named_parameters()
            if id(parameter) in own or train == "all" or (train == "lora" and ".lora_" in name)
        ]

    def architecture(self) -> dict[str, Any]:
        """What the meaning of the weights depends on: the base's own weights among it."""
        own = {"adapt.train": self.adapt.train, "adapt.lora_rank": self.adapt.lora_rank}
        return {"base": self.fingerprint, **own, **super().architecture()}


def adapted_model(
    name: str, config: ModelConfig, adapt: AdaptConfig, tokenizer: Any = None
) -> AdaptedModel:
    """The pretrained model of ``model.base``, with a memory.

    Args:
        name: folder or hub name.
        config: the settings of the model; ``vocab_size`` becomes the base's.
        adapt: how it is given a memory.
        tokenizer: that of the data, or None where it is not known.

    Raises:
        ConfigError: where a setting cannot work, or the data has another tokenizer.
    """
    base = load_base(name)
    if tokenizer is not None:
        try:
            own = fingerprint_tokenizer(load_tokenizer(name))
        except ConfigError:
            own = fingerprint_tokenizer(tokenizer)  # the base brings none
        if own != fingerprint_tokenizer(tokenizer):
            remedy = f"is not the tokenizer of model.base; set data.tokenizer={name}"
            raise ConfigError("data.tokenizer", type(tokenizer).__name__, remedy)
    known = base.config.get_text_config().vocab_size
    if config.vocab_size is not None and config.vocab_size > known:
        remedy = f"has {config.vocab_size} tokens, and model.base knows {known}; give its own"
        raise ConfigError("data.tokenizer", name, remedy)
    config.vocab_size = known
    return AdaptedModel(base, config, adapt)


def _leave_out_the_base(module: Any, state: dict[str, Any], prefix: str, _: Any) -> None:
    for name in [*state]:
        if name.startswith(prefix) and name.removeprefix(prefix) not in module.trained:
            del state[name]


def _put_back_the_base(module: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for name in module._untrained:
        *path, last = name.split(".")
        owner = module.get_submodule(".".join(path))
        state.setdefault(prefix + name, getattr(owner, last).detach())
