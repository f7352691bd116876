"""Batching settings on the real Triton: fault 7 (a slow model, three times the load it can take), and the command."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import ModelProto, helper, numpy_helper
from typer.testing import CliRunner

from export.batching import Setting, apply_to_config, setting_of_config
from export.batching.arrivals import of_times
from loadtest.open_loop import Feed, OpenLoop, drive
from serving.embedded import EmbeddedTriton
from tests.serving import conftest as tiny_models
from tests.serving.conftest import ANY_PORTS, FEATURES, Tiny, pending, publish_tiny
from tickserve.cli.commands import app
from tickserve.client import Client
from tickserve.config import ExportSettings
from tickserve.errors import DeadlineExceededError, OverloadedError, TickserveError, UnavailableError

pytestmark = pytest.mark.system  # a minute under load
WIDTH, LAYERS, MAX_BATCH = 1_024, 250, 4
QUEUE, QUEUE_MS, INSTANCES = 24, 250, 3
# Batches that are executing or handed over: not in the queue, yet pending in Triton's gauge.
UNDER_WAY = 2 * INSTANCES * MAX_BATCH
POLICY = Setting(MAX_BATCH, 0, (MAX_BATCH,), INSTANCES, QUEUE, QUEUE_MS * 1_000, lanes=True)


def slow_graph(weights: np.ndarray, *, fragile: bool = False) -> ModelProto:
    """The tiny model with `LAYERS` matrix products beside it that add nothing to its number but time."""
    model = PLAIN_GRAPH(weights, fragile=fragile)
    random = np.random.default_rng(0)
    square = (random.normal(size=(WIDTH, WIDTH)) / np.sqrt(WIDTH)).astype(np.float32)
    constants = {"widen": np.full((FEATURES, WIDTH), 0.1, np.float32), "square": square}
    constants["nought"] = np.zeros((WIDTH, 3), np.float32)
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in constants.items())
    slow = [helper.make_node("MatMul", ["filled", "widen"], ["h0"])]
    for layer in range(LAYERS):
        slow.append(helper.make_node("MatMul", [f"h{layer}", "square"], [f"g{layer}"]))
        slow.append(helper.make_node("Tanh", [f"g{layer}"], [f"h{layer + 1}"]))
    slow.append(helper.make_node("MatMul", [f"h{LAYERS}", "nought"], ["nothing"]))
    slow.append(helper.make_node("Add", ["fast", "nothing"], ["logits"]))
    nodes = list(model.graph.node)
    product = next(index for index, node in enumerate(nodes) if node.output[0] == "logits")
    nodes[product].output[0] = "fast"
    del model.graph.node[:]
    model.graph.node.extend([*nodes[: product + 1], *slow, *nodes[product + 1 :]])
    return model


PLAIN_GRAPH = tiny_models.graph


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[EmbeddedTriton, dict[str, Tiny]]]:
    """`bounded` with a queue that refuses, `open` with Triton's default queue; both equally slow."""
    repository = tmp_path_factory.mktemp("slow") / "models"
    settings = ExportSettings(max_batch=MAX_BATCH, preferred_batch_rows=(MAX_BATCH,), instances=INSTANCES)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny_models, "graph", slow_graph)
        models = {name: publish_tiny(repository, name, 5, settings) for name in ("bounded", "open")}
    apply_to_config(repository / "bounded" / "config.pbtxt", POLICY)
    with EmbeddedTriton(repository, ANY_PORTS) as server:
        yield server, models


def rows(count: int) -> np.ndarray:
    return np.random.default_rng(9).normal(size=(count, FEATURES)).astype(np.float32)


def capacity(client: Client, model: str) -> float:
    """Rows a second that the model scores when it is always asked for a full batch, on each instance."""
    done, stop = Counter[int](), time.monotonic() + 1.0

    def ask(worker: int) -> None:
        while time.monotonic() < stop:
            client.score(model, rows(MAX_BATCH), deadline_ms=20_000)
            done[worker] += MAX_BATCH

    began = time.monotonic()
    threads = [threading.Thread(target=ask, args=(worker,)) for worker in range(INSTANCES)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return done.total() / (time.monotonic() - began)


def deadline_ms(rate: float) -> float:
    """What was admitted is answered by then: after the queue's timeout, and three batches at `rate` rows a second."""
    return max(500.0, QUEUE_MS + 3 * 1e3 * INSTANCES * MAX_BATCH / rate)


def overload(server: EmbeddedTriton, model: str, rate: float) -> tuple[OpenLoop, float]:
    """Three seconds of three times `rate`; what the callers saw, and the most requests Triton had pending."""
    per_second = 3 * rate
    arrivals = of_times((np.arange(int(3 * per_second)) / per_second * 1e9).astype(np.int64))
    deepest, over = [0.0], threading.Event()

    def watch() -> None:
        while not over.wait(0.05):
            deepest.append(pending(server, model))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        seen = drive(Feed(server.http_url, model, {"features": rows(1)}, deadline_ms(rate)), arrivals)
    finally:
        over.set()
        watcher.join()
    return seen, max(deepest)


def lone_p50_s(client: Client, model: str) -> float:
    taken = []
    for _ in range(15):
        began = time.perf_counter()
        client.score(model, rows(1), deadline_ms=20_000)
        taken.append(time.perf_counter() - began)
    return float(np.median(taken))


def test_a_slow_model_refuses_what_it_cannot_score_and_is_itself_again_afterwards(
    slow: tuple[EmbeddedTriton, dict[str, Tiny]],
) -> None:
    server, models = slow
    tiny = models["bounded"]
    with Client(server.http_url, manifest=tiny.manifest) as client:
        before, rate = lone_p50_s(client, "bounded"), capacity(client, "bounded")
        errors: Counter[str] = Counter()
        over = threading.Event()

        def engine() -> None:
            """A caller with the checked client, in the middle of it."""
            while not over.is_set():
                began = time.monotonic()
                try:
                    client.score("bounded", rows(1), deadline_ms=deadline_ms(rate))
                except (OverloadedError, DeadlineExceededError, UnavailableError) as error:
                    errors[type(error).__name__] += 1
                    time.sleep(0.01)
                assert time.monotonic() - began < 5 * deadline_ms(rate) / 1e3

        caller = threading.Thread(target=engine)
        caller.start()
        seen, deepest = overload(server, "bounded", rate)
        over.set()
        caller.join()
        outcomes = Counter(seen.outcome)
        assert outcomes.keys() <= {
            "answered",
            "refused: queue full",
            "refused: waited too long",
            "no answer by the deadline",
        }
        assert outcomes["answered"] >= rate / 4
        assert outcomes["refused: queue full"] > 0
        assert errors["OverloadedError"] > 0
        assert deepest <= QUEUE + UNDER_WAY
    # What was admitted is gone within the queue's timeout; then it is as fast as it was.
    with Client(server.http_url, manifest=tiny.manifest) as client:
        assert lone_p50_s(client, "bounded") < 5 * before + 0.1
        signal = client.score("bounded", rows(3), deadline_ms=20_000)
        np.testing.assert_allclose(signal.probabilities, tiny.research(rows(3)), atol=1e-5)


def test_the_same_load_on_an_unbounded_queue_piles_up(slow: tuple[EmbeddedTriton, dict[str, Tiny]]) -> None:
    """The control: the bound is seen by its absence."""
    server, models = slow
    with Client(server.http_url, manifest=models["open"].manifest) as client:
        rate = capacity(client, "open")
        seen, deepest = overload(server, "open", rate)
        assert deepest > QUEUE + UNDER_WAY
        assert "refused: queue full" not in seen.outcome
        client.score("open", rows(1), deadline_ms=60_000)


def invoke(*arguments: str) -> tuple[int, Any]:
    """The exit code and the JSON of a command."""
    result = CliRunner().invoke(app, ["batching", *arguments, "--json"])
    code = result.exception.exit_code if isinstance(result.exception, TickserveError) else result.exit_code
    return code, json.loads(result.stdout) if result.stdout.strip() else None


@pytest.mark.parametrize("profile", ["quick", "production"])
def test_the_shipped_profiles_break_no_rule(profile: str) -> None:
    code, linted = invoke("lint", "--profile", profile)
    assert (code, linted["findings"]) == (0, [])
    (note,) = linted["notes"]
    assert note["field"] == "max_queue_size"
    assert "on purpose" in note["reason"]


@pytest.mark.parametrize(
    ("export", "field"),
    [
        ("queue_policy = 'reject'", "instance_group.count"),
        ("queue_policy = 'reject'\ninstances = 3\nqueue_delay_us = 50", "max_queue_delay_microseconds"),
        ("queue_delay_us = 50\npreferred_batch_rows = []", "max_queue_delay_microseconds"),
    ],
)
def test_a_hand_set_value_that_breaks_a_rule_fails(export: str, field: str, tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text(f"[export]\n{export}\n")
    code, linted = invoke("lint", "--config", str(tmp_path / "bad.toml"))
    assert (code, [finding["field"] for finding in linted["findings"]]) == (1, [field])


def test_derive_apply_verify_and_lint_on_a_served_model(tmp_path: Path) -> None:
    repository, out = tmp_path / "models", tmp_path / "out"
    publish_tiny(repository, "tiny", 1)
    times = np.cumsum(np.random.default_rng(2).exponential(1e7, 200)).astype(np.int64)
    recorded = tmp_path / "arrivals.txt"
    recorded.write_text("\n".join(map(str, times)))
    common = ("--model", "tiny", "--repository", str(repository), "--out", str(out))
    load = ("--arrivals", str(recorded), "--bulk-rows", "16", "--bulk-per-s", "10")
    code, _ = invoke("lint", *common)
    assert code == 1  # this test's models say nothing about their queue
    code, derived = invoke("derive", *common, *load, "--deadline-ms", "400", "--apply")
    assert code == 0
    assert derived["satisfied"]
    chosen = derived["chosen"]["setting"]
    applied = setting_of_config(repository / "tiny" / "config.pbtxt").to_json()
    assert applied | {"preferred": list(applied["preferred"])} == chosen
    assert chosen["lanes"]
    assert json.loads((out / "tiny.json").read_text()) == derived
    code, verified = invoke("verify", *common, *load)
    assert code in (0, 1)  # the machine may be too busy for the deadline; what was seen is said either way
    assert sum(verified["measured"]["outcomes"].values()) == verified["measured"]["requests"]
    assert verified["measured"]["outcomes"]["answered"] > 100
    assert verified["measured"]["bulk"]["requests"] > 0
    code, linted = invoke("lint", *common, "--deadline-ms", "400", "--two-lanes")
    assert (code, linted["findings"], linted["setting"]) == (0, [], chosen)
    code, linted = invoke("lint", *common, "--deadline-ms", "1")
    assert code == 1
    assert "default_timeout_microseconds" in [finding["field"] for finding in linted["findings"]]
    code, _ = invoke("verify", *common, "--arrivals", str(recorded), "--out", str(tmp_path / "none"))
    assert code == 3
