"""What the decoder layers of all baselines have in common."""

from __future__ import annotations

from typing import Any

from torch import nn

from ...backbones import Backbone


class BaselineDecoderLayer(nn.Module):
    """A decoder layer of the backbone whose residuals are a baseline's. Instances are made by
    [`~attnres.training.baselines.model.rewire`] from the layers of a backbone, never constructed.

    Attributes:
        structure (`Backbone`): what is known of the architecture.
        index (`int`): of the layer.
        is_last (`bool`): whether it is the last layer, which returns hidden states `[batch, sequence, hidden]`.
        sublayers (`int`): how often the layer reads from the residual stream and writes to it.
        input_name (`str`): what the layer's own forward calls its hidden states.
    """

    structure: Backbone
    index: int
    is_last: bool
    sublayers: int
    input_name: str

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Re-computation wants positional arguments for what needs gradients.
        hidden_states, *others = args or (kwargs.pop(self.input_name),)
        return super().__call__(hidden_states, *others, **kwargs)


def split(outputs: Any) -> tuple[Any, tuple[Any, ...]]:
    """What a layer returns: the hidden states, and the rest."""
    return (outputs[0], tuple(outputs[1:])) if isinstance(outputs, tuple) else (outputs, ())


def join(hidden_states: Any, outputs: Any) -> Any:
    """The same outputs with other hidden states."""
    return (hidden_states, *outputs[1:]) if isinstance(outputs, tuple) else hidden_states
