"""Our `onnxruntime` backends inside the real server: one bad row fails alone, and a GPU is never silently a CPU."""

from __future__ import annotations

import http.client
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from monitoring.triton_metrics import scrape
from serving.embedded import EmbeddedTriton
from serving.golden import infer
from tests.serving.conftest import BACKENDS, FEATURES, STUBS, edit_config, publish_tiny
from tickserve.config import ServeSettings
from tickserve.errors import ServerRejectedError, ServerStartError


@BACKENDS
def test_a_row_that_cannot_be_scored_fails_alone(tmp_path: Path, settings: ServeSettings) -> None:
    """Requests that Triton put into one batch: the bad ones get errors, their neighbours their numbers."""
    tiny = publish_tiny(tmp_path, "fragile", 3, fragile=True)

    def long_queue(config: object) -> None:
        # Long enough that requests sent together are scored together.
        config.dynamic_batching.max_queue_delay_microseconds = 200_000  # type: ignore[attr-defined]

    edit_config(tmp_path / "fragile", long_queue)

    def ask(index: int) -> np.ndarray | str:
        row = np.full((1, FEATURES), 0.1 * index, np.float32)
        row[0, 0] = 99 if index % 3 == 0 else 2
        connection = http.client.HTTPConnection(server.http_url, timeout=30)
        try:
            answer = infer(connection, "fragile", 1, {"features": row})["probabilities"]
        except ServerRejectedError as error:
            return str(error)
        finally:
            connection.close()
        assert np.abs(answer - tiny.research(row)).max() < 1e-6
        return answer

    with EmbeddedTriton(tmp_path, settings) as server:
        before = scrape(server.metrics_url)["fragile", "1"]
        with ThreadPoolExecutor(12) as threads:
            answers = list(threads.map(ask, range(12)))
        after = scrape(server.metrics_url)["fragile", "1"]
    assert after.executions - before.executions < 12, "the requests were not batched"
    for index, answer in enumerate(answers):
        if index % 3 == 0:
            assert isinstance(answer, str)
            assert "cannot score this request" in answer
            assert str(tmp_path) not in answer
        else:
            assert isinstance(answer, np.ndarray)


@BACKENDS
def test_a_gpu_that_cannot_be_used_is_refused(repository: Path, settings: ServeSettings) -> None:
    """No GPU here, or one without ONNX Runtime's CUDA provider: either way not served from the CPU."""
    if "CUDAExecutionProvider" in ort.get_available_providers():
        pytest.skip("this environment's ONNX Runtime can use a GPU")
    edit_config(repository / "tiny", lambda config: config.instance_group[0].__setattr__("kind", 1))
    with pytest.raises(ServerStartError, match=r"(?i)gpu"):
        EmbeddedTriton(repository, settings).start()


def test_a_module_where_the_server_is_started_is_not_the_backend(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stub imports from its working folder first: a `model.py` of the user's there must not be the one it loads."""
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "model.py").write_text("raise SystemExit('the wrong file')\n")
    tiny = publish_tiny(tmp_path / "models", "tiny", 3)
    monkeypatch.chdir(tmp_path / "work")
    with EmbeddedTriton(tmp_path / "models", STUBS) as server:
        connection = http.client.HTTPConnection(server.http_url, timeout=30)
        row = np.full((1, FEATURES), 0.5, np.float32)
        answer = infer(connection, "tiny", 1, {"features": row})["probabilities"]
        connection.close()
    assert np.abs(answer - tiny.research(row)).max() < 1e-6
