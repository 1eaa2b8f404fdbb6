"""DiffAugment: the same kinds of differentiable augmentation on real and fake images (Zhao et al. 2020,
arXiv 2006.10738), which keeps D from memorizing a small training set without G learning the augmentations.

    augment(images, ("color", "translation"))      images (B, C, H, W) in [-1, 1]; same shape, gradient kept

Each image is augmented by amounts of its own, drawn from the global random state. `draw_rows(draw, B)` returns those of
B images, `draw(B)`; the trainer's draws them for the whole batch of several processes. A new policy is one function and
one row of `POLICIES`.
"""

import torch
from torch.nn import functional as F

SHIFT = 1 / 8       # maximal shift of `translation` and `mirror`, as a fraction of the side
CUT = 1 / 2         # side of the square of `cutout`, as a fraction of the side


def _simply(draw, count):
    return draw(count)


def color(x, draw_rows=_simply):
    """Add up to ±0.5 to brightness; scale saturation by 0 to 2 and contrast by 0.5 to 1.5. A fourth channel,
    transparency, stays.
    """
    x, transparency = x[:, :3], x[:, 3:]
    amounts = draw_rows(
        lambda B: torch.rand(3, B, 1, 1, 1, device=x.device, dtype=x.dtype).transpose(0, 1), len(x))    # (B, 3, 1, ...)
    brightness, saturation, contrast = amounts.unbind(1)                # (B, 1, 1, 1) each
    x = x + (brightness - 0.5)
    grey = x.mean(1, keepdim=True)                                      # (B, 1, H, W)
    x = (x - grey) * (2 * saturation) + grey
    level = x.mean((1, 2, 3), keepdim=True)                             # (B, 1, 1, 1)
    x = (x - level) * (contrast + 0.5) + level
    return torch.cat([x, transparency], 1) if transparency.size(1) else x


def translation(x, draw_rows=_simply):
    """Shift by up to 1/8 of each side; pad with 0, mid grey."""
    (down, rows), (right, columns) = _shifts(x, draw_rows)
    padded = F.pad(x, (right, right, down, down))                       # (B, C, H + 2 down, W + 2 right)
    image = torch.arange(len(x), device=x.device)
    # the indexed axes come first: (B, H, W, C)
    return padded.permute(0, 2, 3, 1)[image[:, None, None], rows[:, :, None], columns[:, None]].permute(0, 3, 1, 2)


def mirror(x, draw_rows=_simply):
    """Shift by up to 1/8 of each side; pad with mirrored edges.

    Not a policy of the paper. With `translation` D cannot tell whether a picture has grey edges of its own, and G draws
    grey frames.
    """
    (down, rows), (right, columns) = _shifts(x, draw_rows)
    # in two steps, so that no pixel has more than two gradients: the sum of four depends on the order of the threads
    x = _pick(x.permute(0, 3, 2, 1), _mirrored(columns - right, x.size(3)))             # (B, W, H, C)
    x = _pick(x.transpose(1, 2), _mirrored(rows - down, x.size(2)))                     # (B, H, W, C)
    return x.permute(0, 3, 1, 2)


def _shifts(x, draw_rows):
    """Return of rows and of columns (the largest shift; which of them, padded by it, each image takes: (B, side))."""
    return [_shift(x, side, draw_rows) for side in x.shape[2:]]


def _shift(x, side, draw_rows):
    largest = round(side * SHIFT)
    start = draw_rows(lambda B: torch.randint(0, 2 * largest + 1, (B, 1), device=x.device), len(x))
    return largest, start + torch.arange(side, device=x.device)


def _mirrored(indices, side):
    """Return the indices, of -side + 1 to 2 * side - 2, as those of a row mirrored at its first and last element."""
    last = side - 1
    return last - (last - indices.abs()).abs()


def _pick(x, indices):
    """x (B, N, ...), indices (B, M) -> (B, M, ...)."""
    return x[torch.arange(len(x), device=x.device)[:, None], indices]


def cutout(x, draw_rows=_simply):
    """Set a rectangle of half the sides, anywhere (partly outside too), to 0, mid grey."""
    B, _, H, W = x.size()
    centre_y = draw_rows(lambda B: torch.randint(0, H + 1, (B, 1), device=x.device), B)
    centre_x = draw_rows(lambda B: torch.randint(0, W + 1, (B, 1), device=x.device), B)
    in_rows = (torch.arange(H, device=x.device) - centre_y + 0.5).abs() < H * CUT / 2       # (B, H)
    in_columns = (torch.arange(W, device=x.device) - centre_x + 0.5).abs() < W * CUT / 2    # (B, W)
    return x * ~(in_rows[:, None, :, None] & in_columns[:, None, None, :])                  # (B, 1, H, W)


POLICIES = {"color": color, "translation": translation, "mirror": mirror, "cutout": cutout}


def augment(images, policies, draw_rows=_simply):
    """Apply the named `policies` in order; () returns the images unchanged."""
    for name in policies:
        images = POLICIES[name](images, draw_rows)
    return images
