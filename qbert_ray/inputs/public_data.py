"""Public data sets by name: download addresses, terms of use, and conversion to the input contract.

Amazon's files are read as they are published; MovieLens is converted to Parquet.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from qbert_ray.inputs.download import DownloadError, Report, check, download
from qbert_ray.storage.columns import ITEM_ID, RATING, TIMESTAMP, USER_ID

GROUPLENS = "https://files.grouplens.org/datasets/movielens"
MCAULEY = "https://mcauleylab.ucsd.edu/public_datasets/data"
RECEIPT = "source.json"

_BOTH = [
    "All_Beauty", "Appliances", "Arts_Crafts_and_Sewing", "Automotive", "Books", "CDs_and_Vinyl", "Cell_Phones_and_Accessories",
    "Clothing_Shoes_and_Jewelry", "Digital_Music", "Electronics", "Gift_Cards", "Grocery_and_Gourmet_Food", "Home_and_Kitchen",
    "Industrial_and_Scientific", "Kindle_Store", "Magazine_Subscriptions", "Movies_and_TV", "Musical_Instruments",
    "Office_Products", "Patio_Lawn_and_Garden", "Pet_Supplies", "Software", "Sports_and_Outdoors", "Tools_and_Home_Improvement",
    "Toys_and_Games", "Video_Games",
]  # fmt: skip
_ONLY_2023 = [
    "Amazon_Fashion", "Baby_Products", "Beauty_and_Personal_Care", "Handmade_Products", "Health_and_Household",
    "Health_and_Personal_Care", "Subscription_Boxes",
]  # fmt: skip
CATEGORIES = {
    "amazon-2023": sorted([*_BOTH, *_ONLY_2023]),
    "amazon-2018": sorted([*_BOTH, "AMAZON_FASHION", "Luxury_Beauty", "Prime_Pantry"]),
}


@dataclass(frozen=True)
class Remote:
    url: str
    name: str
    md5: str | None = None  # where one is published


@dataclass(frozen=True)
class PublicData:
    title: str
    files: tuple[Remote, ...]
    page: str
    terms: str
    cite: str
    convert: Callable[[Path], None] | None = None


def find(name: str) -> PublicData:
    """The data set with a name such as movielens-1m or amazon-2023:Musical_Instruments.

    Raises:
        DownloadError: there is none.
    """
    kind, _, category = name.partition(":")
    if name == "movielens-1m":
        return _movielens()
    if kind not in CATEGORIES:
        raise DownloadError(
            f"no data set {name!r}; there are {', '.join(['movielens-1m', *(f'{kind}:<category>' for kind in CATEGORIES)])}"
        )
    if category not in CATEGORIES[kind]:
        near = difflib.get_close_matches(category, CATEGORIES[kind], n=1)
        hint = f"did you mean {kind}:{near[0]}?" if near else f"there are {', '.join(CATEGORIES[kind])}"
        raise DownloadError(f"{kind} has no category {category!r}; {hint}")
    return _amazon(kind.removeprefix("amazon-"), category)


def fetch(name: str, folder: Path, report: Callable[[str], Report] = lambda name: lambda done, total: None) -> list[str]:
    """Download a data set's files into a folder and convert them; returns the names of the new files.

    Args:
        report: name of a file -> function that receives its progress.

    Raises:
        DownloadError: no such data set, or a file cannot be downloaded or is not what was published.
    """
    data = find(name)
    receipt = folder / RECEIPT
    known: dict[str, Any] = json.loads(receipt.read_text()) if receipt.exists() else {"name": name, "files": {}}
    if known["name"] != name:
        raise DownloadError(f"{folder} holds {known['name']}; choose another folder for {name}")
    came = []
    for file in data.files:
        path = folder / file.name
        if not _is_there(path, file, known["files"].get(file.name)):
            download(file.url, path, file.md5, report(file.name))
            came.append(file.name)
        known["files"][file.name] = {"url": file.url, "bytes": path.stat().st_size, "sha256": _sha256(path)}
        known |= {"page": data.page, "terms": data.terms, "cite": data.cite}
        receipt.write_text(json.dumps(known, indent=2, ensure_ascii=False) + "\n")
    if data.convert and (came or not (folder / "interactions.parquet").exists()):
        data.convert(folder)
    return came


def _is_there(path: Path, file: Remote, receipt: dict[str, object] | None) -> bool:
    """Whether a file was downloaded before and is unchanged; one without a receipt was put there by hand and is checked."""
    if not path.exists():
        return False
    if receipt is not None and receipt["url"] == file.url:
        return receipt["bytes"] == path.stat().st_size and receipt["sha256"] == _sha256(path)
    check(path, str(path), file.md5, path.suffix == ".gz")
    return True


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _movielens() -> PublicData:
    return PublicData(
        title="MovieLens 1M: 1,000,209 ratings of 3,883 movies by 6,040 users",
        files=(Remote(f"{GROUPLENS}/ml-1m.zip", "ml-1m.zip", "c4d9eecfca2ab87c1945afe126590906"),),
        page="https://grouplens.org/datasets/movielens/1m/",
        terms="research only: no commercial use and no redistribution without permission of GroupLens (ml-1m-README.txt)",
        cite="Harper and Konstan 2015, The MovieLens Datasets, ACM TiiS 5(4), https://doi.org/10.1145/2827872",
        convert=convert_movielens,
    )


def _amazon(year: str, category: str) -> PublicData:
    new = year == "2023"
    meta, reviews = (
        (f"amazon_2023/raw/meta_categories/meta_{category}.jsonl.gz", f"amazon_2023/raw/review_categories/{category}.jsonl.gz")
        if new
        else (f"amazon_v2/metaFiles2/meta_{category}.json.gz", f"amazon_v2/categoryFilesSmall/{category}_5.json.gz")
    )
    return PublicData(
        title=f"Amazon Reviews 2023, {category}" if new else f"Amazon Review Data 2018, {category}, 5-core",
        files=tuple(Remote(f"{MCAULEY}/{path}", path.rpartition("/")[2]) for path in (meta, reviews)),
        page="https://amazon-reviews-2023.github.io/" if new else "https://cseweb.ucsd.edu/~jmcauley/datasets/amazon_v2/",
        terms="published for research by the McAuley Lab, UC San Diego; no licence is given with the files: read the page before other use",
        cite="Hou et al. 2024, Bridging Language and Items for Retrieval and Recommendation, arXiv:2403.03952"
        if new
        else "Ni, Li and McAuley 2019, Justifying Recommendations using Distantly-Labeled Reviews, EMNLP, https://aclanthology.org/D19-1018/",
    )


def convert_movielens(folder: Path) -> None:
    """Write items.parquet (title, genres, year) and interactions.parquet from ml-1m.zip, whose fields are separated by `::`."""
    with zipfile.ZipFile(folder / "ml-1m.zip") as archive:
        movies = _records(archive.read("ml-1m/movies.dat"), 3)
        ratings = _records(archive.read("ml-1m/ratings.dat"), 4)
        (folder / "ml-1m-README.txt").write_bytes(archive.read("ml-1m/README"))
    items = pl.DataFrame(movies, [ITEM_ID, "title", "genres"], orient="row").with_columns(
        pl.col("genres").str.split("|"),
        pl.col("title").str.extract(r"\((\d{4})\)\s*$").cast(pl.Int16).alias("year"),
    )
    interactions = pl.DataFrame(ratings, [USER_ID, ITEM_ID, RATING, TIMESTAMP], orient="row").with_columns(
        pl.col(RATING).cast(pl.Float32), pl.col(TIMESTAMP).cast(pl.Int64)
    )
    for name, table in (("items", items), ("interactions", interactions)):  # interactions are written last: they mark completion
        partial = folder / f".{name}.parquet"
        table.write_parquet(partial)
        partial.rename(folder / f"{name}.parquet")


def _records(content: bytes, fields: int) -> list[list[str]]:
    lines = (line.rstrip("\r") for line in content.decode("latin-1").split("\n"))  # not splitlines: latin-1 has more ends of lines
    records = [line.split("::") for line in lines if line]
    broken = next((number for number, record in enumerate(records, 1) if len(record) != fields), None)
    if broken:
        raise DownloadError(f"line {broken} of a MovieLens file has {len(records[broken - 1])} fields, {fields} are expected")
    return records
