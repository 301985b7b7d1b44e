"""Lexical vectors: the TF-IDF of an item's words, factorised (latent semantic analysis).

A sentence encoder of a few million weights blurs what distinguishes products: brands, part numbers, sizes. Words keep it. Beyond the paper.

N items, V terms, D width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

import numpy as np
import torch

from qbert_ray.storage.directory import RunDir

if TYPE_CHECKING:  # takes a second to import
    from sklearn.feature_extraction.text import TfidfVectorizer

MOST_COMMON = 0.2  # terms of a larger share of the items say little
FEWEST_ITEMS = 2  # a term of one item relates it to no other
_UNSPACED = r"\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"  # kana, Chinese characters, Hangul: each is a term
TERM = rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+"


class LexicalModel:
    """Maps texts to vectors.

    Args:
        terms: V terms.
        idf: [V] inverse document frequency of each.
        components: [D, V] right singular vectors of the TF-IDF matrix; rows of zeros where it has fewer.
    """

    def __init__(self, terms: list[str], idf: np.ndarray, components: np.ndarray) -> None:
        self.terms, self.idf, self.components = terms, idf, components

    @classmethod
    def fit(cls, texts: list[str], width: int, max_terms: int, seed: int = 0) -> Self:
        """The model of some texts; without terms if no two of them share one.

        Args:
            texts: of N items.
            width: D.
            max_terms: most terms, the most frequent ones.
            seed: of the factorisation.
        """
        from sklearn.decomposition import TruncatedSVD

        vectorizer = _vectorizer(min_df=FEWEST_ITEMS, max_df=max(MOST_COMMON, FEWEST_ITEMS / max(len(texts), 1)), max_features=max_terms)
        components = np.zeros((width, 0), np.float32)
        try:
            counts = vectorizer.fit_transform(texts)
        except ValueError:  # no term is left: texts are empty, or all different
            return cls([], np.zeros(0, np.float32), components)
        rank = min(width, *counts.shape)
        found = TruncatedSVD(rank, random_state=seed).fit(counts) if rank < min(counts.shape) else None
        components = np.zeros((width, counts.shape[1]), np.float32)
        components[:rank] = found.components_ if found else np.linalg.svd(counts.toarray(), full_matrices=False)[2][:rank]
        return cls(vectorizer.get_feature_names_out().tolist(), vectorizer.idf_.astype(np.float32), components)

    def __call__(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Vectors [N, D] of length 1, zeros for texts without a known term; and which texts [N] have one."""
        if not self.terms:
            return np.zeros((len(texts), len(self.components)), np.float32), np.zeros(len(texts), bool)
        vectorizer = _vectorizer(vocabulary={term: number for number, term in enumerate(self.terms)})
        vectorizer.idf_ = self.idf
        vectors = np.asarray(vectorizer.transform(texts) @ self.components.T, np.float32)
        lengths = np.linalg.norm(vectors, axis=1)
        return vectors / np.maximum(lengths, 1e-12)[:, None], lengths > 1e-6

    def save(self, run: RunDir, folder: str) -> None:
        tensors = {"idf": torch.from_numpy(self.idf), "components": torch.from_numpy(self.components)}
        run.save_model(folder, tensors, {"terms": self.terms})

    @classmethod
    def load(cls, run: RunDir, folder: str) -> Self:
        tensors, description = run.load_model(folder)
        return cls(description["terms"], tensors["idf"].numpy(), tensors["components"].numpy())


def _vectorizer(**settings: object) -> TfidfVectorizer:
    from sklearn.feature_extraction.text import TfidfVectorizer

    return TfidfVectorizer(token_pattern=TERM, sublinear_tf=True, dtype=np.float32, **settings)
