"""Parameters and multiply-adds of the sequencer, module by module."""

from __future__ import annotations

from typing import TypedDict

from rich.table import Table

from qbert_ray.config.schema import Config

Counts = dict[str, int]  # module -> number


class Cost(TypedDict):
    parameters: Counts
    multiply_adds: Counts


def complexity_table(config: Config, num_items: int) -> Table:
    """Parameters and multiply-adds (millions) for a catalog of `num_items`, as Table 6 counts and as they are."""
    s = config.sequencer
    positions = s.max_items * _places(config)
    counts = {"paper": as_printed(config, num_items), "real": as_it_is(config, num_items)}
    table = Table(title=f"sequencer with {num_items:,} items, {positions} positions; millions", title_justify="left")
    table.add_column("module", no_wrap=True)
    for header in ("paper\nparameters", "paper\nmult-adds", "real\nparameters", "real\nmult-adds"):
        table.add_column(header, justify="right", no_wrap=True)
    columns: list[Counts] = [counts[way][what] for way in ("paper", "real") for what in ("parameters", "multiply_adds")]
    for module in dict.fromkeys(name for column in columns for name in column):
        table.add_row(module, *(f"{column[module] / 1e6:.2f}" if module in column else "" for column in columns))
    table.add_section()
    table.add_row("total", *(f"{sum(column.values()) / 1e6:.2f}" for column in columns), style="bold")
    vocabulary = "a tied head of all codewords" if s.tokens == "flat" else "an item-sized tied head"
    table.caption = f"paper's way: {vocabulary}, each weight once per position; real: what is trained, attention, head on one item" + (
        "; without the projection of the items' vectors, whose width the encoders decide"
        * (s.content == "modalities" and s.tokens != "flat")
    )
    return table


def as_printed(config: Config, num_items: int) -> Cost:
    """Parameters and multiply-adds as Table 6 of the paper evidently counts: a tied head over the vocabulary, each weight once per position.

    The vocabulary is the catalog, as its figures say; with `tokens: flat` it is the K * M codewords.
    """
    s, q = config.sequencer, config.quantizer
    positions = s.max_items * _places(config)
    head = "code embedding, tied" if s.tokens == "flat" else "item embedding, tied"
    words = q.num_levels * q.codebook_size if s.tokens == "flat" else num_items
    paper = {"encoder": _encoder(config), "position embedding": positions * s.width, head: words * s.width}
    return {
        "parameters": paper,
        "multiply_adds": {name: positions * count for name, count in paper.items() if name != "position embedding"},
    }


def as_it_is(config: Config, num_items: int) -> Cost:
    """Parameters and multiply-adds of the model that is built: codes in place of an item table, attention included, the head on one item."""
    s, q = config.sequencer, config.quantizer
    if s.kind == "generative":
        return {"parameters": _generator(config), "multiply_adds": {}}
    places, causal = _places(config), config.finetune.objective == "causal"
    positions = s.max_items * places
    levels = 0 if s.tokens == "word" else q.num_levels  # a word has no codes
    real = {"encoder": _encoder(config) + 2 * s.width, "code embedding, tied": levels * q.codebook_size * (s.width + 1)}
    real |= {"distance biases": s.num_layers * s.num_heads * s.max_items} if causal else {
        "position embedding": positions * s.width,
        "mask embedding": s.width,
    }  # fmt: skip
    layers = s.num_layers * positions * (4 * s.width * s.width + 2 * s.width * s.ffn_width)
    macs = {"encoder": layers, "attention scores": s.num_layers * 2 * positions * positions * s.width}
    macs["head, one position" if places == 1 else f"head, {places} positions"] = places * num_items * s.width
    own_ids = not config.data.semantic_ids
    if q.extra_quantizers and s.tokens == "item" and own_ids:
        extra = [min(q.num_levels, q.codebook_dim) if kind == "opq" else q.num_levels for kind in q.extra_quantizers]
        real["extra codes"] = sum(extra) * q.codebook_size * (s.width + 1)
    if s.content == "fused" and s.tokens != "flat" and own_ids:
        real["content projection"] = config.fusion.width * s.width
        macs["content projection"] = positions * config.fusion.width * s.width
    if s.recall and s.tokens != "flat":
        real["recall"] = 2
        macs["recall, one position"] = positions * s.width
    if s.embeds_items:
        real["item embedding"] = num_items * s.width
    return {"parameters": {name: count for name, count in real.items() if count}, "multiply_adds": macs}


def _generator(config: Config) -> Counts:
    """Parameters of the encoder-decoder, whose multiply-adds depend on the beams."""
    import torch

    from qbert_ray.sequence.decoder import Generator

    s, q = config.sequencer, config.quantizer
    with torch.device("meta"):
        heads = s.head_width or s.width // s.num_heads
        model = Generator(q.num_levels, q.codebook_size, s.width, s.num_layers, s.num_heads, heads, s.ffn_width, s.dropout, s.max_items)
    counts: Counts = {}
    for name, weights in model.named_parameters():
        module = name.partition(".")[0].replace("_", " ")
        counts[module] = counts.get(module, 0) + weights.numel()
    return counts


def _places(config: Config) -> int:
    """Positions of an item in a sequence."""
    return config.quantizer.num_levels if config.sequencer.tokens == "flat" else 1


def _encoder(config: Config) -> int:
    """Parameters of the encoder's layers."""
    s = config.sequencer
    attention, ffn = 4 * (s.width * s.width + s.width), 2 * s.width * s.ffn_width + s.ffn_width + s.width
    return s.num_layers * (attention + ffn + 4 * s.width)
