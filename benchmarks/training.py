"""The contenders in training: ours, the original formulation, and the strongest plain PyTorch loops.

One iteration of each: timesteps, noise, loss, backward, Adam and EMA, on a batch that is already on the device.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import original
from benchmarks.harness import DTYPES, OURS
from benchmarks.problem import DRAWS_SEED, Builder, Contender, Draws, Problem, on_reference
from benchmarks.sampling import CHANNELS_LAST, NCHW, compile_module, geometry, with_sdpa
from ddpm_fast import Diffusion, TrainStep
from ddpm_fast.reference import noise as reference
from ddpm_fast.reference.philox import PERTURB

LEARNING_RATE = 2e-4
EMA_DECAY = 0.9999


class Loss(nn.Module):
    """The training loss as one function of x [N, C, H, W], t [N], noise and labels: a compiler sees all of it."""

    signal: Tensor
    spread: Tensor

    def __init__(self, net: nn.Module, problem: Problem) -> None:
        super().__init__()
        self.net = net
        alphas_cumprod = torch.from_numpy(1 - problem.betas).cumprod(0)
        self.register_buffer("signal", alphas_cumprod.sqrt().float())
        self.register_buffer("spread", (1 - alphas_cumprod).sqrt().float())

    def forward(self, x: Tensor, t: Tensor, noise: Tensor, y: Tensor | None) -> Tensor:
        x_t = self.signal[t, None, None, None] * x + self.spread[t, None, None, None] * noise
        return F.mse_loss(self.net(x_t, t, y).float(), noise)


class ExpandUpsample(nn.Module):
    """Nearest-neighbour doubling by expansion: [N, C, H, W] -> [N, C, 2H, 2W].

    torch 2.13's compiler on the CPU returns zero gradients, silently, through ``nn.Upsample`` in some networks.
    """

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        return x[:, :, :, None, :, None].expand(n, c, h, 2, w, 2).reshape(n, c, 2 * h, 2 * w)


class PlainTrainer:
    """PyTorch with fused Adam and a fused EMA; the loss compiled where there are options for it.

    Args:
        problem: what to train.
        memory_format: of the network.
        compile_options: for ``torch.compile``; None for eager.
        capturable: keep the optimizer's state on the device, for a CUDA graph.
        loss: builds the loss from the network and the problem: a module of (x, t, noise, y).
    """

    def __init__(
        self,
        problem: Problem,
        memory_format: torch.memory_format,
        compile_options: dict[str, Any] | None = None,
        capturable: bool = False,
        loss: Callable[[nn.Module, Problem], nn.Module] = Loss,
    ) -> None:
        self.problem = problem
        self.net = problem.network().to(memory_format=memory_format)
        self.parameters = list(self.net.parameters())
        self.ema = [p.detach().clone() for p in self.parameters]
        self.loss_of: Callable[..., Tensor] = loss(self.net, problem).to(problem.device)
        if compile_options is not None or memory_format is CHANNELS_LAST:  # see sampling.eager
            with_sdpa(self.net)
        if compile_options is not None:
            _replace_upsampling(self.net)
            self.loss_of = compile_module(self.loss_of, problem, compile_options)
        self.optimizer = torch.optim.Adam(self.parameters, lr=LEARNING_RATE, fused=True, capturable=capturable)

    def step(self) -> Tensor:
        """Train for one iteration and return the loss."""
        p, (x, y) = self.problem, self.problem.inputs
        torch.compiler.cudagraph_mark_step_begin()
        self.optimizer.zero_grad(set_to_none=True)
        t = torch.randint(0, p.num_timesteps, (p.batch,), device=p.device)
        with p.autocast():
            loss = self.loss_of(x, t, torch.randn_like(x), y)
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(self.ema, self.parameters, 1 - EMA_DECAY)
        return loss.detach()

    def run(self) -> Tensor:
        """Train for the problem's number of steps and return the last loss."""
        self.net.train()
        for _ in range(self.problem.steps):
            loss = self.step()
        return loss

    def predict(self) -> Tensor:
        """Return the gradients of an iteration."""
        self.net.eval()
        self.net.load_state_dict(self.problem.weights)
        with self.problem.seeded(DRAWS_SEED):
            self.step()
        return left_gradients(self.parameters)


def left_gradients(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Return the gradients that an iteration left, concatenated; zeros where it left none."""
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])


def _replace_upsampling(net: nn.Module) -> None:
    for layer in net.modules():
        if isinstance(layer, nn.Sequential) and len(layer) and isinstance(layer[0], nn.Upsample):
            layer[0] = ExpandUpsample()


def plain(memory_format: torch.memory_format, compile_options: dict[str, Any] | None = None) -> Builder:
    """Return the builder of a ``PlainTrainer``."""

    def build(problem: Problem) -> Contender:
        trainer = PlainTrainer(problem, memory_format, compile_options)
        return Contender(trainer.run, trainer.predict)

    return build


def original_loop(problem: Problem) -> Contender:
    """The original script's loop: Adam over both networks, the loss read every iteration, the EMA in new storage."""
    diffusion = original.Diffusion(problem.network(), *geometry(problem), ema_decay=EMA_DECAY, ema_start=1)
    diffusion = diffusion.to(problem.device)
    optimizer = torch.optim.Adam(diffusion.parameters(), lr=LEARNING_RATE)
    return _drop_in(problem, diffusion, optimizer, read_loss=True)


def _start(problem: Problem) -> tuple[Diffusion, torch.optim.Optimizer]:
    net = problem.config.build_unet()
    net.load_state_dict(problem.weights)
    net = net.to(problem.device, memory_format=CHANNELS_LAST)
    diffusion = Diffusion(net, *geometry(problem), ema_decay=EMA_DECAY, ema_start=1).to(problem.device)
    return diffusion, torch.optim.Adam(diffusion.model.parameters(), lr=LEARNING_RATE, fused=True)


def ours(recompute: str = "none", fused: bool | None = None) -> Builder:
    """Return the builder of our engine through its public interface, with switches of its network."""

    def build(problem: Problem) -> Contender:
        diffusion, optimizer = _start(problem)
        diffusion.model.recompute, diffusion.model.fused = recompute, fused
        contender = _drop_in(problem, diffusion, optimizer, read_loss=False)

        def predict() -> Tensor:
            diffusion.calls = 0
            return contender.predict()

        return Contender(contender.run, predict, first_draws(problem, diffusion))

    return build


def recorded(problem: Problem) -> Contender:
    """Our engine through ``TrainStep``; the check's step, without dropout, is one of those before a recording."""
    diffusion, optimizer = _start(problem)
    dtype = None if problem.precision == "float32" else DTYPES[problem.precision]
    step = TrainStep(diffusion, optimizer, dtype=dtype)

    def run() -> Tensor:
        diffusion.train()
        for _ in range(problem.steps):
            loss = step(*problem.inputs)
        return loss

    def predict() -> Tensor:
        diffusion.eval()
        diffusion.calls = 0
        diffusion.model.load_state_dict(problem.weights)
        step(*problem.inputs)
        return left_gradients(diffusion.model.parameters())

    return Contender(run, predict, first_draws(problem, diffusion))


def first_draws(problem: Problem, diffusion: Diffusion) -> Draws:
    """Return what the first forward call draws."""
    first = diffusion.noise_state(1, problem.device)
    t = reference.timesteps(problem.batch, problem.num_timesteps, first)
    return Draws(t, reference.noise(problem.shape, first, PERTURB))


def _drop_in(problem: Problem, diffusion: Any, optimizer: torch.optim.Optimizer, read_loss: bool) -> Contender:
    x, y = problem.inputs

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        with problem.autocast():
            loss = diffusion(x, y)
        loss.backward()
        optimizer.step()
        diffusion.update_ema()
        if read_loss:
            loss.item()
        return loss.detach()

    def run() -> Tensor:
        diffusion.train()
        for _ in range(problem.steps):
            loss = step()
        return loss

    def predict() -> Tensor:
        diffusion.eval()
        diffusion.model.load_state_dict(problem.weights)
        with problem.seeded(DRAWS_SEED):
            step()
        return left_gradients(diffusion.model.parameters())

    return Contender(run, predict)


def contenders(compile: bool) -> dict[str, Builder]:
    """Return the contenders of ``train_throughput.py``, ours first."""
    eagerly: dict[str, Builder] = {
        OURS: ours(),
        f"{OURS} plain path": ours(fused=False),
        f"{OURS} on reference ops": on_reference(ours(fused=False)),
        f"{OURS} recompute=norm": ours("norm"),
        f"{OURS} recompute=block": ours("block"),
        "original": original_loop,
        "torch eager NCHW": plain(NCHW),
        "torch eager channels_last": plain(CHANNELS_LAST),
    }
    if not compile:
        return eagerly
    return eagerly | {
        "torch.compile": plain(CHANNELS_LAST, {}),
        "torch.compile max-autotune": plain(CHANNELS_LAST, {"max_autotune": True}),
    }
