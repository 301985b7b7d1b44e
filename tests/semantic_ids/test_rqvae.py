import numpy as np
import torch

from qbert_ray.metrics import codebook_usage
from qbert_ray.semantic_ids.rqvae import RQVAE, ResidualQuantizer, nearest, normalised_error


def embeddings(size=400, width=16, seed=0):
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(20, width)) * 3
    return torch.from_numpy((centres[rng.integers(0, 20, size)] + rng.normal(size=(size, width))).astype(np.float32))


def test_codewords_and_last_residual_add_up_to_the_latent():
    quantizer = ResidualQuantizer(4, 16, 8)
    latent = torch.randn(50, 8)
    quantized = quantizer(latent)
    last = quantized.residuals[:, -1] - quantized.codewords[:, -1]
    assert torch.allclose(quantized.codewords.sum(1) + last, latent, atol=1e-5)


def test_each_level_takes_the_nearest_codeword():
    quantizer = ResidualQuantizer(3, 16, 8)
    quantized = quantizer(torch.randn(50, 8))
    for level in range(3):
        distance = torch.cdist(quantized.residuals[:, level], quantizer.codebooks[level])
        assert (distance.argmin(1) == quantized.codes[:, level]).all()


def test_k_means_starts_every_codeword_in_use():
    quantizer = ResidualQuantizer(3, 32, 16)
    latent = embeddings()
    quantizer.start(latent, seed=0)
    assert codebook_usage(quantizer(latent).codes.numpy(), 32) == [1.0, 1.0, 1.0]


def test_a_start_from_fewer_distinct_items_than_codewords_is_finite():
    quantizer = ResidualQuantizer(2, 32, 16)
    latent = embeddings(1).repeat(5, 1)
    quantizer.start(latent, seed=0)
    assert torch.isfinite(quantizer.codebooks).all()
    assert len(quantizer(latent).codes.unique(dim=0)) == 1


def test_dead_codewords_are_reseeded():
    quantizer = ResidualQuantizer(2, 16, 16)
    latent = embeddings()
    quantizer.start(latent, seed=0)
    with torch.no_grad():
        quantizer.codebooks[:, :5] = 1e3
    moved = quantizer.reseed(latent, seed=0)
    assert moved >= 10
    assert min(codebook_usage(quantizer(latent).codes.numpy(), 16)) >= 0.9
    assert quantizer.reseed(latent, seed=0) <= 2


def test_training_lowers_the_error_and_the_codebooks_learn():
    torch.manual_seed(0)
    data = embeddings()
    model = RQVAE(16, [32], num_levels=2, codebook_size=16, codebook_dim=8)
    model.start(data)
    with torch.no_grad():
        model.quantizer.start(model.encode(data), seed=0)
    before, books = normalised_error(model, [data]), model.quantizer.codebooks.detach().clone()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(100):
        optimizer.zero_grad()
        model(data)["loss"].backward()
        optimizer.step()
    assert normalised_error(model, [data]) < 0.5 * before
    assert not torch.equal(books, model.quantizer.codebooks)


def test_loss_terms_are_those_of_the_paper():
    """Eq. 7-9 worked out row by row."""
    torch.manual_seed(0)
    model, data = RQVAE(16, [32], num_levels=2, codebook_size=4, codebook_dim=8, commitment_weight=0.25), embeddings(6)
    losses = model(data)
    expected_reconstruction = expected_quantization = 0.0
    for row in data:
        latent = model.encode(row[None])[0]
        residual, total = latent, torch.zeros(8)
        for book in model.quantizer.codebooks:
            codeword = book[nearest(residual[None], book)[0]]
            expected_quantization += 1.25 * float((residual - codeword).square().sum())
            residual, total = residual - codeword, total + codeword
        expected_reconstruction += float((model.decoder(total) - row).square().sum())
    assert np.isclose(float(losses["reconstruction"]), expected_reconstruction / 6, rtol=1e-4)
    assert np.isclose(float(losses["quantization"]), expected_quantization / 6, rtol=1e-4)


def test_constant_dimensions_do_not_blow_up():
    data = embeddings()
    data[:, 3] = 7.0
    model = RQVAE(16, [32])
    model.start(data)
    assert torch.isfinite(model.encode(data)).all()
    assert float(((data - model.mean) / model.deviation).abs().max()) < 20


def test_near_embeddings_stay_near():
    """One scale for all dimensions and orthonormal axes: with as many axes as dimensions distances keep their proportions."""
    data = embeddings()
    model = RQVAE(16, [32], codebook_dim=16)
    model.start(data)
    with torch.no_grad():
        before, after = torch.pdist(data), torch.pdist(model.encode(data))
    assert torch.allclose(after * model.deviation, before, rtol=1e-3, atol=1e-3)


def test_the_shortcut_starts_as_the_principal_components_and_decodes_them():
    data = embeddings()
    model = RQVAE(16, [32], codebook_dim=4)
    model.start(data)
    with torch.no_grad():
        decoded = model.decode(model.encode(data))
    centred = (data - data.mean(0)).numpy()
    left, sizes, right = np.linalg.svd(centred, full_matrices=False)
    expected = (left[:, :4] * sizes[:4]) @ right[:4] + data.mean(0).numpy()
    assert np.allclose(decoded.numpy(), expected, atol=1e-3)


def test_without_a_shortcut_there_are_the_papers_mlps_alone():
    names = set(RQVAE(16, [32], shortcut=False).state_dict())
    assert {name for name in names if name.startswith("encoder.")} == {
        f"encoder.mlp.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")
    }


def test_codes_alone_are_those_of_the_whole_pass_and_the_first_of_equally_near_ones():
    quantizer = ResidualQuantizer(3, 16, 8)
    with torch.no_grad():
        quantizer.codebooks[:, 8:] = quantizer.codebooks[:, :8]  # every codeword twice
    latent = torch.randn(1500, 8)
    codes = quantizer.codes(latent)
    assert torch.equal(codes, quantizer(latent).codes)
    assert int(codes.max()) < 8 and codes.dtype == torch.int64
