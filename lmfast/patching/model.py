"""`lmfast.patch` and `lmfast.unpatch`."""

from __future__ import annotations

import torch
from torch import nn

from lmfast._dispatch import BACKENDS
from lmfast.patching import layers, norms, recurrent, swap, textbook
from lmfast.patching.libraries import integration_of
from lmfast.patching.probe import verify
from lmfast.patching.report import Entry, PatchReport
from lmfast.patching.rules import Plan, Rule, options_of
from lmfast.patching.side_effects import side_effect

# Those that do the work of other modules come first.
_RULES: tuple[Rule, ...] = (
    recurrent.plan_torchs,
    recurrent.plan_stack,
    textbook.plan_attention,
    textbook.plan_mlp,
    layers.plan_gated,
    layers.plan_linear,
    norms.plan,
    norms.plan_layer_norm,
    layers.plan_activation,
)


def patch(model: nn.Module, *, backend: str | None = None) -> PatchReport:
    """Makes a model faster in place, without changing what it computes.

    Modules are recognised by their parameters and tried: each candidate is run against the module
    it would replace on small random inputs, values and gradients, in training and evaluation, and
    one that differs by more than rounding is left as it is; so is one whose forward does something
    else as well, such as counting its calls. Norms, activations, linear and gated
    feed-forward layers, recurrent layers, and the layers of textbooks on bare parameters are
    replaced wherever they stand; of transformers' models also attention, rotary positions and the
    loss, see `lmfast.integrations.transformers`. There, padding in front of a row, whose queries
    see no key, gets zeros from attention, where scores written out gave the mean of hidden values:
    what is predicted from it, the first token of the row, counts otherwise unless labelled -100.

    Parameters, names, hooks and the state_dict stay; only this model's modules change, no class and
    no function of others. Patching twice does nothing more.

    Args:
        model: a module; changed in place.
        backend: of all operators of the model, as in `lmfast.use_backend`; None chooses for every
            call.

    Returns:
        For each module, what replaced it or why nothing did; print it.

    Raises:
        TypeError: model is not a module.
        ValueError: there is no such backend.

    Backends: those of the operators named in the report.

    Example:
        >>> import lmfast, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.LSTM(8, 8))
        >>> print(lmfast.patch(model))
        lmfast.patch(Sequential): 2 of 3 modules replaced
          replaced:
               1 x Linear  lmfast.ops.linear; few rows, or 256 and more  [0]
               1 x LSTM    lmfast.nn.LSTM  [1]
          left as they are:
               1 x Sequential  nothing to replace  [(model)]
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS} or None, got {backend!r}")
    for module in swap.each_swapped(model):
        found = swap.swap_of(module)
        if found is not None and dict(found[2]).get("backend") != backend:
            unpatch(model)
            break
    report = PatchReport(type(model).__name__)
    worker = _Worker(model, backend, report)
    integration = integration_of(model)
    refusal = None if integration is None else integration.refusal(model)
    if refusal is not None:
        report.notes.append(refusal)
        report.entries += [
            Entry(name, type(m).__name__, None, "see above") for name, m in model.named_modules()
        ]
        return report
    worker.run(_RULES)
    if integration is not None:
        integration.patch(model, worker)
    report.entries = worker.entries()
    return report


def unpatch(model: nn.Module) -> None:
    """Takes back what `lmfast.patch` did to a model.

    Args:
        model: a module; one that was never patched is left as it is.

    Raises:
        TypeError: model is not a module.

    Example:
        >>> import lmfast, torch
        >>> model = torch.nn.Sequential(torch.nn.GRU(4, 4))
        >>> _ = lmfast.patch(model)
        >>> lmfast.unpatch(model)
        >>> type(model[0]) is torch.nn.GRU
        True
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    integration = integration_of(model)
    if integration is not None:
        integration.unpatch(model)
    for module in swap.each_swapped(model):
        swap.undo(module)


class _Worker:
    """Tries plans on modules and remembers what came of it."""

    def __init__(self, model: nn.Module, backend: str | None, report: PatchReport) -> None:
        self.model = model
        self.backend = backend
        self.report = report
        self.outcomes: dict[int, tuple[str | None, str]] = {}
        for module in swap.each_swapped(model):
            self.note(module)

    def run(self, rules: tuple[Rule, ...]) -> None:
        """Applies rules to every module that has no outcome yet."""
        for module in list(self.model.modules()):
            if id(module) in self.outcomes:
                continue
            if type(module).__module__.startswith("lmfast.nn."):
                self.outcomes[id(module)] = (None, "lmfast's own layer already")
                continue
            found = [plan for rule in rules if (plan := rule(module)) is not None]
            plans = [plan for plan in found if isinstance(plan, Plan)]
            if found and not plans:
                self.outcomes[id(module)] = (None, str(found[0]))
            for plan in plans:
                does_more = next(filter(None, map(side_effect, [module, *plan.absorbed])), None)
                if does_more is not None:
                    self.outcomes[id(module)] = (None, f"it does more than compute: {does_more}")
                    break
                if self.attempt(module, plan):
                    break

    def attempt(self, module: nn.Module, plan: Plan) -> bool:
        """Replaces a module's forward if a candidate computes the same."""
        reason = _unfit(module)
        for options in plan.candidates if reason is None else []:
            chosen = options_of(options, plan, self.backend)
            found = verify(module, plan.recipe, chosen, plan.calls)
            if found is None:
                swap.apply(module, plan.recipe, chosen)
                self.note(module)
                return True
            reason = reason or found  # the likeliest candidate's
        # Of several plans the first is the likeliest.
        self.outcomes.setdefault(id(module), (None, f"not {plan.label}: {reason}"))
        return False

    def note(self, module: nn.Module) -> None:
        """Keeps what the report is to say of a module with another forward, and of its parts."""
        found = swap.swap_of(module)
        assert found is not None
        options = dict(found[2])
        self.outcomes[id(module)] = (options["label"], options["note"])
        if "parts" in options:
            for part in getattr(module, options["parts"]):
                self.outcomes[id(part)] = (None, "its work is done by the module that holds it")

    def entries(self) -> list[Entry]:
        """One entry per module."""
        nothing = (None, "nothing to replace")
        return [
            Entry(name, type(m).__name__, *self.outcomes.get(id(m), nothing))
            for name, m in self.model.named_modules()
        ]


def _unfit(module: nn.Module) -> str | None:
    """Why a module cannot be given another forward whatever it computes, or None."""
    if "forward" in vars(module):
        return "its forward was replaced on the instance, by a hook of accelerate for example"
    if any(p.is_meta for p in module.parameters()):
        return "its weights are on the meta device: patch after loading them"
    if isinstance(module, torch.jit.ScriptModule):
        return "it is compiled by TorchScript"
    if type(module).__reduce_ex__ is not object.__reduce_ex__:
        return "it has its own way of pickling"
    return None
