"""`qbert-ray describe` counts the parameters of the model that is built, and multiply-adds of the head as it is applied."""

import pytest

from qbert_ray.config.loading import load_config
from qbert_ray.sequence.complexity import as_it_is, as_printed, complexity_table
from qbert_ray.sequence.decoder import Generator
from qbert_ray.sequence.model import Sequencer
from tests import ROOT

ITEMS = 300
SMALL = ["quantizer.codebook_size=16", "sequencer.content=fused", "fusion.width=24", "sequencer.width=32", "sequencer.ffn_width=48"]


def built(config):
    """The model that fine-tuning builds under a config."""
    s, q = config.sequencer, config.quantizer
    levels = {"item": q.num_levels * (1 + len(q.extra_quantizers)), "flat": q.num_levels, "word": 0}[s.tokens]
    return Sequencer(
        levels,
        q.codebook_size,
        s.width,
        s.num_layers,
        s.num_heads,
        s.ffn_width,
        max_items=s.max_items,
        tokens=s.tokens,
        loss=s.loss,
        item_embeddings={"shop": ITEMS} if s.embeds_items else {},
        content_width=config.fusion.width if s.content == "fused" and s.tokens != "flat" else 0,
        recall=s.recall and s.tokens != "flat",
        causal=config.finetune.objective == "causal",
    )


@pytest.mark.parametrize(
    "changes",
    [
        ["finetune.objective=masked"],
        ["finetune.objective=causal"],
        ["finetune.objective=masked", "sequencer.tokens=flat", "sequencer.loss=tokens"],
        ["finetune.objective=masked", "sequencer.tokens=word"],
        ["finetune.objective=masked", "sequencer.item_embedding=false", "sequencer.recall=false"],
        ["finetune.objective=causal", "quantizer.extra_quantizers=[]", "sequencer.content=none", "sequencer.code_dropout=0"],
    ],
    ids=lambda changes: " ".join(change.partition(".")[2] for change in changes),
)
def test_parameters_are_those_of_the_model(changes):
    config = load_config([], [*SMALL, *changes])
    assert sum(as_it_is(config, ITEMS)["parameters"].values()) == sum(each.numel() for each in built(config).parameters())


def test_the_encoder_decoder_is_counted_as_it_is_built():
    config = load_config([], [*SMALL, "sequencer.kind=generative"])
    s, q = config.sequencer, config.quantizer
    sizes = (s.width, s.num_layers, s.num_heads, s.head_width or s.width // s.num_heads, s.ffn_width, s.dropout, s.max_items)
    built = Generator(q.num_levels, q.codebook_size, *sizes)
    counted = as_it_is(config, ITEMS)
    assert sum(counted["parameters"].values()) == sum(each.numel() for each in built.parameters()) and not counted["multiply_adds"]
    assert "recall" not in counted["parameters"] and complexity_table(config, ITEMS).row_count


@pytest.mark.parametrize(("items", "parameters", "multiply_adds"), [(6250, 3.71, 185.36), (9416, 4.51, 225.68), (13839, 5.64, 282.14)])
def test_what_is_printed_is_table_6_within_one_percent(items, parameters, multiply_adds):
    printed = as_printed(load_config([ROOT / "configs/paper.yaml"]), items)
    assert sum(printed["parameters"].values()) / 1e6 == pytest.approx(parameters, rel=0.01)
    assert sum(printed["multiply_adds"].values()) / 1e6 == pytest.approx(multiply_adds, rel=0.01)


def test_a_flat_head_has_a_position_per_level_and_the_codewords_for_a_vocabulary():
    config = load_config([ROOT / "configs/variants/readings/flat.yaml"])
    levels, width, size = config.quantizer.num_levels, config.sequencer.width, config.quantizer.codebook_size
    printed, real = as_printed(config, 6250), as_it_is(config, 6250)
    assert printed["parameters"]["code embedding, tied"] == levels * size * width
    assert printed["multiply_adds"]["code embedding, tied"] == config.sequencer.max_items * levels * levels * size * width
    assert real["multiply_adds"][f"head, {levels} positions"] == levels * 6250 * width
    assert as_printed(config, 12500) == printed  # no part of it grows with the catalog


def test_the_table_has_a_row_for_each_module():
    table = complexity_table(load_config([ROOT / "configs/paper.yaml"]), 6250)
    modules = list(table.columns[0].cells)
    assert modules[-1] == "total" and {"encoder", "item embedding", "item embedding, tied", "head, one position"} <= set(modules)
