"""What a model's manifest says about the stream that feeds it: feature spec, pace, sessions, window, state."""

from __future__ import annotations

import re
from dataclasses import dataclass

from tickserve.errors import ArtifactError, UsageError
from tickserve.features.spec import FeatureSpec, default_spec
from tickserve.manifest import Manifest, StateTensor

# The jump that cuts bar sessions, for manifests written before it was in them.
EARLIER_JUMP_FACTOR = 1.5
FADED_AFTER = 5  # exp(-5) < 0.01
NS_PER_S = 1_000_000_000


@dataclass(frozen=True)
class Definition:
    """How events become a model's inputs.

    A row is every `stride`-th event past warm-up; `window` rows make an input (None: one row does); `state` is what the
    model hands on. `jump_factor` None: no price step ends a session.
    """

    spec: FeatureSpec
    stride: int
    jump_factor: float | None
    input: str
    window: int | None
    state: tuple[StateTensor, ...]


def define(manifest: Manifest, spec: FeatureSpec | None = None, stride: int | None = None) -> Definition:
    """The definition in `manifest`; `spec` and `stride` are for manifests that do not hold them.

    A model that takes one row at a time without state may also be fed at another `stride`. Raises ArtifactError when
    the spec is not the one the model was trained on, UsageError where something is missing or contradicts.
    """
    spec = spec or _spec_of(manifest)
    if spec.digest != manifest.features.digest:
        raise ArtifactError(
            "the features are not the model's",
            field="feature digest",
            expected=manifest.features.digest,
            was=spec.digest,
            hint="this build computes other features than the one that trained the model",
        )
    tensor = manifest.inputs[0]
    window = tensor.shape[0] if len(tensor.shape) == 2 else None
    state = manifest.state.tensors if manifest.state else ()
    jump = EARLIER_JUMP_FACTOR if spec.kind == "bars" else None
    return Definition(
        spec=spec,
        stride=_stride_of(manifest, stride, paced=window is not None or bool(state)),
        jump_factor=manifest.stream.jump_factor if manifest.stream else jump,
        input=tensor.name,
        window=window,
        state=state,
    )


def history_ns(spec: FeatureSpec) -> int:
    """The time after which the start of a session no longer shows in the features.

    The longest horizon, and for what decays as many time constants as leave less than one part in a hundred.
    """
    reach = {"horizon_s": 1, "tau_s": FADED_AFTER}
    spans = [reach[name] * value for each in spec.features for name, value in each.params if name in reach]
    return int(max(spans, default=0) * NS_PER_S)


def _spec_of(manifest: Manifest) -> FeatureSpec:
    if manifest.stream is not None:
        return FeatureSpec.from_json(manifest.stream.spec)
    name = manifest.features.spec
    levels = re.fullmatch(r"book-l([1-9][0-9]?)", name)
    if levels or name == "bars":
        known = default_spec("book" if levels else "bars", int(levels[1]) if levels else 0)
        if known.digest == manifest.features.digest:
            return known
    raise UsageError(
        "the manifest does not hold the feature spec", field="spec", hint="give the FeatureSpec it was trained with"
    )


def _stride_of(manifest: Manifest, asked: int | None, *, paced: bool) -> int:
    trained = manifest.stream.stride if manifest.stream else manifest.architecture.get("stride")
    if asked is not None and (not isinstance(asked, int) or isinstance(asked, bool) or asked < 1):
        raise UsageError("not a number of events", field="stride", expected="1 or more", was=repr(asked)[:40])
    if asked is None:
        return int(trained) if trained else 1
    if paced and trained is not None and asked != trained:
        raise UsageError("the model was trained at another pace", field="stride", expected=str(trained), was=str(asked))
    return asked
