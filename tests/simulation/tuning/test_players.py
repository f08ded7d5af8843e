"""Steps played by processes of their own: as one process plays them, and nothing is left of the processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import time
from concurrent.futures import Future
from pathlib import Path

import psutil
import pytest
from tests.simulation.tuning import tiny

from isthmus.simulation.tuning import players as module
from isthmus.simulation.tuning.costs import Costs, TuneJob
from isthmus.simulation.tuning.mapping import stages_for
from isthmus.simulation.tuning.pipeline import StepResult
from isthmus.simulation.tuning.players import PlayerLost, Players, Step, result_of
from isthmus.simulation.tuning.policies import Aptmoe
from isthmus.simulation.tuning.popularity import find_popularity
from isthmus.simulation.tuning.run import Simulated, simulate_tuning

SPEC = tiny.model(num_layers=4, num_experts=16)
COSTS = Costs(SPEC, tiny.cluster(2), TuneJob(batch=8, seq_len=1, num_micro_batches=2))


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes are started whatever they are worth."""
    monkeypatch.setattr(module, "BEGIN_S", 0.0)
    monkeypatch.setattr(module, "WORTH_PROCESSES_S", 0.0)


def simulated(num_processes: int) -> Simulated:
    popularity = find_popularity("gini=0.15", SPEC, drift=0.8, seed=3)
    return simulate_tuning(COSTS, popularity, num_steps=12, keeps_spans=True, num_processes=num_processes)


def step(number: int = 0) -> Step:
    counts = {layer: [2.0 + number, 1.0, 3.0, 2.0] * 4 for layer in range(4)}
    stages = tuple(stages_for(COSTS, None))
    return Step(stages=stages, make=Aptmoe, counts=counts, expected=counts)


def children() -> list[psutil.Process]:
    return [child for child in psutil.Process().children(recursive=True) if "spawn_main" in " ".join(child.cmdline())]


def test_processes_play_as_one_does(at_once: None) -> None:
    alone, together = simulated(1), simulated(2)
    assert list(together.outcomes) == list(alone.outcomes)
    for policy, outcome in alone.outcomes.items():
        assert together.outcomes[policy] == outcome, policy
    assert together.skewness == alone.skewness
    assert len(set(alone.outcomes["aptmoe"].seconds)) > 1, "steps that are alike are played once"
    assert not children()


def test_results_come_in_the_order_of_steps(at_once: None) -> None:
    with Players(COSTS, 20, num_processes=2) as players:
        futures = [players.play(step(number)) for number in range(20)]
        assert players._pool is not None
        seconds = [result_of(future).seconds for future in futures]
    alone = Players(COSTS, 20, num_processes=1)
    assert seconds == [result_of(alone.play(step(number))).seconds for number in range(20)]
    assert alone._pool is None
    assert sorted(seconds) == seconds != [seconds[0]] * 20


def test_short_simulations_need_no_processes() -> None:
    with Players(COSTS, 50, num_processes=4) as players:
        futures = [players.play(step(number)) for number in range(50)]
        assert all(future.done() for future in futures)
        assert not children()


def test_a_killed_process_is_told_and_the_others_end(at_once: None) -> None:
    def play_all() -> None:
        with Players(COSTS, 10_000, num_processes=2) as players:
            futures: list[Future[StepResult]] = [players.play(step(number)) for number in range(4)]
            result_of(futures[-1])
            (process, *_) = children()
            os.kill(process.pid, signal.SIGKILL)
            for number in range(10_000):
                players.play(step(number))

    with pytest.raises(PlayerLost, match=r"simulation: one of its processes has ended, .*taskset -c 0 isthmus"):
        play_all()
    assert not children()


def test_processes_end_with_who_started_them(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        textwrap.dedent("""
            from tests.simulation.tuning import test_players as this

            if __name__ == "__main__":
                this.module.BEGIN_S = this.module.WORTH_PROCESSES_S = 0.0
                with this.Players(this.COSTS, 10, num_processes=2) as players:
                    this.result_of([players.play(this.step()) for _ in range(4)][-1])
                    print("playing", flush=True)
                    this.time.sleep(60)
        """)
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
    with subprocess.Popen([sys.executable, str(program)], stdout=subprocess.PIPE, env=environment) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == b"playing\n"
            own = psutil.Process(process.pid).children(recursive=True)
            assert len(own) >= 2
        finally:
            process.kill()
    deadline_s = time.monotonic() + 30
    while any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in own):
        assert time.monotonic() < deadline_s, "processes outlived who started them"
        time.sleep(0.05)


def test_nothing_is_left_after_an_error(at_once: None) -> None:
    with pytest.raises(KeyError), Players(COSTS, 100, num_processes=2) as players:
        for number in range(10):
            players.play(step(number))
        raise KeyError
    assert not multiprocessing.active_children()
