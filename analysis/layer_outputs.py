"""How large the outputs of decoder layers are, and the gradients that reach them (Fig. 5), with attention over depth or
without."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from ..rewiring import decoder_layers
from .layout import Layout, base_model
from .observation import ObservedRead, observed

Boundary = Callable[[int, torch.Tensor, torch.Tensor], None]  # of a layer: its index, what it wrote, what accumulated


class Magnitudes:
    """Means over tokens for each decoder layer, `[layers]`, float64.

    Attributes:
        written: root mean square of what the layer adds.
        accumulated: root mean square of what it adds to, with its own: the residual stream, or the sum of its block.
        gradients: norm of the gradient of a token's loss at this sum, or `None`. The losses of all tokens are summed.
        num_tokens: how many were seen.
    """

    def __init__(self, num_layers: int, has_gradients: bool):
        self.num_tokens = 0
        self.sums = np.zeros((3, num_layers))
        self.has_gradients = has_gradients

    @property
    def written(self) -> np.ndarray:
        return self.sums[0] / self.num_tokens

    @property
    def accumulated(self) -> np.ndarray:
        return self.sums[1] / self.num_tokens

    @property
    def gradients(self) -> np.ndarray | None:
        return self.sums[2] / self.num_tokens if self.has_gradients else None

    def see(self, layer: int, written: torch.Tensor, accumulated: torch.Tensor) -> None:
        for number, tensor in enumerate((written, accumulated)):
            values = tensor.detach().float()
            self.sums[number, layer] += values.square().mean(-1).sqrt().sum().item()
        if self.has_gradients and accumulated.requires_grad:
            accumulated.register_hook(lambda gradient: self._see_gradient(layer, gradient))

    def _see_gradient(self, layer: int, gradient: torch.Tensor) -> None:
        self.sums[2, layer] += gradient.float().norm(dim=-1).sum().item()


def magnitudes(model: PreTrainedModel, batches: Iterable[torch.Tensor], gradients: bool = False) -> Magnitudes:
    """Measures the outputs of the decoder layers of a model, an AttnRes model or a plain decoder.

    Args:
        model (`PreTrainedModel`): with a head, if gradients are asked for.
        batches: of token ids, each `[batch, sequence]`.
        gradients (`bool`, *optional*, defaults to `False`): run the backward as well; weights get no gradient.

    Returns:
        [`Magnitudes`]
    """
    found = Magnitudes(len(decoder_layers(model)), gradients)
    for input_ids in batches:
        input_ids = input_ids.to(model.device)
        if gradients and input_ids.shape[1] < 2:
            continue
        entries: list[torch.Tensor] = []  # the embedding, down to which the backward goes
        with boundaries(model, found.see, entries if gradients else None), torch.set_grad_enabled(gradients):
            if gradients:
                loss = token_losses(model, input_ids).sum()
                torch.autograd.grad(loss, entries[0])
            else:
                base_model(model)(input_ids=input_ids, use_cache=False)
        found.num_tokens += input_ids.numel()
    return found


def token_losses(model: PreTrainedModel, input_ids: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of each token but the first of its window, `[batch * (sequence - 1)]`, in nats."""
    logits = model(input_ids=input_ids, use_cache=False).logits[:, :-1].float()
    targets = input_ids[:, 1:].to(logits.device)
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")


def _entry(tensor: torch.Tensor, entries: list[torch.Tensor] | None) -> None:
    if entries is not None:
        entries.append(tensor if tensor.requires_grad else tensor.requires_grad_())


@contextmanager
def boundaries(model: PreTrainedModel, see: Boundary, entries: list[torch.Tensor] | None) -> Iterator[None]:
    """Within this, `see` is called behind every decoder layer of a model."""
    if isinstance(getattr(model.config, "depth_attention", None), dict):
        with observed(model, ObservedRead(_states(Layout.of(model), see, entries))):
            yield
        return
    layers = list(decoder_layers(model))

    def behind(index: int) -> Callable[..., None]:
        def hook(module: Any, args: Any, kwargs: Any, output: Any) -> None:
            before = args[0] if args else next(iter(kwargs.values()))
            after = output[0] if isinstance(output, tuple) else output
            see(index, after.detach() - before.detach().to(after.device), after)

        return hook

    def in_front(module: Any, args: Any, kwargs: Any) -> None:
        _entry(args[0] if args else next(iter(kwargs.values())), entries)

    handles = [layers[0].register_forward_pre_hook(in_front, with_kwargs=True)]
    handles += [layer.register_forward_hook(behind(i), with_kwargs=True) for i, layer in enumerate(layers)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _states(layout: Layout, see: Boundary, entries: list[torch.Tensor] | None) -> Any:
    """Finds what each decoder layer wrote from the states of depth before and behind it."""
    before: dict[str, Any] = {}

    def look(read: int, sources: tuple[torch.Tensor, ...], partial_sum: torch.Tensor | None) -> None:
        if read % layout.sublayers_per_layer:
            return
        if read == 0:
            _entry(sources[0], entries)
        else:
            new = [*sources[before["finished"] :], *([] if partial_sum is None else [partial_sum])]
            with torch.no_grad():
                written = torch.stack([value.detach() for value in new]).sum(0)
                if before["partial_sum"] is not None:
                    written = written - before["partial_sum"].to(written.device)
            see(read // layout.sublayers_per_layer - 1, written, new[-1])
        before.update(finished=len(sources), partial_sum=None if partial_sum is None else partial_sum.detach())

    return look
