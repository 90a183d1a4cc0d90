"""Evaluation sequences: where the camera is, and which time it sees.

A clip has n = num_frames * num_frames_factor frames; a test has ``num_test_loop_static`` parts, each a
rest at an azimuth and a turn to the next one. Every sequence is made to be played in a loop: its times
and turns continue from the last frame to the first as between any two others.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from fourdfy.data.settings import SingleViewConfig
from fourdfy.ops.cameras import orbit_cameras
from fourdfy.types import Cameras


def stills(cfg: SingleViewConfig) -> Cameras:
    """``n_val_views`` views evenly around the object, from its front, at time 0."""
    azimuth = torch.linspace(0, 360, cfg.n_val_views + 1)[:-1]
    return _orbit(cfg, azimuth, torch.zeros_like(azimuth))


def front_video(cfg: SingleViewConfig) -> Cameras:
    """One clip seen from the front."""
    times = looped_times(_moments(cfg))
    return _orbit(cfg, torch.zeros_like(times), times)


def turntable(cfg: SingleViewConfig) -> Cameras:
    """``n_test_views`` views once around the object, at time 0."""
    azimuth = torch.linspace(0, 360, cfg.n_test_views + 1)[:-1]
    return _orbit(cfg, azimuth, torch.zeros_like(azimuth))


def moving_test(cfg: SingleViewConfig) -> Cameras:
    """The dynamic test sequence that ``test_traj`` names.

    null: forwards, each part a clip at rest and then ``num_test_loop_factor`` clips of turning.
    motion_smooth: backwards from 360; camera and time advance together, and all parts last two clips.
    motion_smooth_full: the same, with the first view of each turn, which repeats the rest, kept.
    """
    if cfg.test_traj is None:
        azimuth = _rest_and_turn(cfg)
        return _orbit(cfg, azimuth, looped_times(len(azimuth), len(azimuth) // _moments(cfg)))
    azimuth = _rest_and_turn_smoothly(cfg, keep_first=cfg.test_traj == "motion_smooth_full")
    return _orbit(cfg, azimuth, looped_times(len(azimuth), 2))


def looped_times(frames: int, clips: int = 1) -> Float[Tensor, "frames"]:
    """Times of ``frames`` frames that show the whole clip ``clips`` times; 1 is left out, since it is the
    next clip's 0."""
    return torch.arange(frames) * clips % frames / frames


def _moments(cfg: SingleViewConfig) -> int:
    return cfg.num_frames * cfg.num_frames_factor


def _rest_and_turn(cfg: SingleViewConfig) -> Float[Tensor, "F"]:
    moments, parts = _moments(cfg), cfg.num_test_loop_static
    part = 360 / parts
    pieces = []
    for i in range(parts):
        rest = torch.full((moments,), part * i)
        turn = torch.linspace(part * i, part * (i + 1), moments * cfg.num_test_loop_factor)
        pieces += [rest, turn]
    return torch.cat(pieces)


def _rest_and_turn_smoothly(cfg: SingleViewConfig, keep_first: bool) -> Float[Tensor, "F"]:
    parts = cfg.num_test_loop_static
    views, part = max(1, _moments(cfg) // parts), 360 / parts
    pieces = []
    for i in range(parts, 0, -1):
        rest = torch.full((views,), part * i)
        turn = torch.linspace(part * i, part * (i - 1), views)
        pieces += [rest, turn if keep_first else turn[1:]]
    return torch.cat(pieces)


def _orbit(cfg: SingleViewConfig, azimuth_deg: Float[Tensor, "F"], times: Float[Tensor, "F"]) -> Cameras:
    return orbit_cameras(
        torch.full_like(azimuth_deg, cfg.eval_elevation_deg),
        azimuth_deg,
        distance=cfg.eval_camera_distance,
        fovy_deg=cfg.eval_fovy_deg,
        times=times,
        height=cfg.eval_height,
        width=cfg.eval_width,
    )
