"""`qbert-ray ids`: quality of a run's semantic IDs, siblings of an item, and differences between two runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from qbert_ray.cli.terminal import open_console, shown

if TYPE_CHECKING:  # they import polars and scipy, which other commands do not need
    from qbert_ray.semantic_ids.id_report import Attribute, DomainQuality, Example
    from qbert_ray.semantic_ids.lookup import Move

app = typer.Typer(name="ids", help="Look at the semantic IDs of a finished run.", no_args_is_help=True)
console = open_console()

Run = Annotated[str, typer.Argument(metavar="RUN_DIR", help="A run directory, or RUN_DIR@VERSION for an earlier version of its IDs.")]


@app.command()
def report(run: Run) -> None:
    """Coverage, collisions, codebook usage, recall of neighbours, and how well prefixes predict attributes.

    Example: qbert-ray ids report runs/movielens
    """
    from qbert_ray.semantic_ids import id_report
    from qbert_ray.semantic_ids import lookup as id_lookup

    content = id_report.report(run)
    for domain, figures in content["domains"].items():
        _print_domain(domain, figures, content["codebook_size"])
    directory, parts = id_lookup.open_ids(run)
    if sorted(parts) == directory.parts(id_lookup.IDS):
        console.print(f"\nreport           {shown(directory.path(id_report.REPORT))}", soft_wrap=True)


@app.command()
def show(
    run: Run,
    item: Annotated[str, typer.Argument(help="An item_id, or a whole title.")],
    domain: Annotated[str | None, typer.Option(help="Where several domains have such an item.")] = None,
) -> None:
    """One item: its semantic ID, the items that share a prefix with it, and why it moved.

    Example: qbert-ray ids show runs/movielens 50
    """
    from qbert_ray.semantic_ids import lookup as id_lookup

    found = id_lookup.show(run, item, domain)
    console.print(f"[bold]{shown(found['title'])}[/bold]  (item {shown(found['item_id'])} of {shown(found['domain'])})")
    console.print(shown(found["semantic_id"]))
    console.print(_moved(found["moved"]), soft_wrap=True)
    alone = [level["prefix"] for level in found["siblings"] if not level["items"]]
    if alone:
        console.print(f"\n{shown(alone[-1])}  no other item")
    for level in found["siblings"][len(alone) :]:
        console.print(f"\n{shown(level['prefix'])}  {level['items']:,} other{'s' * (level['items'] != 1)}")
        for other in level["nearest"]:
            title = other["title"] if len(other["title"]) <= 50 else other["title"][:49] + "…"
            console.print(f"  {shown(other['semantic_id']):<28}  {shown(title)}  [dim]{shown(other['item_id'])}[/dim]", soft_wrap=True)
        if level["further"] > len(level["nearest"]):
            console.print(f"  [dim]and {level['further'] - len(level['nearest']):,} farther ones[/dim]")


@app.command()
def diff(
    first: Annotated[str, typer.Argument(metavar="A", help="A run directory, or RUN_DIR@VERSION.")],
    second: Annotated[str, typer.Argument(metavar="B", help="What it is compared with, in the same form.")],
) -> None:
    """What B changes in A: added and removed items, and changed IDs, by the first level that differs.

    Example: qbert-ray ids diff runs/movielens@0 runs/movielens
    """
    from qbert_ray.semantic_ids import lookup as id_lookup

    for domain, found in id_lookup.diff(first, second).items():
        total = found["same"] + found["changed"]
        console.print(
            f"[bold]{shown(domain)}[/bold]: {found['only_first']:,} items only in A, {found['only_second']:,} only in B, {total:,} in both"
        )
        console.print(f"  same ID     {found['same']:>12,}")
        console.print(f"  another ID  {found['changed']:>12,}")
        for level, count in enumerate(found["changed_at"]):
            console.print(f"    from level {_letter(level)} on {count:>6,}")
        for example in found["examples"]:
            console.print(f"  {shown(example['item_id'])}: {shown(example['first'])} → {shown(example['second'])}", soft_wrap=True)


def _moved(moved: Move | None) -> str:
    if moved is None:
        return "not moved: these are its nearest codes"
    keeper = moved["kept_by"]
    kept = f"{shown(keeper['title'])} ({shown(keeper['item_id'])}) has and keeps" if keeper else "an item that is gone kept"
    full = f"; every ID under {moved['full']} was taken" if moved["full"] else ""
    return f"moved from {shown(moved['nearest'])}, which {kept}{shown(full)}"


def _print_domain(domain: str, figures: DomainQuality, size: int) -> None:
    console.print(
        f"\n[bold]{shown(domain)}[/bold]: {figures['with_id']:,} of {figures['items']:,} items have an ID ({figures['coverage']:.1%}); "
        f"collisions {figures['raw_collision_rate']:.2%} before, {figures['collision_rate']:.2%} after; {figures['moved']:,} moved",
    )
    console.print(_levels(figures, size))
    near = figures["neighbours"]
    if near:
        console.print(
            f"Of the {near['k']} nearest items by embedding, {near['codewords']:.1%} are among the {near['k']} nearest by ID (distance of summed "
            f"codewords), {near['prefix']:.1%} by prefix first, {near['random']:.1%} at random ({near['sampled']:,} items asked).\n"
        )
    if figures["attributes"]:
        console.print(_attributes(figures["attributes"]))
    if figures["following"]:
        console.print(_following(figures["following"]))
    console.print(_examples(figures["examples"]))


def _levels(figures: DomainQuality, size: int) -> Table:
    table = _table("code", f"in use of {size}", "perplexity", "entropy, bits", "Gini", "moved here")
    for number, (level, moved) in enumerate(zip(figures["levels"], figures["moved_at"], strict=True)):
        cells = f"{level['usage']:.1%}", f"{level['perplexity']:.1f}", f"{level['entropy']:.2f}", f"{level['gini']:.2f}", f"{moved:,}"
        table.add_row(f"<{_letter(number)}_…>", *cells)
    return table


def _attributes(attributes: dict[str, Attribute]) -> Table:
    table = _table("attribute", "shared prefix", "items", "purity", "shuffled", "NMI", "shuffled")
    for name, content in attributes.items():
        for length, row in enumerate(content["lengths"], 1):
            if row["items"]:
                prefix = "".join(f"<{_letter(level)}>" for level in range(length))
                figures = [f"{row[key]:.3f}" for key in ("purity", "purity_shuffled", "nmi", "nmi_shuffled")]
                table.add_row(shown(name) if length == 1 else "", prefix, f"{row['items']:,}", *figures)
        table.add_section()
    return table


def _following(lengths: list[dict[str, float]]) -> Table:
    table = _table("shared prefix", "of items that follow each other", "by chance", "ratio")
    for length, row in enumerate(lengths, 1):
        prefix = "".join(f"<{_letter(level)}>" for level in range(length))
        table.add_row(prefix, f"{row['same']:.2%}", f"{row['chance']:.2%}", f"{row['same'] / row['chance']:.1f}" if row["chance"] else "")
    return table


def _examples(examples: list[Example]) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1))
    table.add_column("prefix", no_wrap=True)
    table.add_column("items", justify="right")
    table.add_column("typical", max_width=32)
    table.add_column("such as", max_width=44)
    for example in examples:
        typical = [f"{value['value']} {value['share']:.0%} (of all: {_percent(value['overall'])})" for value in example["typical"].values()]
        table.add_row(shown(example["prefix"]), f"{example['items']:,}", shown("\n".join(typical)), shown("\n".join(example["titles"])))
        table.add_section()
    return table


def _table(first: str, *others: str) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1))
    table.add_column(first, no_wrap=True)
    for name in others:
        table.add_column(name, justify="left" if "prefix" in name else "right")
    return table


def _percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.01 else "< 1%"


def _letter(level: int) -> str:
    return chr(ord("a") + level)
