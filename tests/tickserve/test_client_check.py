"""What is refused before it is sent. The client here points at a port where nobody listens: nothing may reach it."""

from __future__ import annotations

import asyncio
import math
import socket
import time
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from tickserve.client import AsyncClient, Client, InferRequest, Tensor
from tickserve.client._check import Contract
from tickserve.client._http import encode
from tickserve.errors import (
    ArtifactError,
    DeadlineExceededError,
    DigestMismatchError,
    InputRejectedError,
    ModelNotFoundError,
    TransportError,
    UsageError,
)
from tickserve.manifest import Manifest, TensorSpec

MODEL = "hand-l1-gbdt"


def kind(value: object) -> str:
    """A test's name for a value that cannot be printed."""
    return type(value).__name__


@pytest.fixture(scope="module")
def nobody() -> Iterator[str]:
    """An address that refuses connections: bound, and never listened on."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{sock.getsockname()[1]}"


@pytest.fixture
def client(nobody: str, make_manifest: Any) -> Iterator[Client]:
    with Client(nobody, manifest=make_manifest()) as opened:
        yield opened


def refused(client: Client, inputs: Any, **options: Any) -> InputRejectedError:
    with pytest.raises(InputRejectedError) as caught:
        client.score(MODEL, inputs, **options)
    assert caught.value.model == MODEL
    assert caught.value.request_id
    return caught.value


def test_a_good_row_gets_as_far_as_the_wire(client: Client, rows: np.ndarray, nobody: str) -> None:
    with pytest.raises(TransportError, match=nobody):
        client.score(MODEL, rows)


def test_missing_and_extra_tensors(client: Client, rows: np.ndarray) -> None:
    assert refused(client, {}).field == "features"
    assert refused(client, {"feature": rows}).field == "features"
    error = refused(client, {"features": rows, "more": rows})
    assert (error.field, error.expected) == ("more", "features")


@pytest.mark.parametrize("dtype", ["float64", "float16", ">f4", "int64", "object", "complex64", "U4", "bool"])
def test_no_dtype_is_cast(client: Client, rows: np.ndarray, dtype: str) -> None:
    error = refused(client, rows.astype(dtype))
    assert error.field == "features"
    assert error.expected == "float32 (FP32)"
    assert "astype(np.float32)" in str(error)


@pytest.mark.parametrize("value", [None, [[0.0] * 4], "rows", 1.0, memoryview(b"abcd")])
def test_only_arrays(client: Client, value: Any) -> None:
    assert refused(client, value).expected == "numpy.ndarray"


def test_a_masked_array_would_lose_its_mask(client: Client, rows: np.ndarray) -> None:
    assert refused(client, np.ma.masked_less(rows, 0)).was == "MaskedArray"


@pytest.mark.parametrize("shape", [(), (4,), (2, 3), (2, 5), (2, 1, 4), (2, 0)])
def test_wrong_rank_and_feature_count(client: Client, shape: tuple[int, ...]) -> None:
    error = refused(client, np.zeros(shape, np.float32))
    assert (error.expected, error.was) == ("[B, 4]", str(list(shape)))
    assert ("newaxis" in str(error)) == (shape == (4,))


@pytest.mark.parametrize("batch", [0, 9, 100_000])
def test_batch_of_none_and_over_the_maximum(client: Client, batch: int) -> None:
    error = refused(client, np.zeros((batch, 4), np.float32))
    assert (error.expected, error.was) == ("1 to 8 rows", str(batch))


def test_permuted_missing_and_foreign_columns(client: Client, rows: np.ndarray, make_manifest: Any) -> None:
    columns = make_manifest().features.columns
    permuted = refused(client, rows, columns=(columns[1], columns[0], *columns[2:]))
    assert "permuted columns, first at position 0" in str(permuted)
    assert permuted.expected == "'spread'"
    assert "wrong columns, first at position 3" in str(refused(client, rows, columns=(*columns[:3], "other")))
    assert refused(client, rows, columns=columns[:3]).expected == "4 columns"
    with pytest.raises(TransportError):
        client.score(MODEL, rows, columns=list(columns))


def test_features_of_another_spec(client: Client, rows: np.ndarray, make_manifest: Any) -> None:
    digest = make_manifest().features.digest
    assert refused(client, rows, feature_digest="sha256:" + "0" * 64).expected == digest
    with pytest.raises(TransportError):
        client.score(MODEL, rows, feature_digest=digest)


def test_a_client_that_requires_proof_refuses_a_call_without(nobody: str, make_manifest: Any, rows: np.ndarray) -> None:
    features = make_manifest().features
    with Client(nobody, manifest=make_manifest(), require_features=True) as strict:
        bare = refused(strict, rows)
        assert (bare.field, bare.was, bare.attempts) == ("feature_digest", "neither", 0)
        assert refused(strict, rows, columns=features.columns[:3]).field == "columns"
        assert refused(strict, rows, feature_digest="sha256:" + "0" * 64).expected == features.digest
        for proof in ({"feature_digest": features.digest}, {"columns": features.columns}):
            with pytest.raises(TransportError):
                strict.score(MODEL, rows, **proof)
    with Client(nobody, manifest=make_manifest(), require_features=True, fallback="signal") as strict:
        assert strict.score(MODEL, rows).status == "REJECTED_INPUT"


def test_a_client_for_asyncio_requires_it_too(nobody: str, make_manifest: Any, rows: np.ndarray) -> None:
    async def main() -> None:
        async with AsyncClient(nobody, manifest=make_manifest(), require_features=True) as strict:
            with pytest.raises(InputRejectedError, match="feature_digest"):
                await strict.score(MODEL, rows)
            with pytest.raises(TransportError):
                await strict.score(MODEL, rows, feature_digest=make_manifest().features.digest)

    asyncio.run(main())


@pytest.mark.parametrize("value", [1, 0, "yes", None])
@pytest.mark.parametrize("kind_of", [Client, AsyncClient])
def test_a_switch_is_true_or_false(nobody: str, make_manifest: Any, kind_of: Any, value: Any) -> None:
    with pytest.raises(UsageError, match="require_features"):
        kind_of(nobody, manifest=make_manifest(), require_features=value)


@pytest.mark.parametrize("value", [math.inf, -math.inf])
def test_infinity_is_named_with_row_and_column(client: Client, rows: np.ndarray, value: float) -> None:
    rows[1, 2] = value
    error = refused(client, rows)
    assert "row 1, column 'flow'" in str(error)
    assert error.was == str(np.float32(value))


def test_nan_is_refused_where_the_manifest_says_so(nobody: str, make_manifest: Any, rows: np.ndarray) -> None:
    rows[0, 3] = np.nan
    with Client(nobody, manifest=make_manifest(nan_policy="reject")) as strict:
        assert "row 0, column 'volatility'" in str(refused(strict, rows))
    for policy in ("native", "impute_mean"):
        checked = Contract(make_manifest(nan_policy=policy)).check_inputs(rows)
        assert checked.flags == ()
        assert np.array_equal(np.frombuffer(checked.tensors[0].data, "<f4").reshape(2, 4), rows, equal_nan=True)


def test_infinity_beside_nan_is_still_refused(client: Client, rows: np.ndarray) -> None:
    rows[0, 0], rows[1, 1] = np.nan, np.inf
    assert "row 1, column 'imbalance'" in str(refused(client, rows))


def test_far_outside_the_training_range_is_flagged_not_refused(make_manifest: Any, rows: np.ndarray) -> None:
    contract = Contract(make_manifest())  # trained on -5 to 5: the span is 10
    assert contract.check_inputs(rows).flags == ()
    rows[0, 0], rows[1, 2] = 15.0, -15.0
    assert contract.check_inputs(rows).flags == ()
    rows[0, 0], rows[1, 3], rows[1, 1] = 15.1, -15.1, 1e30
    flags = contract.check_inputs(rows).flags
    assert flags == ("out_of_range:spread", "out_of_range:imbalance", "out_of_range:volatility")


def ranged(manifest: Manifest, low: tuple[float, ...], high: tuple[float, ...]) -> Manifest:
    features = manifest.features.model_copy(update={"minimum": low, "maximum": high})
    return manifest.model_copy(update={"features": features, "export": None})


def test_a_column_constant_in_training_is_flagged_for_any_other_value(make_manifest: Any) -> None:
    contract = Contract(ranged(make_manifest(), (0.1, 0.0, 0.0, 0.0), (0.1, 1.0, 1.0, 1.0)))
    row = np.array([[0.1, 0.5, 0.5, 0.5]], np.float32)
    assert contract.check_inputs(row).flags == ()
    row[0, 0] = 0.11
    assert contract.check_inputs(row).flags == ("out_of_range:spread",)


def test_the_widest_range_still_keeps_infinity_outside(make_manifest: Any) -> None:
    contract = Contract(ranged(make_manifest(), (-3e38,) * 4, (3e38,) * 4))
    assert contract.check_inputs(np.full((1, 4), 3.4e38, np.float32)).flags == ()
    with pytest.raises(InputRejectedError, match="not finite"):
        contract.check_inputs(np.full((1, 4), np.inf, np.float32))


def test_a_batch_too_large_is_refused_before_its_values_are_read(make_manifest: Any) -> None:
    array = np.broadcast_to(np.float32(np.inf), (2**40, 4))  # 16 TiB, were it looked at
    with pytest.raises(InputRejectedError, match="wrong batch size"):
        Contract(make_manifest()).check_inputs(array)


def test_windows_name_row_step_and_column(make_manifest: Any) -> None:
    window = TensorSpec(name="window", dtype="FP32", shape=(3, 4))
    contract = Contract(make_manifest(inputs=(window,), nan_policy="reject"))
    array = np.zeros((2, 3, 4), np.float32)
    assert contract.check_inputs(array).batch == 2
    array[1, 2, 0] = np.nan
    with pytest.raises(InputRejectedError, match="row 1, step 2, column 'spread'"):
        contract.check_inputs({"window": array})
    array[1, 2, 0] = 99
    assert contract.check_inputs(array).flags == ("out_of_range:spread",)


@pytest.mark.parametrize(
    "layout",
    [
        lambda rows: np.asfortranarray(rows),
        lambda rows: np.repeat(rows, 2, axis=1)[:, ::2],
        lambda rows: rows[::-1][::-1],
        lambda rows: np.broadcast_to(rows[:1], (3, 4)),
        lambda rows: np.frombuffer(rows.tobytes(), np.float32).reshape(rows.shape),
        lambda rows: rows.view(type("Sub", (np.ndarray,), {})),
    ],
    ids=["fortran", "strided", "reversed", "broadcast", "read-only", "subclass"],
)
def test_any_memory_layout_is_sent_in_c_order(make_manifest: Any, rows: np.ndarray, layout: Any) -> None:
    array = layout(rows)
    sent = Contract(make_manifest()).check_inputs(array).tensors[0]
    assert np.array_equal(np.frombuffer(sent.data, "<f4").reshape(sent.shape), np.array(array))


@pytest.mark.parametrize("name", ["../x", "", "a\0b", "x" * 10_000, "a/b", "A", "..", ".hidden", "a b", "é", None, 3])
def test_model_names_that_are_no_names(client: Client, rows: np.ndarray, name: Any) -> None:
    with pytest.raises(InputRejectedError) as caught:
        client.score(name, rows)
    assert caught.value.field == "model"
    assert len(str(caught.value)) < 300


def test_a_model_without_a_manifest_is_not_asked(client: Client, rows: np.ndarray) -> None:
    with pytest.raises(ModelNotFoundError, match="no manifest is pinned for model 'other'") as caught:
        client.score("other", rows)
    assert (caught.value.expected, caught.value.model) == (MODEL, "other")


def test_a_client_that_pins_nothing_says_how(nobody: str, rows: np.ndarray) -> None:
    for url in (nobody, f"grpc://{nobody}"):
        with Client(url) as bare, pytest.raises(UsageError, match=r"manifest=\.\.\."):
            bare.score(MODEL, rows)


@pytest.mark.parametrize("version", [0, -1, True, 1.0, "1", 2**63, 10**5000, np.bool_(1), np.float32(1)], ids=kind)
def test_versions_that_are_no_versions(client: Client, rows: np.ndarray, version: Any) -> None:
    assert refused(client, rows, version=version).field == "version"


def test_numbers_of_numpy_are_numbers(client: Client, rows: np.ndarray) -> None:
    for number in (np.int64, np.int32, np.uint8):
        with pytest.raises(TransportError):
            client.score(MODEL, rows, version=number(1))
    for deadline in (np.float32(50), np.float64(50), np.int64(50), Fraction(50)):
        with pytest.raises(TransportError):
            client.score(MODEL, rows, deadline_ms=deadline, newest_event_ns=np.int64(time.time_ns()))  # type: ignore[arg-type]


class Unprintable:
    def __repr__(self) -> str:
        raise RuntimeError("no")


@pytest.mark.parametrize(
    "value", [5, 10**5000, "spread", [1, 2, 3, 4], [np.zeros(2)] * 4, [Unprintable()] * 4, [None]], ids=kind
)
def test_columns_that_are_no_names(client: Client, rows: np.ndarray, value: Any) -> None:
    assert refused(client, rows, columns=value).field == "columns"


@pytest.mark.parametrize("value", [5, 10**5000, np.zeros(3), Unprintable(), b"sha256:"], ids=kind)
def test_digests_that_are_no_digests(client: Client, rows: np.ndarray, value: Any) -> None:
    assert refused(client, rows, feature_digest=value).field == "feature_digest"


@pytest.mark.parametrize("value", [10**5000, Unprintable()], ids=kind)
def test_names_that_cannot_be_printed(client: Client, rows: np.ndarray, value: Any) -> None:
    for options in ({"model": value, "inputs": rows}, {"model": MODEL, "inputs": {value: rows}}):
        with pytest.raises(InputRejectedError):
            client.score(**options)
    with pytest.raises(InputRejectedError, match="request_id"):
        client.score(MODEL, rows, request_id=value)


@pytest.mark.parametrize("identity", ["", "a\nb", "\x00", "\x7f", "x" * 257, "\u2028", 5, b"x"])
def test_request_ids_that_are_refused(client: Client, rows: np.ndarray, identity: Any) -> None:
    with pytest.raises(InputRejectedError) as caught:
        client.score(MODEL, rows, request_id=identity)
    assert caught.value.field == "request_id"
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "deadline", [0, -1, -0.0, math.nan, math.inf, True, "100", 3_600_001, 10**400, 10**5000, 1j], ids=kind
)
def test_deadlines_that_are_no_time_spans(
    client: Client, rows: np.ndarray, deadline: Any, nobody: str, make_manifest: Any
) -> None:
    assert refused(client, rows, deadline_ms=deadline).field == "deadline_ms"
    for field in ("deadline_ms", "max_age_ms"):
        with pytest.raises(UsageError, match=field):
            Client(nobody, manifest=make_manifest(), **{field: deadline})


def test_a_deadline_of_a_microsecond_passes_before_anything_is_sent(client: Client, rows: np.ndarray) -> None:
    began = time.perf_counter()
    with pytest.raises(DeadlineExceededError, match="before the request was sent"):
        client.score(MODEL, rows, deadline_ms=0.001)
    assert time.perf_counter() - began < 0.05


def test_events_too_old_give_a_signal_without_a_number(nobody: str, make_manifest: Any, rows: np.ndarray) -> None:
    with Client(nobody, manifest=make_manifest(), max_age_ms=50) as client:
        stale = client.score(MODEL, rows, newest_event_ns=time.time_ns() - 60_000_000)
        assert (stale.status, stale.probabilities, stale.score, stale.decision) == ("STALE", None, None, None)
        assert stale.event_age_us is not None
        assert 60_000 <= stale.event_age_us < 5_000_000
        with pytest.raises(TransportError):
            client.score(MODEL, rows, newest_event_ns=time.time_ns())


def test_an_age_limit_needs_a_time_it_can_believe(nobody: str, make_manifest: Any, rows: np.ndarray) -> None:
    with Client(nobody, manifest=make_manifest(), max_age_ms=50) as client:
        assert "newest_event_ns" in str(refused(client, rows))
        ahead = refused(client, rows, newest_event_ns=time.time_ns() + 10**9)
        assert "in the future" in str(ahead)
        for value in (0, -1, 1.5, True, "now", 2**63, 10**5000):
            assert refused(client, rows, newest_event_ns=value).field == "newest_event_ns"


def test_a_closed_client_says_so(nobody: str, make_manifest: Any, rows: np.ndarray) -> None:
    for url in (nobody, f"grpc://{nobody}"):
        client = Client(url, manifest=make_manifest())
        client.close()
        client.close()
        with pytest.raises(UsageError, match="closed"):
            client.score(MODEL, rows)


def broken(model: Any, **changes: Any) -> Any:
    return model.model_copy(update=changes)


def test_a_manifest_that_contradicts_itself_is_not_pinned(make_manifest: Any) -> None:
    good = make_manifest()
    Contract(good)
    with pytest.raises(DigestMismatchError, match="changed after export"):
        Contract(broken(good, nan_policy="reject"))
    plain = broken(good, export=None)
    negative = TensorSpec(name="features", dtype="FP32", shape=(-1,))
    with pytest.raises(ArtifactError, match="negative or zero dimension"):
        Contract(broken(plain, inputs=(negative,)))
    with pytest.raises(ArtifactError, match="lacks tensors"):
        Contract(broken(plain, outputs=plain.outputs[:1]))
    for columns, low in ((("a", "b"), (0.0,)), (("a", "b", "c"), (0.0, 0.0))):
        ranges = broken(plain.features, columns=columns, minimum=low, maximum=(1.0, 1.0))
        with pytest.raises(ArtifactError, match="differ in number"):
            Contract(broken(plain, features=ranges))


def spec(name: str, *shape: int, dtype: Any = "FP32") -> TensorSpec:
    return TensorSpec(name=name, dtype=dtype, shape=shape)


PROBABILITIES, SCORE, BUNDLE = spec("probabilities", 3), spec("score", 1), spec("bundle_id", 1, dtype="INT64")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"inputs": (spec("features", 5),)}, "not as wide as the manifest's columns"),
        ({"inputs": (spec("features", 4, 3),)}, "not as wide"),
        ({"inputs": (spec("features"),)}, "not as wide"),
        ({"inputs": (spec("features", 4, dtype="INT64"),)}, "not as wide"),
        ({"inputs": (spec("features", 4), spec("more", 2))}, "not as wide"),
        ({"inputs": ()}, "input tensors"),
        ({"inputs": (spec("features", 4), spec("features", 4))}, "given twice"),
        ({"outputs": (spec("probabilities", 4), SCORE, BUNDLE)}, "no signal can be made"),
        ({"outputs": (PROBABILITIES, spec("score", 3), BUNDLE)}, "no signal can be made"),
        ({"outputs": (PROBABILITIES, SCORE, spec("bundle_id", 1))}, "no signal can be made"),
        ({"outputs": (PROBABILITIES, SCORE, BUNDLE, SCORE)}, "given twice"),
        ({"classes": ("up", "flat", "down")}, "other classes"),
        ({"classes": ("down", "flat", "up", "more")}, "other classes"),
    ],
)
def test_a_manifest_whose_tensors_do_not_fit_its_columns_and_classes(
    make_manifest: Any, changes: dict[str, Any], says: str
) -> None:
    with pytest.raises(ArtifactError, match=says):
        Contract(broken(make_manifest(), export=None, **changes))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"columns": ("a", "a", "b", "c")}, "given twice"),
        ({"minimum": (6.0, 0.0, 0.0, 0.0)}, "the range of column 'spread'"),
        ({"maximum": (math.nan, 5.0, 5.0, 5.0)}, "the range of column 'spread'"),
        ({"maximum": (5.0, 5.0, 5.0, math.inf)}, "the range of column 'volatility'"),
        ({"columns": ("a", "b", "c"), "minimum": (0.0,) * 3, "maximum": (1.0,) * 3}, "not as wide"),
    ],
)
def test_a_manifest_whose_columns_are_none(make_manifest: Any, changes: dict[str, Any], says: str) -> None:
    good = make_manifest()
    with pytest.raises(ArtifactError, match=says):
        Contract(broken(good, export=None, features=broken(good.features, **changes)))


@pytest.mark.parametrize("lane", [0, 3, -1, 2**70, 1.0, "1", True, float("nan"), b"1", [1]], ids=kind)
def test_a_lane_is_1_or_2(client: Client, rows: np.ndarray, lane: Any) -> None:
    error = refused(client, rows, priority=lane)
    assert error.field == "priority"


@pytest.mark.parametrize("lane", [None, 1, 2, np.int64(2)])
def test_a_lane_gets_as_far_as_the_wire(client: Client, rows: np.ndarray, lane: Any) -> None:
    with pytest.raises(TransportError):
        client.score(MODEL, rows, priority=lane)


def test_a_lane_is_a_parameter_and_no_lane_is_not_a_byte() -> None:
    plain = InferRequest("m", None, "abc", 1_000, (Tensor("x", "FP32", (1, 1), bytes(4)),))
    (head, data), (laned, same) = (encode(request, "h:1") for request in (plain, plain._replace(priority=2)))
    assert data == same
    assert b'{"id":"abc","parameters":{"timeout":1000,"binary_data_output":true},' in head
    assert b'{"id":"abc","parameters":{"timeout":1000,"priority":2,"binary_data_output":true},' in laned
