"""`--checkpointing`: the same training, bit for bit, with fewer activations in memory."""

import pytest
import torch
from conftest import SMALL, SMALL_FASTGAN, begun, state, tensors

from layers import recompute

RUNS = {
    "penalty": (*SMALL, "--adv_loss", "wgan-gp", "--d_iters", "2"),
    "resnet": (*SMALL, "--arch", "resnet", "--d_iters", "1", "--precision", "bf16"),
    "fastgan": (*SMALL_FASTGAN, "--slae", "true", "--label_noise", "0.2", "--augment", "color,translation",
                "--accumulate", "2"),
}


@pytest.mark.parametrize("kind", RUNS)
def test_training_is_the_same_bit_for_bit(kind, monkeypatch):
    """Weights, running statistics, u and v, averages, moments and random states; and blocks do run again."""
    again = []
    monkeypatch.setattr(recompute, "Draws", lambda real=recompute.Draws: again.append(real()) or again[-1])
    states, losses = [], []
    for checkpointing in ("false", "true"):
        training = begun((*RUNS[kind], "--checkpointing", checkpointing))
        losses.append([training.trainer.train_step(training.batches) for _ in range(2)])
        states.append({name: part for name, part in tensors(training.trainer.state()).items()
                       if isinstance(part, torch.Tensor)})
        assert bool(again) == (checkpointing == "true")
    assert losses[0] == losses[1] and states[0].keys() == states[1].keys()
    assert not {name for name, tensor in states[0].items() if not torch.equal(tensor, states[1][name])}


@pytest.mark.soak
def test_a_run_goes_on_with_and_without_it(run):
    """It belongs to the machine, like --accumulate: a checkpoint is that of a run without."""
    flags = ("--version", "a", "--total_step")
    assert run(*flags, 1, "--checkpointing", "true")[0] == 0
    code, out, _ = run(*flags, 2, "--checkpointing", "false", "--compile", "false")
    assert code == 0 and "resuming" in out
    assert run("--version", "b", "--total_step", 2)[0] == 0
    for name, weight in state("a", 2)["G"].items():
        assert torch.equal(weight, state("b", 2)["G"][name]), name
    code, out, _ = run(*flags, 3, "--checkpointing", "true", "--compile", "true")
    assert code == 0 and "note: --compile is not for --checkpointing true" in out
