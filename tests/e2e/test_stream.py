"""A recording through the stream: the bundle's own numbers, past a server that is killed and a process that ended."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from export import export_bundle
from export.research import load_research
from market.build import build_features
from market.feature_store import FeatureTable
from market.readers import open_source
from serving.embedded import EmbeddedTriton
from tickserve import Client
from tickserve.client import newest_versions
from tickserve.config import ExportSettings, FeatureSettings, ServeSettings
from tickserve.errors import RequestError
from tickserve.features.spec import default_spec
from tickserve.manifest import Manifest, load_bundle
from tickserve.pipeline import stepped_inputs
from tickserve.settings import load_settings
from tickserve.stream import Stream
from training.train import train

pytestmark = pytest.mark.system

RECORDING = "binance_l2_stream/usdm_btcusdt_20230405.us.jsonl.gz"
EVENTS = 6_000
ANY_PORTS = ServeSettings(http_port=0, grpc_port=0, metrics_port=0)


@dataclass(frozen=True)
class Made:
    """Models trained and published from one recording, and the recording."""

    recording: Path
    bundles: Path
    repository: Path
    table: FeatureTable

    def events(self, count: int = EVENTS) -> Iterator[tuple[int, np.ndarray]]:
        for chunk in open_source([self.recording], levels=5).chunks(2_048):
            for ts_ns, row in zip(chunk.ts_ns.tolist(), chunk.values, strict=True):
                if count <= 0:
                    return
                yield ts_ns, row
                count -= 1

    def model(self, suffix: str) -> str:
        return next(path.name for path in self.bundles.iterdir() if path.name.endswith(suffix))


@pytest.fixture(scope="module")
def made(market_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("stream")
    source = open_source([market_data / RECORDING], levels=5)
    features = FeatureSettings(max_rows=20_000, store=str(folder / "features"))
    built = build_features(source, default_spec(source.kind, source.levels), features)
    small = {
        "validation.folds": 2, "gbdt.rounds": 10, "lstm.epochs": 1, "lstm.window": 8, "lstm.max_train_windows": 3_000,
        "compress.fp16": False, "compress.int8": False,
    }  # fmt: skip
    config = load_settings(environ={}, overrides=small).config
    for bundle in train(built, config, folder / "bundles"):
        settings = ExportSettings(parity_rows=200, max_batch=16, preferred_batch_rows=(4, 16))
        export_bundle(bundle.path, folder / "repository", settings)
    return Made(market_data / RECORDING, folder / "bundles", folder / "repository", built.load())


def streamed(stream: Stream, made: Made, count: int = EVENTS) -> tuple[np.ndarray, np.ndarray]:
    """Features [N, F] and probabilities [N, 3] of every event that was scored."""
    rows, said = [], []
    for ts_ns, row in made.events(count):
        step = stream.feed(ts_ns, row)
        if step.signal is not None:
            assert step.signal.probabilities is not None
            rows.append(step.features)
            said.append(step.signal.probabilities[0])
    return np.array(rows), np.array(said)


def research(made: Made, model: str, rows: np.ndarray) -> tuple[Manifest, np.ndarray]:
    """What the bundle's own model says for these consecutive rows."""
    bundle = made.bundles / model
    manifest = load_bundle(bundle)
    loaded = load_research(bundle, manifest)
    if loaded.answer is not None:
        inputs = stepped_inputs(rows, manifest, len(rows), loaded.answer)
        return manifest, loaded.answer(inputs)["probabilities"]
    if len(manifest.inputs[0].shape) == 2:
        window = manifest.inputs[0].shape[0]
        views = np.lib.stride_tricks.sliding_window_view(rows, window, axis=0).transpose(0, 2, 1)
        return manifest, loaded.predict(np.ascontiguousarray(views))
    return manifest, loaded.predict(rows)


@pytest.mark.parametrize("suffix", ["-gbdt", "-lstm", "-lstm-step"])
def test_streamed_numbers_are_researchs(made: Made, suffix: str) -> None:
    model = made.model(suffix)
    with Client(f"local://{made.repository}") as client:
        rows, said = streamed(Stream(client, model, deadline_ms=5_000), made)
    window = load_bundle(made.bundles / model).inputs[0].shape[0] - 1 if suffix == "-lstm" else 0
    matrix = made.table.features[: len(rows) + window]
    assert rows.tobytes() == matrix[window:].tobytes()
    manifest, expected = research(made, model, matrix)
    assert len(said) > 500
    np.testing.assert_allclose(said, expected, rtol=manifest.tolerance.rtol, atol=manifest.tolerance.atol)


def test_a_server_killed_in_mid_stream_loses_no_streams_state(made: Made) -> None:
    """Two servers; the one in use is killed with SIGKILL, and the other carries on from what the caller holds."""
    model = made.model("-lstm-step")
    folder = newest_versions(made.repository)[model]
    with (
        EmbeddedTriton(made.repository, ANY_PORTS, models=[model]) as server,
        Client(server.http_url, manifest=folder, deadline_ms=5_000) as client,
    ):
        _, whole = streamed(Stream(client, model, deadline_ms=5_000), made)
    first = EmbeddedTriton(made.repository, ANY_PORTS, models=[model])
    first.start()
    try:
        with EmbeddedTriton(made.repository, ANY_PORTS, models=[model]) as second:
            said, failures = killed_on_the_way(made, model, folder, first, second)
    finally:
        first.stop()
    assert failures <= 5
    # An event whose call failed has no number of its own; every other one has the same bits.
    assert len(said) == len(whole) - failures
    assert {row.tobytes() for row in said} <= {row.tobytes() for row in whole}
    assert said[-1_000:].tobytes() == whole[-1_000:].tobytes()


def killed_on_the_way(
    made: Made, model: str, folder: Path, first: EmbeddedTriton, second: EmbeddedTriton
) -> tuple[np.ndarray, int]:
    urls = [first.http_url, second.http_url]
    said, failures = [], 0
    with Client(urls, manifest=folder, deadline_ms=5_000) as client:
        stream = Stream(client, model, deadline_ms=5_000)
        for place, (ts_ns, row) in enumerate(made.events()):
            if place == EVENTS // 2:
                assert first.pid is not None
                os.kill(first.pid, signal.SIGKILL)
            try:
                step = stream.feed(ts_ns, row)
            except RequestError:
                failures += 1
                continue
            if step.signal is not None:
                assert step.signal.flags.count("state_reset") == 0
                assert step.signal.probabilities is not None
                said.append(step.signal.probabilities[0])
    return np.array(said), failures


def test_an_engine_that_ends_goes_on_from_its_snapshot(made: Made) -> None:
    for suffix in ("-gbdt", "-lstm", "-lstm-step"):
        model = made.model(suffix)
        with Client(f"local://{made.repository}") as client:
            _, whole = streamed(Stream(client, model, deadline_ms=5_000), made, 3_000)
        saved, said = b"", []
        with Client(f"local://{made.repository}") as client:
            stream = Stream(client, model, deadline_ms=5_000)
            for place, (ts_ns, row) in enumerate(made.events(3_000)):
                if place in (500, 1_777):
                    saved, stream = stream.snapshot(), Stream(client, model, deadline_ms=5_000)
                    stream.restore(saved)
                step = stream.feed(ts_ns, row)
                if step.signal is not None and step.signal.probabilities is not None:
                    said.append(step.signal.probabilities[0])
        assert np.array(said).tobytes() == whole.tobytes()
