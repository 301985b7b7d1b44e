"""Parameters and multiply-adds of the sequencer, module by module."""

from __future__ import annotations

from rich.table import Table

from qbert_ray.config.schema import Config


def complexity_table(config: Config, num_items: int) -> Table:
    """Parameters and multiply-adds (millions) for a catalog of `num_items`, as Table 6 counts and as they are."""
    s, q = config.sequencer, config.quantizer
    positions = s.max_items * (q.num_levels if s.tokens == "flat" else 1)
    counts = complexity(num_items, s.width, s.num_layers, s.ffn_width, positions, q.num_levels, q.codebook_size)
    if q.extra_quantizers and s.tokens == "item" and not config.data.semantic_ids:
        counts["real"]["parameters"]["extra codes"] = len(q.extra_quantizers) * q.num_levels * q.codebook_size * (s.width + 1)
    if s.content == "fused" and not config.data.semantic_ids:
        counts["real"]["parameters"]["content projection"] = config.fusion.width * s.width
        counts["real"]["multiply_adds"]["content projection"] = positions * config.fusion.width * s.width
    if s.recall and s.tokens == "item":
        counts["real"]["parameters"]["recall"] = 2
        counts["real"]["multiply_adds"]["recall, one position"] = positions * s.width
    if s.embeds_items:
        counts["real"]["parameters"]["item embedding"] = num_items * s.width
    table = Table(title=f"sequencer with {num_items:,} items, {positions} positions; millions", title_justify="left")
    table.add_column("module", no_wrap=True)
    for header in ("paper\nparameters", "paper\nmult-adds", "real\nparameters", "real\nmult-adds"):
        table.add_column(header, justify="right", no_wrap=True)
    columns = [counts[way][what] for way in ("paper", "real") for what in ("parameters", "multiply_adds")]
    for module in dict.fromkeys(name for column in columns for name in column):
        table.add_row(module, *(f"{column[module] / 1e6:.2f}" if module in column else "" for column in columns))
    table.add_section()
    table.add_row("total", *(f"{sum(column.values()) / 1e6:.2f}" for column in columns), style="bold")
    table.caption = "paper's way: an item-sized tied head, each weight once per position; real: codebooks, attention, head on one position"
    return table


def complexity(num_items: int, width: int, num_layers: int, ffn_width: int, max_items: int, num_levels: int, codebook_size: int) -> dict:
    """Parameters and multiply-adds by module, twice: as Table 6 of the paper evidently counts, and as they are.

    The paper's count: an item-sized tied head, and each weight once per position. The real one: K codebooks in place of the
    item embeddings, attention included, the head on one masked position.
    """
    attention, ffn = 4 * (width * width + width), 2 * width * ffn_width + ffn_width + width
    norms, positions = 4 * width, max_items * width
    encoder = num_layers * (attention + ffn + norms)
    paper = {"encoder": encoder, "position embedding": positions, "item embedding, tied": num_items * width}
    paper_macs = {name: max_items * count for name, count in paper.items() if name != "position embedding"}
    real = {
        "encoder": encoder + 2 * width,
        "position embedding": positions,
        "code embedding, tied": num_levels * codebook_size * (width + 1),
        "mask embedding": width,
    }
    real_macs = {
        "encoder": num_layers * max_items * (4 * width * width + 2 * width * ffn_width),
        "attention scores": num_layers * 2 * max_items * max_items * width,
        "head, one position": num_items * width,
    }
    return {
        "paper": {"parameters": paper, "multiply_adds": paper_macs},
        "real": {"parameters": real, "multiply_adds": real_macs},
    }
