"""`tickserve deploy`: chart values computed from what was measured, checked, compared; calendars and freezes."""

from __future__ import annotations

import textwrap
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from tickserve import stages
from tickserve.cli import options
from tickserve.cli.deploy_figures import Asked, MemoryFrom, gather
from tickserve.cli.output import emit, out, says, table
from tickserve.config import Config
from tickserve.errors import GateRefusedError, UsageError

app = typer.Typer(
    help="Chart values from measurements, validated and compared; calendars, freezes, overlays.", no_args_is_help=True
)

Files = Annotated[list[Path], typer.Argument(help="Values files, as helm takes them: later ones win.")]
ChartFolder = Annotated[Path | None, typer.Option("--chart", help="The chart's folder; else that of this checkout.")]
Helm = Annotated[Path | None, typer.Option("--helm", help="The helm to use; else the one on PATH.")]
Tables = Annotated[Path, typer.Option("--tables", help="Folder of what `batching derive` left.")]
CalendarFile = Annotated[Path, typer.Option("--calendar", "--file", help="A calendar file (docs/calendar.md).")]
Days = Annotated[int | None, typer.Option("--days", min=1, max=366, help="Days from now; else deploy.calendar_days.")]
DEFAULT_TABLES = Path("runs/batching")


@app.command("render")
def render(
    model: Annotated[list[str], typer.Option("--model", help="A published model; may be repeated.")],
    repository: options.Repository = options.DEFAULT_REPOSITORY,
    rate: Annotated[
        list[str] | None, typer.Option("--rate", help="Peak requests a second, RATE or MODEL=RATE; may be repeated.")
    ] = None,
    rows_per_request: Annotated[float, typer.Option("--rows-per-request", min=1, help="Goes with --rate.")] = 1.0,
    arrivals: Annotated[
        Path | None,
        typer.Option("--arrivals", "--journal", help="A journal folder, or a file of nanoseconds, one per line."),
    ] = None,
    deadline_ms: Annotated[
        float | None, typer.Option("--deadline-ms", min=0.001, help="The engine's deadline.")
    ] = None,
    objective: Annotated[
        float | None, typer.Option("--objective", min=0.5, max=0.999999, help="Share of calls inside the deadline.")
    ] = None,
    calendar: Annotated[Path | None, typer.Option("--calendar", help="A calendar file (docs/calendar.md).")] = None,
    image: Annotated[str | None, typer.Option("--image", help="registry/repository:tag@sha256:...")] = None,
    gpu: Annotated[bool, typer.Option("--gpu", help="Serve on a GPU.")] = False,
    prometheus: Annotated[str | None, typer.Option("--prometheus", help="Prometheus' address, for KEDA.")] = None,
    max_replicas: Annotated[int | None, typer.Option("--max-replicas", min=1, help="Else deploy.growth says.")] = None,
    memory: Annotated[
        MemoryFrom, typer.Option("--memory", help="measure: on the embedded server; manifest; chart: its default.")
    ] = MemoryFrom.MEASURE,
    out_file: Annotated[Path, typer.Option("--out", help="The values file.")] = Path("values.yaml"),
    tables: Tables = DEFAULT_TABLES,
    days: Days = None,
    profile: options.Profile = None,
    config: options.ConfigFile = None,
    as_json: options.AsJson = False,
) -> None:
    """Compute chart values for these models, each with its reason and its source above it."""
    settings = options.settings_of(config, profile).config
    stages.load_core("tickserve.store").check_writable(out_file.absolute().parent)
    sizing, written = stages.load("export.deployment.sizing"), stages.load("export.deployment.values_file")
    if image is not None:
        sizing.parse_image(image)
    schedule = None if calendar is None else _schedule(calendar, days or settings.deploy.calendar_days)
    names = list(dict.fromkeys(model))
    # Neither memory nor times of a CPU say anything of a GPU.
    memory = MemoryFrom.CHART if gpu else memory
    asked = Asked(names, repository, tables, memory, rate or [], rows_per_request, arrivals, deadline_ms)
    figures, taken = gather(asked, settings)
    wanted = sizing.Wanted(image, gpu, objective, prometheus, max_replicas)
    values = sizing.values(figures, taken, settings.deploy, wanted, schedule)
    queues = stages.load("export.deployment.queue_bound").queue_bounds(figures, gpu=gpu)
    rows = [value.to_json() for value in values]
    record: dict[str, Any] = {
        "values": rows,
        "models": [each.to_json() for each in figures],
        "memory": None if taken is None else {"bytes": taken.bytes, "source": taken.source},
        "queues": [each.to_json() for each in queues],
    }
    head = [
        f"Values for {', '.join(names)}, computed by `tickserve deploy render` from what was measured.",
        f"Every figure: {written.record_path(out_file).name}. Next: tickserve deploy validate {out_file.name}",
        *(line for each in queues for line in ["", *textwrap.wrap(each.line, 110, break_on_hyphens=False)]),
    ]
    written.write(out_file, written.to_yaml(values, head), record)
    emit(record | {"out": str(out_file)}, as_json, lambda: _show_values(rows))
    _say_values(rows, schedule)
    for each in queues:
        says(each.line)
    says(
        f"{out_file}, {written.record_path(out_file)}; next: name who may score and scrape (networkPolicy, "
        f"docs/deploy-values.md), then tickserve deploy validate {out_file} access.yaml"
    )


def _show_values(values: list[dict[str, Any]]) -> None:
    for value in values:
        shown = "left" if value["left_to_chart"] else value["value"]
        if isinstance(shown, list) and len(shown) > 3:
            shown = f"{len(shown)} items"
        out.print(f"{value['path']} = {shown}", markup=False)
        out.print(f"    {value['reason']}" + (f" [{value['source']}]" if value["source"] else ""), markup=False)


def _say_values(values: list[dict[str, Any]], schedule: Any) -> None:
    for note in schedule.notes if schedule is not None else ():
        says(f"note: {note}")
    if any(value["path"] in ("image", "image.digest") and value["left_to_chart"] for value in values):
        says("warning: no image digest; a tag can be moved")


@app.command("validate")
def validate(
    values: Files,
    chart: ChartFolder = None,
    helm: Helm = None,
    repository: options.Repository = options.DEFAULT_REPOSITORY,
    tables: Tables = DEFAULT_TABLES,
    kube_version: Annotated[
        list[str] | None, typer.Option("--kube-version", help="Kubernetes versions; else the oldest and the newest.")
    ] = None,
    profile: options.Profile = None,
    config: options.ConfigFile = None,
    as_json: options.AsJson = False,
) -> None:
    """Hold values against the chart, its schema, Kubernetes' schemas, the manifests and what was measured; exit 1."""
    settings = options.settings_of(config, profile).config
    check = stages.load("export.deployment.check")
    result = check.validate(_chart(chart, helm), values, repository, tables, settings, kube_version or ())
    emit(result.to_json(), as_json, lambda: _show_findings(result))
    if result.refused:
        raise GateRefusedError(
            f"{len(result.refused)} refused: " + ", ".join(dict.fromkeys(each.field for each in result.refused)),
            field="values",
        )


def _show_findings(result: Any) -> None:
    for finding in result.findings:
        out.print(f"{finding.level}: {finding.field}: {finding.reason}", markup=False)
    for version, count in result.objects.items():
        out.print(f"Kubernetes {version}: {count} objects looked at", markup=False)


@app.command("diff")
def diff(
    values: Files,
    against: Annotated[
        list[Path] | None, typer.Option("--against", help="The values file that is there now; may be repeated.")
    ] = None,
    live: Annotated[bool, typer.Option("--live", help="Compare with the cluster, by kubectl.")] = False,
    chart: ChartFolder = None,
    helm: Helm = None,
    kubectl: Annotated[Path | None, typer.Option("--kubectl", help="The kubectl to use; else that on PATH.")] = None,
    context: Annotated[str | None, typer.Option("--context", help="kubectl's context.")] = None,
    release: Annotated[str, typer.Option("--release", help="Name of the release.")] = "triton-tickserve",
    namespace: Annotated[str, typer.Option("--namespace", help="Its namespace.")] = "scoring",
    as_json: options.AsJson = False,
) -> None:
    """What an upgrade would change, object by object and field by field; exit 1 where something would."""
    if live == bool(against):
        raise UsageError("expected one of --against and --live", field="--against, --live")
    difference, where = stages.load("export.deployment.difference"), _chart(chart, helm)
    # Hooks come and go with each upgrade: they are in no cluster between two.
    new = where.render(values, release=release, namespace=namespace, hooks=not live)
    if live:
        tools = stages.load("export.deployment.tools")
        old = stages.load("export.deployment.live").objects(tools.kubectl(kubectl), new, context)
        found = difference.differences(old, new, only_named=True)
    else:
        old = where.render(against or (), release=release, namespace=namespace)
        found = difference.differences(old, new)
    changes = [change.to_json() for change in found]
    emit(changes, as_json, lambda: _show_changes(changes))
    if changes:
        raise typer.Exit(1)


def _show_changes(changes: list[dict[str, Any]]) -> None:
    for change in changes:
        if not change["path"]:
            out.print(f"{change['object']}: {change['what']}", markup=False)
            continue
        shown = {"added": "{after}", "removed": "was {before}", "changed": "{before} -> {after}"}[change["what"]]
        out.print(f"{change['object']}: {change['path']}: {change['what']}: {shown.format(**change)}", markup=False)
    if not changes:
        out.print("no difference")


@app.command("calendar")
def show_calendar(
    calendar: CalendarFile,
    days: Days = None,
    start: Annotated[str | None, typer.Option("--from", help="A time with its offset; else now.")] = None,
    profile: options.Profile = None,
    config: options.ConfigFile = None,
    as_json: options.AsJson = False,
) -> None:
    """The sessions, KEDA's triggers, freeze windows, and where pods are kept that no session asks for."""
    settings: Config = options.settings_of(config, profile).config
    found = _schedule(calendar, days or settings.deploy.calendar_days, start)
    emit(found.to_json(), as_json, lambda: _show_schedule(found.to_json()))


def _show_schedule(found: dict[str, Any]) -> None:
    for title, key in (("sessions", "sessions"), ("pre-scale (KEDA cron)", "pre_scale"), ("change freeze", "freeze")):
        rows = found[key]
        columns = list(rows[0]) if rows else ["none"]
        table(title, columns, [list(row.values()) for row in rows])
    if found["idle"]:
        rows = [list(row.values()) for row in found["idle"]]
        table("pods without a session: holidays and half-days", list(found["idle"][0]), rows)
    for note in found["notes"]:
        out.print(f"note: {note}", markup=False)


@app.command("freeze")
def check_freeze(
    calendar: CalendarFile,
    at: Annotated[str | None, typer.Option("--at", help="A time with its offset; else now.")] = None,
    as_json: options.AsJson = False,
) -> None:
    """For pipelines: exit 1 inside a change freeze, naming the session, 0 outside."""
    file, freeze = stages.load("export.deployment.calendar_file"), stages.load("export.deployment.freeze")
    now = datetime.now(UTC) if at is None else freeze.parse_moment(at, "--at")
    ahead = freeze.windows(file.read_calendar(calendar), now, now + freeze.REACH)
    holding = freeze.holding(ahead, now)
    coming = next((window for window in ahead if window.start > now), None)
    result = {
        "at": now.isoformat(),
        "frozen": bool(holding),
        "windows": freeze.to_json(holding),
        "next": None if coming is None else coming.to_json(),
    }
    emit(result, as_json, lambda: _show_freeze(result))
    if holding:
        names = ", ".join(window.name for window in holding)
        last = max(window.end for window in holding)
        raise GateRefusedError(f"change freeze: session {names}, until {last.isoformat()}", field="calendar")


def _show_freeze(result: dict[str, Any]) -> None:
    if not result["frozen"]:
        coming = result["next"]
        after = f"the next begins {coming['start']} ({coming['name']})" if coming else "none in the next days"
        out.print(f"no change freeze; {after}", markup=False)


@app.command("overlays")
def overlays(
    chart: ChartFolder = None,
    helm: Helm = None,
    out_folder: Annotated[Path | None, typer.Option("--out", help="Else k8s/ of this checkout.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Write nothing; exit 1 where something would change.")] = False,
    as_json: options.AsJson = False,
) -> None:
    """Write the kustomize overlays anew from the chart: for those who do not use Helm."""
    module = stages.load("export.deployment.overlays")
    target = out_folder or stages.checkout_root() / "k8s"
    changed = module.write(_chart(chart, helm), target, dry_run=check)
    emit({"changed": changed}, as_json, lambda: out.print("\n".join(changed) or "nothing changes", markup=False))
    if check and changed:
        raise GateRefusedError(f"{len(changed)} files are not what the chart gives", field="overlays")


def _chart(folder: Path | None, helm: Path | None) -> Any:
    tools = stages.load("export.deployment.tools")
    where = folder or stages.checkout_root() / "k8s" / "chart"
    return stages.load("export.deployment.chart").Chart(where, tools.helm(helm))


def _schedule(path: Path, days: int, start: str | None = None) -> Any:
    file, freeze = stages.load("export.deployment.calendar_file"), stages.load("export.deployment.freeze")
    calendar = file.read_calendar(path)
    first = datetime.now(UTC) if start is None else freeze.parse_moment(start, "--from")
    return stages.load("export.deployment.schedule").schedule(calendar, first, days)
