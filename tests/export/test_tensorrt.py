"""TensorRT: keys, refusal of foreign and damaged plans, profiles, the config's accelerator, and the job without a GPU.

No machine with a GPU has run the builder. What it asks of the `tensorrt` package is recorded by `RecordedTensorrt`,
which stands in for the package and for the sequence of calls only: it builds nothing and scores nothing.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import kubernetes_validate
import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from export import export_bundle
from export.check_model import read_model
from export.publish import NO_TERMS, publish
from export.repository.places import Local
from export.repository.source import Folder
from export.repository.sync import sync
from export.repository.transfer import transfer
from export.runtime import open_session, run
from export.tensorrt import accept
from export.tensorrt.accelerator import accelerator_parameters, runs_on_tensorrt
from export.tensorrt.build import build_flags, build_plan, check_buildable
from export.tensorrt.engine import Engine
from export.tensorrt.job import default_path, job_name, job_text
from export.tensorrt.plan import PlanKey, check_native, plan_folder, read_plan, read_whole, write_plan
from export.tensorrt.profiles import Profile, profile_for, profiles_of
from export.tensorrt.target import Target, missing
from export.triton_config import build_config, parse_config
from serving.embedded import EmbeddedTriton
from serving.view import lay_out_models
from tests.export import tiny
from tickserve.cli.commands import app
from tickserve.client import Client
from tickserve.config import Config, ExportSettings, ServeSettings, TensorrtSettings
from tickserve.errors import (
    ArtifactError,
    ComponentError,
    ConfigError,
    DigestMismatchError,
    ForeignPlanError,
    GateRefusedError,
    UsageError,
)
from tickserve.manifest import Manifest
from tickserve.model_config import ACCELERATOR_PARAMETERS

L4 = Target("NVIDIA L4", "8.9", "570.86.15", "10.13.3.9")
GRAPH = "sha256:" + "a" * 64
PLAN = b"engine bytes" * 100
FLAGS: dict[str, Any] = {"version_compatible": False, "hardware_compatible": "none"}


def net(**changes: Any) -> Manifest:
    return tiny.manifest_of("net", 1, **({"family": "lstm", "nan_policy": "impute_mean"} | changes))


@pytest.fixture
def version(tmp_path: Path) -> Path:
    return tiny.publish_seeds(tmp_path / "repository", 1)[0]


@pytest.fixture
def stored(version: Path) -> Path:
    return write_plan(version, PlanKey.of(L4, GRAPH, FLAGS), PLAN, {"gpu": L4.gpu})


def test_a_key_names_everything_a_plan_is_bound_to() -> None:
    base = PlanKey.of(L4, GRAPH, FLAGS)
    assert re.fullmatch(r"[0-9a-f]{16}", base.text())
    others = {
        PlanKey.of(Target(L4.gpu, "9.0", L4.driver, L4.tensorrt), GRAPH, FLAGS).text(),
        PlanKey.of(Target(L4.gpu, L4.sm, "570.86.16", L4.tensorrt), GRAPH, FLAGS).text(),
        PlanKey.of(Target(L4.gpu, L4.sm, L4.driver, "10.14.0.1"), GRAPH, FLAGS).text(),
        PlanKey.of(L4, "sha256:" + "b" * 64, FLAGS).text(),
        PlanKey.of(L4, GRAPH, FLAGS | {"precision": "fp16"}).text(),
    }
    assert len(others | {base.text()}) == 6
    assert PlanKey.of(L4, GRAPH, dict(reversed(FLAGS.items()))).text() == base.text()


def test_a_plan_reads_back_and_is_never_written_twice(stored: Path, version: Path) -> None:
    key = PlanKey.of(L4, GRAPH, FLAGS)
    assert stored == plan_folder(version, key) == version / "plans" / key.text()
    assert read_plan(stored, L4, GRAPH) == (PLAN, key)
    with pytest.raises(ComponentError, match="exists already"):
        write_plan(version, key, b"another", {})
    assert read_plan(stored, L4, GRAPH)[0] == PLAN
    assert [path.name for path in (version / "plans").iterdir()] == [key.text()], "nothing staged is left"


@pytest.mark.parametrize(
    ("field", "target", "graph"),
    [
        ("sm", Target("NVIDIA H100", "9.0", L4.driver, L4.tensorrt), GRAPH),
        ("tensorrt", Target(L4.gpu, L4.sm, L4.driver, "10.14.0.1"), GRAPH),
        ("driver", Target(L4.gpu, L4.sm, "580.65.06", L4.tensorrt), GRAPH),
        ("onnx_sha256", L4, "sha256:" + "b" * 64),
    ],
)
def test_a_foreign_plan_is_refused(stored: Path, field: str, target: Target, graph: str) -> None:
    with pytest.raises(ForeignPlanError) as refused:
        read_plan(stored, target, graph)
    assert refused.value.field == field
    assert refused.value.exit_code == 3


def test_compatible_plans_travel_as_far_as_tensorrt_lets_them() -> None:
    versions = PlanKey.of(L4, GRAPH, FLAGS | {"version_compatible": True})
    later = Target(L4.gpu, L4.sm, L4.driver, "10.14.0.1")
    check_native(versions, later, GRAPH)
    for release in ("11.0.0.1", "10.12.0.36", "unknown"):
        with pytest.raises(ForeignPlanError):
            check_native(versions, Target(L4.gpu, L4.sm, L4.driver, release), GRAPH)
    hardware = PlanKey.of(L4, GRAPH, FLAGS | {"hardware_compatible": "ampere_plus"})
    check_native(hardware, Target("NVIDIA A100", "8.0", L4.driver, L4.tensorrt), GRAPH)
    with pytest.raises(ForeignPlanError):
        check_native(hardware, Target("NVIDIA T4", "7.5", L4.driver, L4.tensorrt), GRAPH)
    with pytest.raises(ForeignPlanError):
        check_native(PlanKey.of(L4, GRAPH, FLAGS | {"hardware_compatible": "same_compute_capability"}),
                     Target("NVIDIA H100", "9.0", L4.driver, L4.tensorrt), GRAPH)  # fmt: skip


def test_a_damaged_plan_is_refused(stored: Path) -> None:
    plan = stored / "model.plan"
    for damaged in (PLAN[:-1], PLAN[:-1] + b"?", b""):
        plan.write_bytes(damaged)
        with pytest.raises(DigestMismatchError):
            read_plan(stored, L4, GRAPH)
    plan.unlink()
    with pytest.raises(ArtifactError, match="no plain file"):
        read_plan(stored, L4, GRAPH)
    (stored.parent / "elsewhere.plan").write_bytes(PLAN)
    plan.symlink_to(stored.parent / "elsewhere.plan")
    with pytest.raises(ArtifactError, match="no plain file"):
        read_plan(stored, L4, GRAPH)


@pytest.mark.parametrize(
    "record", [b"", b"[]", b"{", b"{}", b'{"schema_version": 1}', b'{"schema_version": 1, "key": {"sm": 1}}', b"\xff"]
)
def test_a_record_that_is_none_is_refused(stored: Path, record: bytes) -> None:
    (stored / "plan.json").write_bytes(record)
    with pytest.raises(ArtifactError):
        read_whole(stored)


def test_a_plan_under_another_key_is_refused(stored: Path) -> None:
    record = json.loads((stored / "plan.json").read_bytes())
    record["key"]["driver"] = "580.65.06"
    (stored / "plan.json").write_text(json.dumps(record))
    with pytest.raises(DigestMismatchError):
        read_plan(stored, Target(L4.gpu, L4.sm, "580.65.06", L4.tensorrt), GRAPH)


def test_profiles_cover_every_batch_once() -> None:
    profiles = profiles_of((8, 32), 256)
    assert profiles == (Profile(1, 1, 1), Profile(2, 8, 8), Profile(9, 32, 32), Profile(33, 256, 256))
    chosen = [profile_for(rows, profiles) for rows in range(1, 257)]
    assert chosen == sorted(chosen)
    assert set(chosen) == {0, 1, 2, 3}
    assert profiles_of((), 1) == (Profile(1, 1, 1),)
    for rows in (0, 257):
        with pytest.raises(UsageError, match="1 to 256"):
            profile_for(rows, profiles)
    with pytest.raises(UsageError, match="preferred_batch_rows"):
        profiles_of((512,), 256)


def test_a_forest_is_not_for_tensorrt(trees_bundle: Path, repository: Path, settings: ExportSettings) -> None:
    published = export_bundle(trees_bundle, repository, settings)
    with pytest.raises(ArtifactError, match="TensorRT has no TreeEnsembleClassifier"):
        check_buildable(published.manifest, read_model(published.path / "model.onnx"))
    assert not runs_on_tensorrt(published.manifest)


def test_the_accelerator_is_written_for_nets_and_a_cpu_backend_reads_past_it() -> None:
    settings = tiny.SETTINGS.model_copy(update={"tensorrt": "accelerator"})
    text = build_config(net(precision="fp16"), settings, {})
    options = parse_config(text)
    assert options.tensorrt
    assert set(accelerator_parameters(net(), settings)) == ACCELERATOR_PARAMETERS
    for part in ('name: "tensorrt"', 'value: "FP16"', 'value: "features:1x4"', 'value: "features:16x4"'):
        assert part in text
    assert parse_config(build_config(net(), tiny.SETTINGS, {})) == parse_config(
        build_config(tiny.manifest_of("net", 1), settings.model_copy(update={"tensorrt": "off"}), {})
    )
    assert not parse_config(build_config(tiny.manifest_of("trees", 1), settings, {})).tensorrt, "a forest: none"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('key: "trt_profile_opt_shapes"', 'key: "trt_dla_enable"'),
        ('name: "tensorrt"', 'name: "openvino"'),
        ("gpu_execution_accelerator", "cpu_execution_accelerator"),
    ],
)
def test_any_other_accelerator_is_refused(old: str, new: str) -> None:
    text = build_config(net(), tiny.SETTINGS.model_copy(update={"tensorrt": "accelerator"}), {})
    assert old in text
    with pytest.raises(ArtifactError, match="execution_accelerators"):
        parse_config(text.replace(old, new))


VERSIONS = ("1.31", kubernetes_validate.latest_version())


@pytest.mark.parametrize("kubernetes", VERSIONS)
@pytest.mark.parametrize("product", ["", "NVIDIA-L4", 'evil"\n  hostPID: true #'])
def test_the_job_is_valid_whatever_the_settings_hold(kubernetes: str, product: str) -> None:
    config = Config(
        tensorrt=TensorrtSettings(gpu_product=product, image="registry.example.com/build@sha256:" + "a" * 64)
    )
    job = yaml.safe_load(job_text("net.fp16_v2", 7, config))
    kubernetes_validate.validate(job, kubernetes, strict=True)
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert "hostPID" not in pod
    assert pod["nodeSelector"] == (
        {"nvidia.com/gpu.product": product} if product else {"nvidia.com/gpu.present": "true"}
    )
    assert container["image"] == config.tensorrt.image
    assert container["args"] == ["tensorrt", "build", "net.fp16_v2", "--version", "7", "--repository", "/models"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert {"name": "models", "mountPath": "/models"} in container["volumeMounts"]
    assert pod["volumes"][0]["persistentVolumeClaim"]["claimName"] == config.tensorrt.claim
    assert pod["automountServiceAccountToken"] is False
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}


def test_the_job_builds_with_these_settings() -> None:
    settings = TensorrtSettings(version_compatible=True, hardware_compatible="ampere_plus", optimization_level=5)
    config = Config(tensorrt=settings, export=ExportSettings(preferred_batch_rows=(4, 16)))
    job = yaml.safe_load(job_text("net", 1, config))
    environment = {each["name"]: each["value"] for each in job["spec"]["template"]["spec"]["containers"][0]["env"]}
    from tickserve.settings import load_settings

    there = load_settings(environ=environment).config
    same = {"timing_cache": "/models/net/tensorrt.timing"}
    assert there.tensorrt == settings.model_copy(update=same)
    assert there.export.preferred_batch_rows == (4, 16)


def test_a_job_that_does_not_fit_is_refused_by_the_schema() -> None:
    job = yaml.safe_load(job_text("net", 1, Config()))
    job["spec"]["template"]["spec"]["nodeSelector"] = "gpu"
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(job, VERSIONS[1], strict=True)


def test_job_names_are_names_and_differ() -> None:
    names = {job_name(model, version) for model in ("a.b", "a_b", "a-b", "x" * 100) for version in (1, 12)}
    assert len(names) == 8
    assert all(re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", name) for name in names)
    assert default_path("net", 1) == Path("runs/tensorrt") / f"{job_name('net', 1)}.yaml"


@pytest.mark.skipif(not missing(), reason="this machine can build engines")
def test_without_a_gpu_the_command_says_what_is_missing_and_writes_the_job(
    version: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = set(tmp_path.iterdir())
    asked = ["tensorrt", "build", "tiny", "--repository", str(version.parents[1]), "--json"]
    for place, options in (("job.yaml", ["--job", "job.yaml"]), (str(default_path("tiny", 1)), [])):
        result = CliRunner().invoke(app, [*asked, *options])
        assert isinstance(result.exception, ComponentError)
        assert result.exception.exit_code == 4
        assert f"its job is in {place}" in str(result.exception)
        said = json.loads(result.stdout)
        assert said["job"] == place
        assert yaml.safe_load((tmp_path / place).read_text())["kind"] == "Job"
    assert {path.name for path in set(tmp_path.iterdir()) - before} == {"job.yaml", "runs"}
    assert said["missing"] == missing()
    assert any("tensorrt" in lack for lack in said["missing"])
    assert not (version / "plans").exists()


def test_a_plan_stays_where_it_was_built(version: Path, stored: Path, tmp_path: Path) -> None:
    """What docs/runtimes.md says: no copy of a version takes a plan along, and no server is shown one."""
    transfer(Local(version.parents[1]), Local(tmp_path / "pushed"), keep=2, terms=NO_TERMS)
    sync(Folder(version.parents[1]), tmp_path / "synced")
    lay_out_models(version.parents[1], {"tiny": [1]}, tmp_path / "view")
    assert (stored / "model.plan").is_file()
    for copy in ("pushed", "synced", "view"):
        assert (tmp_path / copy / "tiny" / "1" / "model.onnx").is_file()
        assert not list((tmp_path / copy).rglob("*plan*"))


def test_plans_are_listed_and_a_damaged_one_is_said(version: Path, stored: Path) -> None:
    asked = ["tensorrt", "list", "tiny", "--repository", str(version.parents[1]), "--json"]
    result = CliRunner().invoke(app, asked)
    assert result.exit_code == 0, result.output
    (row,) = json.loads(result.stdout)
    assert (row["plan"], row["sm"], row["driver"]) == (stored.name, "8.9", "570.86.15")
    assert row["state"].startswith("whole")
    (stored / "model.plan").write_bytes(b"engine")
    refused = CliRunner().invoke(app, asked)
    assert isinstance(refused.exception, ArtifactError)
    assert "wrong digest" in json.loads(refused.stdout)[0]["state"]


def test_an_unknown_version_is_refused(version: Path) -> None:
    asked = ["tensorrt", "build", "tiny", "--version", "9", "--repository", str(version.parents[1])]
    result = CliRunner().invoke(app, asked)
    assert isinstance(result.exception, ArtifactError)


def test_golden_pairs_go_through_every_profile_and_drift_is_refused(version: Path) -> None:
    from tickserve.manifest import load_manifest

    manifest, profiles = load_manifest(version), profiles_of((4, 8), 16)
    session = open_session(version / "model.onnx")
    gates = accept.hold(version, manifest, profiles, lambda inputs: run(session, inputs))
    assert [gate.measured["rows"] for gate in gates] == [1, 2, 4, 5, 8, 9, 16]

    def drifted(inputs: dict[str, Any]) -> dict[str, Any]:
        served = run(session, inputs)
        if len(inputs["features"]) == 16:
            served["probabilities"] = served["probabilities"] + np.float32(1e-3)
        return served

    with pytest.raises(GateRefusedError, match=r"tensorrt\.golden\.rows_16"):
        accept.hold(version, manifest, profiles, drifted)


class RecordedTensorrt:
    """Stands in for the `tensorrt` package: records what is asked of it, in order, and answers as little as it can.

    The names are those of TensorRT 10's Python interface; nothing here says that a real one would build the engine.
    """

    __version__ = "10.13.3.9"

    def __init__(self, *, parses: bool = True, builds: bool = True, old: bool = True) -> None:
        self.calls: list[Any] = []
        self._parses, self._builds = parses, builds
        self.NetworkDefinitionCreationFlag = SimpleNamespace(STRONGLY_TYPED=1)
        self.MemoryPoolType = SimpleNamespace(WORKSPACE="WORKSPACE")
        self.HardwareCompatibilityLevel = SimpleNamespace(NONE="NONE", AMPERE_PLUS="AMPERE_PLUS")
        flags = {"TF32": "TF32", "VERSION_COMPATIBLE": "VERSION_COMPATIBLE"}
        self.BuilderFlag = SimpleNamespace(**flags, **({"FP16": "FP16", "INT8": "INT8"} if old else {}))
        self.Logger = type("Logger", (), {"WARNING": "WARNING", "__init__": lambda self, level: None})

    def _record(self, *call: Any) -> None:
        self.calls.append(call)

    def Builder(self, logger: Any) -> Any:  # noqa: N802
        assert logger is not None
        builder = SimpleNamespace()
        builder.create_network = lambda flags: self._record("create_network", flags) or "network"
        builder.create_builder_config = self._config
        builder.create_optimization_profile = lambda: SimpleNamespace(
            set_shape=lambda *shapes: self._record("set_shape", *shapes)
        )
        builder.build_serialized_network = lambda network, config: (
            self._record("build", network) or (memoryview(PLAN) if self._builds else None)
        )
        return builder

    def OnnxParser(self, network: Any, logger: Any) -> Any:  # noqa: N802
        error = SimpleNamespace(desc=lambda: "no importer registered for op: Fancy")
        return SimpleNamespace(
            parse=lambda graph: self._record("parse", len(graph)) or self._parses,
            num_errors=1,
            get_error=lambda index: error,
        )

    def _config(self) -> Any:
        config = SimpleNamespace(timings=None)
        config.set_memory_pool_limit = lambda pool, size: self._record("set_memory_pool_limit", pool, size)
        config.set_flag = lambda flag: self._record("set_flag", flag)
        config.clear_flag = lambda flag: self._record("clear_flag", flag)
        config.add_optimization_profile = lambda profile: self._record("add_profile") or 0
        config.create_timing_cache = lambda known: self._record("create_timing_cache", known) or "cache"
        config.set_timing_cache = lambda cache, ignore_mismatch: self._record("set_timing_cache", ignore_mismatch)
        config.get_timing_cache = lambda: SimpleNamespace(serialize=lambda: memoryview(b"timings"))
        self.config = config
        return config


def test_the_builder_is_called_in_tensorrts_order(tmp_path: Path) -> None:
    recorded, cache = RecordedTensorrt(), tmp_path / "cache" / "timing.cache"
    settings = TensorrtSettings(timing_cache=str(cache), version_compatible=True, hardware_compatible="ampere_plus")
    profiles = profiles_of((8,), 16)
    assert build_plan(b"graph", net(precision="fp16"), profiles, settings, recorded) == PLAN
    assert recorded.calls == [
        ("create_network", 2),
        ("parse", 5),
        ("set_memory_pool_limit", "WORKSPACE", 1_024 * 1024**2),
        ("clear_flag", "TF32"),
        ("set_flag", "VERSION_COMPATIBLE"),
        ("set_shape", "features", (1, 4), (1, 4), (1, 4)),
        ("add_profile",),
        ("set_shape", "features", (2, 4), (8, 4), (8, 4)),
        ("add_profile",),
        ("set_shape", "features", (9, 4), (16, 4), (16, 4)),
        ("add_profile",),
        ("create_timing_cache", b""),
        ("set_timing_cache", False),
        ("build", "network"),
    ]
    assert recorded.config.hardware_compatibility_level == "AMPERE_PLUS"
    assert recorded.config.builder_optimization_level == 3
    again = RecordedTensorrt()
    build_plan(b"graph", net(), profiles, settings, again)
    assert ("create_timing_cache", b"timings") in again.calls, "what was timed is used by the next build"


def test_flags_are_for_tensorrt_10_alone(tmp_path: Path) -> None:
    settings = TensorrtSettings(typing="flags", timing_cache="")
    recorded = RecordedTensorrt()
    build_plan(b"graph", net(precision="int8"), profiles_of((), 1), settings, recorded)
    assert ("create_network", 0) in recorded.calls
    assert [call for call in recorded.calls if call[0] == "set_flag"] == [("set_flag", "FP16"), ("set_flag", "INT8")]
    with pytest.raises(ConfigError, match="no flag FP16"):
        build_plan(b"graph", net(precision="int8"), profiles_of((), 1), settings, RecordedTensorrt(old=False))
    level = TensorrtSettings(hardware_compatible="same_compute_capability", timing_cache="")
    with pytest.raises(ConfigError, match="hardware_compatible"):
        build_plan(b"graph", net(), profiles_of((), 1), level, RecordedTensorrt())


def test_what_tensorrt_refuses_is_a_typed_error() -> None:
    settings = TensorrtSettings(timing_cache="")
    with pytest.raises(ArtifactError, match="no importer registered for op: Fancy"):
        build_plan(b"graph", net(), profiles_of((), 1), settings, RecordedTensorrt(parses=False))
    with pytest.raises(ComponentError, match="built no engine"):
        build_plan(b"graph", net(), profiles_of((), 1), settings, RecordedTensorrt(builds=False))


def test_the_flags_of_the_key_are_what_decides_the_engine() -> None:
    profiles = profiles_of((8,), 16)
    base = build_flags(net(), TensorrtSettings(), profiles)
    assert build_flags(net(), TensorrtSettings(image="other", claim="other", timing_cache="x"), profiles) == base
    changes: list[dict[str, Any]] = [
        {"typing": "flags"}, {"workspace_mb": 2}, {"optimization_level": 5}, {"version_compatible": True},
        {"hardware_compatible": "ampere_plus"},
    ]  # fmt: skip
    assert all(build_flags(net(), TensorrtSettings(**change), profiles) != base for change in changes)
    assert build_flags(net(precision="fp16"), TensorrtSettings(), profiles) != base
    assert build_flags(net(), TensorrtSettings(), profiles_of((4,), 16)) != base


class RecordedDevice:
    """Stands in for one GPU's memory: records copies, answers zeros."""

    stream = 77

    def __init__(self) -> None:
        self.sent: list[tuple[str, tuple[int, ...]]] = []

    def buffer(self, name: str, size: int) -> int:
        return 1_000 + size

    def send(self, name: str, array: Any) -> int:
        self.sent.append((name, array.shape))
        return 1

    def fetch(self, name: str, shape: tuple[int, ...], dtype: Any) -> Any:
        return np.zeros(shape, dtype)


def recorded_runtime(names: list[str], *, loads: bool = True) -> tuple[Any, list[Any]]:
    calls: list[Any] = []

    def note(name: str, answer: Any = True) -> Any:
        def noted(*arguments: Any) -> Any:
            calls.append((name, *arguments))
            return answer

        return noted

    context = SimpleNamespace(
        set_input_shape=note("set_input_shape"),
        set_tensor_address=note("set_tensor_address"),
        set_optimization_profile_async=note("set_optimization_profile_async"),
        execute_async_v3=note("execute_async_v3"),
    )
    engine = SimpleNamespace(
        num_io_tensors=len(names), get_tensor_name=lambda i: names[i], create_execution_context=lambda: context
    )
    runtime = SimpleNamespace(deserialize_cuda_engine=lambda plan: engine if loads else None)
    logger = type("Logger", (), {"WARNING": 1, "__init__": lambda self, level: None})
    return SimpleNamespace(Logger=logger, Runtime=lambda logger: runtime), calls


NAMES = ["features", "probabilities", "score", "bundle_id"]


def test_an_engine_switches_to_the_profile_of_each_batch() -> None:
    trt, calls = recorded_runtime(NAMES)
    device = RecordedDevice()
    engine = Engine(PLAN, net(), profiles_of((8,), 16), device, trt)
    for rows in (1, 8, 8, 16):
        answer = engine.run({"features": np.zeros((rows, 4), np.float32)})
        assert answer["probabilities"].shape == (rows, 3)
        assert answer["bundle_id"].dtype == np.int64
    switched = [call for call in calls if call[0] == "set_optimization_profile_async"]
    assert switched == [("set_optimization_profile_async", 1, 77), ("set_optimization_profile_async", 2, 77)]
    assert calls.index(("set_optimization_profile_async", 1, 77)) < calls.index(("set_input_shape", "features", (8, 4)))
    assert [shape for _, shape in device.sent] == [(1, 4), (8, 4), (8, 4), (16, 4)]
    assert calls.count(("execute_async_v3", 77)) == 4
    with pytest.raises(UsageError):
        engine.run({"features": np.zeros((17, 4), np.float32)})


def test_a_plan_that_does_not_load_or_has_other_tensors_is_refused() -> None:
    with pytest.raises(ArtifactError, match="does not load"):
        Engine(PLAN, net(), profiles_of((), 1), RecordedDevice(), recorded_runtime(NAMES, loads=False)[0])
    with pytest.raises(ArtifactError, match="other tensors"):
        Engine(PLAN, net(), profiles_of((), 1), RecordedDevice(), recorded_runtime(NAMES[:-1])[0])


def test_the_embedded_server_reads_past_the_accelerator_on_the_cpu(tmp_path: Path) -> None:
    settings = tiny.SETTINGS.model_copy(update={"tensorrt": "accelerator"})
    repository = tmp_path / "repository"
    _, folder = publish(tiny.release(1, name="net", family="lstm", nan_policy="impute_mean"), repository, settings)
    assert "trt_profile_max_shapes" in (repository / "net" / "config.pbtxt").read_text()
    ports = ServeSettings(http_port=0, grpc_port=0, metrics_port=0)
    with (
        EmbeddedTriton(repository, ports) as server,
        Client(server.http_url, manifest=repository, deadline_ms=5_000) as client,
        np.load(folder / "golden.npz") as golden,
    ):
        served = client.score("net", golden["features"]).probabilities
        assert np.allclose(served, golden["probabilities"], atol=1e-6)
