from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from loadtest import formats
from loadtest.calibration_plot import draw_calibration
from loadtest.report import ARTEFACTS, write_report
from tests.loadtest.conftest import whole_run, write_run
from tickserve.errors import ArtifactError


def page_of(folder: Path, **changes: object) -> str:
    files = {name: value for name, value in (whole_run() | changes).items() if value is not None}
    return write_report(write_run(folder, files)).read_text()


def test_the_whole_run_is_on_the_page(tmp_path: Path) -> None:
    page = page_of(tmp_path)
    assert "not run" not in page
    assert "SIMULATED" not in page
    for shown in (
        "usdm_btcusdt.jsonl.gz became a served signal in 42.3 s and 1.28 GB, inside the limits (60 s, 2 GB)",
        "btcusdt-l5-gbdt: better than every baseline", "89,509", "best bid above best ask; not emitted",
        "reused from the cache",
        "last move", "Fold 3", "+0.100", "−0.070", "57.1 %", "1.2 × 10⁻⁷", "12,345", "bundle_id -42", "400 µs",
        "1.5 ms", "18.4 s", "2.7 times smaller", "tickserve predict btcusdt-l5-gbdt", "n eff",
        '<p class="note">IC +0.100; PnL -1.72 bp a trade after costs</p>',
        "8,000 of 16,000 rows to learn", "more than the flat band (0.15 to 0.45 bp, by fold)", "without latency",
        "after a fee of 1 bp a side", "the quoted half-spread a side",
    ):  # fmt: skip
        assert shown in page, shown
    assert page.count('<svg class="calibration"') == 1
    assert 'src="data:image/svg+xml;base64,' in page


def test_a_model_that_did_not_pass_is_labelled_so(tmp_path: Path) -> None:
    page = page_of(tmp_path)
    for shown in (
        "The validation gate was passed by none.", 'class="bad">NOT met</th><td class="wrap">an IC whose interval',
        '<th scope="row">met</th><td class="wrap">better than every baseline</td>',
        '<span class="pill no bad">validation gate NOT PASSED</span>', "an IC whose interval lies above 0",
        "20 trials tried: luck alone would reach a t of 1.87", "the deflated probability of the IC is 0.631",
        "Sharpe ratio after costs 0.012 (−0.200 a trade, 58 trades)",
        "58 round trips, 0.0644 for each row, 116 for each 24 hours recorded (0.5 days)",
        "0, 1 and 2 times the fee: +0.28, −1.72 and −3.72 bp", "2,000 draws; 41 blocks",
        "<td>+0.050 to +0.150</td>", "<td>51.0 % to 63.0 %</td>", "<td>too few</td>",
        "<td>700</td><td>88</td><td>+0.123</td><td>too few independent rows</td><td>60.0 %</td>",
        "<td>60.0 %</td><td>55</td><td>−0.77</td>",
        "<td>77</td><td>9</td><td>–</td><td>too few independent rows</td><td>–</td><td>5</td><td>–</td>",
    ):  # fmt: skip
        assert shown in page, shown
    files = whole_run()
    files["train"][0]["gate"]["passed"] = True
    passed = page_of(tmp_path / "passed", **files)
    assert '<span class="pill">validation gate passed</span>' in passed
    assert "The validation gate was passed by btcusdt-l5-gbdt." in passed
    assert "NOT PASSED" not in passed


def test_a_run_from_before_the_gate_is_drawn(tmp_path: Path) -> None:
    files = whole_run()
    report = files["train"][0]
    for key in ("gate", "regimes", "resampling", "deflation"):
        del report[key]
    for values in (report["pooled"]["model"], *report["pooled"]["baselines"].values()):
        for key in ("interval", "days", "turnover_per_row", "turnover_per_day", "pnl_bps_by_fees"):
            values.pop(key, None)
    page = page_of(tmp_path, **files)
    assert "validation gate" not in page.lower()
    assert "95 % interval</th>" not in page


def test_the_page_needs_nothing_from_outside(tmp_path: Path) -> None:
    page = page_of(tmp_path)
    assert re.findall(r'(?:src|href)="(?!data:)[^"]*"', page) == []
    assert not re.search(r"url\(|@import|<script|https?://", page)


def test_the_same_run_gives_the_same_bytes(tmp_path: Path) -> None:
    assert page_of(tmp_path / "a") == page_of(tmp_path / "b")


@pytest.mark.parametrize("missing", ARTEFACTS)
def test_any_file_may_be_missing(tmp_path: Path, missing: str) -> None:
    page = page_of(tmp_path, **{missing: None})
    assert ("not run" in page) == (missing != "run")


def test_nothing_was_run(tmp_path: Path) -> None:
    page = write_report(tmp_path).read_text()
    assert page.count("not run") == 8


@pytest.mark.parametrize("where", ["run", "quality"])
def test_simulated_data_say_so_before_anything_else(tmp_path: Path, where: str) -> None:
    files = whole_run()
    files[where]["simulated"] = True
    page = page_of(tmp_path, **files)
    assert page.index("SIMULATED DATA") < page.index("<h1>")


def test_a_run_past_its_limits_is_not_called_inside(tmp_path: Path) -> None:
    files = whole_run()
    files["run"]["peak_memory_mb"] = 4_096.0
    assert "OUTSIDE the limits" in page_of(tmp_path, **files)


def test_a_limit_that_was_not_kept_is_on_the_page_and_one_that_was_is_not(tmp_path: Path) -> None:
    files = whole_run()
    gate = {"name": "limit.train_s", "passed": False, "detail": "training took 301.0 s; limits.train_s is at most 300"}
    files["train"][0]["limits"] = [gate | {"passed": True, "detail": ""}]
    assert "Limit not kept" not in page_of(tmp_path / "kept", **files)
    files["train"][0]["limits"] = [gate]
    words = "Limit not kept. btcusdt-l5-gbdt: training took 301.0 s; limits.train_s is at most 300"
    assert words in page_of(tmp_path / "broken", **files)


@pytest.mark.parametrize("words", ["no clear difference from linear", "worse than last_move"])
def test_no_winner_is_said(tmp_path: Path, words: str) -> None:
    files = whole_run()
    files["train"][0]["beats_baselines"] = False
    files["train"][0]["comparison"]["words"] = words
    files["train"].append(files["train"][0] | {"model": "btcusdt-l5-lstm"})
    page = page_of(tmp_path, **files)
    assert f"95 % interval: btcusdt-l5-gbdt and btcusdt-l5-lstm: {words}." in page
    assert f'<span class="pill no">{words}</span>' in page
    assert '<span class="pill">' not in page


@pytest.mark.parametrize(
    ("share", "words"),
    [
        (1.0, "an assumed half-spread of 1.5 bp a side (these data carry no quotes)"),
        (0.25, "the quoted half-spread a side (1.5 bp assumed in the 25.0 % of rows without a quote)"),
    ],
)
def test_an_assumed_spread_is_called_one(tmp_path: Path, share: float, words: str) -> None:
    files = whole_run()
    files["train"][0]["costs"]["assumed_spreads"] = share
    assert words in page_of(tmp_path, **files)


def test_a_model_that_learned_from_every_row_says_so_plainly(tmp_path: Path) -> None:
    files = whole_run()
    assert "Fold 1 · 8,000 rows to learn" in page_of(tmp_path, **files)


@pytest.mark.parametrize(
    ("pnl", "words"),
    [(-1.72, "the best loses 1.72 bp a trade"), (0.4, "the best makes 0.40 bp a trade, latency not counted")],
)
def test_skill_is_not_said_without_what_it_earns(tmp_path: Path, pnl: float, words: str) -> None:
    files = whole_run()
    files["train"][0]["pooled"]["model"]["pnl_bps"] = pnl
    assert words in page_of(tmp_path, **files)


def test_failed_requests_and_hidden_waiting_stand_out(tmp_path: Path) -> None:
    files = whole_run()
    files["loadtest"]["rows"][1] |= {
        "failures": 2,
        "errors": {"DeadlineExceededError: late": 2},
        "queueing_visible": False,
    }
    page = page_of(tmp_path, **files)
    assert "2 × DeadlineExceededError: late" in page
    assert page.count('<td class="bad">') == 2


def test_what_the_files_hold_cannot_become_markup(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"
    files = json.loads(json.dumps(whole_run()).replace("btcusdt-l5-gbdt", evil).replace("usdm_btcusdt.jsonl.gz", evil))
    page = page_of(tmp_path, **files)
    assert "<script" not in page
    assert "&lt;script&gt;" in page


def test_a_spoilt_plot_cannot_become_markup(tmp_path: Path) -> None:
    folder = write_run(tmp_path, whole_run())
    (folder / "latency.svg").write_text("<svg><script>alert(1)</script></svg>")
    assert "<script" not in write_report(folder).read_text()


@pytest.mark.parametrize("text", ["{", "[]", '{"rows": 3}', "3"])
def test_a_file_that_is_not_what_its_stage_writes_is_named(tmp_path: Path, text: str) -> None:
    folder = write_run(tmp_path, whole_run())
    (folder / "run.json").write_text(text)
    if text == "[]":  # as good as absent
        write_report(folder)
        return
    with pytest.raises(ArtifactError):
        write_report(folder)
    assert not (folder / "report.html").exists()


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (formats.count(12_345.4), "12,345"), (formats.count(None), "–"), (formats.signed(-0.07), "−0.070"),
        (formats.signed(float("nan")), "–"), (formats.percent(0.5714), "57.1 %"),
        (formats.general(1.234e-7), "1.2 × 10⁻⁷"),
        (formats.general(0), "0"), (formats.general(-12_345.6), "−12,346"), (formats.micros(987.6), "988 µs"),
        (formats.micros(12_345), "12.3 ms"), (formats.micros(2.5e6), "2.5 s"), (formats.seconds(0.42), "0.42 s"),
        (formats.seconds(754.2), "12 min 34 s"), (formats.seconds(7_260), "2 h 1 min"),
        (formats.megabytes(512.3), "512 MB"),
        (formats.megabytes(2_048), "2 GB"),
    ],
)  # fmt: skip
def test_numbers_are_for_people(shown: str, expected: str) -> None:
    assert shown == expected


def test_calibration_without_rows_or_beyond_its_range_is_drawn() -> None:
    assert draw_calibration([], "m").count("<circle") == 0
    odd = [{"rows": 5, "predicted": 0.2, "observed": 0.3}, {"rows": 0, "predicted": 0.9, "observed": 0.9}]
    svg = draw_calibration(odd, "m")
    assert svg.count("<circle") == 1
    assert ">50 %<" in svg
