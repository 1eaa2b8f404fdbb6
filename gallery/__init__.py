"""The gallery: sample grids, attention sheets, and the HTML page of a run."""
