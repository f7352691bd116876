"""Swaps on the running server: nobody notices a good one, and a bad one never serves."""

from __future__ import annotations

import http.client
import json
import shutil
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from export.repository import force
from export.repository.places import Local
from serving import loading, memory_sentinel, stubs, triton_files, view
from serving.embedded import EmbeddedTriton
from serving.golden import infer
from serving.swap import KEEP, Swapped, rollback, swap
from serving.target import Target
from tests.serving.conftest import ANY_PORTS, FEATURES, STUBS, Tiny, edit_config, publish_tiny
from tests.waiting import wait_until
from tickserve.client import Client
from tickserve.config import ExportSettings, SwapSettings
from tickserve.current import read_current
from tickserve.errors import (
    ArtifactError,
    ComponentError,
    DigestMismatchError,
    GateRefusedError,
    ServerRejectedError,
    SignatureError,
)
from tickserve.manifest import load_manifest
from tickserve.signing import generate_key, sign_version
from tickserve.store import sha256_file

QUICK = SwapSettings(drain_quiet_ms=150, memory_requests=64)
ROWS = np.random.default_rng(7).normal(size=(1, FEATURES)).astype(np.float32)
LEAKS, DRIFTS = 666, 667
FEWER = ExportSettings(max_batch=8, preferred_batch_rows=(4, 8))  # fewer than the golden rows, too

# The real backend, except that models trained with two certain seeds misbehave once they serve, and a row of sevens
# takes its time.
SPOILT = """
import json
import time
from pathlib import Path
exec(compile(Path({real!r}).read_text(), {real!r}, "exec"), globals())
Honest = TritonPythonModel

class TritonPythonModel(Honest):
    def initialize(self, args):
        self._seed, self._kept = None, []
        super().initialize(args)
        folder = Path(args["model_repository"]) / args["model_version"]
        self._seed = json.loads((folder / "manifest.json").read_text())["provenance"]["seed"]

    def execute(self, requests):
        if self._seed == {leaks}:
            self._kept.append(bytearray(150_000))
        return super().execute(requests)

    def run(self, inputs):
        if (inputs[0] == 7).all():
            Path({scoring!r}).touch()
            time.sleep(1.5)
        outputs = super().run(inputs)
        if self._seed == {drifts}:
            outputs = [o + 0.01 if o.dtype.kind == "f" else o for o in outputs]
        return outputs
"""


@dataclass
class Served:
    """A server, its repository, what was published under each name, and a file that is there once sevens are scored."""

    server: EmbeddedTriton
    repository: Path
    tiny: dict[str, Tiny]
    scoring: Path

    @property
    def target(self) -> Target:
        return self.server.target

    def swap(self, model: str, version: int | None = None, **options: Any) -> Swapped:
        return swap(self.target, model, version, **{"settings": QUICK, **options})


def publish_next(repository: Path, name: str, seed: int) -> Tiny:
    """The next version, which a running server is to swap to."""
    return publish_tiny(repository, name, seed, activate=False)


def in_force(repository: Path, model: str) -> int | None:
    current = read_current(repository / model)
    return current and current.version


MODELS = ("good", "again", "bad", "unsigned", "config", "paced", "slow", "stuck")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("swap")
    spoilt, scoring = folder / "model.py", folder / "scoring"
    names = {"real": str(triton_files.OUR_BACKEND), "scoring": str(scoring)}
    spoilt.write_text(SPOILT.format(leaks=LEAKS, drifts=DRIFTS, **names))
    tiny = {name: publish_tiny(folder / "models", name, 1) for name in MODELS}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_files, "OUR_BACKEND", spoilt)
        with EmbeddedTriton(folder / "models", STUBS, log=folder / "triton.log") as server:
            yield Served(server, folder / "models", tiny, scoring)


@dataclass
class Traffic:
    """What open-loop callers saw: the answers by (version, bundle id), and the errors."""

    answers: dict[tuple[int | None, int], int] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    @property
    def count(self) -> int:
        return sum(self.answers.values())


@contextmanager
def traffic(
    url: str,
    manifest: Any,
    models: list[str],
    truth: Callable[[str, int], int],
    *,
    rate: float,
    threads: int = 4,
    **options: Any,
) -> Iterator[Traffic]:
    """`rate` requests a second from `threads` callers, each at times fixed beforehand, until the block ends."""
    seen, done, lock = Traffic(), threading.Event(), threading.Lock()

    def call(number: int) -> None:
        period, due = threads / rate, time.monotonic() + number / rate
        with Client(url, manifest=manifest, deadline_ms=5_000, **options) as client:
            while not done.wait(max(0.0, due - time.monotonic())):
                due = max(due + period, time.monotonic() - 1)
                model = models[number % len(models)]
                try:
                    signal = client.score(model, ROWS)
                except Exception as error:
                    with lock:
                        seen.errors.append(repr(error))
                    continue
                key = (signal.version, signal.bundle_id)
                with lock:
                    seen.answers[key] = seen.answers.get(key, 0) + 1
                    if signal.version is None or truth(model, signal.version) != signal.bundle_id:
                        seen.wrong.append(f"{model} {key}")

    callers = [threading.Thread(target=call, args=(number,)) for number in range(threads)]
    for caller in callers:
        caller.start()
    try:
        yield seen
    finally:
        done.set()
        for caller in callers:
            caller.join()


def ids_of(*published: Tiny) -> Callable[[str, int], int]:
    """The bundle id that each version has to answer with."""
    ids = {(tiny.name, int(tiny.path.name)): tiny.manifest.bundle_id() for tiny in published}
    return lambda model, version: ids[model, version]


def probabilities(served: Served, model: str) -> np.ndarray:
    with Client(served.server.http_url, manifest=served.repository / model / "1", deadline_ms=5_000) as client:
        answer = client.score(model, ROWS).probabilities
        assert answer is not None
        return answer


def test_a_swap_serves_the_new_version_and_frees_the_old(served: Served) -> None:
    new = publish_next(served.repository, "good", 2)
    before = {pid for pid, stub in stubs.stubs_of(served.server.pid).items() if stub.model == "good"}
    flips: list[tuple[int, set[int]]] = []

    def flipped(version: int, _: object) -> None:
        both = stubs.stubs_of(served.server.pid).values()
        flips.append((version, {stub.pid for stub in both if (stub.model, stub.version) == ("good", 1)}))

    done = served.swap("good", flipped=flipped)
    assert (done.model, done.version, done.previous, done.drained) == ("good", 2, 1, True)
    assert list(done.steps_ms) == ["verify", "load", "warm", "golden", "memory", "flip", "drain", "unload"]
    assert flips == [(2, before)], "the version that serves is not loaded again"
    assert isinstance(done.memory, memory_sentinel.Memory)
    assert done.memory.requests == QUICK.memory_requests
    assert served.server.versions["good"] == (2,)
    assert served.server.models["good"].bundle_id() == new.manifest.bundle_id()
    assert in_force(served.repository, "good") == 2
    after = [stub for stub in stubs.stubs_of(served.server.pid).values() if stub.model == "good"]
    assert [stub.version for stub in after] == [2]
    assert not before & {stub.pid for stub in after}
    assert not (served.target.view / "good" / "1").exists()  # type: ignore[operator]
    assert json.loads(json.dumps(done.to_json()))["memory"]["requests"] == QUICK.memory_requests


def test_a_swap_to_what_serves_checks_it_again_and_changes_nothing(served: Served) -> None:
    done = served.swap("again", 1)
    assert (done.version, done.previous, done.drained) == (1, None, True)
    assert served.server.versions["again"] == (1,)
    assert len([stub for stub in stubs.stubs_of(served.server.pid).values() if stub.model == "again"]) == 1


@pytest.mark.system
@pytest.mark.parametrize("scheme", ["http", "grpc"])
def test_nobody_notices_swaps_and_rollbacks_under_load(served: Served, scheme: str) -> None:
    """Faults 17 and 18: clients that follow; every answer is from the version that was asked for."""
    other = publish_next(served.repository, "paced", 2)
    url = f"{scheme}://{served.server.http_url if scheme == 'http' else served.server.grpc_url}"
    truth = ids_of(served.tiny["paced"], other)
    with traffic(url, served.repository, ["paced"], truth, rate=200, follow_ms=20) as seen:
        time.sleep(0.3)
        assert served.swap("paced", 2).drained
        time.sleep(0.3)
        assert rollback(served.target, "paced", settings=QUICK).version == 1
        time.sleep(0.3)
    assert seen.errors == []
    assert seen.wrong == []
    assert {version for version, _ in seen.answers} == {1, 2}
    assert min(seen.answers.values()) > 20
    assert in_force(served.repository, "paced") == 1


def truncate(new: Tiny) -> None:
    (new.path / "model.onnx").write_bytes((new.path / "model.onnx").read_bytes()[:-1])


def half_uploaded(new: Tiny) -> None:
    (new.path / "golden.npz").unlink()


def drift_at_load(new: Tiny) -> None:
    """Every digest agrees, and the graph gives other numbers than its golden pairs."""
    other = publish_tiny(new.path.parents[2] / "elsewhere", new.name, 5)
    shutil.copy(other.path / "golden.npz", new.path / "golden.npz")
    manifest = json.loads((new.path / "manifest.json").read_text())
    manifest["export"]["golden_sha256"] = sha256_file(new.path / "golden.npz")
    (new.path / "manifest.json").write_text(json.dumps(manifest))
    digest, name = sha256_file(new.path / "manifest.json"), f"manifest.{new.path.name}"
    edit_config(new.path.parent, lambda config: config.parameters[name].__setattr__("string_value", digest))


def nothing(new: Tiny) -> None:
    """What it was trained with is enough."""


BAD: dict[str, tuple[int, Callable[[Tiny], None], type[Exception], str]] = {
    "15 corrupt": (11, truncate, DigestMismatchError, r"'verify'.*model\.onnx"),
    "16 half uploaded": (12, half_uploaded, ArtifactError, r"'verify'.*golden\.npz"),
    "drifted, refused by the backend": (13, drift_at_load, ServerRejectedError, r"'load'.*golden probabilities"),
    "drifted, found over the wire": (DRIFTS, nothing, GateRefusedError, r"'golden'.*expected research's number"),
    "leaking": (LEAKS, nothing, GateRefusedError, r"'memory'.*memory grows: expected .* MB more"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_version_never_serves_and_the_old_one_does(served: Served, case: str) -> None:
    seed, spoil, error, says = BAD[case]
    truth = probabilities(served, "bad")
    new = publish_next(served.repository, "bad", seed)
    spoil(new)
    version, ids = int(new.path.name), ids_of(served.tiny["bad"])
    refusal = rf"model 'bad' version {version} refused at step {says}.*version 1 serves as before"
    with traffic(served.server.http_url, served.repository / "bad" / "1", ["bad"], ids, rate=100) as seen:
        assert wait_until(lambda: seen.count > 5)
        with pytest.raises(error, match=refusal):
            served.swap("bad")
        refused = seen.count
        assert wait_until(lambda: seen.count > refused)
    assert (seen.errors, seen.wrong) == ([], [])
    assert in_force(served.repository, "bad") == 1
    assert served.server.versions["bad"] == (1,)
    assert not served.target.control.ready("bad", version)
    assert [s.version for s in stubs.stubs_of(served.server.pid).values() if s.model == "bad"] == [1]
    assert served.server.problem is None
    np.testing.assert_array_equal(probabilities(served, "bad"), truth)


def test_an_unsigned_version_never_serves_and_the_same_one_signed_does(served: Served) -> None:
    key, stranger = generate_key(), generate_key()
    new = publish_next(served.repository, "unsigned", 2)
    trusted = {key.key_id: key.public()}
    with pytest.raises(SignatureError, match="refused at step 'verify'"):
        served.swap("unsigned", trusted=trusted)
    sign_version(new.path, 2, stranger)
    with pytest.raises(SignatureError, match="version 1 serves as before"):
        served.swap("unsigned", trusted=trusted)
    assert served.server.versions["unsigned"] == (1,)
    sign_version(new.path, 2, key)
    assert served.swap("unsigned", trusted=trusted).version == 2


@pytest.mark.system
def test_a_changed_configuration_comes_with_the_new_version(served: Served) -> None:
    """Then Triton loads the old version anew as well, beside itself: nobody notices that either."""
    other = publish_next(served.repository, "config", 2)
    edit_config(served.repository / "config", lambda config: config.instance_group[0].__setattr__("count", 2))
    with traffic(
        served.server.http_url,
        served.repository,
        ["config"],
        ids_of(served.tiny["config"], other),
        rate=100,
        follow_ms=20,
    ) as seen:
        assert served.swap("config").drained
    assert (seen.errors, seen.wrong) == ([], [])
    assert [s.version for s in stubs.stubs_of(served.server.pid).values() if s.model == "config"] == [2, 2]
    assert served.server.problem is None


def rows_of(server: EmbeddedTriton, model: str) -> int:
    """The largest batch that the server takes, as it tells anyone."""
    with urllib.request.urlopen(f"http://{server.http_url}/v2/models/{model}/config", timeout=10) as answer:
        return int(json.load(answer)["max_batch_size"])


def noted(server: EmbeddedTriton, rows: list[int]) -> Callable[..., None]:
    """What a swap calls at its flip: it keeps the largest batch of `tiny` while both versions are loaded."""
    return lambda *_: rows.append(rows_of(server, "tiny"))


def answered(server: EmbeddedTriton, tiny: Tiny, rows: int) -> bool:
    """Whether a request of that many rows is answered, or else refused for them."""
    connection = http.client.HTTPConnection(server.http_url, timeout=10)
    try:
        infer(connection, tiny.name, int(tiny.path.name), {"features": np.repeat(ROWS, rows, axis=0)})
    except ServerRejectedError as error:
        if "batch-size must be <=" not in str(error):
            raise
        return False
    finally:
        connection.close()
    return True


@pytest.mark.system
def test_a_version_gated_for_fewer_rows_waits_is_swapped_in_and_out(repository: Path) -> None:
    """64 rows in force; 8 wait; a server starts, swaps to them and back; and starts again with either."""
    first = Tiny("tiny", np.empty(0), repository / "tiny" / "1", load_manifest(repository / "tiny" / "1"))
    second = publish_tiny(repository, "tiny", 2, FEWER, activate=False)
    ids = ids_of(first, second)
    both: list[int] = []
    with EmbeddedTriton(repository, STUBS) as server:
        assert server.versions["tiny"] == (1,)
        assert answered(server, first, 64)
        with traffic(server.http_url, repository, ["tiny"], ids, rate=50, follow_ms=20) as seen:
            assert swap(server.target, "tiny", 2, settings=QUICK, flipped=noted(server, both)).drained
            assert both == [8], "while both are loaded too"
            assert rows_of(server, "tiny") == 8
            assert (answered(server, second, 8), answered(server, second, 9)) == (True, False)
            assert rollback(server.target, "tiny", settings=QUICK).drained
        assert (seen.errors, seen.wrong) == ([], [])
        assert server.versions["tiny"] == (1,)
        assert answered(server, first, 64)
        assert swap(server.target, "tiny", 2, settings=QUICK).drained
    with EmbeddedTriton(repository, STUBS) as server:
        assert server.versions["tiny"] == (1, 2)
        assert server.refused == {}
        assert (answered(server, second, 8), answered(server, second, 9)) == (True, False)
        force.rollback(Local(repository), "tiny", 1, keep=KEEP)  # in the files, for whoever starts a server
        assert swap(server.target, "tiny", 1, settings=QUICK).drained
        assert answered(server, first, 64)


def test_a_version_that_is_still_asked_for_stays(served: Served) -> None:
    publish_next(served.repository, "stuck", 2)
    impatient = QUICK.model_copy(update={"drain_timeout_s": 0.5})
    ids = ids_of(served.tiny["stuck"])
    with traffic(served.server.http_url, served.repository / "stuck" / "1", ["stuck"], ids, rate=100) as seen:
        done = served.swap("stuck", settings=impatient)
    assert not done.drained
    assert (seen.errors, seen.wrong) == ([], [])
    assert served.server.versions["stuck"] == (1, 2)
    assert served.swap("stuck").drained
    assert served.server.versions["stuck"] == (2,)


def test_a_request_in_flight_is_answered_by_the_version_it_asked(served: Served) -> None:
    """Fault 18, with a request that takes longer than the drain waits for another one."""
    publish_next(served.repository, "slow", 2)
    hasty, answers = QUICK.model_copy(update={"drain_quiet_ms": 20}), []
    with Client(served.server.http_url, manifest=served.repository / "slow" / "1", deadline_ms=10_000) as client:
        sevens = np.full((1, FEATURES), 7, np.float32)
        asking = threading.Thread(target=lambda: answers.append(client.score("slow", sevens)))

        def flipped(*_: object) -> None:
            served.scoring.unlink(missing_ok=True)
            asking.start()
            assert wait_until(served.scoring.exists)

        served.swap("slow", 2, settings=hasty, flipped=flipped)
        asking.join()
    assert [(signal.ok, signal.version) for signal in answers] == [(True, 1)]
    assert served.server.versions["slow"] == (2,)


def test_one_swap_of_a_model_at_a_time(served: Served) -> None:
    with served.target.locked("again"), pytest.raises(ComponentError, match="another swap of this model is under way"):
        served.swap("again", 1)


def test_a_flip_that_fails_is_taken_back(served: Served) -> None:
    publish_next(served.repository, "again", 2)
    files = [served.repository / "again" / name for name in ("current.json", "config.pbtxt")]
    before = [file.read_bytes() for file in files]

    def fail(*_: object) -> None:
        raise ComponentError("the engine refuses")

    with pytest.raises(ComponentError, match=r"refused at step 'flip'.*the engine refuses"):
        served.swap("again", 2, flipped=fail)
    assert [file.read_bytes() for file in files] == before
    assert served.server.versions["again"] == (1,)


@pytest.mark.parametrize(
    ("model", "version", "says"),
    [
        ("nobody", 1, "no such model"),
        ("../good", 1, "model"),
        ("", 1, "model"),
        ("again", 9, "version 9 refused at step 'verify'"),
    ],
)
def test_what_is_not_there_is_refused(served: Served, model: str, version: int, says: str) -> None:
    with pytest.raises(ArtifactError, match=says):
        served.swap(model, version)


def test_a_rollback_without_a_version_before_is_refused(served: Served) -> None:
    with pytest.raises(ArtifactError, match="no version before"):
        rollback(served.target, "bad", settings=QUICK)


@pytest.mark.system
def test_a_server_elsewhere_swaps_by_the_list_in_the_load_request(repository: Path, tmp_path: Path) -> None:
    """As production's Triton with explicit control: its own repository, no view, the credential from outside.

    Version 2 takes fewer rows, which is in the load request as well.
    """
    publish_tiny(repository, "tiny", 2, FEWER, activate=False)
    server = EmbeddedTriton(repository, ANY_PORTS)
    server.start()
    try:
        for numbers in ([1, 2], [1]):  # the folders of both, as a repository of its own has them
            view.show(repository / "tiny", server.target.view / "tiny", numbers)  # type: ignore[operator]
        for grpc in (server.grpc_url, None):
            away = Target(server.http_url, grpc, server.credential, repository)
            old = loading.Loader(away, "tiny", 20).served()
            both: list[int] = []
            done = swap(away, "tiny", 3 - old[0], settings=QUICK, flipped=noted(server, both))
            assert both == [8]
            assert done.drained
            assert "not measured" in str(done.memory)
            assert away.control.versions("tiny") == (3 - old[0],)
        with pytest.raises(ServerRejectedError, match="restricted"):
            swap(Target(server.http_url, server.grpc_url, None, repository), "tiny", 2, settings=QUICK)
    finally:
        server.stop()


@pytest.mark.system
@pytest.mark.timeout(1_800)
def test_200_swaps_at_500_requests_a_second(tmp_path: Path) -> None:
    """Fault 17. Four models at once, fifty swaps each, under HTTP and gRPC: no call fails, nothing is left."""
    names = [f"model{number}" for number in range(4)]
    published = [publish_tiny(tmp_path / "models", name, seed) for name in names for seed in (2, 3)]
    truth, failures = ids_of(*published), []
    server = EmbeddedTriton(tmp_path / "models", ANY_PORTS)
    server.start()
    try:
        target, process = server.target, psutil.Process(server.pid)
        settings = QUICK.model_copy(update={"drain_quiet_ms": 200})
        for name in names:
            swap(target, name, 1, settings=settings)

        def many(name: str) -> None:
            for number in range(50):
                try:
                    done = swap(target, name, 2 - number % 2, settings=settings)
                    if not done.drained:
                        failures.append(f"{name} {number} not drained")
                except Exception as error:
                    failures.append(f"{name} {number}: {error!r}")

        before, files, children = _resident(process), process.num_fds(), len(process.children())
        with (
            traffic(server.http_url, tmp_path / "models", names, truth, rate=250, follow_ms=50) as some,
            traffic(f"grpc://{server.grpc_url}", tmp_path / "models", names, truth, rate=250, follow_ms=50) as others,
        ):
            swapping = [threading.Thread(target=many, args=(name,)) for name in names]
            for thread in swapping:
                thread.start()
            for thread in swapping:
                thread.join()
        assert failures == []
        for seen in (some, others):
            assert (seen.errors[:3], seen.wrong[:3]) == ([], [])
            assert seen.count > 1_000
        assert len(process.children()) == children == 0
        assert process.num_fds() <= files + 8
        assert _resident(process) < 1.15 * before
        assert server.revived == []
    finally:
        server.stop()


def _resident(process: psutil.Process) -> int:
    return stubs.resident_bytes([process.pid, *(child.pid for child in process.children())])
