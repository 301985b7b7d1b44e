"""Which modalities stage 1 fuses where the config names none."""

import pytest

from qbert_ray.config.schema import Config
from qbert_ray.features.stage import _modalities

BARE = {"text_fields": []}


@pytest.mark.parametrize(
    ("domains", "expected"),
    [
        ({"shop": {}}, ["text", "image"]),
        ({"shop": BARE | {"image_column": "cover"}}, ["text", "image"]),
        ({"shop": BARE | {"attributes": ["brand"]}}, ["text", "image"]),
        ({"shop": BARE | {"text_features": "vectors.parquet"}}, ["text", "image"]),
        ({"shop": BARE}, ["text", "image", "structure"]),  # nothing else tells its items apart
        ({"shop": {}, "bare": BARE}, ["text", "image", "structure"]),
        ({"shop": {"structure_features": "vectors.parquet"}}, ["text", "image", "structure"]),  # vectors of one's own are used
    ],
)
def test_structure_joins_only_where_a_domain_has_neither_texts_nor_images(domains, expected):
    assert _modalities(Config.model_validate({"data": {"domains": domains}})) == expected


def test_modalities_that_are_named_are_taken_in_one_order():
    config = Config.model_validate({"features": {"modalities": ["structure", "text"]}})
    assert _modalities(config) == ["text", "structure"]
