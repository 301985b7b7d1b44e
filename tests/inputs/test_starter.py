"""`qbert-ray init`: what it makes of files of many kinds."""

import gzip
import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import yaml

from qbert_ray.cli.main import main
from qbert_ray.config.loading import load_config
from qbert_ray.inputs.profile import find_tables
from qbert_ray.inputs.starter import StarterError
from qbert_ray.inputs.starter_page import write_config

USERS, ITEMS = 60, 40
WORDS = np.array(["alpine", "cedar", "delta", "ember", "fjord", "grove", "harbor", "island", "juniper", "kettle"])


def catalog(key="item_id", prefix="i") -> pl.DataFrame:
    rng = np.random.default_rng(0)
    return pl.DataFrame(
        {
            key: [f"{prefix}{number}" for number in range(ITEMS)],
            "title": [" ".join([*rng.choice(WORDS, 2), str(number)]) for number in range(ITEMS)],
            "about": [" ".join(rng.choice(WORDS, 8)) for _ in range(ITEMS)],
            "brand": [f"brand {number % 7}" for number in range(ITEMS)],
            "price": rng.random(ITEMS) * 10,
            "page": [f"https://shop.example/{number}" for number in range(ITEMS)],
            "slug": [f"slug-{number}" for number in range(ITEMS)],
            "note": [None] * ITEMS,
        },
        schema_overrides={"note": pl.String},
    )


def sales(user="user_id", item="item_id", time="timestamp", prefix="i", per_user=20, seed=1) -> pl.DataFrame:
    rng = np.random.default_rng(seed)
    rows = [
        (f"u{who}", f"{prefix}{what}", 1_700_000_000 + 60 * step)
        for who in range(USERS)
        for step, what in enumerate(rng.choice(ITEMS, per_user, False))
    ]
    return pl.DataFrame(rows, [user, item, time], orient="row")


def made(folder: Path, *files: str):
    """The config that is written for files of a folder, or the folder itself, and its text."""
    text = write_config([folder / name for name in files] or [folder], folder / "out" / "shop.yaml")
    return load_config([folder / "out" / "shop.yaml"]), text


def test_the_input_contract_is_recognised_column_by_column(tmp_path):
    catalog().write_parquet(tmp_path / "items.parquet")
    sales().write_parquet(tmp_path / "interactions.parquet")
    config, text = made(tmp_path)
    assert list(config.data.domains) == ["shop"] and config.data.root == str(tmp_path)
    shop = config.data.domains["shop"]
    assert (shop.items, shop.interactions, shop.image_column) == ("items.parquet", "interactions.parquet", None)
    assert (shop.text_fields, shop.attributes) == (["title", "about"], ["brand"])
    assert shop.item_columns == shop.interaction_columns == {}
    for said in ("brand: 7 values", "about: 8.0 words", "price (numbers)", "page (links)", "note (empty)", "slug (single words"):
        assert said in text


@pytest.mark.parametrize("suffix", ["csv", "tsv", "csv.gz", "jsonl", "jsonl.gz"])
def test_other_names_and_kinds_are_found_by_content(tmp_path, suffix):
    """Nothing is called as the contract has it; sales also have a row ID and an amount, which name no item and no time."""
    days = pl.col("bought").map_elements(lambda second: f"2024-01-{second % 28 + 1:02d}", pl.String)
    rows = sales("Customer", "article", "bought").with_columns(days).with_row_index("no").with_columns(amount=pl.lit(2))
    for name, table in (("goods", catalog("code")), ("orders", rows)):
        plain = tmp_path / f"{name}.{suffix}".removesuffix(".gz")
        if "json" in suffix:
            table.write_ndjson(plain)
        else:
            table.write_csv(plain, separator="\t" if suffix == "tsv" else ",")
        if suffix.endswith(".gz"):
            (tmp_path / f"{name}.{suffix}").write_bytes(gzip.compress(plain.read_bytes()))
            plain.unlink()
    shop = made(tmp_path)[0].data.domains["shop"]
    assert (shop.items, shop.interactions) == (f"goods.{suffix}", f"orders.{suffix}")
    assert shop.item_columns == {"item_id": "code"}
    assert shop.interaction_columns == {"user_id": "Customer", "item_id": "article", "timestamp": "bought"}
    assert (shop.text_fields, shop.attributes) == (["title", "about"], ["brand"])


def test_users_of_an_unusual_name_are_what_repeats(tmp_path):
    catalog("code").write_parquet(tmp_path / "goods.parquet")
    sales("wer", "was", "wann").with_columns(pl.from_epoch("wann")).write_parquet(tmp_path / "verkauf.parquet")
    shop = made(tmp_path)[0].data.domains["shop"]
    assert shop.items == "goods.parquet"
    assert shop.interaction_columns == {"user_id": "wer", "item_id": "was", "timestamp": "wann"}


def test_ratings_and_the_item_of_two_candidates_are_those_that_the_catalog_knows(tmp_path):
    catalog("id").write_csv(tmp_path / "products.csv")
    rows = sales("user", "product_id").with_row_index("id").with_columns(stars=pl.lit(4))
    rows.write_csv(tmp_path / "reviews.csv")
    shop = made(tmp_path)[0].data.domains["shop"]
    assert shop.item_columns == {"item_id": "id"}
    assert shop.interaction_columns == {"user_id": "user", "item_id": "product_id", "rating": "stars"}


def test_parts_become_a_glob_that_names_only_them(tmp_path):
    catalog().write_parquet(tmp_path / "items.parquet")
    for number, part in enumerate(sales().iter_slices(500)):
        part.write_parquet(tmp_path / f"sales-{number:03d}.parquet")
    catalog().select("item_id", vector=pl.lit([1.0, 2.0])).write_parquet(tmp_path / "text_vectors.parquet")
    catalog().select("item_id", codes=pl.lit([1, 2])).write_parquet(tmp_path / "ids.parquet")
    (tmp_path / "broken.json").write_text("nothing")
    config, text = made(tmp_path)
    assert config.data.domains["shop"].interactions == "sales-*.parquet"
    assert "3 files" not in text.split("interactions:")[0]
    assert "data.semantic_ids can name it" in text and "vectors.text can name it" in text and "broken.json" in text


def test_parts_that_no_pattern_names_alone_are_separated_by_a_folder(tmp_path):
    catalog().write_parquet(tmp_path / "items.parquet")
    for name, part in zip(("january", "june"), sales().iter_slices(600), strict=True):
        part.write_parquet(tmp_path / f"{name}.parquet")
    assert made(tmp_path)[0].data.domains["shop"].interactions == "j*.parquet"
    (tmp_path / "june.parquet").rename(tmp_path / "may.parquet")
    with pytest.raises(StarterError, match="give them a folder of their own"):
        write_config([tmp_path], tmp_path / "other.yaml")
    (tmp_path / "sales").mkdir()
    for name in ("january", "may"):
        (tmp_path / f"{name}.parquet").rename(tmp_path / "sales" / f"{name}.parquet")
    (tmp_path / "out" / "shop.yaml").unlink()
    assert made(tmp_path)[0].data.domains["shop"].interactions == "sales/*.parquet"


def test_folders_of_pairs_are_domains(tmp_path):
    for number, name in enumerate(("toys", "tools-2")):
        (tmp_path / name).mkdir()
        catalog(prefix=name).write_parquet(tmp_path / name / "items.parquet")
        sales(prefix=name, seed=number).write_csv(tmp_path / name / "events.csv")
    domains = made(tmp_path)[0].data.domains
    assert {name: (domain.items, domain.interactions) for name, domain in domains.items()} == {
        "toys": ("toys/items.parquet", "toys/events.csv"),
        "tools_2": ("tools-2/items.parquet", "tools-2/events.csv"),
    }


@pytest.mark.parametrize("there", [True, False])
def test_images_are_named_only_where_they_are(tmp_path, there):
    paths = [f"pictures/{number}.JPG" for number in range(ITEMS)]
    catalog().with_columns(photo=pl.Series(paths), cover=pl.lit("https://shop.example/a")).write_parquet(tmp_path / "items.parquet")
    sales().write_parquet(tmp_path / "interactions.parquet")
    if there:
        (tmp_path / "pictures").mkdir()
        (tmp_path / paths[0]).touch()
    config, text = made(tmp_path)
    assert config.data.domains["shop"].image_column == ("photo" if there else "cover")
    assert ("1 of the first 40 files" if there else "none of its images is there") in text


def test_images_as_bytes_and_as_structs_are_recognised(tmp_path):
    plain = catalog().with_columns(photo=pl.Series([b"\xff\xd8\xff..."] * ITEMS))
    plain.write_parquet(tmp_path / "items.parquet")
    sales().write_parquet(tmp_path / "interactions.parquet")
    assert made(tmp_path)[0].data.domains["shop"].image_column == "photo"
    plain.with_columns(photo=pl.struct(bytes="photo", path=pl.lit("a.jpg"))).write_parquet(tmp_path / "items.parquet")
    (tmp_path / "out" / "shop.yaml").unlink()
    assert made(tmp_path)[0].data.domains["shop"].image_column == "photo"


def lines(path: Path, records) -> None:
    path.write_bytes(gzip.compress("".join(json.dumps(record) + "\n" for record in records).encode()))


def write_amazon(folder: Path, year: int, category: str) -> None:
    item, user, time = ("asin", "reviewerID", "unixReviewTime") if year == 2018 else ("parent_asin", "user_id", "timestamp")
    rows = [{user: row[0], item: f"{category}{row[1]}", time: row[2], "asin": f"{category}{row[1]}"} for row in sales().rows()]
    maker, picture = ("brand", "imageURL") if year == 2018 else ("store", "images")
    items = [
        {item: f"{category}i{number}", "title": f"A title {number}", maker: "m", "categories": ["a"], picture: [], "description": ["b"]}
        for number in range(ITEMS)
    ]
    suffix = "json.gz" if year == 2018 else "jsonl.gz"
    lines(folder / f"{category}{'_5' * (year == 2018)}.{suffix}", rows)
    lines(folder / f"meta_{category}.{suffix}", items)


@pytest.mark.parametrize("year", [2018, 2023])
def test_amazon_files_pair_up_by_what_they_hold(tmp_path, year):
    write_amazon(tmp_path, year, "Toys")
    write_amazon(tmp_path, year, "Games")
    config, _ = made(tmp_path)
    name = {2018: ("Games_5", "Toys_5"), 2023: ("Games", "Toys")}[year]
    assert tuple(sorted(config.data.domains)) == name
    toys = config.data.domains[name[1]]
    assert toys.items.startswith("meta_Toys") and toys.format == f"amazon_{year}"
    assert (toys.text_fields, toys.attributes, toys.image_column) == (["title", "description"], ["brand", "categories"], "image")


@pytest.mark.parametrize(("per_user", "core"), [(20, 5), (3, 3), (1, 0)])
def test_the_k_core_is_what_the_data_allow(tmp_path, per_user, core):
    catalog().write_parquet(tmp_path / "items.parquet")
    sales(per_user=per_user).write_parquet(tmp_path / "interactions.parquet")
    config, text = made(tmp_path)
    assert config.data.min_interactions == core
    assert ("5-core only" in text) == (core != 5)
    assert f"of {USERS * per_user:,} interactions" in text or f"kept: {USERS * per_user:,} interactions" in text


def test_values_that_yaml_would_misread_are_quoted(tmp_path):
    catalog().rename({"title": "yes", "brand": "a: b"}).write_csv(tmp_path / "items.csv")
    sales().write_csv(tmp_path / "interactions.csv")
    shop = made(tmp_path)[0].data.domains["shop"]
    assert shop.attributes == ["a: b"] and "yes" in shop.text_fields


# what is said when it cannot


def test_a_config_is_never_replaced_unasked(tmp_path):
    catalog().write_csv(tmp_path / "items.csv")
    sales().write_csv(tmp_path / "interactions.csv")
    (tmp_path / "shop.yaml").write_text("mine")
    with pytest.raises(StarterError, match="is there already.*--force"):
        write_config([tmp_path], tmp_path / "shop.yaml")
    assert (tmp_path / "shop.yaml").read_text() == "mine"
    write_config([tmp_path], tmp_path / "shop.yaml", force=True)
    assert "min_interactions" in yaml.safe_load((tmp_path / "shop.yaml").read_text())["data"]


@pytest.mark.parametrize(
    ("tables", "said"),
    [
        ({}, "no Parquet, CSV, TSV or JSONL file"),
        ({"items.csv": catalog()}, "no table of interactions"),
        ({"sales.csv": sales()}, "no table of items"),
        ({"items.csv": catalog(), "sales.csv": sales(prefix="other")}, "no table of items that the interactions name"),
        ({"items.csv": catalog(), "sales.csv": sales().with_columns(timestamp=pl.lit("the 31st"))}, "no table of interactions"),
    ],
)
def test_where_nothing_fits_it_says_what_it_saw_and_what_it_wants(tmp_path, tables, said):
    for name, table in tables.items():
        table.write_csv(tmp_path / name)
    with pytest.raises(StarterError, match=said) as error:
        write_config([tmp_path], tmp_path / "out.yaml")
    assert not (tmp_path / "out.yaml").exists()
    if tables:
        assert "expected: items" in str(error.value)
        for name, table in tables.items():
            assert f"{name}: {', '.join(table.columns)}" in str(error.value)


def test_the_command_shows_what_it_wrote(tmp_path, capsys):
    catalog().write_csv(tmp_path / "items.csv")
    sales().write_csv(tmp_path / "interactions.csv")
    with pytest.raises(SystemExit) as end:
        main(["init", str(tmp_path / "*.csv"), "-o", str(tmp_path / "shop.yaml")])
    text = capsys.readouterr().out
    assert end.value.code == 0 and (tmp_path / "shop.yaml").read_text() in text and "qbert-ray validate -c" in text


@pytest.mark.parametrize(
    "names", [("train", "valid", "test"), ("log.train", "log.dev", "log.test"), ("X_training", "X_validation", "X_test")], ids="-".join
)
def test_three_files_named_after_a_split_are_one(tmp_path, names):
    catalog().write_parquet(tmp_path / "items.parquet")
    place = pl.int_range(pl.len()).over("user_id")
    for name, rows in zip(names, (place < 18, place == 18, place == 19), strict=True):
        sales().filter(rows).write_csv(tmp_path / f"{name}.csv")
    config, text = made(tmp_path)
    shop = config.data.domains["shop"]
    assert (shop.interactions, shop.validation, shop.test) == tuple(f"{name}.csv" for name in names)
    assert config.data.split == "given" and config.data.min_interactions == 0 and "used as they are" in text


def test_a_column_that_names_parts_of_a_split_is_pointed_out(tmp_path):
    catalog().write_parquet(tmp_path / "items.parquet")
    sales().with_columns(pl.when(pl.col("timestamp") % 3 > 0).then(pl.lit("Train")).otherwise(pl.lit("test")).alias("part")).write_csv(
        tmp_path / "sales.csv"
    )
    config, text = made(tmp_path)
    assert config.data.split == "leave_one_out"
    assert "part (a split of your own? data.split: given, interaction_columns: {split: part} uses it)" in text


@pytest.mark.parametrize("orders", [False, True])
def test_negative_quantities_are_pointed_out(tmp_path, orders):
    """In a table of orders, and next to a catalog."""
    quantity = pl.Series("pieces", [-1 if number % 9 == 0 else 1 + number % 4 for number in range(len(sales()))])
    table = sales().with_columns(quantity, pl.Series("discount", [-number for number in range(len(quantity))]))
    if orders:
        table = table.join(catalog().select("item_id", "title", "about"), on="item_id")
    else:
        catalog().write_csv(tmp_path / "items.csv")
    table.write_csv(tmp_path / "sales.csv")
    _, text = made(tmp_path)
    lines = [line for line in text.splitlines() if "returns?" in line]
    assert len(lines) == 1 and "interaction_columns: {rating: pieces} and data.min_rating: 0.001" in lines[0]


def test_an_empty_cell_of_an_item_is_no_second_text(tmp_path):
    """In exports of orders, where the texts of the items stand in every row."""
    texts = {f"i{item}": f"{WORDS[item % 10]} {WORDS[item // 10]} number {item}" for item in range(ITEMS)}
    rows = [(*row, texts[row[1]] if number % 30 else " ", "EUR") for number, row in enumerate(sales().rows())]
    pl.DataFrame(rows, ["user_id", "item_id", "timestamp", "words", "currency"], orient="row").write_csv(tmp_path / "orders.csv")
    config, text = made(tmp_path)
    assert next(iter(config.data.domains.values())).text_fields == ["words"]
    assert "currency (all rows have one value)" in text


@pytest.mark.parametrize("form", ["{},5", "{},95 €", "€ {}.95", "1.{:03},00 EUR", "USD 1,{:03}.50", "{} %"])
def test_amounts_of_money_are_numbers_and_no_texts(tmp_path, form):
    catalog().with_columns(cost=pl.Series([form.format(number) for number in range(ITEMS)])).write_csv(tmp_path / "items.csv")
    sales().write_csv(tmp_path / "sales.csv")
    _, text = made(tmp_path)
    assert "cost (numbers)" in text


@pytest.mark.parametrize(
    "names",
    [("ORDER_ID", "CUSTOMER", "SKU", "DATE"), ("BESTELLNR", "KUNDENNR", "ARTNR", "DATUM"), ("no", "who", "what", "bought at")],
    ids="-".join,
)
def test_orders_in_two_tables_are_joined_by_the_code_that_is_shown(tmp_path, names):
    """One table with the customer and time of each order, one with its articles, and a catalog, in Latin-1 with semicolons."""
    number, user, item, time = names
    catalog(item).with_columns(title=pl.lit("Größe ") + pl.col("title")).write_csv(tmp_path / "plain.csv", separator=";")
    (tmp_path / "goods.csv").write_bytes((tmp_path / "plain.csv").read_text().encode("latin-1"))
    (tmp_path / "plain.csv").unlink()
    rows = sales(user, item, time).with_columns(pl.format("0{}", (pl.int_range(pl.len()) // 2 + 500_000)).alias(number))
    orders = rows.group_by(number, maintain_order=True).agg(pl.col(user, time).first())
    days = pl.from_epoch(time).dt.strftime("%d.%m.%Y %H:%M")
    orders.with_columns(days).write_csv(tmp_path / "orders.csv", separator=";")
    rows.select(number, item).with_columns(amount=pl.lit(2)).write_csv(tmp_path / "articles.csv", separator=";")
    with pytest.raises(StarterError, match="has the customer .* and the time .* of each order") as error:
        made(tmp_path)
    code = [
        line.strip()
        for line in str(error.value).splitlines()
        if line.startswith("  ") and "pl" in line and " = " in line or ".join(" in line
    ]
    exec("import polars as pl\n" + "\n".join(code), {})
    config, _ = made(tmp_path, "goods.csv", "interactions.parquet")
    assert pl.read_parquet(tmp_path / "interactions.parquet").shape == (len(rows), 3)
    assert config.data.domains["shop"].item_columns == {"item_id": item}


@pytest.mark.parametrize(
    ("first", "second", "kind"),
    [([4] * 30, [4.5] * 30, "number"), ([None] * 30, ["a", "b"] * 15, "text"), ([["a"]] * 30, [1] * 30, "text")],
    ids=["whole", "null", "lists"],
)
def test_parts_whose_types_differ_are_one_table(tmp_path, first, second, kind):
    for number, values in enumerate((first, second)):
        pl.DataFrame({"item_id": range(30), "x": values}).write_parquet(tmp_path / f"part-{number}.parquet")
    tables, aside = find_tables([tmp_path])
    assert not aside and tables[0].columns["x"].kind == kind and len(tables[0].sample) == 60


def test_a_catalog_that_names_its_items_several_times_is_not_passed_over(tmp_path):
    catalog().write_csv(tmp_path / "items.csv")
    catalog().with_columns(price=pl.lit(1.0)).write_csv(tmp_path / "items (1).csv")
    sales().write_csv(tmp_path / "sales.csv")
    with pytest.raises(
        StarterError, match=r"items\*.csv describes items \(title, brand, price\), but its item_id names many of them several"
    ):
        write_config([tmp_path], tmp_path / "shop.yaml")


def test_items_whose_ids_are_bytes_are_a_catalog(tmp_path):
    catalog().with_columns(pl.col("item_id").cast(pl.Binary)).write_parquet(tmp_path / "items.parquet")
    sales().with_columns(pl.col("item_id").cast(pl.Binary)).write_parquet(tmp_path / "sales.parquet")
    shop = made(tmp_path)[0].data.domains["shop"]
    assert (shop.items, shop.interactions) == ("items.parquet", "sales.parquet") and "title" in shop.text_fields


@pytest.mark.parametrize("name", ["2024", "no", "null", "1e3"])
def test_a_name_that_yaml_would_misread_is_that_of_the_domain(tmp_path, name):
    catalog().write_csv(tmp_path / "items.csv")
    sales().write_csv(tmp_path / "sales.csv")
    write_config([tmp_path], tmp_path / f"{name}.yaml")
    config = load_config([tmp_path / f"{name}.yaml"])
    assert (list(config.data.domains), config.run.dir) == ([name], f"runs/{name}")


@pytest.mark.parametrize("name", ["note\nrun: {dir: elsewhere}\n#", "Preis\n(EUR)", "a\u2028run: {dir: elsewhere}", "bell\x07", "a\rb: c"])
def test_names_of_columns_and_files_stay_in_their_comments(tmp_path, name):
    """They are content: whoever supplies a table must not choose where the run writes."""
    catalog().with_columns(pl.col("price").alias(name)).rename({"about": f"{name} text"}).write_parquet(tmp_path / "items.parquet")
    sales().with_columns(pl.lit(1).alias(name)).write_parquet(tmp_path / "sales.parquet")
    config, text = made(tmp_path)
    assert config.run.dir == "runs/shop" and set(yaml.safe_load(text)) == {"run", "data"}
    assert f"{name} text" in config.data.domains["shop"].text_fields


def test_files_elsewhere_are_refused_in_words(tmp_path):
    with pytest.raises(StarterError, match="s3:/bucket/shop: init looks at local files alone"):
        write_config([Path("s3://bucket/shop")], tmp_path / "shop.yaml")


def test_a_config_is_utf_8_whatever_the_locale_and_names_the_command_as_a_shell_reads_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("pathlib.Path.write_text", lambda *_, **__: pytest.fail("in the encoding of the locale"))
    catalog().with_columns(pl.lit("ärmel 日本").alias("größe")).write_parquet(tmp_path / "items.parquet")
    sales().write_csv(tmp_path / "sales.csv")
    with pytest.raises(SystemExit):
        main(["init", str(tmp_path), "-o", str(tmp_path / "my shop.yaml")])
    assert "größe" in (tmp_path / "my shop.yaml").read_text(encoding="utf-8")
    said = capsys.readouterr().out
    assert said.count(f"qbert-ray validate -c '{tmp_path / 'my shop.yaml'}'") == 2
