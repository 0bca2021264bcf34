"""The bundled model: a Stable Diffusion of 6 million weights that draws animals, trained by `build.py`."""

from pathlib import Path

MODEL = Path(__file__).parent / "model"
