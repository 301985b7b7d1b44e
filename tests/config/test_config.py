import pytest
from pydantic import ValidationError

from qbert_ray.config.loading import ConfigError, flatten, load_config, merge
from qbert_ray.config.schema import Config
from qbert_ray.sweeps.tables import load_table
from tests import ROOT

CONFIGS = ROOT / "configs"


@pytest.mark.parametrize(
    "path",
    sorted(path for path in CONFIGS.rglob("*.yaml") if path.parent.name != "tables"),
    ids=lambda path: str(path.relative_to(CONFIGS)),
)
def test_every_config_file_loads(path):
    assert isinstance(load_config([path]), Config)


def test_the_paper_over_a_data_set_takes_back_what_the_recipe_added():
    config = load_config([CONFIGS / "scientific.yaml", CONFIGS / "paper.yaml"])
    sequencer, finetune = config.sequencer, config.finetune
    assert not (sequencer.item_embedding or sequencer.recall or sequencer.content != "none" or config.quantizer.extra_quantizers)
    assert (finetune.objective, finetune.last_item_share, finetune.prefix_share) == ("masked", 0, 0)


def test_files_merge_left_to_right_and_overrides_win(tmp_path):
    (tmp_path / "a.yaml").write_text("finetune: {epochs: 1, batch_size: 8}")
    (tmp_path / "b.yaml").write_text("finetune: {epochs: 2}")
    config = load_config([tmp_path / "a.yaml", tmp_path / "b.yaml"], ["finetune.patience=null"])
    assert (config.finetune.epochs, config.finetune.batch_size, config.finetune.patience) == (2, 8, None)


@pytest.mark.parametrize("section", ["sequencer", "fusion"])
def test_heads_share_the_width(section):
    with pytest.raises(ConfigError, match=f"{section}.width=32 is no multiple of {section}.num_heads=3"):
        load_config([], [f"{section}.width=32", f"{section}.num_heads=3"])
    assert load_config([], ["sequencer.kind=generative", "sequencer.width=32", "sequencer.num_heads=3", "sequencer.head_width=8"])


def test_scientific_notation_is_a_number():
    assert load_config([], ["finetune.learning_rate=1e-4"]).finetune.learning_rate == 1e-4


def test_masks_are_replaced_whole():
    assert dict(load_config([], ["pretrain.masks={random: 1}"]).pretrain.masks) == {"random": 1.0}


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("finetune.epoch=3", "did you mean finetune.epochs?"),
        ("data.domains.shop.itms=x", "did you mean data.domains.shop.items?"),
        ("fnetune.epochs=3", "did you mean finetune?"),
        ("finetune.epochs=0", "finetune.epochs: Input should be greater than or equal to 1 (given: 0)"),
        ("finetune.epochs=many", "finetune.epochs"),
        ("finetune.epochs", "write section.field=value"),
        ("data.domains.items.role=source", "nothing to fine-tune"),
        ("features.text.prompt=Title", "must contain {text}"),
        ("features.modalities=[text, text]", "at most once"),
        ("pretrain.masks={}", "masks must name at least one strategy"),
        ("compute.finetune.num_workers=[3, 2]", "[3, 2] must be [fewest, most]"),
        ("data.domains.a/b.items=x", "'a/b' cannot name a domain"),
        ("run.seed=-1", "run.seed: Input should be greater than or equal to 0"),
        ("evaluate.cutoffs=[]", "evaluate.cutoffs: List should have at least 1 item"),
        ("finetune.learning_rate=.inf", "finetune.learning_rate: Input should be a finite number"),
        ("fusion.patience=3", "fusion.patience: Input should be None"),
        ("quantizer.averaging=0.9", "quantizer.averaging must be 0"),
        ("features.missing.tetx=0.9", "features.missing.tetx: the run has no such modality; it has text"),
        ("features={modalities: [image], noise: {text: 0.5}}", "features.noise.text: the run has no such modality; it has image"),
    ],
)
def test_errors_name_the_path_and_what_is_valid(override, said):
    with pytest.raises(ConfigError) as error:
        load_config([], [override])
    assert said in str(error.value)


def test_a_config_without_domains_is_refused():
    with pytest.raises(ValidationError, match="data.domains is empty: name at least one domain"):
        Config.model_validate({"data": {"domains": {}}})


def test_missing_and_broken_files_are_distinguished(tmp_path):
    with pytest.raises(ConfigError, match="no config file at"):
        load_config([tmp_path / "none.yaml"])
    (tmp_path / "broken.yaml").write_text("a: [1")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config([tmp_path / "broken.yaml"])
    (tmp_path / "list.yaml").write_text("- a")
    with pytest.raises(ConfigError, match="must hold a mapping"):
        load_config([tmp_path / "list.yaml"])


def test_a_config_cannot_change():
    with pytest.raises(ValidationError):
        Config().run.seed = 1


def test_flatten_names_leaves_by_dotted_path():
    assert flatten({"a": {"b": 1, "c": {}}}) == {"a.b": 1, "a.c": {}}


def test_merge_leaves_its_arguments_alone():
    base = {"a": {"b": 1}}
    assert merge(base, {"a": {"c": 2}}) == {"a": {"b": 1, "c": 2}}
    assert base == {"a": {"b": 1}}


@pytest.mark.parametrize("name", ["2024-01-01", "2024", "1_000", "0x1f", "yes", "1.50", "null_run", "12:30", "on", "try #2", "#2"])
def test_a_folder_may_be_called_like_a_date_or_a_number(name, tmp_path):
    assert load_config([], [f"run.dir={name}"]).run.dir == name
    (tmp_path / "x.yaml").write_text("run: {dir: 2024-01-01}")
    assert load_config([tmp_path / "x.yaml"]).run.dir == "2024-01-01"


def test_a_number_for_a_text_in_a_file_asks_for_quotation_marks(tmp_path):
    (tmp_path / "x.yaml").write_text("run: {dir: 2024}")
    with pytest.raises(ConfigError, match="run.dir: this is a text, and YAML reads 2024 there; write it in quotes"):
        load_config([tmp_path / "x.yaml"])


def test_flat_tokens_are_refused_for_a_causal_model():
    with pytest.raises(ConfigError, match=r"sequencer.tokens=flat needs finetune.objective=masked"):
        load_config([], ["sequencer.tokens=flat"])
    assert load_config([], ["sequencer.tokens=flat", "finetune.objective=masked"]).sequencer.tokens == "flat"


def test_variants_of_the_masks_train_on_masks():
    sweep = load_config([ROOT / "configs/sweeps/paper.yaml"])
    assert any(path.startswith("finetune.mask_ratio") for path in sweep.sweep.space) and sweep.finetune.objective == "masked"
    variants = load_table(ROOT / "configs/tables/analyses.yaml").variants
    masks = [each["finetune"] for name, each in variants.items() if name.startswith("masked")]
    assert masks and all(each["objective"] == "masked" for each in masks)
