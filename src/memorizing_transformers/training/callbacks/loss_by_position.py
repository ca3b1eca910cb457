"""The gain by the memory: loss by position in the document, with memory and with it off."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from ...data.batch import Batch, fp64_device
from ...memory import MemoryBank
from .observer import WarnOnce, tensorboards

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BINS = 40
"""Positions up to 2**40."""
FEWEST = 64
"""A mean of fewer tokens is not drawn."""


class PositionSums:
    """Losses with and without memory, summed by powers of two of the position."""

    def __init__(self) -> None:
        self.sums = torch.zeros(3, BINS, dtype=torch.float64)
        """Counted tokens, their losses in nats with memory, and without; by bin."""

    def add(self, position: Tensor, on: Tensor, off: Tensor) -> None:
        """Add tokens at positions >= 1 of their documents; vectors of one length."""
        bins = position.double().frexp().exponent.long() - 1
        for total, weight in zip(self.sums, (torch.ones_like(on), on, off), strict=True):
            total += torch.bincount(bins, weight.double(), minlength=BINS)

    @property
    def gain(self) -> float:
        """Bits per token that the memory saves."""
        tokens, on, off = self.sums.sum(1).tolist()
        return (off - on) / tokens / math.log(2)

    def curve(self) -> tuple[list[float], list[float], list[float]]:
        """Middle positions, mean losses with memory and without, of the bins with enough tokens."""
        used = self.sums[0] >= min(FEWEST, float(self.sums[0].max()))
        middle = 2.0 ** (torch.arange(BINS, dtype=torch.float64) + 0.5)
        on, off = self.sums[1:, used] / self.sums[0, used]
        return middle[used].tolist(), on.tolist(), off.tolist()


def draw(sums: PositionSums, segment: int, size: int) -> Figure:
    """Draw both curves; needs no display and leaves no figure open.

    Args:
        sums: the measured losses.
        segment: tokens of a segment, marked in the figure.
        size: slots of the memory, marked too.
    """
    from matplotlib.figure import Figure

    middle, on, off = sums.curve()
    figure = Figure(figsize=(5, 3.2), dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.plot(middle, off, "o-", color="tab:gray", label="memory off")
    axes.plot(middle, on, "o-", color="tab:orange", label="memory on")
    axes.fill_between(middle, on, off, color="tab:orange", alpha=0.15)
    for place, label in ((segment, "one segment"), (size, "memory full")):
        if place <= 2 * middle[-1]:
            axes.axvline(place, color="black", linewidth=0.8, linestyle=":")
            axes.annotate(label, (place, 0.98), xycoords=("data", "axes fraction"), rotation=90,
                          va="top", ha="right", fontsize=8)  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_xlabel("position in the document, tokens")
    axes.set_ylabel("validation loss, nats per token")
    title = f"{int(sums.sums[0].sum()):,} tokens, gain {sums.gain:.3f} bits per token"
    axes.set_title(title, fontsize=10)
    axes.legend()
    return figure


class LossByPosition(Callback):
    """Reads a sample of the validation split a second time, with the memory switched off.

    The second reading has its own bank, which only holds XL caches, and draws no random number, so
    it changes nothing in validation and training. Logs the gain as ``memory/gain_bits_per_token``
    to every logger and the figure ``memory/loss_by_position`` to TensorBoard. The sample is some
    rows of the batch, each read to its end as far as ``tokens`` allows.

    Args:
        tokens: Tokens of the validation split, over all ranks, to read twice at each validation.
            0 = none.
    """

    def __init__(self, tokens: int = 131072) -> None:
        self.tokens = tokens
        self._warn_once = WarnOnce("loss by position")
        self._active = False
        self._left = 0
        """Tokens, with padding, that this rank may still read twice."""
        self._rows = torch.zeros(0, dtype=torch.long)
        self._segment = 0
        self._bank: MemoryBank | None = None
        self._sums = PositionSums()

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Reset the sums."""
        self._active = bool(
            self.tokens
            and trainer.loggers
            and not trainer.sanity_checking
            and pl_module.memory_layers
        )
        self._left = self.tokens // trainer.world_size
        self._bank, self._sums = None, PositionSums()

    def on_validation_batch_end(
        self,
        trainer: Any,
        pl_module: Any,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Read some rows of the batch without memory."""
        if not self._active or self._left <= 0 or dataloader_idx:
            return
        rows, segment = batch.input_ids.shape
        if self._bank is None:
            # Only rows that can be read to their end: an XL cache must not miss a segment.
            batches = min(trainer.num_val_batches[0], 2**40)
            count = min(rows, max(1, self._left // int(batches * segment)))
            device = batch.input_ids.device
            self._rows = torch.linspace(0, rows - 1, count, device=device).round().long()
            self._segment = segment
            self._bank = pl_module.net.new_memory(count, device, size=0)
        part = Batch(*(tensor[self._rows] for tensor in batch))
        self._left -= part.input_ids.numel()
        self._bank.reset(part.reset)
        with trainer.precision_plugin.forward_context():
            output = pl_module.net.score(part.input_ids, self._bank, part.targets)
        self._bank.commit(output.pairs, part.mask)
        counted = part.mask
        position = part.position[:, None] + torch.arange(1, segment + 1, device=counted.device)
        vectors = (position, outputs["nll"][self._rows], output.nll)
        self._sums.add(*(vector[counted].cpu() for vector in vectors))

    def on_validation_epoch_end(self, trainer: Any, pl_module: LightningModule) -> None:
        """Sum over the ranks, log the gain, draw the figure on rank 0."""
        if not self._active:
            return
        self._bank = None
        sums = trainer.strategy.reduce(
            self._sums.sums.to(fp64_device(pl_module.device)), reduce_op="sum"
        )
        self._sums.sums = sums.cpu()
        if not self._sums.sums[0].any():
            return
        pl_module.log("memory/gain_bits_per_token", self._sums.gain, sync_dist=True)
        writers = tensorboards(trainer)
        if writers:
            self._warn_once(lambda: self._write(writers, trainer, pl_module))

    def _write(self, writers: list[Any], trainer: Trainer, pl_module: Any) -> None:
        figure = draw(self._sums, self._segment, pl_module.config.memory.size)
        for writer in writers:
            writer.add_figure("memory/loss_by_position", figure, trainer.global_step)
