"""Titles, IDs and errors of untrusted data never reach a terminal as characters that it obeys."""

import io
import json
import sys
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from qbert_ray.cli import id_commands, main, terminal
from qbert_ray.cli.console import metrics_table, trials_table
from qbert_ray.cli.journal import JsonLines, Terminal
from qbert_ray.cli.terminal import json_safe, printable, shown
from qbert_ray.semantic_ids import lookup
from qbert_ray.storage.directory import Manifest

EVIL = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202egnp.exe\r[red]x[/red]\x7f"


def obeyed(text: str) -> list[str]:
    return [
        sign
        for sign in text
        if unicodedata.category(sign) in ("Cc", "Cs") and sign not in "\n\t" or sign in "\u202a\u202d\u202e\u2066\u2028"
    ]


@given(st.text() | st.text(st.characters(categories=["Cc", "Cf", "Cs"])))
def test_nothing_that_a_terminal_obeys_is_left(text):
    assert not obeyed(printable(text)) and not obeyed(shown(text)) and not obeyed(json_safe(json.dumps(text, ensure_ascii=False)))
    if not any("\ud800" <= sign <= "\udfff" for sign in text):
        assert json.loads(json_safe(json.dumps(text, ensure_ascii=False))) == text


@pytest.mark.parametrize("text", ["Ein Buch", "本", "a\tb\nc", "👩‍👩‍👧", "é"])
def test_other_text_stays(text):
    assert printable(text) == text


@pytest.fixture
def console(monkeypatch):
    console = Console(file=io.StringIO(), force_terminal=True, color_system=None, width=200)
    monkeypatch.setattr(id_commands, "console", console)
    return console


def test_ids_show_prints_titles_as_text(console, monkeypatch):
    other = {"semantic_id": EVIL, "title": EVIL, "item_id": EVIL}
    moved = {"nearest": EVIL, "kept_by": {"title": EVIL, "item_id": EVIL}, "full": EVIL}
    level = {"prefix": EVIL, "items": 3, "nearest": [other], "further": 3}
    found = {"title": EVIL, "item_id": EVIL, "domain": EVIL, "semantic_id": EVIL, "moved": moved, "siblings": [level]}
    monkeypatch.setattr(lookup, "show", lambda *_: found)
    id_commands.show("run", "item")
    assert not obeyed(console.file.getvalue()) and "owned" in console.file.getvalue()


def test_ids_diff_prints_ids_as_text(console, monkeypatch):
    found = {"same": 1, "changed": 1, "only_first": 0, "only_second": 0, "changed_at": [1]}
    monkeypatch.setattr(lookup, "diff", lambda *_: {EVIL: found | {"examples": [{"item_id": EVIL, "first": EVIL, "second": EVIL}]}})
    id_commands.diff("a", "b")
    assert not obeyed(console.file.getvalue()) and "owned" in console.file.getvalue()


def test_the_journal_says_errors_and_warnings_as_text(console, capsys):
    terminal = Terminal(console)
    terminal.begin(EVIL)
    terminal.warn(EVIL)
    terminal.files({"report": EVIL})
    terminal.done("score", None, None, EVIL)
    terminal.done("other", Manifest(EVIL, {}, {}, "0", counts={EVIL: 1}), 1.0)
    with terminal.stage("ingest") as progress:
        progress.start(2)
        progress.note(EVIL)
        progress.bars.refresh()
    assert "owned" in console.file.getvalue() and "\x1b]" not in console.file.getvalue() and "\x9b" not in console.file.getvalue()
    lines = JsonLines(EVIL, [])
    lines.warn(EVIL)
    with pytest.raises(ValueError, match="owned"), lines.stage("ingest"):
        raise ValueError(EVIL)
    out = capsys.readouterr().out
    assert not obeyed(out) and json.loads(out.splitlines()[0])["text"] == EVIL


def test_an_error_that_quotes_a_file_is_printed_as_text(capsys, tmp_path):
    (tmp_path / "c.yaml").write_text('"\\e]0;owned\\a": 1')
    with pytest.raises(SystemExit):
        main.main(["validate", "-c", str(tmp_path / "c.yaml")])
    err = capsys.readouterr().err
    assert "owned" in err and not obeyed(err)


def test_a_piped_table_is_cut_nowhere_and_text_wraps(monkeypatch, capsys):
    monkeypatch.delenv("COLUMNS", raising=False)
    values = {f"sequencer.a_setting_with_a_long_name_{number}": "a long value" for number in range(12)}
    console = terminal.open_console()
    console.print(trials_table([("0a1b2c3d", values, 7)], ["fusion"], [90.0]))
    console.print("word " * 60)
    table, text = capsys.readouterr().out.split("0a1b2c3d")
    assert "…" not in table and all(name.partition(".")[2] in table for name in values) and "minutes" in table
    assert text.count("a long value") == 12 and max(map(len, text.splitlines()[-3:])) <= terminal.WIDTH


def test_ids_are_no_emoji_and_an_encoding_without_a_sign_gets_its_number(monkeypatch):
    for name, kept in (("stdout", False), ("stderr", True)):
        stream = io.TextIOWrapper(io.BytesIO(), "latin-1")
        monkeypatch.setattr(sys, name, stream)
        terminal.open_console(stderr=kept).print("[green]✓[/green] sku:100:5 ä")
        stream.flush()
        assert stream.buffer.getvalue() == b"\\u2713 sku:100:5 \xe4\n"


def test_streams_that_the_caller_closed_stop_nothing(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    for stderr in (False, True):
        assert terminal.open_console(stderr=stderr).print("a word") is None


def test_the_figures_of_a_run_fit_a_terminal_of_eighty_columns():
    values = {
        f"{name}@{k}": {"value": 0.1, "low": 0.0, "high": 0.2} for k in (1, 5, 10) for name in ("hr", "ndcg") if (name, k) != ("ndcg", 1)
    }
    table = metrics_table("shop", {"users": 1, "protocols": {"unseen": {"item_item_text": values, "popularity": values}}})
    console = Console(width=80, file=io.StringIO())
    console.print(table)
    assert "…" not in console.file.getvalue() and "item-item + text" in console.file.getvalue()


def test_a_domain_without_test_items_is_said_in_words(console):
    Terminal(console).metrics("shop", {"users": 0, "protocols": {"all": {}, "unseen": {}}})
    counts = {"shop": {"users": 200, "ranked": 0, "without_target": 200}}
    Terminal(console).done("evaluate", Manifest("evaluate", {}, {}, "0", counts=counts), 1.0)
    said = console.file.getvalue()
    assert "shop: no user has a test item, so nothing could be ranked" in said and "shop: 0 of 200 users" in said


def test_a_file_or_a_pipe_is_wide_enough_for_every_table_and_a_terminal_has_its_own_width(monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    assert terminal.open_console().width == terminal.open_console(stderr=True).width == terminal.WIDTH
    monkeypatch.setenv("COLUMNS", "72")
    assert terminal.open_console().width == 72
