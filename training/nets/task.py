"""What one fit is about: the rows to learn from, the net to begin with, the settings that decide its weights.

A task is what a process of its own is given, and its fingerprint is what a checkpoint belongs to.
Letters: N rows of the table, T steps of a window, F features.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from models.net import Net
from models.registry import NETS
from tickserve.config import NetSettings, TrainerSettings
from tickserve.manifest import load_manifest
from tickserve.store import canonical_json
from training.examples import IntArray, Rows, chunks

# Keys of [trainer] that decide how the work is done and not what comes out.
INERT = (
    "memmap", "memmap_above_mb", "loader_workers", "prefetch", "pin_memory", "shared_memory", "checkpoint_steps",
    "checkpoint_folder", "checkpoint_async", "checkpoint_keep", "checkpoint_level", "resume", "cuda_alloc_conf",
)  # fmt: skip
# Keys of a family's section that no weight depends on.
INERT_NET = ("enabled", "stepped")


@dataclass(frozen=True)
class Task:
    """One fit. `features` float32 [N, F]; `classes` int8 [N]; `train` and `validation` are the rows windows end at.

    `mean` and `std` [F] are the scaler of the training rows. `name` is the folder of its checkpoints.
    """

    name: str
    architecture: dict[str, Any]
    features: Rows
    classes: npt.NDArray[np.int8]
    train: IntArray
    validation: IntArray
    mean: Rows
    std: Rows
    settings: NetSettings
    trainer: TrainerSettings
    seed: int
    window: int = field(default=1)

    def new_net(self) -> Net:
        """An untrained net with the scaler set, or the base net that adapters are trained for.

        Raises ArtifactError when the base is no net of this task's architecture.
        """
        net = NETS[self.architecture["kind"]].from_architecture(self.architecture)
        if self.trainer.lora_base:
            from training.nets.lora import base_weights

            net.load_state_dict(base_weights(Path(self.trainer.lora_base), net))
        net.set_scaler(torch.from_numpy(self.mean), torch.from_numpy(self.std))
        return net

    def fingerprint(self) -> str:
        """Twelve hexadecimal digits over everything that decides the weights: data, net, settings, seed, versions."""
        said = {
            "architecture": self.architecture,
            "settings": self.settings.model_dump(exclude=set(INERT_NET)),
            "trainer": self.trainer.model_dump(exclude=set(INERT)),
            "seed": self.seed,
            "window": self.window,
            "torch": torch.__version__,
            "base": load_manifest(Path(self.trainer.lora_base)).digest() if self.trainer.lora_base else None,
        }
        digest = hashlib.sha256(canonical_json(said))
        for part in chunks(self.features):
            digest.update(np.ascontiguousarray(part).data)
        for array in (self.classes, self.train, self.validation, self.mean, self.std):
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()[:12]
