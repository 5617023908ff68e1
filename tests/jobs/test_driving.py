"""Tasks handed out to workers, which here do them in threads of this process."""

import re
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest

from lori_manager.errors import BadData, DamagedObject, InvalidInput, LoriError, StorageFailed
from lori_manager.jobs import driving
from lori_manager.jobs.driving import Lost, train_jobs
from lori_manager.jobs.job import Failed, Job, work
from lori_manager.jobs.news import Reader, Writer
from lori_manager.store.files import MissingObject
from lori_manager.teaching import TrainOptions
from lori_manager.training import Progress

TASKS = ["size", "colour", "shape"]


class Crew:
    """Workers of which some are lost or fail; what they do is done by one thread."""

    threads = 1

    def __init__(self, lost=(), failing=(), interrupted=False):
        self.lost, self.failing, self.interrupted = list(lost), failing, interrupted
        self.at_once = self.stopped = None
        self.begun, self.running, self.most = [], 0, 0
        self.pool = ThreadPoolExecutor(1)

    def __call__(self, at_once, folder):
        self.at_once = at_once
        return self

    def start(self, job):
        self.begun.append(job.task)
        self.running += 1
        self.most = max(self.most, self.running)
        if job.task in self.lost:
            self.lost.remove(job.task)
            return Lost("its process was killed")
        if job.task in self.failing:
            return Failed("BadData", "row 3 is empty")
        return self.pool.submit(work, job)

    def answer(self, started):
        if self.interrupted:
            raise KeyboardInterrupt
        if isinstance(started, Lost | Failed):
            self.running -= 1
            return started
        if not started.done():
            return None
        self.running -= 1
        return started.result()

    def stop(self):
        self.stopped = True
        self.pool.shutdown(wait=True)


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch, one_thread):
    monkeypatch.setattr(driving, "LOOK", 0.01)


def digests(trained):
    return [(one.adapter.ref, one.adapter.digest, one.scores[0].value) for one in trained]


def test_results_stand_in_the_order_given_and_are_those_of_one_after_another(ws, other):
    crew = Crew()
    trained = train_jobs(ws, TASKS, None, None, 2, crew)
    assert digests(trained) == digests(other.train(TASKS))
    assert [one.adapter.task for one in trained] == TASKS
    assert (crew.at_once, crew.most, crew.stopped) == (2, 2, True)
    assert ws.store.open_runs() == []
    assert not list(ws.store.runs.iterdir())


def test_no_more_workers_are_wanted_than_there_are_tasks(ws):
    crew = Crew()
    train_jobs(ws, ["size"], None, None, 8, crew)
    assert crew.at_once == 1


def test_a_lost_worker_s_task_is_given_to_another_and_that_is_told(ws, other):
    told = []
    ws.on_message = told.append
    crew = Crew(lost=["colour", "colour"])
    trained = train_jobs(ws, TASKS, None, None, 3, crew)
    assert digests(trained) == digests(other.train(TASKS))
    assert crew.begun.count("colour") == 3
    assert [line for line in told if "was lost" in line] == [
        "colour: its worker was lost (its process was killed); it goes on from its last "
        "checkpoint in another"
    ] * 2


def test_a_task_whose_workers_are_lost_again_and_again_is_given_up(ws):
    crew = Crew(lost=["colour"] * 9)
    with pytest.raises(LoriError, match=r"colour: its worker was lost 4 times .* 2 trained"):
        train_jobs(ws, TASKS, None, None, 3, crew)
    assert crew.begun.count("colour") == 4


def test_a_failing_task_leaves_the_others_to_their_end_and_the_same_call_does_the_rest(ws, other):
    with pytest.raises(BadData, match=r"^colour: row 3 is empty; 2 trained, which the same"):
        train_jobs(ws, TASKS, None, None, 2, Crew(failing=["colour"]))
    assert {a.ref for a in ws.store.adapters()} == {"size@1", "shape@1"}
    trained = train_jobs(ws, TASKS, None, None, 2, Crew())
    assert digests(trained) == digests(other.train(TASKS))
    assert [one.resumed for one in trained] == [True, False, True]


def test_either_way_of_training_goes_on_with_what_the_other_left(ws, other):
    with pytest.raises(BadData):
        train_jobs(ws, TASKS, None, None, 2, Crew(failing=["shape"]))
    trained = ws.train(TASKS)
    assert [one.resumed for one in trained] == [True, True, False]
    assert digests(trained) == digests(other.train(TASKS))


def test_an_interruption_stops_the_workers_and_leaves_the_run_open(ws):
    crew = Crew(interrupted=True)
    with pytest.raises(KeyboardInterrupt):
        train_jobs(ws, TASKS, None, None, 2, crew)
    assert crew.stopped
    assert len(ws.store.open_runs()) == 1


def test_messages_and_progress_of_every_job_are_told_with_its_task(ws):
    messages, states = [], []
    ws.on_message, ws.on_progress = messages.append, states.append
    train_jobs(ws, TASKS, None, None, 2, Crew())
    for task in TASKS:
        assert sum(line.startswith(f"{task}: {task}@1: 4 steps in") for line in messages) == 1
    assert {state.job for state in states} <= set(TASKS)
    assert any(state.phase.startswith(f"scoring {state.job}@1") for state in states)


def test_jobs_that_go_on_from_an_adapter_give_what_one_after_another_does(ws, other):
    for one in (ws, other):
        one.train(["shape"])
    options = TrainOptions(start="shape@1")
    trained = train_jobs(ws, ["size", "colour"], None, options, 2, Crew())
    assert digests(trained) == digests(other.train(["size", "colour"], None, options))
    assert [one.adapter.parents[0].ref for one in trained] == ["shape@1"] * 2


def test_orthogonal_rows_are_given_out_in_the_order_of_the_tasks(ws, other):
    config = ws.settings.config.replace(projection="orthogonal")
    crew = Crew()
    crew.begun = []
    backwards = crew.start

    def late(job):  # the first task asks last
        return backwards(job) if job.stage or crew.begun[-2:] else Lost("not yet")

    crew.start = late
    trained = train_jobs(ws, TASKS, config, None, 3, crew)
    assert digests(trained) == digests(other.train(TASKS, config))
    assert [one.adapter.facts["A"]["first_row"] for one in trained] == [0, 4, 8]


def test_tasks_that_would_avoid_one_another_are_refused(ws):
    config = ws.settings.config.replace(projection="nullspace")
    with pytest.raises(InvalidInput, match=r"none is before another: name what"):
        train_jobs(ws, TASKS, config, None, 2, Crew())
    assert ws.store.open_runs() == []


@pytest.mark.parametrize("at_once", [0, -1])
def test_no_jobs_at_a_time_are_refused(ws, at_once):
    with pytest.raises(InvalidInput, match=f"--jobs must be at least 1, got {at_once}"):
        train_jobs(ws, TASKS, None, None, at_once, Crew())


def test_a_job_that_meets_a_bug_names_it(ws, monkeypatch):
    from lori_manager.jobs import job

    def broken(*_):
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr(job, "train_stage", broken)
    with pytest.raises(LoriError, match=r"size: division by zero \(Zero.*\); 2 more"):
        train_jobs(ws, TASKS, None, None, 2, Crew())


@pytest.mark.parametrize(
    ("raised", "kind"),
    [(MissingObject("its rows are gone"), DamagedObject), (OSError(28, "no space"), StorageFailed)],
)
def test_what_a_job_meets_is_told_in_the_nearest_class_of_errors(ws, monkeypatch, raised, kind):
    from lori_manager.jobs import job

    def broken(*_):
        raise raised

    monkeypatch.setattr(job, "train_stage", broken)
    with pytest.raises(kind, match=f"^size: {re.escape(str(raised))}$") as told:
        train_jobs(ws, ["size"], None, None, 1, Crew())
    assert told.type is kind


def test_slurm_s_warning_does_not_make_a_job_fail(ws, monkeypatch):
    from lori_manager.jobs import job

    def warned(*_):
        signal.raise_signal(signal.SIGUSR2)
        raise BadData("it went on")

    def as_submitit_does(*_):
        raise RuntimeError("Job not requeued because: timed-out and not checkpointable.")

    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setattr(job.Store, "open", warned)
    before = signal.signal(signal.SIGUSR2, as_submitit_does)
    try:
        answer = work(Job(str(ws.root), str(ws.store.root), "run", (), 0, {}, {}, 1))
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert answer == Failed("BadData", "it went on")


def test_what_was_cut_short_is_passed_over(tmp_path):
    reader, messages, states = Reader(tmp_path, 0), [], []
    (tmp_path / "job-0.log").write_bytes(b'"first"\n"sec"third"\n"\xff\n"fourth"\n"fif')
    for text in ("", '{"phase": ', "[]", "{}", '{"process": 1}'):
        (tmp_path / "job-0.json").write_text(text)
        reader.tell(states.append, messages.append)
    assert (messages, states) == (["first", "fourth"], [])
    Writer(tmp_path, 0).progress(Progress("training", 1, 2, 0.5, 9.0, 1.0))
    reader.tell(states.append, messages.append)
    assert [state.phase for state in states] == ["training"]


def test_a_task_that_another_worker_still_holds_is_waited_for_and_not_trained_twice(
    ws, monkeypatch
):
    from lori_manager.jobs import job
    from lori_manager.teaching import held_lock

    monkeypatch.setattr(job, "PATIENCE", 0.2)
    crew = Crew()
    start = crew.start

    def held(one):
        crew.lock = held_lock(ws.store.runs / one.run / "0.lock", "it")
        return start(one)

    crew.start = held
    with pytest.raises(LoriError, match="training size is running in another process"):
        train_jobs(ws, ["size"], None, None, 1, crew)
    crew.lock.release()
