"""Runtimes measured and chosen: every candidate judged, a rule slow to leave the default, a record kept."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from export import export_bundle, job
from export.onnx_graph import BUNDLE_ID, PROBABILITIES, SCORE
from export.parity import Recorded, Rows, Served, score_of
from export.publish import Terms, _gated_for, read_pairs
from export.repository.force import rollback
from export.repository.lint import lint
from export.repository.places import Local, open_repository
from export.research import load_research
from export.runtime import measure_latency, open_session
from export.runtimes import survey as surveys
from export.runtimes.candidates import Absent, Contestant, cores, cpu_name, find
from export.runtimes.choose import FEW, GAIN, choose, may_be_chosen
from export.runtimes.measure import EFFORTS, Effort, interleaved, picked
from export.runtimes.survey import batches_of, judge, options_of, survey, without
from export.triton_config import build_config, parse_config, read_config
from loadtest.report import write_report
from tickserve.cli.commands import app
from tickserve.client import _local
from tickserve.config import ExportSettings, RepositorySettings
from tickserve.errors import ConfigError, GateRefusedError
from tickserve.manifest import Manifest, load_bundle, load_manifest, parse_manifest
from tickserve.runtimes import Gated, RuntimeCandidate, RuntimeRecord, Timing
from tickserve.settings import load_settings

DEFAULT = cpu_name(1)


def timings(*medians: float, calls: int = 200, tail: float = 2.0) -> tuple[Timing, ...]:
    """One timing for each of 1, 8 and 16 rows."""
    return tuple(
        Timing(rows=rows, calls=calls, p25_us=float(us), p50_us=float(us), p99_us=us * tail)
        for rows, us in zip((1, 8, 16), medians, strict=True)
    )


def candidate(name: str, *medians: float, **changes: Any) -> RuntimeCandidate:
    fields = {"name": name, "served": True, "threads": 1, "graph_level": 0, "decisions": "same"}
    times = timings(*medians) if medians else ()
    return RuntimeCandidate.model_validate(fields | {"timings": times} | changes)


def record_of(*rows: RuntimeCandidate) -> RuntimeRecord:
    return surveys._record(rows, DEFAULT, "quick")


@pytest.fixture
def judged(trees_bundle_once: Path) -> tuple[bytes, Manifest, Recorded, Any]:
    manifest = load_bundle(trees_bundle_once)
    research = load_research(trees_bundle_once, manifest)
    graph = job.to_onnx(manifest, research).SerializeToString(deterministic=True)
    return graph, manifest, read_pairs(trees_bundle_once / "parity.npz", manifest), research


def test_contestants_take_turns_and_are_called_as_often() -> None:
    order: list[str] = []
    calls = {name: (lambda name=name: order.append(name)) for name in "abc"}
    taken = interleaved(calls, Effort(0.0, 40, 40))
    assert {name: len(times) for name, times in taken.items()} == dict.fromkeys("abc", 40)
    firsts = [order[index] for index in range(len(order)) if index == 0 or order[index] != order[index - 1]]
    assert len(firsts) >= 20, "blocks alternate instead of one contestant after the other"
    before = set(itertools.pairwise(firsts))
    assert len(before) == 6, "and each follows each: a contestant leaves its caches to a different one every time"
    assert interleaved({}, EFFORTS["quick"]) == {}


def test_a_batch_is_made_of_the_same_real_rows_at_every_measurement() -> None:
    assert np.array_equal(picked(300, 16), picked(300, 16))
    assert len(set(picked(300, 16).tolist())) == 16
    assert set(picked(5, 16).tolist()) == set(range(5)), "fewer rows than the batch are used again"


def test_latency_is_measured_for_each_batch(judged: tuple[bytes, Manifest, Recorded, Any]) -> None:
    graph, manifest, recorded, _ = judged
    taken = measure_latency(graph, {manifest.inputs[0].name: recorded.rows}, (16, 1, 16), calls=30)
    assert [(each.rows, each.calls) for each in taken] == [(1, 30), (16, 30)]
    assert all(0 < each.p25_us <= each.p50_us <= each.p99_us for each in taken)


def test_every_candidate_for_trees_is_judged_and_timed(
    judged: tuple[bytes, Manifest, Recorded, Any], settings: ExportSettings
) -> None:
    graph, manifest, recorded, research = judged
    record = survey(graph, manifest, recorded, research, settings, "quick")
    names = [each.name for each in record.candidates]
    assert names[0] == DEFAULT
    assert {"treelite GTIL, 1 thread", "xgboost inplace_predict, 1 thread", f"{DEFAULT}, io_binding"} <= set(names)
    assert (cpu_name(2) in names) == (cores() >= 2)
    here = [each for each in record.candidates if each.timings]
    assert all(each.decisions == "same" for each in here)
    assert {timing.rows for each in here for timing in each.timings} == set(batches_of(settings)) == {1, 4, 8, 16}
    absent = {each.name: each.reason or "" for each in record.candidates if not each.timings}
    assert "Triton FIL backend" in absent
    assert all(reason.startswith("not here: ") for reason in absent.values())
    assert record.candidate(record.chosen).served
    assert "GPU" in record.reason
    assert str(cores()) in record.machine
    assert "/" not in record.machine


def test_a_net_is_measured_without_engines_for_trees(
    judged: tuple[bytes, Manifest, Recorded, Any],
) -> None:
    graph, manifest, _, research = judged
    net = manifest.model_copy(update={"family": "lstm"})
    names = [each.name for each in find(graph, net, research, threads=1, instances=1)]
    assert not [name for name in names if "treelite" in name or "xgboost" in name or "FIL" in name]
    alone = {each.name: each for each in find(graph, manifest, None, threads=1, instances=1)}
    assert isinstance(alone["treelite GTIL, 1 thread"], Absent), "a published version has the graph alone"


def test_threads_that_every_instance_cannot_have_are_no_candidate(
    judged: tuple[bytes, Manifest, Recorded, Any],
) -> None:
    graph, manifest, _, _ = judged
    names = [each.name for each in find(graph, manifest, None, threads=1, instances=cores())]
    assert cpu_name(2) not in names


def contestant(answer: Any) -> Contestant:
    return Contestant("other", answer, lambda rows: lambda: answer(rows), served=True, threads=1, graph_level=0)


def test_a_candidate_with_other_decisions_is_never_chosen(judged: tuple[bytes, Manifest, Recorded, Any]) -> None:
    _, manifest, recorded, research = judged

    def answered(probabilities: Rows) -> Served:
        ids = np.full((len(probabilities), 1), manifest.bundle_id(), np.int64)
        return {PROBABILITIES: probabilities, SCORE: score_of(probabilities), BUNDLE_ID: ids}

    assert judge(contestant(lambda rows: answered(research.predict(rows))), recorded, manifest) == ""
    flipped = judge(contestant(lambda rows: answered(research.predict(rows)[:, ::-1].copy())), recorded, manifest)
    assert flipped.startswith("another answer in probabilities")
    assert judge(contestant(lambda rows: 1 / 0), recorded, manifest).startswith("cannot score: division")
    fast = candidate("fast", 1, 1, 1, decisions="differ", reason=flipped)
    assert choose([candidate(DEFAULT, 100, 100, 100), fast], DEFAULT)[0] == DEFAULT


def test_the_rule_takes_what_is_faster_and_no_slower_alone() -> None:
    base = candidate(DEFAULT, 100, 200, 400)
    two = candidate(cpu_name(2), 100, 150, 250, threads=2)
    slow_alone = candidate("slow alone", 110, 20, 20)
    close = candidate("close", *(value * (1 - GAIN / 2) for value in (100, 200, 400)))
    best = candidate("best", 60, 100, 200)
    assert choose([base], DEFAULT)[0] == DEFAULT
    assert choose([base, slow_alone, close], DEFAULT)[0] == DEFAULT
    assert choose([base, slow_alone, close, two], DEFAULT)[0] == cpu_name(2)
    assert choose([base, two, best], DEFAULT)[0] == "best"


def test_the_rule_does_not_take_what_the_configuration_cannot_ask_for() -> None:
    base, beside = candidate(DEFAULT, 100, 200, 400), candidate("treelite", 1, 2, 4, served=False)
    set_otherwise = candidate(cpu_name(2), 1, 2, 4, reason="export.threads asks for 1")
    assert choose([base, beside, set_otherwise], DEFAULT)[0] == DEFAULT


def test_few_calls_decide_nothing_and_a_bad_tail_counts_once_it_is_known() -> None:
    few = candidate("few", timings=timings(1, 1, 1, calls=FEW - 1))
    assert choose([candidate(DEFAULT, 100, 200, 400), few], DEFAULT)[0] == DEFAULT
    for calls, name in ((200, "tail"), (2_000, DEFAULT)):
        base = candidate(DEFAULT, timings=timings(100, 200, 400, calls=calls))
        tail = candidate("tail", timings=timings(50, 100, 200, calls=calls, tail=9.0))
        assert choose([base, tail], DEFAULT)[0] == name


def test_not_the_gpu_is_an_answer_and_is_said() -> None:
    base = candidate(DEFAULT, 100, 200, 400)
    absent = candidate("onnxruntime cuda", gpu=True, decisions="not run", reason="not here: no GPU")
    slow = candidate("onnxruntime cuda", 300, 300, 300, gpu=True)
    fast = candidate("onnxruntime cuda", 50, 60, 70, gpu=True)
    nothing_known = record_of(base, absent)
    assert (nothing_known.kind, "none was measured" in nothing_known.reason) == ("KIND_AUTO", True)
    not_the_gpu = record_of(base, slow)
    assert (not_the_gpu.chosen, not_the_gpu.kind) == (DEFAULT, "KIND_CPU")
    assert "not the GPU: measured, and no better" in not_the_gpu.reason
    the_gpu = record_of(base, fast)
    assert (the_gpu.chosen, the_gpu.kind) == ("onnxruntime cuda", "KIND_AUTO")
    assert options_of(the_gpu, ExportSettings()).gpu == "cuda"


def test_a_winner_has_to_win_again() -> None:
    rows = [candidate(DEFAULT, 100, 200, 400), candidate(cpu_name(2), 50, 100, 200, threads=2)]
    again = {DEFAULT: timings(100, 200, 400), cpu_name(2): timings(99, 199, 399)}
    unproven = surveys._confirmed(rows, again, DEFAULT)
    assert choose(unproven, DEFAULT)[0] == DEFAULT
    assert "timed again" in (unproven[1].reason or "")
    proven = surveys._confirmed(rows, {**again, cpu_name(2): timings(51, 101, 201)}, DEFAULT)
    assert choose(proven, DEFAULT)[0] == cpu_name(2)


TWO = record_of(candidate(DEFAULT, 100, 200, 400), candidate(cpu_name(2), 50, 100, 200, threads=2, graph_level=1))


def test_the_config_asks_for_what_was_chosen_unless_the_user_says_otherwise(
    trees_bundle: Path, repository: Path, settings: ExportSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "survey", lambda *_: TWO)
    published = export_bundle(trees_bundle, repository, settings, measure="quick")
    assert published.manifest.export is not None
    assert published.manifest.export.runtime == TWO
    path = repository / published.model / "config.pbtxt"
    assert (read_config(path).intra_op_threads, read_config(path).graph_level) == (2, 1)
    assert export_bundle(trees_bundle, repository, settings).reused
    assert read_config(path).intra_op_threads == 2, "exported again, the config still follows what was measured"
    explicit = export_bundle(trees_bundle, repository, settings.model_copy(update={"threads": 1}))
    assert (explicit.version, explicit.reused) == (2, False), "one thread was not what the gates judged"
    assert (read_config(path).intra_op_threads, read_config(path).graph_level) == (1, 0)
    assert export_bundle(trees_bundle, repository, settings).version == 1
    assert read_config(path).intra_op_threads == 1, "the configuration is that of the version in force"


def test_other_threads_are_gated_and_published_anew_and_go_with_the_version_in_force(
    trees_bundle: Path, repository: Path, settings: ExportSettings
) -> None:
    first = export_bundle(trees_bundle, repository, settings)
    path = repository / first.model / "config.pbtxt"
    many = settings.model_copy(update={"threads": 8})
    second = export_bundle(trees_bundle, repository, many)
    assert (second.version, second.reused, read_config(path).intra_op_threads) == (2, False, 8)
    records = [each.manifest.export for each in (first, second)]
    assert [each.gated for each in records if each] == [
        Gated(threads=1, graph_level=0),
        Gated(threads=8, graph_level=0, asked=8),
    ]
    assert first.manifest.digest() == second.manifest.digest()
    assert export_bundle(trees_bundle, repository, many).version == 2
    rollback(Local(repository), first.model, 1, keep=settings.keep_versions)
    assert read_config(path).intra_op_threads == 1
    assert export_bundle(trees_bundle, repository, many).version == 2
    assert read_config(path).intra_op_threads == 1, "version 1 is in force, and it was gated with one thread"
    assert not [each for each in lint(Local(repository)) if each.rule == "gated"]
    other = r'\g<1>"8"'
    path.write_text(re.sub(r'("intra_op_thread_count"\s+value \{\s+string_value: )"1"', other, path.read_text()))
    messages = [each.message for each in lint(Local(repository)) if each.rule == "gated"]
    assert messages == ["asks for threads 8; version 1 was gated with 1"]
    rollback(Local(repository), first.model, 2, keep=settings.keep_versions)
    assert read_config(path).intra_op_threads == 8
    opened: list[tuple[int, ...]] = []
    original = _local.open_session

    def spied(graph: bytes, *asked: int) -> Any:
        opened.append(asked)
        return original(graph, *asked)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_local, "open_session", spied)
        for version in (1, 2):
            _local.LocalModel(repository / first.model / str(version))
    assert opened == [(1, 0), (8, 0)]


def test_a_version_that_is_not_put_in_force_does_not_change_the_threads(
    trees_bundle: Path, repository: Path, settings: ExportSettings
) -> None:
    first = export_bundle(trees_bundle, repository, settings)
    many = settings.model_copy(update={"threads": 2})
    beside = export_bundle(trees_bundle, repository, many, terms=Terms(activate=False))
    assert beside.version == 2
    assert read_config(repository / first.model / "config.pbtxt").intra_op_threads == 1


def test_versions_of_before_count_as_gated_with_what_was_measured(
    trees_bundle: Path, repository: Path, settings: ExportSettings
) -> None:
    published = export_bundle(trees_bundle, repository, settings)
    stored = json.loads((published.path / "manifest.json").read_bytes())
    del stored["export"]["gated"]
    older = parse_manifest(json.dumps(stored).encode())
    assert older.stored() == stored
    assert older.export is not None
    assert older.export.judged_with() is None
    measured = older.export.model_copy(update={"runtime": TWO})
    assert measured.judged_with() == Gated(threads=2, graph_level=1)
    assert _gated_for(older.export, settings)
    assert not _gated_for(older.export, settings.model_copy(update={"threads": 8}))


def test_trees_are_given_more_threads_by_a_person_only(judged: tuple[bytes, Manifest, Recorded, Any]) -> None:
    _, manifest, _, _ = judged
    two = Contestant(cpu_name(2), lambda _: {}, lambda _: lambda: None, served=True, threads=2, graph_level=0)
    net = manifest.model_copy(update={"family": "lstm"})
    found = {}
    for word, each, asked in (("trees", manifest, 0), ("asked", manifest, 2), ("net", net, 0)):
        verdicts, times = {two.name: ""}, {two.name: timings(50, 100, 200)}
        row = surveys._row(two, verdicts, times, each, ExportSettings(threads=asked))
        found[word] = may_be_chosen(row)
        if word == "trees":
            assert "one thread only" in (row.reason or "")
            assert choose([candidate(DEFAULT, 100, 200, 400), row], DEFAULT)[0] == DEFAULT
    assert found == {"trees": False, "asked": True, "net": True}


def test_kind_cpu_is_written_where_the_gpu_was_measured_and_lost(
    trees_bundle: Path, repository: Path, settings: ExportSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = candidate("onnxruntime cuda", 300, 300, 300, gpu=True)
    monkeypatch.setattr(job, "survey", lambda *_: record_of(candidate(DEFAULT, 100, 200, 400), slow))
    published = export_bundle(trees_bundle, repository, settings, measure="quick")
    text = build_config(published.manifest, settings, {})
    assert parse_config(text).kinds == ("KIND_CPU",)


def test_a_choice_that_a_gate_refuses_falls_back(
    trees_bundle: Path,
    repository: Path,
    settings: ExportSettings,
    monkeypatch: pytest.MonkeyPatch,
    judged: tuple[bytes, Manifest, Recorded, Any],
) -> None:
    from onnx import load_model_from_string

    graph = judged[0]
    drifted = load_model_from_string(graph)
    for node in drifted.graph.node:
        for attribute in node.attribute:
            if attribute.name == "class_weights":
                attribute.floats[0] += 0.5

    def other(content: bytes, options: surveys.Options) -> Any:
        return open_session(drifted.SerializeToString() if options.threads == 2 else content)

    monkeypatch.setattr(job, "survey", lambda *_: TWO)
    monkeypatch.setattr(job, "open_chosen", other)
    published = export_bundle(trees_bundle, repository, settings, measure="quick")
    record = published.manifest.export.runtime if published.manifest.export else None
    assert record is not None
    assert record.chosen == DEFAULT
    assert record.reason.startswith(f"{cpu_name(2)!r} was refused by a gate")
    assert (record.candidate(cpu_name(2)).reason or "").startswith("refused by a gate: ")
    with pytest.raises(GateRefusedError):
        export_bundle(trees_bundle, repository.parent / "other", settings.model_copy(update={"threads": 2}))


def test_without_the_default_there_is_nothing_left() -> None:
    settings = ExportSettings()
    fallen = without(TWO, settings, "drift")
    assert fallen is not None
    assert (fallen.chosen, fallen.threads, fallen.graph_level) == (DEFAULT, 1, 0)
    assert without(fallen, settings, "drift") is None


def test_the_record_does_not_change_the_bundle_digest_nor_older_manifests(
    trees_bundle: Path, repository: Path, settings: ExportSettings
) -> None:
    plain = export_bundle(trees_bundle, repository, settings)
    measured = export_bundle(trees_bundle, repository.parent / "measured", settings, measure="quick")
    assert plain.manifest.digest() == measured.manifest.digest() == load_manifest(trees_bundle).digest()
    stored = json.loads((plain.path / "manifest.json").read_bytes())
    assert "runtime" not in stored["export"]
    assert parse_manifest((plain.path / "manifest.json").read_bytes()).stored() == stored
    again = parse_manifest((measured.path / "manifest.json").read_bytes())
    assert again.export == measured.manifest.export
    assert measured.parity["latency"]["rows"] == 1


def test_measuring_is_a_setting() -> None:
    assert load_settings(environ={}).config.runtime.measure == "quick"
    assert load_settings(profile="production", environ={}).config.runtime.measure == "full"
    assert load_settings(environ={"TICKSERVE_RUNTIME__MEASURE": "off"}).config.runtime.measure == "off"
    with pytest.raises(ConfigError, match=r"runtime\.measure"):
        load_settings(environ={"TICKSERVE_RUNTIME__MEASURE": "sometimes"})


def test_the_report_shows_the_table_and_marks_the_choice(tmp_path: Path) -> None:
    beside = candidate("<treelite>", 300, 300, 300, served=False)
    record = record_of(*TWO.candidates, beside).model_dump(mode="json")
    item = {"model": "net", "version": 1, "gates": [], "runtime": record}
    (tmp_path / "export.json").write_text(json.dumps([item, item | {"runtime": None}]))
    page = write_report(tmp_path).read_text()
    section = page.partition('<section id="runtimes">')[2].partition("</section>")[0]
    assert f'<tr class="ours"><th scope="row">{cpu_name(2)}</th>' in section
    assert "&lt;treelite&gt;" in section
    assert "measured beside" in section
    (tmp_path / "export.json").write_text(json.dumps([item | {"runtime": None}]))
    assert 'id="runtimes"' not in write_report(tmp_path).read_text()


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The effort each publish measured with; what it measured is `TWO`, so that `full` takes no minutes."""
    efforts: list[str] = []

    def survey(*arguments: Any) -> RuntimeRecord:
        efforts.append(arguments[-1])
        return TWO.model_copy(update={"effort": arguments[-1]})

    monkeypatch.setattr(job, "survey", survey)
    return efforts


def publish_by(*arguments: str, **environment: str) -> None:
    done = CliRunner().invoke(app, arguments, env={"TICKSERVE_EXPORT__PARITY_ROWS": "100"} | environment)
    assert done.exit_code == 0, done.output


def held(version: Path) -> tuple[RuntimeRecord | None, int]:
    """What a published manifest says was measured, and the threads that config.pbtxt asks for."""
    record = load_manifest(version).export
    return record.runtime if record else None, read_config(version.parent / "config.pbtxt").intra_op_threads


def test_repo_publish_measures_as_export_does(trees_bundle: Path, tmp_path: Path, measured: list[str]) -> None:
    name, full = load_bundle(trees_bundle).name, TWO.model_copy(update={"effort": "full"})
    for folder, *words in (("a", "export"), ("b", "repo", "publish"), ("c", "repo", "publish", "--no-activate")):
        publish_by(*words, str(trees_bundle), "--repository", str(tmp_path / folder), "--profile", "production")
        assert held(tmp_path / folder / name / "1") == (full, 2)
    assert measured == ["full"] * 3
    off = {"TICKSERVE_RUNTIME__MEASURE": "off"}
    publish_by("repo", "publish", str(trees_bundle), "--repository", str(tmp_path / "d"), **off)
    assert held(tmp_path / "d" / name / "1") == (None, 1)
    assert len(measured) == 3


def test_repo_publish_into_a_bucket_measures_too(
    trees_bundle: Path, measured: list[str], service: RepositorySettings, raw: Any
) -> None:
    raw.mkdir("measured")
    url, name = "s3://measured/models", load_bundle(trees_bundle).name
    endpoint = {"TICKSERVE_REPOSITORY__S3_ENDPOINT_URL": service.s3_endpoint_url}
    publish_by("repo", "publish", str(trees_bundle), "--repository", url, **endpoint)
    with open_repository(url, service) as remote:
        assert held(remote.folder(name, 1)) == (TWO, 2)
    assert measured == ["quick"]
