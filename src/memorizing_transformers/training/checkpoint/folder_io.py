"""How Lightning reads, writes and removes checkpoints that are folders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.fabric.plugins import TorchCheckpointIO

from . import folder as checkpoints
from .background import Writer


class FolderCheckpointIO(TorchCheckpointIO):
    """Reads and removes checkpoint folders; what it writes is the trainer's part of one.

    Args:
        writer: what writes them; reading waits for it, removing queues behind it.
        agree: tells every rank rank 0's path (a collective): ``last`` may mean another checkpoint
            a moment later.
        may_remove: whether a checkpoint that a callback is done with may be deleted.
    """

    def __init__(
        self,
        writer: Writer | None = None,
        agree: Callable[[Any], Any] = lambda path: path,
        may_remove: Callable[[Path], bool] = lambda path: True,
    ) -> None:
        super().__init__()
        self.writer = writer or Writer(background=False)
        self.agree = agree
        self.may_remove = may_remove

    def load_checkpoint(
        self, path: Any, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """The trainer's part, verified, on the CPU; no code of the file is executed.

        Raises:
            UserError: where the checkpoint is damaged or none of ours.
        """
        self.writer.wait()
        return checkpoints.open_checkpoint(Path(self.agree(path)), mmap=False)

    def remove_checkpoint(self, path: Any) -> None:
        """Remove every part, the manifest first, once all that was to be written before is there.

        Where writing failed, nothing is removed: what was to replace it is missing.
        """
        if self.may_remove(Path(path)):
            self.writer.submit(lambda: checkpoints.remove(Path(path)), only_after_success=True)

    def teardown(self) -> None:
        """Wait until all is written."""
        self.writer.wait()
