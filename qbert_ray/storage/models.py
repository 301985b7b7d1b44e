"""Loads a model from its JSON and its weights, and validates both.

The description is compared with the weights before memory is allocated: the model is first built on the meta device, and its
shapes must equal those of the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from qbert_ray.storage.seals import ArtifactError, damaged

if TYPE_CHECKING:
    from qbert_ray.storage.directory import RunDir

M = TypeVar("M", bound=nn.Module)


def rebuild(model: Callable[..., M], run: RunDir, folder: str) -> M:
    """The model saved in a folder of a run, with its weights, in evaluation mode.

    Args:
        model: class that takes the fields of the description.
        run: the run directory.
        folder: that `RunDir.save_model` was given.

    Raises:
        ArtifactError: there is none, or its weights are not those of the model that it describes.
    """
    tensors, description = run.load_model(folder)
    try:
        _check(model, tensors, description)
        built = model(**description)
        built.load_state_dict(tensors)
    except (ArithmeticError, AssertionError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, ArtifactError):
            raise
        raise damaged(
            run, f"{folder}/model.json", f"is not the {getattr(model, '__name__', 'model')} that its weights are of: {_brief(error)}"
        ) from None
    return built.eval()


def _check(model: Callable[..., nn.Module], tensors: dict[str, Tensor], description: dict[str, Any]) -> None:
    """Raise ValueError if the model of a description does not fit the weights."""
    largest = max([1, *(tensor.numel() for tensor in tensors.values())])
    for name, value in _numbers(description):
        many = name.startswith("num_") and name.endswith(("layers", "heads"))  # number of modules, or of parts of a vector
        if many and value < 1:
            raise ValueError(f"{name} is {value}")
        if abs(value) > largest or (many and value > max(len(tensors), 1024)):
            raise ValueError(f"{name} is {value:,}, and its largest tensor has {largest:,} numbers")
    with torch.device("meta"):
        wanted = {name: tuple(tensor.shape) for name, tensor in model(**description).state_dict().items()}
    given = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    different = next((name for name in sorted(wanted | given) if wanted.get(name) != given.get(name)), None)
    if different:
        raise ValueError(f"{different} has the shape {given.get(different)}, and should have {wanted.get(different)}")


def _numbers(value: Any, name: str = "") -> Iterator[tuple[str, int]]:
    """Field name and value of each whole number in a description, nested ones included."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _numbers(inner, str(key))
    elif isinstance(value, list):
        for inner in value:
            yield from _numbers(inner, name)
    elif isinstance(value, int):
        yield name, value


def _brief(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
