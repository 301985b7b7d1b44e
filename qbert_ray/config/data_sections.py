"""The sections `data` and `features`: the user's files, and the vectors that are made from them."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Annotated, Literal

from pydantic import Field, model_validator

from qbert_ray.config.section import NonNegativeInt, PositiveFloat, PositiveInt, Section, paper

Modality = Literal["text", "image", "structure"]


class Domain(Section):
    items: str = Field("items.parquet", description="catalog: file, folder or glob (Parquet, CSV, JSONL), under data.root")
    interactions: str = Field("interactions.parquet", description="histories: file, folder or glob, under data.root")
    role: Literal["target", "source"] = Field(
        "target", description="source: only pre-trained on; target: also fine-tuned", json_schema_extra=paper("§4.1")
    )
    format: Literal["auto", "amazon_2018", "amazon_2023"] = Field(
        "auto", description="raw Amazon review and metadata files, or the input contract"
    )
    item_columns: dict[Literal["item_id"], str] = Field({}, description="name of the column in the items file, where it is not item_id")
    interaction_columns: dict[Literal["user_id", "item_id", "timestamp", "rating", "event_type", "interaction_weight"], str] = Field(
        {}, description="names of the columns in the interactions file, where they differ"
    )
    event_weights: dict[str, PositiveFloat] = Field(
        {},
        description="event type -> weight of its interactions, such as {purchase: 1, cart: 0.5, view: 0.1}; other types are left out. Empty: "
        "no column event_type is read",
    )
    text_fields: list[str] = Field(
        ["title"], description="text columns; each gives one of the J text vectors of an item", json_schema_extra=paper("Eq. 3")
    )
    attributes: list[str] = Field([], description="columns kept for reports; each also gives one text vector")
    image_column: str | None = Field(None, description="path relative to the items file, URI, or bytes")
    image_schemes: list[Literal["http", "https", "s3", "gs", "gcs", "abfs", "abfss", "hdfs"]] = Field(
        ["https", "s3", "gs", "gcs"],
        description="of addresses in the image column that are followed; of abfs, abfss and hdfs only the hosts that image_hosts names",
    )
    image_hosts: list[str] = Field(
        [],
        description="web hosts and buckets that the image column may name, such as '*.example.com'; empty: any public host. A host that is "
        "named without * may have a private address",
    )
    follow_links: bool = Field(False, description="symbolic links in the folder of the data may lead outside it")
    image_template: str | None = Field(
        None, description="path of images named by ID, such as covers/{item_id}.jpg or {item_id:.3}/{item_id}.jpg"
    )
    text_features: str | None = Field(None, description="your own vectors (item_id, vector | vectors) instead of encoding text")
    image_features: str | None = Field(None, description="your own vectors instead of encoding images")
    structure_features: str | None = Field(None, description="your own vectors instead of collaborative ones")


class Data(Section):
    root: str = Field(".", description="folder or URI that the domains' paths are relative to")
    domains: dict[str, Domain] = Field({"items": Domain()}, description="name -> one catalog with its interactions")
    semantic_ids: str | None = Field(None, description="semantic IDs made elsewhere (item_id, codes[, domain]): stages 1 and 2 are skipped")
    min_interactions: NonNegativeInt = Field(
        5, description="k of the iterative k-core over users and items", json_schema_extra=paper("§4.1: 5-core sets")
    )
    min_item_interactions: NonNegativeInt | None = Field(
        None, description="k for items, where it differs; 0 keeps every item of the catalog"
    )
    min_rating: float | None = Field(None, description="drop interactions rated below")
    cold_share: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0,
        description="share of the target domains' items, chosen by a hash, that is held out of all training to measure cold-start ranking",
    )
    split: Literal["leave_one_out", "temporal"] = Field(
        "leave_one_out",
        description="leave_one_out: the last item of each user is the test target, the one before it the validation target; temporal: all users are "
        "cut at the same two times, and the first item of each period is a target; needs real timestamps",
        json_schema_extra=paper("§4.1: leave-one-out"),
    )
    split_cuts: list[float | str] = Field(
        [0.8, 0.9],
        min_length=2,
        max_length=2,
        description="of a temporal split, where the validation and the test period begin: two dates such as '1998-03-01' (UTC), or shares of a "
        "domain's interactions that come before",
    )
    rows_per_part: PositiveInt | None = Field(None, description="rows per Parquet part, the unit of work; None: follows from the row count")

    @model_validator(mode="after")
    def _some_domain(self) -> Data:
        if not self.domains:
            raise ValueError("data.domains is empty: name at least one domain")
        if not any(domain.role == "target" for domain in self.domains.values()):
            raise ValueError("no domain has role: target, so there is nothing to fine-tune or evaluate")
        wrong = [name for name in self.domains if not re.fullmatch(r"\w[\w-]*", name)]
        if wrong:
            raise ValueError(f"{wrong[0]!r} cannot name a domain: letters, digits, '_' and '-' can, since files are named after it")
        return self

    @model_validator(mode="after")
    def _cuts_in_order(self) -> Data:
        valid, test = cuts = self.split_cuts
        if isinstance(valid, str) and isinstance(test, str):
            try:
                first, second = (datetime.fromisoformat(cut) for cut in (valid, test))
                in_order = first.replace(tzinfo=first.tzinfo or UTC) < second.replace(tzinfo=second.tzinfo or UTC)
            except ValueError:
                raise ValueError(f"split_cuts is {cuts}: write dates as 1998-03-01 or 1998-03-01T12:00, or two shares") from None
        elif isinstance(valid, float) and isinstance(test, float):
            if not (0 < valid < 1 and 0 < test < 1):
                raise ValueError(f"split_cuts is {cuts}: shares of the interactions lie between 0 and 1; times are written as dates")
            in_order = valid < test
        else:
            raise ValueError(f"split_cuts is {cuts}: give two dates or two shares")
        if not in_order:
            raise ValueError(f"split_cuts is {cuts}: validation must begin before the test period")
        return self

    @property
    def targets(self) -> list[str]:
        return [name for name, domain in self.domains.items() if domain.role == "target"]

    @property
    def sources(self) -> list[str]:
        return [name for name, domain in self.domains.items() if domain.role == "source"]


class TextEncoder(Section):
    model: str = Field(
        "minilm",
        description="'minilm' or 'smollm2' (offline packages), or anything AutoModel.from_pretrained takes",
        json_schema_extra=paper("LLaMA"),
    )
    gguf_file: str | None = Field(None, description="GGUF file inside the model folder or repository")
    pooling: Literal["mean", "last"] = Field("mean", description="mean over tokens, or the last token (decoder-only models)")
    layer: int = Field(-1, description="hidden layer that is pooled; -1 is the output of the last")
    prompt: str = Field("{text}", description="what is encoded; {text} is the field's text")
    max_tokens: PositiveInt = Field(128, description="longer texts are cut")
    batch_size: PositiveInt = Field(64, description="texts per forward pass")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="number format of the encoder's computation")

    @model_validator(mode="after")
    def _prompt_holds_text(self) -> TextEncoder:
        if "{text}" not in self.prompt:
            raise ValueError(f"features.text.prompt is {self.prompt!r}: it must contain {{text}}")
        return self


class ImageEncoder(Section):
    model: str = Field(
        "efficientnet-lite0",
        description="'efficientnet-lite0' (offline package) or any open_clip model",
        json_schema_extra=paper("CLIP ViT"),
    )
    pretrained: str | None = Field(None, description="open_clip's tag or a path to weights")
    image_size: PositiveInt | None = Field(None, description="pixels per side; None: what the model was trained with")
    grid: PositiveInt = Field(
        2, description="the patch grid is pooled to grid x grid vectors, the J image vectors", json_schema_extra=paper("Eq. 3")
    )
    batch_size: PositiveInt = Field(32, description="images per forward pass")
    max_bytes: PositiveInt = Field(20_000_000, description="larger files are rejected")
    max_pixels: PositiveInt = Field(50_000_000, description="images with more pixels are rejected (decompression bombs)")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="number format of the encoder's computation")


class Structure(Section):
    dim: PositiveInt = Field(64, description="width of the collaborative vectors")
    window: PositiveInt = Field(50, description="latest training items of a user that count as co-occurring")


class Features(Section):
    modalities: list[Modality] | None = Field(
        None,
        description="what stage 1 fuses, where there is input for it; None: text and image, and structure too if a domain has neither",
        json_schema_extra=paper("text and image (§3.3)"),
    )
    text: TextEncoder = TextEncoder()
    image: ImageEncoder = ImageEncoder()
    structure: Structure = Structure()

    @model_validator(mode="after")
    def _some_modality(self) -> Features:
        if self.modalities is not None and (not self.modalities or len(set(self.modalities)) != len(self.modalities)):
            raise ValueError(f"features.modalities is {self.modalities}: name each of text, image, structure at most once, at least one")
        return self
