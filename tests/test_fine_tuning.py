"""--init_from: a new run with the weights of another one, by the real command; --freeze_d."""

import copy
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import assert_same_state, lines, state

import families
import parameter
from errors import UsageError
from generate.classes import Classes

SMALL_FASTGAN = ("--model", "fastgan", "--preset", "cpu", "--batch_size", "4", "--g_conv_dim", "4", "--d_conv_dim", "4",
                 "--z_dim", "8", "--device", "cpu", "--dataset", "folder", "--image_path", "pictures",
                 "--vgg_weights", "random")


def weights(version, step, net):
    return state(version, step)[net]


def test_a_run_begins_with_the_weights_of_another_and_its_settings(run):
    run("--version", "a", "--total_step", 3, "--g_lr", 0.01, "--beta1", 0.25)
    code, out, err = run("--version", "b", "--init_from", "a", "--total_step", 1, "--g_lr", 1e-12, "--d_lr", 1e-12,
                         tiny=False)
    assert code == 0 and "initialized from 'a', step 3" in out and "do not fit" not in out, err
    begun, source = state("b", 1), state("a", 3)
    assert begun["step"] == 1 and begun["samples_seen"] == begun["config"]["batch_size"]
    assert begun["config"]["beta1"] == 0.25 and begun["config"]["g_lr"] == 1e-12, "untyped settings are the source's"
    for net in ("G", "D"):
        learned = [key for key in source[net] if key.endswith(("original", "gamma"))]
        assert learned and all(torch.allclose(begun[net][key], source[net][key], atol=1e-6) for key in learned)
    assert begun["g_optimizer"]["state"][0]["step"] == 1, "a fresh optimizer"

    # it is a run like any other: it goes on by its name alone, also when its source is gone, and not from another
    shutil.rmtree("models/a")
    code, out, err = run("--version", "b", "--total_step", 2, tiny=False)
    assert code == 0 and "resuming 'b' from step 1" in out and "initialized" not in out, err
    code, _, err = run("--version", "b", "--init_from", "c", "--total_step", 3, tiny=False)
    assert code == 2 and "--init_from c: run 'b' was started with a" in err


@pytest.mark.parametrize(("flags", "tiny", "frozen", "third"), [
    ((), True, ("blocks.16.", "blocks.8."), "blocks.4."),
    pytest.param(("--arch", "resnet"), True, ("blocks.0.", "blocks.1."), "blocks.2.", marks=pytest.mark.soak),
    pytest.param(SMALL_FASTGAN, False, ("stem.", "small_path.0.", "blocks.32.", "small_path.2."), "blocks.16.",
                 marks=pytest.mark.soak)])
def test_frozen_blocks_keep_their_weights_and_four_steps_are_two_and_two(run, pictures, flags, tiny, frozen, third):
    run("--version", "a", "--total_step", 1, *flags, tiny=tiny)
    begin = ("--init_from", Path("models/a/0000001.pth"), "--freeze_d", 2)
    for version, steps in (("straight", 4), ("resumed", 2), ("resumed", 4)):
        code, _, err = run("--version", version, "--total_step", steps, *begin, tiny=False)
        assert code == 0, err
    assert_same_state(state("straight", 4), state("resumed", 4))
    before, after = weights("a", 1, "D"), weights("resumed", 4, "D")
    learned = [key for key in before if key.endswith(("original", ".weight", ".gamma", ".bias"))]
    kept = {key for key in learned if torch.equal(before[key], after[key])}
    assert all(any(key.startswith(part) for key in learned) for part in (*frozen, third))
    assert {key for key in learned if key.startswith(frozen)} <= kept
    assert not any(key.startswith(third) for key in kept), "all of the third block move"


def test_another_width_takes_what_fits_and_says_what_does_not(run):
    run("--version", "a", "--total_step", 2, "--g_lr", 0.1)
    code, out, err = run("--version", "b", "--init_from", "a", "--d_conv_dim", 8, "--total_step", 1, "--g_lr", 1e-12,
                         tiny=False)
    assert code == 0 and "G." not in out.split("do not fit")[1] and "of D.blocks, " in out.split("do not fit")[1], err
    for key in (key for key in weights("a", 2, "G") if key.endswith("original")):
        assert torch.allclose(weights("a", 2, "G")[key], weights("b", 1, "G")[key], atol=1e-5)
    code, _, err = run("--version", "c", "--init_from", "a", "--g_conv_dim", 5, "--z_dim", 7, "--total_step", 1,
                       tiny=False)
    assert code == 2 and "no weights of its G fit" in err and not Path("models/c").exists()
    code, _, err = run("--version", "c", "--init_from", "a", "--d_conv_dim", 9, "--freeze_d", 1, tiny=False)
    assert code == 2 and "--freeze_d 1: D.blocks" in err and "would stay random" in err


def test_what_follows_from_a_typed_flag_is_not_the_sources():
    source = json.loads(parameter.as_json(parameter.resolve({"d_iters": 2, "arch": "dcgan", "dataset": "toy"})))

    def begun(**typed):
        return parameter.resolve({"version": "b", "init_from": "a", **typed},
                                 lambda path: source if path.name == "a" else None)

    assert begun(imsize=128).d_attn == (8, 16) and begun(imsize=128).d_iters == 2
    assert (begun(adv_loss="wgan-gp").d_iters, begun(adv_loss="wgan-gp").sn) == (5, "none")
    assert begun(arch="resnet").g_attn == (32,)
    source |= {"model": "fastgan", "imsize": "64 px"}
    with pytest.raises(UsageError, match="imsize '64 px' is not a value"):
        begun(preset="small")
    source = json.loads(parameter.as_json(parameter.resolve({"preset": "cpu", "dataset": "toy", "beta1": 0.3})))
    assert (begun().g_conv_dim, begun(preset="published").g_conv_dim, begun(preset="published").beta1) == (32, 64, 0.3)
    large = begun(preset="gpu")
    assert (large.batch_size, large.beta1, large.beta2, large.total_step) == (256, 0.0, 0.6, 250_000)
    for before, typed in (({}, {"preset": "small"}), ({"preset": "small"}, {"preset": "small", "imsize": 128}),
                          ({"preset": "small", "imsize": 128}, {"preset": "small", "imsize": 64})):
        of_fastgan = {"model": "fastgan", "dataset": "toy"}
        source = json.loads(parameter.as_json(parameter.resolve({**of_fastgan, **before})))
        new, fresh = begun(**typed), parameter.resolve({**of_fastgan, **typed})
        of_both = {name for name in vars(fresh) if name not in ("version", "init_from", "imsize")}
        assert {name: vars(new)[name] for name in of_both} == {name: vars(fresh)[name] for name in of_both}
    with pytest.raises(UsageError, match="--image_path x: run 'a' was trained on --dataset toy; say --dataset"):
        begun(image_path="x")
    with pytest.raises(UsageError, match="say where the pictures are"):
        begun(dataset="folder")
    with pytest.raises(UsageError, match="name the new run with --version"):
        begun(version=None)


def test_of_another_size_with_other_classes_what_fits_is_taken():
    def networks(imsize, classes):
        config = parameter.resolve({"imsize": imsize, "g_conv_dim": 8, "d_conv_dim": 8, "z_dim": 4, "conditional": True,
                                    "g_attn": (), "d_attn": ()})
        G, D = families.build(config, classes)
        return SimpleNamespace(G=G, D=D, G_ema=copy.deepcopy(G))

    source = {name: net.state_dict() for name, net in vars(networks(32, 2)).items()}
    source["classes"], nets = {"names": ["a", "b"]}, networks(64, 3)
    taken, left = families.take_weights(nets, source, Classes(("b", "c", "d"), (1, 1, 1)))
    new = {name for name in nets.G.state_dict() if name.endswith("scale.weight") and name not in source["G"]}
    assert taken and new and {f"G.{name}" for name in new} <= {*left}


@pytest.mark.soak
def test_a_class_of_the_same_name_keeps_its_batch_norm_and_a_new_one_begins_with_the_mean(run):
    classes = ("--arch", "resnet", "--conditional", "true", "--g_lr", 0.1)
    run("--version", "a", "--total_step", 2, *classes)
    tables = [key for key in weights("a", 2, "G") if "scale.weight" in key]
    assert tables and all((weights("a", 2, "G")[key] != 1).any() for key in tables)
    again = ("--init_from", "a", "--total_step", 1, "--g_lr", 1e-12)
    _, out, _ = run("--version", "same", *again, tiny=False)
    assert "do not fit" not in out
    assert all(torch.allclose(weights("same", 1, "G")[key], weights("a", 2, "G")[key]) for key in tables)
    whole = torch.load("models/a/0000002.pth", weights_only=True)
    names = whole["classes"]["names"]
    whole["classes"]["names"] = [*names[:0:-1], "gone"]         # other order, and one that the new run lacks
    torch.save(whole, "other.pth")
    _, out, _ = run("--version", "other", "--init_from", "other.pth", "--total_step", 1, "--g_lr", 1e-12, tiny=False)
    assert "new, as they do not fit: 3 of D.projection\n" in out
    for key in tables:
        learned = weights("a", 2, "G")[key]
        expected = torch.stack([learned.mean(0), *reversed(learned[:-1])])
        assert torch.allclose(weights("other", 1, "G")[key], expected, atol=1e-5)


@pytest.mark.parametrize("arch", ["dcgan", pytest.param("resnet", marks=pytest.mark.soak)])
def test_classes_may_be_added_or_left_out_and_batch_norm_stays(run, arch):
    def scale(version, step):
        """The scale of G's first batch norm, for each class or for all."""
        found = weights(version, step, "G")
        return next(found[key] for key in found if key.endswith(("scale.weight", "norm.weight", "1.weight")))

    flags = ("--arch", arch, "--g_lr", 0.1, "--total_step", 2)
    still = ("--g_lr", 1e-12, "--total_step", 1)
    run("--version", "plain", *flags, "--conditional", "false")
    _, out, err = run("--version", "added", "--init_from", "plain", "--conditional", "true", *still, tiny=False)
    assert "G." not in out.split("do not fit")[1].partition("\n")[0], err
    learned, added = scale("plain", 2), scale("added", 1)
    assert added.ndim == 2 and (learned != 1).any()
    assert torch.allclose(added, learned.expand_as(added), atol=1e-5), "each class begins with the scale of all"

    run("--version", "classes", *flags, "--conditional", "true")
    _, out, err = run("--version", "left", "--init_from", "classes", "--conditional", "false", *still, tiny=False)
    assert "do not fit" not in out, err
    assert torch.allclose(scale("left", 1), scale("classes", 2).mean(0), atol=1e-5)


def test_the_metadata_are_those_of_the_new_pictures(run, pictures):
    run("--version", "a", "--total_step", 1, *SMALL_FASTGAN, tiny=False)
    others = pictures.parent / "others"
    shutil.copytree(pictures, others)
    for path in sorted(others.iterdir())[:6]:
        path.unlink()
    code, _, err = run("--version", "b", "--init_from", "a", "--image_path", others, "--total_step", 1, tiny=False)
    assert code == 0, err
    assert len(state("a", 1)["metadata"]["rows"]) == 12 and len(state("b", 1)["metadata"]["rows"]) == 6
    assert lines("b")


UNUSABLE = [        # flags, the exit code, what is told
    (("--init_from", "aa"), 2, "--init_from aa: there is no such run in models; did you mean a?"),
    (("--init_from", "gone.pth"), 5, "--init_from gone.pth: there is no file"),
    (("--init_from", "models/a"), 2, "--init_from models/a: there is no such run in models; did you mean a?"),
    (("--init_from", "z" * 300), 2, "--init_from zzz"),
    (("--init_from", "a", "--freeze_d", 40), 2, "--freeze_d 40: this D has 3 blocks"),
    (("--init_from", "damaged", "--model", "sagan"), 5, "--init_from damaged: "),
    (("--init_from", "damaged"), 5, "--init_from damaged: "),
    (("--version", "a", "--init_from", "other"), 2, "run 'a' has checkpoints of its own"),
    (("--init_from", "other.pth"), 5, "--init_from other.pth: other.pth is no checkpoint of this program (it has no"),
    (("--init_from", "a", "--model", "fastgan"), 2, "--init_from a: is a run of --model sagan, this is fastgan"),
    (("--freeze_d", 2, "--dataset", "toy"), 2, "--freeze_d 2: has no effect"),
]


def test_what_cannot_be_begun_from_is_refused_in_a_line(run):
    run("--version", "a", "--total_step", 1)
    torch.save({"g": {}, "d": {}, "g_ema": [], "opt_g": {}, "opt_d": {}}, "other.pth")      # the published FastGAN's
    shutil.copytree("models/a", "models/damaged")
    Path("models/damaged/0000001.pth").write_bytes(b"damaged")
    for flags, code, told in UNUSABLE:
        for dry in ((), ("--dry_run",)):        # which refuses what the run itself would refuse
            found, _, err = run("--version", "b", *flags, *dry, tiny=False)
            assert found == code and told in err and err.count("\n") <= 2 and not Path("models/b").exists(), flags


def test_a_dry_run_says_what_would_be_taken_without_a_warning(run, recwarn):
    run("--version", "a", "--total_step", 1)
    code, out, _ = run("--version", "b", "--init_from", "a", "--dry_run", tiny=False)
    assert code == 0 and "initialized from 'a', step 1: " in out
    assert not [str(warning.message) for warning in recwarn if "meta" in str(warning.message)]
