"""TensorBoard as a run of this project fills it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

FIRST = "Perplexity"
"""The group that TensorBoard shows first: it sorts them, capitals before small letters."""

CHARTS = {
    "Perplexity": {"training and validation": ["Multiline", ["^(train|val)/perplexity$"]]},
    "Memory": {
        "gate of each head": ["Multiline", ["^memory/(gate|share)/layer\\d+_head\\d+$"]],
        "share of the output": ["Multiline", ["^memory/share/layer\\d+$"]],
        "age in tokens": ["Multiline", ["^memory/retrieved_age_tokens/"]],
        "age in steps": ["Multiline", ["^memory/(retrieved|stored)_age_steps/"]],
    },
    "Time": {"of a step, milliseconds": ["Multiline", ["^time/"]]},
}
"""The CUSTOM SCALARS page: several curves in one chart."""

SETTINGS = ("seed_everything", "model.", "data.", "trainer.max_steps", "trainer.precision",
            "trainer.accumulate_grad_batches", "trainer.gradient_clip_val")  # fmt: skip
"""How the settings begin that tell one run from another."""

OF_THE_MACHINE = ("data.cache_dir", "data.num_workers")
"""Settings that change nothing of the outcome."""


def flat_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that matter to a comparison, as numbers and strings by their full keys.

    Args:
        config: by dotted key.
    """
    flat = {}
    for key, value in config.items():
        if key.startswith(SETTINGS) and key not in OF_THE_MACHINE and value is not None:
            plain = isinstance(value, bool | int | float | str)
            flat[key] = value if plain else str(value)
    return flat


class RunLogger(TensorBoardLogger):
    """A TensorBoardLogger whose first page begins with the perplexity curves.

    Every ``SPLIT/perplexity`` is also logged as ``Perplexity/SPLIT``, and Lightning's ``epoch``,
    which would come before the rest, as ``trainer/epoch``.
    """

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log scalars."""
        named = {"trainer/epoch" if name == "epoch" else name: v for name, v in metrics.items()}
        for name, value in metrics.items():
            split, _, figure = name.partition("/")
            if figure == "perplexity":
                named[f"{FIRST}/{split}"] = value
        super().log_metrics(named, step)

    @rank_zero_only
    def log_hyperparams(
        self, params: Any, metrics: dict[str, Any] | None = None, step: int | None = None
    ) -> None:
        """Fill the HPARAMS page and lay out CUSTOM SCALARS, at the start of a run.

        The page takes its metrics from the last values of the run's own curves, so it is right
        during the run and after it was killed. It is told of no experiment: then TensorBoard
        compares the runs by itself and puts first what differs.

        Args:
            params: settings by their full keys.
            metrics: logged as scalars, if given.
            step: theirs.
        """
        from torch.utils.tensorboard.summary import hparams

        self.hparams.update(params)
        if metrics:
            self.log_metrics(metrics, step)
        named = {k: str(v).lower() if isinstance(v, bool) else v for k, v in params.items()}
        _, session, _ = hparams(named, {})
        self.experiment.add_custom_scalars(CHARTS)  # first, since it opens a closed file again
        self.experiment.file_writer.add_summary(session)
