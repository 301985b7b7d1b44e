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


@pytest.fixture
def crowd():
    """[400, 8] vectors around 20 directions, and one item in a direction of its own."""
    random = torch.Generator().manual_seed(0)
    directions = torch.randn(20, 8, generator=random).repeat_interleave(20, 0)
    return torch.cat([directions + 0.3 * torch.randn(400, 8, generator=random), 10 * torch.eye(8)[:1]])


@pytest.mark.parametrize(("cells", "probed", "least"), [(400, 400, 1.0), (20, 5, 0.85), (400, 1, 0.0)])
def test_large_catalogs_are_searched_by_cells(cells, probed, least, crowd, monkeypatch):
    """All cells: the exact neighbours. One cell with fewer items than neighbours: as many as it takes."""
    rows, trained = torch.arange(0, 401, 4), torch.from_numpy(np.setdiff1d(np.arange(401), np.arange(0, 401, 4)))
    exact = nearest_trained_items(crowd, rows, trained)
    monkeypatch.setattr(item_table, "EXACT", 0)
    monkeypatch.setattr(item_table, "CELLS", cells)
    monkeypatch.setattr(item_table, "PROBED", probed)
    found = nearest_trained_items(crowd, rows, trained)
    same = [len(set(a) & set(b)) / 10 for a, b in zip(exact.nearest.tolist(), found.nearest.tolist(), strict=True)]
    assert np.mean(same) >= least and (least == 1.0) == (np.mean(same) == 1.0)
    unit = torch.nn.functional.normalize(crowd, dim=1)
    for row, nearest, weights in zip(*found, strict=True):
        assert len(set(nearest.tolist())) == 10 and set(nearest.tolist()) <= set(trained.tolist())
        torch.testing.assert_close(weights, torch.softmax(unit[nearest] @ unit[row] / 0.1, 0))
