"""A trained generator as files for other programs: safetensors, ONNX, TorchScript, and a README on their use.

All are in float32, without spectral norm's parametrization (W / sigma is computed once) in ONNX and TorchScript.
"""

import copy
import importlib.util
import json
import warnings

import numpy as np
import torch
from torch.nn.utils import parametrize

from device.distributed import say
from errors import Failure, UsageError, first_line
from flags.pictures import PictureShape
from utils import write_atomically

PACKAGES = ("onnx", "onnxscript", "onnxruntime", "safetensors")
TOLERANCE = 1e-4        # largest difference of ONNX's images, in [-1, 1], from torch's
OTHER_BATCH = 3         # images of the check; the export itself sees two

README = """\
The generator of '{version}', step {step} ({model}), for other programs.

G.onnx          ONNX, dynamic batch
G.ts.pt         TorchScript: torch.jit.load("G.ts.pt")({arguments}), of torch tensors{missing}
G.safetensors   the weights of this program's network, with its settings as metadata ("config", JSON); its own
                pictures are drawn by generate.modes.load("{version}"), from the folder of main.py
latents.npz     z{and_labels} of {samples} samples: what to feed, and latents for this program's --latents

z: float32 (N, {width}){what_z}
{labels}image, the output: float32 (N, {C}, {H}, {W}), {channels} in [-1, 1]

    import numpy, onnxruntime
    from PIL import Image

    z = numpy.load("latents.npz")["z"][:4]
{label_line}    (images,) = onnxruntime.InferenceSession("G.onnx").run(None, {{{feeds}}})
    pixels = (127.5 * (images + 1)).round().clip(0, 255).astype("uint8").transpose(0, 2, 3, 1)
    for number, picture in enumerate(pixels):
        Image.fromarray(picture.squeeze()).save(f"{{number}}.png")
"""


class _Images(torch.nn.Module):
    """(z, labels) -> G's largest image."""

    def __init__(self, G):
        super().__init__()
        self.G = G

    def forward(self, z, labels=None):
        return (self.G(z) if labels is None else self.G(z, labels))[0]


def require():
    """Raise UsageError if packages are missing."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f"--mode export needs {', '.join(missing)}: pip install {' '.join(missing)}")


def write(G, inputs, folder, facts):
    """Write G.safetensors, G.onnx, G.ts.pt, latents.npz and README.md of a G in eval mode, on the CPU.

    `inputs` is {"z": (N, width)}, with "labels" (N,) if G takes them, of some samples, three or more; `facts` has
    version, step, model, imsize, channels, z_dim, truncation, config (JSON) and classes (their names). Raise Failure if
    ONNX's images are not torch's, OSError.
    """
    from safetensors.torch import save

    weights = {name: tensor.contiguous() for name, tensor in G.state_dict().items()}
    said = {"config": facts["config"], "version": facts["version"], "step": str(facts["step"]),
            "classes": json.dumps(facts["classes"])}
    write_atomically(folder / "G.safetensors", lambda path: path.write_bytes(save(weights, said)))
    net = _Images(_plain(G))
    two, other = ({name: rows[:count] for name, rows in inputs.items()} for count in (2, OTHER_BATCH))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")                 # of deprecated names inside torch
        wanted = net(*other.values())
        write_atomically(folder / "G.onnx", lambda path: _save_onnx(net, two, other, wanted, path))
        traced = _trace(net, two, other, wanted)
        if traced is not None:
            write_atomically(folder / "G.ts.pt", lambda path: torch.jit.save(traced, str(path)))
    text = _readme(inputs, facts, traced)
    write_atomically(folder / "README.md", lambda path: path.write_bytes(text.encode(errors="backslashreplace")))


def _plain(G):
    """Return a copy of G whose weights are W / sigma themselves."""
    G = copy.deepcopy(G).requires_grad_(False)
    for layer in G.modules():
        if parametrize.is_parametrized(layer):
            for name in list(layer.parametrizations):
                parametrize.remove_parametrizations(layer, name, leave_parametrized=True)
    return G


def _save_onnx(net, inputs, other, wanted, path):
    """Write ONNX of `net`. Raise Failure if its images for the inputs `other` are not those that are `wanted`."""
    import onnxruntime

    batch = torch.export.Dim("batch", min=1, max=2**16)
    program = torch.onnx.export(net, tuple(inputs.values()), dynamo=True, input_names=list(inputs),
                                output_names=["image"], dynamic_shapes=tuple({0: batch} for _ in inputs), verbose=False)
    program.save(str(path))
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (images,) = session.run(None, {name: rows.numpy() for name, rows in other.items()})
    difference = float(np.abs(images - wanted.numpy()).max())
    if not difference <= TOLERANCE:
        raise Failure(f"G.onnx is not written: its images differ from torch's by {difference:.2g}")
    say(f"G.onnx: {OTHER_BATCH} images by onnxruntime equal torch's to {difference:.1g}")


def _trace(net, inputs, other, wanted):
    """Return the TorchScript of `net`; None, which is said, if it does not compute the same for another batch."""
    try:
        traced = torch.jit.trace(net, tuple(inputs.values()), check_trace=False)
        if torch.allclose(traced(*other.values()), wanted, atol=TOLERANCE, rtol=0):
            return traced
        reason = "other images"
    except Exception as error:                          # whatever the tracer raises
        reason = first_line(error)
    say(f"note: no G.ts.pt, as TorchScript does not serve here ({reason})")
    return None


def _readme(inputs, facts, traced):
    width, names = inputs["z"].shape[1], facts["classes"]
    metadata, truncation = width - facts["z_dim"], facts["truncation"]
    C, H, W = PictureShape.of(facts["imsize"], facts["channels"]).size
    return README.format(
        **facts, C=C, H=H, W=W, width=width, samples=len(inputs["z"]), and_labels=" and classes" * bool(names),
        feeds=", ".join(f'"{name}": {name}' for name in inputs), arguments=", ".join(inputs),
        missing="" if traced is not None else " -- not written: it does not serve for this network",
        what_z=" from N(0, 1)" + (f", cut off at +-{truncation:g}" if truncation else "")
        + f"; its last {metadata} numbers are metadata, as in latents.npz" * (metadata > 0),
        labels=f"labels: int64 (N,), the numbers of the classes: {', '.join(names)}\n" if names else "",
        label_line="    labels = numpy.zeros(len(z), int)                   # of the first class\n" if names else "")
