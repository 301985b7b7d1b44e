"""Two small shops, one to pre-train on, and a finished run on it, made once for all tests that look at one."""

import pytest

from qbert_ray.artifacts import RunDir
from tests.pipelines.shop import SOURCE, make_two_shops, small_config


@pytest.fixture(scope="session")
def shop(tmp_path_factory):
    return make_two_shops(tmp_path_factory.mktemp("shop"))


@pytest.fixture(scope="session")
def finished(shop, tmp_path_factory, ray_session):
    from qbert_ray.pipelines.session import Quiet
    from qbert_ray.pipelines.stages import STAGES, run_stage

    config = small_config(shop, tmp_path_factory.mktemp("run"), SOURCE)
    run = RunDir(config.run.dir)
    for stage in STAGES:
        run_stage(stage, config, run, Quiet())
    return config, run
