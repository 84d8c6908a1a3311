"""The contenders in sampling: ours, the original formulation, and the strongest plain PyTorch loops.

Every contender loads the same weights, takes the same number of steps and draws its noise inside the step. A timed run
is one whole chain under its own autocast, as a user's call is: whoever relies on autocast casts its weights once a run.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import harness, original
from benchmarks.harness import OURS
from benchmarks.problem import X_SEED, Builder, Contender, Problem, on_reference
from ddpm_fast import Diffusion
from ddpm_fast.samplers.plan import COLUMNS, Plan

NCHW, CHANNELS_LAST = torch.contiguous_format, torch.channels_last
Step = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


class SdpaAttention(nn.Module):
    """The plain attention block through ``scaled_dot_product_attention``."""

    def __init__(self, block: original.AttentionBlock) -> None:
        super().__init__()
        self.norm, self.to_qkv, self.to_out = block.norm, block.to_qkv, block.to_out

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.to_qkv(self.norm(x)).flatten(2).transpose(1, 2).unsqueeze(1).chunk(3, dim=-1)
        out = F.scaled_dot_product_attention(q, k, v).squeeze(1).transpose(1, 2)
        return self.to_out(out.reshape(x.shape)) + x


def with_sdpa(net: original.UNet) -> original.UNet:
    """Replace the attention blocks of a plain network by ``SdpaAttention``, in place."""
    for block in net.modules():
        if isinstance(block, original.ResidualBlock) and isinstance(block.attention, original.AttentionBlock):
            block.attention = SdpaAttention(block.attention)
    return net


class ReverseStep(nn.Module):
    """One reverse step as one function, so that a compiler sees network, update and noise together.

    ``forward(x, k, rows, y)``: x [N, C, H, W] float32, contiguous whatever the network's memory format, as torch draws
    noise several times slower in channels_last; k int64 [1] on the device; rows as in ``Problem.rows``.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.dtype = next((p.dtype for p in net.parameters()), torch.float32)

    def forward(self, x: Tensor, k: Tensor, rows: Tensor, y: Tensor | None) -> Tensor:
        t, coefficient, scale, sigma = rows.index_select(0, k)[0].unbind()
        eps = self.net(x.to(self.dtype), t.expand(len(x)), y)
        return (x - coefficient * eps.float()) * scale + sigma * torch.randn_like(x)


def loop(problem: Problem, step: Step, context: Callable[[], AbstractContextManager] | None = None) -> Contender:
    """Run ``step`` over the rows of the problem; everything but the last copy stays on the device.

    ``context`` stands around the steps: the problem's autocast, unless another is given.
    """
    context = context or problem.autocast
    (start, y), device = problem.inputs, problem.device
    indices = [torch.tensor([k], device=device) for k in range(problem.steps)]

    @torch.no_grad()
    def chain(x: Tensor, rows: Tensor, steps: int) -> Tensor:
        with context():
            for k in reversed(indices[:steps]):
                x = step(x, k, rows, y)
        return x.cpu()

    def run() -> Tensor:
        return chain(torch.randn(problem.shape, device=device), problem.rows, problem.steps)

    return Contender(run, lambda: chain(start, problem.quiet_rows, problem.checked))


def eager(memory_format: torch.memory_format) -> Builder:
    """PyTorch as it is, in a loop without host work."""

    def build(problem: Problem) -> Contender:
        net = problem.network().to(memory_format=memory_format)
        if memory_format is CHANNELS_LAST:  # in NCHW the two batched products were the faster form
            with_sdpa(net)
        return loop(problem, ReverseStep(net))

    return build


def compile_module(module: nn.Module, problem: Problem, options: dict[str, Any]) -> Any:
    """Return the module under ``torch.compile``, without graph breaks or dynamic shapes."""
    torch._dynamo.config.recompile_limit = 64  # all contenders of a case are versions of the same code
    options = options | harness.compile_options(problem.device) if problem.compiler == "inductor" else {}
    return torch.compile(module, fullgraph=True, dynamic=False, backend=problem.compiler, options=options)


def compiled(memory_format: torch.memory_format, freezing: bool = False, **options: Any) -> Builder:
    """The whole step under ``torch.compile`` with the inductor's ``options``; weights as constants if ``freezing``."""

    def build(problem: Problem) -> Contender:
        net = with_sdpa(problem.network()).to(memory_format=memory_format)
        step = compile_module(ReverseStep(net), problem, options | {"freezing": freezing})
        return compile_now(loop(problem, step), freezing)

    return build


def compile_now(contender: Contender, freezing: bool) -> Contender:
    """Compile for all strides that come later: as an option alone, freezing is ignored without a word."""
    with torch._inductor.config.patch(freezing=freezing):
        contender.run()
        contender.predict()
    return contender


def original_loop(problem: Problem) -> Contender:
    """The original formulation as it stands."""
    diffusion = original.Diffusion(problem.network(), *geometry(problem)).to(problem.device).eval()

    def predict() -> Tensor:
        num_timesteps, sigma = diffusion.num_timesteps, diffusion.sigma
        diffusion.num_timesteps, diffusion.sigma = problem.checked, torch.zeros_like(sigma)
        with problem.seeded(X_SEED), problem.autocast():
            samples = diffusion.sample(problem.batch, problem.device, y=problem.inputs[1])
        diffusion.num_timesteps, diffusion.sigma = num_timesteps, sigma
        return samples

    return Contender(_run(problem, diffusion), predict)


def ours(problem: Problem, engine: str = "auto", fused: bool | None = None) -> Contender:
    """Our engine through its public interface; `fused` as of its network."""
    net = problem.config.build_unet()
    net.load_state_dict(problem.weights)
    net = net.to(problem.device, memory_format=CHANNELS_LAST)
    net.fused = fused
    diffusion = Diffusion(net, *geometry(problem), engine=engine).to(problem.device).eval()
    x, y = problem.inputs
    rows = diffusion.plan().rows[-problem.checked :].clone()
    rows[:, COLUMNS.index("c_z")] = 0

    def predict() -> Tensor:
        with problem.autocast():
            return diffusion.sample(problem.batch, problem.device, y=y, sampler=Plan(rows), noise=x)

    return Contender(_run(problem, diffusion), predict)


def geometry(problem: Problem) -> tuple[Any, ...]:
    """Return the arguments of ``Diffusion`` after the network."""
    config = problem.config
    return config.img_size, config.img_channels, config.num_classes, problem.betas


def _run(problem: Problem, diffusion: Any) -> Callable[[], Tensor]:
    def run() -> Tensor:
        with problem.autocast():
            return diffusion.sample(problem.batch, problem.device, y=problem.inputs[1])

    return run


def contenders(compile: bool) -> dict[str, Builder]:
    """Return the contenders of ``sample_throughput.py``, ours first."""
    eagerly: dict[str, Builder] = {
        OURS: ours,
        f"{OURS} plain path": partial(ours, fused=False),
        f"{OURS} on reference ops": on_reference(partial(ours, fused=False)),
        "original": original_loop,
        "torch eager NCHW": eager(NCHW),
        "torch eager channels_last": eager(CHANNELS_LAST),
    }
    if not compile:
        return eagerly
    return eagerly | {
        "torch.compile": compiled(CHANNELS_LAST),
        "torch.compile freezing": compiled(CHANNELS_LAST, freezing=True),
        # With freezing, too: on a CPU the templates it searches take packed weights only.
        "torch.compile max-autotune": compiled(CHANNELS_LAST, freezing=True, max_autotune=True),
    }
