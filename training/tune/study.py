"""The study on disk or in a database: opened, gone on with, shared by several processes, and read back.

A run that was killed leaves a trial behind that nobody works on. The next run, which holds the study's lock, marks it
as failed and tries the same values again.
"""

from __future__ import annotations

import fcntl
import multiprocessing
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tickserve.config import Config, TuneSettings
from tickserve.errors import ComponentError, GateRefusedError, TickserveError, UsageError
from tickserve.store import check_writable
from training.examples import DataMeta
from training.tune.space import Space
from training.tune.trial import RAISED, Objective, question

Say = Callable[[str], None]
JOURNAL, LOCK, TURN = "journal.log", ".lock", ".turn"
ENDED = ("COMPLETE", "PRUNED")
# A trial of a worker on another machine that has not been heard of for so long is tried again.
HEARTBEAT_S = 60
RETRIES = 2


def open_storage(folder: Path, settings: TuneSettings) -> Any:
    """Optuna's storage: the database of `tune.storage`, else a journal in the study's folder."""
    from optuna.storages import JournalStorage, RDBStorage
    from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

    if settings.storage:
        return RDBStorage(settings.storage, heartbeat_interval=HEARTBEAT_S)
    path = str(folder / JOURNAL)
    return JournalStorage(JournalFileBackend(path, lock_obj=JournalFileOpenLock(path)))


def open_study(storage: Any, name: str, settings: TuneSettings) -> Any:
    """The study of that name, made where there is none. Raises UsageError when it had other objectives."""
    import optuna

    directions: list[Any] = ["maximize" if each in RAISED else "minimize" for each in settings.objectives]
    study = optuna.create_study(storage=storage, study_name=name, directions=directions, load_if_exists=True)
    was = study.user_attrs.setdefault("objectives", list(settings.objectives))
    if was != list(settings.objectives):
        expected = ", ".join(was)
        raise UsageError(
            "the study has other objectives", field="tune.objectives", expected=expected, hint="choose a new --study"
        )
    study.set_user_attr("objectives", was)
    return study


def _sampler(settings: TuneSettings, seed: int) -> Any:
    from optuna.samplers import NSGAIISampler, RandomSampler, TPESampler

    return {"tpe": TPESampler, "nsga2": NSGAIISampler, "random": RandomSampler}[settings.sampler](seed=seed)


def prunings(storage: Any, name: str, settings: TuneSettings, folds: int) -> list[Any]:
    """A study for each fold whose median says when a trial is given up; none where nothing is."""
    import optuna

    if settings.pruner == "none":
        return []
    return [
        optuna.create_study(
            storage=storage,
            study_name=f"{name}.fold-{number}",
            direction="minimize",
            load_if_exists=True,
            pruner=optuna.pruners.MedianPruner(
                n_startup_trials=settings.pruner_startup_trials, n_warmup_steps=settings.pruner_warmup_steps
            ),
        )
        for number in range(1, folds + 1)
    ]


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a study alone on this machine. Raises ComponentError when another run holds it."""
    check_writable(folder)
    with (folder / LOCK).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ComponentError(
                "another run works on this study", field=folder.name, hint="wait for it or choose another --study"
            ) from error
        yield


@dataclass(frozen=True)
class Search:
    """What is searched: `load` gives the feature table (a function that another process can be handed)."""

    load: Callable[[], Any]
    meta: DataMeta
    config: Config
    family: str
    space: Space
    name: str

    @property
    def folder(self) -> Path:
        """Where the study is kept."""
        return Path(self.config.tune.folder) / self.name


def search(wanted: Search, say: Say) -> Any:
    """Try until the study holds `tune.trials` finished trials; gives the study.

    Raises ComponentError (the study is in use, or a worker died), UsageError (it had other objectives),
    InsufficientDataError and GateRefusedError (a trial that knows the answer).
    """
    settings = wanted.config.tune
    with locked(wanted.folder), _quiet_optuna():
        study = open_study(open_storage(wanted.folder, settings), wanted.name, settings)
        _take_up(study, settings, say)
        workers = min(settings.workers, max(1, settings.trials - len(_trials(study, ENDED))))
        if workers == 1:
            _work(wanted, 0, say)
        else:
            _share(wanted, workers, say)
        return study


def _trials(study: Any, states: Sequence[str]) -> list[Any]:
    from optuna.trial import TrialState

    return list(study.get_trials(deepcopy=False, states=tuple(TrialState[name] for name in states)))


def _take_up(study: Any, settings: TuneSettings, say: Say) -> None:
    """Try again what a killed run was trying. A database is shared, and its heartbeat says whose trials are dead."""
    import optuna
    from optuna.trial import TrialState

    if settings.storage:
        optuna.storages.fail_stale_trials(study)
    else:
        for trial in _trials(study, ("RUNNING",)):
            study.tell(trial.number, state=TrialState.FAIL)
    retried = {trial.user_attrs.get("retry_of") for trial in study.get_trials(deepcopy=False)}
    for trial in _trials(study, ("FAIL",)):
        attempt = trial.user_attrs.get("attempt", 0) + 1
        if trial.params and trial.number not in retried and attempt <= RETRIES:
            study.enqueue_trial(trial.params, user_attrs={"retry_of": trial.number, "attempt": attempt})
            say(f"trial {trial.number} was cut off: its values are tried again")


def _work(wanted: Search, worker: int, say: Say) -> None:
    """Try in this process until the study has enough; trials that other processes are at count."""
    asked, settings = question(wanted.load(), wanted.meta, wanted.config, wanted.family), wanted.config.tune
    storage = open_storage(wanted.folder, settings)
    study = open_study(storage, wanted.name, settings)
    # Not the seed of an earlier run: it would draw the same values again.
    study.sampler = _sampler(settings, wanted.config.seed + worker + len(study.get_trials(deepcopy=False)))
    objective = Objective(asked, wanted.space, prunings(storage, wanted.name, settings, len(asked.examples.folds)))
    while True:
        with ExitStack() as turn:
            turn.enter_context(_alone(wanted.folder))
            if len(_trials(study, (*ENDED, "RUNNING"))) >= settings.trials:
                return

            def begun(trial: Any, turn: ExitStack = turn) -> Any:
                turn.close()  # it exists, so the next one counts it
                return objective(trial)

            study.optimize(begun, n_trials=1, callbacks=[lambda _, trial: say(line(trial, settings))])


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """For one process at a time, from counting the trials to beginning one: two at once would begin one too many."""
    with (folder / TURN).open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)  # closing would not do while a process that was forked meanwhile has it


def line(trial: Any, settings: TuneSettings) -> str:
    """A trial's outcome in a few words."""
    if trial.values is None:
        return f"trial {trial.number}: {trial.system_attrs.get('fail_reason') or trial.state.name.lower()}"
    shown = ", ".join(f"{name} {value:,.4g}" for name, value in zip(settings.objectives, trial.values, strict=True))
    return f"trial {trial.number}: {shown}"


def _share(wanted: Search, workers: int, say: Say) -> None:
    """Try in several processes. Raises what one of them was refused for, ComponentError when one died."""
    context = multiprocessing.get_context("spawn")
    told: Any = context.SimpleQueue()
    running = [context.Process(target=_worker, args=(wanted, number, told)) for number in range(workers)]
    say(f"{workers} processes try, up to {wanted.config.tune.trials} trials")
    for process in running:
        process.start()
    try:
        for process in running:
            process.join()
    finally:
        for process in running:
            process.terminate()
            process.join()
    if not told.empty():
        code, text = told.get()
        raise (GateRefusedError if code == GateRefusedError.exit_code else ComponentError)(text)
    died = [process.exitcode for process in running if process.exitcode]
    if died:
        raise ComponentError("a process of the search died", field="tune.workers", was=f"exit code {died[0]}")


def _worker(wanted: Search, number: int, told: Any) -> None:
    """Try in a process of its own; a refusal is handed over as text."""
    try:
        with _quiet_optuna():
            _work(wanted, number, lambda text: None)
    except TickserveError as error:
        told.put((error.exit_code, str(error)))


@contextmanager
def _quiet_optuna() -> Iterator[None]:
    """Optuna prints each trial, which the study keeps and `say` is told, and warns that its heartbeat is new."""
    import optuna

    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(before)
