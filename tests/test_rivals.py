"""The rivals of `tests/benchmarks/rivals` on small data: what their parts compute, and that what is predictable is learned."""

from argparse import Namespace
from types import SimpleNamespace

import numpy as np
import polars
import pytest
import torch

from qbert_ray.sequence.beam_search import Trie
from tests.benchmarks.peers_table import Split, ranks
from tests.benchmarks.rivals import bert4rec, bsarec, cid, fdsa, gru4rec, missrec, mql4grec, s3rec, sasrec, vq_rec
from tests.benchmarks.rivals.content import content_vectors
from tests.benchmarks.rivals.encoders import Frequencies
from tests.benchmarks.rivals.generative import generator, listed, prefixes
from tests.benchmarks.rivals.training import by_length, compare, fit, fit_encoder, padded, parser

ITEMS, WIDTH = 12, 16
SMALL = {"width": WIDTH, "num_heads": 2, "ffn_width": 16, "dropout": 0.0, "batch_size": 8, "learning_rate": 0.01}
GIVEN = Namespace(epochs=30, patience=6, minutes=None, last=None)


def circle():
    """Users who go round in a circle of items: what comes next is certain."""
    walks = [[(first + step) % ITEMS for step in range(length)] for first in range(ITEMS) for length in (3, 4, 5, 6, 9)]
    valid = [(walk[-1] + 1) % ITEMS for walk in walks]
    return SimpleNamespace(num_items=ITEMS, every=walks, train=walks, valid=valid, test=[(item + 1) % ITEMS for item in valid])


def codes_of_items():
    return np.stack(np.divmod(np.arange(ITEMS), 4), axis=1)


def product_codes():
    """Eight codes of four codewords: two items share some of them."""
    return np.random.default_rng(0).integers(0, 4, (ITEMS, 8))


def content_of_items():
    """Texts of all items but two, and images of all but four others."""
    random = np.random.default_rng(0)
    content = [random.normal(size=(ITEMS, width)).astype(np.float32) for width in (8, 6)]
    return content, [np.isin(np.arange(ITEMS), gone, invert=True) for gone in ([0, 1], [4, 5, 6, 7])]


def missrec_of(**settings):
    return missrec.MISSRec(*content_of_items(), missrec.DEFAULTS | SMALL | {"interests": 0.5} | settings)


ENCODERS = {
    "missrec": missrec_of,
    "fdsa": lambda: fdsa.FDSA(*content_of_items(), fdsa.DEFAULTS | SMALL),
    "bert4rec": lambda: bert4rec.BERT4Rec(ITEMS, bert4rec.DEFAULTS | SMALL),
    "gru4rec": lambda: gru4rec.GRU4Rec(ITEMS, gru4rec.DEFAULTS | SMALL),
    "s3rec": lambda: s3rec.S3Rec(np.eye(ITEMS, dtype=bool), s3rec.DEFAULTS | SMALL),
    "sasrec": lambda: sasrec.SASRec(ITEMS, sasrec.DEFAULTS | SMALL),
    "bsarec": lambda: bsarec.BSARec(ITEMS, bsarec.DEFAULTS | SMALL),
    "vq_rec": lambda: vq_rec.VQRec(product_codes(), vq_rec.DEFAULTS | SMALL | {"codebook_size": 4}),
}


@pytest.mark.parametrize("name", [name for name in ENCODERS if name != "bert4rec"])
def test_an_encoder_learns_what_is_certain(name):
    torch.manual_seed(0)
    split = circle()
    found = fit_encoder(ENCODERS[name](), split, SMALL | {"weight_decay": 0.0}, GIVEN, 0, prefixes=name in ("bsarec", "missrec"))
    assert found.value > 0.9
    histories = [[*history, item] for history, item in zip(split.train, split.valid, strict=True)]
    assert (ranks(found.scores, histories, split.test)[0] == 1).mean() > 0.8


@pytest.mark.parametrize("name", ENCODERS)
def test_neither_padding_nor_other_histories_of_a_batch_matter(name):
    torch.manual_seed(0)
    scores = ENCODERS[name]().scorer()
    histories = [[3, 4, 5, 6, 7, 8], [1, 2], [5]]
    together = scores(histories)
    for row, history in enumerate(histories):
        torch.testing.assert_close(scores([history])[0], together[row], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("longest", [3, 50])
@pytest.mark.parametrize("name", ["sasrec", "bert4rec"])
def test_every_target_of_every_history_counts_the_same(name, longest, monkeypatch):
    """Scores that are all equal cost log N for each target, so the losses of an epoch count them."""
    module, split, counted = {"sasrec": sasrec, "bert4rec": bert4rec}[name], circle(), {}

    def counting(model, batches, loss, *others):
        with torch.no_grad():
            model.embedding.weight.zero_()
            counted[size] = size * sum(loss(rows).item() for rows in batches(0)) / np.log(ITEMS)

    monkeypatch.setattr(f"tests.benchmarks.rivals.{'training' if name == 'sasrec' else name}.fit", counting)
    for size in (4, 64):
        torch.manual_seed(0)
        module.train(split, module.DEFAULTS | SMALL | {"longest": longest, "batch_size": size, "masked": 1.0, "last_alone": 0.0}, GIVEN, 0)
    items, histories = sum(map(len, split.every)), len(split.every)
    if name == "sasrec":  # each item but the first
        windows = [items[max(0, end - longest - 1) : end] for items in split.every for end in range(len(items), 1, -longest)]
        assert sum(len(each) - 1 for each in windows) == items - histories
        expected = (items - histories) / (np.mean([len(each) for each in windows]) - 1)
    else:  # each item, of windows of at least two
        windows = [items[max(0, end - longest) : end] for items in split.every for end in range(len(items), 1, -longest)]
        expected = sum(map(len, windows)) / np.mean([len(each) for each in windows])
    assert list(counted.values()) == pytest.approx([expected, expected])


def test_a_training_that_diverges_ends_and_ranks_nothing(tmp_path):
    torch.manual_seed(0)
    with pytest.raises(SystemExit, match="the loss of epoch 0 is"):
        fit_encoder(ENCODERS["sasrec"](), circle(), SMALL | {"weight_decay": 0.0, "learning_rate": 1e30}, GIVEN, 0)
    with pytest.raises(SystemExit, match="not a number"):
        ranks(lambda histories: torch.full((len(histories), 3), torch.nan), [[0]], [1])


def test_masked_training_learns_what_is_certain():
    torch.manual_seed(0)
    split = circle()
    given = Namespace(**vars(GIVEN) | {"epochs": 120, "patience": 40})
    found = bert4rec.train(split, bert4rec.DEFAULTS | SMALL | {"last_alone": 0.5}, given, 0)
    assert found.value > 0.9


def test_every_history_masks_an_item_and_some_the_last_alone():
    torch.manual_seed(0)
    model = bert4rec.BERT4Rec(ITEMS, bert4rec.DEFAULTS | SMALL)
    items = torch.full((4000, 6), ITEMS)
    items[:, 2:] = torch.arange(4)
    chosen = model.masked(items, 0.25, 0.2)
    assert chosen.any(1).all() and not chosen[:, :2].any()
    # three ways to mask the last alone: a fifth of all, and of the others those that drew it alone or nothing
    assert (chosen[:, -1] & (chosen.sum(1) == 1)).float().mean().item() == pytest.approx(0.2 + 0.8 * (0.25 * 0.75**3 + 0.75**4), abs=0.03)
    assert chosen[:, 2].float().mean().item() == pytest.approx(0.8 * 0.25, abs=0.03)
    assert model.masked(items, 0.0, 0.0).sum(1).eq(1).all()


def test_the_losses_of_s3_rec_read_the_places_that_they_should():
    torch.manual_seed(0)
    model = ENCODERS["s3rec"]().eval()
    with torch.no_grad():
        for weight in (model.attribute.weight, model.embedding.weight):
            weight.mul_(50)  # far from zero, so that scores differ
    items = torch.tensor([[ITEMS, 3, 4, 5], [1, 2, 7, 8]])
    hidden = torch.tensor([[True, False, True, False], [False, True, False, False]])  # padding is nothing to predict
    segment = torch.tensor([[False, False, True, False], [True, True, False, False]])
    foreign, negative = torch.full_like(items, 9), torch.full_like(items, 10)
    found = model.losses(items, hidden, segment, foreign, negative)
    states = model.both_ways(items, hidden)
    for name, places in (("map", [(0, 2), (1, 1)]), ("aap", [(0, 1), (0, 3), (1, 0), (1, 2), (1, 3)])):
        probability = torch.stack([torch.sigmoid(model.forms[name](states[place]) @ model.attribute.weight.T) for place in places])
        own = torch.eye(ITEMS)[torch.stack([items[place] for place in places])]
        torch.testing.assert_close(found[name], -torch.where(own > 0, probability, 1 - probability).log().sum())
    vectors = model.embedding.weight
    gap = [(model.forms["mip"](states[place]) * (vectors[items[place]] - vectors[10])).sum() for place in ((0, 2), (1, 1))]
    torch.testing.assert_close(found["mip"], -torch.sigmoid(torch.stack(gap)).log().sum())
    around = model.forms["sp"](model.both_ways(items, segment)[:, -1])
    strange = torch.tensor([[ITEMS, 3, 9, 5], [9, 9, 7, 8]])
    own, other = (model.both_ways(each, ~segment)[:, -1] for each in (items, strange))
    torch.testing.assert_close(found["sp"], -torch.sigmoid((around * (own - other)).sum(-1)).log().sum())


def test_segments_are_half_of_a_history_at_most():
    torch.manual_seed(0)
    lengths = torch.tensor([1, 2, 3, 8]).repeat(500)
    found = s3rec.segments(lengths, 8)
    assert not (found & (torch.arange(8) < 8 - lengths[:, None])).any(), "padding is in none"
    sizes = found.sum(1).view(-1, 4)
    assert sizes.amin(0).tolist() == [1, 1, 1, 1] and sizes.amax(0).tolist() == [1, 1, 1, 4]
    assert found[3::4].any(0).all(), "every place is in some"
    edges = torch.diff(found.int(), dim=1, prepend=torch.zeros(len(found), 1, dtype=torch.int32))
    assert (edges == 1).sum(1).eq(1).all(), "no segment has a gap"


def s3_rec_with_attributes(**settings):
    """An attribute for each item, and weights large enough that bilinear forms of them have gradients from the first step on."""
    torch.manual_seed(0)
    model = s3rec.S3Rec(np.eye(ITEMS, dtype=bool), s3rec.DEFAULTS | SMALL | {"num_layers": 1} | settings)
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.25)
    return model


def attributes_found(model, name, hidden):
    """How many of the items in the middle of five have the best score for their own attribute, which is one that no other item has."""
    items = (torch.arange(ITEMS)[:, None] + torch.arange(-2, 3)) % ITEMS
    with torch.inference_mode():
        states = model.eval().both_ways(items, torch.tensor([False, False, hidden, False, False]).expand(ITEMS, -1))[:, 2]
        best = (model.forms[name](states) @ model.attribute.weight.T).argmax(1)
    return int((best == torch.arange(ITEMS)).sum())


def test_pre_training_of_s3_rec_learns_attributes_of_shown_items():
    model = s3_rec_with_attributes()
    settings = s3rec.DEFAULTS | SMALL | {"pretrain_epochs": 40, "pretrain_batch_size": 16, "learning_rate": 0.003}
    s3rec.pretrain(model, circle(), settings, 0)
    assert attributes_found(model, "aap", hidden=False) >= ITEMS - 3


def test_s3_rec_learns_attributes_of_masked_items_from_both_sides():
    model = s3_rec_with_attributes()
    items = (torch.arange(ITEMS)[:, None] + torch.arange(-2, 3)) % ITEMS
    hidden = torch.tensor([False, False, True, False, False]).expand(ITEMS, -1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(150):
        optimizer.zero_grad()
        model.losses(items, hidden, hidden, items, items)["map"].backward()
        optimizer.step()
    assert attributes_found(model, "map", hidden=True) == ITEMS


def test_attributes_are_frequent_words_or_codes():
    found = s3rec.words(["red shoe", "red hat of wool", "the red shoe"], 2)
    assert found.tolist() == [[True, True], [True, False], [True, True]], "red, shoe"
    assert s3rec.one_hot(np.array([[3, 1], [5, 1], [3, 2]])).tolist() == [[1, 0, 1, 0], [0, 1, 1, 0], [1, 0, 0, 1]]


def test_features_without_content_are_zeros_and_others_are_averaged():
    torch.manual_seed(0)
    content, present = content_of_items()
    present[0][4] = False  # which has no image either
    model = fdsa.FDSA(content, present, fdsa.DEFAULTS | SMALL).eval()
    described = model.described()
    text, image = (adapter(torch.from_numpy(vectors)) for adapter, vectors in zip(model.adapters, content, strict=True))
    assert (described[4] == 0).all()
    torch.testing.assert_close(described[0], image[0])
    torch.testing.assert_close(described[5], text[5])
    weights = torch.cat([model.weight(text[9]), model.weight(image[9])]).softmax(0)
    torch.testing.assert_close(described[9], weights[0] * text[9] + weights[1] * image[9])


@pytest.mark.parametrize("name", ["fdsa", "gru4rec", "s3rec", "sasrec", "vq_rec"])
def test_states_do_not_see_later_items(name):
    torch.manual_seed(0)
    model = ENCODERS[name]().eval()
    catalog = model.catalog()
    states = model(torch.tensor([[1, 2, 3, 4], [1, 2, 9, 9]]), catalog)
    torch.testing.assert_close(states[0, :2], states[1, :2])
    assert not torch.allclose(states[0, 2], states[1, 2])


def test_interests_are_the_clusters_that_a_history_touches_each_once():
    torch.manual_seed(0)
    model = missrec_of().eval()
    model.interest[:] = torch.tensor([[0, 0]] * 6 + [[1, 2]] * 6)
    catalog = model.catalog()
    found, known = model.interests(torch.tensor([[2, 2, 3], [ITEMS, 8, 9]]), catalog)
    assert known.tolist() == [[True, False], [True, True]]
    first = [catalog[item, modality] for item in range(6) for modality in range(2) if model.present[item, modality]]
    torch.testing.assert_close(found[0, 0], torch.stack(first).mean(0))
    images = torch.stack([catalog[item, 1] for item in range(8, ITEMS)])
    torch.testing.assert_close(found[1, 1], images.mean(0))


def test_scores_weight_similarities_by_their_softmax_and_leave_out_what_an_item_lacks():
    torch.manual_seed(0)
    model = missrec_of().eval()
    catalog, state = model.catalog(), torch.randn(1, WIDTH)
    similar = torch.cosine_similarity(state[:, None], catalog, dim=-1) / 0.07
    found = model.logits(state, catalog)[0]
    torch.testing.assert_close(found[9], (similar[9].softmax(0) * similar[9]).sum(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found[0], similar[0, 1], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found[4], similar[4, 0], atol=1e-4, rtol=1e-4)


def test_an_item_without_content_ranks_behind_all_others():
    vectors = np.ones((3, 4), np.float32)
    model = missrec.MISSRec([vectors], [np.array([True, False, True])], missrec.DEFAULTS | SMALL)
    scores = model.scorer()([[0, 2], [1]])
    assert not scores.isnan().any() and (scores.argmin(1) == 1).all()


def test_an_epoch_may_draw_some_of_the_samples():
    read = []

    class Counting(sasrec.SASRec):
        def forward(self, items, catalog):
            if self.training:
                read.append(len(items))
            return super().forward(items, catalog)

    model = Counting(ITEMS, sasrec.DEFAULTS | SMALL)
    fit_encoder(model, circle(), SMALL | {"weight_decay": 0.0, "epoch_samples": 10}, Namespace(**vars(GIVEN) | {"epochs": 3}), 0)
    assert sum(read) == 30


def test_the_low_pass_is_that_of_a_fourier_transform():
    model = Frequencies(3, 5, 10, 0.0)
    x = torch.randn(2, 10, 3)
    spectrum = torch.fft.rfft(x, dim=1, norm="ortho")
    spectrum[:, 3:] = 0
    torch.testing.assert_close(model.low @ x, torch.fft.irfft(spectrum, n=10, dim=1, norm="ortho"), atol=1e-5, rtol=1e-5)


def test_batches_hold_every_sample_once_and_are_of_about_one_length():
    lengths = np.random.default_rng(0).integers(1, 20, 100)
    batches = by_length(lengths, 8, 0, 1)
    assert sorted(np.concatenate(batches)) == list(range(100))
    assert max(int(np.ptp(lengths[rows])) for rows in batches) <= 4
    assert padded([[1, 2, 3], [4], []], 2, 9).tolist() == [[2, 3], [9, 4], [9, 9]]


def test_product_codes_tell_vectors_apart():
    vectors = np.random.default_rng(0).normal(size=(60, 8)).astype(np.float32)
    codes = vq_rec.product_codes(vectors, np.arange(50), 4, 8, 0)
    assert codes.shape == (60, 4) and codes.min() >= 0 and codes.max() < 8
    assert len(np.unique(codes, axis=0)) > 50


def test_the_setting_that_validates_best_alone_ranks_test_items(monkeypatch, tmp_path):
    asked = []

    def train(split, settings, given, seed):
        def scores(histories):
            asked.append((settings["which"], seed, split.seen, given.last))
            return torch.zeros(len(histories), ITEMS)

        return SimpleNamespace(scores=scores, epoch=4, value=settings["which"], seconds=0.0)

    class Given:
        users, num_items, seen = ["a"], ITEMS, "training"

        def __init__(self, run, domain):
            pass

        def with_validation(self):
            result = Given("", "")
            result.seen = "validation too"
            return result

        def test_ranks(self, scores):
            return ranks(scores, [[1]], [2])

    monkeypatch.setattr("tests.benchmarks.rivals.training.Split", Given)
    settings = ["--set", '{"which": 1}', "--set", '{"which": 3}', "--set", '{"which": 2}']
    given = parser("").parse_args(["", "shop", str(tmp_path / "ranks.parquet"), *settings, "--seeds", "0", "1", "--and-validation"])
    with pytest.raises(ValueError, match="name has no setting which; its settings are epoch_samples, schedule, warmup_steps"):
        compare(given, "name", {}, train)
    compare(given, "name", {"which": 0}, train)
    assert set(asked) == {(3, seed, *kind) for seed in (0, 1) for kind in (("training", None), ("validation too", 4))}
    rows = polars.read_parquet(given.out)["row"].unique().sort().to_list()
    assert rows == ["name (here)", "name, validation items too (here)"]


def test_a_training_that_ends_after_a_given_epoch_keeps_its_weights():
    validation = iter([0.3, 0.9, 0.1, 0.95])
    model = torch.nn.Linear(1, 1, bias=False)
    weights = []

    def evaluate():
        weights.append(model.weight.item())
        return next(validation)

    settings = {"learning_rate": 0.1, "weight_decay": 0.0}
    given = Namespace(**vars(GIVEN) | {"patience": 1, "minutes": 1e-9, "last": 2})
    found = fit(
        model,
        lambda epoch: [np.arange(1)],
        lambda rows: model(torch.ones(1, 1)).sum(),
        evaluate,
        lambda: model.weight.item,
        settings,
        given,
    )
    assert len(set(weights)) == 3
    assert (found.epoch, found.scores()) == (2, weights[2])


def test_validation_items_join_what_is_trained_on(tmp_path):
    for folder, frame in {
        "sequences": {"user_id": ["a", "b"], "train": [[0, 1], [2]], "valid": [2, None], "test": [3, None]},
        "items": {"item_index": [0, 1, 2, 3]},
    }.items():
        (tmp_path / "ingest" / folder).mkdir(parents=True)
        polars.DataFrame(frame).write_parquet(tmp_path / "ingest" / folder / "shop-0.parquet")
    split = Split(tmp_path, "shop")
    assert (split.every, split.train, split.valid) == ([[0, 1], [2]], [[0, 1]], [2])
    assert split.with_validation().every == [[0, 1, 2], [2]] and split.every == [[0, 1], [2]]
    assert split.num_items == 4, "items have no texts"
    polars.DataFrame({"item_index": [0]}).write_parquet(tmp_path / "ingest/items/shop-two-0.parquet")
    assert Split(tmp_path, "shop").num_items == 4, "another domain's name begins alike"
    path = tmp_path / "ingest/sequences/shop-0.parquet"
    polars.read_parquet(path).with_columns(between=[]).write_parquet(path)
    with pytest.raises(SystemExit, match="not split by leave-one-out"):
        Split(tmp_path, "shop")


def languages():
    text = codes_of_items()
    return mql4grec.Languages(text, text[::-1].copy())


def test_the_two_languages_share_a_catalog_and_nothing_else():
    found = languages()
    assert found.catalog.shape == (2 * ITEMS + 3, 2) and found.codebook_size == 4 + 4 + 3
    text, image, prompts = found.catalog[:ITEMS], found.catalog[ITEMS : 2 * ITEMS], found.catalog[2 * ITEMS :]
    assert text.max() < 4 <= image.min() and image.max() < 8 <= prompts.min()
    for trie, rows in zip(found.tries, found.rows, strict=True):
        assert sorted(trie.items.tolist()) == list(rows)


def test_samples_are_of_all_five_tasks():
    found = languages()
    samples = found.samples([[0, 1, 2], [5, 4]], 20, np.random.default_rng(0))
    told = [(tuple(sample.read), sample.target) for sample in samples]
    assert len(told) == 3 * 3 + 2 * ITEMS
    assert told[:3] == [((0,), 1), ((0, 1), 2), ((5,), 4)]
    assert told[3:6] == [((12,), 13), ((12, 13), 14), ((17,), 16)]
    for (read, target), (text, after) in zip(told[6:9], told[:3], strict=True):
        assert read[0] == 2 * ITEMS + mql4grec.ACROSS
        turned = read[1] >= ITEMS
        assert (read[1:], target) == (tuple(item + turned * ITEMS for item in text), after + (not turned) * ITEMS)
    assert told[9] == ((2 * ITEMS + mql4grec.TO_IMAGE, 0), ITEMS) and told[-1] == ((2 * ITEMS + mql4grec.TO_TEXT, 2 * ITEMS - 1), ITEMS - 1)


def test_items_of_both_lists_come_first():
    nothing = -torch.inf
    found = mql4grec.merged(torch.tensor([[-1.0, -2.0, nothing, nothing]]), torch.tensor([[nothing, -4.0, -0.5, nothing]]))
    assert found.tolist() == [[-1.0, -2.0, -0.5, nothing]]


def test_a_list_holds_the_log_probabilities_of_its_items():
    torch.manual_seed(0)
    codes = codes_of_items()
    model = generator(2, 4, 5, mql4grec.DEFAULTS | {"width": 16, "ffn_width": 16}).eval()
    trie = Trie.build(torch.from_numpy(codes))
    histories = [np.array([1, 2, 3]), np.array([4])]
    full, short = (listed(model, codes, trie, histories, beam, range(ITEMS)) for beam in (ITEMS, 5))
    with torch.no_grad():
        memory = model.encode(model.read(np.concatenate(histories), np.array([3, 1]), codes))
        torch.testing.assert_close(full * 3, model.score_all(memory, torch.from_numpy(codes)), atol=1e-5, rtol=1e-5)
    assert ((short > -torch.inf).sum(1) == 5).all()


def test_both_generative_rivals_learn_what_is_certain(tmp_path, monkeypatch):
    split = circle()
    sizes = {"width": 32, "num_heads": 2, "head_width": 16, "ffn_width": 32, "dropout": 0.0, "batch_size": 16, "warmup_steps": 5}
    given = Namespace(epochs=15, patience=15, minutes=None, last=None, run="", domain="", text="text", image="image", ids="cid")
    monkeypatch.setattr(mql4grec, "read_codes", lambda run, domain, codes: codes_of_items()[:: 1 if codes == "text" else -1].copy())
    torch.manual_seed(0)
    assert mql4grec.train(split, mql4grec.DEFAULTS | sizes | {"learning_rate": 0.005}, given, 0).value > 0.9
    settings = cid.DEFAULTS | sizes | {"clusters": 3, "largest": 4, "learning_rate": 0.005}
    assert cid.train(split, settings, given, 0).value > 0.9


def test_collaborative_ids_are_unique_and_put_what_is_bought_together_together():
    histories = [[0, 1, 2]] * 4 + [[3, 4, 5]] * 4 + [[6, 7]] * 4 + [[2, 3]]
    affinity = cid.co_occurrence([*histories, [0, 0, 1]], 8)
    assert affinity[0, 1] == 5 and affinity[0, 0] == 0 and affinity[2, 3] == 1
    ids = cid.collaborative_ids(affinity, 3, 4, 8, 0)
    assert len(np.unique(ids, axis=0)) == 8
    assert [len(set(ids[group, 0])) for group in ([0, 1, 2], [3, 4, 5], [6, 7])] == [1, 1, 1] and len(set(ids[:, 0])) == 3
    deeper = cid.collaborative_ids(affinity, 2, 2, 8, 0)
    assert len(np.unique(deeper, axis=0)) == 8 and deeper.shape[1] > 2
    assert len(prefixes(histories, 20)) == 21


def test_codes_and_vectors_are_read_in_the_order_of_the_items(tmp_path):
    for folder in ("ingest/items", "features/text", "semantic_ids"):
        (tmp_path / folder).mkdir(parents=True)
    for part, rows in enumerate(([1, 3], [0, 2])):
        items = polars.DataFrame({"item_id": [f"i{row}" for row in rows], "item_index": rows})
        items.write_parquet(tmp_path / f"ingest/items/shop-{part:05d}.parquet")
        codes = polars.Series([[row, row + 1] for row in rows])
        items.with_columns(codes=codes).write_parquet(tmp_path / f"semantic_ids/shop-{part:05d}.parquet")
        vectors = polars.Series([[[float(row), 1.0], [row + 2.0, 1.0]] for row in rows])
        present = polars.Series([[True, row != 3] for row in rows])
        items.with_columns(vectors=vectors, present=present).write_parquet(tmp_path / f"features/text/shop-{part:05d}.parquet")
    given = polars.DataFrame({"item_id": ["i2", "i0", "i3", "i1"], "codes": [[2, 3], [0, 1], [3, 4], [1, 2]]})
    given.write_parquet(tmp_path / "codes.parquet")
    expected = [[0, 1], [1, 2], [2, 3], [3, 4]]
    assert mql4grec.read_codes(tmp_path, "shop", tmp_path / "codes.parquet").tolist() == expected
    assert cid.run_ids(tmp_path, "shop").tolist() == expected
    vectors, there = content_vectors(tmp_path, "shop", "text")
    assert vectors.tolist() == [[1, 1], [2, 1], [3, 1], [3, 1]] and there.all()
    given[:3].write_parquet(tmp_path / "codes.parquet")
    with pytest.raises(SystemExit, match="lacks 1 items"):
        mql4grec.read_codes(tmp_path, "shop", tmp_path / "codes.parquet")
