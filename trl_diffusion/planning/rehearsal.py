"""
A training step on fake tensors: the code of a real one, with shapes and no numbers, whose live bytes are counted.

Of a model with many equal layers two short ones are run, of three layers and of four. At any moment of a step the bytes
are a straight line in the number of layers, as long as moments are told apart that lie at the first layers, at the last
ones, or between; so the two points of each moment's line give it for any number, and the largest of them is the peak.
"""

from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from torch._subclasses.fake_tensor import FakeTensorMode

from ..estimators.draws import MaskDraws
from ..models.families import blocks_of, family_of
from ..scoring.adapters import base_of
from ..scoring.gradients import trainable_parameters, waiting_bytes
from ..scoring.head import ELBOHead, draws_at_hand
from ..scoring.responses import Response, cut, draws_per_chunk
from .as_on_a_gpu import as_on_a_gpu
from .live_bytes import LiveBytes, NoValues
from .skeleton import equal_blocks, fake_copy

_SHORT = (3, 4)  # layers: one at each end, and one or two between


@dataclass(frozen=True)
class Step:
    """
    What is rehearsed.

    Args:
        length: tokens of each response with its prompt.
        response_length: tokens of the response, all of them hidden.
        num_responses, num_mc_samples, draws_per_forward: of the micro-batch.
        elbo_gradient: one of [`GRADIENT_MODES`] but `"auto"`.
        bf16: whether it runs in bfloat16 (autocast).
        layers: whether layers are checkpointed.
        accumulates: whether gradients of earlier micro-batches are there.
        is_on_gpu: whether the CPU that it runs on stands for a GPU.
    """

    length: int
    response_length: int
    num_responses: int
    num_mc_samples: int
    draws_per_forward: int | None
    elbo_gradient: str
    bf16: bool
    layers: bool
    accumulates: bool
    is_on_gpu: bool


@dataclass(frozen=True)
class Counted:
    """
    Bytes that a step makes, weights and the gradients of earlier micro-batches left out.

    Args:
        kept: what the forward leaves for the backward of the loss.
        of_a_chunk: what it leaves of the last chunk of draws alone.
        peaks: by moment, the most that is alive.
    """

    kept: int
    of_a_chunk: int
    peaks: dict[Any, int]

    @property
    def peak(self) -> int:
        """The most that is alive."""
        return max(self.peaks.values())

    def extended(self, other: "Counted", times: float) -> "Counted":
        """On the line from this one to `other`, the point that lies `times` as far away."""

        def point(a: int, b: int) -> int:
            return round(a + times * (b - a))

        peaks = {moment: point(size, other.peaks[moment]) for moment, size in self.peaks.items()}
        return Counted(point(self.kept, other.kept), point(self.of_a_chunk, other.of_a_chunk), peaks)

    def with_more(self, size: int) -> "Counted":
        """With bytes besides that are there all the time."""
        return Counted(self.kept + size, self.of_a_chunk, {moment: peak + size for moment, peak in self.peaks.items()})


def rehearse(model: torch.nn.Module, step: Step) -> Counted:
    """Count a step of any number of layers, responses and draws by short ones."""
    size = draws_per_chunk(_tokens_run(model, step), step.draws_per_forward)
    is_immediate = step.elbo_gradient == "immediate"
    # Chunks of draws: in the second, a sum of gradients is there; autograd, whose sums change hands, needs a third
    draws = min(step.num_mc_samples, (2 if is_immediate else 3) * size)
    # Under block diffusion each response keeps the states of its clean text until its draws are run again
    enough = step.num_responses if family_of(model.config).in_blocks else -(-3 * size // draws)
    responses = 1 if is_immediate else min(step.num_responses, enough)
    short = replace(step, num_responses=responses, num_mc_samples=draws)
    blocks = equal_blocks(model)
    blocks = blocks if blocks and len(blocks) > max(_SHORT) else None
    counted = few = run(model, short, blocks, _SHORT[0])
    if blocks is not None:
        counted = few.extended(run(model, short, blocks, _SHORT[1]), len(blocks) - _SHORT[0])
    if is_immediate:  # the other responses leave a gradient each, before the last one is scored
        return counted.with_more(waiting_bytes(model, step.num_responses - 1))
    left_out = (step.num_responses * step.num_mc_samples - responses * draws) / min(size, draws)
    if step.elbo_gradient == "graph":  # each chunk leaves as much, and all are there when the backward begins
        return counted.with_more(round(left_out * counted.of_a_chunk))
    if left_out:  # what a chunk leaves that is not computed again does not depend on the number of layers
        more = run(model, replace(short, num_mc_samples=draws + size), blocks, _SHORT[0])
        return counted.with_more(round(left_out * (more.peak - few.peak) / responses))
    return counted


def run(
    model: torch.nn.Module, step: Step, blocks: torch.nn.ModuleList | None = None, number: int | None = None
) -> Counted:
    """Run a step on fake tensors, with the first `number` of the model's `blocks` only, and count."""
    responses, maskable, draws = _material(model, step)  # where values are known
    head = ELBOHead(draws_at_hand, 0, step.draws_per_forward, step.elbo_gradient)
    mode, memory = FakeTensorMode(allow_non_fake_inputs=True), LiveBytes()
    copied = fake_copy(model, mode, blocks, number)
    base = _prepare(copied, step)
    moments = _Moments(memory, base.base_model, equal_blocks(copied) or ())
    with mode, NoValues(), as_on_a_gpu(step.bf16) if step.is_on_gpu else nullcontext():
        if step.accumulates:
            for parameter in trainable_parameters(copied):
                parameter.grad = torch.empty_like(parameter)
        with memory, torch.autocast("cpu", torch.bfloat16, enabled=step.bf16):
            policy = head.score(base, responses, maskable, draws)
            kept, of_a_chunk = memory.live, memory.live - moments.starts[-1]
            with torch.no_grad(), copied.disable_adapter() if isinstance(copied, PeftModel) else nullcontext():
                reference = head.score(base, *_first_chunk(responses[0], maskable, draws))
            memory.moment = "loss"
            loss = (policy.value - reference.value).sum()
        with memory:
            loss.backward()
    return Counted(kept, of_a_chunk, memory.peaks)


def _material(model: Any, step: Step) -> tuple[list[Response], torch.Tensor, MaskDraws]:
    """Responses of which every token is hidden, where they may be masked, and their draws."""
    shape = (step.num_responses, step.length)
    maskable = (torch.arange(step.length) >= step.length - step.response_length).expand(shape)
    real, masked = torch.ones_like(maskable), maskable.expand(step.num_mc_samples, *shape)
    ids, draws = torch.zeros(shape, dtype=torch.long), MaskDraws(masked, masked.float())
    blocks = blocks_of(model.config, maskable, real)
    return cut(ids, real, draws, step.draws_per_forward, blocks), maskable, draws


def _tokens_run(model: Any, step: Step) -> int:
    """Of a response in one draw: all, or those of its blocks."""
    responses, *_ = _material(model, replace(step, num_responses=1, num_mc_samples=1))
    stretch = responses[0].stretch
    return step.length if stretch is None else stretch.last - stretch.first


def _first_chunk(
    response: Response, maskable: torch.Tensor, draws: MaskDraws
) -> tuple[list[Response], torch.Tensor, MaskDraws]:
    """Without a gradient no chunk leaves anything to the next, and one shows what all need."""
    chunk = response.chunks[0]
    some = MaskDraws(draws.masked[: len(chunk.masked), :1], draws.weight[: len(chunk.masked), :1])
    return [replace(response, chunks=[chunk])], maskable[:1], some


def _prepare(model: Any, step: Step) -> Any:
    """As the trainer does; returns the model that is inside an adapter."""
    base = base_of(model.train())
    if base.config._attn_implementation not in ("eager", "sdpa"):
        base.config._attn_implementation = "sdpa"  # a kernel for GPUs only, which keeps no scores either
    if not step.layers:
        base.activation_checkpointing_disable()
        return base
    base.activation_checkpointing_enable({"use_reentrant": False})
    if isinstance(model, PeftModel):
        base.enable_input_require_grads()
    return base


class _Moments:
    """
    Names the moments of a step for a counter: the pass through the model, its direction, and at which layers it is.

    Args:
        memory: the counter.
        backbone: of the model.
        blocks: its layers.
    """

    def __init__(self, memory: LiveBytes, backbone: torch.nn.Module, blocks: Any) -> None:
        self.starts: list[int] = []  # bytes that were alive when each pass began
        self._memory, self._number, self._direction = memory, 0, "forward"
        backbone.register_forward_pre_hook(self._begin)
        backbone.register_forward_hook(lambda *_: self._at("after"))
        places = ["between"] * len(blocks)
        places[:1], places[-1:] = ["first"][: len(blocks)], ["last"][: len(blocks)]
        for place, block in zip(places, blocks, strict=True):
            block.register_forward_pre_hook(lambda *_, place=place: self._at(place))
            block.register_forward_hook(partial(self._left, place))

    def _at(self, place: str) -> None:
        self._memory.moment = (self._number, self._direction, place)

    def _begin(self, *_: Any) -> None:
        self._number, self._direction = len(self.starts), "forward"
        self.starts.append(self._memory.live)
        self._at("before")

    def _left(self, place: str, _: Any, __: Any, output: Any) -> None:
        """The backward of a layer begins when the gradient of what it put out is there."""
        hidden, number = output if isinstance(output, torch.Tensor) else output[0], self._number

        def backward(_: torch.Tensor) -> None:
            self._number, self._direction = number, "backward"
            self._at(place)

        if hidden.requires_grad and self._direction == "forward":
            hidden.register_hook(backward)
