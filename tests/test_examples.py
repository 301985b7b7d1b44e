"""The scripts in examples/ run, and say what they should."""

import re
import runpy

import torch

from tests import ROOT


def test_the_three_stages_in_plain_calls(capsys):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several threads make tensors this small slower
    try:
        names = runpy.run_path(str(ROOT / "examples" / "quickstart.py"))
    finally:
        torch.set_num_threads(threads)
    said = capsys.readouterr().out
    assert len(set(names["tokens"])) == names["ITEMS"]
    assert [f"stage {number}:" in said for number in (1, 2, 3)] == [True] * 3
    assert re.search(r"^user 0 likes (\w+): (\1|\w+) <a_\d+>", said, re.MULTILINE)
    seen = zip(names["best"], names["histories"], strict=True)
    assert not any(set(best) & set(history) for best, history in seen)
    assert int(re.search(r"(\d+)% of the recommended", said)[1]) > 60  # 25 by chance


def test_the_script_fits_on_a_page():
    lines = [line for line in (ROOT / "examples" / "quickstart.py").read_text().splitlines() if line and not line.startswith("#")]
    assert len(lines) < 70
