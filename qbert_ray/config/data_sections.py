"""The section `data`: the user's files."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from qbert_ray.config.section import NonNegativeInt, PositiveFloat, PositiveInt, Section, paper

OF_TEXT_FIELDS = ("text", "lexical")  # modalities that read text_fields and attributes


class Inputs(Section):
    """What the items files give one modality; its kind says which of the three it reads."""

    files: list[str] = Field(
        [], description="columns with paths, URIs or bytes, one or a list in each cell: the images, sounds or clips of an item"
    )
    texts: list[str] = Field([], description="text columns; each gives one vector")
    values: list[str] = Field([], description="columns with numbers, categories or lists of tags; each gives one vector")


class Domain(Section):
    items: str = Field("items.parquet", description="catalog: file, folder or glob (Parquet, CSV, JSONL), under data.root")
    interactions: str = Field("interactions.parquet", description="histories: file, folder or glob, under data.root")
    validation: str | None = Field(
        None,
        description="with data.split=given: your validation interactions, file, folder or glob; interactions then are those for training",
    )
    test: str | None = Field(None, description="with data.split=given: your test interactions")
    role: Literal["target", "source"] = Field(
        "target", description="source: only pre-trained on; target: also fine-tuned", json_schema_extra=paper("§4.1")
    )
    format: Literal["auto", "amazon_2018", "amazon_2023"] = Field(
        "auto", description="raw Amazon review and metadata files, or the input contract"
    )
    item_columns: dict[Literal["item_id"], str] = Field({}, description="name of the column in the items file, where it is not item_id")
    interaction_columns: dict[Literal["user_id", "item_id", "timestamp", "rating", "event_type", "interaction_weight", "split"], str] = (
        Field({}, description="names of the columns in the interactions file, where they differ")
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
    inputs: dict[str, Inputs] = Field(
        {},
        description="modality -> columns of the items file that it reads, such as {audio: {files: [sound]}, tabular: {values: [price, brand]}}",
    )
    vectors: dict[str, str] = Field(
        {}, description="modality -> your own vectors (item_id, vector | vectors), which are used instead of encoding"
    )

    def inputs_of(self, modality: str) -> Inputs:
        """The columns that a modality reads, `text_fields` included."""
        given = self.inputs.get(modality, Inputs())
        return given.model_copy(update={"texts": [*self.text_fields, *given.texts]}) if modality in OF_TEXT_FIELDS else given

    def describes(self, modality: str) -> bool:
        """Whether the files have input for a modality, or vectors of one's own."""
        of_text, of_images = self.attributes, self.image_column is not None or self.image_template is not None
        named = of_images if modality == "image" else of_text and modality in OF_TEXT_FIELDS
        return bool(named) or modality in self.vectors or self.inputs_of(modality) != Inputs()

    @property
    def described(self) -> list[str]:
        """The modalities that the files have input or vectors for."""
        return [name for name in dict.fromkeys(["image", *OF_TEXT_FIELDS, *self.inputs, *self.vectors]) if self.describes(name)]


class Data(Section):
    root: str = Field(".", description="folder or URI that the domains' paths are relative to")
    domains: dict[str, Domain] = Field({"items": Domain()}, description="name -> one catalog with its interactions")
    semantic_ids: str | None = Field(None, description="semantic IDs made elsewhere (item_id, codes[, domain]): stages 1 and 2 are skipped")
    min_interactions: NonNegativeInt = Field(
        5,
        description="k of the iterative k-core over users and items; 0 if not set and data.split is given, so that a split of your own is used as it is",
        json_schema_extra=paper("§4.1: 5-core sets"),
    )
    min_item_interactions: NonNegativeInt | None = Field(
        None, description="k for items, where it differs; 0 keeps every item of the catalog"
    )
    min_rating: float | None = Field(None, description="drop interactions rated below")
    cold_share: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0,
        description="share of the target domains' items, chosen by a hash, that is held out of all training to measure cold-start ranking",
    )
    split: Literal["leave_one_out", "last_n", "temporal", "given"] = Field(
        "leave_one_out",
        description="leave_one_out: the last item of each user is the test target, the one before it the validation target; last_n: the last "
        "split_last of each user are the two periods; temporal: all users are cut at the same two times, needs real timestamps; given: your own, by the "
        "files validation and test of each domain or the column split of its interactions. The first item of each period is a target",
        json_schema_extra=paper("§4.1: leave-one-out"),
    )
    split_cuts: list[float | str] = Field(
        [0.8, 0.9],
        min_length=2,
        max_length=2,
        description="of a temporal split, where the validation and the test period begin: two dates such as '1998-03-01' (UTC), or shares of a "
        "domain's interactions that come before",
    )
    split_last: list[PositiveInt] = Field(
        [1, 1],
        min_length=2,
        max_length=2,
        description="of last_n: how many of each user's last interactions are for validation and for test",
    )
    rows_per_part: PositiveInt | None = Field(None, description="rows per Parquet part, the unit of work; None: follows from the row count")

    @model_validator(mode="before")
    @classmethod
    def _given_as_it_is(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("split") == "given":
            return {"min_interactions": 0} | values
        return values

    @model_validator(mode="after")
    def _own_files(self) -> Data:
        for name, domain in self.domains.items():
            own = [field for field in ("validation", "test") if getattr(domain, field) is not None]
            where = f"data.domains.{name}"
            if own and self.split != "given":
                raise ValueError(f"{where}.{own[0]} is only read with data.split=given, and data.split is {self.split}")
            if len(own) == 1:
                other = "test" if own == ["validation"] else "validation"
                raise ValueError(
                    f"{where}.{own[0]} is set and {where}.{other} is not: give both. Validation chooses the epoch and the blend, so it cannot be left "
                    "out; without such a file, data.split=leave_one_out holds out the last two interactions of each user"
                )
            if own and "split" in domain.interaction_columns:
                raise ValueError(f"{where} has files for validation and test, and interaction_columns.split as well: choose one of the two")
            files = [domain.interactions, domain.validation, domain.test]
            if own and len(set(files)) < len(files):
                raise ValueError(
                    f"{where}: interactions, validation and test are {', '.join(map(str, files))}: each needs files of its own"
                )
        return self

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
