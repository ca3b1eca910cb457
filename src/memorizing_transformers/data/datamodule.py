"""The data of an experiment, as Lightning asks for it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch import LightningDataModule

from ..errors import ConfigError, UserError
from .loader import SegmentLoader
from .row_plan import RowPlan
from .settings import (
    SPLITS,
    CorpusSettings,
    Grouping,
    SourceSettings,
    TokenizerSettings,
    check_unicode,
)
from .tokens.prepare import prepare_store, summary_lines
from .tokens.shuffled import open_store
from .tokens.store import MIN_TOKENS, TOKENIZER_FOLDER, TokenStore
from .tokens.tokenizers import (
    BPE,
    BYTES,
    NUM_BYTES,
    byte_tokenizer,
    load_tokenizer,
    vocabulary_size,
)

if TYPE_CHECKING:
    from lightning.pytorch import Trainer
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)


class DocumentDataModule(LightningDataModule):
    """Long documents, read segment by segment in rows.

    Args:
        source: Text to train on: 'stdlib' (the standard library of the running Python), a file, a
            folder, a glob, or a dataset of the Hugging Face hub as hub:owner/name or
            hub:owner/name:config. Files .jsonl, .json and .parquet, also compressed, hold one
            document per record. Any other file is one document.
        validation_source: Text to validate on, written like source. Default: the hub dataset's own
            split, fixed packages of the standard library, or a share of the documents of source.
        test_source: Text to test on, written like source. Default: as for validation_source.
        text_column: Column of records that holds a document's text, or a path to it: meta.body is a
            field of meta, files[].content joins a field of all items of the list files.
        group_column: Column of records. Records with the same value in it are one document, which
            has the value as its name. With group = 'folder' the value is a path, and its first part
            counts. Default: each record is a document.
        sort_column: Column that orders the records of a group, or a path that orders the items of
            the list in text_column, e.g. files[].path. Default: the order of the source.
        where: Reads only records that have these values, by column. A list gives several values,
            e.g. {license: [mit, bsd-3-clause], language: Python}. Default: all records.
        group: 'file' makes each text file a document. 'folder' joins the files of each top-level
            folder in path order, as the paper does with repositories. 'isabelle' does the same, but
            an Isabelle theory comes after those that it imports.
        validation_fraction: Share of the documents that is held out for validation, chosen by a
            hash of their names. 0 = none.
        test_fraction: Share of the documents that is held out for the test, chosen by a hash of
            their names. 0 = none.
        min_characters: Leave out documents with fewer characters. Default: 2000 for the standard
            library, else 0.
        min_tokens: Leave out documents with fewer tokens. Documents of one token have nothing to
            predict. A trained BPE is also trained on what is left out here.
        tokenizer: 'bytes', 'bpe' (trained on the training documents), or the name or folder of any
            tokenizer that AutoTokenizer loads.
        bpe_vocab_size: Number of tokens of the trained BPE, including the 256 bytes.
        bpe_train_bytes: Number of bytes of the training documents that the BPE is trained on, from
            the first document on.
        batch_rows: Rows of a training batch, over all processes.
        eval_rows: Rows of a batch in validation, test and prediction, over all processes. Default:
            batch_rows.
        segment_length: Tokens that a row reads in one step.
        seed: Seed of the order in which training documents are read.
        cut_tokens: Cut documents into documents of at most so many tokens, in every split. A
            control: what memory is worth on texts of ordinary length.
        shuffle_tokens: Exchange blocks of so many tokens between all documents of a split. A
            control: the memory then holds text of other documents.
        cache_dir: Folder for tokenised text.
        num_workers: Number of threads that tokenise. Default: the number of processors.
        predict_split: Split that prediction reads.

    Raises:
        ConfigError: a setting cannot work.
    """

    def __init__(
        self,
        source: str = "stdlib",
        validation_source: str | None = None,
        test_source: str | None = None,
        text_column: str = "text",
        group_column: str | None = None,
        sort_column: str | None = None,
        where: dict[str, Any] | None = None,
        group: Grouping = "file",
        validation_fraction: float = 0.05,
        test_fraction: float = 0.05,
        min_characters: int | None = None,
        min_tokens: int = MIN_TOKENS,
        tokenizer: str = BYTES,
        bpe_vocab_size: int = 512,
        bpe_train_bytes: int = 256 * 2**20,
        batch_rows: int = 16,
        eval_rows: int | None = None,
        segment_length: int = 512,
        seed: int = 0,
        cut_tokens: int | None = None,
        shuffle_tokens: int | None = None,
        cache_dir: str = "data/cache",
        num_workers: int | None = None,
        predict_split: Literal["validation", "test"] = "test",
    ) -> None:
        super().__init__()
        _at_least(1, "data.batch_rows", batch_rows)
        _at_least(1, "data.eval_rows", eval_rows)
        _at_least(1, "data.segment_length", segment_length)
        _at_least(1, "data.num_workers", num_workers)
        _at_least(MIN_TOKENS, "data.cut_tokens", cut_tokens)
        _at_least(1, "data.shuffle_tokens", shuffle_tokens)
        if cut_tokens is not None and shuffle_tokens is not None:
            raise ConfigError("data.shuffle_tokens", shuffle_tokens, "or data.cut_tokens, not both")
        _at_least(0, "data.seed", seed)
        check_unicode("data.cache_dir", cache_dir)
        if predict_split not in ("validation", "test"):
            raise ConfigError("data.predict_split", predict_split, "must be validation or test")
        self.settings = CorpusSettings(
            sources=SourceSettings(
                source=source,
                validation_source=validation_source,
                test_source=test_source,
                text_column=text_column,
                group_column=group_column,
                sort_column=sort_column,
                where=where,
                group=group,
                validation_fraction=validation_fraction,
                test_fraction=test_fraction,
            ),
            tokenizer=TokenizerSettings(tokenizer, bpe_vocab_size, bpe_train_bytes),
            min_characters=min_characters,
            min_tokens=min_tokens,
        )
        self.batch_rows = batch_rows
        self.eval_rows = batch_rows if eval_rows is None else eval_rows
        self._eval_rows_key = "data.batch_rows" if eval_rows is None else "data.eval_rows"
        self.segment_length = segment_length
        self.seed = seed
        self.cut_tokens = cut_tokens
        self.shuffle_tokens = shuffle_tokens
        self.cache_dir = Path(cache_dir).expanduser()
        self.num_workers = num_workers
        self.predict_split = predict_split
        self._folder: Path | None = None
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._stores: dict[str, TokenStore] = {}
        self._stream: tuple[Trainer | None, SegmentLoader | None] = (None, None)

    def prepare_data(self) -> None:
        """Tokenise the text, unless the cache holds it; Lightning calls this once per machine."""
        if self._folder is None:
            self._folder = prepare_store(self.settings, self.cache_dir, self.num_workers)

    def setup(self, stage: str | None = None) -> None:
        """Open the token store on every rank."""
        trainer = self.trainer
        if self._world_size > 1 and trainer is not None:
            self._share(self.batch_rows, "data.batch_rows")
            self._share(self.eval_rows, self._eval_rows_key)
            # Rank 0 read the text to fingerprint it; the others need not read it again.
            name = self.store_folder.name if trainer.global_rank == 0 else ""
            self._folder = self.cache_dir / trainer.strategy.broadcast(name)
        self.prepare_data()

    @property
    def store_folder(self) -> Path:
        """The folder of the token store, prepared unless it is; its name is the fingerprint."""
        self.prepare_data()
        assert self._folder is not None
        return self._folder

    @property
    def train_store(self) -> TokenStore:
        """The training documents."""
        return self._store("train")

    @property
    def validation_store(self) -> TokenStore:
        """The validation documents."""
        return self._store("validation")

    @property
    def test_store(self) -> TokenStore:
        """The test documents."""
        return self._store("test")

    @property
    def text_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer; a BPE that is not trained yet is trained, which prepares the data."""
        if self._tokenizer is None:
            name = self.settings.tokenizer.tokenizer
            if name == BYTES:
                self._tokenizer = byte_tokenizer()
            elif name == BPE or self._folder is not None:
                self._tokenizer = load_tokenizer(str(self.store_folder / TOKENIZER_FOLDER))
            else:
                self._tokenizer = load_tokenizer(name)
        return self._tokenizer

    @property
    def vocab_size(self) -> int:
        """The number of token ids, known before the data are prepared unless a BPE is trained."""
        if self.settings.tokenizer.tokenizer == BYTES:
            return NUM_BYTES
        return vocabulary_size(self.text_tokenizer)

    @property
    def expected_vocab_size(self) -> int:
        """The same, without training a BPE: what its vocabulary was asked to be."""
        settings = self.settings.tokenizer
        return settings.bpe_vocab_size if settings.tokenizer == BPE else self.vocab_size

    def plan(self, split: str) -> RowPlan:
        """The row plan of a split: endless for ``train``, one pass for the others."""
        train = split == "train"
        rows = self.batch_rows if train else self.eval_rows
        lengths = self._store(split).lengths
        return RowPlan(lengths, rows, self.segment_length, self.seed, train=train)

    def summary(self) -> list[str]:
        """Lines for the user: the tokenizer, and per split its size, steps and padding."""
        plans = [f"{split}: {self.plan(split).describe()}" for split in SPLITS if self._has(split)]
        return [*summary_lines(self.store_folder), *plans]

    def train_dataloader(self) -> SegmentLoader:
        """Batches of this rank's rows, endless, in epochs of about one pass."""
        plan = self.plan("train")
        rank, world_size = self._share(self.batch_rows, "data.batch_rows")
        if len(self.train_store) < self.batch_rows and rank == 0:
            log.warning(
                "%d training documents for %d rows: some rows read the same document at once",
                len(self.train_store),
                self.batch_rows,
            )
        steps, repeat = plan.steps_per_epoch, False
        if self.trainer is not None:
            # Where Lightning stops an epoch. An iteration must not end in the middle of one.
            limit = self.trainer.limit_train_batches
            steps = int(steps * limit) if isinstance(limit, float) else min(steps, limit or 0)
            repeat = self.trainer.overfit_batches > 0  # type: ignore[attr-defined]
        loader = SegmentLoader(self.train_store, plan, rank, world_size, steps, repeat, self._gpu)
        trainer, last = self._stream
        if last is not None and trainer is self.trainer:
            # trainer.reload_dataloaders_every_n_epochs: another loader, but the same stream.
            loader.follow(last)
        if self.trainer is not None:
            self._stream = (self.trainer, loader)
        return loader

    def val_dataloader(self) -> SegmentLoader | list[SegmentLoader]:
        """Batches of the validation documents; none if their fraction is 0."""
        return self._eval_loader("validation") if self._has("validation") else []

    def test_dataloader(self) -> SegmentLoader:
        """Batches of the test documents."""
        return self._eval_loader("test")

    def predict_dataloader(self) -> SegmentLoader:
        """Batches of the documents of `predict_split`."""
        return self._eval_loader(self.predict_split)

    @property
    def _world_size(self) -> int:
        return self.trainer.world_size if self.trainer is not None else 1

    @property
    def _gpu(self) -> torch.device | None:
        """The GPU that batches are copied to; None for other devices."""
        device = self.trainer.strategy.root_device if self.trainer is not None else None
        return device if device is not None and device.type == "cuda" else None

    def _share(self, rows: int, key: str) -> tuple[int, int]:
        """This process's rank and the world size, which must divide the rows."""
        world_size = self._world_size
        if rows % world_size:
            remedy = f"must be a multiple of the number of processes ({world_size})"
            raise ConfigError(key, rows, remedy)
        return (self.trainer.global_rank if self.trainer is not None else 0), world_size

    def _eval_loader(self, split: str) -> SegmentLoader:
        rank, world_size = self._share(self.eval_rows, self._eval_rows_key)
        return SegmentLoader(self._store(split), self.plan(split), rank, world_size, gpu=self._gpu)

    def _has(self, split: str) -> bool:
        return (self.store_folder / f"{split}.tokens.bin").is_file()

    def _store(self, split: str) -> TokenStore:
        if split not in self._stores:
            if not self._has(split):
                raise UserError(
                    f"data.{split}_fraction = 0: there are no documents for {split}; raise it or "
                    f"give data.{split}_source"
                )
            changed = (self.cut_tokens, self.shuffle_tokens)
            self._stores[split] = open_store(self.store_folder, split, *changed)
        return self._stores[split]


def _at_least(least: int, key: str, value: int | None) -> None:
    if value is not None and value < least:
        raise ConfigError(key, value, f"must be at least {least}")
