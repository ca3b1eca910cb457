"""Weights, gradients and optimiser state sharded over the ranks (FSDP2), memory as ever by rows."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from ..model import Transformer
from . import checkpoints


class ShardedStrategy(ModelParallelStrategy):
    """Lightning's ModelParallelStrategy over all ranks, with this project's checkpoints.

    A checkpoint holds the whole weights, gathered to rank 0: so saving is a collective here, and
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

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> Any:
        """Every rank takes its shard of the weights and the optimiser state.

        Raises:
            UserError: where the checkpoint is damaged or none of ours.
        """
        folder = Path(self.broadcast(checkpoint_path))
        manifest = checkpoints.open_folder(folder)
        checkpoint = super().load_checkpoint(folder / checkpoints.TRAINER_FILE, weights_only=True)
        checkpoint[checkpoints.FOLDER_KEY] = {"path": str(folder), "manifest": manifest}
        return checkpoint

    def teardown(self) -> None:
        """Wait until all is written."""
        super().teardown()
        self.checkpoint_io.teardown()


def shard(net: Transformer, mesh: DeviceMesh) -> None:
    """Shard each layer, and what is left, over the ranks of the mesh."""
    for layer in net.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(net, mesh=mesh)


def is_sharded(net: Transformer) -> bool:
    """Whether a forward pass is a collective, for which all ranks must meet."""
    return any(isinstance(parameter, DTensor) for parameter in net.parameters())


def whole(tensor: Tensor) -> Tensor:
    """A parameter, gathered where it is sharded (then a collective)."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
