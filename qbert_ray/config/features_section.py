"""The section `features`: which modalities there are, and how each kind of them becomes vectors.

A modality is a name; its kind says how its input is encoded. A section here has the settings of all modalities of its kind, which
`features.modalities` can change for one of them. `KINDS` lists the sections; `features/kinds/<kind>.py` does the work.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, JsonValue, ValidationError, model_validator

from qbert_ray.config.data_sections import Domain, Inputs
from qbert_ray.config.section import PositiveFloat, PositiveInt, Section, Share, Tree, paper


class Kind(Section):
    """Settings of the modalities of one kind."""

    reads: ClassVar[str | None] = None  # field of `Inputs` that it reads
    uses: ClassVar[tuple[str, ...]] = ()  # kinds whose settings it takes as well
    from_interactions: ClassVar[bool] = False  # made from training interactions, so that cold items lack it


class TextEncoder(Kind):
    reads = "texts"

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


class Lexical(Kind):
    reads = "texts"

    dim: PositiveInt = Field(512, description="D, singular vectors of the TF-IDF matrix that are kept")
    max_terms: PositiveInt = Field(20_000, description="most terms, the most frequent ones")
    fitted_on: PositiveInt = Field(
        100_000, description="most items, drawn at random, whose texts the terms and singular vectors are fitted on"
    )


class ImageEncoder(Kind):
    reads = "files"

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
    max_images: PositiveInt = Field(
        4,
        description="most images of an item with inputs.<modality>.files: J is max_images x grid x grid, and zeros fill up what an item lacks",
    )
    batch_size: PositiveInt = Field(32, description="images per forward pass")
    max_bytes: PositiveInt = Field(20_000_000, description="larger files are rejected")
    max_pixels: PositiveInt = Field(50_000_000, description="images with more pixels are rejected (decompression bombs)")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="number format of the encoder's computation")


class Structure(Kind):
    from_interactions = True

    dim: PositiveInt = Field(64, description="width of the collaborative vectors")
    window: PositiveInt = Field(50, description="latest training items of a user that count as co-occurring")


class Tabular(Kind):
    reads = "values"

    dim: Annotated[int, Field(ge=8)] = Field(
        64, description="width of the vectors, one per column: quantiles of numbers, hashed categories"
    )
    categories: list[str] = Field([], description="columns that hold categories although they look like numbers, such as a brand's number")


class AudioEncoder(Kind):
    reads = "files"

    model: str = Field(
        "log-mel",
        description="'log-mel' (mean, deviation and change per band and window; no weights), or anything AutoModel.from_pretrained takes for audio",
    )
    window_seconds: PositiveFloat = Field(1.0, description="length of a window, which gives one vector")
    max_windows: PositiveInt = Field(4, description="J: most windows of an item's sounds, at equal distances in a longer one")
    sample_rate: PositiveInt = Field(16_000, description="Hz that sounds are resampled to, in mono; a model has its own")
    bands: PositiveInt = Field(64, description="log-mel: bands; vectors are three times as wide")
    batch_size: PositiveInt = Field(32, description="windows per forward pass")
    max_bytes: PositiveInt = Field(50_000_000, description="larger files are rejected")
    max_seconds: PositiveFloat = Field(300.0, description="what comes later in a sound is not read")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="number format of a model's computation")


class VideoEncoder(Kind):
    reads = "files"
    uses = ("image", "audio")

    frames: Literal["uniform", "scenes"] = Field(
        "uniform",
        description="frames at equal distances, or the first and those that differ most from the one before; encoded by features.image",
    )
    max_frames: PositiveInt = Field(
        4, description="most frames of an item's clips; J is this, and features.audio.max_windows more with sound"
    )
    sound: bool = Field(True, description="also read the sound track, by features.audio")
    batch_size: PositiveInt = Field(32, description="frames per forward pass")
    max_bytes: PositiveInt = Field(100_000_000, description="larger files are rejected")
    max_seconds: PositiveFloat = Field(60.0, description="what comes later in a clip is not read")
    max_pixels: PositiveInt = Field(8_300_000, description="clips with more pixels per frame are rejected")
    max_decoded: PositiveInt = Field(3_000, description="frames that are decoded at most to choose among them")


class OwnVectors(Kind):
    """Vectors that are read and never made."""


KINDS: dict[str, type[Kind]] = {
    "text": TextEncoder,
    "image": ImageEncoder,
    "structure": Structure,
    "lexical": Lexical,
    "tabular": Tabular,
    "audio": AudioEncoder,
    "video": VideoEncoder,
    "vectors": OwnVectors,
}


def in_order(modalities: Iterable[str]) -> list[str]:
    """Modalities in the order in which models take them: those named as their kind first, then by name."""
    kinds = list(KINDS)
    return sorted(set(modalities), key=lambda name: (kinds.index(name) if name in KINDS else len(kinds), name))


class Features(Section):
    modalities: list[str] | dict[str, dict[str, JsonValue] | Literal[False] | None] | None = Field(
        None,
        description="what stage 1 fuses, where there is input for it: names of kinds, or a mapping of names of your own such as {text: {}, gallery: "
        "{kind: image, grid: 1}}, where false leaves one out; None: all that the domains have input for, and structure if one has none",
        json_schema_extra=paper("text and image (§3.3)"),
    )
    missing: dict[str, Share] = Field(
        {}, description="modality -> share of items, chosen by a hash, whose vectors are left out, to measure what a run loses without them"
    )
    noise: dict[str, Share] = Field(
        {}, description="modality -> share of items, chosen by a hash, whose vectors are replaced by random ones, to measure what those do"
    )
    text: TextEncoder = TextEncoder()
    image: ImageEncoder = ImageEncoder()
    structure: Structure = Structure()
    lexical: Lexical = Lexical()
    tabular: Tabular = Tabular()
    audio: AudioEncoder = AudioEncoder()
    video: VideoEncoder = VideoEncoder()

    @model_validator(mode="after")
    def _modalities(self) -> Features:
        names = self.modalities
        if names is None:
            return self
        wrong = next((name for name in names if not name.isidentifier()), None)
        if wrong is not None or not self.named or (isinstance(names, list) and len(set(names)) != len(names)):
            raise ValueError(
                f"features.modalities is {names}: name each of {', '.join(KINDS)} or of your own (letters, digits and _) at most once, at least one"
            )
        for name in self.named:
            self.settings(name)
        return self

    @property
    def named(self) -> list[str] | None:
        """Names of the modalities that are asked for, in order; None: what there is input for."""
        chosen = self.modalities
        return None if chosen is None else in_order(name for name in chosen if isinstance(chosen, list) or chosen[name] is not False)

    def kind(self, modality: str) -> str:
        """The kind of a modality; one that is no kind's name and has no `kind` has vectors of one's own."""
        kind = self._changes(modality).get("kind", modality if modality in KINDS else "vectors")
        if kind not in KINDS:
            raise ValueError(f"features.modalities.{modality}.kind is {kind!r}; there are {', '.join(KINDS)}")
        return str(kind)

    def settings(self, modality: str) -> Any:
        """The settings of a modality: those of its kind, with the changes that `modalities` makes.

        Raises:
            ValueError: a change names no setting of the kind, or a value that it cannot have.
        """
        kind = self.kind(modality)
        common = getattr(self, kind, OwnVectors())
        changes = {key: value for key, value in self._changes(modality).items() if key != "kind"}
        try:
            return KINDS[kind].model_validate(common.model_dump() | changes) if changes else common
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, (modality, *first["loc"])))
            known = ", ".join(KINDS[kind].model_fields) or "none"
            raise ValueError(f"features.modalities.{where}: {first['msg']}; settings of the kind {kind}: {known}") from None

    def is_from_interactions(self, modality: str) -> bool:
        """Whether a modality is made from training interactions, so that cold items lack it."""
        return KINDS[self.kind(modality)].from_interactions

    def _changes(self, modality: str) -> Tree:
        chosen = self.modalities
        return (chosen.get(modality) or {}) if isinstance(chosen, dict) else {}


def modalities_of(features: Features, domains: dict[str, Domain]) -> list[str]:
    """The modalities of a run, in order.

    By default those that are made from interactions join only where a domain has nothing else that tells its items apart, or where
    vectors of one's own are given: in training they encode which items the same users had, so the sequence model relies on them and
    ranks new interactions less well.
    """
    if features.named is not None:
        return features.named
    described = [domain.described for domain in domains.values()]
    bare = any(all(features.is_from_interactions(name) for name in names) for names in described)
    made = [name for name, kind in KINDS.items() if kind.from_interactions and bare]
    return in_order(["text", "image", *(name for names in described for name in names), *made])


TAKEN = ("sequencer", "ridge", "following", "content", "seen")  # names of score features that are no modalities


def check_inputs(features: Features, domains: dict[str, Domain]) -> None:
    """Raise ValueError if a domain gives a modality columns that its kind does not read, or a modality has neither kind nor vectors."""
    for domain, files in domains.items():
        for name, inputs in files.inputs.items():
            reads = KINDS[features.kind(name)].reads
            given = [field for field in Inputs.model_fields if getattr(inputs, field)]
            if given != [reads]:
                wanted = f"reads {reads}" if reads else f"reads no columns: set features.modalities.{name}.kind, one of {', '.join(KINDS)}"
                raise ValueError(
                    f"data.domains.{domain}.inputs.{name} names {' and '.join(given) or 'no columns'}; the kind {features.kind(name)} {wanted}"
                )
    for name in features.named or []:
        if features.kind(name) == "vectors" and not any(name in files.vectors for files in domains.values()):
            raise ValueError(
                f"features.modalities names {name!r}, which is none of the kinds {', '.join(KINDS)}; give its kind, as in "
                f"{{{name}: {{kind: image}}}}, or vectors of your own: data.domains.<name>.vectors.{name}"
            )
    known = modalities_of(features, domains)
    taken = next((name for name in known if name in TAKEN or name.endswith("rejected")), None)
    if taken is not None:
        raise ValueError(f"a modality cannot be called {taken!r}, since scores or tables are called so; choose another name")
    unknown = [f"{field}.{name}" for field in ("missing", "noise") for name in getattr(features, field) if name not in known]
    if unknown:
        raise ValueError(f"features.{unknown[0]}: the run has no such modality; it has {', '.join(known)}")
