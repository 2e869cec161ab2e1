"""Several models in a memory that does not hold them all. "tiny" and its like count as 61 MB each."""

from __future__ import annotations

import os
import signal
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from test_server_helpers import TickModel, wait_until

from alight import planner
from alight.artifact import Artifact
from alight.errors import DoesNotFit, EngineError
from alight.server import Models, memory
from alight.server.keep_alive import FOREVER
from alight.store import Store
from alight.target import LoadOptions, Model

TWO = 140_000_000  # bytes: room for two of them
ONE = 80_000_000


def limited(store: Store, max_memory: int, **options: int) -> Models:
    return Models(store, LoadOptions(**options), target="clock", max_memory=max_memory)  # type: ignore[arg-type]


def loaded(models: Models) -> list[str]:
    return [model.name for model in models.loaded() if model.state.value == "loaded"]


def test_the_one_not_used_for_the_longest_time_goes(store: Store, clock: Path) -> None:
    with limited(store, TWO) as models:
        for name in ("tiny", "other", "tiny", "third"):
            models.get(name)
        assert loaded(models) == ["third", "tiny"]
        assert len(psutil.Process().children()) == 2
        models.get("other")
        assert loaded(models) == ["other", "third"]


def test_those_that_may_expire_go_before_those_that_stay(store: Store, clock: Path) -> None:
    with limited(store, TWO) as models:
        models.get("tiny", keep_alive=FOREVER)
        models.get("other")
        models.get("third", keep_alive=FOREVER)
        assert loaded(models) == ["third", "tiny"]
        models.get("other")  # and then those as well
        assert loaded(models) == ["other", "third"]


def test_models_that_came_loaded_are_left_alone(store: Store, clock: Path) -> None:
    with limited(store, ONE) as models:
        models.add("ticks", TickModel())
        models.get("tiny")
        models.get("other")
        assert loaded(models) == ["other", "ticks"]


def test_what_is_in_use_is_waited_for(store: Store, clock: Path) -> None:
    with limited(store, ONE) as models, ThreadPoolExecutor(4) as pool:
        with models.use("tiny") as model:
            stream = model.generate(f"ticks=3 gate={clock / 'gate'} at=1")
            next(stream)
            third: Future[Model] = pool.submit(models.get, "third")
            wait_until(lambda: models._wanting_room is not None)
            assert [m.name for m in models.loaded()] == ["third", "tiny"]
            # Who comes now for the one in use is not let in before: else the other might wait for ever.
            again = pool.submit(models.get, "tiny")
            wait_until(lambda: models.loaded()[1].waiting == 1)
            assert not third.done() and not again.done()
            (clock / "gate").touch()
            assert "".join(chunk.text for chunk in stream) == "tick " * 3
        assert third.result().info.name.startswith("third")
        assert again.result().info.name.startswith("tiny")
        order = [line.split()[0].partition(":")[0] for line in (clock / "loads").read_text().splitlines()]
        assert order == ["tiny", "third", "tiny"]


def test_many_models_and_threads_in_room_for_two(store: Store, clock: Path) -> None:
    """Whoever asks for whatever gets it, with never more than two processes."""
    with limited(store, TWO, slots=2) as models, ThreadPoolExecutor(9) as pool:

        def ask(number: int) -> str:
            with models.use(("tiny", "other", "third")[number % 3]) as model:
                text = "".join(chunk.text for chunk in model.generate("ticks=2 pause=0.01"))
                assert len(psutil.Process().children()) <= 2
                return text

        assert [*pool.map(ask, range(36))] == ["tick tick "] * 36


def test_who_waits_for_room_may_go_away(store: Store, clock: Path) -> None:
    with limited(store, ONE) as models, ThreadPoolExecutor(1) as pool:
        with models.use("tiny"):
            turn = models.use("third")

            def wait() -> None:
                with suppress(BaseException), turn:
                    raise AssertionError

            waiting = pool.submit(wait)
            wait_until(lambda: models._wanting_room is not None)
            assert turn.cancel()
            waiting.result()
            wait_until(lambda: [m.name for m in models.loaded()] == ["tiny"])
            models.get("tiny")  # lets others in again
        assert models.get("third")


def test_it_does_not_fit_even_alone(store: Store, clock: Path) -> None:
    with limited(store, 50_000_000) as models:
        models.add("ticks", TickModel())
        with pytest.raises(DoesNotFit, match="needs about 61 MB but 50 MB are free"):
            models.get("tiny")
        assert loaded(models) == ["ticks"]


def test_the_context_is_made_smaller_unless_it_was_asked_for(
    smollm2_file: Path, clock: Path, home: Path
) -> None:
    artifact = Artifact.loose(smollm2_file)
    whole = memory.needed(artifact, LoadOptions())
    limit = int((whole - 50_000_000) / (1 - planner.RESERVE))
    with Models(target="clock", max_memory=limit) as models:
        models.offer(artifact)
        (name,) = models.names()
        assert 512 <= models.get(name).info.context < 4096
    with Models(None, LoadOptions(context=4096), target="clock", max_memory=limit) as models:
        models.offer(artifact)
        with pytest.raises(DoesNotFit, match="context of 4096 tokens"):
            models.get(name)


def test_when_the_target_says_that_it_does_not_fit(store: Store, clock: Path) -> None:
    with Models(store, target="clock") as models:
        models.get("tiny")
        (clock / "full").write_text(str(models.loaded()[0].pid))  # full as long as that process lives
        with models.use("tiny"), pytest.raises(DoesNotFit):
            models.get("other")
        assert loaded(models) == ["tiny"]
        assert models.get("other")
        assert loaded(models) == ["other"]


def test_waiting_ends_when_the_server_does(store: Store, clock: Path) -> None:
    with limited(store, ONE) as models, ThreadPoolExecutor(1) as pool, models.use("tiny"):
        waiting = pool.submit(models.get, "third")
        wait_until(lambda: models._wanting_room is not None)
        models.close()
        with pytest.raises(EngineError, match="shutting down"):
            waiting.result()


def test_what_is_free() -> None:
    here = psutil.virtual_memory().available
    assert memory.free(1000, 400, 0) == 600
    assert memory.free(1000, 1400, 0) == 0
    assert (
        memory.free(None, 0, here // 2) < here * 0.6
    )  # mapped weights are not free, whatever the kernel says


def test_what_a_model_needs(smollm2_file: Path, store: Store) -> None:
    real = Artifact.loose(smollm2_file)
    small, large = (memory.needed(real, LoadOptions(context=n)) for n in (512, 4096))
    assert real.size < small < large
    assert memory.needed(real, LoadOptions(context=512, draft=str(smollm2_file))) == small + real.size
    assert memory.needed(store.get("tiny"), LoadOptions()) == store.get("tiny").size + planner.RUNTIME_BYTES


def test_a_restart_after_a_crash_needs_room_again(store: Store, clock: Path) -> None:
    with limited(store, TWO) as models:
        with models.use("tiny") as model:
            models.get("other")  # idle from now on
            pid = models.loaded()[1].pid
            assert pid
            models._max_memory = ONE  # as if something else had taken the memory
            os.kill(pid, signal.SIGKILL)
            assert model.complete("ticks=1").text == "tick "
            assert loaded(models) == ["tiny"]  # the idle one had to go

            pid = models.loaded()[0].pid
            assert pid
            models._max_memory = ONE // 2
            os.kill(pid, signal.SIGKILL)
            with pytest.raises(DoesNotFit, match="'tiny' needs about 61 MB but 40 MB are free"):
                model.complete("ticks=1")
        assert loaded(models) == []
        models._max_memory = TWO
        assert models.get("tiny").complete("ticks=1").text == "tick "


def test_a_restart_does_not_wait_for_a_load_that_waits_for_it(store: Store, clock: Path) -> None:
    with limited(store, ONE) as models, ThreadPoolExecutor(1) as pool:
        with models.use("tiny") as model:
            other = pool.submit(models.get, "other")
            wait_until(lambda: models._wanting_room is not None)
            pid = next(m.pid for m in models.loaded() if m.name == "tiny")
            assert pid
            os.kill(pid, signal.SIGKILL)
            assert model.complete("ticks=1").text == "tick "
        assert other.result().info.name.startswith("other")
