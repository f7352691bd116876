"""Chart values from figures: numbers worked out by hand, and what is not known stays unwritten."""

from __future__ import annotations

import math
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
import yaml

from export.batching import ServiceTimes, Setting, lint
from export.deployment import quantity, values_file
from export.deployment.calendar_file import Calendar
from export.deployment.capacity import Capacity, capacity_of
from export.deployment.figures import Cpu, ModelFigures, Rate, Service
from export.deployment.queue_bound import queue_bound
from export.deployment.schedule import schedule
from export.deployment.sizing import Memory, Value, Wanted, memory_mi, parse_image, values
from tests.export.deployment.conftest import times
from tickserve.config import DeploySettings
from tickserve.errors import UsageError

MI = 2**20
SETTINGS = DeploySettings()
DIGEST = "sha256:" + "0" * 64
# 10 ms, of which 0.5 ms is the path and a batch of 8 takes 2 ms; three instances of two threads.
SERVICE = times(overhead_us=500, r1=1000, r8=2000)


def model(
    service: ServiceTimes | None = SERVICE,
    rate: float | None = 10_000.0,
    rows: float = 1.0,
    *,
    name: str = "one",
    served: bool = True,
    deadline_us: float = 10_000.0,
) -> ModelFigures:
    setting = Setting(8, 0, (8,), instances=3, queue_size=64, queue_timeout_us=5_000, lanes=False)
    return ModelFigures(
        name=name,
        version=1,
        manifest=None,  # type: ignore[arg-type]
        manifest_sha256=DIGEST,
        setting=setting,
        threads=2,
        bytes=5 * MI,
        service=None if service is None else Service(service, served, "measured in a test"),
        deadline_us=deadline_us,
        deadline_source="--deadline-ms",
        rate=None if rate is None else Rate(rate, rows, "--rate"),
    )


def made(
    *models: ModelFigures, memory: int | None = 600 * MI, settings: DeploySettings = SETTINGS, **wanted: Any
) -> dict[str, Value]:
    calendar = wanted.pop("calendar", None)
    taken = None if memory is None else Memory(memory, "measured in a test")
    return {value.path: value for value in values(models, taken, settings, Wanted(**wanted), calendar)}


def test_capacity_is_what_the_cores_give() -> None:
    capacity = capacity_of(model())
    assert capacity is not None
    # 2000 us / 8 requests x 2 threads + 500 us of path; six cores.
    assert (capacity.batch, capacity.request_us) == (8, 1_000.0)
    assert capacity.per_second == pytest.approx(6_000)
    assert capacity.slack_us == 7_500
    # With no path to pay for it is what the instances score: 3 x 8 rows in 2 ms.
    assert capacity_of(model(times(overhead_us=0, r1=1000, r8=2000))).per_second == pytest.approx(12_000)


def test_processor_time_that_was_measured_counts_in_place_of_the_path() -> None:
    def capacity(us: float) -> Capacity:
        found = capacity_of(replace(model(), cpu=Cpu(us, "measured in a test")))
        assert found is not None
        return found

    assert (capacity(600).per_second, capacity(600).measured) == (pytest.approx(10_000), True)
    # However little a request takes, three instances score 3 x 8 rows in 2 ms and no more.
    assert capacity(1).per_second == pytest.approx(12_000)
    # With it, times without a server are enough.
    alone = replace(model(served=False), cpu=Cpu(600, "measured in a test"))
    assert made(alone)["replicaCount"].value == 2
    assert "a request 600 us of its cores" in made(alone)["replicaCount"].reason
    assert "a request at most 1000 us" in made(model())["replicaCount"].reason


def test_a_batch_that_leaves_less_than_half_the_deadline_is_not_counted_on() -> None:
    capacity = capacity_of(model(times(overhead_us=500, r1=1000, r8=4600)))
    assert (capacity.batch, capacity.slack_us) == (1, 8_500)


def test_requests_of_several_rows_cost_more() -> None:
    alone, four = capacity_of(model()), capacity_of(model(rows=4))
    assert four.request_us == 2_000 / 2 * 2 + 500
    assert four.per_second < alone.per_second


@pytest.mark.parametrize(
    ("rate", "utilisation", "replicas"),
    [
        (100, 0.6, 2),  # never fewer than two
        (10_000, 0.6, 3),  # 10000 / (6000 x 0.6) = 2.8
        (11_000, 0.6, 4),
        (11_000, 0.95, 3),  # 1.9 pods carry it, and one may go
    ],
)
def test_replicas(rate: float, utilisation: float, replicas: int) -> None:
    settings = SETTINGS.model_copy(update={"utilisation": utilisation})
    value = made(model(rate=rate), settings=settings)["replicaCount"]
    assert value.value == replicas
    assert "one pod answers 6000/s" in value.reason
    assert value.source == "--rate; measured in a test"


def test_the_rest_of_the_values() -> None:
    found = made(model(), objective=0.99)
    assert found["resources.limits.cpu"].value == "6"
    assert found["resources.limits.memory"].value == "960Mi"  # 600 x 1.5 = 900, in steps of 64
    assert found["model.names"].value == ["one"]
    assert found["slo.deadlineMs"].value == 10
    assert found["slo.objective"].value == 0.99
    for section in ("autoscaling", "keda"):
        assert found[f"{section}.minReplicas"].value == 3
        assert found[f"{section}.maxReplicas"].value == 6
        assert found[f"{section}.queueSecondsPerRequest"].value == pytest.approx(0.0075 / math.log(100), rel=1e-2)
    assert found["model.sizeLimit"].left
    assert "keda.enabled" not in found


def test_the_bound_of_the_queue_is_what_the_instances_score_within_the_slack() -> None:
    # 7.5 ms of slack, three instances that score 8 requests in 2 ms each.
    unbounded = replace(model().setting, queue_size=0, queue_timeout_us=0, instances=3)
    found = queue_bound(replace(model(), setting=unbounded))
    assert (found.size, found.timeout_us) == (90, 7_499)
    assert found.to_json()["in_force"] is None
    assert "(its config.pbtxt, no chart value): unbounded; 90 requests" in found.line
    # With these keys the rules of batching have nothing against it.
    bound = replace(unbounded, queue_size=found.size, queue_timeout_us=found.timeout_us)
    assert found.keys == bound.export_keys()
    assert lint(bound, deadline_us=10_000, service=SERVICE) == []
    # Requests of four rows fill a batch by twos.
    assert queue_bound(model(rows=4)).size == 22
    assert "bounded to 64 requests; 90 requests" in queue_bound(model()).line


def test_a_bound_takes_three_instances_and_no_delay() -> None:
    alone = replace(
        model(), setting=replace(model().setting, instances=1, queue_size=0, queue_timeout_us=0, delay_us=5)
    )
    found = queue_bound(alone)
    assert (found.size, found.keys["instances"], found.keys["queue_delay_us"]) == (90, 3, 0)
    assert "render again" in found.reason


@pytest.mark.parametrize(
    ("figures", "gpu", "why"),
    [
        (model(None), False, "no served times"),
        (model(served=False), False, "no served times"),
        (model(), True, "measured on a CPU"),
        (model(times(overhead_us=500, r1=1000, r8=9_600)), False, "leaves no time to wait"),
    ],
)
def test_a_bound_that_does_not_follow_is_said_with_the_command(figures: ModelFigures, gpu: bool, why: str) -> None:
    found = queue_bound(figures, gpu=gpu)
    assert (found.size, found.keys, found.to_json()["queue_size"]) == (0, {}, None)
    assert why in found.advice
    assert "--apply` computes a bound" in found.advice


def test_memory_has_a_floor_and_headroom() -> None:
    assert memory_mi(10 * MI, SETTINGS) == 512
    assert memory_mi(512 * MI, SETTINGS) == 768
    assert memory_mi(512 * MI + 1, SETTINGS) == 832


def test_two_models_share_a_pod() -> None:
    tight = model(times(overhead_us=500, r1=1000, r8=1200), rate=100, name="two", deadline_us=4_000)
    found = made(model(rate=11_000), tight)
    assert found["resources.limits.cpu"].value == "12"
    assert found["replicaCount"].value == 4
    assert found["slo.deadlineMs"].value == 4
    assert "two" in found["slo.deadlineMs"].reason
    assert found["keda.queueSecondsPerRequest"].value == pytest.approx(0.0023 / math.log(1000), rel=1e-2)


@pytest.mark.parametrize(
    ("figures", "memory", "wanted", "left", "why"),
    [
        (model(rate=None), 600 * MI, {}, "replicaCount", "no rate of one is known"),
        (model(rate=None), 600 * MI, {}, "keda.maxReplicas", "no rate of one is known"),
        (model(None), 600 * MI, {}, "replicaCount", "no served times"),
        (model(None), 600 * MI, {}, "keda.queueSecondsPerRequest", "no service times"),
        (model(served=False), 600 * MI, {}, "replicaCount", "no served times"),
        (model(), None, {}, "resources.limits.memory", "not measured"),
        (model(), 600 * MI, {}, "image", "no --image"),
        (model(), 600 * MI, {"image": "host:5000/a/b:1"}, "image.digest", "only your registry knows it"),
        (model(), 600 * MI, {"gpu": True}, "replicaCount", "measured on a CPU"),
        (model(), 600 * MI, {"gpu": True}, "resources.limits.memory", "not measured here"),
        (model(), 600 * MI, {"gpu": True}, "resources.limits.cpu", "not measured here"),
        (model(), 600 * MI, {"gpu": True}, "keda.queueSecondsPerRequest", "on a GPU is not known"),
    ],
)
def test_what_is_not_known_is_left_to_the_chart_with_the_reason(
    figures: ModelFigures, memory: int | None, wanted: dict[str, Any], left: str, why: str
) -> None:
    value = made(figures, memory=memory, **wanted)[left]
    assert value.left
    assert value.value is None
    assert why in value.reason


def test_a_deadline_that_no_lone_request_meets_is_refused() -> None:
    with pytest.raises(UsageError, match=r"deadline: no time is left .* expected more than 1.5 ms, was 1.4 ms"):
        made(model(deadline_us=1_400))


def test_a_calendar_asks_for_keda_and_raises_the_most() -> None:
    tables = {"prescale": {"replicas": 9}, "freeze": {}, "market": [{"exchange": "XNYS"}]}
    calendar = schedule(Calendar.model_validate(tables), datetime(2026, 11, 20, tzinfo=UTC), 14)
    found = made(model(), calendar=calendar, prometheus="http://prometheus:9090")
    assert found["keda.enabled"].value is True
    # Twice the pre-scale: at the open, when the load is highest, there is still room to scale.
    assert found["keda.maxReplicas"].value == 18
    assert made(model(rate=None), calendar=calendar, prometheus="http://p")["keda.maxReplicas"].value == 18
    assert found["keda.preScale"].value[0]["start"] == "0 9 * * 1-5"
    assert found["keda.prometheusAddress"].value == "http://prometheus:9090"
    assert "10.0 h" in found["keda.preScale"].reason  # Thanksgiving, and the half-day after it
    assert len(found["changeFreeze.windows"].value) == 9
    with pytest.raises(UsageError, match="--prometheus: KEDA asks Prometheus"):
        made(model(), calendar=calendar)
    with pytest.raises(UsageError, match=r"--max-replicas: fewer than are needed: expected at least 9, was 8"):
        made(model(), calendar=calendar, max_replicas=8)


def test_a_calendar_without_a_window_freezes_nothing_and_the_file_says_so() -> None:
    tables = {"freeze": {}, "market": [{"exchange": "XNYS"}]}
    weekend = schedule(Calendar.model_validate(tables), datetime(2026, 11, 28, tzinfo=UTC), 1)
    freeze = made(model(), calendar=weekend)["changeFreeze"]
    assert (freeze.left, "changeFreeze.enabled" in made(model(), calendar=weekend)) == (True, False)
    assert "no freeze window from 2026-11-28 to 2026-11-29" in freeze.reason


def test_a_repository_too_large_for_the_volume_asks_for_more() -> None:
    assert made(replace(model(), bytes=600 * MI))["model.sizeLimit"].value == "1216Mi"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (f"r.example.com/a/b:1.0@{DIGEST}", ("r.example.com", "a/b", "1.0", DIGEST)),
        (f"r.example.com:5000/b@{DIGEST}", ("r.example.com:5000", "b", "", DIGEST)),
        ("localhost/b:1", ("localhost", "b", "1", "")),
        ("team/b:1", ("", "team/b", "1", "")),
    ],
)
def test_images(text: str, parts: tuple[str, ...]) -> None:
    assert tuple(parse_image(text).values()) == parts


@pytest.mark.parametrize("text", ["b", "b:latest", "r.example.com/", "b:1@sha256:short", ":1", "r.example.com:5000/b"])
def test_an_image_that_is_not_known_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--image"):
        parse_image(text)


def test_the_file_reads_back_as_the_values_with_a_reason_above_each() -> None:
    found = list(made(model(), image=f"r.example.com/b:1@{DIGEST}").values())
    text = values_file.to_yaml(found, ["a head"])
    tree = yaml.safe_load(text)
    assert text == values_file.to_yaml(found, ["a head"])
    for value in found:
        part: Any = tree
        for key in value.path.split("."):
            part = part.get(key, {}) if isinstance(part, dict) else {}
        assert part == ({} if value.left else value.value), value.path
        assert value.reason
    lines = text.splitlines()
    for number, line in enumerate(lines):
        if line.strip() and not line.lstrip().startswith(("#", "-")) and not line.endswith(":"):
            assert lines[number - 1].lstrip().startswith("#"), line
    assert max(map(len, lines)) <= 120


def test_a_section_of_nothing_but_comments_is_no_key() -> None:
    text = values_file.to_yaml([Value("keda.minReplicas", None, "not known", "", left=True)], [])
    assert yaml.safe_load(text) is None
    assert "# keda.minReplicas: not known" in text


def test_no_text_breaks_out_of_its_place() -> None:
    evil = 'x"\nreplicaCount: 1 # {{ .Values }}'
    assert yaml.safe_load(values_file.to_yaml([Value("a.b", evil, "why", "")], [])) == {"a": {"b": evil}}


def test_values_over_values_as_helm_lays_them() -> None:
    below = {"a": {"b": 1, "c": [1, 2]}, "d": {"e": 1}}
    assert values_file.merged([below, {"a": {"c": [3]}, "d": None}]) == {"a": {"b": 1, "c": [3]}, "d": None}
    assert below == {"a": {"b": 1, "c": [1, 2]}, "d": {"e": 1}}


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("250m", 0.25),
        ("2000u", 0.002),
        ("1230000n", 0.00123),
        ("2", 2),
        ("1.5", 1.5),
        ("2Gi", 2 * 2**30),
        ("1024Mi", 2**30),
        ("1k", 1000),
        ("1e3", 1000),
        (3, 3),
    ],
)
def test_quantities(text: object, number: float) -> None:
    found = quantity.parse(text)
    assert found is not None
    assert float(found) == number


@pytest.mark.parametrize(
    ("written", "canonical"),
    [
        ("0.002", "2m"),
        ("2000u", "2m"),
        ("0.00123", "1230u"),
        ("0.0000000015", "1.5n"),
        ("0.5", "500m"),
        ("1024Mi", "1Gi"),
    ],
)
def test_a_quantity_is_the_same_as_a_cluster_writes_it(written: str, canonical: str) -> None:
    assert quantity.parse(written) == quantity.parse(canonical) is not None


@pytest.mark.parametrize("text", ["", "lots", "1.2.3", "-1", "5 Gi", "Gi", True, None, [1]])
def test_what_is_no_quantity(text: object) -> None:
    assert quantity.parse(text) is None
