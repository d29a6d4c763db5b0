"""Learning-rate schedules: their fixed points, their monotony, and a plain second formula."""

import math
import random
from itertools import pairwise
from pathlib import Path

import pytest

from pytrain import config
from pytrain.learning_rate import learning_rate, of_run


def curve(
    schedule: str, steps: int, warmup: int = 0, decay: int = 0, peak: float = 1.0, low: float = 0.1
) -> list[float]:
    return [
        learning_rate(
            step,
            schedule=schedule,
            peak=peak,
            minimum=low,
            steps=steps,
            warmup_steps=warmup,
            decay_steps=decay,
        )
        for step in range(1, steps + 1)
    ]


def test_warm_up_is_straight_and_ends_at_the_peak() -> None:
    for schedule in ("cosine", "linear", "wsd", "constant"):
        assert curve(schedule, 20, warmup=4, decay=5)[:4] == [0.25, 0.5, 0.75, 1.0]
        assert curve(schedule, 4, warmup=4) == [0.25, 0.5, 0.75, 1.0]


def test_shapes() -> None:
    assert curve("constant", 3) == [1.0, 1.0, 1.0]
    assert curve("linear", 4, low=0.0) == [0.75, 0.5, 0.25, 0.0]
    assert curve("cosine", 4, low=0.0) == pytest.approx([(1 + math.cos(math.pi * k / 4)) / 2 for k in (1, 2, 3, 4)])
    assert curve("cosine", 12, warmup=2)[6] == pytest.approx(0.55)  # half way from step 2 to step 12
    assert curve("wsd", 10, warmup=2, decay=4, low=0.0) == [0.5, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0]


def test_random_schedules_end_at_the_minimum_and_never_rise_after_warm_up() -> None:
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    draw = random.Random(seed)
    for _ in range(200):
        steps = draw.randint(2, 60)
        warmup = draw.randint(0, steps - 1)
        decay = draw.randint(1, steps - warmup)
        peak = draw.uniform(1e-6, 1.0)
        low = peak * draw.random()
        schedule = draw.choice(["cosine", "linear", "wsd"])
        rates = curve(schedule, steps, warmup, decay if schedule == "wsd" else 0, peak, low)
        assert rates[-1] == low
        after = rates[max(warmup - 1, 0) :]
        assert all(later <= earlier for earlier, later in pairwise(after))
        assert max(rates) <= peak
        assert all(later > earlier for earlier, later in pairwise(rates[:warmup]))


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
def test_it_stays_at_the_minimum_beyond_the_end(schedule: str) -> None:
    settings = {"schedule": schedule, "peak": 1.0, "minimum": 0.1, "steps": 10, "decay_steps": 3}
    assert learning_rate(11, **settings) == 0.1  # type: ignore[arg-type]


def test_of_a_run(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(config.commented_toml("gpt2-tiny"), encoding="utf-8")
    run = config.load(path, ["learning_rate.schedule=wsd", "learning_rate.decay_steps=20"])
    assert of_run(run, 5) == pytest.approx(5e-4)
    assert of_run(run, 50) == 1e-3
    assert of_run(run, 90) == pytest.approx(5.5e-4)
    assert of_run(run, 100) == 1e-4
