"""One optimizer step over a list of parameters in one pass (specification 4.2, 5.1 and 2.6)."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from edm2ext import backend, reference

_adam_step_ = backend.op("adam_step_")
_KERNELS = backend.kernels("adam_step_")


def adam_step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    *,
    emas: Sequence[Sequence[Tensor]],
    weights: Sequence[bool],
    gains: Sequence[int],
    prepared: Sequence[Tensor | None],
    counters: Sequence[int],
    scalars: Tensor,
    loss_scale: Tensor | None,
    nonfinite: Tensor,
    betas: tuple[float, float],
    eps: float,
    effective: bool,
    force: bool,
) -> None:
    """Adam, with what comes before and after it in a step, in place; outside autograd.

    For each parameter: its gradient, divided by `loss_scale`, whose values that are not finite become 0 and are counted
    in nonfinite[counter] (int64); with `effective`, weights' gradients are those of effective weights, to which the
    backward of weight normalisation is applied (2.6); Adam, with scalars[0] = lr / (1 - beta1^step) and
    scalars[1] = sqrt(1 - beta2^step); every average of `emas` (profiles of lists) with scalars[2 + profile] = 1 - beta;
    with `force`, weights are normalised (Eq. 66); their effective weights go to `prepared`, where that is not None.

    The lists run parallel. `weights` says which are [out, in, ...] with rows to normalise, `gains` which parameter is
    the gain of a weight (its index, or -1). With `effective`, such gains come with None for a gradient, and get theirs
    from their weight's. scalars (float64) and loss_scale (float32) are on the parameters' device: nothing waits for
    it. All parameters are on one device and of one dtype, averages and moments in their layout.
    """
    with torch.no_grad():
        if not _native(params, prepared):
            reference.adam_step_(
                params,
                grads,
                exp_avgs,
                exp_avg_sqs,
                emas=emas,
                weights=weights,
                gains=gains,
                prepared=prepared,
                counters=counters,
                scalars=scalars,
                loss_scale=loss_scale,
                nonfinite=nonfinite,
                betas=betas,
                eps=eps,
                effective=effective,
                force=force,
            )
            return
        prepared_of = [i for i, target in enumerate(prepared) if target is not None]
        targets = [prepared[i] for i in prepared_of]
        averages = [ema for profile in emas for ema in profile]
        _adam_step_(
            params,
            grads,
            exp_avgs,
            exp_avg_sqs,
            averages,
            targets,
            prepared_of,
            weights,
            gains,
            counters,
            scalars,
            loss_scale,
            nonfinite,
            *betas,
            eps,
            reference.EPS,
            effective,
            force,
        )
        increment_version([*params, *exp_avgs, *exp_avg_sqs, *averages, *targets, nonfinite])


def _native(params: Sequence[Tensor], prepared: Sequence[Tensor | None]) -> bool:
    """Whether the native op takes the call: on a CPU it knows float32 and float64, on a GPU float32."""
    first = params[0]
    return (
        backend.native(first, _KERNELS)
        and first.dtype in ((torch.float32, torch.float64) if first.is_cpu else (torch.float32,))
        and all(map(backend.is_dense, params))
        and all(out.dtype in backend.dtypes(first) and backend.is_dense(out) for out in prepared if out is not None)
        and not torch.compiler.is_compiling()
    )


@backend.fake("adam_step_")
def _(
    params: list[Tensor],
    grads: list[Tensor | None],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    emas: list[Tensor],
    prepared: list[Tensor],
    prepared_of: list[int],
    weights: list[int],
    gains: list[int],
    counters: list[int],
    scalars: Tensor,
    loss_scale: Tensor | None,
    nonfinite: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    norm_eps: float,
    effective: bool,
    force: bool,
) -> None:
    torch._check(len(params) == len(grads) == len(exp_avgs) == len(exp_avg_sqs))
