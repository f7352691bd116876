"""The training loop: what changes no result, what has to take effect, and what is refused because it could not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from models.registry import NETS
from tests.training.small_nets import BlockNet, block_job
from tickserve.config import Config, TrainerSettings
from tickserve.errors import ComponentError, ConfigError, MissingExtraError, TickserveError
from tickserve.settings import load_settings
from training.examples import Examples
from training.job import Fit
from training.nets import NetJob, machine
from training.nets.engine import Engine
from training.nets.windows import Loader, WindowSet, scaler


@pytest.fixture(autouse=True)
def _registry() -> Iterator[None]:
    yield
    NETS.pop("blocks", None)


def lstm(examples: Examples, config: Config, batch_rows: int = 300, **trainer: Any) -> NetJob:
    settings = config.lstm.model_copy(update={"max_train_windows": 1_000, "batch_rows": batch_rows})
    return NetJob("lstm", examples, settings, 7, TrainerSettings(**trainer))


def weights(fit: Fit) -> np.ndarray:
    return torch.cat([tensor.flatten() for tensor in fit.model.state_dict().values()]).numpy()


def trained(job: NetJob, examples: Examples) -> np.ndarray:
    return weights(job.fit(examples.folds[0]))


def test_accumulated_batches_are_one_step_also_where_the_last_is_short(examples: Examples, config: Config) -> None:
    whole = trained(lstm(examples, config, 300), examples)
    parts = trained(lstm(examples, config, 75, accumulate=4), examples)
    np.testing.assert_allclose(parts, whole, atol=2e-6)
    assert np.abs(trained(lstm(examples, config, 75), examples) - whole).max() > 1e-3


def test_bf16_of_an_lstm_is_refused_where_the_processor_has_none(
    examples: Examples, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "cpu_has_bf16", lambda: False)
    with pytest.raises(ComponentError, match=r"trainer\.precision: this processor has no bf16 for an LSTM"):
        lstm(examples, config, precision="bf16").fit(examples.folds[0])
    block_job(examples, TrainerSettings(precision="bf16")).fit(examples.folds[0])


def test_bf16_takes_effect_and_stays_near(examples: Examples, config: Config) -> None:
    if not machine.cpu_has_bf16():
        with pytest.raises(ComponentError, match=r"trainer\.precision"):
            lstm(examples, config, precision="bf16").fit(examples.folds[0])
        return
    losses: dict[str, list[float]] = {"fp32": [], "bf16": []}
    for name, said in losses.items():
        job = lstm(examples, config, precision=name)
        job.watch = lambda step, loss, said=said: said.append(loss)
        assert all(tensor.dtype == torch.float32 for tensor in job.fit(examples.folds[0]).model.state_dict().values())
    assert losses["bf16"] != losses["fp32"]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=2e-3)


def test_workers_and_shared_memory_change_no_bit(examples: Examples) -> None:
    alone = trained(block_job(examples, TrainerSettings()), examples)
    many = TrainerSettings(loader_workers=2, prefetch=3, shared_memory=True)
    np.testing.assert_array_equal(trained(block_job(examples, many), examples), alone)


def test_workers_give_the_batches_that_were_asked_for_pass_after_pass(examples: Examples) -> None:
    windows = WindowSet(examples.features, np.zeros(len(examples.ret), np.int8), 5, (5, examples.features.shape[1]))
    orders = [[np.arange(start, start + 9) for start in starts] for starts in ((90, 10, 50, 30, 70), (20, 40))]
    with Loader(windows, TrainerSettings(loader_workers=2)) as loader:
        for order in orders:
            for rows, batch in zip(order, loader.batches(order), strict=True):
                assert torch.equal(batch.rows.nan_to_num(), windows[rows].rows.nan_to_num())


def test_the_weights_of_the_lowest_validation_loss_are_kept(examples: Examples, config: Config) -> None:
    job, losses = lstm(examples, config), []
    job.settings = job.settings.model_copy(update={"epochs": 6, "learning_rate": 0.1, "patience": 2})
    job.watch = lambda step, loss: losses.append(loss)
    fit, task = job.fit(examples.folds[0]), job.task(examples.folds[0])
    assert fit.best == int(np.argmin(losses)) + 1
    assert len(losses) in (6, fit.best + 2)
    said = torch.from_numpy(job.score(fit, job.inputs(task.validation))).log()
    loss = torch.nn.functional.nll_loss(said, torch.from_numpy(task.classes[task.validation].astype(np.int64)))
    assert float(loss) == pytest.approx(min(losses), rel=1e-5)


def test_the_cosine_ends_at_nothing(examples: Examples, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []
    step = Engine.step
    monkeypatch.setattr(Engine, "step", lambda self, rate: rates.append(rate) or step(self, rate))
    trained(lstm(examples, config, schedule="cosine"), examples)
    assert rates[0] == config.lstm.learning_rate
    assert rates == sorted(rates, reverse=True)
    assert len(rates) == 8
    assert 0 < rates[-1] < 0.05 * rates[0]


def test_blocks_computed_again_keep_less_and_change_no_bit(examples: Examples) -> None:
    def kept_bytes(again: bool) -> tuple[np.ndarray, int]:
        most = 0

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal most
            most += tensor.nbytes
            return tensor

        job = block_job(examples, TrainerSettings(activation_checkpointing=again))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            return trained(job, examples), most

    (plain, all_bytes), (again, some_bytes) = kept_bytes(False), kept_bytes(True)
    np.testing.assert_array_equal(plain, again)
    assert some_bytes < 0.5 * all_bytes


@pytest.mark.system
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")
def test_a_compiled_net_learns_the_same(examples: Examples) -> None:
    from torch._inductor import config as inductor

    with inductor.patch(fallback_random=True):  # dropout of the same numbers
        plain, compiled = (
            trained(block_job(examples, TrainerSettings(compile=on), epochs=1), examples) for on in (False, True)
        )
    assert np.abs(compiled - plain).max() > 0
    np.testing.assert_allclose(compiled, plain, atol=1e-4)


def test_the_scaler_in_parts_is_that_of_the_whole(examples: Examples, monkeypatch: pytest.MonkeyPatch) -> None:
    from training.baselines import column_scale

    rows = examples.folds[-1].rows.train
    monkeypatch.setattr("training.nets.windows.CHUNK_ROWS", 1_000)
    for part, whole in zip(
        scaler(examples.features, rows), column_scale(examples.features[rows].astype(np.float64)), strict=True
    ):
        np.testing.assert_allclose(part, whole, rtol=1e-6)


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
@pytest.mark.parametrize(
    ("option", "error", "reason"),
    [
        ({"precision": "fp16"}, ComponentError, r"trainer\.precision: no effect.*use bf16"),
        ({"pin_memory": True}, ComponentError, r"trainer\.pin_memory: no effect"),
        ({"cudnn_benchmark": True}, ComponentError, r"trainer\.cudnn_benchmark: no effect"),
        ({"cuda_alloc_conf": "expandable_segments:True"}, ComponentError, r"trainer\.cuda_alloc_conf: no effect"),
        ({"device": "cuda"}, ComponentError, r"trainer\.device: no GPU here"),
        ({"sharding": "deepspeed"}, MissingExtraError, r"'deepspeed' is not installed"),
        ({"activation_checkpointing": True}, ConfigError, r"lstm has no blocks"),
        ({"compile": True}, ConfigError, r"leaves the recurrent layers of lstm as they are"),
        ({"aligned": 64}, ConfigError, r"lstm\.batch_rows: not aligned.*was 300 \(nearest: 256 or 320\)"),
    ],
)
def test_what_would_have_no_effect_is_refused_with_its_reason(
    examples: Examples, config: Config, option: dict[str, Any], error: type[TickserveError], reason: str
) -> None:
    with pytest.raises(error, match=reason) as refused:
        trained(lstm(examples, config, **option), examples)
    assert refused.value.exit_code == (2 if error is ConfigError else 4)


def test_compile_without_a_compiler_is_refused(examples: Examples) -> None:
    from torch._inductor import config as inductor

    with (
        inductor.patch({"cpp.cxx": ("/nowhere/g++",)}),
        pytest.raises(ComponentError, match=r"trainer\.compile: no C\+\+ compiler here \(install g\+\+"),
    ):
        trained(block_job(examples, TrainerSettings(compile=True)), examples)


def test_aligned_sizes_pass(examples: Examples) -> None:
    trained(block_job(examples, TrainerSettings(aligned=16), epochs=1), examples)
    with pytest.raises(ConfigError, match=r"blocks\.width: not aligned: expected a multiple.*nearest: 16 or 32"):
        trained(block_job(examples, TrainerSettings(aligned=16), width=20), examples)


@pytest.mark.parametrize(
    ("keys", "field"),
    [
        ({"trainer.processes": 2}, "trainer.sharding"),
        ({"trainer.sharding": "fsdp"}, "trainer.processes"),
        ({"trainer.offload": True}, "trainer.sharding"),
        ({"trainer.sharding": "fsdp", "trainer.processes": 2, "trainer.precision": "fp16"}, "trainer.precision"),
        ({"trainer.prefetch": 4}, "trainer.loader_workers"),
        ({"trainer.shared_memory": True}, "trainer.loader_workers"),
        ({"trainer.resume": True}, "trainer.checkpoint_steps"),
        ({"trainer.lora_rank": 4}, "trainer.lora_rank"),
        ({"trainer.sharding": "deepspeed", "trainer.checkpoint_steps": 9}, "trainer.checkpoint_steps"),
    ],
)
def test_options_that_need_another_are_refused_without_it(keys: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load_settings(environ={}, overrides=keys)
    assert str(refused.value).startswith(field)


def test_ddp_alone_is_plain_training(examples: Examples) -> None:
    plain, alone = (trained(block_job(examples, TrainerSettings(sharding=name)), examples) for name in ("none", "ddp"))
    np.testing.assert_array_equal(alone, plain)


def test_a_fit_leaves_no_settings_behind(examples: Examples, config: Config) -> None:
    before = trained(lstm(examples, config), examples)
    trained(block_job(examples, TrainerSettings(precision="bf16", accumulate=2)), examples)
    np.testing.assert_array_equal(trained(lstm(examples, config), examples), before)
    assert isinstance(block_job(examples, TrainerSettings()).fit(examples.folds[0]).model, BlockNet)
