"""What `helm test` runs: the Service answers, is ready, and scores. Needs nothing but Python.

HOST names the Service; MODELS, separated by spaces, are asked by name; with HTTP=probes only health is open over HTTP,
and the gRPC port is merely connected to. Exit codes: 0 all well, 1 something was not, with a line for each thing asked.
"""

from __future__ import annotations

import json
import math
import os
import socket
import sys
import urllib.error
import urllib.request
from typing import Any, Callable

TIMEOUT_S = 5
TYPES = {"FP16": 0.0, "FP32": 0.0, "FP64": 0.0, "INT32": 0, "INT64": 0, "BOOL": False}


def asked(url: str, body: Any = None) -> Any:
    """The JSON of an answer, {} where there is none. Raises OSError for anything but 200."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data=data, headers={"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=TIMEOUT_S) as reply:
        return json.loads(reply.read() or b"{}")


def one_row(metadata: Any) -> Any:
    """A request of one row of zeros, from what the model says of its inputs."""
    return {"inputs": [_zeros(each) for each in metadata["inputs"]]}


def _zeros(tensor: Any) -> Any:
    shape = [1 if size < 1 else size for size in tensor["shape"]]
    values = [TYPES[tensor["datatype"]]] * math.prod(shape)
    return {"name": tensor["name"], "datatype": tensor["datatype"], "shape": shape, "data": values}


def score(base: str, model: str) -> None:
    """One inference: every number of the answer has to be finite."""
    answer = asked(f"{base}/v2/models/{model}/infer", one_row(asked(f"{base}/v2/models/{model}")))
    values = [value for output in answer["outputs"] for value in output["data"]]
    if not values or not all(math.isfinite(value) for value in values):
        raise ValueError("an answer that is empty or not finite")


def check(name: str, call: Callable[..., object], *arguments: str) -> bool:
    """Run one check and say how it went."""
    try:
        call(*arguments)
    except (OSError, ValueError, KeyError) as error:
        print(f"FAILED {name}: {error}", file=sys.stderr)
        return False
    print(f"ok     {name}")
    return True


def main() -> int:
    """Ready, then each model, then the gRPC port."""
    host, http, grpc = os.environ["HOST"], os.environ.get("HTTP_PORT", "8000"), os.environ.get("GRPC_PORT", "8001")
    base, models = f"http://{host}:{http}", os.environ.get("MODELS", "").split()
    done = [check("ready", asked, f"{base}/v2/health/ready")]
    if os.environ.get("HTTP") != "probes":
        done.append(check("metadata", asked, f"{base}/v2"))
        done += [check(f"one inference of {model}", score, base, model) for model in models]
    done.append(check("gRPC port", lambda: socket.create_connection((host, int(grpc)), TIMEOUT_S).close()))
    return 0 if all(done) else 1


if __name__ == "__main__":
    sys.exit(main())
