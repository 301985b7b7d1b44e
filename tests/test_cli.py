"""What the command line says, mostly when something is wrong. No command here gets as far as starting Ray."""

import signal
from contextlib import nullcontext

import pytest

from qbert_ray.cli import main
from qbert_ray.pipelines.stages import STAGES


def call(capsys, *arguments):
    with pytest.raises(SystemExit) as end:
        main(list(arguments))
    said = capsys.readouterr()
    return end.value.code, said.out + said.err


def test_help_names_every_stage(capsys):
    status, text = call(capsys, "--help")
    assert status == 0
    for stage in STAGES:
        assert stage.name in text


def test_describe_prints_the_counts_of_table_6(capsys):
    status, text = call(capsys, "describe", "-c", "configs/paper.yaml", "--items", "6250")
    assert status == 0
    assert "185.4" in text and "3.72" in text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run"], "Missing option '--config'"),
        (["run", "-c", "nowhere.yaml"], "no config file at nowhere.yaml"),
        (["run", "-c", "configs/demo.yaml", "finetune.epoch=1"], "did you mean finetune.epochs?"),
        (["run", "-c", "configs/demo.yaml", "--from", "training"], "no such stage; the stages are ingest, features"),
        (["assign-ids", "-c", "configs/demo.yaml", "--append", "--redo"], "--append keeps every ID and --redo forgets them all"),
        (["finetunes", "-c", "configs/demo.yaml"], "No such command 'finetunes'"),
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
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr("qbert_ray.pipelines.session.session", lambda address: nullcontext())
    monkeypatch.setattr("qbert_ray.pipelines.stages.preflight", lambda *_: signal.raise_signal(number))
    status, text = call(capsys, "run", "-c", "configs/demo.yaml", f"run.dir={tmp_path / 'run'}")
    assert status == expected and text.endswith("stopped; the same command goes on from here\n")
    assert signal.getsignal(signal.SIGTERM) is before


def test_demo_data_is_generated_once(capsys, tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr("qbert_ray.demo.generate", lambda folder, seed: made.append(seed) or {"items": 1})
    call(capsys, "demo-data", str(tmp_path))
    (tmp_path / "interactions.parquet").touch()
    _, text = call(capsys, "demo-data", str(tmp_path))
    assert made == [0] and "already" in text
