"""Eq. 6 to 9 of the paper, worked out one number at a time: values, gradients, and where the stop-gradients stand.

The codec is the identity here, so a latent is its input and the gradient of a latent is seen in the encoder's weights.
"""

import numpy as np
import pytest
import torch

from qbert_ray.semantic_ids import rqvae
from qbert_ray.semantic_ids.rqvae import RQVAE, Coder, ResidualQuantizer, k_means, nearest, normalised_error, sample

BETA = 0.4
BOOKS = [[[0.0, 0.0], [4.0, 0.0], [0.0, 4.0]], [[0.5, 0.0], [0.0, -1.0], [-1.0, 1.0]]]
ROWS = [[4.25, 0.125], [0.25, 2.5], [-1.0, -1.5]]


def identity_model(decoder=((2.0, 0.0), (1.0, 1.0)), dtype=torch.float64):
    model = RQVAE(2, [], num_levels=2, codebook_size=3, codebook_dim=2, commitment_weight=BETA).to(dtype)
    with torch.no_grad():
        model.encoder.linear.weight.copy_(torch.eye(2))
        model.decoder.linear.weight.copy_(torch.tensor(decoder))
        model.quantizer.codebooks.copy_(torch.tensor(BOOKS))
    return model


def plain_codes(row):
    """Eq. 6: the nearest codeword of each level to what the levels before it left."""
    residual, codes, residuals = list(row), [], []
    for book in BOOKS:
        distances = [sum((r - e) ** 2 for r, e in zip(residual, codeword, strict=True)) for codeword in book]
        codes.append(distances.index(min(distances)))
        residuals.append(residual)
        residual = [r - e for r, e in zip(residual, book[codes[-1]], strict=True)]
    return codes, residuals, residual


def test_eq_6_takes_the_nearest_codeword_to_what_is_left():
    quantized = identity_model().quantizer(torch.tensor(ROWS, dtype=torch.float64))
    assert [plain_codes(row)[0] for row in ROWS] == [[1, 0], [2, 1], [0, 1]]  # as seen on paper
    for place, row in enumerate(ROWS):
        codes, residuals, _ = plain_codes(row)
        chosen = [BOOKS[level][code] for level, code in enumerate(codes)]
        assert quantized.codes[place].tolist() == codes
        assert quantized.residuals[place].tolist() == residuals
        assert quantized.codewords[place].tolist() == chosen
        assert quantized.vector[place].tolist() == [sum(column) for column in zip(*chosen, strict=True)]


def test_eq_7_to_9_are_sums_over_levels_and_dimensions_and_means_over_the_batch():
    losses = identity_model()(torch.tensor(ROWS, dtype=torch.float64))
    reconstruction = quantization = 0.0
    for row in ROWS:
        codes, residuals, _ = plain_codes(row)
        chosen = [BOOKS[level][code] for level, code in enumerate(codes)]
        x, y = (sum(column) for column in zip(*chosen, strict=True))
        reconstruction += (2 * x - row[0]) ** 2 + (x + y - row[1]) ** 2
        for residual, codeword in zip(residuals, chosen, strict=True):
            quantization += (1 + BETA) * sum((r - e) ** 2 for r, e in zip(residual, codeword, strict=True))
    assert float(losses["reconstruction"].detach()) == pytest.approx(reconstruction / 3)
    assert float(losses["quantization"].detach()) == pytest.approx(quantization / 3)
    assert float(losses["loss"].detach()) == pytest.approx((reconstruction + quantization) / 3)
    assert losses["codes"].tolist() == [plain_codes(row)[0] for row in ROWS]


def test_eq_8_moves_codewords_at_full_weight_and_latents_at_the_commitment_weight():
    model = identity_model()
    model(torch.tensor(ROWS, dtype=torch.float64))["quantization"].backward()
    to_books, to_weight = np.zeros((2, 3, 2)), np.zeros((2, 2))
    for row in ROWS:
        codes, residuals, _ = plain_codes(row)
        for level, (code, residual) in enumerate(zip(codes, residuals, strict=True)):
            away = np.array(BOOKS[level][code]) - residual
            to_books[level, code] += 2 * away / 3
            to_weight += np.outer(-2 * BETA * away / 3, row)  # the residual is the latent less constants
    assert model.quantizer.codebooks.grad.numpy() == pytest.approx(to_books)
    assert model.encoder.linear.weight.grad.numpy() == pytest.approx(to_weight)


def test_eq_7_reaches_the_encoder_past_the_codebooks():
    """The straight-through gradient: that of the decoder at the sum of the codewords, taken for the latent's."""
    model = identity_model()
    model(torch.tensor(ROWS, dtype=torch.float64))["reconstruction"].backward()
    decoder, expected = np.array([[2.0, 0.0], [1.0, 1.0]]), np.zeros((2, 2))
    for row in ROWS:
        _, _, left = plain_codes(row)
        error = decoder @ (np.array(row) - left) - row
        expected += np.outer(2 * decoder.T @ error / 3, row)
    assert model.encoder.linear.weight.grad.numpy() == pytest.approx(expected)
    assert model.quantizer.codebooks.grad is None or not model.quantizer.codebooks.grad.any()


def test_the_codebooks_gradient_is_that_of_finite_differences():
    """Where no code changes, the loss of the codebooks is smooth; the commitment term is constant under them."""
    model = identity_model()
    rows = torch.tensor(ROWS, dtype=torch.float64)
    model(rows)["quantization"].backward()
    books, step = model.quantizer.codebooks, 1e-6
    for place in np.ndindex(2, 3, 2):
        sides = []
        for sign in (1, -1):
            with torch.no_grad():
                books[place] += sign * step
                sides.append(sum(codeword_error(row, level, books) for row in ROWS for level in range(2)) / 3)
                books[place] -= sign * step
        assert float(books.grad[place]) == pytest.approx((sides[0] - sides[1]) / (2 * step), abs=1e-5)


def codeword_error(row, level, books):
    """Squared distance of a residual, which stays as it was, from its codeword, which may have moved."""
    codes, residuals, _ = plain_codes(row)
    return sum((r - float(e)) ** 2 for r, e in zip(residuals[level], books[level][codes[level]], strict=True))


def test_without_quantization_the_loss_is_that_of_a_plain_autoencoder():
    losses = identity_model()(torch.tensor(ROWS, dtype=torch.float64), quantize=False)
    expected = sum((2 * x - x) ** 2 + (x + y - y) ** 2 for x, y in ROWS) / 3
    assert float(losses["loss"].detach()) == pytest.approx(expected) == pytest.approx(float(losses["reconstruction"].detach()))


def test_inputs_are_centred_and_scaled_by_one_number():
    data = torch.tensor([[1.0, 10.0], [3.0, 10.0], [5.0, 16.0], [7.0, 16.0]])
    model = RQVAE(2, [], num_levels=1, codebook_size=2, codebook_dim=2)
    model.start(data)
    assert model.mean.tolist() == [4.0, 13.0]
    assert float(model.deviation) == pytest.approx(((5 + 9) / 2) ** 0.5)  # variances 5 and 9
    with torch.no_grad():
        model.encoder.linear.weight.copy_(torch.eye(2))
        model.decoder.linear.weight.copy_(torch.eye(2))
        latent = model.encode(data)
        assert torch.allclose(latent, (data - torch.tensor([4.0, 13.0])) / 7**0.5)
        assert torch.allclose(model.decode(latent), data, atol=1e-5)


@pytest.mark.parametrize("size", [1e-3, 1e3])
def test_small_inputs_are_scaled_up_and_large_ones_down(size):
    data = size * torch.tensor([[1.0, 10.0], [3.0, 10.0], [5.0, 16.0], [7.0, 16.0]])
    model = RQVAE(2, [], num_levels=1, codebook_size=2, codebook_dim=2)
    model.start(data)
    assert float(model.deviation) == pytest.approx(size * 7**0.5)
    model.start(torch.full((3, 2), 5.0))
    assert 0 < float(model.deviation) < 1e-3  # constant inputs are divided by something


def test_a_quantizer_of_which_nothing_is_said_is_that_of_the_paper():
    model = RQVAE(64, [48])
    assert model.quantizer.codebooks.shape == (4, 256, 32) and model.commitment_weight == 0.25
    assert model.encoder.linear is not None and model.decoder.linear.weight.shape == (64, 32)
    assert [layer.out_features for layer in (model.encoder.mlp[0], model.decoder.mlp[0])] == [48, 48]
    assert float(model.quantizer.codebooks.detach().std()) == pytest.approx(0.1, rel=0.05)


def test_the_loss_is_taken_of_scaled_inputs():
    data = torch.tensor([[1.0, 10.0], [3.0, 10.0], [5.0, 16.0], [7.0, 16.0]])
    model = RQVAE(2, [], num_levels=1, codebook_size=2, codebook_dim=2)
    model.start(data)
    with torch.no_grad():
        model.decoder.linear.weight.zero_()
    assert float(model(data)["reconstruction"].detach()) == pytest.approx(2)  # both dimensions together have variance 2
    assert normalised_error(model, [data]) == pytest.approx(1)  # as good as the mean


def test_a_catalog_in_pieces_starts_as_the_whole(monkeypatch):
    data = torch.from_numpy(np.random.default_rng(0).normal(size=(300, 6)).astype(np.float32)) * torch.arange(1, 7)
    whole, pieces = (RQVAE(6, [], num_levels=1, codebook_size=2, codebook_dim=3) for _ in range(2))
    whole.start(data)
    monkeypatch.setattr(rqvae, "PIECE", 7)
    pieces.start(data)
    for name, tensor in whole.state_dict().items():
        if "codebooks" not in name:
            assert torch.allclose(tensor, pieces.state_dict()[name], atol=1e-5), name


def test_the_shortcut_and_the_mlp_add_up_and_the_mlp_starts_as_nothing():
    torch.manual_seed(0)
    both, rows = Coder([3, 5, 2], True), torch.randn(4, 3)
    assert torch.equal(both(rows), both.linear(rows))
    with torch.no_grad():
        both.mlp[-1].bias.fill_(2.0)
    assert torch.allclose(both(rows), both.linear(rows) + 2)
    assert both.linear.bias is None
    alone = Coder([3, 5, 2], False)
    assert alone.linear is None and alone.mlp[2].weight.any()
    assert [type(layer).__name__ for layer in Coder([3, 5, 4, 2], False).mlp] == ["Linear", "ReLU", "Linear", "ReLU", "Linear"]
    assert Coder([3, 2], False).mlp is None and Coder([3, 2], False).linear is not None


def test_nearest_is_that_of_plain_distances_and_the_first_of_ties():
    rng = np.random.default_rng(1)
    vectors, book = rng.integers(-3, 4, (50, 2)).astype(np.float32), rng.integers(-3, 4, (9, 2)).astype(np.float32)
    book[5] = book[2]
    expected = [[float(np.square(v - c).sum()) for c in book] for v in vectors]
    assert nearest(torch.from_numpy(vectors), torch.from_numpy(book)).tolist() == [row.index(min(row)) for row in expected]


def test_k_means_of_separated_groups_finds_their_means():
    rng = np.random.default_rng(0)
    groups = [np.array([x, y]) + rng.normal(scale=0.1, size=(40, 2)) for x, y in ((0, 0), (9, 0), (0, 9))]
    centres = k_means(np.concatenate(groups).astype(np.float32), 3, seed=0)
    means = sorted(tuple(group.mean(0)) for group in groups)
    assert np.array(sorted(map(tuple, centres))) == pytest.approx(np.array(means), abs=1e-4)
    assert centres.dtype == np.float32


def test_k_means_improves_the_centres_it_is_given():
    """Four rounds from a bad start: not where k-means++ ends, but nearer than the start."""
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(200, 2)).astype(np.float32)
    start = vectors[:5]
    centres = k_means(vectors, 5, 0, start)

    def error(centres):
        return np.square(vectors[:, None] - centres).sum(2).min(1).mean()

    assert error(centres) < 0.9 * error(start)
    rounds = start.astype(np.float64)
    for _ in range(4):
        owner = np.square(vectors[:, None] - rounds).sum(2).argmin(1)
        rounds = np.stack([vectors[owner == centre].mean(0) for centre in range(5)])
    assert centres == pytest.approx(rounds, abs=1e-4)


def test_fewer_distinct_vectors_than_centres_are_centres_themselves_and_the_rest_are_near_copies():
    vectors = np.array([[1.0, 2], [1, 2], [5, 6]], np.float32)
    centres = k_means(vectors, 4, seed=0)
    assert centres[:2].tolist() == [[1, 2], [5, 6]]
    assert 0 < np.abs(centres[2:] - [[1, 2], [5, 6]]).max() < 0.02
    assert k_means(vectors, 2, seed=0).tolist() == [[1, 2], [5, 6]]
    several = np.random.default_rng(0).permutation(9)[:, None].astype(np.float32)
    assert k_means(several, 9, seed=0)[:, 0].tolist() == list(range(9))  # in order, as they would not come from rounds of k-means
    alone = k_means(vectors[:1], 3, seed=0)
    assert 0 < np.abs(alone[1:] - [1, 2]).max() < 5e-3


def test_a_sample_is_256_vectors_for_each_codeword_without_repetition():
    vectors = np.arange(3000, dtype=np.float32)[:, None]
    assert sample(vectors[:512], 2, 0) is not None and len(sample(vectors[:512], 2, 0)) == 512
    drawn = sample(vectors, 2, 0)[:, 0]
    assert len(drawn) == 512 == len(np.unique(drawn)) and drawn.max() > 2500
    assert (sample(vectors, 2, 0)[:, 0] == drawn).all() and not (sample(vectors, 2, 1)[:, 0] == drawn).all()
    assert (sample(vectors[:512], 2, 0) == vectors[:512]).all()
    assert len(sample(vectors[:513], 2, 0)) == 512


def test_codewords_start_as_centres_of_the_residuals_of_the_level_before():
    rng = np.random.default_rng(0)
    latent = torch.from_numpy(rng.normal(size=(400, 3)).astype(np.float32))
    quantizer = ResidualQuantizer(3, 8, 3)
    quantizer.start(latent, seed=5)
    residual = latent.numpy()
    for level, book in enumerate(quantizer.codebooks.detach().numpy()):
        assert book == pytest.approx(k_means(residual, 8, 5 + level), abs=1e-5)
        residual = residual - book[np.square(residual[:, None] - book).sum(2).argmin(1)]


def test_reseeding_moves_unused_codewords_onto_residuals_that_are_quantized_badly():
    latent = torch.tensor([[0.0], [0.0], [0.0], [10.0]])
    quantizer = ResidualQuantizer(2, 3, 1)
    with torch.no_grad():
        quantizer.codebooks.copy_(torch.tensor([[[0.0], [99], [98]], [[0.0], [77], [76]]]))
    assert quantizer.reseed(latent, seed=0) == 1  # one row alone is quantized with an error, so one codeword moves
    assert quantizer.codebooks[0].flatten().tolist() == [0, 10, 98]
    assert quantizer.codebooks[1].flatten().tolist() == [0, 77, 76]  # nothing is left for the second level
    assert quantizer.reseed(latent, seed=0) == 0


def test_reseeding_the_second_level_sees_what_the_first_leaves():
    latent = torch.tensor([[0.0], [10.0], [11.0], [10.0]])
    quantizer = ResidualQuantizer(2, 2, 1)
    with torch.no_grad():
        quantizer.codebooks.copy_(torch.tensor([[[0.0], [10.0]], [[0.0], [50.0]]]))
    assert quantizer.reseed(latent, seed=0) == 1
    assert quantizer.codebooks.flatten().tolist() == [0, 10, 0, 1]


def test_reseeding_follows_its_seed_and_prefers_large_errors():
    rows = torch.cat([torch.full((50, 1), 0.1), torch.full((50, 1), 9.0)])
    moved = []
    for seed in range(40):
        quantizer = ResidualQuantizer(1, 2, 1)
        with torch.no_grad():
            quantizer.codebooks.copy_(torch.tensor([[[0.0], [500.0]]]))
        quantizer.reseed(rows, seed)
        moved.append(quantizer.codebooks[0, 1].item())
    assert moved.count(9.0) >= 39  # squared errors .01 and 81


def test_reseeding_is_repeatable_and_leaves_the_random_state_alone():
    rows, found = torch.randn(100, 2, generator=torch.Generator().manual_seed(0)), []
    for seed, state in ((3, 1), (3, 2), (4, 1)):
        torch.manual_seed(state)
        before = torch.get_rng_state()
        quantizer = ResidualQuantizer(1, 8, 2)
        torch.set_rng_state(before)
        with torch.no_grad():
            quantizer.codebooks.fill_(50.0)
            quantizer.codebooks[0, 0] = 0
        assert quantizer.reseed(rows, seed) == 7 and torch.equal(torch.get_rng_state(), before)
        found.append(quantizer.codebooks.detach())
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
