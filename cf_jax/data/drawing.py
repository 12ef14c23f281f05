"""Numbers on frames, so that a policy can name them (arXiv 2505.15447)."""

import cv2
import numpy as np

_RED = (255, 0, 0)
_FONT = cv2.FONT_HERSHEY_SIMPLEX
# Height of a digit, as a share of the longer side, and in pixels at least:
# below, the font is no longer legible.
_SHARE, _LEAST_PX = 0.12, 7
_UNIT_PX = 21  # height of the font's digits at scale 1


def draw_numbers(frames: np.ndarray, numbers: np.ndarray) -> np.ndarray:
  """Draws a number on each frame, in red at the bottom right.

  A thin white edge keeps it legible on red [ours].

  Args:
    frames: uint8[..., height, width, 3] RGB.
    numbers: int[...] one a frame.

  Returns:
    The same with numbers; `frames` stays as it is.

  Raises:
    ValueError: another number of numbers than of frames.
  """
  if frames.shape[:-3] != np.shape(numbers):
    raise ValueError(
      f"frames have the shape {frames.shape[:-3]}, their numbers"
      f" {np.shape(numbers)}; give one number a frame"
    )
  made = np.ascontiguousarray(frames).copy()
  height, width = frames.shape[-3:-1]
  scale = max(_SHARE * max(height, width), _LEAST_PX) / _UNIT_PX
  for place in np.ndindex(*np.shape(numbers)):
    text = str(int(numbers[place]))
    (wide, _), _ = cv2.getTextSize(text, _FONT, scale, 1)
    corner = (max(width - wide - 2, 0), height - 3)
    for color, thickness in (((255, 255, 255), 3), (_RED, 1)):
      cv2.putText(
        made[place],
        text,
        corner,
        _FONT,
        scale,
        color,
        thickness,
        cv2.LINE_AA,
      )
  return made
