"""Ray for the tests that need it, and where real data are."""

import logging
import os
from pathlib import Path

for name, value in {
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # 15 by default: next to any other work on the machine a test would wait for minutes
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # as in a session without a cluster; so is the next
    "RAY_idle_worker_killing_time_threshold_ms": "600000",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",  # threads that wait for each other make small tensors ten times slower
}.items():
    os.environ.setdefault(name, value)  # read when ray and transformers are imported

import pytest  # noqa: E402

from qbert_ray.execution import ray_session as _ray_session  # noqa: E402, F401, sets what Ray reads when it is imported
from qbert_ray.storage.directory import RunDir  # noqa: E402
from tests.shop import SOURCE, make_two_shops, small_config  # noqa: E402


@pytest.fixture(scope="session")
def ray_session():
    """Four logical CPUs, so that actors and readers never wait for each other on a small machine."""
    from qbert_ray.execution.ray_session import ray

    for name in ("ray", "ray.data", "ray.train"):
        logging.getLogger(name).setLevel(logging.ERROR)  # else every debug line is formatted for pytest's report
    for attempt in range(3):  # Ray gives a node 30 s to start, which a busy machine does not always keep
        try:
            ray.init(address="local", num_cpus=4, include_dashboard=False, object_store_memory=300 * 2**20, log_to_driver=False)
            break
        except Exception as error:
            ray.shutdown()
            if attempt == 2 or "timed out during startup" not in str(error):
                raise
    yield ray
    ray.shutdown()


@pytest.fixture
def real_data() -> Path:
    """Folder with the real data sets, one folder each in the input contract."""
    folder = os.environ.get("QBERT_REAL_DATA")
    if not folder:
        pytest.skip("QBERT_REAL_DATA does not name a folder with real data sets")
    return Path(folder)


@pytest.fixture(scope="session")
def shop(tmp_path_factory):
    return make_two_shops(tmp_path_factory.mktemp("shop"))


@pytest.fixture(scope="session")
def finished(shop, tmp_path_factory, ray_session):
    from qbert_ray.execution.progress import Quiet
    from qbert_ray.execution.ray_executor import RayExecutor
    from qbert_ray.pipeline import run_stage
    from qbert_ray.storage.stages import STAGES

    config = small_config(shop, tmp_path_factory.mktemp("run"), SOURCE)
    run = RunDir(config.run.dir)
    for stage in STAGES:
        run_stage(stage, config, run, RayExecutor(), Quiet())
    return config, run
