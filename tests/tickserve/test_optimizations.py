"""Active or inactive, and why: what is set, and what is missing for it to take effect."""

from __future__ import annotations

from typing import Any

import pytest

from tickserve.doctor.optimizations import RULES, Machine, optimizations
from tickserve.settings import load_settings

BARE = Machine(gpu=False, compiler=False, ray=False)
RICH = Machine(gpu=True, compiler=True, ray=True)


def found(name: str, machine: Machine, **changes: Any) -> tuple[bool, str]:
    overrides = {key.replace("__", "."): value for key, value in changes.items()}
    lines = optimizations(load_settings(environ={}, overrides=overrides).config, machine)
    (line,) = [each for each in lines if each.name == name]
    return line.active, line.why


@pytest.mark.parametrize(
    ("name", "machine", "changes", "active", "why"),
    [
        ("mixed precision", RICH, {}, False, "trainer.precision = fp32"),
        ("mixed precision", BARE, {"trainer__precision": "bf16"}, True, "trainer.precision = bf16"),
        ("mixed precision", BARE, {"trainer__precision": "fp16"}, False, "without a GPU"),
        ("mixed precision", RICH, {"trainer__precision": "fp16"}, True, "fp16"),
        ("mixed precision", RICH, {"trainer__precision": "bf16", "lstm__enabled": False}, False, "no net is trained"),
        ("torch.compile", RICH, {"trainer__compile": True}, False, "recurrent layers stay"),
        ("torch.compile", BARE, {"trainer__compile": True, "mlp__enabled": True}, False, "no C++ compiler"),
        ("torch.compile", RICH, {"trainer__compile": True, "mlp__enabled": True}, True, "trainer.compile = True"),
        ("page-locked batches", BARE, {"trainer__pin_memory": True}, False, "no GPU here"),
        ("memory-mapped features", BARE, {}, False, "from trainer.memmap_above_mb = 1,024 on"),
        ("memory-mapped features", BARE, {"trainer__memmap": True}, True, "trainer.memmap = True"),
        ("external memory", BARE, {"gbdt__external_memory": True}, True, "gbdt.external_memory = True"),
        ("external memory", BARE, {"gbdt__external_memory": True, "gbdt__enabled": False}, False, "gbdt.enabled"),
        ("XGBoost memory pool", BARE, {"gbdt__memory_pool": "cuda_async"}, False, "no GPU here"),
        ("XGBoost memory pool", RICH, {"gbdt__memory_pool": "cuda_async"}, True, "cuda_async"),
        ("Ray cluster", BARE, {"universe__engine": "ray"}, False, "Ray is not installed"),
        ("native backend", BARE, {"serve__backend": "python"}, False, "serve.backend = python"),
        ("quantile matrices", BARE, {"gbdt__enabled": False}, False, "gbdt.enabled = False"),
        ("activation checkpointing", BARE, {"trainer__activation_checkpointing": True}, False, "no net with blocks"),
    ],
)
def test_what_is_at_work_and_why(name: str, machine: Machine, changes: Any, active: bool, why: str) -> None:
    said = found(name, machine, **changes)
    assert said[0] is active, said
    assert why in said[1]


def test_every_line_has_its_key_and_reason() -> None:
    lines = optimizations(load_settings(environ={}).config, BARE)
    assert len({each.name for each in lines}) == len(lines) == len(RULES) + 7
    assert all(each.why for each in lines)
