"""How a model's features lay in training, and its scores on rows it never saw: what drift is measured against."""

from __future__ import annotations

from tickserve.reference import Distribution, Reference, reference_of
from training.bundles import scores
from training.examples import Examples, Rows, evenly
from training.job import Fit, Job

# Evenly spaced, so that every stretch of the training is in it; more would move no decile that anyone acts on.
FEATURE_ROWS, SCORED_ROWS = 50_000, 10_000


def training_reference(job: Job, fit: Fit, examples: Examples) -> Reference:
    """Deciles of the features over the published fold's training rows, and of the score over its test rows."""
    rows = examples.published.rows
    asked = evenly(job.eligible(rows.test), SCORED_ROWS)
    return reference_of(examples.features[evenly(rows.train, FEATURE_ROWS)], scores(job.predict(fit, asked))[:, 0])


def rescored(parent: Reference | None, probabilities: Rows) -> dict[str, Reference]:
    """The manifest's field for a child: its parent's features, and its own scores of out-of-sample rows [n, 3]."""
    if parent is None:
        return {}
    own = Distribution.of(scores(probabilities)[:, 0])
    return {"reference": parent.model_copy(update={"score": own, "score_rows": len(probabilities)})}
