"""A recipe: the steps that make a model smaller, one after the other, and the gates each of them has to pass.

    name = "fast"
    on_refusal = "stop"

    [[step]]
    kind = "distill"
    family = "mlp"
    settings = { hidden = 128, layers = 3, activation = "relu" }

    [[step]]
    kind = "quantize"
    method = "weights"

What a gate may be loosened to is bounded here: a recipe, like a model file, is data. A key that would do nothing where
it stands is refused.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, ValidationError, model_validator

from tickserve.config import Section
from tickserve.errors import ConfigError
from tickserve.manifest import MODEL_NAME_PATTERN, TREES, Family
from tickserve.settings import read_toml

MAX_STEPS = 16
LEARNING = ("epochs", "patience", "learning_rate", "batch_rows", "teacher_weight", "temperature")


class Gates(Section):
    """What a step has to show, beside passing on every fold; each bound is as loose as it may be made."""

    min_ic_share: float = Field(0.98, ge=0.9, le=2, description="of the teacher's information coefficient")
    max_ic_loss: float = Field(
        0.005, gt=0, le=0.01, description="the 95 % interval of the IC difference has to stay above minus this"
    )
    max_flips: float = Field(
        0.03, ge=0, le=0.05, description="share of rows that quantization or truncation may decide otherwise"
    )
    max_flips_tuned: float = Field(0.1, ge=0, le=0.2, description="the same for pruning, whose model learns again")
    max_latency_ratio: float = Field(1.15, gt=0, le=1.25, description="p50 and p99 of a lone row, over the parent's")
    max_size_ratio: float = Field(0.95, gt=0, le=1, description="bytes of the served graph, over the parent's")


class Goal(Section):
    """What the last step has to have reached, all steps together, against the teacher."""

    speedup: float = Field(1.0, ge=1, le=10_000, description="of p50 and of p99")
    shrink: float = Field(1.0, ge=1, le=10_000, description="of the bytes")


class Learning(Section):
    """How a student learns: from the teacher's probabilities, and from what came."""

    epochs: int = Field(8, ge=0, le=1_000)
    patience: int = Field(3, ge=1, description="epochs without a lower validation loss before it stops")
    learning_rate: float = Field(0.003, gt=0, le=1)
    batch_rows: int = Field(512, ge=1)
    teacher_weight: float = Field(0.9, ge=0, le=1, description="of the teacher's answers in the loss; rest: the truth")
    temperature: float = Field(1.0, ge=0.5, le=20, description="above 1 the teacher's answers are softened")

    @model_validator(mode="after")
    def _temperature_of_a_teacher(self) -> Learning:
        if self.teacher_weight == 0:
            _inert(self, ("temperature",), "teacher_weight 0")
        return self


class DistillStep(Learning):
    """A new net learns what the teacher answers."""

    kind: Literal["distill"]
    family: Family
    settings: dict[str, Any] = Field({}, description="sizes and choices of the family's section")

    @model_validator(mode="after")
    def _a_net_that_learns(self) -> DistillStep:
        if self.family in TREES:
            raise ValueError(f"family: expected a net, was {self.family}")
        if self.epochs == 0:
            raise ValueError("epochs: expected at least 1 of distill, was 0")
        return self


class PruneStep(Learning):
    """Whole hidden units or channels are taken out, in rounds, each followed by learning."""

    kind: Literal["prune"]
    epochs: int = Field(2, ge=0, le=1_000, description="after each round; 0: nothing is learned again")
    share: float = Field(gt=0, lt=1, description="of the units that the last round leaves taken out")
    rounds: int = Field(1, ge=1, le=100, description="1: at once")
    schedule: Literal["cubic", "linear"] = Field("cubic", description="of the rounds; cubic takes more out early")
    importance: Literal["magnitude", "taylor"] = Field("magnitude", description="which units go first")
    round_to: int = Field(8, ge=1, le=256, description="widths are multiples of this")

    @model_validator(mode="after")
    def _nothing_inert(self) -> PruneStep:
        if self.rounds == 1:
            _inert(self, ("schedule",), "rounds 1")
        if self.epochs == 0:
            _inert(self, LEARNING[1:], "epochs 0")
        return self


class TruncateStep(Section):
    """The first trees are kept, as many as the validation rows ask for."""

    kind: Literal["truncate"]
    rounds: int = Field(0, ge=0, description="boosting rounds that are kept; 0: chosen by max_loss")
    max_loss: float = Field(0.002, ge=0, le=0.1, description="validation loss may rise by this share of the full one's")
    refresh: bool = Field(True, description="leaves are fitted again to all training rows")

    @model_validator(mode="after")
    def _nothing_inert(self) -> TruncateStep:
        if self.rounds:
            _inert(self, ("max_loss",), f"rounds {self.rounds}")
        return self


class QuantizeStep(Learning):
    """Eight-bit integers, as QuantizeLinear and DequantizeLinear pairs that ONNX Runtime and TensorRT both read."""

    kind: Literal["quantize"]
    epochs: int = Field(1, ge=1, le=1_000, description="of method qat")
    learning_rate: float = Field(3e-4, gt=0, le=1, description="of method qat")
    method: Literal["weights", "static", "qat"] = Field(
        description="weights alone; weights and activations after training; the same with training"
    )
    calibration_rows: int = Field(1_024, ge=32, le=65_536, description="training inputs that the ranges are taken from")
    calibration: Literal["minmax", "percentile", "entropy"] = Field("minmax", description="of method static")
    weight_bits: Literal[7, 8] = Field(8, description="7: for x86 without VNNI, whose 8-bit sums saturate")

    @model_validator(mode="after")
    def _nothing_inert(self) -> QuantizeStep:
        because = f"method {self.method}"
        if self.method != "qat":
            _inert(self, LEARNING, because)
        if self.method != "static":
            _inert(self, ("calibration",), because)
        if self.method == "weights":
            _inert(self, ("calibration_rows",), because)
        if self.method != "static":
            _inert(self, ("weight_bits",), because)
        return self


Step = Annotated[DistillStep | PruneStep | TruncateStep | QuantizeStep, Field(discriminator="kind")]


class Recipe(Section):
    """The steps in order. `name` goes into the children's names."""

    name: str = Field(min_length=1, max_length=30)
    on_refusal: Literal["stop", "skip"] = Field("stop", description="skip: the next step starts from the same parent")
    max_rows: int = Field(0, ge=0, description="training rows of a fold that students learn from, evenly; 0: all")
    latency_calls: int = Field(4_000, ge=200, le=1_000_000, description="timed calls of a lone row of each model")
    gates: Gates = Gates()
    goal: Goal = Goal()
    step: list[Step] = Field(min_length=1, max_length=MAX_STEPS)

    @model_validator(mode="after")
    def _in_order(self) -> Recipe:
        if not MODEL_NAME_PATTERN.fullmatch(self.name) or ".." in self.name:
            raise ValueError(f"name: expected [a-z0-9._-] without '..', was {self.name!r}")
        for place, step in enumerate(self.step[:-1], start=1):
            if step.kind == "quantize":
                raise ValueError(f"step: expected quantize last, was step {place} of {len(self.step)}")
        for place, step in enumerate(self.step[1:], start=2):
            if step.kind == "truncate" and any(before.kind != "truncate" for before in self.step[: place - 1]):
                raise ValueError(f"step: expected truncate before any net, was step {place}")
        return self


def read_recipe(path: Path) -> Recipe:
    """The recipe of a TOML file. Raises ConfigError naming the key that is unknown, inert or out of range."""
    tree = read_toml(path)
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        problems = error.errors()
        # A misspelt key is also a missing one: the word that was written is what helps.
        told = next((each for each in problems if each["type"] == "extra_forbidden"), problems[0])
        raise _refusal(path.name, told) from error


def families_of(recipe: Recipe, family: str) -> list[str]:
    """The family that each step starts from, for a teacher of `family`. Raises ConfigError for a step it is not for."""
    found = []
    for place, step in enumerate(recipe.step, start=1):
        found.append(family)
        _check_kind(step, family, place)
        family = step.family if isinstance(step, DistillStep) else family
    return found


def _check_kind(step: Step, family: str, place: int) -> None:
    expected = {
        "prune": ("mlp", "tcn", "lstm"),
        "truncate": tuple(sorted(TREES)),
        "quantize": tuple(name for name in get_args(Family) if name not in TREES),
    }.get(step.kind)
    field = f"step {place} ({step.kind})"
    if expected is not None and family not in expected:
        hint = "the sizes of its layers are tied to each other" if step.kind == "prune" else "distill first"
        raise ConfigError("not for this family", field=field, expected=" or ".join(expected), was=family, hint=hint)
    if isinstance(step, QuantizeStep) and step.method != "weights" and family in ("lstm", "deeplob"):
        hint = "its dynamic kernel lets a row's number depend on its batch"
        raise ConfigError(
            "ONNX Runtime has no static INT8 LSTM", field=field, expected="method weights", was=step.method, hint=hint
        )


def _inert(section: Section, names: Iterable[str], because: str) -> None:
    for name in names:
        if name in section.model_fields_set:
            raise ValueError(f"{name}: expected to be left out, since it has no effect with {because}, was given")


def _refusal(origin: str, problem: Any) -> ConfigError:
    """Pydantic's finding in this project's words."""
    places = _places(problem["loc"])
    key = ".".join(places) or origin
    message = str(problem["msg"]).removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        near = difflib.get_close_matches(places[-1], _known(), n=1, cutoff=0.6)
        hint = f"nearest: {near[0]}" if near else "see docs/compression.md"
        return ConfigError(f"unknown key in {origin}", field=key[:100], hint=hint)
    if problem["type"] == "missing":
        return ConfigError(f"missing in {origin}", field=key[:100], hint="see docs/compression.md")
    field, separator, rest = message.partition(": expected ")
    if separator:
        return ConfigError(f"expected {rest} (from {origin})", field=f"{key}.{field}" if places else field)
    expected = message.removeprefix("Input should be ")
    if expected == message:
        return ConfigError(f"{message} (from {origin})", field=key)
    return ConfigError(f"wrong value from {origin}", field=key, expected=expected, was=repr(problem["input"])[:80])


def _places(loc: Sequence[str | int]) -> list[str]:
    """Where a problem is: `step 1`, counted as a person counts, and the key."""
    if len(loc) < 2 or loc[0] != "step" or not isinstance(loc[1], int):
        return [str(part) for part in loc]
    kinds = {"distill", "prune", "truncate", "quantize"}
    return [f"step {loc[1] + 1}", *(str(part) for part in loc[2:] if part not in kinds)]


def _known() -> list[str]:
    sections = (Recipe, Gates, Goal, DistillStep, PruneStep, TruncateStep, QuantizeStep)
    return sorted({name for section in sections for name in section.model_fields})


SHIPPED = Path(__file__).parent / "recipes"


def find_recipe(wanted: str) -> Recipe:
    """The shipped recipe of that name, or the one in a file. Raises ConfigError."""
    shipped = {path.stem: path for path in sorted(SHIPPED.glob("*.toml"))}
    if wanted in shipped:
        return read_recipe(shipped[wanted])
    path = Path(wanted)
    if not path.is_file():
        expected = f"a TOML file, or one of {', '.join(shipped)}"
        raise ConfigError("no such recipe", field="--recipe", expected=expected, was=wanted[:100])
    return read_recipe(path)
