"""`tickserve monitor clear`: a person lifts the drift action of a model that nothing else will lift."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tickserve.cli import options
from tickserve.cli.output import emit, out
from tickserve.errors import UsageError
from tickserve.risk import clear_action

Model = Annotated[str, typer.Argument(help="Whose action is lifted.")]
ActionFile = Annotated[Path, typer.Option("--action-file", help="That the exporter writes and clients obey.")]


def clear(model: Model, action_file: ActionFile, as_json: options.AsJson = False) -> None:
    """Lift a model's drift action. Clients obey at once; an exporter measures the model anew, from now on."""
    try:
        before = clear_action(action_file, model)
    except OSError as error:
        raise UsageError(f"cannot read it: {error.strerror}", field="--action-file") from None

    def show() -> None:
        out.print(f"{model}: {before.action} -> none", markup=False)
        out.print(f"it was: {before.reason or 'no reason'}", markup=False)

    emit({"model": model, "before": before.model_dump()}, as_json, show)
