"""The dispatcher by itself: histories go in, what each replica was sent comes out."""

import pytest

from spark_runtime.errors import ProtocolViolated
from spark_runtime.pool.dispatch import AHEAD_BYTES, MAX_WINDOW, Dispatcher, Lane
from spark_runtime.pool.job import FINISHED, NEVER, SENT, WAITING, Job

QUICK, SLOW = 0.00001, 1.0


class FakeReplica:
    """A port that remembers; its tokens are taken by hand, as a replica would."""

    def __init__(self) -> None:
        self.sent: list[tuple[Job, bool]] = []
        self.tokens = 0

    def send(self, first: Job | None, ahead: list[Job]) -> None:
        if first is not None:
            self.sent.append((first, False))
        self.sent += [(job, True) for job in ahead]
        self.tokens += len(ahead)

    def take_back(self, count: int) -> int:
        taken = min(count, self.tokens)
        self.tokens -= taken
        return taken

    def read_for(self, job: Job, lane: Lane) -> None:
        raise AssertionError("no job here reads by itself")

    def begin_next(self) -> None:
        """Take the token of the next call sent ahead."""
        assert self.tokens
        self.tokens -= 1


class History:
    """A dispatcher with some replicas, and calls by name."""

    def __init__(self, replicas: int = 1, seconds: float | None = None) -> None:
        self.now = 100.0
        self.dispatcher = Dispatcher(lambda: self.now)
        self.ports = [FakeReplica() for _ in range(replicas)]
        self.lanes = [Lane(number, port) for number, port in enumerate(self.ports, 1)]
        for lane in self.lanes:
            self.dispatcher.open(lane)
        if seconds is not None:
            self.know(seconds)

    def know(self, seconds: float) -> None:
        """Have the dispatcher learn what calls take."""
        for _ in range(20):
            self.add("lesson")
            self.answer(next(lane for lane in self.lanes if lane.sent), seconds)
        for port in self.ports:
            port.sent.clear()

    def add(self, name: str, size: int = 0, limit: float | None = None) -> Job:
        job = Job(name, b"x" * size, limit=limit)
        self.dispatcher.add(job)
        return job

    def add_many(self, count: int) -> list[Job]:
        jobs = [Job(str(number), b"") for number in range(count)]
        self.dispatcher.add_many(jobs)
        return jobs

    def answer(self, lane: Lane, seconds: float = QUICK) -> Job | None:
        job = self.dispatcher.answered(lane, lane.sent[0].serial, seconds)
        self.dispatcher.refill(lane)
        return job

    def sent(self, number: int) -> list[str]:
        return [job.function + ("+" if ahead else "") for job, ahead in self.ports[number].sent]


def test_each_idle_replica_gets_a_call_in_turn() -> None:
    history = History(replicas=3)
    for name in "abc":
        history.add(name)
    assert [history.sent(number) for number in range(3)] == [["a"], ["b"], ["c"]]


def test_a_call_waits_while_every_replica_has_one_and_nothing_is_known() -> None:
    history = History(replicas=2)
    for name in "abc":
        history.add(name)
    assert history.dispatcher.waiting_count == 1
    history.answer(history.lanes[1])
    assert history.sent(1) == ["b", "c"]


def test_the_replica_that_is_idle_longest_is_next() -> None:
    history = History(replicas=3)
    for name in "abc":
        history.add(name)
    for number in (2, 0, 1):
        history.answer(history.lanes[number])
    for name in "xyz":
        history.add(name)
    assert [history.sent(number)[-1] for number in (2, 0, 1)] == ["x", "y", "z"]


def test_calls_that_take_long_are_never_sent_ahead() -> None:
    history = History(seconds=SLOW)
    for number in range(5):
        history.add(str(number))
    assert history.sent(0) == ["0"]


def test_quick_calls_are_sent_ahead_with_tokens() -> None:
    history = History(seconds=QUICK)
    history.add_many(5)
    assert history.sent(0) == ["0", "1+", "2+", "3+", "4+"]
    assert history.ports[0].tokens == 4


def test_calls_that_come_one_by_one_travel_together_while_the_replica_has_enough() -> None:
    history = History(seconds=QUICK)
    for number in range(5):
        history.add(str(number))
    assert history.sent(0) == ["0", "1+"]
    history.answer(history.lanes[0])
    assert history.sent(0) == ["0", "1+", "2+", "3+", "4+"]


def test_no_more_is_sent_ahead_than_the_window() -> None:
    history = History(seconds=QUICK)
    history.dispatcher.add_many([Job(str(number), b"") for number in range(5000)])
    assert len(history.ports[0].sent) <= MAX_WINDOW
    assert history.dispatcher.waiting_count == 5000 - len(history.ports[0].sent)


def test_what_is_sent_ahead_is_shared_out_over_the_replicas() -> None:
    history = History(replicas=4, seconds=QUICK)
    history.dispatcher.add_many([Job(str(number), b"") for number in range(40)])
    assert all(5 <= len(port.sent) <= 15 for port in history.ports)
    assert history.dispatcher.waiting_count == 0


def test_large_calls_are_not_sent_ahead() -> None:
    history = History(seconds=QUICK)
    history.add("small")
    history.add("large", size=AHEAD_BYTES + 1)
    history.add("later")
    assert history.sent(0) == ["small"]
    history.answer(history.lanes[0])
    assert history.sent(0) == ["small", "large", "later+"]


def test_calls_behind_a_slow_one_return_to_the_queue_and_go_elsewhere() -> None:
    history = History(replicas=2, seconds=QUICK)
    history.dispatcher.add_many([Job(str(number), b"") for number in range(6)])
    behind = [job.function for job in list(history.lanes[0].sent)[1:]]
    assert behind
    while history.lanes[1].sent:
        history.answer(history.lanes[1])
    history.dispatcher.relieve_slow()  # the first look
    history.dispatcher.relieve_slow()  # nothing was answered since
    assert [job.function for job in history.lanes[0].sent] == ["0"]
    assert set(behind) <= {name.rstrip("+") for name in history.sent(1)}


def test_a_call_that_the_replica_has_begun_is_not_taken_back() -> None:
    history = History(seconds=QUICK)
    jobs = history.add_many(3)
    history.ports[0].begin_next()  # it has answered 0, which we have not read, and begun 1
    history.dispatcher.give_back(history.dispatcher.take_back(history.lanes[0]))
    assert [job.state for job in jobs] == [SENT, SENT, WAITING]


def test_nothing_is_sent_ahead_until_the_replica_has_passed_what_was_taken_back() -> None:
    history = History(seconds=QUICK)
    history.add_many(3)
    history.dispatcher.give_back(history.dispatcher.take_back(history.lanes[0]))
    history.answer(history.lanes[0])  # 0: behind it in the pipe lie 1 and 2, without tokens
    assert history.sent(0)[3:] == ["1"]
    history.answer(history.lanes[0])
    history.add("3")
    assert history.sent(0)[3:] == ["1", "2", "3+"]


def test_taken_back_calls_keep_their_order() -> None:
    history = History(seconds=QUICK)
    for number in range(6):
        history.add(str(number))
    history.dispatcher.give_back(history.dispatcher.take_back(history.lanes[0]))
    assert [job.function for job in history.dispatcher.waiting()] == ["1", "2", "3", "4", "5"]


def test_a_running_call_that_is_taken_out_closes_its_lane_and_nothing_else_is_lost() -> None:
    history = History(seconds=QUICK)
    jobs = [history.add(str(number)) for number in range(3)]
    lane = history.dispatcher.take_out(jobs[0], close=True)
    assert lane is history.lanes[0]
    assert [job.state for job in jobs] == [FINISHED, WAITING, WAITING]
    assert history.dispatcher.lanes == []


def test_a_call_sent_ahead_is_taken_out_without_stopping_the_replica() -> None:
    history = History(seconds=QUICK)
    jobs = [history.add(str(number)) for number in range(3)]
    assert history.dispatcher.take_out(jobs[1], close=True) is None
    assert [job.state for job in jobs] == [SENT, FINISHED, WAITING]


def test_a_replica_that_has_gone_on_to_the_next_call_is_not_stopped_for_the_one_before() -> None:
    history = History(seconds=QUICK)
    jobs = [history.add(str(number)) for number in range(2)]
    history.ports[0].begin_next()
    assert history.dispatcher.take_out(jobs[0], close=True) is None
    assert history.answer(history.lanes[0]) is None  # its answer comes, and nobody asks for it
    assert history.answer(history.lanes[0]) is jobs[1]


def test_a_call_cancelled_while_it_waits_is_passed_over() -> None:
    history = History()
    history.add("a")
    waiting = history.add("b")
    history.add("c")
    history.dispatcher.drop_waiting(waiting)
    assert history.dispatcher.waiting_count == 1
    history.answer(history.lanes[0])
    assert history.sent(0) == ["a", "c"]


def test_cancelled_calls_do_not_pile_up() -> None:
    history = History()
    history.add("running")
    for _ in range(10_000):
        history.dispatcher.drop_waiting(history.add("x"))
    assert history.dispatcher.waiting_count == 0
    assert len(history.dispatcher._waiting) < 2_000


def test_an_answer_to_a_call_that_a_replica_does_not_have_breaks_the_protocol() -> None:
    history = History()
    history.add("a")
    with pytest.raises(ProtocolViolated, match="which it does not have"):
        history.dispatcher.answered(history.lanes[0], 99, QUICK)


def test_a_limit_counts_from_when_a_replica_has_the_call() -> None:
    history = History()
    first, second = history.add("a", limit=5.0), history.add("b", limit=5.0)
    assert (first.deadline, second.deadline) == (105.0, NEVER)
    history.now = 103.0
    history.answer(history.lanes[0])
    assert second.deadline == 108.0


def test_a_retired_lane_answers_what_it_has_and_gets_no_more() -> None:
    history = History(replicas=2)
    running = history.add("a")
    history.dispatcher.retire(history.lanes[0])
    assert history.answer(history.lanes[0]) is running
    history.add("b")
    history.add("c")
    assert history.sent(0) == ["a"]
    assert history.sent(1) == ["b"]


def test_calls_of_a_closed_lane_come_back_in_order_to_the_front() -> None:
    history = History(seconds=QUICK)
    for number in range(3):
        history.add(str(number))
    jobs = history.dispatcher.close(history.lanes[0])
    history.add("3")
    history.dispatcher.give_back(list(jobs))
    assert [job.function for job in history.dispatcher.waiting()] == ["0", "1", "2", "3"]
