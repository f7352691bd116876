"""What can be set: one section a part of the pipeline, typed and frozen, each with its defaults.

What is in force is read from a profile, a file and the environment by `tickserve/settings.py`.
"""

from __future__ import annotations

from typing import Literal, get_args

from pydantic import Field, model_validator

from tickserve.config.data import CostSettings, FeatureSettings, LabelSettings, ValidationSettings
from tickserve.config.deployment import DeploySettings
from tickserve.config.drift import DriftSettings
from tickserve.config.export import (
    BatchingSettings,
    ExportSettings,
    RepositorySettings,
    RuntimeSettings,
    TensorrtSettings,
)
from tickserve.config.families import (
    DeepLobSettings,
    GbdtSettings,
    LstmSettings,
    MlpSettings,
    NetSettings,
    TcnSettings,
    TlobSettings,
    tcn_reach,
)
from tickserve.config.limits import LimitSettings
from tickserve.config.monitoring import MonitoringSettings
from tickserve.config.section import Section
from tickserve.config.serving import (
    BackendKind,
    ClientSettings,
    JournalSettings,
    LoadtestSettings,
    MetricsSettings,
    ServeSettings,
    SwapSettings,
)
from tickserve.config.training import CompressSettings, TrainerSettings, TuneSettings, UniverseSettings
from tickserve.manifest import Family

__all__ = [
    "BackendKind",
    "BatchingSettings",
    "ClientSettings",
    "CompressSettings",
    "Config",
    "CostSettings",
    "DeepLobSettings",
    "DeploySettings",
    "DriftSettings",
    "ExportSettings",
    "FeatureSettings",
    "GbdtSettings",
    "JournalSettings",
    "LabelSettings",
    "LimitSettings",
    "LoadtestSettings",
    "LstmSettings",
    "MetricsSettings",
    "MlpSettings",
    "MonitoringSettings",
    "NetSettings",
    "RepositorySettings",
    "RuntimeSettings",
    "Section",
    "ServeSettings",
    "SwapSettings",
    "TcnSettings",
    "TensorrtSettings",
    "TlobSettings",
    "TrainerSettings",
    "TuneSettings",
    "UniverseSettings",
    "ValidationSettings",
    "tcn_reach",
]


class Config(Section):
    """Everything that can be set."""

    profile: Literal["quick", "production"] = "quick"
    seed: int = Field(7, ge=0)
    features: FeatureSettings = FeatureSettings()
    labels: LabelSettings = LabelSettings()
    validation: ValidationSettings = ValidationSettings()
    costs: CostSettings = CostSettings()
    gbdt: GbdtSettings = GbdtSettings()
    lstm: LstmSettings = LstmSettings()
    compress: CompressSettings = CompressSettings()
    export: ExportSettings = ExportSettings()
    runtime: RuntimeSettings = RuntimeSettings()
    tensorrt: TensorrtSettings = TensorrtSettings()
    repository: RepositorySettings = RepositorySettings()
    serve: ServeSettings = ServeSettings()
    swap: SwapSettings = SwapSettings()
    client: ClientSettings = ClientSettings()
    batching: BatchingSettings = BatchingSettings()
    deploy: DeploySettings = DeploySettings()
    loadtest: LoadtestSettings = LoadtestSettings()
    journal: JournalSettings = JournalSettings()
    metrics: MetricsSettings = MetricsSettings()
    drift: DriftSettings = DriftSettings()
    tune: TuneSettings = TuneSettings()
    mlp: MlpSettings = MlpSettings()
    tcn: TcnSettings = TcnSettings()
    deeplob: DeepLobSettings = DeepLobSettings()
    tlob: TlobSettings = TlobSettings()
    trainer: TrainerSettings = TrainerSettings()
    universe: UniverseSettings = UniverseSettings()
    limits: LimitSettings = LimitSettings()
    monitoring: MonitoringSettings = MonitoringSettings()

    @property
    def families(self) -> tuple[str, ...]:
        """The families that are trained, in the order of `tickserve.manifest.Family`."""
        sections = ((name, getattr(self, name, None)) for name in get_args(Family))
        return tuple(name for name, section in sections if section is not None and section.enabled)

    @model_validator(mode="after")
    def _something_to_train(self) -> Config:
        if not self.families:
            names = ", ".join(f"{name}.enabled" for name in get_args(Family))
            raise ValueError(f"{names}: expected at least one true, was all false")
        return self
