"""Bundle to repository version: the graph, its runtime, TensorRT, batching, and the repository."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from tickserve.config.section import Section


class ExportSettings(Section):
    """Bundle to repository version."""

    parity_rows: int = Field(2_000, ge=16, description="real rows the parity gate scores")
    max_batch: int = Field(256, ge=1, le=4_096)
    preferred_batch_rows: tuple[int, ...] = (8, 32, 128)
    queue_delay_us: int = Field(0, ge=0, description="longest wait for a fuller batch; adds itself to a lone request")
    queue_policy: Literal["none", "reject"] = Field(
        "none", description="none: no bound, said in config.pbtxt; reject: a bound, which takes three instances"
    )
    queue_size: int = Field(1_024, ge=1, description="with reject: requests waiting before the server refuses")
    queue_timeout_us: int = Field(250_000, ge=1_000, description="with reject: longest wait before refusal")
    instances: int = Field(1, ge=1, le=64, description="copies of the model; with reject three do not stall")
    priority_lanes: bool = Field(False, description="with reject: two lanes, single decisions before bulk scoring")
    deadline_us: int = Field(500_000, ge=1_000, description="the engine's deadline the queue must stay inside")
    keep_versions: int = Field(2, ge=1, description="newest versions Triton serves")
    threads: int = Field(0, ge=0, le=64, description="ONNX Runtime threads per instance; 0: what was measured, else 1")
    tensorrt: Literal["off", "accelerator"] = Field(
        "off", description="accelerator: on a GPU, ONNX Runtime hands a net to TensorRT; a CPU server ignores it"
    )
    tensorrt_cache: str = Field(
        "/var/cache/tensorrt",
        min_length=1,
        description="folder on the server for the accelerator's engines and timings",
    )

    @model_validator(mode="after")
    def _inside_deadline(self) -> ExportSettings:
        if self.queue_delay_us >= self.deadline_us:
            raise ValueError(
                f"queue_delay_us: expected less than deadline_us ({self.deadline_us}), was {self.queue_delay_us}"
            )
        if self.queue_policy == "reject" and self.queue_timeout_us >= self.deadline_us:
            raise ValueError(
                f"queue_timeout_us: expected less than deadline_us ({self.deadline_us}), was {self.queue_timeout_us}"
            )
        if self.priority_lanes and self.queue_policy != "reject":
            raise ValueError(f"queue_policy: expected reject with priority_lanes, was {self.queue_policy}")
        if any(not 1 <= rows <= self.max_batch for rows in self.preferred_batch_rows):
            raise ValueError(
                f"preferred_batch_rows: expected each from 1 to max_batch ({self.max_batch}), "
                f"was {list(self.preferred_batch_rows)}"
            )
        return self


class RuntimeSettings(Section):
    """What runs a model, measured when it is exported (docs/runtimes.md)."""

    measure: Literal["off", "quick", "full"] = Field("quick", description="full takes minutes and is worth publishing")


class TensorrtSettings(Section):
    """How `tickserve tensorrt build` builds engines (none is served), and where one without a GPU sends the job."""

    typing: Literal["strong", "flags"] = Field(
        "strong", description="strong: the graph's own types (fp16, QDQ) hold; flags: TensorRT 10 may choose among them"
    )
    workspace_mb: int = Field(1_024, ge=1, description="GPU memory the builder may use for one layer")
    optimization_level: int = Field(3, ge=0, le=5, description="of the builder; higher searches longer")
    version_compatible: bool = Field(False, description="the plan also loads in later TensorRT releases")
    hardware_compatible: Literal["none", "same_compute_capability", "ampere_plus"] = "none"
    timing_cache: str = Field(".tickserve/tensorrt/timing.cache", description="file of measured tactics; empty: none")
    image: str = Field("tickserve-tensorrt:0.1.0", min_length=1, description="image of the build job")
    gpu_product: str = Field(
        "", description="node label nvidia.com/gpu.product of the target, e.g. NVIDIA-L4; empty: any GPU node"
    )
    claim: str = Field("triton-tickserve-models", min_length=1, description="volume claim that holds the repository")


class BatchingSettings(Section):
    """How `tickserve batching derive` searches; what it finds are keys of [export]."""

    peak_s: float = Field(10.0, gt=0, description="length of the busiest recorded stretch that is simulated")
    peak_requests: int = Field(20_000, ge=100, description="requests of that stretch at most")
    service_calls: int = Field(60, ge=10, description="measured calls for each batch size")
    max_instances: int = Field(4, ge=1, le=64)
    misses: float = Field(0.001, ge=0, lt=1, description="share of requests that may miss the deadline")
    decide_us: int = Field(1_000, ge=0, description="one request for all events of this many microseconds; 0: for each")


class RepositorySettings(Section):
    """The model repository: who may publish into it, what is kept, and where a remote one is."""

    signing_key_file: str = Field("", description="private key (PEM, ed25519) that signs what is published")
    trusted_keys_file: str = Field("", description="public keys; with it, what none of them signed is refused")
    require_signature: bool = Field(False, description="refuse to run without trusted keys")
    keep: int = Field(5, ge=1, description="newest versions of a model that 'repo gc' keeps")
    s3_endpoint_url: str = Field("", description="S3 service of s3:// repositories; empty is AWS or the environment")
