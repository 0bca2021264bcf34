"""The bundled model: a Stable Diffusion of 6 million weights that draws animals, trained by `build.py`.

Beside it lies a scorer of its images: a CLIP of a million weights, trained by `build_scorer.py`.
"""

from pathlib import Path

MODEL = Path(__file__).parent / "model"
SCORER = Path(__file__).parent / "scorer"
