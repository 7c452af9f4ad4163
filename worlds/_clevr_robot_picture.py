"""CLEVR-Robot's table as a picture, without GL: a pin-hole camera in front of it, and shaded discs.

This file knows where balls are and nothing of physics, goals or actions.
"""

import numpy as np
from PIL import Image, ImageColor, ImageDraw

BALL_COLORS = ("#d63031", "#2962dc", "#2ea043", "#8e44be", "#26bec8")
TABLE_CORNERS = ((-0.6, -0.3), (0.6, -0.3), (0.6, 0.7), (-0.6, 0.7))
BALL_RADIUS = 0.13
FLOOR = -BALL_RADIUS
EYE = np.array((0.0, -1.75, 1.55))
PITCH = np.radians(44)  # the camera looks down by so much
CAMERA = np.array(
    [
        (1, 0, 0),  # right
        (0, np.cos(PITCH), -np.sin(PITCH)),  # into the picture
        (0, np.sin(PITCH), np.cos(PITCH)),  # up
    ]
)
BACKGROUND = (238, 240, 244)
WOOD = (205, 190, 165)
EDGE = (140, 120, 90)
SHADOW = (165, 150, 128)
INK = (20, 20, 20)


def project(x: float, y: float, z: float, size: int) -> tuple[float, float, float]:
    """Pixel of a point as the camera sees it, and how many pixels a metre is there."""
    right, depth, up = CAMERA @ ((x, y, z) - EYE)
    metre = 1.55 * size / depth
    return size / 2 + metre * right, 0.56 * size - metre * up, metre


def draw_disc(pen, u: float, v: float, radius: float, fill, flatness: float = 1.0) -> None:
    """A filled circle, or with a flatness below 1 an ellipse."""
    height = radius * flatness
    pen.ellipse((u - radius, v - height, u + radius, v + height), fill=fill)


def draw_ball(pen, x: float, y: float, color: str, size: int) -> None:
    """Ever smaller, brighter discs toward the light."""
    u, v, metre = project(x, y, 0, size)
    radius = BALL_RADIUS * metre
    rgb = np.array(ImageColor.getrgb(color))
    for t in np.linspace(0, 1, 12):
        shade = rgb * (0.72 + 0.28 * t) + 90 * t**3
        fill = tuple(shade.clip(0, 255).astype(int))
        shift = t * radius
        draw_disc(pen, u - 0.3 * shift, v - 0.35 * shift, radius * (1 - 0.85 * t), fill)


def draw_arrow(pen, tail: np.ndarray, head: np.ndarray, size: int) -> None:
    """A line with a dot where it ends; tail, head: (2,) in metres."""
    start = project(*tail, 0, size)[:2]
    end = project(*head, 0, size)[:2]
    pen.line((*start, *end), fill=INK, width=6)
    draw_disc(pen, *end, 8, INK)


def draw_table(xy: np.ndarray, arrow: tuple | None, size: int) -> np.ndarray:
    """Balls (5, 2) on the table, (size, size, 3) uint8. arrow: its tail and its head."""
    wide = 2 * size  # drawn twice as large and shrunk, which smooths the edges
    image = Image.new("RGB", (wide, wide), BACKGROUND)
    pen = ImageDraw.Draw(image)
    corners = [project(x, y, FLOOR, wide)[:2] for x, y in TABLE_CORNERS]
    pen.polygon(corners, fill=WOOD, outline=EDGE)
    for x, y in xy:
        u, v, metre = project(x + 0.03, y - 0.02, FLOOR, wide)
        draw_disc(pen, u, v, BALL_RADIUS * metre, SHADOW, flatness=0.6)
    for ball in np.argsort(-xy[:, 1]):  # far balls first
        draw_ball(pen, *xy[ball], BALL_COLORS[ball], wide)
    if arrow is not None:
        draw_arrow(pen, *arrow, wide)
    return np.asarray(image.resize((size, size), Image.LANCZOS))
