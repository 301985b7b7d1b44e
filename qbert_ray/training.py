"""The training loop of all three stages, in plain PyTorch.

A task defines the model, the batches of an epoch, the loss and the metrics. The loop cuts every global batch into
microbatches, each with its own random state, which are divided among the workers; gradients and weights are summed before
the division. So any number of workers gives the same model, up to the order of floating-point additions.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NotRequired, Protocol, TypedDict, TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qbert_ray.config.schema import Training
from qbert_ray.row_updates import RowUpdates
from qbert_ray.storage.directory import RunDir

LAST_RATE = 0.05  # of the cosine schedule, as a share of the learning rate
STATE = ("state.safetensors", "state.json")  # files of a checkpoint of the loop, the last written last


class EpochMetrics(TypedDict):
    """A line of metrics.jsonl; tasks add what they measure."""

    epoch: NotRequired[int]  # from 0
    train_loss: NotRequired[float]  # a model that needs no training has none


M = TypeVar("M", bound=EpochMetrics, covariant=True)


class Task(Protocol[M]):
    """What the loop trains: a model, its batches, its loss and its metrics."""

    seed: int

    @property
    def settings(self) -> Training:
        """The config section with its training settings."""
        ...

    @property
    def criterion(self) -> tuple[str, float] | None:
        """The metric that selects the best epoch, and +1 if larger is better, else -1; None: the last epoch."""
        ...

    def build(self) -> nn.Module:
        """The model with its starting weights; seeded by the loop."""
        ...

    def description(self) -> dict[str, Any]:
        """JSON that rebuilds the model."""
        ...

    def batches(self, epoch: int) -> list[np.ndarray]:
        """Sample numbers of each global batch of an epoch, equal on every worker."""
        ...

    def loss(self, model: Any, samples: np.ndarray, epoch: int, device: torch.device) -> tuple[Tensor, float]:
        """Summed loss of some samples, and their weight; the sum over the batch is divided by the summed weight."""
        ...

    def adjust(self, model: Any, epoch: int) -> None:
        """Change weights without gradients, on rank 0, before each epoch and after the last."""
        ...

    def evaluate(self, model: Any, device: torch.device) -> M:
        """Metrics after an epoch, computed on rank 0."""
        ...

    def complete(self, model: Any, device: torch.device) -> None:
        """Set what no gradient trains in the model that is kept, on rank 0."""
        ...


class Loop:
    """Trains one task on one worker, epoch by epoch, without Ray."""

    def __init__(self, task: Task[EpochMetrics], device: torch.device, rank: int = 0, world_size: int = 1) -> None:
        self.task, self.device, self.rank, self.world_size = task, device, rank, world_size
        settings = task.settings
        torch.manual_seed(task.seed)
        self.model = task.build().to(device)
        self.average: dict[str, Tensor] | None = None
        if settings.averaging:
            self.average = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        self.rows = RowUpdates(self.model, settings.learning_rate, self.average)
        self.dense = self.rows.others(self.model)
        self.optimizer = torch.optim.AdamW(self.dense, lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True)
        self.best: dict[str, Tensor] = {}
        self.best_value: float | None = None
        self.epoch = self.step = self.waited = 0
        self.log: list[EpochMetrics] = []

    @property
    def finished(self) -> bool:
        patience = self.task.settings.patience
        return self.epoch >= self.task.settings.epochs or (patience is not None and self.waited >= patience)

    def weights(self) -> dict[str, Tensor]:
        """The weights that are evaluated and saved: the averaged ones if averaging is on."""
        return {name: tensor.detach() for name, tensor in (self.average or self.model.state_dict()).items()}

    def run_epoch(self) -> None:
        self._adjust()
        self.model.train()
        total, weight = 0.0, 0.0
        batches = self.task.batches(self.epoch)
        for number, samples in enumerate(batches):
            loss, size = self._step(samples, self._rate((self.epoch + number / len(batches)) / self.task.settings.epochs))
            total, weight = total + loss, weight + size
        self.rows.finish()
        metrics: EpochMetrics = {"epoch": self.epoch, "train_loss": total / max(weight, 1e-12)}
        self.epoch += 1
        if self.epoch == self.task.settings.epochs:
            self._adjust()
        if self.rank == 0:
            metrics.update(self.evaluate())
            self._keep_best(cast(dict[str, float], metrics))
        self.log.append(metrics)
        self.waited = self.agree(self.waited)  # every worker stops at the same epoch

    def _adjust(self) -> None:
        if self.rank == 0:
            with torch.no_grad():
                self.task.adjust(self.model, self.epoch)
        self._broadcast_weights()

    def _rate(self, done: float) -> float:
        """The learning rate of the next step.

        Args:
            done: share of the epochs that is completed.
        """
        settings = self.task.settings
        warm = min(1.0, (self.step + 1) / settings.warmup_steps) if settings.warmup_steps else 1.0
        falling = LAST_RATE + (1 - LAST_RATE) * (1 + math.cos(math.pi * done)) / 2 if settings.schedule == "cosine" else 1.0
        return settings.learning_rate * warm * falling

    def _step(self, samples: np.ndarray, rate: float) -> tuple[float, float]:
        """Update the weights from a global batch; returns its loss and weight, summed over all workers."""
        settings = self.task.settings
        self.optimizer.zero_grad(set_to_none=False)
        self.rows.clear()
        total, weight = torch.zeros((), device=self.device), 0.0
        for number, piece in enumerate(np.array_split(samples, settings.microbatches)):
            if number % self.world_size != self.rank or not len(piece):
                continue
            torch.manual_seed(hash((self.task.seed, self.step, number)) % 2**63)
            loss, size = self.task.loss(self.model, piece, self.epoch, self.device)
            if size:
                loss.backward()
                total, weight = total + loss.detach(), weight + size
        gradients, loss_sum, weight = self._sum_gradients(float(total), weight)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        norm = nn.utils.get_total_norm(gradients)
        torch._foreach_mul_(gradients, (settings.gradient_clip / (norm + 1e-6)).clamp(max=1.0))  # as clip_grad_norm_ does
        if not torch.isfinite(norm):
            raise FloatingPointError(
                f"the gradient is not finite at step {self.step}: lower learning_rate, or look for NaN in the input vectors"
            )
        self.optimizer.step()
        self.step += 1
        decay = min(settings.averaging, self.step / (self.step + 10))  # shorter average during the first steps
        self.rows.step(rate, decay if self.average is not None else None)
        if self.average is not None:
            tensors = {name: tensor for name, tensor in self.model.state_dict().items() if name not in self.rows.weights}
            pairs = [(self.average[name], tensor) for name, tensor in tensors.items() if tensor.is_floating_point()]
            torch._foreach_lerp_([mean for mean, _ in pairs], [tensor for _, tensor in pairs], 1 - decay)
        return loss_sum, weight

    def _sum_gradients(self, loss: float, weight: float) -> tuple[list[Tensor], float, float]:
        """Sum gradients, loss and weight over all workers, and divide the gradients by the weight; returns all three."""
        gradients = []
        for parameter in self.dense:
            if parameter.grad is None:  # unused by this worker's microbatches, but perhaps used by others'
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
        if self.world_size > 1:
            sums = torch.tensor([loss, weight], dtype=torch.float64)
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            dist.all_reduce(flat)
            sums = sums.to(self.device if dist.get_backend() == "nccl" else "cpu")
            dist.all_reduce(sums)
            loss, weight = sums.tolist()
            offset = 0
            for gradient in gradients:
                gradient.copy_(flat[offset : offset + gradient.numel()].view_as(gradient))
                offset += gradient.numel()
        gradients += self.rows.gradients(cast(Callable[[Tensor], None], dist.all_reduce) if self.world_size > 1 else None)
        for gradient in gradients:
            gradient.div_(max(weight, 1e-12))
        return gradients, loss, weight

    def evaluate(self) -> EpochMetrics:
        """The task's metrics for the weights that would be saved."""
        kept = None
        if self.average is not None:
            kept = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
            self.model.load_state_dict(self.average)
        self.model.eval()
        with torch.inference_mode():
            metrics = self.task.evaluate(self.model, self.device)
        if kept is not None:
            self.model.load_state_dict(kept)
        return metrics

    def _keep_best(self, metrics: dict[str, float]) -> None:
        if self.task.criterion is None or self.task.criterion[0] not in metrics:
            return
        name, sign = self.task.criterion
        if self.best_value is None or sign * metrics[name] > sign * self.best_value:
            self.best_value, self.waited = metrics[name], 0
            self.best = {key: tensor.clone() for key, tensor in self.weights().items()}
        else:
            self.waited += 1

    def agree(self, number: int) -> int:
        """The number of rank 0, on every worker."""
        if self.world_size == 1:
            return number
        said = torch.tensor([number], device=self.device if dist.get_backend() == "nccl" else "cpu")
        dist.broadcast(said, 0)
        return int(said)

    def _broadcast_weights(self) -> None:
        if self.world_size > 1:
            for tensor in self.model.state_dict().values():
                dist.broadcast(tensor, 0)

    def save(self, directory: Path) -> None:
        """Write a checkpoint from which `restore` resumes exactly."""
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        tensors |= {f"best.{name}": tensor for name, tensor in self.best.items()}
        tensors |= {f"average.{name}": tensor for name, tensor in (self.average or {}).items()}
        for group, optimizer in self._optimizers().items():
            for number, values in optimizer.state_dict()["state"].items():
                tensors |= {f"{group}.{number}.{name}": torch.as_tensor(tensor) for name, tensor in values.items()}
        save_file({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}, directory / "state.safetensors")
        state = {"epoch": self.epoch, "step": self.step, "waited": self.waited, "best_value": self.best_value, "log": self.log}
        (directory / "state.json").write_text(json.dumps(state))

    def restore(self, directory: Path) -> None:
        state = json.loads((directory / "state.json").read_text())
        self.epoch, self.step, self.waited = state["epoch"], state["step"], state["waited"]
        self.best_value, self.log = state["best_value"], state["log"]
        groups: dict[str, dict[str, Tensor]] = {name: {} for name in ("model", "best", "average", "optimizer", "rows")}
        for name, tensor in load_file(directory / "state.safetensors", device=str(self.device)).items():
            group, _, rest = name.partition(".")
            groups[group][rest] = tensor
        self.model.load_state_dict(groups["model"])
        self.best = groups["best"]
        self.average = self.rows.average = groups["average"] or None
        for group, optimizer in self._optimizers().items():
            content = optimizer.state_dict()
            for name, tensor in groups[group].items():
                number, _, key = name.partition(".")
                if key == "step":  # a number for SparseAdam, whose powers of it would otherwise be rounded to float32
                    tensor = tensor.cpu() if group == "optimizer" else int(tensor)  # type: ignore[assignment]
                content["state"].setdefault(int(number), {})[key] = tensor
            optimizer.load_state_dict(content)

    def _optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Name in a checkpoint -> optimizer."""
        return {"optimizer": self.optimizer} | ({"rows": self.rows.optimizer} if self.rows.optimizer else {})


def publish(loop: Loop, run: RunDir, folder: str) -> None:
    """Write the trained model and the log of its epochs to the run directory."""
    run.write_bytes(f"{folder}/metrics.jsonl", "".join(json.dumps(line) + "\n" for line in loop.log).encode())
    loop.model.load_state_dict(loop.best or loop.weights())
    loop.model.eval()
    with torch.no_grad():  # not inference mode: a task may fit something
        loop.task.complete(loop.model, loop.device)
    run.save_model(f"{folder}/model", loop.model.state_dict(), loop.task.description())


def last_metrics(run: RunDir, folder: str) -> Any:
    """Metrics of the last epoch of a published training."""
    return run.read_lines(f"{folder}/metrics.jsonl")[-1]


def trained(run: RunDir, folder: str) -> bool:
    """Whether a training has published its model, as in an earlier try of its stage that was interrupted later."""
    return run.exists(f"{folder}/model/model.json")


def build(make_task: Callable[[], Task[EpochMetrics]], run: RunDir, folder: str) -> None:
    """Build a model that needs no training, and publish it like a trained one."""
    loop = Loop(make_task(), torch.device("cpu"))
    loop.log.append({"epoch": 0, **loop.evaluate()})
    publish(loop, run, folder)


def shuffled_batches(size: int, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """Shuffled batches of about equal size, at most batch_size; the order depends on seed and epoch."""
    order = np.random.default_rng([seed, epoch]).permutation(size)
    return np.array_split(order, max(1, -(-size // batch_size)))
