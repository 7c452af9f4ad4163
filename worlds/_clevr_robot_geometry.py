"""Where the balls of CLEVR-Robot are and should be: points (..., 2) in metres.

This file knows vectors, and neither words nor physics.
"""

import numpy as np

Array = np.ndarray
BEHIND = (0, 1)  # from the viewer
LEFT = (-1, 0)
FRONT = (0, -1)
RIGHT = (1, 0)
DIRECTION_VECTORS = np.array([BEHIND, LEFT, FRONT, RIGHT], float)  # counterclockwise
STRAIGHT_PUSHES = [(1, 0), (0, 1), (-1, 0), (0, -1)]
DIAGONAL_PUSHES = [(0.8, 0.8), (-0.8, 0.8), (0.8, -0.8), (-0.8, -0.8)]
PUSH_VECTORS = np.array(STRAIGHT_PUSHES + DIAGONAL_PUSHES)
UNIT_PUSHES = PUSH_VECTORS / np.linalg.norm(PUSH_VECTORS, axis=1, keepdims=True)
REACH_LOW = np.array((-0.47, -0.17))  # where a ball's centre can be, between the walls
REACH_HIGH = np.array((0.47, 0.57))
NEAR = 0.39 + 0.001  # a relation holds up to this distance, with the judge's tolerance


def positions(obs: Array) -> Array:
    """Observations (B, 10) as x, y of each ball: (B, 5, 2) float64."""
    return np.asarray(obs, np.float64).reshape(-1, 5, 2)


def dot(a: Array, b: Array) -> Array:
    """Products of vectors, (..., 2) -> (...)."""
    x = a[..., 0] * b[..., 0]
    y = a[..., 1] * b[..., 1]
    return x + y  # faster than a sum along an axis of two


def length(vectors: Array) -> Array:
    """(..., 2) -> (...)."""
    return np.sqrt(dot(vectors, vectors))


def holds(offsets: Array, direction: Array) -> Array:
    """Whether offsets (..., 2) between two balls fulfil a direction (...): near, and in its 90°.

    Of a sector's two edges the clockwise one belongs to it: each angle lies in exactly one sector.
    """
    toward = DIRECTION_VECTORS[direction]
    to_its_left = DIRECTION_VECTORS[(direction + 1) % 4]
    along = dot(offsets, toward)
    leftward = dot(offsets, to_its_left)
    in_sector = (along + leftward >= 0) & (along > leftward)
    is_near = length(offsets) < NEAR
    return in_sector & is_near


def relations_in(obs: Array) -> Array:
    """All relations that hold in observations (N, 10): (M, 4) of row, ball, other, direction."""
    balls = obs.reshape(-1, 5, 1, 1, 2)
    offsets = balls - balls.swapaxes(1, 2)
    every_direction = np.arange(4)
    return np.argwhere(holds(offsets, every_direction))


def distance_to_segment(start: Array, end: Array, point: Array) -> Array:
    """Distance of points from the segments between start and end."""
    segment = end - start
    squared_length = np.maximum(dot(segment, segment), 1e-9)
    along = dot(point - start, segment) / squared_length
    along = np.clip(along, 0, 1)[..., None]
    nearest = start + along * segment
    return length(nearest - point)


def path_around(start: Array, end: Array, center: Array, radius: float) -> Array:
    """Length of the shortest path from start to end that stays out of a circle."""
    straight = length(end - start)
    blocked = distance_to_segment(start, end, center) < radius
    from_center = np.broadcast_arrays(start - center, end - center)
    ends = np.array(from_center)
    distance = length(ends)
    product = np.maximum(distance.prod(0), 1e-9)
    cosine = dot(*ends) / product
    angle = np.arccos(np.clip(cosine, -1, 1))  # between the ends, seen from the centre
    ratio = np.minimum(radius / np.maximum(distance, 1e-9), 1)
    tangent_angles = np.arccos(ratio).sum(0)
    squared_tangents = np.maximum(distance**2 - radius**2, 0)
    tangents = np.sqrt(squared_tangents).sum(0)
    arc = radius * np.maximum(angle - tangent_angles, 0)
    return np.where(blocked, tangents + arc, straight)


def beyond_walls(xy: Array) -> Array:
    """How far points are from where a ball's centre can be."""
    inside = np.clip(xy, REACH_LOW, REACH_HIGH)
    return length(xy - inside)


def crowding(xy: Array, ball: Array, start: Array, end: Array) -> Array:
    """Cost (B, 8) of pushing ball (B,) from start (B, 1, 2) to end (B, 8, 2): others, walls."""
    distance = distance_to_segment(start[:, :, None], end[:, :, None], xy[:, None])
    rows = np.arange(len(xy))
    distance[rows, :, ball] = np.inf  # a ball is not in its own way
    near = np.clip(1 - distance / 0.24, 0, 1)
    return 0.05 * near.sum(-1) + beyond_walls(end)
