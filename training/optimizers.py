"""Optimizers: depth parameters apart, and Muon for matrices beside AdamW for the rest."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Muon, Optimizer

# The modules that hold depth parameters: of this package, and of the baselines in `training/baselines`.
DEPTH_MODULES = frozenset(("depth_attention", "depth_weights", "hyper_connections"))
BETAS = (0.9, 0.95)


def is_depth_parameter(name: str) -> bool:
    """Whether the parameter of this dotted name says how layers read from depth."""
    return not DEPTH_MODULES.isdisjoint(name.split("."))


class MuonAndAdamW(Optimizer):
    """Muon for the groups with `use_muon`, AdamW for the others; one optimizer for schedules and checkpoints.

    Args:
        groups (`list[dict]`): groups of parameters, each with `lr`, `weight_decay` and `use_muon`.
        betas (`tuple[float, float]`): of AdamW.
    """

    def __init__(self, groups: list[dict[str, Any]], betas: tuple[float, float] = BETAS):
        if not any(group["use_muon"] for group in groups):
            raise ValueError("no parameter is for Muon")
        # With this rule a learning rate of AdamW is right for Muon, too.
        muon = Muon([p for g in groups if g["use_muon"] for p in g["params"]], adjust_lr_fn="match_rms_adamw")
        adamw = AdamW([nn.Parameter(torch.empty(0))], betas=betas)
        self._optimizers: dict[bool, Optimizer] = {True: muon, False: adamw}
        super().__init__([{**self._optimizers[group["use_muon"]].defaults, **group} for group in groups], {})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of both; see `torch.optim.Optimizer.step`."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for uses_muon, optimizer in self._optimizers.items():
            # Loading a state replaces groups and state, sharding replaces parameters, so both are handed over anew.
            optimizer.param_groups = [group for group in self.param_groups if group["use_muon"] == uses_muon]
            optimizer.state = self.state
            optimizer.step()
        return loss


def parameter_groups(
    model: nn.Module,
    decayed: Collection[str],
    learning_rate: float,
    depth_learning_rate: float,
    weight_decay: float,
    with_muon: bool,
) -> list[dict[str, Any]]:
    """The trained parameters of a model in groups: matrices for Muon, other decayed ones, the rest, and depth.

    Args:
        model (`nn.Module`): the model; parameters without `requires_grad` are left out.
        decayed (`Collection[str]`): names of the parameters that weight decay is for.
        learning_rate (`float`): of all but depth parameters.
        depth_learning_rate (`float`): of depth parameters, which have no weight decay.
        weight_decay (`float`): of the parameters that are `decayed`.
        with_muon (`bool`): whether the matrices of decoder layers are for Muon. Embeddings, the head, and experts that
            are stacked in one tensor are not.
    """
    outside = {id(p) for m in (_embedding(model, "input"), _embedding(model, "output")) if m for p in m.parameters()}
    kinds: dict[str, list[nn.Parameter]] = {"muon": [], "decayed": [], "other": [], "depth": []}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if is_depth_parameter(name):
            kinds["depth"].append(parameter)
        elif with_muon and parameter.ndim == 2 and id(parameter) not in outside and name in decayed:
            kinds["muon"].append(parameter)
        else:
            kinds["decayed" if name in decayed else "other"].append(parameter)
    return [
        {
            "params": parameters,
            "lr": depth_learning_rate if kind == "depth" else learning_rate,
            "weight_decay": weight_decay if kind in ("muon", "decayed") else 0.0,
            "use_muon": kind == "muon",
        }
        for kind, parameters in kinds.items()
        if parameters
    ]


def _embedding(model: Any, kind: str) -> nn.Module | None:
    return getattr(model, f"get_{kind}_embeddings", lambda: None)()


def make_optimizer(groups: list[dict[str, Any]]) -> Optimizer:
    """AdamW, or [`MuonAndAdamW`] if a group is for Muon."""
    if any(group["use_muon"] for group in groups):
        return MuonAndAdamW(groups)
    return AdamW([{k: v for k, v in group.items() if k != "use_muon"} for group in groups], betas=BETAS)
