"""Frozen text and image encoders as batch callables (§3.1: LLaMA for text, CLIP for images).

A text encoder is anything `transformers.AutoModel.from_pretrained` takes, an image encoder anything open_clip takes. Three
models are part of Python packages and load without a hub: 'minilm' and 'smollm2' for text, 'efficientnet-lite0' (an ImageNet
network, not CLIP) for images. Weights are frozen and a vector never depends on its batch mates.

B texts or images, T tokens, J vectors per image, D width, S pixels per side.
"""

from __future__ import annotations

import io
import re
import warnings
from math import isqrt
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F

from qbert_ray.features.pretrained import load_image_tower, load_text_model
from qbert_ray.products import use_product

IMAGE_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")  # Pillow starts other programs for some others
# Reasons for what files that are called images often are instead, by their first bytes.
OTHERS = {
    "HEIC is not read": rb"....ftyp(hei|hev|mif1|msf1)",
    "JPEG XL is not read": rb"\xff\x0a|....jxl ",
    "a film, not an image": rb"....ftyp(iso|mp4|avc|m4v|qt)|\x1a\x45\xdf\xa3",
    "SVG is not read": rb"\s*<svg|\s*<(\?xml|!--|!doctype svg).*<svg",
    "a web page, not an image": rb"\s*<(html|!doctype html)",
    "XML, not an image": rb"\s*<\?xml",
    "JSON, not an image": rb"\s*[{\[]\s*[\"{\[]",
    "a PDF, not an image": rb"%PDF",
}
MOST_SCANS = 100  # of a JPEG, which is decoded once for each: progressive ones have about ten
PNG_BEGINS, PNG_NOTES = b"\x89PNG\r\n\x1a\n", (b"tEXt", b"zTXt", b"iTXt", b"iCCP")
LONGEST_SIDE_RATIO = 4  # a centre crop cuts off everything beyond it, and resizing a 1 x 1,000,000 strip would fill the memory


class FileRejected(ValueError):  # noqa: N818 - an expected outcome, not a fault
    """Bytes that cannot be used; the message is one of a few fixed reasons, so that rejections can be counted."""


class ImageRejected(FileRejected):
    """Bytes that are not a usable image."""


class TextEncoder:
    """A frozen text encoder: texts -> [B, D] float32, D = `width`."""

    def __init__(
        self,
        model: str = "minilm",
        *,
        gguf_file: str | None = None,
        pooling: Literal["mean", "last"] = "mean",
        layer: int = -1,
        prompt: str = "{text}",
        max_tokens: int = 128,
        batch_size: int = 64,
        dtype: str = "float32",
        device: str | None = None,
    ) -> None:
        """Load the model; takes seconds.

        Args:
            model: 'minilm', 'smollm2', or a hub name or folder for `AutoModel.from_pretrained`.
            gguf_file: GGUF file inside that folder or repository.
            pooling: 'mean' over the tokens, or the 'last' token (decoder-only models).
            layer: hidden layer that is pooled, 0 the embeddings; -1 is the output of the last.
            prompt: what is encoded; {text} is replaced by the text. A long text is cut, what follows it in the prompt is kept.
            max_tokens: most tokens per text, prompt included.
            batch_size: texts per forward pass.
            dtype: 'float32', 'bfloat16' or 'float16', of weights and computation.
            device: None uses a GPU if there is one.

        Raises:
            EncoderUnavailable: the weights are not on this machine and cannot be fetched.
            ValueError: the model has no such layer.
        """
        self.pooling, self.layer, self.batch_size = pooling, layer, batch_size
        self.device, self.dtype = _device(device), getattr(torch, dtype)
        tokenizer, self.model = load_text_model(model, gguf_file, self.dtype)
        self.model = use_product(self.model.eval().to(self.device))
        positions = getattr(self.model.config, "max_position_embeddings", max_tokens)
        self.tokens = Tokens(tokenizer, prompt, min(max_tokens, tokenizer.model_max_length, positions))
        self._takes_types = hasattr(self.model.config, "type_vocab_size")
        depth = self.model.config.num_hidden_layers
        if not -depth - 1 <= layer <= depth:
            raise ValueError(f"layer is {layer}; {model} has hidden layers {-depth - 1} to {depth}")
        self.width = self(["width"]).shape[1]

    def __call__(self, texts: list[str]) -> np.ndarray:
        """Vectors in the order of `texts`; equal texts are encoded once.

        Returns:
            [B, D] float32, not normalised.
        """
        distinct = list(dict.fromkeys(texts))
        position = {text: row for row, text in enumerate(distinct)}
        return self.encode(self.tokens(distinct))[[position[text] for text in texts]]

    def encode(self, tokens: list[list[int]]) -> np.ndarray:
        """[B, D] vectors of texts in the form of their tokens, of which those of similar length are batched together."""
        if not tokens:
            return np.zeros((0, self.width), np.float32)
        by_length = sorted(range(len(tokens)), key=lambda index: -len(tokens[index]))
        batches = [by_length[start : start + self.batch_size] for start in range(0, len(tokens), self.batch_size)]
        vectors = np.concatenate([self._encode([tokens[index] for index in batch]) for batch in batches])
        return vectors[np.argsort(by_length)]

    @torch.inference_mode()
    def _encode(self, tokens: list[list[int]]) -> np.ndarray:
        batch = self.tokens.tokenizer.pad({"input_ids": tokens}, return_tensors="pt").to(self.device)
        mask = batch["attention_mask"]  # [B, T]
        types = {"token_type_ids": torch.zeros_like(mask)} if self._takes_types else {}  # LLaMA refuses them
        deep = self.layer != -1
        with _autocast(self.device, self.dtype):
            output = self.model(input_ids=batch["input_ids"], attention_mask=mask, output_hidden_states=deep, **types)
        hidden = (output.hidden_states[self.layer] if deep else output.last_hidden_state).float()  # [B, T, D]
        if self.pooling == "last":
            last = (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(1)  # [B], whichever side is padded
            return hidden[torch.arange(len(hidden), device=last.device), last].cpu().numpy()
        weights = mask[..., None].float()
        return ((hidden * weights).sum(1) / weights.sum(1).clamp(min=1)).cpu().numpy()


class Tokens:
    """Tokenises texts as a text encoder reads them. It holds no weights, so other processes can have it.

    Args:
        tokenizer: of `transformers`.
        prompt: what is encoded; {text} is replaced by the text.
        max_tokens: most tokens per text, prompt included.
    """

    def __init__(self, tokenizer: Any, prompt: str, max_tokens: int) -> None:
        self.tokenizer, self.prompt, self.max_tokens = tokenizer, prompt, max_tokens

    def __call__(self, texts: list[str]) -> list[list[int]]:
        """The tokens of each text."""
        if not texts:
            return []
        return list(self.tokenizer(self.prompted(texts), truncation=True, max_length=self.max_tokens)["input_ids"])

    def prompted(self, texts: list[str]) -> list[str]:
        """The texts inside their prompt."""
        before, _, after = self.prompt.partition("{text}")
        if after:  # the last token must be that of the prompt's end: cut the text, not the end of the prompt
            room = self.max_tokens - len(self.tokenizer(before + after)["input_ids"]) - 2  # two for tokens at the seams
            cut = {"add_special_tokens": False, "truncation": True, "max_length": max(1, room), "return_offsets_mapping": True}
            ends = [spans[-1][1] if spans else 0 for spans in self.tokenizer(texts, **cut)["offset_mapping"]]
            texts = [text[:end] for text, end in zip(texts, ends, strict=True)]
        return [before + text + after for text in texts]


class ImageEncoder:
    """A frozen image encoder: images -> [B, J, D] float32, the patch grid averaged to J = grid x grid vectors, D = `width`."""

    def __init__(
        self,
        model: str = "efficientnet-lite0",
        *,
        pretrained: str | None = None,
        image_size: int | None = None,
        grid: int = 2,
        batch_size: int = 32,
        dtype: str = "float32",
        device: str | None = None,
    ) -> None:
        """Load the model; takes seconds.

        Args:
            model: 'efficientnet-lite0', or what open_clip takes: 'ViT-L-14', 'local-dir:/path', 'hf-hub:owner/name'.
            pretrained: open_clip's tag ('openai') or a path to weights; not for local-dir and hf-hub.
            image_size: S; None is what the model was trained with.
            grid: side of the pooled patch grid.
            batch_size: images per forward pass.
            dtype: 'float32', 'bfloat16' or 'float16', of the computation.
            device: None uses a GPU if there is one.

        Raises:
            EncoderUnavailable: the weights are not on this machine and cannot be fetched.
            ValueError: the model has no patch grid.
        """
        self.grid, self.batch_size = grid, batch_size
        self.device, self.dtype = _device(device), getattr(torch, dtype)
        visual, transform = load_image_tower(model, pretrained, image_size)
        self.preprocess = Preprocess(transform)
        self.mean, self.deviation = (torch.tensor(values, device=self.device).view(-1, 1, 1) for values in self.preprocess.scale)
        self.visual = use_product(visual).eval().requires_grad_(False).to(self.device).to(memory_format=torch.channels_last)
        self.num_vectors = grid * grid
        self.width = self([Image.new("RGB", (8, 8))]).shape[2]

    def __call__(self, images: list[Image.Image] | np.ndarray) -> np.ndarray:
        """Patch vectors of images, or of images that `preprocess` has converted ([B, S, S, 3]).

        Returns:
            [B, J, D] float32, not normalised; J runs along the rows of the grid.
        """
        if not len(images):
            return np.zeros((0, self.num_vectors, self.width), np.float32)
        pixels = images if isinstance(images, np.ndarray) else np.stack([self.preprocess(image) for image in images])
        starts = range(0, len(pixels), self.batch_size)
        return np.concatenate([self._encode(pixels[start : start + self.batch_size]) for start in starts])

    @torch.inference_mode()
    def _encode(self, pixels: np.ndarray) -> np.ndarray:
        with _autocast(self.device, self.dtype):
            vectors = _patch_vectors(self.visual, self.normalised(pixels), self.grid)
        return vectors.float().cpu().numpy()

    def normalised(self, pixels: np.ndarray) -> Tensor:
        """[B, 3, S, S] input of the network, channels last, from [B, S, S, 3] bytes."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # it is only read
            images = torch.from_numpy(pixels).to(self.device)
        return images.permute(0, 3, 1, 2).float().div_(255).sub_(self.mean).div_(self.deviation)


class Preprocess:
    """Resizes an image and crops it at the centre as in an encoder's training. It holds no weights, so other processes can have it.

    Args:
        transform: open_clip's; its last step, the normalisation, is left to the encoder: a pixel then takes three bytes instead of twelve.
    """

    def __init__(self, transform: Any) -> None:
        *steps, _, normalise = transform.transforms
        self.steps = steps
        self.scale = normalise.mean, normalise.std  # of each channel between 0 and 1

    def __call__(self, image: Image.Image) -> np.ndarray:
        """[S, S, 3] bytes. Safe to call from threads."""
        width, height = image.size
        longest = LONGEST_SIDE_RATIO * min(width, height)
        if max(width, height) > longest:
            left, top = max(0, width - longest) // 2, max(0, height - longest) // 2
            image = image.crop((left, top, left + min(width, longest), top + min(height, longest)))
        for step in self.steps:
            image = step(image)
        return np.asarray(image)


def decode_image(content: bytes, max_bytes: int, max_pixels: int) -> Image.Image:
    """The first frame of an image file, upright, in RGB, on white where it is transparent.

    Args:
        content: the file.
        max_bytes: longer files are rejected.
        max_pixels: larger images are rejected before a pixel is decoded.

    Raises:
        ImageRejected: with the reason.
    """
    if not content:
        raise ImageRejected("empty file")
    if len(content) > max_bytes:
        raise ImageRejected("too many bytes")
    try:
        return _decode(content, max_pixels)
    except ImageRejected as reason:
        plain = _without_notes(content) if str(reason) in ("not an image", "cannot be decoded") else content
        if len(plain) == len(content):
            raise
    return _decode(plain, max_pixels)


def _decode(content: bytes, max_pixels: int) -> Image.Image:
    Image.init()
    try:
        image = Image.open(io.BytesIO(content), formats=[name for name in IMAGE_FORMATS if name in Image.OPEN])
    except Image.DecompressionBombError:
        raise ImageRejected("too many pixels") from None
    except Exception:  # noqa: BLE001 - a broken header can make Pillow's parsers raise anything
        raise ImageRejected(_unread(content)) from None
    if image.width * image.height > max_pixels:
        raise ImageRejected("too many pixels")
    if image.format in ("JPEG", "MPO") and content.count(b"\xff\xda") > MOST_SCANS:
        raise ImageRejected("too many scans")
    try:
        return _to_rgb(ImageOps.exif_transpose(image))
    except Exception as error:  # noqa: BLE001 - as above
        raise ImageRejected("truncated" if "truncated" in str(error) else "cannot be decoded") from None


def _unread(content: bytes) -> str:
    """The reason for a file of a format that is not read."""
    begins = content[:1024].removeprefix(b"\xef\xbb\xbf")
    found = (reason for reason, pattern in OTHERS.items() if re.match(pattern, begins, re.DOTALL | re.IGNORECASE))
    return next(found, "not an image")


def _without_notes(content: bytes) -> bytes:
    """A PNG without its texts and colour profile, which Pillow refuses if they are long; other files unchanged."""
    if not content.startswith(PNG_BEGINS):
        return content
    kept, position = [PNG_BEGINS], len(PNG_BEGINS)
    while position < len(content):
        end = position + 12 + int.from_bytes(content[position : position + 4], "big")
        if content[position + 4 : position + 8] not in PNG_NOTES:
            kept.append(content[position:end])
        position = end
    return b"".join(kept)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith(("I", "F")):  # 16 or 32 bits; Pillow would clip them at 255 instead of scaling
        levels = np.nan_to_num(np.asarray(image, np.float32))
        white = 65535.0 if image.mode.startswith("I") else max(1.0, float(levels.max(initial=0)))
        return Image.fromarray((levels * (255 / white)).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image.convert("RGB")


def _patch_vectors(visual: Any, pixels: Tensor, grid: int) -> Tensor:
    """[B, 3, S, S] -> [B, grid * grid, D]: patches averaged per cell, then passed through the tower's head as its pooled vector is."""
    trunk = getattr(visual, "trunk", None)
    if trunk is None:
        return _pool_grid(_vit_tokens(visual, pixels), grid)
    features = trunk.forward_features(pixels)
    prefix = getattr(trunk, "num_prefix_tokens", 0)
    if features.ndim == 4 and features.shape[1] != trunk.num_features:
        raise ValueError(f"{type(trunk).__name__} gives no patch grid [B, D, h, w]; choose a ViT or a convolutional network")
    cells = _pool_grid(features[:, prefix:] if features.ndim == 3 else features.flatten(2).transpose(1, 2), grid)  # [B, J, D]
    batch, count, width = cells.shape
    # Each cell goes through the head as an image of one patch; class tokens repeat that patch, so any kind of pooling returns it.
    flat = cells.reshape(batch * count, width)
    alone = flat[:, :, None, None] if features.ndim == 4 else flat[:, None].expand(-1, prefix + 1, -1)
    return visual.head(trunk.forward_head(alone)).reshape(batch, count, -1)


def _vit_tokens(visual: Any, pixels: Tensor) -> Tensor:
    """Patch tokens of open_clip's own ViT, [B, h * w, D], normalised and projected like its pooled output."""
    if not hasattr(visual, "output_tokens") or getattr(visual, "attn_pool", None) is not None:
        raise ValueError(f"the image tower {type(visual).__name__} gives no patch tokens; choose a ViT-* or a timm model of open_clip")
    visual.output_tokens = True
    _, tokens = visual(pixels)
    if visual.final_ln_after_pool:
        tokens = visual.ln_post(tokens)
    return tokens if visual.proj is None else tokens @ visual.proj


def _pool_grid(patches: Tensor, grid: int) -> Tensor:
    """[B, side * side, D] -> [B, grid * grid, D]."""
    side = isqrt(patches.shape[1])
    if side * side != patches.shape[1]:
        raise ValueError(f"{patches.shape[1]} patches do not form a square grid; choose a model for square images")
    maps = patches.transpose(1, 2).reshape(len(patches), -1, side, side)
    return F.adaptive_avg_pool2d(maps.float(), grid).flatten(2).transpose(1, 2).to(patches.dtype)


def _device(device: str | None) -> torch.device:
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def _autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
