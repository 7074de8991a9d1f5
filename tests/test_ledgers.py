"""The supervisor's ledgers without processes: histories go in, states and actions come out."""

import asyncio
import random
import typing
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spark_runtime.errors import CallFailed, ProtocolViolated, RequestRefused, WorkerDied
from spark_runtime.supervise import lifecycle
from spark_runtime.supervise.jobs import KEPT, MOST_CRASHES, Jobs
from spark_runtime.supervise.restarts import FIRST_SECONDS, LONGEST_SECONDS, MOST_IN_A_ROW, Restarts
from spark_workers import messages as m
from spark_workers.scripts.errors import SparkStopError, control_in

# --- the life cycle --------------------------------------------------------------------------------------------------

STATES = typing.get_args(lifecycle.State)
EVENTS = typing.get_args(lifecycle.Event)


def test_the_states_are_those_of_the_specification() -> None:
    assert (
        set(STATES)
        == set(lifecycle.TABLE)
        == set(
            ["starting", "idle", "running", "pausing", "paused", "reloading", "stopping", "stopped", "error", "done"]
        )
    )


@pytest.mark.parametrize("state", STATES)
def test_every_event_leads_to_a_state_or_is_one_clear_error(state: Any) -> None:
    for event in EVENTS:
        if event in lifecycle.TABLE[state]:
            assert lifecycle.next_state(state, event) in STATES
            continue
        with pytest.raises(RequestRefused if event in lifecycle.REQUESTS else ProtocolViolated) as refused:
            lifecycle.next_state(state, event)
        assert event in str(refused.value)
        assert state in str(refused.value)


@pytest.mark.parametrize(
    ("history", "states"),
    [
        ("start running finished", "starting running done"),
        ("start running idle", "starting running idle"),
        ("running pause paused resume", "running pausing paused running"),
        ("running pause resume", "running pausing running"),
        ("running pause paused step running paused", "running pausing paused running running paused"),
        ("running leave start running", "running reloading starting running"),
        ("paused leave start paused", "paused reloading starting paused"),
        ("running stop halted start", "running stopping stopped starting"),
        ("running pause paused stop halted", "running pausing paused stopping stopped"),
        ("running leave stop halted", "running reloading stopping stopped"),
        ("running failed start running", "running error starting running"),
        ("running stop failed", "running stopping error"),
        ("idle pause paused resume idle", "idle pausing paused running idle"),
        ("idle stop halted", "idle stopping stopped"),
        ("idle leave start idle", "idle reloading starting idle"),
        ("failed start failed", "error starting error"),
        ("stop halted", "stopping stopped"),
        ("running stop running paused idle halted", "running stopping stopping stopping stopping stopped"),
        ("running leave running paused start", "running reloading reloading reloading starting"),
        ("running pause pause paused pause", "running pausing pausing paused paused"),
    ],
)
def test_histories_lead_through_these_states(history: str, states: str) -> None:
    state: Any = "starting"
    seen = []
    for event in history.split():
        state = lifecycle.next_state(state, event)  # type: ignore[arg-type]
        seen.append(state)
    assert seen == states.split()


@pytest.mark.parametrize("state", ["stopped", "error", "done"])
@pytest.mark.parametrize("event", ["pause", "step", "running", "idle", "paused", "leave"])
def test_a_run_that_has_ended_takes_nothing_that_needs_a_worker(state: Any, event: Any) -> None:
    with pytest.raises((RequestRefused, ProtocolViolated)):
        lifecycle.next_state(state, event)


# --- restarts --------------------------------------------------------------------------------------------------------


def delays(history: list[Any]) -> list[float | None]:
    """The delays after deaths at so many checkpoints; None in the history forgives."""
    restarts, found = Restarts(random.Random(5)), []
    for each in history:
        if each is None:
            restarts.forgive()
        else:
            found.append(restarts.died(each))
    return found


def test_delays_double_from_death_to_death_and_then_the_run_is_parked() -> None:
    found = delays([0] * (MOST_IN_A_ROW + 2))
    assert found[MOST_IN_A_ROW:] == [None, None]
    for number, delay in enumerate(found[:MOST_IN_A_ROW]):
        assert delay == pytest.approx(FIRST_SECONDS * 2**number, rel=0.26)
        assert delay <= LONGEST_SECONDS * 1.25


def test_progress_ends_a_row_and_falling_back_does_not() -> None:
    assert None not in delays([1, 2, 3, 4, 5, 6, 7, 8, 9, 10])
    assert delays([10, 3, 4, 5, 6, 7, 8])[-1] is None
    assert all(delay < 2 * FIRST_SECONDS for delay in delays([10, 20, 30]))  # type: ignore[operator]


def test_new_code_is_given_all_its_starts() -> None:
    found = delays([*[0] * (MOST_IN_A_ROW + 1), None, *[0] * (MOST_IN_A_ROW + 1)])
    assert [each is None for each in found] == ([False] * MOST_IN_A_ROW + [True]) * 2


def test_two_runs_do_not_start_again_in_step() -> None:
    assert Restarts().died(0) != Restarts().died(0) or Restarts().died(0) != Restarts().died(0)


# --- jobs ------------------------------------------------------------------------------------------------------------


class Book:
    """Jobs with what was told about them, driven by histories."""

    def __init__(self) -> None:
        self.told: list[tuple[str, str]] = []
        self.jobs = Jobs(lambda job, step: self.told.append((job.id, step)))

    def play(self, *history: str) -> "Book":
        """Each word is an event, with the job it is about: ``add``, ``began 1``, ``returned 1``, ``died``..."""
        for each in history:
            what, _, number = each.partition(" ")
            job = f"job-{number}"
            if what == "add":
                self.jobs.add("work", [1], {"b": 2})
            elif what == "began":
                self.jobs.began(job)
            elif what == "returned":
                self.jobs.returned(m.Returned(job, f"value {number}"))
            elif what == "raised":
                self.jobs.raised(m.Raised(job, "ValueError", "bad", "Traceback ..."))
            elif what == "died":
                self.jobs.worker_died("killed by SIGKILL")
            elif what == "left":
                self.jobs.worker_left()
            else:
                self.jobs.fail_all("the run is stopped")
        return self

    def open(self) -> list[str]:
        return [job.id for job in self.jobs.unfinished()]

    def outcome(self, number: int) -> Any:
        answer = self.jobs.find(f"job-{number}").answer
        return answer.exception() or answer.result() if answer.done() else None


def with_book(test: Callable[[Book], None]) -> Callable[[], None]:
    """Run a test inside an event loop, because answers are futures."""

    def run() -> None:
        async def inside() -> None:
            test(Book())

        asyncio.run(inside())

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return run


@with_book
def test_a_job_goes_from_waiting_to_its_answer(book: Book) -> None:
    book.play("add", "began 1", "returned 1")
    assert book.told == [("job-1", "waiting"), ("job-1", "running"), ("job-1", "returned")]
    assert (book.open(), book.outcome(1)) == ([], "value 1")


@with_book
def test_a_job_that_raises_has_the_script_s_error(book: Book) -> None:
    problem = book.play("add", "began 1", "raised 1").outcome(1)
    assert isinstance(problem, CallFailed)
    assert (problem.kind, problem.text, str(problem)) == ("ValueError", "Traceback ...", "ValueError: bad")


@with_book
def test_late_double_and_unknown_answers_are_dropped(book: Book) -> None:
    book.play(
        "add", "began 1", "returned 1", "raised 1", "returned 1", "began 1", "returned 99", "raised 99", "began 99"
    )
    assert book.outcome(1) == "value 1"
    assert [step for _, step in book.told] == ["waiting", "running", "returned"]


@with_book
def test_a_new_worker_is_given_what_has_no_answer_outermost_first(book: Book) -> None:
    book.play("add", "add", "add", "began 1", "began 2", "returned 2", "left")
    assert book.open() == ["job-1", "job-3"]
    message = book.jobs.unfinished()[0].message()
    assert message == m.Call("job-1", "work", [1], {"b": 2})


@with_book
def test_reloads_repeat_a_job_without_end(book: Book) -> None:
    for _ in range(10):
        book.play("began 1", "left") if book.told else book.play("add", "began 1", "left")
    assert book.open() == ["job-1"]


@with_book
def test_crashes_repeat_what_had_begun_at_most_twice(book: Book) -> None:
    book.play("add", "add")
    for _ in range(MOST_CRASHES):
        book.play("began 1", "died")
        assert book.open() == ["job-1", "job-2"]
    book.play("began 1", "died")
    assert book.open() == ["job-2"]
    assert isinstance(book.outcome(1), WorkerDied)
    assert "SIGKILL" in str(book.outcome(1))


@with_book
def test_a_crash_before_a_job_began_does_not_count(book: Book) -> None:
    book.play("add", *["died"] * 10)
    assert book.open() == ["job-1"]


@with_book
def test_the_end_of_the_run_answers_every_job_with_the_reason(book: Book) -> None:
    book.play("add", "add", "began 1", "end")
    assert book.open() == []
    assert all("stopped" in str(book.outcome(number)) for number in (1, 2))
    book.play("returned 1", "end")
    assert isinstance(book.outcome(1), RequestRefused)


@with_book
def test_answers_are_kept_for_a_while_and_then_refused_by_name(book: Book) -> None:
    for number in range(1, KEPT + 2):
        book.play("add", f"returned {number}")
    assert book.outcome(2) == "value 2"
    for gone in ("job-1", "job-999", "nothing"):
        with pytest.raises(RequestRefused, match=gone):
            book.jobs.find(gone)


_words = st.sampled_from(["add", "began 1", "began 2", "returned 1", "raised 2", "died", "left", "end", "returned 9"])


@given(st.lists(_words, max_size=20))
def test_every_history_gives_each_job_at_most_one_answer(history: list[str]) -> None:
    async def inside() -> None:
        book = Book().play(*history)
        for number in range(1, history.count("add") + 1):
            job = f"job-{number}"
            ends = [step for each, step in book.told if each == job and step in ("returned", "raised")]
            assert len(ends) == (job not in book.open())

    asyncio.run(inside())


# --- control signals in task groups, which Python 3.11 brought ---


def test_a_control_signal_is_found_inside_groups() -> None:
    stop = SparkStopError("stop")
    assert control_in(stop) is stop
    inner = BaseExceptionGroup("b", [stop])
    assert control_in(BaseExceptionGroup("a", [ValueError(), inner])) is stop
    assert control_in(ExceptionGroup("a", [ValueError()])) is None
    assert control_in(ValueError()) is None
