"""The pictures of the documentation, made again: the page of a circuit, and the rooms of the code.

    python docs/pictures.py          # all of them; needs Chromium
    python docs/pictures.py rooms    # the rooms alone

The page is that of the circuit which the quickstart finds, in light and dark. The rooms are drawn
from the imports in the code.
"""

import argparse
import ast
import io
import shutil
import tempfile
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "docs" / "images"

#: The size of the window in which the page is shown, in pixels.
WINDOW = {"width": 1480, "height": 860}

#: Rooms from the ground up, as rows of the picture. What every room uses is one box.
ROWS = [
    ["cli"],
    ["suites"],
    ["view"],
    ["certificates"],
    ["explanations"],
    ["attacks", "pruning"],
    ["programs", "bridges"],
    ["evaluation"],
    ["training", "circuits"],
    ["checkpoints"],
    ["faces"],
    ["data"],
    ["tasks"],
    ["network"],
    ["hooks"],
    ["kernels"],
]
BOX_WIDTH, BOX_HEIGHT = 128, 30
ROW_HEIGHT = 58


def room_of(path: Path) -> str:
    if path.is_relative_to(ROOT / "hooks"):
        return "hooks"
    return path.relative_to(ROOT / "tl_sparse").parts[0].removesuffix(".py")


def imports_of_rooms() -> dict[str, set[str]]:
    """Room → the rooms below it that its files import from."""
    row_of = {room: row for row, rooms in enumerate(ROWS) for room in rooms}
    found: dict[str, set[str]] = defaultdict(set)
    for path in [*(ROOT / "tl_sparse").rglob("*.py"), *(ROOT / "hooks").glob("*.py")]:
        room = room_of(path)
        if room not in row_of:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tl_sparse."):
                target = str(node.module).split(".")[1]
                if row_of.get(target, 0) > row_of[room]:
                    found[room].add(target)
    return dict(found)


def without_shortcuts(imports: dict[str, set[str]]) -> dict[str, set[str]]:
    """The same without the arrows that follow from others."""

    def below(room: str) -> set[str]:
        reached = set(imports.get(room, ()))
        for target in imports.get(room, ()):
            reached |= below(target)
        return reached

    kept = {}
    for room, targets in imports.items():
        kept[room] = set(targets)
        for target in targets:
            kept[room] -= below(target)
    return kept


def rooms_svg(imports: dict[str, set[str]]) -> str:
    """The rooms as boxes, and an arrow for each import between them."""
    width = 560
    places = {}
    for row, rooms in enumerate(ROWS):
        for column, room in enumerate(rooms):
            x = width * (column + 1) / (len(rooms) + 1)
            places[room] = (x, 24 + row * ROW_HEIGHT)
    height = 24 + len(ROWS) * ROW_HEIGHT
    row_of = {room: row for row, rooms in enumerate(ROWS) for room in rooms}
    arrows = []
    for room in sorted(imports):
        for target in sorted(imports[room]):
            x, y = places[room]
            end_x, end_y = places[target]
            top, bottom = y + BOX_HEIGHT / 2, end_y - BOX_HEIGHT / 2 - 4
            rows_between = row_of[target] - row_of[room] - 1
            side = -1 if end_x <= x else 1
            bend = 0 if rows_between == 0 else side * (40 + 26 * rows_between)
            arrows.append(
                f'<path d="M{x:.0f},{top:.0f} C{x + bend:.0f},{top + 30:.0f} '
                f'{end_x + bend:.0f},{bottom - 30:.0f} {end_x:.0f},{bottom:.0f}"/>'
            )
    return svg(width, height, arrows, places)


def svg(width: int, height: int, arrows: list[str], places: dict[str, tuple[float, float]]) -> str:
    boxes = []
    for room, (x, y) in places.items():
        left, top = x - BOX_WIDTH / 2, y - BOX_HEIGHT / 2
        boxes.append(
            f'<rect x="{left:.0f}" y="{top:.0f}" width="{BOX_WIDTH}" height="{BOX_HEIGHT}" rx="5"/>'
            f'<text x="{x:.0f}" y="{y + 5:.0f}">{room}</text>'
        )
    style = (
        "rect{fill:#eef1fb;stroke:#4051b5}text{font:14px sans-serif;text-anchor:middle;fill:#222}"
        ".arrows{fill:none;stroke:#8a93c4;stroke-width:1.3;marker-end:url(#head)}"
        "#head path{fill:#8a93c4}"
    )
    head = (
        '<marker id="head" viewBox="0 0 8 8" refX="6" refY="4" markerWidth="7" markerHeight="7" '
        'orient="auto"><path d="M0 0 L8 4 L0 8 z"/></marker>'
    )
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}">',
        f"<style>{style}</style><defs>{head}</defs>",
        '<g class="arrows">',
        *arrows,
        "</g>",
        *boxes,
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def draw_rooms() -> None:
    text = rooms_svg(without_shortcuts(imports_of_rooms()))
    (IMAGES / "rooms.svg").write_text(text, encoding="utf-8")


def draw_page() -> None:
    import tl_sparse

    model = tl_sparse.load("tiny-python-wide", device="cpu")
    circuit, _ = tl_sparse.prune(model, "single_double_quote")
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "page.html"
        circuit.view(model).save(page)
        for scheme in ("light", "dark"):
            shot = screenshot(page, scheme)
            (IMAGES / f"circuit-{scheme}.png").write_bytes(with_few_colours(shot))


def screenshot(page: Path, scheme: str) -> bytes:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        tab = browser.new_page(viewport=WINDOW, color_scheme=scheme)
        tab.goto(page.as_uri())
        tab.wait_for_timeout(500)
        shot: bytes = tab.screenshot()
        browser.close()
    return shot


def with_few_colours(png: bytes) -> bytes:
    """The image with 128 colours, which are enough here, in a third of the bytes."""
    from PIL import Image

    small = io.BytesIO()
    image = Image.open(io.BytesIO(png)).convert("RGB").quantize(128)
    image.save(small, "PNG", optimize=True)
    return small.getvalue()


PICTURES = {"rooms": draw_rooms, "page": draw_page}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="rooms, page; by default both")
    chosen = parser.parse_args().names or PICTURES
    for name in chosen:
        PICTURES[name]()
