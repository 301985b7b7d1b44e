"""The settings of a sweep, and the folders its trials share."""

import math

import pytest

from qbert_ray.config.loading import ConfigError, load_config
from qbert_ray.config.search import objectives, settings
from qbert_ray.storage.directory import RunDir

LAYERS, DROPOUT = "sweep.space.sequencer.num_layers=[1,2,3]", "sweep.space.sequencer.dropout=[0.1,0.2]"
BASE = {"sequencer.num_layers": 2, "sequencer.dropout": 0.2}


def chosen(*overrides, seed=0):
    return settings(load_config([], list(overrides)).sweep, BASE, seed)


def test_each_varies_one_field_at_a_time_and_tries_nothing_twice():
    found = [tuple(setting.values()) for setting in chosen(LAYERS, DROPOUT)]
    assert found == [(1, 0.2), (2, 0.2), (3, 0.2), (2, 0.1)]


def test_grid_is_every_combination():
    found = chosen(LAYERS, DROPOUT, "sweep.search=grid")
    assert len(found) == 6 and {tuple(setting.values()) for setting in found} == {(n, d) for n in (1, 2, 3) for d in (0.1, 0.2)}


def test_random_draws_follow_the_seed_and_stay_inside():
    space = "sweep.space={finetune.learning_rate: {loguniform: [1e-5, 1e-2]}, quantizer.num_levels: {randint: [2, 4]}, sequencer.dropout: [0.1, 0.3]}"
    first, again, other = (chosen(space, "sweep.search=random", "sweep.num_trials=200", seed=seed) for seed in (0, 0, 1))
    assert first == again != other
    rates = [setting["finetune.learning_rate"] for setting in first]
    assert min(rates) >= 1e-5 and max(rates) <= 1e-2
    assert 0.3 < sum(rate < math.sqrt(1e-7) for rate in rates) / len(rates) < 0.7  # uniform in the logarithm
    assert {setting["quantizer.num_levels"] for setting in first} == {2, 3, 4}
    assert {setting["sequencer.dropout"] for setting in first} == {0.1, 0.3}


def test_uniform_draws_fill_their_interval():
    settings = chosen("sweep.space={sequencer.dropout: {uniform: [0.1, 0.5]}}", "sweep.search=random", "sweep.num_trials=200")
    drawn = [setting["sequencer.dropout"] for setting in settings]
    assert 0.1 <= min(drawn) < 0.12 and 0.48 < max(drawn) <= 0.5 and len(set(drawn)) == 200


def test_optuna_chooses_by_itself():
    assert chosen("sweep.space={sequencer.dropout: {uniform: [0.1, 0.5]}}", "sweep.search=optuna") == []


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ([], "sweep.space is empty"),
        (["sweep.space.sequencer.dropout={uniform: [0, 1]}"], "is drawn: use random or optuna"),
    ],
)
def test_a_space_that_does_not_suit_the_search_is_refused(overrides, said):
    with pytest.raises(ValueError, match=said):
        chosen(*overrides)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("sweep.space.sequencer.dropout={uniform: [1, 0]}", "holds nothing to draw"),
        ("sweep.space.sequencer.dropout={loguniform: [0, 1]}", "holds nothing to draw"),
        ("sweep.space.sequencer.dropout=[]", "holds nothing to draw"),
        ("sweep.space.sequencer.dropout={uniform: [0, 1], choice: [1]}", "give one of"),
        ("sweep.space=3", "sweep.space"),
        ("sweep.search=hill", "sweep.search"),
    ],
)
def test_errors_name_the_field(override, said):
    with pytest.raises(ConfigError, match=said):
        load_config([], [override])


def test_the_stage_says_what_is_compared():
    assert objectives(load_config().sweep) == {"ndcg@10": "max"}
    assert objectives(load_config([], ["sweep.stage=quantizer"]).sweep) == {"reconstruction_error": "min"}
    assert objectives(load_config([], ["sweep.objectives={ms_per_user: min}"]).sweep) == {"ms_per_user": "min"}


def test_a_run_that_shares_reads_there_and_never_writes_there(tmp_path):
    base = RunDir(str(tmp_path))
    base.write_json("features/manifest.json", {"made": "below"})
    trial = base.inside("sweep/trials/x").sharing(base, ["features"])
    trial.write_json("fusion/manifest.json", {"made": "here"})
    assert trial.read_json("features/manifest.json") == {"made": "below"}
    assert base.names("features") == ["manifest.json"] and not base.exists("fusion")
    assert base.folders("sweep/trials") == ["x"]
    for act in (lambda: trial.write_json("features/x.json", 1), lambda: trial.delete("features")):
        with pytest.raises(AssertionError):
            act()
    assert base.inside("a").uri == str(tmp_path / "a")
    assert RunDir("s3://bucket/run?region=x").inside("a/b").uri == "s3://bucket/run/a/b?region=x"
