"""YAML of others costs no more than its bounds, and says what is wrong with it."""

import pytest
import yaml

from qbert_ray.config.loading import ConfigError, load_config, read_config
from qbert_ray.config.yaml_files import YamlError, read_yaml
from qbert_ray.ranking.recommender import Recommender

LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))
MERGES = "a0: &a0 {x: 1}\n" + "".join(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}\n" for n in range(1, 12))
BOMBS = {
    LAUGHS: "more than 200,000 values",
    MERGES: "more than 200,000 values",
    "a: &a [*a]": "holds itself",
    "a: &a {b: *a}": "holds itself",
    "[" * 65 + "]" * 65: "nested",
    "[" * 5000: "nested|not valid",
    "x" * (5 << 20): "larger than 4 MiB",
    "x: " + "1" * 5000: "a number of 5,000 digits",
    "x: 1" + ":0" * 60_000: "a number of 120,001 digits",  # to the base of 60
    "x: -0x" + "f" * 6000: "a number of 6,003 digits",
    "x: !!python/object/apply:os.system [id]": "not valid YAML",
    "? {a: 1}\n: b": "not valid YAML",
    "x: \x1b[2J": "not valid YAML",
}


@pytest.mark.parametrize(("text", "reason"), BOMBS.items(), ids=[text[:12] for text in BOMBS])
def test_bombs_end_in_one_clear_error(tmp_path, text, reason):
    with pytest.raises(YamlError, match=reason):
        read_yaml(text)
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match=f"c.yaml.*({reason})"):
        load_config([tmp_path / "c.yaml"])
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ConfigError, match=f"config.yaml.*({reason})"):
        Recommender.load(str(tmp_path))


@pytest.mark.parametrize("text", ["a: &a [1, 2]\nb: *a", "x: 1e-3", "", "a: &a {b: 1}\nc: {<<: *a, d: 2}"])
def test_other_yaml_is_read_as_before(text):
    assert read_yaml(text) == yaml.safe_load(text)


def test_a_file_cannot_extend_itself(tmp_path):
    (tmp_path / "a.yaml").write_text("extends: b.yaml")
    (tmp_path / "b.yaml").write_text("extends: ./a.yaml")
    with pytest.raises(ConfigError, match="a.yaml extends b.yaml extends a.yaml: a file cannot extend itself"):
        load_config([tmp_path / "a.yaml"])
    (tmp_path / "c.yaml").write_text("extends: c.yaml")
    with pytest.raises(ConfigError, match="cannot extend itself"):
        load_config([tmp_path / "c.yaml"])
    (tmp_path / "d.yaml").write_text("extends: [a.yaml]")
    with pytest.raises(ConfigError, match="extends must name one file"):
        load_config([tmp_path / "d.yaml"])


@pytest.mark.parametrize("content", [b"[1]", b"5", b"run: 3", b"1: 2", b"\xff\xfe\x00", b"data: {domains: {a: {items: 3}}}"])
def test_a_config_that_is_none_is_named(content):
    with pytest.raises(ConfigError, match=r"runs/x/config.yaml"):
        read_config(content, "runs/x/config.yaml")


def test_a_value_of_megabytes_is_not_repeated_in_an_error():
    with pytest.raises(ConfigError) as raised:
        load_config([], ["run.seed=" + "x" * 1_000_000])
    assert len(str(raised.value)) < 1000


def test_what_looks_like_a_date_stays_text():
    assert read_yaml("x: 2024-01-01\ny: 2020-13-45") == {"x": "2024-01-01", "y": "2020-13-45"}
