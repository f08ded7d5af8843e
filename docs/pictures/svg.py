"""How the pictures of plans look: lanes of computing, bands of exchanges, a legend; written as plain SVG."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from xml.sax.saxutils import escape

from isthmus.reporting.canvas import INK, MUTED, RULE, SERIES

WIDTH = 960
LEFT, RIGHT = 236, 944
"""Where time begins and ends."""
HOLDS = 162
COLOURS = {
    "slice": (SERIES[0], "its slice, all tokens"),
    "heads": (SERIES[1], "its heads and columns, all tokens"),
    "tokens": (SERIES[2], "its tokens, whole layers"),
    "whole": (SERIES[7], "all tokens, whole layers"),
    "layers": (SERIES[3], "its layers, a text at a time"),
}
"""By what a device works on: the fill, and what the legend says."""
WIRE = SERIES[6]
_IDLE = "#eef1f4"
_STYLE = (
    "text{font-family:-apple-system,'Segoe UI',Helvetica,Arial,sans-serif;fill:" + INK + "}"
    ".m{fill:" + MUTED + "}.w{fill:#fff}.b{font-weight:600}.c{text-anchor:middle}.e{text-anchor:end}"
    ".x{fill:" + WIRE + "}"
)


@dataclass(frozen=True, kw_only=True)
class Block:
    """One device computes. ``labels``: the first one that fits is written."""

    device: int
    start_s: float
    seconds: float
    kind: str
    labels: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Band:
    """Devices exchange. ``pattern``: ``all``, ``to`` or ``from`` one of them, or ``next`` for one and the one below.
    ``teams``: first and last of those who do so among themselves; none is all of them."""

    name: str = ""
    num_bytes: int = 0
    start_s: float
    seconds: float = 0.0
    pattern: str = "all"
    device: int = 0
    teams: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Lane:
    """One device: its name, its part of the work, and of each layer's weights the share that it holds."""

    name: str
    part: str
    held: tuple[float, ...]
    held_bytes: int


@dataclass(frozen=True, kw_only=True)
class Panel:
    """Devices under one plan. ``title`` where a picture has several."""

    lanes: tuple[Lane, ...]
    blocks: tuple[Block, ...]
    bands: tuple[Band, ...] = ()
    end_s: float
    title: str = ""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """``span_s``: what fits the width, with a mark every ``tick_s``. ``alone_s``: what one device takes, where it is to
    be marked."""

    title: str
    subtitle: str
    panels: tuple[Panel, ...]
    span_s: float
    tick_s: float
    alone_s: float | None = None
    note: str = ""


@dataclass
class _Canvas:
    parts: list[str] = field(default_factory=list)

    def rect(self, x: float, y: float, width: float, height: float, fill: str, more: str = "") -> None:
        self.parts.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{fill}"{more}/>'
        )

    def line(self, x1: float, y1: float, x2: float, y2: float, stroke: str, more: str = "") -> None:
        self.parts.append(f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{stroke}"{more}/>')

    def dot(self, x: float, y: float) -> None:
        self.parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{WIRE}"/>')

    def arrow(self, x: float, y: float, down: int) -> None:
        """The head of an arrow that ends at (x, y), from above where ``down`` is 1, from below where it is -1."""
        self.parts.append(
            f'<path d="M{x - 4.5:.1f} {y - 7 * down:.1f}L{x + 4.5:.1f} {y - 7 * down:.1f}L{x:.1f} {y:.1f}Z" '
            f'fill="{WIRE}"/>'
        )

    def text(self, x: float, y: float, size: float, text: str, classes: str = "") -> None:
        named = f' class="{classes}"' if classes else ""
        self.parts.append(f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size:g}"{named}>{escape(text)}</text>')


def width_of(text: str, size: float) -> float:
    """From above, in the wider fonts."""
    return 0.58 * size * len(text)


def seconds_text(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:.1f} s"
    return f"{seconds * 1e3:.0f} ms" if seconds >= 0.02 else f"{seconds * 1e3:.1f} ms"


def axis_text(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:g} s"
    return f"{seconds * 1e3:g} ms" if seconds else "0"


def bytes_text(num_bytes: float) -> str:
    return f"{num_bytes / 1e6:.1f} MB" if num_bytes >= 1e6 else f"{num_bytes / 1e3:.{0 if num_bytes >= 1e4 else 1}f} kB"


def draw(picture: Picture) -> str:
    """The picture as SVG."""
    canvas, scale = _Canvas(), (RIGHT - LEFT) / picture.span_s
    canvas.text(16, 28, 17, picture.title, "b")
    lines = picture.subtitle.split("\n")
    for number, line in enumerate(lines):
        canvas.text(16, 49 + 17 * number, 12.5, line, "m")
    tops = [46.0 + 17 * len(lines)]
    for panel in picture.panels:
        tops.append(tops[-1] + _head(panel, scale) + len(panel.lanes) * _PITCH + 6)
    bottom = tops[-1] - 6
    firsts = [top + _head(panel, scale) - 4 for panel, top in zip(picture.panels, tops, strict=False)]
    for number in range(int(picture.span_s / picture.tick_s) + 1):
        x = LEFT + number * picture.tick_s * scale
        for first, last in zip(firsts, tops[1:], strict=True):
            canvas.line(x, first, x, last - 6, RULE)
        if picture.alone_s is None or abs(number * picture.tick_s - picture.alone_s) * scale > 24:
            canvas.text(x, bottom + 14, 11, axis_text(number * picture.tick_s), "m c")
    if picture.alone_s is not None:
        x = LEFT + picture.alone_s * scale
        canvas.line(x, firsts[0], x, bottom + 20, INK, ' stroke-dasharray="2 3"')
        canvas.text(x, bottom + 31, 11, f"one device: {seconds_text(picture.alone_s)}", "c")
    for panel, top in zip(picture.panels, tops, strict=False):
        _panel(canvas, panel, scale, top)
    height = _legend(canvas, picture, bottom + 56)
    body = "\n".join(canvas.parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" width="{WIDTH}" '
        f'height="{height:.0f}" role="img" aria-label="{escape(picture.title)}">\n<style>{_STYLE}</style>\n'
        f'<rect width="{WIDTH}" height="{height:.0f}" fill="#fff"/>\n{body}\n</svg>\n'
    )


_LANE, _PITCH = 42, 52


def _head(panel: Panel, scale: float) -> float:
    """Height of what is above the lanes."""
    labels = [level for level, band in zip(_levels(panel, scale), panel.bands, strict=True) if band.name]
    return (26 if panel.title else 0) + (12 + 28 * (1 + max(labels)) if labels else 22)


def _panel(canvas: _Canvas, panel: Panel, scale: float, y: float) -> None:
    top = y + _head(panel, scale)
    if panel.title:
        canvas.text(16, y + 18, 13, panel.title, "b")
    centres = [top + number * _PITCH + _LANE / 2 for number in range(len(panel.lanes))]
    canvas.text(HOLDS, top - 7, 10.5, "holds", "m")
    for lane, centre in zip(panel.lanes, centres, strict=True):
        _lane(canvas, lane, centre)
        canvas.rect(LEFT, centre - _LANE / 2, panel.end_s * scale, _LANE, _IDLE)
    for block in panel.blocks:
        x, width, centre = LEFT + block.start_s * scale, block.seconds * scale, centres[block.device]
        canvas.rect(x, centre - _LANE / 2, width - 1, _LANE, COLOURS[block.kind][0], ' rx="2"')
        for label in block.labels:
            if width_of(label, 11) < width - 2:
                canvas.text(x + width / 2 - 0.5, centre + 4, 11, label, "w c")
                break
    for band, level in zip(panel.bands, _levels(panel, scale), strict=True):
        _band(canvas, band, scale, centres, top, level)
    x, middle = LEFT + panel.end_s * scale, (centres[0] + centres[-1]) / 2
    text = seconds_text(panel.end_s)
    canvas.rect(x + 5, middle - 11, width_of(text, 13) + 4, 20, "#fff")
    canvas.text(x + 8, middle + 4, 13, text, "b")


def _lane(canvas: _Canvas, lane: Lane, centre: float) -> None:
    canvas.text(16, centre - 2 if lane.part else centre + 4, 12, lane.name, "b")
    if lane.part:
        canvas.text(16, centre + 13, 10.5, lane.part, "m")
    width = 54 / len(lane.held)
    for number, share in enumerate(lane.held):
        x = HOLDS + number * width
        canvas.rect(x + 0.5, centre - 16, width - 1.5, 18, "#fff", f' stroke="{MUTED}" stroke-width="0.7"')
        if share:
            canvas.rect(x + 0.5, centre + 2 - 18 * share, width - 1.5, 18 * share, MUTED)
    canvas.text(HOLDS, centre + 16, 10.5, bytes_text(lane.held_bytes), "m")


def _levels(panel: Panel, scale: float) -> list[int]:
    """Of each band's label: 0, or 1 where it would overlap the one before."""
    ends, levels = [-1e9, -1e9], []
    for band in panel.bands:
        middle = (band.start_s + band.seconds / 2) * scale
        half = max(width_of(band.name, 11), width_of(bytes_text(band.num_bytes), 11)) / 2
        levels.append(0 if middle - half > ends[0] + 3 else 1)
        ends[levels[-1]] = middle + half
    return levels


def _band(canvas: _Canvas, band: Band, scale: float, centres: Sequence[float], top: float, level: int) -> None:
    x, width = LEFT + band.start_s * scale, max(2.0, band.seconds * scale)
    middle, last = x + width / 2, centres[-1] + _LANE / 2
    if band.pattern == "next":
        above, below = centres[band.device] + _LANE / 2, centres[band.device + 1] - _LANE / 2
        canvas.line(middle, above - 6, middle, below - 2, WIRE, ' stroke-width="1.5"')
        canvas.arrow(middle, below + 2, 1)
        return
    canvas.rect(x, top - 4, width - 1, last - top + 8, WIRE, ' fill-opacity="0.16"')
    for first, final in band.teams or ((0, len(centres) - 1),):
        canvas.line(middle, centres[first], middle, centres[final], WIRE, ' stroke-width="1.5"')
    for number, centre in enumerate(centres):
        is_it, side = number == band.device, 1 if number > band.device else -1
        if band.pattern == "all" or is_it == (band.pattern == "from"):
            canvas.dot(middle, centre)
        elif band.pattern == "from":
            canvas.arrow(middle, centre, side)
        else:
            for down, are_there in ((1, number > 0), (-1, number + 1 < len(centres))):
                if are_there:
                    canvas.arrow(middle, centre, down)
    y = top - 23 - 28 * level
    if level:
        canvas.line(middle, y + 16, middle, top - 4, WIRE, ' stroke-width="0.7"')
    canvas.text(middle, y, 11, band.name, "x c")
    canvas.text(middle, y + 13, 11, bytes_text(band.num_bytes), "x c")


def _legend(canvas: _Canvas, picture: Picture, y: float) -> float:
    """What is in the picture; the place of its lower edge."""
    used = [kind for kind in COLOURS if any(block.kind == kind for panel in picture.panels for block in panel.blocks)]
    entries = [(COLOURS[kind][0], "1", COLOURS[kind][1]) for kind in used]
    if any(panel.bands for panel in picture.panels):
        entries.append((WIRE, "0.3", "exchange, with bytes over a link"))
        entries.append((_IDLE, "1", "waiting"))
    canvas.line(16, y - 14, WIDTH - 16, y - 14, RULE)
    x = 16.0
    for fill, opacity, text in entries:
        if x + 20 + 0.5 * 11.5 * len(text) > WIDTH - 16:
            x, y = 16.0, y + 20
        canvas.rect(x, y, 13, 13, fill, f' fill-opacity="{opacity}" rx="2"')
        canvas.text(x + 19, y + 11, 11.5, text)
        x += 40 + 0.5 * 11.5 * len(text)
    if picture.note:
        y += 22
        canvas.text(16, y + 11, 11, picture.note, "m")
    return y + 26
