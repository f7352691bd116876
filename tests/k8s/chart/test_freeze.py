"""The change freeze against the real clock: what helm refuses, what the hook says, and what goes on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest
import yaml

from tests.k8s.chart.rendering import Object, container, of_kind, parse, pods, template, the

FAR = {"name": "far off", "start": "2199-01-02T07:30:00Z", "end": "2199-01-02T16:35:00Z"}


def window(start: timedelta, end: timedelta, *, zone: timezone = UTC, name: str = "xlon") -> dict[str, str]:
    """A window from now on."""
    now = datetime.now(zone).replace(microsecond=0)
    return {"name": name, "start": (now + start).isoformat(), "end": (now + end).isoformat()}


def minutes(count: float) -> timedelta:
    return timedelta(minutes=count)


OPEN = window(minutes(-60), timedelta(days=1))
PAST = window(minutes(-120), minutes(-60))


def values(folder: Path, *windows: dict[str, str], **others: object) -> Path:
    path = folder / "values.yaml"
    path.write_text(yaml.safe_dump({"changeFreeze": {"enabled": True, "windows": list(windows), **others}}))
    return path


def test_inside_a_window_helm_refuses_and_says_which(tmp_path: Path) -> None:
    done = template("--values", values(tmp_path, FAR, OPEN))
    assert done.returncode == 1
    assert f"was inside xlon, {OPEN['start']} to {OPEN['end']}" in done.stderr
    assert "helm rollback goes on" in done.stderr


@pytest.mark.parametrize("hours", [-11, 5.5, 14])
def test_the_offset_of_a_window_counts(tmp_path: Path, hours: float) -> None:
    zone = timezone(timedelta(hours=hours))
    inside = window(minutes(-1), minutes(1), zone=zone)
    assert template("--values", values(tmp_path, FAR, inside)).returncode == 1
    outside = [window(minutes(-3), minutes(-2), zone=zone), window(minutes(2), minutes(3), zone=zone)]
    assert template("--values", values(tmp_path, FAR, *outside)).returncode == 0


def test_outside_every_window_it_renders_with_the_hook(tmp_path: Path) -> None:
    done = template("--values", values(tmp_path, PAST, window(minutes(60), minutes(120))))
    assert done.returncode == 0, done.stderr
    hook = the(parse(done.stdout), "Job")
    assert hook["metadata"]["annotations"]["helm.sh/hook"] == "pre-upgrade", "a rollback is never held up"


def test_windows_that_are_all_over_protect_nothing_and_are_refused(tmp_path: Path) -> None:
    done = template("--values", values(tmp_path, PAST))
    assert done.returncode == 1
    assert "changeFreeze.windows: expected one that is still to come" in done.stderr
    assert "was 1, all over" in done.stderr


def test_a_window_that_ends_before_it_starts_is_refused(tmp_path: Path) -> None:
    back = {"name": "back", "start": FAR["end"], "end": FAR["start"]}
    done = template("--values", values(tmp_path, back))
    assert "changeFreeze.windows back: expected an end after its start" in done.stderr


def test_a_day_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    never = {"name": "never", "start": "2199-02-30T07:30:00Z", "end": "2199-03-01T07:30:00Z"}
    done = template("--values", values(tmp_path, never))
    assert done.returncode == 1
    assert "2199-02-30" in done.stderr


def test_the_glass_is_broken_with_a_reason_that_is_written_down(tmp_path: Path) -> None:
    done = template("--values", values(tmp_path, OPEN, override="INC-1234: rollback is not enough"))
    assert done.returncode == 0, done.stderr
    deployment = the(parse(done.stdout), "Deployment")
    noted = {"tickserve.io/change-freeze-override": "INC-1234: rollback is not enough"}
    assert deployment["metadata"]["annotations"] == noted
    assert "tickserve.io" not in json.dumps(deployment["spec"]), "which alone restarts nothing"
    assert of_kind(parse(done.stdout), "Job") == [], "the hook would refuse"


def hook_of(folder: Path, *windows: dict[str, str]) -> Object:
    """The hook's container, rendered while no window is open, with other windows put in its place."""
    done = template("--values", values(folder, FAR))
    (pod,) = pods(of_kind(parse(done.stdout), "Job"))
    hook = container(pod, "change-freeze")
    assert json.loads(hook["env"][0]["value"]) == [FAR]
    hook["env"][0]["value"] = json.dumps(windows)
    return hook


def run_hook(hook: Object) -> subprocess.CompletedProcess[str]:
    python, flag = hook["command"]
    assert (python, flag) == ("python3", "-c")
    environment = {item["name"]: item["value"] for item in hook["env"]}
    return subprocess.run(
        [sys.executable, flag, *hook["args"]],
        env={"PATH": os.environ["PATH"], **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_hook_asks_the_clock_when_it_runs(tmp_path: Path) -> None:
    inside = run_hook(hook_of(tmp_path, FAR, OPEN))
    assert inside.returncode == 1
    assert "change freeze: xlon" in inside.stderr
    outside = run_hook(hook_of(tmp_path, PAST, FAR))
    assert (outside.returncode, outside.stderr) == (0, "")


def test_the_hook_refuses_windows_it_cannot_read(tmp_path: Path) -> None:
    broken = run_hook(hook_of(tmp_path, {"name": "x", "start": "soon", "end": "later"}))
    assert broken.returncode == 2
    assert "cannot be read" in broken.stderr
