"""CLEVR-Robot's table as a picture, without GL: a pin-hole camera in front of it, and shaded discs.

This file knows where balls are and nothing of physics, goals or actions.
"""

import math

import numpy as np
from PIL import Image, ImageColor, ImageDraw

BALL_COLORS = ("#d63031", "#2962dc", "#2ea043", "#8e44be", "#26bec8")
TABLE_CORNERS = ((-0.6, -0.3), (0.6, -0.3), (0.6, 0.7), (-0.6, 0.7))
BALL_RADIUS = 0.13
FLOOR = -BALL_RADIUS
EYE_Y = -1.75
EYE_Z = 1.55
PITCH = math.radians(44)  # the camera looks down by so much
COS = math.cos(PITCH)
SIN = math.sin(PITCH)
BACKGROUND = "#eef0f4"
WOOD = "#cdbea5"
EDGE = "#8c785a"
SHADOW = "#a59680"
INK = "#141414"


def project(x: float, y: float, z: float, size: int) -> tuple:
    """Pixel of a point as the camera sees it, and how many pixels a metre is there."""
    ahead = y - EYE_Y
    below = EYE_Z - z
    depth = COS * ahead + SIN * below
    up = SIN * ahead - COS * below
    metre = 1.55 * size / depth
    u = size / 2 + metre * x
    v = 0.56 * size - metre * up
    return u, v, metre


def _draw_ball(pen, x, y, color, size):
    """Ever smaller, brighter discs toward the light."""
    u, v, metre = project(x, y, 0, size)
    radius = BALL_RADIUS * metre
    rgb = np.array(ImageColor.getrgb(color))
    for t in np.linspace(0, 1, 12):
        brightness = 0.72 + 0.28 * t
        shade = rgb * brightness + 90 * t**3
        shade = shade.clip(0, 255).astype(int)
        left = u - 0.3 * t * radius
        above = v - 0.35 * t * radius
        smaller = radius * (1 - 0.85 * t)
        pen.circle((left, above), smaller, tuple(shade))


def _draw_arrow(pen, tail, head, size):
    """A line with a dot where it ends; tail, head: (2,) in metres."""
    *start, _ = project(*tail, 0, size)
    *end, _ = project(*head, 0, size)
    pen.line((*start, *end), INK, width=6)
    pen.circle(end, 8, INK)


def draw_table(xy: np.ndarray, arrow: tuple | None, size: int) -> np.ndarray:
    """Balls (5, 2) on the table, (size, size, 3) uint8. arrow: its tail and its head."""
    wide = 2 * size  # drawn twice as large and shrunk, which smooths the edges
    image = Image.new("RGB", (wide, wide), BACKGROUND)
    pen = ImageDraw.Draw(image)
    corners = []
    for x, y in TABLE_CORNERS:
        *corner, _ = project(x, y, FLOOR, wide)
        corners += corner
    pen.polygon(corners, WOOD, EDGE)
    for x, y in xy:
        shadow = (x + 0.03, y - 0.02, FLOOR)
        u, v, metre = project(*shadow, wide)
        half_width = BALL_RADIUS * metre
        half_height = 0.6 * half_width
        top_left = (u - half_width, v - half_height)
        bottom_right = (u + half_width, v + half_height)
        pen.ellipse((top_left, bottom_right), SHADOW)
    away = xy[:, 1]
    for ball in np.argsort(-away):  # far balls first
        x, y = xy[ball]
        _draw_ball(pen, x, y, BALL_COLORS[ball], wide)
    if arrow is not None:
        _draw_arrow(pen, *arrow, wide)
    small = image.resize((size, size), Image.LANCZOS)
    return np.asarray(small)
