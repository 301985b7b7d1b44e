"""Neighbours of cold items, against cosines worked out one by one."""

import numpy as np
import pytest
import torch

from qbert_ray.sequence import item_table
from qbert_ray.sequence.item_table import nearest_trained_items


@pytest.mark.parametrize(("chunk", "most"), [(1, 2**28), (4096, 2**28), (4096, 1)])
def test_nearest_items_are_those_of_the_largest_cosine_weighted_by_it(chunk, most, monkeypatch):
    monkeypatch.setattr(item_table, "CHUNK", chunk)
    monkeypatch.setattr(item_table, "MOST", most)
    monkeypatch.setattr(item_table, "NEIGHBOURS", 2)
    content = torch.tensor([[3.0, 0], [0, 1], [1, 1], [-1, 0], [5, 0.5], [0.1, 2]])
    rows, found, weights = nearest_trained_items(content, torch.tensor([4, 5]), torch.tensor([1, 0, 2, 3]))
    assert rows.tolist() == [4, 5]
    assert found.tolist() == [[0, 2], [1, 2]]
    for row, (query, places) in enumerate(((content[4], [0, 2]), (content[5], [1, 2]))):
        cosine = [float(query @ content[place] / query.norm() / content[place].norm()) for place in places]
        strength = np.exp(np.array(cosine) / 0.1)
        assert weights[row].numpy() == pytest.approx(strength / strength.sum(), abs=1e-5)
    _, few, one = nearest_trained_items(content, torch.tensor([4]), torch.tensor([3]))
    assert few.tolist() == [[3]] and one.tolist() == [[1]]
