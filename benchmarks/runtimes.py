"""What can run each published model here: every candidate, judged and timed in turns.

    python -m benchmarks.runtimes --repository model_repository [--bundles runs/<id>/bundles] [--effort full]

With `--bundles` (the bundles the models were exported from) trees meet treelite and XGBoost too. Ratios are to the
default, ONNX Runtime on the CPU with one thread, measured in the same run.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from benchmarks.harness import PUBLISH_FIRST, as_command
from export.runtimes.published import measure
from export.runtimes.survey import batches_of
from tickserve.client import newest_versions
from tickserve.config import ExportSettings
from tickserve.runtimes import RuntimeRecord
from tickserve.settings import load_settings


def show(model: str, record: RuntimeRecord, settings: ExportSettings) -> None:
    sizes = batches_of(settings)
    base = record.candidates[0]
    print(f"\n{model}: {record.chosen}: {record.reason}")
    print(f"{'p50 in microseconds, and x the first':<46}" + "".join(f"{size:>18}" for size in sizes))
    for each in record.candidates:
        if not each.timings:
            print(f"{each.name:<46}  {each.reason}")
            continue
        cells = []
        for size in sizes:
            taken, reference = each.p50_us(size), base.p50_us(size)
            cells.append(f"{taken:>10.1f} {taken / reference:>5.2f}x" if taken and reference else "-")
        print(f"{each.name:<46}" + "".join(f"{cell:>18}" for cell in cells))


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repository", type=Path, default=Path("model_repository"), help="published models")
    parser.add_argument("--bundles", type=Path, help="folder of their bundles")
    parser.add_argument("--model", help="default: every model of the repository")
    parser.add_argument("--effort", choices=("quick", "full"), default="full")
    parser.add_argument("--json", action="store_true")
    chosen = parser.parse_args(arguments)
    settings = load_settings().config.export
    folders = newest_versions(chosen.repository)
    records = {}
    for model in [chosen.model] if chosen.model else folders:
        bundle = chosen.bundles / model if chosen.bundles else None
        others = {name: folder for name, folder in folders.items() if name != model}
        records[model] = measure(folders[model], others, settings, chosen.effort, bundle=bundle)
    if chosen.json:
        print(json.dumps({model: record.model_dump(mode="json") for model, record in records.items()}))
        return 0
    print(next(iter(records.values())).machine)
    for model, record in records.items():
        show(model, record, settings)
    return 0


if __name__ == "__main__":
    as_command(main, PUBLISH_FIRST)
