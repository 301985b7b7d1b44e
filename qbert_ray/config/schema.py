"""Every setting of a run: name, unit, default, the paper's value and section.

One frozen `Config` describes a whole run; `loading.load_config` reads it. What follows from other fields (number of levels
of given IDs, widths of features) is not a field but derived where it is used. `compute` is never part of a stage's
fingerprint, since machines change the time and not the result.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from qbert_ray.config.compute_section import Actors, Compute, Workers
from qbert_ray.config.data_sections import Data, Domain, Inputs
from qbert_ray.config.features_section import Features, ImageEncoder, TextEncoder, check_inputs, modalities_of
from qbert_ray.config.ranking_sections import Evaluate, Gates, Ranking, Refit, Score
from qbert_ray.config.search import Sweep
from qbert_ray.config.section import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Section, Share, heads_divide, paper
from qbert_ray.config.serve_section import Serve

__all__ = [
    "Actors",
    "Compute",
    "Config",
    "Data",
    "Domain",
    "Features",
    "ImageEncoder",
    "Inputs",
    "Ranking",
    "Section",
    "TextEncoder",
    "Workers",
]
# re-exported from the other modules of this package

MaskStrategy = Literal["span", "tail", "multi_region", "random"]


class Run(Section):
    dir: str = Field("runs/run", min_length=1, description="run directory: a local path or an s3:// or gs:// URI")
    seed: NonNegativeInt = Field(0, description="seeds initialisation, batch order, masks and dropout")
    deterministic: bool = Field(
        False, description="equal runs on equal machines give equal weights to the bit: trainings have one thread, so they take longer"
    )
    log: Literal["auto", "text", "json"] = Field(
        "auto", description="text: progress bars and tables; json: one JSON object per event and line; auto: text at a terminal"
    )
    tensorboard: bool = Field(True, description="write each epoch's metrics to <folder>/tensorboard")
    mlflow: str | None = Field(None, description="tracking URI of an MLflow server (needs mlflow-skinny); each training is a run there")


class Training(Section):
    """What the three trainings share."""

    epochs: PositiveInt = Field(20, description="most passes over the training data")
    batch_size: PositiveInt = Field(512, description="global: over all workers")
    microbatches: PositiveInt = Field(
        2,
        description="pieces of a batch, each with its own random state; any number of workers up to it gives the same model",
    )
    learning_rate: PositiveFloat = Field(1e-3, description="learning rate of AdamW after the warm-up")
    weight_decay: NonNegativeFloat = Field(0.01, description="of AdamW")
    warmup_steps: NonNegativeInt = Field(100, description="linear warm-up of the learning rate, in steps")
    schedule: Literal["constant", "cosine"] = Field("constant", description="learning rate after the warm-up; cosine: falls to a twentieth")
    patience: PositiveInt | None = Field(
        None, description="epochs without a better validation metric before stopping; None: run all epochs"
    )
    averaging: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="decay of the exponential average of weights; 0: off")
    gradient_clip: PositiveFloat = Field(1.0, description="largest gradient norm")


class ItemTraining(Training):
    """A training on the catalog, which has no validation items."""

    patience: None = Field(None, description="nothing is measured on validation items: all epochs are run")


class Fusion(ItemTraining):
    """Stage 1, §3.3."""

    epochs: PositiveInt = 15
    batch_size: PositiveInt = 512
    width: PositiveInt = Field(128, description="D, width of the model")
    num_layers: PositiveInt = Field(5, description="largest depth of the dynamic transformer", json_schema_extra=paper("§4.1: 5"))
    num_heads: PositiveInt = Field(4, description="H, attention heads")
    ffn_width: PositiveInt = Field(256, description="hidden width of a layer's MLP")
    dropout: Share = Field(0.1, description="share of activations that training drops")
    dynamic: bool = Field(True, description="false: all items take all layers", json_schema_extra=paper("Table 5, traditional fusion"))
    halt_threshold: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.75, description="accumulated halting probability that ends an item's depth"
    )
    ponder_weight: NonNegativeFloat = Field(1.0, description="weight of the loss that holds a batch's expected depth at its target")
    ponder_target: Annotated[float, Field(ge=1)] = Field(1.6, description="target of the expected depth, averaged over a batch, in layers")
    temperature: PositiveFloat = Field(0.1, description="tau of the alignment, Eq. 3", json_schema_extra=paper("Eq. 3"))
    contrast_temperature: PositiveFloat = Field(0.07, description="temperature of InfoNCE, Eq. 5", json_schema_extra=paper("Eq. 5"))
    consistency_weight: NonNegativeFloat = Field(0.01, description="lambda of Eq. 5", json_schema_extra=paper("Eq. 5"))
    geometry_weight: NonNegativeFloat = Field(
        30.0,
        description="weight of the loss that holds cosines of fused embeddings at the mean cosine of the modalities; 0: Eq. 5 alone",
        json_schema_extra=paper("Eq. 5"),
    )
    id_dropout: Share = Field(0.2, description="share of items trained with the shared query of cold items instead of their ID embedding")

    @model_validator(mode="after")
    def _heads_divide(self) -> Fusion:
        heads_divide("fusion", self.width, self.num_heads)
        return self


class Quantizer(ItemTraining):
    """Stage 2, §3.4 and §4.1. Only the quantizer rqvae is trained by gradients, and reads what the trainings share."""

    kind: Literal["kmeans", "rqvae", "opq"] = Field(
        "kmeans", description="residual k-means, RQ-VAE (the paper's), or optimised product quantization (codes independent of each other)"
    )
    extra_quantizers: list[Literal["kmeans", "opq"]] = Field(
        ["opq", "kmeans"],
        description="further quantizers of the same embeddings; the sequence model reads their K codes each in addition to the semantic ID",
    )
    max_items: PositiveInt = Field(500_000, description="items drawn at random to fit it on; their embeddings are held in memory")
    epochs: PositiveInt = 100
    batch_size: PositiveInt = Field(1024, json_schema_extra=paper("§4.1: 1024"))
    learning_rate: PositiveFloat = Field(1e-3, json_schema_extra=paper("§4.1: 0.001"))
    weight_decay: NonNegativeFloat = 0.0
    warmup_steps: NonNegativeInt = 0
    num_levels: PositiveInt = Field(4, description="K, codes of an ID", json_schema_extra=paper("§4.1: 4"))
    codebook_size: Annotated[int, Field(ge=2)] = Field(256, description="M, codewords of a level", json_schema_extra=paper("§4.1: 256"))
    codebook_dim: PositiveInt = Field(32, description="E, width of a codeword", json_schema_extra=paper("§4.1: 32"))
    hidden: list[PositiveInt] = Field([512, 256, 128], description="widths of the encoder's hidden layers; the decoder has them in reverse")
    commitment_weight: NonNegativeFloat = Field(0.25, description="beta of Eq. 8", json_schema_extra=paper("Eq. 8"))
    shortcut: bool = Field(
        True, description="a linear path parallel to the MLPs, initialised with the principal axes", json_schema_extra=paper("none")
    )
    warmup_epochs: NonNegativeInt = Field(10, description="epochs of the plain autoencoder before k-means++ starts the codebooks")

    @field_validator("averaging")
    @classmethod
    def _follows_the_codewords(cls, value: float) -> float:
        if value:
            raise ValueError(
                "quantizer.averaging must be 0: codewords are placed between steps, which an average of weights does not follow"
            )
        return value


class Sequencer(Section):
    """Stage 3, §3.5-3.6 and §4.1."""

    kind: Literal["masked", "generative"] = Field(
        "masked",
        description="the paper's masked encoder, or an encoder-decoder that writes the next item's ID code by code (TIGER), by codes alone",
    )
    beam: PositiveInt = Field(20, description="generative: most IDs kept at every level while the best items are searched for")
    head_width: PositiveInt | None = Field(None, description="generative: width of an attention head; None: width / num_heads")
    width: PositiveInt = Field(128, description="D, width of the model", json_schema_extra=paper("256 (Table 6)"))
    num_layers: PositiveInt = Field(2, description="layers of the encoder", json_schema_extra=paper("§4.1: 4"))
    num_heads: PositiveInt = Field(4, description="H, attention heads", json_schema_extra=paper("§4.1: 4"))
    ffn_width: PositiveInt = Field(256, description="hidden width of a layer's MLP", json_schema_extra=paper("512 (Table 6)"))
    dropout: Share = Field(0.4, description="share of activations that training drops", json_schema_extra=paper("§4.1: 0.2"))
    max_items: Annotated[int, Field(ge=2)] = Field(
        50, description="T, most items of a sequence, the masked one included", json_schema_extra=paper("Table 6")
    )
    tokens: Literal["item", "flat", "word"] = Field(
        "item",
        description="item: one position per item, the sum of its codes; flat: K positions per item; word: each semantic ID is one word, whose embedding starts from its codes",
    )
    loss: Literal["catalog", "tokens"] = Field(
        "catalog", description="softmax over the domain's items, or per-level cross-entropy", json_schema_extra=paper("Eq. 11")
    )
    token_weight: NonNegativeFloat = Field(
        1.0,
        description="loss catalog: weight of the per-level cross-entropy that is added to the softmax over items; not with tokens: word",
        json_schema_extra=paper("Eq. 11 alone"),
    )
    logits: Literal["dot", "cosine"] = Field("cosine", description="dot product, or cosine over temperature")
    temperature: PositiveFloat = Field(0.07, description="of cosine logits")
    start: Literal["codebooks", "random"] = Field("codebooks", description="initial code embeddings: rotated codewords, or random ones")
    item_start: Literal["collaborative", "random"] = Field(
        "collaborative", description="initial item embeddings: collaborative vectors of the training interactions, rotated, or random ones"
    )
    content: Literal["modalities", "fused", "none"] = Field(
        "modalities",
        description="add a projection of an item's vectors in each modality, or of its fused embedding, to its codes' embeddings",
        json_schema_extra=paper("none"),
    )
    code_dropout: Share = Field(
        0.2, description="share of items whose codes are hidden in training, as a cold item's codes are new; needs content"
    )
    recall: bool = Field(True, description="add a recency-weighted mean of the history's item vectors to the query; not with tokens: flat")
    repeats: bool = Field(True, description="a sequence model alone adds a number to scores of the history's items; needs loss: catalog")
    item_embedding: bool = Field(
        True, description="add an embedding per item to its composed vector; zero for cold items; needs loss: catalog, and not tokens: flat"
    )

    @property
    def embeds_items(self) -> bool:
        """Whether items have embeddings of their own that the head trains too; scores of codes alone do not include them."""
        return (self.item_embedding or self.tokens == "word") and self.tokens != "flat" and self.loss == "catalog"

    @model_validator(mode="after")
    def _fits_together(self) -> Sequencer:
        if self.kind == "masked" or self.head_width is None:
            heads_divide("sequencer", self.width, self.num_heads)
        if self.tokens == "word" and self.loss == "tokens":
            raise ValueError("sequencer.tokens=word needs sequencer.loss=catalog: a word has no levels to predict one by one")
        return self


class SequenceTraining(Training):
    objective: Literal["masked", "causal"] = Field(
        "masked",
        description="masked: predict masked items from both sides; causal: every position predicts the next item",
        json_schema_extra=paper("masked (§3.5)"),
    )
    sampled_items: PositiveInt | None = Field(
        16384,
        description="random items of a causal objective's softmax, with those of the batch, for catalogs of more than twice as many; None: always the whole catalog",
    )
    exclude_own_items: bool | None = Field(
        None, description="leave a sequence's other items out of a causal softmax; None: where less than a twentieth of items are repeats"
    )
    masks: dict[MaskStrategy, PositiveFloat] = Field({"random": 1.0}, description="strategy -> weight with which a sequence draws it")
    mask_ratio: dict[MaskStrategy, Share] = Field(
        {"span": 0.3, "tail": 0.1, "multi_region": 0.15, "random": 0.3},
        description="share of a sequence's items that a strategy masks",
        json_schema_extra=paper("§4.1"),
    )
    last_item_share: Share = Field(0.2, description="share of sequences that mask their last item alone, as at inference")
    prefix_share: Share = Field(
        0.0, description="share of last-item samples truncated at a random position, redrawn each epoch", json_schema_extra=paper("none")
    )

    @model_validator(mode="after")
    def _ratios(self) -> SequenceTraining:
        missing = [name for name in self.masks if name not in self.mask_ratio]
        if not self.masks or missing:
            raise ValueError(f"masks must name at least one strategy and mask_ratio one for each; missing: {missing}")
        return self


class Pretrain(SequenceTraining):
    enabled: bool = Field(
        True, description="false: fine-tuning starts from a fresh model, as it does where it is causal and there is no source domain"
    )
    epochs: PositiveInt = 5
    batch_size: PositiveInt = Field(128, json_schema_extra=paper("§4.1: 512 sequences"))
    microbatches: PositiveInt = 1
    learning_rate: PositiveFloat = Field(2e-3, json_schema_extra=paper("§4.1: 0.0005"))
    masks: dict[MaskStrategy, PositiveFloat] = Field({"span": 1.0, "tail": 1.0, "multi_region": 1.0}, json_schema_extra=paper("§3.5"))
    domains: list[str] | None = Field(None, description="None: the source domains, or the targets where there is no source")


class Finetune(SequenceTraining):
    epochs: PositiveInt = 10
    batch_size: PositiveInt = Field(128, json_schema_extra=paper("§4.1: 256 sequences"))
    learning_rate: PositiveFloat = Field(1e-3, json_schema_extra=paper("§4.1: 0.0001"))
    microbatches: PositiveInt = 1
    patience: PositiveInt | None = 5
    objective: Literal["masked", "causal"] = "causal"
    schedule: Literal["constant", "cosine"] = "cosine"
    averaging: Annotated[float, Field(ge=0, lt=1)] = 0.995
    last_item_share: Share = 0.4
    prefix_share: Share = 1.0
    validation_users: PositiveInt = Field(
        5000,
        description="users, chosen by hash, whose validation items are ranked among unseen items after each epoch; a generative model takes at most 2,000",
    )
    transfer: Literal["layers", "all"] = Field(
        "layers",
        description="weights taken from a pre-training on other domains: the encoder's layers, or all; a pre-training on the same domain is taken whole",
    )


class Config(Section):
    """Every setting of a run; a section per step. Frozen, unknown keys are refused, and the defaults are what measured best."""

    run: Run = Run()
    data: Data = Data()
    features: Features = Features()
    fusion: Fusion = Fusion()
    quantizer: Quantizer = Quantizer()
    sequencer: Sequencer = Sequencer()
    pretrain: Pretrain = Pretrain()
    finetune: Finetune = Finetune()
    ranking: Ranking = Ranking()
    refit: Refit = Refit()
    gates: Gates = Gates()
    evaluate: Evaluate = Evaluate()
    score: Score = Score()
    serve: Serve = Serve()
    sweep: Sweep = Sweep()
    compute: Compute = Compute()

    @model_validator(mode="after")
    def _beams_suffice(self) -> Config:
        wanted = max([self.score.top_k, *self.evaluate.cutoffs])
        if self.sequencer.kind == "generative" and wanted > self.sequencer.beam:
            raise ValueError(
                f"sequencer.beam is {self.sequencer.beam}: items outside the beams have no rank, so it must be at least {wanted}, "
                "the largest of score.top_k and evaluate.cutoffs"
            )
        return self

    @model_validator(mode="after")
    def _prefixes_have_scores(self) -> Config:
        if self.score.prefixes is not None and self.sequencer.kind == "generative":
            raise ValueError("score.prefixes needs sequencer.kind=masked: the generative model searches prefixes by beams (sequencer.beam)")
        return self

    @model_validator(mode="after")
    def _histories_of_each_domain(self) -> Config:
        for name in ("interactions", "histories"):
            path = getattr(self.score, name)
            if path and len(self.data.targets) > 1 and "{domain}" not in path:
                raise ValueError(
                    f"score.{name} is {path!r}; with the target domains {', '.join(self.data.targets)} it must contain {{domain}}"
                )
        return self

    @model_validator(mode="after")
    def _causal_reads_items(self) -> Config:
        trainings = {"pretrain": self.pretrain, "finetune": self.finetune}
        causal = [name for name, training in trainings.items() if training.objective == "causal"]
        if causal and self.sequencer.kind == "masked" and self.sequencer.tokens == "flat":
            raise ValueError(f"sequencer.tokens=flat needs {causal[0]}.objective=masked: a causal model has one position for each item")
        return self

    @model_validator(mode="after")
    def _inputs_of_kinds(self) -> Config:
        check_inputs(self.features, self.data.domains)
        return self

    @property
    def modalities(self) -> list[str]:
        """The modalities of a run, in order; those that no domain has input for are among them."""
        return modalities_of(self.features, self.data.domains)

    @property
    def pretrained(self) -> list[str]:
        """Domains that stage 3 pre-trains on."""
        return self.pretrain.domains or self.data.sources or self.data.targets

    @property
    def no_pretraining(self) -> str | None:
        """Why stage 3 does not pre-train; None if it does."""
        if not self.pretrain.enabled:
            return "pretrain.enabled is false"
        on_prefixes = self.sequencer.kind == "generative" or self.finetune.objective == "causal"
        if on_prefixes and not (self.pretrain.domains or self.data.sources):
            return "fine-tuning reads every prefix of the target's histories anyway, and there is no source domain"
        return None

    @property
    def no_blend(self) -> str | None:
        """Why the sequence model ranks alone; None if its scores are blended with item-item weights and reranked."""
        if not self.ranking.enabled:
            return "ranking.enabled is false"
        return "beams have no scores of other items to blend" if self.sequencer.kind == "generative" else None
