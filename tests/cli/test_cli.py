"""What the command line says, mostly when something is wrong. No command here gets as far as starting Ray."""

import os
import signal
import subprocess
import sys
from contextlib import nullcontext

import pytest
import typer

from qbert_ray.cli import completion
from qbert_ray.cli import main as cli
from qbert_ray.cli.main import main
from qbert_ray.cli.stage_commands import of_ray
from qbert_ray.config.loading import load_config
from qbert_ray.storage.stages import STAGES


def call(capsys, *arguments):
    with pytest.raises(SystemExit) as end:
        main(list(arguments))
    said = capsys.readouterr()
    return end.value.code, said.out + said.err


def test_help_names_every_stage(capsys):
    status, text = call(capsys, "--help")
    assert status == 0
    for stage in STAGES:
        assert stage.command in text


def test_describe_prints_the_counts_of_table_6(capsys):
    status, text = call(capsys, "describe", "-c", "configs/paper.yaml", "--items", "6250")
    assert status == 0
    assert "185.4" in text and "3.72" in text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run"], "Missing option '--config'"),
        (["serve"], "name the config of the run with --config"),
        (
            ["run", "-c", "nowhere.yaml"],
            "no config file at nowhere.yaml; the ones that come with the package are named configs/<name>.yaml",
        ),
        (
            ["reproduce", "configs/tables/table3.yaml", "-c", "configs/demo.yaml", "-o", "here"],
            "configs/tables/codes.yaml, configs/tables/comparison.yaml",
        ),
        (["run", "-c", "configs/demo.yaml", "compute.address=127.0.0.1:1"], "no cluster answers at 127.0.0.1:1"),
        (["run", "-c", "configs/demo.yaml", "finetune.epoch=1"], "did you mean finetune.epochs?"),
        (["run", "-c", "configs/demo.yaml", "--from", "training"], "no such stage; the stages are ingest, features"),
        (["semantic-ids", "-c", "configs/demo.yaml", "--append", "--redo"], "--append keeps every ID and --redo forgets them all"),
        (["finetunes", "-c", "configs/demo.yaml"], "No such command 'finetunes'. Did you mean 'finetune'"),
    ],
)
def test_mistakes_end_with_a_message_and_status_2(capsys, arguments, said):
    status, text = call(capsys, *arguments)
    assert status == 2
    assert said in " ".join(text.replace("│", " ").split())
    assert "Traceback" not in text


def test_missing_input_files_are_named(capsys, tmp_path, ray_session):
    status, text = call(capsys, "run", "-c", "configs/scientific.yaml", f"data.root={tmp_path}", f"run.dir={tmp_path / 'run'}")
    assert status == 2
    assert "items.parquet" in text and "Traceback" not in text


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_a_run_with_a_word_and_its_status(capsys, tmp_path, monkeypatch, number, expected):
    before, interrupt = (
        signal.getsignal(signal.SIGTERM),
        signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # background jobs ignore it
    monkeypatch.setattr("qbert_ray.execution.ray_executor.session", lambda address: nullcontext())

    def wait(*_):
        try:
            signal.raise_signal(number)
        except KeyboardInterrupt:  # as Ray does while it waits for results
            raise KeyboardInterrupt from None

    monkeypatch.setattr("qbert_ray.pipeline.preflight", wait)
    status, text = call(capsys, "run", "-c", "configs/demo.yaml", f"run.dir={tmp_path / 'run'}", f"data.root={tmp_path}")
    signal.signal(signal.SIGINT, interrupt)
    assert status == expected and text.endswith("stopped; run the same command again to resume\n")
    assert signal.getsignal(signal.SIGTERM) is before


def test_demo_data_is_generated_once(capsys, tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr("qbert_ray.inputs.demo_shop.generate", lambda folder, seed, media: made.append(seed) or {"items": 1})
    call(capsys, "demo-data", str(tmp_path))
    (tmp_path / "interactions.parquet").touch()
    _, text = call(capsys, "demo-data", str(tmp_path))
    assert made == [0] and "already" in text


@pytest.mark.parametrize("words", [["--users", "5"], ["--width", "3"], ["--per-user", "7"], ["--scale", "2048", "--media"]])
def test_options_of_another_kind_of_demo_shop_are_refused(capsys, tmp_path, words):
    status, text = call(capsys, "demo-data", str(tmp_path / "shop"), *words)
    assert status == 2 and words[-1 if "--media" in words else 0] in text and not (tmp_path / "shop").exists()


def test_a_demo_in_a_folder_whose_name_is_like_yaml(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = []
    monkeypatch.setattr("qbert_ray.cli.main.run", lambda config, overrides: given.append(load_config(config, overrides)))
    monkeypatch.setattr("qbert_ray.inputs.demo_shop.generate", lambda folder, *_, **__: {"items": 1})
    for name in ("[x]", "a: b", "null", "[/x]"):
        assert call(capsys, "demo", name) == (0, f"generated a demo shop in {name}/data: 1 items\n")
        assert (given[-1].run.dir, given[-1].data.root) == (name, f"{name}/data")


def test_demo_data_of_a_scale_says_how_to_run_it(capsys, tmp_path):
    _, text = call(capsys, "demo-data", str(tmp_path / "shop"), "--scale", "2048", "--users", "300", "--width", "8")
    assert "2,048 items, 300 users" in " ".join(text.split())
    assert f"qbert-ray run -c configs/scale.yaml data.root={tmp_path / 'shop'}" in text
    assert (tmp_path / "shop/vectors.parquet").exists()
    status, text = call(capsys, "demo-data", str(tmp_path / "few"), "--scale", "100")
    assert status == 2 and "needs at least 2,048 items" in text


def every_command():
    root = typer.main.get_command(cli.app)
    for name, command in root.commands.items():
        if hasattr(command, "commands"):
            yield from ([name, child] for child in command.commands)
        else:
            yield [name]


@pytest.mark.parametrize("command", every_command(), ids=" ".join)
def test_help_fits_80_columns_and_has_an_example_to_copy(capsys, monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "80")
    status, text = call(capsys, *command, "--help")
    assert status == 0
    assert f"Example: qbert-ray {' '.join(command)}" in text
    assert "…" not in text and max(map(len, text.splitlines())) <= 80


def test_the_help_lists_every_command_under_its_stage(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    _, text = call(capsys, "--help")
    panels = [line.split("─ ")[1].split(" ─")[0] for line in text.splitlines() if line.startswith("╭─ ")]
    assert panels[1:3] == ["Data", "Whole run"] and panels[-1] == "Looking"
    assert [panel for panel in panels if panel.startswith("Stage")] == list(
        dict.fromkeys(panel for panel in (stage.panel for stage in STAGES))
    )


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["fi"], ["finetune"]),
        (["run", "--from", "f"], ["features", "fusion", "finetune"]),
        (["run", "-c", "configs/m"], ["configs/movielens.yaml"]),
        (["run", "-c", "configs/demo.yaml", "finetune.ep"], ["finetune.epochs="]),
        (["config", "--describe", "seq"], ["sequencer"]),
    ],
)
def test_the_shell_completes_stages_files_and_fields(words, expected):
    environment = os.environ | {
        "_QBERT_RAY_COMPLETE": "complete_bash",
        "COMP_WORDS": " ".join(["qbert-ray", *words]),
        "COMP_CWORD": str(len(words)),
    }
    code = "from qbert_ray.cli.main import app; app(prog_name='qbert-ray')"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == expected, done.stderr


def test_completion_goes_into_folders_and_past_hidden_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "deep" / "down").mkdir(parents=True)
    for name in ("a.yaml", "deep/b.yml", "deep/c.txt", "deep/.d.yaml"):
        (tmp_path / name).touch()
    assert completion.config_files("") == ["a.yaml", "deep/"]
    assert completion.config_files("deep/") == ["deep/b.yml", "deep/down/"]
    assert completion.config_files(str(tmp_path / "a")) == [str(tmp_path / "a.yaml")]
    assert completion.prefixes("fusion.wi") == ["fusion.width"]


@pytest.mark.parametrize(
    ("settings", "environment", "said"),
    [
        ([], None, "; starting Ray"),
        (["compute.address=10.0.0.1:6379"], None, "; connecting to Ray at 10.0.0.1:6379"),
        ([], "auto", "; connecting to Ray at auto"),
        (["compute.executor=local"], None, ""),
    ],
)
def test_the_first_line_says_what_becomes_of_ray(monkeypatch, settings, environment, said):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if environment:
        monkeypatch.setenv("RAY_ADDRESS", environment)
    assert of_ray(load_config([], settings)) == said
    assert of_ray(load_config([], settings), always=True) == (said or "; starting Ray")
