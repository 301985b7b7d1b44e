"""Population-based training: what its scheduler draws. That it trains as it should is in test_sweep."""

import random
from types import SimpleNamespace

import pytest
from ray.tune.schedulers.pbt import _PBTTrialState

from qbert_ray.overlays import with_values
from qbert_ray.pipelines.population import TRIAL_MEMORY, Scheduler, within
from qbert_ray.pipelines.population import memory as memory_of
from qbert_ray.pipelines.trials import Plan
from qbert_ray.sweeps import Draw
from tests.pipelines.shop import small_config

RATE, SHARE, BATCH = "finetune.learning_rate", "finetune.last_item_share", "finetune.batch_size"


@pytest.fixture
def plan(shop, tmp_path):
    space = {RATE: {"loguniform": [1e-4, 1e-2]}, SHARE: {"uniform": [0.0, 0.5]}, BATCH: [16, 32, 64]}
    sweep = {"scheduler": "pbt", "search": "random", "num_trials": 6, "space": space}
    return Plan(with_values(small_config(shop, tmp_path), {"sweep": sweep}))


class Member:
    """What Tune calls a trial."""

    experiment_tag = ""

    def __init__(self, number, plan):
        self.config = {"number": number} | plan.trials[number].values


def draws(plan, before):
    """The values that each poor trial gets from the best one."""
    scheduler, found = Scheduler(plan), []
    best = Member(0, plan)
    for number in range(1, len(plan.trials)):
        trial = Member(number, plan)
        scheduler._trial_state[trial] = _PBTTrialState(trial)
        scheduler._exploit = lambda _controller, trial, donor: found.append(scheduler._get_new_config(trial, donor)[0])
        scheduler._trial_state[trial].last_train_time = 5
        random.seed(before)
        scheduler._trial_state[best] = SimpleNamespace(last_checkpoint="there", last_result={})
        scheduler._checkpoint_or_exploit(trial, None, [best], [trial])
    return found


def test_draws_follow_from_the_seed_and_stay_inside(plan):
    first = draws(plan, before=1)
    assert first == draws(plan, before=2)
    assert [config["number"] for config in first] == [1, 2, 3, 4, 5]  # each its own, not that of the trial it goes on from
    assert all(1e-4 <= config[RATE] <= 1e-2 and 0 <= config[SHARE] <= 0.5 and config[BATCH] in (16, 32, 64) for config in first)
    assert len({config[RATE] for config in first}) > 1


@pytest.mark.parametrize(
    ("draw", "value", "kept"),
    [
        (Draw(uniform=(0, 1)), 1.2, 1),
        (Draw(randint=(2, 4)), 1, 2),
        (Draw(loguniform=(0.1, 1)), 0.5, 0.5),
        (Draw(choice=["a", "b"]), "b", "b"),
    ],
)
def test_values_are_held_inside_their_bounds(draw, value, kept):
    assert within(draw, value) == kept


@pytest.mark.parametrize(
    ("nodes", "most", "memory"),
    [([8], 1, 8), ([8], 3, 8 // 3), ([8, 8], 2, 8), ([8, 4], 3, 4), ([8, 8], 3, 4), ([], 2, TRIAL_MEMORY)],
)
def test_no_more_of_a_population_train_at_a_time_than_find_room(plan, monkeypatch, nodes, most, memory):
    monkeypatch.setattr("qbert_ray.pipelines.capacity.nodes", lambda: [{"memory": float(size)} for size in nodes])
    assert memory_of(plan, most) == memory
