"""The LightningModule: reads a segment, computes its loss, commits it to the stage's bank.

One batch is one segment of every row. The order within a step is fixed: the clearing callback
empties the rows that begin a document, forward reads, observers look, commit writes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torchmetrics import MetricCollection

from ..data.batch import Batch
from ..errors import ConfigError, UserError
from ..memory import MemoryBank
from ..model import MemorizingNet, ModelConfig, ModelOutput, Transformer
from ..pretrained.adapt import AdaptConfig, AdaptedConfig, adapted_model
from .best_neighbour import best_neighbour
from .callbacks import MemoryClearing, StalenessControl, StalenessLogging
from .checkpoint.folder import FOLDER_KEY
from .checkpoint.optimizer_state import take_over
from .checkpoint.resume import check_resumable, check_weights, describe_model, restore_rank
from .checkpoint.weights import weights_for
from .host_side import HostSide
from .metrics import language_model_metrics
from .optimizers import OptimizerConfig, make_optimizer, make_schedule
from .sharded import gathered_gradients, shard

Look = Callable[[Batch, MemoryBank, ModelOutput], None]
"""Called between read and commit of a training step."""


class MemorizingLM(HostSide):
    """Trains and tests a network with one memory bank per stage.

    The network is a ``Transformer``; a subclass that overrides ``build_net`` trains another
    ``MemorizingNet``. Banks are plain attributes: as buffers, DDP would copy rank 0's to all ranks.

    Args:
        optimizer: optimiser and schedule.
        save_memory: Save the memory of every row in checkpoints. If false, a resumed run starts
            with empty memory.
        init_from: Folder of a checkpoint, or of a model that `export` or ``save_pretrained`` wrote.
            A new run starts with its weights, a fresh optimiser and step 0. Ignored if ckpt_path is
            given. Default: weights drawn by the seed.
        base: Folder or hub name of a pretrained model of transformers that is given a memory. It
            sets the size of the model. Default: a model of our own, with weights drawn by the seed.
        adapt: how that is done.
        settings: the fields of ``ModelConfig``; ``vocab_size`` defaults to the tokenizer's.
    """

    net: MemorizingNet
    """Built by ``configure_model``."""

    def __init__(
        self,
        optimizer: OptimizerConfig = OptimizerConfig(),  # noqa: B008 (never changed)
        save_memory: bool = True,
        init_from: str | None = None,
        base: str | None = None,
        adapt: AdaptConfig = AdaptConfig(),  # noqa: B008 (never changed)
        **settings: Any,
    ) -> None:
        super().__init__()
        config = ModelConfig(**settings) if base is None else AdaptedConfig(**settings)
        self.config = config
        optimizer.validate()
        self.optimizer_config = optimizer
        self.save_memory, self.init_from = save_memory, init_from
        adapt.validate(base, init_from)
        self.base, self.adapt = base, adapt
        self._resume: dict[str, Any] | None = None
        self._has_weights = init_from is None
        self._accumulating = False
        self.memory_size: int | None = None
        """Slots of banks to come; 0 switches the memory off, None is ``model.memory.size``."""
        self.banks: dict[str, MemoryBank] = {}
        """By stage (train, validate, test, predict): the memory of this rank's rows."""
        self.observers: list[Look] = []
        self.train_metrics = language_model_metrics("train/")
        self.val_metrics = language_model_metrics("val/")
        self.test_metrics = language_model_metrics("test/")

    def configure_callbacks(self) -> list[Callback]:
        """Clear the memory, log staleness and, where ``model.memory`` asks for it, control it.

        A callback of the trainer's replaces one of these. All others are listed in the config,
        under ``trainer.callbacks``. They act first, so throughput counts what a refresh costs.
        """
        present: list[Callback] = getattr(self.trainer, "callbacks", [])
        wanted: list[Callback] = [MemoryClearing(), StalenessLogging()]
        memory = self.config.memory
        if memory.refresh_every_n_steps or memory.drop_after_n_steps or memory.drop_below_cosine:
            wanted.append(StalenessControl())
        return [new for new in wanted if not any(isinstance(old, type(new)) for old in present)]

    def setup(self, stage: str) -> None:
        """Refuse to start without a callback that clears the memory.

        Raises:
            UserError: if there is none.
        """
        self.banks.clear()
        MemoryClearing.require(getattr(self.trainer, "callbacks", []))

    @property
    def datamodule(self) -> Any:
        """The trainer's data module, or None if it was given loaders."""
        return getattr(self.trainer, "datamodule", None)

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of the data, or None if it is not known."""
        return getattr(self.datamodule, "text_tokenizer", None)

    def build_net(self) -> MemorizingNet:
        """The network that ``self.config`` describes, or the pretrained one with its memory."""
        if self.base is None:
            return Transformer(self.config)
        # Lightning builds on the GPU, and what checks a base draws on the CPU. It is moved later.
        with torch.device("cpu"):
            return adapted_model(self.base, self.config, self.adapt, self.tokenizer)

    @property
    def memory_layers(self) -> list[int]:
        """The layers that read a memory; [] if it is switched off."""
        return [*self.net.readers()] if self.config.memory.size else []

    def configure_model(self) -> None:
        """Build the network once the vocabulary is known."""
        if hasattr(self, "net"):
            return
        needed = getattr(self.datamodule, "vocab_size", None)
        if needed is not None:
            if self.config.vocab_size is None:
                self.config.vocab_size = needed
            elif self.config.vocab_size < needed:
                remedy = f"must be at least {needed}, the size of the tokenizer, or left out"
                raise ConfigError("model.vocab_size", self.config.vocab_size, remedy)
        self.net = self.build_net()
        self.net.check_segment_length(getattr(self.datamodule, "segment_length", 1))
        if not self.config.memory.size:
            # Without a memory these are not used, and DDP waits for every gradient it expects.
            for parameter in self.net.memory_parameters():
                parameter.requires_grad_(False)
        if self.device_mesh is not None:
            shard(self.net, self.device_mesh["data_parallel"])

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """One optimiser; its schedule advances with every optimiser step."""
        optimizer = make_optimizer(self.net, self.optimizer_config)
        schedule = make_schedule(optimizer, self.optimizer_config, self.trainer.max_steps)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step", "name": "lr"},
        }

    def _take_weights(self) -> None:
        """Load the weights of ``init_from`` if no checkpoint was loaded."""
        if self._has_weights:
            return
        assert self.init_from is not None
        taken = weights_for(self.net, self.init_from, self.tokenizer)
        named = {"state_dict": {f"net.{name}": tensor for name, tensor in taken.items()}}
        self.trainer.strategy.load_model_state_dict(named, strict=False)
        self._has_weights = True

    # When the first of these hooks runs, every strategy has loaded the checkpoint, if any.
    on_validation_start = on_test_start = on_predict_start = _take_weights

    def on_train_start(self) -> None:
        """When resuming, restore the memory of this rank's rows and its random states."""
        super().on_train_start()
        self._take_weights()
        if self._resume is None:
            return
        origin, self._resume = self._resume, None
        bank, self._accumulating = restore_rank(
            origin, self.global_rank, self.trainer.world_size, self.net, self.device
        )
        if bank is not None:
            self.banks["train"] = bank

    def on_after_backward(self) -> None:
        """Note that there are gradients without an optimiser step."""
        self._accumulating = True

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Note that there are none."""
        self._accumulating = False

    def accumulated_gradients(self) -> dict[str, Tensor]:
        """Gradients that had no optimiser step yet, as ``gathered_gradients``; {} if none."""
        if not self._accumulating:
            return {}
        return gathered_gradients(self.net, self.global_rank)

    def prepare_bank(self, stage: str, batch: Batch) -> MemoryBank:
        """The stage's bank, made at its first batch; rows that begin a document are cleared.

        Raises:
            UserError: if the number of rows changes between two batches.
        """
        rows = batch.input_ids.shape[0]
        if stage not in self.banks:
            self.banks[stage] = self.net.new_memory(rows, self.device, self.memory_size)
        bank = self.banks[stage]
        if bank.batch_size != rows:
            raise UserError(
                f"{stage}: a batch of {rows} rows follows one of {bank.batch_size}, but each row "
                "keeps its memory; the loader must always give the same number of rows"
            )
        bank.reset(batch.reset, self.on_host(batch).reset)
        return bank

    def read(self, stage: str, batch: Batch) -> tuple[ModelOutput, Tensor]:
        """Run the network on the stage's memory; changes nothing.

        Returns:
            the output, and the loss of every token (B, N) in fp32, 0 for padding.
        """
        output = self.net.score(batch.input_ids, self.banks[stage], batch.targets)
        assert output.nll is not None
        return output, output.nll

    def commit(self, stage: str, batch: Batch, output: ModelOutput) -> None:
        """Write the segment to the stage's memory: once, after the read."""
        bank = self.banks[stage]
        bank.commit(output.pairs, batch.mask, batch.input_ids, self.global_step)

    @staticmethod
    def measure(metrics: MetricCollection, batch: Batch, output: ModelOutput, nll: Tensor) -> None:
        """Add a batch to metrics."""
        metrics.update(nll.detach(), output.hits, batch.mask, batch.num_bytes)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Read one segment of every row; the loss, which ``watch_loss`` looks at.

        The loss is the sum over counted tokens, divided by the number of all tokens with padding: a
        token has the same weight in every step, on every rank and with gradient accumulation.
        """
        output, nll = self.read("train", batch)
        loss = nll.sum() / batch.targets.numel()
        self.watch_loss(loss)
        for look in self.observers:
            look(batch, self.banks["train"], output)
        self.commit("train", batch, output)
        self.log_training(batch, output, nll)
        return loss

    def log_training(self, batch: Batch, output: ModelOutput, nll: Tensor) -> None:
        """On a logging step, log the metrics of its batches so far, over all ranks."""
        if not self.logs_now():
            return
        if not self._accumulating:
            self.train_metrics.reset()
        self.measure(self.train_metrics, batch, output, nll)
        self.log_figures(self.train_metrics, ("train/loss", "train/perplexity"))
        rate = self.trainer.optimizers[0].param_groups[0]["lr"]
        self.log("trainer/learning_rate", torch.tensor(rate))

    def _evaluate(self, stage: str, batch: Batch, metrics: MetricCollection) -> dict[str, Tensor]:
        output, nll = self.read(stage, batch)
        self.commit(stage, batch, output)
        self.measure(metrics, batch, output, nll)
        for name, metric in metrics.items():
            self.log(name, metric, on_epoch=True, prog_bar=name.endswith("perplexity"))
        return {"nll": nll}

    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Read, commit to the validation bank, measure."""
        return self._evaluate("validate", batch, self.val_metrics)

    def test_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Read, commit to the test bank, measure."""
        return self._evaluate("test", batch, self.test_metrics)

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """Per-token losses, hits and best neighbours of a segment, with the ids that place them."""
        output, nll = self.read("predict", batch)
        memories = self.banks["predict"].memories
        best = {layer: best_neighbour(memories[layer], r) for layer, r in output.retrievals.items()}
        self.commit("predict", batch, output)
        return {
            "document": batch.document,
            "position": batch.position,
            "target": batch.targets,
            "loss": nll,
            "correct": output.hits,
            "num_bytes": batch.num_bytes,
            "best": best,
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what the weights mean, so that the file alone is enough to use them."""
        super().on_save_checkpoint(checkpoint)
        settings = (self.config, self.optimizer_config)
        describe_model(checkpoint, self.net, *settings, self.tokenizer)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse what does not fit; the rest is taken over with the current settings.

        Raises:
            UserError: naming every key that differs.
        """
        check_weights(checkpoint, self.net.architecture(), self.tokenizer)
        self._has_weights = True
        if self.trainer.state.fn != TrainerFn.FITTING:
            return
        check_resumable(checkpoint, self.datamodule)
        self._resume = checkpoint.get(FOLDER_KEY)
        if type(self).configure_optimizers is MemorizingLM.configure_optimizers:
            take_over(checkpoint, self.net, self.optimizer_config, self.trainer.max_steps)
