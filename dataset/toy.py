"""Cartoon faces drawn by code: the built-in data set `--dataset toy`.

The faces have long-range dependencies, which self-attention is meant to model: both irises have the same colour, both
lenses the same shape, the eyebrows the colour of the hair, and both pupils look the same way. Whether a generator has
learned them is visible at a glance, after minutes on a CPU and without a download.

`face_traits` derives a face's attributes from its index alone; `draw_face` draws it at any size, so that one index is
the same person at 32 and at 256 pixels. `face_class` says to which of the `CLASSES` a face belongs. All lengths are in
head units, thousandths of the picture's side: x from the middle of the face, y from the top of the picture. Light comes
from the upper left.
"""

import operator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw

RGB = tuple[int, int, int]

SEED = 0x70F  # seeds are (SEED, index), so that no stream equals that of a generator seeded with the index alone


def _palette(colours: str) -> tuple[RGB, ...]:
    return tuple(tuple(bytes.fromhex(colour)) for colour in colours.split())


# Hand-picked colours: random RGB does not look like a face. A colour listed n times is n times as frequent.
SKINS = _palette("ffe2d0 fdd5bc f6c8a6 ecb892 e0a67c ce9166 b47852 996141 7c4c35 623c2d")
DARK_HAIRS = _palette("29242e 29242e 422c26 422c26 683f2a")
GREY_HAIRS = _palette("96969e eeecea")
HAIRS = 3 * (DARK_HAIRS + _palette("683f2a 925c34 b87e42 ecc66c f7e0a0 be4e28 e07436")) + 2 * GREY_HAIRS
HAIRS += _palette("f080a2 4696be 8062be 40a08c")
IRISES = _palette("6a3e26 6a3e26 8c562c 8c562c 967e34 469054 469054 3482ce 3482ce 40a0b0 70889e")
BACKDROPS = _palette("fadec4 fccdba f8bcbe ecc4dc cec4ec b4c8f0 a8d6ec a6dedc b0debe d0e4ac fae8a4 fcce8a "
                     "78a4c8 68aaa4 e28c7a 8e80b8")
SHIRTS = _palette("e25852 f29646 f6c654 60a870 2e888a 4078bc 344878 805ca8 e27698 f6f0e6 484a56 964c46")
FRAMES = _palette("2c2834 2c2834 703c24 ba343c 1c687a 3a4292")
JEWELS = _palette("face60 ecf0f6 e25868 50bebe")
WHITE, INK, ROSE, UMBER, LIP, THROAT, TONGUE = _palette("fffdfa 281e26 ec545c 581e22 cc3042 7e2630 e86a6c")

FRINGES = {  # every hair style with the fringes that suit it
    "short": ("swept", "swept", "back", "bangs", "spiky"), "quiff": ("quiff",), "buzz": ("back",),
    "bob": ("bangs", "swept", "curtain"), "long": ("bangs", "swept", "curtain", "back"),
    "bun": ("back", "bangs", "curtain"), "buns": ("bangs", "curtain"), "afro": ("back",), "curly": ("back",),
    "bald": ("none",),
}
STYLES = 4 * ("short", "bob", "long") + 3 * ("quiff", "bun", "afro", "curly")
STYLES += ("buns", "buns", "buzz", "bald")
BEARDED = ("short", "quiff", "buzz", "bald", "curly")
MOUTHS = 2 * ("smile", "open", "grin", "lips") + ("smile", "open", "neutral")
NECKLINES = ("crew", "stripes", "collar", "vneck", "hood", "turtle")


@dataclass(frozen=True)
class Face:
    """The attributes of a person, independent of the picture's size: colours as RGB bytes, lengths in head units."""

    skin: RGB
    hair: RGB
    style: str
    fringe: str
    flip: int  # 1, or -1 for hair parted on the other side
    beard: bool
    iris: RGB
    gaze: tuple[float, float]  # from the middle of an eye to its pupil
    spacing: float  # from the middle of the face to the middle of an eye
    lashes: bool
    brow: str
    glasses: str
    frame: RGB
    nose: str
    mouth: str
    blush: bool
    freckles: bool
    earrings: RGB | None
    shirt: RGB
    neckline: str
    backdrop: RGB
    scenery: str
    jaw: float  # how much wider than average
    chin: float  # how much lower than average
    width: float
    scale: float
    shift: tuple[float, float]


def _mix(a: RGB, b: RGB, share: float) -> RGB:
    """Linear interpolation: `a` at share 0, `b` at share 1."""
    return tuple(int(p + (q - p) * share + 0.5) for p, q in zip(a, b, strict=True))


def _pick(u: float, options):
    return options[int(u * len(options))]


def _pick_apart(u: float, colours: tuple[RGB, ...], others: tuple[RGB, ...], gap: int) -> RGB:
    """Pick a colour at L1 distance >= `gap` from each of `others`, so that adjacent shapes stay distinguishable."""
    return _pick(u, _apart(colours, others, gap))


@lru_cache(maxsize=4096)
def _apart(colours: tuple[RGB, ...], others: tuple[RGB, ...], gap: int) -> list[RGB]:
    return [c for c in colours
            if all(abs(c[0] - o[0]) + abs(c[1] - o[1]) + abs(c[2] - o[2]) >= gap for o in others)]


def face_traits(index: int) -> Face:
    """Return person number `index` (an integer >= 0); the same on every machine and in every process.

    Raises TypeError if the index is not an integer, ValueError if it is negative.
    """
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence((SEED, operator.index(index)))))
    u = iter(generator.random(36).tolist())

    def between(low: float, high: float) -> float:
        return low + (high - low) * next(u)

    skin = _pick(next(u), SKINS)
    hair = _pick_apart(next(u), HAIRS + 6 * DARK_HAIRS * (skin in SKINS[5:]), (skin,), 75)
    style = _pick(next(u), STYLES)
    # A beard lighter than the skin looks like a mask, unless it is grey or white.
    beard = next(u) < 0.35 and style in BEARDED and (sum(hair) < sum(skin) or hair in GREY_HAIRS)
    backdrop = _pick_apart(next(u), BACKDROPS, (hair, skin), 75)
    return Face(
        skin=skin, hair=hair, style=style, beard=beard, backdrop=backdrop,
        fringe=_pick(next(u), FRINGES[style]), flip=_pick(next(u), (-1, 1)),
        iris=_pick(next(u), IRISES), gaze=(between(-14, 14), between(-3, 4)), spacing=between(111, 119),
        lashes=next(u) < 0.5 and not beard, brow=_pick(next(u), tuple(BROWS)),
        glasses=_pick(next(u), 13 * ("none",) + 4 * ("round",) + 3 * ("square",)),
        frame=_pick_apart(next(u), FRAMES, (skin,), 110),
        nose=_pick(next(u), ("curve", "button", "side")),
        mouth=_pick(next(u), ("open", "grin") if beard else MOUTHS),
        blush=next(u) < 0.55, freckles=next(u) < 0.15,
        earrings=None if next(u) < 0.6 or beard or style in LOCKS else _pick(next(u), JEWELS),
        shirt=_pick_apart(next(u), SHIRTS, (backdrop, skin, hair), 90), neckline=_pick(next(u), NECKLINES),
        scenery=_pick(next(u), ("plain", "gradient", "disc")),
        jaw=between(-16, 16), chin=between(-10, 10), width=between(0.97, 1.03),
        scale=between(1.04, 1.10), shift=(between(-15, 15), between(-4, 18)),
    )


# What a face wears: it belongs to the first class that applies. Each has at least 8 % of the faces, and looks different
# at 32 px.
CLASSES = {
    "glasses": lambda face: face.glasses != "none",
    "beard": lambda face: face.beard,
    "curls": lambda face: face.style in CURLS,
    "hair up": lambda face: face.style in ("bun", "buns"),
    "long hair": lambda face: face.style == "long",
    "bob": lambda face: face.style == "bob",
    "short hair": lambda face: True,
}


def face_class(face: Face) -> int:
    """Return the number of the face's class, its place in CLASSES."""
    return next(number for number, applies in enumerate(CLASSES.values()) if applies(face))


@lru_cache(maxsize=64)
def _spline(count: int, closed: bool, steps: int = 8) -> np.ndarray:
    """Matrix that maps `count` control points to the points of a Catmull-Rom spline through them."""
    t = np.arange(steps)[:, None] / steps
    weights = np.hstack([-t + 2 * t**2 - t**3, 2 - 5 * t**2 + 3 * t**3, t + 4 * t**2 - 3 * t**3, t**3 - t**2])
    matrix = np.zeros((count if closed else count - 1, steps, count))
    for i, block in enumerate(matrix):
        for j in range(4):
            near = i + j - 1
            block[:, near % count if closed else min(max(near, 0), count - 1)] += weights[:, j] / 2
    matrix = matrix.reshape(-1, count)
    return matrix if closed else np.vstack([matrix, np.eye(count)[-1]])


def _dots(text: str) -> np.ndarray:
    """Parse "x,y x,y ..." (head units) to an array with one row per point."""
    return np.array([[float(number) for number in dot.split(",")] for dot in text.split()])


def _curve(text: str, closed: bool = False) -> np.ndarray:
    dots = _dots(text)
    return _spline(len(dots), closed) @ dots


def _mirrored(text: str, closed: bool = False) -> np.ndarray:
    """Symmetric curve from its right half. The last point, and the first of a closed curve, has x = 0."""
    right = _dots(text)
    dots = np.vstack([right, right[-2 : 0 if closed else None : -1] * (-1, 1)])
    return _spline(len(dots), closed) @ dots


@lru_cache(maxsize=64)
def _brush(text: str) -> np.ndarray:
    """Outline of a brush stroke with round ends through "x,y,width ..." points."""
    dots = _dots(text)
    path, width = np.hsplit(_spline(len(dots), False) @ dots, [2])
    along = np.gradient(path, axis=0)
    along *= width / 2 / np.hypot(*along.T)[:, None]
    across = along[:, ::-1] * (-1, 1)
    turn = np.linspace(-np.pi / 2, np.pi / 2, 7)[:, None]
    tip, tail = (np.cos(turn) * along[end] + np.sin(turn) * across[end] for end in (-1, 0))
    return np.vstack([path - across, path[-1] + tip, (path + across)[::-1], path[0] - tail])


def _balls(y: float, rx: float, ry: float, count: int, droop: float, radius: float) -> list:
    """Balls of curly hair, [(x, y, radius), ...], on an arc about (0, y) whose ends are `droop` degrees below y."""
    turns = np.deg2rad(np.linspace(-droop, 180 + droop, count))
    return [(float(rx * np.cos(t)), float(y - ry * np.sin(t)), radius) for t in turns]


HEAD = _mirrored("0,165 130,185 215,265 243,400 241,530 215,630 184,705 101,773 0,795", closed=True)
# Offsets of the head's points per unit of `jaw` and of `chin`.
WIDER_JAW = _mirrored("0,0 0,0 0,0 0,0 0,0 0.45,0 1,0 0.55,0 0,0", closed=True)
LOWER_CHIN = _mirrored("0,0 0,0 0,0 0,0 0,0 0,0 0,0 0,1 0,1", closed=True)
NECK = _dots("-82,700 82,700 88,875 -88,875")
CHIN_SHADOW = np.vstack([NECK[:2], _mirrored("84,790 50,838 0,852")])
SHOULDERS = _mirrored("0,860 90,862 210,890 320,940 375,1020 400,1250 0,1300", closed=True)
OPEN_NECK, COLLAR = _dots("-105,868 105,868 0,970"), _dots("78,828 150,878 85,975 0,905")
TURTLENECK = _mirrored("0,834 90,822 110,850 135,885 0,905", closed=True)
STRIPES = [_dots("-262,915 262,915 312,939 -312,939"), _dots("-342,968 342,968 360,992 -360,992")]
BEARD = np.vstack([_mirrored("240,465 232,620 188,735 100,808 0,830"),
                   _mirrored("224,480 192,615 120,655 60,642 0,648")[::-1]])
LIPS = _mirrored("0,684 24,674 68,680 36,715 0,722", closed=True)
OPEN_MOUTH = np.vstack([_mirrored("80,672 0,682")[::-1], _mirrored("80,672 55,720 0,742")])
TEETH = {"open": np.vstack([_mirrored("69,672 0,682")[::-1], _mirrored("66,680 45,694 0,700")]),
         "grin": np.vstack([_mirrored("69,672 0,682")[::-1], _mirrored("66,680 45,720 0,726")])}
BACK_HAIR = {"bob": _mirrored("0,200 200,220 250,400 280,600 275,710 200,745 0,720", closed=True),
             "long": _mirrored("0,200 200,220 250,400 280,600 310,850 310,1100 0,1200", closed=True)}
LOCKS = {  # hair over the ears
    "bob": _curve("205,270 262,360 294,540 288,700 238,752 198,715 224,600 222,450", closed=True),
    "long": _curve("205,270 262,360 288,550 315,800 300,1020 250,1050 200,930 205,780 228,620 222,450",
                   closed=True),
}
CROWN = _mirrored("250,500 262,390 230,235 130,150 0,125")
CROWNS = {
    "buzz": _mirrored("243,470 246,390 218,255 130,180 0,158"),
    "quiff": _curve("250,500 262,390 240,250 215,125 80,70 -80,80 -200,150 -245,260 -262,390 -250,500"),
}
HAIRLINES = {  # from the right temple to the left
    "back": _mirrored("226,480 212,370 150,285 0,250"),
    "bangs": _mirrored("222,480 206,400 150,365 60,375 45,335 30,374 0,376"),
    "swept": np.vstack([_curve("226,480 216,410 140,375 20,320 -90,225"),
                        _curve("-90,225 -150,310 -210,375 -226,480")]),
    "curtain": np.vstack([_curve("224,500 208,420 130,345 50,300 0,210"),
                          _curve("0,210 -50,300 -130,345 -208,420 -224,500")]),
    "spiky": _dots("226,480 205,350 165,385 135,310 75,370 45,300 -20,355 -55,295 -110,360 -140,310 -185,380 "
                   "-210,340 -226,480"),
    "quiff": _curve("226,480 214,360 170,270 40,262 -90,240 -180,300 -214,370 -226,480"),
}
CURLS = {"afro": (_balls(355, 310, 245, 17, 40, 62), _balls(430, 220, 205, 9, -5, 45)),
         "curly": (_balls(360, 250, 200, 12, 45, 58), _balls(400, 205, 150, 7, 0, 56))}
BROWS = {"soft": "-55,402,20 0,389,22 62,409,9", "fine": "-54,402,15 4,384,17 64,408,7",
         "bold": "-58,402,27 0,391,28 62,410,12", "raised": "-54,392,20 0,384,22 62,412,9"}
SIDES = (-1, 1)


class _Pen:
    """Draws shapes given in head units at the position and scale of one face."""

    def __init__(self, canvas: Image.Image, face: Face):
        self.draw, unit = ImageDraw.Draw(canvas), canvas.width / 1000
        self.kx, self.ky = unit * face.scale * face.width, unit * face.scale
        # Scaling about the height of the eyes keeps the features of all faces aligned.
        self.x0, self.y0 = unit * (500 + face.shift[0]), unit * (510 * (1 - face.scale) + face.shift[1])

    def fill(self, colour: RGB, outline: np.ndarray, x: float = 0, y: float = 0, side: int = 1) -> None:
        """Fill a polygon, mirrored if `side` is -1, then translated by (x, y)."""
        points = outline * (side * self.kx, self.ky) + (self.x0 + self.kx * x, self.y0 + self.ky * y)
        self.draw.polygon(points.ravel().tolist(), fill=colour)

    def box(self, x: float, y: float, rx: float, ry: float) -> tuple[int, int, int, int]:
        left, top = self.x0 + self.kx * (x - rx), self.y0 + self.ky * (y - ry)
        right, bottom = left + 2 * self.kx * rx - 1, top + 2 * self.ky * ry - 1
        return round(left), round(top), round(max(left, right)), round(max(top, bottom))

    def oval(self, colour: RGB, x: float, y: float, rx: float, ry: float | None = None) -> None:
        self.draw.ellipse(self.box(x, y, rx, ry or rx), fill=colour)

    def ovals(self, colour: RGB, x: float, y: float, rx: float, ry: float | None = None) -> None:
        """Draw the same oval on both sides of the face."""
        for side in SIDES:
            self.oval(colour, side * x, y, rx, ry)

    def lens(self, kind: str, side: int, **paint) -> None:
        rx, ry, corner = (92, 92, 92) if kind == "round" else (95, 78, 30)
        self.draw.rounded_rectangle(self.box(side * 117, 515, rx, ry), radius=corner * self.ky, **paint)


def _backdrop(face: Face, side: int) -> Image.Image:
    light = _mix(face.backdrop, WHITE, 0.45)
    if face.scenery == "gradient":
        ends = Image.fromarray(np.array([[light], [face.backdrop]], np.uint8))
        return ends.resize((side, side), Image.Resampling.BILINEAR)
    canvas = Image.new("RGB", (side, side), face.backdrop)
    if face.scenery == "disc":
        ImageDraw.Draw(canvas).ellipse([round(side * edge) for edge in (0.05, 0.05, 0.95, 0.95)], fill=light)
    return canvas


def _back_hair(pen: _Pen, face: Face) -> None:
    shade = _mix(face.hair, UMBER, 0.28)
    if face.style in BACK_HAIR:
        pen.fill(shade, BACK_HAIR[face.style])
    elif face.style in CURLS:
        balls = CURLS[face.style][0]
        pen.fill(face.hair, np.array(balls)[:, :2])
        for ball in balls:
            pen.oval(face.hair, *ball)
    elif face.style == "bun":
        pen.oval(face.hair, 0, 105, 92, 78)
        pen.oval(shade, 0, 150, 75, 30)
    elif face.style == "buns":
        pen.ovals(face.hair, 205, 155, 88)
        pen.ovals(shade, 165, 195, 50)


def _body(pen: _Pen, face: Face) -> None:
    shade, light = _mix(face.shirt, INK, 0.22), _mix(face.shirt, WHITE, 0.5)
    pen.fill(face.shirt, SHOULDERS)
    if face.neckline == "hood":
        pen.oval(shade, 0, 885, 190, 65)
    if face.neckline == "stripes":
        for stripe in STRIPES:
            pen.fill(light, stripe)
    if face.neckline in ("crew", "stripes"):
        pen.oval(shade, 0, 872, 128, 62)
    if face.neckline != "turtle":
        pen.oval(face.skin, 0, 868, 108, 46)
    if face.neckline in ("vneck", "collar"):
        pen.fill(face.skin, OPEN_NECK)
    pen.fill(face.skin, NECK)
    pen.fill(_mix(face.skin, UMBER, 0.27), CHIN_SHADOW)
    if face.neckline == "turtle":
        pen.fill(shade, TURTLENECK)
    for side in SIDES:
        if face.neckline == "collar":
            pen.fill(_mix(face.shirt, WHITE, 0.8), COLLAR, side=side)
        elif face.neckline == "vneck":
            pen.fill(shade, _brush("112,868,22 56,922,22 0,975,22"), side=side)
        elif face.neckline == "hood":
            pen.fill(light, _brush("75,910,14 85,950,14 80,985,16"), side=side)


@lru_cache(maxsize=64)
def _front_hair(style: str, fringe: str, drop: int) -> np.ndarray:
    """Outline of the hair above the forehead, with its lower edge shifted down by `drop`."""
    return np.vstack([CROWNS.get(style, CROWN)[::-1], HAIRLINES[fringe] + (0, drop)])


def _head(pen: _Pen, face: Face) -> None:
    shade, tip = _mix(face.skin, UMBER, 0.2), _mix(face.skin, UMBER, 0.36)
    pen.ovals(face.skin, 245, 535, 42, 60)
    pen.ovals(shade, 250, 535, 22, 36)
    if face.earrings:
        pen.ovals(face.earrings, 258, 605, 20)
    pen.fill(face.skin, HEAD + face.jaw * WIDER_JAW + face.chin * LOWER_CHIN)
    if face.style == "bald":
        pen.oval(_mix(face.skin, WHITE, 0.4), -100, 262, 45, 26)
    else:  # the shadow of the hair
        pen.fill(shade, _front_hair(face.style, face.fringe, 22), side=face.flip)
    if face.blush:
        pen.ovals(_mix(face.skin, ROSE, 0.32), 165, 612, 42, 28)
    if face.freckles:
        for x, y in ((105, 600), (140, 609), (123, 627)):
            pen.ovals(tip, x, y, 6.5)
    if face.beard:
        pen.fill(face.hair, BEARD)
    if face.nose == "button":
        pen.oval(_mix(face.skin, ROSE, 0.36), 0, 602, 26, 19)
    else:
        nose = "-24,594,12 0,611,15 24,594,12" if face.nose == "curve" else "0,560,10 20,598,14 -8,610,13"
        pen.fill(tip, _brush(nose), side=face.flip)


def _mouth(pen: _Pen, face: Face) -> None:
    line, lips = _mix(face.skin, UMBER, 0.72), _mix(face.skin, LIP, 0.55)
    if face.mouth == "smile":
        pen.fill(line, _brush("-70,676,16 0,708,20 70,676,16"))
    elif face.mouth == "neutral":
        pen.fill(line, _brush("-45,688,16 0,698,19 45,688,16"))
    elif face.mouth == "lips":
        pen.fill(lips, LIPS)
        pen.fill(_mix(lips, UMBER, 0.5), _brush("-64,680,8 0,700,12 64,680,8"))
    else:
        pen.fill(THROAT, OPEN_MOUTH)
        if face.mouth == "open":
            pen.oval(TONGUE, 0, 728, 36, 14)
        pen.fill(WHITE, TEETH[face.mouth])


def _eyes(pen: _Pen, face: Face) -> None:
    lid, brow, (gx, gy) = _mix(INK, face.hair, 0.12), _mix(face.hair, UMBER, 0.22), face.gaze
    for side in SIDES:
        x, y = side * face.spacing, 510
        if face.glasses != "none":
            pen.lens(face.glasses, side, fill=_mix(face.skin, WHITE, 0.35))
        pen.oval(WHITE, x, y, 70, 59)
        for colour, radius in ((_mix(face.iris, INK, 0.4), 53), (face.iris, 46), (INK, 24)):
            pen.oval(colour, x + gx, y + gy, radius)
        pen.oval(WHITE, x + gx - 19, y + gy - 20, 16)
        pen.oval(_mix(face.iris, WHITE, 0.6), x + gx + 18, y + gy + 22, 10)
        pen.fill(lid, _brush("-72,-10,8 -46,-46,18 0,-61,22 46,-48,22 76,-10,12"), x, y, side)
        if face.lashes:
            pen.fill(lid, _brush("60,-33,16 80,-46,10 92,-60,4"), x, y, side)
        pen.fill(brow, _brush(BROWS[face.brow]), x, 0, side)
    if face.glasses != "none":
        pen.fill(face.frame, _brush("-35,503,20 0,496,20 35,503,20"))
        for side in SIDES:
            pen.lens(face.glasses, side, outline=face.frame, width=max(1, round(21 * pen.ky)))
            pen.fill(face.frame, _brush("205,500,18 225,495,18 245,490,18"), side=side)


def _hair(pen: _Pen, face: Face) -> None:
    if face.style == "bald":
        return
    colour = _mix(face.hair, face.skin, 0.22) if face.style == "buzz" else face.hair
    light = _mix(face.hair, WHITE, 0.28)
    pen.fill(colour, _front_hair(face.style, face.fringe, 0), side=face.flip)
    if face.style in LOCKS:
        for side in SIDES:
            pen.fill(colour, LOCKS[face.style], side=side)
    if face.style in CURLS:
        for ball in CURLS[face.style][1]:
            pen.oval(colour, *ball)
        for x, y, _ in CURLS[face.style][1][1::2]:
            pen.fill(light, _brush("-34,-60,6 0,-72,14 34,-60,6"), x, y)
    elif face.style != "buzz":
        pen.fill(light, _brush("-200,290,4 -165,225,22 -100,182,24 -30,168,4"))


def draw_face(index: int, imsize: int, transparent: bool = False) -> np.ndarray:
    """Draw person number `index` as an RGB picture, uint8 (imsize, imsize, 3); if `transparent`, as an RGBA picture
    (imsize, imsize, 4) without a backdrop.

    `imsize` is at least 16; the features are designed to be legible from 32 px on. Raises ValueError for a smaller size
    or a negative index, TypeError if the index is not an integer.
    """
    if imsize < 16:
        raise ValueError(f"a toy face needs at least 16 pixels a side, got {imsize}")
    face = face_traits(index)
    fold = 4  # supersampling factor: ImageDraw does not anti-alias
    side = imsize * fold
    canvas = Image.new("RGBA", (side, side)) if transparent else _backdrop(face, side)
    pen = _Pen(canvas, face)
    for layer in (_back_hair, _body, _head, _mouth, _eyes, _hair):
        layer(pen, face)
    return np.array(canvas.reduce(fold))  # not asarray, which would be read-only
