"""Weights, gradients and optimiser state sharded over the ranks (FSDP2), memory as ever by rows."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from ..errors import ConfigError
from ..model import MemorizingNet
from ..model.renamed import as_today
from .checkpoint import folder as checkpoints


class ShardedStrategy(ModelParallelStrategy):
    """Lightning's ModelParallelStrategy over all ranks, with this project's checkpoints.

    A checkpoint holds the complete weights, gathered to rank 0: so saving is a collective here, and
    the checkpoint can be read by any number of ranks, sharded or not.

    Args:
        process_group_backend: gloo, nccl, or None for the device's own.
        timeout_seconds: how long a collective may take.
    """

    def __init__(
        self, process_group_backend: str | None = None, timeout_seconds: float = 1800.0
    ) -> None:
        super().__init__(
            data_parallel_size="auto",
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            process_group_backend=process_group_backend,
            timeout=timedelta(seconds=timeout_seconds),
        )

    def setup_environment(self) -> None:
        """Shard over every rank of every machine."""
        self._data_parallel_size = self.num_processes * self.num_nodes
        super().setup_environment()

    def connect(self, model: Any) -> None:
        """Refuse, before any work, what fails at the first step.

        Raises:
            ConfigError: torch's Adafactor and Muon cannot update sharded parameters.
        """
        super().connect(model)
        config = getattr(model, "optimizer_config", None)
        fitting = model.trainer.state.fn == TrainerFn.FITTING
        if fitting and config is not None and config.name in ("adafactor", "muon"):
            remedy = (
                "does not work with trainer.strategy=sharded; set adamw, or trainer.strategy=ddp"
            )
            raise ConfigError("model.optimizer.name", config.name, remedy)

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Lightning restores it after the module has seen the checkpoint."""
        return True

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> Any:
        """The trainer's part, alike on every rank, on the CPU.

        Raises:
            UserError: where the checkpoint is damaged or none of ours.
        """
        return checkpoints.open_checkpoint(Path(self.broadcast(checkpoint_path)))

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Every rank takes its shard of the weights."""
        assert self.model is not None
        options = StateDictOptions(full_state_dict=True, strict=strict)
        weights: dict[str, Any] = {**as_today(checkpoint["state_dict"])}
        set_model_state_dict(self.model, weights, options=options)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Every rank takes its shard of the optimiser's state."""
        assert self.model is not None
        options = StateDictOptions(full_state_dict=True)
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            named = _by_name(state, optimizer, self.model)
            set_optimizer_state_dict(self.model, optimizer, named, options=options)

    def teardown(self) -> None:
        """Wait until all is written."""
        super().teardown()
        self.checkpoint_io.teardown()


def _by_name(state: dict[str, Any], optimizer: Optimizer, model: nn.Module) -> dict[str, Any]:
    """An optimiser's state with the parameters' names for its own numbers.

    An optimiser numbers by group, a module in the order of its layers: the groups tell which is
    which, whether one rank wrote the state or many. A parameter without a state gets the one that
    AdamW begins with, since torch wants one for each.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    known = {
        number: names[parameter]
        for saved, live in zip(state["param_groups"], optimizer.param_groups, strict=True)
        for number, parameter in zip(saved["params"], live["params"], strict=True)
    }
    groups = [
        {**group, "params": [known[number] for number in group["params"]]}
        for group in state["param_groups"]
    ]
    values = {known[number]: value for number, value in state["state"].items()}
    for parameter in (p for group in optimizer.param_groups for p in group["params"]):
        zeros = {key: torch.zeros(parameter.shape) for key in ("exp_avg", "exp_avg_sq")}
        values.setdefault(names[parameter], {"step": torch.tensor(0.0), **zeros})
    return {"state": values, "param_groups": groups}


def shard(net: MemorizingNet, mesh: DeviceMesh) -> None:
    """Shard each block, and what is left, over the ranks of the mesh."""
    for block in net.blocks():
        fully_shard(block, mesh=mesh)
    fully_shard(net, mesh=mesh)


def is_sharded(net: MemorizingNet) -> bool:
    """Whether a forward pass is a collective, for which all ranks must meet."""
    return any(isinstance(parameter, DTensor) for parameter in net.parameters())


def gathered_gradients(net: MemorizingNet, rank: int) -> dict[str, Tensor]:
    """By parameter its gradient; if sharded, gathered on rank 0 alone (a collective)."""
    named = net.named_parameters()
    found = {name: full_tensor(p.grad) for name, p in named if p.grad is not None}
    return found if rank == 0 or not is_sharded(net) else {}


def like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A complete tensor in a parameter's dtype, on its device and sharded alike (a collective)."""
    moved = tensor.to(parameter.device, parameter.dtype)
    if isinstance(parameter, DTensor):
        return distribute_tensor(moved, parameter.device_mesh, parameter.placements)
    return moved


def full_tensor(tensor: Tensor) -> Tensor:
    """A parameter, gathered where it is sharded (then a collective)."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


StrategyRegistry.register(
    "sharded", ShardedStrategy, "Weights and optimiser state sharded over the ranks (FSDP2)"
)
