"""Changes how a diffusers UNet computes, and not what."""
