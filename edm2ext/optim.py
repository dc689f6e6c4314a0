"""Adam as EDM2 uses it, with all that surrounds it in a step, in one pass over the parameters (4.2, 5.1, 2.6)."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from edm2ext import ops
from edm2ext.nn import MPConv, MPLinear
from edm2ext.ops.adam_step import adam_step_
from edm2ext.phema import PowerEMA

Gradients = Literal["raw", "effective"]


class LossScale:
    """A factor on the loss that keeps small float16 gradients from vanishing; it lives on the device.

    Multiply the loss by `scale` (0-dim float32), and hand this object to `FusedAdam`, which divides the gradients by it
    and calls `update` after each step: the scale is multiplied by `backoff` when a gradient was not finite, and by
    `growth` after `interval` good steps in a row, within [2^-24, 2^24]. No step is skipped: bad values count as 0
    (4.2).
    """

    def __init__(
        self,
        initial: float = 2.0**16,
        *,
        growth: float = 2.0,
        backoff: float = 0.5,
        interval: int = 2000,
        device: torch.device | str | None = None,
    ) -> None:
        if not (initial > 0 and growth >= 1 and 0 < backoff <= 1 and interval >= 1):
            raise ValueError(
                f"LossScale: initial > 0, growth >= 1, 0 < backoff <= 1 and interval >= 1 must hold, "
                f"got {initial}, {growth}, {backoff} and {interval}"
            )
        self.scale = torch.tensor(float(initial), dtype=torch.float32, device=device)
        self.good_steps = torch.zeros((), dtype=torch.int64, device=device)
        self.growth, self.backoff, self.interval = growth, backoff, interval

    @torch.no_grad()
    def update(self, bad: Tensor) -> None:
        """Adapt the scale after a step; bad: 0-dim bool, whether a gradient was not finite."""
        good = torch.where(bad, 0, self.good_steps + 1)
        grown = good >= self.interval
        factor = torch.where(bad, self.backoff, torch.where(grown, self.growth, 1.0))
        self.scale.copy_((self.scale * factor).clamp(2.0**-24, 2.0**24))
        self.good_steps.copy_(torch.where(grown, 0, good))

    def state_dict(self) -> dict[str, Tensor]:
        """Scale and number of good steps (not copies)."""
        return {"scale": self.scale, "good_steps": self.good_steps}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy what `state_dict` returned."""
        self.scale.copy_(state["scale"])
        self.good_steps.copy_(state["good_steps"])


class FusedAdam(torch.optim.Optimizer):
    """Adam whose step is one pass over the parameters, in this order: unscale the gradients; zero and count values that
    are not finite; apply the backward of weight normalisation (2.6) where gradients are those of effective weights;
    Adam (torch's formula); take the new, not yet normalised value into the averages; force-normalise weights (Eq. 66);
    make the effective weights of the next forward. On a GPU nothing waits for the device.

    Weights, whose rows are normalised, are those of the MPConv and MPLinear layers if a module is given, or else
    `weights`, by default the keys of `gains` and `prepared`; other parameters get Adam and averages only. Of a weight
    that is shared out by rows, each process hands over its own rows, which may be none.

    gains: maps a weight to the 0-dim parameter that is a factor of it. gradients: "raw", what autograd gives; or
    "effective", where the gradient of a weight is that of its effective weight, and its gain has none: it gets its own
    from the weight's. ema: the averages to update, of these very parameters. force_normalize: normalise weights after
    the step. prepared: maps a weight to a tensor of its shape that takes its effective weight. loss_scale: what the
    loss was multiplied by. Before the first forward, and after loading weights, call `prepare`.

    The state has the layout of torch.optim.Adam's: each loads the other's. `nonfinite` holds for each parameter the
    number of gradient values that were not finite so far (int64, on the device).

    Raises ValueError for options out of range, mappings that name unknown parameters, shapes that do not fit, and
    parameters on several devices.
    """

    def __init__(
        self,
        net_or_params: "nn.Module | Iterable[Parameter]",
        lr: float,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        *,
        weights: Iterable[Parameter] | None = None,
        gains: Mapping[Parameter, Parameter] | None = None,
        gradients: Gradients = "raw",
        ema: PowerEMA | None = None,
        force_normalize: bool = False,
        prepared: Mapping[Parameter, Tensor] | None = None,
        loss_scale: LossScale | None = None,
    ) -> None:
        if not lr >= 0 or not eps >= 0 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"FusedAdam: lr, eps >= 0 and betas in [0, 1) must hold, got {lr}, {eps} and {betas}")
        if gradients not in ("raw", "effective"):
            raise ValueError(f"FusedAdam: gradients must be 'raw' or 'effective', got {gradients!r}")
        module = isinstance(net_or_params, nn.Module)
        options = {"weight_decay": 0, "amsgrad": False, "maximize": False, "foreach": None, "capturable": False}
        options |= {"differentiable": False, "fused": None, "decoupled_weight_decay": False}
        params = list(net_or_params.parameters() if module else net_or_params)
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "eps": eps, **options})
        if len({param.device for param in self.params}) > 1:
            raise ValueError("FusedAdam: all parameters must be on one device")
        self.gains = dict(gains or {})
        self.prepared = dict(prepared or {})
        if module:
            layers = (layer for layer in net_or_params.modules() if isinstance(layer, MPConv | MPLinear))
            weights = [layer.weight for layer in layers]
        elif weights is None:
            weights = [param for param in self.params if param in self.gains or param in self.prepared]
        self.weights = list(dict.fromkeys(weights))
        self.gradients: Gradients = gradients
        self.force_normalize = force_normalize
        self.ema = ema
        self.loss_scale = loss_scale
        self.nonfinite = torch.zeros(len(self.params), dtype=torch.int64, device=self.params[0].device)
        self._check_mappings()
        self._launch: list[dict[str, Any]] = []

    @property
    def params(self) -> list[Parameter]:
        """All parameters."""
        return self.param_groups[0]["params"]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Takes the one group there is; raises ValueError for a second."""
        if self.param_groups:
            raise ValueError("FusedAdam: all parameters form one group")
        super().add_param_group(param_group)

    def _check_mappings(self) -> None:
        known, known_params = set(self.weights), set(self.params)
        for name, mapping in (("gains", self.gains), ("prepared", self.prepared)):
            if any(weight not in known for weight in mapping):
                raise ValueError(f"FusedAdam: {name} must map weights of the network")
        if len(set(self.gains.values())) < len(self.gains):
            raise ValueError("FusedAdam: gains must map each weight to a gain of its own")
        for gain in self.gains.values():
            if gain not in known_params or gain.dim() != 0:
                raise ValueError("FusedAdam: gains must be 0-dim parameters of the network")
        if any(weight.dtype != gain.dtype for weight, gain in self.gains.items()):
            raise ValueError("FusedAdam: gains must be of their weights' dtype")
        for weight, target in self.prepared.items():
            if target.shape != weight.shape or target.device != weight.device:
                raise ValueError(
                    f"FusedAdam: prepared must hold tensors like their weights, got {list(target.shape)} on "
                    f"{target.device} for {list(weight.shape)} on {weight.device}"
                )
        if self.ema is not None and [id(p) for p in self.ema.params] != [id(p) for p in self.params]:
            raise ValueError("FusedAdam: ema must average the optimizer's parameters, in their order")

    def make_state(self) -> None:
        """Make the state that a parameter's first step would make, where there is none: to load values into."""
        for param in self.params:
            if not self.state[param]:
                self.state[param] = _new_state(param)

    def prepare(self) -> None:
        """Force-normalise all weights, if the step does, and make the effective weights of the next forward."""
        if self.force_normalize:
            ops.force_normalize_([w.detach() for w in self.weights])
        weights = list(self.prepared)
        gains = [self.gains.get(w) for w in weights]
        ops.prepare_weights(weights, gains, out=list(self.prepared.values()))

    @torch.no_grad()
    def step(self, one_minus_betas: Sequence[float] | None = None) -> None:  # type: ignore[override]
        """Step all parameters that have gradients. one_minus_betas: 1 - beta of each average of this step (Eq. 127), in
        float64; required if there are averages. The same as `advance`, then `launch`."""
        self.advance(one_minus_betas)
        self.launch()

    @torch.no_grad()
    def advance(self, one_minus_betas: Sequence[float] | None = None) -> None:
        """The host's part of a step: count it, and send learning rate, bias corrections and averages' weights to the
        device. To replay a captured `launch`, call this before each replay: the same parameters must have gradients.

        Raises ValueError if the weights of averages are missing or not as many as the averages, or if in "effective"
        mode a gain has a gradient of its own.
        """
        profiles = 0 if self.ema is None else len(self.ema.profiles)
        one_minus_betas = [] if one_minus_betas is None else [float(value) for value in one_minus_betas]
        if len(one_minus_betas) != profiles:
            raise ValueError(f"FusedAdam: one_minus_betas must have {profiles} entries, got {len(one_minus_betas)}")
        buckets = self._buckets()
        group = self.param_groups[0]
        if [bucket["stepped"] for bucket in buckets] != [launch["stepped"] for launch in self._launch]:
            device = self.nonfinite.device
            for bucket in buckets:
                bucket["scalars"] = torch.empty(2 + profiles, dtype=torch.float64, device=device)
            self._launch = buckets
        for launch in self._launch:
            steps = [self.state[self.params[i]]["step"] for i in launch["stepped"]]
            torch._foreach_add_(steps, 1)
            count = int(steps[0])
            beta1, beta2 = group["betas"]
            values = [float(group["lr"]) / (1 - beta1**count), (1 - beta2**count) ** 0.5, *one_minus_betas]
            # Pinned memory is not given to others before the copy is done.
            host = torch.tensor(values, dtype=torch.float64, pin_memory=launch["scalars"].is_cuda)
            launch["scalars"].copy_(host, non_blocking=True)
        if self.ema is not None:
            stepped = {i for launch in self._launch for i in launch["stepped"]}
            left = [i for i in range(len(self.params)) if i not in stepped]
            emas = [[profile[i] for i in left] for profile in self.ema.profiles]
            ops.ema_update_(emas, [self.params[i].detach() for i in left], one_minus_betas)

    @torch.no_grad()
    def launch(self) -> None:
        """The device's part of a step, after `advance`. Can be captured in a CUDA graph."""
        before = None if self.loss_scale is None else self.nonfinite.sum()
        profiles = [] if self.ema is None else self.ema.profiles
        group = self.param_groups[0]
        known, launch_of = set(self.weights), {}
        for number, launch in enumerate(self._launch):
            indices = launch["stepped"]
            params = [self.params[i] for i in indices]
            place = {param: j for j, param in enumerate(params)}
            launch_of |= dict.fromkeys(params, number)
            adam_step_(
                [param.detach() for param in params],
                [param.grad for param in params],
                [self.state[param]["exp_avg"] for param in params],
                [self.state[param]["exp_avg_sq"] for param in params],
                emas=[[profile[i] for i in indices] for profile in profiles],
                weights=[param in known for param in params],
                gains=[place.get(self.gains.get(param), -1) for param in params],
                prepared=[self.prepared.get(p) if self.gains.get(p, p) in place else None for p in params],
                counters=indices,
                scalars=launch["scalars"],
                loss_scale=None if self.loss_scale is None else self.loss_scale.scale,
                nonfinite=self.nonfinite,
                betas=group["betas"],
                eps=group["eps"],
                effective=self.gradients == "effective",
                force=self.force_normalize,
            )
        # Where a weight and its gain did not step together:
        pairs = [(w, gain) for w, gain in self.gains.items() if w in self.prepared]
        rest = [w for w, gain in pairs if launch_of.get(w) != launch_of.get(gain)]
        if rest:
            ops.prepare_weights(rest, [self.gains[w] for w in rest], out=[self.prepared[w] for w in rest])
        if self.loss_scale is not None:
            self.loss_scale.update(self.nonfinite.sum() > before)

    def _buckets(self) -> list[dict[str, Any]]:
        """Indices of the parameters that step now, in groups of one dtype that have made as many steps."""
        effective = self.gradients == "effective"
        owners = {gain: weight for weight, gain in self.gains.items()} if effective else {}
        buckets: dict[tuple, list[int]] = {}
        for i, param in enumerate(self.params):
            if param in owners and param.grad is not None:
                raise ValueError('FusedAdam: with "effective" gradients, gains must have none of their own')
            owner = owners.get(param, param)
            if owner.grad is None:
                continue
            if not self.state[param]:
                self.state[param] = _new_state(param)
            if not self.state[owner]:
                self.state[owner] = _new_state(owner)
            key = (param.dtype, int(self.state[owner]["step"]))
            if int(self.state[param]["step"]) != key[1]:
                raise ValueError("FusedAdam: a gain must have made as many steps as its weight")
            buckets.setdefault(key, []).append(i)
        return [{"stepped": indices} for indices in buckets.values()]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Copy a state saved by this class or by torch.optim.Adam. Raises ValueError if that had options this has not,
        or if the parameters do not match."""
        for group in state_dict["param_groups"]:
            for option in ("weight_decay", "amsgrad", "maximize"):
                if group.get(option):
                    raise ValueError(f"FusedAdam: the state's {option} must be off, got {group[option]}")
        super().load_state_dict(state_dict)
        for param, state in self.state.items():
            if not state:
                continue
            state["step"] = torch.as_tensor(state["step"], dtype=torch.float32).cpu().clone()
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.empty_like(param, requires_grad=False).copy_(state[name])
        self._launch = []


def _new_state(param: Tensor) -> dict[str, Tensor]:
    """What torch.optim.Adam keeps for a parameter."""
    zeros = [torch.zeros_like(param, memory_format=torch.preserve_format, requires_grad=False) for _ in range(2)]
    return {"step": torch.zeros((), device="cpu"), "exp_avg": zeros[0], "exp_avg_sq": zeros[1]}
