"""The clocks on a device whose time is scripted: every call costs what its name says, and the log tells the order."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest

from flashcore.measure import clocks
from flashcore.measure.clocks import Call, Contestant


class FakeEvent:
    def __init__(self, device: FakeDevice) -> None:
        self.device, self.at = device, 0.0

    def record(self) -> None:
        self.at = self.device.now

    def synchronize(self) -> None:
        self.device.log.append("sync")

    def elapsed_time(self, end: FakeEvent) -> float:
        return (end.at - self.at) / 1e3  # milliseconds


class FakeDevice:
    def __init__(self) -> None:
        self.now = 0.0  # microseconds
        self.log: list[str] = []
        self.captured: list[list[Call]] = []

    def event(self, *, in_graph: bool = False) -> FakeEvent:
        return FakeEvent(self)

    def synchronize(self) -> None:
        self.log.append("sync")

    def capture(self, calls: Sequence[Call]) -> Call:
        sequence = list(calls)
        self.captured.append(sequence)

        def replay() -> None:
            for call in sequence:
                call()

        return replay

    def work(self, name: str, us: float) -> Callable[[], None]:
        def call() -> None:
            self.log.append(name)
            self.now += us

        return call


@pytest.fixture
def device() -> FakeDevice:
    return FakeDevice()


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_rotation_gives_every_position_to_everyone(n: int) -> None:
    names = [str(i) for i in range(n)]
    rounds = [clocks.rotation(names, turn) for turn in range(2 * n)]
    assert all(sorted(order) == names for order in rounds)
    for position in range(n):
        assert Counter(order[position] for order in rounds) == dict.fromkeys(names, 2)


def test_rotation_changes_neighbours() -> None:
    rounds = [clocks.rotation("abcd", turn) for turn in range(8)]
    followers = {order[i + 1] for order in rounds for i in range(3) if order[i] == "a"}
    assert followers == {"b", "d"}


def test_call_times(device: FakeDevice) -> None:
    contestants = {"a": Contestant([device.work("a", 5)]), "b": Contestant([device.work("b", 7)])}
    rounds: list[int] = []
    times = clocks.call_times(contestants, trials=6, warmup=2, device=device, progress=rounds.append)
    assert times == {"a": pytest.approx([5.0] * 6), "b": pytest.approx([7.0] * 6)}
    assert sum(rounds) == 8
    calls = [entry for entry in device.log if entry != "sync"]
    assert Counter(calls) == {"a": 8, "b": 8}
    assert {tuple(calls[i : i + 2]) for i in range(0, 16, 2)} == {("a", "b"), ("b", "a")}
    assert device.log[1:] == [entry for call in calls for entry in (call, "sync")]  # synchronised after each call


def test_context_is_entered_but_not_timed(device: FakeDevice) -> None:
    @contextmanager
    def costly() -> Iterator[None]:
        device.now += 100
        yield
        device.now += 100

    contestants = {"a": Contestant([device.work("a", 5)], costly)}
    assert clocks.call_times(contestants, trials=3, warmup=0, device=device)["a"] == pytest.approx([5.0] * 3)
    times, _ = clocks.gpu_times(contestants, replays=3, warmup_us=10, device=device)
    assert times["a"] == pytest.approx([5.0] * 3)


def test_garbage_collection_rests_and_comes_back(device: FakeDevice) -> None:
    seen: list[bool] = []
    clocks.call_times({"a": Contestant([lambda: seen.append(gc.isenabled())])}, trials=2, warmup=0, device=device)
    assert seen == [False, False] and gc.isenabled()

    def fails() -> None:
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        clocks.call_times({"a": Contestant([fails])}, device=device)
    assert gc.isenabled()


def test_event_floor_is_what_nothing_costs(device: FakeDevice) -> None:
    assert clocks.event_floor(trials=4, device=device) == [0.0] * 4


def test_gpu_times_divide_the_replay(device: FakeDevice) -> None:
    contestants = {"a": Contestant([device.work("a", 4)]), "b": Contestant([device.work("b", 250)])}
    times, counts = clocks.gpu_times(contestants, replays=5, replay_us=1000, warmup_us=0, device=device)
    assert counts == {"a": 250, "b": 4}
    assert times == {"a": pytest.approx([4.0] * 5), "b": pytest.approx([250.0] * 5)}


def test_gpu_times_bound_the_graph(device: FakeDevice) -> None:
    contestants = {"quick": Contestant([device.work("quick", 1)]), "slow": Contestant([device.work("slow", 9000)])}
    _, counts = clocks.gpu_times(contestants, replays=1, most_calls=300, warmup_us=0, device=device)
    assert counts == {"quick": 300, "slow": 1}


def test_gpu_times_rotate_whole_turns_of_cold_inputs(device: FakeDevice) -> None:
    sets = [device.work(f"set{i}", 10) for i in range(7)]
    _, counts = clocks.gpu_times({"a": Contestant(sets)}, replays=1, warmup_us=0, device=device)
    assert counts == {"a": 105}  # 100 would fill a millisecond, and 105 is 15 turns of 7
    assert device.captured[-1] == sets * 15


def test_gpu_times_warm_the_gpu_up(device: FakeDevice) -> None:
    contestants = {"a": Contestant([device.work("a", 100)])}
    clocks.gpu_times(contestants, replays=1, warmup_us=50_000, device=device)
    assert device.now >= 50_000


def test_alone_times_are_those_of_a_gpu_that_has_settled(device: FakeDevice) -> None:
    """A call here takes twice as long once its kind has run for 2.5 ms, as on a GPU that finds itself at its limit."""
    since: dict[str, float] = {}

    def work(name: str, us: float) -> Callable[[], None]:
        def call() -> None:
            if name not in since:
                since.clear()
                since[name] = device.now
            device.now += us if device.now - since[name] < 2500 else 2 * us

        return call

    contestants = {"a": Contestant([work("a", 100)]), "b": Contestant([work("b", 250)])}
    heard: list[str] = []
    times, counts = clocks.alone_times(
        contestants, turns=2, settle_us=3000, measure_us=2000, device=device, watch=heard.append
    )
    assert heard == ["a", "b", "a", "b", "b", "a"] and set(counts) == {"a", "b"}
    assert times == {"a": pytest.approx([200.0] * 2), "b": pytest.approx([500.0] * 2)}


def test_a_rested_gpu_pauses_before_every_replay(device: FakeDevice) -> None:
    pauses: list[float] = []

    def sleep(seconds: float) -> None:
        assert device.log[-1] == "sync", "the GPU rests once it is idle"
        pauses.append(seconds)
        device.log.append("rest")

    contestants = {name: Contestant([device.work(name, us)]) for name, us in (("a", 20.0), ("b", 50.0))}
    times, counts = clocks.gpu_times(
        contestants, replays=4, rest_s=0.5, replay_us=100, warmup_us=1, device=device, sleep=sleep
    )
    assert times == {"a": [20.0] * 4, "b": [50.0] * 4} and counts == {"a": 5, "b": 2}
    assert pauses == [0.5] * 8
    order = [device.log[i + 1] for i, what in enumerate(device.log) if what == "rest"]
    assert order == ["a", "b", "b", "a", "b", "a", "a", "b"]


def test_alone_times_have_a_value_of_the_slowest_call(device: FakeDevice) -> None:
    slow = {"a": Contestant([device.work("a", 90_000)])}
    assert clocks.alone_times(slow, turns=1, settle_us=10, measure_us=10, device=device)[0]["a"] == [90_000.0]


def test_gpu_times_say_whose_turn_it_is(device: FakeDevice) -> None:
    heard: list[str] = []
    contestants = {"a": Contestant([device.work("a", 100)]), "b": Contestant([device.work("b", 100)])}
    clocks.gpu_times(contestants, replays=2, warmup_us=0, device=device, watch=heard.append)
    assert heard == ["a", "b", "a", "b", "b", "a"]


def test_host_times_measure_the_host_alone(device: FakeDevice) -> None:
    ticks = 0

    def clock() -> int:
        return ticks

    def call() -> None:
        nonlocal ticks
        ticks += 3_000  # nanoseconds
        device.log.append("call")

    times = clocks.host_times({"a": Contestant([call])}, blocks=2, calls=5, warmup=1, device=device, clock=clock)
    assert times == {"a": [3.0, 3.0]}
    assert device.log == ["call", *["sync", *["call"] * 5, "sync"] * 2]


@pytest.mark.parametrize("size", [1, 3 * 2**20, 49 * 2**20, 50 * 2**20, 200 * 2**20])
def test_cold_sets_pass_three_times_the_l2(size: int) -> None:
    l2 = 50 * 2**20
    sets = clocks.sets_for_cold(size, l2)
    assert sets * size > 3 * l2 >= (sets - 1) * size


@pytest.mark.gpu
def test_events_in_a_graph_are_recorded_by_every_replay() -> None:
    torch = pytest.importorskip("torch")
    device = clocks.Cuda()
    start, end = device.event(in_graph=True), device.event(in_graph=True)
    numbers = torch.zeros(1 << 24, device="cuda")

    def add() -> None:
        numbers.add_(1)

    add()
    device.synchronize()
    few = device.capture([add, start.record, *[add] * 5, end.record])
    many = device.capture([add, start.record, *[add] * 50, end.record])
    times = []
    for replay in (many, few, many, few):
        replay()
        device.synchronize()
        times.append(start.elapsed_time(end))
    assert min(times) > 0 and times[0] > 5 * times[1] and times[2] > 5 * times[3]
