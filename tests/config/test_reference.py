import json
import re

import jsonschema
import pytest
import yaml

from qbert_ray.cli.main import main
from qbert_ray.config.loading import ConfigError, flatten, load_config
from qbert_ray.config.reference import fields, json_schema, markdown, rows, sections
from qbert_ray.config.schema import Inputs
from tests import ROOT

KNOWN = flatten(load_config().model_dump(mode="json"))
WHOLE = ("masks", "mask_ratio")  # mappings that are one field


def test_every_field_is_there_with_its_default_and_a_description():
    found = {field.path.replace("<name>", "items"): field for field in fields()}
    wanted = {".".join(path.split(".")[:2]) if path.split(".")[1] in WHOLE else path for path in KNOWN}
    inputs = "data.domains.items.inputs"  # a mapping of sections, which is empty
    assert set(found) == wanted - {inputs} | {f"{inputs}.items.{name}" for name in Inputs.model_fields}
    assert [path for path, field in found.items() if not field.description] == []
    for path in wanted & set(KNOWN) - {inputs}:
        assert yaml.safe_load(found[path].default) == KNOWN[path], path


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("quantizer.num_levels", ("integer ≥ 1", "4", "K, codes of an ID", "§4.1: 4")),
        ("quantizer.batch_size", ("integer ≥ 1", "1024", "global: over all workers", "§4.1: 1024")),  # half of it said by Training
        ("features.modalities", ("list of string or {string: {string: any} or false or null} or null", "null", "what stage 1 fuses, where there is input for it: names of kinds, or a mapping of names of your own such as {text: {}, gallery: {kind: image, grid: 1}}, where false leaves one out; null: all that the domains have input for, and structure if one has none", "text and image (§3.3)")),  # noqa: E501
        ("finetune.patience", ("integer ≥ 1 or null", "5", "epochs without a better validation metric before stopping; null: run all epochs", "")),
        ("fusion.consistency_weight", ("number ≥ 0", "0.01", "lambda of Eq. 5", "Eq. 5")),
        ("features.text.model", ("string", "minilm", "'minilm' or 'smollm2' (offline packages), or anything AutoModel.from_pretrained takes", "LLaMA")),
        ("data.domains.shop.role", ("target or source", "target", "source: only pre-trained on; target: also fine-tuned", "§4.1")),
    ],
)  # fmt: skip
def test_a_field_shows_type_default_meaning_and_paper(path, expected):
    (field,) = fields(path)
    assert tuple(field[1:]) == expected


def test_a_section_is_its_fields_alone():
    assert {field.path.split(".")[0] for field in fields("fusion")} == {"fusion"}
    assert [field for section in sections() for field in fields(section)] == fields()


@pytest.mark.parametrize(
    ("prefix", "said"),
    [("sequencr", "did you mean sequencer"), ("finetune.epoch", "did you mean finetune.epochs"), ("zz", "the sections are run, data")],
)
def test_an_unknown_section_suggests_its_neighbour(prefix, said):
    with pytest.raises(ConfigError, match=said):
        fields(prefix)


def test_the_reference_has_one_row_per_field():
    lines = [line for line in markdown().splitlines() if line.startswith("| `")]
    assert len(lines) == len(fields())
    assert all(line.replace("\\|", "").count("|") == 6 for line in lines)


def test_rows_are_those_of_the_named_fields():
    lines = rows(["quantizer.num_levels", "run"])
    assert [line.split("`")[1] for line in lines[2:]] == ["quantizer.num_levels", *(field.path for field in fields("run"))]
    with pytest.raises(ConfigError, match="did you mean"):
        rows(["quantizer.num_level"])


@pytest.mark.parametrize(
    "path", sorted(path for path in (ROOT / "configs").rglob("*.yaml") if path.parent.name != "tables"), ids=lambda path: path.name
)
def test_the_schema_takes_every_config_file(path):
    jsonschema.validate(as_editors_read(path), json_schema())


def as_editors_read(path):
    """Editors follow YAML 1.2, where 1e-4 is a number; PyYAML follows 1.1, where it needs a point."""
    return yaml.safe_load(re.sub(r"\b(\d+)e-(\d+)\b", r"\1.0e-\2", path.read_text()))


@pytest.mark.parametrize(
    "wrong", [{"finetune": {"epoch": 1}}, {"finetune": {"epochs": 0}}, {"sequencer": {"tokens": "words"}}, {"tuning": {}}]
)
def test_the_schema_refuses_what_the_config_refuses(wrong):
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(wrong, json_schema())


def said(capsys, *arguments):
    with pytest.raises(SystemExit) as end:
        main(["config", *arguments])
    output = capsys.readouterr()
    return end.value.code, output.out, output.err


def test_the_printed_config_gives_the_same_config(capsys, tmp_path):
    status, text, _ = said(capsys, "-c", str(ROOT / "configs" / "demo.yaml"), "finetune.epochs=7")
    (tmp_path / "printed.yaml").write_text(text)
    assert status == 0
    assert load_config([tmp_path / "printed.yaml"]) == load_config([ROOT / "configs" / "demo.yaml"], ["finetune.epochs=7"])


def test_the_command_prints_the_reference_and_the_schema(capsys):
    _, text, _ = said(capsys, "--describe", "score", "data.root")
    assert "score.top_k  integer ≥ 1, default 10" in text and "data.root" in text and "fusion" not in text
    assert json.loads(said(capsys, "--schema")[1]) == json_schema()
    assert said(capsys, "--schema", "--describe")[0] == said(capsys, "--describe", "-c", "x.yaml")[0] == 2
