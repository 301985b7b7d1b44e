"""Sections of the config for what comes after the sequence model: ranking, training again, gates, evaluation and scoring."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from qbert_ray.config.section import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Section, Share, paper


class Ranking(Section):
    """Item-item weights, their blend with the sequence model's scores, and the reranker; not in the paper."""

    enabled: bool = Field(True, description="blend item-item scores into the ranking")
    sequence_scores: bool = Field(True, description="false: rank without the sequence model's scores, to measure what they add")
    regularisation: PositiveFloat | Literal["auto"] = Field(
        100.0,
        description="ridge penalty of the item-item regression, in users; auto: of 10, 30, 100, 300 and 1000 the best on validation items, at six "
        "times the cost of the weights",
    )
    neighbours: PositiveInt = Field(200, description="most neighbours of an item in the regression; time and table grow with it")
    decay: Share | Literal["auto"] = Field(
        0.85, description="decay of the history's items per step back, for the regression; auto: of .3 to 1 the best on validation items"
    )
    following_window: PositiveInt = Field(5, description="largest number of steps of a transition")
    following_decay: Share = Field(0.5, description="decay of a transition's weight per step, and of the history's items per step back")
    following_shrinkage: NonNegativeFloat = Field(5.0, description="added to an item's transition count, so that rare items weigh little")
    scale: PositiveFloat = Field(0.01, description="item-item features are log(1 + score / scale)")
    candidates: PositiveInt = Field(50, description="best items by each score feature that the blend is fitted on")
    validation_users: PositiveInt = Field(5000, description="users, chosen by hash, whose validation items the blend is fitted on")
    rerank: NonNegativeInt = Field(64, description="best items by the blend that a small network reorders; 0: the blend alone")
    rerank_users: PositiveInt = Field(20000, description="users, chosen by hash, whose validation items the reranker is fitted on")
    new_item_bonus: float = Field(0.5, description="added to scores of cold items, otherwise shown as rarely as they are bought")


class Refit(Section):
    """Training again, once everything is chosen, with interactions that were held out; not in the paper."""

    include: Literal["none", "validation", "all"] = Field(
        "none",
        description="held-out interactions that the sequence model and the item-item weights are trained on again: validation: those before the test "
        "items, which evaluate then ranks by these models; all: every one, for score, serve and Recommender, where evaluate ranks by the models "
        "without them",
    )


class Gates(Section):
    """Quality bars of the semantic IDs; a run that misses one stops, and resumes when the bar is lowered."""

    min_usage: Share = Field(0.5, description="least share of codewords in use at every level; not checked with fewer than 4 M items")
    max_raw_collision: Share | None = Field(None, description="1 - distinct IDs / items of a domain before reallocation; None: any")


class Evaluate(Section):
    cutoffs: list[PositiveInt] = Field([1, 5, 10], min_length=1, description="k of hr@k and ndcg@k", json_schema_extra=paper("§4.1"))
    users: PositiveInt | None = Field(
        None, description="users, chosen by hash, whose test items are ranked; intervals say what the sample leaves open. None: all"
    )
    co_occurrence_history: PositiveInt = Field(20, description="latest items of a history that the co-occurrence baseline sums over")


class Score(Section):
    top_k: PositiveInt = Field(10, description="items per user")
    remove_seen: bool = Field(True, description="never recommend items of the user's history")
    prefixes: PositiveInt | None = Field(
        None,
        description="for large catalogs: rank only the items of so many prefixes of semantic IDs per user, those whose items the sequence model "
        "scores best on average, and items with item-item weights to the history; lists may then lack items. None: the whole catalog",
    )
    interactions: str | None = Field(
        None,
        description="newer interactions, under data.root and with the columns of the domain's: they come on top of the histories of the run, "
        "for which nothing is trained again. {domain} is replaced by the domain's name",
    )
    histories: str | None = Field(
        None,
        description="histories of other users, scored by qbert-ray score --histories into score_histories: interactions, or user_id and history, "
        "a list of item_id. {domain} is replaced by the domain's name",
    )
    exclude: str | None = Field(
        None,
        description="items that are not recommended: a table under data.root with item_id, or with user_id and item_id; or an expression over "
        "columns of the items files, such as in_stock == false. {domain} is replaced by the domain's name",
    )
    allow: str | None = Field(
        None,
        description="items of which the recommended ones are taken, in the same forms; a user without a row in a table of users gets none",
    )
