"""Simulates the purchases of the demo shop's users.

A purchase completes the one before it, follows the user's drifting taste, or popularity, or is random; complements and tastes follow
the attributes of items.

N items, A attributes, U users.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

DEPARTMENT_SIZE = 4  # categories; the complement of a category is the next one of its department, and that of the last is the first
# Behaviour: what a next purchase follows, as shares of all purchases, and how strongly. Attributes are category, brand, style, colour,
# and where items have sounds and clips also tune and turn.
COMPLEMENT, TASTE, CROWD, NOISE = 0.48, 0.38, 0.10, 0.04
MATCH = np.array([0.0, 1.5, 2.5, 2.5, 2.5, 2.5])  # log weight of a complement that shares this attribute
TASTE_SPREAD = np.array([1.0, 2.0, 2.0, 2.0, 2.0, 2.0])  # standard deviation of a user's liking for an attribute's values
TASTE_MEMORY = 0.985  # share of a taste's deviation that remains after one purchase
NEW_ITEM_WEIGHT = 0.05
FIRST_DAY, DAY = 1_640_995_200, 86_400  # 2022-01-01, in seconds


@dataclass(frozen=True)
class Catalog:
    """Attributes of the N items, from which their texts and images are made.

    Attributes:
        attributes: [N, A] positions among the values of each attribute.
        price: [N] in the shop's currency.
        popularity: [N] share of the purchases that follow popularity.
        availability: [N] factor on the probability of being bought; small for new items.
        sizes: [A] values of each attribute.
    """

    attributes: np.ndarray
    price: np.ndarray
    popularity: np.ndarray
    availability: np.ndarray
    sizes: tuple[int, ...]


def simulate_interactions(catalog: Catalog, rng: np.random.Generator, num_users: int) -> pa.Table:
    """The interactions table (user_id, item_id, timestamp), in time order; some purchases of a user share a second."""
    histories = simulate_histories(catalog, rng, num_users)
    gaps = rng.lognormal(np.log(4 * DAY), 1.2, histories.shape) * (rng.random(histories.shape) > 0.04)
    gaps[:, 0] = rng.uniform(0, 500 * DAY, num_users)
    timestamps = FIRST_DAY + np.cumsum(gaps.astype(np.int64), axis=1)
    users, steps = np.nonzero(histories >= 0)
    order = np.argsort(timestamps[users, steps], kind="stable")
    users, steps = users[order], steps[order]
    return pa.table(
        {
            "user_id": [f"U{user:05d}" for user in users],
            "item_id": [f"P{item:05d}" for item in histories[users, steps]],
            "timestamp": timestamps[users, steps],
        }
    )


def simulate_histories(catalog: Catalog, rng: np.random.Generator, num_users: int) -> np.ndarray:
    """[U, longest] items in the order of purchase, no item twice, padded with -1."""
    num_items = len(catalog.price)
    lengths = np.clip(5 + rng.gamma(2.0, 4.5, num_users).astype(int), 5, max(5, min(45, num_items // 3)))
    histories = np.full((num_users, lengths.max()), -1)
    pairings = complement_weights(catalog)
    spread = np.repeat(TASTE_SPREAD[: len(catalog.sizes)], catalog.sizes)
    taste = rng.normal(0, spread, (num_users, len(spread)))
    for step in range(lengths.max()):
        active = np.flatnonzero(lengths > step)
        chances = next_item_chances(catalog, pairings, taste[active], histories[active, :step])
        cumulative = chances.cumsum(axis=1)
        draws = rng.random((len(active), 1)) * cumulative[:, -1:]
        histories[active, step] = (cumulative <= draws).sum(axis=1)
        news = rng.normal(0, spread * np.sqrt(1 - TASTE_MEMORY**2), taste.shape)
        taste = TASTE_MEMORY * taste + news  # keeps the spread
    return histories


def complement_weights(catalog: Catalog) -> np.ndarray:
    """[N, N] probability that the complement of the row's item is the column's, an item of the next category of its department."""
    category = catalog.attributes[:, 0]
    following = category // DEPARTMENT_SIZE * DEPARTMENT_SIZE + (category + 1) % DEPARTMENT_SIZE
    shared = sum(weight * (values[:, None] == values) for weight, values in zip(MATCH, catalog.attributes.T, strict=False))
    weights = np.exp(shared) * (following[:, None] == category) * catalog.availability
    return weights / weights.sum(axis=1, keepdims=True)


def next_item_chances(catalog: Catalog, pairings: np.ndarray, taste: np.ndarray, history: np.ndarray) -> np.ndarray:
    """[U, N] probability that each item is bought next, up to a factor per user; zero for items that the user has.

    Args:
        pairings: [N, N] from `complement_weights`.
        taste: [U, sum(sizes)] a user's present liking for each value of each attribute.
        history: [U, steps] items bought so far, the last one last.
    """
    columns = catalog.attributes + np.cumsum((0, *catalog.sizes[:-1]))
    liking = np.exp(sum(taste[:, column] for column in columns.T))
    chances = TASTE * liking / liking.sum(axis=1, keepdims=True) + CROWD * catalog.popularity + NOISE / len(catalog.price)
    chances *= catalog.availability
    if history.shape[1]:
        chances += COMPLEMENT * pairings[history[:, -1]]
        np.put_along_axis(chances, history, 0, axis=1)
    return chances
