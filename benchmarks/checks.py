"""What a contender must pass before it is timed: its timed path, compared with plain PyTorch in float64."""

from collections.abc import Callable, Iterable
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.harness import DTYPES, Disagreement, check_agreement, check_spread
from benchmarks.problem import Contender, Draws, Problem

SPREAD_ELEMENTS, SPREAD_STEPS = 8192, 512  # as many of the former as the latter allow: long chains show noise better
MEMORY_FORMATS = (torch.contiguous_format, torch.channels_last)


@torch.no_grad()
def check_sampling(problem: Problem, name: str, contender: Contender) -> None:
    """Raise Disagreement unless the last reverse steps without noise, and the spread of whole runs, are right."""
    problem = contender.problem or problem
    plain, truth, floor = _sampling_reference(problem)
    got = _moved(problem, contender.predict())
    check_agreement(name, got, plain, truth, DTYPES[problem.precision], floor=floor)
    check_spread(name, _enough(problem, contender.run), _plain_samples(problem))


def _enough(problem: Problem, run: Callable[[], Tensor]) -> Tensor:
    """Return several runs' samples, where one has too few elements to tell a spread by."""
    runs = min(32, SPREAD_ELEMENTS // problem.inputs[0].numel(), SPREAD_STEPS // problem.steps)
    return torch.cat([run() for _ in range(max(1, runs))])


@lru_cache(maxsize=1)
def _plain_samples(problem: Problem) -> Tensor:
    return _enough(problem, problem.plain_run)


def _moved(problem: Problem, x: Tensor) -> Tensor:
    """Return what the network's predictions added to x in the checked steps, in float64.

    Few steps scale x by almost 1, so that x itself would agree within bf16's epsilon without any network.
    """
    scale = problem.exact_rows[: problem.checked, 2].prod()
    return x.to(problem.device).double() - scale * problem.inputs[0].double()


@lru_cache(maxsize=1)
def _sampling_reference(problem: Problem) -> tuple[list[Tensor], Tensor, float]:
    """Return what plain PyTorch adds to x, in both memory formats, what float64 adds, and the floor of that difference.

    The floor: x is held in float32, and rounded in every step.
    """
    x, net, rows = problem.inputs[0], problem.network(), problem.quiet_rows[: problem.checked]
    plain = []
    for memory_format in MEMORY_FORMATS:
        with problem.autocast():
            plain.append(_moved(problem, problem.chain(net.to(memory_format=memory_format), x, rows)))
    quiet = problem.exact_rows[: problem.checked] * torch.tensor([1, 1, 1, 0], device=problem.device)
    end = problem.chain(net.double(), x.double(), quiet)
    truth = _moved(problem, end)
    conditioning = (end.norm() / truth.norm()).item()
    return plain, truth, problem.checked * torch.finfo(torch.float32).eps * conditioning


def check_training(problem: Problem, name: str, contender: Contender) -> None:
    """Raise Disagreement unless an iteration leaves the right gradients and training gives a finite loss."""
    problem = contender.problem or problem
    plain, truth = _training_reference(problem, contender.draws or problem.draws)
    check_agreement(name, contender.predict(), plain, truth, DTYPES[problem.precision], factor=3)
    if not contender.run().isfinite().all():
        raise Disagreement(f"training of {name} gave a loss that is not finite")


@lru_cache(maxsize=2)
def _training_reference(problem: Problem, draws: Draws) -> tuple[list[Tensor], Tensor]:
    """Return plain PyTorch's gradients of the loss, in both memory formats, and the float64 ones."""
    (x, y), t, noise = problem.inputs, draws.t, draws.noise
    alphas_cumprod = torch.from_numpy(np.cumprod(1 - problem.betas)).to(problem.device)[t, None, None, None]
    x_t = alphas_cumprod.sqrt() * x.double() + (1 - alphas_cumprod).sqrt() * noise.double()
    net = problem.network()
    plain = []
    for memory_format in MEMORY_FORMATS:
        with problem.autocast():
            loss = F.mse_loss(net.to(memory_format=memory_format)(x_t.float(), t, y).float(), noise)
        plain.append(gradients(loss, net.parameters()))
    net = net.double()
    return plain, gradients(F.mse_loss(net(x_t, t.double(), y), noise.double()), net.parameters())


def gradients(loss: Tensor, parameters: Iterable[nn.Parameter]) -> Tensor:
    """Return the gradients of ``loss``, concatenated in the order of ``parameters``."""
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(parameters))])
