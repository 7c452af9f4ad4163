"""What surrounds a run: its settings and its folder, its report and the model card."""
