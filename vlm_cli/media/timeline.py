"""When the frames of a clip are shown, and which of them are read: evenly spaced in time, the first and the last too.

Times are whole ticks, since a sum of fractions of a second would choose a neighbour of the right frame.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from vlm_cli.errors import MediaError
from vlm_cli.media.request import MAX_FRAMES, ClipRequest

__all__ = ["Timeline"]


@dataclass(frozen=True)
class Timeline:
    """The times of all frames of a clip.

    Attributes:
        ticks: when each frame is shown, ascending.
        end: when the last frame ends.
        tick: seconds of a tick; None if the frames have an order and no times.
    """

    ticks: Sequence[int]
    end: int
    tick: Fraction | None

    @property
    def duration(self) -> float | None:
        """Seconds from the first frame to the end of the last one; None without times."""
        return None if self.tick is None else float((self.end - self.ticks[0]) * self.tick)

    def seconds(self, index: int) -> float | None:
        """Return the seconds from the first frame to this one; None without times."""
        return None if self.tick is None else float((self.ticks[index] - self.ticks[0]) * self.tick)

    def choose(self, request: ClipRequest, name: str) -> list[int]:
        """Return the indices of the frames that a request asks for.

        They are the frames that are shown at evenly spaced times, from the first to the last frame of the part that is
        read. No frame is read twice: a part with fewer frames gives all that it has. With 4 of 7 frames, `#`:

            frames   0   1   2   3   4   5   6          frames   0 1 2 3         4         5
            read     #       #       #       #          read     #     #         #         #

        Args:
            request: what the user asks for.
            name: what messages call the clip.

        Raises:
            MediaError: if the part has no frame, or more frames than vlm reads.
        """
        if request.frame is not None:
            if request.frame >= len(self.ticks):
                raise MediaError(
                    f"{name} has {len(self.ticks):,} frames, so there is no frame={request.frame}; the last one is "
                    f"frame={len(self.ticks) - 1}."
                )
            return [request.frame]
        first, last = self._part(request, name)
        if request.fps is None:
            wanted = request.most or 1
        else:
            assert self.tick is not None
            wanted = max(1, round((self.ticks[last] - self.ticks[first]) * self.tick * Fraction(str(request.fps))) + 1)
            count = min(wanted, last - first + 1)
            if count > MAX_FRAMES:
                raise MediaError(
                    f"fps={request.fps:g} of {name} gives {count:,} frames; vlm reads at most "
                    f"{MAX_FRAMES:,} of one clip. Give a smaller fps, frames=N, or a start and an end."
                )
        return self._spread(first, last, min(wanted, last - first + 1))

    def _part(self, request: ClipRequest, name: str) -> tuple[int, int]:
        """Return the first and the last frame of the part that is read."""
        if self.tick is None:
            if request.fps is not None or not request.is_whole:
                raise MediaError(
                    f"{name} is a folder of frames, which have no times, so fps, start and end have no meaning. Give "
                    "frames=N."
                )
            return 0, len(self.ticks) - 1
        start, end = (
            Fraction(str(request.start)) / self.tick,
            None if request.end is None else Fraction(str(request.end)) / self.tick,
        )
        zero = self.ticks[0]
        assert self.duration is not None
        if zero + start >= self.end and start > 0:
            raise MediaError(
                f"start={request.start:g} lies beyond the end of {name}, which lasts {self.duration:.2f} s. Give an "
                "earlier start."
            )
        first = min(bisect_left(self.ticks, zero + start), len(self.ticks) - 1)
        last = len(self.ticks) - 1 if end is None else bisect_right(self.ticks, zero + end) - 1
        if first > last or (start > 0 and self.ticks[first] < zero + start):
            # The frame that is shown all the time from start to end began before.
            first = last = bisect_right(self.ticks, zero + start) - 1
        return first, last

    def _spread(self, first: int, last: int, count: int) -> list[int]:
        if count == 1:
            return [first]
        begin, span = self.ticks[first], self.ticks[last] - self.ticks[first]
        if self._is_steady(first, last):
            return [first + k * (last - first) // (count - 1) for k in range(count)]
        chosen: list[int] = []
        for k in range(count):
            shown = bisect_right(self.ticks, begin + k * span // (count - 1)) - 1
            least = chosen[-1] + 1 if chosen else first
            chosen.append(max(least, min(shown, last - (count - 1 - k))))
        return chosen

    def _is_steady(self, first: int, last: int) -> bool:
        """Tell whether these frames follow each other at one rate, but for the rounding of times to ticks."""
        begin, span, steps = self.ticks[first], self.ticks[last] - self.ticks[first], last - first
        return all(abs((self.ticks[first + i] - begin) * steps - i * span) <= steps for i in range(steps))
