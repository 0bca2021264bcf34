"""The bundled models: a Stable Diffusion of 6 million weights that draws animals, trained by `build.py`, and a
Stable Diffusion 3 of 2.3 million weights that draws the same, by flow matching, trained by `build_flow.py`.

Beside them lies a scorer of their images: a CLIP of a million weights, trained by `build_scorer.py`.
"""

from pathlib import Path

MODEL = Path(__file__).parent / "model"
FLOW_MODEL = Path(__file__).parent / "flow_model"
SCORER = Path(__file__).parent / "scorer"
# the models by their names on the command line
MODELS = {"": MODEL, "bundled-flow": FLOW_MODEL}
