"""Pacing: when the next block must begin, with how much reserve, and what is late.

    | delivered       | ready      | under way     |            frames, at their due times
    +-----------------+------------+---------------+-------->
                      now             ^            runs out
                                      the next block begins: runs out - reserve

Values and pure functions: nothing here has a clock, waits, or touches a device.
"""

import math
from dataclasses import dataclass, field, replace

import numpy as np

from jax_avatar.live.jitter_buffer import SpeechStatus
from jax_avatar.streaming.format import StreamFormat

__all__ = [
    "LiveSettings",
    "LiveStats",
    "Progress",
    "StepTimes",
    "reserve_s",
    "seconds_to_block",
    "seconds_to_delivery",
    "takes_over",
]

_RECENT_BLOCKS = 16
_LATE_FRAMES = 0.5  # tolerated lateness of a block now and then; the player buffers more


@dataclass(frozen=True)
class LiveSettings:
    """Trade-off of a live session between latency and smoothness.

    Attributes:
        chunk_frames: most frames delivered at once.
        lead_s: extra seconds of reserve for a block whose speech has arrived.
        target_delay_s: least delay of the jitter buffer; it grows after late arrivals.
        most_waiting_s: capacity of the jitter buffer; more speech is refused.
        in_flight: blocks that may be under way on the devices at once.
    """

    chunk_frames: int = 2
    lead_s: float = 0.3
    target_delay_s: float = 0.03
    most_waiting_s: float = 120.0
    in_flight: int = 2

    def __post_init__(self):
        if self.chunk_frames < 1 or self.in_flight < 1:
            raise ValueError(
                f"chunk_frames {self.chunk_frames} and in_flight {self.in_flight} must be at "
                "least 1."
            )
        if min(self.lead_s, self.target_delay_s) < 0 or self.most_waiting_s <= 0:
            raise ValueError(
                f"lead_s {self.lead_s}, target_delay_s {self.target_delay_s} and most_waiting_s "
                f"{self.most_waiting_s} are seconds; the first two must not be negative, the last "
                "must be above 0."
            )


@dataclass(frozen=True)
class LiveStats:
    """Counts since the start, for monitoring.

    Attributes:
        frames: delivered.
        dropped: frames made but not delivered, since newer ones replaced them.
        late: chunks delivered after their due time.
        late_s: seconds by which the video was put off in total.
        missing_s: seconds of silence inserted where unfinished speech was late.
        step_s: duration of the latest block, from hand-over until its last frames came.
    """

    frames: int = 0
    dropped: int = 0
    late: int = 0
    late_s: float = 0.0
    missing_s: float = 0.0
    step_s: float = 0.0


@dataclass(frozen=True)
class StepTimes:
    """Durations of the latest blocks, from hand-over until their first piece came.

    Attributes:
        recent: seconds of the latest 16.
        median_s: their median.
        usual_s: their 0.9 quantile.
    """

    recent: tuple[float, ...] = ()
    median_s: float = 0.0
    usual_s: float = 0.0

    def add(self, seconds: float) -> "StepTimes":
        """Durations with one more block."""
        recent = (*self.recent, seconds)[-_RECENT_BLOCKS:]
        return StepTimes(recent, *np.quantile(recent, (0.5, 0.9)).tolist())


@dataclass(frozen=True)
class Progress:
    """Progress of a video: the pieces on the devices, and the frames after them.

    Attributes:
        begun: pieces of all blocks begun.
        promised: pieces that can be fetched; a pipeline holds back those of its latest blocks.
        fetched: pieces whose frames have come.
        ready: frames that have come and are not delivered.
        takeover: piece that replaces the ready frames when it comes; None if there is none.
        is_cleared: True from an interrupt until the next block begins.
        start: due time of frame 0, put off whenever a chunk is late; None before the first frame.
        steps: durations of the latest blocks.
        stats: counts, those of delivered frames among them.
    """

    begun: int = 0
    promised: int = 0
    fetched: int = 0
    ready: int = 0
    takeover: int | None = None
    is_cleared: bool = False
    start: float | None = None
    steps: StepTimes = StepTimes()
    stats: LiveStats = field(default_factory=LiveStats)

    @property
    def is_overtaken(self) -> bool:
        """True if the next piece to come replaces the ready frames."""
        return self.takeover is not None and self.fetched >= self.takeover

    def clear(self) -> "Progress":
        """Progress after an interrupt."""
        return replace(self, is_cleared=True)

    def begin(self, form: StreamFormat, speech: SpeechStatus, missing_s: float) -> "Progress":
        """Progress after a block has begun, with so many seconds of speech missing."""
        is_new = takes_over(self, speech)
        return replace(
            self,
            begun=self.begun + form.pieces_per_block,
            takeover=self.begun if is_new else self.takeover,
            is_cleared=self.is_cleared and not is_new,
            stats=replace(self.stats, missing_s=self.stats.missing_s + missing_s),
        )

    def promise(self, pieces: int) -> "Progress":
        """Progress after the devices have promised so many more pieces."""
        return replace(self, promised=self.promised + pieces)

    def receive(self, form: StreamFormat, frames: int, seconds: float) -> "Progress":
        """Progress after the next piece has come, so many seconds after its block's hand-over."""
        place, is_overtaken = self.fetched % form.pieces_per_block, self.is_overtaken
        stats = self.stats
        if is_overtaken:
            stats = replace(stats, dropped=stats.dropped + self.ready)
        if place == form.pieces_per_block - 1:
            stats = replace(stats, step_s=seconds)
        return replace(
            self,
            fetched=self.fetched + 1,
            ready=frames if is_overtaken else self.ready + frames,
            takeover=None if is_overtaken else self.takeover,
            steps=self.steps if place else self.steps.add(seconds),
            stats=stats,
        )

    def start_at(self, now: float) -> "Progress":
        """Progress of a video that starts now if its first frames are ready."""
        return replace(self, start=now) if self.start is None and self.ready else self

    def deliver(self, form: StreamFormat, frames: int, late_s: float) -> "Progress":
        """Progress after frames have left, so many seconds late; all others are put off by that."""
        stats = replace(self.stats, frames=self.stats.frames + frames)
        if late_s <= 1 / form.fps:
            return replace(self, ready=self.ready - frames, stats=stats)
        stats = replace(stats, late=stats.late + 1, late_s=stats.late_s + late_s)
        return replace(self, ready=self.ready - frames, start=self.start + late_s, stats=stats)


def takes_over(progress: Progress, speech: SpeechStatus) -> bool:
    """True if the next block should replace the frames that are ready but not delivered."""
    return progress.is_cleared or (speech.is_starting and speech.is_enough)


def reserve_s(
    form: StreamFormat, settings: LiveSettings, steps: StepTimes, speech: SpeechStatus
) -> float:
    """Seconds before frames run out at which the next block begins.

    Speech of a microphone waits until its block is complete, so there the reserve is the part of
    the delay that exceeds a block.
    """
    if speech.is_enough:
        return steps.usual_s + settings.lead_s
    # Running speech may still arrive: a frame half late is better than a gap.
    step_s = steps.median_s if speech.is_running else steps.usual_s
    return step_s - _LATE_FRAMES / form.fps


def seconds_to_block(
    form: StreamFormat,
    settings: LiveSettings,
    progress: Progress,
    speech: SpeechStatus,
    now: float,
) -> float:
    """Seconds until the next block must begin.

    Returns:
        0 or less if it is due; infinity if that depends on something else happening first.
    """
    under_way = progress.promised - progress.fetched
    if under_way > (settings.in_flight - 1) * form.pieces_per_block:
        return math.inf  # until a piece comes
    if progress.start is None:
        return math.inf if progress.ready else 0.0
    if progress.ready > 2 * form.block_frames + settings.lead_s * form.fps:
        return math.inf  # until frames are delivered
    if takes_over(progress, speech):
        return 0.0
    # In a pipeline, a block moves on only when others follow.
    if progress.takeover is not None and progress.takeover >= progress.promised:
        return 0.0
    frames = progress.stats.frames + progress.ready + under_way * form.piece_frames
    runs_out = progress.start + frames / form.fps
    return runs_out - reserve_s(form, settings, progress.steps, speech) - now


def seconds_to_delivery(form: StreamFormat, progress: Progress, now: float) -> float:
    """Seconds until the next frame is due; negative if it is late, infinity if none is ready."""
    if not progress.ready:
        return math.inf
    return progress.start + progress.stats.frames / form.fps - now
