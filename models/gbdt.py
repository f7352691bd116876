"""Gradient-boosted trees over single feature rows, with XGBoost's own file as the only format.

Chen and Guestrin, XGBoost: A Scalable Tree Boosting System, KDD 2016. Letters: B rows, F features.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from models.ordinal import OrdinalLink
from tickserve.errors import ArtifactError
from tickserve.manifest import CLASSES, Manifest

Rows = npt.NDArray[np.float32]


class GbdtClassifier:
    """`[B, F]` float32 rows to `[B, 3]` probabilities. A NaN follows each split's learned default direction.

    A booster of three classes gives them itself; with a `link` it gives one margin, which the link turns into them.
    """

    def __init__(self, booster: Any, features: int, threads: int = 1, link: OrdinalLink | None = None) -> None:
        self.booster, self.features, self.threads, self.link = booster, features, threads, link

    def predict(self, rows: Rows) -> Rows:
        """Probabilities float32 [B, 3] of `rows` [B, F]. Raises ArtifactError when F is not the booster's."""
        if self.link is not None:
            return self.link.probabilities(self._raw(rows, margin=True))
        return self._raw(rows).reshape(-1, len(CLASSES))

    def margin(self, rows: Rows) -> Rows:
        """What the trees add up to, float32 [B], before any link. Raises ArtifactError as `predict` does."""
        return self._raw(rows, margin=True)

    def _raw(self, rows: Rows, *, margin: bool = False) -> Rows:
        import xgboost

        if rows.ndim != 2 or rows.shape[1] != self.features:
            expected, was = f"[rows, {self.features}]", str(list(rows.shape))
            raise ArtifactError("wrong shape", field="features", expected=expected, was=was)
        matrix = xgboost.DMatrix(rows, missing=np.nan, nthread=self.threads)
        return np.asarray(self.booster.predict(matrix, output_margin=margin), dtype=np.float32)

    def save(self, path: Path) -> None:
        """Write the booster as `.ubj` (UBJSON)."""
        path.write_bytes(bytes(self.booster.save_raw(raw_format="ubj")))

    @classmethod
    def load(cls, path: Path, features: int, threads: int = 1, link: OrdinalLink | None = None) -> GbdtClassifier:
        """Read a `.ubj`. Raises ArtifactError when it is no booster or takes another number of features."""
        import xgboost

        booster = xgboost.Booster()
        try:
            with path.open("rb") as file:
                # XGBoost ends the whole process on an empty buffer; no UBJSON object starts otherwise than with this.
                if file.read(1) != b"{":
                    raise ArtifactError("not an XGBoost model", field=path.name)
            booster.load_model(path)
        except (xgboost.core.XGBoostError, OSError, ValueError) as error:
            raise ArtifactError("not an XGBoost model", field=path.name) from error
        booster.set_param({"nthread": threads})
        if booster.num_features() != features:
            was = str(booster.num_features())
            raise ArtifactError("wrong number of features", field=path.name, expected=str(features), was=was)
        return cls(booster, features, threads, link)

    @classmethod
    def from_bundle(cls, folder: Path, manifest: Manifest) -> GbdtClassifier:
        """The trees of a verified bundle, with its link where it has one."""
        (features,) = manifest.inputs[0].shape
        link = OrdinalLink.from_architecture(manifest.architecture)
        return cls.load(folder / manifest.model_file, features, link=link)
