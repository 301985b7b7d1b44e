"""What a run prints: a JSON object per line in a log, bars and tables on a terminal."""

import io
import json

import pytest
from rich.console import Console

from qbert_ray.cli.console import _summary
from qbert_ray.cli.journal import JsonLines, Terminal, open_journal
from qbert_ray.storage.directory import Manifest

METRICS = {"users": 3, "protocols": {"all": {"model": {"hr@10": {"value": 0.5, "low": 0.25, "high": 0.75}}}}}


def report(journal):
    """A run, as the command line reports it."""
    manifest = Manifest("finetune", {}, {}, "1", counts={"metrics": {"büro": {"epoch": 1, "hr@10": 0.5}}})
    journal.begin("run directory runs/shop")
    journal.done("ingest", manifest, None)
    journal.done("pretrain", None, None, "pretrain.enabled is false")
    with journal.stage("finetune") as progress:
        progress.note("büro")
        progress.start(2)
        progress.epoch({"epoch": 0, "train_loss": 2.5, "codebook_usage": [1.0, 0.5]})
        progress.advance()
        progress.restarted(1, 2)
        progress.note("ndcg@10 .1")
    journal.done("finetune", manifest, 1.234)
    journal.warn("a [bold] warning")
    journal.metrics("büro", METRICS)
    journal.appended({"version": 1, "fingerprint": "ab", "items": 9, "added": 2, "unchanged": 7, "changed": 0, "gone": 0})
    journal.files({"semantic IDs": "runs/shop/semantic_ids"})


def test_each_event_is_a_line_of_json_that_says_where_it_belongs(capsys):
    report(JsonLines("runs/shop", ["büro"]))
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert all(line["run"] == "runs/shop" and line["timestamp"].endswith("Z") for line in lines)
    by_event = {line["event"]: line for line in lines}
    assert [line["event"] for line in lines] == [
        *(
            "started",
            "stage was done before",
            "stage left out",
            "stage started",
            "epoch",
            "restarted",
            "note",
            "stage done",
            "warning",
            "metrics",
            "appended",
            "files",
        )
    ]
    assert by_event["epoch"]["stage"] == "finetune" and by_event["epoch"]["domain"] == "büro" and by_event["epoch"]["train_loss"] == 2.5
    assert by_event["restarted"]["epoch"] == 1 and by_event["restarted"]["workers"] == 2 and by_event["restarted"]["stage"] == "finetune"
    assert by_event["stage done"]["seconds"] == 1.2 and by_event["metrics"]["protocols"] == METRICS["protocols"]
    assert by_event["appended"]["added"] == 2
    assert by_event["files"]["semantic_IDs"] == "runs/shop/semantic_ids"


def test_a_stage_that_fails_says_so_in_the_log(capsys):
    with pytest.raises(ZeroDivisionError), JsonLines("r", []).stage("features"):
        raise ZeroDivisionError("no\nitems")
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (last["event"], last["stage"], last["error"]) == ("stage failed", "features", "ZeroDivisionError: no\nitems")


def test_a_person_reads_lines_and_tables():
    console = Console(file=io.StringIO(), width=100)
    report(Terminal(console))
    said = console.file.getvalue()
    assert (
        "✓ finetune" in said
        and "left out: pretrain.enabled is false" in said
        and "a [bold] warning" in said
        and "9 semantic IDs, 2 added" in said
    )
    assert "semantic IDs     runs/shop/semantic_ids" in said and "{" not in said


@pytest.mark.parametrize(("ranked", "said"), [({"hr@10": 0.25}, "validation hr@10 0.2500"), ({}, "no validation items")])
def test_pre_training_says_how_it_ranks_where_that_can_be_said(ranked, said):
    counts = {"domains": ["toys"], "metrics": {"epoch": 4} | ranked}
    assert _summary(Manifest("pretrain", {}, {}, "1", counts=counts)) == f"on toys; {said} after 5 epochs"


@pytest.mark.parametrize(
    ("kind", "terminal", "expected"),
    [("auto", True, Terminal), ("auto", False, JsonLines), ("text", False, Terminal), ("json", True, JsonLines)],
)
def test_a_terminal_gets_tables_and_a_file_gets_json(kind, terminal, expected):
    console = Console(file=io.StringIO(), force_terminal=terminal)
    assert isinstance(open_journal(kind, console, "r", []), expected)
