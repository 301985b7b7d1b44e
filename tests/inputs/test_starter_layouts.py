"""First configs for the layouts in which public data and shops' exports come; every config that is written can be used."""

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from qbert_ray.config.loading import load_config
from qbert_ray.config.schema import Domain
from qbert_ray.execution.local import LocalExecutor
from qbert_ray.inputs.starter import StarterError
from qbert_ray.inputs.starter_page import write_config
from qbert_ray.inputs.validation import validate

USERS, ITEMS, PER_USER = 40, 30, 8
WORDS = ["steel", "oak", "wool", "clay", "mug", "lamp", "tent", "drum"]
TITLES = [f"{WORDS[n % 8]} {WORDS[n // 8]} number {n} for home" for n in range(ITEMS)]


def log(user: str, item: str, time: str, key=lambda n: n, who=lambda n: n, when=lambda n: 1_600_000_000 + 100 * n, **more) -> pl.DataFrame:
    rng = np.random.default_rng(0)
    rows = [(who(u), key(int(i)), when(u * PER_USER + n)) for u in range(USERS) for n, i in enumerate(rng.choice(ITEMS, PER_USER, False))]
    frame = pl.DataFrame(rows, [user, item, time], orient="row")
    return frame.with_columns(pl.Series(name, [values[n % len(values)] for n in range(len(frame))]) for name, values in more.items())


def made(folder: Path) -> tuple[Domain, str, dict]:
    """The one domain of the config that is written for a folder, its text, and the verdict on it."""
    text = write_config([folder], folder.parent / "made.yaml", force=True)
    config = load_config([folder.parent / "made.yaml"], [f"run.dir={folder.parent / 'run'}"])
    (domain,) = config.data.domains.values()
    (report,) = validate(config, LocalExecutor()).values()
    assert not report["errors"]
    return domain, text, report["counts"]


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


def json_lines(path: Path, rows: list[dict]) -> None:
    path.write_text("\n".join(json.dumps(row) for row in rows))


def test_movielens_takes_movies_and_ratings_and_neither_links_nor_tags(folder):
    movies = pl.DataFrame({"movieId": range(ITEMS), "title": TITLES, "genres": ["Comedy|War", "Drama"] * (ITEMS // 2)})
    movies.write_csv(folder / "movies.csv")
    pl.DataFrame({"movieId": range(ITEMS), "imdbId": range(ITEMS), "tmdbId": range(ITEMS)}).write_csv(folder / "links.csv")
    log("userId", "movieId", "timestamp", rating=[4.0, 3.5]).write_csv(folder / "ratings.csv")
    log("userId", "movieId", "timestamp", tag=["funny", "dark"]).head(50).write_csv(folder / "tags.csv")
    domain, text, counts = made(folder)
    assert (domain.items, domain.interactions, domain.text_fields, domain.attributes) == (
        "movies.csv",
        "ratings.csv",
        ["title"],
        ["genres"],
    )
    assert "tags.csv: another table of interactions" in text and "links.csv" in text and counts["users"] == USERS


def test_h_and_m_with_customers_leading_zeros_and_images_in_folders(folder):
    ids = [f"0{108775000 + n}" for n in range(ITEMS)]
    pl.DataFrame({"article_id": ids, "prod_name": TITLES, "colour_group_name": ["Black", "White"] * (ITEMS // 2)}).write_csv(
        folder / "articles.csv"
    )
    people = [f"c{n:032x}" for n in range(USERS)]
    pl.DataFrame({"customer_id": people, "age": range(USERS), "club_member_status": ["ACTIVE"] * USERS}).write_csv(folder / "customers.csv")
    sold = log(
        "customer_id", "article_id", "t_dat", ids.__getitem__, people.__getitem__, lambda n: f"2018-09-{1 + n % 28:02d}", price=[0.1, 0.2]
    )
    sold.write_csv(folder / "transactions_train.csv")
    for name in ids:
        (folder / "images" / name[:3]).mkdir(parents=True, exist_ok=True)
        (folder / "images" / name[:3] / f"{name}.jpg").write_bytes(b"\xff\xd8\xff")
    domain, text, counts = made(folder)
    assert (domain.items, domain.interactions) == ("articles.csv", "transactions_train.csv")
    assert domain.interaction_columns["user_id"] == "customer_id" and domain.image_template == "images/{item_id:.3}/{item_id}.jpg"
    assert domain.text_fields == ["prod_name"] and "price" in text and counts["interactions"] == USERS * PER_USER


def test_retailrocket_has_no_catalog_so_events_are_one(folder):
    log("visitorid", "itemid", "timestamp", when=lambda n: 1_433_221_332_117 + n, event=["view", "addtocart"]).write_csv(
        folder / "events.csv"
    )
    pl.DataFrame({"categoryid": range(20), "parentid": [n // 2 for n in range(20)]}).write_csv(folder / "category_tree.csv")
    for part in (1, 2):
        rows = {
            "timestamp": [1_433_221_332_117] * 90,
            "itemid": [n % ITEMS for n in range(90)],
            "property": ["790"] * 90,
            "value": ["n1"] * 90,
        }
        pl.DataFrame(rows).write_csv(folder / f"item_properties_part{part}.csv")
    domain, text, counts = made(folder)
    assert domain.items == domain.interactions == "events.csv" and domain.interaction_columns["user_id"] == "visitorid"
    assert counts["items"] and "item_properties_part" in text


def test_yelp_takes_businesses_and_reviews(folder):
    keys = [f"b{n:04d}" for n in range(ITEMS)]
    businesses = [
        {"business_id": key, "name": title, "city": "Phoenix", "attributes": {"WiFi": "no"}, "hours": None, "categories": category}
        for key, title, category in zip(keys, TITLES, ["Food, Bars", "Hotels"] * (ITEMS // 2), strict=True)
    ]
    json_lines(folder / "yelp_academic_dataset_business.json", businesses)
    reviews = log(
        "user_id", "business_id", "date", keys.__getitem__, lambda n: f"u{n}", lambda n: f"2018-07-07 22:{n % 60:02d}:10", stars=[4.0, 5.0]
    )
    reviews = reviews.with_row_index("review_id").with_columns(text=pl.lit("it was good indeed"))
    json_lines(folder / "yelp_academic_dataset_review.json", reviews.to_dicts())
    users = [{"user_id": f"u{n}", "name": f"Jo {n}", "yelping_since": "2010-01-01 10:00:00"} for n in range(USERS)]
    json_lines(folder / "yelp_academic_dataset_user.json", users)
    json_lines(folder / "yelp_academic_dataset_tip.json", reviews.head(60).select("user_id", "business_id", "text", "date").to_dicts())
    domain, text, _ = made(folder)
    assert domain.items.endswith("business.json") and domain.interactions.endswith("review.json")
    assert domain.text_fields == ["name"] and domain.attributes == ["categories"] and "attributes (mappings)" in text


def test_rees46_is_a_log_with_its_products_in_it(folder):
    events = log(
        "user_id", "product_id", "event_time", lambda n: 1_000_000 + n, when=lambda n: f"2019-10-01 00:{n // 60 % 60:02d}:{n % 60:02d} UTC"
    )
    brands = pl.col("product_id").cast(pl.String).replace_strict({str(1_000_000 + n): f"brand{n % 5}" for n in range(ITEMS)})
    events = events.with_columns(event_type=pl.lit("view"), brand=brands, user_session="s" + pl.col("user_id").cast(pl.String))
    events.write_csv(folder / "2019-Oct.csv")
    domain, text, counts = made(folder)
    assert domain.items == domain.interactions == "2019-Oct.csv" and domain.attributes == ["brand"]
    assert (
        domain.interaction_columns == {"user_id": "user_id", "item_id": "product_id", "timestamp": "event_time"}
        or "user_id" not in domain.interaction_columns
    )
    assert "event_type" in text and counts["users"] == USERS


def test_mind_is_read_without_a_header(folder):
    lines = [f'N{n}\tnews\tsport\t{TITLES[n]}\tmore "of" it\thttps://x.example/{n}\t[]\t[]' for n in range(ITEMS)]
    (folder / "news.tsv").write_text("\n".join(lines))
    clicked = log("u", "i", "t")
    rows = [
        f"{n}\tU{u}\t11/{1 + t % 28}/2019 9:05:{n % 60:02d} AM\tN1 N2\tN{i}-1 N{(i + 1) % ITEMS}-0"
        for n, (u, i, t) in enumerate(clicked.iter_rows())
    ]
    (folder / "behaviors.tsv").write_text("\n".join(rows))
    domain, _, counts = made(folder)
    assert (domain.items, domain.interactions) == ("news.tsv", "behaviors.tsv")
    assert domain.text_fields[0] == "title" and counts["interactions_read"] == USERS * PER_USER


def test_recbole_names_with_types(folder):
    pl.DataFrame({"item_id:token": range(ITEMS), "title:token_seq": TITLES}).write_csv(folder / "shop.item", separator="\t")
    log("user_id:token", "item_id:token", "timestamp:float").write_csv(folder / "shop.inter", separator="\t")
    domain, _, _ = made(folder)
    assert (domain.items, domain.interactions, domain.text_fields) == ("shop.item", "shop.inter", ["title:token_seq"])


def test_lc_rec_objects_are_rows_by_key_and_histories(folder):
    (folder / "S.item.json").write_text(json.dumps({n: {"title": title, "brand": f"b{n % 3}"} for n, title in enumerate(TITLES)}, indent=1))
    histories = log("u", "i", "t").group_by("u", maintain_order=True).agg("i")
    (folder / "S.inter.json").write_text(json.dumps(dict(histories.iter_rows())))
    (folder / "S.index.json").write_text(json.dumps({n: [f"<a_{n}>", f"<b_{n}>"] for n in range(ITEMS)}))
    domain, text, counts = made(folder)
    assert (domain.items, domain.interactions, domain.attributes) == ("S.item.json", "S.inter.json", ["brand"])
    assert counts["interactions"] == USERS * PER_USER and "S.index.json: it holds semantic IDs" in text


def test_partitions_are_one_table(folder):
    pl.DataFrame({"item_id": range(ITEMS), "title": TITLES}).write_parquet(folder / "items.parquet")
    rows = log("user_id", "item_id", "timestamp")
    for day in range(3):
        part = folder / "interactions" / f"date=2024-01-0{day + 1}"
        part.mkdir(parents=True)
        rows[day::3].write_parquet(part / "part-00000.c000.snappy.parquet")
    domain, _, counts = made(folder)
    assert domain.interactions == "interactions" and counts["interactions"] == USERS * PER_USER


@pytest.mark.parametrize("order", ["InvoiceNo", "order_id", "nr"])
def test_an_order_is_not_a_customer(folder, order):
    """Several items at one time under one number: an order. The customers have a name that nothing is known of."""
    pl.DataFrame({"StockCode": [f"p{n}" for n in range(ITEMS)], "Description": TITLES}).write_csv(folder / "products.csv")
    sold = log(
        "Kundin",
        "StockCode",
        "InvoiceDate",
        lambda n: f"p{n}",
        lambda n: f"k{n}",
        lambda n: f"12/1/2010 {8 + n // 4 % 12}:{n // 4 % 60:02d}",
    )
    sold.with_columns(pl.Series(order, [f"A{n // 4}" for n in range(len(sold))])).write_csv(folder / "sales.csv")
    domain, _, _ = made(folder)
    assert domain.interaction_columns["user_id"] == "Kundin"


def test_orders_alone_are_refused_by_name(folder):
    pl.DataFrame({"sku": [f"p{n}" for n in range(ITEMS)], "title": TITLES}).write_csv(folder / "products.csv")
    log("order_id", "sku", "bought", lambda n: f"p{n}", lambda n: f"o{n}", lambda n: 1000 + n // PER_USER).write_csv(folder / "sales.csv")
    with pytest.raises(StarterError, match="order_id numbers orders"):
        write_config([folder], folder.parent / "made.yaml")


@pytest.mark.parametrize("kind", ["json", "parquet"])
def test_nested_categories_are_an_attribute(folder, kind):
    nested = [[["Home", "Kitchen", "Mugs and cups"]], [["Home", "Light", "Lamps and more"]]] * (ITEMS // 2)
    frame = pl.DataFrame({"item_id": [f"p{n}" for n in range(ITEMS)], "title": TITLES, "categories": nested})
    json_lines(folder / "items.json", frame.to_dicts()) if kind == "json" else frame.write_parquet(folder / "items.parquet")
    log("user_id", "item_id", "timestamp", lambda n: f"p{n}").write_csv(folder / "log.csv")
    assert made(folder)[0].attributes == ["categories"]


def test_of_several_image_columns_one_is_read_and_the_others_are_named(folder):
    links = [f"https://x.example/{n}.jpg" for n in range(ITEMS)]
    pl.DataFrame({"item_id": range(ITEMS), "title": TITLES, "image": links, "image2": links}).write_csv(folder / "items.csv")
    log("user_id", "item_id", "timestamp").write_csv(folder / "log.csv")
    domain, text, _ = made(folder)
    assert domain.image_column == "image" and "image2 (also images; one column can be read)" in text


def test_ratings_without_times_are_refused_with_what_they_lack(folder):
    pl.DataFrame({"book_id": range(ITEMS), "title": TITLES}).write_csv(folder / "books.csv")
    log("user_id", "book_id", "timestamp", rating=[3, 4]).drop("timestamp").write_csv(folder / "ratings.csv")
    with pytest.raises(
        StarterError, match=r"(?s)ratings.csv has users \(user_id\) and items \(book_id\), but no column of times.*with_row_index"
    ):
        write_config([folder], folder.parent / "made.yaml")


def test_a_folder_with_signs_of_patterns_in_its_name(tmp_path):
    folder = tmp_path / "shop [2018]*"
    folder.mkdir()
    pl.DataFrame({"item_id": range(ITEMS), "title": TITLES}).write_csv(folder / "items.csv")
    rows = log("user_id", "item_id", "timestamp")
    for part in range(2):
        rows[part::2].write_csv(folder / f"sales [{part}].csv")
    domain, _, counts = made(folder)
    assert counts["interactions"] == USERS * PER_USER


def test_a_file_without_a_header_is_named(folder):
    pl.DataFrame({"item_id": range(ITEMS), "title": TITLES}).write_csv(folder / "items.csv")
    log("u", "i", "t", rating=[3, 4]).write_csv(folder / "ratings.csv", include_header=False)
    with pytest.raises(StarterError, match="ratings.csv: its first line looks like a row"):
        write_config([folder], folder.parent / "made.yaml")


def test_the_advice_on_a_table_without_times_reads_it_as_it_is_written(folder):
    pl.DataFrame({"ISBN": range(ITEMS), "title": TITLES}).write_csv(folder / "books.csv")
    rows = log("User-ID", "ISBN", "timestamp").drop("timestamp")
    rows.with_columns(pl.col("ISBN").cast(pl.String).str.zfill(10)).write_csv(folder / "ratings.csv", separator=";")
    with pytest.raises(StarterError) as error:
        write_config([folder], folder.parent / "made.yaml")
    code = str(error.value).partition("number them: ")[2].partition(".write_parquet")[0]
    read = eval(code, {"pl": pl})  # noqa: S307 - the advice is code
    assert read.columns == ["timestamp", "User-ID", "ISBN"] and read["ISBN"].str.len_chars().unique().to_list() == [10]


def test_a_column_without_a_name_hides_no_table(folder):
    pl.DataFrame({"item_id": range(ITEMS), "title": TITLES}).write_csv(folder / "items.csv")
    log("user_id", "item_id", "timestamp").with_row_index("").write_csv(folder / "sales.csv")
    assert made(folder)[2]["interactions"] == USERS * PER_USER


def test_files_of_other_kinds_are_named(folder):
    (folder / "ratings.dat").write_text("1::2::5::978300760\n")
    with pytest.raises(StarterError, match="not read: ratings.dat; call a table of text .csv, with a line of names"):
        write_config([folder], folder.parent / "made.yaml")


def test_a_time_is_no_name_of_a_column(folder):
    (folder / "log.tsv").write_text("user_1\t2009-05-04T23:08:57Z\ta\tArtist\tb\tSong\n" * 9)
    with pytest.raises(StarterError, match="log.tsv: its first line looks like a row"):
        write_config([folder], folder.parent / "made.yaml")
