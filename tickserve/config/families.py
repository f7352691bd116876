"""The families of models: one section each."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from tickserve.config.section import Section


class GbdtSettings(Section):
    """Gradient-boosted trees (XGBoost)."""

    enabled: bool = True
    rounds: int = Field(50, ge=1)
    early_stopping_rounds: int = Field(5, ge=1)
    max_depth: int = Field(4, ge=1, le=12)
    learning_rate: float = Field(0.1, gt=0, le=1)
    subsample: float = Field(0.8, gt=0, le=1)
    max_bin: int = Field(128, ge=2, le=1024)
    threads: int = Field(2, ge=1)
    task: Literal["classification", "regression", "ranking"] = Field(
        "classification", description="what the trees learn; the served tensors are the same (docs/trees.md)"
    )
    regression_loss: Literal["squared", "pseudo_huber"] = Field("squared", description="of task regression")
    ranking_loss: Literal["ndcg", "pairwise"] = Field("ndcg", description="of task ranking")
    ranking_block_rows: int = Field(64, ge=2, description="of task ranking: neighbouring rows ranked among each other")
    ranking_grades: int = Field(5, ge=2, le=31, description="of task ranking: grades of the return, by its quantiles")
    sampling_method: Literal["uniform", "gradient_based"] = Field("uniform", description="how subsample draws rows")
    top_features: int = Field(0, ge=0, description="columns a fold's model sees, those of highest gain; 0: all")
    monotone: dict[str, Literal[-1, 1]] = Field(
        {}, description="columns the score may only rise with (1) or fall with (-1); not of task classification"
    )
    external_memory: bool = Field(False, description="hold the binned rows in files instead of memory")
    external_memory_chunk_rows: int = Field(65_536, ge=1_024, description="rows of one such file page")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: a GPU where XGBoost can use one")
    memory_pool: Literal["none", "cuda_async", "rmm"] = Field("none", description="of device cuda")

    @model_validator(mode="after")
    def _nothing_inert(self) -> GbdtSettings:
        """Refuse what would have no effect: each key in the first column works only under what follows it."""
        classification = self.task == "classification"
        inert: tuple[tuple[str, object, bool, str], ...] = (
            ("regression_loss", "squared", self.task != "regression", f"task {self.task}"),
            ("ranking_loss", "ndcg", self.task != "ranking", f"task {self.task}"),
            ("ranking_block_rows", 64, self.task != "ranking", f"task {self.task}"),
            ("ranking_grades", 5, self.task != "ranking", f"task {self.task}"),
            ("sampling_method", "uniform", self.subsample == 1, "subsample 1, which takes every row"),
            ("monotone", {}, classification, "task classification, whose score is a difference of two classes"),
            ("external_memory_chunk_rows", 65_536, not self.external_memory, "external_memory off"),
            ("memory_pool", "none", self.device == "cpu", "device cpu"),
        )
        for name, default, off, why in inert:
            if off and getattr(self, name) != default:
                raise ValueError(f"{name}: expected {default} with {why}, was {getattr(self, name)}")
        return self


class NetSettings(Section):
    """How a net of any family is trained."""

    enabled: bool = False
    epochs: int = Field(4, ge=1)
    patience: int = Field(2, ge=1)
    batch_rows: int = Field(512, ge=1)
    learning_rate: float = Field(0.003, gt=0)
    max_train_windows: int = Field(20_000, ge=0, description="rows or windows per fit, evenly spaced; 0 takes all")
    threads: int = Field(1, ge=1, description="small nets gain little from more, and lose much on a busy machine")


class MlpSettings(NetSettings):
    """A feed-forward net on one feature row."""

    hidden: int = Field(64, ge=1, le=4_096, description="units of a layer")
    layers: int = Field(2, ge=1, le=16)
    activation: Literal["gelu", "relu"] = "gelu"
    norm: Literal["none", "layer"] = Field("none", description="layer: layer normalisation before the activation")


class LstmSettings(NetSettings):
    """A recurrent net on windows of feature rows."""

    enabled: bool = True
    window: int = Field(20, ge=2, le=1_000, description="rows the net looks back over")
    hidden: int = Field(32, ge=1, le=2_048)
    layers: int = Field(1, ge=1, le=8)
    stepped: bool = Field(True, description="also a child that takes one row and its state instead of a window")


def tcn_reach(kernel: int, layers: int) -> int:
    """Steps that the answer of a TCN looks back over: two convolutions a block, dilated by 1, 2, 4, and so on."""
    return 1 + 2 * (kernel - 1) * ((1 << layers) - 1)


class TcnSettings(NetSettings):
    """A net of dilated causal convolutions on windows of feature rows."""

    window: int = Field(24, ge=2, le=1_000, description="rows the net looks back over")
    channels: int = Field(32, ge=1, le=1_024)
    kernel: int = Field(3, ge=2, le=16, description="steps that one convolution spans")
    layers: int = Field(3, ge=1, le=10, description="residual blocks; each looks back twice as far as the one before")

    @model_validator(mode="after")
    def _window_is_read(self) -> TcnSettings:
        reach = tcn_reach(self.kernel, self.layers)
        if self.window > reach:
            raise ValueError(
                f"window: expected at most the {reach} rows that kernel {self.kernel} and {self.layers} layers "
                f"reach back, was {self.window}"
            )
        return self


class DeepLobSettings(NetSettings):
    """Convolutions over book levels and time, then an LSTM, on windows of order-book rows."""

    window: int = Field(24, ge=2, le=1_000, description="rows the net looks back over")
    channels: int = Field(16, ge=1, le=256, description="of the convolutions")
    hidden: int = Field(32, ge=1, le=2_048, description="of the LSTM")


class TlobSettings(NetSettings):
    """Attention over time and over features by turns, on windows of order-book rows."""

    window: int = Field(24, ge=2, le=1_000, description="rows the net looks back over")
    hidden: int = Field(32, ge=1, le=1_024)
    heads: int = Field(2, ge=1, le=64, description="of the attention over time; a divisor of hidden")
    layers: int = Field(2, ge=1, le=16)

    @model_validator(mode="after")
    def _heads_divide(self) -> TlobSettings:
        if self.hidden % self.heads:
            raise ValueError(f"heads: expected a divisor of hidden ({self.hidden}), was {self.heads}")
        return self
