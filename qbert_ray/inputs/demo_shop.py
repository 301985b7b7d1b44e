"""Generates the synthetic shop of the quick start: items, texts, images and purchases, all drawn from one seed.

`generate` writes ordinary input files (items.parquet, interactions.parquet, images/), which a run reads like any user's.
Notable choices:

* A catalog item is a category, a brand, a style and a colour. Its texts name the first three and, in half of the titles, the
  colour; its image shows all four: shape by category, hue by colour, pattern by style, trim and backdrop by brand.
* A purchase completes the one before it (tent -> sleeping bag -> lantern -> backpack, by brand, style and colour), or follows the
  user's drifting taste, or popularity, or is random. Complements point one way, so order matters; they follow attributes,
  so most pairs are too rare to count but can be inferred from the content.
* Some items have no image or no description, a few images are broken, and a few items are too new to have been bought often.
"""

from __future__ import annotations

import colorsys
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw

from qbert_ray.inputs.demo_media import with_tunes_and_turns, write_media
from qbert_ray.inputs.demo_users import DEPARTMENT_SIZE, NEW_ITEM_WEIGHT, Catalog, simulate_interactions


class Category(NamedTuple):
    name: str
    price: float
    nouns: str
    uses: str
    materials: str


class Style(NamedTuple):
    name: str
    lines: str  # names of product lines, part of the titles
    adjectives: str
    moods: str


# Choices of words are separated by " | ". Four categories make a department.
CATEGORIES = (
    Category("Tents", 180, "Two-Person Tent | Dome Tent | Trail Tent | Family Tent", "weekends in the hills | long summer trips | "
             "wet nights by the lake", "ripstop nylon | waxed cotton canvas | coated polyester"),
    Category("Sleeping Bags", 95, "Sleeping Bag | Mummy Sleeping Bag | Three-Season Sleeping Bag", "cold nights outside | "
             "a good sleep under the stars | early starts in the mountains", "soft duck down | brushed cotton | recycled fibre filling"),
    Category("Lanterns", 40, "Camping Lantern | Storm Lantern | Pocket Lantern | Hanging Lantern", "late evenings around the table | "
             "finding the path after dark | reading in the tent", "powder-coated steel | frosted glass and brass | tough plastic"),
    Category("Backpacks", 110, "Hiking Backpack | Day Backpack | Roll-Top Backpack | Trekking Backpack", "day hikes and short flights | "
             "carrying everything for a week | steep trails", "recycled nylon | heavy canvas and leather | waterproof polyester"),
    Category("Frying Pans", 55, "Frying Pan | Skillet | Deep Frying Pan | Crepe Pan", "crisp potatoes and quick suppers | "
             "slow weekend breakfasts | searing fish and vegetables", "cast iron | forged aluminium | enamelled steel"),
    Category("Cutting Boards", 30, "Cutting Board | Carving Board | Bread Board | Serving Board", "chopping herbs and onions | "
             "fresh bread and cheese | busy family kitchens", "oiled beech | dense bamboo | end-grain maple"),
    Category("Kettles", 60, "Kettle | Whistling Kettle | Gooseneck Kettle | Stovetop Kettle", "the first tea of the day | "
             "careful pour-over coffee | long afternoons with guests", "brushed stainless steel | enamelled steel | copper and oak"),
    Category("Mugs", 16, "Mug | Coffee Mug | Breakfast Mug | Tea Mug", "strong drinks at the desk | hot chocolate in winter | "
             "a quiet moment in the afternoon", "glazed stoneware | fine porcelain | hand-thrown clay"),
    Category("Guitars", 320, "Acoustic Guitar | Folk Guitar | Parlour Guitar | Travel Guitar", "songs around the fire | practice at home | "
             "small stages and open evenings", "solid spruce and mahogany | maple with a satin finish | cedar and rosewood"),
    Category("Amplifiers", 210, "Guitar Amplifier | Practice Amplifier | Tube Amplifier | Combo Amplifier", "rehearsals in small rooms | "
             "warm, clear sound on stage | late practice at low volume", "birch plywood | steel and woven cloth | pine and vinyl"),
    Category("Headphones", 120, "Studio Headset | Wireless Headset | Over-Ear Headset | Listening Headset", "mixing late at night | "
             "long train rides | listening closely to old records", "aluminium and soft leather | foam and steel | walnut and wool felt"),
    Category("Turntables", 240, "Turntable | Belt-Drive Turntable | Portable Turntable | Record Player", "Sunday mornings at home | "
             "a first vinyl collection | evenings without a screen", "walnut veneer | heavy acrylic | lacquered fibreboard"),
)  # fmt: skip
STYLES = (
    Style("alpine", "Summit | Ridge | Glacier", "rugged | sturdy", "The zigzag pattern recalls snowy ridges. | It feels like fresh snow."),
    Style("nautical", "Harbour | Regatta | Tide", "fresh | breezy", "Its stripes bring the sea to mind. | It is as calm as a bay at dawn."),
    Style("retro", "Jukebox | Seventies | Diner", "playful | cheerful", "The big dots wink at the seventies. | It lifts everyone's mood."),
    Style("heritage", "Manor | Orchard | Highland", "classic | timeless", "The checks follow an old weave. | It could be a family piece."),
    Style("minimal", "Mono | Plain | Nordic", "simple | understated", "Nothing on it is there for show. | It keeps a room quiet."),
    Style("botanical", "Fern | Meadow | Grove", "natural | gentle", "Small leaves grow all over it. | It brings a bit of garden along."),
    Style("urban", "Metro | Skyline | District", "sharp | modern", "Bold diagonals give it pace. | It is at home on trains and rooftops."),
    Style("festival", "Carnival | Fiesta | Lumen", "bright | lively", "Rings spread all over it. | It likes company and loud evenings."),
)  # fmt: skip
COLOURS = {
    "forest green": (52, 116, 74), "sky blue": (100, 172, 224), "brick red": (184, 62, 52), "sunflower yellow": (242, 192, 58),
    "charcoal": (74, 78, 86), "sand": (208, 184, 146), "plum": (124, 66, 128), "teal": (32, 146, 142), "coral": (242, 126, 106),
    "navy": (42, 62, 122),
}  # fmt: skip
# The same number of brands in each department, in the order of CATEGORIES.
BRANDS = (
    "Northwind", "Tarnfell", "Cairnway", "Larkmoor", "Openfell", "Wolfsden", "Farpost", "Stillwater",
    "Juniper Pass", "Highcairn", "Loamfoot", "Brackenhill", "Skarnvik", "Trailwright", "Emberfold", "Kestrel Row",
    "Hearthly", "Copperleaf", "Maison Brule", "Oakspoon", "Saltbarn", "Potterby", "Nonna Livia", "Larder Lane",
    "Kitchenaire", "Morning Mill", "Fennel & Fig", "Ironroot", "Almstead", "Bluebowl", "Tallow Street", "Umbria Casa",
    "Resonair", "Blackbird Audio", "Fretwell", "Low Tide Sound", "Cantorelli", "Evenfield", "Lutherie Ost", "Stagecraft",
    "Vinylia", "Harmon & Reed", "Overtone", "Sixth String", "Amberwave", "Kadenza", "Quiet Room Labs", "Woodshed",
)  # fmt: skip
BRANDS_PER_DEPARTMENT = DEPARTMENT_SIZE * len(BRANDS) // len(CATEGORIES)
TITLES = "{brand} {line} {noun}, {colour} | {brand} {noun} in {colour} | {brand} {line} {noun} | {line} {noun} by {brand}"
OPENINGS = "{A} {adjective} {noun} for {use}. | This {noun} is made for {use}. | For {use}: {a} {adjective} {noun} from our {line} line."
MIDDLES = "It is made of {material} and easy to care for. | Made of {material}, it is built to last. | We chose {material} for a long life."

ATTRIBUTE_SIZES = (len(CATEGORIES), len(BRANDS), len(STYLES), len(COLOURS))

# Images, in the order of CATEGORIES: pieces painted one after the other, as "kind paint size x y x y ...", coordinates from 0
# to 100. The size is a box's corner radius, or the width of a line or an arc; arcs end with their two angles.
SIZE, OVERSAMPLING = 160, 2
SHADOW = "ellipse shadow 0 8 87 92 101"
SHAPES = (
    "line dark 3 44 16 50 24 56 16 | polygon body 0 50 22 96 90 4 90 | polygon dark 0 50 46 67 90 33 90 | "
    "polygon trim 0 50 46 35 90 22 90 | line deep 4 2 91 98 91",
    "box body 22 26 8 74 94 | box light 14 33 14 67 44 | box trim 7 36 17 64 32 | box deep 0 26 44 74 50 | line deep 3 64 50 64 84",
    "arc dark 4 30 4 70 48 180 360 | box glow 2 32 38 68 70 | line dark 2 41 38 41 70 | line dark 2 59 38 59 70 | "
    "polygon body 0 40 18 60 18 76 40 24 40 | box trim 3 22 38 78 44 | box body 5 24 68 76 92 | ellipse trim 0 45 75 55 85",
    "arc dark 5 38 2 62 30 180 360 | box deep 7 14 46 30 82 | box deep 7 70 46 86 82 | box body 18 22 14 78 92 | "
    "box trim 0 22 34 78 41 | box deep 7 32 54 68 84 | line light 3 38 62 62 62",
    "line dark 9 62 40 94 10 | line trim 9 76 27 94 10 | ellipse deep 0 4 26 72 94 | ellipse body 0 10 32 66 88 | "
    "arc light 3 17 39 59 81 185 250",
    "box body 8 42 4 58 34 | box body 10 20 24 80 96 | ellipse light 0 46 8 54 16 | box trim 0 20 80 80 86 | line deep 3 28 34 72 34",
    "arc dark 6 26 4 74 62 180 360 | polygon deep 0 66 60 92 36 98 40 76 82 | polygon body 0 34 36 66 36 84 90 16 90 | "
    "box deep 3 12 87 88 93 | box trim 4 32 30 68 38 | ellipse dark 0 45 22 55 32",
    "arc deep 8 52 40 88 76 270 90 | box body 9 16 32 68 92 | ellipse light 0 16 25 68 40 | ellipse dark 0 20 27 64 38 | "
    "box trim 0 16 78 68 83 | line white 3 34 18 38 12 34 6 | line white 3 48 18 52 12 48 6",
    "box dark 0 46 8 54 60 | box trim 3 43 2 57 16 | ellipse body 0 30 36 70 68 | ellipse body 0 22 50 78 98 | "
    "ellipse dark 0 41 52 59 70 | box deep 1 38 80 62 85 | line light 1 48 10 48 81 | line light 1 52 10 52 81",
    "arc dark 5 36 6 64 36 180 360 | box body 6 10 18 90 92 | box dark 4 18 40 82 84 | ellipse deep 0 30 42 70 82 | "
    "ellipse trim 0 43 55 57 69 | box light 2 18 25 82 35 | ellipse trim 0 24 27 30 33 | ellipse trim 0 38 27 44 33 | "
    "ellipse trim 0 56 27 62 33 | ellipse trim 0 70 27 76 33",
    "arc deep 8 14 10 86 96 180 360 | arc trim 5 30 9 70 26 190 350 | box dark 4 30 50 40 88 | box dark 4 60 50 70 88 | "
    "box body 12 6 44 34 94 | box body 12 66 44 94 94",
    "box body 6 4 20 96 86 | ellipse dark 0 12 23 72 83 | arc deep 1 20 31 64 75 0 360 | ellipse trim 0 32 43 52 63 | "
    "ellipse light 0 40 51 44 55 | line light 3 84 30 84 58 62 70 | ellipse trim 0 79 25 89 35 | box dark 2 10 86 90 91",
)


def generate(folder: str | Path, seed: int = 0, num_items: int = 1200, num_users: int = 3000, media: bool = False) -> dict[str, int]:
    """Write the shop to `folder` and return its counts; the same seed gives the same files.

    interactions.parquet is written last, so its presence means that the folder is complete.

    Args:
        folder: receives images/, items.parquet and interactions.parquet; earlier ones are replaced.
        media: most items also have a sound or a clip, on which purchases depend too (needs PyAV).

    Raises:
        ValueError: too few items for every category to have a choice of complements, or no users.
    """
    if num_items < 2 * len(CATEGORIES) or num_users < 1:
        raise ValueError(f"a demo shop needs at least {2 * len(CATEGORIES)} items and 1 user, got {num_items} and {num_users}")
    folder, rng = Path(folder), np.random.default_rng(seed)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    (folder / "interactions.parquet").unlink(missing_ok=True)
    catalog = build_catalog(rng, num_items)
    items = describe(catalog, rng)
    heard = np.random.default_rng([seed, 1])  # another stream: texts and images are those of the shop without media
    catalog = with_tunes_and_turns(catalog, heard) if media else catalog
    interactions = simulate_interactions(catalog, rng, num_users)
    images, broken = _write_images(folder / "images", catalog, items["item_id"].to_pylist(), rng)
    items = items.append_column("image", pa.array(images, pa.string()))
    pq.write_table(write_media(folder, items, catalog, heard) if media else items, folder / "items.parquet")
    pq.write_table(interactions, folder / "interactions.partial")
    (folder / "interactions.partial").replace(folder / "interactions.parquet")
    return {
        "items": num_items,
        "users": num_users,
        "interactions": interactions.num_rows,
        "without_image": images.count(None),
        "broken_images": broken,
        "without_description": items["description"].null_count,
    }


def build_catalog(rng: np.random.Generator, num_items: int) -> Catalog:
    """A catalog of random items; a brand sells in one department, mostly in one style, and in few colours."""
    order = rng.permutation(num_items)  # so that neither an item's number nor its position in the file is informative
    category = order % len(CATEGORIES)
    brand = category // DEPARTMENT_SIZE * BRANDS_PER_DEPARTMENT + order // len(CATEGORIES) % BRANDS_PER_DEPARTMENT
    house_style = rng.permutation(len(BRANDS)) % len(STYLES)
    house_colours = rng.permuted(np.tile(np.arange(len(COLOURS)), (len(BRANDS), 1)), axis=1)[:, :4]
    style = np.where(rng.random(num_items) < 0.7, house_style[brand], rng.integers(len(STYLES), size=num_items))
    colour = np.where(
        rng.random(num_items) < 0.8, house_colours[brand, rng.integers(4, size=num_items)], rng.integers(len(COLOURS), size=num_items)
    )
    base = np.array([category.price for category in CATEGORIES])[category] * rng.choice([0.7, 1.0, 1.5], len(BRANDS))[brand]
    popularity = 1.0 / (rng.permutation(num_items) + 3.0)
    availability = np.ones(num_items)
    availability[rng.choice(num_items, max(1, num_items // 120), replace=False)] = NEW_ITEM_WEIGHT
    return Catalog(
        attributes=np.stack([category, brand, style, colour], axis=1),
        price=np.round(base * rng.lognormal(0, 0.15, num_items)) - 0.05,
        popularity=popularity / popularity.sum(),
        availability=availability,
        sizes=ATTRIBUTE_SIZES,
    )


def describe(catalog: Catalog, rng: np.random.Generator) -> pa.Table:
    """The items table without its image column; some descriptions are missing."""
    texts = [_texts(item, rng) for item in catalog.attributes]
    missing = rng.random(len(texts)) < 0.04
    category, brand, style, colour = catalog.attributes.T
    return pa.table(
        {
            "item_id": [f"P{number:05d}" for number in range(len(texts))],
            "title": [title for title, _ in texts],
            "description": pa.array([None if gone else text for (_, text), gone in zip(texts, missing, strict=True)], pa.string()),
            "category": [CATEGORIES[index].name for index in category],
            "brand": [BRANDS[index] for index in brand],
            "style": [STYLES[index].name for index in style],
            "colour": [list(COLOURS)[index] for index in colour],
            "price": catalog.price,
        }
    )


def _texts(item: np.ndarray, rng: np.random.Generator) -> tuple[str, str]:
    """Title and description of one item, given by its [4] attributes."""
    category, brand, style, colour = item.tolist()
    kind, look = CATEGORIES[category], STYLES[style]
    noun, adjective = _pick(kind.nouns, rng), _pick(look.adjectives, rng)
    article = "an" if adjective[0] in "aeiou" else "a"
    words = {"brand": BRANDS[brand], "line": _pick(look.lines, rng), "colour": list(COLOURS)[colour]}
    title = _pick(TITLES, rng).format(noun=noun, **words)
    words |= {"noun": noun.lower(), "adjective": adjective, "use": _pick(kind.uses, rng), "material": _pick(kind.materials, rng)}
    sentences = [_pick(OPENINGS, rng)]
    sentences += [_pick(MIDDLES, rng)] if rng.random() < 0.7 else []
    sentences += [_pick(look.moods, rng)] if rng.random() < 0.6 else []
    return title, " ".join(sentences).format(A=article.capitalize(), a=article, **words)


def _pick(choices: str, rng: np.random.Generator) -> str:
    options = choices.split(" | ")
    return options[rng.integers(len(options))]


def _write_images(folder: Path, catalog: Catalog, item_ids: list[str], rng: np.random.Generator) -> tuple[list[str | None], int]:
    """The image column, and how many of its files are broken."""
    order = rng.permutation(len(item_ids))
    num_missing, num_broken = round(0.03 * len(item_ids)), max(3, len(item_ids) // 200)
    missing, broken = set(order[:num_missing].tolist()), order[num_missing : num_missing + num_broken].tolist()
    for number, (item_id, item) in enumerate(zip(item_ids, catalog.attributes[:, :4], strict=True)):
        if number in missing:
            continue
        buffer = BytesIO()
        draw_image(item, rng).save(buffer, "JPEG", quality=85)
        content = buffer.getvalue()
        if number in broken:
            content = (content[: len(content) // 3], b"", b"This is not a picture.\n")[broken.index(number) % 3]
        (folder / f"{item_id}.jpg").write_bytes(content)
    return [None if number in missing else f"images/{item_id}.jpg" for number, item_id in enumerate(item_ids)], num_broken


def draw_image(item: np.ndarray, rng: np.random.Generator) -> Image.Image:
    """A square image of one item, given by its [4] attributes; `rng` moves and scales it a little."""
    category, brand, style, colour = item.tolist()
    side = SIZE * OVERSAMPLING
    base, hue = list(COLOURS.values())[colour], brand * 0.618 % 1  # golden ratio: neighbours get hues far apart
    trim = tuple(round(255 * part) for part in colorsys.hsv_to_rgb(hue, 0.75, 0.85))
    paints = {
        "deep": _mix(base, (0, 0, 0), 0.35), "trim": trim, "dark": (44, 46, 54), "light": _mix(trim, (255, 255, 255), 0.8),
        "glow": (255, 226, 130), "white": (255, 255, 255),
    }  # fmt: skip
    canvas = Image.new("RGB", (side, side), _mix(trim, (250, 250, 248), 0.9))
    draw = ImageDraw.Draw(canvas)
    draw.ellipse((side * 0.05, side * 0.05, side * 0.95, side * 0.95), fill=_mix(trim, (255, 255, 255), 0.76))
    scale = side / 100 * rng.uniform(0.7, 0.8)
    corner = side / 2 - 50 * scale + rng.uniform(-0.02, 0.02, 2) * side
    _draw_piece(draw, SHADOW, scale, corner, _mix(trim, (190, 190, 198), 0.7))
    left, top = rng.integers(side // 5, size=2).tolist()
    cloth = Image.new("RGB", canvas.size, base)
    cloth.paste(_mix(base, (255, 255, 255), 0.42), mask=_patterns()[style].crop((left, top, left + side, top + side)))
    for piece in SHAPES[category].split(" | "):
        paint = piece.split()[1]
        if paint == "body":
            mask = Image.new("L", canvas.size)
            _draw_piece(ImageDraw.Draw(mask), piece, scale, corner, 255)
            canvas.paste(cloth, mask=mask)
        else:
            _draw_piece(draw, piece, scale, corner, paints[paint])
    return canvas.reduce(OVERSAMPLING)


@cache
def _patterns() -> list[Image.Image]:
    """One mask per style, in the order of STYLES, a fifth larger than an image so that each item can use another part."""
    x, y = np.meshgrid(*[np.arange(0, 120, 100 / SIZE / OVERSAMPLING)] * 2)
    shades = (
        (y + np.abs(x % 12 - 6)) // 4 % 2,  # zigzag
        y // 5 % 2,  # stripes
        np.hypot(x % 10 - 5, y % 10 - 5) < 2.8,  # dots
        (x // 6 % 2 + y // 6 % 2) / 2,  # checks
        y / 120,  # even, a little lighter below
        np.hypot((x + y) % 12 - 6, 2.2 * ((x - y) % 12 - 6)) < 4.5,  # leaves
        (x + y) // 7 % 2,  # diagonals
        np.hypot(x % 20 - 10, y % 20 - 10) // 2.5 % 2,  # rings
    )
    return [Image.fromarray((shade * 255).astype(np.uint8)) for shade in shades]


def _draw_piece(draw: ImageDraw.ImageDraw, piece: str, scale: float, corner: np.ndarray, fill: Any) -> None:
    """One piece of SHAPES in one colour, `scale` pixels for a unit of its coordinates."""
    kind, _, size, *numbers = piece.split()
    width, values = round(float(size) * scale), [float(number) for number in numbers]
    points = [value * scale + corner[axis % 2] for axis, value in enumerate(values[:4] if kind == "arc" else values)]
    if kind == "polygon":
        draw.polygon(points, fill=fill)
    elif kind == "ellipse":
        draw.ellipse(points, fill=fill)
    elif kind == "box":
        draw.rounded_rectangle(points, width, fill=fill)
    elif kind == "line":
        draw.line(points, fill=fill, width=width, joint="curve")
    else:
        draw.arc(points, values[4], values[5], fill=fill, width=width)


def _mix(colour: tuple[int, ...], other: tuple[int, ...], share: float) -> tuple[int, ...]:
    return tuple(round((1 - share) * mine + share * theirs) for mine, theirs in zip(colour, other, strict=True))
