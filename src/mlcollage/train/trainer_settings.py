"""How a trainer of Lightning or Hugging Face makes an update: read from the trainer, so that no callback assumes it."""

from __future__ import annotations

import math
from collections.abc import Sized
from dataclasses import dataclass
from typing import Any

import torch

from mlcollage.errors import InvalidInput

_SHARDED = ("FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy", "XLAFSDPStrategy")


@dataclass(frozen=True)
class TrainerSettings:
    """What a trainer knows about one update; None where the trainer does not know it either.

    Parameters
    ----------
    max_steps
        Updates that it will make.
    samples
        Size of its training set.
    batch_size
        Samples of one micro-batch in one process.
    accumulation
        Micro-batches whose gradients are added up for an update, in one process.
    world_size
        Processes whose gradients are averaged.
    clip_norm, clip_value
        Norm to which gradients are scaled down, or value at which they are cut; None for no clipping.
    autocast
        Type of ``torch.autocast`` around the network; None without.
    label_smoothing
        Smoothing that the trainer itself applies.
    """

    max_steps: int | None
    samples: int | None
    batch_size: int | None
    accumulation: int = 1
    world_size: int = 1
    clip_norm: float | None = None
    clip_value: float | None = None
    autocast: torch.dtype | None = None
    label_smoothing: float = 0.0


def transformers_settings(args: Any, state: Any, loader: Any = None) -> TrainerSettings:
    """The settings of a Hugging Face ``Trainer``, from what it hands to callbacks.

    Parameters
    ----------
    args, state
        ``TrainingArguments`` and ``TrainerState``, when training has begun.
    loader
        ``train_dataloader`` among the callback's keywords.

    Raises
    ------
    InvalidInput
        If the parameters are sharded, or copies of the model run on several GPUs of one process: no callback then
        sees the model that is trained.
    """
    if args.n_gpu > 1:
        raise InvalidInput("with several GPUs in one process the Trainer runs copies of the model; use torchrun.")
    if getattr(args, "deepspeed", None) or getattr(args, "fsdp", None):
        raise InvalidInput("DeepSpeed and FSDP shard the parameters, which a callback then cannot see; use DDP.")
    return TrainerSettings(
        max_steps=int(state.max_steps) if state.max_steps > 0 else None,
        samples=_length(loader),
        batch_size=int(args.train_batch_size),
        accumulation=int(args.gradient_accumulation_steps),
        world_size=int(args.world_size),
        clip_norm=float(args.max_grad_norm) if args.max_grad_norm and args.max_grad_norm > 0 else None,
        autocast=torch.float16 if args.fp16 else torch.bfloat16 if args.bf16 else None,
        label_smoothing=float(args.label_smoothing_factor),
    )


def lightning_settings(trainer: Any, module: Any) -> TrainerSettings:
    """The settings of a Lightning ``Trainer``, once training has begun.

    Parameters
    ----------
    trainer, module
        As callbacks get them.

    Raises
    ------
    InvalidInput
        If the module makes its updates or clips its gradients by code of its own, which cannot be read, or the
        parameters are sharded.
    """
    if not module.automatic_optimization:
        raise InvalidInput(
            f"{type(module).__name__} optimizes manually, in code that no callback can read; call the method's own "
            "object inside training_step instead of this callback."
        )
    for name in ("configure_gradient_clipping", "optimizer_step"):
        # Methods of Lightning's own class live in its package, those of the user elsewhere.
        if not getattr(type(module), name).__module__.startswith(("lightning.", "pytorch_lightning.")):
            raise InvalidInput(
                f"{type(module).__name__} overrides {name}, which this callback cannot read; leave it to the Trainer, "
                "or call the method's own object instead of this callback."
            )
    if type(trainer.strategy).__name__ in _SHARDED:
        raise InvalidInput(f"{type(trainer.strategy).__name__} shards parameters, which callbacks cannot see; use DDP.")
    loader = trainer.train_dataloader
    whole = trainer.limit_train_batches == 1.0 and trainer.overfit_batches == 0
    clip = float(trainer.gradient_clip_val or 0) or None
    by_value = str(getattr(trainer.gradient_clip_algorithm, "value", trainer.gradient_clip_algorithm)) == "value"
    steps, batch = trainer.estimated_stepping_batches, getattr(loader, "batch_size", None)
    if batch is None:
        batch = getattr(getattr(loader, "batch_sampler", None), "batch_size", None)
    return TrainerSettings(
        max_steps=int(steps) if math.isfinite(steps) and steps > 0 else None,
        samples=_length(loader) if whole else None,
        batch_size=None if batch is None else int(batch),
        accumulation=int(trainer.accumulate_grad_batches),
        world_size=int(trainer.world_size),
        clip_norm=None if by_value else clip,
        clip_value=clip if by_value else None,
        autocast={"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(str(trainer.precision)),
    )


def _length(loader: Any) -> int | None:
    """Samples of a loader's data set; None for a stream."""
    data = getattr(loader, "dataset", None)
    try:
        return len(data) if isinstance(data, Sized) else None
    except TypeError:  # IterableDataset of some libraries has __len__ and refuses to answer
        return None
