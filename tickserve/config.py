"""What can be set: one section a part of the pipeline, typed and frozen, each with its defaults.

What is in force is read from a profile, a file and the environment by `tickserve/settings.py`.
"""

from __future__ import annotations

from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

from tickserve.manifest import MODEL_NAME_PATTERN, Family


class Section(BaseModel):
    """Frozen; unknown keys, NaN and silent type conversion are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class FeatureSettings(Section):
    """How market events become rows."""

    levels: int = Field(5, ge=1, le=20, description="order-book levels read (fewer where the file has fewer)")
    chunk_rows: int = Field(131_072, ge=1_024, description="events held in memory at a time")
    max_rows: int = Field(60_000, ge=0, description="rows kept: every k-th event, k a power of two; 0 keeps all")
    bars_max_rows: int = Field(500_000, ge=0, description="the same for bars, whose horizon is counted in rows")
    store: str = Field(".tickserve/features", description="folder of the feature cache")


class LabelSettings(Section):
    """What is predicted: the direction of the move over a fixed horizon."""

    book_horizon_ms: int = Field(1_000, ge=1, description="horizon for order books and quotes")
    bars_horizon_rows: int = Field(5, ge=1, description="horizon for bars")
    flat_quantile: float = Field(1 / 3, ge=0, lt=1, description="share of training moves called flat, per fold")


class ValidationSettings(Section):
    """Purged, embargoed walk-forward."""

    folds: int = Field(3, ge=1, le=20)
    embargo_horizons: float = Field(1.0, ge=0, description="gap after the purge, in label horizons")
    min_train_rows: int = Field(500, ge=50)


class CostSettings(Section):
    """What a round trip costs in the PnL that is reported."""

    fee_bps: float = Field(1.0, ge=0, description="fee per side, in basis points of the price")
    bar_half_spread_bps: float = Field(1.0, ge=0, description="half-spread assumed for bars, which carry no quotes")


class GbdtSettings(Section):
    """Gradient-boosted trees (XGBoost)."""

    enabled: bool = True
    rounds: int = Field(50, ge=1)
    early_stopping_rounds: int = Field(5, ge=1)
    max_depth: int = Field(4, ge=1, le=12)
    learning_rate: float = Field(0.1, gt=0, le=1)
    subsample: float = Field(0.8, gt=0, le=1)
    max_bin: int = Field(128, ge=2, le=1024)
    threads: int = Field(2, ge=1)
    task: Literal["classification", "regression", "ranking"] = Field(
        "classification", description="what the trees learn; the served tensors are the same (docs/trees.md)"
    )
    regression_loss: Literal["squared", "pseudo_huber"] = Field("squared", description="of task regression")
    ranking_loss: Literal["ndcg", "pairwise"] = Field("ndcg", description="of task ranking")
    ranking_block_rows: int = Field(64, ge=2, description="of task ranking: neighbouring rows ranked among each other")
    ranking_grades: int = Field(5, ge=2, le=31, description="of task ranking: grades of the return, by its quantiles")
    sampling_method: Literal["uniform", "gradient_based"] = Field("uniform", description="how subsample draws rows")
    top_features: int = Field(0, ge=0, description="columns a fold's model sees, those of highest gain; 0: all")
    monotone: dict[str, Literal[-1, 1]] = Field(
        {}, description="columns the score may only rise with (1) or fall with (-1); not of task classification"
    )
    external_memory: bool = Field(False, description="hold the binned rows in files instead of memory")
    external_memory_chunk_rows: int = Field(65_536, ge=1_024, description="rows of one such file page")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: a GPU where XGBoost can use one")
    memory_pool: Literal["none", "cuda_async", "rmm"] = Field("none", description="of device cuda")

    @model_validator(mode="after")
    def _nothing_inert(self) -> GbdtSettings:
        """Refuse what would have no effect: each key in the first column works only under what follows it."""
        classification = self.task == "classification"
        inert: tuple[tuple[str, object, bool, str], ...] = (
            ("regression_loss", "squared", self.task != "regression", f"task {self.task}"),
            ("ranking_loss", "ndcg", self.task != "ranking", f"task {self.task}"),
            ("ranking_block_rows", 64, self.task != "ranking", f"task {self.task}"),
            ("ranking_grades", 5, self.task != "ranking", f"task {self.task}"),
            ("sampling_method", "uniform", self.subsample == 1, "subsample 1, which takes every row"),
            ("monotone", {}, classification, "task classification, whose score is a difference of two classes"),
            ("external_memory_chunk_rows", 65_536, not self.external_memory, "external_memory off"),
            ("memory_pool", "none", self.device == "cpu", "device cpu"),
        )
        for name, default, off, why in inert:
            if off and getattr(self, name) != default:
                raise ValueError(f"{name}: expected {default} with {why}, was {getattr(self, name)}")
        return self


class NetSettings(Section):
    """How a net of any family is trained."""

    enabled: bool = False
    epochs: int = Field(4, ge=1)
    patience: int = Field(2, ge=1)
    batch_rows: int = Field(512, ge=1)
    learning_rate: float = Field(0.003, gt=0)
    max_train_windows: int = Field(20_000, ge=0, description="rows or windows per fit, evenly spaced; 0 takes all")
    threads: int = Field(1, ge=1, description="small nets gain little from more, and lose much on a busy machine")


class LstmSettings(NetSettings):
    """A recurrent net on windows of feature rows."""

    enabled: bool = True
    window: int = Field(20, ge=2, le=1_000, description="rows the net looks back over")
    hidden: int = Field(32, ge=1, le=2_048)
    layers: int = Field(1, ge=1, le=8)
    stepped: bool = Field(True, description="also a child that takes one row and its state instead of a window")


class CompressSettings(Section):
    """Smaller children of the net."""

    fp16: bool = True
    int8: bool = True


class ExportSettings(Section):
    """Bundle to repository version."""

    parity_rows: int = Field(2_000, ge=16, description="real rows the parity gate scores")
    max_batch: int = Field(256, ge=1, le=4_096)
    preferred_batch_rows: tuple[int, ...] = (8, 32, 128)
    queue_delay_us: int = Field(0, ge=0, description="longest wait for a fuller batch; adds itself to a lone request")
    queue_policy: Literal["none", "reject"] = Field(
        "none", description="reject bounds the queue; Triton then may stall lone requests (docs/architecture.md)"
    )
    queue_size: int = Field(1_024, ge=1, description="with reject: requests waiting before the server refuses")
    queue_timeout_us: int = Field(250_000, ge=1_000, description="with reject: longest wait before refusal")
    instances: int = Field(1, ge=1, le=64, description="copies of the model; with reject three do not stall")
    priority_lanes: bool = Field(False, description="with reject: two lanes, single decisions before bulk scoring")
    deadline_us: int = Field(500_000, ge=1_000, description="the engine's deadline the queue must stay inside")
    keep_versions: int = Field(2, ge=1, description="newest versions Triton serves")
    threads: int = Field(0, ge=0, le=64, description="ONNX Runtime threads per instance; 0: what was measured, else 1")
    tensorrt: Literal["off", "accelerator"] = Field(
        "off", description="accelerator: on a GPU, ONNX Runtime hands the graph to TensorRT; a CPU server ignores it"
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
    """How `tickserve tensorrt build` builds engines, and where a machine without a GPU sends the job."""

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


class RepositorySettings(Section):
    """The model repository: who may publish into it, what is kept, and where a remote one is."""

    signing_key_file: str = Field("", description="private key (PEM, ed25519) that signs what is published")
    trusted_keys_file: str = Field("", description="public keys; with it, what none of them signed is refused")
    require_signature: bool = Field(False, description="refuse to run without trusted keys")
    keep: int = Field(5, ge=1, description="newest versions of a model that 'repo gc' keeps")
    s3_endpoint_url: str = Field("", description="S3 service of s3:// repositories; empty is AWS or the environment")


BackendKind = Literal["native", "python"]


class ServeSettings(Section):
    """The embedded server. It binds to loopback only. Port 0 takes a free one."""

    backend: BackendKind = Field(
        "native",
        description="native: models run in the server; python: in a process each, slower, apart from it",
    )
    http_port: int = Field(8000, ge=0, le=65_535)
    grpc_port: int = Field(8001, ge=0, le=65_535)
    metrics_port: int = Field(8002, ge=0, le=65_535)
    start_timeout_s: float = Field(60.0, gt=0)
    stop_timeout_s: float = Field(10.0, gt=0)
    hang_s: float = Field(
        10.0, ge=0, description="requests wait and none ends: start the model's process anew; 0: never"
    )
    http: Literal["open", "probes"] = Field(
        "open", description="probes: HTTP answers health to anyone, the rest to none"
    )
    http_threads: int = Field(8, ge=1, le=256, description="threads of the HTTP server; each holds many connections")
    control: Literal["none", "explicit"] = Field(
        "none", description="of the container: explicit allows swaps over the network, with tls_client_ca only"
    )
    tls_cert: str = Field("", description="PEM certificate chain of the server; gRPC then speaks TLS only")
    tls_key: str = Field("", description="its PEM private key")
    tls_client_ca: str = Field("", description="PEM authority that signed the clients' certificates: mutual TLS")

    @model_validator(mode="after")
    def _ports_differ(self) -> ServeSettings:
        ports = [port for port in (self.http_port, self.grpc_port, self.metrics_port) if port]
        if len(set(ports)) < len(ports):
            raise ValueError(f"http_port, grpc_port, metrics_port: expected three different ports, was {ports}")
        return self

    @model_validator(mode="after")
    def _certificate_with_its_key(self) -> ServeSettings:
        if bool(self.tls_cert) != bool(self.tls_key):
            raise ValueError("tls_cert, tls_key: expected both or neither, was one of them")
        if self.tls_client_ca and not self.tls_cert:
            raise ValueError("tls_client_ca: expected tls_cert and tls_key with it, was neither")
        return self


class SwapSettings(Section):
    """Putting another version of a served model in force while the server runs."""

    load_timeout_s: float = Field(60.0, gt=0, description="longest load of a version, and longest wait for its end")
    memory_requests: int = Field(240, ge=8, description="batches the new version scores while its memory is watched")
    memory_growth_mb: float = Field(8.0, gt=0, description="growth over those batches that is a leak")
    drain_quiet_ms: float = Field(300.0, gt=0, description="the old version is drained after so long without a request")
    drain_timeout_s: float = Field(
        10.0, gt=0, description="the old version stays when it is asked for longer than this"
    )
    credential_file: str = Field(
        "", description="for a server elsewhere: a file with 'header=value' of its closed APIs"
    )


class ClientSettings(Section):
    """The scoring client."""

    transport: Literal["http", "grpc"] = "http"
    deadline_ms: float = Field(100.0, gt=0)
    attempts: int = Field(3, ge=1, le=100, description="replicas that one call may ask")
    retry_tokens: int = Field(100, ge=2, le=1_000_000, description="retries stop while half of them are spent")
    retry_ratio: float = Field(0.1, ge=0, le=1, description="tokens that a success gives back")
    hedge_quantile: float = Field(0.95, ge=0.5, le=0.9999, description="a call slower than this is sent again")
    hedge_budget: float = Field(0.05, ge=0, le=1, description="largest share of hedged calls; 0 is never")
    breaker_failures: int = Field(5, ge=1, le=1_000_000, description="in a row, and a replica is left alone")
    backoff_ms: float = Field(100.0, ge=1, le=3_600_000, description="for how long at first")
    max_backoff_ms: float = Field(1_000.0, ge=1, le=3_600_000, description="for how long at most")
    slow_factor: float = Field(3.0, ge=1.5, le=1_000, description="how much slower than another is too slow")

    @model_validator(mode="after")
    def _backoff_grows(self) -> ClientSettings:
        if self.max_backoff_ms < self.backoff_ms:
            raise ValueError(
                f"max_backoff_ms: expected at least backoff_ms ({self.backoff_ms:g}), was {self.max_backoff_ms:g}"
            )
        return self


class BatchingSettings(Section):
    """How `tickserve batching derive` searches; what it finds are keys of [export]."""

    peak_s: float = Field(10.0, gt=0, description="length of the busiest recorded stretch that is simulated")
    peak_requests: int = Field(20_000, ge=100, description="requests of that stretch at most")
    service_calls: int = Field(60, ge=10, description="measured calls for each batch size")
    max_instances: int = Field(4, ge=1, le=64)
    misses: float = Field(0.001, ge=0, lt=1, description="share of requests that may miss the deadline")
    decide_us: int = Field(1_000, ge=0, description="one request for all events of this many microseconds; 0: for each")


class LoadtestSettings(Section):
    """Locust against the served models."""

    users: int = Field(4, ge=1, le=1_000)
    duration_s: float = Field(5.0, gt=0)
    transports: tuple[Literal["http", "grpc"], ...] = Field(("http", "grpc"), min_length=1)


class JournalSettings(Section):
    """The journal of decisions: how much it holds, and how much of it a crash may cost."""

    flush_ms: float = Field(100.0, ge=1, le=60_000, description="longest a record waits before it is written")
    fsync: Literal["frame", "second", "segment"] = Field("second", description="how often the disk is waited for")
    segment_bytes: int = Field(64 * 1024**2, ge=16 * 1024, description="a file is full at this size")
    segment_s: float = Field(3_600.0, ge=0.1, description="or at this age")
    max_bytes: int = Field(4 * 1024**3, ge=32 * 1024, description="of all files of one journal together")
    on_limit: Literal["remove_oldest", "refuse"] = Field("remove_oldest", description="at max_bytes")
    queue_records: int = Field(65_536, ge=1, description="records waiting to be written")
    queue_bytes: int = Field(64 * 1024**2, ge=1, description="about how many bytes of tensors may wait")
    on_full: Literal["drop", "block"] = Field("drop", description="when the queue is full: lose (counted) or wait")
    block_ms: float = Field(50.0, gt=0, description="with block: longest a call waits before its record is lost")
    level: int = Field(3, ge=1, le=19, description="of zstd")

    @model_validator(mode="after")
    def _segments_fit(self) -> JournalSettings:
        if self.max_bytes < 2 * self.segment_bytes:
            raise ValueError(
                f"max_bytes: expected at least two segments ({2 * self.segment_bytes}), was {self.max_bytes}"
            )
        return self


class TuneSettings(Section):
    """The search for hyper-parameters."""

    trials: int = Field(2, ge=1, le=100_000, description="of the study, those of earlier runs included")
    workers: int = Field(1, ge=1, le=256, description="processes that try at the same time")
    objectives: tuple[Literal["ic", "p99_us", "size_bytes"], ...] = Field(
        ("ic", "p99_us", "size_bytes"), min_length=1, description="ic is raised, the others are lowered"
    )
    sampler: Literal["tpe", "nsga2", "random"] = "tpe"
    pruner: Literal["median", "none"] = Field("median", description="gives up a trial that is worse than half of them")
    pruner_startup_trials: int = Field(5, ge=0, description="trials that are never given up")
    pruner_warmup_steps: int = Field(10, ge=0, description="rounds or epochs of a trial before it may be given up")
    latency_calls: int = Field(1_000, ge=50, description="timed calls of a lone row in each trial")
    max_p99_us: float = Field(0.0, ge=0, description="the chosen trial may not be slower; 0: any")
    folder: str = Field("runs/tune", min_length=1, description="journal, results and report of a study go below it")
    storage: str = Field("", description="database URL for workers on several machines; empty: a journal in the folder")


class MlpSettings(NetSettings):
    """A feed-forward net on one feature row."""

    hidden: int = Field(64, ge=1, le=4_096, description="units of a layer")
    layers: int = Field(2, ge=1, le=16)
    activation: Literal["gelu", "relu"] = "gelu"
    norm: Literal["none", "layer"] = Field("none", description="layer: layer normalisation before the activation")


def tcn_reach(kernel: int, layers: int) -> int:
    """Steps that the answer of a TCN looks back over: two convolutions a block, dilated by 1, 2, 4, and so on."""
    return 1 + 2 * (kernel - 1) * ((1 << layers) - 1)


class TcnSettings(NetSettings):
    """A net of dilated causal convolutions on windows of feature rows."""

    window: int = Field(24, ge=2, le=1_000, description="rows the net looks back over")
    channels: int = Field(32, ge=1, le=1_024)
    kernel: int = Field(3, ge=2, le=16, description="steps that one convolution spans")
    layers: int = Field(3, ge=1, le=10, description="residual blocks; each looks back twice as far as the one before")

    @model_validator(mode="after")
    def _window_is_read(self) -> TcnSettings:
        reach = tcn_reach(self.kernel, self.layers)
        if self.window > reach:
            raise ValueError(
                f"window: expected at most the {reach} rows that kernel {self.kernel} and {self.layers} layers "
                f"reach back, was {self.window}"
            )
        return self


class DeepLobSettings(NetSettings):
    """Convolutions over book levels and time, then an LSTM, on windows of order-book rows."""

    window: int = Field(24, ge=2, le=1_000, description="rows the net looks back over")
    channels: int = Field(16, ge=1, le=256, description="of the convolutions")
    hidden: int = Field(32, ge=1, le=2_048, description="of the LSTM")


class TlobSettings(NetSettings):
    """Attention over time and over features by turns, on windows of order-book rows."""

    window: int = Field(24, ge=2, le=1_000, description="rows the net looks back over")
    hidden: int = Field(32, ge=1, le=1_024)
    heads: int = Field(2, ge=1, le=64, description="of the attention over time; a divisor of hidden")
    layers: int = Field(2, ge=1, le=16)

    @model_validator(mode="after")
    def _heads_divide(self) -> TlobSettings:
        if self.hidden % self.heads:
            raise ValueError(f"heads: expected a divisor of hidden ({self.hidden}), was {self.heads}")
        return self


class TrainerSettings(Section):
    """How nets of every family are trained (docs/trainer.md). What cannot take effect on a machine is refused there."""

    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: the GPU where there is one")
    precision: Literal["fp32", "bf16", "fp16"] = Field("fp32", description="of the arithmetic; weights stay fp32")
    accumulate: int = Field(1, ge=1, le=4_096, description="batches whose gradients make one step")
    clip_norm: float = Field(1.0, gt=0, description="largest norm of a step's gradient")
    schedule: Literal["constant", "cosine"] = Field("constant", description="cosine: the learning rate falls to 0")
    activation_checkpointing: bool = Field(
        False, description="blocks are computed again in the backward pass instead of kept: less memory, more time"
    )
    compile: bool = Field(False, description="torch.compile; takes a C++ compiler and half a minute")
    cudnn_benchmark: bool = Field(False, description="on a GPU: fastest kernels by trial, other bits in every run")
    cuda_alloc_conf: str = Field("", description="PYTORCH_CUDA_ALLOC_CONF, e.g. expandable_segments:True")
    aligned: int = Field(0, ge=0, le=256, description="sizes have to be multiples of this (Tensor Cores: 8); 0: any")
    processes: int = Field(1, ge=1, le=256, description="on this machine, one a GPU where there are GPUs")
    sharding: Literal["none", "ddp", "fsdp", "deepspeed"] = Field(
        "none", description="ddp: each process has the whole net; fsdp, deepspeed: each has a part of it"
    )
    zero_stage: Literal[1, 2, 3] = Field(2, description="of deepspeed: shards optimizer, and gradients, and weights")
    offload: bool = Field(False, description="of fsdp and deepspeed on GPUs: shards wait in the memory of the CPU")
    memmap: bool = Field(False, description="features are read from a file as they are needed, never all at once")
    memmap_above_mb: int = Field(1_024, ge=0, description="so are features larger than this; 0: never")
    loader_workers: int = Field(0, ge=0, le=64, description="processes that gather batches; 0: the trainer does")
    prefetch: int = Field(0, ge=0, le=1_024, description="batches ahead for each worker; 0: two")
    pin_memory: bool = Field(False, description="batches in page-locked memory, for a GPU")
    shared_memory: bool = Field(False, description="one copy of the features for all workers or processes")
    checkpoint_steps: int = Field(0, ge=0, description="steps from checkpoint to checkpoint; 0: none")
    checkpoint_folder: str = Field(".tickserve/checkpoints", min_length=1)
    checkpoint_async: bool = Field(True, description="written by a thread; training waits for the copy alone")
    checkpoint_keep: int = Field(2, ge=1, le=1_000, description="newest checkpoints of a fit that are kept")
    checkpoint_level: int = Field(3, ge=1, le=19, description="of zstd")
    resume: bool = Field(False, description="go on from the newest checkpoint of the same job")
    lora_rank: int = Field(0, ge=0, le=256, description="train low-rank adapters of a base net only; 0: all weights")
    lora_alpha: int = Field(16, ge=1, description="adapters count alpha / rank")
    lora_base: str = Field("", description="bundle of the net that is adapted")

    @model_validator(mode="after")
    def _belong_together(self) -> TrainerSettings:
        for broken, message in (
            (
                self.processes > 1 and self.sharding == "none",
                f"sharding: expected ddp, fsdp or deepspeed with processes = {self.processes}, was none",
            ),
            (
                self.processes == 1 and self.sharding == "fsdp",
                "processes: expected at least 2 with sharding = fsdp, was 1",
            ),
            (
                self.offload and self.sharding not in ("fsdp", "deepspeed"),
                f"sharding: expected fsdp or deepspeed with offload, was {self.sharding}",
            ),
            (
                self.precision == "fp16" and self.sharding == "fsdp",
                "precision: expected fp32 or bf16 with sharding = fsdp, was fp16",
            ),
            (
                self.prefetch > 0 and not self.loader_workers,
                "loader_workers: expected at least 1 with prefetch, was 0",
            ),
            (
                self.shared_memory and not self.loader_workers and self.processes == 1,
                "loader_workers: expected at least 1, or processes of at least 2, with shared_memory, was 0",
            ),
            (
                self.resume and not self.checkpoint_steps,
                "checkpoint_steps: expected at least 1 with resume, was 0",
            ),
            (
                self.sharding == "deepspeed" and self.checkpoint_steps > 0,
                f"checkpoint_steps: expected 0 with sharding = deepspeed, was {self.checkpoint_steps}",
            ),
            (
                bool(self.lora_rank) != bool(self.lora_base),
                "lora_rank, lora_base: expected both or neither, was one of them",
            ),
        ):
            if broken:
                raise ValueError(message)
        return self


class UniverseSettings(Section):
    """Many symbols in one run: `tickserve universe train`."""

    engine: Literal["local", "ray"] = Field("local", description="ray: on the machines of a Ray cluster")
    workers: int = Field(1, ge=1, le=256, description="processes that train at the same time; they share the threads")
    ahead: int = Field(1, ge=0, le=8, description="symbols whose features are prepared while others train; 0: none")
    pooled: bool = Field(True, description="also one model from the rows of all symbols")
    name: str = Field("universe", min_length=1, max_length=60, description="the pooled model's name starts with it")
    memory_mb: int = Field(0, ge=0, description="of all processes of the run together; 0: limits.memory_mb")
    ray_address: str = Field("", description="host:port of a cluster; auto: RAY_ADDRESS; empty: a Ray of the run's own")
    folder: str = Field("runs/universe", min_length=1, description="results and bundles of a run go below it")

    @model_validator(mode="after")
    def _address_of_ray(self) -> UniverseSettings:
        if self.ray_address and self.engine != "ray":
            raise ValueError(f"engine: expected ray with ray_address, was {self.engine}")
        if not MODEL_NAME_PATTERN.fullmatch(self.name) or ".." in self.name:
            raise ValueError(f"name: expected [a-z0-9._-] without '..', was {self.name!r}")
        return self


class LimitSettings(Section):
    """What a run may use; passing one is reported, not hidden."""

    memory_mb: int = Field(2_048, ge=256)
    run_s: float = Field(60.0, gt=0)


class Config(Section):
    """Everything that can be set."""

    profile: Literal["quick", "production"] = "quick"
    seed: int = Field(7, ge=0)
    features: FeatureSettings = FeatureSettings()
    labels: LabelSettings = LabelSettings()
    validation: ValidationSettings = ValidationSettings()
    costs: CostSettings = CostSettings()
    gbdt: GbdtSettings = GbdtSettings()
    lstm: LstmSettings = LstmSettings()
    compress: CompressSettings = CompressSettings()
    export: ExportSettings = ExportSettings()
    runtime: RuntimeSettings = RuntimeSettings()
    tensorrt: TensorrtSettings = TensorrtSettings()
    repository: RepositorySettings = RepositorySettings()
    serve: ServeSettings = ServeSettings()
    swap: SwapSettings = SwapSettings()
    client: ClientSettings = ClientSettings()
    batching: BatchingSettings = BatchingSettings()
    loadtest: LoadtestSettings = LoadtestSettings()
    journal: JournalSettings = JournalSettings()
    tune: TuneSettings = TuneSettings()
    mlp: MlpSettings = MlpSettings()
    tcn: TcnSettings = TcnSettings()
    deeplob: DeepLobSettings = DeepLobSettings()
    tlob: TlobSettings = TlobSettings()
    trainer: TrainerSettings = TrainerSettings()
    universe: UniverseSettings = UniverseSettings()
    limits: LimitSettings = LimitSettings()

    @property
    def families(self) -> tuple[str, ...]:
        """The families that are trained, in the order of `tickserve.manifest.Family`."""
        sections = ((name, getattr(self, name, None)) for name in get_args(Family))
        return tuple(name for name, section in sections if section is not None and section.enabled)

    @model_validator(mode="after")
    def _something_to_train(self) -> Config:
        if not self.families:
            names = ", ".join(f"{name}.enabled" for name in get_args(Family))
            raise ValueError(f"{names}: expected at least one true, was all false")
        return self
