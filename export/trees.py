"""XGBoost boosters as export needs them: what converts faithfully, and their trees. Letters: B rows, F features."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from export import sandbox
from export.check_model import check_not_foreign
from models.ordinal import OrdinalLink
from tickserve.errors import ArtifactError, MissingExtraError, UnsafeModelError

OBJECTIVE = "multi:softprob"
# Of one margin per row, which a link turns into probabilities: what XGBoost makes of it afterwards is the identity.
MARGIN_OBJECTIVES = ("reg:squarederror", "reg:pseudohubererror", "rank:ndcg", "rank:pairwise")
CLASSES = 3
MAX_FEATURES = 1_000_000
Rows = npt.NDArray[np.float32]
Predict = Callable[[Rows], Rows]


def load_booster(path: Path) -> Any:
    """An XGBoost booster from a `.ubj` file, judged by a limited process first: XGBoost itself dies of some files.

    Raises UnsafeModelError for a pickle, for a forest that `check_forest` refuses and for what its check dies of, and
    ArtifactError for what is no forest.
    """
    data = path.read_bytes()
    check_not_foreign(data[:64], "an XGBoost model in UBJSON")
    if not data.startswith(b"{"):
        raise ArtifactError("not an XGBoost model in UBJSON", field=path.name)
    sandbox.inspect(data, sandbox.FOREST)
    return read_booster(data)


def read_booster(data: bytes) -> Any:
    """`load_booster` without the limited process: what runs inside it. Raises ArtifactError."""
    import xgboost

    booster = xgboost.Booster(params={"nthread": 1})
    try:
        booster.load_model(bytearray(data))
    except (xgboost.core.XGBoostError, UnicodeDecodeError) as error:  # its message may quote the bytes it cannot read
        raise ArtifactError("not an XGBoost model in UBJSON", field="model.ubj") from error
    return booster


def check_forest(booster: Any) -> None:
    """Raise UnsafeModelError unless every tree is one, over features there are, with finite thresholds and leaves."""
    features = int(booster.num_features())
    if not 1 <= features <= MAX_FEATURES:
        expected = f"1 to {MAX_FEATURES}"
        raise UnsafeModelError("not a forest", field="num_feature", expected=expected, was=str(features))
    for number, tree in enumerate(trees_of(booster)):
        _check_tree(tree, features, f"tree {number}")


def _check_tree(tree: dict[str, Any], features: int, field: str) -> None:
    left, right = np.array(tree["left_children"], np.int64), np.array(tree["right_children"], np.int64)
    inner = left != -1
    if not len(left) or not np.array_equal(inner, right != -1):
        raise UnsafeModelError("a node with one child", field=field)
    # Every node but the root is the child of one node, and of one that comes before it: no loop, none left over.
    children, parents = np.concatenate([left[inner], right[inner]]), np.tile(np.flatnonzero(inner), 2)
    if not np.array_equal(np.sort(children), np.arange(1, len(left))) or (children <= parents).any():
        raise UnsafeModelError("its nodes are no tree", field=field)
    split = np.array(tree["split_indices"], np.int64)[inner]
    if ((split < 0) | (split >= features)).any():
        raise UnsafeModelError("a split on a feature there is none of", field=field, expected=f"below {features}")
    if not np.isfinite(np.array(tree["split_conditions"], np.float64)).all():
        raise UnsafeModelError("NaN or infinite thresholds or leaves", field=field)


def prepare_booster(booster: Any, features: int, *, margin: bool = False) -> Any:
    """A copy with the trees early stopping kept and without column names, which the converter would misread.

    With `margin` a booster of one margin is expected, else one of three classes. Raises ArtifactError for what does not
    convert faithfully: DART, categorical splits, several targets, another objective.
    """
    _check_convertible(booster, features, margin)
    best = booster.attr("best_iteration")
    rounds = booster.num_boosted_rounds()
    # A native booster with early stopping still holds the later trees, and the converter would take them all.
    kept = booster[: int(best) + 1] if best is not None and int(best) + 1 < rounds else booster.copy()
    kept.feature_names = None
    return kept


def _check_convertible(booster: Any, features: int, margin: bool) -> None:
    learner = json.loads(booster.save_config())["learner"]
    sizes = learner["learner_model_param"]
    found = {
        "booster": learner["gradient_booster"]["name"],
        "objective": learner["objective"]["name"],
        "num_class": int(sizes["num_class"]),
        "num_target": int(sizes["num_target"]),
        "features": int(booster.num_features()),
    }
    wanted = {
        "booster": ("gbtree",),
        "objective": MARGIN_OBJECTIVES if margin else (OBJECTIVE,),
        "num_class": (0,) if margin else (CLASSES,),
        "num_target": (1,),
        "features": (features,),
    }
    for field, values in wanted.items():
        if found[field] not in values:
            expected = " or ".join(map(str, values))
            raise ArtifactError("these trees cannot be exported", field=field, expected=expected, was=str(found[field]))
    if "c" in (booster.feature_types or ()):
        raise ArtifactError("categorical splits cannot be exported", field="feature_types", expected="numbers")


def as_regression(booster: Any) -> Any:
    """A booster of one margin under the objective that the converter takes for what it is; its trees are the same.

    The converter makes a binary classifier of a ranking, and knows no pseudo-Huber loss.
    """
    model = json.loads(bytes(booster.save_raw("json")))
    model["learner"]["objective"] = {"name": "reg:squarederror", "reg_loss_param": {"scale_pos_weight": "1"}}
    return read_booster(json.dumps(model).encode())


def trees_of(booster: Any) -> list[dict[str, Any]]:
    """The trees as XGBoost writes them in JSON."""
    model = json.loads(bytes(booster.save_raw("json")))
    trees: list[dict[str, Any]] = model["learner"]["gradient_booster"]["model"]["trees"]
    return trees


def treelite_predictor(booster: Any, link: OrdinalLink | None = None) -> Predict:
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

    def predict(rows: Rows) -> Rows:
        said = gtil.predict(model, rows, nthread=1, pred_margin=link is not None)
        return _probabilities(said, link)

    return predict


def inplace_predictor(booster: Any, link: OrdinalLink | None = None) -> Predict:
    """XGBoost without building its matrix, in one thread: probabilities [B, 3] of rows [B, F]."""
    alone = booster.copy()
    alone.set_param({"nthread": 1})
    kind = "value" if link is None else "margin"

    def predict(rows: Rows) -> Rows:
        return _probabilities(alone.inplace_predict(rows, missing=np.nan, predict_type=kind), link)

    return predict


def matrix_predictor(booster: Any, link: OrdinalLink | None = None) -> Predict:
    """XGBoost as research calls it: probabilities [B, 3] of rows [B, F]."""
    import xgboost

    def predict(rows: Rows) -> Rows:
        matrix = xgboost.DMatrix(rows, missing=np.nan, nthread=1)
        return _probabilities(booster.predict(matrix, output_margin=link is not None), link)

    return predict


def _probabilities(said: Any, link: OrdinalLink | None) -> Rows:
    """What an engine says: probabilities of three classes, or a margin for the link."""
    numbers = np.asarray(said, np.float32)
    return numbers.reshape(-1, CLASSES) if link is None else link.probabilities(numbers.reshape(-1))
