"""G's inputs: noise, metadata, and labels that stay with their noise."""

import pytest
import torch

from generate.latents import Inputs, Latents
from generate.metadata import SAMPLERS, Bank
from pretrained import vgg


@pytest.fixture
def bank():
    rows = torch.randn(500, 512, generator=torch.Generator().manual_seed(0))
    return Bank(rows.half(), "relu5_3", vgg.FILE.sha256, "0" * 64)


def test_metadata_of_random_weights_are_said_on_every_use(capsys):
    for weights, said in (("random", True), (vgg.FILE.sha256, False)):
        Latents(8, Bank(torch.zeros(2, 512).half(), "relu5_3", weights, ""))
        assert ("random weights" in capsys.readouterr().out) == said


def test_without_a_bank_it_is_plain_noise():
    latents = Latents(8)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        got, after = latents.training(5).z, torch.rand(1)
        torch.manual_seed(0)
        assert torch.equal(got, torch.randn(5, 8)) and torch.equal(after, torch.rand(1))
    expected = torch.randn(5, 8, generator=torch.Generator().manual_seed(2))
    assert torch.equal(latents.sampling(5, torch.Generator().manual_seed(2)).z, expected)


def test_training_appends_one_pictures_metadata_to_the_same_noise(bank):
    latents = Latents(8, bank, "gauss")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        fed = latents.training(50).z
        torch.manual_seed(0)
        assert torch.equal(fed[:, :8], torch.randn(50, 8))
    assert fed.shape == (50, 520) and fed.dtype == torch.float32
    assert (fed[:, None, 8:] == bank.rows.float()).all(2).sum(1).eq(1).all()


@pytest.mark.parametrize("how", SAMPLERS)
def test_sampling_draws_as_asked_from_its_generator(bank, how):
    before = torch.get_rng_state()
    fed = Latents(8, bank, how).sampling(20, torch.Generator().manual_seed(5)).z
    generator = torch.Generator().manual_seed(5)
    assert torch.equal(fed[:, :8], torch.randn(20, 8, generator=generator))
    assert torch.equal(fed[:, 8:], bank.sample(20, how, generator))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.gpu
def test_on_a_gpu_nothing_waits_and_samples_are_the_same(bank):
    latents = Latents(8, bank, "mix", "cuda")
    with torch.random.fork_rng():
        torch.cuda.set_sync_debug_mode("error")
        try:
            fed = latents.training(64).z
            drawn = [latents.bank.sample(64, how) for how in SAMPLERS]
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert fed.is_cuda and fed.shape == (64, 520) and all(rows.is_cuda for rows in drawn)
    assert latents.state()["rows"].device.type == "cpu"
    samples, expected = (source.sampling(9, torch.Generator().manual_seed(0)).z
                         for source in (latents, Latents(8, bank, "mix")))
    assert torch.equal(samples, expected)


def test_the_samples_of_a_seed_do_not_depend_on_how_many_are_drawn(bank):
    batches = Latents(8, bank).seeded_batches(3)
    first, second = next(batches), next(batches)
    generator = torch.Generator().manual_seed(3)
    for batch in (first, second):
        assert len(batch) == 64 and torch.equal(batch.z, Latents(8, bank).sampling(64, generator).z)


# ---- labels ----


def test_noise_and_labels_stay_together():
    inputs = Inputs(torch.arange(10.0).view(5, 2), torch.arange(5))
    assert torch.equal(inputs[1:3].z, inputs.z[1:3]) and inputs[1:3].labels.tolist() == [1, 2]
    assert [part.labels.tolist() for part in inputs.split(2)] == [[0, 1], [2, 3], [4]]
    again = Inputs.cat(inputs.split(2)).to("cpu")
    assert torch.equal(again.z, inputs.z) and torch.equal(again.labels, inputs.labels) and len(again) == 5
    assert inputs.as_arguments().keys() == {"z", "labels"}


def test_without_labels_g_gets_none():
    inputs = Inputs.cat(Inputs(torch.zeros(5, 2)).split(2))
    assert inputs.labels is None and inputs[:2].labels is None and inputs.as_arguments().keys() == {"z"}
