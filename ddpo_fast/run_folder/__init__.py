"""What a run writes, and reads when it goes on."""
