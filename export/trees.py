"""XGBoost boosters as export needs them: what converts faithfully, and their trees. Letters: B rows, F features."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from export.check_model import check_not_foreign
from tickserve.errors import ArtifactError, MissingExtraError

OBJECTIVE = "multi:softprob"
CLASSES = 3


def load_booster(path: Path) -> Any:
    """An XGBoost booster from a `.ubj` file. Raises UnsafeModelError for a pickle, ArtifactError for anything else."""
    import xgboost

    with path.open("rb") as file:
        head = file.read(64)
    check_not_foreign(head, "an XGBoost model in UBJSON")
    if not head.startswith(b"{"):
        raise ArtifactError("not an XGBoost model in UBJSON", field=path.name)
    booster = xgboost.Booster(params={"nthread": 1})
    try:
        booster.load_model(path)
    except (xgboost.core.XGBoostError, UnicodeDecodeError) as error:  # its message may quote the bytes it cannot read
        raise ArtifactError("not an XGBoost model in UBJSON", field=path.name) from error
    return booster


def prepare_booster(booster: Any, features: int) -> Any:
    """A copy with the trees early stopping kept and without column names, which the converter would misread.

    Raises ArtifactError for what does not convert faithfully: DART, categorical splits, another objective.
    """
    _check_convertible(booster, features)
    best = booster.attr("best_iteration")
    rounds = booster.num_boosted_rounds()
    # A native booster with early stopping still holds the later trees, and the converter would take them all.
    kept = booster[: int(best) + 1] if best is not None and int(best) + 1 < rounds else booster.copy()
    kept.feature_names = None
    return kept


def _check_convertible(booster: Any, features: int) -> None:
    learner = json.loads(booster.save_config())["learner"]
    found = {
        "booster": learner["gradient_booster"]["name"],
        "objective": learner["objective"]["name"],
        "num_class": int(learner["learner_model_param"]["num_class"]),
        "features": int(booster.num_features()),
    }
    wanted = {"booster": "gbtree", "objective": OBJECTIVE, "num_class": CLASSES, "features": features}
    for field, value in wanted.items():
        if found[field] != value:
            raise ArtifactError(
                "these trees cannot be exported", field=field, expected=str(value), was=str(found[field])
            )
    if "c" in (booster.feature_types or ()):
        raise ArtifactError("categorical splits cannot be exported", field="feature_types", expected="numbers")


def trees_of(booster: Any) -> list[dict[str, Any]]:
    """The trees as XGBoost writes them in JSON."""
    model = json.loads(bytes(booster.save_raw("json")))
    trees: list[dict[str, Any]] = model["learner"]["gradient_booster"]["model"]["trees"]
    return trees


def treelite_predictor(booster: Any) -> Callable[[npt.NDArray[np.float32]], npt.NDArray[np.float32]]:
    """Another engine for the same trees: treelite's reference interpreter, probabilities [B, 3] of rows [B, F].

    Raises MissingExtraError, and ArtifactError when treelite does not read these trees.
    """
    try:
        import treelite
        from treelite import gtil
    except ImportError as error:
        raise MissingExtraError.of("treelite", "export") from error
    try:
        model = treelite.frontend.from_xgboost(booster)
    except treelite.TreeliteError as error:
        raise ArtifactError("treelite does not read these trees", field="model") from error

    def predict(rows: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        return np.asarray(gtil.predict(model, rows, nthread=1), np.float32).reshape(-1, CLASSES)

    return predict
