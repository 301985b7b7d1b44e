"""Laws that every quantizer holds, however its weights came about."""

import numpy as np
import pytest
import torch
from safetensors.torch import load, save

from qbert_ray.metrics import codebook_usage, collision_rate
from qbert_ray.semantic_ids import kmeans
from qbert_ray.semantic_ids.kmeans import fit_product, fit_residual, fit_residual_kmeans
from qbert_ray.semantic_ids.rqvae import RQVAE, k_means, nearest, normalised_error, sample
from tests.semantic_ids.test_rqvae import embeddings

SIZE, DIM = 16, 8


def start_rqvae(model, data, seed):
    """The first state of a training; what gradients do from there is tested with the loop."""
    model.start(data)
    with torch.no_grad():
        model.quantizer.start(model.encode(data), seed)


FITS = {"rqvae": start_rqvae, "kmeans": fit_residual, "opq": fit_product}
each_quantizer = pytest.mark.parametrize("name", FITS)


def trained(name, data, seed=0, size=SIZE, dim=DIM):
    torch.manual_seed(seed)
    model = RQVAE(data.shape[1], [32] if name == "rqvae" else [], num_levels=3, codebook_size=size, codebook_dim=dim)
    FITS[name](model, data, seed)
    return model.eval()


@torch.no_grad()
def codes_of(model, data):
    return model.quantizer(model.encode(data)).codes.numpy()


@each_quantizer
@pytest.mark.parametrize(
    "data",
    [embeddings(), embeddings(5), embeddings(1), embeddings(1).repeat(50, 1), torch.zeros(20, 16), embeddings(40, width=3)],
    ids=["many", "fewer items than codewords", "one item", "identical items", "nothing but zeros", "fewer dimensions than the codebook"],
)
def test_codes_are_in_range_and_equal_items_have_equal_codes(name, data):
    model = trained(name, data)
    codes = codes_of(model, torch.cat([data, data]))
    assert codes.shape == (2 * len(data), 3) and codes.min() >= 0 and codes.max() < SIZE
    assert all(torch.isfinite(tensor).all() for tensor in model.state_dict().values())
    assert (codes[: len(data)] == codes[len(data) :]).all()


@each_quantizer
def test_fewer_items_than_codewords_are_all_distinguished_and_exact(name):
    data = embeddings(5)
    model = trained(name, data)
    assert collision_rate(codes_of(model, data)) == 0.0
    assert normalised_error(model, [data]) < 1e-3


@each_quantizer
def test_every_codeword_is_in_use(name):
    data = embeddings()
    assert min(codebook_usage(codes_of(trained(name, data), data), SIZE)) >= 0.95


@each_quantizer
def test_a_seed_decides_the_codes(name):
    data = embeddings()
    first, again, other = (codes_of(trained(name, data, seed), data) for seed in (0, 0, 1))
    assert (first == again).all()
    assert not (first == other).all()


@each_quantizer
def test_saved_tensors_alone_give_the_same_codes(name):
    data = embeddings()
    model = trained(name, data)
    rebuilt = RQVAE(16, [32] if name == "rqvae" else [], num_levels=3, codebook_size=SIZE, codebook_dim=DIM)
    rebuilt.load_state_dict(load(save(model.state_dict())))
    assert (codes_of(rebuilt, data) == codes_of(model, data)).all()


@each_quantizer
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_a_number_is_said(name, bad):
    data = embeddings()
    data[3, 4] = bad
    with pytest.raises(ValueError, match="NaN or infinite"):
        trained(name, data)


def test_codes_of_a_product_quantizer_do_not_depend_on_each_other():
    """Its codebooks share no dimension of the latent, so the code of a level is the nearest in that level alone."""
    data = embeddings()
    model = trained("opq", data)
    books = model.quantizer.codebooks.detach()
    used = books.abs().sum(1) > 0  # [K, E]
    assert used.sum(0).max() == 1
    with torch.no_grad():
        latent = model.encode(data)
    for level, book in enumerate(books):
        nearest = torch.cdist(latent[:, used[level]], book[:, used[level]]).argmin(1)
        assert (nearest.numpy() == codes_of(model, data)[:, level]).all()


def test_the_learned_rotation_lowers_the_error(monkeypatch):
    data = embeddings()
    learned = trained("opq", data)
    monkeypatch.setattr("qbert_ray.semantic_ids.kmeans.ROUNDS", 1)
    axes = trained("opq", data)
    assert normalised_error(learned, [data]) < 0.98 * normalised_error(axes, [data])
    rotated = learned.encoder.linear.weight
    assert torch.allclose(rotated @ rotated.T, torch.eye(DIM), atol=1e-4)


def test_every_round_but_the_last_ends_with_a_new_rotation(monkeypatch):
    """After the last one the centres are fitted to the rotation as it is: one round leaves the axes, two turn them once."""
    found = []
    for rounds in (1, 2, 3):
        monkeypatch.setattr("qbert_ray.semantic_ids.kmeans.ROUNDS", rounds)
        found.append(trained("opq", embeddings()))
    axes = RQVAE(16, [], num_levels=3, codebook_size=SIZE, codebook_dim=DIM)
    axes.start(embeddings())
    turned = [(model.encoder.linear.weight @ axes.encoder.linear.weight.T).abs() for model in found]
    assert torch.allclose(turned[0].sort(dim=1).values[:, -1], torch.ones(DIM), atol=1e-4)  # the axes, in another order
    assert turned[1].max(1).values.min() < 0.999 and not torch.allclose(turned[1], turned[2], atol=1e-3)


def test_more_levels_than_dimensions_cannot_be_independent():
    with pytest.raises(ValueError, match="3 independent codes"):
        trained("opq", embeddings(), dim=2)


@pytest.mark.parametrize(
    ("variance", "sizes", "expected"),
    [
        ([8.0, 4, 2, 1], [2, 2], [0, 3, 1, 2]),  # products 8 * 1 and 4 * 2
        ([0.08, 0.04, 0.02, 0.01], [2, 2], [0, 3, 1, 2]),  # the size of the embeddings does not matter
        ([1.0, 2, 4, 8], [2, 2], [3, 0, 2, 1]),
        ([9.0, 3, 3, 3, 1], [3, 2], [0, 3, 4, 1, 2]),  # a block that is full takes no more
        ([5.0, 0, 0], [1, 1, 1], [0, 1, 2]),
    ],
)
def test_principal_components_are_assigned_to_blocks_of_about_equal_products(variance, sizes, expected):
    blocks = np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])
    found = kmeans._balanced(np.array(variance), blocks)
    assert found.argmax(0).tolist() == expected
    assert found.sum(0).tolist() == found.sum(1).tolist() == [1] * len(variance) and found.dtype == np.float32


def test_residual_k_means_is_that_of_the_principal_components():
    """By hand: centre, scale, project on the eigenvectors of the covariance, then k-means level by level."""
    data = embeddings()
    model = trained("kmeans", data, dim=4)
    rows = data.numpy().astype(np.float64)
    centred = rows - rows.mean(0)
    covariance = centred.T @ centred / len(rows)
    scale = np.sqrt(np.trace(covariance) / len(covariance))
    axes = np.linalg.eigh(covariance)[1][:, ::-1][:, :4]
    latent = model.encode(data).detach().numpy()
    assert np.abs(latent) == pytest.approx(np.abs(centred @ axes / scale), abs=1e-3)  # an axis may point either way
    assert np.allclose(model.decode(torch.from_numpy(latent)).detach().numpy(), centred @ axes @ axes.T + rows.mean(0), atol=1e-2)
    residual = latent
    for level, book in enumerate(model.quantizer.codebooks.detach().numpy()):
        assert book == pytest.approx(k_means(residual, SIZE, level), abs=1e-4)
        residual = residual - book[np.square(residual[:, None] - book).sum(2).argmin(1)]


def test_residual_k_means_of_plain_rows_is_that_of_the_stage():
    data = embeddings()
    model = fit_residual_kmeans(data.double().numpy(), num_levels=3, codebook_size=SIZE, codebook_dim=DIM, seed=5)
    assert torch.equal(model.quantizer.codebooks, trained("kmeans", data, seed=5).quantizer.codebooks) and not model.training
    assert (model.codes(data).numpy() == codes_of(trained("kmeans", data, seed=5), data)).all()


def test_residual_k_means_of_which_nothing_is_said_has_four_levels_of_256_codewords():
    model = fit_residual_kmeans(embeddings(300, width=40))
    assert model.quantizer.codebooks.shape == (4, 256, 32) and model.mean.shape == (40,)
    assert torch.equal(model.quantizer.codebooks, fit_residual_kmeans(embeddings(300, width=40), seed=0).quantizer.codebooks)


@pytest.mark.parametrize("name", ["kmeans", "opq"])
def test_centres_are_fitted_on_a_sample_of_256_items_for_each_codeword(name):
    """Of 2,000 items 512 are read here: the centres are those of a model of these 512 with the same axes."""
    data = embeddings(2000)
    model = trained(name, data, size=2)
    rows = torch.from_numpy(sample(data.numpy(), 2, 0))
    assert len(rows) == 512
    latent, book = model.encode(rows).detach(), model.quantizer.codebooks[0].detach()
    used = book.any(0)
    means = torch.stack([latent[nearest(latent[:, used], book[:, used]) == code][:, used].mean(0) for code in range(2)])
    assert torch.allclose(means, book[:, used], atol=1e-3)
