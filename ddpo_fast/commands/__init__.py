"""The commands of `ddpo-fast`, and what each does before anything expensive starts."""
