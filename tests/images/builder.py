"""Images built and started without a container engine: buildah in a chroot, and the image's root file system as a root.

What an engine would add is done by hand, and no more: the user, the environment and the command that the image names, a
read-only root, a `/tmp` of its own, no capabilities, no new privileges. The network is this machine's.
"""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

ROOT = Path(__file__).resolve().parents[2]
DEBIAN = ("python3", "python3-venv", "python3-pip", "libpython3.11", "python-is-python3", "ca-certificates", "curl")
CONTAINED = """
root=$1; shift
mount --bind "$root" "$root"
for pair in $MOUNTS; do mount --bind "${pair%%:*}" "$root${pair#*:}"; done
for pair in $READ_ONLY; do
  mount --bind "${pair%%:*}" "$root${pair#*:}"; mount -o remount,bind,ro "$root${pair#*:}"
done
mount -t proc proc "$root/proc"
mount --rbind /dev "$root/dev"
mount -o remount,bind,ro "$root"
mount -t tmpfs -o "mode=1777,nosuid,nodev,$TMP" tmpfs "$root/tmp"
exec chroot "$root" setpriv --reuid 1000 --regid 1000 --clear-groups --no-new-privs \
  --bounding-set=-all --inh-caps=-all -- env -i "$@"
"""


def said(*command: object, timeout: float = 600, **options: Any) -> str:
    """What a command prints. What it says of a failure becomes the failure's message."""
    shown = [str(word) for word in command]
    done = subprocess.run(shown, capture_output=True, text=True, timeout=timeout, check=False, **options)
    assert done.returncode == 0, f"{' '.join(shown[:12])}: {done.stderr[-3000:]}{done.stdout[-1000:]}"
    return done.stdout


def debian(folder: Path) -> Path:
    """A Debian with Python 3.11 in `folder`, as the images' Python base is one."""
    said("debootstrap", "--variant=minbase", f"--include={','.join(DEBIAN)}", "bookworm", folder)
    for name in ("var/cache/apt/archives", "var/lib/apt/lists"):
        shutil.rmtree(folder / name)
    return folder


def pip_settings() -> dict[str, list[str]]:
    """The indexes and the certificate that pip uses on this machine, by option."""
    found: dict[str, list[str]] = {}
    for line in said(sys.executable, "-m", "pip", "config", "list").splitlines():
        key, _, value = line.partition("=")
        option = key.rpartition(".")[2]
        if option in ("index-url", "extra-index-url", "find-links", "cert"):
            found.setdefault(option, []).extend(str(ast.literal_eval(value)).split())
    return {option: list(dict.fromkeys(values)) for option, values in found.items()}


def local(value: str) -> str | None:
    """The path on this machine that an index needs, which lies in a folder with its files; None for one elsewhere."""
    path = str(Path(urlsplit(value).path).parent) if value.startswith("file:") else value
    return path if path.startswith("/") and Path(path).exists() else None


@dataclass(frozen=True)
class Image:
    """A built image: its root file system and what it says of how it is started."""

    root: Path
    config: Mapping[str, Any]

    @property
    def labels(self) -> dict[str, str]:
        return dict(self.config.get("Labels") or {})

    def command(self, arguments: Sequence[str]) -> list[str]:
        return [*(self.config.get("Entrypoint") or ()), *(arguments or self.config.get("Cmd") or ())]

    def popen(
        self,
        arguments: Sequence[str] = (),
        *,
        mounts: Mapping[Path, str] | None = None,
        read_only: Mapping[Path, str] | None = None,
        command: Sequence[str] | None = None,
        environment: Mapping[str, str] | None = None,
        tmp: str = "noexec",
    ) -> subprocess.Popen[str]:
        """Start it: the entry point with these arguments, or another command. Its process id is the program's.

        An engine mounts a temporary `/tmp` as `noexec` unless it is told `exec`.
        """
        assert self.config["User"] == "1000:1000"
        for place in (*(mounts or {}).values(), *(read_only or {}).values()):
            (self.root / place.lstrip("/")).mkdir(parents=True, exist_ok=True)
        pairs = {
            name: " ".join(f"{a}:{b}" for a, b in (each or {}).items())
            for name, each in (("MOUNTS", mounts), ("READ_ONLY", read_only))
        }
        values = [*self.config["Env"], *(f"{name}={value}" for name, value in (environment or {}).items())]
        words = ["--chdir=" + (self.config.get("WorkingDir") or "/"), *values]
        return subprocess.Popen(
            [
                "unshare",
                "--mount",
                "--propagation",
                "private",
                "sh",
                "-euc",
                CONTAINED,
                "sh",
                str(self.root),
                *words,
                *(command or self.command(arguments)),
            ],
            env={**os.environ, **pairs, "TMP": tmp},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: str, timeout: float = 120, **options: Any) -> subprocess.CompletedProcess[str]:
        """Start it, and wait for its end."""
        with self.popen(arguments, **options) as process:
            try:
                out, err = process.communicate(timeout=timeout)
            except subprocess.TimeoutExpired:
                process.kill()
                raise
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)


class Builder:
    """Buildah with a store of its own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._arguments = ["--root", folder / "store", "--runroot", folder / "run", "--storage-driver", "overlay"]

    def buildah(self, *arguments: object, timeout: float = 900) -> str:
        return said("buildah", *self._arguments, *arguments, timeout=timeout)

    def has(self, name: str) -> bool:
        return f"localhost/{name}" in self.buildah("images", "--format", "{{.Name}}:{{.Tag}}").split()

    def base(self, name: str, layers: Mapping[Path, str], *, on: str = "scratch") -> None:
        """An image of folders; its label says that it stands in for one that cannot be had here."""
        container = self.buildah("from", "--pull-never", on).strip()
        for source, target in layers.items():
            self.buildah("add", "--quiet", container, source, target)
        # The libraries that were added are to be found.
        self.buildah("run", "--isolation", "chroot", container, "ldconfig")
        self.buildah("config", "--label", "tickserve.standin=true", "--user", "0:0", container)
        self.buildah("commit", "--quiet", "--rm", container, f"localhost/{name}")

    def build(self, target: str, *, timeout: float = 1_500, output: Path | None = None, **arguments: str) -> str:
        """Build a target of the Dockerfile as `tickserve-<target>`, and give what the build said."""
        settings = pip_settings()
        volumes = [path for values in settings.values() for value in values if (path := local(value))]
        conf = self._folder / "pip.conf"
        options = "".join(f"{key} = {' '.join(each)}\n" for key, each in settings.items())
        # Bytecode for gigabytes of libraries is minutes of a build, and none of what is tested.
        conf.write_text(f"[global]\n{options}[install]\nno-compile = true\n")
        mounted = [f"--volume={path}:{path}:ro" for path in dict.fromkeys(volumes)] + [
            f"--volume={conf}:/etc/pip.conf:ro"
        ]
        done = subprocess.run(
            [
                *("buildah", *map(str, self._arguments), "bud", "--isolation", "chroot", "--format", "docker"),
                *("--layers", "--pull-never", "--target", target, *mounted),
                *(f"--build-arg={name.upper()}={value}" for name, value in arguments.items()),
                *(("--output", f"type=local,dest={output}") if output else ("--tag", f"localhost/tickserve-{target}")),
                str(ROOT),
            ],
            capture_output=True, text=True, timeout=timeout, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-4000:]
        return done.stdout + done.stderr

    @contextmanager
    def opened(self, name: str) -> Iterator[Image]:
        """The image's root file system, with a layer of its own that is gone afterwards."""
        container = self.buildah("from", "--pull-never", f"localhost/{name}").strip()
        try:
            config = json.loads(self.buildah("inspect", "--type", "container", container))["Docker"]["config"]
            yield Image(Path(self.buildah("mount", container).strip()), config)
        finally:
            self.buildah("umount", container)
            self.buildah("rm", container)


@contextmanager
def builder() -> Iterator[Builder]:
    """A builder whose store is gone afterwards, unless IMAGES_STORE names a folder to keep it in."""
    kept = os.environ.get("IMAGES_STORE")
    if kept:
        Path(kept).mkdir(parents=True, exist_ok=True)
        yield Builder(Path(kept))
        return
    with tempfile.TemporaryDirectory(prefix="tickserve-images-") as folder:
        try:
            yield Builder(Path(folder))
        finally:
            # What buildah leaves mounted; the rest goes with the folder, which is faster than image by image.
            lines = Path("/proc/mounts").read_text().splitlines()
            for place in reversed([line.split()[1] for line in lines if line.split()[1].startswith(f"{folder}/")]):
                said("umount", place)
