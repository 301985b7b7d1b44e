"""`run.deterministic`: two equal trainings leave equal weights to the bit, and nothing of it outlives the run."""

import os
import subprocess
import sys

import pytest
import torch

from qbert_ray.config.loading import load_config
from qbert_ray.execution.determinism import ENVIRONMENT, environment
from qbert_ray.execution.executor import open_executor
from tests import ROOT

TRAIN = """
import hashlib, os, random, sys
from qbert_ray.config.loading import load_config
from qbert_ray.execution.executor import open_executor
config = load_config([], ["compute.executor=local", "compute.threads=2", "run.deterministic=true"])
scraps = [bytearray(random.randrange(1, 9999)) for _ in range(200)]  # so that arrays lie elsewhere in each process
with open_executor(config) as executor:
    import torch
    assert torch.get_num_threads() == 1 and torch.are_deterministic_algorithms_enabled() and os.environ["MKL_CBWR"]
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(301, 128), torch.nn.LayerNorm(128), torch.nn.GELU(), torch.nn.Linear(128, 77))
    table = torch.nn.Embedding(500, 301)
    weights = [*model.parameters(), *table.parameters()]
    optimizer = torch.optim.AdamW(weights, fused=True)
    for _ in range(15):
        scraps.append(bytearray(random.randrange(1, 9999)))
        rows = torch.randint(0, 500, (97,))
        loss = torch.nn.functional.cross_entropy(model(table(rows)) @ model(table.weight).T, rows)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
print(hashlib.sha256(b"".join(weight.detach().numpy().tobytes() for weight in weights)).hexdigest())
"""


def test_two_equal_trainings_leave_equal_weights():
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TRAIN], cwd=ROOT, stdout=subprocess.PIPE, text=True, env=os.environ | {"PADDING": "x" * size}
        )
        for size in (1, 3001)
    ]
    found = [process.communicate(timeout=500)[0] for process in processes]
    assert len(found[0]) == 65 and found[0] == found[1]


def test_nothing_of_it_outlives_the_run(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("MKL_CBWR", raising=False)
    before, threads = {name: os.environ.get(name) for name in ENVIRONMENT}, torch.get_num_threads()
    with open_executor(load_config([], ["compute.executor=local", "run.deterministic=true"])):
        assert {name: os.environ[name] for name in ENVIRONMENT} == ENVIRONMENT and torch.are_deterministic_algorithms_enabled()
    assert (
        {name: os.environ.get(name) for name in ENVIRONMENT} == before
        and torch.get_num_threads() == threads
        and not torch.are_deterministic_algorithms_enabled()
    )
    with open_executor(load_config([], ["compute.executor=local", "compute.threads=2"])):
        assert torch.get_num_threads() == 2 and "MKL_CBWR" not in os.environ


def test_variables_that_were_set_come_back_also_after_an_error(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    with pytest.raises(ValueError, match="of the run"), environment(wanted=True):
        assert (os.environ["OMP_NUM_THREADS"], os.environ["CUBLAS_WORKSPACE_CONFIG"]) == ("1", ":4096:8")
        raise ValueError("of the run")
    assert os.environ["OMP_NUM_THREADS"] == "7" and "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    with environment(wanted=False):
        assert os.environ["OMP_NUM_THREADS"] == "7"
