"""Number the objects of a video across its frames."""

from __future__ import annotations

import itertools
from dataclasses import replace

import cv2
import numpy as np
import torch

from inference.detections import TOOLS, Detections
from utils.errors import require

# ByteTrack matches detections above this score first, and starts tracks with them only (Zhang et al. 2022, section 3).
HIGH_SCORE = 0.5
# A new scene begins where hue, saturation and value of two frames differ by more than this on average, the threshold of
# PySceneDetect's ContentDetector. They are compared at THUMBNAIL, width and height in pixels.
CUT, THUMBNAIL = 27.0, (64, 36)


class Tracker:
    """Assigns track ids with ByteTrack (Zhang et al., ECCV 2022), from the package `trackers`.

    Call it with the detections of each frame and the frame, in order. No track continues across a cut.

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
        self.numbers = itertools.count()
        self.thumbnail: np.ndarray | None = None

    def __call__(self, found: Detections, image: np.ndarray) -> Detections:
        """Return the detections of `image`, uint8 BGR [H, W, 3], with `track_ids`, -1 for those without a track."""
        import supervision

        if self._is_cut(image):
            self.tracker.reset()
        scores = found.mask_scores.float().cpu().numpy()
        tracked = self.tracker.update(
            supervision.Detections(
                xyxy=found.boxes.cpu().numpy(),
                confidence=scores,
                class_id=found.labels.cpu().numpy(),
                data={"row": np.arange(len(found))},
            )
        )
        ids = torch.full((len(found),), -1, dtype=torch.long)
        if len(tracked):
            rows = np.asarray(tracked.data["row"])
            ids[torch.as_tensor(rows)] = torch.as_tensor(np.asarray(tracked.tracker_id)).long()
            # The tracker numbers an object from its second frame on. Its new tracks are in the order of the detections.
            new = [row for row in rows.tolist() if ids[row] < 0 and scores[row] >= HIGH_SCORE]
            tracks = [track for track in self.tracker.tracks if track.tracker_id < 0]
            for row, track in zip(new, tracks, strict=True):
                ids[row] = track.tracker_id = next(self.numbers)
        return replace(found, track_ids=ids.to(found.scores.device))

    def _is_cut(self, image: np.ndarray) -> bool:
        before = self.thumbnail
        small = cv2.resize(image, THUMBNAIL, interpolation=cv2.INTER_AREA)
        self.thumbnail = cv2.cvtColor(small, cv2.COLOR_BGR2HSV).astype(np.float32)
        return before is not None and float(np.abs(self.thumbnail - before).mean()) > CUT
