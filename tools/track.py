"""Number the objects of a video across its frames."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from inference.detections import TOOLS, Detections
from utils.errors import require

# ByteTrack matches detections above this score first, and starts tracks with them only (Zhang et al. 2022, section 3).
HIGH_SCORE = 0.5


class Tracker:
    """Assigns track ids with ByteTrack (Zhang et al., ECCV 2022), from the package `trackers`.

    Call it with the detections of each frame, in order.

    Args:
        fps: frames per second of the video. An object that is not detected for a second gets a new id afterwards.

    Raises:
        UserError: if the packages are not installed.
    """

    def __init__(self, fps: float):
        with require("supervision", "trackers", install=TOOLS):
            from trackers import ByteTrackTracker
        self.tracker = ByteTrackTracker(
            frame_rate=fps,
            track_activation_threshold=HIGH_SCORE,
            high_conf_det_threshold=HIGH_SCORE,
            minimum_consecutive_frames=1,
        )

    def __call__(self, found: Detections) -> Detections:
        """Return the detections with `track_ids`, -1 for those without a track, in the same order."""
        import supervision

        tracked = self.tracker.update(
            supervision.Detections(
                xyxy=found.boxes.cpu().numpy(),
                confidence=found.mask_scores.float().cpu().numpy(),
                class_id=found.labels.cpu().numpy(),
                data={"row": np.arange(len(found))},
            )
        )
        ids = torch.full((len(found),), -1, dtype=torch.long)
        if len(tracked):
            ids[torch.as_tensor(tracked.data["row"])] = torch.as_tensor(tracked.tracker_id).long()
        return replace(found, track_ids=ids.to(found.scores.device))
