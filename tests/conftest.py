"""Ray for the tests that need it, and where real data are."""

import logging
import os
import shutil
from collections.abc import Callable
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
from filelock import FileLock  # noqa: E402

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


def made_once(folder: Path, make: Callable[[Path], object]) -> Path:
    """The folder that `make` fills, by the first of the processes of a test run that wants it; the others wait."""
    done = folder.with_name(f"{folder.name}.done")
    with FileLock(f"{folder}.lock"):
        if not done.exists():
            make(folder)
            done.touch()
    return folder


@pytest.fixture(scope="session")
def shared(tmp_path_factory) -> Path:
    """A folder that the processes of a test run have in common."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session")
def shop(shared):
    return made_once(shared / "shop", make_two_shops)


@pytest.fixture(scope="session")
def finished(shop, shared, tmp_path_factory, ray_session):
    """A whole small run: a minute of work, done once, of which every process has a copy that its tests may add to."""
    from qbert_ray.execution.progress import Quiet
    from qbert_ray.execution.ray_executor import RayExecutor
    from qbert_ray.pipeline import run_stage
    from qbert_ray.storage.stages import STAGES

    def make(folder: Path) -> None:
        for stage in STAGES:
            run_stage(stage, small_config(shop, folder, SOURCE), RunDir(str(folder)), RayExecutor(), Quiet())

    folder = tmp_path_factory.mktemp("run")
    shutil.copytree(made_once(shared / "run", make), folder, dirs_exist_ok=True)
    return small_config(shop, folder, SOURCE), RunDir(str(folder))
