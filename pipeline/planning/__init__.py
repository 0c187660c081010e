"""What a run will take, and the refusal of what cannot fit. Nothing is started here."""
