"""Gradients, steps of an optimiser, and weights changed or replaced by others."""

from contextlib import nullcontext

import torch
from peft import LoraConfig, get_peft_model
from soak.caching import Caching
from soak.oracle import permuted
from soak.world import LIMITS, PERHAPS
from torch import nn
from torch.nn.utils.parametrize import register_parametrization, remove_parametrizations


class Weights(Caching):
    """A world in which weights change."""

    def zero_grad(self) -> None:
        for model in self.both():
            model.zero_grad()

    def backward(self, seed: int, between: bool) -> None:
        """Gradients of a loss are the twin's; with another batch `between`, or torch notices."""
        if self.unfit or self.model.training or self.dtype in (torch.float16, torch.bfloat16):
            return
        if not any(p.requires_grad for p in self.model.parameters()):
            return
        self._begin_prompt()
        self._mark_stale()
        arguments, real = self.inputs(2, 7, "left", "2d", seed)
        arguments["use_cache"] = False
        output = self.attempt(
            "backward",
            lambda: self._pass(self.model, arguments, "grad"),
            "",
            lambda: self._pass(self.twin, arguments, "grad"),
        )
        if output is None:
            for seen in self.seen:
                seen.clear()
            return
        loss = output.logits[real.bool()].square().mean()
        oracle = self._oracle(real)
        if between:
            self._pass(self.model, self.inputs(3, 6, "none", "2d", seed + 1)[0], "no_grad")
        try:
            loss.backward()
        except RuntimeError as error:
            assert between and "modified by an inplace operation" in str(error), error
            self.counts["backward", "refused"] += 1
            self.zero_grad()
            for seen in self.seen:
                seen.clear()
            return
        with oracle() if oracle else nullcontext():
            self._pass(self.twin, arguments, "grad").logits[real.bool()].square().mean().backward()
        for seen in self.seen:
            seen.clear()
        self.check_gradients()

    def check_gradients(self) -> None:
        """Gradients lie in the order of their weights."""
        if self.unspecified:
            return
        wanted = self.gradients()
        if any(want.isnan().any() for want in wanted.values()):
            return  # eager attention in float64 masks with infinity: the dense model has no gradients either
        largest = max(want.abs().max() for want in wanted.values())
        # A cast rounds what a compensation computed, in another order than the twin's.
        share = max(1e-3, *(LIMITS[dtype] for dtype in {self.dtype, *self.rounded}))
        for name, p in self.model.named_parameters():
            got, want = torch.zeros_like(p) if p.grad is None else p.grad, wanted[name]
            # Some gradients are zero but for rounding: the bias of keys moves all scores alike.
            limit = share * want.abs().max() + 1e-5 * largest
            assert (got - want).abs().max() <= limit, f"the gradient of {name}"

    def gradients(self) -> dict[str, torch.Tensor]:
        """The twin's gradients, in the order in which the model has its weights now."""
        if self.handle is None:
            return {
                n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in self.twin.named_parameters()
            }
        values = {n: p.detach().clone() for n, p in self.twin.named_parameters()}
        try:
            for p in self.twin.parameters():
                p.data = torch.zeros_like(p) if p.grad is None else p.grad.clone()
            return {n: g.clone() for n, g in permuted(self.handle, self.twin).items()}
        finally:
            for n, p in self.twin.named_parameters():
                p.data = values[n]

    def descend(self) -> None:
        """One step of an optimiser on the gradients at hand."""
        if self.loose or self.unfit or all(p.grad is None for p in self.model.parameters()):
            return
        if self.unspecified:
            return
        for model in self.both():
            torch.optim.SGD(model.parameters(), lr=1e-4).step()
        self.edited = self.loose = True
        if self.handle is not None and self.handle.pruned:
            self.unfit = "weights changed"
        self.cache = None

    def edit(self, how: str, place: int) -> None:
        """Scale some weight: in place under `no_grad` or through `data`, or by `new data`."""
        name = self.places[place % len(self.places)]
        modules = [m.get_submodule(name) for m in self.both()]
        if not isinstance(modules[1], nn.Linear) or modules[1].weight is None:
            blocks = False
        else:
            blocks = name != self.places[-1]
        pruned = self.handle is not None and any(
            name in [m.name for m in p.block.members] for p in self.handle.pruned
        )
        if getattr(modules[1], "weight", None) is None:
            return
        for module in modules:
            parameter = module._parameters["weight"]
            if how == "no_grad":
                with torch.no_grad():
                    parameter.mul_(1.5)
            elif how == "data":
                parameter.data.mul_(1.5)
            else:
                parameter.data = parameter.data * 1.5
        self.edited, self.cache = True, None
        if pruned and blocks:
            if how == "data":
                self.unspecified = True
            else:
                self.unfit = "weights changed"

    def replace(self, how: str, place: int) -> None:
        """Another `parameter`, a `parametrization` or another `module` somewhere, and the old one back."""
        name = self.places[place % len(self.places)]
        modules = [m.get_submodule(name) for m in self.both()]
        if not isinstance(modules[1], nn.Linear) or "forward" in modules[1].__dict__:
            return
        pruned = self.handle is not None and any(
            name in [m.name for m in p.block.members] for p in self.handle.pruned
        )
        arguments = {**self.inputs(2, 5, "none", "2d", 1)[0], "use_cache": False}
        for model, module in zip(self.both(), modules, strict=True):
            refusal = "attached" if pruned and model is self.model else ""
            old = module._parameters["weight"]
            if how == "parameter":
                self.attempt(
                    how, lambda m=module, o=old: setattr(m, "weight", nn.Parameter(o.data)), refusal, None
                )
                if not refusal:
                    module.weight = old
            elif how == "delete":
                self.attempt(how, lambda m=module: delattr(m, "weight"), refusal, None)
                if not refusal:
                    module.register_parameter("weight", old)
                    bias = module._parameters.pop("bias")
                    module.register_parameter("bias", bias)
            elif how == "parametrization":

                def parametrize(m: nn.Module = module) -> None:
                    register_parametrization(m, "weight", nn.Identity())
                    remove_parametrizations(m, "weight", leave_parametrized=False)
                    bias = m._parameters.pop("bias")
                    m.register_parameter("bias", bias)

                self.attempt(how, parametrize, refusal, None)
                if refusal and not self.unfit:  # torch writes to what is shown before it takes it away
                    self.unfit = PERHAPS
            else:
                parent, _, key = name.rpartition(".")
                other = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
                other.to(old.dtype)
                owner = model.get_submodule(parent)
                setattr(owner, key, other)
                reason = self.unfit or (self.handle is not None and self.model.training and "training")
                reason = refusal or reason if model is self.model else ""
                result = self.attempt(
                    how, lambda m=model: self._pass(m, arguments, "no_grad"), str(reason or ""), None
                )
                assert not refusal or result is None, "a pass over a replaced module was not refused"
                setattr(owner, key, module)
        self._mark_stale()
        for seen in self.seen:
            seen.clear()

    def adapter(self, seed: int) -> None:
        """PEFT around the model for one pass, and off again."""
        if self.hooks or any("forward" in m.__dict__ for m in self.twin.modules()):
            return
        suffix = ("3.self_attn.q_proj", "3.self_attn.qkv_proj", "3.attention.query_key_value")
        target = next(n for n, _ in self.twin.named_modules() if n.endswith(suffix))
        arguments, _real = self.inputs(2, 7, "left", "2d", seed)
        outputs = []
        refusal = self.unfit or (self.handle is not None and "replaced")
        for model in self.both():
            flags = [p.requires_grad for p in model.parameters()]
            tuned = get_peft_model(model, LoraConfig(r=2, target_modules=[target], task_type="CAUSAL_LM"))
            tuned.train(model.training)
            try:
                outputs.append(
                    self.attempt(
                        "adapter",
                        lambda tuned=tuned: self._pass(tuned, {**arguments, "use_cache": False}, "no_grad"),
                        str(refusal or "training" if model.training else refusal or ""),
                        None,
                    )
                )
            finally:
                tuned.unload()
                for p, flag in zip(model.parameters(), flags, strict=True):
                    p.requires_grad_(flag)
        self._mark_stale()
        for seen in self.seen:
            seen.clear()
