"""Random masks against multi-mask (§3.5, Table 4) on the validation items of a run that has its semantic IDs.

    python -m tests.benchmarks.mask_strategies -c configs/movielens.yaml data.root=... run.dir=...

Each arm pre-trains in this process with the config's pretrain section, only the masks differ, and is ranked on the
validation items after every epoch. Both numbers are printed whatever they are.
"""

import argparse

import numpy as np
import torch

from qbert_ray.config.loading import load_config
from qbert_ray.config.schema import Config
from qbert_ray.sequence.task import SequencerTask
from qbert_ray.storage.directory import RunDir
from qbert_ray.training import Loop

ARMS = {"random": "{random: 1}", "multi-mask": "{span: 1, tail: 1, multi_region: 1}"}


def best(config: Config) -> dict[str, float]:
    """Metrics of the best epoch of one arm."""
    domain = config.data.targets[0]
    loop = Loop(SequencerTask(config, RunDir(config.run.dir), [domain], config.pretrain), torch.device("cpu"))
    while not loop.finished:
        loop.run_epoch()
    return max(loop.log, key=lambda metrics: metrics["ndcg@10"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-c", "--config", action="append", required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    print("masks        hr@10 (sd)        ndcg@10 (sd)      seeds")
    for name, masks in ARMS.items():
        runs = [
            best(load_config(arguments.config, [*arguments.overrides, f"pretrain.masks={masks}", f"run.seed={seed}"]))
            for seed in range(arguments.seeds)
        ]
        cells = [f"{np.mean(values):.4f} ({np.std(values):.4f})" for values in ([run[key] for run in runs] for key in ("hr@10", "ndcg@10"))]
        print(f"{name:<12} {cells[0]:<17} {cells[1]:<17} {arguments.seeds}", flush=True)


if __name__ == "__main__":
    main()
