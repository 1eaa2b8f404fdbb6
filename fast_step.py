"""Faster ways to run the same training step, each tried against the plain one before it is trusted.

A way is another callable for the same step: compiled networks, a CUDA graph. Once warm, a run takes one step the plain
way and, from the same state, by each way that was asked for. A way is kept if its numbers are the plain way's and, on
`auto`, if it is faster. Whatever it fails at, a missing compiler, a kernel that cannot be recorded, too little memory,
is said once, and the run goes on without it. The trial leaves no trace: neither weights nor random numbers know of it.

Ways build on one another, and what one is worth depends on the next: compiled networks start no faster kernel by kernel
and take a fifth less of the GPU's time once they are recorded. So the last is tried first, and each under those kept.
"""

import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass

import torch

import utils
from distributed import say

WARM_UP = 3             # plain steps before the trial: by then algorithms are chosen and optimizers have their moments
TIMED = 5               # steps that each way is timed for; the fastest counts, as others may have been disturbed
# How far a way may be off: of a statistic, relative and absolute; of the change that a step makes to a network's
# weights, relative. Another order of sums moves a few of Adam's smallest changes, in bf16 more (0.16 by compiling, 0.22
# between bf16 and fp32); other random numbers, or an update left out, move nearly all: G's by 1 and more.
STATISTIC, CHANGE = 0.02, 0.5


class Unusable(Exception):
    """Why a way cannot be used here, in words."""


@dataclass(frozen=True)
class Way:
    """`start(step, images) -> another step`; `stop()` undoes what it changed. `flag` is its name on the command line.

    `always`: kept even if it is not faster (the flag's `true`).
    """

    flag: str
    always: bool
    start: Callable
    stop: Callable = lambda: None


@dataclass(frozen=True)
class _Outcome:
    """Of one step: its statistics, the change of each network's weights, the random states after it; seconds."""

    stats: dict
    changes: list
    random: list
    seconds: float

    def problem(self, plain):
        """What tells that this is not the `plain` step, in words; None if nothing does."""
        for name, value in plain.stats.items():
            if not abs(self.stats[name] - value) <= STATISTIC * (1 + abs(value)):
                return f"{name} was {self.stats[name]:.4g}, not {value:.4g}"
        for change, usual in zip(self.changes, plain.changes, strict=True):
            if not (change - usual).norm() <= CHANGE * usual.norm():
                return "it changed the weights otherwise"
        same = all(torch.equal(a, b) for a, b in zip(self.random, plain.random, strict=True))
        return None if same else "it drew other random numbers"


class FastStep:
    """`body(images) -> {name: 0-d tensor}` by those of `ways` that give its numbers and make it faster; each builds on
    those before it.

    `images` is a list of tensors, of the same shapes in every call. `body` changes the `networks` and the state of the
    `optimizers` in place, nothing else, and draws from the global random states.
    """

    def __init__(self, body, networks, optimizers, device, ways):
        self.body, self.step, self.ways = body, body, ways
        self.networks, self.optimizers, self.device = networks, optimizers, device
        self.calls = 0

    def __call__(self, images):
        if self.ways and self.calls == WARM_UP:
            self._try(images)
        self.calls += 1
        return self.step(images)

    def _try(self, images):
        ways, self.ways, kept = self.ways, [], []
        _, plain = self._tried(kept, images)
        best = plain.seconds
        for way in reversed(ways):
            self.step = self.body           # lets go of what was recorded: the GPU may not have room for two
            try:
                self.step, found = self._tried([way, *kept], images)
                problem = found.problem(plain)
            except Exception as error:                      # whatever a compiler or a driver raises
                problem = self._failed(error)
            if problem is None and (way.always or found.seconds < best):
                best, kept = found.seconds, [way, *kept]
                say(f"--{way.flag}: a step takes {found.seconds * 1000:.3g} ms, a plain one {plain.seconds * 1000:.3g}")
                continue
            self._leave(way, problem)
            if not kept:
                continue
            try:
                with self._undone():
                    self.step = self._made(kept, images)
            except Exception as error:                      # less room than before
                self._leave(kept.pop(0), self._failed(error))

    def _failed(self, error):
        """What a way failed at, in words, its gradients cleared away."""
        for net in self.networks:
            net.zero_grad(set_to_none=True)
        kind = "" if isinstance(error, Unusable) else f"{type(error).__name__}: "
        first, *rest = str(error).strip().splitlines() or [""]
        return kind + (f"{first} {rest[0]}" if first.endswith(":") and rest else first)

    def _leave(self, way, problem):
        """Back to the plain step, without `way`; a `problem`, if there is one, is said."""
        self.step = self.body
        way.stop()
        if problem:
            say(f"note: --{way.flag} is of no use here, steps go on without it ({problem})")

    def _made(self, ways, images):
        """The step by these ways. Each has run before the next begins: a compiler works when it is first called."""
        step = self.body
        for number, way in enumerate(ways):
            if number:
                with self._undone():
                    step(images)
            step = way.start(step, images)
        return step

    def _tried(self, ways, images):
        """The step by these ways, and what it does from the present state, which stays."""
        with self._undone() as before:
            step = self._made(ways, images)
            stats = {name: value.item() for name, value in step(images).items()}
            changes = [torch.cat([(weight.detach().cpu() - was).flatten() for weight, was in zip(
                net.parameters(), weights, strict=True)]) for net, weights in zip(self.networks, before, strict=True)]
            states = utils.random_states(self.device)
            random = [states[name] for name in ("torch", "cuda") if name in states]
            return step, _Outcome(stats, changes, random, min(self._seconds(step, images) for _ in range(TIMED)))

    def _seconds(self, step, images):
        began = self._now()
        step(images)
        return self._now() - began

    def _now(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    @contextmanager
    def _undone(self):
        """Afterwards networks, optimizers and random states are as before. Yields the networks' weights of before."""
        tensors = [tensor for net in self.networks for tensor in (*net.parameters(), *net.buffers())]
        tensors += [tensor for optimizer in self.optimizers for slots in optimizer.state.values()
                    for tensor in slots.values()]
        kept = {tensor: tensor.detach().to("cpu", copy=True) for tensor in tensors}     # the GPU may be nearly full
        try:
            with utils.forked_random_state(self.device):
                yield [[kept[weight] for weight in net.parameters()] for net in self.networks]
        finally:
            with torch.no_grad():
                for tensor, was in kept.items():
                    tensor.copy_(was)


# -------------------------------------------------------------------------------------------------------- CUDA graphs


def recorded(step, images):
    """`step` as one CUDA graph: started whole, it no longer waits for Python to start each kernel.

    Raises Unusable, and what CUDA raises at an operation that cannot be recorded. What `step` reads besides tensors on
    the device stays as it is now.
    """
    if not images[0].is_cuda:
        raise Unusable("it takes a GPU")
    fixed = [image.clone() for image in images]
    graph = torch.cuda.CUDAGraph()
    try:
        # in this thread alone nothing else may happen meanwhile: the loader's goes on
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            stats = step(fixed)
            names, values = list(stats), torch.stack([value.float() for value in stats.values()])
    except Exception:
        graph.reset()
        # the global random state took part in the recording, and after one that failed it may answer no more
        generators = torch.cuda.default_generators
        generators[torch.cuda.current_device()].graphsafe_set_state(torch.Generator(fixed[0].device))
        raise

    def replay(images):
        torch._foreach_copy_(fixed, images)
        graph.replay()
        return dict(zip(names, values.clone().unbind(), strict=True))   # a copy: the next replay overwrites them

    return replay

