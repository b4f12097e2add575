"""`flashcore audit timing` with stand-ins for the GPU: what it draws, what it compares, what it calls a failure."""

from __future__ import annotations

import json
import math
from itertools import pairwise

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("scipy")

from flashcore.core.target import A100, H100, L4  # noqa: E402
from flashcore.reference.oracle import attention  # noqa: E402
from flashcore.security import audit, elapsed, leakage, timing  # noqa: E402
from flashcore.security import probe as probes  # noqa: E402
from flashcore.security.classes import PAIRS, Either, Inputs, Sizes  # noqa: E402
from flashcore.security.elapsed import Reading  # noqa: E402

SMALL = Sizes(8, 4, 16, 64, 32)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def shown(sizes: Sizes) -> Inputs:
    half = torch.float16
    return torch.zeros(sizes.query, dtype=half), torch.zeros(sizes.key, dtype=half), torch.zeros(sizes.key, dtype=half)


@pytest.mark.parametrize("name", PAIRS)
def test_classes_differ_in_values_alone(name: str) -> None:
    zero, one = PAIRS[name](SMALL, generator())
    for a, b, shape in zip(zero, one, (SMALL.query, SMALL.key, SMALL.key), strict=True):
        assert a.shape == b.shape == shape and a.dtype == b.dtype == torch.float16
    assert any(not torch.equal(a, b) for a, b in zip(zero, one, strict=True))
    again = PAIRS[name](SMALL, generator())
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(zero, again[0], strict=True))


def test_what_each_class_holds() -> None:
    fixed, drawn = PAIRS["fixed/random"](SMALL, generator())
    assert all((t == t[:1, :1]).all() for t in fixed) and not (drawn[0] == drawn[0][:1, :1]).all()
    tiny, normal = PAIRS["subnormal/normal"](SMALL, generator())
    assert all((t.abs() < 2.0**-14).all() and (t != 0).any() for t in tiny) and normal[0].abs().max() > 1
    poisoned, finite = PAIRS["nan/finite"](SMALL, generator())
    assert attention(*poisoned).isnan().all() and attention(*finite).isfinite().all()
    assert all((t == 0).all() for t in PAIRS["zeros/random"](SMALL, generator())[0])


def test_a_rising_maximum_rises_in_every_tile_and_a_falling_one_in_the_first_alone() -> None:
    sizes = Sizes(2, 2, 16, timing.INSIDE.seqlen_k, timing.INSIDE.head_dim)
    rising, falling = PAIRS["rising/falling"](sizes, generator())
    for (q, k, _), expected in ((rising, True), (falling, False)):
        scores = q.double() @ k.double().mT * sizes.head_dim**-0.5 * math.log2(math.e)
        for tile in (64, 128):
            maxima = scores.unflatten(-1, (-1, tile)).amax(-1).cummax(-1).values
            steps = [b - a for a, b in pairwise(maxima.unbind(-1))]
            assert all((step > 8).all() if expected else (step == 0).all() for step in steps)
    assert torch.equal(rising[1].sort(2).values, falling[1].sort(2).values), "the same keys"
    torch.testing.assert_close(attention(*rising), attention(*falling))


NOT_A_NUMBER = torch.tensor([0x7C01, 0x7E00, -1, 0x7DEA], dtype=torch.int16).view(torch.float16)  # with payloads


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.int16)


def test_either_input_is_shown_bit_by_bit_at_one_address() -> None:
    places, drawn = shown(SMALL), PAIRS["subnormal/normal"](SMALL, generator())
    zero, one = PAIRS["fixed/random"](SMALL, generator())[0], drawn[0]
    one[1][:, :, 5, :4] = NOT_A_NUMBER
    one[2][:, :, 3] = -0.0
    addresses = [place.data_ptr() for place in places]
    either = Either(places)
    either.hold(zero, one)
    for picked in (torch.arange(32) % 3 == 0, torch.zeros(32).bool(), torch.ones(32).bool()):
        picked = picked.view(8, 4, 1, 1)
        either.show(-picked.long())
        for place, of_zero, of_one in zip(places, zero, one, strict=True):
            assert torch.equal(bits(place), torch.where(picked, bits(of_one), bits(of_zero)))
    assert [place.data_ptr() for place in places] == addresses
    assert torch.equal(bits(places[1])[0, 0, 5, :4], bits(NOT_A_NUMBER))
    either = Either([place[:1] for place in places])
    either.hold(*([part[:1] for part in each] for each in (one, zero)))
    either.show(torch.tensor(-1))
    for place, of_zero, of_one in zip(places, zero, one, strict=True):
        assert torch.equal(bits(place[:1]), bits(of_zero[:1])) and torch.equal(bits(place[1:]), bits(of_one[1:]))


class Clock:
    """A GPU whose time passes as it is told; as clocks.Device. What is captured runs when it is replayed."""

    def __init__(self) -> None:
        self.now = self.cycles = 0.0

    def work(self, cycles: float, mhz: float) -> None:
        self.cycles += cycles
        self.now += cycles / mhz

    def event(self, *, in_graph: bool = False) -> Clock.Event:
        return Clock.Event(self)

    def synchronize(self) -> None: ...

    def capture(self, calls):
        calls = list(calls)

        def replay() -> None:
            for call in calls:
                call()

        return replay

    class Event:
        def __init__(self, clock: Clock) -> None:
            self._clock, self.at = clock, 0.0

        def record(self) -> None:
            self.at = self._clock.now

        def synchronize(self) -> None: ...

        def elapsed_time(self, end) -> float:
            return (end.at - self.at) / 1e3


MANY = Sizes(64, 16, 2, 8, 8)


def measured(slower: float, pair: str = "zeros/random") -> leakage.Leak:
    """Of a stand-in whose blocks take `slower` times as long on zeros."""
    inputs, noise = shown(MANY), generator()

    def run() -> torch.Tensor:
        is_zero = (inputs[1] == 0).flatten(2).all(2).flatten()
        cycles = torch.randn(is_zero.shape, generator=noise) * 50 + 10_000
        return (cycles * torch.where(is_zero, slower, 1.0)).long()

    turns: list[int] = []
    samples = timing.inside(run, inputs, PAIRS[pair], MANY, 20_000, generator(), Clock(), each=turns.append)
    assert turns == list(range(-1, len(samples.values) // timing.REFRESH))
    assert samples.values.shape == samples.classes.shape
    assert 0.49 < samples.classes.mean() < 0.51 and samples.classes.std(0).min() > 0, "drawn anew for each launch"
    return leakage.compare(*samples)


def test_blocks_are_compared_by_the_class_that_they_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "REFRESH", 16)
    assert measured(1.0).even
    slow = measured(1.002)
    assert slow.t < -10 and not slow.even
    assert -0.0023 < slow.difference / slow.mean < -0.0017, "class 1 minus class 0"
    assert min(slow.measurements) >= 20_000


class Cache(TorchDispatchMode):
    """Follows from where the numbers at each place were read last, and fails on what may read otherwise than as here.
    """

    def __init__(self, places: Inputs) -> None:
        super().__init__()
        self._places = {place.untyped_storage().data_ptr() for place in places}
        self._seen: dict[int, int] = {}
        self.source = torch.zeros(MANY.batch * MANY.heads)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        target = kwargs.get("out", args[0] if func._schema.is_mutable else None)
        if target is not None and target.untyped_storage().data_ptr() in self._places:
            read = [a for a in args if isinstance(a, torch.Tensor) and a.shape == target.shape]
            numbers = [float(self._seen.setdefault(a.data_ptr(), len(self._seen))) for a in read]
            if func is torch.ops.aten.where.self_out:  # reads one operand alone
                self.source = torch.where(args[0].flatten(), *numbers)
            else:
                assert func in (torch.ops.aten.bitwise_and.Tensor_out, torch.ops.aten.bitwise_xor_.Tensor), func
                self.source = torch.full_like(self.source, sum(numbers))
        return func(*args, **kwargs)


class Copied:
    """As Either, by a copy from one of two places."""

    def __init__(self, places) -> None:
        self._places = places
        self.hold(places, places)

    def hold(self, zero, one) -> None:
        self._zero, self._one = ([part.clone() for part in each] for each in (zero, one))

    def show(self, chosen: torch.Tensor) -> None:
        for place, of_zero, of_one in zip(self._places, self._zero, self._one, strict=True):
            torch.where(chosen != 0, of_one, of_zero, out=place)


@pytest.mark.parametrize(("either", "even"), [(Either, True), (Copied, False)])
def test_a_place_whose_time_depends_on_where_its_numbers_came_from_tells_no_classes_apart(
    either, even: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing, "Either", either)
    inputs, noise = shown(MANY), generator()

    def draw(sizes: Sizes, generator: torch.Generator) -> tuple[Inputs, Inputs]:
        return shown(sizes), shown(sizes)

    with Cache(inputs) as cache:

        def run() -> torch.Tensor:
            return (10_000 + 50 * torch.randn(cache.source.shape, generator=noise) + 30 * cache.source).long()

        leak = leakage.compare(*timing.inside(run, inputs, draw, MANY, 20_000, generator(), Clock()))
    assert leak.even == even, leak


@pytest.mark.parametrize("slower", [1.0, 1.004])
def test_wall_times_of_both_classes_in_random_order(slower: float) -> None:
    noise, shows, turns, clock = generator(), [], [], Clock()

    def call() -> None:
        clock.now += (100 + float(torch.randn((), generator=noise))) * (slower if shows and shows[-1] else 1.0)

    def show(is_one: bool) -> None:
        shows.append(is_one)
        clock.now += 1e6 * is_one  # neither this nor a rest is timed

    def pause(seconds: float) -> None:
        assert seconds == timing.PAUSE
        clock.now += 1e6 * (len(shows) % 7)

    walls = timing.wall(show, call, 200, generator(), clock, each=turns.append, pause=pause)
    assert turns == list(range(-timing.WARM_UP, 13))
    assert [sum(group) for group in walls.classes] == [timing.GROUP // 2] * 13
    assert len({tuple(group) for group in walls.classes}) > 10
    assert sum(walls.classes, []) == shows[timing.WARM_UP * timing.GROUP :]
    leak = leakage.compare(walls.times, walls.classes)
    assert leak.measurements == (208, 208)
    assert (abs(leak.t) > leakage.T_LIMIT) == (slower > 1) and 99 < leak.mean < 101
    assert walls.readings == [[]] * 13, "no probe, no readings"


class Probed:
    """A GPU whose calls take `more` times the cycles, at `faster` times the frequency, in class 1; and its probe."""

    def __init__(self, more: float = 1.0, faster: float = 1.0, lost: int = 0) -> None:
        self.clock, self.is_one = Clock(), False
        self._more, self._faster, self._lost = more, faster, lost
        self._noise, self._seen, self._turn = generator(), [], 0
        self.order: list[str] = []

    def show(self, is_one: bool) -> None:
        self.is_one = is_one

    def call(self) -> None:
        cycles = (10_000 + 20 * float(torch.randn((), generator=self._noise))) * (self._more if self.is_one else 1.0)
        self.clock.work(cycles, 2000 * (self._faster if self.is_one else 1.0))
        self.order.append("call")

    def before(self) -> None:
        self._seen = [(self.clock.cycles, self.clock.now)]
        self.order.append("before")

    def after(self) -> None:
        self._seen.append((self.clock.cycles, self.clock.now))
        self.order.append("after")

    def reading(self) -> Reading | None:
        self._turn += 1
        if self._lost and self._turn % self._lost == 0:
            return None
        (began, start), (ended, end) = self._seen
        return Reading(round(ended - began), round(1e3 * (end - start)))

    def measured(self, measurements: int = 500) -> timing.Walls:
        walls = timing.wall(
            self.show, self.call, measurements, generator(), self.clock, probe=self, pause=lambda seconds: None
        )
        before_a_capture, graph = ["call", "before", "after"], ["call"] * timing.LEAD + ["before"]
        graph += ["call"] * timing.CALLS + ["after"]
        assert self.order == before_a_capture + graph * ((len(self.order) - 3) // len(graph))
        return walls

    def judged(self) -> tuple[leakage.Leak, elapsed.Clocks, bool]:
        walls = self.measured()
        wall = leakage.compare(walls.times, walls.classes)
        found = elapsed.compare(walls.readings, walls.classes, timing.CALLS)
        assert found
        return wall, found, elapsed.explained(wall, found)


def test_more_cycles_fail_the_gate_of_elapsed_cycles_and_are_not_explained() -> None:
    wall, found, explained = Probed(more=1.01).judged()
    assert not wall.even and not found.elapsed.even and not explained
    assert 0.008 < found.elapsed.relative < 0.011 and 9_900 < found.elapsed.mean < 10_200
    assert abs(found.frequency.relative) < 1e-3


def test_a_slower_clock_explains_a_longer_time() -> None:
    wall, found, explained = Probed(faster=0.99).judged()
    assert not wall.even and found.elapsed.even and explained
    assert 0.008 < wall.relative < 0.011 and -0.011 < found.frequency.relative < -0.008
    assert 1980 < found.frequency.mean < 2000


def test_what_is_even_needs_no_explanation_and_both_at_once_is_none() -> None:
    wall, found, explained = Probed().judged()
    assert wall.even and found.elapsed.even and not explained
    assert not Probed(more=1.01, faster=0.99).judged()[2]


@pytest.mark.parametrize(
    ("frequency", "explained"),
    [(-0.010, True), (-0.0081, True), (-0.0079, False), (0.010, False), (-0.010j, False)],
)
def test_the_frequency_has_to_differ_for_certain_the_other_way_by_most_of_the_time(frequency, explained) -> None:
    def leak(relative: float, half: float = 1e-4) -> leakage.Leak:
        low, high = relative - half, relative + half
        t = relative / half * 2
        return leakage.Leak((9, 9), 1.0, 0.1, t, relative, low, high, {"50": t}, None)

    sure = leak(frequency) if isinstance(frequency, float) else leak(frequency.imag, 0.02)
    assert elapsed.explained(leak(0.01), elapsed.Clocks(leak(0.0), sure)) == explained
    assert not elapsed.explained(leak(0.01), elapsed.Clocks(leak(0.005), sure)), "the cycles differ"
    assert not elapsed.explained(leak(0.01), None)


def test_readings_of_two_sms_are_dropped_and_counted() -> None:
    walls = Probed(faster=0.99, lost=7).measured()
    every = sum(len(group) for group in walls.classes)
    lost = elapsed.dropped(walls.readings, walls.classes)
    assert abs(sum(lost) - every / 7) < 1 and min(lost) > 0 and elapsed.moved(walls.readings) == sum(lost) / every
    assert elapsed.MOVED < elapsed.moved(walls.readings) < 0.5
    found = elapsed.compare(walls.readings, walls.classes, timing.CALLS)
    assert found and found.elapsed.even and sum(found.elapsed.measurements) == every - sum(lost)
    assert -0.011 < found.frequency.relative < -0.008
    walls = Probed(lost=1).measured(64)
    assert elapsed.compare(walls.readings, walls.classes, timing.CALLS) is None
    assert elapsed.dropped(walls.readings, walls.classes) == [64, 64]


def test_what_leads_is_called_in_front_alone() -> None:
    order: list[str] = []
    timing.wall(lambda is_one: order.clear(), lambda: order.append("call"), 1, generator(), Clock(),
                lead=lambda: order.append("lead"), pause=lambda seconds: None)  # fmt: skip
    assert order == ["lead"] * timing.LEAD + ["call"] * timing.CALLS


def test_the_timer_s_step_is_what_all_its_readings_share() -> None:
    assert elapsed.step([[Reading(1, 96), None], [Reading(1, 64), Reading(1, 160)]]) == 32


def test_a_probe_compares_readings_of_one_sm() -> None:
    probe = probes.Probe("cpu")
    probe._seen.copy_(torch.tensor([[1_000, 5, 7_000, 0], [3_000, 5, 8_024, 0]]))
    assert probe.reading() == Reading(2_000, 1_024)
    probe._seen[1, 1] = 6
    assert probe.reading() is None


def test_lengths_and_values_are_set_by_class(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "DEVICE", "cpu")
    used = torch.tensor([9, 9], dtype=torch.int32)
    show = timing._length(used[:1], 3, 5)
    assert [(show(one), used.tolist())[1] for one in (True, False)] == [[5, 9], [3, 9]]
    places, (zero, one) = shown(SMALL), PAIRS["fixed/random"](SMALL, generator())
    either = Either(places)
    either.hold(zero, one)
    for is_one in (True, False):
        timing._values(either)(is_one)
        assert all(torch.equal(a, b) for a, b in zip(places, one if is_one else zero, strict=True))


@pytest.mark.parametrize(("kernel", "target"), [("portable", A100), ("portable", L4), ("hopper", H100)])
def test_each_item_gets_one_block_and_several_tiles(kernel, target) -> None:
    config = timing.one_block_an_item(kernel, timing.problem_of(timing.INSIDE), target)
    assert config and config.kernel == kernel and config.block_m == timing.INSIDE.seqlen_q
    assert config.block_n <= timing.INSIDE.seqlen_k // 4 and config.schedule != "persistent"
    assert timing.one_block_an_item("hopper", timing.problem_of(timing.INSIDE), A100) is None


def entry(ok: bool = True, **more):
    leak = leakage.compare([[100.0, 101.0, 102.0, 99.0]] * 8, [[True, False, True, False]] * 8)
    said = {"kernel": "hopper", "config": "64x128 4w", "clock": "cycles", "pair": "nan/finite", "gated": True}
    return said | leak.as_json() | {"ok": ok} | more


def test_a_run_passes_only_whole_with_every_gate_and_every_control() -> None:
    good = {"complete": True, "cases": [entry()], "controls": [entry(control="rescale")], "batch": []}
    assert timing.passed(good)
    for bad in ({"complete": False}, {"cases": [entry(), entry(ok=False)]}, {"controls": [entry(ok=False)]},
                {"controls": []}, {"cases": [entry(moved=True)]}):  # fmt: skip
        assert not timing.passed(good | bad)


def test_closing_lines_count_gates_and_what_the_clock_explains_and_gives_away() -> None:
    wall = {"clock": "wall", "gpu_states": [{}], "moved": False, "slow": [1, 0]}
    cases = [
        entry(), entry(clock="elapsed"), entry(clock="frequency", gated=False),
        entry(ok=False, explained=True, dropped=[1, 2], **wall),
        entry(ok=False, explained=False, dropped=[0, 0], **wall),
    ]
    full = [
        entry(gated=False, dropped=[0, 0], **wall | {"moved": True, "relative": 0.01}),
        entry(gated=False, clock="frequency", relative=-0.02), entry(gated=False, clock="elapsed", relative=0.03),
    ]  # fmt: skip
    lines = timing.summary({"cases": cases, "controls": [entry(control="rescale")], "full": full, "batch": []})
    assert lines[0].startswith("2 of 4 gates hold") and lines[1].startswith("1 of the 2 others differ by the clock")
    assert "wall time differs by up to 1.00%, the frequency by up to 2.00%" in lines[3]
    assert lines[4].startswith("3 of 96 wall times were disturbed")
    assert lines[6].startswith("3 of 96 elapsed cycles dropped") and lines[6].endswith("in 1 comparisons more than 10%")


def test_rows_say_what_they_are() -> None:
    assert timing.row("cases", entry(even=False, explained=True)).endswith("differs: the clock, not the cycles")
    assert "DIFFERS" in timing.row("cases", entry(even=False, explained=False))
    assert "even" in timing.row("cases", entry(even=True))
    assert "DIFFERS" in timing.row("cases", entry(even=False))
    assert "no gate" in timing.row("cases", entry(even=False, gated=False))
    assert "MISSED" in timing.row("controls", entry(ok=False, control="rescale"))
    assert "batch of 8" in timing.row("batch", entry(batch=8, even=True))
    assert timing.row("cases", entry(even=True)).endswith("even")
    free, held = {"sm_mhz": 1980, "held_back_by": []}, {"sm_mhz": 1620, "held_back_by": ["software power cap"]}
    assert timing.row("cases", entry(even=True, gpu_states=[free, free])).endswith("even  [1980 MHz]")
    assert " wall, full " in timing.row("full", entry(clock="wall", gated=False))
    said = timing.row("batch", entry(batch=8, even=True, gpu_states=[free, held]))
    assert said.endswith("[1980 and 1620 MHz, held back by software power cap]")
    assert timing.row("cases", entry(even=True, gpu_states=[{}, {}])).endswith("even")


def test_records_are_plain() -> None:
    assert json.loads(json.dumps(entry()))["measurements"] == [16, 16]


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert audit.main(["timing"]) == 2
    assert "there is none here" in capsys.readouterr().err


class Stand:
    """A kernel of 100 us. On a first key smaller than the last, as where the maximum rises, its control is slower; with
    it, what `MORE` says of the cycles and `CLOCK` of the frequency.
    """

    MORE: dict[Sizes, float] = {}
    CLOCK: dict[Sizes, float] = {}

    def __init__(self, binding, target, sizes, **more) -> None:
        self.inputs, self._more, self._sizes = shown(sizes), more, sizes
        self._control = "rescale" in binding.fn.__module__
        self._noise = generator()

    def __call__(self) -> None:
        k = self.inputs[1]
        rising = (k[:, :, 0, 0] < k[:, :, -1, 0] - 20).flatten()
        cycles, mhz = 200_000 + 200 * float(torch.randn((), generator=self._noise)), 2000.0
        if rising.all():
            cycles *= self.MORE.get(self._sizes, 1.0) + 0.02 * self._control
            mhz *= self.CLOCK.get(self._sizes, 1.0)
        timing.clocks.Cuda().work(cycles, mhz)
        if "cycles" in self._more:
            cycles = self._more["cycles"]
            cycles.copy_(10_000 + 10 * torch.randn(cycles.shape, generator=self._noise) + 200 * self._control * rising)


class StandProbe:
    """As probe.Probe, on a stand-in's clock."""

    def __init__(self, device: str) -> None:
        self._at = [(0.0, 0.0)] * 2

    def _read(self, place: int) -> None:
        clock = timing.clocks.Cuda()
        self._at[place] = clock.cycles, clock.now

    def before(self) -> None:
        self._read(0)

    def after(self) -> None:
        self._read(1)

    def reading(self) -> Reading:
        (began, start), (ended, end) = self._at
        return Reading(round(ended - began), round(1e3 * (end - start)))


STATE = {"sm_mhz": 1755, "held_back_by": ["software power cap"]}
QUIET, WHOLE = Sizes(1, 2, 64, 512, 64), Sizes(2, 2, 64, 64, 64)


@pytest.fixture
def stands(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(timing, "DEVICE", "cpu")
    monkeypatch.setattr(timing, "PAUSE", 0)
    monkeypatch.setattr(timing.machine, "gpu_state", lambda: dict(STATE))
    monkeypatch.setattr(timing, "Kernel", Stand)
    monkeypatch.setattr(probes, "Probe", StandProbe)
    monkeypatch.setattr(timing.clocks, "Cuda", lambda: clock)
    monkeypatch.setattr(timing.targets, "current", lambda index: H100)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(timing, "REFRESH", 4)
    monkeypatch.setattr(timing, "WARM_UP", 1)
    in_batch, inside = Sizes(2, 2, 64, 128, 64), Sizes(4, 4, 64, 512, 64)
    for name, sizes in (("INSIDE", inside), ("QUIET", QUIET), ("WHOLE", WHOLE), ("IN_BATCH", in_batch)):
        monkeypatch.setattr(timing, name, sizes)


@pytest.mark.usefixtures("stands")
def test_a_whole_run(capsys: pytest.CaptureFixture[str]) -> None:
    run = timing.Run(measurements=100, walls=100, batch_walls=64, seconds=600, seed=1)
    record = json.loads(json.dumps(run.everything(batch=True)))
    assert record["complete"] and record["kind"] == "audit-timing" and timing.passed(record)
    kernels, clocks = ("hopper", "portable"), ("wall", "elapsed", "frequency")

    def seen(part: str) -> list[tuple[str, str, str]]:
        return [(each["clock"], each["kernel"], each["pair"]) for each in record[part]]

    assert seen("cases")[:10] == [("cycles", k, p) for k in kernels for p in PAIRS]
    assert seen("cases")[10:] == seen("full") == [(c, k, p) for k in kernels for p in PAIRS for c in clocks]
    wall, cycles, rate = record["cases"][10:13]
    assert (wall["explained"], wall["dropped"], wall["moved"]) == (False, [0, 0], False)
    assert cycles["gated"] and cycles["ok"] == cycles["even"] and 190_000 < cycles["mean"] < 210_000
    assert not rate["gated"] and rate["ok"] and rate["mean"] == pytest.approx(2000, rel=1e-3) and rate["step_ns"] == 1
    assert all(each["gated"] == (each["clock"] != "frequency") for each in record["cases"]), "every pair, zeros too"
    assert not any(each["gated"] for each in record["full"])
    assert wall["measurements"] == [112, 112] and record["full"][0]["measurements"] == [64, 64]
    assert record["batch"][0]["measurements"] == [64, 64]
    assert [(each["kernel"], each["clock"], each["ok"]) for each in record["controls"]] == [
        (kernel, clock, True) for clock in ("cycles", "wall") for kernel in kernels
    ]
    assert [(each["batch"], each["public"]) for each in record["batch"]] == [
        (size, name) for size in timing.BATCHES for name in (False, False, True)
    ]
    every = [each for part in ("cases", "controls", "full", "batch") for each in record[part]]
    assert all(each.get("gpu_states", [STATE] * 2) == [STATE] * 2 for each in every)
    assert all(("gpu_states" in each) == (each["clock"] == "wall") for each in every)
    said = capsys.readouterr().out
    assert "caught" in said and "[1755 MHz, held back by software power cap]" in said
    late = timing.Run(measurements=100, walls=64, batch_walls=64, seconds=0, seed=1)
    with pytest.raises(TimeoutError):
        late.everything(batch=False)
    assert not late.record["complete"] and not timing.passed(late.record)


@pytest.mark.usefixtures("stands")
def test_wall_time_that_differs_on_few_blocks_fails_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Stand, "MORE", {QUIET: 1.003})
    record = timing.Run(measurements=100, walls=100, batch_walls=64, seconds=600, seed=1).everything(batch=False)
    assert not timing.passed(record)
    missed = [(each["clock"], each["kernel"], each["pair"]) for each in record["cases"] if not each["ok"]]
    assert missed == [(c, k, "rising/falling") for k in ("hopper", "portable") for c in ("wall", "elapsed")]


@pytest.mark.usefixtures("stands")
def test_a_clock_that_follows_the_data_over_the_whole_gpu_fails_nothing_and_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Stand, "CLOCK", {WHOLE: 0.99})
    record = timing.Run(measurements=100, walls=100, batch_walls=64, seconds=600, seed=1).everything(batch=False)
    assert timing.passed(record)
    row, *_ = (line for line in capsys.readouterr().out.splitlines() if "wall, full" in line and "rising" in line)
    assert elapsed.VERDICT in row
    assert elapsed.given_away(record["full"]) == pytest.approx((0.01, 0.01), rel=0.05)
    assert "over the whole GPU, no gate: wall time differs by up to" in timing.summary(record)[3]


@pytest.mark.usefixtures("stands")
def test_what_leads_is_the_same_for_either_class() -> None:
    zero, one = PAIRS["zeros/random"](QUIET, generator())
    places = shown(QUIET)
    both = Either(places)
    timing.Run(100, 100, 64, 600, 1)._fresh(lambda sizes, generator: (zero, one), QUIET, Either(shown(QUIET)), both)
    for place, of_zero, of_one in zip(places, zero, one, strict=True):
        assert torch.equal(place[:, 0], of_zero[:, 0]) and torch.equal(place[:, 1], of_one[:, 1])


@pytest.mark.gpu
def test_a_quick_run_on_this_gpu_catches_its_controls(tmp_path) -> None:
    file = tmp_path / "timing.json"
    timing.main(["--measurements", "50000", "--no-batch", "--json", str(file)])
    record = json.loads(file.read_text())
    assert record["complete"] and record["controls"]
    assert all(each["ok"] for each in record["controls"]), record["controls"]
    assert {each["clock"] for each in record["cases"]} == {"cycles", "wall", "elapsed", "frequency"}
    assert not any(each.get("moved") for each in record["cases"])
