"""Where a step's time goes, and which rank the others wait for."""

import time

import pytest
import torch

from partial_fc.data.remote import Fetches
from partial_fc.head.margins import CosFace
from partial_fc.head.partial_fc import PartialFC
from partial_fc.metrics import RankTimes
from partial_fc.parallel import distributed
from partial_fc.phases import ALONE, NAMES, Phases, slowest_rank
from partial_fc.profiler import Profiler
from tests.conftest import run_ranks


def test_phases_add_up_to_the_time_that_passed():
    phases = Phases(torch.device("cpu"))
    times = [time.perf_counter()]  # around the first begin, and around the reading: other tests share the cores
    for name, seconds in (("data", 0.05), ("forward", 0.01), ("data", 0.03), ("log", 0.0)):
        phases.begin(name)
        times.append(time.perf_counter())
        time.sleep(seconds)
    times.append(time.perf_counter())
    seconds = dict(zip(NAMES, phases.read().tolist(), strict=True))
    times.append(time.perf_counter())
    assert seconds["data"] >= 0.08 and seconds["forward"] >= 0.01
    assert times[-2] - times[1] - 1e-6 <= sum(seconds.values()) <= times[-1] - times[0] + 1e-6
    assert phases.data_wait() == pytest.approx(seconds["data"], abs=1e-3)
    assert phases.read().sum() < 0.05 and phases.data_wait() == 0  # since that reading
    assert {name for name, value in zip(NAMES, phases.read(), strict=True) if value} == {"log"}  # it goes on


def test_ranges_of_a_profile_are_the_phases():
    phases = Phases(torch.device("cpu"))
    phases.begin("data")
    with torch.profiler.profile() as recorded:
        phases.named = True
        for name in ("forward", "head", "backward"):
            phases.begin(name)
            torch.ones(3).sum()
        phases.named = False
        phases.begin("log")
    assert {"forward", "head", "backward"} <= {event.name for event in recorded.events()}
    assert not {"data", "log"} & {event.name for event in recorded.events()}


def slow_rank(which: int, phase: str) -> tuple[int, float, str]:
    phases = Phases(torch.device("cpu"))
    head = PartialFC(20, 8, CosFace(scale=8, margin=0.1))
    head.begin_phase = phases.begin
    for step in range(5):
        if step == 1:
            phases.read()  # the first one loads what the others have
        for name in ("data", "forward"):
            phases.begin(name)
            time.sleep(0.1 if distributed.rank() == which and name == phase else 0.0)
        phases.begin("head")
        head(torch.randn(3, 8, requires_grad=True), torch.arange(3)).backward()
        head.step(0.1)
    phases.begin("log")
    return slowest_rank(RankTimes.gather(phases, Fetches()).seconds / 4)


@pytest.mark.slow
@pytest.mark.parametrize("which, phase", [(0, "forward"), (2, "data")])
def test_the_slowest_rank_is_named(which, phase):
    for rank, lag, name in run_ranks(slow_rank, 3, which, phase):  # the same on all
        assert (rank, name) == (which, phase) and lag > 0.04


@pytest.mark.slow
def test_memory_is_that_of_the_rank_with_most():
    first, second = run_ranks(gathered, 2)
    assert first == second
    assert first[0] == [2, len(NAMES)] and first[1] > 2**20


def gathered():
    phases = Phases(torch.device("cpu"))
    phases.begin("data")
    found = RankTimes.gather(phases, Fetches())
    return list(found.seconds.shape), found.memory


def test_names_that_the_slowest_is_judged_by():
    assert set(ALONE) < set(NAMES)


@pytest.mark.gpu
def test_phases_of_a_device_are_those_of_its_stream():
    device = torch.device("cuda")
    phases = Phases(device)
    x = torch.randn(4096, 4096, device=device)
    x @ x
    torch.cuda.synchronize()
    for name in ("forward", "backward", "log"):
        phases.begin(name)
        for _ in range({"forward": 20, "backward": 5, "log": 0}[name]):
            x = x @ x / 64
    seconds = dict(zip(NAMES, phases.read().tolist(), strict=True))
    assert seconds["forward"] > 2 * seconds["backward"] > 0 and seconds["log"] < seconds["backward"]


@pytest.mark.parametrize("steps, said", [((5, 8), False), ((0, 4), True), ((20, 25), True), ((9, 30), False)])
def test_a_window_outside_the_steps_of_the_run_is_said(tmp_path, capsys, steps, said):
    device = torch.device("cpu")
    Profiler(steps, tmp_path, device, Phases(device)).check(4, 20)
    assert ("this run makes the steps 4 to 19" in capsys.readouterr().out) == said
