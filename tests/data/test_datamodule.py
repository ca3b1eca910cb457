"""The DataModule: settings in, batches out, also under a real trainer."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch

from memorizing_transformers.data import DocumentDataModule
from memorizing_transformers.data.batch import Batch
from memorizing_transformers.errors import ConfigError, UserError


def module(texts: Path, **options) -> DocumentDataModule:
    settings = {"batch_rows": 2, "segment_length": 64, "num_workers": 1}
    settings |= {"cache_dir": str(texts.parent / "cache"), "validation_fraction": 0.2, **options}
    return DocumentDataModule(str(texts), **settings)


def ready(texts: Path, **options) -> DocumentDataModule:
    data = module(texts, **options)
    data.prepare_data()
    data.setup("fit")
    return data


def in_world(data: DocumentDataModule, rank: int, size: int) -> DocumentDataModule:
    """Attach a stand-in for the trainer of one of several processes."""
    data.trainer = SimpleNamespace(  # type: ignore[assignment]
        world_size=size,
        global_rank=rank,
        limit_train_batches=1.0,
        overfit_batches=0.0,
        strategy=SimpleNamespace(broadcast=lambda name: name, root_device=torch.device("cpu")),
    )
    return data


def test_loaders_of_every_stage(texts: Path) -> None:
    data = ready(texts, eval_rows=3, predict_split="validation")
    stores = [data.train_store, data.validation_store, data.test_store]
    assert sum(map(len, stores)) == 12
    loaders = [data.train_dataloader(), data.val_dataloader(), data.test_dataloader()]
    for loader, store, rows in zip(loaders, stores, (2, 3, 3), strict=True):
        batch = next(iter(loader))
        assert batch.input_ids.shape == (rows, 64)
        assert loader.store is store
    assert data.predict_dataloader().store is data.validation_store


def test_the_summary_tells_sizes_steps_and_padding(texts: Path) -> None:
    data = ready(texts, eval_rows=8)
    text = "\n".join(data.summary())
    assert str(data.store_folder) in text
    assert f"train: {len(data.train_store)} documents" in text
    assert f"train: {len(data.train_dataloader())} steps of 2 rows of 64 tokens" in text
    assert "% padding; data.eval_rows = " in text


@pytest.mark.parametrize(
    ("options", "size"), [({}, 256), ({"tokenizer": "bpe", "bpe_vocab_size": 300}, 300)]
)
def test_the_vocabulary_is_known_before_setup(texts: Path, options: dict, size: int) -> None:
    data = module(texts, **options)
    assert data.vocab_size == size
    tokenizer = data.text_tokenizer
    assert len(tokenizer) == size
    assert tokenizer.decode(tokenizer.encode("any text ü")) == "any text ü"
    data.setup("fit")
    assert data.train_store.vocab_size == size


def test_a_fraction_of_zero_leaves_a_split_out(texts: Path) -> None:
    data = ready(texts, validation_fraction=0, test_fraction=0)
    assert len(data.train_store) == 12
    assert data.val_dataloader() == []
    with pytest.raises(UserError, match=r"data\.test_fraction = 0: .*data\.test_source"):
        data.test_dataloader()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_rows": 0}, "data.batch_rows = 0: must be at least 1"),
        ({"eval_rows": 0}, "data.eval_rows = 0: must be at least 1"),
        ({"segment_length": 0}, "data.segment_length = 0: must be at least 1"),
        ({"num_workers": 0}, "data.num_workers = 0: must be at least 1"),
        ({"seed": -1}, "data.seed = -1: must be at least 0"),
        ({"min_characters": -1}, "data.min_characters = -1: must be at least 0"),
        ({"cut_tokens": 1}, "data.cut_tokens = 1: must be at least 2"),
        ({"shuffle_tokens": 0}, "data.shuffle_tokens = 0: must be at least 1"),
        ({"cut_tokens": 9, "shuffle_tokens": 9}, "data.shuffle_tokens = 9: or data.cut_tokens"),
        ({"bpe_vocab_size": 255}, "data.bpe_vocab_size = 255: must be at least 256"),
        ({"bpe_train_bytes": 0}, "data.bpe_train_bytes = 0: must be at least 1"),
        ({"predict_split": "train"}, "data.predict_split = 'train': must be"),
    ],
)
def test_settings_that_cannot_work_are_refused_at_once(options: dict, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        DocumentDataModule(**options)
    assert str(caught.value).startswith(message)


def test_rearranged_documents_are_those_of_the_same_cache(texts: Path) -> None:
    plain, cut = ready(texts), ready(texts, cut_tokens=40)
    shuffled = ready(texts, shuffle_tokens=16)
    assert cut.store_folder == shuffled.store_folder == plain.store_folder
    for split in ("train", "validation", "test"):
        lengths = [getattr(data, f"{split}_store").lengths for data in (plain, cut, shuffled)]
        assert lengths[1].max() <= 40 < lengths[0].max()
        assert lengths[2].tolist() == lengths[0].tolist()


def test_rows_are_shared_out_over_processes(texts: Path) -> None:
    whole = list(ready(texts, batch_rows=6).train_dataloader())
    ranks = [in_world(module(texts, batch_rows=6), rank, 2) for rank in range(2)]
    ranks[0].setup("fit")
    ranks[1].trainer.strategy.broadcast = lambda name: ranks[0].store_folder.name
    ranks[1].setup("fit")
    parts = [list(data.train_dataloader()) for data in ranks]
    assert len(parts[0]) == len(parts[1]) == len(whole)
    for batch, left, right in zip(whole, *parts, strict=True):
        for field, one, two in zip(batch, left, right, strict=True):
            assert torch.equal(field, torch.cat([one, two]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_rows": 4}, "data.batch_rows = 4: must be a multiple of .* processes \\(3\\)"),
        ({"batch_rows": 3, "eval_rows": 4}, "data.eval_rows = 4: must be a multiple"),
    ],
)
def test_rows_that_processes_cannot_share_are_refused(texts, options, message: str) -> None:
    data = in_world(module(texts, **options), 0, 3)
    with pytest.raises(ConfigError, match=message):
        data.setup("fit")


class Recorder(pl.LightningModule):
    """Learns nothing and writes down where every batch stands."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: list[tuple] = []
        self.indices: list[int] = []
        self.validated: list[int] = []

    def training_step(self, batch: Batch, index: int) -> torch.Tensor:
        self.seen.append((tuple(batch.document.tolist()), tuple(batch.position.tolist())))
        self.indices.append(index)
        return (self.weight * batch.mask.sum()).sum()

    def validation_step(self, batch: Batch, index: int) -> None:
        self.validated.append(int(batch.mask.sum()))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(texts: Path, ckpt_path: Path | None = None, **options) -> tuple[Recorder, pl.Trainer]:
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=texts.parent,
        **options,
    )
    recorder = Recorder()
    trainer.fit(recorder, datamodule=module(texts), ckpt_path=ckpt_path, weights_only=True)
    return recorder, trainer


@pytest.fixture(scope="module")
def _quiet():
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.usefixtures("_quiet")
@pytest.mark.parametrize("limit", [1.0, 0.3, 7])
@pytest.mark.parametrize("stop", [5, 14, 28, 33])
def test_a_stopped_run_goes_on_with_the_next_batch(texts: Path, stop: int, limit) -> None:
    whole, _ = fit(texts, max_steps=60, limit_train_batches=limit)
    stream = ready(texts).train_dataloader()
    expected = [stream.batch(0, step) for step in range(60)]
    positions = [(tuple(b.document.tolist()), tuple(b.position.tolist())) for b in expected]
    assert whole.seen == positions

    first, trainer = fit(texts, max_steps=stop, limit_train_batches=limit)
    trainer.save_checkpoint(texts.parent / "stopped.ckpt")
    second, _ = fit(texts, texts.parent / "stopped.ckpt", max_steps=60, limit_train_batches=limit)
    assert first.seen + second.seen == positions
    # Epochs end where they would have ended.
    assert first.indices + second.indices == whole.indices


@pytest.mark.usefixtures("_quiet")
def test_each_validation_reads_all_of_it(texts: Path) -> None:
    data = ready(texts)
    once = [int(batch.mask.sum()) for batch in data.val_dataloader()]
    recorder, _ = fit(texts, max_epochs=2, num_sanity_val_steps=1)
    assert recorder.validated == once[:1] + 2 * once
    assert sum(once) == int((data.validation_store.lengths - 1).sum())


@pytest.mark.usefixtures("_quiet")
def test_overfitting_reads_the_same_batches_again(texts: Path) -> None:
    recorder, _ = fit(texts, max_epochs=3, overfit_batches=2)
    assert recorder.seen == recorder.seen[:2] * 3


def test_batches_are_made_ahead_for_a_gpu_alone(texts: Path) -> None:
    data = in_world(module(texts), 0, 1)
    data.setup("fit")
    for device, gpu in (("cpu", None), ("cuda:1", torch.device("cuda:1")), ("mps", None)):
        data.trainer.strategy.root_device = torch.device(device)
        assert data.train_dataloader().gpu == data.val_dataloader().gpu == gpu
