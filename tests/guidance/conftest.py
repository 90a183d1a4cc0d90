"""Tiny models in genuine folder layouts, saved once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny_models import save_multi_view, save_stable_diffusion, save_videocrafter2, save_zeroscope


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> dict[str, Path]:
    """Folders by kind: sd (epsilon), sd_v (v prediction), multi_view, zeroscope, videocrafter."""
    root = tmp_path_factory.mktemp("tiny_models")
    return {
        "sd": save_stable_diffusion(root / "sd"),
        "sd_v": save_stable_diffusion(root / "sd_v", prediction_type="v_prediction", seed=1),
        "multi_view": save_multi_view(root / "multi_view"),
        "zeroscope": save_zeroscope(root / "zeroscope"),
        "videocrafter": save_videocrafter2(root / "videocrafter"),
    }
