"""LoRI on the UNet of a diffusers pipeline: its parts, its noise, its loss, its images."""
