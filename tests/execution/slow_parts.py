"""A pass over parts that takes long enough for a node to join: `python -m tests.execution.slow_parts ADDRESS RUN PARTS`."""

import sys
import time

import pyarrow as pa
import ray

from qbert_ray.config.schema import Actors
from qbert_ray.execution.progress import Quiet
from qbert_ray.execution.ray_data import map_parts
from qbert_ray.execution.ray_session import session
from qbert_ray.storage.directory import RunDir

TABLE, NODE = "slow", "node"


class SlowPart:
    """Writes which node it is on."""

    def __init__(self, run: RunDir) -> None:
        self.run = run

    def __call__(self, part: str) -> dict[str, int]:
        time.sleep(0.5)
        self.run.write_part(TABLE, part, pa.table({NODE: [ray.get_runtime_context().get_node_id()]}))
        return {"items": 1}


if __name__ == "__main__":
    address, folder, parts = sys.argv[1:]
    run = RunDir(folder)
    with session(address):
        map_parts(run, SlowPart, {"run": run}, [f"a-{number:03}.parquet" for number in range(int(parts))], TABLE, Actors(), Quiet())
