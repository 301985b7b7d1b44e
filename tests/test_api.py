"""The public API: every name of `qbert_ray`, and a whole run from Python in this process."""

import inspect
import re
import subprocess
import sys

import numpy as np
import pytest
import yaml

import qbert_ray as qb
from qbert_ray.config.loading import with_values
from qbert_ray.storage.columns import to_numpy
from qbert_ray.storage.stages import STAGES
from tests import ROOT
from tests.shop import SOURCE, small_config

TABLES = ("ingest/items", "ingest/sequences", "ingest/interactions", "ingest/rejected", "semantic_ids")


@pytest.fixture(scope="module")
def local(shop, tmp_path_factory):
    return qb.run(small_config(shop, tmp_path_factory.mktemp("local"), SOURCE), executor="local")


def test_every_public_name_is_there_and_has_a_docstring():
    for name in qb.__all__:
        assert getattr(qb, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = qb.nothing


def members(name):
    """Functions that a public name is or holds, as written in its own class or module."""
    value = getattr(qb, name)
    held = [value] if inspect.isfunction(value) else [each for key, each in vars(value).items() if not key.startswith("_")]
    held = [each.fget if isinstance(each, property) else getattr(each, "__func__", each) for each in held]
    return [each for each in held if inspect.isfunction(each) and each.__module__.startswith("qbert_ray")]


def test_results_of_public_functions_have_a_known_shape():
    found = {each.__qualname__: str(each.__annotations__["return"]) for name in qb.__all__ for each in members(name)}
    assert len(found) > 40 and not [name for name, result in found.items() if re.search(r"\bAny\b|\bobject\b|^dict$|^tuple$", result)]


def test_importing_the_package_loads_neither_torch_nor_ray():
    code = "import sys, qbert_ray; assert not {'torch', 'ray', 'polars'} & set(sys.modules), sorted(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def test_a_run_in_this_process_never_imports_ray(shop, tmp_path):
    config = small_config(shop, tmp_path, SOURCE, "finetune.epochs=1", "pretrain.enabled=false")
    (tmp_path / "config.json").write_text(config.model_dump_json(exclude_unset=True))
    code = f"""
import sys, qbert_ray as qb
done = qb.run(qb.load_config({str(tmp_path / "config.json")!r}), executor="local")
assert "ray" not in sys.modules
print(done.table("score").num_rows)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) > 0


def test_both_executors_give_equal_tables(local, finished):
    _, on_ray = finished
    for table in TABLES:
        assert local.table(table).equals(on_ray.read(table)), table
    fused = [to_numpy(each["embedding"]) for each in (local.table("fusion/embeddings"), on_ray.read("fusion/embeddings"))]
    np.testing.assert_allclose(fused[0], fused[1], atol=1e-4)  # sums in another order: the memory of the processes is aligned differently
    ranks = [each["rank_all"].to_numpy() for each in (local.table("evaluate/ranks"), on_ray.read("evaluate/ranks"))]
    assert len(ranks[0]) == len(ranks[1]) and np.mean(ranks[0] == ranks[1]) > 0.9


def test_a_second_run_skips_what_is_done_and_a_changed_config_is_refused(local):
    before = local.directory.read_bytes("finetune/manifest.json")
    assert qb.run(local.config, executor="local").directory == local.directory
    assert local.directory.read_bytes("finetune/manifest.json") == before
    with pytest.raises(qb.ArtifactError, match=r"(?s)finetune\.epochs: made with 3, now 4.*--from finetune"):
        qb.run(with_values(local.config, {"finetune.epochs": 4}), executor="local")


def test_what_a_run_left_can_be_read(local):
    run = qb.open_run(local.directory.uri)
    assert set(run.metrics) == {"demo"} and run.config.finetune.epochs == 3
    table = run.table("score", "demo")
    best = run.recommender().recommend([run.recommender().ids[:3]], k=5)
    assert len(best[0]) == 5 and table.column_names[:3] == ["domain", "user_id", "rank"]
    with pytest.raises(qb.ArtifactError, match="no run in"):
        qb.open_run(f"{local.directory.uri}/nothing")


def test_the_python_of_the_readme_runs(local, tmp_path, monkeypatch):
    """On a run that is finished already, so that every stage is skipped."""
    (text,) = re.findall(
        r"^```python\n(import qbert_ray as qb.*?qb\.run\(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL
    )
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "demo.yaml").write_text(yaml.safe_dump(local.config.model_dump(mode="json")))
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(text, names)  # noqa: S102
    assert [len(each) for each in names["best"]] == [5, 5]
    assert {"item_id", "codes", "semantic_id"} <= set(names["ids"].column_names)


def test_stages_are_listed_in_the_order_of_their_inputs():
    done: set[str] = set()
    for stage in STAGES:
        assert set(stage.inputs) <= done, stage.name
        done.add(stage.name)


def test_old_names_of_sections_and_folders_are_refused_with_the_new_one(local, tmp_path):
    with pytest.raises(qb.ConfigError, match="rqvae: has a new name; write quantizer"):
        qb.load_config("rqvae.num_levels=3")
    config = with_values(local.config, {"run.dir": str(tmp_path)})
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "manifest.json").write_text("{}")
    with pytest.raises(qb.ArtifactError, match="ranking/"):
        qb.run(config, executor="local")


def test_a_config_of_the_package_is_found_from_anywhere(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert qb.load_config("configs/demo.yaml").run.dir == "runs/demo"
    with pytest.raises(qb.ConfigError, match="no config file at configs/nothing.yaml"):
        qb.load_config("configs/nothing.yaml")
