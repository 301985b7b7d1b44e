"""What is in cluster/: as KubeRay's and Ray's own schemas have it, and naming only what exists."""

import copy
import json
import re
import tomllib

import jsonschema
import pytest
import yaml

from qbert_ray import __version__
from qbert_ray.config.loading import load_config
from qbert_ray.storage.stages import STAGES
from tests import ROOT

KUBERAY, LAUNCHER = ["rayjob", "raycluster"], ["aws", "hosts"]
FILES = sorted((ROOT / "cluster").glob("*.yaml"))


def documents(name: str) -> list[dict]:
    return list(yaml.safe_load_all((ROOT / "cluster" / f"{name}.yaml").read_text()))


def read(name: str) -> dict:
    """What the file is for; a service account may stand before it."""
    return documents(name)[-1]


def problems(document: dict) -> list[str]:
    schema = json.loads((ROOT / "tests" / "kuberay_schema.json").read_text())
    validator = jsonschema.Draft202012Validator({"$ref": f"#/$defs/{document['kind']}", "$defs": schema["$defs"]})
    return [f"{'.'.join(map(str, error.absolute_path))}: {error.message}" for error in validator.iter_errors(document)]


def cluster_spec(document: dict) -> dict:
    return document["spec"].get("rayClusterSpec", document["spec"])


@pytest.mark.parametrize("name", KUBERAY)
def test_kuberay_files_fit_the_published_schema(name):
    assert problems(read(name)) == []


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["spec", "headGroupSpec", "rayStartParam"], {}),
        (["spec", "headGroupSpec", "rayStartParams", "num-cpus"], 0),
        (["spec", "authOptions", "mode"], "on"),
        (["spec", "workerGroupSpecs", 0, "template", "spec", "containers", 0, "resources", "limits", "memory"], "64 GB"),
        (["spec", "workerGroupSpecs", 0, "template", "spec", "containers", 0, "resource"], {}),
        (["spec", "workerGroupSpecs", 1, "maxReplicas"], "4"),
        (["apiVersion"], "ray.io/v1alpha1"),
    ],
)
def test_the_schema_refuses_what_is_wrong(path, value):
    document = copy.deepcopy(read("raycluster"))
    inner = document
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    assert len(problems(document)) == 1


@pytest.mark.parametrize("name", KUBERAY)
def test_nodes_of_kuberay_are_guarded_and_grow(name):
    spec = cluster_spec(read(name))
    assert spec["authOptions"]["mode"] == "token" and spec["enableInTreeAutoscaling"] is True
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    groups = {group["groupName"]: group for group in spec["workerGroupSpecs"]}
    assert groups["gpu"]["minReplicas"] == 0 < groups["gpu"]["maxReplicas"]
    limits = {key: group["template"]["spec"]["containers"][0]["resources"]["limits"] for key, group in groups.items()}
    assert limits["gpu"]["nvidia.com/gpu"] == "1" and "nvidia.com/gpu" not in limits["data"]


@pytest.mark.parametrize("name", KUBERAY)
def test_pods_run_as_an_account_that_the_file_makes(name):
    """KubeRay makes an account for its autoscaler only where the head's pods name none."""
    account, found = documents(name)
    assert (account["apiVersion"], account["kind"]) == ("v1", "ServiceAccount")
    spec = cluster_spec(found)
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    assert {group["template"]["spec"].get("serviceAccountName") for group in groups} == {account["metadata"]["name"]}


@pytest.mark.parametrize("name", KUBERAY)
def test_only_the_head_can_speak_to_kubernetes(name):
    """KubeRay lets the account of the pods do what the autoscaler does, which runs on the head."""
    spec = cluster_spec(documents(name)[1])
    workers = [group["template"]["spec"].get("automountServiceAccountToken", True) for group in spec["workerGroupSpecs"]]
    assert spec["headGroupSpec"]["template"]["spec"].get("automountServiceAccountToken", True) and workers == [False, False]


def test_the_head_on_aws_may_start_workers_and_the_workers_may_not():
    """Ray gives the head a profile of its own only where the file names none."""
    types = read("aws")["available_node_types"]
    profiles = {name: kind["node_config"]["IamInstanceProfile"]["Name"] for name, kind in types.items()}
    assert profiles == {"head": "HEAD_PROFILE", "data": "WORKER_PROFILE", "gpu": "WORKER_PROFILE"}
    comment = (ROOT / "cluster" / "aws.yaml").read_text().split("cluster_name:")[0]
    rights = {"ec2:RunInstances", "ec2:TerminateInstances", "ec2:CreateTags", "ec2:Describe", "iam:PassRole"}
    assert rights <= set(re.findall(r"\b(?:ec2|iam):\w+", comment))


@pytest.mark.parametrize("name", LAUNCHER)
def test_launcher_files_are_accepted_by_ray(name):
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(read(name))
    validate_config(prepared)
    types = prepared["available_node_types"]
    workers = {key: kind for key, kind in types.items() if key != prepared["head_node_type"]} or types
    assert sum(kind["max_workers"] for kind in workers.values()) >= 3
    with pytest.raises(jsonschema.ValidationError):
        validate_config({**prepared, "max_worker": 3})


@pytest.mark.parametrize("name", LAUNCHER)
def test_dashboards_of_launched_clusters_listen_on_loopback_behind_a_token(name):
    config = read(name)
    start = [*config["head_start_ray_commands"], *config["worker_start_ray_commands"]]
    starts = [line for line in start if "ray start" in line]
    assert len(starts) == 2 and all("RAY_AUTH_MODE=token" in line for line in starts)
    assert "--dashboard-host=127.0.0.1" in starts[0]


def test_one_version_of_ray_everywhere():
    version = re.search(r"^ray==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]
    files = [*FILES, ROOT / "cluster" / "Dockerfile"]
    named = {
        found for file in files for found in re.findall(r"(?:rayproject/ray:|rayVersion: |ray\[default\]==)([\d.]+)", file.read_text())
    }
    assert named == {version}
    own = __version__
    assert {found for file in files for found in re.findall(r"qbert-ray:([\d.]+\d)", file.read_text())} == {own}


@pytest.mark.parametrize("file", [*FILES, ROOT / "cluster" / "Dockerfile"], ids=lambda file: file.name)
def test_each_file_opens_with_how_to_use_it_and_names_what_exists(file):
    text = file.read_text()
    comment = "\n".join(line for line in text.split("\n\n")[0].splitlines() if line.startswith("#"))
    assert text.startswith("# ") and re.search(rf"^#   (ray up|kubectl apply|docker build) .*{file.name}", comment, re.MULTILINE)
    for name in re.findall(r"\b(?:configs|cluster)/[\w./-]+\w", text):
        assert (ROOT / name).exists() or name == "cluster/*.yaml", name
    for module in re.findall(r"python -m jobs\.(\w+)", text):
        assert (ROOT / "jobs" / f"{module}.py").exists()
    for line in re.findall(r"python -m jobs\.\w+ -c (.*)", re.sub(r"(\\\n#|\n)\s+(?=data\.root|compute)", " ", text)):
        config, *overrides = line.split()
        load_config([ROOT / config], overrides)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_groups_of_nodes_name_stages_that_exist(file):
    for said in re.findall(r"# ((?:\w+, )+)and whatever needs no GPU", file.read_text()):
        assert set(said.removesuffix(", ").split(", ")) <= {stage.name for stage in STAGES}


def test_the_image_holds_what_the_package_needs():
    """Every path that is copied exists, and no folder of the code is forgotten."""
    copied = [
        word
        for line in re.findall(r"^COPY (.*)$", (ROOT / "cluster" / "Dockerfile").read_text(), re.MULTILINE)
        for word in line.split()[1:-1]
    ]
    assert {"pyproject.toml", "constraints.txt", "qbert_ray", "jobs", "configs"} <= set(copied)
    assert [name for name in copied if not (ROOT / name).exists()] == []


def test_the_dependencies_of_the_image_are_installed_where_the_package_can_be_built():
    """Before the code is copied: its build reads the version from a file, and wants every folder that the wheel includes by name."""
    text = (ROOT / "cluster" / "Dockerfile").read_text()
    before = text[: text.index("'.[jobs]'")]
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]
    wanted = [build["version"]["path"], *build["build"]["targets"]["wheel"]["force-include"]]
    copied = {word for line in re.findall(r"^COPY (.*)$", before, re.MULTILINE) for word in line.split()}
    made = set(re.findall(r"mkdir (\S+)", before))
    assert set(wanted) <= copied | made and build["version"]["path"] in copied and "touch" not in before


def test_the_image_without_cuda_takes_torch_from_an_index_without_cuda():
    text = (ROOT / "cluster" / "Dockerfile").read_text()
    header, steps = text.split("\nFROM ")
    assert re.search(r"--build-arg BASE=\S+-py311 --build-arg TORCH_INDEX=https://download\.pytorch\.org/whl/cpu ", header)
    installs = re.findall(r"pip install --no-cache-dir ([^\n]*?)(?: \\)?\n", steps)
    assert installs[0] == "${TORCH_INDEX:+--index-url ${TORCH_INDEX}} -c constraints.txt torch torchvision"
    assert re.search(r"^ARG TORCH_INDEX=$", steps, re.MULTILINE)  # an ARG from before FROM is empty in the steps
    pinned = dict(re.findall(r"^(torch|torchvision)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    assert len(pinned) == 2 and not any("+" in version for version in pinned.values())  # 2.14.1 is met by 2.14.1+cpu; not the reverse


def test_the_dashboard_asks_for_metrics_that_are_written():
    """Ray puts ray_ before a metric's name, and _total after a counter's."""
    board = json.loads((ROOT / "cluster" / "grafana.json").read_text())
    asked = {name for panel in board["panels"] for target in panel["targets"] for name in re.findall(r"ray_qbert_\w+", target["expr"])}
    source = (ROOT / "qbert_ray" / "execution" / "ray_metrics.py").read_text()
    written = dict(re.findall(r'return (Gauge|Counter)\(\s*"(\w+)"', source))
    assert asked == {f"ray_{written['Gauge']}", f"ray_{written['Counter']}_total"}
    for panel in board["panels"]:
        for target in panel["targets"]:  # else two jobs of a run, or two runs, draw one line
            assert "ray_qbert" not in target["expr"] or re.search(r'by \(run, job_id, .*run=~"\$run"', target["expr"]), panel["title"]
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
