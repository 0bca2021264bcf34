"""The drawings that the bundled model is trained on: from npm packages to one sheet, from the sheet to images.

`collect` renders openly licensed emoji (see NOTICE) into `drawings.webp`, which is kept in the repository so that
a rebuild of the model needs neither npm nor an SVG renderer. `training_set` turns that sheet into captioned images.
"""

from __future__ import annotations

import io
import json
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

HERE = Path(__file__).parent
SHEET = HERE / "drawings.webp"
INDEX = HERE / "drawings.json"
CELL = 80

# Every set is MIT or Apache-2.0; the fluent sets draw each animal in one pose, which keeps the model's task small.
ICON_SETS = (
    "@iconify-json/noto@1.2.9",
    "@iconify-json/fluent-emoji@1.2.7",
    "@iconify-json/fluent-emoji-flat@1.2.6",
)
FLUENT_3D = "@lobehub/fluent-emoji-3d@1.1.0"

# name in the captions -> emoji (the icon sets name their files by word, fluent-3d by code point)
SPECIAL_ICONS = {
    "squirrel": "chipmunk",
    "chicken": "rooster",
    "bee": "honeybee",
    "sheep": "ewe",
    "ladybug": "lady-beetle",
}
ANIMALS = (
    "cat dog horse monkey rabbit zebra spider bird sheep deer cow goat lion tiger bear raccoon fox wolf lizard beetle "
    "ant butterfly fish shark whale dolphin squirrel mouse rat snake turtle frog chicken duck goose bee pig turkey fly "
    "llama camel bat gorilla hedgehog kangaroo penguin panda koala owl elephant octopus crab crocodile giraffe "
    "rhinoceros hippopotamus parrot flamingo peacock swan snail ladybug lobster sloth otter badger unicorn"
).split()
FACES = "cat dog horse monkey rabbit cow pig tiger mouse".split()
CODE_POINTS = dict(
    zip(
        [*ANIMALS, *(f"{name} face" for name in FACES)],
        (
            "1f408 1f415 1f40e 1f412 1f407 1f993 1f577-fe0f 1f426 1f411 1f98c 1f404 1f410 1f981 1f405 1f43b 1f99d "
            "1f98a 1f43a 1f98e 1fab2 1f41c 1f98b 1f41f 1f988 1f40b 1f42c 1f43f-fe0f 1f401 1f400 1f40d 1f422 1f438 "
            "1f413 1f986 1fabf 1f41d 1f416 1f983 1fab0 1f999 1f42a 1f987 1f98d 1f994 1f998 1f427 1f43c 1f428 "
            "1f989 1f418 1f419 1f980 1f40a 1f992 1f98f 1f99b 1f99c 1f9a9 1f99a 1f9a2 1f40c 1f41e 1f99e 1f9a5 "
            "1f9a6 1f9a1 1f984 1f431 1f436 1f434 1f435 1f430 1f42e 1f437 1f42f 1f42d"
        ).split(),
        strict=True,
    )
)

# a plain background is named in the caption, so that a prompt can ask for it
BACKGROUNDS = {
    "white": (255, 255, 255), "black": (24, 24, 28), "gray": (150, 150, 155), "red": (214, 62, 58),
    "orange": (245, 150, 50), "yellow": (250, 222, 90), "green": (98, 176, 92), "blue": (84, 140, 222),
    "purple": (150, 98, 190), "pink": (246, 168, 200), "brown": (140, 98, 66),
}  # fmt: skip
IMAGE_SIZE = 64


def with_article(noun: str) -> str:
    """'a lion', 'an owl'."""
    return f"{'an' if noun[0] in 'aeio' else 'a'} {noun}"


def collect() -> None:
    """Renders every drawing into `drawings.webp` and `drawings.json`; needs npm and the package resvg-py."""
    import resvg_py

    cells: list[Image.Image] = []
    names: list[str] = []
    for icon_set in ICON_SETS:
        icons = json.loads(_npm_file(icon_set, "package/icons.json"))
        for name in CODE_POINTS:
            icon = SPECIAL_ICONS.get(name, name).replace(" ", "-")
            icon = icons.get("aliases", {}).get(icon, {}).get("parent", icon)
            size = icons["width"]
            svg = (
                '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
                f'viewBox="0 0 {size} {size}">{icons["icons"][icon]["body"]}</svg>'
            )
            cells.append(Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg, width=4 * CELL)))))
            names.append(name)
    for name, code_point in CODE_POINTS.items():
        cells.append(Image.open(io.BytesIO(_npm_file(FLUENT_3D, f"package/assets/{code_point}.webp"))))
        names.append(name)
    columns = len(CODE_POINTS)
    sheet = Image.new("RGBA", (columns * CELL, CELL * -(-len(cells) // columns)))
    for i, cell in enumerate(cells):
        sheet.paste(_fitted(cell.convert("RGBA")), (i % columns * CELL, i // columns * CELL))
    sheet.save(SHEET, lossless=False, quality=92, method=6)
    INDEX.write_text(json.dumps({"cell": CELL, "columns": columns, "names": names}) + "\n")


def _npm_file(package: str, member: str, _archives: dict[str, bytes] = {}) -> bytes:  # noqa: B006
    if package not in _archives:
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run(["npm", "pack", "--silent", package], cwd=folder, check=True, capture_output=True)
            _archives[package] = next(Path(folder).glob("*.tgz")).read_bytes()
    with tarfile.open(fileobj=io.BytesIO(_archives[package])) as archive:
        file = archive.extractfile(member)
        assert file is not None, f"{package} has no {member}"
        return file.read()


def _fitted(image: Image.Image) -> Image.Image:
    """The drawing without its margins, centred in a square cell, so that the drawings of all sets have one scale."""
    image = image.crop(image.getchannel("A").point(lambda a: 255 if a > 8 else 0).getbbox())
    image.thumbnail((CELL, CELL), Image.Resampling.LANCZOS)
    cell = Image.new("RGBA", (CELL, CELL))
    cell.paste(image, ((CELL - image.width) // 2, (CELL - image.height) // 2))
    return cell


def load_drawings() -> list[tuple[str, Image.Image]]:
    """(name, RGBA cell of `CELL` pixels) for every drawing of the sheet."""
    index = json.loads(INDEX.read_text())
    sheet = Image.open(SHEET).convert("RGBA")
    cell, columns = index["cell"], index["columns"]
    corners = [(i % columns * cell, i // columns * cell) for i in range(len(index["names"]))]
    return [
        (name, sheet.crop((x, y, x + cell, y + cell))) for name, (x, y) in zip(index["names"], corners, strict=True)
    ]


def training_set(repeats: int, rng: np.random.Generator) -> Iterator[tuple[str, np.ndarray]]:
    """Yields `repeats` variations of each drawing as (caption, uint8 image [H, W, 3])."""
    drawings = load_drawings()
    for _ in range(repeats):
        for name, drawing in drawings:
            yield variation(name, drawing, rng)


def variation(
    name: str,
    drawing: Image.Image,
    rng: np.random.Generator,
    sizes: tuple[float, float] = (0.78, 0.97),
    degrees: float = 6,
    mirrored: float = 0.25,
) -> tuple[str, np.ndarray]:
    """The drawing on a random plain background, with random size, place, mirroring and rotation, and its caption."""
    colour = rng.choice(list(BACKGROUNDS))
    canvas = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), BACKGROUNDS[colour])
    size = round(IMAGE_SIZE * rng.uniform(*sizes))
    figure = drawing.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < mirrored else drawing
    figure = figure.rotate(rng.uniform(-degrees, degrees), Image.Resampling.BICUBIC)
    figure = figure.resize((size, size), Image.Resampling.LANCZOS)
    slack = IMAGE_SIZE - size
    canvas.paste(figure, (round(rng.uniform(0, slack)), round(rng.uniform(0, slack))), figure)
    noun = with_article(name)
    subject = rng.choice([name, noun, noun, f"a photo of {noun}", f"a drawing of {noun}"])
    place = f" on {with_article(str(colour))} background" if rng.random() < 0.5 else ""
    return f"{subject}{place}", np.asarray(canvas)
