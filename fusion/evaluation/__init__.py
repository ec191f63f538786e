"""Generation, task scores and the table that compares anchor, experts and fused model."""
